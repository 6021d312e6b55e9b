"""Runs that are stopped or killed anywhere end with the tensors of one that was not."""
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import FIXED, finetune, pretrain, probe, published
from forked import small_crops, start
from runs import load, only, same_predictions, states_differ

import util
from evaluation import descent, result_files, shortcuts
from training import checkpoint, distributed, epochs, record, supervised

pytestmark = pytest.mark.usefixtures("small_crops")
SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """This process gets the signal before the keeper's `step`-th look."""
    look, count = epochs.Keeper.step, []

    def struck(self, save):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), number)
        look(self, save)
    monkeypatch.setattr(epochs.Keeper, "step", struck)


def lines(run):
    """The log's lines but for the header and the timing."""
    return [{k: v for k, v in line.items() if k != "pairs_per_second"}
            for line in record.read_log(run)[1:]]


def same_run(a, b):
    """Checkpoints, curves' values and predictions of two run folders agree bit for bit."""
    assert states_differ(a / "last.pth", b / "last.pth") == []
    same_results(a, b)


def same_results(a, b):
    """Curves' values and predictions agree bit for bit."""
    assert lines(a) == lines(b) and len(lines(a)) > 1
    if (a / "predictions.csv").exists():
        assert (a / "predictions.csv").read_bytes() == (b / "predictions.csv").read_bytes()
    assert not list(b.rglob(".*.part"))


