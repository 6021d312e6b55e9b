"""The heads of many folds trained by SGD, as one weight tensor `[F, C, D]` over shared batches: a
fold's loss is the mean over the batch's clips that it trains on, and a batch with none of those
leaves it untouched.
"""
import argparse

import numpy as np
import torch
from torch import Tensor

from evaluation import logistic
from evaluation.fold_heads import FoldHeads, Task, class_weights_of, draw, predict, uf1_of
from training import epochs, schedules
from training.losses import classification_loss
from training.record import Log
from util import BadInput


def rate_scale(lengths: Tensor | int, positions: int) -> Tensor | float:
    """What --learning_rate is multiplied by for features of mean squared length `lengths`.

    SGD on a linear head is stable while rate times squared length is small, and that length
    differs by orders of magnitude between taps and encoders: on AlexNet's layer 5 and four classes
    the published 0.1 diverges. So the rate is understood for features whose channel vector has
    unit length at each of the `positions` of the map, as in normalised LMS (Haykin, "Adaptive
    Filter Theory", ch. 6). The published 0.1 for maps and 30 for a pooled vector fit that.
    """
    # of nothing but features that do not vary any rate does
    return positions / (lengths.clamp(min=1) if isinstance(lengths, Tensor) else max(lengths, 1))


class InnerFolds:
    """Choice of epochs and learning rate for each held-out fold by inner folds over the clips it
    trains on (nested cross-validation; Cawley and Talbot, JMLR 2010).

    Every outer fold has, for each rate, one head that trains on all its clips and one per inner
    group that leaves this group out as well. The inner heads' predictions for the groups they left
    out, pooled, give a UF1 per epoch and rate; the highest one (the earliest epoch, then the first
    rate, where several are equal) decides which state of the outer head predicts the held-out
    clips: `best` keeps its weights. The labels of the held-out clips never enter.

    names: of the outer folds that `task` holds out; groups: inner group of each clip `[N]`; rates:
    `[R]`. `names`, `task` and `rates` `[H]` describe the H = F (1 + J) R heads.
    """

    def __init__(self, names: list, task: Task, groups: np.ndarray, rates: list):
        self.outer, self.groups, self.choices = list(task.held_out), groups, list(rates)
        self.shape = len(self.outer), 1 + int(groups.max()) + 1, len(self.choices)
        fold, group, rate = (a.ravel() for a in np.indices(self.shape))
        self.names = [names[i] for i in fold]
        self.task = task._replace(
            held_out=np.array(self.outer)[fold].tolist(),
            allowed=groups[:, None] != group - 1)  # the first of 1 + J leaves no group out
        self.rates = np.array(self.choices, np.float32)[rate].tolist()
        if not self.task.training().any(0).all():
            raise BadInput("--select inner: too few subjects; it takes three, or --select fixed")
        n_folds = len(self.outer)
        self.best = {"uf1": torch.full((n_folds,), -1.0, dtype=torch.float64),
                     "epoch": torch.zeros(n_folds, dtype=torch.long),
                     "rate": torch.zeros(n_folds, dtype=torch.long)}

    @torch.no_grad()
    def follow(self, epoch: int, heads: FoldHeads) -> None:
        """After an epoch: keeps the outer heads of the folds whose inner UF1 has risen."""
        plain, labels, (n_folds, parts, n_rates) = (
            self.task.features[0], self.task.labels, self.shape)
        for name, value in (("weight", heads.weight), ("bias", heads.bias)):
            self.best.setdefault(name, value.new_zeros(n_folds, *value.shape[1:]))
        weight, bias = (value.view(*self.shape, *value.shape[1:]) for value in heads.plain())
        predicted = np.empty((len(plain), n_folds, n_rates), np.int64)
        for part in range(1, parts):
            rows = np.flatnonzero(self.groups == part - 1)
            logits = torch.addmm(bias[:, part].reshape(-1), plain[rows],
                                 weight[:, part].reshape(-1, plain.shape[1]).t())
            predicted[rows] = logits.view(len(rows), n_folds, n_rates, -1).argmax(-1).cpu().numpy()
        for place, fold in enumerate(self.outer):
            inside = self.task.fold_of != fold
            uf1 = [uf1_of(labels[inside], predicted[inside, place, r], self.task.n_label)
                   for r in range(n_rates)]
            rate = int(np.argmax(uf1))
            if uf1[rate] > self.best["uf1"][place] + 1e-12:
                for name, value in (("uf1", uf1[rate]), ("epoch", epoch), ("rate", rate)):
                    self.best[name][place] = value
                for name, value in (("weight", heads.weight), ("bias", heads.bias)):
                    self.best[name][place] = value.view(*self.shape, *value.shape[1:])[
                        place, 0, rate]

    def keep_best(self, heads: FoldHeads) -> None:
        """Leaves in `heads` the outer fold's heads alone, in the state that was chosen."""
        heads.weight, heads.bias = (self.best[name].to(heads.weight.device)
                                    for name in ("weight", "bias"))
        heads.mean, heads.std = (value.view(*self.shape, -1)[:, 0, 0]
                                 for value in (heads.mean, heads.std))

    def chosen(self, fold: int) -> dict:
        """What was chosen for an outer fold: {epochs, learning_rate, inner_uf1}."""
        place = self.outer.index(fold)
        return {"epochs": int(self.best["epoch"][place]),
                "learning_rate": self.choices[int(self.best["rate"][place])],
                "inner_uf1": float(self.best["uf1"][place])}


