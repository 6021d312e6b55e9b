"""A stand-in for CAS(ME)^3: its layout, names and classes, with drawn faces.

    python render.py casme3 --data_folder data/rendered --subjects 12 --clips_per_subject 8

The folder holds difference images of both views, lists, encoding.json and truth.csv (what each
clip shows): 96 clips here, in about 10 s on two cores. With --lists, an image is rendered for
every path of existing lists (943 clips in about 80 s); with --raw, raw frames, an annotation and
OpenFace's tables are written instead.
"""
import argparse
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dataset import PAIR_COLUMNS, Clip
from images import encoding, lists
from images.lists import clip_key, image_paths
from rendering import clips, outputs
from rendering.expression import CLASS_OF, CLASSES, Job, perform
from rendering.face import rng_of
from rendering.videos import Event, Video, render_videos
from util import BadInput, number, positive_int, write_json, write_table

NOTE = "rendered stand-in data, not CAS(ME)^3"
# Square roots of the counts in the published lists, so that a small set holds enough clips of the
# rarest class.
CLASS_SHARE = np.sqrt([508, 170, 64, 201]) / np.sqrt([508, 170, 64, 201]).sum()
BLANK_SHARE = 62 / 943
GAPS = (2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 7, 8, 8, 8, 8)  # frames from onset to apex


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `render.py casme3`."""
    group = parser.add_argument_group("data")
    outputs.add_folder(group)
    group.add_argument("--subjects", type=number(int, 2), default=12,
                       help="number of subjects")
    group.add_argument("--clips_per_subject", type=positive_int, default=8,
                       help="labelled clips of each subject")
    group.add_argument("--lists", metavar="DIR",
                       help="folder with v_rgb and v_depth, labels as published: copy the lists "
                            "and render every clip they name, whatever --subjects and "
                            "--clips_per_subject say [none]")
    group.add_argument("--unlabelled", type=number(int, 0), default=0, metavar="N",
                       help="unlabelled pairs to render too, in all, named in pairs.tsv; with "
                            "--raw: expressions that the annotation leaves out")
    group.add_argument("--unlabelled_subjects", type=number(int, 0), default=0,
                       metavar="N", help="people that the unlabelled pairs show, none of whom "
                                         "is labelled; 0: the labelled people themselves")
    group.add_argument("--raw", nargs="?", const="part_A", choices=("part_A", "ME_clip"),
                       metavar="LAYOUT",
                       help="raw frames, annotation.csv and OpenFace's tables instead of "
                            "difference images; layout part_A (if none is named) or ME_clip (the "
                            "clips' package) [none]")
    group = parser.add_argument_group("picture")
    group.add_argument("--size", type=number(int, 32, 1024), default=256,
                       help="side of the images, pixels")
    group.add_argument("--raw_size", type=number(int, 64, 1920), nargs=2,
                       default=[320, 240], metavar=("W", "H"),
                       help="width and height of raw frames, pixels")
    outputs.add_amplitude(group)
    outputs.add_running(parser)


def check_options(parser: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Raises BadInput for flags that do not go together."""
    name, goes = ("size", "without --raw") if opt.raw else ("raw_size", "with --raw")
    if getattr(opt, name) != parser.get_default(name):
        raise BadInput(f"--{name} goes {goes}; drop one of the two")
    if opt.raw and opt.lists:
        raise BadInput("--raw with --lists: lists name difference images, not frames; drop one of "
                       "the two")
    if opt.raw == "ME_clip" and opt.unlabelled:
        raise BadInput("--raw ME_clip with --unlabelled: the package holds annotated clips alone; "
                       "give --raw part_A")
    if opt.unlabelled_subjects and (opt.raw or not opt.unlabelled):
        raise BadInput("--unlabelled_subjects goes with --unlabelled N, and not with --raw")


def run(opt: argparse.Namespace) -> None:
    """Renders what the options ask for, unless the folder holds it already."""
    write = write_raw if opt.raw else write_set
    outputs.render_once(opt.data_folder, asked_for(opt), NOTE, lambda folder: write(opt, folder))
    if opt.preview:
        write_preview(Path(opt.preview), opt.amplitude, opt.seed)


# ---------------------------------------------------------------- which clips

