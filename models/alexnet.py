"""AlexNet with half the channels in each of two views (CMC: Tian, Krishnan, Isola 2020)."""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from models.dual import DualView, Tower


class ConvBlock(nn.Sequential):
    """Convolution, batch norm (hence no bias), ReLU and, if asked for, an overlapping pooling."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0, pool=False):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True), *[nn.MaxPool2d(3, 2)] * pool)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *rest = self
        if norm.training:
            return super().forward(x)
        # with fixed statistics the norm is a factor per channel, and cheaper in the weights
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        x = F.conv2d(x, conv.weight * scale.view(-1, 1, 1, 1),
                     norm.bias - norm.running_mean * scale, conv.stride, conv.padding)
        for layer in rest:
            x = layer(x)
        return x


def fc_block(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features),
                         nn.ReLU(inplace=True))


class AlexNetTower(Tower):
    """Half an AlexNet for crops of `size` pixels.

    Taps: 1–5 convolution blocks, 6 and 7 fully connected `[B, 2048]`, 8 projection. Raises
    ValueError for crops of which the poolings leave nothing.
    """

    def __init__(self, in_channels, feat_dim=128, size=224):
        super().__init__()
        channels = c1, c2, c3, c4, c5 = 48, 128, 192, 192, 128
        self.conv_block_1 = ConvBlock(in_channels, c1, 11, 4, 2, pool=True)
        self.conv_block_2 = ConvBlock(c1, c2, 5, padding=2, pool=True)
        self.conv_block_3 = ConvBlock(c2, c3, 3, padding=1)
        self.conv_block_4 = ConvBlock(c3, c4, 3, padding=1)
        self.conv_block_5 = ConvBlock(c4, c5, 3, padding=1, pool=True)
        sides = [(size + 4 - 11) // 4 + 1]  # after the first convolution, then after each pooling
        for _ in range(3):
            sides.append((sides[-1] - 3) // 2 + 1)
        if sides[-1] < 1:
            raise ValueError(f"size {size}: AlexNet takes crops of 63 pixels or more")
        _, s1, s2, s5 = sides
        self.shapes = list(zip(channels, (s1, s2, s2, s2, s5)))
        self.fc6 = fc_block(c5 * s5 * s5, 2048)
        self.fc7 = fc_block(2048, 2048)
        self.fc8 = nn.Sequential(nn.Linear(2048, feat_dim))

    def stages(self) -> tuple:
        # shapes for crops of 224 pixels
        return (self.conv_block_1,  # [B, 48, 27, 27]
                self.conv_block_2,  # [B, 128, 13, 13]
                self.conv_block_3,  # [B, 192, 13, 13]
                self.conv_block_4,
                self.conv_block_5,  # [B, 128, 6, 6]
                lambda x: self.fc6(x.flatten(1)),  # [B, 2048]
                self.fc7,
                self.fc8)  # [B, feat_dim]


def alexnet(feat_dim: int = 128, in_channels: tuple = (3, 1), size: int = 224) -> DualView:
    """Dual-view AlexNet, `[B, C1+C2, size, size]` → two features `[B, feat_dim]`."""
    return DualView(partial(AlexNetTower, feat_dim=feat_dim, size=size), in_channels)
