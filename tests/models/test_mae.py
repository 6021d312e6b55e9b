"""The masked autoencoder and its vision transformer: the numbers of the public code, a textbook."""
import numpy as np
import pytest
import timm
import torch
from parity import count, filled, fixtures, near, normal, uniform
from torch import nn
from torch.nn import functional as F

from models import mae, masking

BASE = pytest.param("base", marks=pytest.mark.slow)  # 112 million weights are drawn


def case_of(cases, size):
    return next(case for case in cases if f"vit_{size}" in case["model"])


# ---------------------------------------------------------------- the public code

@pytest.mark.parametrize("size", ["tiny", BASE])
def test_the_autoencoder_is_that_of_the_public_code(size):
    case = case_of(fixtures("mae_vit")["cases"], size)
    model = filled(mae.create_mae(case["model"]))
    assert count(model) == case["n_parameters"] and len(model.state_dict()) == case["n_keys"]
    trained = [part for part in model.parameters() if part.requires_grad]
    assert sum(part.numel() for part in trained) == case["n_trainable"]
    images, noise, ratio = normal(0, 2, 3, 224, 224), uniform(2, 2, 196), case["mask_ratio"]
    order, n_kept, drawn = masking.draw_order(noise, ratio)
    with torch.no_grad():
        latent = model.norm(model.encode(masking.patchify(images, 16), order[:, :n_kept]))
        said, pred, mask = model(images, ratio, noise)
        assert float(said) == pytest.approx(case["raw_pixels"]["loss"], abs=1e-5)
    assert torch.equal(mask, drawn) and mask.sum() == case["mask_sum"]
    assert ["".join(str(int(cell)) for cell in row) for row in mask] == case["mask_rows"]
    assert order.argsort(1)[0, :8].tolist() == case["ids_restore_0_first8"]
    assert list(latent.shape) == case["latent_shape"] and list(pred.shape) == case["pred_shape"]
    for name, actual in (("latent", latent), ("pred", pred)):
        first, last = (torch.tensor(case[f"{name}_{end}"]["v"]) for end in ("first", "last"))
        assert (actual[0, 0, :6] - first).abs().max() < 1e-4
        assert (actual[-1, -1, -6:] - last).abs().max() < 1e-4
        assert float(actual.abs().mean()) == pytest.approx(case[f"{name}_abs_mean"], abs=1e-5)
    assert float(pred[mask.bool()].abs().mean()) == pytest.approx(case["pred_abs_mean_masked"],
                                                                  abs=1e-5)
    for kind in ("raw_pixels", "norm_pix_loss"):
        model.norm_pix_loss, expected = kind == "norm_pix_loss", case[kind]
        model.zero_grad()
        loss, none, _ = model.train()(images, ratio, noise)
        loss.backward()
        assert none is None and float(loss.detach()) == pytest.approx(expected["loss"], abs=1e-5)
        grads = {name: part.grad for name, part in model.named_parameters()}
        for name, value in expected["grad_norm"].items():
            assert float(grads[name].norm()) == pytest.approx(value, rel=1e-3), name
        assert [name for name in grads if grads[name] is None] == expected["no_grad"]
        whole = torch.stack([grad.norm() for grad in grads.values() if grad is not None]).norm()
        assert float(whole) == pytest.approx(expected["grad_norm_all"], rel=1e-3)


@pytest.mark.parametrize("width", [192, 512, 768])
def test_positions_are_those_of_the_public_code(width):
    expected = fixtures("finetune")["pos_embed"][str(width)]
    (positions,) = mae.sincos_positions(width, expected["grid"])
    assert positions.dtype == torch.float32 and list(positions.shape) == expected["shape"]
    positions = positions.double()
    assert float(positions.sum()) == pytest.approx(expected["sum"], rel=1e-6)
    assert float(positions.abs().sum()) == pytest.approx(expected["abs_sum"], rel=1e-6)
    other = torch.from_numpy(np.random.RandomState(5).standard_normal(tuple(positions.shape)))
    assert float((positions * other).sum()) == pytest.approx(expected["dot_RandomState5"], abs=1e-3)
    quarter = width // 4
    for row, where, name in (
            (2, (0, 1, quarter, 2 * quarter, 2 * quarter + 1, 3 * quarter, width - 1), "row_2"),
            (-1, (0, 1, 2, quarter, 2 * quarter, 3 * quarter, width - 1), "row_last")):
        assert positions[row, list(where)].tolist() == pytest.approx(expected[name]["v"], abs=1e-6)
    assert not positions[0].any()


