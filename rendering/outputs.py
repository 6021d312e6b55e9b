"""What every rendered set shares: options, folder and record, processes, classes, tables, sheet."""
import argparse
import functools
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from util import (
    BadInput,
    RunFailed,
    add_processes,
    handled,
    leave_signals,
    number,
    remove_leftovers,
    replacing,
    write_bytes,
    write_json,
)

# Per subject the classes are as uneven as in the published lists of CAS(ME)^3: the Dirichlet
# concentration that fits those best.
UNEVEN = 6.0


# ---------------------------------------------------------------- options

def add_folder(group: argparse._ArgumentGroup) -> None:
    """--data_folder."""
    group.add_argument("--data_folder", required=True, metavar="DIR",
                       help="folder to write; reused if it holds the same rendering already")


def add_amplitude(group: argparse._ArgumentGroup) -> None:
    """--amplitude; `group` may be one of flags that exclude each other."""
    group.add_argument("--amplitude", type=number(float, 0, 4), default=1.0,
                       help="factor on all expressions; 0: faces without any expression")


def add_running(parser: argparse.ArgumentParser) -> None:
    """The groups "running" and "output"."""
    group = parser.add_argument_group("running")
    add_processes(group)
    group.add_argument("--seed", type=number(int, 0), default=0,
                       help="everything drawn follows from (seed, clip)")
    group = parser.add_argument_group("output")
    group.add_argument("--preview", metavar="FILE.png",
                       help="also write a sheet of example clips to this file [none]")


# ---------------------------------------------------------------- the folder

def render_once(data_folder: str, asked: dict, note: str, write: Callable[[Path], dict]) -> Path:
    """Renders a set, unless the folder holds it already; returns the folder.

    asked: what its content depends on; note: what the data are not; write(folder): renders all of
    it into a new folder and returns the counts.
    """
    folder = Path(os.path.realpath(data_folder))  # a link cannot be replaced by a folder
    finished = find_finished(folder, asked)
    if finished:
        print(f"{folder}: rendered already with these options, reused")
        print_summary(folder, finished["counts"], note, None)
        return folder
    if os.path.ismount(folder):
        raise BadInput(f"{folder}: a mount point, which cannot be replaced; name a folder below it "
                       f"as --data_folder")
    start = time.time()
    remove_leftovers(folder.parent, folder.name)
    with replacing(folder) as part:
        part.mkdir(parents=True)
        counts = write(part)
        write_json(part / "rendered.json", {"note": note, "options": asked, "counts": counts})
    print_summary(folder, counts, note, time.time() - start)
    return folder


