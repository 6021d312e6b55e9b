"""Sets of faces: every layout in small, what is irregular in them, decoding, landmarks."""
import csv
import dataclasses
import os
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import save_image
from PIL import Image

from images import face_sets, faces
from images.decoding import upright_size
from images.faces import CLASSES, FaceSet, decode, read_faces, read_landmarks
from util import BadInput

VOTES = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt",
         "unknown", "NF")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def draw(folder, *names, size=(8, 6)):
    """A small image of its own grey for each name."""
    for i, name in enumerate(names):
        save_image(folder / name, np.full((size[1], size[0], 3), 10 * i, np.uint8))


def rafdb(folder, lines=("train_00001.jpg 5", "train_00002.jpg 1", "test_0001.jpg 7"),
          images=None, place="aligned"):
    """RAF-DB with a list, that lacks the final newline as the published one does."""
    write(folder / "EmoLabel" / "list_patition_label.txt", "\n".join(lines))
    end = "_aligned.jpg" if place == "aligned" else ".jpg"
    for name in images or [line.split()[0] for line in lines]:
        draw(folder / "Image" / place, name.replace(".jpg", end))
    return folder


def table(folder, name, rows, header=True):
    """training.csv or validation.csv of rows (path, box, expression); draws the images."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        if header:
            out.writerow(face_sets.AFFECTNET_COLUMNS)
        for image, box, expression in rows:
            out.writerow([image, *box, "1;2;3;4", expression, -0.5, 0.5])
            draw(folder.parent if "lists" in folder.name else folder,
                 f"Manually_Annotated_Images/{image}")
    return path


BOX = (1, 2, 3, 4)


def tables(folder, train=(("1/a.jpg", BOX, 0), ("2/b.jpg", BOX, 3)),
           test=(("1/c.jpg", BOX, 6),), below=""):
    table(folder / below, "training.csv", train)
    table(folder / below, "validation.csv", test)
    return folder


def arrays(folder, train=(0, "7", 3), test=("6",)):
    for name, labels in (("train_set", train), ("val_set", test)):
        (folder / name / "annotations").mkdir(parents=True)
        for i, label in enumerate(labels):
            number = 9 + i  # 9, 10, …: not in the order of their names
            np.save(folder / name / "annotations" / f"{number}_exp.npy", np.array(label))
            np.save(folder / name / "annotations" / f"{number}_val.npy", np.array(0.25))
            draw(folder / name / "images", f"{number}.jpg")
    return folder


def ballot(**votes):
    return [votes.get(name, 0) for name in VOTES]


BALLOTS = (("Training", "fer0.png", ballot(happiness=8, sadness=2)),
           ("Training", "fer1.png", ballot(neutral=5, anger=4, fear=1)),
           ("PublicTest", "fer2.png", ballot(surprise=10)),
           ("PrivateTest", "fer3.png", ballot(contempt=6, NF=2)))


def ferplus(folder, rows=BALLOTS, pixels=True, usages=None):
    """fer2013new.csv beside fer2013.csv, or beside folders of images."""
    write(folder / "fer2013new.csv", "Usage,Image name," + ",".join(VOTES) + "\n" + "".join(
        ",".join(map(str, [usage, name, *votes])) + "\n" for usage, name, votes in rows))
    if pixels:
        write(folder / "fer2013.csv", "emotion,pixels,Usage\n" + "".join(
            f"0,{' '.join([str(i), *['200'] * 2303])},{usage}\n"
            for i, usage in enumerate(usages or [row[0] for row in rows])))
    else:
        for usage, name, _ in rows:
            draw(folder / face_sets.USAGES[usage][1], *[name] if name else [], size=(48, 48))
    return folder


def label_tables(folder, rows=BALLOTS, box="(0, 0, 48, 48)"):
    """FER2013{Train,Valid,Test}/label.csv with their images."""
    texts = {}
    for usage, name, votes in rows:
        place = face_sets.USAGES[usage][1]
        texts[place] = texts.get(place, "") + f'{name},"{box}",{",".join(map(str, votes))}\n'
        draw(folder / place, *[name] if name else [], size=(48, 48))
    for place, text in texts.items():
        write(folder / place / "label.csv", text)
    return folder


def tree(folder, *names):
    draw(folder, *names)
    return folder


def content(sets):
    """dict split → {path: class name}."""
    return {split: {path: one.classes[label] for path, label in zip(one.paths, one.labels)}
            for split, one in sets.items()}


def refused(dataset, folder, *parts, **options):
    """The text of the BadInput that reading must end in; it is one line."""
    with pytest.raises(BadInput) as error:
        read_faces(dataset, folder, **options)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text
    return text


# ---------------------------------------------------------------- RAF-DB

@pytest.mark.parametrize("place", ["aligned", "original"])
def test_rafdb_list(tmp_path, place):
    sets = read_faces("rafdb", rafdb(tmp_path, place=place))
    end = "_aligned" if place == "aligned" else ""
    assert content(sets) == {
        "train": {f"Image/{place}/train_00001{end}.jpg": "sadness",
                  f"Image/{place}/train_00002{end}.jpg": "surprise"},
        "test": {f"Image/{place}/test_0001{end}.jpg": "neutral"}}
    train = sets["train"]
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [4, 0]
    assert (train.name, train.classes, train.n_label) == ("rafdb", CLASSES["rafdb"], 7)
    assert train.boxes is None and train.pixels is None and not train.rendered
    assert train.subjects == ["", ""]


def test_rafdb_aligned_images_go_before_original_ones(tmp_path):
    rafdb(tmp_path, place="original")
    sets = read_faces("rafdb", rafdb(tmp_path))
    assert sets["test"].paths == ["Image/aligned/test_0001_aligned.jpg"]


def test_rafdb_list_in_the_other_spelling(tmp_path):
    folder = rafdb(tmp_path) / "EmoLabel"
    (folder / "list_patition_label.txt").rename(folder / "list_partition_label.txt")
    assert len(read_faces("rafdb", tmp_path)["train"]) == 2


@pytest.mark.parametrize("test", ["test", "val"])
def test_rafdb_class_folders(tmp_path, test):
    tree(tmp_path, "train/2/b.jpg", "train/1/a.jpg", f"{test}/7/c.png")
    assert content(read_faces("rafdb", tmp_path)) == {
        "train": {"train/1/a.jpg": "surprise", "train/2/b.jpg": "fear"},
        "test": {f"{test}/7/c.png": "neutral"}}


@pytest.mark.parametrize("line, part", [
    ("train_00003.jpg 8", "label '8' is not one of 1..7"),
    ("train_00003.jpg 0", "label '0'"), ("train_00003.jpg x", "label 'x'"),
    ("train_00003.jpg", "is not 'train_<number>.jpg <label>'"),
    ("other_00003.jpg 1", "is not 'train_<number>.jpg <label>'"),
    ("train_00001.jpg 4", "train_00001_aligned.jpg is happiness, but "),
    ("train_../../x.jpg 4", "leads outside")])
def test_rafdb_malformed_lines(tmp_path, line, part):
    rafdb(tmp_path, images=["train_00001.jpg"])
    path = tmp_path / "EmoLabel" / "list_patition_label.txt"
    path.write_text(path.read_text() + "\n" + line)
    refused("rafdb", tmp_path, f"{path}:4: ", part)


def test_repeated_lines_are_counted_and_one_is_kept(tmp_path, capsys):
    rafdb(tmp_path, ("train_1.jpg 5", "train_2.jpg 1", "train_1.jpg 5", "test_1.jpg 1"))
    assert len(read_faces("rafdb", tmp_path)["train"]) == 2
    path = tmp_path / "EmoLabel" / "list_patition_label.txt"
    assert f"lines that repeat an image, one of them kept: 1 ({path}:3)" in capsys.readouterr().out


def test_missing_images_are_counted_named_and_left_out(tmp_path, capsys):
    lines = [f"train_{i}.jpg {1 + i % 2}" for i in range(6)] + ["test_1.jpg 1"]
    rafdb(tmp_path, lines, ["train_4.jpg", "train_5.jpg", "test_1.jpg"])
    sets = read_faces("rafdb", tmp_path)
    assert sets["train"].paths == [f"Image/aligned/train_{i}_aligned.jpg" for i in (4, 5)]
    assert ("listed images missing, left out: 4 (Image/aligned/train_0_aligned.jpg, "
            "Image/aligned/train_1_aligned.jpg, Image/aligned/train_2_aligned.jpg, …)"
            ) in capsys.readouterr().out


def test_no_image_there_at_all(tmp_path):
    shutil.rmtree(rafdb(tmp_path) / "Image")
    refused("rafdb", tmp_path, f"{tmp_path / 'Image' / 'original'}: none of the 2 listed images of "
            f"train exists, Image/original/train_00001.jpg the first")


def test_folders_that_are_no_set(tmp_path):
    for name in ("rafdb", "affectnet7"):
        refused(name, tmp_path, f"{tmp_path}: neither the set's lists nor a folder train/")
    refused("ferplus", tmp_path, "label.csv: missing; a folder of FERPlus holds fer2013new.csv")
    refused("folder", tmp_path, "no image of folder's train split")
    refused("folder", tmp_path / "absent", "no such folder")
    refused("cohn", tmp_path, "they are rafdb, affectnet7, affectnet8, ferplus, folder")
    write(tmp_path / "EmoLabel" / "list_patition_label.txt", "\n")
    refused("rafdb", tmp_path, "list_patition_label.txt: empty")


def test_a_split_without_images(tmp_path):
    refused("rafdb", rafdb(tmp_path, ("train_1.jpg 1", "train_2.jpg 2")),
            "no image of rafdb's test split")


def test_one_class_alone_is_refused(tmp_path):
    refused("rafdb", rafdb(tmp_path, ("train_1.jpg 1", "test_1.jpg 2")), "fewer than two classes")


# ---------------------------------------------------------------- AffectNet

@pytest.mark.parametrize("below", ["", "Manually_Annotated_file_lists"])
def test_affectnet_tables(tmp_path, capsys, below):
    more = [("3/n.jpg", BOX, 8), ("3/u.jpg", BOX, 9), ("3/o.jpg", BOX, 10), ("3/p.jpg", BOX, 10)]
    train = [("1/a.jpg", (1, 2, 3.5, 4), 0), ("2/b.jpg", ("", "NULL", "", ""), 3), *more,
             ("1/d.JPG", (0, 0, 0, 0), 7)]
    tables(tmp_path, train, below=below)
    sets = read_faces("affectnet8", tmp_path)
    at = "Manually_Annotated_Images/"
    assert content(sets) == {
        "train": {at + "1/a.jpg": "neutral", at + "2/b.jpg": "surprise",
                  at + "1/d.JPG": "contempt"},
        "test": {at + "1/c.jpg": "anger"}}
    boxes = sets["train"].boxes
    assert boxes.dtype == np.float32 and boxes[0].tolist() == [1, 2, 4.5, 6]
    assert np.isnan(boxes[1:]).all()
    said = capsys.readouterr().out
    assert f"rows without a box, the whole image taken: 2 ({tmp_path / below}/training.csv:3, …)" \
        in said
    for line in ("expression 8, none, left out: 1 (", "expression 9, uncertain, left out: 1 (",
                 "expression 10, no face, left out: 2 (Manually_Annotated_Images/3/o.jpg, …)"):
        assert f"  images of {line}" in said
    seven = read_faces("affectnet7", tmp_path)
    assert seven["train"].n_label == 7 and len(seven["train"]) == 2
    assert "expression 7, contempt, left out: 1 (" in capsys.readouterr().out


def test_the_size_of_a_photograph_of_a_telephone_is_read(tmp_path):
    Image.new("1", (8000, 7000)).save(tmp_path / "large.png")
    assert upright_size(tmp_path / "large.png") == (8000, 7000)


def test_affectnet_table_without_header_and_with_backslashes(tmp_path):
    tables(tmp_path)
    path = table(tmp_path, "validation.csv", [("1/c.jpg", BOX, 6), ("1/e.jpg", BOX, 2)], False)
    path.write_text(path.read_text().replace("1/e", "1\\e"))
    assert list(content(read_faces("affectnet8", tmp_path))["test"].values()) == ["anger",
                                                                                  "sadness"]


@pytest.mark.parametrize("change, line, part", [
    (lambda text: text.replace(",0,-0.5", ",11,-0.5"), 2, "expression '11' is not one of 0..10"),
    (lambda text: text.replace(",0,-0.5", ",happy,-0.5"), 2, "expression 'happy'"),
    (lambda text: text.replace("2/b.jpg,", ""), 3, "8 fields, not as many as the header (9)"),
    (lambda text: text.replace("face_x", "x"), 1, "no column 'face_x'"),
    (lambda text: text + text.splitlines()[1].replace(",0,-0.5", ",4,-0.5"), 4,
     "1/a.jpg is fear, but "),
    (lambda text: "", 1, "no column")])
def test_affectnet_malformed_tables(tmp_path, change, line, part):
    path = tables(tmp_path) / "training.csv"
    path.write_text(change(path.read_text()))
    refused("affectnet8", tmp_path, f"{path}:{line}: ", part)


def test_affectnet_lacks_one_of_its_tables(tmp_path):
    path = tables(tmp_path) / "validation.csv"
    path.unlink()
    refused("affectnet8", tmp_path, f"{path}: missing; ")


def test_images_of_two_splits_are_tested_alone(tmp_path, capsys):
    tables(tmp_path, (("1/a.jpg", BOX, 0), ("2/b.jpg", BOX, 3), ("1/c.jpg", BOX, 6)))
    sets = read_faces("affectnet8", tmp_path)
    assert len(sets["train"]) == 2 and sets["test"].paths == ["Manually_Annotated_Images/1/c.jpg"]
    assert "images in test too, left out of train: 1 (" in capsys.readouterr().out


def test_affectnet_arrays(tmp_path, capsys):
    arrays(tmp_path, train=(0, "7", 3, np.uint8(4), "9", 2.0))
    refused("affectnet8", tmp_path, "14_exp.npy: expression '2.0' is not one of 0..10")
    for end in ("exp", "val"):
        (tmp_path / "train_set" / "annotations" / f"14_{end}.npy").unlink()
    sets = read_faces("affectnet8", tmp_path)
    assert content(sets) == {
        "train": {f"train_set/images/{n}.jpg": name for n, name in
                  ((9, "neutral"), (10, "contempt"), (11, "surprise"), (12, "fear"))},
        "test": {"val_set/images/9.jpg": "anger"}}
    assert sets["train"].paths[0].endswith("/9.jpg")  # in the order of their numbers
    said = capsys.readouterr().out
    assert "images without an annotation, left out: 1 (train_set/images/14.jpg)" in said
    assert "images of expression 9, uncertain, left out: 1 (train_set/images/13.jpg)" in said
    assert len(read_faces("affectnet7", tmp_path)["train"]) == 3


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b"no array"), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: np.save(path, np.array([1, 2])),
    lambda path: np.save(path, np.array({"a": 1}), allow_pickle=True)])
def test_affectnet_array_that_cannot_be_read(tmp_path, spoil):
    path = arrays(tmp_path) / "train_set" / "annotations" / "10_exp.npy"
    spoil(path)
    refused("affectnet8", tmp_path, f"{path}: not an array of one number")


def test_affectnet_class_folders(tmp_path, capsys):
    tree(tmp_path, "train/0/a.jpg", "train/1/b.jpg", "train/7/c.jpg", "train/7/d.jpg",
         "val/1/e.jpg")
    assert list(content(read_faces("affectnet8", tmp_path))["train"].values()) == [
        "neutral", "happiness", "contempt", "contempt"]
    assert len(read_faces("affectnet7", tmp_path)["train"]) == 2
    assert "expression 7, contempt, left out: 2 (train/7/c.jpg, …)" in capsys.readouterr().out
    draw(tmp_path, "train/happy/a.jpg")
    refused("affectnet8", tmp_path, "expression 'happy' is not one of 0..10")


def test_hidden_files_are_no_arrays(tmp_path, capsys):
    folder = arrays(tmp_path) / "train_set"
    (folder / "annotations" / "._9_exp.npy").write_bytes(b"AppleDouble")
    (folder / "images" / "._9.jpg").write_bytes(b"AppleDouble")
    assert len(read_faces("affectnet8", tmp_path)["train"]) == 3
    assert "left out" not in capsys.readouterr().out


# ---------------------------------------------------------------- FERPlus

@pytest.mark.parametrize("votes, majority, plurality", [
    (ballot(happiness=6, neutral=4), 1, 1),
    (ballot(happiness=5, neutral=5), -1, -1),            # half is no majority; a tie
    (ballot(happiness=4, neutral=3, fear=3), -1, 1),
    (ballot(happiness=4, neutral=3, fear=1, anger=1, disgust=1), 1, 1),  # single votes fall away
    (ballot(happiness=2, neutral=1, fear=1, anger=1, disgust=1), 1, 1),
    (ballot(happiness=5, unknown=5), -1, -1),            # unknown counts among what is left
    (ballot(contempt=6, unknown=4), 7, 7),
    (ballot(unknown=6, anger=4), 8, 8), (ballot(NF=8, neutral=2), 9, 9),
    (ballot(unknown=4, anger=3, fear=3), -1, 8),
    (ballot(happiness=1, neutral=1, unknown=1), -2, -2), (ballot(), -2, -2)])
def test_votes(votes, majority, plurality):
    assert face_sets.decide(np.array([votes]), "majority").tolist() == [majority]
    assert face_sets.decide(np.array([votes]), "plurality").tolist() == [plurality]


def test_ferplus_table_of_pixels(tmp_path):
    sets = read_faces("ferplus", ferplus(tmp_path))
    assert content(sets) == {
        "train": {"fer2013.csv:0": "happiness", "fer2013.csv:1": "neutral"},
        "val": {"fer2013.csv:2": "surprise"}, "test": {"fer2013.csv:3": "contempt"}}
    pixels = sets["train"].pixels
    assert pixels.dtype == np.uint8 and pixels.shape == (2, 48, 48)
    assert pixels[:, 0, 0].tolist() == [0, 1] and (pixels[:, 0, 1:] == 200).all()
    assert sets["test"].pixels[0, 0, 0] == 3 and sets["test"].boxes is None
    image = decode(sets["test"], 0, 48)
    assert image.shape == (3, 48, 48) and (image == sets["test"].pixels[0]).all()
    assert decode(sets["test"], 0, 64).shape == (3, 64, 64)


def test_ferplus_images_named_by_the_table(tmp_path):
    assert content(read_faces("ferplus", ferplus(tmp_path, pixels=False))) == {
        "train": {"FER2013Train/fer0.png": "happiness", "FER2013Train/fer1.png": "neutral"},
        "val": {"FER2013Valid/fer2.png": "surprise"},
        "test": {"FER2013Test/fer3.png": "contempt"}}


def test_ferplus_tables_of_splits(tmp_path):
    sets = read_faces("ferplus", label_tables(tmp_path, box="(4, 0, 48, 44)"))
    plain = read_faces("ferplus", ferplus(tmp_path / "other", pixels=False))
    assert content(sets) == content(plain)
    assert sets["train"].boxes.tolist() == [[4, 0, 48, 44]] * 2
    shutil.rmtree(tmp_path / "FER2013Valid")
    assert list(read_faces("ferplus", tmp_path)) == ["train", "test"]


ODD = (("Training", "fer4.png", ballot(happiness=5, neutral=5)),
       ("Training", "fer5.png", ballot(unknown=9)), ("Training", "", ballot(NF=10)),
       ("Training", "fer6.png", ballot(NF=10)), ("Training", "fer7.png", ballot(anger=1)),
       ("Training", "fer8.png", ballot(happiness=5, neutral=5)))


@pytest.mark.parametrize("layout", [ferplus, label_tables])
def test_ferplus_rows_that_are_left_out(tmp_path, capsys, layout):
    layout(tmp_path, BALLOTS[:2] + ODD + BALLOTS[2:])
    for votes, text in (("majority", "majority"), ("plurality", "plurality")):
        sets = read_faces("ferplus", tmp_path, votes)
        assert [len(one) for one in sets.values()] == [2, 1, 1]
        said = capsys.readouterr().out
        for line in (f"images without a {text} of votes, left out: 2", "images voted unknown, left "
                     "out: 1", "images voted no face, left out: 1", "rows that name no image, left "
                     "out: 1", "images without two votes for the same, left out: 1"):
            assert f"  {line} (" in said
    if layout is ferplus:  # each row keeps its pixels when others are left out
        assert sets["test"].paths == ["fer2013.csv:9"] and sets["test"].pixels[0, 0, 0] == 9


@pytest.mark.parametrize("name, change, line, part", [
    ("fer2013new.csv", lambda t: t.replace("PublicTest", "Public"), 4, "Usage 'Public' is not"),
    ("fer2013new.csv", lambda t: t.replace("10", "ten"), 4, "votes for surprise 'ten' is not"),
    ("fer2013new.csv", lambda t: t.replace("10", "-1"), 4, "votes for surprise '-1' is not"),
    ("fer2013new.csv", lambda t: t.replace("contempt", "scorn"), 1, "no column 'contempt'"),
    ("fer2013new.csv", lambda t: t.replace("fer2.png,", ""), 4, "11 fields"),
    ("fer2013.csv", lambda t: t.replace("200,PublicTest", "256,PublicTest"), 4, "48x48 numbers"),
    ("fer2013.csv", lambda t: t.replace("200,PublicTest", "x,PublicTest"), 4, "48x48 numbers"),
    ("fer2013.csv", lambda t: t.replace(" 200,PublicTest", ",PublicTest"), 4, "48x48 numbers"),
    ("fer2013.csv", lambda t: t.replace("PublicTest", "Training"), 4, "hold the same rows"),
    ("fer2013.csv", lambda t: t.replace("pixels", "image"), 1, "needs the columns"),
    ("fer2013.csv", lambda t: t.rpartition("0,3 ")[0], None, "3 rows, but fer2013new.csv has 4")])
@pytest.mark.filterwarnings("ignore:string or file could not be read")
def test_ferplus_malformed_tables(tmp_path, name, change, line, part):
    path = ferplus(tmp_path) / name
    path.write_text(change(path.read_text()))
    refused("ferplus", tmp_path, f"{path}:{line}: " if line else f"{path}: ", part)


def test_ferplus_malformed_tables_of_splits(tmp_path):
    path = label_tables(tmp_path) / "FER2013Train" / "label.csv"
    text = path.read_text()
    for broken in (text.replace("(0, 0, 48, 48)", "0 0 48 48"), text.replace("fer0.png,", ""),
                   text.replace(",8,", ",")):
        path.write_text(broken)
        refused("ferplus", tmp_path, f"{path}:1: ", "is not '<file>,\"(<left>, <top>,")
    refused("ferplus", tmp_path, "majority or plurality", votes="all")


# ---------------------------------------------------------------- any folder

def test_folder_with_splits(tmp_path, capsys):
    tree(tmp_path, "train/c10/a.jpg", "train/c2/b.PNG", "train/c2/deep/er/b.webp", "valid/c2/c.bmp",
         "test/c10/d.tif", "more/x.jpg", "train/.hidden/a.jpg")
    write(tmp_path / "train" / "c2" / "notes.txt", "")
    write(tmp_path / "train" / "c2" / ".DS_Store", "")
    (tmp_path / "train" / "c3").mkdir()
    sets = read_faces("folder", tmp_path)
    assert sets["test"].classes == ("c2", "c10")  # natural order; without the empty c3
    assert content(sets) == {
        "train": {"train/c2/b.PNG": "c2", "train/c2/deep/er/b.webp": "c2",
                  "train/c10/a.jpg": "c10"},
        "val": {"valid/c2/c.bmp": "c2"}, "test": {"test/c10/d.tif": "c10"}}
    said = capsys.readouterr().out
    for line in ("empty class folders: 1 (train/c3)",
                 "folders beside the splits, left out: 1 (more)",
                 "files that are no images, left out: 1 (train/c2/notes.txt)"):
        assert f"  {line}\n" in said


def test_folder_where_the_validation_split_is_the_test_split(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/2.jpg")
    sets = read_faces("folder", tmp_path)
    assert list(sets) == ["train", "test"] and sets["test"].paths == ["val/b/2.jpg"]


@pytest.mark.parametrize("names", [("Train", "Validation", "Test"), ("training", "VAL", "testing"),
                                   ("TRAINING", "valid", "test")])
def test_splits_by_other_names(tmp_path, names):
    tree(tmp_path, *(f"{split}/{name}/1.jpg" for split in names for name in "ab"))
    sets = read_faces("folder", tmp_path)
    assert {split: one.paths for split, one in sets.items()} == {
        split: [f"{name}/a/1.jpg", f"{name}/b/1.jpg"]
        for split, name in zip(("train", "val", "test"), names)}
    tree(tmp_path, "tEst/a/1.jpg")
    refused("folder", tmp_path, "tEst/", f"{names[2]}/", "keep one of them")


def test_class_folders_that_are_no_utf8_are_named_and_left_out(tmp_path, capsys):
    tree(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "test") for name in "12"))
    odd = os.fsdecode(b"d\xe9go\xfbt")
    for place in (f"train/{odd}", odd):
        (tmp_path / place).mkdir()
        shutil.copyfile(tmp_path / "train/1/1.jpg", tmp_path / place / "1.jpg")
    for name in ("folder", "rafdb"):
        assert len(read_faces(name, tmp_path)["train"]) == 2
        assert "  names that are no UTF-8, left out: " in capsys.readouterr().out


def test_folder_without_splits(tmp_path):
    tree(tmp_path, "sad/1.jpg", "happy/1.jpg")
    sets = read_faces("folder", tmp_path)
    assert content(sets) == {"train": {"happy/1.jpg": "happy", "sad/1.jpg": "sad"}}


def test_folders_that_are_refused(tmp_path):
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/c/2.jpg")
    refused("folder", tmp_path, f"{tmp_path / 'test' / 'c'}: a class without images in train/")
    tree(tmp_path / "two", "train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg")
    refused("folder", tmp_path / "two", "val/ and valid/")
    tree(tmp_path / "no", "test/a/1.jpg", "val/b/1.jpg")
    refused("folder", tmp_path / "no", "holds test/ and val/ but no train/")
    tree(tmp_path / "one", "a/1.jpg")
    refused("folder", tmp_path / "one", "fewer than two classes")


# ---------------------------------------------------------------- what all share

def test_subjects(tmp_path, capsys):
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/b/2.jpg", "val/a/3.jpg")
    text = "path,subject\ntrain/a/1.jpg,s1\ntest/b/2.jpg,s2\nval/a/3.jpg,s1\nelsewhere.jpg,s9\n"
    path = write(tmp_path / "subjects.csv", text + "train/b/1.jpg,s2\n")
    sets = read_faces("folder", tmp_path)
    assert sets["train"].subjects == ["s1", "s2"] and sets["test"].subjects == ["s2"]
    said = capsys.readouterr().out
    assert "subjects in train and test both: 1 (s2)" in said
    assert "subjects in train and val both: 1 (s1)" in said and "val and test both" not in said
    for more in ("", "train/b/1.jpg,\n"):
        path.write_text(text + more)
        refused("folder", tmp_path, f"{path}: no subject of 1 images, train/b/1.jpg the first")
    path.write_text(text + "train/a/1.jpg,s3\n")
    refused("folder", tmp_path, f"{path}:6: train/a/1.jpg is of s1 above, of s3 here")
    path.write_text("image,subject\n")
    refused("folder", tmp_path, f"{path}:1: no column 'path'")


def test_subjects_of_pixels(tmp_path):
    write(ferplus(tmp_path) / "subjects.csv", "path,subject\n" + "".join(
        f"fer2013.csv:{i},p{i}\n" for i in range(4)))
    assert read_faces("ferplus", tmp_path)["train"].subjects == ["p0", "p1"]


def test_subset_and_digest(tmp_path):
    sets = read_faces("affectnet8", tables(tmp_path, [
        (f"1/{i}.jpg", (i, 0, 5, 5), i % 4) for i in range(6)]))
    train = sets["train"]
    some = train.subset(np.array([4, 1]))
    assert len(some) == 2 and some.labels.tolist() == [0, 1]
    assert some.paths == [train.paths[4], train.paths[1]]
    assert some.boxes[:, 0].tolist() == [4, 1]
    assert train.subset(train.labels == 1).paths == [train.paths[1], train.paths[5]]
    assert train.subset(np.arange(6)).digest() == train.digest() != some.digest()
    fields = vars(train)
    for name, value in (("name", "rafdb"), ("classes", ("a",)), ("paths", train.paths[::-1]),
                        ("labels", train.labels[::-1]), ("subjects", ["s"] * 6),
                        ("boxes", train.boxes + 1), ("boxes", None)):
        assert FaceSet(**{**fields, name: value}).digest() != train.digest()
    pixels = read_faces("ferplus", ferplus(tmp_path / "p"))["train"]
    assert pixels.subset(np.array([1])).pixels[0, 0, 0] == 1


def of_counts(name, split, counts, **more):
    """A FaceSet of as many images of each class, and no files."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return {split: FaceSet(name, "f", CLASSES[name], [""] * len(labels), labels, [], None, None,
                           more.get("rendered", False))}


