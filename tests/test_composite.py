"""Composite evaluation as in MEGC2019: several databases in one set of lists, one pooled result."""
import csv
import json
from collections import Counter

import numpy as np
import pytest
from conftest import finetune, probe, save_image, signed_pair
from sklearn.metrics import f1_score, recall_score

import dataset
import util
from dataset import Clip
from evaluation import measures, result_files
from images.lists import write_lists

# See et al., MEGC 2019: clips per class (negative, positive, surprise) and subjects
MEGC = {"smic": ((70, 51, 43), 16), "casme2": ((88, 32, 25), 24), "samm": ((92, 26, 15), 28)}


def uf1_uar(labels, predictions, n_label=3):
    ids = {"labels": range(n_label), "average": "macro", "zero_division": 0}
    return [f1_score(labels, predictions, **ids), recall_score(labels, predictions, **ids)]


def figures(rows, database=None):
    """[UF1, UAR] of prediction rows, by scikit-learn."""
    mine = [r for r in rows if database in (None, r["database"])]
    return uf1_uar(*([int(r[k]) for r in mine] for k in ("label", "prediction")))


def read_log(path):
    """The challenge's log: {(database, subject): [(file, truth, prediction)]}."""
    actual = {}
    for line in path.read_text().splitlines():
        *words, last = line.split(" ")
        if len(words) == 1:
            assert (words[0], last) not in actual  # one block per subject
            block = actual[words[0], last] = []
        else:
            file, truth = words
            block.append((file, int(truth), int(last)))
    return actual


# ---------------------------------------------------------------- at the challenge's size

@pytest.fixture(scope="module")
def megc_rows():
    """442 prediction rows of 68 subjects; every database numbers its subjects and clips alike."""
    rng, rows = np.random.default_rng(0), []
    for database, (counts, n_subjects) in MEGC.items():
        labels = rng.permutation(np.repeat(range(3), counts))
        for i, label in enumerate(labels):
            p = rng.dirichlet(np.ones(3) + 2 * np.eye(3)[label])
            rows.append({"database": database, "subject": f"s{i % n_subjects + 1:02d}",
                         "key": f"EP{i // n_subjects}", "label": int(label),
                         "prediction": int(p.argmax()), "probabilities": p.tolist()})
    return rows


def test_442_clips_of_68_subjects(megc_rows, tmp_path):
    people = {(r["database"], r["subject"]) for r in megc_rows}
    assert (len(megc_rows), len(people), len({p[1] for p in people})) == (442, 68, 28)
    result_files.write_subjects(tmp_path, {"_".join(person): {
        "transductive": False, "checkpoint": "x", "sha256": "1",
        "rows": [r for r in megc_rows if (r["database"], r["subject"]) == person]}
        for person in people})
    actual = result_files.write_results(tmp_path, {"protocol": "loso"}, 3, list("nps"))
    assert (actual["n"], actual["n_subjects"]) == (442, 68)
    assert [actual["uf1"], actual["uar"]] == pytest.approx(figures(megc_rows))
    assert {k: (v["n"], v["n_subjects"]) for k, v in actual["per_database"].items()} \
        == {"smic": (164, 16), "casme2": (145, 24), "samm": (133, 28)}
    for name, part in actual["per_database"].items():
        assert [part["uf1"], part["uar"]] == pytest.approx(figures(megc_rows, name))
        assert np.sum(part["confusion"], 1).tolist() == list(MEGC[name][0])
    # the databases' figures come from the pooled predictions
    assert np.sum([p["confusion"] for p in actual["per_database"].values()], 0).tolist() \
        == actual["confusion"]
    # 250 of 442 are negative
    assert actual["baselines"]["majority"]["uf1"] == pytest.approx(2 * 250 / (250 + 442) / 3)
    log = read_log(tmp_path / "megc2019.log")
    assert log.keys() == people and sum(map(len, log.values())) == 442
    assert uf1_uar(*zip(*[line[1:] for block in log.values() for line in block])) \
        == pytest.approx(figures(megc_rows))
    for r in megc_rows:
        assert (r["key"], r["label"], r["prediction"]) in log[r["database"], r["subject"]]
    printed = result_files.describe(actual)
    for name, part in actual["per_database"].items():
        assert f"{name:8s} UF1 {part['uf1']:.3f}, UAR {part['uar']:.3f}  ({part['n']} clips" \
            in printed
    assert "majority" in printed and "stratified random" in printed


def test_a_database_without_a_class_is_averaged_over_all(megc_rows):
    rows = [r for r in megc_rows if r["database"] != "samm" or r["label"] != 2]
    part = measures.summarise(rows, 3)["per_database"]["samm"]
    assert len(part["per_class_f1"]) == 3 and part["per_class_f1"][2] == 0
    assert part["uf1"] == pytest.approx(sum(part["per_class_f1"]) / 3)
    assert [part["uf1"], part["uar"]] == pytest.approx(figures(rows, "samm"))


def test_one_database_leaves_no_challenge_log(megc_rows, tmp_path):
    rows = [r for r in megc_rows if r["database"] == "smic"][::16]
    result_files.write_subjects(tmp_path, {"s01": {
        "rows": rows, "transductive": False, "checkpoint": "x", "sha256": "1"}})
    actual = result_files.write_results(tmp_path, {}, 3, list("nps"))
    assert not (tmp_path / "megc2019.log").exists() and list(actual["per_database"]) == ["smic"]
    assert "smic" not in result_files.describe(actual)


# ---------------------------------------------------------------- from end to end

