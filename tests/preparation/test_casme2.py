"""prepare.py casme2: both workbooks, frames, flow once, irregularities by rule, bad input."""
import csv
import json
import shutil
from pathlib import Path

import casme2_tree
import cv2
import numpy as np
import pytest
import runs
from conftest import script
from PIL import Image

import dataset
from images import flow
from images import videos as sampling
from preparation import casme2, cutting, detection, videos
from util import BadInput, read_table

FLAGS = ["--size", 32, "--num_workers", 0, "--register", "none"]
FILES = ("frames.npy", "flow.npy", "jitter.npy", "index.npy", "clips.csv", "onset_apex.csv")


def prepare(*argv):
    return script("prepare").main(["casme2", *argv])


def refused(capsys, *argv):
    return runs.refused(capsys, prepare, *argv)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return casme2_tree.write(tmp_path_factory.mktemp("casme2"))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    prepare("--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", folder, *FLAGS)
    return folder


def info(folder):
    return json.loads((folder / "flow.json").read_text())


def test_five_frames_by_hand():
    assert sampling.five_frames(46, 59, 86) == (46, 52, 59, 72, 86)
    assert sampling.five_frames(46, 59, 86, published=True) == (46, 56, 66, 76, 86)
    assert sampling.five_frames(46, 59, 86, jitter=(2, 3)) == (48, 53, 59, 71, 83)


def test_jitter_goes_as_far_as_published_and_no_further():
    # int(.15 * 80 / 4) = 3 frames after the onset, int(.15 * 30 / 4) = 1 before the offset
    variants = sampling.jittered(0, 80, 110, False, 3, "previous")
    assert variants[0] == (0, 40, 80, 95, 110) and len(variants) == len(set(variants)) == 8
    assert {v[0] for v in variants} == {0, 1, 2, 3} and {v[4] for v in variants} == {110, 109}
    assert {v[0] for v in sampling.jittered(0, 80, 110, False, 1, "previous")} == {0, 3}
    assert sampling.jittered(0, 10, 20, False, 3, "previous") == [(0, 5, 10, 15, 20)]
    assert len(sampling.jittered(0, 80, 110, False, 3, "onset")) == 4


def test_shapes_counts_and_order(prepared):
    rows = [row for _, row in read_table(prepared / "clips.csv", fix="")[0]]
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows) and len(rows) == 7
    assert [row["label"] for row in rows] == ["0", "2", "3", "4", "1", "4", "0"]
    arrays = {name: np.load(prepared / f"{name}.npy") for name in ("frames", "flow", "index")}
    assert arrays["frames"].shape == (7, 5, 3, 32, 32) and arrays["frames"].dtype == np.uint8
    assert arrays["flow"].shape == (7, 4, 2, 32, 32) and arrays["flow"].dtype == np.float16
    assert (arrays["index"][:, 0] == np.arange(28).reshape(7, 4)).all()
    assert info(prepared)["flow"]["opencv"] == flow.cv2.__version__


def test_flow_goes_where_the_clip_does_and_back(prepared):
    rows = [row for _, row in read_table(prepared / "clips.csv", fix="")[0]]
    field = np.load(prepared / "flow.npy").astype(float)[..., 12:20, 12:20].mean((-2, -1))
    for row, steps in zip(rows, field):
        along = steps @ np.array(casme2_tree.SIGN[row["emotion"]])
        assert along[0] > 0.1 and along[1] > 0.1 and along[2] < -0.1 and along[3] < -0.1, row


def test_rows_of_the_index_are_the_flow_of_their_frames(raw, prepared):
    """A jittered variant's steps are what the flow between its frames gives."""
    steps = np.concatenate([np.load(prepared / "flow.npy").reshape(-1, 2, 32, 32),
                            np.load(prepared / "jitter.npy")])
    index = np.load(prepared / "index.npy")
    variants = sampling.jittered(10, 40, 90, False, 3, "previous")  # sub02 EP02_01f, the third clip
    assert len(variants) > 2
    place = raw / "Cropped" / "sub02" / "EP02_01f"
    settings = videos.Settings(size=32, register="none")
    for frames, rows in zip(variants, index[2]):
        files = tuple(str(place / f"reg_img{n}.jpg") for n in frames)
        crops, *_ = videos.cut_frames(videos.Task("k", files, (), (), (), frames), settings)
        expected = flow.flow_steps(np.stack([flow.grey(crop) for crop in crops]))
        assert abs(steps[rows] - expected).max() < 2e-3  # half precision


