"""Renders a stand-in for CAS(ME)^3: drawn faces whose expressions are known, in the same layout.

    python render.py --data_folder data/rendered --subjects 12 --clips_per_subject 8

No picture of a person is involved, and nothing here is CAS(ME)^3: licensed faces cannot be
shipped, so the scripts are tried on rendered ones. The folder holds difference images of both
views, lists, encoding.json and truth.csv (what each clip shows): 96 clips here, in about 10 s on
two cores. With --lists, an image is rendered for every path of existing lists (943 clips in about
80 s); with --raw, raw frames, an annotation and OpenFace's tables are written instead.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import csv
import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from dataset import PAIR_COLUMNS, Clip, clip_keys, natural, write_lists
from rendering import face
from training import options

NOTE = "rendered stand-in data, not CAS(ME)^3"
# Square roots of the counts in the published lists (508, 170, 64, 201), so that a small set holds
# enough clips of the rarest class; per subject as uneven as there (the Dirichlet concentration
# that fits those lists best).
CLASS_SHARE = np.sqrt([508, 170, 64, 201]) / np.sqrt([508, 170, 64, 201]).sum()
UNEVEN = 6.0
BLANK_SHARE = 62 / 943
GAPS = (2, 3, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 7, 8, 8, 8, 8)  # frames from onset to apex
ROOT = "casme3_diff_me4"


def parse_option(argv=None):
    parser = options.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--data_folder", required=True, metavar="DIR",
                       help="folder to write; reused if it holds the same rendering already")
    group.add_argument("--subjects", type=options.number(int, 2), default=12,
                       help="number of subjects")
    group.add_argument("--clips_per_subject", type=options.positive_int, default=8,
                       help="labelled clips of each subject")
    group.add_argument("--lists", metavar="DIR",
                       help="folder with v_rgb and v_depth, labels as published: copy the lists "
                            "and render every clip they name, whatever --subjects and "
                            "--clips_per_subject say [none]")
    group.add_argument("--unlabelled", type=options.number(int, 0), default=0, metavar="N",
                       help="unlabelled pairs to render too, in all, named in pairs.tsv; with "
                            "--raw: expressions that the annotation leaves out")
    group.add_argument("--unlabelled_subjects", type=options.number(int, 0), default=0,
                       metavar="N", help="people that the unlabelled pairs show, none of whom "
                                         "is labelled; 0: the labelled people themselves")
    group.add_argument("--raw", nargs="?", const="part_A", choices=tuple(ROOTS), metavar="LAYOUT",
                       help="raw frames, annotation.csv and OpenFace's tables instead of "
                            "difference images; layout part_A (if none is named), ME_clip (the "
                            "clips' package), or irregular (part_A with every known "
                            "irregularity planted once, named in irregularities.csv) [none]")
    group = parser.add_argument_group("picture")
    group.add_argument("--size", type=options.number(int, 32, 1024), default=256,
                       help="side of the images, pixels")
    group.add_argument("--raw_size", type=options.number(int, 64, 1920), nargs=2,
                       default=[320, 240], metavar=("W", "H"),
                       help="width and height of raw frames, pixels")
    group.add_argument("--amplitude", type=options.number(float, 0, 4), default=1.0,
                       help="factor on all expressions; 0: faces without any expression")
    group = parser.add_argument_group("running")
    group.add_argument("--num_workers", type=options.number(int, 0), default=os.cpu_count() or 1,
                       help="processes; 0: none but this one; the result is the same")
    group.add_argument("--seed", type=options.number(int, 0), default=0,
                       help="everything drawn follows from (seed, clip)")
    group = parser.add_argument_group("output")
    group.add_argument("--preview", metavar="FILE.png",
                       help="also write a sheet of example clips to this file [none]")
    opt = parser.parse_args(argv)
    if opt.raw and opt.lists:
        raise util.BadInput("--raw with --lists: lists name difference images, not frames; drop "
                            "one of the two")
    if opt.unlabelled_subjects and (opt.raw or not opt.unlabelled):
        raise util.BadInput("--unlabelled_subjects goes with --unlabelled N, and not with --raw")
    return opt


# ---------------------------------------------------------------- which clips

def draw_labels(opt):
    """Class ids int `[subjects, clips]`: CLASS_SHARE over all, uneven per subject, and every class
    in two subjects at least."""
    total = opt.subjects * opt.clips_per_subject
    if total < 8:
        raise util.BadInput(f"--subjects {opt.subjects} --clips_per_subject "
                            f"{opt.clips_per_subject}: too few clips for four classes; ask for 8 "
                            f"clips or more")
    rng = face.rng_of(opt.seed, "labels")
    share = rng.dirichlet(UNEVEN * CLASS_SHARE, opt.subjects) + 1e-3
    labels = np.zeros((opt.subjects, opt.clips_per_subject), int)
    for label in (2, 1, 3):  # the rarest first; what is left is negative
        holders = []
        for n in range(max(2, round(CLASS_SHARE[label] * total))):
            chance = share[:, label] * (labels == 0).sum(1)
            if n == 1 and np.delete(chance, holders).any():
                chance[holders] = 0
            holders.append(rng.choice(opt.subjects, p=chance / chance.sum()))
            labels[holders[-1], rng.choice(np.nonzero(labels[holders[-1]] == 0)[0])] = label
    return labels


def name_clip(subject, video, onset, apex, kind):
    """(key, RGB path, depth path) as published; kind: the folder, such as 'negative'."""
    key = f"{subject}-{video}-{apex}-{subject}-{video}-{onset}"
    return (key, f"{ROOT}/casme3_diff_imgs_all/{kind}/{key}_diff.png",
            f"{ROOT}/casme3_diff_depth_all/{kind}/{key}_diff_depth.png")


def plan_clips(opt):
    """Labelled clips of a drawn data set: list of (Clip, Job), the paths relative."""
    plan = []
    for i, labels in enumerate(draw_labels(opt), 1):
        rng = face.rng_of(opt.seed, "videos", i)
        for j, label in enumerate(labels):
            onset = 2400 * (j // 13) + int(rng.integers(16, 2300))
            blank = rng.random() < BLANK_SHARE
            apex = onset + int(rng.choice(GAPS)) * (not blank)
            kind = face.CLASSES[label]
            key, rgb, depth = name_clip(f"spNO.{i}", "abcdefghijklm"[j % 13], onset, apex, kind)
            plan.append((Clip(0, f"spNO{i}", key, int(label), rgb, depth),
                         face.Job(key, f"spNO{i}", kind, blank=blank)))
    return plan


def read_plan(folder):
    """The clips that existing lists name: list of (Clip, Job); raises BadInput."""
    views = []
    for view in ("v_rgb", "v_depth"):
        rows = {}
        for subject in _read(Path(folder) / "v_rgb" / "subName.txt"):
            path = Path(folder) / view / f"{subject}_test.txt"
            for number, line in enumerate(_read(path), 1):
                fields = line.rsplit(None, 2)
                if len(fields) != 3 or fields[1] not in "0123" or not fields[2].isdigit():
                    raise util.BadInput(f"{path}:{number}: {line[:80]!r} is not '<path> <label> "
                                        f"<database>' with one of the labels 0 to 3")
                name = fields[0].replace("\\", "/")
                if name.startswith("/") or ".." in name.split("/") or name in rows:
                    raise util.BadInput(f"{path}:{number}: {name} is absolute, leads outside, or "
                                        f"comes twice; give every image one path below the folder")
                rows[name] = (subject, int(fields[1]), int(fields[2]))
        keys = clip_keys(rows, ("rgb", "depth"))
        views.append({keys[name]: (name, *row) for name, row in rows.items()})
    alone = set(views[0]) ^ set(views[1])
    if alone:
        raise util.BadInput(f"{folder}: {len(alone)} clips are in one view's lists only, such as "
                            f"{min(alone)}; both views must hold the same clips")
    plan = []
    for key, (rgb, subject, label, database) in views[0].items():
        found = re.search(r"-(\d+)-[^-]+-[^-]+-(\d+)$", key)
        job = face.Job(key, subject, face.CLASSES[label],
                            blank=bool(found) and found[1] == found[2])
        plan.append((Clip(database, subject, key, label, rgb, views[1][key][0]), job))
    return plan


def _read(path):
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise util.BadInput(f"{path}: not a readable list; --lists names a folder with v_rgb and "
                            f"v_depth as published") from None
    return [line.strip() for line in lines if line.strip()]


def plan_pairs(opt, subjects):
    """Unlabelled pairs: list of (Clip, Job), dealt out to the subjects, or to as many others as
    --unlabelled_subjects says."""
    if opt.unlabelled_subjects:
        last = max(int(number) for name in subjects for number in re.findall(r"\d+", name) or [0])
        subjects = [f"spNO{last + i}" for i in range(1, opt.unlabelled_subjects + 1)]
    plan = []
    for i in range(opt.unlabelled):
        subject = subjects[i % len(subjects)]
        turn = i // len(subjects)
        rng = face.rng_of(opt.seed, "pair", subject, turn)
        onset = 2400 * (turn // 13) + int(rng.integers(16, 2300))
        key, rgb, depth = name_clip(re.sub(r"^(\D+?)\.?(\d)", r"\1.\2", subject),
                                    "nopqrstuvwxyz"[turn % 13], onset,
                                    onset + int(rng.choice(GAPS)), "unlabelled")
        plan.append((Clip(0, subject, key, -1, rgb, depth), face.Job(key, subject, "")))
    return plan


# ---------------------------------------------------------------- rendering

def render(opt, folder, plan):
    """Renders the images of `plan` below `folder`; rows of truth.csv in the plan's order."""
    tasks = {}
    for clip, job in plan:
        rgb, depth = folder / clip.rgb, folder / clip.second
        rgb.parent.mkdir(parents=True, exist_ok=True)
        depth.parent.mkdir(parents=True, exist_ok=True)
        tasks.setdefault(clip.subject, []).append(replace(
            job, rgb=str(rgb), depth=str(depth), size=opt.size, amplitude=opt.amplitude,
            seed=opt.seed))
    rows = {row["key"]: row for row in in_parallel(opt, face.render_subject, tasks.values())}
    return [{**rows[clip.key], "label": "" if clip.label < 0 else clip.label} for clip, _ in plan]


