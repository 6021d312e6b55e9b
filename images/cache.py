"""Items decoded once: an array in memory or mapped from a folder, and batches of it in time."""
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from util import BadInput, RunFailed, leave_signals, remove_leftovers, replacing, write_json

GRACE = 15  # seconds that processes which decode go on after SIGTERM
_in_memory = weakref.WeakSet()  # every OnDemand that lies there


def stamp(paths: Iterable[str | Path], *settings) -> str:
    """Digest of files by place, size and time, and of what else their array depends on."""
    digest, known = hashlib.sha256(repr(settings).encode()), {}  # folder → where it lies
    for path in paths:
        try:
            stat = os.stat(path)
            folder, name = os.path.split(path)
            if folder not in known:  # each once: every part of it is looked at
                known[folder] = os.path.realpath(folder)
            place = os.path.join(known[folder], name)
            if os.path.islink(place):
                place = os.path.realpath(place)
            digest.update(f"{place} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        except OSError:  # a link to nowhere; who decodes it says so
            digest.update(f"{path} missing\n".encode())
    return digest.hexdigest()


def cached(items: list, decode: Callable, shape: tuple, dtype: type, stamp: str,
           folder: str = "off", num_workers: int = 4) -> "tuple[np.ndarray | Stream, str]":
    """Every item decoded once: (array `[N, *shape]`, SHA-256 of its bytes).

    decode(item) → array of `shape` and `dtype`, called by several threads or processes; stamp:
    what the result follows from. A folder keeps the array as a memory-mapped file under its
    stamp, and later calls map it; 'off' keeps it in memory. Where it fits neither, a Stream takes
    its place, and the digest is the stamp.
    """
    place, shape = Path(folder), (len(items), *shape)
    path, note = (place / f"{stamp[:32]}.{end}" for end in ("npy", "json"))
    if folder != "off":
        if note.exists() and path.exists():
            return np.load(path, mmap_mode="r"), json.loads(note.read_text())["sha256"]
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place, path.name)  # they hold as much room
    if not _fits(math.prod(shape) * np.dtype(dtype).itemsize, folder, num_workers):
        return Stream(items, decode, num_workers), stamp
    if folder == "off":
        images = np.empty(shape, dtype)
        return images, _fill(images, items, decode, num_workers)
    with replacing(path) as part:
        images = _claimed(part, shape, dtype)
        digest = _fill(images, items, decode, num_workers)
        images.flush()
    write_json(note, {"sha256": digest, "clips": len(items)})
    return np.load(path, mmap_mode="r"), digest


def _fits(volume, folder, num_workers, coming=0):
    """Whether so many bytes fit the folder, or memory, of which others will take those that are
    `coming`; says so where they do not."""
    room = shutil.disk_usage(folder).free if folder != "off" else _free_memory()
    room = max(room - coming, 0)
    if volume > 0.9 * room:
        print(f"{volume / 2 ** 30:.1f} GiB of images do not fit the {room / 2 ** 30:.1f} GiB free "
              f"{'in memory' if folder == 'off' else f'in {folder}'}: they are decoded for every "
              f"batch anew, by {max(num_workers, 1)} processes")
    return volume <= 0.9 * room


def _claimed(path, shape, dtype):
    """A new mapped array, whose room on the disk is claimed before it is written: a disk that
    fills up under a mapping is a bus error."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _fill(images, items, decode, num_workers):
    """Decodes into an array; its digest."""
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        decoded = pool.map(decode, items)
        for i, one in enumerate(tqdm(decoded, "decoding", len(items), disable=None)):
            images[i] = one
    return hashlib.sha256(images.data).hexdigest()


def _free_memory():
    """Bytes that can be had without swapping; no limit where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return float("inf")


