"""A stand-in for CASME II as it is received: frames of clips, and the workbook, with drawn faces.

    python render.py casme2 --data_folder data/casme2_raw --subjects 8 --clips 60

The folder holds sub01/EP02_01f/reg_img46.jpg and so on, the workbook that names onset, apex, offset
and class of every clip, and truth.csv (what each clip shows): 60 clips here, in about 30 s on one
core. Only those frames are rendered that five of a clip can be, however they are jittered;
--all_frames renders all.
"""
import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from images import encoding
from images.videos import jittered
from rendering import clips, outputs
from rendering.expression import Job, draw_usual, perform
from rendering.face import face_of, photograph, rng_of, shade
from rendering.videos import Event, describe, lids, wander
from util import BadInput, number, write_table

NOTE = "rendered stand-in data, not CASME II"
CLASSES = ("happiness", "repression", "disgust", "surprise", "others")
COUNTS = (32, 27, 63, 25, 99)  # of the set itself, 246 in all
DROPPED = {"fear": 2, "sadness": 7}  # rows of the workbook that are in none of the five classes
# Clips of each of the 26 subjects: as uneven as there, 246 in all.
PER_SUBJECT = (34, 19, 17, 16, 14, 13, 13, 12, 12, 11, 10, 9, 9, 8, 7, 7, 6, 5, 4, 4, 3, 3, 3, 3,
               2, 2)
# Action units as the workbook writes them, the commonest first. What is left out are units the face
# model lacks: 16, 18, 23 and 38, rare in the set. As there, some combinations tell no two classes
# apart: 4 and 4+7 are disgust or others, 14 and 17 repression or others.
UNITS = {
    "happiness": ["6+12", "12", "6+7+12", "L12"],
    "repression": ["15", "17", "15+17", "14+17"],
    "disgust": ["4+7", "4+9", "9+10", "4", "L10"],
    "surprise": ["1+2", "1+2+5", "2", "1+2+25"],
    "others": ["4", "14", "4+14", "R14", "4+7", "L14", "4+R12", "17"],
    "fear": ["1+4", "4+5+20"],
    "sadness": ["1+4", "15"],
}
UNCODED = 1 / 80  # share of rows whose action units are "?"
COLUMNS = ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units",
           "Estimated Emotion")
WORKBOOKS = {"2014": "CASME2-coding-20140508.xlsx", "2019": "CASME2-coding-20190701.xlsx",
             "csv": "CASME2-coding-20140508.csv"}
RATE = 200  # frames a second
LENGTHS = (12, 40)  # frames from onset to apex, and from apex to offset
SPAN = 800  # frames over which the head's course is drawn: many times as long as it correlates
ALL_SUBJECTS = len(PER_SUBJECT)


@dataclass(frozen=True)
class Film:
    """One clip to render. written: its units in the workbook; files: (frame number, JPEG file to
    write) each; size: width and height, pixels."""
    event: Event
    name: str
    written: str
    files: tuple
    size: tuple


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `render.py casme2`."""
    group = parser.add_argument_group("data")
    outputs.add_folder(group)
    group.add_argument("--subjects", type=number(int, 2), default=ALL_SUBJECTS,
                       help="number of subjects, with unevenly many clips")
    group.add_argument("--clips", type=number(int, len(CLASSES)), default=sum(COUNTS),
                       help="clips of the five classes, in the set's proportions; from 100 on, "
                            "9 of fear and sadness come on top")
    group.add_argument("--workbook", choices=tuple(WORKBOOKS), default="2014",
                       help="the workbook of 2014; that of 2019, where one apex is '/' and one is "
                            "the onset; or the first as a CSV file")
    group.add_argument("--prefix", choices=("reg_img", "img"), default="reg_img",
                       help="of the frames' file names, before the number")
    group.add_argument("--all_frames", action="store_true",
                       help="render every frame from onset to offset")
    group = parser.add_argument_group("picture")
    group.add_argument("--size", type=number(int, 48, 1920), nargs=2, default=[280, 340],
                       metavar=("W", "H"), help="width and height of the frames, pixels")
    group = group.add_mutually_exclusive_group()
    outputs.add_amplitude(group)
    group.add_argument("--no_expression", dest="amplitude", action="store_const", const=0.0,
                       help="the control: labels as ever, faces without any expression; the same "
                            "as --amplitude 0")
    outputs.add_running(parser)


def check_options(_: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Raises BadInput for flags that do not go together."""
    if opt.clips < opt.subjects:
        raise BadInput(f"--clips {opt.clips} --subjects {opt.subjects}: every subject shows a clip "
                       f"at least; ask for {opt.subjects} clips or more")