def find_finished(folder: Path, asked: dict) -> dict | None:
    """rendered.json of a folder that holds what is asked for; None for no folder or an empty one.
    Raises BadInput for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        record = json.loads((folder / "rendered.json").read_text(encoding="utf-8"))
        options = record["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{folder}: holds something that this script did not render; name another "
                       f"--data_folder") from None
    differ = sorted(k for k in asked.keys() | options.keys() if asked.get(k) != options.get(k))
    if differ:
        raise BadInput(
            f"{folder}: rendered with other options ("
            + ", ".join(f"{k} {options.get(k)} there, {asked.get(k)} asked for" for k in differ)
            + "); remove it or name another --data_folder")
    return record


def print_summary(folder: Path, counts: dict, note: str, seconds: float | None) -> None:
    """Prints the counts of what was rendered, and where it is."""
    print(", ".join(f"{name} {count}" for name, count in counts.items() if count)
          + (f"; {seconds:.1f} s" if seconds else ""))
    print(f"{note}: {folder}")


def _with_one_thread(function, task):
    """The tasks are what runs in parallel: as many threads of NumPy's in each process wait for a
    core, and small products of matrices take sixty times as long."""
    with threadpool_limits(1):
        return function(task)


def in_parallel(function: Callable, tasks: Iterable[list], num_workers: int,
                unit: str = "clip") -> list:
    """All that `function(task)` lists, over all tasks (lists), with a progress bar."""
    tasks = sorted(tasks, key=len, reverse=True)
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), initializer=leave_signals) \
        if num_workers > 1 else None
    rows, function = [], functools.partial(_with_one_thread, function)
    with tqdm(total=sum(map(len, tasks)), desc="rendering", unit=unit, disable=None) as bar:
        try:
            for task, result in zip(tasks, (pool.map if pool else map)(function, tasks)):
                rows += result
                bar.update(len(task))
        except BrokenExecutor:
            raise RunFailed("a worker was killed, for memory perhaps; run again, with fewer "
                            "--num_workers") from None
        finally:
            if pool:
                with handled(lambda *_: None):  # a second signal would leave workers that wait
                    pool.shutdown(cancel_futures=True)
    return rows


# ---------------------------------------------------------------- who shows which class

def apportion(total: int, weights: np.ndarray, least: int) -> np.ndarray:
    """`total` in whole parts, int `[n]`, in proportion to `weights` `[n]`, none below `least`."""
    quota = total * np.asarray(weights) / np.sum(weights)
    parts = np.maximum(least, np.floor(quota).astype(int))
    while parts.sum() < total:
        parts[np.argmax(quota - parts)] += 1
    while parts.sum() > total:
        parts[np.argmax(np.where(parts > least, parts - quota, -np.inf))] -= 1
    return parts


def deal_labels(labels: np.ndarray, rest: int, counts: dict, share: np.ndarray,
                rng: np.random.Generator) -> None:
    """Deals classes out over the clips of all subjects, every class to two subjects at least.

    labels: int `[subjects, clips]`, changed in place: those of the class `rest` are dealt another
    or stay; counts: dict class id → clips, the rarest first; share: `[subjects, classes]`, how
    likely each subject shows each class.
    """
    for label, count in counts.items():
        holders = []
        for n in range(count):
            chance = share[:, label] * (labels == rest).sum(1)
            if n == 1 and np.delete(chance, holders).any():
                chance[holders] = 0
            holders.append(rng.choice(len(labels), p=chance / chance.sum()))
            labels[holders[-1], rng.choice(np.nonzero(labels[holders[-1]] == rest)[0])] = label


# ---------------------------------------------------------------- what is written

def write_workbook(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes a table as .xlsx; the same rows give the same bytes. Raises BadInput where there is
    no openpyxl."""
    try:
        import openpyxl
    except ImportError:
        raise BadInput(f"{path.name}: writing .xlsx takes openpyxl; pip install -r "
                       f"requirements-prepare.txt, or take --workbook csv") from None
    book, saved, content = openpyxl.Workbook(), io.BytesIO(), io.BytesIO()
    for row in (columns, *rows):
        book.active.append(row)
    book.save(saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(content, "w") as new:
        for name in old.namelist():  # openpyxl writes the time of day, in two places
            part = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"2000-01-01T00:00:00Z",
                          old.read(name))
            new.writestr(zipfile.ZipInfo(name), part, zipfile.ZIP_DEFLATED)
    write_bytes(path, content.getvalue())


def write_sheet(file: Path, titles: tuple, rows: Iterable[tuple], note: str,
                size: tuple = (256, 256)) -> None:
    """Writes pictures of example clips as one PNG.

    titles: one per column; rows: (pictures as uint8 `[H, W]` or `[H, W, 3]`, caption), one per
    clip; size: width and height of the pictures in pixels.
    """
    rows, gap, head = list(rows), 6, 30
    width, height = size
    sheet = Image.new("RGB", (len(titles) * width + (len(titles) + 1) * gap,
                              head + len(rows) * (height + head) + head), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)
    for col, title in enumerate(titles):
        draw.text((gap + col * (width + gap), 6), title, "black", font)
    for row, (pictures, caption) in enumerate(rows):
        top = head + row * (height + head)
        for col, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).convert("RGB"), (gap + col * (width + gap), top))
        draw.text((gap, top + height + 4), caption, "black", font)
    draw.text((gap, sheet.height - head + 4), note, "black", font)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        sheet.save(part, "PNG")
    print(f"example clips: {file}")
