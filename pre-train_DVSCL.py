"""Stage 1 of DVSCL: contrast the RGB and the depth view of the same clip, without labels.

  python pre-train_DVSCL.py --data_folder D --model_path runs --tb_path tb

The defaults (AlexNet, 240 epochs of batch 256) are 960 steps on the 943 clips of CAS(ME)^3. The
loss starts near log(256) = 5.5 per view, with --contrast bank near log(943) = 6.8; on rendered data
it falls below half of that. Follow it with tensorboard --logdir tb. Expect an hour or two on two
CPU cores, minutes on a GPU.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import hashlib
import time
from typing import NamedTuple

import numpy as np
import torch

import dataset
from evaluation import pictures
from images import cache, encoding, transforms
from models import MODEL_NAMES, create_model
from NCE.BatchContrast import BatchContrast
from NCE.NCEAverage import NCEAverage
from NCE.NCECriterion import NCECriterion, NCESoftmaxLoss
from training import checkpoint, devices, distributed, epochs, options, record, schedules
from util import BadInput, number, positive_int

METERS = ("rgb_loss", "rgb_prob", "depth_loss", "depth_prob")


# ---------------------------------------------------------------- options

def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    add_pool_options(options.add_data_options(parser))
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODEL_NAMES, default="alexnet", metavar="NAME",
                       help="encoder of each view: " + ", ".join(MODEL_NAMES))
    model.add_argument("--feat_dim", type=positive_int, default=128,
                       help="length of the contrasted features")
    bank = options.add_contrast_options(parser)
    optimisation = options.add_optimisation_options(
        parser, options.Descent(256, 0.03, [160, 200], 0.1, 240), options.Schedule(
            "cosine", 12, risen=", a twentieth of the run at most where nothing is given"))
    running = options.add_running_options(parser)
    running.add_argument("--sync_bn", action="store_true",
                         help="batch-norm statistics over the global batch under torchrun, not "
                              "over each rank's slice")
    options.add_output_options(parser, "--model_path", "folder for the runs' checkpoints", 40)
    opt = parser.parse_args(argv)
    opt.contrast, opt.nce_t = options.choose_contrast(parser, util.given(bank, argv),
                                                      opt.contrast, opt.nce_t)
    given = util.given(optimisation, argv)
    opt.lr_schedule = options.choose_schedule(parser, given, opt.lr_schedule, opt.warmup_epochs,
                                              opt.epochs)
    opt.warmup_derived = "--warmup_epochs" not in given  # from --epochs, which may grow
    opt.free.add("warmup_derived")
    if opt.warmup_derived:
        opt.warmup_epochs = min(opt.warmup_epochs, opt.epochs / 20)
    options.check_size(parser, opt.model, opt.size)
    if opt.subject and opt.fold:
        parser.error("--subject and --fold exclude each other")
    if opt.subject == "each" and opt.resume not in (None, "auto"):
        parser.error("--resume FILE is the checkpoint of one run; with --subject each give auto")
    if (opt.pairs is None) != (opt.pool == "labelled"):
        parser.error("--pool unlabelled or both goes with --pairs FILE, and only with it")
    if opt.min_intensity is not None and not opt.pairs:
        parser.error("--min_intensity goes with --pairs")
    if opt.batch_size == 1:
        parser.error("argument --batch_size: batch norm needs at least 2")
    return opt


def add_pool_options(data):
    """Which clips are contrasted, and whose are left out."""
    data.add_argument("--subject", metavar="NAME|each", free=True,
                      help="leave this subject out, of the labelled and unlabelled pool alike; "
                           "each: one run per subject, dealt out to the ranks under torchrun")
    data.add_argument("--fold", metavar="i/10|i/5",
                      help="leave the i-th of ten, or five, groups of subjects out")
    data.add_argument("--without", nargs="+", metavar="NAME", default=[],
                      help="leave these subjects out of every run as well [none]")
    data.add_argument("--pairs", metavar="FILE", free=True,
                      help="pairs.tsv with unlabelled pairs; goes with --pool unlabelled or both")
    data.add_argument("--pool", choices=("labelled", "unlabelled", "both"), default="labelled",
                      help="which clips to contrast")
    data.add_argument("--min_intensity", type=number(float), metavar="X",
                      help="keep unlabelled pairs of this intensity or more, in the unit of the "
                           "pairs file (OpenFace's 0-5) [all]")


def run_name(opt, without=None):
    """CMC's name of a run; `without`: the left-out subject or fold, if any."""
    kind = "batch"
    if opt.contrast == "bank":
        kind = f"memory_{'softmax' if opt.softmax else 'nce'}_{opt.nce_k}"
    # apart, so that {subject} and {fold} of a path fill in the one alone
    out = [record.name_of(names) for names in ([without] * bool(without), opt.without) if names]
    return record.join_name(
        kind, opt.model, record.rate_name(opt.learning_rate, opt.weight_decay, opt.batch_size),
        "view", opt.view, record.size_name(opt.size),
        "amp" * opt.amp, f"seed_{opt.seed}", *(f"without_{one}" for one in out),
        opt.tag)


