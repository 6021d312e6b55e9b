"""A pre-trained ViT or ConvNeXt V2 fine-tuned on labelled faces: flags, network, run."""
import argparse
import re

import torch
from PIL import Image
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn

from evaluation import fitting, photographs
from images import crops, decoding
from images import faces as sets
from images.face_sets import VOTES
from models import files, load_public
from models.convnextv2 import CONVNEXT_NAMES, create_convnextv2
from models.mae import MAE_NAMES, PATCH, VIT_NAMES, create_vit
from training import (
    checkpoint,
    devices,
    distributed,
    faces,
    masked,
    masked_options,
    options,
    pretrained,
    record,
)
from util import ArgumentParser, BadInput, number

BICUBIC = Image.Resampling.BICUBIC
HEAD = re.compile(r"(^|\.)head\.(fc\.)?(weight|bias)$")  # of other classes, or in another order
SHARE = 0.009  # of the initial weights in the average at the end, with --model_ema_decay auto
# what train_FER.py has flags for, and fine-tuning leaves out
WITHOUT = {"noise": 0.0, "rank_margin": 0.0, "region_margin": 0.0, "relabel_epoch": 0,
           "wloss_alpha": 0.0, "wloss_update": 0, "freeze_backbone": False, "ema_decay": 0.0}


# ---------------------------------------------------------------- options

def add_options(parser: ArgumentParser, data_set: str, path: str | None) -> None:
    """Adds all flags; data_set, path: the defaults of --data_set and --data_path, which must be
    given where path is None."""
    data = masked_options.add_data_options(parser, "folder of the set, in the layout it is handed "
                                           "out in", path, PATCH,
                                           ", of 32 with a ConvNeXt V2")
    data.add_argument("--data_set", choices=tuple(sets.SETS), default=data_set, dest="dataset",
                      help="what it is; folder: a folder for each class, with splits or without")
    data.add_argument("--votes", choices=VOTES, default="majority",
                      help="ferplus: which label ten annotators give")
    data.add_argument("--nb_classes", type=number(int, 2),
                      help="number of classes, which must be the set's")
    data.add_argument("--val_fraction", type=number(float, 0, 0.9), default=0.1,
                      help="share of the training set that is not trained on, by class, of whole "
                           "subjects where there are any; not where the set has its own")
    masked_options.add_switch(data, "--oversample", default=False,
                              help="draw training images so that all classes are as frequent")
    add_model_options(parser)
    add_augmentation_options(parser)
    optimisation = masked_options.add_optimisation_options(parser, None)
    optimisation.add_argument("--clip_grad", type=number(float, 0, low_open=True),
                              help="length that gradients are cut to [none]")
    optimisation.add_argument("--layer_decay", type=number(float, 0, 1, low_open=True),
                              help="factor of the rate from each layer to the one before it [0.75; "
                                   "1 ConvNeXt V2]")
    optimisation.add_argument("--layer_decay_type", choices=("single", "group"), default="single",
                              help="what a layer is; single: a block; group: of a ConvNeXt V2, a "
                                   "stage, or three blocks of the third")
    options.add_loss_option(optimisation, "logit_adjusted", noun="images",
                            told="; logit_adjusted: logits plus the log of the classes' shares")
    masked_options.add_switch(optimisation, "--model_ema", default=False,
                              help="keep an average of the weights")
    optimisation.add_argument("--model_ema_decay", type=decay, default=0.9999, metavar="X|auto",
                              help="of it, per step; auto: so that less than .01 of the initial "
                                   "weights is left at the end")
    masked_options.add_switch(optimisation, "--model_ema_eval", default=False,
                              help="evaluate it beside the model")
    masked_options.add_running_options(parser, "off")
    results = parser.add_argument_group("results")
    masked_options.add_switch(results, "--eval", default=False, free=True,
                              help="train nothing: predict the test split by --resume FILE")
    results.add_argument("--select", choices=("last", "val"), default="last",
                         help="the epoch that counts: the last, or the best on the validation "
                              "images")
    masked_options.add_switch(results, "--tta_flip", default=False,
                              help="predict the mean over an image and its mirror image")
    masked_options.add_switch(results, "--oracle_curve", default=False, free=True,
                              help="also follow the test split, in curves.png and in TensorBoard "
                                   "under oracle/; picking by it is cheating")
    masked_options.add_output_options(parser, masked_options.FINETUNE[0])


