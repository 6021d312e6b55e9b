"""Every script from end to end on a handful of drawn images, and what it leaves on the disk."""
import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_set, finetune, pretrain, probe, published, script
from runs import curves, differing, load, only, rows, same_predictions, states_differ

import dataset
from evaluation import encoders, result_files
from images import cache as image_cache
from images import transforms
from images.lists import write_lists
from models import create_classifier, create_model
from models.classifier import Classifier
from training import checkpoint, devices, epochs, record, schedules, supervised

pytestmark = pytest.mark.usefixtures("small_crops")
RUN = "memory_softmax_4096_resnet18v1_lr_0.003_decay_0.0001_bsz_8_view_RGB_D_seed_0"
FIGURES = {"uf1", "uar", "accuracy", "per_class_f1", "per_class_recall", "confusion"}


# ---------------------------------------------------------------- pre-training

def test_a_pretrained_checkpoint_holds_plain_types_and_what_was_seen(pretrained):
    assert pretrained.parent.name == RUN
    state = load(pretrained)
    assert {"opt", "epoch", "step", "model", "contrast", "optimizer", "scaler", "normalization",
            "encoding", "seen"} <= state.keys()
    assert (state["epoch"], state["step"]) == (1, 2)
    assert isinstance(state["opt"], dict) and state["opt"]["nce_k"] == 4096
    # one of the twelve clips is blank
    assert state["seen"] == {"people": [[0, f"s{i}"] for i in range(1, 5)], "clips": 11}
    assert state["contrast"]["memory_rgb"].shape == (11, 128)
    assert state["normalization"]["mean"] == [128 / 255] * 4
    assert (pretrained.parent / "ckpt_epoch_1.pth").exists()


@pytest.mark.parametrize("resume, loss", [("auto", "--softmax"), ("FILE", "--no-softmax")])
def test_one_epoch_resumed_for_a_second_equals_two_bit_for_bit(drawn, quick, tmp_path, resume,
                                                               loss):
    flags = ["--data_folder", drawn, *quick, "--save_freq", 1, loss, "--lr_decay_epochs", 1]
    pretrain(*flags, "--model_path", tmp_path / "whole", "--epochs", 2)
    pretrain(*flags, "--model_path", tmp_path / "part")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    if resume == "FILE":
        resume = tmp_path / "kept.pth"
        shutil.move(part / "ckpt_epoch_1.pth", resume)
    first = load(part / "last.pth")
    pretrain(*flags, "--model_path", tmp_path / "part", "--epochs", 2, "--resume", resume)
    assert states_differ(whole / "last.pth", part / "last.pth") == []
    moved = differing(first["model"], load(part / "last.pth")["model"])
    assert any("rgb_to_d" in name for name in moved) and any("d_to_rgb" in name for name in moved)
    logs = [record.read_log(run) for run in (whole, part)]
    for log in logs:
        assert [line.get("epoch") for line in log] == [None, 1, 2]
        assert [line["learning_rate"] for line in log[1:]] == pytest.approx([0.003, 0.0003])
        for line in log[1:]:
            del line["pairs_per_second"]
    assert logs[0][1:] == logs[1][1:]


def test_resume_auto_starts_fresh_where_there_is_nothing(drawn, quick, pretrained, tmp_path):
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path, "--resume", "auto")
    assert states_differ(only(tmp_path) / "last.pth", pretrained) == []


def test_shuffled_depth_lists_change_no_bit_of_the_result(fresh, quick, pretrained, tmp_path):
    rng = np.random.default_rng(0)
    for path in fresh.glob("v_depth/*.txt"):
        path.write_text("".join(rng.permutation(path.read_text().splitlines(True))))
    pretrain("--data_folder", fresh, *quick, "--model_path", tmp_path / "runs")
    assert states_differ(only(tmp_path / "runs") / "last.pth", pretrained) == []


@pytest.mark.parametrize("given", ["memory", "disk"])
def test_images_that_fit_nowhere_are_decoded_batch_by_batch_to_the_same_end(
        drawn, quick, pretrained, tmp_path, monkeypatch, capsys, given):
    cache = "off" if given == "memory" else tmp_path / "cache"
    monkeypatch.setattr(image_cache, "_free_memory", lambda: 1e6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    pretrain("--data_folder", drawn, *quick, "--cache", cache, "--model_path", tmp_path / "runs")
    assert "decoded for every batch anew" in capsys.readouterr().out
    assert given == "memory" or not list(cache.iterdir())
    streamed = load(only(tmp_path / "runs") / "last.pth")
    for name in ("model", "contrast", "normalization"):
        assert differing(load(pretrained)[name], streamed[name]) == []


def test_another_seed_gives_another_run(drawn, quick, pretrained, tmp_path):
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path, "--seed", 1)
    assert "/model/rgb_to_d.fc.weight" in states_differ(only(tmp_path) / "last.pth", pretrained)


@pytest.fixture(scope="module")
def strict(small_crops, drawn, quick, tmp_path_factory):
    """The folder of `--subject each`, with one run per subject."""
    folder = tmp_path_factory.mktemp("strict")
    pretrain("--data_folder", drawn, *quick, "--model_path", folder, "--subject", "each")
    return folder


def test_subject_each_makes_one_run_per_subject_without_it(strict, pretrained):
    assert {p.parent.name for p in strict.glob("*/last.pth")} \
        == {f"{RUN}_without_s{i}" for i in range(1, 5)}
    for i in range(1, 5):
        state, left = load(strict / f"{RUN}_without_s{i}" / "last.pth"), 9 if i == 2 else 8
        assert state["seen"]["people"] == [[0, f"s{j}"] for j in range(1, 5) if j != i]
        assert len(state["contrast"]["memory_rgb"]) == state["seen"]["clips"] == left
        assert state["normalization"] != load(pretrained)["normalization"]


def test_subject_each_makes_none_for_who_is_left_out_of_all(drawn):
    clips = dataset.read_clips(drawn)
    opt = SimpleNamespace(subject="each", fold=None, without=["s2"], pool="labelled")
    assert dataset.left_out(opt, clips) == [
        (f"s{i}", {(0, f"s{i}"), (0, "s2")}) for i in (1, 3, 4)]


