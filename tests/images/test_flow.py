"""Optical flow: the numbers of OpenCV's, its channels, mirrors and crops, jitter rows."""
import json

import numpy as np
import pytest
import torch
from conftest import PARITY

from images import flow, videos

y, x = np.mgrid[0:224, 0:224].astype(float)


def bump(cx, cy, s):
    return np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * s ** 2))


def pair(size, seed):
    """The two frames of the formula in parity/flow.json, and their true displacement."""
    rng = np.random.RandomState(seed)
    cycles, angle, phase = rng.uniform(2, 14, 40), *(rng.uniform(0, 2 * np.pi, 40)
                                                     for _ in range(2))
    def levels(x, y):
        waves = sum(np.cos(2 * np.pi * c / 224 * (x * np.cos(a) + y * np.sin(a)) + p) / c
                    for c, a, p in zip(cycles, angle, phase))
        return 127.5 + 60 * waves / np.sqrt((1 / cycles ** 2).sum() / 2)
    u = size * 0.8 * (bump(70, 150, 22) - bump(154, 150, 22))
    v = size * (-0.6 * (bump(70, 150, 22) + bump(154, 150, 22)) + bump(112, 70, 28))
    frames = [np.clip(np.rint(image), 0, 255).astype(np.uint8)
              for image in (levels(x, y), levels(x - u, y - v))]
    return np.stack(frames), np.stack([u, v])


@pytest.mark.skipif(not (PARITY / "flow.json").exists(), reason="no parity fixtures here")
@pytest.mark.parametrize("name", ["small", "medium"])
def test_farneback_and_its_channels_are_the_published_ones(name):
    case = json.loads((PARITY / "flow.json").read_text())["pairs"][name]
    places = [(10, 10), (70, 112), (75, 100), (112, 112), (150, 70), (150, 154), (160, 60),
              (213, 213)]
    frames, _ = pair(case["size"], case["seed"])
    assert [int(frame.sum()) for frame in frames] == [case[n]["sum"] for n in ("first", "second")]
    field = flow.flow_steps(frames, "farneback")[0]
    for part, key in zip(field, "uv"):
        assert abs(np.array([part[p] for p in places]) - case[key]["values"]).max() < 1e-5
    channels = flow.channels(torch.from_numpy(field), "nrs", "column")
    for part, key in zip(channels, ("u", "u_n", "u_s", "v_s", "v_n", "v")):
        assert abs(np.array([part[p].item() for p in places]) - case[key]["values"]).max() < 1e-4
        assert abs(part.mean().item() - case[key]["mean"]) < 1e-4
    colours = 255 * flow.channels(torch.from_numpy(field), "hsv")
    for part, expected in zip(colours, case["rgb"]):
        assert abs(np.array([part[p].item() for p in places]) - expected["values"]).max() <= 2
        assert abs(part.mean().item() - expected["mean"]) < 0.1
        assert abs(part.std(correction=0).item() - expected["std"]) < 0.1


@pytest.mark.parametrize("method, limit", [("dis", 0.05), ("farneback", 0.06)])
def test_flow_goes_to_the_right_and_down_where_the_picture_does(method, limit):
    frames, truth = pair(1.0, 3)
    field = flow.flow_steps(frames, method)[0]
    assert np.hypot(*(field - truth)).mean() < limit < 0.2 * np.hypot(*truth).max()


def test_steps_start_at_the_frame_before_or_at_the_onset():
    frames = np.stack([pair(size, 0)[0][1] for size in (0, 0.5, 1.0)])
    previous, onset = (flow.flow_steps(frames, reference=name) for name in ("previous", "onset"))
    assert np.array_equal(previous[0], onset[0])
    assert abs(onset[1] - previous.sum(0)).mean() < 0.02 < abs(onset[1] - previous[1]).mean()


def test_sets_of_channels_by_hand():
    field = torch.tensor([[[0.0, 1], [2, 4]], [[-1.0, 0], [0, 1]]])
    u, v = field
    u_n, v_n = u / 2 - 1, v
    deviation = torch.tensor([35 / 16, 0.5]).sqrt()
    u_s, v_s = (u - 1.75) / deviation[0], v / deviation[1]
    expected = {"r": [u, v], "n": [u_n, v_n], "s": [u_s, v_s], "nr": [u_n, u, v, v_n],
                "rs": [u, u_s, v_s, v], "ns": [u_n, u_s, v_s, v_n],
                "nrs": [u, u_n, u_s, v_s, v_n, v]}
    for name, maps in expected.items():
        assert torch.allclose(flow.channels(field, name), torch.stack(maps), atol=1e-6), name
    assert torch.allclose(flow.channels(field, "n", 2.0), field / 2)


