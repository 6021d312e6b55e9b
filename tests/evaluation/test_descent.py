"""Linear heads of all folds in one pass, against a loop over folds with torch's own layers."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import util
from evaluation import descent, fold_heads, logistic
from training import epochs, losses

N, DIM, CLASSES, FOLDS, POSITIONS = 30, 12, 3, 5, 4
LOSSES = ("crossentropy", "focal", "balanced")


def options(**changes):
    return SimpleNamespace(**{"seed": 3, "epochs": 6, "batch_size": 7, "learning_rate": 0.1,
                              "lr_decay_epochs": [2, 4], "lr_decay_rate": 0.5, "momentum": 0.9,
                              "weight_decay": 0.01, **changes})


@pytest.fixture
def data():
    """(features `[2, N, D]`, labels `[N]`, fold of each clip `[N]`); fold 0 holds most clips, so
    that many batches hold none of its training clips, and class 2 is rare. The first feature is
    the same everywhere, the last one in the training clips of fold 3."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(0.3, 1, (2, N, DIM)).astype(np.float32))
    features *= torch.linspace(0.5, 2, N)[:, None]
    fold_of = np.array([0] * 22 + [1, 2, 3, 4] * 2)
    labels = rng.integers(0, 2, N)
    labels[[0, 3, 22, 27]] = 2
    fold_of = rng.permutation(fold_of)
    features[..., 0] = 2.5
    features[:, fold_of != 3, -1] = -1.5
    return features, labels, fold_of


def task_of(data, held_out):
    features, labels, fold_of = data
    return fold_heads.Task(features, labels, CLASSES, fold_of, held_out)


def new_heads(data, held_out):
    stats = logistic.statistics(data[0], task_of(data, held_out).training())
    return fold_heads.draw([f"fold{f + 1}of5" for f in held_out], stats, CLASSES, 7)


def trained(data, held_out, opt=None, loss="crossentropy", labels=None):
    features, given, fold_of = data
    heads = new_heads(data, held_out)
    task = task_of((features, given if labels is None else labels, fold_of), held_out)
    descent.Descent(heads, task, POSITIONS, opt or options(), loss).run()
    return heads


def by_class(labels):
    """n / (C n_c), one class at a time."""
    return torch.tensor([len(labels) / (CLASSES * (labels == c).sum()) if (labels == c).any()
                         else 0.0 for c in range(CLASSES)], dtype=torch.float32)


def slow_loss(logits, labels, kind, weights):
    """The losses as their papers write them."""
    labels = torch.as_tensor(labels)
    p = (logits.exp() / logits.exp().sum(1, keepdim=True))[torch.arange(len(labels)), labels]
    factor = {"crossentropy": 1, "focal": (1 - p) ** 2, "balanced": weights[labels]}[kind]
    return -(factor * torch.log(p)).mean()


def standardised(features, train):
    """By the mean and deviation of all views of the training clips; a feature that is the same in
    all of them is only centred."""
    rows = features[:, train].double().numpy().reshape(-1, DIM)
    std = rows.std(0)
    std[np.ptp(rows, 0) == 0] = 1
    return ((features.double() - torch.from_numpy(rows.mean(0))) / torch.from_numpy(std)).float()


