"""RAN: regions of a face seen by one ResNet, weighted by self-attention and relation-attention.

Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression
Recognition", IEEE TIP 2020, section III.
"""
import torch
from torch import Tensor, nn

from models.scn import SCN, Backbone, Baseline, unmixed


class RAN(Backbone):
    """Region attention network: views `[B, K, 3, H, W]`, the whole image last → (logits `[B, C]`,
    importance `[B, K]`, a softmax over the views).

    bn_per_view: in training, batch norms see the images of one view after another, as published,
    and not those of all views at once.
    """

    def __init__(self, n_label: int, arch: str = "resnet18", drop_rate: float = 0,
                 gaussian: bool = False, bn_per_view: bool = False):
        super().__init__(arch, gaussian)
        self.bn_per_view = bn_per_view
        self.dropout = nn.Dropout(drop_rate)
        self.alpha = nn.Sequential(nn.Linear(self.width, 1), nn.Sigmoid())
        self.beta = nn.Sequential(nn.Linear(2 * self.width, 1), nn.Sigmoid())
        self.fc = nn.Linear(2 * self.width, n_label)

    def maps(self, views: Tensor) -> Tensor:
        """What layer4 gives of each view, `[B, K, D, H/32, W/32]`."""
        if self.bn_per_view and self.training:
            return torch.stack([super(RAN, self).maps(view) for view in views.unbind(1)], 1)
        return super().maps(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def pool(self, maps: Tensor) -> Tensor:
        """`maps` → features `[B, K, D]`."""
        return super().pool(maps.flatten(0, 1)).unflatten(0, maps.shape[:2])

    def attend(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features `[B, K, D]` → (their sum by both attentions `[B, 2 D]`, the self-attention and
        the relation-attention, each a softmax over the views `[B, K]`; eq. 1 to 6)."""
        own = unmixed(self.alpha, features).softmax(1)  # [B, K, 1]
        middle = (own * features).sum(1, keepdim=True) / own.sum(1, keepdim=True)
        pairs = torch.cat([features, middle.expand_as(features)], -1)  # [B, K, 2 D]
        relation = unmixed(self.beta, self.dropout(pairs)).softmax(1)
        both = own * relation
        return (both * pairs).sum(1) / both.sum(1), own.squeeze(-1), relation.squeeze(-1)

    def classify(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        features, importance, _ = self.attend(self.pool(maps))
        return self.fc(self.dropout(features)), importance

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        return self.classify(self.maps(views))


# ---------------------------------------------------------------- the face networks by name

NETWORKS = {"baseline": Baseline, "scn": SCN, "ran": RAN}


def create_network(name: str, n_label: int, arch: str = "resnet18", drop_rate: float = 0,
                   gaussian: bool = False, bn_per_view: bool = False) -> Backbone:
    """A network of NETWORKS; bn_per_view: of ran alone."""
    more = {"bn_per_view": bn_per_view} if name == "ran" else {}
    return NETWORKS[name](n_label, arch, drop_rate, gaussian, **more)
