"""Held-out persons: which encoder each gets, their run folder and log, heads on a frozen encoder.

What linear probing and fine-tuning share.
"""
import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import dataset
import util
from evaluation import gradcam, logistic, measures, pictures, probing, shortcuts
from images import decoding, transforms
from models import MODEL_NAMES, create_classifier, create_model, default_layer
from training import checkpoint, distributed, options
from util import BadInput

INNER_FOLDS = 5  # groups of training subjects that choose epochs and learning rate


def add_head_options(parser, stage, protocol):
    """Adds the data and model flags of the scripts that put a head on a pre-trained encoder;
    protocol: the one they follow by default.

    Returns both groups.
    """
    data, model = options.add_data_options(parser), parser.add_argument_group("model")
    data.add_argument("--dataset", choices=(*dataset.DATABASES, "all"), default="casme3",
                      help="the database in the lists to evaluate; all: every one of them")
    data.add_argument("--protocol", choices=("10fold", "loso"), default=protocol,
                      help="ten groups of whole subjects, or leave one subject out")
    model.add_argument("--model_path", required=True, metavar="FILE",
                       help=f"checkpoint of pre-train_DVSCL.py to {stage}; a {{subject}} or "
                            f"{{fold}} in it is replaced by the one held out, a {{seed}} by "
                            f"the seed; random: an untrained encoder")
    model.add_argument("--model", choices=MODEL_NAMES, default="alexnet", metavar="NAME",
                       help="its encoder: " + ", ".join(MODEL_NAMES))
    model.add_argument("--layer", type=options.positive_int,
                       help="tap of the encoder the head sits on [5 for AlexNet, 6 for ResNet]")
    model.add_argument("--encoder", choices=("both", "rgb", "depth"), default="both",
                       help="view whose features the head sees")
    return data, model


def add_penalty_option(group):
    """Adds --l2 of the heads that are solved for."""
    group.add_argument("--l2", type=options.number(float, 0, low_open=True), metavar="X",
                       help="L2 penalty of a head, for features of unit length [of "
                            + " ".join(f"{x:g}" for x in probing.GRID) + " the one that does best "
                            "on inner folds of the training subjects]")


def add_result_options(parser):
    """Adds what else is measured: several seeds, and the curve that nobody may choose by."""
    group = parser.add_argument_group("results")
    group.add_argument("--seeds", nargs="+", type=options.number(int, 0, 2 ** 62), metavar="N",
                       help="run each of these seeds and report mean and standard deviation "
                            "[--seed alone]")
    group.add_argument("--oracle_curve", action="store_true",
                       help="TensorBoard (under oracle/) and curves.png also show the pooled "
                            "figures of the held-out subjects per epoch; picking by them is "
                            "cheating")


def check_options(parser, opt):
    """Fills in the model's own layer where none is given; refuses one out of range, seeds of which
    no deviation can be had, and placeholders that the protocol cannot fill."""
    if opt.seeds and (len(opt.seeds) < 2 or len(set(opt.seeds)) < len(opt.seeds)):
        parser.error("argument --seeds: give two or more, each once; --seed for a single one")
    if opt.protocol == "10fold" and "{subject}" in opt.model_path:
        parser.error("argument --model_path: {subject} goes with --protocol loso, {fold} with both")
    options.check_size(parser, opt)
    if opt.layer is None:
        opt.layer = default_layer(opt.model)
        print(f"heads on layer {opt.layer} of {opt.model}")
    options.check_layer(parser, opt)


def split(opt, clips):
    """(names `[F]`, fold of each clip `[N]`) of --protocol; raises BadInput for one subject."""
    names, fold_of = (dataset.subject_folds if opt.protocol == "loso" else dataset.ten_folds)(clips)
    if len(names) < 2:
        raise BadInput(f"{clips.folder}: one subject; held-out evaluation takes two")
    return names, fold_of