def in_parallel(opt, function, tasks):
    """All that `function(task)` lists, over all tasks (lists), with a progress bar."""
    tasks = sorted(tasks, key=len, reverse=True)
    rows = []
    with tqdm(total=sum(map(len, tasks)), desc="rendering", unit="clip", disable=None) as bar:
        if opt.num_workers < 2:
            results = map(function, tasks)
            pool = None
        else:
            pool = ProcessPoolExecutor(min(opt.num_workers, len(tasks)))
            results = pool.map(function, tasks)
        try:
            for task, result in zip(tasks, results):
                rows += result
                bar.update(len(task))
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
    return rows


def write_table(path, rows, delimiter=","):
    """Rows (dicts of one set of columns) as a CSV file with a header, LF."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_pairs(folder, plan, rows):
    """pairs.tsv: intensity 0-5 as OpenFace's, one level per pixel of true amplitude."""
    table = []
    for (clip, _), row in zip(plan, rows):
        _, video, apex, _, _, onset = clip.key.rsplit("-", 5)
        values = (clip.rgb, clip.second, "casme3", clip.subject, video, onset, apex,
                  f"{min(row['amplitude_px'], 5):.2f}", row["unit"], row["head_motion_px"])
        table.append(dict(zip(PAIR_COLUMNS, values)))
    write_table(folder / "pairs.tsv", table, "\t")


