"""Stage 3 of DVSCL: a pre-trained encoder and a linear head, trained for each held-out subject.

  python fine-tune_DVSCL.py --dataset casme3 --data_folder D --save_path results --tb_path tb \\
      --model_path runs/RUN/last.pth --model alexnet --learning_rate 0.1 --layer 5

Every held-out subject starts from a fresh copy of the pre-trained encoder and the head that
probing would give it, and trains both for a fixed number of epochs; the last one counts.
`--protocol 10fold` holds out ten groups of subjects instead; `--subject A B` does some of them and
merges what is finished; `--subject all` trains one model on every clip, for prediction. Expect
some ten minutes a subject on two CPU cores, seconds with --freeze_encoder.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split

import numpy as np
import torch

import dataset
from evaluation import descent, heldout, pictures, probing, seeds
from training import checkpoint, devices, distributed, epochs, options, record, supervised

VIEWS = 2  # of a training image, from which the head is solved: plain and mirrored


# ---------------------------------------------------------------- options

def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    data, _ = options.add_head_options(parser, "fine-tune", "loso")
    data.add_argument("--subject", nargs="+", metavar="NAME", free=True,
                      help="only these held-out subjects, merged with those finished before; all: "
                           "one model on every clip, for prediction [each subject in turn]")
    add_method_options(parser)
    optimisation = options.add_optimisation_options(
        parser, options.Descent(128, 0.1, [10, 20], 0.1, 30, "initial learning rate of the head",
                                "; a solved head keeps its penalty instead"),
        options.Schedule("step", 2, " of the encoder"))
    options.add_running_options(parser)
    options.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 10)
    opt = parser.parse_args(argv)
    opt.lr_schedule = options.choose_schedule(
        parser, util.given(optimisation, argv), opt.lr_schedule, opt.warmup_epochs, opt.epochs)
    options.check_options(parser, opt)
    options.check_balance(parser, opt)
    if opt.oversample and opt.freeze_encoder:
        parser.error("--oversample excludes --freeze_encoder, whose heads share their batches")
    if opt.l2 is not None and opt.head != "probe":
        parser.error("--l2 goes with --head probe")
    if opt.subject and "all" in opt.subject and len(opt.subject) > 1:
        parser.error("--subject all stands alone")
    if opt.subject == ["all"] and "{" in opt.model_path.replace("{seed}", ""):
        parser.error(f"--model_path {opt.model_path}: --subject all holds nobody out; name one "
                     f"checkpoint")
    if opt.train_bn and (opt.batch_size == 1 or opt.freeze_encoder):
        parser.error("--train_bn needs a --batch_size of 2 or more and an encoder that trains")
    return opt


def add_method_options(parser):
    method = parser.add_argument_group("method")
    method.add_argument("--head", choices=("probe", "zero", "random"), default="probe",
                        help="what the head starts from: probe: the one that linear probing gives "
                             "on the encoder as it is, whose penalty it keeps; zeros; or random "
                             "weights")
    options.add_penalty_option(method)
    method.add_argument("--freeze_encoder", action="store_true",
                        help="train the head alone, in one pass; what is said of the encoder's "
                             "rate and of checkpoints has nothing to act on then")
    method.add_argument("--encoder_lr", type=util.number(float, 0), default=0.0001,
                        help="initial learning rate of the encoder; 0.001 suits a pre-trained one "
                             "on few clips")
    method.add_argument("--trust", type=util.number(float, 0), default=0.001, metavar="SHARE",
                        help="the rate times a gradient is this share of the length of the "
                             "encoder's weights at most, before momentum, which makes up to "
                             "1 / (1 - momentum) times that of it; 0: no limit, for an encoder "
                             "trained from scratch")
    method.add_argument("--train_bn", action="store_true",
                        help="let batch-norm statistics move, from those of the training clips; "
                             "else they stay those of pre-training")
    options.add_loss_option(method)
    method.add_argument("--oversample", action="store_true",
                        help="draw training clips so that all classes are equally frequent")


def run_name(opt):
    return heldout.head_run_name(
        "finetune", opt, record.rate_name(opt.learning_rate, opt.weight_decay, opt.batch_size),
        f"elr_{opt.encoder_lr:g}" * (not opt.freeze_encoder),
        f"trust_{opt.trust:g}" * (opt.trust != 0.001),
        heldout.penalty_name(opt.l2) if opt.head == "probe" else opt.head, opt.protocol,
        opt.encoder, opt.loss, "frozen" * opt.freeze_encoder, "oversample" * opt.oversample,
        "bn" * opt.train_bn, "all" * (opt.subject == ["all"]))


# ---------------------------------------------------------------- where training starts

def set_loader(opt):
    """(dataset.Data, dataset.Folds)"""
    data = heldout.read_labelled(opt)
    folds = dataset.Folds([], np.full(len(data.clips), -1))  # of --subject all
    if opt.subject != ["all"]:
        folds = heldout.split(opt.protocol, data.clips)
    print(f"{len(data.clips)} clips, {len(data.clips.people)} subjects")
    return data, folds


def set_model(opt, encoders, path, name, device):
    """A fresh copy of the pre-trained encoder with a fresh head of the training's own seed."""
    torch.manual_seed(epochs.seed_of(opt.seed, name))
    classifier = encoders.load(path, encoders.create_head())
    classifier.encoder.to(memory_format=torch.channels_last)
    return classifier.to(device)


