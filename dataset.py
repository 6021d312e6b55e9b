"""Clips of several views: which there are, whose they are, and how persons make folds.

A clip is an image per view, for DVSCL a difference image in RGB and one of a second view.
"""
import argparse
import functools
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from images import cache, decoding, encoding, lists, videos
from images.lists import DATABASES, natural
from util import BadInput, ensure, read_table

PAIR_COLUMNS = ("rgb", "depth", "database", "subject", "video", "onset", "apex", "intensity",
                "unit", "head_motion")
VIDEO_COLUMNS = ("database", "subject", "key", "label", "units")


@dataclass(frozen=True)
class Clip:
    """One clip: `label` -1 where unlabelled; `paths`: of each view, relative to the data folder."""
    database: int
    subject: str
    key: str
    label: int
    paths: tuple

    @property
    def person(self) -> tuple[int, str]:
        """(database, subject): the unit of every split."""
        return self.database, self.subject


@dataclass
class ClipSet:
    """The clips of a data set, sorted by (database, subject, key), and what is known of them.

    views: their names, such as rgb and depth; channels of each; encoding: what encoding.json or
    --encoding says; luminance: the second view is computed from the first; origin: the set that a
    subset was taken from.
    """
    clips: list
    folder: Path
    views: tuple
    channels: tuple
    encoding: dict
    n_label: int = 0
    luminance: bool = False
    origin: "ClipSet" = None

    def __len__(self):
        return len(self.clips)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64 `[N]`"""
        return np.array([clip.label for clip in self.clips], dtype=np.int64)

    @functools.cached_property
    def by_person(self) -> dict[tuple, np.ndarray]:
        """Indices int64 of the clips of each (database, subject), sorted by these."""
        places = {}
        for i, clip in enumerate(self.clips):
            places.setdefault(clip.person, []).append(i)
        return {person: np.array(places[person], dtype=np.int64) for person in sorted(places)}

    @functools.cached_property
    def people(self) -> list[tuple]:
        """Sorted (database, subject) pairs."""
        return list(self.by_person)

    @functools.cached_property
    def names(self) -> dict[tuple, str]:
        """What each person is called in names of files and folds: 'spNO1', or 'casme2_sub01' where
        the lists hold several databases."""
        several = len({database for database, _ in (self.origin or self).by_person}) > 1
        return {person: f"{DATABASES[person[0]]}_{person[1]}" if several else person[1]
                for person in self.by_person}

    @functools.cached_property
    def classes(self) -> list[str]:
        """Class names in the order of their ids."""
        return self.encoding.get("classes") or [str(i) for i in range(self.n_label)]

    def members(self, people: Iterable[tuple]) -> np.ndarray:
        """Indices int64 of the clips of these (database, subject) pairs."""
        own = [self.by_person[person] for person in set(people) & self.by_person.keys()]
        return np.sort(np.concatenate([np.empty(0, np.int64), *own]))

    def subset(self, keep: Iterable[bool]) -> "ClipSet":
        """The clips where `keep` (bool `[N]`) holds."""
        return replace(self, clips=[clip for clip, k in zip(self.clips, keep) if k],
                       origin=self.origin or self)

    def digest(self) -> str:
        """SHA-256 of what the lists say (persons, keys, labels), whatever their order."""
        rows = [[c.database, c.subject, c.key, c.label] for c in self.clips]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class Data(NamedTuple):
    """Clips, their decoded images uint8 `[N, C, S, S]`, and the digest of these."""
    clips: ClipSet
    images: np.ndarray
    digest: str


def load_images(clips: ClipSet, folder: str = "off", num_workers: int = 4,
                size: int = decoding.CROP) -> tuple[np.ndarray, str]:
    """Every clip of a ClipSet decoded once (cache.cached): (uint8 array `[N, C, S, S]`, digest).

    size: of the crops to be taken of them, pixels, for which S is 8/7 of it.
    """
    side, difference = decoding.stored_side(size), clips.encoding["difference"]
    shape = sum(clips.channels), side, side
    files = [[clips.folder / path for path in clip.paths] for clip in clips.clips]
    stamp = cache.stamp([path for paths in files for path in paths], clips.luminance, difference,
                        (len(clips), *shape))
    return cache.cached(files, lambda paths: decoding.decode(
        paths, clips.channels, difference, side, clips.luminance), shape, np.uint8, stamp, folder,
        num_workers)


# ---------------------------------------------------------------- reading

def read_clips(data_folder: str | Path, list_folder: str | Path | None = None, view: str = "RGB_D",
               difference: str | None = None) -> ClipSet:
    """Reads, pairs and checks the lists of a data set.

    difference: what --encoding says. Raises BadInput as soon as something does not hold: a missing
    or empty list, a malformed row, a clip in two lists, a subject on both sides, a clip without
    partner, labels that differ between views or are not exactly 0..C-1, a missing image.
    """
    place, data_folder = lists.find_list_folder(data_folder, list_folder), Path(data_folder)
    names = lists.view_names(view)
    luminance = view == "RGB_gray" and not (place / "v_gray").is_dir()
    views = lists.read_views(place, names[:1 if luminance else 2], names)
    paths = [lists.relative(data_folder, {row[0]: row[4] for row in view.values()})
             for view in views]
    content = encoding.read_encoding(place, difference)
    clips = [Clip(row[2], row[3], key, row[1], _of_views(
        [path[view[key][0]] for path, view in zip(paths, views)])) for key, row in views[0].items()]
    return _clip_set(clips, data_folder, names, luminance, content, place)


def read_videos(folder: str | Path, size: int, sides: bool) -> tuple[Data, list[frozenset]]:
    """(the clips of a folder that prepare.py casme2 wrote, with their Videos as images; the action
    units of each).

    size: of the frames, pixels; sides: keep the units of left and right apart. Raises BadInput.
    """
    folder, unknown = Path(folder), {}
    arrays = videos.read_videos(folder, size)
    rows, _ = read_table(folder / "clips.csv", VIDEO_COLUMNS, fix="run prepare.py casme2 again")
    clips, units = [], []
    for place, row in rows:
        try:
            clips.append(Clip(DATABASES.index(row["database"]), row["subject"], row["key"],
                              int(row["label"]), ()))
        except ValueError:
            raise BadInput(f"{place}: database or label cannot be read; run prepare.py casme2 "
                           f"again") from None
        shown, marks = videos.read_units(row["units"], sides)
        units.append(shown)
        for mark in marks:
            unknown.setdefault(mark, []).append(row["key"])
    if len(clips) != len(arrays.index) or clips != sorted(
            clips, key=lambda c: (c.database, c.subject, c.key)):
        raise BadInput(f"{folder / 'clips.csv'}: not the {len(arrays.index)} clips of flow.npy in "
                       f"their order; run prepare.py casme2 again")
    classes, info = arrays.info["classes"], arrays.info
    empty = [name for i, name in enumerate(classes) if i not in {clip.label for clip in clips}]
    strange = [clip for clip in clips if not 0 <= clip.label < len(classes)]
    if strange:
        raise BadInput(f"{folder / 'clips.csv'}: label {strange[0].label} of {strange[0].key} is "
                       f"none of 0 to {len(classes) - 1}; run prepare.py casme2 again")
    if empty:
        raise BadInput(f"{folder / 'clips.csv'}: no clip of class {', '.join(empty)}; training "
                       f"takes some of each")
    for mark, keys in unknown.items():
        print(f"action unit {mark!r} of {len(keys)} clips ({keys[0]} the first) is none; left out")
    encoding = {"classes": classes, "rendered": info.get("rendered", False)}
    content = ClipSet(clips, folder, ("flow",), (2,), encoding, len(classes))
    return Data(content, arrays, arrays.digest), units


def _of_views(paths):
    """The paths of both views; the luminance comes of the first one's file."""
    return (*paths, *paths[:2 - len(paths)])


