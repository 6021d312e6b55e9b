"""Regions of a face: the crops of RAN, boxes about landmarks, the map of landmarks.

Coordinates are pixels, x to the right and y down. Landmarks are 68 points in iBUG's order, or five
(eyes, nose, corners of the mouth).
"""
import numpy as np
import torch
from torch import Tensor

# left, top, right, bottom in shares of the sides; the whole image is the last view of all
FIXED = ((.125, .25, .875, 1), (0, 0, .75, .75), (.25, 0, 1, .75), (.05, .05, .95, .95),
         (.1, .1, .9, .9), (.125, .125, .875, .875), (.125, 0, .875, .75), (0, 0, 1, 1))
PAPER = ((0, 0, .75, .75), (.25, 0, 1, .75), (.125, .25, .875, 1), (.05, .05, .95, .95),
         (.075, .075, .925, .925), (0, 0, 1, 1))
N_RANDOM = 6  # five crops and the whole image
N_VIEWS = {"whole": 1, "fixed": len(FIXED), "paper": len(PAPER), "random": N_RANDOM, "landmark": 9}
# points of iBUG's 68 that are boxed: brow and eye of the picture's left and right side, mouth, nose
PARTS = ([*range(17, 22), *range(36, 42)], [*range(22, 27), *range(42, 48)], [*range(48, 68)],
         [*range(27, 36)])
CHIN = ([*range(9)], [*range(9, 17)])
LARGER = 1.3  # a view than the bounding box of its points
# of the map of landmarks: r = 1 is 256 cells of a table, of which a box is 207 wide
RATIO, TABLE, BOXED, FIRST = 3.34, 256, 207, 153


# ---------------------------------------------------------------- crops of RAN

def fixed_boxes(shares: tuple, width: int, height: int) -> np.ndarray:
    """Crops in shares of the sides → int64 `[K, 4]`, left, top, right, bottom, rounded down."""
    return (np.array(shares) * [width, height, width, height] + 1e-9).astype(np.int64)


def random_boxes(n: int, side: int, rng: torch.Generator) -> Tensor:
    """Five random squares of .7 to .95 of the side, and the whole: float32 `[n, 6, 4]`."""
    length = side * (0.7 + 0.25 * torch.rand(n, N_RANDOM - 1, 1, generator=rng))
    first = torch.rand(n, N_RANDOM - 1, 2, generator=rng) * (side - length)
    boxes = torch.cat([first, first + length], -1)
    return torch.cat([boxes, torch.tensor([0., 0, side, side]).expand(n, 1, 4)], 1)


# ---------------------------------------------------------------- landmarks

def bounding(points: np.ndarray) -> np.ndarray:
    """Box x, y, width, height int64 `[4]` of points int `[P, 2]`, their pixels included."""
    low, high = points.min(0), points.max(0)
    return np.concatenate([low, high - low + 1])


def _between(right, left):
    """The box between the middles of two eyes' boxes."""
    start, end = (box[0] + box[2] / 2 for box in (right, left))
    top = min(right[1], left[1])
    return np.array([int(start), top, int(end - start),
                     max(right[1] + right[3], left[1] + left[3]) - top])


def _enlarged(box):
    """A box LARGER about its middle pixel, by whole pixels."""
    middle, half = box[:2] + box[2:] // 2, box[2:] * LARGER / 2
    low, high = np.trunc(middle - half), np.trunc(middle + half)
    return np.concatenate([low, high - low]).astype(np.int64)


def landmark_boxes(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """The nine views of 68 points int `[68, 2]`: int64 `[9, 4]` of x, y, width, height.

    Brow and eye on either side, mouth, nose, chin on either side, both eyes, face, whole image;
    all of them clipped to the image.
    """
    parts = [_enlarged(bounding(points[part])) for part in (*PARTS, *CHIN)]
    boxes = np.stack([*parts, _between(*parts[:2]), bounding(points), [0, 0, width, height]])
    low = boxes[:, :2].clip(0, [width - 1, height - 1])
    high = (boxes[:, :2] + boxes[:, 2:]).clip(low + 1, [width, height])
    return np.concatenate([low, high - low], 1)


def part_boxes(points: np.ndarray) -> np.ndarray:
    """The boxes that a map of landmarks marks, int64 `[5, 4]`: eyes, mouth, nose, both eyes, of
    68 or 5 points int `[P, 2]`; five give squares in shares of the distance between the eyes."""
    if len(points) == 68:
        parts = [bounding(points[part]) for part in PARTS]
        return np.stack([*parts, _between(*parts[:2])])
    right, left, nose, *corners = points
    apart = max(float(np.linalg.norm(left - right)), 2.0)
    sizes = apart * np.array([(.6, .45), (.6, .45), (.8, .4), (.45, .6)])
    middles = np.stack([right, left, np.mean(corners, 0), nose])
    parts = np.concatenate([middles - sizes / 2, sizes], 1).round().astype(np.int64)
    return np.stack([*parts, _between(*parts[:2])])


def gaussian_map(boxes: Tensor, side: int) -> Tensor:
    """The map of landmarks, float32 `[B, 1, side, side]` in 0..1: a Gaussian bell over each of the
    boxes `[B, R, 4]` (x, y, width, height), of which 2.70 deviations span the side; their
    maximum."""
    pixel = torch.arange(side, device=boxes.device, dtype=torch.float32)
    first, length = boxes[..., :2].float(), boxes[..., 2:].float().clamp(min=1)
    # distance from the middle of each box, by its own width and height: [B, R, 2, side]
    across = (pixel - first[..., None]) / length[..., None] * BOXED + (FIRST - TABLE)
    bell = torch.exp(-0.5 * (across * (RATIO / TABLE)).square())
    return (bell[:, :, 1, :, None] * bell[:, :, 0, None, :]).amax(1, keepdim=True)
