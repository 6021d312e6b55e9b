"""Does a large unlabelled pool help? UF1 on rendered data of everything a number is held against.

  python benchmarks/learning.py --work runs/learning             # about 90 minutes, two CPU cores
  python benchmarks/learning.py --work runs/quick --quick        # 15 minutes

60 subjects x 10 rendered clips, ten folds of subjects, for each seed (of rendering, pre-training
and heads) another set; unlabelled pairs of other people, and of the same people without those held
out; encoders that saw as many pairs in pre-training, whatever the size of the pool. Beside them
what can be had without any encoder, untrained encoders, the same network trained from scratch,
controls that must come out at chance, and a ceiling: the pool with its labels. Reports whatever
comes out, and draws UF1 against the size of the pool.
"""
import importlib
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import dataset
from benchmarks.rows import Rows, line, regression
from evaluation import pictures
from images import lists
from prediction import clips as prediction
from rendering import expression
from training import checkpoint, epochs, supervised

PEOPLE = 250  # in the unlabelled pool
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
    parser.add_argument("--pools", nargs="+", type=util.positive_int, default=[500, 2000, 5000],
                        metavar="N", help="sizes of the pool of other people")
    parser.add_argument("--epochs_finetune", type=util.positive_int, default=3,
                        help="fine-tuning epochs; from scratch four times as many")
    opt = parser.parse_args(argv)
    if opt.quick:
        opt.seeds, opt.seen, opt.pools = 1, opt.seen // 3, opt.pools[1:2]
        opt.epochs_finetune = min(opt.epochs_finetune, 2)
    return opt


class Bench(Rows):
    """The runs of one call: each method calls a script and returns what it measured."""

    def __init__(self, opt):
        super().__init__(Path(opt.work), 4)
        self.opt = opt

    def render(self, name, seed, *flags):
        folder = self.work / name
        importlib.import_module("render").main([
            "casme3", "--data_folder", folder, "--subjects", 60, "--clips_per_subject", 10,
            "--size", 128, "--seed", seed, *flags])
        return folder

    def shared(self, model, seed):
        return ["--model", model, "--size", SIZES[model], "--seed", seed, "--resume", "auto",
                "--cache", self.work / "cache", "--print_freq", 1000,
                "--tb_path", self.work / "tensorboard"]

    def pretrain(self, name, model, seed, data, pairs, *flags, share=1):
        """The checkpoint of a pre-training run on `pairs` (a file, None: the labelled clips) that
        sees `share` of --seen pairs."""
        root = self.work / "runs" / f"{name}_{model}_{seed}"
        count = 600
        if pairs:
            count = len(pairs.read_text().splitlines()) - 1
            flags = ["--pairs", pairs, "--pool", "unlabelled", *flags]
        passes = max(2, round(share * self.opt.seen / count))
        importlib.import_module("pre-train_DVSCL").main([
            "--data_folder", data, "--model_path", root, "--epochs", passes, "--batch_size", 128,
            "--warmup_epochs", passes / 20, "--save_freq", 1000, *self.shared(model, seed), *flags])
        return root / next(root.glob("batch_*")).name / "last.pth"

    def head(self, script, name, model, seed, data, path, *flags):
        """Results of a probing or fine-tuning run."""
        root = self.work / "results" / f"{name}_{model}_{seed}"
        importlib.import_module(script).main([
            "--data_folder", data, "--model_path", path, "--save_path", root, "--protocol",
            "10fold", "--layer", LAYERS[model], *self.shared(model, seed), *flags])
        return next(root.glob("*/results.json")).parent

    def probe(self, *args):
        return self.head("LinearProbing_DVSCL_10fold", *args)

    def finetune(self, *args):
        return self.head("fine-tune_DVSCL", *args, "--save_freq", 1000)


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


def ceiling(bench, pool, data, lists):
    """(labels, predictions, subjects) on the clips of `data` by a network trained from scratch on
    the whole pool's labels."""
    root = bench.work / "results" / "ceiling"
    importlib.import_module("fine-tune_DVSCL").main([
        "--data_folder", pool, "--list_folder", lists, "--subject", "all", "--save_path", root,
        "--model_path", "random", "--layer", LAYERS["resnet18v1"],
        *bench.shared("resnet18v1", 0), *scratch(
            max(2, round(bench.opt.seen / 5000)))])
    (path,) = root.glob("*/last.pth")
    state, clips = checkpoint.load(path), dataset.read_clips(data)
    device = torch.device("cpu")
    classifier = prediction.set_model(path, state, clips, device)
    images, _ = dataset.load_images(clips, bench.work / "cache", 4, SIZES["resnet18v1"])
    said = supervised.predict(classifier, images, np.arange(len(clips)),
                              epochs.mixed_precision(False, device).autocast).argmax(1)
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


