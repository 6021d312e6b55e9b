"""A stand-in for RAF-DB: its layout and classes, with drawn faces that show full expressions.

    python render.py faces --data_folder data/faces

The folder holds EmoLabel/list_patition_label.txt, Image/aligned/, Annotation/manual/ (five points),
landmarks.csv (68 points), subjects.csv and truth.csv (what each image shows): 4,000 images here, in
a minute or two on two cores. Nobody in the test split is in the training split.
"""
import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, grey_closing
from scipy.spatial import cKDTree

from images.faces import CLASSES, PUBLISHED
from rendering import outputs
from rendering.face import Face, Light, Pose, locate, noise, photograph, rng_of, seam_line, shade
from util import BadInput, number, positive_int, write_bytes, write_table, write_text

NOTE = "rendered stand-in data, not RAF-DB"
EMOTIONS, COUNTS = CLASSES["rafdb"], PUBLISHED["rafdb"]["train"]
# Action units of each emotion (Ekman and Friesen 1978) with how far they go, a share of full
# strength, and the share of faces that show them.
PROTOTYPES = {
    "surprise": {1: (1, 1), 2: (.9, 1), 5: (.8, .9), 26: (1, .9), 25: (.8, .9)},
    "fear": {1: (.9, 1), 2: (.5, .7), 4: (.6, .9), 5: (.9, .9), 20: (1, .9), 25: (.6, .7)},
    "disgust": {9: (1, .8), 10: (.8, .8), 4: (.4, .5), 17: (.6, .5), 7: (.5, .5)},
    "happiness": {12: (1, 1), 6: (.8, .8), 25: (.8, .6), 26: (.3, .2)},
    "sadness": {1: (.9, 1), 4: (.6, .8), 15: (1, .9), 17: (.6, .6)},
    "anger": {4: (1, 1), 7: (.8, .8), 5: (.4, .3), 24: (.9, .6), 17: (.4, .3)},
    "neutral": {},
}
# mm that a unit of full strength moves the face; lids and lips less, or their field would fold
STRENGTH = dict.fromkeys((5, 7, 24), 4.0) | {1: 5.0, 2: 5.0, 25: 5.0, 26: 8.0}
STRONG = 6.5  # all others
SPAN = 185.0  # mm of the face across an image, hair to chin
EYES = 0.38  # height of the eyes in an image, a share of it


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `render.py faces`."""
    group = parser.add_argument_group("data")
    outputs.add_folder(group)
    group.add_argument("--train", type=positive_int, default=3000, help="training images")
    group.add_argument("--test", type=positive_int, default=1000, help="test images")
    group.add_argument("--subjects", type=number(int, 2), default=200,
                       help="people, in either split in proportion to its images")
    group.add_argument("--label_noise", type=number(float, 0, 1), default=0.0,
                       help="share of the training labels that are moved to another class")
    group = parser.add_argument_group("picture")
    group.add_argument("--size", type=number(int, 32, 512), default=100,
                       help="side of the images, pixels")
    outputs.add_amplitude(group)
    outputs.add_running(parser)


def check_options(_: argparse.ArgumentParser, opt: argparse.Namespace) -> None:
    """Raises BadInput for splits that cannot hold every class twice."""
    for name in ("train", "test"):
        if getattr(opt, name) < 2 * len(EMOTIONS):
            raise BadInput(f"--{name} {getattr(opt, name)}: too few images for seven classes; ask "
                           f"for {2 * len(EMOTIONS)} or more")


def run(opt: argparse.Namespace) -> None:
    """Renders what the options ask for, unless the folder holds it already."""
    asked = {name: getattr(opt, name) for name in (
        "train", "test", "subjects", "label_noise", "size", "amplitude", "seed")}
    outputs.render_once(opt.data_folder, asked, NOTE, lambda folder: write_set(opt, folder))
    if opt.preview:
        write_preview(Path(opt.preview), opt.amplitude, opt.seed)


# ---------------------------------------------------------------- what a face shows

@dataclass(frozen=True)
class Photo:
    """One image: name: its stem, such as train_00001; what it shows follows from (seed, name)."""
    name: str
    subject: str
    emotion: str
    label: str
    size: int
    amplitude: float
    seed: int
    folder: str = ""


@dataclass(frozen=True)
class Act:
    """units: unit → (left, right) in mm; angles in radians; glasses: none, clear or dark;
    occlusion: none, scarf, hand or bar."""
    units: dict
    pose: Pose
    light: Light
    warmth: float
    glasses: str
    occlusion: str
    blur: float
    noise: float
    quality: int


def perform(photo: Photo) -> Act:
    """What an image shows, and how it is taken."""
    rng = rng_of(photo.seed, "photo", photo.name)
    strength = photo.amplitude * rng.uniform(0.5, 1.25)
    units = {}
    for unit, (far, share) in PROTOTYPES[photo.emotion].items():
        shown, lean = rng.random() < share, rng.normal(0, 0.12)
        if shown:
            size = STRENGTH.get(unit, STRONG) * strength * far * rng.uniform(0.7, 1.2)
            units[unit] = size * (1 + lean), size * (1 - lean)
    # what any face does, whatever it feels
    for unit in rng.choice((1, 2, 4, 7, 12, 15, 17, 25), 2, replace=False).tolist():
        stray = abs(rng.normal(0, 0.12)) * STRENGTH.get(unit, STRONG)
        left, right = units.get(unit, (0.0, 0.0))
        units[unit] = left + stray, right + stray
    if rng.random() < 0.2 and 5 not in units:
        lids = rng.uniform(1, 4)
        units[45] = lids, lids
    yaw, pitch, roll = np.array((0.15, 0.1, 0.05)) * rng.standard_normal(3).clip(-2, 2)
    pose = Pose(rng.normal(0, 1.5), rng.normal(0, 1.5), roll, yaw, pitch,
                1 + rng.normal(0, 0.025))
    light = Light(rng.uniform(-1.1, 1.1), rng.uniform(0.0, 1.0), rng.uniform(0.45, 1.05),
                  rng.uniform(0.15, 0.5))
    return Act(units, pose, light, rng.normal(0, 0.07),
               str(rng.choice(("none", "clear", "dark"), p=(0.82, 0.14, 0.04))),
               str(rng.choice(("none", "scarf", "hand", "bar"), p=(0.86, 0.05, 0.06, 0.03))),
               rng.uniform(0, 0.7), rng.uniform(0.5, 3.5), int(rng.integers(60, 96)))


def landmarks(face: Face) -> np.ndarray:
    """The 68 points (iBUG's order) of a face at rest, float64 `[68, 2]`, mm."""
    s = face.shape
    angle = np.pi * np.arange(17) / 16
    y = -15 + (s["chin_y"] + 20) * np.sin(angle)
    narrow = 1 - s["jaw"] * np.clip((y - 10) / (s["chin_y"] - 4), 0, 1.2) ** 1.7
    reach = np.where(y < 0, 108, s["chin_y"] + 9)
    round_ = np.clip(1 - np.abs(y / reach) ** np.where(y < 0, 2.4, 2.7), 0, 1) ** 0.4
    jaw = np.stack([-np.sign(np.cos(angle)) * s["width"] * narrow * round_, y], 1)
    jaw[8, 0] = 0
    x = np.linspace(50, 17, 5)  # from the outer end
    brow = np.stack([x, s["brow_y"] - s["brow_arch"] * (1 - ((x - 33) / 18) ** 2) + 1.5], 1)
    nose = [(0, s["eye_y"] + 2 + t * (s["nose_y"] - 6 - s["eye_y"])) for t in (0, .33, .67, 1)]
    nose += [(t * s["nose_w"], s["nose_y"] + 4 + 2 * (1 - t * t)) for t in (-1, -.5, 0, .5, 1)]
    across = np.array([1, .4, -.4, -1, -.4, .4])
    arc = 1 - across ** 2
    lids = np.where(np.arange(6) < 3, -s["eye_up"] * arc ** 0.65, s["eye_low"] * arc ** 0.8)
    eye = np.stack([s["eye_x"] + across * s["eye_w"],
                    s["eye_y"] - s["eye_tilt"] * across + lids], 1)
    t = np.array([-1, -.66, -.3, 0, .3, .66, 1])
    wide = np.clip(1 - t ** 2, 0, 1) ** 0.7
    seam = seam_line(s, t * s["lip_w"])
    upper = np.stack([t * s["lip_w"], seam - s["lip_upper"] * wide], 1)
    lower = np.stack([t * s["lip_w"], seam + s["lip_lower"] * wide], 1)[5:0:-1]
    t = np.array([-.85, -.3, 0, .3, .85])
    seam = seam_line(s, t * s["lip_w"])
    # above and below the seam by a pixel or so, that they part with the lips
    inner = np.concatenate([np.stack([t * s["lip_w"], seam - 1.6 * (abs(t) < .8)], 1),
                            np.stack([t * s["lip_w"], seam + 1.6], 1)[3:0:-1]])
    mirror = np.array([-1, 1])
    order = [3, 2, 1, 0, 5, 4]  # of the eye on the picture's right: from the inner corner
    return np.concatenate([jaw, brow * mirror, brow[::-1], nose, eye * mirror, eye[order],
                           upper, lower, inner])


def place(points: np.ndarray, seen: tuple) -> np.ndarray:
    """Where in an image points (mm, at rest) are seen, float64 `[P, 2]` in pixels from the upper
    left corner; seen: which point each pixel shows, x and y in mm `[H, W]`."""
    ux, uy = (np.asarray(one, np.float64) for one in seen)
    _, nearest = cKDTree(np.stack([ux.ravel(), uy.ravel()], 1), balanced_tree=False,
                         compact_nodes=False).query(points)
    row, column = np.unravel_index(nearest, ux.shape)
    slopes = [np.gradient(one) for one in (ux, uy)]
    matrix = np.stack([np.stack([one[axis][row, column] for axis in (1, 0)], -1)
                       for one in slopes], 1)  # [P, 2, 2]: of (x, y) by (column, row)
    left = np.stack([points[:, 0] - ux[row, column], points[:, 1] - uy[row, column]], -1)
    matrix = np.where(abs(np.linalg.det(matrix))[:, None, None] < 0.1, np.eye(2), matrix)
    # half a pixel off, or beyond the image
    outside = [(at == 0) | (at == side - 1) for at, side in ((column, ux.shape[1]),
                                                             (row, ux.shape[0]))]
    far = np.where(np.stack(outside, 1).any(1, keepdims=True), len(ux) / 4, 1)
    step = np.linalg.solve(matrix, left[..., None])[..., 0].clip(-far, far)
    return np.stack([column, row], 1) + step + 0.5


# ---------------------------------------------------------------- one image

def align(face: Face, act: Act, size: int, mm_per_px: float) -> Pose:
    """The pose, shifted so that the eyes lie where those of aligned faces do, but for its own
    shift."""
    middles = landmarks(face)[36:48].reshape(2, 6, 2).mean(1)
    _, seen, _ = locate(face, act.pose, {}, size, size, mm_per_px)
    eyes = place(middles, seen).mean(0)
    wanted = np.array([0.5, EYES]) * size
    x, y = (wanted - eyes) * mm_per_px + (act.pose.x, act.pose.y)
    return replace(act.pose, x=act.pose.x + float(x), y=act.pose.y + float(y))


def take(photo: Photo, face: Face) -> tuple:
    """(bytes of the JPEG, its pixels uint8 `[S, S, 3]`, the 68 points in pixels, the Act)"""
    act, rng = perform(photo), rng_of(photo.seed, "camera", photo.name)
    size, mm_per_px = photo.size, SPAN / photo.size
    act = replace(act, pose=align(face, act, size, mm_per_px))
    image, _, body, _ = shade(face, act.pose, act.light, act.units, size, size, mm_per_px)
    # twice as fine, or lips that part could not be told apart
    _, seen, _ = locate(face, act.pose, act.units, 2 * size, 2 * size, mm_per_px / 2)
    points = place(landmarks(face), seen) / 2
    body = grey_closing(body, 5)  # where hair and skin meet neither is whole
    image = image + (1 - body[..., None]) * _background(size, rng)
    image = _worn(image, points, act, face, rng)
    image = image * np.array([1 + act.warmth, 1, 1 - act.warmth])
    image = gaussian_filter(np.clip(image, 0, 1), (act.blur, act.blur, 0))
    pixels, content = photograph(image.astype(np.float32), rng, act.noise, act.quality)
    return content, pixels, points, act


def _background(size, rng):
    """Something behind the head, linear RGB `[size, size, 3]`."""
    colour = rng.uniform(0.01, 0.4) * rng.uniform(0.6, 1.2, 3)
    return (colour * np.clip(1 + 0.5 * noise(rng, (size, size, 1), (size / 8, size / 8, 0)), 0, 3)
            ).astype(np.float32)


def _drawn(size, draw):
    """A mask float32 `[size, size, 1]` in 0..1 of what `draw(canvas, scale)` draws, smooth."""
    canvas = Image.new("L", (4 * size, 4 * size))
    draw(ImageDraw.Draw(canvas), 4)
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[..., None] / 255


def _worn(image, points, act, face, rng):
    """The image with glasses, and with what covers a part of the face."""
    size = len(image)
    right, left = points[36:42].mean(0), points[42:48].mean(0)
    apart, across = np.linalg.norm(left - right), (left - right)
    unit = across / max(apart, 1)
    if act.glasses != "none":
        wide, high, line = 0.36 * apart, rng.uniform(0.24, 0.36) * apart, rng.uniform(.03, .07)
        colour = rng.uniform(0.005, 0.08, 3)

        def lens(canvas, scale, **how):
            for x, y in (right, left):
                canvas.ellipse([scale * v for v in (x - wide, y - high, x + wide, y + high)], **how)
        frame = _drawn(size, lambda c, k: (
            lens(c, k, outline=255, width=max(2, round(k * line * apart))),
            c.line([*(k * (right + wide * unit)), *(k * (left - wide * unit))], 255,
                   max(2, round(k * line * apart)))))
        tint = _drawn(size, lambda c, k: lens(c, k, fill=255))
        image = image * (1 - tint * (0.95 if act.glasses == "dark" else 0.06))
        image = image * (1 - frame) + colour * frame
    if act.occlusion == "none":
        return image
    middle = points[30] + rng.normal(0, 0.15, 2) * apart
    if act.occlusion == "scarf":
        def cover(canvas, k):
            top, slant = points[33, 1] + rng.uniform(0, 0.4) * apart, 0.03 * size
            canvas.polygon([0, k * (top - slant), k * size, k * (top + slant), k * size, k * size,
                            0, k * size], 255)
        colour = rng.uniform(0.02, 0.5, 3)
    elif act.occlusion == "hand":
        side, colour = rng.choice((-1, 1)), face.shape["tone"] * rng.uniform(0.5, 1)

        def cover(canvas, k):
            x, y = middle + apart * np.array([side * 0.55, rng.uniform(0.1, 0.7)])
            for finger in range(4):
                at = y + 0.2 * apart * finger
                canvas.ellipse([k * v for v in (x - 0.6 * apart, at, x + 0.6 * apart,
                                                at + 0.2 * apart)], 255)
    else:
        colour = np.full(3, rng.uniform(0, 0.3))

        def cover(canvas, k):
            x, y = middle + rng.uniform(-.8, .8, 2) * apart
            canvas.rectangle([k * v for v in (x - .2 * size, y - .15 * size, x + .2 * size,
                                              y + .15 * size)], 255)
    mask = _drawn(size, cover)
    cloth = colour * (1 + 0.15 * noise(rng, (size, size, 1), (1.5, 1.5, 0)))
    return image * (1 - mask) + cloth * mask


# ---------------------------------------------------------------- the set

def plan(opt: argparse.Namespace, folder: Path) -> list[Photo]:
    """The images of both splits, in the order of their numbers."""
    rng = rng_of(opt.seed, "set")
    n_train, _ = outputs.apportion(opt.subjects, (opt.train, opt.test), 1)
    people = {"train": range(1, n_train + 1), "test": range(n_train + 1, opt.subjects + 1)}
    photos = []
    for split, subjects in people.items():
        total = getattr(opt, split)
        shown = np.repeat(np.arange(len(EMOTIONS)), outputs.apportion(total, COUNTS, 2))
        shown = rng.permutation(shown)
        given = shown.copy()
        if split == "train":
            moved = rng.permutation(total)[:round(opt.label_noise * total)]
            given[moved] += rng.integers(1, len(EMOTIONS), len(moved))
            given %= len(EMOTIONS)
        who = rng.permutation(np.resize(np.array(subjects), total))
        photos += [Photo(
            f"{split}_{i + 1:05d}", f"s{who[i]}", EMOTIONS[shown[i]], EMOTIONS[given[i]], opt.size,
            opt.amplitude, opt.seed, str(folder)) for i in range(total)]
    return photos


def render_subject(photos: list[Photo]) -> list[dict]:
    """Writes the images of one person; a row of each."""
    first, rows = photos[0], []
    face = Face(first.subject, first.seed, SPAN / first.size)
    for photo in photos:
        content, _, points, act = take(photo, face)
        path = f"Image/aligned/{photo.name}_aligned.jpg"
        write_bytes(Path(photo.folder) / path, content)
        five = (points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54])
        write_text(Path(photo.folder) / "Annotation" / "manual" / f"{photo.name}_manu_attri.txt",
                   "".join(f"{x:.3f}\t{y:.3f}\n" for x, y in five) + "0\n0\n0\n")
        degrees = {name: round(float(np.degrees(getattr(act.pose, name))), 2)
                   for name in ("yaw", "pitch", "roll")}
        rows.append({"path": path, "split": photo.name.split("_")[0], "subject": photo.subject,
                     "emotion": photo.emotion, "label": photo.label, "glasses": act.glasses,
                     "occlusion": act.occlusion, **degrees,
                     "light": round(act.light.key, 3), "points": points.round(2).ravel().tolist()})
    return rows


