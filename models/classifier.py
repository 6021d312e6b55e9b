"""An encoder with a linear head on one of its taps, as one module."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Encoder of several views, the tap the head sits on, the head, and the normalisation of the
    images it was trained on.

    encoder: a DualView; head: a LinearClassifier; normalization: {mean, std}, a number per
    channel, which the transforms apply.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, layer: int, normalization: dict):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.layer, self.normalization = layer, normalization

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def features(self, x: Tensor) -> Tensor:
        """Normalised images `[B, C1+C2, H, W]` → what the head sees before it standardises,
        `[B, D]`."""
        return self.head.pool(*self.encoder(x, self.layer))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `[B, C1+C2, H, W]` → scores `[B, n_label]`."""
        return self.head(*self.encoder(x, self.layer))

    def maps(self, x: Tensor, weights: Tensor) -> list[Tensor | None]:
        """Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2) of each view, float32 `[B, h, w]`,
        not negative; None for a view the head leaves out.

        The map is that of the tap, or of the last convolution before a tap that is a vector.
        weights `[B, D]`: of the class to explain, in the head of each clip.
        """
        self.eval()
        maps, taps = [], []
        for tower, view in zip(self.encoder.towers(), x.split(self.encoder.in_channels, 1)):
            stages = tower.stages()[:self.layer]
            with torch.no_grad():
                for number, stage in enumerate(stages, 1):
                    view = stage(view)
                    if view.dim() == 4:
                        last, rest = view, stages[number:]
            tap = last.requires_grad_()  # [B, C, h, w]
            for stage in rest:
                tap = stage(tap)
            maps.append(last)
            taps.append(tap)
        scores = (self.head.pool(*taps) * weights).sum()
        gradients = torch.autograd.grad(scores, maps, allow_unused=True)
        return [None if gradient is None else
                F.relu((gradient.mean((2, 3), keepdim=True) * values.detach()).sum(1))
                for gradient, values in zip(gradients, maps)]

    def state(self) -> dict:
        """What a checkpoint holds of it: `model`, `classifier`, `layer`, `normalization`."""
        return {"model": self.encoder.state_dict(), "classifier": self.head.state_dict(),
                "layer": self.layer, "normalization": self.normalization}

    def restore(self, state: dict) -> None:
        """Takes the weights of a checkpoint's `model` and `classifier`."""
        self.encoder.load_state_dict(state["model"])
        self.head.load_state_dict(state["classifier"])
