"""Faces in photographs, by MTCNN: boxes, five points and scores, pictures of them, aligned crops.

  python detect_faces.py photos --save_path faces
  python detect_faces.py photos --save_path faces --crop --largest

A folder is searched with all below it. Below --save_path, which the run prints: faces.csv and
faces.json; annotated/, pictures to look at; without_faces.txt; with --crop crops/, where the
photographs' sub-folders stay, so that class folders give class folders, and landmarks.csv, the
points in them. `make faces` installs the detector. Expect twenty photographs of 512 pixels a side a
second on two CPU cores, one or two of twelve megapixels.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

import torch

from preparation import cutting, detection, photographs, registration
from preparation.photographs import Photo, Settings
from training import devices, record
from util import BadInput, number, write_json, write_table, write_text

RECORDS = "faces.jsonl"  # settings, then a line for each photograph, as it is finished
POINTS = [f"{axis}{i}" for i in range(1, 6) for axis in "xy"]
COLUMNS = ("path", "face", "x", "y", "width", "height", "score", *POINTS, "photo_width",
           "photo_height", "crop")
RESULTS = ("faces.csv", "faces.json", "landmarks.csv", "without_faces.txt")
NAMED = 5  # photographs that are printed of those without a face, and of unreadable ones


def parse_option(argv: list[str] | None) -> util.Options:
    parser, default = util.ArgumentParser(description=__doc__), Settings()
    data = parser.add_argument_group("data")
    data.add_argument("photos", nargs="+", metavar="PHOTO|FOLDER",
                      help="photographs, and folders of them")
    method = parser.add_argument_group("method")
    method.add_argument("--min_face_size", type=number(int, detection.SMALLEST_FACE),
                        default=default.min_face_size,
                        help="longer side of the smallest face that is looked for, pixels")
    method.add_argument("--threshold", type=number(float, 0, 1), default=default.threshold,
                        help="least score of a face; the detector gives none below 0.7")
    method.add_argument("--largest", action="store_true",
                        help="the largest face of each photograph alone")
    method.add_argument("--crop", action="store_true", help="cut the faces out")
    crop = parser.add_argument_group("crops (--crop)")
    crop.add_argument("--margin", type=number(float, 0, 4), default=round(default.margin, 6),
                      help="share of the face added to the crop; the default lets the face fill "
                           "the central 224 of 256 pixels")
    crop.add_argument("--size", type=number(int, 16, 2048), default=default.size,
                      help="side of the crops, pixels")
    crop.add_argument("--align", action=argparse.BooleanOptionalAction, default=default.align,
                      help="turn them so that the eyes are level")
    crop.add_argument("--format", choices=tuple(photographs.QUALITY), default=default.format,
                      help="of the crops; jpg: of quality 95")
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", metavar="NAME",
                         help="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1")
    util.add_processes(running)
    running.add_argument("--resume", nargs="?", const="auto", choices=("auto",),
                         help="auto: go on in --save_path; photographs that were finished are not "
                              "searched again, new ones are [refuse a folder that exists]")
    output = parser.add_argument_group("output")
    output.add_argument("--save_path", required=True, metavar="DIR", help="folder for results")
    output.add_argument("--annotate", action=argparse.BooleanOptionalAction,
                        default=default.annotate, help="pictures with the faces drawn in")
    opt = parser.parse_args(argv)
    if not opt.crop and (flags := util.given(crop, argv)):
        parser.error(f"{flags[0]} goes with --crop")
    return opt


# ---------------------------------------------------------------- going on

def header_of(opt: util.Options, settings: Settings) -> dict:
    """The first line of the records: what they follow from."""
    return {"settings": asdict(settings), "inputs": sorted(map(os.path.abspath, opt.photos))}


def begin(opt: util.Options, settings: Settings, photos: list[Photo]) -> dict[str, dict]:
    """Makes the folder, or enters it: records of the photographs that are finished, by their names.
    Files of photographs that changed or went are removed. Raises BadInput for a folder of others,
    for inputs by which finished ones would have other names, and for other settings."""
    folder = Path(opt.save_path)
    header = header_of(opt, settings)
    if opt.resume:
        util.remove_leftovers(folder)
    lines = record.read_lines(folder / RECORDS) if opt.resume else []
    if not lines and folder.exists() and any(folder.iterdir()):
        if opt.resume:
            raise BadInput(f"{folder}: holds no {RECORDS} to go on from; name another --save_path")
        raise BadInput(f"{folder}: exists; go on with --resume auto, give another --save_path, or "
                       f"remove it")
    kept, known = {}, {photo.name: photo for photo in photos}
    try:
        check_settings(folder / RECORDS, lines[0]["settings"] if lines else {}, settings)
        check_inputs(folder / RECORDS, lines, header, known)
        for old in lines[1:]:
            photo = known.get(old["path"])
            if (photo and photo.stem == old["stem"] and not old["error"]
                    and photographs.stat_of(photo) == old["stat"]
                    and all((folder / name).is_file() for name in old["files"])):
                kept[photo.name] = old
            else:
                remove_files(folder, old["files"])
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{folder / RECORDS}: cannot be read; name another --save_path") from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:  # they would say something of files that this run replaces
        (folder / name).unlink(missing_ok=True)
    write_lines(folder / RECORDS, (header, *kept.values()))
    return kept


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """Writes JSON lines whole."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def check_settings(path: Path, old: dict, settings: Settings) -> None:
    """Raises BadInput where the settings of the lines in `path` are others."""
    differing = [f"--{field.name} {old[field.name]} there, {getattr(settings, field.name)} here"
                 for field in fields(settings)
                 if old and old[field.name] != getattr(settings, field.name)]
    if differing:
        raise BadInput(f"{path}: cannot be resumed with other options: {'; '.join(differing)}")


