"""Stage 3 of DVSCL: a pre-trained encoder and a linear head, trained for each held-out subject.

  python fine-tune_DVSCL.py --dataset casme3 --data_folder D --save_path results --tb_path tb \\
      --model_path runs/RUN/last.pth --model alexnet --learning_rate 0.1 --layer 5

Every held-out subject starts from a fresh copy of the pre-trained encoder and a fresh head and
trains for a fixed number of epochs; the last one counts. `--subject A B` does some of them and
merges what is finished; `--subject all` trains one model on every clip, for prediction. Expect
some ten minutes a subject on two CPU cores, seconds with --freeze_encoder.
"""
import zlib

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import dataset
import decoding
import distributed
import evaluation
import options
import probing
import transforms
import util
from models import create_classifier

SCALE_CLIPS = 128  # training clips from which the length of the features is taken


def parse_option(argv):
    parser = options.ArgumentParser(description=__doc__)
    data, _ = evaluation.add_head_options(parser, "fine-tune")
    data.add_argument("--subject", nargs="+", metavar="NAME",
                      help="only these held-out subjects, merged with those finished before; all: "
                           "one model on every clip, for prediction [each subject in turn]")
    method = parser.add_argument_group("method")
    method.add_argument("--freeze_encoder", action="store_true", help="train the head alone")
    method.add_argument("--encoder_lr", type=options.number(float, 0), default=0.001,
                        help="initial learning rate of the encoder")
    method.add_argument("--train_bn", action="store_true",
                        help="let batch-norm statistics move; else they stay those of pre-training")
    method.add_argument("--loss", choices=("crossentropy", "focal", "balanced"),
                        default="crossentropy",
                        help="focal: gamma 2; balanced: classes weighted by n/(C n_c) of the "
                             "training clips")
    method.add_argument("--oversample", action="store_true",
                        help="draw training clips so that all classes are equally frequent")
    options.add_optimisation_options(parser, 128, 0.1, [10, 20], 0.1, 30,
                                  "initial learning rate of the head")
    options.add_running_options(parser)
    evaluation.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 10)
    opt = parser.parse_args(argv)
    evaluation.check_options(parser, opt)
    if opt.oversample and (opt.loss == "balanced" or opt.freeze_encoder):
        parser.error("--oversample excludes --loss balanced, which weights the classes already, "
                     "and --freeze_encoder, whose heads share their batches")
    if opt.subject and "all" in opt.subject and len(opt.subject) > 1:
        parser.error("--subject all stands alone")
    if opt.train_bn and (opt.batch_size == 1 or opt.freeze_encoder):
        parser.error("--train_bn needs a --batch_size of 2 or more and an encoder that trains")
    return opt


def set_loader(opt):
    """(clips, images, digest)"""
    clips, images, digest = evaluation.read_labelled(opt)
    if len(clips.people) < 2 and opt.subject != ["all"]:
        raise util.BadInput(f"{clips.folder}: one subject; held-out evaluation takes two")
    print(f"{len(clips)} clips, {len(clips.people)} subjects")
    return clips, images, digest


def set_model(opt, held, path, unit, device):
    """A fresh copy of the pre-trained encoder, a fresh head of its own seed, and what is known of
    the encoder."""
    clips, (model, about) = held.clips, held.encoder(path)
    torch.manual_seed(int(np.random.SeedSequence(
        (opt.seed, zlib.crc32(unit.encode()))).generate_state(1)[0]))
    head = create_classifier(opt.model, opt.layer, clips.n_label, clips.channels, opt.encoder)
    return model.to(device, memory_format=torch.channels_last), head.to(device), about


def set_optimizer(opt, model, head, scale):
    """SGD with a rate for the encoder and one for the head, which is --learning_rate times
    `scale` (probing.rate_scale); `base` keeps the initial rates."""
    groups = [{"params": module.parameters(), "lr": rate, "base": rate}
              for module, rate in ((model, opt.encoder_lr), (head, opt.learning_rate * scale))]
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
    for (step, index), batch in zip(steps, decoding.fetch(images, wanted, device)):
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
        scaler.step(optimizer)
        scaler.update()
        means["train_loss"].update(loss.detach(), len(index))
        means["train_accuracy"].update((logits.argmax(1) == target).float().mean(), len(index))
        on_step({"step": step, "meters": means.state()})
    return means.means()


