"""UF1, UAR, accuracy, intervals, baselines and the result files."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics as sklearn

import util
from evaluation import measures, result_files


def random_case(seed, n_label=4, n=120):
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_label, n, p=np.arange(1, n_label + 1) / (n_label * (n_label + 1) / 2))
    guess = rng.choice(n_label, n)
    return labels, np.where(rng.random(n) < 0.4, labels, guess), rng.integers(0, 9, n)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [3, 20, 300])
def test_measures_agree_with_scikit_learn(seed, n):
    labels, predictions, _ = random_case(seed, n=n)
    actual = measures.evaluate(labels, predictions, 4)
    ids = {"labels": range(4), "zero_division": 0}
    assert actual["uf1"] == pytest.approx(
        sklearn.f1_score(labels, predictions, average="macro", **ids))
    assert actual["uar"] == pytest.approx(
        sklearn.recall_score(labels, predictions, average="macro", **ids))
    assert actual["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predictions))
    assert actual["per_class_f1"] == pytest.approx(
        sklearn.f1_score(labels, predictions, average=None, **ids))
    assert actual["per_class_recall"] == pytest.approx(
        sklearn.recall_score(labels, predictions, average=None, **ids))
    assert actual["confusion"] == sklearn.confusion_matrix(
        labels, predictions, labels=range(4)).tolist()


def test_counts_are_pooled_over_folds_though_a_class_is_missing_from_one():
    # two subjects: the first has no clip of class 2
    first = [0, 0, 1], [0, 1, 1]
    second = [0, 2, 2, 1], [0, 2, 0, 0]
    pooled = measures.evaluate(first[0] + second[0], first[1] + second[1], 3)
    # class 0: TP 2, FP 2, FN 1; class 1: TP 1, FP 1, FN 1; class 2: TP 1, FP 0, FN 1
    assert pooled["per_class_f1"] == pytest.approx([4 / 7, 2 / 4, 2 / 3])
    assert pooled["uf1"] == pytest.approx((4 / 7 + 2 / 4 + 2 / 3) / 3)
    assert pooled["per_class_recall"] == pytest.approx([2 / 3, 1 / 2, 1 / 2])
    assert pooled["uar"] == pytest.approx((2 / 3 + 1 / 2 + 1 / 2) / 3)
    assert pooled["accuracy"] == pytest.approx(4 / 7)
    mean_of_folds = np.mean([measures.evaluate(*fold, 3)["uf1"] for fold in (first, second)])
    assert abs(pooled["uf1"] - mean_of_folds) > 0.1


def test_a_class_without_support_counts_as_zero():
    actual = measures.evaluate([0, 0, 1], [0, 0, 1], 3)
    assert actual["per_class_f1"] == [1, 1, 0]
    assert actual["uf1"] == pytest.approx(2 / 3)
    assert actual["uar"] == pytest.approx(2 / 3)
    assert actual["accuracy"] == 1


@pytest.mark.parametrize("labels, predictions", [
    ([], []), ([0, 1], [0]), ([0, 3], [0, 1]), ([0, 1], [0, 3]), ([-1, 1], [0, 1]),
    ([0.0, 1.0], [0, 1])])
def test_ids_outside_and_unequal_lengths_are_refused(labels, predictions):
    with pytest.raises(ValueError):
        measures.evaluate(labels, predictions, 3)


def test_intervals_agree_with_a_loop_over_resampled_subjects():
    labels, predictions, subjects = random_case(0)
    actual = measures.intervals(labels, predictions, subjects, 4)
    rng, names, draws = np.random.default_rng(1), np.unique(subjects), []
    for _ in range(1500):
        chosen = np.concatenate([np.flatnonzero(subjects == s)
                                 for s in rng.choice(names, len(names))])
        one = measures.evaluate(labels[chosen], predictions[chosen], 4)
        draws.append([one["uf1"], one["uar"], one["accuracy"]])
    for name, column in zip(("uf1", "uar", "accuracy"), np.array(draws).T):
        assert actual[name] == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=0.015)


def test_intervals_equal_a_loop_over_the_same_resamples(monkeypatch):
    monkeypatch.setattr(measures, "DRAWS", 300)
    labels, predictions, subjects = random_case(2, n=70)
    names, draws = np.unique(subjects), []
    for times in np.random.default_rng(5).multinomial(len(names), [1 / len(names)] * len(names),
                                                      300):
        chosen = np.concatenate([np.flatnonzero(subjects == s).repeat(t)
                                 for s, t in zip(names, times)])
        pair = labels[chosen], predictions[chosen]
        # of the classes that were drawn
        ids = {"labels": np.unique(labels[chosen]), "zero_division": 0}
        draws.append([sklearn.f1_score(*pair, average="macro", **ids),
                      sklearn.recall_score(*pair, average="macro", **ids),
                      sklearn.accuracy_score(*pair)])
    actual = measures.intervals(labels, predictions, subjects, 4, seed=5)
    for name, column in zip(("uf1", "uar", "accuracy"), np.array(draws).T):
        assert actual[name] == pytest.approx(np.percentile(column, [2.5, 97.5]))


def test_a_class_that_a_resample_lacks_has_no_part_in_it():
    # three subjects, a class each, all right: 3 of 27 resamples hold one class, 18 two, 6 all
    labels = np.repeat([0, 1, 2], 4)
    actual = measures.intervals(labels, labels, labels, 3)
    assert all(limits == [1, 1] for limits in actual.values())
    # one that nobody has counts as in the figure itself, beside one, two or three others
    actual = measures.intervals(labels, labels, labels, 4)
    assert actual["uf1"] == actual["uar"] == pytest.approx([1 / 2, 3 / 4])
    # all of one subject's are wrong: their class, or what is taken for it, is drawn alone
    actual = measures.intervals(labels, np.where(labels == 2, 0, labels), labels, 3)
    assert actual["uar"] == pytest.approx([0, 1]) and actual["accuracy"] == pytest.approx([0, 1])


def test_intervals_and_baselines_follow_from_the_seed():
    case = random_case(1)
    assert measures.DRAWS == 10_000
    assert measures.intervals(*case, 4) == measures.intervals(*case, 4, seed=0)
    assert measures.intervals(*case, 4) != measures.intervals(*case, 4, seed=1)
    assert measures.baselines(case[0], 4) == measures.baselines(case[0], 4, seed=0)
    assert measures.baselines(case[0], 4) != measures.baselines(case[0], 4, seed=1)


def test_intervals_resample_subjects_not_clips():
    # all clips of a subject are right or all are wrong: four units, not four hundred
    labels = np.zeros(400, int)
    subjects = np.repeat(range(4), 100)
    low, high = measures.intervals(labels, subjects % 2, subjects, 2)["accuracy"]
    assert (low, high) == (0, 1)


def test_intervals_take_database_and_name_as_the_subject():
    labels = np.array([0, 0, 1, 1] * 10)
    people = [("casme2", "s1"), ("smic", "s1")] * 20
    low, high = measures.intervals(labels, labels, people, 2)["uf1"]
    assert (low, high) == (1, 1)
    low, high = measures.intervals(labels, np.where([p[0] == "smic" for p in people], labels, 0),
                                   people, 2)["accuracy"]
    assert low < high


def test_majority_baseline_by_hand():
    actual = measures.baselines(np.repeat([0, 1, 2, 3], [508, 170, 64, 201]), 4)["majority"]
    assert actual["uf1"] == pytest.approx(2 * 508 / (508 + 943) / 4)
    assert actual["uar"] == pytest.approx(1 / 4)
    assert actual["accuracy"] == pytest.approx(508 / 943)


def test_random_baseline_is_near_its_expectation():
    counts = np.array([508, 170, 64, 201])
    share = counts / counts.sum()
    actual = measures.baselines(np.repeat(range(4), counts), 4)["stratified_random"]
    assert actual["accuracy"] == pytest.approx((share ** 2).sum(), abs=0.002)
    assert actual["uar"] == pytest.approx(1 / 4, abs=0.002)
    # F1 of class c at equal numbers of true and predicted clips is about its share
    assert actual["uf1"] == pytest.approx(1 / 4, abs=0.003)


def test_random_baseline_is_the_mean_of_drawn_predictions():
    # so few clips that classes go without prediction, and the mean F1 is not the share
    labels = np.repeat([0, 1, 2], [7, 2, 1])
    actual = measures.baselines(labels, 3)["stratified_random"]
    rng, draws = np.random.default_rng(1), []
    for _ in range(4000):
        one = measures.evaluate(labels, rng.choice(labels, len(labels)), 3)
        draws.append([one["uf1"], one["uar"], one["accuracy"]])
    for name, values in zip(("uf1", "uar", "accuracy"), np.transpose(draws)):
        # three standard errors of the two means, of 4,000 and 10,000 draws
        error = values.std() * (1 / 4000 + 1 / 10_000) ** 0.5
        assert actual[name] == pytest.approx(values.mean(), abs=3 * error)


def test_rows_without_subjects_resample_images():
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, 40)
    said = np.where(rng.random(40) < 0.6, labels, rng.integers(0, 3, 40))
    # the keys of the second database are those of the first, and are other images
    rows = [{"database": "smic" if i < 20 else "samm", "subject": "", "key": f"k{i % 20}",
             "label": int(label), "prediction": int(guess)}
            for i, (label, guess) in enumerate(zip(labels, said))]
    actual = measures.summarise(rows, 3)
    assert actual["resampled"] == "images" and actual["n_subjects"] is None
    assert [part["n_subjects"] for part in actual["per_database"].values()] == [None, None]
    images, draws = sorted({(r["database"], r["key"]) for r in rows}), []
    assert len(images) == 40
    place = np.array([[(r["database"], r["key"]) for r in rows].index(image) for image in images])
    for times in np.random.default_rng(0).multinomial(40, [1 / 40] * 40, measures.DRAWS):
        chosen = place.repeat(times)
        confusion = measures.confusion_matrix(labels[chosen], said[chosen], 3)
        f1, recall, accuracy = measures.scores(confusion)
        draws.append((f1.mean(), recall.mean(), accuracy))
    for name, column in zip(measures.MEASURES, np.array(draws).T):
        # other draws of the same distribution
        assert actual["ci95"][name] == pytest.approx(np.percentile(column, [2.5, 97.5]), abs=.012)
    # one row that names somebody, and it is subjects that are resampled
    named = measures.summarise([dict(rows[0], subject="s1"), *rows[1:]], 3)
    assert named["resampled"] == "subjects" and named["n_subjects"] == 3
    by_name = measures.intervals(labels, said, [("smic", "s1"), *[
        (r["database"], "") for r in rows[1:]]], 3)
    assert named["ci95"] == by_name
    assert "intervals resample images" in result_files.describe({**actual, "transductive": None})
    printed = result_files.describe({**named, "transductive": None})
    assert "of 3 held-out subjects" in printed
    assert "fewer than 15 subjects: intervals over them are too narrow" in printed


def test_one_subject_has_no_interval():
    rows = [{"database": "samm", "subject": "s1", "key": str(i), "label": i % 3,
             "prediction": i % 2} for i in range(12)]
    actual = measures.summarise(rows, 3)
    assert actual["ci95"] == {"uf1": None, "uar": None, "accuracy": None}
    assert "[no interval]" in result_files.describe({**actual, "transductive": False})
    two = measures.summarise([{**row, "subject": f"s{i > 3}"} for i, row in enumerate(rows)], 3)
    assert two["ci95"]["uf1"][0] < two["ci95"]["uf1"][1]


# ---------------------------------------------------------------- result files

def row(database, subject, key, label, p):
    return {"database": database, "subject": subject, "key": key, "label": label,
            "prediction": int(np.argmax(p)), "probabilities": p}


ROWS = [row("smic", "a", "k1", 0, [0.25, 0.75]), row("casme3", "b", "k3", 1, [0.125, 0.875]),
        row("casme3", "b", "k2", 0, [1.0, 0.0]), row("casme3", "a", "k9", 1, [0.5, 0.5])]


def write(folder, rows=ROWS, blank_keys=(), **details):
    result_files.write_subjects(folder, {name: {
        "transductive": False, "checkpoint": "x.pth", "sha256": "1", **details.get(name, {}),
        "rows": [r for r in rows if f"{r['database']}_{r['subject']}" == name]}
        for name in ("smic_a", "casme3_b", "casme3_a")})
    return result_files.write_results(folder, {"protocol": "loso"}, 2, ["no", "yes"], blank_keys)


def test_predictions_are_sorted_and_read_back(tmp_path):
    write(tmp_path)
    with open(tmp_path / "predictions.csv", newline="") as file:
        actual = list(csv.DictReader(file))
    assert list(actual[0]) == ["database", "subject", "key", "label", "prediction", "p_0", "p_1"]
    assert [(r["database"], r["subject"], r["key"]) for r in actual] == [
        ("casme3", "a", "k9"), ("casme3", "b", "k2"), ("casme3", "b", "k3"), ("smic", "a", "k1")]
    expected = {r["key"]: r for r in ROWS}
    for r in actual:
        assert int(r["label"]) == expected[r["key"]]["label"]
        assert int(r["prediction"]) == expected[r["key"]]["prediction"]
        assert [float(r["p_0"]), float(r["p_1"])] == expected[r["key"]]["probabilities"]


def test_results_hold_the_figures_of_the_rows(tmp_path):
    returned = write(tmp_path, blank_keys={("casme3", "b", "k2")})
    actual = json.loads((tmp_path / "results.json").read_text())
    assert actual == returned
    labels = [r["label"] for r in ROWS]
    predictions = [r["prediction"] for r in ROWS]
    expected = measures.evaluate(labels, predictions, 2)
    assert {name: actual[name] for name in expected} == expected
    assert (actual["n"], actual["n_label"], actual["n_subjects"]) == (4, 2, 3)
    assert actual["protocol"] == "loso" and actual["classes"] == ["no", "yes"]
    assert set(actual["ci95"]) == {"uf1", "uar", "accuracy"}
    assert set(actual["baselines"]) == {"majority", "stratified_random"}
    assert actual["baselines"]["majority"]["accuracy"] == 0.5


def test_per_database_and_without_blank_clips_are_figures_of_their_clips(tmp_path):
    actual = write(tmp_path, blank_keys={("casme3", "b", "k2"), ("smic", "b", "k3")})
    assert set(actual["per_database"]) == {"casme3", "smic"}
    assert actual["per_database"]["smic"]["n"] == 1
    assert actual["per_database"]["smic"]["accuracy"] == 0
    assert actual["per_database"]["casme3"]["accuracy"] == pytest.approx(2 / 3)
    # k2 was right; the key of another database is none of these clips
    assert actual["without_blank_clips"]["n"] == 3
    assert actual["without_blank_clips"]["accuracy"] == pytest.approx(1 / 3)


def test_only_blank_clips_leave_no_figures(tmp_path):
    keys = {(r["database"], r["subject"], r["key"]) for r in ROWS}
    assert write(tmp_path, blank_keys=keys)["without_blank_clips"] == {"n": 0}


@pytest.mark.parametrize("values, expected", [
    ([False, False, False], False), ([False, True, False], True), ([None, False, False], None),
    ([None, True, False], True)])
def test_transductive_is_true_if_any_subject_was_seen_and_unknown_if_any_is(
        tmp_path, values, expected):
    details = {name: {"transductive": value}
             for name, value in zip(("smic_a", "casme3_b", "casme3_a"), values)}
    assert write(tmp_path, **details)["transductive"] is expected


def test_rows_name_the_likeliest_class():
    clips = [SimpleNamespace(database=2, subject="s", key=f"k{i}", label=1) for i in (2, 0)]
    rows = result_files.rows_of(clips, np.array([[0.2, 0.7, 0.1], [0.1, 0.2, 0.7]]))
    assert [(r["database"], r["key"], r["prediction"]) for r in rows] \
        == [("casme2", "k2", 1), ("casme2", "k0", 2)]


def test_a_subject_that_another_job_finishes_meanwhile_is_in_the_results(tmp_path, monkeypatch):
    write_predictions = result_files.write_predictions

    def slow(*args):
        result_files.write_subjects(tmp_path, {"smic_b": {
            "rows": [row("smic", "b", "k7", 1, [0.0, 1.0])], "transductive": False,
            "checkpoint": "x.pth", "sha256": "1"}})
        write_predictions(*args)
    monkeypatch.setattr(result_files, "write_predictions", slow)
    assert write(tmp_path)["n"] == len(ROWS) + 1
    assert json.loads((tmp_path / "results.json").read_text())["n"] == len(ROWS) + 1
    assert (tmp_path / "predictions.csv").read_text().count("\n") == len(ROWS) + 2


def test_half_a_subject_file_is_refused_by_name(tmp_path):
    write(tmp_path)
    path = tmp_path / "subjects" / "smic_a.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(util.BadInput, match=r"smic_a\.json: not a subject's predictions"):
        result_files.write_results(tmp_path, {}, 2, ["no", "yes"])
