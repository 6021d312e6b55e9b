"""Runs a script of the project with narrow ResNets, batch norm in evaluation mode:
`eval_norm.py NAME ARGV...`.

`--die` first makes the last rank end without a word after its second training step.
"""
import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # noqa: F401  sets what protobuf needs
import narrow
import torch
from forked import no_batch_statistics


def die_after_two_steps():
    steps, plain = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2 and os.environ.get("RANK") == "1":
            os._exit(9)
        return plain(self, *args, **kwargs)
    torch.optim.SGD.step = step


if __name__ == "__main__":
    torch.set_num_threads(1)
    narrow.use()
    no_batch_statistics()
    argv = sorted(sys.argv[1:], key=lambda word: word.startswith("--local-rank"))  # else the first
    if argv[0] == "--die":
        die_after_two_steps()
        argv = argv[1:]
    importlib.import_module(argv[0]).main(argv[1:])
