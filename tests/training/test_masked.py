"""Training of masked autoencoders: rates, groups, trajectories, what is left out, two ranks."""
import argparse

import numpy as np
import pytest
import torch
from conftest import save_image, script
from forked import ranked, uneven_clocks
from parity import filled, fixtures, normal, uniform

from evaluation import finetuning
from images import cache, crops
from models import convnextv2, mae
from training import checkpoint, devices, epochs, losses, masked, schedules
from util import BadInput, RunFailed

STORED, SIDE = 73, 64
NEXT = (1, 1, 2, 1), (8, 16, 24, 32)


def options(**more):
    return argparse.Namespace(**{
        "seed": 3, "data_folder": "d", "weight_decay": .05, "batch_size": 4,
        "accum_iter": 2, "epochs": 2, "warmup_epochs": 1, "min_lr": 0.0,
        "learning_rate": 2e-3, "blr": None, "lr_schedule": "iteration", "mask_ratio": .75, **more})


def small(kind="vit"):
    if kind == "vit":
        return filled(mae.MAE(32, 2, 2, SIDE, decoder_depth=1, decoder_embed_dim=32))
    return filled(convnextv2.FCMAE(*NEXT, width=16))


def job_of(network, images, recipe, rate=2e-3, run=None):
    return masked.Job(network, run or network, images, recipe,
                      masked.set_optimizer(options(learning_rate=rate), network),
                      devices.mixed_precision(False, torch.device("cpu")))


def pictures(n=22, lost=(), side=STORED):
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, side, side), np.uint8)

    def decode(i):
        if i in lost:
            raise BadInput(f"{i}.png: cannot be decoded")
        return pixels[i]
    return cache.OnDemand(n, decode, (3, side, side), np.uint8, "0" * 64, "off", 1)


def run_epoch(opt, job, epoch=1, within=None, on_step=lambda inside: None):
    return masked.train_epoch(opt, job, epoch, within or {}, on_step)


# ---------------------------------------------------------------- rates

def test_rates_of_every_step_are_the_published_ones():
    for case, accum in zip(fixtures("finetune")["schedule"], (4, 2)):
        opt = options(epochs=case["epochs"], min_lr=case["min_lr"], learning_rate=case["lr"])
        steps = case["loader_len"] / accum
        for epoch, it, rate, scaled in case["rows"]:
            for base, expected in ((case["lr"], rate), (case["lr"] * .25, scaled)):
                assert schedules.scheduled(opt, base, epoch + 1, it // accum + 1, steps,
                                           case["warmup_epochs"]) == pytest.approx(
                                               expected, rel=1e-8)


@pytest.mark.parametrize("number, name, more", [
    (0, "main_pretrain", ["--accum_iter", "4"]),
    (1, "main_pretrain_convnextv2", ["--update_freq", "8"]),
    (2, "main_finetune_affectnet", ["--accum_iter", "2"]),
    (3, "main_finetune", ["--update_freq", "4"])])
