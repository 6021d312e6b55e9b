"""Rendered stand-in data: the picture model against known displacements, and what is written."""
import csv
import hashlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import runs
from conftest import script
from PIL import Image

import dataset
from rendering import casme3, expression
from rendering import clips as filming
from rendering import face as model
from rendering.expression import Job
from rendering.face import Light, Pose

REST = Pose()
SMALL = ["--subjects", 4, "--clips_per_subject", 6, "--size", 48, "--unlabelled", 6]


def render(*argv):
    return script("render").main(["casme3", *argv])


def refused(capsys, *argv):
    return runs.refused(capsys, render, *argv)


def digest(folder):
    """SHA-256 over names and bytes of every file below `folder`."""
    actual = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        actual.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return actual.hexdigest()


def table(path, delimiter=","):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered") / "set"
    render("--data_folder", folder, *SMALL, "--num_workers", 2)
    return folder


def test_unlabelled_pairs_show_as_many_other_people_as_asked_for(tmp_path, capsys):
    folder = tmp_path / "set"
    render("--data_folder", folder, *SMALL, "--unlabelled_subjects", 3)
    pairs = table(folder / "pairs.tsv", "\t")
    assert [row["subject"] for row in pairs] == ["spNO5", "spNO6", "spNO7"] * 2
    labelled = {clip.subject for clip in dataset.read_clips(folder).clips}
    assert labelled == {f"spNO{i}" for i in range(1, 5)}
    assert all((folder / row["rgb"]).exists() for row in pairs)
    assert "rendered with other options" in refused(capsys, "--data_folder", folder, *SMALL)
    assert "holds annotated clips alone" in refused(
        capsys, "--data_folder", tmp_path / "x", "--raw", "ME_clip", "--unlabelled", 3)
    assert "goes with --unlabelled" in refused(
        capsys, "--data_folder", tmp_path / "x", "--unlabelled_subjects", 3)
    assert "--raw_size goes with --raw" in refused(
        capsys, "--data_folder", tmp_path / "x", "--raw_size", 96, 72)
    assert "--size goes without --raw" in refused(
        capsys, "--data_folder", tmp_path / "x", "--raw", "--size", 128)


@pytest.fixture(scope="module")
def face():
    return model.Face("spNO1")


def still(face, pose=REST, units=None, size=128, mm_per_px=2.0):
    """Noise-free linear RGB and height of one frame."""
    image, z, body, _ = model.shade(face, pose, Light(), units or {}, size, size, mm_per_px)
    return image, z, body


# ---------------------------------------------------------------- the model

def test_the_difference_of_two_frames_is_what_the_encoding_says():
    onset = np.full((8, 8, 3), 100, np.uint8)
    apex = onset + np.uint8(7)  # the whole face brighter: not a change
    apex[0, 0] += 10
    apex[7, 7] -= 5
    actual = filming.rgb_difference(onset, apex)
    assert (actual[0, 0] == 133).all() and (actual[7, 7] == 125).all() and actual[3, 3, 0] == 128
    near = np.full((8, 8), 600.0)
    far = near + 3  # the head moved back by 3 mm
    far[0, 0] += 4
    far[7, 7] -= 25
    far[1, 1] = near[2, 2] = 0
    actual = filming.depth_difference(near, far)
    assert actual[0, 0] == 128 + 51 and actual[7, 7] == 1 and (actual == 128).sum() == 62


@pytest.mark.parametrize("unit", sorted(model.ACTION_UNITS))
def test_every_unit_moves_the_skin_by_about_its_amplitude(face, unit):
    field = face.displacement({unit: (1.0, 1.0)})
    peak = np.linalg.norm(field[..., :2], axis=-1).max() + model.LIPS_PART.get(unit, 0)
    assert 0.8 < peak < 1.35
    assert np.allclose(face.displacement({unit: (2.0, 2.0)}), 2 * field, atol=1e-5)
    # mirrored: outwards on both sides (the grid lacks the outermost column on the right)
    assert np.allclose(field[:, 1:, 0], -field[:, :0:-1, 0], atol=1e-4)
    assert np.allclose(field[:, 1:, 1:], field[:, :0:-1, 1:], atol=1e-4)


