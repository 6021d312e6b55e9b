"""Linear heads on a frozen encoder: features once, then the heads of all folds in one pass.

A frozen encoder gives the same features in every epoch and for every held-out subject, so each
image is encoded once per augmented view. Every head sees them centred and scaled with the
statistics of its own training clips: most of an encoder's feature is what all clips have in
common. `solve_heads` finds the heads of all folds as logistic regressions; `train_heads` trains
them by SGD, as one weight tensor `[F, C, D]` over shared batches: a fold's loss is the mean over
the batch's clips that it does not hold out, and a batch with none of those leaves it untouched.
"""
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import util
from evaluation import logistic, measures
from images import decoding, transforms

# penalties to choose from, strongest first
GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FEW = 1e-3  # where there are too few subjects to choose

# (mirrored, shift in pixels of 256): the centre crop and its mirror image, then the corners' crops
VIEWS = [(mirror, shift) for shift in ((0, 0), (-16, -16), (16, 16), (-16, 16), (16, -16))
         for mirror in (False, True)]


def encode(model, head, images, normalization, layer, device, autocast, views=1, members=None,
           batch_size=64):
    """Pooled features of every image under the first `views` of VIEWS, float32 `[V, N, D]`; the
    number of positions of the pooled map they are flattened from (1 for a vector); the encoder's
    unit features of both views of every image, plain, `[2, N, feat_dim]` on the CPU.

    images: uint8 array `[n, C, S, S]`; head: gives `pool(feat_rgb, feat_depth)` → `[B, D]`;
    members: indices of the N images [all].
    """
    model.eval()
    features, embedded, start = None, [], 0
    members = np.arange(len(images)) if members is None else members
    parts = np.array_split(members, -(-len(members) // batch_size))
    with torch.no_grad():
        coming = decoding.fetch(images, parts, device)
        for batch in tqdm(coming, "encoding", len(parts), disable=None):
            for v, (mirror, shift) in enumerate(VIEWS[:views]):
                x = transforms.eval_transform(batch, normalization, mirror, shift)
                with autocast():
                    taps = model(x, layer)
                    pooled = head.pool(*taps)
                    if v == 0:
                        embedded.append(torch.stack(model.embed(taps, layer)).float().cpu())
                if features is None:
                    positions = head.pooling(taps[0]).shape[2:].numel()
                    features = torch.empty(views, len(members), pooled.shape[1], device=device)
                features[v, start:start + len(batch)] = pooled.float()
            start += len(batch)
    return features, positions, torch.cat(embedded, 1)


def class_weights(labels, n_label):
    """n / (C n_c) per class, 0 for a class without clips: float32 `[C]`."""
    counts = np.bincount(labels, minlength=n_label)
    weights = np.where(counts > 0, len(labels) / (n_label * np.maximum(counts, 1)), 0)
    return torch.tensor(weights, dtype=torch.float32)


def classification_loss(logits, labels, kind="crossentropy", weights=None):
    """Loss per clip: logits `[..., C]`, labels `[...]` → `[...]`.

    crossentropy; focal: times (1 - p)^2 (Lin et al., "Focal Loss for Dense Object Detection",
    eq. 4 with gamma 2); balanced: cross-entropy times `weights` `[..., C]` of the true class.
    """
    log_p = F.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if kind == "focal":
        return -(1 - log_p.exp()).square() * log_p
    if kind == "balanced":
        return -weights.expand_as(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * log_p
    return -log_p


class FoldHeads:
    """The linear heads of several folds on features standardised for each.

    names: of the held-out folds `[F]`; stats: logistic.Statistics of their training clips. Initial
    weights follow from (seed, name), normal with deviation 0.01 for features of unit length, so
    that a fold is the same alone, with some, or with all others; or `start`: (weight `[F, C, D]`,
    bias `[F, C]`).
    """

    def __init__(self, names, stats, n_label, seed=0, start=None):
        self.mean, self.std = stats.mean, stats.std  # [F, D]
        self.length = stats.varies.sum(1)  # mean squared length of what the heads see, [F]
        if start is None:
            drawn = {name: 0.01 * torch.randn(n_label, stats.mean.shape[1],
                                              generator=util.generator(
                                                  seed, zlib.crc32(name.encode())))
                     for name in dict.fromkeys(names)}
            # what lies outside the span of the training features stays as it was drawn
            start = (torch.stack([drawn[n] for n in names])
                     / self.length.cpu().clamp(min=1).sqrt().view(-1, 1, 1),
                     torch.zeros(len(names), n_label))
        self.weight, self.bias = (value.to(stats.mean.device).requires_grad_() for value in start)
        self.moments = [torch.zeros_like(p) for p in (self.weight, self.bias)]

    def plain(self):
        """The same heads for features that are not standardised: (weight, bias)."""
        weight = self.weight / self.std[:, None]
        return weight, self.bias - (weight * self.mean[:, None]).sum(2)

    def __call__(self, features):
        """`[B, D]` → logits `[B, F, C]`"""
        weight, bias = self.plain()
        return torch.addmm(bias.flatten(), features, weight.flatten(0, 1).t()).unflatten(
            1, bias.shape)

    def step(self, loss, touched, rate, momentum, decays):
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

    def state_dict(self):
        return {"weight": self.weight.detach(), "bias": self.bias.detach(), "mean": self.mean,
                "std": self.std, "weight_moment": self.moments[0], "bias_moment": self.moments[1]}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
        self.mean, self.std, *self.moments = (
            state[name].to(self.weight.device)
            for name in ("mean", "std", "weight_moment", "bias_moment"))


# ---------------------------------------------------------------- solved

class Choice(NamedTuple):
    """What was tried for the heads of all folds, strongest penalty first."""
    l2: list  # of each fold
    uf1: list  # of each fold, on its inner folds; None where nothing was chosen
    tried: list  # a dict per penalty: l2, train_accuracy and, of inner folds, inner_uf1


def training_clips(fold_of, held_out):
    """bool `[N, F]`: the clips (folds `[N]`) that each head, holding a fold out, trains on."""
    return torch.as_tensor(fold_of)[:, None] != torch.as_tensor(np.asarray(held_out))


def solve_heads(regression, features, labels, fold_of, held_out, l2=None, groups=None,
                loss="crossentropy", tolerance=logistic.TOLERANCE):
    """The heads that minimise the penalised loss: (FoldHeads, Choice).

    regression: a logistic.Regression of these features `[V, N, D]` and labels; fold_of `[N]`;
    held_out `[F]`: the fold that each head must not see; l2: the penalty, or None: that of GRID
    with the highest UF1 over inner folds (`groups` `[N]`) of the fold's training clips, the
    stronger one where several are equal; loss: crossentropy or balanced; tolerance: bound on the
    error of a logit. The labels of held-out clips never enter.
    """
    training = training_clips(fold_of, held_out)
    stats = logistic.statistics(features, training)
    weights = _fold_weights(labels, training, regression.n_label, loss)
    if l2 is None and not _inner(training, groups).any(0).all():
        l2 = FEW
        print(f"too few subjects for inner folds: --l2 {l2:g}")
    chosen, tried, uf1 = [l2] * len(held_out), [], [None] * len(held_out)
    if l2 is None:
        found = _inner_uf1(regression, features, labels, training, groups, loss, tried)
        best = found.argmax(0)
        chosen, uf1 = [GRID[i] for i in best], found.max(0).tolist()
    solution = regression.solve(training, stats, torch.tensor(chosen), weights,
                                tolerance=tolerance)
    if not tried:
        tried.append({"l2": l2, "train_accuracy": _accuracy(solution, labels, training)})
    heads = FoldHeads([], stats, regression.n_label, start=regression.weights(solution, stats))
    return heads, Choice(chosen, uf1, tried)


def _inner(training, groups):
    """Training clips of the inner folds, which leave a group out as well, bool `[N, F J]`."""
    inside = torch.as_tensor(groups)[:, None] != torch.arange(int(groups.max()) + 1)
    return (training[:, :, None] & inside[:, None]).flatten(1)


def _inner_uf1(regression, features, labels, training, groups, loss, tried):
    """UF1 over the inner folds of every fold for each penalty of GRID, `[len(GRID), F]`; a line
    on each goes to `tried`."""
    n_groups = int(groups.max()) + 1
    # a fold within the group that an inner one leaves out changes nothing: others have it as well
    inner, which = np.unique(_inner(training, groups).numpy(), axis=1, return_inverse=True)
    inner, which = torch.from_numpy(inner), which.reshape(-1, n_groups)  # [N, I], [F, J]
    stats, found, solution = logistic.statistics(features, inner), [], None
    weights = _fold_weights(labels, inner, regression.n_label, loss)
    for l2 in GRID:
        solution = regression.solve(inner, stats, torch.full((inner.shape[1],), l2), weights,
                                    solution, most=logistic.ROUGH_STEPS,
                                    # logits are the larger, the weaker the penalty
                                    tolerance=logistic.ROUGH * max(1, (FEW / l2) ** 0.5))
        said = (solution.logits[:len(labels)] + solution.bias).argmax(2).cpu().numpy()
        said = said[np.arange(len(labels))[:, None], which[:, groups].T]  # [N, F]
        found.append([measures.scores(measures.confusion_matrix(
            labels[keep], said[keep, fold], regression.n_label))[0].mean()
            for fold, keep in enumerate(training.t().numpy())])
        tried.append({"l2": l2, "inner_uf1": float(np.mean(found[-1])),
                      "train_accuracy": _accuracy(solution, labels, inner)})
    return np.array(found)


def _fold_weights(labels, training, n_label, loss):
    """Weights of the classes for each fold, `[F, C]`; None but for the balanced loss."""
    if loss != "balanced":
        return None
    return torch.stack([class_weights(labels[keep.numpy()], n_label) for keep in training.t()])


def _accuracy(solution, labels, training):
    """Accuracy on the training clips, plain view, mean over folds."""
    logits = (solution.logits[:len(labels)] + solution.bias).cpu()
    hits = logits.argmax(2) == torch.as_tensor(labels)[:, None]
    return ((hits & training).sum(0) / training.sum(0)).mean().item()


# ---------------------------------------------------------------- trained by SGD

def rate_scale(lengths, positions):
    """What --learning_rate is multiplied by for features of mean squared length `lengths`.

    SGD on a linear head is stable while rate times squared length is small, and that length
    differs by orders of magnitude between taps and encoders: on AlexNet's layer 5 and four classes
    the published 0.1 diverges. So the rate is understood for features whose channel vector has
    unit length at each of the `positions` of the map, as in normalised LMS (Haykin, "Adaptive
    Filter Theory", ch. 6). The published 0.1 for maps and 30 for a pooled vector fit that.
    """
    return positions / lengths


def train_heads(heads, features, positions, labels, fold_of, held_out, opt, loss="crossentropy",
                start=0, on_epoch=None, inner=None, l2=None):
    """Trains `heads` on features `[V, N, D]` for epochs start+1 .. opt.epochs.

    positions: of the map the features are flattened from (`rate_scale`); labels: int64 `[N]`;
    fold_of: fold of each clip `[N]`; held_out: the fold each head must not see, `[F]`.
    `on_epoch(epoch, means)` is called after every epoch with the mean `train_loss` and
    `train_accuracy` over clips and folds. inner: an InnerFolds, whose heads these are; l2 `[F]`:
    the penalty of solved heads goes on, in place of opt.weight_decay. Raises util.RunFailed if a
    loss is not finite.
    """
    device, n_label = features.device, heads.bias.shape[1]
    training = training_clips(fold_of, held_out)  # [N, F]
    rates = torch.full((len(held_out),), opt.learning_rate, device=device)
    if inner:
        training &= torch.from_numpy(inner.allowed)
        rates = torch.tensor(inner.rates, device=device)
    weights = _fold_weights(labels, training, n_label, loss)
    weights = None if weights is None else weights.to(device)
    labels = torch.as_tensor(labels)
    util.announce_dropped(len(labels), opt.batch_size)
    scale = rate_scale(heads.length, positions)
    decays = (opt.weight_decay,) * 2 if l2 is None else \
        ((torch.tensor(l2, device=device) * heads.length).view(-1, 1, 1), 0)
    given = ", ".join(f"{r:g}" for r in (inner.choices if inner else [opt.learning_rate]))
    print(f"learning rate of the heads: {given} x {scale.mean():.3g}, for features of mean squared "
          f"length {heads.length.float().mean():.4g} on {positions} positions")
    for epoch in range(start + 1, opt.epochs + 1):
        rng = util.generator(opt.seed, epoch)
        means = {"train_loss": util.AverageMeter(), "train_accuracy": util.AverageMeter()}
        view = torch.randint(len(features), (len(labels),), generator=rng)
        parts = util.batches(len(labels), opt.batch_size, rng)
        for step, index in enumerate(parts, 1):
            mask = training[index].to(device)  # [B, F]
            target = labels[index].to(device)[:, None].expand_as(mask)
            logits = heads(features[view[index], index])
            each = classification_loss(logits, target, loss, weights) * mask
            count = mask.sum(0)
            total = (each.sum(0) / count.clamp(min=1)).sum()
            if not torch.isfinite(total):
                raise util.RunFailed(f"the loss is not finite in epoch {epoch}, step {step}; the "
                                     f"last checkpoint is kept; lower --learning_rate, now "
                                     f"{opt.learning_rate:g}")
            rate = util.scheduled(opt, rates, epoch, step, len(parts))
            heads.step(total, count > 0, rate * scale, opt.momentum, decays)
            seen = int(mask.sum())
            if seen:
                hits = ((logits.argmax(-1) == target) & mask).sum() / seen
                means["train_loss"].update(each.detach().sum() / seen, seen)
                means["train_accuracy"].update(hits, seen)
        if on_epoch:
            on_epoch(epoch, {name: meter.avg for name, meter in means.items()})


def predict(heads, features, fold_of, held_out):
    """Probabilities `[N, C]` of every clip from the head that holds it out, plain view alone.

    NaN for clips that no head holds out.
    """
    found = np.full((features.shape[1], heads.bias.shape[1]), np.nan)
    with torch.no_grad():
        weight, bias = heads.plain()
        for position, fold in enumerate(held_out):
            members = np.flatnonzero(fold_of == fold)
            logits = torch.addmm(bias[position], features[0, members], weight[position].t())
            found[members] = logits.softmax(-1).cpu().numpy()
    return found


class InnerFolds:
    """Choice of epochs and learning rate for each held-out fold by inner folds over the clips it
    trains on (nested cross-validation; Cawley and Talbot, JMLR 2010).

    Every outer fold has, for each rate, one head that trains on all its clips and one per inner
    group that leaves this group out as well. The inner heads' predictions for the groups they left
    out, pooled, give a UF1 per epoch and rate; the highest one (the earliest epoch, then the first
    rate, where several are equal) decides which state of the outer head predicts the held-out
    clips: `state` keeps its weights. The labels of the held-out clips never enter.

    held_out: the outer folds `[F]`; groups: inner group of each clip `[N]`; rates: `[R]`. `names`,
    `held_out`, `rates` `[H]` and `allowed` `[N, H]` describe the H = F (1 + J) R heads.
    """

    def __init__(self, names, labels, n_label, fold_of, held_out, groups, rates):
        self.outer, self.fold_of, self.groups = list(held_out), fold_of, groups
        self.labels, self.n_label, self.choices = labels, n_label, list(rates)
        self.shape = len(self.outer), 1 + int(groups.max()) + 1, len(self.choices)
        fold, group, rate = (a.ravel() for a in np.indices(self.shape))
        self.names = [names[i] for i in fold]
        self.held_out = np.array(self.outer)[fold]
        self.rates = np.array(self.choices, np.float32)[rate].tolist()
        self.allowed = groups[:, None] != group - 1  # the first of 1 + J leaves no group out
        if not (self.allowed & (fold_of[:, None] != self.held_out)).any(0).all():
            raise util.BadInput("--select inner: too few subjects; it takes three, or "
                                "--select fixed")
        n_folds = len(self.outer)
        self.state = {"uf1": torch.full((n_folds,), -1.0, dtype=torch.float64),
                      "epoch": torch.zeros(n_folds, dtype=torch.long),
                      "rate": torch.zeros(n_folds, dtype=torch.long)}

    @torch.no_grad()
    def look(self, epoch, heads, features):
        """After an epoch: keeps the outer heads of the folds whose inner UF1 has risen."""
        plain, (n_folds, parts, n_rates) = features[0], self.shape
        for name, value in (("weight", heads.weight), ("bias", heads.bias)):
            self.state.setdefault(name, value.new_zeros(n_folds, *value.shape[1:]))
        weight, bias = (value.view(*self.shape, *value.shape[1:]) for value in heads.plain())
        predicted = np.empty((len(plain), n_folds, n_rates), np.int64)
        for part in range(1, parts):
            rows = np.flatnonzero(self.groups == part - 1)
            logits = torch.addmm(bias[:, part].reshape(-1), plain[rows],
                                 weight[:, part].reshape(-1, plain.shape[1]).t())
            predicted[rows] = logits.view(len(rows), n_folds, n_rates, -1).argmax(-1).cpu().numpy()
        for place, fold in enumerate(self.outer):
            own = self.fold_of == fold
            uf1 = [measures.scores(measures.confusion_matrix(
                self.labels[~own], predicted[~own, place, r], self.n_label))[0].mean()
                for r in range(n_rates)]
            rate = int(np.argmax(uf1))
            if uf1[rate] > self.state["uf1"][place] + 1e-12:
                for name, value in (("uf1", uf1[rate]), ("epoch", epoch), ("rate", rate)):
                    self.state[name][place] = value
                for name, value in (("weight", heads.weight), ("bias", heads.bias)):
                    self.state[name][place] = value.view(*self.shape, *value.shape[1:])[
                        place, 0, rate]

    def keep_best(self, heads):
        """Leaves in `heads` the outer fold's heads alone, in the state that was chosen."""
        heads.weight, heads.bias = (self.state[name].to(heads.weight.device)
                                    for name in ("weight", "bias"))
        heads.mean, heads.std = (value.view(*self.shape, -1)[:, 0, 0]
                                 for value in (heads.mean, heads.std))

    def chosen(self, fold):
        """What was chosen for an outer fold: {epochs, learning_rate, inner_uf1}."""
        place = self.outer.index(fold)
        return {"epochs": int(self.state["epoch"][place]),
                "learning_rate": self.choices[int(self.state["rate"][place])],
                "inner_uf1": float(self.state["uf1"][place])}
