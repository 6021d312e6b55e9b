"""Layouts of the published sets of faces: their lists, tables of labels and votes.

Lists are taken at their word first, then compared with what lies in the folders.
"""
import functools
import io
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from images.face_folders import SUFFIXES, Found, names, read_any_folders, read_class_folders
from images.lists import read_lines
from util import BadInput, ensure, read_cells, read_table

SETS = ("rafdb", "affectnet7", "affectnet8", "ferplus", "folder")
_AFFECTNET = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", "contempt")
CLASSES = {
    "rafdb": ("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"),
    "affectnet7": _AFFECTNET[:7],
    "affectnet8": _AFFECTNET,
    "ferplus": ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear",
                "contempt")}
VOTES = ("majority", "plurality")


def find(dataset: str, folder: Path, votes: str = "majority") -> Found:
    """The images of a set below a folder; raises BadInput for what does not fit its layouts."""
    if dataset not in SETS:
        raise BadInput(f"{dataset!r} is no set of faces; they are {', '.join(SETS)}")
    if votes not in VOTES:
        raise BadInput(f"votes by {votes!r}: they are counted by {' or '.join(VOTES)}")
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; name the one that holds the images")
    found = Found(folder, CLASSES.get(dataset, ()))
    if dataset == "ferplus":
        _ferplus(found, votes)
    else:
        {"rafdb": _rafdb, "folder": read_any_folders}.get(dataset, _affectnet)(found)
    if found.listed:
        found.leave_out_missing()
    found.leave_out_shared()
    return found


# ---------------------------------------------------------------- RAF-DB

def _rafdb(found: Found) -> None:
    """RAF-DB basic: the list of EmoLabel, whose labels are 1 to 7, or class folders 1 to 7."""
    for name in ("list_patition_label.txt", "list_partition_label.txt"):
        path = found.folder / "EmoLabel" / name
        if path.exists():
            return _rafdb_list(found, path)
    return read_class_folders(found, {"train": ("train",), "test": ("test", "val")},
                              lambda name, path: _number(name, path, "class folder", 1, 7) - 1)


def _rafdb_list(found: Found, path: Path) -> None:
    found.listed = True
    aligned = (found.folder / "Image" / "aligned").is_dir()
    place, end = ("Image/aligned", "_aligned.jpg") if aligned else ("Image/original", ".jpg")
    for number, line in read_lines(path):
        where, fields = f"{path}:{number}", line.split()
        split = fields[0].partition("_")[0]
        if len(fields) != 2 or split not in ("train", "test"):
            raise BadInput(f"{where}: {line[:80]!r} is not 'train_<number>.jpg <label>' or "
                           f"'test_<number>.jpg <label>'")
        label = _number(fields[1], where, "label", 1, 7) - 1
        found.add(split, f"{place}/{os.path.splitext(fields[0])[0]}{end}", label, where)


def _number(text: str, where: str, what: str, low: int, high: int) -> int:
    """A whole number within low..high; raises BadInput."""
    try:
        number = int(text)
        ensure(low <= number <= high)
    except ValueError:
        raise BadInput(f"{where}: {what} {text!r} is not one of {low}..{high}; correct "
                       f"it") from None
    return number


# ---------------------------------------------------------------- AffectNet

AFFECTNET_COLUMNS = ("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height",
                     "facial_landmarks", "expression", "valence", "arousal")
NEEDED = (*AFFECTNET_COLUMNS[:5], "expression")
LEFT_OUT = {label: f"images of expression {label}, {name}, left out" for label, name in
            ((7, "contempt"), (8, "none"), (9, "uncertain"), (10, "no face"))}


def _affectnet(found: Found) -> None:
    """AffectNet as tables, as arrays of annotations or as class folders; val is the test split."""
    def label_of(text: str, where: str) -> int | str:
        label = _number(text, where, "expression", 0, 10)
        return label if label < len(found.classes) else LEFT_OUT[label]

    for below in ("", "Manually_Annotated_file_lists"):
        tables = [found.folder / below / name for name in ("training.csv", "validation.csv")]
        if any(table.exists() for table in tables):
            found.listed = True
            _affectnet_table(found, "train", tables[0], label_of)
            return _affectnet_table(found, "test", tables[1], label_of)
    if not (found.folder / "train_set").is_dir():
        return read_class_folders(found, {"train": ("train",), "test": ("val",)}, label_of)
    found.listed = True
    for split, name in (("train", "train_set"), ("test", "val_set")):
        labels = _read_expressions(found.folder / name / "annotations")
        for number, (where, text) in labels.items():
            found.add(split, f"{name}/images/{number}.jpg", label_of(text, where), where)
        found.notes["images without an annotation, left out"] += sorted(
            f"{name}/images/{image}" for image in names(found.folder / name / "images")
            if image.lower().endswith(SUFFIXES) and not image.startswith(".")
            and os.path.splitext(image)[0] not in labels)
    return None


