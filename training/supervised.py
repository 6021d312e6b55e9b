"""Training with labels: one epoch of a classifier, and what it predicts."""
import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from images import cache, transforms
from models.classifier import Classifier
from training import devices, epochs, schedules
from training.losses import class_weights, classification_loss


class Training(NamedTuple):
    """A classifier, and what it is trained with: the clips `members` of a ClipSet, decoded."""
    classifier: Classifier
    clips: object
    images: np.ndarray  # uint8 [N, C, S, S]
    members: np.ndarray
    optimizer: torch.optim.Optimizer
    precision: devices.Precision


def draw_order(labels: np.ndarray, oversample: bool, rng: torch.Generator) -> Tensor:
    """Positions of one epoch's training clips, with replacement under --oversample: `[N]`."""
    if not oversample:
        return torch.arange(len(labels))
    counts = np.bincount(labels)
    return torch.multinomial(torch.from_numpy(1 / counts[labels]), len(labels), True, generator=rng)


def train_epoch(opt: argparse.Namespace, job: Training, epoch: int, within: dict,
                on_step: Callable) -> dict:
    """One epoch; returns {train_loss, train_accuracy}. within, on_step: see epochs.Loop.run.

    A parameter group of the optimizer carries its initial rate `base`, and over how many epochs
    it rises, `warmup`. Raises RunFailed if a loss is not finite.
    """
    classifier, clips, images, members, optimizer, (autocast, scaler) = job
    encoding, device = clips.encoding["difference"], classifier.device
    means = epochs.Meters(("train_loss", "train_accuracy"), within.get("meters"))
    classifier.encoder.train(opt.train_bn)
    classifier.head.train()
    labels = clips.labels[members]
    weights = class_weights(labels, clips.n_label).to(device)
    rng = epochs.generator(opt.seed, epoch)
    order = draw_order(labels, opt.oversample, rng)
    every = [order[index].numpy() for index in epochs.batches(len(members), opt.batch_size, rng)]
    steps = list(enumerate(every, 1))[within.get("step", 0):]
    fetched = cache.fetch(images, [members[index] for _, index in steps], device)
    for (step, index), batch in zip(steps, fetched):
        schedules.set_rates(opt, optimizer, epoch, step, len(every))
        drawn = transforms.draw(len(index), epochs.generator(opt.seed, epoch, step), encoding, 0,
                                views=len(clips.views))
        batch = transforms.train_transform(batch, drawn, classifier.normalization, clips.channels)
        target = torch.from_numpy(labels[index]).to(device)
        with autocast():
            logits = classifier(batch).float()  # [B, C]
        loss = classification_loss(logits, target, opt.loss, weights).mean()
        epochs.check_loss(loss, epoch, step, f"{epochs.kept(opt)}, or "
                                             f"--encoder_lr, now {opt.encoder_lr:g}")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        limit_gradient(classifier.encoder, opt.trust, opt.encoder_lr)
        epochs.descend(opt, classifier, optimizer, scaler)
        hits = (logits.argmax(1) == target).float().mean()
        means.add((loss.detach(), hits), len(index))
        on_step({"step": step, "meters": means.state()})
    return means.means()


def limit_gradient(encoder: torch.nn.Module, trust: float, rate: float) -> None:
    """Clips the gradient so that, before momentum, it moves the encoder by the share `trust` of its
    weights' length at most: a head of large weights would throw it out of what it has learnt. 0:
    no limit."""
    if trust and rate:
        moving = [part for part in encoder.parameters() if part.grad is not None]
        length = torch.stack([part.detach().norm() for part in moving]).norm().item()
        torch.nn.utils.clip_grad_norm_(moving, trust * length / rate)


def set_norms(classifier: Classifier, images: np.ndarray, members: np.ndarray,
              batch_size: int) -> None:
    """Gives the encoder's batch norms the statistics of the training clips `members`.

    Under --train_bn every step normalises with its batch; a head that starts from features
    normalised otherwise (an untrained encoder's not at all) would meet others in the first step.
    """
    parts = np.array_split(members, max(1, len(members) // batch_size))
    torch.optim.swa_utils.update_bn(
        (transforms.eval_transform(batch, classifier.normalization)
         for batch in cache.fetch(images, parts, classifier.device)), classifier.encoder)


def predict(classifier: Classifier, images: np.ndarray, members: np.ndarray, autocast: Callable,
            batch_size: int = 64) -> np.ndarray:
    """Probabilities `[len(members), C]` from the plain centre crop; nothing random."""
    classifier.eval()
    probabilities = []
    with torch.no_grad():
        parts = np.array_split(members, -(-len(members) // batch_size))
        for batch in cache.fetch(images, parts, classifier.device):
            batch = transforms.eval_transform(batch, classifier.normalization)
            with autocast():
                logits = classifier(batch)
            probabilities.append(logits.float().softmax(1).cpu().numpy())
    return np.concatenate(probabilities)
