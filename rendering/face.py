"""The face model behind render.py: a relief with skin, moved by facial action units.

A `Face` (one subject) is a set of maps in head coordinates: x to the right, y down, z towards the
camera, in millimetres, the origin on the nose bridge. `shade` looks up, for every pixel, which
point of the resting face lies there once pose and action units have moved it, and lights the
moved relief (Lambert). `photograph` and `measure_depth` are the two sensors, `rgb_difference` and
`depth_difference` the encoding of a clip. Nothing here is data of a person.
"""
import functools
import io
import zlib
from dataclasses import dataclass, replace

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

    def moved(self, by):
        """The pose after the small motion `by`."""
        return Pose(self.x + by.x, self.y + by.y, self.roll + by.roll, self.yaw + by.yaw,
                    self.pitch + by.pitch, self.scale * by.scale)

    def to(self, other):
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

    def direction(self):
        """Unit vector towards the light (x right, y down, z to the camera)."""
        flat = np.cos(self.elevation)
        return (np.sin(self.azimuth) * flat, -np.sin(self.elevation), np.cos(self.azimuth) * flat)

    def changed(self, gain, turn):
        """The light after a relative change of its strength and a turn in radians."""
        return Light(self.azimuth + turn, self.elevation, self.key * (1 + gain),
                     self.fill * (1 + gain))


def rng_of(seed, *names):
    """Generator that follows from the seed and names alone, whoever draws and when."""
    return np.random.default_rng(
        np.random.SeedSequence([seed, *(zlib.crc32(str(n).encode()) for n in names)]))


def noise(rng, shape, sigma):
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

    def __init__(self, name, seed=0, mm_per_px=1.0):
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
        t = y - self._seam()
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

    def _seam(self):
        """y of the line between the lips, mm `[1, n]`."""
        return seam_line(self.shape, self.x)

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
        s, x, t = self.shape, self.x, self.y - self._seam()
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
        ball = np.ones(radius.shape + (1,)) * np.array([0.68, 0.64, 0.6])
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

    def displacement(self, units):
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


def seam_line(shape, x):
    """y of the line between the lips at `x`; mm."""
    across = np.clip(x / shape["lip_w"], -1, 1)
    return (shape["lip_y"] + shape["lip_bow"] * (np.cos(6.3 * across) - 1)
            - shape["lip_smile"] * across ** 2)


def _geometry(rng):
    """Measures (mm) and colours (linear RGB) of one subject."""
    def about(mean, spread):
        return float(mean + spread * np.clip(rng.standard_normal(), -2, 2))

    def linear(*srgb):
        return (np.array(srgb) / 255) ** 2.2
    tone = [linear(226, 188, 165), linear(208, 164, 136), linear(182, 134, 104),
            linear(120, 84, 64)][rng.choice(4, p=[0.35, 0.35, 0.2, 0.1])]
    tone = tone * about(1, 0.07) * np.array([1, about(1, 0.03), about(1, 0.05)])
    hair = [linear(28, 24, 22), linear(52, 38, 30), linear(84, 60, 42),
            linear(120, 112, 106)][rng.choice(4, p=[0.5, 0.28, 0.15, 0.07])]
    eye_y, lip_y = about(-27, 1.5), about(44, 2)
    man = rng.random() < 0.5
    return {
        "width": about(70 if man else 67, 2.5), "jaw": about(0.3 if man else 0.38, 0.05),
        "chin_y": about(82 if man else 78, 2.5), "eye_x": about(31, 1.3), "eye_y": eye_y,
        "eye_w": about(14.5, 0.8), "eye_up": about(5.6, 0.6), "eye_low": about(3.2, 0.3),
        "eye_tilt": about(0.8, 0.9), "lid": about(3.2, 0.9), "gaze": about(0, 0.5),
        "brow_y": eye_y - about(15.5 if man else 17, 1.5), "brow_arch": about(3, 1.2),
        "brow_t": about(3.6 if man else 2.7, 0.5), "nose_y": about(16, 2),
        "nose_h": about(21, 2.5), "nose_w": about(12.5, 1.2), "cheek": about(4, 1.5),
        "lip_y": lip_y, "lip_w": about(25, 1.8), "lip_bow": about(0.4, 0.3),
        "lip_upper": about(6, 1), "lip_lower": about(8, 1), "age": abs(about(0.8, 0.5)),
        "hairline": about(-76, 4), "fringe": about(0, 2),
        "hair_end": about(-14, 5) if man else about(75, 35), "lip_smile": about(1.8, 0.8),
        "tilt": about(0, 2.5), "beard": abs(about(0.25, 0.15)) if man else 0.0,
        "moles": int(rng.integers(0, 5)), "tone": tone.astype(np.float32),
        "hair": hair.astype(np.float32),
        "lips": (tone * np.array([0.72, 0.36, 0.38]) * about(1, 0.1)).astype(np.float32),
        "iris": linear(78, 52, 34) * about(1, 0.25),
        "cloth": linear(*rng.integers(20, 110, 3)).astype(np.float32),
    }


