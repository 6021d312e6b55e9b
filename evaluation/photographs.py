"""Face images: what is held out to choose by, and the results on a test split, read once."""
import argparse
import json
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from evaluation import gradcam, measures, pictures, result_files
from images import cache
from images import faces as sets
from images.face_folders import SPLIT_NAMES
from images.faces import FaceSet
from training import distributed, faces
from training.record import Run
from util import BadInput, write_table

ACROSS = 12  # images in a row of importance.png
NOTHING = np.zeros(0, np.int64)


# ---------------------------------------------------------------- what is held out

def hold_out(images: FaceSet, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held out): int64 indices of about `fraction` of the images, stratified by class, whole
    subjects where the set names them. Raises BadInput where it names one alone."""
    everyone = np.arange(len(images))
    if not fraction:
        return everyone, everyone[:0]
    subjects = np.array(images.subjects)
    if (subjects != "").any():
        # no more parts than people, or than a class can be dealt to
        most = min(max(20, round(1 / fraction)), len(set(images.subjects)),
                   int(np.bincount(images.labels).max()))
        if most < 2:
            raise BadInput(f"{images.folder}: one subject, who would be trained on and held out; "
                           f"give another set, or one with a test split and --val_fraction 0")
        # so many of the fewest parts as come closest
        parts = min(range(2, most + 1), key=lambda n: (
            round(abs(max(1, min(n - 1, round(fraction * n))) / n - fraction), 9), n))
        taken = max(1, min(parts - 1, round(fraction * parts)))
        from sklearn.model_selection import StratifiedGroupKFold  # a second or two
        folds = StratifiedGroupKFold(parts, shuffle=True, random_state=seed % 2 ** 32)
        with warnings.catch_warnings():  # of classes rarer than parts, which are dealt as they can
            warnings.simplefilter("ignore", UserWarning)
            each = [out for _, out in folds.split(everyone, images.labels, subjects)]
        return _without_losing_a_class(images, each, taken)
    rng = np.random.default_rng(seed)
    out = np.concatenate([  # one at least is left to learn a class from
        rng.permutation(own)[:min(round(fraction * len(own)), max(len(own) - 1, 0))] for own in (
            np.flatnonzero(images.labels == label) for label in range(images.n_label))])
    return np.setdiff1d(everyone, out), np.sort(out)


def _without_losing_a_class(images, parts, taken):
    """(rest, held out), `taken` of the parts: the first so many after which a class of which there
    are images has one left to learn from, or the first of all, which is said."""
    tried = []
    for first in range(len(parts)):
        out = np.sort(np.concatenate((parts * 2)[first:first + taken]))
        rest = np.setdiff1d(np.arange(len(images)), out)
        gone = np.setdiff1d(images.labels, images.labels[rest])
        if not len(gone):
            return rest, out
        tried.append((gone, rest, out))
    gone, rest, out = tried[0]
    names = ", ".join(images.classes[label] for label in gone)
    if len(np.unique(images.labels[rest])) < 2:
        raise BadInput(f"{images.folder}: without the subjects that are held out, no image of "
                       f"{names} is left to learn from; give --val_fraction 0 and a test split, or "
                       f"images of more people")
    print(f"{images.folder}: all images of {names} are of subjects that are held out: none is left "
          f"to learn from")
    return rest, out


def cut_as(images: FaceSet) -> dict | None:
    """How detect_faces.py cut the images of a set, {margin, align, size}; None where it did not."""
    for folder in (images.folder, *images.folder.resolve().parents[:2]):
        try:
            settings = json.loads((folder / "faces.json").read_text(encoding="utf-8"))["settings"]
            return {"margin": float(settings["margin"]), "align": bool(settings["align"]),
                    "size": int(settings["size"])}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def test_of(images: FaceSet) -> tuple[FaceSet, FaceSet]:
    """(training, test) of a set without splits: a fifth of it, whoever asks."""
    rest, out = hold_out(images, 0.2, 0)
    if not len(out):
        raise BadInput(f"{images.folder}: no test split, and too few images of each class to hold "
                       f"one out; add images, or a folder test/")
    print(f"{images.folder}: no test split; {len(out)} of {len(images)} images are held out as one")
    return images.subset(rest), images.subset(out)


def check_apart(opt: argparse.Namespace, folder: Path, paths: Iterable[str]) -> None:
    """Raises BadInput where a run would write its pictures among the images that are read, `paths`
    below a folder of splits, of classes, or of anything."""
    place = Path(opt.save_path).resolve()
    if not place.is_relative_to(folder.resolve()):
        return
    inside = place.relative_to(folder.resolve()).parts
    tops = {path.partition("/")[0] for path in paths}
    of_splits = all(top.lower() in SPLIT_NAMES for top in tops)
    if any(part.startswith(".") for part in inside) or (of_splits and inside[:1] not in {
            (top,) for top in tops}):
        return  # what is hidden, or beside the splits, is not read
    raise BadInput(f"{opt.save_path}: lies in {folder}, whose images are read, and pictures of "
                   f"this run would be among them; name a folder elsewhere")


def read_splits(opt: argparse.Namespace) -> dict[str, FaceSet]:
    """The splits of --dataset below its folder: train, test, and val where it has one of its own;
    raises BadInput."""
    splits = sets.read_faces(opt.dataset, opt.data_folder, opt.votes)
    if opt.dataset == "folder":
        check_apart(opt, splits["train"].folder, (
            path for images in splits.values() for path in images.paths))
    if "test" not in splits:
        splits["train"], splits["test"] = test_of(splits["train"])
    return splits


def stored(images: FaceSet, side: int, opt: argparse.Namespace,
           how: Image.Resampling = Image.Resampling.BILINEAR) -> cache.OnDemand:
    """The images of a set, uint8 `[N, 3, side, side]`, decoded when they are first asked for."""
    with distributed.in_turn():
        return cache.OnDemand(len(images), lambda i: sets.decode(images, i, side, how),
                              (3, side, side), np.uint8, sets.stamp(images, side, how), opt.cache,
                              opt.num_workers)


class SeenImages(NamedTuple):
    """Fingerprints (images.faces) of the images that a network, and those it was started from, were
    trained on: `any`, None where nobody knows all of them, and `labelled`, those whose labels it
    was fitted to."""
    any: np.ndarray | None
    labelled: np.ndarray

    @classmethod
    def of(cls, state: object) -> "SeenImages":
        """What a checkpoint says, whoever wrote it."""
        said = state.get("seen_images") if isinstance(state, dict) else None
        if not isinstance(said, dict):  # of others, or of an earlier release
            said = {}
        known = {name: said[name].numpy() for name in cls._fields
                 if torch.is_tensor(said.get(name))}
        return cls(known.get("any"), known.get("labelled", NOTHING))

    def joined(self, prints: np.ndarray) -> "SeenImages":
        """With those of images that a run trains on, labels and all."""
        return SeenImages(None if self.any is None else np.union1d(self.any, prints),
                          np.union1d(self.labelled, prints))

    def content(self) -> dict:
        """What a checkpoint keeps."""
        return {name: None if prints is None else torch.from_numpy(prints)
                for name, prints in self._asdict().items()}


# ---------------------------------------------------------------- results

def relabelling(given: np.ndarray, job: faces.Job) -> dict:
    """What became of the labels `given` to the training images, int64 `[N]`: how many moved, and of
    those that --noise had planted how many were found and how many got their own class back."""
    true, now, given = (labels[job.members] for labels in (job.source.faces.labels, job.labels,
                                                           given))
    planted, moved = given != true, now != given
    said = {"relabelled": int(moved.sum())}
    if planted.any():
        said |= {"planted": int(planted.sum()), "found": int((moved & planted).sum()),
                 "restored": int((planted & (now == true)).sum()),
                 "wrong_before": float(planted.mean()), "wrong_after": float((now != true).mean())}
    return said


def describe(results: dict) -> str:
    """A few lines for the terminal: figures, what was left out, relabelled, chosen."""
    lines = [result_files.describe(results)]
    for split, paths in results["left_out"].items():
        if paths:
            lines.append(f"{len(paths)} images of the {split} split could not be read: "
                         f"{', '.join(paths[:3])}")
    if "choices" in results:
        choice = results["choices"]["test"]
        lines.append(f"chosen by validation images: epoch {choice['epochs']}, UF1 "
                     f"{choice['val_uf1']:.3f} there")
    if "average" in results:
        lines.append("the average of the weights: " + ", ".join(
            f"{name} {value:.3f}" for name, value in results["average"].items()))
    said = results.get("relabelling")
    if said:
        lines.append(f"{said['relabelled']} training images carry another label than at first")
    if said and "planted" in said:
        lines.append(f"of {said['planted']} planted errors {said['found']} were found "
                     f"({said['found'] / said['planted']:.1%}), {said['restored']} got their own "
                     f"class back; wrong labels {said['wrong_before']:.1%} before, "
                     f"{said['wrong_after']:.1%} after")
    if "view_importance" in results:
        lines.append("importance of the views, the whole image last: " + " ".join(
            f"{x:.3f}" for x in results["view_importance"]))
    return "\n".join(lines)


def write_relabelled(path: Path, images: FaceSet, rows: list[tuple]) -> None:
    """relabelled.csv: every image that got another label, in the order it happened."""
    write_table(path, ("path", "from", "to", "probability", "epoch"), (
        (images.paths[i], images.classes[old], images.classes[new], f"{p:.6f}", epoch)
        for i, old, new, p, epoch in rows))


def rows_of(images: FaceSet, kept: np.ndarray, probabilities: np.ndarray) -> list[dict]:
    """Prediction rows of the images `kept`, `[M]`, with these probabilities `[M, C]`."""
    return [{"database": images.name, "subject": images.subjects[i], "key": images.paths[i],
             "label": int(images.labels[i]), "prediction": int(p.argmax()),
             "probabilities": p.tolist()} for i, p in zip(kept, probabilities)]


def looked_at(network: nn.Module, source: faces.Source, rows: np.ndarray,
              classes: np.ndarray) -> torch.Tensor:
    """Grad-CAM `[B, h, w]` of one class of each of the images `rows`."""
    device = next(network.parameters()).device
    batch = torch.from_numpy(np.asarray(source.images[rows])).to(device)
    return gradcam.class_maps(network, source.plain_inputs(rows, batch),
                              torch.from_numpy(classes).to(device))


def write_results(run: Run, header: dict, source: faces.Source, network: nn.Module,
                  predicted: faces.Predicted, history: list, details: dict) -> dict:
    """results.json, predictions.csv, confusion.png, curves.png and mistakes.png of a test split;
    returns the results.

    history: predictions of all test images after each epoch, where --oracle_curve follows them;
    details: what results.json says besides.
    """
    images, folder = source.faces, run.folder
    kept, probabilities, *_ = predicted
    worst = measures.most_wrong(images.labels[kept], probabilities)
    maps = {}
    if len(worst):
        shown = looked_at(network, source, kept[worst], probabilities[worst].argmax(1))
        maps = {images.paths[i]: [one] for i, one in zip(kept[worst], gradcam.levels(shown))}
    told = {name: header[name] for name in ("command", "versions")}
    result_files.write_subjects(folder, {"test": {
        "transductive": details.pop("transductive"), "checkpoint": details.pop("checkpoint", None),
        "sha256": details.pop("sha256", None), "made_by": told, "maps": maps,
        "rows": rows_of(images, kept, probabilities),
        **({"history": np.array(history)[:, kept].T.tolist()} if history else {}),
        **({"choice": details.pop("choice")} if "choice" in details else {})}})
    results = result_files.write_results(
        folder, {**header, **details, "noun": "images", "rendered": images.rendered,
                 "protocol": "test split"}, images.n_label, list(images.classes))
    pictures.draw_results(run, results)
    mistakes, counts = result_files.read_mistakes(folder)
    place = {path: i for i, path in enumerate(images.paths)}
    panels = []
    if mistakes:
        wrong = source.seen(torch.from_numpy(np.stack([source.images[place[row["key"]]]
                                                       for row, _ in mistakes])))
        panels = pictures.face_panels(wrong.numpy(), [maps for _, maps in mistakes])
    pictures.draw_mistakes(folder / "mistakes.png",
                           [(row, own) for (row, _), own in zip(mistakes, panels)], counts,
                           list(images.classes), images.rendered, noun="images")
    return results


def draw_importance(path: Path, source: faces.Source, kept: np.ndarray, labels: np.ndarray,
                    importance: np.ndarray) -> None:
    """importance.png: images `kept` `[M]` with their labels `[N]` as they were given, from the
    lowest importance `[M]` of SCN to the highest."""
    order, n = importance.argsort(), len(importance)
    across = min(ACROSS, n)
    rows = []
    for caption, places in (
            ("lowest", np.arange(across)), ("spread over all, in order",
                                            np.linspace(0, n - 1, across).round().astype(int)),
            ("highest", np.arange(n - across, n))):
        chosen = order[places]
        rows.append((caption, np.stack([source.images[int(i)] for i in kept[chosen]]),
                     [f"{importance[k]:.3f}\n{source.faces.classes[labels[kept[k]]]}"
                      for k in chosen]))
    pictures.draw_rows(path, rows, f"importance of {n} training images, with the label given"
                             + "; rendered stand-in data" * source.faces.rendered)


def draw_features(path: Path, images: FaceSet, predicted: faces.Predicted) -> None:
    """features.png: what the last layer saw of the predicted images, on their two principal
    components, by emotion and, where the set names them, by subject."""
    from sklearn.decomposition import PCA  # a second or two, which a wrong path should not take
    kept, features = predicted.kept, predicted.features.astype(np.float64)
    plane = PCA(min(2, *features.shape), random_state=0)
    points = plane.fit_transform(features)
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    groups = {"emotion": [images.classes[images.labels[i]] for i in kept]}
    if any(images.subjects):
        groups["subject"] = [images.subjects[i] for i in kept]
    pictures.draw_plane(path, points, groups, plane.explained_variance_ratio_, f"{len(kept)} test "
                        f"images" + "; rendered stand-in data" * images.rendered)


def noisy_labels(labels: np.ndarray, share: float, n_label: int, seed: int) -> np.ndarray:
    """Labels `[N]` of which a share, rounded, is moved to another class, drawn uniformly."""
    rng, noisy = np.random.default_rng([seed, 1]), labels.copy()
    moved = rng.permutation(len(labels))[:math.floor(share * len(labels) + 0.5)]
    noisy[moved] = (labels[moved] + rng.integers(1, n_label, len(moved))) % n_label
    return noisy
