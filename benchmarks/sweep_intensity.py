"""Which intensity should unlabelled pairs reach? Pre-trains over several thresholds and probes.

  python benchmarks/sweep_intensity.py --data_folder D --pairs D/pairs.tsv --without spNO1 \\
      --save_path sweep --thresholds 0.5 1 1.5 2 3

The threshold is a choice, so it is made on training subjects alone: those of --without never
enter. The others are split into inner folds; for each threshold and fold an encoder is
pre-trained without the fold's subjects, labelled or not, and linear heads on it predict them.
Other flags go to pre-train_DVSCL.py; those listed for both stages to LinearProbing_DVSCL_10fold.py
as well. Prints a table (threshold, pairs kept, UF1 and UAR over all inner folds) and writes it as
threshold.csv and threshold.png. Expect thresholds x folds pre-trainings; finished ones are used
again.
"""
import importlib
import itertools
import math
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import util  # first: it settles how threads wait before torch is imported
import dataset
from evaluation import measures
from models import MODEL_NAMES
from util import number

COLUMNS = ("threshold", "pairs", "uf1", "uar")
PRETRAIN, PROBE = "pre-train_DVSCL", "LinearProbing_DVSCL_10fold"


def parse_option(argv):
    """(the sweep's options, flags of pre-training, flags of both stages)"""
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--data_folder", required=True, metavar="DIR",
                        help="folder the paths in the lists and pairs are relative to")
    parser.add_argument("--list_folder", metavar="DIR",
                        help="folder with v_rgb and v_depth [data_folder if it holds v_rgb]")
    parser.add_argument("--pairs", required=True, metavar="FILE", help="pairs.tsv with intensities")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME",
                        help="subjects held out from the sweep altogether [none]")
    parser.add_argument("--thresholds", nargs="+", type=number(float), metavar="X",
                        default=[0.5, 1.0, 1.5, 2.0, 3.0],
                        help="values of --min_intensity, unit of the pairs file")
    parser.add_argument("--inner_folds", type=number(int, 2), default=3,
                        help="groups of training subjects")
    parser.add_argument("--pool", choices=("unlabelled", "both"), default="both",
                        help="which clips to contrast")
    parser.add_argument("--layer", type=util.positive_int, help="layer to probe [the last]")
    parser.add_argument("--save_path", required=True, metavar="DIR",
                        help="folder for runs, threshold.csv and threshold.png")
    both = parser.add_argument_group("both stages")
    both.add_argument("--model", choices=MODEL_NAMES, metavar="NAME", help="encoder [alexnet]")
    for flag, text in (("--size", "side of the crops, pixels"), ("--seed", "of both stages"),
                       ("--device", "auto, cpu, cuda, cuda:1"), ("--num_workers", "threads"),
                       ("--encoding", "what a pixel means, where no encoding.json says it")):
        both.add_argument(flag, help=text)
    both.add_argument("--view", default="RGB_D", metavar="RGB_NAME",
                      help="RGB and the second view")
    opt, more = parser.parse_known_args(argv)
    for flag in ("--min_intensity", "--model_path", "--subject", "--fold"):
        if flag in (word.partition("=")[0] for word in more):
            parser.error(f"{flag} is what the search itself gives to pre-training; leave it out")
    shared = [f"--{name}={getattr(opt, name)}" for name in (
        "model", "size", "seed", "device", "num_workers", "list_folder", "encoding", "view")
        if getattr(opt, name) is not None]
    return opt, more, shared


def main_of(script, *flags):
    """Runs a script of the project in this process."""
    importlib.import_module(script).main([str(flag) for flag in flags])


