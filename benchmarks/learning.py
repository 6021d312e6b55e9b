"""Does the method learn? UF1 on rendered data of everything a number must be held against.

  python benchmarks/learning.py --work runs/learning

20 subjects x 8 rendered clips, leave-one-subject-out: majority class, logistic regression on
downsampled difference pixels, a random encoder's probe, the pre-trained encoder's probe, each
view alone, fine-tuning; and two controls that must come out at chance: faces without expression
(--amplitude 0) and permuted labels. Reports whatever comes out. About an hour on two CPU cores,
fine-tuning being most of it (--epochs_finetune 0 leaves it out), minutes on a GPU.
"""
import importlib
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
import dataset
import decoding
import metrics
import options
import shortcuts
import util
from models import create_model


def parse_option(argv):
    parser = options.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for data and runs; "
                        "what is finished there is used again")
    parser.add_argument("--subjects", type=options.positive_int, default=20,
                        help="rendered subjects")
    parser.add_argument("--epochs", type=options.positive_int, default=240,
                        help="pre-training epochs")
    parser.add_argument("--epochs_finetune", type=options.number(int, 0), default=30,
                        help="fine-tuning epochs; 0: leave it out")
    parser.add_argument("--batch_size", type=options.positive_int, default=32,
                        help="clips per step, in every stage")
    parser.add_argument("--model", default="alexnet", help="encoder")
    parser.add_argument("--seed", type=int, default=0, help="of rendering, training and heads")
    return parser.parse_args(argv)


def pixel_regression(clips, images, side=16):
    """Predictions `[N]` of leave-one-subject-out logistic regression on area-averaged pixels."""
    block = decoding.SIZE // side
    x = images.reshape(len(images), -1, side, block, side, block).mean((3, 5))
    x, labels = x.reshape(len(images), -1), clips.labels
    _, fold_of = dataset.subject_folds(clips)
    found = np.empty_like(labels)
    for fold in range(fold_of.max() + 1):
        test = fold_of == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        found[test] = model.fit(x[~test], labels[~test]).predict(x[test])
    return found


class Bench:
    """The runs of one call: each method calls a script and returns what it measured."""

    def __init__(self, opt):
        self.opt, self.work = opt, Path(opt.work)
        self.shared = ["--cache", self.work / "cache", "--resume", "auto", "--amp",
                       "--batch_size", opt.batch_size, "--seed", opt.seed, "--model", opt.model,
                       "--print_freq", 1000, "--tb_path", self.work / "tensorboard"]

    def render(self, name, amplitude):
        folder = self.work / name
        importlib.import_module("render_CASME3").main([
            "--data_folder", folder, "--subjects", self.opt.subjects, "--clips_per_subject", 8,
            "--amplitude", amplitude, "--seed", self.opt.seed])
        return folder

    def pretrain(self, data, *flags):
        """The checkpoint of a pre-training run on `data`."""
        root = self.work / "runs" / data.name / ("_".join(map(str, flags)).replace("/", "of")
                                                 or "all")
        importlib.import_module("pre-train_DVSCL").main([
            "--data_folder", data, "--model_path", root, "--epochs", self.opt.epochs,
            "--save_freq", self.opt.epochs, *self.shared, *flags])
        return next(root.glob("memory_*")) / "last.pth"

    def head(self, name, data, path, tag, *flags):
        """UF1 and its interval from a probing or fine-tuning run."""
        root = self.work / "results" / tag
        importlib.import_module(name).main([
            "--data_folder", data, "--model_path", path, "--save_path", root, *self.shared, *flags])
        found = json.loads(next(root.glob("*/results.json")).read_text())
        return found["uf1"], found["ci95"]["uf1"]

    def probe(self, data, path, tag, *flags):
        return self.head("LinearProbing_DVSCL_10fold", data, path, tag, "--protocol", "loso",
                         *flags)


def permuted_lists(clips, data, folder, seed):
    """The lists of `data` with labels dealt to other clips at random."""
    labels = np.random.default_rng(seed).permutation(clips.labels)
    dataset.write_lists(folder, [replace(clip, label=int(label))
                                 for clip, label in zip(clips.clips, labels)])
    shutil.copy(data / "encoding.json", folder)