def test_any_number_of_workers_and_a_second_run_give_the_same(raw, prepared, tmp_path):
    flags = ["--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS]
    for workers in (2, 0):
        prepare(*flags, "--num_workers", workers)
        for name in FILES:
            assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes(), name
        assert not list(tmp_path.glob(".prepare*"))


def test_a_run_that_was_stopped_goes_on_from_the_clips_it_has(raw, prepared, tmp_path,
                                                              monkeypatch):
    flags = ["--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS]
    between, calls = flow.flow_between, []

    def counted(*args):
        calls.append(args)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return between(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flow, "flow_between", counted)
        prepare(*flags)
    assert not (tmp_path / "flow.json").exists() and len(list(tmp_path.rglob("*.npz"))) >= 2
    monkeypatch.setattr(flow, "flow_between", counted)
    prepare(*flags)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes(), name
    steps = len(np.load(tmp_path / "jitter.npy")) + 28
    assert len(calls) < 15 + steps - 4  # finished clips were not computed again


@pytest.mark.parametrize("workbook", ["xlsx", "csv"])
def test_irregularities_are_counted_by_rule(workbook, tmp_path, capsys):
    clips = [*casme2_tree.CLIPS, (5, "EP12_01f", 3, "/", 43, "12", "happiness"),
             (5, "EP09_05f", 3, 3, 43, "1", "Surprise"), (5, "EP10_01", 3, 60, 43, "", "others"),
             (5, "EP11_01", 9, 9, 9, "4", "disgust")]
    for name in ("EP12_01f", "EP09_05f", "EP10_01"):
        rows = [clip for clip in clips if clip[1] == name]
        casme2_tree.write(tmp_path / name, [(5, name, 3, 23, 43, "12", rows[0][6].lower())])
    casme2_tree.write(tmp_path / "raw", workbook=workbook)
    for name in ("EP12_01f", "EP09_05f", "EP10_01"):
        shutil.copytree(tmp_path / name / "Cropped" / "sub05" / name,
                        tmp_path / "raw" / "Cropped" / "sub05" / name)
    (tmp_path / "raw" / "Cropped" / "sub04" / "EP05_01" / "reg_img27.jpg").unlink()
    (tmp_path / "raw" / f"coding.{workbook}").unlink()
    casme2_tree.write(tmp_path / "table", [], workbook=workbook)
    casme2_tree.write_table(tmp_path / "raw" / f"coding.{workbook}", clips)
    prepare("--raw", tmp_path / "raw", "--annotation", tmp_path / "raw" / f"coding.{workbook}",
            "--data_folder", tmp_path / "set", *FLAGS)
    said, content = capsys.readouterr().out, info(tmp_path / "set")
    assert content["repairs"] == {
        "apex is no frame number: the middle of onset and offset": ["sub05-EP12_01f-3"],
        "apex equal to onset: the middle of onset and offset": ["sub05-EP09_05f-3"],
        "apex outside onset to offset: the middle of onset and offset": ["sub05-EP10_01-3"],
        "missing frame: the nearest existing one": ["sub04-EP05_01-7"],
        "file name of several subjects: told apart by them": ["sub01-EP02_01f-46",
                                                              "sub02-EP02_01f-10"]}
    assert [d["clip"] for d in content["dropped"]] == ["sub03-EP09_01-3", "sub05-EP11_01-9"]
    assert "12 clips annotated, 10 prepared, 2 dropped, 5 subjects; published: 26" in said
    assert "happiness          3      32      32" in said
    assert "all               10     246     249" in said
    prepare("--raw", tmp_path / "raw", "--annotation", tmp_path / "raw" / f"coding.{workbook}",
            "--data_folder", tmp_path / "set", *FLAGS, "--bad_apex", "drop")
    assert len(np.load(tmp_path / "set" / "flow.npy")) == 7


@pytest.mark.parametrize("offset, apex", [(11, 11), (12, 11), (20, 15)])
def test_an_apex_that_is_repaired_is_no_onset(offset, apex):
    table = casme2.Table([], {}, ("others",))
    casme2.add_clip(table, casme2.Entry("row 2", "casme2", "sub01", "EP1", "10", "/", str(offset),
                                        "others", ""), set(), "middle")
    assert [row.apex for row in table.rows] == [apex]


def test_other_sets_by_a_table_of_clips(raw, prepared, tmp_path):
    lines = ["database,subject,clip,folder,onset,apex,offset,label,units"]
    lines += [f"smic,s{s},{name},Cropped/sub{s:02d}/{name},{a},{b},{c},{emotion},{units}"
              for s, name, a, b, c, units, emotion in casme2_tree.CLIPS]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    prepare("--raw", raw, "--clips", tmp_path / "clips.csv", "--data_folder", tmp_path / "set",
            *FLAGS)
    assert info(tmp_path / "set")["classes"] == ["disgust", "fear", "happiness", "others",
                                                 "repression", "surprise"]
    assert len(np.load(tmp_path / "set" / "flow.npy")) == 8
    assert info(tmp_path / "set")["repairs"] == {
        "action unit '?' is none: left out": ["s3-EP09_01-3"]}
    rows = [row for _, row in read_table(tmp_path / "set" / "clips.csv", fix="")[0]]
    assert {row["database"] for row in rows} == {"smic"} and rows[0]["subject"] == "s1"


@pytest.mark.parametrize("flags, other", [
    (["--reference", "onset"], True), (["--flow", "farneback"], True),
    (["--middle", "published"], True), (["--jitters", 0], False)])
def test_flags_change_what_they_say(raw, prepared, tmp_path, flags, other):
    prepare("--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS,
            *flags)
    same = np.array_equal(np.load(tmp_path / "flow.npy"), np.load(prepared / "flow.npy"))
    assert same != other
    if "--jitters" in flags:
        assert len(np.load(tmp_path / "jitter.npy")) == 0
        assert np.load(tmp_path / "index.npy").shape == (7, 1, 4)


def test_the_same_clips_as_difference_images(raw, prepared, tmp_path):
    script("prepare").main(["casme3", "--raw", raw, "--clips", prepared / "onset_apex.csv",
                            "--data_folder", tmp_path, "--crop", "none", "--size", 64,
                            "--classes", 7, "--num_workers", 0])
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["counts"]["clips"] == 7 and content["counts"]["classes"]["happiness"] == 2
    assert len(list(tmp_path.rglob("*_diff.png"))) == 7
    # by the keys of clips.csv, which results are compared by
    keys = {row["key"] for _, row in read_table(prepared / "clips.csv", fix="")[0]}
    clips = dataset.read_clips(tmp_path, view="RGB_gray").clips
    assert {clip.key for clip in clips} == keys and "sub01-EP02_01f-46" in keys
    assert {clip.subject for clip in clips} == {f"sub{i:02d}" for i in range(1, 5)}


def table_of_clips(path, rows):
    path.write_text("\n".join(["database,subject,clip,folder,onset,apex,offset,label,units",
                               *rows]) + "\n")
    return path


def test_one_key_in_two_databases_becomes_two(raw, tmp_path):
    place = "Cropped/sub01/EP02_01f,46,59,86"
    table = table_of_clips(tmp_path / "clips.csv", [
        f"smic,s1,a,{place},happiness,", f"samm,s1,a,{place.replace(',59,', ',/,')},others,",
        "samm,s2,a,Cropped/sub01/EP03_02,46,59,61,others,",
        f"casme3,spNO.7,a,{place},others,"])
    prepare("--raw", raw, "--clips", table, "--data_folder", tmp_path / "set", *FLAGS)
    script("prepare").main(["casme3", "--raw", raw, "--clips", tmp_path / "set" / "onset_apex.csv",
                            "--data_folder", tmp_path / "images", "--crop", "none", "--size", 64,
                            "--classes", 7, "--num_workers", 0])
    rows = [row for _, row in read_table(tmp_path / "set" / "clips.csv", fix="")[0]]
    assert {row["key"] for row in rows} == {"smic-s1-a-46", "samm-s1-a-46", "s2-a-46",
                                            "spNO.7-a-46"}
    info = json.loads((tmp_path / "set" / "flow.json").read_text())
    assert info["repairs"] == {"apex is no frame number: the middle of onset and offset":
                               ["samm-s1-a-46"]}
    # CAS(ME)^3's subjects are called in lists as nowhere else
    assert {(clip.database, clip.subject, clip.key) for clip in
            dataset.read_clips(tmp_path / "images", view="RGB_gray").clips} \
        == {(dataset.DATABASES.index(row["database"]), row["subject"], row["key"]) for row in rows}


def test_labels_of_dropped_rows_are_no_classes(raw, tmp_path, capsys):
    place = "Cropped/sub01/EP02_01f,46,59,86"
    table = table_of_clips(tmp_path / "clips.csv", [
        f"smic,s1,a,{place},happiness,4+99+x", f"smic,s1,b,{place},,4", f"smic,s1,c,{place}, ,4",
        "smic,s2,d,nowhere,1,2,3,fear,4", f"smic,s2,,{place},anger,4",
        "smic,s2,a,Cropped/sub01/EP03_02,46,59,61,others,00+?"])
    prepare("--raw", raw, "--clips", table, "--data_folder", tmp_path / "set", *FLAGS)
    content = info(tmp_path / "set")
    assert content["classes"] == ["happiness", "others"]
    assert [(row["label"], row["emotion"]) for _, row in
            read_table(tmp_path / "set" / "clips.csv", fix="")[0]] == [("0", "happiness"),
                                                                       ("1", "others")]
    assert [d["reason"].partition(": ")[2] or d["reason"] for d in content["dropped"]] == [
        "no label", "no label", "subject 's2' or clip '' is no name", "no frames of it are there"]
    assert content["repairs"] == {
        "action unit 'x' is none: left out": ["s1-a-46"],
        "action unit '00' is none: left out": ["s2-a-46"],
        "action unit '?' is none: left out": ["s2-a-46"]}
    assert "repaired     1  action unit '?' is none" in capsys.readouterr().out


def test_what_only_looks_like_a_number_is_none(raw, tmp_path):
    casme2_tree.write_table(tmp_path / "coding.csv", [
        (1, "EP02_01f", 46, "5²", 86, "0+12", "happiness"),
        (1, "EP03_02", "4²", 31, 61, "4+7", "disgust"),
        ("²", "EP03_02", 1, 31, 61, "4+7", "disgust")])
    prepare("--raw", raw, "--annotation", tmp_path / "coding.csv", "--data_folder",
            tmp_path / "set", *FLAGS)
    content = info(tmp_path / "set")
    assert content["repairs"] == {
        "apex is no frame number: the middle of onset and offset": ["sub01-EP02_01f-46"],
        "action unit '0' is none: left out": ["sub01-EP02_01f-46"],
        "file name of several subjects: told apart by them": ["²-EP03_02-1"]}
    assert [d["clip"] for d in content["dropped"]] == ["sub01-EP03_02-4²", "²-EP03_02-1"]
    assert sampling.read_units("0+00+L07+12A") == ({"7", "12"}, ["0", "00"])
    assert sampling.unit_names([sampling.read_units("0+4")[0]]) == ["4"]


def test_the_apex_is_the_apex_whatever_the_third_frame(raw, tmp_path):
    prepare("--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS,
            "--middle", "published")
    rows = [row for _, row in read_table(tmp_path / "onset_apex.csv", fix="")[0]]
    assert [(row["onset"], row["apex"]) for row in rows][:2] == [
        ("Cropped/sub01/EP02_01f/reg_img46.jpg", "Cropped/sub01/EP02_01f/reg_img59.jpg"),
        ("Cropped/sub01/EP03_02/reg_img1.jpg", "Cropped/sub01/EP03_02/reg_img31.jpg")]


def test_a_finished_set_is_not_computed_again(raw, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(raw, tmp_path / "raw")
    folder, between, calls = tmp_path / "set", flow.flow_between, []
    monkeypatch.setattr(flow, "flow_between", lambda *args: calls.append(1) or between(*args))

    def computed(*more):
        calls.clear()
        prepare("--raw", copy, "--annotation", copy / "coding.csv", "--data_folder", folder,
                *FLAGS, *more)
        return len(calls)
    first = computed()
    before = {name: (folder / name).read_bytes() for name in (*FILES, "flow.json")}
    capsys.readouterr()
    assert first > 28 and computed() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "holds these clips already" in line
    assert {name: (folder / name).read_bytes() for name in before} == before
    (folder / "clips.csv").write_text("changed")
    assert computed() == first and (folder / "clips.csv").read_bytes() == before["clips.csv"]
    (folder / "flow.npy").write_bytes(before["flow.npy"][:-1])
    assert computed() == first and computed("--jitters", 0) == 28 and computed() == first
    frame = copy / "Cropped" / "sub01" / "EP02_01f" / "reg_img59.jpg"
    shutil.copyfile(frame.with_name("reg_img60.jpg"), frame)
    assert computed() == first
    assert (folder / "flow.npy").read_bytes() != before["flow.npy"]
    content = info(folder)
    (folder / "flow.json").write_text(json.dumps(
        content | {"flow": content["flow"] | {"opencv": "0.1"}}))
    assert computed() == first and info(folder) == content


def test_difference_images_in_the_same_folder_keep_their_records(raw, tmp_path, monkeypatch):
    flags = ["--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS]
    prepare(*flags)
    images = ["casme3", "--raw", raw, "--clips", tmp_path / "onset_apex.csv", "--data_folder",
              tmp_path, "--crop", "none", "--size", 64, "--classes", 7, "--num_workers", 0]
    script("prepare").main(images)
    records = sorted((tmp_path / ".prepare").iterdir())
    prepare(*flags, "--jitters", 1)
    assert len(records) == 7 and sorted((tmp_path / ".prepare").iterdir()) == records
    monkeypatch.setattr(cutting, "make_images", None)  # nothing is cut again
    script("prepare").main(images)


@pytest.mark.parametrize("source", ["--annotation", "--clips"])
def test_boxes_of_the_difference_images_suit_the_flow(raw, prepared, tmp_path, source):
    """prepare.py casme3 names clips as onset_apex.csv does."""
    script("prepare").main(["casme3", "--raw", raw, "--clips", prepared / "onset_apex.csv",
                            "--data_folder", tmp_path / "images", "--crop", "box", 10, 20, 40, 40,
                            "--size", 64, "--classes", 7, "--num_workers", 0])
    table = tmp_path / "images" / "boxes.csv"
    assert "casme2,sub01,EP02_01f-46,reg_img46,10.000" in table.read_text()
    path = raw / "coding.csv"
    if source == "--clips":
        path = table_of_clips(tmp_path / "clips.csv", [
            f"casme2,sub{s:02d},{name},Cropped/sub{s:02d}/{name},{a},{b},{c},{emotion},{units}"
            for s, name, a, b, c, units, emotion in casme2_tree.CLIPS if emotion != "fear"])
    flags = ["--raw", raw, source, path, *FLAGS, "--crop"]
    prepare(*flags, "boxes", table, "--data_folder", tmp_path / "set")
    prepare(*flags, "box", 10, 20, 40, 40, "--data_folder", tmp_path / "other")
    for name in ("frames.npy", "flow.npy"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert len(np.load(tmp_path / "set" / "flow.npy")) == 7


def test_the_most_specific_box_holds_in_any_spelling():
    boxes = {("casme2", "s1", "", ""): 1, ("casme2", "s1", "a", ""): 2,
             ("casme2", "s1", "a-5", "img5"): 3}
    names = [("casme2", "s1", "a", "5"), ("casme2", "s1", "a-5", "img5")]
    assert detection.box_for(boxes, *names) == 3 and detection.box_for(boxes, names[0]) == 2
    assert detection.box_for(boxes, ("casme2", "s1", "b", "5")) == 1
    boxes = {("", "s1", "", ""): 4, ("casme2", "s1", "", ""): 5}  # of no database: of all
    assert [detection.box_for(boxes, (name, "s1", "b", "5")) for name in ("samm", "casme2")] \
        == [4, 5]


@pytest.mark.parametrize("place, raw_folder", [
    ("Cropped", "."), (".", "Cropped"), (".", "Cropped/sub01/.."), ("coding", "Cropped"),
    ("Cropped/sub01", "."), ("elsewhere", None)])
def test_a_stand_in_is_known_from_any_folder_of_it(raw, tmp_path, place, raw_folder):
    copy = shutil.copytree(raw, tmp_path / "deep" / "er" / "still" / "raw")
    (tmp_path / "coding").mkdir()
    shutil.copyfile(raw / "coding.csv", tmp_path / "coding" / "coding.csv")
    (copy / "elsewhere").mkdir()
    mark = tmp_path / "coding" if place == "coding" else copy / place
    (mark / "rendered.json").write_text("{}")
    prepare("--raw", copy / (raw_folder or "Cropped"), "--annotation",
            tmp_path / "coding" / "coding.csv", "--data_folder", tmp_path / "set", *FLAGS)
    assert info(tmp_path / "set")["rendered"] == (raw_folder is not None)
    script("prepare").main(["casme3", "--raw", copy / (raw_folder or "Cropped"), "--clips",
                            tmp_path / "set" / "onset_apex.csv", "--data_folder",
                            tmp_path / "images", "--crop", "none", "--size", 64, "--classes", 7,
                            "--num_workers", 0])
    encoding = json.loads((tmp_path / "images" / "encoding.json").read_text())
    assert encoding.get("rendered", False) == (raw_folder is not None and place != "coding")


def test_what_was_dropped_is_named_in_flow_json(raw, tmp_path, capsys):
    casme2_tree.write_table(tmp_path / "coding.csv", [
        *casme2_tree.CLIPS, *((9, f"EP{i}", 1, 5, 9, "4", "others") for i in range(11))])
    prepare("--raw", raw, "--annotation", tmp_path / "coding.csv", "--data_folder",
            tmp_path / "set", *FLAGS)
    said = capsys.readouterr().out
    assert "more, named in flow.json" in said and "manifest.json" not in said


def test_cells_of_spreadsheets_are_read_as_what_they_mean(raw, tmp_path):
    """pandas writes a column with a gap as 46.0; labels and names come in several spellings."""
    table = table_of_clips(tmp_path / "clips.csv", [
        "samm,006,a,Cropped/sub01/EP02_01f,46.0,60.0,86.0,Others,4",
        "samm,006 ,b,Cropped/sub01/EP03_02,1.0,,61.0,others ,4",
        " samm,7.0,c,Cropped/sub02/EP02_01f,10,40,90,Happiness,4"])
    rows = casme2.read_clips(table, "middle")
    assert rows.classes == ("happiness", "others") and not rows.dropped
    assert [(row.subject, row.onset, row.apex, row.offset, row.emotion) for row in rows.rows] == [
        ("006", 46, 60, 86, "others"), ("006", 1, 31, 61, "others"),
        ("7", 10, 40, 90, "happiness")]
    assert list(rows.repairs.values()) == [["006-b-1"]]  # the gap alone


def test_a_clip_in_two_folders_is_refused(tmp_path):
    for place in ("CASME2-RAW/sub01/EP02_01f", "Cropped/sub01/EP02_01f", "Cropped/sub02/EP02_01f"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("CASME2-RAW/sub01", "Cropped/sub01"):
        (tmp_path / place / "Thumbs.db").touch()  # no clip
    with pytest.raises(BadInput) as error:
        casme2.find_folders(tmp_path)
    for part in ("CASME2-RAW/sub01/EP02_01f", "Cropped/sub01/EP02_01f", "narrower --raw"):
        assert part in str(error.value)
    assert len(casme2.find_folders(tmp_path / "Cropped")) == 2
    shutil.rmtree(tmp_path / "CASME2-RAW")
    (tmp_path / "link").symlink_to(tmp_path / "Cropped")
    assert len(casme2.find_folders(tmp_path)) == 2


@pytest.mark.parametrize("reference", ["previous", "onset"])
def test_a_jittered_frame_that_cannot_be_used_has_the_plain_one_in_its_place(raw, tmp_path,
                                                                           reference):
    place, files = raw / "Cropped/sub01/EP02_01f", {}
    for n in range(46, 53):
        shutil.copy(place / f"reg_img{n}.jpg", tmp_path)
        files[n] = str(tmp_path / f"reg_img{n}.jpg")
    plain, jittered = (46, 47, 48, 49, 50), [(51, 47, 48, 49, 50), (46, 47, 48, 49, 52)]
    settings = videos.Settings("none", 0, 32, register="none")
    (tmp_path / "reg_img51.jpg").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "reg_img52.jpg")
    task = videos.plan("k", [plain, *jittered], files, reference, None)
    record = videos.process(task, settings, tmp_path)
    assert record["replaced"] == 2
    assert videos.process(task, settings, tmp_path) == record  # it is kept
    with np.load(record["path"]) as content:
        steps = content["steps"]
    for variant in task.variants[1:]:
        assert np.array_equal(steps[list(variant)], steps[:4])
    nothing = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    nothing.save(files[48], "TIFF")  # one of the five
    dropped = videos.process(task, settings, tmp_path)["dropped"]
    assert "reg_img48.jpg: pixels that are not finite" in dropped


def test_a_person_has_one_name(raw, tmp_path, capsys):
    rows = list(csv.reader((raw / "coding.csv").open(encoding="utf-8-sig", newline="")))
    subject = [name.strip().lower() for name in rows[0]].index("subject")
    before = casme2.read_workbook(raw / "coding.csv", "middle").rows
    for row, spelling in zip(rows[1:], ("sub{}", "Sub{:02d}", "S0{}", "Subject {}") * len(rows)):
        row[subject] = spelling.format(int(row[subject]))
    with open(tmp_path / "coding.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert casme2.read_workbook(tmp_path / "coding.csv", "middle").rows == before


@pytest.mark.parametrize("rows, said", [
    (["samm,s1,c1,f,1,5,9,a", "samm,S1,c2,g,1,5,9,a"],
     "t.csv: subjects 's1' and 'S1' of samm differ in capitals or dots alone"),
    (["samm,sub10,c1,f,1,5,9,a", "samm,sub010,c2,g,1,5,9,a"],
     "t.csv: subjects 'sub10' and 'sub010' of samm differ in leading zeros alone"),
    (["casme3,spNO.1,c1,f,1,5,9,a", "casme3,SPNO1,c2,g,1,5,9,a"],
     "t.csv: subjects 'spNO.1' and 'SPNO1' of casme3 differ in capitals or dots alone"),
    (["samm,p01,c1,f,1,5,9,a", "samm,p1,c2,g,1,5,9,a"],
     "t.csv: subjects 'p01' and 'p1' of samm differ in leading zeros alone"),
    (["casme2,1,c1,f,1,5,9,a", "casme2,sub01,c2,g,1,5,9,a"],
     "t.csv: subjects '1' and 'sub01' of casme2 differ in what stands before the number alone"),
    (["samm;s1;c1;f;1;5;9;a"], "t.csv:1: columns are separated by ';'; save it with ','")])
def test_tables_of_clips_that_cannot_be_told_apart_are_refused(tmp_path, rows, said):
    mark = ";" if ";" in rows[0] else ","
    (tmp_path / "t.csv").write_text("\n".join([mark.join(casme2.CLIP_COLUMNS), *rows]))
    with pytest.raises(BadInput) as error:
        casme2.read_clips(tmp_path / "t.csv", "middle")
    assert said in str(error.value)


def test_names_that_meet_in_a_key_are_told_apart_and_blank_rows_left_out(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join([",".join(casme2.CLIP_COLUMNS),
                                               "smic,a-b,c,f,1,5,9,a", "smic,a,b-c,g,1,5,9,a",
                                               ",,,,,,,", "smic,a-b,c,f,1,5,9,a", ",,,,,,,"]))
    table = casme2.read_clips(tmp_path / "t.csv", "middle")
    assert [row.key for row in table.rows] == ["a-b-c-1"] and table.source["rows"] == 3
    assert "rename" in table.dropped[0][1] and "second row" in table.dropped[1][1]


def test_one_key_in_two_databases_becomes_two_in_any_capitals(tmp_path):
    (tmp_path / "t.csv").write_text("\n".join([",".join(casme2.CLIP_COLUMNS), "samm,S1,c,f,1,5,9,a",
                                               "smic,s1,c,g,1,5,9,a", "smic,1.1,c,h,1,5,9,a",
                                               "smic,11,c,i,1,5,9,a", "smic,S1,d,j,1,5,9,"]))
    table = casme2.read_clips(tmp_path / "t.csv", "middle")
    assert [row.key for row in table.rows] == ["samm-S1-c-1", "smic-s1-c-1", "1.1-c-1", "11-c-1"]


@pytest.mark.parametrize("content", [b"", b"PK", b"none"])
def test_an_unreadable_record_is_no_record(raw, tmp_path, content):
    files = [str(raw / f"Cropped/sub01/EP02_01f/reg_img{n}.jpg") for n in range(46, 51)]
    task = videos.plan("k", [(0, 1, 2, 3, 4)], dict(enumerate(files)), "previous", None)
    settings = videos.Settings("none", 0, 32, register="none")
    record = Path(videos.process(task, settings, tmp_path)["path"])
    whole = record.read_bytes()
    record.write_bytes(content if content != b"PK" else whole[:-30])
    assert videos.process(task, settings, tmp_path)["failed"] == 0
    with np.load(record) as again:
        assert again["frames"].shape == (5, 3, 32, 32)


def test_a_run_that_was_stopped_before_the_picture_draws_it(raw, tmp_path, monkeypatch, capsys):
    lines = [f"smic,s{s},{name},Cropped/sub{s:02d}/{name},{a},{b},{c},{emotion},"
             for s, name, a, b, c, _, emotion in casme2_tree.CLIPS[:3]]
    table = table_of_clips(tmp_path / "clips.csv", [*lines, "smic,s9,x,none,1,2,3,anger,"])
    flags = ["--raw", raw, "--clips", table, "--data_folder", tmp_path / "set", *FLAGS]
    prepare(*flags)
    picture = tmp_path / "set" / "audit" / "flow.png"
    before = picture.read_bytes()
    picture.unlink()
    (tmp_path / "set" / videos.RECORDS).mkdir()
    (tmp_path / "set" / videos.RECORDS / "a.npz").touch()
    capsys.readouterr()
    prepare(*flags)
    assert "holds these clips already" in capsys.readouterr().out
    assert picture.read_bytes() == before
    assert not (tmp_path / "set" / videos.RECORDS).exists()


def test_no_picture_is_left_of_another_set(raw, tmp_path, monkeypatch):
    flags = ["--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path / "set",
             *FLAGS]
    prepare(*flags)
    picture = tmp_path / "set" / "audit" / "flow.png"
    assert picture.exists()

    def killed(*_):
        raise SystemExit(3)
    with monkeypatch.context() as patch:
        patch.setattr(casme2.audit, "draw_flow", killed)
        with pytest.raises(SystemExit):
            prepare(*flags, "--reference", "onset")
    assert not picture.exists()
    prepare(*flags, "--reference", "onset")
    assert picture.exists()


def header_alone(raw, tmp_path):
    casme2_tree.write_table(tmp_path / "coding.csv", [])


def only_fear(raw, tmp_path):
    casme2_tree.write_table(tmp_path / "coding.csv",
                            [clip for clip in casme2_tree.CLIPS if clip[6] == "fear"])


def no_apex_column(raw, tmp_path):
    (tmp_path / "coding.csv").write_text("Subject,Filename\n1,EP\n")


def nowhere(raw, tmp_path):
    casme2_tree.write_table(tmp_path / "coding.csv", [(9, "EP99", 1, 5, 9, "4", "others")])


@pytest.mark.parametrize("spoil, expected", [
    (header_alone, "coding.csv: no clip of the five classes"), (only_fear, "no clip of the five"),
    (no_apex_column, "no column onsetframe"), (nowhere, "no clip can be cut; sub09-EP99-1: no")])
def test_bad_workbooks_are_refused_in_one_line(raw, tmp_path, capsys, spoil, expected):
    spoil(raw, tmp_path)
    said = refused(capsys, "--raw", raw, "--annotation", tmp_path / "coding.csv", "--data_folder",
                   tmp_path / "set", *FLAGS)
    assert expected in said and not (tmp_path / "set" / "flow.json").exists()


@pytest.mark.parametrize("flags, expected", [
    (["--annotation", "nothing.xlsx"], "nothing.xlsx: missing"),
    ([], "give --annotation or --clips"), (["--annotation", "a", "--size", 50], "multiple of 16"),
    (["--annotation", "a", "--roll"], "--roll takes --crop")])
def test_bad_flags_are_refused_in_one_line(raw, tmp_path, capsys, flags, expected):
    said = refused(capsys, "--raw", raw, "--data_folder", tmp_path / "set", *flags)
    assert expected in said and not (tmp_path / "set").exists()


def test_a_box_that_lies_outside_the_frame_drops_the_clip(raw, tmp_path, capsys):
    said = refused(capsys, "--raw", raw, "--annotation", raw / "coding.csv", "--data_folder",
                   tmp_path / "set", *FLAGS, "--crop", "box", 500, 500, 20, 20)
    assert "the box is not within the frame of 64x80 pixels" in said and "fear" not in said
    assert not (tmp_path / "set").exists()


def test_one_folder_has_the_clips_of_one_person(raw, tmp_path, capsys):
    head = "database,subject,clip,folder,onset,apex,offset,label"
    place = "Cropped/sub01/EP03_02"
    for second, together in (("s1", True), ("s2", False)):
        (tmp_path / "clips.csv").write_text("\n".join([
            head, f"samm,s1,a,{place},1,31,61,anger", f"samm,{second},b,{place},2,31,61,other"]))
        flags = ["--raw", raw, "--clips", tmp_path / "clips.csv", "--data_folder",
                 tmp_path / second, *FLAGS]
        if together:
            prepare(*flags)
        else:
            assert f"{place} is the folder of s1-a-1 and of s2-b-2, of another person" \
                in refused(capsys, *flags)


def test_folders_that_are_not_there_are_nobodys(raw, tmp_path):
    (tmp_path / "clips.csv").write_text("\n".join([
        "database,subject,clip,folder,onset,apex,offset,label", "samm,s1,a,none,1,31,61,anger",
        "samm,s2,a,none,1,31,61,anger", "samm,s3,a,Cropped/sub01/EP03_02,1,31,61,other"]))
    prepare("--raw", raw, "--clips", tmp_path / "clips.csv", "--data_folder", tmp_path / "set",
            *FLAGS)
    assert [one["reason"] for one in info(tmp_path / "set")["dropped"]] \
        == ["no frames of it are there"] * 2


def test_no_frame_after_the_onset_is_no_apex(tmp_path):
    """Of --middle published too, whose third frame is not the apex."""
    row = casme2.Row(0, "sub01", "a", 10, 12, 17, "", "others", "k")
    for middle in ({10: 10, 13: 10, 17: 10}, {10: 10, 12: 10, 17: 10}):
        assert casme2.move_apex(row, {8: "a", 9: "b", 10: "c"}, middle, 7)
    assert not casme2.move_apex(row, {10: "a", 13: "b"}, {10: 10, 13: 13, 17: 13}, 7)


@pytest.mark.parametrize("gone, tolerance, apex", [((2,), 1, 3), ((2, 3), 1, None), ((2, 3), 2, 4)])
def test_a_missing_apex_is_not_the_onset(tmp_path, capsys, gone, tolerance, apex):
    raw = casme2_tree.write(tmp_path / "raw", [(6, "EP01", 1, 2, 9, "4", "disgust"),
                                               (7, "EP01", 1, 5, 9, "4", "disgust")])
    for number in gone:
        (raw / f"Cropped/sub06/EP01/reg_img{number}.jpg").unlink()
    prepare("--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path / "set",
            *FLAGS, "--tolerance", tolerance)
    rows = [row for _, row in read_table(tmp_path / "set" / "onset_apex.csv", fix="")[0]]
    if apex is None:
        (left,) = info(tmp_path / "set")["dropped"]
        assert len(rows) == 1 and "the nearest frame is that of the onset" in left["reason"]
        return
    assert rows[0]["apex"].endswith(f"reg_img{apex}.jpg")
    flow_of = np.load(tmp_path / "set" / "flow.npy")
    assert np.abs(flow_of[0, 1]).max() > 0  # from the middle, which is the onset, to the apex


def test_frames_that_stand_in_for_others_keep_their_order(tmp_path):
    """Of 11 and 13 only 12 and 13 are there: an apex at 12, then 13, 12, 13 again would be a face
    that goes back and forth."""
    raw = casme2_tree.write(tmp_path / "raw", [(6, "EP01", 10, 11, 13, "4", "disgust"),
                                               (7, "EP01", 1, 5, 9, "4", "disgust")])
    for path in (raw / "Cropped/sub06/EP01").iterdir():
        if path.name not in ("reg_img12.jpg", "reg_img13.jpg"):
            path.unlink()
    prepare("--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path / "set",
            *FLAGS, "--tolerance", 2)
    (left,) = info(tmp_path / "set")["dropped"]
    assert left["reason"] == "the nearest frames are 12, 12, 13, 12, 13, which is no order"


def test_a_link_to_nowhere_is_no_frame(tmp_path):
    (tmp_path / "img5.jpg").symlink_to(tmp_path / "not fetched")
    (tmp_path / "img6.jpg").touch()
    assert list(casme2.numbered(tmp_path)) == [6]


def test_a_root_without_frames(raw, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = ["--annotation", raw / "coding.csv", "--data_folder", tmp_path / "set"]
    for name, expected in (("empty", "no folder such as sub01"), ("none", "no such folder")):
        assert expected in refused(capsys, "--raw", tmp_path / name, *flags)


@pytest.mark.parametrize("names, frames", [
    (("img5.jpg", "reg_img5.jpg", "img6.JPG", "notes.txt"), {5: "reg_img5.jpg", 6: "img6.JPG"}),
    (("006_05562.jpg", "006_1_2_05563.png", "._006_05564.jpg", "8-9.txt"),
     {5562: "006_05562.jpg", 5563: "006_1_2_05563.png"}),
    (("img2.jpg", "img46.jpg", "img46 2.jpg", "img46 copy 2.jpg", "img2_46.jpg", "006_7.jpg"),
     {2: "img2.jpg", 46: "img46.jpg"}),
    (("46.png", "46.jpg", "47.png", "reg_img48.png", "img48.jpg"),
     {46: "46.jpg", 47: "47.png", 48: "reg_img48.png"})],
    ids=["prefixes", "after other numbers", "copies", "beside their depth"])
def test_frames_by_the_number_in_their_name(tmp_path, names, frames):
    for name in names:
        (tmp_path / name).touch()
    actual = casme2.numbered(tmp_path)
    assert {n: Path(path).name for n, path in actual.items()} == frames


@pytest.mark.parametrize("shifts, between", [((0, 2, 4, 6), 1), ((2, 0, 4, 6), 3),
                                             ((2, 4, 6, 0), 6)])
def test_a_frame_that_does_not_register_moves_as_those_around_it(tmp_path, monkeypatch, shifts,
                                                                 between):
    """Half-way in time, half-way in motion; the last one as the one before."""
    found, missed = iter(shifts), 1 + shifts.index(0)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "f.png"), image)

    def register(*_):
        shift = next(found)
        return np.array([[1, 0, 7.0 * shift], [0, 1, 0]]), bool(shift)
    monkeypatch.setattr(videos.registration, "register", register)
    task = videos.Task("k", (str(tmp_path / "f.png"),) * 5, (), (), (), (46, 52, 58, 64, 70))
    crops, met = videos.cut_frames(task, videos.Settings(size=32, register="translation"))
    # crops of 32 pixels of those of 224 that are registered: 7 there are one here, two of 64
    matrix = videos.whole_matrix(64, 64, 32)
    matrix[0, 2] += 2 * between
    assert met == {"failed": 1, "whole": 0, "replaced": 0}
    assert (crops[missed] == videos.registration.cut(image[..., ::-1], matrix, 32)).all()


@pytest.mark.parametrize("motion, turn", [("translation", [[1, 0], [0, 1]]),
                                          ("similarity", [[1.01, -0.02], [0.02, 1.01]])])
def test_small_crops_are_registered_as_large_ones_are(tmp_path, motion, turn):
    """Half a pixel of such a crop is what the head moves here."""
    face = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(340, 280, 3)), (0, 0), 5)
    face = np.clip(127 + 45 * face / face.std(), 0, 255).astype(np.uint8)
    matrix = np.concatenate([turn, [[3.0], [-2.0]]], 1)
    moved = cv2.warpAffine(face, matrix, (280, 340), borderMode=cv2.BORDER_REFLECT)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file, image in zip(files, (face, moved)):
        cv2.imwrite(file, image)
    off = []
    for register in ("none", motion):
        (onset, other), met = videos.cut_frames(
            videos.Task("k", tuple(files), (), (), (), (1, 2)),
            videos.Settings(size=48, register=register))
        assert not met["failed"] and onset.shape == (48, 48, 3)
        off.append(np.abs(onset.astype(float) - other)[6:-6, 6:-6].mean())
    # a similarity of the frame is not quite one of the square it is squeezed to
    assert off[1] < 2 and off[1] < off[0] / 6
