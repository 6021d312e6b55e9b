"""TM-MMNet: a video network on the optical flow between five frames, for each held-out subject.

  python train_MMNet.py --data_folder data/casme2 --save_path results --tb_path tb

prepare.py casme2 makes the folder. Each held-out subject gets a network trained from scratch on all
others for a fixed number of epochs; `--part` does some of them and merges what is finished. V6 and
V6c first learn the action units. With two CPU cores take --size 112 or less: a subject takes hours.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split

import numpy as np
import torch

import dataset
from evaluation import heldout, seeds
from evaluation.videos import Best, HeldOutVideos, chosen_subjects
from images import flow, videos
from models import mmnet
from training import checkpoint, devices, distributed, epochs, motion, options, record
from util import BadInput, number, positive_int

# ---------------------------------------------------------------- options

def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    add_data_options(parser)
    add_model_options(parser)
    add_optimisation_options(parser)
    options.add_running_options(parser, decodes=False)
    options.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 10)
    opt = parser.parse_args(argv)
    check_options(parser, opt, mmnet.LAYOUTS[opt.model])
    return opt


def check_options(parser, opt, layout):
    """Fills in what the variant settles; refuses flags that do not go together."""
    if opt.au_loss and layout.units:
        parser.error(f"--au_loss: {opt.model} learns the action units in a stage of its own")
    if opt.size % 16:
        parser.error("argument --size: a multiple of 16")
    if opt.input is None:
        opt.input = "difference" if opt.model == "mmnet" and not opt.channels else "flow"
    if opt.input == "difference" and opt.channels:
        parser.error("--channels goes with --input flow")
    if bool(opt.mask) != bool(opt.landmarks):
        parser.error("--mask and --landmarks go together")
    if opt.au_sides and not (layout.units or opt.au_loss):
        parser.error("--au_sides goes with --model V6 or V6c, or with --au_loss")
    if opt.batch_size < 2 * opt.accumulate:
        parser.error("--batch_size: batch norm takes two clips or more of each --accumulate part")
    if opt.input == "difference":
        opt.channels = "difference"
    elif opt.channels is None:
        opt.channels = "nr" if layout.channels == "difference" else layout.channels
    if opt.epochs is None:
        opt.epochs = {"V1": 70, "V2": 70, "V6": 80, "V6c": 80, "mmnet": 74}.get(opt.model, 100)
    kinds = "" if opt.channels in ("hsv", "difference") else opt.channels
    for scale, kind in (("column", "s"), ("fixed", "n")):
        if opt.scale == scale and kind not in kinds:
            parser.error(f"--scale {scale}: goes with channels {kind}; the motion is "
                         f"{opt.channels}")
    if opt.mask:
        opt.mask = sorted(set(opt.mask))  # in any order it is one run
    check_stages(parser, opt, layout)
    options.check_results(parser, opt)


def check_stages(parser, opt, layout):
    """The epochs of V6's stages; other variants have none."""
    given = [name for name in ("au_epochs", "unfreeze_epoch") if getattr(opt, name) is not None]
    if given and not layout.units:
        parser.error(f"--{given[0]} goes with --model V6 or V6c")
    if not layout.units:
        opt.free |= {"au_epochs", "unfreeze_epoch"}  # say nothing of this network
    if opt.au_epochs is None:
        opt.au_epochs = 70
    if opt.unfreeze_epoch is None:
        opt.unfreeze_epoch = 50
        if layout.units and opt.epochs < 80:
            opt.unfreeze_epoch = opt.epochs * 5 // 8
            print(f"the last layer alone for {opt.unfreeze_epoch} of {opt.epochs} epochs, as for "
                  f"50 of 80")
    elif opt.unfreeze_epoch >= opt.epochs:
        parser.error(f"--unfreeze_epoch {opt.unfreeze_epoch}: not before the end of --epochs "
                     f"{opt.epochs}, so that nothing would be unfrozen")