def test_a_run_without_its_last_checkpoint_is_not_trained_over(drawn, quick, tmp_path, capsys):
    flags = ["--data_folder", drawn, *quick, "--model_path", tmp_path, "--resume", "auto"]
    pretrain(*flags, "--epochs", 2, "--save_freq", 1)
    run = only(tmp_path)
    (run / "last.pth").unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for more, expected in ((["--crop_low", 0.5], "--crop_low 1.0 there, 0.5 here"),
                           ([], r"holds ckpt_epoch_\d\.pth, and no last.pth .* --resume .*ckpt_e")):
        with pytest.raises(SystemExit):
            pretrain(*flags, "--epochs", 2, *more)
        assert re.search(expected, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_subject_left_out_leaves_no_trace(fresh, quick, strict, tmp_path):
    """Garbage in the images of the subject that is left out changes no bit."""
    clips = dataset.read_clips(fresh)
    for clip in clips.clips:
        if clip.subject == "s3":
            shutil.copyfile(fresh / clips.clips[0].paths[0], fresh / clip.paths[0])
    pretrain("--data_folder", fresh, *quick, "--model_path", tmp_path / "runs", "--subject", "s3")
    name = f"{RUN}_without_s3"
    actual = states_differ(tmp_path / "runs" / name / "last.pth", strict / name / "last.pth")
    assert actual == ["/data_digest"]


def test_fold_leaves_a_group_of_subjects_out(drawn, quick, tmp_path):
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path, "--fold", "2/4")
    names, fold_of = dataset.subject_groups(dataset.read_clips(drawn))
    out = {c.person for c, f in zip(dataset.read_clips(drawn).clips, fold_of) if f == 1}
    run = only(tmp_path)
    assert run.name == f"{RUN}_without_{names[1]}"
    seen = {tuple(p) for p in load(run / "last.pth")["seen"]["people"]}
    assert len(out) == 1 and seen == {(0, f"s{i}") for i in range(1, 5)} - out


@pytest.mark.parametrize("pool, clips", [("labelled", 8), ("unlabelled", 5), ("both", 13)])
def test_persons_of_without_are_in_no_run(drawn, quick, strict, tmp_path, pool, clips):
    """Neither of the labelled clips nor of the pairs, of which the first and fifth are s1's, the
    third is s3's."""
    pairs = ["--pairs", drawn / "pairs.tsv"] * (pool != "labelled")
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path / "one", "--pool", pool,
             *pairs, "--without", "s3")
    run = only(tmp_path / "one")
    assert run.name == f"{RUN}_without_s3"
    state = load(run / "last.pth")
    assert state["seen"] == {"people": [[0, "s1"], [0, "s2"], [0, "s4"]], "clips": clips}
    assert len(state["contrast"]["memory_rgb"]) == clips
    if pool == "labelled":  # as if it were left out by --subject
        assert states_differ(run / "last.pth", strict / run.name / "last.pth") == []


def test_persons_of_without_are_left_out_besides_those_of_each_run(drawn, quick, tmp_path):
    flags = ["--data_folder", drawn, *quick, "--without", "s.3", "s4"]
    pretrain(*flags, "--model_path", tmp_path / "subject", "--subject", "s1", "--pairs",
             drawn / "pairs.tsv", "--pool", "both")
    run = only(tmp_path / "subject")
    assert run.name.startswith(f"{RUN}_without_s1_without_s3_and_1_more_")
    # two clips of s2, whose first one is blank, and two pairs
    assert load(run / "last.pth")["seen"] == {"people": [[0, "s2"]], "clips": 4}
    pretrain(*flags[:-1], "--model_path", tmp_path / "fold", "--fold", "1/4")
    (seen,) = [load(path)["seen"]["people"] for path in (tmp_path / "fold").glob("*/last.pth")]
    clips = dataset.read_clips(drawn)
    folds = dataset.subject_groups(clips)  # of everybody: leaving one out moves nobody else
    out = {"s3", *(clip.subject for clip, fold in zip(clips.clips, folds.of) if fold == 0)}
    assert [name for _, name in seen] == [f"s{i}" for i in range(1, 5) if f"s{i}" not in out]


@pytest.mark.parametrize("flags, clips, people", [
    (["--pool", "unlabelled"], 6, 4),
    (["--pool", "unlabelled", "--min_intensity", 3], 3, 3),
    (["--pool", "both", "--min_intensity", 3], 14, 4),
    (["--pool", "both", "--subject", "s1"], 12, 3),  # 3 labelled and 2 unlabelled of s1 are out
    (["--pool", "unlabelled", "--fold", "1/4"], None, 3)])
def test_pools_of_labelled_and_unlabelled_pairs(drawn, quick, tmp_path, flags, clips, people):
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path,
             "--pairs", drawn / "pairs.tsv", *flags)
    state = load(only(tmp_path) / "last.pth")
    assert clips in (state["seen"]["clips"], None)
    assert len(state["seen"]["people"]) == people
    assert len(state["contrast"]["memory_depth"]) == state["seen"]["clips"]


@pytest.mark.parametrize("view, second, channels", [
    ("RGB_gray", "depth", 1), ("RGB_gray", "gray", 1), ("RGB_flow", "flow", 3)])
def test_every_view_from_pretraining_to_fine_tuning(quick, tmp_path, view, second, channels):
    data, out = tmp_path / "data", tmp_path / "out"
    draw_set(data, 2, 3, second=second, channels=channels)
    flags = ["--data_folder", data, *quick, "--view", view]
    pretrain(*flags, "--model_path", out)
    path = only(out) / "last.pth"
    state = load(path)
    assert state["channels"] == [3, channels]
    assert state["model"]["d_to_rgb.conv1.weight"].shape[1] == channels
    probe(*flags, "--model_path", path, "--save_path", out / "probe")
    assert len(rows(only(out / "probe"))) == 6
    if channels == 3:
        finetune(*flags, "--model_path", path, "--save_path", out / "tune", "--subject", "s1")
        assert len(rows(only(out / "tune"))) == 3


def test_amp_changes_the_features_a_little_and_keeps_banks_in_float32(drawn, quick, pretrained,
                                                                      tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: True)
    flags = ["--data_folder", drawn, *quick, "--amp"]
    pretrain(*flags, "--model_path", tmp_path)
    run = only(tmp_path)
    assert run.name == RUN.replace("_seed", "_amp_seed")
    state, plain = load(run / "last.pth"), load(pretrained)
    assert state["contrast"]["memory_rgb"].dtype == torch.float32
    change = (state["contrast"]["memory_rgb"] - plain["contrast"]["memory_rgb"]).abs().mean()
    assert 0 < change < 0.03  # a feature is about 0.09
    probe(*flags, "--model_path", pretrained, "--save_path", tmp_path / "probe")
    finetune(*flags, "--model_path", pretrained, "--save_path", tmp_path / "t", "--subject", "s1")
    for folder in (tmp_path / "probe", tmp_path / "t"):
        assert all(math.isfinite(line["train_loss"]) for line in record.read_log(only(folder))[1:])


def test_alexnet_from_pretraining_to_fine_tuning(drawn, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "CROP", 224)
    flags = ["--data_folder", drawn, "--cache", cache, "--batch_size", 8, "--epochs", 1]
    pretrain(*flags, "--model_path", tmp_path, "--crop_low", 0.2)
    run = only(tmp_path)
    assert "_alexnet_" in run.name
    probe(*flags, "--model_path", run / "last.pth", "--save_path", tmp_path / "probe")
    finetune(*flags, "--model_path", run / "last.pth", "--save_path", tmp_path / "tune",
             "--subject", "s1", "--freeze_encoder", "--layer", 2)
    assert "_layer_5_" in only(tmp_path / "probe").name
    assert "_layer_2_" in only(tmp_path / "tune").name
    assert len(rows(only(tmp_path / "probe"))) == 12


