"""Pictures of a run: what is drawn, that nothing is cut off, where the maps come from."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import finetune, pretrain, probe
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import dataset
import util
from evaluation import gradcam, heldout, measures, pictures, result_files
from images import transforms
from models import create_classifier, create_model
from models.classifier import Classifier
from models.ran import RAN
from models.scn import Baseline

pytestmark = pytest.mark.pictures

LONG = [f"a class with a very long name, $number {i}_ of them" for i in range(3)]


@pytest.fixture
def drawn_figure(monkeypatch):
    """Draws with a function of pictures.py; its figure, laid out and not written."""
    def draw(function, *args):
        actual = []
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "write_figure", lambda _, figure: actual.append(figure))
            function(*args)
        FigureCanvasAgg(actual[0]).draw()
        return actual[0]
    return draw


def texts(figure):
    """{text: its box in pixels} of all that is written in a figure."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    actual = {t.get_text(): t.get_window_extent(renderer)
             for t in figure.findobj(lambda a: hasattr(a, "get_text") and a.get_visible())}
    return {text: box for text, box in actual.items() if text.strip() and box.width > 0}


def assert_inside(figure):
    """Nothing that is drawn reaches over the edge of the figure."""
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # inches
    width, height = figure.get_size_inches()
    assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -0.01


# ---------------------------------------------------------------- Grad-CAM

def reference_map(model, head, x, layer, target, side):
    """Grad-CAM by hand: hooks on the module whose output is the last map, per clip."""
    tower = (model.rgb_to_d, model.d_to_rgb)[side]
    module = tower.layer4 if layer == 6 else \
        {2: getattr(tower, "conv_block_2", None) or tower.layer1,
         5: getattr(tower, "conv_block_5", None) or tower.layer4}[layer]
    kept = []
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    logits = head(*model(x, layer))
    handle.remove()
    gradient, = torch.autograd.grad(logits[0, target], kept[0])
    return F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1))[0].detach()


@pytest.mark.parametrize("name, layer, encoder, size", [
    ("alexnet", 2, "both", 224), ("alexnet", 5, "rgb", 224), ("alexnet", 5, "both", 224),
    ("resnet18v1", 2, "depth", 64), ("resnet18v1", 5, "both", 224), ("resnet18v1", 6, "both", 64)])
def test_maps_are_grad_cam_of_each_clips_own_class(name, layer, encoder, size):
    torch.manual_seed(0)
    model = create_model(name).eval()
    head = create_classifier(name, layer, 3, encoder=encoder)
    x, targets = torch.randn(2, 4, size, size), [2, 0]
    actual = Classifier(model, head, layer, None).maps(x, head.classifier.weight[targets].detach())
    for side, view in enumerate(("rgb", "depth")):
        if encoder not in ("both", view):
            assert actual[side] is None
            continue
        for clip in range(2):
            expected = reference_map(model, head, x[clip:clip + 1], layer, targets[clip], side)
            assert expected.max() > 0 or actual[side][clip].max() == 0
            torch.testing.assert_close(actual[side][clip], expected, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_the_map_of_a_pooled_vector_is_the_weighted_sum_of_channels():
    torch.manual_seed(0)
    model = create_model("resnet18v1").eval()
    head = create_classifier("resnet18v1", 6, 2)
    x, weights = torch.randn(1, 4, 64, 64), torch.randn(1, 2 * model(
        torch.zeros(1, 4, 64, 64), 5)[0].shape[1])
    actual = Classifier(model, head, 6, None).maps(x, weights)
    with torch.no_grad():
        for tap, part, ours in zip(model(x, 5), weights.chunk(2, 1), actual):
            expected = F.relu(torch.einsum("bchw,bc->bhw", tap, part) / tap[0, 0].numel())
            torch.testing.assert_close(ours, expected)


def test_most_wrong_is_a_stable_sort_of_wrong_predictions():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(3), 200).round(1)  # many ties
    p[rng.random(200) < 0.1] = np.nan
    labels = rng.integers(0, 3, 200)
    wrong = [(-max(row), i) for i, row in enumerate(p)
             if not np.isnan(row[0]) and row.argmax() != labels[i]]
    for most in (1, 12, 500):
        assert measures.most_wrong(labels, p, most).tolist() \
            == [i for _, i in sorted(wrong)][:most]
    assert len(measures.most_wrong(labels, np.full((200, 3), np.nan))) == 0