def test_counts_are_printed_beside_published_ones(capsys):
    train = (1290, 281, 717, 4772, 1982, 705, 2524)
    faces.report(of_counts("rafdb", "train", train))
    assert capsys.readouterr().out.splitlines() == [
        "rafdb: 12,271 images in f",
        "  train 12,271: surprise 1,290, fear 281, disgust 717, happiness 4,772, sadness 1,982, "
        "anger 705, neutral 2,524; as published"]
    faces.report(of_counts("affectnet8", "test", (500,) * 7 + (499,)))
    assert capsys.readouterr().out.endswith(
        "contempt 499; published: 4,000 in all, contempt 500\n")
    faces.report(of_counts("rafdb", "train", (1291, 280, *train[2:])))
    assert "; published: surprise 1,290, fear 281\n" in capsys.readouterr().out
    faces.report(of_counts("rafdb", "train", (1, 0, 2, 2, 2, 2, 2), rendered=True))
    said = capsys.readouterr().out
    assert "published" not in said and "11 images in f, rendered" in said
    assert "  warning: no training image of fear\n" in said


def test_published_counts_of_training_and_validation_images_together(capsys):
    both = np.array((9913, 8146, 3547, 3370, 2387, 141, 596, 136))
    val = np.array((1000, 800, 400, 400, 300, 141, 100, 50))
    sets = {**of_counts("ferplus", "train", both - val), **of_counts("ferplus", "val", val)}
    faces.report(sets)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("; as published") and lines[2].endswith("; as published")
    assert lines[3] == "  train + val 28,236; as published"
    faces.report(sets, votes="plurality")
    assert "published" not in capsys.readouterr().out


