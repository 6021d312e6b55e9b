"""Onset and apex frame → aligned crops → their difference. Arrays and plain numbers only.

Coordinates are pixels, x to the right and y down, the centre of the first pixel at (0, 0).
Matrices are float64 `[2, 3]` and map a point of the crop to the frame it is cut from.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from util import BadInput

try:
    import cv2
    cv2.setNumThreads(1)  # the clips are what runs in parallel
except ImportError:
    cv2 = None

MARGIN = 256 / 224 - 1  # the training crops keep the central 224 of 256 pixels
COARSE = 64  # pixels of the side where a motion is looked for first; smaller ones hold too little
# pixels of the crops that are registered, whatever the set's: in smaller ones the half pixel that a
# head moves is lost
LEAST_SIDE = 224
MAX_SHIFT = 0.15  # of the crop's side: what lies beyond is a failed registration
LEAST_CORRELATION = 0.3  # of what a motion brings together: below it something else was found
BY_WHOLE_FACE = "registered by the whole face: by forehead and nose bridge it did not converge"
# Parts that expressions move least, as shares of the face box: (left, top, right, bottom).
STABLE = (0.22, 0.0, 0.78, 0.2), (0.4, 0.3, 0.6, 0.58)  # forehead; nose bridge


@dataclass(frozen=True)
class Box:
    """The face on the onset frame, pixels; roll: degrees by which the right eye of the picture
    lies below the left one."""
    x: float
    y: float
    width: float
    height: float
    roll: float = 0.0

    def lies_in(self, width: int, height: int) -> bool:
        """Whether its middle is in a frame of this size, and it is no larger than the frame
        allows: a face may be cut off by the border."""
        x, y = self.x + self.width / 2, self.y + self.height / 2
        return (0 <= x <= width and 0 <= y <= height
                and max(self.width, self.height) <= 2 * max(width, height))


@dataclass(frozen=True)
class Framing:
    """How frames become crops. crop: what --crop says first; margin: a share; size: pixels; roll:
    whether the eyes are turned level; register: the motion that is taken off."""
    crop: str = "none"
    margin: float = MARGIN
    size: int = 256
    roll: bool = False
    register: str = "translation"


@dataclass(frozen=True)
class Crops:
    """One aligned pair: onset, apex uint8 `[S, S, 3]`; depth in mm float32 `[S, S]`, 0 invalid, or
    None; shift: motion of the head that was removed, residual: what is left, pixels of the crop
    (nan where nothing could be followed); registered: 0 where the registration did not converge, 1
    by forehead and nose bridge or where none was asked for, 2 by the whole face alone."""
    onset: np.ndarray
    apex: np.ndarray
    depth_onset: np.ndarray | None
    depth_apex: np.ndarray | None
    shift: float
    residual: float
    registered: int


def require() -> None:
    """Raises BadInput where OpenCV is missing."""
    if cv2 is None:
        raise BadInput("opencv-python-headless: not installed, it registers and warps the frames; "
                       "pip install -r requirements-prepare.txt")


# ---------------------------------------------------------------- crop

def crop_matrix(box: Box, size: int, margin: float = MARGIN,
                scale: tuple = (1.0, 1.0)) -> np.ndarray:
    """Matrix `[2, 3]` of the square crop around the face: its longer side fills 1/(1 + margin).

    size: side of the crop; scale: width and height of the frame to cut from, relative to the
    frame that the box was found on.
    """
    step = max(box.width, box.height) * (1 + margin) / size
    angle = np.radians(box.roll)
    turn = step * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([box.x + box.width / 2, box.y + box.height / 2])  # edges at whole numbers
    offset = centre - turn @ np.full(2, size / 2)
    # from edges at whole numbers to pixel centres at whole numbers, on both sides
    scale = np.asarray(scale)
    offset = (offset + turn @ np.full(2, 0.5)) * scale - 0.5
    return np.concatenate([turn * scale[:, None], offset[:, None]], 1)


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The matrix that applies `inner` first, then `outer`."""
    return np.concatenate([outer[:, :2] @ inner[:, :2],
                           outer[:, :2] @ inner[:, 2:] + outer[:, 2:]], 1)


def cut(frame: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Crop uint8 `[S, S, 3]` of a frame uint8 `[H, W, 3]`: smoothed to the crop's resolution,
    bicubic, the border repeated."""
    part, matrix = _region(frame, matrix, size)
    part = part.astype(np.float32)
    step = np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    if step > 1:
        part = cv2.GaussianBlur(part, (0, 0), 0.5 * np.sqrt(step ** 2 - 1))
    crop = cv2.warpAffine(part, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE,
                          flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return crop.round().clip(0, 255).astype(np.uint8)


def cut_depth(depth: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Crop float32 `[S, S]` of a depth frame `[H, W]` (mm, 0 invalid), bilinear; a pixel that
    would draw on an invalid one, or on what lies outside, is invalid."""
    part, matrix = _region(depth, matrix, size)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    valid = cv2.warpAffine((part > 0).astype(np.float32), matrix, (size, size), flags=flags)
    crop = cv2.warpAffine(part.astype(np.float32), matrix, (size, size), flags=flags)
    return np.where(valid > 0.999, crop, 0).astype(np.float32)


def _region(frame, matrix, size):
    """The part of the frame a crop draws on, with a border, and the matrix into it."""
    corners = matrix @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]])
    pad = 8 + 2 * np.sqrt(abs(np.linalg.det(matrix[:, :2])))
    limit = np.array(frame.shape[1::-1])
    low = np.floor(corners.min(1) - pad).clip(0, limit - 2).astype(int)
    high = np.maximum(np.ceil(corners.max(1) + pad).clip(0, limit).astype(int), low + 2)
    inner = matrix.copy()
    inner[:, 2] -= low
    return frame[low[1]:high[1], low[0]:high[0]], inner


