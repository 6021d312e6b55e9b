"""The linear heads of many folds on the same features: drawn or solved, and what they predict.

Every head sees features centred and scaled with the statistics of its own training clips: most of
an encoder's feature is what all clips have in common. `solve` finds the heads of all folds as
logistic regressions; evaluation.descent trains them by SGD.
"""
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dataset
from dataset import ClipSet
from evaluation import logistic, measures
from training import epochs
from training.losses import class_weights
from training.options import PENALTIES

FEW = 1e-3  # where there are too few subjects to choose
INNER_FOLDS = 5  # groups of training subjects that choose penalty, epochs and learning rate


class Task(NamedTuple):
    """Clips whose classes the heads of several folds tell apart: features `[V, N, D]`, labels int64
    `[N]`, fold of each clip `[N]`, and the fold that each head must not see, `[F]`; allowed, bool
    `[N, F]`: the clips that it may see besides [all]."""
    features: Tensor
    labels: np.ndarray
    n_label: int
    fold_of: np.ndarray
    held_out: list
    allowed: np.ndarray | None = None

    def training(self) -> Tensor:
        """bool `[N, F]`: the clips that each head trains on."""
        training = self.fold_of[:, None] != np.asarray(self.held_out)
        return torch.from_numpy(training if self.allowed is None else training & self.allowed)


class FoldHeads:
    """The linear heads of several folds: weight `[F, C, D]` and bias `[F, C]` on features that are
    standardised for each by `stats`, the logistic.Statistics of its training clips."""

    def __init__(self, stats: logistic.Statistics, weight: Tensor, bias: Tensor):
        self.mean, self.std = stats.mean, stats.std  # [F, D]
        self.length = stats.varies.sum(1)  # mean squared length of what the heads see, [F]
        self.weight, self.bias = (value.to(stats.mean.device).requires_grad_()
                                  for value in (weight, bias))
        self.moments = [torch.zeros_like(p) for p in (self.weight, self.bias)]

    def plain(self) -> tuple[Tensor, Tensor]:
        """The same heads for features that are not standardised: (weight, bias)."""
        weight = self.weight / self.std[:, None]
        return weight, self.bias - (weight * self.mean[:, None]).sum(2)

    def state(self, place: int) -> dict:
        """The state_dict of one of them as a LinearClassifier."""
        return {"mean": self.mean[place], "std": self.std[place],
                "classifier.weight": self.weight[place].detach(),
                "classifier.bias": self.bias[place].detach()}

    def __call__(self, features: Tensor) -> Tensor:
        """`[B, D]` → logits `[B, F, C]`"""
        weight, bias = self.plain()
        return torch.addmm(bias.flatten(), features, weight.flatten(0, 1).t()).unflatten(
            1, bias.shape)

    def step(self, loss: Tensor, touched: Tensor, rate: Tensor, momentum: float,
             decays: tuple) -> None:
        """One SGD step as torch.optim.SGD's, on the folds `touched` (bool `[F]`) alone, each at
        its own `rate` `[F]`; decays: of weight and bias, each a number or `[F, 1, ...]`."""
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            for value, moment, gradient, decay in zip((self.weight, self.bias), self.moments,
                                                      gradients, decays):
                rates = rate.view(-1, *[1] * (value.dim() - 1))
                gradient.add_(value * decay)
                if touched.all():
                    value.addcmul_(moment.mul_(momentum).add_(gradient), rates, value=-1)
                else:
                    moment[touched] = moment[touched] * momentum + gradient[touched]
                    value[touched] -= rates[touched] * moment[touched]


def draw(names: list, stats: logistic.Statistics, n_label: int, seed: int = 0) -> FoldHeads:
    """Heads of the held-out folds `names` `[F]` that have learnt nothing.

    Weights follow from (seed, name), normal with deviation 0.01 for features of unit length, so
    that a fold is the same alone, with some, or with all others.
    """
    of = {name: 0.01 * torch.randn(n_label, stats.mean.shape[1], generator=epochs.generator(
        seed, zlib.crc32(name.encode()))) for name in dict.fromkeys(names)}
    length = stats.varies.sum(1).cpu().clamp(min=1).sqrt().view(-1, 1, 1)
    # what lies outside the span of the training features stays as it was drawn
    return FoldHeads(stats, torch.stack([of[name] for name in names]) / length,
                     torch.zeros(len(names), n_label))


def predict(heads: FoldHeads, task: Task) -> np.ndarray:
    """Probabilities `[N, C]` of every clip from the head that holds it out, plain view alone.

    NaN for clips that no head holds out.
    """
    features = task.features
    probabilities = np.full((features.shape[1], heads.bias.shape[1]), np.nan)
    with torch.no_grad():
        weight, bias = heads.plain()
        for position, fold in enumerate(task.held_out):
            members = np.flatnonzero(task.fold_of == fold)
            logits = torch.addmm(bias[position], features[0, members], weight[position].t())
            probabilities[members] = logits.softmax(-1).cpu().numpy()
    return probabilities


# ---------------------------------------------------------------- solved

