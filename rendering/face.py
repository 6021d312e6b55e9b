"""The face model: a relief with skin, moved by facial action units, and two sensors.

A `Face` (one subject) is a set of maps in head coordinates: x to the right, y down, z towards the
camera, in millimetres, the origin on the nose bridge. `shade` looks up, for every pixel, which
point of the resting face lies there once pose and action units have moved it, and lights the
moved relief (Lambert). `photograph` and `measure_depth` are the sensors. Nothing here is data of a
person.
"""
import functools
import io
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

HALF, STEP = 128.0, 0.5  # the maps of a face reach from -HALF to HALF, one point every STEP mm
SKIN, RELIEF, EYE, BODY, ABSORB = slice(0, 3), 3, 4, 5, 6  # channels of Face.maps

# Displacement fields of the action units: Gaussians at an anchor of the face plus an offset, with
# (offset x, y; sigma x, y; displacement x, y, z), all in mm. What lies off the midline is
# mirrored: x points outwards, y down, z out of the face. The largest in-plane shift is about 1.
ACTION_UNITS = {
    1: [("brow", -12, 0, 9, 10, 0.1, -1.0, 0.2), ("forehead", 0, 8, 20, 2.5, 0, 0, 0.5),
        ("forehead", 0, 2, 22, 2.5, 0, -0.2, -0.4)],
    2: [("brow", 10, 0, 11, 10, 0.1, -1.0, 0.2), ("brow", 8, -14, 13, 2.5, 0, -0.2, 0.5)],
    4: [("brow", -12, 1, 11, 9, -0.65, 0.75, 0.3), ("brow", -21, 4, 2.5, 7, -0.1, 0, -0.6),
        ("brow", 6, 0, 11, 8, -0.1, 0.35, 0.2)],
    5: [("eye", 0, -6, 12, 5, 0, -1.0, -0.2), ("eye", 0, 5, 10, 3, 0, 0.1, 0)],
    6: [("eye", 6, 20, 15, 9, -0.15, -0.9, 0.8), ("eye", 16, 4, 5, 6, -0.5, -0.2, 0.3),
        ("eye", 0, 8, 12, 3, 0, -0.4, 0.3)],
    7: [("eye", 0, 6, 12, 4, -0.1, -0.9, 0.3), ("eye", 0, -5, 12, 4, 0, 0.4, 0)],
    9: [("nose", 8, -18, 7, 11, -0.1, -1.0, 0.5), ("nose", 0, -38, 8, 3, 0, -0.2, 0.6),
        ("lip", 12, -12, 9, 6, 0, -0.5, 0.2), ("brow", -14, 3, 8, 7, -0.2, 0.45, 0)],
    10: [("lip", 11, -9, 8, 7, 0.05, -1.0, 0.4), ("nose", 17, 8, 4, 9, 0, -0.3, -0.5)],
    12: [("corner", 0, 0, 9, 9, 0.7, -0.75, -0.2), ("corner", 11, -20, 12, 10, 0.1, -0.4, 0.8),
         ("corner", 3, -14, 4, 9, 0.2, -0.2, -0.5)],
    14: [("corner", 3, 1, 6, 8, 0.9, 0.0, -0.9), ("corner", -8, 0, 7, 5, 0.4, 0, -0.1)],
    15: [("corner", -1, 3, 8, 9, -0.1, 1.0, -0.1), ("corner", -4, 12, 7, 6, 0, 0.4, 0.5)],
    17: [("chin", 0, -8, 14, 10, 0, -1.0, 0.5), ("lip", 0, 8, 15, 6, 0, -0.5, 0.6),
         ("chin", 0, -18, 14, 2.5, 0, -0.1, -0.5)],
    20: [("corner", 2, 3, 10, 10, 1.0, 0.2, -0.3), ("chin", 18, -6, 12, 12, 0.3, 0.1, -0.1)],
    24: [("lip", 0, -5, 17, 4, 0, 1.0, -0.5), ("lip", 0, 6, 17, 4, 0, -1.0, -0.5),
         ("corner", 0, 0, 6, 6, -0.3, 0, 0.2)],
    25: [("lip", 0, 7, 15, 6, 0, 0.6, 0.1), ("lip", 0, -6, 14, 5, 0, -0.3, 0.1)],
    26: [("chin", 0, -4, 26, 18, 0, 0.9, -0.4), ("lip", 0, 8, 18, 7, 0, 0.4, 0)],
    45: [("eye", 0, -4, 13, 6, 0, 1.0, 0.1)],
}
DISTANCE = 600.0  # mm from the depth camera to the nose bridge
LIPS_PART = {25: 0.6, 26: 0.3}  # half the gap between the lips per mm of the unit


