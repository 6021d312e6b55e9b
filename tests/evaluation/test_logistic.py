"""Solved heads against scikit-learn, fold by fold in double precision; what they may not see."""
import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import script
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

import dataset
from evaluation import descent, fold_heads, logistic, measures, probing
from images import encoding
from models import create_classifier, create_model
from models.classifier import Classifier
from training.options import PENALTIES

FOLDS, CLASSES = 6, 4
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def draw(n, dim, views=2, seed=0, missing=False, told=1.0):
    """(features `[V, N, D]`, labels, fold of each clip): nearly all of a feature is what the clips
    have in common. Two features are the same everywhere, one only outside fold 2; missing: class
    3 occurs in fold 1 alone; told: how far the classes lie apart."""
    rng = np.random.default_rng(seed)
    labels, fold_of = rng.integers(0, CLASSES, n), np.arange(n) % FOLDS
    if missing:
        labels[labels == 3] = 0
        labels[np.flatnonzero(fold_of == 1)[:3]] = 3
    change = rng.normal(0, 1, (n, dim))
    change[:, :CLASSES] += told * np.eye(CLASSES)[labels]
    common = rng.uniform(3, 9, dim) * rng.choice([-1, 1], dim)
    features = common + change * rng.uniform(0.2, 1, dim) + rng.normal(0, 0.2, (views, n, dim))
    features[..., 5], features[..., 7] = 4.3, 0
    features[:, fold_of != 2, 6] = -2.5
    return torch.from_numpy(features.astype(np.float32)), labels, fold_of


FITTED = {}  # by what was asked


def fit(features, labels, train, l2, balanced=False):
    """scikit-learn on all views of the clips `train` (bool `[N]`): (classes it has seen,
    probabilities of the plain view of every clip), found once for the same question."""
    key = *(hashlib.sha256(np.ascontiguousarray(part).data).digest()
            for part in (features, labels, train)), l2, balanced
    if key not in FITTED:
        FITTED[key] = fitted(features, labels, train, l2, balanced)
    return FITTED[key]


def fitted(features, labels, train, l2, balanced):
    """What `fit` returns, computed."""
    rows = features[:, train].double().numpy().reshape(-1, features.shape[2])
    scaler = StandardScaler().fit(rows)
    rows, y = scaler.transform(rows), np.tile(labels[train], len(features))
    length = np.square(rows).sum(1).mean()
    # with two classes scikit-learn's is the difference of two heads, of twice the squared norm
    heads = 2 if len(set(y)) == 2 else 1
    model = LogisticRegression(C=heads / (l2 * length * len(rows)), tol=1e-10, max_iter=100_000,
                               solver="newton-cg", class_weight="balanced" if balanced else None)
    model.fit(rows, y)
    return model.classes_, model.predict_proba(scaler.transform(features[0].double().numpy()))


def task_of(data, held_out=tuple(range(FOLDS)), n_label=CLASSES):
    """The fold_heads.Task of (features, labels, fold of each clip)."""
    features, labels, fold_of = data
    return fold_heads.Task(features, labels, n_label, fold_of, list(held_out))


def solve(data, l2, held_out=tuple(range(FOLDS)), **more):
    return fold_heads.solve(task_of(data, held_out), l2, **more)


def probabilities(heads, features):
    """`[N, F, C]` of the plain view"""
    with torch.no_grad():
        return heads(features[0]).softmax(2).numpy()


def assert_agrees(data, l2, loss="crossentropy"):
    """Every fold's head predicts as scikit-learn's; returns the largest difference."""
    features, labels, fold_of = data
    actual, most = probabilities(solve(data, l2, loss=loss)[0], features), 0
    for fold in range(FOLDS):
        classes, expected = fit(features, labels, fold_of != fold, l2, loss == "balanced")
        ours = actual[:, fold]
        assert (ours.argmax(1) == classes[expected.argmax(1)]).all(), f"fold {fold}"
        assert ours[:, classes] == pytest.approx(expected, abs=1e-4), f"fold {fold}"
        most = max(most, abs(ours[:, classes] - expected).max())
    return most


@pytest.mark.parametrize("l2", L2)
@pytest.mark.parametrize("n, dim, views, loss, missing", [
    (60, 150, 2, "crossentropy", False), (60, 150, 2, "balanced", True),
    (90, 20, 2, "crossentropy", True), (90, 20, 3, "balanced", False),
    (30, 600, 1, "crossentropy", False), (30, 600, 2, "balanced", True)])
