"""Classes of clips: of two frames with their depth, or of a list of prepared images.

Frames are cropped, registered, subtracted and normalised as the checkpoint records it of the images
it was trained on; prepared images must have been made alike.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import dataset
import util
from evaluation import encoders
from images import decoding, encoding, lists
from models import create_classifier
from models.classifier import Classifier
from preparation import cutting, detection, registration
from training import devices, supervised
from util import BadInput, ensure

NEEDED = ("classifier", "classes", "layer", "view", "channels", "encoding", "normalization")
FRAMES = ("onset", "apex", "depth_onset", "depth_apex")
SMALLEST = 32  # side of a frame, pixels: no face is found in fewer


# ---------------------------------------------------------------- model

def check(path: str | Path, state: dict) -> None:
    """Raises BadInput unless the state of a checkpoint holds a head and what it was trained on."""
    missing = [name for name in NEEDED if state.get(name) is None]
    if missing:
        raise BadInput(f"{path}: cannot predict: it holds no {missing[0]}; name the last.pth that "
                       f"fine-tune_DVSCL.py --subject all writes")
    try:
        state["channels"] = tuple(int(n) for n in state["channels"])
        ensure(len(state["channels"]) == 2 and state["opt"]["model"])
        ensure(isinstance(state["classes"], list))
        ensure(all(isinstance(name, str) for name in state["classes"]))
        ensure(state["encoding"]["difference"] in encoding.DIFFERENCES)
        ensure(isinstance(state["layer"], int) and isinstance(state["view"], str))
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: its 'opt', 'classes', 'layer', 'view', 'channels' or 'encoding' "
                       f"cannot be read; fine-tune again") from None


def set_model(path: str | Path, state: dict, clips: dataset.ClipSet,
              device: torch.device) -> Classifier:
    """The classifier of a checkpoint for `clips`, on the device; raises BadInput."""
    opt = argparse.Namespace(model=state["opt"]["model"], view=state["view"],
                             layer=state["layer"], size=state["opt"].get("size", decoding.CROP))
    try:
        head = create_classifier(opt.model, opt.layer, len(state["classes"]), state["channels"],
                                 state["opt"].get("encoder", "both"), opt.size)
        head.load_state_dict(state["classifier"])
        if not all(value.isfinite().all() for value in head.state_dict().values()):
            raise BadInput(f"{path}: its head holds weights that are not finite; fine-tune again")
    except (ValueError, RuntimeError, TypeError, AttributeError):
        raise BadInput(f"{path}: its head does not fit {opt.model}, layer {opt.layer} and "
                       f"{len(state['classes'])} classes; fine-tune again") from None
    classifier, _ = encoders.load_classifier(opt, path, clips, head)
    return classifier.to(device)


# ---------------------------------------------------------------- prepared images

def read_list(opt: util.Options, state: dict) -> dataset.ClipSet:
    """The clips of --list; raises BadInput where its images are not as the checkpoint's were."""
    path, view = Path(opt.list), state["view"]
    clips = dataset.read_list(path, opt.data_folder, view, opt.encoding,
                              alone=state["opt"].get("encoder") == "rgb")
    if clips.channels != state["channels"]:
        raise BadInput(f"{path}: the second view has {clips.channels[1]} channels, that of "
                       f"{opt.model_path} {state['channels'][1]}")
    for name, ours, theirs in differing(clips.encoding, state["encoding"], clips.views[1]):
        raise BadInput(f"{path}: its images have {name} {ours}, but {opt.model_path} was trained "
                       f"with {theirs}; prepare them alike")
    return clips


def differing(ours: dict, theirs: dict, second: str) -> list[tuple]:
    """(what, here, there) where two encodings differ in what is known of both."""
    def crop(encoding, name):
        return encoding["crop"].get(name) if isinstance(encoding.get("crop"), dict) else None
    pairs = [(name, ours.get(name), theirs.get(name)) for name in ("difference", "registration")]
    pairs += [(f"crop {name}", crop(ours, name), crop(theirs, name)) for name in ("margin", "roll")]
    if second == "depth":
        pairs.append(("depth_range_mm", ours.get("depth_range_mm"), theirs.get("depth_range_mm")))
    return [pair for pair in pairs if None not in pair and pair[1] != pair[2]]


# ---------------------------------------------------------------- frames

def recorded(path: str | Path, encoding: dict, with_depth: bool) -> cutting.Settings:
    """How a checkpoint's encoding says that images were cut; raises BadInput."""
    try:
        crop = encoding["crop"]
        settings = cutting.Settings(
            crop["by"], float(crop["margin"]), int(encoding["size"]), bool(crop["roll"]),
            encoding["registration"], encoding["difference"],
            *([float(encoding["depth_scale"]), float(encoding["depth_range_mm"])] if with_depth
              else []))
        ensure(settings.crop in ("mtcnn", "box", "boxes", "none"))
        ensure(settings.register in ("translation", "similarity", "none"))
        ensure(settings.margin >= 0 and 32 <= settings.size <= 1024)
        ensure(settings.depth_scale > 0 and settings.depth_range > 0)
    except KeyError as error:
        raise BadInput(f"{path}: does not record {error.args[0]!r} of the images it was trained "
                       f"on; give --list with images prepared alike, or prepare the training "
                       f"images with prepare.py and train again") from None
    except (TypeError, ValueError):
        raise BadInput(f"{path}: its 'encoding' cannot be read; prepare and train again") from None
    return settings


