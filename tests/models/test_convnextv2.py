"""ConvNeXt V2 and FCMAE: the numbers of the public code, a plain masked network, public files."""
import numpy as np
import pytest
import timm
import torch
from parity import count, filled, fixtures, near, normal
from timm.models.convnext import checkpoint_filter_fn
from torch.nn import functional as F

from models import convnextv2, files
from models.masking import draw_order, patchify, pixel_targets, take

SMALL = (1, 1, 2, 1), (8, 16, 24, 32)


@pytest.fixture(scope="module")
def fcmae():
    return fixtures("fcmae")


# ---------------------------------------------------------------- the public code

def test_fcmae_is_that_of_the_public_code(fcmae):
    (case,) = fcmae["cases"]
    model = filled(convnextv2.create_fcmae(case["model"]))
    assert count(model) == case["n_parameters"] and count(model.encoder) == case["n_encoder"]
    assert len(model.state_dict()) == case["n_keys"]
    images, noise = normal(0, 2, 3, 224, 224), torch.tensor(np.random.RandomState(2).rand(2, 49))
    with torch.no_grad():
        _, pred, mask = model(images, case["mask_ratio"], noise)
        alone = model(images[:1], case["mask_ratio"], noise[:1])[1]
    assert ["".join(str(int(cell)) for cell in row) for row in mask] == case["mask_rows"]
    assert list(pred.shape) == case["pred_shape"] and mask.sum() == case["mask_sum"]
    first, last = (torch.tensor(case[f"pred_{end}"]["v"]) for end in ("first", "last"))
    assert (pred[0, 0, :6] - first).abs().max() < 1e-4
    assert (pred[-1, -1, -6:] - last).abs().max() < 1e-4
    assert float(pred.abs().mean()) == pytest.approx(case["pred_abs_mean"], abs=1e-5)
    assert (alone - pred[:1]).abs().max() < 1e-5

    kept = (mask == 0).nonzero()[:, 1].view(2, -1)
    seen = case["first_visible_cell_of_sample_0"]
    other = torch.where(_pixels(mask), 10 * normal(1, *images.shape), images)
    with torch.no_grad():
        tokens, changed = (model.encoder.tokens(x, kept) for x in (images, other))
        dense = model.encoder.tokens(images)
    assert kept[0, 0] == seen["cell"]
    assert (tokens[0, 0, :6] - torch.tensor(seen["features_first6"])).abs().max() < 1e-4
    assert torch.equal(tokens, changed)  # nothing of a hidden cell is seen
    assert not near(tokens, take(dense, kept), 1e-2)


@pytest.mark.parametrize("name", ["norm_pix_loss", "raw_pixels"])
def test_losses_and_gradients_are_those_of_the_public_code(fcmae, name):
    (case,) = fcmae["cases"]
    model = filled(convnextv2.create_fcmae(case["model"], name == "norm_pix_loss")).train()
    noise = torch.tensor(np.random.RandomState(2).rand(2, 49))
    loss, pred, _ = model(normal(0, 2, 3, 224, 224), case["mask_ratio"], noise)
    loss.backward()
    assert pred is None and float(loss.detach()) == pytest.approx(case[name]["loss"], abs=1e-5)
    norms = {key: float(value.grad.norm()) for key, value in model.named_parameters()}
    for key, expected in case[name]["grad_norm"].items():
        assert norms[key] == pytest.approx(expected, rel=1e-3), key


def test_logits_are_those_of_the_public_code(fcmae):
    (case,) = fcmae["finetune"]
    model = filled(convnextv2.create_convnextv2(case["model"], case["num_classes"]))
    assert count(model) == case["n_parameters"] and len(model.state_dict()) == case["n_keys"]
    images = normal(0, 2, 3, 224, 224)
    with torch.no_grad():
        logits = model(images)
        maps, features = model.maps(images), model.embed(images)
    assert near(logits, torch.tensor(case["logits"]), 2e-5)
    assert maps.shape == (2, 320, 7, 7) and torch.equal(model.classify(maps), logits)
    assert features.shape == (2, 320) and torch.equal(model.head(features), logits)


# ---------------------------------------------------------------- every position, and a mask

def _pixels(mask, height=7, width=7, side=32):
    """Cells `[N, L]` → which of the pixels are hidden `[N, 1, H, W]`."""
    mask = mask.view(-1, 1, height, width).bool()
    return mask.repeat_interleave(side, 2).repeat_interleave(side, 3)


def _norm(layer, x):
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _block(block, x, seen):
    y = block.dwconv(x * seen) * seen
    y = F.gelu(block.pwconv1(block.norm(y.permute(0, 2, 3, 1))))
    response = (y * seen.permute(0, 2, 3, 1)).norm(dim=(1, 2), keepdim=True)
    response = response / (response.mean(-1, keepdim=True) + 1e-6)
    y = block.pwconv2(block.grn.gamma * (y * response) + block.grn.beta + y)
    return (x + y.permute(0, 3, 1, 2)) * seen


