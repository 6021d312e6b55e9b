"""CASME II's workbook and frames → five registered frames a clip and the optical flow between them.

  python prepare.py casme2 --raw Cropped --annotation CASME2-coding-20140508.xlsx \\
      --data_folder data/casme2

Five classes: happiness, repression, disgust, surprise, others. Prints its counts beside the
published ones. The same for other sets with --clips. A run that was stopped goes on when started
again, one that was finished is kept. Look at <data_folder>/audit/flow.png afterwards. Expect ten
clips a second on two cores.
"""
import argparse
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from images import flow
from images.lists import DATABASES, natural
from images.videos import jittered
from preparation import (
    annotation,
    audit,
    cutting,
    detection,
    flow_sets,
    options,
    outputs,
    registration,
    sheets,
    videos,
)
from preparation.annotation import Row, Table
from util import (
    BadInput,
    add_processes,
    number,
    read_table,
    remove_leftovers,
    sha256_of,
)

COLUMNS = ("subject", "filename", "onsetframe", "apexframe", "offsetframe", "action units",
           "estimated emotion")
CLASSES = ("happiness", "repression", "disgust", "surprise", "others")
PUBLISHED = {"2014": (32, 27, 63, 25, 99), "2019": (32, 27, 63, 28, 99)}
CLIP_COLUMNS = ("database", "subject", "clip", "folder", "onset", "apex", "offset", "label")
NUMBER = re.compile(r"[0-9]{1,9}")  # str.isdigit() also takes ², which is no number to int()
# the last digits count: 006_05562.jpg is a frame of SAMM's; hidden files are none
IMAGE = re.compile(r"(?!\.)(?:.*\D)?(\d+)\.(?:jpe?g|png|bmp)", re.IGNORECASE)
PLAIN = re.compile(r"\D*\d+\.\D*")  # others beside such names are copies: img46 2.jpg
PREFIXES = 5  # folders that may lie between the root and a subject


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare.py casme2`."""
    data = parser.add_argument_group("data")
    data.add_argument("--raw", required=True, metavar="DIR",
                      help="frames as received, sub01/EP02_01f/reg_img46.jpg below any folder, or "
                           "what --clips refers to")
    data.add_argument("--annotation", metavar="FILE",
                      help="CASME II's workbook of 2014 or 2019 (.xlsx, .xls), or the same table "
                           "as .csv")
    data.add_argument("--clips", metavar="FILE.csv",
                      help=f"other sets: {','.join(CLIP_COLUMNS)} and, optional, units; folders "
                           f"relative to --raw, frames by the number in their name")
    data.add_argument("--tolerance", type=number(int, 0), default=1,
                      help="a missing frame is replaced by the nearest within this many frames")
    data.add_argument("--bad_apex", choices=("middle", "drop"), default="middle",
                      help="of a clip whose apex is no number, its onset, or outside of it: the "
                           "middle of onset and offset stands in, or the clip is dropped")
    motion = parser.add_argument_group("motion")
    motion.add_argument("--flow", choices=flow.METHODS, default="dis",
                        help="dis: OpenCV's DIS, preset medium, nearer the truth below a pixel; "
                             "farneback: with the published parameters")
    motion.add_argument("--reference", choices=("previous", "onset"), default="previous",
                        help="frame that each step of flow starts from; previous: as published")
    motion.add_argument("--middle", choices=("apex", "published"), default="apex",
                        help="third of the five frames: the apex, or the middle of onset and "
                             "offset as in the published code")
    motion.add_argument("--jitters", type=number(int, 0), default=3,
                        help="jittered onsets, and offsets, of which the flow is made for "
                             "training")
    options.add_crop_options(parser, 224, ("none",),
                             "none: the whole frame, which suits the official crops")
    run = parser.add_argument_group("running")
    add_processes(run)
    output = parser.add_argument_group("output")
    output.add_argument("--data_folder", required=True, metavar="DIR",
                        help="folder for clips.csv, onset_apex.csv, flow.npy, jitter.npy, "
                             "index.npy, frames.npy, flow.json and audit/")


def check_options(parser: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Answers flags that do not go together."""
    if bool(opt.annotation) == bool(opt.clips):
        parser.error("give --annotation or --clips")
    options.check_crop(parser, opt)
    if opt.size % 16:
        parser.error("argument --size: a multiple of 16")
    if opt.crop[0] == "none" and opt.margin != parser.get_default("margin"):
        parser.error("--margin goes with a face that is cut out, not with --crop none")


# ---------------------------------------------------------------- the workbook

def read_workbook(path: str | Path, bad_apex: str) -> Table:
    """Table of CASME II's workbook, either version; raises BadInput."""
    path = Path(path)
    cells, table = sheets.read_sheet(path), Table([], {
        "name": path.name, "sha256": sha256_of(path)}, CLASSES)
    places = sheets.header(path, cells, COLUMNS)
    table.source["rows"], keys, names = 0, set(), {}
    for row, line in cells[1:]:
        values = {name: sheets.cell_text(line[i]) if i < len(line) else ""
                  for name, i in places.items()}
        if not any(values.values()):
            continue
        table.source["rows"] += 1
        subject = subject_name(values["subject"])
        names.setdefault(values["filename"], set()).add(subject)
        add_clip(table, Entry(
            f"row {row}", "casme2", subject, values["filename"],
            *[values[name] for name in ("onsetframe", "apexframe", "offsetframe")],
            values["estimated emotion"].lower(), values["action units"]), keys, bad_apex)
    for row in table.rows:
        if len(names[row.video]) > 1:
            table.repaired("file name of several subjects: told apart by them", row.key)
    if not table.rows:
        raise BadInput(f"{path}: no clip of the five classes in it; the rows below the header name "
                       f"one each")
    return table


def subject_name(text: str) -> str:
    """The subject of a workbook's cell as the folders spell it: 1, S1, sub01 and Subject 1 are
    sub01."""
    number = re.fullmatch(r"(?i)(?:s|sub|subject)?[ _.-]*0*(\d+)", text)
    return f"sub{int(number[1]):02d}" if number else text


def read_clips(path: str | Path, bad_apex: str) -> Table:
    """Table of a --clips file, the folder of each clip in `files`; raises BadInput."""
    path, keys = Path(path), set()
    rows, _ = read_table(path, CLIP_COLUMNS, fix="--clips names a CSV file with the columns "
                         f"{','.join(CLIP_COLUMNS)}")
    # a column with a gap makes pandas write 46.0
    rows = [(place, {name: sheets.cell_text(cell) for name, cell in row.items()})
            for place, row in rows]
    names = {row["label"].lower() for _, row in rows} - {""}
    table = Table([], {"name": path.name, "sha256": sha256_of(path), "rows": len(rows)},
                  tuple(sorted(names, key=natural)))
    # difference images are named by the key alone, whatever the database
    named = Counter((subject, clip, onset) for _, subject, clip, onset in {
        (row["database"], row["subject"].lower(), row["clip"].lower(), row["onset"])
        for _, row in rows})
    for place, row in rows:
        if not row["folder"]:
            raise BadInput(f"{place}: no folder; each clip has one of its own below --raw")
        if row["database"] not in DATABASES:
            raise BadInput(f"{place}: database {row['database']!r} is not one of "
                           f"{', '.join(DATABASES)}")
        several = named[row["subject"].lower(), row["clip"].lower(), row["onset"]] > 1
        add_clip(table, Entry(
            place, *[row[name] for name in ("database", "subject", "clip", "onset", "apex",
                                            "offset")],
            row["label"].lower(), row.get("units") or "", (row["folder"],),
            f"{row['database']}-" * several), keys, bad_apex)
    if not table.rows:
        raise BadInput(f"{path}: no clip in it; one row per clip")
    annotation.check_spelling(path, table.rows)
    return table


class Entry(NamedTuple):
    """A row of a table, as text, and where it stands; files: folder of the clip's frames, where the
    table names it; prefix: of the clip's key."""
    where: str
    database: str
    subject: str
    clip: str
    onset: str
    apex: str
    offset: str
    emotion: str
    units: str
    files: tuple = ()
    prefix: str = ""


def add_clip(table: Table, entry: Entry, keys: set, bad_apex: str) -> None:
    """Adds one clip to a Table, or names why not; keys: of the clips so far, which it joins;
    bad_apex: --bad_apex."""
    where, database, subject, clip, onset, apex, offset, emotion, units, files, prefix = entry
    key, reason = f"{prefix}{subject}-{clip}-{onset}", ""
    identity = database, subject.lower(), clip.lower(), onset
    if not (annotation.is_name(subject) and annotation.is_name(clip)):
        table.dropped.append((where, f"subject {subject!r} or clip {clip!r} is no name"))
        return
    if not emotion:
        reason = "no label"
    elif emotion not in table.classes:
        reason = f"emotion {emotion!r} is none of the classes"
    elif not (NUMBER.fullmatch(onset) and NUMBER.fullmatch(offset) and int(onset) < int(offset)):
        reason = f"onset {onset!r} and offset {offset!r} are not two frame numbers in their order"
    elif identity in keys:
        reason = "a second row for this subject, clip and onset"
    elif key.lower() in keys:
        reason = "another subject and clip make the same name; rename one of them"
    else:
        keys |= {identity, key.lower()}
        first, peak, last = int(onset), int(apex) if NUMBER.fullmatch(apex) else None, int(offset)
        rule = "apex is no frame number" if peak is None else \
            "apex equal to onset" if peak == first else \
            "apex outside onset to offset" if not first < peak <= last else ""
        reason = rule * (bad_apex == "drop")
    if reason:
        table.dropped.append((key, f"{where}: {reason}"))
        return
    if rule:
        peak = max(first + 1, (first + last) // 2)  # an apex is no onset
        table.repaired(f"{rule}: the middle of onset and offset", key)
    table.rows.append(Row(DATABASES.index(database), subject, clip, first, peak, last, units,
                          emotion, key, table.classes.index(emotion), files=files))


# ---------------------------------------------------------------- frames

def find_folders(root: Path) -> dict:
    """(subject number, file name in small letters) → folder of its frames, below any prefix;
    raises BadInput where there is none, or two of one clip."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; --raw holds the frames as received")
    folders, level = {}, [root]
    for _ in range(PREFIXES + 1):
        below = [path for folder in level for path in sorted(folder.iterdir())
                 if path.is_dir() and path.name != "__MACOSX"]
        for path in below:
            if name := re.fullmatch(r"(?i)sub(\d+)", path.name):
                for clip in sorted(filter(Path.is_dir, path.iterdir())):
                    first = folders.setdefault((int(name[1]), clip.name.lower()), clip)
                    if first != clip and not first.samefile(clip):
                        raise BadInput(f"{clip}: frames of a clip that {first} holds too; keep one "
                                       f"of them, or give a narrower --raw")
        level = below
    if not folders:
        raise BadInput(f"{root}: no folder such as sub01/EP02_01f in it; --raw holds the frames as "
                       f"received")
    return folders


def numbered(folder: Path) -> dict[int, str]:
    """Frame number → path of the images of a folder; reg_img before img, where both are there, and
    46.jpg before 46.png, which is its depth."""
    frames = {}
    images = sorted(filter(lambda path: IMAGE.fullmatch(path.name) and path.is_file(),
                           folder.iterdir()),
                    key=lambda path: path.suffix.lower() == ".png")
    images.sort(key=lambda path: path.stem.lower(), reverse=True)
    for path in [path for path in images if PLAIN.fullmatch(path.name)] or images:
        frames.setdefault(int(IMAGE.fullmatch(path.name)[1]), str(path))
    return frames


def spellings(row: Row, onset: str) -> Iterator[tuple]:
    """How a boxes.csv may name a row whose onset frame is the file `onset`: by the workbook's clip
    and frame number, or by those of onset_apex.csv, of which prepare.py casme3 makes one."""
    for video in (row.video, flow_sets.clip_name(row)):
        for frame in (str(row.onset), Path(onset).stem):
            yield DATABASES[row.database], row.subject, video, frame


def existing(variants: list, path_of: dict, tolerance: int) -> tuple[dict, str]:
    """(wanted frame number → the nearest that exists, why the first of the variants cannot be
    had or ''); jittered frames without one are left out."""
    if not path_of:
        return {}, "no frames of it are there"
    moved = {}
    for wanted in dict.fromkeys(n for frames in variants for n in frames):
        nearest = min(path_of, key=lambda n, wanted=wanted: (abs(n - wanted), n))
        if abs(nearest - wanted) <= tolerance:
            moved[wanted] = nearest
        elif wanted in variants[0]:
            return moved, f"frame {wanted} is missing, the nearest is {nearest}"
    return moved, ""


def move_apex(row: Row, path_of: dict, moved: dict, tolerance: int) -> str:
    """Why a row has no apex, or '': one that would be taken for its onset (`moved`, as `existing`
    gives it) becomes the nearest frame after that."""
    if row.apex not in moved:  # the third of --middle published is another frame
        return "" if max(path_of) > moved[row.onset] else "no frame after its onset is there"
    if moved[row.apex] > moved[row.onset]:
        return ""
    later = [n for n in path_of if moved[row.onset] < n <= row.apex + tolerance]
    if not later:
        return f"apex {row.apex} is missing, and the nearest frame is that of the onset"
    moved[row.apex] = min(later)
    return ""


def find_frames(opt: argparse.Namespace, table: Table) -> list[videos.Task]:
    """Tasks for the rows whose frames are there; the table keeps those rows, with the paths of
    onset and apex as their `files`, and names the rest."""
    root, box_of = Path(opt.raw), options.box_finder(opt.crop, opt.roll)
    folders = find_folders(root) if opt.annotation else {}
    kept, tasks, owners = [], [], {}
    for row in table.rows:
        number = re.fullmatch(r"sub(\d+)", row.subject)
        folder = root / row.files[0] if row.files else \
            folders.get((int(number[1]) if number else None, row.video.lower()))
        path_of = numbered(folder) if folder and folder.is_dir() else {}
        variants = jittered(row.onset, row.apex, row.offset, opt.middle == "published",
                            opt.jitters, opt.reference)
        moved, reason = existing(variants, path_of, opt.tolerance)
        reason = reason or move_apex(row, path_of, moved, opt.tolerance)
        places = [moved.get(wanted) for wanted in variants[0]]
        if not reason and places != sorted(places):
            reason = f"the nearest frames are {', '.join(map(str, places))}, which is no order"
        first = row
        if row.files and path_of:
            first = owners.setdefault((row.database, folder.resolve()), row)
        if first.person != row.person:
            raise BadInput(f"{opt.clips}: {row.files[0]} is the folder of {first.key} and of "
                           f"{row.key}, of another person; correct one of them")
        box = None if reason else \
            box_of(replace(row, files=()), *spellings(row, path_of[moved[row.onset]]))
        if not reason and opt.crop[0] == "boxes" and box is None:
            reason = f"no box in {opt.crop[1]}"
        if reason:
            table.dropped.append((row.key, reason))
            continue
        if any(moved[wanted] != wanted for wanted in variants[0]):
            table.repaired("missing frame: the nearest existing one", row.key)
        variants = [tuple(moved[n] for n in frames) for frames in variants
                    if all(n in moved for n in frames)]
        variants = [frames for frames in variants if list(frames) == sorted(frames)]
        # the apex is not among the five frames of --middle published
        apex = moved.get(row.apex) or min((n for n in path_of if n > moved[row.onset]),
                                          key=lambda n, row=row: (abs(n - row.apex), n))
        if abs(apex - row.apex) > opt.tolerance:
            table.repaired("missing apex: onset_apex.csv names the nearest frame", row.key)
        kept.append(replace(row, files=(path_of[moved[row.onset]], path_of[apex])))
        tasks.append(videos.plan(row.key, list(dict.fromkeys(variants)), path_of, opt.reference,
                                 box))
    table.rows = kept
    return tasks


# ---------------------------------------------------------------- run

def print_counts(table: Table, rows: list) -> None:
    """Clips per class and subjects, beside the published counts."""
    counts = Counter(row.emotion for row in rows)
    columns = PUBLISHED if table.classes == CLASSES else {}
    people = {(row.database, row.subject) for row in rows}
    print(f"{table.source['name']}: {table.source['rows']} clips annotated, {len(rows)} prepared, "
          f"{len(table.dropped)} dropped, {len(people)} subjects"
          + "; published: 26 subjects" * bool(columns))
    print(f"{'class':12}{'here':>8}" + "".join(f"{name:>8}" for name in columns))
    for i, name in enumerate(table.classes):
        print(f"{name:12}{counts[name]:8}" + "".join(f"{c[i]:8}" for c in columns.values()))
    print(f"{'all':12}{len(rows):8}" + "".join(f"{sum(c):8}" for c in columns.values()))


def finish_up(opt: argparse.Namespace, folder: Path, table: Table) -> None:
    """Does what a run that was stopped after it had written flow.json left to do."""
    shutil.rmtree(folder / videos.RECORDS, ignore_errors=True)
    if not (folder / "audit" / "flow.png").exists():
        keys = {row["key"] for _, row in read_table(folder / "clips.csv", ("key",), fix="")[0]}
        clips = flow_sets.settle(table, [(row, None, None) for row in table.rows
                                         if row.key in keys], bool(opt.annotation))
        audit.draw_flow(folder, [row for row, _, _ in clips], table.classes)


def run(opt: argparse.Namespace) -> None:
    """Prepares all clips and writes what belongs to them."""
    flow.require()
    if opt.crop[0] == "mtcnn":
        detection.require()
    table = read_workbook(opt.annotation, opt.bad_apex) if opt.annotation else \
        read_clips(opt.clips, opt.bad_apex)
    table.rows.sort(key=lambda row: (row.database, row.person, row.key))  # as sets are read
    tasks, folder = find_frames(opt, table), Path(opt.data_folder)
    if not tasks:
        raise outputs.none_left(opt.raw, table)
    settings = videos.Settings(opt.crop[0], opt.margin, opt.size, opt.roll, opt.register,
                               opt.flow, opt.reference)
    stamp = flow_sets.stamp_of(opt, table, tasks, settings)
    if flow_sets.is_finished(folder, stamp):
        print(f"{folder}: holds these clips already, of the same frames, settings and OpenCV")
        finish_up(opt, folder, table)
        return
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    records = cutting.run_all(videos.process, tasks, settings, folder, opt.num_workers)
    clips = []
    for row, task, record in zip(table.rows, tasks, records):
        if "dropped" in record:
            table.dropped.append((row.key, record["dropped"]))
            continue
        if record["failed"]:
            table.repaired("frames that did not register: moved as between those that did", row.key)
        if record["whole"]:
            table.repaired(registration.BY_WHOLE_FACE, row.key)
        if record["replaced"]:
            table.repaired("jittered frame that cannot be used: the plain one", row.key)
        clips.append((row, task, record))
    if not clips:
        if fresh:
            shutil.rmtree(folder)
        raise outputs.none_left(opt.raw, table)
    clips = flow_sets.settle(table, clips, bool(opt.annotation))
    (folder / "audit" / "flow.png").unlink(missing_ok=True)  # of another set; `finish_up` looks
    flow_sets.write(opt, table, clips, settings, stamp)
    shutil.rmtree(folder / videos.RECORDS)
    print_counts(table, [row for row, _, _ in clips])
    outputs.print_rules(table, "flow.json")
    audit.draw_flow(folder, [row for row, _, _ in clips], table.classes)
    print(f"clips, flow  {folder}\npicture      {folder / 'audit' / 'flow.png'}")
