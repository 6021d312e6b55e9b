"""Lists of clips: their formats, what a path says of a clip, how the views are joined.

The lists of two views are joined by the identity of their clips, never by position: the published
ones agree in position for a quarter of their rows only.
"""
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from util import BadInput, write_text

DATABASES = ("casme3", "smic", "casme2", "samm")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of every line that is not blank; raises BadInput."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; a folder of lists holds v_rgb/ and the second "
                       f"view's lists") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text in UTF-8; save the list as UTF-8") from None
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise BadInput(f"{path}: empty; it needs at least one row")
    return lines


def read_rows(path: Path) -> list[tuple]:
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


def clip_keys(paths: Iterable[str], suffixes: Iterable[str] = ()) -> dict[str, str]:
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
    keys, left, length = {}, list(parts), 1
    while left:
        tails = {}
        for path in left:
            tails.setdefault("/".join(parts[path][-length:]), []).append(path)
        left, length = [], length + 1
        for tail, members in tails.items():
            if len(members) == 1:
                keys[members[0]] = tail
            elif all(len(parts[m]) < length for m in members):
                raise ValueError(f"{members[0]} and {members[1]} name the same clip")
            else:
                left += members
    return keys


def clip_key(subject: str, video: str, onset: int | str, apex: int | str) -> str:
    """Name of a clip, as published."""
    return f"{subject}-{video}-{apex}-{subject}-{video}-{onset}"


def image_paths(key: str, folder: str, database: int = 0, classes: int = 4) -> tuple[str, str]:
    """Paths of a clip's difference images, RGB and depth, named and sorted into folders as
    published; folder: the class, or 'unlabelled'."""
    name = DATABASES[database]
    root = f"{name}_diff_me{classes}/{name}_diff"
    return (f"{root}_imgs_all/{folder}/{key}_diff.png",
            f"{root}_depth_all/{folder}/{key}_diff_depth.png")


def read_view(folder: Path, subjects: list[str], suffixes: Iterable[str]) -> dict[str, tuple]:
    """One view's lists, checked: dict key → (path, label, database, subject, where)."""
    tests = {s: read_rows(folder / f"{s}_test.txt") for s in subjects}
    rows = {}
    for subject, test in tests.items():
        for path, label, database, number in test:
            where = f"{folder / f'{subject}_test.txt'}:{number}"
            if path in rows:
                raise BadInput(f"{where}: {path} is in {rows[path][3]} too; a clip belongs to one "
                               f"test list")
            rows[path] = label, database, subject, where
    lines = {s: {line for _, line in read_lines(folder / f"{s}_test.txt")} for s in subjects}
    everything = set().union(*lines.values())
    for subject in subjects:
        path = folder / f"{subject}_train.txt"
        others = everything - lines[subject]
        nobody = not others and path.is_file() and not path.read_bytes().strip()
        train = [] if nobody else [line for _, line in read_lines(path)]
        # the same lines say the same, and take a tenth of the time that every row would
        if len(train) != len(others) or set(train) != others:
            _check_train(path, subject, rows)
    try:
        keys = clip_keys(rows, suffixes)
    except ValueError as error:
        raise BadInput(f"{folder}: {error}; remove one of the rows") from None
    return {keys[path]: (path, *row) for path, row in rows.items()}


def _check_train(path, subject, rows):
    """A train list names the clips of all other subjects: neither more nor fewer."""
    train = read_rows(path)
    for name, label, database, number in train:
        if name not in rows:
            raise BadInput(f"{path}:{number}: {name} is in no subject's test list; add it to one, "
                           f"or remove the row")
        if rows[name][2] == subject:
            raise BadInput(f"{path}:{number}: {name} is in {subject}_test.txt too: subject "
                           f"{subject} is on both sides; remove it from one")
        if rows[name][:2] != (label, database):
            raise BadInput(f"{path}:{number}: label {label}, database {database} for {name}, but "
                           f"its test list says {rows[name][0]}, {rows[name][1]}")
    others = sum(row[2] != subject for row in rows.values())
    if len(train) != others:
        raise BadInput(f"{path}: {len(train)} of the {others} clips of the other subjects; a train "
                       f"list names all of them")


def read_subjects(folder: Path) -> list[str]:
    """The subjects that v_rgb/subName.txt of a list folder names; raises BadInput."""
    path = Path(folder) / "v_rgb" / "subName.txt"
    subjects = [line for _, line in read_lines(path)]
    repeated = {s for s in subjects if subjects.count(s) > 1}
    if repeated:
        raise BadInput(f"{path}: {first_ten(repeated)} named twice")
    folders = [s for s in subjects if "/" in s or "\\" in s]
    if folders:
        raise BadInput(f"{path}: {first_ten(folders)}: a subject's name is part of file names and "
                       f"holds no slash")
    return subjects


def view_names(view: str) -> tuple[str, str]:
    """Names of the views of --view: ('rgb', 'depth') for RGB_D; raises BadInput."""
    if not re.fullmatch(r"RGB_[A-Za-z0-9]+", view):
        raise BadInput(f"--view {view}: views are RGB_D, RGB_gray or RGB_<name>")
    return "rgb", "depth" if view == "RGB_D" else view[4:]


