"""What the last release left behind still loads and goes on: its checkpoints, run folders, lists.

`release/` was written by it, on rendered clips: a pre-training stopped after the first of two
epochs, a probe that has finished two of four subjects, a fine-tuning that has finished one and
stopped within another, a model for prediction; expected.json is what it made of them itself.
Weights are drawn, overlapping in memory, so that the files are small.
"""
import csv
import io
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import script

RELEASE = Path(__file__).with_name("release")
EXPECTED = json.loads((RELEASE / "expected.json").read_text())
COMMANDS = json.loads((RELEASE / "commands.json").read_text())
pytestmark = pytest.mark.usefixtures("full_width")


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A copy of the folder, in which the commands run as they did."""
    folder = Path(shutil.copytree(RELEASE, tmp_path / "release"))
    for packed in folder.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.chdir(folder)
    return folder


def table(text):
    return [list(row) for row in csv.reader(io.StringIO(text))]


def check_predictions(folder, stage, people):
    """Every row of a run's predictions.csv is the release's, up to rounding."""
    (path,) = folder.glob(f"results/{stage}_*/predictions.csv")
    ours, theirs = table(path.read_text()), table(EXPECTED[stage])
    theirs = theirs[:1] + [row for row in theirs[1:] if row[1] in people]
    assert [row[:5] for row in ours] == [row[:5] for row in theirs]
    np.testing.assert_allclose([[float(p) for p in row[5:]] for row in ours[1:]],
                               [[float(p) for p in row[5:]] for row in theirs[1:]], atol=2e-3)


def test_pretraining_goes_on(release):
    script("pre-train_DVSCL").main([*COMMANDS["pretrain"], "--resume", "auto"])
    (log,) = release.glob("runs/*/log.jsonl")
    header, first, second = map(json.loads, log.read_text().splitlines())
    assert header["opt"]["nce_k"] == 16 and first["epoch"] == 1
    theirs = EXPECTED["pretrain"]
    assert second.keys() == theirs.keys()
    assert second["learning_rate"] == theirs["learning_rate"]
    for name in ("rgb_loss", "depth_loss", "rgb_prob", "depth_prob"):
        # batch norms over eight such small maps multiply what other threads round otherwise
        assert second[name] == pytest.approx(theirs[name], rel=0.1), name


def test_probe_goes_on(release):
    kept = {path: path.read_bytes() for path in release.glob("results/probe_*/subjects/*.json")}
    assert sorted(path.stem for path in kept) == ["spNO1", "spNO2"]
    script("LinearProbing_DVSCL_10fold").main([*COMMANDS["probe"], "--resume", "auto"])
    check_predictions(release, "probe", {f"spNO{i}" for i in range(1, 5)})
    for path, content in kept.items():
        assert json.loads(path.read_text())["rows"] == json.loads(content)["rows"]


def test_fine_tuning_goes_on_within_a_subject(release, capsys):
    script("fine-tune_DVSCL").main([*COMMANDS["finetune"], "--resume", "auto",
                                    "--subject", "spNO2"])
    assert "spNO2: goes on after epoch 1" in capsys.readouterr().out
    check_predictions(release, "finetune", {"spNO1", "spNO2"})
    (log,) = release.glob("results/finetune_*/log.jsonl")
    ours, theirs = map(json.loads, (log.read_text().splitlines()[-1], EXPECTED["finetune_log"]))
    assert ours.keys() == theirs.keys() and ours["subject"] == "spNO2" and ours["epoch"] == 2
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_prediction(release, capsys):
    script("predict").main([
        "--model_path", "all.pth", "--data_folder", "data", "--device", "cpu", "--json", "--list",
        "data/v_rgb/spNO1_test.txt"])
    ours = json.loads(capsys.readouterr().out)
    for mine, theirs in zip(ours["clips"], EXPECTED["predict"]["clips"], strict=True):
        assert mine["key"] == theirs["key"] and mine["prediction"] == theirs["prediction"]
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=2e-3)