PEOPLE = [(1, "SMIC", "sub01"), (2, "CASME2", "sub01"), (2, "CASME2", "sub02"),
          (3, "SAMM", "006"), (3, "SAMM", "sub01")]


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    """Three databases; sub01 is a subject of each, EP1 to EP3 are files of every subject."""
    folder, rng, clips = tmp_path_factory.mktemp("composite"), np.random.default_rng(0), []
    for database, root, subject in PEOPLE:
        for label in range(3):
            paths = [f"{view}/{root}/{subject}/EP{label + 1}_diff.png" for view in ("rgb", "depth")]
            for path, pixels in zip(paths, signed_pair(rng, 64)):
                save_image(folder / path, pixels)
            # the labels differ between the subjects, so that a mix-up of files would show
            clips.append(Clip(database, subject, "", (label + len(clips)) % 3, tuple(paths)))
    write_lists(folder, clips)
    util.write_json(folder / "encoding.json", {"difference": "signed"})
    return folder, clips


@pytest.fixture(scope="module")
def flags(small_crops, composite, quick):
    return ["--data_folder", composite[0], *quick, "--epochs", 3, "--model_path", "random",
            "--dataset", "all"]


def results(folder):
    (path,) = folder.glob("*/results.json")
    with open(path.with_name("predictions.csv"), newline="") as file:
        return path.parent, json.loads(path.read_text()), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def probed(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed")
    probe(*flags, "--protocol", "loso", "--save_path", folder)
    return results(folder)


def test_equal_names_are_five_persons_and_fifteen_clips(composite, probed):
    folder, actual, rows = probed
    assert (actual["n"], actual["n_subjects"], actual["n_label"]) == (15, 5, 3)
    assert Counter((r["database"], r["subject"]) for r in rows) \
        == {(dataset.DATABASES[d], s): 3 for d, _, s in PEOPLE}
    assert {p.stem for p in (folder / "subjects").iterdir()} \
        == {f"{dataset.DATABASES[d]}_{s}" for d, _, s in PEOPLE}
    # each row carries the label of its own file
    for clip in composite[1]:
        file = clip.paths[0].removeprefix("rgb/").removesuffix("_diff.png")
        (row,) = [r for r in rows if file.endswith(r["key"])
                  and (r["database"], r["subject"]) == (dataset.DATABASES[clip.database],
                                                        clip.subject)]
        assert int(row["label"]) == clip.label
    assert len({r["key"] for r in rows}) == 15


def test_full_and_per_database_figures_and_the_log(probed):
    folder, actual, rows = probed
    assert [actual["uf1"], actual["uar"]] == pytest.approx(figures(rows))
    assert {k: v["n"] for k, v in actual["per_database"].items()} \
        == {"smic": 3, "casme2": 6, "samm": 6}
    for name, part in actual["per_database"].items():
        assert [part["uf1"], part["uar"]] == pytest.approx(figures(rows, name))
    assert read_log(folder / "megc2019.log") == {
        person: [(r["key"], int(r["label"]), int(r["prediction"])) for r in rows
                 if (r["database"], r["subject"]) == person]
        for person in {(r["database"], r["subject"]) for r in rows}}


def test_a_person_is_held_out_alone_and_its_namesakes_train(composite, flags, probed, tmp_path):
    # another label of a namesake's clips changes the prediction, one's own does not
    _folder, clips = composite
    lists = {}
    for name, database in (("own", 2), ("namesake", 1)):
        lists[name] = tmp_path / name
        write_lists(lists[name], [
            Clip(c.database, c.subject, "", (c.label + 1) % 3, c.paths)
            if (c.database, c.subject) == (database, "sub01") else c for c in clips])
        util.write_json(lists[name] / "encoding.json", {"difference": "signed"})
        probe(*flags, "--list_folder", lists[name], "--protocol", "loso", "--subject",
              "casme2/sub01", "--save_path", tmp_path / f"{name}_out")
    before = [r for r in probed[2] if (r["database"], r["subject"]) == ("casme2", "sub01")]
    own, namesake = (results(tmp_path / f"{name}_out")[2] for name in lists)
    assert [r["key"] for r in own] == [r["key"] for r in namesake] == [r["key"] for r in before]
    p = [np.array([[float(r[f"p_{c}"]) for c in range(3)] for r in rows])
         for rows in (before, own, namesake)]
    assert np.abs(p[0] - p[1]).max() < 1e-4
    assert np.abs(p[0] - p[2]).max() > 1e-3


def test_ten_folds_never_part_a_person_and_one_database_can_be_taken(flags, tmp_path, capsys):
    probe(*flags, "--save_path", tmp_path / "all")
    assert "MEGC2019" in capsys.readouterr().out
    assert results(tmp_path / "all")[1]["n"] == 15
    probe(*flags, "--dataset", "casme2", "--protocol", "loso", "--save_path", tmp_path / "one")
    folder, actual, _rows = results(tmp_path / "one")
    assert (actual["n"], actual["n_subjects"]) == (6, 2)
    assert not (folder / "megc2019.log").exists()
    assert "MEGC2019" not in capsys.readouterr().out


def test_fine_tuning_writes_the_same_kind_of_files(flags, tmp_path):
    finetune(*flags, "--epochs", 1, "--subject", "smic/sub01", "samm/sub01",
             "--save_path", tmp_path)
    folder, actual, _rows = results(tmp_path)
    assert {k: v["n"] for k, v in actual["per_database"].items()} == {"smic": 3, "samm": 3}
    assert {k: len(v) for k, v in read_log(folder / "megc2019.log").items()} \
        == {("smic", "sub01"): 3, ("samm", "sub01"): 3}