def test_a_smile_pulls_the_corners_of_the_lips_out_and_up(face):
    x, y = (int(v + model.HALF) for v in face.anchors["corner"])
    field = face.displacement({12: (2.0, 2.0)})
    assert field[y, x, 0] > 1.2 and field[y, x, 1] < -1.2
    left = face.displacement({12: (2.0, 0.0)})
    assert abs(left[y, x, 0]) < 0.1 and left[y, int(2 * model.HALF) - x, 0] < -1.2


def test_a_moved_head_is_the_moved_picture(face):
    image, z, _ = still(face)
    moved, z_moved, _ = still(face, Pose(x=6.0, y=-4.0))  # 3 pixels right, 2 up
    inside = np.s_[20:100, 30:100]
    assert np.abs(np.roll(image, (-2, 3), (0, 1)) - moved)[inside].mean() < 1e-4
    assert np.abs(np.roll(z, (-2, 3), (0, 1)) - z_moved)[inside].max() < 1e-2


def test_sub_pixel_motion_is_measured_by_its_gradient(face):
    image = still(face)[0].mean(-1)
    moved = still(face, Pose(x=0.4))[0].mean(-1)  # a fifth of a pixel
    slope = -np.gradient(image, axis=1)
    actual = ((moved - image) * slope).sum() / (slope ** 2).sum()
    assert actual == pytest.approx(0.2, abs=0.03)


def test_a_unit_changes_both_views_at_the_same_place(face):
    image, z, body = still(face)
    smile, z_smile, _ = still(face, units={12: (2.5, 2.5)})
    rgb, depth = np.abs(smile - image).mean(-1), np.abs(z_smile - z) * (body > 0.5)
    rows = np.arange(128)[:, None]
    for change in (rgb, depth):
        assert 68 < (change * rows).sum() / change.sum() < 100  # around and above the mouth
        assert change[:52].sum() < 0.03 * change.sum()  # nothing at eyes and brows


def test_head_motion_is_the_mean_shift_of_the_face():
    act = expression.perform(Job("k", "spNO1", "happy"))
    act = replace(act, pose=Pose(), motion=Pose(x=0.3, y=0.4))
    assert act.head_motion() == pytest.approx(0.5)
    assert replace(act, motion=Pose()).head_motion() == 0


def test_draws_follow_from_seed_and_key_alone():
    job = Job("spNO.1-a-9-spNO.1-a-3", "spNO1", "surprise")
    act = expression.perform(job)
    assert act == expression.perform(job) and act != expression.perform(replace(job, seed=1))
    none = expression.perform(replace(job, amplitude=0))
    assert none.motion == act.motion and none.light == act.light and none.blink == act.blink
    assert not any(none.units.values()) and not any(none.unrelated.values())
    double = expression.perform(replace(job, amplitude=2))
    assert double.strongest[1] == pytest.approx(2 * act.strongest[1])


