"""Comparing results: the permutation test, Holm's correction, seeds, and compare_results.py."""
import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score, recall_score

import compare_results
from evaluation import measures, pictures, result_files, videos


def uf1(labels, predictions, n_label):
    return f1_score(labels, predictions, labels=range(n_label), average="macro", zero_division=0)


def two_systems(seed, n_subjects=6, n=60, n_label=3, skill=(0.6, 0.3)):
    """labels, two systems' predictions, subjects as (database, name)."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(n_label, n, p=[0.6, 0.3, 0.1])
    people = [("smic" if i % 2 else "samm", f"s{i // 2}") for i in rng.integers(0, n_subjects, n)]
    return labels, *(np.where(rng.random(n) < s, labels, rng.choice(n_label, n)) for s in skill), \
        people


def swapped(first, second, people, chosen):
    """Both systems' predictions after the chosen subjects changed sides."""
    move = np.array([person in chosen for person in people])
    return np.where(move, second, first), np.where(move, first, second)


# ---------------------------------------------------------------- permutation test

@pytest.mark.parametrize("seed", range(4))
def test_p_is_near_that_of_all_swaps(seed):
    labels, first, second, people = two_systems(seed)
    names, differences = sorted(set(people)), []
    for size in range(len(names) + 1):
        for chosen in itertools.combinations(names, size):
            one, two = swapped(first, second, people, chosen)
            differences.append(uf1(labels, one, 3) - uf1(labels, two, 3))
    observed = differences[0]
    exact = np.mean(np.abs(differences) >= abs(observed) - 1e-12)
    difference, p = measures.permutation_test(labels, first, second, people, 3)
    assert difference == pytest.approx(observed)
    assert p == pytest.approx(exact, abs=0.02)


def test_p_equals_a_loop_over_the_same_swaps(monkeypatch):
    monkeypatch.setattr(measures, "DRAWS", 150)
    labels, first, second, people = two_systems(7, n_subjects=11)
    names = sorted(set(people))
    observed, extreme = uf1(labels, first, 3) - uf1(labels, second, 3), 0
    for swap in np.random.default_rng(3).integers(0, 2, (150, len(names))):
        one, two = swapped(first, second, people, {n for n, s in zip(names, swap) if s})
        extreme += abs(uf1(labels, one, 3) - uf1(labels, two, 3)) >= abs(observed) - 1e-12
    assert measures.permutation_test(labels, first, second, people, 3, seed=3) \
        == (pytest.approx(observed), (1 + extreme) / 151)


def test_ten_subjects_all_right_against_all_wrong():
    # only none or all swapped is as extreme: 2 of 1024
    labels, people = np.tile([0, 1], 20), np.repeat(range(10), 4)
    difference, p = measures.permutation_test(labels, labels, 1 - labels, people, 2)
    assert difference == 1
    assert p == pytest.approx(2 / 1024, abs=0.0014)
    assert (p * 10_001) == pytest.approx(round(p * 10_001))


def test_whole_subjects_are_swapped_not_clips():
    # one subject: swapping it changes only the sign, however many clips it has
    labels = np.tile([0, 1], 50)
    assert measures.permutation_test(labels, labels, 1 - labels, [("smic", "a")] * 100, 2) == (1, 1)
    # of two databases that name is two subjects, and swapping one makes the systems equal
    people = [("smic", "a")] * 50 + [("samm", "a")] * 50
    assert measures.permutation_test(labels, labels, 1 - labels, people, 2)[1] \
        == pytest.approx(0.5, abs=0.02)


def test_swapped_images_are_drawn_as_a_loop_draws_them():
    labels, first, second, _ = two_systems(4)
    images = list(range(len(labels)))
    difference, p = measures.permutation_test(labels, first, second, images, 3)
    assert measures.permutation_test(labels, second, first, images, 3) == (-difference, p)
    rng, extreme = np.random.default_rng(0), 0
    for _ in range(2000):
        swap = rng.random(len(labels)) < .5
        one, two = np.where(swap, second, first), np.where(swap, first, second)
        moved = np.subtract(*(measures.evaluate(labels, said, 3)["uf1"] for said in (one, two)))
        extreme += abs(moved) >= abs(difference) - 1e-12
    assert p == pytest.approx(extreme / 2000, abs=.03)


def test_mcnemar_by_hand():
    labels = [0] * 12
    first, second = [0] * 9 + [1] * 3, [0] * 2 + [1] * 8 + [0] * 2
    # seven images that the first alone has right, two that the second has: P(B(9, .5) <= 2) twice
    assert measures.mcnemar(labels, first, second) == pytest.approx(2 * (1 + 9 + 36) / 2 ** 9)
    assert measures.mcnemar(labels, second, first) == measures.mcnemar(labels, first, second)
    assert measures.mcnemar(labels, first, first) == 1


