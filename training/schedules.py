"""How learning rates go: `progress` counts epochs, and is 1.5 in the middle of the second one."""
import argparse
import math
from collections.abc import Iterable

import torch
from torch import Tensor


def step_rate(base: float, progress: float, decay_epochs: Iterable[int],
              decay_rate: float) -> float:
    """CMC's schedule: `base` times decay_rate for every decay epoch that has passed."""
    return base * decay_rate ** sum(math.ceil(progress) > e for e in decay_epochs)


def cosine_rate(base: float, progress: float, epochs: float, warmup: float = 0,
                step: float = 0) -> float:
    """Half a cosine down to 0 after the first `warmup` epochs (Loshchilov and Hutter 2017).

    step: length of a step in epochs, for the last one still to move.
    """
    done = max(progress - step - warmup, 0)
    return base * (1 + math.cos(math.pi * done / (epochs - warmup))) / 2


def exponential_rate(base: float, progress: float, factor: float, plateau: float) -> float:
    """`base` times factor for every epoch that has passed, up to `plateau` of them."""
    return base * factor ** min(math.ceil(progress) - 1, plateau)


def iteration_rate(base: float, progress: float, epochs: float, warmup: float,
                   least: float) -> float:
    """Half a cosine from `base` down to `least` after a line over the first `warmup` epochs, by
    what is done before a step: the first one has rate 0."""
    if progress < warmup:
        return base * progress / warmup
    done = (progress - warmup) / (epochs - warmup)
    return least + (base - least) * (1 + math.cos(math.pi * done)) / 2


def decay_epochs(opt: argparse.Namespace) -> list[int]:
    """The epochs after which --lr_schedule step lowers the rate: those of the flag, or at .3, .5
    and .8 of the run."""
    if hasattr(opt, "lr_decay_epochs"):
        return opt.lr_decay_epochs
    return sorted({max(1, round(share * opt.epochs)) for share in (.3, .5, .8)} - {opt.epochs})


def scheduled(opt: argparse.Namespace, base: float | Tensor, epoch: int, step: int, steps: int,
              warmup: float = 0) -> float | Tensor:
    """`base` as --lr_schedule has it at step 1..`steps` of an epoch, CMC's steps where a script
    has no such flag; rising in a line over the first `warmup` epochs."""
    progress = epoch - 1 + step / steps
    if getattr(opt, "lr_schedule", "") == "iteration":
        return iteration_rate(base, progress - 1 / steps, opt.epochs, warmup,
                              opt.min_lr * base / opt.learning_rate)
    if progress <= warmup:  # never where there is no warm-up: a step is done
        return base * progress / warmup
    schedule = getattr(opt, "lr_schedule", "step")
    if schedule == "step":
        return step_rate(base, progress, decay_epochs(opt), opt.lr_decay_rate)
    if schedule == "exponential":
        return exponential_rate(base, progress, opt.lr_decay_rate, opt.epochs)
    if schedule == "constant":
        return base
    return cosine_rate(base, progress, opt.epochs, warmup, 1 / steps)


def set_rates(opt: argparse.Namespace, optimizer: torch.optim.Optimizer, epoch: int, step: int,
              steps: float) -> None:
    """Gives each parameter group its rate at a step, from its initial one, `base`, which rises over
    `warmup` epochs: --learning_rate and --warmup_epochs, where it carries none of its own."""
    for group in optimizer.param_groups:
        group["lr"] = scheduled(opt, group.get("base", opt.learning_rate), epoch, step, steps,
                                group.get("warmup", opt.warmup_epochs))


def rate_now(optimizer: torch.optim.Optimizer) -> float:
    """The highest rate of all parameter groups."""
    return max(group["lr"] for group in optimizer.param_groups)
