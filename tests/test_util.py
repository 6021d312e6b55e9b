"""What a result records of the code it was computed with."""
import json
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, probe

import util
from training import record, schedules


def git(folder, *arguments):
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.py").write_text("1\n")
    git(folder, "add", "a.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_commit_names_the_head_and_whether_the_code_was_changed(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert len(head) == 40 and record.commit(repository) == head
    (repository / "results.txt").write_text("not tracked\n")
    assert record.commit(repository) == head
    (repository / "a.py").write_text("2\n")
    assert record.commit(repository) == f"{head}-dirty"
    git(repository, "add", "a.py")
    assert record.commit(repository) == f"{head}-dirty"
    git(repository, "commit", "-q", "-m", "second")
    assert record.commit(repository) == git(repository, "rev-parse", "HEAD") != head


def test_no_commit_where_git_does_not_keep_the_code(repository, tmp_path, monkeypatch):
    assert record.commit(tmp_path) is None
    # a copy inside somebody else's repository
    (repository / "copy").mkdir()
    assert record.commit(repository / "copy") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert record.commit(empty) is None
    monkeypatch.setenv("PATH", str(empty))
    assert record.commit(repository) is None


def test_results_and_log_hold_the_commit(drawn, quick, small_crops, tmp_path):
    probe("--data_folder", drawn, *quick, "--model_path", "random", "--save_path", tmp_path)
    (path,) = tmp_path.glob("*/results.json")
    recorded = json.loads(path.read_text())["versions"]["commit"]
    assert recorded == record.read_log(path.parent)[0]["versions"]["commit"] == record.commit(ROOT)
    if (ROOT / ".git").exists():
        assert recorded.removesuffix("-dirty") == git(ROOT, "rev-parse", "HEAD")


# ---------------------------------------------------------------- learning rates

def options(**changes):
    return SimpleNamespace(**{"learning_rate": 7, "lr_decay_epochs": [4, 6], "lr_decay_rate": 0.1,
                              "lr_schedule": "step", "epochs": 8, **changes})


def rates(opt, warmup, steps=5, base=2.0):
    """Of every step of a training, `[epochs, steps]`."""
    return np.array([[schedules.scheduled(opt, base, epoch, step, steps, warmup)
                      for step in range(1, steps + 1)] for epoch in range(1, opt.epochs + 1)])


def test_rates_in_steps_are_those_of_the_epoch():
    actual = rates(options(), 0)
    assert actual.tolist() == [[schedules.step_rate(2.0, epoch, [4, 6], 0.1)] * 5
                              for epoch in range(1, 9)]
    assert actual[:, 0] == pytest.approx([2] * 4 + [0.2] * 2 + [0.02] * 2)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
@pytest.mark.parametrize("warmup", [1, 2, 1.5, 0.3])
def test_rates_rise_in_a_line_over_the_warm_up(schedule, warmup):
    actual = rates(options(lr_schedule=schedule), warmup, steps=10).ravel()
    last = round(10 * warmup)
    assert actual[:last] == pytest.approx(2.0 * np.arange(1, last + 1) / last)
    assert (np.diff(actual[last - 1:]) <= 1e-12).all() and actual[last] == pytest.approx(2.0)


@pytest.mark.parametrize("warmup", [0, 2])
def test_rates_fall_as_half_a_cosine_to_nearly_nothing(warmup):
    actual = rates(options(lr_schedule="cosine"), warmup).ravel()[5 * warmup:]
    n = len(actual)
    assert actual == pytest.approx(1 + np.cos(np.pi * np.arange(n) / n))
    assert actual[0] == 2 and 0 < actual[-1] < 0.01


# ---------------------------------------------------------------- jobs in one folder

def test_only_what_a_killed_process_left_half_written_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "subjects").mkdir()
    parts = {name: tmp_path / "subjects" / f".last.pth.{name}.part" for name in (
        f"{platform.node()}.{dead.pid}", f"{platform.node()}.{os.getppid()}", "elsewhere.1")}
    for part in parts.values():
        part.write_text("half")
    util.remove_leftovers(tmp_path)
    assert [part.exists() for part in parts.values()] == [False, True, True]


def test_a_name_of_any_length_can_be_written_whole(tmp_path):
    path = tmp_path / ("顔" * 80 + ".json")  # 245 of the 255 bytes that file systems take
    util.write_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    part = util.beside(path)
    part.with_name(part.name.replace(f".{os.getpid()}.", f".{dead.pid}.")).touch()
    util.remove_leftovers(tmp_path, path.name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("device, expected", [
    ("cpu", None), ("cpu:0", None), ("auto", "GPU 0"), ("cuda", "GPU 0"), ("cuda:1", "GPU 1")])
def test_the_gpu_that_computed_is_recorded(monkeypatch, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name",
                        lambda of=None: f"GPU {1 if of == 'cuda:1' else 0}")
    assert record.versions(device)["gpu"] == expected


def test_a_log_that_needs_no_cut_is_not_written_over(tmp_path):
    """A job that starts while others append to the log must not drop their lines."""
    record.Log(tmp_path, tmp_path / "curves", {"opt": {}}).epoch(1, {"train_loss": 0.1}, "s1")
    before = (tmp_path / "log.jsonl").stat().st_ino
    record.Log(tmp_path, tmp_path / "curves", {"opt": {}}, lambda line: line["subject"] != "s2")
    assert (tmp_path / "log.jsonl").stat().st_ino == before
    record.Log(tmp_path, tmp_path / "curves", {"opt": {}}, lambda line: line["subject"] != "s1")
    assert record.read_log(tmp_path) == [{"opt": {}}]


def test_a_path_that_is_no_utf8_is_written_all_the_same(tmp_path):
    path = os.fsdecode("dégoût".encode("latin-1"))
    util.write_json(tmp_path / "b.json", {"path": path})
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8")) == {"path": path}


def test_what_is_written_whole_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("flushed"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("named"), replace(*names)))
    util.write_json(tmp_path / "a.json", {"a": 1})
    util.write_table(tmp_path / "a.csv", ("a",), [[1]])
    assert order == ["flushed", "named"] * 2
    util.write_bytes(tmp_path / "a.png", b"made again in no time")
    assert order[4:] == ["named"] and not list(tmp_path.glob(".*"))


def test_options_know_their_flags():
    parser = util.ArgumentParser()
    parser.add_argument_group("one").add_argument("--lr", "--rate", dest="learning_rate")
    opt = parser.parse_args(["--lr", "1"])
    for each in (opt, opt.changed(learning_rate=2)):
        assert util.flag(each, "learning_rate") == "--lr"
    assert util.flag(SimpleNamespace(), "learning_rate") == "--learning_rate"


def test_a_gpu_that_is_full_is_told_in_one_line(capsys):
    @util.command_line
    def full(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    @util.command_line
    def broken(argv):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(SystemExit) as end:
        full([])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert said.startswith("error: the GPU's memory is full; give a smaller --batch_size")
    with pytest.raises(RuntimeError, match="mat1"):
        broken([])