# ---------------------------------------------------------------- data

def set_loader(opt):
    """(the pool of clips to contrast, decoded: dataset.Data, and which are blank: bool `[N]`)"""
    clips = dataset.read_pool(opt)
    if opt.crop_low < 1 and clips.encoding["difference"] == "wrap":
        raise BadInput(f"--crop_low {opt.crop_low:g}: resizing destroys differences modulo 256; "
                       f"leave it at 1, or prepare signed differences")
    with distributed.in_turn():
        data = dataset.Data(clips, *dataset.load_images(clips, opt.cache, opt.num_workers,
                                                        opt.size))
    return data, encoding.blank(data.images, clips.encoding["difference"])


def exclusions(opt, clips):
    """(name, persons left out) of every run that --subject, --fold and --without ask for."""
    runs = dataset.left_out(opt, clips)
    return distributed.deal(runs) if opt.subject == "each" else runs


# ---------------------------------------------------------------- model

def set_model(opt, channels, n_data, device):
    """(encoder, what it is contrasted with, criterion)"""
    torch.manual_seed(opt.seed)
    model = create_model(opt.model, opt.feat_dim, channels, opt.size)
    criterion = NCESoftmaxLoss() if opt.softmax else NCECriterion(n_data)
    if opt.contrast == "batch":
        contrast = BatchContrast(opt.nce_t)
        contrast.gather = distributed.gather_features
    else:
        contrast = NCEAverage(opt.feat_dim, n_data, opt.nce_k, opt.nce_t, opt.nce_m, opt.softmax)
        contrast.gather = distributed.gather
        if opt.nce_k > n_data - 1:
            print(f"--nce_k {opt.nce_k}: only {n_data - 1} other clips; each is a negative once")
    if opt.sync_bn and device.type != "cuda":
        raise BadInput("--sync_bn: synchronised batch norm needs CUDA; drop the flag")
    if opt.sync_bn and not distributed.active() and distributed.gpus(device) > 1:
        raise BadInput("--sync_bn: takes a process for each GPU; start with torchrun, or drop the "
                       "flag")
    if opt.sync_bn and distributed.active():
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    epochs.check_slices(n_data, opt.batch_size, model, device)
    return model, contrast.to(device), criterion.to(device)


# ---------------------------------------------------------------- training

class Job(NamedTuple):
    """A network in training: on the clips `members` (indices) of a dataset.Data, whose images are
    normalised so; model, contrast, criterion: as set_model gives them."""
    data: dataset.Data
    members: np.ndarray
    normalization: dict
    model: torch.nn.Module
    contrast: torch.nn.Module
    criterion: torch.nn.Module
    optimizer: torch.optim.Optimizer
    precision: devices.Precision


