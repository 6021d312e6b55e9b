"""Pictures of a run: its curves, the confusion matrix, the clips most confidently wrong.

Drawn without pyplot, so that no window system and no state is involved. Lines are in the colours
of Okabe and Ito, maps in cividis and viridis: both can be told apart without red and green.
"""
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dataset import ClipSet
from evaluation import measures, result_files
from images import encoding, flow, lists, transforms, videos
from training.record import Run, read_log
from util import write_figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito
# curves.png: title, axis, and the log's fields with the name and colour of their line
PANELS = (("contrastive loss", "nats", {"rgb_loss": ("RGB", BLUE), "depth_loss": (None, ORANGE)}),
          ("probability of the right pair", "", {"rgb_prob": ("RGB", BLUE),
                                                 "depth_prob": (None, ORANGE)}),
          ("action-unit loss", "", {"au_loss": ("", BLUE)}),
          ("training loss", "", {"train_loss": ("", BLUE)}),
          ("parts of the loss", "", {"rank_loss": ("ranks", BLUE),
                                     "region_loss": ("regions", ORANGE),
                                     "wasserstein": ("Wasserstein", GREEN)}),
          ("validation", "", {"val_uf1": ("UF1", BLUE), "val_accuracy": ("accuracy", ORANGE),
                              "ema_val_uf1": ("UF1 of the average", PURPLE)}),
          ("relabelled images", "", {"relabelled": ("", PURPLE)}),
          ("UF1 on inner folds", "", {"inner_uf1": ("", GREEN)}),
          ("training accuracy", "", {"train_accuracy": ("", BLUE)}),
          ("learning rate", "", {"learning_rate": ("", GREEN)}))
GRAD_CAM = "looked at: Grad-CAM of the predicted class"
ORACLE = "oracle/"  # names of figures that look at the held-out subjects
PANEL, GAP, PANELS_WIDE = 1.35, 0.06, 8  # mistakes.png: side and gap of a panel, inches; in a row
TITLE, BELOW = 0.5, 0.2  # inches above a clip's panels, for its text and their heads, and below


def shorten(text: str, length: int) -> str:
    """The text, its middle left out where it is longer than `length` characters."""
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[head + 1 - length:]}"


