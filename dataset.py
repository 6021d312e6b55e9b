"""Clips of two views: list formats, clip identity and pairing, subject folds.

A clip is a pair of difference images, RGB and a second view. The two lists of a data set are
joined by what a path says of the clip, never by position: the published lists agree in position
for a quarter of their rows only.
"""
import csv
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from images import decoding
from util import BadInput, ensure, write_text

DATABASES = ("casme3", "smic", "casme2", "samm")
PAIR_COLUMNS = ("rgb", "depth", "database", "subject", "video", "onset", "apex", "intensity",
                "unit", "head_motion")


@dataclass(frozen=True)
class Clip:
    """One clip: `label` -1 where unlabelled; `rgb`, `second`: paths relative to the data folder."""
    database: int
    subject: str
    key: str
    label: int
    rgb: str
    second: str

    @property
    def person(self):
        """(database, subject): the unit of every split."""
        return self.database, self.subject


@dataclass
class ClipSet:
    """The clips of a data set, sorted by (database, subject, key), and what is known of them.

    second: name of the second view; luminance: it is computed from the RGB image; channels of
    both views; encoding: what encoding.json or --encoding says; classes: names in id order;
    origin: the set that a subset was taken from.
    """
    clips: list
    folder: Path
    second: str
    luminance: bool
    channels: tuple
    encoding: dict
    n_label: int = 0
    origin: "ClipSet" = None

    def __len__(self):
        return len(self.clips)

    @functools.cached_property
    def labels(self):
        """int64 `[N]`"""
        return np.array([clip.label for clip in self.clips], dtype=np.int64)

    @functools.cached_property
    def people(self):
        """Sorted (database, subject) pairs."""
        return sorted({clip.person for clip in self.clips})

    @property
    def classes(self):
        """Class names in the order of their ids."""
        return self.encoding.get("classes") or [str(i) for i in range(self.n_label)]

    def members(self, people):
        """Indices of the clips of these (database, subject) pairs."""
        wanted = set(people)
        return np.array([i for i, clip in enumerate(self.clips) if clip.person in wanted],
                        dtype=np.int64)

    def subset(self, keep):
        """The clips where `keep` (bool `[N]`) holds."""
        return replace(self, clips=[clip for clip, k in zip(self.clips, keep) if k],
                       origin=self.origin or self)

    def digest(self):
        """SHA-256 of what the lists say (persons, keys, labels), whatever their order."""
        rows = [[c.database, c.subject, c.key, c.label] for c in self.clips]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ---------------------------------------------------------------- lists

def read_lines(path):
    """(number, text) of every line that is not blank; raises BadInput."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; --list_folder must hold v_rgb/ and the second view's "
                       f"lists") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text in UTF-8; save the list as UTF-8") from None
    found = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise BadInput(f"{path}: empty; it needs at least one row")
    return found


def _rows(path):
    """(path, label, database, line number) of a list's rows; paths may hold spaces."""
    rows, seen = [], {}
    for number, line in read_lines(path):
        fields = line.rsplit(None, 2)
        if len(fields) != 3:
            raise BadInput(f"{path}:{number}: {line[:80]!r} is not '<path> <label> <database>'")
        name = fields[0].replace("\\", "/")
        try:
            label, database = int(fields[1]), int(fields[2])
        except ValueError:
            raise BadInput(f"{path}:{number}: label {fields[1]!r} and database {fields[2]!r} "
                           f"must be integers") from None
        if label < 0:
            raise BadInput(f"{path}:{number}: label {label} is out of range; labels are 0..C-1")
        if not 0 <= database < len(DATABASES):
            raise BadInput(f"{path}:{number}: database {database} is not one of "
                           + ", ".join(f"{i} {n}" for i, n in enumerate(DATABASES)))
        if seen.setdefault(name, number) != number:
            raise BadInput(f"{path}:{number}: {name} is named in line {seen[name]} already; "
                           f"remove one")
        rows.append((name, label, database, number))
    return rows


def clip_keys(paths, suffixes=()):
    """Identity of each clip: dict path → shortest tail, without extension and `_diff…` suffix,
    that is unique among `paths`.

    suffixes: names that may follow `_diff_`. Raises ValueError naming two paths that no
    directory tells apart.
    """
    ending = re.compile(rf"_diff(_({'|'.join(map(re.escape, suffixes or ['rgb']))}))?$")
    parts = {}
    for path in paths:
        *folders, name = path.split("/")
        parts[path] = [*folders, ending.sub("", os.path.splitext(name)[0])]
    keys, groups, length = {}, [list(parts)], 1
    while groups:
        ambiguous = []
        for group in groups:
            tails = {}
            for path in group:
                tails.setdefault("/".join(parts[path][-length:]), []).append(path)
            for tail, members in tails.items():
                if len(members) == 1:
                    keys[members[0]] = tail
                elif all(len(parts[m]) <= length for m in members):
                    raise ValueError(f"{members[0]} and {members[1]} name the same clip")
                else:
                    ambiguous.append(members)
        groups, length = ambiguous, length + 1
    return keys


