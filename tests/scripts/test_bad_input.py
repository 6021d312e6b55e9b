"""Malformed input: one line that starts with `error:` and names file and fix, exit code 2, no
traceback, and nothing left behind."""
import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finetune, pretrain, probe, save_image, script

import dataset
import util
from images import decoding, transforms
from NCE.NCECriterion import NCESoftmaxLoss
from training import record

pytestmark = pytest.mark.usefixtures("small_crops")


def snapshot(folder):
    """Every file below a folder with its bytes, and every empty folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in folder.rglob("*")}


def refused(capsys, run, *argv, code=2):
    """Runs a script that must fail; its last line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    printed = capsys.readouterr().err
    assert exit_.value.code == code
    assert "Traceback" not in printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def edit(path, change):
    """Puts the text of a file through `change`."""
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


def both(data, name, change):
    """The same edit of a list of both views."""
    for view in ("v_rgb", "v_depth"):
        edit(data / view / name, change)


# ---------------------------------------------------------------- the data set

CASES = []


def case(*expected):
    """Registers a function that breaks a data set, and what the answer must contain (patterns).

    The function may return more flags.
    """
    def register(function):
        CASES.append(pytest.param(function, expected, id=function.__name__))
        return function
    return register


@case("data_folder", "nowhere: no such folder")
def folder_missing(data):
    return ["--data_folder", data / "nowhere"]


@case("lists: holds no v_rgb", "--list_folder")
def list_folder_missing(data):
    return ["--list_folder", data / "lists"]


@case(r"v_rgb/subName\.txt: missing")
def names_missing(data):
    (data / "v_rgb" / "subName.txt").unlink()


@case(r"v_depth/s2_test\.txt: missing; a folder of lists holds v_rgb/ and the second view's lists")
def held_out_list_missing(data):
    (data / "v_depth" / "s2_test.txt").unlink()


@case(r"v_rgb/s2_train\.txt: missing")
def train_list_missing(data):
    (data / "v_rgb" / "s2_train.txt").unlink()


@case("v_depth", "missing")
def second_view_missing(data):
    shutil.rmtree(data / "v_depth")


@case(r"v_rgb/s1_test\.txt: empty")
def list_empty(data):
    (data / "v_rgb" / "s1_test.txt").write_text("\n \n")


@case(r"subName\.txt: empty")
def names_empty(data):
    (data / "v_rgb" / "subName.txt").write_text("")


@case(r"subName\.txt", "s1 named twice")
def name_twice(data):
    edit(data / "v_rgb" / "subName.txt", lambda text: text + "s1\n")


@case(r"subName\.txt", r"\.\./v_rgb/s1")
def name_with_a_folder(data):
    edit(data / "v_rgb" / "subName.txt", lambda text: text.replace("s1", "../v_rgb/s1"))


@case(r"v_rgb/s1_test\.txt:2: .*b-1.* is not '<path> <label> <database>'")
def row_malformed(data):
    edit(data / "v_rgb" / "s1_test.txt", lambda text: text.replace("s1-b-1_diff.png 1 0",
                                                                   "s1-b-1_diff.png"))


@case(r"v_rgb/s1_test\.txt:3: label '0\.5'", "integer")
def label_not_an_integer(data):
    edit(data / "v_rgb" / "s1_test.txt", lambda text: text.replace("s1-c-2_diff.png 0",
                                                                   "s1-c-2_diff.png 0.5"))


@case(r"v_rgb/s1_test\.txt:1: label -1 is out of range")
def label_negative(data):
    edit(data / "v_rgb" / "s1_test.txt", lambda text: text.replace("a-0_diff.png 0",
                                                                   "a-0_diff.png -1"))


@case(r"labels over all test lists are \[0, 2\], out of range", r"0\.\.1")
def label_gap(data):
    for path in data.glob("v_*/*_t*.txt"):
        edit(path, lambda text: re.sub(r" 1 0\n", " 2 0\n", text))


@case(r"v_rgb/s1_test\.txt:1: database 7 is not one of 0 casme3")
def database_unknown(data):
    edit(data / "v_rgb" / "s1_test.txt", lambda text: text.replace("0 0\n", "0 7\n", 1))


