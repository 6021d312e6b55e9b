"""Crops of masked autoencoders: distribution, pixels, tricks, erasing, parts of a batch."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as vision

from images import crops, photos
from training import epochs

EVERYTHING = crops.Recipe(48, 0.2, policy="rand-m9-mstd0.5-inc1", erase=(0.5, "pixel", 2))
TRICKS = crops.Recipe(48, 0.2, erase=(0.5, "rand", 1), tricks=True)


@pytest.fixture
def batch():
    """uint8 `[12, 3, 64, 64]`, smooth."""
    rng = np.random.default_rng(0)
    return torch.stack([torch.from_numpy(np.array(Image.fromarray(
        rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)))
        for _ in range(12)]).permute(0, 3, 1, 2)


def levels(out):
    """Grey levels of what is normalised."""
    std, mean = (torch.tensor(value).view(3, 1, 1) for value in (photos.STD, photos.MEAN))
    return 255 * (out * std + mean)


def boxes_of(geometry):
    """(left, top, right, bottom) in shares of the side."""
    size, middle = geometry[:, [0, 1], [0, 1]].abs(), (geometry[:, :, 2] + 1) / 2
    return torch.cat([middle - size / 2, middle + size / 2], 1)


@pytest.mark.parametrize("low", [0.08, 0.2, 0.8])
def test_crops_are_distributed_as_torchvisions(low):
    geometry = crops.Recipe(48, low).draw(4000, epochs.generator(1))["geometry"]
    boxes = boxes_of(geometry)
    sides = boxes[:, 2:] - boxes[:, :2]
    area, ratio = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert boxes.min() > -1e-5 and boxes.max() < 1 + 1e-5
    assert area.min() > low - 1e-4 and area.max() <= 1 + 1e-5
    assert ratio.min() > .7499 and ratio.max() < 1.3334
    torch.manual_seed(0)
    image = torch.zeros(3, 1000, 1000)
    top, left, height, width = torch.tensor([RandomResizedCrop.get_params(
        image, (low, 1), (3 / 4, 4 / 3)) for _ in range(4000)]).div(1000).unbind(1)
    for mine, others in ((area, height * width), (ratio.log(), (width / height).log()),
                         (boxes[:, 0], left), (boxes[:, 1], top)):
        spread = math.sqrt((mine.var() + others.var()) / 4000)
        assert abs(mine.mean() - others.mean()) < 4 * spread
        assert float(mine.std()) == pytest.approx(float(others.std()), rel=.08)


def test_what_fits_nowhere_is_the_whole(batch):
    recipe = crops.Recipe(64, 1.0, flip=False)  # a square alone has all of the area
    out = recipe.train(batch, recipe.draw(12, epochs.generator(0)))
    assert torch.equal(out, recipe.eval(batch))


def test_half_is_mirrored(batch):
    recipe = crops.Recipe(64, 1.0)
    mirrored = recipe.draw(2000, epochs.generator(0))["geometry"][:, 0, 0] < 0
    assert float(mirrored.float().mean()) == pytest.approx(.5, abs=.04)
    drawn = recipe.draw(12, epochs.generator(0))
    mirrored = drawn["geometry"][:, 0, 0] < 0
    assert 0 < mirrored.sum() < 12
    assert torch.equal(recipe.train(batch, drawn), torch.where(
        mirrored.view(-1, 1, 1, 1), recipe.eval(batch, mirror=True), recipe.eval(batch)))


def test_crops_are_pils(batch):
    recipe = crops.Recipe(80, 0.2, flip=False)
    drawn = recipe.draw(12, epochs.generator(0))
    out = levels(recipe.train(batch, drawn))
    for i, box in enumerate((64 * boxes_of(drawn["geometry"])).tolist()):
        image = Image.fromarray(batch[i].permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(image.resize(
            (80, 80), Image.Resampling.BICUBIC, box=[min(max(0, x), 64) for x in box])))
        error = (out[i].permute(1, 2, 0) - expected.float()).abs()
        assert error.mean() < .7 and error.max() < 12  # at the edges ours sees what is beside it
        assert (out[i].permute(1, 2, 0) - expected.float()).mean().abs() < .05


def test_evaluation_takes_the_middle(batch):
    out = crops.Recipe(48, 0.2).eval(batch)
    torch.testing.assert_close(levels(out), batch[..., 8:56, 8:56].float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(crops.Recipe(48, 0.2).eval(batch, mirror=True), out.flip(-1))
    # pictures show what the network is shown
    assert torch.equal(levels(out).round().to(torch.uint8), crops.Recipe(48, 0.2).seen(batch))
    assert torch.equal(levels(crops.Recipe(48, 0.2, tricks=True).eval(batch)).round().to(
        torch.uint8), crops.Recipe(48, 0.2, tricks=True).seen(batch))
    torch.testing.assert_close(levels(crops.Recipe(64, 0.2).eval(batch)), batch.float(),
                               atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="side 64"):
        crops.Recipe(65, 0.2).eval(batch)


@pytest.mark.parametrize("recipe", [EVERYTHING, TRICKS])
def test_a_part_of_a_batch_is_as_the_whole_and_follows_from_its_seed(batch, recipe):
    drawn = recipe.draw(12, epochs.generator(5))
    whole = recipe.train(batch, drawn)
    assert whole.shape == (12, 3, 48, 48) and whole.dtype == torch.float32
    assert whole.is_contiguous(memory_format=torch.channels_last) and whole.isfinite().all()
    for rows in (slice(0, 5), slice(5, 12, 2), torch.tensor([11, 0])):
        part = recipe.train(batch[rows], {name: value[rows] for name, value in drawn.items()})
        assert torch.equal(part, whole[rows])
    assert torch.equal(whole, recipe.train(batch, recipe.draw(12, epochs.generator(5))))
    assert not torch.equal(whole, recipe.train(batch, recipe.draw(12, epochs.generator(6))))


@pytest.mark.parametrize("recipe", [EVERYTHING, TRICKS])
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_stay_in_range(recipe, value):
    images = torch.full((40, 3, 64, 64), value, dtype=torch.uint8)
    plain = recipe._replace(erase=(0.0, "pixel", 1))
    out = levels(plain.train(images, plain.draw(40, epochs.generator(0))))
    assert out.min() > -1e-3 and out.max() < 255 + 1e-3
    assert torch.equal(images, torch.full_like(images, value))  # not in place


def test_erasing_is_of_the_area_and_probability_asked_for():
    recipe = crops.Recipe(224, 0.2, erase=(0.25, "pixel", 1))
    boxes = recipe.draw(4000, epochs.generator(0))["erase"][:, 0]
    there = boxes.any(1)
    assert float(there.float().mean()) == pytest.approx(.25, abs=.025)
    boxes = boxes[there]
    sides = boxes[:, 2:] - boxes[:, :2]
    area, ratio = sides.prod(1) / 224 ** 2, sides[:, 0] / sides[:, 1]
    assert area.min() > .018 and area.max() < .335
    assert ratio.min() > .27 and ratio.max() < 1 / .27 and (ratio.log().mean().abs() < .1)
    assert boxes.min() == 0 and boxes.max() == 224 and (sides > 0).all() and (sides < 224).all()
    torch.manual_seed(0)
    others = torch.tensor([RandomErasing.get_params(
        torch.zeros(3, 224, 224), (.02, 1 / 3), (.3, 1 / .3), [0])[2:4] for _ in range(1000)])
    assert float(area.mean()) == pytest.approx(float(others.prod(1).float().mean()) / 224 ** 2,
                                               abs=.012)
    several = recipe._replace(erase=(1.0, "pixel", 3)).draw(3000, epochs.generator(0))["erase"]
    count = several.any(-1).sum(1)
    assert (torch.bincount(count) / 3000 - torch.tensor([0, 1 / 3, 1 / 3, 1 / 3])).abs().max() < .04
    area = (several[..., 2:] - several[..., :2]).prod(-1).sum(1) / 224 ** 2
    assert area.max() < .34  # of all boxes of an image


def test_what_is_erased_is_constant_one_colour_or_noise(batch):
    plain = crops.Recipe(64, 1.0, flip=False)
    for mode in ("const", "rand", "pixel"):
        recipe = plain._replace(erase=(1.0, mode, 1))
        drawn = recipe.draw(12, epochs.generator(0))
        out, whole = recipe.train(batch, drawn), plain.eval(batch)
        pixels = []
        for i, (left, top, right, bottom) in enumerate(drawn["erase"][:, 0].tolist()):
            inside = out[i, :, top:bottom, left:right].flatten(1).clone()
            pixels.append(inside)
            assert mode == "pixel" or (inside == inside[:, :1]).all()
            out[i, :, top:bottom, left:right] = whole[i, :, top:bottom, left:right]
        assert torch.equal(out, whole)
        pixels = torch.cat(pixels, 1)
        if mode == "const":
            assert not pixels.any()
        else:
            assert pixels.unique(dim=1).shape[1] >= 12
        if mode == "pixel":
            assert abs(pixels.mean()) < .05 and abs(pixels.std() - 1) < .05


def test_unknown_recipes_are_refused():
    for recipe in (EVERYTHING._replace(policy="rand-x"), TRICKS._replace(policy="v0"),
                   EVERYTHING._replace(erase=(0.0, "grey", 1)),
                   EVERYTHING._replace(erase=(0.5, "const", 0))):
        with pytest.raises(ValueError, match="unknown"):
            recipe.draw(2, epochs.generator(0))


def test_tricks_change_half_of_the_images_within_their_ranges():
    drawn = TRICKS._replace(size=224).draw(4000, epochs.generator(0))
    changed = drawn["jitter"].isfinite().all(1)
    assert float(changed.float().mean()) == pytest.approx(.5, abs=.03)
    scale = 1 / drawn["geometry"][:, [0, 1], [0, 1]].abs()
    shift = (drawn["geometry"][:, :, 2] * scale / 2)[changed]  # in shares of the side
    assert torch.equal(scale[:, 0], scale[:, 1]) and (scale[~changed] == 1).all()
    assert scale.min() >= 1 and 1.24 < scale.max() < 1.2501
    assert shift.abs().max() > .098 and shift.abs().max() < .1001
    assert not drawn["geometry"][~changed][:, :, 2].any()
    jitter = drawn["jitter"][changed] - torch.tensor([1., 1, 1, 0])
    assert jitter.abs().amax(0).min() > .24 and jitter.abs().max() < .2501
    boxes = drawn["erase"][:, 0]
    assert float(boxes.any(1).float().mean()) == pytest.approx(.5, abs=.03)
    assert (boxes[:, 2:] - boxes[:, :2]).prod(1).max() < .255 * 224 ** 2


def test_tricks_are_torchvisions(batch):
    recipe = TRICKS._replace(size=64, erase=(0.0, "pixel", 1), flip=False)
    drawn = recipe.draw(12, epochs.generator(0))
    out, whole = levels(recipe.train(batch, drawn)), batch.clone()
    for i in range(12):
        if drawn["jitter"][i].isfinite().all():
            for k in drawn["order"][i].tolist():
                whole[i] = (vision.adjust_brightness, vision.adjust_contrast,
                            vision.adjust_saturation, vision.adjust_hue)[k](
                                whole[i], float(drawn["jitter"][i, k]))
            theta = drawn["geometry"][i]
            scale = float(1 / theta[0, 0])
            # whole pixels of shift, as torchvision moves
            moved = (-theta[:, 2] * scale * 32).round()
            drawn["geometry"][i, :, 2] = -moved / 32 / scale
            out[i] = levels(recipe.train(batch, drawn))[i]
            whole[i] = vision.affine(whole[i], 0, moved.tolist(), scale, [0, 0],
                                     interpolation=vision.InterpolationMode.BILINEAR, fill=0)
            error = (out[i] - whole[i].float()).abs()
            assert error.median() < 1.5 and error.quantile(.9) < 4  # bicubic; and its edges
        else:
            torch.testing.assert_close(out[i], whole[i].float(), atol=1e-3, rtol=0)
    small = recipe._replace(size=32)
    error = levels(small.eval(batch)) - vision.resize(batch, [32, 32], antialias=True).float()
    assert error.abs().mean() < 2
    assert small.train(batch, small.draw(12, epochs.generator(0))).shape == (12, 3, 32, 32)
