"""Where does pre-training pay? UF1 on rendered faces of a ViT and a ConvNeXt V2, by labels.

  python benchmarks/learning_mae.py --work runs/learning_mae            # 75 minutes, two CPU cores
  python benchmarks/learning_mae.py --work runs/quick --quick           # a tenth of that

Both networks are pre-trained once, without labels, on the training images and as many more as
--pool says of other people, then fine-tuned on 100, 300, 1,000 and all training images, three
times; beside them the same networks from scratch, logistic regression on the features they were
pre-trained to, and on pixels. All are tested on people that nobody was trained on. Reports whatever
comes out.
"""
import importlib
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import numpy as np
import torch

from benchmarks.rows import Jobs, Rows, grey_pixels, line, regress
from evaluation import finetuning
from images import faces
from models import files

LABELS = (100, 300, 1000, 0)  # 0: all
FEWEST, MOST, SEEN = 3, 25, 4000  # epochs of fine-tuning, and the images seen that they aim at
LIST = "EmoLabel/list_patition_label.txt"  # RAF-DB's spelling
# of each: model, side in pixels, script of its pre-training, share of --epochs that this takes (a
# regression on ConvNeXt V2's features gains less by more), rate of fine-tuning
NETWORKS = {
    "ViT": ("vit_tiny_patch16", 112, "main_pretrain", 1, "5e-4"),
    "ConvNeXt V2": ("convnextv2_atto", 128, "main_pretrain_convnextv2", 0.5, "1e-3")}


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for data and runs; "
                        "what is finished there is used again")
    parser.add_argument("--quick", action="store_true",
                        help="100 and 300 labels, one seed, a fifth of the pre-training")
    parser.add_argument("--train", type=util.number(int, 100), default=1600,
                        help="rendered training images")
    parser.add_argument("--test", type=util.number(int, 100), default=600, help="test images")
    parser.add_argument("--pool", type=util.number(int, 100), default=3000,
                        help="images more to pre-train on")
    parser.add_argument("--epochs", type=util.number(int, 2), default=18,
                        help="of ViT's pre-training; ConvNeXt V2 takes half")
    parser.add_argument("--seeds", type=util.positive_int, default=3, help="of everything else")
    parser.add_argument("--processes", type=util.positive_int, default=os.cpu_count(),
                        help="runs at a time, one thread each [one a core]")
    opt = parser.parse_args(argv)
    if opt.quick:
        opt.seeds, opt.epochs = 1, max(2, opt.epochs // 5)
    return opt


class Bench(Rows):
    """The runs of one call."""

    def __init__(self, opt, jobs):
        super().__init__(opt, len(faces.CLASSES["rafdb"]))
        self.opt, self.jobs = opt, jobs
        self.data, self.images = self.work / "faces", self.work / "pool"
        self.labels = LABELS[:2] if opt.quick else [n for n in LABELS if n < opt.train]

    def render(self):
        """The labelled set, more images of other people, and links to all to pre-train on."""
        opt, render = self.opt, importlib.import_module("render")
        render.main(["faces", "--data_folder", str(self.data), "--train", opt.train, "--test",
                     opt.test])
        render.main(["faces", "--data_folder", str(self.work / "others"), "--train", opt.pool,
                     "--test", 100, "--seed", 1000])
        self.images.mkdir(exist_ok=True)
        for folder, name in ((self.data, "labelled"), (self.work / "others", "others")):
            for image in (folder / "Image" / "aligned").glob("train_*"):
                link = self.images / f"{name}_{image.name}"
                if not link.exists():
                    os.link(image, link)
        shutil.copy(self.data / "rendered.json", self.images)
        self.sets = {(n, seed): self.subset(n, seed) for n in self.labels
                     for seed in range(opt.seeds)}

    def subset(self, n, seed):
        """The set with the labels of `n` training images alone, 0: of all."""
        if not n:
            return self.data
        folder = self.work / "subsets" / f"{n}_{seed}"
        lines = (self.data / LIST).read_text().splitlines()
        train = [row for row in lines if row.startswith("train")]
        chosen = {train[i] for i in np.random.default_rng(seed).permutation(len(train))[:n]}
        (folder / "EmoLabel").mkdir(parents=True, exist_ok=True)
        util.write_text(folder / LIST, "\n".join(
            row for row in lines if row in chosen or row.startswith("test")) + "\n")
        if not (folder / "Image").exists():
            (folder / "Image").symlink_to((self.data / "Image").resolve())
        for name in ("subjects.csv", "rendered.json"):
            shutil.copy(self.data / name, folder)
        return folder

    def run(self, script, root, *flags):
        """Runs a script."""
        root.mkdir(parents=True, exist_ok=True)
        self.jobs.run(script, "--output_dir", root, "--device", "cpu", "--amp", "--num_workers", 1,
                      "--print_freq", 1000, *flags)

    def pretrain(self, network):
        """The checkpoint of a network's pre-training."""
        model, size, script, share, _ = NETWORKS[network]
        epochs = int(share * self.opt.epochs)
        root = self.work / "pretrained" / model
        if not (root / f"checkpoint-{epochs - 1}.pth").exists():
            self.run(script, root, "--model", f"mae_{model}" if network == "ViT" else model,
                     "--input_size", size, "--decoder_embed_dim", 128, "--batch_size", 32,
                     "--lr", "1e-3", "--epochs", epochs, "--data_path", self.images,
                     "--norm_pix_loss", "--cache", self.work / "cache", *(
                         ("--decoder_depth", 2) if network == "ViT" else ()))
        return root / f"checkpoint-{epochs - 1}.pth"

    def finetune(self, network, started, n, seed):
        """The folder of one run; started: its pre-training, or None: from scratch."""
        model, size, *_, rate = NETWORKS[network]
        kind = "pretrained" if started else "scratch"
        root = self.work / "results" / f"{model}_{kind}" / f"{n or 'all'}_{seed}"
        many = n or self.opt.train
        if not (root / "results.json").exists():
            self.run("main_finetune", root, "--model", model, "--input_size", size,
                     "--data_set", "rafdb", "--data_path", self.sets[n, seed], "--cache", "off",
                     "--batch_size", 8, "--lr", rate, "--epochs",
                     min(MOST, max(FEWEST, SEEN // many)), "--val_fraction", 0, "--aa", "none",
                     "--crop_low", 0.9, "--reprob", 0, "--head_init_scale", 1, "--seed", seed, *(
                         ("--finetune", started.result(), "--layer_decay", 0.9) if started
                         else ("--layer_decay", 1)))
        return root

    def features(self, network, checkpoint, images):
        """What a pre-trained network gives of images, `[N, D]`."""
        model, size, *_ = NETWORKS[network]
        opt = finetuning.parse_option("", [
            "--model", model, "--input_size", str(size), "--data_path", "", "--finetune",
            str(checkpoint), "--cache", "off"], "rafdb", None)
        net = finetuning.set_model(opt, self.n_label, torch.device("cpu"),
                                   files.read(checkpoint)).eval()
        source = finetuning.source_of(opt, images)
        with torch.no_grad():
            return torch.cat([net.embed(source.plain_inputs(rows, torch.from_numpy(
                source.images[rows]))) for rows in np.array_split(
                    np.arange(len(images)), -(-len(images) // 64))]).numpy()

    def regressions(self, started):
        """(title, a job a seed) of logistic regressions on pixels and on both networks'
        features."""
        whole = faces.read_faces("rafdb", self.data)
        named = {"pixels": {name: grey_pixels(one) for name, one in whole.items()}}
        for network, checkpoint in started.items():
            named[f"{network}, pre-trained features"] = {
                name: self.features(network, checkpoint.result(), one)
                for name, one in whole.items()}
        place = {path: i for i, path in enumerate(whole["train"].paths)}
        splits = {key: faces.read_faces("rafdb", folder)["train"]
                  for key, folder in self.sets.items()}
        for name, x in named.items():
            for n in self.labels:
                parts = []
                for seed in range(self.opt.seeds):
                    train = splits[n, seed]
                    rows = [place[path] for path in train.paths]
                    parts.append(self.jobs.compute(
                        regress, {"train": x["train"][rows], "test": x["test"]}, train.labels,
                        train, seed))
                yield f"{name}, logistic regression{told(n)}", parts


def told(n):
    return f", {n:,} labels" if n else ", all labels"


@util.command_line
def main(argv=None):
    opt, began = parse_option(argv), time.time()
    with Jobs(opt.processes) as jobs:
        bench = Bench(opt, jobs)
        bench.render()
        started = {network: jobs.start(bench.pretrain, network) for network in NETWORKS}
        runs = {(network, kind, n): [jobs.start(
            bench.finetune, network, started[network] if kind else None, n, seed)
            for seed in range(opt.seeds)]
            for kind in (False, True) for network in NETWORKS for n in bench.labels}
        regressions = list(bench.regressions(started))
        for (network, kind, n), folders in runs.items():
            bench.row(f"{network}, {'pre-trained' if kind else 'from scratch'}{told(n)}",
                      [folder.result() for folder in folders])
        test = faces.read_faces("rafdb", bench.data)["test"]
        bench.baselines([(test.labels, None, test.subjects)])
        for title, parts in regressions:
            bench.add(title, [(test.labels, part.result(), test.subjects) for part in parts])
    print(f"\nrendered stand-in data, {opt.train} training images, {opt.test} of other people to "
          f"test, {opt.pool} more to pre-train on, {opt.epochs} epochs of that (ConvNeXt V2 half), "
          f"torch {torch.__version__}, {(time.time() - began) / 60:.0f} minutes\n\n| | UF1 | 95 % "
          "interval | |\n|---|---|---|---|")
    print("\n".join(map(line, bench.rows)))
    print(f"\ntable    {bench.work / 'rows.json'}")


if __name__ == "__main__":
    main()
