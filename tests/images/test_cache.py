"""The cache, which knows nothing of clips; clips of more views than two, which it decodes."""
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import save_image

import dataset
from dataset import Clip, ClipSet
from images import cache, encoding, transforms
from training import epochs

ITEMS = [f"a sentence of {n} words" for n in range(7)]


@pytest.fixture
def counted():
    """(a decoder of sentences to float16 `[3, 2]`, how often each was decoded)"""
    calls = Counter()

    def decode(sentence):
        calls[sentence] += 1
        return np.full((3, 2), int(sentence.split()[3]) + 0.5, np.float16)
    return decode, calls


def expected():
    return np.arange(7, dtype=np.float16)[:, None, None] + np.full((3, 2), 0.5, np.float16)


@pytest.mark.parametrize("place", ["off", "folder"])
def test_any_items_are_decoded_once_to_their_own_shape_and_type(tmp_path, counted, place):
    decode, calls = counted
    folder, stamp = "off" if place == "off" else tmp_path / "cache", hashlib.sha256().hexdigest()
    actual, digest = cache.cached(ITEMS, decode, (3, 2), np.float16, stamp, folder, num_workers=2)
    assert (actual.shape, actual.dtype) == ((7, 3, 2), np.float16) and (actual == expected()).all()
    assert digest == hashlib.sha256(expected().tobytes()).hexdigest()
    assert calls == dict.fromkeys(ITEMS, 1)
    again, same = cache.cached(ITEMS, decode, (3, 2), np.float16, stamp, folder)
    assert (again == expected()).all() and again.dtype == np.float16 and same == digest
    assert calls == dict.fromkeys(ITEMS, 2 if place == "off" else 1)
    if place == "off":
        assert not list(tmp_path.iterdir())
        return
    assert isinstance(again, np.memmap)
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}
    (details,) = folder.glob("*.json")
    assert json.loads(details.read_text())["sha256"] == digest
    cache.cached(ITEMS, decode, (3, 2), np.float16, "another", folder)  # follows from other things
    assert calls == dict.fromkeys(ITEMS, 2) and len(list(folder.iterdir())) == 4


def test_items_that_fit_nowhere_are_decoded_as_they_are_asked_for(monkeypatch, counted, capsys):
    decode, calls = counted
    monkeypatch.setattr(cache, "_free_memory", lambda: 7 * 3 * 2 * 2)  # bytes: no room to spare
    actual, digest = cache.cached(ITEMS, decode, (3, 2), np.float16, "stamp", "off")
    assert digest == "stamp" and not calls and len(actual) == 7
    assert "decoded for every batch anew" in capsys.readouterr().out
    for index in (np.array([5, 0, 5]), slice(1, 4), 6):
        assert (actual[index] == expected()[index]).all() and actual[index].dtype == np.float16
    batches = list(cache.fetch(actual, [np.array([2, 1]), np.array([6])], torch.device("cpu")))
    assert [batch.shape for batch in batches] == [(2, 3, 2), (1, 3, 2)]
    assert (torch.cat(batches).numpy() == expected()[[2, 1, 6]]).all()


