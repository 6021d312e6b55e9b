"""ResNets of 18, 50 and 101 layers, one per view, of a chosen width (He et al. 2016; CMC)."""

from functools import partial

from torch import Tensor, nn

from models.dual import DualView, Tower


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Padded convolution that keeps the size but for the stride; a batch norm follows it."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)


class Residual(nn.Module):
    """Body plus shortcut; subclasses define `body`."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride),
                                            nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.body(x) + shortcut)


class BasicBlock(Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels, planes, stride=1):
        super().__init__(in_channels, planes, stride)
        self.conv1 = conv(in_channels, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions, the stride in the middle one."""

    expansion = 4

    def __init__(self, in_channels, planes, stride=1):
        super().__init__(in_channels, planes * self.expansion, stride)
        self.conv1 = conv(in_channels, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)

    def body(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNetTower(Tower):
    """ResNet of a given block, blocks per stage and width; any input size, `shapes` being those
    for crops of `size` pixels.

    Taps: 1 stem, 2–5 stages, 6 average-pooled vector, 7 projection. The width scales the stages,
    not the stem.
    """

    def __init__(self, in_channels, block, blocks, width=1, feat_dim=128, size=224):
        super().__init__()
        channels = 64
        self.conv1 = conv(in_channels, channels, 7, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        side = -(-size // 4)  # stem and pooling halve, rounding up
        self.shapes = [(channels, side)]
        for number, count in enumerate(blocks, 1):
            planes = int(64 * width) * 2 ** (number - 1)
            stage = []
            for i in range(count):
                stage.append(block(channels, planes, 2 if number > 1 and i == 0 else 1))
                channels = planes * block.expansion
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            side = side if number == 1 else -(-side // 2)
            self.shapes.append((channels, side))
        self.shapes.append((channels, None))  # pooled
        self.fc = nn.Linear(channels, feat_dim)
        for module in self.modules():
            # on the meta device there is nothing to fill, and asking for it imports for a second
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def stages(self) -> tuple:
        # shapes for crops of 224 pixels, w = 64 * width, e = block.expansion
        return (self.stem,  # [B, 64, 56, 56]
                self.layer1,  # [B, w e, 56, 56]
                self.layer2,  # [B, 2 w e, 28, 28]
                self.layer3,  # [B, 4 w e, 14, 14]
                self.layer4,  # [B, 8 w e, 7, 7]
                lambda x: x.mean((2, 3)),  # [B, 8 w e]
                self.fc)  # [B, feat_dim]


def resnet(block: type[Residual], blocks: tuple[int, ...], width: float, feat_dim: int = 128,
           in_channels: tuple = (3, 1), size: int = 224) -> DualView:
    """Dual-view ResNet, `[B, C1+C2, H, W]` → two features `[B, feat_dim]`, whatever the size."""
    return DualView(partial(ResNetTower, block=block, blocks=blocks, width=width,
                            feat_dim=feat_dim, size=size), in_channels)


resnet18 = partial(resnet, BasicBlock, (2, 2, 2, 2))
resnet50 = partial(resnet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(resnet, Bottleneck, (3, 4, 23, 3))
