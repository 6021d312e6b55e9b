"""What a run computes on: the device, its memory, its precision."""
import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from util import BadInput

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt (malloc.h)


def keep_memory(keep: bool = True) -> None:
    """Whether large blocks that are freed stay with the process. By default the GNU C library hands
    each back to the system, which clears it page by page for the next one: a fifth of the time
    that a video network's training step takes on the CPU. Does nothing with another library."""
    mallopt = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1 if keep else 128 * 1024)


def pick_device(name: str) -> torch.device:
    """torch.device for --device, of which a CPU's memory is then kept (`keep_memory`); raises
    BadInput for one that is not here."""
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
    if device.type == "cpu":
        keep_memory()
    return device


def local_device(name: str) -> torch.device:
    """`pick_device`, and of several GPUs of a node that ranks share the one of this rank; raises
    BadInput if there are fewer."""
    device = pick_device(name)
    if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise BadInput(f"--device {device}: every process would take this one; say --device cuda, "
                       f"and choose GPUs with CUDA_VISIBLE_DEVICES")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        gpus = torch.cuda.device_count()
        if device.index >= gpus:
            raise BadInput(f"--nproc_per_node: more processes than the {gpus} GPUs of this "
                           f"machine; start {gpus}, or say --device cpu")
        torch.cuda.set_device(device)
    return device


class Scaler(torch.amp.GradScaler):
    """One that a run which needed none, and left no state, may go on with."""

    def load_state_dict(self, state: dict) -> None:
        if state:
            super().load_state_dict(state)


class Precision(NamedTuple):
    """`autocast()`: context of a forward pass; `scaler` of the loss; both idle without --amp."""
    autocast: Callable
    scaler: Scaler


def mixed_precision(amp: bool, device: torch.device) -> Precision:
    """The Precision of --amp on `device`."""
    half = torch.bfloat16
    if amp and device.type == "cpu" and not _cpu_has_bfloat16():
        amp = False
    # a GPU that only emulates bfloat16 is slower with it than in float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        half = torch.float16
    scaler = Scaler(device.type, enabled=amp and half == torch.float16)

    def autocast():
        return torch.autocast(device.type, dtype=half) if amp else contextlib.nullcontext()
    return Precision(autocast, scaler)


@functools.cache
def _cpu_has_bfloat16():
    """Whether oneDNN computes in bfloat16 on this processor; if not, says so, once."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not has:
        # PyTorch's own loops take 12 to 19 times as long as float32 (AVX2 alone, torch 2.14)
        print("--amp: this processor does not compute in bfloat16; float32 is used, which is many "
              "times faster here")
    return has