def test_published_counts_add_up():
    totals = {name: {split: n if isinstance(n, int) else sum(n) for split, n in counts.items()}
              for name, counts in faces.PUBLISHED.items()}
    assert totals == {"rafdb": {"train": 12271, "test": 3068},
                      "affectnet8": {"train": 287651, "test": 4000},
                      "affectnet7": {"train": 283901, "test": 3500},
                      "ferplus": {"train": 25045, "val": 3191, "train + val": 28236, "test": 3137}}
    for name, counts in faces.PUBLISHED.items():
        assert {len(n) for n in counts.values() if not isinstance(n, int)} == {len(CLASSES[name])}


def test_rendered_sets_say_so(tmp_path):
    write(rafdb(tmp_path) / "rendered.json", "{}")
    assert read_faces("rafdb", tmp_path)["train"].rendered


# ---------------------------------------------------------------- decoding

def one(folder, name, box=None):
    boxes = None if box is None else np.array([box], np.float32)
    return FaceSet("folder", folder, ("a", "b"), [name], np.zeros(1, np.int64), [""], boxes, None,
                   False)


def resized(pixels, side):
    image = Image.fromarray(pixels).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


def test_decode_brings_the_whole_image_to_a_square(tmp_path, photo):
    save_image(tmp_path / "a.png", photo)
    whole = decode(one(tmp_path, "a.png"), 0, 32)
    assert whole.dtype == np.uint8 and whole.shape == (3, 32, 32)
    assert (whole == resized(photo, 32)).all()
    assert (decode(one(tmp_path, "a.png", [np.nan] * 4), 0, 32) == whole).all()


