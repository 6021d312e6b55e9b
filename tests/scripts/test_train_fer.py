"""train_FER.py: files, what never enters, resume, recipes, checkpoints, bad input."""
import csv
import hashlib
import json
import os
import re
import shutil
import signal

import face_tree
import numpy as np
import pytest
import runs
import torch
from conftest import script
from forked import ranked, uneven_clocks
from runs import only

import train_FER
from evaluation import fitting
from models.scn import SCN
from training import checkpoint, devices, epochs, pretrained, record, schedules


def train(*argv):
    return script("train_FER").main([str(a) for a in argv])


def refused(capsys, *argv):
    return runs.refused(capsys, train, *argv)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    face_tree.write(folder)
    return folder


@pytest.fixture(scope="module")
def marks(tree):
    path = tree.parent / "marks.csv"
    face_tree.write_landmarks(path, sorted(
        f"Image/aligned/{p.name}" for p in (tree / "Image/aligned").iterdir())[:-4])
    return path


@pytest.fixture
def flags(tree):
    return ["--dataset", "rafdb", "--data_folder", tree, "--pretrained", "none", "--size", 32,
            "--epochs", 2, "--batch_size", 14, "--cache", "off", "--device", "cpu",
            "--learning_rate", 1e-3]


def results(run):
    return json.loads((run / "results.json").read_text())


def weights_differ(one, two):
    a, b = (checkpoint.load(path) for path in (one, two))
    return runs.differing([a["model"], a["ema"], a["best"]], [b["model"], b["ema"], b["best"]])


@pytest.mark.pictures
def test_scn_leaves_the_files_of_the_house_and_its_own(flags, tmp_path, capsys):
    train(*flags, "--model", "scn", "--rank_margin", .07, "--relabel_epoch", 1, "--relabel_margin",
          0, "--relabel_group", "all", "--noise", .2, "--save_path", tmp_path, "--oracle_curve")
    run = only(tmp_path)
    content, state = results(run), checkpoint.load(run / "last.pth")
    assert content["n"] == 21 and content["resampled"] == "images" and content["noun"] == "images"
    assert content["classes"] == list(face_tree.CLASSES) == state["classes"]
    assert content["transductive"] is False and content["left_out"] == {"train": [], "test": []}
    assert content["oracle_best_epoch"]["common"]["epoch"] in (1, 2)
    for name in ("confusion.png", "mistakes.png", "curves.png", "importance.png"):
        assert (run / name).stat().st_size > 1000
    with open(run / "relabelled.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    said = content["relabelling"]
    # 49 of 56 are trained on; 11 of the 56 got another label
    assert len(rows) >= said["relabelled"] > 0 and said["planted"] <= 11
    for row in rows:
        assert row["path"].startswith("Image/aligned/train_") and row["from"] != row["to"]
        assert row["epoch"] in ("1", "2") and 0 < float(row["probability"]) < 1
    printed = capsys.readouterr().out
    assert f"of {said['planted']} planted errors {said['found']} were found" in printed
    curves = runs.curves(tmp_path / "tensorboard" / run.name)
    assert {"train_loss", "rank_loss", "relabelled", "val_uf1", "oracle/uf1"} <= curves.keys()
    script("compare_results").main([str(run / "results.json")])
    assert "fer, scn, test split" in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    ["--model", "ran"], ["--model", "ran", "--views", "random", "--region_margin", .02,
                         "--bn_per_view"],
    ["--model", "ran", "--views", "landmark", "--landmarks", "MARKS"],
    ["--gaussian", "--landmarks", "MARKS", "--loss", "focal", "--arch", "resnet34"],
    ["--wloss_alpha", .0125, "--wloss_update", 1, "--select", "val", "--loss", "logit_adjusted"],
    ["--wloss_alpha", .1, "--wloss_distance", "uniform", "--wloss_norm", "frobenius",
     "--optimizer", "sgd", "--lr_schedule", "step"],
    ["--freeze_backbone", "--drop_rate", .5, "--oversample", "--loss", "focal", "--no-tta_flip",
     "--optimizer", "rmsprop", "--ema_decay", 0, "--amp"]], ids=lambda more: " ".join(
         map(str, more)))
