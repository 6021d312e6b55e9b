"""predict.py on photographs: the numbers of the test split, faces that are found, bad input."""
import csv
import json

import face_tree
import numpy as np
import pytest
import runs
import torch
from conftest import script
from PIL import Image

from models import convnextv2, mae
from preparation import detection
from training import checkpoint


def predict(*argv):
    return script("predict").main([str(a) for a in argv])


def predicted(capsys, *argv):
    capsys.readouterr()
    predict(*argv, "--json", "--device", "cpu")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    face_tree.write(folder)
    return folder


def trained(tree, folder, *more):
    script("train_FER").main([str(a) for a in (
        "--dataset", "rafdb", "--data_folder", tree, "--pretrained", "none", "--size", 32,
        "--epochs", 2, "--batch_size", 14, "--cache", "off", "--device", "cpu", "--save_path",
        folder, "--learning_rate", 1e-3, *more)])
    return runs.only(folder)


@pytest.mark.parametrize("more", [
    [], ["--select", "val"], ["--ema_decay", 0, "--model", "scn", "--no-tta_flip"],
    ["--model", "ran", "--views", "random", "--bn_per_view"]], ids=lambda m: " ".join(map(str, m)))
def test_crops_get_the_probabilities_that_the_results_hold(tree, tmp_path, capsys, more):
    run = trained(tree, tmp_path, *more)
    names = sorted((tree / "Image" / "aligned").glob("test_*"))
    said = predicted(capsys, "--model_path", run / "last.pth", "--whole", *names,
                     "--csv", tmp_path / "said.csv", "--pictures", tmp_path / "drawn")
    rows = {row["key"].rpartition("/")[2]: row for row in runs.rows(run)}
    assert len(said["faces"]) == 21 == len(list((tmp_path / "drawn").glob("*.jpg")))
    for face in said["faces"]:
        row = rows[face["photo"]]
        assert face["prediction"] == face_tree.CLASSES[int(row["prediction"])]
        for i, name in enumerate(face_tree.CLASSES):
            assert face["probabilities"][name] == pytest.approx(float(row[f"p_{i}"]), abs=2e-5)
    with open(tmp_path / "said.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["prediction"] for row in table] == [f["prediction"] for f in said["faces"]]
    assert float(table[0]["p_fear"]) == pytest.approx(said["faces"][0]["probabilities"]["fear"],
                                                      abs=1e-6)


def test_large_crops_are_read_as_in_training(tmp_path, capsys):
    """JPEGs of twice the side, of which the decoder gives half the lines."""
    folder = tmp_path / "set"
    face_tree.write(folder, side=96)
    run = trained(folder, tmp_path / "r", "--epochs", 1)
    names = sorted((folder / "Image" / "aligned").glob("test_*"))
    said = predicted(capsys, "--model_path", run / "last.pth", "--whole", *names)
    rows = {row["key"].rpartition("/")[2]: row for row in runs.rows(run)}
    for face in said["faces"]:
        assert (face["width"], face["height"]) == (96, 96)
        expected = [float(rows[face["photo"]][f"p_{i}"]) for i in range(7)]
        assert [*face["probabilities"].values()] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("more", [
    ["--model", "vit_tiny_patch16"], ["--model", "vit_tiny_patch16", "--tricks", "--cls_token"],
    ["--model", "convnextv2_atto", "--tta_flip"],
    ["--model", "convnextv2_atto", "--select", "val", "--model_ema", "--model_ema_eval"]],
    ids=lambda m: " ".join(m[1:]))
def test_fine_tuned_models_give_the_probabilities_that_the_results_hold(tree, tmp_path, capsys,
                                                                        monkeypatch, more):
    monkeypatch.setitem(mae.SIZES, "vit_tiny_patch16", (32, 2, 2))
    monkeypatch.setitem(convnextv2.SIZES, "convnextv2_atto", ((1, 1, 2, 1), (8, 16, 24, 32)))
    script("main_finetune").main([str(a) for a in (
        "--data_path", tree, "--input_size", 64, "--epochs", 2, "--batch_size", 14, "--lr", 1e-2,
        "--head_init_scale", 1, "--cache", "off", "--device", "cpu", "--output_dir", tmp_path,
        *more)])
    names = sorted((tree / "Image" / "aligned").glob("test_*"))
    said = predicted(capsys, "--model_path", tmp_path / "last.pth", "--whole", *names)
    rows = {row["key"].rpartition("/")[2]: row for row in runs.rows(tmp_path)}
    assert len(said["faces"]) == 21
    for face in said["faces"]:
        row = rows[face["photo"]]
        assert face["prediction"] == face_tree.CLASSES[int(row["prediction"])]
        for i, name in enumerate(face_tree.CLASSES):
            assert face["probabilities"][name] == pytest.approx(float(row[f"p_{i}"]), abs=2e-5)


def test_an_autoencoder_knows_no_classes(tree, tmp_path, capsys):
    torch.save({"system": "MAE pre-training", "opt": {}, "epoch": 1, "model": {}},
               tmp_path / "last.pth")
    said = runs.refused(capsys, predict, "--model_path", tmp_path / "last.pth", "--whole", tree)
    assert "last.pth" in said and "knows no classes" in said


@pytest.fixture
def found(monkeypatch):
    """In place of the detector: the left and the right half of a photograph that is wide; nothing
    in a small one."""
    def find(pixels, smallest):
        height, width = pixels.shape[:2]
        if width < 50:
            return []
        half = width / 2
        return [detection.Face(detection.Box(x, 0, half, height), np.array(
            [(x + half * a, height * b) for a, b in (
                (.3, .4), (.7, .4), (.5, .6), (.35, .8), (.65, .8))], np.float32), .99)
                for x in (0, half)]
    monkeypatch.setattr(detection, "find_faces", find)
    monkeypatch.setattr(detection, "require", lambda *_: None)


def test_faces_are_cut_as_the_model_was_trained_and_told_with_their_boxes(tree, tmp_path, capsys,
                                                                          found, monkeypatch):
    pytest.importorskip("cv2")
    run = trained(tree, tmp_path)
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    rng = np.random.default_rng(0)
    two = np.concatenate([face_tree.picture(label, rng, 64) for label in (0, 6)], 1)
    Image.fromarray(two).save(photos / "two.png")
    Image.fromarray(two[:40, :40]).save(photos / "below" / "none.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    said = predicted(capsys, "--model_path", run / "last.pth", photos, "--margin", 0)
    assert [(f["photo"], f["face"], f["x"]) for f in said["faces"]] == [
        ("two.png", 1, 0), ("two.png", 2, 64)]
    assert said["without_faces"] == ["below/none.png"] and len(said["unreadable"]) == 1
    # the halves by themselves, as they are
    for i, half in enumerate((two[:, :64], two[:, 64:])):
        Image.fromarray(half).save(tmp_path / f"half{i}.png")
    alone = predicted(capsys, "--model_path", run / "last.pth", "--whole", tmp_path / "half0.png",
                      tmp_path / "half1.png")
    for a, b in zip(said["faces"], alone["faces"]):
        for name, p in a["probabilities"].items():
            assert p == pytest.approx(b["probabilities"][name], abs=.03)
    predict("--model_path", run / "last.pth", photos)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["photo", "face", "prediction"]
    assert "no face: below/none.png" in printed and printed[-1].startswith("unreadable: ")


def test_the_margin_of_detected_sets_is_kept(tree, tmp_path, capsys, found, monkeypatch):
    pytest.importorskip("cv2")
    (tree / "faces.json").write_text(json.dumps({"settings": {"margin": .5, "align": False,
                                                              "size": 48}}))
    run = trained(tree, tmp_path)
    (tree / "faces.json").unlink()
    assert checkpoint.load(run / "last.pth")["crop"] == {"margin": .5, "align": False,
                                                         "size": 48}
    cut, seen = detection.cut_face, []
    monkeypatch.setattr(detection, "cut_face", lambda pixels, face, *framing: (
        seen.append(framing), cut(pixels, face, *framing))[1])
    Image.new("RGB", (128, 64)).save(tmp_path / "x.png")
    predicted(capsys, "--model_path", run / "last.pth", tmp_path / "x.png")
    predicted(capsys, "--model_path", run / "last.pth", tmp_path / "x.png", "--margin", .1)
    assert seen == [(48, .5, False)] * 2 + [(48, .1, False)] * 2


def test_faces_are_brought_to_the_networks_size_as_crops_in_training_are(tree, tmp_path, capsys,
                                                                         found):
    """Crops of 48 pixels for a network that takes 32: cut out first, and reduced then."""
    pytest.importorskip("cv2")
    (tree / "faces.json").write_text(json.dumps({"settings": {"margin": 0, "align": False,
                                                              "size": 48}}))
    run = trained(tree, tmp_path)
    (tree / "faces.json").unlink()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)).save(
        tmp_path / "x.png")
    told = predicted(capsys, "--model_path", run / "last.pth", tmp_path / "x.png")["faces"]
    for i, face in enumerate(detection.find_faces(np.asarray(Image.open(tmp_path / "x.png")), 0)):
        crop = detection.cut_face(np.asarray(Image.open(tmp_path / "x.png")), face, 48, 0, False)
        Image.fromarray(crop).save(tmp_path / f"{i}.png")
    crops = predicted(capsys, "--model_path", run / "last.pth", "--whole", tmp_path / "0.png",
                      tmp_path / "1.png")["faces"]
    for one, other in zip(told, crops, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_what_does_not_fit_is_refused_in_one_line(tree, tmp_path, capsys, found):
    run = trained(tree, tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")

    def refused(*argv):
        return runs.refused(capsys, predict, "--model_path", *argv)
    assert "name some, or folders" in refused(run / "last.pth", "--onset", "a.jpg", "--apex", "b")
    assert "no face in small.png" in refused(run / "last.pth", tmp_path / "small.png")
    assert "nowhere.jpg: no such photograph" in refused(run / "last.pth", "nowhere.jpg")
    torch.save({"system": "FER", "opt": {"model": "scn"}, "epoch": 1, "model": {}, "classes": []},
               tmp_path / "bad.pth")
    assert "bad.pth: cannot be read as a model" in refused(tmp_path / "bad.pth", "--whole",
                                                           tmp_path / "small.png")
    state = checkpoint.load(run / "last.pth")
    for change in ({"crop": [1]}, {"classes": [*range(7)]}, {"opt": state["opt"] | {"size": 64.5}},
                   {"ema": {k: v * np.nan for k, v in state["ema"].items()}}):
        torch.save(state | change, tmp_path / "bad.pth")
        assert "bad.pth: cannot be read as a model" in refused(tmp_path / "bad.pth", "--whole",
                                                               tmp_path / "small.png"), change
    marks = tmp_path / "marks.csv"
    face_tree.write_landmarks(marks, [f"Image/aligned/{p.name}" for p in
                                      (tree / "Image" / "aligned").iterdir()])
    views = trained(tree, tmp_path / "views", "--model", "ran", "--views", "landmark",
                    "--landmarks", marks)
    assert "68 landmarks" in refused(views / "last.pth", "--whole", tmp_path / "small.png")


def test_a_photograph_of_a_person(tree, tmp_path, capsys):
    pytest.importorskip("facenet_pytorch")
    data = pytest.importorskip("skimage.data")
    run = trained(tree, tmp_path, "--epochs", 1)
    Image.fromarray(data.astronaut()).save(tmp_path / "astronaut.jpg")
    said = predicted(capsys, "--model_path", run / "last.pth", tmp_path / "astronaut.jpg",
                     "--pictures", tmp_path / "drawn")
    (face,) = said["faces"]
    assert 150 < face["x"] < 200 and face["score"] > .9
    assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    drawn = np.asarray(Image.open(tmp_path / "drawn" / "astronaut.jpg"), int)
    assert drawn.shape == (512, 512, 3)
    assert (abs(drawn - [0, 255, 0]).sum(-1) < 90).sum() > 100  # the box
