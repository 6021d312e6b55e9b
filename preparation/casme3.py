"""Raw CAS(ME)^3 → difference images of both views and lists.

  python prepare.py casme3 --raw part_A --annotation LABELS.xlsx --data_folder data/casme3

Per clip: one crop around the face, the apex registered on forehead and nose bridge, the median
change over the face taken off, apex minus onset in 8 bits; the same for depth in millimetres.
--annotation also takes a folder of published lists: exactly their clips are cut, and the lists
come out byte for byte. Look at <data_folder>/audit/ afterwards; --dry_run makes it from 20 clips
without writing the set. A run that was stopped goes on when started again. Expect 10 clips per
second or more on two cores, without face detection.
"""
import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

from images.encoding import DIFFERENCES
from preparation import (
    annotation,
    audit,
    cutting,
    detection,
    frames,
    intensity,
    outputs,
    registration,
)
from preparation.annotation import Row, Table
from util import BadInput, RunFailed, number, positive_int

LOOK_ON = 5  # frames after the onset on which a face is looked for


class Crop(argparse.Action):
    """--crop mtcnn | none | boxes FILE | box X Y W H, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        kind, rest = values[0], values[1:]
        if (kind, len(rest)) not in (("mtcnn", 0), ("none", 0), ("boxes", 1), ("box", 4)):
            parser.error("argument --crop: mtcnn, none, boxes FILE.csv or box X Y W H")
        if kind == "box":
            try:
                rest = [float(v) for v in rest]
            except ValueError:
                parser.error("argument --crop: box X Y W H are numbers of pixels")
            if not all(map(math.isfinite, rest)) or min(rest[2:]) <= 0:
                parser.error("argument --crop: the box is finite, its width and height above 0")
        setattr(namespace, self.dest, (kind, *rest))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare.py casme3`."""
    data = parser.add_argument_group("data")
    data.add_argument("--raw", metavar="DIR",
                      help="frames as received: Part A, the ME clips, or what --clips refers to")
    data.add_argument("--annotation", metavar="FILE|LISTDIR",
                      help="workbook (.xlsx, sheet 'label'; .xls), .csv, or a folder with the "
                           "published v_rgb and v_depth")
    data.add_argument("--clips", metavar="FILE.csv",
                      help="other sets: database,subject,clip,onset,apex,label and, optional, "
                           "depth_onset,depth_apex; paths relative to --raw")
    data.add_argument("--classes", type=int, choices=(3, 4, 7), default=4,
                      help="3: negative positive surprise, others dropped (MEGC2019); 4: negative "
                           "others positive surprise (as published); 7: the raw labels; lists "
                           "given as annotation keep their own")
    data.add_argument("--blank_apex", choices=("keep", "middle", "drop"), default="keep",
                      help="apex equal to onset or outside its clip: keep a blank difference; "
                           "middle: the existing frame nearest to the middle of onset and offset")
    data.add_argument("--tolerance", type=number(int, 0), default=1,
                      help="a missing frame is replaced by the nearest within this many frames, "
                           "and within a quarter of onset to apex")
    data.add_argument("--max_gap", type=positive_int, default=45,
                      help="longest onset to apex, frames; longer clips are dropped (the "
                           "published lists reach 36)")
    add_crop_options(parser, 256, ("mtcnn",), "none: the central square")
    _add_difference_options(parser)
    _add_pair_options(parser)
    run = parser.add_argument_group("running")
    run.add_argument("--num_workers", type=number(int, 0), default=os.cpu_count() or 1,
                     help="processes; 0: none but this one; the result is the same")
    run.add_argument("--dry_run", action="store_true",
                     help="audit the data and 20 clips, without writing the set")
    output = parser.add_argument_group("output")
    output.add_argument("--data_folder", required=True, metavar="DIR",
                        help="folder for images, lists, encoding.json, manifest.json, boxes.csv, "
                             "pairs.tsv and audit/")
    output.add_argument("--save_crops", action="store_true",
                        help="keep the registered crops, about 0.7 MB a clip: another --difference "
                             "then decodes no frame again")


