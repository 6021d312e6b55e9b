"""render.py faces: RAF-DB's layout, who is in which split, what is drawn and where it lies."""
import csv

import numpy as np
import pytest
import runs
from conftest import script
from PIL import Image

from images import faces as sets
from rendering import faces
from rendering.face import Face


def render(*argv):
    return script("render").main(["faces", *(str(a) for a in argv)])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    render("--data_folder", folder, "--train", 40, "--test", 20, "--subjects", 6, "--size", 64,
           "--label_noise", 0.2, "--num_workers", 0)
    return folder


def test_the_layout_is_that_of_the_set(drawn, capsys):
    lines = (drawn / "EmoLabel" / "list_patition_label.txt").read_text().split("\n")
    assert len(lines) == 60 and lines[0].startswith("train_00001.jpg ") and lines[-1]
    splits = sets.read_faces("rafdb", drawn)
    assert (len(splits["train"]), len(splits["test"])) == (40, 20)
    assert splits["train"].rendered and splits["train"].classes == faces.EMOTIONS
    assert splits["test"].counts.min() >= 2
    marks = sets.read_landmarks(drawn / "landmarks.csv", splits["test"])
    assert marks.shape == (20, 68, 2) and not np.isnan(marks).any()
    with Image.open(drawn / splits["train"].paths[0]) as image:
        assert image.size == (64, 64) and image.mode == "RGB" and image.format == "JPEG"
    five = (drawn / "Annotation" / "manual" / "test_00001_manu_attri.txt").read_text().split("\n")
    own = marks[0] * 64
    for line, expected in zip(five, (own[36:42].mean(0), own[42:48].mean(0), own[30], own[48],
                                     own[54])):
        np.testing.assert_allclose([float(v) for v in line.split("\t")], expected, atol=.02)
    assert five[5:8] == ["0", "0", "0"]


def test_nobody_is_in_both_splits_and_wrong_labels_are_in_training_alone(drawn):
    rows = table(drawn / "truth.csv")
    people = {split: {r["subject"] for r in rows if r["split"] == split}
              for split in ("train", "test")}
    assert not people["train"] & people["test"] and len(people["train"] | people["test"]) == 6
    wrong = [r for r in rows if r["label"] != r["emotion"]]
    assert len(wrong) == 8 and {r["split"] for r in wrong} == {"train"}
    listed = sets.read_faces("rafdb", drawn)["train"]
    assert [faces.EMOTIONS[i] for i in listed.labels] == [r["label"] for r in rows[:40]]
    assert listed.subjects == [r["subject"] for r in rows[:40]]


def test_every_split_has_people_whatever_their_number():
    opt = script("render").parse_option(["faces", "--data_folder", "d", "--train", "14", "--test",
                                         "1000", "--subjects", "2"])
    photos = faces.plan(opt, "d")
    assert {photo.subject for photo in photos[:14]} == {"s1"}
    assert {photo.subject for photo in photos[14:]} == {"s2"}


def test_fields_of_displacement_do_not_fold(somebody):
    """Else a place on the face would be seen twice, and landmarks lie nowhere."""
    lowest = []
    for emotion in faces.EMOTIONS:
        for i in range(12):
            field = somebody.displacement(faces.perform(photo(emotion, f"{emotion}{i}")).units)
            lowest.append(1 - np.gradient(field[..., 1], 1.0, axis=0).max())
    assert np.mean(np.array(lowest) < 0) < .03 and min(lowest) > -.2


def test_classes_are_as_uneven_as_in_the_set():
    opt = script("render").parse_option(["faces", "--data_folder", "d", "--train", "12271"])
    photos = [photo for photo in faces.plan(opt, "d") if photo.name.startswith("train")]
    shown = [photo.emotion for photo in photos]
    assert [shown.count(name) for name in faces.EMOTIONS] == list(faces.COUNTS)


def test_the_same_for_any_number_of_workers(drawn, tmp_path):
    render("--data_folder", tmp_path / "set", "--train", 40, "--test", 20, "--subjects", 6,
           "--size", 64, "--label_noise", 0.2, "--num_workers", 2)
    files = sorted(p.relative_to(drawn) for p in drawn.rglob("*") if p.is_file())
    assert len(files) == 125
    for name in files:
        assert (drawn / name).read_bytes() == (tmp_path / "set" / name).read_bytes(), name


def photo(emotion, name="x", **more):
    return faces.Photo(**{"name": name, "subject": "s1", "emotion": emotion, "label": emotion,
                          "size": 96, "amplitude": 1.0, "seed": 0, **more})


@pytest.fixture(scope="module")
def somebody():
    return Face("s1", 0, faces.SPAN / 96)