def add_model_options(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=(*VIT_NAMES, *MAE_NAMES, *CONVNEXT_NAMES),
                       default="vit_base_patch16", metavar="NAME",
                       help=f"{', '.join(VIT_NAMES)}, each with mae_ before it or not, "
                            f"{', '.join(CONVNEXT_NAMES)}")
    model.add_argument("--finetune", metavar="FILE", default="",
                       help="checkpoint to start from: of main_pretrain.py or "
                            "main_pretrain_convnextv2.py, or a public one of MAE, FCMAE or timm "
                            "[none: from scratch]")
    masked_options.add_switch(model, "--global_pool", default=True,
                              help="ViT: classify the mean of the patches' tokens")
    masked_options.add_opposite(model, "--cls_token", "global_pool",
                                help="ViT: classify the class token")
    model.add_argument("--head_init_scale", type=number(float, 0, 1, low_open=True), default=0.001,
                       help="of the new head's weights, normal with deviation .02; as published, "
                            "they leave the network without a gradient for hundreds of steps: 1 "
                            "where images and epochs are few")
    model.add_argument("--drop_path", type=number(float, 0, 0.9),
                       help="share of dropped blocks, rising from 0 to this [0.1; 0 ConvNeXt V2]")


def add_augmentation_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation")
    group.add_argument("--aa", metavar="POLICY", default="rand-m9-mstd0.5-inc1",
                       help="RandAugment as timm writes it, rand-mM-inc1 with mstd, n and p where "
                            "wanted, M up to 10; or none")
    group.add_argument("--crop_low", type=number(float, 0, 1, low_open=True), default=0.08,
                       help="least area of the random resized crop, as a share; nearer to 1 where "
                            "images and epochs are few")
    group.add_argument("--reprob", type=number(float, 0, 1), default=0.25,
                       help="probability of random erasing")
    group.add_argument("--remode", choices=("pixel", "rand", "const"), default="pixel",
                       help="what stands in its place: noise, one colour, the mean colour")
    group.add_argument("--recount", type=number(int, 1), default=1, help="boxes of random erasing")
    masked_options.add_switch(group, "--tricks", default=False,
                              help="in place of random crops and --aa: flip, colours, shift and "
                                   "scale; erasing stays")
    group.add_argument("--smoothing", type=number(float, 0, 0.9), default=0.1,
                       dest="label_smoothing", help="share of the target that all classes have "
                                                    "alike")
    group.add_argument("--mixup", type=number(float, 0), default=0.0,
                       help="alpha of mixup; 0: none")
    group.add_argument("--cutmix", type=number(float, 0), default=0.0,
                       help="alpha of cutmix; 0: none")
    group.add_argument("--cutmix_minmax", type=number(float, 0, 1), nargs=2,
                       metavar=("LOW", "HIGH"), help="sides of its boxes as shares, in place of "
                                                     "alpha")
    group.add_argument("--mixup_prob", type=number(float, 0, 1), default=1.0,
                       help="probability of either")
    group.add_argument("--mixup_switch_prob", type=number(float, 0, 1), default=0.5,
                       help="of cutmix, where both are on")
    group.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch",
                       help="what is mixed by the same share")


def decay(text: str) -> float | str:
    """An argparse type: auto, or a share."""
    return text if text == "auto" else number(float, 0, 1)(text)


