"""Multinomial logistic regression with an L2 penalty: the heads of many folds in one pass.

A fold's head minimises, over the clips it trains on and all their views,

    mean cross-entropy + l2 / 2 · (D' · squared norm of the weights),

the features centred and scaled with the statistics of those clips; D' is their mean squared
length after that, the number of features that vary. So l2 means the same at every tap and with
any number of clips; scikit-learn calls C what is 1 / (l2 D' rows) here.

The minimum lies in the span of the training features (Kimeldorf and Wahba 1971), so that a head
is a coefficient per row and class: nothing of a fold is as large as the features. Folds differ in
which rows count, and in the scale of each feature, which enters between the two factors of the
kernel. All are minimised together by L-BFGS (Nocedal and Wright, "Numerical Optimization", alg.
7.4) in the inner product of the features, preconditioned with the curvature 1/4 of the logistic
loss on one eigendecomposition of all rows: a matter of some ten steps.
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

MEMORY = 10  # pairs of steps and gradient changes that L-BFGS keeps
MOST_STEPS = 500
PROBLEMS = 512  # heads solved at a time: bounds the memory
CONSTANT = 1e-10  # a feature of a smaller share of variance in its mean square does not vary


class Statistics(NamedTuple):
    """Of each fold's training features: `mean`, `std` float32 `[F, D]`, the deviation being 1 for
    a feature that does not vary; `varies` bool `[F, D]`."""
    mean: torch.Tensor
    std: torch.Tensor
    varies: torch.Tensor


def statistics(features, training, block=1024):
    """Statistics of features `[V, N, D]` over all views of the clips `training` (bool `[N, F]`),
    all folds in one pass over blocks of features."""
    weights = (training.double() / training.sum(0)).t().to(features.device)  # [F, N]
    parts = []
    for part in features.split(block, dim=2):
        part = part.double()
        centre = part.mean((0, 1))
        part = part - centre  # else the variance would be a small difference of large numbers
        mean = weights @ part.mean(0)
        square = weights @ part.square().mean(0)
        variance = square - mean.square()
        varies = variance > CONSTANT * square
        parts.append(((mean + centre).float(), variance.clamp(min=0).sqrt().float()
                      .masked_fill(~varies, 1), varies))
    return Statistics(*(torch.cat(found, 1) for found in zip(*parts)))


class Solution(NamedTuple):
    """Heads of P folds as coefficients of the rows; `logits` of every row `[V N, P, C]`."""
    alpha: torch.Tensor  # [V N, P, C], near 0 in rows outside the fold
    logits: torch.Tensor  # without the bias
    bias: torch.Tensor  # [P, C]


class Regression:
    """The problem for features `[V, N, D]` with labels int64 `[N]`; see the module.

    `solve` takes any set of folds of these clips, `weights` turns a solution into heads. Double
    precision: with a weak penalty the loss is too flat for single precision.
    """

    def __init__(self, features, labels, n_label):
        views, count, dim = features.shape
        self.n_label, self.views, self.device = n_label, views, features.device
        self.target = F.one_hot(torch.as_tensor(labels), n_label).double().repeat(views, 1)[
            :, None].to(self.device)  # [V N, 1, C]
        everything = statistics(features, torch.ones(count, 1, dtype=torch.bool))
        self.mean, self.std = everything.mean[0].double(), everything.std[0].double()
        self.rows = ((features - self.mean) / self.std).view(views * count, dim)
        self.vectors, self.values = _eigen(self.rows, int(everything.varies.sum()))

    def solve(self, training, stats, l2, weights=None, start=None, tolerance=5e-5,
              most=MOST_STEPS):
        """Solution for the folds whose training clips are `training` (bool `[N, P]`).

        stats: Statistics of the P folds; l2 `[P]`; weights `[P, C]`: of each class in the mean
        [1]; start: a Solution to start from; tolerance: bound on the error of a logit; most: steps
        after which it ends all the same, with a line in print where that is MOST_STEPS.
        """
        parts = []
        for chosen in torch.arange(training.shape[1]).split(PROBLEMS):
            old = start and Solution(*(value[..., chosen, :] for value in start))
            parts.append(self._solve(
                training[:, chosen], Statistics(*(value[chosen] for value in stats)), l2[chosen],
                None if weights is None else weights[chosen], old, tolerance, most))
        return Solution(*(torch.cat(found, -2) for found in zip(*parts)))

    def _scale(self, stats):
        """Factor of each feature in the kernel, per fold: `[D, P, 1]`."""
        length = stats.varies.sum(1, keepdim=True).clamp(min=1)
        scale = (self.std / stats.std).square() * stats.varies / length
        return scale.t().unsqueeze(2)

    def _apply(self, scale, alpha):
        """The folds' kernels times coefficients `[V N, P, C]`, as logits of the same shape."""
        inner = (self.rows.t() @ alpha.flatten(1)).view(-1, *alpha.shape[1:]).mul_(scale)
        return (self.rows @ inner.flatten(1)).view(alpha.shape)

    def _solve(self, training, stats, l2, weights, start, tolerance, most):
        scale, l2 = self._scale(stats), l2.to(self.device).double().view(1, -1, 1)
        mask = training.to(self.device).repeat(self.views, 1).unsqueeze(2).double()  # [V N, P, 1]
        if weights is not None:  # of the row's class
            mask = mask * (self.target * weights.to(self.device)).sum(2, keepdim=True)
        mask = mask / mask.sum(0)
        inverse = _Inverse(self.vectors, self.values, l2, training.sum(0).to(self.device)
                           * self.views)
        done = torch.zeros(training.shape[1], dtype=torch.bool, device=self.device)
        alpha = start.alpha if start else self.target.new_zeros(len(mask), len(done), self.n_label)
        bias = start.bias if start else self.target.new_zeros(len(done), self.n_label)
        point = [alpha, self._apply(scale, alpha), bias]
        memory, gradient = [], self._gradient(point, mask, l2, inverse)
        for _ in range(most):
            direction = _direction(gradient, memory, partial(self._apply, scale), inverse)
            slope = _product(gradient, direction)
            uphill = (slope >= 0) & ~done & ~inverse.plain
            if uphill.any():  # the folds' features are too unlike those of all rows
                inverse.plain |= uphill
                inverse.set_curvature(inverse.curvature)
                memory = []
                direction = _direction(gradient, memory, partial(self._apply, scale), inverse)
                slope = _product(gradient, direction)
            done |= slope.neg() <= l2.flatten() * tolerance ** 2
            if done.all():
                break
            length = self._search(point, direction, mask, l2, slope).masked_fill_(done, 0)
            step = [value * length[:, None] for value in direction]
            point = [value + change for value, change in zip(point, step)]
            old, gradient = gradient, self._gradient(point, mask, l2, inverse)
            change = [new - before for new, before in zip(gradient, old)]
            memory = [*memory, (step, change, _product(change, step))][-MEMORY:]
        else:
            if most == MOST_STEPS:
                print(f"{int((~done).sum())} of {len(done)} heads have not converged after {most} "
                      f"steps; raise --l2")
        # coefficients of rows outside the fold end near 0: the penalty alone acts on them
        return Solution(*point)

    def _gradient(self, point, mask, l2, inverse):
        """(of the coefficients `[V N, P, C]`, of the bias `[P, C]`); tells `inverse` the curvature
        there."""
        alpha, logits, bias = point
        p = (logits + bias).softmax(2)
        inverse.set_curvature((p * (1 - p) * mask).sum((0, 2)) / self.n_label)
        residual = (p - self.target) * mask
        return residual.add(alpha * l2), residual.sum(0)

    def _search(self, point, direction, mask, l2, slope):
        """Length of the step `[P]`: Newton's method on the line, along which the loss is convex.

        The logits are linear along it, so that no further kernel is needed.
        """
        (alpha, logits, bias), (d_alpha, d_logits, d_bias) = point, direction
        move = d_logits + d_bias
        penalty = (l2 * alpha * d_logits).sum((0, 2)), (l2 * d_alpha * d_logits).sum((0, 2))
        low, high = torch.zeros_like(slope), torch.full_like(slope, float("inf"))
        length = torch.ones_like(slope)
        for _ in range(8):
            p = (logits + bias + length[:, None] * move).softmax(2)
            mean = (p * move).sum(2, keepdim=True)
            first = ((mean - (self.target * move).sum(2, keepdim=True)) * mask).sum((0, 2))
            first += penalty[0] + length * penalty[1]
            if (first.abs() <= 0.1 * slope.abs()).all():
                break
            second = (((p * (move - mean).square()).sum(2, keepdim=True)) * mask).sum((0, 2))
            low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
            new = length - first / (second + penalty[1]).clamp(min=1e-30)
            # outside the bracket the quadratic model is wrong
            middle = torch.where(high.isinf(), 4 * length, (low + high) / 2)
            new = torch.where((new > low) & (new < high) & (new <= 4 * length), new, middle)
            length = torch.where(first.abs() <= 0.1 * slope.abs(), length, new)
        return length

    def weights(self, solution, stats):
        """(weight `[P, C, D]`, bias `[P, C]`) of heads on features standardised by `stats`."""
        length = stats.varies.sum(1).clamp(min=1).view(-1, 1, 1)
        found = (self.rows.t() @ solution.alpha.flatten(1)).view(-1, *solution.bias.shape)
        # rows are in units of all clips' deviations, the head's features in the fold's own
        ratio = (self.std / stats.std) * stats.varies  # [P, D]
        weight = found.permute(1, 2, 0) * ratio[:, None] / length  # [P, C, D]
        shift = (stats.mean - self.mean) / stats.std  # [P, D]
        return weight.float(), (solution.bias + (weight * shift[:, None]).sum(2)).float()


