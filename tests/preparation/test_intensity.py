"""Onset/apex pairs from action-unit intensities: every rule, on curves that are known."""
import csv
import itertools
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import raw_tree
import runs
import torch
from conftest import draw_pairs, draw_set, pretrain, script

import dataset
from images.lists import write_lists
from preparation import annotation, audit, frames, intensity, registration

UNITS = (1, 4, 12, 25, 45)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of a small run's time, and are tried elsewhere."""
    monkeypatch.setattr(audit, "draw_all", lambda *args: None)


def prepare(*argv):
    return script("prepare").main(["casme3", *argv])


def curves(n, **rises):
    """Intensities `[n, 5]` of UNITS; rises: AU12=[(from, to, size), …], row numbers."""
    values = np.zeros((n, len(UNITS)))
    for unit, steps in rises.items():
        for first, last, size in steps:
            ramp = np.clip((np.arange(n) - first) / (last - first), 0, 1) * size
            ramp[min(last + 6, n):] = 0  # falls again
            values[:, UNITS.index(int(unit[2:]))] += ramp
    return values


def write_openface(path, values, confidence=None, rotation=None, frames=None, success=None):
    """An OpenFace CSV, with its spaces in the header. values: `[n, 5]`."""
    n = len(values)
    confidence = np.full(n, 0.98) if confidence is None else confidence
    rotation = np.zeros(n) if rotation is None else rotation
    success = np.ones(n, int) if success is None else success
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        names = ["frame", "face_id", "timestamp", "confidence", "success", "pose_Rx", "pose_Ry",
                 "pose_Rz", *(f"AU{u:02d}_r" for u in UNITS), "AU12_c"]
        writer.writerow([names[0], *(f" {name}" for name in names[1:])])
        for i in range(n):
            number = i + 1 if frames is None else frames[i]
            writer.writerow([number, 0, i / 30, confidence[i], success[i], 0, rotation[i], 0,
                             *values[i], 1])
    return path


def options(**changed):
    values = {"au_index": "numeric", "aus": None, "window": 15, "floor": 0.5,
              "min_confidence": 0.8, "max_rotation": 1.0}
    return SimpleNamespace(**{**values, **changed})


def rises(path, numbers, usable=None, **changed):
    """`intensity.rises` for frames of these numbers."""
    numbers = np.asarray(numbers)
    rgb = {int(n): f"video/{n}.jpg" for n in numbers}
    usable = np.ones(len(numbers), bool) if usable is None else usable
    return intensity.rises(path, rgb, numbers, usable, options(**changed))


def test_largest_rise_within_the_window(tmp_path):
    path = write_openface(tmp_path / "a.csv", curves(
        100, AU12=[(20, 30, 3.0)], AU04=[(60, 64, 1.2)], AU01=[(60, 64, 0.9)]))
    actual = rises(path, range(1, 101))
    assert [f[3] for f in actual] == ["AU12", "AU04"]
    assert [f[2] for f in actual] == pytest.approx([3.0, 1.2])
    onset, apex = actual[0][:2]
    # a five-frame median keeps a ramp's inside and rounds off its ends; frame = row + 1
    assert onset <= 21 and apex >= 31 and apex - onset <= 15
    narrow = rises(path, range(1, 101), window=5)
    assert max(f[2] for f in narrow) == pytest.approx(1.5)
    assert [f[3] for f in rises(path, range(1, 101), floor=2.0)] == ["AU12"]


def test_a_fall_is_no_rise(tmp_path):
    values = np.zeros((60, 5))
    values[:, 2] = np.linspace(4, 0, 60)
    assert rises(write_openface(tmp_path / "a.csv", values), range(60), floor=0.0) == []


def test_a_single_wild_frame_is_no_rise(tmp_path):
    values = np.zeros((60, 5))
    values[[20, 40, 41], 2] = 5
    assert rises(write_openface(tmp_path / "a.csv", values), range(60)) == []


def test_blinks_do_not_count_unless_asked_for(tmp_path):
    path = write_openface(tmp_path / "a.csv", curves(60, AU45=[(20, 24, 4.0)]))
    assert rises(path, range(60)) == []
    assert [f[3] for f in rises(path, range(60), aus=[45, 12])] == ["AU45"]


