"""Held-out persons: the flags, folds and groups they are trained in, and their results.

What the scripts share that put a head on an encoder and predict every person with one that did
not see them.
"""
import argparse
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import dataset
from dataset import ClipSet, Data, Folds
from evaluation import gradcam, pictures, probing, result_files, shortcuts
from evaluation.encoders import RANDOM, Encoders
from images import encoding
from models.classifier import Classifier
from training import distributed, record
from training.options import PROTOCOLS
from training.record import Run
from util import BadInput, RunFailed, remove_leftovers

# ---------------------------------------------------------------- data

def split(protocol: str, clips: ClipSet) -> Folds:
    """The folds of --protocol; raises BadInput for one subject."""
    number = PROTOCOLS[protocol]
    folds = dataset.subject_groups(clips, number) if number else dataset.subject_folds(clips)
    if len(folds.names) < 2:
        raise BadInput(f"{clips.folder}: one subject; held-out evaluation takes two")
    return folds


def read_labelled(opt: argparse.Namespace) -> Data:
    """The clips of --dataset but for those of --without, decoded."""
    clips = dataset.read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    if opt.dataset != "all":
        wanted = dataset.DATABASES.index(opt.dataset)
        databases = sorted({dataset.DATABASES[c.database] for c in clips.clips})
        if opt.dataset not in databases:
            raise BadInput(f"--dataset {opt.dataset}: the lists hold {', '.join(databases)}")
        if len(databases) > 1:
            print(f"{opt.dataset} alone, of {', '.join(databases)}; --dataset all takes every one")
        clips = clips.subset([c.database == wanted for c in clips.clips])
    if opt.without:
        out = dataset.find_without(opt, clips)
        clips = clips.subset([c.person not in out for c in clips.clips])
        if not clips.clips:
            raise BadInput(f"{clips.folder}: --without leaves no subject; name fewer")
    with distributed.in_turn():
        return Data(clips, *dataset.load_images(clips, opt.cache, opt.num_workers, opt.size))


def head_run_name(stage: str, opt: argparse.Namespace, *parts: str | None) -> str:
    """Name of a probe or fine-tuning run: the pre-training run's, layer, and `parts`.

    stage: 'probe' or 'finetune'. A checkpoint other than `last.pth` joins in by its name.
    """
    if getattr(opt, "model_path", RANDOM) == RANDOM:
        source = record.join_name(RANDOM, opt.model, "view", opt.view, record.size_name(opt.size))
    else:
        path = Path(opt.model_path.replace("{", "").replace("}", ""))
        source = record.join_name(path.parent.name, "" if path.stem == "last" else path.stem)
    without = f"without_{record.name_of(opt.without)}" if opt.without else ""
    return record.join_name(stage, source, f"layer_{opt.layer}", *parts, "amp" * opt.amp,
                            f"seed_{opt.seed}", without, opt.tag)


def penalty_name(l2: float | None) -> str:
    """What a run's name says of the penalty of solved heads."""
    return "l2_inner" if l2 is None else f"l2_{l2:g}"


# ---------------------------------------------------------------- held-out persons and results

class Group(NamedTuple):
    """What is trained in one go: from the checkpoint `path`, for the results of `people`, under
    their `name` in the log; `out`: who is held out, those of `people` and who shares their
    fold and is finished."""
    path: str
    people: list
    name: str | None
    out: list


def make_header(opt: argparse.Namespace, argv: list[str], script: str, data: Data,
                sha256: str | None, **more: str | None) -> dict:
    """The log's header with the digests of data and checkpoint, and `more` of them."""
    clips = data.clips
    return record.header(
        script, opt, argv, list_digest=clips.digest(), checkpoint_sha256=sha256,
        difference=clips.encoding.get("difference"), classes=list(clips.classes),
        data_digest=hashlib.sha256((clips.digest() + data.digest).encode()).hexdigest(), **more)


