"""One supervised epoch of a network on face images, and what it predicts."""
import argparse
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from images import cache, photos, regions
from images.crops import Recipe
from images.faces import FaceSet
from training import devices, distributed, epochs, losses, schedules
from training.supervised import draw_order
from util import BadInput, RunFailed

if TYPE_CHECKING:  # it takes seconds, which a wrong path or --help should not
    from timm.data import Mixup
    from timm.utils import ModelEmaV3

# of an image without landmarks: RAN's crops, one of them a second time
LACKING = (*regions.FIXED[:-1], regions.FIXED[4], regions.FIXED[-1])


# ---------------------------------------------------------------- what a network sees

class Source(NamedTuple):
    """What batches are made of. images: cache.OnDemand, uint8 `[N, 3, S, S]`; landmarks: float32
    `[N, P, 2]` in shares of the sides, NaN where there are none, or None; views: of
    regions.N_VIEWS; gaussian: a map of the landmarks is a fourth channel; augment: what training
    changes at random: a Recipe, or one of `photos.draw`."""
    faces: FaceSet
    images: cache.OnDemand
    landmarks: np.ndarray | None = None
    views: str = "whole"
    gaussian: bool = False
    augment: str | Recipe = "none"

    @property
    def side(self) -> int:
        return self.images.shape[-1]

    def without_landmarks(self) -> np.ndarray:
        """Which images have none of those that are read."""
        return np.flatnonzero([] if self.landmarks is None
                              else np.isnan(self.landmarks).any((1, 2)))

    def points(self, i: int) -> np.ndarray | None:
        """Landmarks of image `i` in pixels, int `[P, 2]`, or None."""
        if self.landmarks is None or np.isnan(self.landmarks[i]).any():
            return None
        return (self.landmarks[i] * self.side).round().astype(np.int64)

    def boxes(self, index: np.ndarray, rng: torch.Generator | None) -> Tensor | None:
        """Views of the images of `index`, float32 `[B, K, 4]`, left, top, right, bottom; None: the
        whole image alone. rng: of random crops in training; without, they follow from the
        image's pixels."""
        side = self.side
        if self.views == "whole":
            return None
        if self.views == "random" and rng is not None:
            return regions.random_boxes(len(index), side, rng)
        if self.views == "random":
            return torch.cat([regions.random_boxes(1, side, epochs.generator(
                zlib.crc32(self.images[int(i)].tobytes()))) for i in index])
        if self.views != "landmark":
            shares = regions.FIXED if self.views == "fixed" else regions.PAPER
            boxes = torch.from_numpy(regions.fixed_boxes(shares, side, side)).float()
            return boxes.expand(len(index), -1, -1)
        boxes = []
        for points in map(self.points, index):
            if points is None:
                boxes.append(regions.fixed_boxes(LACKING, side, side))
            else:
                corner, size = np.split(regions.landmark_boxes(points, side, side), 2, axis=1)
                boxes.append(np.concatenate([corner, corner + size], 1))
        return torch.from_numpy(np.stack(boxes)).float()

    def marks(self, index: np.ndarray, device: torch.device) -> Tensor | None:
        """The maps of landmarks of the images of `index`, `[B, 1, S, S]` on the device, 1 where
        there are none; None without --gaussian."""
        if not self.gaussian:
            return None
        maps = torch.ones(len(index), 1, self.side, self.side, device=device)
        boxes = {k: regions.part_boxes(points) for k, i in enumerate(index)
                 if (points := self.points(i)) is not None}
        if boxes:
            maps[[*boxes]] = regions.gaussian_map(
                torch.from_numpy(np.stack([*boxes.values()])).to(device), self.side)
        return maps

    def training_inputs(self, index: np.ndarray, rows: np.ndarray, batch: Tensor,
                        rng: torch.Generator) -> Tensor:
        """What a network is shown of this rank's part `rows` of the images `index`, for all of
        which everything random is drawn; batch: `rows` as they are stored."""
        mine = distributed.part(torch.arange(len(index)))
        if isinstance(self.augment, Recipe):
            drawn = self.augment.draw(len(index), rng)
            return self.augment.train(batch, {name: value[mine] for name, value in drawn.items()})
        drawn = photos.draw(len(index), rng, self.augment, self.side)
        boxes = self.boxes(index, rng)
        return photos.train_transform(
            batch, {name: value[mine] for name, value in drawn.items()},
            None if boxes is None else boxes[mine].to(batch.device),
            self.marks(rows, batch.device), self.views == "landmark")

    def seen(self, batch: Tensor) -> Tensor:
        """The part of stored images, uint8 `[B, 3, S, S]`, that a network is shown to predict them,
        as it is in them: uint8 `[B, 3, size, size]`."""
        return self.augment.seen(batch) if isinstance(self.augment, Recipe) else batch

    def plain_inputs(self, rows: np.ndarray, batch: Tensor, mirror: bool = False) -> Tensor:
        """What a network is shown of the images `rows`, as they are stored in `batch`, to predict
        them, or their mirror images; nothing random."""
        if isinstance(self.augment, Recipe):
            return self.augment.eval(batch, mirror)
        boxes = self.boxes(rows, None)
        return photos.eval_transform(batch, mirror, boxes if boxes is None else
                                     boxes.to(batch.device), self.marks(rows, batch.device))


