"""UF1, UAR and accuracy as MEGC2019 defines them, their intervals, tests and baselines.

See et al., "MEGC 2019 - The Second Facial Micro-Expressions Grand Challenge", FG 2019, sec. II.C:
true and false positives are pooled over all folds, then F1 and recall per class are averaged
without weights over all C classes.
"""
import math
from collections.abc import Collection, Sequence

import numpy as np

DRAWS = 10_000  # of the bootstrap, and of the random baseline
FEW = 15  # subjects: of fewer, 95 % intervals hold the truth in 60 to 90 of 100 simulated sets
MEASURES = ("uf1", "uar", "accuracy")
MISTAKES = 12  # clips on mistakes.png


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int],
                     n_label: int) -> np.ndarray:
    """int64 `[C, C]`: rows the true class, columns the predicted one."""
    cells = np.asarray(labels) * n_label + np.asarray(predictions)
    return np.bincount(cells, minlength=n_label ** 2).reshape(n_label, n_label)


def scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confusion matrices `[..., C, C]` → (F1 per class, recall per class, accuracy), `[..., C]`,
    `[..., C]`, `[...]`. A class without support or prediction scores 0."""
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * hits / np.maximum(support + predicted, 1e-12)
    recall = hits / np.maximum(support, 1e-12)
    return f1, recall, hits.sum(-1) / np.maximum(support.sum(-1), 1e-12)


def evaluate(labels: Sequence[int], predictions: Sequence[int], n_label: int) -> dict:
    """MEGC2019's measures of pooled predictions.

    labels, predictions: integers in 0..n_label-1, `[N]`. Returns a dict with `uf1`, `uar`,
    `accuracy`, `per_class_f1`, `per_class_recall` and `confusion` (rows the true class). Raises
    ValueError for ids outside, or differing or zero lengths.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"{labels.shape} labels, {predictions.shape} predictions: two equally "
                         f"long lists are needed, not empty")
    for name, ids in (("labels", labels), ("predictions", predictions)):
        if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= n_label:
            raise ValueError(f"{name} must be integers in 0..{n_label - 1}")
    confusion = confusion_matrix(labels, predictions, n_label)
    f1, recall, accuracy = scores(confusion)
    return {"uf1": float(f1.mean()), "uar": float(recall.mean()), "accuracy": float(accuracy),
            "per_class_f1": f1.tolist(), "per_class_recall": recall.tolist(),
            "confusion": confusion.tolist()}


def per_subject(labels: Sequence[int], predictions: Sequence[int], subjects: Sequence,
                n_label: int) -> np.ndarray:
    """int64 `[S, C * C]`: the confusion matrix of each subject's clips, flat.

    subjects: what each clip's subject is, `[N]` or `[N, 2]` (database and name).
    """
    names, member = np.unique(np.asarray(subjects), return_inverse=True, axis=0)
    # numpy 2.0 gives `member` a second axis
    cells = (member.ravel() * n_label + np.asarray(labels)) * n_label + np.asarray(predictions)
    return np.bincount(cells, minlength=len(names) * n_label ** 2).reshape(len(names), -1)


def intervals(labels: Sequence[int], predictions: Sequence[int], subjects: Sequence, n_label: int,
              seed: int = 0) -> dict:
    """95 % percentile intervals by resampling subjects, conditional on the trained models.

    subjects: as in `per_subject`. A class of which a draw holds no clip has no part in that draw's
    means: a perfect classifier's stay 1. Returns {uf1, uar, accuracy: [low, high]}; None instead
    of limits where there is but one subject, from which nothing is known of others.
    """
    each = per_subject(labels, predictions, subjects, n_label)
    if len(each) < 2:
        return dict.fromkeys(MEASURES)
    rng = np.random.default_rng(seed)
    if len(each) == len(labels):  # images: one falls into a cell as often as the cell is full
        drawn = rng.multinomial(len(each), each.sum(0) / len(each), DRAWS)
    else:
        times = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), DRAWS)  # [R, S]
        drawn = times @ each
    drawn = drawn.reshape(DRAWS, n_label, n_label)
    f1, recall, accuracy = scores(drawn)
    there = each.sum(0).reshape(n_label, n_label).any(1)
    counts = drawn.any(-1) | ~there  # one that nobody has scores 0, as in the figure itself

    def mean(of_classes):
        return np.where(counts, of_classes, 0).sum(-1) / counts.sum(-1)
    return {name: np.percentile(draws, [2.5, 97.5]).tolist()
            for name, draws in (("uf1", mean(f1)), ("uar", mean(recall)), ("accuracy", accuracy))}


