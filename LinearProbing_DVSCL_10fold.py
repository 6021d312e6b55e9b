"""Stage 2 of DVSCL: linear heads on a frozen encoder, every fold of subjects in one pass.

  python LinearProbing_DVSCL_10fold.py --dataset casme3 --data_folder D --save_path results \\
      --tb_path tb --model_path runs/RUN/last.pth --model alexnet --layer 5

Each image is encoded once per augmented view; the heads of all folds, logistic regressions on
standardised features, are then solved together, and each clip is predicted by the head that never
saw its subject. With --learning_rate or --epochs the heads are trained by SGD instead. How well
the same features tell the subject, and find the other view of a clip, is printed beside it.
Writes results.json, predictions.csv, confusion.png, mistakes.png and curves.png. Expect half a
minute for the 943 clips of CAS(ME)^3 on two CPU cores, and with --protocol loso two minutes where
--l2 is left to the inner folds.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import heldout, probing, seeds, shortcuts
from evaluation.encoders import RANDOM
from training import devices, distributed, options, record


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    data, _ = options.add_head_options(parser, "probe", "10fold")
    data.add_argument("--subject", nargs="+", metavar="NAME", free=True,
                      help="only these held-out subjects; those finished before are merged into "
                           "the result [all]")
    method = parser.add_argument_group("method")
    method.add_argument("--n_views_train", default=2,
                        type=util.number(int, 1, len(probing.VIEWS)),
                        help="augmented views of a training image: 1 plain, 2 and mirrored, up "
                             f"to {len(probing.VIEWS)}: and the four corner crops")
    method.add_argument("--solver", choices=("lbfgs", "sgd"),
                        help="lbfgs: the minimum of the penalised loss, deterministic; sgd: the "
                             "published way, with the flags under optimisation [lbfgs; sgd where "
                             "one of those or --oracle_curve is given]")
    options.add_penalty_option(method)
    sgd = options.add_optimisation_options(parser, options.Descent(
        256, 0.1, [10, 20, 30, 40, 50, 60, 70], 0.2, 80,
        "initial learning rate; 30 to 50 for layer 6 of a ResNet"))
    sgd.title = "optimisation (--solver sgd)"
    sgd.add_argument("--select", choices=("fixed", "inner"), default="fixed",
                     help="inner: epochs and learning rate chosen for each held-out fold by "
                          "inner folds of its training subjects; fixed: as given")
    sgd.add_argument("--select_rates", nargs="+", metavar="RATE",
                     type=util.number(float, 0, low_open=True),
                     help="learning rates that --select inner chooses from [0.3, 1 and 3 times "
                          "--learning_rate]")
    options.add_running_options(parser)
    options.add_result_options(parser)
    output = options.add_output_options(parser, "--save_path", "folder for the runs' results")
    output.add_argument("--save_freq", "--save_minutes", action=options.Ignored, type=float,
                        const="the heads are found in one pass; nothing is saved in between")
    opt = parser.parse_args(argv)
    options.check_options(parser, opt)
    choose_solver(parser, opt, [*util.given(sgd, argv), *["--oracle_curve"] * opt.oracle_curve])
    if opt.seeds and opt.solver == "lbfgs" and opt.model_path != RANDOM \
            and "{seed}" not in opt.model_path:
        parser.error("--seeds: heads that are solved for draw nothing; give a {seed} in "
                     "--model_path, or --solver sgd")
    if opt.select_rates and opt.select != "inner":
        parser.error("--select_rates goes with --select inner")
    if opt.select_rates is None:
        opt.select_rates = [float(f"{share * opt.learning_rate:g}") for share in (0.3, 1, 3)]
    return opt


def choose_solver(parser, opt, given):
    """Fills in --solver; given: the flags that only SGD has."""
    if opt.solver is None:
        opt.solver = "sgd" if given else "lbfgs"
        if given:
            print(f"{given[0]}: heads are trained by SGD; without it they are solved for")
    elif opt.solver == "lbfgs" and given:
        parser.error(f"{given[0]} goes with --solver sgd")
    if opt.solver == "sgd" and opt.l2 is not None:
        parser.error("--l2 goes with --solver lbfgs; the penalty of SGD is --weight_decay")


def set_loader(opt):
    """(dataset.Data, dataset.Folds)"""
    data = heldout.read_labelled(opt)
    folds = heldout.split(opt.protocol, data.clips)
    if opt.select == "inner" and len(folds.names) < 3:
        raise util.BadInput(f"{data.clips.folder}: --select inner takes three subjects, to train "
                            f"on, to choose by and to hold out; give --select fixed")
    print(f"{len(data.clips)} clips, {len(data.clips.people)} subjects, {len(folds.names)} folds")
    return data, folds


def run_name(opt):
    heads = heldout.penalty_name(opt.l2)
    if opt.solver == "sgd":
        heads = "sgd_" + record.rate_name(opt.learning_rate, opt.weight_decay, opt.batch_size)
    return heldout.head_run_name("probe", opt, heads, opt.protocol, opt.encoder,
                                 "inner" * (opt.select == "inner"))


def evaluate(opt, argv, device, data, folds):
    """Trains the heads that are left to do, writes the results: (run folder, results or None)."""
    run = record.Run(opt.save_path, run_name(opt), opt)
    held = heldout.HeldOut(run, argv, __file__, data)
    recipe = probing.Recipe(opt.solver, opt.n_views_train,
                            rates=opt.select_rates if opt.select == "inner" else None)
    for group in held.groups:
        classifier, trained = heldout.train_frozen(held, group, folds, recipe, device)
        # before anybody counts as finished: what is finished is not run again
        if group.path == held.encoders.source and distributed.first():
            util.write_json(run.folder / "shortcuts.json",
                            shortcuts.measure(opt, data.clips, trained))
        heldout.keep_frozen(held, group, classifier, trained)
    return run.folder, held.finish(protocol=opt.protocol)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    device = devices.local_device(opt.device)
    with distributed.group(device):
        data, folds = set_loader(opt)
        seeds.run_each(opt, lambda one: evaluate(one, argv, device, data, folds), run_name)


if __name__ == "__main__":
    main()
