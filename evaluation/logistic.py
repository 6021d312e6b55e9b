"""Multinomial logistic regression with an L2 penalty: the heads of many folds in one pass.

A fold's head minimises, over the clips it trains on and all their views,

    mean cross-entropy + l2 / 2 · (D' · squared norm of the weights),

the features centred and scaled with the statistics of those clips; D' is their mean squared
length after that, the number of features that vary. So l2 means the same at every tap and with
any number of clips; scikit-learn calls C what is 1 / (l2 D' rows) here.

The minimum lies in the span of the training features (Kimeldorf and Wahba 1971). Folds differ in
which rows count, and in the scale of each feature. With one scale for all of them, heads are
combinations of the rows, their logits follow from one kernel, and all are minimised together by
L-BFGS (Nocedal and Wright, "Numerical Optimization", alg. 7.4), preconditioned with the Hessian
that a mean curvature of the logistic loss gives. What a fold's own scale changes in its logits is
then added as an offset and the minimum found again, until neither moves: a matter of a few passes,
as scales differ by some per cent. A fold in which they differ by more, because features live in the
clips that it holds out, is solved in a kernel of its own, unless those features are so few that
they hardly count in the kernel: passes mend these as well, in far less time.
"""
import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.threads import side_by_side

MEMORY = 4  # pairs of steps and gradient changes that L-BFGS keeps
MOST_STEPS, MOST_PASSES, ROUGH_STEPS = 500, 50, 100
# deviation of a feature over all clips, in the fold's own, that passes can still mend in any number
# of features; in no more than this share of those that vary, to the last digit or roughly: what is
# said of clips outside the fold, which may lie as many deviations away, is then some per cent off
APART, FEW_APART, FAR_APART, ROUGHLY_APART = 30, 1e-3, 300, 1000
AWAY = 100  # deviations beyond which TOLERANCE is to be smaller for probabilities right to 1e-4
LEAST = 0.01  # curvature: where all rows are fitted, that of the loss is no guide any more
COLUMNS = 192  # classes of all folds a thread solves at a time: what it touches stays near it
BLOCK = 24  # columns: numbers it does not divide take MKL up to twice the time without AVX-512
TOLERANCE = 1e-5  # of the logit of a row of usual length
ROUGH = 1e-3  # error of a logit that single precision is good for with any penalty
CONSTANT = 1e-10  # a feature of a smaller share of variance in its mean square does not vary


class Statistics(NamedTuple):
    """Of each fold's training features: `mean`, `std` float32 `[F, D]`, the deviation being 1 for
    a feature that does not vary; `varies` bool `[F, D]`."""
    mean: Tensor
    std: Tensor
    varies: Tensor


def statistics(features: Tensor, training: Tensor, block: int = 1024) -> Statistics:
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
    return Statistics(*(torch.cat(blocks, 1) for blocks in zip(*parts)))


def rough(l2: float) -> float:
    """Tolerance that tells which penalty or which features are better: ROUGH at a penalty of 0.001
    or more, and growing below as logits do."""
    return ROUGH * max(1, (1e-3 / l2) ** 0.5)


class Solution(NamedTuple):
    """Heads of P folds, as coefficients of the rows and as logits. Folds lie innermost: what goes
    over the few classes then goes over all folds at once."""
    alpha: Tensor  # [V N, C, P], near 0 in rows outside the fold
    offset: Tensor  # [V N, C, P], what the fold's own scale adds to the logits
    logits: Tensor  # [V N, C, P], of every row, without the bias
    bias: Tensor  # [C, P]


