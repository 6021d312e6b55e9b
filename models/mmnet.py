"""MMNet (Li et al., arXiv 2201.05297) and its variants on optical flow, V1 to V6c.

A convolutional branch whose attention maps multiply from block to block ("continuous attention")
sees the motion; a small transformer on the onset face ("position calibration") is added to what it
ends in. One module, sized by a Layout; the blocks of the transformer are timm's.
"""
import re
from functools import partial
from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 4  # of motion between five frames
# channels of a step of motion by the name of their set; see images.flow.channels
CHANNELS = {"n": 2, "r": 2, "s": 2, "nr": 4, "rs": 4, "ns": 4, "nrs": 6, "hsv": 3, "difference": 3}
SETS = ("n", "r", "s", "nr", "rs", "ns", "nrs")
STRIDES = 1, 2, 2, 2  # of the blocks, in space; the stem halves before them
# (kernel, stride, padding) of the blocks in time, and of the attention map's pooling before them
TIMES = (3, 1, 1), (3, 2, 1), (2, 1, 0), (2, 2, 0)
POOLS = None, (3, 2, 1), (1, 1, 0), (2, 2, 0)


class Layout(NamedTuple):
    """What the variants differ in. external: widths of the stem's convolution in space and of the
    one in time, which is missing where there is one step; temporal: its (kernel, padding);
    internal: widths of the second part, in space and, with blocks in space and time, in time;
    widths: of the four blocks; channels: the usual set; units: an action-unit head, 'logits' or
    'classes' of which the classifier sees."""
    channels: str
    external: tuple
    temporal: tuple
    internal: tuple
    widths: tuple
    units: str | None = None
    steps: int = STEPS

    @property
    def in_time(self) -> bool:
        """Whether the blocks convolve in time as well."""
        return len(self.internal) > 1


_V1 = Layout("nr", (128, 180), (3, 1), (210, 256), (256, 256, 512, 1024))
_V3 = Layout("nr", (128, 256), (4, 0), (256,), (256, 256, 512, 1024))
_V5 = Layout("nr", (180, 512), (4, 0), (512,), (512, 512, 1024, 2048))
LAYOUTS = {
    "V1": _V1, "V2": _V1._replace(channels="hsv"),
    **{f"V3{name.upper()}": _V3._replace(channels=name) for name in SETS},
    "V4": _V3._replace(internal=(128,), widths=(128, 128, 256, 512)),
    **{f"V5{name.upper()}": _V5._replace(channels=name) for name in SETS},
    "V6": _V5._replace(units="logits"), "V6c": _V5._replace(units="classes"),
    "mmnet": Layout("difference", (180,), (), (128,), (128, 128, 256, 512), steps=1)}


class Stem(nn.Module):
    """Motion `[B, C, T, S, S]` → `[B, D, S/2, S/2]`, or `[B, D, T, S/2, S/2]` in time."""

    def __init__(self, channels, layout):
        super().__init__()
        first, *second = layout.external
        external = {"spatial": nn.Conv3d(channels, first, (1, 3, 3), (1, 2, 2), (0, 1, 1),
                                         bias=False), "spatial_norm": nn.BatchNorm3d(first)}
        if second:
            kernel, padding = layout.temporal
            external |= {"temporal": nn.Conv3d(first, *second, (kernel, 1, 1),
                                               padding=(padding, 0, 0), bias=False),
                         "temporal_norm": nn.BatchNorm3d(*second)}
        into, third, *fourth = layout.external[-1], *layout.internal
        if fourth:
            internal = {"spatial": nn.Conv3d(into, third, (1, 3, 3), padding=(0, 1, 1), bias=False),
                        "spatial_norm": nn.BatchNorm3d(third),
                        "temporal": nn.Conv3d(third, *fourth, (3, 1, 1), padding=(1, 0, 0),
                                              bias=False),
                        "temporal_norm": nn.BatchNorm3d(*fourth)}
        else:
            internal = {"spatial": nn.Conv2d(into, third, 3, padding=1, bias=False),
                        "spatial_norm": nn.BatchNorm2d(third)}
        self.external, self.internal = nn.ModuleDict(external), nn.ModuleDict(internal)
        self.in_time = layout.in_time

    def forward(self, x: Tensor) -> Tensor:
        x = _chain(self.external, x)  # [B, D, T or 1, S/2, S/2]
        return _chain(self.internal, x if self.in_time else x.squeeze(2))


def _chain(parts, x):
    """Convolution, norm, ReLU, and again."""
    for name, part in parts.items():
        x = F.relu(part(x), inplace=True) if name.endswith("norm") else part(x)
    return x


