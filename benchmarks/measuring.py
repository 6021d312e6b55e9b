"""What benchmarks measure by: seconds of a script, memory of a process."""
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


def quietly(main: Callable, *argv: object) -> float:
    """Runs a script's main without its output; returns the seconds it took."""
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        main([str(a) for a in argv])
    return time.perf_counter() - start


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
