"""What the preparation writes beside the images: lists, boxes, pairs, manifest, report."""
import argparse
import contextlib
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dataset import PAIR_COLUMNS, Clip
from images.lists import DATABASES, natural, write_lists
from preparation.annotation import Row, Table, copy_lists
from preparation.cutting import RECORDS, record_path
from preparation.detection import BOX_COLUMNS
from preparation.intensity import LEVELS
from util import BadInput, remove_leftovers, sha256_of, write_json, write_table, write_text

# Clips per class of the published lists and of the two workbooks, to compare with.
PUBLISHED = {"lists (943)": {"negative": 508, "positive": 64, "surprise": 201, "others": 170},
             "v1 (921)": {"negative": 496, "positive": 60, "surprise": 199, "others": 166},
             "v2 (860)": {"negative": 457, "positive": 55, "surprise": 187, "others": 161}}
PLACES = {"set", "data_folder", "num_workers", "dry_run"}  # options that change nothing in the set


def identity(row: Row) -> tuple:
    """(database, subject, video, onset) of a clip, as boxes.csv writes it."""
    onset = Path(row.files[0]).stem if row.files else row.onset
    return DATABASES[row.database], row.subject, row.video, str(onset)


# ---------------------------------------------------------------- before the run

def read_manifest(folder: Path) -> dict:
    """manifest.json of the set there; where none is to be read, one of no clips."""
    try:
        written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return {name: written[name] for name in ("annotation", "options", "clips")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"annotation": None, "options": None, "clips": []}


def check_folder(folder: Path) -> None:
    """Raises BadInput for a folder with labelled clips, which pairs alone would take the place
    of."""
    labelled = sum(clip["label"] >= 0 for clip in read_manifest(folder)["clips"])
    if not (folder / "manifest.json").exists():  # of a run that was stopped before it wrote that
        for path in (folder / RECORDS).glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                labelled += sum("/unlabelled/" not in f"/{name}" and name.endswith("_diff.png")
                                for name in json.loads(path.read_text(encoding="utf-8"))["files"])
    if labelled:
        raise BadInput(f"{folder}: holds {labelled} labelled clips, which a run without any would "
                       f"remove; give --annotation or --clips as well, or another --data_folder")


def begin(table: Table, folder: Path, same: bool) -> None:
    """Prepares the folder: nothing half-done of a stopped run stays, and no list that says
    something of images which this run will replace; same: whether it will replace none. Raises
    BadInput for a folder of others."""
    if table.lists and table.lists.resolve() == folder.resolve():
        raise BadInput(f"{folder}: holds the lists given as --annotation; name another "
                       f"--data_folder")
    if not (folder / RECORDS).is_dir() and (folder / "v_rgb").exists():
        raise BadInput(f"{folder}: holds lists that this script did not write; name another "
                       f"--data_folder")
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not same:
        _take_back(folder)


def _take_back(folder):
    """Removes what says that a set is whole: training refuses a folder without subName.txt, so that
    a stopped run cannot be mistaken."""
    for name in ("v_rgb/subName.txt", "pairs.tsv", "encoding.json", "manifest.json"):
        (folder / name).unlink(missing_ok=True)


def _options(opt):
    """Everything the set depends on, as plain values."""
    return json.loads(json.dumps({k: v for k, v in vars(opt).items() if k not in PLACES}))


# ---------------------------------------------------------------- after it

