"""torchrun's environment: who this process is, and which share of the runs is its own."""
import os

import torch


def rank():
    """(rank, world size) from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device):
    """The GPU of this process where several share a node."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def share(items):
    """The items dealt to this rank, in turn."""
    number, size = rank()
    return items[number::size]
