"""RandAugment for a batch of photographs on any device, step by step to all images that take it.

Cubuk et al., "RandAugment: Practical automated data augmentation", NeurIPS 2020, as timm means a
policy of steps that are the stronger, the greater their magnitude.
"""
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from images.encoding import GREY
from images.photos import MEAN

FILL = tuple(round(255 * value) for value in MEAN)  # where an image is moved away


def warp(images: Tensor, theta: Tensor, side: int, fill: tuple | None = None) -> Tensor:
    """Bicubically through `theta` `[B, 2, 3]` (output → input, both in [-1, 1]): uint8
    `[B, 3, S, S]` → `[B, 3, side, side]`, channels-last. fill: the colour of what lies outside;
    without, the edge goes on."""
    place = (2 * torch.arange(side, device=images.device) + 1) / side - 1
    along, down, shift = theta[:, None, None].unbind(-1)  # [B, 1, 1, 2]
    # not by a matrix product, which may be rounded to half of a float's digits
    grid = along * place[:, None] + down * place[:, None, None] + shift  # [B, side, side, 2]
    out = F.grid_sample(images.float(), grid, mode="bicubic", padding_mode="border",
                        align_corners=False).round_().clamp_(0, 255)
    if fill is not None:
        outside = (grid.abs() > 1).any(-1)[:, None]  # [B, 1, side, side]
        out = torch.where(outside, out.new_tensor(fill).view(3, 1, 1), out)
    return out.to(torch.uint8, memory_format=torch.channels_last)


def _grey(images):
    """uint8 `[B, 3, S, S]` → `[B, 1, S, S]`, float, in whole levels."""
    return (images * images.new_tensor(GREY, dtype=torch.float).view(3, 1, 1)) \
        .sum(1, keepdim=True).round_()


def _smooth(images):
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=torch.float)
    out = images.float()
    within = F.conv2d(out, kernel.expand(3, 1, 3, 3), groups=3) / 13
    out[..., 1:-1, 1:-1] = within.round_()  # the outermost pixels stay
    return out


def _blend(base, images, factor):
    """From `base` to the images and beyond."""
    return torch.lerp(base.expand_as(images), images.float(), factor).clamp_(0, 255) \
        .to(torch.uint8)


def _moved(row: int, column: int, scale: float, corner: float = 0):
    """A step that adds `scale` × amount to an entry of the map from output to input."""
    def step(images, amount):
        theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
        theta[:, row, column] += scale * amount.flatten()
        theta[:, row, 2] += corner * amount.flatten()
        return warp(images, theta, images.shape[-1], FILL)
    return step


def _turned(images, degrees):
    angle = torch.deg2rad(degrees.flatten())
    theta = images.new_zeros(len(images), 2, 3, dtype=torch.float)
    theta[:, 0, 0] = theta[:, 1, 1] = angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin(), angle.sin()
    return warp(images, theta, images.shape[-1], FILL)


def _solarized(images, threshold):
    return torch.where(images < threshold, images, 255 - images)


def _lighter(images, add):
    return torch.where(images < 128, (images + add).clamp(max=255), images).to(torch.uint8)


def _coarser(images, step):
    return images & (256 - step).to(torch.uint8)


def _factor(level):
    return (1 + 0.9 * level).clamp(min=0.1)


