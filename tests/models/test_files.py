"""Files of weights that others wrote: what is loaded, what is missing, what is refused."""
import argparse
import fractions
import io
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from parity import filled, near, normal
from torch.nn import functional as F

from models import convnextv2, files, load_public, mae
from util import BadInput

TINY = 32, 2, 2  # width, depth, heads
NEXT = (1, 1, 2, 1), (8, 16, 24, 32)
HEAD = ["head.bias", "head.weight"]


def autoencoder(side=64):
    return filled(mae.MAE(*TINY, side, decoder_depth=1, decoder_embed_dim=32))


def classifier(pool=True, side=64, n_label=7):
    torch.manual_seed(1)
    return mae.VisionTransformer(n_label, *TINY, side, pool)


def kept(path, model, **beside):
    """Writes weights as the public autoencoders are, with an option namespace beside them."""
    torch.save({"model": model, "args": argparse.Namespace(lr=1e-3, model="x"), "epoch": 9,
                **beside}, path)
    return path


def encoder_of(state):
    return {name: value for name, value in state.items()
            if not name.startswith(("decoder", "mask_token"))}


def assert_loaded(model, loaded, state):
    ours = model.state_dict()
    assert loaded.loaded == sorted(loaded.loaded) and loaded.loaded
    assert sorted(loaded.loaded + loaded.missing) == sorted(ours)
    for name in loaded.loaded:
        assert torch.equal(ours[name], state[name]), name


# ---------------------------------------------------------------- vision transformers

@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_autoencoders_start_an_autoencoder_and_a_classifier(tmp_path, decoder, prefix):
    state = autoencoder().state_dict()
    others = sorted(state.keys() - encoder_of(state).keys())
    if not decoder:
        state = encoder_of(state)
    path = kept(tmp_path / "mae.pth", {prefix + name: value for name, value in state.items()})

    model = mae.MAE(*TINY, 64, decoder_depth=1, decoder_embed_dim=32)
    found = load_public(model, path)
    assert_loaded(model, found, state)
    assert found.missing == ([] if decoder else others) and found.unexpected == []

    model = classifier()
    found = load_public(model, path)
    assert_loaded(model, found, state)
    assert found.missing == ["fc_norm.bias", "fc_norm.weight", *HEAD]
    assert found.unexpected == sorted((others if decoder else []) + ["norm.bias", "norm.weight"])

    model = classifier(pool=False)
    found = load_public(model, path)
    assert_loaded(model, found, state)
    assert found.missing == HEAD and found.unexpected == (others if decoder else [])


def test_a_classifier_starts_another_and_a_head_for_other_classes_is_passed_over(tmp_path):
    theirs = filled(classifier())
    path = kept(tmp_path / "vit.pth", theirs.state_dict())
    model = classifier()
    found = load_public(model, path)
    assert found.missing == [] == found.unexpected and torch.equal(model.head.weight,
                                                                    theirs.head.weight)
    model = classifier(n_label=8)
    before = model.head.weight.clone()
    found = load_public(model, path)
    assert found.missing == HEAD and torch.equal(model.head.weight, before)
    assert_loaded(model, found, theirs.state_dict())
    with pytest.raises(BadInput, match=r"vit\.pth: not of this network: norm\.\w+ is missing"):
        load_public(classifier(pool=False), path)  # which never had a norm of the class token


def test_positions_of_another_grid_are_interpolated(tmp_path):
    state = autoencoder(96).state_dict()
    path = kept(tmp_path / "mae.pth", state)
    for model in (autoencoder(64), classifier(side=64), classifier(side=128)):
        assert load_public(model, path).missing in (
            [], ["fc_norm.bias", "fc_norm.weight", *HEAD])
        for name in ("pos_embed", "decoder_pos_embed"):
            if name not in model.state_dict():
                continue
            (actual,), (given,) = model.state_dict()[name], state[name]
            assert torch.equal(actual[0], given[0])
            side = model.grid
            for channel in (0, 7, 31):  # one after another, each a picture of its own
                plane = F.interpolate(given[1:, channel].view(1, 1, 6, 6), (side, side),
                                      mode="bicubic", align_corners=False)
                assert near(actual[1:, channel].view(side, side), plane[0, 0], 1e-6)
    same = autoencoder(96)
    load_public(same, path)
    assert torch.equal(same.pos_embed, state["pos_embed"])


