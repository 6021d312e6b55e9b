"""Clips of five frames with the optical flow between them, as prepare.py wrote them; action units.

A step is a field float16 `[2, H, W]` from one frame to another; which steps make a clip, plain or
with its onset and offset jittered, says an index of variants.
"""
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from images import flow
from util import BadInput, ensure, read_table

ARRAYS = {"frames": 5, "flow": 5, "jitter": 4, "index": 3}  # files of a set: dimensions
AGAIN = "run prepare.py casme2 again"
SHARE = 0.15 / 4  # of the frames from onset, or offset, to the third frame: the widest jitter
UNIT = re.compile(r"([LRTB]?)0*([1-9][0-9]?)[A-E]?", re.IGNORECASE)


class Steps:
    """The plain and the jittered steps of all clips as one array `[R, 2, H, W]`, whose rows are
    read when they are asked for."""

    def __init__(self, plain: np.ndarray, jittered: np.ndarray):
        self.plain, self.jittered = plain.reshape(-1, *plain.shape[2:]), jittered

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of rows `[...]` → float16 `[..., 2, H, W]`."""
        flat = np.ravel(rows)
        chosen = np.empty((len(flat), *self.plain.shape[1:]), self.plain.dtype)
        more = flat >= len(self.plain)
        chosen[~more] = self.plain[flat[~more]]
        if more.any():
            chosen[more] = self.jittered[flat[more] - len(self.plain)]
        return chosen.reshape(*np.shape(rows), *chosen.shape[1:])


class Videos(NamedTuple):
    """frames: uint8 `[N, 5, 3, S, S]`; steps: a Steps; index: int32 `[N, V, 4]`, rows of `steps`
    that make each variant of a clip, the plain one first; info: what flow.json says."""
    frames: np.ndarray
    steps: Steps
    index: np.ndarray
    info: dict

    @property
    def digest(self) -> str:
        """SHA-256 of what the set holds, of the digests that its flow.json lists."""
        return hashlib.sha256(json.dumps([self.info["flow"], self.info["digests"]]).encode()
                              ).hexdigest()


def read_videos(folder: str | Path, size: int | None = None) -> Videos:
    """The arrays of a prepared folder, for frames of `size` pixels [as they are stored]; raises
    BadInput.

    They are mapped as they are, or reduced once in memory where another size is wanted.
    """
    folder = Path(folder)
    info = _read_info(folder)
    arrays, stored = _read_arrays(folder, info), info["size"]
    size = size or stored
    if size > stored:
        raise BadInput(f"--size {size}: {folder} holds frames of {stored} pixels; take {stored} or "
                       f"less, or prepare larger ones")
    frames, plain, jittered = arrays["frames"], arrays["flow"], arrays["jitter"]
    if size < stored:
        frames = _reduced(frames, size).round().astype(np.uint8)
        plain, jittered = (_reduced(steps, size, size / stored).astype(np.float16)
                           for steps in (plain, jittered))
    return Videos(frames, Steps(plain, jittered), np.asarray(arrays["index"]), info)


def _read_info(folder):
    """What flow.json says. Flow of another OpenCV than the one that is installed is refused: two
    versions in one comparison would be two data sets."""
    path = folder / "flow.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        ensure({"classes", "reference"} <= info.keys() and type(info["size"]) is int
               and isinstance(info["digests"], dict))
        made_by = str(info["flow"]["opencv"])
    except FileNotFoundError:
        raise BadInput(f"{folder}: no flow.json; name a folder that prepare.py casme2 "
                       f"wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{path}: cannot be read; {AGAIN}") from None
    if flow.cv2 and flow.cv2.__version__ != made_by:
        raise BadInput(f"{path}: its flow is OpenCV {made_by}'s, installed is "
                       f"{flow.cv2.__version__}; {AGAIN}, or install that version")
    return info


def _read_arrays(folder, info):
    """name → array of a set, checked against each other and flow.json."""
    arrays = {}
    for name, dimensions in ARRAYS.items():
        path = folder / f"{name}.npy"
        try:
            array = arrays[name] = np.load(path, mmap_mode="r")
            ensure(array.ndim == dimensions
                   and path.stat().st_size == array.offset + array.nbytes)
        except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile):
            raise BadInput(f"{path}: missing or not whole; {AGAIN}") from None
    frames, index = arrays["frames"], np.asarray(arrays["index"])
    count, size = len(frames), info["size"]
    wanted = {"frames": ((count, 5, 3, size, size), np.uint8),
              "flow": ((count, 4, 2, size, size), np.float16),
              "jitter": ((len(arrays["jitter"]), 2, size, size), np.float16),
              "index": ((count, index.shape[1], 4), np.int32)}
    for name, (shape, kind) in wanted.items():
        if arrays[name].shape != shape or arrays[name].dtype != kind:
            raise BadInput(f"{folder / name}.npy: {arrays[name].dtype} {arrays[name].shape}, not "
                           f"the {np.dtype(kind)} {shape} of {count} clips of {size} pixels in "
                           f"flow.json; {AGAIN}")
    rows = 4 * count + len(arrays["jitter"])
    digest = hashlib.sha256(np.ascontiguousarray(index).data).hexdigest()
    if not index.size or index.min() < 0 or index.max() >= rows \
            or digest != info["digests"].get("index"):
        raise BadInput(f"{folder / 'index.npy'}: does not belong to the {rows} steps of flow.npy "
                       f"and jitter.npy; {AGAIN}")
    return arrays


def _reduced(array, size, scale=1.0):
    """The mean over areas of `[N, ..., S, S]`, times a scale: `[N, ..., size, size]`."""
    out = np.empty((*array.shape[:-2], size, size), np.float32)
    for i, one in enumerate(array):
        images = torch.from_numpy(np.array(one, np.float32)).flatten(0, -3)
        out[i] = (scale * F.interpolate(images[None], (size, size), mode="area")[0]).view(
            out.shape[1:]).numpy()
    return out


# ---------------------------------------------------------------- five frames

def five_frames(onset: int, apex: int, offset: int, published: bool = False,
                jitter: tuple = (0, 0)) -> tuple:
    """Numbers of the five frames: onset, middle, apex, middle, offset.

    published: the third is the middle of onset and offset, as in the published code; jitter: by
    how many frames the onset comes later and the offset earlier, the middles being those of the
    jittered frames.
    """
    third = (onset + offset) // 2 if published else apex
    onset, offset = onset + jitter[0], offset - jitter[1]
    return onset, (onset + third) // 2, third, (third + offset) // 2, offset


def jittered(onset: int, apex: int, offset: int, published: bool, most: int,
             reference: str) -> list[tuple]:
    """The five frames of every variant of a clip, the plain one first.

    Onset and offset are jittered by up to SHARE of their distance to the third frame, by `most`
    different numbers of frames each. Where each step starts at the frame before it, both go
    together in every way; where all start at the onset, in as many ways as there are jitters.
    """
    third = five_frames(onset, apex, offset, published)[2]
    early, late = ([0, *sorted({round(step * widest / min(most, widest))
                                for step in range(1, min(most, widest) + 1)})] if widest else [0]
                   for widest in (int(SHARE * (third - onset)), int(SHARE * (offset - third))))
    if reference == "previous":
        pairs = list(product(early, late))
    else:
        ways = max(len(early), len(late))
        pairs = [(early[i % len(early)], late[i % len(late)]) for i in range(ways)]
    return [five_frames(onset, apex, offset, published, pair) for pair in pairs]


# ---------------------------------------------------------------- batches

def draw_boxes(n: int, size: int, rng: torch.Generator,
               original: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(boxes float32 as in flow.crop, mirror bool `[n]`) of published augmentation: of 224 pixels
    15 rows are cut off, anywhere, and up to 7 columns on each side; of the original network the
    frame is moved by up to 15 pixels and turned by up to 3 degrees."""
    unit = size / 224
    if original:
        moved = torch.randint(-15, 16, (n, 2), generator=rng) * unit
        turned = 6 * torch.rand(n, 1, generator=rng) - 3
        boxes = torch.cat([moved, torch.full((n, 2), float(size)), turned], 1)
        return boxes, torch.rand(n, generator=rng) < 0.5
    top = torch.randint(0, 16, (n,), generator=rng)
    left, right = torch.randint(0, 8, (2, n), generator=rng)
    boxes = torch.stack([left, top, 224 - left - right, torch.full((n,), 224 - 15)], 1) * unit
    return boxes, torch.rand(n, generator=rng) < 0.5