@dataclass(frozen=True)
class Pose:
    """Where the head is: shift in mm, angles in radians, scale. The same units for a change."""
    x: float = 0.0
    y: float = 0.0
    roll: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0
    scale: float = 1.0

    def moved(self, by: "Pose") -> "Pose":
        """The pose after the small motion `by`."""
        return Pose(self.x + by.x, self.y + by.y, self.roll + by.roll, self.yaw + by.yaw,
                    self.pitch + by.pitch, self.scale * by.scale)

    def to(self, other: "Pose") -> "Pose":
        """The motion that leads from this pose to `other`."""
        return Pose(other.x - self.x, other.y - self.y, other.roll - self.roll,
                    other.yaw - self.yaw, other.pitch - self.pitch, other.scale / self.scale)


@dataclass(frozen=True)
class Light:
    """Direction of the key light (azimuth, elevation in radians), its strength, the fill light."""
    azimuth: float = -0.4
    elevation: float = 0.6
    key: float = 0.85
    fill: float = 0.3

    def direction(self) -> tuple:
        """Unit vector towards the light (x right, y down, z to the camera)."""
        flat = np.cos(self.elevation)
        return (np.sin(self.azimuth) * flat, -np.sin(self.elevation), np.cos(self.azimuth) * flat)

    def changed(self, gain: float, turn: float) -> "Light":
        """The light after a relative change of its strength and a turn in radians."""
        return Light(self.azimuth + turn, self.elevation, self.key * (1 + gain),
                     self.fill * (1 + gain))


def rng_of(seed: int, *names) -> np.random.Generator:
    """Generator that follows from the seed and names alone, whoever draws and when."""
    return np.random.default_rng(
        np.random.SeedSequence([seed, *(zlib.crc32(str(n).encode()) for n in names)]))


