"""What the tests share: the scripts as modules, small drawn data sets, one pre-trained run."""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import importlib
import os
import shutil
import tarfile
from pathlib import Path

import narrow
import numpy as np
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from dataset import Clip
from evaluation import pictures
from images import transforms
from images.lists import write_lists
from preparation import audit

ROOT = Path(util.__file__).parent
LISTS = ROOT.parent / "shared" / "casme3_lists.tar.xz"
PARITY = ROOT.parent / "shared" / "parity"


@pytest.fixture
def full_width():
    """ResNets as they are; other tests get narrow ones, but in what they start by a command."""
    narrow.use(False)
    yield
    narrow.use()


def pytest_configure(config):
    narrow.use()
    # of the generated code in tensorboard_logger
    config.addinivalue_line("filterwarnings", "ignore:Call to deprecated create function")
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, for what it starts as well
        threadpool_limits(1)  # of NumPy, and of scikit-learn
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def threads():
    """How many threads there were, and are again."""
    number = torch.get_num_threads()
    yield number
    torch.set_num_threads(number)


class Empty:
    """A figure, and its axes, that take whatever is drawn on them and hold nothing."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    def __getitem__(self, _):
        return 0


@pytest.fixture(autouse=True)
def pictures_unread(request, monkeypatch):
    """Every run draws its pictures, a third of its time on sets as small as these: where a test
    does not look at them (the marker `pictures`), it draws on figures that hold nothing, and one
    pixel is written."""
    def save(path, *_):
        Image.new("L", (1, 1)).save(path, "PNG")
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(pictures, "Figure", Empty())
        monkeypatch.setattr(pictures, "write_figure", save)
        for sheet in ("draw_rows", "draw_histograms"):
            monkeypatch.setattr(audit, sheet, save)


script = importlib.import_module  # also takes names with dashes, as the import statement does not


# the published recipe, with which most tests pre-train: memory banks and a step schedule
PUBLISHED = {"--contrast": "bank", "--learning_rate": 0.003, "--lr_schedule": "step",
             "--warmup_epochs": 0}


def published(*argv):
    """A command line of pre-train_DVSCL.py with the published recipe in what it leaves open."""
    return [*argv, *(part for flag, value in PUBLISHED.items() if flag not in argv
                     for part in (flag, value))]


def pretrain(*argv):
    """pre-train_DVSCL.py in this process, as published."""
    return script("pre-train_DVSCL").main(published(*argv))


def probe(*argv):
    """LinearProbing_DVSCL_10fold.py in this process."""
    return script("LinearProbing_DVSCL_10fold").main(list(argv))


# of fine-tuning's first heads: what chooses it takes longer than the rest, on so few clips
FIXED = ["--l2", 0.01]


def finetune(*argv, chosen=False):
    """fine-tune_DVSCL.py in this process; chosen: the penalty is not FIXED."""
    fixed = [] if chosen or {"--l2", "--head"} & {*argv} else FIXED
    return script("fine-tune_DVSCL").main([*argv, *fixed])


def save_image(path, pixels, **options):
    """Writes an array as the image `path` and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def signed_pair(rng, size, channels=1):
    """Signed differences of one clip, uint8 `[H, W, 3]` and `[H, W]` or `[H, W, 3]`: blobs that
    both views share, and noise of their own."""
    y, x = np.mgrid[:size, :size] / size
    change = np.zeros((size, size))
    for _ in range(4):
        cx, cy, height = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(-30, 30)
        change += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.01)
    views = [128 + change[..., None] + rng.normal(0, 2, (size, size, n)) for n in (3, channels)]
    rgb, second = (view.round().clip(0, 255).astype(np.uint8) for view in views)
    return rgb, second if channels == 3 else second[..., 0]


def draw_set(folder, subjects=4, per_subject=3, n_label=2, size=64, second="depth", channels=1,
             seed=0):
    """Draws a data set of signed differences with its lists; the clips, by subject.

    The first clip of s2 is blank. Labels are dealt out in turn.
    """
    rng, clips = np.random.default_rng(seed), []
    for i in range(subjects):
        for j in range(per_subject):
            key, label = f"s{i + 1}-{'abcdefgh'[j]}-{10 * i + j}", (i + j) % n_label
            clip = Clip(0, f"s{i + 1}", key, label, (
                f"rgb/{label}/{key}_diff.png", f"{second}/{label}/{key}_diff_{second}.png"))
            views = signed_pair(rng, size, channels)
            if (i, j) == (1, 0):
                views = [np.full_like(view, 128) for view in views]
            for path, pixels in zip(clip.paths, views):
                save_image(folder / path, pixels)
            clips.append(clip)
    write_lists(folder, clips, ("rgb", second))
    util.write_json(folder / "encoding.json", {"difference": "signed"})
    return clips


def draw_pairs(folder, n=6):
    """Adds `n` unlabelled pairs of the subjects s1 to s4 to a drawn data set; returns pairs.tsv.

    The intensity of the i-th is i.
    """
    rng = np.random.default_rng(1)
    rows = ["rgb\tdepth\tdatabase\tsubject\tvideo\tonset\tapex\tintensity\tunit\thead_motion"]
    for i in range(n):
        names = f"free/u{i}_diff.png", f"free/u{i}_diff_depth.png"
        for name, pixels in zip(names, signed_pair(rng, 64)):
            save_image(folder / name, pixels)
        rows.append("\t".join([*names, "casme3", f"s{i % 4 + 1}", "v", "1", "5", f"{i}", "AU12",
                               "0.1"]))
    util.write_text(folder / "pairs.tsv", "\n".join(rows) + "\n")
    return folder / "pairs.tsv"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A drawn data set of 4 subjects with 3 clips each, two classes, with pairs.tsv; read only."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_set(folder)
    draw_pairs(folder)
    return folder


@pytest.fixture
def fresh(drawn, tmp_path):
    """A copy of `drawn` that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for decoded images."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def quick(cache):
    """Flags that make any of the scripts quick."""
    return ["--model", "resnet18v1", "--cache", cache, "--batch_size", 8, "--epochs", 1]


@pytest.fixture(scope="module")
def small_crops():
    """Crops of 64 pixels, for tests where the pictures do not matter: a twelfth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CROP", 64)
        yield


@pytest.fixture(scope="session")
def pretrained(drawn, quick, tmp_path_factory):
    """last.pth of one epoch of pre-training on `drawn`, on crops of 64 pixels."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CROP", 64)
        pretrain("--data_folder", drawn, "--model_path", folder, *quick)
    (path,) = folder.glob("memory_*/last.pth")
    return path


@pytest.fixture(scope="session")
def real_lists(tmp_path_factory):
    """The published lists of CAS(ME)^3, with an empty file for every image."""
    if not LISTS.exists():
        pytest.skip(f"no {LISTS.name}")
    folder = tmp_path_factory.mktemp("casme3")
    with tarfile.open(LISTS) as archive:
        archive.extractall(folder, filter="data")
    for path in folder.glob("v_*/*_test.txt"):
        for line in path.read_text().splitlines():
            image = folder / line.rsplit(None, 2)[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
    return folder
