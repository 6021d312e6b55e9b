"""What is irregular in the data as received, planted in what `render.py casme3 --raw` made."""
import csv

from util import write_table

NO_DOT = 210  # a subject whose depth folder is spNO210


def plant(folder):
    """Plants every irregularity in a clip of its own, in the frames of a rendered folder and its
    annotation.csv; returns dict name → the clip's row before. The frames lie elsewhere then, and
    the last subject is number NO_DOT."""
    with open(folder / "annotation.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    root, last = folder / "part_A_split" / "part_A", table[-1]["Subject"]
    root.parent.mkdir()
    (folder / "part_A").rename(root)
    (root / last).rename(root / f"spNO.{NO_DOT}")
    for row in table:
        if row["Subject"] == last:
            row["Subject"] = f"spNO.{NO_DOT}"
    free, planted = list(table), {}
    for name, fits, change in IRREGULARITIES:
        row = next(row for row in free if fits(row))
        free = [other for other in free if other is not row]
        planted[name] = dict(row)
        change(row, root / row["Subject"] / row["Filename"])
    write_table(folder / "annotation.csv", list(table[0]), table)
    return planted


def _dotted(row):
    return row["Subject"] != f"spNO.{NO_DOT}"


def _slow(row):
    return _dotted(row) and int(row["Apex"]) - int(row["Onset"]) >= 4


def _remove(row, video, near=0, views=("color", "depth")):
    """Deletes the apex frame, and as many neighbours on both sides as `near` says."""
    for number in range(int(row["Apex"]) - near, int(row["Apex"]) + near + 1):
        for view in views:
            next((video / view).glob(f"{number}.*")).unlink()


def _flatten(row, video):
    for file in (video / "depth").iterdir():
        file.rename(video / file.name)
    (video / "depth").rmdir()


def _lose_dot(row, video):
    for depth in list(video.parent.glob("*/depth")):
        place = video.parent.with_name(f"spNO{NO_DOT}") / depth.parent.name
        place.mkdir(parents=True)
        depth.rename(place / "depth")


# Name, the rows it can be planted in, how.
IRREGULARITIES = [
    ("subject without the dot in the depth tree", lambda row: not _dotted(row), _lose_dot),
    ("Others beside others", lambda row: row["emotion"] == "others",
     lambda row, video: row.update(emotion="Others")),
    ("apex frame missing", _slow, _remove),
    ("apex frame missing in depth", _slow,
     lambda row, video: _remove(row, video, views=("depth",))),
    ("apex frame and its neighbours missing", _dotted,
     lambda row, video: _remove(row, video, near=2)),
    ("depth folder without the inner depth/", _dotted, _flatten),
    ("apex equal to onset", _dotted, lambda row, video: row.update(Apex=row["Onset"])),
    ("apex outside onset to offset", _dotted,
     lambda row, video: row.update(Apex=str(int(row["Offset"]) + 3))),
    ("offset 0", _dotted, lambda row, video: row.update(Offset="0")),
    ("onset and apex 0", _dotted, lambda row, video: row.update(Onset="0", Apex="0")),
    ("clip of several seconds", _dotted, lambda row, video: row.update(
        Apex=str(int(row["Onset"]) + 150), Offset=str(int(row["Onset"]) + 170))),
    ("subject in another case", _dotted,
     lambda row, video: row.update(Subject=row["Subject"].replace("spNO", "spNo"))),
    ("video letter in another case", _dotted,
     lambda row, video: row.update(Filename=row["Filename"].upper())),
]
