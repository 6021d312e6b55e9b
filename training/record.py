"""One run's record: its folder, log and curves, what it was made with, and whether it goes on."""
import itertools
import json
import os
import platform
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from util import BadInput, sweep, write_text


class Log:
    """One run's record: `log.jsonl` (header, then a line per epoch) and TensorBoard curves.

    folder: the run folder; curves: the TensorBoard folder. `keep(line)`: when a run goes on,
    which of the log's lines (as dicts) stay. header None: append to a log that is there;
    writes: False where this rank logs nothing.
    """
    _serial = itertools.count()

    def __init__(self, folder, curves, header, keep=None, writes=True):
        self.path, self.writes = Path(folder) / "log.jsonl", writes
        if not writes:
            return
        self.writer = self._open_curves(Path(curves))  # a wrong --tb_path leaves no run folder
        if header is not None:
            self._write_header(folder, header, keep)

    def _write_header(self, folder, header, keep):
        Path(folder).mkdir(parents=True, exist_ok=True)
        sweep(folder)
        lines = read_log(folder) if keep else []
        kept = [lines[0] if lines else header] + [line for line in lines[1:] if keep(line)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        # written over only to cut it: other jobs may be appending to it
        if not lines or self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)

    def _open_curves(self, folder):
        """The package names its file by whole seconds and truncates what is there, so it opens
        in a folder of its own, and the open file is renamed to a name no other writer has."""
        import tensorboard_logger
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as private:
            writer = tensorboard_logger.Logger(private)
            (file,) = Path(private).iterdir()
            file.rename(folder / f"{file.name}.{os.getpid()}.{next(self._serial)}")
        return writer

    def epoch(self, epoch, values, subject=None):
        """One line in log.jsonl, and each of `values` (name → number) as a curve at step `epoch`.

        subject: the held-out subject it belongs to, where each has a training of its own.
        """
        if not self.writes:
            return
        line = {"epoch": epoch, **({"subject": subject} if subject else {}), **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self.writer.log_value(f"{name}/{subject}" if subject else name, value, epoch)

    def curves(self, values):
        """Whole curves that the log does not hold: name → values at the epochs 1, 2, …"""
        for name, curve in values.items():
            for epoch, value in enumerate(curve, 1):
                self.writer.log_value(name, value, epoch)


def read_log(folder):
    """The lines of a run's log.jsonl as dicts, up to the first that is not whole."""
    path, lines = Path(folder) / "log.jsonl", []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def commit(folder=Path(__file__).parents[1]):
    """The git commit of the code in `folder`, with "-dirty" where a tracked file was changed; None
    where there is no git, or `folder` is not the top of a repository."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(folder), *arguments], check=True, text=True,
                              capture_output=True, timeout=60).stdout
    try:
        below, head = git("rev-parse", "--show-cdup", "HEAD").splitlines()
        # somebody else's repository around the folder says nothing of the code
        return None if below else \
            head + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def versions():
    """What a result depends on besides its options."""
    import numpy as np
    import torch
    return {"commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(),
            "threads": torch.get_num_threads(), "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def header(script, opt, argv, **more):
    """First line of log.jsonl: the command, all options, versions, and `more` (digests)."""
    command = shlex.join(["python", os.path.basename(script), *argv])
    return {"command": command, "opt": vars(opt), "versions": versions(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"), **more}
