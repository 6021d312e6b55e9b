"""Augmentation of all views of whole uint8 batches on any device: train and eval side by side.

Geometry is drawn once per clip, photometrics per view, and only those that the encoding of the
difference images allows: on a signed difference 128 means "no change", and a brightness jitter
would move it by far more than the signal.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from images.decoding import CROP, SIZE
from images.encoding import GREY


def draw(n: int, rng: torch.Generator, encoding: str, jitter: float = 0.4, crop_low: float = 1.0,
         flip: bool = True, views: int = 2) -> dict[str, Tensor]:
    """Everything random about a batch of `n` clips, drawn for the whole batch from `rng`.

    Returns a dict of tensors `[n, ...]`, to be cut along the batch: `flip` (bool), `gain` and
    `offset` per view `[n, views]` (offset in units of the image's own rms change), `grey` (bool),
    and below crop_low 1 `box` `[n, 4]`: centre x, y and half width, height in [-1, 1].
    """
    drawn = {"flip": (torch.rand(n, generator=rng) < 0.5) & flip}
    if crop_low < 1:
        drawn["box"] = _boxes(n, rng, crop_low)
    if encoding != "wrap":
        drawn["gain"] = 1 + jitter * (2 * torch.rand(n, views, generator=rng) - 1)
    if encoding == "signed":
        drawn["offset"] = jitter / 4 * (2 * torch.rand(n, views, generator=rng) - 1)
        drawn["grey"] = (torch.rand(n, generator=rng) < 0.2) & (jitter > 0)
    return drawn


def _boxes(n, rng, crop_low):
    """Random resized crop: area in [crop_low, 1], aspect ratio in [3/4, 4/3], log-uniform."""
    area = crop_low + (1 - crop_low) * torch.rand(n, generator=rng)
    ratio = torch.exp((2 * torch.rand(n, generator=rng) - 1) * torch.log(torch.tensor(4 / 3)))
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # [n, 2]
    centre = (2 * torch.rand(n, 2, generator=rng) - 1) * (1 - half)
    return torch.cat([centre, half], 1)  # [n, 4]


def train_transform(images: Tensor, drawn: dict[str, Tensor], normalization: dict,
                    channels: tuple) -> Tensor:
    """Augments and normalises uint8 `[B, C1+C2, 256, 256]` → float32 `[B, C1+C2, 224, 224]`, or
    images of another side to 7/8 of it.

    drawn: `draw`'s tensors for these B pairs. The result is channels-last. "No change" maps to
    exactly 0, and with a drawn offset to that share of the image's own change (but for wrap, whose
    constants are the published ones).
    """
    drawn = {name: value.to(images.device) for name, value in drawn.items()}
    mean, std = _constants(normalization, images)
    if "box" in drawn:
        # resampled about "no change": bilinear weights add up to 1 only to rounding
        images = _resized_crop(images.float() - mean.view(-1, 1, 1), drawn["box"])
    else:
        images = centre_crop(images)
    images = torch.where(drawn["flip"].view(-1, 1, 1, 1), images.flip(-1), images)
    # bytes are turned into the layout before they are widened: half the time
    change = images.contiguous(memory_format=torch.channels_last).float()
    if "box" not in drawn:
        change.sub_(per_channel(mean, change))
    if "grey" in drawn and drawn["grey"].any():
        weights = torch.tensor(GREY, device=images.device).view(3, 1, 1)
        chosen = change[drawn["grey"]]
        chosen[:, :3] = (chosen[:, :3] * weights).sum(1, keepdim=True)
        change[drawn["grey"]] = chosen
    repeat = torch.tensor(channels, device=images.device)
    scale = (drawn["gain"] if "gain" in drawn
             else torch.ones(len(images), len(channels), device=images.device))
    scale = per_channel(scale.repeat_interleave(repeat, 1) / std, change)
    if "offset" not in drawn:
        return change.mul_(scale)
    rms = torch.stack([view.square().mean((1, 2, 3))  # [B, V]
                       for view in change.split(channels, 1)], 1).sqrt()
    shift = (drawn["offset"] * rms).repeat_interleave(repeat, 1)
    return change.add_(per_channel(shift, change)).mul_(scale)


def eval_transform(images: Tensor, normalization: dict, mirror: bool = False,
                   shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Centre crop, or moved by `shift` pixels of 256 (down, right), mirrored or not, normalised.

    uint8 `[B, C, 256, 256]` → float32 `[B, C, 224, 224]`, channels-last; nothing random.
    """
    images = centre_crop(images, shift)
    images = images.flip(-1) if mirror else images
    mean, std = (per_channel(value, images) for value in _constants(normalization, images))
    return images.contiguous(memory_format=torch.channels_last).float().sub_(mean).div_(std)


def centre_crop(images: Tensor, shift: tuple[int, int] = (0, 0)) -> Tensor:
    """The central 224 of 256 pixels, or as large a share of others, moved by `shift` pixels of
    256 (down, right), in whole pixels."""
    side = images.shape[-1]
    crop = crop_side(side)
    top, left = ((side - crop) // 2 + int(s * side / SIZE) for s in shift)  # towards the middle
    return images[..., top:top + crop, left:left + crop]


def crop_side(side: int) -> int:
    """Side of the crop that is taken of images with this side, both in pixels."""
    return CROP * side // SIZE


def _resized_crop(images, box):
    """Bilinear resampling of each pair's own box to the crop's side, both views in one grid."""
    side = crop_side(images.shape[-1])
    centre, half = box[:, :2], box[:, 2:]
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = half[:, 0], half[:, 1]
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, (len(images), 1, side, side), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def per_channel(values: Tensor, images: Tensor) -> Tensor:
    """Values `[C]` of each channel, or `[B, C]`, for arithmetic with images `[B, C, H, W]`:
    `[1 or B, C, 1, W]`, channels-last. In that layout the channels are innermost, and a broadcast
    over so few numbers takes four times as long as one over whole rows."""
    values = values.view(-1, images.shape[1], 1, 1)
    return values.expand(-1, -1, 1, images.shape[-1]).contiguous(memory_format=torch.channels_last)


def _constants(normalization, images):
    """Mean and deviation in grey levels, float32 `[C]`; 128/255 comes back as exactly 128."""
    return (torch.tensor([255 * v for v in normalization[name]], dtype=torch.float64)
            .to(images.device, torch.float32) for name in ("mean", "std"))