class Job(NamedTuple):
    """A network in training. run: the network over the devices (distributed.wrap); ema: of its
    weights, or None; labels: int64 `[N]` as they are now, relabelled ones among them; members: the
    images it is trained on; distance: of the Wasserstein term `[C, C]`, or None; relabelled: rows
    (image, from, to, probability, epoch); mixup: of the images of a batch, or None."""
    network: nn.Module
    run: nn.Module
    ema: "ModelEmaV3 | None"
    source: Source
    labels: np.ndarray
    members: np.ndarray
    optimizer: torch.optim.Optimizer
    precision: devices.Precision
    distance: Tensor | None
    relabelled: list
    mixup: "Mixup | None" = None


# ---------------------------------------------------------------- one epoch

def loss_of(opt: argparse.Namespace, said: tuple, target: Tensor, kept: Tensor,
            weights: Tensor | None, distance: Tensor | None, n: int) -> tuple[Tensor, dict]:
    """(mean loss of the images that could be read, `kept` bool `[B]`, its parts by name): said:
    (logits `[B, C]`, importance `[B, K]` or None) of a part of a batch, of which `n` images could
    be read, with labels `target`. The rank regularisation, of the whole batch, is not in it."""
    logits, importance = said
    if not kept.any():  # 0, and a gradient of 0 for every weight
        return sum(one.sum() * 0 for one in said if one is not None), dict.fromkeys(
            ["region_loss"] * (opt.region_margin > 0) + ["wasserstein"] * (distance is not None),
            logits.new_zeros(()))
    logits, target = logits[kept], target[kept]
    importance = importance if importance is None else importance[kept]
    loss = losses.classification_loss(logits, target, opt.loss, weights,
                                      opt.label_smoothing).mean()
    parts = {}
    if opt.region_margin:
        parts["region_loss"] = losses.region_loss(importance, opt.region_margin)
        loss = loss + parts["region_loss"]
    if distance is not None:
        parts["wasserstein"] = losses.wasserstein(logits.float(), target, distance, "mean")
        # of the sum over the batch, as published
        loss = loss + opt.wloss_alpha * (n if opt.wloss_reduction == "sum" else 1) \
            * parts["wasserstein"]
    return loss, parts


