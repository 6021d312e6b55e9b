"""Losses of classifiers, and what SCN, RAN and the Wasserstein term add to them."""
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Centre of each emotion in the plane of valence and arousal, as AffectNet's annotators placed it
CENTRES = {
    "neutral": (-0.019574175715601782, -0.0627188977615683),
    "happiness": (0.07028056723210271, 0.6643268644924916),
    "sadness": (-0.2570043582489509, -0.6370063573392657),
    "surprise": (0.6893279744258441, 0.1804439995542943),
    "fear": (0.7661802158670421, -0.12574468561147706),
    "disgust": (0.4573438234998662, -0.693718996983959),
    "anger": (0.5667776418527468, -0.45273569245960493),
    "contempt": (0.5828403601946657, -0.5145737456826646),
}


def class_weights(labels: np.ndarray, n_label: int) -> Tensor:
    """n / (C n_c) per class, 0 for a class without clips: float32 `[C]`."""
    counts = np.bincount(labels, minlength=n_label)
    weights = np.where(counts > 0, len(labels) / (n_label * np.maximum(counts, 1)), 0)
    return torch.tensor(weights, dtype=torch.float32)


def log_prior(labels: np.ndarray, n_label: int) -> Tensor:
    """Logarithm of each class's share, float32 `[C]`; of a class without clips, that of half a
    clip."""
    counts = np.maximum(np.bincount(labels, minlength=n_label), 0.5)
    return torch.tensor(np.log(counts / len(labels)), dtype=torch.float32)


def classification_loss(logits: Tensor, labels: Tensor, kind: str = "crossentropy",
                        weights: Tensor | None = None, smoothing: float = 0) -> Tensor:
    """Loss per clip, `[...]`, of logits `[..., C]` and labels `[...]` or shares of the classes
    `[..., C]`.

    crossentropy; focal: times (1 - p)^2 (Lin et al., "Focal Loss for Dense Object Detection",
    eq. 4 with gamma 2); balanced: cross-entropy times `weights` `[..., C]` of the true class;
    logit_adjusted: of logits plus `weights`, the classes' log prior `[C]` (Menon et al., "Long-tail
    Learning via Logit Adjustment", 2021, eq. 10 with tau 1). smoothing: share of the target that
    all classes have alike. Shares of the classes are for the cross-entropy, smooth as they are.
    """
    logits = logits.float()
    log_p = F.log_softmax(logits + weights if kind == "logit_adjusted" else logits, -1)
    if labels.is_floating_point():
        return -(labels * log_p).sum(-1)
    right = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = -right if not smoothing else \
        -(1 - smoothing) * right - smoothing * log_p.mean(-1)
    if kind == "focal":
        return (1 - right.exp()).square() * loss
    if kind == "balanced":
        return weights.expand_as(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * loss
    return loss


# ---------------------------------------------------------------- SCN

def n_certain(n: int, beta: float) -> int:
    """Size of the group of high importance of `n` images, a share `beta` of them, rounded down."""
    return int(n * beta + 1e-9)  # .7 * 10 is 7, and just below it in binary for some numbers


def rank_regularisation(importance: Tensor, margin: float, beta: float = 0.7) -> Tensor:
    """max(0, margin - (mean of the group of high importance - mean of the rest)), a scalar (SCN,
    eq. 3); 0 where a group is empty. importance: `[B]` or `[B, 1]`; beta: share of that group."""
    ordered = importance.flatten().sort(descending=True).values
    top = n_certain(len(ordered), beta)
    if top in (0, len(ordered)):
        return ordered.sum() * 0
    return (margin - (ordered[:top].mean() - ordered[top:].mean())).clamp(min=0)


def relabel(probabilities: Tensor, labels: Tensor, margin: float,
            importance: Tensor | None = None, beta: float = 0.7) -> Tensor:
    """New labels `[B]`: the likeliest class where its probability exceeds the label's by more than
    `margin` (SCN, eq. 5), with importance `[B]` or `[B, 1]` in the group of low importance alone.

    probabilities: `[B, C]`.
    """
    best, likeliest = probabilities.max(1)
    wrong = best - probabilities.gather(1, labels[:, None])[:, 0] > margin
    if importance is not None:
        order = importance.flatten().argsort(descending=True)
        low = torch.ones_like(wrong)
        low[order[:n_certain(len(order), beta)]] = False
        wrong &= low
    return torch.where(wrong, likeliest, labels)


# ---------------------------------------------------------------- RAN

def region_limit(n_views: int) -> float:
    """The margin above which `region_loss` can never be 0: the most that the importance of a view
    can exceed that of another, both softmaxes of numbers in 0..1, (e - 1) / (e + K - 1)."""
    return (math.e - 1) / (math.e + n_views - 1)


def region_loss(importance: Tensor, margin: float) -> Tensor:
    """Mean over the images of max(0, margin - (most of the crops - the whole image)), of the
    importance `[B, K]`, the whole image last (RAN, eq. 7)."""
    return (margin - (importance[:, :-1].amax(1) - importance[:, -1])).clamp(min=0).mean()


# ---------------------------------------------------------------- Wasserstein

def normalised(distance: Tensor, norm: str) -> Tensor:
    """Distances `[C, C]` whose rows sum to 1 (norm l1), or divided by their Frobenius norm."""
    if norm == "frobenius":
        return distance / distance.norm()
    return distance / distance.sum(1, keepdim=True).clamp(min=1e-12)


def emotion_distance(classes: Sequence[str], norm: str = "l1") -> Tensor:
    """Distances between emotions, float64 `[C, C]`, 0 on the diagonal: of their centres in the
    plane of valence and arousal. Raises KeyError for a class without a centre."""
    centres = torch.tensor([CENTRES[name] for name in classes], dtype=torch.float64)
    return normalised((centres[:, None] - centres[None]).norm(dim=-1), norm)


def wasserstein(logits: Tensor, labels: Tensor, distance: Tensor,
                reduction: str = "sum") -> Tensor:
    """Sum or mean over the batch of the distance that the predicted probability has to travel to
    the true class: logits `[B, C]`, labels `[B]`, distance `[C, C]` → a scalar."""
    each = (distance.to(logits)[labels] * logits.softmax(-1)).sum(-1)
    return each.sum() if reduction == "sum" else each.mean()


def updated(distance: Tensor, confusion: np.ndarray, norm: str = "l1") -> Tensor:
    """Distances `[C, C]` after one --wloss_update, normalised as at the start: classes that are
    often taken for one another, by a confusion matrix `[C, C]` (rows the true class) of a part of
    the training set, move apart."""
    counts = torch.from_numpy(np.asarray(confusion, dtype=np.float64)).fill_diagonal_(0)
    return normalised(distance + 0.1 * normalised(counts, "l1").to(distance), norm)
