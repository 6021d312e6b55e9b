"""Dense optical flow between frames, its channels, and what mirrors and crops do to a field.

A field is `[..., 2, H, W]`: u to the right, v down, pixels from the first frame to the second.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util import BadInput

try:
    import cv2
    cv2.setNumThreads(1)  # the clips are what runs in parallel
except ImportError:
    cv2 = None

METHODS = ("dis", "farneback")
# as published: one level, so that motion of more than a few pixels is not followed
FARNEBACK = {"pyr_scale": 0.4, "levels": 1, "winsize": 10, "iterations": 3, "poly_n": 5,
             "poly_sigma": 1.2, "flags": 0}
FLAT = 1e-6  # pixels: a map that varies by less shows no motion


def require() -> None:
    """Raises BadInput where OpenCV is missing."""
    if cv2 is None:
        raise BadInput("opencv-python-headless: not installed, it computes the optical flow; pip "
                       "install -r requirements-prepare.txt")


def parameters(method: str) -> dict:
    """What the flow of a method depends on: its parameters and OpenCV's version (DIS differs by up
    to .02 pixels between versions)."""
    require()
    return {"method": method, "opencv": cv2.__version__,
            **(FARNEBACK if method == "farneback" else {"preset": "medium"})}


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W]` of an RGB image uint8 `[H, W, 3]`."""
    require()
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def flow_between(first: np.ndarray, second: np.ndarray, method: str = "dis") -> np.ndarray:
    """Flow float32 `[2, H, W]` from one frame to another, both uint8 grey `[H, W]`.

    method: 'dis' (Kroeger et al., ECCV 2016, OpenCV's preset medium) or 'farneback' (Farnebäck,
    SCIA 2003). Raises ValueError for another method, BadInput without OpenCV.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose from {', '.join(METHODS)}")
    require()
    first, second = np.ascontiguousarray(first), np.ascontiguousarray(second)
    if method == "farneback":
        field = cv2.calcOpticalFlowFarneback(first, second, None, **FARNEBACK)
    else:
        dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        field = dis.calc(first, second, None)
    return np.ascontiguousarray(field.transpose(2, 0, 1), dtype=np.float32)


def flow_steps(frames: np.ndarray, method: str = "dis",
               reference: str = "previous") -> np.ndarray:
    """Flow float32 `[F-1, 2, H, W]` (u, v) between uint8 grey frames `[F, H, W]`.

    reference: 'previous': from each frame to the next one; 'onset': from the first to each other.
    """
    starts = frames[:-1] if reference == "previous" else [frames[0]] * (len(frames) - 1)
    return np.stack([flow_between(first, second, method)
                     for first, second in zip(starts, frames[1:])])


# ---------------------------------------------------------------- channels

def channels(flow: Tensor, name: str, scale: float | str = "map") -> Tensor:
    """The channels of a set from flow `[..., 2, H, W]` → `[..., C, H, W]`.

    r: u, v · n: each map from its minimum to its maximum as -1 to 1 · s: each map standardised ·
    nr: n, r, r, n of u, u, v, v · rs, ns, nrs alike · hsv: direction as hue, length as value, RGB
    in [0, 1]. scale: 'map'; 'column': s of each column of a map, as published; or a number of
    pixels by which u and v are divided in place of n, which leaves no motion at 0. A map without
    any motion gives zeros.
    """
    u, v = flow.unbind(-3)
    if name == "hsv":
        return _colours(u, v)
    scaled = {"r": (u, v)}
    if "n" in name:
        scaled["n"] = (_spread(u), _spread(v)) if isinstance(scale, str) else (u / scale, v / scale)
    if "s" in name:
        over = (-2,) if scale == "column" else (-2, -1)
        scaled["s"] = _standardised(u, over), _standardised(v, over)
    return torch.stack([scaled[kind][part] for kind, part in _ORDER[name]], -3)


_ORDER = {name: [*((kind, 0) for kind in order), *((kind, 1) for kind in reversed(order))]
          for name, order in {"r": "r", "n": "n", "s": "s", "nr": "nr", "rs": "rs", "ns": "ns",
                              "nrs": "rns"}.items()}


def _spread(x):
    """Each map `[..., H, W]` from -1 at its minimum to 1 at its maximum."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    moving = high - low > FLAT
    return torch.where(moving, 2 * (x - low) / (high - low).clamp(min=FLAT) - 1, 0)