@pytest.mark.parametrize("box, rows, columns", [
    ((10, 20, 50, 55), (20, 55), (10, 50)),
    ((-30, 20, 40, 99), (20, 60), (0, 40)),  # clipped to the image
    ((0, 0, 90, 60), (0, 60), (0, 90))])
def test_decode_cuts_the_box_out_before_it_resizes(tmp_path, photo, box, rows, columns):
    save_image(tmp_path / "a.png", photo)
    cut = photo[slice(*rows), slice(*columns)]
    assert (decode(one(tmp_path, "a.png", box), 0, 24) == resized(cut, 24)).all()


def test_decode_of_a_box_in_a_reduced_jpeg(tmp_path):
    """A ramp shows where the box lies to a fraction of a pixel, whatever is decoded of it."""
    y, x = np.mgrid[:801, :1203]
    ramp = np.stack([x / 1203 * 250, y / 801 * 250, 0 * x], -1).round().astype(np.uint8)
    save_image(tmp_path / "a.jpg", ramp, quality=98)
    box = (403, 203, 1203, 801)
    image = decode(one(tmp_path, "a.jpg", box), 0, 50).astype(float)
    middle = (np.arange(50) + 0.5) / 50
    for channel, low, high, length, axis in ((0, 403, 1203, 1203, 0), (1, 203, 801, 801, 1)):
        wanted = (low + middle * (high - low)) / length * 250
        assert np.abs(image[channel].mean(axis) - wanted).max() < 0.8


