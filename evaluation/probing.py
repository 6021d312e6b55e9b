"""Linear heads on a frozen encoder: features once, then the heads of all folds in one pass.

A frozen encoder gives the same features in every epoch and for every held-out subject, so each
image is encoded once per augmented view. Every head sees them centred and scaled with the
statistics of its own training clips: most of an encoder's feature is what all clips have in
common. `solve_heads` finds the heads of all folds as logistic regressions; `descend` trains
them by SGD, as one weight tensor `[F, C, D]` over shared batches: a fold's loss is the mean over
the batch's clips that it does not hold out, and a batch with none of those leaves it untouched.
"""
import argparse
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dataset
from dataset import ClipSet, Data, Folds
from evaluation import logistic, measures
from images import cache, transforms
from models.classifier import Classifier
from training import checkpoint, epochs
from training.losses import class_weights, classification_loss
from training.options import PENALTIES
from training.record import Log
from util import BadInput

FEW = 1e-3  # where there are too few subjects to choose
INNER_FOLDS = 5  # groups of training subjects that choose penalty, epochs and learning rate

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


class Task(NamedTuple):
    """Clips whose classes the heads of several folds tell apart: features `[V, N, D]`, labels int64
    `[N]`, fold of each clip `[N]`, and the fold that each head must not see, `[F]`."""
    features: Tensor
    labels: np.ndarray
    n_label: int
    fold_of: np.ndarray
    held_out: list

    def training(self) -> Tensor:
        """bool `[N, F]`: the clips that each head trains on."""
        return torch.as_tensor(self.fold_of)[:, None] != torch.as_tensor(np.asarray(self.held_out))


class FoldHeads:
    """The linear heads of several folds on features standardised for each.

    names: of the held-out folds `[F]`; stats: logistic.Statistics of their training clips. Initial
    weights follow from (seed, name), normal with deviation 0.01 for features of unit length, so
    that a fold is the same alone, with some, or with all others; or `start`: (weight `[F, C, D]`,
    bias `[F, C]`).
    """

    def __init__(self, names: list, stats: logistic.Statistics, n_label: int, seed: int = 0,
                 start: tuple | None = None):
        self.mean, self.std = stats.mean, stats.std  # [F, D]
        self.length = stats.varies.sum(1)  # mean squared length of what the heads see, [F]
        if start is None:
            drawn = {name: 0.01 * torch.randn(n_label, stats.mean.shape[1],
                                              generator=epochs.generator(
                                                  seed, zlib.crc32(name.encode())))
                     for name in dict.fromkeys(names)}
            # what lies outside the span of the training features stays as it was drawn
            start = (torch.stack([drawn[n] for n in names])
                     / self.length.cpu().clamp(min=1).sqrt().view(-1, 1, 1),
                     torch.zeros(len(names), n_label))
        self.weight, self.bias = (value.to(stats.mean.device).requires_grad_() for value in start)
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