def open_run(run: Run, header: dict, sha256: dict,
             besides: dict | None = None) -> dict[str, str | None]:
    """Enters a run folder of held-out predictions; returns the names already finished, and how the
    encoder of each was trained, as Encoders.training_digest has it.

    sha256: name → path and digest of each wanted subject's checkpoint; besides: digests of the
    header that must be equal as well. An existing folder takes --resume, or --subject, which adds
    to it; and the options and checkpoints that made it. Raises BadInput.
    """
    folder, opt = run.folder, run.opt
    old = record.read_log(folder)
    if old:
        if not opt.resume and opt.subject in (None, ["all"]):
            raise BadInput(f"{folder}: exists; go on with --resume auto, give another --tag, or "
                           f"remove it")
        told = {name: header[name] for name in ("difference", "classes") if name in old[0]}
        run.check_resumable(folder, old[0], data_digest=header["data_digest"], **told,
                            checkpoint_sha256=header["checkpoint_sha256"], **(besides or {}))
    elif record.holds_a_run(folder):
        raise BadInput(f"{folder}: exists, but holds no log.jsonl; remove it or give another --tag")
    if opt.resume not in (None, "auto") and not Path(opt.resume).is_file():
        raise BadInput(f"--resume {opt.resume}: no such checkpoint")
    done, now = {}, dict(sha256.values())  # path → digest
    for path in (folder / "subjects").glob("*.json"):
        name, was = path.stem, result_files.read_subject(path)[0]
        done[name] = was.get("training")
        digest = sha256[name][1] if name in sha256 else \
            now.get(was.get("checkpoint"), was.get("sha256"))
        if was.get("sha256") != digest:
            raise BadInput(f"{path}: comes from another checkpoint than the one --model_path "
                           f"names now; remove it, or give another --tag")
    return done


def checked_states(run: Run, header: dict, encoders: Encoders, names: dict[str | None, str],
                   finished: Collection[str] = (), besides: dict | None = None) -> dict:
    """name → checkpoint of the trainings that --resume goes on with; names: → path of the encoder
    that each starts from; finished: of whom nothing is left to do; besides: as in `open_run`.
    Raises BadInput."""
    states = {}
    for path, state in run.states(names):
        if state.get("unit") in finished or (
                run.opt.resume == "auto" and state.get("unit") not in names):
            continue  # last.pth, of one that is finished, maybe in another job
        run.check_resumable(path, state, data_digest=header["data_digest"], **(besides or {}))
        encoding.check_same(path, state.get("encoding"), header["difference"])
        if "folds" in state:  # of heads, from an earlier release: they start anew
            continue
        if state.get("unit") not in names:
            raise BadInput(f"--resume {path}: the training of {state.get('unit')}, who is not "
                           f"among those to hold out; give --resume auto")
        if "mean" not in state.get("classifier", {"mean"}):
            raise BadInput(f"{path}: comes from before heads standardised their features; its "
                           f"run cannot go on: start it anew without --resume")
        if state.get("encoder_sha256") != encoders.sha256[names[state["unit"]]]:
            raise BadInput(f"{path}: was trained on another checkpoint than --model_path "
                           f"{encoders.source}; give another --tag, or remove it")
        states[state["unit"]] = state
    return states


def open_log(run: Run, header: dict, names: Iterable[str | None],
             done: dict) -> record.Log:
    """The run's log, cut back to what finished subjects and checkpoints account for.

    names: what is still to be trained; done: name → epochs in its checkpoint. Rank 0 writes the
    file, the others append.
    """
    log = None
    if distributed.first():
        log = run.log(header, lambda line: line.get("subject") not in names
                      or line["epoch"] <= done.get(line.get("subject"), 0))
    distributed.barrier()
    return log or run.log(None)


