"""What lies in the folders of a set of faces: images, class folders, what is listed but missing.

Each folder is listed once: a call for each of 280,000 files takes minutes where the disk is
another machine's.
"""
import functools
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from images.lists import natural
from util import BadInput

SPLITS = ("train", "val", "test")
NO_UTF8 = "names that are no UTF-8, left out"
OTHER_FOLDERS = "folders beside the splits, left out"
# what a folder of `<split>/<class>/…` may be called, in small letters
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
               "validation": "val", "test": "test", "testing": "test"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass
class Found:
    """What is found in a folder.

    rows: split → path, relative to the folder → (label, file and line that say so, box or None);
    notes: kind of irregularity → the images or lines concerned; pixels: path → uint8 `[48, 48]`
    where the images stand in a table; listed: lists name the images, which may be missing.
    """
    folder: Path
    classes: tuple[str, ...] = ()
    rows: dict[str, dict[str, tuple]] = field(default_factory=lambda: {s: {} for s in SPLITS})
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    listed: bool = False

    def add(self, split: str, path: str, label: int | str, where: str,
            box: tuple | None = None) -> None:
        """Takes in an image; label: its class, or the reason why it is left out. Raises BadInput
        where another line gives it another label."""
        if isinstance(label, str):
            self.notes[label].append(path)
        elif path not in self.rows[split]:
            if path.startswith("/") or (".." in path and ".." in path.split("/")):
                raise BadInput(f"{where}: {path} leads outside {self.folder}; name a path below it")
            self.rows[split][path] = label, where, box
        else:
            other, line, _ = self.rows[split][path]
            if other != label:
                raise BadInput(f"{where}: {path} is {self.classes[label]}, but {line} says "
                               f"{self.classes[other]}; keep one of the lines")
            self.notes["lines that repeat an image, one of them kept"].append(where)

    def leave_out_missing(self) -> None:
        """Takes out the images that are listed but do not exist; raises BadInput where none of a
        split does."""
        listing = functools.cache(lambda place: names(self.folder / place))
        for split, rows in self.rows.items():
            missing = []
            for path in rows:
                place, _, name = path.rpartition("/")
                if path not in self.pixels and name not in listing(place):
                    missing.append(path)
            if missing and len(missing) == len(rows):
                place = self.folder / missing[0].rpartition("/")[0]
                raise BadInput(f"{place}: none of the {len(rows)} listed images of {split} exists, "
                               f"{missing[0]} the first; unpack them there, or name another folder")
            if missing:
                self.notes["listed images missing, left out"] += missing
            for path in missing:
                del rows[path]

    def leave_out_shared(self) -> None:
        """Takes the images that two splits name out of the one to learn from."""
        for first, second in combinations(SPLITS, 2):
            for path in sorted(self.rows[first].keys() & self.rows[second].keys()):
                self.notes[f"images in {second} too, left out of {first}"].append(path)
                del self.rows[first][path]