def run(opt: argparse.Namespace) -> None:
    """Renders what the options ask for, unless the folder holds it already."""
    asked = {"set": "casme2", **{name: getattr(opt, name) for name in (
        "subjects", "clips", "workbook", "prefix", "all_frames", "size", "amplitude", "seed")}}
    folder = outputs.render_once(opt.data_folder, asked, NOTE, lambda part: write_set(opt, part))
    if opt.preview:
        outputs.write_sheet(Path(opt.preview), (
            "onset", "between", "apex", "offset", "apex - onset, x6"), examples(opt, folder), NOTE,
            tuple(opt.size))


# ---------------------------------------------------------------- which clips

def draw_classes(subjects: int, total: int, seed: int) -> list[list[str]]:
    """Emotions of every subject's clips: the classes in their proportions, uneven over subjects."""
    rng = rng_of(seed, "classes")
    counts = outputs.apportion(total, COUNTS, 2 if total >= 2 * len(CLASSES) else 1)
    ladder = np.interp(np.linspace(0, ALL_SUBJECTS - 1, subjects), range(ALL_SUBJECTS), PER_SUBJECT)
    sizes = rng.permutation(outputs.apportion(total, ladder, 2 if total >= 2 * subjects else 1))
    rest = CLASSES.index("others")
    labels = np.where(np.arange(sizes.max()) < sizes[:, None], rest, -1)
    share = rng.dirichlet(outputs.UNEVEN * np.array(COUNTS) / sum(COUNTS), subjects) + 1e-3
    if subjects >= ALL_SUBJECTS:  # a few show one class only, as in the set
        first, second, third = np.argsort(sizes, kind="stable")[:3]
        share[[first, third]] = 0
        labels[second, :sizes[second]] = CLASSES.index("disgust")
        counts[CLASSES.index("disgust")] -= sizes[second]
    outputs.deal_labels(labels, rest, {i: counts[i] for i in np.argsort(counts).tolist()
                                       if i != rest}, share, rng)
    shown = [[CLASSES[label] for label in row[:size]] for row, size in zip(labels, sizes)]
    for emotion, count in DROPPED.items() if total >= 100 else ():
        for subject in rng.integers(subjects, size=count):
            shown[subject].append(emotion)
    return shown


