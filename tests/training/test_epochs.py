"""The rates' formulas, with plain numbers."""
import math
import platform
import subprocess
import sys

import pytest
import torch

from models import create_model
from tests.conftest import ROOT
from training import distributed, epochs, schedules
from util import BadInput


def test_steps_are_taken_after_their_epochs():
    # progress counts epochs: 1.5 is in the middle of the second one, 2.0 its last step
    for progress, passed in ((0.01, 0), (1.5, 0), (2.0, 0), (2.01, 1), (3.0, 1), (4.0, 1),
                             (4.25, 2), (99, 2)):
        assert schedules.step_rate(0.3, progress, [2, 4], 0.1) == pytest.approx(0.3 * 0.1 ** passed)
    assert schedules.step_rate(0.3, 50, [], 0.1) == 0.3


@pytest.mark.parametrize("warmup", [0, 1.5])
def test_the_cosine_falls_from_the_base_to_nothing(warmup):
    for tenth in range(1, 101):
        progress = tenth / 10
        done = max(progress - warmup, 0) / (10 - warmup)
        assert schedules.cosine_rate(0.3, progress, 10, warmup) \
            == pytest.approx(0.15 * (1 + math.cos(math.pi * done)), abs=1e-15)
    assert schedules.cosine_rate(0.3, warmup, 10, warmup) == 0.3
    assert schedules.cosine_rate(0.3, warmup + (10 - warmup) / 2, 10, warmup) == pytest.approx(0.15)
    assert schedules.cosine_rate(0.3, 10, 10, warmup) == pytest.approx(0, abs=1e-15)
    # a step is taken at the rate of its beginning: the first at the base, the last above 0
    assert schedules.cosine_rate(0.3, warmup + 0.25, 10, warmup, step=0.25) == 0.3
    assert schedules.cosine_rate(0.3, 10, 10, warmup, step=0.25) \
        == schedules.cosine_rate(0.3, 9.75, 10, warmup) > 0


def test_the_exponential_rate_falls_with_every_epoch_until_its_plateau():
    for epoch in range(1, 31):
        for part in (0.001, 0.5, 1):  # the same throughout an epoch
            actual = schedules.exponential_rate(0.3, epoch - 1 + part, 0.9, 12)
            assert actual == pytest.approx(0.3 * 0.9 ** min(epoch - 1, 12))
    last = schedules.exponential_rate(0.3, 13, 0.9, 12)
    assert schedules.exponential_rate(0.3, 12, 0.9, 12) == pytest.approx(last / 0.9)
    assert schedules.exponential_rate(0.3, 13.1, 0.9, 12) == last == schedules.exponential_rate(
        0.3, 99, 0.9, 12)
    assert schedules.exponential_rate(0.3, 7, 0.9, 0) == 0.3


@pytest.mark.parametrize("size, refused", [(32, True), (48, False)])
def test_a_map_of_one_position_takes_two_clips_on_a_device(monkeypatch, size, refused):
    """Of 11 clips at batch 8 a batch of 3 is left, and one of two ranks gets a single clip."""
    monkeypatch.setattr(distributed, "smallest_slice", lambda n, device: n // 2)
    model, device = create_model("resnet18v1", size=size), torch.device("cpu")
    if refused:
        with pytest.raises(BadInput, match="a batch of 3, and a device 1 of them"):
            epochs.check_slices(11, 8, model, device)
    else:
        epochs.check_slices(11, 8, model, device)
        with pytest.raises(BadInput, match="of 11 images it leaves a batch of 3"):
            epochs.check_slices(11, 8, model, device, "images", single=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process_when_asked_to():
    # a process of its own: here, other tests may have left the heap in any state
    code = """
import resource, torch
from training import devices

def memory():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

for keep in (False, True):
    devices.keep_memory(keep)
    before = memory()
    block = torch.empty(2 ** 25).fill_(1)
    full = memory() - before
    del block
    print(full, memory() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                         stdout=subprocess.PIPE).stdout
    (_, given_back), (full, kept) = (map(int, row.split()) for row in out.splitlines())
    assert full > 100e6  # of the block's 134 MB
    assert given_back < 20e6
    assert kept > 100e6