def _affectnet_table(found: Found, split: str, table: Path, label_of) -> None:
    """The rows of training.csv or validation.csv, with boxes."""
    rows = read_cells(table, "training.csv and validation.csv lie beside "
                             "Manually_Annotated_Images/, or in Manually_Annotated_file_lists/")
    first, columns = next(rows, (1, [""]))
    if columns[0].lower().endswith(SUFFIXES):  # a release whose validation.csv lacks the header
        rows, columns = chain([(first, columns)], rows), AFFECTNET_COLUMNS
    if missing := set(NEEDED) - set(columns):
        raise BadInput(f"{table}:1: no column {min(missing)!r}; take the table as published")
    at = [list(columns).index(name) for name in NEEDED]
    for number, row in rows:
        where = f"{table}:{number}"
        if len(row) != len(columns):
            raise BadInput(f"{where}: {len(row)} fields, not as many as the header "
                           f"({len(columns)}); take the table as published")
        name, *sides, expression = (row[i] for i in at)
        path = "Manually_Annotated_Images/" + name.replace("\\", "/")
        label, box = label_of(expression, where), _box(sides)
        if box is None and not isinstance(label, str):
            found.notes["rows without a box, the whole image taken"].append(where)
        found.add(split, path, label, where, box)


def _box(cells: Iterable[str]) -> tuple | None:
    """Left, top, right, bottom of left, top, width, height; None where a number is missing."""
    try:
        left, top, width, height = map(float, cells)
    except ValueError:
        return None
    if width > 0 and height > 0 and math.isfinite(left + top + width + height):
        return left, top, left + width, top + height
    return None


def _read_expressions(folder: Path) -> dict[str, tuple[str, str]]:
    """Number of an image → (file, text of the expression) of annotations/<number>_exp.npy.

    Read by several threads, which wait for the disk at the same time; of the few different
    headers, each is parsed once, as parsing is what takes numpy.load's time.
    """
    numbers = sorted((name[:-8] for name in names(folder)
                      if name.endswith("_exp.npy") and not name.startswith(".")),
                     key=lambda number: (len(number), number))
    dtype_of = functools.lru_cache(64)(_npy_dtype)

    def read(part: list[str]) -> list[tuple[str, str]]:
        texts = []
        for number in part:
            path = f"{folder}/{number}_exp.npy"
            try:
                with open(path, "rb", buffering=0) as file:
                    raw = file.read()
                start = 10 + int.from_bytes(raw[8:10], "little")
                (value,) = np.frombuffer(raw, dtype_of(raw[:start]), offset=start)
            except (OSError, ValueError, SyntaxError) as error:
                raise BadInput(f"{path}: not an array of one number ({error}); unpack the set "
                               f"again") from None
            texts.append((path, str(value)))
        return texts

    parts = [numbers[i:i + 1000] for i in range(0, len(numbers), 1000)]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(numbers, chain.from_iterable(pool.map(read, parts))))


def _npy_dtype(head: bytes) -> np.dtype:
    """Type of the numbers or strings below the header of a .npy file of version 1."""
    file = io.BytesIO(head)
    ensure(np.lib.format.read_magic(file) == (1, 0))
    dtype = np.lib.format.read_array_header_1_0(file)[2]
    ensure(not dtype.hasobject)
    return dtype


# ---------------------------------------------------------------- FERPlus

VOTE_COLUMNS = (*CLASSES["ferplus"], "unknown", "NF")
USAGES = {"Training": ("train", "FER2013Train"), "PublicTest": ("val", "FER2013Valid"),
          "PrivateTest": ("test", "FER2013Test")}
UNKNOWN, NO_FACE, UNDECIDED, NO_VOTES = 8, 9, -1, -2
REASONS = {UNKNOWN: "images voted unknown, left out",
           NO_FACE: "images voted no face, left out",
           UNDECIDED: "images without a {} of votes, left out",
           NO_VOTES: "images without two votes for the same, left out"}


def decide(votes: np.ndarray, rule: str) -> np.ndarray:
    """Labels int64 `[N]` of votes int `[N, 10]`: 0 to 7, UNKNOWN, NO_FACE, UNDECIDED or NO_VOTES.

    One vote alone counts as an accident. rule: 'majority', more than half of the votes that are
    left, as the published code has it; 'plurality', more than any other.
    """
    votes = np.where(votes > 1, votes, 0)
    most = votes.max(1)
    if rule == "majority":
        clear = 2 * most > votes.sum(1)
    else:
        clear = (votes == most[:, None]).sum(1) == 1
    labels = np.where(clear, votes.argmax(1), UNDECIDED)
    return np.where(most > 0, labels, NO_VOTES).astype(np.int64)


