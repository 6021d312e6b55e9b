"""Batches of motion and onset face for a network, drawn, cropped and encoded on the device."""
import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import cache, videos
from images.photos import MEAN, STD
from images.videos import Videos
from models import files
from models.mmnet import MMNet, from_published
from training import devices, epochs, schedules
from training.losses import class_weights, classification_loss
from util import BadInput


class Source(NamedTuple):
    """What batches are made of. steps: 4, or 1: from onset to apex; channels: a set of flow, or
    'difference': RGB differences; scale: see flow.channels; original: as the original network
    is trained, frames normalised as ImageNet's; masks: uint8 `[N, S, S]`, 0 where nothing is to be
    seen, or None."""
    videos: Videos
    steps: int
    channels: str
    scale: float | str = "map"
    original: bool = False
    masks: np.ndarray | None = None


def batches(source: Source, parts: list[np.ndarray], device: torch.device,
            seeds: list[tuple] | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(motion float32 `[B, C, T, S, S]`, onset `[B, 3, S, S]`, which are mirrored, bool `[B]`) of
    the clips of each index array.

    seeds: of which jitter, crop and mirror of each batch follow; None: clips as they are.
    """
    arrays, size = source.videos, source.videos.frames.shape[-1]
    drawn, rows = [], []
    for number, part in enumerate(parts):
        variants = np.zeros(len(part), np.int64)
        boxes = videos.whole(len(part), size)
        if seeds:
            rng = epochs.generator(*seeds[number])
            variants = torch.randint(arrays.index.shape[1], (len(part),), generator=rng).numpy()
            boxes = videos.draw_boxes(len(part), size, rng, source.original)
        rows.append(arrays.index[part, variants])
        drawn.append(boxes)
    by_flow = source.channels != "difference"
    # of frames that are mapped, those that are needed are read alone
    stills = cache.fetch(arrays.frames[:, 0:1] if by_flow else arrays.frames, parts, device)
    moves = cache.fetch(arrays.steps, rows, device) if by_flow else iter(lambda: None, 0)
    for part, (boxes, mirror), frames, steps in zip(parts, drawn, stills, moves):
        boxes, mirror = boxes.to(device), mirror.to(device)
        mask = 1.0
        if source.masks is not None:
            mask = torch.from_numpy(source.masks[part]).to(device)[:, None, None]
        images = videos.crop_frames(frames * mask, boxes, mirror)
        if source.original:
            images = (images - images.new_tensor(MEAN).view(3, 1, 1)) \
                / images.new_tensor(STD).view(3, 1, 1)
        reference = arrays.info["reference"]
        if by_flow:
            steps = steps * mask
            if source.steps == 1:
                steps = videos.to_apex(steps, reference)[:, None]
            motion = videos.motion_of(steps, boxes, mirror, source.channels, source.scale)
        elif source.steps == 1:
            motion = (images[:, 2:3] - images[:, :1]).transpose(1, 2)
        else:
            motion = videos.differences(images, reference).transpose(1, 2)
        yield motion, images[:, 0], mirror


def typical_motion(arrays: Videos) -> np.ndarray:
    """The 99.9th percentile of |u| and |v| of each clip, float64 `[N]`, pixels: a fixed scale is
    its mean over the training clips."""
    return np.array([np.percentile(abs(arrays.steps[rows].astype(np.float32)), 99.9)
                     for rows in arrays.index[:, 0]])


# ---------------------------------------------------------------- training

class Job(NamedTuple):
    """A network in training. run: the network over the devices (distributed.wrap); targets: the
    action units of all clips, float32 `[2, N, U]`, as they are and mirrored, NaN where nobody
    coded them, or None; members: the clips it is trained on; units: names of those units, or
    None."""
    network: nn.Module
    run: nn.Module
    source: Source
    labels: np.ndarray
    targets: np.ndarray | None
    members: np.ndarray
    optimizer: torch.optim.Optimizer
    precision: devices.Precision
    units: list[str] | None = None


def set_stage(network: nn.Module, stage: str) -> None:
    """Sets which weights move in a stage: 'units': all but the classifier's, 'last': those alone,
    'all'; frozen ones stay to the bit, batch norm's too."""
    for name, part in network.named_parameters():
        part.requires_grad_(stage == "all" or name.startswith("fc.") == (stage == "last"))
    network.train(stage != "last")


def unit_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy of action units `[B, U]`, mean over the clips that were coded: the
    targets of others are NaN. 0 where none was."""
    coded = ~wanted.isnan().any(1)
    if not coded.any():
        return logits.float().sum() * 0
    return F.binary_cross_entropy_with_logits(logits.float()[coded], wanted[coded])


def train_epoch(opt: argparse.Namespace, job: Job, stage: str, epoch: int, number: int,
                within: dict, on_step: Callable) -> dict:
    """One epoch of a stage; returns {train_loss, train_accuracy}, with opt.au_loss {au_loss} too;
    of stage 'units' {au_loss} alone.

    epoch: of the whole training, from which everything random follows; number: within the stage,
    which the rate goes by; within, on_step: see epochs.Loop.run. Raises RunFailed if a loss is not
    finite.
    """
    device, labels = next(job.network.parameters()).device, job.labels[job.members]
    names = ("train_loss", "train_accuracy") * (stage != "units")
    names += ("au_loss",) * (stage == "units" or opt.au_loss > 0)
    means = epochs.Meters(names, within.get("meters"))
    weights = class_weights(labels, int(job.labels.max()) + 1).to(device)
    set_stage(job.network, stage)
    rate = schedules.exponential_rate(opt.learning_rate, number, opt.lr_gamma, opt.plateau_epoch)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    order = epochs.batches(len(labels), opt.batch_size, epochs.generator(opt.seed, epoch))
    pieces = [(step, k, piece, len(index)) for step, index in enumerate(order, 1)
              for k, piece in enumerate(index.tensor_split(
                  max(1, min(opt.accumulate, len(index) // 2))))]  # batch norm takes two clips
    pieces = [piece for piece in pieces if piece[0] > within.get("step", 0)]
    coming = batches(job.source, [job.members[piece.numpy()] for _, _, piece, _ in pieces], device,
                     [(opt.seed, epoch, step, k) for step, k, _, _ in pieces])
    for place, ((step, _, piece, whole), (moved, onset, mirror)) in enumerate(zip(pieces, coming)):
        with job.precision.autocast():
            said = job.run(moved, onset)
        logits, units = said if job.targets is not None else (said, None)
        loss, values = 0.0, ()
        if stage != "units":
            target = torch.from_numpy(labels[piece.numpy()]).to(device)
            loss = classification_loss(logits, target, opt.loss, weights).mean()
            values = (loss.detach(), (logits.argmax(1) == target).float().mean())
        if "au_loss" in names:
            shown = job.targets[mirror.long().cpu().numpy(), job.members[piece.numpy()]]
            wanted = torch.from_numpy(shown).to(device)
            of_units = unit_loss(units, wanted)
            loss = of_units if stage == "units" else loss + opt.au_loss * of_units
            values += (of_units.detach(),)
        epochs.check_loss(loss, epoch, step, epochs.kept(opt))
        means.add(values, len(piece))
        job.precision.scaler.scale(loss * len(piece) / whole).backward()
        if place + 1 < len(pieces) and pieces[place + 1][0] == step:
            continue  # the batch has more parts
        epochs.descend(opt, job.network, job.optimizer, job.precision.scaler)
        on_step({"step": step, "meters": means.state()})
    return means.means() | {"learning_rate": rate}


@torch.no_grad()
def predict(job: Job, members: np.ndarray, batch_size: int = 32) -> tuple:
    """(probabilities `[M, C]` of clips as they are, the maps of attention of the four blocks
    `[M, h, w]` each, over time their mean, the logits of action units `[M, U]` or None)."""
    device = next(job.network.parameters()).device
    job.network.eval()
    parts = np.array_split(members, -(-len(members) // batch_size))
    probabilities, maps, units = [], [], []
    for moved, onset, _ in batches(job.source, parts, device):
        with job.precision.autocast():
            features, attention = job.network.features(moved, onset)
            said = job.network.classify(features)
        logits, shown = said if job.targets is not None else (said, None)
        probabilities.append(logits.float().softmax(1).cpu().numpy())
        maps.append([one.float().flatten(1, -3).mean(1).cpu() for one in attention])
        units.append(shown if shown is None else shown.float().cpu().numpy())
    return (np.concatenate(probabilities), [torch.cat(block) for block in zip(*maps)],
            None if units[0] is None else np.concatenate(units))


def fitting(network: MMNet, opt: argparse.Namespace, classes: list[str],
            units: list[str] | None) -> dict:
    """The tensors that a network for these classes and action units gets from --pretrained, a
    published checkpoint or one of these scripts: all but last layers of another shape, or that tell
    other classes or units. Raises BadInput for another network, or another kind of motion."""
    path = opt.pretrained
    read = files.read(path)
    content = read if isinstance(read, dict) else {}
    before = content.get("opt") if isinstance(content.get("opt"), dict) else {}
    for name, flags in (("channels", "--input, --channels"), ("scale", "--scale")):
        if before.get(name, getattr(opt, name)) != getattr(opt, name):
            raise BadInput(f"--pretrained {path}: trained on motion as {before[name]}, here "
                           f"{getattr(opt, name)} ({flags})")
    anew = ()
    if content.get("classes") not in (None, list(classes)):
        anew += ("fc.",)
    if units is not None and content.get("units") not in (None, units):
        # V6's classifier sees the units
        anew += ("au.", "fc.") if network.layout.units else ("au.",)
    state = files.load_weights(path, read)
    if any("conv_act." in name for name in state):
        state = from_published(state)
    ours = network.state_dict()
    last = {name for name in ours if name.startswith(("fc.", "au."))}
    left = {name for name in last if name not in state or state[name].shape != ours[name].shape
            or name.startswith(anew)}
    wrong = sorted(name for name in ours.keys() - left
                   if name not in state or state[name].shape != ours[name].shape)
    extra = sorted(name for name in state.keys() - ours.keys()
                   if not name.startswith(("fc.", "au.")))
    if wrong or extra:
        raise BadInput(f"--pretrained {path}: not a checkpoint of this --model, --channels and "
                       f"--size ({len(wrong)} tensors missing or of another shape, {len(extra)} "
                       f"unknown, {(wrong or extra)[0]} the first)")
    return {name: state[name] for name in ours.keys() - left}


def load_pretrained(network: MMNet, opt: argparse.Namespace, classes: list[str],
                    units: list[str] | None) -> None:
    """Starts a network from --pretrained, see `fitting`."""
    state = fitting(network, opt, classes, units)
    left = network.load_state_dict(state, strict=False).missing_keys
    print(f"{opt.pretrained}: {len(state)} of {len(state) + len(left)} tensors loaded"
          + f"; {', '.join(sorted(left))} start anew" * bool(left))
