"""train_MMNet.py: held-out subjects, parts, stages, resume, what never enters, bad input."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import casme2_tree
import numpy as np
import pytest
import runs
import torch
from conftest import ROOT, script

import dataset
import train_MMNet
from evaluation import pictures, result_files
from evaluation import videos as held_out
from images import videos
from models import mmnet
from training import checkpoint, motion, record

CLIPS = [clip for clip in casme2_tree.CLIPS if clip[6] != "fear"] \
    + [(4, "EP06_01", 7, 27, 47, "4+7", "disgust"), (5, "EP07_01", 1, 11, 21, "2", "surprise")]


def train(*argv):
    return script("train_MMNet").main([str(a) for a in argv])


def refused(capsys, *argv):
    return runs.refused(capsys, train, *argv)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmnet")
    casme2_tree.write(folder, CLIPS)
    script("prepare").main(["casme2", "--raw", folder, "--annotation", folder / "coding.csv",
                            "--data_folder", folder / "set", "--size", 48, "--num_workers", 0,
                            "--register", "none"])
    return folder / "set"


@pytest.fixture
def flags(prepared):
    return ["--data_folder", prepared, "--size", 32, "--epochs", 2, "--batch_size", 4,
            "--model", "V4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The networks' own layers, narrow: what is tested here does not depend on their width."""
    # some kernels of channels-last convolutions crash on odd batches of 8 channels
    thin = {"internal": (16,), "widths": (16,) * 4}
    for name, layout in mmnet.LAYOUTS.items():
        own = thin | ({"internal": (16, 16)} if layout.in_time else {})
        external = tuple(16 for _ in layout.external)
        monkeypatch.setitem(mmnet.LAYOUTS, name, layout._replace(external=external, **own))


def only(folder, pattern="mmnet_*"):
    (run,) = [path for path in folder.glob(pattern) if path.is_dir()]
    return run


def results(run):
    return json.loads((run / "results.json").read_text())


def weights_differ(one, two):
    a, b = (checkpoint.load(path)["model"] for path in (one, two))
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_the_picture_of_mistakes_says_what_its_maps_are(prepared, tmp_path, monkeypatch):
    data, _ = dataset.read_videos(prepared, 48, False)
    held, drawn = object.__new__(held_out.HeldOutVideos), []
    held.data = data
    monkeypatch.setattr(pictures, "write_figure", lambda _, figure: drawn.append(figure))
    clip = data.clips.clips[0]
    row = {"database": "casme2", "subject": clip.subject, "key": clip.key, "label": 0,
           "prediction": 1, "probabilities": [0.1, 0.9, 0, 0, 0]}
    held.draw_mistakes(tmp_path, [(row, [np.full((3, 3), 9, np.uint8)] * 4)], (1, 9))
    (figure,) = drawn
    texts = [text.get_text() for text in figure.texts]
    assert any("maps of attention" in text for text in texts)
    assert not any("Grad-CAM" in text for text in texts)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "onset", "flow to the apex", "block 1", "block 2", "block 3", "block 4"]