class HeldOut:
    """A run over held-out persons: who is left to do, in which groups, and what they result in.

    script: the caller's file; folds: a training for each; None: the persons of one checkpoint are
    trained in one pass; besides: digests of what else is read, by name, which a run that goes on or
    is added to shares. Raises BadInput.
    """

    def __init__(self, run: Run, argv: list[str], script: str, data: Data,
                 folds: Folds | None = None, besides: dict | None = None):
        opt, clips = run.opt, data.clips
        self.run, self.data, self.folds = run, data, folds
        wanted = dataset.find_people(opt.subject, clips) if opt.subject else clips.people
        self.names = clips.names
        self.encoders = Encoders(opt, clips, wanted)
        if not folds and opt.resume not in (None, "auto"):
            raise BadInput(f"--resume {opt.resume}: heads on a frozen encoder are trained in one "
                           f"pass and keep no checkpoint; --resume auto does what is left")
        self.besides = besides or {}
        self.header = make_header(opt, argv, script, data, self.encoders.sha256.get(
            self.encoders.source), **self.besides)
        done = open_run(run, self.header, {
            self.names[p]: (path, self.encoders.sha256[path])
            for p, path in self.encoders.paths.items()}, self.besides)
        todo = [p for p in wanted if self.names[p] not in done]
        self.todo = [self.names[p] for p in todo]
        if len(todo) < len(wanted):
            print(f"{len(wanted) - len(todo)} of {len(wanted)} held-out subjects are finished")
        everyone = self._groups(todo)
        self.groups = distributed.deal(everyone) if folds else \
            self._groups(distributed.deal(todo))
        self.check(everyone[:1])
        now = self.encoders.training_digest()
        for name in [name for name, how in done.items() if None not in (how, now) and how != now]:
            raise BadInput(f"{run.folder}: {name} comes from another pre-training than that of "
                           f"--model_path now; give another --tag")
        distributed.agree(self.todo)
        names = {group.name: group.path for group in everyone} or {None: RANDOM}
        finished = {group.name for group in self._groups([p for p in wanted if p not in todo])} \
            - names.keys()
        if folds and distributed.first():  # killed between its results and this, it would stay
            for name in finished:
                run.finished(name)
        self.states = checked_states(run, self.header, self.encoders, names, finished,
                                     self.besides) if folds and todo else {}
        self._check_begun()
        self.log = open_log(run, self.header, names, {
            name: state["epoch"] for name, state in self.states.items()}) if todo else None

    def check(self, first: list[Group]) -> None:
        """Raises BadInput for what would end the training of `groups`: before there is a run
        folder. first: of all ranks' groups, whose encoder those of every rank are like."""
        if hasattr(self.run.opt, "model_path"):
            paths = dict.fromkeys(group.path for group in [*self.groups, *first])
            for path in reversed(paths):  # that of the first group is loaded next
                self.encoders.check(path)

    def _check_begun(self):
        """Raises BadInput where a training that was stopped would start anew, over what it did."""
        for group in self.groups if self.folds and self.run.opt.resume != "auto" else ():
            if group.name not in self.states and (path := self.run.last(group.name)).exists():
                raise BadInput(f"{path}: a training that is not finished; go on with --resume "
                               f"auto, give another --tag, or remove it")

    def _groups(self, todo):
        """The Groups that train for the persons in `todo`."""
        groups, clips = {}, self.data.clips
        fold_of = {}
        if self.folds:
            fold_of = {clip.person: int(fold) for clip, fold in zip(clips.clips, self.folds.of)}
        for person in todo:
            groups.setdefault((self.encoders.paths[person], fold_of.get(person)), []).append(person)
        if not self.folds:
            return [Group(path, people, self._unit(people), people)
                    for (path, _), people in groups.items()]
        paths = {}  # of a fold, which may not be one of those that were left out of pre-training
        for person, fold in fold_of.items():
            paths.setdefault(fold, set()).add(self.encoders.path(person))
        return [Group(path, people, self.folds.names[fold]
                      + f"_{self.encoders.sha256[path]}"[:9] * (len(paths[fold]) > 1),
                      [p for p in clips.people if fold_of[p] == fold])
                for (path, fold), people in groups.items()]

    def _unit(self, people):
        """Name of a group in the log: None for everybody, else it tells any two groups apart."""
        everybody = 1 < len(people) == len(self.data.clips.people)
        return None if everybody else record.name_of([self.names[p] for p in people])

    def keep(self, group: Group, members: np.ndarray, probabilities: np.ndarray,
             notes: Callable, maps: dict[int, list]) -> None:
        """Keeps the predictions `[len(members), C]` for each person of a Group.

        members: clips, all that the group holds out; notes(places in members) → what is kept
        besides, as a dict; maps: of where the model looked, clip → one of each view, rows of
        0..255 or None. In one file, so that who is finished lacks nothing.
        """
        clips, encoders, subjects = self.data.clips, self.encoders, {}
        made_by = {name: self.header[name] for name in ("command", "versions")}
        for person in group.people:
            mine = np.flatnonzero(np.isin(members, clips.by_person[person]))
            own = {clips.clips[i].key: maps[i] for i in clips.by_person[person] if i in maps}
            if not np.isfinite(probabilities[mine]).all():
                raise RunFailed(f"the predictions for {self.names[person]} are not finite; lower "
                                f"--learning_rate, or start from another encoder")
            subjects[self.names[person]] = {
                "transductive": encoders.transductive(group.path, person),
                "checkpoint": None if group.path == RANDOM else group.path,
                "sha256": encoders.sha256[group.path], "made_by": made_by, **notes(mine),
                **({"training": encoders.training_digest()} if encoders.training_digest() else {}),
                **({"start_labelled": True} if encoders.seen[group.path].labelled else {}),
                "rows": result_files.rows_of([clips.clips[i] for i in members[mine]],
                                             probabilities[mine]),
                **({"maps": own} if own else {})}
        result_files.write_subjects(self.run.folder, subjects)

    def maps_of_mistakes(self, classifier: Classifier, members: np.ndarray,
                         probabilities: np.ndarray, weights_of: Callable) -> dict[int, list]:
        """Maps of where the model looked in the clips of `members` that it is most confidently
        wrong about, for `keep`: see gradcam.maps_of_mistakes. Reads their labels."""
        return gradcam.maps_of_mistakes(
            classifier, self.data.images, members, self.data.clips.labels[members], probabilities,
            weights_of)

    def finish(self, **details: object) -> dict | None:
        """Merges everything finished into the result files and pictures, and prints figures and
        places; the results, on the rank that writes."""
        run, clips = self.run, self.data.clips
        distributed.barrier()  # the other ranks' subjects are finished too
        if not distributed.first():
            return None
        remove_leftovers(run.folder)  # a run killed among its pictures opens no log again
        missing = [name for name in self.todo
                   if not (run.folder / "subjects" / f"{name}.json").exists()]
        if missing:
            raise RunFailed(f"{run.folder}: {len(missing)} held-out subjects of other ranks are "
                            f"not there ({missing[0]} the first): --save_path must be a folder "
                            f"that all machines share")
        keys = {(dataset.DATABASES[c.database], c.subject, c.key)
                for c, is_blank in zip(clips.clips, self.blank()) if is_blank}
        results = result_files.write_results(
            run.folder, {**self.header, **details, **self.remarks(),
                         "rendered": bool(clips.encoding.get("rendered")),
                         "shortcuts": self.shortcuts()}, clips.n_label, clips.classes, keys)
        pictures.draw_results(run, results)
        self.draw_mistakes(run.folder / "mistakes.png", *result_files.read_mistakes(run.folder))
        print("\n".join([result_files.describe(results),
                         *shortcuts.describe(results["shortcuts"], clips.classes)]))
        run.print_places(results="results.json", predictions="predictions.csv",
                         confusion="confusion.png", mistakes="mistakes.png", curves="curves.png",
                         log="log.jsonl", **{"MEGC2019": "megc2019.log"} if
                         len(results["per_database"]) > 1 else {})
        return results

    def remarks(self) -> dict:
        """What the results say of everybody who is finished, besides the figures."""
        return {}

    def blank(self) -> np.ndarray:
        """bool `[N]`: the clips without any change."""
        return encoding.blank(self.data.images, self.data.clips.encoding["difference"])

    def shortcuts(self) -> dict:
        """What else the features tell: of head motion now, the rest as probing left it."""
        clips, path = self.data.clips, self.run.folder / "shortcuts.json"
        rows = [row for _, rows in result_files.read_subjects(self.run.folder).values()
                for row in rows]
        measured = {"head_motion": shortcuts.head_motion(clips, rows, clips.folder)}
        return measured | (json.loads(path.read_text()) if path.exists() else {})

    def draw_mistakes(self, path: Path, mistakes: list, counts: tuple) -> None:
        """mistakes.png, of what result_files.read_mistakes gives."""
        draw_mistakes(path, self.data.clips, self.data.images, mistakes, counts)


