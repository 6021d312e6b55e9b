"""Flags of the scripts that pre-train and fine-tune masked autoencoders, in the field's names."""
import argparse
from typing import NamedTuple

from models.convnextv2 import CONVNEXT_NAMES
from training import distributed
from training.options import Ignored
from util import ArgumentParser, number, positive_int, switch

# of the published scripts; they do nothing here
IGNORED = (("--world_size", 1, "torchrun's environment says how many ranks there are"),
           ("--dist_url", 1, "torchrun's environment says where the ranks meet"),
           ("--dist_on_itp", "?", "torchrun's environment says how many ranks there are"),
           ("--dist_eval", "?", "one rank predicts the test split and all of them the validation "
                                "images: sharded, some would count twice"),
           ("--pin_mem", "?", "memory for a GPU is always pinned"),
           ("--no_pin_mem", "?", "memory for a GPU is always pinned"))


class Defaults(NamedTuple):
    """What differs between pre-training and fine-tuning, of ViT and ConvNeXt V2."""
    epochs: int
    blr: float
    min_lr: float
    warmup_epochs: float
    save_ckpt_freq: int
    save_ckpt_num: int


# the published ViT's, then ConvNeXt V2's
PRETRAIN = Defaults(400, 1e-3, 0.0, 40, 20, 0), Defaults(800, 1.5e-4, 0.0, 40, 20, 0)
FINETUNE = Defaults(50, 1e-3, 1e-6, 5, 1, 3), Defaults(100, 5e-4, 1e-6, 20, 1, 3)


def is_convnext(name: str) -> bool:
    """Whether a --model is a ConvNeXt V2."""
    return name in CONVNEXT_NAMES


def add_switch(group: argparse._ArgumentGroup, *flags: str, default: bool | None,
               **more: object) -> None:
    """Adds a flag that may be followed by True or False."""
    group.add_argument(*flags, type=switch, nargs="?", const=True, default=default,
                       metavar="True|False", **more)


def add_opposite(group: argparse._ArgumentGroup, flag: str, dest: str, **more: object) -> None:
    """Adds a flag like that of `add_switch`, which sets `dest` to the opposite."""
    group.add_argument(flag, type=lambda text: not switch(text), nargs="?", const=False, dest=dest,
                       default=argparse.SUPPRESS, metavar="True|False", **more)


def add_data_options(parser: ArgumentParser, path_help: str, path: str | None,
                     side: int, sides: str = "") -> argparse._ArgumentGroup:
    """Adds the data group; path: the default of --data_path, None where it must be given; side: of
    which the input's is a multiple, pixels; sides: what its help says beside that."""
    def size(text):
        pixels = number(int, side)(text)
        if pixels % side:
            raise argparse.ArgumentTypeError(f"{text}: a multiple of {side}")
        return pixels
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", free=True, required=path is None, default=path,
                       dest="data_folder", metavar="DIR", help=path_help)
    group.add_argument("--input_size", type=size, default=224, dest="size",
                       help=f"side of what the network sees, pixels, a multiple of {side}"
                            f"{sides}; images are kept with 8/7 of it")
    group.add_argument("--cache", free=True, metavar="DIR|off", default="data/cache",
                       help="folder for the decoded images, 196 kB each at 224 pixels, read again "
                            "by later runs; off: keep them in memory only. Where they do not fit "
                            "they are decoded each time")
    return group


def add_optimisation_options(parser: ArgumentParser,
                             default: Defaults | None) -> argparse._ArgumentGroup:
    """Adds the optimisation group; default: of what differs, or None where the --model decides,
    as FINETUNE says."""
    vit, convnext = (default, default) if default else FINETUNE

    def either(name):
        both = getattr(vit, name), getattr(convnext, name)
        return f" [{both[0]:g}" + f"; {both[1]:g} ConvNeXt V2" * (both[0] != both[1]) + "]"
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=positive_int, default=64,
                       help="images at a time, on each rank")
    group.add_argument("--accum_iter", "--update_freq", type=positive_int, default=1,
                       help="batches whose gradients are added up for a step")
    group.add_argument("--epochs", type=positive_int,
                       help="passes over the data" + either("epochs"))
    group.add_argument("--lr", type=number(float, 0, low_open=True), dest="learning_rate",
                       help="highest learning rate [blr x images of a step / 256]")
    group.add_argument("--blr", type=number(float, 0, low_open=True),
                       help="learning rate for 256 images a step" + either("blr"))
    group.add_argument("--min_lr", type=number(float, 0),
                       help="learning rate at the end" + either("min_lr"))
    group.add_argument("--warmup_epochs", type=number(float, 0), metavar="EPOCHS",
                       help="the rate rises over so many epochs, at most a quarter where it is not "
                            "given" + either("warmup_epochs"))
    group.add_argument("--weight_decay", type=number(float, 0), default=0.05, help="of AdamW")
    return group


