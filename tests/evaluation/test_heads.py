"""Heads through the scripts: as good as their features, blind to what is held out, and what
fine-tuning starts from."""
import json
import re

import numpy as np
import pytest
import torch
from conftest import draw_set, finetune, pretrain, probe, save_image, script
from runs import load, only
from sklearn.metrics import f1_score
from test_logistic import fit

import dataset
import util
from dataset import Clip
from evaluation import descent, fold_heads, logistic, probing, result_files
from images import encoding, transforms
from images.lists import write_lists
from models import create_classifier, create_model
from models.classifier import Classifier
from training import record, supervised

pytestmark = pytest.mark.usefixtures("small_crops")


def draw_spots(folder, reach):
    """80 clips of 8 subjects whose four classes differ by where a bright spot lies, on one line
    from top to bottom, so that no class is another's mirror image; reach: of that line, as a share
    of the image."""
    rng, clips = np.random.default_rng(0), []
    y, x = np.mgrid[:256, :256] / 256 - 0.5
    for i in range(8):
        face = np.kron(rng.normal(0, 4, (8, 8)), np.ones((32, 32)))
        for j in range(10):
            label = j if j < 4 else int(rng.integers(4))
            middle = (-0.3, -0.1, 0.1, 0.3)[label] * reach
            change = face + 40 * np.exp(-(x ** 2 + (y - middle) ** 2) / (0.004 * reach ** 2))
            clip = Clip(0, f"s{i + 1}", f"s{i + 1}-{j}", label,
                        (f"rgb/{i}-{j}.png", f"depth/{i}-{j}.png"))
            for path, view in ((clip.paths[0], 128 + np.stack([change] * 3, 2)),
                               (clip.paths[1], 128 + change / 2)):
                view = view + rng.normal(0, 6, view.shape)
                save_image(folder / path, view.round().clip(0, 255).astype(np.uint8))
            clips.append(clip)
    write_lists(folder, clips)
    util.write_json(folder / "encoding.json", {"difference": "signed"})
    return folder


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    """Spots that lie within a crop of 64 pixels."""
    return draw_spots(tmp_path_factory.mktemp("spots"), 0.25)


def scores(run, *flags):
    """UF1 of a run of a script, on the untrained encoder if the flags name none."""
    save_path = flags[flags.index("--save_path") + 1]
    run("--model_path", "random", "--protocol", "loso", *flags)
    actual = json.loads((only(save_path) / "results.json").read_text())
    print(f"{' '.join(map(str, flags))}: UF1 {actual['uf1']:.3f}")
    return actual["uf1"]


WAYS = [([], 0.98), (["--l2", 0.001], 0.98), (["--solver", "sgd", "--batch_size", 16], 0.95),
        (["--solver", "sgd", "--batch_size", 80], 0.95),
        (["--solver", "sgd", "--batch_size", 256], 0.95),
        (["--learning_rate", 0.1, "--layer", 5], 0.95)]


@pytest.mark.parametrize("flags, least", WAYS, ids=lambda v: " ".join(map(str, v))
                         if isinstance(v, list) else "")
def test_a_plain_spot_is_told_from_an_untrained_encoder(spots, cache, tmp_path, flags, least):
    assert scores(probe, "--data_folder", spots, "--cache", cache, "--model", "resnet18v1",
                  "--save_path", tmp_path, *flags) >= least


TUNED = ["--epochs", 5, "--subject", "s1", "s2"]


@pytest.mark.parametrize("batch", [16, 128])
def test_a_plain_spot_is_told_after_fine_tuning(spots, cache, tmp_path, batch):
    assert scores(finetune, "--data_folder", spots, "--cache", cache, "--model", "resnet18v1",
                  "--save_path", tmp_path, *TUNED, "--batch_size", batch) >= 0.95


@pytest.mark.slow
def test_a_plain_spot_is_told_by_alexnet_with_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "CROP", 224)
    data = draw_spots(tmp_path / "data", 1)
    flags = ["--data_folder", data, "--cache", tmp_path / "cache", "--model", "alexnet"]
    actual = {" ".join(map(str, way)): (scores(
        probe, *flags, "--save_path", tmp_path / f"out{i}", *way), least)
        for i, (way, least) in enumerate(WAYS)}
    actual["fine-tuned"] = scores(
        finetune, *flags, "--save_path", tmp_path / "tuned", "--epochs", 5), 0.95
    print(json.dumps(actual, indent=1))
    assert all(uf1 >= least for uf1, least in actual.values()), actual