def check_frames(opt: util.Options, state: dict) -> bool:
    """Raises BadInput unless the frames that are given are those the model needs; returns whether
    depth is cut."""
    second, alone = lists.view_names(state["view"])[1], state["opt"].get("encoder") == "rgb"
    given = opt.depth_onset is not None
    if second not in ("depth", "gray"):
        raise BadInput(f"{opt.model_path}: its second view is {second}, which frames do not give; "
                       f"give --list")
    if given and second != "depth":
        raise BadInput(f"--depth_onset {opt.depth_onset}: the second view of {opt.model_path} is "
                       f"{second}, not depth; drop both depth frames")
    if second == "depth" and not given and not alone:
        raise BadInput(f"{opt.model_path}: sees depth too; give --depth_onset and --depth_apex")
    for flags in (FRAMES[:2], FRAMES[2:] if given else ()):
        sizes = {}
        for name in flags:
            file = getattr(opt, name)
            if not Path(file).is_file():
                raise BadInput(f"--{name} {file}: no such file")
            sizes[name] = decoding.open_image(file).size
            if min(sizes[name]) < SMALLEST:
                raise BadInput(f"--{name} {file}: {sizes[name][0]}x{sizes[name][1]} pixels; a "
                               f"frame has {SMALLEST} or more a side")
        if len(set(sizes.values())) > 1:
            (a, first), (b, other) = sizes.items()
            raise BadInput(f"--{b} {getattr(opt, b)}: {other[0]}x{other[1]} pixels, but --{a} has "
                           f"{first[0]}x{first[1]}: both are frames of one camera")
    return given


def check_box(opt: util.Options, settings: cutting.Settings) -> None:
    """Raises BadInput for a box that is missing, outside the frame, or not what was recorded."""
    if settings.crop in ("box", "boxes") and opt.box is None:
        raise BadInput(f"{opt.model_path}: was trained on crops around boxes that were given; give "
                       f"--box X Y W H{' ROLL' * settings.roll}, the face on the onset frame")
    if opt.box is None:
        return
    width, height = decoding.open_image(opt.onset).size
    if settings.crop == "none":
        raise BadInput(f"--box: {opt.model_path} was trained on the central square of its frames; "
                       f"drop it")
    if settings.roll and not opt.box_has_roll:
        raise BadInput(f"--box: {opt.model_path} was trained on crops turned until the eyes were "
                       f"level; add a fifth number, the degrees by which the picture's right eye "
                       f"lies lower, 0 where it does not")
    if opt.box.roll and not settings.roll:
        raise BadInput(f"--box: {opt.model_path} was trained on crops that were not turned; drop "
                       f"the fifth number")
    if not opt.box.lies_in(width, height):
        raise BadInput(f"--box: is no face on {opt.onset}, {width}x{height} pixels: its middle is "
                       f"outside, or it is more than twice as large")


def cut_frames(opt: util.Options, state: dict, folder: str) -> dataset.ClipSet:
    """The one clip, its difference images below `folder`; raises BadInput."""
    with_depth = check_frames(opt, state)
    settings = recorded(opt.model_path, state["encoding"], with_depth)
    check_box(opt, settings)
    registration.require()
    if settings.crop == "mtcnn" and opt.box is None:
        detection.require("predict.py", ", or give --box X Y W H")
    files = [str(getattr(opt, name)) for name in FRAMES[:4 if with_depth else 2]]
    names = "rgb.png", "depth.png" if with_depth else ""
    task = cutting.Task(Path(opt.apex).stem, *names, tuple(files), box=opt.box)
    record = cutting.process(task, settings, folder)
    if "dropped" in record:
        raise BadInput("no face found on the onset frame; give --box X Y W H, or another frame"
                       if record["dropped"].startswith("no face")
                       else f"{record['dropped']}; give another frame")
    if not record["registered"]:
        print(f"note: {opt.apex}: could not be registered onto {opt.onset}; taken as it is",
              file=sys.stderr)  # standard output holds the result alone
    # without depth the luminance stands in: it is the view itself, or the head does not see it
    clip = dataset.Clip(0, "", f"{opt.onset} {opt.apex}", -1, (names[0], names[1] or names[0]))
    return dataset.ClipSet([clip], Path(folder), ("rgb", "depth" if with_depth else "gray"), (3, 1),
                           state["encoding"], luminance=not with_depth)


# ---------------------------------------------------------------- result

def report(opt: util.Options, state: dict, clips: dataset.ClipSet,
           probabilities: np.ndarray) -> str:
    """The result as text: JSON, or a table with a row per clip."""
    classes, keys = state["classes"], [clip.key for clip in clips.clips]
    if opt.json:
        answers = [{"key": key, "prediction": classes[p.argmax()],
                    "probabilities": {name: float(v) for name, v in zip(classes, p)}}
                   for key, p in zip(keys, probabilities)]
        return json.dumps({"checkpoint": str(opt.model_path), "classes": classes,
                           "clips": answers}, indent=1, ensure_ascii=False)
    return table([("clip", "prediction", *classes), *(
        (key, classes[p.argmax()], *(f"{v:.3f}" for v in p))
        for key, p in zip(keys, probabilities))], 2)


def table(rows: list[tuple], words: int) -> str:
    """Rows of texts in columns, the first `words` of them flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([*(v.ljust(w) for v, w in zip(row[:words], widths)),
                                *(v.rjust(w) for v, w in zip(row[words:], widths[words:]))])
                     for row in rows)


def predict(opt: util.Options, state: dict, device: torch.device) -> str:
    """The result for frames or a list, as text."""
    check(opt.model_path, state)
    with tempfile.TemporaryDirectory() as folder:
        clips = read_list(opt, state) if opt.list else cut_frames(opt, state, folder)
        classifier = set_model(opt.model_path, state, clips, device)
        images, _ = dataset.load_images(clips, "off", opt.num_workers,
                                        state["opt"].get("size", decoding.CROP))
    probabilities = supervised.predict(classifier, images, np.arange(len(clips)),
                                       devices.mixed_precision(False, device).autocast)
    return report(opt, state, clips, probabilities)
