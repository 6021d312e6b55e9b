"""Raw frames of a set → what the training scripts read: difference images and lists, or flow.

    python prepare.py casme3 --raw part_A --annotation LABELS.xlsx --data_folder data/casme3
    python prepare.py casme2 --raw Cropped --annotation CODING.xlsx --data_folder data/casme2

`python prepare.py SET --help` lists the flags.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from preparation import casme2, casme3

SETS = {"casme2": casme2, "casme3": casme3}


def parse_option(argv=None):
    return util.parse_set(SETS, __doc__, argv)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    SETS[opt.set].run(opt)


if __name__ == "__main__":
    main()