def test_heads_of_all_folds_agree_with_scikit_learn(capsys, n, dim, views, loss, missing, l2):
    data = draw(n, dim, views, missing=missing)
    square = data[0].square().sum(2).mean()
    assert data[0].mean(1, keepdim=True).square().sum() / views > 0.96 * square
    assert missing == (3 not in data[1][data[2] != 1])
    assert_agrees(data, l2, loss)
    assert "not converged" not in capsys.readouterr().out


@pytest.mark.parametrize("dim", [40, 150, 600], ids=["narrow", "alike", "wide"])
def test_clips_that_are_alike_and_have_other_labels_agree_too(dim, monkeypatch):
    """Their rows' kernel maps differences to 0, where labels that no head can fit push for ever."""
    features, labels, fold_of = draw(60, dim)
    features[:, 1::3] = features[:, ::3]
    assert (labels[1::3] != labels[::3]).mean() > 0.5
    for l2 in L2:
        assert_agrees((features, labels, fold_of), l2)
        monkeypatch.setattr(logistic, "COLUMNS", 2 * CLASSES)  # as with many folds
        assert_agrees((features, labels, fold_of), l2)
        monkeypatch.undo()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """(clips, images) of a small rendered set."""
    folder = tmp_path_factory.mktemp("rendered")
    script("render").main(["casme3", "--data_folder", folder, "--subjects", FOLDS,
                           "--clips_per_subject", 6, "--size", 64, "--num_workers", 1])
    clips = dataset.read_clips(folder)
    return clips, dataset.load_images(clips)[0]


@pytest.mark.parametrize("layer, dim", [(6, 512), (3, 2048)])
@pytest.mark.parametrize("folds", [2, 48], ids=["as with many folds", "few"])
@pytest.mark.usefixtures("full_width")
def test_heads_on_features_of_an_encoder_agree_with_scikit_learn(small_crops, rendered, layer, dim,
                                                                 folds, monkeypatch):
    monkeypatch.setattr(logistic, "COLUMNS", folds * CLASSES)
    clips, images = rendered
    torch.manual_seed(0)
    classifier = Classifier(
        create_model("resnet18v1"), create_classifier("resnet18v1", layer, CLASSES), layer,
        encoding.fixed_normalization("signed", clips.views, clips.channels))
    features = probing.encode(classifier, images, torch.no_grad, views=2).features
    assert features.shape == (2, 36, dim)
    data = features, clips.labels, dataset.subject_folds(clips).of
    assert len(set(data[1])) == CLASSES
    for l2 in L2:
        assert_agrees(data, l2)


def test_a_fold_is_solved_alike_alone_among_others_and_in_parts(monkeypatch, threads):
    data = draw(60, 40)
    weights = []
    for held_out, folds in ((range(FOLDS), 512), (range(FOLDS), 2), ([1], 512), ([4, 1], 512)):
        monkeypatch.setattr(logistic, "COLUMNS", folds * CLASSES)
        for number in (1, 2):  # parts one after the other, and side by side
            torch.set_num_threads(number)
            heads, _ = solve(data, 1e-3, held_out)
            with ThreadPoolExecutor(1) as pool:  # a new thread has as many
                assert pool.submit(torch.get_num_threads).result() == number
            weights.append(heads.weight[list(held_out).index(1)])
    for other in weights[1:]:
        assert (other - weights[0]).norm() < 1e-4 * weights[0].norm()


def test_more_classes_than_a_thread_solves_at_a_time_take_a_fold_each(monkeypatch):
    data = draw(60, 40)
    heads, _ = solve(data, 1e-3)
    monkeypatch.setattr(logistic, "COLUMNS", CLASSES - 1)  # as with the subjects of a large set
    few, _ = solve(data, 1e-3)
    assert (few.weight - heads.weight).norm() < 1e-4 * heads.weight.norm()


def test_a_start_leads_to_the_same_heads():
    features, labels, _ = data = draw(60, 150)
    regression = logistic.Regression(features, labels, CLASSES)
    training = task_of(data).training()
    stats = logistic.statistics(features, training)
    cold = regression.solve(training, stats, torch.full((FOLDS,), 1e-3))
    other = regression.solve(training, stats, torch.full((FOLDS,), 1e-1))
    warm = regression.solve(training, stats, torch.full((FOLDS,), 1e-3), start=other)
    (ours, bias), (theirs, offset) = (regression.weights(s, stats) for s in (cold, warm))
    assert (ours - theirs).norm() < 1e-3 * ours.norm() and torch.allclose(bias, offset, atol=1e-3)


