"""What a pixel of a difference image means: written, read, unwrapped, normalised.

signed: (d + 256) // 2 of the difference d in grey levels, 128 is "no change"; wrap: d modulo 256,
what the published normalisation constants imply; absolute: the absolute value.
"""
import json
from pathlib import Path

import numpy as np
import torch

from images import cache
from util import BadInput, ensure

NO_CHANGE = {"signed": 128, "wrap": 0, "absolute": 0}  # grey level of an unchanged pixel
DIFFERENCES = tuple(NO_CHANGE)
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luminance
# Published normalisation, of differences modulo 256, in units of 255 grey levels.
WRAP_RGB = (0.4454, 0.4474, 0.4504), (0.4474, 0.4505, 0.4502)
WRAP_DEPTH = 0.0423, 0.1761
# For encoders that saw no data: the order of a micro-expression's change, in grey levels.
FIXED_STD = 8 / 255, 4 / 255


def read_encoding(folder: str | Path, given: str | None = None) -> dict:
    """encoding.json beside the lists, or --encoding [wrap]; raises BadInput."""
    path = Path(folder) / "encoding.json"
    if not path.exists():
        if given is None:
            print(f"no {path}: pixels are taken as 'wrap', d modulo 256, as the published images; "
                  f"--encoding says otherwise")
        return {"difference": given or "wrap"}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        ensure(isinstance(content, dict) and content.get("difference") in DIFFERENCES)
        classes = content.get("classes", [])
        ensure(isinstance(classes, list) and all(isinstance(c, str) for c in classes))
    except ValueError:
        raise BadInput(f"{path}: needs an object with \"difference\" signed, wrap or absolute, and "
                       f"\"classes\", if there, a list of names") from None
    if given not in (None, content["difference"]):
        raise BadInput(f"--encoding {given}: {path} says {content['difference']}; drop the flag")
    return content


def check_same(path: str | Path, old: dict | None, difference: str | None) -> None:
    """Raises BadInput where the training that `path` holds saw differences of another encoding, of
    which the same bytes do not tell; old: its encoding.json, or None."""
    was = (old or {}).get("difference", difference)
    if was != difference:
        raise BadInput(f"{path}: was trained on differences encoded as {was}, which are "
                       f"{difference} here; give another --tag")


# ---------------------------------------------------------------- pixels

def encode(change: np.ndarray, difference: str) -> np.ndarray:
    """Grey levels uint8 of a change in levels (int16): signed, wrap or absolute."""
    if difference == "signed":
        return ((change + 256) // 2).clip(0, 255).astype(np.uint8)
    return (change % 256 if difference == "wrap" else abs(change).clip(0, 255)).astype(np.uint8)


def encode_depth(change: np.ndarray, difference: str, range_mm: float = 10.0) -> np.ndarray:
    """Grey levels uint8 of a change in mm: 127 levels are `range_mm`, beyond it is clipped.

    "No change" is the level that the encoding has for it in both views: 128, or 0 for wrap
    (steps modulo 256) and absolute.
    """
    steps = np.round(127 * change / range_mm).clip(-127, 127).astype(np.int16)
    if difference == "signed":
        return (NO_CHANGE["signed"] + steps).astype(np.uint8)
    return encode(steps, difference)


def levels(pixels: np.ndarray, difference: str) -> np.ndarray:
    """Change int16 about "no change" of pixels uint8; differences modulo 256 are unwrapped."""
    change = pixels.astype(np.int16) - NO_CHANGE[difference]
    return (change + 128) % 256 - 128 if difference == "wrap" else change


def stretch(pixels: np.ndarray, difference: str, gain: float) -> np.ndarray:
    """A difference image for the eye, uint8: "no change" is 128, changes are enlarged."""
    return (128 + gain * levels(pixels, difference)).clip(0, 255).astype(np.uint8)


def flat(shape: tuple, difference: str) -> np.ndarray:
    """uint8 pixels of that shape without any change."""
    return np.full(shape, NO_CHANGE[difference], np.uint8)


def luminance(rgb: np.ndarray, difference: str) -> np.ndarray:
    """uint8 `[H, W, 3]` → `[H, W]`; a difference modulo 256 is unwrapped before it is mixed."""
    pixels = levels(rgb, difference) if difference == "wrap" else rgb.astype(np.int16)
    return (pixels @ np.array(GREY)).round().astype(np.int16).astype(np.uint8)


def blank(images: np.ndarray | cache.Stream, difference: str) -> np.ndarray:
    """bool `[N]`: clips whose first view (RGB) is 'no change' everywhere (onset = apex)."""
    chunks = np.array_split(np.arange(len(images)), -(-len(images) // 64))
    return np.concatenate([(batch[:, :3].numpy() == NO_CHANGE[difference]).all((1, 2, 3))
                           for batch in cache.fetch(images, chunks, torch.device("cpu"))])


# ---------------------------------------------------------------- normalisation

def fixed_normalization(difference: str, views: tuple, channels: tuple) -> dict[str, list]:
    """{mean, std}, a number per channel in units of 255 grey levels, from the encoding alone.

    wrap: the published constants (a view other than depth gets those of RGB); otherwise
    "no change" maps to 0 and the deviation is that of an encoder that saw no data.
    """
    mean, std = [], []
    for number, (view, n) in enumerate(zip(views, channels)):
        if difference != "wrap":
            own = [NO_CHANGE[difference] / 255] * n, [FIXED_STD[number > 0]] * n
        elif view == "depth" and n == 1:
            own = [[value] for value in WRAP_DEPTH]
        else:
            own = [[sum(of_rgb) / 3] if n == 1 else of_rgb for of_rgb in WRAP_RGB]
        mean += own[0]
        std += own[1]
    return {"mean": mean, "std": std}


def estimate_normalization(images: np.ndarray | cache.Stream, members: np.ndarray, difference: str,
                           views: tuple, channels: tuple) -> dict[str, list]:
    """{mean, std} for the images a pre-training sees: those at `members` of uint8 `[N, C, H, W]`.

    wrap: the published constants. Otherwise the mean is "no change", and the deviation per
    channel is taken about it.
    """
    normalization = fixed_normalization(difference, views, channels)
    if difference == "wrap":
        return normalization
    squares = torch.zeros(sum(channels), dtype=torch.float64)
    members = members[::-(-len(members) // 10_000)]  # of many clips, that many say it
    for i in members:
        change = torch.from_numpy(np.array(images[i])).float() - NO_CHANGE[difference]
        squares += change.square().mean((1, 2)).double()
    std = (squares / len(members)).sqrt() / 255
    # a channel without any change keeps the fixed deviation rather than dividing by zero
    fixed = normalization["std"]
    return normalization | {"std": [s if s > 1e-4 else f for s, f in zip(std.tolist(), fixed)]}
