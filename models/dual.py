"""What all dual-view encoders share: numbered taps in one view, and the two views side by side."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.threads import side_by_side


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


class _SideBySide(torch.autograd.Function):
    """Both towers at once, forwards and backwards; one graph would go backwards through one after
    the other."""

    @staticmethod
    def forward(ctx, towers, views, layer, *weights):
        with torch.enable_grad():
            ctx.taps = _taps(towers, views, layer)
        ctx.save_for_backward(*weights)
        ctx.first = len(_trained(towers[0]))
        ctx.set_materialize_grads(False)
        taps = tuple(tap.detach() for tap in ctx.taps)
        ctx.mark_non_differentiable(*(tap for tap, own in zip(taps, ctx.taps)
                                      if not own.requires_grad))
        return taps

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        def back(of_tower):
            tap, weights, gradient = of_tower
            if gradient is None or not tap.requires_grad:
                return [None] * len(weights)
            return torch.autograd.grad(tap, weights, gradient, allow_unused=True)
        weights = ctx.saved_tensors
        towers = zip(ctx.taps, (weights[:ctx.first], weights[ctx.first:]), gradients)
        first, second = side_by_side(back, list(towers), ctx.taps[0].device)
        return None, None, None, *first, *second


def _trained(tower):
    """The weights of a tower that get gradients."""
    return [weight for weight in tower.parameters() if weight.requires_grad]


def _taps(towers, views, layer):
    """The tap of each tower, side by side, which takes this thread's modes to the others."""
    graph, half = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu")

    def tap(pair):
        tower, view = pair
        with torch.set_grad_enabled(graph), torch.autocast("cpu", kind, half):
            return tower(view, layer)
    return tuple(side_by_side(tap, list(zip(towers, views)), views[0].device))


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
        views = [view.contiguous(memory_format=layout)
                 for view in x.split(self.in_channels, dim=1)]
        towers = self.towers()
        if x.device.type != "cpu" or torch.get_num_threads() == 1 or x.requires_grad:
            return tuple(tower(view, layer) for tower, view in zip(towers, views))
        weights = [weight for tower in towers for weight in _trained(tower)]
        if torch.is_grad_enabled() and weights:
            return _SideBySide.apply(towers, views, layer, *weights)
        return _taps(towers, views, layer)

    def towers(self) -> tuple[Tower, Tower]:
        """The encoders of both views."""
        return self.rgb_to_d, self.d_to_rgb

    def embed(self, taps: tuple[Tensor, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        """The two features of unit length, `[B, feat_dim]`, from those at the tap `layer`."""
        return tuple(tower(x, first=layer) for tower, x in zip(self.towers(), taps))
