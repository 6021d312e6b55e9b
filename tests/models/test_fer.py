"""The face networks, their losses and regions against published numbers and by hand."""
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PARITY

from images import regions
from models.ran import RAN
from models.scn import SCN, Baseline
from training import losses, supervised

FIXTURES = PARITY / "fer.json"
pytestmark = pytest.mark.usefixtures("full_width")


@pytest.fixture(scope="module")
def fer():
    if not FIXTURES.exists():
        pytest.skip("no parity fixtures here")
    return json.loads(FIXTURES.read_text())


def filled(model, scale):
    """The model with the weights that the fixture's formula gives, in float64."""
    state = model.state_dict()
    for key, value in state.items():
        drawn = np.random.RandomState(zlib.crc32(key.encode()) & 0xffffffff) \
            .standard_normal(size=tuple(value.shape))
        if key.endswith("num_batches_tracked"):
            drawn = np.zeros(())
        elif key.endswith("running_var"):
            drawn = abs(drawn) * .2 + .8
        elif key.endswith(("running_mean", ".bias")):
            drawn = .1 * drawn
        elif drawn.ndim == 1:
            drawn = 1 + .1 * drawn
        else:
            drawn = drawn * np.sqrt(2 / np.prod(drawn.shape[1:]))
        state[key] = torch.from_numpy(np.asarray(drawn * scale.get(key, 1)))
    model.double().load_state_dict(state)
    return model


def images(case):
    given = case["input"]
    return torch.from_numpy(np.random.RandomState(given["seed"]).normal(size=given["shape"]))


