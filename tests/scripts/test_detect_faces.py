"""detect_faces.py: a folder of photographs, from its files to tables, pictures and crops."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, save_image, script
from PIL import Image

from preparation import photographs
from training import record
from util import BadInput

FILES = {"faces.csv", "faces.json", "faces.jsonl", "without_faces.txt"}


def detect(*argv):
    return script("detect_faces").main([*argv, *([] if "--num_workers" in argv
                                                 else ["--num_workers", 0])])


def refused(capsys, *argv):
    """Runs the script, which must fail; its one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        detect(*argv)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "photo/s" not in line
               and "searching" not in line]
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def content(folder):
    """Bytes of every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")
            if p.is_file()}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes: a portrait, two of it in one, one turned by EXIF; none, a tiny and a broken
    one."""
    pytest.importorskip("facenet_pytorch")
    data = pytest.importorskip("skimage.data")
    folder, portrait = tmp_path_factory.mktemp("photos"), data.astronaut()
    save_image(folder / "happy" / "a10.jpg", portrait, quality=95)
    two = np.zeros((512, 820, 3), np.uint8)
    two[:, 308:], two[:300, :300] = portrait, Image.fromarray(portrait).resize((300, 300))
    save_image(folder / "happy" / "a2.png", two)
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(folder / "sad" / "b.jpg", np.rot90(portrait), quality=95, exif=exif)
    save_image(folder / "sad" / "b.png", portrait[:, :, 0])
    save_image(folder / "sad" / "none.jpg", data.coffee())
    save_image(folder / "tiny.png", portrait[90:110, 200:220])
    (folder / "sad" / "cut.jpg").write_bytes(
        (folder / "happy" / "a10.jpg").read_bytes()[:20_000])
    (folder / "sad" / "notes.txt").write_text("no photograph")
    (folder / "sad" / "._b.jpg").write_text("what another system leaves")
    return folder


@pytest.fixture(scope="module")
def found(photos, tmp_path_factory):
    """The folder of a whole run with crops."""
    out = tmp_path_factory.mktemp("found") / "out"
    detect(photos, "--save_path", out, "--crop", "--size", 112)
    return out


def test_tables_hold_all_faces(photos, found):
    table = rows(found / "faces.csv")
    assert [(row["path"], row["face"]) for row in table] == [
        ("happy/a2.png", "1"), ("happy/a2.png", "2"), ("happy/a10.jpg", "1"), ("sad/b.jpg", "1"),
        ("sad/b.png", "1")]
    first = table[0]
    assert (first["photo_width"], first["photo_height"]) == ("820", "512")
    assert float(first["x"]) + float(first["width"]) / 2 == pytest.approx(308 + 224, abs=6)
    assert float(first["score"]) > .9 and float(first["x1"]) < float(first["x2"])
    for name in ("x", "y", "width", "height"):  # turned by its EXIF data
        assert float(table[3][name]) == pytest.approx(float(table[2][name]), abs=3)
    assert (found / "without_faces.txt").read_text() == "sad/none.jpg\ntiny.png\n"
    known = json.loads((found / "faces.json").read_text())
    assert known["counts"] == {"photographs": 7, "faces": 5, "without_a_face": 2, "unreadable": 1}
    assert known["without_faces"] == ["sad/none.jpg", "tiny.png"]
    assert list(known["unreadable"]) == ["sad/cut.jpg"]
    assert "truncated" in known["unreadable"]["sad/cut.jpg"]
    assert known["settings"]["size"] == 112 and known["versions"]["facenet-pytorch"]
    faces = [face for photo in known["photographs"] for face in photo["faces"]]
    assert [str(face["x"]) for face in faces] == [row["x"] for row in table]