def read_view(folder, subjects, suffixes):
    """One view's lists, checked: dict key → (path, label, database, subject, where)."""
    tests = {s: _rows(folder / f"{s}_test.txt") for s in subjects}
    rows, where = {}, {}
    for subject, test in tests.items():
        for path, label, database, number in test:
            here = f"{folder / f'{subject}_test.txt'}:{number}"
            if path in where:
                raise BadInput(f"{here}: {path} is in {where[path]} too; a clip belongs to one "
                               f"test list")
            rows[path], where[path] = (label, database, subject), here
    for subject in subjects:
        _check_train(folder / f"{subject}_train.txt", subject, rows)
    try:
        keys = clip_keys(rows, suffixes)
    except ValueError as error:
        raise BadInput(f"{folder}: {error}; remove one of the rows") from None
    return {keys[p]: (p, *rows[p], where[p]) for p in rows}


def _check_train(path, subject, rows):
    """A train list names the clips of all other subjects: neither more nor fewer."""
    count = 0
    for name, label, database, number in _rows(path):
        if name not in rows:
            raise BadInput(f"{path}:{number}: {name} is in no subject's test list; add it to one, "
                           f"or remove the row")
        if rows[name][2] == subject:
            raise BadInput(f"{path}:{number}: {name} is in {subject}_test.txt too: subject "
                           f"{subject} is on both sides; remove it from one")
        if rows[name][:2] != (label, database):
            raise BadInput(f"{path}:{number}: label {label}, database {database} for {name}, but "
                           f"its test list says {rows[name][0]}, {rows[name][1]}")
        count += 1
    others = sum(row[2] != subject for row in rows.values())
    if count != others:
        raise BadInput(f"{path}: {count} of the {others} clips of the other subjects; a train "
                       f"list names all of them")


def _first_ten(names):
    names = sorted(names)
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _anchor(data_folder, first):
    """How many leading components of `first` to cut so that it exists under `data_folder`."""
    parts = first.split("/")
    for cut in range(len(parts)):
        if ".." not in parts[cut:] and (data_folder / "/".join(parts[cut:])).is_file() \
                and (cut or not first.startswith("/")):
            return cut
    return 0


def _relative(data_folder, paths):
    """dict path → path under the data folder; raises BadInput for what is missing or outside."""
    first = next(iter(paths))
    head = first.split("/")[:_anchor(data_folder, first)]
    found, missing = {}, []
    for path in paths:
        parts = path.split("/")
        if head and parts[:len(head)] == head:
            parts = parts[len(head):]
        found[path] = "/".join(parts)
        if ".." in parts or found[path].startswith("/") or re.match(r"[A-Za-z]:", found[path]):
            if not (data_folder / found[path]).is_file():
                missing.append(path)
                continue
            raise BadInput(f"{paths[path]}: {path} leads outside --data_folder {data_folder}; "
                           f"name a path below it")
        if not (data_folder / found[path]).is_file():
            missing.append(path)
    if missing:
        raise BadInput(f"{data_folder}: {len(missing)} of {len(paths)} images named in "
                       f"{paths[missing[0]].rpartition('/')[0] or 'the lists'} are missing: "
                       f"{_first_ten(missing)}; check --data_folder")
    return found


def find_list_folder(data_folder, list_folder):
    """--list_folder, or the data folder if it holds v_rgb, else `data`; raises BadInput."""
    if not Path(data_folder).is_dir():
        raise BadInput(f"{data_folder}: no such folder; --data_folder is where the images are")
    if list_folder is None:
        list_folder = data_folder if (Path(data_folder) / "v_rgb").is_dir() else "data"
    if not (Path(list_folder) / "v_rgb").is_dir():
        raise BadInput(f"{list_folder}: holds no v_rgb folder with lists; give --list_folder")
    return Path(list_folder)


def second_view(view):
    """Name of the second view of --view: depth for RGB_D; raises BadInput."""
    if not re.fullmatch(r"RGB_[A-Za-z0-9]+", view):
        raise BadInput(f"--view {view}: views are RGB_D, RGB_gray or RGB_<name>")
    return "depth" if view == "RGB_D" else view[4:]