@pytest.mark.parametrize("size, pool", [
    ("tiny", True), ("tiny", False), pytest.param("base", True, marks=pytest.mark.slow)])
def test_the_classifier_is_that_of_the_public_code(size, pool):
    (case,) = [case for case in fixtures("finetune")["finetune"]
               if case["model"] == f"vit_{size}_patch16" and case["global_pool"] == pool]
    model = filled(mae.create_vit(case["model"], case["num_classes"], pool))
    assert count(model) == case["n_parameters"]
    assert ("norm.weight" in model.state_dict()) == case["has_norm"]
    with torch.device("meta"):
        before = mae.create_mae(f"mae_{case['model']}").state_dict()
    assert model.state_dict().keys() - before.keys() == set(case["keys_not_in_pretraining"])
    logits = model(normal(0, 2, 3, 224, 224))
    assert near(logits.detach(), torch.tensor(case["logits"]), 2e-5)
    loss = F.cross_entropy(logits, torch.tensor([0, 1]))
    assert float(loss.detach()) == pytest.approx(case["cross_entropy_labels_0_1"], abs=1e-5)
    loss.backward()
    assert model.pos_embed.requires_grad == case["pos_embed_requires_grad"]
    for name, expected in case["grad_norm"].items():
        assert float(model.get_parameter(name).grad.norm()) == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- the textbook

