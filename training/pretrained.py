"""What a network of faces starts from: ImageNet's weights, anybody's, or those of an own run."""
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models import files
from models.scn import PARTS
from util import BadInput


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of `models.scn`, whose ever they were: torchvision's, MS1M's and
    RAN's (`conv1`, `layer1`…), with or without `module.`."""
    numbers = {name: f"features.{i}" for i, name in enumerate(PARTS)}
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    return {".".join([numbers.get(name.split(".")[0], name.split(".")[0]),
                      *name.split(".")[1:]]): value for name, value in plain.items()}


def imagenet_weights(arch: str) -> dict[str, Tensor]:
    """torchvision's weights of ImageNet; raises BadInput where they cannot be had."""
    weights = torchvision.models.get_model_weights(arch).IMAGENET1K_V1
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = (str(error) or "the file is empty").splitlines()[0]
        raise BadInput(f"--pretrained imagenet: {weights.url} cannot be had ({reason}); put it at "
                       f"{place}, or give --pretrained none to train from scratch") from None


def predicting(state: dict) -> tuple[str, dict[str, Tensor]]:
    """(what they are, the weights) that predicted the test split of a run of these scripts, of its
    checkpoint: the chosen epoch's, the average, or those of the last step."""
    if state["opt"]["select"] == "val" and state["best"]["model"]:
        return "the chosen epoch's", state["best"]["model"]
    if state["ema"] and not state.get("beside"):
        return "the average's", {name.removeprefix("module."): value
                                 for name, value in state["ema"].items()}
    return "the last step's", state["model"]


def blocks(state: Iterable[str]) -> set[str]:
    """Names of the residual blocks, such as features.4.0, in canonical names of tensors."""
    return {".".join(name.split(".")[:3]) for name in state
            if name.startswith("features.") and name.count(".") > 3}


def load_backbone(network: nn.Module, pretrained: str, arch: str, content: object = None) -> None:
    """Starts the backbone from `pretrained`: imagenet, or a file of torchvision's, MS1M's, SCN's,
    RAN's or these scripts' naming, which holds `content`. Prints what was loaded; raises BadInput
    where nothing was, or where it is another network."""
    if content is None:
        state = imagenet_weights(arch)
    else:
        state = files.load_weights(pretrained, content)
        if isinstance(content, dict) and content.get("system") == "FER":
            which, state = predicting(content)
            print(f"{pretrained}: {which} weights")
    state = canonical(state)
    ours = {name: value for name, value in network.state_dict().items()
            if name.startswith("features.")}
    found = ours.keys() & state.keys()
    wrong = [f"{name} has the shape {list(state[name].shape)}" for name in sorted(found)
             if ours[name].shape != state[name].shape]
    wrong += [f"it has {block}, too" for block in sorted(blocks(state) - blocks(ours))]
    stages = {block.rpartition(".")[0] for block in blocks(state)}  # a file may lack whole ones
    wrong += [f"it has no {block}" for block in sorted(blocks(ours) - blocks(state))
              if block.rpartition(".")[0] in stages]
    if wrong or not found:
        raise BadInput(f"--pretrained {pretrained}: "
                       + (f"none of its {len(state)} tensors belongs to a ResNet "
                          f"({next(iter(state), 'it is empty')} the first)" if not found else
                          f"not of {arch}: {wrong[0]}")
                       + "; name another file, or give --pretrained none")
    network.load_state_dict({name: state[name] for name in found}, strict=False)
    counted = {name for name in ours if not name.endswith("num_batches_tracked")}
    missing = sorted(counted - found)
    others = sorted({name.split(".")[0] for name in state.keys() - ours.keys()})
    print(f"--pretrained {pretrained}: {len(counted & found)} of {len(counted)} tensors of the "
          f"backbone loaded" + f", not {', '.join(missing[:3])}" * bool(missing)
          + f"; not taken: {', '.join(others[:6])}" * bool(others))