def slow_fold(data, fold, opt, kind):
    """One fold's head by torch.nn.Linear and torch.optim.SGD on features standardised by hand;
    (layer, the features it saw, batches without a step)."""
    features, labels, fold_of = data
    start = new_heads(data, [fold])
    layer = torch.nn.Linear(DIM, CLASSES)
    layer.load_state_dict({"weight": start.weight[0].detach(), "bias": start.bias[0].detach()})
    train = fold_of != fold
    features = standardised(features, train)
    length = features[:, train].square().sum(-1).mean().item()
    weights, idle = by_class(labels[train]), 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=1, momentum=opt.momentum,
                                weight_decay=opt.weight_decay)
    for epoch in range(1, opt.epochs + 1):
        for group in optimizer.param_groups:
            passed = sum(epoch > e for e in opt.lr_decay_epochs)
            group["lr"] = opt.learning_rate * opt.lr_decay_rate ** passed * POSITIONS / length
        rng = epochs.generator(opt.seed, epoch)
        view = torch.randint(2, (N,), generator=rng)
        for batch in epochs.batches(N, opt.batch_size, rng):
            mine = [i for i in batch.tolist() if train[i]]
            if not mine:
                idle += 1
                continue
            x = torch.stack([features[view[i], i] for i in mine])
            loss = slow_loss(layer(x), labels[mine], kind, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer, features, idle


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("held_out", [[0], [3], [1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_all_folds_in_one_pass_agree_with_a_loop_over_folds(data, loss, held_out):
    opt = options()
    heads = trained(data, held_out, opt, loss)
    for place, fold in enumerate(held_out):
        layer, seen, idle = slow_fold(data, fold, opt, loss)
        assert (idle > 0) == (fold == 0)
        assert heads.length[place] == DIM - 1 - (fold == 3)
        moved = (layer.weight - new_heads(data, [fold]).weight[0]).abs().max()
        assert moved > 0.02
        assert torch.allclose(heads.weight[place], layer.weight, atol=1e-5)
        assert torch.allclose(heads.bias[place], layer.bias, atol=1e-5)
        assert torch.allclose(heads(data[0][0])[:, place], layer(seen[0]), atol=1e-4)


def test_the_penalty_of_solved_heads_goes_on_and_spares_the_bias(data):
    features, labels, fold_of = data
    opt, l2 = options(weight_decay=0.7), [0.01, 0.3]
    heads = new_heads(data, [1, 3])
    descent.Descent(heads, task_of(data, [1, 3]), POSITIONS, opt, l2=l2).run()
    for place, fold in enumerate([1, 3]):
        train, start = fold_of != fold, new_heads(data, [fold])
        seen, length = standardised(features, train), DIM - 1 - (fold == 3)
        weight, bias = (value[0].detach().clone().requires_grad_()
                        for value in (start.weight, start.bias))
        optimizer = torch.optim.SGD([weight, bias], lr=1, momentum=opt.momentum)
        for epoch in range(1, opt.epochs + 1):
            rng = epochs.generator(opt.seed, epoch)
            view = torch.randint(2, (N,), generator=rng)
            for batch in epochs.batches(N, opt.batch_size, rng):
                mine = [i for i in batch.tolist() if train[i]]
                x = torch.stack([seen[view[i], i] for i in mine])
                loss = slow_loss(x @ weight.t() + bias, labels[mine], "crossentropy",
                                 torch.ones(CLASSES))
                loss = loss + l2[place] / 2 * length * weight.square().sum()
                passed = sum(epoch > e for e in opt.lr_decay_epochs)
                rate = opt.learning_rate * opt.lr_decay_rate ** passed
                optimizer.param_groups[0]["lr"] = rate * POSITIONS / length
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert torch.allclose(heads.weight[place], weight, atol=1e-5)
        assert torch.allclose(heads.bias[place], bias, atol=1e-5)


def test_a_batch_without_training_clips_leaves_a_fold_untouched(data):
    heads = new_heads(data, [0, 1])
    for _ in range(2):
        before = heads.weight.clone(), heads.moments[0].clone()
        heads.step(heads(data[0][0]).square().mean(), torch.tensor([False, True]),
                   torch.tensor([0.1, 0.1]), 0.9, (0.01, 0.01))
        assert (heads.weight[0] == before[0][0]).all() and (heads.moments[0][0] == 0).all()
        assert (heads.weight[1] != before[0][1]).any()
    untouched = new_heads(data, [0, 1])
    assert (heads.weight[0] == untouched.weight[0]).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fold", [0, 3])
def test_garbage_labels_of_the_held_out_fold_leave_its_head_bit_for_bit_the_same(data, loss, fold):
    _, labels, fold_of = data
    garbage = np.where(fold_of == fold, (labels + 1) % CLASSES, labels)
    right = trained(data, list(range(FOLDS)), loss=loss)
    wrong = trained(data, list(range(FOLDS)), loss=loss, labels=garbage)
    assert torch.equal(right.weight[fold], wrong.weight[fold])
    assert torch.equal(right.bias[fold], wrong.bias[fold])
    others = [f for f in range(FOLDS) if f != fold]
    assert (right.weight[others] != wrong.weight[others]).any()


def test_garbage_features_of_the_held_out_fold_leave_its_head_the_same(data):
    features, labels, fold_of = data
    right = trained(data, [0, 1, 2])
    features[:, fold_of == 2] *= -7
    wrong = trained((features, labels, fold_of), [0, 1, 2])
    assert torch.allclose(right.weight[2], wrong.weight[2], atol=1e-6)
    assert torch.allclose(right.mean[2], wrong.mean[2], atol=1e-6)
    assert torch.allclose(right.std[2], wrong.std[2], atol=1e-6)
    assert not torch.allclose(right.weight[1], wrong.weight[1], atol=1e-3)
    assert not torch.allclose(right.std[1], wrong.std[1], atol=1e-3)


@pytest.mark.parametrize("protocol", ["subject_groups", "subject_folds"])
def test_no_head_ever_sees_a_subject_it_holds_out(protocol):
    rng = np.random.default_rng(2)
    clips = [dataset.Clip(0, f"s{i:02d}", f"{i}-{j}", int(rng.integers(3)), ("", ""))
             for i in range(13) for j in range(rng.integers(1, 6))]
    clips = dataset.ClipSet(clips, None, ("rgb", "depth"), (3, 1), {"difference": "signed"}, 3)
    folds = getattr(dataset, protocol)(clips)
    people = clips.people
    # feature i is 1 for the clips of person i alone: only who is seen moves its weights
    features = torch.zeros(1, len(clips), len(people))
    for i, clip in enumerate(clips.clips):
        features[0, i, people.index(clip.person)] = 1
    held_out = list(range(len(folds.names)))
    task = fold_heads.Task(features, clips.labels, 3, folds.of, held_out)
    heads = fold_heads.draw(folds.names, logistic.statistics(features, task.training()), 3)
    before = heads.weight.detach().clone()
    descent.Descent(heads, task, 1, options(weight_decay=0, batch_size=16)).run()
    moved = (heads.weight != before).any(1)  # [F, people]
    for i, person in enumerate(people):
        fold = folds.of[clips.members([person])[0]]
        assert [f for f in held_out if not moved[f, i]] == [fold]
        assert [f for f in held_out if abs(heads.mean[f, i]) < 1e-7] == [fold]
        assert [f for f in held_out if heads.std[f, i] == 1] == [fold]
    solved, _ = fold_heads.solve(task, 0.01)
    for i, person in enumerate(people):
        fold = folds.of[clips.members([person])[0]]
        assert [f for f in held_out if (solved.weight[f, :, i] == 0).all()] == [fold]


def test_every_clip_is_predicted_by_the_head_that_holds_it_out_and_no_other(data):
    features, _, fold_of = data
    heads = trained(data, list(range(FOLDS)))
    actual = fold_heads.predict(heads, task_of(data, list(range(FOLDS))))
    for i, fold in enumerate(fold_of):
        seen = standardised(features, fold_of != fold)[0, i]
        logits = heads.weight[fold] @ seen + heads.bias[fold]
        assert actual[i] == pytest.approx(logits.softmax(0).detach().numpy(), abs=1e-5)
    some = fold_heads.predict(heads, task_of(data, [4]))
    assert (np.isnan(some).all(1) == (fold_of != 4)).all()
    assert not np.isnan(some[fold_of == 4]).any()


def test_a_fold_starts_the_same_alone_and_among_others(data):
    all_of_them, some = new_heads(data, [0, 1, 2, 3, 4]), new_heads(data, [4, 2])
    assert torch.equal(all_of_them.weight[[4, 2]], some.weight)
    assert not torch.equal(some.weight[0], some.weight[1])
    lengths = all_of_them.length.view(-1, 1, 1)
    assert lengths.flatten().tolist() == [DIM - 1] * 3 + [DIM - 2] + [DIM - 1]
    # features of unit length: logits of deviation 0.01
    assert (all_of_them.weight * lengths.sqrt()).std().item() == pytest.approx(0.01, rel=0.2)


def test_heads_start_from_weights_that_are_given(data):
    features, _, fold_of = data
    stats = logistic.statistics(features, task_of(data, [0, 3]).training())
    rng = epochs.generator(0)
    start = torch.randn(2, CLASSES, DIM, generator=rng), torch.randn(2, CLASSES, generator=rng)
    heads = fold_heads.FoldHeads(stats, *start)
    for place, fold in enumerate([0, 3]):
        seen = standardised(features, fold_of != fold)[0]
        expected = seen @ start[0][place].t() + start[1][place]
        assert torch.allclose(heads(features[0])[:, place], expected, atol=1e-4)
    weight, bias = heads.plain()
    assert torch.allclose(torch.einsum("nd,fcd->nfc", features[0], weight) + bias,
                          heads(features[0]), atol=1e-4)


def test_an_epoch_follows_from_the_heads_and_its_number_bit_for_bit(data):
    """Whoever runs the epochs one by one gets what `run` gives."""
    whole, part = trained(data, [0, 1, 2]), new_heads(data, [0, 1, 2])
    for epoch in range(1, 7):
        means = descent.Descent(part, task_of(data, [0, 1, 2]), POSITIONS, options()).epoch(epoch)
        assert means.keys() == {"train_loss", "train_accuracy"}
    assert torch.equal(whole.weight, part.weight) and torch.equal(whole.bias, part.bias)
    assert torch.equal(whole(data[0][0]), part(data[0][0]))


def test_class_weights_by_hand():
    weights = losses.class_weights(np.array([0, 0, 0, 1]), 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 0])


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_agree_with_their_formulas(kind):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(9, CLASSES), torch.arange(9) % CLASSES
    weights = torch.tensor([0.2, 1.0, 3.0])
    actual = losses.classification_loss(logits, labels, kind, weights)
    assert actual.shape == (9,)
    assert actual.mean().item() == pytest.approx(slow_loss(logits, labels, kind, weights).item(),
                                                rel=1e-5)


def test_focal_loss_stays_finite_for_hopeless_and_certain_clips():
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0]], requires_grad=True)
    loss = losses.classification_loss(logits, torch.tensor([0, 0]), "focal")
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, 200])
    assert torch.isfinite(logits.grad).all()


def test_the_learning_rate_is_that_of_features_of_unit_length(data):
    assert descent.rate_scale(1.0, 1) == 1
    assert descent.rate_scale(50.0, 25) == pytest.approx(0.5)
    assert descent.rate_scale(0, 25) == 25  # no feature varies
    assert descent.rate_scale(torch.tensor([0, 5]), 25).tolist() == [25, 5]
    features, labels, fold_of = data
    actual = []
    for scale, offset in ((1, 0), (64, 0), (1, 30)):
        changed = scale * features + offset, labels, fold_of
        actual.append(trained(changed, [0, 1], options(weight_decay=0)))
    assert actual[0].weight.abs().max() > 0.1
    for other in actual[1:]:  # unit and offset of the features leave no trace
        assert torch.allclose(actual[0].weight, other.weight, atol=1e-4)
        assert torch.allclose(actual[0].bias, other.bias, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_and_names_the_epoch(data):
    features, labels, fold_of = data
    features[0, 4] = float("nan")
    with pytest.raises(util.RunFailed, match="not finite in epoch 1"):
        trained((features, labels, fold_of), [0, 1])