def read_encoding(folder, given=None):
    """encoding.json beside the lists, or --encoding [wrap]; raises BadInput."""
    path = Path(folder) / "encoding.json"
    if not path.exists():
        if given is None:
            print(f"no {path}: pixels are taken as 'wrap', d modulo 256, as the published images; "
                  f"--encoding says otherwise")
        return {"difference": given or "wrap"}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ensure(isinstance(content, dict) and content.get("difference") in decoding.NO_CHANGE)
        classes = content.get("classes", [])
        ensure(isinstance(classes, list) and all(isinstance(c, str) for c in classes))
    except ValueError:
        raise BadInput(f"{path}: needs an object with \"difference\" signed, wrap or absolute, and "
                       f"\"classes\", if there, a list of names") from None
    if given not in (None, content["difference"]):
        raise BadInput(f"--encoding {given}: {path} says {content['difference']}; drop the flag")
    return content


def read_clips(data_folder, list_folder=None, view="RGB_D", encoding=None):
    """Reads, pairs and checks the lists of a data set.

    Returns a ClipSet. Raises BadInput as soon as something does not hold: a missing or empty
    list, a malformed row, a clip in two lists, a subject on both sides, a clip without partner,
    labels that differ between views or are not exactly 0..C-1, a missing image.
    """
    lists, data_folder = find_list_folder(data_folder, list_folder), Path(data_folder)
    second = second_view(view)
    luminance = view == "RGB_gray" and not (lists / "v_gray").is_dir()
    subjects = [line for _, line in read_lines(lists / "v_rgb" / "subName.txt")]
    repeated = {s for s in subjects if subjects.count(s) > 1}
    if repeated:
        raise BadInput(f"{lists / 'v_rgb' / 'subName.txt'}: {_first_ten(repeated)} named twice")
    folders = [s for s in subjects if "/" in s or "\\" in s]
    if folders:
        raise BadInput(f"{lists / 'v_rgb' / 'subName.txt'}: {_first_ten(folders)}: a subject's "
                       f"name is part of file names and holds no slash")
    suffixes = ("rgb", "gray", "depth", second)
    first = read_view(lists / "v_rgb", subjects, suffixes)
    other = first if luminance else read_view(lists / f"v_{second}", subjects, suffixes)
    for alone, here, there in ((first.keys() - other.keys(), "rgb", second),
                               (other.keys() - first.keys(), second, "rgb")):
        if alone:
            raise BadInput(f"{lists}: {len(alone)} clips of v_{here} lack a partner in v_{there}: "
                           f"{_first_ten(alone)}; both views must hold the same clips")
    for key, (_, *row, where) in first.items():
        if other[key][1:4] != tuple(row):
            raise BadInput(f"{other[key][4]}: label, database and subject {other[key][1:4]} of "
                           f"{key} differ from {tuple(row)} in {where}")
    rgb = _relative(data_folder, {row[0]: row[4] for row in first.values()})
    paths = rgb if luminance else _relative(data_folder, {r[0]: r[4] for r in other.values()})
    clips = [Clip(row[2], row[3], key, row[1], rgb[row[0]], paths[other[key][0]])
             for key, row in first.items()]
    return _clip_set(clips, data_folder, second, luminance, read_encoding(lists, encoding), lists)


def _clip_set(clips, folder, second, luminance, encoding, lists):
    """Sorts the clips, derives classes and channels."""
    clips.sort(key=lambda c: (c.database, c.subject, c.key))
    labels = {clip.label for clip in clips} - {-1}
    n_label = len(labels)
    if labels != set(range(n_label)):
        raise BadInput(f"{lists}: labels over all test lists are {sorted(labels)}, out of range: "
                       f"they must be exactly 0..{n_label - 1}")
    if labels and "classes" in encoding and len(encoding["classes"]) != n_label:
        raise BadInput(f"{lists / 'encoding.json'}: names {len(encoding['classes'])} classes, the "
                       f"lists hold {n_label}")
    return ClipSet(clips, folder, second, luminance, _channels(folder, clips, second, luminance),
                   encoding, n_label)


def _channels(folder, clips, second, luminance):
    """Channels of both views: 1 for a second view that is grey."""
    if luminance or second in ("depth", "gray"):
        return 3, 1
    return 3, 3 if decoding.open_image(folder / clips[0].second).mode.startswith("RGB") else 1


