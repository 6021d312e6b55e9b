"""Where a network looked: in each view of the clips, or in the photographs, that it is most
confidently wrong about."""
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from evaluation import measures
from images import transforms
from models.classifier import Classifier

SIDE = 14  # maps are kept with at most this side: larger ones are averaged down


def maps_of_mistakes(classifier: Classifier, images: np.ndarray, members: np.ndarray,
                     labels: Sequence[int], probabilities: np.ndarray,
                     weights_of: Callable) -> dict[int, list]:
    """{clip: [a map of each view]} of the clips most confidently wrong, by Grad-CAM.

    members: the clips (indices into `images`) that `labels` `[M]` and `probabilities` `[M, C]`
    are of; weights_of(clip, class): row `[D]` of that clip's head. A map is a list of rows of
    0..255 in shares of its own maximum, or None for a view the head leaves out.
    """
    worst = measures.most_wrong(labels, probabilities)
    if not len(worst):
        return {}
    chosen, taken = np.asarray(members)[worst], np.asarray(probabilities)[worst].argmax(1)
    batch = torch.from_numpy(np.array(images[chosen])).to(classifier.device)
    weights = torch.stack([weights_of(i, c).detach() for i, c in zip(chosen, taken)])
    views = classifier.maps(transforms.eval_transform(batch, classifier.normalization), weights)
    kept = [[None] * len(chosen) if view is None else levels(view) for view in views]
    return {int(i): list(pair) for i, *pair in zip(chosen, *kept)}


def class_maps(network: torch.nn.Module, inputs: torch.Tensor,
               classes: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) of one class of each image, `[B, h, w]`, at
    what `network.gradcam_stage` gives: maps, or tokens `[B, h·h, D]`, the class's before them where
    there is one; of several views `[B, K, C, H, W]` that of the last one, the whole image."""
    network.eval()
    kept = []
    stage = network.gradcam_stage(inputs.shape[-1])
    hook = stage.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        said = network(inputs.requires_grad_())  # a frozen backbone would keep no graph
    finally:
        hook.remove()
    logits, maps = said[0] if isinstance(said, tuple) else said, kept[-1]
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)
    if maps.ndim == 3:
        side = math.isqrt(maps.shape[1])
        first = maps.shape[1] - side ** 2
        maps, gradient = (one[:, first:].mT.unflatten(2, (side, side)) for one in (maps, gradient))
    maps, gradient = (one.unflatten(0, (len(inputs), -1))[:, -1] for one in (maps, gradient))
    return F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1)).detach()


def levels(maps: torch.Tensor) -> list:
    """Maps `[B, h, w]` as lists of integers 0..255, at most SIDE a side; all 0 where empty."""
    side = min(SIDE, maps.shape[-1])
    maps = F.adaptive_avg_pool2d(maps.float(), side)
    top = maps.amax((1, 2), keepdim=True)
    return (255 * maps / top.clamp(min=1e-12)).round().int().tolist()
