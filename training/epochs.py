"""The loop that every script runs: order of the data, rates, precision, saving, signals."""
import contextlib
import math
import signal
import time

import numpy as np
import torch

from training import distributed
from util import BadInput, Stopped, handled

SAVED = "stopped and saved; go on with --resume auto"


class AverageMeter:
    """Running mean of a quantity over samples."""

    def __init__(self, total=0.0, count=0):
        self.total, self.count = total, count

    def update(self, value, n=1):
        self.total += float(value) * n
        self.count += n

    @property
    def avg(self):
        return self.total / max(self.count, 1)


class Meters(dict):
    """An AverageMeter per name, going on from a `state()` where one is given."""

    def __init__(self, names, state=None):
        super().__init__({name: AverageMeter(*(state or {}).get(name, ())) for name in names})

    def state(self):
        return {name: [meter.total, meter.count] for name, meter in self.items()}

    def means(self):
        return {name: meter.avg for name, meter in self.items()}


def learning_rate(opt, epoch, base=None):
    """Step schedule of CMC: `base` times lr_decay_rate for every decay epoch that has passed."""
    base = opt.learning_rate if base is None else base
    return base * opt.lr_decay_rate ** sum(epoch > e for e in opt.lr_decay_epochs)


def scheduled(opt, base, epoch, step, steps, warmup=0):
    """`base` as --lr_schedule has it at step 1..`steps` of an epoch: CMC's steps [where a script
    has no such flag], or half a cosine down to 0 (Loshchilov and Hutter 2017); rising in a line
    over the first `warmup` epochs."""
    done = epoch - 1 + step / steps
    if done <= warmup:  # never where there is no warm-up: a step is done
        return base * done / warmup
    if getattr(opt, "lr_schedule", "step") == "step":
        return learning_rate(opt, epoch, base)
    done = max(done - 1 / steps - warmup, 0)  # the last step still moves
    return base * (1 + math.cos(math.pi * done / (opt.epochs - warmup))) / 2


def announce_dropped(n, batch_size):
    """Says so where `batches` leaves out a last batch of one."""
    if n > batch_size > 1 and n % batch_size == 1:
        print("the last batch of an epoch would hold one clip; it is dropped")


def epoch_line(opt, epoch, means):
    """What the terminal shows of an epoch."""
    return f"epoch {epoch}/{opt.epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in means.items())


def generator(*numbers):
    """CPU generator that follows from the given non-negative integers, such as (seed, epoch)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def batches(n, batch_size, rng):
    """Index tensors of one epoch over `n` samples in an order drawn from `rng`.

    A last batch of one is left out: batch norm could estimate nothing of it.
    """
    parts = torch.randperm(n, generator=rng).split(min(batch_size, n))
    return parts[:-1] if 1 == len(parts[-1]) < len(parts[0]) else parts


def pick_device(name):
    """torch.device for --device; raises BadInput for one that is not here."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu")
                              if name == "auto" else name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        if "LOCAL_RANK" not in os.environ:  # torchrun: every process would open the first GPU
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: not available here ({str(error).splitlines()[0]}); "
                       f"use auto or cpu") from None
    return device


def mixed_precision(opt, device):
    """(autocast context factory, GradScaler) for --amp on `device`; both idle without it."""
    half = torch.bfloat16
    # a GPU that only emulates bfloat16 is slower with it than in float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=opt.amp and half == torch.float16)

    def autocast():
        return torch.autocast(device.type, dtype=half) if opt.amp else contextlib.nullcontext()
    return autocast, scaler


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
