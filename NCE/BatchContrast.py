"""Contrast within the batch: each view scored against the other view of all its clips.

Without a memory bank (van den Oord et al. 2018; Chen et al., SimCLR, 2020): the negatives are
fewer, but as new as the weights. A bank's row is one epoch old, and in a run of few epochs never
catches up.
"""
import torch
from torch import Tensor, nn

from NCE.NCEAverage import alone, positive_first


class BatchContrast(nn.Module):
    """Scores of a batch's features against one another, for NCESoftmaxLoss.

    T: temperature. `gather` concatenates features of all ranks along dimension 0 and lets
    gradients through; a distributed run replaces the identity. Nothing is kept from step to step.
    """

    def __init__(self, T):
        super().__init__()
        self.T, self.gather = T, alone

    def draw(self, index: Tensor, generator: torch.Generator | None = None) -> None:
        """Nothing is drawn: the negatives are the other clips of the batch."""

    def forward(self, feat_rgb: Tensor, feat_depth: Tensor, place: Tensor,
                idx: None = None) -> tuple[Tensor, Tensor]:
        """feat_rgb, feat_depth: `[b, d]` of unit length, this rank's; place `[b]`: where they stand
        in the global batch of B; idx is not used. Returns (out_rgb, out_depth), each `[b, B]`,
        the positive in column 0."""
        others = self.gather(feat_rgb), self.gather(feat_depth)  # [B, d]
        order = positive_first(place, len(others[0]))  # [b, B]
        with torch.autocast(place.device.type, enabled=False):
            out_rgb = (feat_rgb.float() @ others[1].float().t() / self.T).gather(1, order)
            out_depth = (feat_depth.float() @ others[0].float().t() / self.T).gather(1, order)
        return out_rgb, out_depth