@case(r"v_rgb/s1_test\.txt:4: .*s1-a-0_diff\.png is named in line 1 already")
def clip_twice_in_a_list(data):
    edit(data / "v_rgb" / "s1_test.txt", lambda text: text + text.splitlines(True)[0])


@case(r"v_rgb/s2_test\.txt:4: .*s1-a-0_diff\.png is in .*s1_test\.txt:1 too")
def clip_in_two_test_lists(data):
    row = (data / "v_rgb" / "s1_test.txt").read_text().splitlines(True)[0]
    edit(data / "v_rgb" / "s2_test.txt", lambda text: text + row)


@case(r"v_rgb/s1_train\.txt:10: .*subject s1 is on both sides")
def subject_on_both_sides(data):
    row = (data / "v_rgb" / "s1_test.txt").read_text().splitlines(True)[0]
    edit(data / "v_rgb" / "s1_train.txt", lambda text: text + row)


@case(r"v_rgb/s1_train\.txt: 8 of the 9 clips")
def train_list_short(data):
    edit(data / "v_rgb" / "s1_train.txt", lambda text: text[text.index("\n") + 1:])


@case(r"v_rgb/s1_train\.txt:2: label 1, database 0 for .*s2-b-11_diff\.png, but .* says 0, 0")
def label_differs_between_train_and_test(data):
    edit(data / "v_rgb" / "s1_train.txt", lambda text: text.replace("s2-b-11_diff.png 0",
                                                                    "s2-b-11_diff.png 1"))


@case("3 clips of v_rgb lack a partner in v_depth: s4-a-30, s4-b-31, s4-c-32")
def partners_missing(data):
    for path in data.glob("v_depth/*.txt"):
        path.write_text(path.read_text().replace("/s4-", "/x4-"))


@case("12 clips of v_rgb lack a partner in v_depth: s1-a-0, ", "s4-a-30, …;")
def more_than_ten_partners_missing(data):
    for path in data.glob("v_depth/*.txt"):
        edit(path, lambda text: re.sub(r"/s(\d)-", r"/x\1-", text))


@case(r"v_depth/s1_test\.txt:1: label", "s1-a-0 differ", r"v_rgb/s1_test\.txt:1")
def label_differs_between_the_views(data):
    for path in data.glob("v_depth/*.txt"):
        if "/s1-a-0_" in path.read_text():
            edit(path, lambda text: text.replace("s1-a-0_diff_depth.png 0",
                                                 "s1-a-0_diff_depth.png 1"))


@case(r"v_rgb/s1_test\.txt: not text in UTF-8")
def list_in_another_encoding(data):
    path = data / "v_rgb" / "s1_test.txt"
    path.write_bytes(path.read_bytes().replace(b"s1-a", b"s1-\xe9"))


@case(r"1 of 12 images", r"s2-b-11_diff\.png", "--data_folder")
def image_missing(data):
    (data / "rgb" / "0" / "s2-b-11_diff.png").unlink(missing_ok=True)
    (data / "rgb" / "1" / "s2-b-11_diff.png").unlink(missing_ok=True)


@case(r"depth/0/s1-a-0_diff_depth\.png: not a readable image", "replace it")
def image_unreadable(data):
    (data / "depth" / "0" / "s1-a-0_diff_depth.png").write_bytes(b"no image")


@case(r"rgb/0/s1-a-0_diff\.png", "replace it")
def image_empty(data):
    (data / "rgb" / "0" / "s1-a-0_diff.png").write_bytes(b"")


def truncate(data, view, ending, share):
    (path,) = (data / view).rglob(f"s1-a-0_{ending}.png")
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


@case(r"rgb/0/s1-a-0_diff\.png: cannot be decoded \(.*truncated", "replace it")
def image_truncated(data):
    truncate(data, "rgb", "diff", 0.6)


@case(r"depth/0/s1-a-0_diff_depth\.png: cannot be decoded \(.*truncated", "replace it")
def depth_image_truncated(data):
    truncate(data, "depth", "diff_depth", 0.4)


