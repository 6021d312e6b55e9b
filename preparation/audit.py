"""Pictures by which a person sees whether the preparation is right: audit/*.png."""
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from images import encoding, flow
from preparation import cutting, outputs
from preparation.annotation import Table
from util import write_figure

PER_CLASS = 5  # clips per class on audit/<class>.png
FLOW_PER_CLASS = 2  # and on audit/flow.png
DRY_CLIPS = 20
WORST = (("residual", "most residual motion", "{:.2f} px"),
         ("invalid", "most invalid depth", "{:.0%} of the face"),
         ("clipped", "most clipped depth", "{:.1%} of the face"))


def draw_all(settings: cutting.Settings, table: Table, clips: list, folder: Path,
             images: str | None = None) -> None:
    """Draws audit/<class>.png, audit/worst.png and audit/histograms.png.

    clips: (row, task, record) each; images: the folder with the difference images [folder].
    """
    target = Path(folder) / "audit"
    target.mkdir(parents=True, exist_ok=True)
    if images is None:  # of the whole set
        for page in target.glob("*.png"):  # of classes that there were before
            if page.name != "flow.png":  # of prepare.py casme2
                page.unlink()
    images = Path(images or folder)
    for label, name in (*enumerate(table.classes), (-1, "unlabelled")):
        members = [c for c in clips if c[0].label == label]
        moving = [c for c in members if not c[0].blank]
        title = f"{name}: {len(moving)} clips, {len(members) - len(moving)} blank ones beside them"
        shown = moving or members
        chosen = [shown[i] for i in spread(len(shown), PER_CLASS)]
        if chosen:
            draw_clips(target / f"{name}.png", title, [(c, caption(c)) for c in chosen], settings,
                       images)
    worst = find_worst(clips)
    if worst:
        draw_clips(target / "worst.png", "the clips to look at first", worst, settings, images)
    draw_histograms(target / "histograms.png", clips)


def spread(n: int, wanted: int) -> list:
    """At most `wanted` indices of range(n), evenly spread."""
    return sorted({int(i) for i in np.linspace(0, n - 1, min(n, wanted))})


def caption(clip: tuple) -> str:
    """What was measured of a clip (row, task, record), in lines."""
    row, _, record = clip
    residual = "-" if record["residual"] is None else f"{record['residual']:.2f}"
    return (f"{row.key}\n{row.emotion or 'unlabelled'}\n"
            f"action units: {row.units or 'not known'}\n"
            + f"onset to apex: {row.apex - row.onset} frames\n" * (
                not row.files and row.apex > row.onset)  # else unknown
            + f"head moved {record['shift']:.2f} px, left {residual} px\n"
            f"rms change {record['amplitude']:.2f} levels\n"
            f"depth invalid {record['invalid']:.0%}, clipped {record['clipped']:.1%}"
            + ("\nblank" if row.blank else ""))


def find_worst(clips: list) -> list:
    """The three worst clips by each measure and two blank ones, with captions."""
    worst = []
    for name, title, form in WORST:
        ranked = sorted((c for c in clips if c[2][name]), key=lambda c: (-c[2][name], c[0].key))
        worst += [(c, f"{title}: {form.format(c[2][name])}\n{caption(c)}") for c in ranked[:3]]
    blank = [c for c in clips if c[0].blank][:2]
    return worst + [(c, f"blank\n{caption(c)}") for c in blank]


def draw_clips(path: Path, title: str, clips: list, settings: cutting.Settings,
               images: Path) -> None:
    """One row per clip: onset, apex (aligned), both differences, what is known of it."""
    rows = []
    for (row, task, _), text in clips:
        depth = difference(images / row.depth, settings.difference, 1) if task.depth else None
        rows.append(([*crops(task, settings, images),
                      difference(images / row.rgb, settings.difference, 4), depth], text))
    draw_rows(path, title, ("onset", "apex, registered", "RGB difference ×4", "depth difference"),
              rows)


def draw_flow(folder: Path, rows: list, classes: Sequence[str]) -> None:
    """Draws audit/flow.png: a few clips of each class, the flow of their four steps as colours."""
    frames, steps = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("frames", "flow"))
    drawn = []
    for name in classes:
        members = [i for i, row in enumerate(rows) if row.emotion == name]
        for i in (members[j] for j in spread(len(members), FLOW_PER_CLASS)):
            field, row = steps[i].astype(np.float32), rows[i]
            colours = flow.channels(torch.from_numpy(field), "hsv").permute(0, 2, 3, 1).numpy()
            longest = np.sqrt((field ** 2).sum(1)).max((1, 2))
            drawn.append(([frames[i, 0].transpose(1, 2, 0), frames[i, 2].transpose(1, 2, 0),
                           *colours],
                          f"{row.key}\n{name}\naction units: {row.units or 'not known'}\n"
                          f"frames {row.onset}, {row.apex}, {row.offset}\nlongest of each step: "
                          + " ".join(f"{value:.1f}" for value in longest) + " px"))
    (folder / "audit").mkdir(exist_ok=True)
    draw_rows(folder / "audit" / "flow.png", "hue: direction; brightness: length, 0 to the longest "
              "of the step", ("onset", "third frame", *(f"flow, step {i}" for i in range(1, 5))),
              drawn)