def _clip_set(clips, folder, views, luminance, content, place):
    """Sorts clips, derives classes and channels; content: of encoding.json; place: of the lists."""
    clips.sort(key=lambda c: (c.database, c.subject, c.key))
    labels = {clip.label for clip in clips} - {-1}
    n_label = len(labels)
    if labels != set(range(n_label)):
        raise BadInput(f"{place}: labels over all test lists are {sorted(labels)}, out of range: "
                       f"they must be exactly 0..{n_label - 1}")
    if labels and "classes" in content and len(content["classes"]) != n_label:
        raise BadInput(f"{place / 'encoding.json'}: names {len(content['classes'])} classes, the "
                       f"lists hold {n_label}")
    return ClipSet(clips, folder, views, _channels(folder, clips, views, luminance), content,
                   n_label, luminance)


def _channels(folder, clips, views, luminance):
    """Channels of each view: 1 for a later view that is grey."""
    def count(number, view):
        if luminance or view in ("depth", "gray"):
            return 1
        image = decoding.open_image(folder / clips[0].paths[number])
        return 3 if image.mode.startswith("RGB") else 1
    return (3, *(count(number, view) for number, view in enumerate(views[1:], 1)))


def read_list(path: str | Path, data_folder: str | Path, view: str = "RGB_D",
              difference: str | None = None, alone: bool = False) -> ClipSet:
    """The clips of one list `<folder>/v_rgb/<name>` and of the same name in the second view's
    folder, in the order of the list, without subjects and classes.

    alone: the second view may be missing; the luminance then stands in for it. Raises BadInput.
    """
    path, data_folder, names = Path(path), Path(data_folder), lists.view_names(view)
    if not data_folder.is_dir():
        raise BadInput(f"{data_folder}: no such folder; --data_folder is where the images are")
    if not path.is_file():
        raise BadInput(f"{path}: no such list")
    place = path.resolve().parent.parent
    partner = place / f"v_{names[1]}" / path.name
    luminance = (view == "RGB_gray" and not partner.parent.is_dir()) \
        or (alone and not partner.is_file())
    if not luminance and not partner.is_file():
        raise BadInput(f"{path}: the second view's list {partner} is missing; a list lies in a "
                       f"folder v_rgb, its partner under the same name in v_{names[1]} beside it")
    views = []
    for file in (path,) if luminance else (path, partner):
        rows = lists.read_rows(file)
        try:
            keys = lists.clip_keys([row[0] for row in rows], ("rgb", "gray", "depth", names[1]))
        except ValueError as error:
            raise BadInput(f"{file}: {error}; remove one of the rows") from None
        paths = lists.relative(data_folder, {name: f"{file}:{n}" for name, _, _, n in rows})
        views.append({keys[name]: (paths[name], label, database)
                      for name, label, database, _ in rows})
    lists.check_paired(path, names, views)
    clips = [Clip(database, "", key, label, _of_views([view[key][0] for view in views]))
             for key, (_, label, database) in views[0].items()]
    if not (place / "encoding.json").exists():
        difference = difference or "wrap"
    return ClipSet(clips, data_folder, names, _channels(data_folder, clips, names, luminance),
                   encoding.read_encoding(place, difference), luminance=luminance)


