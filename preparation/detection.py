"""Faces in frames and photographs, by the optional detector MTCNN; the boxes of a boxes.csv."""
import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from preparation import registration
from preparation.frames import subject_number
from preparation.registration import Box
from util import BadInput, ensure, read_table

BOX_COLUMNS = ("database", "subject", "video", "onset", "x", "y", "width", "height", "roll",
               "frame", "frame_width", "frame_height")
LARGEST_SIDE = 2000  # pixels: larger photographs are searched scaled down to it
SMALLEST_FACE = 20  # pixels: below, what is found is noise
_LOCK = threading.Lock()  # the detector holds the size that is searched for


class Face(NamedTuple):
    """A face in a photograph. box: without roll, within the photograph; points: float32 `[5, 2]`,
    x and y of the left and right eye of the picture, the nose, the left and right corner of the
    mouth; score: 0 to 1. Pixels from the upper left corner of the photograph."""
    box: Box
    points: np.ndarray
    score: float

    @property
    def roll(self) -> float:
        """Degrees by which the right eye of the picture lies below the left one."""
        x, y = self.points[1] - self.points[0]
        return float(np.degrees(np.arctan2(y, x)))


def require(flag: str = "--crop mtcnn",
            instead: str = ", or give --crop box X Y W H, boxes FILE.csv or none") -> None:
    """Raises BadInput where the detector is missing; flag: what needs it; instead: what else
    helps."""
    try:
        import facenet_pytorch  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{flag}: the face detector is not installed ({error}); make faces "
                       f"installs it{instead}") from None


# ---------------------------------------------------------------- the detector