def test_groups_that_keep_their_own_mistakes_hold_those_of_all(tmp_path):
    """Whatever the groups that persons are trained in, no map of the merged picture is missing."""
    rng = np.random.default_rng(1)
    people, clips = np.repeat(np.arange(30), 5), np.arange(150)
    p, labels = rng.dirichlet(np.ones(4), 150), rng.integers(0, 4, 150)
    group = rng.integers(0, 5, 30)[people]
    for g in range(5):
        members = clips[group == g]
        maps = {members[i]: [[[int(members[i])]], None]
                for i in measures.most_wrong(labels[members], p[members])}
        for person in set(people[members]):
            mine = [i for i in members if people[i] == person]
            result_files.write_subjects(tmp_path, {f"s{person}": {"rows": [
                {"database": "casme3", "subject": f"s{person}", "key": f"k{i:03}",
                 "label": int(labels[i]), "prediction": int(p[i].argmax()),
                 "probabilities": p[i].tolist()} for i in mine],
                "maps": {f"k{i:03}": maps[i] for i in mine if i in maps}}})
    actual, (wrong, n) = result_files.read_mistakes(tmp_path)
    assert n == 150 and wrong == int((p.argmax(1) != labels).sum())
    expected = [i for i in clips if p[i].argmax() != labels[i]]
    expected = sorted(expected, key=lambda i: -p[i].max())[:measures.MISTAKES]
    assert [row["key"] for row, _ in actual] == [f"k{i:03}" for i in expected]
    assert [int(first[0, 0]) for _, (first, _) in actual] == expected


def test_maps_that_cannot_be_read_are_refused_by_name(tmp_path):
    row = {"database": "casme3", "subject": "s", "key": "k", "label": 0, "prediction": 1,
           "probabilities": [0.2, 0.8]}
    for maps in ({"k": [1, 2, 3]}, {"k": ["x", None]}, [1], {"k": [[[1], [2, 3]], None]}):
        result_files.write_subjects(tmp_path, {"s": {"rows": [row], "maps": maps}})
        with pytest.raises(util.BadInput, match=r"s\.json: its 'maps' cannot be read"):
            result_files.read_mistakes(tmp_path)


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def heads():
    """The heads of every pass that `runs` trained, in turn."""
    return []


@pytest.fixture(scope="module")
def runs(drawn, quick, pretrained, heads, tmp_path_factory):
    """Run folders of leave-one-subject-out probing: all at once, and in two parts."""
    folder, keep = tmp_path_factory.mktemp("pictures"), heldout.keep_frozen

    def noted(held, group, classifier, trained):
        heads.append(trained.heads)
        keep(held, group, classifier, trained)
    flags = ["--data_folder", drawn, *quick, "--epochs", 2, "--model_path", pretrained,
             "--protocol", "loso", "--save_path"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "CROP", 64)
        patch.setattr(heldout, "keep_frozen", noted)
        probe(*flags, folder / "whole")
        for names in (["s3", "s1"], ["s2", "s4", "s1"]):
            probe(*flags, folder / "parts", "--subject", *names)
    return [next((folder / name).glob("probe_*")) for name in ("whole", "parts")]


def test_every_run_leaves_its_pictures(runs, pretrained):
    for run in runs:
        for name in ("confusion", "curves", "mistakes"):
            with Image.open(run / f"{name}.png") as image:
                assert image.format == "PNG" and min(image.size) > 300
        assert not list(run.glob(".*")) and not list(run.glob("*.pth"))
    assert (pretrained.parent / "curves.png").exists()