def read_pairs(path: str | Path, data_folder: str | Path, view: str = "RGB_D",
               difference: str | None = None, min_intensity: float | None = None) -> ClipSet:
    """Unlabelled pairs of `pairs.tsv` (columns PAIR_COLUMNS).

    min_intensity: keep pairs of at least this intensity, in the file's own unit. A subject is ''
    where the file names none. Raises BadInput.
    """
    path, data_folder, names = Path(path), Path(data_folder), lists.view_names(view)
    rows, columns = read_table(path, delimiter="\t", fix="--pairs names a pairs.tsv")
    luminance = view == "RGB_gray" and "gray" not in columns
    wanted = names[:1] if luminance else names
    for needed in (*wanted, *["intensity"] * (min_intensity is not None)):
        if needed not in columns:
            raise BadInput(f"{path}:1: no column {needed!r}; the header is {' '.join(PAIR_COLUMNS)}"
                           f", tab-separated")
    clips, where = [], {}
    for place, row in rows:
        if clip := _pair(row, wanted, place, min_intensity):
            name = clip.paths[0]
            if where.setdefault(name, place) != place:
                raise BadInput(f"{place}: {name} is named in {where[name]} already")
            clips.append(clip)
    if not clips:
        raise BadInput(f"{path}: no pair" + (f" of intensity {min_intensity:g} or more"
                                             if min_intensity is not None else ""))
    paths = [lists.relative(data_folder, {c.paths[v]: where[c.paths[0]] for c in clips})
             for v in range(len(wanted))]
    clips = [replace(c, paths=_of_views([of_view[p] for of_view, p in zip(paths, c.paths)]))
             for c in clips]
    return _clip_set(clips, data_folder, names, luminance,
                     encoding.read_encoding(path.parent, difference), path.parent)