@functools.lru_cache(maxsize=2)
def _detector(device):
    from facenet_pytorch import MTCNN
    with torch.random.fork_rng(devices=[]):  # weights are drawn before the trained ones are read
        return MTCNN(select_largest=True, keep_all=True, device=device)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One search at a time, by one thread: the pictures are what runs in parallel, and sums come
    out alike wherever they are made."""
    with _LOCK:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _search(frame, smallest, device="cpu"):
    """(boxes `[N, 4]` as left, top, right, bottom, scores `[N]`, points `[N, 5, 2]`), all float32,
    of the faces of a frame uint8 `[H, W, 3]` from about `smallest` pixels on, largest first."""
    # the package raises where its pyramid has no level
    if min(frame.shape[:2]) * (12 / smallest) >= 12:
        with _alone():
            detector = _detector(device)
            detector.min_face_size = smallest
            boxes, scores, points = detector.detect(frame, landmarks=True)
        if boxes is not None and len(boxes):
            return tuple(np.asarray(found, np.float32) for found in (boxes, scores, points))
    return tuple(np.zeros((0, *shape), np.float32) for shape in ((4,), (), (5, 2)))


def find_face(frame: np.ndarray, roll: bool) -> Box | None:
    """Box of the largest face of a frame uint8 `[H, W, 3]`, None where there is none.

    roll: also take the angle of the line through the eyes. The box may go beyond the frame.
    """
    boxes, scores, points = _search(frame, SMALLEST_FACE)
    if not len(boxes):
        return None
    x0, y0, x1, y1 = (float(v) for v in boxes[0])
    face = Face(Box(x0, y0, x1 - x0, y1 - y0), points[0], float(scores[0]))
    return replace(face.box, roll=face.roll) if roll else face.box


# ---------------------------------------------------------------- photographs

def find_faces(photo: np.ndarray, min_face_size: int = 40, threshold: float = 0.9,
               device: str | torch.device = "cpu") -> list[Face]:
    """The faces of an upright photograph uint8 `[H, W, 3]` in RGB, the largest first.

    min_face_size: least length of the longer side of a face's box, pixels of the photograph;
    threshold: least score. A photograph of more than LARGEST_SIDE pixels a side is searched scaled
    down to that, where faces need SMALLEST_FACE pixels. One that is smaller than a face has none.
    Raises ValueError for arrays of another shape or type.
    """
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise ValueError(f"a photograph is uint8 [H, W, 3], not {photo.dtype} {photo.shape}")
    height, width = photo.shape[:2]
    scale, frame = max(1.0, max(height, width) / LARGEST_SIDE), photo
    if scale > 1:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        frame = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BOX))
    faces = []
    for box, score, points in zip(*_search(frame, max(SMALLEST_FACE, min_face_size / scale),
                                           device)):
        x0, y0, x1, y1 = (box * scale).clip(0, (width, height) * 2).tolist()
        box = Box(x0, y0, x1 - x0, y1 - y0)
        if (score >= threshold and max(box.width, box.height) >= min_face_size
                and min(box.width, box.height) > 0):
            faces.append(Face(box, points * np.float32(scale), float(score)))
    return sorted(faces, key=lambda f: (-f.box.width * f.box.height, f.box.y, f.box.x))


def crop_of(face: Face, size: int = 224, margin: float = registration.MARGIN,
            align: bool = True) -> np.ndarray:
    """Matrix float64 `[2, 3]` of a face's crop as registration.crop_matrix gives it: its longer
    side fills 1/(1 + margin) of `size` pixels; align: turned so that the eyes are level."""
    box = replace(face.box, roll=face.roll) if align else face.box
    return registration.crop_matrix(box, size, margin)


def cut_face(photo: np.ndarray, face: Face, size: int = 224, margin: float = registration.MARGIN,
             align: bool = True) -> np.ndarray:
    """Crop uint8 `[size, size, 3]` of a face of a photograph uint8 `[H, W, 3]`, see `crop_of`; the
    border of the photograph is repeated where the crop goes beyond it. Needs OpenCV."""
    return registration.cut(photo, crop_of(face, size, margin, align), size)


def points_in_crop(face: Face, size: int = 224, margin: float = registration.MARGIN,
                   align: bool = True) -> np.ndarray:
    """A face's points in its crop, float32 `[5, 2]`: pixels from the crop's upper left corner."""
    matrix = crop_of(face, size, margin, align)
    # between the middles of pixels, where the matrix maps, and their corners lies half a pixel
    places = np.linalg.solve(matrix[:, :2], (face.points - 0.5 - matrix[:, 2]).T).T + 0.5
    return places.astype(np.float32)


# ---------------------------------------------------------------- boxes

def central_box(width: int, height: int, margin: float) -> Box:
    """Box whose crop is the largest central square of a frame."""
    side = min(width, height) / (1 + margin)
    return Box((width - side) / 2, (height - side) / 2, side, side)


def read_boxes(path: str, roll: bool) -> dict:
    """boxes.csv as dict (database, subject, video, onset) → Box; raises BadInput.

    Video and onset may be empty or without column: the box then holds for all of that subject or
    video. The columns subject, x, y, width, height must be there, and roll where it is asked for
    (empty: 0).
    """
    rows, _ = read_table(path, ("subject", "x", "y", "width", "height", *["roll"] * roll),
                         fix="--crop boxes FILE.csv names a table with the columns "
                             f"{','.join(BOX_COLUMNS[:9])}{' (roll: for --roll)' * roll}")
    boxes = {}
    for where, row in rows:
        try:
            values = [float(row[name]) for name in ("x", "y", "width", "height")]
            angle = float(row.get("roll") or 0) if roll else 0.0
            ensure(min(values[2:]) > 0 and np.isfinite([*values, angle]).all())
            key = _box_key(row.get("database"), row["subject"], row.get("video"),
                           row.get("onset"))
        except ValueError:
            raise BadInput(f"{where}: needs a subject and the numbers x, y, width and height in "
                           f"pixels, the latter two above 0") from None
        if boxes.setdefault(key, Box(*values, angle)) != Box(*values, angle):
            raise BadInput(f"{where}: another box for the same clip, video or subject; keep one")
    if not boxes:
        raise BadInput(f"{path}: no box in it; one row per clip, video or subject")
    return boxes


def _box_key(database, subject, video, onset):
    onset = (onset or "").strip()
    number = re.fullmatch(r"(\d+)(\.0*)?", onset)  # tables with empty cells make 2.0 of 2
    return ((database or "").strip(), subject_number(subject.strip()),
            (video or "").strip().lower(), str(int(number[1])) if number else onset)


def box_for(boxes: dict, *spellings: tuple) -> Box | None:
    """The most specific box for one clip, or None; spellings: of its (database, subject, video,
    onset), the first goes first. A box without a database is one of all."""
    keys = [_box_key(*spelling) for spelling in spellings]
    keys += [("", *key[1:]) for key in keys]
    return next((boxes[k] for known in (4, 3, 2) for key in keys
                 if (k := (*key[:known], *[""] * (4 - known))) in boxes), None)
