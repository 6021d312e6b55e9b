"""Decoding: difference images of both views to one uint8 array, once, kept in a cache."""
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from util import BadInput, beside, write_json

SIZE = 256  # images are stored with this side, in pixels, where training crops CROP of them
CROP = 224
PIXEL_LIMIT = 50_000_000  # an image of more pixels than any camera's frame is an accident
GREY = (0.299, 0.587, 0.114)  # ITU-R 601 luminance
NO_CHANGE = {"signed": 128, "wrap": 0, "absolute": 0}  # grey level of an unchanged pixel


def open_image(path):
    """Opens an image lazily, with a limit on its pixels; raises BadInput."""
    try:
        image = Image.open(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path}: not a readable image ({error}); replace it") from None
    if image.width * image.height > PIXEL_LIMIT:
        raise BadInput(f"{path}: {image.width}x{image.height} pixels; the limit is {PIXEL_LIMIT}")
    return image


def _luminance(rgb, encoding):
    """uint8 `[H, W, 3]` → `[H, W]`; a difference modulo 256 is unwrapped before it is mixed."""
    levels = rgb.astype(np.int16)
    if encoding == "wrap":
        levels = (levels + 128) % 256 - 128
    return (levels @ np.array(GREY)).round().astype(np.int16).astype(np.uint8)


