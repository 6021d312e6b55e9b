"""Held-out persons of a set of videos: which of them, the epoch that others choose, mistakes."""
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dataset
from dataset import ClipSet
from evaluation import gradcam, heldout, measures, pictures, result_files
from evaluation.encoders import RANDOM, Seen, read_seen
from images import videos
from images.lists import DATABASES
from models import mmnet
from training import checkpoint, motion, record
from util import BadInput, sha256_of

# the subjects that the published code did worst on: chosen by their test scores
HARDEST = (5, 16, 7, 3, 6, 17, 20, 13, 26, 1)
CHOSEN = "hardest: these subjects are of a published list, which was chosen by test scores"
INNER = 5  # groups of subjects, of which one chooses the epoch


def chosen_subjects(part: str, clips: ClipSet) -> list[str] | None:
    """The held-out subjects that --part means, as dataset.find_people takes them; None: all.

    'all', numbers such as `5,16` or `[5,16,7]`, ranges `1-4`, 'hardest', 'hardest_N', names of
    subjects or databases. A number is that of a subject of every database, but for CASME II's
    hardest. Raises BadInput.
    """
    if part == "all":
        return None
    hardest = re.fullmatch(r"hardest(?:_([0-9]{1,9}))?", part)
    words = [str(n) for n in HARDEST[:int(hardest[1] or len(HARDEST))]] if hardest else \
        [word for word in re.split(r"[\s,]+", part.strip("[] ")) if word]
    several, numbers = len({database for database, _ in clips.people}) > 1, {}
    for person in clips.people:
        if not hardest or DATABASES[person[0]] == "casme2":
            numbers.setdefault(number_of(person[1]), []).append(person)
    chosen = []
    for word in words:
        # numbers that are there are tried, not those of a range, which may be long
        if span := re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word):
            there = [person for n in sorted(numbers.keys() - {None})
                     if int(span[1]) <= n <= int(span[2] or span[1]) for person in numbers[n]]
        elif word in DATABASES:
            there = [person for person in clips.people if DATABASES[person[0]] == word]
        else:
            there = dataset.find_people([word], clips, "--part")
        if not there:
            of = " of casme2" * bool(hardest)
            raise BadInput(f"--part {part}: no subject {word}{of}; the data hold "
                           + ", ".join(name_of(person, several) for person in clips.people))
        chosen += there
    if not chosen:
        raise BadInput(f"--part {part}: names nobody; give all, 1-4, 5,16, hardest_7 or names")
    return [name_of(person, several) for person in dict.fromkeys(chosen)]


def name_of(person: tuple[int, str], several: bool) -> str:
    """A person as dataset.find_people takes it, of one or of several databases."""
    return f"{DATABASES[person[0]]}/{person[1]}" if several else person[1]


def number_of(subject: str) -> int | None:
    """5 for sub05, None for a name that does not end in a number."""
    number = re.search(r"[0-9]{1,9}$", subject)
    return int(number[0]) if number else None


class HeldOutVideos(heldout.HeldOut):
    """Held-out persons whose mistakes show flow and the maps of attention; no clip is blank.

    units: the action units of each clip where the network learns them. A network may start from
    --pretrained, and results say whom that one saw.
    """

    def __init__(self, run: record.Run, argv: list[str], script: str, data: dataset.Data,
                 folds: dataset.Folds, units: list[frozenset] | None):
        opt, seen = run.opt, Seen(set(), True)
        if opt.pretrained:
            seen = seen_by(opt.pretrained)
        if opt.landmarks and not Path(opt.landmarks).is_file():
            raise BadInput(f"--landmarks {opt.landmarks}: no such file")
        self.units = units
        self.masks = videos.read_masks(opt.landmarks, [clip.key for clip in data.clips.clips],
                                       opt.mask, opt.size, data.images.info["size"])
        super().__init__(run, argv, script, data, folds, {
            "pretrained_sha256": sha256_of(opt.pretrained) if opt.pretrained else None,
            "landmarks_sha256": sha256_of(opt.landmarks) if opt.landmarks else None,
            "units_digest": hashlib.sha256(json.dumps([*map(sorted, units)]).encode()).hexdigest()
            if units else None})
        self.encoders.seen[RANDOM] = seen

    def check(self, first: list[heldout.Group]) -> None:
        opt, clips = self.run.opt, self.data.clips
        for group in self.groups:
            members = np.setdiff1d(np.arange(len(clips)), clips.members(group.out))
            if opt.select == "inner":
                members = Best(clips, members).rest
            units = videos.unit_names(self.units[i] for i in members) if self.units else None
        if self.groups and opt.pretrained:
            with torch.device("meta"):
                network = mmnet.create_mmnet(opt.model, clips.n_label, units and len(units),
                                             opt.channels, opt.size)
            motion.fitting(network, opt, clips.classes, units)

    def check_pretrained(self) -> None:
        """Raises BadInput where --pretrained is another file than when the run began."""
        path = self.run.opt.pretrained
        if path and sha256_of(path) != self.header["pretrained_sha256"]:
            raise BadInput(f"--pretrained {path}: has changed since this run began; name a "
                           f"checkpoint that stays")

    def seen(self, members: np.ndarray) -> dict:
        """What a checkpoint says of whom it saw: the persons of `members`, and those before."""
        own, before = dataset.people_seen(self.data.clips, members), self.encoders.seen[RANDOM]
        named = [*map(list, sorted({*map(tuple, own.get("named") or own["people"] or ()),
                                    *before.people}))]
        known = before.complete and own["people"] is not None
        return {"people": named if known else None, "named": named, "clips": len(members)}

    def remarks(self) -> dict:
        people = {(row["database"], row["subject"]) for _, rows in
                  result_files.read_subjects(self.run.folder).values() for row in rows}
        hardest = all(database == "casme2" and number_of(subject) in HARDEST
                      for database, subject in people)
        return {"part": CHOSEN} if hardest and len(people) < len(self.data.clips.people) else {}

    def blank(self) -> np.ndarray:
        return np.zeros(len(self.data.clips), bool)

    def shortcuts(self) -> dict:
        return {}

    def draw_mistakes(self, path: Path, mistakes: list, counts: tuple) -> None:
        heldout.draw_mistakes(path, self.data.clips, self.data.images, mistakes, counts,
                              pictures.motion_panels, "the blocks' maps of attention over time")

    def attention_of_mistakes(self, members: np.ndarray, probabilities: np.ndarray,
                              maps: list) -> dict[int, list]:
        """The maps of attention, `[M, h, w]` of each block, of the clips of `members` that are
        most confidently wrong, for `keep`."""
        worst = measures.most_wrong(self.data.clips.labels[members], probabilities)
        blocks = [gradcam.levels(block[worst]) for block in maps] if len(worst) else []
        return {int(members[i]): list(own) for i, *own in zip(worst, *blocks)}