def add_crop_options(parser: argparse.ArgumentParser, size: int, default: tuple,
                     none: str) -> None:
    """Crop and registration; size: side of the images by default; none: what --crop none means."""
    crop = parser.add_argument_group("crop")
    crop.add_argument("--crop", nargs="+", action=Crop, default=default,
                      metavar=("mtcnn|none|box|boxes", "X Y W H|FILE"),
                      help=f"face on the onset frame: detected; {none}; box X Y W H: one in pixels "
                           f"for all; boxes FILE.csv: as prepare.py casme3 writes it")
    crop.add_argument("--margin", type=number(float, 0, 4), default=round(registration.MARGIN, 6),
                      help="share of the face added to the crop; the default lets the face fill "
                           "the central 224 of 256 pixels")
    crop.add_argument("--size", type=number(int, 32, 1024), default=size,
                      help="side of the images, pixels")
    crop.add_argument("--roll", action="store_true",
                      help="turn the crop so that the eyes of the onset frame are level; with "
                           "mtcnn, or the roll of a boxes.csv")
    align = parser.add_argument_group("registration")
    align.add_argument("--register", choices=("translation", "similarity", "none"),
                       default="translation",
                       help="motion of the head since the onset taken off a frame, on forehead and "
                            "nose bridge, sub-pixel")


def _add_difference_options(parser):
    """What the difference is, and which clips are too restless for one."""
    change = parser.add_argument_group("difference")
    change.add_argument("--max_motion", type=number(float, 0), metavar="PIXELS",
                        help="drop clips whose forehead and nose bridge move more after the "
                             "registration, pixels of the crop [none]")
    change.add_argument("--difference", choices=DIFFERENCES, default="signed",
                        help="8 bits of apex minus onset d: (d + 256) // 2, d modulo 256 (what "
                             "the published normalisation implies), or its absolute value")
    change.add_argument("--depth_scale", type=number(float, 0, low_open=True), default=1.0,
                        help="mm per unit of a depth frame")
    change.add_argument("--depth_range", type=number(float, 0, low_open=True), default=10.0,
                        help="change of depth, mm, beyond which it is clipped")


def _add_pair_options(parser):
    """Onset/apex pairs from unlabelled videos."""
    group = parser.add_argument_group(
        "unlabelled pairs",
        "The paper's own intensity threshold is not public knowledge here: everything above a low\n"
        "floor is written with its intensity, and the threshold is chosen in training\n"
        "(pre-train_DVSCL.py --min_intensity; benchmarks/sweep_intensity.py compares several).")
    group.add_argument("--unlabelled", metavar="DIR", help="videos to find pairs in, as --raw")
    group.add_argument("--au", metavar="DIR",
                       help="OpenFace's CSV files, named after subject and video: spNO.1_a.csv, "
                            "spNO.1/a.csv, spNO.1/a/color.csv")
    group.add_argument("--intensity", choices=("au", "difference"), default="au",
                       help="au: largest rise of an action unit; difference: change inside the "
                            "face after registration, grey levels, without --au")
    group.add_argument("--au_index", choices=("string-sorted", "numeric", "name"),
                       default="string-sorted",
                       help="row of the CSV to frame: the order of file names sorted as strings "
                            "(OpenFace's: 1 10 100 2), by number, or the frame column is the "
                            "file's number")
    group.add_argument("--aus", nargs="+", type=positive_int, metavar="N",
                       help="action units that count [all but 45, the blink]")
    group.add_argument("--window", type=positive_int, default=15,
                       help="longest onset to apex of a pair, frames; 15 are half a second at "
                            "30 fps")
    group.add_argument("--floor", type=number(float, 0), metavar="X",
                       help="least intensity written [0.5 of OpenFace's 0-5; difference: 0]")
    group.add_argument("--min_confidence", type=number(float, 0, 1), default=0.8,
                       help="least confidence of OpenFace for a frame to count")
    group.add_argument("--max_rotation", type=number(float, 0), default=1.0,
                       help="fastest head rotation for a frame to count, degrees per frame")