def parse_option(doc: str, argv: list[str], data_set: str,
                 path: str | None) -> argparse.Namespace:
    """Options of a script with this docstring; data_set, path: see `add_options`."""
    parser = ArgumentParser(description=doc)
    add_options(parser, data_set, path)
    parser.set_defaults(**WITHOUT)
    opt = parser.parse_args(argv)
    if opt.eval and opt.resume in (None, "auto"):
        parser.error("--eval goes with --resume FILE")
    if opt.eval:  # what the checkpoint was trained with need not be said again
        state = checkpoint.load(opt.resume)
        if state.get("system") != "MAE":
            raise BadInput(f"--resume {opt.resume}: not a checkpoint of this script")
        old = state["opt"]
        follows = opt.free | ({"learning_rate"} if old.get("blr") is not None else set())
        parser.set_defaults(**{name: value for name, value in old.items()
                               if hasattr(opt, name) and name not in follows})
        opt = parser.parse_args(argv)
        # of what is predicted, and by which of the weights; nothing is trained
        opt.free |= {"tta_flip", "select", "model_ema_eval", "finetune"}
    convnext = masked_options.is_convnext(opt.model)
    masked_options.settle(parser, opt, masked_options.FINETUNE[convnext])
    if opt.eval:  # as it was on so many ranks as trained it
        opt.learning_rate = old["learning_rate"]
    for name, ours in (("drop_path", (0.1, 0.0)), ("layer_decay", (0.75, 1.0))):
        if getattr(opt, name) is None:
            setattr(opt, name, ours[convnext])
    if convnext and opt.size % 32:
        parser.error(f"argument --input_size: {opt.size}: a multiple of 32 with a ConvNeXt V2")
    if convnext and not opt.global_pool:
        parser.error("--cls_token goes with a ViT")
    if opt.layer_decay_type == "group" and not convnext:
        parser.error("--layer_decay_type group goes with a ConvNeXt V2")
    if opt.layer_decay_type == "group" and opt.layer_decay == 1:
        print("--layer_decay_type group: with --layer_decay 1 all layers have one rate")
    if opt.cutmix_minmax and int(opt.size * opt.cutmix_minmax[0]) >= int(
            opt.size * opt.cutmix_minmax[1]):
        parser.error("argument --cutmix_minmax: LOW must be below HIGH, by a pixel at least")
    if mixes(opt) and opt.batch_size % 2:
        parser.error(f"argument --batch_size: {opt.batch_size}: an even number with --mixup and "
                     f"--cutmix, which mix an image with another of its batch")
    if mixes(opt) and opt.loss != "crossentropy":
        parser.error(f"--loss {opt.loss} takes labels, which --mixup and --cutmix mix")
    options.check_balance(parser, opt)
    if opt.model_ema_eval and not opt.model_ema:
        parser.error("--model_ema_eval goes with --model_ema")
    options.check_given(parser, argv, (
        (("--aa", "--crop_low"), not opt.tricks, "random crops, not --tricks"),
        (("--mixup_prob", "--mixup_mode"), mixes(opt), "--mixup, --cutmix or --cutmix_minmax"),
        (("--mixup_switch_prob",), opt.mixup > 0 and (opt.cutmix > 0 or opt.cutmix_minmax),
         "--mixup and --cutmix both"),
        (("--remode", "--recount"), opt.reprob > 0, "--reprob above 0"),
        (("--model_ema_decay",), opt.model_ema, "--model_ema"),
        (("--votes",), opt.dataset == "ferplus", "--data_set ferplus")))
    try:
        recipe_of(opt).draw(1, torch.Generator())
    except ValueError as error:
        parser.error(f"argument --aa: {error}")
    return opt


def mixes(opt: argparse.Namespace) -> bool:
    """Whether images of a batch are mixed."""
    return opt.mixup > 0 or opt.cutmix > 0 or opt.cutmix_minmax is not None


def recipe_of(opt: argparse.Namespace) -> crops.Recipe:
    """What training changes in an image, and how it is seen without that."""
    policy = "" if opt.tricks or opt.aa == "none" else opt.aa
    return crops.Recipe(opt.size, opt.crop_low, True, policy,
                        (opt.reprob, opt.remode, opt.recount), opt.tricks)


# ---------------------------------------------------------------- network

def create_network(opt: argparse.Namespace, n_label: int) -> nn.Module:
    """The network of --model, before anything is loaded."""
    if masked_options.is_convnext(opt.model):
        return create_convnextv2(opt.model, n_label, opt.drop_path)
    return create_vit(opt.model, n_label, opt.global_pool, opt.drop_path, opt.size)


