"""One clip from its frames to its two difference images; the records that let a run go on.

A finished clip leaves a record in <data folder>/.prepare: what it was made of and with, the
digests of its images, and what was measured. A later run keeps it if all of that still holds.
"""
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from images import encoding, flow
from images.decoding import PIXEL_LIMIT, eight_bits
from preparation import detection, registration
from preparation.registration import Box, Crops, Framing
from util import RunFailed, handled, leave_signals, sha256_of, write_bytes, write_json

RECORDS = ".prepare"
LOOK_ON = 5  # frames after the onset on which a face is looked for
CROPS = ("onset", "apex", "depth_onset", "depth_apex")  # arrays of kept crops
# what a file of arrays raises that is missing, empty, cut short or spoilt
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
VERSION = 4  # of the computation: another one makes all records void


@dataclass(frozen=True)
class Settings(Framing):
    """What the images depend on besides the frames. range and scale: mm; crops: whether the aligned
    crops are kept beside the images."""
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


def process(task: Task, settings: Settings, folder: str | Path) -> dict:
    """Writes the images of one clip below `folder` and its record, unless they are there already.

    Returns the record, a dict: digests, box, what was measured; or {"dropped": reason}.
    """
    stamp, path = fingerprint(task, asdict(settings)), record_path(folder, task)
    record = _finished(path, stamp, folder)
    if record:
        return record
    try:
        crops, record = make_crops(task, settings, folder)
    except Unusable as error:
        if not task.blank:
            return {"dropped": str(error)}
        crops, record = make_crops(replace(task, frames=()), settings, folder)
    images, measured = make_images(task, settings, crops, record["box"])
    record |= {"stamp": stamp, "key": task.key, **measured, "files": {}}
    for name, image in zip((task.rgb, task.depth), images):
        if image is not None:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG", compress_level=4)
            _write(Path(folder) / name, file.getvalue())
            record["files"][name] = hashlib.sha256(file.getvalue()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return record


def is_current(task: Task, settings: Settings, folder: str | Path) -> bool:
    """Whether what is kept of a task is of this task, these frames and settings: nothing, too."""
    try:
        record = json.loads(record_path(folder, task).read_text(encoding="utf-8"))
        return record["stamp"] == fingerprint(task, asdict(settings))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fingerprint(task: Task, settings: dict | list) -> str:
    """Digest of what is made of a task under these settings."""
    stat = [os.stat(name) for name in (*task.frames, *task.more)]
    content = [VERSION, flow.cv2 and flow.cv2.__version__, settings, asdict(task),
               [(s.st_size, s.st_mtime_ns) for s in stat]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def record_path(folder: str | Path, task: Task) -> Path:
    """Where the record of a task is kept."""
    return Path(folder) / RECORDS / f"{hashlib.sha256(task.rgb.encode()).hexdigest()[:24]}.json"


def _finished(path, stamp, folder):
    """The record of a clip, if it has this stamp and the images are there as they were written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        same = record and record["stamp"] == stamp and all(
            sha256_of(Path(folder) / name) == digest
            for name, digest in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if same else None


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


# ---------------------------------------------------------------- frames

def read_frame(path: str) -> np.ndarray:
    """uint8 `[H, W, 3]`; raises Unusable."""
    try:
        return np.asarray(eight_bits(_open(path)).convert("RGB"))
    except ValueError as error:
        raise Unusable(f"{path}: {error}") from None


def read_depth(path: str, scale: float) -> np.ndarray:
    """Depth in mm float32 `[H, W]`, 0 where nothing was measured; raises Unusable."""
    image = _open(path)
    plain = {"P": "RGB", "LA": "L", "1": "L"}.get(image.mode)  # a palette may hold colours
    pixels = np.asarray(image.convert(plain) if plain else image)
    if pixels.ndim == 3:
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise Unusable(f"{path}: a colour image, not a depth frame")
        pixels = pixels[..., 0]
    return pixels.astype(np.float32) * np.float32(scale)


def _open(path):
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise Unusable(f"{path}: {image.width}x{image.height} pixels")
            image.load()
            return image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unusable(f"{path}: not a readable image") from None


def find_box(task: Task, settings: Framing, onset: np.ndarray) -> tuple:
    """(Box on the onset frame, file on which it was found); raises Unusable."""
    height, width = onset.shape[:2]
    if task.box:
        if not task.box.lies_in(width, height):
            raise Unusable(f"the box is not within the frame of {width}x{height} pixels")
        return task.box, task.frames[0]
    if settings.crop == "none":
        return detection.central_box(width, height, settings.margin), task.frames[0]
    for name in (task.frames[0], *task.more):
        try:
            frame = onset if name == task.frames[0] else read_frame(name)
        except Unusable:  # the clip takes no pixel of it
            continue
        box = detection.find_face(frame, settings.roll)
        if box:
            return box, name
    raise Unusable(f"no face found on the onset frame nor on the next {len(task.more)}")


# ---------------------------------------------------------------- one clip

def make_crops(task: Task, settings: Settings, folder: str | Path) -> tuple:
    """(Crops or None for a blank clip, its record so far). Crops that were kept are read again;
    raises Unusable."""
    record = {"box": None, "frame": None, "frame_size": None, "shift": 0.0, "residual": 0.0,
              "registered": 1}
    if task.blank and not task.frames:
        return None, record
    kept = _crops_path(task, settings, folder)
    try:
        with np.load(kept) as content:
            known = json.loads(str(content["known"]))
            residual = float("nan") if known["residual"] is None else known["residual"]
            return Crops(*map(content.get, CROPS), known["shift"], residual,
                         known["registered"]), known
    except UNREADABLE:
        pass
    onset = read_frame(task.frames[0])
    box, name = find_box(task, settings, onset)
    frames = onset, onset if task.blank else read_frame(task.frames[1])
    depths = [read_depth(path, settings.depth_scale) for path in task.frames[2:]] or [None, None]
    crops = registration.align(frames, depths, box, settings.size, settings.margin,
                               "none" if task.blank else settings.register)
    record.update(box=asdict(box), frame=Path(name).name, frame_size=onset.shape[1::-1],
                  shift=round(crops.shift, 4), registered=crops.registered,
                  residual=None if np.isnan(crops.residual) else round(crops.residual, 4))
    if settings.crops:
        arrays = {name: getattr(crops, name) for name in CROPS if getattr(crops, name) is not None}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays, known=np.array(json.dumps(record)))
        _write(kept, file.getvalue())
    return crops, record


def _crops_path(task, settings, folder):
    """Kept crops carry a digest of what they follow from in their name."""
    digest = fingerprint(task, [getattr(settings, name) for name in (
        "crop", "margin", "size", "roll", "register", "depth_scale")])
    return Path(folder) / "crops" / f"{Path(task.rgb).stem}_{digest[:12]}.npz"


def make_images(task: Task, settings: Settings, crops: Crops | None, box: dict | None) -> tuple:
    """(RGB difference uint8 `[S, S, 3]`, depth difference `[S, S]` or None) and what was measured:
    amplitude, the rms change in grey levels over the face; fractions of the face where depth was
    clipped, and where it was invalid."""
    size = settings.size
    measured = {"amplitude": 0.0, "clipped": 0.0, "invalid": 0.0}
    if task.blank:
        flat = encoding.flat((size, size, 3), settings.difference)
        return (flat, flat[..., 0] if task.depth else None), measured
    face = registration.face_mask(Box(**box), size, settings.margin)
    change = registration.rgb_change(crops.onset, crops.apex, face)
    rms = np.sqrt(np.square(change[face].astype(np.float64)).mean())
    measured["amplitude"] = round(float(rms), 4)
    depth = None
    if task.depth:
        moved, valid = registration.depth_change(crops.depth_onset, crops.depth_apex, face)
        depth = encoding.encode_depth(moved, settings.difference, settings.depth_range)
        measured["invalid"] = round(float(1 - valid[face].mean()), 4)
        clipped = abs(moved[face]) > settings.depth_range
        measured["clipped"] = round(float(clipped.mean()), 4)
    return (encoding.encode(change, settings.difference), depth), measured


# ---------------------------------------------------------------- all clips

def run_all(process: Callable, tasks: list, settings: object, folder: Path | str,
            num_workers: int) -> list:
    """Records `process(task, settings, folder)` of all tasks, in their order, by several processes,
    with a progress bar."""
    return list(run_each(process, tasks, settings, folder, num_workers, ("cutting", "clip")))


def run_each(process: Callable, tasks: list, settings: object, folder: Path | str,
             num_workers: int, words: tuple, executor: type = ProcessPoolExecutor) -> Iterator:
    """As `run_all`, one record after another. words: what the bar says, and its unit."""
    jobs = tasks, repeat(settings), repeat(str(folder))
    bar = {"desc": words[0], "total": len(tasks), "unit": words[1], "disable": None}
    if num_workers < 2 or len(tasks) < 2:
        yield from tqdm(map(process, *jobs), **bar)
        return
    pool = executor(min(num_workers, len(tasks)),
                    initializer=leave_signals if executor is ProcessPoolExecutor else None)
    try:
        yield from tqdm(pool.map(process, *jobs, chunksize=2), **bar)
    except BrokenExecutor:
        raise RunFailed(f"a worker was killed, for memory perhaps; run again, with fewer "
                        f"--num_workers: finished {words[1]}s are kept") from None
    finally:
        with handled(lambda *_: None):  # a second signal would leave workers behind that wait
            pool.shutdown(cancel_futures=True)
