"""Linear heads on a frozen encoder: features once, then the heads of all folds in one pass.

A frozen encoder gives the same features in every epoch and for every held-out subject, so each
image is encoded once per augmented view. The heads of all folds are one weight tensor
`[F, C, D]` trained over shared batches: a fold's loss is the mean over the batch's clips that it
does not hold out, and a batch with none of those leaves the fold untouched.
"""
import hashlib
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import dataset
import metrics
import transforms
import util
from models import MODEL_NAMES, create_classifier, create_model, default_layer, n_layers
from util import BadInput

# (mirrored, shift in pixels): the centre crop and its mirror image, then those of the corners
VIEWS = [(mirror, shift) for shift in ((0, 0), (-16, -16), (16, 16), (-16, 16), (16, -16))
         for mirror in (False, True)]


# ---------------------------------------------------------------- the pre-trained encoder

def add_head_options(parser, stage):
    """Adds the data and model flags of the scripts that put a head on a pre-trained encoder.

    Returns both groups.
    """
    data, model = util.add_data_options(parser), parser.add_argument_group("model")
    data.add_argument("--dataset", choices=(*dataset.DATABASES, "all"), default="casme3",
                      help="the database in the lists to evaluate; all: every one of them")
    model.add_argument("--model_path", required=True, metavar="FILE",
                       help=f"checkpoint of pre-train_DVSCL.py to {stage}; a {{subject}} or "
                            f"{{fold}} in it is replaced by the one held out; random: an "
                            f"untrained encoder")
    model.add_argument("--model", choices=MODEL_NAMES, default="alexnet", metavar="NAME",
                       help="its encoder: " + ", ".join(MODEL_NAMES))
    model.add_argument("--layer", type=util.positive_int,
                       help="tap of the encoder the head sits on [5 for AlexNet, 6 for ResNet]")
    model.add_argument("--encoder", choices=("both", "rgb", "depth"), default="both",
                       help="view whose features the head sees")
    return data, model


def check_layer(parser, opt):
    """Fills in the model's own layer where none is given; refuses one out of range."""
    if opt.layer is None:
        opt.layer = default_layer(opt.model)
        print(f"heads on layer {opt.layer} of {opt.model}")
    if opt.layer > n_layers(opt.model):
        parser.error(f"argument --layer: {opt.layer} is out of range; {opt.model} has taps 1 to "
                     f"{n_layers(opt.model)} for a head")


def read_labelled(opt):
    """(ClipSet of --dataset, uint8 array `[N, C, 256, 256]`, its digest)"""
    clips = dataset.read_clips(opt.data_folder, opt.list_folder, opt.view, opt.encoding)
    if opt.dataset != "all":
        wanted = dataset.DATABASES.index(opt.dataset)
        held = sorted({dataset.DATABASES[c.database] for c in clips.clips})
        if opt.dataset not in held:
            raise BadInput(f"--dataset {opt.dataset}: the lists hold {', '.join(held)}")
        if len(held) > 1:
            print(f"{opt.dataset} alone, of {', '.join(held)}; --dataset all takes every one")
        clips = clips.subset([c.database == wanted for c in clips.clips])
    images, digest = dataset.load_images(clips, opt.cache, opt.num_workers)
    return clips, images, digest


def checkpoint_for(opt, clips, person):
    """--model_path for one held-out person: {subject} and {fold} filled in."""
    path = opt.model_path
    if "{fold}" in path:
        names, fold_of = dataset.ten_folds(clips)
        first = next(i for i, clip in enumerate(clips.clips) if clip.person == person)
        path = path.replace("{fold}", names[fold_of[first]])
    return path.replace("{subject}", dataset.person_name(person, clips))


def load_encoder(opt, path, clips):
    """(encoder, about) from a checkpoint, on the CPU.

    about: `normalization` (the checkpoint's; the published one where it has none), `people` the
    encoder saw (None: unknown) and `sha256` of the file. Raises BadInput for a checkpoint of
    another model, view, encoding or other classes.
    """
    encoding = clips.encoding["difference"]
    if path == "random":
        torch.manual_seed(opt.seed)
        about = {"normalization": transforms.fixed_normalization(encoding, clips.channels,
                                                                 clips.second),
                 "people": set(), "sha256": None}
        return create_model(opt.model, in_channels=clips.channels), about
    state = checkpoint.load(path)
    old = state.get("encoding", {})
    for what, ours, theirs in (("--view", opt.view, state["opt"].get("view", opt.view)),
                               ("difference", encoding, old.get("difference", encoding)),
                               ("classes", clips.classes, old.get("classes", clips.classes))):
        if ours != theirs:
            raise BadInput(f"{path}: trained with {what} {theirs}, but the data have {ours}")
    feat_dim = [v.shape[0] for k, v in state["model"].items()
                if k in ("rgb_to_d.fc8.0.weight", "rgb_to_d.fc.weight")]
    model = create_model(opt.model, *(feat_dim or [128])[:1], in_channels=clips.channels)
    checkpoint.load_model(model, state, path, opt.model)
    seen = state.get("seen")
    return model, {
        "normalization": state.get("normalization")
        or transforms.fixed_normalization("wrap", clips.channels, clips.second),
        "people": None if seen is None else {tuple(p) for p in seen["people"]},
        "sha256": file_sha256(path)}