def test_the_steps_of_the_published_recipe_are_announced(capsys):
    opt = script("pre-train_DVSCL").parse_option(
        [str(part) for part in published("--data_folder", "d", "--model_path", "m")])
    assert epochs.announce(opt, 943) == 4
    printed = capsys.readouterr().out
    assert "960 in all" in printed and "160 (step 640), 200 (step 800)" in printed
    assert epochs.announce(opt, 513) == 2
    assert "dropped" in capsys.readouterr().out


# ---------------------------------------------------------------- linear probing

@pytest.fixture(scope="module")
def probed(small_crops, drawn, quick, pretrained, tmp_path_factory):
    """The run folder of leave-one-subject-out probing by SGD."""
    folder = tmp_path_factory.mktemp("probed")
    probe("--data_folder", drawn, *quick, "--epochs", 4, "--model_path", pretrained,
          "--save_path", folder, "--protocol", "loso")
    return only(folder)


@pytest.fixture(scope="module")
def plain(drawn, cache, pretrained):
    """Flags of leave-one-subject-out probing as it is by default, with solved heads."""
    return ["--data_folder", drawn, "--cache", cache, "--model", "resnet18v1", "--model_path",
            pretrained, "--protocol", "loso"]


@pytest.fixture(scope="module")
def solved(small_crops, plain, tmp_path_factory):
    """The run folder of `plain`."""
    folder = tmp_path_factory.mktemp("solved")
    probe(*plain, "--save_path", folder)
    return only(folder)


@pytest.mark.parametrize("run", ["probed", "solved"])
def test_every_clip_is_predicted_exactly_once(run, drawn, request):
    clips = dataset.read_clips(drawn)
    actual = rows(request.getfixturevalue(run))
    assert [(r["database"], r["subject"], r["key"], int(r["label"])) for r in actual] \
        == [("casme3", c.subject, c.key, c.label) for c in clips.clips]
    for r in actual:
        p = [float(r["p_0"]), float(r["p_1"])]
        assert sum(p) == pytest.approx(1, abs=1e-5)
        assert int(r["prediction"]) == int(np.argmax(p))


def test_results_hold_what_the_design_promises(probed, pretrained):
    actual = json.loads((probed / "results.json").read_text())
    assert actual["protocol"] == "loso" and actual["transductive"] is True
    assert (actual["n"], actual["n_label"], actual["n_subjects"]) == (12, 2, 4)
    assert actual.keys() >= {*FIGURES, "opt", "versions", "command", "data_digest", "list_digest",
                            "checkpoints"}
    assert actual["opt"]["protocol"] == "loso" and actual["opt"]["epochs"] == 4
    assert actual["ci95"].keys() == {"uf1", "uar", "accuracy"}
    assert all(low <= actual[name] <= high for name, (low, high) in actual["ci95"].items())
    assert actual["baselines"].keys() == {"majority", "stratified_random"}
    assert actual["per_database"]["casme3"]["n"] == 12
    assert actual["per_database"]["casme3"].keys() >= FIGURES
    assert actual["without_blank_clips"]["n"] == 11
    assert list(actual["checkpoints"]) == [str(pretrained)]
    labels, predictions = ([int(r[k]) for r in rows(probed)] for k in ("label", "prediction"))
    assert actual["accuracy"] == pytest.approx(np.mean(np.equal(labels, predictions)))
    assert (probed / "confusion.png").exists()


def test_merged_subjects_equal_one_run_over_all(drawn, quick, pretrained, probed, tmp_path):
    flags = ["--data_folder", drawn, *quick, "--epochs", 4, "--model_path", pretrained,
             "--save_path", tmp_path, "--protocol", "loso", "--subject"]
    probe(*flags, "s3", "s1")
    run = only(tmp_path)
    assert {r["subject"] for r in rows(run)} == {"s1", "s3"}
    assert json.loads((run / "results.json").read_text())["n_subjects"] == 2
    probe(*flags, "s2", "s4", "s1")
    assert same_predictions(run, probed)
    actual = json.loads((run / "results.json").read_text())
    assert actual["n_subjects"] == 4
    assert [made["command"].rpartition("--subject ")[2] for made in actual["made_by"]] \
        == ["s3 s1", "s2 s4 s1"]
    assert actual["made_by"][1] == {name: actual[name] for name in ("command", "versions")}


def test_merged_subjects_with_solved_heads_equal_one_run_over_all(plain, solved, tmp_path):
    for names in (["s3", "s1"], ["s2", "s4", "s1"]):
        probe(*plain, "--save_path", tmp_path, "--subject", *names)
    run = only(tmp_path)
    assert same_predictions(run, solved)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (run, solved))
    assert ours["choices"] == theirs["choices"] and ours["n_subjects"] == 4
    assert ours["shortcuts"]["subject"] == theirs["shortcuts"]["subject"]


def test_ten_folds_and_the_random_encoder(drawn, quick, tmp_path):
    probe("--data_folder", drawn, *quick, "--model_path", "random", "--save_path", tmp_path)
    run = only(tmp_path)
    actual = json.loads((run / "results.json").read_text())
    assert run.name.startswith("probe_random_resnet18v1")
    assert actual["protocol"] == "10fold" and actual["transductive"] is False
    assert len(rows(run)) == 12


def test_shuffled_depth_lists_give_the_same_predictions(fresh, quick, pretrained, probed, tmp_path):
    for path in fresh.glob("v_depth/*.txt"):
        path.write_text("".join(reversed(path.read_text().splitlines(True))))
    probe("--data_folder", fresh, *quick, "--epochs", 4, "--model_path", pretrained,
          "--save_path", tmp_path / "out", "--protocol", "loso")
    assert (only(tmp_path / "out") / "predictions.csv").read_bytes() \
        == (probed / "predictions.csv").read_bytes()


@pytest.mark.parametrize("encoder", ["rgb", "depth"])
def test_one_view_alone_does_not_see_the_other(fresh, quick, pretrained, tmp_path, encoder):
    flags = [*quick, "--model_path", pretrained, "--encoder", encoder, "--data_folder", fresh]
    probe(*flags, "--save_path", tmp_path / "before")
    clips = dataset.read_clips(fresh)
    for clip in clips.clips[:6]:
        other = 1 if encoder == "rgb" else 0
        shutil.copyfile(fresh / clips.clips[-1].paths[other], fresh / clip.paths[other])
    probe(*flags, "--save_path", tmp_path / "after")
    assert same_predictions(only(tmp_path / "before"), only(tmp_path / "after"))


@pytest.mark.parametrize("run, flags", [
    (probe, ["--protocol", "loso"]), (probe, ["--protocol", "loso", "--epochs", 3]),
    (probe, ["--select", "inner", "--epochs", 2]), (finetune, ["--freeze_encoder"]),
    (finetune, ["--subject", "s1", "s4"])],
    ids=["solved", "sgd", "inner", "frozen", "fine-tuned"])
