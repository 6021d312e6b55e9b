"""One clip from its frames to its two difference images; the records that let a run go on.

A finished clip leaves a record in <data folder>/.prepare: what it was made of and with, the
digests of its images, and what was measured. A later run keeps it if all of that still holds.
"""
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from images.decoding import NO_CHANGE, PIXEL_LIMIT
from preparation import detection, registration
from preparation.registration import Box, Pair
from util import write_json

RECORDS = ".prepare"
VERSION = 2  # of the computation: another one makes all records void


@dataclass(frozen=True)
class Settings:
    """What the images depend on besides the frames. margin: a share; range and scale: mm;
    crops: whether the aligned crops are kept beside the images."""
    crop: str = "none"
    margin: float = registration.MARGIN
    size: int = 256
    roll: bool = False
    register: str = "translation"
    difference: str = "signed"
    depth_scale: float = 1.0
    depth_range: float = 10.0
    crops: bool = False


@dataclass(frozen=True)
class Task:
    """One clip to cut. frames: paths of onset, apex and, if there, depth onset and apex; empty for
    a blank clip without them; more: frames on which the face is looked for next."""
    key: str
    rgb: str
    depth: str
    frames: tuple
    blank: bool = False
    box: Box | None = None
    more: tuple = ()


class Unusable(Exception):
    """A clip that cannot be cut; the text says why."""


