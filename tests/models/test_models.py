"""Encoders and heads: parity with the public implementation, taps, gradients, initial weights."""

import copy
import json
import zlib

import numpy as np
import pytest
import torch
from conftest import PARITY
from torch import nn

from models import (
    MODEL_NAMES,
    create_classifier,
    create_model,
    default_layer,
    n_layers,
)
from NCE.NCEAverage import NCEAverage
from NCE.NCECriterion import NCECriterion, NCESoftmaxLoss

pytestmark = pytest.mark.usefixtures("full_width")

FIXTURE = PARITY / "encoders.json"
RandomState = np.random.RandomState
ALIASES = {"resnets18": "resnet18v1", "resnets50": "resnet50v1", "resnets101": "resnet101v1"}


def formula(key, shape):
    """The weights that the fixture was computed with."""
    a = RandomState(zlib.crc32(key.encode()) & 0xffffffff).standard_normal(shape)
    leaf = key.rsplit(".", 1)[1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape)
    if leaf == "running_var":
        return 0.2 * np.abs(a) + 0.8
    if leaf in ("running_mean", "bias"):
        return 0.1 * a
    if leaf == "weight" and len(shape) == 1:
        return 1 + 0.1 * a
    return a * np.sqrt(2 / np.prod(shape[1:]))


@pytest.mark.skipif(not FIXTURE.exists(), reason="no parity fixtures beside the repository")
@pytest.mark.parametrize("name", ["alexnet", "resnet18v1", "resnet50v1"])
def test_encoder_reproduces_public_implementation(name):
    fixture = json.loads(FIXTURE.read_text())[name]
    model = create_model(name).eval()
    state = model.state_dict()
    assert sorted(state) == fixture["names"]
    assert sum(p.numel() for p in model.parameters()) == fixture["parameters"]
    for key, value in state.items():
        value.copy_(torch.from_numpy(np.asarray(formula(key, tuple(value.shape)))))
    x = RandomState(0).standard_normal((2, 4, 224, 224))
    x = torch.from_numpy(x).float()
    for layer, views in fixture["layers"].items():
        with torch.no_grad():
            taps = model(x, int(layer))
        for tap, view in zip(taps, ("rgb", "depth")):
            want, flat = views[view], tap.double().flatten()
            assert list(tap.shape) == want["shape"]
            assert flat.mean().item() == pytest.approx(want["mean"], rel=1e-4)
            assert flat.std().item() == pytest.approx(want["std"], rel=1e-4)
            got = torch.cat([flat[:6], flat[-3:]]).tolist()
            assert got == pytest.approx(want["first"] + want["last"], rel=1e-4,
                                        abs=1e-4 * want["std"]), (layer, view)
    with torch.no_grad():
        for last, default in zip(taps, model(x)):
            assert torch.equal(last, default)


def names_without_gradient(model):
    """Biases of linear layers that a batch norm follows: it subtracts them, their gradient is 0."""
    return {f"{path}.{i}.bias" for path, module in model.named_modules()
            if isinstance(module, nn.Sequential)
            for i, (first, second) in enumerate(zip(module, list(module)[1:]))
            if isinstance(first, nn.Linear) and isinstance(second, nn.BatchNorm1d)}


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("name, side", [("alexnet", 224), ("resnet18v1", 64)])
def test_one_step_gives_every_parameter_of_both_encoders_a_gradient(name, side, softmax):
    torch.manual_seed(0)
    model = create_model(name, feat_dim=16).train()
    contrast = NCEAverage(16, 20, 9, use_softmax=softmax)
    criterion = NCESoftmaxLoss() if softmax else NCECriterion(20)
    outs = contrast(*model(torch.randn(4, 4, side, side)), torch.arange(4))
    sum(criterion(out) for out in outs).backward()
    exempt = names_without_gradient(model)
    # ResNet has no such bias, AlexNet two per view
    assert exempt == ({f"{view}.{layer}.0.bias" for view in ("rgb_to_d", "d_to_rgb")
                       for layer in ("fc6", "fc7")} if name == "alexnet" else set())
    sizes = {key: p.grad.abs().max().item() for key, p in model.named_parameters()}
    least = min(size for key, size in sizes.items() if key not in exempt)
    assert least > 1e-6, min((size, key) for key, size in sizes.items() if key not in exempt)
    for key in exempt:
        assert sizes[key] < 1e-4 * sizes[key.replace("bias", "weight")]


