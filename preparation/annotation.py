"""What says where the clips are: workbooks, CSV files, published lists, clips.csv → one Table.

Every source ends as a list of Row, with what was repaired or dropped on the way, by rule.
"""
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from images import lists
from images.lists import DATABASES, clip_key, image_paths, natural
from preparation import sheets
from util import BadInput, read_cells, sha256_of

COLUMNS = ("subject", "filename", "onset", "apex", "offset", "au", "objective class", "emotion")
CLIP_COLUMNS = ("database", "subject", "clip", "onset", "apex", "label")  # and, optional, key
NO_OFFSET = 15  # frames after the onset that stand in for an offset of 0: half a second
# Labels as the databases write them → the four classes of the published lists.
NAMED_CLASS = {
    **dict.fromkeys(("anger", "disgust", "fear", "sad", "sadness", "contempt", "repression",
                     "negative"), "negative"),
    **dict.fromkeys(("happy", "happiness", "positive"), "positive"),
    "surprise": "surprise", **dict.fromkeys(("others", "other"), "others"),
}
ONE_NAME = {"happiness": "happy", "sadness": "sad", "other": "others"}  # of two spellings
CLASS_SETS = {3: ("negative", "positive", "surprise"),
              4: ("negative", "others", "positive", "surprise")}


@dataclass(frozen=True)
class Row:
    """One clip. subject, video: as file names write them; onset, apex, offset: frame numbers
    (offset None where unknown); emotion: the label's name, '' unlabelled; label: its id; blank:
    its apex is its onset or lies outside the clip; files: (onset, apex, depth onset, depth apex)
    where the annotation names them; rgb, depth: paths of the difference images below the data
    folder; listed: the subject's name in lists that are copied; intensity: that of an unlabelled
    pair, of its unit."""
    database: int
    subject: str
    video: str
    onset: int
    apex: int
    offset: int | None
    units: str
    emotion: str
    key: str
    label: int = -1
    blank: bool = False
    files: tuple = ()
    rgb: str = ""
    depth: str = ""
    listed: str = ""
    intensity: float = 0.0

    @property
    def person(self) -> str:
        """The subject as lists name it: spNO10 for spNO.10."""
        return self.listed or re.sub(r"(?i)^(spno)\.", r"\1", self.subject)


@dataclass
class Table:
    """The clips that stay; annotated: all that could be read; repairs: rule → keys; dropped:
    (key, reason); classes: names in id order; source: name and digest of the annotation; lists:
    the folder to copy lists from, or None."""
    rows: list
    source: dict
    classes: tuple = ()
    repairs: dict = field(default_factory=dict)
    dropped: list = field(default_factory=list)
    lists: Path | None = None
    annotated: tuple = ()

    def repaired(self, rule: str, key: str) -> None:
        """Notes that a rule mended a clip."""
        self.repairs.setdefault(rule, []).append(key)


def too_long(frames: int, max_gap: int) -> str:
    """Why a clip of so many frames from onset to apex is dropped, or ''."""
    if frames <= max_gap:
        return ""
    return f"{frames} frames from onset to apex, more than --max_gap {max_gap}"


def is_name(text: str) -> bool:
    """Whether a subject or video can be part of file names: not empty, leading nowhere else."""
    return re.fullmatch(r"[^\s./\\][^/\\\n\r\t]*", text) is not None


def read_annotation(path: str | Path) -> Table:
    """Table of a workbook, a CSV file or a folder of published lists; raises BadInput."""
    path = Path(path)
    if path.is_dir():
        return _read_lists(path)
    cells = sheets.read_sheet(path, ", or a folder of lists")
    table = Table([], {"name": path.name, "sha256": sha256_of(path)})
    places = sheets.header(path, cells, COLUMNS)
    clips = set()
    for number, line in cells[1:]:
        values = {name: sheets.cell_text(line[i]) if i < len(line) else ""
                  for name, i in places.items()}
        if any(values.values()):
            _add_row(table, values, f"row {number}", clips)
    if not table.rows:
        raise BadInput(f"{path}: no clip in it; the rows below the header name one each")
    table.source["rows"] = len(table.rows) + len(table.dropped)
    return table