def write(opt: argparse.Namespace, table: Table, labelled: list, unlabelled: list,
          search: dict | None, folder: Path) -> None:
    """Everything but the images. labelled, unlabelled: (row, task, record) of the clips that
    stay; search: what the search for pairs met, or None."""
    _take_back(folder)
    remove_others(folder, labelled + unlabelled)
    for view in ("v_rgb", "v_depth"):
        shutil.rmtree(folder / view, ignore_errors=True)
    write_table(folder / "boxes.csv", BOX_COLUMNS, box_rows(labelled + unlabelled))
    if unlabelled:
        write_table(folder / "pairs.tsv", PAIR_COLUMNS, pair_rows(opt.intensity, unlabelled), "\t")
    encoding = {"difference": opt.difference, "depth_range_mm": opt.depth_range,
                "depth_scale": opt.depth_scale, "size": opt.size,
                "crop": {"by": opt.crop[0], "margin": opt.margin, "roll": opt.roll},
                "registration": opt.register}
    if is_rendered([opt.raw, opt.unlabelled, opt.annotation, opt.clips],
                   [task for _, task, _ in labelled + unlabelled]):
        encoding["rendered"] = True
    if table.classes:
        encoding["classes"] = list(table.classes)
    write_json(folder / "encoding.json", encoding)
    if labelled:
        write_lists_of(table, labelled, folder)
    files = {name: digest for _, _, record in labelled + unlabelled
             for name, digest in record["files"].items()}
    digests = {"images": hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()}
    texts = [folder / name for name in ("boxes.csv", "pairs.tsv", "encoding.json")]
    for path in (*sorted(folder.glob("v_*/*.txt")), *texts):
        if path.exists():
            digests[str(path.relative_to(folder))] = sha256_of(path)
    write_json(folder / "manifest.json", {
        "annotation": table.source, "options": _options(opt), "encoding": encoding,
        "counts": counts(table, labelled), "repairs": table.repairs,
        "dropped": [{"clip": key, "reason": reason} for key, reason in table.dropped],
        "unlabelled": search and {**search, "pairs": len(unlabelled)},
        "digests": digests,
        "clips": [_record_of(row, record) for row, _, record in labelled + unlabelled]})


def is_rendered(inputs: list[str | None], tasks: list) -> bool:
    """Whether frames come from render.py: its record lies in a folder of one of them, in one of the
    inputs, or up to two above."""
    places = set()
    for name in filter(None, inputs):
        place = Path(name) if Path(name).is_dir() else Path(name).parent
        places |= {place, *place.resolve().parents[:2]}
    inside = tuple(map(Path, filter(None, inputs)))
    for folder in {Path(task.frames[0]).parent for task in tasks if task.frames}:
        places |= {place for place in folder.parents if any(map(place.is_relative_to, inside))}
    return any((place / "rendered.json").exists() for place in places)


def _record_of(row, record):
    kept = ("shift", "residual", "registered", "amplitude", "clipped", "invalid", "files")
    return {"clip": row.key, "label": row.label, "emotion": row.emotion, "units": row.units,
            "blank": row.blank, **{name: record[name] for name in kept}}


def remove_others(folder: Path, kept: list) -> None:
    """Removes images and records of clips that are no longer in the set."""
    wanted = {record_path(folder, task) for _, task, _ in kept}
    names = {name for _, _, record in kept for name in record["files"]}
    for path in (folder / RECORDS).glob("*.json"):
        if path not in wanted:
            # of a damaged record nobody knows whose images it was
            with contextlib.suppress(ValueError, KeyError, TypeError):
                for name in json.loads(path.read_text(encoding="utf-8"))["files"]:
                    if name not in names:
                        (folder / name).unlink(missing_ok=True)
            path.unlink()


def write_lists_of(table: Table, labelled: list, folder: Path) -> None:
    """v_rgb/ and v_depth/: copies of published lists, or lists of the clips; without depth,
    v_rgb alone."""
    if table.lists:
        names = {row.rgb for row, _, _ in labelled} | {row.depth for row, _, _ in labelled}
        table.rows = [row for row, _, _ in labelled]
        for path, text in copy_lists(table, folder, names):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return
    clips = [Clip(row.database, row.person, row.key, row.label, (row.rgb, row.depth))
             for row, _, _ in labelled]
    write_lists(folder, clips, ("rgb", "depth") if labelled[0][1].depth else ("rgb",))


def box_rows(clips: list) -> Iterator[dict]:
    """Rows of boxes.csv."""
    for row, _, record in clips:
        if record["box"]:
            box = {k: f"{v:.3f}" for k, v in record["box"].items()}
            width, height = record["frame_size"]
            yield dict(zip(BOX_COLUMNS, identity(row))) | box | {
                "frame": record["frame"], "frame_width": width, "frame_height": height}


def strength(by: str, row: Row, record: dict) -> float:
    """Intensity of a pair: that of its unit (by: au), or the change measured when it was cut."""
    return row.intensity if by == "au" else record["amplitude"]


