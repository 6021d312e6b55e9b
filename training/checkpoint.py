"""One save and one load for all scripts: plain types and tensors only, never code."""
import argparse
import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from models import files
from util import BadInput, RunFailed, Stopped, replacing

WEIGHTS = ("model", "classifier")  # the parts of a checkpoint that hold weights


def save(path: str | Path, state: dict, weights: Iterable[str] = WEIGHTS) -> None:
    """Writes `state` whole, flushed to the disk.

    weights: its parts that must be finite, state_dicts. Raises RunFailed, and keeps what is there,
    if one is not or the file cannot be written.
    """
    path = Path(path)
    for part in weights:
        if not all(value.isfinite().all() for value in state.get(part, {}).values()):
            raise RunFailed(f"{path}: the weights are not finite after epoch {state['epoch']}; the "
                            f"last checkpoint is kept; lower the learning rate")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(state, file)
    except (RuntimeError, OSError) as error:
        # torch hides a signal as well, behind a file that it cannot close
        for stop in filter(lambda cause: isinstance(cause, Stopped), _causes(error)):
            raise stop from None
        raise RunFailed(f"{path}: cannot be written: {_reason(error, path)}, then go on with "
                        f"--resume auto") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, path: Path) -> str:
    """Why a checkpoint cannot be written, in the system's words, and what to do."""
    # torch.save hides it behind a RuntimeError
    cause = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
    said = (cause and cause.strerror) or str(cause or error).partition("\n")[0]
    if not cause or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; put that right"
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return f"{said} ({shutil.disk_usage(there).free / 2 ** 20:.0f} MiB free); make room"


def save_epoch(last: Path, state: dict, name: str = "ckpt_epoch_{epoch}.pth") -> None:
    """Saves `state` under the name of its epoch and, sharing the bytes where the disk can, as
    `last` beside it.

    In this order: a run that is killed in between goes on from the `last` before.
    """
    kept = last.with_name(name.format(epoch=state["epoch"]))
    save(kept, state)
    linked = False
    with contextlib.suppress(OSError):  # some disks have no links
        with replacing(last, flush=False) as part:
            os.link(kept, part)
        linked = True
    if not linked:
        save(last, state)


def due(opt: argparse.Namespace, epoch: int) -> bool:
    """Whether --save_ckpt_freq keeps a checkpoint after so many epochs; as published it counts them
    from 0, and keeps the last one always."""
    return (epoch - 1) % opt.save_ckpt_freq == 0 or epoch == opt.epochs


def save_counted(last: Path, state: dict, opt: argparse.Namespace) -> None:
    """Saves `state` as `last` and, where it is `due` after a whole epoch, as checkpoint-<epoch>.pth
    too, epochs counted from 0, of which the latest --save_ckpt_num are kept, 0: all; those of later
    epochs, which a run that goes on from an earlier one finds, stay until it gets there."""
    if state["within"] or not due(opt, state["epoch"]):
        save(last, state)
        return
    epoch = state["epoch"] - 1
    save_epoch(last, state, f"checkpoint-{epoch}.pth")
    counted = {int(path.stem.partition("-")[2]): path
               for path in last.parent.glob("checkpoint-*.pth")
               if path.stem.partition("-")[2].isdigit()}
    before = sorted(number for number in counted if number <= epoch)
    for number in before[:-opt.save_ckpt_num] if opt.save_ckpt_num else ():
        counted[number].unlink()


def load(path: str | Path) -> dict:
    """The state in `path`, on the CPU; `opt` as a dict, `model` keys without wrapper prefixes;
    raises BadInput."""
    state = files.read(path)
    files.check(path, state)
    opt = state.get("opt") or {}
    state["opt"] = vars(opt) if isinstance(opt, argparse.Namespace) else dict(opt)
    state["model"] = {_plain(name): value for name, value in state["model"].items()}
    return state


def load_seen(path: str | Path) -> dict | None:
    """What a checkpoint that anybody wrote says of whom its network saw (dataset.people_seen), or
    None; raises BadInput."""
    state = files.read(path)
    return state.get("seen") if isinstance(state, dict) else None


def _plain(name):
    """A parameter's name without the prefixes of CMC's wrappers: the model's, and its encoder's."""
    return name.removeprefix("module.").removeprefix("encoder.module.")


def load_model(model: nn.Module, state: dict, path: str | Path, name: str) -> None:
    """Loads `state['model']` into `model` called `name`; raises BadInput on any difference."""
    ours, theirs = model.state_dict(), state["model"]
    wrong = sorted(k for k in ours.keys() & theirs.keys() if ours[k].shape != theirs[k].shape)
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or extra or wrong:
        held = state["opt"].get("model")
        first = (missing or extra or wrong)[0]
        raise BadInput(f"{path}: not a checkpoint of {name}"
                       + (f" but of {held}" if held and held != name else "")
                       + f" ({len(missing)} tensors missing, {len(extra)} unknown, {len(wrong)} of "
                         f"another shape, {first} the first); give the --model it was trained with")
    model.load_state_dict(theirs)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Checks that the weights of `module` leave the block as they entered it."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    moved = [name for name, value in module.state_dict().items()
             if not torch.equal(before[name], value)]
    if moved:
        raise RuntimeError(f"frozen weights moved: {moved[:3]}")