def test_timms_transformer_starts_a_classifier(tmp_path):
    theirs = filled(timm.create_model("vit_tiny_patch16_224", num_classes=1000))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = mae.create_vit("vit_tiny_patch16", 7, global_pool=False).eval()
    found = load_public(model, tmp_path / "timm.pth")
    assert found.missing == HEAD and found.unexpected == []
    assert_loaded(model, found, theirs.state_dict())
    images = normal(0, 1, 3, 224, 224)
    with torch.no_grad():
        assert near(model.embed(images), theirs.forward_features(images)[:, 0], 2e-5)


def test_timm_loads_a_pretrained_checkpoint(tmp_path):
    ours = filled(mae.create_mae("mae_vit_tiny_patch16", decoder_depth=1, decoder_embed_dim=32))
    kept(tmp_path / "checkpoint-0.pth", ours.state_dict())
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    state = torch.load(tmp_path / "checkpoint-0.pth", weights_only=False)["model"]
    found = theirs.load_state_dict(encoder_of(state), strict=False)
    assert sorted(found.missing_keys) == HEAD and found.unexpected_keys == []
    images = normal(0, 1, 3, 224, 224)
    patches = images.view(1, 3, 14, 16, 14, 16).permute(0, 2, 4, 3, 5, 1).reshape(1, 196, 768)
    with torch.no_grad():
        assert near(ours.norm(ours.encode(patches)), theirs.forward_features(images), 2e-5)


# ---------------------------------------------------------------- ConvNeXt V2

def test_fcmae_starts_fcmae_and_a_classifier(tmp_path):
    theirs = filled(convnextv2.FCMAE(*NEXT, width=40))
    path = kept(tmp_path / "fcmae.pth", theirs.state_dict())
    model = convnextv2.FCMAE(*NEXT, width=40)
    found = load_public(model, path)
    assert found.missing == [] == found.unexpected
    assert_loaded(model, found, theirs.state_dict())
    model = convnextv2.ConvNeXtV2(7, *NEXT)
    found = load_public(model, path)
    assert found.missing == [*HEAD, "norm.bias", "norm.weight"]
    assert found.unexpected == sorted(name for name in theirs.state_dict()
                                      if not name.startswith("encoder."))
    assert_loaded(model, found, theirs.encoder.state_dict())


def test_dense_public_files_without_head_start_both(tmp_path):
    encoder = filled(convnextv2.FCMAE(*NEXT, width=40)).encoder
    path = kept(tmp_path / "dense.pth", encoder.state_dict())
    model = convnextv2.ConvNeXtV2(7, *NEXT)
    found = load_public(model, path)
    assert found.missing == [*HEAD, "norm.bias", "norm.weight"] and found.unexpected == []
    assert_loaded(model, found, encoder.state_dict())
    model = convnextv2.FCMAE(*NEXT, width=40)
    found = load_public(model, path)
    assert found.unexpected == [] and {name.split(".")[0] for name in found.missing} == {
        "mask_token", "proj", "decoder", "pred"}
    assert_loaded(model, found, {f"encoder.{name}": value
                                 for name, value in encoder.state_dict().items()})


def sparse(state):
    """What the official sparse code names and shapes otherwise, of an FCMAE's state."""
    public = {}
    for name, value in state.items():
        *parts, last = name.split(".")
        stem = name.startswith("encoder.downsample_layers.0.")
        if name.startswith("encoder.") and not stem:
            if value.ndim == 4 and last == "weight":  # columns slowest: [k·k, in, out]
                value = value.permute(3, 2, 1, 0).flatten(0, 1)
                last, value = "kernel", value[:, 0] if value.shape[1] == 1 else value
            elif parts[-1].startswith("pwconv"):
                parts.append("linear")
            elif parts[-1] == "norm" or (parts[-1] == "0" and "downsample" in name):
                parts.append("ln")
            elif last in ("gamma", "beta"):
                value = value.view(1, -1)
            elif last == "bias":
                value = value[None]
        public[".".join([*parts, last])] = value
    return public


