"""predict.py: raw frames and prepared lists give the same numbers; what does not fit is
refused in one line."""
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import raw_tree
import torch
from conftest import draw_set, finetune, pretrain, script

import dataset
import util
from images import transforms
from models import create_classifier, create_model

pytestmark = pytest.mark.usefixtures("small_crops")
SIZE = 160, 120  # of the raw frames
ROWS = [(f"spNO.{s}", video, 10, apex, 20, "4", emotion) for s in (1, 2)
        for video, apex, emotion in (("a", 16, "anger"), ("b", 18, "happy"), ("c", 14, "surprise"))]
BOX = (30.0, 10.0, 100.0, 90.0)


def predict(*argv):
    """predict.py in this process."""
    return script("predict").main(list(argv))


def predicted(capsys, *argv):
    """The JSON it prints."""
    capsys.readouterr()
    predict(*argv, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Frames of two subjects as received, with labels.csv and boxes.csv (turned by 8 degrees)."""
    root = tmp_path_factory.mktemp("raw")
    for subject, video, onset, apex, *_ in ROWS:
        raw_tree.write_video(root, subject, video, (onset, apex), size=SIZE,
                             level=lambda n: (n - 10) / 10)
    raw_tree.write_csv(root / "labels.csv", ROWS)
    box = ",".join(map(str, BOX))
    util.write_text(root / "boxes.csv", "subject,x,y,width,height,roll\n"
                    + "".join(f"spNO.{s},{box},8\n" for s in (1, 2)))
    return root


@pytest.fixture(scope="module")
def made(raw, tmp_path_factory):
    """A function of the preparation's flags and those of training: (data folder, last.pth)."""
    given = {}

    def make(crop, *flags):
        if (crop, flags) not in given:
            folder = tmp_path_factory.mktemp("made")
            data = folder / "data"
            script("prepare").main([
                "casme3", "--raw", raw, "--annotation", raw / "labels.csv", "--data_folder", data,
                "--size", "64", "--classes", "3", "--depth_scale", "0.1", "--num_workers", "0",
                "--crop", *map(str, crop), *(["--roll"] if crop[0] == "boxes" else [])])
            finetune("--data_folder", data, "--cache", "off", "--model_path", "random", "--model",
                     "resnet18v1", "--epochs", 2, "--batch_size", 4, "--subject", "all",
                     "--save_path", folder, "--freeze_encoder", *flags)
            given[crop, flags] = data, next(folder.glob("finetune_*/last.pth"))
        return given[crop, flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CROP", 64)
        patch.setattr("preparation.audit.draw_all", lambda *args: None)
        yield make


def frames(raw, row, depth=True):
    """The flags that name the frames of a clip."""
    folder = raw / row[0] / row[1]
    actual = ["--onset", folder / "color" / f"{row[2]}.jpg", "--apex",
             folder / "color" / f"{row[3]}.jpg"]
    return actual + (["--depth_onset", folder / "depth" / f"{row[2]}.png", "--depth_apex",
                     folder / "depth" / f"{row[3]}.png"] if depth else [])


def by_hand(path, data, layer=6):
    """{clip: probabilities} from the state's tensors, clip by clip."""
    state = torch.load(path, weights_only=True)
    model = create_model("resnet18v1").eval()
    model.load_state_dict(state["model"])
    head = state["classifier"]
    clips = dataset.read_clips(data)
    images, _ = dataset.load_images(clips)
    actual, (mean, std) = {}, (torch.tensor(state["normalization"][n]) for n in ("mean", "std"))
    for clip, image in zip(clips.clips, images):
        x = torch.from_numpy(image[:, 96:160, 96:160]).float() / 255
        x = (x - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            features = (torch.cat(model(x[None], layer), 1) - head["mean"]) / head["std"]
            actual[clip.key] = (features @ head["classifier.weight"].t()
                               + head["classifier.bias"]).softmax(1)[0].numpy()
    return actual


@pytest.mark.parametrize("crop, box", [
    (("none",), ()), (("box", *BOX), ("--box", *BOX)),
    (("boxes", "boxes.csv"), ("--box", *BOX, 8))], ids=["none", "box", "boxes and roll"])
def test_raw_frames_give_the_numbers_of_the_prepared_list(raw, made, capsys, crop, box):
    if crop[0] == "boxes":
        crop = "boxes", str(raw / "boxes.csv")
    data, path = made(crop)
    expected = by_hand(path, data)
    listed = {}
    for name in ("spNO1_test.txt", "spNO2_test.txt"):
        actual = predicted(capsys, "--model_path", path, "--data_folder", data, "--list",
                          data / "v_rgb" / name)
        assert actual["classes"] == ["negative", "positive", "surprise"]
        listed |= {clip["key"]: clip for clip in actual["clips"]}
    assert listed.keys() == expected.keys() and len(listed) == 6
    if len(box) == 6:
        assert "add a fifth number" in refused(capsys, "--model_path", path,
                                               *frames(raw, ROWS[0]), *box[:5])
    for row in ROWS:
        actual = predicted(capsys, "--model_path", path, *frames(raw, row), *box)
        (clip,) = actual["clips"]
        (key,) = [k for k in listed if k.startswith(f"{row[0]}-{row[1]}-")]
        p = clip["probabilities"]
        assert p == pytest.approx(listed[key]["probabilities"], abs=1e-6)
        assert list(p.values()) == pytest.approx(expected[key].tolist(), abs=1e-5)
        assert clip["prediction"] == max(p, key=p.get) and sum(p.values()) == pytest.approx(1)
    each = np.array([list(c["probabilities"].values()) for c in listed.values()])
    assert len(np.unique(each.round(4), axis=0)) == 6  # the clips differ by more than the tolerance


def test_another_box_gives_other_numbers(raw, made, capsys):
    _, path = made(("box", *BOX))
    here, there = (predicted(capsys, "--model_path", path, *frames(raw, ROWS[0]), "--box", *box)
                   for box in (BOX, (50, 10, 60, 60)))
    ours, theirs = (list(actual["clips"][0]["probabilities"].values()) for actual in (here, there))
    assert abs(np.subtract(ours, theirs)).max() > 1e-3


def test_the_table_holds_the_numbers_of_the_json(made, capsys):
    data, path = made(("none",))
    argv = ["--model_path", path, "--data_folder", data, "--list",
            data / "v_rgb" / "spNO1_train.txt"]
    actual = predicted(capsys, *argv)
    predict(*argv)
    printed = capsys.readouterr()
    head, *lines = printed.out.splitlines()
    assert head.split() == ["clip", "prediction", "negative", "positive", "surprise"]
    assert [line.split() for line in lines] == [
        [clip["key"], clip["prediction"], *(f"{p:.3f}" for p in clip["probabilities"].values())]
        for clip in actual["clips"]]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_a_head_on_rgb_alone_needs_no_depth(raw, made, capsys):
    data, path = made(("none",), "--encoder", "rgb")
    with_depth, without = (predicted(capsys, "--model_path", path, *frames(raw, ROWS[1], depth))
                           for depth in (True, False))
    assert with_depth["clips"][0]["probabilities"] \
        == pytest.approx(without["clips"][0]["probabilities"], abs=1e-6)
    alone = data.parent / "alone"
    shutil.copytree(data, alone, dirs_exist_ok=True)
    shutil.rmtree(alone / "v_depth")
    lists = [predicted(capsys, "--model_path", path, "--data_folder", folder, "--list",
                       folder / "v_rgb" / "spNO1_test.txt")["clips"] for folder in (data, alone)]
    assert lists[0] == lists[1]


def test_luminance_as_second_view_needs_no_depth(raw, made, capsys):
    data, path = made(("none",), "--view", "RGB_gray")
    raw_clip = predicted(capsys, "--model_path", path, *frames(raw, ROWS[2], depth=False))
    listed = predicted(capsys, "--model_path", path, "--data_folder", data, "--list",
                       data / "v_rgb" / "spNO1_test.txt")
    (same,) = [c for c in listed["clips"] if "-c-" in c["key"]]
    assert raw_clip["clips"][0]["probabilities"] == pytest.approx(same["probabilities"], abs=1e-6)


def test_a_model_whose_encoder_was_trained_too(drawn, quick, pretrained, tmp_path, capsys):
    """Lists without any record of crop and registration; a vector tap and a map."""
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--subject", "all", "--layer", 4)
    (path,) = tmp_path.glob("finetune_*/last.pth")
    actual = predicted(capsys, "--model_path", path, "--data_folder", drawn, "--list",
                      drawn / "v_rgb" / "s2_test.txt")
    state, head = torch.load(path, weights_only=True), create_classifier("resnet18v1", 4, 2)
    model = create_model("resnet18v1").eval()
    model.load_state_dict(state["model"])
    head.load_state_dict(state["classifier"])
    clips = dataset.read_clips(drawn)
    images, _ = dataset.load_images(clips)
    x = transforms.eval_transform(torch.from_numpy(images), state["normalization"])
    with torch.no_grad():
        expected = head(*model(x, 4)).softmax(1).numpy()
    assert [clip["key"] for clip in actual["clips"]] == [f"s2-{v}-{10 + i}"
                                                        for i, v in enumerate("abc")]
    for clip in actual["clips"]:
        i = next(i for i, c in enumerate(clips.clips) if c.key == clip["key"])
        assert list(clip["probabilities"].values()) == pytest.approx(expected[i].tolist(), abs=1e-5)


@pytest.mark.parametrize("flags", [["--head", "probe"], ["--head", "random", "--layer", "4"]],
                         ids=" ".join)
def test_a_fine_tuned_head_gives_the_probabilities_that_the_results_hold(
        drawn, quick, pretrained, tmp_path, capsys, flags):
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--subject", "s3", *flags)
    (path,) = tmp_path.glob("finetune_*/last.pth")
    state = torch.load(path, weights_only=True)["classifier"]
    assert (state["std"] != 1).any() and (state["mean"] != 0).any()
    kept = json.loads((path.parent / "subjects" / "s3.json").read_text())["rows"]
    actual = predicted(capsys, "--model_path", path, "--data_folder", drawn, "--list",
                      drawn / "v_rgb" / "s3_test.txt")["clips"]
    assert [clip["key"] for clip in actual] == [row["key"] for row in kept]
    for clip, row in zip(actual, kept):
        assert list(clip["probabilities"].values()) == pytest.approx(row["probabilities"], abs=1e-6)


def test_a_head_from_before_the_statistics_predicts_as_it_did(drawn, quick, pretrained, tmp_path,
                                                              capsys):
    """The head of a checkpoint is folded into one without statistics: the same probabilities."""
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--subject", "s3")
    (path,) = tmp_path.glob("finetune_*/last.pth")

    def fold(state):
        head = state["classifier"]
        weight = head["classifier.weight"] / head["std"]
        state["classifier"] = {"classifier.weight": weight, "classifier.bias":
                               head["classifier.bias"] - weight @ head["mean"]}

    def drop(state):
        del state["classifier"]["mean"], state["classifier"]["std"]

    def said(path):
        return [list(clip["probabilities"].values()) for clip in predicted(
            capsys, "--model_path", path, "--data_folder", drawn, "--list",
            drawn / "v_rgb" / "s3_test.txt")["clips"]]
    new, old, other = (said(path), said(changed(path, tmp_path, fold)),
                       said(changed(path, tmp_path, drop)))
    assert np.allclose(new, old, atol=1e-4)
    assert not np.allclose(new, other, atol=1e-2)


# ---------------------------------------------------------------- refusals

def refused(capsys, *argv):
    """The last line of a call that must be refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        predict(*argv)
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == "" and "Traceback" not in printed.err
    line = printed.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def changed(path, folder, change):
    """A copy of a checkpoint put through `change`."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pth")
    return folder / "changed.pth"


@pytest.mark.parametrize("flags, message", [
    ([], "give photographs, or --onset and --apex, or --data_folder and --list"),
    (["--onset", "x.jpg"], "or --onset and --apex"),
    (["x.jpg", "--onset", "x.jpg"], "photographs and --onset exclude each other"),
    (["x.jpg", "--data_folder", "d"], "photographs and --data_folder exclude each other"),
    (["x.jpg", "--encoding", "signed"], "photographs and --encoding exclude each other"),
    (["x.jpg", "--whole", "--margin", 0], "--margin goes with faces that are searched for"),
    (["x.jpg", "--csv", "none/x.csv"], "--csv none/x.csv: its folder does not exist"),
    (["x.jpg", "--pictures", __file__], "is a file; name a folder"),
    (["x.jpg", "--pictures", Path(__file__).parent], "holds files, which might be written over"),
    (["--csv", "x.csv", "--onset", "a.jpg", "--apex", "b.jpg"], "--csv goes with photographs"),
    (["--margin=1", "--onset", "a.jpg", "--apex", "b.jpg"], "--margin goes with photographs"),
    (["--list", "x.txt"], "--list and --data_folder go together"),
    (["--list", "x.txt", "--data_folder", "d", "--onset", "x.jpg"], "exclude each other"),
    (["--onset", "a", "--apex", "b", "--depth_apex", "c"], "go together"),
    (["--onset", "a", "--apex", "b", "--box", 1, 2, 3], "--box: X Y W H"),
    (["--onset", "a", "--apex", "b", "--box", 1, 2, 3, "x"], "'x' is not a number"),
    (["--onset", "a", "--apex", "b", "--box", 1, 2, 0, 3], "above 0"),
    (["--onset", "a", "--apex", "b", "--encoding", "signed"], "goes with --list"),
    (["--onset", "a", "--apex", "b"], "x.pth: no such checkpoint")])
def test_wrong_flags(capsys, flags, message):
    assert message in refused(capsys, "--model_path", "x.pth", *flags)


def test_a_checkpoint_without_a_head(raw, pretrained, capsys):
    assert re.search(r"last\.pth: cannot predict: it holds no classifier; .*--subject all", refused(
        capsys, "--model_path", pretrained, *frames(raw, ROWS[0])))


def test_a_checkpoint_that_contradicts_itself(raw, made, tmp_path, capsys):
    _, path = made(("none",))
    for change, message in (
            (lambda s: s.update(layer=2), "its head does not fit"),
            (lambda s: s.update(layer=99), "its head does not fit"),
            (lambda s: s.update(classes=["a", "b"]), "its head does not fit"),
            (lambda s: s.update(classes=[1, 2, 3]), "cannot be read"),
            (lambda s: s.update(channels=[3]), "cannot be read"),
            (lambda s: s["opt"].pop("model"), "cannot be read"),
            (lambda s: s["opt"].update(model="alexnet"), "its head does not fit"),
            (lambda s: s["encoding"].update(size="x"), "'encoding' cannot be read"),
            (lambda s: s["encoding"].update(registration="homography"), "cannot be read"),
            (lambda s: s["encoding"].update(crop=[1]), "cannot be read"),
            (lambda s: s["encoding"].pop("crop"), "does not record 'crop'"),
            (lambda s: s["encoding"].pop("depth_scale"), "does not record 'depth_scale'"),
            (lambda s: s.update(view="RGB_flow"), "second view is flow"),
            (lambda s: s["normalization"].pop("mean"), "'normalization' cannot be read"),
            (lambda s: s["normalization"].update(std=[0.0] * 4), "'normalization' cannot be read"),
            (lambda s: s["normalization"].update(mean=[math.nan] * 4), "'normalization' cannot"),
            (lambda s: s["classifier"]["classifier.bias"].fill_(math.nan), "not finite"),
            (lambda s: s["classifier"]["std"].fill_(math.inf), "not finite"),
            (lambda s: s["classifier"].update(mean=torch.zeros(7)), "its head does not fit")):
        line = refused(capsys, "--model_path", changed(path, tmp_path, change),
                       *frames(raw, ROWS[0]))
        assert "changed.pth" in line and message in line, (message, line)


def test_frames_that_do_not_fit(raw, made, tmp_path, capsys):
    _, path = made(("none",))
    right = dict(zip(*[iter(frames(raw, ROWS[0]))] * 2))

    def with_(**other):
        flags = {**right, **{f"--{k}": v for k, v in other.items()}}
        return refused(capsys, "--model_path", path, *itertools.chain(*flags.items()))
    assert "sees depth too; give --depth_onset" in refused(
        capsys, "--model_path", path, *frames(raw, ROWS[0], depth=False))
    (tmp_path / "text.jpg").write_text("no image")
    raw_tree.write_frame("other", 0, tmp_path / "small.jpg", tmp_path / "small.png", (80, 60))
    assert re.search(r"--apex .*none\.jpg: no such file", with_(apex=tmp_path / "none.jpg"))
    assert "text.jpg: not a readable image" in with_(apex=tmp_path / "text.jpg")
    raw_tree.write_frame("tiny", 0, tmp_path / "tiny.jpg", None, (20, 20))
    assert "tiny.jpg: 20x20 pixels; a frame has 32 or more" in with_(onset=tmp_path / "tiny.jpg")
    assert "small.jpg: 80x60 pixels, but --onset has 160x120" in with_(apex=tmp_path / "small.jpg")
    assert "--depth_apex" in with_(depth_apex=tmp_path / "small.png")
    assert "a colour image, not a depth frame" in with_(depth_onset=right["--onset"],
                                                        depth_apex=right["--apex"])
    assert "central square of its frames; drop it" in refused(
        capsys, "--model_path", path, *frames(raw, ROWS[0]), "--box", *BOX)


def test_boxes_that_do_not_fit(raw, made, capsys):
    _, path = made(("box", *BOX))
    argv = ["--model_path", path, *frames(raw, ROWS[0])]
    assert "give --box X Y W H" in refused(capsys, *argv)
    for box in ((500, 10, 20, 20), (-90, 10, 100, 100), (10, 10, 900, 900)):
        assert "--box: is no face on" in refused(capsys, *argv, "--box", *box)
    assert "not turned; drop the fifth number" in refused(capsys, *argv, "--box", *BOX, 5)


def test_depth_for_a_model_without_it(raw, made, capsys):
    _, path = made(("none",), "--view", "RGB_gray")
    assert re.search(r"--depth_onset .*the second view of .* is gray, not depth", refused(
        capsys, "--model_path", path, *frames(raw, ROWS[0])))


def test_lists_that_do_not_fit(raw, made, tmp_path, capsys):
    data, path = made(("none",))
    other = tmp_path / "data"
    shutil.copytree(data, other)
    argv = ["--model_path", path, "--data_folder", other, "--list",
            other / "v_rgb" / "spNO1_test.txt"]
    given = json.loads((data / "encoding.json").read_text())
    for change, message in (({"difference": "absolute"}, "difference"),
                            ({"registration": "none"}, "registration none"),
                            ({"crop": {**given["crop"], "margin": 0.5}}, "crop margin 0.5"),
                            ({"depth_range_mm": 20}, "depth_range_mm 20"),
                            ({"classes": ["x", "y", "z"]}, "classes")):
        util.write_json(other / "encoding.json", given | change)
        assert message in refused(capsys, *argv)
    (other / "encoding.json").unlink()
    assert "difference wrap" in refused(capsys, *argv)
    predict(*argv, "--encoding", "signed")
    util.write_json(other / "encoding.json", given)
    assert "drop the flag" in refused(capsys, *argv, "--encoding", "wrap")
    row, *rest = (other / "v_depth" / "spNO1_test.txt").read_text().splitlines(True)
    (other / "v_depth" / "spNO1_test.txt").write_text("".join(rest))
    assert "1 clips of v_rgb lack a partner in v_depth" in refused(capsys, *argv)
    (other / "v_depth" / "spNO1_test.txt").write_text("".join([*rest, row.replace(" 0 ", " x ")]))
    assert re.search(r"v_depth/spNO1_test\.txt:3: label 'x'", refused(capsys, *argv))
    (other / row.rsplit(None, 2)[0]).unlink()
    (other / "v_depth" / "spNO1_test.txt").write_text("".join([row, *rest]))
    assert "missing" in refused(capsys, *argv)
    (other / "v_depth" / "spNO1_test.txt").unlink()
    assert "the second view's list" in refused(capsys, *argv)
    assert "no such list" in refused(capsys, *argv[:-1], other / "v_rgb" / "nobody.txt")


def test_a_list_whose_second_view_has_other_channels(quick, tmp_path, capsys):
    for name, channels in (("grey", 1), ("colour", 3)):
        draw_set(tmp_path / name, 2, 2, second="flow", channels=channels)
    flags = ["--data_folder", tmp_path / "colour", *quick, "--view", "RGB_flow"]
    pretrain(*flags, "--model_path", tmp_path / "runs")
    (path,) = tmp_path.glob("runs/memory_*/last.pth")
    finetune(*flags, "--model_path", path, "--save_path", tmp_path / "out", "--subject", "all",
             "--freeze_encoder")
    (path,) = tmp_path.glob("out/finetune_*/last.pth")
    lists = [["--data_folder", tmp_path / name, "--list", tmp_path / name / "v_rgb" / "s1_test.txt"]
             for name in ("grey", "colour")]
    assert "has 1 channels" in refused(capsys, "--model_path", path, *lists[0])
    assert len(predicted(capsys, "--model_path", path, *lists[1])["clips"]) == 2


def test_help_names_groups_and_flags(capsys):
    with pytest.raises(SystemExit):
        predict("--help")
    text = capsys.readouterr().out
    for part in ("photographs:", "clips: two frames", "model:", "running:", "output:",
                 "--box X [Y W H", "--json", "[auto]"):
        assert part in text, part
