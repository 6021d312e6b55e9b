"""Sets of photographed faces with an expression each: read, checked, counted, decoded.

RAF-DB, AffectNet and FERPlus in the layouts they are handed out in (`face_sets`), and any folder
of class folders.
"""
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from images import cache, face_folders, face_sets
from images.decoding import read_photo, upright_size
from images.face_folders import SPLITS, Found
from images.face_sets import CLASSES, SETS
from util import BadInput, ensure, read_cells, read_table

__all__ = ["CLASSES", "SETS", "FaceSet", "content", "decode", "fingerprints", "read_faces",
           "read_landmarks", "read_unlabelled", "report", "stamp"]

PROBED = 256  # bytes in the middle of a file, and at its end, that tell it from others
# numbers of images as published, by class or, where those are not known, in all; affectnet7 is
# affectnet8 without contempt
PUBLISHED = {
    "rafdb": {"train": (1290, 281, 717, 4772, 1982, 705, 2524),
              "test": (329, 74, 160, 1185, 478, 162, 680)},
    "affectnet8": {"train": (74874, 134415, 25459, 14090, 6378, 3803, 24882, 3750),
                   "test": (500,) * 8},
    "affectnet7": {"train": (74874, 134415, 25459, 14090, 6378, 3803, 24882), "test": (500,) * 7},
    "ferplus": {"train": 25045, "val": 3191,
                "train + val": (9913, 8146, 3547, 3370, 2387, 141, 596, 136),
                "test": (1083, 892, 394, 382, 269, 16, 86, 15)}}


