"""Does a large unlabelled pool help? UF1 on rendered data of everything a number is held against.

  python benchmarks/learning.py --work runs/learning             # about 75 minutes, two CPU cores
  python benchmarks/learning.py --work runs/quick --quick        # 8 minutes

60 subjects x 10 rendered clips, five folds of subjects, for each seed (of rendering, pre-training
and heads) another set; unlabelled pairs of other people, and of the same people without those held
out, which takes a pre-training a fold; encoders that saw as many pairs in pre-training, whatever
the size of the pool (those of a fold a share of that, in smaller batches, with a row of other
people to hold against them). Beside them what can be had without any encoder, untrained encoders,
the same network trained from scratch, controls that must come out at chance, and a ceiling: the
pool with its labels. Reports whatever comes out, and draws UF1 against the size of the pool.
"""
import importlib
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import dataset
import torch
from benchmarks.rows import Jobs, Rows, line, read, regression
from evaluation import pictures
from images import lists
from prediction import clips as prediction
from rendering import expression
from training import checkpoint, devices, supervised

PEOPLE, POOL = 250, 5000  # in the unlabelled pool, and its pairs
FOLDS = 5
SHARE, SMALL = 0.2, 32  # of the pairs seen, in batches of so many, where folds have encoders
SIZES = {"resnet18v1": 56, "alexnet": 112}  # crops, pixels, that two cores can do
# whose maps have about the 7 x 7 cells there that the usual layer 5 has for crops of 224 pixels
LAYERS = {"resnet18v1": 3, "alexnet": 4}


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--work", required=True, metavar="DIR", help="folder for data and runs; "
                        "what is finished there is used again")
    parser.add_argument("--quick", action="store_true",
                        help="one seed, a third of the pairs seen, two thirds of the "
                        "fine-tuning, the rows that matter most")
    parser.add_argument("--seeds", type=util.number(int, 1), default=3, help="how many")
    parser.add_argument("--seen", type=util.positive_int, default=20_000,
                        help="pairs seen in a pre-training, repetitions counted")
    parser.add_argument("--pools", nargs="+", type=util.number(int, 1, POOL), metavar="N",
                        default=[500, 2000, POOL], help="sizes of the pool")
    parser.add_argument("--epochs_finetune", type=util.positive_int, default=3,
                        help="fine-tuning epochs; from scratch four times as many")
    parser.add_argument("--processes", type=util.positive_int, default=os.cpu_count(),
                        help="runs at a time, one thread each [one a core]")
    opt = parser.parse_args(argv)
    if opt.quick:
        opt.seeds, opt.seen = 1, opt.seen // 3
        opt.pools = opt.pools[len(opt.pools) // 2:][:1]
        opt.epochs_finetune = min(opt.epochs_finetune, 2)
    return opt


class Bench(Rows):
    """The runs of one call: each method calls a script and returns what it made or measured."""
    own_people = True

    def __init__(self, opt, jobs):
        super().__init__(opt, 4)
        self.opt, self.jobs = opt, jobs
        self.middle = str(sorted(opt.pools)[len(opt.pools) // 2])  # the pool of most rows
        self.untrained = jobs.start(str, "random")

    def render(self, name, seed, *flags):
        folder = self.work / name
        importlib.import_module("render").main([
            "casme3", "--data_folder", folder, "--subjects", 60, "--clips_per_subject", 10,
            "--size", 128, "--seed", seed, *flags])
        return folder

    def shared(self, model, seed, root):
        return ["--model", model, "--size", SIZES[model], "--seed", seed, "--resume", "auto",
                "--cache", self.work / "cache", "--print_freq", 1000, "--tb_path",
                root / "tensorboard"]

    def pretrain(self, name, model, seed, data, pairs, share=1, fold=None):
        """The checkpoint of a pre-training on `pairs` (a file, None: the labelled clips) that sees
        `share` of --seen pairs; fold: one of the FOLDS, whose people are left out."""
        root, flags, count = self.work / "runs" / f"{name}_{model}_{seed}", [], 600
        if pairs:
            count = len(pairs.read_text().splitlines()) - 1
            flags = ["--pairs", pairs, "--pool", "unlabelled"]
        if fold:
            flags += ["--fold", f"{fold}/{FOLDS}"]
        passes = max(1, round(share * self.opt.seen / count))
        self.jobs.run("pre-train_DVSCL", "--data_folder", data, "--model_path", root, "--epochs",
                      passes, "--batch_size", 128 if share == 1 else SMALL, "--warmup_epochs",
                      passes / 20, "--save_freq", 1000, *self.shared(model, seed, root), *flags)
        return next(root.glob(f"*_fold{fold}of{FOLDS}*/last.pth" if fold else "*/last.pth"))

    def pretrain_folds(self, *args):
        """The checkpoints of as many pre-trainings as there are folds, each without the people of
        one, as one path."""
        started = [self.jobs.start(self.pretrain, *args, SHARE, fold + 1) for fold in range(FOLDS)]
        first, *_ = [str(path.result()) for path in started]
        return first.replace(f"fold1of{FOLDS}", "{fold}")

    def head(self, script, name, model, seed, data, path, *flags):
        """(labels, predictions, subjects) of a probing or fine-tuning run that starts from `path`,
        a Future."""
        root = self.work / "results" / f"{name}_{model}_{seed}"
        self.jobs.run(script, "--data_folder", data, "--model_path", path.result(), "--save_path",
                      root, "--protocol", f"{FOLDS}fold", "--layer", LAYERS[model],
                      *self.shared(model, seed, root), *flags)
        return read(next(root.glob("*/results.json")).parent)

    def probe(self, *args):
        return self.jobs.start(self.head, "LinearProbing_DVSCL_10fold", *args)

    def finetune(self, *args):
        return self.jobs.start(self.head, "fine-tune_DVSCL", *args, "--save_freq", 1000)


def subset(data, name, rows):
    """The pairs `rows` (positions) of a folder's pairs.tsv, as another file beside it."""
    head, *lines = (data / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    path = data / f"pairs_{name}.tsv"
    util.write_text(path, "\n".join([head, *(lines[i] for i in rows)]) + "\n")
    return path


def intensities(data):
    rows, _ = util.read_table(data / "pairs.tsv", fix="remove --work", delimiter="\t")
    return np.array([float(row["intensity"]) for _, row in rows])


def permuted_lists(data, folder, seed):
    """The lists of `data` with labels dealt to other clips at random."""
    clips = dataset.read_clips(data)
    labels = np.random.default_rng(seed).permutation(clips.labels)
    lists.write_lists(folder, [replace(clip, label=int(label))
                                 for clip, label in zip(clips.clips, labels)])
    shutil.copy(data / "encoding.json", folder)
    return folder


def labelled_pool(data, folder):
    """Lists of the unlabelled pairs with their true classes, the people as five groups: --subject
    all trains on every one, and a list per person would name each clip hundreds of times."""
    rows, _ = util.read_table(data / "truth.csv", fix="remove --work")
    truth = {row["key"]: row["emotion"] for _, row in rows}
    clips = dataset.read_pairs(data / "pairs.tsv", data).clips
    people = sorted({clip.subject for clip in clips})
    lists.write_lists(folder, [replace(
        clip, subject=f"group{people.index(clip.subject) % 5}",
        key=Path(clip.paths[0]).name.removesuffix("_diff.png"),
        label=expression.CLASS_OF[truth[Path(clip.paths[0]).name.removesuffix("_diff.png")]])
        for clip in clips])
    shutil.copy(data / "encoding.json", folder)
    return folder


def ceiling(bench, others, data, seed, lists):
    """(labels, predictions, subjects) on the clips of `data` by a network trained from scratch on
    the whole pool's labels."""
    root = bench.work / "results" / f"ceiling_{seed}"
    bench.jobs.run("fine-tune_DVSCL", "--data_folder", others, "--list_folder", lists, "--subject",
                   "all", "--save_path", root, "--model_path", "random", "--layer",
                   LAYERS["resnet18v1"], *bench.shared("resnet18v1", seed, root),
                   *scratch(max(2, round(bench.opt.seen / POOL))))
    (path,) = root.glob("*/last.pth")
    state, clips = checkpoint.load(path), dataset.read_clips(data)
    device = torch.device("cpu")
    classifier = prediction.set_model(path, state, clips, device)
    images, _ = dataset.load_images(clips, bench.work / "cache", 4, SIZES["resnet18v1"])
    said = supervised.predict(classifier, images, np.arange(len(clips)),
                              devices.mixed_precision(False, device).autocast).argmax(1)
    return clips.labels, said, [clip.subject for clip in clips.clips]


def scratch(passes):
    """Flags that train an encoder with its head from scratch."""
    return ["--epochs", passes, "--batch_size", 64, "--head", "zero", "--train_bn", "--trust", 0.02,
            "--encoder_lr", 0.03, "--lr_schedule", "cosine", "--warmup_epochs", passes / 10]


def draw(path, rows, pools):
    """UF1 against the size of the pool, with what it is held against."""
    by_name = {row["name"]: row for row in rows}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = [(n, by_name[f"pre-trained on {n} pairs of others, probe"]) for n in pools]
    x = [n for n, _ in drawn]
    uf1 = np.array([row["uf1"] for _, row in drawn])
    low, high = np.array([row["ci95"] for _, row in drawn]).T
    axes.errorbar(x, uf1, [uf1 - low, high - uf1], marker="o", capsize=3, color=pictures.BLUE,
                  label="pre-trained on pairs of other people")
    for name, label, colour, style in (
            ("untrained, probe", "untrained", pictures.ORANGE, "--"),
            ("logistic regression on pixels", "regression on pixels", pictures.GREEN, "-."),
            ("ceiling: 5000 labelled clips of others", "ceiling: the pool labelled", "0.3", ":"),
            ("control: no expression, probe", "control: no expression", pictures.PURPLE, "--"),
            ("control: permuted labels, probe", "control: permuted labels", pictures.PURPLE, ":")):
        if name in by_name:
            axes.axhline(by_name[name]["uf1"], color=colour, linestyle=style, label=label)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{n:,}" for n in x])
    axes.minorticks_off()
    axes.set_xlabel("unlabelled pairs in pre-training")
    axes.set_ylabel("UF1, subjects held out")
    axes.set_ylim(0, None)
    axes.set_title("rendered stand-in data; bars: 95 % over subjects", fontsize="medium")
    axes.legend(fontsize="small", ncols=2, loc="lower right")
    util.write_figure(path, figure)


def main_rows(bench, sets, others, pools):
    """(title, a job a seed) of pools of other people, each view, thresholds, fine-tuning."""
    opt, model, seeds, middle = bench.opt, "resnet18v1", range(bench.opt.seeds), bench.middle
    paths = {(name, seed): bench.jobs.start(bench.pretrain, name, model, seed, others, file)
             for name, file in pools.items() for seed in seeds}

    def row(title, job, name, path, *flags):
        return title, [job(name, model, s, sets[s], path or paths[middle, s], *flags)
                       for s in seeds]
    yield row("untrained, probe", bench.probe, "untrained", bench.untrained)
    for name in pools:
        title = f"{name} pairs" if name.isdigit() else f"the {name.replace('_', ' ')} of {POOL}"
        yield f"pre-trained on {title} of others, probe", [
            bench.probe(name, model, s, sets[s], paths[name, s]) for s in seeds]
    for title, path in (("untrained", bench.untrained), (f"pre-trained on {middle}", None)):
        yield row(f"{title}, probe of layer 6", bench.probe, f"{title.split()[0]}_layer6", path,
                  "--layer", 6)
    for view in ("rgb", "depth"):
        yield row(f"the same, {middle} pairs, {view} alone", bench.probe, f"{middle}_{view}", None,
                  "--encoder", view)
    yield "control: permuted labels, probe", [
        bench.probe("permuted", model, s, sets[s], paths[middle, s], "--list_folder",
                    permuted_lists(sets[s], bench.work / f"permuted_{s}", s)) for s in seeds]
    yield row(f"pre-trained on {middle}, fine-tuned", bench.finetune, "finetuned", None, "--epochs",
              opt.epochs_finetune, "--batch_size", 64, "--encoder_lr", 0.001)
    for title, name, path in (("the same network from scratch", "scratch", bench.untrained),
                              (f"the same recipe, pre-trained on {middle}", "retrained", None)):
        yield row(title, bench.finetune, name, path, *scratch(4 * opt.epochs_finetune))


def more_rows(bench, sets, others, pools, flat):
    """(title, a job a seed) of the ceiling, the last control, the other encoder, the same people;
    flat: a rendered set a seed without expressions, then that of their pool."""
    model, seeds, middle = "resnet18v1", range(bench.opt.seeds), bench.middle
    start = bench.jobs.start
    lists = labelled_pool(others, bench.work / "labelled_pool")
    yield f"ceiling: {POOL} labelled clips of others", [
        start(ceiling, bench, others, sets[s], s, lists) for s in seeds]
    yield "control: no expression, probe", [
        bench.probe("flat", model, s, flat[s], start(
            bench.pretrain, "flat", model, s, flat[-1], flat[-1] / "pairs.tsv")) for s in seeds]
    yield "alexnet untrained, probe", [
        bench.probe("untrained", "alexnet", s, sets[s], bench.untrained) for s in seeds]
    for name, title in (("alexnet", "alexnet pre-trained on "), (model, "")):
        yield f"{SHARE:.0%} of the pairs seen: {title}{middle} pairs of others, probe", [
            bench.probe(f"short_{middle}", name, s, sets[s], start(
                bench.pretrain, f"short_{middle}", name, s, others, pools[middle], SHARE))
            for s in seeds]
    for count in (0, *bench.opt.pools):
        title = f"{count} pairs of the same people" if count else "the labelled clips"
        name = f"same_{count}"
        files = [subset(data, count, range(count)) if count else None for data in sets]
        yield f"{SHARE:.0%} of the pairs seen: {title}, those held out left out, probe", [
            bench.probe(name, model, s, sets[s], start(
                bench.pretrain_folds, name, model, s, sets[s], files[s])) for s in seeds]


@util.command_line
def main(argv=None):
    opt, began = parse_option(argv), time.time()
    with Jobs(opt.processes) as jobs:
        bench, seeds = Bench(opt, jobs), range(opt.seeds)
        few = "--subjects", 2, "--clips_per_subject", 4, "--unlabelled_subjects", PEOPLE
        others = bench.render("others", 1000, "--unlabelled", POOL, *few)
        more = () if opt.quick else ("--unlabelled", POOL)
        sets = [bench.render(f"data_{seed}", seed, *more) for seed in seeds]
        pools = {str(n): subset(others, n, range(n)) for n in opt.pools}
        strongest = np.argsort(-intensities(others), kind="stable")
        if int(bench.middle) < POOL:
            name = f"{bench.middle}_strongest"
            pools[name] = subset(others, name, sorted(strongest[:int(bench.middle)]))
        started = list(main_rows(bench, sets, others, pools))
        if not opt.quick:
            flat = [bench.render(f"flat_{seed}", seed, "--amplitude", 0) for seed in seeds]
            flat.append(bench.render("flat_others", 1000, "--amplitude", 0, "--unlabelled",
                                     bench.middle, *few))
            started += more_rows(bench, sets, others, pools, flat)
        clips = [dataset.read_clips(data) for data in sets]
        bench.baselines([(c.labels, None, [clip.subject for clip in c.clips]) for c in clips])
        images = [torch.tensor(dataset.load_images(c, bench.work / "cache", 4, 112)[0])
                  for c in clips]
        bench.add("logistic regression on pixels", [
            (c.labels, regression(c, x, FOLDS), [clip.subject for clip in c.clips])
            for c, x in zip(clips, images)])
        for title, parts in started:
            bench.add(title, [part.result() for part in parts])
    draw(bench.work / "learning.png", bench.rows, opt.pools)
    print(f"\nrendered stand-in data, 60 subjects x 10 clips, {opt.seeds} seeds, {opt.seen} pairs "
          f"seen in pre-training, torch {torch.__version__}, {(time.time() - began) / 60:.0f} "
          f"minutes\n\n| | UF1 | 95 % interval | seeds |\n|---|---|---|---|")
    print("\n".join(map(line, bench.rows)))
    print(f"\ntable    {bench.work / 'rows.json'}\npicture  {bench.work / 'learning.png'}")


if __name__ == "__main__":
    main()
