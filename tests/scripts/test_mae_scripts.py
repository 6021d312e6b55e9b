"""The scripts of MAE-SFER: flags, files, what a run goes on from, results, bad input."""
import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import face_tree
import numpy as np
import pytest
import runs
import torch
from conftest import save_image, script
from forked import ranked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation import finetuning, measures, pictures, pretraining
from images import faces
from models import convnextv2, files, mae
from training import checkpoint, devices, epochs, record
from training import faces as training_faces

VIT, NEXT = "main_pretrain", "main_pretrain_convnextv2"
TUNE, AFFECTNET = "main_finetune", "main_finetune_affectnet"
N_TRAIN, N_TEST = 42, 14
ROOT = Path(__file__).parents[2]


def call(name, *argv):
    return script(name).main([str(part) for part in argv])


def refused(capsys, name, *argv):
    return runs.refused(capsys, lambda: call(name, *argv))


@pytest.fixture
def parsed(monkeypatch):
    """parsed(script, *flags) → the options of a run that does not begin."""
    def parse(name, *argv):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "pretrain", lambda opt, *_: seen.append(opt))
            patch.setattr(finetuning, "finetune", lambda opt, *_: seen.append(opt))
            call(name, *argv)
        return seen[0]
    return parse


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """The smallest networks are smaller still, and so are the pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "SHOWN", 3)
        patch.setitem(mae.SIZES, "vit_tiny_patch16", (32, 2, 2))
        patch.setitem(convnextv2.SIZES, "convnextv2_atto", ((1, 1, 2, 1), (8, 16, 24, 32)))
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    face_tree.write(folder, N_TRAIN, N_TEST)
    return folder


QUICK = ["--input_size", 64, "--cache", "off", "--device", "cpu", "--num_workers", 1]


def pretraining_flags(data, kind=VIT):
    return ["--model", "mae_vit_tiny_patch16" if kind == VIT else "convnextv2_atto", *QUICK,
            "--data_path", data, "--batch_size", 8, "--accum_iter", 2, "--epochs", 4,
            "--decoder_depth", 1, "--decoder_embed_dim", 32, "--save_ckpt_freq", 2, "--blr", .1]


def tuning_flags(data, kind=VIT):
    return ["--model", "mae_vit_tiny_patch16" if kind == VIT else "convnextv2_atto", *QUICK,
            "--data_path", data, "--batch_size", 6, "--epochs", 2, "--lr", 1e-3]


@pytest.fixture(scope="module")
def before(tree, tmp_path_factory):
    """{script: folder of its run on all images of the tree}, the pictures drawn."""
    folders = {}
    for kind in (VIT, NEXT):
        folders[kind] = tmp_path_factory.mktemp("before") / "run"
        call(kind, *pretraining_flags(tree, kind), "--output_dir", folders[kind])
    return folders


@pytest.fixture(scope="module")
def tuned(tree, before, tmp_path_factory):
    """(flags, folder) of a run of fine-tuning from `before`, of each kind."""
    found = {}
    for kind, more in ((VIT, ["--accum_iter", 2, "--mixup", .8, "--cutmix", 1, "--model_ema",
                              "--model_ema_decay", "auto", "--model_ema_eval"]),
                       (NEXT, ["--update_freq", 2, "--layer_decay_type", "group", "--layer_decay",
                               .6, "--select", "val", "--val_fraction", .3, "--drop_path", .1])):
        folder = tmp_path_factory.mktemp("tuned") / "tuned_run"
        flags = [*tuning_flags(tree, kind), "--finetune", before[kind] / "checkpoint-3.pth", *more]
        call(TUNE, *flags, "--output_dir", folder)
        found[kind] = flags, folder
    return found


def results(run):
    return json.loads((run / "results.json").read_text())


def lines_of(run):
    return [{name: value for name, value in line.items() if name != "images_per_second"}
            for line in record.read_log(run)[1:]]


# ---------------------------------------------------------------- flags

# as the method's own page has them
COMMANDS = [
    (VIT, f"--model mae_vit_{size}_patch16 --batch_size 32 --accum_iter 4 --mask_ratio 0.75 "
          "--blr 1.5e-4 --epochs 300 --warmup_epochs 40 --weight_decay 0.05 --data_path "
          f"AFFECTNET/Manually_Annotated_Images --output_dir ./out_dir_{size}",
     {"model": f"mae_vit_{size}_patch16", "learning_rate": 7.5e-5, "accum_iter": 4, "epochs": 300,
      "save_path": f"./out_dir_{size}"}) for size in ("base", "small", "tiny")] + [
    (NEXT, "--model convnextv2_base --batch_size 64 --update_freq 8 --blr 1.5e-4 --epochs 400 "
           "--warmup_epochs 40 --data_path AFFECTNET/Manually_Annotated_Images --output_dir "
           "./out_dir_base_1",
     {"learning_rate": 3e-4, "accum_iter": 8, "mask_ratio": .6, "norm_pix_loss": True}),
    (AFFECTNET, "--model mae_vit_base_patch16 --batch_size 16 --accum_iter 2 --blr 5e-4 "
                "--layer_decay 0.65 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 "
                "--cutmix 1.0 --epochs 100 --finetune out_dir_base/checkpoint-299.pth",
     {"learning_rate": 6.25e-5, "layer_decay": .65, "mixup": .8, "cutmix": 1, "warmup_epochs": 5,
      "dataset": "affectnet7", "data_folder": "AffectNet", "min_lr": 1e-6,
      "finetune": "out_dir_base/checkpoint-299.pth"}),
    (TUNE, "--model convnextv2_base --batch_size 32 --update_freq 4 --blr 6.25e-4 --epochs 100 "
           "--warmup_epochs 20 --layer_decay_type group --layer_decay 0.6 --weight_decay 0.05 "
           "--drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --model_ema "
           "True --model_ema_eval True --use_amp True --data_path RAF-DB/basic --finetune "
           "out_dir_base_1/checkpoint-320.pth",
     {"learning_rate": 3.125e-4, "layer_decay_type": "group", "model_ema": True,
      "model_ema_eval": True, "model_ema_decay": .9999, "amp": True, "label_smoothing": .1,
      "dataset": "rafdb", "data_folder": "RAF-DB/basic"})]


@pytest.mark.parametrize("name, line, expected", COMMANDS)
@pytest.mark.parametrize("launched", [[], ["--local-rank=0"], ["--local_rank", "0"]])
def test_published_command_lines_are_taken_as_they_stand(parsed, name, line, expected, launched):
    opt = parsed(name, *launched, *shlex.split(line))
    for flag, value in expected.items():
        assert getattr(opt, flag) == pytest.approx(value), flag
    assert opt.resume == "auto" and not hasattr(opt, "local_rank")


SHARED = {"batch_size": 64, "accum_iter": 1, "weight_decay": .05, "size": 224, "num_workers": 10,
          "seed": 0, "device": "auto", "amp": None, "cache": "data/cache", "resume": "auto",
          "save_path": "./output_dir", "tb_path": "./output_dir"}
PRETRAIN = {"min_lr": 0, "warmup_epochs": 40, "save_ckpt_freq": 20, "save_ckpt_num": 0,
            "decoder_embed_dim": 512}
FINETUNE = {"min_lr": 1e-6, "label_smoothing": .1, "reprob": .25, "remode": "pixel", "recount": 1,
            "aa": "rand-m9-mstd0.5-inc1", "mixup": 0, "cutmix": 0, "mixup_prob": 1,
            "mixup_switch_prob": .5, "mixup_mode": "batch", "cutmix_minmax": None,
            "clip_grad": None, "model_ema": False, "model_ema_decay": .9999,
            "model_ema_eval": False, "layer_decay_type": "single", "save_ckpt_freq": 1,
            "save_ckpt_num": 3, "nb_classes": None, "finetune": "", "eval": False,
            "global_pool": True, "val_fraction": .1, "select": "last", "tricks": False}


@pytest.mark.parametrize("name, more, expected", [
    (VIT, ["--data_path", "d"], {**PRETRAIN, "model": "mae_vit_base_patch16", "epochs": 400,
                                 "mask_ratio": .75, "decoder_depth": 8, "norm_pix_loss": False,
                                 "blr": 1e-3, "learning_rate": 2.5e-4}),
    (NEXT, ["--data_path", "d"], {**PRETRAIN, "model": "convnextv2_base", "epochs": 800,
                                  "mask_ratio": .6, "decoder_depth": 1, "norm_pix_loss": True,
                                  "blr": 1.5e-4, "learning_rate": 3.75e-5}),
    (TUNE, ["--data_path", "d"], {
        **FINETUNE, "dataset": "rafdb", "epochs": 50, "blr": 1e-3, "warmup_epochs": 5,
        "layer_decay": .75, "drop_path": .1}),
    (AFFECTNET, [], {
        **FINETUNE, "dataset": "affectnet7", "data_folder": "AffectNet", "epochs": 50,
        "blr": 1e-3, "warmup_epochs": 5, "layer_decay": .75, "drop_path": .1}),
    (TUNE, ["--data_path", "d", "--model", "convnextv2_tiny"], {
        **FINETUNE, "epochs": 100, "blr": 5e-4, "warmup_epochs": 20, "layer_decay": 1,
        "drop_path": 0})])
def test_defaults_are_the_published_ones(parsed, name, more, expected):
    opt = parsed(name, *more)
    for flag, value in (SHARED | expected).items():
        assert getattr(opt, flag) == value, flag


@pytest.mark.parametrize("flags, expected", [
    (["--update_freq", 3], {"accum_iter": 3}), (["--accum_iter", 3], {"accum_iter": 3}),
    (["--norm_pix_loss"], {"norm_pix_loss": True}),
    (["--norm_pix_loss", "False"], {"norm_pix_loss": False}),
    (["--no_norm_pix_loss"], {"norm_pix_loss": False}),
    (["--no_norm_pix_loss", "True"], {"norm_pix_loss": False}),
    (["--no_norm_pix_loss", "False"], {"norm_pix_loss": True}),
    (["--amp", "False"], {"amp": False}), (["--use_amp", "true"], {"amp": True}),
    (["--auto_resume", "False"], {"resume": None}),
    (["--auto_resume", "False", "--resume", "x.pth"], {"resume": "x.pth"}),
    (["--epochs", 8], {"warmup_epochs": 2}), (["--lr", .1], {"learning_rate": .1, "blr": None}),
    (["--log_dir", "l"], {"tb_path": "l"}), (["--output_dir", "o"], {"tb_path": "o"})])
@pytest.mark.parametrize("kind", [VIT, NEXT])
def test_flags_of_pretraining(parsed, kind, flags, expected):
    opt = parsed(kind, "--data_path", "d", *flags)
    for name, value in expected.items():
        assert getattr(opt, name) == value


@pytest.mark.parametrize("flags, expected", [
    (["--model_ema"], {"model_ema": True}), (["--model_ema", "0"], {"model_ema": False}),
    (["--model_ema", "--model_ema_eval", "on"], {"model_ema_eval": True}),
    (["--cls_token"], {"global_pool": False}), (["--cls_token", "False"], {"global_pool": True}),
    (["--cls_token", "True"], {"global_pool": False}), (["--global_pool"], {"global_pool": True}),
    (["--global_pool", "False"], {"global_pool": False}), (["--tricks", "True"], {"tricks": True}),
    (["--oversample", "False"], {"oversample": False}), (["--tta_flip"], {"tta_flip": True}),
    (["--cutmix_minmax", .2, .8], {"cutmix_minmax": [.2, .8]}),
    (["--model_ema", "--model_ema_decay", "auto"], {"model_ema_decay": "auto"}),
    (["--aa", "none"], {"aa": "none"})])
def test_flags_of_fine_tuning(parsed, flags, expected):
    opt = parsed(TUNE, "--data_path", "d", *flags)
    for name, value in expected.items():
        assert getattr(opt, name) == value


@pytest.mark.parametrize("name", [VIT, NEXT, TUNE, AFFECTNET])
def test_flags_that_do_nothing_are_named(parsed, capsys, name):
    opt = parsed(name, "--data_path", "d", "--world_size", 4, "--dist_url", "env://",
                 "--dist_on_itp", "--dist_eval", "True", "--pin_mem", "True", "--no_pin_mem",
                 "--local_rank", 0)
    printed = capsys.readouterr().out
    for flag in ("--world_size", "--dist_url", "--dist_on_itp", "--dist_eval", "--pin_mem",
                 "--no_pin_mem"):
        assert printed.count(f"{flag}: ignored: ") == 1
        assert not hasattr(opt, flag[2:])
    assert vars(opt) == vars(parsed(name, "--data_path", "d"))


@pytest.mark.parametrize("name", [VIT, NEXT, TUNE, AFFECTNET])
def test_help_names_every_flag_once(capsys, name):
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--accum_iter N, --update_freq N" in printed
    for flag in ("--data_path", "--blr", "--input_size", "--output_dir", "--seed"):
        assert sum(line.startswith(f"  {flag} ") for line in printed.splitlines()) == 1, flag
    assert "--world_size" not in printed


# ---------------------------------------------------------------- pre-training

@pytest.mark.parametrize("kind", [VIT, NEXT])
def test_pretraining_leaves_its_files(before, kind, tree):
    run = before[kind]
    assert {path.name for path in run.glob("*.pth")} == {
        "checkpoint-0.pth", "checkpoint-2.pth", "checkpoint-3.pth", "last.pth"}
    assert [checkpoint.load(run / f"checkpoint-{i}.pth")["epoch"] for i in (0, 2, 3)] == [1, 3, 4]
    assert runs.states_differ(run / "last.pth", run / "checkpoint-3.pth") == []
    state = checkpoint.load(run / "last.pth")
    assert len(state["seen_images"]["any"]) == N_TRAIN + N_TEST and not len(state["lost"])
    header, *lines = record.read_log(run)
    assert header["opt"]["learning_rate"] == pytest.approx(.1 * 16 / 256)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    for name in ("curves.png", "reconstructions.png"):
        assert (run / name).stat().st_size > 5000
    assert {"train_loss", "learning_rate", "images_per_second"} <= runs.curves(run).keys()
    reader = EventAccumulator(str(run)).Reload()
    shown = reader.Images("reconstructions")
    assert [image.step for image in shown] == [1, 3, 4]
    assert (shown[0].width, shown[0].height) == (3 * 64, 4 * 64)
    assert (kind == NEXT) == any("grn" in name for name in state["model"])


def test_of_many_checkpoints_the_latest_are_kept(tree, tmp_path):
    call(VIT, *pretraining_flags(tree), "--epochs", 3, "--save_ckpt_freq", 1, "--save_ckpt_num", 2,
         "--output_dir", tmp_path)
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "checkpoint-1.pth", "checkpoint-2.pth", "last.pth"}


def test_a_finished_run_has_nothing_left_to_do(before, tree, capsys):
    run = before[VIT]
    old = {path.name: path.read_bytes() for path in (*run.glob("*.pth"), run / "log.jsonl")}
    call(VIT, *pretraining_flags(tree), "--output_dir", run)
    assert "goes on after epoch 4" in capsys.readouterr().out
    assert old == {path.name: path.read_bytes()
                   for path in (*run.glob("*.pth"), run / "log.jsonl")}
    said = refused(capsys, VIT, *pretraining_flags(tree), "--output_dir", run, "--mask_ratio", .5)
    assert "--mask_ratio 0.75 there, 0.5 here; give another --output_dir" in said
    said = refused(capsys, VIT, *pretraining_flags(tree), "--output_dir", run, "--input_size", 32)
    assert "--input_size 64 there, 32 here" in said
    said = refused(capsys, VIT, *pretraining_flags(tree), "--output_dir", run, "--auto_resume",
                   "False")
    assert "--output_dir" in said and "exists" in said


@pytest.mark.parametrize("kept", ["checkpoint-1.pth", "results.json"])
def test_what_another_run_left_is_not_written_over(before, tree, tmp_path, capsys, kept):
    run, start = tmp_path / "r", tmp_path / "r" / "checkpoint-1.pth"
    run.mkdir()
    (run / kept).write_bytes((before[VIT] / "checkpoint-3.pth").read_bytes())
    old = (run / kept).read_bytes()
    said = refused(capsys, TUNE, *tuning_flags(tree), "--output_dir", run, "--finetune",
                   start if start.exists() else before[VIT] / "checkpoint-3.pth")
    assert f"holds {kept}, and no last.pth to go on from; give another --output_dir" in said
    assert [path.name for path in run.iterdir()] == [kept] and (run / kept).read_bytes() == old
    shutil.copy(before[VIT] / "log.jsonl", run)
    said = refused(capsys, TUNE, *tuning_flags(tree), "--output_dir", run)
    assert "log.jsonl: cannot be resumed with other options" in said
    assert (run / kept).read_bytes() == old


def test_a_run_that_was_killed_between_its_first_two_files_starts_anew(before, tree, tmp_path):
    shutil.copytree(before[VIT], tmp_path / "r")
    for name in ("checkpoint-2.pth", "checkpoint-3.pth", "last.pth"):
        (tmp_path / "r" / name).unlink()
    call(VIT, *pretraining_flags(tree), "--output_dir", tmp_path / "r")
    ours, theirs = (checkpoint.load(run / "last.pth")["model"]
                    for run in (tmp_path / "r", before[VIT]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_whose_last_file_is_gone_is_not_trained_over(before, tree, tmp_path,
                                                                    capsys):
    shutil.copytree(before[VIT], tmp_path / "r")
    (tmp_path / "r/last.pth").unlink()
    old = {path.name: path.read_bytes() for path in tmp_path.glob("r/*") if path.is_file()}
    flags = [*pretraining_flags(tree), "--output_dir", tmp_path / "r"]
    said = refused(capsys, VIT, *flags)
    assert "holds checkpoint-2.pth, and no last.pth to go on from; give --resume " in said
    assert f"{tmp_path}/r/checkpoint-3.pth, or another --output_dir" in said
    assert old == {path.name: path.read_bytes() for path in tmp_path.glob("r/*")
                   if path.is_file()}
    call(VIT, *flags, "--resume", tmp_path / "r/checkpoint-3.pth")
    assert "goes on after epoch 4" in capsys.readouterr().out


def test_going_on_from_an_earlier_epoch_removes_no_later_checkpoint(tmp_path):
    opt = argparse.Namespace(save_ckpt_freq=1, save_ckpt_num=2, epochs=9)
    for number in (2, 6, 7):
        torch.save({}, tmp_path / f"checkpoint-{number}.pth")
    for epoch in (4, 5):
        checkpoint.save_counted(tmp_path / "last.pth", {"epoch": epoch, "within": {}}, opt)
    assert sorted(path.name for path in tmp_path.glob("check*")) == [
        f"checkpoint-{number}.pth" for number in (3, 4, 6, 7)]


def struck(stop):
    """A Keeper.step that is told to stop at so many steps."""
    look, count = epochs.Keeper.step, []

    def step(self, save):
        count.append(1)
        if len(count) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        look(self, save)
    return step


@pytest.mark.parametrize("kind, stop", [(VIT, 5), (NEXT, 8)])
def test_pretraining_that_was_stopped_goes_on_to_the_same(before, tree, tmp_path, monkeypatch,
                                                          kind, stop):
    flags = [*pretraining_flags(tree, kind), "--output_dir", tmp_path, "--save_minutes", 0]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(epochs.Keeper, "step", struck(stop))
        call(kind, *flags)
    assert end.value.code == 143
    assert checkpoint.load(tmp_path / "last.pth")["within"]["step"] == stop % 3  # 3 an epoch
    call(kind, *flags)
    for i in (0, 2, 3):
        assert runs.states_differ(*(run / f"checkpoint-{i}.pth" for run in (
            before[kind], tmp_path))) == []
    assert lines_of(before[kind]) == lines_of(tmp_path)


def drawn_images(folder, n, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        save_image(folder / f"{seed}_{i}.png", rng.integers(0, 256, (70, 70, 3), np.uint8))


def test_images_of_train_alone_are_read_and_what_cannot_be_is_named(tmp_path, capsys):
    drawn_images(tmp_path / "d/train/deep/er", 17)
    drawn_images(tmp_path / "d/val", 5, 1)
    (tmp_path / "d/train/0_broken.png").write_bytes(b"nothing")
    call(VIT, *pretraining_flags(tmp_path / "d"), "--epochs", 2, "--batch_size", 3, "--output_dir",
         tmp_path / "r", "--cache", tmp_path / "cache")
    printed = capsys.readouterr()
    assert "18 images below" in printed.out and "reconstructions.png" in printed.out
    assert printed.err.count("left out: ") == 1 and "0_broken.png" in printed.err
    state = checkpoint.load(tmp_path / "r/last.pth")
    assert state["lost"].tolist() == [0] and len(state["seen_images"]["any"]) == 18
    assert len(list((tmp_path / "cache").glob("*.ready.npy"))) == 1


def test_images_of_which_none_can_be_read_are_refused(tmp_path, capsys):
    for i in range(16):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / f"d/{i}.png").write_bytes(b"nothing")
    said = refused(capsys, VIT, *pretraining_flags(tmp_path / "d"), "--output_dir", tmp_path / "r")
    assert said == (f"error: {tmp_path / 'd'}: none of its 16 images can be read; give another "
                    f"--data_path")
    assert not list((tmp_path / "r").glob("*.pth"))


def test_training_images_of_which_none_can_be_read_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        drawn_images(tmp_path / "d/test" / name, 2)
        (tmp_path / "d/train" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / f"d/train/{name}/{i}.png").write_bytes(b"nothing")
    said = refused(capsys, TUNE, *tuning_flags(tmp_path / "d"), "--data_set", "folder",
                   "--val_fraction", 0, "--batch_size", 4, "--output_dir", tmp_path / "r")
    assert "none of its 8 training images can be read" in said
    assert not list((tmp_path / "r").glob("*.pth"))


def test_a_derived_rate_below_the_least_stays(parsed):
    opt = parsed(TUNE, "--data_set", "rafdb", "--data_path", "R", "--blr", 1e-6, "--batch_size", 4)
    assert opt.learning_rate < 1e-6 and opt.min_lr == opt.learning_rate


def test_reconstructions_show_what_is_hidden_and_what_is_seen():
    torch.manual_seed(0)
    network = mae.MAE(32, 2, 2, 64, decoder_depth=1, decoder_embed_dim=32)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    inputs = pretraining.crops.Recipe(64, .2).eval(pixels)
    for network.norm_pix_loss in (False, True):
        rows = pretraining.reconstructions(network, inputs, .75)
        assert {part.shape for part in rows.values()} == {(3, 3, 64, 64)}
        assert np.array_equal(rows["image"], pixels.numpy())
        grey = np.array([124, 116, 104], np.uint8)[:, None, None]  # ImageNet's mean
        hidden = (rows["masked"] == grey).all(1)
        assert hidden.mean() == pytest.approx(.75, abs=1e-3)
        hidden = np.broadcast_to(hidden[:, None], rows["both"].shape)
        assert np.array_equal(rows["both"][~hidden], rows["image"][~hidden])
        assert np.array_equal(rows["both"][hidden], rows["reconstruction"][hidden])
        assert not np.array_equal(rows["both"][hidden], rows["image"][hidden])


# ---------------------------------------------------------------- fine-tuning

def test_a_fine_tuned_transformer_leaves_its_results(tuned, tree):
    _, run = tuned[VIT]
    content, state = results(run), checkpoint.load(run / "last.pth")
    assert content["n"] == N_TEST and content["classes"] == list(face_tree.CLASSES)
    assert content["transductive"] is True and content["protocol"]
    assert {"uf1", "uar", "accuracy"} <= content["average"].keys()
    assert all(0 <= content["average"][name] <= 1 for name in ("uf1", "uar", "accuracy"))
    assert len(runs.rows(run)) == N_TEST
    for name in ("features.png", "confusion.png", "mistakes.png", "curves.png"):
        assert (run / name).stat().st_size > 1000
    for line in lines_of(run):
        assert {"train_loss", "val_uf1", "ema_val_uf1", "ema_val_accuracy"} <= line.keys()
    assert {path.name for path in run.glob("*.pth")} == {
        "checkpoint-0.pth", "checkpoint-1.pth", "last.pth"}
    assert state["system"] == "MAE" and state["beside"] is True
    assert {"ema_val_uf1", "val_uf1", "train_loss"} <= runs.curves(run).keys()


def test_the_average_is_evaluated_and_not_the_model(tuned, tree):
    """Its figures are those of a network that has the average's weights."""
    _, run = tuned[VIT]
    state = checkpoint.load(run / "last.pth")
    opt = argparse.Namespace(**state["opt"])
    images = faces.read_faces("rafdb", tree)["test"]
    source, said = finetuning.source_of(opt, images), []
    for weights in (state["ema"], state["model"]):
        network = finetuning.create_network(opt, len(face_tree.CLASSES))
        network.load_state_dict({name.removeprefix("module."): value
                                 for name, value in weights.items()})
        said.append(training_faces.predict(network, source, np.arange(N_TEST),
                                           devices.mixed_precision(False, torch.device(
                                               "cpu")).autocast, opt.tta_flip)[1])
    sides = [training_faces.predict(network, source, np.arange(5), torch.no_grad, flip).features
             for flip in (False, True)]  # of the image itself
    with torch.no_grad():
        own = network.embed(source.plain_inputs(np.arange(5), torch.from_numpy(source.images[:5])))
    for features in sides:
        np.testing.assert_allclose(features, own.numpy(), atol=1e-5)
    average, model = said
    scores = measures.evaluate(images.labels, average.argmax(1), len(face_tree.CLASSES))
    for name in ("uf1", "uar", "accuracy"):
        assert results(run)["average"][name] == pytest.approx(scores[name])
    assert np.abs(average - model).max() > 1e-4
    rows = [[float(row[f"p_{i}"]) for i in range(len(face_tree.CLASSES))] for row in runs.rows(run)]
    assert np.abs(np.array(rows) - model).max() < 2e-5