def test_persons_of_without_neither_train_nor_are_predicted(drawn, cache, pretrained, tmp_path, run,
                                                            flags):
    """The others' predictions are those of lists that lack them."""
    flags = ["--cache", cache, "--model", "resnet18v1", "--model_path", pretrained, *flags,
             *(["--batch_size", 8, "--epochs", 1] if run is finetune else [])]
    run("--data_folder", drawn, *flags, "--save_path", tmp_path / "whole")
    run("--data_folder", drawn, *flags, "--save_path", tmp_path / "part", "--without", "s.2", "S2")
    write_lists(tmp_path / "lists",
                [clip for clip in dataset.read_clips(drawn).clips if clip.subject != "s2"])
    shutil.copy(drawn / "encoding.json", tmp_path / "lists")
    run("--data_folder", drawn, "--list_folder", tmp_path / "lists", *flags, "--save_path",
        tmp_path / "lacking")
    whole, part, lacking = (only(tmp_path / name) for name in ("whole", "part", "lacking"))
    assert part.name == lacking.name + "_without_s2"
    held_out = ["s1", "s4"] if "--subject" in flags else ["s1", "s3", "s4"]
    assert sorted({row["subject"] for row in rows(part)}) == held_out
    assert (part / "predictions.csv").read_bytes() == (lacking / "predictions.csv").read_bytes()
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (part, lacking))
    for name in ("n", "n_subjects", "uf1", "shortcuts", "data_digest", "list_digest"):
        assert mine[name] == theirs[name]
    # and they would have mattered
    kept = {row["key"]: row["p_0"] for row in rows(whole)}
    assert any(kept[row["key"]] != row["p_0"] for row in rows(part))
    if flags[-1] == "s4":
        state = load(part / "last.pth")
        assert differing(state["classifier"], load(lacking / "last.pth")["classifier"]) == []
        assert state["seen"]["clips"] == 6 and state["unit"] == "s4"


def transductive(save_path):
    return json.loads((only(save_path) / "results.json").read_text())["transductive"]


@pytest.mark.parametrize("run", [probe, finetune])
def test_strict_checkpoints_are_not_transductive(drawn, quick, strict, tmp_path, run):
    flags = ["--data_folder", drawn, *quick, "--save_path", tmp_path, "--subject", "s1", "s2",
             "--model_path", strict / f"{RUN}_without_{{subject}}" / "last.pth"]
    run(*flags, *(["--protocol", "loso"] if run is probe else ["--freeze_encoder"]))
    assert transductive(tmp_path) is False
    actual = json.loads((only(tmp_path) / "results.json").read_text())["checkpoints"]
    assert sorted(actual) == [str(strict / f"{RUN}_without_{s}" / "last.pth") for s in ("s1", "s2")]