def noise(rng: np.random.Generator, shape: tuple, sigma: float | tuple) -> np.ndarray:
    """Correlated Gaussian noise `shape` of unit variance; sigma: correlation in pixels."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = gaussian_filter(white, sigma, mode="wrap", truncate=3)
    return smooth * np.float32(1 / max(smooth.std(), 1e-6))


# ---------------------------------------------------------------- a subject

class Face:
    """One subject: geometry, skin, hair, eyes; drawn from (seed, name).

    maps: float32 `[n, n, 7]`, linear skin colour (3), relief in mm, opening of the eyes, the part
    that belongs to the body, and how badly depth is measured there (hair, eyes); eyeball: colour
    `[n, n, 3]`; parallax: smoothed relief `[n/2, n/2]`; anchors: places (mm) of ACTION_UNITS.
    """

    def __init__(self, name: str, seed: int = 0, mm_per_px: float = 1.0):
        rng = rng_of(seed, "face", name)
        self.shape = _geometry(rng)
        self.axis = np.arange(-HALF, HALF, STEP, dtype=np.float32)
        self.x, self.y = self.axis[None, :], self.axis[:, None]
        relief, body, hair = self._relief(rng)
        skin, eye = self._skin(rng, relief, hair)
        absorb = 0.9 * hair + 0.5 * eye
        maps = np.stack([*skin, relief, eye, body, absorb], -1)
        blur = 0.35 * (mm_per_px / STEP - 2)  # keeps fine texture from aliasing in small images
        if blur > 0:
            maps = gaussian_filter(maps, (blur, blur, 0))
        self.maps = np.ascontiguousarray(maps, dtype=np.float32)
        self.eyeball = self._eyeball()
        # Parallax uses a smoothed relief, so that the look-up stays one to one.
        self.parallax = gaussian_filter(relief, 3 / STEP)[::2, ::2] - 55
        s = self.shape
        self.anchors = {
            "brow": (s["eye_x"], s["brow_y"]), "eye": (s["eye_x"], s["eye_y"]),
            "forehead": (0, s["brow_y"] - 22), "nose": (0, s["nose_y"]), "lip": (0, s["lip_y"]),
            "corner": (s["lip_w"], s["lip_y"]), "chin": (0, s["chin_y"]),
        }
        self._gaussians = {unit: self._place(rows) for unit, rows in ACTION_UNITS.items()}

    def _bump(self, cx, cy, sx, sy, mirrored=True):
        """Gaussian at (cx, cy), and its mirror image unless it lies on the midline."""
        across = np.exp(-0.5 * ((self.x - cx) / sx) ** 2)
        if mirrored and cx:
            across = across + np.exp(-0.5 * ((self.x + cx) / sx) ** 2)
        return np.exp(-0.5 * ((self.y - cy) / sy) ** 2) * across

    def _relief(self, rng):
        """Height of the face in mm, and the masks of body and hair, each `[n, n]`."""
        s, x, y, bump = self.shape, self.x, self.y, self._bump
        jaw = 1 - s["jaw"] * np.clip((y - 10) / (s["chin_y"] - 4), 0, 1.2) ** 1.7
        top = np.abs(y / np.where(y < 0, 108, s["chin_y"] + 9)) ** np.where(y < 0, 2.4, 2.7)
        round_ = np.abs(x / (s["width"] * jaw)) ** 2.5 + top
        z = 88 * np.clip(1 - round_, 0, 1) ** 0.5
        z += bump(22, s["brow_y"] + 1, 15, 6) * 3.5 - bump(s["eye_x"], s["eye_y"], 14, 8) * 7
        z += bump(s["eye_x"], s["eye_y"], 9, 6) * 5 - bump(0, s["eye_y"] - 3, 7, 5) * 2
        z += self._nose(s)
        z += bump(44, 4, 16, 13) * s["cheek"] + bump(0, s["lip_y"], 26, 15) * 6
        along = np.clip((y - s["nose_y"] + 2) / (s["lip_y"] + 4 - s["nose_y"]), 0, 1)
        fold = np.abs(x) - (15 + 15 * along)  # nasolabial fold, from the nose to the corners
        z -= s["age"] * np.exp(-(fold / 3) ** 2) * np.sin(np.pi * along)
        t = y - seam_line(s, x)
        wide = np.clip(1 - (x / (s["lip_w"] + 2)) ** 2, 0, 1)
        z += wide * (3.0 * np.exp(-0.5 * ((t + 4) / 2.8) ** 2)
                     + 4.0 * np.exp(-0.5 * ((t - 5) / 3.2) ** 2) - 3.0 * np.exp(-(t / 1.3) ** 2))
        z -= bump(0, s["lip_y"] - 12, 2.2, 5) * 1.2 + bump(0, s["lip_y"] + 15, 15, 4) * 3.0
        z += bump(0, s["chin_y"] - 6, 15, 9) * 6
        ears = np.exp(-(((np.abs(x) - s["width"] - 1) / 7) ** 4 + ((y + 10) / 22) ** 4))
        hair, dome = self._hair(rng, jaw)
        neck = 44 + 0.012 * np.clip(y - s["chin_y"], -40, 40) ** 2
        throat = 30 * np.clip(1 - (x / neck) ** 2, 0, 1) ** 0.5 - 8
        z = np.maximum(np.maximum(z, 18 * ears), np.where(y > 20, throat, -10))
        z = np.where(hair > 0.3, np.maximum(z, dome), z) + 4 * hair
        self.shirt = np.clip(y - s["chin_y"] - 20 - 0.0016 * (x - s["tilt"]) ** 2, 0, 1)
        body = np.max([np.clip((1 - round_) * 25, 0, 1), np.clip(3 * ears - 1, 0, 1), hair,
                       np.clip(neck - np.abs(x), 0, 1) * np.clip(y - 20, 0, 1), self.shirt], axis=0)
        neckline = np.clip((y - s["chin_y"] - 34) / 2 + 0.7 * np.abs(x), 0, 1)
        self.shirt = np.clip(10 * self.shirt, 0, 1) * neckline
        return z.astype(np.float32), body.astype(np.float32), hair.astype(np.float32)

    def _hair(self, rng, jaw):
        """Mask of the hair and its surface in mm, `[n, n]`; jaw: relative width of the face."""
        s, x, y = self.shape, self.x, self.y
        wave = s["width"] + 8 + 3 * np.sin(y / 26 + s["tilt"]) * np.clip((y + 8) / 25, 0, 1)
        outer = np.abs(x / wave) ** 2.3 + np.abs(np.minimum(y + 8, 0) / 104) ** 2.3
        dome = 92 * np.clip(1 - outer, 0, 1) ** 0.5
        line = s["hairline"] + 0.0055 * x ** 2 + s["fringe"] * np.sin(x / 21 + s["tilt"])
        line = line + 1.5 * noise(rng, x.shape, (0, 5))
        front = np.clip((line - y) / 4, 0, 1)
        side = np.clip((np.abs(x) - s["width"] * jaw + 6) / 4, 0, 1)
        end = s["hair_end"] - 0.35 * (s["width"] + 8 - np.abs(x))
        hair = np.clip((1 - outer) * 30, 0, 1) * np.maximum(front, side)
        return hair * np.clip((end - y) / 8, 0, 1), dome

    def _nose(self, s):
        """Ridge that rises from the bridge to the tip, wings, nostrils; mm `[n, n]`."""
        t = np.clip((self.y - s["eye_y"] - 2) / (s["nose_y"] - 4 - s["eye_y"]), -1, 3)
        height = np.where(t < 1, np.clip(t, 0, 1) ** 1.3, np.exp(-((t - 1) / 0.17) ** 2))
        wide = 5.5 + 3 * np.clip(t, 0, 1)
        ridge = s["nose_h"] * height * np.exp(-0.5 * (self.x / wide) ** 2)
        wings = 6.5 * self._bump(s["nose_w"], s["nose_y"] - 1, 4.5, 4.5)
        return ridge + wings + 3 * self._bump(0, s["nose_y"] - 3, 6, 5)

    def _skin(self, rng, relief, hair):
        """Linear colour of skin, lips, brows, hair and clothes `[3, n, n]`; eye mask `[n, n]`."""
        s, x, y, bump = self.shape, self.x, self.y, self._bump
        n = len(self.axis)

        def mix(colour, other, mask):
            return colour + (np.asarray(other, np.float32).reshape(3, 1, 1) - colour) * mask

        tone = s["tone"].reshape(3, 1, 1)
        colour = tone * (1 + 0.03 * noise(rng, (n, n), 22) + 0.025 * noise(rng, (n, n), 2.4)
                         + 0.025 * noise(rng, (n, n), 1.0))
        flush = 0.5 * bump(42, 14, 16, 14) + 0.6 * bump(0, s["nose_y"] - 4, 9, 8)
        colour = colour * (1 - flush * np.array([0.02, 0.16, 0.15]).reshape(3, 1, 1))
        for _ in range(s["moles"]):
            cx, cy = rng.uniform(-55, 55), rng.uniform(-60, 70)
            colour = mix(colour, tone * 0.3, 0.7 * bump(cx, cy, 1.1, 1.1, False))
        beard = np.clip(bump(0, s["chin_y"] - 4, 36, 18) + bump(0, s["lip_y"] - 11, 20, 4), 0, 1)
        colour = mix(colour, tone * 0.45, s["beard"] * beard * (0.8 + 0.2 * noise(rng, (n, n), 1)))
        colour = self._lips(colour, mix)
        nostril = np.clip(bump(s["nose_w"] * 0.55, s["nose_y"] + 4, 3, 1.6) * 1.3, 0, 1)
        colour = mix(colour, tone * 0.12, nostril)
        # Recesses get less light from around: what lies below its surroundings is darker.
        hollow = gaussian_filter(relief, 7 / STEP) - relief
        colour = colour * np.clip(1 - 0.035 * hollow, 0.45, 1.15)
        colour, eye = self._lids(colour, mix)
        arc = s["brow_y"] - s["brow_arch"] * (1 - ((np.abs(x) - 33) / 18) ** 2) + 1.5
        across = (y - arc) / (s["brow_t"] * np.clip(1.25 - np.abs(x) / 90, 0.5, 1))
        strands = 0.75 + 0.25 * gaussian_filter(rng.standard_normal((n, n)), (3, 0.7)) * 4
        brow = np.exp(-across ** 4) * np.clip((np.abs(x) - 9) / 6, 0, 1)
        brow = brow * np.clip((50 - np.abs(x)) / 9, 0, 1) * np.clip(strands, 0.3, 1)
        colour = mix(colour, s["hair"], np.clip(0.85 * brow, 0, 1))
        streaks = 1 + 0.35 * gaussian_filter(rng.standard_normal((n, n)), (14, 0.9)) * 10
        colour = mix(colour, s["hair"], np.clip(10 * hair, 0, 1))
        colour = colour * (1 + hair * (np.clip(streaks, 0.4, 2) - 1))
        shade = 1 - 0.55 * np.clip((y - s["chin_y"] - 3) / 9, 0, 1) * (hair < 0.5)
        colour = mix(colour * shade, s["cloth"], self.shirt * (hair < 0.3))
        return np.clip(colour, 0.002, 1).astype(np.float32), eye

    def _lips(self, colour, mix):
        """`colour` with the red of the lips and the dark seam between them."""
        s, x, t = self.shape, self.x, self.y - seam_line(self.shape, self.x)
        wide = np.clip(1 - (x / s["lip_w"]) ** 2, 0, 1) ** 0.7
        bow = 1 - 0.22 * np.exp(-(x / 3.2) ** 2)
        upper = np.clip(t + s["lip_upper"] * wide * bow, 0, 1) * (t < 0)
        lower = np.clip(s["lip_lower"] * wide - t, 0, 1) * (t >= 0)
        colour = mix(colour, s["lips"], 0.8 * gaussian_filter(upper + lower, 1.2) * (wide > 0))
        seam = np.exp(-(t / 0.9) ** 2) * np.clip((s["lip_w"] + 1.5 - np.abs(x)) / 3, 0, 1)
        return mix(colour, s["tone"] * 0.1, 0.9 * seam)

    def _lids(self, colour, mix):
        """`colour` with lash lines and lid creases; the opening of the eyes `[n, n]`."""
        s, y = self.shape, self.y
        across = (np.abs(self.x) - s["eye_x"]) / s["eye_w"]
        arc = np.clip(1 - across ** 2, 0, 1)
        middle = s["eye_y"] - s["eye_tilt"] * across
        upper = middle - s["eye_up"] * arc ** 0.65
        lower = middle + s["eye_low"] * arc ** 0.8
        eye = np.clip(0.5 + np.minimum(y - upper, lower - y) / 1.0, 0, 1) * (arc > 0)
        near = np.clip((1.12 - np.abs(across)) / 0.1, 0, 1)
        colour = mix(colour, s["tone"] * 0.55, 0.6 * near * np.exp(-((y - lower - 0.5) / 1) ** 2))
        crease = np.exp(-((y - upper + s["lid"]) / 1.0) ** 2) * near
        colour = mix(colour, s["tone"] * 0.4, 0.6 * crease)
        colour = mix(colour, s["tone"] * 0.06, 0.9 * near * np.exp(-((y - upper) / 1.1) ** 2))
        return colour, gaussian_filter(eye, 0.8).astype(np.float32)

    def _eyeball(self):
        """Colour of the balls of the eyes, seen where the lids are open; `[n, n, 3]`."""
        s = self.shape
        x, y = np.abs(self.x) - s["eye_x"], self.y - s["eye_y"] + 0.8
        radius = np.sqrt((self.x - np.sign(self.x) * s["eye_x"] - s["gaze"]) ** 2 + y ** 2)

        def disc(r):
            return np.clip((r - radius) / 0.8 + 0.5, 0, 1)[..., None]
        ball = np.ones((*radius.shape, 1)) * np.array([0.68, 0.64, 0.6])
        ball *= (1 - 0.5 * np.clip(np.abs(x) / s["eye_w"], 0, 1) ** 2)[..., None]
        ball += disc(6.0) * (s["iris"] * 0.45 - ball)
        ball += disc(5.0) * (s["iris"] - ball)
        ball += disc(2.3) * (0.01 - ball)
        glint = np.exp(-((self.x - np.sign(self.x) * s["eye_x"] + 1.8) ** 2 + (y + 1.8) ** 2))
        ball += 0.6 * glint[..., None]
        ball *= np.clip(0.45 + (y + s["eye_up"]) / 7, 0.35, 1)[..., None]  # shadow of the lid
        return ball.astype(np.float32)

    def _place(self, rows):
        """Gaussians of one unit on this face: rows (side, cx, cy, sx, sy, dx, dy, dz)."""
        placed = []
        for anchor, ox, oy, sx, sy, dx, dy, dz in rows:
            cx, cy = self.anchors[anchor][0] + ox, self.anchors[anchor][1] + oy
            if cx:
                placed += [(-1, -cx, cy, sx, sy, -dx, dy, dz), (1, cx, cy, sx, sy, dx, dy, dz)]
            else:
                placed.append((0, cx, cy, sx, sy, dx, dy, dz))
        return placed

    def displacement(self, units: dict) -> np.ndarray:
        """Field of all `units` (dict unit → (left, right) in mm): `[n/2, n/2, 3]` x, y, z in mm."""
        rows = [(*g[1:5], *(d * (sum(sides) / 2 if not g[0] else sides[g[0] > 0]) for d in g[5:]))
                for unit, sides in units.items() for g in self._gaussians[unit]]
        axis = self.axis[::2]
        if not rows:
            return np.zeros((len(axis), len(axis), 3), np.float32)
        cx, cy, sx, sy, *shift = np.array(rows, dtype=np.float32).T[..., None]
        across = np.exp(-0.5 * ((axis - cx) / sx) ** 2)
        down = np.exp(-0.5 * ((axis - cy) / sy) ** 2)
        return np.stack([(down * d).T @ across for d in shift], -1)


def seam_line(shape: dict, x: np.ndarray) -> np.ndarray:
    """y of the line between the lips at `x`; mm."""
    across = np.clip(x / shape["lip_w"], -1, 1)
    return (shape["lip_y"] + shape["lip_bow"] * (np.cos(6.3 * across) - 1)
            - shape["lip_smile"] * across ** 2)


def _geometry(rng):
    """Measures (mm) and colours (linear RGB) of one subject."""
    def measure(mean, spread):
        return float(mean + spread * np.clip(rng.standard_normal(), -2, 2))

    def linear(*srgb):
        return (np.array(srgb) / 255) ** 2.2
    tone = [linear(226, 188, 165), linear(208, 164, 136), linear(182, 134, 104),
            linear(120, 84, 64)][rng.choice(4, p=[0.35, 0.35, 0.2, 0.1])]
    tone = tone * measure(1, 0.07) * np.array([1, measure(1, 0.03), measure(1, 0.05)])
    hair = [linear(28, 24, 22), linear(52, 38, 30), linear(84, 60, 42),
            linear(120, 112, 106)][rng.choice(4, p=[0.5, 0.28, 0.15, 0.07])]
    eye_y, lip_y = measure(-27, 1.5), measure(44, 2)
    man = rng.random() < 0.5
    return {
        "width": measure(70 if man else 67, 2.5), "jaw": measure(0.3 if man else 0.38, 0.05),
        "chin_y": measure(82 if man else 78, 2.5), "eye_x": measure(31, 1.3), "eye_y": eye_y,
        "eye_w": measure(14.5, 0.8), "eye_up": measure(5.6, 0.6), "eye_low": measure(3.2, 0.3),
        "eye_tilt": measure(0.8, 0.9), "lid": measure(3.2, 0.9), "gaze": measure(0, 0.5),
        "brow_y": eye_y - measure(15.5 if man else 17, 1.5), "brow_arch": measure(3, 1.2),
        "brow_t": measure(3.6 if man else 2.7, 0.5), "nose_y": measure(16, 2),
        "nose_h": measure(21, 2.5), "nose_w": measure(12.5, 1.2), "cheek": measure(4, 1.5),
        "lip_y": lip_y, "lip_w": measure(25, 1.8), "lip_bow": measure(0.4, 0.3),
        "lip_upper": measure(6, 1), "lip_lower": measure(8, 1), "age": abs(measure(0.8, 0.5)),
        "hairline": measure(-76, 4), "fringe": measure(0, 2),
        "hair_end": measure(-14, 5) if man else measure(75, 35), "lip_smile": measure(1.8, 0.8),
        "tilt": measure(0, 2.5), "beard": abs(measure(0.25, 0.15)) if man else 0.0,
        "moles": int(rng.integers(0, 5)), "tone": tone.astype(np.float32),
        "hair": hair.astype(np.float32),
        "lips": (tone * np.array([0.72, 0.36, 0.38]) * measure(1, 0.1)).astype(np.float32),
        "iris": linear(78, 52, 34) * measure(1, 0.25),
        "cloth": linear(*rng.integers(20, 110, 3)).astype(np.float32),
    }


@functools.lru_cache(maxsize=4)
def face_of(name: str, seed: int, mm_per_px: float) -> Face:
    """The subject's Face, kept for its next clip."""
    return Face(name, seed, mm_per_px)


