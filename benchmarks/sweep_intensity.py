"""Which intensity should unlabelled pairs reach? Pre-trains over several thresholds and probes.

  python benchmarks/sweep_intensity.py --data_folder D --pairs D/pairs.tsv --subject spNO1 \\
      --save_path sweep --thresholds 0.5 1 1.5 2 3

The threshold is a choice, so it is made on training subjects alone: those of --subject never
enter. The others are split into inner folds; for each threshold and fold an encoder is
pre-trained without the fold's subjects, labelled or not, and linear heads on it predict them.
Prints a table (threshold, pairs kept, UF1 over all inner folds) and writes it as threshold.csv
and threshold.png. Expect thresholds x folds pre-trainings; finished ones are used again.
"""
from images import encoding
from images import lists
import util  # first: it settles how threads wait before torch is imported

# isort: split
import csv
import importlib
import math
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

import dataset  # noqa: E402
from evaluation import measures  # noqa: E402
from training import options  # noqa: E402
from models import MODEL_NAMES  # noqa: E402

COLUMNS = ("threshold", "pairs", "uf1", "uar")


def parse_option(argv=None):
    parser = util.ArgumentParser(description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_folder", required=True, metavar="DIR",
                      help="folder the paths in the lists and pairs are relative to")
    data.add_argument("--list_folder", metavar="DIR",
                      help="folder with v_rgb and v_depth [data_folder if it holds v_rgb]")
    data.add_argument("--pairs", required=True, metavar="FILE", help="pairs.tsv with intensities")
    data.add_argument("--subject", nargs="+", default=[], metavar="NAME",
                      help="subjects held out from the sweep altogether [none]")
    method = parser.add_argument_group("method")
    method.add_argument("--thresholds", nargs="+", type=options.number(float), metavar="X",
                        default=[0.5, 1.0, 1.5, 2.0, 3.0],
                        help="values of --min_intensity, unit of the pairs file")
    method.add_argument("--inner_folds", type=options.number(int, 2), default=3,
                        help="groups of training subjects")
    method.add_argument("--pool", choices=("unlabelled", "both"), default="both",
                        help="which clips to contrast")
    method.add_argument("--model", choices=MODEL_NAMES, default="alexnet", metavar="NAME",
                        help="encoder of each view: " + ", ".join(MODEL_NAMES))
    method.add_argument("--layer", type=options.positive_int, default=5, help="layer to probe")
    method.add_argument("--epochs", type=options.positive_int, default=240,
                        help="pre-training epochs")
    method.add_argument("--batch_size", type=options.number(int, 2), default=256,
                        help="clips per step")
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    running.add_argument("--num_workers", type=options.number(int, 0), default=4,
                         help="threads that decode images")
    running.add_argument("--seed", type=options.number(int, 0), default=0, help="of both stages")
    output = parser.add_argument_group("output")
    output.add_argument("--save_path", required=True, metavar="DIR",
                        help="folder for runs, threshold.csv and threshold.png")
    opt = parser.parse_args(argv)
    options.check_layer(parser, opt)
    return opt


def set_folds(opt):
    """Lists without the held-out subjects, and lists and pairs without each inner fold's.

    Returns (clips that are left, [(folder, names of the fold's subjects)]).
    """
    everything = dataset.read_clips(opt.data_folder, opt.list_folder)
    dataset.read_pairs(opt.pairs, opt.data_folder, min_intensity=-math.inf)  # checks every row
    out = set(dataset.find_people(opt.subject, everything))
    clips = everything.subset([clip.person not in out for clip in everything.clips])
    lists = dataset.find_list_folder(opt.data_folder, opt.list_folder)
    names, fold_of = dataset.ten_folds(clips, opt.inner_folds)
    work, folds = Path(opt.save_path), []
    write_part(opt, lists, work / "inner", clips, out)
    for i in range(len(names)):
        people = {clips.clips[j].person for j in range(len(clips)) if fold_of[j] == i}
        part = clips.subset(fold_of != i)
        write_part(opt, lists, work / names[i], part, out | people)
        folds.append((work / names[i], sorted(dataset.person_name(p, clips) for p in people)))
    return clips, folds


