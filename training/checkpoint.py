"""One save and one load for all scripts: plain types and tensors only, never code."""
import argparse
import contextlib
import errno
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import torch

from training import distributed
from util import BadInput, RunFailed, Stopped, beside, handled

# Where a run's files lie and how it is watched may change when it is resumed.
FREE_TO_CHANGE = {"data_folder", "list_folder", "model_path", "save_path", "tb_path", "cache",
                  "pairs", "num_workers", "device", "print_freq", "save_freq", "save_minutes",
                  "resume", "subject", "seeds", "oracle_curve"}
# what runs did from before there was an option for it
BEFORE = {"lr_schedule": "step", "warmup_epochs": 0, "size": 224, "contrast": "bank",
          "solver": "sgd", "head": "random", "trust": 0}
SAVED = "stopped and saved; go on with --resume auto"


def save(path, state):
    """Writes `state` under a temporary name, flushes it to the disk and renames it.

    Raises RunFailed, and keeps what is there, if a weight is not finite or the file cannot be
    written.
    """
    path = Path(path)
    for part in ("model", "classifier"):
        if not all(value.isfinite().all() for value in state.get(part, {}).values()):
            raise RunFailed(f"{path}: the weights are not finite after epoch {state['epoch']}; the "
                            f"last checkpoint is kept; lower --learning_rate")
    part = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (RuntimeError, OSError) as error:
        raise RunFailed(f"{path}: cannot be written: {_reason(error, path)}, then go on with "
                        f"--resume auto") from error
    finally:
        _remove(part)


def _reason(error, path):
    """Why a checkpoint cannot be written, in the system's words, and what to do."""
    cause = error
    while cause and not isinstance(cause, OSError):  # torch.save hides it behind a RuntimeError
        cause = cause.__cause__ or cause.__context__
    said = cause and cause.strerror or str(cause or error).partition("\n")[0]
    if not cause or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; put that right"
    return f"{said} ({shutil.disk_usage(path.parent).free / 2 ** 20:.0f} MiB free); make room"


def _remove(part):
    """Removes a temporary file; what keeps it from being written may keep it from that, too."""
    with contextlib.suppress(OSError):
        part.unlink()


def save_epoch(folder, state):
    """Saves `state` under its epoch and, sharing the bytes where the disk can, as `last.pth`.

    In this order: a run that is killed in between goes on from the `last.pth` before.
    """
    last, kept = Path(folder) / "last.pth", Path(folder) / f"ckpt_epoch_{state['epoch']}.pth"
    save(kept, state)
    part, linked = beside(last), False
    with contextlib.suppress(OSError):
        os.link(kept, part)
        os.replace(part, last)
        linked = True
    _remove(part)
    if not linked:
        save(last, state)


class Keeper:
    """Saves between two steps: every `minutes`, and on SIGINT or SIGTERM, which then end the run.

    `with Keeper(minutes) as keeper:` around the training; `keeper.step(save)` after each step
    calls `save()` where it is time. together: the ranks step in unison, and all stop if one is
    told to. A second SIGINT, somebody's second Ctrl-C, ends the run at once; one that comes with
    the first does not: schedulers and torchrun pass the same stop on several ways.
    """
    PATIENCE = 3  # seconds within which signals are one

    def __init__(self, minutes, together=False):
        self.seconds, self.together, self.signal = 60 * minutes, together, 0

    def __enter__(self):
        self.handlers = handled(self._note)
        self.handlers.__enter__()
        self.saved = time.monotonic()
        return self

    def __exit__(self, kind, *error):
        self.handlers.__exit__(kind, *error)
        if self.signal and kind is None:  # it came after the last step, whose state is saved
            raise Stopped(self.signal, SAVED)

    def _note(self, number, frame):
        if self.signal:
            if number == signal.SIGINT and time.monotonic() - self.struck > self.PATIENCE:
                raise Stopped(number, "stopped at once; go on from the last checkpoint with "
                                      "--resume auto")
            return
        self.signal, self.struck = number, time.monotonic()

    def step(self, save):
        number = distributed.highest(self.signal) if self.together else self.signal
        if number or time.monotonic() - self.saved >= self.seconds:
            save()
            self.saved = time.monotonic()
        if number:
            raise Stopped(number, SAVED)


def load(path):
    """The state in `path`, on the CPU; `opt` as a dict, `model` keys without wrapper prefixes.

    Reads with weights_only: a file that carries code, or any class but the option namespace of
    old checkpoints, is refused. Raises BadInput.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint")
    # old checkpoints pickle the option namespace; it is data, and nothing else is let in
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
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
    _check(path, state)
    opt = state.get("opt") or {}
    state["opt"] = vars(opt) if isinstance(opt, argparse.Namespace) else dict(opt)
    state["model"] = {_plain(name): value for name, value in state["model"].items()}
    return state


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


def load_model(model, state, path, name):
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


def find_resume(opt, folder):
    """The checkpoint --resume means, or None for a fresh start; raises BadInput.

    A run folder that exists is never written over: it takes --resume to enter it.
    """
    folder = Path(folder)
    if opt.resume in (None, "auto"):
        last = folder / "last.pth"
        if opt.resume is None and folder.exists() and any(folder.iterdir()):
            raise BadInput(f"{folder}: exists; go on with --resume auto, give another --tag, or "
                           f"remove it")
        return last if opt.resume and last.exists() else None
    if not Path(opt.resume).is_file():
        raise BadInput(f"--resume {opt.resume}: no such checkpoint")
    return Path(opt.resume)


def check_resumable(path, old, opt, grow=False, **identity):
    """Raises BadInput unless `opt` and the data agree with those of the run in `path`.

    old: the loaded state, or the log's header; grow: epochs may grow; identity: what must be
    equal besides the options, such as data_digest.
    """
    new, free = vars(opt), FREE_TO_CHANGE | ({"epochs"} if grow else set())
    before = BEFORE | old["opt"]
    differing = [f"--{k} {before[k]} there, {new[k]} here" for k in sorted(new)
                 if k in before and before[k] != new[k] and k not in free]
    if grow and before.get("epochs", 0) > new["epochs"]:
        differing.append(f"--epochs {before['epochs']} there, {new['epochs']} here: it may "
                         f"only grow")
    elif not grow and before.get("epochs") != new["epochs"]:
        differing.append("held-out subjects train for a fixed number: give another --tag")
    differing += [f"{k.replace('_', ' ')} differs" for k, v in identity.items() if old.get(k) != v]
    if differing:
        raise BadInput(f"{path}: cannot be resumed with other options or data: "
                       + "; ".join(differing))


@contextlib.contextmanager
def frozen(module):
    """Checks that the weights of `module` leave the block as they entered it."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yield
    moved = [name for name, value in module.state_dict().items()
             if not torch.equal(before[name], value)]
    if moved:
        raise RuntimeError(f"frozen weights moved: {moved[:3]}")
