"""TM-MMNet against the usual way: clips per second in training, time to prepare, memory of V5.

  python benchmarks/mmnet.py                                      # about 10 minutes, two CPU cores
  python benchmarks/mmnet.py --parts train --models V4 --size 64 --clips 32 --repeats 1   # a look

The usual way is own code in the textbook manner: in every epoch, loader workers read the five
frames of each clip, draw jitter, crop and mirror, and compute the flow (Farnebäck with the
published parameters); the network is contiguous float32; each held-out subject starts a process.
The model alone is forward, loss, backward and optimizer of the same network on random input that
lies in memory. The data are a rendered stand-in for CASME II. Rounds take the ways in turn;
printed are medians of the rates, and of the ratios within a round, which other programs disturb
less. Wanted: with --amp three times the usual way and 0.90 of the model alone; flow.npy of 400 MB
at most; V5 at batch 32 in less than 24 GB.
"""
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import cv2
import numpy as np
import torch
from torch.nn import functional as F

import dataset
import prepare
import render
import train_MMNet
from benchmarks import measuring
from benchmarks.measuring import quietly, rounds
from images import flow, videos
from models import mmnet
from rendering import casme2
from training import devices, motion
from training.losses import classification_loss

PARTS = ("train", "prepare", "memory")
PREPARED = 224  # pixels of the prepared frames
LARGE = "V5NR"  # the variant whose memory is looked at
# to train: those that see the channels which the usual way makes, and learn classes alone
VARIANTS = tuple(name for name, layout in mmnet.LAYOUTS.items()
                 if layout.channels == "nr" and not layout.units)
EVERY = sum(casme2.COUNTS)  # clips of the set itself


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--models", nargs="+", choices=VARIANTS, metavar="NAME",
                        default=["V3NR", "V4"], help="variants to train: " + ", ".join(VARIANTS))
    parser.add_argument("--size", type=util.number(int, 32, PREPARED), default=112,
                        help="side of the frames in training, pixels, a multiple of 16")
    parser.add_argument("--clips", type=util.positive_int, default=64,
                        help="clips of a training epoch, a multiple of --batch_size")
    parser.add_argument("--batch_size", type=util.number(int, 4), default=32, help="clips a step")
    parser.add_argument("--accumulate", type=util.positive_int, default=4,
                        help="parts of a batch where memory is looked at")
    parser.add_argument("--prepared", type=util.number(int, casme2.ALL_SUBJECTS), default=EVERY,
                        help="clips to prepare; the time for all is extrapolated from fewer")
    parser.add_argument("--repeats", type=util.positive_int, default=3, help="rounds of training")
    parser.add_argument("--num_workers", type=util.positive_int, default=min(4, os.cpu_count()),
                        help="loader workers of the usual way; processes that prepare")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as of train_MMNet.py")
    parser.add_argument("--work", metavar="DIR", help="folder for the data, which a later run uses "
                        "again [a temporary one]")
    opt = parser.parse_args(argv)
    if opt.clips % opt.batch_size:
        parser.error("argument --clips: a multiple of --batch_size, so that all steps are alike")
    return opt


# ---------------------------------------------------------------- the usual way

class TextbookSet(torch.utils.data.Dataset):
    """A clip per item, whose flow is computed from five files when it is asked for."""

    def __init__(self, raw, rows, size):
        self.raw, self.rows, self.size = raw, rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        onset, apex, offset = (int(row[name]) for name in ("onset", "apex", "offset"))
        jitter = [random.randint(0, int(videos.SHARE * n)) for n in (apex - onset, offset - apex)]
        (box,), (mirror,) = videos.draw_boxes(1, 1, torch.default_generator)  # shares of the frame
        frames = [self.read(f"{self.raw}/{row['subject']}/{row['clip']}/reg_img{n}.jpg", box,
                            mirror) for n in videos.five_frames(onset, apex, offset, jitter=jitter)]
        steps = flow.flow_steps([flow.grey(frame) for frame in frames], "farneback")
        moved = flow.channels(torch.from_numpy(steps), "nr").transpose(0, 1)
        onset = torch.from_numpy(frames[0]).permute(2, 0, 1).float() / 255
        return moved, onset, int(row["label"])

    def read(self, path, box, mirror):
        image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
        height, width = image.shape[:2]
        left, top, wide, high = (box.numpy() * (width, height, width, height)).round().astype(int)
        image = cv2.resize(image[top:top + high, left:left + wide], (self.size, self.size))
        return cv2.flip(image, 1) if mirror else image


