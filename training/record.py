"""One run's record: its folder, log and curves, what it was made with, and whether it goes on."""
import argparse
import hashlib
import io
import itertools
import json
import os
import platform
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training import checkpoint, distributed
from util import BadInput, flag, remove_leftovers, write_text

# what runs did from before there was an option for it
BEFORE = {"lr_schedule": "step", "warmup_epochs": 0, "size": 224, "contrast": "bank",
          "solver": "sgd", "head": "random", "trust": 0}


def join_name(*parts: str | None) -> str:
    """A run's name in CMC's manner: what of its options tells it from others, one after another."""
    return "_".join(filter(None, parts))


def name_of(names: list[str]) -> str:
    """One word for several names, which tells any two such lists apart."""
    if len(names) == 1:
        return names[0].replace("/", "_")
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{names[0].replace('/', '_')}_and_{len(names) - 1}_more_{digest}"


def rate_name(learning_rate: float, weight_decay: float, batch_size: int) -> str:
    """What a run's name says of training by SGD."""
    return f"lr_{learning_rate:g}_decay_{weight_decay:g}_bsz_{batch_size}"


def size_name(size: int) -> str:
    """What a run's name says of crops of another size than the published one."""
    return "" if size == 224 else f"size_{size}"


def say_where(name: str | Path, state: dict) -> None:
    """Prints after which epoch and step the training of a checkpoint goes on."""
    within = state.get("within")
    print(f"{name}: goes on after epoch {state['epoch']}"
          + (f", step {within['step']} of the next" if within else ""))


class Run:
    """The folder of one run: its log, its checkpoints, and whether it goes on.

    root: folder of the runs; its curves lie below --tb_path, or in tensorboard/ beside it. A run
    may consist of several trainings, each with a name and a checkpoint of its own.
    """

    def __init__(self, root: str | Path, name: str, opt: argparse.Namespace):
        self.opt, self.folder = opt, Path(root) / name
        self.all_curves = Path(opt.tb_path or Path(root) / "tensorboard")
        self.curves = self.all_curves / name
        # what names a folder of its own
        self._elsewhere = "--tag" if hasattr(opt, "tag") else "--output_dir"

    def last(self, name: str | None = None) -> Path:
        """The checkpoint of a training; last.pth is that of everybody, and of the one that was
        finished last. So ranks and jobs in one folder keep out of each other's way."""
        return self.folder / ("last.pth" if name in (None, "all") else f"last_{name}.pth")

    def finished(self, name: str | None) -> None:
        """A training's results are kept: its checkpoint makes room."""
        if self.last(name).exists():
            os.replace(self.last(name), self.last())

    def find_resume(self) -> Path | None:
        """The checkpoint --resume means, or None for a fresh start; raises BadInput.

        A run folder that exists is never written over: it takes --resume to enter it.
        """
        resume = self.opt.resume
        if resume in (None, "auto"):
            if resume is None and self.folder.exists() and any(self.folder.iterdir()):
                raise BadInput(f"{self.folder}: exists; go on with --resume auto, give another "
                               f"{self._elsewhere}, or remove it")
            if resume and self.last().exists():
                return self.last()
            self._check_others()
            return None
        if not Path(resume).is_file():
            raise BadInput(f"--resume {resume}: no such checkpoint")
        if getattr(self.opt, "eval", False) and self.last().exists() \
                and Path(resume).resolve() != self.last().resolve():
            raise BadInput(f"{self.folder}: its results are those of its last.pth, which would be "
                           f"written over; give another {self._elsewhere}")
        header = read_log(self.folder)[:1]
        if header and Path(resume).resolve().parent != self.folder.resolve():
            # a checkpoint kept elsewhere goes on in its own run's folder, not in another's
            self.check_resumable(self.folder / "log.jsonl", header[0], grow=True)
        return Path(resume)

    def _check_others(self):
        """Raises BadInput where the folder holds what a run left: a new one would write over
        it."""
        others = [*sorted(self.folder.glob("checkpoint-*.pth")),
                  *sorted(self.folder.glob("ckpt_epoch_*.pth")),
                  *self.folder.glob("results.json")]
        if not others:
            return
        header = read_log(self.folder)[:1]
        if header:
            self.check_resumable(self.folder / "log.jsonl", header[0], grow=True)
        later = [path for path in others if path.name != "checkpoint-0.pth"]
        if header and not later:
            return  # this run's own, killed between its first two files
        saved = [path for path in others if path.suffix == ".pth"]
        fix = f"--resume {max(saved, key=lambda path: path.stat().st_mtime)}, or " \
            if header and saved else ""
        raise BadInput(f"{self.folder}: holds {(later or others)[0].name}, and no last.pth to go "
                       f"on from; give {fix}another {self._elsewhere}")

    def check_resumable(self, path: str | Path, old: dict, grow: bool = False,
                        **identity: object) -> None:
        """Raises BadInput unless the options and the data agree with those of the run in `path`.

        old: the loaded state, or the log's header; grow: epochs may grow; identity: what must be
        equal besides the options, such as data_digest.
        """
        new, free = vars(self.opt), self.opt.free | ({"epochs"} if grow else set())
        before = BEFORE | old["opt"]
        if new.get("warmup_derived") and before.get("warmup_derived", True):
            free |= {"warmup_epochs"}
        differing = [f"{flag(self.opt, k)} {before[k]} there, {new[k]} here" for k in sorted(new)
                     if k in before and before[k] != new[k] and k not in free]
        if grow and before.get("epochs", 0) > new["epochs"]:
            differing.append(f"--epochs {before['epochs']} there, {new['epochs']} here: it may "
                             f"only grow")
        elif not grow and before.get("epochs") != new["epochs"]:
            differing.append("held-out subjects train for a fixed number")
        differing += [f"{k.replace('_', ' ')} differs" for k, v in identity.items()
                      if old.get(k) != v]
        if differing:
            raise BadInput(f"{path}: cannot be resumed with other options or data: "
                           + "; ".join(differing) + f"; give another {self._elsewhere}")

    def restore(self, path: Path, states: dict, **identity: object) -> dict:
        """Restores `states` (`model` and other names → module, optimizer or scaler) from a
        checkpoint of the same run, whose epochs may grow. Returns its content, with `within`: what
        is done of the next epoch. Raises BadInput."""
        old = checkpoint.load(path)
        if hasattr(self.opt, "accum_iter") and not getattr(self.opt, "eval", False) \
                and old.get("ranks", distributed.size()) != distributed.size():
            raise BadInput(f"{path}: cannot be resumed: {old['ranks']} ranks there, "
                           f"{distributed.size()} here, and --batch_size is that of one")
        self.check_resumable(path, old, grow=True, **identity)
        checkpoint.load_model(states["model"], old, path, self.opt.model)
        for name in states.keys() - {"model"}:
            states[name].load_state_dict(old[name])
        old["within"] = old.get("within") or {}
        say_where(path, old)
        return old

    def states(self, names: Iterable[str | None]) -> Iterator[tuple[Path, dict]]:
        """(path, checkpoint) that --resume means: of the file given, or of those of `names`."""
        if not self.opt.resume:
            return
        paths = sorted(filter(Path.exists, {self.last(name) for name in (*names, None)}))
        for path in paths if self.opt.resume == "auto" else [Path(self.opt.resume)]:
            yield path, checkpoint.load(path)

    def log(self, header: dict | None, keep: Callable | None = None, writes: bool = True) -> "Log":
        """The run's Log, which see."""
        return Log(self.folder, self.curves, header, keep, writes)

    def print_places(self, **files: str) -> None:
        """Says where the run's files are: what → name in its folder."""
        for what, name in files.items():
            print(f"{what:12s} {self.folder / name}")
        print(f"TensorBoard  tensorboard --logdir {self.all_curves}")