def test_every_checkpoint_is_read_before_anybody_is_trained(drawn, quick, strict, tmp_path, capsys):
    for i in range(1, 5):
        content = (strict / f"{RUN}_without_s{i}" / "last.pth").read_bytes()
        (tmp_path / f"s{i}.pth").write_bytes(content[:len(content) // (1 + (i == 3))])
    with pytest.raises(SystemExit) as end:
        finetune("--data_folder", drawn, *quick, "--save_path", tmp_path / "out", "--model_path",
                 tmp_path / "{subject}.pth")
    assert end.value.code == 2 and f"{tmp_path / 's3.pth'}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_per_fold_are_not_transductive_unless_mixed_up(drawn, quick, strict, tmp_path):
    clips = dataset.read_clips(drawn)
    names, fold_of = dataset.subject_groups(clips)
    for shift in (0, 1):
        folder = tmp_path / f"shift{shift}"
        folder.mkdir()
        for i, name in enumerate(names):
            held = clips.clips[np.flatnonzero(fold_of == (i + shift) % 4)[0]].subject
            shutil.copyfile(strict / f"{RUN}_without_{held}" / "last.pth", folder / f"{name}.pth")
        probe("--data_folder", drawn, *quick, "--save_path", folder / "out",
              "--model_path", folder / "{fold}.pth")
        assert len(rows(only(folder / "out"))) == 12
        assert transductive(folder / "out") is bool(shift)


@pytest.mark.parametrize("other", [
    {"epoch": 9}, {"within": {"step": 1}}, {"opt": {"crop_low": 0.5}}], ids=lambda v: next(iter(v)))
def test_encoders_of_one_evaluation_are_trained_alike(drawn, quick, strict, tmp_path, capsys,
                                                      other):
    """In one call, and where calls add subjects to one run."""
    states = {i: load(strict / f"{RUN}_without_s{i}" / "last.pth") for i in (1, 2)}
    changed = {k: states[2][k] | v if k == "opt" else v for k, v in other.items()}
    for folder, second in (("mixed", states[2] | changed), ("alike", states[2])):
        for i, state in ((1, states[1]), (2, second)):
            (tmp_path / folder / f"s{i}").mkdir(parents=True)
            torch.save(state, tmp_path / folder / f"s{i}" / "last.pth")
    flags = ["--data_folder", drawn, *quick, "--protocol", "loso", "--save_path", tmp_path / "out"]

    def refused(*more):
        with pytest.raises(SystemExit):
            probe(*flags, *more)
        return capsys.readouterr().err
    said = refused("--model_path", tmp_path / "mixed" / "{subject}" / "last.pth", "--subject", "s1",
                   "s2")
    assert "must come from one pre-training" in said and not (tmp_path / "out").exists()
    probe(*flags, "--model_path", tmp_path / "alike" / "{subject}" / "last.pth", "--subject", "s1")
    (tmp_path / "alike" / "s2" / "last.pth").unlink()
    shutil.move(tmp_path / "mixed" / "s2" / "last.pth", tmp_path / "alike" / "s2")
    said = refused("--model_path", tmp_path / "alike" / "{subject}" / "last.pth", "--subject", "s2")
    assert "s1 comes from another pre-training" in said


def test_an_encoder_that_changes_within_a_run_ends_it(drawn, quick, pretrained, tmp_path, capsys,
                                                      monkeypatch):
    path, keep = shutil.copyfile(pretrained, tmp_path / "last.pth"), record.Run.finished

    def changed(run, name):
        keep(run, name)
        torch.save(load(path) | {"epoch": 9}, path)
    monkeypatch.setattr(record.Run, "finished", changed)
    with pytest.raises(SystemExit):
        finetune("--data_folder", drawn, *quick, "--epochs", 1, "--model_path", path, "--subject",
                 "s1", "s2", "--save_path", tmp_path / "out")
    assert "last.pth: has changed since this run began" in capsys.readouterr().err
    assert [one.stem for one in tmp_path.glob("out/*/subjects/*")] == ["s1"]


def test_folds_that_pretraining_cut_otherwise_have_a_training_for_each_checkpoint(
        strangers, quick, pretrained, tmp_path):
    """Without s3 the folds of the others are not those of all: one takes two checkpoints."""
    everyone = dataset.read_clips(strangers)
    left = everyone.subset([clip.subject != "s3" for clip in everyone.clips])
    source = {clip.subject: fold for clip, fold in zip(everyone.clips, dataset.subject_groups(
        everyone, 3).of)}
    folds = {clip.subject: fold for clip, fold in zip(left.clips, dataset.subject_groups(
        left, 3).of)}
    one, other = next((a, b) for a in folds for b in folds
                      if folds[a] == folds[b] and source[a] != source[b])
    state = torch.load(pretrained, weights_only=True)
    for i in range(3):
        torch.save(state | {"number": i}, tmp_path / f"fold{i + 1}of3.pth")
    flags = ["--data_folder", strangers, *quick, "--model_path", tmp_path / "{fold}.pth",
             "--save_path", tmp_path / "r", "--protocol", "10fold", "--without", "s3", "--epochs",
             1]
    subject_groups = dataset.subject_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "subject_groups", lambda clips, _=None, **more: subject_groups(
            clips, 3, **more))
        for who in ([one], [one, other]):
            finetune(*flags, "--subject", *who, "--resume", "auto")
        run = only(tmp_path / "r")
        for subject in (one, other):
            kept, _ = result_files.read_subject(run / "subjects" / f"{subject}.json")
            assert kept["checkpoint"].endswith(f"fold{source[subject] + 1}of3.pth")
        trained = [line["subject"] for line in record.read_log(run)[1:]]
        assert len(trained) == 2 and all("of3_" in name for name in trained)
        torch.save(state | {"number": 9}, tmp_path / f"fold{source[one] + 1}of3.pth")
        with pytest.raises(SystemExit):  # one fold of two versions of its encoder
            finetune(*flags, "--subject", *(s for s in folds if source[s] == source[one]
                                            and s != one), "--resume", "auto")


def test_a_start_that_saw_labels_is_told(drawn, quick, pretrained, tmp_path, capsys):
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--subject", "all", "--epochs", 1)
    start = only(tmp_path) / "last.pth"
    probe("--data_folder", drawn, *quick, "--model_path", start, "--save_path", tmp_path / "p",
          "--epochs", 1)
    assert "the encoder saw held-out subjects, with labels" in capsys.readouterr().out
    assert json.loads((only(tmp_path / "p") / "results.json").read_text())["start_labelled"] is True


def test_an_old_checkpoint_is_probed_and_transductive_is_unknown(drawn, quick, pretrained,
                                                                 tmp_path):
    state = load(pretrained)
    old = {"opt": argparse.Namespace(model="resnets18", nce_k=4096), "epoch": 240, "model": {
        "encoder.module." + name: value for name, value in state["model"].items()}}
    torch.save(old, tmp_path / "old.pth")
    loaded = checkpoint.load(tmp_path / "old.pth")
    assert loaded["opt"] == {"model": "resnets18", "nce_k": 4096}
    assert differing(loaded["model"], state["model"]) == []
    probe("--data_folder", drawn, *quick, "--save_path", tmp_path / "out",
          "--model_path", tmp_path / "old.pth")
    assert transductive(tmp_path / "out") is None


def pairs_naming(drawn, path, subjects):
    """A copy of `drawn`'s pairs.tsv with these cells as its subjects; None: without the column."""
    lines = [line.split("\t") for line in (drawn / "pairs.tsv").read_text().splitlines()]
    place = lines[0].index("subject")
    for line, subject in zip(lines[1:], subjects or lines[1:]):
        line[place] = subject
    if subjects is None:
        lines = [line[:place] + line[place + 1:] for line in lines]
    path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """A drawn data set of s1 to s6; `drawn` holds s1 to s4."""
    folder = tmp_path_factory.mktemp("strangers")
    draw_set(folder, subjects=6, per_subject=2)
    return folder


@pytest.mark.parametrize("pool, subjects, named, of_s1, of_s5", [
    ("unlabelled", None, [], None, None),
    ("unlabelled", ["s2", " ", "", "s2", "s3", "S.5"], ["S.5", "s2", "s3"], None, True),
    ("unlabelled", ["s2", "s3", "s2", "s3", "s2", "s3"], None, False, False),
    ("both", None, ["s1", "s2", "s3", "s4"], True, None),
    ("both", ["s1", "s2", "s3", "s4", "", "s2"], ["s1", "s2", "s3", "s4"], True, None)])
def test_who_was_seen_is_unknown_where_a_pair_names_nobody(
        drawn, strangers, quick, small_crops, tmp_path, capsys, pool, subjects, named, of_s1,
        of_s5):
    pairs = pairs_naming(drawn, tmp_path / "pairs.tsv", subjects)
    (tmp_path / "encoding.json").write_text((drawn / "encoding.json").read_text())
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path / "runs", "--pairs", pairs,
             "--pool", pool)
    unnamed = 6 if subjects is None else sum(not name.strip() for name in subjects)
    assert (f"{unnamed} of these clips name no subject" in capsys.readouterr().out) \
        == (unnamed > 0)
    path = only(tmp_path / "runs") / "last.pth"
    seen = load(path)["seen"]
    assert seen["clips"] == (6 if pool == "unlabelled" else 17)
    if named is None:
        assert "named" not in seen and all(name for _, name in seen["people"])
    else:
        assert seen["people"] is None and seen["named"] == [[0, name] for name in named]
    for subject, expected in (("s1", of_s1), ("s5", of_s5)):
        out = tmp_path / subject
        probe("--data_folder", strangers, *quick, "--model_path", path, "--save_path", out,
              "--protocol", "loso", "--subject", subject)
        assert transductive(out) is expected
        word = {True: "yes", False: "no", None: "unknown"}[expected]
        assert f"transductive: {word}" in capsys.readouterr().out


def test_an_empty_name_in_a_checkpoint_is_somebody_unknown(drawn, quick, pretrained, small_crops,
                                                           tmp_path):
    people = [[0, ""], [0, "s1"]]
    torch.save(load(pretrained) | {"seen": {"people": people, "clips": 6}}, tmp_path / "x.pth")
    for subject, expected in (("s1", True), ("s2", None)):
        finetune("--data_folder", drawn, *quick, "--model_path", tmp_path / "x.pth",
                 "--save_path", tmp_path / subject, "--subject", subject, "--freeze_encoder")
        assert transductive(tmp_path / subject) is expected


@pytest.mark.parametrize("seen, people, all_of_them", [
    ({"people": [[0, "s1"], [1, "s1"]]}, {(0, "s1"), (1, "s1")}, True),
    ({"people": []}, set(), True), ({"people": [[0, ""]]}, set(), False),
    ({"people": [[0, ""], [1, " "], [1, "s1"]]}, {(1, "s1")}, False),
    ({"people": None, "named": [[0, "s1"]]}, {(0, "s1")}, False),
    ({"people": None, "named": []}, set(), False), ({"people": None}, set(), False),
    ({}, set(), False), (None, set(), False)])