def test_order_changes_the_sign_alone_and_equal_systems_do_not_differ():
    labels, first, second, people = two_systems(1)
    difference, p = measures.permutation_test(labels, first, second, people, 3)
    assert measures.permutation_test(labels, second, first, people, 3) == (-difference, p)
    assert measures.permutation_test(labels, first, first, people, 3) == (0, 1)


def test_systems_of_equal_skill_are_rarely_told_apart(monkeypatch):
    monkeypatch.setattr(measures, "DRAWS", 199)
    values = []
    for seed in range(300):
        labels, first, second, people = two_systems(seed, 12, skill=(0.4, 0.4))
        values.append(measures.permutation_test(labels, first, second, people, 3)[1])
    # three standard errors of a share of 0.05 (0.5) among 300
    assert np.mean(np.array(values) <= 0.05) < 0.05 + 0.038
    assert np.mean(np.array(values) <= 0.5) == pytest.approx(0.5, abs=0.087)


def test_holm_by_hand():
    assert measures.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert measures.holm([0.5, 0.4, 0.9]) == pytest.approx([1, 1, 1])
    assert measures.holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert measures.holm([0.03]) == [0.03] and measures.holm([]) == []


def test_mean_and_deviation_over_seeds_by_hand():
    actual = measures.over_seeds([{"uf1": u, "uar": 0.5, "accuracy": a}
                                 for u, a in ((0.1, 0), (0.2, 1), (0.4, 0))])
    assert actual["uf1"] == pytest.approx((0.7 / 3, 0.152753), abs=1e-6)
    assert actual["uar"] == (0.5, 0)
    assert actual["accuracy"] == pytest.approx((1 / 3, 0.577350), abs=1e-6)


# ---------------------------------------------------------------- the script

OPTIONS = {"model": "alexnet", "model_path": "random", "encoder": "both", "tag": "", "seed": 0,
           "learning_rate": 0.1, "save_path": "x", "num_workers": 4}


@pytest.fixture
def make(tmp_path):
    """make(name, predictions, …): writes a result of these predictions, returns its path."""
    labels = np.random.default_rng(0).choice(3, 40, p=[0.5, 0.3, 0.2])

    def write(name, skill, keep=40, labels=labels, databases=("casme3",), details=None,
              transductive=False, each=5, **options):
        rng = np.random.default_rng(int(skill * 1000) + options.get("seed", 0))
        rows = []
        for i, label in enumerate(labels[:keep]):
            guess = int(label if rng.random() < skill else rng.choice(3))
            rows.append({"database": databases[i % len(databases)], "subject": f"s{i // each}",
                         "key": f"k{i}", "label": int(label), "prediction": guess,
                         "probabilities": np.eye(3)[guess].tolist()})
        result_files.write_subjects(tmp_path / name, {"_".join(person): {
            "transductive": transductive, "checkpoint": None, "sha256": None,
            "rows": [r for r in rows if (r["database"], r["subject"]) == person]}
            for person in {(r["database"], r["subject"]) for r in rows}})
        result_files.write_results(tmp_path / name, {
            "opt": {**OPTIONS, **options}, "protocol": "loso", "data_digest": "d" * 64,
            **(details or {})}, 3, list("abc"))
        return tmp_path / name / "results.json"
    return write


def compare(capsys, *argv):
    compare_results.main([str(a) for a in argv])
    return capsys.readouterr().out


