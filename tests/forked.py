"""Scripts in processes of their own, forked from one that has imported them all: that takes longer
than what most of them do in a test."""
import importlib
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import narrow
import torch
from torch.nn.modules.batchnorm import _BatchNorm

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([
    "pre-train_DVSCL", "LinearProbing_DVSCL_10fold", "fine-tune_DVSCL", "train_MMNet", "train_FER",
    "main_pretrain", "main_pretrain_convnextv2", "main_finetune"])


def no_batch_statistics():
    """Batch norm in evaluation mode: what it takes from a batch depends on how one is cut, and two
    ranks must do what one process does."""
    _BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)


def uneven_clocks():
    """By the clock of rank 1 alone it is always time to save."""
    keeper = importlib.import_module("training.epochs").Keeper
    init = keeper.__init__
    keeper.__init__ = lambda self, minutes, together=False: init(
        self, minutes if os.environ["RANK"] == "0" else 0, together)


def late_look():
    """Rank 1 looks at the run folder when rank 0 has long done so."""
    heldout = importlib.import_module("evaluation.heldout")
    look = heldout.open_run

    def waiting(*given):
        time.sleep(2 * int(os.environ["RANK"]))
        return look(*given)
    heldout.open_run = waiting


def dies_in_the_second_step():
    """Rank 1 ends without a word before its second step of training."""
    steps, plain = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2 and os.environ["RANK"] == "1":
            os._exit(9)
        return plain(self, *args, **kwargs)
    torch.optim.SGD.step = step


def small_crops():
    """As the fixture of this name."""
    importlib.import_module("images.transforms").CROP = 64


def start(script, argv, folder, environment=(), prepare=None, threads=None):
    """Starts a script in a process that prints to `out` and `err` in `folder`; prepare: called
    first, there; threads: those of this process unless given."""
    process = _server.Process(target=_run, args=(
        script, list(map(str, argv)), Path(folder), dict(environment), prepare,
        threads or torch.get_num_threads(), narrow.in_use()))
    process.start()
    return process


def _run(script, argv, folder, environment, prepare, threads, narrowed):
    for number, name in enumerate(("out", "err"), 1):
        with open(folder / name, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    torch.set_num_threads(threads)
    narrow.use(narrowed)
    if prepare:
        prepare()
    sys.argv = [script, *argv]
    importlib.import_module(script).main(argv)


def ranked(n, script, *argv, prepare=None, folder):
    """Runs a script in a process, or as two ranks (`n`), of a thread each, which print to folders
    in `folder`; what the first one printed."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = []
    for rank in range(n):
        logs = Path(folder) / f"rank {rank} of {n}"
        logs.mkdir(parents=True)
        ranks.append((logs, start(script, argv, logs, {
            "RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "localhost",
            "MASTER_PORT": port}, prepare, threads=1)))
    try:
        for logs, process in ranks:
            process.join(300)
            assert process.exitcode == 0, (logs / "err").read_text()
    finally:
        for _, process in ranks:
            process.kill()
    return (ranks[0][0] / "out").read_text()