def read_views(folder: Path, names: Sequence[str], suffixes: Sequence[str]) -> list[dict]:
    """The lists of several views (names) below a folder, joined: a dict for each, as `read_view`
    gives it. suffixes: of file names, as in `clip_keys`. Raises BadInput."""
    subjects = read_subjects(folder)
    views = [read_view(folder / f"v_{name}", subjects, ("rgb", "gray", "depth", *suffixes[1:]))
             for name in names]
    check_paired(folder, names, views)
    for key, (_, *row, where) in views[0].items():
        for other in views[1:]:
            if other[key][1:4] != tuple(row):
                raise BadInput(f"{other[key][4]}: label, database and subject {other[key][1:4]} "
                               f"of {key} differ from {tuple(row)} in {where}")
    return views


def check_paired(where: Path, names: Sequence[str], views: list[dict]) -> None:
    """Raises BadInput unless all views (of these names) hold the same clips (dicts by key)."""
    for view, name in zip(views[1:], names[1:]):
        for alone, here, there in ((views[0].keys() - view.keys(), names[0], name),
                                   (view.keys() - views[0].keys(), name, names[0])):
            if alone:
                raise BadInput(f"{where}: {len(alone)} clips of v_{here} lack a partner in "
                               f"v_{there}: {first_ten(alone)}; both views must hold the same "
                               f"clips")


def read_paired(folder: Path) -> dict[str, tuple]:
    """The clips of lists of RGB and depth whose images may yet have to be made: dict key → (paths
    of both views, label, database, subject, where); raises BadInput."""
    views = read_views(Path(folder), *[("rgb", "depth")] * 2)
    for view in views:
        for path, *_, where in view.values():
            if path.startswith("/") or ".." in path.split("/"):
                raise BadInput(f"{where}: {path} leads outside the data folder; name a path below "
                               f"it")
    return {key: (tuple(view[key][0] for view in views), *row)
            for key, (_, *row) in views[0].items()}


def digest(folder: Path) -> str:
    """SHA-256 of all lists below a folder, byte for byte."""
    content = hashlib.sha256()
    for path in sorted(Path(folder).glob("v_*/*.txt")):
        content.update(f"{path.parent.name}/{path.name}\n".encode() + path.read_bytes())
    return content.hexdigest()


def first_ten(names: Iterable[str]) -> str:
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


def relative(data_folder: Path, paths: dict[str, str]) -> dict[str, str]:
    """dict path → path under the data folder; raises BadInput for what is missing or outside."""
    first = next(iter(paths))
    head = first.split("/")[:_anchor(data_folder, first)]
    names, missing = {}, []
    for path, where in paths.items():
        parts = path.split("/")
        if parts[:len(head)] == head:
            parts = parts[len(head):]
        name = names[path] = "/".join(parts)
        if not (data_folder / name).is_file():
            missing.append(path)
        elif ".." in parts or name.startswith("/") or re.match(r"[A-Za-z]:", name):
            raise BadInput(f"{where}: {path} leads outside --data_folder {data_folder}; "
                           f"name a path below it")
    if missing:
        raise BadInput(f"{data_folder}: {len(missing)} of {len(paths)} images named in "
                       f"{paths[missing[0]].rpartition('/')[0] or 'the lists'} are missing: "
                       f"{first_ten(missing)}; check --data_folder")
    return names


def find_list_folder(data_folder: str | Path, list_folder: str | Path | None) -> Path:
    """--list_folder, or the data folder if it holds v_rgb, else `data`; raises BadInput."""
    if not Path(data_folder).is_dir():
        raise BadInput(f"{data_folder}: no such folder; --data_folder is where the images are")
    if list_folder is None:
        list_folder = data_folder if (Path(data_folder) / "v_rgb").is_dir() else "data"
    if not (Path(list_folder) / "v_rgb").is_dir():
        raise BadInput(f"{list_folder}: holds no v_rgb folder with lists; give --list_folder")
    return Path(list_folder)


def write_lists(list_folder: str | Path, clips: Iterable,
                views: Sequence[str] = ("rgb", "depth")) -> None:
    """Writes the lists of `clips` (objects with `paths`, one for each of the views) into a folder
    v_<view> each, and subName.txt.

    Subjects of different databases that carry the same name share one test list, as in MEGC2019.
    """
    list_folder = Path(list_folder)
    subjects = sorted({clip.subject for clip in clips}, key=natural)
    for number, view in enumerate(views):
        folder = list_folder / f"v_{view}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [(clip.subject, f"{clip.paths[number]} {clip.label} {clip.database}\n")
                for clip in clips]
        for subject in subjects:
            write_text(folder / f"{subject}_test.txt", "".join(r for s, r in rows if s == subject))
            write_text(folder / f"{subject}_train.txt", "".join(r for s, r in rows if s != subject))
    write_text(list_folder / f"v_{views[0]}" / "subName.txt", "".join(s + "\n" for s in subjects))


def natural(name: str) -> list[tuple]:
    """Sort key that puts spNO2 before spNO10."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"(\d+)", name)]