def test_the_rate_follows_from_the_images_of_a_step(number, name, more, monkeypatch):
    case, module = fixtures("finetune")["lr_from_blr"]["commands"][number], script(name)
    argv = [*more, "--data_path", "d", "--blr", str(case["blr"]),
            "--batch_size", str(case["batch_size"])]

    def parsed(argv):
        if hasattr(module, "parse_option"):
            return module.parse_option(argv)
        return finetuning.parse_option("", argv, "rafdb", None)
    assert parsed(argv).learning_rate == pytest.approx(case["lr"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parsed(argv).learning_rate == pytest.approx(3 * case["lr"])


def test_groups_of_pretraining_are_the_published_ones():
    expected = fixtures("finetune")["pretrain_groups"]
    with torch.device("meta"):
        model = mae.create_mae("mae_vit_base_patch16")
    plain, decayed = masked.decay_groups(model, .05)
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0, .05)
    assert len(plain["params"]) == expected["n_no_decay"]
    assert len(decayed["params"]) == expected["n_decay"]
    held = {id(part): name for name, group in (("no decay", plain), ("decay", decayed))
            for part in group["params"]}
    where = {name: held.get(id(part)) for name, part in model.named_parameters()}
    assert [name for name, place in where.items() if place is None] == expected["frozen"]
    for name in ("cls_token", "mask_token"):
        assert where[name] == expected[name]


@pytest.mark.parametrize("fixture, number", [("finetune", 0), ("fcmae", 0), ("fcmae", 1)])
def test_layers_have_the_published_rates(fixture, number):
    cases = fixtures(fixture)["layer_decay"]
    case = cases[number] if fixture == "fcmae" else cases
    kind = "group" if case.get("layer_decay_type") == "group" else "layer"
    with torch.device("meta"):
        model = convnextv2.create_convnextv2(case["model"], 7) if fixture == "fcmae" else \
            mae.create_vit(case["model"], 7, case["global_pool"])
    groups = masked.layer_decay_groups(model, case["layer_decay"], case["weight_decay"], kind)
    assert len(groups) == case["n_groups"]
    parts = dict(model.named_parameters())
    for actual, expected in zip(groups, case["groups"]):
        assert actual["names"] == expected["names"]
        assert actual["lr_scale"] == pytest.approx(expected["lr_scale"], rel=1e-9)
        assert actual["weight_decay"] == expected["weight_decay"]
        assert [id(part) for part in actual["params"]] == [id(parts[name])
                                                           for name in expected["names"]]
    assert sum(len(group["params"]) for group in groups) == len(parts)


def test_fine_tuning_gives_each_layer_its_rate():
    opt = finetuning.parse_option("", ["--data_path", "d", "--lr", "2e-3", "--layer_decay", ".5"],
                                  "rafdb", None)
    with torch.device("meta"):
        network = mae.create_vit("vit_tiny_patch16", 7)
    optimizer = finetuning.set_optimizer(opt, network)
    schedules.set_rates(opt, optimizer, opt.epochs, 1, 1)  # the last one's, on its way to --min_lr
    rates = {id(part): group["lr"] for group in optimizer.param_groups for part in group["params"]}
    parts = dict(network.named_parameters())
    head = rates[id(parts["head.weight"])]
    for name, share in (("patch_embed.proj.weight", .5 ** 13),
                        ("blocks.0.mlp.fc1.weight", .5 ** 12), ("blocks.11.mlp.fc1.weight", .5)):
        assert rates[id(parts[name])] == pytest.approx(head * share, rel=1e-6), name
    assert 0 < head < opt.learning_rate
    assert all(group["betas"] == (.9, .999) for group in optimizer.param_groups)


# ---------------------------------------------------------------- the public code's steps

class Given:
    """Inputs in place of images and of what a recipe makes of them: those of one epoch."""
    size = 224

    def __init__(self, n):
        self.lost, self.given = np.zeros(n, bool), iter(())

    def __len__(self):
        return len(self.lost)

    def __getitem__(self, index):
        return np.zeros((len(index), 3, 1, 1), np.uint8)

    def draw(self, n, rng):
        return {}

    def train(self, batch, drawn):
        return next(self.given)


@pytest.mark.parametrize("fixture, cells", [("mae_vit", 196), ("fcmae", 49)])
def test_steps_are_those_of_the_public_code(fixture, cells, monkeypatch):
    case = fixtures(fixture)["trajectory"]
    model = filled(mae.create_mae(case["model"]) if fixture == "mae_vit" else
                   convnextv2.create_fcmae(case["model"]))
    model.norm_pix_loss = fixture == "fcmae"
    per_epoch, accum = case["micro_batches_per_epoch"], 2
    opt = options(batch_size=case["batch"], accum_iter=accum, epochs=case["epochs"],
                  warmup_epochs=case["warmup_epochs"], min_lr=case["min_lr"],
                  mask_ratio=case["mask_ratio"],
                  learning_rate=case["blr"] * case["batch"] * accum / 256 * 1)
    assert opt.learning_rate == pytest.approx(case["lr"])
    source, said, rates, noises = Given(per_epoch * case["batch"]), [], [], iter(())

    def run(*inputs):
        loss, *rest = model(*inputs)
        said.append(float(loss.detach()))
        return loss, *rest
    job = job_of(model, source, source, case["lr"], run)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator=None: next(noises))
    for epoch in range(case["epochs"]):
        k = [epoch * per_epoch + it for it in range(per_epoch)]
        source.given = iter([normal(100 + i, 2, 3, 224, 224) for i in k])
        noises = iter([uniform(200 + i, 2, cells) for i in k])
        means = run_epoch(opt, job, epoch + 1, {}, lambda inside: rates.extend(
            [schedules.rate_now(job.optimizer)] * accum))
        mean = np.mean(said[-4:])
        assert means["train_loss"] == pytest.approx(mean, rel=1e-6)
        with torch.no_grad():  # of an incomplete group, in which nothing is learned
            run(next(source.given), case["mask_ratio"], next(noises))
        rates.append(None)
    for row, loss, rate in zip(case["rows"], said, rates, strict=True):
        assert loss == pytest.approx(row[3], rel=1e-3 if row[0] else 1e-4), row
        assert rate is None or rate == pytest.approx(row[2], rel=1e-8, abs=1e-15), row
    for name, expected in case["after"].items():
        value = model.state_dict()[name].flatten()
        assert float(value.norm()) == pytest.approx(expected["norm"], rel=1e-3), name
        assert value[:3].tolist() == pytest.approx(expected["first3"], rel=1e-2, abs=1e-3), name