class Decoders:
    """Processes that decode items which are kept nowhere: of many threads all but one would wait
    where Python runs between two images.

    They are forked at once, so that `decode` need not be pickled. Raises RunFailed where they
    cannot be started.
    """

    def __init__(self, decode: Callable, num_workers: int):
        self.workers, before = max(num_workers, 1), multiprocessing.active_children()
        self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"),
                                        _inherit, (decode,))
        failure = None
        try:
            self.pool.submit(os.getpid).result()  # the first task starts all of them
        except (OSError, RuntimeError) as error:  # no process, memory or thread is left
            failure = error
        self.processes = set(multiprocessing.active_children()) - set(before)
        if failure:
            raise self._failed(f"cannot be started ({failure})")

    def __call__(self, items: Iterable) -> list:
        """decode(item) of each, or the BadInput that it raised; raises RunFailed."""
        items = list(items)
        try:
            return list(self.pool.map(_attempt, items,
                                      chunksize=-(-len(items) // (4 * self.workers)) or 1))
        except BrokenExecutor:
            raise self._failed("was killed, for memory perhaps") from None

    def _failed(self, why):
        """The error of a process that decodes; the others end, which this one would wait for."""
        for process in self.processes:
            process.kill()
        return RunFailed(f"a process that decodes images {why}; run again, with fewer "
                         f"--num_workers")


def _inherit(decode):
    """Start of a process that decodes."""
    leave_signals()
    # who stops a run mostly tells all of its processes, and it wants to end its step and to save
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
    _attempt.decode = decode


def _attempt(item):
    try:
        return _attempt.decode(item)
    except BadInput as error:
        return error


class OnDemand:
    """Items decoded when they are first asked for: `[i]` and `[indices]` as of an array
    `[N, *shape]`.

    decode(i) → array of `shape` and `dtype`, called by several threads; an item for which it
    raises BadInput is named, left blank, and marked in `lost`, bool `[N]`. A folder keeps what is
    decoded as a memory-mapped file under its stamp, for later runs too; 'off' keeps it in memory;
    where it fits neither, processes call `decode` anew each time.
    """
    def __init__(self, n: int, decode: Callable, shape: tuple, dtype: type, stamp: str,
                 folder: str = "off", num_workers: int = 4):
        self.decode, self.shape, self.dtype = decode, shape, np.dtype(dtype)
        self.ready, self.lost = np.zeros(n, bool), np.zeros(n, bool)
        self.pool = ThreadPoolExecutor(max(num_workers, 1))
        self.decoders = None  # where nothing is kept
        self.array, self.note, self.mapped, self.unsaved = None, None, None, False
        volume = n * math.prod(shape) * self.dtype.itemsize
        path, note = (Path(folder) / f"{stamp[:32]}.{end}" for end in ("npy", "ready.npy"))
        if folder != "off":
            self.note = note
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._map(path)
                if note.exists():
                    self.ready = np.load(note)
                return
            remove_leftovers(path.parent, path.name)  # they hold as much room
        # in memory each rank of a node keeps one, and none has filled its own yet
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if folder == "off" else 1
        # nor have other sets, whose pages are not taken before they are filled
        coming = sum(other.array[:1].nbytes * int((~other.ready & ~other.lost).sum())
                     for other in _in_memory) if folder == "off" else 0
        if not _fits(volume * ranks, folder, num_workers, coming * ranks):
            self.decoders = Decoders(decode, num_workers)
            return
        if folder == "off":
            self.array = np.empty((n, *shape), dtype)
            _in_memory.add(self)
            return
        with replacing(path) as part:
            _claimed(part, (n, *shape), dtype)
            note.unlink(missing_ok=True)  # of an array that somebody removed, or that this replaces
        self._map(path)

    def _map(self, path):
        self.mapped = path, path.stat().st_ino  # others may put theirs in its place
        self.array = np.load(path, mmap_mode="r+")

    def __len__(self):
        return len(self.ready)

    def _decoded(self, i):
        try:
            return self._marked(i, self.decode(i))
        except BadInput as error:
            return self._marked(i, error)

    def _marked(self, i, item):
        """What stands for the i-th item, decoded or the error that it gave."""
        failed = isinstance(item, BadInput)
        if failed and not self.lost[i]:
            tqdm.write(f"left out: {item}", sys.stderr)  # rank 0 alone has a stdout
        self.lost[i] = failed  # not for ever: the disk may have been away for a while
        return np.zeros(self.shape, self.dtype) if failed else item

    def __getitem__(self, index):
        single = isinstance(index, (int, np.integer))
        index = np.atleast_1d(np.arange(len(self))[index])
        if self.array is None:
            batch = np.stack(list(map(self._marked, index, self.decoders(index))))
        else:
            new = np.unique(index[~self.ready[index]])
            for i, one in zip(new, self.pool.map(self._decoded, new)):
                if not self.lost[i] or self.mapped is None:  # another process may have read it
                    self.array[i] = one
                self.ready[i] = not self.lost[i]  # by the next run it may have been replaced
                self.unsaved = True
            batch = self.array[index]
        return batch[0] if single else batch

    def save(self) -> None:
        """Lets later runs know what is decoded, if it can be written; nothing where no folder keeps
        it."""
        if self.note is None or self.array is None or not self.unsaved:
            return
        ready, self.unsaved = self.ready.copy(), False  # more are decoded meanwhile
        try:
            self.array.flush()  # before the note of it: a machine that stops leaves no blank images
            path, number = self.mapped
            if path.stat().st_ino != number:
                return
            known = np.load(self.note) if self.note.exists() else False  # of another process
            with replacing(self.note) as part, open(part, "wb") as file:
                np.save(file, ready | known)
        except OSError as error:  # a run need not end of it
            tqdm.write(f"{error}: later runs will decode again", sys.stderr)


class Stream:
    """Stands in for the array of decoded items: processes decode what is asked for."""

    def __init__(self, items, decode, num_workers):
        self.items, self.decoders = items, Decoders(lambda i: decode(items[i]), num_workers)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        """An int, slice or array of indices → `[*shape]` or `[B, *shape]`; raises BadInput."""
        if isinstance(index, (int, np.integer)):
            return self[[index]][0]
        decoded = self.decoders(np.arange(len(self))[index])
        for failure in (item for item in decoded if isinstance(item, BadInput)):
            raise failure
        return np.stack(decoded)


def fetch(images: np.ndarray | Stream, batches: Iterable[np.ndarray],
          device: torch.device) -> Iterator[torch.Tensor]:
    """`images[index]` on `device`, uint8 `[B, C, S, S]`, for each index array of `batches`.

    The next one is fetched while one is used, for a GPU from pinned memory on a stream of its own:
    a copy from other memory would wait for the step before it, and the GPU for the copy.
    """
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream(device) if gpu else None

    def get(index):
        batch = torch.from_numpy(images[index])
        if gpu:
            with torch.cuda.stream(stream):
                batch = batch.pin_memory().to(device, non_blocking=True)
            stream.synchronize()
        return batch

    def ready(future):
        batch = future.result()
        if gpu:  # its memory is used again only after what the caller's stream does with it
            batch.record_stream(torch.cuda.current_stream(device))
        return batch

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for index in batches:
            done, coming = coming, pool.submit(get, index)
            if done:
                yield ready(done)
        if coming:
            yield ready(coming)