def test_decode_turns_images_upright_and_takes_grey_ones(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture's top is on the right
    save_image(tmp_path / "t.png", photo, exif=exif)
    upright = np.rot90(photo, -1)
    assert (decode(one(tmp_path, "t.png"), 0, 32) == resized(upright.copy(), 32)).all()
    box = (5, 30, 45, 80)  # of the upright image: beyond the height of the stored one
    cut = upright[30:80, 5:45].copy()
    assert (decode(one(tmp_path, "t.png", box), 0, 32) == resized(cut, 32)).all()
    save_image(tmp_path / "g.png", photo[..., 0])
    grey = decode(one(tmp_path, "g.png"), 0, 32)
    assert (grey == resized(photo[..., 0], 32)).all() and (grey[0] == grey[2]).all()


@pytest.mark.parametrize("box", [None, (0, 0, 5, 5)])
def test_decode_of_what_is_no_image(tmp_path, photo, box):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(BadInput, match=r"a\.jpg: not a readable image"):
        decode(one(tmp_path, "a.jpg", box), 0, 8)
    save_image(tmp_path / "b.jpg", photo)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:-300])
    with pytest.raises(BadInput, match=r"b\.jpg: cannot be decoded"):
        decode(one(tmp_path, "b.jpg", box), 0, 8)


