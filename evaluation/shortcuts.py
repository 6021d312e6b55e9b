"""What else the features tell: who it is, which clip it is, how the head moved.

A head that reads the class off the subject's identity or off head motion scores without seeing an
expression; these figures say how easy that would be. Geirhos et al., "Shortcut learning in deep
neural networks", Nature Machine Intelligence 2020.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
from dataset import DATABASES, ClipSet
from evaluation import descent, fold_heads, logistic, probing
from evaluation.fold_heads import Task

CLIP_FOLDS = 5
# times what tells penalties apart: an error of logits that an accuracy over many subjects does not
# feel; a tenth of it takes two to four times as long
SUBJECT_ROUGH = 100


def measure(opt: argparse.Namespace, clips: ClipSet, frozen: probing.Frozen) -> dict:
    """{subject, retrieval} of a probing.Frozen: `subject_probe` and `retrieval`."""
    return {"subject": subject_probe(opt, clips, frozen),
            "retrieval": retrieval(clips, *frozen.encoded.embedded)}


def subject_probe(opt: argparse.Namespace, clips: ClipSet, frozen: probing.Frozen) -> dict | None:
    """How well linear heads on the features of a probing.Frozen name the subject of clips they
    did not see; trained as its heads were, or solved with --l2, in place of which there is one
    penalty where inner folds chose: it must not depend on whom a call holds out.

    Five folds of clips, dealt out in turn within each subject; subjects with one clip, which no
    training could name, stay out. Returns {n, n_subjects, accuracy, chance}, chance being that of
    always naming the subject with most clips; None below two subjects.
    """
    of = [members for members in clips.by_person.values() if len(members) > 1]
    if len(of) < 2:
        return None
    members, counts = np.concatenate(of), [len(m) for m in of]
    order = np.argsort(members)
    labels = np.repeat(np.arange(len(of)), counts)[order]
    fold_of = np.concatenate([np.arange(n) % CLIP_FOLDS for n in counts])[order]
    members = members[order]
    everybody = len(members) == len(clips)
    features = frozen.encoded.features
    task = Task(features if everybody else features[:, members], labels, len(of), fold_of,
                sorted(set(fold_of.tolist())))
    if frozen.l2:
        l2 = fold_heads.FEW if opt.l2 is None else opt.l2
        same = frozen.regression.relabelled(labels, len(of)) if everybody else None
        heads, _ = fold_heads.solve(task, l2, tolerance=SUBJECT_ROUGH * logistic.rough(l2),
                                    regression=same)
    else:
        print("telling subjects apart by the same features:")
        names = [f"clips{f + 1}of{len(task.held_out)}" for f in task.held_out]
        trained = descent.start(opt, task, frozen.encoded.positions, names)
        trained.run()
        heads = trained.heads
    said = fold_heads.predict(heads, task).argmax(1)
    return {"n": len(members), "n_subjects": len(of),
            "accuracy": float((said == labels).mean()), "chance": max(counts) / len(members)}


def retrieval(clips: ClipSet, rgb: Tensor, depth: Tensor) -> dict:
    """How often the nearest second view of an RGB feature `[N, d]` is that of its own clip: among
    all clips, and among those of its subject. {all, within}: {n, top1, chance}.

    Within subjects, those with one clip stay out; chance is 1 over the number of candidates.
    """
    scores = rgb @ depth.t()  # [N, N]
    people = dataset.subject_folds(clips).of
    same = torch.from_numpy(people[:, None] == people)
    own = torch.arange(len(scores))
    candidates = same.sum(1)
    several = candidates > 1
    within = scores.masked_fill(~same, -torch.inf).argmax(1) == own
    measured = {"all": {"n": len(own), "top1": (scores.argmax(1) == own).float().mean().item(),
                        "chance": 1 / len(own)}}
    if several.any():
        measured["within"] = {"n": int(several.sum()),
                              "top1": within[several].float().mean().item(),
                              "chance": (1 / candidates[several]).mean().item()}
    return measured


def head_motion(clips: ClipSet, rows: list[dict], folder: Path) -> dict | None:
    """Spearman's rank correlation of the head motion that the preparation recorded, in pixels, with
    correct predictions and with the probability of each class.

    rows: prediction rows; folder: of the data, whose manifest.json names each clip's `shift`
    (taken off by registration) and `residual`. Returns {shift, residual: {n, correct, p_0, …}}, a
    correlation being None where one side is constant; None where nothing is recorded.
    """
    try:
        recorded = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))["clips"]
        motion = {name: clip for clip in recorded for name in clip["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    paths = {(c.database, c.subject, c.key): c.paths[0] for c in clips.clips}
    moved = []
    for row in rows:
        path = paths.get((DATABASES.index(row["database"]), row["subject"], row["key"]))
        if path in motion:
            moved.append((motion[path], row))
    return {kind: _correlations(moved, kind) for kind in ("shift", "residual")} if moved else None


def _correlations(moved, kind):
    from scipy.stats import spearmanr  # a third of a second, where motion is recorded
    pairs = [(clip[kind], row) for clip, row in moved if clip[kind] is not None]
    pixels, rows = [value for value, _ in pairs], [row for _, row in pairs]
    series = {"correct": [row["prediction"] == row["label"] for row in rows]}
    for i in range(len(rows[0]["probabilities"]) if rows else 0):
        series[f"p_{i}"] = [row["probabilities"][i] for row in rows]
    return {"n": len(pairs), **{
        name: float(spearmanr(pixels, values).statistic)
        if len(set(values)) > 1 and len(set(pixels)) > 1 else None
        for name, values in series.items()}}


def describe(measured: dict, classes: list[str]) -> list[str]:
    """Lines for the terminal, on the keys `subject`, `retrieval` and `head_motion`, if any."""
    lines, subject = [], measured.get("subject")
    if subject:
        lines.append(f"the same features name the subject of {subject['n']} clips: accuracy "
                     f"{subject['accuracy']:.3f}, chance {subject['chance']:.3f}")
    for among, of in measured.get("retrieval", {}).items():
        where = {"all": "all clips", "within": "the subject's clips"}[among]
        lines.append(f"the other view of a clip is found among {where}: {of['top1']:.3f}, chance "
                     f"{of['chance']:.3f}")
    for kind, of in (measured.get("head_motion") or {}).items():
        if not of["n"]:  # it could be followed in none of these clips
            continue
        figures = [("correct", of["correct"])] + [(name, of[f"p_{i}"])
                                                  for i, name in enumerate(classes)]
        lines.append(f"head motion ({kind}, {of['n']} clips), rank correlation: " + ", ".join(
            f"{name} {value:+.2f}" for name, value in figures if value is not None))
    return lines
