"""Decoding: photographs, and the difference images of a clip's views to one uint8 array."""
import math
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from images import encoding
from util import BadInput

SIZE = 256  # images are stored with this side, in pixels, where training crops CROP of them
CROP = 224
PIXEL_LIMIT = 50_000_000  # a frame of more pixels than any camera's is an accident
PHOTO_LIMIT = 178_000_000  # what Pillow opens; telephones take 50 million pixels and more
# what Pillow raises for files that are broken: RuntimeError by AVIF's decoder, TypeError and the
# last two for EXIF data of wrong types
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError, TypeError,
          AttributeError, struct.error)


def open_image(path: str | Path, limit: int = PIXEL_LIMIT) -> Image.Image:
    """Opens an image lazily, with a limit on its pixels; raises BadInput."""
    try:
        with warnings.catch_warnings():  # Pillow's, of images above half of PHOTO_LIMIT
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except BROKEN as error:
        raise BadInput(f"{path}: not a readable image ({error}); replace it") from None
    if image.width * image.height > limit:
        raise BadInput(f"{path}: {image.width}x{image.height} pixels; the limit is {limit}")
    return image


def read_photo(path: str | Path, side: int | None = None) -> Image.Image:
    """A photograph, decoded, upright and in RGB: turned as its EXIF data say; grey of any depth,
    palettes, CMYK converted, what is transparent laid over white.

    side: of a JPEG whose shorter side is twice as many pixels or more, only 1/2, 1/4 or 1/8 of
    the lines is decoded, the shorter side staying above. Raises BadInput.
    """
    image = open_image(path, PHOTO_LIMIT)
    try:
        if side:
            scale = side / min(image.size)
            image.draft("RGB", tuple(math.ceil(scale * length) for length in image.size))
        image = ImageOps.exif_transpose(image)
        image = eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except BROKEN as error:
        raise BadInput(f"{path}: cannot be decoded ({error}); replace it") from None


def upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a photograph turned as its EXIF data say, of its header alone where the
    format keeps those there; raises BadInput."""
    with open_image(path, PHOTO_LIMIT) as image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except BROKEN as error:
            raise BadInput(f"{path}: cannot be decoded ({error}); replace it") from None
        return image.size[::-1] if turned else image.size


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits in 8, as which Pillow would clip it; others as they are."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    levels = np.asarray(image, np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("pixels that are not finite")
    if image.mode == "F" and levels.max() <= 2:  # in shares of white, a little above at most
        levels = levels * 255
    return Image.fromarray((levels / (257 if levels.max() > 255 else 1)).clip(0, 255)
                           .round().astype(np.uint8))


def _grey8(image, path):
    """A second view of one channel as 8-bit 'L': 8-bit grey, equal RGB channels, or 16-bit."""
    if image.mode == "F":
        return eight_bits(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((levels + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("L", "1"):
        return image.convert("L")
    rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise BadInput(f"{path}: a colour image as the second view; it needs 8-bit grey, equal "
                       f"channels or 16-bit grey")
    return Image.fromarray(np.ascontiguousarray(rgb[..., 0]))


def stored_side(size: int) -> int:
    """Side of the stored images of which `size` pixels are cropped (transforms.crop_side), both in
    pixels."""
    return math.ceil(size * SIZE / CROP)


def decode(paths: list, channels: tuple, difference: str, side: int = SIZE,
           luminance: bool = False) -> np.ndarray:
    """The views of one clip: uint8 `[C1+C2+…, side, side]`.

    paths, channels: of each view, the first in colour; luminance: the second view is that of the
    first. The shorter side is brought to `side` pixels, all views alike, and the centre kept.
    Raises BadInput for an image that cannot be read, views of differing shape, and a 'wrap' image
    of another size, which resizing would destroy.
    """
    views = []
    for number, (path, count) in enumerate(zip(paths, channels)):
        try:
            if number and luminance:
                views.append(Image.fromarray(
                    encoding.luminance(np.asarray(views[0]), difference)))
            else:
                image = open_image(path)
                views.append(image.convert("RGB") if count == 3 else _grey8(image, path))
        except (OSError, ValueError, SyntaxError) as error:
            raise BadInput(f"{path}: cannot be decoded ({error}); replace it") from None
    first = views[0]
    scale = side / min(first.size)
    size = tuple(max(side, round(length * scale)) for length in first.size)
    for path, image in zip(paths[1:], views[1:]):
        other = tuple(round(length * side / min(image.size)) for length in image.size)
        if max(abs(a - b) for a, b in zip(size, other)) > 1:
            raise BadInput(f"{path}: {image.width}x{image.height}, but {Path(paths[0]).name} is "
                           f"{first.width}x{first.height}: the views of a clip must have one shape")
    return np.concatenate([_centre(image, path, difference, size, side)
                           for path, image in zip(paths, views)])


def _centre(image, path, difference, size, side):
    """The central square uint8 `[C, side, side]` of an image brought to `size`."""
    if image.size != size:
        if difference == "wrap":
            raise BadInput(f"{path}: {image.width}x{image.height} pixels; differences modulo 256 "
                           f"cannot be resized to {side}: prepare them at that size, or say "
                           f"--encoding signed or absolute")
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    pixels = np.asarray(image)[top:top + side, left:left + side]
    return pixels.reshape(side, side, -1).transpose(2, 0, 1)
