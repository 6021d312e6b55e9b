"""MMNet: the numbers of the public implementation, sizes of all variants, published names."""
import json
import zlib

import numpy as np
import pytest
import torch
from conftest import PARITY

from models import mmnet

COUNTS = {"V1": 49_416_353, "V2": 49_415_201, "V3R": 36_379_669, "V3NR": 36_381_973,
          "V3NRS": 36_384_277, "V4": 9_657_621, "V5N": 142_856_741, "V5RS": 142_859_981,
          "V5NRS": 142_863_221, "mmnet": 9_438_841}


def weights(model, salt):
    """The state_dict that the formula of parity/mmnet.json gives."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        rng = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2 ** 32)
        a = rng.standard_normal(tuple(value.shape))
        if name.endswith("running_var"):
            a = 0.2 * abs(a) + 0.8
        elif name.endswith(("running_mean", ".bias")):
            a = 0.1 * a
        elif value.dim() == 1:
            a = 1 + 0.1 * a
        else:
            a = a * np.sqrt(2 / np.prod(value.shape[1:]))
        state[name] = torch.tensor(a, dtype=torch.float32)
    return state


@pytest.mark.skipif(not (PARITY / "mmnet.json").exists(), reason="no parity fixtures here")
@pytest.mark.parametrize("name", [
    pytest.param("V1", marks=pytest.mark.slow), "V3NR", pytest.param("V5", marks=pytest.mark.slow),
    pytest.param("V6", marks=pytest.mark.slow)])
def test_logits_are_those_of_the_public_implementation(name):
    case = json.loads((PARITY / "mmnet.json").read_text())["versions"][name]
    model = mmnet.create_mmnet({"V5": "V5NR"}.get(name, name), au_size=case["config"]["au_size"])
    assert {k: list(v.shape) for k, v in model.named_parameters()} == case["parameters"]
    assert {k: list(v.shape) for k, v in model.named_buffers()} == case["buffers"]
    model.load_state_dict(weights(model, case["salt"]))
    motion, onset = (torch.tensor(np.random.RandomState(case["seed"] + i).standard_normal(shape),
                                  dtype=torch.float32)
                     for i, shape in enumerate((case["motion_shape"], case["onset_shape"])))
    with torch.no_grad():
        actual = model.eval()(motion, onset)
    if name != "V6":
        actual = actual,
    for ours, key in zip(actual, ("logits", "au_logits")):
        expected = torch.tensor(case[key])
        assert (ours - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_parameters(name):
    with torch.device("meta"):
        model = mmnet.create_mmnet(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_numbers_of_parameters_with_action_units():
    for units, expected in ((35, 156_909_471), (28, 154_099_573)):
        with torch.device("meta"):
            model = mmnet.create_mmnet("V6", au_size=units)
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", ["V1", "V3N", "V4", "V6", "mmnet"])
def test_every_weight_has_a_gradient_at_another_size(name):
    units = 3 if name.startswith("V6") else None
    model = mmnet.create_mmnet(name, 4, units, size=32).train()
    layout = mmnet.LAYOUTS[name]
    motion = torch.randn(2, mmnet.CHANNELS[layout.channels], layout.steps, 32, 32)
    out = model(motion, torch.rand(2, 3, 32, 32))
    logits = out[0] if units else out
    assert logits.shape == (2, 4) and (not units or out[1].shape == (2, 3))
    loss = sum(part.square().sum() for part in (out if units else [out]))
    loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []


def test_the_threshold_passes_the_gradient_straight_through():
    model = mmnet.create_mmnet("V6c", 2, 3, size=32)
    features = torch.randn(4, model.au.in_features, requires_grad=True)
    logits, units = model.classify(features)
    seen = torch.cat([features, (units.sigmoid() > 0.5).float()], 1)
    assert torch.allclose(logits, model.fc(seen), atol=1e-5)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), units, retain_graph=True)
    share = units.sigmoid()
    expected = model.fc.weight[0, -3:] * share * (1 - share)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_weights_with_the_channels_innermost_give_the_same():
    model = mmnet.create_mmnet("V4", size=32).eval()
    motion, onset = torch.randn(2, 4, 4, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(motion, onset)
        assert torch.allclose(model.channels_last()(motion, onset), plain, atol=1e-4)




@pytest.mark.parametrize("name", ["V1", "V3R", "mmnet"])
def test_published_names_are_those_here(name):
    model = mmnet.create_mmnet(name, size=32)
    in_time, state, expected = name == "V1", {}, model.state_dict()
    chain = {"spatial": 0, "spatial_norm": 1, "temporal": 3, "temporal_norm": 4}
    shortcut = {"conv": 0, "norm": 1, "spatial": 0, "spatial_norm": 1, "temporal": 2,
                "temporal_norm": 3}
    for key, value in expected.items():
        parts = key.split(".")
        if parts[0] == "position":
            key = key.replace("position", "vit_pos")
        elif parts[0] == "fc":
            key = f"main_branch.{key}"
        elif parts[:2] == ["stem", "external"]:
            key = f"conv_act.{chain[parts[2]]}.{parts[3]}"
        elif parts[0] == "stem" and in_time:
            key = f"main_branch.stem.{chain[parts[2]]}.{parts[3]}"
        elif parts[0] == "stem":
            key = f"main_branch.{'conv1' if parts[2] == 'spatial' else 'bn1'}.{parts[3]}"
        else:
            inside = parts[2:]
            if inside[0] == "conv1" and in_time:
                inside = ["conv1", str(chain[inside[1]]), *inside[2:]]
            elif inside[0] == "attention":
                inside = ["attn", "0" if inside[1] == "conv" else "1", *inside[2:]]
            elif inside[0] == "shortcut":
                inside = ["downsample", str(shortcut[inside[1]]), *inside[2:]]
            inside[0] = inside[0].replace("norm", "bn")
            key = ".".join(["main_branch", f"layer{int(parts[1]) + 1}", "0", *inside])
        # the original network convolves images
        two = name == "mmnet" and key == "conv_act.0.weight"
        state[f"module.{key}"] = value.squeeze(2) if two else value
    assert name != "mmnet" or state["module.conv_act.0.weight"].shape == (180, 3, 3, 3)
    state |= {"module.vit_pos.cls_token": torch.zeros(1), "module.timeembed": torch.zeros(1),
              "module.pos.weight": torch.zeros(1), "module.head.bias": torch.zeros(1)}
    actual = mmnet.from_published(state)
    assert actual.keys() == expected.keys()
    mmnet.create_mmnet(name, size=32).load_state_dict(actual)
    assert all(actual[key] is expected[key] or torch.equal(actual[key], expected[key])
               for key in expected)


def test_published_names_of_the_action_unit_variant():
    names = {"last_layer.weight": "fc.weight", "pretrained.main_branch.embedau.bias": "au.bias",
             "pretrained.main_branch.layer2.0.bn2.bias": "blocks.1.norm2.bias",
             "pretrained.conv_act.3.weight": "stem.external.temporal.weight"}
    unused = {"pretrained.main_branch.fc.weight": None}
    state = {name: torch.zeros(1) for name in {**names, **unused}}
    assert set(mmnet.from_published(state)) == set(names.values())


@pytest.mark.parametrize("wrong", [{"name": "V7"}, {"name": "V6"}, {"name": "V4", "size": 100},
                                   {"name": "V4", "channels": "x"}])
def test_what_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError):
        mmnet.create_mmnet(**wrong)