def check_options(parser: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Answers flags that do not go together, and settles the floor."""
    if not (opt.annotation or opt.clips or opt.unlabelled):
        parser.error("give --annotation, --clips or --unlabelled")
    if opt.annotation and opt.clips:
        parser.error("--annotation and --clips exclude each other")
    if (opt.annotation or opt.clips) and not opt.raw:
        parser.error("--annotation and --clips go with --raw")
    if opt.unlabelled and (opt.au is None) != (opt.intensity == "difference"):
        parser.error("--unlabelled takes --au DIR, or --intensity difference")
    if opt.au and not opt.unlabelled:
        parser.error("--au goes with --unlabelled")
    if opt.roll and opt.crop[0] not in ("mtcnn", "boxes"):
        parser.error("--roll takes --crop mtcnn, or boxes with a column roll")
    if opt.floor is None:
        opt.floor = 0.5 if opt.intensity == "au" else 0.0


# ---------------------------------------------------------------- plan

def read_table(opt: argparse.Namespace) -> Table:
    """The annotated clips, with ids and paths; an empty Table without annotation."""
    if opt.clips:
        table = annotation.read_clips_csv(opt.clips, Path(opt.raw))
    elif opt.annotation:
        table = annotation.read_annotation(opt.annotation)
    else:
        return Table([], {"name": None, "sha256": None, "rows": 0})
    annotation.finish(table, opt.classes, opt.blank_apex, opt.max_gap)
    return table


def find_frames(opt: argparse.Namespace, table: Table) -> list:
    """Tasks for the rows whose frames are there; the table keeps those rows and names the rest."""
    box_of = box_finder(opt.crop, opt.roll)
    tree = frames.Tree(opt.raw) if opt.annotation else None
    kept, tasks = [], []
    for row in table.rows:
        files, more, blank, reason = row.files, (), row.blank, ""
        if tree:
            middle = opt.blank_apex == "middle"
            onset, apex, reason, notes = frames.choose(tree, row, opt.tolerance, middle)
            for note in notes:
                table.repaired(note, row.key)
            files, more = tree_files(tree, row, onset, apex)
            blank = row.blank and not middle
            if row.blank and middle and not reason:
                reason = annotation.too_long(apex - onset, opt.max_gap)
        box = box_of(row) if files else None
        if not reason and opt.crop[0] == "boxes" and box is None and not blank:
            reason = f"no box in {opt.crop[1]}"
        if reason:
            table.dropped.append((row.key, reason))
            continue
        if blank and opt.crop[0] == "boxes" and box is None:
            files = ()
        row = replace(row, blank=blank)
        kept.append(row)
        depth = row.depth if tree or len(row.files) == 4 else ""
        tasks.append(cutting.Task(row.key, row.rgb, depth, files, blank, box,
                                  more if opt.crop[0] == "mtcnn" else ()))
    table.rows = kept
    return tasks


def tree_files(tree: frames.Tree, row: Row, onset: int | None, apex: int | None) -> tuple:
    """(paths of onset, apex and both depth frames, RGB frames that follow the onset)"""
    if onset is None:
        return (), ()
    rgb, depth, _ = tree.frames(row.subject, row.video, row.onset)
    later = sorted(n for n in rgb if n > onset)[:LOOK_ON]
    return (rgb[onset], rgb[apex], depth[onset], depth[apex]), tuple(rgb[n] for n in later)


def box_finder(crop: tuple, roll: bool) -> Callable:
    """A function row → Box or None, for --crop box and boxes."""
    if crop[0] == "box":
        return lambda row: registration.Box(*crop[1:])
    if crop[0] == "boxes":
        boxes = detection.read_boxes(crop[1], roll)
        return lambda row: detection.box_for(boxes, *outputs.identity(row))
    return lambda row: None


def plan_pairs(opt: argparse.Namespace, table: Table) -> tuple:
    """(Rows of pairs of the unlabelled videos, their tasks, what the search met or None)"""
    if not opt.unlabelled:
        return [], [], None
    tree = frames.Tree(opt.unlabelled)
    pairs, search = intensity.find_pairs(tree, opt, table)
    box_of, tasks, kept = box_finder(opt.crop, opt.roll), [], []
    for row in pairs:
        files, more = tree_files(tree, row, row.onset, row.apex)
        box = box_of(row)
        if opt.crop[0] == "boxes" and box is None:
            table.dropped.append((row.key, f"no box in {opt.crop[1]}"))
            continue
        kept.append(row)
        tasks.append(cutting.Task(row.key, row.rgb, row.depth, files, False, box,
                                  more if opt.crop[0] == "mtcnn" else ()))
    return kept, tasks, search


# ---------------------------------------------------------------- run

def run_all(process: Callable, tasks: list, settings: object, folder: Path | str,
            num_workers: int) -> list:
    """Records `process(task, settings, folder)` of all tasks, in their order, by several processes,
    with a progress bar."""
    jobs = tasks, repeat(settings), repeat(str(folder))
    bar = {"desc": "cutting", "total": len(tasks), "unit": "clip", "disable": None}
    if num_workers < 2 or len(tasks) < 2:
        return list(tqdm(map(process, *jobs), **bar))
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)))
    try:
        return list(tqdm(pool.map(process, *jobs, chunksize=2), **bar))
    except BrokenExecutor:
        raise RunFailed("a worker was killed, for memory perhaps; run again, with fewer "
                        "--num_workers: finished clips are kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def sort_out(table: Table, rows: list, tasks: list, records: list,
             max_motion: float | None) -> list:
    """(row, task, record) of the clips that stay; the table names the others."""
    kept = []
    for row, task, record in zip(rows, tasks, records):
        motion = record.get("residual")
        if "dropped" in record:
            table.dropped.append((row.key, record["dropped"]))
        elif None not in (max_motion, motion) and motion > max_motion:
            table.dropped.append((row.key, f"residual motion {motion:.2f} pixels, more than "
                                           f"--max_motion {max_motion:g}"))
        else:
            if not record["registered"]:
                table.repaired("registration did not converge: left as it was", row.key)
            kept.append((row, task, record))
    return kept


def none_left(place: str, table: Table) -> BadInput:
    """The error of a run without any clip."""
    reasons = "; ".join(f"{key}: {why}" for key, why in table.dropped[:3])
    return BadInput(f"{place}: no clip can be cut; {reasons}")


def run(opt: argparse.Namespace) -> None:
    """Cuts all clips, or some for --dry_run, and writes what belongs to them."""
    registration.require()
    if opt.crop[0] == "mtcnn":
        detection.require()
    settings = cutting.Settings(opt.crop[0], opt.margin, opt.size, opt.roll, opt.register,
                                opt.difference, opt.depth_scale, opt.depth_range, opt.save_crops)
    table, folder = read_table(opt), Path(opt.data_folder)
    tasks = find_frames(opt, table)
    pairs, pair_tasks, search = plan_pairs(opt, table)
    if not tasks and not pair_tasks:
        raise none_left(opt.raw or opt.unlabelled, table)
    if opt.dry_run:
        audit.dry_run(settings, table, table.rows or pairs, tasks or pair_tasks, folder,
                      lambda some, aside: run_all(cutting.process, some, settings, aside,
                                                  opt.num_workers))
        return
    outputs.begin(opt, table, folder)
    records = run_all(cutting.process, tasks + pair_tasks, settings, folder, opt.num_workers)
    labelled = sort_out(table, table.rows, tasks, records[:len(tasks)], opt.max_motion)
    unlabelled = sort_out(table, pairs, pair_tasks, records[len(tasks):], opt.max_motion)
    unlabelled = [(row, task, record) for row, task, record in unlabelled
                  if outputs.strength(opt.intensity, row, record) >= opt.floor]
    if not labelled and not unlabelled:
        raise none_left(opt.raw or opt.unlabelled, table)
    outputs.write(opt, table, labelled, unlabelled, search, folder)
    audit.draw_all(settings, table, labelled + unlabelled, folder)
    outputs.report(table, labelled, unlabelled, search, folder)