def train(opt, job, epoch, within, on_step):
    """One epoch of the contrastive step; returns the mean of METERS over the clips. within,
    on_step: see epochs.Loop.run."""
    (clips, images, _), members, normalization, model, contrast, criterion, optimizer, \
        precision = job
    device, difference = next(model.parameters()).device, clips.encoding["difference"]
    means = epochs.Meters(METERS, within.get("meters"))
    model.train()
    contrast.train()
    order = epochs.batches(len(members), opt.batch_size, epochs.generator(opt.seed, epoch))
    steps = list(enumerate(order, 1))[within.get("step", 0):]
    # drawn for the global batch, of which a rank takes its slice
    wanted = [members[distributed.part(index).numpy()] for _, index in steps]
    for (step, index), batch in zip(steps, cache.fetch(images, wanted, device)):
        schedules.set_rates(opt, optimizer, epoch, step, len(order))
        rng = epochs.generator(opt.seed, epoch, step)
        drawn = transforms.draw(len(index), rng, difference, opt.jitter, opt.crop_low,
                                not opt.no_flip, len(clips.views))
        negatives = contrast.draw(index, rng)
        mine = distributed.part(torch.arange(len(index)))
        drawn = {name: value[mine] for name, value in drawn.items()}
        batch = transforms.train_transform(batch, drawn, normalization, clips.channels)
        with precision.autocast():
            feat_rgb, feat_depth = model(batch)  # [B, feat_dim] each
        rows = mine if opt.contrast == "batch" else index[mine]
        out_rgb, out_depth = contrast(feat_rgb.float(), feat_depth.float(), rows.to(device),
                                      None if negatives is None else negatives[mine].to(device))
        losses = criterion(out_rgb), criterion(out_depth)
        values = distributed.mean(torch.stack([
            losses[0].detach(), criterion.positive_probability(out_rgb),
            losses[1].detach(), criterion.positive_probability(out_depth)]), len(mine))
        means.add(values.tolist(), len(index))
        epochs.check_loss(values, epoch, step, epochs.kept(opt))
        # gradients are averaged over ranks, whose slices may differ by one clip
        share = len(mine) * distributed.size() / len(index)
        precision.scaler.scale((losses[0] + losses[1]) * share).backward()
        epochs.descend(opt, model, optimizer, precision.scaler)
        on_step({"step": step, "meters": means.state()})
    return means.means()


def pretrain(opt, argv, device, data, members, run):
    """One run over the clips `members`."""
    clips, resume = data.clips, run.find_resume()
    steps = epochs.announce(opt, len(members))
    data_digest = hashlib.sha256(f"{data.digest} {members.tolist()}".encode()).hexdigest()
    precision = devices.mixed_precision(opt.amp, device)
    model, contrast, criterion = set_model(opt, clips.channels, len(members), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=opt.learning_rate, momentum=opt.momentum,
                                weight_decay=opt.weight_decay)
    states = {"model": model, "contrast": contrast, "optimizer": optimizer,
              "scaler": precision.scaler}
    if resume:
        old = run.restore(resume, states, data_digest=data_digest)
        encoding.check_same(resume, old["encoding"], clips.encoding["difference"])
        done, normalization, within = old["epoch"], old["normalization"], old["within"]
    else:
        done, within, normalization = 0, {}, encoding.estimate_normalization(
            data.images, members, clips.encoding["difference"], clips.views, clips.channels)
    distributed.agree(clips.digest(), done, within.get("step"))
    log = run.log(record.header(__file__, opt, argv, data_digest=data_digest),
                  (lambda line: line["epoch"] <= done) if resume else None,
                  writes=distributed.first())
    fixed = {"opt": vars(opt), "normalization": normalization, "encoding": clips.encoding,
             "seen": dataset.people_seen(clips, members),
             "data_digest": data_digest, "channels": list(clips.channels)}
    job = Job(data, members, normalization, distributed.wrap(model, device, precision.autocast),
              contrast, criterion, optimizer, precision)

    def train_epoch(epoch, within, on_step):
        began, share = time.perf_counter(), 1 - within.get("step", 0) / steps
        means = train(opt, job, epoch, within, on_step)
        return means | {"learning_rate": schedules.rate_now(optimizer), "pairs_per_second":
                        share * len(members) / (time.perf_counter() - began)}

    def save(epoch, within):
        if distributed.first():
            state = {**fixed, "epoch": epoch, "step": epoch * steps + within.get("step", 0),
                     "within": within, **{k: part.state_dict() for k, part in states.items()}}
            if within:
                checkpoint.save(run.last(), state)
            else:
                checkpoint.save_epoch(run.last(), state)

    epochs.Loop(opt, log, steps=steps, together=True).run(train_epoch, save, done, within)
    if distributed.first():
        pictures.draw_curves(run.folder)
    run.print_places(checkpoint="last.pth", log="log.jsonl", curves="curves.png")


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = devices.local_device(opt.device)
    with distributed.group(device, opt.subject != "each"):
        data, blank = set_loader(opt)
        runs = [(record.Run(opt.model_path, run_name(opt, without), opt), out)
                for without, out in exclusions(opt, data.clips)]
        for run, _ in runs:  # before the first one trains for an hour
            run.find_resume()
        for run, out in runs:
            members = dataset.training_clips(data.clips, blank, out)
            pretrain(opt, argv, device, data, members, run)


if __name__ == "__main__":
    main()