def _in_crop(box, size, margin):
    """(left, top, width, height) of the face box in its crop."""
    per_pixel = size / (max(box.width, box.height) * (1 + margin))
    width, height = box.width * per_pixel, box.height * per_pixel
    return (size - width) / 2, (size - height) / 2, width, height


def face_mask(box: Box, size: int, margin: float = MARGIN) -> np.ndarray:
    """bool `[S, S]`: the ellipse in the face box."""
    left, top, width, height = _in_crop(box, size, margin)
    y, x = np.mgrid[:size, :size] + 0.5
    return (((x - left) / width - 0.5) ** 2 + ((y - top) / height - 0.5) ** 2) < 0.25


def stable_mask(box: Box, size: int, margin: float = MARGIN) -> np.ndarray:
    """bool `[S, S]`: forehead and nose bridge."""
    left, top, width, height = _in_crop(box, size, margin)
    mask = np.zeros((size, size), bool)
    for x0, y0, x1, y1 in STABLE:
        mask[round(top + y0 * height):round(top + y1 * height),
             round(left + x0 * width):round(left + x1 * width)] = True
    return mask


# ---------------------------------------------------------------- registration

def register(onset: np.ndarray, apex: np.ndarray, masks: Sequence[np.ndarray],
             motion: str = "translation", pixel: tuple = (1, 1)) -> tuple:
    """Motion from the onset crop to the apex crop, both uint8 `[S, S, 3]`.

    masks: bool `[S, S]` each, of the onset crop, tried in turn; motion: translation or similarity;
    pixel: width and height of a crop's pixels in those of the frame, in which a head turns. Returns
    (matrix `[2, 3]` from onset to apex crop, number of the mask by which it was found, from 1); the
    identity and 0 where it did not converge, or on something else. The enhanced correlation
    coefficient is blind to a change of gain and offset.
    """
    first, second = (_luminance(image) for image in (onset, apex))
    shrink = max(1, len(onset) // COARSE)
    for number, mask in enumerate(masks, 1):
        mask = mask.astype(np.uint8)
        try:
            small = [cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink,
                                interpolation=cv2.INTER_AREA) for image in (first, second)]
            coarse = cv2.resize(mask, small[0].shape[::-1], interpolation=cv2.INTER_NEAREST)
            _, warp = _ecc(*small, _best_shift(*small, coarse), coarse, cv2.MOTION_TRANSLATION,
                           3)
            warp[:, 2] *= shrink
            alike, warp = _ecc(first, second, warp, mask, cv2.MOTION_TRANSLATION, 5)
            if motion == "similarity":
                alike, warp = _ecc(first, second, warp, mask, cv2.MOTION_AFFINE, 5)
                warp = _nearest_similarity(warp, mask, pixel)
        except cv2.error:
            continue
        if moved(warp, len(onset)) < MAX_SHIFT * len(onset) and alike >= LEAST_CORRELATION:
            return warp.astype(np.float64), number
    return np.eye(2, 3), 0


def resized(warp: np.ndarray, side: int, size: int) -> np.ndarray:
    """A motion in crops of `side` pixels as it is in crops of `size`, `[2, 3]`."""
    linear, share = warp[:, :2], size / side  # places are those of pixels' middles
    moved = share * warp[:, 2] + (share - 1) * (np.eye(2) - linear) @ [0.5, 0.5]
    return np.concatenate([linear, moved[:, None]], 1)


def _luminance(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


def _best_shift(first, second, mask):
    """The shift in whole pixels, float32 `[2, 3]`, by which the masked part of `first` looks most
    like `second`: from far off, steps that climb would stop at something else."""
    far = math.ceil(MAX_SHIFT * len(first))
    x, y, width, height = cv2.boundingRect(mask)
    around = cv2.copyMakeBorder(second, far, far, far, far, cv2.BORDER_REPLICATE)
    part = np.s_[y:y + height, x:x + width]
    alike = cv2.matchTemplate(
        around[y:y + height + 2 * far, x:x + width + 2 * far], first[part], cv2.TM_CCOEFF_NORMED,
        mask=mask[part].astype(np.float32))
    alike[~(np.abs(alike) < 1.01)] = -1  # flat parts: what is no number, or no correlation
    down, right = np.unravel_index(alike.argmax(), alike.shape)
    return np.array([[1, 0, right - far], [0, 1, down - far]], np.float32)


def _ecc(first, second, warp, mask, motion, blur):
    """(correlation, motion) found from the motion `warp` on; mask: of `first`, where OpenCV takes
    one of `second`."""
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-6)
    carried = cv2.warpAffine(mask, warp, mask.shape[::-1], flags=cv2.INTER_NEAREST)
    return cv2.findTransformECC(first, second, warp, motion, criteria, carried, blur)


