"""A video as raw frames: expressions with rest between, and OpenFace's table of them."""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rendering.clips import truth
from rendering.expression import Job, Performance, perform
from rendering.face import Pose, face_of, measure_depth, noise, photograph, rng_of, shade
from util import write_text

OPENFACE_UNITS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45)
OPENFACE_COLUMNS = ("frame", "confidence", "success", "pose_Rx", "pose_Ry", "pose_Rz",
                    *(f"AU{unit:02d}_r" for unit in OPENFACE_UNITS))


@dataclass(frozen=True)
class Event:
    """One expression of a video: its frame numbers, the clip (Job) that names it, and what is left
    of it at the offset, a share."""
    onset: int
    apex: int
    offset: int
    job: Job
    rest: float = 0.0

    def level(self, frame: int) -> float:
        """Share of the full expression, 0 up to the onset, 1 at the apex, 0 after the offset."""
        if not self.onset < frame <= self.offset:
            return 0.0
        first, last = ((self.onset, self.apex) if frame <= self.apex
                       else (self.offset, self.apex))
        left = self.rest if frame > self.apex else 0.0
        return float(left + (1 - left) * np.sin(np.pi / 2 * (frame - first) / (last - first)) ** 2)


@dataclass(frozen=True)
class Video:
    """Raw frames to render: numbers `first` to `last` into color/ and depth/ of a folder; size:
    width and height in pixels; openface: the table's file."""
    subject: str
    name: str
    folder: Path
    openface: Path
    first: int
    last: int
    events: tuple
    size: tuple
    seed: int


def render_video(video: Video) -> tuple:
    """Writes the frames of one video and its OpenFace table. Returns the rows of truth.csv, one
    per event, and the box of the face in the first frame (x, y, width, height in pixels)."""
    rng = rng_of(video.seed, "video", video.subject, video.name)
    numbers = range(video.first, video.last + 1)
    acts = [perform(event.job) for event in video.events]
    poses, lights = wander(rng, acts[0], len(numbers))
    blinks = np.zeros(len(numbers))
    for event in video.events:  # between them
        middle = event.offset + 4 - video.first
        blinks += lids(len(numbers), middle, 1.2, 6) * (rng.random() < 0.5)
    blinks = blinks.tolist()
    width, height = video.size
    mm_per_px = 290 / height  # the head fills two thirds of the height
    face = face_of(video.subject, video.seed, mm_per_px)
    holes, table = noise(rng, (height, width), 2.5), {}
    for i, number in enumerate(numbers):
        units = {45: (blinks[i], blinks[i])} if blinks[i] > 0.05 else {}
        for event, act in zip(video.events, acts):
            level = event.level(number)
            units.update(act.sides(level) if level else {})
        image, z, body, absorb = shade(face, poses[i], lights[i], units, width, height, mm_per_px)
        _, jpeg = photograph(image, rng, 1.2, 95)
        (video.folder / "color" / f"{number}.jpg").write_bytes(jpeg)
        depth = measure_depth(z, body, absorb, rng, holes, step=1.0).astype(np.uint16)
        Image.fromarray(depth).save(video.folder / "depth" / f"{number}.png", compress_level=3)
        table[number] = _openface(rng, units, poses[i])
    _write_openface(video.openface, table)
    rows = []
    for event, act in zip(video.events, acts):
        rows.append(describe(event, act, video.first, (poses, lights, blinks)))
    first, px = poses[0], 1 / mm_per_px
    box = ((width - 1) / 2 + (first.x - 75) * px, (height - 1) / 2 + (first.y + 13 - 95) * px,
           150 * px, 185 * px)
    return rows, dict(zip(("x", "y", "width", "height"), (round(v, 1) for v in box)))


def wander(rng: np.random.Generator, act: Performance, n: int, rate: int = 30) -> tuple:
    """Lists of Pose and Light of `n` frames, `rate` a second: slow drift and flicker."""
    drift = noise(rng, (6, n), (0, rate / 3)).astype(float)
    x, y, roll, yaw, pitch, scale = drift * np.array([[1, 1, 0.006, 0.01, 0.01, 0.002]]).T
    poses = [act.pose.moved(Pose(*change, 1 + s))
             for *change, s in zip(x, y, roll, yaw, pitch, scale)]
    lights = [act.light.changed(float(gain), 0.0)
              for gain in 0.008 * noise(rng, (n,), rate / 20)]
    return poses, lights


def lids(n: int, middle: float, width: float, size: float) -> np.ndarray:
    """Shift of the upper lids in mm `[n]`: one blink about frame `middle`."""
    return size * np.exp(-0.5 * ((np.arange(n) - middle) / width) ** 2)


def describe(event: Event, act: Performance, first: int, course: tuple) -> dict:
    """Row of truth.csv of an expression; course: lists of poses, lights and blinks (mm), whose
    first frame is number `first`."""
    poses, lights, blinks = course
    a, b = event.onset - first, event.apex - first
    return truth(event.job, replace(
        act, pose=poses[a], motion=poses[a].to(poses[b]), blink=blinks[b] - blinks[a],
        light_gain=lights[b].key / lights[a].key - 1, light_turn=0.0))


def _openface(rng, units, pose):
    """One row of OpenFace's output: 0-5 per unit, one level per mm, a little noise."""
    level = {unit: sum(sides) / 2 for unit, sides in units.items()}
    level[23] = level.get(24, 0)  # OpenFace knows the lip tightener, not the lip presser
    values = [level.get(unit, 0) + 0.04 * rng.standard_normal() for unit in OPENFACE_UNITS]
    return [0.98, 1, round(pose.pitch, 4), round(pose.yaw, 4), round(pose.roll, 4),
            *(round(float(np.clip(v, 0, 5)), 2) for v in values)]


def _write_openface(path, table):
    """The table as OpenFace writes it: rows follow the file names sorted as strings (1, 10, 2),
    `frame` counts them from 1, and the header carries spaces."""
    rows = [[count, *table[number]] for count, number in enumerate(sorted(table, key=str), 1)]
    write_text(path, "".join(", ".join(map(str, row)) + "\n" for row in (OPENFACE_COLUMNS, *rows)))


def render_videos(videos: list) -> list:
    """What render_video returns, for all videos of one subject."""
    return [render_video(video) for video in videos]