def _grey8(image, path):
    """A second view of one channel as 8-bit 'L': 8-bit grey, equal RGB channels, or 16-bit."""
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((levels + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("L", "1"):
        return image.convert("L")
    rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise BadInput(f"{path}: a colour image as the second view; it needs 8-bit grey, equal "
                       f"channels or 16-bit grey")
    return Image.fromarray(np.ascontiguousarray(rgb[..., 0]))


def stored_side(size):
    """Side of the stored images of which `size` pixels are cropped, both in pixels."""
    return round(size * SIZE / CROP)


def decode(clip, clips, side=SIZE):
    """Both views of one clip: uint8 `[C1+C2, side, side]`.

    The shorter side is brought to `side` pixels, both views alike, and the centre kept. Raises
    BadInput for an image that cannot be read, views of differing shape, and a 'wrap' image of
    another size, which resizing would destroy.
    """
    path = clips.folder / clip.rgb
    try:
        rgb = open_image(path).convert("RGB")
        if clips.luminance:
            second = Image.fromarray(_luminance(np.asarray(rgb), clips.encoding["difference"]))
        else:
            path = clips.folder / clip.second
            second = open_image(path)
            second = second.convert("RGB") if clips.channels[1] == 3 else _grey8(second, path)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"{path}: cannot be decoded ({error}); replace it") from None
    scale = side / min(rgb.size)
    size = tuple(max(side, round(length * scale)) for length in rgb.size)
    other = tuple(round(length * side / min(second.size)) for length in second.size)
    if max(abs(a - b) for a, b in zip(size, other)) > 1:
        raise BadInput(f"{path}: {second.width}x{second.height}, but {clip.rgb} is "
                       f"{rgb.width}x{rgb.height}: the views of a clip must have one shape")
    views = []
    for image, file in ((rgb, clip.rgb), (second, clip.second)):
        if image.size != size:
            if clips.encoding["difference"] == "wrap":
                raise BadInput(f"{clips.folder / file}: {image.width}x{image.height} pixels; "
                               f"differences modulo 256 cannot be resized to {side}: prepare them "
                               f"at that size, or say --encoding signed or absolute")
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        pixels = np.asarray(image)[top:top + side, left:left + side]
        views.append(pixels.reshape(side, side, -1).transpose(2, 0, 1))
    return np.concatenate(views)


def load_images(clips, cache="off", num_workers=4, size=CROP):
    """Every clip decoded once: (uint8 `[N, C1+C2, S, S]`, digest of the pixels).

    size: of the crops to be taken of them, for which S is 8/7 of it. cache: a folder keeps the
    array as a memory-mapped file, under a name that follows from the paths, sizes and times of the
    images, and later calls map it; 'off' keeps it in memory. Where it fits neither, a Stream takes
    its place, and the digest is that of paths, sizes and times.
    """
    side = stored_side(size)
    folder, shape = Path(cache), (len(clips), sum(clips.channels), side, side)
    stamp = hashlib.sha256(repr((clips.luminance, clips.encoding["difference"], shape)).encode())
    for clip in clips.clips:
        for name in (clip.rgb, clip.second):
            stat = os.stat(clips.folder / name)
            stamp.update(f"{(clips.folder / name).resolve()} {stat.st_size} {stat.st_mtime_ns}\n"
                         .encode())
    path = folder / f"{stamp.hexdigest()[:32]}.npy"
    if cache != "off" and path.with_suffix(".json").exists() and path.exists():
        known = json.loads(path.with_suffix(".json").read_text())
        return np.load(path, mmap_mode="r"), known["sha256"]
    if cache != "off":
        folder.mkdir(parents=True, exist_ok=True)
    volume = math.prod(shape)
    room = shutil.disk_usage(folder).free if cache != "off" else _free_memory()
    if volume > 0.9 * room:
        print(f"{volume / 2 ** 30:.1f} GiB of images do not fit the {room / 2 ** 30:.1f} GiB free "
              f"{'in memory' if cache == 'off' else f'in {folder}'}: they are decoded for every "
              f"batch anew, by {num_workers} threads")
        return Stream(clips, num_workers, side), stamp.hexdigest()
    part = None if cache == "off" else beside(path)
    try:
        if part:
            images = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
            # claimed before it is written: a disk that fills up under a mapping is a bus error
            with open(part, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        else:
            images = np.empty(shape, np.uint8)
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            decoded = pool.map(lambda clip: decode(clip, clips, side), clips.clips)
            for i, pair in enumerate(tqdm(decoded, "decoding", len(clips), disable=None)):
                images[i] = pair
        digest = hashlib.sha256(images.data).hexdigest()
        if part:
            images.flush()
            os.replace(part, path)
            write_json(path.with_suffix(".json"), {"sha256": digest, "clips": len(clips)})
            images = np.load(path, mmap_mode="r")
    finally:
        if part:
            part.unlink(missing_ok=True)
    return images, digest


def _free_memory():
    """Bytes that can be had without swapping; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return float("inf")


class Stream:
    """Stands in for the array of decoded clips: decodes what is asked for, by several threads."""

    def __init__(self, clips, num_workers, side=SIZE):
        self.clips, self.side, self.pool = clips, side, ThreadPoolExecutor(max(num_workers, 1))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        """An int, slice or array of indices → uint8 `[C, S, S]` or `[B, C, S, S]`."""
        def get(i):
            return decode(self.clips.clips[i], self.clips, self.side)
        if isinstance(index, (int, np.integer)):
            return get(index)
        return np.stack(list(self.pool.map(get, np.arange(len(self))[index])))


def fetch(images, batches, device):
    """`images[index]` on `device`, uint8 `[B, C, S, S]`, for each index array of `batches`.

    The next one is fetched while one is used, for a GPU from pinned memory on a stream of its own:
    a copy from other memory would wait for the step before it, and the GPU for the copy.
    """
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if gpu else None

    def get(index):
        batch = torch.from_numpy(images[index])
        if gpu:
            with torch.cuda.stream(stream):
                batch = batch.pin_memory().to(device, non_blocking=True)
            stream.synchronize()
        return batch

    def ready(future):
        batch = future.result()
        if gpu:  # its memory is used again only after what the caller's stream does with it
            batch.record_stream(torch.cuda.current_stream(device))
        return batch

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for index in batches:
            done, coming = coming, pool.submit(get, index)
            if done:
                yield ready(done)
        if coming:
            yield ready(coming)


def blank(images, encoding):
    """bool `[N]`: clips whose RGB difference is 'no change' everywhere (onset = apex)."""
    level = NO_CHANGE[encoding["difference"]]
    chunks = np.array_split(np.arange(len(images)), -(-len(images) // 64))
    return np.concatenate([(batch[:, :3].numpy() == level).all((1, 2, 3))
                           for batch in fetch(images, chunks, torch.device("cpu"))])
