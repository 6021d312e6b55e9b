"""Linear head on the features of one or both views at a tap of the encoder."""

import torch
from torch import nn

# per encoder family: pooling in front of the classifier and its side at each tap, from 1 (CMC,
# linear probing). ResNet's tap 5 has a side of 7 already, tap 6 is a vector.
POOLS = {
    "alexnet": (nn.AdaptiveMaxPool2d, (10, 6, 5, 5, 6)),
    "resnet": (nn.AdaptiveAvgPool2d, (8, 6, 4, 3, 7, None)),
}
ENCODERS = ("both", "rgb", "depth")


class LinearClassifier(nn.Module):
    """Pooling, concatenation of the views along the channels, one linear layer.

    family: key of POOLS; layer: tap, from 1; channels: of one view at that tap; encoder: the
    views to use, "both", "rgb" or "depth". Raises ValueError for another encoder.
    """

    def __init__(self, family, layer, channels, n_label, encoder="both"):
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"encoder {encoder!r}: choose from {', '.join(ENCODERS)}")
        self.encoder = encoder
        pooling, sides = POOLS[family]
        side = sides[layer - 1]
        self.pooling = nn.Identity() if side is None else pooling(side)
        n_views = 2 if encoder == "both" else 1
        self.classifier = nn.Linear(n_views * channels * (side or 1) ** 2, n_label)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def pool(self, feat_rgb, feat_depth):
        """Features `[B, C, H, W]` or `[B, C]` of each view → `[B, D]`; ignores an unused view."""
        views = {"both": (feat_rgb, feat_depth), "rgb": (feat_rgb,), "depth": (feat_depth,)}
        pooled = [self.pooling(view) for view in views[self.encoder]]
        return torch.cat(pooled, dim=1).flatten(1)  # [B, D]

    def forward(self, feat_rgb, feat_depth):
        """Features of each view → scores `[B, n_label]`."""
        return self.classifier(self.pool(feat_rgb, feat_depth))