def write_set(opt: argparse.Namespace, folder: Path) -> dict:
    """Renders everything that training reads into `folder`; returns the counts."""
    photos, people = plan(opt, folder), {}
    for photo in photos:
        people.setdefault(photo.subject, []).append(photo)
    for name in ("EmoLabel", "Image/aligned", "Annotation/manual"):
        (folder / name).mkdir(parents=True)
    rows = {row["path"]: row for row in outputs.in_parallel(render_subject, people.values(),
                                                             opt.num_workers, "image")}
    rows = [rows[f"Image/aligned/{photo.name}_aligned.jpg"] for photo in photos]
    write_text(folder / "EmoLabel" / "list_patition_label.txt", "\n".join(
        f"{photo.name}.jpg {EMOTIONS.index(photo.label) + 1}" for photo in photos))
    header = ["path", *(f"{axis}{i}" for i in range(1, 69) for axis in "xy")]
    write_table(folder / "landmarks.csv", header, ([row["path"], *row["points"]] for row in rows))
    write_table(folder / "subjects.csv", ("path", "subject"), rows)
    write_table(folder / "truth.csv", [name for name in rows[0] if name != "points"], rows)
    shown = [photo.emotion for photo in photos]
    return {"subjects": len(people), "training images": opt.train, "test images": opt.test,
            **{name: shown.count(name) for name in EMOTIONS},
            "wrong labels": sum(photo.emotion != photo.label for photo in photos)}


def write_preview(file: Path, amplitude: float, seed: int) -> None:
    """The seven emotions of six people, as one picture."""
    rows = []
    for n in range(6):
        face = Face(f"s{n + 1}", seed, SPAN / 160)
        pictures = [take(Photo(f"example_{n}_{emotion}", f"s{n + 1}", emotion, emotion, 160,
                               amplitude, seed), face)[1] for emotion in EMOTIONS]
        rows.append((pictures, f"person {n + 1}"))
    outputs.write_sheet(file, EMOTIONS, rows, NOTE, (160, 160))
