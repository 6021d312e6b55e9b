"""An epoch on face images: relabelling, sampling, what is left out; checkpoints that start one."""
import argparse
import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from face_tree import CLASSES, face_points, picture
from timm.utils import ModelEmaV3

from evaluation import photographs
from images import cache, regions
from images.faces import FaceSet
from models import files
from models.ran import RAN
from models.scn import SCN, Baseline
from training import checkpoint, devices, epochs, faces, losses, pretrained
from util import BadInput, RunFailed

SIDE = 32
pytestmark = pytest.mark.usefixtures("full_width")


def face_set(n=21, subjects=0):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 7
    return FaceSet("rafdb", "nowhere", CLASSES, [f"{i}.png" for i in range(n)], labels,
                   [f"s{i % subjects}" if subjects else "" for i in range(n)], None,
                   np.stack([picture(label, rng, SIDE) for label in labels]), False)


def source_of(images, num_workers=1, lost=(), **more):
    def decode(i):
        if i in lost:
            raise BadInput(f"{images.paths[i]}: cannot be decoded")
        return images.pixels[i].transpose(2, 0, 1)
    return faces.Source(images, cache.OnDemand(
        len(images), decode, (3, SIDE, SIDE), np.uint8, "0" * 64, "off", num_workers), **more)


def options(**more):
    return argparse.Namespace(**{
        "seed": 0, "batch_size": 7, "epochs": 4, "lr_schedule": "constant", "warmup_epochs": 0,
        "learning_rate": 1e-3, "loss": "crossentropy", "label_smoothing": 0,
        "oversample": False, "freeze_backbone": False, "rank_margin": 0, "rank_beta": .7,
        "region_margin": 0, "wloss_alpha": 0, "wloss_reduction": "sum", "relabel_epoch": 0,
        "relabel_margin": .2, "relabel_group": "all", **more})


class Small(torch.nn.Module):
    """A linear network on the mean colours of a grid, with an importance."""

    def __init__(self, n_label=7):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(),
                                            torch.nn.Dropout(0.5), torch.nn.Linear(192, 16))
        self.fc, self.alpha = torch.nn.Linear(16, n_label), torch.nn.Linear(16, 1)

    def forward(self, x):
        x = self.features(x)
        return self.fc(x), self.alpha(x).sigmoid()


def job_of(source, network=None, rate=0.01, ema=None, **more):
    torch.manual_seed(0)
    network = network or Small()
    optimizer = torch.optim.SGD([{"params": network.parameters(), "base": rate}], lr=rate)
    return faces.Job(**{
        "network": network, "run": network, "ema": ema, "source": source,
        "labels": source.faces.labels.copy(), "members": np.arange(len(source.faces)),
        "optimizer": optimizer, "precision": devices.mixed_precision(False, torch.device("cpu")),
        "distance": None, "relabelled": [], **more})


def run_epoch(opt, job, epoch=1, within=None, on_step=lambda inside: None):
    means = faces.train_epoch(opt, job, epoch, within or {}, on_step)
    assert means.pop("images_per_second") > 0  # another one in every run
    return means


def targets_of(monkeypatch):
    """The labels that the loss is computed with, as they come, by image where `rows` says which."""
    seen, loss = [], losses.classification_loss

    def noted(logits, labels, *rest):
        seen.append(labels.clone())
        return loss(logits, labels, *rest)
    monkeypatch.setattr(losses, "classification_loss", noted)
    return seen


def test_an_average_holds_of_each_step_what_its_decay_says():
    job = job_of(source_of(face_set(7)), ema=None)
    before = [part.detach().clone() for part in job.network.parameters()]
    average = ModelEmaV3(job.network, .75)
    run_epoch(options(), job._replace(ema=average))  # of one step
    for old, new, mean in zip(before, job.network.parameters(), average.module.parameters()):
        assert torch.allclose(mean, .75 * old + .25 * new, atol=1e-7)
    assert not torch.equal(before[0], next(job.network.parameters()))