def close(actual, expected, tolerance=2e-5):
    actual = np.asarray(torch.as_tensor(actual).detach(), dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert abs(actual - expected).max() <= tolerance * max(1e-12, abs(expected).max())


def gradients(model, expected):
    norms = {name: part.grad.norm() for name, part in model.named_parameters()
             if part.grad is not None}
    norms["total"] = torch.stack(list(norms.values())).norm()
    for name, norm in expected.items():
        # exactly 0 where nothing flows
        assert abs(float(norms[name]) - norm) <= 3e-4 * norm + 1e-9, name


def test_names_and_counts_of_tensors(fer):
    for kind, model in (("baseline", Baseline(7)), ("scn", SCN(7)), ("ran", RAN(7))):
        assert len(model.state_dict()) == fer["state_dict_keys"][kind]
        assert {"features.0.weight", "features.1.running_mean", "features.4.0.conv1.weight",
                "features.7.1.bn2.bias", "fc.weight"} <= set(model.state_dict())
    assert {"alpha.0.weight", "beta.0.bias"} <= set(RAN(7).state_dict())


@pytest.mark.parametrize("number", range(3))
def test_scn(fer, number):
    case = fer["scn"][number]
    model = filled(SCN(case["num_classes"]), case["weight_scale"])
    model.train(case["mode"] == "train")
    batch, labels = images(case), torch.tensor(case["labels"])
    kept = model.state_dict()
    kept = {name: value.clone() for name, value in kept.items()}
    close(model.pool(model.maps(batch)).abs().sum(1), case["feature_abs_sum"])
    model.load_state_dict(kept)
    logits, importance = model(batch)
    close(importance[:, 0], case["alpha"])
    close(logits, case["logits"])
    close((logits / importance), case["baseline_logits"])
    rank = losses.rank_regularisation(importance, case["margin"], case["beta"])
    crossentropy = losses.classification_loss(logits.double(), labels).mean()
    close(rank, case["rr"])
    close(crossentropy, case["ce"])
    assert losses.n_certain(len(batch), case["beta"]) == case["high_group"]
    (F.cross_entropy(logits, labels) + rank).backward()
    gradients(model, case["gradient_norms"])
    for name, total in case.get("after_step_abs_sum", {}).items():
        close(model.state_dict()[name].abs().sum(), total)


def test_baseline_is_scn_without_its_weights(fer):
    case = fer["scn"][0]
    model = filled(Baseline(7), case["weight_scale"]).eval()
    close(model(images(case)), case["baseline_logits"])


@pytest.mark.parametrize("number, joint", [(0, None), (1, None), (2, "bn_per_view"),
                                           (2, "bn_joint")])
def test_ran(fer, number, joint):
    case = fer["ran"][number]
    model = filled(RAN(case["num_classes"], bn_per_view=joint == "bn_per_view"),
                   case["weight_scale"])
    model.train(case["mode"] == "train")
    expected = case if joint is None else case[joint]
    views, labels = images(case), torch.tensor(case["labels"])
    features = model.pool(model.maps(views))
    both, own, relation = model.attend(features)
    close(model.alpha(features)[..., 0], expected["self_attention_sigmoid"])
    close(own, expected["mu"])
    close(relation, expected["nu"])
    close(both.norm(dim=1), expected["feature_norm"])
    close(both[:, :8], expected["feature_first8"], 1e-4)
    close(both[:, -8:], expected["feature_last8"], 1e-4)
    logits = model.fc(both)
    close(logits, expected["logits"])
    region = losses.region_loss(own, case["margin"])
    close(region, expected["rb"])
    crossentropy = F.cross_entropy(logits, labels)
    close(crossentropy, expected["ce"])
    (crossentropy + region).backward()
    gradients(model, expected.get("gradient_norms", {}))


def test_ran_gives_what_its_parts_give(fer):
    model = filled(RAN(7), {}).eval()
    views = images(fer["ran"][0])
    both, own, _ = model.attend(model.pool(model.maps(views)))
    logits, importance = model(views)
    assert torch.equal(logits, model.fc(both)) and torch.equal(importance, own)


def test_rank_regularisation(fer):
    for case in fer["rank_regularisation"]:
        alpha = torch.tensor(case["alpha"], dtype=torch.float64, requires_grad=True)
        loss = losses.rank_regularisation(alpha, case["margin"], case["beta"])
        close(loss, case["rr"], 1e-6)
        loss.backward()
        if len(set(case["alpha"])) > 1:  # of equal ones anybody may be in either group
            close(alpha.grad, case["gradient"], 1e-6)
    one = torch.tensor([0.3], requires_grad=True)
    assert losses.rank_regularisation(one, 0.1) == 0


def test_relabel(fer):
    for case in fer["relabel"]:
        given = torch.tensor(case["probabilities"]), torch.tensor(case["labels"])
        assert losses.relabel(*given, case["margin"]).tolist() == case["new_labels_all"]
        if case["alpha"]:
            assert losses.relabel(*given, case["margin"], torch.tensor(case["alpha"]),
                                  case["beta"]).tolist() == case["new_labels_low_group_only"]


def test_wasserstein(fer):
    given = fer["wasserstein"]
    for name, centre in given["centres_valence_arousal"].items():
        assert losses.CENTRES[name] == tuple(centre)
    order = given["orders"]["rafdb"]
    close(losses.emotion_distance(order), given["rafdb"]["l1_rows"], 1e-6)
    close(losses.emotion_distance(order, "frobenius"), given["rafdb"]["frobenius"], 1e-6)
    for case in given["cases"]:
        labels = torch.tensor(case["labels"])
        for norm, name in (("l1", "l1_rows"), ("frobenius", "frobenius")):
            logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
            distance = losses.emotion_distance(given["orders"][case["order"]], norm)
            expected = case[name]
            total = losses.wasserstein(logits, labels, distance)
            close(total, expected["w_sum"], 1e-6)
            close(losses.wasserstein(logits, labels, distance, "mean"), expected["w_mean"], 1e-6)
            loss = F.cross_entropy(logits, labels) + case["alpha"] * total
            close(loss, expected["loss_sum"], 1e-6)
            loss.backward()
            close(logits.grad.norm(), expected["gradient_norm_loss_sum"], 1e-6)
            close(logits.grad[0], expected["gradient_row0_loss_sum"], 1e-6)


def test_distances_are_updated_the_right_way_round():
    distance = losses.normalised(torch.ones(3, 3) - torch.eye(3), "l1")
    confusion = np.array([[5, 3, 1], [0, 7, 0], [2, 2, 4]])
    new = losses.updated(distance, confusion)
    # row 0: (0, .5 + .1 * 3/4, .5 + .1 * 1/4) / 1.1; row 1 has no mistake
    torch.testing.assert_close(new[0], torch.tensor([0, .575, .525], dtype=new.dtype) / 1.1)
    torch.testing.assert_close(new[1], distance[1].to(new.dtype))
    assert new[0, 1] > new[0, 2] and new.diagonal().eq(0).all()
    assert losses.updated(distance, confusion, "frobenius").norm() == pytest.approx(1)


def test_region_margin_has_a_limit(fer):
    for views, limit in ((6, .223), (8, .177), (9, .160)):
        assert losses.region_limit(views) == pytest.approx(limit, abs=5e-4)
        own = torch.tensor([[1.0] + [0.0] * (views - 1)]).softmax(1)
        assert losses.region_loss(own, losses.region_limit(views)) == pytest.approx(0, abs=1e-6)


def test_sampler_and_weights(fer, monkeypatch):
    case, drawn = fer["sampler"], []
    labels = np.array(case["labels"])
    counts = np.bincount(labels)
    assert counts.tolist() == case["counts"]
    close(losses.class_weights(labels, 4), case["inverse_frequency_ce_weights_n_over_C_nc"], 1e-6)
    monkeypatch.setattr(torch, "multinomial", lambda weights, *_, **__: drawn.append(weights))
    supervised.draw_order(labels, True, torch.Generator())
    close(drawn[0] / drawn[0].sum(), case["sampling_probabilities"], 1e-6)


def test_logit_adjustment_and_smoothing_by_hand():
    logits, label = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([2])
    prior = losses.log_prior(np.array([0, 0, 0, 1, 1, 2]), 3)
    torch.testing.assert_close(prior.exp(), torch.tensor([3, 2, 1.0]) / 6)
    torch.testing.assert_close(
        losses.classification_loss(logits, label, "logit_adjusted", prior),
        F.cross_entropy(logits + prior, label, reduction="none"))
    torch.testing.assert_close(
        losses.classification_loss(logits, label, smoothing=.1),
        F.cross_entropy(logits, label, reduction="none", label_smoothing=.1))


# ---------------------------------------------------------------- regions

def test_gaussian_map(fer):
    (case,) = fer["gaussian"]
    height, _ = case["height_width"]
    marked = 255 * regions.gaussian_map(torch.tensor([case["boxes_xywh"]]), height)[0, 0]
    at = [float(marked[y, x]) for x, y in case["points_xy"]]
    assert abs(np.array(at) - case["closed_form_0_255"]).max() < 1.0
    assert abs(np.array(at) - case["opencv_uint8"]).max() < 1.4
    # of whole grey levels, the table ending at 1 of them
    levels = marked[marked >= 1].floor()
    assert float(levels.sum()) == pytest.approx(case["sum_opencv"], rel=2e-3)
    assert len(levels) == pytest.approx(case["nonzero_opencv"], rel=1e-2)


def test_boxes_of_landmarks(fer):
    (case,) = fer["landmarks"]
    points, expected = np.array(case["points"]), case["right_eye_36_to_41"]
    boxes = regions.landmark_boxes(points, *case["width_height"])
    assert boxes[:8].tolist() == list(expected["nine_views_xywh"].values())[:8]
    assert boxes[8].tolist() == [0, 0, 100, 100]  # published: one pixel short
    assert regions.part_boxes(points).tolist() == expected["five_gaussian_boxes_xywh"]


def test_boxes_stay_in_the_image():
    points = np.random.default_rng(0).integers(-20, 120, (68, 2))
    boxes = regions.landmark_boxes(points, 100, 90)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= 100).all() and (boxes[:, 1] + boxes[:, 3] <= 90).all()


