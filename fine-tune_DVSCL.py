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
import zlib

import numpy as np
import torch
from tqdm import tqdm

from evaluation import heldout, logistic, probing
from images import decoding, transforms
from training import checkpoint, distributed, options

VIEWS = 2  # of a training image, from which the head is solved: plain and mirrored

def parse_option(argv):
    parser = options.ArgumentParser(description=__doc__)
    data, _ = heldout.add_head_options(parser, "fine-tune", "loso")
    data.add_argument("--subject", nargs="+", metavar="NAME",
                      help="only these held-out subjects, merged with those finished before; all: "
                           "one model on every clip, for prediction [each subject in turn]")
    method = parser.add_argument_group("method")
    method.add_argument("--head", choices=("probe", "zero", "random"), default="probe",
                        help="what the head starts from: probe: the one that linear probing gives "
                             "on the encoder as it is, whose penalty it keeps; zeros; or random "
                             "weights")
    heldout.add_penalty_option(method)
    method.add_argument("--freeze_encoder", action="store_true",
                        help="train the head alone; what is said of the encoder's rate has "
                             "nothing to act on then")
    method.add_argument("--encoder_lr", type=options.number(float, 0), default=0.0001,
                        help="initial learning rate of the encoder; 0.001 suits a pre-trained one "
                             "on few clips")
    method.add_argument("--trust", type=options.number(float, 0), default=0.001, metavar="SHARE",
                        help="a gradient moves the encoder by this share of its weights' length at "
                             "most; 0: no limit, for an encoder trained from scratch")
    method.add_argument("--train_bn", action="store_true",
                        help="let batch-norm statistics move, from those of the training clips; "
                             "else they stay those of pre-training")
    method.add_argument("--loss", choices=("crossentropy", "focal", "balanced"),
                        default="crossentropy",
                        help="focal: gamma 2; balanced: classes weighted by n/(C n_c) of the "
                             "training clips")
    method.add_argument("--oversample", action="store_true",
                        help="draw training clips so that all classes are equally frequent")
    optimisation = options.add_optimisation_options(
        parser, 128, 0.1, [10, 20], 0.1, 30, "initial learning rate of the head", "step", 2,
        " of the encoder", decayed="; a solved head keeps its penalty instead")
    options.add_running_options(parser)
    heldout.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 10)
    opt = parser.parse_args(argv)
    options.choose_schedule(parser, opt, options.given(optimisation, argv))
    heldout.check_options(parser, opt)
    if opt.oversample and (opt.loss == "balanced" or opt.freeze_encoder):
        parser.error("--oversample excludes --loss balanced, which weights the classes already, "
                     "and --freeze_encoder, whose heads share their batches")
    if opt.l2 is not None and opt.head != "probe":
        parser.error("--l2 goes with --head probe")
    if opt.subject and "all" in opt.subject and len(opt.subject) > 1:
        parser.error("--subject all stands alone")
    if opt.train_bn and (opt.batch_size == 1 or opt.freeze_encoder):
        parser.error("--train_bn needs a --batch_size of 2 or more and an encoder that trains")
    return opt


def set_loader(opt):
    """(clips, images, digest, fold names `[F]`, fold of each clip `[N]`)"""
    clips, images, digest = heldout.read_labelled(opt)
    names, fold_of = [], np.full(len(clips), -1)  # of --subject all
    if opt.subject != ["all"]:
        names, fold_of = heldout.split(opt, clips)
    print(f"{len(clips)} clips, {len(clips.people)} subjects")
    return clips, images, digest, names, fold_of