def _nearest_similarity(warp, mask, pixel):
    """The similarity, of pixels that are square, closest to an affine matrix of pixels that may not
    be, which moves the mask's centre alike."""
    squeeze = np.diag(pixel).astype(warp.dtype)
    (p, q), (r, s) = squeeze @ warp[:, :2] @ np.linalg.inv(squeeze)
    a, b = (p + s) / 2, (r - q) / 2
    turn = np.linalg.inv(squeeze) @ np.array([[a, -b], [b, a]]) @ squeeze
    centre = np.argwhere(mask).mean(0)[::-1]
    offset = warp[:, :2] @ centre + warp[:, 2] - turn @ centre
    return np.concatenate([turn, offset[:, None]], 1)


def moved(warp: np.ndarray, size: int) -> float:
    """How far the motion carries the corners of a crop's central half, on average; pixels."""
    corners = np.array([[.25, .75, .25, .75], [.25, .25, .75, .75]]) * size
    shift = warp[:, :2] @ corners + warp[:, 2:] - corners
    return float(np.linalg.norm(shift, axis=0).mean())


def residual_motion(onset: np.ndarray, apex: np.ndarray, mask: np.ndarray) -> float:
    """Median displacement in pixels of points that can be followed within `mask`; nan where fewer
    than five can. Both crops uint8 `[S, S, 3]`."""
    first, second = (cv2.GaussianBlur(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), (0, 0), 1)
                     for i in (onset, apex))
    points = cv2.goodFeaturesToTrack(first, 80, 0.02, 4, mask=mask.astype(np.uint8))
    if points is None or len(points) < 5:
        return float("nan")
    places, status, _ = cv2.calcOpticalFlowPyrLK(first, second, points, None, winSize=(15, 15),
                                                 maxLevel=2)
    good = status.ravel() == 1
    if good.sum() < 5:
        return float("nan")
    shift = (places - points).reshape(-1, 2)[good]
    return float(np.median(np.linalg.norm(shift, axis=1)))


def align(frames: Sequence[np.ndarray], depths: Sequence, box: Box, size: int = 256,
          margin: float = MARGIN, motion: str = "translation") -> Crops:
    """Cuts and aligns one pair of frames.

    frames: onset and apex uint8 `[H, W, 3]`, the box found on the onset frame; depths: the same
    moments in mm `[H', W']`, 0 invalid, or (None, None); motion: translation, similarity or none.
    """
    require()
    height, width = frames[0].shape[:2]

    def matrix_for(image, side=size):
        return crop_matrix(box, side, margin, (image.shape[1] / width, image.shape[0] / height))
    onset, apex = (cut(frame, matrix_for(frame), size) for frame in frames)
    warp, registered = np.eye(2, 3), 1
    if motion != "none":
        side = max(size, LEAST_SIDE)
        pair = (onset, apex) if side == size else \
            [cut(frame, matrix_for(frame, side), side) for frame in frames]
        masks = stable_mask(box, side, margin), face_mask(box, side, margin)
        warp, registered = register(*pair, masks, motion)
        warp = resized(warp, side, size)
        apex = cut(frames[1], compose(matrix_for(frames[1]), warp), size)
    depth = [None, None]
    if depths[0] is not None:
        depth = [cut_depth(image, compose(matrix_for(image), by), size)
                 for image, by in zip(depths, (np.eye(2, 3), warp))]
    left = residual_motion(onset, apex, stable_mask(box, size, margin))
    return Crops(onset, apex, *depth, moved(warp, size), left, registered)


# ---------------------------------------------------------------- difference

def rgb_change(onset: np.ndarray, apex: np.ndarray, face: np.ndarray) -> np.ndarray:
    """apex − onset in grey levels, int16 `[S, S, 3]`, minus its median per channel over the face
    (bool `[S, S]`): flicker and exposure."""
    change = apex.astype(np.int16) - onset
    return change - np.median(change[face], axis=0).round().astype(np.int16)


def depth_change(onset: np.ndarray, apex: np.ndarray, face: np.ndarray) -> tuple:
    """apex − onset in mm, float32 `[S, S]`, minus its median over the face: motion of the head;
    and where both frames are valid, bool `[S, S]`. 0 where they are not."""
    valid = (onset > 0) & (apex > 0)
    inside = valid & face
    centre = np.median((apex - onset)[inside]) if inside.any() else 0
    return np.where(valid, apex - onset - centre, 0).astype(np.float32), valid