class Log:
    """One run's record: `log.jsonl` (header, then a line per epoch) and TensorBoard curves.

    folder: the run folder; curves: the TensorBoard folder. `keep(line)`: when a run goes on,
    which of the log's lines (as dicts) stay. header None: append to a log that is there;
    writes: False where this rank logs nothing.
    """
    _serial = itertools.count()

    def __init__(self, folder: Path, curves: Path, header: dict | None,
                 keep: Callable | None = None, writes: bool = True):
        self.path, self.writes = Path(folder) / "log.jsonl", writes
        if not writes:
            return
        self.writer = self._open_curves(Path(curves))  # a wrong --tb_path leaves no run folder
        if header is not None:
            self._write_header(folder, header, keep)

    def _write_header(self, folder, header, keep):
        Path(folder).mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
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

    def epoch(self, epoch: int, values: dict, subject: str | None = None) -> None:
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

    def image(self, name: str, image: np.ndarray, epoch: int) -> None:
        """An image uint8 `[H, W, 3]` for TensorBoard at step `epoch`; the package's own way needs a
        SciPy of years ago."""
        if not self.writes:
            return
        from tensorboard_logger.tf_protobuf import summary_pb2
        png = io.BytesIO()
        Image.fromarray(image).save(png, "PNG")
        shown = summary_pb2.Summary.Image(encoded_image_string=png.getvalue(),
                                          height=image.shape[0], width=image.shape[1])
        self.writer._log_summary(name, summary_pb2.Summary(value=[
            summary_pb2.Summary.Value(tag=name, image=shown)]), None, epoch)

    def curves(self, values: dict) -> None:
        """Whole curves that the log does not hold: name → values at the epochs 1, 2, …"""
        for name, curve in values.items():
            for epoch, value in enumerate(curve, 1):
                self.writer.log_value(name, value, epoch)


def holds_a_run(folder: Path) -> bool:
    """Whether a folder is there with more in it than a killed run may have left half-written."""
    return folder.exists() and any(path.suffix != ".part" for path in folder.iterdir())


def read_log(folder: str | Path) -> list[dict]:
    """The lines of a run's log.jsonl as dicts, up to the first that is not whole."""
    return read_lines(Path(folder) / "log.jsonl")


def read_lines(path: Path) -> list[dict]:
    """The lines of a file of JSON lines, up to the first that is not whole; none of no file."""
    lines = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def commit(folder: Path = Path(__file__).parents[1]) -> str | None:
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


def versions(device: str) -> dict:
    """What a result depends on besides its options; device: as --device names it."""
    return {"commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "platform": platform.platform(),
            # whether --amp could compute in bfloat16 on a CPU follows from it
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "ranks": int(os.environ.get("WORLD_SIZE", "1")),
            "gpu": torch.cuda.get_device_name(None if device == "auto" else device)
            if device.partition(":")[0] != "cpu" and torch.cuda.is_available() else None}


def header(script: str, opt: argparse.Namespace, argv: list[str], **more: object) -> dict:
    """First line of log.jsonl: the command, all options, versions, and `more` (digests)."""
    command = shlex.join(["python", os.path.basename(script), *argv])
    return {"command": command, "opt": vars(opt), "free": sorted(opt.free),
            "versions": versions(opt.device), "started": time.strftime("%Y-%m-%d %H:%M:%S"), **more}