def tune(opt, held, group, images, device):
    """Trains one of `held.groups` from its pre-trained encoder, going on from the run's last
    checkpoint where there is one, and keeps the predictions of the clips it holds out."""
    path, people, unit = group
    clips, mixed = held.clips, util.mixed_precision(opt, device)
    model, head, about = set_model(opt, held, path, unit, device)
    test = clips.members(people)
    members = np.setdiff1d(np.arange(len(clips)), test)
    chosen = members[::-(-len(members) // SCALE_CLIPS)]
    features, positions = probing.encode(model, head, images, about["normalization"], opt.layer,
                                         device, mixed[0], members=chosen)
    scale = probing.rate_scale(features.square().sum(-1).mean().item(), positions)
    util.announce_dropped(len(members), opt.batch_size)
    print(f"{unit}: learning rate of the head {opt.learning_rate:g} x {scale:.3g}, of the encoder "
          f"{opt.encoder_lr:g}")
    optimizer, start, within = set_optimizer(opt, model, head, scale), 0, {}
    found, history = None, []  # of the held-out clips: probabilities, predictions per epoch
    state = held.state(unit)
    if state:
        model.load_state_dict(state["model"])
        head.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        mixed[1].load_state_dict(state["scaler"])
        start, within = state["epoch"], state.get("within") or {}
        history = state.get("history") or []

    def save_last(epoch, within):
        save(opt, held, path, about, unit, epoch, model, head, members, within, history=history,
             optimizer=optimizer.state_dict(), scaler=mixed[1].state_dict())

    with checkpoint.Keeper(opt.save_minutes) as keeper:
        for epoch in tqdm(range(start + 1, opt.epochs + 1), unit, disable=None):
            for part in optimizer.param_groups:
                part["lr"] = util.learning_rate(opt, epoch, part["base"])

            def on_step(within, done=epoch - 1):
                keeper.step(lambda: save_last(done, within))

            means = train(epoch, opt, clips, images, members, about["normalization"], model, head,
                          optimizer, mixed, device, within, on_step)
            within, means["learning_rate"] = {}, util.learning_rate(opt, epoch)
            held.log.epoch(epoch, means, unit)
            if people:
                found = evaluation.validate(opt, images, test, about["normalization"], model, head,
                                            mixed[0], device)
                history.append(found.argmax(1).tolist())
            if epoch % opt.print_freq == 0 or epoch == opt.epochs:
                tqdm.write(f"{unit}  {util.epoch_line(opt, epoch, means)}")
            if epoch % opt.save_freq == 0 or epoch == opt.epochs:
                save_last(epoch, {})
    if not people:
        return
    if found is None:  # stopped between the last epoch and its predictions
        found = evaluation.validate(opt, images, test, about["normalization"], model, head,
                                    mixed[0], device)
    person, = people
    held.keep(path, person, test, found, history=np.array(history).T.tolist())
    held.look(path, model, head, images, test, found, device,
              lambda _, c: head.classifier.weight[c])


def save(opt, held, path, about, unit, epoch, model, head, members, within=None, **states):
    """The unit's checkpoint: all that prediction and --resume need.

    within: what is done of the epoch after `epoch`.
    """
    clips = held.clips
    people = sorted({clips.clips[i].person for i in members})
    checkpoint.save(held.last(unit), {
        "opt": vars(opt), "epoch": epoch, "within": within or {}, "unit": unit,
        "model": model.state_dict(),
        "classifier": head.state_dict(), "classes": clips.classes, "layer": opt.layer,
        "view": opt.view, "channels": list(clips.channels), "encoding": clips.encoding,
        "normalization": about["normalization"], "data_digest": held.header["data_digest"],
        "encoder_sha256": held.sha256[path],
        "seen": {"people": [list(p) for p in people], "clips": len(members)},
        **states})


def tune_frozen(opt, held, group, images, device):
    """Trains the heads of one of `held.groups` on the encoder as it is; keeps the predictions, or
    the one head of --subject all."""
    clips, (path, people, unit) = held.clips, group
    state = held.state(unit)
    if state and "classifier" in state:
        print(f"{held.last()}: finished")
        return
    names, fold_of = dataset.subject_folds(clips)
    found = evaluation.train_frozen(opt, held, group, images, names, fold_of, device, opt.loss)
    if people:
        held.keep_frozen(path, people, found)
        return
    model, about = held.encoder(path)
    head = create_classifier(opt.model, opt.layer, clips.n_label, clips.channels, opt.encoder)
    head.classifier.load_state_dict({"weight": found.heads.weight[0].detach(),
                                     "bias": found.heads.bias[0].detach()})
    save(opt, held, path, about, unit, opt.epochs, model, head, np.arange(len(clips)))


def evaluate(opt, argv, device, data):
    """Trains what is left to do and writes the results: (run folder, results or None)."""
    clips, images, digest = data
    parts = [opt.encoder, opt.loss, *["frozen"] * opt.freeze_encoder,
             *["oversample"] * opt.oversample, *["bn"] * opt.train_bn,
             *["all"] * (opt.subject == ["all"])]
    if not opt.freeze_encoder:
        parts.insert(0, f"elr_{opt.encoder_lr:g}")
    held = evaluation.HeldOut("finetune", opt, argv, __file__, clips, digest, parts,
                              together=opt.freeze_encoder)
    for group in held.groups:
        if opt.freeze_encoder:
            tune_frozen(opt, held, group, images, device)
        else:
            tune(opt, held, group, images, device)
        held.finished(group[2])
    return held.folder, held.finish(images, protocol="loso")


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = distributed.local_device(util.pick_device(opt.device))
    with distributed.group(device):
        data = set_loader(opt)
        evaluation.over_seeds(opt, lambda one: evaluate(one, argv, device, data))


if __name__ == "__main__":
    main()
