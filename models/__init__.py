"""Dual-view encoders and linear heads by name."""

from functools import partial

import torch

from models.alexnet import alexnet
from models.dual import DualView
from models.files import load_public
from models.LinearModel import POOLS, LinearClassifier
from models.resnet import resnet18, resnet50, resnet101

__all__ = ["MODEL_NAMES", "create_classifier", "create_model", "default_layer", "load_public",
           "n_layers"]

FACTORIES = {
    "alexnet": alexnet,
    "resnet18v1": partial(resnet18, width=0.5),
    "resnet18v2": partial(resnet18, width=1),
    "resnet18v3": partial(resnet18, width=2),
    "resnet50v1": partial(resnet50, width=0.5),
    "resnet50v2": partial(resnet50, width=1),
    "resnet50v3": partial(resnet50, width=2),
    "resnet101v1": partial(resnet101, width=0.5),
    "resnet101v2": partial(resnet101, width=1),
    "resnet101v3": partial(resnet101, width=2),
    "resnets18": partial(resnet18, width=0.5),
    "resnets50": partial(resnet50, width=0.5),
    "resnets101": partial(resnet101, width=0.5),
}
MODEL_NAMES = tuple(FACTORIES)


def _family(name):
    """Encoder family of a model, a key of POOLS."""
    if name not in FACTORIES:
        raise ValueError(f"model {name!r}: choose from {', '.join(MODEL_NAMES)}")
    return "alexnet" if name == "alexnet" else "resnet"


def n_layers(name: str) -> int:
    """Number of taps a linear head accepts: 5 for AlexNet, 6 for ResNet."""
    return len(POOLS[_family(name)][1])


def default_layer(name: str) -> int:
    """The tap that is probed unless told otherwise: the last one a head accepts."""
    return n_layers(name)


def create_model(name: str, feat_dim: int = 128, in_channels: tuple = (3, 1),
                 size: int = 224) -> DualView:
    """Dual-view encoder, `[B, C1+C2, size, size]` → two unit vectors `[B, feat_dim]`.

    Raises ValueError for a name not in MODEL_NAMES, and a size too small for it.
    """
    _family(name)
    return FACTORIES[name](feat_dim=feat_dim, in_channels=in_channels, size=size)


def create_classifier(model_name: str, layer: int, n_label: int, in_channels: tuple = (3, 1),
                      encoder: str = "both", size: int = 224) -> LinearClassifier:
    """Linear head on tap `layer` of the views "both", "rgb" or "depth", of crops of `size` pixels.

    Raises ValueError for an unknown model name or encoder, and for a layer without a head.
    """
    if not 1 <= layer <= n_layers(model_name):
        raise ValueError(f"layer {layer}: a head on {model_name} takes the layers 1 to "
                         f"{n_layers(model_name)}")
    # on the meta device a model costs milliseconds, no memory and no random numbers
    with torch.device("meta"):
        model = create_model(model_name, in_channels=in_channels, size=size)
    shape = model.rgb_to_d.shapes[layer - 1]
    return LinearClassifier(_family(model_name), layer, shape, n_label, encoder)
