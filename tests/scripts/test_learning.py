"""Does contrasting learn what the two views share, for clips of people it never saw?

The quick tests use drawn blobs that both views show, on small crops; rendered faces with the
demo's own settings take minutes.
"""
import json
import math

import numpy as np
import pytest
import torch
from conftest import draw_set, pretrain, script

import dataset
from images import encoding, transforms
from models import create_model
from training import checkpoint, record


def train(data, out, cache, model, *flags):
    """Pre-trains; (state of last.pth, the epochs' log lines)."""
    pretrain("--data_folder", data, "--model_path", out, "--cache", cache, "--model", model, *flags)
    (path,) = out.glob("memory_*/last.pth")
    return checkpoint.load(path), record.read_log(path.parent)[1:]


def scores(state, model, data):
    """Cosines of every clip's RGB with every clip's depth features `[N, N]`, and the subjects."""
    clips = dataset.read_clips(data)
    images, _ = dataset.load_images(clips)
    keep = np.flatnonzero(~encoding.blank(images, clips.encoding["difference"]))
    encoder = create_model(model)
    encoder.load_state_dict(state["model"])
    with torch.no_grad():
        batch = transforms.eval_transform(torch.from_numpy(images[keep]), state["normalization"])
        rgb, depth = encoder.eval()(batch)
    return (rgb @ depth.t()).numpy(), np.array([clips.clips[i].subject for i in keep])


def above(actual, subjects=None):
    """Share of non-matching pairs that score below the matching one, 0.5 at chance.

    subjects: compare with other clips of the same subject only.
    """
    wins = []
    for i in range(len(actual)):
        others = np.arange(len(actual)) != i
        if subjects is not None:
            others &= subjects == subjects[i]
        wins += [actual[i, i] > actual[i, others], actual[i, i] > actual[others, i]]
    return np.concatenate(wins).mean()


def fall(lines, view):
    """How far a view's loss fell, as a share of its value at chance, log(K' + 1)."""
    return (lines[0][f"{view}_loss"] - lines[-1][f"{view}_loss"]) / math.log(CLIPS)


CLIPS = 63  # of `blobs`: 8 subjects with 8 clips each, one of them blank


@pytest.fixture
def blobs(tmp_path_factory):
    """(clips to learn from, clips of other people): blobs that both views show."""
    folders = [tmp_path_factory.mktemp(name) for name in ("seen", "unseen")]
    draw_set(folders[0], 8, 8)
    draw_set(folders[1], 4, 6, seed=1)
    return folders


def permute(data):
    """Lets every clip's depth path show another clip."""
    clips = dataset.read_clips(data).clips
    pictures = [(data / clip.paths[1]).read_bytes() for clip in clips]
    order = np.random.default_rng(0).permutation(len(clips))
    for clip, other in zip(clips, order):
        (data / clip.paths[1]).write_bytes(pictures[other])


FLAGS = ["--batch_size", 8, "--epochs", 20, "--no_flip", "--jitter", 0]


def test_views_of_people_never_seen_match_after_training(small_crops, blobs, cache, tmp_path):
    seen, unseen = blobs
    state, lines = train(seen, tmp_path, cache, "resnet18v1", *FLAGS)
    actual, subjects = scores(state, "resnet18v1", unseen)
    assert fall(lines, "rgb") > 0.2 and fall(lines, "depth") > 0.2
    assert above(actual) > 0.7
    assert above(actual, subjects) > 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("full_width")
def test_nothing_is_learnt_from_permuted_pairs(small_crops, blobs, cache, tmp_path):
    seen, unseen = blobs
    permute(seen)
    state, _ = train(seen, tmp_path, cache, "resnet18v1", *FLAGS)
    actual, _ = scores(state, "resnet18v1", unseen)
    assert 0.4 < above(actual) < 0.6


@pytest.mark.parametrize("rate", [0.003, 0.03])
def test_nce_stays_finite(small_crops, drawn, cache, tmp_path, rate):
    state, lines = train(drawn, tmp_path, cache, "resnet18v1", "--no-softmax", "--batch_size", 4,
                         "--epochs", 6, "--learning_rate", rate)
    for line in lines:
        assert all(math.isfinite(line[name]) for name in ("rgb_loss", "depth_loss"))
        assert 0 <= line["rgb_prob"] <= 1 and 0 <= line["depth_prob"] <= 1
    banks = [state["contrast"][f"memory_{view}"] for view in ("rgb", "depth")]
    for bank in banks:
        assert torch.allclose(bank.norm(dim=1), torch.ones(len(bank)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("full_width")
def test_the_demos_settings_learn_from_rendered_faces(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "CROP", 224)  # the module's other tests crop 64 pixels
    render = script("render").main
    render(["casme3", "--data_folder", tmp_path / "seen"])
    render(["casme3", "--data_folder", tmp_path / "unseen", "--subjects", 6, "--seed", 1])
    state, lines = train(tmp_path / "seen", tmp_path / "runs", cache, "alexnet",
                         "--batch_size", 32, "--epochs", 60)
    chance = math.log(state["seen"]["clips"])
    for view in ("rgb", "depth"):
        assert lines[-1][f"{view}_loss"] < lines[0][f"{view}_loss"] - chance / 5
        assert lines[-1][f"{view}_loss"] < 0.8 * chance
    actual, subjects = scores(state, "alexnet", tmp_path / "unseen")
    print(json.dumps({"all": above(actual), "same subject": above(actual, subjects)}))
    assert above(actual) > 0.55
    assert above(actual, subjects) > 0.53