@pytest.mark.parametrize("name", ["n", "s", "nrs", "hsv"])
def test_no_motion_gives_zeros(name):
    field = torch.zeros(3, 2, 8, 8)
    assert (flow.channels(field, name) == 0).all()


def test_a_mirrored_clips_flow_is_the_mirrored_field_with_u_negated():
    frames, _ = pair(1.0, 1)
    field, mirrored = (torch.from_numpy(flow.flow_steps(images))
                       for images in (frames, frames[..., ::-1].copy()))
    boxes, _ = videos.whole(1, 224)
    turned = flow.crop_flow(field[None], boxes, torch.tensor([True]), 224)[0]
    assert (turned - mirrored).abs().mean() < 5e-3
    again = flow.crop_flow(turned[None], boxes, torch.tensor([True]), 224)[0]
    assert (again - field).abs().max() < 1e-4


def test_a_crop_scales_the_field_as_frames_that_are_cropped():
    """Enlarged twice, what moves goes twice as far."""
    frames, _ = pair(2.0, 2)
    boxes, mirror = torch.tensor([[56.0, 70, 112, 112]]), torch.tensor([False])
    cut = flow.crop(torch.from_numpy(frames)[None].float(), boxes, mirror, 224)[0]
    field = torch.from_numpy(flow.flow_steps(cut.round().clamp(0, 255).byte().numpy()))
    ours = flow.crop_flow(torch.from_numpy(flow.flow_steps(frames))[None], boxes, mirror, 224)[0]
    inside = (..., slice(16, -16), slice(16, -16))
    right, plain = ((field - of)[inside].abs().mean() / field[inside].abs().mean()
                    for of in (ours, ours / 2))
    assert right < 0.12 and plain > 0.4


def test_a_turn_turns_the_field_as_frames_that_are_turned():
    frames, _ = pair(0.7, 3)
    boxes, mirror = torch.tensor([[4.0, -3, 224, 224, 3]]), torch.tensor([True])
    turned = flow.crop(torch.from_numpy(frames)[None].float(), boxes, mirror, 224)[0]
    theirs = flow.flow_steps(turned.round().byte().numpy())
    field = torch.from_numpy(flow.flow_steps(frames))[None]
    ours = flow.crop_flow(field, boxes, mirror, 224)[0].numpy()
    still = flow.crop(field[:, 0], boxes, mirror, 224)[0].numpy()  # places alone, not directions
    inside = (slice(None), slice(None), slice(20, -20), slice(20, -20))
    off = np.linalg.norm((ours - theirs)[inside], axis=1).mean()
    assert off < 0.03
    assert np.linalg.norm((still - theirs)[inside], axis=1).mean() > 3 * off


def test_a_quarter_turn_is_that_of_indexing():
    field = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, 2, 8, 8))).float()
    boxes = torch.tensor([[0.0, 0, 8, 8, 90]])
    actual = flow.crop_flow(field, boxes, torch.tensor([False]), 8)[0, 0]
    u, v = torch.rot90(field[0, 0], -1, (1, 2))  # clockwise: right becomes down
    assert torch.allclose(actual, torch.stack([-v, u]), atol=1e-5)


def test_crops_are_those_of_indexing_where_nothing_is_resized():
    image = torch.rand(2, 3, 16, 16)
    boxes = torch.tensor([[2.0, 3, 8, 8], [0, 0, 8, 8]])
    actual = flow.crop(image, boxes, torch.tensor([False, True]), 8)
    assert torch.allclose(actual[0], image[0, :, 3:11, 2:10], atol=1e-5)
    assert torch.allclose(actual[1], image[1, :, :8, :8].flip(-1), atol=1e-5)


def test_action_units_and_what_is_none():
    assert videos.read_units("4+R12 + L10") == ({"4", "12", "10"}, [])
    assert videos.read_units("4+R12", sides=True) == ({"4", "R12"}, [])
    assert videos.read_units("?+AU3+14") == ({"14"}, ["?", "AU3"])
    names = videos.unit_names([frozenset({"12", "4"}), frozenset({"L10", "10"})])
    assert names == ["4", "10", "L10", "R10", "12"]  # in mirrored clips the other side shows it
    shown = videos.multi_hot([{"4", "12"}, {"17"}, frozenset()], names)
    assert shown[:2].tolist() == [[1, 0, 0, 0, 1], [0] * 5]
    assert np.isnan(shown[2]).all()  # nobody coded it


def test_a_method_that_is_none_is_refused():
    with pytest.raises(ValueError, match="dis, farneback"):
        flow.flow_between(np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8), "tvl1")
