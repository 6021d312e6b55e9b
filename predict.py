"""Classes of photographs, or of clips, by a checkpoint, which says what kind of model it holds.

  python predict.py --model_path results/RUN/last.pth photo.jpg photos --pictures drawn
  python predict.py --model_path results/RUN/last.pth --onset 110.jpg --apex 118.jpg \\
      --depth_onset 110.png --depth_apex 118.png
  python predict.py --model_path results/RUN/last.pth --data_folder D \\
      --list D/v_rgb/spNO1_test.txt --json

The first is for models of train_FER.py and main_finetune.py: faces are found, cut out as the model
was trained, and told apart; the others are for those that fine-tune_DVSCL.py --subject all made,
whose frames are cropped, registered, subtracted and normalised as the checkpoint records it. Prints
a row per face or clip: the likeliest class and the probability of each. Expect a few seconds.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import argparse
from pathlib import Path

from images import encoding
from prediction import clips, photographs
from preparation import detection, registration
from training import checkpoint, devices
from util import BadInput, number


class FaceBox(argparse.Action):
    """--box X Y W H [ROLL] as a registration.Box."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) not in (4, 5) or min(values[2:4]) <= 0:
            parser.error("argument --box: X Y W H in pixels of the onset frame, W and H above 0, "
                         "and for a crop that was turned ROLL in degrees")
        setattr(namespace, self.dest, registration.Box(*values))
        namespace.box_has_roll = len(values) == 5


def parse_option(argv: list[str] | None) -> util.Options:
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="*", metavar="PHOTO|FOLDER",
                        help="photographs of faces, for a model of train_FER.py or "
                             "main_finetune.py")
    of_photos = add_photo_options(parser)
    data = parser.add_argument_group("clips: two frames with their depth, or a list")
    data.add_argument("--onset", metavar="FILE", help="RGB frame at the onset")
    data.add_argument("--apex", metavar="FILE", help="RGB frame at the apex")
    data.add_argument("--depth_onset", metavar="FILE",
                      help="depth frame at the onset, for a model that sees depth")
    data.add_argument("--depth_apex", metavar="FILE", help="depth frame at the apex")
    data.add_argument("--box", nargs="+", type=number(float), action=FaceBox,
                      metavar=("X", "Y W H"),
                      help="the face on the onset frame, pixels, and ROLL in degrees where "
                           "training turned its crops; needed where training took boxes that were "
                           "given [as in training: detected, or the central square]")
    data.add_argument("--data_folder", metavar="DIR",
                      help="folder the paths in the list are relative to")
    data.add_argument("--list", metavar="FILE",
                      help="a list of v_rgb/ with lines '<path> <label> <database>'; that of the "
                           "second view has the same name in v_depth/ beside it")
    data.add_argument("--encoding", choices=encoding.DIFFERENCES,
                      help="what a pixel of the listed images means, where no encoding.json lies "
                           "beside v_rgb/ [wrap]")
    model = parser.add_argument_group("model")
    model.add_argument("--model_path", required=True, metavar="FILE",
                       help="last.pth of fine-tune_DVSCL.py --subject all, of train_FER.py, or of "
                            "main_finetune.py")
    running = parser.add_argument_group("running")
    running.add_argument("--device", default="auto", metavar="NAME",
                         help="auto: cuda where there is one, else cpu; or cpu, cuda, cuda:1")
    running.add_argument("--num_workers", type=number(int, 0), default=4,
                         help="clips: threads that decode images, processes where they fit "
                              "nowhere")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON, not a table")
    output.add_argument("--csv", metavar="FILE", help="photographs: also write this table [none]")
    output.add_argument("--pictures", metavar="DIR", help="photographs: also draw them, with boxes "
                        "and classes, into this folder [none]")
    opt = parser.parse_args(argv)
    check_option(parser, opt, util.given(of_photos, argv))
    return opt


def add_photo_options(parser: util.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("photographs")
    group.add_argument("--whole", action="store_true",
                       help="they are crops of faces already: none is searched for")
    group.add_argument("--margin", type=number(float, 0, 4),
                       help="share of a face added to its crop [as the training images were cut, "
                            f"where that is known, else {registration.MARGIN:.3f}]")
    group.add_argument("--min_face_size", type=number(int, detection.SMALLEST_FACE), default=40,
                       help="longer side of the smallest face that is looked for, pixels")
    return group


def check_option(parser: util.ArgumentParser, opt: util.Options, of_photos: list[str]) -> None:
    """of_photos: the flags that were given of photographs."""
    frames = [f"--{name}" for name in (*clips.FRAMES, "box") if getattr(opt, name) is not None]
    if opt.photos:
        if others := [*frames, *(f"--{name}" for name in ("list", "data_folder", "encoding")
                                 if getattr(opt, name))]:
            parser.error(f"photographs and {others[0]} exclude each other")
        if opt.whole and (searched := [flag for flag in of_photos if flag != "--whole"]):
            parser.error(f"{searched[0]} goes with faces that are searched for, not with --whole")
        if opt.csv:
            util.check_output("--csv", opt.csv)
        if opt.pictures and Path(opt.pictures).exists() and not Path(opt.pictures).is_dir():
            parser.error(f"--pictures {opt.pictures}: is a file; name a folder")
        if opt.pictures and Path(opt.pictures).is_dir() and any(Path(opt.pictures).iterdir()):
            parser.error(f"--pictures {opt.pictures}: holds files, which might be written over; "
                         f"name another folder")
        return
    of_photos += [f"--{name}" for name in ("csv", "pictures") if getattr(opt, name)]
    if of_photos:
        parser.error(f"{of_photos[0]} goes with photographs")
    if opt.list and frames:
        parser.error(f"--list and {frames[0]} exclude each other")
    if bool(opt.list) != bool(opt.data_folder):
        parser.error("--list and --data_folder go together")
    if not opt.list and not (opt.onset and opt.apex):
        parser.error("give photographs, or --onset and --apex, or --data_folder and --list")
    if opt.encoding and not opt.list:
        parser.error("--encoding goes with --list")
    if bool(opt.depth_onset) != bool(opt.depth_apex):
        parser.error("--depth_onset and --depth_apex go together")


@util.command_line
def main(argv: list[str] | None = None) -> None:
    opt = parse_option(argv)
    state, device = checkpoint.load(opt.model_path), devices.pick_device(opt.device)
    if state.get("system") == "MAE pre-training":
        raise BadInput(f"{opt.model_path}: an autoencoder, which knows no classes; start "
                       f"main_finetune.py --finetune from it, and name what that writes")
    if state.get("system") == "MMNet":
        raise BadInput(f"{opt.model_path}: sees the flow of five frames, which prepare.py casme2 "
                       f"makes; what it predicts stands in the predictions.csv of its run")
    of_photos = state.get("system") in ("FER", "MAE")
    if bool(opt.photos) != of_photos:
        raise BadInput(f"{opt.model_path}: a model of "
                       + ("photographs; name some, or folders of them" if of_photos else
                          "clips; give --onset and --apex, or --data_folder and --list"))
    print((photographs if of_photos else clips).predict(opt, state, device))


if __name__ == "__main__":
    main()