def add_running_options(parser: ArgumentParser, amp: str) -> argparse._ArgumentGroup:
    """Adds the running group; amp: where mixed precision is on by default."""
    group = parser.add_argument_group("running")
    group.add_argument("--device", free=True, default="auto", metavar="NAME",
                       help="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1")
    add_switch(group, "--amp", "--use_amp", default=None,
               help=f"mixed precision: bfloat16, or float16 with a loss scaler where the GPU has "
                    f"no bfloat16; float32 as ever where the CPU has none [{amp}]")
    group.add_argument("--num_workers", free=True, type=number(int, 0), default=10,
                       help="threads that decode images, processes where they fit nowhere")
    group.add_argument("--seed", type=number(int, 0, 2 ** 62), default=0,
                       help="everything random follows from (seed, epoch, step)")
    group.add_argument("--resume", free=True, metavar="FILE|auto",
                       help="go on from this checkpoint; auto: from last.pth in --output_dir")
    add_switch(group, "--auto_resume", free=True, default=True,
               help="as --resume auto, where no --resume is given; False: refuse a folder that "
                    "holds files")
    group.add_argument("--local-rank", "--local_rank", action=Ignored, type=int)
    for flag, nargs, why in IGNORED:
        group.add_argument(flag, action=Ignored, nargs=None if nargs == 1 else nargs,
                           const=f"ignored: {why}")
    return group


def add_output_options(parser: ArgumentParser, default: Defaults) -> argparse._ArgumentGroup:
    """Adds the output group."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", free=True, metavar="DIR", default="./output_dir",
                       dest="save_path", help="folder for checkpoints, log and pictures")
    group.add_argument("--log_dir", free=True, metavar="DIR", dest="tb_path",
                       help="folder for TensorBoard curves [output_dir]")
    group.add_argument("--save_ckpt_freq", free=True, type=positive_int,
                       default=default.save_ckpt_freq,
                       help="epochs per checkpoint-<epoch>.pth, counted from 0, and the last one")
    group.add_argument("--save_ckpt_num", free=True, type=number(int, 0),
                       default=default.save_ckpt_num,
                       help="how many of these are kept, the latest; 0: all")
    group.add_argument("--save_minutes", free=True, type=number(float, 0), default=10,
                       help="minutes per last.pth within an epoch")
    group.add_argument("--print_freq", free=True, type=positive_int, default=1,
                       help="epochs per line")
    return group


def settle(parser: ArgumentParser, opt: argparse.Namespace, default: Defaults) -> None:
    """Fills in what follows from other flags: the rate from --blr, the warm-up, where curves and
    checkpoints go."""
    if opt.epochs is None:
        opt.epochs = default.epochs
    opt.warmup_derived = opt.warmup_epochs is None  # from --epochs, which may grow
    opt.free.add("warmup_derived")
    if opt.warmup_derived:
        opt.warmup_epochs = min(float(default.warmup_epochs), opt.epochs / 4)
    if opt.warmup_epochs >= opt.epochs:
        parser.error(f"argument --warmup_epochs: {opt.warmup_epochs:g}, of {opt.epochs} --epochs")
    if opt.learning_rate is None:
        opt.blr = default.blr if opt.blr is None else opt.blr
        a_step = opt.batch_size * opt.accum_iter * distributed.rank()[1]
        opt.learning_rate = opt.blr * a_step / 256
    elif opt.blr is not None:
        parser.error("--lr and --blr exclude each other")
    if opt.min_lr is None:
        opt.min_lr = min(default.min_lr, opt.learning_rate)
    # one that evaluates has the ranks of today, and takes the rate of the run
    if opt.min_lr > opt.learning_rate and not getattr(opt, "eval", False):
        parser.error(f"argument --min_lr: {opt.min_lr:g} is above the rate, "
                     f"{opt.learning_rate:g}")
    if opt.resume is None and opt.auto_resume:
        opt.resume = "auto"
    opt.tb_path = opt.tb_path or opt.save_path
    opt.lr_schedule, opt.save_freq = "iteration", 1