def read_list(path, data_folder, view="RGB_D", encoding=None, alone=False):
    """The clips of one list `<folder>/v_rgb/<name>` and of the same name in the second view's
    folder, in the order of the list: a ClipSet without subjects and classes.

    alone: the second view may be missing; the luminance then stands in for it. Raises BadInput.
    """
    path, data_folder, second = Path(path), Path(data_folder), second_view(view)
    if not data_folder.is_dir():
        raise BadInput(f"{data_folder}: no such folder; --data_folder is where the images are")
    if not path.is_file():
        raise BadInput(f"{path}: no such list")
    lists = path.resolve().parent.parent
    partner = lists / f"v_{second}" / path.name
    luminance = (view == "RGB_gray" and not partner.parent.is_dir()) \
        or (alone and not partner.is_file())
    if not luminance and not partner.is_file():
        raise BadInput(f"{path}: the second view's list {partner} is missing; a list lies in a "
                       f"folder v_rgb, its partner under the same name in v_{second} beside it")
    views = [{name: (label, database, f"{file}:{number}")
              for name, label, database, number in _rows(file)}
             for file in ((path,) if luminance else (path, partner))]
    try:
        keys = [clip_keys(rows, ("rgb", "gray", "depth", second)) for rows in views]
    except ValueError as error:
        raise BadInput(f"{path}: {error}; remove one of the rows") from None
    lacking = set(keys[0].values()) ^ set(keys[-1].values())
    if lacking:
        raise BadInput(f"{path}: {len(lacking)} clips are in the list of one view only: "
                       f"{_first_ten(lacking)}; both views must hold the same clips")
    paths = [_relative(data_folder, {name: row[2] for name, row in rows.items()})
             for rows in views]
    other = {key: paths[-1][name] for name, key in keys[-1].items()}
    clips = [Clip(row[1], "", keys[0][name], row[0], paths[0][name], other[keys[0][name]])
             for name, row in views[0].items()]
    if not (lists / "encoding.json").exists():
        encoding = encoding or "wrap"
    return ClipSet(clips, data_folder, second, luminance,
                   _channels(data_folder, clips, second, luminance),
                   read_encoding(lists, encoding))


def read_pairs(path, data_folder, view="RGB_D", encoding=None, min_intensity=None):
    """Unlabelled pairs of `pairs.tsv` (columns PAIR_COLUMNS), as a ClipSet.

    min_intensity: keep pairs of at least this intensity, in the file's own unit. A subject is ''
    where the file names none. Raises BadInput.
    """
    path, data_folder, second = Path(path), Path(data_folder), second_view(view)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows, columns = list(reader), reader.fieldnames or []
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; --pairs names a pairs.tsv") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text in UTF-8") from None
    luminance = view == "RGB_gray" and "gray" not in columns
    column = "rgb" if luminance else second
    for needed in ("rgb", column) + (("intensity",) if min_intensity is not None else ()):
        if needed not in columns:
            raise BadInput(f"{path}:1: no column {needed!r}; the header is {' '.join(PAIR_COLUMNS)}"
                           f", tab-separated")
    clips, where = [], {}
    for number, row in enumerate(rows, 2):
        clip = _pair(row, column, f"{path}:{number}", min_intensity)
        if clip:
            if clip.rgb in where:
                raise BadInput(f"{path}:{number}: {clip.rgb} is named in {where[clip.rgb]} already")
            where[clip.rgb] = f"{path}:{number}"
            clips.append(clip)
    if not clips:
        raise BadInput(f"{path}: no pair" + (f" of intensity {min_intensity:g} or more"
                                             if min_intensity is not None else ""))
    rgb = _relative(data_folder, {c.rgb: where[c.rgb] for c in clips})
    other = _relative(data_folder, {c.second: where[c.rgb] for c in clips})
    clips = [replace(c, rgb=rgb[c.rgb], second=other[c.second]) for c in clips]
    return _clip_set(clips, data_folder, second, luminance,
                     read_encoding(path.parent, encoding), path.parent)


def _pair(row, column, where, min_intensity):
    """One row of pairs.tsv as a Clip; None below the intensity wanted."""
    if None in row or None in row.values() or not row["rgb"] or not row[column]:
        raise BadInput(f"{where}: not as many fields as the header, or an empty path")
    if min_intensity is not None:
        try:
            intensity = float(row["intensity"])
        except ValueError:
            intensity = math.nan
        if math.isnan(intensity):
            raise BadInput(f"{where}: intensity {row['intensity']!r} is not a number")
        if intensity < min_intensity:
            return None
    database = row.get("database") or "casme3"
    if database.isdigit() and int(database) < len(DATABASES):
        database = DATABASES[int(database)]
    if database not in DATABASES:
        raise BadInput(f"{where}: database {database!r} is not one of {', '.join(DATABASES)}")
    return Clip(DATABASES.index(database), (row.get("subject") or "").strip(), row["rgb"], -1,
                row["rgb"], row[column])


