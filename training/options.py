"""Options that several scripts share."""
import argparse
import os
from collections.abc import Iterable
from typing import NamedTuple

from images.lists import DATABASES
from models import MODEL_NAMES, default_layer, n_layers
from util import ArgumentParser, NumberList, number, positive_int, word

# L2 penalties of a head to choose from, strongest first
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# number of groups of subjects of each --protocol; None: a subject by itself
PROTOCOLS = {"10fold": 10, "5fold": 5, "loso": None}


def check_size(parser: ArgumentParser, model: str, size: int) -> None:
    """Refuses crops of which the encoder's poolings leave nothing."""
    if model == "alexnet" and size < 63:
        parser.error(f"argument --size: {size} is out of range: AlexNet takes crops of 63 "
                     f"pixels or more")


class Ignored(argparse.Action):
    """A flag that leaves no trace in the options; `const`: why, which is printed."""

    def __init__(self, option_strings, dest, const=None, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, const=const,
                         default=argparse.SUPPRESS, help=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        if self.const:
            print(f"{option_string}: {self.const}")


def add_data_options(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the group every script begins with; returns it for flags of the script's own."""
    group = parser.add_argument_group("data")
    group.add_argument("--data_folder", free=True, required=True, metavar="DIR",
                       help="folder the paths in the lists are relative to")
    group.add_argument("--list_folder", free=True, metavar="DIR",
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
    group.add_argument("--cache", free=True, metavar="DIR|off",
                       default=os.path.join("data", "cache"),
                       help="folder for the decoded images, 0.26 MB a clip, read again by later "
                            "runs; off: keep them in memory only")
    return group


class Schedule(NamedTuple):
    """A script's defaults of what --lr_schedule takes besides steps: schedule and warm-up epochs;
    `of`: what the warm-up's rate belongs to; `risen`: when it is shorter."""
    name: str
    warmup: float
    of: str = ""
    risen: str = ""


class Descent(NamedTuple):
    """A script's defaults of CMC's optimisation flags, and what their help says besides."""
    batch_size: int
    learning_rate: float
    decay_epochs: list
    decay_rate: float
    epochs: int
    rate_help: str = "initial learning rate"
    decayed: str = ""  # what the weight decay leaves out


def add_optimisation_options(parser: ArgumentParser, default: Descent,
                             schedule: Schedule | None = None) -> argparse._ArgumentGroup:
    """Adds CMC's optimisation flags with a script's own defaults, steps alone without a schedule;
    returns the group."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=positive_int, default=default.batch_size,
                       help="clips per step, over all devices; never more than there are")
    group.add_argument("--epochs", type=positive_int, default=default.epochs,
                       help="passes over the data; the last one counts")
    group.add_argument("--learning_rate", type=number(float, 0), default=default.learning_rate,
                       help=default.rate_help)
    group.add_argument("--lr_decay_epochs", nargs="+", action=NumberList, metavar="EPOCH",
                       default=default.decay_epochs, help="epochs after which the rate decays")
    group.add_argument("--lr_decay_rate", type=number(float, 0, 1), default=default.decay_rate,
                       help="factor at each decay")
    if schedule:
        group.add_argument("--lr_schedule", choices=("step", "cosine"), default=schedule.name,
                           help="step: the two flags above, either of which selects it; cosine: "
                                "half a cosine down to 0, step by step")
        group.add_argument("--warmup_epochs", type=number(float, 0), metavar="EPOCHS",
                           default=schedule.warmup,
                           help=f"the rate{schedule.of} rises from 0 over so many epochs"
                                f"{schedule.risen}")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, help="SGD momentum")
    group.add_argument("--weight_decay", type=number(float, 0), default=1e-4,
                       help=f"SGD weight decay{default.decayed}")
    return group


def choose_schedule(parser: ArgumentParser, given: list[str], schedule: str, warmup: float,
                    epochs: int) -> str:
    """The --lr_schedule: steps where a flag of theirs is `given`. Refuses them beside another
    schedule, and a warm-up longer than the run; given: the flags of the optimisation group."""
    if "--warmup_epochs" in given and warmup > epochs:
        parser.error(f"argument --warmup_epochs: {warmup:g} is more than the {epochs} of --epochs")
    steps = [name for name in given if name in ("--lr_decay_epochs", "--lr_decay_rate")]
    if not steps or schedule == "step":
        return schedule
    if "--lr_schedule" in given:
        parser.error(f"{steps[0]} goes with --lr_schedule step")
    print(f"{steps[0]}: the rate decays in steps; without it, in a {schedule}")
    return "step"


def add_running_options(parser: ArgumentParser,
                        decodes: bool = True) -> argparse._ArgumentGroup:
    """Adds the running group; returns it. decodes: whether the script decodes images."""
    group = parser.add_argument_group("running")
    group.add_argument("--device", free=True, default="auto", metavar="NAME",
                       help="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1")
    group.add_argument("--amp", action="store_true",
                       help="mixed precision: bfloat16, or float16 with a loss scaler where the "
                            "GPU has no bfloat16; float32 as ever where the CPU has none")
    if decodes:
        group.add_argument("--num_workers", free=True, type=number(int, 0), default=4,
                           help="threads that decode images, processes where they fit nowhere")
    group.add_argument("--seed", type=number(int, 0, 2 ** 62), default=0,
                       help="everything random follows from (seed, epoch, step)")
    group.add_argument("--resume", free=True, metavar="FILE|auto",
                       help="go on from this checkpoint (frozen heads have none); auto: from what "
                            "the run's folder holds, or fresh [refuse a run folder that exists]")
    # python -m torch.distributed.launch gives it; the environment says the same
    group.add_argument("--local-rank", "--local_rank", action=Ignored, type=int)
    return group


def add_output_options(parser: ArgumentParser, root: str, root_help: str,
                       save_freq: int | None = None) -> argparse._ArgumentGroup:
    """Adds where a script writes (`root`: its flag, such as --model_path), and how often it saves
    where it saves between; returns the group."""
    group = parser.add_argument_group("output")
    group.add_argument(root, required=True, free=True, metavar="DIR", help=root_help)
    group.add_argument("--tb_path", free=True, metavar="DIR",
                       help="folder for TensorBoard curves [tensorboard beside the run folders]")
    group.add_argument("--tag", type=word, default="", metavar="WORD",
                       help="appended to the run's name [none]")
    group.add_argument("--print_freq", free=True, type=positive_int, default=10,
                       help="epochs per line")
    if save_freq:
        group.add_argument("--save_freq", free=True, type=positive_int, default=save_freq,
                           help="epochs per checkpoint")
        group.add_argument("--save_minutes", free=True, type=number(float, 0), default=10,
                           help="minutes per checkpoint within an epoch")
    return group


# ---------------------------------------------------------------- contrast

def add_contrast_options(parser: ArgumentParser) -> argparse._ArgumentGroup:
    """How two views are contrasted; returns the group of flags that only memory banks have."""
    method = parser.add_argument_group("method")
    method.add_argument("--contrast", choices=("batch", "bank"),
                        help="what each clip is told apart from: batch: the others of its batch; "
                             "bank: the published memory banks, with the flags of that group "
                             "[batch; bank where one of those is given]")
    method.add_argument("--nce_t", type=number(float, 0, low_open=True), metavar="T",
                        help="temperature [0.2; bank: 0.07]")
    bank = parser.add_argument_group("memory banks (--contrast bank)")
    bank.add_argument("--nce_k", type=positive_int, default=4096,
                      help="negatives per clip; as many as the other clips or more: each of "
                           "them once")
    bank.add_argument("--nce_m", type=number(float, 0, 1), default=0.5,
                      help="momentum of the memory banks")
    bank.add_argument("--softmax", action=argparse.BooleanOptionalAction, default=True,
                      help="softmax loss over the scores; --no-softmax: NCE, whose constant Z, "
                           "fixed at the first batch, lets the loss saturate on about a "
                           "thousand clips")
    method.add_argument("--crop_low", type=number(float, 0, 1, low_open=True), default=1.0,
                        help="least area of the random resized crop, as a share (CMC: 0.2); 1: "
                             "the centre crop of the published code")
    method.add_argument("--no_flip", action="store_true", help="no random horizontal flip")
    method.add_argument("--jitter", type=number(float, 0, 0.9), default=0.4,
                        help="range of the gain about 'no change', as a share; of signed images a "
                             "quarter of it is that of an offset in units of their rms, and 0 "
                             "leaves out grey ones, a fifth; not used with wrap")
    return bank


def choose_contrast(parser: ArgumentParser, given: list[str], contrast: str | None,
                    temperature: float | None) -> tuple[str, float]:
    """--contrast and its temperature, filled in; given: the flags that only banks have."""
    if contrast == "batch" and given:
        parser.error(f"{given[0]} goes with --contrast bank")
    if contrast is None:
        contrast = "bank" if given else "batch"
        if given:
            print(f"{given[0]}: clips are contrasted with memory banks; without it, with the "
                  f"others of their batch")
    return contrast, temperature or (0.07 if contrast == "bank" else 0.2)


# ---------------------------------------------------------------- heads

def add_head_options(parser: ArgumentParser, stage: str, protocol: str) -> tuple:
    """Adds the data and model flags of the scripts that put a head on a pre-trained encoder;
    protocol: the one they follow by default.

    Returns both groups.
    """
    data, model = add_data_options(parser), parser.add_argument_group("model")
    data.add_argument("--dataset", choices=(*DATABASES, "all"), default="casme3",
                      help="the database in the lists to evaluate; all: every one of them")
    data.add_argument("--protocol", choices=PROTOCOLS, default=protocol,
                      help="ten or five groups of whole subjects, or leave one subject out")
    data.add_argument("--without", nargs="+", metavar="NAME", default=[],
                      help="subjects that take no part at all, neither trained on nor predicted "
                           "[none]")
    model.add_argument("--model_path", required=True, free=True, metavar="FILE",
                       help=f"checkpoint of pre-train_DVSCL.py to {stage}; a {{subject}} or "
                            f"{{fold}} in it is replaced by the one held out, a {{seed}} by "
                            f"the seed; random: an untrained encoder")
    model.add_argument("--model", choices=MODEL_NAMES, default="alexnet", metavar="NAME",
                       help="its encoder: " + ", ".join(MODEL_NAMES))
    model.add_argument("--layer", type=positive_int,
                       help="tap of the encoder the head sits on [5 for AlexNet, 6 for ResNet]")
    model.add_argument("--encoder", choices=("both", "rgb", "depth"), default="both",
                       help="view whose features the head sees")
    return data, model


def add_loss_option(group: argparse._ArgumentGroup, *more: str, noun: str = "clips",
                    told: str = "") -> None:
    """Adds --loss of training with labels; more: other kinds, of which `told` tells."""
    group.add_argument("--loss", choices=("crossentropy", "focal", "balanced", *more),
                       default="crossentropy", help="focal: gamma 2; balanced: classes weighted "
                       f"by n/(C n_c) of the training {noun}{told}")


def check_given(parser: ArgumentParser, argv: list[str],
                rules: Iterable[tuple[tuple[str, ...], object, str]]) -> None:
    """Refuses flags that a command line names where what they go with does not hold; rules:
    (flags, whether it holds, what they go with)."""
    words = {str(word).partition("=")[0] for word in argv}
    for flags, holds, what in rules:
        for name in flags:
            if name in words and not holds:
                parser.error(f"{name} goes with {what}")


def check_balance(parser: ArgumentParser, opt: argparse.Namespace) -> None:
    """Refuses to balance classes twice."""
    if opt.oversample and opt.loss in ("balanced", "logit_adjusted"):
        parser.error(f"--oversample excludes --loss {opt.loss}, which balances the classes already")


def add_penalty_option(group: argparse._ArgumentGroup) -> None:
    """Adds --l2 of the heads that are solved for."""
    group.add_argument("--l2", type=number(float, 0, low_open=True), metavar="X",
                       help="L2 penalty of a head, for features of unit length [of "
                            + " ".join(f"{x:g}" for x in PENALTIES) + " the one that does best "
                            "on inner folds of the training subjects]")


def add_result_options(parser: ArgumentParser) -> None:
    """Adds what else is measured: several seeds, and the curve that nobody may choose by."""
    group = parser.add_argument_group("results")
    group.add_argument("--seeds", nargs="+", free=True, type=number(int, 0, 2 ** 62), metavar="N",
                       help="run each of these seeds and report mean and standard deviation "
                            "[--seed alone]")
    group.add_argument("--oracle_curve", action="store_true", free=True,
                       help="TensorBoard (under oracle/) and curves.png also show the pooled "
                            "figures of what is held out per epoch; picking by them is cheating")


def check_results(parser: ArgumentParser, opt: argparse.Namespace) -> None:
    """Refuses seeds of which no deviation can be had, and a curve over epochs that inner folds
    choose."""
    seeds = opt.seeds
    if opt.oracle_curve and getattr(opt, "select", None) == "inner":
        parser.error("--oracle_curve follows the epochs of --select fixed")
    if seeds and (len(seeds) < 2 or len(set(seeds)) < len(seeds)):
        parser.error("argument --seeds: give two or more, each once; --seed for a single one")
    if seeds and opt.resume not in (None, "auto"):
        parser.error("argument --resume: a checkpoint is of one seed; with --seeds give auto")


def check_options(parser: ArgumentParser, opt: argparse.Namespace) -> None:
    """Fills in the model's own layer where none is given; refuses one out of range, what
    `check_results` does, and placeholders that the protocol cannot fill."""
    check_results(parser, opt)
    if opt.protocol != "loso" and "{subject}" in opt.model_path:
        parser.error("argument --model_path: {subject} goes with --protocol loso, {fold} with all")
    check_size(parser, opt.model, opt.size)
    if opt.layer is None:
        opt.layer = default_layer(opt.model)
        print(f"heads on layer {opt.layer} of {opt.model}")
    if opt.layer > n_layers(opt.model):
        parser.error(f"argument --layer: {opt.layer} is out of range; {opt.model} has taps 1 to "
                     f"{n_layers(opt.model)} for a head")
