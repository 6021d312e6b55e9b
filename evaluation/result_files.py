"""The files of a run of held-out predictions: kept persons, predictions.csv, results.json."""
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from evaluation import measures
from evaluation.measures import MEASURES
from images.lists import DATABASES
from util import BadInput, read_table, write_json, write_table, write_text

COLUMNS = ("database", "subject", "key", "label", "prediction")


# ---------------------------------------------------------------- persons, as they are finished

def write_subjects(folder: Path, subjects: dict[str, dict]) -> None:
    """Keeps held-out subjects' predictions, one after another: `<folder>/subjects/<name>.json`.

    subjects: name → `rows` (dicts with COLUMNS and `probabilities`), `transductive`, the
    `checkpoint` file the encoder came from with its `sha256`, `made_by` (command and versions).
    """
    place = Path(folder) / "subjects"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in subjects.items():
        write_json(place / f"{name}.json", content)


def read_subject(path: Path) -> tuple[dict, list[dict]]:
    """(everything kept of a subject, its prediction rows); raises BadInput."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept, [{c: row[c] for c in (*COLUMNS, "probabilities")} for row in kept["rows"]]
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: not a subject's predictions; remove it and run again") from None


def read_subjects(folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """`read_subject` of everyone kept in a run folder, by name."""
    return {path.stem: read_subject(path)
            for path in sorted((Path(folder) / "subjects").glob("*.json"))}


def read_mistakes(folder: Path) -> tuple[list[tuple[dict, list]], tuple[int, int]]:
    """The most confidently wrong of all kept subjects: [(row, [a map per view]), …], and how many
    (mistakes, clips) there are.

    A map is uint8 `[h, w]`, or None where none was kept. Raises BadInput.
    """
    clips = []
    for name, (kept, rows) in read_subjects(folder).items():
        path = Path(folder) / "subjects" / f"{name}.json"
        clips += [(row, _maps(path, kept, row["key"])) for row in rows]
    clips.sort(key=lambda pair: _order(pair[0]))
    labels = np.array([row["label"] for row, _ in clips])
    probabilities = np.array([row["probabilities"] for row, _ in clips])
    wrong = int((probabilities.argmax(1) != labels).sum())
    return [clips[i] for i in measures.most_wrong(labels, probabilities)], (wrong, len(clips))


def _maps(path, kept, key):
    try:
        maps = (kept.get("maps") or {}).get(key) or [None, None]
        maps = [None if m is None else np.array(m, dtype=np.uint8) for m in maps]
        if any(m is not None and m.ndim != 2 for m in maps):
            raise ValueError
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise BadInput(f"{path}: its 'maps' cannot be read; remove it and run again") from None
    return maps


# ---------------------------------------------------------------- rows

def _order(row):
    """Rows sort by database, subject, key."""
    name = row["database"]
    return (DATABASES.index(name) if name in DATABASES else len(DATABASES), name, row["subject"],
            row["key"])


def rows_of(clips: Iterable, probabilities: np.ndarray) -> list[dict]:
    """Prediction rows of dataset.Clip objects with these probabilities `[len, C]`."""
    return [{"database": DATABASES[c.database], "subject": c.subject, "key": c.key,
             "label": c.label, "prediction": int(p.argmax()), "probabilities": p.tolist()}
            for c, p in zip(clips, np.asarray(probabilities))]


def write_predictions(path: Path, rows: list[dict]) -> None:
    """predictions.csv."""
    classes = range(len(rows[0]["probabilities"]))
    write_table(path, (*COLUMNS, *(f"p_{i}" for i in classes)), (
        [*(row[c] for c in COLUMNS), *(f"{p:.6f}" for p in row["probabilities"])] for row in rows))


def read_predictions(path: Path, n_label: int) -> dict[tuple, tuple[int, int]]:
    """The rows of a predictions.csv: dict (database, subject, key) → (label, prediction).

    Raises BadInput for a row that is none, a class outside 0..n_label-1, or a clip named twice.
    """
    again = "run the script that wrote it again"
    rows, _ = read_table(path, COLUMNS, fix=f"results are compared by the predictions beside "
                                            f"them; {again}")
    if not rows:
        raise BadInput(f"{path}: needs a row per clip; {again}")
    predictions = {}
    for place, row in rows:
        clip = row["database"], row["subject"], row["key"]
        try:
            cells = int(row["label"]), int(row["prediction"])
            if clip in predictions or not all(0 <= i < n_label for i in cells):
                raise ValueError
            predictions[clip] = cells
        except ValueError:
            raise BadInput(f"{place}: a clip takes one row, with label and prediction in "
                           f"0..{n_label - 1}; {again}") from None
    return predictions


def write_megc_log(path: Path, rows: list[dict]) -> None:
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


# ---------------------------------------------------------------- results

def histories_of(subjects: Iterable[tuple[dict, list[dict]]]) -> list[tuple]:
    """[(labels `[n]`, predictions per epoch `[n, E]`) of each kept subject]; empty unless all were
    followed over the same number of epochs."""
    histories = [(np.array([row["label"] for row in rows]), np.array(kept.get("history") or [[]]))
                 for kept, rows in subjects]
    lengths = {history.shape[-1] for _, history in histories}
    return histories if len(lengths) == 1 and 0 not in lengths else []


def write_results(folder: Path, header: dict, n_label: int, classes: list[str],
                  blank_keys: Collection[tuple] = ()) -> dict:
    """Merges the finished subjects into results.json, predictions.csv and, for several databases,
    megc2019.log.

    header: what results.json says besides the figures (options, versions, digests, protocol).
    Returns the content of results.json.
    """
    folder = Path(folder)
    named = read_subjects(folder)
    rows = sorted((row for _, rows in named.values() for row in rows), key=_order)
    kept = [subject for subject, _ in named.values()]
    made_by = []  # subjects may come of several calls, on several machines
    for subject in kept:
        if subject.get("made_by") and subject["made_by"] not in made_by:
            made_by.append(subject["made_by"])
    results = {**header, "transductive": whether_transductive(s["transductive"] for s in kept),
               "made_by": made_by,
               **({"start_labelled": True} if any(s.get("start_labelled") for s in kept) else {}),
               "checkpoints": dict(sorted({(str(s["checkpoint"]), s["sha256"]) for s in kept})),
               **measures.summarise(rows, n_label, blank_keys), "classes": classes}
    choices = {name: subject["choice"] for name, (subject, _) in named.items()
               if "choice" in subject}
    if choices:
        results["choices"] = choices
    histories = histories_of(named.values())
    if histories:
        oracle = measures.oracle_best_epoch(histories, n_label)
        oracle["per_subject"]["epochs"] = dict(zip(named, oracle["per_subject"]["epochs"]))
        results["oracle_best_epoch"] = oracle
    write_predictions(folder / "predictions.csv", rows)
    if len(results["per_database"]) > 1:
        write_megc_log(folder / "megc2019.log", rows)
    write_json(folder / "results.json", results)
    if len(list((folder / "subjects").glob("*.json"))) > len(named):
        # another job finished one meanwhile, and may have written its results before these
        return write_results(folder, header, n_label, classes, blank_keys)
    return results


def whether_transductive(values: Iterable[bool | None]) -> bool | None:
    """Of several encoders: whether one saw held-out subjects, None where one may have."""
    values = set(values)
    return True if True in values else None if None in values else False


def describe(results: dict) -> str:
    """A few lines for the terminal: figures, intervals, baselines."""
    ci = results["ci95"]
    lines = ["rendered stand-in data, no faces of people:"] if results.get("rendered") else []
    for name, title in zip(MEASURES, ("UF1", "UAR", "accuracy")):
        base = ", ".join(f"{k.replace('_', ' ')} {v[name]:.3f}"
                         for k, v in results["baselines"].items())
        lines.append(f"{title:8s} {results[name]:.3f}  {measures.bracketed(ci[name])}  ({base})")
    if len(results["per_database"]) > 1:
        lines += [f"{name:8s} UF1 {part['uf1']:.3f}, UAR {part['uar']:.3f}  ({part['n']} clips, "
                  f"{part['n_subjects']} subjects)"
                  for name, part in results["per_database"].items()]
    saw = "--pretrained was trained on held-out subjects" if results.get("pretrained_sha256") \
        else "images of the test split lie among the training images" \
        if "test" in results.get("in_training", ()) \
        else "the network that it started from was trained on images of the test split" \
        if results.get("noun") == "images" \
        else "the encoder saw held-out subjects, with" \
             + "out" * (not results.get("start_labelled")) + " labels"
    answers = {True: f"yes: {saw}", False: "no",
               None: "unknown: the checkpoint does not say whom it saw"}
    people = f"of {results['n_subjects']} held-out subjects" \
        if results.get("resampled") != "images" else "without subjects: intervals resample images"
    noun = results.get("noun", "clips")
    lines.append(f"{results['n']} {noun} {people}, {results['n_label']} classes; transductive: "
                 f"{answers[results['transductive']]}")
    if measures.too_few(results["n_subjects"]):
        lines.append(f"fewer than {measures.FEW} subjects: intervals over them are too narrow")
    if results.get("part"):
        lines.append(results["part"])
    rest = results["without_blank_clips"]
    if 0 < rest["n"] < results["n"]:
        lines.append(f"without the {results['n'] - rest['n']} blank clips: UF1 {rest['uf1']:.3f}, "
                     f"UAR {rest['uar']:.3f}")
    return "\n".join([*lines, *_describe_choices(results)])


def _describe_choices(results):
    """Lines on what was chosen: by inner folds, and what the held-out subjects would have."""
    lines, choices = [], results.get("choices", {}).values()
    for name, title in (("epochs", "epochs"), ("learning_rate", "learning rate"),
                        ("l2", "penalty (--l2)")):
        values = [choice[name] for choice in choices if name in choice and "inner_uf1" in choice]
        if values:
            lines.append(f"chosen by inner folds: {title} {min(values):g} to {max(values):g}")
    if "oracle_best_epoch" in results:
        oracle = results["oracle_best_epoch"]
        each = f"{oracle['per_subject']['uf1']:.3f} each subject at its best epoch, " \
            if len(oracle["per_subject"]["epochs"]) > 1 else ""
        noun = results.get("noun", "subjects")
        lines.append(f"oracle_best_epoch (picked on the held-out {noun}, no result): UF1 "
                     f"{each}{oracle['common']['uf1']:.3f} all at epoch "
                     f"{oracle['common']['epoch']}")
    return lines