# ---------------------------------------------------------------- a frame

def _sample(maps, x, y, step):
    """Bilinear look-up of `maps` `[n, n, C]` at `x, y` (mm, `[H, W]`): `[H, W, C]`."""
    n = maps.shape[0]
    gx = np.clip((x + HALF) / step, 0, n - 1.001).astype(np.float32)
    gy = np.clip((y + HALF) / step, 0, n - 1.001).astype(np.float32)
    ix, iy = gx.astype(np.int32), gy.astype(np.int32)
    fx, fy = (gx - ix)[..., None], (gy - iy)[..., None]
    flat, at = maps.reshape(n * n, -1), iy * n + ix

    def corner(offset):  # none is outside, and what clips need not look
        return flat.take(at + offset, 0, mode="clip")
    top, bottom = corner(0), corner(n)
    top += (corner(1) - top) * fx
    bottom += (corner(n + 1) - bottom) * fx
    bottom -= top
    bottom *= fy
    top += bottom
    return top


def locate(face: Face, pose: Pose, units: dict, width: int, height: int,
           mm_per_px: float) -> tuple:
    """Which point of the resting face each pixel shows.

    Returns head coordinates without and with the action units, `(px, py), (ux, uy)` in mm, and
    the units' push out of the face in mm; all `[H, W]`.
    """
    cols = (np.arange(width, dtype=np.float32) - (width - 1) / 2) * mm_per_px - pose.x
    rows = (np.arange(height, dtype=np.float32)[:, None] - (height - 1) / 2) * mm_per_px - pose.y
    cos, sin = np.cos(pose.roll) / pose.scale, np.sin(pose.roll) / pose.scale
    px, py = cols * cos + rows * sin, rows * cos - cols * sin - 13
    field = np.concatenate([face.displacement(units), face.parallax[..., None]], -1)
    moved = _sample(field, px, py, 2 * STEP)
    px = px - moved[..., 3] * np.float32(pose.yaw)
    py = py - moved[..., 3] * np.float32(pose.pitch)
    ux, uy = px - moved[..., 0], py - moved[..., 1]
    gap = sum(LIPS_PART.get(unit, 0) * sum(sides) / 2 for unit, sides in units.items())
    if gap > 0:
        s = face.shape
        seam = seam_line(s, ux)
        t, half = uy - seam, gap * np.clip(1 - (ux / s["lip_w"]) ** 2, 0, 1)
        beyond = np.maximum(np.abs(t) - half, 0)
        uy = seam + np.sign(t) * np.maximum(np.abs(t) - half * np.exp(-beyond / 8), 0)
    return (px, py), (ux, uy), moved[..., 2]