def write_set(opt, folder):
    """Renders everything that training reads into `folder`; returns the counts."""
    plan = read_plan(opt.lists) if opt.lists else plan_clips(opt)
    subjects = sorted({clip.subject for clip, _ in plan}, key=natural)
    pairs = plan_pairs(opt, subjects)
    rows = render(opt, folder, plan + pairs)
    if opt.lists:
        for view in sorted(Path(opt.lists).glob("v_*")):
            shutil.copytree(view, folder / view.name, copy_function=shutil.copyfile)
    else:
        write_lists(folder, [clip for clip, _ in plan])
    if pairs:
        write_pairs(folder, pairs, rows[len(plan):])
    write_table(folder / "truth.csv", rows)
    labels = [clip.label for clip, _ in plan]
    classes = face.CLASSES[:max(labels) + 1]
    util.write_json(folder / "encoding.json", {
        "difference": "signed", "depth_range_mm": 10, "size": opt.size, "classes": classes,
        "rendered": True, "note": NOTE})
    return {"subjects": len(subjects), "clips": len(plan),
            **{name: labels.count(i) for i, name in enumerate(classes)},
            "blank clips": sum(job.blank for _, job in plan), "unlabelled pairs": len(pairs)}


# ---------------------------------------------------------------- raw frames

ROOTS = {"part_A": "part_A", "irregular": "part_A_split/part_A", "ME_clip": "part_A"}
ANNOTATION = ("Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion")
OBJECTIVE = {"happy": "I", "surprise": "II", "anger": "III", "disgust": "IV", "sad": "V",
             "fear": "VI", "others": "VII"}