class Encoded:
    """The features that an encoder gives before it is tuned, from which heads start."""

    def __init__(self, opt, model, head, images, labels, n_label, normalization, device):
        self.features, self.positions, _ = probing.encode(
            model, head, images, normalization, opt.layer, device,
            util.mixed_precision(opt, device)[0], VIEWS)
        self.labels, self.regression = labels, None
        if opt.head == "probe":
            self.regression = logistic.Regression(self.features, labels, n_label)

    def start(self, opt, clips, fold_of, fold, head):
        """Fits `head` to the clips outside a fold: their statistics and, with --head probe, the
        solved weights. Returns (mean squared length of what it sees, penalty or None)."""
        training = probing.training_clips(fold_of, [fold])
        stats, l2 = logistic.statistics(self.features, training), None
        length = int(stats.varies.sum())
        state = {"mean": stats.mean[0], "std": stats.std[0],
                 "classifier.weight": head.classifier.weight / length ** 0.5}
        if self.regression:
            heads, choice = probing.solve_heads(
                self.regression, self.features, self.labels, fold_of, [fold], opt.l2,
                heldout.inner_groups(clips),
                "balanced" if opt.loss == "balanced" or opt.oversample else "crossentropy")
            heldout.describe_choice(opt, choice)
            l2 = choice.l2[0]
            state |= {"classifier.weight": heads.weight[0], "classifier.bias": heads.bias[0]}
        elif opt.head == "zero":
            state["classifier.weight"] = torch.zeros_like(head.classifier.weight)
        head.load_state_dict({**head.state_dict(), **state})
        return length, l2


def set_model(opt, held, group, device):
    """A fresh copy of the pre-trained encoder, a fresh head of its own seed, and what is known of
    the encoder."""
    clips, (model, about) = held.clips, held.encoder(group.path)
    torch.manual_seed(int(np.random.SeedSequence(
        (opt.seed, zlib.crc32(group.unit.encode()))).generate_state(1)[0]))
    head = heldout.create_head(opt, clips)
    return model.to(device, memory_format=torch.channels_last), head.to(device), about