def tables(printed):
    """The Markdown tables as lists of rows of cells, by the first words of their captions."""
    actual, caption = {}, None
    for line in printed.splitlines():
        if line.startswith("| "):
            actual.setdefault(caption, []).append(
                [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif line:
            caption = " ".join(line.split()[:2])
    return {k: rows[:1] + rows[2:] for k, rows in actual.items()}


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        compare_results.main([str(a) for a in argv])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


def read(path):
    with open(path.with_name("predictions.csv"), newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [int(r[name]) for r in rows]


def test_names_say_what_a_network_started_from(make, capsys):
    paths = [make("fer_a", 0.9, model_path="", pretrained="none"),
             make("fer_b", 0.5, model_path="", pretrained="imagenet"),
             make("mmnet_c", 0.2, model_path="", pretrained=None)]
    for name, start in (("out_rafdb", ""), ("out_affectnet", "x.pth")):
        paths.append(make(name, 0.4, model_path="", finetune=start))
        content = json.loads(paths[-1].read_text())
        del content["opt"]["tag"]  # of a script whose runs are named by the user
        paths[-1].write_text(json.dumps(content))
    said = compare(capsys, *paths)
    for number, name in enumerate(("fer, alexnet", "fer, pre-trained alexnet", "mmnet, alexnet",
                                   "out_rafdb, alexnet", "out_affectnet, pre-trained alexnet"), 1):
        assert f"| {number}: {name}, loso |" in said


def test_table_changed_options_and_tests_of_three_results(make, capsys):
    paths = [make("probe_a", 0.9), make("probe_b", 0.5, learning_rate=0.3, num_workers=1),
             make("finetune_c", 0.2, model_path="x/last.pth", freeze_encoder=True)]
    actual = tables(compare(capsys, *paths))
    assert actual["What changed"] == [
        ["option", "1", "2", "3"], ["stage", "probe", "probe", "finetune"],
        ["model_path", "random", "random", "x/last.pth"], ["learning_rate", "0.1", "0.3", "0.1"],
        ["freeze_encoder", "-", "-", "true"]]
    rows = {r[0]: r[1:] for r in actual["Held-out subjects,"]}
    assert list(rows) == ["", "baseline: majority", "baseline: stratified random",
                          "1: probe, untrained alexnet, loso", "2: probe, untrained alexnet, loso",
                          "3: finetune, pre-trained alexnet, frozen, loso"]
    for path, line in zip(paths, list(rows.values())[3:]):
        labels, guesses = column(read(path), "label"), column(read(path), "prediction")
        assert line[0] == "40 / 8"
        assert line[1].startswith(f"{uf1(labels, guesses, 3):.3f} [")
        assert line[2].startswith(f"{recall_score(labels, guesses, average='macro'):.3f} [")
        assert line[3].startswith(f"{np.mean(np.equal(labels, guesses)):.3f} [")
    tests = actual["Paired permutation"][1:]
    guesses = [column(read(p), "prediction") for p in paths]
    assert [t[0] for t in tests] == ["1 minus 2", "1 minus 3", "2 minus 3"]
    people = [(r["database"], r["subject"]) for r in read(paths[0])]
    expected = [measures.permutation_test(labels, guesses[i], guesses[j], people, 3)
                for i, j in ((0, 1), (0, 2), (1, 2))]
    adjusted = measures.holm([p for _, p in expected])
    for test, (difference, p), holm in zip(tests, expected, adjusted):
        assert test[1:4] == [f"{difference:+.3f}", f"{p:.4f}", f"{holm:.4f}"]


def test_seeds_are_pooled_whatever_their_folders_are_called(make, capsys):
    paths = [make(name, 0.5, seed=seed, details={"command": f"python {script}.py --seed {seed}"})
             for name, seed, script in (("first", 0, "train_FER"), ("second", 1, "train_FER"),
                                        ("third", 2, "train_MMNet"))]
    rows = tables(compare(capsys, *paths))["Held-out subjects,"]
    pooled = [row[0] for row in rows if "standard deviation" in row[0]]
    assert len(pooled) == 1 and pooled[0].startswith("1, 2: ")


@pytest.mark.parametrize("picture, said", [(".", "is a folder; name a file"),
                                           ("none/p.png", "its folder does not exist"),
                                           ("p.jpg", "name a file that ends in .png")])
def test_a_picture_that_cannot_be_written_is_refused_first(make, capsys, tmp_path, picture, said):
    with pytest.raises(SystemExit) as stop:
        compare_results.main([str(make("a", 0.5)), "--picture", str(tmp_path / picture)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and not printed.out


def test_a_terminal_that_lacks_a_letter_ends_nothing(make):
    done = subprocess.run([sys.executable, "compare_results.py", make("a", 0.5, tag="ä"),
                           make("b", 0.5, seed=1)], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and r"\xe4" in done.stdout and not done.stderr


def test_one_result_and_two_that_differ_in_bookkeeping_alone(make, capsys):
    a = make("a", 0.9)
    assert set(tables(compare(capsys, a))) == {"Held-out subjects,"}
    actual = tables(compare(capsys, a, make("b", 0.9, save_path="elsewhere", num_workers=9)))
    assert set(actual) == {"What changed", "Held-out subjects,", "Paired permutation"}
    assert actual["What changed"] == [["option", "1", "2"], ["stage", "a", "b"]]
    assert actual["Paired permutation"][1] == ["1 minus 2", "+0.000", "1.0000", "1.0000",
                                                "1.0000"]


def test_differing_clips_are_refused_or_cut_to_the_common_ones(make, capsys):
    paths = make("a", 0.9), make("b", 0.5, keep=25)
    line = refused(capsys, *paths)
    assert str(paths[1]) in line and "25 clips" in line and "40" in line and "--common" in line
    printed = compare(capsys, "--common", *paths)
    assert "on the 25 clips that all results hold" in printed
    actual = tables(printed)
    shared = [r for r in read(paths[0]) if int(r["key"][1:]) < 25]
    assert all(r[1] == "25 / 5" for r in actual["Held-out subjects,"][1:])
    labels = column(shared, "label")
    ours = uf1(labels, column(shared, "prediction"), 3)
    theirs = uf1(column(read(paths[1]), "label"), column(read(paths[1]), "prediction"), 3)
    assert actual["Held-out subjects,"][3][2].startswith(f"{ours:.3f} [")
    assert actual["Held-out subjects,"][4][2].startswith(f"{theirs:.3f} [")
    majority = max(labels.count(c) for c in range(3)) / 25
    assert actual["Held-out subjects,"][1][4] == f"{majority:.3f}"
    assert actual["Paired permutation"][1][1] == f"{ours - theirs:+.3f}"
    # the baselines are those of the common clips, whichever result comes first
    assert tables(compare(capsys, "--common", *paths[::-1]))["Held-out subjects,"][1:3] \
        == actual["Held-out subjects,"][1:3]


def test_the_same_key_in_another_database_is_another_clip(make, capsys):
    a, b = make("a", 0.9), make("b", 0.9, databases=("smic",))
    assert "0 in common" in refused(capsys, a, b)
    assert "has no clip in common" in refused(capsys, "--common", a, b)


def test_other_labels_or_classes_are_refused_though_clips_are_cut(make, capsys):
    a = make("a", 0.9)
    other = np.array([r["label"] for r in sorted(read(a), key=lambda r: int(r["key"][1:]))], int)
    other[[3, 30]] = (other[[3, 30]] + 1) % 3
    b = make("b", 0.9, labels=other)
    for flags in ([], ["--common"]):
        line = refused(capsys, *flags, a, b)
        assert "2 clips carry another label" in line and "casme3/s0/k3 the first" in line
    actual = json.loads(b.read_text())
    b.write_text(json.dumps({**actual, "n_label": 4,
                             "confusion": [[*r, 0] for r in actual["confusion"]] + [[0] * 4]}))
    assert "tells 4 classes apart" in refused(capsys, a, b)


def test_classes_are_matched_by_their_names(make, capsys):
    """Which id a class has is the script's affair."""
    a, b, c = make("a", 0.9), make("b", 0.4), make("c", 0.4)
    content = json.loads(c.read_text())
    new = [2, 0, 1]  # of a, b, c
    matrix = np.zeros((3, 3), int)
    matrix[np.ix_(new, new)] = content["confusion"]
    c.write_text(json.dumps(content | {"classes": ["B", "c", "a"], "confusion": matrix.tolist()}))
    rows = read(c)
    for r in rows:
        for name in ("label", "prediction"):
            r[name] = new[int(r[name])]
    with open(c.with_name("predictions.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for pair in ((a, b, c), (c, b, a)):
        actual = tables(compare(capsys, *pair))
        cells = {r[0][0]: r[2:5] for r in actual["Held-out subjects,"][3:]}
        assert cells[str(1 + pair.index(b))] == cells[str(1 + pair.index(c))] \
            != cells[str(1 + pair.index(a))]
        same = f"{1 + min(pair.index(b), pair.index(c))} minus {1 + max(map(pair.index, (b, c)))}"
        assert {t[0]: t[1:3] for t in actual["Paired permutation"][1:]}[same] == ["+0.000",
                                                                                  "1.0000"]
    # other names in the same number stay what they are: ids
    c.write_text(json.dumps(json.loads(c.read_text()) | {"classes": ["x", "y", "z"]}))
    assert "carry another label" in refused(capsys, a, c)
    # the confusion matrix is that of the result's own ids
    c.write_text(json.dumps(content | {"classes": ["b", "c", "a"]}))
    assert "is not what" in refused(capsys, a, c)


def edit(name, change):
    def broken(path):
        file = path.with_name(name)
        file.write_text(change(file.read_text()))
    return broken


@pytest.mark.parametrize("broken, answer", [
    (lambda path: path.unlink(), "results.json: missing"),
    (lambda path: path.with_name("predictions.csv").unlink(), "predictions.csv: missing"),
    (edit("results.json", lambda t: t[:50]), "results.json: not a results.json"),
    (edit("results.json", lambda t: "[]"), "results.json: not a results.json"),
    (edit("results.json", lambda t: "[" * 100_000), "results.json: not a results.json"),
    (edit("results.json", lambda t: t.replace('"n_label": 3', '"n_label": 3.0')), "not a results."),
    (edit("results.json", lambda t: t.replace('"n_label": 3', '"n_label": 1000000')), "not a res"),
    (edit("results.json", lambda t: re.sub('"model_path": "[^"]*"', '"model_path": 5', t)),
     "not a results."),
    (edit("results.json", lambda t: re.sub(r'"seed": \d', '"seed": [0]', t)), "not a results."),
    (edit("results.json", lambda t: t.replace('"opt": {', '"opt": 3, "x": {')), "not a results."),
    (edit("results.json", lambda t: t.replace('"transductive": false', '"transductive": "no"')),
     "not a results."),
    (edit("results.json", lambda t: t.replace('"transductive": false', '"transductive": []')),
     "not a results."),
    (edit("predictions.csv", lambda t: ""), "needs the columns"),
    (edit("predictions.csv", lambda t: t.replace("label", "lable")), "needs the columns"),
    (edit("predictions.csv", lambda t: t + t.splitlines()[1] + "\n"), "predictions.csv:42: a clip"),
    (edit("predictions.csv", lambda t: re.sub(r"(k7,\d),\d", r"\1,5", t)), "in 0..2"),
    (edit("predictions.csv", lambda t: re.sub(r"(k7,\d),\d", r"\1,x", t)), "in 0..2"),
    (edit("predictions.csv", lambda t: t + "casme3,s9"),
     "predictions.csv:42: 2 fields, not as many fields as the header (8)"),
    (edit("predictions.csv", lambda t: "\n".join(t.splitlines()[:-1]) + "\n"), "is not what"),
    (lambda path: path.with_name("predictions.csv").write_bytes(b"\xff\xfe\x00"), "not a table"),
])
def test_what_is_no_result_is_refused_by_name(make, capsys, broken, answer):
    a, b = make("a", 0.9), make("b", 0.5)
    broken(b)
    line = refused(capsys, a, b)
    assert answer in line and str(b.parent) in line


def test_a_runs_folder_is_refused_with_what_to_name(make, capsys):
    a, b = make("a", 0.9), make("b", 0.5)
    assert "b: a folder; name a results.json" in refused(capsys, a, b.parent)


def test_the_same_result_twice_is_refused(make, capsys):
    a = make("a", 0.9)
    assert "named twice" in refused(capsys, a, a.parent / ".." / "a" / "results.json")


def test_results_that_differ_in_the_seed_are_also_one_row(make, capsys):
    # seeds 0, 1, 2 of one system, pre-trained with seeds of their own; two of another; one alone
    paths = [make(f"probe_{s}", 0.7, seed=s, tag="x",
                  model_path=f"runs/memory_seed_{s}_x/last.pth") for s in range(3)]
    # a release ago there was no --without
    paths += [make(f"probe_r{s}", 0.3, seed=s, learning_rate=0.5, **more)
              for s, more in ((4, {}), (5, {"without": []}))]
    paths += [make("probe_z", 0.5, seed=0)]
    actual = tables(compare(capsys, *paths))["Held-out subjects,"]
    rows = {r[0]: r[1:] for r in actual if "mean and standard deviation" in r[0]}
    assert list(rows) == [
        "1, 2, 3: probe, pre-trained alexnet, loso, x, mean and standard deviation over 3 seeds",
        "4, 5: probe, untrained alexnet, loso, mean and standard deviation over 2 seeds"]
    for line, members in zip(rows.values(), (paths[:3], paths[3:5])):
        each = [uf1(column(read(p), "label"), column(read(p), "prediction"), 3) for p in members]
        mean = sum(each) / len(each)
        deviation = (sum((u - mean) ** 2 for u in each) / (len(each) - 1)) ** 0.5
        assert deviation > 0
        assert line[:2] == ["40 / 8", f"{mean:.3f} ± {deviation:.3f}"]


@pytest.mark.parametrize("name", ["model_path", "pretrained", "finetune"])
def test_seeds_of_a_start_count_where_the_start_is_an_option_of_its_own(make, capsys, name):
    paths = [make(f"probe_{s}", 0.7, seed=s, **{name: f"r/x_seed_{s}/last.pth"},
                  details={"free": ["save_path", "num_workers"]}) for s in range(2)]
    rows = tables(compare(capsys, *paths))["Held-out subjects,"]
    assert [r[0].split(":")[0] for r in rows if "over 2 seeds" in r[0]] == ["1, 2"]


def test_seeds_of_pre_training_alone_count_and_repeated_runs_do_not(make, capsys):
    paths = [make(f"probe_{s}", 0.5 + s / 10, model_path=f"m_seed_{s}/last.pth") for s in range(2)]
    again = make("probe_again", 0.9, model_path="m_seed_0/last.pth", save_path="y")
    rows = tables(compare(capsys, *paths, again))["Held-out subjects,"]
    assert [r[0].split(":")[0] for r in rows if "over 2 seeds" in r[0]] == ["1, 2"]
    assert "deviation" not in compare(capsys, paths[0], again)


def test_other_data_or_options_are_not_another_seed(make, capsys):
    paths = [make("probe_a", 0.7), make("probe_b", 0.7, seed=1, learning_rate=0.2),
             make("probe_c", 0.7, seed=2, details={"data_digest": "e" * 64}),
             make("finetune_d", 0.7, seed=3)]
    printed = compare(capsys, *paths)
    assert "deviation" not in printed
    assert ["data", "dddddddd", "dddddddd", "eeeeeeee", "dddddddd"] \
        in tables(printed)["What changed"]


def test_one_subject_has_no_interval_and_no_p_is_nought(make, capsys, tmp_path):
    paths = [make(name, skill, labels=np.tile([0, 1, 2], 20), keep=60, each=60)
             for name, skill in (("a", 1), ("b", 0))]
    printed = compare(capsys, *paths, "--picture", tmp_path / "p.png")
    assert "1.000 [no interval]" in printed and "too narrow" not in printed
    several = compare(capsys, make("c", 1), make("d", 0))
    assert "resampling subjects (fewer than 15: too narrow)" in several
    assert re.fullmatch(r"\de-1\d", tables(printed)["Paired permutation"][1][-1])
    assert (tmp_path / "p.png").exists()


def test_several_databases_have_rows_of_their_own(make, capsys):
    a = make("a", 0.7, databases=("smic", "samm"))
    rows = {r[0]: r[1:] for r in tables(compare(capsys, a))["Held-out subjects,"]}
    for database in ("smic", "samm"):
        mine = [r for r in read(a) if r["database"] == database]
        expected = uf1(column(mine, "label"), column(mine, "prediction"), 3)
        assert rows[f"1: {database} of these"][:2] == ["20 / 8", f"{expected:.3f}"]


def test_whether_held_out_subjects_were_seen_has_a_column(make, capsys):
    """Seeds 0 to 2 of one system of whose checkpoints one does not say, and 3 and 4 of another."""
    paths = [make(f"probe_{s}", 0.7, seed=s, databases=("smic", "samm"), transductive=value,
                  learning_rate=rate)
             for s, (value, rate) in enumerate([(False, 1), (None, 1), (False, 1), (True, 2),
                                                (None, 2), (False, 3), (False, 3)])]
    actual = json.loads(paths[2].read_text())
    del actual["transductive"]  # as who wrote none
    paths[2].write_text(json.dumps(actual))
    rows = tables(compare(capsys, *paths))["Held-out subjects,"]
    place = rows[0].index("transductive")
    assert all(len(r) == len(rows[0]) for r in rows)
    words = {r[0].split(":")[0]: r[place] for r in rows if "of these" not in r[0]}
    assert words == {"": "transductive", "baseline": "", "1": "no", "2": "unknown", "3": "unknown",
                     "4": "yes", "5": "unknown", "6": "no", "7": "no", "1, 2, 3": "unknown",
                     "4, 5": "yes", "6, 7": "no"}
    assert {r[place] for r in rows if "of these" in r[0]} == {""}
    lines = [line for line in compare(capsys, "--latex", *paths).splitlines() if "alexnet" in line]
    for line, word in zip(lines, list(words.values())[2:], strict=True):
        assert line.endswith(f" & {word} " + 2 * "\\")


def test_rendered_data_are_named(make, capsys):
    a = make("a", 0.9, details={"rendered": True})
    assert "rendered stand-in data, no faces of people" in compare(capsys, a)
    assert "rendered stand-in data, no faces of people" in compare(capsys, "--latex", a)


def test_subjects_of_a_list_that_test_scores_chose_are_named(make, capsys):
    whole, part = make("a", 0.9), make("b", 0.8, details={"part": videos.CHOSEN})
    assert f"40 clips; {videos.CHOSEN}; in brackets" in compare(capsys, part)
    assert compare(capsys, whole, part).count(videos.CHOSEN) == 1
    assert videos.CHOSEN not in compare(capsys, whole)


# ---------------------------------------------------------------- LaTeX, published figures

def test_latex_holds_the_same_cells_escaped(make, capsys):
    paths = [make("probe_a", 0.9, tag="50%_of{it}&co|#1$"), make("probe_b", 0.3, seed=1),
             make("probe_c", 0.3, seed=2)]
    printed = compare(capsys, "--latex", "--published", *paths)
    expected = tables(compare(capsys, "--published", *paths))
    assert [printed.count(rf"\begin{{{kind}}}") for kind in ("table", "sidewaystable")] \
        == [printed.count(rf"\end{{{kind}}}") for kind in ("table", "sidewaystable")] == [2, 2]
    assert printed.startswith("% \\usepackage{booktabs,rotating}\n\n\\begin{")
    assert r"50\%\_of\{it\}\&co\textbar{}\#1\$" in printed
    blocks = re.findall(r"\\begin\{tabular\}\{(l+)\}\n\\toprule\n(.*?)\\bottomrule", printed, re.S)
    back = [(r"\textbackslash{}", "\\"), (r"\textasciicircum{}", "^"), (r"\textbar{}", r"\|"),
            (r"$\pm$", "±"), ("$-$", "-"), ("-{}-", "--"), ("{[}", "["), ("{]}", "]"),
            *((f"\\{c}", c) for c in "&%$#_{}")]
    for (columns, body), rows in zip(blocks, expected.values()):
        lines = [line for line in body.splitlines() if line != r"\midrule"]
        assert body.splitlines()[1] == r"\midrule" and len(lines) == len(rows)
        for line, cells in zip(lines, rows):
            assert line.endswith(r" \\")
            actual = re.split(r"(?<!\\)&", line[:-3])
            assert len(actual) == len(columns) == len(cells)
            for cell, text in zip(actual, cells):
                cell = cell.strip().replace(r"\allowbreak{}", "")
                whole = cell.removeprefix(r"\parbox[t]{20em}{\raggedright ")
                assert (whole != cell) == (len(text) > 44)
                cell = whole.removesuffix(r"\strut}") if whole != cell else cell
                for escaped, plain in back:
                    cell = cell.replace(escaped, plain)
                assert cell == text
    # nothing special is left bare, and nothing that is not ASCII
    assert printed.isascii() and printed.count("{") - printed.count(r"\{") \
        == printed.count("}") - printed.count(r"\}")


def compiled(printed, folder):
    """The text of the PDF that pdflatex makes of these tables, page by page, and its log.

    An underscore is set as a rule, which is no text: an = takes its place.
    """
    (folder / "tables.tex").write_text(printed, encoding="utf-8")
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,rotating}\n\\renewcommand{\\_}{=}\n"
        "\\begin{document}\n\\input{tables}\n\\end{document}\n")
    for _ in range(2):  # which way a page is turned stands in paper.aux
        done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"],
                              cwd=folder, capture_output=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (folder / "paper.pdf").stat().st_size > 5000
    text = subprocess.run(["pdftotext", "paper.pdf", "-"], cwd=folder, capture_output=True,
                          check=True).stdout.decode() if shutil.which("pdftotext") else None
    return text, (folder / "paper.log").read_text(errors="replace")


NASTY = r"a_b%c&d#e~f^g\h±i{j}$k|l<m>n[o]--p"


def test_an_option_is_shown_as_it_was_given(make, capsys):
    paths = [make("probe_a", 0.9, tag=NASTY, rates=None), make("probe_b", 0.9, rates=[0.1, None])]
    rows = tables(compare(capsys, *paths))["What changed"]
    assert ["tag", NASTY.replace("|", r"\|"), ""] in rows
    assert ["rates", "none", "[0.1, none]"] in rows


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX is installed")
@pytest.mark.parametrize("n", [1, 4, 13])
def test_latex_compiles_and_stays_on_its_page(make, capsys, tmp_path, monkeypatch, n):
    """Up to 13 results, whose 78 tests are more lines than a page has."""
    monkeypatch.setattr(measures, "DRAWS", 20)
    run = "runs/memory_softmax_4096_alexnet_lr_0.003_decay_0.0001_bsz_32_view_RGB_D_seed_0/last.pth"
    paths = [make(f"probe_{i}", 0.5, seed=i, tag=NASTY, transductive=None if i else True,
                  databases=("smic", "samm"), **{} if i % 2 else {"model_path": run})
             for i in range(n)]
    text, log = compiled(compare(capsys, "--latex", "--published", *paths), tmp_path)
    assert not re.findall(r"Overfull.*|Float too large.*|Missing character.*|Too many.*", log)
    if text is None:
        pytest.skip("no pdftotext to read the PDF with")
    words = "".join(text.split()).translate(str.maketrans("\u02dc\u02c6", "~^"))
    # in the name of each result and of the means over seeds
    assert words.count(NASTY.replace("_", "=")) == n + 2 * (n > 2)
    assert words.count("unknown") == n - 1 + (n > 2)
    marks = compare_results.PUBLISHED.read_text().count("unverified")
    assert words.count("unverified") == marks + 1  # and in the caption
    assert "CAS(ME)^3" in words and "0.7353" in words


def test_a_minus_and_a_bracket_do_not_become_commands():
    assert compare_results.escape("-0.031") == "$-$0.031"
    assert compare_results.escape("a---b -- c-d") == "a-{}-{}-b -{}- c-d"
    assert compare_results.escape("[x] a-b ± ^\\~") \
        == r"{[}x{]} a-b $\pm$ \textasciicircum{}\textbackslash{}\textasciitilde{}"


def test_published_figures_stand_apart_and_are_complete(make, capsys):
    a = make("a", 0.9)
    assert "not comparable" not in compare(capsys, a)
    printed = compare(capsys, "--published", a)
    assert "Published figures, not comparable" in printed
    rows = tables(printed)["Published figures,"]
    assert rows[0] == ["method", "year", "source", "database", "n", "classes", "epoch selection",
                       "UF1", "UAR", "verified"]
    assert len(rows) > 20 and len({tuple(r[:6]) for r in rows}) == len(rows)
    for r in rows[1:]:
        assert all(r) and 2000 <= int(r[1]) <= 2030 and int(r[5]) > 1
        assert r[4] == "not stated" or int(r[4]) > 0
        assert 0 < float(r[7]) < 1 and 0 < float(r[8]) < 1
        # nobody has seen more of them in their sources; who does says so in published.csv
        assert r[9] == ("verified" if r[0].startswith("Micron-BERT") and r[5] == "4"
                        else "unverified")
    composite = {r[0]: r for r in rows if r[3] == "MEGC2019 composite"}
    assert composite["STSTNet (Liong et al.)"][4:] \
        == ["442", "3", "not stated", "0.7353", "0.7605", "unverified"]


GAP = ("no field is empty; 'not stated' where a paper is silent, and verified or unverified at the "
       "end")


@pytest.mark.parametrize("row, answer", [
    ("x,2020,y,z,,3,w,0.5,0.5,verified", GAP), ("x,2020,y,z,5,3,w,0.5,0.5,", GAP),
    ("x,2020,y,z,5,3,w,0.5,0.5", "9 fields, not as many fields as the header (10)"),
    ("x,2020,y,z,5,3,w,0.5,0.5,yes", GAP)])
def test_a_gap_among_the_published_figures_is_refused(make, capsys, tmp_path, monkeypatch, row,
                                                      answer):
    a, path = make("a", 0.9), tmp_path / "published.csv"
    ours = compare_results.PUBLISHED.read_text()
    monkeypatch.setattr(compare_results, "PUBLISHED", path)
    path.write_text(ours + "x,2020,y,z,5,3,w,0.5,0.5,verified\n")
    assert "| x | 2020 | y | z | 5 | 3 | w | 0.5 | 0.5 | verified |" \
        in compare(capsys, "--published", a)
    path.write_text(ours + row + "\n")
    place = 1 + ours.count("\n")
    assert refused(capsys, "--published", a) == f"error: {path}:{place}: {answer}"


@pytest.mark.pictures
def test_the_picture_shows_every_result_with_its_interval(make, capsys, tmp_path, monkeypatch):
    drawn, draw = [], pictures.draw_comparison

    def noted(path, rows, baselines, title, units):
        drawn.append((rows, baselines))
        draw(path, rows, baselines, title, units)
    monkeypatch.setattr(pictures, "draw_comparison", noted)
    paths = make("a", 0.9), make("b", 0.4)
    cells = {r[0]: r[2] for r in tables(compare(
        capsys, *paths, "--picture", tmp_path / "x.png"))["Held-out subjects,"]}
    ((rows, baselines),) = drawn
    for name, uf1, (low, high) in rows:
        assert cells[name] == f"{uf1:.3f} [{low:.3f}, {high:.3f}]"
    assert len(rows) == 2 and list(baselines) == ["majority", "stratified_random"]
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG" and min(image.size) > 200
