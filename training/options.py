"""Options that several scripts share, and a parser that says defaults and errs in one line."""
import argparse
import math
import os
import re

from models import n_layers


class _Help(argparse.HelpFormatter):
    """Appends each flag's default in brackets."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        text = action.help or ""
        plain = action.default not in (None, "", argparse.SUPPRESS) and not action.required
        if not plain or "%(default)" in text or not action.option_strings:
            return text
        if isinstance(action.default, bool):
            return f"{text} [{'on' if action.default else 'off'}]"
        if isinstance(action.default, (list, tuple)):
            return f"{text} [{' '.join(map(str, action.default))}]"
        return f"{text} [%(default)s]"

    def _get_default_metavar_for_optional(self, action):
        return "N"

    def _fill_text(self, text, width, indent):
        return "".join(indent + line for line in text.splitlines(keepends=True))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help and the project's one-line answer to wrong flags."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


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


def given(group, argv):
    """The flags of an argument group that a command line names."""
    names = {name for action in group._group_actions for name in action.option_strings}
    return [name for name in (word.partition("=")[0] for word in argv) if name in names]


def number(kind, low=None, high=None, low_open=False):
    """An argparse type: `kind` (int or float) within [low, high], or (low, high]."""
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of type {kind.__name__}")
        if (not math.isfinite(value)
                or (low is not None and (value < low or low_open and value == low))
                or (high is not None and value > high)):
            wanted = " and ".join(
                ([f"{'above' if low_open else 'at least'} {low}"] if low is not None else [])
                + ([f"at most {high}"] if high is not None else [])) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {wanted}")
        return value
    return convert


def word(text):
    """An argparse type: letters, digits and .+-_ alone, so that it can be part of a file name."""
    if not re.fullmatch(r"[\w.+-]*", text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r} is not one word of letters, digits and .+-_")
    return text


positive_int = number(int, 1)


class _Ignored(argparse.Action):
    """A flag that leaves no trace in the options."""

    def __call__(self, parser, namespace, values, option_string=None):
        pass


class NumberList(argparse.Action):
    """`120 160` and CMC's `120,160` alike, as a list of integers."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            found = [int(v) for v in ",".join(values).split(",") if v]
        except ValueError:
            parser.error(f"argument {option_string}: epochs as '120 160' or '120,160', "
                         f"not {' '.join(values)!r}")
        setattr(namespace, self.dest, found)


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