@pytest.mark.slow
@pytest.mark.parametrize("pretraining, tuned", [
    (["--batch_size", 256, "--model", "alexnet"], True),
    (["--batch_size", 128, "--model", "resnet50v1"], False)], ids=["alexnet", "resnet50v1"])
def test_a_plain_spot_is_told_with_the_command_lines_of_the_method(tmp_path, monkeypatch,
                                                                   pretraining, tuned):
    """Either line of pre-training (two epochs of it), then that of probing and of fine-tuning."""
    monkeypatch.setattr(transforms, "CROP", 224)
    data = draw_spots(tmp_path / "data", 1)
    flags = ["--data_folder", data, "--cache", tmp_path / "cache", *pretraining[2:]]
    pretrain("--model_path", tmp_path / "runs", *flags, *pretraining[:2], "--epochs", 2)
    (last,) = (tmp_path / "runs").glob("*/last.pth")
    heads = ["--model_path", last, "--protocol", "loso", "--learning_rate", 0.1, "--layer", 5]
    actual = {"probe": scores(probe, *flags, *heads, "--save_path", tmp_path / "probed")}
    if tuned:
        actual["fine-tuned"] = scores(finetune, *flags, *heads, "--epochs", 5, "--save_path",
                                      tmp_path / "tuned")
    assert min(actual.values()) >= 0.95, actual


# ---------------------------------------------------------------- held-out labels

def garble(folder, subject):
    """Gives the clips of a subject other labels, in every list."""
    for path in folder.glob("v_*/*.txt"):
        path.write_text("".join(
            re.sub(r" ([01]) 0$", lambda m: f" {1 - int(m[1])} 0", line)
            if f"/{subject}-" in line else line for line in path.read_text().splitlines(True)))


@pytest.mark.parametrize("flags", [[], ["--solver", "sgd", "--epochs", "3"],
                                   ["--select", "inner", "--epochs", "3"]], ids=" ".join)
def test_garbage_labels_of_a_held_out_subject_change_no_bit_of_its_probabilities(
        fresh, quick, pretrained, tmp_path, flags):
    flags = ["--model", "resnet18v1", "--cache", "off", "--protocol", "loso", *flags]
    kept = []
    for turn in ("right", "wrong"):
        if turn == "wrong":
            garble(fresh, "s1")
        for name in ("s1", "s3"):
            probe("--data_folder", fresh, *flags, "--model_path", pretrained, "--save_path",
                  tmp_path / turn / name, "--subject", name)
            run = only(tmp_path / turn / name)
            details = json.loads((run / "subjects" / f"{name}.json").read_text())
            kept.append((details.get("choice"), [r["probabilities"] for r in details["rows"]],
                         [r["label"] for r in details["rows"]], record.read_log(run)[1:]))
    (choice, p, labels, log), (_, others, _, _), (again, q, garbage, same), (_, changed, *_) = kept
    assert labels == [1 - label for label in garbage]
    assert (choice, p, log) == (again, q, same)
    assert others != changed


# ---------------------------------------------------------------- what fine-tuning starts from

def kept(run, name="s1"):
    """Probabilities `[n, C]` that a run kept of a subject."""
    rows = result_files.read_subject(run / "subjects" / f"{name}.json")[1]
    return np.array([row["probabilities"] for row in rows])


STILL = ["--encoder_lr", 0, "--learning_rate", 0, "--weight_decay", 0, "--subject", "s1", "s3"]


