"""Rates of the three training scripts against the usual way, and what a larger task would cost.

    python benchmarks/training.py                 everything, about 20 minutes on two CPU cores
    python benchmarks/training.py pretrain probe  some of pretrain, probe, finetune, start, growth

The usual way is own code in the textbook manner: each image is opened and transformed with PIL by
loader workers, every epoch anew; contiguous float32; a memory bank that gathers `[B, K+1, d]`
rows; one training per held-out subject. The scripts run as a user runs them. Rounds alternate
between the two, and each counts with its best round, which other programs disturb least.
"""
import argparse
import contextlib
from functools import partial
from importlib import import_module
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms as vision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bank_step
import dataset
from benchmarks.measuring import quietly
from evaluation import descent
from evaluation.fold_heads import Task
from images import lists, transforms
from training import devices, record, supervised
from models import create_classifier, create_model
from models.alexnet import ConvBlock
from NCE.NCECriterion import NCESoftmaxLoss
import itertools

PARTS = ("pretrain", "probe", "finetune", "start", "growth")
BATCH, K = 256, 4096


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- the usual way

class TextbookSet(torch.utils.data.Dataset):
    """A pair per item, transformed with PIL; returns its index and label as well."""

    def __init__(self, clips):
        self.clips = clips
        normalize = vision.Normalize([0.5] * 3, [0.1] * 3), vision.Normalize([0.5], [0.1])
        flip = vision.RandomHorizontalFlip()
        self.rgb = vision.Compose([vision.Resize(256), vision.CenterCrop(224), flip,
                                   vision.ColorJitter(0.4, 0.4, 0.4),
                                   vision.RandomGrayscale(0.2), vision.ToTensor(), normalize[0]])
        self.depth = vision.Compose([vision.Resize(256), vision.CenterCrop(224), flip,
                                     vision.ToTensor(), normalize[1]])

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        clip = self.clips.clips[i]
        rgb = self.rgb(Image.open(self.clips.folder / clip.paths[0]).convert("RGB"))
        depth = self.depth(Image.open(self.clips.folder / clip.paths[1]).convert("L"))
        return torch.cat([rgb, depth]), i, clip.label


def textbook_loader(opt, batch_size):
    return torch.utils.data.DataLoader(TextbookSet(opt.clips), batch_size, shuffle=True,
                                       num_workers=opt.num_workers)


def sgd(*modules):
    return torch.optim.SGD([p for m in modules for p in m.parameters()], 0.003, momentum=0.9,
                           weight_decay=1e-4)


def textbook_pretrain(opt):
    """Pairs per second of one epoch."""
    model, criterion = create_model("alexnet").to(opt.device).train(), NCESoftmaxLoss()
    contrast = bank_step.TextbookBank(128, len(opt.clips), K, use_softmax=True).to(opt.device)
    optimizer, start = sgd(model), time.perf_counter()
    for x, index, _ in textbook_loader(opt, BATCH):
        index = index.to(opt.device)
        idx = torch.randint(len(opt.clips), (len(index), K + 1), device=opt.device)
        idx[:, 0] = index
        loss = sum(criterion(out) for out in contrast(*model(x.to(opt.device)), index, idx))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return len(opt.clips) / (time.perf_counter() - start)


