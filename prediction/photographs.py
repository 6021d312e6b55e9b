"""Expressions of the faces in photographs, by a network that train_FER.py or main_finetune.py made.
"""
import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

import util
from evaluation import finetuning
from images import cache, decoding
from images.decoding import read_photo, upright_size
from images.faces import FaceSet
from models.ran import create_network
from prediction.clips import table
from preparation import detection, photographs, registration
from training import devices, faces, pretrained
from util import BadInput, write_table

AT_ONCE = 256  # faces that are held in memory


class Found(NamedTuple):
    """A face: the photograph it is in, what `photographs.described` says of it, its crop uint8
    `[S, S, 3]` and its points there, float32 `[5, 2]`, or None."""
    photo: photographs.Photo
    face: dict
    crop: np.ndarray
    points: np.ndarray | None


def load(path: str | Path, state: dict) -> nn.Module:
    """The network that predicted the test split of a run; raises BadInput."""
    opt, of_fer = state["opt"], state["system"] == "FER"
    try:
        n_label = len(state["classes"])
        network = create_network(opt["model"], n_label, opt["arch"], 0, opt["gaussian"]) \
            if of_fer else finetuning.create_network(argparse.Namespace(**opt), n_label)
        network.load_state_dict(pretrained.predicting(state)[1])
        util.ensure(isinstance(opt["size"], int) and opt["size"] >= 16
                    and isinstance(opt["tta_flip"], bool))
        crop = state.get("crop") or {}
        util.ensure(isinstance(crop, dict) and isinstance(crop.get("size", 1), int)
                    and crop.get("size", 1) >= 1
                    and all(isinstance(name, str) for name in state["classes"]))
        util.ensure(all(bool(value.isfinite().all()) for value in network.state_dict().values()))
        util.ensure(opt["views"] if of_fer else opt["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise BadInput(f"{path}: cannot be read as a model of "
                       f"{'train_FER.py' if of_fer else 'main_finetune.py'}; train again") from None
    if of_fer and opt["views"] == "landmark":
        raise BadInput(f"{path}: sees crops about 68 landmarks, which are not found here; train "
                       f"with --views fixed or random to predict photographs")
    return network


def side_of(state: dict) -> int:
    """Side of the images that a model was trained on, as they were stored, in pixels."""
    size = state["opt"]["size"]
    return size if state["system"] == "FER" else decoding.stored_side(size)


def resampling_of(state: dict) -> Image.Resampling:
    """How the images that a model was trained on were brought to their size."""
    return Image.Resampling.BILINEAR if state["system"] == "FER" else finetuning.BICUBIC


def find(opt: util.Options, state: dict, told: dict) -> Iterator[Found]:
    """The faces of all photographs; `told`: what is noted of those without one, and of unreadable
    ones."""
    size, crop = side_of(state), state.get("crop") or {}
    margin = opt.margin
    if margin is None:
        margin = crop.get("margin", registration.MARGIN)
    # as in training: cut at one size, and brought to what the network sees
    cut = crop.get("size", size)
    framing = cut, margin, crop.get("align", True)
    # where pictures are written nothing is read
    photos, _ = photographs.find_photos(opt.photos, opt.pictures or "/dev/null")
    for photo in photos:
        try:
            image = read_photo(photo.path, size if opt.whole else None)  # as in training
            width, height = upright_size(photo.path) if opt.whole else image.size
        except BadInput as error:
            told["unreadable"].append(str(error))
            continue
        if opt.whole:
            whole = image.resize((size, size), resampling_of(state))
            box = {"face": 1, "x": 0, "y": 0, "width": width, "height": height, "score": None,
                   "points": []}
            yield Found(photo, box, np.asarray(whole), None)
            continue
        pixels = np.asarray(image)
        found = detection.find_faces(pixels, opt.min_face_size)
        if not found:
            told["without_faces"].append(photo.name)
        for number, face in enumerate(found, 1):
            one = detection.cut_face(pixels, face, *framing)
            if cut != size:
                one = np.asarray(Image.fromarray(one).resize((size, size), resampling_of(state)))
            points = detection.points_in_crop(face, *framing)
            yield Found(photo, photographs.described(number, face), one,
                        None if points is None else points * (size / cut))


def say(network: nn.Module, state: dict, found: list[Found]) -> np.ndarray:
    """Probabilities `[len(found), C]`."""
    opt, size = state["opt"], side_of(state)
    images = cache.OnDemand(len(found), lambda i: found[i].crop.transpose(2, 0, 1), (3, size, size),
                            np.uint8, "", num_workers=1)
    points = None
    if opt.get("gaussian"):
        points = np.stack([np.full((5, 2), np.nan, np.float32) if one.points is None
                           else one.points / size for one in found])
    shown = FaceSet("photographs", Path(), tuple(state["classes"]), [], np.zeros(0, int), [], None,
                    None, False)
    source = faces.Source(shown, images, points, opt["views"], opt["gaussian"]) \
        if state["system"] == "FER" else faces.Source(
            shown, images, augment=finetuning.recipe_of(argparse.Namespace(**opt)))
    device = next(network.parameters()).device
    autocast = devices.mixed_precision(False, device).autocast
    return faces.predict(network, source, np.arange(len(found)), autocast, opt["tta_flip"])[1]


def draw(folder: str, classes: list[str], rows: list[tuple[Found, np.ndarray]]) -> None:
    """One photograph with the boxes and classes of its faces."""
    photo = rows[0][0].photo
    told = [one.face | {"text": f"{classes[p.argmax()]} {p.max():.2f}"} for one, p in rows]
    image = photographs.draw(np.asarray(read_photo(photo.path)), told)
    photographs.save(folder, f"{photo.stem}.jpg", image, "jpg")


def predict(opt: util.Options, state: dict, device: torch.device) -> str:
    """The classes of all faces, as text; writes --csv and --pictures."""
    network = load(opt.model_path, state).to(device, memory_format=torch.channels_last)
    if not opt.whole:
        detection.require("predict.py", ", or give --whole for crops of faces")
        registration.require()
    if state["opt"].get("gaussian") and (opt.whole or state["points"] != 5):
        print("note: the model was trained on maps of landmarks, of which " + (
            "crops of faces have none: they are shown as full of them" if opt.whole else
            "five are found here, not 68"), file=sys.stderr)
    classes, told, rows = state["classes"], {"without_faces": [], "unreadable": []}, []
    coming = find(opt, state, told)
    while found := list(itertools.islice(coming, AT_ONCE)):
        rows += [(one._replace(crop=None), p) for one, p in zip(found, say(network, state, found))]
    if not rows:
        raise BadInput("; ".join(told["unreadable"][:1] + [f"no face in {name}; --whole takes it "
                                                           f"as one" for name in
                                                           told["without_faces"][:1]]))
    columns = "photo", "face", "x", "y", "width", "height", "score", "prediction"
    cells = [(one.photo.name, *(one.face[name] for name in columns[1:7]), classes[p.argmax()])
             for one, p in rows]
    if opt.csv:
        write_table(opt.csv, (*columns, *(f"p_{name}" for name in classes)), (
            [*row, *(f"{v:.6f}" for v in p)] for row, (_, p) in zip(cells, rows)))
    if opt.pictures:
        for _, own in itertools.groupby(rows, key=lambda row: row[0].photo):
            draw(opt.pictures, classes, list(own))
    if opt.json:
        return json.dumps({"checkpoint": str(opt.model_path), "classes": classes, "faces": [
            {**dict(zip(columns, row)), "probabilities": dict(zip(classes, map(float, p)))}
            for row, (_, p) in zip(cells, rows)], **told}, indent=1, ensure_ascii=False)
    lines = [table([("photo", "face", "prediction", *classes), *(
        (row[0], str(row[1]), row[-1], *(f"{v:.3f}" for v in p))
        for row, (_, p) in zip(cells, rows))], 3)]
    lines += [f"no face: {name}" for name in told["without_faces"]]
    return "\n".join(lines + [f"unreadable: {text}" for text in told["unreadable"]])
