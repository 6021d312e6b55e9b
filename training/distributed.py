"""torchrun: one process per GPU (or CPU), any number of nodes.

Every rank draws the same global batch and takes its slice; features, indices and counts are
gathered, so that all ranks hold the same banks and the same weights. Without torchrun every
function here is the identity.
"""
import contextlib
import datetime
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from util import BadInput

TIMEOUT = datetime.timedelta(minutes=10)  # of one rank for another within a step
PATIENCE = datetime.timedelta(days=7)  # where one rank decodes or trains while the others wait
_patient = []  # the group that barriers wait in


def rank() -> tuple[int, int]:
    """(rank, world size) from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def deal(items: list) -> list:
    """The items dealt to this rank, in turn."""
    number, size = rank()
    return items[number::size]


@contextlib.contextmanager
def group(device: torch.device, wanted: bool = True) -> Iterator[None]:
    """The process group for the time of a with block, where torchrun made one and it is `wanted`.

    Rank 0 alone prints. Ranks wait ten minutes for one another within a step, then stop with an
    error; at a barrier as long as it takes. When one of them dies, the others do at once.
    """
    if not wanted or rank()[1] == 1:
        yield
        return
    if rank()[0]:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
    ended = False
    try:
        yield
        ended = True
    finally:
        _patient.clear()
        # NCCL's would wait for ranks that wait for this one, and its error would not be seen
        if ended or device.type != "cuda":
            dist.destroy_process_group()


def active() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized()


def part(index: Tensor) -> Tensor:
    """This rank's contiguous slice of a global batch `[B, ...]`."""
    number, size = rank() if active() else (0, 1)
    return index.tensor_split(size)[number]


def gather(tensor: Tensor) -> Tensor:
    """Concatenates `tensor` of all ranks along dimension 0, in their order; lengths may differ."""
    if not active():
        return tensor
    sizes = [torch.empty(1, dtype=torch.long, device=tensor.device)
             for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(tensor)))
    sizes = torch.cat(sizes).tolist()
    longest = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    longest[:len(tensor)] = tensor
    parts = [torch.empty_like(longest) for _ in sizes]
    dist.all_gather(parts, longest)
    return torch.cat([p[:n] for p, n in zip(parts, sizes)])


class _Gather(torch.autograd.Function):
    """`gather`, whose gradient is the sum of what all ranks have for this rank's part."""

    @staticmethod
    def forward(ctx, tensor):
        return gather(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return part(gradient)


def gather_features(features: Tensor) -> Tensor:
    """`gather` for parts of a global batch as `part` cuts it, through which gradients pass."""
    return _Gather.apply(features) if active() else features


def mean(values: Tensor, count: int) -> Tensor:
    """Mean over all ranks of `values` `[...]`, each rank's being a mean over `count` samples."""
    if not active():
        return values
    total = torch.cat([values * count, values.new_tensor([count])])
    dist.all_reduce(total)
    return total[:-1] / total[-1]


def any_of(mask: np.ndarray) -> np.ndarray:
    """bool `[N]`: where `mask` is True on any rank."""
    if not active():
        return mask
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    value = torch.from_numpy(mask.astype(np.uint8)).to(device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.cpu().numpy().astype(bool)


def highest(number: int) -> int:
    """The highest of all ranks' integers `number`."""
    if not active():
        return number
    value = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def broadcast(tensor: Tensor) -> None:
    """Rank 0's values, in place, on every rank."""
    if active():
        dist.broadcast(tensor, 0)


class _Autocast(nn.Module):
    """A model that enters `autocast()` by itself: DataParallel's threads are told whether it is
    on, but not its type, and would take float16 without a loss scaler for bfloat16."""

    def __init__(self, model, autocast):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, *args):
        with self.autocast():
            return self.model(*args)


def gpus(device: torch.device) -> int:
    """GPUs of this one process: all there are, where --device names none of them."""
    alone = active() or device.type != "cuda" or device.index is not None
    return 1 if alone else torch.cuda.device_count()


def wrap(model: nn.Module, device: torch.device, autocast: Callable) -> nn.Module:
    """The model over this run's devices: DistributedDataParallel under torchrun, DataParallel
    where one process has several GPUs and --device names none of them, else the model itself."""
    if active():
        barrier()  # others may still be looking at files; the constructor's patience is a step's
        # of GRN's scale and shift: single rows, which lie the same whatever their strides say
        warnings.filterwarnings("ignore", r"(?s)Grad strides do not match.*= \[1, 1, 1, \d+\]")
        return nn.parallel.DistributedDataParallel(
            model, [device] if device.type == "cuda" else None)
    if (several := gpus(device)) > 1:
        print(f"{several} GPUs in one process; faster: "
              f"torchrun --nproc_per_node {several} with the same flags")
        return nn.DataParallel(_Autocast(model, autocast))
    return model


def summed_later(model: nn.Module, later: bool) -> contextlib.AbstractContextManager:
    """Context of a backward pass whose gradients the ranks add up with those of the next one, where
    that comes `later`."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return model.no_sync() if wrapped and later else contextlib.nullcontext()


def smallest_slice(n: int, device: torch.device) -> int:
    """Fewest clips that a rank or GPU gets of a global batch of `n`."""
    if active():
        return n // size()
    share = -(-n // gpus(device))  # DataParallel cuts as torch.chunk does
    return (n - 1) % share + 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not active() or dist.get_rank() == 0


def size() -> int:
    """Number of ranks of the group."""
    return dist.get_world_size() if active() else 1


def barrier() -> None:
    """Waits for all ranks, as long as it takes: of folds dealt out, one rank may have one more."""
    if active():
        dist.barrier(group=_patient[0])


def agree(*found: object) -> None:
    """A barrier, at which all ranks raise BadInput unless they have `found` the same: all have
    looked at the run folder before rank 0 writes to it."""
    if not active():
        return
    digest = hashlib.sha256(repr(found).encode("utf-8", "backslashreplace")).digest()
    number = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=_patient[0])
    if int(extremes.sum()):
        raise BadInput("the ranks found different data, checkpoints or finished subjects: all "
                       "nodes take the same files and one shared folder for results; start again")


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 goes through the block before the others, which find what it left on the disk."""
    if not first():
        barrier()
    yield
    if first():
        barrier()
