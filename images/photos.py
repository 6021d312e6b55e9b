"""Batches of face photographs on any device: training and evaluation transforms side by side.

Everything random is drawn once for a whole batch; geometry, crops and flips are one resampling,
colours and normalisation one matrix per image.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from images.encoding import GREY
from images.transforms import per_channel

# of ImageNet's images, which pre-trained networks expect
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEGREES, LARGER, MOVED, COLOUR = 15, 0.15, 0.06, 0.3  # ranges of the strong recipe
NOISE = math.sqrt(30) / 255  # deviation, of grey levels in 0..1


def draw(n: int, rng: torch.Generator, recipe: str, side: int) -> dict:
    """Everything random about a batch of `n` images, drawn for the whole batch from `rng`.

    recipe: 'strong': flip, turn, scale, shift, colour jitter, erasing; 'published': flip or noise,
    erasing; 'flip'; 'none'. Returns a dict of tensors `[n, ...]`, to be cut along the batch:
    `geometry` `[n, 2, 3]` (output → input, both in [-1, 1]) and, where the recipe has them,
    `colour` `[n, 3]` (brightness, contrast, saturation), `noise` `[n]` (seeds, 0: none) and
    `erase` `[n, 4]` (left, top, right, bottom in pixels).
    """
    def uniform(*shape):
        return torch.rand(n, *shape, generator=rng)

    flip = (uniform() < 0.5) & (recipe != "none")
    geometry = torch.zeros(n, 2, 3)
    geometry[:, 0, 0] = geometry[:, 1, 1] = 1
    drawn = {"geometry": geometry}
    if recipe == "published":
        augmented = uniform() < 0.5
        noisy = uniform() < 0.5
        flip = augmented & ~noisy
        drawn["noise"] = torch.where(augmented & noisy, torch.randint(
            1, 2 ** 31, (n,), generator=rng), 0)
        drawn["erase"] = _erased(n, rng, side, (0.02, 0.25))
    if recipe == "strong":
        angle = math.radians(DEGREES) * (2 * uniform() - 1)
        scale = 1 + LARGER * (2 * uniform() - 1)
        geometry[:, 0, 0] = geometry[:, 1, 1] = angle.cos() / scale
        geometry[:, 0, 1], geometry[:, 1, 0] = -angle.sin() / scale, angle.sin() / scale
        geometry[:, :, 2] = 2 * MOVED * (2 * uniform(2) - 1)
        drawn["colour"] = 1 + COLOUR * (2 * uniform(3) - 1)
        drawn["erase"] = _erased(n, rng, side, (0.02, 0.2))
    geometry[:, :, 0] *= torch.where(flip, -1.0, 1.0)[:, None]
    return drawn


def _erased(n, rng, side, areas):
    """Boxes of random erasing (Zhong et al. 2020), half of them empty."""
    area = areas[0] + (areas[1] - areas[0]) * torch.rand(n, generator=rng)
    ratio = torch.exp((2 * torch.rand(n, generator=rng) - 1) * math.log(1 / 0.3))
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1) * side
    first = torch.rand(n, 2, generator=rng) * (side - size)
    boxes = torch.cat([first, first + size], 1).round()
    boxes[torch.rand(n, generator=rng) < 0.5] = 0
    return boxes


def train_transform(images: Tensor, drawn: dict, boxes: Tensor | None = None,
                    marks: Tensor | None = None, inside: bool = False) -> Tensor:
    """Augments and normalises uint8 `[B, 3, S, S]` → float32 `[B, 3, S, S]`, channels-last.

    drawn: `draw`'s tensors for these B images; boxes: views `[B, K, 4]` (left, top, right, bottom
    in pixels), then `[B, K, 3, S, S]`; they are cut out of the augmented image, or, `inside`, each
    is augmented by itself, as boxes about a part of the face must be; marks: a fourth channel
    `[B, 1, S, S]` that goes with the image.
    """
    drawn = {name: value.to(images.device) for name, value in drawn.items()}
    colour = drawn.get("colour")
    whole = _with_marks(_coloured(images, colour, drawn.get("noise")), marks)
    views = resample(whole, drawn["geometry"], boxes, inside)
    if "erase" in drawn:
        views = _erase(views, drawn["erase"])
    return views


def eval_transform(images: Tensor, mirror: bool = False, boxes: Tensor | None = None,
                   marks: Tensor | None = None) -> Tensor:
    """Normalises uint8 `[B, 3, S, S]`, mirrored or not; boxes and marks as in `train_transform`;
    nothing random."""
    whole = _with_marks(_coloured(images, None, None), marks)
    if boxes is not None:
        whole = resample(whole, None, boxes)
    return whole.flip(-1) if mirror else whole


def _with_marks(images, marks):
    return images if marks is None else torch.cat([images, marks], 1)


def _coloured(images, colour, noise):
    """Colours jittered and normalised: uint8 → float32 `[B, 3, S, S]`, channels-last."""
    x = images.to(memory_format=torch.channels_last).float()
    mean, std = (x.new_tensor(value) * 255 for value in (MEAN, STD))
    if colour is None:
        x = x.sub_(per_channel(mean, x)).div_(per_channel(std, x))
        if noise is None:
            return x
    else:
        grey = x.new_tensor(GREY)
        brightness, contrast, saturation = colour.unbind(1)
        # saturation: towards the pixel's grey; contrast: towards the image's
        mix = saturation.view(-1, 1, 1) * torch.eye(3, device=x.device) \
            + (1 - saturation).view(-1, 1, 1) * grey.expand(3, 3)  # [B, 3, 3]
        level = (x.mean((2, 3)) * grey).sum(1)  # [B]
        mix = mix * (brightness * contrast).view(-1, 1, 1) / std.view(1, 3, 1)
        offset = ((1 - contrast) * brightness * level)[:, None] - mean
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, S S, 3], no copy
        x = torch.baddbmm((offset / std)[:, None], pixels, mix.transpose(1, 2)) \
            .unflatten(1, images.shape[-2:]).permute(0, 3, 1, 2)
    if noise is not None:
        for i in noise.nonzero().flatten().tolist():
            rng = torch.Generator().manual_seed(int(noise[i]))
            grain = torch.randn(x.shape[1:], generator=rng).to(x.device)
            x[i] += grain * (255 * NOISE) / std.view(3, 1, 1)
    black, white = (per_channel(value / std, x) for value in (-mean, 255 - mean))
    return x.clamp_(black, white)


def resample(images: Tensor, geometry: Tensor | None, boxes: Tensor | None = None,
             inside: bool = False) -> Tensor:
    """Images `[B, C, S, S]` bilinearly through `geometry` `[B, 2, 3]` (output → input) and, where
    boxes `[B, K, 4]` are given, through these: `[B, K, C, S, S]`. What lies outside is
    reflected."""
    n, channels, side = len(images), *images.shape[1:3]
    if geometry is not None:
        square = geometry.new_zeros(n, 3, 3)
        square[:, :2], square[:, 2, 2] = geometry, 1
    if boxes is None:
        theta = square[:, None]
    else:
        theta = images.new_zeros(*boxes.shape[:2], 3, 3)  # view → image
        low, high = boxes[..., :2] / side * 2 - 1, boxes[..., 2:] / side * 2 - 1
        theta[..., 0, 0], theta[..., 1, 1] = ((high - low) / 2).unbind(-1)
        theta[..., :2, 2], theta[..., 2, 2] = (high + low) / 2, 1
        if geometry is not None:
            theta = theta @ square[:, None] if inside else square[:, None] @ theta
    k = theta.shape[1]
    grid = F.affine_grid(theta.flatten(0, 1)[:, :2], (n * k, channels, side, side),
                         align_corners=False)
    # the views of an image below one another: one call for all, and no copy of the image
    out = F.grid_sample(images, grid.view(n, k * side, side, 2), padding_mode="reflection",
                        align_corners=False)
    if boxes is None:
        return out.contiguous(memory_format=torch.channels_last)
    return out.unflatten(2, (k, side)).transpose(1, 2)  # [B, K, C, S, S]


def _erase(views, boxes):
    """The box of each image, `[B, 4]` in pixels, at the mean colour, in all of its views."""
    place = torch.arange(views.shape[-1], device=views.device)
    low, high = boxes[:, :2, None], boxes[:, 2:, None]
    along = (place >= low) & (place < high)  # [B, 2, S]
    hidden = along[:, 1, :, None] & along[:, 0, None, :]  # [B, S, S]
    shape = (len(views), *[1] * (views.ndim - 3), *views.shape[-2:])
    keep = (~hidden).view(shape).to(views.dtype)
    return views * keep if views.shape[-3] == 3 else torch.cat(
        [views[..., :3, :, :] * keep, views[..., 3:, :, :]], -3)
