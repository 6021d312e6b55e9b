"""Linear heads on a frozen encoder: features once, then the heads of all folds in one pass.

A frozen encoder gives the same features in every epoch and for every held-out subject, so each
image is encoded once per augmented view. The heads of all folds are one weight tensor
`[F, C, D]` trained over shared batches: a fold's loss is the mean over the batch's clips that it
does not hold out, and a batch with none of those leaves the fold untouched.
"""
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import decoding
import transforms
import util

# (mirrored, shift in pixels): the centre crop and its mirror image, then those of the corners
VIEWS = [(mirror, shift) for shift in ((0, 0), (-16, -16), (16, 16), (-16, 16), (16, -16))
         for mirror in (False, True)]


def encode(model, head, images, normalization, layer, device, autocast, views=1, members=None,
           batch_size=64):
    """Pooled features of every image under the first `views` of VIEWS, float32 `[V, N, D]`, and
    the number of positions of the pooled map they are flattened from (1 for a vector).

    images: uint8 array `[n, C, 256, 256]`; head: gives `pool(feat_rgb, feat_depth)` → `[B, D]`;
    members: indices of the N images [all].
    """
    model.eval()
    features, start = None, 0
    members = np.arange(len(images)) if members is None else members
    parts = np.array_split(members, -(-len(members) // batch_size))
    with torch.no_grad():
        for batch in tqdm(decoding.fetch(images, parts), "encoding", len(parts), disable=None):
            batch = torch.from_numpy(batch).to(device)
            for v, (mirror, shift) in enumerate(VIEWS[:views]):
                x = transforms.eval_transform(batch, normalization, mirror, shift)
                with autocast():
                    taps = model(x, layer)
                    pooled = head.pool(*taps)
                if features is None:
                    positions = head.pooling(taps[0]).shape[2:].numel()
                    features = torch.empty(views, len(members), pooled.shape[1], device=device)
                features[v, start:start + len(batch)] = pooled.float()
            start += len(batch)
    return features, positions


def class_weights(labels, n_label):
    """n / (C n_c) per class, 0 for a class without clips: float32 `[C]`."""
    counts = np.bincount(labels, minlength=n_label)
    weights = np.where(counts > 0, len(labels) / (n_label * np.maximum(counts, 1)), 0)
    return torch.tensor(weights, dtype=torch.float32)


def classification_loss(logits, labels, kind="crossentropy", weights=None):
    """Loss per clip: logits `[..., C]`, labels `[...]` → `[...]`.

    crossentropy; focal: times (1 - p)^2 (Lin et al., "Focal Loss for Dense Object Detection",
    eq. 4 with gamma 2); balanced: cross-entropy times `weights` `[..., C]` of the true class.
    """
    log_p = F.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if kind == "focal":
        return -(1 - log_p.exp()).square() * log_p
    if kind == "balanced":
        return -weights.expand_as(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * log_p
    return -log_p


class FoldHeads:
    """The linear heads of several folds, trained together by SGD with momentum.

    names: of the held-out folds `[F]`; initial weights follow from (seed, name), normal with
    deviation 0.01, so that a fold is the same alone, with some, or with all others.
    """

    def __init__(self, names, dim, n_label, seed, device):
        drawn = [0.01 * torch.randn(n_label, dim, generator=util.generator(
            seed, zlib.crc32(name.encode()))) for name in names]
        self.weight = torch.stack(drawn).to(device).requires_grad_()  # [F, C, D]
        self.bias = torch.zeros(len(names), n_label, device=device).requires_grad_()  # [F, C]
        self.moments = [torch.zeros_like(p) for p in (self.weight, self.bias)]

    def __call__(self, features):
        """`[B, D]` → logits `[B, F, C]`"""
        folds, classes, dim = self.weight.shape
        return torch.addmm(self.bias.view(-1), features,
                           self.weight.view(-1, dim).t()).view(-1, folds, classes)

    def step(self, loss, touched, rate, momentum, decay):
        """One SGD step as torch.optim.SGD's, on the folds `touched` (bool `[F]`) alone, each at
        its own `rate` `[F]`."""
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        with torch.no_grad():
            for value, moment, gradient in zip((self.weight, self.bias), self.moments, gradients):
                rates = rate.view(-1, *[1] * (value.dim() - 1))
                gradient.add_(value, alpha=decay)
                if touched.all():
                    value.addcmul_(moment.mul_(momentum).add_(gradient), rates, value=-1)
                else:
                    moment[touched] = moment[touched] * momentum + gradient[touched]
                    value[touched] -= rates[touched] * moment[touched]

    def state_dict(self):
        return {"weight": self.weight.detach(), "bias": self.bias.detach(),
                "weight_moment": self.moments[0], "bias_moment": self.moments[1]}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
        self.moments = [state[name].to(self.weight.device)
                        for name in ("weight_moment", "bias_moment")]


def rate_scale(lengths, positions):
    """What --learning_rate is multiplied by for features of mean squared length `lengths`.

    SGD on a linear head is stable while rate times squared length is small, and that length
    differs by orders of magnitude between taps and encoders: on AlexNet's layer 5 and four classes
    the published 0.1 diverges. So the rate is understood for features whose channel vector has
    unit length at each of the `positions` of the map, as in normalised LMS (Haykin, "Adaptive
    Filter Theory", ch. 6). The published 0.1 for maps and 30 for a pooled vector fit that.
    """
    return positions / lengths


def train_heads(heads, features, positions, labels, fold_of, held_out, opt, loss="crossentropy",
                start=0, on_epoch=None):
    """Trains `heads` on features `[V, N, D]` for epochs start+1 .. opt.epochs.

    positions: of the map the features are flattened from (`rate_scale`); labels: int64 `[N]`;
    fold_of: fold of each clip `[N]`; held_out: the fold each head must not see, `[F]`.
    `on_epoch(epoch, means)` is called after every epoch with the mean `train_loss` and
    `train_accuracy` over clips and folds. Raises util.RunFailed if a loss is not finite.
    """
    device, n_label = features.device, heads.bias.shape[1]
    held = torch.as_tensor(np.asarray(held_out))
    training = torch.as_tensor(fold_of)[:, None] != held  # [N, F]
    weights = None
    if loss == "balanced":
        weights = torch.stack([class_weights(labels[keep.numpy()], n_label)
                               for keep in training.t()]).to(device)  # [F, C]
    labels = torch.as_tensor(labels)
    util.announce_dropped(len(labels), opt.batch_size)
    lengths = features.square().sum(-1).mean(0).cpu()  # [N]
    scale = rate_scale((lengths @ training.float()) / training.sum(0), positions).to(device)  # [F]
    print(f"learning rate of the heads: {opt.learning_rate:g} x {scale.mean():.3g}, for features "
          f"of mean squared length {lengths.mean():.4g} on {positions} positions")
    for epoch in range(start + 1, opt.epochs + 1):
        rng = util.generator(opt.seed, epoch)
        means = {"train_loss": util.AverageMeter(), "train_accuracy": util.AverageMeter()}
        view = torch.randint(len(features), (len(labels),), generator=rng)
        for step, index in enumerate(util.batches(len(labels), opt.batch_size, rng), 1):
            mask = training[index].to(device)  # [B, F]
            target = labels[index].to(device)[:, None].expand_as(mask)
            logits = heads(features[view[index], index])
            each = classification_loss(logits, target, loss, weights) * mask
            count = mask.sum(0)
            total = (each.sum(0) / count.clamp(min=1)).sum()
            if not torch.isfinite(total):
                raise util.RunFailed(f"the loss is not finite in epoch {epoch}, step {step}; the "
                                     f"last checkpoint is kept; lower --learning_rate, now "
                                     f"{opt.learning_rate:g}")
            heads.step(total, count > 0, util.learning_rate(opt, epoch) * scale, opt.momentum,
                       opt.weight_decay)
            seen = int(mask.sum())
            if seen:
                hits = ((logits.argmax(-1) == target) & mask).sum() / seen
                means["train_loss"].update(each.detach().sum() / seen, seen)
                means["train_accuracy"].update(hits, seen)
        if on_epoch:
            on_epoch(epoch, {name: meter.avg for name, meter in means.items()})


def predict(heads, features, fold_of, held_out):
    """Probabilities `[N, C]` of every clip from the head that holds it out, plain view alone.

    NaN for clips that no head holds out.
    """
    found = np.full((features.shape[1], heads.bias.shape[1]), np.nan)
    with torch.no_grad():
        for position, fold in enumerate(held_out):
            members = np.flatnonzero(fold_of == fold)
            logits = torch.addmm(heads.bias[position], features[0, members],
                                 heads.weight[position].t())
            found[members] = logits.softmax(-1).cpu().numpy()
    return found