def whole(n: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The boxes and mirrors that leave clips as they are."""
    return torch.tensor([[0.0, 0, size, size]]).repeat(n, 1), torch.zeros(n, dtype=torch.bool)


def to_apex(steps: torch.Tensor, reference: str) -> torch.Tensor:
    """Flow from onset to apex `[..., 2, H, W]` of the four steps `[..., 4, 2, H, W]`: the second
    one, or the sum of two where each starts at the frame before it."""
    if reference == "onset":
        return steps[..., 1, :, :, :]
    return steps[..., 0, :, :, :] + steps[..., 1, :, :, :]


def differences(frames: torch.Tensor, reference: str) -> torch.Tensor:
    """RGB differences `[B, 4, 3, H, W]` between five frames `[B, 5, 3, H, W]`, of the previous one
    or of the onset."""
    return frames[:, 1:] - (frames[:, :-1] if reference == "previous" else frames[:, :1])


def motion_of(steps: torch.Tensor, boxes: torch.Tensor, mirror: torch.Tensor, channels: str,
              scale: float | str) -> torch.Tensor:
    """Motion `[B, C, T, H, W]` for the network from flow float16 `[B, T, 2, H, W]`, cropped."""
    field = flow.crop_flow(steps.float(), boxes, mirror, steps.shape[-1])
    return flow.channels(field, channels, scale).transpose(1, 2)


def crop_frames(frames: torch.Tensor, boxes: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Frames uint8 `[B, F, 3, H, W]` in [0, 1], cropped as their flow is: float32, same shape."""
    cut = flow.crop(frames.flatten(1, 2).float() / 255, boxes, mirror, frames.shape[-1])
    return cut.unflatten(1, frames.shape[1:3])


# ---------------------------------------------------------------- action units

def read_units(text: str, sides: bool = False) -> tuple[frozenset, list[str]]:
    """(action units, marks that are none) of a text such as `4+R12`: units are '4', 'R12', or '12'
    where `sides` are not kept apart."""
    units, unknown = set(), []
    for mark in filter(None, (part.strip() for part in re.split(r"[+,/]", text))):
        if match := UNIT.fullmatch(mark):
            units.add((match[1].upper() if sides else "") + match[2])
        else:
            unknown.append(mark)
    return frozenset(units), unknown


def mirrored_units(units: frozenset) -> frozenset:
    """What a clip with these action units shows in the mirror: L12 for R12."""
    other = {"L": "R", "R": "L"}
    return frozenset(other.get(unit[0], unit[0]) + unit[1:] for unit in units)


def unit_names(clips: Iterable[frozenset]) -> list[str]:
    """The units that occur in clips or their mirror images, by number, then side; raises BadInput
    where there is none."""
    clips = list(clips)
    names = set().union(*clips, *map(mirrored_units, clips))
    if not names:
        raise BadInput("clips.csv: no training clip names an action unit, which V6, V6c and "
                       "--au_loss learn; fill its column units, or take V5NR without --au_loss")
    return sorted(names, key=lambda name: (int(re.sub(r"\D", "", name)), name))


def multi_hot(clips: Iterable[frozenset], names: list[str]) -> np.ndarray:
    """float32 `[N, U]`: 1 where a clip shows a unit of `names`; NaN for a clip without any, which
    nobody coded."""
    return np.array([[name in units if units else np.nan for name in names] for units in clips],
                    np.float32)


# ---------------------------------------------------------------- parts of the face

# of 68 landmarks: the eyes with their brows; the jaw from the mouth's corners down
PARTS = {"eyes": (range(17, 27), range(36, 48)), "jaw": (range(3, 14), range(48, 60))}


def read_masks(path: str | Path, keys: list[str], parts: list[str] | None, size: int,
               stored: int) -> np.ndarray | None:
    """uint8 `[N, size, size]`: 0 where a clip's `parts` are, by the landmarks of a CSV file; None
    without parts.

    Its columns: key, x1, y1, …, x68, y68, pixels of frames of `stored` pixels. Raises BadInput.
    """
    if not parts:
        return None
    columns = ["key", *(f"{axis}{i}" for i in range(1, 69) for axis in "xy")]
    rows, _ = read_table(path, columns, fix="--landmarks names a table of landmarks")
    points = {}
    for place, row in rows:
        if row["key"] in points:
            raise BadInput(f"{place}: a second row of {row['key']}; keep one")
        try:
            points[row["key"]] = np.array([float(row[name]) for name in columns[1:]]).reshape(
                68, 2) * size / stored
            ensure(np.isfinite(points[row["key"]]).all())
        except ValueError:
            raise BadInput(f"{place}: a landmark is no number") from None
    missing = [key for key in keys if key not in points]
    if missing:
        raise BadInput(f"{path}: no landmarks of {len(missing)} clips, {missing[0]} the first")
    from scipy.spatial import ConvexHull, QhullError  # a third of a second, which few runs need
    masks = np.empty((len(keys), size, size), np.uint8)
    for mask, key in zip(masks, keys):
        image = Image.new("L", (size, size), 1)
        for part in parts:
            chosen = points[key][[i for span in PARTS[part] for i in span]]
            try:
                hull = chosen[ConvexHull(chosen).vertices]
            except QhullError:
                raise BadInput(f"{path}: the landmarks of {key}'s {part} lie on one line, and "
                               f"surround nothing to be masked") from None
            ImageDraw.Draw(image).polygon([tuple(point) for point in hull], fill=0)
        mask[:] = np.asarray(image)
    return masks