@case(r"depth/0/s1-a-0_diff_depth\.png: a colour image as the second view")
def depth_image_in_colour(data):
    colour = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save_image(data / "depth" / "0" / "s1-a-0_diff_depth.png", colour)


@case(r"depth/0/s1-a-0_diff_depth\.png: 64x32, but .*s1-a-0_diff\.png is 64x64")
def shapes_differ(data):
    save_image(data / "depth" / "0" / "s1-a-0_diff_depth.png", np.full((32, 64), 128, np.uint8))


@case(r"s1_test\.txt:1: \.\./outside/s1-a-0_diff\.png leads outside")
def path_with_two_dots(data):
    outside = data.parent / "outside"
    outside.mkdir()
    shutil.copyfile(data / "rgb" / "0" / "s1-a-0_diff.png", outside / "s1-a-0_diff.png")
    for path in data.glob("v_rgb/*.txt"):
        if "/s1-a-0_" in path.read_text():
            edit(path, lambda text: text.replace("rgb/0/s1-a-0_", "../outside/s1-a-0_"))


@case(r"s4_test\.txt:1: /.*/outside/s4-a-30_diff\.png leads outside")
def absolute_path_outside(data):
    outside = data.parent / "outside"
    outside.mkdir()
    (actual,) = (data / "rgb").rglob("s4-a-30_diff.png")
    shutil.copyfile(actual, outside / actual.name)
    for path in data.glob("v_rgb/*.txt"):
        if "/s4-a-30_" in path.read_text():
            edit(path, lambda text: re.sub(r"rgb/\d/s4-a-30_", f"{outside}/s4-a-30_", text))


@case(r"encoding\.json: needs an object")
def encoding_is_not_json(data):
    (data / "encoding.json").write_text('{"difference": "sig')


@case(r"encoding\.json: needs an object", "signed, wrap or absolute")
def encoding_unknown(data):
    (data / "encoding.json").write_text('{"difference": "modulo"}')


@case(r"encoding\.json: needs an object")
def encoding_is_a_list(data):
    (data / "encoding.json").write_text('["signed"]')


@case(r"encoding\.json: names 3 classes, the lists hold 2")
def class_names_too_many(data):
    (data / "encoding.json").write_text('{"difference": "signed", "classes": ["a", "b", "c"]}')


@case(r"--encoding wrap: .*encoding\.json says signed", "drop the flag")
def encoding_contradicted(data):
    return ["--encoding", "wrap"]


@case(r"64x64 pixels; differences modulo 256 cannot be resized")
def wrap_of_another_size(data):
    (data / "encoding.json").unlink()


@case("--view RGB-flow")
def view_unknown(data):
    return ["--view", "RGB-flow"]


@case("v_flow", "missing")
def view_without_lists(data):
    return ["--view", "RGB_flow"]


@case("data/file: File exists")
def cache_is_a_file(data):
    (data / "file").write_text("")
    return ["--cache", data / "file"]


@case("--device cuda:77", "auto or cpu")
def device_that_is_not_there(data):
    return ["--device", "cuda:77"]


@pytest.mark.parametrize("breaks, expected", CASES)
def test_a_broken_data_set_is_refused(breaks, expected, fresh, tmp_path, capsys):
    more = breaks(fresh) or []
    last = refused(capsys, pretrain, "--data_folder", fresh, "--model", "resnet18v1", "--cache",
                   tmp_path / "cache", "--model_path", tmp_path / "out", "--epochs", 1, *more)
    for pattern in expected:
        assert re.search(pattern, last), last
    assert not (tmp_path / "out").exists()
    assert not any((tmp_path / "cache").rglob("*.part"))


# ---------------------------------------------------------------- flags of pre-training

