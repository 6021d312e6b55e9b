"""A raw tree as a licence holder finds it, of drawn textures: small, quick, and known exactly."""
import zlib

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from util import write_table

SIZE = 160, 120  # width, height
HEADER = ("Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion")
DEPTH_MM = 700  # of the whole surface
RISE_MM = 4.0  # by which the mouth comes nearer at `level` 1


def texture(name, size=SIZE):
    """uint8-valued float `[H, W]` that follows from the name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = gaussian_filter(rng.standard_normal((size[1] // 2, size[0] // 2)), 1.5)
    return (128 + 30 * zoom(noise / noise.std(), 2, order=1)).clip(20, 235)


def mouth(size=SIZE):
    """Where the face moves: `[H, W]` in 0..1, in the lower half of the frame."""
    y, x = np.mgrid[:size[1], :size[0]]
    return np.exp(-(((x / size[0] - 0.5) / 0.1) ** 2 + ((y / size[1] - 0.7) / 0.1) ** 2))


def frame(name, level, size=SIZE):
    """(RGB uint8 `[H, W, 3]`, depth uint16 `[H, W]`) of a video at `level` of its expression."""
    grey = texture(name, size) + 40 * level * mouth(size)
    rgb = np.stack([grey, grey * 0.9, grey * 0.8], -1).clip(0, 255).astype(np.uint8)
    depth = np.full(grey.shape, DEPTH_MM) - RISE_MM * level * mouth(size)
    depth[:4] = 0  # nothing is measured in the first rows
    return rgb, np.round(depth * 10).astype(np.uint16)  # 0.1 mm per unit


def write_frame(name, level, color, depth, size=SIZE):
    """Writes one frame to the two paths; None: not this view."""
    rgb, measured = frame(name, level, size)
    for path, pixels in ((color, rgb), (depth, measured)):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, **({"quality": 95} if pixels.ndim == 3 else {}))


def write_video(root, subject, video, numbers, level=lambda n: 0.1 * n, size=SIZE, where=None):
    """A video as Part A has it; where: (colour folder, depth folder) if elsewhere."""
    folder = root / subject / video
    color, depth = where or (folder / "color", folder / "depth")
    for n in numbers:
        write_frame(f"{subject}{video}", level(n), color / f"{n}.jpg", depth / f"{n}.png", size)


def write_csv(path, rows):
    """The annotation; rows: (subject, video, onset, apex, offset, AU, emotion)."""
    write_table(path, HEADER, [[*rest, "I", emotion] for *rest, emotion in rows])
    return path
