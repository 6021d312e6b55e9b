"""prepare.py on a raw tree with every known irregularity: rules, counts, bytes, resume."""
import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import irregular
import numpy as np
import pytest
import raw_tree
import runs
from conftest import LISTS, ROOT, finetune, pretrain, probe, script
from PIL import Image

import dataset
import util
from preparation import annotation, audit, cutting, detection, frames, outputs
from training import record

BLANK = "apex equal to onset: blank"
OUTSIDE = "apex outside onset to offset: blank"
FRAMELESS = "blank clip without its frame: blank all the same"
NEAREST = "missing frame: the nearest existing one"
PLAIN = ("--crop", "none", "--depth_scale", 0.1, "--size", 64, "--num_workers", 0)


def prepare(*argv):
    """prepare.py in this process."""
    return script("prepare").main(["casme3", *argv])


def render(folder, *argv):
    """Small raw frames by render.py, in this process."""
    script("render").main(["casme3", "--data_folder", folder, "--raw_size", 96, 72, "--raw", *argv])


def key(subject, video, onset, apex):
    return f"{subject}-{video}-{apex}-{subject}-{video}-{onset}"


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def digests(folder, but="audit"):
    """File → SHA-256 of everything in a prepared set but one folder."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file() and but not in p.parts}


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Pictures are drawn where a test's name says so: they take most of a small run's time."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr(audit, "draw_all", lambda *args: None)


def refusal(capsys, *argv):
    return runs.refused(capsys, prepare, *argv)


# What the annotation says, clip by clip: (subject, video, onset, apex, offset, AU, emotion).
ROWS = [
    ("spNO.1", "a", 10, 16, 22, "4", "anger"),
    ("spNO.1", "a", 30, 38, 44, "9", "disgust"),       # a second clip of the video
    ("spNO.1", "b", 12, 12, 20, "12", "happy"),        # apex equal to onset
    ("spNO.1", "c", 12, 40, 20, "12", "happy"),        # apex outside
    ("spNO.2", "a", 10, 18, 0, "14", "Others"),        # offset 0, capital
    ("spNO.2", "b", 0, 0, 10, "1", "sad"),             # no 0.jpg
    ("spNO.2", "J", 10, 17, 22, "1+2", "surprise"),    # the folder is j
    ("spNO.3", "a", 10, 14, 22, "1+2", "surprise"),    # folder spNo.3, depth without depth/
    ("spNO210", "a", 10, 15, 22, "4", "fear"),         # depth folder without the dot
    ("spNO.4", "a", 116, 121, 130, "6+12", "happy"),   # the ME clip package
    ("spNO.5", "a", 10, 18, 25, "4", "anger"),         # frame 18 missing, 17 and 19 there
    ("spNO.5", "b", 10, 20, 25, "4", "sad"),           # depth 20 missing, 19 in both views
    ("spNO.5", "c", 10, 13, 25, "4", "anger"),         # 13 missing, 1 > (13 - 10) / 4
    ("spNO.5", "d", 10, 22, 30, "4", "anger"),         # 20 to 24 missing
    ("spNO.5", "e", 10, 130, 140, "4", "anger"),       # several seconds
    ("spNO.5", "f", 10, 16, 20, "4", "anger"),         # the apex is no image
    ("spNO.1", "A", 10, 16, 22, "4", "anger"),         # the first row again
    ("spNO.5", "g", "x", 16, 20, "4", "anger"),        # no number
    ("spNO.5", "h", 10, 16, 20, "4", "bored"),         # no emotion of the set
    ("spNO.6", "a", 10, 16, 20, "4", "anger"),         # no such folder
]
KEPT = [key(*row[:2], *row[2:4]).replace("spNO210", "spNO.210") for row in ROWS[:12]]


def write_raw(root):
    """The tree that belongs to ROWS, under the prefixes in use, and its annotation."""
    part = root / "part_A_split" / "part_A"
    write, numbers = raw_tree.write_video, range(8, 48)
    for subject, videos in (("spNO.1", "abc"), ("spNO.2", "abj")):
        for video in videos:
            write(part, subject, video, numbers)
    for depth in (part / "spNO.2" / "a" / "depth").iterdir():  # beside color/, not in depth/
        depth.rename(part / "spNO.2" / "a" / depth.name)
    (part / "spNO.2" / "a" / "depth").rmdir()
    apart = root / "part_A_depth"
    write(part, "spNO.3", "a", numbers, where=(part / "spNo.3" / "a" / "color",
                                               apart / "spNo.3" / "a"))
    write(part, "spNO.210", "a", numbers, where=(part / "spNO.210" / "a" / "color",
                                                 apart / "spNO210" / "a" / "depth"))
    clip = root / "Part_A_ME_clip"
    write(clip, "spNO.4", "a", range(116, 131), lambda n: 0.1 * (n - 110),
          where=(clip / "frame" / "spNO.4_a_116", clip / "depth" / "spNO.4_a_116"))
    for video, missing in (("a", {18}), ("b", {20}), ("c", {13}), ("d", range(20, 25)),
                           ("f", ()), ("g", ()), ("h", ())):
        write(part, "spNO.5", video, sorted(set(numbers) - set(missing)))
    write(part, "spNO.5", "e", (10, 130), lambda n: 0)
    rgb, _ = raw_tree.frame("spNO.5b", 2.0)  # b: frame 20 is there in colour
    Image.fromarray(rgb).save(part / "spNO.5" / "b" / "color" / "20.jpg")
    (part / "spNO.5" / "f" / "color" / "16.jpg").write_bytes(b"\xff\xd8 no picture")
    return raw_tree.write_csv(root / "labels.csv", ROWS)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The irregular tree; read only."""
    root = tmp_path_factory.mktemp("raw")
    write_raw(root)
    return root


@pytest.fixture(scope="module")
def cut(raw, tmp_path_factory):
    """The set that comes out of it; read only."""
    folder = tmp_path_factory.mktemp("cut") / "set"
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", folder, *PLAIN)
    return folder


def level_change(folder, path):
    """Change in the middle of the mouth, in steps of the stored image from 128."""
    image = np.asarray(Image.open(folder / path)).astype(int) - 128
    y, x = round(0.7 * image.shape[0]), image.shape[1] // 2
    return image[y - 1:y + 2, x - 1:x + 2].mean()


# ---------------------------------------------------------------- rules and counts