def test_variants_run(flags, marks, tmp_path, more):
    more = [marks if part == "MARKS" else part for part in more]
    train(*flags, "--epochs", 1, "--save_path", tmp_path, *more)
    content = results(only(tmp_path))
    assert 0 <= content["uf1"] <= 1
    assert ("view_importance" in content) == ("ran" in more)
    assert {split: len(paths) for split, paths in content.get("without_landmarks", {}).items()} \
        == ({"train": 4, "test": 0} if marks in more else {})
    if "ran" in more:
        assert sum(content["view_importance"]) == pytest.approx(1, abs=1e-4)


def test_it_learns_what_a_square_shows(flags, tree, tmp_path):
    train(*flags, "--epochs", 12, "--augment", "none", "--label_smoothing", 0, "--warmup_epochs", 0,
          "--save_path", tmp_path, "--val_fraction", 0, "--batch_size", 8, "--no-tta_flip")
    assert results(only(tmp_path))["uf1"] > .8


def test_labels_of_the_test_split_change_no_weight_and_no_choice(flags, tree, tmp_path):
    other = shutil.copytree(tree, tmp_path / "other")
    table = other / "EmoLabel" / "list_patition_label.txt"
    lines = table.read_text().split("\n")
    table.write_text("\n".join(f"{line.split()[0]} {(int(line.split()[1]) + 2) % 7 + 1}"
                               if line.startswith("test") else line for line in lines))
    flags += ["--select", "val", "--wloss_alpha", .01, "--wloss_update", 1, "--model", "scn",
              "--relabel_epoch", 1, "--relabel_margin", 0]
    for name, data in (("plain", tree), ("spoiled", other)):
        train(*flags, "--data_folder", data, "--save_path", tmp_path / name)
    plain, spoiled = (only(tmp_path / name) for name in ("plain", "spoiled"))
    assert weights_differ(plain / "last.pth", spoiled / "last.pth") == []
    assert results(plain)["choices"] == results(spoiled)["choices"]
    assert results(plain)["confusion"] != results(spoiled)["confusion"]