def draw_confusion(path: Path, confusion: np.ndarray, classes: list[str],
                   title: str = "") -> None:
    """The confusion matrix as a picture: counts, and shades of each row's share."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 2.4 + 0.8 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(column, row, f"{count}\n{share[row, column]:.0%}", ha="center", va="center",
                  color="white" if share[row, column] > 0.55 else "black")
    names, plain = [shorten(name, 24) for name in classes], {"parse_math": False}
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor",
                    **plain)
    axes.set_yticks(range(len(names)), [f"{c} ({n})" for c, n in zip(names, confusion.sum(1))],
                    **plain)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (number)")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    write_figure(path, figure)


def draw_comparison(path: str | Path, rows: list[tuple], baselines: dict,
                    title: str = "", units: str = "subjects") -> None:
    """UF1 of several results with their 95 % intervals, and of the baselines as lines.

    rows: (name, UF1, (low, high) or None); baselines: name → UF1; units: what is resampled.
    """
    figure = Figure(figsize=(7.2, 1.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, uf1, interval) in enumerate(rows):
        if interval:
            axes.plot(interval, [place, place], color=BLUE, linewidth=2)
        axes.plot(uf1, place, "o", color=BLUE)
        axes.annotate(f"{uf1:.3f}", (uf1, place), (0, 6), textcoords="offset points",
                      ha="center", fontsize="small")
    for (name, uf1), colour, style in zip(baselines.items(), (ORANGE, GREEN), ("--", "-.")):
        axes.axvline(uf1, color=colour, linestyle=style, label=name.replace("_", " "))
    axes.set_yticks(range(len(rows)), [shorten(name, 60) for name, _, _ in rows],
                    parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, None)
    axes.set_xlabel(f"UF1 on held-out {units}, with 95 % intervals over {units}")
    figure.suptitle(title, fontsize="medium")  # above the names too: it may be longer than the axes
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    write_figure(path, figure)


def draw_results(run: Run, results: dict) -> None:
    """confusion.png and curves.png of a run's results; with --oracle_curve, also the figures on
    what is held out, per epoch."""
    oracle = {}
    if run.opt.oracle_curve and "oracle_best_epoch" in results:
        histories = result_files.histories_of(result_files.read_subjects(run.folder).values())
        each = measures.per_epoch(histories, results["n_label"])
        oracle = {f"{ORACLE}{name}": [figures[name] for figures in each]
                  for name in measures.MEASURES}
        run.log(None).curves(oracle)
    draw_confusion(run.folder / "confusion.png", np.array(results["confusion"]),
                   results["classes"], "rendered stand-in data" * results["rendered"])
    draw_curves(run.folder, oracle)


# ---------------------------------------------------------------- curves

def draw_curves(folder: Path, held_out: dict | None = None) -> None:
    """`<folder>/curves.png` from its log.jsonl: a panel per kind of figure, epochs to the right.

    Where a run holds several trainings (held-out subjects), each is a faint line and their mean a
    strong one. held_out: figures of the held-out subjects (name under ORACLE → values at the
    epochs 1, 2, …), where they may be shown.
    """
    header, *lines = read_log(folder)
    lines += [{"epoch": epoch, name: value} for name, curve in (held_out or {}).items()
              for epoch, value in enumerate(curve, 1)]
    second = lists.view_names(header["opt"].get("view", "RGB_D"))[1]
    panels = [(title, quantity, {name: (second if label is None else label, colour)
                             for name, (label, colour) in fields.items()
                             if any(name in line for line in lines)})
              for title, quantity, fields in PANELS]
    panels += [("oracle: sees the held-out subjects", "", {
        name: (name.removeprefix(ORACLE), (PURPLE, GREEN, ORANGE, BLUE)[i % 4])
        for i, name in enumerate(held_out or {})})]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(3.9 * max(len(panels), 1), 3.3), layout="constrained")
    figure.suptitle(shorten(Path(folder).resolve().name, 44 * max(len(panels), 1)),
                    fontsize="medium", parse_math=False)
    for place, (title, quantity, fields) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for name, (label, colour) in fields.items():
            _draw_curve(axes, _series(lines, name), label, colour)
        axes.set_title(title, fontsize="medium")
        if any("l2" in line for line in lines):
            axes.set_xlabel("penalty (--l2)")
            axes.set_xscale("log")
        else:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
        if title == "learning rate":
            _scale_rate(axes, [line["learning_rate"] for line in lines if "learning_rate" in line])
        elif any(word in title for word in ("prob", "accuracy", "validation", ORACLE[:-1])):
            axes.set_ylim(-0.03, 1.03)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    write_figure(Path(folder) / "curves.png", figure)


def _series(lines, name):
    """{training: {epoch: value}} of one field of the log; of solved heads, {penalty: value}."""
    series = {}
    for line in lines:
        if name in line:
            series.setdefault(line.get("subject"), {})[line.get("l2", line["epoch"])] = line[name]
    return series


def _draw_curve(axes, series, label, colour):
    """One line, or faint ones of each training and their mean over those that got so far."""
    style = {"color": colour, "linestyle": "--" if colour == ORANGE else "-",
             "marker": "o" if max(map(len, series.values())) < 2 else None}
    if len(series) == 1:
        (values,) = series.values()
        axes.plot(list(values), list(values.values()), label=label or None, **style)
        return
    for values in series.values():
        axes.plot(list(values), list(values.values()), linewidth=0.8,
                  **style | {"alpha": 0.25 if len(series) < 20 else 0.08})
    epochs = sorted({epoch for values in series.values() for epoch in values})
    means = [np.mean([v[epoch] for v in series.values() if epoch in v]) for epoch in epochs]
    axes.plot(epochs, means, linewidth=2, label=f"{label} mean of {len(series)}".strip(), **style)


def _scale_rate(axes, rates):
    """A logarithmic axis where the rate decays; from 0 where it does not."""
    if max(rates) > min(rates) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.2 * max(rates) or 1)


# ---------------------------------------------------------------- mistakes

class Panel(NamedTuple):
    """One picture of a clip: its title, image float or uint8 `[H, W, 3]`, and over it a map uint8
    `[h, w]`, or None, and why there is none; '' where none belongs."""
    title: str
    image: np.ndarray
    heat: np.ndarray | None = None
    lack: str = ""


def draw_mistakes(path: Path, drawn: list[tuple[dict, list[Panel]]], counts: tuple[int, int],
                  classes: list[str], rendered: bool = False,
                  maps_are: str = GRAD_CAM,
                  noun: str = "clips") -> None:
    """The clips most confidently wrong: what they show, and where the model looked.

    drawn: (prediction row, its Panels) of each; counts: (mistakes, clips) in all; maps_are: what
    the maps show.
    """
    each = len(drawn[0][1]) if drawn else 4
    blocks = max(1, PANELS_WIDE // each)
    width, height = each * PANEL + (each - 1) * GAP, PANEL + TITLE + BELOW
    deep = -(-len(drawn) // blocks) or 1
    size = max(blocks * width + (blocks + 1) * 0.2, 7.0), deep * height + 1.05
    figure, axes = _sheet(size)
    top = f"{len(drawn)} most confidently wrong of {counts[0]} mistakes in {counts[1]} {noun}" \
        if drawn else f"no mistake in {counts[1]} {noun}"
    _write(axes, 0.2, 0.15, top + "; rendered stand-in data" * rendered, 11)
    if drawn:
        _explain(axes, maps_are)
    for number, (row, panels) in enumerate(drawn):
        left = 0.2 + number % blocks * (width + 0.2)
        above = 0.8 + number // blocks * height
        _describe(axes, left, above, row, classes)
        for k, panel in enumerate(panels):
            place = left + k * (PANEL + GAP), above + TITLE
            _write(axes, place[0] + PANEL / 2, place[1] - 0.03, panel.title, 7, ha="center",
                   va="bottom")
            _show(axes, *place, panel.image)
            if panel.lack:
                _overlay(axes, *place, panel.heat, panel.lack)
    write_figure(path, figure)


def change_panels(clips: ClipSet, images: np.ndarray, places: list[int],
                  maps: list[list]) -> list[list[Panel]]:
    """Panels of difference images uint8 `[N, C1+C2, S, S]`: each view, and it in grey under its
    map."""
    views = [_visible(np.stack([images[i] for i in places]), clips.encoding["difference"], part)
             for part in (slice(0, 3), slice(3, None))]
    panels = []
    for number, own in enumerate(maps):
        lack = "not seen" if any(m is not None for m in own) else "no map kept"
        panels.append([panel for v, name in enumerate(("RGB", *clips.views[1:])) for panel in (
            Panel(f"{name} change", views[v][number]),
            Panel(f"{name}, looked at", _grey(views[v][number]), own[v], lack))])
    return panels


def motion_panels(clips: ClipSet, arrays: videos.Videos, places: list[int],
                  maps: list[list]) -> list[list[Panel]]:
    """Panels of videos: the onset, flow from onset to the third frame as colours, and the maps of
    the blocks over the onset."""
    third = "middle" if arrays.info.get("middle") == "published" else "apex"
    panels = []
    for place, own in zip(places, maps):
        onset = arrays.frames[place, 0].transpose(1, 2, 0)
        steps = torch.from_numpy(arrays.steps[arrays.index[place, 0]]).float()
        apex = videos.to_apex(steps, arrays.info["reference"])
        colours = flow.channels(apex, "hsv").permute(1, 2, 0).numpy()
        panels.append([Panel("onset", onset), Panel(f"flow to the {third}", colours), *(
            Panel(f"block {b}", _grey(onset / 255), heat, "no map kept")
            for b, heat in enumerate(own, 1))])
    return panels


def face_panels(faces: np.ndarray, maps: list) -> list[list[Panel]]:
    """Panels of face images uint8 `[N, 3, S, S]`: the image, and it in grey under its map."""
    return [[Panel("image", face), Panel("looked at", _grey(face / 255), own[0], "no map kept")]
            for face, own in zip(faces.transpose(0, 2, 3, 1), maps)]


def draw_rows(path: Path, rows: list[tuple], title: str = "") -> None:
    """Images laid out in rows, each (caption, images uint8 `[M, 3, S, S]`, texts of each)."""
    across = max((len(images) for _, images, _ in rows), default=1)
    size = across * (PANEL + GAP) + 0.4, len(rows) * (PANEL + 0.75) + 0.5
    figure, axes = _sheet(size)
    _write(axes, 0.2, 0.12, title, 11)
    for number, (caption, images, told) in enumerate(rows):
        above = 0.5 + number * (PANEL + 0.75)
        _write(axes, 0.2, above, caption, 9)
        for k, (image, text) in enumerate(zip(images, told)):
            left = 0.2 + k * (PANEL + GAP)
            _show(axes, left, above + 0.2, image.transpose(1, 2, 0))
            _write(axes, left, above + 0.24 + PANEL, text, 6.5)
    write_figure(path, figure)


def draw_plane(path: Path, points: np.ndarray, groups: dict[str, list[str]],
               shares: np.ndarray, title: str = "") -> None:
    """Points `[N, 2]` of a plane, a panel for each of `groups` (what is told apart → name of each
    point); shares: of the variance, along the axes. Up to ten names have a legend."""
    figure = Figure(figsize=(5.4 * len(groups), 4.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for place, (kind, names) in enumerate(groups.items(), 1):
        axes, known = figure.add_subplot(1, len(groups), place), sorted(set(names))
        colours = matplotlib.colormaps["tab10" if len(known) <= 10 else "gist_ncar"]
        for k, name in enumerate(known):
            own = points[[one == name for one in names]]
            axes.scatter(*own.T, s=9, alpha=0.7, label=shorten(name, 24), color=colours(
                k if len(known) <= 10 else 0.95 * k / (len(known) - 1)))
        axes.set_title(f"by {kind}" + f" ({len(known)})" * (len(known) > 10), fontsize="medium")
        for say, share in zip((axes.set_xlabel, axes.set_ylabel), shares):
            say(f"principal component, {share:.0%} of the variance")
        if len(known) <= 10:
            axes.legend(fontsize="x-small")
    write_figure(path, figure)


def _grey(image):
    return image.mean(-1, keepdims=True).repeat(3, -1)


def _sheet(size):
    """(figure of so many inches, axes that fill it and count inches from its left and its top);
    one for all images: axes of their own would take longer than what they show."""
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0), autoscale_on=False)
    axes.set_axis_off()
    return figure, axes


def _write(axes, left, above, text, fontsize=8, ha="left", va="top", **style):
    """Text on a sheet."""
    axes.text(left, above, text, fontsize=fontsize, ha=ha, va=va, parse_math=False, **style)


def _show(axes, left, above, image, width=PANEL, height=PANEL, **style):
    """An image on a sheet."""
    axes.imshow(image, extent=(left, left + width, above + height, above), aspect="auto", **style)


def _explain(axes, maps_are):
    _write(axes, 0.2, 0.42, f"{maps_are}, each map in shares of its own maximum:  0")
    _show(axes, 5.25, 0.43, np.linspace(0, 1, 64)[None], 1.0, 0.12, cmap="viridis")
    _write(axes, 6.32, 0.42, "1")


def _describe(axes, left, above, row, classes):
    """Two lines: the clip, and what it was taken for."""
    true, taken = (shorten(classes[row[name]], 20) for name in ("label", "prediction"))
    _write(axes, left, above, shorten(row["key"], 76), 7.5)
    who = f"{shorten(row['subject'], 20)}: " * bool(row["subject"])
    _write(axes, left, above + 0.16, f"{who}{true} → {taken}  "
           f"(p {max(row['probabilities']):.2f}, true {row['probabilities'][row['label']]:.2f})",
           7.5)


def _visible(images, difference, channels):
    """Change of one view for the eye, float `[N, H, W, 3]` in 0..1, of images uint8
    `[N, C, S, S]`: the crop the model saw, in one scale over all, "no change" grey (black
    where differences are absolute)."""
    levels = encoding.levels(transforms.centre_crop(images[:, channels]), difference)
    scale = max(np.percentile(abs(levels), 99.5), 1)
    shown = levels / scale if difference == "absolute" else 0.5 + levels / (2 * scale)
    shown = shown.clip(0, 1).transpose(0, 2, 3, 1)
    return shown if shown.shape[-1] == 3 else shown.repeat(3, -1)


def _overlay(axes, left, above, heat, lack):
    """A map (uint8 `[h, w]`; None: there is none, and `lack` says why) over an image."""
    if heat is None or not heat.any():
        text = lack if heat is None else "nothing in its favour"
        _write(axes, left + PANEL / 2, above + PANEL / 2, text, 7, ha="center", va="center",
               bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5})
        return
    _show(axes, left, above, matplotlib.colormaps["viridis"](heat / 255), alpha=0.65,
          interpolation="bilinear")