def reference(model, images, mask_ratio, noise):
    """FCMAE that computes every position and multiplies by the mask (section 3.1): its loss,
    prediction, and maps of the encoder."""
    height, width = (length // 32 for length in images.shape[-2:])
    mask = draw_order(noise, mask_ratio)[2].to(images)
    x, encoder = images, model.encoder
    for i, (down, stage) in enumerate(zip(encoder.downsample_layers, encoder.stages)):
        seen = (~_pixels(mask, height, width, 8 >> i)).to(images)
        x = _norm(down[1], down[0](x)) if i == 0 else down[1](_norm(down[0], x))
        x = x * seen
        for block in stage:
            x = _block(block, x, seen)
    maps = x
    x = model.proj(x) * seen + model.mask_token * (1 - seen)
    for block in model.decoder:
        x = _block(block, x, torch.ones_like(seen))
    pred = model.pred(x).flatten(2).transpose(1, 2)
    errors = (pred - pixel_targets(patchify(images, 32), model.norm_pix_loss)).square().mean(-1)
    return (errors * mask).sum() / mask.sum(), pred, maps


@pytest.fixture
def small():
    """A small FCMAE whose every weight matters, 3 images of 96 x 64 pixels and their noise."""
    return (filled(convnextv2.FCMAE(*SMALL, width=40)), normal(3, 3, 3, 96, 64),
            torch.rand(3, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_fcmae_is_a_plain_masked_network(small, norm_pix_loss):
    model, images, noise = small
    model.norm_pix_loss, grads = norm_pix_loss, []
    for training in (None, False, True):
        model.zero_grad()
        if training is None:
            loss, pred, _ = reference(model, images, .5, noise)
            expected = loss
        else:
            loss, own, mask = model.train(training)(images, .5, noise)
            assert near(loss, expected) and mask.sum() == 9
            assert own is None if training else near(own, pred)
        loss.backward()
        grads.append({key: value.grad for key, value in model.named_parameters()})
    for key, value in grads[0].items():
        assert all(near(own[key], value, 3e-5) for own in grads[1:]), key


def test_two_blocks_in_the_decoder(small):
    _, images, noise = small
    model = filled(convnextv2.FCMAE(*SMALL, width=40, depth=2))
    with torch.no_grad():
        loss, pred, _ = reference(model, images, .5, noise)
        assert near(model(images, .5, noise)[1], pred)
        assert near(model.train()(images, .5, noise)[0], loss)


@pytest.mark.filterwarnings("ignore:var_mean")  # of no patch
def test_with_nothing_hidden_it_is_the_whole_encoder(small):
    model, images, noise = small
    order = noise.argsort(dim=1)
    with torch.no_grad():
        dense = model.encoder.tokens(images)
        assert near(model.encoder.tokens(images, order), take(dense, order))
        assert near(reference(model, images, 0, noise)[2].flatten(2).transpose(1, 2), dense)
        loss, pred, mask = model(images, 0, noise)
    assert loss == 0 and pred.shape == (3, 6, 3072) and not mask.any()


def test_an_image_alone_gives_what_it_gives_in_a_batch(small):
    model, images, noise = small
    with torch.no_grad():
        whole = model(images, .5, noise)[1]
        alone = [model(images[i:i + 1], .5, noise[i:i + 1])[1] for i in range(3)]
    assert near(torch.cat(alone), whole, 1e-6)


def test_sides_are_those_of_the_images(small):
    model = small[0]
    with torch.no_grad():
        loss, pred, mask = model(torch.rand(2, 3, 96, 128))  # its own noise
        assert pred.shape == (2, 12, 3072) and (mask == 0).sum(1).tolist() == [4, 4]
        assert loss.isfinite()
        # 112 is no multiple of 32: a classifier takes it, cells do not
        network = filled(convnextv2.ConvNeXtV2(5, *SMALL))
        assert network.maps(torch.rand(1, 3, 112, 112)).shape == (1, 32, 3, 3)
    with pytest.raises(ValueError, match="112 x 112"):
        model(torch.rand(1, 3, 112, 112))


def test_bfloat16_is_near(small):
    model, images, noise = small
    model.train()
    grads = []
    for on in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = model(images, .5, noise)[0]
        loss.backward()
        assert loss.dtype == torch.float32
        grads.append((loss.detach(), {k: v.grad for k, v in model.named_parameters()}))
    (loss, plain), (rounded, low) = grads
    assert near(rounded, loss, 1e-2)
    assert all(low[k].dtype == torch.float32 for k in low)
    assert all(F.cosine_similarity(low[k].flatten(), plain[k].flatten(), 0) > .98 for k in plain)


def test_double_precision_agrees_to_its_last_digits(small):
    model, images, noise = (part.double() for part in small)
    loss = reference(model, images, .5, noise)[0]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    own = model.train()(images, .5, noise)[0]
    assert own.dtype == torch.float64 and near(own, loss, 1e-12)
    actual = torch.autograd.grad(own, list(model.parameters()))
    assert all(near(a, b, 1e-10) for a, b in zip(actual, expected))


# ---------------------------------------------------------------- public checkpoints

def minkowski(conv):
    """What a sparse file stores of a convolution: how the output answers to a point at each offset,
    of which the row's runs fastest."""
    _, into, side, _ = conv.weight.shape
    taps = []
    with torch.no_grad():
        for number in range(side * side):
            points = torch.zeros(into, conv.in_channels, side, side)
            for channel in range(into):
                points[channel, channel, number % side, number // side] = 1
            if conv.groups > 1:
                points[:] = points[:, :1]
            answer = F.conv2d(points, conv.weight, groups=conv.groups)  # [into, out, 1, 1]
            taps.append(answer.flatten(1))
    taps = torch.stack(taps)  # [k·k, into, out]
    return taps[:, 0] if conv.groups > 1 else taps


def sparse_file(model):
    """The state of an FCMAE as the official sparse code names and shapes it."""
    state = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "encoder":
            part, name = model.get_submodule(".".join(parts[:-1])), parts[-1]
            stem = parts[1:3] == ["downsample_layers", "0"]
            if isinstance(part, torch.nn.Conv2d) and not stem:
                parts[-1] = "kernel" if name == "weight" else name
                value = minkowski(part) if name == "weight" else value[None]
            elif isinstance(part, torch.nn.LayerNorm) and not stem:
                parts.insert(-1, "ln")
            elif isinstance(part, torch.nn.Linear):
                parts.insert(-1, "linear")
            elif name in ("gamma", "beta"):
                value = value.view(1, -1)
        state[".".join(parts)] = value
    return state


def same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_sparse_files_are_read(small):
    model = small[0]
    state = sparse_file(model)
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    assert state["encoder.downsample_layers.1.1.kernel"].shape == (4, 8, 16)
    assert state["encoder.stages.0.0.dwconv.bias"].shape == (1, 8)
    assert {"encoder.stages.0.0.norm.ln.weight", "encoder.stages.0.0.pwconv1.linear.bias",
            "encoder.downsample_layers.0.0.weight"} <= state.keys()
    expected = {key.removeprefix("encoder."): value for key, value in model.state_dict().items()}
    same(files.canonical_convnextv2(state), expected)


def test_dense_files_are_read():
    expected = filled(convnextv2.ConvNeXtV2(5, *SMALL)).state_dict()
    same(files.canonical_convnextv2(dict(expected)), expected)


def test_timm_has_the_same_network():
    theirs = timm.create_model("convnextv2_atto", num_classes=7).eval()
    filled(theirs)
    ours = convnextv2.create_convnextv2("convnextv2_atto", 7).eval()
    ours.load_state_dict(files.canonical_convnextv2(theirs.state_dict()))
    images = normal(4, 2, 3, 96, 80)
    with torch.no_grad():
        assert near(ours(images), theirs(images), 2e-5)
        assert near(ours.maps(images), theirs.forward_features(images), 2e-5)


def test_timm_loads_a_pretrained_encoder():
    encoder = filled(convnextv2.create_fcmae("convnextv2_atto")).encoder
    theirs = timm.create_model("convnextv2_atto", num_classes=0).eval()
    state = checkpoint_filter_fn(encoder.state_dict(), theirs)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == [] and set(missing) == {"head.norm.weight", "head.norm.bias"}
    images = normal(5, 1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(images).flatten(2).transpose(1, 2)
        assert near(encoder.tokens(images), expected, 2e-5)


# ---------------------------------------------------------------- sizes

@pytest.mark.parametrize("name, millions", [  # with 1000 classes, table 7 of the paper
    ("atto", 3.7), ("femto", 5.2), ("pico", 9.1), ("nano", 15.6), ("tiny", 28.6), ("base", 89),
    ("large", 198), ("huge", 660)])
def test_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        model = convnextv2.create_convnextv2(f"convnextv2_{name}", 1000, .1)
    assert count(model) / 1e6 == pytest.approx(millions, rel=1e-2)


def test_a_new_network():
    model = convnextv2.create_convnextv2("convnextv2_pico", 4, drop_path=.3)
    rates = [getattr(block.drop_path, "drop_prob", 0) for stage in model.stages for block in stage]
    assert rates == pytest.approx(np.linspace(0, .3, 12))
    assert float(model.head.weight.detach().std()) == pytest.approx(2e-5, rel=.2)
    assert float(model.stages[2][0].pwconv1.weight.detach().std()) == pytest.approx(.02, rel=.05)
    zero = [value for key, value in model.named_parameters()
            if key.endswith(("bias", "gamma", "beta"))]
    assert not any(value.any() for value in zero)
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        model.head.weight.normal_()
        assert not torch.equal(model.train()(images), model(images))  # blocks are left out
        assert torch.equal(model.eval()(images), model(images))


def test_names_that_are_not_are_refused():
    for create in (lambda name: convnextv2.create_convnextv2(name, 7), convnextv2.create_fcmae):
        with pytest.raises(ValueError, match=r"choose from convnextv2_atto, .*convnextv2_huge"):
            create("convnextv2_small")
