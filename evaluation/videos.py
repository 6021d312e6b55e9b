"""Held-out persons of a set of videos: which of them, the epoch that others choose, mistakes."""
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dataset
from dataset import ClipSet
from evaluation import gradcam, heldout, measures, pictures
from training import motion
from util import BadInput

# the subjects that the published code did worst on: chosen by their test scores
HARDEST = (5, 16, 7, 3, 6, 17, 20, 13, 26, 1)
INNER = 5  # groups of subjects, of which one chooses the epoch


def chosen_subjects(part: str, clips: ClipSet) -> list[str] | None:
    """Names of the held-out subjects that --part means, None for all of them.

    'all', numbers such as `5,16` or `[5,16,7]`, ranges `1-4`, 'hardest', 'hardest_N', names.
    Raises BadInput.
    """
    if part == "all":
        return None
    if match := re.fullmatch(r"hardest(?:_(\d+))?", part):
        words = [str(n) for n in HARDEST[:int(match[1] or len(HARDEST))]]
    else:
        words = [word for word in re.split(r"[\s,]+", part.strip("[] ")) if word]
    numbers = {int(match[0]): name for name in clips.names.values()
               if (match := re.search(r"\d+$", name))}
    chosen = []
    for word in words:
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if not span:
            chosen += [clips.names[p] for p in dataset.find_people([word], clips, "--part")]
            continue
        there = [numbers[n] for n in range(int(span[1]), int(span[2] or span[1]) + 1)
                 if n in numbers]
        if not there:
            raise BadInput(f"--part {part}: no subject {word}; the data hold "
                           f"{', '.join(clips.names.values())}")
        chosen += there
    if not chosen:
        raise BadInput(f"--part {part}: names nobody; give all, 1-4, 5,16, hardest_7 or names")
    return list(dict.fromkeys(chosen))


class HeldOutVideos(heldout.HeldOut):
    """Held-out persons whose mistakes show flow and the maps of attention; no clip is blank."""

    def blank(self) -> np.ndarray:
        return np.zeros(len(self.data.clips), bool)

    def shortcuts(self) -> dict:
        return {}

    def draw_mistakes(self, path: Path, mistakes: list, counts: tuple) -> None:
        heldout.draw_mistakes(path, self.data.clips, self.data.images, mistakes, counts,
                              pictures.motion_panels, "the blocks' maps of attention over time")

    def keep_attention(self, group: heldout.Group, members: np.ndarray, probabilities: np.ndarray,
                       maps: list) -> None:
        """Adds the maps of attention, `[M, h, w]` of each block, of the clips of `members` that
        are most confidently wrong."""
        worst = measures.most_wrong(self.data.clips.labels[members], probabilities)
        if len(worst):
            blocks = [gradcam.levels(block[worst]) for block in maps]
            self.add_maps(group, {int(members[i]): list(own)
                                  for i, *own in zip(worst, *blocks)})


class Best:
    """Choice of the epoch by training subjects that are not trained on (`inner`, a fifth of them).

    rest: the clips that are. In stage 'units' the lowest loss of their action units decides, later
    the highest UF1, the earliest epoch where several are equal.
    """

    def __init__(self, clips: ClipSet, members: np.ndarray):
        # not stratified: the labels of held-out clips would move training subjects
        chosen = dataset.ten_folds(clips, INNER, stratified=False).of[members]
        self.clips, first = clips, int(chosen.min())
        self.inner, self.rest = members[chosen == first], members[chosen != first]
        if not len(self.rest):
            raise BadInput("--select inner: too few subjects; it takes three, or --select fixed")
        self.state = {"stage": "", "value": 0.0, "epoch": 0, "model": {}}

    def follow(self, job: motion.Job, stage: str, epoch: int) -> dict:
        """After an epoch: keeps the network where it is the best so far of its stage."""
        probabilities, _, units = motion.predict(job, self.inner)
        if stage == "units":
            wanted = torch.from_numpy(job.targets[self.inner])
            value = -float(F.binary_cross_entropy_with_logits(torch.from_numpy(units), wanted))
        else:
            value = measures.evaluate(self.clips.labels[self.inner], probabilities.argmax(1),
                                      self.clips.n_label)["uf1"]
        stage = "units" if stage == "units" else "classes"
        if stage != self.state["stage"] or value > self.state["value"] + 1e-12:
            self.state = {"stage": stage, "value": value, "epoch": epoch, "model": {
                name: part.cpu().clone() for name, part in job.network.state_dict().items()}}
        return {"inner_au_loss": -value} if stage == "units" else {"inner_uf1": value}

    def take(self, network: nn.Module) -> None:
        """Gives a network the weights that were kept."""
        network.load_state_dict(self.state["model"])

    def choice(self) -> dict:
        """What was chosen, for the results: {epochs, inner_uf1}."""
        return {"epochs": self.state["epoch"], "inner_uf1": self.state["value"]}