@pytest.mark.parametrize("number, code", SIGNALS)
def test_pretraining_stopped_within_an_epoch_goes_on_from_that_step(drawn, quick, tmp_path,
                                                                    monkeypatch, capsys, number,
                                                                    code):
    flags = ["--data_folder", drawn, *quick, "--batch_size", 4, "--epochs", 2]
    pretrain(*flags, "--model_path", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at(patch, 5, number)
        pretrain(*flags, "--model_path", tmp_path / "part")
    assert end.value.code == code
    assert "error: stopped and saved" in capsys.readouterr().err.splitlines()[-1]
    part = only(tmp_path / "part")
    state = load(part / "last.pth")
    # 11 clips: three steps of 4, 4 and 3 an epoch
    assert (state["epoch"], state["step"], state["within"]["step"]) == (1, 5, 2)
    assert state["within"]["meters"]["rgb_loss"][1] == 8
    pretrain(*flags, "--model_path", tmp_path / "part", "--resume", "auto")
    same_run(only(tmp_path / "whole"), part)


@pytest.mark.parametrize("flags", [
    [], ["--protocol", "10fold", "--warmup_epochs", 1.5, "--lr_schedule", "cosine", "--head",
         "random"]], ids=["loso", "10fold"])
def test_fine_tuning_that_was_stopped_goes_on_to_the_same_result(drawn, quick, pretrained, tmp_path,
                                                                 monkeypatch, capsys, flags):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--batch_size", 4,
             "--epochs", 2, "--subject", "s1", "s2", *flags]
    finetune(*flags, "--save_path", tmp_path / "whole", chosen=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at(patch, 8)
        finetune(*flags, "--save_path", tmp_path / "part", chosen=True)
    assert end.value.code == 143
    (begun,) = only(tmp_path / "part").glob("last_*.pth")
    with pytest.raises(SystemExit) as end:  # it would start anew
        finetune(*flags, "--save_path", tmp_path / "part", chosen=True)
    assert end.value.code == 2 and f"error: {begun}: a training that is not finished; go on with " \
        "--resume auto" in capsys.readouterr().err
    finetune(*flags, "--save_path", tmp_path / "part", "--resume", "auto", chosen=True)
    same_run(only(tmp_path / "whole"), only(tmp_path / "part"))


def heads_of_classes(monkeypatch, before):
    """Calls `before(epoch, task)` before each epoch of heads that tell classes, not subjects,
    apart."""
    train = descent.Descent.epoch

    def watched(self, epoch):
        if self.task.n_label == 2:  # of four subjects
            before(epoch, self.task)
        return train(self, epoch)
    monkeypatch.setattr(descent.Descent, "epoch", watched)


@pytest.mark.parametrize("number, code", SIGNALS)
@pytest.mark.parametrize("run, flags", [
    (finetune, ["--freeze_encoder"]), (finetune, ["--freeze_encoder", "--subject", "s1", "s2"]),
    (probe, ["--protocol", "loso"]), (probe, ["--protocol", "loso", "--select", "inner"])],
    ids=["frozen", "frozen, two", "probe", "inner"])
def test_a_pass_of_heads_that_was_stopped_starts_anew_to_the_same_result(
        drawn, quick, pretrained, tmp_path, monkeypatch, capsys, run, flags, number, code):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--epochs", 5, *flags]
    run(*flags, "--save_path", tmp_path / "whole")

    def struck(epoch, _):
        if epoch == 3:
            os.kill(os.getpid(), number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        heads_of_classes(patch, struck)
        run(*flags, "--save_path", tmp_path / "part")
    assert end.value.code == code
    assert "what was saved is kept" in capsys.readouterr().err.splitlines()[-1]
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    assert len(lines(part)) == 2 and not (part / "subjects").exists()
    trained = []
    with monkeypatch.context() as patch:
        heads_of_classes(patch, lambda epoch, _: trained.append(epoch))
        run(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    assert trained == [1, 2, 3, 4, 5]
    same_results(whole, part)
    # there is nothing to go on from within a pass, and nothing is kept for it
    assert not list(tmp_path.rglob("*.pth"))


def test_a_checkpoint_of_heads_from_an_earlier_release_is_passed_over(drawn, quick, pretrained,
                                                                      tmp_path):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--protocol", "loso",
             "--epochs", 3]
    probe(*flags, "--save_path", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    shutil.rmtree(part / "subjects")
    torch.save({"model": {"weight": torch.zeros(4, 2, 3)}, "opt": {}, "epoch": 2},
               part / "last.pth")
    probe(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    same_results(whole, part)


def test_one_rank_alone_trains_the_model_on_every_clip(drawn, quick, pretrained, tmp_path,
                                                       monkeypatch):
    monkeypatch.setattr(distributed, "first", lambda: False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "group", lambda device: contextlib.nullcontext())
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--subject", "all",
             "--save_path", tmp_path)
    assert not list(tmp_path.rglob("last*.pth"))


def test_subjects_that_another_machine_kept_to_itself_are_missed(drawn, quick, pretrained, tmp_path,
                                                                monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")  # of which this is the first
    monkeypatch.setattr(distributed, "group", lambda device: contextlib.nullcontext())
    with pytest.raises(SystemExit) as end:
        finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--subject", "s1",
                 "s2", "s3", "--freeze_encoder", "--save_path", tmp_path)
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1 held-out subjects of other ranks are not there (s2 the first)" in last
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("place, name", [(shortcuts, "subject_probe"),
                                         (result_files, "write_json")])
def test_finished_subjects_are_not_trained_again_after_a_stop(
        drawn, quick, pretrained, tmp_path, monkeypatch, place, name):
    """Stopped when all heads were trained: before anybody was kept, and after one was."""
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--protocol", "loso",
             "--epochs", 3, "--select", "inner"]
    probe(*flags, "--save_path", tmp_path / "whole")
    done, count = getattr(place, name), []

    def struck(*given, **more):
        count.append(1)
        if len(count) == 2 or name == "subject_probe":
            os.kill(os.getpid(), signal.SIGTERM)
        return done(*given, **more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(place, name, struck)
        probe(*flags, "--save_path", tmp_path / "part")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    finished, trained = [path.stem for path in part.glob("subjects/*")], set()
    assert end.value.code == 143 and finished == ["s1"][:len(count) - 1]
    with monkeypatch.context() as patch:
        heads_of_classes(patch, lambda epoch, task: trained.update(task.held_out))
        probe(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    assert trained == set(range(len(finished), 4))
    if finished:
        assert same_predictions(whole, part)
    else:
        same_results(whole, part)
    assert not list(part.glob("*.pth"))
    a, b = (json.loads((run / "results.json").read_text()) for run in (whole, part))
    assert a["shortcuts"] == b["shortcuts"] and a["choices"] == b["choices"]
    assert a["shortcuts"]["subject"]["n"] == 12


def test_solving_that_was_stopped_goes_on_to_the_same_result(drawn, cache, pretrained, tmp_path,
                                                              monkeypatch):
    flags = ["--data_folder", drawn, "--cache", cache, "--model", "resnet18v1", "--model_path",
             pretrained, "--protocol", "loso"]
    probe(*flags, "--save_path", tmp_path / "whole")
    write, count = result_files.write_json, []

    def struck(*given, **more):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*given, **more)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(result_files, "write_json", struck)
        probe(*flags, "--save_path", tmp_path / "part")
    whole, part = only(tmp_path / "whole"), only(tmp_path / "part")
    assert end.value.code == 143 and len(list(part.glob("subjects/*"))) == 2
    probe(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    assert same_predictions(whole, part)
    a, b = (json.loads((run / "results.json").read_text()) for run in (whole, part))
    assert a["choices"] == b["choices"] and a["shortcuts"] == b["shortcuts"]
    assert a["uf1"] == b["uf1"] and b["n_subjects"] == 4


def test_a_checkpoint_is_written_when_the_minutes_are_over(drawn, quick, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save

    def counted(path, state):
        saved.append(state["step"])
        save(path, state)
    monkeypatch.setattr(checkpoint, "save", counted)
    flags = ["--data_folder", drawn, *quick, "--batch_size", 4]
    pretrain(*flags, "--model_path", tmp_path / "each", "--save_minutes", 0)
    pretrain(*flags, "--model_path", tmp_path / "last")
    assert saved == [1, 2, 3, 3, 3]


def test_a_signal_after_the_last_step_of_a_subject_ends_the_run_too(drawn, quick, pretrained,
                                                                     tmp_path, monkeypatch):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--subject", "s1", "s2"]
    finetune(*flags, "--save_path", tmp_path / "whole")
    predict = supervised.predict

    def struck(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*given)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(supervised, "predict", struck)
        finetune(*flags, "--save_path", tmp_path / "part")
    assert end.value.code == 143
    part = only(tmp_path / "part")
    assert load(part / "last_s1.pth")["epoch"] == 1 and not (part / "last_s2.pth").exists()
    finetune(*flags, "--save_path", tmp_path / "part", "--resume", "auto")
    same_run(only(tmp_path / "whole"), part)


def test_jobs_in_one_folder_keep_their_own_checkpoints(drawn, quick, pretrained, tmp_path,
                                                       monkeypatch, capsys):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--batch_size", 4,
             "--epochs", 2, "--save_path", tmp_path, "--subject"]
    for subject, step in (("s1", 3), ("s2", 4)):  # two steps an epoch
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, step)
            finetune(*flags, subject)
    run = only(tmp_path)
    for subject, step in (("s1", 1), ("s2", 2)):
        state = load(run / f"last_{subject}.pth")
        assert (state["unit"], state["epoch"], state["within"]["step"]) == (subject, 1, step)
    finetune(*flags, "s1", "s2", "--resume", "auto")
    assert re.findall("(s.): goes on after epoch 1", capsys.readouterr().out) == ["s1", "s2"]
    assert [path.name for path in run.glob("*.pth")] == ["last.pth"]
    assert sorted((line["subject"], line["epoch"]) for line in lines(run)) \
        == [("s1", 1), ("s1", 2), ("s2", 1), ("s2", 2)]


def test_a_later_second_interrupt_ends_the_run_at_once(monkeypatch):
    with pytest.raises(util.Stopped) as end, epochs.Keeper(10) as keeper:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # one stop, passed on
            os.kill(os.getpid(), number)
        assert keeper.signal == signal.SIGTERM
        monkeypatch.setattr(epochs.Keeper, "PATIENCE", -1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert "at once" in str(end.value)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_before_training_leaves_no_half_written_file(drawn, tmp_path, monkeypatch):
    from images import decoding
    decode, count = decoding.decode, []

    def struck(*given):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(*given)
    monkeypatch.setattr(decoding, "decode", struck)
    with pytest.raises(SystemExit) as end:
        pretrain("--data_folder", drawn, "--cache", tmp_path / "cache", "--model_path",
                 tmp_path / "runs", "--num_workers", 1)
    assert end.value.code == 143
    assert not (tmp_path / "runs").exists() and not list((tmp_path / "cache").iterdir())


# ---------------------------------------------------------------- killed from outside

def newest(folder):
    """When the last checkpoint below `folder` was written, 0 without one."""
    return max((path.stat().st_mtime for path in folder.glob("*/last*.pth")), default=0)


def killed(name, flags, kills, tmp_path, seed):
    """Kills the run so many times, each between its first new checkpoint and a random moment
    later, then lets it finish."""
    def started():
        return start(name, [*flags, "--resume", "auto"], tmp_path, prepare=small_crops)
    draw, done = random.Random(seed), 0
    while done < kills:
        began, process = time.time(), started()
        while process.is_alive() and newest(tmp_path / "part") <= began:
            time.sleep(0.01)
        process.join(draw.uniform(0, 0.5))
        if not process.is_alive():
            assert process.exitcode == 0, (tmp_path / "err").read_text()[-2000:]
            break
        process.kill()
        process.join()
        done += 1
    assert done == kills, f"finished after {done} kills"
    process = started()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("kills, epochs", [
    (2, 8), pytest.param(20, 60, marks=pytest.mark.slow)])
def test_pretraining_that_was_killed_goes_on_bit_for_bit(drawn, quick, tmp_path, kills, epochs):
    flags = ["--data_folder", drawn, *quick, "--batch_size", 4, "--epochs", epochs,
             "--save_minutes", 0]
    pretrain(*flags, "--model_path", tmp_path / "whole")
    killed("pre-train_DVSCL", published(*flags, "--model_path", tmp_path / "part"), kills,
           tmp_path, 0)
    same_run(only(tmp_path / "whole"), only(tmp_path / "part"))


def test_a_kill_between_results_and_checkpoint_leaves_the_checkpoint_of_the_last(
        drawn, quick, pretrained, tmp_path, monkeypatch):
    flags = ["--data_folder", drawn, *quick, "--epochs", 1, "--model_path", pretrained,
             "--subject", "s1", "s2", "--save_path", tmp_path]
    keep = record.Run.finished

    def killed_after_the_second(run, name):
        if name == "s2":
            raise KeyboardInterrupt
        keep(run, name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(record.Run, "finished", killed_after_the_second)
        finetune(*flags)
    assert load(only(tmp_path) / "last.pth")["unit"] == "s1"
    (only(tmp_path) / f".confusion.png.{platform.node()}.999999999.part").write_bytes(b"half")
    finetune(*flags, "--resume", "auto")
    assert load(only(tmp_path) / "last.pth")["unit"] == "s2"
    assert not list(only(tmp_path).glob(".*"))
    assert not list(tmp_path.glob("*/last_*.pth"))


@pytest.mark.parametrize("kills, epochs", [
    (2, 6), pytest.param(5, 20, marks=pytest.mark.slow)])
def test_fine_tuning_that_was_killed_goes_on_bit_for_bit(drawn, quick, pretrained, tmp_path, kills,
                                                         epochs):
    flags = ["--data_folder", drawn, *quick, "--batch_size", 4, "--epochs", epochs,
             "--save_minutes", 0, "--model_path", pretrained, "--subject", "s1", "s2", *FIXED]
    finetune(*flags, "--save_path", tmp_path / "whole")
    killed("fine-tune_DVSCL", [*flags, "--save_path", tmp_path / "part"], kills, tmp_path, 0)
    same_run(only(tmp_path / "whole"), only(tmp_path / "part"))