# ---------------------------------------------------------------- mixed images

def mixing(**more):
    opt = finetuning.parse_option("", ["--data_path", "d", "--mixup", ".8", "--cutmix", "1"],
                                  "rafdb", None)
    return finetuning.set_mixup(opt.changed(**more), 7)


def test_mixed_targets_and_their_loss_are_the_published_ones(monkeypatch):
    expected = fixtures("finetune")["mixup"]
    case, mixup = expected["targets_given_lam"], mixing()
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (case["lam"], False))
    labels, images = torch.tensor(case["labels"]), normal(0, 6, 3, 8, 8)
    mixed, target = mixup(images.clone(), labels)
    torch.testing.assert_close(target, torch.tensor(case["target"]), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(mixed, case["lam"] * images + (1 - case["lam"]) * images.flip(0))
    logits = torch.from_numpy(np.random.RandomState(1).standard_normal((6, 7)))
    assert float(losses.classification_loss(logits, target).mean()) == pytest.approx(
        expected["losses"]["soft_target_of_targets_given_lam"], abs=1e-6)
    assert float(losses.classification_loss(logits, labels, smoothing=.1).mean()) == pytest.approx(
        expected["losses"]["label_smoothing_0_1"], abs=1e-6)


def test_mixing_follows_from_the_seed_as_published():
    case = fixtures("finetune")["mixup"]["np_random_seeded"]
    images, labels = normal(0, 6, 3, 32, 32), torch.tensor(case["labels"])
    for row in case["rows"]:
        np.random.seed(row["seed"])  # noqa: NPY002 - what timm draws from
        mixed, target = mixing()(images.clone(), labels)
        changed = (mixed[0] != images[0]).any(0).sum()
        assert int(changed) == row["changed_pixels_sample_0"]
        assert float(mixed.sum()) == pytest.approx(row["x_sum"], abs=2e-3)
        assert target[0].tolist() == pytest.approx(row["target_0"], abs=1e-6)


def test_nothing_is_mixed_unless_asked_for():
    assert mixing(mixup=0, cutmix=0) is None
    assert mixing(mixup=0, cutmix=0, cutmix_minmax=[.2, .8]) is not None


# ---------------------------------------------------------------- steps of several batches

@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_batches_of_a_step_are_one_large_batch(kind, monkeypatch):
    """Where the same is hidden and nothing is augmented."""
    states, given = [], normal(1, 8, 3, SIDE, SIDE)
    noise = uniform(2, 8, 16 if kind == "vit" else 4)
    for size, accum in ((8, 1), (4, 2), (2, 4)):
        network, source = small(kind), Given(8)
        source.size, source.given = SIDE, iter(given.split(size))
        noises = iter(noise.split(size))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, noises=noises, generator: next(noises))
            descent = torch.optim.SGD([{"params": network.parameters(), "base": .1}], .1)
            run_epoch(options(batch_size=size, accum_iter=accum, warmup_epochs=0),
                      job_of(network, source, source)._replace(optimizer=descent))
        states.append(network.state_dict())
    start = small(kind).state_dict()
    assert not torch.equal(start["mask_token"], states[0]["mask_token"])
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)