def textbook(model, images, mask_ratio, noise):
    """The autoencoder with a convolution, and every token put back in place before the decoder:
    its loss, prediction and mask (section 3)."""
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    n, length, width = x.shape
    kept = int(length * (1 - mask_ratio))
    shuffle = noise.argsort(1)
    restore = shuffle.argsort(1)
    x = x.gather(1, shuffle[:, :kept, None].repeat(1, 1, width))
    mask = torch.cat([torch.zeros(n, kept), torch.ones(n, length - kept)], 1).gather(1, restore)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).repeat(n, 1, 1), x], 1)
    x = model.norm(nn.Sequential(*model.blocks)(x))

    y = model.decoder_embed(x)
    tokens = torch.cat([y[:, 1:], model.mask_token.repeat(n, length - kept, 1)], 1)
    tokens = tokens.gather(1, restore[..., None].repeat(1, 1, y.shape[-1]))
    y = torch.cat([y[:, :1], tokens], 1) + model.decoder_pos_embed
    pred = model.decoder_pred(model.decoder_norm(nn.Sequential(*model.decoder_blocks)(y)))[:, 1:]

    side = images.shape[-1] // 16
    target = torch.einsum("nchpwq->nhwpqc", images.view(n, 3, side, 16, side, 16)).reshape(
        n, length, 768)
    if model.norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (
            target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (pred - target).square().mean(-1)
    return (errors * mask).sum() / mask.sum(), pred, mask


def small(**more):
    """A small autoencoder whose every weight matters, 3 images of 64 pixels and their noise."""
    model = filled(mae.MAE(32, 2, 2, input_size=64, decoder_depth=2, decoder_embed_dim=48, **more))
    return model, normal(3, 3, 3, 64, 64), uniform(4, 3, 16)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("mask_ratio", [.75, .4])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_training_and_evaluation_are_the_textbook(norm_pix_loss, mask_ratio, dtype, tolerance):
    model, images, noise = small(norm_pix_loss=norm_pix_loss)
    model, images, grads = model.to(dtype), images.to(dtype), []
    for training in (None, False, True):
        model.zero_grad()
        if training is None:
            expected, pred, mask = textbook(model, images, mask_ratio, noise)
            loss = expected
        else:
            loss, own, hidden = model.train(training)(images, mask_ratio, noise)
            assert abs(loss - expected) <= tolerance * expected and torch.equal(hidden, mask)
            assert own is None if training else near(own, pred, tolerance)
        loss.backward()
        grads.append({name: part.grad for name, part in model.named_parameters()
                      if part.requires_grad})
    largest = max(float(grad.abs().max()) for grad in grads[0].values())
    for name, expected in grads[0].items():
        assert expected.any(), name
        for own in grads[1:]:
            assert (own[name] - expected).abs().max() <= tolerance * largest, name


def test_a_small_decoder_of_112_pixels_is_the_textbook():
    model = filled(mae.create_mae("mae_vit_tiny_patch16", input_size=112, decoder_depth=1,
                                  decoder_embed_dim=64))
    assert torch.equal(model.pos_embed.detach(), mae.sincos_positions(192, 7))
    assert torch.equal(model.decoder_pos_embed.detach(), mae.sincos_positions(64, 7))
    images, noise = normal(0, 2, 3, 112, 112), uniform(1, 2, 49)
    with torch.no_grad():
        expected, pred, mask = textbook(model, images, .75, noise)
        loss, own, hidden = model(images, .75, noise)
        trained = model.train()(images, .75, noise)[0]
    assert near(own, pred) and torch.equal(hidden, mask) and mask.sum() == 2 * 37
    assert near(loss, expected) and near(trained, expected)


def test_hidden_pixels_reach_no_latent_and_visible_ones_no_loss():
    model, images, noise = small()
    order, n_kept, mask = masking.draw_order(noise, .75)
    hidden = masking.unpatchify(mask[..., None].repeat(1, 1, 768), 16).bool()
    other = torch.where(hidden, normal(9, *images.shape), images)
    with torch.no_grad():
        a, b = (model.encode(masking.patchify(x, 16), order[:, :n_kept]) for x in (images, other))
        assert torch.equal(a, b)
        _, pred, _ = model(images, .75, noise)
        # of a perfect prediction of what is hidden
        patches = masking.patchify(images, 16)
        by_hand = (pred - patches).square().mean(-1)[mask.bool()].mean()
        assert near(model(images, .75, noise)[0], by_hand)


def test_masks_are_drawn_where_none_is_given():
    model, images, _ = small()
    torch.manual_seed(0)
    with torch.no_grad():
        masks = [model(images)[2] for _ in range(2)]
    assert all((mask == 0).sum(1).tolist() == [4, 4, 4] for mask in masks)
    assert not torch.equal(*masks)


def test_bfloat16_is_near():
    model, images, noise = small(norm_pix_loss=True)
    model.train()
    with torch.no_grad():
        plain = model(images, .75, noise)[0]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images, .75, noise)[0]
            said = model.eval()(images, .75, noise)[1]
    assert rounded.dtype == torch.float32 and near(rounded, plain, 1e-2)
    assert said.dtype == torch.bfloat16 and said.isfinite().all()


@pytest.mark.skipif(mae._OneDNN.product is None, reason="a torch without oneDNN")
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("expanded", [False, True])
def test_products_by_onednn_have_the_gradients_of_linear(since, expanded):
    """Of tokens in part, and of gradients that one number stands for."""
    weight, bias, tokens = normal(0, 5, 16), normal(1, 5), normal(2, 3, 7, 16)
    out = normal(3, 3, 7 - since, 5)
    found = []
    for product in (mae._OneDNN.apply, F.linear):
        parts = [part.clone().requires_grad_() for part in (tokens, weight, bias)]
        said = product(parts[0][:, since:], *parts[1:])
        (said.sum() if expanded else (said * out).sum()).backward()
        found.append([said.detach(), *(part.grad for part in parts)])
    for own, expected in zip(*found):
        assert near(own, expected, 1e-6) and expected.any()


