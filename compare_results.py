"""One table of several results, with the baselines of the clips they were measured on.

  python compare_results.py results/A/results.json results/B/results.json

UF1, UAR and accuracy with 95 % intervals over subjects, as Markdown. Seconds.
"""
import json
from pathlib import Path

import options
import util
from util import BadInput

MEASURES = ("uf1", "uar", "accuracy")


def parse_option(argv):
    parser = options.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", metavar="results.json",
                        help="files that the probing and fine-tuning scripts wrote")
    return parser.parse_args(argv)


def read_results(path):
    """The content of one results.json; raises BadInput."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        assert all(name in found for name in (*MEASURES, "ci95", "baselines", "n", "opt"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; name a results.json")
    except (ValueError, AssertionError, TypeError):
        raise BadInput(f"{path}: not a results.json; run the script that wrote it again")
    return found


def title(path, found):
    """What a result is of, in a few words."""
    opt = found["opt"]
    stage = Path(path).resolve().parent.name.split("_")[0]
    encoder = "untrained" if opt["model_path"] == "random" else "pre-trained"
    view = "" if opt["encoder"] == "both" else f", {opt['encoder']} alone"
    frozen = ", frozen" if opt.get("freeze_encoder") else ""
    return f"{stage}, {encoder} {opt['model']}{view}{frozen}, {found['protocol']}" \
           + (f", {opt['tag']}" if opt["tag"] else "")


def row(name, found, scores, intervals=None):
    """One line of the Markdown table."""
    cells = [f"{scores[m]:.3f}" + (f" [{intervals[m][0]:.3f}, {intervals[m][1]:.3f}]"
                                   if intervals else "") for m in MEASURES]
    return f"| {name} | {found['n']} / {found['n_subjects']} | " + " | ".join(cells) + " |"


def table(paths):
    """Lines of the table: each set of clips with its baselines, then the results on it."""
    groups = {}
    for path in paths:
        found = read_results(path)
        # the same clips have the same baselines, number and subjects
        key = json.dumps([found["n"], found["n_subjects"], found["baselines"]])
        groups.setdefault(key, []).append((path, found))
    lines = ["| | clips / subjects | UF1 | UAR | accuracy |", "|---|---|---|---|---|"]
    for members in groups.values():
        first = members[0][1]
        for baseline, scores in first["baselines"].items():
            lines.append(row(f"baseline: {baseline.replace('_', ' ')}", first, scores))
        for path, found in sorted(members, key=lambda m: m[1]["opt"]["model_path"] != "random"):
            lines.append(row(title(path, found), found, found, found["ci95"]))
    return lines, any(found.get("rendered") for group in groups.values() for _, found in group)


@util.command_line
def main(argv=None):
    opt = parse_option(argv)
    lines, rendered = table(opt.results)
    if rendered:
        print("rendered stand-in data, not CAS(ME)^3:\n")
    print("\n".join(lines))
    print("\nin brackets: 95 % intervals, resampling subjects")


if __name__ == "__main__":
    main()