def add_data_options(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--data_folder", free=True, required=True, metavar="DIR",
                      help="folder that prepare.py casme2 wrote")
    data.add_argument("--protocol", choices=options.PROTOCOLS, default="loso",
                      help="leave one subject out, or ten or five groups of whole subjects")
    data.add_argument("--part", free=True, metavar="SUBJECTS", default="all",
                      help="only these held-out subjects, merged with those finished before: "
                           "numbers 5,16 or [5,16,7] and ranges 1-4 of every database, names "
                           "sub05 or smic/s1, a database smic, hardest or hardest_7 (CASME II's "
                           "published list, chosen by test scores)")
    data.add_argument("--size", type=number(int, 32, 1024), default=224,
                      help="side of the frames, pixels, a multiple of 16 that the grid of the "
                           "position module follows; 112 takes a quarter of the time")
    data.add_argument("--au_sides", action="store_true",
                      help="keep action units of the left and the right side apart, which "
                           "change sides in mirrored clips")


def add_model_options(parser):
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=tuple(mmnet.LAYOUTS), default="V3NR", metavar="NAME",
                       help="variant: " + ", ".join(mmnet.LAYOUTS))
    model.add_argument("--input", choices=("flow", "difference"),
                       help="motion between the frames, of mmnet from onset to apex: optical flow, "
                            "or RGB differences [flow; difference for mmnet without --channels]")
    model.add_argument("--channels", choices=(*mmnet.SETS, "hsv"),
                       help="channels of a step of flow: n spread from -1 to 1, r in pixels, s "
                            "standardised, hsv as colours [the variant's; nr for mmnet]")
    model.add_argument("--scale", choices=("map", "column", "fixed"), default="map",
                       help="map: n and s of each map; column: s of each column, as published; "
                            "fixed: n divides by one length, typical of the training clips; "
                            "each with channels of that kind")
    model.add_argument("--mask", nargs="+", choices=("eyes", "jaw"), metavar="PART",
                       help="eyes, jaw: parts of the face that are blanked [none]")
    model.add_argument("--landmarks", free=True, metavar="FILE.csv",
                       help="key,x1,y1,...,x68,y68 of each clip, pixels of frames.npy")
    model.add_argument("--pretrained", free=True, metavar="FILE",
                       help="published checkpoint, or one of this script, to start from; its last "
                            "layers may differ [none]")


def add_optimisation_options(parser):
    group = parser.add_argument_group(
        "optimisation", "defaults from the published code (C) or from the text of its notes (T)")
    group.add_argument("--batch_size", type=positive_int, default=32,
                       help="clips per step (C; V3, V5, V6 there: 36)")
    group.add_argument("--accumulate", type=positive_int, default=1,
                       help="parts that a batch is computed in, for the memory's sake; batch "
                            "norm sees a part, and another number draws other jitters and crops")
    group.add_argument("--epochs", type=positive_int, help="passes over the data; the last one "
                       "counts [C: V1, V2 70; V3 to V5 100; mmnet 74; T: V6 80 after --au_epochs]")
    group.add_argument("--learning_rate", type=number(float, 0), default=8e-4,
                       help="initial rate of AdamW (C)")
    group.add_argument("--lr_gamma", type=number(float, 0, 1), default=0.987,
                       help="factor of the rate per epoch (C)")
    group.add_argument("--plateau_epoch", type=number(int, 0), default=50,
                       help="epochs after which the rate stays (C)")
    group.add_argument("--weight_decay", type=number(float, 0), default=0.6, help="of AdamW (C)")
    options.add_loss_option(group)
    group.add_argument("--au_loss", type=number(float, 0), default=0.0, metavar="X",
                       help="weight of an auxiliary loss on the action units of training clips, "
                            "for variants other than V6, V6c; 0: none")
    group.add_argument("--au_epochs", type=positive_int,
                       help="V6, V6c: epochs of the first stage, on action units alone [T: 70; "
                            "C: 80]")
    group.add_argument("--unfreeze_epoch", type=number(int, 0),
                       help="V6, V6c: epochs of the second stage that train the last layer alone "
                            "[T: 50 of 80, 5/8 of fewer --epochs; C: 35]; V6c's threshold passes "
                            "the gradient straight through, where the published code has none")
    group.add_argument("--select", choices=("fixed", "inner"), default="fixed",
                       help="inner: a fifth of the training subjects is not trained on and chooses "
                            "the epoch; fixed: the last one")