@dataclass(frozen=True)
class FaceSet:
    """Images of one split of a set.

    name: of SETS; classes: names in the order of the ids; paths: unique, relative to the folder,
    with slashes, or fer2013.csv:<row>, rows counted from 0; labels: int64 `[N]`; subjects: '' where
    the set names none; boxes: float32 `[N, 4]`, left, top, right, bottom in pixels of the upright
    image, a row of NaN for the whole image; pixels: uint8 `[N, 48, 48]` where the images stand in a
    table; rendered: they are stand-ins.
    """
    name: str
    folder: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray
    subjects: list[str]
    boxes: np.ndarray | None
    pixels: np.ndarray | None
    rendered: bool

    def __len__(self):
        return len(self.paths)

    @property
    def n_label(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def counts(self) -> np.ndarray:
        """int64 `[C]`: images of each class."""
        return np.bincount(self.labels, minlength=self.n_label)

    def subset(self, index: np.ndarray) -> "FaceSet":
        """The images of an index, or where a bool `[N]` holds."""
        index = np.arange(len(self))[index]
        return replace(self, paths=[self.paths[i] for i in index], labels=self.labels[index],
                       subjects=[self.subjects[i] for i in index],
                       boxes=None if self.boxes is None else self.boxes[index],
                       pixels=None if self.pixels is None else self.pixels[index])

    def digest(self) -> str:
        """SHA-256 of name, classes, paths, labels, subjects and boxes."""
        rows = [self.name, self.classes, self.paths, self.labels.tolist(), self.subjects]
        content = hashlib.sha256(json.dumps(rows).encode())
        if self.boxes is not None:
            content.update(np.ascontiguousarray(self.boxes).tobytes())
        return content.hexdigest()


# ---------------------------------------------------------------- reading

def read_faces(dataset: str, folder: str | Path, votes: str = "majority") -> dict[str, FaceSet]:
    """The splits of a set (of SETS) below a folder: 'train', 'test' and, where it has both a
    validation and a test split, 'val'; 'train' alone of a folder without splits.

    votes: 'majority' or 'plurality', for FERPlus. Prints the counts. Raises BadInput for what fits
    no layout of the set, malformed lines, contradictory labels, a split without images, fewer than
    two classes.
    """
    folder = Path(folder)
    found = face_sets.find(dataset, folder, votes)
    subjects = _read_subjects(folder, found)
    splits = {}
    for split in SPLITS:
        rows = found.rows[split]
        if not rows and (split == "train" or (split == "test" and dataset != "folder")):
            raise BadInput(f"{folder}: no image of {dataset}'s {split} split; name the folder that "
                           f"holds them")
        if rows:
            splits[split] = _face_set(dataset, found, rows, subjects)
    if np.count_nonzero(splits["train"].counts) < 2:
        raise BadInput(f"{folder}: training images of fewer than two classes; telling expressions "
                       f"apart takes two at least")
    report(splits, found.notes, votes)
    return splits


def _face_set(dataset: str, found: Found, rows: dict[str, tuple],
              subjects: dict[str, str]) -> FaceSet:
    labels, _, boxes = zip(*rows.values())
    if any(boxes):
        boxes = np.array([box or (math.nan,) * 4 for box in boxes], np.float32)
    else:
        boxes = None
    pixels = np.stack([found.pixels[path] for path in rows]) if found.pixels else None
    return FaceSet(dataset, found.folder, found.classes, list(rows), np.array(labels, np.int64),
                   [subjects.get(path, "") for path in rows], boxes, pixels,
                   (found.folder / "rendered.json").exists())


def _read_subjects(folder: Path, found: Found) -> dict[str, str]:
    """Path → subject of subjects.csv, which names all images; empty where there is none."""
    table, subjects = folder / "subjects.csv", {}
    if not table.exists():
        return subjects
    for where, row in read_table(table, ("path", "subject"), fix="it names the subject of every "
                                 "image")[0]:
        path, subject = row["path"].replace("\\", "/"), row["subject"].strip()
        if subject and subjects.setdefault(path, subject) != subject:
            raise BadInput(f"{where}: {path} is of {subjects[path]} above, of {subject} here; keep "
                           f"one of the lines")
    of = {split: {subjects.get(path) for path in rows} for split, rows in found.rows.items()}
    nameless = [path for rows in found.rows.values() for path in rows if path not in subjects]
    if nameless:
        raise BadInput(f"{table}: no subject of {len(nameless)} images, {nameless[0]} the first; "
                       f"name the subject of every image, or remove the file")
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        found.notes[f"subjects in {one} and {other} both"] += sorted(
            of.get(one, set()) & of.get(other, set()))
    return subjects


def read_unlabelled(folder: str | Path) -> FaceSet:
    """All images below a folder, however deep, or below its training split where it has one
    (`face_folders.SPLIT_NAMES`), in one class without a name. Raises BadInput where there is
    none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; name the one that holds the images")
    face_folders.check_folder(folder)
    named = [name for name in face_folders.subfolders(Found(folder))
             if face_folders.SPLIT_NAMES.get(name.lower()) == "train"]
    if len(named) > 1:
        raise BadInput(f"{folder}: {' and '.join(named)} are both the training split; leave one")
    folder = folder / named[0] if named else folder
    found = Found(folder)
    paths = [path.removeprefix("./") for path in face_folders.images_below(found, ".")]
    if not paths:
        raise BadInput(f"{folder}: no image below it ({', '.join(face_folders.SUFFIXES)}); name "
                       f"the folder that holds them")
    others = len(found.notes.pop("files that are no images, left out", ()))
    print(f"{len(paths):,} images below {folder}" + f"; {others:,} other files left out" *
          bool(others))
    _say(found.notes)
    rendered = any((place / "rendered.json").exists() for place in (
        folder, *folder.resolve().parents[:3]))
    return FaceSet("folder", folder, ("",), paths, np.zeros(len(paths), np.int64),
                   [""] * len(paths), None, None, rendered)


def content(faces: FaceSet) -> str:
    """SHA-256 of what a run must find again when it goes on: the lengths of the files, or the
    table's pixels."""
    if faces.pixels is not None:
        return hashlib.sha256(faces.pixels.tobytes()).hexdigest()
    digest = hashlib.sha256()
    for size in _lengths(faces):
        digest.update(f"{size} ".encode())
    return digest.hexdigest()


def _lengths(faces: FaceSet) -> Iterator[int | str]:
    """Bytes of each image's file, or 'missing'."""
    for path in faces.paths:
        try:
            yield os.stat(faces.folder / path).st_size
        except OSError:
            yield "missing"


def fingerprints(faces: FaceSet) -> np.ndarray:
    """int64 `[N]` that tell an image from others by its file's length and some of its bytes,
    wherever it lies and whatever it is called, all even; by its pixels in a table, all odd."""
    def digest(content: bytes) -> bytes:
        return hashlib.blake2b(content, digest_size=8).digest()

    def of_file(path: str) -> bytes:
        try:
            with open(faces.folder / path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                parts = [str(size).encode()]
                for start in (size // 2, max(size - PROBED, 0)):
                    file.seek(start)
                    parts.append(file.read(PROBED))
            return digest(b" ".join(parts))
        except OSError:  # named and left out when it is decoded
            return digest(path.encode())
    if faces.pixels is not None:
        return np.frombuffer(b"".join(digest(pixels.tobytes()) for pixels in faces.pixels),
                             np.int64) | 1
    parts = [faces.paths[i:i + 256] for i in range(0, len(faces.paths), 256)]
    with ThreadPoolExecutor(8) as pool:  # which wait for the disk at the same time
        each = pool.map(lambda part: b"".join(map(of_file, part)), parts)
        return np.frombuffer(b"".join(each), np.int64) & ~1


def report(splits: dict[str, FaceSet], notes: dict[str, list[str]] | None = None,
           votes: str = "majority") -> None:
    """Prints the images of each split and class beside the published counts, then what is
    irregular; notes: kind of irregularity → the images or lines concerned."""
    train = next(iter(splits.values()))
    published = {} if train.rendered or votes != "majority" else PUBLISHED.get(train.name, {})
    print(f"{train.name}: {sum(map(len, splits.values())):,} images in {train.folder}"
          + (", rendered" if train.rendered else ""))
    counts = {split: faces.counts for split, faces in splits.items()}
    for split, own in counts.items():
        named = ", ".join(f"{name} {n:,}" for name, n in zip(train.classes, own))
        print(f"  {split} {own.sum():,}: {named}{_beside(own, published.get(split), train)}")
    if "train + val" in published and "val" in counts:
        both = counts["train"] + counts["val"]
        print(f"  train + val {both.sum():,}{_beside(both, published['train + val'], train)}")
    for name, n in zip(train.classes, counts.get("train", ())):
        if not n:
            print(f"  warning: no training image of {name}")
    _say(notes or {})


def _say(notes: dict[str, list[str]]) -> None:
    """Prints what is irregular: kind → the images or lines concerned."""
    for kind, places in notes.items():
        if places:
            shown = places[:3 if "missing" in kind else 1]
            print(f"  {kind}: {len(places):,} ({', '.join(shown)}"
                  + (", …)" if len(places) > len(shown) else ")"))


def _beside(counts: np.ndarray, published: tuple | int | None, faces: FaceSet) -> str:
    """How counts compare with published ones, by class or in all."""
    if published is None:
        return ""
    total = published if isinstance(published, int) else sum(published)
    other = [f"{total:,} in all"] if counts.sum() != total else []
    if not isinstance(published, int):
        other += [f"{name} {there:,}" for name, here, there in
                  zip(faces.classes, counts, published) if here != there]
    return f"; published: {', '.join(other)}" if other else "; as published"


# ---------------------------------------------------------------- decoding

def decode(faces: FaceSet, i: int, side: int,
           resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """The i-th image: uint8 `[3, side, side]`, RGB, upright; its box where it has one, clipped to
    the image, brought to a square whatever its shape, as the published code does; resample: how.

    JPEGs are decoded with as many pixels as that takes. Raises BadInput for an image that cannot
    be read and a box outside it.
    """
    size = side, side
    if faces.pixels is not None:
        image = Image.fromarray(faces.pixels[i]).resize(size, resample)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()
    path = faces.folder / faces.paths[i]
    if faces.boxes is None or np.isnan(faces.boxes[i]).any():
        image = read_photo(path, side).resize(size, resample)
        return np.asarray(image).transpose(2, 0, 1).copy()
    full = upright_size(path)
    left, top, right, bottom = _clipped(faces, i, full)
    image = read_photo(path, math.ceil(side * min(full) / min(right - left, bottom - top)))
    # a pixel is 1, 2, 4 or 8 of the file's, the last ones of a line less than full
    reduced = 2 ** round(math.log2(max(full) / max(image.size)))
    left, top, right, bottom = (length / reduced for length in (left, top, right, bottom))
    # cut out before it is resized, or pixels beyond the box would shine through at its edges
    corner = math.floor(left), math.floor(top)
    cut = image.crop((*corner, math.ceil(right), math.ceil(bottom)))
    image = cut.resize(size, resample, box=(
        left - corner[0], top - corner[1], right - corner[0], bottom - corner[1]))
    return np.asarray(image).transpose(2, 0, 1).copy()


def stamp(faces: FaceSet, side: int,
          resample: Image.Resampling = Image.Resampling.BILINEAR) -> str:
    """What the decoded images of a set follow from, for cache.OnDemand."""
    how = () if resample == Image.Resampling.BILINEAR else (int(resample),)
    if faces.pixels is not None:
        return hashlib.sha256(faces.pixels.tobytes() + bytes([side % 256, side // 256, *how])
                              ).hexdigest()
    boxes = None if faces.boxes is None else hashlib.sha256(faces.boxes.tobytes()).hexdigest()
    return cache.stamp((faces.folder / path for path in faces.paths), "faces", side, boxes,
                       *how)


def _clipped(faces: FaceSet, i: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The i-th box within an image of this size, or the whole image; raises BadInput."""
    if faces.boxes is None or np.isnan(faces.boxes[i]).any():
        return 0.0, 0.0, float(size[0]), float(size[1])
    left, top, right, bottom = map(float, faces.boxes[i])
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
    if right - left < 1 or bottom - top < 1:
        raise BadInput(f"{faces.folder / faces.paths[i]}: its box {faces.boxes[i].tolist()} lies "
                       f"outside its {size[0]}x{size[1]} pixels; correct the box, or remove the "
                       f"image")
    return left, top, right, bottom


# ---------------------------------------------------------------- landmarks

def read_landmarks(path: str | Path, faces: FaceSet, among: Iterable[str] = ()) -> np.ndarray:
    """Landmarks float32 `[N, K, 2]`, K 68 or 5, as shares (0 to 1) of the width and height of the
    image, or of the box that is cut out of it; NaN where the file has none of an image.

    Its columns: path, x1, y1, …, pixels of the upright image, all empty where no face was found;
    the path is that of the FaceSet, or relative to the file, or the name alone where no other
    image has it, of the set's or `among` others. Rows of other images are passed over. Raises
    BadInput.
    """
    root, folder = os.path.abspath(Path(path).parent), os.path.abspath(faces.folder)
    below = os.path.relpath(folder, root).replace(os.sep, "/")
    places_of = {key: i for i, key in enumerate(faces.paths)}
    places = {f"{below}/{key}": i for key, i in places_of.items()} | places_of
    by_name = {}
    for key in dict.fromkeys([*faces.paths, *among]):
        by_name.setdefault(key.rpartition("/")[2], []).append(key)
    rows = read_cells(path, "it is a table with the columns path,x1,y1,…")
    header = next(rows, (1, [""]))[1]
    if len(header) not in (1 + 2 * 68, 1 + 2 * 5) or header[0] != "path":
        raise BadInput(f"{path}:1: {len(header)} columns; it has path,x1,y1,… of 68 or of 5 points")
    points = np.full((len(faces), len(header) // 2, 2), np.nan, np.float32)
    lines = {}
    for number, (key, *cells) in rows:
        where, key = f"{path}:{number}", key.replace("\\", "/")
        named = [faces.paths[places[key]]] if key in places else by_name.get(key, [])
        if len(cells) != len(header) - 1:
            raise BadInput(f"{where}: {len(cells) + 1} fields, not as many as the header "
                           f"({len(header)})")
        if len(named) > 1:
            raise BadInput(f"{where}: {key} is the name of {named[0]} and {named[1]}; give the "
                           f"path")
        named = [places_of[one] for one in named if one in places_of]
        if named and lines.setdefault(named[0], number) != number:
            raise BadInput(f"{where}: {key} is in line {lines[named[0]]} already; remove one")
        if named and any(cells):
            try:
                points[named[0]] = np.reshape(list(map(float, cells)), (-1, 2))
                ensure(np.isfinite(points[named[0]]).all())
            except ValueError:
                raise BadInput(f"{where}: a coordinate is no number; correct it") from None
    if not lines:
        raise BadInput(f"{path}: names none of the {len(faces)} images, {faces.paths[0]} the "
                       f"first; give their paths")
    _to_shares(points, faces)
    return points


def _to_shares(points: np.ndarray, faces: FaceSet) -> None:
    """Pixels to shares, in place."""
    index = np.flatnonzero(~np.isnan(points[:, 0, 0]))

    def frame(i: int) -> tuple[float, float, float, float]:
        try:
            size = upright_size(faces.folder / faces.paths[i]) if faces.pixels is None \
                else (48, 48)
            return _clipped(faces, i, size)
        except BadInput:  # who decodes the image says so
            return math.nan, math.nan, math.nan, math.nan

    with ThreadPoolExecutor(8) as pool:
        frames = np.array(list(pool.map(frame, index)), np.float32).reshape(-1, 2, 2)
    points[index] -= frames[:, :1]
    points[index] /= frames[:, 1:] - frames[:, :1]
