"""prepare.py casme2: both workbooks, frames, flow once, irregularities by rule, bad input."""
import json
import shutil

import casme2_tree
import cv2
import numpy as np
import pytest
import runs
from conftest import script

from images import flow
from images import videos as sampling
from preparation import casme2, videos
from util import read_table

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
        crops, _ = videos.cut_frames(videos.Task("k", files, (), (), ()), settings)
        expected = flow.flow_steps(np.stack([flow.grey(crop) for crop in crops]))
        assert abs(steps[rows] - expected).max() < 2e-3  # half precision


def test_any_number_of_workers_and_a_second_run_give_the_same(raw, prepared, tmp_path):
    flags = ["--raw", raw, "--annotation", raw / "coding.csv", "--data_folder", tmp_path, *FLAGS]
    for workers in (2, 0):
        prepare(*flags, "--num_workers", workers)
        for name in FILES:
            assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes(), name
        assert not (tmp_path / ".prepare").exists()


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
    said = refused(capsys, "--raw", raw, "--annotation", raw / "coding.csv",
                   "--data_folder", tmp_path, *FLAGS, "--crop", "box", 500, 500, 20, 20)
    assert "the box is not within the frame of 64x80 pixels" in said


def test_a_root_without_frames(raw, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    flags = ["--annotation", raw / "coding.csv", "--data_folder", tmp_path / "set"]
    for name, expected in (("empty", "no folder such as sub01"), ("none", "no such folder")):
        assert expected in refused(capsys, "--raw", tmp_path / name, *flags)


def test_frames_of_either_prefix_and_its_preference(tmp_path):
    for name in ("img5.jpg", "reg_img5.jpg", "img6.JPG", "notes.txt"):
        (tmp_path / name).touch()
    actual = casme2.numbered(tmp_path)
    assert {n: path.rsplit("/", 1)[1] for n, path in actual.items()} \
        == {5: "reg_img5.jpg", 6: "img6.JPG"}


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
        (onset, other), failed = videos.cut_frames(
            videos.Task("k", tuple(files), (), (), ()), videos.Settings(size=48, register=register))
        assert not failed and onset.shape == (48, 48, 3)
        off.append(np.abs(onset.astype(float) - other)[6:-6, 6:-6].mean())
    # a similarity of the frame is not quite one of the square it is squeezed to
    assert off[1] < 2 and off[1] < off[0] / 6