def set_model(opt: argparse.Namespace, n_label: int, device: torch.device,
              start: object = None) -> nn.Module:
    """The network on its device, started from what the file of --finetune holds, `start`, with a
    new head; raises BadInput."""
    torch.manual_seed(opt.seed)
    network = create_network(opt, n_label)
    with torch.no_grad():
        network.head.weight *= opt.head_init_scale / 0.001  # which it has as published
    if start is not None:
        own = isinstance(start, dict) and start.get("system") == "MAE"
        weights = pretrained.predicting(start)[1] if own \
            else files.load_weights(opt.finetune, start)
        loaded, missing, unexpected = load_public(network, opt.finetune, {
            name: value for name, value in weights.items() if not HEAD.search(name)})
        others = sorted({name.split(".")[0] for name in unexpected})
        print(f"--finetune {opt.finetune}: {len(loaded)} of {len(loaded) + len(missing)} tensors "
              f"loaded" + f", not {', '.join(missing)}" * bool(missing)
              + f"; not taken: {', '.join(others)}" * bool(others))
    return network.to(device, memory_format=torch.channels_last)


def set_optimizer(opt: argparse.Namespace, network: nn.Module) -> torch.optim.Optimizer:
    """AdamW over layers, each with its rate."""
    groups = masked.layer_decay_groups(
        network, opt.layer_decay, opt.weight_decay,
        "group" if opt.layer_decay_type == "group" else "layer")
    for group in groups:
        group["base"] = opt.learning_rate * group["lr_scale"]
        del group["names"]
    return torch.optim.AdamW(groups, opt.learning_rate, betas=(0.9, 0.999), fused=True)


def set_average(opt: argparse.Namespace, network: nn.Module, n_data: int) -> ModelEmaV3 | None:
    """The average of --model_ema; says how much of it the initial weights are at the end."""
    if not opt.model_ema:
        return None
    steps = opt.epochs * (n_data // (opt.batch_size * distributed.size()) // opt.accum_iter)
    value = min(0.9999, SHARE ** (1 / max(1, steps))) if opt.model_ema_decay == "auto" \
        else opt.model_ema_decay
    print(f"--model_ema_decay {value:.6g}: after {steps} steps {value ** steps:.2g} of the average "
          f"are still the initial weights")
    return ModelEmaV3(network, value)


def set_mixup(opt: argparse.Namespace, n_label: int) -> Mixup | None:
    """timm's mixup and cutmix, or None."""
    if not mixes(opt):
        return None
    return Mixup(opt.mixup, opt.cutmix, opt.cutmix_minmax, opt.mixup_prob, opt.mixup_switch_prob,
                 opt.mixup_mode, label_smoothing=opt.label_smoothing, num_classes=n_label)


# ---------------------------------------------------------------- the run

def set_loader(opt: argparse.Namespace) -> dict[str, faces.Source]:
    """{split: its Source}: train, test, and val where the set has one of its own."""
    splits = photographs.read_splits(opt)
    n_label = splits["train"].n_label
    if opt.nb_classes not in (None, n_label):
        raise BadInput(f"--nb_classes {opt.nb_classes}: {opt.dataset} has {n_label}; leave the "
                       f"flag out")
    return {split: source_of(opt, images) for split, images in splits.items()}


def source_of(opt: argparse.Namespace, images: sets.FaceSet) -> faces.Source:
    """What batches of the images of a split are made of."""
    side = decoding.stored_side(opt.size)
    return faces.Source(images, photographs.stored(images, side, opt, BICUBIC),
                        augment=recipe_of(opt))


def finetune(opt: argparse.Namespace, argv: list[str], script: str) -> dict | None:
    """One run of a script: its results; None on a rank that writes nothing."""
    device = devices.local_device(opt.device)
    opt.amp = bool(opt.amp)
    with distributed.group(device):
        sources = set_loader(opt)
        fit = fitting.Fit(record.Run(opt.save_path, "", opt), sources, "MAE")
        n_label, start = fit.faces.n_label, None
        if opt.finetune and not fit.resume:
            start = files.read(opt.finetune)
            fit.start_from("--finetune", opt.finetune, start)
        network = set_model(opt, n_label, device, start)
        fit.begin(network, set_optimizer(opt, network), mixup=set_mixup(opt, n_label),
                  average=set_average(opt, network, len(fit.members)))
        header = fit.read_only(argv, script) if opt.eval else fit.run_epochs(argv, script)
        return fit.evaluate(header)