def pair_rows(by: str, unlabelled: list) -> Iterator[tuple]:
    """Rows of pairs.tsv."""
    for row, _, record in unlabelled:
        motion = "" if record["residual"] is None else f"{record['residual']:.3f}"
        yield (row.rgb, row.depth, DATABASES[row.database], row.person, row.video, row.onset,
               row.apex, f"{strength(by, row, record):.3f}", row.units or LEVELS, motion)


# ---------------------------------------------------------------- report

def none_left(place: str, table: Table) -> BadInput:
    """The error of a run without any clip; what was dropped last is what left none."""
    reasons = "; ".join(f"{key}: {why}" for key, why in table.dropped[-3:])
    return BadInput(f"{place}: no clip can be cut" + (f"; {reasons}" if reasons else ""))


def counts(table: Table, labelled: list) -> dict:
    """Clips per class, per subject, and blank ones per class."""
    names = [table.classes[row.label] for row, *_ in labelled]
    blank = [name for name, (row, *_) in zip(names, labelled) if row.blank]
    several = len({row.database for row, *_ in labelled}) > 1  # one name may be two people then
    people = Counter(f"{DATABASES[row.database]}/{row.person}" if several else row.person
                     for row, *_ in labelled)
    return {"annotated": table.source["rows"], "clips": len(labelled),
            # the table names pairs that were dropped, too
            "dropped": table.source["rows"] - len(labelled),
            "classes": {name: names.count(name) for name in table.classes},
            "blank": {name: blank.count(name) for name in table.classes},
            "subjects": {name: people[name] for name in sorted(people, key=natural)}}


def report(table: Table, labelled: list, unlabelled: list, search: dict | None,
           folder: Path) -> None:
    """Prints what was written, beside the published counts."""
    if table.source["rows"]:
        clips = counts(table, labelled)
        print(f"{table.source['name']}: {clips['annotated']} clips annotated, {len(labelled)} cut, "
              f"{clips['dropped']} dropped, {len(clips['subjects'])} subjects")
        print_counts(table, clips)
    print_rules(table)
    if search:
        print_pairs(search, unlabelled)
    print(f"lists, images  {folder}\nmanifest       {folder / 'manifest.json'}\n"
          f"pictures       {folder / 'audit'}")


def print_counts(table: Table, clips: dict) -> None:
    """Prints the result of `counts`, class by class, beside the published counts."""
    published = {} if any(row.files for row in table.rows) else PUBLISHED  # files: of --clips
    print(f"{'class':12}{'here':>8}{'blank':>8}" + "".join(f"{n:>14}" for n in published))
    for name in table.classes:
        print(f"{name:12}{clips['classes'][name]:8}{clips['blank'][name]:8}"
              + "".join(f"{c.get(name, '-'):>14}" for c in published.values()))
    empty = [name for name in table.classes if not clips["classes"][name]]
    if empty:
        print(f"no clip of {', '.join(empty)}: the training scripts take lists whose labels are "
              f"0 to C-1 without a gap; for them give other --classes")


def print_rules(table: Table, file: str = "manifest.json") -> None:
    """Repairs and drops, by rule; `file` of the set names every clip."""
    for rule, keys in sorted(table.repairs.items()):
        print(f"  repaired {len(keys):5}  {rule}")
    rules = Counter(re.sub(r"\S*\d\S*|'.*?'", "…", reason) for _, reason in table.dropped)
    for rule, number in sorted(rules.items()):
        print(f"  dropped  {number:5}  {rule}")
    for key, reason in table.dropped[:10]:
        print(f"    {key}: {reason}")
    if len(table.dropped) > 10:
        print(f"    … and {len(table.dropped) - 10} more, named in {file}")


def print_pairs(search: dict, unlabelled: list) -> None:
    """Prints how many pairs the videos gave, and which videos gave none."""
    speech = sum(row.units in ("AU25", "AU26") for row, _, _ in unlabelled)
    print(f"unlabelled: {search['videos']} videos, {len(unlabelled)} pairs"
          + (f", {speech} of them by the speech units AU25 and AU26" if speech else ""))
    for name, reason in search["stopped"][:10]:
        print(f"  left out {name}: {reason}")
    if len(search["stopped"]) > 10:
        print(f"  left out … and {len(search['stopped']) - 10} more videos, see manifest.json")