def test_nuisances_are_as_frequent_as_they_say():
    acts = [expression.perform(Job(f"k{i}", f"spNO{i % 50}", "negative")) for i in range(600)]
    sizes = np.array([act.strongest[1] for act in acts])
    assert sizes.max() <= 2.5 and 0.2 < np.median(sizes) < 0.6 and (sizes > 1).mean() > 0.05
    assert np.mean([bool(act.unrelated) for act in acts]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([act.blink != 0 for act in acts]) == pytest.approx(0.12, abs=0.05)
    assert 0.1 < np.median([act.head_motion() for act in acts]) < 0.5
    assert {expression.CLASS_OF[act.emotion] for act in acts} == {0}


# ---------------------------------------------------------------- the data set

def test_the_set_reads_as_any_other(rendered):
    clips = dataset.read_clips(rendered)
    assert len(clips) == 24 and clips.n_label == 4 and clips.classes == list(expression.CLASSES)
    assert clips.encoding["difference"] == "signed" and clips.encoding["depth_range_mm"] == 10
    assert clips.encoding["rendered"] is True and clips.encoding["size"] == 48
    for label in range(4):
        assert len({c.subject for c in clips.clips if c.label == label}) >= 2
    pattern = (r"casme3_diff_me4/casme3_diff_%s_all/(\w+)/"
               r"spNO\.(\d+)-(\w)-(\d+)-spNO\.\2-\3-(\d+)_diff%s\.png")
    for clip in clips.clips:
        rgb = re.fullmatch(pattern % ("imgs", ""), clip.paths[0])
        depth = re.fullmatch(pattern % ("depth", "_depth"), clip.paths[1])
        assert rgb.groups() == depth.groups()
        assert rgb[1] == expression.CLASSES[clip.label] and clip.subject == f"spNO{rgb[2]}"
        assert Image.open(rendered / clip.paths[0]).mode == "RGB"
        assert Image.open(rendered / clip.paths[1]).mode == "L"
        assert Image.open(rendered / clip.paths[0]).size == (48, 48)


def test_truth_says_what_the_images_show(rendered):
    clips = {clip.key: clip for clip in dataset.read_clips(rendered).clips}
    truth = [row for row in table(rendered / "truth.csv") if row["label"]]
    assert {row["key"] for row in truth} == set(clips)
    for row in truth:
        clip, units = clips[row["key"]], tuple(map(int, row["action_units"].split("+")))
        assert int(row["label"]) == clip.label == expression.CLASS_OF[row["emotion"]]
        assert row["subject"] == clip.subject
        assert units in [tuple(sorted(c)) for c in expression.EMOTIONS[row["emotion"]]]
        apex, onset = re.search(r"-(\d+)-[^-]+-\w-(\d+)$", clip.key).groups()
        pictures = [np.asarray(Image.open(rendered / p)) for p in clip.paths]
        assert (row["blank"] == "1") == (apex == onset)
        if row["blank"] == "1":
            assert all((p == 128).all() for p in pictures) and float(row["amplitude_px"]) == 0
        else:
            assert all((p != 128).any() for p in pictures) and float(row["amplitude_px"]) > 0


def test_unlabelled_pairs(rendered):
    pairs = dataset.read_pairs(rendered / "pairs.tsv", rendered)
    rows, truth = table(rendered / "pairs.tsv", "\t"), table(rendered / "truth.csv")
    assert tuple(rows[0]) == dataset.PAIR_COLUMNS
    assert {p.subject for p in pairs.clips} == {f"spNO{i}" for i in range(1, 5)}
    given = {row["key"]: row for row in truth if not row["label"]}
    assert len(rows) == len(given) == 6
    for row in rows:
        key = row["rgb"].rsplit("/", 1)[1].removesuffix("_diff.png")
        assert float(row["intensity"]) == pytest.approx(float(given[key]["amplitude_px"]), abs=.01)
        assert row["unit"] == given[key]["unit"] and int(row["onset"]) < int(row["apex"])
        assert 0 <= float(row["intensity"]) <= 5


def test_same_bytes_with_another_number_of_workers(rendered, tmp_path):
    render("--data_folder", tmp_path / "again", *SMALL, "--num_workers", 0)
    assert digest(tmp_path / "again") == digest(rendered)


def test_a_finished_folder_is_reused_or_refused(rendered, tmp_path, capsys):
    before = digest(rendered)
    render("--data_folder", rendered, *SMALL)
    assert "reused" in capsys.readouterr().out
    assert "seed" in refused(capsys, "--data_folder", rendered, *SMALL, "--seed", 1)
    assert digest(rendered) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    assert "mine" in refused(capsys, "--data_folder", tmp_path / "mine", *SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_classes_are_uneven_over_subjects_and_rare_ones_there():
    labels = casme3.draw_labels(40, 8, 0)
    total = np.bincount(labels.ravel(), minlength=4) / labels.size
    assert np.abs(total - casme3.CLASS_SHARE).max() < 0.01
    counts = np.stack([(labels == c).sum(1) for c in range(4)], 1)
    even = 8 * total * (1 - total)  # variance if every subject had the same shares
    assert (counts.var(0) > 1.2 * even).sum() >= 3


def lists_of(folder, shuffled=True):
    """Three subjects' lists as published, the depth view in another order, CRLF; their rows."""
    kinds = ["negative", "others", "positive", "surprise"]
    rows = {f"spNO{i}": [(k, f"spNO.{i}-b-{100 + 9 * k}-spNO.{i}-b-{100 + 8 * k}")
                         for k in range(4)] for i in (3, 7, 11)}  # the clips of class 0 are blank
    for view, inner, end in (("rgb", "imgs", ""), ("depth", "depth", "_depth")):
        (folder / f"v_{view}").mkdir(parents=True)
        for subject in rows:
            for part in ("test", "train"):
                text = [f"casme3_diff_me4/casme3_diff_{inner}_all/{kinds[k]}/{key}_diff{end}.png"
                        f" {k} 0\r\n" for s in rows for k, key in rows[s]
                        if (s == subject) == (part == "test")]
                text = text[::-1] if view == "depth" and shuffled else text
                (folder / f"v_{view}" / f"{subject}_{part}.txt").write_bytes("".join(text).encode())
    (folder / "v_rgb" / "subName.txt").write_bytes("".join(f"{s}\r\n" for s in rows).encode())
    return rows


def test_existing_lists_get_an_image_for_every_path(tmp_path):
    rows = lists_of(tmp_path / "lists")
    render("--data_folder", tmp_path / "out", "--lists", tmp_path / "lists", "--size", 48)
    for view in ("v_rgb", "v_depth"):
        assert digest(tmp_path / "out" / view) == digest(tmp_path / "lists" / view)
    clips = dataset.read_clips(tmp_path / "out")
    assert {c.key for c in clips.clips} == {key for s in rows for _, key in rows[s]}
    for clip in clips.clips:
        flat = (np.asarray(Image.open(tmp_path / "out" / clip.paths[0])) == 128).all()
        assert flat == (clip.label == 0)


def change(path, how):
    path.write_bytes(how(path.read_bytes().decode()).encode())


def test_bad_input(tmp_path, capsys):
    out = tmp_path / "out"
    lists_of(tmp_path / "lists")
    row = tmp_path / "lists" / "v_depth" / "spNO3_test.txt"
    kept = row.read_bytes()
    row.write_bytes(kept + b"a/b.png x 0\n")
    assert f"{row}:5" in refused(capsys, "--data_folder", out, "--lists", tmp_path / "lists")
    row.write_bytes(kept + b"../b.png 0 0\n")
    for train in ("spNO7", "spNO11"):
        change(tmp_path / "lists" / "v_depth" / f"{train}_train.txt",
               lambda text: text + "../b.png 0 0\n")
    assert "1 clips of v_depth lack a partner in v_rgb" in refused(
        capsys, "--data_folder", out, "--lists", tmp_path / "lists")
    for old, new, words in ((" 3 0", " 9 0", "spNO3_test.txt:4: label 9 is not one of 0 to 3"),
                            ("casme3_diff_me4", "..", "spNO3_test.txt:1: ../casme3_diff")):
        shutil.rmtree(tmp_path / "lists")
        lists_of(tmp_path / "lists")
        for path in (tmp_path / "lists").glob("v_*/*_t*.txt"):
            change(path, lambda text, old=old, new=new: text.replace(old, new))
        assert words in refused(capsys, "--data_folder", out, "--lists", tmp_path / "lists")
    assert "subName.txt" in refused(capsys, "--data_folder", out, "--lists", tmp_path / "none")
    assert "--subjects" in refused(capsys, "--data_folder", out, "--subjects", 2,
                                   "--clips_per_subject", 3)
    assert "--raw" in refused(capsys, "--data_folder", out, "--raw", "--lists", tmp_path / "lists")
    assert "--size" in refused(capsys, "--data_folder", out, "--size", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lists"]


def test_the_example_sheet(rendered, tmp_path):
    render("--data_folder", rendered, *SMALL, "--preview", tmp_path / "sheet.png")
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 4 * 256 and height > 4 * 256


# ---------------------------------------------------------------- raw frames

RAW = ["--raw_size", 96, 72]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "set"
    render("--data_folder", folder, "--raw", "--subjects", 2, "--clips_per_subject", 4,
           "--unlabelled", 2, "--amplitude", 3, *RAW)
    return folder


def openface(path, numbers):
    """dict frame number → row (dict) of an OpenFace table, whose rows follow names as strings."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{k.strip(): float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert [row["frame"] for row in rows] == list(range(1, len(numbers) + 1))
    return dict(zip(sorted(numbers, key=str), rows))


def test_raw_frames_are_laid_out_as_received(raw):
    annotation = table(raw / "annotation.csv")
    assert list(annotation[0]) == ["Subject", "Filename", "Onset", "Apex", "Offset", "AU",
                                   "Objective class", "emotion"]
    assert len(annotation) == 8 and {row["emotion"] for row in annotation} <= {
        "anger", "disgust", "fear", "sad", "happy", "surprise", "others"}
    for row in annotation:
        video = raw / "part_A" / row["Subject"] / row["Filename"]
        numbers = {int(p.stem) for p in (video / "color").glob("*.jpg")}
        assert numbers == {int(p.stem) for p in (video / "depth").glob("*.png")}
        assert numbers == set(range(9, max(numbers) + 1))
        onset, apex, offset = (int(row[name]) for name in ("Onset", "Apex", "Offset"))
        assert 9 < onset < apex < offset < max(numbers)
        depth = np.asarray(Image.open(video / "depth" / f"{apex}.png"))
        assert depth.dtype == np.uint16 and depth.shape == (72, 96)
        assert 500 < np.median(depth[depth > 0]) < 600 and (depth == 0).any()
        assert Image.open(video / "color" / f"{apex}.jpg").size == (96, 72)


def test_action_units_rise_from_onset_to_apex_and_fall_to_offset(raw):
    truth = {row["key"]: row for row in table(raw / "truth.csv")}
    assert sum(row["label"] == "" for row in truth.values()) == 2
    for row in table(raw / "annotation.csv"):
        name = f"{row['Subject']}-{row['Filename']}"
        given = truth[f"{name}-{row['Apex']}-{name}-{row['Onset']}"]
        frames = raw / "part_A" / row["Subject"] / row["Filename"] / "color"
        values = openface(raw / "openface" / f"{row['Subject']}_{row['Filename']}.csv",
                          [int(p.stem) for p in frames.glob("*.jpg")])
        unit = given["unit"].replace("24", "23") + "_r"
        at = [values[int(row[key])][unit] for key in ("Onset", "Apex", "Offset")]
        assert at[1] == pytest.approx(min(float(given["amplitude_px"]), 5), abs=0.2)
        assert at[0] < 0.2 and at[2] < 0.2
        assert given["action_units"] == row["AU"] and given["emotion"] == row["emotion"]


def test_the_clips_package(tmp_path):
    render("--data_folder", tmp_path / "set", "--raw", "ME_clip", "--subjects", 2,
           "--clips_per_subject", 4, *RAW)
    rows = table(tmp_path / "set" / "annotation.csv")
    package = tmp_path / "set" / "Part_A_ME_clip"
    assert len(list((package / "depth").iterdir())) == len(rows) == 8
    for row in rows:
        name = f"{row['Subject']}_{row['Filename']}_{row['Onset']}"
        actual = sorted(int(p.stem) for p in (package / "frame" / name).glob("*.jpg"))
        assert actual == list(range(int(row["Onset"]), int(row["Offset"]) + 1))
    assert not (tmp_path / "set" / "part_A").exists()


def test_raw_and_difference_options_are_kept_apart(raw, capsys):
    options = json.loads((raw / "rendered.json").read_text())["options"]
    assert options["raw"] == "part_A" and options["size"] == [96, 72]
    assert "raw" in refused(capsys, "--data_folder", raw, "--subjects", 2,
                            "--clips_per_subject", 4)