def set_optimizer(opt, classifier, scale, penalty):
    """SGD with a rate for the encoder and one for the head, which is --learning_rate times
    `scale` (descent.rate_scale); `base` keeps the initial rates, `warmup` whose rate rises first.

    penalty: of the head's weights, as the solved head had it; None: --weight_decay.
    """
    rate, linear = opt.learning_rate * scale, classifier.head.classifier
    decays = [opt.weight_decay] * 2 if penalty is None else [penalty, 0]
    groups = [{"params": classifier.encoder.parameters(), "lr": opt.encoder_lr,
               "base": opt.encoder_lr, "warmup": opt.warmup_epochs}]
    groups += [{"params": [part], "lr": rate, "base": rate, "warmup": 0, "weight_decay": decay}
               for part, decay in zip((linear.weight, linear.bias), decays)]
    return torch.optim.SGD(groups, momentum=opt.momentum, weight_decay=opt.weight_decay)


# ---------------------------------------------------------------- training

def tune(opt, place, path, name, out, start, device):
    """Trains from a pre-trained encoder on all clips but those `out`, under a name, going on from
    its checkpoint where there is one.

    place: gives run, log, encoders, states and header. Returns (classifier, probabilities
    `[len(out), C]` of the held-out clips, their predictions after each epoch `[len(out), E]`).
    """
    data = start.data
    members = np.setdiff1d(np.arange(len(data.clips)), out)
    precision = devices.mixed_precision(opt.amp, device)
    classifier, source = set_model(opt, place.encoders, path, name, device), path
    if opt.train_bn:  # the held-out clips never enter: another encoder for each
        source = path, name
        supervised.set_norms(classifier, data.images, members, opt.batch_size)
    start.encode(source, classifier)
    length, l2 = start.fit(classifier.head, out)
    scale = descent.rate_scale(length, start.encoded.positions)
    epochs.announce_dropped(len(members), opt.batch_size)
    print(f"{name}: learning rate of the head {opt.learning_rate:g} x {scale:.3g}, of the "
          f"encoder {opt.encoder_lr:g}")
    optimizer = set_optimizer(opt, classifier, scale, None if l2 is None else l2 * length)
    state, history = place.states.pop(name, None) or {"epoch": 0}, []
    if state["epoch"] or state.get("within"):
        record.say_where(name, state)
        classifier.restore(state)
        optimizer.load_state_dict(state["optimizer"])
        precision.scaler.load_state_dict(state["scaler"])
        history = state.get("history") or []
    job = supervised.Training(classifier, data.clips, data.images, members, optimizer, precision)

    def predict():
        return supervised.predict(classifier, data.images, out, precision.autocast,
                                  opt.batch_size)

    def train(epoch, within, on_step):
        means = supervised.train_epoch(opt, job, epoch, within, on_step)
        if len(out):
            history.append(predict().argmax(1).tolist())
        return means | {"learning_rate": optimizer.param_groups[1]["lr"] / scale}

    def keep(epoch, within):
        save(opt, place, path, name, job, epoch=epoch, within=within, history=history,
             optimizer=optimizer.state_dict(), scaler=precision.scaler.state_dict())

    loop = epochs.Loop(opt, place.log, name, epochs.per_epoch(len(members), opt.batch_size))
    loop.run(train, keep, state["epoch"], state.get("within"))
    return classifier, predict() if len(out) else None, np.array(history).T