def test_crops_keep_the_class_folders(found):
    table, landmarks = rows(found / "faces.csv"), rows(found / "landmarks.csv")
    names = ["crops/happy/a2_1.jpg", "crops/happy/a2_2.jpg", "crops/happy/a10_1.jpg",
             "crops/sad/b.jpg_1.jpg", "crops/sad/b.png_1.jpg"]
    assert [row["crop"] for row in table] == [row["path"] for row in landmarks] == names
    drawn = {f"annotated/{name}.jpg" for name in ("happy/a2", "happy/a10", "sad/b.jpg",
                                                  "sad/b.png")}
    assert content(found).keys() == {*names, *drawn, *FILES, "landmarks.csv"}
    for row in landmarks:
        with Image.open(found / row["path"]) as crop:
            assert crop.size == (112, 112)
        assert float(row["y1"]) == pytest.approx(float(row["y2"]), abs=.01)
        assert 25 < float(row["x1"]) < 50 and 62 < float(row["x2"]) < 87
    with Image.open(found / "annotated/happy/a2.jpg") as picture:
        assert picture.size == (820, 512)
        x, y, height = (int(float(table[0][name])) for name in ("x", "y", "height"))
        red, green, blue = np.asarray(picture)[y + height // 2, x].astype(int)
        assert green > red + 50 and green > blue + 50


def test_processes_and_going_on_change_nothing(photos, found, tmp_path):
    shutil.copytree(found, tmp_path / "out")
    detect(photos, "--save_path", tmp_path / "out", "--crop", "--size", 112, "--resume")
    assert content(tmp_path / "out") == content(found)
    detect(photos, "--save_path", tmp_path / "more", "--crop", "--size", 112, "--num_workers", 2)
    assert content(tmp_path / "more") == content(found)


def test_a_killed_run_goes_on_to_the_same_bytes(photos, found, tmp_path, monkeypatch):
    out = tmp_path / "out"
    argv = ["--save_path", str(out), "--crop", "--size", "112"]
    run = subprocess.Popen([sys.executable, ROOT / "detect_faces.py", photos, *argv,
                            "--num_workers", "0"], stderr=subprocess.DEVNULL)
    try:
        while run.poll() is None and not ((out / "faces.jsonl").exists() and
                                          (out / "faces.jsonl").read_text().count("\n") > 2):
            time.sleep(.005)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    lines = (out / "faces.jsonl").read_text().splitlines(keepends=True)
    (out / "faces.jsonl").write_text("".join(lines[:3]) + lines[1][:100])  # a line in the making
    searched = []
    process = photographs.process
    monkeypatch.setattr(photographs, "process", lambda photo, *more, **device:
                        searched.append(photo.name) or process(photo, *more, **device))
    detect(photos, *argv, "--resume", "auto")
    assert searched == ["sad/b.jpg", "sad/b.png", "sad/cut.jpg", "sad/none.jpg", "tiny.png"]
    assert content(out) == content(found)


def test_a_stopped_run_says_how_it_goes_on(photos, tmp_path, monkeypatch, capsys):
    process = photographs.process

    def stopping(photo, *more, **device):
        if photo.name == "sad/b.jpg":
            os.kill(os.getpid(), signal.SIGTERM)
        return process(photo, *more, **device)
    monkeypatch.setattr(photographs, "process", stopping)
    with pytest.raises(SystemExit) as stop:
        detect(photos, "--save_path", tmp_path / "out", "--no-annotate")
    assert stop.value.code == 143 and "--resume auto" in capsys.readouterr().err
    assert len((tmp_path / "out" / "faces.jsonl").read_text().splitlines()) == 3
    assert content(tmp_path / "out").keys() == {"faces.jsonl"}


def test_what_changed_is_searched_again(photos, tmp_path):
    folder, out = shutil.copytree(photos, tmp_path / "photos"), tmp_path / "photos" / "out"
    argv = [folder, "--save_path", out, "--crop", "--format", "png", "--no-annotate"]
    detect(*argv)  # into a folder within the one that is searched
    assert "crops/sad/b.png_1.png" in content(out)
    shutil.copy(folder / "happy" / "a10.jpg", folder / "happy" / "a2.png")
    shutil.rmtree(folder / "sad")
    shutil.copy(folder / "happy" / "a10.jpg", folder / "happy" / "new.jpg")
    detect(*argv, "--resume")
    assert content(out).keys() == {*FILES, "landmarks.csv", "crops/happy/a2_1.png",
                                   "crops/happy/a10_1.png", "crops/happy/new_1.png"}
    assert not (out / "crops" / "sad").exists()  # it would be a class without photographs
    assert [row["path"] for row in rows(out / "faces.csv")] == [
        "happy/a2.png", "happy/a10.jpg", "happy/new.jpg"]


def test_the_largest_alone(photos, tmp_path, capsys):
    detect(photos / "happy" / "a2.png", photos / "sad", "--save_path", tmp_path / "out",
           "--largest")
    table = rows(tmp_path / "out" / "faces.csv")
    # of several inputs, folders are told apart by their names
    assert [row["path"] for row in table] == ["a2.png", "sad/b.jpg", "sad/b.png"]
    assert not any(row["crop"] for row in table)
    said = capsys.readouterr().out
    assert "5 photographs, 3 faces, 1 without a face, 1 unreadable" in said
    assert "no face      sad/none.jpg" in said and "unreadable   sad/cut.jpg: " in said
    assert "passed over  files of other kinds: 1 .txt" in said


# ---------------------------------------------------------------- bad input

def test_bad_input_is_named(photos, tmp_path, capsys):
    out = tmp_path / "out"
    for argv, expected in (
            ([photos / "nowhere"], "nowhere: no such photograph or folder"),
            ([photos / "sad" / "cut.jpg"], "cut.jpg: cannot be decoded (image file is truncated"),
            ([photos, "--size", 64], "--size goes with --crop"),
            ([photos, "--min_face_size", 3], "--min_face_size: 3 is out of range"),
            ([photos, "--device", "tpu"], "--device tpu: not available here")):
        assert expected in refused(capsys, *argv, "--save_path", out)
        assert not out.exists()
    (tmp_path / "empty").mkdir()
    assert "empty: no photograph in it" in refused(capsys, tmp_path / "empty", "--save_path", out)
    (tmp_path / "other").mkdir()
    shutil.copy(photos / "happy" / "a10.jpg", tmp_path / "other" / "a2.png")
    assert "would be called a2.png" in refused(
        capsys, photos / "happy" / "a2.png", tmp_path / "other" / "a2.png", "--save_path", out)
    assert "where the results go" in refused(capsys, photos, "--save_path", photos)
    assert not out.exists()


def test_a_folder_of_others_is_refused(photos, found, tmp_path, capsys):
    before = content(found)
    assert "exists; go on with --resume auto" in refused(capsys, photos, "--save_path", found)
    line = refused(capsys, photos, "--save_path", found, "--resume", "--crop", "--size", 64)
    assert "faces.jsonl: cannot be resumed with other options: --size 112 there, 64 here" in line
    assert content(found) == before
    other = tmp_path / "of_others"
    other.mkdir()
    shutil.copy(photos / "happy" / "a10.jpg", other / "b.jpg")
    for names in ([photos, other], [other]):  # by which those that are finished have other names
        line = refused(capsys, *names, "--save_path", found, "--resume", "--crop", "--size", 112)
        assert "faces.jsonl: 6 finished photographs are not among these (happy/a2.png" in line
    assert content(found) == before
    with open(found / "faces.jsonl", "ab") as file:  # what a power cut leaves
        file.write(b"\xff\n")
    assert len(record.read_lines(found / "faces.jsonl")) == before["faces.jsonl"].count(b"\n")
    (found / "faces.jsonl").write_bytes(before["faces.jsonl"])
    shutil.rmtree(other)
    (tmp_path / "mine.txt").write_text("x")
    assert "holds no faces.jsonl" in refused(capsys, photos, "--save_path", tmp_path, "--resume")
    (tmp_path / "faces.jsonl").write_text('{"settings": {}}\n{"a": 1}\n')
    assert "cannot be read" in refused(capsys, photos, "--save_path", tmp_path, "--resume")
    assert content(tmp_path).keys() == {"mine.txt", "faces.jsonl"}


def test_a_missing_detector_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    line = refused(capsys, tmp_path, "--save_path", tmp_path / "out")
    assert "detect_faces.py: the face detector is not installed" in line and "make faces" in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- which files there are

def test_files_are_found_in_natural_order_through_links(tmp_path):
    folder = tmp_path / "p"
    for name in ("b/x10.jpg", "b/x9.JPEG", "a/y.png", "z.heic", "b/x².jpg", ".hidden/n.jpg",
                 "b/readme", "b/film.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "b" / "up").symlink_to(folder)
    (folder / "c").symlink_to(folder / "a")
    photos, others = photographs.find_photos([folder], tmp_path / "out")
    assert [p.name for p in photos] == ["a/y.png", "b/x9.JPEG", "b/x10.jpg", "b/x².jpg", "c/y.png",
                                        "z.heic"]
    assert [p.stem for p in photos][:2] == ["a/y", "b/x9"]
    assert others == {"readme": 1, ".mp4": 1}
    photos, _ = photographs.find_photos([folder, folder / "a", folder / "a"], tmp_path / "out")
    assert [p.name for p in photos if "y" in p.name] == ["a/y.png", "p/a/y.png", "p/c/y.png"]
    with pytest.raises(BadInput, match="where the results go"):
        photographs.find_photos([folder / "a"], folder)
    for name in ("x.jpg", "x.png", "x.jpg.png", "X.PNG.jpg", "w.jpg"):
        (tmp_path / "q" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "q" / name).touch()
    photos, _ = photographs.find_photos([tmp_path / "q"], tmp_path / "out")
    assert {p.stem for p in photos} == {"x.jpg", "x.png", "x.jpg.png", "X.PNG.jpg", "w"}
