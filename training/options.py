"""Options that several scripts share."""
import argparse
import os

from models import n_layers
from util import NumberList, number, positive_int, word


def check_size(parser, opt):
    """Refuses crops of which the encoder's poolings leave nothing."""
    if opt.model == "alexnet" and opt.size < 63:
        parser.error(f"argument --size: {opt.size} is out of range: AlexNet takes crops of 63 "
                     f"pixels or more")


def check_layer(parser, opt):
    """Refuses a layer that no head sits on."""
    if opt.layer > n_layers(opt.model):
        parser.error(f"argument --layer: {opt.layer} is out of range; {opt.model} has taps 1 to "
                     f"{n_layers(opt.model)} for a head")


class _Ignored(argparse.Action):
    """A flag that leaves no trace in the options."""

    def __call__(self, parser, namespace, values, option_string=None):
        pass


def add_data_options(parser):
    """Adds the group every script begins with; returns it for flags of the script's own."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_folder", required=True, metavar="DIR",
                       help="folder the paths in the lists are relative to")
    group.add_argument("--list_folder", metavar="DIR",
                       help="folder with v_rgb/ and v_depth/ [data_folder if it holds v_rgb, "
                            "else data]")
    group.add_argument("--view", default="RGB_D", metavar="RGB_D|RGB_gray|RGB_NAME",
                       help="the two views: RGB_D reads v_depth; RGB_gray reads v_gray, or takes "
                            "the luminance where there is none; RGB_NAME reads v_NAME")
    group.add_argument("--encoding", choices=("signed", "wrap", "absolute"),
                       help="what a pixel of a difference image means, where no encoding.json "
                            "lies beside the lists [wrap: d modulo 256, as published]")
    group.add_argument("--size", type=number(int, 32, 1024), default=224,
                       help="side of the crops that the encoder sees, pixels; 112 takes a quarter "
                            "of the time")
    group.add_argument("--cache", default=os.path.join("data", "cache"), metavar="DIR|off",
                       help="folder for the decoded images, 0.26 MB a clip, read again by later "
                            "runs; off: keep them in memory only")
    return group


def add_optimisation_options(parser, batch_size, learning_rate, decay_epochs, decay_rate, epochs,
                             learning_rate_help="initial learning rate", schedule="step",
                             warmup=None, of="", risen="", decayed=""):
    """Adds CMC's optimisation flags with a script's own defaults; returns the group.

    schedule, warmup: defaults of --lr_schedule and --warmup_epochs, which need a warmup; `of`:
    what the warm-up's rate belongs to; risen: when it is shorter; decayed: what the weight decay
    leaves out.
    """
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=positive_int, default=batch_size,
                       help="clips per step, over all devices; never more than there are")
    group.add_argument("--epochs", type=positive_int, default=epochs,
                       help="passes over the data; the last one counts")
    group.add_argument("--learning_rate", type=number(float, 0), default=learning_rate,
                       help=learning_rate_help)
    group.add_argument("--lr_decay_epochs", nargs="+", action=NumberList, default=decay_epochs,
                       metavar="EPOCH", help="epochs after which the rate decays")
    group.add_argument("--lr_decay_rate", type=number(float, 0, 1), default=decay_rate,
                       help="factor at each decay")
    if warmup is not None:
        group.add_argument("--lr_schedule", choices=("step", "cosine"), default=schedule,
                           help="step: the two flags above, either of which selects it; cosine: "
                                "half a cosine down to 0, step by step")
        group.add_argument("--warmup_epochs", type=number(float, 0), default=warmup,
                           metavar="EPOCHS",
                           help=f"the rate{of} rises from 0 over so many epochs{risen}")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum")
    group.add_argument("--weight_decay", type=number(float, 0), default=1e-4,
                       help=f"SGD weight decay{decayed}")
    return group


def choose_schedule(parser, opt, given):
    """Takes steps where a flag of theirs is `given`, and refuses them beside another schedule, and
    a warm-up that is longer than the run; given: the flags of the optimisation group."""
    steps = [name for name in given if name in ("--lr_decay_epochs", "--lr_decay_rate")]
    if steps and opt.lr_schedule != "step":
        if "--lr_schedule" in given:
            parser.error(f"{steps[0]} goes with --lr_schedule step")
        print(f"{steps[0]}: the rate decays in steps; without it, in a {opt.lr_schedule}")
        opt.lr_schedule = "step"
    if "--warmup_epochs" in given and opt.warmup_epochs > opt.epochs:
        parser.error(f"argument --warmup_epochs: {opt.warmup_epochs:g} is more than the "
                     f"{opt.epochs} of --epochs")


def add_running_options(parser):
    """Adds the running group; returns it."""
    group = parser.add_argument_group("running")
    group.add_argument("--device", default="auto", metavar="NAME",
                       help="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1")
    group.add_argument("--amp", action="store_true",
                       help="mixed precision: bfloat16, or float16 with a loss scaler where the "
                            "GPU has no bfloat16")
    group.add_argument("--num_workers", type=number(int, 0), default=4,
                       help="threads that decode images")
    group.add_argument("--seed", type=number(int, 0, 2 ** 62), default=0,
                       help="everything random follows from (seed, epoch, step)")
    group.add_argument("--resume", metavar="FILE|auto",
                       help="go on from this checkpoint; auto: from the run's last.pth, or fresh "
                            "where there is none [refuse a run folder that exists]")
    # python -m torch.distributed.launch gives it; the environment says the same
    group.add_argument("--local-rank", "--local_rank", action=_Ignored, type=int,
                       default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return group


def add_output_options(parser, root, root_help, save_freq):
    """Adds where a script writes (`root`: its flag, such as --model_path); returns the group."""
    group = parser.add_argument_group("output")
    if root:
        group.add_argument(root, required=True, metavar="DIR", help=root_help)
    group.add_argument("--tb_path", metavar="DIR",
                       help="folder for TensorBoard curves [tensorboard beside the run folders]")
    group.add_argument("--tag", type=word, default="", metavar="WORD",
                       help="appended to the run's name [none]")
    group.add_argument("--print_freq", type=positive_int, default=10, help="epochs per line")
    group.add_argument("--save_freq", type=positive_int, default=save_freq,
                       help="epochs per checkpoint")
    group.add_argument("--save_minutes", type=number(float, 0), default=10,
                       help="minutes per checkpoint within an epoch")
    return group
