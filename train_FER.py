"""FER: expressions in face photographs by a ResNet, SCN or RAN, with or without a Wasserstein term.

  python train_FER.py --dataset rafdb --data_folder RAF-DB --save_path results --tb_path tb
  python train_FER.py --dataset rafdb --data_folder RAF-DB --save_path results --tb_path tb \\
      --model scn --rank_margin 0.07 --relabel_epoch 10

A tenth of the training set is not trained on: it is there to choose by. The test split is predicted
once, at the end, by the average of the weights. With two CPU cores take --size 112.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import argparse

import torch

from evaluation import fitting, photographs, seeds
from images import faces as sets
from images import regions
from images.face_sets import VOTES
from models import files
from models.ran import NETWORKS, create_network
from models.scn import ARCHITECTURES
from training import checkpoint, devices, distributed, faces, losses, options, pretrained, record
from util import BadInput, ensure, number, positive_int, read_table

RATES = {"adamw": 2e-4, "adam": 1e-3, "sgd": 1e-2, "rmsprop": 1e-3}
PUBLISHED = {"augment": "published", "label_smoothing": 0.0, "ema_decay": 0.0, "tta_flip": False,
             "warmup_epochs": 0.0, "optimizer": "adam", "lr_schedule": "exponential", "epochs": 70,
             "batch_size": 64}  # their rates are those of the optimizer and the schedule


def recipe_of(opt):
    """What a --recipe sets, where no flag says otherwise."""
    if opt.recipe == "strong":
        return {}
    if opt.recipe == "notes":
        size = 72 if opt.model == "ran" else 450 if opt.gaussian else 600
        chosen = PUBLISHED | {"batch_size": size, "epochs": 30, "learning_rate": 1e-3}
        return chosen | ({"optimizer": "sgd", "momentum": 0.0, "epochs": 300}
                         if opt.wloss_alpha else {})
    return PUBLISHED | {
        "scn": {"rank_margin": 0.07, "relabel_epoch": 10, "relabel_group": "all"},
        "ran": {"optimizer": "sgd", "lr_schedule": "step", "epochs": 40, "augment": "flip",
                "views": "fixed", "region_margin": 0.02,
                "bn_per_view": norms_move(opt)}}.get(opt.model, {})


def norms_move(opt):
    """Whether there are batch norms that follow the batches."""
    return not opt.freeze_backbone or opt.gaussian


# ---------------------------------------------------------------- options

def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    add_data_options(parser)
    add_model_options(parser)
    add_optimisation_options(parser)
    options.add_running_options(parser)
    options.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 10)
    chosen = recipe_of(parser.parse_args(argv))
    parser.set_defaults(**chosen)
    opt = parser.parse_args(argv)
    if opt.learning_rate is None:
        opt.learning_rate = RATES[opt.optimizer]
    if opt.backbone_lr is None:
        opt.backbone_lr = opt.learning_rate
    if opt.lr_decay_rate is None:
        opt.lr_decay_rate = 0.1 if opt.lr_schedule == "step" else 0.9
    opt.warmup_derived = opt.warmup_epochs is None  # from --epochs, which may grow
    opt.free.add("warmup_derived")
    if opt.warmup_derived:
        opt.warmup_epochs = min(5.0, opt.epochs / 4)
    if opt.views is None:
        opt.views = "fixed" if opt.model == "ran" else "whole"
    decays = ["lr_decay_rate"] * (opt.lr_schedule in ("exponential", "step"))
    shown = {name: getattr(opt, name) for name in (*PUBLISHED, "learning_rate", *decays, *chosen)}
    print(f"--recipe {opt.recipe}: " + ", ".join(  # as they can be given
        f"--{'no-' * (not value)}{name}" if isinstance(value, bool) else f"--{name} {value}"
        for name, value in shown.items()))
    if not norms_move(opt):
        opt.free.add("bn_per_view")  # which was there, and changed nothing, in earlier releases
    if opt.model_path:  # in whose place the network starts from it
        opt.pretrained = "none"
        opt.free.add("pretrained")  # runs of earlier releases have the default there
    for name in ("relabel_epoch", "wloss_update"):
        if getattr(opt, name) > opt.epochs:
            print(f"--{name} {getattr(opt, name)}: after the last of {opt.epochs} epochs, so that "
                  f"it changes nothing")
    check_options(parser, opt, argv)
    return opt


def check_options(parser, opt, argv):
    def needs(given, flag, holds, what):
        if given and not holds:
            parser.error(f"{flag} goes with {what}")
    options.check_given(parser, argv, (
        (("--votes",), opt.dataset == "ferplus", "--dataset ferplus"),
        (("--rank_beta",), opt.rank_margin or (opt.relabel_epoch and opt.relabel_group == "low"),
         "--model scn, and --rank_margin or --relabel_epoch with --relabel_group low"),
        (("--backbone_lr",), not opt.freeze_backbone, "a backbone that moves, not "
         "--freeze_backbone"),
        (("--bn_per_view",), norms_move(opt), "batch norms that move, not --freeze_backbone "
         "without --gaussian"),
        (("--relabel_margin", "--relabel_group"), opt.relabel_epoch, "--relabel_epoch"),
        (("--wloss_norm", "--wloss_distance", "--wloss_reduction"), opt.wloss_alpha,
         "--wloss_alpha"),
        (("--pretrained",), not opt.model_path, "a fresh start, not --model_path"),
        (("--momentum",), opt.optimizer in ("sgd", "rmsprop"), "--optimizer sgd or rmsprop"),
        (("--lr_decay_rate",), opt.lr_schedule in ("exponential", "step"),
         "--lr_schedule exponential or step")))
    needs(opt.warmup_epochs > opt.epochs, "--warmup_epochs", False, "at most the --epochs")
    needs(opt.rank_margin, "--rank_margin", opt.model == "scn", "--model scn")
    needs(opt.relabel_epoch and opt.relabel_group == "low", "--relabel_group low",
          opt.model == "scn", "--model scn; give --relabel_group all")
    certain = losses.n_certain(opt.batch_size, opt.rank_beta)
    needs(opt.rank_margin, f"--rank_margin at --rank_beta {opt.rank_beta:g}",
          0 < certain < opt.batch_size, f"another share: one of the two groups of a batch of "
          f"{opt.batch_size} is empty")
    needs(opt.relabel_epoch and opt.relabel_group == "low", f"--relabel_group low at --rank_beta "
          f"{opt.rank_beta:g}", certain < opt.batch_size, "a smaller share: no image of a batch is "
          "of low importance")
    needs(opt.region_margin, "--region_margin", opt.model == "ran", "--model ran")
    needs(opt.bn_per_view, "--bn_per_view", opt.model == "ran", "--model ran")
    needs(opt.views != "whole", f"--views {opt.views}", opt.model == "ran", "--model ran")
    needs(opt.model == "ran", "--model ran", opt.views != "whole", "--views fixed, paper, random "
          "or landmark")
    limit = losses.region_limit(regions.N_VIEWS[opt.views])
    needs(opt.region_margin > limit, "--region_margin", False,
          f"margins below {limit:.3f}: no crop of {regions.N_VIEWS[opt.views]} views can exceed "
          f"the whole image by more")
    needs(opt.views == "landmark" or opt.gaussian, "--views landmark" if opt.views == "landmark"
          else "--gaussian", opt.landmarks, "--landmarks FILE")
    needs(opt.landmarks, "--landmarks", opt.gaussian or opt.views == "landmark",
          "--gaussian or --views landmark")
    needs(opt.wloss_update, "--wloss_update", opt.wloss_alpha, "--wloss_alpha")
    options.check_balance(parser, opt)
    if opt.weight_decay > 0.1:
        print(f"warning: --weight_decay {opt.weight_decay:g} is strong; where notes say .9, it is "
              f"the factor of the rate: --lr_decay_rate 0.9")
    options.check_results(parser, opt)


def add_data_options(parser):
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=sets.SETS, required=True,
                      help="layout and classes; folder: class folders of anything, below split "
                           "folders or not")
    data.add_argument("--data_folder", free=True, required=True, metavar="DIR",
                      help="folder of the set, as it is handed out")
    data.add_argument("--votes", choices=VOTES, default="majority",
                      help="ferplus: majority: a class with more than half of the votes; "
                           "plurality: the one with most")
    data.add_argument("--size", type=number(int, 32, 1024), default=224,
                      help="side of the images, pixels; 112 takes a quarter of the time")
    data.add_argument("--landmarks", free=True, metavar="FILE.csv",
                      help="path,x1,y1,…: 68 or 5 points of each image, pixels [none]")
    data.add_argument("--val_fraction", type=number(float, 0, 0.9), default=0.1,
                      help="share of the training set that is not trained on, by class, of whole "
                           "subjects where there are any; not where the set has its own")
    data.add_argument("--noise", type=number(float, 0, 1), default=0.0,
                      help="share of the training labels that are moved to another class, those of "
                           "--val_fraction too; a set's own validation split keeps its labels")
    data.add_argument("--oversample", action="store_true",
                      help="draw training images so that all classes are as frequent")
    data.add_argument("--augment", choices=("strong", "published", "flip", "none"),
                      default="strong", help="strong: flip, turn by 15 degrees, scale, shift, "
                      "colours, erasing; published: flip or noise, erasing")
    data.add_argument("--cache", free=True, metavar="DIR|off", default="data/cache",
                      help="folder for the decoded images, 3 size² bytes each, read again by "
                           "later runs; off: keep them in memory only")


def add_model_options(parser):
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=tuple(NETWORKS), default="baseline",
                       help="baseline: a linear layer on the pooled vector; scn: self-cure "
                            "network; ran: region attention network")
    model.add_argument("--arch", choices=ARCHITECTURES, default="resnet18", help="its backbone")
    model.add_argument("--recipe", choices=("strong", "published", "notes"), default="strong",
                       help="published: what SCN and RAN published, relabelling as SCN's "
                            "code does it; notes: what the lab notes did; strong: the defaults "
                            "below. Flags that are given count")
    model.add_argument("--pretrained", metavar="none|imagenet|FILE", default="imagenet",
                       help="backbone to start from: torchvision's, or a checkpoint of "
                            "torchvision's, MS1M's, SCN's, RAN's or these scripts' naming")
    model.add_argument("--model_path", metavar="FILE", default="",
                       help="checkpoint of this script to go on from, last layer and all, such as "
                            "with --wloss_alpha from one without: the weights that predicted its "
                            "test split; a {seed} in it is replaced [none]")
    model.add_argument("--freeze_backbone", action="store_true",
                       help="train the last layers alone, and the branch of --gaussian")
    model.add_argument("--drop_rate", type=number(float, 0, 0.95), default=0.0,
                       help="dropout before the last layer, and before RAN's relation attention, "
                            "in training")
    model.add_argument("--gaussian", action="store_true",
                       help="a map of the landmarks as a fourth channel, which weighs layer1")
    method = parser.add_argument_group("method")
    method.add_argument("--rank_margin", type=number(float, 0, 1), default=0.0,
                        help="scn: margin between the groups of high and low importance; "
                             "published: 0.07 at batch 64, 0.15 at 1024; 0: no such loss")
    method.add_argument("--rank_beta", type=number(float, 0, 1), default=0.7,
                        help="scn: share of the group of high importance")
    method.add_argument("--relabel_epoch", type=number(int, 0), default=0,
                        help="first epoch that relabels; 0: none does")
    method.add_argument("--relabel_margin", type=number(float, 0, 1), default=0.2,
                        help="by how much the likeliest class exceeds the label's probability")
    method.add_argument("--relabel_group", choices=("low", "all"), default="low",
                        help="low: images of low importance alone, as the paper has it; all: as "
                             "its code")
    method.add_argument("--views", choices=tuple(regions.N_VIEWS),
                        help="ran: fixed: seven crops; paper: five; random: five; landmark: "
                             "eight about parts of the face; each and the whole image [fixed "
                             "with ran]")
    method.add_argument("--region_margin", type=number(float, 0, 1), default=0.0,
                        help="ran: by how much the best crop exceeds the whole image; published: "
                             "0.1, 0.03, 0.02; 0: no such loss")
    method.add_argument("--bn_per_view", action=argparse.BooleanOptionalAction, default=False,
                        help="ran: batch norm of each view apart, as published")
    method.add_argument("--wloss_alpha", type=number(float, 0), default=0.0,
                        help="weight of the Wasserstein term; the notes': 0.0125, of a sum")
    method.add_argument("--wloss_reduction", choices=("sum", "mean"), default="sum",
                        help="over the batch; sum, as published, makes the weight of the mean "
                             "batch_size times as large")
    method.add_argument("--wloss_distance", metavar="valence_arousal|uniform|FILE.csv",
                        default="valence_arousal",
                        help="between emotions; a file: a header class,NAME,NAME..., then a row "
                             "per class, its name first")
    method.add_argument("--wloss_norm", choices=("l1", "frobenius"), default="l1",
                        help="l1: rows of distances sum to 1; frobenius: divided by the norm")
    method.add_argument("--wloss_update", type=number(int, 0), default=0, metavar="EPOCHS",
                        help="every so many epochs distances grow by the confusion of the "
                             "validation images; 0: never")


def add_optimisation_options(parser):
    group = parser.add_argument_group("optimisation")
    options.add_loss_option(group, "logit_adjusted", noun="images", told="; logit_adjusted: logits "
                            "plus the log of the classes' shares")
    group.add_argument("--label_smoothing", type=number(float, 0, 0.9), default=0.1,
                       help="share of the target that all classes have alike")
    group.add_argument("--batch_size", type=number(int, 2), default=64, help="images per step, "
                       "over all devices")
    group.add_argument("--epochs", type=positive_int, default=40, help="passes over the data")
    group.add_argument("--optimizer", choices=tuple(RATES), default="adamw",
                       help="rule by which weights move")
    group.add_argument("--learning_rate", type=number(float, 0), help="initial rate ["
                       + ", ".join(f"{rate:g} {name}" for name, rate in RATES.items()) + "]")
    group.add_argument("--backbone_lr", type=number(float, 0),
                       help="rate of the backbone [learning_rate]")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="of sgd, rmsprop")
    group.add_argument("--weight_decay", type=number(float, 0), default=1e-4,
                       help="above 0.1 a warning: the notes' .9 is a factor of the rate")
    group.add_argument("--lr_schedule", choices=("cosine", "exponential", "step", "constant"),
                       default="cosine", help="exponential: every epoch; step: at .3, .5 and .8 "
                       "of the epochs")
    group.add_argument("--lr_decay_rate", type=number(float, 0, 1),
                       help="factor of exponential [0.9] and step [0.1]")
    group.add_argument("--warmup_epochs", type=number(float, 0),
                       help="epochs over which the rate rises [5, or a quarter of --epochs]")
    group.add_argument("--ema_decay", type=number(float, 0, 1), default=0.999,
                       help="of the average of the weights that predicts; it rises as "
                            "1 - (1 + steps)^(-2/3), to .999 in 31,600, and what it comes to is "
                            "printed; 0: the weights themselves")
    group.add_argument("--tta_flip", action=argparse.BooleanOptionalAction, default=True,
                       help="predict the mean over an image and its mirror image")
    group.add_argument("--select", choices=("last", "val"), default="last",
                       help="the epoch that counts: the last, or the best on the validation "
                            "images")


def run_name(opt):
    return record.join_name(
        "fer", opt.dataset, opt.votes * (opt.votes != "majority"), opt.model,
        opt.arch * (opt.arch != "resnet18"), opt.recipe * (opt.recipe != "strong"),
        f"lr_{opt.learning_rate:g}_bsz_{opt.batch_size}", record.size_name(opt.size),
        "continued" if opt.model_path else {"none": "scratch", "imagenet": ""}.get(
            opt.pretrained, "pretrained"), "frozen" * opt.freeze_backbone,
        opt.loss * (opt.loss != "crossentropy"),
        "oversample" * opt.oversample, opt.views * (opt.model == "ran"), "gaussian" * opt.gaussian,
        f"rank_{opt.rank_margin:g}" * (opt.rank_margin > 0),
        f"relabel_{opt.relabel_epoch}" * (opt.relabel_epoch > 0),
        "all" * (opt.relabel_epoch > 0 and opt.relabel_group == "all"),
        "per_view" * opt.bn_per_view,
        f"region_{opt.region_margin:g}" * (opt.region_margin > 0),
        f"w_{opt.wloss_alpha:g}" * (opt.wloss_alpha > 0), f"noise_{opt.noise:g}" * (opt.noise > 0),
        "val" * (opt.select == "val"), "amp" * opt.amp, f"seed_{opt.seed}", opt.tag)


# ---------------------------------------------------------------- data and model

def set_loader(opt):
    """{split: faces.Source} of the set: train, test, and val where it has one of its own."""
    splits, sources = photographs.read_splits(opt), {}
    for split, images in splits.items():
        landmarks = None
        if opt.landmarks:
            landmarks = sets.read_landmarks(opt.landmarks, images, (
                path for others in splits.values() for path in others.paths))
        if landmarks is not None and opt.views == "landmark" and landmarks.shape[1] != 68:
            raise BadInput(f"--landmarks {opt.landmarks}: {landmarks.shape[1]} points an image; "
                           f"--views landmark takes 68")
        decoded = photographs.stored(images, opt.size, opt)
        source = sources[split] = faces.Source(images, decoded, landmarks, opt.views,
                                                opt.gaussian, opt.augment)
        if len(lacking := source.without_landmarks()):
            print(f"--landmarks: {len(lacking)} of {len(images)} {split} images have none, "
                  f"{images.paths[lacking[0]]} the first")
    return sources


def read_start(opt):
    """What the file holds that the network starts from, or None: ImageNet has no faces of a test
    split."""
    if not opt.model_path:
        return None if opt.pretrained in ("none", "imagenet") else files.read(opt.pretrained)
    state = checkpoint.load(opt.model_path)
    if state.get("system") != "FER":
        raise BadInput(f"--model_path {opt.model_path}: not a checkpoint of this script; "
                       f"--pretrained takes others")
    return state


def set_model(opt, n_label, device, start=None, fresh=True):
    """The network, with what it starts from unless it goes on; start: what read_start gave."""
    torch.manual_seed(opt.seed)
    network = create_network(opt.model, n_label, opt.arch, opt.drop_rate, opt.gaussian,
                             opt.bn_per_view)
    if opt.model_path and start:
        old = start["opt"]
        if old.get("model") == opt.model and old.get("arch") != opt.arch:
            raise BadInput(f"--model_path {opt.model_path}: was trained with --arch "
                           f"{old.get('arch')}; give the same")
        if old.get("model") == opt.model and old.get("gaussian") != opt.gaussian:
            raise BadInput(f"--model_path {opt.model_path}: was trained with"
                           f"{'' if old.get('gaussian') else 'out'} --gaussian; do the same")
        which, weights = pretrained.predicting(start)
        checkpoint.load_model(network, start | {"model": weights}, opt.model_path, opt.model)
        print(f"--model_path {opt.model_path}: all {len(weights)} tensors loaded, {which} weights")
    elif start is not None or (fresh and opt.pretrained == "imagenet"):
        pretrained.load_backbone(network, opt.pretrained, opt.arch, start)
    network.features.requires_grad_(not opt.freeze_backbone)
    return network.to(device, memory_format=torch.channels_last)


def set_optimizer(opt, network):
    backbone = [part for part in network.features.parameters() if part.requires_grad]
    head = [part for name, part in network.named_parameters() if not name.startswith("features.")]
    groups = [{"params": head, "base": opt.learning_rate}]
    groups += [{"params": backbone, "base": opt.backbone_lr}] if backbone else []
    shared = {"lr": opt.learning_rate, "weight_decay": opt.weight_decay}
    if opt.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, momentum=opt.momentum, **shared)
    if opt.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=opt.momentum, fused=True, **shared)
    # one pass over all weights
    make = torch.optim.AdamW if opt.optimizer == "adamw" else torch.optim.Adam
    return make(groups, fused=True, **shared)


def set_distance(opt, classes, device):
    """Distances between the classes, float64 `[C, C]`, or None without the Wasserstein term."""
    if not opt.wloss_alpha:
        return None
    if opt.wloss_distance == "uniform":
        distance = 1 - torch.eye(len(classes), dtype=torch.float64)
    elif opt.wloss_distance == "valence_arousal":
        unknown = [name for name in classes if name not in losses.CENTRES]
        if unknown:
            raise BadInput(f"--wloss_distance valence_arousal: no centre of {unknown[0]!r}; the "
                           f"emotions are {', '.join(losses.CENTRES)}; give uniform or a file")
        return losses.emotion_distance(classes, opt.wloss_norm).to(device)
    else:
        rows, _ = read_table(opt.wloss_distance, ("class", *classes), fix="a row per class with "
                             "its distance to each")
        try:
            found = {row["class"]: [float(row[name]) for name in classes] for _, row in rows}
            ensure(len(found) == len(rows))
            distance = torch.tensor([found[name] for name in classes], dtype=torch.float64)
            ensure((distance >= 0).all() and distance.isfinite().all()
                   and not distance.diagonal().any() and distance.sum(1).all())
        except (KeyError, ValueError):
            raise BadInput(f"{opt.wloss_distance}: needs a row per class of {', '.join(classes)} "
                           f"with its distances, 0 to itself alone, none below 0") from None
    return losses.normalised(distance, opt.wloss_norm).to(device)


# ---------------------------------------------------------------- training

def train(opt, argv, device, sources):
    """One run: (its folder, its results)."""
    fit = fitting.Fit(record.Run(opt.save_path, run_name(opt), opt), sources)
    start = None if fit.resume else read_start(opt)
    if opt.model_path and start:
        fit.check_classes(start, opt.model_path)
    if start is not None:
        flag = "--model_path" if opt.model_path else "--pretrained"
        fit.start_from(flag, opt.model_path or opt.pretrained, start)
    network = set_model(opt, fit.faces.n_label, device, start, not fit.resume)
    fit.begin(network, set_optimizer(opt, network), set_distance(opt, fit.faces.classes, device))
    header = fit.run_epochs(argv, __file__)
    return fit.run.folder, fit.evaluate(header)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = devices.local_device(opt.device)
    with distributed.group(device):
        sources = set_loader(opt)
        seeds.run_each(opt, lambda one: train(one, argv, device, sources), run_name)


if __name__ == "__main__":
    main()