@pytest.mark.parametrize("what", ["confidence", "success", "rotation", "missing", "labelled"])
def test_windows_do_not_reach_across_frames_that_do_not_count(tmp_path, what):
    values, numbers = curves(60, AU12=[(20, 30, 3.0)]), np.arange(1, 61)
    confidence, rotation, usable = np.full(60, 0.98), np.zeros(60), np.ones(60, bool)
    success = np.ones(60, int)
    if what == "confidence":
        confidence[25] = 0.5
    elif what == "success":
        success[25] = 0
    elif what == "rotation":
        rotation[25:] = np.radians(1.5)
    elif what == "missing":
        numbers[25:] += 1
    else:
        usable[25] = False
    path = write_openface(tmp_path / "a.csv", values, confidence, rotation, success=success)
    actual = rises(path, numbers, usable)
    assert actual and all(f[2] < 2.0 for f in actual)  # the halves of a rise of 3
    assert all(f[1] <= numbers[25] or f[0] >= numbers[25] for f in actual)
    whole = rises(write_openface(tmp_path / "b.csv", values), range(1, 61))
    assert [f[2] for f in whole] == pytest.approx([3.0])


def test_windows_do_not_overlap(tmp_path):
    rng = np.random.default_rng(0)
    values = np.abs(np.cumsum(rng.normal(0, 0.4, (400, 5)), 0)) % 5
    actual = rises(write_openface(tmp_path / "a.csv", values), range(400))
    assert len(actual) > 15
    assert all(a[1] < b[0] for a, b in itertools.pairwise(actual))
    assert all(0 < f[1] - f[0] <= 15 and f[2] >= 0.5 for f in actual)


def test_rows_in_the_order_of_names_as_strings(tmp_path):
    """OpenFace reads 1 10 100 101 … 11 110 … : the same curve, its rows shuffled that way."""
    values, numbers = curves(130, AU12=[(60, 70, 3.0)]), list(range(1, 131))
    order = sorted(range(130), key=lambda i: f"{numbers[i]}.jpg")
    shuffled = write_openface(tmp_path / "a.csv", values[order])
    plain = write_openface(tmp_path / "b.csv", values)
    named = write_openface(tmp_path / "c.csv", values[order], frames=[numbers[i] for i in order])
    right = rises(plain, numbers, au_index="numeric")
    assert [f[2] for f in right] == pytest.approx([3.0])
    assert rises(shuffled, numbers, au_index="string-sorted") == right
    assert rises(named, numbers, au_index="name") == right
    assert rises(shuffled, numbers, au_index="numeric") != right
    with pytest.raises(ValueError, match="frame column"):
        rises(plain, range(2, 132), au_index="name")


def test_a_differing_number_of_rows_stops_the_video(tmp_path):
    path = write_openface(tmp_path / "a.csv", curves(50, AU12=[(20, 30, 3.0)]))
    with pytest.raises(ValueError, match="50 rows of action units for 51 frames"):
        rises(path, range(51))


# ---------------------------------------------------------------- the whole way