def test_a_start_from_a_kernel_of_the_folds_own_leads_to_the_same_heads(monkeypatch):
    features, labels, fold_of = data = draw(60, 150)
    own = features[:, fold_of == 2, 20]
    features[:, fold_of == 2, 20] = own.mean() + 30 * (own - own.mean())
    regression = logistic.Regression(features, labels, CLASSES)
    training = task_of(data).training()
    stats = logistic.statistics(features, training)
    cold = regression.solve(training, stats, 1e-3)
    monkeypatch.setattr(logistic, "FAR_APART", 1)
    start = regression.solve(training, stats, 1e-2, tolerance=logistic.ROUGH)
    monkeypatch.undo()
    monkeypatch.setattr(logistic.Regression, "_alone", None)
    warm = regression.solve(training, stats, 1e-3, start=start, tolerance=logistic.ROUGH)
    off = ((cold.logits + cold.bias) - (warm.logits + warm.bias)).view(2, 60, CLASSES, FOLDS)
    assert off[:, training.unsqueeze(1).expand(60, CLASSES, FOLDS)].abs().max() < 5 * logistic.ROUGH


def test_weights_give_the_logits_of_the_solution():
    features, labels, _ = data = draw(90, 20)
    regression = logistic.Regression(features, labels, CLASSES)
    training = task_of(data).training()
    stats = logistic.statistics(features, training)
    for l2 in L2:
        solution = regression.solve(training, stats, torch.full((FOLDS,), l2))
        weight, bias = regression.weights(solution, stats)
        seen = (features.view(-1, 1, 20) - stats.mean) / stats.std  # [V N, F, D]
        logits = torch.einsum("nfd,fcd->nfc", seen, weight) + bias
        ours = (solution.logits + solution.bias).transpose(1, 2)
        assert torch.allclose(logits.double(), ours, atol=1e-2), l2


# ---------------------------------------------------------------- statistics

def test_statistics_are_those_of_the_training_clips_over_all_views():
    features, _, fold_of = data = draw(40, 30, views=3)
    training = task_of(data).training()
    for block in (1024, 7):
        actual = logistic.statistics(features, training, block)
        assert actual.mean.shape == actual.std.shape == actual.varies.shape == (FOLDS, 30)
        for fold in range(FOLDS):
            rows = features[:, fold_of != fold].double().numpy().reshape(-1, 30)
            constant = [5, 7] if fold != 2 else [5, 6, 7]
            assert np.flatnonzero(~actual.varies[fold].numpy()).tolist() == constant
            assert actual.mean[fold].numpy() == pytest.approx(rows.mean(0), rel=1e-6, abs=1e-7)
            std = np.where(np.isin(np.arange(30), constant), 1, rows.std(0))
            assert actual.std[fold].numpy() == pytest.approx(std, rel=1e-5)
            assert (actual.std[fold][constant] == 1).all()


def test_statistics_of_features_far_from_zero_keep_their_digits():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(
        (1e4 + rng.normal(0, 0.5, (2, 50, 8)) * np.logspace(-1, 1, 8)).astype(np.float32))
    actual = logistic.statistics(features, torch.ones(50, 1, dtype=torch.bool))
    rows = features.double().numpy().reshape(-1, 8)
    assert actual.std[0].numpy() == pytest.approx(rows.std(0), rel=1e-5)
    assert actual.mean[0].numpy() == pytest.approx(rows.mean(0), rel=1e-6)
    assert actual.varies.all()


# ---------------------------------------------------------------- choice

def choose(data, groups, fold):
    """(l2, inner UF1) of a fold by a loop over penalties and inner folds; the UF1 of each."""
    features, labels, fold_of = data
    train, tried = fold_of != fold, []
    for l2 in L2:
        said = np.full(len(labels), -1)
        for group in range(groups.max() + 1):
            left = train & (groups == group)
            if left.any():
                classes, p = fit(features, labels, train & (groups != group), l2)
                said[left] = classes[p.argmax(1)][left]
        tried.append(f1_score(labels[train], said[train], average="macro", labels=range(CLASSES),
                              zero_division=0))
    best = max(range(len(tried)), key=lambda i: (round(tried[i], 9), -i))  # the stronger on ties
    return L2[best], tried[best], tried


@pytest.mark.parametrize("n, dim, told, seed, ties", [(60, 40, 0.8, 0, False),
                                                      (48, 60, 1.2, 2, True)])
