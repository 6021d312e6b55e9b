"""Imports run downwards: a room knows those of lower floors and itself, no script a script."""
import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = {"util": 1, "models": 2, "NCE": 1, "images": 2, "dataset": 3, "training": 3,
          "evaluation": 4, "preparation": 4, "rendering": 4, "prediction": 5}
ALLOWED = {"util": (), "NCE": (), "models": ("util",), "images": ("util",),
           "dataset": ("images", "util"), "training": ("images", "models", "util"),
           "evaluation": ("dataset", "images", "models", "training", "util"),
           "preparation": ("dataset", "images", "util"),
           "rendering": ("dataset", "images", "util"),
           "prediction": ("dataset", "evaluation", "images", "models", "preparation", "training",
                          "util")}


def imports_of(path):
    """(room, module) pairs of the project's modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name.split(".")[0], ".".join(name.split(".")[:2])) for name in names)


def scripts():
    return {path.stem: path for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_lower_floors_alone(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).glob("*.py")
    for path in files:
        others = {name for name, _ in imports_of(path)} & (FLOORS.keys() | scripts().keys())
        assert others <= {room, *ALLOWED[room]}, path
    assert all(FLOORS[below] < FLOORS[room] for below in ALLOWED[room])


def test_no_script_imports_a_script():
    for name, path in scripts().items():
        if name not in FLOORS:
            assert not {room for room, _ in imports_of(path)} & (scripts().keys() - FLOORS.keys())


def test_no_circle_within_a_room():
    for room in FLOORS:
        files = {f"{room}.{path.stem}": path for path in (ROOT / room).glob("*.py")}
        left = {name: {module for _, module in imports_of(path)} & files.keys() - {name}
                for name, path in files.items()}
        while left:
            free = {name for name, needed in left.items() if not needed & left.keys()}
            assert free, f"a circle among {sorted(left)}"
            left = {name: needed for name, needed in left.items() if name not in free}


@pytest.mark.parametrize("module, without", [
    ("evaluation.measures", ("torch", "matplotlib", "PIL")),
    # two seconds that every start of DVSCL's scripts would take
    ("fine-tune_DVSCL", ("timm", "torchvision", "sklearn"))])
def test_what_is_not_needed_is_not_loaded(module, without):
    code = (f"import sys, importlib; importlib.import_module({module!r})\n"
            f"print([name for name in {without} if name in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          check=True).stdout
    assert said.strip() == "[]"
