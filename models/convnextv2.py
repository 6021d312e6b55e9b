"""ConvNeXt V2, and its masked autoencoder FCMAE.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", CVPR 2023,
section 3. Maps travel as tokens `[N, L, D]`. What hides an image hides whole cells of 32 pixels,
which neither the stem nor the down-samplings overlap: of a masked image, everything but the
depthwise convolutions is computed on the positions of visible cells alone.
"""
from dataclasses import dataclass
from itertools import pairwise

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from models.masking import draw_order, patchify, pixel_targets, take

CELL = 32  # pixels, of the coarsest map
SIZES = {  # blocks of the four stages, and their widths
    "convnextv2_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnextv2_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnextv2_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnextv2_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnextv2_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnextv2_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnextv2_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnextv2_huge": ((3, 3, 27, 3), (352, 704, 1408, 2816))}
CONVNEXT_NAMES = tuple(SIZES)


@dataclass(frozen=True)
class Place:
    """Where tokens are: in a map of height x width, all of it row by row, or at the rows `index`
    `[N·L]` of a batch's `[N·height·width]` positions."""
    height: int
    width: int
    index: Tensor | None = None

    def spread(self, tokens: Tensor) -> Tensor:
        """Tokens `[N, L, D]` → maps `[N, D, height, width]`, channels innermost in memory, 0 where
        there is no token."""
        n, _, dim = tokens.shape
        if self.index is not None:
            dense = tokens.new_zeros(n * self.height * self.width, dim)
            tokens = dense.index_copy_(0, self.index, tokens.flatten(0, 1))
        return tokens.view(n, self.height, self.width, dim).permute(0, 3, 1, 2)

    def collect(self, maps: Tensor) -> Tensor:
        """`spread` undone."""
        tokens = maps.permute(0, 2, 3, 1).flatten(0, 2)  # [N·height·width, D]
        tokens = tokens if self.index is None else tokens.index_select(0, self.index)
        return tokens.view(len(maps), -1, tokens.shape[-1])


def places(cells: Tensor, height: int, width: int) -> list[Place]:
    """Of the cells `[N, K]` of images of height x width cells, the places of their tokens in the
    four stages, finest first. The four that a down-sampling joins follow each other."""
    y, x = cells // width, cells % width
    first = torch.arange(len(cells), device=cells.device)[:, None]
    quarter, found = torch.arange(4, device=cells.device), []
    for stage in range(4):
        if stage:
            y = (2 * y[..., None] + quarter // 2).flatten(1)
            x = (2 * x[..., None] + quarter % 2).flatten(1)
        h, w = height << stage, width << stage
        found.insert(0, Place(h, w, ((first * h + y) * w + x).flatten()))
    return found


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of tokens on a CPU. oneDNN's gradient of the weight takes several times
    as long as its forward pass; the same numbers are a depthwise convolution as well, of the maps
    with the gradient as the kernel, which is fast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, tokens, weight, bias, place):
        maps = place.spread(tokens)
        ctx.save_for_backward(maps, weight)
        ctx.place = place
        return place.collect(F.conv2d(maps, weight, bias, padding=3, groups=len(weight)))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        maps, weight = ctx.saved_tensors
        n, dim, h, w = maps.shape
        dense = ctx.place.spread(gradient)
        tokens = ctx.place.collect(F.conv2d(dense, weight.flip(2, 3), padding=3, groups=dim))
        # the images as further channels, which stay innermost
        kernel, signal = (part.permute(2, 3, 0, 1).reshape(h, w, -1).permute(2, 0, 1)
                          for part in (dense, maps))
        weight = F.conv2d(signal[None], kernel[:, None], padding=3, groups=n * dim)
        return tokens, weight.view(n, dim, 1, 7, 7).sum(0), gradient.sum((0, 1)), None


