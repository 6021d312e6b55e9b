"""Faces in photographs: what is found, where, and how it is cut out."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from images.decoding import read_photo
from preparation import detection, registration
from util import BadInput


@pytest.fixture(scope="module")
def astronaut():
    """A portrait, uint8 `[512, 512, 3]`; the face's middle is near (224, 116)."""
    pytest.importorskip("facenet_pytorch")
    return pytest.importorskip("skimage.data").astronaut()


@pytest.fixture(scope="module")
def face(astronaut):
    (face,) = detection.find_faces(astronaut)
    return face


def middle(face):
    """x and y of the middle of a face's box."""
    return np.array([face.box.x + face.box.width / 2, face.box.y + face.box.height / 2])


def resized(photo, width, height):
    return np.asarray(Image.fromarray(photo).resize((width, height)))


def test_a_portrait_holds_one_face_with_its_points(astronaut, face):
    assert middle(face) == pytest.approx([224, 116], abs=6)
    assert 80 < face.box.width < 100 and 100 < face.box.height < 125 and face.box.roll == 0
    assert face.score > .99 and face.points.dtype == np.float32 and face.points.shape == (5, 2)
    left, right, nose, mouth_left, mouth_right = face.points
    assert left == pytest.approx([206, 101], abs=4) and right == pytest.approx([246, 103], abs=4)
    assert left[0] < nose[0] < right[0] and mouth_left[0] < nose[0] < mouth_right[0]
    assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])
    (again,) = detection.find_faces(astronaut)
    assert again.box == face.box and (again.points == face.points).all()


def test_the_largest_of_two_faces_is_first(astronaut):
    photo = np.zeros((512, 900, 3), np.uint8)
    photo[:300, :300], photo[:, 388:] = resized(astronaut, 300, 300), astronaut
    faces = detection.find_faces(photo)
    assert [tuple(middle(f).round(-1)) for f in faces] == [(610, 120), (130, 70)]
    assert faces[0].box.width > 1.5 * faces[1].box.width
    assert len(detection.find_faces(photo, min_face_size=90)) == 1
    (one,) = detection.find_faces(photo, threshold=(faces[0].score + faces[1].score) / 2)
    assert one.score == max(f.score for f in faces)


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"),
                                          ("I;16", "png"), ("RGBA", "png"), ("LA", "png"),
                                          ("F", "tif"), ("F1", "tif")])