def test_five_points_mark_the_same_parts(fer):
    (case,) = fer["landmarks"]
    points = np.array(case["points"])
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48],
                     points[54]])
    marked = [regions.gaussian_map(torch.from_numpy(regions.part_boxes(p))[None], 100)[0, 0]
              for p in (points, five)]
    assert np.corrcoef(marked[0].flatten(), marked[1].flatten())[0, 1] > .8


def test_crops_of_ran(fer):
    for case in fer["ran_crops"]:
        for name, shares in (("affectnet8", regions.FIXED), ("paper6", regions.PAPER)):
            boxes = regions.fixed_boxes(shares, *case["width_height"])
            assert boxes.tolist() == [box for _, box in case[name]]


def test_random_crops():
    boxes = regions.random_boxes(200, 100, torch.Generator().manual_seed(0))
    sides = boxes[..., 2:] - boxes[..., :2]
    assert torch.allclose(sides[..., 0], sides[..., 1], atol=1e-3)
    assert 70 <= sides[:, :5].min() < 71 and 94 < sides[:, :5].max() <= 95
    assert boxes.min() >= 0 and boxes.max() <= 100 and (boxes[:, 5, 2:] == 100).all()


def test_a_map_of_landmarks_weighs_layer1():
    torch.manual_seed(0)
    model = Baseline(7, gaussian=True).eval()
    picture = torch.rand(2, 3, 64, 64)
    maps = [torch.cat([picture, torch.full((2, 1, 64, 64), level)], 1) for level in (0.0, 1.0)]
    assert not torch.equal(model(maps[0]), model(maps[1]))
    assert model.mask(maps[0][:, 3:]).shape == (2, 64, 16, 16)
    with torch.no_grad():  # a mask of constant .5 is a factor 1.5
        for part in (0, 3):
            model.mask[part].weight.zero_()
    plain = Baseline(7).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    inside = model.features[:5](picture) * 1.5
    torch.testing.assert_close(model.maps(maps[1]), plain.features[5:8](inside))


@pytest.mark.parametrize("kind", [SCN, RAN])
def test_importances_stay_apart_in_mixed_precision(kind):
    torch.manual_seed(0)
    model = kind(7).eval()
    maps = torch.randn(64, *(2,) * (kind is RAN), model.width, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        _, importance = model.classify(maps)
    assert importance.dtype == torch.float32 and len(importance.unique()) >= 64