def draw_rows(path: Path, title: str, heads: Sequence[str], rows: list) -> None:
    """A sheet with one row per clip; rows: (its pictures, None for none, and a text) each."""
    height, count = 2.6 * len(rows) + 0.6, len(heads)  # inches
    figure, top = Figure(figsize=(2.55 * count + 3.8, height)), 0.75 / height  # the titles' share
    axes = figure.subplots(len(rows), count + 1, squeeze=False, width_ratios=[1] * count + [1.55])
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - top, wspace=0.04,
                           hspace=0.12)
    figure.suptitle(title, y=1 - top / 4, va="center")
    for (pictures, text), line in zip(rows, axes):
        for axis, picture, head in zip(line, pictures, heads):
            axis.axis("off")
            axis.set_title(head, fontsize=9)
            if picture is None:
                axis.text(0.5, 0.5, "none", ha="center", va="center")
            else:
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        line[-1].axis("off")
        line[-1].text(0, 0.95, text, va="top", fontsize=8.5, transform=line[-1].transAxes,
                      parse_math=False)
    write_figure(path, figure, dpi=80)


def crops(task: cutting.Task, settings: cutting.Settings, folder: Path) -> tuple:
    """The aligned crops of a clip, or (None, None) for a blank one without frames."""
    try:
        aligned, _ = cutting.make_crops(task, settings, folder)
    except cutting.Unusable:
        aligned = None
    return (aligned.onset, aligned.apex) if aligned else (None, None)


def difference(path: Path, kind: str, gain: int) -> np.ndarray:
    """A difference image for the eye, changes enlarged by `gain`; kind: its encoding."""
    with Image.open(path) as image:
        return encoding.stretch(np.asarray(image), kind, gain)


def draw_histograms(path: Path, clips: list) -> None:
    """Motion and amplitude over all clips that are not blank."""
    records = [record for row, _, record in clips if not row.blank]
    residual = [r["residual"] for r in records if r["residual"] is not None]
    panels = (([r["shift"] for r in records], "head motion taken off, pixels of the crop"),
              (residual, "residual motion, pixels of the crop"),
              ([r["amplitude"] for r in records], "rms change over the face, grey levels"))
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    for axis, (values, label) in zip(figure.subplots(1, 3), panels):
        axis.hist(values, bins=min(40, 5 + len(values) // 4), color="0.35")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(label)
        axis.set_ylabel("clips")
        if values:
            axis.set_title(f"median {np.median(values):.2f}, largest {max(values):.2f}",
                           fontsize=9)
    write_figure(path, figure, dpi=80)


def choose_clips(rows: list) -> list:
    """Indices of about DRY_CLIPS clips, evenly spread over the classes and within each."""
    labels, chosen = sorted({row.label for row in rows}), []
    for label in labels:
        members = [i for i, row in enumerate(rows) if row.label == label]
        chosen += [members[i] for i in spread(len(members), -(-DRY_CLIPS // len(labels)))]
    return chosen[:DRY_CLIPS]


def dry_run(settings: cutting.Settings, table: Table, rows: list, tasks: list, folder: Path,
            cut_all: Callable) -> None:
    """Cuts some clips of every class aside, draws them, and prints the counts of all.

    cut_all(tasks, folder) returns the records of tasks.
    """
    chosen = choose_clips(rows)
    with tempfile.TemporaryDirectory() as aside:
        records = cut_all([tasks[i] for i in chosen], Path(aside))
        clips = [(rows[i], tasks[i], record) for i, record in zip(chosen, records)
                 if "dropped" not in record]
        draw_all(settings, table, clips, folder, aside)
    table.dropped += [(rows[i].key, record["dropped"]) for i, record in zip(chosen, records)
                      if "dropped" in record]
    if table.source["rows"]:
        outputs.print_counts(table, outputs.counts(table, [(row,) for row in table.rows]))
    outputs.print_rules(table)
    print(f"dry run: {len(rows)} clips have their frames, {len(clips)} of {len(chosen)} tried were "
          f"cut; nothing but {folder / 'audit'} was written")