def usual_epoch(network, optimizer, loader, device):
    devices.keep_memory(False)
    network.train()
    for moved, onset, label in loader:
        loss = F.cross_entropy(network(moved.to(device), onset.to(device)), label.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    devices.keep_memory(device.type == "cpu")


def start_seconds(name, size):
    """Seconds from the start of a process until its network stands."""
    code = f"import cv2, torch; from models import mmnet; mmnet.create_mmnet({name!r}, size={size})"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return time.perf_counter() - start


# ---------------------------------------------------------------- this code

def set_job(folder, count, device, *flags):
    """(options of train_MMNet.py, its motion.Job on the first clips of a set)"""
    opt = train_MMNet.parse_option([
        "--data_folder", str(folder), "--save_path", os.devnull, "--tb_path", os.devnull,
        "--channels", "nr", *map(str, flags)])
    with contextlib.redirect_stdout(None):  # action units, which no variant here looks at
        data, units = dataset.read_videos(folder, opt.size, opt.au_sides)
    return opt, train_MMNet.set_job(opt, data, units, np.arange(count), "benchmark", device)


def our_epoch(opt, job):
    motion.train_epoch(opt, job, "all", 1, 1, {}, lambda state: None)


def alone_epoch(job, steps, moved, onset, label):
    for _ in range(steps):
        with job.precision.autocast():
            logits = job.run(moved, onset)
        classification_loss(logits, label).mean().backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)


def step_memory(opt, folder):
    """(parameters, peak bytes, seconds) of an optimizer step of the large variant, which comes
    after another on two clips: AdamW's means are there from the first step on."""
    devices.pick_device(str(opt.device))  # as the script does, in this process too
    run, job = set_job(folder, opt.batch_size, opt.device, "--model", LARGE, "--batch_size",
                       opt.batch_size, "--accumulate", opt.accumulate)
    our_epoch(run.changed(accumulate=1), job._replace(members=job.members[:2]))
    start = time.perf_counter()
    our_epoch(run, job)
    # of this program alone, where the peak that getrusage knows is also that of its parent
    peak = measuring.memory(opt.device)[1]
    return (sum(part.numel() for part in job.network.parameters()), peak,
            time.perf_counter() - start)


# ---------------------------------------------------------------- parts