def test_the_confusion_that_is_drawn_is_that_of_the_results(drawn, quick, pretrained, tmp_path,
                                                            monkeypatch, small_crops):
    actual = []
    monkeypatch.setattr(pictures, "draw_confusion", lambda *args: actual.append(args))
    probe("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path)
    ((path, confusion, classes, title),) = actual
    results = json.loads((path.parent / "results.json").read_text())
    assert path.name == "confusion.png" and not list(path.parent.glob("confusion*"))
    assert confusion.tolist() == results["confusion"] and confusion.sum() == 12
    assert (classes, title) == (results["classes"], "")


def test_mistakes_of_subjects_in_parts_are_those_of_one_run(runs):
    (whole, counts), (parts, same) = (result_files.read_mistakes(run) for run in runs)
    assert counts == same and whole
    assert [row["key"] for row, _ in whole] == [row["key"] for row, _ in parts]
    for (_, ours), (_, theirs) in zip(whole, parts):
        for a, b in zip(ours, theirs):
            assert a.shape == b.shape == (2, 2)  # crops of 64 pixels, halved five times
            assert abs(a.astype(int) - b).max() <= 1
    predicted = json.loads((runs[0] / "results.json").read_text())
    assert counts == (predicted["n"] - int(np.trace(predicted["confusion"])), predicted["n"])


def test_maps_are_those_of_the_head_that_held_the_clip_out(runs, heads, drawn, pretrained,
                                                           small_crops):
    """By hand: the encoder's last map weighted with the rows of the fold heads, over the
    deviations that the heads scale by."""
    weight, std = heads[0].weight.detach(), heads[0].std
    old = torch.load(pretrained, weights_only=True)
    model = create_model("resnet18v1").eval()
    model.load_state_dict(old["model"])
    clips = dataset.read_clips(drawn)
    images, _ = dataset.load_images(clips)
    actual, _ = result_files.read_mistakes(runs[0])
    assert actual
    for row, maps in actual:
        i = next(i for i, c in enumerate(clips.clips) if c.key == row["key"])
        fold = clips.people.index((0, row["subject"]))
        head = weight[fold] / std[fold]
        x = transforms.eval_transform(torch.from_numpy(images[i:i + 1]), old["normalization"])
        with torch.no_grad():
            for tap, part, ours in zip(model(x, 5), head[row["prediction"]].chunk(2), maps):
                cam = F.relu(torch.einsum("chw,c->hw", tap[0], part))
                expected = (255 * cam / cam.max().clamp(min=1e-12)).round()
                assert abs(expected.numpy() - ours).max() <= 1


@pytest.mark.parametrize("encoder, none", [("rgb", 1), ("depth", 0)])
def test_a_view_the_head_leaves_out_has_no_map(drawn, quick, pretrained, tmp_path, encoder, none,
                                               small_crops):
    finetune("--data_folder", drawn, *quick, "--model_path", pretrained, "--save_path", tmp_path,
             "--subject", "s1", "s2", "--encoder", encoder)
    (run,) = tmp_path.glob("finetune_*")
    actual, _ = result_files.read_mistakes(run)
    assert actual and (run / "mistakes.png").exists()
    for _, maps in actual:
        assert maps[none] is None and maps[1 - none] is not None


# ---------------------------------------------------------------- what is drawn

def test_confusion_with_long_names_is_not_cut_off(drawn_figure, tmp_path):
    figure = drawn_figure(pictures.draw_confusion, tmp_path / "x.png", np.diag([5, 0, 1000]), LONG)
    assert_inside(figure)
    assert pictures.shorten(LONG[0], 24) in texts(figure)


def write_log(folder, lines, view="RGB_D"):
    folder.mkdir(parents=True, exist_ok=True)
    util.write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in [
        {"opt": {"view": view}}, *lines]))