def test_a_decoder_that_fails_leaves_nothing_in_the_folder(tmp_path):
    def fail(item):
        raise KeyError(item)
    with pytest.raises(KeyError):
        cache.cached(ITEMS, fail, (3, 2), np.float16, "stamp", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stamp_follows_from_files_and_what_else_it_is_given(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    first = cache.stamp([path], "signed", (7, 3))
    assert first == cache.stamp([path], "signed", (7, 3))
    assert first != cache.stamp([path], "signed", (7, 4))
    assert first != cache.stamp([], "signed", (7, 3))
    path.write_text("three")
    assert first != cache.stamp([path], "signed", (7, 3))


# ---------------------------------------------------------------- three views

VIEWS, CHANNELS = ("rgb", "depth", "thermal"), (3, 1, 3)


@pytest.fixture
def three(tmp_path):
    """A ClipSet of five clips with three views, and their pixels uint8 `[5, 7, 256, 256]`."""
    pixels = np.random.default_rng(0).integers(100, 156, (5, 7, 256, 256), dtype=np.uint8)
    clips = []
    for i, channels in enumerate(pixels):
        paths = tuple(f"{view}/{i}.png" for view in VIEWS)
        for path, view in zip(paths, np.split(channels, (3, 4))):
            save_image(tmp_path / path, view.transpose(1, 2, 0) if len(view) == 3 else view[0])
        clips.append(Clip(0, f"s{i}", str(i), 0, paths))
    return ClipSet(clips, tmp_path, VIEWS, CHANNELS, {"difference": "signed"}, 1), pixels


@pytest.mark.parametrize("place", ["off", "folder"])
def test_three_views_are_decoded_side_by_side(three, tmp_path, place):
    clips, pixels = three
    images, _ = dataset.load_images(clips, "off" if place == "off" else tmp_path / "cache", 2)
    assert images.shape == (5, 7, 256, 256) and (images == pixels).all()
    smaller, _ = dataset.load_images(clips, size=112)
    assert smaller.shape == (5, 7, 128, 128)


def test_each_of_three_views_is_augmented_by_its_own_numbers(three):
    clips, pixels = three
    normalization = encoding.fixed_normalization("signed", VIEWS, CHANNELS)
    assert normalization == {"mean": [128 / 255] * 7, "std": [8 / 255] * 3 + [4 / 255] * 4}
    images = torch.from_numpy(np.array(dataset.load_images(clips)[0]))
    drawn = transforms.draw(5, epochs.generator(3), "signed", views=3)
    assert drawn["gain"].shape == drawn["offset"].shape == (5, 3)
    drawn["flip"] = torch.tensor([True, False, True, False, False])
    drawn["grey"] = torch.tensor([False, False, False, False, True])
    actual = transforms.train_transform(images, drawn, normalization, CHANNELS).numpy()
    assert actual.shape == (5, 7, 224, 224)
    for clip in range(5):
        change = pixels[clip, :, 16:240, 16:240] - 128.0
        change = change[..., ::-1] if drawn["flip"][clip] else change
        for number, (low, high) in enumerate(((0, 3), (3, 4), (4, 7))):
            view = change[low:high]
            if number == 0 and drawn["grey"][clip]:
                view = np.tensordot(encoding.GREY, view, 1)[None].repeat(3, 0)
            gain, offset = (drawn[name][clip, number].item() for name in ("gain", "offset"))
            shifted = (view + offset * np.sqrt(np.square(view).mean())) * gain
            assert np.allclose(actual[clip, low:high], shifted / (4 if number else 8), atol=1e-4)


def test_one_box_crops_three_views_alike(three):
    clips, _ = three
    images = torch.from_numpy(np.array(dataset.load_images(clips)[0]))
    images[:, 3:] = images[:, :1]  # what one channel holds, all of the other views hold
    plain = {"mean": [0.0] * 7, "std": [1 / 255] * 7}
    drawn = transforms.draw(5, epochs.generator(4), "absolute", 0, 0.3, views=3)
    actual = transforms.train_transform(images, drawn, plain, CHANNELS)
    assert drawn["box"].shape == (5, 4) and actual.shape == (5, 7, 224, 224)
    for channel in range(3, 7):
        assert torch.allclose(actual[:, channel], actual[:, 0], atol=1e-3)


def test_the_deviation_of_three_views_is_estimated_per_channel(three):
    pixels = three[1]
    actual = encoding.estimate_normalization(pixels, np.arange(5), "signed", VIEWS, CHANNELS)
    deviation = np.sqrt(np.square(pixels - 128.0).mean((0, 2, 3))) / 255
    assert actual["std"] == pytest.approx(deviation.tolist())
    assert actual["mean"] == [128 / 255] * 7