def check_inputs(path: Path, lines: list[dict], header: dict, known: Collection) -> None:
    """Raises BadInput where other inputs than those of the `lines` in `path` leave out photographs
    that are finished: their names, which begin with the folder's where there are several, are not
    in `known`."""
    gone = [old["path"] for old in lines[1:] if old["path"] not in known and not old["error"]]
    if gone and lines[0].get("inputs", header["inputs"]) != header["inputs"]:
        raise BadInput(f"{path}: {len(gone)} finished photographs are not among these ({gone[0]} "
                       f"the first), which came from {', '.join(lines[0]['inputs'])}; name the "
                       f"same, or another --save_path")


def remove_files(folder: Path, names: list[str]) -> None:
    """Removes files of a photograph, and the folders below `folder` that are empty then."""
    for path in (folder / name for name in names):
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            while path.parent != folder:
                path = path.parent
                path.rmdir()


# ---------------------------------------------------------------- the run

def search(opt: util.Options, settings: Settings, photos: list[Photo],
           device: torch.device) -> list[dict]:
    """The records of all photographs, each written down as it is finished. Raises BadInput where
    none could be read; a folder that was new is then removed."""
    done = begin(opt, settings, photos)
    # a GPU's context is not for processes that were forked
    executor = ProcessPoolExecutor if device.type == "cpu" else ThreadPoolExecutor
    process = functools.partial(photographs.process, device=str(device))
    left, path = [photo for photo in photos if photo.name not in done], Path(opt.save_path, RECORDS)
    searching = cutting.run_each(process, left, settings, opt.save_path, opt.num_workers,
                                 ("searching", "photo"), executor)
    with open(path, "a", encoding="utf-8") as file, contextlib.closing(searching):
        for found in searching:
            file.write(json.dumps(found) + "\n")
            file.flush()
            done[found["path"]] = found
    records = [done[photo.name] for photo in photos]
    if all(found["error"] for found in records):
        path.unlink()
        with contextlib.suppress(OSError):  # it is not empty where a run before left something
            path.parent.rmdir()
        more = f"; nor could the other {len(records) - 1}" if len(records) > 1 else ""
        raise BadInput(records[0]["error"] + more)
    write_lines(path, (header_of(opt, settings), *records))  # in order, in one run or several
    return records


def write(opt: util.Options, settings: Settings, records: list[dict]) -> Counter:
    """Writes the tables; returns counts."""
    folder, faces = Path(opt.save_path), [(r, face) for r in records for face in r["faces"]]
    bare = [r["path"] for r in records if not r["faces"] and not r["error"]]
    unreadable = {r["path"]: r["error"] for r in records if r["error"]}
    counts = Counter(photographs=len(records), faces=len(faces), without_a_face=len(bare),
                     unreadable=len(unreadable))
    write_table(folder / "faces.csv", COLUMNS, (
        (r["path"], *(face[name] for name in COLUMNS[1:7]), *chain(*face["points"]),
         r["width"], r["height"], face.get("crop", "")) for r, face in faces))
    if settings.crop:
        write_table(folder / "landmarks.csv", ("path", *POINTS), (
            (face["crop"], *chain(*face["crop_points"])) for _, face in faces))
    write_text(folder / "without_faces.txt", "".join(f"{name}\n" for name in bare))
    write_json(folder / "faces.json", {
        "settings": asdict(settings), "inputs": opt.photos, "counts": counts,
        "versions": record.versions(opt.device) | {
            name: importlib.metadata.version(name)
            for name in ("facenet-pytorch", "torchvision", "pillow")},
        "photographs": [{name: r[name] for name in ("path", "width", "height", "faces")}
                        for r in records if not r["error"]],
        "without_faces": bare, "unreadable": unreadable})
    return counts


def report(opt: util.Options, settings: Settings, records: list[dict], counts: Counter,
           others: Counter) -> None:
    """Prints the counts, the first photographs without a result, and where the files are."""
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    for what, said in (("no face", [r["path"] for r in records if not r["faces"] and not r["error"]]
                        ), ("unreadable", [r["error"] for r in records if r["error"]])):
        for text in said[:NAMED]:
            print(f"{what:12s} {text}")
        if len(said) > NAMED:
            print(f"{'':12s} and {len(said) - NAMED} more")
    if others:
        print(f"{'passed over':12s} files of other kinds: "
              + ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(NAMED)))
    folder = Path(opt.save_path)
    for what, name, made in (("tables", "faces.csv", True), ("", "faces.json", True),
                             ("no face", "without_faces.txt", counts["without_a_face"]),
                             ("pictures", "annotated", settings.annotate and counts["faces"]),
                             ("crops", "crops", settings.crop and counts["faces"]),
                             ("", "landmarks.csv", settings.crop)):
        if made:
            print(f"{what:12s} {folder / name}")


@util.command_line
def main(argv: list[str] | None = None) -> None:
    opt = parse_option(argv)
    device = devices.pick_device(opt.device)
    detection.require("detect_faces.py", "")
    if opt.crop:
        registration.require()
    photos, others = photographs.find_photos(opt.photos, opt.save_path)
    settings = Settings(**{field.name: getattr(opt, field.name) for field in fields(Settings)})
    records = search(opt, settings, photos, device)
    report(opt, settings, records, write(opt, settings, records), others)


if __name__ == "__main__":
    main()