@pytest.mark.parametrize("flags, expected", [
    (["--batch_size", 1], "--batch_size: batch norm needs at least 2"),
    (["--batch_size", 0], "--batch_size"),
    (["--pool", "unlabelled"], "--pool .* --pairs"),
    (["--pairs", "PAIRS"], "--pool .* --pairs"),
    (["--pairs", "PAIRS", "--pool", "some"], "--pool"),
    (["--min_intensity", 2], "--min_intensity goes with --pairs"),
    (["--pairs", "nothing.tsv", "--pool", "both"], "nothing.tsv: missing"),
    (["--pairs", "PAIRS", "--pool", "both", "--min_intensity", 99], "pairs.tsv: no pair of inten"),
    (["--subject", "s1", "--fold", "1/4"], "--subject and --fold exclude each other"),
    (["--subject", "each", "--resume", "x.pth"], "with --subject each give auto"),
    (["--subject", "s7"], "--subject s7: no such subject; .* 4: s1, s2, s3, s4"),
    (["--without", "s1", "s7"], "--without s7: no such subject; .* 4: s1, s2, s3, s4"),
    (["--without", "s1", "s2", "s3", "s4"], "0 clips are left to contrast"),
    (["--fold", "5/4"], "--fold 5/4: .* 1/4 to 4/4"),
    (["--fold", "1/10"], "--fold 1/10: .* 1/4 to 4/4"),
    (["--fold", "first"], "--fold first"),
    (["--lr_decay_epochs", "a", "b"], "--lr_decay_epochs"),
    (["--learning_rate", "nan"], "--learning_rate"),
    (["--nce_t", 0], "--nce_t"),
    (["--model", "vgg"], "--model"),
    (["--softmaxx"], "--softmaxx"),
    (["--resume", "nothing.pth"], "nothing.pth: no such checkpoint"),
    (["--device", "nonsense"], "--device nonsense")], ids=lambda v: "" if isinstance(v, str) else
    " ".join(map(str, v)))
def test_wrong_flags_are_refused(drawn, cache, tmp_path, capsys, flags, expected):
    flags = [drawn / "pairs.tsv" if flag == "PAIRS" else flag for flag in flags]
    last = refused(capsys, pretrain, "--data_folder", drawn, "--model", "resnet18v1", "--cache",
                   cache, "--model_path", tmp_path / "out", "--epochs", 1, *flags)
    assert re.search(expected, last), last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, expected", [
    (lambda text: text.replace("\ts1\t", "\t\t").replace("\ts2\t", "\t\t"), "names no subjects"),
    (lambda text: text.replace("casme3", "casme9"), r"pairs.tsv:2: database 'casme9'"),
    (lambda text: text.replace("rgb\tdepth", "rgb\tsecond"), r"pairs.tsv:1: no column 'depth'"),
    (lambda text: text.replace("AU12\t0.1", "AU12", 1), r"tsv:2: 9 fields, not as many fields"),
    (lambda text: text.replace("\t2\tAU12", "\thigh\tAU12"), r"pairs.tsv:4: intensity 'high'"),
    (lambda text: text.splitlines()[0], "pairs.tsv: no pair"),
    (lambda text: text.replace("free/u3_diff.png", "free/x3_diff.png"), "1 of 6 images .*/x3_diff"),
    (lambda text: "", r"pairs.tsv")])
def test_a_broken_pairs_file_is_refused(fresh, cache, tmp_path, capsys, change, expected):
    edit(fresh / "pairs.tsv", change)
    last = refused(capsys, pretrain, "--data_folder", fresh, "--model", "resnet18v1", "--cache",
                   cache, "--model_path", tmp_path / "out", "--pairs", fresh / "pairs.tsv",
                   "--pool", "both", "--subject", "s1", "--min_intensity", 0)
    assert re.search(expected, last), last
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- runs that exist

def test_a_run_folder_that_exists_is_not_entered(drawn, quick, pretrained, capsys):
    before = snapshot(pretrained.parents[1])
    last = refused(capsys, pretrain, "--data_folder", drawn, *quick,
                   "--model_path", pretrained.parents[1])
    assert "exists" in last and "--resume auto" in last and str(pretrained.parent) in last
    assert snapshot(pretrained.parents[1]) == before


