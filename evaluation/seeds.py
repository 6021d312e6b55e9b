"""Several seeds of one run: mean and standard deviation of its figures."""
import argparse
from collections.abc import Callable
from pathlib import Path

from evaluation import measures, result_files
from evaluation.encoders import RANDOM
from training import record
from util import BadInput, flag, write_json


def runs_of(opt: argparse.Namespace, run_name: Callable) -> list[argparse.Namespace]:
    """The options of the run of every one of --seeds; run_name(opt): of a run's folder. Raises
    BadInput, before the first one trains for hours, where another has a folder already, or no
    checkpoint to start from."""
    path, each = getattr(opt, "model_path", ""), []
    for seed in opt.seeds or [opt.seed]:
        each.append(opt.changed(seed=seed))
        if path:
            each[-1].model_path = path.replace("{seed}", str(seed))
    for one in each[1:]:
        folder = Path(opt.save_path) / run_name(one)
        if path not in ("", RANDOM) and "{" not in one.model_path \
                and not Path(one.model_path).is_file() and not (opt.resume and folder.exists()):
            raise BadInput(f"--model_path {one.model_path}: no such checkpoint")
        if not opt.resume and getattr(opt, "subject", None) in (None, ["all"]) \
                and record.holds_a_run(folder):
            raise BadInput(f"{folder}: exists; go on with --resume auto, give another --tag, or "
                           f"remove it")
    return each


def run_each(opt: argparse.Namespace, evaluate: Callable, run_name: Callable) -> None:
    """Calls `evaluate(opt)`, which returns (run folder, results or None), for every one of --seeds,
    and writes and prints mean and standard deviation over them; run_name: as in `runs_of`. Raises
    BadInput."""
    runs = [evaluate(one) for one in runs_of(opt, run_name)]
    results = [results for _, results in runs if results]
    if not opt.seeds or not results:
        return
    clips = [set(result_files.read_predictions(folder / "predictions.csv", result["n_label"]))
             for folder, result in runs]
    for (folder, _), own in zip(runs, clips):
        if own != clips[0]:
            raise BadInput(f"{folder}: holds {len(own)} clips, not the {len(clips[0])} of "
                           f"{runs[0][0].name}; give every seed the same {flag(opt, 'subject')}")
    figures = measures.over_seeds(results)
    first = runs[0][0]
    head, _, tail = first.name.rpartition(f"_seed_{opt.seeds[0]}")
    path = first.with_name(f"{head}_seeds_{'_'.join(map(str, opt.seeds))}{tail}.json")
    write_json(path, {"seeds": opt.seeds, "runs": [folder.name for folder, _ in runs],
                      **{name: {"mean": mean, "std": deviation}
                         for name, (mean, deviation) in figures.items()}})
    print(f"over seeds {' '.join(map(str, opt.seeds))}: " + ", ".join(
        f"{name} {mean:.3f} ± {deviation:.3f}" for name, (mean, deviation) in figures.items())
        + f"\nseeds        {path}")