def augmented(job: Job, index: np.ndarray, rows: np.ndarray, batch: Tensor,
              rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(what a network is shown, what is to be said of it: labels `[B]`, or with mixup shares of the
    classes `[B, C]`; which could be read, bool `[B]`) of this rank's part `rows` of the images
    `index`; batch: `rows` as they are stored, changed in place."""
    source, device = job.source, batch.device
    kept = torch.from_numpy(~source.images.lost[rows])
    target = torch.from_numpy(job.labels[rows])
    if kept.any():  # batch norm and mixup see another image in place of one that cannot be read
        batch[~kept], target[~kept] = batch[kept][0], target[kept][0]
    inputs, target = source.training_inputs(index, rows, batch, rng), target.to(device)
    # of dropout, and of dropped paths: each rank its own
    torch.manual_seed((rng.initial_seed() + distributed.rank()[0]) % 2 ** 63)
    if job.mixup is not None:
        np.random.seed(rng.initial_seed() % 2 ** 32)  # noqa: NPY002 - what timm's Mixup draws from
        inputs, target = job.mixup(inputs, target)
    return inputs, target, kept.to(device)


def batch_loss(opt: argparse.Namespace, job: Job, said: tuple, target: Tensor, kept: Tensor,
               everyone: Tensor, weights: Tensor | None, names: list[str]) -> tuple[Tensor, Tensor]:
    """(this rank's loss, whose gradients the ranks average; over all ranks the loss, the accuracy
    and the parts of the loss called `names`) of this rank's part of a batch; kept: which could be
    read, bool, `everyone` on all ranks."""
    n = int(everyone.sum())
    loss, parts = loss_of(opt, said, target, kept, weights, job.distance, n)
    # parts may differ by an image or more
    total, rank = loss * (int(kept.sum()) * distributed.size() / max(1, n)), 0.0
    if opt.rank_margin:
        rank = losses.rank_regularisation(
            distributed.gather_features(said[1].float())[everyone], opt.rank_margin, opt.rank_beta)
        total, parts["rank_loss"] = total + rank, rank
    likeliest = target if target.ndim == 1 else target.argmax(1)
    hits = (said[0].argmax(1) == likeliest)[kept].float()
    values = torch.stack([(loss + rank).detach(), hits.sum() / max(1, len(hits)),
                          *(parts[name].detach() for name in names)]).float()
    return total, distributed.mean(values, len(hits)) if n else values * 0


def loss_weights(opt: argparse.Namespace, labels: np.ndarray, n_label: int,
                 device: torch.device) -> Tensor | None:
    """What --loss takes of the labels of the training images, `[C]`, or None."""
    make = {"balanced": losses.class_weights, "logit_adjusted": losses.log_prior}.get(opt.loss)
    return make and make(labels, n_label).to(device)


def meters(opt: argparse.Namespace, within: dict) -> epochs.Meters:
    names = ["train_loss", "train_accuracy"]
    names += ["rank_loss"] * (opt.rank_margin > 0) + ["region_loss"] * (opt.region_margin > 0)
    names += ["wasserstein"] * (opt.wloss_alpha > 0)
    return epochs.Meters(names, within.get("meters"))


def train_epoch(opt: argparse.Namespace, job: Job, epoch: int, within: dict,
                on_step: Callable) -> dict:
    """One epoch; returns the means of its losses, and how many images were relabelled.

    Images that cannot be read are left out. Every rank takes its part of a batch. within,
    on_step: see epochs.Loop.run. Raises RunFailed if a loss is not finite or a batch is
    unreadable, BadInput if all are.
    """
    source, members = job.source, job.members
    device = next(job.network.parameters()).device
    means = meters(opt, within)
    job.network.train()
    if opt.freeze_backbone:
        job.network.features.eval()
    began = within["labels"] if within else torch.from_numpy(job.labels.copy())  # it is drawn by
    rng, known = epochs.generator(opt.seed, epoch), began.numpy()[members]
    weights = loss_weights(opt, known, source.faces.n_label, device)
    order = draw_order(known, opt.oversample, rng)
    groups, length = epochs.groups(opt, len(members), rng)
    start, steps = time.perf_counter(), list(enumerate(groups, 1))[within.get("step", 0):]
    wanted = [members[order[distributed.part(index)].numpy()] for _, group in steps
              for index in group]
    coming = zip(wanted, cache.fetch(source.images, wanted, device))
    for step, group in steps:
        schedules.set_rates(opt, job.optimizer, epoch, step, length)
        for k, index in enumerate(group):
            rows, batch = next(coming)
            rng = epochs.generator(opt.seed, epoch, step, *(k,) * (k > 0))
            inputs, target, kept = augmented(job, members[order[index].numpy()], rows, batch, rng)
            everyone = distributed.gather(kept)
            epochs.check_readable(int(everyone.sum()), len(everyone), epoch, step)
            with distributed.summed_later(job.run, k + 1 < len(group)):
                with job.precision.autocast():
                    said = job.run(inputs)
                said = said if isinstance(said, tuple) else (said, None)
                total, values = batch_loss(opt, job, said, target, kept, everyone, weights,
                                           list(means)[2:])
                epochs.check_loss(values, epoch, step, epochs.kept(opt))
                job.precision.scaler.scale(total / len(group)).backward()
            means.add(values.tolist(), int(everyone.sum()))
            if opt.relabel_epoch and epoch >= opt.relabel_epoch:
                relabel(opt, job, torch.from_numpy(rows).to(device), said[0].detach(), said[1],
                        everyone, epoch)
        epochs.descend(opt, job.network, job.optimizer, job.precision.scaler)
        if job.ema is not None:
            # told the number of the step, timm's takes the weights after the first one as they are
            job.ema.update(job.network, (epoch - 1) * len(groups) + step
                           if job.ema.use_warmup else None)
        on_step({"step": step, "meters": means.state(), "labels": began})
    if not means["train_loss"].count:
        raise BadInput(f"{source.faces.folder}: none of its {len(members)} training images can be "
                       f"read; see that they are there")
    count = sum(len(index) for _, group in steps for index in group)
    figures = means.means() | {"images_per_second": count / (time.perf_counter() - start)}
    if opt.relabel_epoch:
        figures["relabelled"] = sum(row[-1] == epoch for row in job.relabelled)
    return figures


def relabel(opt: argparse.Namespace, job: Job, rows: Tensor, logits: Tensor,
            importance: Tensor | None, everyone: Tensor, epoch: int) -> None:
    """Gives images of this rank's part `rows` of a batch the class that the network is surer of,
    from when it is drawn next, for all ranks; everyone: bool `[B]`, those that could be read."""
    rows = distributed.gather(rows)[everyone]
    probabilities = distributed.gather(logits.float().softmax(1))[everyone]
    if importance is not None:
        importance = distributed.gather(importance.detach().float())[everyone]
    labels = torch.from_numpy(job.labels).to(logits.device)[rows]
    new = losses.relabel(probabilities, labels, opt.relabel_margin,
                         importance if opt.relabel_group == "low" else None, opt.rank_beta)
    for k in (new != labels).nonzero().flatten().tolist():
        place = int(rows[k])
        if job.labels[place] != int(new[k]):  # oversampled, it may stand in the batch twice
            job.relabelled.append((place, int(job.labels[place]), int(new[k]),
                                   float(probabilities[k].max()), epoch))
            job.labels[place] = int(new[k])


# ---------------------------------------------------------------- prediction

class Predicted(NamedTuple):
    """Of the images that could be read, `kept` `[M]`: probabilities `[M, C]`, importance of the
    views `[M, K]` or None, and what the last layer saw `[M, D]` of a network that has `embed`."""
    kept: np.ndarray
    probabilities: np.ndarray
    importance: np.ndarray | None
    features: np.ndarray | None


@torch.no_grad()
def predict(network: nn.Module, source: Source, members: np.ndarray, autocast: Callable,
            flip: bool = True, batch_size: int = 64) -> Predicted:
    """What a network says of the images `members`; nothing random. flip: the probabilities are the
    mean over the image and its mirror image; batch_size: of views."""
    network.eval()
    batch_size = max(1, batch_size // regions.N_VIEWS[source.views])
    device, embed = next(network.parameters()).device, getattr(network, "embed", None)
    kept, probabilities, beside = [], [], {"importance": [], "features": []}
    parts = np.array_split(members, max(1, -(-len(members) // batch_size)))
    for rows, batch in zip(parts, cache.fetch(source.images, parts, device)):
        good = ~source.images.lost[rows]
        if not good.any():
            continue
        rows, batch = rows[good], batch[torch.from_numpy(good)]
        both = []
        for mirror in (False, True)[:1 + flip]:
            inputs = source.plain_inputs(rows, batch, mirror)
            with autocast():
                features = embed(inputs) if embed else None
                said = network.head(features) if embed else network(inputs)
            logits, importance = said if isinstance(said, tuple) else (said, None)
            both.append((logits.float().softmax(1), importance, features))
        kept.append(rows)
        probabilities.append(torch.stack([p for p, *_ in both]).mean(0).cpu().numpy())
        for each, of_image in zip(beside.values(), both[0][1:]):
            if of_image is not None:
                each.append(of_image.float().cpu().numpy())
    if not kept:
        raise BadInput(f"{source.faces.folder}: no image of {len(members)} can be read")
    if not all(np.isfinite(each).all() for each in probabilities):
        raise RunFailed(f"the predictions for the images of {source.faces.name} are not finite; "
                        f"train with a lower learning rate")
    return Predicted(np.concatenate(kept), np.concatenate(probabilities), *(
        np.concatenate(each) if each else None for each in beside.values()))
