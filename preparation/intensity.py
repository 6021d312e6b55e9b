"""Intensity perception: onset/apex pairs from unlabelled videos.

From OpenFace's per-frame action-unit intensities: within a window, the largest rise of any unit.
Without them: the change between the ends of each window, measured after registration.
"""
import argparse
import os
import re
from pathlib import Path

import numpy as np
from scipy.ndimage import median_filter

from images.lists import clip_key
from preparation.annotation import NO_OFFSET, Row, Table, with_paths
from preparation.frames import Tree, subject_number
from util import BadInput, read_cells

LEVELS = "levels"  # stands for the unit where the change was measured in grey levels
BLINK = 45
MEDIAN = 5  # frames
VIDEO = re.compile(r"(?i)spno\.?(\d+)[/_-]([a-z]+)(?:[/_-](?:color|frame|rgb))?\.csv$")


def find_pairs(tree: Tree, opt: argparse.Namespace, table: Table) -> tuple:
    """(Rows of the pairs, what the search met: videos, those stopped with the reason, pairs per
    unit).

    table: the annotated clips; windows that overlap one are left out. Raises BadInput.
    """
    files = find_csv(opt.au) if opt.intensity == "au" else {}
    labelled, pairs, stopped = labelled_spans(table), [], []
    videos = tree.videos()
    if not videos:
        raise BadInput(f"{opt.unlabelled}: no whole video spNO.<number>/<video> in it; name Part A "
                       f"or Part B, not the package of annotated clips")
    for subject, video in videos:
        rgb, depth, _ = tree.frames(f"spNO.{subject}", video)
        name = f"spNO.{subject}-{video}"
        numbers = np.array(sorted(rgb), dtype=np.int64)
        if not depth or not rgb:
            stopped.append((name, "no RGB and depth frames"))
            continue
        usable = np.isin(numbers, list(depth))
        for start, end in labelled.get((subject, video), ()):
            usable &= (numbers < start) | (numbers > end)
        if opt.intensity == "difference":
            spans = tile(numbers, usable, opt.window)
        elif (subject, video) not in files:
            stopped.append((name, "no CSV file of action units"))
            continue
        else:
            try:
                spans = rises(files[subject, video], rgb, numbers, usable, opt)
            except ValueError as error:
                stopped.append((name, str(error)))
                continue
        for onset, apex, strength, unit in spans:
            key = clip_key(f"spNO.{subject}", video, onset, apex)
            row = Row(0, f"spNO.{subject}", video, onset, apex, None, unit, "", key,
                      intensity=strength)
            pairs.append(with_paths(row, "unlabelled", opt.classes))
    if not pairs:
        reasons = "; ".join(f"{name}: {why}" for name, why in stopped[:3])
        raise BadInput(f"{opt.unlabelled}: no pair in {len(videos)} videos"
                       + (f"; {reasons}" if reasons else f" at --floor {opt.floor:g} or more"))
    return pairs, {"videos": len(videos), "stopped": stopped}


def labelled_spans(table: Table) -> dict:
    """(subject number, video) → (first, last frame) of every annotated clip."""
    spans = {}
    for row in table.annotated:
        if not row.files:
            key = subject_number(row.subject), row.video.lower()
            # published lists name no offset
            offset = row.onset + NO_OFFSET if row.offset is None else row.offset
            spans.setdefault(key, []).append((row.onset, max(row.apex, offset)))
    return spans


def find_csv(folder: str) -> dict:
    """(subject number, video) → OpenFace CSV; raises BadInput."""
    files = {}
    for path in sorted(Path(folder).rglob("*.csv")):
        match = VIDEO.search(path.relative_to(folder).as_posix())
        if match and not path.name.startswith("."):
            key = int(match[1]), match[2].lower()
            if key in files:
                raise BadInput(f"{path}: a second file for the video of {files[key]}; keep one")
            files[key] = path
    if not files:
        raise BadInput(f"{folder}: no CSV file named after subject and video, such as "
                       f"spNO.1_a.csv; --au names the folder with OpenFace's output")
    return files


# ---------------------------------------------------------------- OpenFace

def read_openface(path: str | Path) -> dict:
    """Columns of an OpenFace CSV as dict name → float `[N]`; raises BadInput."""
    cells = read_cells(path, "--au names OpenFace's output")
    names = [name.strip() for name in next(cells, (1, []))[1]]
    try:
        table = np.array([[float(v) for v in row] for _, row in cells], dtype=float)
    except ValueError as error:
        raise BadInput(f"{path}: not a CSV file of numbers below a header ({error})") from None
    columns = dict(zip(names, table.T if len(table) else np.empty((len(names), 0))))
    wanted = ("frame", "confidence", "success", "pose_Rx", "pose_Ry", "pose_Rz")
    missing = [n for n in wanted if n not in columns]
    if missing or not any(re.fullmatch(r"AU\d+_r", n) for n in names):
        raise BadInput(f"{path}: no {', '.join(missing) or 'AU.._r columns'}; OpenFace's "
                       f"FeatureExtraction writes them with -aus -pose")
    return columns