def _pair(row, views, where, min_intensity):
    """One row of pairs.tsv as a Clip; None below the intensity wanted."""
    if not all(row[view] for view in views):
        raise BadInput(f"{where}: not as many fields as the header, or an empty path")
    if min_intensity is not None:
        try:
            intensity = float(row["intensity"])
            ensure(not math.isnan(intensity))
        except ValueError:
            raise BadInput(f"{where}: intensity {row['intensity']!r} is not a number") from None
        if intensity < min_intensity:
            return None
    database = row.get("database") or "casme3"
    if database.isdecimal() and int(database) < len(DATABASES):
        database = DATABASES[int(database)]
    if database not in DATABASES:
        raise BadInput(f"{where}: database {database!r} is not one of {', '.join(DATABASES)}")
    return Clip(DATABASES.index(database), (row.get("subject") or "").strip(), row[views[0]], -1,
                tuple(row[view] for view in views))


def read_pool(opt: argparse.Namespace) -> ClipSet:
    """The clips of --pool: of the lists, of --pairs, or both; one that is in both counts once.

    opt gives data_folder, list_folder, view, encoding, pool, pairs, min_intensity, and whether
    somebody is left out: subject, fold, without. Raises BadInput.
    """
    if not opt.pairs:
        return read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    pairs = read_pairs(opt.pairs, opt.data_folder, opt.view, opt.encoding, opt.min_intensity)
    print(f"{len(pairs)} unlabelled pairs from {opt.pairs}")
    if (opt.subject or opt.fold or opt.without) and not all(c.subject for c in pairs.clips):
        raise BadInput(f"{opt.pairs}: names no subjects, so none can be left out; fill its "
                       f"subject column, or drop --subject, --fold and --without")
    if opt.pool == "unlabelled":
        return pairs
    labelled = read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    ours, theirs = (clips.encoding["difference"] for clips in (labelled, pairs))
    if ours != theirs:
        raise BadInput(f"{opt.pairs}: its differences are {theirs}, those of the lists {ours}; "
                       f"prepare them alike")
    if labelled.luminance != pairs.luminance:
        lacking = opt.pairs if pairs.luminance else labelled.folder
        raise BadInput(f"{lacking}: has no grey view of its own, but the "
                       f"{'lists' if pairs.luminance else 'pairs'} have one; give both v_gray/ and "
                       f"the column gray, or neither")
    paths = {clip.paths[0] for clip in labelled.clips}
    return replace(labelled, clips=labelled.clips + [
        clip for clip in pairs.clips if clip.paths[0] not in paths])


# ---------------------------------------------------------------- subjects and folds

def identity(person: tuple) -> tuple:
    """A person whatever their name's spelling: CAS(ME)^3 writes spNO.1 in its folders and spNO1 in
    its lists."""
    return person[0], _plain(person[1])


def _plain(name):
    return name.replace(".", "").lower()


def find_people(names: list[str], clips: ClipSet, flag: str = "--subject") -> list[tuple]:
    """(database, subject) pairs that `names` mean: 'spNO1', or 'casme2/sub01' for one of several
    databases. Raises BadInput for a name that is not there."""
    people = []
    for name in names:
        database, _, subject = name.rpartition("/")
        hits = [p for p in clips.people if _plain(p[1]) == _plain(subject)
                and database in ("", DATABASES[p[0]])]
        if not hits:
            some = sorted((p[1] for p in clips.people), key=natural)
            some = ", ".join(some[:5]) + ", …" * (len(some) > 5)
            raise BadInput(f"{flag} {name}: no such subject; the data hold "
                           f"{len(clips.people)}: {some}")
        people += hits
    return people


def find_without(opt: argparse.Namespace, clips: ClipSet) -> set[tuple]:
    """The persons of --without, which gets one spelling and order: a run's name and --resume
    compare it. Raises BadInput."""
    people = set(find_people(opt.without, clips, "--without"))
    opt.without = sorted(clips.names[person] for person in people)
    return people


