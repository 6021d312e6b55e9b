"""What happens in a clip: which expression, how strong, and what has nothing to do with it."""
import re
from dataclasses import dataclass, field

import numpy as np

from rendering.face import ACTION_UNITS, Light, Pose, rng_of

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
    rgb, depth: the files to write; blank: onset and apex are one frame; units: the action units
    of it, such as '4+R12' (12 on the person's right alone), or '' to draw those of the emotion.
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
    units: str = ""


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
    one_sided: dict = field(default_factory=dict)  # unit → 'L' or 'R', the person's own

    @property
    def strongest(self) -> tuple:
        """(unit, amplitude) of the strongest labelled unit."""
        return max(self.units.items(), key=lambda item: item[1])

    def sides(self, share: float = 1.0) -> dict:
        """All units at `share` of their amplitude: dict unit → (left, right) of the picture, mm."""
        a = self.asymmetry
        factors = {"": (1 - a, 1 + a), "L": (0, 1), "R": (1, 0)}
        return {unit: tuple(share * size * factor
                            for factor in factors[self.one_sided.get(unit, "")])
                for part in (self.unrelated, self.units) for unit, size in part.items()}

    def head_motion(self) -> float:
        """Mean shift of five points of the face from onset to apex, pixels at 256."""
        points = np.array([[-31, -27, 55], [31, -27, 55], [0, 10, 85], [-24, 44, 65], [24, 44, 65]])

        def place(p):
            # turned and scaled about a point below the middle, as `face.locate` does it
            at = points[:, :2] + (0, 13) + (points[:, 2:] - 55) * np.array([p.yaw, p.pitch])
            turn = np.array([[np.cos(p.roll), np.sin(p.roll)], [-np.sin(p.roll), np.cos(p.roll)]])
            return p.scale * at @ turn + np.array([p.x, p.y])
        shift = place(self.pose.moved(self.motion)) - place(self.pose)
        return float(np.linalg.norm(shift, axis=1).mean())


def perform(job: Job) -> Performance:
    """Draws the Performance of a clip; every draw is made whatever the options."""
    rng = rng_of(job.seed, "clip", job.key)
    emotion = job.emotion if job.units else _emotion(job.emotion, rng)
    sides = {int(unit): side for side, unit in re.findall(r"([LR]?)(\d+)", job.units)}
    combination = tuple(sides) or draw_usual(EMOTIONS[emotion], rng)
    typical = STRENGTH.get(emotion, 1) * 0.36 * np.exp(0.7 * rng.standard_normal())
    person = rng_of(job.seed, "expressive", job.subject)  # some show more than others
    typical *= np.clip(np.exp(0.5 * person.standard_normal()), 0.3, 3)
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
        float(0.02 * c[4]), float(0.01 * c[5]), {u: side for u, side in sides.items() if side})


def draw_usual(usual: list, rng: np.random.Generator) -> tuple | str:
    """One of `usual`, the commonest of which stand first."""
    common = 1 / np.arange(1, len(usual) + 1)
    return usual[rng.choice(len(usual), p=common / common.sum())]


def _emotion(asked, rng):
    """The emotion itself, or one of those that make up a class, or any for ''."""
    draw = rng.random()
    if asked in EMOTIONS:
        return asked
    if asked == "positive":
        return "happy"
    share = SHARE if asked else dict.fromkeys(EMOTIONS, 1 / len(EMOTIONS))
    place = np.searchsorted(np.cumsum(list(share.values())), draw)
    return list(share)[min(int(place), len(share) - 1)]
