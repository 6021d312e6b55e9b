"""Renders stand-in data for a set: drawn faces whose expressions are known, in the same layout.

    python render.py casme3 --data_folder data/rendered --subjects 12 --clips_per_subject 8
    python render.py casme2 --data_folder data/casme2_raw --subjects 8 --clips 60
    python render.py faces --data_folder data/faces

No picture of a person is involved, and nothing here is the set itself: licensed faces cannot be
shipped, so the scripts are tried on rendered ones. `python render.py SET --help` lists the flags.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
from rendering import casme2, casme3, faces

SETS = {"casme2": casme2, "casme3": casme3, "faces": faces}


def parse_option(argv=None):
    return util.parse_set(SETS, __doc__, argv)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    SETS[opt.set].run(opt)


if __name__ == "__main__":
    main()