@pytest.mark.parametrize("flags, expected", [
    (["--nce_t", 0.1], ["--nce_t 0.07 there, 0.1 here"]),
    (["--nce_m", 0.9, "--momentum", 0.8], ["--nce_m 0.5 there, 0.9 here", "--momentum 0.9"]),
    (["--view", "RGB_gray"], ["--view RGB_D there, RGB_gray here", "data digest differs"])])
def test_resuming_with_other_options_names_them(drawn, quick, pretrained, tmp_path, capsys, flags,
                                                expected):
    last = refused(capsys, pretrain, "--data_folder", drawn, *quick, "--resume", pretrained,
                   "--model_path", tmp_path / "out", *flags)
    assert str(pretrained) in last
    assert all(text in last for text in expected), last
    assert not (tmp_path / "out").exists()


def test_resuming_with_fewer_epochs_or_other_data_is_refused(fresh, quick, pretrained, tmp_path,
                                                             capsys):
    save_image(fresh / "rgb" / "0" / "s1-a-0_diff.png", np.full((64, 64, 3), 99, np.uint8))
    runs = Path(shutil.copytree(pretrained.parents[1], tmp_path / "runs"))
    before = snapshot(runs)
    last = refused(capsys, pretrain, "--data_folder", fresh, *quick, "--resume", "auto",
                   "--model_path", runs, "--epochs", 2)
    assert "last.pth" in last and "data digest differs; give another --tag" in last
    assert snapshot(runs) == before


def another_meaning(data):
    """The same bytes, said to be absolute changes."""
    path = data / "encoding.json"
    content = json.loads(path.read_text())
    assert content["difference"] != "absolute"
    path.write_text(json.dumps(content | {"difference": "absolute"}))


def test_resuming_with_pixels_of_another_meaning_is_refused(drawn, quick, pretrained, tmp_path,
                                                            capsys):
    """Which images of the stored size do not show by their bytes."""
    runs = Path(shutil.copytree(pretrained.parents[1], tmp_path / "runs"))
    (path,) = runs.rglob("last.pth")
    state = torch.load(path, weights_only=True)
    state["encoding"]["difference"] = "absolute"
    torch.save(state, path)
    before = snapshot(runs)
    last = refused(capsys, pretrain, "--data_folder", drawn, *quick, "--resume", "auto",
                   "--model_path", runs, "--epochs", 3)
    assert "last.pth: was trained on differences encoded as absolute, which are signed here" in last
    assert snapshot(runs) == before


def test_heads_of_pixels_of_another_meaning_are_refused(fresh, quick, tmp_path, capsys):
    flags = ["--data_folder", fresh, *quick, "--model_path", "random", "--save_path", tmp_path]
    probe(*flags, "--subject", "s1")
    another_meaning(fresh)
    assert "difference differs" in refused(capsys, probe, *flags, "--subject", "s2")


@pytest.mark.parametrize("run", [probe, finetune])
def test_finished_heads_are_not_written_over(drawn, quick, pretrained, tmp_path, capsys, run):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path]
    flags += ["--freeze_encoder"] if run is finetune else []
    run(*flags)
    before = snapshot(tmp_path)
    last = refused(capsys, run, *flags)
    assert "exists" in last and "--resume auto" in last
    last = refused(capsys, run, *flags, "--resume", "auto", "--momentum", 0.5)
    assert "--momentum 0.9 there, 0.5 here" in last
    last = refused(capsys, run, *flags, "--resume", tmp_path / "nothing.pth")
    assert "nothing.pth: heads on a frozen encoder" in last
    assert snapshot(tmp_path) == before


def test_a_model_for_prediction_is_not_written_over(drawn, quick, pretrained, tmp_path, capsys):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--freeze_encoder", "--subject", "all"]
    finetune(*flags)
    before = snapshot(tmp_path)
    assert "exists" in refused(capsys, finetune, *flags)
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- checkpoints

class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def other_model(path, pretrained):
    state = torch.load(pretrained, weights_only=True)
    state["opt"]["model"] = "resnet18v2"
    state["model"] = {name: torch.cat([v, v]) if name == "rgb_to_d.fc.bias" else v
                      for name, v in state["model"].items() if "layer4" not in name}
    torch.save(state, path)