def names(folder: Path) -> frozenset:
    """Names of all that lies in a folder; none where there is no such folder."""
    try:
        return frozenset(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def subfolders(found: Found, start: str = "") -> list[str]:
    """Names of the folders in `start`, below the set's folder, in natural order, without hidden
    ones; those that are no UTF-8 are noted, and images beside them."""
    with os.scandir(found.folder / start) as entries:
        seen = [(e.name, _is_dir(e)) for e in entries if not e.name.startswith(".")]
    below = sorted((name for name, is_dir in seen if is_dir), key=natural)
    found.notes["images beside the class folders, left out"] += sorted(
        os.path.join(start, name) for name, is_dir in seen
        if not is_dir and _is_utf8(name) and name.lower().endswith(SUFFIXES))
    found.notes[NO_UTF8] += [ascii(os.path.join(start, n)) for n in below if not _is_utf8(n)]
    return [name for name in below if _is_utf8(name)]


def images_below(found: Found, start: str) -> list[str]:
    """Sorted paths of the images below a class folder; other files are noted, hidden ones not."""
    images, pending = [], [(start, ())]
    while pending:
        at, above = pending.pop()
        above = (*above, _identity(found.folder / at))
        with os.scandir(found.folder / at) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{at}/{entry.name}"
                if not _is_utf8(entry.name):
                    found.notes[NO_UTF8].append(ascii(path))
                elif entry.name.lower().endswith(SUFFIXES) and not _is_dir(entry):
                    images.append(path)
                elif _is_dir(entry):
                    if entry.is_symlink() and _identity(entry) in above:
                        found.notes["links to a folder they lie in, left out"].append(path)
                    else:
                        pending.append((path, above))
                else:
                    found.notes["files that are no images, left out"].append(path)
    if not images:
        found.notes["empty class folders"].append(start)
    return sorted(images)


def _is_dir(entry):
    """Whether it is a folder; a link to itself is none, and nobody can read it."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(place):
    """What tells a folder from all others, by whatever links it is reached."""
    status = os.stat(place)
    return status.st_dev, status.st_ino


def _is_utf8(name):
    """Whether a name can be printed and kept: the system gives its other bytes as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_class_folders(found: Found, splits: dict[str, tuple],
                       label_of: Callable[[str, str], int | str]) -> None:
    """Takes in `<split>/<class>/…`; splits: split → names its folder may have; label_of(name of
    a class folder, its path) → label, or the reason why it is left out. Raises BadInput."""
    used = set()
    for split, choice in splits.items():
        name = next((name for name in choice if (found.folder / name).is_dir()), None)
        if name is None:
            raise BadInput(f"{found.folder}: neither the set's lists nor a folder "
                           f"{' or '.join(choice)}/ with a folder for each class; name the folder "
                           f"that holds them")
        used.add(name)
        for number in subfolders(found, name):
            place = f"{name}/{number}"
            label = label_of(number, str(found.folder / place))
            for path in images_below(found, place):
                found.add(split, path, label, str(found.folder / path))
    found.notes[OTHER_FOLDERS] += [name for name in subfolders(found) if name not in used]


def check_folder(folder: Path) -> None:
    """Raises BadInput for what detect_faces.py wrote: photographs with boxes drawn lie in it."""
    if (folder / "faces.json").is_file() and (folder / "crops").is_dir():
        raise BadInput(f"{folder}: what detect_faces.py wrote; its crops are in "
                       f"{folder / 'crops'}: name that")


def read_any_folders(found: Found) -> None:
    """Takes in `<split>/<class>/…` or `<class>/…` of any classes; raises BadInput."""
    check_folder(found.folder)
    top, starts = subfolders(found), {}
    for name in top:
        split = SPLIT_NAMES.get(name.lower())
        if split in starts:
            raise BadInput(f"{found.folder}: holds {starts[split]} and {name}/; keep one of them")
        if split:
            starts[split] = f"{name}/"
    if starts and "train" not in starts:
        raise BadInput(f"{found.folder}: holds {' and '.join(starts.values())} but no train/; add "
                       f"it, or name a folder of class folders")
    if starts:
        more = [name for name in top if f"{name}/" not in starts.values()]
        found.notes[OTHER_FOLDERS] += more
    if "val" in starts and "test" not in starts:
        starts["test"] = starts.pop("val")
    starts = starts or {"train": ""}
    images = {split: {name: images_below(found, start + name)
                      for name in (subfolders(found, start) if start else top)}
              for split, start in starts.items()}
    found.classes = tuple(name for name, paths in images["train"].items() if paths)
    for split, folders in images.items():
        for name, paths in folders.items():
            if paths and name not in found.classes:
                raise BadInput(f"{found.folder / starts[split] / name}: a class without images in "
                               f"train/; add some, or remove this folder")
            for path in paths:
                found.add(split, path, found.classes.index(name), str(found.folder / path))
