"""The rows of a spreadsheet: a workbook of either kind, or a CSV file."""
import importlib
import re
from pathlib import Path

from util import BadInput, read_cells


def read_sheet(path: str | Path, more: str = "") -> list[tuple]:
    """(row number, cells) of a workbook's sheet, or of a CSV file.

    The sheet is the one called 'label', else the first; more: what --annotation takes besides.
    Raises BadInput.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: missing; --annotation names a workbook (.xlsx, .xls) or a .csv"
                       f"{more}")
    readers = {".xlsx": _xlsx_rows, ".xls": _xls_rows,
               ".csv": lambda path: [*read_cells(path, "save the sheet as CSV in UTF-8")]}
    if path.suffix.lower() not in readers:
        raise BadInput(f"{path}: --annotation takes .xlsx, .xls, .csv{more}")
    return readers[path.suffix.lower()](path)


def cell_text(cell: object) -> str:
    """A cell as text: numbers without the .0 that spreadsheets add."""
    text = "" if cell is None else str(cell).strip()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def _open_workbook(path, kind, package, load):
    """What `load(module of the package)` gives of a workbook; raises BadInput."""
    try:
        reader = importlib.import_module(package)
    except ImportError:
        raise BadInput(f"{path}: reading {kind} takes {package}; pip install -r "
                       f"requirements-prepare.txt, or save the sheet as .csv") from None
    try:
        return load(reader)
    except Exception as error:  # the packages raise whatever their parsers do
        raise BadInput(f"{path}: not a workbook ({error}); save it as {kind} again") from None


def _xlsx_rows(path):
    def load(openpyxl):
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = book["label"] if "label" in book.sheetnames else book.worksheets[0]
        sheet.reset_dimensions()  # a file may declare fewer rows than it has
        return list(enumerate(sheet.iter_rows(values_only=True), 1))
    return _open_workbook(path, ".xlsx", "openpyxl", load)


def _xls_rows(path):
    book = _open_workbook(path, ".xls", "xlrd", lambda xlrd: xlrd.open_workbook(path))
    names = book.sheet_names()
    sheet = book.sheet_by_name("label" if "label" in names else names[0])
    return [(i + 1, sheet.row_values(i)) for i in range(sheet.nrows)]


def header(path: Path, cells: list[tuple], columns: tuple) -> dict[str, int]:
    """dict column → place; raises BadInput for a missing one."""
    names = [cell_text(cell).lower() for cell in cells[0][1]] if cells else []
    missing = [name for name in columns if name not in names and name != "objective class"]
    if missing:
        raise BadInput(f"{path}:1: no column {', '.join(missing)}; the header is "
                       f"{', '.join(columns)}")
    return {name: i for i, name in enumerate(names) if name}
