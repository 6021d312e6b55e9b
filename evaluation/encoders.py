"""Which encoder each held-out person gets, from which checkpoint, and whom it saw before."""
import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import dataset
from dataset import ClipSet
from images import decoding, encoding
from models import create_classifier, create_model
from models.classifier import Classifier
from training import checkpoint
from training.options import PROTOCOLS
from util import BadInput, sha256_of

RANDOM = "random"  # in place of a checkpoint: an untrained encoder
# options of a pre-training that may differ between the encoders of one evaluation
APART = {"subject", "fold", "without", "pairs", "data_folder", "list_folder", "cache", "device",
         "num_workers", "resume", "model_path", "save_path", "tb_path", "tag", "print_freq",
         "save_freq", "save_minutes", "seeds", "warmup_derived"}


class Seen(NamedTuple):
    """Persons, (database, subject), that an encoder is known to have seen, whether they are all,
    and whether it saw labels; how it was trained: its options but APART, and its epochs."""
    people: set
    complete: bool
    labelled: bool = False
    how: dict | None = None


def load_classifier(opt: argparse.Namespace, path: str, clips: ClipSet,
                    head: nn.Module) -> tuple[Classifier, Seen]:
    """(classifier of a checkpoint's encoder and `head`, whom the encoder saw), on the CPU.

    opt gives model, view, size, layer and seed. Raises BadInput for a checkpoint of another model,
    view, encoding or other classes.
    """
    difference = clips.encoding["difference"]
    if path == RANDOM:
        torch.manual_seed(opt.seed)
        model = create_model(opt.model, in_channels=clips.channels, size=opt.size)
        fixed = encoding.fixed_normalization(difference, clips.views, clips.channels)
        return Classifier(model, head, opt.layer, fixed), Seen(set(), True)
    state = checkpoint.load(path)
    old, tuned = state.get("encoding") or {}, "classifier" in state
    for what, ours, theirs in (("--view", opt.view, state["opt"].get("view", opt.view)),
                               ("--size", opt.size, state["opt"].get("size", decoding.CROP)),
                               ("difference", difference, old.get("difference", difference)),
                               ("classes", clips.encoding.get("classes") if tuned else None,
                                old.get("classes"))):
        if ours != theirs and None not in (ours, theirs):
            raise BadInput(f"{path}: trained with {what} {theirs}, but the data have {ours}")
    # fine-tuned checkpoints of earlier releases do not say it: a tower's last tensor is the bias of
    # its projection
    projection = [value for name, value in state["model"].items() if name.startswith("rgb_to_d.")]
    feat_dim = state["opt"].get("feat_dim") or (len(projection[-1]) if projection else 128)
    model = create_model(opt.model, feat_dim, clips.channels, opt.size)
    checkpoint.load_model(model, state, path, opt.model)
    normalization = state.get("normalization") or encoding.fixed_normalization(
        "wrap", clips.views, clips.channels)
    try:
        seen = read_seen(state.get("seen"))._replace(labelled=tuned, how={
            **{name: value for name, value in state["opt"].items() if name not in APART},
            "epochs trained": state.get("epoch"), "complete": not state.get("within")})
        mean, std = np.float64(normalization["mean"]), np.float64(normalization["std"])
        lengths = {len(mean), len(std)} if np.isfinite([mean, std]).all() and (std > 0).all() \
            else set()
    except (KeyError, TypeError, ValueError):
        lengths = set()
    if lengths != {sum(clips.channels)}:
        raise BadInput(f"{path}: its 'seen' or 'normalization' cannot be read; take a checkpoint "
                       f"that pre-train_DVSCL.py wrote")
    return Classifier(model, head, opt.layer, {"mean": mean.tolist(), "std": std.tolist()}), seen


def read_seen(seen: dict | None) -> Seen:
    """What a checkpoint says of whom its encoder saw."""
    if not seen:
        return Seen(set(), False)
    # no list: some clip names no subject; checkpoints that list all the same hold an empty name
    listed = [*seen.get("named", ()), (0, "")] if seen["people"] is None else seen["people"]
    people = {(int(d), str(s)) for d, s in listed}
    named = {person for person in people if person[1].strip()}
    return Seen(named, named == people)