def test_the_penalty_is_that_of_a_loop_over_outer_and_inner_folds(n, dim, told, seed, ties):
    data = draw(n, dim, seed=seed, told=told)
    groups = np.array([0, 1, 2, 3, 0, 1])[data[2]]  # folds 2 and 3 are a group each
    _, choice = solve(data, None, groups=groups)
    expected = [choose(data, groups, fold) for fold in range(FOLDS)]
    assert choice.l2 == [l2 for l2, _, _ in expected]
    assert choice.uf1 == pytest.approx([uf1 for _, uf1, _ in expected], abs=1e-9)
    assert len(set(choice.l2)) > 1
    assert tuple(sorted(PENALTIES, reverse=True)) == PENALTIES == L2
    assert [line["l2"] for line in choice.tried] == list(L2)
    each = np.array([tried for _, _, tried in expected])
    assert [line["inner_uf1"] for line in choice.tried] == pytest.approx(each.mean(0), abs=1e-9)
    assert ties == any(sum(abs(t - uf1) < 1e-9 for t in tried) > 1 for _, uf1, tried in expected)


def test_what_is_chosen_is_solved():
    data = draw(60, 40, told=0.8)
    groups = data[2] % 4
    heads, choice = solve(data, None, groups=groups)
    for fold in range(FOLDS):
        alone, fixed = solve(data, choice.l2[fold], [fold])
        assert fixed.l2 == [choice.l2[fold]] and fixed.uf1 == [None]
        assert (heads.weight[fold] - alone.weight[0]).norm() < 1e-4 * alone.weight.norm()


def test_too_few_subjects_take_a_penalty_that_is_said(capsys):
    features, labels, fold_of = draw(20, 40)
    fold_of = fold_of % 2
    _, choice = solve((features, labels, fold_of), None, [0, 1], groups=fold_of)
    assert choice.l2 == [fold_heads.FEW] * 2 and choice.uf1 == [None] * 2
    assert f"too few subjects for inner folds: --l2 {fold_heads.FEW:g}" in capsys.readouterr().out


# ---------------------------------------------------------------- what a head may not see

@pytest.mark.parametrize("loss", ["crossentropy", "balanced"])
def test_garbage_labels_of_the_held_out_fold_change_neither_penalty_nor_a_bit_of_its_head(loss):
    features, labels, fold_of = draw(60, 40, told=0.8)
    groups, changed = fold_of % 4, 0
    right, choice = solve((features, labels, fold_of), None, groups=groups, loss=loss)
    for fold in range(FOLDS):
        garbage = np.where(fold_of == fold, (labels + 1) % CLASSES, labels)
        wrong, other = solve((features, garbage, fold_of), None, groups=groups, loss=loss)
        assert choice.l2[fold] == other.l2[fold] and choice.uf1[fold] == other.uf1[fold]
        assert torch.equal(right.weight[fold], wrong.weight[fold])
        assert torch.equal(right.bias[fold], wrong.bias[fold])
        for f in range(FOLDS):
            assert f == fold or not torch.equal(right.weight[f], wrong.weight[f])
            changed += choice.l2[f] != other.l2[f]
    assert changed > 0


@pytest.mark.parametrize("l2", L2[:4])
@pytest.mark.parametrize("n, dim", [(60, 150), (90, 20)])
def test_garbage_features_of_the_held_out_fold_leave_its_head_the_same(n, dim, l2):
    features, labels, fold_of = data = draw(n, dim)
    right, _ = solve(data, l2)
    garbage = features.clone()
    noise = torch.randn(garbage.shape, generator=torch.Generator().manual_seed(1))
    garbage[:, fold_of == 3] += 3 * noise[:, fold_of == 3]
    wrong, _ = solve((garbage, labels, fold_of), l2)
    for name in ("weight", "bias", "mean", "std"):
        ours, theirs = getattr(right, name)[3], getattr(wrong, name)[3]
        assert (ours - theirs).norm() < 1e-4 * ours.norm(), name
    assert (right.weight[2] - wrong.weight[2]).norm() > 0.1 * right.weight[2].norm()


# ---------------------------------------------------------------- who it is, and no more

PEOPLE, EACH, KINDS, DRAWS = 24, 4, 3, 10