class Choice(NamedTuple):
    """What was tried for the heads of all folds, strongest penalty first."""
    l2: list  # of each fold
    uf1: list  # of each fold, on its inner folds; None where nothing was chosen
    tried: list  # a dict per penalty: l2, train_accuracy and, of inner folds, inner_uf1

    def describe(self, given: bool) -> str:
        """Which penalty the heads have; given: it was not to be chosen."""
        low, high = min(self.l2), max(self.l2)
        return f"heads solved with --l2 {low:g}" + (f" to {high:g}" if high > low else "") \
            + ("" if given or self.uf1[0] is None else ", chosen by inner folds")


def inner_groups(clips: ClipSet) -> np.ndarray:
    """The group `[N]` of each clip in the inner folds, which are whole subjects."""
    # stratified, the labels of a held-out clip would move training subjects between groups
    return dataset.subject_groups(clips, INNER_FOLDS, stratified=False).of


def solve(task: Task, l2: float | None = None, groups: np.ndarray | None = None,
          loss: str = "crossentropy", tolerance: float = logistic.TOLERANCE,
          regression: logistic.Regression | None = None) -> tuple[FoldHeads, Choice]:
    """The heads that minimise the penalised loss.

    l2: the penalty, or None: that of PENALTIES with the highest UF1 over inner folds (`groups`
    `[N]`) of the fold's training clips, the stronger one where several are equal; loss:
    crossentropy or balanced; tolerance: bound on the error of a logit; regression: of these
    features and labels, where it is there already. The labels of held-out clips never enter.
    """
    regression = regression or logistic.Regression(task.features, task.labels, task.n_label)
    training = task.training()
    stats = logistic.statistics(task.features, training)
    weights = class_weights_of(task, training, loss)
    if l2 is None and not _inner(training, groups).any(0).all():
        l2 = FEW
        print(f"too few subjects for inner folds: --l2 {l2:g}")
    folds = len(task.held_out)
    chosen, tried, uf1 = [l2] * folds, [], [None] * folds
    if l2 is None:
        measured = _inner_uf1(regression, task, groups, loss, tried)
        chosen, uf1 = [PENALTIES[i] for i in measured.argmax(0)], measured.max(0).tolist()
    solution = regression.solve(training, stats, torch.tensor(chosen) if l2 is None else l2,
                                weights, tolerance=tolerance)
    if not tried:
        tried.append({"l2": l2, "train_accuracy": _accuracy(solution, task.labels, training)})
    return FoldHeads(stats, *regression.weights(solution, stats)), Choice(chosen, uf1, tried)


def _inner(training, groups):
    """Training clips of the inner folds, which leave a group out as well, bool `[N, F J]`."""
    inside = torch.as_tensor(groups)[:, None] != torch.arange(int(groups.max()) + 1)
    return (training[:, :, None] & inside[:, None]).flatten(1)


def _inner_uf1(regression, task, groups, loss, tried):
    """UF1 over the inner folds of every fold for each of the PENALTIES, `[P, F]`; a line on each
    goes to `tried`."""
    training, labels, n_groups = task.training(), task.labels, int(groups.max()) + 1
    # a fold within the group that an inner one leaves out changes nothing: others have it as well
    inner, which = np.unique(_inner(training, groups).numpy(), axis=1, return_inverse=True)
    inner, which = torch.from_numpy(inner), which.reshape(-1, n_groups)  # [N, I], [F, J]
    stats, uf1, solution = logistic.statistics(task.features, inner), [], None
    weights = class_weights_of(task, inner, loss)
    for l2 in PENALTIES:
        solution = regression.solve(inner, stats, l2, weights, solution, logistic.rough(l2),
                                    logistic.ROUGH_STEPS)
        said = (solution.logits[:len(labels)] + solution.bias).argmax(1).cpu().numpy()
        said = said[np.arange(len(labels))[:, None], which[:, groups].T]  # [N, F]
        uf1.append([uf1_of(labels[keep], said[keep, fold], task.n_label)
                    for fold, keep in enumerate(training.t().numpy())])
        tried.append({"l2": l2, "inner_uf1": float(np.mean(uf1[-1])),
                      "train_accuracy": _accuracy(solution, labels, inner)})
    return np.array(uf1)


def uf1_of(labels: np.ndarray, predictions: np.ndarray, n_label: int) -> float:
    """UF1 of predictions."""
    return measures.scores(measures.confusion_matrix(labels, predictions, n_label))[0].mean()


def class_weights_of(task: Task, training: Tensor, loss: str) -> Tensor | None:
    """Weights of the classes for each fold, whose clips are `training`, `[F, C]`; None but for the
    balanced loss."""
    if loss != "balanced":
        return None
    return torch.stack([class_weights(task.labels[keep.numpy()], task.n_label)
                        for keep in training.t()])


def _accuracy(solution, labels, training):
    """Accuracy on the training clips, plain view, mean over folds."""
    logits = (solution.logits[:len(labels)] + solution.bias).cpu()
    hits = logits.argmax(1) == torch.as_tensor(labels)[:, None]
    return ((hits & training).sum(0) / training.sum(0)).mean().item()
