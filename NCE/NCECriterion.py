"""Losses over the scores of one positive, in column 0, and its negatives."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-7


class NCECriterion(nn.Module):
    """Noise-contrastive estimation (Wu et al. 2018, section 3.2) with uniform noise 1 / n_data."""

    def __init__(self, n_data):
        super().__init__()
        self.n_data = n_data

    def forward(self, out: Tensor) -> Tensor:
        """out `[B, 1+m]`, probabilities exp(score / T) / Z → loss, 0-dimensional."""
        noise = (out.shape[1] - 1) / self.n_data
        positive, negative = out[:, 0], out[:, 1:]
        from_data = positive.log() - (positive + noise + EPS).log()  # [B]
        # in each term noise is the constant numerator; m = 0 leaves no term
        from_noise = math.log(noise or 1) - (negative + noise + EPS).log()  # [B, m]
        return -(from_data.sum() + from_noise.sum()) / len(out)

    @torch.no_grad()
    def positive_probability(self, out: Tensor) -> Tensor:
        """out `[B, 1+m]` → posterior that the positive is data, not noise; mean, 0-dimensional."""
        noise = (out.shape[1] - 1) / self.n_data
        return (out[:, 0] / (out[:, 0] + noise)).mean()


class NCESoftmaxLoss(nn.Module):
    """Cross-entropy of picking the positive among all columns (Tian, Krishnan, Isola 2020, section
    "Contrastive learning with two views")."""

    def forward(self, out: Tensor) -> Tensor:
        """out `[B, 1+m]`, scores / T → loss, 0-dimensional."""
        return F.cross_entropy(out, out.new_zeros(len(out), dtype=torch.long))

    @torch.no_grad()
    def positive_probability(self, out: Tensor) -> Tensor:
        """out `[B, 1+m]` → softmax probability of the positive; mean, 0-dimensional."""
        return out.softmax(dim=1)[:, 0].mean()