def test_sparse_public_files_start_both(tmp_path):
    theirs = filled(convnextv2.FCMAE(*NEXT, width=40))
    state = sparse(theirs.state_dict())
    assert {"encoder.stages.0.0.dwconv.kernel", "encoder.stages.2.1.pwconv2.linear.bias",
            "encoder.downsample_layers.2.0.ln.weight", "encoder.stages.1.0.norm.ln.bias"} \
        <= state.keys()
    path = kept(tmp_path / "sparse.pth", state)
    model = convnextv2.FCMAE(*NEXT, width=40)
    found = load_public(model, path)
    assert found.missing == [] == found.unexpected
    assert_loaded(model, found, theirs.state_dict())
    model = convnextv2.ConvNeXtV2(7, *NEXT)
    found = load_public(model, path)
    assert found.missing == [*HEAD, "norm.bias", "norm.weight"]
    assert_loaded(model, found, theirs.encoder.state_dict())


def test_timms_convnext_starts_a_classifier(tmp_path):
    theirs = filled(timm.create_model("convnextv2_atto", num_classes=1000))
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "timm.pth")
    model = convnextv2.create_convnextv2("convnextv2_atto", 7).eval()
    found = load_public(model, tmp_path / "timm.pth")
    assert found.missing == HEAD and found.unexpected == []
    images = normal(0, 1, 3, 64, 64)
    with torch.no_grad():
        assert near(model.embed(images), theirs.forward_head(theirs.forward_features(images),
                                                             pre_logits=True), 2e-5)


def test_timms_safetensors_are_read_as_they_are_handed_out(tmp_path):
    theirs = timm.create_model("convnextv2_atto", num_classes=1000).state_dict()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(theirs, path)
    model = convnextv2.create_convnextv2("convnextv2_atto", 7)
    found = load_public(model, path)
    assert found.missing == HEAD and found.unexpected == []
    assert torch.equal(model.state_dict()["stages.0.0.dwconv.weight"],
                       theirs["stages.0.blocks.0.conv_dw.weight"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"model\.safetensors: not a file of safetensors"):
        load_public(model, path)


# ---------------------------------------------------------------- refusals

def renamed(state, old, new):
    return {name.replace(old, new): value for name, value in state.items()}


def changed(model, **more):
    return {**model.state_dict(), **more}


DEEP = mae.MAE(32, 3, 2, 64, decoder_depth=1, decoder_embed_dim=32)
SHALLOW = mae.MAE(32, 1, 2, 64, decoder_depth=1, decoder_embed_dim=32)
WIDE = mae.MAE(48, 2, 2, 64, decoder_depth=1, decoder_embed_dim=32)


@pytest.mark.parametrize("state, said", [
    (DEEP.state_dict(), r"blocks\.2\.\S+ is unknown, and 11 more"),
    (SHALLOW.state_dict(), r"blocks\.1\.\S+ is missing, and 11 more"),
    (WIDE.state_dict(), r"\S+ has the shape \[\S*48\S*.*\], not \["),
    (changed(autoencoder(), dist_token=torch.zeros(1, 1, 32)), "dist_token is unknown;"),
    (renamed(autoencoder().state_dict(), "blocks.0.", "layers.0."), r"\S+ is missing"),
    (changed(autoencoder(), pos_embed=torch.zeros(1, 12, 32)), r"pos_embed has the shape"),
    (changed(autoencoder(), pos_embed=torch.zeros(1, 0, 32)), r"pos_embed has the shape"),
    (changed(autoencoder(), pos_embed=torch.zeros(17, 32)), r"pos_embed has the shape"),
    (changed(autoencoder(), **{"head.bias": torch.tensor(1.0)}), r"head\.\S+ .*shape"),
    (convnextv2.FCMAE(*NEXT, width=40).state_dict(), r"\S+ is missing")])
def test_other_transformers_are_refused(tmp_path, state, said):
    path, model = kept(tmp_path / "other.pth", state), classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadInput, match=rf"other\.pth: not of this network: {said}"):
        load_public(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("state, said", [
    (convnextv2.FCMAE((1, 1, 3, 1), NEXT[1], width=40).state_dict(), r"stages\.2\.2\.\S+ is unkn"),
    (convnextv2.FCMAE(NEXT[0], (8, 16, 24, 40), width=40).state_dict(), "has the shape"),
    ({"conv1.kernel": torch.zeros(3, 3, 3, 8)}, "is missing"),
    ({"conv1.kernel": torch.zeros(9)}, "is missing"),
    ({"conv1.kernel": torch.zeros(7, 3, 8)}, "is missing"),
    ({"conv1.kernel": torch.tensor(1.0)}, "is missing"),
    ({"stages.0.0.pwconv1.weight": torch.zeros(3)}, "is missing"),
    ({"head.bias": torch.tensor(1.0)}, "is missing"),
    (autoencoder().state_dict(), "is missing")])
def test_other_convolutions_are_refused(tmp_path, state, said):
    path = kept(tmp_path / "other.pth", state)
    with pytest.raises(BadInput, match=rf"other\.pth: not of this network: .*{said}"):
        load_public(convnextv2.ConvNeXtV2(7, *NEXT), path)


class Call:
    """What would run, were it unpickled."""

    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [
    {"args": Call()}, {"args": fractions.Fraction(1, 2)}, {"scaler": np.float64(1)}])