def too_few(subjects: int | None) -> bool:
    """Whether an interval over so many subjects is known to be too narrow; None: of images."""
    return subjects is not None and 1 < subjects < FEW


def bracketed(interval: Sequence[float] | None) -> str:
    """An interval of `intervals` as text."""
    return "[no interval]" if interval is None else "[{:.3f}, {:.3f}]".format(*interval)


def random_confusions(labels: Sequence[int], n_label: int, seed: int = 0) -> np.ndarray:
    """int64 `[DRAWS, C, C]`: confusion matrices of classes drawn in the data's own proportions."""
    counts = np.bincount(labels, minlength=n_label)
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(c, counts / counts.sum(), DRAWS) for c in counts], 1)


def baselines(labels: Sequence[int], n_label: int, seed: int = 0) -> dict:
    """What can be had without looking: the majority class, and the mean over draws of classes at
    random in the data's own proportions. {majority, stratified_random: {uf1, uar, accuracy}}."""
    counts = np.bincount(labels, minlength=n_label)
    figures = {}
    majority = np.zeros((1, n_label, n_label))
    majority[0, :, counts.argmax()] = counts
    for name, confusion in (("majority", majority),
                            ("stratified_random", random_confusions(labels, n_label, seed))):
        f1, recall, accuracy = scores(confusion)
        figures[name] = {"uf1": float(f1.mean()), "uar": float(recall.mean()),
                         "accuracy": float(accuracy.mean())}
    return figures


# ---------------------------------------------------------------- comparing systems

def permutation_test(labels: Sequence[int], first: Sequence[int], second: Sequence[int],
                     subjects: Sequence, n_label: int, seed: int = 0) -> tuple[float, float]:
    """Paired two-sided test of two systems' UF1 on the same clips, by random permutation.

    Under the hypothesis that the systems are exchangeable, the predictions of any subject may as
    well be swapped between them. first, second: their predictions, `[N]`; subjects: as in
    `per_subject`. Returns (UF1 of the first minus the second, p), where p is (1 + b) / (1 + DRAWS)
    and b counts the draws whose difference is at least as large.
    """
    one, two = (per_subject(labels, predictions, subjects, n_label)
                for predictions in (first, second))  # [S, C * C]
    if len(one) == len(labels):
        moved = _swapped_images(two - one, np.random.default_rng(seed))
    else:
        swap = np.random.default_rng(seed).integers(0, 2, (DRAWS, len(one)))
        moved = swap @ (two - one)
    moved = np.vstack([np.zeros_like(one[:1]), moved])  # the first: as measured
    uf1 = [scores(flat.reshape(-1, n_label, n_label))[0].mean(-1)
           for flat in (one.sum(0) + moved, two.sum(0) - moved)]
    difference = uf1[0] - uf1[1]
    # equal differences are equal up to rounding
    extreme = (np.abs(difference[1:]) >= abs(difference[0]) - 1e-12).sum()
    return float(difference[0]), float((1 + extreme) / (1 + DRAWS))


def _swapped_images(changes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 `[R, C * C]`: what swapping a random half of the images moves, `changes` `[N, C * C]`
    being what each one does. Of thousands of images there are few kinds, which are drawn at once;
    of two that are each other's opposite together, so that the order of systems does not matter."""
    sign = np.sign(np.take_along_axis(changes, (changes != 0).argmax(1)[:, None], 1))[:, 0]
    kinds, kind = np.unique(changes * sign[:, None], axis=0, return_inverse=True)
    ahead, behind = (np.bincount(kind.ravel()[sign == s], minlength=len(kinds)) for s in (1, -1))
    return (rng.binomial(ahead + behind, 0.5, (DRAWS, len(kinds))) - behind) @ kinds


def mcnemar(labels: Sequence[int], first: Sequence[int], second: Sequence[int]) -> float:
    """p of McNemar's exact two-sided test of two systems' accuracy on the same images, `[N]` each,
    which it takes as independent of one another."""
    labels, first, second = map(np.asarray, (labels, first, second))
    better = int(((first == labels) & (second != labels)).sum())
    worse = int(((first != labels) & (second == labels)).sum())
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2 ** n)  # integers: exact for any number of images


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm, "A simple sequentially rejective multiple test
    procedure", 1979), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def over_seeds(results: Sequence[dict]) -> dict:
    """{uf1, uar, accuracy: (mean, standard deviation)} of results (dicts with these figures) that
    differ in the seed; the deviation is the sample's, with n - 1."""
    return {name: (float(np.mean(values)), float(np.std(values, ddof=1)))
            for name in MEASURES for values in [[result[name] for result in results]]}