def run_name(opt):
    rate = record.rate_name(opt.learning_rate, opt.weight_decay, opt.batch_size)
    return record.join_name(
        "mmnet", opt.model, rate, opt.channels, opt.scale * (opt.scale != "map"),
        record.size_name(opt.size), "_".join(opt.mask or ()), "pretrained" * bool(opt.pretrained),
        opt.protocol, opt.loss, f"units_{opt.au_loss:g}" * (opt.au_loss > 0),
        "sides" * opt.au_sides, "inner" * (opt.select == "inner"),
        "amp" * opt.amp, f"seed_{opt.seed}", opt.tag)


# ---------------------------------------------------------------- data and model

def set_loader(opt):
    """(dataset.Data, the action units of each clip, dataset.Folds)"""
    data, units = dataset.read_videos(opt.data_folder, opt.size, opt.au_sides)
    if opt.model == "mmnet" and data.images.info.get("middle") == "published":
        raise BadInput(f"{opt.data_folder}: --model mmnet sees the apex, which is not among the "
                       f"five frames of --middle published; prepare the set without that flag")
    opt.subject = chosen_subjects(opt.part, data.clips)
    opt.free.add("subject")  # as --part
    opt.flags = {**opt.flags, "subject": "--part"}
    print(f"{len(data.clips)} clips, {len(data.clips.people)} subjects")
    return data, units, heldout.split(opt.protocol, data.clips)


def learns_units(opt):
    """Whether the network learns action units, in a stage or besides."""
    return bool(mmnet.LAYOUTS[opt.model].units or opt.au_loss)


def set_job(opt, data, units, members, name, device, masks=None):
    """A network from scratch, and what it is trained with, on the clips `members`; masks: what
    --mask leaves of each clip."""
    torch.manual_seed(epochs.seed_of(opt.seed, name))
    layout, targets, names = mmnet.LAYOUTS[opt.model], None, None
    if learns_units(opt):
        # those of the training clips alone: what the others show is not known
        names = videos.unit_names(units[i] for i in members)
        targets = np.stack([videos.multi_hot(shown, names) for shown in (
            units, map(videos.mirrored_units, units))])
    network = mmnet.create_mmnet(opt.model, data.clips.n_label,
                                 None if targets is None else targets.shape[2], opt.channels,
                                 opt.size)
    if opt.pretrained:
        motion.load_pretrained(network, opt, data.clips.classes, names)
    network = network.to(device).channels_last()
    scale = opt.scale
    if scale == "fixed":
        # clips without motion are 0 by whatever is more than none
        scale = max(float(motion.typical_motion(data.images)[members].mean()), flow.FLAT)
    source = motion.Source(data.images, layout.steps, opt.channels, scale, opt.model == "mmnet",
                           masks)
    precision = devices.mixed_precision(opt.amp, device)
    # folds are dealt to ranks, so that a network has one rank's devices
    run = network if distributed.active() else distributed.wrap(network, device,
                                                                precision.autocast)
    return motion.Job(network, run, source, data.clips.labels, targets, members,
                      set_optimizer(opt, network), precision, names)


def set_optimizer(opt, network):
    # one pass over all weights, on the CPU three to four times as fast
    return torch.optim.AdamW(network.parameters(), opt.learning_rate,
                             weight_decay=opt.weight_decay, fused=True)