def frontal(monkeypatch, units):
    """Every image shows these units, from the front and without anything worn."""
    act = faces.perform(photo("neutral"))

    def perform(_):
        return faces.replace(act, units={u: (v, v) for u, v in units.items()},
                             pose=faces.Pose(), light=faces.Light(), glasses="none",
                             occlusion="none", blur=0.0, noise=0.5)
    monkeypatch.setattr(faces, "perform", perform)


def test_landmarks_move_as_the_face_does(somebody, monkeypatch):
    points = {}
    for name, units in (("rest", {}), ("smile", {12: 6}), ("open", {26: 8, 25: 5}),
                        ("raised", {1: 6, 2: 6}), ("closed", {45: 8})):
        frontal(monkeypatch, units)
        points[name] = faces.take(photo("neutral"), somebody)[2]
    rest, scale = points["rest"], 96 / faces.SPAN
    assert rest.shape == (68, 2)
    # symmetric about the middle
    np.testing.assert_allclose(rest[0, 0] + rest[16, 0], 96, atol=1.5)
    moved = {name: (own - rest) / scale for name, own in points.items()}  # mm
    assert moved["smile"][48, 0] < -2 and moved["smile"][54, 0] > 2  # corners outwards
    assert moved["smile"][[48, 54], 1].max() < -2  # and up
    assert moved["open"][8, 1] > 3 and moved["open"][66, 1] - moved["open"][62, 1] > 3
    assert moved["raised"][17:27, 1].max() < -1.5
    assert abs(moved["smile"][17:27]).max() < .5
    gap = [p[[41, 40], 1].mean() - p[[37, 38], 1].mean() for p in (rest, points["closed"])]
    assert gap[1] < .7 * gap[0]


def test_landmarks_lie_on_what_they_name(somebody, monkeypatch):
    frontal(monkeypatch, {})
    _, pixels, points, _ = faces.take(photo("neutral"), somebody)
    grey = pixels.astype(float).mean(-1)

    def level(p):
        return grey[int(p[1]) - 1:int(p[1]) + 2, int(p[0]) - 1:int(p[0]) + 2].mean()
    cheek = level(points[[2, 31]].mean(0))
    for eye in (points[36:42], points[42:48]):
        assert level(eye.mean(0)) < .7 * cheek  # the pupil
    assert level(points[[62, 66]].mean(0)) < .8 * cheek  # the seam of the lips
    assert points[36:48, 1].mean() == pytest.approx(faces.EYES * 96, abs=1)
    assert points[36:48, 0].mean() == pytest.approx(48, abs=1)


def test_expressions_change_the_parts_of_the_face_that_show_them(somebody, monkeypatch):
    seen = {}
    for name, units in (("rest", {}), ("smile", {12: 6, 6: 5}), ("frown", {4: 6})):
        frontal(monkeypatch, units)
        _, pixels, points, _ = faces.take(photo("neutral"), somebody)
        seen[name] = pixels.astype(float)
    change = {name: abs(seen[name] - seen["rest"]).mean(-1) for name in ("smile", "frown")}
    half = int(points[30, 1])
    assert change["smile"][half:].mean() > 2 * change["smile"][:half - 20].mean()
    assert change["frown"][:half].mean() > 3 * change["frown"][half:].mean()


def test_amplitude_scales_the_expression_and_acts_follow_from_the_name():
    one, two = (faces.perform(photo("happiness", amplitude=a)) for a in (1.0, 2.0))
    assert two.units[12][0] == pytest.approx(2 * one.units[12][0], rel=.2)
    assert faces.perform(photo("happiness")) == one != faces.perform(photo("happiness", "y"))
    worn = [faces.perform(photo("neutral", f"n{i}")) for i in range(300)]
    assert .1 < np.mean([act.glasses != "none" for act in worn]) < .27
    assert .07 < np.mean([act.occlusion != "none" for act in worn]) < .22


@pytest.mark.parametrize("more, expected", [
    (["--train", 5], "--train 5: too few images for seven classes"),
    (["--test", 9], "--test 9: too few"), (["--label_noise", 2], "at most 1")])
def test_bad_input_is_refused(tmp_path, capsys, more, expected):
    assert expected in runs.refused(capsys, render, "--data_folder", tmp_path / "x", *more)
    assert not (tmp_path / "x").exists()


def test_a_rendered_folder_is_used_again_and_the_sheet_is_drawn(drawn, tmp_path, capsys):
    flags = ["--data_folder", drawn, "--train", 40, "--test", 20, "--subjects", 6, "--size", 64,
             "--label_noise", 0.2]
    render(*flags, "--preview", tmp_path / "sheet.png")
    assert "reused" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 7 * 160 and sheet.size[1] > 6 * 160
    assert "label_noise 0.2 there" in runs.refused(capsys, render, *flags[:-1], 0.1)