def test_files_that_carry_code_are_refused(tmp_path, capsys, content):
    path = tmp_path / "code.pth"
    torch.save({"model": autoencoder().state_dict(), **content}, path)
    with pytest.raises(BadInput, match=r"code\.pth: refused: it carries code or classes"):
        load_public(classifier(), path)
    assert capsys.readouterr().out == ""


def test_files_that_are_none_are_refused_by_their_names(tmp_path):
    path = tmp_path / "x.pth"
    for content in (b"", b"no checkpoint", pickle.dumps([1, 2], 2)):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"x\.pth: "):
            load_public(classifier(), path)
    whole = io.BytesIO()
    torch.save({"model": autoencoder().state_dict()}, whole)
    path.write_bytes(whole.getvalue()[:-2000])
    with pytest.raises(BadInput, match=r"x\.pth: not a checkpoint, or truncated"):
        load_public(classifier(), path)
    for content in ([1, 2], {"model": [1]}, {"model": {"a": 1}}, {"model": {1: torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(BadInput, match=r"x\.pth: not a checkpoint of this method"):
            load_public(classifier(), path)
    state = autoencoder().state_dict()
    state["norm.bias"][3] = torch.nan
    kept(path, state)
    with pytest.raises(BadInput, match=r"x\.pth: holds weights that are not finite"):
        load_public(classifier(), path)
    with pytest.raises(BadInput, match=r"nowhere\.pth: no such checkpoint"):
        files.read(tmp_path / "nowhere.pth")


def test_half_a_decoder_or_a_head_is_refused(tmp_path):
    state = autoencoder().state_dict()
    part = {name: value for name, value in state.items() if name != "decoder_pred.weight"}
    with pytest.raises(BadInput, match=r"decoder_pred\.weight is missing;"):
        load_public(autoencoder(), kept(tmp_path / "mae.pth", part))
    load_public(classifier(), kept(tmp_path / "mae.pth", part))  # of which it takes nothing
    state = classifier().state_dict()
    del state["head.bias"]
    with pytest.raises(BadInput, match=r"head\.bias is missing;"):
        load_public(classifier(), kept(tmp_path / "vit.pth", state))
