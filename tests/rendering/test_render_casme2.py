"""The stand-in for CASME II as received: plan, frames, workbook, and what moves in the frames."""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import runs
from conftest import ROOT, script
from PIL import Image
from test_render import digest, table

from rendering import casme2, expression, outputs
from rendering.expression import Job

openpyxl = pytest.importorskip("openpyxl")

SIZE = (70, 85)
SMALL = ["--subjects", 3, "--clips", 10, "--size", *SIZE, "--workbook", "2019", "--amplitude", 3]


def render(*argv):
    return script("render").main(["casme2", *argv])


def refused(capsys, *argv):
    return runs.refused(capsys, render, *argv)


def planned(**changes):
    """Films that a command line would render, nothing being rendered."""
    opt = script("render").parse_option(["casme2", "--data_folder", "d"])
    return [film for part in casme2.plan_films(opt.changed(**changes), Path("d")) for film in part]


def workbook(folder, name="CASME2-coding-20190701.xlsx"):
    """Rows of the workbook as dicts column → cell."""
    header, *rows = openpyxl.load_workbook(folder / name).active.iter_rows(values_only=True)
    return [dict(zip(header, row)) for row in rows]


def frame(folder, row, number, prefix="reg_img"):
    return folder / f"sub{int(row['subject'][3:]):02d}" / row["filename"] / f"{prefix}{number}.jpg"


def difference(rows, folder, other):
    """Mean absolute difference between two folders' frames, over the face: onset, between, apex,
    between, offset, one row per clip."""
    actual = []
    for row in rows:
        onset, apex, offset = (int(row[name]) for name in ("onset", "apex", "offset"))
        numbers = onset, (onset + apex) // 2, apex, (apex + offset) // 2, offset
        actual.append([np.abs(np.subtract(*(np.asarray(Image.open(frame(place, row, n)), float)
                                            for place in (folder, other))))[12:76, 10:60].mean()
                       for n in numbers])
    return np.array(actual)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("casme2") / "set"
    render("--data_folder", folder, *SMALL, "--num_workers", 2)
    return folder


@pytest.mark.parametrize("year", ["2014", "2019"])
def test_both_workbooks_are_prepared_from(rendered, year, tmp_path):
    pytest.importorskip("cv2")
    folder, name = rendered, "CASME2-coding-20190701.xlsx"
    if year == "2014":
        folder, name = tmp_path / "raw", "CASME2-coding-20140508.xlsx"
        render("--data_folder", folder, *SMALL, "--workbook", year)
    script("prepare").main(["casme2", "--raw", folder, "--annotation", folder / name,
                            "--data_folder", tmp_path / "set", "--size", 32, "--register", "none",
                            "--num_workers", 0])
    rows = workbook(folder, name)
    columns = {key.lower().replace(" ", ""): key for key in rows[0]}

    def told(row, key):
        return str(row[columns[key]])
    kept = [row for row in rows if told(row, "estimatedemotion").lower() in casme2.CLASSES]
    clips = table(tmp_path / "set" / "clips.csv")
    assert Counter(clip["emotion"] for clip in clips) == Counter(
        told(row, "estimatedemotion").lower() for row in kept)
    content = json.loads((tmp_path / "set" / "flow.json").read_text())
    assert len(content["dropped"]) == len(rows) - len(kept)
    of_apex = {rule: keys for rule, keys in content["repairs"].items() if rule.startswith("apex")}
    assert [(rule.partition(":")[0], len(keys)) for rule, keys in sorted(of_apex.items())] == (
        [("apex equal to onset", 1), ("apex is no frame number", 1)] if year == "2019" else [])


@pytest.fixture(scope="module")
def resting(tmp_path_factory):
    """The same clips without expressions."""
    folder = tmp_path_factory.mktemp("resting") / "set"
    render("--data_folder", folder, *SMALL[:-2], "--no_expression")
    return folder


# ---------------------------------------------------------------- the plan

@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_set_has_the_official_counts(seed):
    films = planned(seed=seed)
    emotions = Counter(film.event.job.emotion for film in films)
    assert emotions == {"happiness": 32, "repression": 27, "disgust": 63, "surprise": 25,
                        "others": 99, "fear": 2, "sadness": 7}
    shown = {}
    for film in films:
        if film.event.job.emotion in casme2.CLASSES:
            shown.setdefault(film.event.job.subject, []).append(film.event.job.emotion)
    sizes = [len(kinds) for kinds in shown.values()]
    assert len(shown) == 26 and min(sizes) == 2 and max(sizes) == 34
    assert 2 <= sum(len(set(kinds)) == 1 for kinds in shown.values()) <= 6
    for kind in casme2.CLASSES:
        assert sum(kind in kinds for kinds in shown.values()) > 1
    assert len({(film.event.job.subject, film.name) for film in films}) == len(films)
    assert Counter(film.name for film in films).most_common(1)[0] == ("EP02_01f", 26)
    assert 1 <= sum(film.written == "?" for film in films) <= 10