def name_videos(rng: np.random.Generator, count: int) -> list[str]:
    """File names of a subject's clips; all subjects have one EP02_01f, and others in common."""
    takes = max(12, count // 10)
    names = [f"EP{1 + i // takes:02d}_{1 + i % takes:02d}{'f' * (rng.random() < 0.7)}"
             for i in rng.permutation(19 * takes).tolist()]
    return ["EP02_01f", *(name for name in names if name[:7] != "EP02_01")][:count]


def sampled(onset: int, apex: int, offset: int) -> list[int]:
    """Numbers of the frames that five of a clip can be, jittered or not, whatever the third is."""
    return sorted({number for published in (False, True)
                   for frames in jittered(onset, apex, offset, published, offset, "previous")
                   for number in frames})


def plan_films(opt: argparse.Namespace, folder: Path) -> list[list[Film]]:
    """Films of every subject, in the order of the workbook."""
    plan = []
    for i, emotions in enumerate(draw_classes(opt.subjects, opt.clips, opt.seed), 1):
        subject, rng = f"sub{i:02d}", rng_of(opt.seed, "films", i)
        films = []
        for name, emotion in sorted(zip(name_videos(rng, len(emotions)), emotions)):
            onset = int(rng.integers(1, 200))
            apex = onset + int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
            offset = apex + int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
            units, rest = str(draw_usual(UNITS[emotion], rng)), float(rng.uniform(0.05, 0.25))
            job = Job(f"{subject}-{name}-{onset}", subject, emotion, amplitude=opt.amplitude,
                      seed=opt.seed, units=units)
            numbers = range(onset, offset + 1) if opt.all_frames else sampled(onset, apex, offset)
            films.append(Film(
                Event(onset, apex, offset, job, rest), name,
                "?" if rng.random() < UNCODED else units,
                tuple((n, str(folder / subject / name / f"{opt.prefix}{n}.jpg")) for n in numbers),
                tuple(opt.size)))
        plan.append(films)
    return plan


# ---------------------------------------------------------------- rendering

def render_film(film: Film) -> dict:
    """Writes the frames of one clip; returns its row of truth.csv."""
    event, job = film.event, film.event.job
    act, rng = perform(job), rng_of(job.seed, "film", job.key)
    poses, lights = wander(rng, act, SPAN, RATE)
    middle = rng.uniform(0, event.offset - event.onset)
    blinks = lids(SPAN, middle, RATE / 25, abs(act.blink)).tolist()  # none in most clips
    width, height = film.size
    mm_per_px = max(160 / height, 131 / width)  # forehead to chin, as the official crops are cut
    face = face_of(job.subject, job.seed, mm_per_px)
    Path(film.files[0][1]).parent.mkdir(parents=True)
    for frame, path in film.files:
        i, level = frame - event.onset, event.level(frame)
        units = {45: (blinks[i], blinks[i])} if blinks[i] > 0.05 else {}
        units.update(act.sides(level) if level else {})
        image = shade(face, poses[i], lights[i], units, width, height, mm_per_px)[0]
        # noise of a frame's own: the same whether its neighbours are rendered or not
        _, jpeg = photograph(image, rng_of(job.seed, "camera", job.key, frame), 1.2, 95)
        Path(path).write_bytes(jpeg)
    label = CLASSES.index(job.emotion) if job.emotion in CLASSES else ""
    return {**describe(event, act, event.onset, (poses, lights, blinks)), "label": label,
            "action_units": job.units, "filename": film.name, "onset": event.onset,
            "apex": event.apex, "offset": event.offset, "rest": round(event.rest, 3)}


def render_films(films: list) -> list:
    """All clips of one subject, so that its face is built once; rows of truth.csv."""
    return [render_film(film) for film in films]


def write_set(opt: argparse.Namespace, folder: Path) -> dict:
    """Renders frames, workbook and truth.csv into `folder`; returns the counts."""
    plan, start = plan_films(opt, folder), time.time()
    films = [film for part in plan for film in part]
    path, table = folder / WORKBOOKS[opt.workbook], table_of(opt, films)
    (write_table if path.suffix == ".csv" else outputs.write_workbook)(path, COLUMNS, table)
    rows = {row["key"]: row for row in outputs.in_parallel(render_films, plan, opt.num_workers)}
    write_table(folder / "truth.csv", list(next(iter(rows.values()))),
                [rows[film.event.job.key] for film in films])
    seconds, frames = time.time() - start, sum(len(film.files) for film in films)
    print(f"{frames / seconds:.1f} frames, {len(films) / seconds:.2f} clips a second")
    shown = Counter(film.event.job.emotion for film in films)
    return {"subjects": len(plan), "clips": len(films), "frames": frames,
            **{name: shown[name] for name in (*CLASSES, *DROPPED)}}


def table_of(opt: argparse.Namespace, films: list[Film]) -> list[list]:
    """Rows of the workbook; in that of 2019 two of the classes have no apex of their own."""
    rows = [[int(event.job.subject[3:]), name, event.onset, event.apex, event.offset,
             int(film.written) if film.written.isdigit() else film.written, event.job.emotion]
            for film in films for event, name in [(film.event, film.name)]]
    if opt.workbook == "2019":
        labelled = [row for row in rows if row[-1] in CLASSES]
        first, second = rng_of(opt.seed, "2019").choice(len(labelled), 2, replace=False)
        labelled[first][3], labelled[second][3] = "/", labelled[second][2]
    return rows


def examples(opt: argparse.Namespace, folder: Path) -> Iterator[tuple]:
    """(pictures, caption) of the clip of each class that shows its expression best."""
    films = [film for part in plan_films(opt, folder) for film in part]
    for kind in CLASSES:
        acts = [(perform(film.event.job), film) for film in films if film.event.job.emotion == kind]
        act, film = max(acts, key=lambda pair: (not pair[0].blink, pair[0].strongest[1]))
        event, files = film.event, dict(film.files)
        onset, *others = (np.asarray(Image.open(files[frame])) for frame in (
            event.onset, (event.onset + event.apex) // 2, event.apex, event.offset))
        difference = encoding.stretch(clips.rgb_difference(onset, others[1]), clips.DIFFERENCE, 6)
        yield (onset, *others, difference), (
            f"{kind}: {event.job.key}, action units {event.job.units}, {act.strongest[1]:.1f} px")