def _eigen(rows, length):
    """(vectors `[n, r]`, values `[r]`) of the kernel of rows `[n, D]`, from the smaller side."""
    if len(rows) <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.t() / max(length, 1))
        return vectors, values.clamp(min=0)
    values, vectors = torch.linalg.eigh(rows.t() @ rows / max(length, 1))
    keep = values > 1e-6 * values[-1]
    values, vectors = values[keep], vectors[:, keep]
    return rows @ vectors / (values * max(length, 1)).sqrt(), values


class _Inverse:
    """Approximate inverse of the loss's Hessian, applied to a gradient.

    With a logistic curvature c, the mean over rows and classes of p (1 - p), the Hessian of the
    mean loss of n rows is about (c K / n + l2) in the coefficients, and c in the bias; at least l2
    in the coefficients, which is all that the folds `plain` rely on.
    """
    LEAST = 0.01  # of c: where all rows are fitted, curvature is no guide any more

    def __init__(self, vectors, values, l2, count):
        self.vectors, self.l2 = vectors, l2
        self.share = values[:, None] / count  # [r, P]
        self.plain = torch.zeros_like(count, dtype=torch.bool)

    def set_curvature(self, curvature):
        """curvature `[P]`: c of each fold."""
        self.curvature = curvature.clamp(min=self.LEAST)
        self.factor = 1 / (self.share * self.curvature + self.l2[0].t()) - 1 / self.l2[0].t()
        self.factor[:, self.plain] = 0

    def __call__(self, alpha, bias):
        inner = (self.vectors.t() @ alpha.flatten(1)).view(-1, *alpha.shape[1:])
        inner *= self.factor.unsqueeze(2)
        alpha = torch.addmm((alpha / self.l2).flatten(1), self.vectors,
                            inner.flatten(1)).view(alpha.shape)
        return alpha, bias / self.curvature.unsqueeze(1)


def _product(gradient, step):
    """Inner product per fold `[P]` of a gradient (coefficients, bias) with a step (coefficients,
    their logits, bias)."""
    return (gradient[0] * step[1]).sum((0, 2)) + (gradient[1] * step[2]).sum(1)


def _direction(gradient, memory, kernel, inverse):
    """The two loops of L-BFGS: a step (coefficients, their logits, bias) downhill."""
    alpha, bias = (value.clone() for value in gradient)
    shares = []
    for step, change, product in reversed(memory):
        share = (_product((alpha, bias), step) / product).masked_fill_(product <= 0, 0)
        shares.append(share)
        alpha -= share[:, None] * change[0]
        bias -= share[:, None] * change[1]
    alpha, bias = inverse(alpha, bias)
    found = [alpha, kernel(alpha), bias]
    for (step, change, product), share in zip(memory, reversed(shares)):
        share = share - (_product(change, found) / product).masked_fill_(product <= 0, 0)
        for value, part in zip(found, step):
            value += share[:, None] * part
    return [-value for value in found]