def seen_by(path: str) -> Seen:
    """Whom the network of a --pretrained checkpoint saw; raises BadInput."""
    try:
        return read_seen(checkpoint.load_seen(path))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(f"--pretrained {path}: its 'seen' cannot be read; take a checkpoint that "
                       f"train_MMNet.py wrote, or a published one") from None


class Best:
    """Choice of the epoch by training subjects that are not trained on (`inner`, a fifth of them).

    rest: the clips that are. In stage 'units' the lowest loss of their action units decides, later
    the highest UF1, the earliest epoch where several are equal.
    """

    def __init__(self, clips: ClipSet, members: np.ndarray):
        own = clips.subset(np.isin(np.arange(len(clips)), members))
        chosen = dataset.subject_groups(own, INNER, stratified=False).of
        self.clips, self.inner, self.rest = clips, members[chosen == 0], members[chosen != 0]
        if not len(self.rest):
            raise BadInput("--select inner: too few subjects; it takes three, or --select fixed")
        self.state = {"stage": "", "value": 0.0, "epoch": 0, "model": {},
                      "inner": self.inner.tolist()}

    def restore(self, state: dict) -> None:
        """Goes on from what a checkpoint kept; raises BadInput where other clips chose."""
        if state.get("inner") != self.state["inner"]:
            raise BadInput("--select inner: the checkpoint is of an earlier release, whose choice "
                           "was by other subjects; start anew under another --tag")
        self.state = state

    def follow(self, job: motion.Job, stage: str, epoch: int) -> dict:
        """After an epoch, counted within its stage: keeps the network where it is the best so
        far."""
        probabilities, _, units = motion.predict(job, self.inner)
        uncoded = False
        if stage == "units":
            wanted = torch.from_numpy(job.targets[0, self.inner])
            uncoded = bool(wanted.isnan().any(1).all())  # then nothing chooses, and the last counts
            value = -float(motion.unit_loss(torch.from_numpy(units), wanted))
        else:
            value = measures.evaluate(self.clips.labels[self.inner], probabilities.argmax(1),
                                      self.clips.n_label)["uf1"]
        stage = "units" if stage == "units" else "classes"
        if uncoded and stage != self.state["stage"]:
            print("--select inner: no action units of the inner clips are coded; the last epoch of "
                  "that stage counts")
        if uncoded or stage != self.state["stage"] or value > self.state["value"] + 1e-12:
            self.state |= {"stage": stage, "value": value, "epoch": epoch, "model": {
                name: part.cpu().clone() for name, part in job.network.state_dict().items()}}
        if uncoded:
            return {}
        return {"inner_au_loss": -value} if stage == "units" else {"inner_uf1": value}

    def take(self, network: nn.Module) -> None:
        """Gives a network the weights that were kept."""
        network.load_state_dict(self.state["model"])

    def choice(self) -> dict:
        """What was chosen, for the results: {epochs, inner_uf1}."""
        return {"epochs": self.state["epoch"], "inner_uf1": self.state["value"]}
