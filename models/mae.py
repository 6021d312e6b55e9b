"""Vision transformers: the masked autoencoder, and what is fine-tuned from it.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Parameters have the names
of timm's VisionTransformer and of the published autoencoder.
"""
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import masking

PATCH = 16  # pixels a side
SIZES = {"vit_tiny_patch16": (192, 12, 3), "vit_small_patch16": (384, 12, 6),
         "vit_base_patch16": (768, 12, 12)}  # width, depth, heads
VIT_NAMES = tuple(SIZES)
MAE_NAMES = tuple(f"mae_{name}" for name in SIZES)
DECODER_HEADS = 16


def sincos_positions(dim: int, grid: int) -> Tensor:
    """Fixed positions `[1, 1 + grid², dim]`: the class token's, 0, then those of the cells row by
    row: a quarter each of sin x, cos x, sin y, cos y at wavelengths 2π·10000^(4k/dim)."""
    pace = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    angles = x.reshape(-1, 1) * pace, y.reshape(-1, 1) * pace
    cells = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return torch.cat([torch.zeros(1, dim), cells.float()])[None]


class _OneDNN(torch.autograd.Function):
    """F.linear by oneDNN, which adds the bias in passing; its gradient by weights and bias as ever,
    for which oneDNN is no faster."""
    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build

    @classmethod
    def takes(cls, tokens: Tensor) -> bool:
        """Whether it is for training on `tokens`: float32 on a CPU."""
        return (cls.product is not None and torch.is_grad_enabled() and tokens.device.type == "cpu"
                and tokens.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))

    @classmethod
    def multiply(cls, tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cls.product(tokens, weight, bias, "none", [], "")

    @staticmethod
    def forward(ctx, tokens, weight, bias):
        ctx.save_for_backward(tokens, weight)
        return _OneDNN.multiply(tokens, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        tokens, weight = ctx.saved_tensors
        rows, wanted = gradient.flatten(0, -2), ctx.needs_input_grad
        return (_OneDNN.multiply(gradient, weight.t().contiguous()) if wanted[0] else None,
                rows.t() @ tokens.flatten(0, -2) if wanted[1] else None,
                rows.sum(0) if wanted[2] else None)


def _linear(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear; on AMD's CPUs the library behind that takes a tenth longer than oneDNN."""
    product = _OneDNN.apply if _OneDNN.takes(tokens) else F.linear
    return product(tokens, weight, bias)


def _apply(layer: nn.Linear, tokens: Tensor) -> Tensor:
    return _linear(tokens, layer.weight, layer.bias)


class _Attention(Attention):
    """timm's: all tokens are looked at, by those from the number `since` on."""

    def forward(self, tokens: Tensor, since: int = 0) -> Tensor:
        if since:
            width = tokens.shape[-1]
            weights, biases = (part.split([width, 2 * width])
                               for part in (self.qkv.weight, self.qkv.bias))
            query = _linear(tokens[:, since:], weights[0], biases[0])
            query, pairs = query.unflatten(-1, (self.num_heads, -1)), _linear(
                tokens, weights[1], biases[1]).unflatten(-1, (2, self.num_heads, -1))
            each = query, *pairs.unbind(2)
        else:
            each = _apply(self.qkv, tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        query, key, value = (one.transpose(1, 2) for one in each)  # [N, heads, L, d]
        if query.requires_grad and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            # the gradient of the fused product takes three times as long
            mixed = (self.scale * query @ key.transpose(2, 3)).softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return _apply(self.proj, mixed.transpose(1, 2).flatten(2))


class _Block(Block):
    """timm's, which gives the tokens from the number `since` on: only these pass the MLP."""

    def __init__(self, width: int, heads: int, drop_path: float):
        super().__init__(width, heads, qkv_bias=True, drop_path=drop_path,
                         norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.attn = _Attention(width, heads, qkv_bias=True)

    def forward(self, tokens: Tensor, since: int = 0) -> Tensor:
        kept = tokens[:, since:] + self.drop_path1(self.attn(self.norm1(tokens), since))
        wide = self.mlp.act(_apply(self.mlp.fc1, self.norm2(kept)))
        return kept + self.drop_path2(_apply(self.mlp.fc2, wide))


def _blocks(width: int, depth: int, heads: int, drop_path: float = 0) -> nn.ModuleList:
    """timm's blocks; the share of dropped ones rises from 0 to `drop_path`."""
    rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
    return nn.ModuleList([_Block(width, heads, rate) for rate in rates])


class Trunk(nn.Module):
    """What pre-training and fine-tuning share: the embedded patches and the blocks on them."""

    def __init__(self, width: int, depth: int, heads: int, input_size: int, drop_path: float = 0):
        super().__init__()
        if input_size % PATCH:
            raise ValueError(f"images of {input_size} pixels: a side is a multiple of {PATCH}")
        self.grid, self.depths = input_size // PATCH, (depth,)
        self.patch_embed = PatchEmbed(input_size, PATCH, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid))
        self.blocks = _blocks(width, depth, heads, drop_path)

    def start(self) -> None:
        """Draws the weights (the published code's, section A.1): Xavier uniform, the patches'
        projection as that of a vector of pixels."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    def patches(self, images: Tensor) -> Tensor:
        """Images `[N, 3, S, S]` → patches `[N, L, 768]`; raises ValueError for images of another
        size than the positions are of."""
        side = PATCH * self.grid
        if images.shape[2:] != (side, side):
            raise ValueError(f"images of {' x '.join(map(str, images.shape[2:]))}: this network "
                             f"takes {side} x {side}")
        return masking.patchify(images, PATCH)

    def encode(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        """Patches `[N, L, 768]` (`masking.patchify`) → tokens `[N, 1 + K, D]` of the class and of
        those `kept` `[N, K]`, of all where it is None; no others are computed."""
        places = self.pos_embed[:, 1:]
        if kept is not None:
            patches, places = masking.take(patches, kept), masking.take(
                places.expand(len(patches), -1, -1), kept)
        # the convolution as a product: its windows do not overlap
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = F.linear(patches, weight, self.patch_embed.proj.bias) + places
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([first, tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


# ---------------------------------------------------------------- pre-training

class MAE(Trunk):
    """Masked autoencoder: a random part of the patches is encoded, and the others' pixels are
    predicted by a decoder that is thrown away."""
    may_lack = ("mask_token", "decoder_")
    may_hold = ("head.", "fc_norm.")
    cell = PATCH

    def __init__(self, width: int, depth: int, heads: int, input_size: int = 224,
                 norm_pix_loss: bool = False, decoder_depth: int = 8,
                 decoder_embed_dim: int = 512):
        super().__init__(width, depth, heads, input_size)
        self.norm_pix_loss = norm_pix_loss
        self.pos_embed.requires_grad_(False)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid),
                                              requires_grad=False)
        self.decoder_blocks = _blocks(decoder_embed_dim, decoder_depth, DECODER_HEADS)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, PATCH ** 2 * 3)
        self.start()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float = 0.75,
                noise: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images `[N, 3, S, S]` → (loss, prediction `[N, L, 768]`, mask `[N, L]`, 1 where a patch
        is hidden). noise: `[N, L]` in place of the draw. In training the prediction is None: of
        the last block only what the loss reads is computed. Raises ValueError for a ratio that
        hides none, and as `patches`."""
        patches = self.patches(images)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        order, n_kept, mask = masking.draw_order(noise, mask_ratio)
        latent = self.norm(self.encode(patches, order[:, :n_kept]))
        said = self.decode(latent, order)
        hidden = masking.take(patches, order[:, n_kept:])
        if not hidden.shape[1]:
            raise ValueError(f"mask_ratio {mask_ratio}: no patch of {self.grid ** 2} is hidden")
        loss = F.mse_loss(said[:, -hidden.shape[1]:].to(hidden),
                          masking.pixel_targets(hidden, self.norm_pix_loss))
        return loss, None if self.training else masking.take(said, order.argsort(1)), mask

    def decode(self, latent: Tensor, order: Tensor) -> Tensor:
        """Encoded tokens `[N, 1 + K, D]` of the first K patches of `order` `[N, L]` → predictions
        in that order: of all patches, in training of the hidden ones alone.

        Blocks do not know the order of their tokens, so those that stay and those that are hidden
        lie apart, and nothing is put back in place before the end.
        """
        n, first = len(latent), latent.shape[1]
        tokens = self.decoder_embed(latent)
        places = masking.take(self.decoder_pos_embed[:, 1:].expand(n, -1, -1), order)
        hidden = self.mask_token.to(tokens.dtype).expand(n, order.shape[1] - first + 1, -1)
        tokens = torch.cat([tokens, hidden], 1) + torch.cat(
            [self.decoder_pos_embed[:, :1].expand(n, -1, -1), places], 1)
        *others, last = self.decoder_blocks
        for block in others:
            tokens = block(tokens)
        tokens = last(tokens, first if self.training else 1)
        return _apply(self.decoder_pred, self.decoder_norm(tokens))


def create_mae(name: str, norm_pix_loss: bool = False, input_size: int = 224,
               decoder_depth: int = 8, decoder_embed_dim: int = 512) -> MAE:
    """The autoencoder of one of MAE_NAMES; raises ValueError."""
    return MAE(*_size(name), input_size, norm_pix_loss, decoder_depth, decoder_embed_dim)


def _size(name: str) -> tuple[int, int, int]:
    if name.removeprefix("mae_") not in SIZES:
        raise ValueError(f"model {name!r}: choose from {', '.join(SIZES)}")
    return SIZES[name.removeprefix("mae_")]


# ---------------------------------------------------------------- fine-tuning

class VisionTransformer(Trunk):
    """Images `[N, 3, S, S]` → logits `[N, C]`, from the mean of the patches' tokens or, without
    `global_pool`, from the class token; positions are trained too."""
    may_lack = ("head.", "fc_norm.")
    may_hold = ("mask_token", "decoder_", "head.", "norm.", "fc_norm.")

    def __init__(self, n_label: int, width: int, depth: int, heads: int, input_size: int = 224,
                 global_pool: bool = True, drop_path: float = 0.1):
        super().__init__(width, depth, heads, input_size, drop_path)
        self.global_pool = global_pool
        if not global_pool:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, n_label)
        if global_pool:  # after the head, as in the public code, whose optimizers count on it
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.start()
        trunc_normal_(self.head.weight, std=2e-5)

    def embed(self, images: Tensor) -> Tensor:
        """What the last layer sees, `[N, D]`."""
        tokens = self.encode(self.patches(images))
        if self.global_pool:
            return self.fc_norm(tokens[:, 1:].mean(1))
        return self.norm(tokens)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def gradcam_stage(self, side: int) -> nn.Module:
        """The layer whose tokens `[N, 1 + L, D]` show where the network looked."""
        return self.blocks[-1].norm1


def create_vit(name: str, n_label: int, global_pool: bool = True, drop_path: float = 0.1,
               input_size: int = 224) -> VisionTransformer:
    """The classifier of one of VIT_NAMES, or of MAE_NAMES; raises ValueError."""
    return VisionTransformer(n_label, *_size(name), input_size, global_pool, drop_path)
