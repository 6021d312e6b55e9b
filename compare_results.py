"""Several results side by side: changed options, one table with baselines, paired tests.

  python compare_results.py results/A/results.json results/B/results.json
  python compare_results.py --latex --published results/*/results.json > table.tex

UF1, UAR and accuracy with 95 % intervals over subjects, images where none are named; results that
differ in the seed alone also as mean and standard deviation; for each pair a permutation test of
the UF1 difference that swaps whole subjects, or images. Figures come from the predictions.csv
beside each results.json. Markdown, or LaTeX for the packages booktabs and rotating: a table too
large for the page is turned or made smaller. Seconds.
"""
import util  # first: it settles how threads wait before torch is imported

# isort: split
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from evaluation import measures, result_files
from evaluation.measures import MEASURES
from util import BadInput, check_output, ensure, read_table

PUBLISHED = Path(measures.__file__).with_name("published.csv")
VERIFIED = ("verified", "unverified")  # whether both figures were seen in the source named
# options that may differ when a run goes on, in results that do not say so themselves
FREE = {"data_folder", "list_folder", "model_path", "save_path", "tb_path", "cache", "pairs",
        "num_workers", "device", "print_freq", "save_freq", "save_minutes", "resume", "subject",
        "seeds", "oracle_curve"}
STARTS = ("model_path", "pretrained", "finetune")  # options that name a checkpoint to start from
# of FREE the ones that say what is computed, not where and how
TOLD = {"model_path", "pretrained", "data_folder", "list_folder", "pairs", "subject"}
HEAD = ("", "number / subjects", "UF1", "UAR", "accuracy", "transductive")
TRANSDUCTIVE = {True: "yes", False: "no", None: "unknown"}
Table = tuple[str, Sequence[str], list[list[str]]]  # caption, head, rows


def parse_option(argv: list[str] | None) -> util.Options:
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", metavar="results.json",
                        help="files that the scripts wrote, each with its predictions.csv beside "
                             "it")
    parser.add_argument("--common", action="store_true",
                        help="compare on the clips that all results hold; without it, results "
                             "on differing clips are refused")
    parser.add_argument("--latex", action="store_true", help="LaTeX instead of Markdown")
    parser.add_argument("--published", action="store_true",
                        help=f"add the literature's figures of {PUBLISHED.name}, apart: they are "
                             f"of other clips and other rules")
    parser.add_argument("--picture", metavar="FILE.png",
                        help="also draw UF1 and its intervals to this file [none]")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- reading

def read_results(path: str | Path) -> dict:
    """The content of one results.json, with `stage` and `predictions`; raises BadInput."""
    path = Path(path)
    try:
        result = {"free": FREE, **json.loads(path.read_text(encoding="utf-8"))}
        ensure({*MEASURES, "opt", "n_label", "confusion", "protocol"} <= result.keys())
        # a script without a pre-trained source, and a release before --without
        result["opt"] = {"model_path": "", "encoder": "both", "without": [], **result["opt"]}
        ensure(all(isinstance(result["opt"][name], kind) for name, kind in (
            ("model", str), ("model_path", str), ("encoder", str), ("seed", int))))
        ensure(isinstance(result["n_label"], int) and result["n_label"] == len(result["confusion"]))
        ensure(result.get("transductive") in TRANSDUCTIVE)
        ensure(all(isinstance(name, str) for name in result["free"]))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise BadInput(f"{path}: " + ("a folder" if path.is_dir() else "missing")
                       + "; name a results.json")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise BadInput(f"{path}: not a results.json; run the script that wrote it again")
    folder = path.resolve().parent.name
    # scripts that name a run's folder by its options begin with the stage
    result["stage"] = folder.split("_")[0] if "tag" in result["opt"] else folder
    table = path.with_name("predictions.csv")
    n_label = result["n_label"]
    result["predictions"] = result_files.read_predictions(table, n_label)
    labels, predictions = zip(*result["predictions"].values())
    if measures.confusion_matrix(labels, predictions, n_label).tolist() != result["confusion"]:
        raise BadInput(f"{table}: is not what {path} was computed from; run the script that wrote "
                       f"them again")
    return result


def align_classes(results: list[dict]) -> None:
    """Gives labels and predictions the class ids of the first result, where another one names the
    same classes in another order; changes the results."""
    def names_of(result):
        names = result.get("classes")
        names = [str(name).lower() for name in names] if isinstance(names, list) else []
        return names if len(set(names)) == len(names) == result["n_label"] else None

    first = names_of(results[0])
    for result in results[1:]:
        names = names_of(result)
        if first and names and names != first and set(names) == set(first):
            result["predictions"] = {
                clip: tuple(first.index(names[i]) for i in ids)
                for clip, ids in result["predictions"].items()}