def test_whom_an_encoder_saw_and_whether_these_are_all(seen, people, all_of_them):
    assert encoders.read_seen(seen)[:3] == (people, all_of_them, False)


# ---------------------------------------------------------------- fine-tuning

def tuned(drawn, quick, path, out, *flags, chosen=False):
    """Fine-tunes on all but s1; (run folder, last.pth's state)."""
    finetune("--data_folder", drawn, *quick, "--model_path", path, "--save_path", out,
             *(flags if "--subject" in flags else ("--subject", "s1", *flags)), chosen=chosen)
    return only(out), load(only(out) / "last.pth")


@pytest.mark.parametrize("flags, moving", [
    ([], ["rgb_to_d", "d_to_rgb"]),
    (["--encoder", "rgb"], ["rgb_to_d"]),
    (["--encoder", "depth", "--loss", "focal"], ["d_to_rgb"]),
    (["--train_bn", "--loss", "balanced"], ["rgb_to_d", "d_to_rgb", "running_mean"]),
    (["--oversample"], ["rgb_to_d", "d_to_rgb"])], ids=" ".join)
def test_fine_tuning_moves_what_it_should(drawn, quick, pretrained, tmp_path, flags, moving):
    run, state = tuned(drawn, quick, pretrained, tmp_path, *flags, chosen=not flags)
    moved = differing(load(pretrained)["model"], state["model"])
    for part in ("rgb_to_d", "d_to_rgb"):
        weights = [name for name in moved if part in name and name.endswith("conv1.weight")]
        assert bool(weights) == (part in moving)
    assert any("running_mean" in name for name in moved) == ("running_mean" in moving)
    # s1 is held out, but the encoder was pre-trained on everybody
    assert state["seen"]["people"] == [[0, "s1"], [0, "s2"], [0, "s3"], [0, "s4"]]
    assert {r["subject"] for r in rows(run)} == {"s1"} and len(rows(run)) == 3
    assert record.read_log(run)[1]["subject"] == "s1"
    assert "_layer_6_lr_0.1_decay_0.0001_bsz_8_elr_0.0001_l2_" \
        f"{'0.01' if flags else 'inner'}_loso_" in run.name
    assert {"mean", "std", "classifier.weight", "classifier.bias"} == state["classifier"].keys()


def test_labels_of_the_held_out_subject_do_not_matter(fresh, quick, pretrained, tmp_path):
    actual = []
    for turn in ("right", "wrong"):
        if turn == "wrong":
            for path in fresh.glob("v_*/*.txt"):
                path.write_text("".join(
                    re.sub(r" ([01]) 0$", lambda m: f" {1 - int(m[1])} 0", line)
                    if "/s1-" in line else line for line in path.read_text().splitlines(True)))
        actual.append(tuned(fresh, quick, pretrained, tmp_path / turn, chosen=True)[1])
    assert differing(actual[0]["model"], actual[1]["model"]) == []
    assert differing(actual[0]["classifier"], actual[1]["classifier"]) == []


def test_a_frozen_encoder_is_probed_per_subject(drawn, quick, pretrained, probed, tmp_path):
    finetune("--data_folder", drawn, *quick, "--freeze_encoder", "--model_path", pretrained,
             "--save_path", tmp_path, "--loss", "balanced", "--epochs", 4, "--head", "random",
             "--lr_decay_epochs", 10, 20, "--lr_decay_rate", 0.2)
    run = only(tmp_path)
    assert "_layer_6_lr_0.1_decay_0.0001_bsz_8_random_loso_both_balanced_frozen_seed_0" in run.name
    assert [r["key"] for r in rows(run)] == [r["key"] for r in rows(probed)]
    # the classes are nearly balanced, so the heads of linear probing are not far
    ours, theirs = ([float(r["p_0"]) for r in rows(folder)] for folder in (run, probed))
    assert np.allclose(ours, theirs, atol=0.2) and ours != theirs


def test_finished_subjects_are_merged_and_not_trained_again(drawn, quick, pretrained, tmp_path):
    tuned(drawn, quick, pretrained, tmp_path, "--subject", "s1")
    run, _ = tuned(drawn, quick, pretrained, tmp_path, "--subject", "s1", "s3")
    assert [line.get("subject") for line in record.read_log(run)] == [None, "s1", "s3"]
    assert {r["subject"] for r in rows(run)} == {"s1", "s3"}


class Stopped(Exception):
    pass


def stop_at(monkeypatch, call):
    """Makes the `call`-th epoch of fine-tuning fail."""
    train, count = supervised.train_epoch, iter(range(1, 100))

    def stopping(*args):
        if next(count) == call:
            raise Stopped
        return train(*args)
    monkeypatch.setattr(supervised, "train_epoch", stopping)