def process(task, settings, folder):
    """Writes the images of one clip below `folder` and its record, unless they are there already.

    Returns the record, a dict: digests, box, what was measured; or {"dropped": reason}.
    """
    stamp, path = fingerprint(task, settings), record_path(folder, task)
    record = read_record(path)
    if record and record["stamp"] == stamp and _intact(record, folder):
        return record
    try:
        pair, record = make_pair(task, settings, folder)
    except Unusable as error:
        if not task.blank:
            return {"dropped": str(error)}
        pair, record = make_pair(replace(task, frames=()), settings, folder)
    images, more = make_images(task, settings, pair, record["box"])
    record |= {"stamp": stamp, "key": task.key, **more, "files": {}}
    for name, image in zip((task.rgb, task.depth), images):
        if image is not None:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=4)
            write_bytes(Path(folder) / name, file.getvalue())
            record["files"][name] = hashlib.sha256(file.getvalue()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def fingerprint(task, settings):
    """What the images of a task follow from, as a digest."""
    stat = [os.stat(name) for name in task.frames]
    content = [VERSION, asdict(settings), asdict(task), [(s.st_size, s.st_mtime_ns) for s in stat]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_path(folder, task):
    return Path(folder) / RECORDS / f"{hashlib.sha256(task.rgb.encode()).hexdigest()[:24]}.json"


def read_record(path):
    """A record, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _intact(record, folder):
    """Whether the images of a record are there as they were written."""
    try:
        return all(hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest() == digest
                   for name, digest in record["files"].items())
    except OSError:
        return False


def write_bytes(path, content):
    """Writes a file under a temporary name, then renames: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- frames

def read_frame(path):
    """uint8 `[H, W, 3]`; raises Unusable."""
    return np.asarray(_open(path, "RGB"))


def read_depth(path, scale):
    """Depth in mm float32 `[H, W]`, 0 where nothing was measured; raises Unusable."""
    image = _open(path, None)
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise Unusable(f"{path}: a colour image, not a depth frame")
        pixels = pixels[..., 0]
    return pixels.astype(np.float32) * np.float32(scale)


def _open(path, mode):
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Unusable(f"{path}: {image.width}x{image.height} pixels")
            image.load()
            return image.convert(mode) if mode else image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unusable(f"{path}: not a readable image") from None


def find_box(task, settings, onset):
    """(Box on the onset frame, file on which it was found); raises Unusable."""
    height, width = onset.shape[:2]
    if task.box:
        if not task.box.lies_in(width, height):
            raise Unusable(f"the box is not within the frame of {width}x{height} pixels")
        return task.box, task.frames[0]
    if settings.crop == "none":
        return detection.central_box(width, height, settings.margin), task.frames[0]
    for name in (task.frames[0], *task.more):
        frame = onset if name == task.frames[0] else read_frame(name)
        box = detection.find_face(frame, settings.roll)
        if box:
            return box, name
    raise Unusable(f"no face found on the onset frame nor on the next {len(task.more)}")


# ---------------------------------------------------------------- one clip

def make_pair(task, settings, folder):
    """(Pair or None for a blank clip, what is known of it). Crops that were kept are read again;
    raises Unusable."""
    known = {"box": None, "frame": None, "frame_size": None, "shift": 0.0, "residual": 0.0,
             "registered": True}
    if task.blank and not task.frames:
        return None, known
    kept = _crops_path(task, settings, folder)
    if kept.exists():
        with np.load(kept) as content:
            known = json.loads(str(content["known"]))
            depths = (content.get(n) for n in ("depth_onset", "depth_apex"))
            return Pair(content["onset"], content["apex"], *depths, known["shift"],
                        _number(known["residual"]), known["registered"]), known
    onset = read_frame(task.frames[0])
    box, name = find_box(task, settings, onset)
    frames = onset, onset if task.blank else read_frame(task.frames[1])
    depths = [read_depth(path, settings.depth_scale) for path in task.frames[2:]] or [None, None]
    pair = registration.align(frames, depths, box, settings.size, settings.margin,
                              "none" if task.blank else settings.register)
    known.update(box=asdict(box), frame=Path(name).name, frame_size=onset.shape[1::-1],
                 shift=round(pair.shift, 4), registered=pair.registered,
                 residual=None if np.isnan(pair.residual) else round(pair.residual, 4))
    if settings.crops:
        _keep_crops(kept, pair, known)
    return pair, known


def _number(value):
    return float("nan") if value is None else value


def _crops_path(task, settings, folder):
    """Kept crops carry a digest of what they follow from in their name."""
    stat = [os.stat(name) for name in task.frames]
    names = ("crop", "margin", "size", "roll", "register", "depth_scale")
    content = [VERSION, [getattr(settings, n) for n in names], asdict(task),
               [(s.st_size, s.st_mtime_ns) for s in stat]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder) / "crops" / f"{Path(task.rgb).stem}_{digest}.npz"


def _keep_crops(path, pair, known):
    arrays = {"onset": pair.onset, "apex": pair.apex, "depth_onset": pair.depth_onset,
              "depth_apex": pair.depth_apex, "known": np.array(json.dumps(known))}
    file = io.BytesIO()
    np.savez_compressed(file, **{k: v for k, v in arrays.items() if v is not None})
    write_bytes(path, file.getvalue())


def make_images(task, settings, pair, box):
    """(RGB difference uint8 `[S, S, 3]`, depth difference `[S, S]` or None) and what was measured:
    amplitude, the rms change in grey levels over the face; median, what was taken off; fractions
    of the face where depth was clipped, and where it was invalid."""
    size, level = settings.size, NO_CHANGE[settings.difference]
    measured = {"amplitude": 0.0, "clipped": 0.0, "invalid": 0.0}
    has_depth = bool(task.depth)
    if task.blank or pair is None:
        flat = np.full((size, size, 3), level, np.uint8)
        return (flat, flat[..., 0] if has_depth else None), measured
    face = registration.face_mask(Box(**box), size, settings.margin)
    change = registration.rgb_change(pair.onset, pair.apex, face)
    rms = np.sqrt(np.square(change[face].astype(np.float64)).mean())
    measured["amplitude"] = round(float(rms), 4)
    depth = None
    if has_depth:
        moved, valid = registration.depth_change(pair.depth_onset, pair.depth_apex, face)
        depth = registration.encode_depth(moved, settings.difference, settings.depth_range)
        measured["invalid"] = round(float(1 - valid[face].mean()), 4)
        clipped = abs(moved[face]) > settings.depth_range
        measured["clipped"] = round(float(clipped.mean()), 4)
    return (registration.encode(change, settings.difference), depth), measured
