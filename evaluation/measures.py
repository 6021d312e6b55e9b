"""UF1, UAR and accuracy as MEGC2019 defines them, their intervals, and the result files.

See et al., "MEGC 2019 - The Second Facial Micro-Expressions Grand Challenge", FG 2019, sec. II.C:
true and false positives are pooled over all folds, then F1 and recall per class are averaged
without weights over all C classes.
"""
import csv
import io
import json
from pathlib import Path

import numpy as np

from dataset import DATABASES
from evaluation import pictures
from training import checkpoint
from util import BadInput, ensure, read_log, write_json, write_text

DRAWS = 10_000  # of the bootstrap, and of the random baseline
MEASURES = ("uf1", "uar", "accuracy")
MISTAKES = 12  # clips on mistakes.png
COLUMNS = ("database", "subject", "key", "label", "prediction")


def confusion_matrix(labels, predictions, n_label):
    """int64 `[C, C]`: rows the true class, columns the predicted one."""
    cells = np.asarray(labels) * n_label + np.asarray(predictions)
    return np.bincount(cells, minlength=n_label ** 2).reshape(n_label, n_label)


def scores(confusion):
    """Confusion matrices `[..., C, C]` → (F1 per class, recall per class, accuracy), `[..., C]`,
    `[..., C]`, `[...]`. A class without support or prediction scores 0."""
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * hits / np.maximum(support + predicted, 1e-12)
    recall = hits / np.maximum(support, 1e-12)
    return f1, recall, hits.sum(-1) / np.maximum(support.sum(-1), 1e-12)


def evaluate(labels, predictions, n_label):
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


def per_subject(labels, predictions, subjects, n_label):
    """int64 `[S, C * C]`: the confusion matrix of each subject's clips, flat.

    subjects: what each clip's subject is, `[N]` or `[N, 2]` (database and name).
    """
    names, member = np.unique(np.asarray(subjects), return_inverse=True, axis=0)
    # numpy 2.0 gives `member` a second axis
    cells = (member.ravel() * n_label + np.asarray(labels)) * n_label + np.asarray(predictions)
    return np.bincount(cells, minlength=len(names) * n_label ** 2).reshape(len(names), -1)


def intervals(labels, predictions, subjects, n_label, seed=0):
    """95 % percentile intervals by resampling subjects, conditional on the trained models.

    subjects: as in `per_subject`. Returns {uf1, uar, accuracy: [low, high]}.
    """
    each = per_subject(labels, predictions, subjects, n_label)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), DRAWS)  # [R, S]
    f1, recall, accuracy = scores((times @ each).reshape(DRAWS, n_label, n_label))
    return {name: np.percentile(draws, [2.5, 97.5]).tolist()
            for name, draws in (("uf1", f1.mean(-1)), ("uar", recall.mean(-1)),
                                ("accuracy", accuracy))}


def baselines(labels, n_label, seed=0):
    """What can be had without looking: the majority class, and the mean over draws of classes at
    random in the data's own proportions. {majority, stratified_random: {uf1, uar, accuracy}}."""
    counts = np.bincount(labels, minlength=n_label)
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.multinomial(c, counts / counts.sum(), DRAWS) for c in counts], 1)
    found = {}
    majority = np.zeros((1, n_label, n_label))
    majority[0, :, counts.argmax()] = counts
    for name, confusion in (("majority", majority), ("stratified_random", drawn)):
        f1, recall, accuracy = scores(confusion)
        found[name] = {"uf1": float(f1.mean()), "uar": float(recall.mean()),
                       "accuracy": float(accuracy.mean())}
    return found


# ---------------------------------------------------------------- comparing systems

def permutation_test(labels, first, second, subjects, n_label, seed=0):
    """Paired two-sided test of two systems' UF1 on the same clips, by random permutation.

    Under the hypothesis that the systems are exchangeable, the predictions of any subject may as
    well be swapped between them. first, second: their predictions, `[N]`; subjects: as in
    `per_subject`. Returns (UF1 of the first minus the second, p), where p is (1 + b) / (1 + DRAWS)
    and b counts the draws whose difference is at least as large.
    """
    one, two = (per_subject(labels, predictions, subjects, n_label)
                for predictions in (first, second))  # [S, C * C]
    swap = np.random.default_rng(seed).integers(0, 2, (DRAWS, len(one)))
    moved = np.vstack([np.zeros_like(one[:1]), swap @ (two - one)])  # the first: as measured
    uf1 = [scores(flat.reshape(-1, n_label, n_label))[0].mean(-1)
           for flat in (one.sum(0) + moved, two.sum(0) - moved)]
    difference = uf1[0] - uf1[1]
    # equal differences are equal up to rounding
    extreme = (np.abs(difference[1:]) >= abs(difference[0]) - 1e-12).sum()
    return float(difference[0]), float((1 + extreme) / (1 + DRAWS))