def test_batches_of_a_step_are_one_large_batch():
    """Where nothing is dropped or augmented."""
    states = []
    for size, accum in ((20, 1), (10, 2), (5, 4)):
        job = job_of(source_of(face_set(20)))
        job.network.features[2].p = 0
        run_epoch(options(batch_size=size, accum_iter=accum), job)
        states.append(job.network.state_dict())
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)
    assert not torch.equal(states[0]["fc.weight"], job_of(
        source_of(face_set(20))).network.state_dict()["fc.weight"])


# ---------------------------------------------------------------- relabelling

@pytest.mark.parametrize("workers", [0, 2])
def test_new_labels_reach_the_next_epoch(monkeypatch, workers):
    """Whoever decodes, and in a process that lives on."""
    opt = options(relabel_epoch=1, relabel_margin=0)
    job = job_of(source_of(face_set(), workers), rate=0.0)  # what it says stays the same
    seen = targets_of(monkeypatch)
    run_epoch(opt, job)
    first = torch.cat(seen)
    assert torch.equal(first.sort().values, torch.arange(21) // 3)
    moved = {i: new for i, _, new, _, _ in job.relabelled}
    assert len(moved) > 5 and not np.array_equal(job.labels, job.source.faces.labels)
    seen.clear()
    before = job.labels.copy()
    run_epoch(options(), job, 2)
    assert torch.cat(seen).sort().values.tolist() == sorted(before.tolist())
    assert sorted(before.tolist()) != [i // 3 for i in range(21)]
    for i, old, new, probability, epoch in job.relabelled:
        assert (job.labels[i], job.source.faces.labels[i]) == (new, old)
        assert 0 < probability < 1 and epoch == 1


def test_relabelling_begins_with_its_epoch_and_leaves_the_sets_own_labels():
    images = face_set()
    job = job_of(source_of(images), rate=0.0)
    run_epoch(options(relabel_epoch=2, relabel_margin=0), job, 1)
    assert not job.relabelled
    means = run_epoch(options(relabel_epoch=2, relabel_margin=0), job, 2)
    assert means["relabelled"] == len(job.relabelled) > 0
    assert np.array_equal(images.labels, np.arange(21) % 7)


def test_only_the_group_of_low_importance_is_relabelled(monkeypatch):
    groups, relabel = [], losses.relabel

    def noted(probabilities, labels, margin, importance, beta):
        new = relabel(probabilities, labels, margin, importance, beta)
        groups.append((importance.flatten(), new != labels))
        return new
    monkeypatch.setattr(losses, "relabel", noted)
    job = job_of(source_of(face_set()), rate=0.0)
    run_epoch(options(relabel_epoch=1, relabel_margin=0, relabel_group="low"), job)
    for importance, moved in groups:
        assert not moved[importance.argsort(descending=True)[:4]].any()  # int(7 * .7)
    assert any(moved.any() for _, moved in groups)


@pytest.mark.parametrize("more", [{}, {"oversample": True, "loss": "balanced"}])
def test_an_epoch_that_was_stopped_goes_on_to_the_same(more):
    opt = options(relabel_epoch=1, relabel_margin=0, **more)
    whole = job_of(source_of(face_set(), augment="strong"), rate=0.05)
    means = [run_epoch(opt, whole, epoch) for epoch in (1, 2)]
    part, kept = job_of(source_of(face_set(), augment="strong"), rate=0.05), []

    class Stop(Exception):
        pass

    def stop(inside):
        if inside["step"] == 2:
            kept.append(inside)
            raise Stop
    first = run_epoch(opt, part, 1)
    with pytest.raises(Stop):
        run_epoch(opt, part, 2, {}, stop)
    # what a checkpoint holds
    again = job_of(source_of(face_set(), augment="strong"), rate=0.05, labels=part.labels.copy(),
                   relabelled=list(part.relabelled))
    again.network.load_state_dict(part.network.state_dict())
    again.optimizer.load_state_dict(part.optimizer.state_dict())
    assert [first, run_epoch(opt, again, 2, kept[0])] == means
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    assert np.array_equal(whole.labels, again.labels) and whole.relabelled == again.relabelled


# ---------------------------------------------------------------- sampling and losses

def test_oversampling_draws_all_classes_alike_of_the_training_images_alone(monkeypatch):
    images = face_set(140)
    images.labels[:100] = 0
    source = source_of(images)
    members = np.arange(10, 140)
    seen = targets_of(monkeypatch)
    run_epoch(options(oversample=True, batch_size=65), job_of(source, members=members))
    counts = np.bincount(torch.cat(seen), minlength=7)
    assert counts.sum() == 130 and counts.max() < 40 and counts.min() > 5
    assert not source.images.ready[:10].any()  # nobody else was looked at
    kept, probabilities, *_ = faces.predict(Small(), source, np.arange(10), torch.no_grad)
    assert kept.tolist() == list(range(10)) and probabilities.shape == (10, 7)


def test_the_loss_adds_what_is_asked_for():
    logits, target = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    importance = torch.softmax(torch.arange(18.0).view(6, 3) % 5, 1)
    plain = torch.nn.functional.cross_entropy(logits, target)
    distance = losses.emotion_distance(CLASSES)
    for more, extra in (
            ({}, 0), ({"region_margin": .1}, losses.region_loss(importance, .1)),
            ({"wloss_alpha": .5}, .5 * losses.wasserstein(logits, target, distance)),
            ({"wloss_alpha": .5, "wloss_reduction": "mean"},
             .5 * losses.wasserstein(logits, target, distance, "mean"))):
        loss, parts = faces.loss_of(options(**more), (logits, importance), target,
                                    torch.ones(6, dtype=torch.bool), None,
                                    distance if more.get("wloss_alpha") else None, 6)
        torch.testing.assert_close(loss, plain + extra)
        assert len(parts) == bool(more)


def test_images_that_cannot_be_read_have_no_part_in_the_loss_of_a_batch():
    logits, target = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    job = job_of(source_of(face_set()))._replace(distance=losses.emotion_distance(CLASSES))
    found = []
    for n, rows in ((4, slice(4)), (6, slice(6))):
        kept = torch.arange(n) < 4
        loss, _ = faces.batch_loss(options(wloss_alpha=.5), job, (logits[rows], None), target[rows],
                                   kept, kept, None, ["wasserstein"])
        found.append(loss)
    torch.testing.assert_close(*found)


def test_rank_regularisation_moves_the_importance():
    network = Small()
    with torch.no_grad():
        network.fc.weight.zero_()  # classes tell nothing
    job = job_of(source_of(face_set()), network)
    before = network.alpha.weight.detach().clone()
    means = run_epoch(options(rank_margin=.5), job)
    assert 0 < means["rank_loss"] <= .5 and not torch.equal(before, network.alpha.weight)


def test_images_that_cannot_be_read_are_left_out_of_training_and_prediction(monkeypatch, capsys):
    seen = targets_of(monkeypatch)
    source = source_of(face_set(), lost=(3, 4))
    run_epoch(options(), job_of(source))
    assert len(torch.cat(seen)) == 19
    kept, probabilities, *_ = faces.predict(Small(), source, np.arange(21), torch.no_grad)
    assert len(probabilities) == 19 and not {3, 4} & set(kept.tolist())
    assert capsys.readouterr().err.count("cannot be decoded") == 2
    with pytest.raises(BadInput, match="no image of 2"):
        faces.predict(Small(), source, np.array([3, 4]), torch.no_grad)


def test_a_batch_of_which_nothing_can_be_read_ends_the_run(capsys):
    with pytest.raises(RunFailed, match="none of 32 images can be read in epoch 1, step 1; see"):
        run_epoch(options(batch_size=32), job_of(source_of(face_set(40), lost=range(40))))
    assert capsys.readouterr().err.count("cannot be decoded") >= 32


def test_dropout_is_off_in_prediction_and_the_mirror_image_counts():
    source, network = source_of(face_set()), Small().train()
    said = [faces.predict(network, source, np.arange(21), torch.no_grad, flip)[1]
            for flip in (True, True, False)]
    assert np.array_equal(said[0], said[1]) and not np.array_equal(said[0], said[2])
    for model in (Baseline(7, drop_rate=.9), SCN(7, drop_rate=.9)):
        a, b = (faces.predict(model, source, np.arange(4), torch.no_grad)[1]
                for _ in range(2))
        assert np.array_equal(a, b)


def test_every_rank_drops_out_by_draws_of_its_own(monkeypatch):
    """Of the same images, that its draws may be told from the images' own."""
    job, index, draws = job_of(source_of(face_set())), np.arange(7), []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        batch = torch.from_numpy(job.source.images[index])
        faces.augmented(job, index, index, batch, epochs.generator(0, 1, 1))
        draws.append(torch.rand(8))
    assert torch.equal(draws[0], draws[2]) and not torch.isclose(draws[0], draws[1]).any()


def test_prediction_does_not_depend_on_the_batch():
    marks = np.repeat(face_points(SIDE)[None] / SIDE, 21, 0).astype(np.float32)
    torch.manual_seed(0)
    for model, more in ((RAN(7), {"views": "random"}),
                        (Baseline(7, gaussian=True), {"landmarks": marks, "gaussian": True})):
        source = source_of(face_set(), **more)
        a, b = (faces.predict(model, source, np.arange(21), torch.no_grad,
                              batch_size=size)[1] for size in (4, 21))
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_landmarks_make_views_and_marks_and_where_there_are_none_the_crops_and_ones():
    marks = np.repeat(face_points(SIDE)[None] / SIDE, 3, 0).astype(np.float32)
    marks[1] = np.nan
    source = source_of(face_set(3), landmarks=marks, views="landmark", gaussian=True)
    boxes = source.boxes(np.arange(3), None)
    assert boxes.shape == (3, 9, 4) and torch.equal(boxes[0], boxes[2])
    points = (marks[0] * SIDE).round().astype(np.int64)
    corner = regions.landmark_boxes(points, SIDE, SIDE)
    assert boxes[0, :, :2].tolist() == corner[:, :2].tolist()
    assert (boxes[0, :, 2:] - boxes[0, :, :2]).tolist() == corner[:, 2:].tolist()
    assert boxes[1, 0].tolist() == [4, 8, 28, 32] and boxes[1, -1].tolist() == [0, 0, 32, 32]
    maps = source.marks(np.arange(3), torch.device("cpu"))
    assert maps[1].eq(1).all() and maps[0].min() < .05 and maps[0].max() > .95


# ---------------------------------------------------------------- the average

def test_the_average_follows_the_weights():
    from timm.utils import ModelEmaV3
    network = Small()
    average = ModelEmaV3(network, .9, use_warmup=True)
    job = job_of(source_of(face_set()), network, .5, average)
    passed = [network.fc.weight.detach().clone()]
    run_epoch(options(), job, on_step=lambda _: passed.append(network.fc.weight.detach().clone()))
    weight = average.module.fc.weight
    low, high = torch.stack(passed).amin(0), torch.stack(passed).amax(0)
    assert ((weight >= low - 1e-6) & (weight <= high + 1e-6)).all()
    assert not torch.equal(weight, passed[0]) and not torch.equal(weight, network.fc.weight)


# ---------------------------------------------------------------- checkpoints to start from

def named_as(kind, source):
    """The state_dict of torchvision's ResNet under the names of a checkpoint of that kind."""
    state = source.state_dict()
    if kind == "torchvision":
        return state
    if kind == "ms1m":
        return {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    if kind == "ran":
        kept = {f"module.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        return {"state_dict": kept | {"module.alpha.0.weight": torch.zeros(1, 512),
                                      "module.beta.0.weight": torch.zeros(1, 1024),
                                      "module.fc.weight": torch.zeros(8, 1024)}}
    ours = SCN(7)
    ours.features.load_state_dict({
        k.removeprefix("features."): v for k, v in pretrained.canonical(state).items()
        if k.startswith("features.")})
    if kind == "scn":
        return {"model_state_dict": ours.state_dict()}
    spoiled = {name: torch.zeros_like(value) for name, value in ours.state_dict().items()}
    return {"system": "FER", "opt": {"model": "scn", "select": "last"}, "epoch": 3,
            "model": spoiled, "ema": {f"module.{k}": v for k, v in ours.state_dict().items()}}


@pytest.mark.parametrize("kind", ["torchvision", "ms1m", "ran", "scn", "own"])
def test_every_kind_of_checkpoint_starts_the_backbone(kind, tmp_path, capsys):
    torch.manual_seed(3)
    whole = torchvision.models.resnet18()
    torch.save(named_as(kind, whole), tmp_path / "start.pth")
    network = RAN(7)
    pretrained.load_backbone(network, "start", "resnet18", files.read(tmp_path / "start.pth"))
    said = capsys.readouterr().out
    assert "100 of 100 tensors of the backbone loaded" in said
    assert torch.equal(network.features[0].weight, whole.conv1.weight)
    assert torch.equal(network.features[7][1].bn2.running_var, whole.layer4[1].bn2.running_var)
    assert "not taken: fc" in said or "not taken: alpha" in said


@pytest.mark.usefixtures("full_width")
def test_what_is_no_such_backbone_is_refused_by_name(capsys):
    eighteen, thirty_four, fifty = (getattr(torchvision.models, f"resnet{n}")().state_dict()
                                    for n in (18, 34, 50))
    for content, arch, said in (
            (fifty, "resnet18", "not of resnet18: features.4.0.conv1.weight has the shape"),
            (thirty_four, "resnet18", "not of resnet18: it has features.4.2, too"),
            (eighteen, "resnet34", "not of resnet34: it has no features.4.2"),
            ({"other.weight": torch.zeros(3)}, "resnet18", "none of its 1 tensors"),
            ({}, "resnet18", "none of its 0 tensors")):
        with pytest.raises(BadInput, match=said) as error:
            pretrained.load_backbone(Baseline(7, arch), "a.pth", arch, content)
        assert "a.pth" in str(error.value)
    partly = {k: v for k, v in eighteen.items() if not k.startswith("layer4")}
    pretrained.load_backbone(Baseline(7), "a.pth", "resnet18", partly)
    assert "75 of 100" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x04junk"])
def test_a_damaged_file_of_imagenets_weights_is_told_so(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    with pytest.raises(BadInput, match="--pretrained none"):
        pretrained.load_backbone(Baseline(7), "imagenet", "resnet18")


def test_weights_of_imagenet_that_cannot_be_had_are_told_where_to_get(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(BadInput, match=r"download.pytorch.org.*--pretrained none"):
        pretrained.load_backbone(Baseline(7), "imagenet", "resnet18")


# ---------------------------------------------------------------- what is held out

def test_validation_images_are_stratified_and_whole_subjects_where_there_are_any():
    images = face_set(210)
    rest, out = photographs.hold_out(images, .1, 0)
    assert np.bincount(images.labels[out]).tolist() == [3] * 7
    assert sorted([*rest, *out]) == list(range(210))
    again = photographs.hold_out(images, .1, 0)[1]
    assert np.array_equal(out, again)
    assert not np.array_equal(out, photographs.hold_out(images, .1, 1)[1])
    named = face_set(210, subjects=30)
    rest, out = photographs.hold_out(named, .1, 0)
    people = [{named.subjects[i] for i in part} for part in (rest, out)]
    assert not people[0] & people[1] and len(people[1]) == 3
    assert len(photographs.hold_out(images, 0, 0)[1]) == 0
    for n, fraction, share in ((30, .3, .3), (30, .9, .9), (30, .4, .4), (3, .2, 1 / 3),
                               (5, .1, .2), (60, .02, .03), (210, .01, 1 / 60)):
        named = face_set(420, subjects=n)
        out = photographs.hold_out(named, fraction, 0)[1]
        assert len({named.subjects[i] for i in out}) / n == pytest.approx(
            share, abs=min(.04, share / 2))
    with pytest.raises(BadInput, match="one subject"):
        photographs.hold_out(face_set(21, subjects=1), .1, 0)


def test_subjects_held_out_take_no_class_along_where_others_can_be(capsys):
    images = face_set(140, subjects=20)
    # a class that one person alone shows
    labels = np.where(np.array(images.subjects) == "s3", 6, np.arange(140) % 6)
    images = dataclasses.replace(images, labels=labels)
    for seed in range(12):
        rest, out = photographs.hold_out(images, .1, seed)
        assert set(labels[rest]) == set(range(7)) and len(out)
        people = [{images.subjects[i] for i in part} for part in (rest, out)]
        assert not people[0] & people[1]
    assert not capsys.readouterr().out
    pair = dataclasses.replace(face_set(20, subjects=4), labels=np.arange(20) % 4 // 2)
    halves = dataclasses.replace(pair, subjects=[f"s{label}" for label in pair.labels])
    with pytest.raises(BadInput, match="is left to learn from"):
        photographs.hold_out(halves, .5, 0)
    thirds = dataclasses.replace(pair, labels=np.arange(20) % 3,
                                 subjects=[f"s{i % 3}" for i in range(20)])
    rest, _ = photographs.hold_out(thirds, .3, 0)
    assert len(set(thirds.labels[rest])) == 2
    assert "all images of " in capsys.readouterr().out


def test_prediction_takes_as_many_views_at_a_time_as_images_elsewhere():
    seen = []

    class Counting(RAN):
        def maps(self, views):
            seen.append(views.shape[:2].numel())
            return super().maps(views)
    images = face_set(21)
    network = Counting(7)
    said = faces.predict(network, source_of(images, views="fixed"), np.arange(21),
                         devices.mixed_precision(False, torch.device("cpu")).autocast, False)
    assert len(said.kept) == 21 and max(seen) <= 64 and len(seen) == 3


def test_a_batch_of_which_nothing_can_be_read_moves_nothing():
    images = face_set(14)
    source = source_of(images, lost=range(14))
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(BadInput, match="none of its 14 training images can be read"):
        run_epoch(options(rank_margin=.1, relabel_epoch=1, relabel_margin=0), job_of(
            source, network, .5))
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("network", [Baseline(7), SCN(7)])
def test_a_batch_of_two_of_which_one_can_be_read_is_trained_on(network):
    opt = options(batch_size=2, rank_margin=.1 * isinstance(network, SCN))
    source = source_of(face_set(6), lost=(0, 3))
    means = run_epoch(opt, job_of(source, network))
    assert means["train_loss"] > 0 and source.images.lost.sum() == 2


def test_noise_moves_its_share_of_labels_to_other_classes():
    labels = np.arange(700) % 7
    noisy = photographs.noisy_labels(labels, .3, 7, 0)
    assert (noisy != labels).sum() == 210 and set(noisy) == set(range(7))
    assert np.array_equal(noisy, photographs.noisy_labels(labels, .3, 7, 0))
    assert not np.array_equal(noisy, photographs.noisy_labels(labels, .3, 7, 1))
    assert np.array_equal(photographs.noisy_labels(labels, 0, 7, 0), labels)
    shifts = np.bincount((noisy - labels)[noisy != labels] % 7, minlength=7)[1:]
    assert shifts.min() > 15  # any of the other six


def test_what_relabelling_found_by_hand():
    images = face_set(6)  # labels 0 to 5
    given = np.array([0, 2, 2, 5, 4, 5])  # two errors, of 1 and 3
    job = job_of(source_of(images), labels=np.array([0, 1, 2, 4, 4, 0]))
    assert photographs.relabelling(given, job) == {
        "relabelled": 3, "planted": 2, "found": 2, "restored": 1, "wrong_before": 2 / 6,
        "wrong_after": 2 / 6}


def test_a_checkpoint_holds_plain_types_alone(tmp_path):
    job = job_of(source_of(face_set()))
    kept = []
    run_epoch(options(relabel_epoch=1, relabel_margin=0), job, on_step=kept.append)
    checkpoint.save(tmp_path / "x.pth", {"epoch": 1, "model": job.network.state_dict(),
                                         "within": kept[-1], "relabelled": job.relabelled})
    state = checkpoint.load(tmp_path / "x.pth")
    assert state["within"]["step"] == 3 and len(state["relabelled"]) == len(job.relabelled)
