"""Linear head on the features of one or both views at a tap of the encoder."""

import torch
from torch import Tensor, nn

# per encoder family: pooling in front of the classifier and its side at each tap, from 1 (CMC,
# linear probing). ResNet's tap 5 has a side of 7 already, tap 6 is a vector.
POOLS = {
    "alexnet": (nn.AdaptiveMaxPool2d, (10, 6, 5, 5, 6)),
    "resnet": (nn.AdaptiveAvgPool2d, (8, 6, 4, 3, 7, None)),
}
ENCODERS = ("both", "rgb", "depth")


class LinearClassifier(nn.Module):
    """Pooling, concatenation of the views along the channels, standardisation, one linear layer.

    The buffers `mean` and `std` `[D]` are those of the features the head was trained on; without
    them a linear layer mostly sees what all clips have in common. A state_dict from before there
    were any loads all the same.

    family: key of POOLS; layer: tap, from 1; shape: (channels, side or None) of one view at that
    tap, whose side the pooling never exceeds; encoder: the views to use, "both", "rgb" or "depth".
    Raises ValueError for another encoder.
    """

    def __init__(self, family, layer, shape, n_label, encoder="both"):
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder {encoder!r}: choose from {', '.join(ENCODERS)}")
        self.encoder = encoder
        pooling, sides = POOLS[family]
        side = sides[layer - 1] and min(sides[layer - 1], shape[-1])
        self.pooling = nn.Identity() if side is None else pooling(side)
        n_views = 2 if encoder == "both" else 1
        dim = n_views * shape[0] * (side or 1) ** 2
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.classifier = nn.Linear(dim, n_label)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def pool(self, feat_rgb: Tensor, feat_depth: Tensor) -> Tensor:
        """Features `[B, C, H, W]` or `[B, C]` of each view → `[B, D]`; ignores an unused view."""
        views = {"both": (feat_rgb, feat_depth), "rgb": (feat_rgb,), "depth": (feat_depth,)}
        pooled = [self.pooling(view) for view in views[self.encoder]]
        return torch.cat(pooled, dim=1).flatten(1)  # [B, D]

    def forward(self, feat_rgb: Tensor, feat_depth: Tensor) -> Tensor:
        """Features of each view → scores `[B, n_label]`."""
        return self.classifier((self.pool(feat_rgb, feat_depth) - self.mean) / self.std)

    def plain_weight(self) -> Tensor:
        """The linear layer's weight `[n_label, D]` for features that are not standardised."""
        return self.classifier.weight / self.std

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "mean", torch.zeros_like(self.mean))
        state_dict.setdefault(prefix + "std", torch.ones_like(self.std))
        super()._load_from_state_dict(state_dict, prefix, *args)