def holm(values):
    """p values adjusted for their number (Holm, "A simple sequentially rejective multiple test
    procedure", 1979), in the order given."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def over_seeds(results):
    """{uf1, uar, accuracy: (mean, standard deviation)} of results (dicts with these figures) that
    differ in the seed; the deviation is the sample's, with n - 1."""
    return {name: (float(np.mean(values)), float(np.std(values, ddof=1)))
            for name in MEASURES for values in [[result[name] for result in results]]}


# ---------------------------------------------------------------- result files

def open_results(folder, opt, about, sha256):
    """Enters a run folder of held-out predictions; returns the names already finished.

    about: the log's header with the digests of data and checkpoint; sha256: of each wanted
    subject's checkpoint. An existing folder takes --resume, or --subject, which adds to it; and
    the options and checkpoints that made it. Raises BadInput.
    """
    old = read_log(folder)
    if old:
        if not opt.resume and opt.subject in (None, ["all"]):
            raise BadInput(f"{folder}: exists; go on with --resume auto, give another --tag, or "
                           f"remove it")
        checkpoint.check_resumable(folder, old[0], opt, data_digest=about["data_digest"],
                                   checkpoint_sha256=about["checkpoint_sha256"])
    elif Path(folder).exists() and any(path.suffix != ".part" for path in Path(folder).iterdir()):
        raise BadInput(f"{folder}: exists, but holds no log.jsonl; remove it or give another --tag")
    done = {path.stem: path for path in (Path(folder) / "subjects").glob("*.json")}
    for name in done.keys() & sha256.keys():
        if read_subject(done[name])[0].get("sha256") != sha256[name]:
            raise BadInput(f"{done[name]}: comes from another checkpoint than the one --model_path "
                           f"names now; remove it, or give another --tag")
    return set(done)


def write_subject(folder, name, rows, **about):
    """Keeps one held-out subject's predictions: `<folder>/subjects/<name>.json`.

    rows: dicts with COLUMNS and `probabilities`; about: `transductive`, the `checkpoint` file the
    encoder came from with its `sha256`, `made_by` (command and versions), and `maps` of mistakes
    (key → [RGB, second view], each a list of rows of 0..255, or None).
    """
    path = Path(folder) / "subjects" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**about, "rows": rows})


def add_to_subject(folder, name, **about):
    """Adds to what `write_subject` kept."""
    path = Path(folder) / "subjects" / f"{name}.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | about)


def read_subject(path):
    """(what is known of the encoder, prediction rows) of a kept subject; raises BadInput."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept, [{c: row[c] for c in (*COLUMNS, "probabilities")} for row in kept["rows"]]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: not a subject's predictions; remove it and run again") from None


def most_wrong(labels, probabilities, most=MISTAKES):
    """Positions of the most confidently wrong of predictions `[M, C]`, at most `most`: another
    class than the true one `[M]` with the highest probability, the first of equal ones before.
    Rows of NaN are no predictions."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    held_out = np.flatnonzero(~np.isnan(probabilities).any(1))
    wrong = held_out[probabilities[held_out].argmax(1) != np.asarray(labels)[held_out]]
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:most]


def read_mistakes(folder):
    """The most confidently wrong of all kept subjects: [(row, [map, map]), …], and how many
    (mistakes, clips) there are.

    A map is uint8 `[h, w]`, or None where none was kept. Raises BadInput.
    """
    found = []
    for path in sorted((Path(folder) / "subjects").glob("*.json")):
        about, rows = read_subject(path)
        found += [(row, _maps(path, about, row["key"])) for row in rows]
    found.sort(key=lambda pair: _order(pair[0]))
    labels = np.array([row["label"] for row, _ in found])
    probabilities = np.array([row["probabilities"] for row, _ in found])
    wrong = int((probabilities.argmax(1) != labels).sum())
    return [found[i] for i in most_wrong(labels, probabilities)], (wrong, len(found))


def _maps(path, about, key):
    try:
        maps = (about.get("maps") or {}).get(key) or [None, None]
        maps = [None if m is None else np.array(m, dtype=np.uint8) for m in maps]
        ensure(len(maps) == 2 and all(m is None or m.ndim == 2 for m in maps))
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise BadInput(f"{path}: its 'maps' cannot be read; remove it and run again") from None
    return maps


def _order(row):
    """Rows sort by database, subject, key."""
    return DATABASES.index(row["database"]), row["subject"], row["key"]


def read_subjects(folder):
    """`read_subject` of everyone kept in a run folder, by name."""
    return {path.stem: read_subject(path)
            for path in sorted((Path(folder) / "subjects").glob("*.json"))}