CHECKPOINTS = {
    "of another model": (other_model, "not a checkpoint of resnet18v1 but of resnet18v2"),
    "text": (lambda path, _: path.write_text("hello\n"), "checkpoint"),
    "empty": (lambda path, _: path.write_bytes(b""), "not a checkpoint"),
    "truncated": (lambda path, old: path.write_bytes(old.read_bytes()[:400_000]), "truncated"),
    "cut at the end": (lambda path, old: path.write_bytes(old.read_bytes()[:-100]), "truncated"),
    "a tensor": (lambda path, _: torch.save(torch.zeros(3), path), "holds no 'model'"),
    "without a model": (lambda path, _: torch.save({"opt": {}}, path), "holds no 'model'"),
    "with odd options": (lambda path, _: torch.save({"opt": 3, "model": {}}, path), "checkpoint"),
    "a malicious pickle": (lambda path, _: path.write_bytes(
        pickle.dumps({"model": Malicious(path.parent / "harm")})), "refused|not a checkpoint"),
    "malicious in torch's format": (lambda path, _: torch.save(
        {"model": {"a": Malicious(path.parent / "harm")}}, path), "code or classes"),
    "missing": (lambda path, _: None, "no such checkpoint")}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("run", [probe, finetune])
def test_a_wrong_checkpoint_is_refused(drawn, quick, pretrained, tmp_path, capsys, kind, run):
    make, expected = CHECKPOINTS[kind]
    make(tmp_path / "x.pth", pretrained)
    last = refused(capsys, run, "--data_folder", drawn, *quick, "--model_path",
                   tmp_path / "x.pth", "--save_path", tmp_path / "out", "--layer", 6)
    assert re.search(expected, last), last
    assert "x.pth" in last
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "out").exists()


def test_a_wrong_checkpoint_is_not_resumed(drawn, quick, pretrained, tmp_path, capsys):
    for kind, (make, expected) in CHECKPOINTS.items():
        (tmp_path / "x.pth").unlink(missing_ok=True)
        make(tmp_path / "x.pth", pretrained)
        last = refused(capsys, pretrain, "--data_folder", drawn, *quick, "--resume",
                       tmp_path / "x.pth", "--model_path", tmp_path / "out", "--epochs", 2)
        assert "x.pth" in last, kind
        if kind != "of another model":  # its options differ as well
            assert re.search(expected, last), last
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", [probe, finetune])
@pytest.mark.parametrize("flags, expected", [
    (["--model", "alexnet"], "not a checkpoint of alexnet but of resnet18v1 .*--model"),
    (["--model", "resnet18v2"], "not a checkpoint of resnet18v2 but of resnet18v1"),
    (["--layer", 7], "--layer: 7 is out of range; resnet18v1 has taps 1 to 6"),
    (["--layer", 0], "--layer"),
    (["--seeds", 1], "--seeds: give two or more, each once"),
    (["--seeds", 1, 2, 1], "--seeds: give two or more, each once"),
    (["--model", "alexnet", "--layer", 6], "--layer: 6 is out of range; alexnet has taps 1 to 5"),
    (["--view", "RGB_gray"], "--view RGB_D, but the data have RGB_gray"),
    (["--dataset", "samm"], "--dataset samm: the lists hold casme3"),
    (["--subject", "s1", "s9"], "--subject s9: no such subject"),
    (["--without", "s1", "s9"], "--without s9: no such subject"),
    (["--without", "s1", "--subject", "s1"], "--subject s1: no such subject; .* 3: s2, s3, s4"),
    (["--without", "s1", "s2", "s3"], "one subject; held-out evaluation takes two"),
    (["--model_path", "runs/{subject}.pth"], r"s1\.pth: no such checkpoint|protocol loso"),
    (["--model_path", "runs/{fold}.pth"], r"fold\dof4\.pth: no such checkpoint")], ids=lambda v:
    "" if isinstance(v, str) else " ".join(map(str, v)))