@pytest.mark.parametrize("l2", [["--l2", 0.01], ["--l2", 0.0001], []], ids=lambda v: str(v[1:]))
def test_a_head_that_is_not_trained_is_that_of_probing(drawn, quick, cache, pretrained, tmp_path,
                                                       l2):
    flags = ["--data_folder", drawn, "--model_path", pretrained, *l2]
    for name, frozen in (("tuned", []), ("frozen", ["--freeze_encoder"])):
        finetune(*flags, *quick, "--save_path", tmp_path / name, *frozen, *STILL, chosen=not l2)
    probe(*flags, "--model", "resnet18v1", "--cache", cache, "--protocol", "loso", "--save_path",
          tmp_path / "probe", "--subject", "s1", "s3")
    tuned, frozen, probed = (only(tmp_path / name) for name in ("tuned", "frozen", "probe"))
    for name in ("s1", "s3"):
        assert np.allclose(kept(tuned, name), kept(probed, name), atol=1e-4)
        assert np.allclose(kept(frozen, name), kept(probed, name), atol=1e-4)
        assert np.ptp(kept(tuned, name)[:, 0]) > 0.01


def test_heads_of_zeros_and_random_ones(drawn, quick, pretrained, tmp_path):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, *STILL]
    actual = {}
    for head, seed in (("zero", 0), ("random", 0), ("random", 1)):
        finetune(*flags, "--head", head, "--seed", seed, "--save_path", tmp_path / f"{head}{seed}")
        run = only(tmp_path / f"{head}{seed}")
        assert f"_{head}_loso_" in run.name
        actual[head, seed] = kept(run)
    assert (actual["zero", 0] == 0.5).all()
    for seed in (0, 1):
        # normal with deviation 0.01 on features of unit length, give or take
        logit = np.log(actual["random", seed][:, 0] / actual["random", seed][:, 1])
        assert 0 < abs(logit).max() < 0.08
    assert not np.allclose(actual["random", 0], actual["random", 1], atol=1e-4)


@pytest.mark.parametrize("head", ["probe", "zero", "random"])
def test_the_head_holds_the_statistics_of_its_training_clips(drawn, quick, pretrained, tmp_path,
                                                             head):
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--head", head,
             "--save_path", tmp_path, *STILL[:-1])
    state, clips = load(only(tmp_path) / "last.pth"), dataset.read_clips(drawn)
    model = create_model("resnet18v1").eval()
    model.load_state_dict(load(pretrained)["model"])
    images = torch.from_numpy(dataset.load_images(clips)[0][3:])  # all but s1
    x = transforms.eval_transform(images, state["normalization"])
    with torch.no_grad():
        rows = torch.cat([torch.cat(model(view, 6), 1) for view in (x, x.flip(-1))]).double()
    mean, std = state["classifier"]["mean"], state["classifier"]["std"]
    varies = rows.std(0) > 1e-6 * rows.abs().max()
    assert varies.sum() > 100  # of 128
    assert torch.allclose(mean, rows.mean(0).float(), atol=1e-4)
    assert torch.allclose(std[varies], rows.std(0, correction=0).float()[varies], rtol=1e-3)


def test_norms_that_move_start_from_the_training_clips_alone(fresh, quick, tmp_path):
    clips, actual = dataset.read_clips(fresh), []
    for turn in ("right", "wrong"):
        if turn == "wrong":
            for member in clips.members([(0, "s1")]):
                save_image(fresh / clips.clips[member].paths[0],
                           np.full((256, 256, 3), 140, np.uint8))
        finetune("--data_folder", fresh, *quick[:2], "--cache", "off", *quick[4:], "--model_path",
                 "random", "--train_bn", "--save_path", tmp_path / turn, *STILL[:-1])
        actual.append(load(only(tmp_path / turn) / "last.pth"))
    # of the first convolution's output; one step away from the initial 1 it would be 0.9
    assert actual[0]["model"]["rgb_to_d.bn1.running_var"].median() < 0.5
    for name, value in actual[0]["model"].items():
        assert torch.equal(value, actual[1]["model"][name]), name
    for name, value in actual[0]["classifier"].items():
        assert torch.allclose(value, actual[1]["classifier"][name], atol=1e-5), name