@functools.lru_cache(maxsize=4)
def face_of(name, seed, mm_per_px):
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
    top = flat[at]
    top += (flat[at + 1] - top) * fx
    bottom = flat[at + n]
    bottom += (flat[at + n + 1] - bottom) * fx
    bottom -= top
    bottom *= fy
    top += bottom
    return top


def _locate(face, pose, units, width, height, mm_per_px):
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


def shade(face, pose, light, units, width, height, mm_per_px):
    """One frame without sensor noise.

    Returns linear RGB `[H, W, 3]` in 0..1, height towards the camera in mm `[H, W]`, and the maps
    of the body and of bad depth, `[H, W]` in 0..1.
    """
    (px, py), (ux, uy), push = _locate(face, pose, units, width, height, mm_per_px)
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


def photograph(image, rng, noise_level=1.2, quality=92):
    """The colour camera: gamma, correlated noise (grey levels), JPEG. uint8 `[H, W, 3]`."""
    levels = 255 * np.clip(image, 0, 1) ** np.float32(1 / 2.2)
    levels += noise_level * noise(rng, image.shape, (0.6, 0.6, 0.3))
    file = io.BytesIO()
    frame = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    frame.save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file)), file.getvalue()


def measure_depth(z, body, absorb, rng, holes, distance=600.0, noise_level=0.8, step=0.25):
    """The depth camera: mm `[H, W]`, 0 where nothing was measured.

    holes: noise `[H, W]` that decides where measuring fails, in part the same in both frames.
    Noise is correlated over a few pixels; beyond the body there is nothing in range; at edges of
    the body some pixels fly between the face and what lies behind. step: resolution in mm.
    """
    slope = np.hypot(*np.gradient(z))
    depth = distance - z + noise_level * noise(rng, z.shape, 1.8)
    lost = 0.8 * holes + 0.6 * noise(rng, z.shape, 2.0)
    risk = 2.0 * absorb + 0.7 * np.clip(slope - 1, 0, 3)
    valid = (body > 0.5) & (lost < 3.0 - risk)
    edge = (slope > 3) & (rng.random(z.shape) < 0.1)
    depth = np.where(edge, depth + rng.uniform(0, 60, z.shape), depth)
    return np.where(valid, np.round(depth / step) * step, 0).astype(np.float32)


# ---------------------------------------------------------------- the difference of two frames