def test_decode_of_a_box_outside_the_image(tmp_path):
    draw(tmp_path, "a.png")
    for box in ((8, 0, 12, 5), (3, 3, 3, 5), (5, 1, 2, 4)):
        with pytest.raises(BadInput, match="lies outside its 8x6 pixels"):
            decode(one(tmp_path, "a.png", box), 0, 8)


# ---------------------------------------------------------------- landmarks

def landmarks(path, rows, k=5):
    """A table of landmarks; rows: path → [x, y] for all points, or text of the row."""
    text = "path," + ",".join(f"x{i},y{i}" for i in range(1, k + 1)) + "\n"
    for key, value in rows:
        text += key + "," + (value if isinstance(value, str) else
                             ",".join([f"{value[0]},{value[1]}"] * k)) + "\n"
    return write(path, text)


@pytest.mark.parametrize("k", [5, 68])
def test_landmarks_are_shares_of_the_image(tmp_path, k):
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/3.png")  # 8 x 6 pixels
    train = read_faces("folder", tmp_path)["train"]
    rows = [("b\\1.png", (4, 3)), ("a/2.png", (8, 0)), ("elsewhere.png", (1, 1)),
            ("3.png", "," * (2 * k - 1))]
    path = landmarks(tmp_path / "l.csv", rows, k)
    points = read_landmarks(path, train)
    assert points.shape == (4, k, 2) and points.dtype == np.float32
    assert np.isnan(points[[0, 3]]).all()
    assert np.allclose(points[1], [1, 0]) and np.allclose(points[2], [0.5, 0.5])