def test_curves_are_the_values_of_the_log(drawn_figure, tmp_path):
    values = {name: np.linspace(5, 0.1, 7) / (i + 1) for i, name in enumerate(
        ("rgb_loss", "depth_loss", "rgb_prob", "depth_prob", "learning_rate", "seconds"))}
    run = tmp_path / ("a_run_with_a_long_name_" * 9)
    write_log(run, [{"epoch": e + 1, **{k: v[e] for k, v in values.items()}} for e in range(7)],
              "RGB_flow")
    figure = drawn_figure(pictures.draw_curves, run)
    assert_inside(figure)
    lines = {(axes.get_title(), line.get_label()): line for axes in figure.axes
             for line in axes.lines}
    for title, label, name in (
            ("contrastive loss", "RGB", "rgb_loss"), ("contrastive loss", "flow", "depth_loss"),
            ("probability of the right pair", "RGB", "rgb_prob"),
            ("probability of the right pair", "flow", "depth_prob")):
        assert np.allclose(lines[title, label].get_ydata(), values[name])
        assert lines[title, label].get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert [axes.get_title() for axes in figure.axes][2:] == ["learning rate"]
    assert figure.axes[2].get_yscale() == "log"
    assert len({line.get_color() for line in lines.values()}) == 3


def test_curves_of_several_trainings_are_faint_under_their_mean(drawn_figure, tmp_path):
    write_log(tmp_path, [
        {"epoch": e, "subject": s, "train_loss": e + i, "train_accuracy": 0.5, "learning_rate": 0.1}
        for i, s in enumerate("abc") for e in range(1, 4 if s != "c" else 3)])
    figure = drawn_figure(pictures.draw_curves, tmp_path)
    *each, mean = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in each] == [[1, 2, 3], [2, 3, 4], [3, 4]]
    assert list(mean.get_ydata()) == [2, 3, 3.5] and mean.get_label() == "mean of 3"
    assert [axes.get_title() for axes in figure.axes] == ["training loss", "training accuracy",
                                                          "learning rate"]


def test_held_out_figures_are_drawn_only_where_they_are_given(drawn_figure, tmp_path):
    write_log(tmp_path, [{"epoch": e, "train_loss": 1.0, "uf1": 0.5, "learning_rate": 0.0}
                         for e in (1, 2)])
    titles = ["training loss", "learning rate", "oracle: sees the held-out subjects"]
    for held_out, count in (None, 2), ({"oracle/uf1": [0.4, 0.3], "oracle/uar": [0.2, 0.5]}, 3):
        figure = drawn_figure(pictures.draw_curves, tmp_path, held_out)
        assert [axes.get_title() for axes in figure.axes] == titles[:count]
    assert [(line.get_label(), *line.get_ydata()) for line in figure.axes[2].lines] \
        == [("uf1", 0.4, 0.3), ("uar", 0.2, 0.5)]


def mistakes_of(n, classes, maps, encoding="signed"):
    """(clips, images, mistakes, counts) with long keys; the first clip is blank."""
    rng, key = np.random.default_rng(0), "part_A/a_very_long_folder_name_of_a_video/" * 3
    clips = [SimpleNamespace(database=i % 2, subject=f"a subject with a long name {i}",
                             person=(i % 2, f"a subject with a long name {i}"), key=f"{key}{i}")
             for i in range(n)]
    rows = [({"database": dataset.DATABASES[c.database], "subject": c.subject, "key": c.key,
              "label": 0, "prediction": 2, "probabilities": [0.1, 0.0, 0.9]}, maps) for c in clips]
    images = rng.normal(128, 4, (n, 4, 256, 256)).clip(0, 255).astype(np.uint8)
    images[:1] = 128
    clips = SimpleNamespace(clips=clips, classes=classes, views=("rgb", "depth"),
                            encoding={"difference": encoding})
    return clips, images, rows, (n, 2 * n)


