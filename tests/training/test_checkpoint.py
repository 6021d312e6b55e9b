"""A checkpoint that cannot be written: what is said of it, and what is left on the disk."""
import errno
import io
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import pretrain

import util
from training import checkpoint

ROOM = "make room"


def state(epoch=1, n=100_000):
    """A checkpoint's state of 4 n bytes."""
    return {"model": {"weight": torch.full((n,), float(epoch))}, "epoch": epoch}


def refused(path, write, what):
    """What `write(what)` is refused with; the system's words follow the path, once."""
    with pytest.raises(util.RunFailed) as failed:
        write(what)
    said = str(failed.value)
    assert said.startswith(f"{path}: cannot be written: ") and "\n" not in said
    assert said.endswith(", then go on with --resume auto")
    return said


def save(path):
    return lambda what: checkpoint.save(path, what)


def save_epoch(folder):
    return lambda what: checkpoint.save_epoch(folder / "last.pth", what)


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "somewhere")
    return fail


@pytest.fixture
def mounted(tmp_path):
    """mounted(options): a tmpfs of 256 KiB with a folder `run`; skips where none can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        if shutil.which("mount") is None or subprocess.run(
                ["mount", "-t", "tmpfs", *options, "tmpfs", folder],
                check=False, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        return folder
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES,
                                    errno.EIO, errno.EFBIG, errno.ENAMETOOLONG])
@pytest.mark.parametrize("step", ["open", "os.fsync", "os.replace", "torch.save"])
def test_the_systems_reason_is_said_and_the_old_checkpoint_kept(tmp_path, monkeypatch, step,
                                                                number):
    path = tmp_path / "last.pth"
    checkpoint.save(path, state(1))
    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr("builtins.open", failing(number))
        else:
            patch.setattr(step, failing(number))
        said = refused(path, save(path), state(2))
    assert os.strerror(number) in said
    # room helps a full disk and a quota, nothing else
    assert (ROOM in said) == ("MiB free" in said) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert checkpoint.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number, room", [(errno.ENOSPC, True), (errno.EFBIG, False)])
@pytest.mark.parametrize("hidden", ["cause", "context", "deep"])
def test_the_reason_is_found_behind_a_runtime_error(tmp_path, monkeypatch, number, room, hidden):
    def behind(*_):
        lost = OSError(number, os.strerror(number))
        if hidden == "cause":
            raise RuntimeError("unexpected pos 704 vs 598") from lost
        try:
            raise lost
        except OSError:
            try:
                raise RuntimeError("unexpected pos 704 vs 598")
            except RuntimeError as other:
                if hidden == "deep":
                    raise RuntimeError("writer") from other
                raise
    monkeypatch.setattr(torch, "save", behind)
    said = refused(tmp_path / "a.pth", save(tmp_path / "a.pth"), state())
    assert os.strerror(number) in said and (ROOM in said) == room and "pos" not in said


def test_a_stop_while_it_is_written_is_a_stop(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pth", state())

    class File(io.FileIO):
        def write(self, content):
            if self.tell() > 1000:
                raise util.Stopped(15)
            return super().write(content)
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **_: File(path, mode))
    with pytest.raises(util.Stopped) as stop:
        checkpoint.save(tmp_path / "last.pth", state(2))
    monkeypatch.undo()
    assert stop.value.exit_code == 143
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1


def test_a_runtime_error_of_its_own_is_said_in_its_first_line(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone\nat 0x1\nat 0x2")
    monkeypatch.setattr(torch, "save", fail)
    said = refused(tmp_path / "a.pth", save(tmp_path / "a.pth"), state())
    assert "the device is gone" in said and ROOM not in said and "0x1" not in said


def test_a_full_disk_is_named_where_the_folder_cannot_be_made(tmp_path, monkeypatch):
    path = tmp_path / "run" / "deep" / "last.pth"
    monkeypatch.setattr(os, "mkdir", failing(errno.ENOSPC))
    said = refused(path, save(path), state())
    assert os.strerror(errno.ENOSPC) in said and "MiB free" in said and ROOM in said


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "run" / "last.pth"
    said = refused(path, save(path), state())
    assert os.strerror(errno.ENOTDIR) in said and ROOM not in said
    path = tmp_path / "file" / "last.pth"  # mkdir says that its parent exists
    assert ROOM not in refused(path, save(path), state())
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_in_the_checkpoints_place_is_named(tmp_path):
    (tmp_path / "last.pth").mkdir()
    said = refused(tmp_path / "last.pth", save(tmp_path / "last.pth"), state())
    assert os.strerror(errno.EISDIR) in said and ROOM not in said
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_file_larger_than_the_limit_is_no_full_disk(tmp_path):
    """torch.save itself hides this one."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        said = refused(tmp_path / "a.pth", save(tmp_path / "a.pth"), state())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.strerror(errno.EFBIG) in said and ROOM not in said
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_and_one_that_is_read_only(mounted):
    folder = mounted("-o", "size=256k")
    path = folder / "run" / "last.pth"
    checkpoint.save(path, state(1, 30_000))
    said = refused(path, save(path), state(2))
    assert os.strerror(errno.ENOSPC) in said and "(0 MiB free); make room" in said
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    for place in (path, folder / "other" / "last.pth"):
        said = refused(place, save(place), state(3, 10))
        assert os.strerror(errno.EROFS) in said and ROOM not in said
    assert [p.name for p in folder.iterdir()] == ["run"]
    assert [p.name for p in (folder / "run").iterdir()] == ["last.pth"]
    assert checkpoint.load(path)["epoch"] == 1


# ---------------------------------------------------------------- under its epoch and as last.pth

def test_an_epochs_checkpoint_that_cannot_be_written_keeps_last(tmp_path, monkeypatch):
    checkpoint.save_epoch(tmp_path / "last.pth", state(1))
    for number in (errno.EROFS, errno.EDQUOT):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(number))
            said = refused(tmp_path / "ckpt_epoch_2.pth", save_epoch(tmp_path), state(2))
        assert os.strerror(number) in said and (ROOM in said) == (number == errno.EDQUOT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_epoch_1.pth", "last.pth"]
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1


def test_where_no_link_can_be_made_last_is_written_and_its_own_reason_said(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    checkpoint.save_epoch(tmp_path / "last.pth", state(1))
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1
    write, given = torch.save, []

    def second(what, file):
        given.append(what)
        if len(given) == 2:
            raise RuntimeError("of its own")
        write(what, file)
    monkeypatch.setattr(torch, "save", second)
    said = refused(tmp_path / "last.pth", save_epoch(tmp_path), state(2))
    # not that of the link, which did no harm
    assert "of its own" in said and os.strerror(errno.EPERM) not in said
    assert sorted(p.name for p in tmp_path.iterdir()) \
        == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "last.pth"]
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1


def test_a_script_that_cannot_save_ends_with_the_reason(drawn, quick, small_crops, tmp_path,
                                                        capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", failing(errno.EROFS))
    with pytest.raises(SystemExit) as end:
        pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path)
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "ckpt_epoch_1.pth: cannot be written: Read-only" in last
    assert ROOM not in last and not list(tmp_path.glob("*/*.pth"))