def _write_rows(path, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"p_{i}" for i in range(len(rows[0]["probabilities"])))])
    for row in rows:
        writer.writerow([*(row[c] for c in COLUMNS), *(f"{p:.6f}" for p in row["probabilities"])])
    write_text(path, text.getvalue())


def read_predictions(path, n_label):
    """The rows of a predictions.csv: dict (database, subject, key) → (label, prediction).

    Raises BadInput for a row that is none, a class outside 0..n_label-1, or a clip named twice.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; results are compared by the predictions that were "
                       f"written beside them") from None
    except (UnicodeDecodeError, csv.Error):
        raise BadInput(f"{path}: not a table of predictions; run the script that wrote it "
                       f"again") from None
    if not lines or not set(COLUMNS) <= set(reader.fieldnames):
        raise BadInput(f"{path}: needs the columns {','.join(COLUMNS)} and a row per clip; run "
                       f"the script that wrote it again")
    found = {}
    for number, row in lines:
        clip = row["database"], row["subject"], row["key"]
        try:
            found[clip], known = (int(row["label"]), int(row["prediction"])), len(found)
            ensure(len(found) > known and all(0 <= i < n_label for i in found[clip]))
        except (ValueError, TypeError):
            raise BadInput(f"{path}:{number}: a clip takes one row, with label and prediction in "
                           f"0..{n_label - 1}; run the script that wrote it again") from None
    return found


def write_megc_log(path, rows):
    """The log that MEGC2019 asks for: for each held-out subject a line `<database> <subject>`,
    then a line `<file> <truth> <prediction>` per clip.

    rows: sorted by database and subject. A file goes by its key, so that equal file names of
    several subjects stay apart.
    """
    lines, person = [], None
    for row in rows:
        if person != (row["database"], row["subject"]):
            person = row["database"], row["subject"]
            lines.append("{} {}".format(*person))
        lines.append(f"{row['key']} {row['label']} {row['prediction']}")
    write_text(path, "".join(line + "\n" for line in lines))


def rows_of(clips, members, probabilities):
    """Prediction rows for the clips `members` (indices) from `probabilities` `[len, C]`."""
    chosen = [clips.clips[i] for i in members]
    return [{"database": DATABASES[c.database], "subject": c.subject, "key": c.key,
             "label": c.label, "prediction": int(p.argmax()), "probabilities": p.tolist()}
            for c, p in zip(chosen, np.asarray(probabilities))]


def summarise(rows, n_label, blank_keys=()):
    """Every figure of results.json that follows from the prediction rows.

    blank_keys: (database, subject, key) of the clips whose onset is their apex.
    """
    labels = np.array([row["label"] for row in rows])
    predictions = np.array([row["prediction"] for row in rows])
    people = [(row["database"], row["subject"]) for row in rows]
    found = {"n": len(rows), "n_label": n_label, "n_subjects": len(set(people)),
             **evaluate(labels, predictions, n_label),
             "ci95": intervals(labels, predictions, people, n_label),
             "baselines": baselines(labels, n_label)}
    databases = np.array([database for database, _ in people])
    found["per_database"] = {  # over all C classes, whether the database holds them or not
        name: {"n": int((databases == name).sum()),
               "n_subjects": len({person for person in people if person[0] == name}),
               **evaluate(labels[databases == name], predictions[databases == name], n_label)}
        for name in dict.fromkeys(databases.tolist())}
    seen = np.array([(r["database"], r["subject"], r["key"]) not in blank_keys for r in rows])
    found["without_blank_clips"] = ({"n": int(seen.sum()),
                                     **evaluate(labels[seen], predictions[seen], n_label)}
                                    if seen.any() else {"n": 0})
    return found


def _histories(kept):
    """[(labels `[n]`, predictions per epoch `[n, E]`) of each kept subject]; empty unless all have
    the same number of epochs."""
    found = [(np.array([row["label"] for row in rows]), np.array(about.get("history") or [[]]))
             for about, rows in kept]
    lengths = {history.shape[-1] for _, history in found}
    return found if len(lengths) == 1 and 0 not in lengths else []


def oracle_best_epoch(kept, n_label):
    """What picking the epoch on the held-out subjects would give, which is no result.

    kept: what `read_subject` returns, by name. `per_subject`: each subject at the epoch with most
    correct clips, `common`: all at the epoch of the highest pooled UF1; the earliest on ties.
    None where not every subject was followed over the same epochs.
    """
    found = _histories(kept.values())
    if not found:
        return None
    labels = np.concatenate([own for own, _ in found])
    best = [int((history == own[:, None]).sum(0).argmax()) for own, history in found]
    picked = np.concatenate([history[:, e] for (_, history), e in zip(found, best)])
    each = _per_epoch(found, n_label)
    common = int(np.argmax([figures["uf1"] for figures in each]))

    def figures(of):
        return {name: of[name] for name in MEASURES}
    return {"per_subject": {**figures(evaluate(labels, picked, n_label)),
                            "epochs": {name: e + 1 for name, e in zip(kept, best)}},
            "common": {**figures(each[common]), "epoch": common + 1}}


def _per_epoch(found, n_label):
    labels = np.concatenate([own for own, _ in found])
    said = np.concatenate([history for _, history in found])
    return [evaluate(labels, predictions, n_label) for predictions in said.T]


def epochs_of(folder, n_label):
    """`evaluate` of the pooled held-out predictions after each epoch."""
    return _per_epoch(_histories(read_subjects(folder).values()), n_label)


def write_results(folder, about, n_label, classes, blank_keys=()):
    """Merges the finished subjects into results.json, predictions.csv and confusion.png, and for
    several databases megc2019.log.

    about: what results.json says besides the figures (options, versions, digests, protocol).
    Returns the content of results.json.
    """
    folder = Path(folder)
    named = read_subjects(folder)
    kept = list(named.values())
    rows = [row for _, rows in kept for row in rows]
    rows.sort(key=_order)
    known = {subject["transductive"] for subject, _ in kept}
    made_by = []  # subjects may come of several calls, on several machines
    for subject, _ in kept:
        if subject.get("made_by") and subject["made_by"] not in made_by:
            made_by.append(subject["made_by"])
    results = {**about, "transductive": True if True in known else None if None in known else False,
               "made_by": made_by,
               "checkpoints": dict(sorted({(str(s["checkpoint"]), s["sha256"]) for s, _ in kept})),
               **summarise(rows, n_label, blank_keys), "classes": classes}
    choices = {name: subject["choice"] for name, (subject, _) in named.items()
               if "choice" in subject}
    oracle = oracle_best_epoch(named, n_label)
    results |= {name: value for name, value in (("choices", choices), ("oracle_best_epoch", oracle))
                if value}
    _write_rows(folder / "predictions.csv", rows)
    if len(results["per_database"]) > 1:
        write_megc_log(folder / "megc2019.log", rows)
    pictures.draw_confusion(folder / "confusion.png", np.array(results["confusion"]), classes,
                            "rendered stand-in data" if about.get("rendered") else "")
    write_json(folder / "results.json", results)
    if len(list((folder / "subjects").glob("*.json"))) > len(named):
        # another job finished one meanwhile, and may have written its results before these
        return write_results(folder, about, n_label, classes, blank_keys)
    return results


def describe(results):
    """A few lines for the terminal: figures, intervals, baselines."""
    ci = results["ci95"]
    lines = ["rendered stand-in data, not CAS(ME)^3:"] if results.get("rendered") else []
    for name, title in (("uf1", "UF1"), ("uar", "UAR"), ("accuracy", "accuracy")):
        base = ", ".join(f"{k.replace('_', ' ')} {v[name]:.3f}"
                         for k, v in results["baselines"].items())
        lines.append(f"{title:8s} {results[name]:.3f}  [{ci[name][0]:.3f}, {ci[name][1]:.3f}]  "
                     f"({base})")
    if len(results["per_database"]) > 1:
        lines += [f"{name:8s} UF1 {found['uf1']:.3f}, UAR {found['uar']:.3f}  ({found['n']} clips, "
                  f"{found['n_subjects']} subjects)"
                  for name, found in results["per_database"].items()]
    known = {True: "yes: the encoder saw held-out subjects, without labels", False: "no",
             None: "unknown: the checkpoint does not say whom it saw"}
    lines.append(f"{results['n']} clips of {results['n_subjects']} held-out subjects, "
                 f"{results['n_label']} classes; transductive: {known[results['transductive']]}")
    blank = results["n"] - results["without_blank_clips"]["n"]
    if blank and results["n"] > blank:
        lines.append(f"without the {blank} blank clips: "
                     f"UF1 {results['without_blank_clips']['uf1']:.3f}, "
                     f"UAR {results['without_blank_clips']['uar']:.3f}")
    chosen = list(results.get("choices", {}).values())
    for name, title in (("epochs", "epochs"), ("learning_rate", "learning rate"),
                        ("l2", "penalty (--l2)")):
        values = [choice[name] for choice in chosen if name in choice and "inner_uf1" in choice]
        if values:
            lines.append(f"chosen by inner folds: {title} {min(values):g} to {max(values):g}")
    if "oracle_best_epoch" in results:
        oracle = results["oracle_best_epoch"]
        lines.append(f"oracle_best_epoch (picked on the held-out subjects, no result): UF1 "
                     f"{oracle['per_subject']['uf1']:.3f} each subject at its best epoch, "
                     f"{oracle['common']['uf1']:.3f} all at epoch {oracle['common']['epoch']}")
    return "\n".join(lines)
