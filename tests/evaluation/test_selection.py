"""Nested choice of epochs and rate, what picking on the test subjects would give, shortcuts."""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_set, finetune, probe, script
from runs import curves, only, rows
from scipy.stats import rankdata
from sklearn.metrics import f1_score

import dataset
import util
from dataset import Clip, ClipSet, read_clips
from evaluation import (
    descent,
    fold_heads,
    heldout,
    logistic,
    measures,
    pictures,
    probing,
    result_files,
    shortcuts,
)
from images.lists import write_lists
from training import record
from training.options import PENALTIES

N, DIM, CLASSES, FOLDS = 48, 12, 3, 6
RATES = [0.01, 0.3]


def options(**changes):
    return SimpleNamespace(**{"seed": 3, "epochs": 4, "batch_size": 9, "learning_rate": 0.1,
                              "lr_decay_epochs": [2], "lr_decay_rate": 0.5, "momentum": 0.9,
                              "weight_decay": 0.01, "l2": None, **changes})


@pytest.fixture
def data():
    """(features `[2, N, D]`, labels, fold and inner group of each clip)"""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    features = rng.normal(0, 1, (2, N, DIM)).astype(np.float32)
    features[:, np.arange(N), labels] += 1.0
    fold_of = np.repeat(np.arange(FOLDS), N // FOLDS)
    return torch.from_numpy(features), labels, fold_of, fold_of % 3


def nested(data, held_out=range(FOLDS), labels=None):
    features, own, fold_of, groups = data
    task = fold_heads.Task(features, own if labels is None else labels, CLASSES, fold_of,
                           list(held_out))
    inner = descent.InnerFolds([f"fold{f}" for f in held_out], task, groups, RATES)
    stats = logistic.statistics(features, inner.task.training())
    heads = fold_heads.draw(inner.names, stats, CLASSES, 3)
    trained = descent.Descent(heads, inner.task, 1, options(), inner=inner)
    for epoch in range(1, 5):
        trained.epoch(epoch)
        inner.follow(epoch, heads)
    inner.keep_best(heads)
    return inner, heads


def alone(data, fold, group, rate, epochs):
    """One head that trains without the fold and the inner group (None: with all groups), by the
    same SGD but on its own, on features standardised by hand; logits of all clips, its weight."""
    features, labels, fold_of, groups = data
    apart = np.where((fold_of == fold) | (groups == group), 0, 1)
    rows = features[:, apart == 1].reshape(-1, DIM)
    seen = (features - rows.mean(0)) / rows.std(0, correction=0)
    plain = logistic.Statistics(torch.zeros(1, DIM), torch.ones(1, DIM),
                                torch.ones(1, DIM, dtype=torch.bool))
    head = fold_heads.draw([f"fold{fold}"], plain, CLASSES, 3)
    descent.Descent(head, fold_heads.Task(seen, labels, CLASSES, apart, [0]), 1,
                    options(epochs=epochs, learning_rate=rate)).run()
    return head(seen[0])[:, 0].detach(), head.weight[0].detach()


def test_the_choice_is_that_of_a_loop_over_outer_and_inner_folds(data):
    features, labels, fold_of, groups = data
    inner, heads = nested(data)
    for fold in range(FOLDS):
        tried = {}
        for epochs in range(1, 5):
            for rate in RATES:
                said = np.empty(N, int)
                for group in range(3):
                    left = groups == group
                    said[left] = alone(data, fold, group, rate, epochs)[0].argmax(1)[left]
                train = fold_of != fold
                tried[epochs, rate] = f1_score(labels[train], said[train], average="macro",
                                               labels=range(CLASSES), zero_division=0)
        best = max(tried, key=lambda k: (round(tried[k], 9), -k[0], -RATES.index(k[1])))
        chosen = inner.chosen(fold)
        assert (chosen["epochs"], chosen["learning_rate"]) == best
        assert chosen["inner_uf1"] == pytest.approx(tried[best], abs=1e-9)
        logits, weight = alone(data, fold, None, best[1], best[0])
        assert torch.allclose(heads.weight[fold], weight, atol=1e-5)
        assert torch.allclose(heads(features[0])[:, fold], logits, atol=1e-4)
    assert len({tuple(inner.chosen(f).values()) for f in range(FOLDS)}) > 1


def test_garbage_labels_of_the_held_out_fold_change_neither_choice_nor_weights(data):
    _, labels, fold_of, _ = data
    for fold in (0, 4):
        garbage = np.where(fold_of == fold, (labels + 1) % CLASSES, labels)
        (plain, heads), (other, actual) = nested(data), nested(data, labels=garbage)
        assert plain.chosen(fold) == other.chosen(fold)
        assert torch.equal(heads.weight[fold], actual.weight[fold])
        assert torch.equal(heads.bias[fold], actual.bias[fold])
        assert any(plain.chosen(f) != other.chosen(f) for f in range(FOLDS))


def test_a_fold_chooses_the_same_alone_as_among_others(data):
    every, some = nested(data)[0], nested(data, [1, 4])[0]
    for fold in (1, 4):
        assert every.chosen(fold) == some.chosen(fold)


def test_probing_with_inner_selection_from_end_to_end(drawn, quick, pretrained, tmp_path):
    flags = ["--data_folder", drawn, *quick, "--epochs", 3, "--protocol", "loso", "--select",
             "inner", "--select_rates", 0.05, 0.5, "--model_path", pretrained]
    probe(*flags, "--save_path", tmp_path)
    results = json.loads((only(tmp_path) / "results.json").read_text())
    assert results["choices"].keys() == {"s1", "s2", "s3", "s4"}
    assert all(c["epochs"] in (1, 2, 3) and c["learning_rate"] in (0.05, 0.5)
               for c in results["choices"].values())
    assert results["n"] == 12 and "oracle_best_epoch" not in results


def test_solved_heads_choose_a_penalty_and_follow_no_epochs(drawn, cache, pretrained, tmp_path,
                                                            capsys):
    flags = ["--data_folder", drawn, "--cache", cache, "--model", "resnet18v1", "--protocol",
             "loso", "--model_path", pretrained]
    probe(*flags, "--save_path", tmp_path / "inner")
    folder = only(tmp_path / "inner")
    assert folder.name.startswith("probe_memory_") and "_layer_6_l2_inner_loso_both_seed_0" in \
        folder.name
    results = json.loads((folder / "results.json").read_text())
    assert results["choices"].keys() == {"s1", "s2", "s3", "s4"}
    assert all(c["l2"] in PENALTIES and 0 <= c["inner_uf1"] <= 1 and len(c) == 2
               for c in results["choices"].values())
    assert "oracle_best_epoch" not in results and results["opt"]["solver"] == "lbfgs"
    chosen = [c["l2"] for c in results["choices"].values()]
    assert f"chosen by inner folds: penalty (--l2) {min(chosen):g} to {max(chosen):g}" in \
        capsys.readouterr().out
    lines = record.read_log(folder)[1:]
    assert [line["l2"] for line in lines] == list(PENALTIES)
    assert all(0 <= line["inner_uf1"] <= 1 and 0 <= line["train_accuracy"] <= 1 for line in lines)
    probe(*flags, "--save_path", tmp_path / "fixed", "--l2", 0.003)
    folder = only(tmp_path / "fixed")
    assert "_layer_6_l2_0.003_loso_both_seed_0" in folder.name
    results = json.loads((folder / "results.json").read_text())
    assert all(c == {"l2": 0.003} for c in results["choices"].values())
    assert len(results["choices"]) == 4 and "oracle_best_epoch" not in results
    assert [line["l2"] for line in record.read_log(folder)[1:]] == [0.003]
    assert "chosen by inner folds" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, name", [
    (["--epochs", "4"], "sgd_lr_0.1_decay_0.0001_bsz_256"),
    (["--learning_rate=0.3", "--lr_decay_epochs", "9"], "sgd_lr_0.3_decay_0.0001_bsz_256"),
    (["--batch_size", "16"], "sgd_lr_0.1_decay_0.0001_bsz_16"),
    (["--momentum", "0.5", "--weight_decay", "0"], "sgd_lr_0.1_decay_0_bsz_256"),
    (["--select", "inner"], "sgd_lr_0.1_decay_0.0001_bsz_256"), (["--oracle_curve"], "sgd_lr_0.1"),
    (["--solver", "sgd"], "sgd_lr_0.1_decay_0.0001_bsz_256"), ([], "l2_inner"),
    (["--solver", "lbfgs"], "l2_inner"), (["--l2", "0.01"], "l2_0.01")], ids=" ".join)
