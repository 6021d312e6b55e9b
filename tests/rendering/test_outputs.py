"""What every rendered set shares: the folder it is written to, and the processes."""
import os
import signal

import pytest

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


def test_workers_leave_signals_to_the_run_that_started_them():
    assert outputs.in_parallel(signals, [[1], [2]], 2) == [signal.SIG_IGN, signal.SIG_DFL] * 2
