"""What holds in every room: how input is checked, how threads wait, who deletes what."""
import ast
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, finetune, probe, script

import dataset
import util
from evaluation import heldout
from images import encoding
from preparation import outputs
from training import checkpoint, distributed

OLD_NAMES = {"prepare_CASME3", "render_CASME3", "predict_DVSCL", "sweep_intensity"}
SCRIPTS = sorted({path.stem for path in ROOT.glob("*.py")} - {"util", "dataset"} - OLD_NAMES)


def run(code, *flags, **environment):
    """Output of Python code in a process of its own, from the repository's root."""
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, text=True, check=True,
                          capture_output=True, env={**os.environ, **environment}).stdout


def test_input_is_checked_without_assert_statements(tmp_path):
    """`python -O` removes assert statements; a label 9 of 4 classes is refused all the same."""
    (tmp_path / "predictions.csv").write_text("database,subject,key,label,prediction,p_0\n"
                                              "casme3,s1,a,9,0,1.0\n")
    path = str(tmp_path / "predictions.csv")
    code = (f"import util\nfrom evaluation import result_files\n"
            f"try: result_files.read_predictions({path!r}, 4)\n"
            f"except util.BadInput as error: print('refused', error)")
    for flags in ((), ("-O",)):
        assert "refused" in run(code, *flags) and "0..3" in run(code, *flags)


def test_launch_gives_a_local_rank_that_is_ignored():
    for name, argv in (("pre-train_DVSCL", ["--data_folder", "d", "--model_path", "m"]),
                       ("LinearProbing_DVSCL_10fold", ["--data_folder", "d", "--model_path", "m",
                                                       "--save_path", "s"])):
        plain = script(name).parse_option(argv)
        for flag in ("--local-rank=1", "--local_rank=0"):
            assert vars(script(name).parse_option([flag, *argv])) == vars(plain)


def test_only_cmcs_own_prefixes_are_taken_off():
    for name, plain in (("encoder.module.rgb_to_d.conv1.weight", "rgb_to_d.conv1.weight"),
                        ("module.rgb_to_d.conv1.weight", "rgb_to_d.conv1.weight"),
                        ("encoder.norm.weight", "encoder.norm.weight"),
                        ("blocks.encoder.module.weight", "blocks.encoder.module.weight")):
        assert checkpoint._plain(name) == plain


def test_no_function_is_long_or_takes_many_parameters():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if path.parent.name != "tests" and isinstance(node, ast.FunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
                assert len([one for one in taken if one.arg != "self"]) <= 8, f"{path}: {node.name}"


def test_persons_and_labels_are_collected_once():
    """Asking every clip of a set for them takes time in proportion to its size."""
    def seconds(n):
        clips = dataset.ClipSet([dataset.Clip(0, f"s{i % 50}", str(i), 0, ())
                                 for i in range(n)], None, ("rgb", "depth"), (3, 1), {})
        start = time.perf_counter()
        for _ in clips.clips:
            assert len(clips.people) == 50 and len(clips.labels) == n
        return time.perf_counter() - start
    assert seconds(8000) < 1  # quadratic, it takes half a minute


def test_images_are_searched_for_blanks_by_the_writer_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("images were read")
    monkeypatch.setattr(encoding, "blank", refuse)
    monkeypatch.setattr(distributed, "first", lambda: False)
    kept = object.__new__(heldout.HeldOut)
    clips = dataset.ClipSet([], None, ("rgb", "depth"), (3, 1), {"difference": "signed"})
    kept.run, kept.data = None, dataset.Data(clips, np.zeros((0, 4, 8, 8), np.uint8), "")
    assert kept.finish() is None


def test_preparation_leaves_what_others_are_writing(tmp_path):
    """Half-written files of processes that live, or of other machines, stay."""
    folder = tmp_path / "set"
    (folder / ".prepare").mkdir(parents=True)
    mine = util.beside(folder / "a.png")
    others = folder / ".a.png.elsewhere.1.part"
    dead = folder / mine.name.replace(str(os.getpid()), "999999999")
    for path in (mine, others, dead):
        path.touch()

    class Table:
        lists, source = None, {}
    outputs.begin(Table, folder, True)
    assert mine.exists() and others.exists() and not dead.exists()


def test_length_of_features_is_the_checkpoints(drawn, quick, tmp_path):
    script("pre-train_DVSCL").main(["--data_folder", drawn, "--model_path", tmp_path, *quick,
                                    "--size", 32, "--feat_dim", 48])
    (path,) = tmp_path.glob("*/last.pth")
    finetune("--data_folder", drawn, "--model_path", path, "--save_path", tmp_path / "r", *quick,
             "--size", 32, "--subject", "s1")
    (tuned,) = (tmp_path / "r").glob("*/last.pth")
    state = torch.load(tuned, weights_only=True)
    assert state["opt"].pop("feat_dim") == 48
    torch.save(state, tmp_path / "earlier.pth")  # earlier releases did not write it there
    for number, source in enumerate((tuned, tmp_path / "earlier.pth")):
        probe("--data_folder", drawn, "--model_path", source, "--save_path",
              tmp_path / f"p{number}", *quick, "--size", 32, "--subject", "s1")
    state = torch.load(path, weights_only=True)
    state["opt"]["feat_dim"] = 64
    torch.save(state, path)
    with pytest.raises(SystemExit):
        finetune("--data_folder", drawn, "--model_path", path, "--save_path", tmp_path / "q",
                 *quick, "--size", 32, "--subject", "s1")


def test_every_script_settles_how_threads_wait_first():
    for name in SCRIPTS:
        nodes = ast.parse((ROOT / f"{name}.py").read_text()).body
        first = next(node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert isinstance(first, ast.Import) and [a.name for a in first.names] == ["util"], name


def test_threads_wait_passively_unless_told_otherwise():
    code = """
import builtins, importlib, os
real = builtins.__import__
def look(name, *rest, **more):
    if name == "torch":  # which reads them, and takes seconds
        print([os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")], flush=True)
        os._exit(0)
    return real(name, *rest, **more)
builtins.__import__ = look
importlib.import_module("fine-tune_DVSCL")"""
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for given, expected in (({"OMP_WAIT_POLICY": "active"}, ["active", None]),
                            ({"GOMP_SPINCOUNT": "7"}, ["passive", "7"]),
                            ({}, ["passive", "1000"])):
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain | given, text=True,
                              capture_output=True, check=True).stdout
        assert said == f"{expected}\n"


def test_names_of_earlier_releases_say_what_they_are_called_now():
    for old, new in (("render_CASME3.py", "python render.py casme3 (the same flags)"),
                     ("prepare_CASME3.py", "python prepare.py casme3 (the same flags)"),
                     ("predict_DVSCL.py", "python predict.py (the same flags)"),
                     ("sweep_intensity.py", "python benchmarks/sweep_intensity.py")):
        said = subprocess.run([sys.executable, ROOT / old, "--data_folder", "d"], text=True,
                              capture_output=True, check=False)
        assert (said.returncode, said.stderr) == (2, f"error: {old} is now: {new}\n")