def test_every_irregularity_is_counted(cut):
    actual = manifest(cut)
    names = {k: sorted(v) for k, v in actual["repairs"].items()}
    assert names == {
        BLANK: [key("spNO.1", "b", 12, 12), key("spNO.2", "b", 0, 0)],
        OUTSIDE: [key("spNO.1", "c", 12, 40)],
        FRAMELESS: [key("spNO.2", "b", 0, 0)],
        NEAREST: [key("spNO.5", "a", 10, 18), key("spNO.5", "b", 10, 20)],
        "offset 0: onset + 15, or the apex": [key("spNO.2", "a", 10, 18)],
        "emotion with capitals (Others)": [key("spNO.2", "a", 10, 18)],
        "subject spelled otherwise than spNO.<i>": [key("spNO.210", "a", 10, 15)],
        "video letter in another case (J, j)": [key("spNO.2", "J", 10, 17)],
        "subject folder in another case (spNo)": [key("spNO.3", "a", 10, 14)],
        "depth folder without the inner depth/": [key("spNO.2", "a", 10, 18),
                                                  key("spNO.3", "a", 10, 14)],
        "subject folder without the dot (spNO210)": [key("spNO.210", "a", 10, 15)],
    }
    reasons = {d["clip"]: d["reason"] for d in actual["dropped"]}
    assert len(reasons) == len(ROWS) - len(KEPT) == 8
    for clip, words in ((key("spNO.5", "c", 10, 13), "apex 13 is missing, the nearest frame is 12"),
                        (key("spNO.5", "d", 10, 22), "apex 22 is missing, the nearest frame is 19"),
                        (key("spNO.5", "e", 10, 130), "120 frames from onset to apex"),
                        (key("spNO.5", "f", 10, 16), "not a readable image"),
                        (key("spNO.1", "A", 10, 16), "a second row"),
                        ("spNO.5-g row 19", "onset 'x' is not a frame number"),
                        (key("spNO.5", "h", 10, 16), "emotion 'bored' is not known"),
                        (key("spNO.6", "a", 10, 16), "no RGB frames of video a found")):
        assert words in reasons[clip]
    assert actual["counts"]["classes"] == {"negative": 6, "others": 1, "positive": 3, "surprise": 2}
    assert actual["counts"]["blank"] == {"negative": 1, "others": 0, "positive": 2, "surprise": 0}
    assert actual["counts"]["subjects"] == {"spNO1": 4, "spNO2": 3, "spNO3": 1, "spNO4": 1,
                                           "spNO5": 2, "spNO210": 1}
    assert actual["annotation"]["sha256"] == hashlib.sha256(
        (cut.parent.parent / actual["options"]["annotation"]).read_bytes()).hexdigest()


def test_names_folders_and_lists_are_as_published(cut):
    clips = dataset.read_clips(cut)
    assert sorted(c.key for c in clips.clips) == sorted(KEPT)
    first = next(c for c in clips.clips if c.key == KEPT[0])
    name = "spNO.1-a-16-spNO.1-a-10_diff"
    assert first.paths[0] == f"casme3_diff_me4/casme3_diff_imgs_all/negative/{name}.png"
    assert first.paths[1] == f"casme3_diff_me4/casme3_diff_depth_all/negative/{name}_depth.png"
    assert clips.encoding["classes"] == ["negative", "others", "positive", "surprise"]
    assert clips.encoding["difference"] == "signed" and clips.encoding["depth_range_mm"] == 10


def test_difference_images_show_the_rise(cut):
    """40 levels and 4 mm per unit of level, 0.1 per frame: two levels of the frame are one."""
    for clip, numbers in ((KEPT[0], 6), (KEPT[1], 8), (KEPT[9], 5)):
        (row,) = [c for c in dataset.read_clips(cut).clips if c.key == clip]
        rgb, depth = (level_change(cut, path) for path in row.paths)
        assert rgb == pytest.approx(40 * 0.1 * numbers * 0.9 / 2, rel=0.1)
        assert depth == pytest.approx(-12.7 * 0.4 * numbers, rel=0.06)


def test_a_missing_apex_is_replaced_by_its_neighbour(cut):
    """spNO.5 a: 17 for 18, so the change is that of 7 frames; b: 19 for 20, of 9."""
    for clip, numbers in ((KEPT[10], 7), (KEPT[11], 9)):
        (row,) = [c for c in dataset.read_clips(cut).clips if c.key == clip]
        assert level_change(cut, row.paths[1]) == pytest.approx(-12.7 * 0.4 * numbers, rel=0.06)


def test_blank_clips_are_no_change(cut):
    for row in dataset.read_clips(cut).clips:
        blank = row.key in (KEPT[2], KEPT[3], KEPT[5])
        for name in row.paths:
            assert (np.asarray(Image.open(cut / name)) == 128).all() == blank


def test_the_middle_frame_may_stand_in_for_a_blank_apex(raw, tmp_path):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--blank_apex", "middle", *PLAIN)
    actual = manifest(tmp_path / "set")
    rows = {c.key: c for c in dataset.read_clips(tmp_path / "set").clips}
    for clip, apex in ((KEPT[2], 16), (KEPT[3], 16)):
        change = level_change(tmp_path / "set", rows[clip].paths[1])
        assert change == pytest.approx(-12.7 * 0.4 * (apex - 12), rel=0.06)
    reasons = {d["clip"]: d["reason"] for d in actual["dropped"]}
    assert reasons[KEPT[5]] == "onset 0 is missing, the nearest frame is 8"
    assert sum(actual["counts"]["blank"].values()) == 0


def test_the_middle_of_a_clip_of_several_seconds_is_bound_too(tmp_path):
    """onset = apex = 10, offset 110: the middle, 60, is 50 frames away; offset 90: 40 are."""
    raw_tree.write_video(tmp_path / "raw", "spNO.1", "a", (10, 60), lambda n: n / 100)
    raw_tree.write_video(tmp_path / "raw", "spNO.2", "a", (10, 50), lambda n: n / 100)
    labels = raw_tree.write_csv(tmp_path / "labels.csv", [("spNO.1", "a", 10, 10, 110, "4", "sad"),
                                                          ("spNO.2", "a", 10, 10, 90, "4", "sad")])
    prepare("--raw", tmp_path / "raw", "--annotation", labels, "--data_folder", tmp_path / "set",
            "--blank_apex", "middle", *PLAIN)
    actual = manifest(tmp_path / "set")
    assert [clip["clip"] for clip in actual["clips"]] == [key("spNO.2", "a", 10, 10)]
    assert actual["dropped"] == [{"clip": key("spNO.1", "a", 10, 10), "reason": "50 frames from "
                                 "onset to apex, more than --max_gap 45"}]