def common_clips(paths: list[str], results: list[dict], common: bool) -> list[tuple]:
    """(database, subject, key) of the clips to compare on, in the first result's order.

    common: take the intersection where they differ. Raises BadInput for differing clips without
    `common`, for none left, and for other classes or labels.
    """
    first = results[0]
    shared = set.intersection(*(set(result["predictions"]) for result in results))
    for path, result in zip(paths, results):
        if result["n_label"] != first["n_label"]:
            raise BadInput(f"{path}: tells {result['n_label']} classes apart, {paths[0]} "
                           f"{first['n_label']}; compare results of the same classes")
        other = [clip for clip in shared
                 if result["predictions"][clip][0] != first["predictions"][clip][0]]
        if other:
            raise BadInput(f"{path}: {len(other)} clips carry another label than in {paths[0]}, "
                           f"{'/'.join(min(other))} the first; compare results of the same labels")
    for path, result in zip(paths, results):
        if not common and result["predictions"].keys() != first["predictions"].keys():
            raise BadInput(f"{path}: holds {len(result['predictions'])} "
                           f"{result.get('noun', 'clips')}, {paths[0]} "
                           f"{len(first['predictions'])}, and all results {len(shared)} in "
                           f"common; --common compares on those")
    if not shared:
        raise BadInput(f"{paths[-1]}: has no clip in common with the others; compare results on "
                       f"the same data")
    return [clip for clip in first["predictions"] if clip in shared]


def rows_on(result: dict, clips: list[tuple]) -> list[dict]:
    """Prediction rows of the given clips."""
    return [dict(zip(result_files.COLUMNS, (*clip, *result["predictions"][clip])))
            for clip in clips]


# ---------------------------------------------------------------- tables

def title(result: dict) -> str:
    """What a result is of, in a few words."""
    opt, starts = result["opt"], {result["opt"].get(name) for name in STARTS}
    # a script that trains from scratch has no source
    encoder = "untrained " if "random" in starts else \
        "pre-trained " if starts - {None, "", "none"} else ""
    view = "" if opt["encoder"] == "both" else f", {opt['encoder']} alone"
    frozen = ", frozen" if opt.get("freeze_encoder") else ""
    return f"{result['stage']}, {encoder}{opt['model']}{view}{frozen}, {result['protocol']}" \
           + (f", {opt['tag']}" if opt.get("tag") else "")


def row(name: str, scores: dict, cells: list[str], transductive: str = "") -> list[str]:
    """One row of figures; `scores` says of how many clips and subjects."""
    return [name, f"{scores['n']} / {scores['n_subjects'] or '-'}", *cells, transductive]


def saw_held_out(results: Sequence[dict]) -> str:
    """Whether an encoder of these results saw held-out subjects: yes, no, or unknown."""
    return TRANSDUCTIVE[result_files.whether_transductive(
        result.get("transductive") for result in results)]


def plain(scores: dict) -> list[str]:
    """The cells of figures without intervals."""
    return [f"{scores[m]:.3f}" for m in MEASURES]


def system(result: dict, told: bool) -> str:
    """What a result was computed with but for seeds, as a comparable text; told: all results say by
    which command, which tells it where folders have been renamed."""
    same = {k: v for k, v in result["opt"].items()
            if k not in {*result["free"], "seed", "seeds", *STARTS}
            and not (k == "warmup_epochs" and result["opt"].get("warmup_derived"))}
    starts = [re.sub(r"_seed_\d+", "", start) for start in started_from(result)]
    script = str(result["command"] if told else result["stage"]).split()[:2]
    return json.dumps([script, result["protocol"], result.get("data_digest"), starts,
                       same], sort_keys=True)


def started_from(result: dict) -> tuple:
    """The checkpoints that a result's network started from; pre-training may have its own seed."""
    return tuple(str(result["opt"].get(name)) for name in STARTS)


def seed_rows(results: list[dict], figures: list[dict]) -> list[list[str]]:
    """A row of mean and deviation for each system that was run with several seeds."""
    groups, told = {}, all("command" in result for result in results)
    for number, (result, scores) in enumerate(zip(results, figures), 1):
        seed = result["opt"]["seed"], started_from(result)
        groups.setdefault(system(result, told), {}).setdefault(seed, (number, result, scores))
    rows = []
    for group in groups.values():
        if len(group) > 1:
            numbers, members, scores = zip(*group.values())
            cells = measures.over_seeds(scores)
            rows.append(row(f"{', '.join(map(str, numbers))}: {title(members[0])}, mean and "
                            f"standard deviation over {len(group)} seeds", scores[0],
                            ["{:.3f} ± {:.3f}".format(*cells[m]) for m in MEASURES],
                            saw_held_out(members)))
    return rows


