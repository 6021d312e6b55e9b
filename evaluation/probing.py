"""Linear heads on a frozen encoder: features once, then the heads of all folds in one pass.

A frozen encoder gives the same features in every epoch and for every held-out subject, so each
image is encoded once per augmented view; see fold_heads for what is found on them.
"""
import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset import Data, Folds
from evaluation import descent, fold_heads, logistic
from evaluation.fold_heads import FoldHeads, Task, inner_groups
from images import cache, transforms
from models.classifier import Classifier
from training import checkpoint, devices
from training.record import Log

# (mirrored, shift in pixels of 256): the centre crop and its mirror image, then the corners' crops
VIEWS = [(mirror, shift) for shift in ((0, 0), (-16, -16), (16, 16), (-16, 16), (16, -16))
         for mirror in (False, True)]


class Encoded(NamedTuple):
    """What an encoder gives for N clips: `features` pooled at the tap under the first V of VIEWS,
    float32 `[V, N, D]`, flattened from so many `positions` of a map (1 for a vector); `embedded`:
    its unit features of both views, plain, `[2, N, feat_dim]` on the CPU."""
    features: Tensor
    positions: int
    embedded: Tensor


def encode(classifier: Classifier, images: np.ndarray, autocast: Callable, views: int = 1,
           members: np.ndarray | None = None, batch_size: int = 64) -> Encoded:
    """Encodes every image of a uint8 array `[n, C, S, S]`, or those of `members`."""
    model, head, layer = classifier.encoder, classifier.head, classifier.layer
    device = classifier.device
    model.eval()
    features, embedded, start = None, [], 0
    members = np.arange(len(images)) if members is None else members
    parts = np.array_split(members, -(-len(members) // batch_size))
    with torch.no_grad():
        coming = cache.fetch(images, parts, device)
        for batch in tqdm(coming, "encoding", len(parts), disable=None):
            plain, *crops = [transforms.eval_transform(batch, classifier.normalization, *view)
                             for view in VIEWS[:views]]
            with autocast():
                taps = model(plain, layer)
                embedded.append(torch.stack(model.embed(taps, layer)).float().cpu())
                pooled = [head.pool(*taps), *map(classifier.features, crops)]
            if features is None:
                positions = head.pooling(taps[0]).shape[2:].numel()
                features = torch.empty(views, len(members), pooled[0].shape[1], device=device)
            for of_view, rows in zip(features, pooled):
                of_view[start:start + len(batch)] = rows
            start += len(batch)
    return Encoded(features, positions, torch.cat(embedded, 1))


class Recipe(NamedTuple):
    """How heads on a frozen encoder are found. solver: 'lbfgs': those that minimise the loss with
    the penalty --l2; 'sgd': trained by SGD, from those (start: 'probe'), from zeros or from random
    ones; views: of a training image; rates: of which inner folds choose one, and the number of
    epochs."""
    solver: str = "lbfgs"
    views: int = 2
    loss: str = "crossentropy"
    start: str = "random"
    rates: list | None = None


class Frozen(NamedTuple):
    """Heads trained on a frozen encoder, and what they were trained on."""
    heads: FoldHeads
    task: Task
    encoded: Encoded
    probabilities: np.ndarray  # [N, C], NaN where none of these heads holds the clip out
    l2: list | None  # penalty of each fold's head
    choices: dict | None  # fold → what was chosen for it
    history: Tensor | None  # int16 [E, N], the prediction of every clip after each epoch
    regression: logistic.Regression | None  # that solved the heads

    def notes(self, members: np.ndarray) -> dict:
        """What results say of these held-out clips of one fold besides."""
        if self.history is not None:
            return {"history": self.history[:, members].t().tolist()}
        return {"choice": self.choices[self.task.fold_of[members[0]]]}

    def weights_of(self, clip: int, label: int) -> Tensor:
        """The weights `[D]` of a class in the head that holds a clip out."""
        place = self.task.held_out.index(self.task.fold_of[clip])
        return self.heads.plain()[0][place, label]


def train_frozen(opt: argparse.Namespace, classifier: Classifier, data: Data, folds: Folds,
                 held_out: list, recipe: Recipe, log: Log, name: str | None) -> Frozen:
    """Encodes every clip with a classifier's encoder and trains the heads of the folds `held_out`;
    one that no clip has holds nothing out. log, name: where epochs or penalties are written."""
    clips = data.clips
    autocast = devices.mixed_precision(opt.amp, classifier.device).autocast
    with checkpoint.frozen(classifier.encoder):
        encoded = encode(classifier, data.images, autocast, recipe.views)
    names = [[*folds.names, "all"][f] for f in held_out]
    task = Task(encoded.features, clips.labels, clips.n_label, folds.of, held_out)
    choice = choices = history = initial = regression = None
    if recipe.solver == "lbfgs" or recipe.start == "probe":
        regression = logistic.Regression(task.features, task.labels, task.n_label)
        heads, choice = fold_heads.solve(task, opt.l2, inner_groups(clips), recipe.loss,
                                         regression=regression)
        print(choice.describe(opt.l2 is not None))
    if recipe.solver == "lbfgs":
        for number, tried in enumerate(choice.tried, 1):
            log.epoch(number, tried, name)
        choices = {fold: {"l2": l2, **({} if uf1 is None else {"inner_uf1": uf1})}
                   for fold, l2, uf1 in zip(held_out, choice.l2, choice.uf1)}
    else:
        if recipe.start == "probe":
            initial = heads.weight.detach(), heads.bias.detach()
        elif recipe.start == "zero":
            initial = [torch.zeros(len(names), clips.n_label, *shape)
                       for shape in ((task.features.shape[-1],), ())]
        inner = recipe.rates and descent.InnerFolds(names, task, inner_groups(clips), recipe.rates)
        heads, history = descent.descend(descent.start(
            opt, task, encoded.positions, names, recipe.loss, inner, initial, choice and choice.l2),
            log, name)
        if inner:
            choices = {fold: inner.chosen(fold) for fold in held_out}
    return Frozen(heads, task, encoded, fold_heads.predict(heads, task), choice and choice.l2,
                  choices, history, regression)


class Start:
    """The features that an encoder gives before it is tuned, under so many views, from which heads
    start; those of the last encoder are kept."""

    def __init__(self, opt: argparse.Namespace, data: Data, views: int):
        self.opt, self.data, self.views, self.source = opt, data, views, None

    def encode(self, source: object, classifier: Classifier) -> None:
        """Encodes every clip, unless those of the same `source` are there."""
        if source != self.source:
            self.source, self.encoded, self.regression = source, None, None
            autocast = devices.mixed_precision(self.opt.amp, classifier.device).autocast
            self.encoded = encode(classifier, self.data.images, autocast, self.views)
            if self.opt.head == "probe":
                clips = self.data.clips
                self.regression = logistic.Regression(self.encoded.features, clips.labels,
                                                      clips.n_label)

    def fit(self, head: torch.nn.Module, out: np.ndarray) -> tuple[int, float | None]:
        """Fits `head` to the clips but those `out`: their statistics and, with --head probe, the
        solved weights. Returns (mean squared length of what it sees, penalty or None)."""
        opt, clips, features = self.opt, self.data.clips, self.encoded.features
        fold_of = np.zeros(len(clips), int)
        fold_of[out] = 1
        task, l2 = Task(features, clips.labels, clips.n_label, fold_of, [1]), None
        stats = logistic.statistics(features, task.training())
        length = int(stats.varies.sum())
        state = {"mean": stats.mean[0], "std": stats.std[0],
                 "classifier.weight": head.classifier.weight / length ** 0.5}
        if opt.head == "probe":
            heads, choice = fold_heads.solve(
                task, opt.l2, inner_groups(clips),
                "balanced" if opt.loss == "balanced" or opt.oversample else "crossentropy",
                regression=self.regression)
            print(choice.describe(opt.l2 is not None))
            l2 = choice.l2[0]
            state = heads.state(0)
        elif opt.head == "zero":
            state["classifier.weight"] = torch.zeros_like(head.classifier.weight)
        head.load_state_dict({**head.state_dict(), **state})
        return length, l2
