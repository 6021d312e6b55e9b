"""Where a linear head looks in each view: Grad-CAM (Selvaraju et al., ICCV 2017, eq. 1 and 2).

The map is that of the tap under the head, or of the last convolution before a tap that is a
vector. Channels are weighted by the mean gradient of the class's score, and only what speaks for
the class is kept.
"""
import numpy as np
import torch
import torch.nn.functional as F

from evaluation import measures
from images import transforms

SIDE = 14  # maps are kept with at most this side: larger ones are averaged down


def class_maps(model, head, x, layer, weights):
    """Maps float32 `[B, h, w]` of both views, not negative; None for a view the head leaves out.

    x: float `[B, C1+C2, H, W]`; head: gives `pool`; weights `[B, D]`: of the class to explain, in
    the head of each clip.
    """
    model.eval()
    maps, taps = [], []
    views = x.split(model.in_channels, 1)
    for tower, view in zip((model.rgb_to_d, model.d_to_rgb), views):
        stages = tower.stages()[:layer]
        with torch.no_grad():
            for number, stage in enumerate(stages, 1):
                view = stage(view)
                if view.dim() == 4:
                    last, rest = view, stages[number:]
        tap = last.requires_grad_()  # [B, C, h, w]
        for stage in rest:
            tap = stage(tap)
        maps.append(last)
        taps.append(tap)
    scores = (head.pool(*taps) * weights).sum()
    gradients = torch.autograd.grad(scores, maps, allow_unused=True)
    return [None if gradient is None else
            F.relu((gradient.mean((2, 3), keepdim=True) * values.detach()).sum(1))
            for gradient, values in zip(gradients, maps)]


def maps_of_mistakes(model, head, images, members, labels, probabilities, normalization, layer,
                     device, weights_of):
    """{clip: [map of RGB, map of the second view]} of the clips most confidently wrong.

    members: the clips (indices into `images`) that `labels` `[M]` and `probabilities` `[M, C]`
    are of; weights_of(clip, class): row `[D]` of that clip's head. A map is a list of rows of
    0..255 in shares of its own maximum, or None for a view the head leaves out.
    """
    worst = measures.most_wrong(labels, probabilities)
    if not len(worst):
        return {}
    chosen, taken = np.asarray(members)[worst], np.asarray(probabilities)[worst].argmax(1)
    batch = torch.from_numpy(np.array(images[chosen])).to(device)
    weights = torch.stack([weights_of(i, c).detach() for i, c in zip(chosen, taken)])
    views = class_maps(model, head, transforms.eval_transform(batch, normalization), layer,
                       weights)
    kept = [[None] * len(chosen) if view is None else _levels(view) for view in views]
    return {int(i): list(pair) for i, *pair in zip(chosen, *kept)}


def _levels(maps):
    """Maps `[B, h, w]` as lists of integers 0..255, at most SIDE a side; all 0 where empty."""
    side = min(SIDE, maps.shape[-1])
    maps = F.adaptive_avg_pool2d(maps.float(), side)
    top = maps.amax((1, 2), keepdim=True)
    return (255 * maps / top.clamp(min=1e-12)).round().int().tolist()