def file_sha256(path):
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------- held-out persons and results

class HeldOut:
    """A run over held-out persons: its folder, its log, who is left to do, and the results.

    stage: 'probe' or 'finetune'; parts: what of the options joins in the run's name; together:
    whether all persons of one checkpoint are trained in one pass. Raises BadInput.
    """

    def __init__(self, stage, opt, argv, script, clips, digest, parts, together):
        self.opt, self.clips, self.seen, self.lengths = opt, clips, {}, {}
        name = util.head_run_name(stage, opt, parts)
        self.folder = Path(opt.save_path) / name
        self.curves = util.curve_folder(opt, opt.save_path, name)
        self.all = opt.subject == ["all"]
        wanted = dataset.find_people(opt.subject, clips) if opt.subject and not self.all else \
            clips.people
        paths = {person: checkpoint_for(opt, clips, person) for person in wanted}
        if self.all and "{" in opt.model_path:
            raise BadInput(f"--model_path {opt.model_path}: --subject all holds nobody out; name "
                           f"one checkpoint")
        for path in dict.fromkeys(paths.values()):
            if path != "random" and not Path(path).is_file():
                raise BadInput(f"--model_path {path}: no such checkpoint")
        single = opt.model_path != "random" and "{" not in opt.model_path
        self.header = util.header(
            script, opt, argv, list_digest=clips.digest(),
            data_digest=hashlib.sha256((clips.digest() + digest).encode()).hexdigest(),
            checkpoint_sha256=file_sha256(opt.model_path) if single else None)
        done = metrics.open_results(self.folder, opt, self.header)
        todo = [p for p in wanted if dataset.person_name(p, clips) not in done]
        if len(todo) < len(wanted):
            print(f"{len(wanted) - len(todo)} of {len(wanted)} held-out subjects are finished")
        self.last = self.folder / "last.pth"
        self.groups = [(opt.model_path, [], "all")] if self.all else \
            self._groups(todo, paths, together)
        self.log = None
        if opt.resume not in (None, "auto") and not Path(opt.resume).is_file():
            raise BadInput(f"--resume {opt.resume}: no such checkpoint")

    def _groups(self, todo, paths, together):
        """(checkpoint, persons, unit): what is trained in one go, and its name in the log."""
        if not together:
            return [(paths[p], [p], dataset.person_name(p, self.clips)) for p in todo]
        groups = {}
        for person in todo:
            groups.setdefault(paths[person], []).append(person)
        names = {path: ",".join(dataset.person_name(p, self.clips) for p in people)[:80]
                 for path, people in groups.items()}
        return [(path, people, None if len(people) == len(self.clips.people) else names[path])
                for path, people in groups.items()]

    def _open_log(self):
        """The log, cut back to what finished subjects and the last checkpoint account for."""
        units = {unit for _, _, unit in self.groups}
        state = self.state() or {}

        def keep(line):
            unit = line.get("subject")
            return unit not in units or (state.get("unit", "") == unit
                                         and line["epoch"] <= state["epoch"])
        return util.Log(self.folder, self.curves, self.header, keep)

    def state(self, unit=Ellipsis):
        """The run's last checkpoint, if there is one (of `unit`, where given)."""
        path = self.last if self.opt.resume in (None, "auto") else Path(self.opt.resume)
        if not self.opt.resume or (self.opt.resume == "auto" and not path.exists()):
            return None
        state = checkpoint.load(path)
        checkpoint.check_resumable(path, state, self.opt,
                                   data_digest=self.header["data_digest"])
        return state if unit in (Ellipsis, state.get("unit")) else None

    def encoder(self, path):
        """`load_encoder`'s (encoder, about) of a group; remembers whom the encoder saw."""
        model, about = load_encoder(self.opt, path, self.clips)
        self.seen[path] = about
        if self.log is None:  # not before: a wrong checkpoint leaves no run folder behind
            self.log = self._open_log()
        return model, about

    def rate_scale(self, path, model, head, images, members, device, autocast):
        """`rate_scale` of the features of the clips `members`; encodes once per checkpoint."""
        if path not in self.lengths:
            features, positions = encode(model, head, images, self.seen[path]["normalization"],
                                         self.opt.layer, device, autocast)
            self.lengths[path] = features[0].square().sum(-1).cpu(), positions
        lengths, positions = self.lengths[path]
        return rate_scale(lengths[members].mean().item(), positions)

    def keep(self, path, person, members, probabilities):
        """Keeps a person's predictions: probabilities `[len(members), C]`."""
        if not np.isfinite(probabilities).all():
            raise util.RunFailed(f"the predictions for {dataset.person_name(person, self.clips)} "
                                 f"are not finite; lower --learning_rate")
        people = self.seen[path]["people"]
        transductive = None if people is None else any(dataset.same_person(person, other)
                                                       for other in people)
        metrics.write_subject(
            self.folder, dataset.person_name(person, self.clips),
            metrics.rows_of(self.clips, members, probabilities), transductive=transductive,
            checkpoint=None if path == "random" else path, sha256=self.seen[path]["sha256"])

    def finish(self, blank, **about):
        """Merges everything finished into the result files, and prints figures and places."""
        clips = self.clips
        if self.all:
            print(f"checkpoint   {self.last}\nlog          {self.folder / 'log.jsonl'}\n"
                  f"TensorBoard  tensorboard --logdir {self.curves.parent}")
            return
        keys = {(dataset.DATABASES[c.database], c.subject, c.key)
                for c, is_blank in zip(clips.clips, blank) if is_blank}
        about["rendered"] = bool(clips.encoding.get("rendered"))
        results = metrics.write_results(self.folder, {**self.header, **about}, clips.n_label,
                                        clips.classes, keys)
        print(metrics.describe(results))
        for what, place in (("results", "results.json"), ("predictions", "predictions.csv"),
                            ("confusion", "confusion.png"), ("log", "log.jsonl")):
            print(f"{what:12s} {self.folder / place}")
        print(f"TensorBoard  tensorboard --logdir {self.curves.parent}")