def test_little_of_the_initial_weights_is_left_in_an_average(tuned, capsys):
    opt = argparse.Namespace(**checkpoint.load(tuned[VIT][1] / "last.pth")["opt"])
    average = finetuning.set_average(opt, torch.nn.Linear(1, 1), 38)
    printed = capsys.readouterr().out
    steps = 2 * (38 // 6 // 2)
    assert f"after {steps} steps" in printed
    share = average.decay ** steps
    assert share < .01 and float(printed.split(" steps ")[1].split()[0]) == pytest.approx(
        share, rel=.05)


def test_a_fine_tuned_convnext_leaves_its_results(tuned):
    _, run = tuned[NEXT]
    content, state = results(run), checkpoint.load(run / "last.pth")
    assert content["transductive"] is True and "average" not in content
    best = max(lines_of(run), key=lambda line: line["val_uf1"])
    assert state["best"]["value"] == pytest.approx(best["val_uf1"])
    assert state["best"]["epoch"] == best["epoch"]
    assert content["choices"] == {"test": {"epochs": best["epoch"], "val_uf1": best["val_uf1"]}}
    scales = {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
    # a stage has one block or two here
    assert sorted(scales) == pytest.approx([.6 ** (13 - i) for i in (0, 1, 2, 3, 12, 13)])


@pytest.mark.parametrize("kind", [VIT, NEXT])
def test_evaluation_repeats_the_predictions(tuned, kind, tmp_path, capsys, monkeypatch):
    flags, run = tuned[kind]
    old = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    data = flags[flags.index("--data_path") + 1]  # all else stands in the checkpoint
    drawn, panels = [], pictures.face_panels
    monkeypatch.setattr(pictures, "face_panels", lambda faces, maps: (
        drawn.append(faces.shape), panels(faces, maps))[1])
    call(TUNE, "--data_path", data, "--cache", "off", "--eval", "--resume", run / "last.pth",
         "--output_dir", tmp_path / "again")
    state = checkpoint.load(run / "last.pth")
    size = state["opt"]["size"]  # maps lie over what the network saw, not over the stored images
    assert [shape[1:] for shape in drawn] == [(3, size, size)]
    chosen = f"weights of epoch {state['best']['epoch']}, the best of the {state['epoch']} until"
    assert (chosen in capsys.readouterr().out) == (state["opt"]["select"] == "val") == (
        kind == NEXT)
    assert (tmp_path / "again/predictions.csv").read_bytes() == (
        run / "predictions.csv").read_bytes()
    again, first = results(tmp_path / "again"), results(run)
    for name in ("uf1", "accuracy", "confusion", "transductive"):
        assert again[name] == first[name]
    assert again.get("average") == first.get("average")
    assert not list((tmp_path / "again").glob("*.pth"))
    assert old == {path.name: path.read_bytes() for path in run.glob("*.pth")}
    (tmp_path / "other.pth").write_bytes((run / "last.pth").read_bytes())
    kept = (run / "results.json").read_bytes()
    evaluation = ["--data_path", data, "--cache", "off", "--eval", "--resume",
                  tmp_path / "other.pth"]
    assert "its results are those of its last.pth" in refused(capsys, TUNE, *evaluation,
                                                              "--output_dir", run)
    assert (run / "results.json").read_bytes() == kept
    call(TUNE, *evaluation, "--tta_flip", "--output_dir", tmp_path / "mirrored")
    assert (tmp_path / "mirrored/predictions.csv").read_bytes() != (
        run / "predictions.csv").read_bytes()


def test_evaluation_asks_for_no_rate_of_other_ranks(tmp_path, monkeypatch):
    """A rate that followed from --blr on three ranks is none of the one that evaluates."""
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "3")
        opt = finetuning.parse_option("", ["--data_path", "d", "--blr", ".1"], "rafdb", None)
    torch.save({"system": "MAE", "opt": vars(opt), "epoch": 1, "model": {}}, tmp_path / "m.pth")
    again = finetuning.parse_option("", ["--data_path", "d", "--eval", "--resume", str(
        tmp_path / "m.pth")], "rafdb", None)
    assert again.learning_rate == opt.learning_rate == pytest.approx(.1 * 3 * 64 / 256)


def test_a_run_is_gone_on_from_by_the_weights_that_predicted_with_a_new_head(tuned):
    flags, run = tuned[NEXT]
    chosen = torch.load(run / "last.pth", weights_only=True)["best"]["model"]
    opt = finetuning.parse_option("", [str(flag) for flag in (
        *flags, "--finetune", run / "last.pth")], "rafdb", None)
    network = finetuning.set_model(opt, len(chosen["head.bias"]), torch.device("cpu"),
                                   files.read(opt.finetune))
    for name, value in network.state_dict().items():
        # of as many classes, but perhaps others
        assert torch.equal(value, chosen[name]) != name.startswith("head."), name


def test_a_longer_run_of_derived_warm_up_goes_on(tree, tmp_path, capsys):
    call(VIT, *pretraining_flags(tree, VIT), "--output_dir", tmp_path / "r", "--epochs", 1)
    call(VIT, *pretraining_flags(tree, VIT), "--output_dir", tmp_path / "r", "--epochs", 2)
    assert [line["epoch"] for line in record.read_log(tmp_path / "r")[1:]] == [1, 2]
    said = refused(capsys, VIT, *pretraining_flags(tree, VIT), "--output_dir", tmp_path / "r",
                   "--epochs", 3, "--warmup_epochs", 0)
    assert "--warmup_epochs 0.5 there, 0.0 here" in said


def test_a_run_of_other_ranks_or_of_another_folder_is_not_gone_on_with(before, tree, tmp_path,
                                                                       capsys):
    shutil.copytree(before[VIT], tmp_path / "r")
    last = tmp_path / "r" / "last.pth"
    checkpoint.save(last, checkpoint.load(last) | {"ranks": 4})
    flags = [*pretraining_flags(tree, VIT), "--output_dir"]
    assert "4 ranks there, 1 here" in refused(capsys, VIT, *flags, tmp_path / "r", "--resume",
                                              "auto")
    other = tmp_path / "other"
    shutil.copytree(before[VIT], other)
    log = (other / "log.jsonl").read_text()
    (other / "log.jsonl").write_text(log.replace('"mask_ratio": 0.75', '"mask_ratio": 0.5'))
    kept = {path: path.read_bytes() for path in other.iterdir()}
    said = refused(capsys, VIT, *flags, other, "--resume", before[VIT] / "last.pth")
    assert "other/log.jsonl: cannot be resumed with other options" in said
    assert "--mask_ratio 0.5 there, 0.75 here; give another --output_dir" in said
    assert kept == {path: path.read_bytes() for path in other.iterdir()}


def test_fine_tuning_that_was_stopped_goes_on_to_the_same(tuned, tmp_path, monkeypatch):
    flags, run = tuned[VIT]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(epochs.Keeper, "step", struck(3))
        call(TUNE, *flags, "--output_dir", tmp_path, "--save_minutes", 0)
    assert end.value.code == 143
    call(TUNE, *flags, "--output_dir", tmp_path)
    assert runs.states_differ(run / "last.pth", tmp_path / "last.pth") == []
    assert (run / "predictions.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    assert lines_of(run) == lines_of(tmp_path)


def test_what_the_start_saw_is_told(tree, before, tmp_path, capsys):
    call(TUNE, *tuning_flags(tree), "--epochs", 1, "--output_dir", tmp_path / "scratch",
         "--tricks", "--tta_flip", "--oversample", "--cls_token")
    assert results(tmp_path / "scratch")["transductive"] is False
    public = tmp_path / "public.pth"
    torch.save({"model": checkpoint.load(before[VIT] / "last.pth")["model"]}, public)
    call(TUNE, *tuning_flags(tree), "--epochs", 1, "--finetune", public, "--output_dir",
         tmp_path / "public")
    assert results(tmp_path / "public")["transductive"] is None
    printed = capsys.readouterr().out
    assert f"--finetune {public}: 28 of 32 tensors loaded, not fc_norm.bias, " in printed
    for again, expected in ((before[VIT], True), (tmp_path / "scratch", False)):
        first = tmp_path / f"first_{expected}"
        call(TUNE, *tuning_flags(tree), "--epochs", 1, "--finetune", again / "last.pth",
             "--output_dir", first, *["--cls_token"] * (not expected))
        assert results(first)["transductive"] is expected
        call(TUNE, *tuning_flags(tree), "--epochs", 1, "--finetune", first / "last.pth",
             "--output_dir", tmp_path / f"second_{expected}", *["--cls_token"] * (not expected))
        assert results(tmp_path / f"second_{expected}")["transductive"] is expected
    said = refused(capsys, TUNE, *tuning_flags(tree), "--finetune", first / "last.pth",
                   "--output_dir", tmp_path / "r", "--seed", 5, "--select", "val", "--cls_token")
    assert "images that now are to choose" in said
    said = refused(capsys, TUNE, *tuning_flags(tree), "--finetune", tmp_path / "first_True" /
                   "last.pth", "--output_dir", tmp_path / "r", "--cls_token")
    assert "it takes the mean of the patches: leave out --cls_token" in said


def test_a_start_that_saw_other_images_saw_no_test_image(tree, before, tmp_path):
    images = faces.read_unlabelled(tree)
    state = torch.load(before[VIT] / "last.pth", weights_only=False)
    prints = faces.fingerprints(images)
    assert np.array_equal(state["seen_images"]["any"].numpy(), prints)
    chosen = np.array(["test_" in path for path in images.paths])
    for seen, expected in ((prints[~chosen], False), (prints, True)):
        state["seen_images"]["any"] = torch.from_numpy(seen)
        torch.save(state, tmp_path / "s.pth")
        call(TUNE, *tuning_flags(tree), "--epochs", 1, "--finetune", tmp_path / "s.pth",
             "--output_dir", tmp_path / str(expected), "--val_fraction", 0)
        assert results(tmp_path / str(expected))["transductive"] is expected


def test_a_result_stands_beside_one_of_another_system(tuned, tree, tmp_path, capsys):
    call("train_FER", "--dataset", "rafdb", "--data_folder", tree, "--pretrained", "none", "--size",
         32, "--epochs", 1, "--batch_size", 14, "--cache", "off", "--device", "cpu", "--save_path",
         tmp_path)
    fer = runs.only(tmp_path) / "results.json"
    capsys.readouterr()
    call("compare_results", tuned[VIT][1] / "results.json", fer)
    printed = capsys.readouterr().out
    assert "mae_vit_tiny_patch16" in printed and "fer, baseline" in printed
    assert f"{N_TEST}" in printed and "yes" in printed and "permutation" in printed.lower()


# ---------------------------------------------------------------- ranks, mixed precision

@pytest.mark.parametrize("flags", [
    pytest.param(["--model", "vit_tiny_patch16", "--input_size", 32], marks=pytest.mark.slow),
    ["--model", "convnextv2_atto", "--input_size", 32]], ids=["vit", "convnext"])
def test_two_ranks_fine_tune_to_the_weights_of_one(tmp_path, flags):
    """Nothing dropped or mixed, which each rank does by itself."""
    face_tree.write(tmp_path / "set", 24, 7)
    flags = [*flags, "--data_path", tmp_path / "set", "--cache", tmp_path / "cache", "--device",
             "cpu", "--num_workers", 1, "--accum_iter", 2, "--epochs", 1, "--warmup_epochs", 0,
             "--lr", 1e-3, "--drop_path", 0, "--val_fraction", 0, "--head_init_scale", 1]
    for count, size, name in ((1, 8, "one"), (2, 4, "two")):
        ranked(count, TUNE, *flags, "--batch_size", size, "--output_dir", tmp_path / name,
               folder=tmp_path)
    assert "Grad strides" not in (tmp_path / "rank 0 of 2" / "err").read_text()
    one, two = (checkpoint.load(tmp_path / name / "last.pth")["model"] for name in ("one", "two"))
    for name, value in one.items():
        # AdamW's first step goes by the sign of a gradient, however near to 0 it is
        assert ((two[name] - value).abs() > 1e-4).float().mean() < .02, name
    said = [np.array([[float(row[f"p_{i}"]) for i in range(7)] for row in runs.rows(
        tmp_path / name)]) for name in ("one", "two")]
    assert np.abs(said[0] - said[1]).max() < .01


@pytest.mark.slow
def test_two_ranks_pretrain_a_convnext_to_the_loss_of_one(tmp_path):
    drawn_images(tmp_path / "d", 16)
    flags = ["--model", "convnextv2_atto", "--input_size", 64, "--data_path", tmp_path / "d",
             "--cache", tmp_path / "cache", "--device", "cpu", "--num_workers", 1, "--epochs", 2,
             "--warmup_epochs", 0, "--lr", 1e-4, "--decoder_embed_dim", 32]
    for count, size, name in ((1, 8, "one"), (2, 4, "two")):
        ranked(count, NEXT, *flags, "--batch_size", size, "--output_dir", tmp_path / name,
               folder=tmp_path)
    one, two = ([line["train_loss"] for line in lines_of(tmp_path / name)]
                for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4) and one[1] < one[0]


@pytest.mark.parametrize("kind", [VIT, NEXT])
def test_mixed_precision_trains_and_says_so(tree, tmp_path, kind):
    call(TUNE, *tuning_flags(tree, kind), "--use_amp", "True", "--epochs", 1, "--output_dir",
         tmp_path)
    header, line = record.read_log(tmp_path)
    assert header["opt"]["amp"] is True and 0 < line["train_loss"] < 4
    state = checkpoint.load(tmp_path / "last.pth")
    assert {value.dtype for value in state["model"].values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [
    ["torch.distributed.launch", "--nproc_per_node", "2"],
    ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]], ids=lambda part: part[0])
def test_launchers_start_the_scripts(tmp_path, launcher):
    face_tree.write(tmp_path / "set", 24, 7)
    shared = ["--input_size", "64", "--batch_size", "4", "--epochs", "1", "--lr", "1e-3",
              "--device", "cpu", "--num_workers", "1", "--cache", str(tmp_path / "cache"),
              "--data_path", str(tmp_path / "set")]
    for name, more in ((NEXT, []), (TUNE, ["--finetune", tmp_path / NEXT / "checkpoint-0.pth"])):
        subprocess.run([sys.executable, "-m", *launcher, f"{name}.py", "--model",
                        "convnextv2_atto", *shared, *map(str, more), "--output_dir",
                        str(tmp_path / name)], check=True, cwd=ROOT, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert results(tmp_path / TUNE)["n"] == 7


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("kind, more, expected", [
    (VIT, ["--lr", .1], "--lr and --blr exclude each other"),
    (VIT, ["--data_path", "nowhere"], "nowhere: no such folder"),
    (VIT, ["--model", "mae_vit_huge"], "invalid choice"),
    (VIT, ["--mask_ratio", 1], "--mask_ratio"), (VIT, ["--input_size", 100], "a multiple of 16"),
    (NEXT, ["--input_size", 80], "a multiple of 32"),
    (NEXT, ["--input_size", 32], "--mask_ratio: 0.6 of 1 patches leaves none to be seen"),
    (VIT, ["--warmup_epochs", 4], "--warmup_epochs: 4, of 4 --epochs"),
    (VIT, ["--decoder_embed_dim", 40], "--decoder_embed_dim: a multiple of 16"),
    (VIT, ["--batch_size", 40], "a step takes 80 images, with --accum_iter 2 on 1 ranks; there "
                                "are 56"),
    (VIT, ["--min_lr", 3], "--min_lr: 3 is above the rate"),
    (VIT, ["--norm_pix_loss", "perhaps"], "neither True nor False"),
    (VIT, ["--resume", "none.pth"], "none.pth: no such checkpoint"),
    (NEXT, ["--device", "tpu"], "--device tpu: not available")])
def test_bad_flags_of_pretraining_are_refused_in_one_line(tree, tmp_path, capsys, kind, more,
                                                          expected):
    said = refused(capsys, kind, *pretraining_flags(tree, kind), "--output_dir", tmp_path / "r",
                   *more)
    assert expected in said and not list(tmp_path.glob("r/*"))


@pytest.mark.parametrize("kind, more, expected", [
    (VIT, ["--blr", .1], "--lr and --blr exclude each other"),
    (VIT, ["--mixup", .8, "--batch_size", 5], "--batch_size: 5: an even number"),
    (VIT, ["--mixup", .8, "--loss", "balanced"], "--loss balanced takes labels"),
    (VIT, ["--oversample", "--loss", "balanced"], "--oversample excludes --loss balanced"),
    (VIT, ["--nb_classes", 8], "--nb_classes 8: rafdb has 7"),
    (VIT, ["--layer_decay_type", "group"], "group goes with a ConvNeXt V2"),
    (NEXT, ["--cls_token"], "--cls_token goes with a ViT"),
    (NEXT, ["--input_size", 80], "80: a multiple of 32"),
    (VIT, ["--model_ema_eval"], "goes with --model_ema"), (VIT, ["--eval"], "--resume FILE"),
    (VIT, ["--tricks", "--aa", "rand-m9"], "--aa goes with random crops, not --tricks"),
    (VIT, ["--cutmix_minmax", .8, .2], "LOW must be below HIGH"),
    (VIT, ["--mixup_prob", .5], "--mixup_prob goes with --mixup, --cutmix"),
    (VIT, ["--mixup", .8, "--mixup_switch_prob", .2], "--mixup_switch_prob goes with --mixup and"),
    (VIT, ["--reprob", 0, "--recount", 3], "--recount goes with --reprob above 0"),
    (VIT, ["--model_ema_decay", "auto"], "--model_ema_decay goes with --model_ema"),
    (VIT, ["--votes", "plurality"], "--votes goes with --data_set ferplus"),
    (VIT, ["--aa", "rand-x9"], "argument --aa"), (VIT, ["--data_path", "nowhere"], "nowhere"),
    (VIT, ["--finetune", "none.pth"], "none.pth: no such checkpoint"),
    (VIT, ["--finetune", "NEXT"], "not of this network"),
    (NEXT, ["--finetune", "VIT"], "not of this network"),
    (VIT, ["--model", "mae_vit_small_patch16", "--finetune", "VIT"], "not of this network"),
    (VIT, ["--select", "val", "--val_fraction", 0], "--val_fraction above 0"),
    (VIT, ["--eval", "--resume", "VIT"], "not a checkpoint of this script"),
    (VIT, ["--eval", "--resume", "none.pth"], "none.pth: no such checkpoint"),
    (VIT, ["--batch_size", 100], "a step takes 100 images")])
def test_bad_flags_of_fine_tuning_are_refused_in_one_line(tree, before, tmp_path, capsys, kind,
                                                          more, expected):
    more = [before[VIT if part == "VIT" else NEXT] / "last.pth" if part in ("VIT", "NEXT") else part
            for part in more]
    said = refused(capsys, TUNE, *tuning_flags(tree, kind), "--output_dir", tmp_path / "r", *more)
    assert expected in said and not list(tmp_path.glob("r/*.pth"))