class GRN(nn.Module):
    """Global response normalisation of tokens `[N, L, D]`, per image (section 3.3)."""

    def __init__(self, dim):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))

    def factor(self, x: Tensor) -> Tensor:
        """What a token is multiplied by, `[N, 1, D]`, before beta is added."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # 256² is too much in float16
        squares = (x.to(dtype) if x.dtype == torch.float16 else x).square()
        # a root's slope at 0 is infinite; torch's own norm takes several times as long
        response = squares.sum(1, keepdim=True, dtype=dtype).clamp_min(1e-30).sqrt()
        return 1 + self.gamma[0] * response / (response.mean(-1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """Section 3.3, figure 5."""

    def __init__(self, dim, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, place: Place, since: int = 0) -> Tensor:
        """Tokens `[N, L, D]` → the same, of those from the number `since` on."""
        conv = self.dwconv
        if x.device.type == "cpu":
            y = _Depthwise.apply(x, conv.weight, conv.bias, place)
        else:
            y = place.collect(conv(place.spread(x)))
        y = F.gelu(self.pwconv1(self.norm(y)))  # [N, L, 4 D]
        factor, beta = self.grn.factor(y), self.grn.beta[0, 0, 0]
        y = torch.addcmul(beta.to(y), y[:, since:], factor.to(y))
        return x[:, since:] + self.drop_path(self.pwconv2(y))


class Trunk(nn.Module):
    """The four stages. drop_path: of the last block; it rises linearly from 0."""

    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...], drop_path: float = 0.0):
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.LayerNorm(dims[0], eps=1e-6))])
        for into, out in pairwise(dims):
            self.downsample_layers.append(
                nn.Sequential(nn.LayerNorm(into, eps=1e-6), nn.Conv2d(into, out, 2, 2)))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates)) for _ in range(depth)))
            for depth, dim in zip(depths, dims))
        self.apply(_initialise)

    def tokens(self, images: Tensor, cells: Tensor | None = None) -> Tensor:
        """Images `[N, 3, H, W]` → tokens of the last stage, of all positions row by row, or of
        the cells `[N, K]` alone, the others hidden: `[N, K, D]`."""
        n, _, height, width = images.shape
        x = _patches(images, 4)  # [N, L, 48]
        if cells is None:
            at = [Place(height // side, width // side) for side in (4, 8, 16, 32)]
        else:
            at = places(cells, height // CELL, width // CELL)
            x = x.flatten(0, 1).index_select(0, at[0].index).view(n, -1, x.shape[-1])
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            if i == 0:
                x = down[1](_convolve(down[0], x))
            elif cells is None:
                x = _convolve(down[1], _patches(at[i - 1].spread(down[0](x)), 2))
            else:
                x = _convolve(down[1], down[0](x).view(n, at[i].index.numel() // n, -1))
            for block in stage:
                x = block(x, at[i])
        return x


def _patches(maps, side):
    """`patchify` of what is a whole number of patches, as a strided convolution sees it."""
    h, w = (length - length % side for length in maps.shape[-2:])
    return patchify(maps[..., :h, :w], side)


def _convolve(conv, patches):
    """A convolution whose stride is its kernel's side, of patches."""
    return F.linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def _initialise(module):
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class ConvNeXtV2(Trunk):
    """A classifier: images `[B, 3, H, W]` → logits `[B, n_label]`."""

    may_lack = ("head.", "norm.")
    may_hold = ("mask_token", "proj.", "decoder.", "pred.", "head.")

    def __init__(self, n_label: int, depths: tuple[int, ...], dims: tuple[int, ...],
                 drop_path: float = 0.0):
        super().__init__(depths, dims, drop_path)
        self.depths = depths
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], n_label)
        _initialise(self.head)
        with torch.no_grad():  # as published for fine-tuning
            self.head.weight *= 0.001

    def maps(self, images: Tensor) -> Tensor:
        """What the last stage gives, `[B, D, H/32, W/32]`."""
        return Place(*(length // CELL for length in images.shape[-2:])).spread(self.tokens(images))

    def pool(self, maps: Tensor) -> Tensor:
        """`maps` → pooled, normalised features `[B, D]`."""
        return self.norm(maps.mean((2, 3)))

    def classify(self, maps: Tensor) -> Tensor:
        """`maps` → logits `[B, n_label]`."""
        return self.head(self.pool(maps))

    def embed(self, images: Tensor) -> Tensor:
        """Images → pooled, normalised features `[B, D]`."""
        return self.pool(self.maps(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.maps(images))

    def gradcam_stage(self, side: int) -> nn.Module:
        """The layer whose tokens show where the network looked in images of `side` pixels."""
        return self.stages[-1 if side > 96 else -2][-1]


class FCMAE(nn.Module):
    """Masked autoencoder: hidden cells of images `[N, 3, H, W]`, sides multiples of 32, are
    predicted from the others (section 3.1).

    depth, width: of the decoder; norm_pix_loss: targets are brought to mean 0 and variance 1.
    """

    may_lack = ("mask_token", "proj.", "decoder.", "pred.")
    may_hold = ("head.", "norm.")
    cell = CELL

    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...], norm_pix_loss: bool = True,
                 depth: int = 1, width: int = 512):
        super().__init__()
        self.norm_pix_loss = norm_pix_loss
        self.encoder = Trunk(depths, dims)
        self.proj = nn.Conv2d(dims[-1], width, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.ModuleList(Block(width) for _ in range(depth))
        self.pred = nn.Conv2d(width, 3 * CELL ** 2, 1)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float = 0.6, noise: Tensor | None = None
                ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(loss, predicted patches `[N, L, 3072]`, mask `[N, L]`, 1 where hidden); in training
        there is no prediction but what the loss needs, and None is given. noise `[N, L]`: by
        which cells are ordered, the first of them visible [drawn]."""
        n, _, *size = images.shape
        if any(length % CELL for length in size):
            raise ValueError(f"images of {size[0]} x {size[1]}: sides are multiples of {CELL}")
        height, width = (length // CELL for length in size)
        if noise is None:
            noise = torch.rand(n, height * width, device=images.device)
        order, n_kept, mask = draw_order(noise, mask_ratio)
        x = _convolve(self.proj, self.encoder.tokens(images, order[:, :n_kept]))
        hidden = self.mask_token.flatten(1).to(x.dtype).expand(n, mask.shape[1] - n_kept, -1)
        x = torch.cat([x, hidden], 1)  # [N, L, width], in that order
        place, since = places(order, height, width)[-1], 0
        for i, block in enumerate(self.decoder):
            if self.training and i == len(self.decoder) - 1:
                since = n_kept  # the loss sees no others
            x = block(x, place, since)
        predicted = _convolve(self.pred, x)  # [N, L - since, 3072]
        targets = pixel_targets(take(patchify(images, CELL), order[:, n_kept:]),
                                self.norm_pix_loss)
        errors = F.mse_loss(predicted[:, n_kept - since:].to(targets), targets, reduction="sum")
        loss = errors / max(1, targets.numel())
        if since:
            return loss, None, mask
        return loss, take(predicted, order.argsort(dim=1)), mask


def _size(name):
    if name not in SIZES:
        raise ValueError(f"model {name!r}: choose from {', '.join(SIZES)}")
    return SIZES[name]


def create_convnextv2(name: str, n_label: int, drop_path: float = 0.0) -> ConvNeXtV2:
    """A classifier of a size of SIZES."""
    return ConvNeXtV2(n_label, *_size(name), drop_path)


def create_fcmae(name: str, norm_pix_loss: bool = True, decoder_depth: int = 1,
                 decoder_embed_dim: int = 512) -> FCMAE:
    """A masked autoencoder whose encoder is a size of SIZES."""
    return FCMAE(*_size(name), norm_pix_loss, decoder_depth, decoder_embed_dim)
