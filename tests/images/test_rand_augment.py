"""RandAugment: every step against timm's, policies, what is drawn."""
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from images import rand_augment
from training import epochs

TIMM = "rand-m9-mstd0.5-inc1"
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


@pytest.fixture(scope="module")
def photo():
    """uint8 `[64, 64, 3]`, smooth, and neither black nor white."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    return (np.asarray(smooth) * 0.7 + 20).astype(np.uint8)


def ours(photo, name, level):
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None]
    step = list(rand_augment.STEPS).index(name)
    return rand_augment.apply(image, torch.tensor([[step]]),
                              torch.tensor([[level]], dtype=torch.float64))[0].permute(1, 2, 0)


def timms(photo, name, level, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate",
                        lambda value: value if level >= 0 else -value)
    amount = auto_augment.LEVEL_TO_ARG[name]
    image = auto_augment.NAME_TO_OP[name](
        Image.fromarray(photo), *(amount(10 * abs(level), {}) if amount else ()),
        fillcolor=rand_augment.FILL, resample=Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def apart(first, second):
    return float((first.float() - second.float()).abs().mean())


def test_the_steps_are_timms():
    assert list(rand_augment.STEPS) == auto_augment._RAND_INCREASING_TRANSFORMS
    assert rand_augment.FILL == (124, 116, 104)


@pytest.mark.parametrize("name", rand_augment.STEPS)
def test_a_step_is_timms(photo, name, monkeypatch):
    for level in (0.0, 0.33, -0.33, 0.5, 0.9, -0.9, 0.99):
        expected = timms(photo, name, level, monkeypatch)
        # another bicubic kernel, and timm's is cut off, not rounded
        assert apart(ours(photo, name, level), expected) < (0.7 if name in MOVING else 0.01), level
    # what is compared is changed, and the other way by the other sign
    expected = timms(photo, name, 0.9, monkeypatch)
    assert apart(torch.from_numpy(photo), expected) > 1
    signed = apart(timms(photo, name, -0.9, monkeypatch), expected) > 0
    assert signed == (name in MOVING or name[:5] in ("Color", "Contr", "Brigh", "Sharp"))
    if signed:
        assert apart(ours(photo, name, -0.9), expected) > 2


def test_nothing_is_left_of_no_bits(photo):
    assert not ours(photo, "PosterizeIncreasing", 1.0).any()


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white(value):
    images = torch.full((15, 3, 8, 8), value, dtype=torch.uint8)
    out = rand_augment.apply(images.clone(), torch.arange(15)[:, None],
                             torch.full((15, 1), 0.9).double())
    names = list(rand_augment.STEPS)
    for name in ("AutoContrast", "Equalize", "ColorIncreasing", "SharpnessIncreasing"):
        assert (out[names.index(name)] == value).all()
    assert (out[names.index("Invert")] == 255 - value).all()
    assert (out[names.index("BrightnessIncreasing")] == value).all()


def test_policies_are_read():
    assert rand_augment.read_policy("") is None and rand_augment.read_policy("none") is None
    assert rand_augment.read_policy(TIMM) == (9, 2, 0.5, 0.5)
    assert rand_augment.read_policy("rand-inc1-n3-m5-p0.7") == (5, 3, 0.7, 0)


@pytest.mark.parametrize("text", ["rand", "rand-m9", "rand-m9-inc0", "original", "augmix-m3",
                                  "rand-m11-inc1", "rand-m9-inc1-n0", "rand-m9-inc1-n1.5",
                                  "rand-m9-inc1-t3a", "rand-m9-inc1-", "rand-m-9-inc1",
                                  "rand-m9-inc1-p2", "rand-m9-inc1-mmax10", "rand-m9-m3-inc1"])
def test_unknown_policies_are_refused(text):
    with pytest.raises(ValueError, match=r"rand-m9-mstd0\.5-inc1"):
        rand_augment.read_policy(text)


def test_what_is_drawn_is_as_the_policy_says():
    drawn = rand_augment.draw(6000, epochs.generator(0), rand_augment.read_policy(TIMM))
    steps, levels = drawn["steps"], drawn["levels"]
    assert steps.shape == levels.shape == (6000, 2)
    assert float((steps >= 0).sum(1).float().mean()) == pytest.approx(1, abs=.04)
    counts = torch.bincount(steps[steps >= 0], minlength=15) / (steps >= 0).sum()
    assert len(counts) == 15 and (counts - 1 / 15).abs().max() < .015
    assert float((levels > 0).float().mean()) == pytest.approx(.5, abs=.02)
    size = 10 * levels.abs()
    assert size.max() == 10 and size.min() > 6
    # a normal distribution's, cut off two deviations above its mean
    assert float(size.median()) == pytest.approx(9, abs=.03)
    assert float((size < 8.5).float().mean()) == pytest.approx(.159, abs=.015)
    assert float((size == 10).float().mean()) == pytest.approx(.0228, abs=.006)
    whole = rand_augment.draw(50, epochs.generator(0), rand_augment.read_policy("rand-m9-inc1-p1"))
    assert (whole["steps"] >= 0).all() and (whole["levels"].abs() == 0.9).all()


def test_steps_follow_one_another(photo):
    image = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].repeat(3, 1, 1, 1)
    names = list(rand_augment.STEPS)
    first, second = names.index("TranslateXRel"), names.index("Invert")
    out = rand_augment.apply(image.clone(), torch.tensor([[first, second], [second, first],
                                                          [-1, -1]]),
                             torch.full((3, 2), 0.5).double())
    once = ours(photo, "TranslateXRel", 0.5)
    assert torch.equal(out[0].permute(1, 2, 0), 255 - once)  # the fill is inverted as well
    assert torch.equal(out[1].permute(1, 2, 0), ours(255 - photo, "TranslateXRel", 0.5))
    assert torch.equal(out[2], image[2]) and not torch.equal(out[0], out[1])