# ---------------------------------------------------------------- training

def stage_of(opt, epoch):
    """(stage, number of the epoch within it, whether a new optimizer begins) of an epoch."""
    if not mmnet.LAYOUTS[opt.model].units:
        return "all", epoch, False
    if epoch <= opt.au_epochs:
        return "units", epoch, False
    number = epoch - opt.au_epochs
    return "last" if number <= opt.unfreeze_epoch else "all", number, number == 1


def tune(opt, held, group, units, device):
    """Trains for the persons of a Group on all other clips, going on from its checkpoint where
    there is one. Returns (the trained motion.Job, what is kept of their predictions: history, or
    the choice of inner subjects)."""
    data, name = held.data, group.name
    out = data.clips.members(group.out)
    members = np.setdiff1d(np.arange(len(data.clips)), out)
    best = Best(data.clips, members) if opt.select == "inner" else None
    job = set_job(opt, data, units, members if best is None else best.rest, name, device,
                  held.masks)
    held.check_pretrained()  # after it was read
    epochs.announce_dropped(len(job.members), opt.batch_size)
    state, history = held.states.pop(name, None) or {"epoch": 0}, []
    if state["epoch"] or state.get("within"):
        record.say_where(name, state)
        job.network.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
        job.precision.scaler.load_state_dict(state["scaler"])
        history = state["history"]
        if best:
            best.restore(state["best"])

    def train(epoch, within, on_step):
        nonlocal job
        stage, number, anew = stage_of(opt, epoch)
        if anew and not within:
            if best:
                best.take(job.network)
            job = job._replace(optimizer=set_optimizer(opt, job.network))
        means = motion.train_epoch(opt, job, stage, epoch, number, within, on_step)
        if best:
            means |= best.follow(job, stage, number)
        elif stage != "units":
            history.append(motion.predict(job, out)[0].argmax(1).tolist())
        return means

    def keep(epoch, within):
        checkpoint.save(held.run.last(name), {
            "system": "MMNet", "opt": vars(opt), "unit": name, "epoch": epoch, "within": within,
            "history": history, "model": job.network.state_dict(),
            "optimizer": job.optimizer.state_dict(),
            "scaler": job.precision.scaler.state_dict(), "best": best and best.state,
            "classes": data.clips.classes, "units": job.units,
            "data_digest": held.header["data_digest"],
            "encoder_sha256": None, "seen": held.seen(members), **held.besides})

    stages = opt.epochs + opt.au_epochs * bool(mmnet.LAYOUTS[opt.model].units)
    loop = epochs.Loop(opt.changed(epochs=stages), held.log, name,
                       epochs.per_epoch(len(job.members), opt.batch_size))
    loop.run(train, keep, state["epoch"], state.get("within"))
    if best:
        best.take(job.network)
        keep(stages, None)  # the network that predicts, in place of the last epoch's
        return job, lambda mine: {"choice": best.choice()}
    return job, lambda mine: {"history": np.array(history).T[mine].tolist()}


def evaluate(opt, argv, device, data, units, folds):
    """Trains what is left to do and writes the results: (run folder, results or None)."""
    run = record.Run(opt.save_path, run_name(opt), opt)
    held = HeldOutVideos(run, argv, __file__, data, folds, units if learns_units(opt) else None)
    for group in held.groups:
        out = data.clips.members(group.out)
        job, notes = tune(opt, held, group, units, device)
        said, maps, _ = motion.predict(job, out)
        held.keep(group, out, said, notes, held.attention_of_mistakes(out, said, maps))
        run.finished(group.name)
    return run.folder, held.finish(protocol=opt.protocol)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = devices.local_device(opt.device)
    with distributed.group(device):
        data, units, folds = set_loader(opt)
        seeds.run_each(opt, lambda one: evaluate(one, argv, device, data, units, folds),
                       run_name)


if __name__ == "__main__":
    main()
