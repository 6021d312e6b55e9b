"""What a frozen encoder gives of every image, under several views."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_set

import dataset
from evaluation import encoders, probing
from images import encoding, transforms
from models import create_classifier, create_model
from models.classifier import Classifier


@pytest.fixture(scope="module")
def encoder():
    """A ResNet whose batch-norm statistics differ from the initial ones."""
    torch.manual_seed(0)
    model = create_model("resnet18v1")
    model.train()(torch.randn(2, 4, 224, 224))
    return model


@pytest.mark.parametrize("views, layer, positions", [("both", 3, 16), ("rgb", 6, 1),
                                                     ("depth", 5, 49)])
def test_encoded_features_are_the_pooled_taps_of_the_plain_and_mirrored_view(
        encoder, views, layer, positions):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    head = create_classifier("resnet18v1", layer, 2, encoder=views)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 256, 256), dtype=np.uint8)
    normalization = encoding.fixed_normalization("signed", ("rgb", "depth"), (3, 1))
    classifier = Classifier(encoder, head, layer, normalization)
    actual = probing.encode(classifier, images, torch.no_grad, views=2, batch_size=2)
    assert actual.positions == positions
    x = transforms.eval_transform(torch.from_numpy(images), normalization)
    with torch.no_grad():
        for view, batch in zip(actual.features, (x, x.flip(-1))):
            assert torch.allclose(view, head.pool(*encoder(batch, layer)), atol=1e-3)
            assert torch.equal(head.pool(*encoder(batch, layer)), classifier.features(batch))
    some = probing.encode(classifier, images, torch.no_grad, members=np.array([2, 0]))
    assert torch.allclose(some.features[0], actual.features[0][[2, 0]], atol=1e-3)
    assert torch.allclose(some.embedded, actual.embedded[:, [2, 0]], atol=1e-3)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_a_random_encoder_follows_from_the_seed(tmp_path):
    draw_set(tmp_path, 2, 2)
    clips = dataset.read_clips(tmp_path)
    actual = []
    for seed in (0, 0, 1):
        opt = SimpleNamespace(model="resnet18v1", seed=seed, size=224, layer=6)
        classifier, seen = encoders.load_classifier(opt, "random", clips, None)
        assert classifier.normalization["std"] == [8 / 255] * 3 + [4 / 255]
        assert seen == (set(), True, False, None)
        actual.append(classifier.encoder.rgb_to_d.conv1.weight)
    assert torch.equal(actual[0], actual[1]) and not torch.equal(actual[0], actual[2])