def test_flags_that_do_not_fit_the_checkpoint_are_refused(drawn, quick, pretrained, tmp_path,
                                                          capsys, run, flags, expected):
    last = refused(capsys, run, "--data_folder", drawn, *quick, "--model_path", pretrained,
                   "--save_path", tmp_path / "out", *flags)
    assert re.search(expected, last), last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, expected", [
    (["--oversample", "--loss", "balanced"], "--oversample excludes --loss balanced"),
    (["--oversample", "--freeze_encoder"], "--oversample"),
    (["--subject", "all", "s1"], "--subject all stands alone"),
    (["--subject", "all", "--without", "s1", "s2", "s3", "s4"], "--without leaves no subject"),
    (["--freeze_encoder", "--resume", "last.pth"], "--resume last.pth: heads on a frozen encoder"),
    (["--train_bn", "--batch_size", 1], "--train_bn needs a --batch_size of 2"),
    (["--train_bn", "--freeze_encoder"], "--train_bn"),
    (["--l2", 0.1, "--head", "zero"], "--l2 goes with --head probe"),
    (["--l2", 0.1, "--head", "random"], "--l2 goes with --head probe"),
    (["--l2", 0], "--l2: 0 is out of range"), (["--head", "best"], "--head"),
    (["--warmup_epochs", -1], "--warmup_epochs: -1 is out of range"),
    (["--warmup_epochs", 31], "--warmup_epochs: 31 is more than the 1 of --epochs"),
    (["--lr_schedule", "cosine", "--lr_decay_epochs", 9], "--lr_decay_epochs goes with"),
    (["--protocol", "10fold", "--model_path", "runs/{subject}.pth"], "protocol loso"),
    (["--subject", "all", "--model_path", "runs/{subject}.pth"], "one checkpoint")])
def test_fine_tuning_flags_that_exclude_each_other_are_refused(drawn, quick, pretrained, tmp_path,
                                                               capsys, flags, expected):
    last = refused(capsys, finetune, "--data_folder", drawn, *quick, "--model_path", pretrained,
                   "--save_path", tmp_path / "out", *flags)
    assert re.search(expected, last), last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, expected", [
    ({"difference": "signed", "classes": ["no", "yes"]}, "classes"),
    ({"difference": "absolute"}, "difference signed, but the data have absolute")])
def test_data_unlike_those_of_the_checkpoint_are_refused(fresh, quick, pretrained, tmp_path, capsys,
                                                         content, expected):
    path = pretrained
    if "classes" in content:
        state = torch.load(pretrained, weights_only=True)
        # of a network that was fitted to them; another never saw a label
        state |= {"encoding": {"difference": "signed", "classes": ["yes", "no"]}, "classifier": {}}
        path = tmp_path / "named.pth"
        torch.save(state, path)
    (fresh / "encoding.json").write_text(json.dumps(content))
    last = refused(capsys, probe, "--data_folder", fresh, *quick, "--model_path", path,
                   "--save_path", tmp_path / "out")
    assert expected in last and str(path) in last
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what happens during a run

def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        drawn, quick, tmp_path, capsys, monkeypatch):
    class Diverging(NCESoftmaxLoss):
        calls = 0

        def forward(self, out):
            Diverging.calls += 1
            return super().forward(out) * (float("nan") if Diverging.calls > 6 else 1)

    monkeypatch.setattr(script("pre-train_DVSCL"), "NCESoftmaxLoss", Diverging)
    # two steps an epoch, two losses a step: the seventh loss is in epoch 2, step 2
    last = refused(capsys, pretrain, "--data_folder", drawn, *quick, "--model_path", tmp_path,
                   "--epochs", 3, "--save_freq", 1, code=1)
    assert "not finite in epoch 2, step 2" in last
    (path,) = tmp_path.glob("*/last.pth")
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    monkeypatch.undo()
    monkeypatch.setattr(transforms, "CROP", 64)
    pretrain("--data_folder", drawn, *quick, "--model_path", tmp_path, "--epochs", 3,
             "--save_freq", 1, "--resume", "auto")
    assert torch.load(path, weights_only=True)["epoch"] == 3