def read_labelled(opt):
    """(ClipSet of --dataset, uint8 array `[N, C, S, S]`, its digest)"""
    clips = dataset.read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    if opt.dataset != "all":
        wanted = dataset.DATABASES.index(opt.dataset)
        held = sorted({dataset.DATABASES[c.database] for c in clips.clips})
        if opt.dataset not in held:
            raise BadInput(f"--dataset {opt.dataset}: the lists hold {', '.join(held)}")
        if len(held) > 1:
            print(f"{opt.dataset} alone, of {', '.join(held)}; --dataset all takes every one")
        clips = clips.subset([c.database == wanted for c in clips.clips])
    with distributed.in_turn():
        images, digest = decoding.load_images(clips, opt.cache, opt.num_workers,
                                              opt.size)
    return clips, images, digest


def checkpoint_for(opt, clips, person):
    """--model_path for one held-out person: {subject} and {fold} filled in."""
    path = opt.model_path
    if "{fold}" in path:
        lists = clips.origin or clips  # the folds that pre-training made
        names, fold_of = dataset.ten_folds(lists)
        path = path.replace("{fold}", names[fold_of[lists.members([person])[0]]])
    return path.replace("{subject}", dataset.person_name(person, clips))


def create_head(opt, clips):
    """A fresh linear head for the options and clips of a run."""
    return create_classifier(opt.model, opt.layer, clips.n_label, clips.channels, opt.encoder,
                             opt.size)


def load_encoder(opt, path, clips):
    """(encoder, about) from a checkpoint, on the CPU.

    about: `normalization` (the checkpoint's; the published one where it has none), `people` the
    encoder is known to have seen, and whether they are `all`. Raises BadInput for a checkpoint of
    another model, view, encoding or other classes.
    """
    encoding = clips.encoding["difference"]
    if path == "random":
        torch.manual_seed(opt.seed)
        about = {"normalization": transforms.fixed_normalization(encoding, clips.channels,
                                                                 clips.second),
                 "people": set(), "all": True}
        return create_model(opt.model, in_channels=clips.channels, size=opt.size), about
    state = checkpoint.load(path)
    old = state.get("encoding") or {}
    for what, ours, theirs in (("--view", opt.view, state["opt"].get("view", opt.view)),
                               ("--size", opt.size, state["opt"].get("size", decoding.CROP)),
                               ("difference", encoding, old.get("difference", encoding)),
                               ("classes", clips.encoding.get("classes"), old.get("classes"))):
        if ours != theirs and None not in (ours, theirs):
            raise BadInput(f"{path}: trained with {what} {theirs}, but the data have {ours}")
    model = create_model(opt.model, state["opt"].get("feat_dim", 128), clips.channels, opt.size)
    checkpoint.load_model(model, state, path, opt.model)
    normalization = state.get("normalization") or transforms.fixed_normalization(
        "wrap", clips.channels, clips.second)
    try:
        people, all_of_them = people_seen(state.get("seen"))
        mean, std = np.float64(normalization["mean"]), np.float64(normalization["std"])
        lengths = {len(mean), len(std)} if np.isfinite([mean, std]).all() and (std > 0).all() \
            else set()
        normalization = {"mean": mean.tolist(), "std": std.tolist()}
    except (KeyError, TypeError, ValueError):
        lengths = set()
    if lengths != {sum(clips.channels)}:
        raise BadInput(f"{path}: its 'seen' or 'normalization' cannot be read; take a checkpoint "
                       f"that pre-train_DVSCL.py wrote")
    return model, {"normalization": normalization, "people": people, "all": all_of_them}


def people_seen(seen):
    """(persons known to be among those that an encoder saw, whether they are all) from what its
    checkpoint says of them."""
    if not seen:
        return set(), False
    # no list: some clip names no subject; checkpoints that list all the same hold an empty name
    listed = [*seen.get("named", ()), (0, "")] if seen["people"] is None else seen["people"]
    people = {(int(d), str(s)) for d, s in listed}
    named = {person for person in people if person[1].strip()}
    return named, named == people


# ---------------------------------------------------------------- held-out persons and results

