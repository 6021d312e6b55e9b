"""What every rendered set shares: the folder it is written to, and the processes."""
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from rendering import outputs
from util import BadInput, RunFailed


def write(folder):
    (folder / "a.txt").write_text("a")
    return {"clips": 1}


def die(task):
    os._exit(9)


def signals(task):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_link_to_an_empty_folder_stays_one(tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "set").symlink_to("disk")
    for _ in range(2):
        assert outputs.render_once(tmp_path / "set", {}, "note", write) == tmp_path / "disk"
    assert "reused" in capsys.readouterr().out
    assert (tmp_path / "set").is_symlink() and (tmp_path / "set" / "a.txt").exists()


def test_a_mount_point_is_refused_before_anything_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(BadInput, match=r"a mount point.*a folder below it"):
        outputs.render_once(tmp_path, {}, "note", None)
    outputs.render_once(tmp_path / "set", {}, "note", write)


def test_a_killed_worker_is_answered_in_one_line(tmp_path):
    with pytest.raises(RunFailed, match=r"^a worker was killed.*--num_workers$"):
        outputs.render_once(tmp_path / "set", {}, "note",
                            lambda folder: outputs.in_parallel(die, [[1], [2]], 2))
    assert not list(tmp_path.iterdir())


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    code = ("import os, sys, time; from rendering import outputs\n"
            "def work(task):\n"
            "    open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close()\n"
            "    time.sleep(60)\n"
            "outputs.in_parallel(work, [[1], [2]], 2)")
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    try:
        while run.poll() is None and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
    finally:
        run.kill()
        run.wait()
    for pid in [int(path.name) for path in tmp_path.iterdir()]:
        with pytest.raises(ProcessLookupError):  # after ten seconds at most
            for _ in range(1000):
                os.kill(pid, 0)
                time.sleep(0.01)


def test_what_a_killed_rendering_left_is_removed_by_the_next(tmp_path):
    left = [tmp_path / f".{name}.{platform.node()}.999999999.part" for name in ("s[e]t", "other")]
    for folder in left:
        folder.mkdir()
    outputs.render_once(tmp_path / "s[e]t", {}, "note", write)
    assert [folder.exists() for folder in left] == [False, True]


def test_workers_leave_signals_to_the_run_that_started_them():
    assert outputs.in_parallel(signals, [[1], [2]], 2) == [signal.SIG_IGN, signal.SIG_DFL] * 2