FIRST = 9  # the first frames of a video are missing
NO_DOT = 210  # a subject whose depth folder is spNO210


def plan_videos(opt, folder):
    """Videos of two labelled clips each, unlabelled expressions dealt out to them: lists of
    face.Video, one list per subject, and the annotation's rows."""
    subjects, table = [], []
    numbers = list(range(1, opt.subjects + 1))
    if opt.raw == "irregular":
        numbers[-1] = NO_DOT
    for s, (number, labels) in enumerate(zip(numbers, draw_labels(opt))):
        kinds = [face.CLASSES[label] for label in labels]
        shown = [kinds[v:v + 2] for v in range(0, len(kinds), 2)]
        for extra in range(len(range(s, opt.unlabelled, opt.subjects))):
            shown[extra % len(shown)].append("")
        subjects.append([])
        for v, kinds in enumerate(shown):
            name = "abcdefghijklmnopqrstuvwxyz"[v % 26] * (v // 26 + 1)
            video, rows = plan_video(opt, folder, f"spNO.{number}", name, kinds)
            subjects[-1].append(video)
            table += rows
    return subjects, table


def plan_video(opt, folder, subject, name, kinds):
    """One video that shows expressions of `kinds`, with rest between; its annotation's rows."""
    rng = face.rng_of(opt.seed, "frames", subject, name)
    at, events, rows = FIRST + int(rng.integers(6, 12)), [], []
    person = subject.replace(".", "")
    for kind in kinds:
        apex = at + int(rng.choice(GAPS[1:]))
        offset = apex + int(rng.integers(5, 11))
        key = f"{subject}-{name}-{apex}-{subject}-{name}-{at}"
        job = face.Job(key, person, kind, amplitude=opt.amplitude, seed=opt.seed)
        act = face.perform(job)
        events.append(face.Event(at, apex, offset, job))
        if kind:
            rows.append(dict(zip(ANNOTATION, map(str, (
                subject, name, at, apex, offset, "+".join(map(str, sorted(act.units))),
                OBJECTIVE[act.emotion], act.emotion)))))
        at = offset + int(rng.integers(10, 15))
    place, tables = folder / ROOTS[opt.raw] / subject / name, folder / "openface"
    for made in (place / "color", place / "depth", tables):
        made.mkdir(parents=True, exist_ok=True)
    return face.Video(
        person, name, str(place / "color"), str(place / "depth"),
        str(tables / f"{subject}_{name}.csv"), FIRST, at - 6, tuple(events), tuple(opt.raw_size),
        opt.seed), rows


def write_raw(opt, folder):
    """Renders raw frames, the annotation and OpenFace's tables; returns the counts."""
    subjects, table = plan_videos(opt, folder)
    made = in_parallel(opt, face.render_videos, subjects)
    rows = {row["key"]: row for events, _ in made for row in events}
    boxes = [{"subject": events[0]["key"].split("-")[0], "video": events[0]["key"].split("-")[1],
              **box} for events, box in made]
    write_table(folder / "boxes.csv", sorted(boxes, key=lambda b: (natural(b["subject"]),
                                                                   b["video"])))
    jobs = [event.job for videos in subjects for video in videos for event in video.events]
    for job in jobs:
        if job.emotion:
            rows[job.key]["label"] = face.CLASS_OF[rows[job.key]["emotion"]]
    write_table(folder / "truth.csv", [rows[job.key] for job in jobs])
    labels = [rows[job.key]["label"] for job in jobs]
    root = folder / ROOTS[opt.raw]
    if opt.raw == "irregular":
        write_table(folder / "irregularities.csv", plant_irregularities(root, table))
    if opt.raw == "ME_clip":
        package_clips(root, folder / "Part_A_ME_clip", table)
    write_table(folder / "annotation.csv", table)
    return {"subjects": len(subjects), "videos": sum(map(len, subjects)), "clips": len(table),
            **{name: labels.count(i) for i, name in enumerate(face.CLASSES)},
            "unlabelled expressions": len(jobs) - len(table)}


def package_clips(root, package, table):
    """Moves the annotated frames into the layout of the "ME clip" package."""
    for row in table:
        name = f"{row['Subject']}_{row['Filename']}_{row['Onset']}"
        for view, inner, extension in (("frame", "color", "jpg"), ("depth", "depth", "png")):
            place = package / view / name
            place.mkdir(parents=True)
            for number in range(int(row["Onset"]), int(row["Offset"]) + 1):
                file = root / row["Subject"] / row["Filename"] / inner / f"{number}.{extension}"
                file.rename(place / file.name)
    shutil.rmtree(root)


def plant_irregularities(root, table):
    """Plants every irregularity in a clip of its own, in the files below `root` and the rows of
    the annotation; returns a row per irregularity that says where."""
    free, done = list(table), []
    for name, fits, plant in IRREGULARITIES:
        row = next((row for row in free if fits(row)), None)
        if row is None:
            raise util.BadInput(f"--raw irregular: no clip is left for '{name}'; ask for more "
                                f"--subjects or --clips_per_subject")
        free = [r for r in free if r is not row]
        done.append({"irregularity": name, **row})
        plant(row, root / row["Subject"] / row["Filename"])
    return done


def _dotted(row):
    return row["Subject"] != f"spNO.{NO_DOT}"


def _slow(row):
    return _dotted(row) and int(row["Apex"]) - int(row["Onset"]) >= 4


def _remove(row, video, near=0, views=("color", "depth")):
    """Deletes the apex frame, and as many neighbours on both sides as `near` says."""
    for number in range(int(row["Apex"]) - near, int(row["Apex"]) + near + 1):
        for view in views:
            next((video / view).glob(f"{number}.*")).unlink()


def _flatten(row, video):
    for file in (video / "depth").iterdir():
        file.rename(video / file.name)
    (video / "depth").rmdir()


def _lose_dot(row, video):
    for depth in list(video.parent.glob("*/depth")):
        place = video.parent.with_name(f"spNO{NO_DOT}") / depth.parent.name
        place.mkdir(parents=True)
        depth.rename(place / "depth")


# What is irregular in the data as received: name, the rows it can be planted in, how.
IRREGULARITIES = [
    ("subject without the dot in the depth tree", lambda row: not _dotted(row), _lose_dot),
    ("Others beside others", lambda row: row["emotion"] == "others",
     lambda row, video: row.update(emotion="Others")),
    ("apex frame missing", _slow, _remove),
    ("apex frame missing in depth", _slow,
     lambda row, video: _remove(row, video, views=("depth",))),
    ("apex frame and its neighbours missing", _dotted,
     lambda row, video: _remove(row, video, near=2)),
    ("depth folder without the inner depth/", _dotted, _flatten),
    ("apex equal to onset", _dotted, lambda row, video: row.update(Apex=row["Onset"])),
    ("apex outside onset to offset", _dotted,
     lambda row, video: row.update(Apex=str(int(row["Offset"]) + 3))),
    ("offset 0", _dotted, lambda row, video: row.update(Offset="0")),
    ("onset and apex 0", _dotted, lambda row, video: row.update(Onset="0", Apex="0")),
    ("clip of several seconds", _dotted, lambda row, video: row.update(
        Apex=str(int(row["Onset"]) + 150), Offset=str(int(row["Onset"]) + 170))),
    ("subject in another case", _dotted,
     lambda row, video: row.update(Subject=row["Subject"].replace("spNO", "spNo"))),
    ("video letter in another case", _dotted,
     lambda row, video: row.update(Filename=row["Filename"].upper())),
]


# ---------------------------------------------------------------- the example sheet

def choose_example(opt, row, kind):
    """A clip of the class that shows its expression well, of a subject of its own."""
    for i in range(400):
        job = face.Job(f"example-{i}", f"spNO{row + 1 + 4 * (i % 10)}", kind,
                            seed=opt.seed, amplitude=1.0)
        act = face.perform(job)
        if 1.4 < act.strongest[1] < 2.4 and not act.blink and len(act.units) > 1:
            break
    return replace(job, amplitude=opt.amplitude)


def write_preview(opt, file):
    """Onset, apex and both differences, stretched, of one clip per class, as one picture."""
    side, gap, head = 256, 6, 30
    sheet = Image.new("RGB", (4 * side + 5 * gap, head + 4 * (side + head) + head), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)
    for col, title in enumerate(("onset", "apex", "RGB difference, x6",
                                 "depth difference, x2")):
        draw.text((gap + col * (side + gap), 6), title, "black", font)
    for row, kind in enumerate(face.CLASSES):
        job = choose_example(opt, row, kind)
        act = face.perform(job)
        (onset, depth_onset), (apex, depth_apex) = face.film(job, act)
        pictures = (onset, apex, stretch(face.rgb_difference(onset, apex), 6),
                    stretch(face.depth_difference(depth_onset, depth_apex), 2))
        top = head + row * (side + head)
        for col, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).convert("RGB"), (gap + col * (side + gap), top))
        units = "+".join(map(str, sorted(act.units)))
        draw.text((gap, top + side + 4), f"{kind}: {act.emotion}, action units {units}, "
                  f"{act.strongest[1]:.1f} px", "black", font)
    draw.text((gap, sheet.height - head + 4), NOTE, "black", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
    print(f"example clips: {file}")


def stretch(difference, gain):
    """Contrast about "no change", for the eye."""
    return (128 + gain * (difference.astype(float) - 128)).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- the folder

def asked_for(opt):
    """What the content of the folder depends on, as it is recorded in rendered.json."""
    asked = {name: getattr(opt, name) for name in
             ("subjects", "clips_per_subject", "unlabelled", "raw", "amplitude", "seed")}
    asked["size"] = opt.raw_size if opt.raw else opt.size
    if opt.unlabelled_subjects:  # older folders do not say
        asked["unlabelled_subjects"] = opt.unlabelled_subjects
    if opt.lists:
        digest = hashlib.sha256()
        for path in sorted(Path(opt.lists).glob("v_*/*.txt")):
            digest.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
        asked.update(subjects=None, clips_per_subject=None, lists=digest.hexdigest())
    return asked


def find_finished(folder, asked):
    """rendered.json of a folder that holds what is asked for; None for no folder or an empty one.
    Raises BadInput for anything else."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return None
    try:
        found = json.loads((folder / "rendered.json").read_text(encoding="utf-8"))
        options = found["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise util.BadInput(f"{folder}: holds something that this script did not render; name "
                            f"another --data_folder") from None
    differ = sorted(k for k in asked.keys() | options.keys() if asked.get(k) != options.get(k))
    if differ:
        raise util.BadInput(
            f"{folder}: rendered with other options ("
            + ", ".join(f"{k} {options.get(k)} there, {asked.get(k)} asked for" for k in differ)
            + "); remove it or name another --data_folder")
    return found


def print_summary(folder, counts, seconds):
    print(", ".join(f"{name} {count}" for name, count in counts.items() if count)
          + (f"; {seconds:.1f} s" if seconds else ""))
    print(f"{NOTE}: {folder}")


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    folder, asked = Path(os.path.abspath(opt.data_folder)), asked_for(opt)
    finished = find_finished(folder, asked)
    if finished:
        print(f"{folder}: rendered already with these options, reused")
        print_summary(folder, finished["counts"], None)
    else:
        start = time.time()
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        try:
            counts = (write_raw if opt.raw else write_set)(opt, part)
            util.write_json(part / "rendered.json", {"note": NOTE, "options": asked,
                                                     "counts": counts})
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        print_summary(folder, counts, time.time() - start)
    if opt.preview:
        write_preview(opt, Path(opt.preview))


if __name__ == "__main__":
    main()
