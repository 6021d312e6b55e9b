"""Crop, registration and differences of one pair: known shifts, known displacements, invalid
depth."""
import cv2
import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.ndimage import shift as move

from images import encoding
from preparation import registration
from preparation.registration import Box

BOX = Box(200, 80, 200, 220)


def scene(seed=0, shape=(400, 600)):
    """A textured frame, float `[H, W]` in grey levels."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    return (128 + 35 * noise / noise.std()).clip(5, 250)


def colour(grey):
    return np.stack([grey, 0.9 * grey, 0.8 * grey], -1).round().clip(0, 255).astype(np.uint8)


def identity_at(box, size=256):
    return registration.crop_matrix(box, size)


def test_the_face_fills_the_central_224_pixels():
    matrix = identity_at(BOX)
    # the longer side: edges of the box at 16 and 240 of the crop's 256
    for inside, outside in ((16, 80), (240, 300)):
        assert matrix[1] @ [0, inside - 0.5, 1] == pytest.approx(outside - 0.5)
    centre = matrix @ [127.5, 127.5, 1]
    assert centre == pytest.approx([299.5, 189.5])
    scaled = registration.crop_matrix(BOX, 256, scale=(0.5, 0.5)) @ [127.5, 127.5, 1]
    assert scaled == pytest.approx([(299.5 + 0.5) / 2 - 0.5, (189.5 + 0.5) / 2 - 0.5])


def test_a_turn_is_one_of_square_pixels():
    """In a frame that is made a square a turn of the head is no similarity, but comes out whole."""
    turn = np.array(cv2.getRotationMatrix2D((170, 140), 2, 1.01))
    squeeze = np.diag([340 / 224, 280 / 224])
    warp = np.linalg.inv(squeeze) @ np.concatenate([turn[:, :2] @ squeeze, turn[:, 2:]], 1)
    mask = np.ones((224, 224), bool)
    assert registration._nearest_similarity(warp, mask, (340, 280)) == pytest.approx(warp)
    off = registration._nearest_similarity(warp, mask, (1, 1)) - warp
    assert np.abs(off @ [224, 224, 1]).max() > .5


def test_roll_levels_the_eyes():
    """Two bright eyes on a line that falls by 10 degrees to the right come out level."""
    y, x = np.mgrid[:400, :600]
    eyes = np.zeros((400, 600))
    half = 50 * np.array([np.cos(np.radians(10)), np.sin(np.radians(10))])
    for sign in (-1, 1):
        cx, cy = 299.5 + sign * half[0], 189.5 + sign * half[1]
        eyes += 200 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 30)
    crop = registration.cut(colour(eyes), identity_at(Box(200, 80, 200, 220, 10.0)), 256)
    bright = crop[..., 0] > 60
    rows, cols = np.nonzero(bright)
    left, right = rows[cols < 128].mean(), rows[cols >= 128].mean()
    assert abs(left - right) < 0.2
    assert cols[cols >= 128].mean() - cols[cols < 128].mean() == pytest.approx(100 * 224 / 220,
                                                                               abs=0.3)


@pytest.mark.parametrize("shift", [(0.3, -0.4), (1.7, 0.6), (-4.25, 3.5), (9.3, -6.1)])
@pytest.mark.parametrize("motion", ["translation", "similarity"])
def test_registration_recovers_a_known_shift(shift, motion):
    """To 0.1 pixel of the crop, under a change of gain and offset and with noise."""
    rng = np.random.default_rng(1)
    onset = scene()
    apex = move(onset, (shift[1], shift[0]), order=5, mode="nearest") * 1.05 - 4
    onset, apex = (colour(image + rng.normal(0, 1, image.shape)) for image in (onset, apex))
    matrix = identity_at(BOX)
    crops = [registration.cut(image, matrix, 256) for image in (onset, apex)]
    stable = registration.stable_mask(BOX, 256)
    warp, converged = registration.register(*crops, [stable], motion)
    assert converged
    centre = np.argwhere(stable).mean(0)[::-1]
    actual = warp @ [*centre, 1] - centre
    assert actual == pytest.approx(np.array(shift) / matrix[0, 0], abs=0.1)


@pytest.mark.parametrize("degrees, scale, shift", [(1.5, 1.01, (0, 0)), (-2, 0.99, (2, 1)),
                                                   (0.5, 1, (0.4, 0.3))])
@pytest.mark.parametrize("seed", [2, 4])
def test_similarity_is_recovered_in_numbers(seed, degrees, scale, shift):
    """Where the stable parts go: to 0.1 pixel of the crop; the turn to 0.15 degrees, the scale
    to 0.004."""
    onset, rng = scene(seed), np.random.default_rng(seed)
    turn = cv2.getRotationMatrix2D((300, 190), degrees, scale)
    turn[:, 2] += shift
    back = cv2.invertAffineTransform(turn)[::-1]  # rows, columns
    apex = affine_transform(onset, back[:, 1::-1], back[:, 2], order=5, mode="nearest") * 1.04 - 3
    frames = [colour(image + rng.normal(0, 1, image.shape)) for image in (onset, apex)]
    matrix = identity_at(BOX)
    stable = registration.stable_mask(BOX, 256)
    warp, converged = registration.register(
        *(registration.cut(frame, matrix, 256) for frame in frames), [stable], "similarity")
    true = registration.compose(cv2.invertAffineTransform(matrix),
                                registration.compose(turn, matrix))
    centre = np.array([*np.argwhere(stable).mean(0)[::-1], 1])
    assert converged and np.linalg.norm((warp - true) @ centre) < 0.1
    actual, wanted = (complex(m[0, 0], m[1, 0]) for m in (warp, true))
    assert abs(np.degrees(np.angle(actual / wanted))) < 0.15
    assert abs(actual / wanted) == pytest.approx(1, abs=0.004)


def test_registration_recovers_a_known_similarity():
    """A turn by 1.5 degrees and a scale of 1.01 about the middle of the face."""
    onset = scene(2)
    turn = cv2.getRotationMatrix2D((300, 190), 1.5, 1.01)
    apex = cv2.warpAffine(onset, turn, (600, 400), flags=cv2.INTER_CUBIC,
                          borderMode=cv2.BORDER_REPLICATE)
    pair = registration.align([colour(onset), colour(apex)], (None, None), BOX,
                              motion="similarity")
    still = registration.align([colour(onset), colour(apex)], (None, None), BOX, motion="none")
    face = registration.face_mask(BOX, 256)

    def rms(p):
        return np.sqrt(np.square(registration.rgb_change(p.onset, p.apex, face)[face]
                                 .astype(float)).mean())
    assert rms(pair) < 0.1 * rms(still)
    assert pair.residual < 0.1
    assert still.residual > 0.5


@pytest.mark.parametrize("size, within", [(64, 0.2), (128, 0.1), (224, 0.1)])
def test_smaller_crops_are_registered_too(size, within):
    for seed in range(4):
        onset = scene(seed)
        apex = move(onset, (1.8, -2.6), order=5, mode="nearest")
        pair = registration.align([colour(onset), colour(apex)], (None, None), BOX, size)
        moved = np.hypot(1.8, 2.6) / identity_at(BOX, size)[0, 0]
        assert pair.registered and pair.shift == pytest.approx(moved, abs=within)


def test_what_moves_elsewhere_does_not_disturb_the_registration():
    """The mouth shifts by 3 pixels, the head by (1.2, 0.7): only the latter is taken off."""
    onset = scene(3)
    apex = move(onset, (0.7, 1.2), order=5, mode="nearest")
    mouth = np.s_[230:280, 250:350]
    apex[mouth] = move(onset, (3.7, 1.2), order=5, mode="nearest")[mouth]
    pair = registration.align([colour(onset), colour(apex)], (None, None), BOX)
    assert pair.shift == pytest.approx(np.hypot(1.2, 0.7) / identity_at(BOX)[0, 0], abs=0.1)
    change = abs(registration.rgb_change(pair.onset, pair.apex, registration.face_mask(BOX, 256)))
    stable = registration.stable_mask(BOX, 256)
    assert change[stable].mean() < 1
    assert change[190:210, 100:150].mean() > 10


@pytest.mark.parametrize("motion", ["translation", "similarity"])
def test_far_motion_is_measured_on_the_stable_parts(motion):
    """The head moves by 22 pixels of the crop, all else of the face by 4 more."""
    broad = gaussian_filter(np.random.default_rng(5).standard_normal((400, 600)), 30)
    onset = (0.4 * scene(5) + 77 + 25 * broad / broad.std()).clip(5, 250)
    matrix = identity_at(BOX)
    far = 22 * matrix[0, 0]
    apex = move(onset, (0, far + 4), order=5, mode="nearest")
    stable = registration.stable_mask(BOX, 256)
    place = cv2.warpAffine(stable.astype(np.uint8), matrix, onset.shape[::-1])
    place = move(place, (0, far), order=0) > 0
    apex[place] = move(onset, (0, far), order=5, mode="nearest")[place]
    crops = [registration.cut(colour(image), matrix, 256) for image in (onset, apex)]
    warp, by = registration.register(*crops, [stable], motion)
    centre = np.argwhere(stable).mean(0)[::-1]
    assert by == 1 and warp @ [*centre, 1] - centre == pytest.approx([22, 0], abs=.1)


def test_what_does_not_look_alike_is_not_taken_for_registered():
    crops = [registration.cut(colour(scene(seed)), identity_at(BOX), 256) for seed in (6, 7)]
    masks = registration.stable_mask(BOX, 256), registration.face_mask(BOX, 256)
    warp, by = registration.register(*crops, masks)
    assert by == 0 and (warp == np.eye(2, 3)).all()


def test_a_registration_by_the_whole_face_is_told_apart():
    onset = scene(8)
    matrix = identity_at(BOX)
    stable = registration.stable_mask(BOX, 256, 1.0).astype(np.uint8)
    onset[cv2.warpAffine(stable, matrix, onset.shape[::-1]) > 0] = 128  # a flat forehead
    onset[80:136, 200:400] = 128
    onset[136:230, 270:330] = 128
    apex = move(onset, (0.7, 1.2), order=5, mode="nearest")
    pair = registration.align([colour(onset), colour(apex)], (None, None), BOX)
    assert pair.registered == 2
    assert pair.shift == pytest.approx(np.hypot(.7, 1.2) / matrix[0, 0], abs=.1)


def test_residual_motion_is_measured():
    onset = scene(4)
    for shift in (0.0, 0.8, 2.0):
        apex = move(onset, (0, shift), order=5, mode="nearest")
        pair = registration.align([colour(onset), colour(apex)], (None, None), BOX, motion="none")
        assert pair.residual == pytest.approx(shift / identity_at(BOX)[0, 0], abs=0.1)
    flat = np.full((400, 600, 3), 90, np.uint8)
    pair = registration.align([flat, flat], (None, None), BOX)
    assert not pair.registered and np.isnan(pair.residual) and pair.shift == 0


def test_depth_recovers_a_known_displacement():
    """The cheek comes nearer by 3 mm while the head retreats by 12 mm and shifts by 5 pixels;
    depth frames are half as large as the colour frames."""
    y, x = np.mgrid[:200, :300]
    relief = 600 + 0.002 * ((x - 150) ** 2 + (y - 95) ** 2)
    cheek = np.hypot(x - 165, y - 110) < 14
    onset = scene(5)
    apex = move(onset, (0, 5), order=5, mode="nearest")
    after = move(relief - 3.0 * cheek, (0, 2.5), order=1, mode="nearest") + 12
    pair = registration.align([colour(onset), colour(apex)], (relief, after), BOX)
    face = registration.face_mask(BOX, 256)
    change, valid = registration.depth_change(pair.depth_onset, pair.depth_apex, face)
    to_crop = np.linalg.inv(np.vstack([registration.crop_matrix(BOX, 256, scale=(0.5, 0.5)),
                                       [0, 0, 1]]))
    column, row, _ = np.round(to_crop @ [165, 110, 1]).astype(int)
    assert valid[face].all()
    assert change[row - 5:row + 6, column - 5:column + 6] == pytest.approx(-3.0, abs=0.15)
    assert abs(np.median(change[face])) < 1e-3
    levels = encoding.encode_depth(change, "signed", 10.0)
    assert levels[row, column] == 128 + round(127 * -3 / 10)


def test_nothing_is_interpolated_across_invalid_depth():
    """Around a hole every valid pixel of the crop has the depth of the surface, never less."""
    depth = np.full((400, 600), 700.0, np.float32)
    depth[150:190, 260:300] = 0
    matrix = registration.crop_matrix(Box(200.3, 80.6, 200, 220, 4.0), 256)
    crop = registration.cut_depth(depth, matrix, 256)
    assert set(np.unique(crop[crop > 0]).round(2)) == {700.0}
    # 40 x 40 pixels of (220 · 8/7)², and a ring of at most one pixel around them
    assert 40 ** 2 < (crop == 0).mean() * (220 * 8 / 7) ** 2 < 42 ** 2
    onset, apex = crop, np.where(crop > 0, crop + 5, 0)
    apex[:20] = 0
    change, valid = registration.depth_change(onset, apex, np.ones_like(valid_of(crop)))
    assert (change == 0).all() and not valid[:20].any()
    assert (valid == (valid_of(crop) & valid_of(apex))).all()


def valid_of(depth):
    return depth > 0


def test_flicker_is_taken_off_per_channel():
    crop = colour(scene(6))[:256, :256] // 2 + 50
    brighter = crop + np.array([7, 3, 11], np.uint8)
    brighter[100:110, 100:110, 0] += 20
    face = np.ones((256, 256), bool)
    change = registration.rgb_change(crop, brighter, face)
    assert (change[100:110, 100:110, 0] == 20).all()
    change[100:110, 100:110, 0] = 0
    assert (change == 0).all()


def test_encodings():
    change = np.array([-300, -255, -3, -2, -1, 0, 1, 2, 255, 300], np.int16)
    assert encoding.encode(change, "signed").tolist() == [0, 0, 126, 127, 127, 128, 128, 129,
                                                              255, 255]
    assert encoding.encode(change, "wrap").tolist() == [212, 1, 253, 254, 255, 0, 1, 2, 255,
                                                            44]
    assert encoding.encode(change, "absolute").tolist() == [255, 255, 3, 2, 1, 0, 1, 2, 255,
                                                                255]
    mm = np.array([-30, -10, -0.04, 0, 0.04, 5, 10, 30], np.float32)
    assert encoding.encode_depth(mm, "signed").tolist() == [1, 1, 127, 128, 129, 192, 255, 255]
    assert encoding.encode_depth(mm, "wrap").tolist() == [129, 129, 255, 0, 1, 64, 127, 127]
    assert encoding.encode_depth(mm, "absolute", 20).tolist() == [127, 64, 0, 0, 0, 32, 64,
                                                                      127]


def test_a_crop_beyond_the_frame_repeats_the_border():
    frame = colour(scene(7))
    crop = registration.cut(frame, registration.crop_matrix(Box(-60, -60, 100, 100), 64), 64)
    assert crop.shape == (64, 64, 3)
    assert np.ptp(crop[:30, :30].astype(int), axis=(0, 1)).max() <= 1
    depth = registration.cut_depth(np.full((400, 600), 5.0, np.float32),
                                   registration.crop_matrix(Box(-60, -60, 100, 100), 64), 64)
    assert (depth[:30, :30] == 0).all() and depth[60, 60] == 5