def draw_labels(subjects: int, clips_per_subject: int, seed: int) -> np.ndarray:
    """Class ids int `[subjects, clips]`: CLASS_SHARE over all, uneven per subject, and every class
    in two subjects at least."""
    total = subjects * clips_per_subject
    if total < 8:
        raise BadInput(f"--subjects {subjects} --clips_per_subject {clips_per_subject}: too few "
                       f"clips for four classes; ask for 8 clips or more")
    rng = rng_of(seed, "labels")
    share = rng.dirichlet(outputs.UNEVEN * CLASS_SHARE, subjects) + 1e-3
    labels = np.zeros((subjects, clips_per_subject), int)
    outputs.deal_labels(labels, 0, {label: max(2, round(CLASS_SHARE[label] * total))
                                    for label in (2, 1, 3)}, share, rng)
    return labels


def plan_clips(subjects: int, clips_per_subject: int, seed: int) -> list:
    """Labelled clips of a drawn data set: (Clip, Job) each, the paths relative."""
    plan = []
    for i, labels in enumerate(draw_labels(subjects, clips_per_subject, seed), 1):
        rng = rng_of(seed, "videos", i)
        for j, label in enumerate(labels):
            onset = 2400 * (j // 13) + int(rng.integers(16, 2300))
            blank = rng.random() < BLANK_SHARE
            apex = onset + int(rng.choice(GAPS)) * (not blank)
            kind, key = CLASSES[label], clip_key(f"spNO.{i}", "abcdefghijklm"[j % 13], onset, apex)
            plan.append((Clip(0, f"spNO{i}", key, int(label), image_paths(key, kind)),
                         Job(key, f"spNO{i}", kind, blank=blank)))
    return plan


def read_plan(folder: str) -> list:
    """The clips that existing lists name: (Clip, Job) each; raises BadInput."""
    plan = []
    for key, (paths, label, database, subject, where) in lists.read_paired(folder).items():
        if label >= len(CLASSES):
            raise BadInput(f"{where}: label {label} is not one of 0 to 3, {' '.join(CLASSES)}")
        frames = re.search(r"-(\d+)-[^-]+-[^-]+-(\d+)$", key)
        job = Job(key, subject, CLASSES[label], blank=bool(frames) and frames[1] == frames[2])
        plan.append((Clip(database, subject, key, label, paths), job))
    return plan


def plan_pairs(count: int, others: int, subjects: list, seed: int) -> list:
    """Unlabelled pairs: (Clip, Job) each, dealt out to the subjects, or to as many others."""
    if others:
        last = max(int(i) for name in subjects for i in re.findall(r"\d+", name) or [0])
        subjects = [f"spNO{last + i}" for i in range(1, others + 1)]
    plan = []
    for i in range(count):
        subject = subjects[i % len(subjects)]
        turn = i // len(subjects)
        rng = rng_of(seed, "pair", subject, turn)
        onset = 2400 * (turn // 13) + int(rng.integers(16, 2300))
        key = clip_key(re.sub(r"^(\D+?)\.?(\d)", r"\1.\2", subject), "nopqrstuvwxyz"[turn % 13],
                       onset, onset + int(rng.choice(GAPS)))
        plan.append((Clip(0, subject, key, -1, image_paths(key, "unlabelled")),
                     Job(key, subject, "")))
    return plan


# ---------------------------------------------------------------- rendering

def render(opt: argparse.Namespace, folder: Path, plan: list) -> list:
    """Renders the images of `plan` below `folder`; rows of truth.csv in the plan's order."""
    tasks = {}
    for clip, job in plan:
        rgb, depth = (folder / path for path in clip.paths)
        rgb.parent.mkdir(parents=True, exist_ok=True)
        depth.parent.mkdir(parents=True, exist_ok=True)
        tasks.setdefault(clip.subject, []).append(replace(
            job, rgb=str(rgb), depth=str(depth), size=opt.size, amplitude=opt.amplitude,
            seed=opt.seed))
    rows = {row["key"]: row
            for row in outputs.in_parallel(clips.render_subject, tasks.values(), opt.num_workers)}
    return [{**rows[clip.key], "label": "" if clip.label < 0 else clip.label} for clip, _ in plan]


def pair_rows(plan: list, rows: list) -> Iterator[tuple]:
    """Rows of pairs.tsv: intensity 0-5 as OpenFace's, one level per pixel of true amplitude."""
    for (clip, _), row in zip(plan, rows):
        _, video, apex, _, _, onset = clip.key.rsplit("-", 5)
        yield (*clip.paths, "casme3", clip.subject, video, onset, apex,
               f"{min(row['amplitude_px'], 5):.2f}", row["unit"], row["head_motion_px"])


def write_set(opt: argparse.Namespace, folder: Path) -> dict:
    """Renders everything that training reads into `folder`; returns the counts."""
    plan = read_plan(opt.lists) if opt.lists \
        else plan_clips(opt.subjects, opt.clips_per_subject, opt.seed)
    subjects = sorted({clip.subject for clip, _ in plan}, key=lists.natural)
    pairs = plan_pairs(opt.unlabelled, opt.unlabelled_subjects, subjects, opt.seed)
    rows = render(opt, folder, plan + pairs)
    if opt.lists:
        for view in sorted(Path(opt.lists).glob("v_*")):
            shutil.copytree(view, folder / view.name, copy_function=shutil.copyfile)
    else:
        lists.write_lists(folder, [clip for clip, _ in plan])
    if pairs:
        write_table(folder / "pairs.tsv", PAIR_COLUMNS, pair_rows(pairs, rows[len(plan):]), "\t")
    write_table(folder / "truth.csv", list(rows[0]), rows)
    labels = [clip.label for clip, _ in plan]
    classes = CLASSES[:max(labels) + 1]
    write_json(folder / "encoding.json", {
        "difference": clips.DIFFERENCE, "depth_range_mm": clips.RANGE_MM, "size": opt.size,
        "classes": classes, "rendered": True, "note": NOTE})
    return {"subjects": len(subjects), "clips": len(plan),
            **{name: labels.count(i) for i, name in enumerate(classes)},
            "blank clips": sum(job.blank for _, job in plan), "unlabelled pairs": len(pairs)}


# ---------------------------------------------------------------- raw frames

ANNOTATION = ("Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion")
OBJECTIVE = {"happy": "I", "surprise": "II", "anger": "III", "disgust": "IV", "sad": "V",
             "fear": "VI", "others": "VII"}
FIRST = 9  # the first frames of a video are missing


def plan_videos(opt: argparse.Namespace, folder: Path) -> tuple:
    """Videos of two labelled clips each, unlabelled expressions dealt out to them: lists of
    Video, one list per subject, and the annotation's rows."""
    subjects, table = [], []
    for s, labels in enumerate(draw_labels(opt.subjects, opt.clips_per_subject, opt.seed)):
        kinds = [CLASSES[label] for label in labels]
        shown = [kinds[v:v + 2] for v in range(0, len(kinds), 2)]
        for extra in range(len(range(s, opt.unlabelled, opt.subjects))):
            shown[extra % len(shown)].append("")
        subjects.append([])
        for v, kinds in enumerate(shown):
            name = "abcdefghijklmnopqrstuvwxyz"[v % 26] * (v // 26 + 1)
            subject = f"spNO.{s + 1}"
            events, last, rows = plan_events(subject, name, kinds, opt.amplitude, opt.seed)
            place = folder / "part_A" / subject / name
            for view in ("color", "depth"):
                (place / view).mkdir(parents=True)
            subjects[-1].append(Video(
                events[0].job.subject, name, place, folder / "openface" / f"{subject}_{name}.csv",
                FIRST, last, events, tuple(opt.raw_size), opt.seed))
            table += rows
    (folder / "openface").mkdir()
    return subjects, table


def plan_events(subject: str, name: str, kinds: list, amplitude: float, seed: int) -> tuple:
    """A video's expressions of `kinds`, with rest between: (Events, the number of its last frame,
    rows of the annotation)."""
    rng = rng_of(seed, "frames", subject, name)
    at, events, rows = FIRST + int(rng.integers(6, 12)), [], []
    for kind in kinds:
        apex = at + int(rng.choice(GAPS[1:]))
        offset = apex + int(rng.integers(5, 11))
        job = Job(clip_key(subject, name, at, apex), subject.replace(".", ""), kind,
                  amplitude=amplitude, seed=seed)
        act = perform(job)
        events.append(Event(at, apex, offset, job))
        if kind:
            rows.append(dict(zip(ANNOTATION, map(str, (
                subject, name, at, apex, offset, "+".join(map(str, sorted(act.units))),
                OBJECTIVE[act.emotion], act.emotion)))))
        at = offset + int(rng.integers(10, 15))
    return tuple(events), at - 6, rows


def write_raw(opt: argparse.Namespace, folder: Path) -> dict:
    """Renders raw frames, the annotation and OpenFace's tables; returns the counts."""
    subjects, table = plan_videos(opt, folder)
    videos = outputs.in_parallel(render_videos, subjects, opt.num_workers)
    rows = {row["key"]: row for events, _ in videos for row in events}
    boxes = [{"subject": events[0]["key"].split("-")[0], "video": events[0]["key"].split("-")[1],
              **box} for events, box in videos]
    boxes.sort(key=lambda box: (lists.natural(box["subject"]), box["video"]))
    write_table(folder / "boxes.csv", list(boxes[0]), boxes)
    jobs = [event.job for part in subjects for video in part for event in video.events]
    for job in jobs:
        if job.emotion:
            rows[job.key]["label"] = CLASS_OF[rows[job.key]["emotion"]]
    truth = [rows[job.key] for job in jobs]
    write_table(folder / "truth.csv", list(truth[0]), truth)
    if opt.raw == "ME_clip":
        package_clips(folder / "part_A", folder / "Part_A_ME_clip", table)
    write_table(folder / "annotation.csv", ANNOTATION, table)
    labels = [row["label"] for row in truth]
    return {"subjects": len(subjects), "videos": len(videos), "clips": len(table),
            **{name: labels.count(i) for i, name in enumerate(CLASSES)},
            "unlabelled expressions": len(jobs) - len(table)}


def package_clips(root: Path, package: Path, table: list) -> None:
    """Moves the annotated frames into the layout of the "ME clip" package."""
    for row in table:
        name = f"{row['Subject']}_{row['Filename']}_{row['Onset']}"
        for view, inner, extension in (("frame", "color", "jpg"), ("depth", "depth", "png")):
            place = package / view / name
            place.mkdir(parents=True)
            for frame in range(int(row["Onset"]), int(row["Offset"]) + 1):
                file = root / row["Subject"] / row["Filename"] / inner / f"{frame}.{extension}"
                file.rename(place / file.name)
    shutil.rmtree(root)


# ---------------------------------------------------------------- the example sheet

def choose_example(row: int, kind: str, amplitude: float, seed: int) -> Job:
    """A clip of the class that shows its expression well, of a subject of its own."""
    for i in range(400):
        job = Job(f"example-{i}", f"spNO{row + 1 + 4 * (i % 10)}", kind, seed=seed)
        act = perform(job)
        if 1.4 < act.strongest[1] < 2.4 and not act.blink and len(act.units) > 1:
            break
    return replace(job, amplitude=amplitude)


def write_preview(file: Path, amplitude: float, seed: int) -> None:
    """Onset, apex and both differences, stretched, of one clip per class, as one picture."""
    rows = []
    for row, kind in enumerate(CLASSES):
        job = choose_example(row, kind, amplitude, seed)
        act = perform(job)
        (onset, depth_onset), (apex, depth_apex) = clips.film(job, act)
        differences = clips.rgb_difference(onset, apex), clips.depth_difference(depth_onset,
                                                                                depth_apex)
        units = "+".join(map(str, sorted(act.units)))
        rows.append(((onset, apex, *(encoding.stretch(pixels, clips.DIFFERENCE, gain)
                                     for pixels, gain in zip(differences, (6, 2)))),
                     f"{kind}: {act.emotion}, action units {units}, {act.strongest[1]:.1f} px"))
    outputs.write_sheet(file, ("onset", "apex", "RGB difference, x6", "depth difference, x2"),
                        rows, NOTE)


# ---------------------------------------------------------------- the folder

def asked_for(opt: argparse.Namespace) -> dict:
    """What the content of the folder depends on, as it is recorded in rendered.json."""
    asked = {name: getattr(opt, name) for name in
             ("subjects", "clips_per_subject", "unlabelled", "raw", "amplitude", "seed")}
    asked["size"] = opt.raw_size if opt.raw else opt.size
    if opt.unlabelled_subjects:  # older folders do not say
        asked["unlabelled_subjects"] = opt.unlabelled_subjects
    if opt.lists:
        asked.update(subjects=None, clips_per_subject=None, lists=lists.digest(opt.lists))
    return asked