@pytest.mark.parametrize("stop, workers", [(2, 0), (4, 2), (6, 4)])
def test_a_run_that_was_stopped_goes_on_to_the_same_tensors(flags, tmp_path, monkeypatch, stop,
                                                            workers):
    flags += ["--model", "scn", "--rank_margin", .1, "--relabel_epoch", 1, "--relabel_margin", 0,
              "--relabel_group", "all", "--noise", .2, "--drop_rate", .3, "--oversample",
              "--select", "val", "--wloss_alpha", .01, "--wloss_update", 1, "--oracle_curve",
              "--num_workers", workers]
    train(*flags, "--save_path", tmp_path / "whole")
    look, count = epochs.Keeper.step, []

    def struck(self, save):
        count.append(1)
        if len(count) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        look(self, save)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(epochs.Keeper, "step", struck)
        train(*flags, "--save_path", tmp_path / "part")
    assert end.value.code == 143
    train(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    assert runs.states_differ(whole / "last.pth", part / "last.pth") == []
    for name in ("predictions.csv", "relabelled.csv"):
        assert (whole / name).read_bytes() == (part / name).read_bytes()
    lines = [[{k: v for k, v in line.items() if k != "images_per_second"}
              for line in record.read_log(run)[1:]] for run in (whole, part)]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_subjects_are_kept_apart_and_resampled(flags, tmp_path):
    folder = tmp_path / "set"
    face_tree.write(folder, subjects=14)
    train(*flags, "--data_folder", folder, "--save_path", tmp_path, "--epochs", 1)
    content = results(only(tmp_path))
    assert content["resampled"] == "subjects" and content["n_subjects"] == 14


def test_images_that_cannot_be_read_are_named_and_left_out(flags, tmp_path, capsys):
    folder = tmp_path / "set"
    face_tree.write(folder)
    for name in ("train_00003", "test_00002", "test_00004"):
        path = folder / "Image" / "aligned" / f"{name}_aligned.jpg"
        path.write_bytes(path.read_bytes()[:300])
    train(*flags, "--data_folder", folder, "--save_path", tmp_path, "--val_fraction", 0)
    content = results(only(tmp_path))
    assert content["n"] == 19 and {name: len(left) for name, left in content["left_out"].items()} \
        == {"train": 1, "test": 2}
    printed = capsys.readouterr()
    assert printed.err.count("left out: ") == 3
    assert "2 images of the test split could not be read" in printed.out


def test_a_finished_run_knows_which_validation_images_were_left_out(tmp_path):
    for split, count in (("train", 14), ("val", 7), ("test", 7)):
        face_tree.write_classes(tmp_path / "set" / split, count, 7)
    path = tmp_path / "set" / "val" / "fear" / "1.png"
    path.write_bytes(path.read_bytes()[:300])
    flags = ["--dataset", "folder", "--data_folder", tmp_path / "set", "--pretrained", "none",
             "--size", 32, "--epochs", 1, "--batch_size", 7, "--cache", "off", "--device", "cpu",
             "--save_path", tmp_path / "r"]
    train(*flags)
    left = results(only(tmp_path / "r"))["left_out"]
    assert [len(left[split]) for split in ("train", "val", "test")] == [0, 1, 0]
    train(*flags, "--resume", "auto")
    assert results(only(tmp_path / "r"))["left_out"] == left


def test_class_folders_without_a_test_split_are_split(tmp_path, capsys):
    face_tree.write_classes(tmp_path / "set", 42, 3)
    train("--dataset", "folder", "--data_folder", tmp_path / "set", "--pretrained", "none",
          "--size", 32, "--epochs", 1, "--batch_size", 8, "--cache", tmp_path / "cache",
          "--device", "cpu", "--save_path", tmp_path / "r")
    content = results(only(tmp_path / "r"))
    assert content["n"] == 9 and content["classes"] == ["disgust", "fear", "surprise"]
    assert "no test split; 9 of 42 images are held out" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.ready.npy"))) == 2


def test_folders_too_small_to_hold_anything_out_are_told_so(tmp_path, capsys):
    face_tree.write_classes(tmp_path / "set", 4, 2)
    flags = ["--dataset", "folder", "--pretrained", "none", "--size", 32, "--epochs", 1,
             "--batch_size", 2, "--cache", "off", "--device", "cpu"]
    said = refused(capsys, *flags, "--data_folder", tmp_path / "set", "--save_path", tmp_path / "r")
    assert "no test split, and too few images of each class to hold one out" in said
    said = refused(capsys, *flags, "--data_folder", tmp_path / "set", "--save_path",
                   tmp_path / "set" / "r")
    assert "whose images are read" in said and not (tmp_path / "set" / "r").exists()
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "set", tmp_path / "two" / split)
    said = refused(capsys, *flags, "--data_folder", tmp_path / "two", "--save_path",
                   tmp_path / "two" / "train" / "r")
    assert "whose images are read" in said
    flags += ["--data_folder", tmp_path / "two", "--save_path", tmp_path / "two" / "r"]  # beside
    said = refused(capsys, *flags, "--select", "val")
    assert "--select val takes validation images: give a --val_fraction above 0.1, which is" in said
    train(*flags, "--val_fraction", .9)  # one image of each class is left to train on
    assert "2 training images, 2 to validate, 4 to test" in capsys.readouterr().out


