"""What all dual-view encoders share: numbered taps in one view, and the two views side by side."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tower(nn.Module):
    """Encoder of one view; subclasses list their `stages()`, the last of which projects, and the
    `shapes` of the taps that a linear head accepts: (channels, side), the side None for a vector.

    The tap `layer` is the output of stage number `layer`, counted from 1. The last tap, which
    `layer=None` means as well, is L2-normalised: the critic of CMC (Tian, Krishnan, Isola 2020,
    section "Contrastive learning with two views") is a cosine.
    """

    def stages(self) -> tuple:
        """Callables to apply one after the other."""
        raise NotImplementedError

    def forward(self, x: Tensor, layer: int | None = None, first: int = 0) -> Tensor:
        """x `[B, C, H, W]` → the tap, `[B, feat_dim]` of unit length for `layer=None`; first: the
        tap that x is, 0 being the image.

        Raises ValueError for a layer that does not exist.
        """
        stages = self.stages()
        layer = len(stages) if layer is None else layer
        if not 1 <= layer <= len(stages):
            raise ValueError(f"layer {layer}: this encoder has the layers 1 to {len(stages)}")
        for stage in stages[first:layer]:
            x = stage(x)
        if layer < len(stages):
            return x
        # half precision would leave the features up to 1e-3 away from unit length
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


class DualView(nn.Module):
    """One tower per view, without shared weights: the split encoder of CMC.

    tower: callable, number of input channels → Tower; in_channels: channels of RGB, then depth.
    """

    def __init__(self, tower, in_channels=(3, 1)):
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.rgb_to_d = tower(self.in_channels[0])
        self.d_to_rgb = tower(self.in_channels[1])

    @property
    def feat_dim(self) -> int:
        """Length of the features that `forward` ends in: that of the last bias of a tower."""
        return len(list(self.rgb_to_d.parameters())[-1])

    def forward(self, x: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """x `[B, C1+C2, H, W]`, RGB then depth → (feat_rgb, feat_depth) at the tap `layer`.

        Raises ValueError for a layer that does not exist, RuntimeError for other channels.
        """
        # a channel slice is dense in neither layout, and convolutions are slower on it
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        rgb, depth = (view.contiguous(memory_format=layout)
                      for view in x.split(self.in_channels, dim=1))
        return self.rgb_to_d(rgb, layer), self.d_to_rgb(depth, layer)

    def towers(self) -> tuple[Tower, Tower]:
        """The encoders of both views."""
        return self.rgb_to_d, self.d_to_rgb

    def embed(self, taps: tuple[Tensor, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """The two features of unit length, `[B, feat_dim]`, from those at the tap `layer`."""
        return tuple(tower(x, first=layer) for tower, x in zip(self.towers(), taps))