@pytest.mark.parametrize("n", [0, 1, 12])
def test_mistakes_with_long_names_are_told_in_full_and_not_cut_off(drawn_figure, tmp_path, n):
    maps = [np.arange(36, dtype=np.uint8).reshape(6, 6), None]
    figure = drawn_figure(heldout.draw_mistakes, tmp_path / "x.png", *mistakes_of(n, LONG, maps))
    assert_inside(figure)
    actual = texts(figure)
    assert any(text.startswith(f"{n} most confidently" if n else "no mistake") for text in actual)
    told = [(text, box) for text, box in actual.items() if "→" in text]
    assert len(told) == n
    true, taken = (pictures.shorten(LONG[i], 20) for i in (0, 2))
    for text, box in told:
        assert f"{true} → {taken}  (p 0.90, true 0.10)" in text
        half = figure.bbox.width / 2
        assert box.x1 < half or box.x0 > half  # not into the clip beside it
    assert ("not seen" in actual) == (n > 0)
    clips, images, rows, counts = mistakes_of(n, LONG, [None, None])  # kept by an earlier version
    actual = texts(drawn_figure(heldout.draw_mistakes, tmp_path / "x.png", clips, images, rows,
                               counts))
    assert ("no map kept" in actual) == (n > 0) and "not seen" not in actual


@pytest.mark.parametrize("encoding, level, grey", [("signed", 128, 0.5), ("wrap", 0, 0.5),
                                                   ("absolute", 0, 0)])
def test_no_change_has_one_shade_whatever_the_encoding(encoding, level, grey):
    images = np.full((2, 4, 256, 256), level, np.uint8)
    images[1, 0] = (level + 10) % 256
    images[1, 1] = (level - 10) % 256 if encoding != "absolute" else 5
    shown = pictures._visible(images, encoding, slice(0, 3))
    assert shown.shape[0] == 2 and (shown[0] == grey).all()
    assert (shown[1, ..., 0] == 1).all() and (shown[1, ..., 2] == grey).all()
    assert (shown[1, ..., 1] == (0.5 if encoding == "absolute" else 0)).all()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    pictures.draw_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), ["no", "yes"])
    before = (tmp_path / "confusion.png").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pictures.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        pictures.draw_confusion(tmp_path / "confusion.png", np.eye(3, dtype=int), list("abc"))
    assert [p.name for p in tmp_path.iterdir()] == ["confusion.png"]
    assert (tmp_path / "confusion.png").read_bytes() == before


def test_pretraining_draws_its_curves_again_when_it_goes_on(drawn, quick, tmp_path, small_crops):
    flags = ["--data_folder", drawn, *quick, "--model_path", tmp_path, "--save_freq", 1]
    pretrain(*flags)
    (path,) = tmp_path.glob("memory_*/curves.png")
    before = path.read_bytes()
    pretrain(*flags, "--epochs", 2, "--resume", "auto")
    assert path.read_bytes() != before


@pytest.mark.parametrize("size, cells", [(64, 4), (128, 4)])
def test_a_class_is_looked_for_where_its_gradient_is(size, cells):
    """Of a network that ends in a mean and a linear layer: its row times the maps."""
    torch.manual_seed(0)
    network = Baseline(7).eval()
    images, classes = torch.randn(2, 3, size, size), torch.tensor([3, 5])
    maps = gradcam.class_maps(network, images, classes)
    assert maps.shape == (2, cells, cells)
    if size == 128:
        with torch.no_grad():
            expected = torch.einsum("bdhw,bd->bhw", network.maps(images),
                                    network.fc.weight[classes]) / cells ** 2
        torch.testing.assert_close(maps, expected.relu(), atol=1e-5, rtol=1e-4)
    views = torch.randn(2, 5, 3, size, size)
    attentive = RAN(7).eval()
    whole = gradcam.class_maps(attentive, views, classes)
    assert whole.shape == (2, cells, cells)
    other = views.clone()
    other[1] += 1  # another image
    torch.testing.assert_close(gradcam.class_maps(attentive, other, classes)[0], whole[0],
                               atol=1e-5, rtol=1e-4)
    frozen = Baseline(7)
    frozen.features.requires_grad_(False)
    assert gradcam.class_maps(frozen, images, classes).shape == (2, cells, cells)
