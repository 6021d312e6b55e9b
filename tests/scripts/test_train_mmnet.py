"""train_MMNet.py: held-out subjects, parts, stages, resume, what never enters, bad input."""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import casme2_tree
import numpy as np
import pytest
import runs
import torch
from conftest import probe, script
from forked import ranked

import dataset
import train_MMNet
from evaluation import pictures, result_files
from evaluation import videos as held_out
from images import flow, videos
from models import mmnet
from training import checkpoint, epochs, motion, record
from util import BadInput, flag

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


@pytest.fixture(scope="module")
def two(prepared, tmp_path_factory):
    """A set of two databases, whose subjects 1 are two persons."""
    folder = tmp_path_factory.mktemp("two")
    names = [("casme2", f"sub{clip[0]:02d}", clip) for clip in CLIPS]
    names += [("smic", f"s{number}", clip) for number, clip in zip((1, 1, 20, 3), CLIPS)]
    (folder / "clips.csv").write_text("\n".join([
        "database,subject,clip,folder,onset,apex,offset,label,units", *(
            f"{database},{subject},{name},Cropped/sub{number:02d}/{name},{onset},{apex},{offset},"
            f"{emotion},{units}" for database, subject, (
                number, name, onset, apex, offset, units, emotion) in names)]) + "\n")
    script("prepare").main(["casme2", "--raw", prepared.parent, "--clips", folder / "clips.csv",
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


@pytest.mark.pictures
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
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert any("maps of attention" in text for text in texts)
    assert not any("Grad-CAM" in text for text in texts)
    titles = ["onset", "flow to the apex", "block 1", "block 2", "block 3", "block 4"]
    assert [text for text in texts if text in titles] == titles


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
    for n, name in enumerate(("one", "two"), 1):
        ranked(n, "train_MMNet", *flags, "--part", "1,4,5", "--epochs", 1, "--save_path",
               tmp_path / name, folder=tmp_path)
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


@pytest.mark.parametrize("epochs_, expected", [(80, 50), (100, 50), (20, 12), (50, 31), (1, 0)])
def test_layers_are_unfrozen_in_runs_of_any_length(capsys, epochs_, expected):
    opt = train_MMNet.parse_option(["--data_folder", "d", "--save_path", "s", "--model", "V6",
                                    "--epochs", str(epochs_)])
    assert (opt.au_epochs, opt.unfreeze_epoch) == (70, expected)
    assert (f"alone for {expected} of {epochs_} epochs" in capsys.readouterr().out) == (
        expected != 50)


def test_the_chosen_epoch_is_counted_within_its_stage(flags, tmp_path):
    train(*flags, "--save_path", tmp_path, "--model", "V6", "--au_epochs", 3, "--part", "5",
          "--select", "inner")
    run = only(tmp_path)
    uf1 = [line["inner_uf1"] for line in record.read_log(run)[1:] if "inner_uf1" in line]
    assert len(uf1) == 2
    assert results(run)["choices"]["sub05"]["epochs"] == 1 + uf1.index(max(uf1))
    state = checkpoint.load(run / "last.pth")  # holds the network that was chosen
    assert len(state["units"]) == len(state["model"]["au.bias"]) > 0
    assert runs.differing(state["model"], state["best"]["model"]) == []


def test_clips_without_motion_are_trained_on_as_zeros(prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    for name in ("flow.npy", "jitter.npy"):
        np.save(folder / name, 0 * np.load(folder / name))
    train(*flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--scale", "fixed",
          "--channels", "n", "--part", 5, "--epochs", 1, "--batch_size", 7)
    assert len(runs.rows(only(tmp_path / "r"))) == 1
    assert "would hold one alone; it is dropped" in capsys.readouterr().out  # of 8 clips


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


def test_a_run_that_was_killed_between_the_stages_begins_the_second(flags, tmp_path, monkeypatch):
    flags += ["--model", "V6", "--au_epochs", 1, "--unfreeze_epoch", 1, "--epochs", 2, "--part",
              "5", "--select", "inner", "--save_freq", 1]
    train(*flags, "--save_path", tmp_path / "whole")
    epoch_of = motion.train_epoch

    def struck(opt, job, stage, *rest):
        if stage != "units":
            raise SystemExit(1)
        return epoch_of(opt, job, stage, *rest)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(motion, "train_epoch", struck)
        train(*flags, "--save_path", tmp_path / "part")
    (path,) = (tmp_path / "part").glob("*/last*.pth")
    state = checkpoint.load(path)
    assert state["epoch"] == 1 and not state["within"]
    train(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    assert weights_differ(whole / "last.pth", part / "last.pth") == []
    assert (whole / "predictions.csv").read_bytes() == (part / "predictions.csv").read_bytes()


def test_predict_says_what_such_a_checkpoint_is(flags, tmp_path, capsys):
    train(*flags, "--model", "V1", "--epochs", 1, "--part", "5", "--save_path", tmp_path)
    said = runs.refused(capsys, script("predict").main, [
        "--model_path", str(only(tmp_path) / "last.pth"), "face.jpg"])
    assert "the flow of five frames" in said and "predictions.csv" in said


@pytest.mark.parametrize("stopped_in", [1, 2, 3, 5], ids=["stage 1", "its end", "stage 2", "last"])
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


SMIC = ["smic/s1", "smic/s20", "smic/s3"]


@pytest.mark.parametrize("part, expected", [
    ("all", None), ("casme2/sub01", ["casme2/sub01"]), ("smic/s1", ["smic/s1"]),
    ("s1", ["smic/s1"]), ("1", ["smic/s1", "casme2/sub01"]), ("smic", SMIC), ("20", ["smic/s20"]),
    ("1-4", ["smic/s1", "casme2/sub01", "casme2/sub02", "smic/s3", "casme2/sub03",
             "casme2/sub04"]), ("[5, smic/s3]", ["casme2/sub05", "smic/s3"]),
    ("hardest", ["casme2/sub05", "casme2/sub03", "casme2/sub01"]),
    ("hardest_2", ["casme2/sub05", "casme2/sub03"]),
    ("4-99999999999", ["casme2/sub04", "casme2/sub05", "smic/s20"])])
def test_part_in_every_form_of_two_databases(two, part, expected, monkeypatch):
    monkeypatch.setattr(held_out, "HARDEST", (5, 3, 1))
    data, _ = dataset.read_videos(two, 48, False)
    assert held_out.chosen_subjects(part, data.clips) == expected
    # which the rest of the script takes for the same persons
    people = dataset.find_people(expected or SMIC, data.clips)
    assert [f"{dataset.DATABASES[d]}/{name}" for d, name in people] == (expected or SMIC)


@pytest.mark.parametrize("part, expected", [
    ("20", "--part hardest_6: no subject 20 of casme2"), ("samm", "--part samm: no subject samm"),
    ("nobody", "--part nobody: no such subject"), ("6-10", "--part 6-10: no subject 6-10; the data "
                                                           "hold smic/s1, smic/s20, smic/s3, cas"),
    ("9" * 30, "--part 999"), ("smic/sub01", "--part smic/sub01: no such subject")])
def test_parts_that_name_nobody_are_refused(two, part, expected, monkeypatch):
    monkeypatch.setattr(held_out, "HARDEST", (20,))
    data, _ = dataset.read_videos(two, 48, False)
    with pytest.raises(BadInput) as error:
        held_out.chosen_subjects(part if part != "20" else "hardest_6", data.clips)
    assert str(error.value).startswith(expected)


def test_parts_of_two_databases_are_merged(two, flags, tmp_path):
    flags += ["--data_folder", two, "--epochs", 1, "--save_path", tmp_path]
    train(*flags, "--part", "1")
    train(*flags, "--part", "casme2/sub05,smic/s3")
    assert {(row["database"], row["subject"]) for row in runs.rows(only(tmp_path))} == {
        ("casme2", "sub01"), ("smic", "s1"), ("casme2", "sub05"), ("smic", "s3")}


def test_results_say_whether_all_are_of_the_hard_list(flags, tmp_path, capsys):
    flags += ["--epochs", 1, "--save_path"]
    said = held_out.CHOSEN
    train(*flags, tmp_path / "a", "--part", "hardest_1")
    assert results(only(tmp_path / "a"))["part"] == said and said in capsys.readouterr().out
    train(*flags, tmp_path / "a", "--part", "1")  # the tenth of the list
    assert results(only(tmp_path / "a"))["part"] == said
    train(*flags, tmp_path / "a", "--part", "2")
    assert "part" not in results(only(tmp_path / "a")) and said not in capsys.readouterr(
        ).out.splitlines()[-20:]
    train(*flags, tmp_path / "a", "--part", "hardest_1")
    assert "part" not in results(only(tmp_path / "a"))


def test_finished_parts_are_merged(flags, tmp_path):
    train(*flags, "--save_path", tmp_path, "--part", "1")
    train(*flags, "--save_path", tmp_path, "--part", "sub02,5")
    run = only(tmp_path)
    assert {row["subject"] for _, rows in result_files.read_subjects(run).values()
            for row in rows} == {"sub01", "sub02", "sub05"}
    assert [line.get("subject") for line in record.read_log(run)][1:] == [
        "sub01"] * 2 + ["sub02"] * 2 + ["sub05"] * 2


@pytest.mark.parametrize("more", [
    ["--input", "difference"], ["--model", "mmnet"], ["--model", "mmnet", "--input", "flow"],
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
    assert not (tmp_path / "x").exists()


def test_a_start_that_changes_within_a_run_ends_it(flags, prepared, tmp_path, capsys, monkeypatch):
    _, job = job_of(prepared, "V4")
    path, keep = tmp_path / "start.pth", record.Run.finished
    torch.save({"model": job.network.state_dict()}, path)

    def changed(run, name):
        keep(run, name)
        torch.save({"model": job.network.state_dict(), "epoch": 9}, path)
    monkeypatch.setattr(record.Run, "finished", changed)
    said = refused(capsys, *flags, "--model", "V4", "--save_path", tmp_path / "out", "--pretrained",
                   path, "--part", "4,5")
    assert "start.pth: has changed since this run began" in said
    assert [one.stem for one in tmp_path.glob("out/*/subjects/*")] == ["sub04"]


def test_results_say_whom_a_pretrained_network_saw(flags, prepared, tmp_path, capsys):
    flags += ["--epochs", 1]
    train(*flags, "--save_path", tmp_path / "first", "--part", "5", "--select", "inner")
    first = only(tmp_path / "first") / "last.pth"
    assert runs.load(first)["seen"] == {
        "people": [[2, f"sub{i:02d}"] for i in range(1, 5)],
        "named": [[2, f"sub{i:02d}"] for i in range(1, 5)], "clips": 8}
    second = [*flags, "--save_path", tmp_path / "second", "--pretrained", first, "--part"]
    train(*second, "5")
    run = only(tmp_path / "second")
    assert results(run)["transductive"] is False
    train(*second, "1")
    assert results(run)["transductive"] is True
    assert "transductive: yes: --pretrained was trained on held-out" in capsys.readouterr().out
    assert {name: kept["transductive"] for name, (kept, _) in
            result_files.read_subjects(run).items()} == {"sub05": False, "sub01": True}
    # of whom the first one saw, too
    assert runs.load(run / "last.pth")["seen"]["people"] == [
        [2, f"sub{i:02d}"] for i in range(1, 6)]
    said = refused(capsys, *second, "2", "--channels", "hsv")
    assert f"trained on motion as {runs.load(first)['opt']['channels']}, here hsv" in said
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert results(run)["pretrained_sha256"] == runs.load(run / "last.pth")["pretrained_sha256"] \
        == digest
    torch.save(runs.load(first)["model"], first)  # as others publish theirs
    assert "pretrained sha256 differs" in refused(capsys, *second, "2")
    train(*second, "2", "--tag", "published")
    assert results(only(tmp_path / "second", "*published"))["transductive"] is None
    assert runs.load(only(tmp_path / "second", "*published") / "last.pth")["seen"]["people"] is None
    torch.save({"model": runs.load(first), "seen": {"people": 3}}, first)
    assert "its 'seen' cannot be read" in refused(capsys, *second, "2", "--tag", "x")


def test_other_action_units_or_landmarks_do_not_go_on(prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    flags += ["--data_folder", folder, "--epochs", 1, "--save_path", tmp_path / "r", "--part"]
    units = ["--model", "V6", "--au_epochs", 1]
    for more in ([], units):
        train(*flags, "1", *more)
    text = (folder / "clips.csv").read_text()
    (folder / "clips.csv").write_text(text.replace(",L10\n", ",4\n"))
    train(*flags, "2")  # V4 sees none
    assert "units digest differs" in refused(capsys, *flags, "2", *units)
    run = only(tmp_path / "r", "*V6*")
    assert runs.load(run / "last.pth")["units_digest"] == record.read_log(run)[0]["units_digest"]
    marks = landmarks(tmp_path / "marks.csv", prepared)
    mask = ["--mask", "eyes", "--landmarks", marks]
    train(*flags, "1", *mask)
    marks.write_text(marks.read_text().replace("36.0", "37.0"))
    assert "landmarks sha256 differs" in refused(capsys, *flags, "2", *mask)
    marks.unlink()
    assert "marks.csv: no such file" in refused(capsys, *flags, "2", *mask)


def test_last_layers_that_tell_other_classes_or_units_start_anew(tmp_path):
    def network(units=None):
        return mmnet.create_mmnet("V6" if units else "V4", 5, units and len(units), "nrs", 32)
    classes, units = list("abcde"), ["1", "4", "12"]
    for own, state in ((None, {}), (units, {"units": units})):
        path = tmp_path / "m.pth"
        old = network(own)
        torch.save({"model": old.state_dict(), "classes": classes, **state,
                    "opt": {"channels": "nrs", "scale": "map"}}, path)
        opt = argparse.Namespace(pretrained=str(path), channels="nrs", scale="map")
        everything = old.state_dict().keys()
        assert motion.fitting(network(own), opt, classes, own).keys() == everything
        kept = motion.fitting(network(own), opt, classes[::-1], own).keys()
        assert everything - kept == {name for name in everything if name.startswith("fc.")} != set()
        opt.scale = "fixed"
        with pytest.raises(BadInput, match=r"as map, here fixed \(--scale\)"):
            motion.fitting(network(own), opt, classes, own)
        opt.scale = "map"
    kept = motion.fitting(network(units), opt, classes, ["1", "4", "17"]).keys()
    assert everything - kept == {name for name in everything if name.startswith(("fc.", "au."))}


def test_clips_that_nobody_coded_have_no_part_in_the_loss_of_units():
    said = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = torch.tensor([[1., 0, 0], [np.nan] * 3, [0, 1, 1], [np.nan] * 3, [0, 0, 1]])
    loss = motion.unit_loss(said, wanted)
    loss.backward()
    rows = [0, 2, 4]
    assert loss == torch.nn.functional.binary_cross_entropy_with_logits(said[rows], wanted[rows])
    assert not said.grad[[1, 3]].any() and said.grad[rows].all()
    assert motion.unit_loss(said, torch.full((5, 3), np.nan)) == 0


def test_stages_are_options_of_networks_that_have_them(prepared):
    stages = {"au_epochs", "unfreeze_epoch"}  # what is free is not compared, nor listed as changed
    for model, free in (("V4", stages), ("V6", set())):
        opt = train_MMNet.parse_option([
            "--data_folder", str(prepared), "--save_path", "s", "--model", model, "--size", "32",
            "--part", "5"])
        assert opt.free & stages == free
    train_MMNet.set_loader(opt)
    assert flag(opt.changed(seed=1), "subject") == "--part"


def test_without_coded_inner_clips_the_last_epoch_of_the_units_counts(prepared, monkeypatch,
                                                                      capsys):
    data, _ = dataset.read_videos(prepared, 32, False)
    best, network = held_out.Best(data.clips, np.arange(9)), torch.nn.Linear(2, 3)
    job = SimpleNamespace(network=network, targets=np.full((2, 9, 3), np.nan, np.float32))
    monkeypatch.setattr(motion, "predict", lambda job, rows: (
        np.zeros((len(rows), 5)), None, np.zeros((len(rows), 3), np.float32)))
    for epoch in (1, 2, 3):
        torch.nn.init.constant_(network.bias, epoch)
        assert best.follow(job, "units", epoch) == {}
    assert best.state["epoch"] == 3 and best.state["model"]["bias"].tolist() == [3, 3, 3]
    assert capsys.readouterr().out.count("the last epoch of that stage counts") == 1
    assert "inner_uf1" in best.follow(job, "all", 1) and best.state["stage"] == "classes"
    job.targets[:] = 1
    assert best.follow(job, "units", 1)["inner_au_loss"] == pytest.approx(np.log(2))


def test_mirrored_clips_show_their_action_units_on_the_other_side(prepared, monkeypatch):
    data, _ = dataset.read_videos(prepared, 32, True)
    units = [frozenset(one.split()) for one in (
        "L12 4", "R12", "L10 T17", "L12 R12", "4", "R10", "B17 L2", "R2 1", "")]
    opt = train_MMNet.parse_option([
        "--data_folder", str(prepared), "--save_path", "s", "--model", "V6", "--size", "32",
        "--batch_size", "9", "--device", "cpu", "--au_sides"])
    job = train_MMNet.set_job(opt, data, units, np.arange(9), "x", torch.device("cpu"))
    names = ["1", "L2", "R2", "4", "L10", "R10", "L12", "R12", "B17", "T17"]
    mirrored = ["R12 4", "L12", "R10 T17", "L12 R12", "4", "L10", "B17 R2", "L2 1", ""]
    coded, uncoded = job.targets[:, :8], job.targets[:, 8]
    assert coded.tolist() == [
        [[float(name in shown) for name in names] for shown in side]
        for side in (units[:8], [one.split() for one in mirrored[:8]])]
    assert np.isnan(uncoded).all()
    seen, entropy, wanted = [], torch.nn.functional.binary_cross_entropy_with_logits, []
    draw = videos.draw_boxes
    monkeypatch.setattr(videos, "draw_boxes", lambda *args: seen.append(draw(*args)) or seen[-1])
    monkeypatch.setattr(motion.F, "binary_cross_entropy_with_logits",
                        lambda said, shown: wanted.append(shown) or entropy(said, shown))
    motion.train_epoch(opt, job, "units", 1, 1, {}, lambda inside: None)
    (order,) = epochs.batches(9, 9, epochs.generator(opt.seed, 1))
    (_, mirror), = seen
    assert 0 < mirror.sum() < 9
    assert wanted[0].tolist() == [job.targets[int(m), i].tolist() for m, i in zip(mirror, order)
                                  if i != 8]  # which nobody coded


def test_no_part_of_a_batch_is_of_one_clip(prepared, monkeypatch):
    opt = train_MMNet.parse_option([
        "--data_folder", str(prepared), "--save_path", "s", "--model", "V4", "--size", "32",
        "--batch_size", "6", "--accumulate", "3", "--device", "cpu"])
    data, units = dataset.read_videos(prepared, 32, False)
    job = train_MMNet.set_job(opt, data, units, np.arange(9), "x", torch.device("cpu"))
    parts, read = [], motion.batches
    monkeypatch.setattr(motion, "batches", lambda source, some, *rest: (
        parts.extend(map(len, some)) or read(source, some, *rest)))
    motion.train_epoch(opt, job, "all", 1, 1, {}, lambda inside: None)
    assert parts == [2, 2, 2, 3]


def test_a_fifth_of_the_training_subjects_chooses_whoever_is_held_out(prepared):
    data, _ = dataset.read_videos(prepared, 48, False)
    counts = [40, *[6] * 20]
    clips = replace(data.clips, clips=[
        replace(data.clips.clips[i % 9], subject=f"sub{n:02d}", key=f"{n}-{i}")
        for n, count in enumerate(counts, 1) for i in range(count)])
    members = np.arange(40, len(clips))  # the one with most clips is held out
    best = held_out.Best(clips, members)
    assert sorted([*best.inner, *best.rest]) == members.tolist()
    assert len(best.inner) == 24  # four of the twenty others


def landmarks(path, prepared):
    keys = [line.split(",")[2] for line in (prepared / "clips.csv").read_text().splitlines()[1:]]
    header = ["key", *(f"{axis}{i}" for i in range(1, 69) for axis in "xy")]
    angle = np.linspace(0, 2 * np.pi, 68)
    points = np.stack([24 + 12 * np.cos(angle), 24 + 12 * np.sin(angle)], 1).ravel()
    rows = [",".join(header), *(",".join([key, *map(str, points)]) for key in keys)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_parts_of_the_face_are_masked(prepared, flags, tmp_path, capsys):
    keys = [line.split(",")[2] for line in (prepared / "clips.csv").read_text().splitlines()[1:]]
    rows = landmarks(tmp_path / "marks.csv", prepared).read_text().splitlines()
    masks = videos.read_masks(tmp_path / "marks.csv", keys, ["eyes"], 48, 48)
    assert masks.shape == (9, 48, 48) and 0.5 < masks.mean() < 1 and masks[0, 0, 0] == 1
    for part, order in ((5, ["eyes", "jaw"]), (4, ["jaw", "eyes", "jaw"])):  # one run
        train(*flags, "--save_path", tmp_path, "--mask", *order, "--landmarks",
              tmp_path / "marks.csv", "--part", part)
    assert "_eyes_jaw_" in only(tmp_path).name and len(runs.rows(only(tmp_path))) == 3
    (tmp_path / "few.csv").write_text("\n".join(rows[:3]) + "\n")
    assert "no landmarks of 7 clips" in refused(
        capsys, *flags, "--save_path", tmp_path / "r", "--mask", "eyes", "--landmarks",
        tmp_path / "few.csv")
    (tmp_path / "twice.csv").write_text("\n".join([*rows, rows[2]]) + "\n")
    assert f"twice.csv:{len(rows) + 1}: a second row of {keys[1]}" in refused(
        capsys, *flags, "--save_path", tmp_path / "r", "--mask", "eyes", "--landmarks",
        tmp_path / "twice.csv")
    line = ",".join([keys[3], *(str(i // 2) for i in range(136))])
    (tmp_path / "line.csv").write_text("\n".join([*rows[:4], line, *rows[5:]]) + "\n")
    assert f"line.csv: the landmarks of {keys[3]}'s eyes lie on one line" in refused(
        capsys, *flags, "--save_path", tmp_path / "r", "--mask", "eyes", "--landmarks",
        tmp_path / "line.csv")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("more, expected", [
    (["--size", 40], "multiple of 16"), (["--size", 64], "holds frames of 48 pixels"),
    (["--part", "9"], "no subject 9"), (["--part", "hardest"], "no subject 16"),
    (["--part", "nobody"], "--part nobody: no such subject"),
    (["--part", ","], "names nobody"), (["--batch_size", 1], "batch norm takes two"),
    (["--input", "difference", "--channels", "n"], "goes with --input flow"),
    (["--mask", "eyes"], "go together"), (["--model", "V6", "--au_loss", 1], "stage of its own"),
    (["--seeds", 1], "--seeds: give two"),
    (["--seeds", 0, 1, "--resume", "x.pth"], "with --seeds give auto"),
    (["--num_workers", 1], "unrecognized"),
    (["--model", "V3R", "--scale", "column"], "--scale column: goes with channels s"),
    (["--channels", "hsv", "--scale", "column"], "goes with channels s; the motion is hsv"),
    (["--model", "V2", "--scale", "fixed"], "--scale fixed: goes with channels n"),
    (["--input", "difference", "--scale", "fixed"], "the motion is difference"),
    (["--channels", "rs", "--scale", "fixed"], "goes with channels n; the motion is rs"),
    (["--au_epochs", 70], "--au_epochs goes with --model V6"),
    (["--unfreeze_epoch", 1], "--unfreeze_epoch goes with --model V6"),
    (["--au_sides"], "--au_sides goes with --model V6"),
    (["--model", "V6", "--unfreeze_epoch", 2], "not before the end of --epochs 2"),
    (["--model", "V6c", "--unfreeze_epoch", 3], "nothing would be unfrozen"),
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
    def below(folder):
        text = (folder / "clips.csv").read_text()
        (folder / "clips.csv").write_text(text.replace(",1,repression", ",-1,repression"))
    assert "label -1 of sub" in copy("n", below)
    assert "flow.npy: missing" in copy("a", lambda f: (f / "flow.npy").unlink())
    assert "no clip of class repression" in copy("b", without_class)
    for name, start in (("a2", b""), ("a3", b"PK\3\4")):
        assert "flow.npy: missing or not whole" in copy(
            name, lambda f, start=start: (f / "flow.npy").write_bytes(start))
    assert "not the 9 clips" in copy("c", lambda f: (f / "clips.csv").write_text(
        "\n".join((f / "clips.csv").read_text().splitlines()[:-1]) + "\n"))
    assert "cannot be read" in copy("d", lambda f: (f / "flow.json").write_text("{"))

    def array(name, change):
        return lambda f: np.save(f / name, change(np.load(f / name)))

    def settings(**values):
        def change(folder):
            info = json.loads((folder / "flow.json").read_text())
            (folder / "flow.json").write_text(json.dumps(info | values))
        return change
    installed = flow.cv2.__version__
    assert f"its flow is OpenCV 0.1's, installed is {installed}; run prepare.py casme2 again" in \
        copy("e", settings(flow={"opencv": "0.1"}))
    assert "flow.json: cannot be read" in copy("f", settings(flow=[]))
    assert "frames.npy: uint8 (9, 5, 3, 48, 48), not the uint8 (9, 5, 3, 64, 64)" in copy(
        "g", settings(size=64))
    assert "flow.npy: float16 (8, 4," in copy("h", array("flow.npy", lambda a: a[:-1]))
    assert "jitter.npy: float32" in copy("i", array("jitter.npy", lambda a: a.astype("f4")))
    assert "index.npy: int32 (9, 2, 3)" in copy("j", array("index.npy", lambda a: a[:, :2, :3]))
    assert "index.npy: does not belong" in copy("k", array("jitter.npy", lambda a: a[:1]))
    assert "index.npy: does not belong" in copy("l", array("index.npy", lambda a: a[::-1]))
    assert "flow.npy: missing or not whole" in copy("m", lambda f: (f / "flow.npy").write_bytes(
        (f / "flow.npy").read_bytes() + b"0"))
    assert not (tmp_path / "r").exists()


def test_without_opencv_its_version_is_not_asked(prepared, tmp_path, monkeypatch):
    folder = shutil.copytree(prepared, tmp_path / "set")
    content = json.loads((folder / "flow.json").read_text())
    content["flow"]["opencv"] = "0.1"
    (folder / "flow.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"OpenCV 0\.1"):
        videos.read_videos(folder, 48)
    monkeypatch.setattr(flow, "cv2", None)
    assert len(videos.read_videos(folder, 48).index) == 9


def test_a_set_without_the_apex_among_its_frames(prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    content = json.loads((folder / "flow.json").read_text()) | {"middle": "published"}
    (folder / "flow.json").write_text(json.dumps(content))
    assert "--model mmnet sees the apex, which is not among" in refused(
        capsys, *flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--model", "mmnet")
    data, _ = dataset.read_videos(folder, 48, False)
    (panels,) = pictures.motion_panels(data.clips, data.images, [0], [[]])
    assert [panel.title for panel in panels] == ["onset", "flow to the middle"]


def test_both_systems_are_compared_on_the_same_clips(prepared, flags, tmp_path, capsys):
    """Clips prepared for one, and from its onset_apex.csv for the other, whose class ids differ."""
    script("prepare").main(["casme3", "--raw", prepared.parent, "--clips", prepared /
                            "onset_apex.csv", "--data_folder", tmp_path / "images", "--crop",
                            "none", "--size", 64, "--classes", 7, "--num_workers", 0])
    probe("--data_folder", tmp_path / "images", "--dataset", "casme2", "--view", "RGB_gray",
          "--model_path", "random", "--model", "resnet18v1", "--size", 32, "--protocol", "loso",
          "--cache", "off", "--save_path", tmp_path / "probes", "--device", "cpu")
    train(*flags, "--epochs", 1, "--save_path", tmp_path / "videos")
    places = [only(tmp_path / "videos"), only(tmp_path / "probes", "probe_*")]
    ours, theirs = (results(place) for place in places)
    assert theirs["classes"] == sorted(ours["classes"]) != ours["classes"]
    capsys.readouterr()
    script("compare_results").main([str(place / "results.json") for place in places])
    lines = [line for line in capsys.readouterr().out.splitlines() if "9 / 5" in line]
    assert len(lines) == 4 and "1: mmnet, V4, loso" in lines[2] and "2: probe" in lines[3]
    for line, content in zip(lines[2:], (ours, theirs)):
        for name in ("uf1", "uar", "accuracy"):
            assert f"| {content[name]:.3f} [" in line


def test_a_set_without_action_units_is_refused_for_a_network_that_learns_them(
        prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    lines = (folder / "clips.csv").read_text().splitlines()
    (folder / "clips.csv").write_text("\n".join(
        [lines[0], *(line.rpartition(",")[0] + "," for line in lines[1:])]) + "\n")
    assert "clips.csv: no training clip names an action unit" in refused(
        capsys, *flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--model",
        "V6", "--part", 5)
    assert not (tmp_path / "r").exists()


def test_unknown_action_units_are_named(prepared, flags, tmp_path, capsys):
    folder = shutil.copytree(prepared, tmp_path / "set")
    text = (folder / "clips.csv").read_text().replace(",L10\n", ",?\n")
    (folder / "clips.csv").write_text(text)
    train(*flags, "--data_folder", folder, "--save_path", tmp_path / "r", "--part", 5)
    assert "action unit '?' of 1 clips (sub02-EP08_04-5 the first) is none" in \
        capsys.readouterr().out