def main_rows(bench, sets, pools):
    """Baselines, pools of other people, each view, thresholds, fine-tuning: all seeds."""
    opt, model, seeds = bench.opt, "resnet18v1", range(bench.opt.seeds)
    everything = [dataset.read_clips(data) for data in sets]
    bench.baselines(np.concatenate([c.labels for c in everything]))
    images = [dataset.load_images(c, bench.work / "cache", 4, 112)[0] for c in everything]
    bench.add("logistic regression on pixels", [
        (c.labels, regression(c, torch.from_numpy(x)), [clip.subject for clip in c.clips])
        for c, x in zip(everything, images)])
    bench.row("untrained, probe",
              [bench.probe("untrained", model, s, sets[s], "random") for s in seeds])
    paths = {}
    for name, file in pools.items():
        for seed in seeds:
            paths[name, seed] = bench.pretrain(name, model, seed, sets[0], file)
        title = f"pre-trained on {name} pairs of others" if name.isdigit() else \
            f"pre-trained on the 2000 strongest of {max(opt.pools)}"
        bench.row(f"{title}, probe", [bench.probe(name, model, s, sets[s], paths[name, s])
                                      for s in seeds])
    middle = str(sorted(opt.pools)[len(opt.pools) // 2])
    for title, of in (("untrained", "random"), (f"pre-trained on {middle}", None)):
        bench.row(f"{title}, probe of layer 6", [
            bench.probe(f"{title.split()[0]}_layer6", model, s, sets[s], of or paths[middle, s],
                        "--layer", 6) for s in seeds])
    for view in ("rgb", "depth"):
        bench.row(f"the same, {middle} pairs, {view} alone", [
            bench.probe(f"{middle}_{view}", model, s, sets[s], paths[middle, s], "--encoder", view)
            for s in seeds])
    bench.row("control: permuted labels, probe", [
        bench.probe("permuted", model, s, sets[s], paths[middle, s], "--list_folder",
                    permuted_lists(sets[s], bench.work / f"permuted_{s}", s)) for s in seeds])
    bench.row(f"pre-trained on {middle}, fine-tuned", [
        bench.finetune("finetuned", model, s, sets[s], paths[middle, s], "--epochs",
                       opt.epochs_finetune, "--batch_size", 64, "--encoder_lr", 0.001)
        for s in seeds])
    for title, name, of in (("the same network from scratch", "scratch", "random"),
                            (f"the same recipe, pre-trained on {middle}", "retrained", None)):
        bench.row(title, [bench.finetune(name, model, s, sets[s], of or paths[middle, s],
                                         *scratch(4 * opt.epochs_finetune)) for s in seeds])


def more_rows(bench, sets):
    """What is run for one seed: other encoders, the same people, the last control, the ceiling."""
    model, data = "resnet18v1", sets[0]
    lists = labelled_pool(data, bench.work / "labelled_pool")
    bench.add("ceiling: 5000 labelled clips of others", [ceiling(bench, data, data, lists)])
    flat = bench.render("flat", 0, "--amplitude", 0, "--unlabelled", 2000,
                        "--unlabelled_subjects", PEOPLE)
    path = bench.pretrain("flat", model, 0, flat, flat / "pairs.tsv")
    bench.row("control: no expression, probe", [bench.probe("flat", model, 0, flat, path)])
    bench.row("alexnet untrained, probe",
              [bench.probe("untrained", "alexnet", 0, data, "random")])
    path = bench.pretrain("2000", "alexnet", 0, data, data / "pairs_2000.tsv")
    bench.row("alexnet pre-trained on 2000 pairs of others, probe",
              [bench.probe("2000", "alexnet", 0, data, path)])
    same = bench.render("same", 0, "--unlabelled", 2000)
    for name, folder, file in (("the labelled clips alone", data, None),
                               ("2000 pairs of the same people", same, same / "pairs.tsv")):
        paths = [bench.pretrain(f"fold{i}_{'same' if file else 'none'}", model, 0, folder, file,
                                "--fold", f"{i}/10", share=0.25) for i in range(1, 11)]
        template = str(paths[0]).replace("fold1_", "{fold}_").replace("fold1of10", "{fold}")
        for i, path in enumerate(paths, 1):  # under the names that the folds have
            link = Path(template.replace("{fold}", f"fold{i}of10"))
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, link)
        bench.row(f"pre-trained on {name}, the held-out ones left out, probe",
                  [bench.probe("same" if file else "none", model, 0, folder, template)])


@util.command_line
def main(argv=None):
    opt, began = parse_option(argv), time.time()
    bench = Bench(opt)
    sets = [bench.render("data_0", 0, "--unlabelled", 5000, "--unlabelled_subjects", PEOPLE),
            *(bench.render(f"data_{seed}", seed) for seed in range(1, opt.seeds))]
    pools = {str(n): subset(sets[0], n, range(n)) for n in opt.pools}
    strongest = np.argsort(-intensities(sets[0]), kind="stable")[:2000]
    pools["strongest"] = subset(sets[0], "strongest", sorted(strongest))
    main_rows(bench, sets, pools)
    if not opt.quick:
        more_rows(bench, sets)
    draw(bench.work / "learning.png", bench.rows, opt.pools)
    print(f"\nrendered stand-in data, 60 subjects x 10 clips, {opt.seeds} seeds, {opt.seen} pairs "
          f"seen in pre-training, torch {torch.__version__}, {(time.time() - began) / 60:.0f} "
          f"minutes\n\n| | UF1 | 95 % interval | seeds |\n|---|---|---|---|")
    print("\n".join(map(line, bench.rows)))
    print(f"\ntable    {bench.work / 'rows.json'}\npicture  {bench.work / 'learning.png'}")


if __name__ == "__main__":
    main()