@pytest.mark.parametrize("clips, subjects", [(10, 2), (10, 10), (40, 26), (60, 8), (500, 5)])
def test_smaller_sets_keep_the_proportions(clips, subjects):
    for seed in range(5):
        kinds = casme2.draw_classes(subjects, clips, seed)
        counts = Counter(kind for part in kinds for kind in part)
        assert len(kinds) == subjects and min(map(len, kinds)) >= 1
        for kind, official in zip(casme2.CLASSES, casme2.COUNTS):
            assert counts[kind] >= 2
            assert clips == 10 or abs(counts[kind] - clips * official / 246) < 1
        assert sum(counts.values()) == clips + (9 if clips >= 100 else 0)


def test_nothing_but_action_units_follows_from_the_class():
    films = planned(clips=2000)
    for film in films:
        event = film.event
        assert event.job.units in casme2.UNITS[event.job.emotion]
        assert 12 <= event.apex - event.onset <= 40 and 12 <= event.offset - event.apex <= 40
    length = {kind: np.mean([film.event.offset - film.event.onset for film in films
                             if film.event.job.emotion == kind]) for kind in casme2.CLASSES}
    assert np.ptp(list(length.values())) < 5
    units = {kind: set(casme2.UNITS[kind]) for kind in casme2.CLASSES}
    assert units["others"] & units["disgust"] == {"4", "4+7"}