@pytest.mark.parametrize("resume", ["auto", pytest.param("FILE", marks=pytest.mark.slow)])
def test_fine_tuning_that_was_stopped_goes_on_to_the_same_result(drawn, quick, pretrained, tmp_path,
                                                                 monkeypatch, resume):
    flags = ["--data_folder", drawn, *quick, "--epochs", 2, "--save_freq", 1,
             "--model_path", pretrained]
    finetune(*flags, "--save_path", tmp_path / "whole", "--subject", "s1", "s2")
    flags += ["--save_path", tmp_path / "part", "--subject", "s1", "s2"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, 4)
        finetune(*flags)
    part = only(tmp_path / "part")
    finetune(*flags, "--resume", "auto" if resume == "auto" else part / "last_s2.pth")
    whole = only(tmp_path / "whole")
    assert (part / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert states_differ(whole / "last.pth", part / "last.pth") == []
    assert [(x.get("subject"), x.get("epoch")) for x in record.read_log(part)] \
        == [(None, None), ("s1", 1), ("s1", 2), ("s2", 1), ("s2", 2)]


def test_jobs_that_share_a_run_folder_resume_with_checkpoints_of_their_own(drawn, quick,
                                                                           pretrained, tmp_path):
    """last.pth may be of another job's subject, whose encoder was another one."""
    for i in (1, 2):
        state = torch.load(pretrained, weights_only=True)
        torch.save(state | {"number": i}, tmp_path / f"s{i}.pth")
    for i in (1, 2):
        run, state = tuned(drawn, quick, tmp_path / "{subject}.pth", tmp_path / "r", "--subject",
                           f"s{i}", "--resume", "auto")
        assert state["unit"] == f"s{i}"
    assert {r["subject"] for r in rows(run)} == {"s1", "s2"}


@pytest.mark.parametrize("frozen", [[], ["--freeze_encoder"]], ids=["trained", "frozen"])
def test_subject_all_makes_one_model_for_prediction(drawn, quick, pretrained, tmp_path, frozen):
    flags = ["--subject", "all", *frozen]
    run, state = tuned(drawn, quick, pretrained, tmp_path, *flags)
    assert {"classifier", "classes", "layer", "view"} <= state.keys()
    assert (state["classes"], state["layer"], state["view"]) == (["0", "1"], 6, "RGB_D")
    assert state["seen"]["clips"] == 12 and not (run / "results.json").exists()
    model = create_model("resnet18v1")
    model.load_state_dict(state["model"])
    head = create_classifier("resnet18v1", 6, 2)
    head.load_state_dict(state["classifier"])
    clips = dataset.read_clips(drawn)
    images, _ = dataset.load_images(clips)
    classifier = Classifier(model, head, state["layer"], state["normalization"])
    autocast = devices.mixed_precision(False, torch.device("cpu")).autocast
    actual = supervised.predict(classifier, images, np.arange(12), autocast, 8)
    assert actual.shape == (12, 2) and np.isfinite(actual).all()
    tuned(drawn, quick, pretrained, tmp_path, *flags, "--resume", "auto")
    again = load(run / "last.pth")
    assert differing(again["model"], state["model"]) == []
    assert differing(again["classifier"], state["classifier"]) == []


def test_oversampling_draws_all_classes_equally_often():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    order = [labels[supervised.draw_order(labels, True, epochs.generator(0, epoch)).numpy()]
             for epoch in range(30)]
    share = np.bincount(np.concatenate(order)) / 3000
    assert share == pytest.approx([1 / 3] * 3, abs=0.04)
    plain = supervised.draw_order(labels, False, epochs.generator(0, 1))
    assert plain.tolist() == list(range(100))


# ---------------------------------------------------------------- curves and logs

def test_curves_of_pretraining_read_back_as_logged(pretrained):
    run = pretrained.parent
    lines = record.read_log(run)
    assert lines[0]["command"].startswith("python pre-train_DVSCL.py --data_folder")
    assert lines[0]["opt"]["epochs"] == 1 and "torch" in lines[0]["versions"]
    assert lines[0]["versions"]["cpu"] == torch.backends.cpu.get_cpu_capability()
    actual = curves(run.parent / "tensorboard" / run.name)
    assert actual.keys() == {"rgb_loss", "rgb_prob", "depth_loss", "depth_prob", "learning_rate",
                            "pairs_per_second"}
    for tag, values in actual.items():
        assert values == {1: pytest.approx(lines[1][tag], rel=1e-6)}


def test_curves_of_heads_read_back_as_logged(probed):
    lines = record.read_log(probed)
    assert [line["epoch"] for line in lines[1:]] == [1, 2, 3, 4]
    actual = curves(probed.parent / "tensorboard" / probed.name)
    assert {"train_loss", "train_accuracy", "learning_rate"} <= actual.keys()
    for tag, values in actual.items():
        assert values == {line["epoch"]: pytest.approx(line[tag], rel=1e-6) for line in lines[1:]}


def test_tb_path_holds_the_curves(drawn, quick, pretrained, tmp_path):
    probe("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path",
          tmp_path / "out", "--tb_path", tmp_path / "tb")
    run = only(tmp_path / "out")
    assert curves(tmp_path / "tb" / run.name)["train_loss"].keys() == {1}
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_two_writers_in_one_folder_within_a_second_both_survive(tmp_path):
    logs = [record.Log(tmp_path / f"run{i}", tmp_path / "tb", {}) for i in range(3)]
    for i, log in enumerate(logs):
        log.epoch(i + 1, {"loss": 10.0 + i})
    del logs, log
    assert len(list((tmp_path / "tb").iterdir())) == 3
    assert curves(tmp_path / "tb")["loss"] == {1: 10, 2: 11, 3: 12}


# ---------------------------------------------------------------- flags

SHARED = """data_folder list_folder tb_path model view encoding batch_size num_workers epochs
    learning_rate lr_decay_epochs lr_decay_rate momentum weight_decay amp resume seed device
    print_freq tag model_path without"""
FLAGS = {
    "pre-train_DVSCL": """nce_k nce_m nce_t softmax no-softmax feat_dim subject fold pairs pool
        min_intensity crop_low no_flip jitter save_freq save_minutes""",
    "LinearProbing_DVSCL_10fold": """dataset save_path layer encoder protocol subject n_views_train
        solver l2 select select_rates seeds oracle_curve""",
    "fine-tune_DVSCL": """dataset save_path layer encoder protocol subject head l2 freeze_encoder
        encoder_lr train_bn loss oversample lr_schedule warmup_epochs seeds oracle_curve save_freq
        save_minutes"""}


def test_probing_takes_the_flags_of_checkpoints_that_it_no_longer_makes(capsys):
    argv = ["--data_folder", "d", "--model_path", "m", "--save_path", "s", "--layer", "5"]
    plain = script("LinearProbing_DVSCL_10fold").parse_option(argv)
    assert vars(script("LinearProbing_DVSCL_10fold").parse_option(
        [*argv, "--save_freq", "20"])) == vars(plain)
    assert "--save_freq: the heads are found in one pass" in capsys.readouterr().out


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_every_flag_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        script(name).main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in f"{SHARED} {FLAGS[name]}".split():
        assert re.search(rf"--{flag}\b", text), flag
    assert ("--save_" in text.replace("--save_path", "")) == ("save_freq" in FLAGS[name])
    assert "[0.0001]" in text and "[0.9]" in text
    sgd = "optimisation (--solver sgd):" if name.startswith("Linear") else "optimisation:"
    for group in ("data:", "model:", "method:", sgd, "running:", "output:"):
        assert f"\n{group}" in text


@pytest.mark.parametrize("name, defaults", [
    ("pre-train_DVSCL", {
        "model": "alexnet", "view": "RGB_D", "batch_size": 256, "learning_rate": 0.03,
        "contrast": "batch", "lr_schedule": "cosine", "warmup_epochs": 12, "size": 224,
        "lr_decay_epochs": [160, 200], "lr_decay_rate": 0.1, "epochs": 240, "momentum": 0.9,
        "weight_decay": 1e-4, "nce_k": 4096, "nce_m": 0.5, "nce_t": 0.2, "softmax": True,
        "feat_dim": 128, "crop_low": 1, "jitter": 0.4, "pool": "labelled", "seed": 0}),
    ("LinearProbing_DVSCL_10fold", {
        "batch_size": 256, "learning_rate": 0.1, "lr_decay_epochs": [10, 20, 30, 40, 50, 60, 70],
        "lr_decay_rate": 0.2, "epochs": 80, "weight_decay": 1e-4, "layer": 5, "encoder": "both",
        "protocol": "10fold", "n_views_train": 2, "dataset": "casme3", "solver": "lbfgs",
        "l2": None, "select": "fixed"}),
    ("fine-tune_DVSCL", {
        "batch_size": 128, "learning_rate": 0.1, "lr_decay_epochs": [10, 20], "lr_decay_rate": 0.1,
        "epochs": 30, "encoder_lr": 0.0001, "train_bn": False, "loss": "crossentropy", "layer": 5,
        "head": "probe", "l2": None, "protocol": "loso", "lr_schedule": "step",
        "warmup_epochs": 2})])
def test_defaults_are_those_of_the_method(name, defaults):
    required = ["--data_folder", "d", "--model_path", "m"]
    required += [] if name.startswith("pre") else ["--save_path", "s"]
    opt = vars(script(name).parse_option(required))
    assert {key: opt[key] for key in defaults} == defaults


@pytest.mark.parametrize("line", [
    "pre-train_DVSCL.py --batch_size 256 --num_workers 36 --data_folder D --model_path M "
    "--tb_path T",
    "pre-train_DVSCL.py --model resnet50v1 --batch_size 128 --num_workers 24 --data_folder D "
    "--model_path M --tb_path T",
    "LinearProbing_DVSCL_10fold.py --dataset casme3 --data_folder D --save_path S --tb_path T "
    "--model_path X.pth --model alexnet --learning_rate 0.1 --layer 5",
    "fine-tune_DVSCL.py --dataset casme3 --data_folder D --save_path S --tb_path T "
    "--model_path X.pth --model alexnet --learning_rate 0.1 --layer 5"])
def test_the_command_lines_of_the_method_are_understood(line):
    name, *argv = line.split()
    opt = script(name.removesuffix(".py")).parse_option(argv)
    assert (opt.data_folder, opt.tb_path) == ("D", "T")
    # a learning rate is one of SGD
    assert getattr(opt, "solver", "sgd") == "sgd"


@pytest.mark.parametrize("text, expected", [(["120", "160"], [120, 160]), (["120,160"], [120, 160]),
                                            (["120,", "160"], [120, 160]), (["7"], [7])])
def test_decay_epochs_with_blanks_or_commas(text, expected):
    opt = script("pre-train_DVSCL").parse_option(
        ["--data_folder", "d", "--model_path", "m", "--lr_decay_epochs", *text])
    assert opt.lr_decay_epochs == expected
    rates = [schedules.step_rate(opt.learning_rate, e, opt.lr_decay_epochs, opt.lr_decay_rate)
             for e in (expected[0], expected[0] + 1)]
    assert rates == pytest.approx([0.03, 0.003])


@pytest.mark.parametrize("flags, contrast, temperature", [
    ([], "batch", 0.2), (["--contrast", "bank"], "bank", 0.07), (["--nce_k", "16"], "bank", 0.07),
    (["--no-softmax"], "bank", 0.07), (["--contrast", "bank", "--nce_t", "0.1"], "bank", 0.1)])
def test_flags_of_the_banks_select_them(flags, contrast, temperature, capsys):
    opt = script("pre-train_DVSCL").parse_option(["--data_folder", "d", "--model_path", "m",
                                                  *flags])
    assert (opt.contrast, opt.nce_t) == (contrast, temperature)
    printed = capsys.readouterr().out
    assert ("memory banks" in printed) == (flags[:1] in (["--nce_k"], ["--no-softmax"]))


@pytest.mark.parametrize("name", ["pre-train_DVSCL", "LinearProbing_DVSCL_10fold",
                                  "fine-tune_DVSCL"])
def test_a_size_of_which_the_encoder_leaves_nothing_is_refused(name, capsys):
    required = ["--data_folder", "d", "--model_path", "m"]
    required += [] if name.startswith("pre") else ["--save_path", "s"]
    with pytest.raises(SystemExit):
        script(name).parse_option([*required, "--size", "48"])
    assert "63 pixels" in capsys.readouterr().err
    small = [*required, "--size", "48", "--model", "resnet18v1"]
    assert script(name).parse_option(small).size == 48


def test_a_flag_of_the_banks_beside_the_batch_is_refused(capsys):
    with pytest.raises(SystemExit):
        script("pre-train_DVSCL").parse_option(["--data_folder", "d", "--model_path", "m",
                                                "--contrast", "batch", "--nce_m", "0.9"])
    assert "--nce_m goes with --contrast bank" in capsys.readouterr().err


def test_contrast_within_the_batch_learns_and_is_probed_at_its_own_size(drawn, cache, tmp_path,
                                                                        capsys):
    flags = ["--data_folder", drawn, "--cache", cache, "--model", "resnet18v1", "--size", 40]
    pretrain(*flags, "--contrast", "batch", "--model_path", tmp_path / "runs", "--batch_size", 8,
             "--epochs", 12, "--learning_rate", 0.03, "--lr_schedule", "cosine")
    run = only(tmp_path / "runs")
    assert run.name == "batch_resnet18v1_lr_0.03_decay_0.0001_bsz_8_view_RGB_D_size_40_seed_0"
    state = checkpoint.load(run / "last.pth")
    assert state["contrast"] == {}
    lines = record.read_log(run)[1:]
    assert lines[-1]["rgb_loss"] < lines[0]["rgb_loss"] and lines[-1]["learning_rate"] < 0.001
    probe(*flags, "--model_path", run / "last.pth", "--save_path", tmp_path / "probe")
    assert len(rows(only(tmp_path / "probe"))) == 12
    with pytest.raises(SystemExit):
        probe(*flags[:-2], "--model_path", run / "last.pth", "--save_path", tmp_path / "other")
    assert "--size 40" in capsys.readouterr().err


def in_shell(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                          text=True, check=False)


def test_help_in_a_shell():
    done = in_shell("fine-tune_DVSCL.py", "--help")
    assert done.returncode == 0 and "--freeze_encoder" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("name", ["pre-train_DVSCL.py", "LinearProbing_DVSCL_10fold.py"])
def test_an_error_in_a_shell_ends_in_one_line_and_exit_code_2(name, tmp_path):
    done = in_shell(name, "--data_folder", tmp_path / "nothing", "--model_path", "random",
                    *(() if name.startswith("pre") else ("--save_path", tmp_path / "out")))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "nothing: no such folder" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, schedule, warmup", [
    ([], "cosine", 12), (["--lr_decay_epochs", "120,160"], "step", 12),
    (["--epochs", 4], "cosine", 0.2), (["--epochs", 4, "--warmup_epochs", 3], "cosine", 3)],
    ids=str)
def test_what_the_learning_rate_of_pretraining_follows(flags, schedule, warmup):
    opt = script("pre-train_DVSCL").parse_option(
        ["--data_folder", "d", "--model_path", "m", *map(str, flags)])
    assert (opt.lr_schedule, opt.warmup_epochs) == (schedule, warmup)


def test_a_run_from_before_heads_standardised_is_refused(drawn, quick, pretrained, tmp_path,
                                                         capsys):
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path",
             tmp_path / "old", "--subject", "s1")
    path = only(tmp_path / "old") / "last.pth"
    state = load(path)
    for name in ("mean", "std"):
        del state["classifier"][name]
    torch.save(state, path)
    with pytest.raises(SystemExit) as end:
        finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path",
                 tmp_path / "new", "--subject", "s1", "--resume", path)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and said.startswith(f"error: {path}: comes from before heads")
    assert not (tmp_path / "new").exists()