def draw_mistakes(path: Path, clips: ClipSet, images: object, mistakes: list, counts: tuple,
                  panels: Callable = pictures.change_panels,
                  maps_are: str = pictures.GRAD_CAM) -> None:
    """mistakes.png of what result_files.read_mistakes gives, images being of `clips`, with
    `panels(clips, images, places, maps)` of each."""
    place = {(dataset.DATABASES[c.database], c.subject, c.key): i
             for i, c in enumerate(clips.clips)}
    rows = [(row, maps, place.get((row["database"], row["subject"], row["key"])))
            for row, maps in mistakes]
    rows = [row for row in rows if row[-1] is not None]
    several = len({clip.database for clip in clips.clips}) > 1
    drawn = panels(clips, images, [i for *_, i in rows], [m for _, m, _ in rows]) if rows else []
    pictures.draw_mistakes(
        path, [(row | {"subject": f"{row['database']} {row['subject']}"} if several else row, own)
               for (row, *_), own in zip(rows, drawn)],
        counts, clips.classes, bool(clips.encoding.get("rendered")), maps_are)


class Everybody:
    """A training on every clip, for prediction, in place of HeldOut."""

    def __init__(self, run: Run, argv: list[str], script: str, data: Data):
        self.run, self.encoders = run, Encoders(run.opt, data.clips, [])
        self.header = make_header(run.opt, argv, script, data,
                                  self.encoders.sha256[self.encoders.source])
        open_run(run, self.header, {})
        self.encoders.check(self.encoders.source)  # a wrong one leaves no run folder behind
        self.states = checked_states(run, self.header, self.encoders,
                                     {"all": self.encoders.source})
        done = {name: state["epoch"] for name, state in self.states.items()}
        distributed.agree(done)
        self.log = open_log(run, self.header, {"all"}, done)


def train_frozen(held: HeldOut, group: Group, folds: Folds, recipe: probing.Recipe,
                 device: torch.device) -> tuple[Classifier, probing.Frozen]:
    """Trains the heads of the folds that hold out a Group, on its encoder as it is."""
    classifier = held.encoders.load(group.path).to(device)
    held_out = sorted(set(folds.of[held.data.clips.members(group.people)].tolist()))
    return classifier, probing.train_frozen(held.run.opt, classifier, held.data, folds, held_out,
                                            recipe, held.log, group.name)


def keep_frozen(held: HeldOut, group: Group, classifier: Classifier,
                trained: probing.Frozen) -> None:
    """Keeps the predictions of heads trained in one pass, and the maps of their mistakes."""
    members = held.data.clips.members(group.people)
    probabilities = trained.probabilities[members]
    held.keep(group, members, probabilities, lambda mine: trained.notes(members[mine]),
              held.maps_of_mistakes(classifier, members, probabilities, trained.weights_of))
    held.run.finished(group.name)
