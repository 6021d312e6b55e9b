"""Does FER learn? UF1 on rendered faces of baseline, SCN and RAN under label noise, and each loss.

  python benchmarks/learning_fer.py --work runs/learning_fer        # over 90 minutes, two CPU cores
  python benchmarks/learning_fer.py --work runs/quick --quick            # a tenth of that

Held against majority, chance and logistic regression on pixels, on people that nobody was trained
on. With 10 and 30 % of the training labels moved to another class, SCN says which it found, and
whether that helps. All networks start from nothing and see few epochs, of which the last counts;
images are mirrored alone, since what else the recipe `strong` does takes longer to pay. Reports
whatever comes out.
"""
import importlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import torch

from benchmarks.rows import Jobs, Rows, grey_pixels, line, regress
from evaluation import photographs
from images import faces

NOISE = (0.0, 0.1, 0.3)


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for data and runs; "
                        "what is finished there is used again")
    parser.add_argument("--quick", action="store_true",
                        help="baseline and SCN alone, without and with 30 %% noise, one seed")
    parser.add_argument("--train", type=util.number(int, 100), default=800,
                        help="rendered training images")
    parser.add_argument("--test", type=util.number(int, 100), default=600, help="test images")
    parser.add_argument("--size", type=util.number(int, 32), default=112,
                        help="side of what the networks see, pixels")
    parser.add_argument("--epochs", type=util.positive_int, default=8, help="passes over the data")
    parser.add_argument("--seeds", type=util.positive_int, default=3,
                        help="of baseline, SCN and regression")
    parser.add_argument("--seeds_ran", type=util.positive_int, default=1,
                        help="of RAN, six times as slow")
    parser.add_argument("--seeds_losses", type=util.positive_int, default=1,
                        help="of the baseline with each other loss")
    parser.add_argument("--processes", type=util.positive_int, default=os.cpu_count(),
                        help="runs at a time, one thread each [one a core]")
    opt = parser.parse_args(argv)
    if opt.quick:
        opt.seeds = 1
    return opt


class Bench(Rows):
    """The runs of one call."""

    def __init__(self, opt, jobs):
        super().__init__(opt, len(faces.CLASSES["rafdb"]))
        self.opt, self.jobs, self.data = opt, jobs, Path(opt.work) / "faces"

    def start(self, name, seeds, *flags):
        """Starts the runs of a row: (its name, what they will be finished with)."""
        return name, [self.jobs.start(self.train, name, seed, flags) for seed in range(seeds)]

    def train(self, name, seed, flags):
        """The folder of one run."""
        opt = self.opt
        root = self.work / "results" / name.replace(" ", "_").replace(",", "") / str(seed)
        if not list(root.glob("*/results.json")):
            self.jobs.run(
                "train_FER", "--dataset", "rafdb", "--data_folder", self.data, "--save_path", root,
                "--tb_path", self.work / "tensorboard", "--cache", self.work / "cache",
                "--pretrained", "none", "--size", opt.size, "--epochs", opt.epochs, "--batch_size",
                16, "--learning_rate", 0.001, "--val_fraction", 0, "--amp", "--augment", "flip",
                "--device", "cpu", "--seed", seed, "--resume", "auto", "--print_freq", 1000, *flags)
        return next(root.glob("*/results.json")).parent

    def regress(self, noise):
        """A row of logistic regressions on pixels, the penalty chosen on held-out people of the
        training split."""
        splits = faces.read_faces("rafdb", self.data)
        x = {name: grey_pixels(one) for name, one in splits.items()}
        train, test, parts = splits["train"], splits["test"], []
        for seed in range(self.opt.seeds):
            labels = photographs.noisy_labels(train.labels, noise, self.n_label, seed)
            parts.append((test.labels, regress(x, labels, train, seed), test.subjects))
        if not noise:
            self.baselines(parts[:1])
        self.add(f"pixels, logistic regression{told(noise)}", parts)


def told(noise):
    return f", {noise:.0%} noise" if noise else ""


def systems(opt):
    """(name, seeds, flags) of every row of a network."""
    scn = ("--model", "scn", "--rank_margin", 0.07, "--relabel_epoch", max(2, 2 * opt.epochs // 5))
    for noise in NOISE[::2] if opt.quick else NOISE:
        own = ("--noise", noise)
        yield f"baseline{told(noise)}", opt.seeds, own
        yield f"SCN{told(noise)}", opt.seeds, (*scn, *own)
        if not opt.quick:
            yield f"RAN, 6 views{told(noise)}", opt.seeds_ran, (
                "--model", "ran", "--views", "paper", "--region_margin", 0.02, *own)
    if opt.quick:
        return
    yield "SCN without relabelling, 30% noise", opt.seeds, (*scn[:4], "--noise", 0.3)
    losses = {loss: ("--loss", loss) for loss in ("focal", "balanced", "logit_adjusted")} | {
        "oversampled": ("--oversample",), "Wasserstein": ("--wloss_alpha", 0.0125)}
    for name, flags in losses.items():
        for noise in NOISE:
            yield f"baseline, {name}{told(noise)}", opt.seeds_losses, (*flags, "--noise", noise)


def relabelled(folders):
    """What SCN found of the planted errors, over its seeds."""
    said = [json.loads((folder / "results.json").read_text()).get("relabelling")
            for folder in folders]
    if not said[0]:
        return None
    total = {name: sum(one.get(name, 0) for one in said) for name in said[0]}
    if not total.get("planted"):
        return f"{total['relabelled']} labels moved, none of which was wrong"
    return (f"{total['relabelled']} labels moved; of {total['planted']} planted errors "
            f"{total['found']} found, {total['restored']} put right; wrong labels "
            f"{total['wrong_before'] / len(said):.1%} before, "
            f"{total['wrong_after'] / len(said):.1%} after")


@util.command_line
def main(argv=None):
    opt, began = parse_option(argv), time.time()
    with Jobs(opt.processes) as jobs:
        bench, notes = Bench(opt, jobs), []
        importlib.import_module("render").main([
            "faces", "--data_folder", str(bench.data), "--train", opt.train, "--test", opt.test])
        started = [bench.start(name, seeds, *flags) for name, seeds, flags in systems(opt)]
        for name, runs in started:
            folders = [run.result() for run in runs]
            bench.row(name, folders)
            said = relabelled(folders)
            if said:
                notes.append(f"{name}: {said}")
                print(notes[-1], flush=True)
    for noise in NOISE[::2] if opt.quick else NOISE:
        bench.regress(noise)
    print(f"\nrendered stand-in data, {opt.train} training images, {opt.test} of other people to "
          f"test, {opt.size} pixels, {opt.epochs} epochs, torch {torch.__version__}, "
          f"{(time.time() - began) / 60:.0f} minutes\n\n| | UF1 | 95 % interval | |\n|---|---|---|"
          "---|")
    print("\n".join(map(line, bench.rows)))
    print("\n" + "\n".join(notes) + f"\n\ntable    {bench.work / 'rows.json'}")


if __name__ == "__main__":
    main()