class Factorised(nn.Module):
    """A 3 x 3 x 3 convolution as one in space and one in time, with about as many weights (Tran et
    al., "A Closer Look at Spatiotemporal Convolutions", section 3.5)."""

    def __init__(self, into, out, stride, time):
        super().__init__()
        middle = 27 * into * out // (9 * into + 3 * out)
        self.spatial = nn.Conv3d(into, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1),
                                 bias=False)
        self.spatial_norm = nn.BatchNorm3d(middle)
        self.temporal = nn.Conv3d(middle, out, *((n, *rest) for n, rest in zip(
            time, ((1, 1), (1, 1), (0, 0)))), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(F.relu(self.spatial_norm(self.spatial(x)), inplace=True))


class AttentionBlock(nn.Module):
    """A residual block whose map of attention, `[B, 1, ...]`, is multiplied by the one before it.

    time: (kernel, stride, padding) where it convolves in time, else None; pool: how the map before
    is pooled in time.
    """

    def __init__(self, into, out, number, in_time):
        super().__init__()
        stride, time = STRIDES[number], TIMES[number]
        conv, norm = (nn.Conv3d, nn.BatchNorm3d) if in_time else (nn.Conv2d, nn.BatchNorm2d)
        self.conv1 = Factorised(into, out, stride, time) if in_time else \
            nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = norm(out), norm(out)
        self.conv2 = conv(out, out, 1, bias=False)
        self.attention = nn.ModuleDict({"conv": conv(2, 1, 1, bias=False), "norm": norm(1)})
        self.shortcut = nn.ModuleDict()
        if number and in_time:
            self.shortcut = nn.ModuleDict({
                "spatial": nn.Conv3d(into, out, 1, (1, stride, stride)),
                "spatial_norm": nn.BatchNorm3d(out),
                "temporal": nn.Conv3d(out, out, 1, (time[1], 1, 1)),
                "temporal_norm": nn.BatchNorm3d(out)})
        elif number:
            self.shortcut = nn.ModuleDict({"conv": nn.Conv2d(into, out, 1, stride, bias=False),
                                           "norm": nn.BatchNorm2d(out)})
        self.pool = None
        if number:
            kernel, step, padding = zip(*[POOLS[number]] * in_time, (3, 2, 1), (3, 2, 1))
            self.pool = (nn.MaxPool3d if in_time else nn.MaxPool2d)(kernel, step, padding)

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `[B, D, (T,) H, W]`, the map before → (what is passed on, the map)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        for part in self.shortcut.values():
            x = part(x)
        # in time, the third block's main path has one step and its shortcut two: they broadcast
        y = F.relu(y + x)
        told = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        attention = torch.sigmoid(self.attention["norm"](self.attention["conv"](told)))
        if before is not None:
            attention = attention * self.pool(before)
        return y * attention, attention


class Position(nn.Module):
    """The onset face as a grid of tokens, through two transformer blocks: `[B, 3, S, S]` →
    `[B, dim, S/16, S/16]`."""

    def __init__(self, dim, grid):
        super().__init__()
        self.grid = grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 1)})
        self.pos_embed = nn.Parameter(torch.zeros(1, grid * grid, dim))
        # as the published blocks have it; timm's default has not always been that
        self.blocks = nn.ModuleList(Block(dim, 4, qkv_bias=True, norm_layer=partial(
            nn.LayerNorm, eps=1e-6)) for _ in range(2))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, onset: Tensor) -> Tensor:
        face = F.interpolate(onset, (self.grid, self.grid), mode="bilinear", antialias=True)
        tokens = self.patch_embed["proj"](face).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)  # [B, grid², dim]
        return self.norm(tokens).transpose(1, 2).unflatten(2, (self.grid, self.grid))