def save(opt, place, path, name, job, **progress):
    """The training's checkpoint: all that prediction and --resume need."""
    clips, seen = job.clips, place.encoders.seen[path]  # whom the encoder saw before
    people = [list(p) for p in
              sorted({clips.clips[i].person for i in job.members} | seen.people)]
    checkpoint.save(place.run.last(name), {
        "opt": vars(opt) | {"feat_dim": job.classifier.encoder.feat_dim}, "unit": name,
        **job.classifier.state(), "classes": clips.classes,
        "view": opt.view, "channels": list(clips.channels), "encoding": clips.encoding,
        "data_digest": place.header["data_digest"],
        "encoder_sha256": place.encoders.sha256[path],
        "seen": {"people": people if seen.complete else None, "named": people,
                 "clips": len(job.members)},
        **progress})


def evaluate(opt, argv, device, data, folds):
    """Trains what is left to do and writes the results: (run folder, results or None)."""
    run = record.Run(opt.save_path, run_name(opt), opt)
    if opt.subject == ["all"]:
        return run.folder, train_everybody(opt, argv, device, data, folds, run)
    held = heldout.HeldOut(run, argv, __file__, data, None if opt.freeze_encoder else folds)
    start = probing.Start(opt, data, VIEWS)
    for group in held.groups:
        if opt.freeze_encoder:
            heldout.keep_frozen(held, group, *heldout.train_frozen(held, group, folds, recipe(opt),
                                                                   device))
            continue
        out = data.clips.members(group.out)
        classifier, said, history = tune(opt, held, group.path, group.name, out, start, device)
        weight = classifier.head.plain_weight().detach()
        held.keep(group, out, said, lambda mine, of=history: {"history": of[mine].tolist()},
                  held.maps_of_mistakes(classifier, out, said, lambda _, c, of=weight: of[c]))
        run.finished(group.name)
    return run.folder, held.finish(protocol=opt.protocol)


def recipe(opt):
    """How heads on the encoder as it is are trained."""
    return probing.Recipe("sgd", VIEWS, opt.loss, opt.head)


def train_everybody(opt, argv, device, data, folds, run):
    """One model on every clip: last.pth, with which predict.py works."""
    place = heldout.Everybody(run, argv, __file__, data)
    if not distributed.first():
        return
    path = place.encoders.source
    if not opt.freeze_encoder:
        tune(opt, place, path, "all", np.array([], int), probing.Start(opt, data, VIEWS), device)
    elif "all" in place.states:
        print(f"{run.last()}: finished")
    else:
        classifier = place.encoders.load(path).to(device)
        heads = probing.train_frozen(opt, classifier, data, folds, [len(folds.names)], recipe(opt),
                                     place.log, "all").heads
        classifier.head.load_state_dict(heads.state(0))
        save(opt, place, path, "all", supervised.Training(
            classifier, data.clips, data.images, np.arange(len(data.clips)), None, None),
            epoch=opt.epochs, within={})
    pictures.draw_curves(run.folder)
    run.print_places(checkpoint="last.pth", log="log.jsonl", curves="curves.png")


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = devices.local_device(opt.device)
    with distributed.group(device):
        data, folds = set_loader(opt)
        seeds.run_each(opt, lambda one: evaluate(one, argv, device, data, folds), run_name)


if __name__ == "__main__":
    main()
