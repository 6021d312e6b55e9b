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
from collections import Counter
from dataclasses import replace
from pathlib import Path

from images.encoding import DIFFERENCES
from preparation import (
    annotation,
    audit,
    cutting,
    detection,
    frames,
    intensity,
    options,
    outputs,
    registration,
)
from preparation.annotation import Row, Table
from util import BadInput, add_processes, number, positive_int


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
                           "depth_onset,depth_apex, and key, by which results name a clip; "
                           "paths relative to --raw")
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
    options.add_crop_options(parser, 256, ("mtcnn",), "none: the central square")
    _add_difference_options(parser)
    _add_pair_options(parser)
    run = parser.add_argument_group("running")
    add_processes(run)
    run.add_argument("--dry_run", action="store_true",
                     help="audit the data and 20 clips, without writing the set")
    output = parser.add_argument_group("output")
    output.add_argument("--data_folder", required=True, metavar="DIR",
                        help="folder for images, lists, encoding.json, manifest.json, boxes.csv, "
                             "pairs.tsv and audit/")
    output.add_argument("--save_crops", action="store_true",
                        help="keep the registered crops, about 0.7 MB a clip: another --difference "
                             "then decodes no frame again")


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
    of_pairs = ("au", "intensity", "au_index", "aus", "window", "floor", "min_confidence",
                "max_rotation")
    for names, holds, what in (
            (of_pairs, opt.unlabelled, "--unlabelled"),
            (("au_index", "aus", "min_confidence", "max_rotation"), opt.intensity == "au", "--au"),
            (("tolerance", "max_gap"), opt.annotation, "--annotation"),
            (("raw", "blank_apex"), opt.annotation or opt.clips, "--annotation or --clips")):
        for name in names:
            if not holds and getattr(opt, name) != parser.get_default(name):
                parser.error(f"--{name} goes with {what}")
    options.check_crop(parser, opt)
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
    box_of = options.box_finder(opt.crop, opt.roll)
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
    later = sorted(n for n in rgb if n > onset)[:cutting.LOOK_ON]
    return (rgb[onset], rgb[apex], depth[onset], depth[apex]), tuple(rgb[n] for n in later)


def plan_pairs(opt: argparse.Namespace, table: Table) -> tuple:
    """(Rows of pairs of the unlabelled videos, their tasks, what the search met or None)"""
    if not opt.unlabelled:
        return [], [], None
    tree = frames.Tree(opt.unlabelled)
    pairs, search = intensity.find_pairs(tree, opt, table)
    box_of, tasks, kept = options.box_finder(opt.crop, opt.roll), [], []
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

def sort_out(table: Table, rows: list, tasks: list, records: list, max_motion: float | None,
             measured: bool = False) -> list:
    """(row, task, record) of the clips that stay; the table names the others. measured: the change
    is taken for their intensity."""
    kept = []
    for row, task, record in zip(rows, tasks, records):
        motion = record.get("residual")
        if "dropped" in record:
            table.dropped.append((row.key, record["dropped"]))
        elif measured and not record["registered"]:
            table.dropped.append((row.key, "registration did not converge: its change is the "
                                           "head's, no intensity"))
        elif max_motion is not None and motion is None and not record["registered"]:
            table.dropped.append((row.key, "residual motion unknown, and registration did not "
                                           "converge"))
        elif None not in (max_motion, motion) and motion > max_motion:
            table.dropped.append((row.key, f"residual motion {motion:.2f} pixels, more than "
                                           f"--max_motion {max_motion:g}"))
        else:
            if not record["registered"]:
                table.repaired("registration did not converge: left as it was", row.key)
            elif record["registered"] > 1:
                table.repaired(registration.BY_WHOLE_FACE, row.key)
            kept.append((row, task, record))
    return kept


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
    if opt.clips:
        annotation.check_spelling(opt.clips, [*table.rows, *pairs])
    if not tasks and not pair_tasks:
        raise outputs.none_left(opt.raw or opt.unlabelled, table)
    if not table.rows:
        outputs.check_folder(folder)
    if opt.dry_run:
        audit.dry_run(settings, table, table.rows or pairs, tasks or pair_tasks, folder,
                      lambda some, aside: cutting.run_all(cutting.process, some, settings,
                                                          aside, opt.num_workers))
        if search:
            outputs.print_pairs(search, [(row, None, None) for row in pairs])
        return
    outputs.begin(table, folder, all(
        cutting.is_current(task, settings, folder) for task in tasks + pair_tasks))
    records = cutting.run_all(cutting.process, tasks + pair_tasks, settings, folder,
                              opt.num_workers)
    labelled = sort_out(table, table.rows, tasks, records[:len(tasks)], opt.max_motion)
    unlabelled = sort_out(table, pairs, pair_tasks, records[len(tasks):], opt.max_motion,
                          opt.intensity == "difference" and opt.register != "none")
    strength = [outputs.strength(opt.intensity, row, record) for row, _, record in unlabelled]
    unlabelled = [one for one, found in zip(unlabelled, strength) if found >= opt.floor]
    if search:
        search |= {"below_floor": len(strength) - len(unlabelled), "per_unit": dict(sorted(Counter(
            row.units or outputs.LEVELS for row, *_ in unlabelled).items()))}
        if strength and not unlabelled and not labelled:
            raise BadInput(f"{opt.unlabelled}: no pair reaches --floor {opt.floor:g}; the largest "
                           f"intensity is {max(strength):.3g}")
    if not labelled and not unlabelled:
        raise outputs.none_left(opt.raw or opt.unlabelled, table)
    outputs.write(opt, table, labelled, unlabelled, search, folder)
    audit.draw_all(settings, table, labelled + unlabelled, folder)
    outputs.report(table, labelled, unlabelled, search, folder)