def _add_row(table, values, where, clips):
    """One row of the annotation, repaired where the rules say how; see the report for them.

    clips: (subject, video, onset) of those that are there already.
    """
    name = re.fullmatch(r"(?i)spno\.?(\d+)", values["subject"])
    subject = f"spNO.{int(name[1])}" if name else values["subject"]
    video, emotion, reason = values["filename"], values["emotion"].lower(), ""
    key = f"{subject}-{video} {where}"
    frames = {column: values[column] for column in ("onset", "apex", "offset")}
    wrong = [column for column, text in frames.items() if not re.fullmatch(r"\d+", text)]
    if not (is_name(subject) and is_name(video)):
        reason = f"subject {subject!r} or video {video!r} is no name"
    elif wrong:
        reason = f"{wrong[0]} {frames[wrong[0]]!r} is not a frame number"
    else:
        onset, apex, offset = map(int, frames.values())
        key, same = clip_key(subject, video, onset, apex), (subject, video.lower(), onset)
        if emotion not in NAMED_CLASS:
            reason = f"{where}: emotion {values['emotion']!r} is not known"
        elif same in clips:
            reason = f"{where}: a second row for this subject, video and onset"
    if reason:
        table.dropped.append((key, reason))
        return
    clips.add(same)
    if values["subject"] != subject:
        table.repaired("subject spelled otherwise than spNO.<i>", key)
    if values["emotion"] != emotion:
        table.repaired("emotion with capitals (Others)", key)
    if offset == 0 or offset < onset:
        table.repaired(f"offset {'before onset' if offset else 0}: onset + {NO_OFFSET}, or the "
                       f"apex", key)
        offset = max(onset + NO_OFFSET, apex)
    table.rows.append(_blank_checked(
        table, Row(0, subject, video, onset, apex, offset, values["au"], emotion, key)))


def _blank_checked(table, row):
    """The row, marked blank where its apex is its onset, or lies outside onset to offset."""
    outside = row.apex < row.onset or (row.offset is not None and row.apex > row.offset)
    if outside:
        table.repaired("apex outside onset to offset: blank", row.key)
    elif row.apex == row.onset:
        table.repaired("apex equal to onset: blank", row.key)
    return replace(row, blank=outside or row.apex == row.onset)


# ---------------------------------------------------------------- published lists

def _read_lists(folder):
    """The clips that published lists name; their file names carry subject, video, apex, onset."""
    if not all((folder / view).is_dir() for view in ("v_rgb", "v_depth")):
        raise BadInput(f"{folder}: holds no v_rgb and v_depth; as a folder --annotation names "
                       f"published lists")
    source, names = {"name": folder.name, "sha256": lists.digest(folder)}, {}
    table = Table([], source, lists=folder)
    for key, (paths, label, database, subject, where) in lists.read_paired(folder).items():
        name = re.fullmatch(r"(.+)-([A-Za-z]+)-(\d+)-\1-\2-(\d+)", key)
        if not name or database:
            raise BadInput(f"{where}: {key} does not tell subject, video, apex and onset of a clip "
                           f"of casme3; other sets are named with --clips")
        emotion = names.setdefault(label, Path(paths[0]).parent.name or str(label))
        row = Row(0, name[1], name[2], int(name[4]), int(name[3]), None, "", emotion, key, label,
                  rgb=paths[0], depth=paths[1], listed=subject)
        table.rows.append(_blank_checked(table, row))
    if sorted(names) != list(range(len(names))):
        raise BadInput(f"{folder}: its labels are {', '.join(map(str, sorted(names)))}; they go "
                       f"from 0 to C-1 without a gap")
    table.classes = tuple(names[i] for i in sorted(names))
    table.source["rows"] = len(table.rows)
    return table


def copy_lists(table: Table, target: Path, kept: set) -> Iterator[tuple]:
    """(path, text) of the published lists, byte for byte but for the rows whose path is not in
    `kept`. Subjects without a clip vanish."""
    people = {row.person for row in table.rows}
    for path in sorted(table.lists.glob("v_*/*.txt")):
        if path.parent.name not in ("v_rgb", "v_depth"):  # others' images are not made here
            continue
        name = re.sub("_(train|test)$", "", path.stem)
        if name != "subName" and name not in people:
            continue
        lines = path.read_bytes().decode("utf-8").splitlines(keepends=True)
        if name == "subName":
            lines = [line for line in lines if not line.strip()
                     or line.strip().lstrip("\ufeff") in people]
        else:
            lines = [line for line in lines if not line.strip()
                     or line.strip().lstrip("\ufeff").rsplit(None, 2)[0].replace("\\", "/") in kept]
        yield target / path.parent.name / path.name, "".join(lines)


# ---------------------------------------------------------------- clips.csv

def check_spelling(path: str | Path, rows: list[Row]) -> None:
    """Raises BadInput where one person of a database has two names: they would be trained on and
    held out at once."""
    ways = (("capitals or dots", lambda name: name.lower()),
            # sub01 and Sub1 are one, 1.1 and 11 are two
            ("leading zeros", lambda name: re.sub(r"(?<!\d)0+(?=\d+$)", "", name.lower())),
            ("what stands before the number", lambda name: re.sub(
                r"(?<!\d)0+(?=\d+$)", "", re.sub(
                    r"^(?:s|sub|subject|spno)?[ _-]*(?=\d+$)", "", name.lower()))))
    spelled = {}
    for row in rows:
        first = spelled.setdefault((row.database, ways[-1][1](row.person)), row)
        if first.person != row.person:
            how = next(how for how, plain in ways if plain(first.person) == plain(row.person))
            raise BadInput(f"{path}: subjects {first.subject!r} and {row.subject!r} of "
                           f"{DATABASES[row.database]} differ in {how} alone; spell a person one "
                           f"way, or they are trained on and held out at once")