def test_products_by_onednn_are_for_training_in_float32(monkeypatch):
    tokens = normal(0, 3, 8)
    assert mae._OneDNN.takes(tokens) == (mae._OneDNN.product is not None)
    monkeypatch.setattr(mae._OneDNN, "product", F.linear)
    assert mae._OneDNN.takes(tokens) and not mae._OneDNN.takes(tokens.double())
    with torch.no_grad():
        assert not mae._OneDNN.takes(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mae._OneDNN.takes(tokens)
    monkeypatch.setattr(mae._OneDNN, "product", None)
    assert not mae._OneDNN.takes(tokens)


@pytest.mark.parametrize("side, across", [(16, 14), (32, 7)])
def test_patches_hold_their_pixels(side, across):
    images = normal(0, 2, 3, 224, 224)
    patches = masking.patchify(images, side)
    assert torch.equal(patches[1, across + 2].view(side, side, 3),
                       images[1, :, side:2 * side, 2 * side:3 * side].permute(1, 2, 0))
    assert torch.equal(masking.unpatchify(patches, side), images)


# ---------------------------------------------------------------- other names, timm's network

def test_timm_has_the_same_classifier():
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool="avg")
    ours = filled(mae.create_vit("vit_tiny_patch16", 7))
    theirs.load_state_dict(ours.state_dict())
    images = normal(1, 1, 3, 224, 224)
    with torch.no_grad():
        assert near(ours(images), theirs.eval()(images), 2e-5)
        assert near(ours.embed(images), theirs.forward_head(theirs.forward_features(images),
                                                            pre_logits=True), 2e-5)


@pytest.mark.parametrize("name, width, encoder, whole", [  # millions, of the public table
    ("vit_base_patch16", 768, 85.80, 111.91), ("vit_small_patch16", 384, 21.67, 47.58),
    ("vit_tiny_patch16", 192, 5.52, 31.34)])
def test_numbers_of_parameters(name, width, encoder, whole):
    with torch.device("meta"):
        before, after = mae.create_mae(f"mae_{name}"), mae.create_vit(name, 7)
        same = mae.create_vit(f"mae_{name}", 7)
    assert count(before) / 1e6 == pytest.approx(whole, abs=.005)
    assert (count(after) - 8 * 7 - 7 * (width - 8)) / 1e6 == pytest.approx(encoder, abs=.01)
    assert {key: part.shape for key, part in same.state_dict().items()} == {
        key: part.shape for key, part in after.state_dict().items()}


def test_a_new_network():
    torch.manual_seed(0)
    model = mae.create_mae("mae_vit_tiny_patch16", decoder_depth=1)
    for name, part in model.state_dict().items():
        if name == "patch_embed.proj.bias":
            assert part.abs().max() <= 768 ** -.5  # a convolution's own, as published
        elif name.endswith("bias"):
            assert not part.any(), name
        elif name in ("cls_token", "mask_token"):
            assert float(part.std()) == pytest.approx(.02, rel=.2)
        elif part.ndim == 1:
            assert (part == 1).all(), name
        elif not name.endswith("pos_embed"):
            into, out = part[0].numel(), len(part)
            assert float(part.abs().max()) <= (6 / (into + out)) ** .5 + 1e-7, name
            assert float(part.std()) == pytest.approx((2 / (into + out)) ** .5, rel=.05), name
    model = mae.create_vit("vit_tiny_patch16", 40, drop_path=.3, input_size=32)
    rates = [getattr(block.drop_path1, "drop_prob", 0) for block in model.blocks]
    assert rates == pytest.approx(np.linspace(0, .3, 12))
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=.1)
    assert not model.head.bias.any()


def test_names_and_sides_that_are_not_are_refused():
    for create in (mae.create_mae, lambda name: mae.create_vit(name, 7)):
        with pytest.raises(ValueError, match=r"'vit_huge'.*choose from vit_tiny_patch16, "):
            create("vit_huge")
    for create in (lambda **size: mae.create_mae("mae_vit_tiny_patch16", **size),
                   lambda **size: mae.create_vit("vit_tiny_patch16", 7, **size)):
        with pytest.raises(ValueError, match="images of 100 pixels: a side is a multiple of 16"):
            create(input_size=100)


@pytest.mark.parametrize("sides", [(32, 32), (64, 32), (128, 128), (100, 100)])
def test_images_of_another_size_than_the_positions_are_refused(sides):
    images = torch.zeros(2, 3, *sides)
    for network in (mae.create_mae("mae_vit_tiny_patch16", input_size=64, decoder_depth=1),
                    mae.create_vit("vit_tiny_patch16", 7, input_size=64)):
        with pytest.raises(ValueError, match=f"images of {sides[0]} x {sides[1]}: .* 64 x 64"):
            network(images)