def rgb_difference(onset, apex):
    """Signed difference of two uint8 `[H, W, 3]` frames, its median per channel removed: uint8.

    128 is "no change", one level two grey levels of the frames.
    """
    change = apex.astype(np.int16) - onset
    lit = onset.max(-1) > 40
    if lit.any():
        change = change - np.round(np.median(change[lit], axis=0)).astype(np.int16)
    return ((change + 256) // 2).clip(0, 255).astype(np.uint8)


def depth_difference(onset, apex, range_mm=10.0):
    """128 + round(127 mm / range) where both frames (mm, 0 invalid) measured, else 128: uint8.

    The median displacement of the face is removed: it is motion of the head.
    """
    both = (onset > 0) & (apex > 0)
    change = np.where(both, apex - onset, 0)
    if both.any():
        change = np.where(both, change - np.median(change[both]), 0)
    return (128 + np.round(127 * change / range_mm).clip(-127, 127)).astype(np.uint8)


# ---------------------------------------------------------------- a clip

CLASSES = ("negative", "others", "positive", "surprise")  # in the order of the published labels
CLASS_OF = {"anger": 0, "disgust": 0, "fear": 0, "sad": 0, "others": 1, "happy": 2, "surprise": 3}
# Usual combinations of action units, the commonest first; a micro-expression shows one to four.
EMOTIONS = {
    "anger": [(4,), (4, 7), (4, 5, 7), (4, 7, 24), (7, 24)],
    "disgust": [(4, 7, 10), (4, 9), (9,), (10,), (4, 10), (9, 17)],
    "fear": [(1, 4), (1, 2, 4, 5), (4, 5, 20), (4, 20, 25)],
    "sad": [(4, 15), (1, 4), (15, 17), (15,)],
    "happy": [(12,), (6, 12), (6, 12, 25), (12, 25)],
    "surprise": [(1, 2), (1, 2, 5), (1, 2, 26), (2,), (1, 2, 5, 26), (1, 2, 25, 26)],
    "others": [(14,), (17,), (4,), (14, 17), (24,), (12,), (4, 14), (17, 24), (7,), (20,),
               (12, 14)],
}
# Raised brows move further than anything else in a small expression.
STRENGTH = {"surprise": 1.4}
# How often each emotion makes up the class "negative".
SHARE = {"anger": 0.3, "disgust": 0.4, "fear": 0.1, "sad": 0.2}


@dataclass(frozen=True)
class Job:
    """One clip to render: what is asked for; the rest follows from (seed, key).

    emotion: a key of EMOTIONS, or a class name, or '' for an unlabelled pair; amplitude: a factor;
    rgb, depth: the files to write; blank: onset and apex are one frame.
    """
    key: str
    subject: str
    emotion: str
    rgb: str = ""
    depth: str = ""
    blank: bool = False
    size: int = 256
    amplitude: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Performance:
    """What happens in a clip. Amplitudes are peak shifts of the skin in pixels of a 256-pixel
    image, where a pixel is a millimetre."""
    emotion: str
    units: dict  # unit → amplitude
    unrelated: dict  # the same, for a unit that has nothing to do with the label
    blink: float  # shift of the upper lid, apex minus onset
    asymmetry: float  # right minus left, relative
    pose: Pose
    motion: Pose  # of the head from onset to apex
    light: Light
    light_gain: float  # relative change of the light, apex to onset
    light_turn: float  # and of its azimuth, radians

    @property
    def strongest(self):
        """(unit, amplitude) of the strongest labelled unit."""
        return max(self.units.items(), key=lambda item: item[1])

    def sides(self, share=1.0):
        """All units at `share` of their amplitude: dict unit → (left, right) in mm."""
        a = self.asymmetry
        return {unit: (share * size * (1 - a), share * size * (1 + a))
                for part in (self.unrelated, self.units) for unit, size in part.items()}

    def head_motion(self):
        """Mean shift of five points of the face from onset to apex, pixels at 256."""
        points = np.array([[-31, -27, 55], [31, -27, 55], [0, 10, 85], [-24, 44, 65], [24, 44, 65]])

        def place(p):
            at = points[:, :2] + (points[:, 2:] - 55) * np.array([p.yaw, p.pitch])
            turn = np.array([[np.cos(p.roll), np.sin(p.roll)], [-np.sin(p.roll), np.cos(p.roll)]])
            return p.scale * at @ turn + np.array([p.x, p.y])
        shift = place(self.pose.moved(self.motion)) - place(self.pose)
        return float(np.linalg.norm(shift, axis=1).mean())


def expressiveness(subject, seed):
    """Factor by which a subject's expressions are stronger or weaker than the average."""
    return float(np.clip(np.exp(0.5 * rng_of(seed, "expressive", subject).standard_normal()),
                         0.3, 3))


def perform(job):
    """Draws the Performance of a clip; every draw is made whatever the options."""
    rng = rng_of(job.seed, "clip", job.key)
    emotion = _emotion(job.emotion, rng)
    usual = EMOTIONS[emotion]
    common = 1 / np.arange(1, len(usual) + 1)
    combination = usual[rng.choice(len(usual), p=common / common.sum())]
    typical = STRENGTH.get(emotion, 1) * 0.36 * np.exp(0.7 * rng.standard_normal())
    typical *= expressiveness(job.subject, job.seed)
    size = 2.5 * np.tanh(typical / 2.5) if job.emotion else 5 * np.tanh(typical / 2.5)
    weight = rng.uniform(0.6, 1, len(combination))
    weight = job.amplitude * size * weight / weight.max()
    others = [unit for unit in ACTION_UNITS if unit not in combination and unit != 45]
    stray, stray_size = int(rng.choice(others)), rng.uniform(0.2, 0.9)
    stray_size *= rng.random() < 0.5
    blink = rng.uniform(1, 6) * rng.choice([-1, 1]) * (rng.random() < 0.12)
    a, b = rng.standard_normal(6).clip(-2, 2), rng.standard_normal(6).clip(-2.5, 2.5)
    pose = Pose(3 * a[0], 3 * a[1], 0.03 * a[2], 0.05 * a[3], 0.04 * a[4], 1 + 0.03 * a[5])
    motion = Pose(0.19 * b[0], 0.19 * b[1], 0.002 * b[2], 0.004 * b[3], 0.004 * b[4],
                  1 + 0.001 * b[5])
    c = rng.standard_normal(6).clip(-2, 2)
    return Performance(
        emotion, dict(zip(combination, weight.tolist())),
        {stray: float(job.amplitude * stray_size)} if stray_size else {}, float(blink),
        float(0.3 * np.clip(rng.standard_normal(), -2, 2)), pose, motion,
        Light(0.45 * c[0], 0.55 + 0.15 * c[1], 0.85 + 0.1 * c[2], 0.3 + 0.06 * c[3]),
        float(0.02 * c[4]), float(0.01 * c[5]))


def _emotion(asked, rng):
    """The emotion itself, or one of those that make up a class, or any for ''."""
    draw = rng.random()
    if asked in EMOTIONS:
        return asked
    if asked == "positive":
        return "happy"
    names, share = list(SHARE), list(SHARE.values())
    if asked == "":
        names, share = list(EMOTIONS), [1 / len(EMOTIONS)] * len(EMOTIONS)
    return names[min(int(np.searchsorted(np.cumsum(share), draw)), len(names) - 1)]


def film(job, act):
    """Onset and apex frame: two pairs (uint8 RGB `[S, S, 3]`, depth in mm `[S, S]`)."""
    rng = rng_of(job.seed, "sensors", job.key)
    mm_per_px = 256 / job.size
    face = face_of(job.subject, job.seed, mm_per_px)
    holes = noise(rng, (job.size, job.size), 2.5)
    level, quality = rng.uniform(0.8, 1.6), int(rng.integers(88, 96))
    frames = []
    for share, lids in ((0.0, max(-act.blink, 0)), (1.0, max(act.blink, 0))):
        pose = act.pose.moved(act.motion) if share else act.pose
        light = act.light.changed(act.light_gain, act.light_turn) if share else act.light
        units = act.sides(share) if share else {}
        if lids:
            units = {**units, 45: (lids, lids)}
        image, z, body, absorb = shade(face, pose, light, units, job.size, job.size, mm_per_px)
        rgb, _ = photograph(image, rng, level, quality)
        frames.append((rgb, measure_depth(z, body, absorb, rng, holes)))
    return frames


def render_clip(job):
    """Renders one clip, writes its two difference images, returns its row of truth.csv."""
    act = perform(job)
    if job.blank:
        rgb = np.full((job.size, job.size, 3), 128, np.uint8)
        depth = rgb[..., 0]
    else:
        (rgb_onset, depth_onset), (rgb_apex, depth_apex) = film(job, act)
        rgb = rgb_difference(rgb_onset, rgb_apex)
        depth = depth_difference(depth_onset, depth_apex)
    for path, pixels in ((job.rgb, rgb), (job.depth, depth)):
        Image.fromarray(pixels).save(path, compress_level=3)
    return truth(job, act)


def truth(job, act):
    """What is known of a clip, as a dict of column → value."""
    def known(value, digits=3):
        return 0.0 if job.blank else round(float(value), digits) + 0.0  # no -0.0
    return {
        "key": job.key, "subject": job.subject, "label": "", "emotion": act.emotion,
        "action_units": "+".join(map(str, sorted(act.units))),
        "amplitude_px": known(act.strongest[1]), "unit": f"AU{act.strongest[0]:02d}",
        "unrelated_unit": "+".join(map(str, act.unrelated)),
        "unrelated_px": known(sum(act.unrelated.values())), "blink_px": known(act.blink),
        "head_motion_px": known(act.head_motion()), "light_change": known(act.light_gain, 4),
        "light_turn_deg": known(np.degrees(act.light_turn)), "blank": int(job.blank),
    }


def render_subject(jobs):
    """All clips of one subject, so that its face is built once; rows of truth.csv."""
    return [render_clip(job) for job in jobs]


# ---------------------------------------------------------------- a video

OPENFACE_UNITS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45)
OPENFACE_COLUMNS = ("frame", "confidence", "success", "pose_Rx", "pose_Ry", "pose_Rz",
                    *(f"AU{unit:02d}_r" for unit in OPENFACE_UNITS))


