"""Where the frames of a clip are on disk, and which of them stand in for missing ones.

The tree is taken as found: under any prefix, colour and depth beside or apart from each other,
with or without the inner color/ and depth/, letters in either case, the "ME clip" package, or
several of these at once. Folders are listed only when a clip asks for them.
"""
import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from preparation.annotation import Row
from util import BadInput

SUBJECT = re.compile(r"spno(\.?)(\d+)", re.IGNORECASE)
PACKAGED = re.compile(r"spno\.?(\d+)_([a-z]+)_(\d+)", re.IGNORECASE)
VIEWS = {"color": "rgb", "colour": "rgb", "frame": "rgb", "rgb": "rgb", "depth": "depth"}
IMAGES = {".jpg": "rgb", ".jpeg": "rgb", ".png": "depth", ".bmp": "rgb"}
PREFIXES = 5  # folders that may lie between the root and a subject


def subject_number(name: str) -> int | str:
    """10 for spNO.10, spno10; the name itself where it is of another kind."""
    match = SUBJECT.fullmatch(name)
    return int(match[2]) if match else name.lower()


class Tree:
    """The videos below a root. Raises BadInput where there are none."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.subjects, self.packaged = {}, {}
        if not self.root.is_dir():
            raise BadInput(f"{root}: no such folder; it holds the frames as received")
        self._search(str(self.root), 0)
        if not self.subjects and not self.packaged:
            raise BadInput(f"{root}: no folder spNO.<i>/<video> (Part A) nor spNO.<i>_<video>_"
                           f"<onset> (ME clips) within {PREFIXES} levels")

    def _search(self, folder, level):
        for name in _folders(folder):
            path = os.path.join(folder, name)
            packaged = PACKAGED.fullmatch(name)
            if SUBJECT.fullmatch(name):
                self.subjects.setdefault(subject_number(name), []).append(path)
            elif packaged:
                key = int(packaged[1]), packaged[2].lower(), int(packaged[3])
                self.packaged.setdefault(key, []).append(path)
            elif level < PREFIXES:
                self._search(path, level + 1)

    def videos(self) -> list:
        """Sorted (subject number, video) pairs of the whole tree; letters in lower case."""
        return sorted({(subject, name.lower()) for subject, folders in self.subjects.items()
                       for folder in folders for name in _folders(folder)})

    def frames(self, subject: str, video: str, onset: int | None = None) -> tuple:
        """What there is of one video: ({number: path} of RGB, the same of depth, notes).

        onset: also the packaged clip of this onset. notes: irregularities of the folders.
        """
        rgb, depth, notes = self._video(subject, video)
        packaged = self.packaged.get((subject_number(subject), video.lower(), onset), ())
        images = {"rgb": dict(rgb), "depth": dict(depth)} if packaged else {}
        for folder in packaged:
            self._collect(folder, images)
        return images.get("rgb", rgb), images.get("depth", depth), notes

    @functools.lru_cache(maxsize=64)  # noqa: B019 (one tree per run)
    def _video(self, subject, video):
        """The same of its folders, which are listed once for all of its clips."""
        number, images, notes = subject_number(subject), {"rgb": {}, "depth": {}}, set()
        for folder in self._video_folders(number, video, notes):
            inner = [name for name in _folders(folder) if name.lower() in VIEWS]
            own = {"rgb": {}, "depth": {}}
            for name in inner:
                self._collect(os.path.join(folder, name), own)
            views = {VIEWS[name.lower()] for name in inner}
            beside = {"rgb": {}, "depth": {}}
            if len(views) < 2:
                self._collect(folder, beside)
            for view in own.keys() - views:
                own[view] = beside[view]
            if own["depth"] and "depth" not in views:
                notes.add("depth folder without the inner depth/")
            for view, there in images.items():
                if there and own[view] and there.keys() != own[view].keys():
                    raise BadInput(f"{folder}: another video of this name lies in "
                                   f"{Path(next(iter(there.values()))).parent}, with other frames; "
                                   f"name a folder that holds one of them")
                images[view] = own[view] | there
            if images["depth"] and not SUBJECT.fullmatch(Path(folder).parent.name)[1]:
                notes.add("subject folder without the dot (spNO210)")
        return images["rgb"], images["depth"], tuple(sorted(notes))

    def _video_folders(self, number, video, notes):
        """Folders of the video: its letter as written, or in the other case where there is none
        of that."""
        folders = [os.path.join(f, name) for f in self.subjects.get(number, ())
                   for name in _folders(f) if name.lower() == video.lower()]
        exact = [f for f in folders if os.path.basename(f) == video]
        for folder in folders:
            if not Path(folder).parent.name.startswith("spNO"):
                notes.add("subject folder in another case (spNo)")
        held = {self._view_of(f) for f in exact}
        more = [f for f in folders if f not in exact and self._view_of(f) not in held]
        if more:
            notes.add("video letter in another case (J, j)")
        return exact + more

    def _view_of(self, folder):
        """rgb or depth where a folder below the root says so, '' where both may be inside."""
        for part in reversed(Path(folder).relative_to(self.root).parts):
            if part.lower() in VIEWS:
                return VIEWS[part.lower()]
        return ""

    def _collect(self, folder, images):
        """Adds the numbered images of a folder to images[view]; returns the views it held."""
        view, views = self._view_of(folder), set()
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                stem, extension = os.path.splitext(entry.name)
                # a link may lead nowhere
                if stem.isdecimal() and extension.lower() in IMAGES and entry.is_file():
                    kind = view or IMAGES[extension.lower()]
                    images[kind].setdefault(int(stem), entry.path)
                    views.add(kind)
        return views


def _folders(folder):
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def nearest(numbers: Iterable[int], wanted: int) -> int | None:
    """The number closest to `wanted`, the smaller of two; None of none."""
    return min(numbers, key=lambda n: (abs(n - wanted), n), default=None)


def choose(tree: Tree, row: Row, tolerance: int, middle: bool = False) -> tuple:
    """The frames of one clip: (onset, apex, reason, notes).

    onset, apex: frame numbers that both views have, equal to the annotation's or the nearest
    within `tolerance` frames and a quarter of onset → apex; reason: why there are none, or '';
    notes: the rules that were applied. middle: the apex of a blank clip is the existing frame
    nearest to the middle of onset and offset. A blank clip that stays blank needs no frames.
    """
    rgb, depth, notes = tree.frames(row.subject, row.video, row.onset)
    both, notes = rgb.keys() & depth.keys(), list(notes)
    apex = row.apex
    if row.blank and not middle:
        if row.onset not in both:
            notes.append("blank clip without its frame: blank all the same")
            return None, None, "", notes
        return row.onset, row.onset, "", notes
    if not both:
        lack = "RGB" if not rgb else "depth" if not depth else "common"
        return None, None, f"no {lack} frames of video {row.video} found", notes
    if row.blank:
        apex = nearest([n for n in both if row.onset < n <= row.offset],
                       (row.onset + row.offset) // 2)
        if apex is None:
            return None, None, f"no frame between onset {row.onset} and offset {row.offset}", notes
        notes.append("blank: the frame in the middle taken as apex")
    numbers = []
    for name, wanted in (("onset", row.onset), ("apex", apex)):
        chosen = nearest(both, wanted)
        away = abs(chosen - wanted)
        if away > tolerance or 4 * away > apex - row.onset:
            return None, None, f"{name} {wanted} is missing, the nearest frame is {chosen}", notes
        if away:
            notes.append("missing frame: the nearest existing one")
        numbers.append(chosen)
    return *numbers, "", notes