def _ferplus(found: Found, rule: str) -> None:
    """FERPlus: votes in one table, or in one beside the images of each split."""
    found.listed = True
    table = found.folder / "fer2013new.csv"
    rows = list(_votes_table(found, table) if table.exists() else _votes_of_splits(found))
    labels = decide(np.array([row[3] for row in rows], np.int64).reshape(-1, 10), rule).tolist()
    for (split, path, where, _, box), label in zip(rows, labels):
        reason = REASONS.get(label, "").format(rule)
        found.add(split, path, reason or label, where, box)


def _votes_table(found: Found, table: Path) -> Iterator[tuple]:
    """(split, path, where, votes, no box) of the rows of fer2013new.csv, the images of which stand
    in fer2013.csv, row by row, or in folders."""
    rows, _ = read_table(table, ("Usage", "Image name", *VOTE_COLUMNS), fix="take the table as "
                         "published")
    pixels = table.with_name("fer2013.csv")
    images = None
    if pixels.exists():
        images = list(_pixels_table(pixels))
        if len(images) != len(rows):
            raise BadInput(f"{pixels}: {len(images)} rows, but fer2013new.csv has {len(rows)}, one "
                           f"for each; take both tables as published")
    for i, (where, row) in enumerate(rows):
        if row["Usage"] not in USAGES:
            raise BadInput(f"{where}: Usage {row['Usage']!r} is not one of {', '.join(USAGES)}; "
                           f"correct it")
        split, folder = USAGES[row["Usage"]]
        if images and images[i][1] != row["Usage"]:
            raise BadInput(f"{images[i][0]}: Usage {images[i][1]!r}, but {where} says "
                           f"{row['Usage']!r}; both tables hold the same rows in the same order")
        votes = [_number(row[name], where, f"votes for {name}", 0, 1000) for name in VOTE_COLUMNS]
        if not row["Image name"].strip():
            found.notes["rows that name no image, left out"].append(where)
            continue
        path = f"fer2013.csv:{i}" if images else f"{folder}/{row['Image name'].strip()}"
        if images:
            found.pixels[path] = images[i][2]
        yield split, path, where, votes, None


def _pixels_table(table: Path) -> Iterator[tuple]:
    """(where, Usage, uint8 `[48, 48]`) of the rows of fer2013.csv, never its 300 MB of text at
    once; raises BadInput."""
    rows = read_cells(table, "take the table as published")
    header = next(rows, (1, []))[1]
    if not {"pixels", "Usage"} <= set(header):
        raise BadInput(f"{table}:1: needs the columns emotion,pixels,Usage; take the table as "
                       f"published")
    for number, row in rows:
        try:
            cells = dict(zip(header, row, strict=True))
            pixels = np.fromstring(cells["pixels"], np.int32, sep=" ").reshape(48, 48)
            ensure(pixels.min() >= 0 and pixels.max() <= 255)
        except ValueError:
            raise BadInput(f"{table}:{number}: pixels are not 48x48 numbers of 0..255; take the "
                           f"table as published") from None
        yield f"{table}:{number}", cells["Usage"], pixels.astype(np.uint8)


def _votes_of_splits(found: Found) -> Iterator[tuple]:
    """(split, path, where, votes, box) of the rows of FER2013{Train,Valid,Test}/label.csv."""
    for split, folder in USAGES.values():
        table = found.folder / folder / "label.csv"
        if split == "val" and not table.exists():
            continue
        for number, row in read_cells(table, f"a folder of FERPlus holds fer2013new.csv, or "
                                             f"{folder}/label.csv"):
            where = f"{table}:{number}"
            box = re.fullmatch(r"\s*\((\d+), *(\d+), *(\d+), *(\d+)\)\s*", "".join(row[1:2]))
            if len(row) != 12 or not box:
                raise BadInput(f"{where}: {','.join(row)[:80]!r} is not '<file>,\"(<left>, <top>, "
                               f"<right>, <bottom>)\",<ten votes>'")
            votes = [_number(text, where, f"votes for {name}", 0, 1000)
                     for name, text in zip(VOTE_COLUMNS, row[2:])]
            if row[0].strip():
                yield split, f"{folder}/{row[0].strip()}", where, votes, tuple(map(float,
                                                                                   box.groups()))
            else:
                found.notes["rows that name no image, left out"].append(where)
