"""What masked autoencoders share: patches, which of them are hidden, and the loss on those.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3.
"""
import torch
from torch import Tensor


def patchify(images: Tensor, side: int) -> Tensor:
    """Images `[N, 3, H, W]` → patches `[N, L, side·side·3]`, row by row, a pixel's colours
    together."""
    n, channels, height, width = images.shape
    patches = images.reshape(n, channels, height // side, side, width // side, side)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, side * side * channels)


def unpatchify(patches: Tensor, side: int) -> Tensor:
    """`patchify` undone, of square images: `[N, L, side·side·3]` → `[N, 3, H, H]`."""
    n, length, pixels = patches.shape
    across = round(length ** 0.5)
    images = patches.reshape(n, across, across, side, side, pixels // side ** 2)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, across * side, across * side)


def count_kept(length: int, mask_ratio: float) -> int:
    """How many of the patches stay."""
    return int(length * (1 - mask_ratio))


def draw_order(noise: Tensor, mask_ratio: float) -> tuple[Tensor, int, Tensor]:
    """(order of the patches, `[N, L]`: first those that stay, by their noise; how many stay; mask
    `[N, L]`, 1 where a patch is hidden) of noise `[N, L]`, section 3.1."""
    n_kept = count_kept(noise.shape[1], mask_ratio)
    order = noise.argsort(dim=1, stable=True)
    mask = torch.ones(noise.shape, device=noise.device)
    return order, n_kept, mask.scatter(1, order[:, :n_kept], 0.0)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens `[N, L, D]` at `index` `[N, K]`: `[N, K, D]`."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def pixel_targets(patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """What is predicted of patches `[N, L, P]`: their pixels, or those brought to mean 0 and
    variance 1 within each patch (section 4.1)."""
    if not norm_pix_loss:
        return patches
    variance, mean = torch.var_mean(patches, -1, keepdim=True)
    return (patches - mean) / (variance + 1e-6) ** 0.5
