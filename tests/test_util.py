"""What a result records of the code it was computed with."""
import json
import os
import platform
import subprocess
import sys

import pytest
from conftest import ROOT, probe

import util


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
    assert len(head) == 40 and util.commit(repository) == head
    (repository / "results.txt").write_text("not tracked\n")
    assert util.commit(repository) == head
    (repository / "a.py").write_text("2\n")
    assert util.commit(repository) == f"{head}-dirty"
    git(repository, "add", "a.py")
    assert util.commit(repository) == f"{head}-dirty"
    git(repository, "commit", "-q", "-m", "second")
    assert util.commit(repository) == git(repository, "rev-parse", "HEAD") != head


def test_no_commit_where_git_does_not_keep_the_code(repository, tmp_path, monkeypatch):
    assert util.commit(tmp_path) is None
    # a copy inside somebody else's repository
    (repository / "copy").mkdir()
    assert util.commit(repository / "copy") is None
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert util.commit(empty) is None
    monkeypatch.setenv("PATH", str(empty))
    assert util.commit(repository) is None


def test_results_and_log_hold_the_commit(drawn, quick, small_crops, tmp_path):
    probe("--data_folder", drawn, *quick, "--model_path", "random", "--save_path", tmp_path)
    (path,) = tmp_path.glob("*/results.json")
    recorded = json.loads(path.read_text())["versions"]["commit"]
    assert recorded == util.read_log(path.parent)[0]["versions"]["commit"] == util.commit(ROOT)
    if (ROOT / ".git").exists():
        assert recorded.removesuffix("-dirty") == git(ROOT, "rev-parse", "HEAD")


# ---------------------------------------------------------------- jobs in one folder

def test_only_what_a_killed_process_left_half_written_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "subjects").mkdir()
    parts = {name: tmp_path / "subjects" / f".last.pth.{name}.part" for name in (
        f"{platform.node()}.{dead.pid}", f"{platform.node()}.{os.getppid()}", "elsewhere.1")}
    for part in parts.values():
        part.write_text("half")
    util.sweep(tmp_path)
    assert [part.exists() for part in parts.values()] == [False, True, True]


def test_a_log_that_needs_no_cut_is_not_written_over(tmp_path):
    """A job that starts while others append to the log must not drop their lines."""
    util.Log(tmp_path, tmp_path / "curves", {"opt": {}}).epoch(1, {"train_loss": 0.1}, "s1")
    before = (tmp_path / "log.jsonl").stat().st_ino
    util.Log(tmp_path, tmp_path / "curves", {"opt": {}}, lambda line: line["subject"] != "s2")
    assert (tmp_path / "log.jsonl").stat().st_ino == before
    util.Log(tmp_path, tmp_path / "curves", {"opt": {}}, lambda line: line["subject"] != "s1")
    assert util.read_log(tmp_path) == [{"opt": {}}]
