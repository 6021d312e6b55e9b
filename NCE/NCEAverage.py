"""Two momentum memory banks, one per view, each scored with the features of the other view.

CMC (Tian, Krishnan, Isola 2020) on the memory bank of Wu et al. 2018, section 3.1. Training
spends its time in the encoder only if a step of the bank never builds a `[B, K+1, d]` tensor:
scores and gradients come from dense products with a small bank, else the scores from chunks and
the gradients from `embedding_bag`, a fused gather and weighted sum.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# the dense product is the faster one up to about this many bank rows per score wanted
DENSE = 16
# bytes of gathered rows at a time: a CPU wants them in its cache, a GPU wants few launches
CHUNK = {"cpu": 2 ** 21, "gpu": 2 ** 28}


class _Change:
    """One update of one bank: the rows `index` as they were, and the change that came after.

    A gradient that still has to be computed holds the change that comes after its scores, hence
    all later ones; changes that no gradient waits for are freed with their last reference.
    """

    index = rows = later = None


@contextmanager
def _as_before(bank, change):
    """The bank as it was before `change` and all later ones, for the time of a with block."""
    undone = []
    while change.later is not None:
        undone.append((change.index, change.rows, bank.index_select(0, change.index)))
        change = change.later
    # oldest last, so that of a row that changed twice the first state remains
    for index, before, _ in reversed(undone):
        bank.index_copy_(0, index, before)
    try:
        yield
    finally:
        for index, _, now in undone:
            bank.index_copy_(0, index, now)


class _Scores(torch.autograd.Function):
    """feat `[B, d]`, bank `[n, d]`, idx `[B, W]` → inner products `[B, W]`.

    The bank gets no gradient and may be updated in place before backward, as long as the updates
    are chained to `change`: a copy of it would cost more than the step.
    """

    @staticmethod
    def forward(ctx, feat, bank, idx, change):
        ctx.save_for_backward(idx)
        ctx.bank, ctx.change = bank, change
        width = idx.shape[1]
        if len(bank) <= DENSE * width:
            return (feat @ bank.t()).gather(1, idx)
        budget = CHUNK["cpu" if bank.is_cpu else "gpu"]
        size = max(1, min(len(idx), budget // (width * bank[0].nbytes)))
        rows = bank.new_empty(size * width, bank.shape[1])
        out = bank.new_empty(idx.shape)
        for start in range(0, len(idx), size):
            part = idx[start:start + size]
            near = rows[:part.numel()]
            torch.index_select(bank, 0, part.flatten(), out=near)
            torch.bmm(near.view(*part.shape, -1), feat[start:start + size].unsqueeze(2),
                      out=out[start:start + size].unsqueeze(2))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        idx, = ctx.saved_tensors
        with _as_before(ctx.bank, ctx.change), torch.autocast(grad.device.type, enabled=False):
            return _weighted_rows(ctx.bank, idx, grad), None, None, None


def _weighted_rows(bank, idx, weight, bag=256):
    """Sum over w of weight[:, w] * bank[idx[:, w]] → `[B, d]`."""
    if len(bank) <= idx.shape[1]:
        return weight.new_zeros(len(idx), len(bank)).scatter_add_(1, idx, weight) @ bank
    # a GPU gives each bag to few threads that walk through it in sequence, hence many small bags
    size = min(bag, idx.shape[1])
    pad = -idx.shape[1] % size
    parts = F.embedding_bag(F.pad(idx, (0, pad)).view(-1, size), bank, mode="sum",
                            per_sample_weights=F.pad(weight, (0, pad)).view(-1, size))
    return parts.view(len(idx), -1, bank.shape[1]).sum(1)


def alone(tensor: Tensor) -> Tensor:
    return tensor


def positive_first(index: Tensor, n: int) -> Tensor:
    """All of 0..n-1 for each of `index [B]`, swapped so that this one is in column 0: `[B, n]`."""
    idx = torch.arange(n, device=index.device).repeat(len(index), 1)
    idx.scatter_(1, index.unsqueeze(1), 0)
    idx[:, 0] = index
    return idx


class NCEAverage(nn.Module):
    """Banks of momentum features and the scores of a batch against them.

    feat_dim: d; n_data: number of pairs n; K: negatives per positive, of which K' = min(K, n-1)
    are used; T: temperature; momentum: share of a row that an update keeps; use_softmax: scores
    for NCESoftmaxLoss instead of NCECriterion.

    Buffers: `memory_rgb`, `memory_depth` `[n, d]` with rows of unit length; `Z_rgb`, `Z_depth`,
    0-dimensional, NCE's normalisation constants, -1 until the first batch in training mode sets
    them. `gather` concatenates a tensor over all ranks along dimension 0; a distributed run
    replaces the identity, and all ranks then make the same update.

    Raises ValueError for sizes below 1.
    """

    def __init__(self, feat_dim, n_data, K, T=0.07, momentum=0.5, use_softmax=False):
        super().__init__()
        if min(feat_dim, n_data, K) < 1:
            raise ValueError(f"feat_dim {feat_dim}, n_data {n_data}, K {K}: all must be at least 1")
        self.n_data, self.K = n_data, min(K, n_data - 1)
        self.T, self.momentum, self.use_softmax = T, momentum, use_softmax
        self.gather = alone
        for view in ("rgb", "depth"):
            bank = torch.randn(n_data, feat_dim)
            bank /= bank.norm(dim=1, keepdim=True)
            self.register_buffer(f"memory_{view}", bank)
            self.register_buffer(f"Z_{view}", torch.tensor(-1.0))
        self._changes = {"rgb": _Change(), "depth": _Change()}

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Negatives of the pairs `index [B]` → idx `[B, K'+1]` on its device, column 0 = index.

        Uniform with replacement over the other n-1 entries, drawn on the CPU. None if K >= n-1:
        all others are negatives then, once each, and nothing is drawn.
        """
        if self.n_data - 1 <= self.K:
            return None
        index = index.unsqueeze(1)  # [B, 1]
        idx = torch.randint(self.n_data - 1, (len(index), self.K),
                            generator=generator).to(index.device)
        idx += idx >= index  # skips the positive
        return torch.cat([index, idx], dim=1)  # [B, K'+1]

    def forward(self, feat_rgb: Tensor, feat_depth: Tensor, index: Tensor,
                idx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of a batch and, in training mode, the update of its rows afterwards.

        feat_rgb, feat_depth: `[B, d]` of unit length, any floating type; index `[B]`: their rows
        in the banks, each at most once; idx `[B, W]`: entries to score, column 0 the positive,
        taken literally; None: `draw(index)` with the global generator, or all entries.
        Returns (out_rgb, out_depth), each `[B, K'+1]` or `[B, W]` in the banks' type.
        """
        if idx is None:
            idx = self.draw(index)
        if idx is None:
            idx = positive_first(index, self.n_data)  # [B, n]
        with torch.autocast(index.device.type, enabled=False):
            out_rgb = self._score(feat_rgb, "rgb", "depth", idx)
            out_depth = self._score(feat_depth, "depth", "rgb", idx)
            if self.training:
                self.update(self.gather(feat_rgb.detach()), self.gather(feat_depth.detach()),
                            self.gather(index))
        return out_rgb, out_depth

    def _score(self, feat, view, other, idx):
        """Features of `view` against the bank of the `other` view → `[B, W]`."""
        bank = getattr(self, f"memory_{other}")
        scores = _Scores.apply(feat.to(bank.dtype) / self.T, bank, idx, self._changes[other])
        if self.use_softmax:
            return scores
        constant = getattr(self, f"Z_{view}")
        if not (constant.is_cpu and constant > 0):  # a GPU decides without a device-to-host copy
            mean = scores.detach().exp().mean(dim=1)  # [B]
            if self.training:
                mean = self.gather(mean)
            # Monte Carlo estimate of Wu et al. 2018, section 3.2
            Z = torch.where(constant > 0, constant, mean.mean() * self.n_data)
            if self.training:
                constant.copy_(Z)
            constant = Z
        return (scores - constant.log()).exp_()

    @torch.no_grad()
    def update(self, feat_rgb: Tensor, feat_depth: Tensor, index: Tensor) -> None:
        """Moves the rows `index [B]` of both banks towards features `[B, d]`, back to length 1."""
        for view, feat in (("rgb", feat_rgb), ("depth", feat_depth)):
            bank, change = getattr(self, f"memory_{view}"), self._changes[view]
            change.index, change.rows = index, bank.index_select(0, index)
            change.later = self._changes[view] = _Change()
            rows = self.momentum * change.rows + (1 - self.momentum) * feat.to(bank.dtype)
            bank.index_copy_(0, index, F.normalize(rows, dim=1))