def matching(path, clips, images):
    """How the features of clips of unseen subjects match across views.

    Returns, over all such clips and within a subject: the probability that a matching pair scores
    above a non-matching one, and top-1 retrieval with its chance.
    """
    state = checkpoint.load(path)
    model = create_model(state["opt"]["model"], in_channels=clips.channels)
    checkpoint.load_model(model, state, path, state["opt"]["model"])
    seen = {tuple(p) for p in state["seen"]["people"]}
    blank = decoding.blank(images, clips.encoding)
    chosen = [i for i, c in enumerate(clips.clips) if c.person not in seen and not blank[i]]
    rgb, depth = shortcuts.embed(model, images[chosen], state["normalization"],
                                 torch.device("cpu"))
    unseen = replace(clips, clips=[clips.clips[i] for i in chosen])
    found, scores = shortcuts.retrieval(unseen, rgb, depth), (rgb @ depth.t()).numpy()
    people = [clip.person for clip in unseen.clips]
    same = np.array([[a == b for b in people] for a in people])
    above, other = scores.diagonal()[:, None] > scores, ~np.eye(len(chosen), dtype=bool)
    return {name: (above[among & other].mean(), found[key]["top1"], found[key]["chance"])
            for name, key, among in (("all", "all", other), ("within a subject", "within", same))}


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    bench = Bench(opt)
    data, flat = bench.render("data", 1), bench.render("amplitude0", 0)
    clips = dataset.read_clips(data)
    images, _ = decoding.load_images(clips)
    labels, n_label = clips.labels, clips.n_label
    people = [clip.person for clip in clips.clips]
    rows = [(f"baseline: {name}", scores["uf1"], None)
            for name, scores in metrics.baselines(labels, n_label).items()]
    guess = pixel_regression(clips, images)
    rows.append(("logistic regression on pixels", metrics.evaluate(labels, guess, n_label)["uf1"],
                 metrics.intervals(labels, guess, people, n_label)["uf1"]))
    rows.append(("random encoder, probe", *bench.probe(data, "random", "random")))
    path = bench.pretrain(data)
    rows.append(("pre-trained, probe", *bench.probe(data, path, "probe")))
    for view in ("rgb", "depth"):
        rows.append((f"pre-trained, probe, {view} alone",
                     *bench.probe(data, path, view, "--encoder", view)))
    if opt.epochs_finetune:
        rows.append(("fine-tuned", *bench.head(
            "fine-tune_DVSCL", data, path, "finetune", "--epochs", opt.epochs_finetune,
            "--save_freq", 1000)))
    rows.append(("control: no expression, probe",
                 *bench.probe(flat, bench.pretrain(flat), "amplitude0")))
    permuted_lists(clips, data, bench.work / "permuted", opt.seed)
    rows.append(("control: permuted labels, probe", *bench.probe(
        data, path, "permuted", "--list_folder", bench.work / "permuted")))
    unseen = matching(bench.pretrain(data, "--fold", "1/10"), clips, images)
    print(f"\nrendered stand-in data, {len(clips)} clips, {len(clips.people)} subjects, seed "
          f"{opt.seed}, torch {torch.__version__}\n\n| | UF1 | 95 % interval |\n|---|---|---|")
    for name, uf1, interval in rows:
        print(f"| {name} | {uf1:.3f} | "
              + (f"{interval[0]:.3f} – {interval[1]:.3f} |" if interval else "|"))
    last, chance = util.read_log(path.parent)[-1], math.log(len(images) - 1)
    print(f"\nloss per view after {last['epoch']} epochs: rgb {last['rgb_loss']:.3f}, depth "
          f"{last['depth_loss']:.3f}; chance log(K'+1) is at most {chance:.3f}")
    for name, (auc, top, expected) in unseen.items():
        print(f"unseen subjects, {name}: matching above non-matching {auc:.3f}, retrieval top-1 "
              f"{top:.3f} (chance {expected:.3f})")


if __name__ == "__main__":
    main()