# ---------------------------------------------------------------- features and heads

def encode(model, head, images, normalization, layer, device, autocast, views=1, batch_size=64):
    """Pooled features of every image under the first `views` of VIEWS, float32 `[V, N, D]`, and
    the number of positions of the pooled map they are flattened from (1 for a vector).

    images: uint8 array `[N, C, 256, 256]`; head: gives `pool(feat_rgb, feat_depth)` → `[B, D]`.
    """
    model.eval()
    features = None
    starts = tqdm(range(0, len(images), batch_size), "encoding", disable=None)
    with torch.no_grad():
        for start in starts:
            batch = torch.from_numpy(np.array(images[start:start + batch_size])).to(device)
            for v, (mirror, shift) in enumerate(VIEWS[:views]):
                x = transforms.eval_transform(batch, normalization, mirror, shift)
                with autocast():
                    taps = model(x, layer)
                    pooled = head.pool(*taps)
                if features is None:
                    positions = head.pooling(taps[0]).shape[2:].numel()
                    features = torch.empty(views, len(images), pooled.shape[1], device=device)
                features[v, start:start + len(batch)] = pooled.float()
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
                "moments": self.moments}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.weight.copy_(state["weight"])
            self.bias.copy_(state["bias"])
        self.moments = [m.to(self.weight.device) for m in state["moments"]]


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
        for index in util.batches(len(labels), opt.batch_size, rng):
            mask = training[index].to(device)  # [B, F]
            target = labels[index].to(device)[:, None].expand_as(mask)
            logits = heads(features[view[index], index])
            each = classification_loss(logits, target, loss, weights) * mask
            count = mask.sum(0)
            total = (each.sum(0) / count.clamp(min=1)).sum()
            if not torch.isfinite(total):
                raise util.RunFailed(f"the loss is not finite in epoch {epoch}; lower "
                                     f"--learning_rate, now {opt.learning_rate:g}")
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


def train_frozen(opt, held, group, images, names, fold_of, device, loss="crossentropy", views=2):
    """Encodes every clip with one checkpoint and trains the heads of one of `held.groups`.

    names `[F]`, fold_of `[N]`: the folds. Returns (heads, probabilities `[N, C]`, NaN where none
    of these heads holds the clip out).
    """
    path, people, unit = group
    clips, (model, about) = held.clips, held.encoder(path)
    # a fold that no clip has: the head of --subject all holds nothing out
    held_out = sorted(set(fold_of[clips.members(people)].tolist())) if people else [len(names)]
    pooling = create_classifier(opt.model, opt.layer, clips.n_label, clips.channels, opt.encoder)
    model.to(device)
    with checkpoint.frozen(model):
        features, positions = encode(model, pooling.to(device), images, about["normalization"],
                                     opt.layer, device, util.mixed_precision(opt, device)[0], views)
    heads = FoldHeads([[*names, "all"][f] for f in held_out], features.shape[-1], clips.n_label,
                      opt.seed, device)
    state = held.state(unit)
    if state:
        heads.load_state_dict(state["model"])
        print(f"{held.last}: goes on after epoch {state['epoch']}")
    start = state["epoch"] if state else 0
    bar = tqdm(total=opt.epochs - start, desc="heads", disable=None)

    def on_epoch(epoch, means):
        means["learning_rate"] = util.learning_rate(opt, epoch)
        held.log.epoch(epoch, means, unit)
        bar.update()
        if epoch % opt.print_freq == 0 or epoch == opt.epochs:
            tqdm.write(util.epoch_line(opt, epoch, means))
        if epoch % opt.save_freq == 0 or epoch == opt.epochs:
            checkpoint.save(held.last, {
                "opt": vars(opt), "epoch": epoch, "unit": unit, "model": heads.state_dict(),
                "normalization": about["normalization"], "encoding": clips.encoding,
                "data_digest": held.header["data_digest"]})

    train_heads(heads, features, positions, clips.labels, fold_of, held_out, opt, loss, start,
                on_epoch)
    bar.close()
    return heads, predict(heads, features, fold_of, held_out)