def read_clips_csv(path: str | Path, root: Path) -> Table:
    """Table of clips.csv: paths of frames relative to `root`; raises BadInput."""
    path = Path(path)
    cells = [*read_cells(path, f"--clips names a CSV file with the columns "
                         f"{','.join(CLIP_COLUMNS)} and, optional, depth_onset,depth_apex and "
                         f"key")]
    places, rows, lines, missing = sheets.header(path, cells, CLIP_COLUMNS), [], {}, []
    # spreadsheets may end their files in blank rows
    filled = [(number, line) for number, line in cells[1:] if "".join(line).strip()]
    depth = "depth_onset" in places
    if depth != ("depth_apex" in places):
        raise BadInput(f"{path}:1: one of the columns depth_onset and depth_apex; give both or "
                       f"neither")
    table = Table(rows, {"name": path.name, "sha256": sha256_of(path),
                         "rows": len(filled)})
    for number, line in filled:
        if len(line) != len(cells[0][1]):
            raise BadInput(f"{path}:{number}: {len(line)} fields, the header has "
                           f"{len(cells[0][1])}")
        values = {name: line[i].strip() for name, i in places.items()}
        files = [values["onset"], values["apex"]]
        files += [values["depth_onset"], values["depth_apex"]] if depth else []
        if values["database"] not in DATABASES or not all(files):
            raise BadInput(f"{path}:{number}: the database is one of {', '.join(DATABASES)}, and "
                           f"no path is empty: depth for all clips or without those columns")
        subject, video = values["subject"], values["clip"]
        if not all(map(is_name, (subject, video, values.get("key") or video))):
            raise BadInput(f"{path}:{number}: subject {subject!r}, clip {video!r} or its key: part "
                           f"of file names, so neither empty nor with a slash or a dot in front")
        missing += [(number, name) for name in files if not (root / name).is_file()]
        emotion = values["label"].lower()
        if emotion not in NAMED_CLASS:
            raise BadInput(f"{path}:{number}: label {values['label']!r} is not one of "
                           f"{', '.join(sorted(NAMED_CLASS))}")
        key = values.get("key") or clip_key(subject, video, *(Path(n).stem for n in files[:2]))
        identity = values["database"], key
        if lines.setdefault(identity, number) != number:
            raise BadInput(f"{path}:{number}: {key} is in line {lines[identity]} already")
        row = Row(DATABASES.index(values["database"]), subject, video, 0, int(files[0] != files[1]),
                  None, "", emotion, key, files=tuple(str(root / name) for name in files))
        rows.append(_blank_checked(table, row))
    if missing:
        raise BadInput(f"{path}:{missing[0][0]}: {missing[0][1]} is not below --raw {root}; "
                       f"{len(missing)} paths in all are not")
    if not rows:
        raise BadInput(f"{path}: no clip in it")
    check_spelling(path, rows)
    return table


# ---------------------------------------------------------------- classes, paths, bounds

def finish(table: Table, classes: int, blank_apex: str, max_gap: int) -> None:
    """Ids and paths for every row, and what the options drop; changes the table."""
    if blank_apex == "middle" and any(row.offset is None for row in table.rows):
        raise BadInput(f"{table.source['name']}: --blank_apex middle takes offsets, which only the "
                       f"workbooks and their .csv have")
    if table.lists is None:
        spelled = {row.emotion for row in table.rows}
        same = {name: other for name, other in ONE_NAME.items() if {name, other} <= spelled}
        table.rows = [replace(row, emotion=same.get(row.emotion, row.emotion))
                      for row in table.rows]
        named = CLASS_SETS.get(classes)
        table.classes = named or tuple(sorted({row.emotion for row in table.rows}, key=natural))
    table.annotated, rows = tuple(table.rows), []
    for row in table.rows:
        if row.blank and blank_apex == "drop":
            table.dropped.append((row.key, "blank: apex equal to onset, or outside its clip"))
        elif not row.blank and (reason := too_long(row.apex - row.onset, max_gap)):
            table.dropped.append((row.key, reason))
        elif table.lists:
            rows.append(row)
        else:
            name = row.emotion if classes == 7 else NAMED_CLASS[row.emotion]
            if name in table.classes:
                row = replace(row, label=table.classes.index(name))
                rows.append(with_paths(row, name, classes))
            else:
                table.dropped.append((row.key, f"{name} is not one of the {classes} classes"))
    table.rows = rows


def with_paths(row: Row, folder: str, classes: int) -> Row:
    """The row with the paths of its difference images; folder: the class, or 'unlabelled'."""
    rgb, depth = image_paths(row.key, folder, row.database, classes)
    return replace(row, rgb=rgb, depth=depth)
