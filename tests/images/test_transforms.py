"""Two-view augmentation: geometry shared by the views, photometrics that respect the encoding."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evaluation import probing
from images.decoding import stored_side
from images.encoding import estimate_normalization, fixed_normalization
from images.transforms import centre_crop, draw, eval_transform, train_transform
from training.epochs import generator

CHANNELS = (3, 1)
VIEWS = "rgb", "depth"
PLAIN = {"mean": [0.0] * 4, "std": [1 / 255] * 4}  # leaves grey levels as they are
ENCODINGS = ("signed", "absolute", "wrap")


def noise(n=6, seed=0, channels=4):
    return torch.from_numpy(np.random.default_rng(seed).integers(
        0, 256, (n, channels, 256, 256), dtype=np.uint8))


def both_views(n=6):
    """Random images whose four channels are one and the same."""
    return noise(n, 1, 1).repeat(1, 4, 1, 1)


def augmented(images, encoding, n=None, seed=0, normalization=None, **options):
    drawn = draw(n or len(images), generator(seed), encoding, **options)
    normalization = normalization or fixed_normalization(encoding, VIEWS, CHANNELS)
    return train_transform(images, drawn, normalization, CHANNELS), drawn


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_flipped_pair_is_flipped_in_both_views(encoding):
    images = both_views(16)
    out, drawn = augmented(images, encoding, normalization=PLAIN, jitter=0)
    assert 0 < drawn["flip"].sum() < 16
    for image, flip, result in zip(images, drawn["flip"], out):
        expected = centre_crop(image).float()
        assert (result == (expected.flip(-1) if flip else expected)).all()


def test_no_flip_flips_nothing():
    _, drawn = augmented(noise(32), "signed", flip=False)
    assert not drawn["flip"].any()


def test_crop_boxes_are_the_same_in_both_views_and_those_that_were_drawn():
    ramp = torch.arange(256, dtype=torch.uint8)
    images = torch.stack([ramp.expand(256, 256), ramp.expand(256, 256).t()] * 2)[None]
    images = images.repeat(24, 1, 1, 1)  # channels x, y | x, y: one view of two channels each
    drawn = draw(24, generator(3), "absolute", jitter=0, crop_low=0.2)
    out = train_transform(images, drawn, PLAIN, (2, 2))
    assert (out[:, :2] == out[:, 2:]).all()
    box = drawn["box"]
    for axis in (0, 1):
        got = out[:, axis, 112, :] if axis == 0 else out[:, axis, :, 112]
        got = torch.where(drawn["flip"][:, None], got.flip(-1), got) if axis == 0 else got
        middle = 127.5 + 128 * box[:, axis]
        assert torch.allclose(got.mean(1), middle, atol=0.6)
        width = 2 * 128 * box[:, 2 + axis] * 223 / 224
        assert torch.allclose(got[:, -1] - got[:, 0], width, atol=1.1)


def test_crop_boxes_lie_inside_and_have_the_areas_and_ratios_asked_for():
    box = draw(2000, generator(0), "signed", crop_low=0.2)["box"]
    assert (box[:, :2].abs() + box[:, 2:] <= 1 + 1e-6).all()
    area, ratio = box[:, 2:].prod(1), box[:, 2] / box[:, 3]
    assert 0.19 < area.min() < 0.22 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.34


@pytest.mark.parametrize("crop_low", [1.0, 0.2])
def test_a_signed_image_without_change_stays_exactly_zero(crop_low):
    images = torch.full((32, 4, 256, 256), 128, dtype=torch.uint8)
    out, drawn = augmented(images, "signed", crop_low=crop_low, jitter=0.9)
    assert drawn["grey"].any() and drawn["flip"].any()
    assert (out == 0).all()
    assert (eval_transform(images, fixed_normalization("signed", VIEWS, CHANNELS)) == 0).all()


def test_a_signed_view_without_change_stays_zero_beside_one_that_changes():
    images = noise(16)
    images[:, 3] = 128
    out, _ = augmented(images, "signed")
    assert (out[:, 3] == 0).all() and (out[:, :3] != 0).any()


def test_signed_images_get_a_gain_about_no_change_and_a_small_offset_per_view():
    images = both_views(16)
    out, drawn = augmented(images, "signed", normalization={"mean": [128 / 255] * 4,
                                                            "std": [1 / 255] * 4})
    assert (drawn["gain"][:, 0] != drawn["gain"][:, 1]).all()
    assert drawn["gain"].min() >= 0.6 and drawn["gain"].max() <= 1.4
    for i in range(len(images)):
        change = centre_crop(images[i]).float() - 128
        change = change.flip(-1) if drawn["flip"][i] else change
        for view, part in enumerate((slice(0, 3), slice(3, 4))):
            rms = change[part].square().mean().sqrt()
            shift = drawn["offset"][i, view] * rms
            assert abs(shift) <= 0.1 * rms
            expected = drawn["gain"][i, view] * (change[part] + shift)
            assert torch.allclose(out[i, part], expected, atol=1e-3)


def test_grey_turns_rgb_to_luminance_and_leaves_the_second_view():
    images = noise(40)
    drawn = draw(40, generator(0), "signed", jitter=1e-9)
    assert 2 <= drawn["grey"].sum() <= 16
    out = train_transform(images, drawn, {"mean": [128 / 255] * 4, "std": [1 / 255] * 4},
                          CHANNELS)
    for i, grey in enumerate(drawn["grey"]):
        change = centre_crop(images[i]).float() - 128
        change = change.flip(-1) if drawn["flip"][i] else change
        if grey:
            weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
            change[:3] = (change[:3] * weights).sum(0)
        assert torch.allclose(out[i], change, atol=1e-3)


def test_absolute_images_get_a_gain_alone():
    images = both_views(16)
    out, drawn = augmented(images, "absolute", normalization=PLAIN)
    assert set(drawn) == {"flip", "gain"}
    for i in range(len(images)):
        change = centre_crop(images[i]).float()
        change = change.flip(-1) if drawn["flip"][i] else change
        assert torch.allclose(out[i, :3], drawn["gain"][i, 0] * change[:3])
        assert torch.allclose(out[i, 3:], drawn["gain"][i, 1] * change[3:])


def test_wrap_pixels_are_only_moved_never_changed():
    images = noise(16)
    out, drawn = augmented(images, "wrap", normalization=PLAIN, jitter=0.9)
    assert set(drawn) == {"flip"}
    for image, flip, result in zip(images, drawn["flip"], out):
        expected = centre_crop(image).float()
        assert (result == (expected.flip(-1) if flip else expected)).all()


def test_eval_draws_nothing_and_takes_the_plain_centre():
    images = noise(3)
    before = torch.get_rng_state()
    out = eval_transform(images, PLAIN)
    assert (torch.get_rng_state() == before).all()
    assert (out == images[:, :, 16:240, 16:240].float()).all()
    assert (eval_transform(images, PLAIN, mirror=True) == out.flip(-1)).all()
    assert (eval_transform(images, PLAIN, shift=(-16, 16))
            == images[:, :, 0:224, 32:256].float()).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_draws_follow_from_the_generator_alone(encoding):
    options = {"crop_low": 0.3} if encoding != "wrap" else {}
    first = draw(8, generator(1, 2), encoding, **options)
    torch.rand(7)
    again = draw(8, generator(1, 2), encoding, **options)
    other = draw(8, generator(1, 3), encoding, **options)
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("crop_low", [1.0, 0.3])
def test_half_a_batch_with_half_of_the_draws_gives_half_of_the_result(encoding, crop_low):
    if encoding == "wrap" and crop_low < 1:
        pytest.skip("wrap is never resized")
    images = noise(8)
    whole, drawn = augmented(images, encoding, crop_low=crop_low)
    half = train_transform(images[4:], {name: value[4:] for name, value in drawn.items()},
                           fixed_normalization(encoding, VIEWS, CHANNELS), CHANNELS)
    assert torch.allclose(half, whole[4:], atol=1e-4)


def test_wrap_takes_the_published_constants():
    actual = estimate_normalization(noise(2).numpy(), [0, 1], "wrap", VIEWS, CHANNELS)
    assert actual == {"mean": [.4454, .4474, .4504, .0423], "std": [.4474, .4505, .4502, .1761]}


def test_signed_deviation_is_estimated_about_128_from_the_members_alone():
    images = np.full((4, 4, 256, 256), 128, np.uint8)
    images[0, :3] += 10  # a constant change has no variance, but a deviation from "no change"
    images[1, 3, :128] -= 6
    images[3] = 255
    actual = estimate_normalization(images, [0, 1], "signed", VIEWS, CHANNELS)
    assert [255 * m for m in actual["mean"]] == [128] * 4
    assert actual["std"] == pytest.approx([np.sqrt(50) / 255] * 3 + [np.sqrt(9) / 255])


def test_signed_128_maps_to_exactly_zero_and_its_neighbours_do_not():
    images = torch.full((1, 4, 256, 256), 128, dtype=torch.uint8)
    images[..., 128:] = 129
    normalization = {"mean": [128 / 255] * 4, "std": [7.3 / 255] * 4}
    out = eval_transform(images, normalization)
    assert (out[..., :112] == 0).all()
    assert torch.allclose(out[..., 112:], torch.tensor(1 / 7.3))


def test_a_channel_without_any_change_keeps_the_fixed_deviation():
    images = np.full((2, 4, 256, 256), 128, np.uint8)
    actual = estimate_normalization(images, [0, 1], "signed", VIEWS, CHANNELS)
    assert actual["std"] == [8 / 255] * 3 + [4 / 255]


def test_resized_crop_agrees_with_interpolation_of_the_same_box():
    images = F.avg_pool2d(noise(4).float(), 9, 1, 4).byte()
    box = torch.tensor([[0.0, 0.0, 0.875, 0.875]]).repeat(4, 1)  # 224 pixels about the centre
    drawn = {"flip": torch.zeros(4, dtype=bool), "box": box, "gain": torch.ones(4, 2)}
    out = train_transform(images, drawn, PLAIN, CHANNELS)
    assert torch.allclose(out, centre_crop(images).float(), atol=1e-2)


def test_crops_have_the_size_that_was_asked_for_wherever_they_lie():
    for size in range(32, 1025):
        images = torch.zeros(1, 1, *[stored_side(size)] * 2)
        for _, shift in probing.VIEWS:
            assert centre_crop(images, shift).shape[2:] == (size, size), (size, shift)
    assert [stored_side(size) for size in (56, 112, 224)] == [64, 128, 256]