def textbook_heads(opt, frozen, batch_size=128):
    """Clips per second of one epoch of one subject's head, the encoder frozen or trained."""
    model = create_model("alexnet").to(opt.device).eval().requires_grad_(not frozen)
    for block in model.modules():  # norms with fixed statistics are layers of their own
        if isinstance(block, ConvBlock):
            block.forward = partial(torch.nn.Sequential.forward, block)
    head = create_classifier("alexnet", 5, opt.clips.n_label).to(opt.device)
    optimizer, start = sgd(*[head] if frozen else [model, head]), time.perf_counter()
    for x, _, label in textbook_loader(opt, batch_size):
        loss = F.cross_entropy(head(*model(x.to(opt.device), 5)), label.to(opt.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return len(opt.clips) / (time.perf_counter() - start)


# ---------------------------------------------------------------- this code

def encoder_rate(opt, amp, steps=4):
    """Pairs per second of forward, backward and optimizer alone, on synthetic input."""
    model = create_model("alexnet").to(opt.device, memory_format=torch.channels_last).train()
    autocast = devices.mixed_precision(amp, opt.device).autocast
    x = torch.randn(BATCH, 4, 224, 224, device=opt.device).to(memory_format=torch.channels_last)
    optimizer, target = sgd(model), torch.randn(BATCH, 128, device=opt.device)
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            synchronize(opt.device)
            start = time.perf_counter()
        with autocast():
            rgb, depth = model(x)
        loss = ((rgb + depth).float() * target).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    synchronize(opt.device)
    return steps * BATCH / (time.perf_counter() - start)


def our_pretrain(opt, amp):
    """Pairs per second of the script's second epoch, as its log says; the first one warms up."""
    with tempfile.TemporaryDirectory() as folder:
        quietly(import_module("pre-train_DVSCL").main, *opt.flags, "--model_path", folder,
                "--epochs", 2, "--contrast", "bank", *["--amp"] * amp)
        (run,) = Path(folder).glob("*/log.jsonl")
        return record.read_log(run.parent)[-1]["pairs_per_second"]


def our_finetune(opt, amp):
    """Clips per second of the script's second epoch for one held-out subject."""
    module, seconds = import_module("fine-tune_DVSCL"), []
    train = supervised.train_epoch

    def timed(opt_, job, *args):
        start = time.perf_counter()
        means = train(opt_, job, *args)
        seconds.append((time.perf_counter() - start) / len(job.members))
        return means
    supervised.train_epoch = timed
    with tempfile.TemporaryDirectory() as folder:
        quietly(module.main, *opt.flags, "--model_path", "random", "--save_path", folder,
                "--epochs", 2, "--subject", opt.clips.people[0][1], *["--amp"] * amp)
    supervised.train_epoch = train
    return 1 / seconds[-1]


def best(rounds, **measures):
    """Best of the rounds of each measure, taken in turn."""
    rates = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            rates[name].append(measure())
    return {name: max(values) for name, values in rates.items()}


# ---------------------------------------------------------------- parts

def pretrain(opt):
    rate = best(opt.rounds, usual=lambda: textbook_pretrain(opt),
                alone=lambda: encoder_rate(opt, False), ours=lambda: our_pretrain(opt, False),
                alone_amp=lambda: encoder_rate(opt, True), amp=lambda: our_pretrain(opt, True))
    print(f"pre-training, AlexNet, {len(opt.clips)} pairs, batch {BATCH}, K {K}; pairs/s\n"
          f"  usual way      {rate['usual']:8.1f}\n"
          f"  here           {rate['ours']:8.1f}  {rate['ours'] / rate['usual']:5.2f}x the usual  "
          f"{rate['ours'] / rate['alone']:.2f} of the encoder alone ({rate['alone']:.1f})\n"
          f"  here, --amp    {rate['amp']:8.1f}  {rate['amp'] / rate['usual']:5.2f}x the usual  "
          f"{rate['amp'] / rate['alone_amp']:.2f} of the encoder alone ({rate['alone_amp']:.1f})")
    if opt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        our_pretrain(opt, True)
        print(f"  peak GPU memory with --amp {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB")


def probe(opt):
    people = len(opt.clips.people)
    usual = people * 30 * len(opt.clips) / textbook_heads(opt, frozen=True)
    print(f"heads on the frozen encoder, leave-one-subject-out, {people} subjects, 30 epochs, "
          f"{len(opt.clips)} clips; seconds\n"
          f"  usual way      {usual:8.0f}  ({usual / 3600:.1f} hours; one epoch of one subject "
          f"measured)")
    for title, name, flags in (
            ("probing, --l2 given", "LinearProbing_DVSCL_10fold", ["--l2", 1e-3]),
            ("probing, l2 by inner folds", "LinearProbing_DVSCL_10fold", []),
            ("probing by SGD", "LinearProbing_DVSCL_10fold", ["--epochs", 30]),
            ("--freeze_encoder", "fine-tune_DVSCL", ["--freeze_encoder", "--epochs", 30])):
        with tempfile.TemporaryDirectory() as folder:
            seconds = quietly(import_module(name).main, *opt.flags, "--model_path", "random",
                              "--save_path", folder, "--protocol", "loso", *flags)
        print(f"  {title:27s}{seconds:6.1f}  {usual / seconds:.0f}x", flush=True)


def finetune(opt):
    rate = best(opt.rounds, usual=lambda: textbook_heads(opt, frozen=False),
                ours=lambda: our_finetune(opt, False), amp=lambda: our_finetune(opt, True))
    print(f"fine-tuning one held-out subject, AlexNet layer 5; clips/s\n"
          f"  usual way      {rate['usual']:8.1f}\n"
          f"  here           {rate['ours']:8.1f}  {rate['ours'] / rate['usual']:5.2f}x\n"
          f"  here, --amp    {rate['amp']:8.1f}  {rate['amp'] / rate['usual']:5.2f}x")


def start(opt):
    """Seconds from main() to the first training batch; for probing, to the first one to encode."""
    class Reached(Exception):
        pass

    def reached(*args, **more):
        raise Reached
    print("seconds to the first step, data cached, without imports")
    for name, step, flags in (
            ("pre-train_DVSCL", "train_transform", ["--model_path"]),
            ("LinearProbing_DVSCL_10fold", "eval_transform", ["--model_path", "random",
                                                              "--save_path"]),
            ("fine-tune_DVSCL", "train_transform", ["--model_path", "random", "--save_path"])):
        usual = getattr(transforms, step)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            setattr(transforms, step, reached)
            try:
                quietly(import_module(name).main, *opt.flags, *flags, folder)
            except Reached:
                print(f"  {name:28s}{time.perf_counter() - began:5.2f}")
            finally:
                setattr(transforms, step, usual)


def growth(opt):
    """How a bank step and an epoch of all heads grow, one quantity at a time."""
    usual = {"n": 1000, "nce_k": K, "feat_dim": 128}
    print("one bank step, B 256\n  pairs        K    d       ms  extra MB  banks MB")
    for change in ([{"n": n} for n in (1000, 10_000, 100_000)]
                   + [{"nce_k": k, "n": 100_000} for k in (1024, 16_384)]
                   + [{"feat_dim": d, "n": 100_000} for d in (64, 512)]):
        case = {**usual, **change}
        step = bank_step.run_apart("ours", "--device", str(opt.device), **case)
        print(f"  {case['n']:7d} {case['nce_k']:6d} {case['feat_dim']:4d} {step['ms']:8.1f} "
              f"{step['bytes'] / 1e6:9.1f} {2e-6 * 4 * case['n'] * case['feat_dim']:9.1f}")
    print(f"heads of all subjects, {len(opt.clips)} clips, batch {BATCH}\n"
          f"  subjects  features  ms/epoch")
    clips = len(opt.clips)
    for people, dim in ((10, 9216), (95, 9216), (500, 9216), (95, 1024), (95, 36_864)):
        features, labels = torch.randn(1, clips, dim, device=opt.device), torch.arange(clips) % 4
        fold_of = torch.arange(clips).numpy() % people
        task = Task(features, labels.numpy(), 4, fold_of, list(range(people)))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run = import_module("LinearProbing_DVSCL_10fold").parse_option(
                ["--data_folder", ".", "--save_path", ".", "--model_path", "random", "--epochs",
                 "3", "--learning_rate", "0.001"])
            heads = descent.start(run, task, 36, [str(i) for i in range(people)])
        times = [time.perf_counter()]
        for epoch in range(1, run.epochs + 1):
            heads.epoch(epoch)
            times.append(time.perf_counter())
        least = min(b - a for a, b in itertools.pairwise(times))
        print(f"  {people:8d} {dim:9d} {1000 * least:9.1f}")


# ---------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--work", default="runs/benchmark", help="folder for the rendered data")
    parser.add_argument("--clips", type=int, default=943, help="pairs, over 95 subjects [943]")
    parser.add_argument("--rounds", type=int, default=3, help="of every rate [3]")
    parser.add_argument("--num_workers", type=int, default=min(4, os.cpu_count()),
                        help="loader workers of the usual way [one per core, at most 4]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    opt = parser.parse_args()
    if set(opt.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    opt.device, work = torch.device(opt.device), Path(opt.work)
    if not (work / "lists").exists():
        quietly(import_module("render").main, "casme3", "--data_folder", work / "data",
                "--subjects", 95, "--clips_per_subject", -(-opt.clips // 95))
        clips = dataset.read_clips(work / "data").clips
        lists.write_lists(work / "lists", clips[:opt.clips])
        (work / "lists" / "encoding.json").write_bytes(
            (work / "data" / "encoding.json").read_bytes())
    opt.clips = dataset.read_clips(work / "data", work / "lists")
    opt.flags = ["--data_folder", work / "data", "--list_folder", work / "lists", "--cache",
                 work / "cache", "--tb_path", work / "tensorboard", "--device", opt.device]
    quietly(import_module("pre-train_DVSCL").main, *opt.flags, "--model_path", work / "first",
            "--epochs", 1, "--resume", "auto")  # decodes the images
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {opt.device}, "
          f"{torch.get_num_threads()} threads, {opt.num_workers} loader workers")
    for part in opt.parts or PARTS:
        globals()[part](opt)


if __name__ == "__main__":
    main()
