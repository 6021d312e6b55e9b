"""What the learning benchmarks share: runs side by side, rows of their tables, regressions."""
import argparse
import importlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import dataset
import util
from dataset import ClipSet
from evaluation import fold_heads, measures, photographs
from images.faces import FaceSet, decode

# options with which what is finished stays right
ALIKE = ("work", "processes", "seeds", "seeds_ran", "seeds_losses", "quick", "pools")
GREY_SIDE = 48  # of the pixels of faces that are regressed on
PENALTIES = (1e-3, 1e-2, 1e-1, 1, 10)  # C


class Rows:
    """A table of UF1 in a folder `work`, for `n_label` classes."""
    own_people = False  # each seed tests people of its own, not the same ones again

    def __init__(self, opt: argparse.Namespace, n_label: int):
        """Raises BadInput where what is finished in --work was computed with other options."""
        self.work, self.n_label, self.rows = Path(opt.work), n_label, []
        path, asked = self.work / "options.json", {
            name: value for name, value in vars(opt).items() if name not in ALIKE}
        if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != asked:
            other = next(name for name in {**there, **asked} if there.get(name) != asked.get(name))
            raise util.BadInput(f"{path}: was run with --{other} {there.get(other)}, here "
                                f"{asked.get(other)}; name another --work, or remove it")
        self.work.mkdir(parents=True, exist_ok=True)
        util.write_json(path, asked)

    def row(self, name: str, folders: list[Path]) -> None:
        """A row of the table from the run folders of the seeds."""
        self.add(name, [read(folder) for folder in folders])

    def add(self, name: str, parts: list[tuple]) -> None:
        """A row from (labels, predictions, subjects) of each seed: figures of all seeds' clips
        together, intervals over people, the deviation over the seeds."""
        labels, said = (np.concatenate(of) for of in list(zip(*parts))[:2])
        people = [(str(seed) * self.own_people, person) for seed, part in enumerate(parts)
                  for person in part[2]]
        each = [measures.evaluate(*part[:2], self.n_label)["uf1"] for part in parts]
        self._add(name, measures.evaluate(labels, said, self.n_label)["uf1"],
                  measures.intervals(labels, said, people, self.n_label)["uf1"], each)

    def baselines(self, parts: list[tuple]) -> None:
        """Rows of what knows nothing of a clip, for the labels and subjects of each seed as in
        `add`: the majority class, and classes drawn in the data's proportions, the interval being
        that of 95 % of the draws."""
        self.add("majority class", [
            (labels, np.full_like(labels, np.bincount(labels).argmax()), people)
            for labels, _, people in parts])
        drawn = [measures.random_confusions(labels, self.n_label, seed)
                 for seed, (labels, *_) in enumerate(parts)]
        *each, together = (measures.scores(of)[0].mean(-1) for of in (*drawn, sum(drawn)))
        self._add("stratified random", together.mean(), np.percentile(together, [2.5, 97.5]),
                  [draws.mean() for draws in each])

    def _add(self, name, uf1, interval, each):
        """A row; each: UF1 of every seed."""
        self.rows.append({"name": name, "uf1": float(uf1), "seeds": len(each),
                          "ci95": [float(limit) for limit in interval],
                          "std": float(np.std(each, ddof=1)) if len(each) > 1 else None})
        util.write_json(self.work / "rows.json", self.rows)
        print(line(self.rows[-1]), flush=True)


class Jobs:
    """Runs of scripts, so many at a time, in processes of one thread that import them once; what
    they print is left out."""

    def __init__(self, processes: int):
        # read when a worker imports torch and tqdm: two bars on one line tell nothing
        os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.workers = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _mute)
        self.waiting = ThreadPoolExecutor(10_000)  # threads, most of which wait

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pool in (self.waiting, self.workers):
            pool.shutdown(wait=False, cancel_futures=True)

    def run(self, script: str, *flags) -> None:
        """Runs a script in one of the processes; returns when it is done."""
        self.compute(_main, script, list(map(str, flags))).result()

    def compute(self, function: Callable, *args) -> Future:
        """Calls a function in one of the processes."""
        return self.workers.submit(function, *args)

    def start(self, function: Callable, *args) -> Future:
        """Calls a function, which runs scripts, in a thread."""
        return self.waiting.submit(function, *args)


def _mute():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(script, flags):
    importlib.import_module(script).main(flags)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(labels, predictions, subjects) of a run folder."""
    rows = [row for _, row in util.read_table(folder / "predictions.csv", fix="remove --work")[0]]
    return (*(np.array([int(row[name]) for row in rows]) for name in ("label", "prediction")),
            [row["subject"] for row in rows])


def line(row: dict) -> str:
    """A row as Markdown."""
    low, high = row["ci95"]
    return (f"| {row['name']} | {row['uf1']:.3f} | {low:.3f} – {high:.3f} | "
            + ("" if row["std"] is None else f"± {row['std']:.3f} of {row['seeds']}") + " |")


def regress(x: dict[str, np.ndarray], labels: np.ndarray, train: FaceSet, seed: int) -> np.ndarray:
    """Predictions `[M]` of a logistic regression on features {train `[N, D]`, test `[M, D]`}, the
    penalty chosen on held-out people of the training split; labels: `[N]`."""
    rest, out = photographs.hold_out(train, 0.2, seed)

    def predictions(index, of, penalties):
        """{C: classes of the features `of`} of models fitted to the rows `index`; each starts from
        the one before, on coordinates in the span of its rows, where the solution lies."""
        turned = make_pipeline(StandardScaler(), PCA(svd_solver="full")).fit(x["train"][index])
        model, said = LogisticRegression(max_iter=2000, warm_start=True), {}
        for c in penalties:
            model.set_params(C=c).fit(turned.transform(x["train"][index]), labels[index])
            said[c] = model.predict(turned.transform(of))
        return said
    tried = predictions(rest, x["train"][out], PENALTIES)
    best = max(PENALTIES, key=lambda c: f1_score(labels[out], tried[c], average="macro"))
    return predictions(np.arange(len(train)), x["test"], [c for c in PENALTIES if c <= best])[best]


def grey_pixels(faces: FaceSet) -> np.ndarray:
    """Grey pixels of face images, `[N, GREY_SIDE²]`."""
    return np.stack([decode(faces, i, GREY_SIDE).mean(0).ravel() for i in range(len(faces))])


def regression(clips: ClipSet, images: Tensor, folds: int = 10, side: int = 16) -> np.ndarray:
    """Predictions `[N]` of logistic regressions on images `[N, C, S, S]` averaged to a grid of so
    many cells a side, in so many folds, the penalty chosen as for the heads."""
    x = F.adaptive_avg_pool2d(images.float(), side).flatten(1)[None]
    fold_of = dataset.subject_groups(clips, folds).of
    task = fold_heads.Task(x, clips.labels, clips.n_label, fold_of, sorted(set(fold_of.tolist())))
    heads, _ = fold_heads.solve(task, groups=fold_heads.inner_groups(clips))
    return fold_heads.predict(heads, task).argmax(1)