@pytest.mark.pictures
def test_every_subject_is_predicted_and_the_files_are_those_of_the_house(flags, tmp_path, capsys):
    train(*flags, "--save_path", tmp_path, "--tb_path", tmp_path / "tb")
    run = only(tmp_path)
    content = results(run)
    assert content["n"] == 9 and content["n_subjects"] == 5
    assert content["classes"] == ["happiness", "repression", "disgust", "surprise", "others"]
    assert content["transductive"] is False and content["oracle_best_epoch"]["common"]["epoch"] in (
        1, 2)
    for name in ("predictions.csv", "confusion.png", "mistakes.png", "curves.png", "log.jsonl"):
        assert (run / name).stat().st_size > 100
    state = checkpoint.load(run / "last.pth")
    assert state["unit"] == "sub05" and state["epoch"] == 2
    maps = [kept["maps"] for kept, _ in result_files.read_subjects(run).values() if "maps" in kept]
    assert maps and all(len(own) == 4 for kept in maps for own in kept.values())
    script("compare_results").main([str(run / "results.json")])
    assert "mmnet, V4, loso" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_and_another_one_another(flags, tmp_path):
    flags += ["--part", "5"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(*flags, "--seed", seed, "--save_path", tmp_path / name)
    a, b, c = (only(tmp_path / name) for name in "abc")
    assert weights_differ(a / "last.pth", b / "last.pth") == []
    assert weights_differ(a / "last.pth", c / "last.pth")


def test_two_ranks_share_the_subjects_and_predict_as_one_process_does(flags, tmp_path):
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone",
                                               "--nproc_per_node", 2])):
        subprocess.run([str(a) for a in (
            sys.executable, *launch, ROOT / "train_MMNet.py", *flags, "--part", "1,4,5", "--epochs",
            1, "--save_path", tmp_path / name)], check=True, capture_output=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()
    assert {row["subject"] for row in runs.rows(two)} == {"sub01", "sub04", "sub05"}


@pytest.mark.parametrize("more", [["--model", "V6", "--au_epochs", 1, "--unfreeze_epoch", 1],
                                  ["--model", "V4", "--au_loss", 0.5]], ids=["V6", "V4"])
def test_held_out_labels_and_action_units_change_no_weight(prepared, flags, tmp_path, more):
    """Neither does it matter to the choice of an epoch by inner subjects."""
    text = (prepared / "clips.csv").read_text().splitlines()
    other = shutil.copytree(prepared, tmp_path / "other")
    spoiled = [re.sub(r"(casme2,sub04,[^,]+),\d,(\w+),(.*),[^,]*$",
                      lambda m: f"{m[1]},1,garbage,{m[3]},39+L40", line) for line in text]
    assert sum(a != b for a, b in zip(text, spoiled)) == 2
    (other / "clips.csv").write_text("\n".join(spoiled) + "\n")
    flags += [*more, "--part", "4", "--select", "inner"]
    for name, data in (("plain", prepared), ("spoiled", other)):
        train(*flags, "--data_folder", data, "--save_path", tmp_path / name)
    assert weights_differ(only(tmp_path / "plain") / "last.pth",
                          only(tmp_path / "spoiled") / "last.pth") == []


def job_of(prepared, name="V6", *more):
    data, units = dataset.read_videos(prepared, 32, False)
    opt = train_MMNet.parse_option([
        "--data_folder", str(prepared), "--save_path", "s", "--model", name, "--size", "32",
        "--batch_size", "4", "--device", "cpu", *more])
    return opt, train_MMNet.set_job(opt, data, units, np.arange(len(units)), "x",
                                    torch.device("cpu"))


def test_the_auxiliary_loss_reaches_the_blocks(prepared):
    moved = []
    for weight in (0.5, 0.25, 0.0):
        opt, job = job_of(prepared, "V4", "--au_loss", "0.5")
        assert job.network.fc.in_features == job.network.au.in_features
        torch.nn.init.zeros_(job.network.fc.weight)  # so that classes tell the blocks nothing
        before = {name: part.detach().clone() for name, part in job.network.named_parameters()}
        means = motion.train_epoch(
            opt.changed(learning_rate=1.0, batch_size=9, au_loss=weight), job._replace(
                optimizer=torch.optim.SGD(job.network.parameters(), lr=1.0)),
            "all", 1, 1, {}, lambda inside: None)
        assert ("au_loss" in means) == (weight > 0)
        moved.append({name: part.detach() - before[name] for name, part in
                      job.network.named_parameters() if not name.startswith("fc.")})
    for name, value in moved[0].items():
        assert torch.allclose(value, 2 * moved[1][name], rtol=1e-3, atol=1e-6), name
        assert not moved[2][name].any(), name
    assert moved[0]["blocks.0.conv1.weight"].norm() > 1e-4 < moved[0]["au.weight"].norm()


def test_stages_freeze_what_they_say_to_the_bit(prepared):
    opt, job = job_of(prepared)
    moving = {"units": lambda n: not n.startswith("fc."), "last": lambda n: n.startswith("fc."),
              "all": lambda n: True}
    for epoch, (stage, moves) in enumerate(moving.items(), 1):
        before = {name: value.clone() for name, value in job.network.state_dict().items()}
        motion.train_epoch(opt, job, stage, epoch, epoch, {}, lambda inside: None)
        for name, value in job.network.state_dict().items():
            if value.is_floating_point() and not name.endswith("num_batches_tracked"):
                assert torch.equal(value, before[name]) != moves(name), (stage, name)


def test_stages_follow_the_epochs():
    opt = train_MMNet.parse_option([
        "--data_folder", "d", "--save_path", "s", "--model", "V6", "--au_epochs", "2",
        "--unfreeze_epoch", "1", "--epochs", "3"])
    assert [train_MMNet.stage_of(opt, epoch) for epoch in range(1, 6)] == [
        ("units", 1, False), ("units", 2, False), ("last", 1, True), ("all", 2, False),
        ("all", 3, False)]
    opt.model = "V4"
    assert train_MMNet.stage_of(opt, 3) == ("all", 3, False)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(prepared, monkeypatch):
    """Where neither batch norm nor the augmentation see the parts, three of them add up."""
    monkeypatch.setattr(videos, "draw_boxes", lambda n, size, *_: videos.whole(n, size))
    moved = []
    for parts in (1, 3):
        opt, job = job_of(prepared, "V4")
        job.network.train = lambda mode=True, network=job.network: torch.nn.Module.train(
            network, False)
        before = {name: part.detach().clone() for name, part in job.network.named_parameters()}
        optimizer = torch.optim.SGD(job.network.parameters(), lr=1.0)
        motion.train_epoch(
            opt.changed(learning_rate=1.0, batch_size=8, accumulate=parts), job._replace(
                optimizer=optimizer, members=np.arange(8), source=job.source._replace(
                    videos=plain(job.source.videos))), "all", 1, 1, {}, lambda inside: None)
        moved.append({name: part.detach() - before[name]
                      for name, part in job.network.named_parameters()})
    for name, value in moved[0].items():
        assert (value - moved[1][name]).norm() <= 1e-3 * value.norm() + 1e-6, name
    assert moved[0]["fc.weight"].norm() > 0.01


def plain(arrays):
    """Videos without jitter."""
    return arrays._replace(index=arrays.index[:, :1])


@pytest.mark.parametrize("stopped_in", [1, 2, 3, 5], ids=["stage 1", "between", "stage 2", "last"])
def test_a_run_that_was_stopped_goes_on_to_the_same_tensors(flags, tmp_path, monkeypatch,
                                                            stopped_in):
    flags += ["--model", "V6", "--au_epochs", 2, "--unfreeze_epoch", 1, "--epochs", 3, "--part",
              "5", "--select", "inner"]
    train(*flags, "--save_path", tmp_path / "whole")
    epoch_of, steps = motion.train_epoch, []

    def struck(opt, job, stage, epoch, number, within, on_step):
        def step(inside):
            steps.append(epoch)
            if epoch == stopped_in and len(steps) >= 2 * stopped_in - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            on_step(inside)
        return epoch_of(opt, job, stage, epoch, number, within, step)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(motion, "train_epoch", struck)
        train(*flags, "--save_path", tmp_path / "part")
    assert end.value.code == 143
    train(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    assert weights_differ(whole / "last.pth", part / "last.pth") == []
    assert (whole / "predictions.csv").read_bytes() == (part / "predictions.csv").read_bytes()
    lines = [[line.get("epoch") for line in record.read_log(run)] for run in (whole, part)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("part, expected", [
    ("all", None), ("1-2", ["sub01", "sub02"]), ("5,1", ["sub05", "sub01"]),
    ("[1, 3-4]", ["sub01", "sub03", "sub04"]), ("sub02", ["sub02"]),
    ("casme2/sub02", ["sub02"]), ("hardest_1", ["sub05"]), ("hardest_2", ["sub05", "sub03"]),
    ("hardest", ["sub05", "sub03", "sub01"])])
def test_part_in_every_form(prepared, part, expected, monkeypatch):
    assert held_out.HARDEST == (5, 16, 7, 3, 6, 17, 20, 13, 26, 1)
    monkeypatch.setattr(held_out, "HARDEST", (5, 3, 1))
    data, _ = dataset.read_videos(prepared, 48, False)
    assert held_out.chosen_subjects(part, data.clips) == expected


def test_finished_parts_are_merged(flags, tmp_path):
    train(*flags, "--save_path", tmp_path, "--part", "1")
    train(*flags, "--save_path", tmp_path, "--part", "sub02,5")
    run = only(tmp_path)
    assert {row["subject"] for _, rows in result_files.read_subjects(run).values()
            for row in rows} == {"sub01", "sub02", "sub05"}
    assert [line.get("subject") for line in record.read_log(run)][1:] == [
        "sub01"] * 2 + ["sub02"] * 2 + ["sub05"] * 2


@pytest.mark.parametrize("more", [
    ["--input", "difference"], ["--model", "mmnet"], ["--model", "mmnet", "--input", "difference"],
    ["--model", "V3NRS", "--scale", "fixed"], ["--model", "V1"], ["--model", "V2"],
    ["--channels", "s", "--scale", "column", "--loss", "balanced"],
    ["--protocol", "10fold", "--loss", "focal", "--accumulate", "2"]], ids=" ".join)
def test_variants_run(flags, tmp_path, more):
    train(*flags, "--epochs", 1, "--save_path", tmp_path, *map(str, more),
          *([] if "10fold" in more else ["--part", "5"]))
    assert 0 <= results(only(tmp_path))["uf1"] <= 1


def test_a_published_checkpoint_starts_a_network(flags, prepared, tmp_path, capsys):
    _, job = job_of(prepared, "V4")
    state = {name.replace("stem.external.spatial.", "conv_act.0.")
             .replace("stem.external.spatial_norm.", "conv_act.1.")
             .replace("stem.external.temporal.", "conv_act.3.")
             .replace("stem.external.temporal_norm.", "conv_act.4.")
             .replace("stem.internal.spatial.", "main_branch.conv1.")
             .replace("stem.internal.spatial_norm.", "main_branch.bn1.")
             .replace("position.", "vit_pos."): value
             for name, value in job.network.state_dict().items() if not name.startswith("fc.")}
    torch.save({"module." + k: v for k, v in state.items()}, tmp_path / "published.pth")
    train(*flags, "--save_path", tmp_path, "--pretrained", tmp_path / "published.pth", "--part", 5)
    assert "tensors loaded; fc.bias, fc.weight start anew" in capsys.readouterr().out
    state.pop("conv_act.0.weight")
    torch.save(state, tmp_path / "short.pth")
    said = refused(capsys, *flags, "--save_path", tmp_path / "x", "--pretrained",
                   tmp_path / "short.pth", "--part", 5)
    assert "1 tensors missing" in said and "stem.external.spatial.weight" in said


def test_parts_of_the_face_are_masked(prepared, flags, tmp_path, capsys):
    keys = [line.split(",")[2] for line in (prepared / "clips.csv").read_text().splitlines()[1:]]
    header = ["key", *(f"{axis}{i}" for i in range(1, 69) for axis in "xy")]
    angle = np.linspace(0, 2 * np.pi, 68)
    points = np.stack([24 + 12 * np.cos(angle), 24 + 12 * np.sin(angle)], 1).ravel()
    rows = [",".join(header), *(",".join([key, *map(str, points)]) for key in keys)]
    (tmp_path / "marks.csv").write_text("\n".join(rows) + "\n")
    masks = videos.read_masks(tmp_path / "marks.csv", keys, ["eyes"], 48, 48)
    assert masks.shape == (9, 48, 48) and 0.5 < masks.mean() < 1 and masks[0, 0, 0] == 1
    train(*flags, "--save_path", tmp_path, "--mask", "eyes", "jaw", "--landmarks",
          tmp_path / "marks.csv", "--part", 5)
    (tmp_path / "few.csv").write_text("\n".join(rows[:3]) + "\n")
    assert "no landmarks of 7 clips" in refused(
        capsys, *flags, "--save_path", tmp_path, "--mask", "eyes", "--landmarks",
        tmp_path / "few.csv")


@pytest.mark.parametrize("more, expected", [
    (["--size", 40], "multiple of 16"), (["--size", 64], "holds frames of 48 pixels"),
    (["--part", "9"], "no subject 9"), (["--part", "hardest"], "no subject 16"),
    (["--part", "nobody"], "--part nobody: no such subject"),
    (["--part", ","], "names nobody"), (["--batch_size", 1], "batch norm takes two"),
    (["--input", "difference", "--channels", "n"], "goes with --input flow"),
    (["--mask", "eyes"], "go together"), (["--model", "V6", "--au_loss", 1], "stage of its own"),
    (["--seeds", 1], "--seeds: give two"),
    (["--data_folder", "nowhere"], "nowhere: no flow.json"),
    (["--pretrained", "none.pth", "--part", 5], "none.pth: no such checkpoint")])
def test_bad_input_is_refused_in_one_line(flags, tmp_path, capsys, more, expected):
    said = refused(capsys, *flags, "--save_path", tmp_path / "r", *more)
    assert said.startswith("error: ") and expected in said


def test_sets_that_are_not_whole_are_refused(prepared, flags, tmp_path, capsys):
    def copy(name, change):
        folder = shutil.copytree(prepared, tmp_path / name)
        change(folder)
        return refused(capsys, *flags, "--data_folder", folder, "--save_path", tmp_path / "r")

    def without_class(folder):
        text = (folder / "clips.csv").read_text()
        (folder / "clips.csv").write_text(text.replace(",1,repression", ",4,repression"))
    assert "flow.npy: missing" in copy("a", lambda f: (f / "flow.npy").unlink())
    assert "no clip of class repression" in copy("b", without_class)
    assert "not the 9 clips" in copy("c", lambda f: (f / "clips.csv").write_text(
        "\n".join((f / "clips.csv").read_text().splitlines()[:-1]) + "\n"))
    assert "cannot be read" in copy("d", lambda f: (f / "flow.json").write_text("{"))


def test_a_set_without_action_units_is_refused_for_a_network_that_learns_them(
        prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    lines = (folder / "clips.csv").read_text().splitlines()
    (folder / "clips.csv").write_text("\n".join(
        [lines[0], *(line.rpartition(",")[0] + "," for line in lines[1:])]) + "\n")
    assert "clips.csv: no training clip names an action unit" in refused(
        capsys, *flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--model",
        "V6", "--part", 5)


def test_unknown_action_units_are_named(prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    text = (folder / "clips.csv").read_text().replace(",L10\n", ",?\n")
    (folder / "clips.csv").write_text(text)
    train(*flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--part", 5)
    assert "action unit '?' of 1 clips (sub02-EP08_04-5 the first) is none" in \
        capsys.readouterr().out