def rows_of(columns: dict, rgb: dict, numbers: np.ndarray, how: str) -> np.ndarray:
    """Index of the row that belongs to each frame number; raises ValueError with the reason.

    rgb: frame number → path; how: --au_index.
    """
    frame = columns["frame"].astype(np.int64)
    if len(frame) != len(numbers):
        raise ValueError(f"{len(frame)} rows of action units for {len(numbers)} frames")
    order = np.argsort(frame, kind="stable")
    if how == "name":
        if (frame[order] != numbers).any():
            raise ValueError("the frame column does not hold the files' numbers; see --au_index")
        return order
    if how == "numeric":
        return order
    # OpenFace numbers the files in the order of their names as strings: 1 10 100 2.
    names = sorted(range(len(numbers)), key=lambda i: os.path.basename(rgb[int(numbers[i])]))
    return order[np.argsort(names)]


def rises(path: str | Path, rgb: dict, numbers: np.ndarray, usable: np.ndarray,
          opt: argparse.Namespace) -> list:
    """(onset, apex, intensity, unit) of the windows of one video, the strongest first chosen (of
    those equal to a tenth, the shortest: noise at rest makes long ones look stronger), none
    overlapping, sorted by onset. usable: bool `[N]`, frames that may count; raises
    ValueError with the reason where the rows do not fit the frames."""
    columns = read_openface(path)
    rows = rows_of(columns, rgb, numbers, opt.au_index)
    units = sorted(int(m[1]) for m in (re.fullmatch(r"AU(\d+)_r", n) for n in columns) if m)
    lacking = sorted(set(opt.aus or ()) - set(units))
    if lacking:
        raise BadInput(f"{path}: no column AU{lacking[0]:02d}_r; it holds the units "
                       f"{' '.join(map(str, units))}, name some of them with --aus")
    units = sorted(set(opt.aus)) if opt.aus else [u for u in units if u != BLINK]
    values = np.stack([columns[f"AU{u:02d}_r"][rows] for u in units], 1)  # [N, U]
    pose = np.stack([columns[f"pose_R{axis}"][rows] for axis in "xyz"], 1)
    speed = np.degrees(np.abs(np.diff(pose, axis=0)).max(1, initial=0))
    steady = np.ones(len(numbers), bool)
    steady[1:] = (speed <= opt.max_rotation) | (np.diff(numbers) != 1)
    good = (usable & steady & (columns["confidence"][rows] >= opt.min_confidence)
            & (columns["success"][rows] == 1))
    candidates = []
    for first, last in runs(numbers, good):
        smooth = median_filter(values[first:last], size=(MEDIAN, 1), mode="nearest")
        candidates += windows(smooth, first, opt.window, opt.floor)
    chosen, taken = [], np.zeros(len(numbers), bool)
    for strength, i, j, unit in sorted(
            candidates, key=lambda c: (-round(c[0], 1), c[2] - c[1], -c[0], *c[1:])):
        if not taken[i:j + 1].any():
            taken[i:j + 1] = True
            chosen.append((int(numbers[i]), int(numbers[j]), strength, f"AU{units[unit]:02d}"))
    return sorted(chosen)


def runs(numbers: np.ndarray, good: np.ndarray) -> list:
    """[first, last) of the stretches of consecutive frame numbers that are all good."""
    at = np.flatnonzero(good)
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(numbers[at]) != 1)) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(at, breaks) if len(run)]


def windows(values: np.ndarray, first: int, longest: int, floor: float) -> list:
    """(rise, i, j, unit) of all windows of `values` `[n, U]` whose largest rise reaches the floor;
    i, j count from `first` on. A rise is above 0: later minus earlier."""
    candidates = []
    for gap in range(1, min(longest, len(values) - 1) + 1):
        rise = values[gap:] - values[:-gap]  # [n - gap, U]
        unit = rise.argmax(1)
        best = rise[np.arange(len(rise)), unit]
        for i in np.flatnonzero((best >= floor) & (best > 0)):
            candidates.append((float(best[i]), first + int(i), first + int(i) + gap, int(unit[i])))
    return candidates


def tile(numbers: np.ndarray, usable: np.ndarray, window: int) -> list:
    """Windows of `window` frames side by side, as (onset, apex, 0, no unit): the change between
    their ends is measured when they are cut."""
    return [(int(numbers[i]), int(numbers[i + window]), 0.0, "")
            for first, last in runs(numbers, usable)
            for i in range(first, last - window, window + 1)]