class Encoders:
    """The checkpoints behind a run of held-out persons.

    --model_path may name one for each person or fold, `random`, or nothing where the script has
    no pre-trained source. `sha256`: of every file, None for no file. Raises BadInput for a file
    that is missing.
    """

    def __init__(self, opt: argparse.Namespace, clips: ClipSet, people: Iterable[tuple]):
        self.opt, self.clips, self.source = opt, clips, getattr(opt, "model_path", RANDOM)
        people = list(people)
        self.folds = self._folds(people)
        self.paths = {person: self.path(person) for person in people}
        self.sha256, self.checked = {RANDOM: None}, (None, None)
        self.seen = {RANDOM: Seen(set(), True)}
        self.identities = {person: dataset.identity(person) for person in clips.people}
        for path in dict.fromkeys(self.paths.values() if self.paths else [self.source]):
            if path != RANDOM:
                if not Path(path).is_file():
                    raise BadInput(f"--model_path {path}: no such checkpoint")
                self.sha256[path] = sha256_of(path)

    def _folds(self, people):
        """Name of the fold that pre-training left each person out with: of as many as --protocol
        has, or of the other number where more of the checkpoints of `people` are there."""
        if "{fold}" not in self.source:
            return {}
        everyone, own = self.clips.origin or self.clips, PROTOCOLS[self.opt.protocol] or 10
        best, most = {}, -1
        for number in sorted(filter(None, PROTOCOLS.values()), key=lambda number: number != own):
            folds = dataset.subject_groups(everyone, number)
            names = {clip.person: folds.names[fold] for clip, fold in zip(everyone.clips, folds.of)}
            there = sum(Path(self.path(person, names)).is_file() for person in people)
            if there > most:
                best, most = names, there
        return best

    def path(self, person: tuple, folds: dict | None = None) -> str:
        """--model_path for one held-out person: {subject} and {fold} filled in; folds: the name of
        everybody's fold [those whose checkpoints are there]."""
        folds = self.folds if folds is None else folds
        return self.source.replace("{fold}", folds.get(person, "")).replace(
            "{subject}", self.clips.names[person])

    def create_head(self) -> nn.Module:
        """A fresh linear head for the options and clips of the run."""
        opt, clips = self.opt, self.clips
        return create_classifier(opt.model, opt.layer, clips.n_label, clips.channels, opt.encoder,
                                 opt.size)

    def check(self, path: str) -> None:
        """Loads an encoder before anything is written; the next `load` without a head takes it.
        Raises BadInput where one that was loaded before was trained otherwise: encoders of one
        evaluation may differ in whom they were trained without, and in nothing else."""
        self.checked = path, self.load(path)
        how = self.seen[path].how
        for other, seen in self.seen.items():
            if None in (how, seen.how) or how == seen.how:
                continue
            name = next(k for k in {**how, **seen.how} if how.get(k) != seen.how.get(k))
            raise BadInput(f"{path}: {name} {how.get(name)}, but {seen.how.get(name)} in {other}; "
                           f"all of --model_path must come from one pre-training's command")

    def training_digest(self) -> str | None:
        """Digest of how the encoders were trained that have been loaded; None where nothing was."""
        how = next((seen.how for seen in self.seen.values() if seen.how), None)
        return how and hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode()
                                      ).hexdigest()[:16]

    def load(self, path: str, head: nn.Module | None = None) -> Classifier:
        """A fresh copy of the encoder in `path`, under a fresh head unless one is given. Raises
        BadInput where the file is another one by now."""
        checked, classifier = self.checked
        self.checked = None, None
        if head is not None or path != checked:
            classifier, self.seen[path] = load_classifier(
                self.opt, path, self.clips, self.create_head() if head is None else head)
            if path != RANDOM and sha256_of(path) != self.sha256[path]:
                raise BadInput(f"{path}: has changed since this run began; name a checkpoint that "
                               f"stays, such as ckpt_epoch_N.pth")
        return classifier

    def transductive(self, path: str, person: tuple) -> bool | None:
        """Whether the encoder of a loaded `path` saw a person; None where that is unknown."""
        seen = self.seen[path]
        if self.identities[person] in {dataset.identity(other) for other in seen.people}:
            return True
        return False if seen.complete else None