def test_the_first_step_normalises_as_the_start_of_the_head_did(drawn):
    clips, model = dataset.read_clips(drawn), create_model("resnet18v1")
    images = dataset.load_images(clips)[0]
    normalization = encoding.fixed_normalization("wrap", clips.views, clips.channels)
    x = transforms.eval_transform(torch.from_numpy(images), normalization)
    actual = {}
    for turn in ("before", "after"):
        with torch.no_grad():
            actual[turn] = model.eval()(x, 5)[0]
            wanted = actual["wanted"] = model.train()(x, 5)[0]
        supervised.set_norms(Classifier(model, None, 5, normalization), images,
                             np.arange(len(images)), len(images))
    apart = {turn: ((actual[turn] - wanted).norm() / wanted.norm()).item() for turn in actual}
    assert apart["after"] < 0.05 and apart["before"] > 0.5, apart


def rates(monkeypatch, run):
    """What the optimiser's groups were at every step of a run: [(rates, decays)]."""
    seen, step = [], torch.optim.SGD.step

    def noted(self, *args, **more):
        seen.append(tuple([g[name] for g in self.param_groups] for name in ("lr", "weight_decay")))
        return step(self, *args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", noted)
        run()
    return seen


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_encoders_rate_rises_first_and_the_heads_does_not(drawn, quick, pretrained, tmp_path,
                                                              monkeypatch, schedule):
    seen = rates(monkeypatch, lambda: finetune(
        "--data_folder", drawn, *quick, "--batch_size", 3, "--epochs", 4, "--warmup_epochs", 2,
        "--lr_schedule", schedule, *(["--lr_decay_epochs", 3] if schedule == "step" else []),
        "--learning_rate", 0.01, "--encoder_lr",
        1e-5, "--l2", 0.02, "--weight_decay", 3e-4, "--model_path", pretrained, "--save_path",
        tmp_path, "--subject", "s1"))
    assert len(seen) == 12  # 9 clips, three steps an epoch
    encoder, weight, bias = np.array([rate for rate, _ in seen]).T
    assert encoder[:6] == pytest.approx(1e-5 * np.arange(1, 7) / 6)
    assert weight.tolist() == bias.tolist()
    state = load(only(tmp_path) / "last.pth")["classifier"]
    length = int((state["std"] != 1).sum())
    base = 0.01 / length
    if schedule == "step":
        assert weight == pytest.approx([base] * 9 + [0.1 * base] * 3)
        assert encoder[6:] == pytest.approx([1e-5] * 3 + [1e-6] * 3)
    else:
        assert weight == pytest.approx(base * (1 + np.cos(np.pi * np.arange(12) / 12)) / 2)
        assert encoder[6:] == pytest.approx(1e-5 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2)
    # the penalty goes on as it was: half its square times the features' mean squared length
    assert all(decay == [3e-4, pytest.approx(0.02 * length), 0] for _, decay in seen)


def test_heads_on_a_frozen_encoder_follow_the_schedule(drawn, quick, pretrained, tmp_path):
    rates = {}
    for schedule in ("step", "cosine"):
        finetune("--data_folder", drawn, *quick, "--epochs", 4, "--freeze_encoder", "--head",
                 "zero", "--learning_rate", 0.1, "--lr_schedule", schedule, "--model_path",
                 pretrained, "--save_path", tmp_path / schedule)
        log = record.read_log(only(tmp_path / schedule))[1:]
        rates[schedule] = [line["learning_rate"] for line in log]
    assert rates["step"] == [0.1] * 4
    assert rates["cosine"] == pytest.approx(0.1 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)


@pytest.mark.parametrize("head", ["zero", "random"])
def test_heads_without_a_penalty_take_the_decay(drawn, quick, pretrained, tmp_path, monkeypatch,
                                                head):
    seen = rates(monkeypatch, lambda: finetune(
        "--data_folder", drawn, *quick, "--head", head, "--weight_decay", 3e-4, "--model_path",
        pretrained, "--save_path", tmp_path, "--subject", "s1"))
    assert seen and all(decay == [3e-4] * 3 for _, decay in seen)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """12 subjects with two clips each."""
    folder = tmp_path_factory.mktemp("many")
    draw_set(folder, 12, 2)
    return folder


@pytest.mark.parametrize("frozen", [[], ["--freeze_encoder"]], ids=["trained", "frozen"])
@pytest.mark.parametrize("everybody", [False, True], ids=["one", "all"])
def test_fine_tuning_by_ten_folds_holds_out_whole_groups(many, quick, tmp_path, monkeypatch,
                                                         frozen, everybody):
    clips = dataset.read_clips(many)
    names, fold_of = dataset.subject_groups(clips)
    (fold, *_) = [f for f in range(10) if (fold_of == f).sum() > 2]
    group = {clips.clips[i].subject for i in np.flatnonzero(fold_of == fold)}
    one, *others = sorted(group)
    assert len(names) == 10 and others
    trained, train, descend = {}, supervised.train_epoch, descent.Descent.epoch

    def noted(opt, job, *rest):
        trained[len(trained)] = set(job.members.tolist())
        return train(opt, job, *rest)

    def noted_heads(self, epoch):
        for place, which in enumerate(self.task.held_out):
            trained[len(trained)] = set(np.flatnonzero(self.training[:, place]).tolist())
            assert which in self.task.fold_of
        return descend(self, epoch)
    monkeypatch.setattr(supervised, "train_epoch", noted)
    monkeypatch.setattr(descent.Descent, "epoch", noted_heads)
    finetune("--data_folder", many, *quick, "--model_path", "random", "--protocol", "10fold",
             "--save_path", tmp_path, *frozen, *([] if everybody else ["--subject", one]))
    wanted = range(10) if everybody else [fold]
    assert sorted(map(sorted, trained.values())) == sorted(
        np.flatnonzero(fold_of != f).tolist() for f in wanted)
    run = only(tmp_path)
    assert "_10fold_" in run.name
    actual = json.loads((run / "results.json").read_text())
    assert actual["protocol"] == "10fold"
    assert {p.stem for p in (run / "subjects").glob("*.json")} == (
        {c.subject for c in clips.clips} if everybody else {one})
    if frozen:
        return
    state = load(run / "last.pth")
    out = group if not everybody else {
        clips.clips[i].subject for i in np.flatnonzero(fold_of == names.index(state["unit"]))}
    assert {s for _, s in state["seen"]["people"]} == {c.subject for c in clips.clips} - out
    assert {line["subject"] for line in record.read_log(run)[1:]} == {names[f] for f in wanted}


def test_the_rest_of_a_group_is_trained_without_those_who_are_finished(many, quick, tmp_path):
    clips = dataset.read_clips(many)
    _, fold_of = dataset.subject_groups(clips)
    (fold, *_) = [f for f in range(10) if (fold_of == f).sum() > 2]
    group = sorted({clips.clips[i].subject for i in np.flatnonzero(fold_of == fold)})
    flags = ["--data_folder", many, *quick, "--model_path", "random", "--protocol", "10fold",
             "--subject"]
    finetune(*flags, *group, "--save_path", tmp_path / "together")
    for name in group:
        finetune(*flags, name, "--save_path", tmp_path / "apart")
    together, apart = only(tmp_path / "together"), only(tmp_path / "apart")
    for name in group:
        assert np.allclose(kept(together, name), kept(apart, name), atol=1e-6)


def test_a_fifth_of_the_subjects_has_the_encoder_pre_trained_without_it(many, quick, tmp_path):
    clips = dataset.read_clips(many)
    names, fold_of = dataset.subject_groups(clips, 5)
    group = {clips.clips[i].subject for i in np.flatnonzero(fold_of == 1)}
    assert names[1] == "fold2of5" and len(group) > 1
    pretrain("--data_folder", many, *quick, "--model_path", tmp_path / "runs", "--fold", "2/5")
    path = only(tmp_path / "runs")
    assert path.name.endswith("_without_fold2of5")
    people = {subject for _, subject in load(path / "last.pth")["seen"]["people"]}
    assert people == {clip.subject for clip in clips.clips} - group
    probe("--data_folder", many, *quick, "--save_path", tmp_path, "--protocol", "5fold",
          "--model_path", str(path / "last.pth").replace("fold2of5", "{fold}"),
          "--subject", *group, "--resume", "auto")
    (run,) = tmp_path.glob("probe*")
    actual = json.loads((run / "results.json").read_text())
    assert actual["protocol"] == "5fold" and actual["transductive"] is False
    assert actual["n_subjects"] == len(group)
    one, *_ = sorted(group)  # and for one subject at a time
    finetune("--data_folder", many, *quick, "--save_path", tmp_path, "--epochs", 1, "--model_path",
             str(path / "last.pth").replace("fold2of5", "{fold}"), "--subject", one)
    (run,) = tmp_path.glob("finetune*")
    assert json.loads((run / "results.json").read_text())["transductive"] is False


# ---------------------------------------------------------------- against scikit-learn, rendered

def fair(labels, said):
    return f1_score(labels, said, average="macro", labels=range(4), zero_division=0)


def figures(p, data):
    """(accuracy on training clips, UF1 on held-out ones) of probabilities `[N, F, C]`."""
    _, labels, fold_of = data
    said = p.argmax(2)
    train = fold_of[:, None] != np.arange(p.shape[1])
    return ((said == labels[:, None])[train].mean(),
            fair(labels, said[np.arange(len(labels)), fold_of]))


def by_scikit_learn(data, penalties):
    """`[N, F, C]` with the penalty of each fold."""
    features, labels, fold_of = data
    actual = np.zeros((len(labels), len(penalties), 4))
    for fold, l2 in enumerate(penalties):
        classes, p = fit(features, labels, fold_of != fold, l2)
        actual[:, fold, classes] = p
    return actual


@pytest.mark.slow
@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize("layer", [6, 4])
def test_no_head_fits_more_and_tells_less_than_scikit_learns(tmp_path, layer):
    parse, actual = script("LinearProbing_DVSCL_10fold").parse_option, []
    for seed in range(5):
        folder = tmp_path / str(seed)
        script("render").main([
            "casme3", "--data_folder", folder, "--subjects", 10, "--clips_per_subject", 8,
            "--size", 64, "--num_workers", 2, "--seed", seed])
        clips = dataset.read_clips(folder)
        torch.manual_seed(0)
        classifier = Classifier(
            create_model("resnet18v1"), create_classifier("resnet18v1", layer, 4), layer,
            encoding.fixed_normalization("signed", clips.views, clips.channels))
        features, positions, _ = probing.encode(classifier, dataset.load_images(clips)[0],
                                                torch.no_grad, views=2)
        names, fold_of = dataset.subject_folds(clips)
        data = features, clips.labels, fold_of
        task = fold_heads.Task(features, clips.labels, 4, fold_of, list(range(len(names))))
        regression = logistic.Regression(features, clips.labels, 4)
        heads, choice = fold_heads.solve(task, None, fold_heads.inner_groups(clips),
                                         regression=regression)
        ours = {"chosen": (heads, choice.l2)}
        for l2 in (1e-2, 1e-3, 1e-4):
            heads, _ = fold_heads.solve(task, l2, regression=regression)
            ours[f"l2 {l2:g}"] = heads, [l2] * len(names)
        for batch in (16, 256):
            opt = parse(["--solver", "sgd", "--batch_size", str(batch), "--data_folder", "d",
                         "--save_path", "s", "--model_path", "random"])
            stats = logistic.statistics(features, task.training())
            heads = fold_heads.draw(names, stats, 4)
            descent.Descent(heads, task, positions, opt).run()
            ours[f"sgd {batch}"] = heads, choice.l2
        with torch.no_grad():
            actual.append({name: (figures(heads(features[0]).softmax(2).numpy(), data),
                                 figures(by_scikit_learn(data, l2), data))
                          for name, (heads, l2) in ours.items()})
    mean = {name: np.mean([each[name] for each in actual], 0) for name in actual[0]}
    for seed, each in [*enumerate(actual), ("all", mean)]:
        for name, ((fitted, told), (theirs, reference)) in each.items():
            print(f"layer {layer}, set {seed}, {name:8s} trained {fitted:.3f}, held out UF1 "
                  f"{told:.3f}; scikit-learn {theirs:.3f}, {reference:.3f}")
            assert not (fitted > theirs and told < reference - 0.02), (seed, name)
            if not name.startswith("sgd"):
                assert (fitted, told) == pytest.approx((theirs, reference), abs=0.005), (seed, name)
