"""Faces in frames, by the optional detector MTCNN, and the boxes of a boxes.csv."""
import functools
import re

import numpy as np
import torch

from preparation.frames import subject_number
from preparation.registration import Box
from util import BadInput, ensure, read_table

BOX_COLUMNS = ("database", "subject", "video", "onset", "x", "y", "width", "height", "roll",
               "frame", "frame_width", "frame_height")


def require() -> None:
    """Raises BadInput where the detector is missing."""
    try:
        import facenet_pytorch  # noqa: F401
    except ImportError as error:
        raise BadInput(f"--crop mtcnn: the face detector is not installed ({error}); make faces "
                       f"installs it, or give --crop box X Y W H, boxes FILE.csv or none") from None


@functools.lru_cache(maxsize=1)
def _detector():
    from facenet_pytorch import MTCNN
    torch.set_num_threads(1)  # the clips are what runs in parallel
    return MTCNN(select_largest=True, keep_all=False, device="cpu")


def find_face(frame: np.ndarray, roll: bool) -> Box | None:
    """Box of the largest face of a frame uint8 `[H, W, 3]`, None where there is none.

    roll: also take the angle of the line through the eyes.
    """
    boxes, _, landmarks = _detector().detect(frame, landmarks=True)
    if boxes is None or not len(boxes):
        return None
    x0, y0, x1, y1 = (float(v) for v in boxes[0])
    across = landmarks[0][1] - landmarks[0][0]  # from the left eye of the picture to the right
    angle = float(np.degrees(np.arctan2(across[1], across[0]))) if roll else 0.0
    return Box(x0, y0, x1 - x0, y1 - y0, angle)


def central_box(width: int, height: int, margin: float) -> Box:
    """Box whose crop is the largest central square of a frame."""
    side = min(width, height) / (1 + margin)
    return Box((width - side) / 2, (height - side) / 2, side, side)


def read_boxes(path: str, roll: bool) -> dict:
    """boxes.csv as dict (database, subject, video, onset) → Box; raises BadInput.

    Video and onset may be empty or without column: the box then holds for all of that subject or
    video. The columns subject, x, y, width, height must be there; roll is read where asked for.
    """
    rows, _ = read_table(path, ("subject", "x", "y", "width", "height"), fix="--crop boxes "
                         f"FILE.csv names a table with the columns {','.join(BOX_COLUMNS[:9])}")
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
        boxes[key] = Box(*values, angle)
    if not boxes:
        raise BadInput(f"{path}: no box in it; one row per clip, video or subject")
    return boxes


def _box_key(database, subject, video, onset):
    onset = (onset or "").strip()
    return (database or "casme3", subject_number(subject.strip()), (video or "").strip().lower(),
            str(int(onset)) if re.fullmatch(r"\d+", onset) else onset)


def box_for(boxes: dict, *spellings: tuple) -> Box | None:
    """The most specific box for one clip, or None; spellings: of its (database, subject, video,
    onset), the first goes first."""
    keys = [_box_key(*spelling) for spelling in spellings]
    return next((boxes[k] for known in (4, 3, 2) for key in keys
                 if (k := (*key[:known], *[""] * (4 - known))) in boxes), None)