def test_flags_of_sgd_select_it_and_say_so(capsys, monkeypatch, flags, name):
    module = script("LinearProbing_DVSCL_10fold")
    opt = module.parse_option(["--data_folder", "d", "--save_path", "s", "--model_path", "random",
                               *flags])
    sgd = name.startswith("sgd")
    assert opt.solver == ("sgd" if sgd else "lbfgs")
    said = capsys.readouterr().out
    implied = flags[0].partition("=")[0] if sgd and flags[0] != "--solver" else None
    assert (f"{implied}: heads are trained by SGD" in said) == (implied is not None)

    def named(run, *_):
        raise util.RunFailed(run.folder.name)
    monkeypatch.setattr(heldout, "HeldOut", named)
    with pytest.raises(util.RunFailed, match=f"^probe_random_alexnet_view_RGB_D_layer_5_{name}"):
        module.evaluate(opt, [], "cpu", None, None)


@pytest.mark.parametrize("flags, message", [
    (["--solver", "lbfgs", "--epochs", "3"], "--epochs goes with --solver sgd"),
    (["--solver", "lbfgs", "--select=inner"], "--select goes with --solver sgd"),
    (["--solver", "lbfgs", "--oracle_curve"], "--oracle_curve goes with --solver sgd"),
    (["--solver", "sgd", "--l2", "0.1"], "--l2 goes with --solver lbfgs"),
    (["--l2", "0.1", "--learning_rate", "0.1"], "--l2 goes with --solver lbfgs"),
    (["--l2", "0"], "--l2: 0 is out of range")], ids=" ".join)