@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of two subjects, one of them with rows missing, an annotation of two clips."""
    root = tmp_path_factory.mktemp("videos")
    for subject, video in (("spNO.1", "a"), ("spNO.1", "b"), ("spNO.2", "a")):
        raw_tree.write_video(root / "raw", subject, video, range(1, 81),
                             lambda n: 0.08 * max(0, min(n - 20, 10)), size=(80, 60))
    write_openface(root / "au" / "spNO.1_a.csv",
                   curves(80, AU12=[(19, 29, 3.0)], AU25=[(50, 58, 2.0)]), frames=range(1, 81))
    write_openface(root / "au" / "spno1" / "b" / "color.csv", curves(79, AU12=[(20, 30, 3.0)]))
    write_openface(root / "au" / "spNO.2" / "a.csv", curves(80, AU04=[(19, 29, 1.0)]))
    raw_tree.write_csv(root / "labels.csv", [("spNO.1", "a", 55, 60, 64, "25", "others"),
                                             ("spNO.2", "a", 40, 45, 50, "4", "anger")])
    return root


def read_rows(folder):
    with open(folder / "pairs.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


FLAGS = ("--crop", "none", "--depth_scale", 0.1, "--size", 64, "--num_workers", 0)


def test_pairs_of_unlabelled_videos(videos, tmp_path, capsys):
    prepare("--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--data_folder", tmp_path / "set", *FLAGS)
    rows = read_rows(tmp_path / "set")
    assert [(r["subject"], r["video"], r["unit"], r["intensity"]) for r in rows] == [
        ("spNO1", "a", "AU12", "3.000"), ("spNO1", "a", "AU25", "2.000"),
        ("spNO2", "a", "AU04", "1.000")]
    out = capsys.readouterr().out
    assert "3 pairs, 1 of them by the speech units" in out
    assert "  repaired " not in out and "  dropped " not in out
    assert "left out spNO.1-b: 79 rows of action units for 80 frames" in out
    assert dataset.read_pairs(tmp_path / "set" / "pairs.tsv", tmp_path / "set",
                              min_intensity=1.5).people == [(0, "spNO1")]
    actual = json.loads((tmp_path / "set" / "manifest.json").read_text())["unlabelled"]
    assert actual["per_unit"] == {"AU04": 1, "AU12": 1, "AU25": 1} and actual["pairs"] == 3


def test_pairs_of_a_video_without_a_box_are_named_and_left_out(videos, tmp_path, capsys):
    (tmp_path / "boxes.csv").write_text("subject,x,y,width,height\nspNO.1,10,5,60,50\n")
    prepare("--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--data_folder", tmp_path / "set", *FLAGS, "--crop", "boxes", tmp_path / "boxes.csv")
    assert {row["subject"] for row in read_rows(tmp_path / "set")} == {"spNO1"}
    assert "dropped      1  no box in" in capsys.readouterr().out
    counts = json.loads((tmp_path / "set" / "manifest.json").read_text())["counts"]
    assert counts["annotated"] == counts["clips"] == counts["dropped"] == 0  # they are no clips


def test_what_befalls_unlabelled_pairs_is_reported_too(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registration, "register", lambda *args: (np.eye(2, 3), False))
    prepare("--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--data_folder", tmp_path / "set", *FLAGS)
    assert "  repaired     3  registration did not converge: left as it was" in \
        capsys.readouterr().out


def test_a_person_is_named_alike_in_clips_and_in_pairs(videos, tmp_path, capsys):
    (tmp_path / "clips.csv").write_text(
        "database,subject,clip,onset,apex,label\ncasme3,1,c,spNO.1/a/color/3.jpg,"
        "spNO.1/a/color/9.jpg,happy\ncasme3,2,c,spNO.2/a/color/3.jpg,spNO.2/a/color/9.jpg,anger\n")
    with pytest.raises(SystemExit):
        prepare("--raw", videos / "raw", "--clips", tmp_path / "clips.csv", "--unlabelled",
                videos / "raw", "--intensity", "difference", "--data_folder", tmp_path / "set",
                *FLAGS)
    assert "subjects '1' and 'spNO.1' of casme3 differ in what stands before" in \
        capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("flag", [("--tolerance", 5), ("--blank_apex", "drop"), ("--raw", ".")])
def test_flags_of_clips_do_nothing_for_pairs_and_are_refused(videos, tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        prepare("--unlabelled", videos / "raw", "--intensity", "difference", "--data_folder",
                tmp_path / "set", *flag, *FLAGS)
    assert f"{flag[0]} goes with --annotation" in capsys.readouterr().err


def test_a_change_that_is_the_heads_is_no_intensity(videos, tmp_path, capsys, monkeypatch):
    register, count = registration.register, []

    def once(*given):
        count.append(1)
        return (np.eye(2, 3), False) if len(count) == 1 else register(*given)
    flags = ["--unlabelled", videos / "raw", "--intensity", "difference", *FLAGS]
    prepare(*flags, "--data_folder", tmp_path / "all")
    monkeypatch.setattr(registration, "register", once)
    prepare(*flags, "--data_folder", tmp_path / "set")
    assert "  dropped      1  registration did not converge" in capsys.readouterr().out
    names = [{row["rgb"] for row in read_rows(tmp_path / name)} for name in ("all", "set")]
    assert names[1] < names[0] and len(names[0] - names[1]) == 1


def test_a_video_is_listed_once_for_all_its_clips(videos, monkeypatch):
    tree, listed, scandir = frames.Tree(videos / "raw"), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    whole = tree.frames("spNO.1", "b")
    count = len(listed)
    assert count and all(tree.frames("spNO.1", "b", onset) == whole for onset in range(9))
    assert len(listed) == count


def test_spans_of_lists_which_name_no_offset_reach_past_the_apex():
    row = annotation.Row(0, "spNO.1", "a", 10, 14, None, "", "happy", "k")
    table = annotation.Table([], {})
    table.annotated = (row, replace(row, onset=40, apex=60), replace(row, onset=80, offset=82))
    assert intensity.labelled_spans(table) == {(1, "a"): [(10, 25), (40, 60), (80, 82)]}


def test_the_units_that_count_are_chosen(videos, tmp_path, capsys):
    argv = ["--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--data_folder", tmp_path / "set", *FLAGS, "--aus"]
    for units, expected in (((4, 25), ["AU25", "AU04"]), ((12,), ["AU12"])):
        prepare(*argv, *units)
        assert [row["unit"] for row in read_rows(tmp_path / "set")] == expected
    with pytest.raises(SystemExit) as stop:
        prepare(*argv, 12, 99)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "spNO.1_a.csv: no column AU99_r; it holds the units 1 4 12 25 45" in line


def test_windows_over_labelled_clips_are_left_out(videos, tmp_path):
    prepare("--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--raw", videos / "raw", "--annotation", videos / "labels.csv",
            "--classes", 7, "--data_folder", tmp_path / "set", *FLAGS)
    rows = read_rows(tmp_path / "set")
    spans = [(int(r["onset"]), int(r["apex"])) for r in rows if r["subject"] == "spNO1"]
    assert len(spans) >= 2 and all(apex < 55 or onset > 64 for onset, apex in spans)
    assert len(dataset.read_clips(tmp_path / "set", tmp_path / "set").clips) == 2


def test_a_package_of_clips_has_no_whole_videos(tmp_path, capsys):
    (tmp_path / "package" / "frame" / "spNO.1_a_3" / "color").mkdir(parents=True)
    assert "no whole video" in runs.refused(
        capsys, prepare, "--unlabelled", tmp_path / "package", "--intensity", "difference",
        "--data_folder", tmp_path / "set", "--crop", "none")


def test_pairs_without_action_units(videos, tmp_path):
    """Windows side by side, ranked by the change that is measured."""
    prepare("--unlabelled", videos / "raw", "--intensity", "difference", "--data_folder",
            tmp_path / "set", *FLAGS)
    rows = [r for r in read_rows(tmp_path / "set") if (r["subject"], r["video"]) == ("spNO1", "b")]
    assert [(r["onset"], r["apex"]) for r in rows] == [("1", "16"), ("17", "32"), ("33", "48"),
                                                      ("49", "64"), ("65", "80")]
    strength = [float(r["intensity"]) for r in rows]
    assert strength[1] > 3 * max(strength[0], *strength[2:])
    assert {r["unit"] for r in rows} == {"levels"}


def test_pre_training_takes_the_pairs(videos, tmp_path, monkeypatch):
    prepare("--unlabelled", videos / "raw", "--au", videos / "au", "--au_index", "numeric",
            "--data_folder", tmp_path / "set", *FLAGS)
    script("pre-train_DVSCL")
    monkeypatch.setattr(sys.modules["images.transforms"], "CROP", 64)
    pretrain("--data_folder", tmp_path / "set", "--pairs", tmp_path / "set" / "pairs.tsv", "--pool",
             "unlabelled", "--min_intensity", 0.9, "--model", "resnet18v1", "--cache", "off",
             "--batch_size", 3, "--epochs", 1, "--model_path", tmp_path / "runs")
    assert len(list((tmp_path / "runs").glob("memory_*/last.pth"))) == 1


def test_bad_action_unit_files_are_named(videos, tmp_path, capsys):
    def refusal(*argv):
        with pytest.raises(SystemExit) as stop:
            prepare("--unlabelled", videos / "raw", "--data_folder", tmp_path / "set", *FLAGS,
                    *argv)
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]
    assert "--au DIR" in refusal()
    (tmp_path / "none").mkdir()
    assert "no CSV file named after subject and video" in refusal("--au", tmp_path / "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "spNO.1_a.csv").write_text("frame, confidence\n1, 2\n")
    assert "spNO.1_a.csv: no success" in refusal("--au", tmp_path / "bad")
    assert "no pair in 3 videos" in refusal("--au", videos / "au", "--floor", 4.5)
    assert not (tmp_path / "set").exists()


def test_a_table_without_rows_stops_its_video_alone(tmp_path):
    path = tmp_path / "spNO.1_a.csv"
    path.write_text("frame, confidence, success, pose_Rx, pose_Ry, pose_Rz, AU01_r\n")
    columns = intensity.read_openface(path)
    with pytest.raises(ValueError, match="0 rows of action units for 3 frames"):
        intensity.rows_of(columns, {}, np.arange(3), "numeric")


def test_what_the_search_gives_itself_is_not_taken_from_the_command(capsys):
    with pytest.raises(SystemExit):
        script("benchmarks.sweep_intensity").parse_option([
            "--data_folder", "d", "--pairs", "p", "--save_path", "s", "--thresholds", "1",
            "--without", "s1", "--min_intensity", "1"])
    assert "--min_intensity is what the search itself gives" in capsys.readouterr().err


def test_hidden_files_are_no_action_units(tmp_path):
    for name in ("spNO.1_a.csv", "._spNO.1_a.csv"):
        (tmp_path / name).touch()
    assert intensity.find_csv(tmp_path) == {(1, "a"): tmp_path / "spNO.1_a.csv"}


def test_help_says_that_the_threshold_is_not_known(capsys):
    with pytest.raises(SystemExit):
        prepare("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "The paper's own intensity threshold is not public knowledge here" in text


@pytest.mark.parametrize("old, new, words", [
    ("intensity", "strength", ":1: no column 'intensity'"),
    ("\t3\tAU", "\tx\tAU", ":5: intensity 'x' is not a number"),
    ("casme3\ts2", "casme9\ts2", ":3: database 'casme9'"),
    ("casme3\ts2", "casme3\t", "names no subjects")])
def test_bad_pairs_stop_the_sweep(tmp_path, capsys, old, new, words):
    draw_set(tmp_path)
    text = draw_pairs(tmp_path).read_text()
    assert old in text
    (tmp_path / "pairs.tsv").write_text(text.replace(old, new, 1))
    with pytest.raises(SystemExit) as stop:
        script("benchmarks.sweep_intensity").main([
            "--data_folder", tmp_path, "--save_path", tmp_path / "out", "--pairs",
            tmp_path / "pairs.tsv"])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_pairs_are_counted_whatever_the_spelling_of_a_name(tmp_path):
    sweep = script("benchmarks.sweep_intensity")
    draw_set(tmp_path)
    path = draw_pairs(tmp_path)  # intensities 0 to 5, of s1 to s4 in turn
    path.write_text(path.read_text().replace("casme3\ts2", "casme3\tS.2"))
    opt, more, shared = sweep.parse_option([
        "--data_folder", str(tmp_path), "--save_path", "s", "--pairs", str(path), "--view",
        "RGB_D", "--encoding", "signed", "--epochs", "1"])
    assert more == ["--epochs", "1"] and {"--view=RGB_D", "--encoding=signed"} <= {*shared}
    assert sweep.shown(opt, 1, [(0, "s2")]) == [(0, "s1"), (0, "s3"), (0, "s4")]


def test_the_sweep_takes_one_database(tmp_path, capsys):
    clips = draw_set(tmp_path)
    write_lists(tmp_path, [replace(clip, database=int(clip.subject == "s4")) for clip in clips])
    with pytest.raises(SystemExit):
        script("benchmarks.sweep_intensity").main([
            "--data_folder", tmp_path, "--save_path", tmp_path / "out", "--pairs",
            draw_pairs(tmp_path)])
    assert "lists of several databases" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.pictures
def test_sweep_over_thresholds(tmp_path, monkeypatch, capsys):
    """Pairs of intensity 0 to 11, dealt out to s1 to s4; s4 is held out altogether."""
    drawn = tmp_path / "data"
    draw_set(drawn, subjects=5)
    draw_pairs(drawn, 12)
    script("pre-train_DVSCL")
    monkeypatch.setattr(sys.modules["images.transforms"], "CROP", 64)
    argv = ["--data_folder", drawn, "--pairs", drawn / "pairs.tsv", "--without", "s4",
            "--thresholds", 0, 2, 11, "--inner_folds", 2, "--model", "resnet18v1", "--epochs", 1,
            "--batch_size", 4, "--save_path", tmp_path / "sweep"]
    script("benchmarks.sweep_intensity").main(argv)
    with open(tmp_path / "sweep" / "threshold.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # without those of s4: 9 from 0 on, 7 from 2 on, none from 11 on
    assert [(r["threshold"], r["pairs"]) for r in rows] == [("0", "9"), ("2", "7")]
    assert all(0 <= float(r["uf1"]) <= 1 for r in rows)
    assert (tmp_path / "sweep" / "threshold.png").stat().st_size > 5000
    assert "threshold 11: 0 pairs, too few" in capsys.readouterr().out
    runs = list((tmp_path / "sweep").glob("threshold_*/*/runs/batch_*/last.pth"))
    assert len(runs) == 4
    script("benchmarks.sweep_intensity").main(
        [*argv[:-2], "--thresholds", 0, "--seed", 1, *argv[-2:]])
    assert len(list((tmp_path / "sweep").glob("threshold_*/*/runs/batch_*/last.pth"))) == 6
    for run in runs:
        state = torch.load(run, weights_only=True)
        seen = {name for _, name in state["seen"]["people"]}
        tested = run.parents[2] / "results"
        (table,) = tested.glob("*_seed_0*/*/*/predictions.csv")
        with open(table, newline="") as file:
            held_out = {row["subject"] for row in csv.DictReader(file)}
        assert held_out and "s4" not in seen | held_out and not seen & held_out