def identity_only(draw):
    """(features `[1, N, D]` that name the subject, subject of each clip, labels): every subject
    has one label, drawn anew."""
    rng = np.random.default_rng(draw)
    subject = np.repeat(np.arange(PEOPLE), EACH)
    features = 5 + 2 * rng.normal(0, 1, (PEOPLE, 30))[subject] + rng.normal(0, 0.1, (96, 30))
    labels = rng.permutation(np.arange(PEOPLE) % KINDS)[subject]
    return torch.from_numpy(features[None].astype(np.float32)), subject, labels


def uf1(labels, said):
    return measures.evaluate(labels, said, KINDS)["uf1"]


@pytest.mark.parametrize("way", ["chosen", "fixed", "sgd"])
def test_labels_that_only_name_the_subject_stay_at_chance_for_others(way):
    from test_descent import options
    actual, by_chance, rng = [], [], np.random.default_rng(0)
    for number in range(DRAWS if way != "chosen" else DRAWS // 2):  # it takes three times as long
        features, subject, labels = identity_only(number)
        task = task_of((features, labels, subject), range(PEOPLE), KINDS)
        training = task.training()
        if way == "sgd":
            heads = fold_heads.draw([str(i) for i in range(PEOPLE)],
                                    logistic.statistics(features, training), KINDS)
            descent.Descent(heads, task, 1, options(
                epochs=80, batch_size=16, learning_rate=0.3, weight_decay=1e-4,
                lr_decay_epochs=[60])).run()
        else:
            heads, _ = fold_heads.solve(task, 1e-4 if way == "fixed" else None,
                                        subject % fold_heads.INNER_FOLDS)
        p = probabilities(heads, features)
        hits = p.argmax(2) == labels[:, None]
        if way != "chosen":  # inner folds, held out as well, rightly trust no such head
            assert hits[training.numpy()].mean() == 1
        actual.append(uf1(labels, p.argmax(2)[np.arange(len(labels)), subject]))
        by_chance.append([uf1(labels, rng.permutation(np.arange(PEOPLE) % KINDS)[subject])
                          for _ in range(200)])
    # subjects, not clips, are drawn: one who is named wrongly is so in all clips
    limit = np.quantile(np.mean(by_chance, 0), 0.975)
    print(f"UF1 {np.mean(actual):.3f}, 97.5 % of chance {limit:.3f}")
    assert np.mean(actual) <= limit


@pytest.mark.parametrize("kind", ["a subject of other scale", "sparse", "four of many"])
def test_a_feature_that_lives_in_the_held_out_clips_is_no_obstacle(kind, capsys, monkeypatch):
    rng, many = np.random.default_rng(3), kind == "four of many"
    features, labels = torch.from_numpy(rng.normal(size=(2, 60, 4000 if many else 300))).float(), \
        rng.integers(0, 4, 60)
    alone, solved_alone = [], logistic.Regression._alone
    monkeypatch.setattr(logistic.Regression, "_alone", lambda self, keep, *rest: (
        alone.append(keep), solved_alone(self, keep, *rest))[1])
    if kind == "sparse":
        features = torch.relu(features - 2)
    else:
        features[:, :10, :4 if many else None] *= 580 if many else 1000
    fold_of = np.repeat(np.arange(6), 10)
    for l2 in (1e-1, 1e-3, 1e-5):
        assert_agrees((features, labels, fold_of), l2)
    assert bool(alone) != many  # it hardly counts in the kernel, which saves one of the fold's own
    assert "converged" not in capsys.readouterr().out


def test_a_feature_of_the_held_out_clips_takes_no_kernel_to_choose_a_penalty(monkeypatch):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(2, 60, 2000))).float()
    features[:, :10, 0] *= 500
    task = task_of((features, rng.integers(0, 4, 60), np.repeat(np.arange(6), 10)), range(6))
    training = task.training()
    stats = logistic.statistics(features, training)
    regression = logistic.Regression(features, task.labels, task.n_label)
    for l2 in (1e-1, 1e-3, 1e-5):
        exact = regression.solve(training, stats, l2)
        with monkeypatch.context() as patch:
            patch.setattr(logistic.Regression, "_alone", None)  # it is not called
            roughly = regression.solve(training, stats, l2, tolerance=logistic.rough(l2))
        right, about = (s.logits + s.bias for s in (exact, roughly))
        inside = training.repeat(2, 1)[:, None].expand_as(right)
        assert (right - about)[inside].abs().max() < 10 * logistic.rough(l2)
        assert (right.argmax(1) == about.argmax(1)).double().mean() > 0.99  # but for ties
        far = right[:10, :, 0]  # what is 500 deviations away moves logits by as much
        assert (far - about[:10, :, 0]).abs().max() < 0.1 * far.abs().max()
