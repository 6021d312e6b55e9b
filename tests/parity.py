"""The weights that the README of the parity fixtures gives, and what is compared with them."""
import json
import zlib

import numpy as np
import pytest
import torch
from conftest import PARITY


def fixtures(name):
    """The content of a file of numbers to reproduce; skips where there is none."""
    path = PARITY / f"{name}.json"
    if not path.exists():
        pytest.skip("no parity fixtures here")
    return json.loads(path.read_text())


def filled(model):
    """The model with the weights that the README of the fixtures gives."""
    state = model.state_dict()
    for key, value in state.items():
        if key.endswith("pos_embed"):
            continue
        a = np.random.RandomState(zlib.crc32(key.encode()) & 0xffffffff) \
            .standard_normal(size=tuple(value.shape))
        if key in ("cls_token", "mask_token"):
            a = .02 * a
        elif key.endswith(("gamma", "beta", "bias")):
            a = .1 * a
        elif a.ndim == 1:
            a = 1 + .1 * a
        else:
            a = a * np.sqrt(1 / np.prod(a.shape[1:]))
        state[key] = torch.from_numpy(a)
    model.load_state_dict(state)
    return model.eval()


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def uniform(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).rand(*shape))


def near(actual, expected, tolerance=1e-5):
    """Whether no number is further off than the share `tolerance` of the largest."""
    return (actual - expected).abs().max() <= tolerance * expected.abs().max()


def count(model):
    return sum(value.numel() for value in model.parameters())
