"""Lists, clip identity and pairing, folds, decoding."""
import argparse
import collections
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_pairs, draw_set, save_image, signed_pair
from PIL import Image

import dataset
from dataset import Clip, ClipSet
from images import cache, decoding, encoding, lists
from util import BadInput


def touch(folder, clips):
    """An empty file for every image that `clips` name."""
    for clip in clips:
        for name in clip.paths:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()


def rewrite(paths, change):
    """Puts the lines of list files through `change`."""
    for path in paths:
        lines = change(path.read_text().splitlines())
        path.write_text("".join(line + "\n" for line in lines))


def label_set(rows, n_label=4):
    """A ClipSet without images from (database, subject, label) rows."""
    clips = [Clip(d, s, f"k{i}", label, (f"{i}.png", f"{i}.png"))
             for i, (d, s, label) in enumerate(rows)]
    clips.sort(key=lambda c: (c.database, c.subject, c.key))
    return ClipSet(clips, None, ("rgb", "depth"), (3, 1), {"difference": "signed"}, n_label)


def one_clip(folder, rgb, second, view="RGB_D", encoding="signed", suffix="png", **options):
    """Decodes one clip whose images are the given arrays."""
    name = "gray" if view == "RGB_gray" else lists.view_names(view)[1]
    clips = [Clip(0, s, s, i, (f"{s}_diff.{suffix}", f"{s}_diff_{name}.{suffix}"))
             for i, s in enumerate("ab")]
    for clip in clips:
        save_image(folder / clip.paths[0], rgb, **options)
        save_image(folder / clip.paths[1], second, **options)
    lists.write_lists(folder, clips, ("rgb", name))
    actual = dataset.read_clips(folder, view=view, difference=encoding)
    return dataset.load_images(actual)[0][0]


@pytest.fixture
def images():
    return signed_pair(np.random.default_rng(5), 256)


# ---------------------------------------------------------------- identity and pairing

def test_views_are_paired_by_identity_whatever_the_order_of_the_depth_lists(fresh):
    before = dataset.read_clips(fresh)
    rng = np.random.default_rng(0)
    rewrite(fresh.glob("v_depth/*.txt"), lambda lines: list(rng.permutation(lines)))
    after = dataset.read_clips(fresh)
    assert after.clips == before.clips
    assert after.digest() == before.digest()
    for clip in after.clips:
        assert clip.paths[0].endswith(f"/{clip.key}_diff.png")
        assert clip.paths[1].endswith(f"/{clip.key}_diff_depth.png")


@pytest.mark.parametrize("paths, keys", [
    (["x/a_diff.png", "x/b_diff.png"], ["a", "b"]),
    (["p/s1/a_diff.png", "p/s2/a_diff.png", "p/s2/b_diff.png"], ["s1/a", "s2/a", "b"]),
    (["d1/s/a_diff.png", "d2/s/a_diff.png", "d2/t/a_diff.png"], ["d1/s/a", "d2/s/a", "t/a"]),
    (["a_diff_depth.jpg", "q/a_diff_depth.png"], ["a", "q/a"]),
    (["a_diff_gray.png", "b_diff_other.png", "c.png"], ["a", "b_diff_other", "c"]),
])
def test_identity_is_the_shortest_unique_tail(paths, keys):
    actual = lists.clip_keys(paths, ("rgb", "gray", "depth"))
    assert [actual[path] for path in paths] == keys


def test_paths_that_nothing_tells_apart_are_refused():
    with pytest.raises(ValueError, match="name the same clip"):
        lists.clip_keys(["x/a_diff.png", "x/a_diff.jpg"])


def megc_clips():
    """Two casme2 subjects with the same file names, and a smic subject called as one of them."""
    return [Clip(d, s, "", i % 2, (f"{root}/{s}/EP{e}_diff.png",
                                   f"{root}_d/{s}/EP{e}_diff_depth.png"))
            for i, (d, root, s, e) in enumerate(
                [(2, "CASME2", "sub01", 1), (2, "CASME2", "sub01", 2), (2, "CASME2", "sub02", 1),
                 (1, "SMIC", "sub01", 1), (1, "SMIC", "s9", 7), (3, "SAMM", "006", 3)])]


