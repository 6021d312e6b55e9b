"""A clip as difference images: onset and apex are filmed, their difference is encoded and kept."""
import numpy as np
from PIL import Image

from images import encoding
from rendering.expression import Job, Performance, perform
from rendering.face import face_of, measure_depth, noise, photograph, rng_of, shade

DIFFERENCE = "signed"  # the encoding of what is rendered
RANGE_MM = 10  # change of depth beyond which it is clipped


def rgb_difference(onset: np.ndarray, apex: np.ndarray) -> np.ndarray:
    """Difference of two uint8 `[H, W, 3]` frames, its median per channel removed: uint8."""
    change = apex.astype(np.int16) - onset
    lit = onset.max(-1) > 40
    if lit.any():
        change = change - np.round(np.median(change[lit], axis=0)).astype(np.int16)
    return encoding.encode(change, DIFFERENCE)


def depth_difference(onset: np.ndarray, apex: np.ndarray) -> np.ndarray:
    """Difference of two depth frames (mm `[H, W]`, 0 invalid), none where one is invalid: uint8.

    The median displacement of the face is removed: it is motion of the head.
    """
    both = (onset > 0) & (apex > 0)
    change = np.where(both, apex - onset, 0)
    if both.any():
        change = np.where(both, change - np.median(change[both]), 0)
    return encoding.encode_depth(change, DIFFERENCE, RANGE_MM)


def film(job: Job, act: Performance) -> list:
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


def render_clip(job: Job) -> dict:
    """Renders one clip, writes its two difference images, returns its row of truth.csv."""
    act = perform(job)
    if job.blank:
        rgb = encoding.flat((job.size, job.size, 3), DIFFERENCE)
        depth = rgb[..., 0]
    else:
        (rgb_onset, depth_onset), (rgb_apex, depth_apex) = film(job, act)
        rgb = rgb_difference(rgb_onset, rgb_apex)
        depth = depth_difference(depth_onset, depth_apex)
    for path, pixels in ((job.rgb, rgb), (job.depth, depth)):
        Image.fromarray(pixels).save(path, compress_level=3)
    return truth(job, act)


def truth(job: Job, act: Performance) -> dict:
    """What a clip shows, as a dict of column → value."""
    def rounded(value, digits=3):
        return 0.0 if job.blank else round(float(value), digits) + 0.0  # no -0.0
    return {
        "key": job.key, "subject": job.subject, "label": "", "emotion": act.emotion,
        "action_units": "+".join(map(str, sorted(act.units))),
        "amplitude_px": rounded(act.strongest[1]), "unit": f"AU{act.strongest[0]:02d}",
        "unrelated_unit": "+".join(map(str, act.unrelated)),
        "unrelated_px": rounded(sum(act.unrelated.values())), "blink_px": rounded(act.blink),
        "head_motion_px": rounded(act.head_motion()), "light_change": rounded(act.light_gain, 4),
        "light_turn_deg": rounded(np.degrees(act.light_turn)), "blank": int(job.blank),
    }


def render_subject(jobs: list) -> list:
    """All clips of one subject, so that its face is built once; rows of truth.csv."""
    return [render_clip(job) for job in jobs]
