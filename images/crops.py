"""Crops, RandAugment and erasing of masked autoencoders, for batches on any device.

Everything random is drawn first, on the CPU, for a whole batch.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, table 9; Zhong et al.,
"Random Erasing Data Augmentation", AAAI 2020.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from images import rand_augment
from images.photos import MEAN, STD
from images.transforms import per_channel

TRIES = 10  # to place a crop or an erased box
RATIO = 4 / 3  # of a crop's sides, at most, and its inverse
AREAS, TRICK_AREAS = (0.02, 1 / 3), (0.02, 0.25)  # of erased boxes
ASPECT = 1 / 0.3  # of an erased box's sides, at most, and its inverse
JITTER, MOVED, LARGER = 0.25, 0.1, 0.25  # colours, shift and scale of the tricks
JITTERS = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation,
           vision.adjust_hue)


def _placed(shape, rng, areas, ratio, fits):
    """Boxes of which the first of TRIES is taken that `fits` (sides `[..., 2]`, in shares, width
    first, → bool): (sides, whether any did), by area and, log-uniform, ratio of the sides."""
    area = areas[0] + (areas[1] - areas[0]) * torch.rand(*shape, TRIES, generator=rng)
    log = math.log(ratio) * (2 * torch.rand(*shape, TRIES, generator=rng) - 1)
    sides = (area[..., None].log() + log[..., None] * torch.tensor([1.0, -1.0])).div(2).exp()
    good = fits(sides)  # [*shape, TRIES]
    first = good.int().argmax(-1)[..., None, None].expand(*shape, 1, 2)
    return sides.gather(-2, first).squeeze(-2), good.any(-1)


class Recipe(NamedTuple):
    """What training does to a batch. size: the network's side; low: least area of a random crop,
    in shares of the image; policy: as `rand_augment.read_policy` reads it; erase: (probability,
    'const' | 'rand' | 'pixel', most boxes an image); tricks: instead of crop and policy, the whole
    image, of half of the images with jittered colours, a shift and a scale."""
    size: int
    low: float
    flip: bool = True
    policy: str = ""
    erase: tuple = (0.0, "pixel", 1)
    tricks: bool = False

    def draw(self, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Everything random about `n` images: tensors `[n, ...]`, to be cut along the batch.

        `geometry` `[n, 2, 3]` (output → input, both in [-1, 1]) and, where the recipe has them,
        `steps` and `levels` (`rand_augment.draw`), `jitter` `[n, 4]` (amounts of JITTERS,
        NaN: none) and their `order` `[n, 4]`, `erase` `[n, count, 4]` (left, top, right, bottom in
        pixels) and `grain` `[n, count]` (seeds). Raises ValueError for a policy or a mode of
        erasing that is unknown.
        """
        policy = rand_augment.read_policy(self.policy)
        geometry = torch.zeros(n, 2, 3)
        if self.tricks:
            drawn = self._draw_tricks(n, rng, geometry)
        else:
            sides, placed = _placed((n,), rng, (self.low, 1), RATIO,
                                    lambda sides: (sides <= 1).all(-1))
            sides = torch.where(placed[:, None], sides, 1.0)
            geometry[:, 0, 0], geometry[:, 1, 1] = sides.unbind(1)
            geometry[:, :, 2] = (1 - sides) * (2 * torch.rand(n, 2, generator=rng) - 1)
            drawn = {"geometry": geometry}
        if self.flip:
            mirrored = torch.rand(n, generator=rng) < 0.5
            geometry[mirrored, 0, 0] *= -1
        if policy and not self.tricks:
            drawn |= rand_augment.draw(n, rng, policy)
        return drawn | self._draw_erased(n, rng)

    def _draw_tricks(self, n, rng, geometry):
        changed = torch.rand(n, generator=rng) < 0.5
        scale = 1 + LARGER * torch.rand(n, generator=rng) * changed
        shift = 2 * MOVED * (2 * torch.rand(n, 2, generator=rng) - 1) * changed[:, None]
        geometry[:, 0, 0] = geometry[:, 1, 1] = 1 / scale
        geometry[:, :, 2] = -shift / scale[:, None]
        jitter = JITTER * (2 * torch.rand(n, 4, generator=rng) - 1)
        jitter[:, :3] += 1  # hue alone is added
        jitter[~changed] = math.nan
        return {"geometry": geometry, "jitter": jitter,
                "order": torch.rand(n, 4, generator=rng).argsort(1)}

    def _draw_erased(self, n, rng):
        probability, mode, count = self.erase
        if mode not in ("const", "rand", "pixel") or count < 1:
            raise ValueError(f"unknown erasing {mode!r} of {count} boxes: expected const, rand or "
                             "pixel, and at least one")
        if not probability:
            return {}
        erased = torch.rand(n, generator=rng) < probability
        boxes = torch.randint(1, count + 1, (n,), generator=rng)  # of an image
        low, high = TRICK_AREAS if self.tricks else AREAS
        share = (1 / boxes).sqrt().view(n, 1, 1)  # all boxes of an image have one box's area
        sides, placed = _placed((n, count), rng, (low, high), ASPECT, lambda sides: (
            (sides * share[..., None] * self.size).round() < self.size).all(-1))
        sides = (sides * share * self.size).round()
        first = (torch.rand(n, count, 2, generator=rng) * (self.size - sides + 1)).floor()
        there = placed & erased[:, None] & (torch.arange(count) < boxes[:, None])
        return {"erase": torch.cat([first, first + sides], 2).long() * there[..., None],
                "grain": torch.randint(2 ** 31, (n, count), generator=rng)}

    # ------------------------------------------------------------ pixels

    def train(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Augments and normalises uint8 `[B, 3, S, S]` → float32 `[B, 3, size, size]`,
        channels-last; drawn: `draw`'s tensors for these images, on the CPU. What a crop makes
        smaller, by S / size at most, is not smoothed before."""
        if self.tricks:
            images = _jittered(self._whole(images), drawn)
        x = rand_augment.warp(images, drawn["geometry"].to(images.device), self.size,
                              (0, 0, 0) if self.tricks else None)
        if "steps" in drawn:
            x = rand_augment.apply(x, drawn["steps"], drawn["levels"])
        x = _normalised(x)
        if "erase" in drawn:
            self._erase(x, drawn)
        return x

    def eval(self, images: Tensor, mirror: bool = False) -> Tensor:
        """What is `seen` of uint8 `[B, 3, S, S]`, normalised, mirrored or not: float32
        `[B, 3, size, size]`, channels-last; nothing random."""
        images = self.seen(images)
        return _normalised(images.flip(-1) if mirror else images)

    def seen(self, images: Tensor) -> Tensor:
        """The middle of uint8 `[B, 3, S, S]`, with tricks the whole: uint8 `[B, 3, size, size]`."""
        if self.tricks:
            return self._whole(images)
        side = images.shape[-1]
        if side < self.size:
            raise ValueError(f"images of side {side} for a network that takes {self.size}")
        first = round((side - self.size) / 2)
        return images[..., first:first + self.size, first:first + self.size]

    def _whole(self, images):
        if images.shape[-1] == self.size:
            return images
        return F.interpolate(images.float(), (self.size, self.size), mode="bicubic",
                             antialias=True).round_().clamp_(0, 255).to(torch.uint8)

    def _erase(self, x, drawn):
        for i, k in drawn["erase"].any(-1).nonzero().tolist():
            left, top, right, bottom = drawn["erase"][i, k].tolist()
            rng = torch.Generator().manual_seed(int(drawn["grain"][i, k]))
            shape = (1, 1) if self.erase[1] == "rand" else (bottom - top, right - left)
            grain = torch.randn(3, *shape, generator=rng) * (self.erase[1] != "const")
            x[i, :, top:bottom, left:right] = grain.to(x.device)


def _jittered(images, drawn):
    """Colours of the images that are jittered, each in its own order."""
    images = images.clone()
    for i in drawn["jitter"].isfinite().all(1).nonzero().flatten().tolist():
        for k in drawn["order"][i].tolist():
            images[i] = JITTERS[k](images[i], float(drawn["jitter"][i, k]))
    return images


def _normalised(images):
    """uint8 `[B, 3, S, S]` → float32, channels-last."""
    x = images.to(torch.float, memory_format=torch.channels_last)
    mean, std = (per_channel(x.new_tensor(value) * 255, x) for value in (MEAN, STD))
    return x.sub_(mean).div_(std)