def shade(face: Face, pose: Pose, light: Light, units: dict, width: int, height: int,
          mm_per_px: float) -> tuple:
    """One frame without sensor noise.

    Returns linear RGB `[H, W, 3]` in 0..1, height towards the camera in mm `[H, W]`, and the maps
    of the body and of bad depth, `[H, W]` in 0..1.
    """
    (px, py), (ux, uy), push = locate(face, pose, units, width, height, mm_per_px)
    maps = _sample(face.maps, ux, uy, STEP)
    colour, body = maps[..., SKIN], maps[..., BODY]
    rows, cols = np.nonzero(maps[..., EYE] > 0.01)
    eye = maps[rows, cols, EYE][:, None]
    ball = _sample(face.eyeball, px[rows, cols][None], py[rows, cols][None], STEP)[0]
    colour[rows, cols] = colour[rows, cols] * (1 - eye) + ball * eye
    z = (maps[..., RELIEF] + push - px * np.float32(pose.yaw) - py * np.float32(pose.pitch))
    z *= np.float32(pose.scale)
    slope_y, slope_x = np.gradient(z, np.float32(mm_per_px))
    lx, ly, lz = light.direction()
    lambert = (lz - lx * slope_x - ly * slope_y) / np.sqrt(1 + slope_x ** 2 + slope_y ** 2)
    sheen = 0.02 * np.clip(lambert, 0, 1) ** 14
    lit = light.fill + light.key * np.clip(lambert, 0, None)
    image = colour * lit[..., None] + sheen[..., None]
    wall = np.float32(0.02) + 0.015 * np.linspace(1, 0, height, dtype=np.float32)[:, None, None]
    image = wall + (image - wall) * body[..., None]
    return image, z, body, maps[..., ABSORB]