def test_one_view_does_not_reach_the_other_encoder():
    model = create_model("resnet18v1", feat_dim=8).train()
    model(torch.randn(2, 4, 32, 32))[1].sum().backward()
    assert all(p.grad is None for p in model.rgb_to_d.parameters())
    assert all(p.grad is not None for p in model.d_to_rgb.parameters())


def passed(encode, model, x, layer, half):
    """(taps, gradients of the weights, running statistics) of a pass forwards and backwards."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, half):
        taps = encode(x, layer)
    sum(tap.float().square().mul(torch.arange(1, 1 + tap[0].numel()).view_as(tap[0])).mean()
        for tap in taps if tap.requires_grad).backward()
    return ([tap.detach() for tap in taps],
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            {name: value.clone() for name, value in model.named_buffers()})


@pytest.mark.parametrize("layer, half", [(None, False), (3, False), (None, True)])
@pytest.mark.parametrize("frozen", [None, "rgb_to_d", "d_to_rgb.conv1"])
def test_towers_side_by_side_give_the_bits_of_one_thread(threads, layer, half, frozen):
    torch.set_num_threads(2)
    model = create_model("resnet18v1", feat_dim=8).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(not (frozen and name.startswith(frozen)))
    x, state = torch.randn(4, 4, 32, 32), copy.deepcopy(model.state_dict())

    def after_each_other(x, layer):
        return [tower(view.contiguous(), layer)
                for tower, view in zip(model.towers(), x.split((3, 1), 1))]
    together = passed(model, model, x, layer, half)
    assert torch.get_num_threads() == 2
    model.load_state_dict(state)
    torch.set_num_threads(1)
    apart = passed(after_each_other, model, x, layer, half)
    for ours, theirs in zip(together[0], apart[0]):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    for ours, theirs in zip(together[1:], apart[1:]):
        assert ours.keys() == theirs.keys() and len(ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert not any(tap.requires_grad for tap in model(x))


def test_a_tap_below_all_trained_weights_has_no_gradient(threads):
    torch.set_num_threads(2)
    model = create_model("resnet18v1", feat_dim=8).requires_grad_(False)
    model.rgb_to_d.fc.bias.requires_grad_()
    x = torch.randn(2, 4, 32, 32)
    assert [tap.requires_grad for tap in model(x, 3)] == [False, False]
    assert [tap.requires_grad for tap in model(x)] == [True, False]


def test_an_error_in_a_tower_is_raised_and_threads_stay_as_they_were(threads):
    torch.set_num_threads(2)
    model = create_model("resnet18v1", feat_dim=8)
    with pytest.raises(ValueError, match="layer 99"):
        model(torch.randn(2, 4, 32, 32), 99)
    model(torch.randn(2, 4, 32, 32))[0].sum().backward()
    assert torch.get_num_threads() == 2
    assert model.rgb_to_d.conv1.weight.grad is not None
    assert model.d_to_rgb.conv1.weight.grad is None


@pytest.mark.parametrize("name, side", [("alexnet", 224), ("resnet18v1", 64)])
@pytest.mark.parametrize("channels", [(3, 1), (3, 3)])
def test_views_are_split_by_channel(name, side, channels):
    model = create_model(name, feat_dim=8, in_channels=channels).eval()
    x = torch.randn(2, sum(channels), side, side)
    y = x.clone()
    y[:, 3:] += 1
    with torch.no_grad():
        (rgb, depth), (rgb_other, depth_other) = model(x), model(y)
        assert torch.equal(rgb, rgb_other)
        assert (depth - depth_other).abs().max() > 1e-4
        assert torch.allclose(rgb, model.rgb_to_d(x[:, :3]), atol=1e-6)
        with pytest.raises(RuntimeError):
            model(x[:, 1:])


@pytest.mark.parametrize("name, side", [("alexnet", 224), ("resnet18v1", 64)])
def test_layout_and_precision_keep_the_features(name, side):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(2, 4, side, side)
    with torch.no_grad():
        plain = model(x)
        last = model.to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    for a, b, c in zip(plain, last, half):
        assert torch.allclose(a, b, atol=1e-5)
        assert c.dtype == torch.float32  # else the features miss unit length by 1e-3
        assert torch.allclose(c.norm(dim=1), torch.ones(2), atol=1e-6)
        assert torch.allclose((a * c).sum(1), torch.ones(2), atol=0.01)


@pytest.mark.parametrize("name, alias_of", ALIASES.items())
def test_aliases_are_the_narrow_models(name, alias_of):
    with torch.device("meta"):
        alias, model = create_model(name), create_model(alias_of)
    assert ({k: v.shape for k, v in alias.state_dict().items()}
            == {k: v.shape for k, v in model.state_dict().items()})


@pytest.mark.parametrize("depth, expansion", [(18, 1), (50, 4), (101, 4)])
@pytest.mark.parametrize("version, width", [("v1", 0.5), ("v2", 1), ("v3", 2)])
def test_versions_are_widths(depth, expansion, version, width):
    with torch.device("meta"):
        tower = create_model(f"resnet{depth}{version}").d_to_rgb
    assert tower.fc.in_features == 512 * expansion * width
    assert tower.conv1.weight.shape == (64, 1, 7, 7)
    blocks = [sum(1 for _ in stage) for stage in
              (tower.layer1, tower.layer2, tower.layer3, tower.layer4)]
    assert blocks == {18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]


def test_initial_weights():
    torch.manual_seed(0)
    model = create_model("resnet18v1")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    conv = create_model("alexnet").rgb_to_d.conv_block_3[0]
    bound = (1 / (conv.in_channels * 9)) ** 0.5  # uniform, what torch does by default
    assert 0.99 * bound < conv.weight.abs().max().item() <= bound


SIDES = {"alexnet": [10, 6, 5, 5, 6], "resnet18v1": [8, 6, 4, 3, 7, 1],
         "resnet50v1": [8, 6, 4, 3, 7, 1]}
CHANNELS = {"alexnet": [48, 128, 192, 192, 128], "resnet18v1": [64, 32, 64, 128, 256, 256],
            "resnet50v1": [64, 128, 256, 512, 1024, 1024]}


@pytest.mark.parametrize("name", SIDES)
def test_heads_fit_every_tap(name):
    model = create_model(name).eval()
    feats = torch.randn(2, 4, 224, 224).split((3, 1), dim=1)
    assert n_layers(name) == len(SIDES[name])
    assert default_layer(name) == {"alexnet": 5}.get(name, 6)
    for layer, (side, channels) in enumerate(zip(SIDES[name], CHANNELS[name]), 1):
        with torch.no_grad():  # the next tap of each view
            feats = tuple(tower.stages()[layer - 1](feat)
                          for tower, feat in zip((model.rgb_to_d, model.d_to_rgb), feats))
        for encoder, views in (("both", feats), ("rgb", feats[:1]), ("depth", feats[1:])):
            head = create_classifier(name, layer, 3, encoder=encoder)
            pooled = head.pool(*feats)
            assert pooled.shape == (2, len(views) * channels * side ** 2)
            assert head(*feats).shape == (2, 3)
            assert torch.equal(head(*feats), head.classifier(pooled))
            # views lie one after the other, each as it would be alone
            blocks = pooled.split(channels * side ** 2, dim=1)
            for block, view in zip(blocks, views):
                assert block.mean().item() == pytest.approx(head.pooling(view).mean().item(),
                                                            rel=1e-4)


def test_heads_pool_as_their_family_does():
    ramp = torch.arange(100.0).view(1, 1, 10, 10).repeat(1, 192, 1, 1)
    pooled = create_classifier("alexnet", 3, 2, encoder="rgb").pool(ramp, None)
    assert pooled[0, :25].tolist() == [10.0 * r + c for r in range(1, 10, 2)
                                       for c in range(1, 10, 2)]
    ramp = torch.arange(64.0).view(1, 1, 8, 8).repeat(1, 64, 1, 1)
    pooled = create_classifier("resnet18v1", 3, 2, encoder="depth").pool(None, ramp)
    assert pooled[0, :16].tolist() == [8.0 * r + c + 4.5 for r in range(0, 8, 2)
                                       for c in range(0, 8, 2)]
    feat = torch.randn(2, 256, 7, 7)
    pooled = create_classifier("resnet18v1", 5, 2, encoder="rgb").pool(feat, None)
    assert torch.allclose(pooled, feat.flatten(1))  # as is


def test_a_head_centres_and_scales_what_it_sees():
    torch.manual_seed(0)
    head = create_classifier("resnet18v1", 6, 3)
    feats = 5 + torch.randn(4, 256), 5 + torch.randn(4, 256)
    weight, bias = torch.randn(3, 512), torch.randn(3)
    state = {"mean": 5 + torch.rand(512), "std": 0.1 + torch.rand(512),
             "classifier.weight": weight, "classifier.bias": bias}
    assert head.state_dict().keys() == state.keys()
    head.load_state_dict(state)
    x = (torch.cat(feats, 1) - state["mean"]) / state["std"]
    assert torch.allclose(head(*feats), x @ weight.t() + bias, atol=1e-4)
    assert torch.allclose(head.plain_weight(), weight / state["std"])
    assert {name for name, _ in head.named_parameters()} == {"classifier.weight",
                                                             "classifier.bias"}
    for name in ("classifier.weight", "classifier.bias"):
        with pytest.raises(RuntimeError, match=name):
            head.load_state_dict({key: v for key, v in state.items() if key != name})
    with pytest.raises(RuntimeError, match="std"):
        head.load_state_dict(state | {"std": torch.ones(7)})


@pytest.mark.parametrize("name, layer, shape", [("resnet18v1", 6, (2, 256)),
                                                ("alexnet", 5, (2, 128, 6, 6))])
def test_a_head_from_before_the_statistics_scores_as_it_did(name, layer, shape):
    torch.manual_seed(0)
    feats = 3 + torch.randn(shape), 3 + torch.randn(shape)
    head = create_classifier(name, layer, 4)
    dim = head.classifier.in_features
    old = {"classifier.weight": torch.randn(4, dim), "classifier.bias": torch.randn(4)}
    head.mean.fill_(2)  # of what it was before
    head.std.fill_(3)
    given = dict(old)
    head.load_state_dict(given)
    scores = nn.functional.linear(head.pool(*feats), old["classifier.weight"],
                                  old["classifier.bias"])
    assert torch.equal(head(*feats), scores)
    assert torch.equal(head.plain_weight(), old["classifier.weight"])
    assert given.keys() == old.keys()


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_head_draws_its_own_weights_and_nothing_else(name):
    layer = n_layers(name)
    torch.manual_seed(5)
    head = create_classifier(name, layer, 4)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    linear = nn.Linear(head.classifier.in_features, 4)
    nn.init.normal_(linear.weight, std=0.01)
    assert torch.equal(head.classifier.weight, linear.weight)
    assert torch.equal(after, torch.get_rng_state())
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (head.classifier.bias == 0).all()
    torch.manual_seed(6)
    assert not torch.equal(create_classifier(name, layer, 4).classifier.weight, linear.weight)


def test_what_does_not_exist_is_refused_with_the_choices():
    for call in (lambda: create_model("resnet34"), lambda: n_layers("resnet34"),
                 lambda: create_classifier("resnet34", 1, 2)):
        with pytest.raises(ValueError, match=r"resnet34.*alexnet.*resnet18v1"):
            call()
    for name, layer, last in (("alexnet", 6, 5), ("alexnet", 0, 5), ("resnet50v1", 7, 6)):
        with pytest.raises(ValueError, match=f"layer {layer}.*1 to {last}"):
            create_classifier(name, layer, 2)
    with pytest.raises(ValueError, match=r"left.*both, rgb, depth"):
        create_classifier("alexnet", 5, 2, encoder="left")
    model, x = create_model("resnet18v1").eval(), torch.randn(1, 4, 32, 32)
    for layer in (0, 8, -1):
        with pytest.raises(ValueError, match=f"layer {layer}.*1 to 7"):
            model(x, layer)


@pytest.mark.parametrize("size", [64, 100, 112])
@pytest.mark.parametrize("name", ["alexnet", "resnet18v1", "resnet50v1"])
def test_heads_fit_the_taps_of_any_size(name, size):
    model, x = create_model(name, 16, size=size).eval(), torch.randn(2, 4, size, size)
    for layer in range(1, n_layers(name) + 1):
        head = create_classifier(name, layer, 3, size=size)
        assert head(*model(x, layer)).shape == (2, 3)
        side = model(x, layer)[0].shape[-1]
        if model(x, layer)[0].dim() == 4:  # pooled maps are never larger than the taps
            assert head.pooling(model(x, layer)[0]).shape[-1] <= side
    assert model(x)[0].shape == (2, 16)


def test_a_size_of_which_alexnet_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="63 pixels"):
        create_model("alexnet", size=62)
    assert create_model("alexnet", size=63)(torch.randn(2, 4, 63, 63))[0].shape == (2, 128)


@pytest.mark.parametrize("name, side", [("resnet18v1", 48), ("alexnet", 96)])
def test_features_from_any_tap_are_those_from_the_image(name, side):
    torch.manual_seed(0)
    model, x = create_model(name, size=side).eval(), torch.randn(3, 4, side, side)
    with torch.no_grad():
        expected = model(x)
        for layer in range(1, len(model.rgb_to_d.stages()) + 1):
            taps = model(x, layer)
            kept = [tap.clone() for tap in taps]
            for actual, want in zip(model.embed(taps, layer), expected):
                assert torch.allclose(actual, want, atol=1e-6), layer
            # a head reads the taps as well
            assert all(torch.equal(*pair) for pair in zip(taps, kept)), layer