def test_left_over_batches_are_dropped_and_announced(capsys):
    opt = options(epochs=3)
    assert epochs.announce(opt, 23, "images") == 2
    printed = capsys.readouterr().out
    assert "23 images at batch 4 x 2 x 1 ranks: 2 steps of 8 images per epoch, 6 in all; 7 images" \
        in printed and "learning rate 0.002: rises for 1 epochs" in printed
    groups, length = epochs.groups(opt, 23, epochs.generator(0))
    assert [[len(index) for index in group] for group in groups] == [[4, 4], [4, 4]]
    assert length == 2.5
    used = torch.cat([index for group in groups for index in group])
    assert len(used.unique()) == 16 and used.max() < 23
    steps = []
    run_epoch(opt, job_of(small(), pictures(23), crops.Recipe(SIDE, .2)), 1, {},
              lambda inside: steps.append(inside["step"]))
    assert steps == [1, 2]
    with pytest.raises(BadInput, match=r"a step takes 8 images, with --accum_iter 2 on 1 ranks; "
                                       r"there are 7"):
        epochs.announce(opt, 7, "images")


def test_gradients_are_cut_to_a_length():
    network, grads = small(), []
    job = job_of(network, pictures(8), crops.Recipe(SIDE, .2))
    step = job.optimizer.step
    job.optimizer.step = lambda *a, **k: (grads.append(torch.stack(
        [part.grad.norm() for part in network.parameters() if part.grad is not None]).norm()),
        step(*a, **k))[1]
    run_epoch(options(), job)
    run_epoch(options(clip_grad=1e-2), job)
    assert grads[0] > .1 and float(grads[1]) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_an_epoch_that_was_stopped_goes_on_to_the_same(kind):
    opt, recipe = options(mask_ratio=.5), crops.Recipe(SIDE, .2)

    def begun():
        torch.manual_seed(0)
        return job_of(small(kind), pictures(26, lost=(5,)), recipe)

    class Stop(Exception):
        pass

    def stop(inside):
        if inside["step"] == 2:
            kept.append(inside)
            raise Stop
    whole, part, again, kept = begun(), begun(), begun(), []
    means = [run_epoch(opt, whole, epoch)["train_loss"] for epoch in (1, 2)]
    assert run_epoch(opt, part, 1)["train_loss"] == means[0]
    with pytest.raises(Stop):
        run_epoch(opt, part, 2, {}, stop)
    again.network.load_state_dict(part.network.state_dict())
    again.optimizer.load_state_dict(part.optimizer.state_dict())
    assert run_epoch(opt, again, 2, kept[0])["train_loss"] == means[1]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    assert not torch.equal(whole.network.state_dict()["mask_token"],
                           begun().network.state_dict()["mask_token"])


# ---------------------------------------------------------------- what cannot be read

@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_an_image_that_cannot_be_read_is_left_out(kind, capsys):
    """As if the loss were that of the others, whatever lies in its place."""
    opt = options(epochs=1, warmup_epochs=0)
    recipe, images = crops.Recipe(SIDE, .2), pictures(8, lost=(2, 6))
    job = job_of(small(kind), images, recipe)
    run_epoch(opt, job)
    assert capsys.readouterr().err.count("left out: ") == 2 == images.lost.sum()

    network = small(kind).train()
    optimizer = masked.set_optimizer(opt, network)
    (group,), _ = epochs.groups(opt, 8, epochs.generator(opt.seed, 1))
    for k, index in enumerate(group):
        rng = epochs.generator(opt.seed, 1, 1, k)
        drawn = recipe.draw(4, rng)
        noise = torch.rand(4, 16 if kind == "vit" else 4, generator=rng)
        good = torch.tensor([int(i) not in (2, 6) for i in index])
        inputs = recipe.train(torch.from_numpy(images[index.numpy()]), drawn)
        (network(inputs[good], opt.mask_ratio, noise[good])[0] / 2).backward()
    optimizer.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(job.network.state_dict()[name], value, atol=1e-6, rtol=1e-5)


class Replicas:
    """Stands for DataParallel over so many GPUs: the loss of each one's part, a vector."""

    def __init__(self, network, n):
        self.network, self.device_ids = network, list(range(n))

    def __call__(self, images, mask_ratio, noise):
        parts = zip(*(given.chunk(len(self.device_ids)) for given in (images, noise)))
        return torch.stack([self.network(one, mask_ratio, drawn)[0] for one, drawn in parts]), None