def result_table(results: list[dict], figures: list[dict], note: str) -> Table:
    """Baselines, then each result with intervals and its databases, then means over seeds.

    Transductive: an encoder saw held-out subjects, as the results say of all their clips.
    """
    rows = [row(f"baseline: {name.replace('_', ' ')}", figures[0], plain(scores))
            for name, scores in figures[0]["baselines"].items()]
    for number, (result, scores) in enumerate(zip(results, figures), 1):
        ci = scores["ci95"]
        rows.append(row(f"{number}: {title(result)}", scores, [
            f"{scores[m]:.3f} {measures.bracketed(ci[m])}" for m in MEASURES],
            saw_held_out([result])))
        if len(scores["per_database"]) > 1:
            rows += [row(f"{number}: {database} of these", part, plain(part))
                     for database, part in scores["per_database"].items()]
    units, people = figures[0]["resampled"], figures[0]["n_subjects"]
    few = f" (fewer than {measures.FEW}: too narrow)" * measures.too_few(people)
    return (f"Held-out {units}, {note}; in brackets 95 % intervals, resampling {units}{few}", HEAD,
            rows + seed_rows(results, figures))


def shown(value: object) -> str:
    """An option's value as text."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False).replace("null", "none")


def option_table(results: list[dict]) -> Table:
    """The options (and stage, protocol, data) that are not the same in all results."""
    settings = [{"stage": result["stage"], "protocol": result["protocol"],
                 "data": str(result.get("data_digest"))[:8], **result["opt"]} for result in results]
    bookkeeping = set().union(*(result["free"] for result in results)) - TOLD
    names = dict.fromkeys(name for each in settings for name in each if name not in bookkeeping)
    rows = [[name, *(shown(each[name]) if name in each else "-" for each in settings)]
            for name in names]
    return ("What changed in the options", ("option", *map(str, range(1, len(results) + 1))),
            [line for line in rows if len(set(line[1:])) > 1])


def test_table(results: list[dict], clips: list[tuple]) -> Table:
    """The paired test of every two results."""
    labels = [results[0]["predictions"][clip][0] for clip in clips]
    named = any(clip[1] for clip in clips)
    people = [clip[:2] if named else clip for clip in clips]
    unit = "subject" if named else "image"
    guesses = [[result["predictions"][clip][1] for clip in clips] for result in results]
    pairs = list(itertools.combinations(range(len(results)), 2))
    tests = [measures.permutation_test(labels, guesses[i], guesses[j], people,
                                       results[0]["n_label"]) for i, j in pairs]
    adjusted = measures.holm([p for _, p in tests])
    mcnemar = [measures.mcnemar(labels, guesses[i], guesses[j]) for i, j in pairs]
    return (f"Paired permutation tests of UF1: predictions swapped {unit} by {unit}, two-sided, "
            f"{measures.DRAWS:,} draws; Holm's correction for {len(pairs)} "
            f"pair{'s' * (len(pairs) > 1)}. McNemar's exact test of accuracy takes all as "
            f"independent of one another, which those of one subject are not",
            ("pair", "UF1 difference", "p", "p (Holm)", "p (McNemar)"),
            [[f"{i + 1} minus {j + 1}", f"{difference:+.3f}", f"{p:.4f}", f"{holm:.4f}",
              f"{alone:.4f}" if alone >= 5e-5 else f"{alone:.0e}"]
             for (i, j), (difference, p), holm, alone in zip(pairs, tests, adjusted, mcnemar)])


def published_table() -> Table:
    """The literature's figures; raises BadInput."""
    columns = ("method", "year", "source", "database", "n", "classes", "epoch_selection", "uf1",
               "uar", "verified")
    lines, _ = read_table(PUBLISHED, columns, fix="it belongs to evaluation/")
    for place, line in lines:
        if not all(line[column] for column in columns) or line["verified"] not in VERIFIED:
            raise BadInput(f"{place}: no field is empty; 'not stated' where a paper is silent, and "
                           f"{' or '.join(VERIFIED)} at the end")
    return ("Published figures, not comparable with those above: other clips, other splits, and "
            "mostly no word on how the epoch was chosen; verified: both figures were seen in the "
            "source named, unverified: they were not",
            [{"uf1": "UF1", "uar": "UAR"}.get(c, c.replace("_", " ")) for c in columns],
            [[line[column] for column in columns] for _, line in lines])


# ---------------------------------------------------------------- printing

