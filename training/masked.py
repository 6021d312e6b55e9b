"""Pre-training of masked autoencoders: the epoch, and the rates of their layers."""
import argparse
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from images import cache
from images.crops import Recipe
from training import devices, distributed, epochs, schedules
from util import BadInput


class Job(NamedTuple):
    """An autoencoder in training. run: the network over the devices (distributed.wrap); images:
    cache.OnDemand, uint8 `[N, 3, S, S]`; recipe: what it is shown of them."""
    network: nn.Module
    run: nn.Module
    images: cache.OnDemand
    recipe: Recipe
    optimizer: torch.optim.Optimizer
    precision: devices.Precision


def train_epoch(opt: argparse.Namespace, job: Job, epoch: int, within: dict,
                on_step: Callable) -> dict:
    """One epoch, of groups of --accum_iter batches; returns {train_loss, learning_rate,
    images_per_second}.

    Images that cannot be read are left out. within, on_step: see epochs.Loop.run. Raises RunFailed
    if a loss is not finite or a batch is unreadable, BadInput if all are.
    """
    device = next(job.network.parameters()).device
    means = epochs.Meters(["train_loss"], within.get("meters"))
    job.network.train()
    groups, length = epochs.groups(opt, len(job.images), epochs.generator(opt.seed, epoch))
    began, steps = time.perf_counter(), list(enumerate(groups, 1))[within.get("step", 0):]
    wanted = [distributed.part(index).numpy() for _, group in steps for index in group]
    fetched = cache.fetch(job.images, wanted, device)
    rows = iter(wanted)
    for step, group in steps:
        schedules.set_rates(opt, job.optimizer, epoch, step, length)
        total, read = torch.zeros((), device=device), 0.0
        for k, index in enumerate(group):
            with distributed.summed_later(job.run, k + 1 < len(group)):
                loss, kept, share = batch_loss(opt, job, (epoch, step, k), len(index),
                                               next(fetched), next(rows))
                epochs.check_readable(share, len(index), epoch, step)
                job.precision.scaler.scale(loss * kept / len(group)).backward()
            total += loss.detach() * kept / len(group)
            read += share * len(index)
        total = distributed.mean(total[None], 1)
        epochs.check_loss(total, epoch, step, epochs.kept(opt))
        means.add(total.tolist(), round(read))
        epochs.descend(opt, job.network, job.optimizer, job.precision.scaler)
        on_step({"step": step, "meters": means.state()})
    if not means["train_loss"].count:
        raise BadInput(f"{opt.data_folder}: none of its {len(job.images)} images can be read; give "
                       f"another --data_path")
    count = sum(len(index) for _, group in steps for index in group)
    return means.means() | {"learning_rate": schedules.rate_now(job.optimizer), "images_per_second":
                            count / (time.perf_counter() - began)}


def batch_loss(opt: argparse.Namespace, job: Job, place: tuple, n: int, batch: Tensor,
               rows: np.ndarray) -> tuple[Tensor, float, float]:
    """(the loss of this rank's part `rows` of a batch of `n` images, its weight beside those of the
    other ranks, what share of the batch could be read); place: (epoch, step, number of the batch),
    from which all follows that is random; batch: uint8 `[B, 3, S, S]`, the images of `rows` as they
    are stored."""
    rng, device = epochs.generator(opt.seed, *place), batch.device
    mine = distributed.part(torch.arange(n))
    drawn = {name: value[mine] for name, value in job.recipe.draw(n, rng).items()}
    cells = (job.recipe.size // job.network.cell) ** 2
    noise = torch.rand(n, cells, generator=rng)[mine].to(device)
    inputs = job.recipe.train(batch, drawn)
    good = torch.from_numpy(~job.images.lost[rows])
    everyone = float(distributed.mean(good.float().mean()[None].to(device), len(rows)))
    weight = float(good.float().mean()) / max(everyone, 1e-9)
    if good.any() and not good.all():  # all of none: the ranks step together
        inputs, noise = inputs[good.to(device)], noise[good.to(device)]
    with job.precision.autocast():
        loss, *_ = job.run(inputs, opt.mask_ratio, noise)
    if loss.dim():  # DataParallel gives a loss of each GPU, of as many images as torch.chunk deals
        of = torch.tensor([len(part) for part in inputs.chunk(len(job.run.device_ids))])
        loss = (loss * (of / len(inputs)).to(loss)).sum()
    return loss, weight, everyone


# ---------------------------------------------------------------- rates of the layers

def layer_of(name: str, depths: tuple[int, ...], kind: str) -> int:
    """Number of the layer that a parameter belongs to, 0 the one nearest to the pixels.

    depths: blocks, of each stage of a ConvNeXt V2, or of a vision transformer. kind: 'layer': each
    block is one; 'group', of ConvNeXt V2: the stages are one each, but three blocks of the third.
    Of a ConvNeXt V2, the down-sampling before a stage goes with its first block.
    """
    found = re.match(r"(blocks|stages|downsample_layers)\.(\d+)(?:\.(\d+))?", name)
    if not found:
        return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed")) \
            else last_layer(depths, kind)
    part, stage, block = found[1], int(found[2]), int(found[3] or 0)
    if part == "blocks":
        return stage + 1
    if part == "downsample_layers":
        block = 0
    if kind == "group":
        if part == "downsample_layers" and stage == 0:
            return 0
        return (1, 2, 3 + block // 3, 12)[stage]
    return sum(depths[:stage]) + block + 1


def last_layer(depths: tuple[int, ...], kind: str) -> int:
    """Number of the last layer, of the classifier's norm and head."""
    return 13 if kind == "group" else sum(depths) + 1


def layer_decay_groups(model: nn.Module, layer_decay: float, weight_decay: float,
                       kind: str = "layer") -> list[dict]:
    """Parameter groups {params, names, lr_scale, weight_decay} whose rate falls by `layer_decay`
    from each layer (`layer_of`) to the one before it (Clark et al. 2020, section 3.2); biases,
    vectors, positions, class token and GRN's scales do not decay."""
    last, groups = last_layer(model.depths, kind), {}
    for name, part in model.named_parameters():
        if not part.requires_grad:
            continue
        plain = part.ndim == 1 or name.endswith((".bias", ".gamma", ".beta")) \
            or name in ("cls_token", "pos_embed")
        layer = layer_of(name, model.depths, kind)
        group = groups.setdefault((layer, plain), {
            "params": [], "names": [], "lr_scale": layer_decay ** (last - layer),
            "weight_decay": 0.0 if plain else weight_decay})
        group["params"].append(part)
        group["names"].append(name)
    return list(groups.values())


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of pre-training: biases and vectors do not decay; class and mask token, and
    GRN's scales, do."""
    parts = [part for part in model.parameters() if part.requires_grad]
    return [{"params": [part for part in parts if part.ndim <= 1], "weight_decay": 0.0},
            {"params": [part for part in parts if part.ndim > 1], "weight_decay": weight_decay}]


def set_optimizer(opt: argparse.Namespace, network: nn.Module) -> torch.optim.AdamW:
    """AdamW of pre-training, in one pass over all weights."""
    groups = [{**group, "base": opt.learning_rate}
              for group in decay_groups(network, opt.weight_decay)]
    return torch.optim.AdamW(groups, opt.learning_rate, betas=(0.9, 0.95), fused=True)
