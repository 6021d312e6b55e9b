"""ResNets for one face image: the baseline, and SCN, which weighs how certain an image is.

SCN: Wang et al., "Suppressing Uncertainties for Large-Scale Facial Expression Recognition",
CVPR 2020, section 3.
"""
import torch
import torchvision
from torch import Tensor, nn

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
# torchvision's names of the parts that `features` numbers
PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")


def unmixed(layer: nn.Sequential, x: Tensor) -> Tensor:
    """What a layer gives outside of mixed precision, whose eight bits leave few importances apart,
    where they are to be ranked."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer[0].weight.dtype))


class Backbone(nn.Module):
    """A ResNet up to its pooled vector: images `[B, 3, H, W]` → features `[B, D]`, D 512 (2048 of
    resnet50), weights from torchvision's initialisation.

    gaussian: images have a fourth channel in 0..1, a map of the facial landmarks, which weighs
    what layer1 gives (`regions.gaussian_map`).
    """

    def __init__(self, arch: str = "resnet18", gaussian: bool = False):
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
        whole = getattr(torchvision.models, arch)(weights=None)
        self.features = nn.Sequential(*(getattr(whole, name) for name in PARTS))
        self.width = whole.fc.in_features
        if gaussian:
            planes = whole.layer2[0].conv1.in_channels
            self.mask = nn.Sequential(
                nn.Conv2d(1, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
                nn.Conv2d(64, planes, 3, 2, 1, bias=False), nn.BatchNorm2d(planes),
                nn.ReLU(inplace=True), nn.Sigmoid())
        else:
            self.mask = None

    def maps(self, images: Tensor) -> Tensor:
        """What layer4 gives, `[B, D, H/32, W/32]`."""
        if self.mask is None:
            return self.features[:8](images)
        x = self.features[:5](images[:, :3])  # [B, 64, H/4, W/4]
        return self.features[5:8](x * (1 + self.mask(images[:, 3:])))

    def pool(self, maps: Tensor) -> Tensor:
        """`maps` → features `[B, D]`."""
        return self.features[8](maps).flatten(1)

    def gradcam_stage(self, side: int) -> nn.Module:
        """The layer whose maps show where the network looked in images of `side` pixels: the last
        stage, or the one before where its maps have fewer than four cells a side."""
        return self.features[7 if side > 96 else 6]


class Baseline(Backbone):
    """A linear layer on the pooled vector: images `[B, 3, H, W]` → logits `[B, C]`.

    drop_rate: of the dropout before it, in training.
    """

    def __init__(self, n_label: int, arch: str = "resnet18", drop_rate: float = 0,
                 gaussian: bool = False):
        super().__init__(arch, gaussian)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.width, n_label)

    def classify(self, maps: Tensor) -> Tensor:
        return self.fc(self.dropout(self.pool(maps)))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.maps(images))


class SCN(Baseline):
    """Self-cure network: images `[B, 3, H, W]` → (logits `[B, C]`, importance `[B, 1]`), the
    logits weighted by the importance (eq. 2)."""

    def __init__(self, n_label: int, arch: str = "resnet18", drop_rate: float = 0,
                 gaussian: bool = False):
        super().__init__(n_label, arch, drop_rate, gaussian)
        self.alpha = nn.Sequential(nn.Linear(self.width, 1), nn.Sigmoid())

    def classify(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        features = self.dropout(self.pool(maps))
        importance = unmixed(self.alpha, features)
        return importance * self.fc(features), importance