# (what a level in [-1, 1] means, the step on images uint8 `[B, 3, S, S]` with that amount
# `[B, 1, 1, 1]`) by timm's names; steps that have no direction take the level's size
STEPS: dict[str, tuple[Callable, Callable]] = {
    "AutoContrast": (torch.abs, lambda images, _: vision.autocontrast(images)),
    "Equalize": (torch.abs, lambda images, _: vision.equalize(images)),
    "Invert": (torch.abs, lambda images, _: 255 - images),
    "Rotate": (lambda level: 30 * level, _turned),
    # a pixel is brought down to a multiple of 2 ** (8 - bits)
    "PosterizeIncreasing": (lambda level: 2 ** (4 + (4 * level.abs()).floor()), _coarser),
    "SolarizeIncreasing": (lambda level: 256 - (256 * level.abs()).floor(), _solarized),
    "SolarizeAdd": (lambda level: (110 * level.abs()).floor(), _lighter),
    "ColorIncreasing": (_factor, lambda images, amount: _blend(_grey(images), images, amount)),
    "ContrastIncreasing": (_factor, lambda images, amount: _blend(
        _grey(images).mean((2, 3), keepdim=True).round_(), images, amount)),
    "BrightnessIncreasing": (_factor, lambda images, amount: _blend(
        torch.zeros_like(amount), images, amount)),
    "SharpnessIncreasing": (_factor, lambda images, amount: _blend(
        _smooth(images), images, amount)),
    # from the corner, as timm shears
    "ShearX": (lambda level: 0.3 * level, _moved(0, 1, 1, corner=1)),
    "ShearY": (lambda level: 0.3 * level, _moved(1, 0, 1, corner=1)),
    "TranslateXRel": (lambda level: 0.45 * level, _moved(0, 2, 2)),
    "TranslateYRel": (lambda level: 0.45 * level, _moved(1, 2, 2)),
}


class Policy(NamedTuple):
    """Of RandAugment. m: magnitude of 10; n: steps an image; p: that a step is taken; mstd: the
    magnitude's deviation."""
    m: float = 10.0
    n: int = 2
    p: float = 0.5
    mstd: float = 0.0


def read_policy(text: str) -> Policy | None:
    """What timm's `rand-m9-mstd0.5-inc1` says, or None for '' and 'none'. Raises ValueError for
    anything else than `m`, `n`, `p`, `mstd` and `inc1`."""
    if text in ("", "none"):
        return None
    name, *parts = text.split("-")
    found = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
    given = {match[1]: match[2] for match in found if match}
    whole = given.get("n", "2").isdecimal()
    if name == "rand" and len(given) == len(parts) and given.pop("inc", "") == "1" and whole:
        read = Policy(**{key: (int if key == "n" else float)(value)
                         for key, value in given.items()})
        if read.m <= 10 and read.n >= 1 and read.p <= 1 and read.mstd <= 100:
            return read
    raise ValueError(f"unknown policy {text!r}: expected one like rand-m9-mstd0.5-inc1, with "
                     "m up to 10, inc1 and, if wanted, n (steps an image) and p (that each is "
                     "taken), or none")


def draw(n: int, rng: torch.Generator, policy: Policy) -> dict[str, Tensor]:
    """`steps`: int `[n, policy.n]` of STEPS, -1: none; `levels`: float64, in [-1, 1], of each."""
    shape = n, policy.n
    steps = torch.randint(len(STEPS), shape, generator=rng)
    taken = torch.rand(shape, generator=rng) < policy.p
    sign = 1 - 2 * torch.randint(2, shape, generator=rng)
    level = policy.m + policy.mstd * torch.randn(shape, generator=rng).double()
    return {"steps": torch.where(taken, steps, -1), "levels": sign * level.clamp(0, 10) / 10}


def apply(images: Tensor, steps: Tensor, levels: Tensor) -> Tensor:
    """Changes images uint8 `[B, 3, S, S]` in place, and returns them: `draw`'s `steps` one after
    another, with their `levels`, both on the CPU."""
    for layer, level in zip(steps.unbind(1), levels.unbind(1)):
        for k, (amount, step) in enumerate(STEPS.values()):
            rows = (layer == k).nonzero().flatten()
            if len(rows):
                # exactly, on the CPU, as some amounts are rounded down
                amounts = amount(level[rows]).float().view(-1, 1, 1, 1).to(images.device)
                rows = rows.to(images.device)
                images[rows] = step(images[rows], amounts)
    return images