class MMNet(nn.Module):
    """layout: of the variant; channels: of a step of motion; n_label: classes; au_size: number of
    action units, of which a head then gives the logits; size: of the frames, a multiple of 16."""

    def __init__(self, layout: Layout, channels: int, n_label: int = 5, au_size: int | None = None,
                 size: int = 224):
        super().__init__()
        self.layout, self.size = layout, size
        self.stem = Stem(channels, layout)
        into = layout.internal[-1], *layout.widths
        self.blocks = nn.ModuleList(
            AttentionBlock(*into[i:i + 2], i, layout.in_time) for i in range(4))
        self.position = Position(layout.widths[-1], size // 16)
        features = layout.widths[-1] * (size // 16) ** 2
        self.au = nn.Linear(features, au_size) if au_size else None
        self.fc = nn.Linear(features + (au_size if layout.units else 0), n_label)
        self.apply(_initialise)
        self.position.apply(_initialise_position)
        nn.init.trunc_normal_(self.position.pos_embed, std=0.02)

    def channels_last(self) -> "MMNet":
        """Its convolutions with the channels innermost in memory, which is faster; itself."""
        for part in self.modules():
            if isinstance(part, nn.Conv3d):
                part.to(memory_format=torch.channels_last_3d)
            elif isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)
        return self

    def features(self, motion: Tensor, onset: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(what the heads see `[B, D]`, the maps of attention of the four blocks
        `[B, 1, (T,) h, w]`)."""
        x, attention, maps = self.stem(motion), None, []
        for block in self.blocks:
            x, attention = block(x, attention)
            maps.append(attention)
        x = x.squeeze(2) if self.layout.in_time else x  # [B, D, S/16, S/16]
        return (x + self.position(onset)).flatten(1), maps

    def classify(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits `[B, n_label]` of features; with a head for action units also theirs."""
        if self.au is None:
            return self.fc(features)
        units = seen = self.au(features)  # [B, au_size]
        if not self.layout.units:
            return self.fc(features), units
        if self.layout.units == "classes":
            share = units.sigmoid()
            # straight through: the threshold alone has no gradient (Bengio et al. 2013)
            seen = (share > 0.5).to(share) + share - share.detach()
        return self.fc(torch.cat([features, seen], 1)), units

    def forward(self, motion: Tensor, onset: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """motion `[B, C, T, S, S]`, onset face `[B, 3, S, S]` in [0, 1] → logits `[B, n_label]`;
        with a head for action units (logits, their logits `[B, au_size]`)."""
        return self.classify(self.features(motion, onset)[0])


def _initialise(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _initialise_position(module):
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def create_mmnet(name: str, n_label: int = 5, au_size: int | None = None,
                 channels: str | None = None, size: int = 224) -> MMNet:
    """A variant by name, a key of LAYOUTS.

    au_size: number of action units, which V6 and V6c need and see, and which others learn besides
    (their forward gives both too); channels: a key of CHANNELS [the
    variant's own]; size: of the frames, pixels. Raises ValueError.
    """
    if name not in LAYOUTS:
        raise ValueError(f"model {name!r}: choose from {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if layout.units and not au_size:
        raise ValueError(f"{name}: takes the number of action units")
    if size % 16 or size < 32:
        raise ValueError(f"size {size}: a multiple of 16, 32 or more")
    channels = channels or layout.channels
    if channels not in CHANNELS:
        raise ValueError(f"channels {channels!r}: choose from {', '.join(CHANNELS)}")
    return MMNet(layout, CHANNELS[channels], n_label, au_size, size)


# ---------------------------------------------------------------- published checkpoints

# of what the published classes hold, what their forward passes never use
UNUSED = ("timeembed", "head.", "pos.", "position.cls_token", "position.head", "position.to_Mask")
CHAIN = {"0": "spatial", "1": "spatial_norm", "3": "temporal", "4": "temporal_norm"}
SHORTCUT = {2: ("conv", "norm"), 4: ("spatial", "spatial_norm", "temporal", "temporal_norm")}
NAMES = (  # of the published classes, and here
    (r"^(module\.)?(pretrained\.)?", ""), (r"^last_layer\b", "fc"), (r"^vit_pos\b", "position"),
    (r"^conv_act\b", "stem.external"), (r"^main_branch\.embedau\b", "au"),
    (r"^main_branch\.fc\b", "fc"), (r"^main_branch\.stem\b", "stem.internal"),
    (r"^main_branch\.conv1\b", "stem.internal.spatial"),
    (r"^main_branch\.bn1\b", "stem.internal.spatial_norm"),
    (r"^main_branch\.layer(\d)\.0\b", lambda match: f"blocks.{int(match[1]) - 1}"),
    (r"\.bn(\d)\.", r".norm\1."), (r"\.attn\.0\.", ".attention.conv."),
    (r"\.attn\.1\.", ".attention.norm."),
    (r"\b(external|internal|conv1)\.([0134])\.", lambda match: f"{match[1]}.{CHAIN[match[2]]}."))


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published checkpoint under the names here, without those that nothing
    uses."""
    of_last_layer = any("last_layer." in name for name in state)
    parts = 4 if any(".downsample.3." in name for name in state) else 2  # of a shortcut
    named = {}
    for name, value in state.items():
        if of_last_layer and name.endswith(("main_branch.fc.weight", "main_branch.fc.bias")):
            continue  # the last layer takes its place
        for pattern, here in NAMES:
            name = re.sub(pattern, here, name)
        name = re.sub(r"\.downsample\.(\d)\.",
                      lambda match: f".shortcut.{SHORTCUT[parts][int(match[1])]}.", name)
        if name == "stem.external.spatial.weight" and value.dim() == 4:
            value = value.unsqueeze(2)  # of the original network, which has no time
        if not name.startswith(UNUSED):
            named[name] = value
    return named
