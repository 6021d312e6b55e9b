"""Photographs → their faces: which files there are; faces, crops and picture of one of them.

What is found of a photograph is a record, a dict: path, stem, stat (bytes, time of change), error
(why it cannot be read, or None), width, height, files (what was written), and faces, each with its
number, box, score, points and, where it was cut, crop and crop_points. Pixels from the upper left
corner of the upright photograph, or of the crop.
"""
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from images.decoding import read_photo
from images.lists import natural
from preparation import detection, registration
from preparation.detection import Face
from util import BadInput, write_bytes

# of iPhones' .heic too: what this Pillow cannot read is named, not passed over
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
            ".avif", ".heic", ".heif", ".ppm", ".pgm", ".pnm", ".jp2", ".tga"}
PICTURE_SIDE = 1600  # pixels: what the faces are drawn on is no larger
QUALITY = {"jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}, "png": {"format": "PNG"}}


class Photo(NamedTuple):
    """path: of the file; name: what tables call it; stem: what its crops' names begin with."""
    path: str
    name: str
    stem: str


@dataclass(frozen=True)
class Settings:
    """What the result depends on besides the photographs; sizes in pixels."""
    min_face_size: int = 40
    threshold: float = 0.9
    largest: bool = False
    crop: bool = False
    align: bool = True
    margin: float = registration.MARGIN
    size: int = 224
    format: str = "jpg"
    annotate: bool = True


# ---------------------------------------------------------------- files

def find_photos(inputs: Iterable[str], out: str | Path) -> tuple[list[Photo], Counter]:
    """(The photographs among files and below folders, in natural order, how many files of each
    other suffix lie there); `out`, where results go, is not searched.

    Names are relative to the folder; of several inputs they begin with the folder's name. Raises
    BadInput for a missing input, one within `out`, none at all, and two of one name.
    """
    inputs, out, paths, others = list(inputs), os.path.realpath(out), {}, Counter()
    for given in inputs:
        root = Path(os.path.abspath(given))
        if not root.exists():
            raise BadInput(f"{given}: no such photograph or folder")
        if Path(os.path.realpath(root)).is_relative_to(out):
            raise BadInput(f"{given}: lies in {out}, where the results go; name another folder "
                           f"for these")
        above = root if root.is_dir() and len(inputs) == 1 else root.parent
        for path in _files(root, out) if root.is_dir() else [root]:
            if path != root and path.suffix.lower() not in SUFFIXES:
                others[path.suffix.lower() or path.name] += 1
                continue
            # names that are not UTF-8 could not be written into tables
            name = os.fsencode(path.relative_to(above).as_posix()).decode("utf-8", "replace")
            if paths.setdefault(name, path) != path:
                raise BadInput(f"{path}: would be called {name} as {paths[name]} is; give the "
                               f"folder that both are in")
    if not paths:
        raise BadInput(f"{inputs[0]}: no photograph in it; they are known by their suffix, such "
                       f"as .jpg")
    stems = {name: PurePosixPath(name).with_suffix("").as_posix() for name in paths}
    while True:  # the whole name of one may be the stem of another
        count = Counter(stem.lower() for stem in stems.values())
        twice = [name for name, stem in stems.items() if count[stem.lower()] > 1 and stem != name]
        if not twice:
            break
        stems |= {name: name for name in twice}
    return [Photo(str(paths[name]), name, stems[name])
            for name in sorted(paths, key=lambda n: [natural(p) for p in n.split("/")])], others


def _files(folder: Path, out: str, above: tuple = ()) -> Iterator[Path]:
    """Files below a folder, but hidden ones; links are followed unless they lead in circles."""
    real = os.path.realpath(folder)
    if real == out or real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, out, (*above, real))
        else:
            yield path


def stat_of(photo: Photo) -> list[int] | None:
    """Bytes and time of change of the file, which tell whether it was replaced; None of none."""
    try:
        stat = os.stat(photo.path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


# ---------------------------------------------------------------- one photograph

def process(photo: Photo, settings: Settings, folder: str | Path,
            device: str | torch.device = "cpu") -> dict:
    """Finds the faces of a photograph, writes its crops and its picture below `folder`; returns its
    record."""
    record = {"path": photo.name, "stem": photo.stem, "stat": stat_of(photo), "error": None,
              "width": None, "height": None, "files": [], "faces": []}
    try:
        with warnings.catch_warnings():  # Pillow's, of what is odd in a file; a bar is running
            warnings.simplefilter("ignore")
            pixels = np.asarray(read_photo(photo.path))
    except BadInput as error:
        return record | {"error": str(error).replace(photo.path, photo.name)}
    record["height"], record["width"] = pixels.shape[:2]
    faces = detection.find_faces(pixels, settings.min_face_size, settings.threshold, device)
    for number, face in enumerate(faces[:1] if settings.largest else faces, 1):
        record["faces"].append(described(number, face))
        if settings.crop:
            framing = settings.size, settings.margin, settings.align
            name = f"crops/{photo.stem}_{number}.{settings.format}"
            save(folder, name, Image.fromarray(detection.cut_face(pixels, face, *framing)),
                  settings.format)
            points = detection.points_in_crop(face, *framing)
            record["faces"][-1] |= {"crop": name, "crop_points": _rounded(points)}
            record["files"].append(name)
    if settings.annotate and record["faces"]:
        record["files"].append(f"annotated/{photo.stem}.jpg")
        save(folder, record["files"][-1], draw(pixels, record["faces"]), "jpg")
    return record


def described(number: int, face: Face) -> dict:
    """What a record says of a face, and `draw` draws."""
    box = {name: round(getattr(face.box, name), 3) for name in ("x", "y", "width", "height")}
    return {"face": number, **box, "score": round(face.score, 6), "points": _rounded(face.points)}


def _rounded(points):
    return [[round(float(value), 3) for value in point] for point in points]


def save(folder: str | Path, name: str, image: Image.Image, kind: str) -> None:
    """Writes an image as `name` below a folder, in one of QUALITY."""
    path, file = Path(folder) / name, io.BytesIO()
    image.save(file, **QUALITY[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, file.getvalue())


def draw(photo: np.ndarray, faces: list[dict]) -> Image.Image:
    """A photograph uint8 `[H, W, 3]` with the box, points, number and score (or `text`) of each
    face, scaled down to PICTURE_SIDE pixels."""
    image = Image.fromarray(photo)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    scale, canvas = image.width / photo.shape[1], ImageDraw.Draw(image)
    line = max(1, max(image.size) // 400)
    font = ImageFont.load_default(max(10, max(image.size) // 50))
    for face in faces:
        left, top = face["x"] * scale, face["y"] * scale
        right, bottom = left + face["width"] * scale, top + face["height"] * scale
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)),
                         outline="lime", width=line)
        for x, y in face["points"]:
            x, y, radius = x * scale, y * scale, 1.5 * line
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill="red")
        text = face.get("text") or f"{face['face']}: {face['score']:.3f}"
        place = left, max(0, top - 1.5 * font.size)  # above the box, where there is room
        canvas.rectangle(canvas.textbbox(place, text, font), fill="black")
        canvas.text(place, text, "white", font)
    return image