def write_lists(list_folder, clips, second="depth"):
    """Writes v_rgb/ and v_<second>/ lists of `clips` (a list of Clip) and subName.txt.

    Subjects of different databases that carry the same name share one test list, as in MEGC2019.
    """
    list_folder = Path(list_folder)
    subjects = sorted({clip.subject for clip in clips}, key=natural)
    for view, path in (("rgb", lambda c: c.rgb), (second, lambda c: c.second)):
        folder = list_folder / f"v_{view}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(clip.subject, f"{path(clip)} {clip.label} {clip.database}\n") for clip in clips]
        for subject in subjects:
            write_text(folder / f"{subject}_test.txt", "".join(r for s, r in rows if s == subject))
            write_text(folder / f"{subject}_train.txt", "".join(r for s, r in rows if s != subject))
    write_text(list_folder / "v_rgb" / "subName.txt", "".join(s + "\n" for s in subjects))


def natural(name):
    """Sort key that puts spNO2 before spNO10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


# ---------------------------------------------------------------- subjects and folds

def person_name(person, clips):
    """'spNO1', or 'casme2_sub01' where the lists hold several databases."""
    several = len({database for database, _ in (clips.origin or clips).people}) > 1
    return f"{DATABASES[person[0]]}_{person[1]}" if several else person[1]


def _plain(name):
    """CAS(ME)^3 writes spNO.1 in its folders and spNO1 in its lists."""
    return name.replace(".", "").lower()


def same_person(a, b):
    """Whether two (database, subject) pairs name the same person."""
    return a[0] == b[0] and _plain(a[1]) == _plain(b[1])


def find_people(names, clips):
    """(database, subject) pairs that `names` mean: 'spNO1', or 'casme2/sub01' for one of several
    databases. Raises BadInput for a name that is not there."""
    found = []
    for name in names:
        database, _, subject = name.rpartition("/")
        hits = [p for p in clips.people if _plain(p[1]) == _plain(subject)
                and database in ("", DATABASES[p[0]])]
        if not hits:
            some = sorted((p[1] for p in clips.people), key=natural)
            some = ", ".join(some[:5]) + ", …" * (len(some) > 5)
            raise BadInput(f"--subject {name}: no such subject; the data hold "
                           f"{len(clips.people)}: {some}")
        found += hits
    return found


def subject_folds(clips):
    """Leave-one-subject-out: (names `[F]`, fold of each clip int `[N]`)."""
    people = clips.people
    place = {person: i for i, person in enumerate(people)}
    return ([person_name(p, clips) for p in people],
            np.array([place[clip.person] for clip in clips.clips]))


def ten_folds(clips, n_folds=10, stratified=True):
    """Groups of whole subjects, stratified as far as that allows, a function of the lists alone.

    stratified: False balances the number of clips alone and looks at no label.

    Subjects are dealt out, the largest first, each to the fold in which the squared deviation
    from an even share of clips per class grows least. Fewer subjects make fewer folds. Returns
    (names `[F]` such as 'fold3of10', fold of each clip int `[N]`).
    """
    people, labels = clips.people, clips.labels
    n_folds = min(n_folds, len(people))
    place = {person: i for i, person in enumerate(people)}
    counts = np.zeros((len(people), max(clips.n_label, 1)))
    for clip, label in zip(clips.clips, labels):
        counts[place[clip.person], label if stratified else 0] += 1
    share = counts.sum(0) / n_folds
    totals, fold_of = np.zeros((n_folds, counts.shape[1])), {}
    for person in sorted(range(len(people)), key=lambda i: (-counts[i].sum(), people[i])):
        growth = (((totals + counts[person] - share) ** 2 - (totals - share) ** 2)
                  / np.maximum(share, 1)).sum(1)
        # an empty fold goes first when subjects run out, so that every fold holds one
        left = len(people) - len(fold_of)
        empty = totals.sum(1) == 0
        if left <= empty.sum():
            growth[~empty] = np.inf
        chosen = int(growth.round(9).argmin())
        totals[chosen] += counts[person]
        fold_of[person] = chosen
    names = [f"fold{i + 1}of{n_folds}" for i in range(n_folds)]
    return names, np.array([fold_of[place[clip.person]] for clip in clips.clips])


