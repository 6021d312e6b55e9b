"""Files of weights, whoever wrote them: plain types and tensors only, never code."""
import argparse
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util import BadInput


def read(path: str | Path) -> object:
    """What a file holds, with weights_only: one that carries code, or any class but the option
    namespace of old checkpoints, is refused. Also .safetensors, as timm's are handed out."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint")
    if Path(path).suffix == ".safetensors":
        import safetensors.torch  # of timm's, which not every system needs
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError):
            raise BadInput(f"{path}: not a file of safetensors, or truncated") from None
    # old checkpoints pickle the option namespace; it is data, and nothing else is let in
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own message advises to switch the check off; it is not passed on
            if "GLOBAL" in str(error):
                raise BadInput(f"{path}: refused: it carries code or classes, which are never run; "
                               f"save plain types and tensors only") from None
            raise BadInput(f"{path}: not a checkpoint of torch; name a .pth or .safetensors") \
                from None
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError,
                AttributeError):
            raise BadInput(f"{path}: not a checkpoint, or truncated; name a whole .pth") from None
    if content is None:
        raise BadInput(f"{path}: holds nothing; name another checkpoint")
    return content


def check(path, state):
    """Raises BadInput unless the parts that are read have the types they are read as."""
    def fits(name, *kinds):
        return state.get(name) is None or isinstance(state[name], kinds)

    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise BadInput(f"{path}: not a checkpoint of this method: it holds no 'model'")
    if not all(isinstance(name, str) and torch.is_tensor(value)
               for name, value in state["model"].items()):
        raise BadInput(f"{path}: not a checkpoint of this method: its 'model' is no state_dict")
    if not all(value.isfinite().all() for value in state["model"].values()):
        raise BadInput(f"{path}: holds weights that are not finite; take an earlier checkpoint")
    if not (fits("opt", dict, argparse.Namespace) and fits("encoding", dict)
            and fits("normalization", dict) and fits("seen", dict)):
        raise BadInput(f"{path}: not a checkpoint of this method: 'opt', 'encoding', "
                       f"'normalization' and 'seen' must be tables")


def load_weights(path: str | Path, state: object = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that anybody wrote: its `model`, `state_dict`, or the file
    itself; state: what `read` gave of it. Raises BadInput."""
    state = read(path) if state is None else state
    for name in ("model", "state_dict", "model_state_dict"):
        state = state.get(name, state) if isinstance(state, dict) else state
    check(path, {"model": state})
    return state


# ---------------------------------------------------------------- masked autoencoders

class Loaded(NamedTuple):
    """Names of a network's tensors that a file held, of those that it did not, and of what else the
    file held."""
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def load_public(model: nn.Module, path: str | Path,
                state: dict[str, Tensor] | None = None) -> Loaded:
    """Loads what a file holds of an autoencoder, or of a classifier made from one.

    Public files of MAE, MAE-SFER, FCMAE (dense and sparse) and timm, and these scripts'; state: the
    file's tensors, where they are read already, or some of them. Positions of another grid are
    interpolated; a last layer for other classes is passed over. Raises BadInput for any name
    missing or unknown beyond the decoder's and the last layers'.
    """
    state = {name.removeprefix("module."): value for name, value in
             (load_weights(path) if state is None else state).items()}
    ours = model.state_dict()
    if hasattr(model, "pos_embed"):
        for name in ("pos_embed", "decoder_pos_embed"):
            if name in state and name in ours:
                state[name] = resized_positions(state[name], ours[name].shape[1])
    else:
        prefix = "encoder." if "mask_token" in ours else ""
        state = {(prefix if name.startswith(("downsample_layers.", "stages.")) else "") + name:
                 value for name, value in canonical_convnextv2(state).items()}
    for name in [name for name in state if name.startswith("head.") and name in ours]:
        if state[name].ndim and len(state[name]) != len(ours[name]):
            del state[name]
    missing, unexpected = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    shapes = sorted(name for name in ours.keys() & state.keys()
                    if ours[name].shape != state[name].shape)
    # a decoder, a norm, a head is there as a whole or not at all
    halved = tuple(prefix for prefix in model.may_lack if any(
        name.startswith(prefix) for name in ours.keys() & state.keys()))
    wrong = [f"{name} is missing" for name in missing if not name.startswith(model.may_lack)] \
        + [f"{name} is unknown" for name in unexpected if not name.startswith(model.may_hold)] \
        + [f"{name} has the shape {list(state[name].shape)}, not {list(ours[name].shape)}"
           for name in shapes] \
        + [f"{name} is missing" for name in missing if name.startswith(halved)]
    if wrong:
        raise BadInput(f"{path}: not of this network: {wrong[0]}"
                       + f", and {len(wrong) - 1} more" * (len(wrong) > 1)
                       + ("; it takes the mean of the patches: leave out --cls_token"
                          if any(name.startswith("fc_norm.") for name in unexpected) else
                          "; name a file of the --model given"))
    model.load_state_dict(state, strict=False)
    return Loaded(sorted(ours.keys() & state.keys()), missing, unexpected)


def resized_positions(positions: Tensor, length: int) -> Tensor:
    """Positions `[1, 1 + L, D]` for `length` tokens, the class token's as it is, the square grid of
    the others interpolated bicubically where it is another."""
    if positions.ndim != 3 or positions.shape[1] == length:
        return positions
    cells = positions[:, 1:]
    side, new = round(cells.shape[1] ** 0.5), round((length - 1) ** 0.5)
    if not side or side * side != cells.shape[1]:  # no grid: refused by its shape
        return positions
    grid = F.interpolate(cells.unflatten(1, (side, side)).permute(0, 3, 1, 2).float(), (new, new),
                         mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


PUBLIC_NAMES = (  # of the sparse encoder, and of timm; and here
    (r"^encoder\.", ""), (r"\.(ln|linear)\.(weight|bias)$", r".\2"), (r"\.kernel$", ".weight"),
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."), (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."), (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"), (r"^head\.norm\.", "norm."), (r"^head\.fc\.", "head."))


def canonical_convnextv2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A public checkpoint by the names of a ConvNeXtV2: of the official dense and sparse models,
    or of timm. What belongs to a decoder keeps its name."""
    ours = {}
    for public, value in state.items():
        name = public
        for pattern, here in PUBLIC_NAMES:
            name = re.sub(pattern, here, name)
        side = round(len(value) ** 0.5) if value.dim() in (2, 3) else 0
        if public.endswith(".kernel") and side and side * side == len(value):
            # [k·k, (in,) out], in whose first axis the columns vary slowest
            value = value if value.dim() == 3 else value[:, None]
            value = value.unflatten(0, (side, side)).permute(3, 2, 1, 0).contiguous()
        elif ".grn." in name:
            value = value.reshape(1, 1, 1, -1)
        elif name.endswith(".bias"):
            value = value.flatten()
        elif ".pwconv" in name and value.dim() > 1:
            value = value.flatten(1)
        ours[name] = value
    return ours