@dataclass(frozen=True)
class Event:
    """One expression of a video: its frame numbers, and the clip (Job) that names it."""
    onset: int
    apex: int
    offset: int
    job: Job

    def level(self, frame):
        """Share of the full expression, 0 at onset and offset, 1 at the apex."""
        if not self.onset < frame < self.offset:
            return 0.0
        first, last = ((self.onset, self.apex) if frame <= self.apex
                       else (self.offset, self.apex))
        return float(np.sin(np.pi / 2 * (frame - first) / (last - first)) ** 2)


@dataclass(frozen=True)
class Video:
    """Raw frames to render: numbers `first` to `last` into two existing folders."""
    subject: str
    name: str
    color: str
    depth: str
    openface: str
    first: int
    last: int
    events: tuple
    size: tuple = (320, 240)
    seed: int = 0


def render_video(video):
    """Writes the frames of one video and its OpenFace table. Returns the rows of truth.csv, one
    per event, and the box of the face in the first frame (x, y, width, height in pixels)."""
    rng = rng_of(video.seed, "video", video.subject, video.name)
    numbers = range(video.first, video.last + 1)
    acts = [perform(event.job) for event in video.events]
    poses, lights, blinks = _course(rng, acts[0], video)
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
        with open(f"{video.color}/{number}.jpg", "wb") as file:
            file.write(jpeg)
        depth = measure_depth(z, body, absorb, rng, holes, step=1.0)
        Image.fromarray(depth.astype(np.uint16)).save(f"{video.depth}/{number}.png",
                                                      compress_level=3)
        table[number] = _openface(rng, units, poses[i])
    _write_openface(video.openface, table)
    rows = []
    for event, act in zip(video.events, acts):
        a, b = event.onset - video.first, event.apex - video.first
        rows.append(truth(event.job, replace(
            act, pose=poses[a], motion=poses[a].to(poses[b]), blink=blinks[b] - blinks[a],
            light_gain=lights[b].key / lights[a].key - 1, light_turn=0.0)))
    first, px = poses[0], 1 / mm_per_px
    box = ((width - 1) / 2 + (first.x - 75) * px, (height - 1) / 2 + (first.y + 13 - 95) * px,
           150 * px, 185 * px)
    return rows, dict(zip(("x", "y", "width", "height"), (round(v, 1) for v in box)))


def _course(rng, act, video):
    """Pose, light and blink (mm) of every frame: slow drift, flicker, blinks between events."""
    n = video.last - video.first + 1
    drift = noise(rng, (6, n), (0, 10)).astype(float)
    x, y, roll, yaw, pitch, scale = drift * np.array([[1, 1, 0.006, 0.01, 0.01, 0.002]]).T
    poses = [act.pose.moved(Pose(*change, 1 + s))
             for *change, s in zip(x, y, roll, yaw, pitch, scale)]
    lights = [act.light.changed(float(gain), 0.0) for gain in 0.008 * noise(rng, (n,), 1.5)]
    blinks = np.zeros(n)
    for event in video.events:
        middle = event.offset + 4 - video.first
        blinks += 6 * np.exp(-0.5 * ((np.arange(n) - middle) / 1.2) ** 2) * (rng.random() < 0.5)
    return poses, lights, blinks.tolist()


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
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(", ".join(OPENFACE_COLUMNS) + "\n")
        for count, number in enumerate(sorted(table, key=str), 1):
            file.write(", ".join(map(str, [count, *table[number]])) + "\n")


def render_videos(videos):
    """What render_video returns, for all videos of one subject."""
    return [render_video(video) for video in videos]