class Regression:
    """The problem for features `[V, N, D]` with labels int64 `[N]`; see the module.

    `solve` takes any set of folds of these clips, `weights` turns a solution into heads.
    """

    def __init__(self, features: Tensor, labels: np.ndarray | Tensor, n_label: int):
        views, count, dim = features.shape
        self.views, self.device, self.features = views, features.device, features
        self._label(labels, n_label)
        everything = statistics(features, torch.ones(count, 1, dtype=torch.bool))
        self.mean, self.std = everything.mean[0].double(), everything.std[0].double()
        self.length = max(int(everything.varies.sum()), 1)
        rows = ((features - self.mean) / self.std).view(views * count, dim)
        basis, self.values, self.null = _eigen(rows, self.length)
        self.rows, self.basis = ({kind: value.to(kind) for kind in (torch.float64, torch.float32)}
                                 for value in (rows, basis))

    def _label(self, labels, n_label):
        self.n_label, self.labels = n_label, torch.as_tensor(labels)
        self.target = F.one_hot(self.labels, n_label).repeat(self.views, 1)[
            :, :, None].to(self.device)  # [V N, C, 1]

    def relabelled(self, labels: np.ndarray | Tensor, n_label: int) -> "Regression":
        """The problem for other labels of the same clips, with the decomposition there is."""
        other = copy.copy(self)
        other._label(labels, n_label)
        return other

    def solve(self, training: Tensor, stats: Statistics, l2: float | Tensor,
              weights: Tensor | None = None, start: Solution | None = None,
              tolerance: float = TOLERANCE, most: int = MOST_STEPS) -> Solution:
        """Solution for the folds whose training clips are `training` (bool `[N, P]`).

        stats: Statistics of the P folds; l2: of all, or `[P]` of each; weights `[P, C]`: of each
        class in the mean [1]; start: a Solution to start from; tolerance: bound on the error of a
        logit; most: steps of a minimum after which it ends all the same, with a line in print where
        that is MOST_STEPS. Double precision where the tolerance asks for it.
        """
        ratio = self.std / stats.std * stats.varies  # [P, D]
        number = (ratio > APART).sum(1).cpu()
        most_apart = FAR_APART if tolerance < ROUGH else ROUGHLY_APART
        far = (number > FEW_APART * stats.varies.sum(1).cpu()) | (ratio > most_apart).any(1).cpu()
        near, heads, one = (~far).nonzero()[:, 0], {}, None
        if not isinstance(l2, Tensor):
            # a matrix of the penalty's own, one product a step for two, pays with many folds
            one = l2 if len(near) * self.n_label > COLUMNS else None
            l2 = torch.full((len(far),), l2, dtype=torch.float64)
        stages = self._stages(tolerance, most, one)
        # an error of the weights counts in clips that lie as many deviations away
        away = ratio.masked_fill(ratio <= APART, 0).square().sum(1).sqrt()
        stricter = (AWAY / away).clamp(max=1) if tolerance < ROUGH else torch.ones_like(away)

        def together(chosen):
            problem = (training[:, chosen], Statistics(*(value[chosen] for value in stats)),
                       l2[chosen], None if weights is None else weights[chosen])
            old = start and Solution(*(value[..., chosen] for value in start))
            return self._together(problem, old, stages, stricter[chosen])
        # by their number alone: were they grouped by penalty, rounding in one fold would follow
        # from what others chose, and so from labels that its head must not see
        number_of_parts = min(-(-len(near) * self.n_label // COLUMNS), len(near))
        parts = near.tensor_split(number_of_parts) if len(near) else ()
        for chosen, (part, done) in zip(parts, side_by_side(together, parts, self.device)):
            heads |= {int(fold): Solution(*(value[..., i:i + 1] for value in part))
                      for i, fold in enumerate(chosen)}
            # passes may have run out; of few steps, those of a fold with no scales apart may have
            far[chosen[~done.cpu() & ((number[chosen] > 0) | (most == MOST_STEPS))]] = True
        short = 0
        for fold in far.nonzero()[:, 0].tolist():
            heads[fold], done = self._alone(
                training[:, fold], l2[fold:fold + 1],
                None if weights is None else weights[fold:fold + 1], tolerance, most)
            short += not done
        if short and most == MOST_STEPS:
            print(f"{short} of {training.shape[1]} heads have not converged after {most} steps; "
                  f"raise --l2")
        kind = torch.float64 if tolerance < ROUGH else torch.float32
        return Solution(*(torch.cat([value.to(kind) for value in values], -1) for values in
                          zip(*(heads[fold] for fold in range(training.shape[1])))))

    def _stages(self, tolerance, most, l2=None):
        """(precision, tolerance, steps, matrix or None) of one minimisation after the other, the
        matrix being K / (K + n l2 / c) for the penalty l2 of all folds; see `_Folds.inverse`."""
        stages = [(torch.float32, tolerance, most)]
        if tolerance < ROUGH:  # most of the way in single precision, at half the cost
            stages = [(torch.float32, ROUGH, ROUGH_STEPS), (torch.float64, tolerance, most)]
        if l2 is None or self.null is None:
            return [(*stage, None) for stage in stages]
        rows = self.views * len(self.labels)
        share = 1 / (self.values + rows * l2 / _curvature(l2, self.n_label))
        return [(*stage, (self.basis[stage[0]] * share.to(stage[0])) @ self.basis[stage[0]].t())
                for stage in stages]

    def _together(self, problem, start, stages, stricter=1.0):
        """(Solution, which have converged) of some folds in the kernel of all clips; problem:
        their training, stats, l2 and weights, as in `solve`; stricter: the share of the tolerance
        that holds in double precision, `[P]`."""
        for kind, tolerance, most, matrix in stages:
            old = start and Solution(*(value.to(kind) for value in start))
            if kind == torch.float64:
                tolerance = tolerance * stricter
            start, done = _Folds(self, kind, matrix, *problem).solve(old, tolerance, most)
        return start, done

    def _alone(self, keep, l2, weights, tolerance, most):
        """(Solution, whether it has converged) of one fold in the kernel of its own clips `keep`
        (bool `[N]`), in the terms of all clips."""
        own = Regression(self.features[:, keep.to(self.device)], self.labels[keep], self.n_label)
        everybody = torch.ones(int(keep.sum()), 1, dtype=torch.bool)
        stats = statistics(own.features, everybody)
        # scales that lie far apart take double precision, whatever the tolerance
        solution, done = own._together((everybody, stats, l2, weights), None, own._stages(
            min(tolerance, ROUGH / 10), most))
        weight, bias = (value.double() for value in own.weights(solution, stats))
        # rows that are centred make nothing of what is common to all alpha; those of all clips have
        # another centre, which in units of a feature that hardly varies here may lie far off
        own_alpha = solution.alpha - solution.alpha.mean(0)
        alpha = solution.alpha.new_zeros(self.views, len(keep), self.n_label, 1)
        alpha[:, keep.to(self.device)] = own_alpha.view(self.views, -1, self.n_label, 1)
        alpha = alpha.flatten(0, 1)
        seen = (self.features - stats.mean) / stats.std  # [V, N, D]
        logits = (seen.flatten(0, 1).double() @ weight[0].t()).unsqueeze(2)  # [V N, C, 1]
        shift = (weight[0] * ((stats.mean - self.mean) / stats.std)).sum(1, keepdim=True)  # [C, 1]
        logits += shift
        return Solution(alpha, logits - _kernel(self.basis[torch.float64], alpha), logits,
                        bias.t() - shift), bool(done.all())

    def weights(self, solution: Solution, stats: Statistics) -> tuple[Tensor, Tensor]:
        """(weight `[P, C, D]`, bias `[P, C]`) of heads on features standardised by `stats`."""
        length = stats.varies.sum(1).clamp(min=1).view(-1, 1, 1)
        alpha = solution.alpha
        weight = _times(self.rows[alpha.dtype].t(), alpha)  # [D, C, P]
        # rows are in units of all clips' deviations, the head's features in the fold's own
        ratio = (self.std / stats.std) * stats.varies  # [P, D]
        weight = weight.permute(2, 1, 0) * ratio[:, None] / length  # [P, C, D]
        shift = (stats.mean - self.mean) / stats.std  # [P, D]
        return weight.float(), (solution.bias.t() + (weight * shift[:, None]).sum(2)).float()


def _times(matrix, values):
    """`[n, m]` times `[m, C, P]` → `[n, C, P]`."""
    flat = values.flatten(1)
    columns = flat.shape[1]
    if flat.device.type == "cpu" and columns > BLOCK:
        flat = F.pad(flat, (0, -columns % BLOCK))
    return (matrix @ flat)[:, :columns].reshape(-1, *values.shape[1:])


def _kernel(basis, alpha):
    """The kernel's product with alpha `[V N, C, P]`: the logits of the heads."""
    return _times(basis, _times(basis.t(), alpha))


def _eigen(rows, length):
    """(basis `[n, r]`, values `[r]`) of the kernel of rows `[n, D]`, which is basis times basis
    transposed, from the smaller side; and orthonormal vectors `[n, n - r]` that it maps to 0, or
    None where rows outnumber features or these vectors the basis."""
    wide = len(rows) <= rows.shape[1]
    side = rows if wide else rows.t()
    if rows.device.type == "cpu":
        # numpy's BLAS computes half of a symmetric product, and its LAPACK takes a third of the
        # time of torch's on AMD's processors
        side = side.numpy()
        values, vectors = map(torch.from_numpy, np.linalg.eigh(side @ side.T / length))
    else:
        values, vectors = torch.linalg.eigh(side @ side.t() / length)
    keep = values > 1e-10 * values[-1].clamp(min=1e-30)
    null, values, vectors = vectors[:, ~keep], values[keep], vectors[:, keep]
    if not wide:
        return rows @ vectors / length ** 0.5, values, None
    return vectors * values.sqrt(), values, null if len(null.t()) < len(values) else None


def _curvature(l2, n_label):
    """About the mean of p (1 - p) over rows and classes: that of equal probabilities, and less
    where a weak penalty lets heads be sure. Taken from the folds' heads it would make each fold
    depend on the others."""
    return max(LEAST, (1 - 1 / n_label) / n_label * ROUGH / rough(l2))


class _Folds:
    """The minimisation for a number of folds; shapes as in a Solution.

    A head is X' alpha of the rows X, its logits are K alpha of the kernel K = X X', and its
    gradient is X' beta, beta being the gradient for the logits + l2 alpha. So steps are told by
    alpha and logits, gradients by beta; the inner product of both is beta' (K alpha), and of large
    products a step takes those of the preconditioner alone.
    """

    def __init__(self, regression, kind, matrix, training, stats, l2, weights):
        device, self.matrix = regression.device, matrix
        self.curvature = torch.tensor([_curvature(penalty, regression.n_label) for penalty in
                                       l2.tolist()], dtype=kind, device=device)
        self.rows, self.basis = regression.rows[kind], regression.basis[kind]
        self.target, self.l2 = regression.target.to(kind), l2.to(device, kind)
        self.values = regression.values.to(kind).view(-1, 1, 1)
        self.null = None if regression.null is None else regression.null.to(kind)
        self.keep = training.to(device).repeat(regression.views, 1).unsqueeze(1)  # [V N, 1, P]
        mask = self.keep.to(kind)
        if weights is not None:  # of the row's class
            mask = mask * (self.target * weights.t().to(device, kind)).sum(1, keepdim=True)
        self.mask = mask / mask.sum(0)
        length = stats.varies.sum(1, keepdim=True).clamp(min=1)
        own = (regression.std / stats.std).square() * stats.varies / length
        # of each feature in the fold's own kernel, less its share in the one of all folds
        self.change = (own - 1 / regression.length).t().unsqueeze(1).to(kind)  # [D, 1, P]
        self.shape = len(self.keep), regression.n_label, training.shape[1]

    def solve(self, start: Solution | None, tolerance: float | Tensor,
              most: int) -> tuple[Solution, Tensor]:
        """(Solution, bool `[P]`: which have converged); start: a Solution or None; tolerance: of
        all, or `[P]`; see Regression.solve."""
        alpha, offset, bias = (start.alpha, start.offset, start.bias) if start else (
            self.basis.new_zeros(shape) for shape in (self.shape, self.shape, self.shape[1:]))
        logits = start.logits - offset if start else torch.zeros_like(alpha)
        if start and logits.dtype == torch.float64:
            # logits that were summed up in single precision are good for more digits than alpha,
            # along the largest values of the kernel; there it is brought into line with them
            own = _kernel(self.basis, alpha)
            change, known = self.inverse((logits - own) * (self.curvature / len(alpha)))
            alpha, logits = self.without_null(alpha + change), own + known
        done = torch.zeros(self.shape[2], dtype=torch.bool, device=bias.device)
        relax, last = self.basis.new_ones(self.shape[2]), None
        for _ in range(MOST_PASSES):
            (alpha, logits, bias), minimal = self.minimum((alpha, logits, bias), offset, done,
                                                          tolerance, most)
            own = _times(self.rows, _times(self.rows.t(), alpha).mul_(self.change))
            # rows outside the fold have no part in the minimum, only in what is predicted
            step = (own - offset).masked_fill_(~self.keep, 0)
            done |= step.abs().amax((0, 1)) <= tolerance
            if done.all():
                break
            if last is not None:  # Aitken's relaxation, for scales that differ by more
                turn = step - last
                size = turn.square().sum((0, 1)).clamp(min=1e-30)
                factor = -relax * (last * turn).sum((0, 1)) / size
                relax = torch.where(done, relax, factor.clamp(0.05, 2))
            last = step
            offset = torch.where(done, offset, offset + step * relax)
        return Solution(alpha, own, logits + own, bias), done & minimal

    def minimum(self, point: tuple, offset: Tensor, settled: Tensor, tolerance: float | Tensor,
                most: int) -> tuple[tuple, Tensor]:
        """(point at the minimum for an offset to the logits, bool `[P]`: which folds have got
        there) from a point (alpha, its logits, bias); the folds `settled` stay as they are."""
        done, memory = settled.clone(), []
        gradient = self.gradient(point, offset)
        for _ in range(most):
            direction = self.direction(gradient, memory)
            slope = _product(gradient, direction)
            # minus the slope bounds l2 times the squared distance to the minimum from above
            done |= slope.neg() <= self.l2 * tolerance ** 2
            if done.all():
                break
            length = self.search(point, direction, offset, slope).masked_fill_(done, 0)
            step = [value.mul_(length) for value in direction]
            point = [value + change for value, change in zip(point, step)]
            old, gradient = gradient, self.gradient(point, offset)
            change = [new - before for new, before in zip(gradient, old)]
            memory = [*memory, (step, change, _product(change, step))][-MEMORY:]
        return point, done

    def gradient(self, point: tuple, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient: beta `[V N, C, P]`, and of the bias `[C, P]`."""
        alpha, logits, bias = point
        residual = (logits + offset).add_(bias).softmax(1).sub_(self.target).mul_(self.mask)
        return self.without_null(torch.addcmul(residual, alpha, self.l2)), residual.sum(0)

    def without_null(self, values: Tensor) -> Tensor:
        """Values without what the kernel maps to 0: that has no part in a head, and is noise in
        what has."""
        if self.null is None:
            return values
        return values - _times(self.null, _times(self.null.t(), values))

    def direction(self, gradient: tuple, memory: list) -> list[Tensor]:
        """The two loops of L-BFGS: a step (alpha, its logits, bias) downhill."""
        beta, bias = (value.neg() for value in gradient)
        shares = []
        for step, change, product in reversed(memory):
            share = (_product((beta, bias), step) / product).masked_fill_(product <= 0, 0)
            shares.append(share)
            for value, part in zip((beta, bias), change):
                value.addcmul_(share, part, value=-1)
        step = [*self.inverse(beta), bias.div_(self.curvature)]
        for (old, change, product), share in zip(memory, reversed(shares)):
            share = share - (_product(change, step) / product).masked_fill_(product <= 0, 0)
            for value, part in zip(step, old):
                value.addcmul_(share, part)
        return step

    def inverse(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, its logits), of a gradient, by 1 / (c / n X' X + l2), which is about the inverse
        of the Hessian: alpha = (1 - S) beta / l2 and logits = n / c S beta with
        S = K / (K + n l2 / c)."""
        curvature = self.curvature / len(beta)
        if self.matrix is not None:
            smooth = _times(self.matrix, beta)
        else:
            inside = _times(self.basis.t(), beta) / (self.values + self.l2 / curvature)
            smooth = _times(self.basis, inside)
            if self.null is None:  # alpha by itself: what K maps to 0 stays out of it
                return _times(self.basis, inside / self.values) / curvature, smooth / curvature
        return (beta - smooth).div_(self.l2), smooth.div_(curvature)

    def search(self, point: tuple, direction: list, offset: Tensor, slope: Tensor) -> Tensor:
        """Length of the step `[P]`: Newton's method on the line, along which the loss is convex."""
        base, move = point[1] + offset + point[2], direction[1] + direction[2]
        told = (self.target * move * self.mask).sum((0, 1))
        penalty = [self.l2 * (value * direction[1]).sum((0, 1))
                   for value in (point[0], direction[0])]
        low, high = torch.zeros_like(slope), torch.full_like(slope, float("inf"))
        length = torch.ones_like(slope)
        for _ in range(8):
            p = torch.addcmul(base, length, move).softmax(1)
            mean = (p * move).sum(1, keepdim=True)
            first = (mean * self.mask).sum((0, 1)) - told + penalty[0] + length * penalty[1]
            enough = first.abs() <= 0.1 * slope.abs()
            if enough.all():
                break
            second = (p.mul_((move - mean).square_()).sum(1, keepdim=True) * self.mask).sum((0, 1))
            low, high = torch.where(first < 0, length, low), torch.where(first > 0, length, high)
            new = length - first / (second + penalty[1]).clamp(min=1e-30)
            # outside the bracket the quadratic model is wrong
            middle = torch.where(high.isinf(), 4 * length, (low + high) / 2)
            new = torch.where((new > low) & (new < high) & (new <= 4 * length), new, middle)
            length = torch.where(enough, length, new)
        return length


def _product(gradient, step):
    """Inner product per fold `[P]` of a gradient (beta, of the bias) with a step (alpha, its
    logits, bias)."""
    return (gradient[0] * step[1]).sum((0, 1)) + (gradient[1] * step[2]).sum(0)
