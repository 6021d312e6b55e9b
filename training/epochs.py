"""The loop that every script runs: order of the data, steps, saving, signals."""
import argparse
import contextlib
import signal
import time
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from training import distributed, schedules
from training.record import Log
from util import BadInput, RunFailed, Stopped, flag, handled

SAVED = "stopped and saved; go on with --resume auto"


# ---------------------------------------------------------------- what a step follows from

def generator(*numbers: int) -> torch.Generator:
    """CPU generator that follows from the given non-negative integers, such as (seed, epoch)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def seed_of(seed: int, name: str) -> int:
    """Seed of what the training called `name` draws by itself."""
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1)[0])


def batches(n: int, batch_size: int, rng: torch.Generator) -> tuple[Tensor, ...]:
    """Index tensors of one epoch over `n` samples in an order drawn from `rng`.

    A last batch of one is left out: batch norm could estimate nothing of it.
    """
    parts = torch.randperm(n, generator=rng).split(min(batch_size, n))
    return parts[:-1] if 1 == len(parts[-1]) < len(parts[0]) else parts


def per_epoch(n: int, batch_size: int) -> int:
    """How many `batches` there are."""
    size = min(batch_size, n)
    return -(-n // size) - (n > size and n % size == 1)


def groups(opt: argparse.Namespace, n: int,
           rng: torch.Generator) -> tuple[list[list[Tensor]], float]:
    """(the steps of one epoch over `n` samples in an order drawn from `rng`, each a list of the
    index tensors whose gradients it adds up; the length of the epoch in steps).

    One batch a step, as `batches` has them, or, with --accum_iter, so many of --batch_size samples
    on each rank; the batches and samples that are left over are not used, but count in the
    length, as published.
    """
    if not hasattr(opt, "accum_iter"):
        whole = batches(n, opt.batch_size, rng)
        return [[index] for index in whole], len(whole)
    size, many = opt.batch_size * distributed.size(), opt.accum_iter
    whole = torch.randperm(n, generator=rng).split(size)[:n // size]
    return [list(whole[first:first + many]) for first in range(
        0, len(whole) - many + 1, many)], len(whole) / many


def announce_groups(opt: argparse.Namespace, n_data: int) -> int:
    """`announce` with --accum_iter; raises BadInput where an epoch has no step."""
    a_step = opt.batch_size * distributed.size() * opt.accum_iter
    steps = n_data // (opt.batch_size * distributed.size()) // opt.accum_iter
    if not steps:
        raise BadInput(f"--batch_size {opt.batch_size}: a step takes {a_step} images, with "
                       f"--accum_iter {opt.accum_iter} on {distributed.size()} ranks; there are "
                       f"{n_data}: give a smaller one")
    print(f"{n_data} images at batch {opt.batch_size} x {opt.accum_iter} x {distributed.size()} "
          f"ranks: {steps} steps of {a_step} images per epoch, {steps * opt.epochs} in all; "
          f"{n_data - steps * a_step} images of each epoch, others each time, are dropped")
    print(f"learning rate {opt.learning_rate:g}" + (
        f" (--blr {opt.blr:g} x {a_step} / 256)" if opt.blr is not None else "")
        + f": rises for {opt.warmup_epochs:g} epochs, then falls to {opt.min_lr:g} in a cosine")
    return steps


def announce(opt: argparse.Namespace, n_data: int, noun: str = "clips") -> int:
    """Prints the number of steps and how the learning rate goes; returns steps per epoch."""
    if hasattr(opt, "accum_iter"):
        return announce_groups(opt, n_data)
    steps = per_epoch(n_data, opt.batch_size)
    rate = f"rises for {opt.warmup_epochs * steps:.0f} steps, then " * (opt.warmup_epochs > 0)
    if opt.lr_schedule == "step":
        rate += "decays after epoch " + (", ".join(
            f"{e} (step {e * steps})" for e in schedules.decay_epochs(opt) if e < opt.epochs)
            or "- (none within the run)")
    else:
        rate += {"cosine": "falls to 0 in a cosine", "constant": "stays",
                 "exponential": "decays after every epoch"}[opt.lr_schedule]
    print(f"{n_data} {noun} at batch {min(opt.batch_size, n_data)}: {steps} steps per epoch, "
          f"{steps * opt.epochs} in all; the learning rate {rate}")
    announce_dropped(n_data, min(opt.batch_size, n_data))
    return steps


def check_slices(n_data: int, batch_size: int, model: torch.nn.Module, device: torch.device,
                 noun: str = "clips", single: bool = False) -> None:
    """Raises BadInput if a batch leaves a device too few clips for the model's batch norm; single:
    some of its maps are of one position, where the model does not tell."""
    # in maps one clip has many positions; of vectors, and of maps of a single one, it takes two, or
    # those of the other ranks
    least = 1 + (single or any(isinstance(part, torch.nn.BatchNorm1d)
                               or any(side == 1 for _, side in getattr(part, "shapes", ()))
                               for part in model.modules()))
    for batch in batches(n_data, batch_size, generator(0)):
        smallest = distributed.smallest_slice(len(batch), device)
        if smallest < least:
            raise BadInput(f"--batch_size {batch_size}: of {n_data} {noun} it leaves a batch of "
                           f"{len(batch)}, and a device {smallest} of them; the model "
                           f"needs {least} on each: take another, or fewer devices")


def announce_dropped(n: int, batch_size: int) -> None:
    """Says so where `batches` leaves out a last batch of one."""
    if n > batch_size > 1 and n % batch_size == 1:
        print("the last batch of an epoch would hold one alone; it is dropped")


# ---------------------------------------------------------------- a step

def descend(opt: argparse.Namespace, network: torch.nn.Module, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler) -> None:
    """One step along the gradients, which are then none; --clip_grad bounds their length."""
    if getattr(opt, "clip_grad", None):
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), opt.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- the loop

class AverageMeter:
    """Running mean of a quantity over samples."""

    def __init__(self, total: float = 0.0, count: int = 0):
        self.total, self.count = total, count

    def update(self, value: float, n: int = 1) -> None:
        self.total += float(value) * n
        self.count += n

    @property
    def avg(self) -> float:
        return self.total / max(self.count, 1)


class Meters(dict):
    """An AverageMeter per name, going on from a `state()` where one is given."""

    def __init__(self, names: Iterable[str], state: dict | None = None):
        super().__init__({name: AverageMeter(*(state or {}).get(name, ())) for name in names})

    def add(self, values: Iterable[float], n: int) -> None:
        """Adds a mean over `n` samples of each quantity."""
        for meter, value in zip(self.values(), values):
            meter.update(value, n)

    def state(self) -> dict:
        return {name: [meter.total, meter.count] for name, meter in self.items()}

    def means(self) -> dict:
        return {name: meter.avg for name, meter in self.items()}


def kept(opt: argparse.Namespace) -> str:
    """What is said of a loss that is not finite."""
    return f"the last checkpoint is kept; lower {flag(opt, 'learning_rate')}, now " \
           f"{opt.learning_rate:g}"


def check_loss(loss: Tensor, epoch: int, step: int, fix: str) -> None:
    """Raises RunFailed for a loss that is not finite; fix: what the user does about it."""
    if not loss.isfinite().all():
        raise RunFailed(f"the loss is not finite in epoch {epoch}, step {step}; {fix}")


def check_readable(readable: float, n: int, epoch: int, step: int) -> None:
    """Raises RunFailed where not one of `n` images of a batch could be read, 32 or more: then it is
    their folder that is gone. readable: how many, or what share."""
    if not readable and n >= 32:
        raise RunFailed(f"none of {n} images can be read in epoch {epoch}, step {step}; see that "
                        f"their folder is there; --resume auto then goes on from the last "
                        f"checkpoint")


class Keeper:
    """Saves between two steps: every `minutes`, and on SIGINT or SIGTERM, which then end the run.

    `with Keeper(minutes) as keeper:` around the training; `keeper.step(save)` after each step
    calls `save()` where it is time. together: the ranks step in unison, and all stop if one is
    told to. A second SIGINT, somebody's second Ctrl-C, ends the run at once; one that comes with
    the first does not: schedulers and torchrun pass the same stop on several ways.
    """
    PATIENCE = 3  # seconds within which signals are one

    def __init__(self, minutes: float, together: bool = False):
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

    def step(self, save: Callable) -> None:
        number, due = self.signal, time.monotonic() - self.saved >= self.seconds
        if self.together:  # a save takes all of them, and each clock started when it did
            number, due = divmod(distributed.highest(2 * number + due), 2)
        if number or due:
            save()
            self.saved = time.monotonic()
        if number:
            raise Stopped(number, SAVED)


class Loop:
    """Epochs one after another: a line in the log and now and then in the terminal, checkpoints
    between epochs and between steps, a bar that counts steps.

    opt: gives epochs, print_freq, save_freq and save_minutes; name: the training's name, where a
    run has several; steps: in an epoch; together: the ranks step in unison.
    """

    def __init__(self, opt: argparse.Namespace, log: Log, name: str | None = None, steps: int = 1,
                 together: bool = False):
        self.opt, self.log, self.name, self.steps = opt, log, name, steps
        self.together = together

    def run(self, train: Callable, save: Callable | None = None, done: int = 0,
            within: dict | None = None) -> None:
        """Runs the epochs after `done`.

        train(epoch, within, on_step) → means by name: one epoch, going on inside it from `within`
        ({step, meters}, or {}), with `on_step(within)` after every step; save(epoch, within):
        writes a checkpoint of so many epochs and what is `within` the next; None: nothing is kept,
        and a signal ends the run at once.
        """
        opt, within = self.opt, within or {}
        with tqdm(total=self.steps * (opt.epochs - done), initial=within.get("step", 0),
                  desc=(self.name or "training")[:40], disable=None) as bar, \
                Keeper(opt.save_minutes, self.together) if save else contextlib.nullcontext() as \
                keeper:
            for epoch in range(done + 1, opt.epochs + 1):
                def on_step(inside, before=epoch - 1):
                    bar.update()
                    if keeper:
                        keeper.step(lambda: save(before, inside))

                means = train(epoch, within, on_step)
                within = {}
                self.log.epoch(epoch, means, self.name)
                last = epoch == opt.epochs
                if last or epoch % opt.print_freq == 0 or (epoch == done + 1 and not self.name):
                    tqdm.write(f"{self.name}  " * bool(self.name) + f"epoch {epoch}/{opt.epochs}  "
                               + "  ".join(f"{k} {v:.4g}" for k, v in means.items()))
                if save and (last or epoch % opt.save_freq == 0):
                    save(epoch, {})