def test_flags_of_the_two_solvers_exclude_each_other(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        script("LinearProbing_DVSCL_10fold").parse_option(
            ["--data_folder", "d", "--save_path", "s", "--model_path", "random", *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("held_out", [4, 6])
def test_inner_groups_do_not_move_with_the_labels_of_a_held_out_subject(tmp_path, monkeypatch,
                                                                       held_out):
    draw_set(tmp_path, 6, 4, n_label=3)
    clips = read_clips(tmp_path)
    garbage = replace(clips, clips=[replace(c, label=(c.label + 1) % 3)
                                    if c.subject == f"s{held_out}" else c for c in clips.clips])
    stratified = [dataset.subject_groups(these, 5).of.tolist() for these in (clips, garbage)]
    assert stratified[0] != stratified[1]
    groups = []

    def seen(names, task, inner, rates):
        groups.append(inner)
        raise util.RunFailed("seen")
    monkeypatch.setattr(descent, "InnerFolds", seen)
    for these in (clips, garbage):
        write_lists(tmp_path, these.clips)
        with pytest.raises(SystemExit):
            probe("--data_folder", tmp_path, "--cache", "off", "--model", "resnet18v1", "--layer",
                  2, "--model_path", "random", "--protocol", "loso", "--select", "inner",
                  "--save_path", tmp_path / f"out{len(groups)}")
    assert groups[0].tolist() == groups[1].tolist()
    assert sorted(np.bincount(groups[0])) == [4, 4, 4, 4, 8]  # whole subjects, evenly


def test_rates_to_choose_from_follow_the_learning_rate(capsys):
    parse = script("LinearProbing_DVSCL_10fold").parse_option
    needed = ["--data_folder", "d", "--save_path", "s", "--model_path", "random"]
    assert parse(needed).select_rates == [0.03, 0.1, 0.3]
    assert parse([*needed, "--learning_rate", "30"]).select_rates == [9, 30, 90]
    assert parse([*needed, "--select", "inner", "--select_rates", "1", "2"]).select_rates == [1, 2]
    with pytest.raises(SystemExit):
        parse([*needed, "--select_rates", "1"])
    assert "--select_rates goes with --select inner" in capsys.readouterr().err


def test_inner_selection_takes_three_subjects(drawn, quick, pretrained, tmp_path, capsys):
    lists = tmp_path / "lists"
    clips = [c for c in read_clips(drawn).clips if c.subject in ("s1", "s3")]
    write_lists(lists, clips)
    util.write_json(lists / "encoding.json", {"difference": "signed"})
    with pytest.raises(SystemExit) as end:
        probe("--data_folder", drawn, "--list_folder", lists, *quick, "--protocol", "loso",
              "--select", "inner", "--model_path", pretrained, "--save_path", tmp_path)
    assert end.value.code == 2 and "--select fixed" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- seeds, the same command twice

def test_the_same_command_gives_the_same_predictions(drawn, quick, pretrained, tmp_path):
    for run, name, more in ((probe, "probe", ["--protocol", "loso"]),
                            (finetune, "tuned", ["--subject", "s1"])):
        actual = []
        for place in "ab":
            save = tmp_path / name / place
            run("--data_folder", drawn, *quick, *more, "--model_path", pretrained,
                "--save_path", save)
            actual.append((only(save) / "predictions.csv").read_bytes())
        assert actual[0] == actual[1]


def test_several_seeds_are_run_and_averaged(drawn, quick, tmp_path, capsys):
    probe("--data_folder", drawn, *quick, "--protocol", "loso", "--model_path", "random",
          "--save_path", tmp_path, "--seeds", 0, 4)
    runs = sorted(p.parent.name for p in tmp_path.glob("*/results.json"))
    assert [name.rpartition("_seed_")[2] for name in runs] == ["0", "4"]
    (path,) = tmp_path.glob("*_seeds_0_4.json")
    actual, each = json.loads(path.read_text()), [
        json.loads((tmp_path / run / "results.json").read_text()) for run in runs]
    assert actual["seeds"] == [0, 4] and actual["runs"] == runs
    assert each[0]["opt"]["seed"] == 0 and each[1]["opt"]["seed"] == 4
    for name in measures.MEASURES:
        a, b = each[0][name], each[1][name]
        assert actual[name]["mean"] == pytest.approx((a + b) / 2)
        assert actual[name]["std"] == pytest.approx(abs(a - b) / 2 ** 0.5)
    uf1 = actual["uf1"]
    assert f"uf1 {uf1['mean']:.3f} ± {uf1['std']:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # seed 5 has fewer clips than seed 0
        probe("--data_folder", drawn, *quick, "--protocol", "loso", "--model_path", "random",
              "--save_path", tmp_path, "--seeds", 0, 5, "--subject", "s1")
    assert "holds 3 clips, not the 12 of" in capsys.readouterr().err
    assert not list(tmp_path.glob("*_seeds_0_5*"))
    shutil.rmtree(next(tmp_path.glob("*_seed_5")))
    flags = ["--data_folder", drawn, *quick, "--protocol", "loso", "--save_path", tmp_path,
             "--seeds", 7]
    for seed, model, said in ((4, "random", "_seed_4: exists"), (
            5, tmp_path / "{seed}.pth", "5.pth: no such checkpoint")):
        with pytest.raises(SystemExit):  # before the first seed trains
            probe(*flags, seed, "--model_path", model)
        assert said in capsys.readouterr().err and not list(tmp_path.glob("*_seed_7*"))
    with pytest.raises(SystemExit):
        probe("--data_folder", drawn, "--model_path", "m.pth", "--save_path", "s", "--seeds", 7, 8)
    assert "--seeds: heads that are solved for draw nothing" in capsys.readouterr().err


# ---------------------------------------------------------------- picked on the test subjects

def kept(labels, history):
    return {"history": history}, [{"label": label} for label in labels]


def test_oracle_best_epoch_by_hand():
    actual = measures.oracle_best_epoch(result_files.histories_of([
        kept([0, 1, 1], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),   # 2, 3, 2 correct
        kept([0, 2], [[0, 1, 1], [1, 1, 2]])]), 3)             # 1, 0, 1 correct
    assert actual["per_subject"]["epochs"] == [2, 1]
    assert actual["per_subject"]["accuracy"] == pytest.approx(4 / 5)
    # class 0: 2 of 2; class 1: two hits, one of class 2 called 1; class 2: none
    assert actual["per_subject"]["uf1"] == pytest.approx((1 + 4 / 5 + 0) / 3)
    truth, said = [0, 1, 1, 0, 2], {1: [1, 1, 1, 0, 1], 2: [0, 1, 1, 1, 1], 3: [0, 0, 1, 1, 2]}
    each = {e: f1_score(truth, s, average="macro", labels=range(3), zero_division=0)
            for e, s in said.items()}
    assert actual["common"]["epoch"] == max(each, key=each.get)
    assert actual["common"]["uf1"] == pytest.approx(max(each.values()))


def test_oracle_best_epoch_needs_everybody_over_the_same_epochs():
    whole, short = kept([0, 1], [[0, 0], [1, 1]]), kept([0], [[0]])
    assert len(result_files.histories_of([whole, whole])) == 2
    assert result_files.histories_of([whole, short]) == []
    assert result_files.histories_of([whole, ({}, [{"label": 0}])]) == []
    assert result_files.histories_of([({}, [{"label": 0}])] * 2) == []


@pytest.mark.parametrize("run, flags", [(probe, ["--protocol", "loso"]),
                                        (finetune, ["--subject", "s1", "s3"])])
def test_the_last_epoch_of_the_history_is_the_prediction(drawn, quick, pretrained, tmp_path,
                                                         monkeypatch, run, flags):
    drawn_curves, draw = [], pictures.draw_curves
    monkeypatch.setattr(pictures, "draw_curves", lambda folder, held_out=None: (
        drawn_curves.append(held_out), draw(folder, held_out)))
    run("--data_folder", drawn, *quick, *flags, "--epochs", 2, "--model_path", pretrained,
        "--save_path", tmp_path, "--oracle_curve")
    folder = only(tmp_path)
    for details, said in result_files.read_subjects(folder).values():
        history = np.array(details["history"])
        assert history.shape == (len(said), 2)
        assert history[:, -1].tolist() == [row["prediction"] for row in said]
    results = json.loads((folder / "results.json").read_text())
    assert results["oracle_best_epoch"]["common"]["uf1"] >= results["uf1"] - 1e-9
    each = results["oracle_best_epoch"]["per_subject"]["epochs"]
    for name, (details, said) in result_files.read_subjects(folder).items():
        right = np.array(details["history"]) == np.array([[row["label"]] for row in said])
        assert each.pop(name) == 1 + right.sum(0).argmax()
    assert not each
    shown = curves(tmp_path / "tensorboard" / folder.name)["oracle/uf1"]
    assert shown[2] == pytest.approx(results["uf1"], abs=1e-6)
    assert drawn_curves[0].keys() == {"oracle/uf1", "oracle/uar", "oracle/accuracy"}
    assert drawn_curves[0]["oracle/uf1"] == pytest.approx([shown[1], shown[2]], abs=1e-6)


def test_no_oracle_curve_unless_asked_for(drawn, quick, pretrained, tmp_path):
    probe("--data_folder", drawn, *quick, "--protocol", "loso", "--model_path", pretrained,
          "--save_path", tmp_path)
    shown = curves(tmp_path / "tensorboard" / only(tmp_path).name)
    assert shown and not any("oracle" in tag for tag in shown)


# ---------------------------------------------------------------- shortcuts

def clip_set(subjects):
    clips = [Clip(0, s, f"k{i:02d}", 0, (f"{i}.png",) * 2) for i, s in enumerate(subjects)]
    return ClipSet(clips, None, ("rgb", "depth"), (3, 1), {"difference": "signed"}, 1)


def test_retrieval_by_hand():
    clips = clip_set(["a", "a", "b", "b", "c"])
    rgb = torch.eye(5)
    depth = torch.eye(5)[[1, 0, 2, 3, 4]]      # the two clips of a are mixed up
    depth[3] = torch.tensor([0, 0, 0, 0.5, 0.8])
    depth[4] = torch.tensor([0, 0, 0, 0.9, 0.4])  # c looks like the second clip of b
    actual = shortcuts.retrieval(clips, rgb, depth)
    assert actual["all"] == {"n": 5, "top1": pytest.approx(1 / 5), "chance": 1 / 5}
    assert actual["within"] == {"n": 4, "top1": pytest.approx(2 / 4), "chance": pytest.approx(0.5)}


@pytest.mark.parametrize("l2", [None, [1e-3, 1e-2, 1e-4]], ids=["sgd", "solved"])
def test_subjects_are_told_apart_where_the_features_do_and_not_otherwise(l2):
    clips, opt = clip_set(["a"] * 12 + ["b"] * 9 + ["c"]), options(epochs=30)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 22, 6, generator=rng) + 9  # what all clips have in common
    told = noise.clone()
    told[0, :12, 0] -= 4
    told[0, 12:21, 0] += 4

    def named(features, l2):
        return shortcuts.subject_probe(opt, clips, SimpleNamespace(
            encoded=probing.Encoded(features, 1, None), l2=l2))
    actual = named(told, l2)
    assert (actual["n"], actual["n_subjects"]) == (21, 2)
    assert actual["accuracy"] > 0.95 and actual["chance"] == pytest.approx(12 / 21)
    assert named(noise, l2)["accuracy"] < 0.8


def test_the_decomposition_of_the_heads_tells_subjects_apart_too(monkeypatch):
    people = ["a", "b"] * 9 + ["a"] * 3
    clips, rng = clip_set(people), torch.Generator().manual_seed(0)
    features = torch.randn(1, 21, 6, generator=rng) + 9
    for i, clip in enumerate(clips.clips):
        features[0, i, 0] += 4 if clip.subject == "b" else -4
    frozen = SimpleNamespace(
        encoded=probing.Encoded(features, 1, None), l2=[1e-3],
        regression=logistic.Regression(features, np.arange(21) % 3, 3))  # classes, which are others
    monkeypatch.setattr(logistic, "_eigen", None)  # not another one
    actual = shortcuts.subject_probe(options(epochs=1), clips, frozen)
    assert (actual["n"], actual["n_subjects"]) == (21, 2) and actual["accuracy"] > 0.95


def test_head_motion_correlates_by_ranks(tmp_path):
    clips, rng = clip_set(["a"] * 7), np.random.default_rng(0)
    shift, p = rng.random(7), rng.random(7)
    util.write_json(tmp_path / "manifest.json", {"clips": [
        {"shift": s, "residual": 0.5, "files": {f"{i}.png": ""}} for i, s in enumerate(shift)]})
    said = [{"database": "casme3", "subject": "a", "key": f"k{i:02d}", "label": 0,
             "prediction": i % 2, "probabilities": [v, 1 - v]} for i, v in enumerate(p)]
    actual = shortcuts.head_motion(clips, said, tmp_path)
    expected = np.corrcoef(rankdata(shift), rankdata(p))[0, 1]
    assert actual["shift"]["n"] == 7 and actual["shift"]["p_0"] == pytest.approx(expected)
    assert actual["shift"]["p_1"] == pytest.approx(-expected)
    assert actual["residual"]["p_0"] is None
    assert shortcuts.head_motion(clips, said, tmp_path / "nowhere") is None
    assert any("(residual, 7 clips)" in line for line in shortcuts.describe(
        {"head_motion": actual}, ["a", "b"]))


def test_motion_that_could_be_followed_in_no_clip_is_not_told(tmp_path):
    clips = clip_set(["a"] * 2)
    util.write_json(tmp_path / "manifest.json", {"clips": [
        {"shift": 0.1 * i, "residual": None, "files": {f"{i}.png": ""}} for i in range(2)]})
    said = [{"database": "casme3", "subject": "a", "key": f"k{i:02d}", "label": 0,
             "prediction": i, "probabilities": [i, 1 - i]} for i in range(2)]
    actual = shortcuts.head_motion(clips, said, tmp_path)
    assert actual["residual"]["n"] == 0
    (line,) = shortcuts.describe({"head_motion": actual}, ["a", "b"])
    assert "(shift, 2 clips)" in line


def test_probing_reports_the_shortcuts(drawn, quick, pretrained, tmp_path, capsys):
    probe("--data_folder", drawn, *quick, "--protocol", "loso", "--model_path", pretrained,
          "--save_path", tmp_path)
    actual = json.loads((only(tmp_path) / "results.json").read_text())["shortcuts"]
    assert actual["subject"]["n"] == len(rows(only(tmp_path))) == 12
    assert actual["subject"]["chance"] == pytest.approx(1 / 4)
    assert actual["retrieval"]["all"]["chance"] == pytest.approx(1 / 12)
    assert actual["retrieval"]["within"]["chance"] == pytest.approx(1 / 3)
    assert actual["head_motion"] is None
    assert "the same features name the subject of 12 clips" in capsys.readouterr().out


def test_an_inner_choice_of_two_subjects_leaves_no_run_folder(tmp_path, capsys):
    draw_set(tmp_path / "d", 2, 4)
    with pytest.raises(SystemExit):
        probe("--data_folder", tmp_path / "d", "--cache", "off", "--model", "resnet18v1",
              "--model_path", "random", "--select", "inner", "--save_path", tmp_path / "r")
    assert "--select inner takes three subjects" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