def test_clips_that_still_move_are_dropped(tmp_path):
    """The whole frame shifts by 1 and by 3 pixels; without registration all of it is left."""
    rows, shifts = [], {"a": 0, "b": 1, "c": 3}
    for video, shift in shifts.items():
        raw_tree.write_video(tmp_path / "raw", "spNO.1", video, (10, 16), lambda n: 0)
        apex = tmp_path / "raw" / "spNO.1" / video / "color" / "16.jpg"
        moved = np.roll(raw_tree.frame(f"spNO.1{video}", 0)[0], shift, axis=1)
        Image.fromarray(moved).save(apex, quality=95)
        rows.append(("spNO.1", video, 10, 16, 20, "4", "anger"))
    labels = raw_tree.write_csv(tmp_path / "labels.csv", rows)
    argv = ["--raw", tmp_path / "raw", "--annotation", labels, "--crop", "box", 35, 15, 90, 90,
            "--size", 128, "--num_workers", 0]
    prepare(*argv, "--register", "none", "--data_folder", tmp_path / "all")
    left = [clip["residual"] for clip in manifest(tmp_path / "all")["clips"]]
    per_pixel = 112 / 90  # the box fills 7/8 of the crop
    assert left == pytest.approx([s * per_pixel for s in shifts.values()], abs=0.15)
    prepare(*argv, "--register", "none", "--max_motion", 2, "--data_folder", tmp_path / "calm")
    actual = manifest(tmp_path / "calm")
    assert [clip["clip"][7:8] for clip in actual["clips"]] == ["a", "b"]
    (lost,) = actual["dropped"]
    assert lost["reason"] == f"residual motion {left[2]:.2f} pixels, more than --max_motion 2"
    assert len(list((tmp_path / "calm").rglob("*_diff*.png"))) == 4
    prepare(*argv, "--max_motion", 2, "--data_folder", tmp_path / "registered")
    assert manifest(tmp_path / "registered")["dropped"] == []


def test_blank_clips_may_be_dropped(raw, tmp_path):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--blank_apex", "drop", *PLAIN)
    assert {c.key for c in dataset.read_clips(tmp_path / "set").clips} == \
        set(KEPT) - {KEPT[2], KEPT[3], KEPT[5]}


def test_pairs_alone_do_not_take_the_place_of_labelled_clips(raw, cut, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "set")
    before = digests(tmp_path / "set")
    argv = ["--unlabelled", raw, "--intensity", "difference", "--window", 2,
            "--data_folder", tmp_path / "set", *PLAIN]
    line = refusal(capsys, *argv)
    assert refusal(capsys, *argv, "--dry_run") == line
    assert "holds 12 labelled clips, which a run without any would remove" in line
    assert digests(tmp_path / "set") == before


def test_classes_of_megc_and_no_other_pictures(raw, tmp_path):
    page = tmp_path / "set" / "audit" / "others.png"  # of a run with four classes
    page.parent.mkdir(parents=True)
    page.touch()
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--classes", 3, *PLAIN)
    clips = dataset.read_clips(tmp_path / "set")
    assert clips.classes == ["negative", "positive", "surprise"]
    labels = {c.key: c.label for c in clips.clips}
    assert KEPT[4] not in labels and not page.exists()  # others
    assert [labels[KEPT[i]] for i in (0, 2, 6)] == [0, 1, 2]


def test_raw_labels_are_seven_classes(raw, tmp_path):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--classes", 7, *PLAIN)
    clips = dataset.read_clips(tmp_path / "set")
    assert clips.classes == ["anger", "disgust", "fear", "happy", "others", "sad", "surprise"]
    (happy,) = [c for c in clips.clips if c.key == KEPT[9]]
    assert happy.label == 3 and "/happy/" in happy.paths[0]


def test_counts_are_printed_beside_the_published_ones(raw, tmp_path, capsys):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            *PLAIN)
    lines = capsys.readouterr().out.splitlines()
    assert "labels.csv: 20 clips annotated, 12 cut, 8 dropped, 6 subjects" in lines
    assert manifest(tmp_path / "set")["counts"]["dropped"] == 8
    table = {line.split()[0]: line.split()[1:] for line in lines if line and line[0] != " "}
    assert table["negative"] == ["6", "1", "508", "496", "457"]
    assert table["others"] == ["1", "0", "170", "166", "161"]
    assert table["positive"] == ["3", "2", "64", "60", "55"]
    assert table["surprise"] == ["2", "0", "201", "199", "187"]
    assert f"  repaired     2  {NEAREST}" in lines
    assert [line for line in lines if line.startswith("  dropped")] == [
        "  dropped      2  apex … is missing, the nearest frame is …",
        "  dropped      1  no RGB frames of video a found",
        "  dropped      1  onset … is not a frame number",
        "  dropped      1  row … a second row for this subject, video and onset",
        "  dropped      1  row … emotion … is not known",
        "  dropped      1  … frames from onset to apex, more than --max_gap …",
        "  dropped      1  … not a readable image"]
    assert f"    {key('spNO.5', 'd', 10, 22)}: apex 22 is missing, the nearest frame is 19" in lines


