"""Five frames of a clip → registered crops, and the optical flow between them, once for all.

Three files hold all clips: frames.npy uint8 `[N, 5, 3, S, S]` (RGB); flow.npy float16
`[N, 4, 2, S, S]`; jitter.npy float16 `[R, 2, S, S]`, the steps in which jittered frames differ,
each pair of frames once. index.npy int32 `[N, V, 4]` says which steps make the variants of a clip:
numbers below 4 N are rows of flow.npy, those above continue in jitter.npy.
"""
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from images import flow
from preparation import registration
from preparation.cutting import LOOK_ON, UNREADABLE, Unusable, find_box, read_frame
from preparation.registration import Box, Framing
from util import replacing, write_bytes

RECORDS = ".prepare_flow"  # a folder may hold difference images too, with records of their own
FRAMES, STEPS = 5, 4
VERSION = 6  # of the computation: another one makes all records void


@dataclass(frozen=True)
class Settings(Framing):
    """What the flow depends on besides the frames."""
    size: int = 224
    flow: str = "dis"
    reference: str = "previous"


@dataclass(frozen=True)
class Task:
    """One clip. frames: paths of those it takes, the onset first; steps: (from, to), places in
    `frames`, of every step of motion, those of the plain clip first; variants: four places in
    `steps` each, the plain clip first; plain: places of its five frames; more: frames on which the
    face is looked for next; numbers: of the frames."""
    key: str
    frames: tuple
    plain: tuple
    steps: tuple
    variants: tuple
    numbers: tuple
    box: Box | None = None
    more: tuple = ()


# ---------------------------------------------------------------- which frames

def plan(key: str, variants: list, path_of: dict, reference: str, box: Box | None) -> Task:
    """The Task of a clip from the frames of its variants; path_of: number → path."""
    later = [path for number, path in sorted(path_of.items()) if number > variants[0][0]]
    steps, chosen = [], []
    for frames in variants:
        starts = frames[:-1] if reference == "previous" else (frames[0],) * STEPS
        chosen.append(list(zip(starts, frames[1:])))
        steps += chosen[-1]
    # the plain clip's four steps stay four, equal ones too
    steps = [*chosen[0], *dict.fromkeys(step for step in steps if step not in chosen[0])]
    numbers = list(dict.fromkeys([variants[0][0], *(n for step in steps for n in step)]))
    place = {number: i for i, number in enumerate(numbers)}
    return Task(key, tuple(path_of[number] for number in numbers),
                tuple(place[number] for number in variants[0]),
                tuple((place[a], place[b]) for a, b in steps),
                (tuple(range(STEPS)), *(tuple(map(steps.index, one)) for one in chosen[1:])),
                tuple(numbers), box, tuple(later[:LOOK_ON]))


# ---------------------------------------------------------------- one clip

def whole_matrix(width: int, height: int, size: int) -> np.ndarray:
    """Matrix `[2, 3]` that makes a whole frame a square of `size` pixels (registration)."""
    scale = np.array([width, height]) / size
    return np.concatenate([np.diag(scale), (scale / 2 - 0.5)[:, None]], 1)


def read_frames(task: Task) -> tuple[list[np.ndarray], int]:
    """(all frames of a clip, of one size; how many jittered ones cannot be used and have the plain
    one in their place). Raises Unusable for one of the plain five."""
    frames = []
    for i, name in enumerate(task.frames):
        try:
            frame = read_frame(name)
            if frames and frame.shape != frames[0].shape:
                raise Unusable(f"{name}: {frame.shape[1]}x{frame.shape[0]} pixels, but the onset "
                               f"has {frames[0].shape[1]}x{frames[0].shape[0]}")
        except Unusable:
            if i in (0, *task.plain):
                raise
            frame = None
        frames.append(frame)
    lost = sum(frame is None for frame in frames)
    for variant in task.variants:
        chosen = [task.steps[variant[0]][0], *(task.steps[step][1] for step in variant)]
        for i, plain in zip(chosen, task.plain):
            if frames[i] is None:
                frames[i] = frames[plain]
    return frames, lost


