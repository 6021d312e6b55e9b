"""Pictures by which a person sees whether the preparation is right: audit/*.png."""
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from images.decoding import NO_CHANGE  # noqa: E402
from preparation import (
    cutting,  # noqa: E402
    outputs,  # noqa: E402
)

PER_CLASS = 5  # clips per class on audit/<class>.png
DRY_CLIPS = 20
WORST = (("residual", "most residual motion", "{:.2f} px"),
         ("invalid", "most invalid depth", "{:.0%} of the face"),
         ("clipped", "most clipped depth", "{:.1%} of the face"))


def draw_all(settings, table, clips, folder, images=None):
    """Draws audit/<class>.png, audit/worst.png and audit/histograms.png.

    clips: (row, task, record) each; images: the folder with the difference images [folder].
    """
    target, images = Path(folder) / "audit", Path(images or folder)
    target.mkdir(parents=True, exist_ok=True)
    for label, name in (*enumerate(table.classes), (-1, "unlabelled")):
        members = [c for c in clips if c[0].label == label]
        seen = [c for c in members if not c[0].blank]
        title = f"{name}: {len(seen)} clips, {len(members) - len(seen)} blank ones beside them"
        chosen = [(seen or members)[i] for i in spread(len(seen or members), PER_CLASS)]
        if chosen:
            draw_clips(target / f"{name}.png", title, [(c, caption(c)) for c in chosen], settings,
                       images)
    worst = find_worst(clips)
    if worst:
        draw_clips(target / "worst.png", "the clips to look at first", worst, settings, images)
    draw_histograms(target / "histograms.png", clips)


def spread(n, wanted):
    """At most `wanted` indices of range(n), evenly spread."""
    return sorted({int(i) for i in np.linspace(0, n - 1, min(n, wanted))}) if n else []


def caption(clip):
    row, _, record = clip
    residual = "-" if record["residual"] is None else f"{record['residual']:.2f}"
    return (f"{row.key}\n{row.emotion or 'unlabelled'}\n"
            f"action units: {row.units or 'not known'}\n"
            f"onset to apex: {row.apex - row.onset} frames\n"
            f"head moved {record['shift']:.2f} px, left {residual} px\n"
            f"rms change {record['amplitude']:.2f} levels\n"
            f"depth invalid {record['invalid']:.0%}, clipped {record['clipped']:.1%}"
            + ("\nblank" if row.blank else ""))


def find_worst(clips):
    """The three worst clips by each measure and two blank ones, with captions."""
    found = []
    for name, title, form in WORST:
        ranked = sorted((c for c in clips if c[2][name]), key=lambda c: (-c[2][name], c[0].key))
        found += [(c, f"{title}: {form.format(c[2][name])}\n{caption(c)}") for c in ranked[:3]]
    blank = [c for c in clips if c[0].blank][:2]
    return found + [(c, f"blank\n{caption(c)}") for c in blank]


def draw_clips(path, title, clips, settings, images):
    """One row per clip: onset, apex (aligned), both differences, what is known of it."""
    heads = ("onset", "apex, registered", "RGB difference ×4", "depth difference")
    figure, axes = plt.subplots(len(clips), 5, figsize=(14, 2.6 * len(clips) + 0.6),
                                squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.55]})
    top = 0.75 / (2.6 * len(clips) + 0.6)  # inches for the titles, as a share
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - top, wspace=0.04,
                           hspace=0.12)
    figure.suptitle(title, y=1 - top / 4, va="center")
    for (clip, text), line in zip(clips, axes):
        row, task, _ = clip
        pictures = [*crops(task, settings, images), difference(images / row.rgb, settings, 4),
                    difference(images / row.depth, settings, 1) if task.depth else None]
        for axis, picture, head in zip(line, pictures, heads):
            axis.axis("off")
            axis.set_title(head, fontsize=9)
            if picture is None:
                axis.text(0.5, 0.5, "none", ha="center", va="center")
            else:
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        line[4].axis("off")
        line[4].text(0, 0.95, text, va="top", fontsize=8.5, transform=line[4].transAxes)
    save(figure, path)


def crops(task, settings, folder):
    """The aligned crops of a clip, or (None, None) for a blank one without frames."""
    try:
        pair, _ = cutting.make_pair(task, settings, folder)
    except cutting.Unusable:
        pair = None
    return (pair.onset, pair.apex) if pair else (None, None)


def difference(path, settings, gain):
    """A difference image for the eye: 128 is "no change", changes enlarged by `gain`."""
    with Image.open(path) as image:
        change = np.asarray(image).astype(np.int16) - NO_CHANGE[settings.difference]
    if settings.difference == "wrap":
        change = (change + 128) % 256 - 128
    return (128 + gain * change).clip(0, 255).astype(np.uint8)


def draw_histograms(path, clips):
    """Motion and amplitude over all clips that are not blank."""
    records = [record for row, _, record in clips if not row.blank]
    known = [r["residual"] for r in records if r["residual"] is not None]
    panels = (([r["shift"] for r in records], "head motion taken off, pixels of the crop"),
              (known, "residual motion, pixels of the crop"),
              ([r["amplitude"] for r in records], "rms change over the face, grey levels"))
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for axis, (values, label) in zip(axes, panels):
        axis.hist(values, bins=min(40, 5 + len(values) // 4), color="0.35")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(label)
        axis.set_ylabel("clips")
        if values:
            axis.set_title(f"median {np.median(values):.2f}, largest {max(values):.2f}",
                           fontsize=9)
    save(figure, path)


def save(figure, path):
    """Writes the figure atomically; the same content gives the same bytes."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=80, metadata={"Software": None})
    plt.close(figure)
    part.replace(path)


def choose_clips(rows, wanted=DRY_CLIPS):
    """Indices of about `wanted` clips, evenly spread over the classes and within each."""
    labels = sorted({row.label for row in rows})
    chosen = []
    for label in labels:
        members = [i for i, row in enumerate(rows) if row.label == label]
        chosen += [members[i] for i in spread(len(members), -(-wanted // len(labels)))]
    return chosen[:wanted]


def dry_run(settings, table, rows, tasks, folder, cut_all):
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