def _standardised(x, over):
    """Maps `[..., H, W]` with mean 0 and deviation 1 over the dimensions `over`."""
    deviation, mean = torch.std_mean(x, over, correction=0, keepdim=True)
    return torch.where(deviation > FLAT, (x - mean) / deviation.clamp(min=FLAT), 0)


def _colours(u, v):
    """RGB `[..., 3, H, W]` as 8-bit HSV gives it: hue half the angle in degrees, saturation 255,
    value from 0 at a map's shortest vector to 255 at its longest."""
    length = torch.hypot(u, v)
    low, high = length.amin((-2, -1), keepdim=True), length.amax((-2, -1), keepdim=True)
    value = (255 * (length - low) / (high - low).clamp(min=FLAT)).floor() / 255
    value = torch.where(high - low > FLAT, value, 0)
    hue = (torch.rad2deg(torch.atan2(v, u)) % 360 / 2).floor() / 30  # sixths of the circle
    sixth = (torch.tensor([5.0, 3.0, 1.0], device=u.device).view(3, 1, 1) + hue.unsqueeze(-3)) % 6
    share = 1 - torch.minimum(sixth, 4 - sixth).clamp(0, 1)
    return (255 * share * value.unsqueeze(-3) + 1e-3).floor() / 255  # as OpenCV's own, nearly


# ---------------------------------------------------------------- mirrors and crops

def crop(images: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """The same region of all channels of a clip, resized: `[B, C, H, W]` → `[B, C, size, size]`.

    boxes: float `[B, 4]`, left, top, width and height in pixels, or `[B, 5]`, the fifth being
    degrees by which the picture is turned about the box's middle, clockwise; mirror: bool `[B]`.
    Bilinear; the border is repeated.
    """
    height, width = images.shape[-2:]
    sign = 1 - 2 * mirror.to(boxes)
    theta = boxes.new_zeros(len(boxes), 2, 3)
    share = torch.stack([sign * boxes[:, 2] / width, boxes[:, 3] / height], 1)
    theta[:, :, :2] = share[:, :, None] * _turns(boxes)
    theta[:, 0, 2] = (2 * boxes[:, 0] + boxes[:, 2]) / width - 1
    theta[:, 1, 2] = (2 * boxes[:, 1] + boxes[:, 3]) / height - 1
    grid = F.affine_grid(theta, (len(boxes), 1, size, size), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _turns(boxes):
    """Matrices `[B, 2, 2]` that give the place in a box of a place (x, y) in what is cut out."""
    angle = torch.deg2rad(boxes[:, 4]) if boxes.shape[1] == 5 else torch.zeros_like(boxes[:, 0])
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, sin, -sin, cos], 1).unflatten(1, (2, 2))


def crop_flow(flow: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """`crop` of fields `[B, T, 2, H, W]` → `[B, T, 2, size, size]`: what is enlarged moves further,
    and what is mirrored the other way."""
    by = torch.stack([(1 - 2 * mirror.to(boxes)) * size / boxes[:, 2], size / boxes[:, 3]], 1)
    cut = crop(flow.flatten(1, 2), boxes, mirror, size).unflatten(1, flow.shape[1:3])
    # the picture turns one way, the places that are looked up for it the other
    return torch.einsum("bji,btjhw->btihw", _turns(boxes), cut * by[:, None, :, None, None]) \
        if boxes.shape[1] == 5 else cut * by[:, None, :, None, None]