def test_photographs_of_all_kinds_give_the_same_face(astronaut, face, tmp_path, mode, suffix):
    image = Image.fromarray(astronaut)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "F1":  # in shares of white
        image = Image.fromarray(np.asarray(image.convert("F")) / 255)
    else:
        image = image.convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    (found,) = detection.find_faces(np.asarray(read_photo(tmp_path / f"a.{suffix}")))
    assert middle(found) == pytest.approx(middle(face), abs=4) and found.score > .99
    assert abs(found.points - face.points).max() < 4


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match=r"a.tif: cannot be decoded \(pixels that are not finite"):
        read_photo(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_photograph_is_searched_upright(astronaut, face, tmp_path, orientation):
    """Turned as a camera that is held so turns it: the way back is that of the tag's inverse."""
    exif = Image.Exif()
    exif[0x0112] = {6: 8, 8: 6}.get(orientation, orientation)
    Image.fromarray(astronaut).save(tmp_path / "a.png", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    exif[0x0112] = orientation
    turned.save(tmp_path / "b.png", exif=exif)
    (found,) = detection.find_faces(np.asarray(read_photo(tmp_path / "b.png")))
    assert found.box == face.box


def test_photographs_without_a_face_or_smaller_than_one_give_none(astronaut):
    data = pytest.importorskip("skimage.data")
    assert detection.find_faces(data.coffee()) == []
    for shape in ((1, 1), (20, 20), (39, 2000), (20, 3000), (1, 9000)):
        assert detection.find_faces(np.full((*shape, 3), 99, np.uint8)) == []
        assert detection.find_face(np.full((*shape, 3), 99, np.uint8), True) is None
    assert detection.find_faces(resized(astronaut, 20, 20)) == []
    for side in range(20, 90):  # 12 / side * side is not always 12
        detection.find_faces(np.zeros((side, side, 3), np.uint8), side)
    for wrong in (astronaut[..., 0], astronaut[..., :1], astronaut / 255.0):
        with pytest.raises(ValueError, match="uint8"):
            detection.find_faces(wrong)


def test_a_huge_photograph_is_searched_scaled_down(astronaut, face, monkeypatch):
    seen = []
    search = detection._search
    monkeypatch.setattr(detection, "_search", lambda frame, *more:
                        seen.append(frame.shape) or search(frame, *more))
    (found,) = detection.find_faces(resized(astronaut, 5120, 5120), 400)
    assert seen == [(2000, 2000, 3)]
    assert middle(found) / 10 == pytest.approx(middle(face), abs=4)
    assert abs(found.points / 10 - face.points).max() < 4
    assert found.box.height / 10 == pytest.approx(face.box.height, rel=.1)


def test_boxes_end_at_the_border(astronaut):
    (found,) = detection.find_faces(astronaut[90:])
    assert found.box.y == 0 and found.box.x > 150 and found.points[0, 1] < 25
    (found,) = detection.find_faces(astronaut[:, 190:])
    assert found.box.x == 0 and 0 < found.box.width < 90
    crop = detection.cut_face(astronaut[:, 190:], found, 64, margin=1, align=False)
    assert (crop[:, 0] == crop[:, 5]).mean() > .3  # beyond the border it is repeated


@pytest.mark.parametrize("angle", [-25, -10, 15, 25])
def test_crops_are_turned_level(astronaut, angle):
    photo = np.asarray(Image.fromarray(astronaut).rotate(angle, Image.Resampling.BICUBIC,
                                                         center=(224, 116)))
    (turned,) = detection.find_faces(photo)
    assert turned.roll == pytest.approx(2.2 - angle, abs=6)
    level = detection.cut_face(photo, turned, 224, 0.5)
    assert level.shape == (224, 224, 3) and level.dtype == np.uint8
    (found,) = detection.find_faces(level)
    assert abs(found.roll) < 3
    points = detection.points_in_crop(turned, 224, 0.5)
    assert points[0, 1] == pytest.approx(points[1, 1], abs=1e-3)
    assert abs(points - found.points).max() < 10
    (plain,) = detection.find_faces(detection.cut_face(photo, turned, 224, 0.5, align=False))
    assert plain.roll == pytest.approx(turned.roll, abs=6)


def test_points_go_where_the_crop_shows_them():
    """A white pixel in the middle of which a point lies."""
    rng = np.random.default_rng(0)
    for align in (True, False):
        photo = np.zeros((200, 300, 3), np.uint8)
        points = np.array([[120, 80], [160, 95], [140, 100], [125, 120], [150, 125]], np.float32)
        for x, y in points.astype(int):
            photo[y - 1:y + 1, x - 1:x + 1] = rng.integers(200, 256)  # edges at whole numbers
        face = detection.Face(registration.Box(100, 60, 80, 90), points, 1.0)
        crop = detection.cut_face(photo, face, 256, 0.2, align)[..., 0].astype(float)
        for x, y in detection.points_in_crop(face, 256, 0.2, align):
            rows, columns = (np.arange(int(v) - 6, int(v) + 7) for v in (y, x))
            part = crop[np.ix_(rows, columns)]
            assert (part.sum(1) @ (rows + .5)) / part.sum() == pytest.approx(y, abs=.3)
            assert (part.sum(0) @ (columns + .5)) / part.sum() == pytest.approx(x, abs=.3)


def test_the_margin_is_that_of_prepared_crops(astronaut, face):
    matrix = detection.crop_of(face, 256, align=False)
    assert (matrix == registration.crop_matrix(face.box, 256)).all()
    assert (detection.cut_face(astronaut, face, 256, align=False)
            == registration.cut(astronaut, matrix, 256)).all()
    assert matrix[0, 0] == pytest.approx(face.box.height / 224)  # the face fills 224 of 256


def test_frames_are_searched_by_the_same_detector(astronaut, face):
    box = detection.find_face(astronaut, True)
    assert box.roll == pytest.approx(face.roll, abs=3)
    assert [box.x, box.y, box.width, box.height] == pytest.approx(
        [face.box.x, face.box.y, face.box.width, face.box.height], abs=4)
    assert detection.find_face(astronaut, False).roll == 0
    assert detection.find_face(astronaut[90:], False).y < 0  # a frame's box goes beyond it


def test_the_detector_leaves_threads_and_random_numbers_alone(astronaut, threads):
    detection._detector.cache_clear()
    state = torch.get_rng_state()
    torch.set_num_threads(threads + 1)
    detection.find_faces(astronaut)
    assert torch.get_num_threads() == threads + 1 and (torch.get_rng_state() == state).all()


def test_a_missing_detector_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(BadInput, match="make faces installs it, or give --crop box"):
        detection.require()
    with pytest.raises(BadInput, match=r"^x\.py: .* make faces installs it$"):
        detection.require("x.py", "")