class Descent:
    """SGD on the heads of a Task, all folds at once.

    positions: of the map the features are flattened from (`rate_scale`); inner: an InnerFolds,
    whose heads these are; l2 `[F]`: the penalty of solved heads goes on, in place of
    opt.weight_decay.
    """

    def __init__(self, heads: FoldHeads, task: Task, positions: int, opt: argparse.Namespace,
                 loss: str = "crossentropy", inner: InnerFolds | None = None,
                 l2: list | None = None):
        device = task.features.device
        self.heads, self.task, self.opt, self.loss = heads, task, opt, loss
        self.inner = inner
        self.training, self.labels = task.training(), torch.as_tensor(task.labels)
        self.rates = torch.full((len(task.held_out),), opt.learning_rate, device=device)
        if inner:
            self.rates = torch.tensor(inner.rates, device=device)
        weights = class_weights_of(task, self.training, loss)
        self.weights = None if weights is None else weights.to(device)
        epochs.announce_dropped(len(self.labels), opt.batch_size)
        self.scale = rate_scale(heads.length, positions)
        self.decays = (opt.weight_decay,) * 2 if l2 is None else \
            ((torch.tensor(l2, device=device) * heads.length).view(-1, 1, 1), 0)
        given = ", ".join(f"{r:g}" for r in (inner.choices if inner else [opt.learning_rate]))
        print(f"learning rate of the heads: {given} x {self.scale.mean():.3g}, for features of "
              f"mean squared length {heads.length.float().mean():.4g} on {positions} positions")

    def epoch(self, epoch: int) -> dict:
        """One epoch; the mean `train_loss` and `train_accuracy` over clips and folds. Raises
        RunFailed if a loss is not finite."""
        heads, opt, features = self.heads, self.opt, self.task.features
        rng = epochs.generator(opt.seed, epoch)
        means = epochs.Meters(("train_loss", "train_accuracy"))
        view = torch.randint(len(features), (len(self.labels),), generator=rng)
        parts = epochs.batches(len(self.labels), opt.batch_size, rng)
        for step, index in enumerate(parts, 1):
            mask = self.training[index].to(features.device)  # [B, F]
            target = self.labels[index].to(features.device)[:, None].expand_as(mask)
            logits = heads(features[view[index], index])
            each = classification_loss(logits, target, self.loss, self.weights) * mask
            count = mask.sum(0)
            total = (each.sum(0) / count.clamp(min=1)).sum()
            epochs.check_loss(total, epoch, step,
                              f"lower --learning_rate, now {opt.learning_rate:g}")
            rate = schedules.scheduled(opt, self.rates, epoch, step, len(parts))
            heads.step(total, count > 0, rate * self.scale, opt.momentum, self.decays)
            seen = int(mask.sum())
            if seen:
                hits = ((logits.argmax(-1) == target) & mask).sum() / seen
                means.add((each.detach().sum() / seen, hits), seen)
        return means.means()

    def run(self) -> None:
        """All epochs."""
        for epoch in range(1, self.opt.epochs + 1):
            self.epoch(epoch)


def start(opt: argparse.Namespace, task: Task, positions: int, names: list,
          loss: str = "crossentropy", inner: InnerFolds | None = None,
          initial: tuple | None = None, l2: list | None = None) -> Descent:
    """The Descent of fresh heads, or from `initial` ones (weight, bias), of the folds `names`."""
    if inner:
        task, names = inner.task, inner.names
    stats = logistic.statistics(task.features, task.training())
    heads = FoldHeads(stats, *initial) if initial else draw(names, stats, task.n_label, opt.seed)
    return Descent(heads, task, positions, opt, loss, inner, l2)


def descend(descent: Descent, log: Log, name: str | None) -> tuple[FoldHeads, Tensor | None]:
    """Runs a Descent to its end: the heads, and the predictions int16 `[E, N]` of held-out clips
    after each epoch, to know what picking an epoch by them would add; None with inner folds."""
    opt, heads, task, inner = descent.opt, descent.heads, descent.task, descent.inner
    history = torch.full((opt.epochs, len(task.labels)), -1, dtype=torch.int16)

    def train(epoch, within, on_step):
        means = descent.epoch(epoch)
        on_step({})
        if inner:
            inner.follow(epoch, heads)
            return means
        said = predict(heads, task)
        history[epoch - 1] = torch.from_numpy(np.where(np.isnan(said[:, 0]), -1, said.argmax(1)))
        return means | {"learning_rate": schedules.scheduled(opt, opt.learning_rate, epoch, 1, 1)}
    epochs.Loop(opt, log, name).run(train)
    if inner:
        inner.keep_best(heads)
    return heads, None if inner else history
