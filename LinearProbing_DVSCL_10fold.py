"""Stage 2 of DVSCL: linear heads on a frozen encoder, every fold of subjects in one pass.

  python LinearProbing_DVSCL_10fold.py --dataset casme3 --data_folder D --save_path results \\
      --tb_path tb --model_path runs/RUN/last.pth --model alexnet --layer 5

Each image is encoded once per augmented view; the heads of all folds, logistic regressions on
standardised features, are then solved together, and each clip is predicted by the head that never
saw its subject. With --learning_rate or --epochs the heads are trained by SGD instead. How well
the same features tell the subject, and find the other view of a clip, is printed beside it.
Writes results.json, predictions.csv, confusion.png, mistakes.png and curves.png. Expect about a
minute for the 943 clips of CAS(ME)^3 on two CPU cores, and with --protocol loso some minutes more
where --l2 is left to the inner folds.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from evaluation import heldout, probing, shortcuts
from training import distributed, options


def parse_option(argv):
    parser = options.ArgumentParser(description=__doc__)
    data, _ = heldout.add_head_options(parser, "probe", "10fold")
    data.add_argument("--subject", nargs="+", metavar="NAME",
                      help="only these held-out subjects; those finished before are merged into "
                           "the result [all]")
    method = parser.add_argument_group("method")
    method.add_argument("--n_views_train", default=2,
                        type=options.number(int, 1, len(probing.VIEWS)),
                        help="augmented views of a training image: 1 plain, 2 and mirrored, up "
                             f"to {len(probing.VIEWS)}: and the four corner crops")
    method.add_argument("--solver", choices=("lbfgs", "sgd"),
                        help="lbfgs: the minimum of the penalised loss, deterministic; sgd: the "
                             "published way, with the flags under optimisation [lbfgs; sgd where "
                             "one of those or --oracle_curve is given]")
    heldout.add_penalty_option(method)
    sgd = options.add_optimisation_options(
        parser, 256, 0.1, [10, 20, 30, 40, 50, 60, 70], 0.2, 80,
        "initial learning rate; 30 to 50 for layer 6 of a ResNet")
    sgd.title = "optimisation (--solver sgd)"
    sgd.add_argument("--select", choices=("fixed", "inner"), default="fixed",
                     help="inner: epochs and learning rate chosen for each held-out fold by "
                          "inner folds of its training subjects; fixed: as given")
    sgd.add_argument("--select_rates", nargs="+", metavar="RATE",
                     type=options.number(float, 0, low_open=True),
                     help="learning rates that --select inner chooses from [0.3, 1 and 3 times "
                          "--learning_rate]")
    options.add_running_options(parser)
    heldout.add_result_options(parser)
    options.add_output_options(parser, "--save_path", "folder for the runs' results", 20)
    opt = parser.parse_args(argv)
    heldout.check_options(parser, opt)
    choose_solver(parser, opt, [*options.given(sgd, argv), *["--oracle_curve"] * opt.oracle_curve])
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
    """(clips, images, digest, fold names `[F]`, fold of each clip `[N]`)"""
    clips, images, digest = heldout.read_labelled(opt)
    names, fold_of = heldout.split(opt, clips)
    print(f"{len(clips)} clips, {len(clips.people)} subjects, {len(names)} folds")
    return clips, images, digest, names, fold_of


def evaluate(opt, argv, device, data):
    """Trains the heads that are left to do, writes the results: (run folder, results or None)."""
    clips, images, digest, names, fold_of = data
    inner = opt.select == "inner"
    heads = util.penalty_name(opt) if opt.solver == "lbfgs" else f"sgd_{util.rate_name(opt)}"
    held = heldout.HeldOut("probe", opt, argv, __file__, clips, digest,
                              [heads, opt.protocol, opt.encoder, *["inner"] * inner])
    for group in held.groups:
        found = heldout.train_frozen(opt, held, group, images, names, fold_of, device,
                                        opt.solver, opt.n_views_train,
                                        rates=opt.select_rates if inner else None)
        # before anybody counts as finished: what is finished is not run again
        if group.path == opt.model_path and distributed.first():
            util.write_json(held.folder / "shortcuts.json", shortcuts.measure(
                opt, clips, found))
        held.keep_frozen(group, found)
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