def cut_frames(task: Task, settings: Settings) -> tuple[np.ndarray, dict]:
    """(crops uint8 `[F, S, S, 3]` of all frames of a clip, registered onto the onset; {failed: how
    many did not register and moved as lies between those around them that did: standing still among
    frames that move, they would show a motion of the head; whole: how many by the whole face alone;
    replaced: jittered ones in whose place the plain one stands}). Raises Unusable."""
    size, (frames, replaced) = settings.size, read_frames(task)
    height, width = frames[0].shape[:2]
    box, margin = None, settings.margin
    met = {"failed": 0, "whole": 0, "replaced": replaced}
    if settings.crop != "none":
        box, _ = find_box(task, settings, frames[0])

    def framing(side):
        """(matrix of crops of `side` pixels, the face's box in their terms)"""
        if box:
            return registration.crop_matrix(box, side, margin), (box, side, margin)
        return whole_matrix(width, height, side), (Box(0, 0, side, side), side, 0.0)
    matrix, _ = framing(size)
    warps = {0: np.eye(2, 3)}  # of the onset, and of what registers onto it
    if settings.register != "none":
        side = max(size, registration.LEAST_SIDE)
        large, where = framing(side)
        masks = registration.stable_mask(*where), registration.face_mask(*where)
        onset, *others = (registration.cut(frame, large, side) for frame in frames)
        pixel = (1, 1) if box else (width, height)
        for i, other in enumerate(others, 1):
            warp, by = registration.register(onset, other, masks, settings.register, pixel)
            met["failed"] += not by
            met["whole"] += by > 1
            if by:
                warps[i] = registration.resized(warp, side, size)
    known = sorted(warps, key=task.numbers.__getitem__)
    cells = np.stack([warps[i].ravel() for i in known], 1)  # [6, W]
    moved = np.stack([np.interp(task.numbers, [task.numbers[i] for i in known], cell)
                      for cell in cells], 1).reshape(-1, 2, 3)
    return np.stack([registration.cut(frame, registration.compose(matrix, warp), size)
                     for frame, warp in zip(frames, moved)]), met


def process(task: Task, settings: Settings, folder: str | Path) -> dict:
    """Writes the frames and the flow of one clip to its record below `folder`, unless they are
    there already.

    Returns {path, steps, failed, whole, replaced}, or {dropped: reason}.
    """
    stamp = fingerprint(task, settings)
    path = Path(folder) / RECORDS / f"{stamp[:24]}.npz"
    try:
        with np.load(path) as content:
            return {"path": str(path), "steps": len(task.steps),
                    **{name: int(content[name]) for name in ("failed", "whole", "replaced")}}
    except UNREADABLE:
        pass
    try:
        crops, met = cut_frames(task, settings)
    except Unusable as error:
        return {"dropped": str(error)}
    grey = [flow.grey(crop) for crop in crops]
    steps = np.stack([flow.flow_between(grey[a], grey[b], settings.flow) for a, b in task.steps])
    file = io.BytesIO()
    np.savez(file, frames=crops[list(task.plain)].transpose(0, 3, 1, 2),
             steps=steps.astype(np.float16), **met)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, file.getvalue())
    return {"path": str(path), "steps": len(task.steps), **met}


def fingerprint(task: Task, settings: Settings) -> str:
    """Digest of what the flow of a clip follows from."""
    read = (*task.frames, *task.more * (settings.crop == "mtcnn"))
    stat = [os.stat(name) for name in read]
    content = [VERSION, flow.parameters(settings.flow), asdict(settings), asdict(task),
               [(s.st_size, s.st_mtime_ns) for s in stat]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- all clips

def assemble(folder: Path, tasks: list, records: list, size: int) -> dict:
    """Writes frames.npy, flow.npy, jitter.npy and index.npy from the records of the clips; returns
    name → SHA-256 of each."""
    count, more = len(tasks), sum(record["steps"] - STEPS for record in records)
    index = np.zeros((count, max(len(task.variants) for task in tasks), STEPS), np.int32)
    shapes = {"frames": ((count, FRAMES, 3, size, size), np.uint8),
              "flow": ((count, STEPS, 2, size, size), np.float16),
              "jitter": ((more, 2, size, size), np.float16)}
    digests = {name: hashlib.sha256() for name in shapes}
    with (replacing(folder / "frames.npy") as frames_part, replacing(folder / "flow.npy") as part,
          replacing(folder / "jitter.npy") as jitter_part):
        files = {"frames": frames_part, "flow": part, "jitter": jitter_part}
        arrays = {name: _create(files[name], *shapes[name]) for name in shapes}
        row = 0
        for n, (task, record) in enumerate(zip(tasks, records)):
            with np.load(record["path"]) as content:
                steps = content["steps"]
                parts = {"frames": (n, content["frames"]), "flow": (n, steps[:STEPS]),
                         "jitter": (slice(row, row + len(steps) - STEPS), steps[STEPS:])}
            for name, (place, value) in parts.items():
                if len(value):
                    arrays[name][place] = value
                    digests[name].update(np.ascontiguousarray(value).data)
            # of a clip with fewer variants each comes up again
            local = np.resize(np.array(task.variants), index.shape[1:])
            index[n] = np.where(local < STEPS, n * STEPS + local,
                                count * STEPS + row + local - STEPS)
            row += len(steps) - STEPS
        del arrays  # flushed
    file = io.BytesIO()
    np.save(file, index)
    write_bytes(folder / "index.npy", file.getvalue(), flush=True)
    return {name: digest.hexdigest() for name, digest in digests.items()} \
        | {"index": hashlib.sha256(index.data).hexdigest()}


def _create(path, shape, dtype):
    """An array in a file `path`, claimed before it is written: a disk that fills up under a mapping
    is a bus error; one without rows is written at once."""
    if not shape[0]:
        with open(path, "wb") as file:
            np.save(file, np.empty(shape, dtype))
        return None
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, Path(path).stat().st_size)
    return array
