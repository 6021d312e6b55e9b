"""What benchmarks measure by: seconds of a script, memory of a process."""
import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training import devices

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = """
import sys, time
start = time.perf_counter()
sys.path.insert(0, {root!r})
import util, {script}
from benchmarks import measuring
from training import epochs
import json, torch
class Enough(Exception): pass
def step(self, save): raise Enough
epochs.Keeper.step = step
try: {script}.main({argv!r})
except Enough: pass
seconds = time.perf_counter() - start
print(json.dumps([seconds, measuring.memory(torch.device("cpu"))[1]]))
"""


def quietly(main: Callable, *argv: object) -> float:
    """Runs a script's main without its output; returns the seconds it took."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        main([str(a) for a in argv])
    return time.perf_counter() - start


@contextlib.contextmanager
def workplace(opt: argparse.Namespace, *versions: str) -> Iterator[Path]:
    """The folder for what a benchmark makes, --work or one that goes afterwards, under a line of
    what it measures on; opt.device becomes the device it names."""
    opt.device = devices.pick_device(opt.device)
    print(", ".join([f"torch {torch.__version__}", f"Python {platform.python_version()}", *versions,
                     str(opt.device), f"{torch.get_num_threads()} threads",
                     f"{opt.repeats} rounds"]), flush=True)
    with contextlib.ExitStack() as stack:
        work = Path(opt.work or stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        yield work


def rounds(repeats: int, count: int, device: torch.device,
           ways: dict[str, Callable]) -> dict[str, list[float]]:
    """way → rates of each round, in which the ways take turns; count: of what each goes through."""
    rates = {name: [] for name in ways}
    for _ in range(repeats):
        for name, epoch in ways.items():
            start = time.perf_counter()
            epoch()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            rates[name].append(count / (time.perf_counter() - start))
    return rates


def warm_rounds(repeats: int, count: int, device: torch.device,
                ways: dict[str, Callable]) -> dict[str, list[float]]:
    """`rounds` after one that warms up."""
    rounds(1, count, device, ways)
    return rounds(repeats, count, device, ways)


def memory(device: torch.device, reset: bool = False) -> tuple[int, int]:
    """(held now, peak since the last reset) in bytes."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM"))


def make_tree(folder: Path, count: int, n_label: int) -> None:
    """A set of `count` images in class folders: links to a few, so that it takes no room."""
    rng = np.random.default_rng(0)
    for k in range(count):
        place = folder / ("train" if k % 20 else "test") / str(k % n_label)
        if k < 20 * n_label:
            place.mkdir(parents=True, exist_ok=True)
        if k < 64:
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(place / f"{k}.jpg")
            continue
        j = k % 64
        first = folder / ("train" if j % 20 else "test") / str(j % n_label) / f"{j}.jpg"
        os.link(first, place / f"{k}.jpg")


def first_step(script: str, argv: list[str]) -> tuple[float, int]:
    """(seconds from the start of a training script's process to the end of its first step, peak
    bytes of that process)."""
    code = FIRST_STEP.format(root=str(ROOT), script=script, argv=argv)
    said = subprocess.run([sys.executable, "-c", code], check=True, text=True,
                          capture_output=True).stdout
    return tuple(json.loads(said.splitlines()[-1]))