def test_the_same_file_name_under_several_subjects_is_told_apart_by_its_folder(tmp_path):
    # the root folders differ between the views, so what tells the clips apart must not
    clips = [replace(clip, paths=(clip.paths[0], clip.paths[1].replace("_d/", "/")))
             for clip in megc_clips()]
    touch(tmp_path, clips)
    lists.write_lists(tmp_path, clips)
    actual = dataset.read_clips(tmp_path)
    paths = [clip.paths for clip in clips]
    assert {c.key: c.paths for c in actual.clips} == {
        "CASME2/sub01/EP1": paths[0], "EP2": paths[1],
        "sub02/EP1": paths[2],
        "SMIC/sub01/EP1": paths[3],
        "EP7": paths[4], "EP3": paths[5]}


def test_lists_of_one_subject_have_an_empty_train_list(tmp_path):
    clips = [replace(clip, paths=(clip.paths[0], clip.paths[1].replace("_d/", "/")))
             for clip in megc_clips() if clip.subject == "sub02"]
    touch(tmp_path, clips)
    lists.write_lists(tmp_path, clips)
    assert len(dataset.read_clips(tmp_path)) == len(clips) > 0
    path = tmp_path / "v_rgb" / "sub02_train.txt"
    path.write_text((tmp_path / "v_rgb" / "sub02_test.txt").read_text())
    with pytest.raises(BadInput, match="on both sides"):
        dataset.read_clips(tmp_path)


def test_a_subject_name_in_two_databases_is_two_persons_and_two_folds(tmp_path):
    clips = [replace(clip, paths=(clip.paths[0], clip.paths[1].replace("_d/", "/")))
             for clip in megc_clips()]
    touch(tmp_path, clips)
    lists.write_lists(tmp_path, clips)
    actual = dataset.read_clips(tmp_path)
    assert actual.people == [(1, "s9"), (1, "sub01"), (2, "sub01"), (2, "sub02"), (3, "006")]
    names, fold_of = dataset.subject_folds(actual)
    assert names == ["smic_s9", "smic_sub01", "casme2_sub01", "casme2_sub02", "samm_006"]
    assert fold_of.tolist() == [0, 1, 2, 2, 3, 4]
    assert dataset.find_people(["casme2/sub01"], actual) == [(2, "sub01")]
    assert dataset.find_people(["sub01"], actual) == [(1, "sub01"), (2, "sub01")]


def test_pairs_of_different_folders_meet_by_file_name_alone(tmp_path):
    clips = megc_clips()[1:3] + megc_clips()[4:]
    touch(tmp_path, clips)
    lists.write_lists(tmp_path, clips)
    assert {(c.paths[0], c.paths[1]) for c in dataset.read_clips(tmp_path).clips} \
        == {(c.paths[0], c.paths[1]) for c in clips}


@pytest.mark.parametrize("prefix", ["/home/some body/CASME 3/", "C:/Data/", "D:\\my sets\\"])
def test_somebody_elses_absolute_paths_are_cut(fresh, prefix):
    before = dataset.read_clips(fresh)
    rewrite(fresh.glob("v_*/*_t*.txt"), lambda lines: [
        prefix + (line.replace("/", "\\") if "\\" in prefix else line) for line in lines])
    assert dataset.read_clips(fresh).clips == before.clips


def test_the_views_may_carry_different_prefixes(fresh):
    before = dataset.read_clips(fresh)
    rewrite(fresh.glob("v_depth/*_t*.txt"), lambda lines: ["/mnt/depth/" + ln for ln in lines])
    assert dataset.read_clips(fresh).clips == before.clips


def test_paths_may_hold_spaces(tmp_path):
    clips = [Clip(0, s, "", i, (f"my images/{s} 1  2/a {s}_diff.png",
                               f"my depth/a {s}_diff_depth.png"))
             for i, s in enumerate("xy")]
    touch(tmp_path, clips)
    lists.write_lists(tmp_path, clips)
    assert [(c.key, c.paths[0]) for c in dataset.read_clips(tmp_path).clips] \
        == [("a x", clips[0].paths[0]), ("a y", clips[1].paths[0])]