def test_all_frames_that_sampling_can_ask_for_are_there():
    rng = np.random.default_rng(0)
    for _ in range(300):
        onset = int(rng.integers(1, 200))
        apex, offset = onset + np.cumsum(rng.integers(12, 41, 2))
        there = set(casme2.sampled(onset, int(apex), int(offset)))
        assert onset == min(there) and offset == max(there) and len(there) < 25
        for third in (apex, (onset + offset) // 2):
            for j in range(int(.15 * (third - onset) / 4) + 1):
                for k in range(int(.15 * (offset - third) / 4) + 1):
                    start, end = onset + j, offset - k
                    assert {start, (start + third) // 2, third, (third + end) // 2, end} <= there


def test_a_unit_of_one_side_moves_that_side_of_the_person():
    left, right = (expression.perform(Job("k", "sub01", "others", units=units)).sides()
                   for units in ("4+L12", "4+R12"))
    # the person's left is on the right of the picture, the second of two
    assert left[12][0] == 0 and left[12][1] > 0 and right[12] == left[12][::-1]
    assert min(left[4]) > 0


def test_the_course_rises_to_the_apex_and_falls_to_a_rest():
    event = casme2.Event(10, 30, 60, None, 0.2)
    levels = [event.level(frame) for frame in range(8, 62)]
    assert levels[:3] == [0, 0, 0] and levels[22] == 1 and levels[52] == pytest.approx(0.2)
    assert levels[53] == 0 and np.diff(levels[2:23]).min() > 0 and np.diff(levels[22:53]).max() < 0


# ---------------------------------------------------------------- what is written

def test_frames_workbook_and_truth_agree(rendered):
    rows, truth = workbook(rendered), table(rendered / "truth.csv")
    assert tuple(rows[0]) == ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame",
                              "Action Units", "Estimated Emotion")
    assert len(rows) == len(truth) == 10
    for row, shown in zip(rows, truth):
        assert shown["key"] == f"sub{row['Subject']:02d}-{row['Filename']}-{row['OnsetFrame']}"
        assert str(row["Action Units"]) in (shown["action_units"], "?")
        assert row["Estimated Emotion"] == shown["emotion"] == casme2.CLASSES[int(shown["label"])]
        numbers = casme2.sampled(*(int(shown[name]) for name in ("onset", "apex", "offset")))
        files = {path.name for path in frame(rendered, shown, 1).parent.iterdir()}
        assert files == {f"reg_img{n}.jpg" for n in numbers}
        with Image.open(frame(rendered, shown, numbers[0])) as picture:
            assert picture.size == SIZE and picture.mode == "RGB" and picture.format == "JPEG"
    assert len({row["subject"] for row in truth if row["filename"] == "EP02_01f"}) == 3


def test_the_workbook_of_2019_has_two_rows_without_an_apex(rendered):
    rows, truth = workbook(rendered), table(rendered / "truth.csv")
    odd = [row["ApexFrame"] for row, shown in zip(rows, truth)
           if str(row["ApexFrame"]) != shown["apex"]]
    onsets = [row["OnsetFrame"] for row in rows if row["ApexFrame"] == row["OnsetFrame"]]
    assert len(odd) == 2 and "/" in odd and len(onsets) == 1 and onsets[0] in odd


def test_motion_rises_from_onset_to_apex_and_falls(rendered, resting):
    """Head, light and noise are the same in both sets: what differs is the expression."""
    rows = [row for row in table(rendered / "truth.csv") if float(row["amplitude_px"]) > 1]
    actual = difference(rows, rendered, resting)
    assert len(rows) > 6 and not actual[:, 0].any()
    between, apex, later, offset = actual[:, 1:].T
    assert (apex > 1.3 * between).all() and (apex > 1.2 * later).all()
    assert (later > 1.1 * offset).all() and (offset < 0.5 * apex).all() and (offset > 0).all()


def test_without_expressions_labels_stay_and_faces_rest(rendered, resting, tmp_path):
    assert workbook(resting) == workbook(rendered)
    rows = table(resting / "truth.csv")
    assert all(float(row["amplitude_px"]) == float(row["unrelated_px"]) == 0 for row in rows)
    assert json.loads((resting / "rendered.json").read_text())["options"]["amplitude"] == 0
    # the same clip with units of another class: the same bytes, unless there are expressions
    for amplitude in (0.0, 3.0):
        files = []
        for units in ("1+2", "6+12"):
            job = Job("k", "sub01", "others", amplitude=amplitude, units=units)
            path = tmp_path / f"{units} {amplitude}" / "reg_img9.jpg"
            casme2.render_films([casme2.Film(casme2.Event(1, 9, 20, job), "k", units,
                                             ((9, str(path)),), SIZE)])
            files.append(path.read_bytes())
        assert (files[0] == files[1]) == (amplitude == 0)


def test_same_bytes_with_another_number_of_workers(rendered, tmp_path):
    render("--data_folder", tmp_path / "again", *SMALL, "--num_workers", 0)
    assert digest(tmp_path / "again") == digest(rendered)


def test_all_frames_are_rendered_on_request_and_the_sampled_ones_are_the_same(tmp_path):
    flags = ["--subjects", 2, "--clips", 5, "--size", 48, 48, "--workbook", "csv"]
    render("--data_folder", tmp_path / "all", *flags, "--all_frames", "--prefix", "img")
    render("--data_folder", tmp_path / "few", *flags)
    rows = table(tmp_path / "all" / "CASME2-coding-20140508.csv")
    assert rows == table(tmp_path / "few" / "CASME2-coding-20140508.csv") and len(rows) == 5
    assert {row["Estimated Emotion"] for row in rows} == set(casme2.CLASSES)
    for row in table(tmp_path / "few" / "truth.csv"):
        whole = frame(tmp_path / "all", row, 0).parent
        assert len(list(whole.iterdir())) == int(row["offset"]) - int(row["onset"]) + 1
        for path in frame(tmp_path / "few", row, 0).parent.iterdir():
            assert path.read_bytes() == (whole / path.name.removeprefix("reg_")).read_bytes()


def test_a_finished_folder_is_reused_or_refused(rendered, tmp_path, capsys):
    before = digest(rendered)
    render("--data_folder", rendered, *SMALL, "--preview", tmp_path / "sheet.png")
    assert "reused" in capsys.readouterr().out and digest(rendered) == before
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 5 * SIZE[0] and height > 5 * SIZE[1]
    record = json.loads((rendered / "rendered.json").read_text())
    assert record["note"] == "rendered stand-in data, not CASME II"
    assert record["counts"]["clips"] == 10 and record["options"]["amplitude"] == 3
    assert "seed 0 there, 1 asked for" in refused(capsys, "--data_folder", rendered, *SMALL,
                                                  "--seed", 1)


def test_bad_input_is_answered_in_one_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for flags, words in ((["--clips", 4], "--clips"), (["--clips", 20], "26 clips or more"),
                         (["--size", 20, 20], "--size"), (["--workbook", "2020"], "--workbook"),
                         (["--amplitude", 2, "--no_expression"], "not allowed with")):
        assert words in refused(capsys, "--data_folder", out, *flags)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "takes openpyxl" in refused(capsys, "--data_folder", out)
    assert not list(tmp_path.iterdir())


def test_a_stopped_rendering_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(casme2, "shade", stop)
    with pytest.raises(KeyboardInterrupt):
        render("--data_folder", tmp_path / "out", *SMALL, "--num_workers", 0)
    assert not list(tmp_path.iterdir())


def test_the_workbook_has_the_same_bytes_at_another_time(tmp_path):
    code = ("import sys, pathlib; from rendering import outputs\n"
            "outputs.write_workbook(pathlib.Path(sys.argv[1]), ['a', 'b'], [[1, '4+R12']])")
    outputs.write_workbook(tmp_path / "here.xlsx", ["a", "b"], [[1, "4+R12"]])
    subprocess.run([sys.executable, "-c", code, tmp_path / "there.xlsx"], cwd=ROOT, check=True,
                   env={**os.environ, "TZ": "Asia/Tokyo"})
    assert (tmp_path / "here.xlsx").read_bytes() == (tmp_path / "there.xlsx").read_bytes()
    assert workbook(tmp_path, "here.xlsx") == [{"a": 1, "b": "4+R12"}]
