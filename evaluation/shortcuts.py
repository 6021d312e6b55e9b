"""What else the features tell: who it is, which clip it is, how the head moved.

A head that reads the class off the subject's identity or off head motion scores without seeing an
expression; these figures say how easy that would be. Geirhos et al., "Shortcut learning in deep
neural networks", Nature Machine Intelligence 2020.
"""
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from dataset import DATABASES
from evaluation import logistic, probing

CLIP_FOLDS = 5


def measure(opt, clips, found):
    """{subject, retrieval} of an heldout.Frozen: `subject_probe` and `retrieval`."""
    return {"subject": subject_probe(opt, clips, found),
            "retrieval": retrieval(clips, *found.embedded)}


def subject_probe(opt, clips, frozen):
    """How well linear heads on the features of an heldout.Frozen name the subject of clips they
    did not see; solved with the median of its penalties, or trained as its heads were.

    Five folds of clips, dealt out in turn within each subject; subjects with one clip, which no
    training could name, stay out. Returns {n, n_subjects, accuracy, chance}, chance being that of
    always naming the subject with most clips; None below two subjects.
    """
    people = [p for p in clips.people if len(clips.members([p])) > 1]
    if len(people) < 2:
        return None
    members = np.concatenate([clips.members([p]) for p in people])
    counts = [len(clips.members([p])) for p in people]
    labels = np.repeat(np.arange(len(people)), counts)
    fold_of = np.concatenate([np.arange(n) % CLIP_FOLDS for n in counts])
    held_out = sorted(set(fold_of.tolist()))
    mine = frozen.features[:, members]
    if frozen.l2:
        heads, _ = probing.solve_heads(logistic.Regression(mine, labels, len(people)), mine, labels,
                                       fold_of, held_out, float(np.median(frozen.l2)),
                                       tolerance=logistic.ROUGH)
    else:
        heads = probing.FoldHeads(
            [f"clips{f + 1}of{len(held_out)}" for f in held_out],
            logistic.statistics(mine, probing.training_clips(fold_of, held_out)), len(people),
            opt.seed)
        print("telling subjects apart by the same features:")
        probing.train_heads(heads, mine, frozen.positions, labels, fold_of, held_out, opt)
    said = probing.predict(heads, mine, fold_of, held_out).argmax(1)
    return {"n": len(members), "n_subjects": len(people),
            "accuracy": float((said == labels).mean()), "chance": max(counts) / len(members)}


def retrieval(clips, rgb, depth):
    """How often the nearest second view of an RGB feature `[N, d]` is that of its own clip: among
    all clips, and among those of its subject. {all, within}: {n, top1, chance}.

    Within subjects, those with one clip stay out; chance is 1 over the number of candidates.
    """
    scores = rgb @ depth.t()  # [N, N]
    people = np.array([clips.people.index(c.person) for c in clips.clips])
    same = torch.from_numpy(people[:, None] == people)
    own = torch.arange(len(scores))
    candidates = same.sum(1)
    several = candidates > 1
    within = scores.masked_fill(~same, -torch.inf).argmax(1) == own
    found = {"all": {"n": len(own), "top1": (scores.argmax(1) == own).float().mean().item(),
                     "chance": 1 / len(own)}}
    if several.any():
        found["within"] = {"n": int(several.sum()), "top1": within[several].float().mean().item(),
                           "chance": (1 / candidates[several]).mean().item()}
    return found


def head_motion(clips, rows, folder):
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
    paths = {(c.database, c.subject, c.key): c.rgb for c in clips.clips}
    known = [(motion[path], row) for row in rows for path in
             [paths.get((DATABASES.index(row["database"]), row["subject"], row["key"]))]
             if path in motion]
    return {kind: _correlations(known, kind) for kind in ("shift", "residual")} if known else None


def _correlations(known, kind):
    known = [(clip[kind], row) for clip, row in known if clip[kind] is not None]
    moved = np.array([value for value, _ in known])
    said = {"correct": [row["prediction"] == row["label"] for _, row in known]}
    for i in range(len(known[0][1]["probabilities"]) if known else 0):
        said[f"p_{i}"] = [row["probabilities"][i] for _, row in known]
    return {"n": len(known), **{
        name: float(spearmanr(moved, values).statistic)
        if len(set(values)) > 1 and len(set(moved)) > 1 else None
        for name, values in said.items()}}


def describe(found, classes):
    """Lines for the terminal; found: the keys `subject`, `retrieval` and `head_motion`, if any."""
    lines, subject = [], found.get("subject")
    if subject:
        lines.append(f"the same features name the subject of {subject['n']} clips: accuracy "
                     f"{subject['accuracy']:.3f}, chance {subject['chance']:.3f}")
    for among, of in found.get("retrieval", {}).items():
        where = {"all": "all clips", "within": "the subject's clips"}[among]
        lines.append(f"the other view of a clip is found among {where}: {of['top1']:.3f}, chance "
                     f"{of['chance']:.3f}")
    for kind, of in (found.get("head_motion") or {}).items():
        figures = [("correct", of["correct"])] + [(name, of[f"p_{i}"])
                                                  for i, name in enumerate(classes)]
        lines.append(f"head motion ({kind}, {of['n']} clips), rank correlation: " + ", ".join(
            f"{name} {value:+.2f}" for name, value in figures if value is not None))
    return lines
