"""A small set as CASME II is received: textured frames whose mouth corners move, and a workbook."""
import numpy as np
from PIL import Image

COLUMNS = ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units",
           "Estimated Emotion")
CLIPS = [(1, "EP02_01f", 46, 59, 86, "12", "happiness"),
         (1, "EP03_02", 1, 31, 61, "4+7", "disgust"),
         (2, "EP02_01f", 10, 40, 90, "1+2", "surprise"), (2, "EP08_04", 5, 25, 45, "L10", "others"),
         (3, "EP01_01", 20, 60, 80, "15", "repression"), (3, "EP01_02", 2, 22, 42, "14", "others"),
         (3, "EP09_01", 3, 23, 43, "?", "fear"), (4, "EP05_01", 7, 27, 47, "12", "happiness")]
SIGN = {"happiness": (1, 0), "disgust": (0, -1), "surprise": (0, 1), "others": (-1, 0),
        "repression": (1, 1)}


def texture(seed, size):
    """A function of x and y, in units of the frame's side: grey levels."""
    rng = np.random.default_rng(seed)
    cycles, angle, phase = rng.uniform(2, 10, 24), *rng.uniform(0, 2 * np.pi, (2, 24))
    def levels(x, y):
        waves = sum(np.cos(2 * np.pi * c * (x * np.cos(a) + y * np.sin(a)) + p) / c
                    for c, a, p in zip(cycles, angle, phase))
        return 127.5 + 60 * waves
    return levels


def frame(subject, direction, amount, size=80, width=64):
    """RGB uint8 `[size, width, 3]`: the middle displaced by `amount` pixels."""
    y, x = np.mgrid[:size, :width].astype(float)
    bump = amount * np.exp(-((x - width / 2) ** 2 + (y - size / 2) ** 2) / (2 * (size / 6) ** 2))
    levels = texture(subject, size)((x - direction[0] * bump) / size,
                                    (y - direction[1] * bump) / size)
    return np.repeat(levels.round().clip(0, 255).astype(np.uint8)[..., None], 3, 2)


def course(number, onset, apex, offset):
    """0 at the onset, 1 at the apex, .2 at the offset."""
    if number <= apex:
        return (number - onset) / (apex - onset)
    return 1 - 0.8 * (number - apex) / (offset - apex)


def write(folder, clips=CLIPS, prefix="reg_img", step=1, amplitude=2.0, workbook="csv"):
    """Writes frames and workbook below `folder`; step: of every frame, or of so many."""
    for subject, name, onset, apex, offset, _, emotion in clips:
        place = folder / "Cropped" / f"sub{subject:02d}" / name
        place.mkdir(parents=True)
        for number in range(onset, offset + 1, step):
            level = amplitude * course(number, onset, apex, offset)
            Image.fromarray(frame(subject, SIGN.get(emotion, (0, 0)), level)).save(
                place / f"{prefix}{number}.jpg", quality=95)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / f"coding.{workbook}", clips)
    return folder


def write_table(path, clips):
    """A workbook, .xlsx or .csv, of these clips."""
    rows = [COLUMNS, *clips]
    if path.suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    else:
        import openpyxl
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