def most_wrong(labels: Sequence[int], probabilities: np.ndarray,
               most: int = MISTAKES) -> np.ndarray:
    """Positions of the most confidently wrong of predictions `[M, C]`, at most `most`: another
    class than the true one `[M]` with the highest probability, the first of equal ones before.
    Rows of NaN are no predictions."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    held_out = np.flatnonzero(~np.isnan(probabilities).any(1))
    wrong = held_out[probabilities[held_out].argmax(1) != np.asarray(labels)[held_out]]
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]


# ---------------------------------------------------------------- prediction rows

def summarise(rows: list[dict], n_label: int, blank_keys: Collection[tuple] = ()) -> dict:
    """Every figure of results.json that follows from the prediction rows.

    rows: dicts with database, subject, key, label and prediction; blank_keys: (database, subject,
    key) of the clips whose onset is their apex. Intervals resample subjects; where no row names
    one, images, and `resampled` says so.
    """
    labels = np.array([row["label"] for row in rows])
    predictions = np.array([row["prediction"] for row in rows])
    named = any(row["subject"] for row in rows)
    people = [(row["database"], row["subject" if named else "key"]) for row in rows]
    databases = np.array([row["database"] for row in rows])

    def count(people):
        return len(set(people)) if named else None
    figures = {"n": len(rows), "n_label": n_label, "n_subjects": count(people),
               "resampled": "subjects" if named else "images",
               **evaluate(labels, predictions, n_label),
               "ci95": intervals(labels, predictions, people, n_label),
               "baselines": baselines(labels, n_label)}
    figures["per_database"] = {  # over all C classes, whether the database holds them or not
        name: {"n": int((databases == name).sum()),
               "n_subjects": count([person for person in people if person[0] == name]),
               **evaluate(labels[databases == name], predictions[databases == name], n_label)}
        for name in dict.fromkeys(databases.tolist())}
    seen = np.array([(r["database"], r["subject"], r["key"]) not in blank_keys for r in rows])
    figures["without_blank_clips"] = {"n": int(seen.sum()), **(
        evaluate(labels[seen], predictions[seen], n_label) if seen.any() else {})}
    return figures


def per_epoch(histories: list[tuple], n_label: int) -> list[dict]:
    """`evaluate` of pooled predictions after each epoch; histories: (labels `[n]`, predictions
    `[n, E]`) of each person."""
    labels = np.concatenate([own for own, _ in histories])
    predictions = np.concatenate([history for _, history in histories])
    return [evaluate(labels, epoch, n_label) for epoch in predictions.T]


def oracle_best_epoch(histories: list[tuple], n_label: int) -> dict:
    """What picking the epoch on the held-out subjects would give, which is no result.

    histories: as in `per_epoch`. `per_subject`: each at the epoch with most correct clips, with
    these `epochs` in the order given; `common`: all at the epoch of the highest pooled UF1; the
    earliest on ties.
    """
    labels = np.concatenate([own for own, _ in histories])
    best = [int((history == own[:, None]).sum(0).argmax()) for own, history in histories]
    picked = np.concatenate([history[:, e] for (_, history), e in zip(histories, best)])
    each = per_epoch(histories, n_label)
    common = int(np.argmax([figures["uf1"] for figures in each]))
    alone = evaluate(labels, picked, n_label)
    return {"per_subject": {**{name: alone[name] for name in MEASURES},
                            "epochs": [epoch + 1 for epoch in best]},
            "common": {**{name: each[common][name] for name in MEASURES}, "epoch": common + 1}}