def test_every_irregularity_is_planted(tmp_path):
    render(tmp_path, "--subjects", 4, "--clips_per_subject", 4)
    was, root = irregular.plant(tmp_path), tmp_path / "part_A_split" / "part_A"
    assert len(was) == len(irregular.IRREGULARITIES) == 13
    with open(tmp_path / "annotation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    key = ("Subject", "Filename", "Onset", "Apex", "Offset", "emotion")
    rows = {tuple(row[k] for k in key) for row in rows}

    def now(name, **changes):
        """Whether the annotation holds the clip's row with `changes`."""
        return tuple({**was[name], **changes}[k] for k in key) in rows

    def files(name, view):
        row = was[name]
        return {int(p.stem) for p in (root / row["Subject"] / row["Filename"] / view).glob("*.*")}
    assert (root / "spNO210").is_dir() and not list((root / "spNO.210").glob("*/depth"))
    assert now("Others beside others", emotion="Others")
    for name, color, depth in (("apex frame missing", False, False),
                               ("apex frame missing in depth", True, False)):
        apex = int(was[name]["Apex"])
        assert ((apex in files(name, "color")), (apex in files(name, "depth"))) == (color, depth)
        assert {apex - 1, apex + 1} <= files(name, "color") & files(name, "depth")
    name = "apex frame and its neighbours missing"
    assert not files(name, "color") & set(range(int(was[name]["Apex"]) - 2,
                                                int(was[name]["Apex"]) + 3))
    name = "depth folder without the inner depth/"
    assert files(name, "") and not files(name, "depth") and files(name, "") == files(name, "color")
    assert now("apex equal to onset", Apex=was["apex equal to onset"]["Onset"])
    assert now("offset 0", Offset="0") and now("onset and apex 0", Onset="0", Apex="0")
    name = "subject in another case"
    assert now(name, Subject=was[name]["Subject"].replace("spNO", "spNo"))
    name = "video letter in another case"
    assert now(name, Filename=was[name]["Filename"].upper())


@pytest.mark.slow
def test_every_irregularity_of_rendered_frames(tmp_path):
    """Rendered faces with each irregularity planted in a clip that is named."""
    render(tmp_path / "raw", "--subjects", 4, "--clips_per_subject", 6)
    planted = irregular.plant(tmp_path / "raw")
    prepare("--raw", tmp_path / "raw", "--annotation", tmp_path / "raw" / "annotation.csv",
            "--data_folder", tmp_path / "set", "--crop", "none", "--size", 64)
    actual = manifest(tmp_path / "set")
    reasons = {d["clip"]: d["reason"] for d in actual["dropped"]}

    def where(name, onset=None, apex=None):
        row = planted.pop(name)
        onset = row["Onset"] if onset is None else onset
        return row, key(row["Subject"], row["Filename"], onset, apex or row["Apex"])
    repairs = actual["repairs"]
    for name, rule in (("Others beside others", "emotion with capitals (Others)"),
                       ("apex frame missing", NEAREST), ("apex frame missing in depth", NEAREST),
                       ("offset 0", "offset 0: onset + 15, or the apex"),
                       ("depth folder without the inner depth/",) * 2,
                       ("subject without the dot in the depth tree",
                        "subject folder without the dot (spNO210)"),
                       ("subject in another case", "subject spelled otherwise than spNO.<i>")):
        assert where(name)[1] in repairs[rule], name
    row, clip = where("apex frame and its neighbours missing")
    assert f"apex {row['Apex']} is missing" in reasons.pop(clip)
    row = planted["apex equal to onset"]
    assert where("apex equal to onset", apex=row["Onset"])[1] in repairs[BLANK]
    row = planted["apex outside onset to offset"]
    apex = int(row["Offset"]) + 3
    assert where("apex outside onset to offset", apex=apex)[1] in repairs[OUTSIDE]
    assert where("onset and apex 0", 0, "0")[1] in repairs[FRAMELESS]
    row = planted["clip of several seconds"]
    clip = where("clip of several seconds", apex=int(row["Onset"]) + 150)[1]
    assert "150 frames" in reasons.pop(clip)
    row, _ = where("video letter in another case")
    clip = key(row["Subject"], row["Filename"].upper(), row["Onset"], row["Apex"])
    assert clip in repairs["video letter in another case (J, j)"]
    assert not planted and not reasons
    assert actual["counts"]["clips"] == 24 - 2


def test_two_videos_of_one_name_are_not_one(raw, tmp_path, capsys):
    shutil.copytree(raw, tmp_path / "raw" / "A")
    shutil.copytree(raw, tmp_path / "raw" / "B")
    argv = ["--raw", tmp_path / "raw", "--annotation", raw / "labels.csv", "--data_folder",
            tmp_path / "set", *PLAIN]
    prepare(*argv)  # twice the same
    (extra,) = (tmp_path / "raw" / "B").rglob("spNO.1/a/color")
    shutil.copyfile(next(extra.glob("*.jpg")), extra / "999.jpg")
    assert "another video of this name lies in" in refusal(capsys, *argv)


def test_lists_are_read_as_they_are_copied(cut, raw, tmp_path, capsys):
    shutil.copytree(cut, tmp_path / "lists")
    paths = [path for view in ("v_rgb", "v_depth") for path in (tmp_path / "lists" / view).glob(
        "*_t*.txt")]
    for path in paths:
        path.write_text("".join(f"  {line}" for line in path.read_text().splitlines(True)))
    argv = ["--raw", raw, "--annotation", tmp_path / "lists", "--data_folder", tmp_path / "set",
            *PLAIN]
    prepare(*argv)
    lines = [len((tmp_path / part / "v_rgb" / "spNO1_test.txt").read_text().split("\n"))
             for part in ("set", "lists")]
    assert lines[0] == lines[1] > 2
    for path in paths:
        path.write_text(path.read_text().replace(" 0 casme3", " 5 casme3").replace(" 0 0", " 5 0"))
    said = refusal(capsys, *argv)
    assert "its labels are 1, 2, 3, 5; they go from 0 to C-1 without a gap" in said


def test_a_workbook_that_declares_fewer_rows_is_read_whole(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in [["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Emotion"], *ROWS]:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.xlsx") as old, zipfile.ZipFile(
            tmp_path / "b.xlsx", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sheet1.xml"):
                content = re.sub(rb'<dimension ref="[^"]*"', b'<dimension ref="A1:G2"', content)
            new.writestr(name, content)
    tables = [annotation.read_annotation(tmp_path / f"{name}.xlsx") for name in "ab"]
    assert tables[0].rows == tables[1].rows and len(tables[1].rows) > 2
    with zipfile.ZipFile(tmp_path / "a.xlsx") as old, zipfile.ZipFile(
            tmp_path / "cut.xlsx", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:len(content) // (1 + name.endswith("sheet1.xml"))])
    with pytest.raises(util.BadInput, match=r"cut.xlsx: not a workbook .*; save it as .xlsx again"):
        annotation.read_annotation(tmp_path / "cut.xlsx")


def test_frames_of_sixteen_bits_are_those_of_eight(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (40, 50), np.uint8)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert np.array_equal(*(cutting.read_frame(str(tmp_path / f"{n}.png")) for n in (8, 16)))
    Image.fromarray(grey).convert("P").save(tmp_path / "p.png")
    Image.fromarray(grey).convert("LA").save(tmp_path / "la.png")
    for name in ("p", "la"):
        assert np.array_equal(cutting.read_depth(str(tmp_path / f"{name}.png"), 1), grey)
    mapped = Image.fromarray(grey)
    mapped.putpalette([x for i in range(256) for x in (i, 255 - i, 0)])
    mapped.save(tmp_path / "mapped.png")
    with pytest.raises(cutting.Unusable, match="a colour image"):
        cutting.read_depth(str(tmp_path / "mapped.png"), 1)


@pytest.mark.parametrize("inner", ["color", "depth"])
def test_either_view_may_lie_beside_the_others_folder(tmp_path, inner):
    """And a link to nowhere is no frame."""
    folder = tmp_path / "spNO.1" / "a"
    for view, name in (("color", "3.jpg"), ("depth", "3.png")):
        place = folder / view if view == inner else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
        (place / name.replace("3", "4")).symlink_to(tmp_path / "not fetched")
    rgb, depth, _ = frames.Tree(tmp_path).frames("spNO.1", "a")
    assert [*rgb, *depth] == [3, 3] and rgb[3].endswith(".jpg") and depth[3].endswith(".png")


def test_two_spellings_of_a_class_are_one(tmp_path):
    rows = [annotation.Row(0, f"s{i}", "a", 1, 2, None, "", emotion, str(i))
            for i, emotion in enumerate(("other", "others", "happiness", "sad"))]
    table = annotation.Table(rows, {"name": "clips.csv", "sha256": None, "rows": 4})
    annotation.finish(table, 7, "keep", 50)
    assert table.classes == ("happiness", "others", "sad")
    assert [row.label for row in table.rows] == [1, 1, 0, 2]


def test_a_table_of_boxes_with_empty_cells_names_onsets_as_numbers_do(tmp_path):
    head = "database,subject,video,onset,x,y,width,height"
    (tmp_path / "b.csv").write_text(f"{head}\ncasme3,spNO.1,a,2.0,1,2,3,4\n"
                                    "casme3,spNO.1,a,,5,6,7,8\n")
    boxes = detection.read_boxes(tmp_path / "b.csv", False)
    assert detection.box_for(boxes, ("casme3", "spNO.1", "a", "2")).x == 1
    assert detection.box_for(boxes, ("casme3", "spNO.1", "a", "3")).x == 5
    (tmp_path / "b.csv").write_text(f"{head}\ncasme3,spNO.1,a,2,1,2,3,4\n"
                                    "casme3,spno1,A,2.0,5,6,7,8\n")
    with pytest.raises(util.BadInput, match=r"b\.csv:3: another box"):
        detection.read_boxes(tmp_path / "b.csv", False)


def test_other_boxes_take_the_lists_away_until_they_are_cut(raw, cut, tmp_path, monkeypatch,
                                                            capsys):
    shutil.copytree(cut, tmp_path / "set")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("subject,x,y,width,height\n" + "".join(
        f"spNO.{i},20,10,40,40\n" for i in (1, 2, 3, 4, 10)))
    argv = ["--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            *PLAIN[2:], "--crop", "boxes", boxes]
    prepare(*argv)
    boxes.write_text(boxes.read_text().replace(",20,10,", ",22,10,"))

    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(cutting, "run_all", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        prepare(*argv)
    assert not (tmp_path / "set" / "v_rgb" / "subName.txt").exists()
    assert not (tmp_path / "set" / "manifest.json").exists()
    said = refusal(capsys, "--unlabelled", raw, "--intensity", "difference", "--data_folder",
                   tmp_path / "set", *PLAIN)  # of which no manifest speaks any more
    assert "labelled clips, which a run without any would remove" in said


@pytest.mark.parametrize("more, expected", [
    (["--window", 9], "--window goes with --unlabelled"),
    (["--unlabelled", "x", "--intensity", "difference", "--aus", 4], "--aus goes with --au"),
    (["--max_gap", 9], "--max_gap goes with --annotation;")])
def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys, more, expected):
    said = refusal(capsys, "--raw", tmp_path, "--clips", "c.csv", "--data_folder", tmp_path / "s",
                   *more)
    assert expected in said


@pytest.mark.slow
def test_rendered_clip_package(tmp_path):
    render(tmp_path / "raw", "ME_clip", "--subjects", 2, "--clips_per_subject", 4)
    prepare("--raw", tmp_path / "raw", "--annotation", tmp_path / "raw" / "annotation.csv",
            "--data_folder", tmp_path / "set", "--crop", "none", "--size", 64)
    actual = manifest(tmp_path / "set")
    assert actual["counts"]["clips"] == 8 and actual["repairs"] == {}


# ---------------------------------------------------------------- bytes and stops

@pytest.mark.pictures
def test_second_run_changes_nothing_pictures_included(raw, cut):
    before = digests(cut, but="none")
    assert {n for n in before if n.startswith("audit/")} == {
        f"audit/{n}.png" for n in ("negative", "others", "positive", "surprise", "worst",
                                   "histograms")}
    times = {p: p.stat().st_mtime_ns for p in cut.rglob("*_diff*.png")}
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", cut, *PLAIN)
    assert digests(cut, but="none") == before
    assert {p: p.stat().st_mtime_ns for p in cut.rglob("*_diff*.png")} == times  # not cut again


def test_number_of_workers_changes_nothing(raw, cut, tmp_path):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            *PLAIN[:-1], 3)
    assert digests(tmp_path / "set") == digests(cut)


def test_damaged_and_stale_images_are_made_anew(raw, cut, tmp_path):
    argv = ["--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set"]
    prepare(*argv, *PLAIN, "--max_gap", 6)
    images = sorted((tmp_path / "set").rglob("*_diff*.png"))
    images[0].write_bytes(b"cut off")
    (tmp_path / "set" / "v_rgb" / ".x.1.part").write_text("half")
    prepare(*argv, *PLAIN)
    actual, expected = digests(tmp_path / "set"), digests(cut)
    assert {k: v for k, v in actual.items() if k != "manifest.json"} == \
        {k: v for k, v in expected.items() if k != "manifest.json"}
    prepare(*argv, *PLAIN, "--max_gap", 6)
    assert sorted((tmp_path / "set").rglob("*_diff*.png")) == images
    assert 2 * len(list((tmp_path / "set" / ".prepare").iterdir())) == len(images)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(*names):
        raise OSError("stopped before the file got its name")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="stopped"):
        util.write_bytes(tmp_path / "x.png", b"content")
    assert list(tmp_path.iterdir()) == []


def test_stopped_run_goes_on(tmp_path):
    """SIGKILL in the middle; then complete. The finished clips are kept as they are."""
    rows = []
    for i in range(24):
        subject, video = f"spNO.{i // 12 + 1}", "abcdefghijkl"[i % 12]
        raw_tree.write_video(tmp_path / "raw", subject, video, (10, 16))
        rows.append((subject, video, 10, 16, 20, "4", ("anger", "happy", "others",
                                                       "surprise")[i % 4]))
    labels = raw_tree.write_csv(tmp_path / "labels.csv", rows)
    argv = ["--raw", tmp_path / "raw", "--annotation", labels, *PLAIN[:4], "--num_workers", 2]
    prepare(*argv, "--data_folder", tmp_path / "whole")
    stopped = tmp_path / "stopped"
    run = subprocess.Popen([sys.executable, ROOT / "prepare.py", "casme3", "--data_folder",
                            stopped, *map(str, argv)], start_new_session=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while run.poll() is None and len(list((stopped / ".prepare").glob("*.json"))) < 3:
            time.sleep(0.002)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    with contextlib.suppress(ProcessLookupError):  # its workers, that may be writing to the disk
        for _ in range(1000):
            os.killpg(run.pid, 0)
            time.sleep(0.01)
    kept = {p: p.stat().st_mtime_ns for p in (stopped / ".prepare").glob("*.json")}
    assert 3 <= len(kept) < 24
    assert not (stopped / "v_rgb").exists()
    prepare(*argv, "--data_folder", stopped)
    assert digests(stopped) == digests(tmp_path / "whole")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def die(*task):
    os._exit(9)


@pytest.mark.parametrize("content", ["[]", "{}", '{"stamp": 1}', "null", "{"])
def test_a_record_that_is_none_is_no_record(content, tmp_path):
    (tmp_path / cutting.RECORDS).mkdir()
    path = tmp_path / cutting.RECORDS / "a.json"
    path.write_text(content)
    assert cutting._finished(path, 1, tmp_path) is None
    outputs.remove_others(tmp_path, [])
    assert not path.exists()


def test_a_frame_on_which_the_face_was_found_belongs_to_what_a_clip_follows_from(tmp_path):
    names = [tmp_path / f"{n}.jpg" for n in range(3)]
    for name in names:
        raw_tree.write_frame("a", 0.1, name, None)
    task = cutting.Task("a", "rgb/a.png", "", tuple(map(str, names[:2])), more=(str(names[2]),))
    before = cutting.fingerprint(task, {})
    assert before == cutting.fingerprint(task, {})
    raw_tree.write_frame("b", 0.5, names[2], None)
    os.utime(names[2], ns=(1, 1))
    assert cutting.fingerprint(task, {}) != before


def test_options_that_leave_no_clip_leave_the_set_as_it_was(raw, tmp_path, capsys):
    argv = ["--unlabelled", raw, "--intensity", "difference", "--window", 2, "--data_folder",
            tmp_path, *PLAIN]
    prepare(*argv)
    before = digests(tmp_path)
    assert "no pair reaches --floor 99" in refusal(capsys, *argv, "--floor", 99)
    assert digests(tmp_path) == before


def test_a_killed_worker_is_answered_in_one_line(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cutting, "process", die)
    with pytest.raises(SystemExit) as stop:
        prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder",
                tmp_path / "set", *PLAIN[:-1], 2)
    assert stop.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: a worker was killed")


def test_kept_crops_serve_another_difference(raw, tmp_path, monkeypatch):
    argv = ["--raw", raw, "--annotation", raw / "labels.csv", *PLAIN]
    prepare(*argv, "--data_folder", tmp_path / "set", "--save_crops")
    prepare(*argv, "--data_folder", tmp_path / "other", "--difference", "absolute")
    decoded, read = [], cutting.read_frame
    monkeypatch.setattr(cutting, "read_frame", lambda path: decoded.append(path) or read(path))
    prepare(*argv, "--data_folder", tmp_path / "set", "--save_crops", "--difference", "absolute")
    # the clip whose apex is no image was not kept: it alone is tried again
    assert {os.path.dirname(os.path.dirname(path))[-8:] for path in decoded} == {"spNO.5/f"}
    actual, expected = digests(tmp_path / "set"), digests(tmp_path / "other")
    images = {k for k in expected if "_diff" in k}
    assert images and {k: actual[k] for k in images} == {k: expected[k] for k in images}


@pytest.mark.parametrize("spoil", [lambda whole: b"", lambda whole: whole[:len(whole) // 2]])
def test_kept_crops_that_cannot_be_read_are_cut_again(tmp_path, spoil):
    for n in (10, 16):
        raw_tree.write_frame("a", 0.1 * n, tmp_path / f"{n}.jpg", None)
    task = cutting.Task("a", "rgb/a.png", "", tuple(str(tmp_path / f"{n}.jpg") for n in (10, 16)))
    settings = cutting.Settings("none", 0.0, 64, False, "none", crops=True)
    first, _ = cutting.make_crops(task, settings, tmp_path)
    (kept,) = (tmp_path / "crops").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(spoil(whole))
    again, _ = cutting.make_crops(task, settings, tmp_path)
    assert np.array_equal(again.apex, first.apex) and kept.read_bytes() == whole


def test_dry_run_writes_pictures_only(raw, tmp_path, capsys):
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--dry_run", *PLAIN)
    files = {p.relative_to(tmp_path / "set").as_posix() for p in (tmp_path / "set").rglob("*")
             if p.is_file()}
    assert files == {f"audit/{name}.png" for name in ("negative", "others", "positive", "surprise",
                                                      "worst", "histograms")}
    assert "nothing but" in capsys.readouterr().out


# ---------------------------------------------------------------- annotations of other kinds

def test_published_lists_come_out_byte_for_byte(tmp_path):
    if not LISTS.exists():
        pytest.skip(f"no {LISTS.name}")
    with tarfile.open(LISTS) as archive:
        archive.extractall(tmp_path / "lists", filter="data")
    raw, keys = tmp_path / "raw", set()
    for path in (tmp_path / "lists" / "v_rgb").glob("*_test.txt"):
        for line in path.read_text().splitlines():
            subject, video, apex, _, _, onset = line.split()[0].split("/")[-1].split("_")[0] \
                .rsplit("-", 5)
            keys.add((subject, video, int(apex), int(onset)))
    assert len(keys) == 943
    for subject, video, apex, onset in keys:
        if apex != onset:
            raw_tree.write_video(raw, subject, video, (onset, apex), lambda n: n % 7 / 7,
                                 size=(40, 32))
    prepare("--raw", raw, "--annotation", tmp_path / "lists", "--data_folder", tmp_path / "set",
            "--crop", "none", "--register", "none", "--size", 32, "--num_workers", 2)
    for view in ("v_rgb", "v_depth"):
        published = {p.name: p.read_bytes() for p in (tmp_path / "lists" / view).iterdir()}
        written = {p.name: p.read_bytes() for p in (tmp_path / "set" / view).iterdir()}
        assert written == published
    actual = manifest(tmp_path / "set")
    assert actual["counts"]["classes"] == {"negative": 508, "others": 170, "positive": 64,
                                          "surprise": 201}
    assert sum(actual["counts"]["blank"].values()) == 62 and actual["dropped"] == []
    assert len(dataset.read_clips(tmp_path / "set")) == 943


def test_lists_lose_the_rows_that_cannot_be_cut_and_nothing_else(cut, raw, tmp_path):
    lists = tmp_path / "lists"
    for view in ("v_rgb", "v_depth"):
        (lists / view).mkdir(parents=True)
        for path in (cut / view).iterdir():
            text = path.read_text().replace("spNO.1-a-38-spNO.1-a-30", "spNO.1-a-66-spNO.1-a-60")
            (lists / view / path.name).write_bytes(text.replace("\n", "\r\n").encode())
    shutil.copytree(lists / "v_depth", lists / "v_gray")  # of images that are not made here
    prepare("--raw", raw, "--annotation", lists, "--data_folder", tmp_path / "set", *PLAIN)
    assert not (tmp_path / "set" / "v_gray").exists()
    shutil.rmtree(lists / "v_gray")
    for path in lists.rglob("*.txt"):
        lines = path.read_bytes().splitlines(keepends=True)
        rows = [line for line in lines if b"-a-60" not in line]
        assert (tmp_path / "set" / path.relative_to(lists)).read_bytes() == b"".join(rows)
    (lost,) = manifest(tmp_path / "set")["dropped"]
    assert lost == {"clip": key("spNO.1", "a", 60, 66),
                    "reason": "onset 60 is missing, the nearest frame is 47"}


def test_workbook_says_the_same_as_csv(cut, raw, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "notes"
    sheet = book.create_sheet("label")
    sheet.append([*raw_tree.HEADER])
    for *rest, emotion in ROWS:
        sheet.append([*map(str, rest), "I", emotion])
    book.save(tmp_path / "labels.xlsx")
    prepare("--raw", raw, "--annotation", tmp_path / "labels.xlsx", "--data_folder",
            tmp_path / "set", *PLAIN)
    actual, expected = digests(tmp_path / "set"), digests(cut)
    assert {k: v for k, v in actual.items() if k != "manifest.json"} == \
        {k: v for k, v in expected.items() if k != "manifest.json"}
    assert manifest(tmp_path / "set")["counts"] == manifest(cut)["counts"]


def test_old_workbook_says_the_same_as_csv(tmp_path):
    pytest.importorskip("xlrd")
    xlwt = pytest.importorskip("xlwt")
    book = xlwt.Workbook()
    sheet = book.add_sheet("label")
    for i, row in enumerate([raw_tree.HEADER, *((*r[:-1], "I", r[-1]) for r in ROWS)]):
        for j, cell in enumerate(row):
            sheet.write(i, j, cell)  # numbers as numbers: 10.0 when read
    book.save(tmp_path / "labels.xls")
    raw_tree.write_csv(tmp_path / "labels.csv", ROWS)
    tables = [annotation.read_annotation(tmp_path / f"labels.{end}") for end in ("xls", "csv")]
    assert tables[0].rows == tables[1].rows and len(tables[0].rows) == 17
    assert tables[0].dropped == tables[1].dropped


def test_missing_reader_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "raw").mkdir()
    for end, package in (("xlsx", "openpyxl"), ("xls", "xlrd")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / f"labels.{end}").write_bytes(b"")
        line = refusal(capsys, "--raw", tmp_path / "raw", "--annotation",
                       tmp_path / f"labels.{end}", "--data_folder", tmp_path / "set", *PLAIN)
        assert package in line and "requirements-prepare.txt" in line


def test_clips_of_other_sets(tmp_path):
    """Paths from clips.csv; the same file names under two subjects; no depth, so no v_depth."""
    rows = ["database,subject,clip,onset,apex,label"]
    for subject in ("sub01", "sub02"):
        for clip, label in (("EP01", "happiness"), ("EP02", "surprise"), ("EP03", "repression")):
            folder = tmp_path / "raw" / subject / clip
            for n in (3, 9):
                raw_tree.write_frame(clip, n / 10, folder / f"img{n}.jpg", None)
            rows.append(f"casme2,{subject},{clip},{subject}/{clip}/img3.jpg,"
                        f"{subject}/{clip}/img9.jpg,{label}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    prepare("--raw", tmp_path / "raw", "--clips", tmp_path / "clips.csv", "--data_folder",
            tmp_path / "set", "--classes", 3, *PLAIN)
    clips = dataset.read_clips(tmp_path / "set", view="RGB_gray")
    assert {(c.database, c.subject, c.label) for c in clips.clips} == {
        (2, s, i) for s in ("sub01", "sub02") for i in range(3)}
    assert not (tmp_path / "set" / "v_depth").exists()
    (row,) = [c for c in clips.clips if c.subject == "sub01" and c.label == 1]
    rgb = level_change(tmp_path / "set", row.paths[0])
    assert rgb == pytest.approx(40 * 0.6 * 0.9 / 2, rel=0.1)


@pytest.mark.parametrize("apex, offset, blank, kept", [
    (120, 0, False, 120), (110, 0, False, 115), (110, 11, False, 115), (120, 110, True, 110)])
def test_an_offset_that_is_none_makes_no_clip_blank(tmp_path, apex, offset, blank, kept):
    (tmp_path / "labels.csv").write_text(f"Subject,Filename,Onset,Apex,Offset,AU,Emotion\n"
                                         f"spNO.1,a,100,{apex},{offset},4,disgust\n")
    (row,) = annotation.read_annotation(tmp_path / "labels.csv").rows
    assert (row.onset, row.apex, row.offset, row.blank) == (100, apex, kept, blank)


def test_a_table_of_other_sets_is_read_as_spreadsheets_end_it(tmp_path, capsys):
    """Blank rows; and what is known of CAS(ME)^3 alone is not said of them."""
    for n in (3, 9):
        raw_tree.write_frame("x", n / 10, tmp_path / "raw" / f"{n}.jpg", None)
    (tmp_path / "clips.csv").write_text("database,subject,clip,onset,apex,label\n"
                                        "smic,s1,c,3.jpg,9.jpg,happy\n,,,,,\n\n"
                                        "smic,s2,c,3.jpg,9.jpg,disgust\n,,,,,\n")
    table = annotation.read_clips_csv(tmp_path / "clips.csv", tmp_path / "raw")
    assert [row.subject for row in table.rows] == ["s1", "s2"] and table.source["rows"] == 2
    prepare("--raw", tmp_path / "raw", "--clips", tmp_path / "clips.csv", "--data_folder",
            tmp_path / "set", *PLAIN)
    said = capsys.readouterr().out
    assert "943" not in said and "no clip of others, surprise: " in said
    assert "give other --classes" in said


@pytest.mark.parametrize("header, row, words", [
    ("", "casme2,s,c,none3.jpg,none9.jpg,happy", ":2: none3.jpg is not below"),
    ("", "casme2,s,c,none3.jpg,none9.jpg,happy", "2 paths in all"),
    ("", "casme2,s,../../c,3.jpg,9.jpg,happy", ":2: subject 's', clip '../../c'"),
    ("", "casme2,,c,3.jpg,9.jpg,happy", ":2: subject ''"),
    ("", "casme2,s,c,3.jpg,9.jpg,joy", ":2: label 'joy'"),
    ("", "casme5,s,c,3.jpg,9.jpg,happy", ":2: the database is one of"),
    ("", "samm,S1,c,3.jpg,9.jpg,happy\nsamm,s1,d,3.jpg,9.jpg,happy", "differ in capitals or dots"),
    (",depth_onset", "casme2,s,c,3.jpg,9.jpg,happy,3.jpg", ":1: one of the columns depth_onset")])
def test_bad_rows_of_clips_are_named(tmp_path, capsys, header, row, words):
    for n in (3, 9):
        raw_tree.write_frame("x", n / 10, tmp_path / "raw" / f"{n}.jpg", None)
    (tmp_path / "clips.csv").write_text(
        f"database,subject,clip,onset,apex,label{header}\n{row}\n")
    assert words in refusal(capsys, "--raw", tmp_path / "raw", "--clips", tmp_path / "clips.csv",
                            "--data_folder", tmp_path / "set", *PLAIN)
    assert not (tmp_path / "set").exists()


# ---------------------------------------------------------------- crop

def test_boxes_are_written_and_can_be_given_back(raw, tmp_path, capsys):
    argv = ["--raw", raw, "--annotation", raw / "labels.csv", "--depth_scale", 0.1, "--size", 64,
            "--num_workers", 0]
    prepare(*argv, "--data_folder", tmp_path / "a", "--crop", "box", 50, 20, 60, 80)
    lines = (tmp_path / "a" / "boxes.csv").read_text().splitlines()
    assert lines[1] == ("casme3,spNO.1,a,10,50.000,20.000,60.000,80.000,0.000,10.jpg,160,120")
    assert len(lines) == 12  # all but the blank clip without frames
    prepare(*argv, "--data_folder", tmp_path / "b", "--crop", "boxes", tmp_path / "a" / "boxes.csv")
    actual = [{k: v for k, v in digests(tmp_path / n).items()
              if k.endswith(".png") or k == "boxes.csv"} for n in "ab"]
    assert actual[0] == actual[1]
    (tmp_path / "few.csv").write_text("subject,x,y,width,height\nspNO.1,50,20,60,80\n")
    prepare(*argv, "--data_folder", tmp_path / "c", "--crop", "boxes", tmp_path / "few.csv")
    actual = manifest(tmp_path / "c")
    assert actual["counts"]["subjects"] == {"spNO1": 4, "spNO2": 1}  # the frameless blank one stays
    assert sum("no box in" in d["reason"] for d in actual["dropped"]) == 8
    line = refusal(capsys, *argv, "--data_folder", tmp_path / "d", "--crop", "boxes",
                   tmp_path / "few.csv", "--roll")
    assert "few.csv" in line and "roll" in line


def test_a_box_outside_the_frame_is_named(raw, tmp_path, capsys):
    """Frames of 160 x 120; a blank clip needs no frame, so it stays."""
    argv = ["--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            *PLAIN[2:], "--crop", "box"]
    for box in ((500, 20, 60, 80), (-4e8, -4e8, 8e8, 8e8)):
        prepare(*argv, *box)
        actual = manifest(tmp_path / "set")
        assert len(actual["clips"]) == sum(actual["counts"]["blank"].values()) == 3
        assert {d["reason"] for d in actual["dropped"]} >= {
            "the box is not within the frame of 160x120 pixels"}
    before = digests(tmp_path / "set")
    assert "no clip can be cut" in refusal(capsys, *argv, *box, "--blank_apex", "drop")
    assert digests(tmp_path / "set") == before  # of images that are what they were
    assert "finite" in refusal(capsys, *argv, "nan", 0, 10, 10)


def test_missing_detector_is_named(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    line = refusal(capsys, "--raw", raw, "--annotation", raw / "labels.csv", "--data_folder",
                   tmp_path / "set")
    assert "make faces" in line and not (tmp_path / "set").exists()


def test_detected_faces(raw, tmp_path, monkeypatch):
    """A stand-in for the detector sees no face on frame 10 of one video, so that frame 11 is
    tried, and none at all in another video."""
    still = raw_tree.frame("spNO.1a", 1.0)[0].astype(float)
    blind = raw_tree.frame("spNO.2a", 0.0)[0].astype(float)
    middle = np.s_[80:88, 76:84]  # a frame makes the mouth brighter by 4 levels

    def find_face(frame, roll):
        same = abs(frame - still)[:60].mean() < 3 and abs((frame - still)[middle].mean()) < 2
        if same or abs(frame - blind)[:60].mean() < 3:
            return None
        return detection.Box(40.0, 20.0, 70.0, 80.0, 5.0 if roll else 0.0)
    monkeypatch.setattr(detection, "find_face", find_face)
    monkeypatch.setattr(detection, "require", lambda: None)
    prepare("--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", tmp_path / "set",
            "--roll", *PLAIN[2:])
    lines = (tmp_path / "set" / "boxes.csv").read_text().splitlines()
    assert lines[1] == "casme3,spNO.1,a,10,40.000,20.000,70.000,80.000,5.000,11.jpg,160,120"
    assert lines[2] == "casme3,spNO.1,a,30,40.000,20.000,70.000,80.000,5.000,30.jpg,160,120"
    dropped = {d["clip"]: d["reason"] for d in manifest(tmp_path / "set")["dropped"]}
    assert dropped[KEPT[4]] == "no face found on the onset frame nor on the next 5"


# ---------------------------------------------------------------- bad input

def test_bad_input_is_named(raw, cut, tmp_path, capsys):
    target = ["--data_folder", tmp_path / "set", *PLAIN]
    labels = ["--annotation", raw / "labels.csv"]
    assert "no such folder" in refusal(capsys, "--raw", tmp_path / "none", *labels, *target)
    (tmp_path / "empty").mkdir()
    assert "no folder spNO.<i>" in refusal(capsys, "--raw", tmp_path / "empty", *labels, *target)
    (tmp_path / "bad.csv").write_text("Subject,Filename,Onset\n")
    assert "bad.csv:1: no column apex, offset" in refusal(
        capsys, "--raw", raw, "--annotation", tmp_path / "bad.csv", *target)
    assert "labels.csv" in refusal(capsys, "--raw", raw, "--annotation",
                                   tmp_path / "labels.csv", *target)
    (tmp_path / "boxes.csv").write_text("subject,x,y,width,height\nspNO.1,1,2,3,0\n")
    assert "boxes.csv:2" in refusal(
        capsys, "--raw", raw, *labels, *target[:2], "--crop", "boxes", tmp_path / "boxes.csv")
    (tmp_path / "others" / "v_rgb").mkdir(parents=True)
    (tmp_path / "boxes.csv").write_text("subject,x,y,width,height\n")
    assert "boxes.csv: no box" in refusal(
        capsys, "--raw", raw, *labels, *target[:2], "--crop", "boxes", tmp_path / "boxes.csv")
    assert "holds no v_rgb" in refusal(capsys, "--raw", raw, "--annotation", tmp_path / "empty",
                                       *target)
    assert "--au goes with" in refusal(capsys, "--raw", raw, *labels, *target, "--au", raw)
    assert "did not write" in refusal(capsys, "--raw", raw, *labels, *PLAIN, "--data_folder",
                                      tmp_path / "others")
    assert "same" not in refusal(capsys, "--raw", raw, "--annotation", cut, *PLAIN,
                                 "--data_folder", cut)
    assert "--blank_apex middle" in refusal(capsys, "--raw", raw, "--annotation", cut, *target,
                                            "--blank_apex", "middle")
    assert "--raw" in refusal(capsys, *labels, *target)
    assert "no clip can be cut" in refusal(capsys, "--raw", raw, "--max_gap", 1, "--blank_apex",
                                           "drop", *labels, *target)
    assert not (tmp_path / "set").exists()


# ---------------------------------------------------------------- training

def test_the_training_scripts_run_on_the_set(cut, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["images.transforms"], "CROP", 64)
    common = ["--data_folder", cut, "--model", "resnet18v1", "--cache", "off", "--batch_size", 4,
              "--epochs", 1, "--num_workers", 1]
    pretrain(*common, "--model_path", tmp_path / "runs")
    (last,) = (tmp_path / "runs").glob("memory_*/last.pth")
    heads = ["--model_path", last, "--save_path", tmp_path / "results"]
    probe(*common, *heads, "--layer", 5)
    finetune(*common, *heads, "--subject", "spNO1")
    counts = [json.loads(p.read_text())["n"] for p in (tmp_path / "results").glob("*/results.json")]
    assert sorted(counts) == [4, 12]
    assert record.read_log(last.parent)[-1]["epoch"] == 1