def solve_heads(task: Task, l2: float | None = None, groups: np.ndarray | None = None,
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
    weights = _fold_weights(task, training, loss)
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
    heads = FoldHeads([], stats, task.n_label, start=regression.weights(solution, stats))
    return heads, Choice(chosen, uf1, tried)


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
    weights = _fold_weights(task, inner, loss)
    for l2 in PENALTIES:
        solution = regression.solve(inner, stats, l2, weights, solution, logistic.rough(l2),
                                    logistic.ROUGH_STEPS)
        said = (solution.logits[:len(labels)] + solution.bias).argmax(1).cpu().numpy()
        said = said[np.arange(len(labels))[:, None], which[:, groups].T]  # [N, F]
        uf1.append([_uf1(labels[keep], said[keep, fold], task.n_label)
                    for fold, keep in enumerate(training.t().numpy())])
        tried.append({"l2": l2, "inner_uf1": float(np.mean(uf1[-1])),
                      "train_accuracy": _accuracy(solution, labels, inner)})
    return np.array(uf1)


def _uf1(labels, predictions, n_label):
    return measures.scores(measures.confusion_matrix(labels, predictions, n_label))[0].mean()


def _fold_weights(task, training, loss):
    """Weights of the classes for each fold, `[F, C]`; None but for the balanced loss."""
    if loss != "balanced":
        return None
    return torch.stack([class_weights(task.labels[keep.numpy()], task.n_label)
                        for keep in training.t()])


def _accuracy(solution, labels, training):
    """Accuracy on the training clips, plain view, mean over folds."""
    logits = (solution.logits[:len(labels)] + solution.bias).cpu()
    hits = logits.argmax(1) == torch.as_tensor(labels)[:, None]
    return ((hits & training).sum(0) / training.sum(0)).mean().item()


# ---------------------------------------------------------------- trained by SGD

def rate_scale(lengths: Tensor | int, positions: int) -> Tensor | float:
    """What --learning_rate is multiplied by for features of mean squared length `lengths`.

    SGD on a linear head is stable while rate times squared length is small, and that length
    differs by orders of magnitude between taps and encoders: on AlexNet's layer 5 and four classes
    the published 0.1 diverges. So the rate is understood for features whose channel vector has
    unit length at each of the `positions` of the map, as in normalised LMS (Haykin, "Adaptive
    Filter Theory", ch. 6). The published 0.1 for maps and 30 for a pooled vector fit that.
    """
    return positions / lengths


class Descent:
    """SGD on the heads of a Task, all folds at once.

    positions: of the map the features are flattened from (`rate_scale`); inner: an InnerFolds,
    whose heads these are; l2 `[F]`: the penalty of solved heads goes on, in place of
    opt.weight_decay.
    """

    def __init__(self, heads: FoldHeads, task: Task, positions: int, opt: argparse.Namespace,
                 loss: str = "crossentropy", inner: "InnerFolds | None" = None,
                 l2: list | None = None):
        device = task.features.device
        self.heads, self.task, self.opt, self.loss = heads, task, opt, loss
        self.training, self.labels = task.training(), torch.as_tensor(task.labels)
        self.rates = torch.full((len(task.held_out),), opt.learning_rate, device=device)
        if inner:
            self.training &= torch.from_numpy(inner.allowed)
            self.rates = torch.tensor(inner.rates, device=device)
        weights = _fold_weights(task, self.training, loss)
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
            rate = epochs.scheduled(opt, self.rates, epoch, step, len(parts))
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


class InnerFolds:
    """Choice of epochs and learning rate for each held-out fold by inner folds over the clips it
    trains on (nested cross-validation; Cawley and Talbot, JMLR 2010).

    Every outer fold has, for each rate, one head that trains on all its clips and one per inner
    group that leaves this group out as well. The inner heads' predictions for the groups they left
    out, pooled, give a UF1 per epoch and rate; the highest one (the earliest epoch, then the first
    rate, where several are equal) decides which state of the outer head predicts the held-out
    clips: `best` keeps its weights. The labels of the held-out clips never enter.

    names: of the outer folds that `task` holds out; groups: inner group of each clip `[N]`; rates:
    `[R]`. `names`, `task`, `rates` `[H]` and `allowed` `[N, H]` describe the H = F (1 + J) R heads.
    """

    def __init__(self, names: list, task: Task, groups: np.ndarray, rates: list):
        self.outer, self.groups, self.choices = list(task.held_out), groups, list(rates)
        self.shape = len(self.outer), 1 + int(groups.max()) + 1, len(self.choices)
        fold, group, rate = (a.ravel() for a in np.indices(self.shape))
        self.names = [names[i] for i in fold]
        self.task = task._replace(held_out=np.array(self.outer)[fold].tolist())
        self.rates = np.array(self.choices, np.float32)[rate].tolist()
        self.allowed = groups[:, None] != group - 1  # the first of 1 + J leaves no group out
        if not (torch.from_numpy(self.allowed) & self.task.training()).any(0).all():
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
            uf1 = [_uf1(labels[inside], predicted[inside, place, r], self.task.n_label)
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


# ---------------------------------------------------------------- an encoder's heads

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
    autocast = epochs.mixed_precision(opt.amp, classifier.device).autocast
    with checkpoint.frozen(classifier.encoder):
        encoded = encode(classifier, data.images, autocast, recipe.views)
    names = [[*folds.names, "all"][f] for f in held_out]
    task = Task(encoded.features, clips.labels, clips.n_label, folds.of, held_out)
    choice = choices = history = initial = regression = None
    if recipe.solver == "lbfgs" or recipe.start == "probe":
        regression = logistic.Regression(task.features, task.labels, task.n_label)
        heads, choice = solve_heads(task, opt.l2, inner_groups(clips), recipe.loss,
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
        inner = InnerFolds(names, task, inner_groups(clips), recipe.rates) if recipe.rates else None
        descent = start_descent(opt, task, encoded.positions, names, recipe.loss, inner, initial,
                                choice and choice.l2)
        heads, history = descend(descent, log, name, inner)
        if inner:
            choices = {fold: inner.chosen(fold) for fold in held_out}
    return Frozen(heads, task, encoded, predict(heads, task), choice and choice.l2, choices,
                  history, regression)


def start_descent(opt: argparse.Namespace, task: Task, positions: int, names: list, loss: str,
                  inner: InnerFolds | None, initial: tuple | None, l2: list | None) -> Descent:
    """The Descent of fresh heads, or from `initial` ones, of the folds `names`."""
    wanted = inner.task if inner else task
    training = wanted.training()
    if inner:
        training &= torch.from_numpy(inner.allowed)
    heads = FoldHeads(inner.names if inner else names,
                      logistic.statistics(task.features, training), task.n_label, opt.seed, initial)
    return Descent(heads, wanted, positions, opt, loss, inner, l2)


def descend(descent: Descent, log: Log, name: str | None,
            inner: InnerFolds | None) -> tuple[FoldHeads, Tensor | None]:
    """Runs a Descent to its end: the heads, and the predictions int16 `[E, N]` of held-out clips
    after each epoch, to know what picking an epoch by them would add; None with inner folds."""
    opt, heads, task = descent.opt, descent.heads, descent.task
    history = torch.full((opt.epochs, len(task.labels)), -1, dtype=torch.int16)

    def train(epoch, within, on_step):
        means = descent.epoch(epoch)
        on_step({})
        if inner:
            inner.follow(epoch, heads)
            return means
        said = predict(heads, task)
        history[epoch - 1] = torch.from_numpy(np.where(np.isnan(said[:, 0]), -1, said.argmax(1)))
        return means | {"learning_rate": epochs.scheduled(opt, opt.learning_rate, epoch, 1, 1)}
    epochs.Loop(opt, log, name).run(train)
    if inner:
        inner.keep_best(heads)
    return heads, None if inner else history


class Start:
    """The features that an encoder gives before it is tuned, under so many views, from which heads
    start; those of the last encoder are kept."""

    def __init__(self, opt: argparse.Namespace, data: Data, views: int):
        self.opt, self.data, self.views, self.source = opt, data, views, None

    def encode(self, source: object, classifier: Classifier) -> None:
        """Encodes every clip, unless those of the same `source` are there."""
        if source != self.source:
            self.source, self.encoded, self.regression = source, None, None
            autocast = epochs.mixed_precision(self.opt.amp, classifier.device).autocast
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
            heads, choice = solve_heads(
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
