"""One save and one load for all scripts: plain types and tensors only, never code."""
import argparse
import contextlib
import errno
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from util import BadInput, RunFailed, replacing

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
                            f"last checkpoint is kept; lower --learning_rate")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, open(part, "wb") as file:
            torch.save(state, file)
    except (RuntimeError, OSError) as error:
        raise RunFailed(f"{path}: cannot be written: {_reason(error, path)}, then go on with "
                        f"--resume auto") from error


def _reason(error: Exception, path: Path) -> str:
    """Why a checkpoint cannot be written, in the system's words, and what to do."""
    cause = error
    while cause and not isinstance(cause, OSError):  # torch.save hides it behind a RuntimeError
        cause = cause.__cause__ or cause.__context__
    said = (cause and cause.strerror) or str(cause or error).partition("\n")[0]
    if not cause or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; put that right"
    return f"{said} ({shutil.disk_usage(path.parent).free / 2 ** 20:.0f} MiB free); make room"


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


def load(path: str | Path) -> dict:
    """The state in `path`, on the CPU; `opt` as a dict, `model` keys without wrapper prefixes;
    raises BadInput."""
    state = read(path)
    _check(path, state)
    opt = state.get("opt") or {}
    state["opt"] = vars(opt) if isinstance(opt, argparse.Namespace) else dict(opt)
    state["model"] = {_plain(name): value for name, value in state["model"].items()}
    return state


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that anybody wrote: its `model`, `state_dict`, or the file
    itself; raises BadInput."""
    state = read(path)
    for name in ("model", "state_dict", "model_state_dict"):
        state = state.get(name, state) if isinstance(state, dict) else state
    _check(path, {"model": state})
    return state


def load_seen(path: str | Path) -> dict | None:
    """What a checkpoint that anybody wrote says of whom its network saw (dataset.people_seen), or
    None; raises BadInput."""
    state = read(path)
    return state.get("seen") if isinstance(state, dict) else None


def read(path: str | Path) -> object:
    """What a file holds, with weights_only: one that carries code, or any class but the option
    namespace of old checkpoints, is refused."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint")
    # old checkpoints pickle the option namespace; it is data, and nothing else is let in
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own message advises to switch the check off; it is not passed on
            if "GLOBAL" in str(error) or "Unsupported" in str(error):
                raise BadInput(f"{path}: refused: it carries code or classes, which are never run; "
                               f"save plain types and tensors only") from None
            raise BadInput(f"{path}: not a checkpoint; name a .pth that these scripts wrote") \
                from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
                AttributeError):
            raise BadInput(f"{path}: not a checkpoint, or truncated; name a whole .pth") from None


def _check(path, state):
    """Raises BadInput unless the parts that are read have the types they are read as."""
    def fits(name, *kinds):
        return state.get(name) is None or isinstance(state[name], kinds)

    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this method: it holds no 'model'")
    if not all(isinstance(name, str) and torch.is_tensor(value)
               for name, value in state["model"].items()):
        raise BadInput(f"{path}: not a checkpoint of this method: its 'model' is no state_dict")
    if not all(value.isfinite().all() for value in state["model"].values()):
        raise BadInput(f"{path}: holds weights that are not finite; take an earlier checkpoint")
    if not (fits("opt", dict, argparse.Namespace) and fits("encoding", dict)
            and fits("normalization", dict) and fits("seen", dict)):
        raise BadInput(f"{path}: not a checkpoint of this method: 'opt', 'encoding', "
                       f"'normalization' and 'seen' must be tables")


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