def test_two_ranks_train_the_network_of_one_process(flags, tmp_path):
    """With a frozen backbone, since batch norm sees half a batch each; of batches with an image
    that cannot be read, too, and clocks of which one says to save."""
    folder = tmp_path / "set"
    face_tree.write(folder)
    path = folder / "Image" / "aligned" / "train_00005_aligned.jpg"
    path.write_bytes(b"nothing")
    for n, name in enumerate(("one", "two"), 1):
        ranked(n, "train_FER", *flags, "--data_folder", folder, "--model", "scn",
               "--rank_margin", .1, "--relabel_epoch", 1, "--relabel_margin", 0, "--epochs", 1,
               "--freeze_backbone", "--batch_size", 15, "--save_path", tmp_path / name,
               "--wloss_alpha", .01, "--wloss_update", 1, prepare=uneven_clocks, folder=tmp_path)
    one, two = only(tmp_path / "one"), only(tmp_path / "two")
    a, b = (checkpoint.load(run / "last.pth") for run in (one, two))
    for name in ("fc.weight", "alpha.0.weight"):
        torch.testing.assert_close(a["model"][name], b["model"][name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a["distance"], b["distance"])
    assert torch.equal(a["labels"], b["labels"]) and results(two)["versions"]["ranks"] == 2
    assert results(one)["left_out"] == results(two)["left_out"]
    assert results(two)["left_out"]["train"] == ["Image/aligned/train_00005_aligned.jpg"]
    lines = [record.read_log(run)[1] for run in (one, two)]
    for name in ("train_loss", "rank_loss", "train_accuracy"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4)


# ---------------------------------------------------------------- where it starts

def test_a_run_goes_on_from_a_model_with_the_wasserstein_term(flags, tmp_path, capsys):
    train(*flags, "--save_path", tmp_path / "a", "--epochs", 1)
    first = only(tmp_path / "a") / "last.pth"
    train(*flags[:4], *flags[6:], "--save_path", tmp_path / "b", "--epochs", 1, "--model_path",
          first, "--wloss_alpha", .0125, "--learning_rate", 0)
    count = len(checkpoint.load(first)["model"])
    assert f"all {count} tensors loaded, the average's weights" in capsys.readouterr().out
    a, b = (checkpoint.load(p) for p in (first, only(tmp_path / "b") / "last.pth"))
    assert torch.equal(a["ema"]["module.fc.weight"], b["model"]["fc.weight"])
    assert not torch.equal(a["model"]["fc.weight"], b["model"]["fc.weight"])
    assert results(only(tmp_path / "b"))["transductive"] is False  # of the same split
    for flag in ("--model_path", "--pretrained"):
        said = refused(capsys, *flags[:4], *flags[6:], "--save_path", tmp_path / "d", flag, first,
                       "--seed", 1, "--select", "val")
        assert re.search(rf"{flag} .*: was trained on \d of the \d images that now are to choose",
                         said)
    old = {name: value for name, value in a.items() if name != "seen_images"}
    checkpoint.save(tmp_path / "old.pth", old)  # of an earlier release
    said = refused(capsys, *flags[:4], *flags[6:], "--save_path", tmp_path / "d", "--model_path",
                   tmp_path / "old.pth", "--seed", 1, "--select", "val")
    assert "was trained with --seed 0, hence on images that now are to choose" in said
    said = refused(capsys, *flags[:4], *flags[6:], "--save_path", tmp_path / "c", "--model", "scn",
                   "--model_path", first)
    assert "not a checkpoint of scn but of baseline" in said
    said = refused(capsys, *flags[:4], *flags[6:], "--save_path", tmp_path / "c", "--arch",
                   "resnet34", "--model_path", first)
    assert "was trained with --arch resnet18; give the same" in said


def test_a_run_that_goes_on_asks_for_no_file_it_started_from(flags, tmp_path, monkeypatch):
    flags = [*flags[:4], *flags[6:], "--learning_rate", 0, "--warmup_epochs", 0]
    train(*flags, "--pretrained", "none", "--epochs", 1, "--save_path", tmp_path / "a")
    first = only(tmp_path / "a") / "last.pth"
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    again = [*flags, "--model_path", first, "--save_path", tmp_path / "b"]
    train(*again, "--epochs", 1)
    first.unlink()
    monkeypatch.setattr(pretrained, "load_backbone", None)  # nor for torchvision's
    train(*again, "--epochs", 2, "--resume", "auto")
    run = only(tmp_path / "b")
    assert checkpoint.load(run / "last.pth")["epoch"] == 2
    assert results(run)["checkpoints"] == {str(first): digest}


def test_what_a_model_before_the_last_was_trained_on_counts(flags, tree, tmp_path, capsys):
    flags = [*flags[:4], *flags[6:], "--epochs", 1, "--learning_rate", 0]
    train(*flags, "--pretrained", "none", "--save_path", tmp_path / "a")
    first = only(tmp_path / "a") / "last.pth"
    train(*flags, "--seed", 1, "--model_path", first, "--save_path", tmp_path / "b")
    said = refused(capsys, *flags, "--seed", 1, "--select", "val", "--model_path",
                   only(tmp_path / "b") / "last.pth", "--save_path", tmp_path / "c")
    assert "images that now are to choose; give the --seed and --val_fraction it was" in said
    state = checkpoint.load(first)
    backbone = tmp_path / "backbone.pth"
    torch.save(state["model"], backbone)
    train(*flags, "--pretrained", backbone, "--save_path", tmp_path / "d")
    from_unknown = only(tmp_path / "d") / "last.pth"
    train(*flags, "--model_path", from_unknown, "--save_path", tmp_path / "e")
    assert results(only(tmp_path / "e"))["transductive"] is None  # nor does anybody know now
    checkpoint.save(first, state | {"classes": state["classes"][::-1]})
    assert "its classes are neutral, anger, " in refused(
        capsys, *flags, "--model_path", first, "--save_path", tmp_path / "f")


def test_test_images_that_lie_in_the_training_split_too_are_counted(flags, tmp_path, capsys):
    folder = tmp_path / "set"
    face_tree.write(folder)
    for i in (1, 2, 9):  # of the same class
        shutil.copy(folder / f"Image/aligned/test_{i:05d}_aligned.jpg",
                    folder / f"Image/aligned/train_{i:05d}_aligned.jpg")
    flags = [*flags, "--data_folder", folder, "--val_fraction", 0]
    train(*flags, "--save_path", tmp_path / "a", "--epochs", 1)
    assert "3 of the 21 test images are among those that are trained on" in capsys.readouterr().out
    train(*flags, "--save_path", tmp_path / "a", "--resume", "auto")
    assert "transductive: yes: images of the test split lie among the training images" \
        in capsys.readouterr().out
    written = results(only(tmp_path / "a"))
    assert written["transductive"] is True and written["in_training"] == {"test": 3}


def test_one_s_own_images_are_not_read_before_the_first_step(flags, tmp_path, monkeypatch):
    train(*flags, "--save_path", tmp_path / "a", "--epochs", 1)
    read, plain = [], fitting.fingerprints
    monkeypatch.setattr(fitting, "fingerprints", lambda images: (
        read.append(len(images)), plain(images))[1])
    monkeypatch.setattr(fitting.Fit, "begin", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(*flags[:4], *flags[6:], "--save_path", tmp_path / "b", "--model_path",
              only(tmp_path / "a") / "last.pth")
    assert read == [21]  # the test split's


def test_what_is_held_out_is_the_same_under_any_noise(flags, tmp_path, capsys):
    for noise in (0, .5):
        train(*flags, "--save_path", tmp_path / f"{noise}", "--epochs", 1, "--noise", noise)
    clean, noisy = (checkpoint.load(only(tmp_path / name) / "last.pth") for name in ("0", "0.5"))
    assert torch.equal(*(state["seen_images"]["labelled"] for state in (clean, noisy)))
    assert not torch.equal(clean["labels"], noisy["labels"])
    train(*flags[:4], *flags[6:], "--save_path", tmp_path / "on", "--epochs", 1, "--noise", .5,
          "--select", "val", "--model_path", only(tmp_path / "0") / "last.pth")
    assert checkpoint.load(only(tmp_path / "on") / "last.pth")["opt"]["pretrained"] == "none"
    path = only(tmp_path / "0.5") / "last.pth"  # of an earlier release, which divided otherwise
    state = checkpoint.load(path)
    del state["shared"]
    checkpoint.save(path, state)
    assert "an earlier release held out other images with --noise" in refused(
        capsys, *flags, "--save_path", tmp_path / "0.5", "--noise", .5, "--epochs", 2, "--resume",
        "auto")


def test_a_longer_run_of_derived_warm_up_goes_on(flags, tmp_path):
    flags = [*flags[:8], *flags[10:], "--save_path", tmp_path]
    train(*flags, "--epochs", 1)
    train(*flags, "--epochs", 2, "--resume", "auto")
    assert [line["epoch"] for line in record.read_log(only(tmp_path))[1:]] == [1, 2]


def test_a_warm_up_that_was_given_is_given_again(flags, tmp_path, capsys):
    flags = [*flags[:8], *flags[10:], "--save_path", tmp_path]
    train(*flags, "--epochs", 1, "--warmup_epochs", 0)
    said = refused(capsys, *flags, "--epochs", 2, "--resume", "auto")
    assert "--warmup_epochs 0.0 there, 0.5 here" in said


def test_a_run_of_half_precision_goes_on_with_a_scaler_that_has_no_state_yet(flags, tmp_path,
                                                                            monkeypatch):
    flags += ["--save_path", tmp_path, "--warmup_epochs", 0]
    train(*flags, "--epochs", 1)
    scaler, precision = devices.Scaler("cpu"), devices.mixed_precision
    monkeypatch.setattr(devices, "mixed_precision", lambda *given: precision(*given)._replace(
        scaler=scaler))
    train(*flags, "--resume", "auto")
    assert checkpoint.load(only(tmp_path) / "last.pth")["scaler"] == scaler.state_dict() != {}


@pytest.mark.parametrize("more, expected", [
    ([], {"optimizer": "adamw", "learning_rate": 2e-4, "epochs": 40, "augment": "strong",
          "label_smoothing": .1, "ema_decay": .999, "tta_flip": True, "warmup_epochs": 5}),
    (["--epochs", "8"], {"warmup_epochs": 2}),
    (["--recipe", "published", "--model", "scn"], {
        "optimizer": "adam", "learning_rate": 1e-3, "lr_schedule": "exponential",
        "lr_decay_rate": .9, "epochs": 70, "rank_margin": .07, "relabel_epoch": 10,
        "relabel_group": "all", "ema_decay": 0, "warmup_epochs": 0}),
    (["--recipe", "published", "--model", "scn", "--epochs", "9"], {"epochs": 9,
                                                                    "rank_margin": .07}),
    (["--recipe", "published", "--model", "ran"], {
        "optimizer": "sgd", "learning_rate": .01, "lr_schedule": "step", "lr_decay_rate": .1,
        "bn_per_view": True, "views": "fixed"}),
    (["--recipe", "published", "--model", "ran", "--freeze_backbone"], {"bn_per_view": False}),
    (["--recipe", "published", "--model", "ran", "--freeze_backbone", "--gaussian", "--landmarks",
      "l.csv"], {"bn_per_view": True}),  # the maps' branch has norms
    (["--recipe", "published", "--model", "ran", "--no-bn_per_view"], {
        "bn_per_view": False, "region_margin": .02}),
    (["--recipe", "notes"], {"batch_size": 600, "optimizer": "adam", "learning_rate": 1e-3}),
    (["--recipe", "notes", "--model", "ran"], {"batch_size": 72, "views": "fixed"}),
    (["--recipe", "notes", "--wloss_alpha", ".0125"], {
        "optimizer": "sgd", "momentum": 0, "epochs": 300, "learning_rate": 1e-3}),
    (["--recipe", "published", "--model", "ran", "--lr_schedule", "exponential", "--optimizer",
      "adam"], {"lr_decay_rate": .9, "learning_rate": 1e-3}),
    (["--recipe", "published", "--model", "scn", "--lr_schedule", "step", "--optimizer", "sgd",
      "--epochs", "40"], {"lr_decay_rate": .1, "learning_rate": 1e-2})])
def test_recipes_set_what_no_flag_says(more, expected, capsys):
    opt = train_FER.parse_option(["--dataset", "rafdb", "--data_folder", "d", "--save_path", "s",
                                  *more])
    assert {name: getattr(opt, name) for name in expected} == expected
    # frozen, it changes nothing: runs of earlier releases, which had it, go on
    assert ("bn_per_view" in opt.free) == (opt.freeze_backbone and not opt.gaussian)
    printed = capsys.readouterr().out
    assert f"--recipe {opt.recipe}: --augment {opt.augment}, " in printed
    assert f", --{'' if opt.tta_flip else 'no-'}tta_flip, " in printed
    # what was printed can be given
    said = next(line for line in printed.splitlines() if line.startswith("--recipe"))
    again = train_FER.parse_option(["--dataset", "rafdb", "--data_folder", "d", "--save_path", "s",
                                    "--model", opt.model, *said.partition(": ")[2].replace(
                                        ",", "").split(), *more])
    assert vars(again) | {"warmup_derived": 0, "recipe": 0} == vars(opt) | {
        "warmup_derived": 0, "recipe": 0}
    if opt.lr_schedule == "step":
        assert schedules.decay_epochs(opt) == [12, 20, 32]
        assert schedules.decay_epochs(opt.changed(epochs=2)) == [1]
        assert schedules.decay_epochs(opt.changed(epochs=1)) == []


def test_weight_decay_that_is_a_rates_factor_is_warned_of(capsys):
    train_FER.parse_option(["--dataset", "rafdb", "--data_folder", "d", "--save_path", "s",
                            "--weight_decay", "0.9"])
    assert "--lr_decay_rate 0.9" in capsys.readouterr().out


def test_frozen_backbones_stay_to_the_bit(flags, tmp_path):
    torch.manual_seed(5)
    torch.save(SCN(7).state_dict(), tmp_path / "start.pth")
    train(*flags[:4], *flags[6:], "--pretrained", tmp_path / "start.pth", "--freeze_backbone",
          "--model", "scn", "--save_path", tmp_path)
    before = torch.load(tmp_path / "start.pth", weights_only=True)
    after = checkpoint.load(only(tmp_path) / "last.pth")["model"]
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"fc", "alpha"}


# ---------------------------------------------------------------- bad input

def test_other_images_or_landmarks_do_not_go_on(tmp_path, flags, capsys):
    folder = tmp_path / "set"
    face_tree.write(folder)
    marks = tmp_path / "marks.csv"
    names = sorted(f"Image/aligned/{p.name}" for p in (folder / "Image/aligned").iterdir())
    face_tree.write_landmarks(marks, names)
    flags += ["--data_folder", folder, "--gaussian", "--landmarks", marks, "--save_path", tmp_path,
              "--warmup_epochs", 0, "--epochs", 1]
    train(*flags)
    before = marks.read_text()
    marks.write_text(before.replace("train_00001_aligned.jpg,", "train_00001_aligned.jpg,1"))
    assert "data digest differs" in refused(capsys, *flags, "--resume", "auto")
    marks.write_text(before)
    image = folder / names[0]
    kept = image.read_bytes()
    image.write_bytes(kept + b"more")
    assert "data digest differs" in refused(capsys, *flags, "--resume", "auto")
    image.write_bytes(kept)
    train(*flags, "--epochs", 2, "--resume", "auto")  # epochs may grow
    assert checkpoint.load(only(tmp_path) / "last.pth")["epoch"] == 2


def test_the_oracle_is_there_only_where_all_epochs_were_followed(flags, tmp_path, capsys):
    flags += ["--save_path", tmp_path, "--warmup_epochs", 0]
    train(*flags, "--epochs", 1)
    train(*flags, "--epochs", 2, "--resume", "auto", "--oracle_curve")
    assert "not all epochs were followed" in capsys.readouterr().out
    assert "oracle_best_epoch" not in results(only(tmp_path))


def test_crops_and_landmarks_of_detected_faces_make_a_set(tmp_path):
    """In the layout that detect_faces.py writes."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(28):
        name = f"crops/{face_tree.CLASSES[i % 2]}/p{i}_1.png"
        (tmp_path / "F" / name).parent.mkdir(parents=True, exist_ok=True)
        face_tree.Image.fromarray(face_tree.picture(i % 2, rng)).save(tmp_path / "F" / name)
        names.append(name)

    def five(side, rng):
        p = face_tree.face_points(side, rng)
        return np.stack([p[36:42].mean(0), p[42:48].mean(0), p[30], p[48], p[54]])
    face_tree.write_landmarks(tmp_path / "F" / "landmarks.csv", names, five)
    train("--dataset", "folder", "--data_folder", tmp_path / "F" / "crops", "--pretrained", "none",
          "--gaussian", "--landmarks", tmp_path / "F" / "landmarks.csv", "--size", 32, "--epochs",
          1, "--batch_size", 8, "--cache", "off", "--device", "cpu", "--save_path", tmp_path / "r")
    assert checkpoint.load(only(tmp_path / "r") / "last.pth")["points"] == 5


def test_unreadable_images_and_links_to_nowhere_end_no_run_with_landmarks(tmp_path, flags):
    folder = tmp_path / "set"
    face_tree.write(folder)
    marks = tmp_path / "marks.csv"
    names = sorted(f"Image/aligned/{p.name}" for p in (folder / "Image/aligned").iterdir())
    face_tree.write_landmarks(marks, names)
    (folder / names[-1]).write_bytes(b"")
    (folder / names[-2]).unlink()
    (folder / names[-2]).symlink_to(tmp_path / "nowhere.jpg")
    train(*flags, "--data_folder", folder, "--gaussian", "--landmarks", marks, "--save_path",
          tmp_path, "--epochs", 1, "--val_fraction", 0, "--batch_size", 2)
    left = results(only(tmp_path))["left_out"]
    assert names[-1] in left["train"]
    train(*flags, "--data_folder", folder, "--gaussian", "--landmarks", marks, "--save_path",
          tmp_path, "--epochs", 1, "--val_fraction", 0, "--batch_size", 2, "--resume", "auto")
    assert results(only(tmp_path))["left_out"] == left


@pytest.mark.parametrize("more, expected", [
    (["--votes", "plurality"], "--dataset ferplus"), (["--momentum", .5], "--optimizer sgd"),
    (["--relabel_margin", .1], "--relabel_epoch"), (["--wloss_norm", "l1"], "--wloss_alpha"),
    (["--rank_margin", .1], "--rank_margin goes with --model scn"),
    (["--relabel_epoch", 3], "--relabel_group all"),
    (["--region_margin", .1], "goes with --model ran"),
    (["--views", "fixed"], "goes with --model ran"),
    (["--model", "ran", "--views", "whole"], "--views fixed"),
    (["--model", "ran", "--region_margin", .2], "margins below 0.177"),
    (["--model", "ran", "--views", "landmark"], "--landmarks FILE"),
    (["--gaussian"], "--landmarks FILE"), (["--landmarks", "x.csv"], "--gaussian or"),
    (["--oversample", "--loss", "logit_adjusted"], "--oversample excludes --loss logit_adjusted"),
    (["--wloss_update", 2], "--wloss_alpha"), (["--warmup_epochs", 9], "at most the --epochs"),
    (["--wloss_alpha", .1, "--wloss_distance", "none.csv"], "none.csv: missing"),
    (["--select", "val", "--val_fraction", 0], "--val_fraction above 0"),
    (["--data_folder", "nowhere"], "nowhere"), (["--dataset", "sfew"], "invalid choice"),
    (["--pretrained", "none.pth"], "none.pth: no such checkpoint"),
    (["--model_path", "x.pth"], "--pretrained"),
    (["--pretrained", "imagenet", "--model_path", "x.pth"], "a fresh start, not --model_path"),
    (["--seeds", 1], "--seeds: give two"), (["--batch_size", 1], "at least 2"),
    (["--size", 8], "out of range"), (["--rank_beta", .5], "--model scn, and --rank_margin or"),
    (["--model", "scn", "--rank_margin", 0, "--rank_beta", .5], "--rank_margin or --relabel_epoch"),
    (["--model", "scn", "--relabel_epoch", 2, "--relabel_group", "all", "--rank_beta", .5],
     "--relabel_group low"),
    (["--model", "scn", "--rank_margin", .1, "--rank_beta", 1], "one of the two groups"),
    (["--model", "scn", "--rank_margin", .1, "--rank_beta", .3, "--batch_size", 2], "is empty"),
    (["--model", "scn", "--relabel_epoch", 2, "--rank_beta", 1], "no image of a batch"),
    (["--backbone_lr", .1, "--freeze_backbone"], "a backbone that moves"),
    (["--model", "ran", "--bn_per_view", "--freeze_backbone"], "--bn_per_view goes with batch")])
def test_bad_input_is_refused_in_one_line(flags, tmp_path, capsys, more, expected):
    said = refused(capsys, *flags, "--save_path", tmp_path / "r", *more)
    assert said.startswith("error: ") and expected in said
    assert not list(tmp_path.glob("r/fer_*"))


def test_distances_of_a_file(flags, tmp_path, capsys):
    names = face_tree.CLASSES
    rows = [[abs(i - j) for j in range(7)] for i in range(7)]
    table = tmp_path / "d.csv"
    table.write_text("\n".join([",".join(["class", *names]), *(
        ",".join([name, *map(str, row)]) for name, row in zip(names, rows))]) + "\n")
    opt = train_FER.parse_option([str(f) for f in (*flags, "--save_path", "s", "--wloss_alpha", .1,
                                                   "--wloss_distance", table)])
    distance = train_FER.set_distance(opt, names, torch.device("cpu"))
    torch.testing.assert_close(distance[0], torch.arange(7, dtype=torch.float64) / 21)
    table.write_text(table.read_text().replace("fear,1,0", "fear,1,3"))
    assert "0 to itself" in refused(capsys, *flags, "--save_path", tmp_path / "r", "--wloss_alpha",
                                    .1, "--wloss_distance", table)


def test_a_run_folder_that_exists_is_not_entered(flags, tmp_path, capsys):
    train(*flags, "--save_path", tmp_path, "--epochs", 1)
    assert "go on with --resume auto" in refused(capsys, *flags, "--save_path", tmp_path,
                                                 "--epochs", 1)
    said = refused(capsys, *flags, "--save_path", tmp_path, "--epochs", 1, "--resume", "auto",
                   "--label_smoothing", .3)
    assert "--label_smoothing 0.1 there, 0.3 here" in said
