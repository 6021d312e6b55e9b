"""What the preparation of flow writes beside the arrays, and whether it is there already."""
import argparse
import hashlib
import json
import os
from dataclasses import asdict, astuple, replace
from pathlib import Path

from images import flow
from images.lists import DATABASES, natural
from images.videos import read_units, read_videos
from preparation import annotation, outputs, videos
from preparation.annotation import Row, Table
from util import BadInput, sha256_of, write_json, write_table

SET_COLUMNS = ("database", "subject", "key", "label", "emotion", "clip", "onset", "apex", "offset",
               "units")


def clip_name(row: Row) -> str:
    """A clip in onset_apex.csv, where no two of a subject may be called the same."""
    return f"{row.video}-{row.onset}"


def settle(table: Table, clips: list, keep_classes: bool) -> list:
    """(row, task, record) of the clips that stay, with what follows of them: unknown action units
    are named, and unless `keep_classes` a class is what one of them shows."""
    for row, _, _ in clips:
        for mark in dict.fromkeys(read_units(row.units)[1]):
            table.repaired(f"action unit {mark!r} is none: left out", row.key)
    if keep_classes:
        return clips
    table.classes = tuple(sorted({row.emotion for row, _, _ in clips}, key=natural))
    return [(replace(row, label=table.classes.index(row.emotion)), *rest) for row, *rest in clips]


def stamp_of(opt: argparse.Namespace, table: Table, tasks: list,
             settings: videos.Settings) -> str:
    """Digest of everything that a set follows from: frames, flow's parameters, what was read."""
    content = [[videos.fingerprint(task, settings) for task in tasks], table.source, opt.jitters,
               opt.middle, opt.raw, _is_rendered(opt, tasks), [astuple(row) for row in table.rows],
               table.repairs, table.dropped]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_rendered(opt, tasks):
    return outputs.is_rendered([opt.raw, opt.annotation or opt.clips], tasks)


def is_finished(folder: Path, stamp: str) -> bool:
    """Whether `folder` holds the whole set of this stamp."""
    try:
        content = read_videos(folder).info
        return content["stamp"] == stamp and content["tables"] == digests_of_tables(folder)
    except (BadInput, KeyError, OSError):
        return False


def digests_of_tables(folder: Path) -> dict:
    """Name → SHA-256 of the tables of a set."""
    return {name: sha256_of(folder / name)
            for name in ("clips.csv", "onset_apex.csv")}


def write(opt: argparse.Namespace, table: Table, clips: list, settings: videos.Settings,
          stamp: str) -> None:
    """The files of a set from (row, task, record) of its clips; flow.json, without which nothing
    reads it, last."""
    folder, rows = Path(opt.data_folder), [row for row, _, _ in clips]
    (folder / "flow.json").unlink(missing_ok=True)
    digests = videos.assemble(folder, [task for _, task, _ in clips],
                              [record for _, _, record in clips], opt.size)
    write_table(folder / "clips.csv", SET_COLUMNS, (
        (DATABASES[row.database], row.person, row.key, row.label, row.emotion, row.video,
         row.onset, row.apex, row.offset, row.units) for row in rows))
    # for `prepare.py casme3 --clips`: the same clips, under the same keys, as difference images
    write_table(folder / "onset_apex.csv", (*annotation.CLIP_COLUMNS, "key"), (
        (DATABASES[row.database], row.person, clip_name(row),
         *(os.path.relpath(name, opt.raw) for name in row.files), row.emotion, row.key)
        for row in rows))
    write_json(folder / "flow.json", {
        "classes": list(table.classes), "size": opt.size, "jitters": opt.jitters,
        "middle": opt.middle, "reference": opt.reference, "flow": flow.parameters(opt.flow),
        "settings": asdict(settings), "annotation": table.source, "digests": digests,
        "tables": digests_of_tables(folder), "stamp": stamp,
        "rendered": _is_rendered(opt, [task for _, task, _ in clips]), "repairs": table.repairs,
        "dropped": [{"clip": key, "reason": reason} for key, reason in table.dropped]})