def left_out(opt: argparse.Namespace, clips: ClipSet) -> list[tuple[str | None, set]]:
    """(name, persons left out) of every run that --subject ('each': one for each), or --fold
    ('3/10', '3/5'), asks for; those of --without are left out of all. opt and clips as in
    `read_pool`. Raises BadInput."""
    subject, fold = opt.subject, opt.fold
    if opt.pool == "unlabelled" and (fold or subject or opt.without):
        # who is left out may be in the lists alone
        listed = read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
        clips = replace(listed, clips=listed.clips + clips.clips)
    always = find_without(opt, clips)
    # as an evaluation has them, whose names do not follow from the pairs
    labelled = replace(clips, clips=[clip for clip in clips.clips if clip.label >= 0])
    if fold:
        name = "fold" + fold.replace("/", "of")
        folds = subject_groups(labelled, 5 if fold.endswith("/5") else 10)
        n = len(folds.names)
        if name not in folds.names:
            raise BadInput(f"--fold {fold}: the subjects make {n} groups, 1/{n} to {n}/{n}")
        out = {labelled.clips[i].person
               for i in np.flatnonzero(folds.of == folds.names.index(name))}
        return [(name, out | always)]
    if subject == "each":  # of those whom an evaluation holds out
        never = {identity(person) for person in always}
        return [(name, {person} | always) for person, name in labelled.names.items()
                if identity(person) not in never]
    if not subject:
        return [(None, always)]
    out = find_people([subject], clips)
    if len({database for database, _ in out}) > 1:
        raise BadInput(f"--subject {subject}: several databases have this name; say "
                       + " or ".join(f"{DATABASES[d]}/{name}" for d, name in out))
    named = {**clips.names, **labelled.names}  # the lists' spelling, not that of a pairs file
    return [(named[next((p for p in out if p in labelled.names), out[0])], set(out) | always)]


def training_clips(clips: ClipSet, blank: np.ndarray, out: set) -> np.ndarray:
    """Indices of the clips to contrast: neither blank nor of a person left out; raises BadInput."""
    out = {identity(person) for person in out}
    members = np.flatnonzero(
        np.array([identity(clip.person) not in out for clip in clips.clips]) & ~blank)
    if len(members) < 2:
        raise BadInput(f"{clips.folder}: {len(members)} clips are left to contrast; it takes 2")
    print(f"{len(members)} clips to contrast"
          + (f"; {blank.sum()} blank ones (onset = apex) never enter" if blank.any() else ""))
    return members


def people_seen(clips: ClipSet, members: np.ndarray) -> dict:
    """What a checkpoint says of whom its encoder saw: `people`, the (database, subject) pairs.

    None where clips name no subject; then `named` holds those that are known all the same.
    """
    chosen = [clips.clips[i] for i in members]
    named = [list(p) for p in sorted({clip.person for clip in chosen if clip.subject})]
    unnamed = sum(not clip.subject for clip in chosen)
    if not unnamed:
        return {"people": named, "clips": len(members)}
    print(f"{unnamed} of these clips name no subject: results of this encoder cannot say whether "
          f"it saw whom they hold out")
    return {"people": None, "named": named, "clips": len(members)}


class Folds(NamedTuple):
    """Groups of whole subjects: `names` `[F]`, and the fold `of` each clip, int `[N]`."""
    names: list
    of: np.ndarray


def subject_folds(clips: ClipSet) -> Folds:
    """Leave-one-subject-out."""
    place = {person: i for i, person in enumerate(clips.people)}
    return Folds(list(clips.names.values()),
                 np.array([place[clip.person] for clip in clips.clips]))


def subject_groups(clips: ClipSet, n_folds: int = 10, stratified: bool = True) -> Folds:
    """Groups of whole subjects, stratified as far as that allows, a function of the lists alone.

    Subjects are dealt out, the largest first, each to the fold in which the squared deviation
    from an even share of clips per class grows least; stratified: False balances the number of
    clips alone and looks at no label. Fewer subjects make fewer folds, named such as 'fold3of10'.
    """
    people, subject = clips.people, subject_folds(clips).of
    n_folds = min(n_folds, len(people))
    counts = np.zeros((len(people), max(clips.n_label, 1)))
    for person, label in zip(subject, clips.labels):
        counts[person, label if stratified else 0] += 1
    share = counts.sum(0) / n_folds
    totals, fold_of = np.zeros((n_folds, counts.shape[1])), {}
    for person in sorted(range(len(people)), key=lambda i: (-counts[i].sum(), people[i])):
        growth = (((totals + counts[person] - share) ** 2 - (totals - share) ** 2)
                  / np.maximum(share, 1)).sum(1)
        # an empty fold goes first when subjects run out, so that every fold holds one
        empty = totals.sum(1) == 0
        if len(people) - len(fold_of) <= empty.sum():
            growth[~empty] = np.inf
        fold_of[person] = int(growth.round(9).argmin())
        totals[fold_of[person]] += counts[person]
    return Folds([f"fold{i + 1}of{n_folds}" for i in range(n_folds)],
                 np.array([fold_of[person] for person in subject]))