@pytest.mark.parametrize("ending", ["\r\n", "\n", "\n\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
def test_line_endings_blank_lines_and_byte_order_marks_do_not_matter(fresh, ending, mark):
    before = dataset.read_clips(fresh)
    for path in fresh.glob("v_*/*.txt"):
        path.write_bytes((mark + path.read_text().replace("\n", ending)).encode())
    assert dataset.read_clips(fresh).clips == before.clips


def test_list_folder_may_be_elsewhere(fresh, tmp_path):
    before = dataset.read_clips(fresh)
    for name in ("v_rgb", "v_depth", "encoding.json"):
        (tmp_path / "lists").mkdir(exist_ok=True)
        shutil.move(fresh / name, tmp_path / "lists" / name)
    assert dataset.read_clips(fresh, tmp_path / "lists").clips == before.clips


def test_classes_are_named_by_encoding_json(fresh):
    """Saved by an editor that puts a mark before the text."""
    assert dataset.read_clips(fresh).classes == ["0", "1"]
    (fresh / "encoding.json").write_text('{"difference": "signed", "classes": ["no", "yes"]}',
                                         encoding="utf-8-sig")
    assert dataset.read_clips(fresh).classes == ["no", "yes"]


def test_without_encoding_json_pixels_are_wrap_and_the_reader_is_told(fresh, capsys):
    (fresh / "encoding.json").unlink()
    assert dataset.read_clips(fresh).encoding["difference"] == "wrap"
    assert "wrap" in capsys.readouterr().out
    assert dataset.read_clips(fresh, difference="signed").encoding["difference"] == "signed"


# ---------------------------------------------------------------- the second view

def test_luminance_stands_in_for_missing_gray_lists(tmp_path):
    draw_set(tmp_path, 2, 2, size=256)
    actual = dataset.read_clips(tmp_path, view="RGB_gray")
    assert actual.luminance and actual.channels == (3, 1)
    image = dataset.load_images(actual)[0][0].astype(float)
    assert np.abs(image[3] - np.tensordot([0.299, 0.587, 0.114], image[:3], 1)).max() <= 0.5001


def test_luminance_of_wrap_is_that_of_the_differences(tmp_path):
    draw_set(tmp_path, 2, 2, size=256)
    (tmp_path / "encoding.json").unlink()
    actual = dataset.read_clips(tmp_path, view="RGB_gray", difference="wrap")
    change = np.full((256, 256, 3), (-3, 2, -2))  # luminance 0.05
    change[0] = (-5, -5, -5)
    save_image(tmp_path / actual.clips[0].paths[0], (change % 256).astype(np.uint8))
    grey = dataset.load_images(actual)[0][0][3]
    assert (grey[0] == 251).all() and (grey[1:] == 0).all()


def test_gray_lists_are_taken_where_there_are_some(tmp_path):
    draw_set(tmp_path, second="gray")
    actual = dataset.read_clips(tmp_path, view="RGB_gray")
    assert not actual.luminance
    assert all("_diff_gray" in clip.paths[1] for clip in actual.clips)


def test_lists_and_pairs_have_a_grey_view_of_their_own_or_neither(tmp_path):
    draw_set(tmp_path, second="gray")
    draw_pairs(tmp_path)
    opt = argparse.Namespace(data_folder=tmp_path, list_folder=None, view="RGB_gray", encoding=None,
                             pool="both", pairs=tmp_path / "pairs.tsv", min_intensity=None,
                             subject=None, fold=None, without=[])
    with pytest.raises(BadInput, match=r"pairs.tsv: has no grey view of its own, but the lists"):
        dataset.read_pool(opt)
    (tmp_path / "v_gray").rename(tmp_path / "v_other")
    assert len(dataset.read_pool(opt)) == 18


@pytest.mark.parametrize("pool", ["both", "unlabelled"])
def test_whoever_is_evaluated_is_left_out_by_the_name_that_lists_have(tmp_path, pool):
    draw_set(tmp_path)
    pairs = draw_pairs(tmp_path)
    text = pairs.read_text().replace("\ts2\t", "\tS.2\t").replace("casme3\ts3", "samm\ts9")
    pairs.write_text(text)
    opt = argparse.Namespace(data_folder=tmp_path, list_folder=None, view="RGB_D", encoding=None,
                             pool=pool, pairs=pairs, min_intensity=None, subject="each", fold=None,
                             without=[])
    clips = dataset.read_pool(opt)
    runs = dataset.left_out(opt, clips)
    assert [(name, out) for name, out in runs] == [(f"s{i}", {(0, f"s{i}")}) for i in range(1, 5)]
    opt.subject = "s2"
    ((name, out),) = dataset.left_out(opt, clips)
    assert name == "s2" and out == {(0, "s2"), (0, "S.2")}


@pytest.mark.parametrize("channels", [1, 3])
def test_another_second_view_has_one_or_three_channels(tmp_path, channels):
    draw_set(tmp_path, second="flow", channels=channels)
    actual = dataset.read_clips(tmp_path, view="RGB_flow")
    assert actual.channels == (3, channels)
    assert [clip.key for clip in actual.clips[:3]] == ["s1-a-0", "s1-b-1", "s1-c-2"]
    image = dataset.load_images(actual)[0][0]
    assert image.shape == (3 + channels, 256, 256)
    if channels == 3:
        assert (image[3] != image[4]).any()


# ---------------------------------------------------------------- pixels

def test_8_bit_png_arrives_unchanged(tmp_path, images):
    decoded = one_clip(tmp_path, *images)
    assert (decoded[:3] == images[0].transpose(2, 0, 1)).all()
    assert (decoded[3] == images[1]).all()


def test_16_bit_depth_is_divided_by_257(tmp_path, images):
    wide = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    decoded = one_clip(tmp_path, images[0], wide)[3]
    assert (decoded == np.round(wide / 257)).all()
    assert (one_clip(tmp_path, images[0], images[1] * np.uint16(257))[3] == images[1]).all()


def test_depth_as_rgb_of_equal_channels_counts_as_grey(tmp_path, images):
    assert (one_clip(tmp_path, images[0], np.dstack([images[1]] * 3))[3] == images[1]).all()


def test_jpeg_is_read(tmp_path, images):
    decoded = one_clip(tmp_path, *images, suffix="jpg", quality=95)
    assert np.abs(decoded[3].astype(int) - images[1]).mean() < 2
    assert np.abs(decoded[:3].mean(0) - images[0].mean(2)).mean() < 2


@pytest.mark.parametrize("shape", [(128, 128), (300, 300), (512, 512), (256, 320), (200, 100)])
def test_other_sizes_are_brought_to_a_shorter_side_of_256_and_cut_alike(tmp_path, shape):
    # a ramp along the longer side: its centre stays at the centre, in both views
    ramp = np.broadcast_to(np.linspace(0, 255, max(shape)), (min(shape), max(shape)))
    ramp = (ramp if shape[1] >= shape[0] else ramp.T).round().astype(np.uint8)
    decoded = one_clip(tmp_path, np.dstack([ramp] * 3), ramp)
    assert decoded.shape == (4, 256, 256)
    assert (decoded[0] == decoded[3]).all()
    assert decoded[3].mean() == pytest.approx(127.5, abs=1)
    kept = min(shape) / max(shape)
    assert np.ptp(decoded[3].astype(int)) == pytest.approx(255 * kept, abs=3)


def test_views_of_differing_size_but_equal_shape_are_brought_together(tmp_path, images):
    small = np.asarray(Image.fromarray(images[1]).resize((128, 128)))
    decoded = one_clip(tmp_path, images[0], small)
    assert np.abs(decoded[3].astype(int) - images[1]).mean() < 3


def test_views_of_differing_aspect_are_refused(tmp_path, images):
    with pytest.raises(BadInput, match=r"a_diff_depth.png: 256x200, but a_diff.png is 256x256"):
        one_clip(tmp_path, images[0], images[1][:200])


def test_wrap_is_taken_as_it_is_but_never_resized(tmp_path, images):
    assert (one_clip(tmp_path, *images, encoding="wrap")[3] == images[1]).all()
    with pytest.raises(BadInput, match=r"a_diff.png: 128x128 pixels; .* cannot be resized"):
        one_clip(tmp_path, images[0][:128, :128], images[1][:128, :128], encoding="wrap")


def test_blank_clips_are_those_without_any_change_in_rgb(drawn):
    clips = dataset.read_clips(drawn)
    pixels, _ = dataset.load_images(clips)
    actual = encoding.blank(pixels, clips.encoding["difference"])
    assert [c.key for c, is_blank in zip(clips.clips, actual) if is_blank] == ["s2-a-10"]
    for difference, level in (("signed", 128), ("wrap", 0), ("absolute", 0)):
        flat = np.full((2, 4, 8, 8), level, np.uint8)
        flat[1, 2, 3, 4] += 1
        assert encoding.blank(flat, difference).tolist() == [True, False]


# ---------------------------------------------------------------- the cache

def test_cache_holds_what_decoding_gives_and_is_read_again(drawn, tmp_path, monkeypatch):
    clips = dataset.read_clips(drawn)
    plain, digest = dataset.load_images(clips, "off")
    first, first_digest = dataset.load_images(clips, tmp_path)
    assert (first == plain).all() and first_digest == digest
    monkeypatch.setattr(decoding, "decode", None)
    again, again_digest = dataset.load_images(clips, tmp_path)
    assert isinstance(again, np.memmap)
    assert (again == plain).all() and again_digest == digest
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npy"]


def test_what_a_killed_decoding_left_gives_its_room_back(drawn, tmp_path, monkeypatch):
    clips = dataset.read_clips(drawn)
    dataset.load_images(clips, tmp_path)
    (array,) = tmp_path.glob("*.npy")
    array.unlink()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    part = tmp_path / f".{array.name}.{platform.node()}.{dead.pid}.part"
    part.write_bytes(bytes(1000))
    dataset.load_images(clips, tmp_path)
    assert array.exists() and not part.exists()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")])])
@pytest.mark.parametrize("kind", ["array", "memory map", "stream"])
def test_batches_are_fetched_in_order(drawn, tmp_path, device, kind, monkeypatch):
    clips = dataset.read_clips(drawn)
    plain, _ = dataset.load_images(clips)
    if kind == "stream":
        monkeypatch.setattr(cache, "_free_memory", lambda: 1000)
    images, _ = dataset.load_images(clips, tmp_path if kind == "memory map" else "off")
    assert isinstance(images, cache.Stream) == (kind == "stream")
    batches = [np.array(b) for b in ([3, 1], [0], [5, 5, 2], [11, 7])] * 3
    device, actual = torch.device(device), []
    for batch in cache.fetch(images, batches, device):
        assert batch.device.type == device.type and batch.dtype == torch.uint8
        actual.append(batch.cpu().numpy())
    assert len(actual) == len(batches)
    assert all((a == plain[b]).all() for a, b in zip(actual, batches))
    assert list(cache.fetch(images, [], device)) == []


def test_a_changed_image_is_noticed(fresh, tmp_path):
    clips = dataset.read_clips(fresh)
    before, digest = dataset.load_images(clips, tmp_path / "cache")
    path = fresh / clips.clips[4].paths[1]
    save_image(path, 255 - np.asarray(Image.open(path)))
    after, new_digest = dataset.load_images(clips, tmp_path / "cache")
    assert new_digest != digest
    assert [i for i in range(len(clips)) if (before[i] != after[i]).any()] == [4]


# ---------------------------------------------------------------- folds

def random_rows(seed, subjects=40):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(subjects):
        for _ in range(rng.integers(1, 25)):
            rows.append((0, f"s{i}", int(rng.choice(4, p=[0.54, 0.18, 0.07, 0.21]))))
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_ten_folds_hold_whole_subjects_of_every_class_in_even_shares(seed):
    rows = random_rows(seed)
    clips = label_set(rows)
    names, fold_of = dataset.subject_groups(clips)
    assert names == [f"fold{i}of10" for i in range(1, 11)]
    for person in clips.people:
        assert len(set(fold_of[clips.members([person])])) == 1
    counts = np.zeros((10, 4))
    np.add.at(counts, (fold_of, clips.labels), 1)
    assert (counts[:, :2] > 0).all()
    share = counts.sum(0) / 10
    assert np.abs(counts.sum(1) - share.sum()).max() < 0.25 * share.sum()
    assert np.abs(counts[:, 0] - share[0]).max() < 0.4 * share[0]


def test_ten_folds_follow_from_the_lists_alone_whatever_their_order():
    rows = random_rows(7)
    clips = label_set(rows)
    _, fold_of = dataset.subject_groups(clips)
    shuffled = replace(clips, clips=[clips.clips[i] for i in
                                     np.random.default_rng(0).permutation(len(clips))])
    _, other = dataset.subject_groups(shuffled)
    assert {c.key: f for c, f in zip(clips.clips, fold_of)} \
        == {c.key: f for c, f in zip(shuffled.clips, other)}


@pytest.mark.parametrize("subjects", [2, 9, 10, 11])
def test_no_fold_is_empty(subjects):
    rows = [(0, f"s{i}", 0) for i in range(subjects)] + [(0, "s0", 1)] * 30
    names, fold_of = dataset.subject_groups(label_set(rows, 2))
    assert set(fold_of) == set(range(min(10, subjects)))
    assert len(names) == min(10, subjects)


# ---------------------------------------------------------------- pairs.tsv

def test_pairs_are_read(drawn):
    actual = dataset.read_pairs(drawn / "pairs.tsv", drawn)
    assert len(actual) == 6
    assert {(c.person, c.label, c.paths[0], c.paths[1]) for c in actual.clips} == {
        ((0, f"s{i % 4 + 1}"), -1, f"free/u{i}_diff.png", f"free/u{i}_diff_depth.png")
        for i in range(6)}


def test_min_intensity_is_a_threshold_on_the_intensity_column(drawn):
    actual = dataset.read_pairs(drawn / "pairs.tsv", drawn, min_intensity=3)
    assert {c.paths[0] for c in actual.clips} == {f"free/u{i}_diff.png" for i in (3, 4, 5)}
    with pytest.raises(BadInput, match=r"pairs.tsv: no pair of intensity 5.5 or more"):
        dataset.read_pairs(drawn / "pairs.tsv", drawn, min_intensity=5.5)


def test_a_pair_named_twice_is_refused_with_both_lines(fresh):
    text = (fresh / "pairs.tsv").read_text()
    (fresh / "pairs.tsv").write_text(text + text.splitlines()[2] + "\n")
    with pytest.raises(BadInput, match=r"pairs.tsv:8: free/u1_diff.png is named in .*pairs.tsv:3"):
        dataset.read_pairs(fresh / "pairs.tsv", fresh)


def test_pairs_do_not_mind_line_endings_or_luminance(fresh):
    path = fresh / "pairs.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    actual = dataset.read_pairs(path, fresh, view="RGB_gray")
    assert actual.luminance and len(actual) == 6
    assert all(c.paths[1] == c.paths[0] for c in actual.clips)


# ---------------------------------------------------------------- the published lists

def test_published_lists_hold_943_clips_of_95_subjects_in_four_classes(real_lists):
    clips = dataset.read_clips(real_lists)
    assert len(clips) == 943
    assert collections.Counter(clips.labels.tolist()) == {0: 508, 1: 170, 2: 64, 3: 201}
    assert clips.n_label == 4
    names, fold_of = dataset.subject_folds(clips)
    assert len(names) == len(set(fold_of)) == 95


def test_published_lists_are_paired_right_though_their_rows_are_not(real_lists):
    clips = dataset.read_clips(real_lists)
    for clip in clips.clips:
        assert clip.paths[0].endswith(f"/{clip.key}_diff.png")
        assert clip.paths[1].endswith(f"/{clip.key}_diff_depth.png")
        assert clip.key.split("-")[0].replace(".", "") == clip.subject
    same = total = 0
    for path in real_lists.glob("v_rgb/*_train.txt"):
        rows = [[line.split()[0].rsplit("/", 1)[1].split("_diff")[0]
                 for line in (real_lists / view / path.name).read_text().splitlines()]
                for view in ("v_rgb", "v_depth")]
        same += sum(a == b for a, b in zip(*rows))
        total += len(rows[0])
    assert same / total == pytest.approx(0.248, abs=0.005)


def test_published_lists_make_ten_folds_of_all_classes(real_lists):
    clips = dataset.read_clips(real_lists)
    names, fold_of = dataset.subject_groups(clips)
    counts = np.zeros((10, 4), int)
    np.add.at(counts, (fold_of, clips.labels), 1)
    assert len(names) == 10
    assert (counts > 0).all()
    assert counts.sum(1).min() > 80 and counts.sum(1).max() < 110


def test_62_of_the_published_clips_start_at_their_apex(real_lists):
    clips = dataset.read_clips(real_lists)
    frames = [clip.key.split("-") for clip in clips.clips]
    assert sum(f[2] == f[5] for f in frames) == 62