def make_set(opt, work):
    """(folder of the frames, prepared folder, seconds that the preparation took)"""
    count = max(opt.prepared * ("prepare" in opt.parts), opt.clips, casme2.ALL_SUBJECTS)
    raw, folder, seconds = work / f"raw_{count}", work / f"set_{count}", None
    quietly(render.main, "casme2", "--data_folder", raw, "--clips", count, "--workbook", "csv")
    if "prepare" in opt.parts or not (folder / "flow.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what is half done would not be timed
        seconds = quietly(prepare.main, "casme2", "--raw", raw, "--annotation",
                           raw / casme2.WORKBOOKS["csv"], "--data_folder", folder,
                           "--size", PREPARED, "--num_workers", opt.num_workers)
    return raw, folder, seconds


def measure(opt, name, raw, folder):
    """The `rounds` of one variant."""
    run, job = set_job(folder, opt.clips, opt.device, "--model", name, "--size", opt.size,
                       "--batch_size", opt.batch_size)
    rows, _ = util.read_table(folder / "clips.csv", fix="prepare it again")
    clips = TextbookSet(raw, [row for _, row in rows], opt.size)
    usual = mmnet.create_mmnet(name, len(casme2.CLASSES), channels="nr", size=opt.size)
    usual = usual.to(opt.device)
    descent = torch.optim.AdamW(usual.parameters(), run.learning_rate,
                                weight_decay=run.weight_decay)
    moved = torch.randn(opt.batch_size, 4, mmnet.STEPS, opt.size, opt.size, device=opt.device)
    known = (moved.to(memory_format=torch.channels_last_3d),
             torch.rand(opt.batch_size, 3, opt.size, opt.size, device=opt.device),
             torch.arange(opt.batch_size, device=opt.device) % len(casme2.CLASSES))

    def ways(count):
        """way → an epoch over the first clips."""
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(clips, range(count)),
                                             opt.batch_size, shuffle=True,
                                             num_workers=opt.num_workers)
        plain, amp = (job._replace(members=job.members[:count],
                                   precision=devices.mixed_precision(amp, opt.device))
                      for amp in (False, True))
        steps = -(-count // opt.batch_size)
        return {"usual": partial(usual_epoch, usual, descent, loader, opt.device),
                "float32": partial(our_epoch, run, plain), "amp": partial(our_epoch, run, amp),
                "alone": partial(alone_epoch, amp, steps, *(one[:count] for one in known))}
    rounds(1, 4, opt.device, ways(4))  # warms up
    return rounds(opt.repeats, opt.clips, opt.device, ways(opt.clips))


def train(opt, raw, folder, _):
    for name in opt.models:
        rates = measure(opt, name, raw, folder)
        middle = {way: statistics.median(values) for way, values in rates.items()}
        def ratio(way, other, rates=rates):
            return statistics.median(a / b for a, b in zip(rates[way], rates[other]))
        print(f"training, {name}, {opt.clips} clips at {opt.size} pixels, batch {opt.batch_size}; "
              f"clips/s\n"
              f"  usual way          {middle['usual']:8.2f}\n"
              f"  here, float32      {middle['float32']:8.2f}  {ratio('float32', 'usual'):.2f}x\n"
              f"  here, --amp        {middle['amp']:8.2f}  {ratio('amp', 'usual'):.2f}x\n"
              f"  model alone, --amp {middle['alone']:8.2f}  of which here "
              f"{ratio('amp', 'alone'):.2f}")
        print(f"  not counted: the usual way's processes, {start_seconds(name, opt.size):.1f} s "
              f"for each subject", flush=True)


def prepared(opt, _, folder, seconds):
    count = len(np.load(folder / "index.npy"))
    flow_size, *others = (os.path.getsize(folder / f"{name}.npy") / 1e6
                          for name in ("flow", "jitter", "frames"))
    print(f"preparation, {count} clips of 5 frames at {PREPARED} pixels, DIS, {opt.num_workers} "
          f"processes, rendering not counted\n  {seconds:.1f} s, {count / seconds:.2f} clips/s; "
          "flow.npy {:.0f} MB, jitter.npy {:.0f}, frames.npy {:.0f}".format(flow_size, *others))
    if count != EVERY:
        print(f"  extrapolated to {EVERY} clips: {seconds * EVERY / count:.0f} s, flow.npy "
              f"{flow_size * EVERY / count:.0f} MB")


def memory(opt, _, folder, __):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        weights, peak, seconds = pool.submit(step_memory, opt, folder).result()
    print(f"memory, {LARGE}, {weights / 1e6:.1f} M parameters, {PREPARED} pixels, float32; a step "
          f"of batch {opt.batch_size}, --accumulate {opt.accumulate}\n  peak {peak / 1e9:.2f} GB, "
          f"{16 * weights / 1e9:.2f} of them weights, gradients and AdamW's two means; "
          f"{seconds:.0f} s")


def main(argv=None):
    opt = parse_option(argv)
    with measuring.workplace(opt, f"OpenCV {cv2.__version__}") as work:
        made = make_set(opt, work)
        for part, report in zip(PARTS, (train, prepared, memory)):
            if part in opt.parts:
                report(opt, *made)


if __name__ == "__main__":
    main()