def set_norms(opt, model, images, members, normalization, device):
    """Gives the batch norms the statistics of the training clips `members`.

    Under --train_bn every step normalises with its batch; a head that starts from features
    normalised otherwise (an untrained encoder's not at all) would meet others in the first step.
    """
    parts = np.array_split(members, max(1, len(members) // opt.batch_size))
    torch.optim.swa_utils.update_bn((transforms.eval_transform(batch, normalization) for batch in
                                     decoding.fetch(images, parts, device)), model)


def set_optimizer(opt, model, head, scale, penalty):
    """SGD with a rate for the encoder and one for the head, which is --learning_rate times
    `scale` (probing.rate_scale); `base` keeps the initial rates, `warmup` whose rate rises first.

    penalty: of the head's weights, as the solved head had it; None: --weight_decay.
    """
    rate, linear = opt.learning_rate * scale, head.classifier
    decays = [opt.weight_decay] * 2 if penalty is None else [penalty, 0]
    groups = [{"params": model.parameters(), "lr": opt.encoder_lr, "base": opt.encoder_lr,
               "warmup": opt.warmup_epochs}]
    groups += [{"params": [part], "lr": rate, "base": rate, "warmup": 0, "weight_decay": decay}
               for part, decay in zip((linear.weight, linear.bias), decays)]
    return torch.optim.SGD(groups, momentum=opt.momentum, weight_decay=opt.weight_decay)


def draw_order(opt, labels, rng):
    """Positions of one epoch's training clips, with replacement under --oversample: `[N]`."""
    if not opt.oversample:
        return torch.arange(len(labels))
    counts = np.bincount(labels)
    return torch.multinomial(torch.from_numpy(1 / counts[labels]), len(labels), True, generator=rng)


def train(epoch, opt, clips, images, members, normalization, model, head, optimizer, mixed, device,
          within, on_step):
    """One epoch over the clips `members`; returns {train_loss, train_accuracy}.

    within: {step, meters} to go on from inside the epoch; `on_step(within)` is called after every
    step.
    """
    (autocast, scaler), encoding = mixed, clips.encoding["difference"]
    means = util.Meters(("train_loss", "train_accuracy"), within.get("meters"))
    model.train(opt.train_bn)
    head.train()
    labels = clips.labels[members]
    weights = probing.class_weights(labels, clips.n_label).to(device)
    rng = util.generator(opt.seed, epoch)
    order = draw_order(opt, labels, rng)
    steps = [(step, order[index].numpy()) for step, index in
             enumerate(util.batches(len(members), opt.batch_size, rng), 1)]
    steps = steps[within.get("step", 0):]
    wanted = [members[index] for _, index in steps]
    total = len(steps) + within.get("step", 0)
    for (step, index), batch in zip(steps, decoding.fetch(images, wanted, device)):
        for part in optimizer.param_groups:
            part["lr"] = util.scheduled(opt, part["base"], epoch, step, total, part["warmup"])
        drawn = transforms.draw(len(index), util.generator(opt.seed, epoch, step), encoding, 0)
        batch = transforms.train_transform(batch, drawn, normalization, encoding, clips.channels)
        target = torch.from_numpy(labels[index]).to(device)
        with autocast():
            logits = head(*model(batch, opt.layer)).float()  # [B, C]
        loss = probing.classification_loss(logits, target, opt.loss, weights).mean()
        if not torch.isfinite(loss):
            raise util.RunFailed(f"the loss is not finite in epoch {epoch}, step {step}; the last "
                                 f"checkpoint is kept; lower --learning_rate or --encoder_lr")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        # a head of large weights would throw the encoder out of what it has learnt
        if opt.trust and opt.encoder_lr:
            encoder = [part for part in model.parameters() if part.grad is not None]
            length = torch.stack([part.detach().norm() for part in encoder]).norm().item()
            torch.nn.utils.clip_grad_norm_(encoder, opt.trust * length / opt.encoder_lr)
        scaler.step(optimizer)
        scaler.update()
        means["train_loss"].update(loss.detach(), len(index))
        means["train_accuracy"].update((logits.argmax(1) == target).float().mean(), len(index))
        on_step({"step": step, "meters": means.state()})
    return means.means()


def tune(opt, held, group, images, encoded, device):
    """Trains one of `held.groups` from its pre-trained encoder, going on from the run's last
    checkpoint where there is one, and keeps the predictions of the clips it holds out.

    encoded: dict that keeps the last Encoded.
    """
    clips, mixed = held.clips, util.mixed_precision(opt, device)
    model, head, about = set_model(opt, held, group, device)
    test = clips.members(group.out)
    members = np.setdiff1d(np.arange(len(clips)), test)
    source = group.path
    if opt.train_bn:  # the held-out clips never enter: another encoder for each unit
        source = group.path, group.unit
        set_norms(opt, model, images, members, about["normalization"], device)
    if source not in encoded:
        encoded.clear()
        encoded[source] = Encoded(opt, model, head, images, clips.labels, clips.n_label,
                                  about["normalization"], device)
    fold_of = np.zeros(len(clips), int)
    fold_of[test] = 1
    length, l2 = encoded[source].start(opt, clips, fold_of, 1, head)
    scale = probing.rate_scale(length, encoded[source].positions)
    util.announce_dropped(len(members), opt.batch_size)
    print(f"{group.unit}: learning rate of the head {opt.learning_rate:g} x {scale:.3g}, of the "
          f"encoder {opt.encoder_lr:g}")
    optimizer = set_optimizer(opt, model, head, scale, None if l2 is None else l2 * length)
    start, within = 0, {}
    found, history = None, []  # of the held-out clips: probabilities, predictions per epoch
    state = held.state(group.unit)
    if state:
        model.load_state_dict(state["model"])
        head.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        mixed[1].load_state_dict(state["scaler"])
        start, within = state["epoch"], state.get("within") or {}
        history = state.get("history") or []

    def save_last(epoch, within):
        save(opt, held, group, about, epoch, model, head, members, within, history=history,
             optimizer=optimizer.state_dict(), scaler=mixed[1].state_dict())

    with checkpoint.Keeper(opt.save_minutes) as keeper:
        for epoch in tqdm(range(start + 1, opt.epochs + 1), group.unit, disable=None):

            def on_step(within, done=epoch - 1):
                keeper.step(lambda: save_last(done, within))

            means = train(epoch, opt, clips, images, members, about["normalization"], model, head,
                          optimizer, mixed, device, within, on_step)
            within, means["learning_rate"] = {}, optimizer.param_groups[1]["lr"] / scale
            held.log.epoch(epoch, means, group.unit)
            if group.people:
                found = heldout.validate(opt, images, test, about["normalization"], model, head,
                                            mixed[0], device)
                history.append(found.argmax(1).tolist())
            if epoch % opt.print_freq == 0 or epoch == opt.epochs:
                tqdm.write(f"{group.unit}  {util.epoch_line(opt, epoch, means)}")
            if epoch % opt.save_freq == 0 or epoch == opt.epochs:
                save_last(epoch, {})
    if not group.people:
        return
    if found is None:  # stopped between the last epoch and its predictions
        found = heldout.validate(opt, images, test, about["normalization"], model, head,
                                    mixed[0], device)
    history = np.array(history).T
    for person in group.people:
        mine = np.flatnonzero(np.isin(test, clips.members([person])))
        held.keep(group.path, person, test[mine], found[mine], history=history[mine].tolist())
    held.look(group, model, head, images, test, found, device,
              lambda _, c: head.plain_weight()[c])


def save(opt, held, group, about, epoch, model, head, members, within=None, **states):
    """The unit's checkpoint: all that prediction and --resume need.

    within: what is done of the epoch after `epoch`.
    """
    clips, before = held.clips, held.seen[group.path]  # whom the encoder saw before
    people = [list(p) for p in sorted({clips.clips[i].person for i in members} | before["people"])]
    checkpoint.save(held.last(group.unit), {
        "opt": vars(opt), "epoch": epoch, "within": within or {}, "unit": group.unit,
        "model": model.state_dict(),
        "classifier": head.state_dict(), "classes": clips.classes, "layer": opt.layer,
        "view": opt.view, "channels": list(clips.channels), "encoding": clips.encoding,
        "normalization": about["normalization"], "data_digest": held.header["data_digest"],
        "encoder_sha256": held.sha256[group.path],
        "seen": {"people": people if before["all"] else None, "named": people,
                 "clips": len(members)},
        **states})


def tune_frozen(opt, held, group, images, names, fold_of, device):
    """Trains the heads of one of `held.groups` on the encoder as it is; keeps the predictions, or
    the one head of --subject all."""
    clips, state = held.clips, held.state(group.unit)
    if state and "classifier" in state:
        print(f"{held.last()}: finished")
        return
    found = heldout.train_frozen(opt, held, group, images, names, fold_of, device, "sgd",
                                    VIEWS, opt.loss, opt.head)
    if group.people:
        held.keep_frozen(group, found)
        return
    model, about = held.encoder(group.path)
    head = heldout.create_head(opt, clips)
    heads = found.heads
    head.load_state_dict({"mean": heads.mean[0], "std": heads.std[0],
                          "classifier.weight": heads.weight[0].detach(),
                          "classifier.bias": heads.bias[0].detach()})
    save(opt, held, group, about, opt.epochs, model, head, np.arange(len(clips)))


def evaluate(opt, argv, device, data):
    """Trains what is left to do and writes the results: (run folder, results or None)."""
    clips, images, digest, names, fold_of = data
    parts = [util.rate_name(opt), f"elr_{opt.encoder_lr:g}" * (not opt.freeze_encoder),
             f"trust_{opt.trust:g}" * (opt.trust != 0.001),
             util.penalty_name(opt) if opt.head == "probe" else opt.head, opt.protocol,
             opt.encoder, opt.loss, "frozen" * opt.freeze_encoder, "oversample" * opt.oversample,
             "bn" * opt.train_bn, "all" * (opt.subject == ["all"])]
    held = heldout.HeldOut("finetune", opt, argv, __file__, clips, digest,
                              filter(None, parts),
                              None if opt.freeze_encoder else (names, fold_of))
    encoded = {}
    for group in held.groups:
        if opt.freeze_encoder:
            tune_frozen(opt, held, group, images, names, fold_of, device)
        else:
            tune(opt, held, group, images, encoded, device)
        held.finished(group.unit)
    return held.folder, held.finish(images, protocol=opt.protocol)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = distributed.local_device(util.pick_device(opt.device))
    with distributed.group(device):
        data = set_loader(opt)
        heldout.over_seeds(opt, lambda one: evaluate(one, argv, device, data))


if __name__ == "__main__":
    main()