def markdown(caption: str, head: Sequence[str], rows: list[list]) -> str:
    """A table as Markdown, under its caption."""
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join([f"{caption}:", "", *("| " + " | ".join(line) + " |" for line in lines)])


LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
         "|": r"\textbar{}", "[": "{[}", "]": "{]}", **{c: "\\" + c for c in "&%$#_"}}
LONG = 44  # characters; longer cells are broken into lines of 20 em
PAGE = 345, 550  # width and height of the text of the class article, in points
PREAMBLE = r"% \usepackage{booktabs,rotating}"


def escape(text: str) -> str:
    """Text for LaTeX: special characters escaped, minus signs set as such, no dash made of two."""
    text = "".join(LATEX.get(c, c) for c in str(text))
    return re.sub(r"-(?=-)", "-{}", re.sub(r"^-(?=\d)", "$-$", text))


def latex_cell(text: str) -> str:
    """A cell, broken into lines if it is long, paths at their separators too."""
    if len(text) <= LONG:
        return escape(text)
    text = re.sub(r"/|\\_", r"\g<0>\\allowbreak{}", escape(text))
    return rf"\parbox[t]{{20em}}{{\raggedright {text}\strut}}"


def latex(caption: str, head: Sequence[str], rows: list[list]) -> str:
    """A table as a LaTeX float with booktabs, turned if it is far too wide for the page, and shrunk
    as far as it is too large all the same."""
    # about 5 points a letter, 12 between columns and from line to line
    longest = [min(max(map(len, column)), LONG) for column in zip(head, *rows)]
    wide = sum(5 * n + 12 for n in longest)
    high = sum(12 * math.ceil(max(1, *map(len, line)) / LONG) for line in (head, *rows))
    turned = wide > 1.4 * PAGE[0] and high * PAGE[1] / wide < 0.8 * PAGE[0]
    before, after = [], ""
    if wide > PAGE[0] or high > 0.8 * PAGE[1]:
        room = r"0.8\textwidth" if turned else r"0.8\textheight"
        before = [rf"\resizebox*{{!}}{{\ifdim\totalheight>{room} {room}\else\totalheight\fi}}{{%",
                  r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        after = "}}"
    float_ = "sidewaystable" if turned else "table"
    lines = [" & ".join(map(latex_cell, line)) + r" \\" for line in (head, *rows)]
    return "\n".join([rf"\begin{{{float_}}}", r"\centering", rf"\caption{{{escape(caption)}}}",
                      *before, rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\toprule", lines[0],
                      r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}" + after,
                      rf"\end{{{float_}}}"])


@util.command_line
def main(argv: list[str] | None = None) -> None:
    opt = parse_option(argv)
    places = [str(Path(path).resolve()) for path in opt.results]
    for path, place in zip(opt.results, places):
        if places.count(place) > 1:
            raise BadInput(f"{path}: named twice; name each result once")
    if opt.picture:
        check_output("--picture", opt.picture)
        if Path(opt.picture).suffix.lower() != ".png":
            raise BadInput(f"--picture {opt.picture}: a PNG is drawn; name a file that ends in "
                           f".png")
    results = [read_results(path) for path in opt.results]
    align_classes(results)
    clips = common_clips(opt.results, results, opt.common)
    figures = [measures.summarise(rows_on(result, clips), result["n_label"]) for result in results]
    noun = results[0].get("noun", "clips")
    note = f"{len(clips)} {noun}"
    if any(len(result["predictions"]) > len(clips) for result in results):
        note = f"on the {len(clips)} {noun} that all results hold"
    if any(result.get("rendered") for result in results):
        note += ", rendered stand-in data, no faces of people"
    # that test scores chose the subjects, where they did; see evaluation.videos
    note += "".join(f"; {part}" for part in sorted(
        {result["part"] for result in results if result.get("part")}))
    tables = [result_table(results, figures, note)]
    if len(results) > 1:
        changed = option_table(results)
        tables = [*([changed] if changed[2] else []), *tables, test_table(results, clips)]
    if opt.published:
        tables.append(published_table())
    show = latex if opt.latex else markdown
    print("\n\n".join([PREAMBLE] * opt.latex + [show(*table) for table in tables]))
    if opt.picture:
        from evaluation import pictures  # else the command would take seconds to start
        pictures.draw_comparison(
            opt.picture, [(f"{number}: {title(result)}", scores["uf1"], scores["ci95"]["uf1"])
                          for number, (result, scores) in enumerate(zip(results, figures), 1)],
            {name: scores["uf1"] for name, scores in figures[0]["baselines"].items()},
            note.replace("; ", "\n"), figures[0]["resampled"])


if __name__ == "__main__":
    main()