def test_weights_that_are_not_finite_never_become_a_checkpoint(drawn, quick, tmp_path, capsys):
    last = refused(capsys, pretrain, "--data_folder", drawn, *quick, "--model_path", tmp_path,
                   "--batch_size", 16, "--learning_rate", 1e38, "--epochs", 1, code=1)
    assert "not finite" in last and "epoch 1" in last
    assert not list(tmp_path.glob("*/*.pth"))


@pytest.mark.parametrize("more", [["--encoder_lr", 1e30], ["--freeze_encoder",
                                                          "--learning_rate", 1e30],
                                  ["--encoder_lr", 1e38, "--batch_size", 16, "--epochs", 1]])
def test_fine_tuning_that_diverges_stops_with_exit_code_1(drawn, quick, pretrained, tmp_path,
                                                          capsys, more):
    last = refused(capsys, finetune, "--data_folder", drawn, *quick, "--model_path", pretrained,
                   "--save_path", tmp_path, "--subject", "s1", "--epochs", 3, *more, code=1)
    assert re.search(r"not finite in epoch \d|predictions for s1 are not finite", last)
    assert not list(tmp_path.glob("*/results.json"))


def test_a_full_disk_is_named_and_leaves_no_half_cache(drawn, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    last = refused(capsys, pretrain, "--data_folder", drawn, "--cache", tmp_path / "cache",
                   "--model_path", tmp_path / "out", code=1)
    assert "No space left" in last
    assert not list((tmp_path / "cache").iterdir()) and not (tmp_path / "out").exists()


def test_the_cache_claims_its_space_before_it_is_written(drawn, tmp_path, monkeypatch):
    """A disk that fills up under a memory map kills the process without a word."""
    claimed = []
    decode = decoding.decode

    def watching(*args):
        (part,) = tmp_path.glob(".*.part")
        claimed.append(part.stat().st_blocks * 512 >= 12 * 4 * 256 * 256)
        return decode(*args)
    monkeypatch.setattr(decoding, "decode", watching)
    dataset.load_images(dataset.read_clips(drawn), tmp_path, num_workers=1)
    assert claimed[0]


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    from training import checkpoint
    checkpoint.save(tmp_path / "last.pth", {"model": {}, "epoch": 1})

    def half(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(util.RunFailed, match=r"last\.pth: cannot be written"):
        checkpoint.save(tmp_path / "last.pth", {"model": {}, "epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pth")["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_half_written_line_of_the_log_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"opt": {}}\n{"epoch": 1}\n{"epo')
    assert record.read_log(tmp_path) == [{"opt": {}}, {"epoch": 1}]


def test_a_replaced_checkpoint_of_a_template_is_noticed(drawn, quick, pretrained, tmp_path, capsys):
    for name in ("s1", "s2", "s3", "s4"):
        shutil.copy(pretrained, tmp_path / f"{name}.pth")
    flags = ["--data_folder", drawn, *quick, "--model_path", tmp_path / "{subject}.pth",
             "--save_path", tmp_path / "out", "--protocol", "loso", "--epochs", 1]
    probe(*flags)
    state = torch.load(pretrained, weights_only=True)
    state["model"] = {k: v * 1.5 if v.is_floating_point() else v for k, v in state["model"].items()}
    torch.save(state, tmp_path / "s2.pth")
    with pytest.raises(SystemExit) as stop:
        probe(*flags, "--resume", "auto")
    assert stop.value.code == 2
    assert "s2.json: comes from another checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_the_training_of_another_subject_is_not_gone_on_with(drawn, quick, pretrained, tmp_path,
                                                             capsys):
    flags = ["--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--epochs", 1]
    finetune(*flags, "--subject", "s3")
    (last,) = tmp_path.glob("finetune_*/last.pth")
    with pytest.raises(SystemExit) as stop:
        finetune(*flags, "--subject", "s1", "--resume", last)
    assert stop.value.code == 2
    assert "the training of s3, who is not among those to hold out" in capsys.readouterr().err
    finetune(*flags, "--subject", "s3", "--resume", last)  # there is nothing left to do