def test_landmarks_are_shares_of_the_box(tmp_path):
    names = [("1/a.png", (2, 1, 4, 4), 0), ("1/b.png", (-2, 2, 6, 99), 1), ("1/c.png", [""] * 4, 2)]
    train = read_faces("affectnet8", tables(tmp_path, names))["train"]
    path = landmarks(tmp_path / "l.csv", [(f"{name}.png", (3, 4)) for name in "abc"])
    points = read_landmarks(path, train)  # 8 x 6 pixels; boxes 2..6 x 1..5, clipped 0..4 x 2..6
    assert np.allclose(points[:, 0], [[0.25, 0.75], [0.75, 0.5], [3 / 8, 4 / 6]])


def test_landmarks_of_turned_images_and_of_pixels(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 8
    save_image(tmp_path / "t.jpg", photo, exif=exif)  # 60 x 90 pixels once it is upright
    points = read_landmarks(landmarks(tmp_path / "l.csv", [("t.jpg", (30, 30))]),
                            one(tmp_path, "t.jpg"))
    assert np.allclose(points[0, 0], [1 / 2, 1 / 3])
    train = read_faces("ferplus", ferplus(tmp_path / "p"))["train"]
    points = read_landmarks(landmarks(tmp_path / "p.csv", [("fer2013.csv:1", (12, 36))]), train)
    assert np.isnan(points[0]).all() and np.allclose(points[1], [0.25, 0.75])


@pytest.mark.parametrize("rows, part", [
    ([("a/1.png", "1,2,3")], ":2: 4 fields, not as many as the header (11)"),
    ([("a/1.png", (1, "x"))], ":2: a coordinate is no number"),
    ([("a/1.png", (1, "nan"))], ":2: a coordinate is no number"),
    ([("a/1.png", (1, ""))], ":2: a coordinate is no number"),
    ([("a/1.png", (1, 1)), ("2.png", (1, 1)), ("a/2.png", (1, 1))], ":4: a/2.png is in line 3"),
    ([("1.png", (1, 1))], ":2: 1.png is the name of a/1.png and b/1.png; give the path"),
    ([("c.png", (1, 1))], ": names none of the 3 images, a/1.png the first"), ([], ": names none")])
def test_landmarks_that_are_refused(tmp_path, rows, part):
    train = read_faces("folder", tree(tmp_path, "a/1.png", "a/2.png", "b/1.png"))["train"]
    path = landmarks(tmp_path / "l.csv", rows)
    with pytest.raises(BadInput, match=re.escape(f"{path}{part}")):
        read_landmarks(path, train)


def test_tables_that_hold_no_landmarks(tmp_path):
    train = read_faces("folder", tree(tmp_path, "a/1.png", "b/1.png"))["train"]
    for text, part in (("path,x1,y1\n", "3 columns"), ("", "1 columns"),
                       ("key" + ",x" * 10 + "\n", "11 columns")):
        with pytest.raises(BadInput, match=f"l.csv:1: {part}; it has path,x1,y1,"):
            read_landmarks(write(tmp_path / "l.csv", text), train)
    with pytest.raises(BadInput, match="missing"):
        read_landmarks(tmp_path / "absent.csv", train)


def test_a_bare_name_of_two_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        for k, name in enumerate(("a", "b")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(place / f"{name if split == 'train' else 'a'}{k}.png")
    splits = faces.read_faces("folder", tmp_path)
    header = "path," + ",".join(f"{axis}{i}" for i in range(1, 6) for axis in "xy")
    (tmp_path / "marks.csv").write_text(f"{header}\na0.png" + ",1" * 10 + "\n")
    every = [path for images in splits.values() for path in images.paths]
    with pytest.raises(BadInput, match=r"a0.png is the name of .* and .*; give the path"):
        faces.read_landmarks(tmp_path / "marks.csv", splits["train"], every)
    points = faces.read_landmarks(tmp_path / "marks.csv", splits["train"])
    assert np.isnan(points[:, 0, 0]).tolist() == [False, True]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_a_folder_named_like_an_image_is_looked_into(tmp_path):
    (tmp_path / "d" / "b.jpg").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "b.jpg" / "a.png")
    assert faces.read_unlabelled(tmp_path / "d").paths == ["b.jpg/a.png"]


def test_test_images_beside_a_training_split_are_not_pretrained_on(tmp_path):
    for name in ("Training", "Test"):
        draw(tmp_path / "d" / name / "a", "1.png")
    images = faces.read_unlabelled(tmp_path / "d")
    assert images.folder == tmp_path / "d" / "Training" and images.paths == ["a/1.png"]
    draw(tmp_path / "d" / "train" / "a", "2.png")
    with pytest.raises(BadInput, match="are both the training split"):
        faces.read_unlabelled(tmp_path / "d")


def test_a_link_to_itself_is_an_image_that_cannot_be_read(tmp_path):
    draw(tmp_path / "d/a", "1.png")
    (tmp_path / "d/a/loop.png").symlink_to("loop.png")
    images = faces.read_unlabelled(tmp_path / "d")
    assert images.paths == ["a/1.png", "a/loop.png"]
    assert len(faces.content(images)) == 64


def test_links_in_a_circle_and_names_that_cannot_be_printed_are_left_out(tmp_path, capsys):
    draw(tmp_path / "d/1/a", "1.png")
    draw(tmp_path / "other", "2.png")
    (tmp_path / "d/1/a/up").symlink_to("../..")
    (tmp_path / "d/2").symlink_to(tmp_path / "other")  # no circle
    (tmp_path / "d/1" / os.fsdecode(b"na\xffme.png")).touch()
    images = faces.read_unlabelled(tmp_path / "d")
    printed = capsys.readouterr().out
    assert images.paths == ["1/a/1.png", "2/2.png"] and len(faces.fingerprints(images)) == 2
    assert "lie in, left out: 1 (./1/a/up)" in printed
    assert "no UTF-8, left out: 1 ('./1/na\\udcffme.png')" in printed


def test_images_are_known_by_what_they_hold(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        draw(tmp_path / "d" / name.split("/")[0], name.split("/")[1])
    files = sorted((tmp_path / "d").glob("*/*.png"))
    for i, file in enumerate(files):  # of one length, and two of one name
        Image.fromarray(np.full((8, 8), i * 40, np.uint8)).save(file.with_suffix(".bmp"))
        file.unlink()
    images = faces.read_unlabelled(tmp_path / "d")
    prints = faces.fingerprints(images)
    assert len(set(prints)) == 3 and not (prints % 2).any()
    (tmp_path / "e").mkdir()
    (tmp_path / "d" / images.paths[1]).rename(tmp_path / "e" / "other.bmp")
    assert faces.fingerprints(faces.read_unlabelled(tmp_path / "e")) == prints[1]
    missing = faces.fingerprints(images)  # by its path
    assert missing[1] not in prints and (missing[[0, 2]] == prints[[0, 2]]).all()
    table = dataclasses.replace(images, pixels=np.arange(3)[:, None, None] * np.ones(
        (1, 48, 48), np.uint8))
    assert len(set(faces.fingerprints(table))) == 3 and (faces.fingerprints(table) % 2).all()


def test_what_lies_beside_class_folders_is_named(tmp_path, capsys):
    for folder in ("train/a", "train/b", "test/a", "test/b", "train", "extra/a"):
        draw(tmp_path / "d" / folder, "1.png")
    faces.read_faces("folder", tmp_path / "d")
    said = capsys.readouterr().out
    assert "images beside the class folders, left out: 1 (train/1.png)" in said
    assert "folders beside the splits, left out: 1 (extra)" in said
    for folder in ("train/1", "train/2", "test/1", "val/1"):
        draw(tmp_path / "r" / folder, "1.png")
    draw(tmp_path / "r", "2.png")
    faces.read_faces("rafdb", tmp_path / "r")
    said = capsys.readouterr().out
    assert "images beside the class folders, left out: 1 (2.png)" in said
    assert "folders beside the splits, left out: 1 (val)" in said


def test_what_detect_faces_wrote_is_no_set_of_its_own(tmp_path):
    for folder in ("crops", "annotated"):
        draw(tmp_path / "d" / folder, "1.png")
    (tmp_path / "d" / "faces.json").write_text("{}")
    for read in (lambda: faces.read_faces("folder", tmp_path / "d"),
                 lambda: faces.read_unlabelled(tmp_path / "d")):
        with pytest.raises(BadInput, match=r"its crops are in .*crops: name that"):
            read()
    assert len(faces.read_unlabelled(tmp_path / "d" / "crops")) == 1