class Group(NamedTuple):
    """What is trained in one go: from the checkpoint `path`, for the results of `people`, under
    the name `unit` in the log; `out`: who is held out, those of `people` and who shares their
    fold and is finished."""
    path: str
    people: list
    unit: str
    out: list


class HeldOut:
    """A run over held-out persons: its folder, its log, who is left to do, and the results.

    stage: 'probe' or 'finetune'; parts: what of the options joins in the run's name; folds:
    (names, fold of each clip `[N]`), a training for each; None: those of one checkpoint are
    trained in one pass. Raises BadInput.
    """

    def __init__(self, stage, opt, argv, script, clips, digest, parts, folds=None):
        self.opt, self.clips, self.folds, self.seen = opt, clips, folds, {}
        name = util.head_run_name(stage, opt, parts)
        self.folder = Path(opt.save_path) / name
        self.curves = util.curve_folder(opt, opt.save_path, name)
        self.all = opt.subject == ["all"]
        wanted = dataset.find_people(opt.subject, clips) if opt.subject and not self.all else \
            clips.people
        paths = {person: checkpoint_for(opt, clips, person) for person in wanted}
        if self.all and "{" in opt.model_path:
            raise BadInput(f"--model_path {opt.model_path}: --subject all holds nobody out; name "
                           f"one checkpoint")
        self.sha256 = {"random": None}
        for path in dict.fromkeys([*paths.values(), *[opt.model_path] * self.all]):
            if path != "random" and not Path(path).is_file():
                raise BadInput(f"--model_path {path}: no such checkpoint")
            if path not in self.sha256:
                self.sha256[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.header = util.header(
            script, opt, argv, list_digest=clips.digest(),
            data_digest=hashlib.sha256((clips.digest() + digest).encode()).hexdigest(),
            checkpoint_sha256=self.sha256.get(opt.model_path))
        done = measures.open_results(self.folder, opt, self.header,
                                    {dataset.person_name(p, clips): self.sha256[path]
                                     for p, path in paths.items()})
        todo = [p for p in wanted if dataset.person_name(p, clips) not in done]
        self.todo = [dataset.person_name(p, clips) for p in todo]
        if len(todo) < len(wanted):
            print(f"{len(wanted) - len(todo)} of {len(wanted)} held-out subjects are finished")
        if opt.resume not in (None, "auto") and not Path(opt.resume).is_file():
            raise BadInput(f"--resume {opt.resume}: no such checkpoint")
        if self.all:
            groups = [Group(opt.model_path, [], "all", [])]
            self.groups = groups if distributed.first() else []
        else:
            groups = self._groups(todo, paths)
            self.groups = distributed.share(groups) if folds else \
                self._groups(distributed.share(todo), paths)
        if self.groups:
            self.encoder(self.groups[0].path)  # a wrong checkpoint leaves no run folder behind
        distributed.barrier()
        self.log = self._open_log({group.unit for group in groups} or {None}) if todo else None

    def _groups(self, todo, paths):
        """The Groups that train for the persons in `todo`."""
        groups = {}
        for person in todo:
            fold = self._fold(person) if self.folds else None
            groups.setdefault((paths[person], fold), []).append(person)
        if not self.folds:
            return [Group(path, people, self._unit(people), people)
                    for (path, _), people in groups.items()]
        return [Group(path, people, self.folds[0][fold],
                      [p for p in self.clips.people if self._fold(p) == fold])
                for (path, fold), people in groups.items()]

    def _fold(self, person):
        return int(self.folds[1][self.clips.members([person])[0]])

    def last(self, unit=None):
        """The checkpoint of a unit in training; last.pth is that of everybody, and of the unit
        that was finished last. So ranks and jobs in one folder keep out of each other's way."""
        return self.folder / ("last.pth" if unit in (None, "all") else f"last_{unit}.pth")

    def finished(self, unit):
        """A unit's persons are all kept: its checkpoint makes room."""
        if self.last(unit).exists():
            os.replace(self.last(unit), self.last())

    def _unit(self, people):
        """Name of a group in the log: None for everybody, else it tells any two groups apart."""
        names = [dataset.person_name(p, self.clips) for p in people]
        if len(people) == len(self.clips.people) or len(people) == 1:
            return names[0] if len(people) == 1 else None
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
        return f"{names[0]}_and_{len(names) - 1}_more_{digest}"

    def _open_log(self, units):
        """The log, cut back to what finished subjects and the last checkpoints account for.

        units: names of what is still to be trained. Rank 0 writes the file, the others append.
        """
        done = {state["unit"]: state["epoch"] for state in self.states(units)}
        log = None
        if distributed.first():
            log = util.Log(self.folder, self.curves, self.header, lambda line: (
                line.get("subject") not in units
                or line["epoch"] <= done.get(line.get("subject"), 0)))
        distributed.barrier()
        return log or util.Log(self.folder, self.curves, None)

    def states(self, units):
        """The checkpoints that --resume means: the file given, or those of `units`."""
        if not self.opt.resume:
            return
        paths = {self.last(unit) for unit in (*units, None)}
        if not self.folds:  # they may lie among others
            paths |= set(self.folder.glob("last*.pth"))
        for path in sorted(filter(Path.exists, paths)) if self.opt.resume == "auto" else \
                [Path(self.opt.resume)]:
            state = checkpoint.load(path)
            checkpoint.check_resumable(path, state, self.opt,
                                       data_digest=self.header["data_digest"])
            if "mean" not in state.get("classifier", state["model"]):
                raise BadInput(f"{path}: comes from before heads standardised their features; its "
                               f"run cannot go on: start it anew without --resume")
            if state.get("encoder_sha256") not in self.sha256.values():
                raise BadInput(f"{path}: was trained on another checkpoint than --model_path "
                               f"{self.opt.model_path}; give another --tag, or remove it")
            yield state

    def state(self, unit, folds=()):
        """The checkpoint to go on from in `unit`, or in these `folds` of a unit whose others are
        finished; or None."""
        for state in self.states([unit]):
            if state["unit"] == unit or folds and set(folds) <= set(state.get("folds") or ()):
                print(f"{unit or 'heads'}: goes on after epoch {state['epoch']}")
                return state
        return None

    def encoder(self, path):
        """`load_encoder`'s (encoder, about) of a group; remembers whom the encoder saw."""
        model, about = load_encoder(self.opt, path, self.clips)
        self.seen[path] = about
        return model, about

    def look(self, group, model, head, images, members, probabilities, device, weights_of):
        """Adds maps of where the model looked in the clips of `members` that it is most confidently
        wrong about (gradcam.maps_of_mistakes), for the people of a Group. Reads their labels,
        hence after `keep`."""
        clips = self.clips
        maps = gradcam.maps_of_mistakes(
            model, head, images, members, clips.labels[members], probabilities,
            self.seen[group.path]["normalization"], self.opt.layer, device, weights_of)
        for person in group.people:
            own = {clips.clips[i].key: maps[i] for i in clips.members([person]) if i in maps}
            if own:
                measures.add_to_subject(self.folder, dataset.person_name(person, clips), maps=own)

    def keep(self, path, person, members, probabilities, **notes):
        """Keeps a person's predictions, probabilities `[len(members), C]`, and `notes` on them."""
        if not np.isfinite(probabilities).all():
            raise util.RunFailed(f"the predictions for {dataset.person_name(person, self.clips)} "
                                 f"are not finite; lower --learning_rate")
        seen = self.seen[path]
        known = any(dataset.same_person(person, other) for other in seen["people"])
        transductive = known or (False if seen["all"] else None)
        measures.write_subject(
            self.folder, dataset.person_name(person, self.clips),
            measures.rows_of(self.clips, members, probabilities), transductive=transductive,
            checkpoint=None if path == "random" else path, sha256=self.sha256[path],
            made_by={name: self.header[name] for name in ("command", "versions")},
            **notes)

    def keep_frozen(self, group, found):
        """Keeps the predictions of a Frozen for each person of a Group."""
        for person in group.people:
            members = self.clips.members([person])
            self.keep(group.path, person, members, found.probabilities[members],
                      **found.notes(members))
        found.look()

    def finish(self, images, **about):
        """Merges everything finished into the result files and pictures, and prints figures and
        places. images: uint8 array `[N, C, S, S]`."""
        clips = self.clips
        distributed.barrier()  # the other ranks' subjects are finished too
        if not distributed.first():
            return
        if self.all:
            pictures.draw_curves(self.folder)
            print(f"checkpoint   {self.last()}\nlog          {self.folder / 'log.jsonl'}\n"
                  f"curves       {self.folder / 'curves.png'}\n"
                  f"TensorBoard  tensorboard --logdir {self.curves.parent}")
            return
        missing = [name for name in self.todo
                   if not (self.folder / "subjects" / f"{name}.json").exists()]
        if missing:
            raise util.RunFailed(f"{self.folder}: {len(missing)} held-out subjects of other ranks "
                                 f"are not there ({missing[0]} the first): --save_path must be a "
                                 f"folder that all machines share")
        blank = decoding.blank(images, clips.encoding)
        keys = {(dataset.DATABASES[c.database], c.subject, c.key)
                for c, is_blank in zip(clips.clips, blank) if is_blank}
        about["rendered"] = bool(clips.encoding.get("rendered"))
        rows = [row for _, rows in measures.read_subjects(self.folder).values() for row in rows]
        about["shortcuts"] = {"head_motion": shortcuts.head_motion(clips, rows, clips.folder)}
        known = self.folder / "shortcuts.json"
        if known.exists():
            about["shortcuts"] |= json.loads(known.read_text())
        results = measures.write_results(self.folder, {**self.header, **about}, clips.n_label,
                                        clips.classes, keys)
        held_out = {}
        if self.opt.oracle_curve and "oracle_best_epoch" in results:
            each = measures.epochs_of(self.folder, clips.n_label)
            held_out = {f"{pictures.ORACLE}{name}": [of[name] for of in each]
                        for name in measures.MEASURES}
            util.Log(self.folder, self.curves, None).curves(held_out)
        pictures.draw_curves(self.folder, held_out)
        pictures.draw_mistakes(self.folder / "mistakes.png", clips, images,
                               *measures.read_mistakes(self.folder))
        print("\n".join([measures.describe(results),
                         *shortcuts.describe(results["shortcuts"], clips.classes)]))
        for what, place in (("results", "results.json"), ("predictions", "predictions.csv"),
                            ("confusion", "confusion.png"), ("mistakes", "mistakes.png"),
                            ("curves", "curves.png"), ("log", "log.jsonl"),
                            *[("MEGC2019", "megc2019.log")] * (len(results["per_database"]) > 1)):
            print(f"{what:12s} {self.folder / place}")
        print(f"TensorBoard  tensorboard --logdir {self.curves.parent}")
        return results


def over_seeds(opt, run):
    """Calls `run(opt)`, which returns (run folder, results or None), for every one of --seeds, and
    writes and prints mean and standard deviation over them."""
    found = []
    for seed in opt.seeds or [opt.seed]:
        path = opt.model_path.replace("{seed}", str(seed))
        found.append(run(argparse.Namespace(**{**vars(opt), "seed": seed, "model_path": path})))
    results = [results for _, results in found if results]
    if not opt.seeds or not results:
        return
    figures = measures.over_seeds(results)
    head, _, tail = found[0][0].name.rpartition(f"_seed_{opt.seeds[0]}")
    path = found[0][0].with_name(f"{head}_seeds_{'_'.join(map(str, opt.seeds))}{tail}.json")
    util.write_json(path, {"seeds": opt.seeds, "runs": [folder.name for folder, _ in found],
                           **{name: {"mean": mean, "std": deviation}
                              for name, (mean, deviation) in figures.items()}})
    print(f"over seeds {' '.join(map(str, opt.seeds))}: " + ", ".join(
        f"{name} {mean:.3f} ± {deviation:.3f}" for name, (mean, deviation) in figures.items())
        + f"\nseeds        {path}")


class Frozen(NamedTuple):
    """Heads trained on a frozen encoder, and what they were trained on."""
    heads: probing.FoldHeads
    probabilities: np.ndarray  # [N, C], NaN where none of these heads holds the clip out
    notes: Callable  # members → what the results say of the held-out clips besides
    look: Callable  # adds the maps of mistakes to what was kept
    features: torch.Tensor  # [V, N, D]
    embedded: torch.Tensor  # [2, N, feat_dim], unit features of both views
    positions: int
    l2: list  # penalty of each fold's head; None where they have none


def _go_on(state, folds, heads, inner):
    """Restores `heads`, and an InnerFolds, from a checkpoint that holds these `folds` and maybe
    others; (epochs done, history), or (0, None) without one."""
    if not state:
        return 0, None
    known = state.get("folds") or folds
    mine = [known.index(name) for name in folds]
    heads.load_state_dict({name: value.unflatten(0, (len(known), -1))[mine].flatten(0, 1)
                           for name, value in state["model"].items()})
    if inner:
        inner.state = {name: value[mine] for name, value in state["inner"].items()}
    return state["epoch"], state["history"]


def inner_groups(clips):
    """The group `[N]` of each clip in the inner folds, which are whole subjects."""
    # stratified, the labels of a held-out clip would move training subjects between groups
    return dataset.ten_folds(clips, INNER_FOLDS, stratified=False)[1]


def train_frozen(opt, held, group, images, names, fold_of, device, solver="lbfgs", views=2,
                 loss="crossentropy", start="random", rates=None):
    """Encodes every clip with one checkpoint and trains the heads of one of `held.groups`.

    names `[F]`, fold_of `[N]`: the folds; solver: 'lbfgs': the heads that minimise the loss with
    the penalty opt.l2; 'sgd': heads trained by SGD, from those (start: 'probe'), from zeros or
    from random ones; rates: of which inner folds choose one, and the number of epochs
    (probing.InnerFolds). Returns a Frozen.
    """
    clips, (model, about) = held.clips, held.encoder(group.path)
    # a fold that no clip has: the head of --subject all holds nothing out
    held_out = sorted(set(fold_of[clips.members(group.people)].tolist())) if group.people \
        else [len(names)]
    pooling = create_head(opt, clips)
    model.to(device)
    with checkpoint.frozen(model):
        features, positions, embedded = probing.encode(
            model, pooling.to(device), images, about["normalization"], opt.layer, device,
            util.mixed_precision(opt, device)[0], views)
    folds = [[*names, "all"][f] for f in held_out]
    job = features, clips.labels, fold_of, held_out
    choice = None
    if solver == "lbfgs" or start == "probe":
        heads, choice = probing.solve_heads(
            logistic.Regression(features, clips.labels, clips.n_label), *job, opt.l2,
            inner_groups(clips), loss)
        describe_choice(opt, choice)
    if solver == "lbfgs":
        for number, tried in enumerate(choice.tried, 1):
            held.log.epoch(number, tried, group.unit)
        notes = {fold: {"choice": {"l2": l2, **({} if uf1 is None else {"inner_uf1": uf1})}}
                 for fold, l2, uf1 in zip(held_out, choice.l2, choice.uf1)}
        history = None
    else:
        initial = None
        if start == "probe":
            initial = heads.weight.detach(), heads.bias.detach()
        elif start == "zero":
            initial = [torch.zeros(len(folds), clips.n_label, *shape)
                       for shape in ((features.shape[-1],), ())]
        heads, history, notes = _descend(opt, held, group, job, positions, folds, loss, rates,
                                         initial, choice and choice.l2)
    probabilities = probing.predict(heads, features, fold_of, held_out)

    def notes_on(members):
        return notes[fold_of[members[0]]] if history is None else \
            {"history": history[:, members].t().tolist()}

    def look():
        members, weight = clips.members(group.people), heads.plain()[0]
        held.look(group, model, pooling, images, members, probabilities[members], device,
                  lambda i, c: weight[held_out.index(fold_of[i]), c])
    return Frozen(heads, probabilities, notes_on, look, features, embedded, positions,
                  choice and choice.l2)


def describe_choice(opt, choice):
    """Says which penalty the heads have."""
    low, high = min(choice.l2), max(choice.l2)
    print(f"heads solved with --l2 {low:g}" + (f" to {high:g}" if high > low else "")
          + ("" if opt.l2 is not None or choice.uf1[0] is None else ", chosen by inner folds"))


def _descend(opt, held, group, job, positions, folds, loss, rates, start, l2):
    """The heads of a group by SGD: (heads, history int16 `[E, N]` or None, notes by fold)."""
    features, labels, fold_of, held_out = job
    clips, inner, names = held.clips, None, folds
    training = probing.training_clips(fold_of, held_out)
    if rates:
        inner = probing.InnerFolds(folds, labels, clips.n_label, fold_of, held_out,
                                   inner_groups(clips), rates)
        names = inner.names
        training = probing.training_clips(fold_of, inner.held_out) & torch.from_numpy(
            inner.allowed)
    heads = probing.FoldHeads(names, logistic.statistics(features, training), clips.n_label,
                              opt.seed, start)
    first, history = _go_on(held.state(group.unit, folds), folds, heads, inner)
    if history is None:
        history = torch.full((opt.epochs, len(clips)), -1, dtype=torch.int16)
    bar = tqdm(total=opt.epochs - first, desc="heads", disable=None)

    def on_epoch(epoch, means):
        def save():
            checkpoint.save(held.last(group.unit), {
                "opt": vars(opt), "epoch": epoch, "unit": group.unit, "folds": folds,
                "model": heads.state_dict(), "normalization":
                held.seen[group.path]["normalization"], "encoding": clips.encoding,
                "data_digest": held.header["data_digest"], "history": history,
                "inner": inner.state if inner else None,
                "encoder_sha256": held.sha256[group.path]})

        if inner:
            inner.look(epoch, heads, features)
        elif group.people:  # to know what picking an epoch by the held-out clips would add
            said = probing.predict(heads, features, fold_of, held_out)
            history[epoch - 1] = torch.from_numpy(np.where(np.isnan(said[:, 0]), -1,
                                                           said.argmax(1)))
        if not inner:
            means["learning_rate"] = util.scheduled(opt, opt.learning_rate, epoch, 1, 1)
        held.log.epoch(epoch, means, group.unit)
        bar.update()
        if epoch % opt.print_freq == 0 or epoch == opt.epochs:
            tqdm.write(util.epoch_line(opt, epoch, means))
        if epoch % opt.save_freq == 0 or epoch == opt.epochs:
            save()
        keeper.step(save)

    with checkpoint.Keeper(opt.save_minutes) as keeper:
        probing.train_heads(heads, features, positions, labels, fold_of,
                            inner.held_out if inner else held_out, opt, loss, first, on_epoch,
                            inner, l2)
    bar.close()
    if not inner:
        return heads, history, None
    inner.keep_best(heads)
    return heads, None, {fold: {"choice": inner.chosen(fold)} for fold in held_out}


def validate(opt, images, members, normalization, model, head, autocast, device):
    """Probabilities `[len(members), C]` from the plain centre crop; nothing random."""
    model.eval()
    head.eval()
    found = []
    with torch.no_grad():
        parts = np.array_split(members, -(-len(members) // opt.batch_size))
        for batch in decoding.fetch(images, parts, device):
            batch = transforms.eval_transform(batch, normalization)
            with autocast():
                logits = head(*model(batch, opt.layer))
            found.append(logits.float().softmax(1).cpu().numpy())
    return np.concatenate(found)