def write_part(opt, lists, folder, clips, out):
    """Lists of `clips`, and the pairs of nobody in `out`, with what says how to read them."""
    folder.mkdir(parents=True, exist_ok=True)
    lists.write_lists(folder, clips.clips)
    if (lists / "encoding.json").exists():
        shutil.copyfile(lists / "encoding.json", folder / "encoding.json")
    with open(opt.pairs, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows, columns = list(reader), reader.fieldnames or []
    if "subject" not in columns or not all((row["subject"] or "").strip() for row in rows):
        raise util.BadInput(f"{opt.pairs}: names no subjects, so none can be left out; fill its "
                            f"subject column")
    kept = ["\t".join(row[c] for c in columns) for row in rows
            if not any(dataset.same_person(person_of(row), p) for p in out)]
    util.write_text(folder / "pairs.tsv", "\n".join(["\t".join(columns), *kept]) + "\n")


def person_of(row):
    """(database, subject) of a row of pairs.tsv, whose database may be a name or a number."""
    name = row.get("database") or "casme3"
    return int(name) if name.isdigit() else dataset.DATABASES.index(name), row["subject"]


def count_pairs(folder, threshold):
    """How many of a part's pairs reach the threshold."""
    with open(folder / "pairs.tsv", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return sum(float(row["intensity"]) >= threshold for row in rows)


def run_fold(opt, threshold, folder, names):
    """(labels, predictions) of one inner fold's clips, with an encoder that never saw them."""
    root = Path(opt.save_path) / f"threshold_{threshold:g}" / folder.name
    common = ["--data_folder", opt.data_folder, "--device", opt.device, "--num_workers",
              opt.num_workers, "--seed", opt.seed, "--resume", "auto", "--model", opt.model,
              "--print_freq", 1000, "--save_freq", 1000, "--cache", Path(opt.save_path) / "cache"]
    pretrain = importlib.import_module("pre-train_DVSCL")
    argv = [str(value) for value in (
        *common, "--list_folder", folder, "--pairs", folder / "pairs.tsv", "--pool", opt.pool,
        "--min_intensity", threshold, "--epochs", opt.epochs, "--batch_size", opt.batch_size,
        "--model_path", root / "runs")]
    pretrain.main(argv)
    run = root / "runs" / script("pre-train_DVSCL").run_name(pretrain.parse_option(argv))
    # a folder for each layer and length, so that a sweep with others finds its own results
    results = root / "results" / run.name / f"layer_{opt.layer}_{opt.epochs}"
    importlib.import_module("LinearProbing_DVSCL_10fold").main([
        *common, "--list_folder", folder.parent / "inner", "--protocol", "loso", "--subject",
        *names, "--layer", opt.layer, "--model_path", run / "last.pth", "--save_path", results])
    (table,) = results.glob("*/predictions.csv")
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [int(r["label"]) for r in rows], [int(r["prediction"]) for r in rows]


def draw(path, rows):
    """UF1 and the number of pairs over the threshold."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    other = axis.twinx()
    x = [row["threshold"] for row in rows]
    other.bar(x, [row["pairs"] for row in rows], width=0.15, color="0.85")
    axis.plot(x, [row["uf1"] for row in rows], "o-k")
    axis.set(xlabel="least intensity of a pair", ylabel="UF1 on inner folds", ylim=(0, 1))
    other.set_ylabel("pairs kept (bars)")
    axis.set_zorder(other.get_zorder() + 1)
    axis.patch.set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    clips, folds = set_folds(opt)
    inner, rows = Path(opt.save_path) / "inner", []
    for threshold in sorted(set(opt.thresholds)):
        kept = count_pairs(inner, threshold)
        if min(count_pairs(folder, threshold) for folder, _ in folds) < 2:
            print(f"threshold {threshold:g}: {kept} pairs, too few to pre-train on; left out")
            continue
        found = [run_fold(opt, threshold, *fold) for fold in folds]
        scores = measures.evaluate(*(sum(part, []) for part in zip(*found)), clips.n_label)
        rows.append(dict(zip(COLUMNS, (threshold, kept, scores["uf1"], scores["uar"]))))
    if not rows:
        raise util.BadInput(f"{opt.pairs}: no threshold leaves two pairs in every inner fold; "
                            f"lower --thresholds")
    lines = [",".join(COLUMNS)] + [f"{r['threshold']:g},{r['pairs']},{r['uf1']:.4f},{r['uar']:.4f}"
                                   for r in rows]
    util.write_text(Path(opt.save_path) / "threshold.csv", "\n".join(lines) + "\n")
    draw(Path(opt.save_path) / "threshold.png", rows)
    print(f"{len(clips)} clips of {len(clips.people)} training subjects, {len(folds)} inner folds")
    print(f"{'threshold':>10}{'pairs':>8}{'UF1':>8}{'UAR':>8}")
    for row in rows:
        print(f"{row['threshold']:10g}{row['pairs']:8}{row['uf1']:8.3f}{row['uar']:8.3f}")
    print(f"table    {Path(opt.save_path) / 'threshold.csv'}\n"
          f"picture  {Path(opt.save_path) / 'threshold.png'}")


if __name__ == "__main__":
    main()