def test_gpus_with_unlike_numbers_of_images_give_the_mean_over_the_images():
    network, opt = small(), options(batch_size=10)
    job, place = job_of(network, pictures(10), crops.Recipe(SIDE, .2)), (1, 1, 0)
    rows = np.arange(10)
    batch = torch.from_numpy(job.images[rows])
    one, *_ = masked.batch_loss(opt, job, place, 10, batch, rows)
    several = job._replace(run=Replicas(network, 4))  # 3, 3, 3 and 1
    actual, *_ = masked.batch_loss(opt, several, place, 10, batch, rows)
    assert actual.shape == () and actual.item() == pytest.approx(one.item(), rel=1e-5)
    parts = several.run(torch.rand(10, 3, SIDE, SIDE), .75, torch.rand(10, 4))[0]
    assert len(parts) == 4 and parts.std() > 0


def test_images_of_which_nothing_can_be_read_move_nothing():
    network = small()
    job = job_of(network, pictures(8, lost=range(8)), crops.Recipe(SIDE, .2))
    job.optimizer.param_groups[1]["weight_decay"] = 0
    with pytest.raises(BadInput, match="none of its 8 images can be read"):
        run_epoch(options(warmup_epochs=0), job)
    for name, value in small().state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_ends_the_run():
    network = small()
    with torch.no_grad():
        network.decoder_pred.bias.fill_(torch.inf)
    with pytest.raises(Exception, match=r"not finite in epoch 1, step 1; .*0\.002"):
        run_epoch(options(), job_of(network, pictures(8), crops.Recipe(SIDE, .2)))


def test_a_batch_of_which_nothing_can_be_read_ends_the_run():
    """The folder has gone: weights would decay to the last checkpoint."""
    network = small()
    job = job_of(network, pictures(64, lost=range(64)), crops.Recipe(SIDE, .2))
    with pytest.raises(RunFailed, match="none of 32 images can be read in epoch 1, step 1; see"):
        run_epoch(options(batch_size=32), job)
    for name, value in small().state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


# ---------------------------------------------------------------- two ranks

def test_two_ranks_pretrain_to_the_weights_of_one(tmp_path):
    """With an image that one of them cannot read, and clocks of which one says to save."""
    rng = np.random.default_rng(0)
    for i in range(25):
        save_image(tmp_path / f"d/{i}.png", rng.integers(0, 256, (40, 40, 3), np.uint8))
    (tmp_path / "d/7.png").write_bytes(b"nothing")
    flags = [str(part) for part in (
        "--model", "mae_vit_tiny_patch16", "--decoder_depth", 1, "--decoder_embed_dim", 32,
        "--data_path", tmp_path / "d", "--input_size", 32, "--accum_iter", 2, "--epochs", 2,
        "--warmup_epochs", 0, "--lr", 1e-3, "--device", "cpu", "--num_workers", 1, "--cache",
        tmp_path / "cache")]
    for ranks, size, name in ((1, 8, "one"), (2, 4, "two")):
        printed = ranked(ranks, "main_pretrain", *flags, "--batch_size", size, "--output_dir",
                         tmp_path / name, prepare=uneven_clocks, folder=tmp_path)
    assert "batch 4 x 2 x 2 ranks: 1 steps of 16 images" in printed
    one, two = (checkpoint.load(tmp_path / name / "checkpoint-1.pth") for name in ("one", "two"))
    assert one["lost"].tolist() == two["lost"].tolist() == [22]  # 7.png
    start = script("main_pretrain")
    torch.manual_seed(0)
    before = start.set_model(start.parse_option(flags)).state_dict()
    moved = 0
    for name, value in one["model"].items():
        if name.endswith("pos_embed"):
            continue
        change = value - before[name]
        moved += bool(change.norm() > 0)
        # no loss depends on the keys' biases: AdamW makes steps of what their gradients are off 0
        limit = 1e-2 if name.endswith("qkv.bias") else 1e-3
        assert (two["model"][name] - value).norm() <= limit * change.norm(), name
    assert moved == len(one["model"]) - 2