def photograph(image: np.ndarray, rng: np.random.Generator, noise_level: float,
               quality: int) -> tuple:
    """The colour camera: gamma, correlated noise (grey levels), JPEG. uint8 `[H, W, 3]`, and the
    bytes of the JPEG file."""
    levels = 255 * np.clip(image, 0, 1) ** np.float32(1 / 2.2)
    levels += noise_level * noise(rng, image.shape, (0.6, 0.6, 0.3))
    file = io.BytesIO()
    frame = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    frame.save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file)), file.getvalue()


def measure_depth(z: np.ndarray, body: np.ndarray, absorb: np.ndarray, rng: np.random.Generator,
                  holes: np.ndarray, step: float = 0.25) -> np.ndarray:
    """The depth camera: mm `[H, W]`, 0 where nothing was measured.

    holes: noise `[H, W]` that decides where measuring fails, in part the same in both frames.
    Noise is correlated over a few pixels; beyond the body there is nothing in range; at edges of
    the body some pixels fly between the face and what lies behind. step: resolution in mm.
    """
    slope = np.hypot(*np.gradient(z))
    depth = DISTANCE - z + 0.8 * noise(rng, z.shape, 1.8)
    lost = 0.8 * holes + 0.6 * noise(rng, z.shape, 2.0)
    risk = 2.0 * absorb + 0.7 * np.clip(slope - 1, 0, 3)
    valid = (body > 0.5) & (lost < 3.0 - risk)
    edge = (slope > 3) & (rng.random(z.shape) < 0.1)
    depth = np.where(edge, depth + rng.uniform(0, 60, z.shape), depth)
    return np.where(valid, np.round(depth / step) * step, 0).astype(np.float32)
