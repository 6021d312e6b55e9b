"""--crop and --register, which every set's preparation takes, and the face boxes they mean."""
import argparse
import math
from collections.abc import Callable

from preparation import detection, outputs, registration
from util import number


class Crop(argparse.Action):
    """--crop mtcnn | none | boxes FILE | box X Y W H, as a tuple."""

    def __call__(self, parser, namespace, values, option_string=None):
        kind, rest = values[0], values[1:]
        if (kind, len(rest)) not in (("mtcnn", 0), ("none", 0), ("boxes", 1), ("box", 4)):
            parser.error("argument --crop: mtcnn, none, boxes FILE.csv or box X Y W H")
        if kind == "box":
            try:
                rest = [float(v) for v in rest]
            except ValueError:
                parser.error("argument --crop: box X Y W H are numbers of pixels")
            if not all(map(math.isfinite, rest)) or min(rest[2:]) <= 0:
                parser.error("argument --crop: the box is finite, its width and height above 0")
        setattr(namespace, self.dest, (kind, *rest))


def add_crop_options(parser: argparse.ArgumentParser, size: int, default: tuple,
                     none: str) -> None:
    """Crop and registration; size: side of the images by default; none: what --crop none means."""
    crop = parser.add_argument_group("crop")
    crop.add_argument("--crop", nargs="+", action=Crop, default=default,
                      metavar=("mtcnn|none|box|boxes", "X Y W H|FILE"),
                      help=f"face on the onset frame: detected; {none}; box X Y W H: one in pixels "
                           f"for all; boxes FILE.csv: as prepare.py casme3 writes it")
    crop.add_argument("--margin", type=number(float, 0, 4), default=round(registration.MARGIN, 6),
                      help="share of the face added to the crop; the default lets the face fill "
                           "the central 224 of 256 pixels")
    crop.add_argument("--size", type=number(int, 32, 1024), default=size,
                      help="side of the images, pixels")
    crop.add_argument("--roll", action="store_true",
                      help="turn the crop so that the eyes of the onset frame are level; with "
                           "mtcnn, or the roll of a boxes.csv")
    align = parser.add_argument_group("registration")
    align.add_argument("--register", choices=("translation", "similarity", "none"),
                       default="translation",
                       help="motion of the head since the onset taken off a frame, on forehead and "
                            "nose bridge, sub-pixel")


def check_crop(parser: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Answers flags of `add_crop_options` that do not go together."""
    if opt.roll and opt.crop[0] not in ("mtcnn", "boxes"):
        parser.error("--roll takes --crop mtcnn, or boxes with a column roll")


def box_finder(crop: tuple, roll: bool) -> Callable:
    """A function row → Box or None, for --crop box and boxes; further arguments: other spellings
    of the row's identity in a boxes.csv."""
    if crop[0] == "box":
        return lambda row, *spellings: registration.Box(*crop[1:])
    if crop[0] == "boxes":
        boxes = detection.read_boxes(crop[1], roll)
        return lambda row, *spellings: detection.box_for(boxes, outputs.identity(row), *spellings)
    return lambda row, *spellings: None