def run_fold(opt, more, shared, threshold, fold):
    """(labels, predictions) of one inner fold's clips, with an encoder that never saw them.

    fold: (its name, the names of its subjects).
    """
    name, people = fold
    root = Path(opt.save_path) / f"threshold_{threshold:g}" / name
    common = ["--data_folder", opt.data_folder, "--resume", "auto", "--print_freq", 1000, "--cache",
              Path(opt.save_path) / "cache", *shared]
    argv = [*common, "--pairs", opt.pairs, "--pool", opt.pool, "--min_intensity", threshold,
            "--model_path", root / "runs", *more, "--without", *sorted([*opt.without, *people])]
    main_of(PRETRAIN, *argv)
    pretrain = importlib.import_module(PRETRAIN)
    run = root / "runs" / pretrain.run_name(pretrain.parse_option([str(flag) for flag in argv]))
    results = root / "results" / run.name / f"layer_{opt.layer or 'last'}"
    main_of(PROBE, *common, "--protocol", "loso", "--model_path", run / "last.pth", "--save_path",
            results, *(["--layer", opt.layer] if opt.layer else []),
            *(["--without", *opt.without] if opt.without else []), "--subject", *people)
    (table,) = results.glob("*/predictions.csv")
    rows = [row for _, row in util.read_table(table, fix="run it again")[0]]
    return [[int(row[name]) for row in rows] for name in ("label", "prediction")]


def shown(opt, threshold, out):
    """The persons, as dataset.identity, of the pairs that a threshold leaves, but those `out`."""
    pairs = dataset.read_pairs(opt.pairs, opt.data_folder, opt.view, opt.encoding, threshold)
    people, out = [dataset.identity(clip.person) for clip in pairs.clips], {
        dataset.identity(person) for person in out}
    return [person for person in people if person not in out]


def draw(path, rows):
    """UF1 and the number of pairs over the threshold."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    other = axis.twinx()
    x = [row["threshold"] for row in rows]
    other.bar(x, [row["pairs"] for row in rows], width=0.15, color="0.85")
    axis.plot(x, [row["uf1"] for row in rows], "o-k")
    axis.set(xlabel="least intensity of a pair", ylabel="UF1 on inner folds", ylim=(0, 1))
    other.set_ylabel("pairs kept (bars)")
    axis.set_zorder(other.get_zorder() + 1)
    axis.patch.set_visible(False)
    util.write_figure(path, figure)


@util.command_line
def main(argv=None):
    opt, more, shared = parse_option(argv)
    clips = dataset.read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    if len({clip.database for clip in clips.clips}) > 1:
        raise util.BadInput(f"{opt.list_folder or opt.data_folder}: lists of several databases; a "
                            f"threshold is chosen on one, --list_folder names its lists")
    dataset.read_pairs(opt.pairs, opt.data_folder, opt.view, opt.encoding,
                       min_intensity=-math.inf)  # checks every row
    out = dataset.find_without(opt, clips)
    clips = clips.subset([clip.person not in out for clip in clips.clips])
    folds = dataset.subject_groups(clips, opt.inner_folds)
    members = [{c.person for c, fold in zip(clips.clips, folds.of) if fold == i}
               for i in range(len(folds.names))]
    people = [sorted(clips.names[person] for person in fold) for fold in members]
    rows = []
    for threshold in sorted(set(opt.thresholds)):
        left = shown(opt, threshold, out)
        if min(sum(person not in set(map(dataset.identity, fold)) for person in left)
               for fold in members) < 2:
            print(f"threshold {threshold:g}: {len(left)} pairs, too few to pre-train on; left out")
            continue
        parts = [run_fold(opt, more, shared, threshold, fold)
                 for fold in zip(folds.names, people)]
        labels, said = (list(itertools.chain(*part)) for part in zip(*parts))
        scores = measures.evaluate(labels, said, clips.n_label)
        rows.append(dict(zip(COLUMNS, (threshold, len(left), scores["uf1"], scores["uar"]))))
    if not rows:
        raise util.BadInput(f"{opt.pairs}: no threshold leaves two pairs in every inner fold; "
                            f"lower --thresholds")
    table, picture = (Path(opt.save_path) / f"threshold.{kind}" for kind in ("csv", "png"))
    util.write_table(table, COLUMNS, [[f"{r['threshold']:g}", r["pairs"], f"{r['uf1']:.4f}",
                                       f"{r['uar']:.4f}"] for r in rows])
    draw(picture, rows)
    print(f"{len(clips)} clips of {len(clips.people)} training subjects, {len(people)} inner folds")
    print(f"{'threshold':>10}{'pairs':>8}{'UF1':>8}{'UAR':>8}")
    for row in rows:
        print(f"{row['threshold']:10g}{row['pairs']:8}{row['uf1']:8.3f}{row['uar']:8.3f}")
    print(f"table    {table}\npicture  {picture}")


if __name__ == "__main__":
    main()
