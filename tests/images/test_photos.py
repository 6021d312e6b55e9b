"""Batches of photographs: transforms against slow ones, views, the fourth channel; decoding on
demand."""
import errno
import io
import multiprocessing
import os
import re
import signal
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from images import cache, photos, regions
from images.decoding import read_photo
from training import epochs
from util import BadInput, RunFailed


@pytest.fixture
def batch():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8))


def normalised(images):
    return (images.float() / 255 - torch.tensor(photos.MEAN).view(3, 1, 1)) \
        / torch.tensor(photos.STD).view(3, 1, 1)


def drawn_for(n, recipe, seed=1, side=32):
    return photos.draw(n, epochs.generator(seed), recipe, side)


def test_nothing_drawn_changes_nothing(batch):
    for out in (photos.eval_transform(batch), photos.train_transform(batch, drawn_for(5, "none"))):
        torch.testing.assert_close(out, normalised(batch), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(photos.eval_transform(batch, mirror=True),
                               normalised(batch).flip(-1))


def test_a_flip_is_a_flip(batch):
    drawn = drawn_for(5, "flip")
    mirrored = drawn["geometry"][:, 0, 0] < 0
    assert 0 < mirrored.sum() < 5
    expected = torch.where(mirrored.view(-1, 1, 1, 1), normalised(batch).flip(-1),
                           normalised(batch))
    torch.testing.assert_close(photos.train_transform(batch, drawn), expected, atol=2e-5, rtol=1e-5)


def test_colours_against_a_slow_loop(batch):
    drawn = drawn_for(5, "strong")
    colour = drawn["colour"]
    assert abs(colour - 1).max() <= photos.COLOUR + 1e-6 and colour.std() > .05
    grey = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64).view(3, 1, 1)
    for i, (brightness, contrast, saturation) in enumerate(colour.double()):
        x = batch[i].double()
        x = saturation * x + (1 - saturation) * (x * grey).sum(0)
        x = contrast * x + (1 - contrast) * (batch[i].double() * grey).sum(0).mean()
        x = normalised((brightness * x).clamp(0, 255))
        torch.testing.assert_close(photos._coloured(batch, colour, None)[i], x.float(), atol=1e-4,
                                   rtol=1e-4)


def test_geometry_turns_about_the_middle_and_stays_in_its_range(batch):
    geometry = drawn_for(400, "strong")["geometry"]
    scale = torch.linalg.det(geometry[:, :, :2]).abs().rsqrt()  # of the image
    angle = torch.atan2(geometry[:, 1, 0], geometry[:, 1, 1]) * 180 / np.pi
    assert 1 / scale.max() > 1 / (1 + photos.LARGER) - .05 and scale.min() > .84
    assert 13 < angle.abs().max() <= photos.DEGREES + 1e-3
    assert geometry[:, :, 2].abs().max() <= 2 * photos.MOVED + 1e-6
    quarter = torch.tensor([[[0., -1, 0], [1, 0, 0]]])
    torch.testing.assert_close(photos.resample(normalised(batch[:1]), quarter),
                               normalised(batch[:1]).flip(-1).transpose(2, 3), atol=1e-4, rtol=1e-4)


def test_erasing_hides_a_box_of_half_the_images():
    drawn = drawn_for(400, "published", side=64)
    boxes = drawn["erase"]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / 64 ** 2
    assert .4 < (area > 0).float().mean() < .6 and area.max() < .27
    images = torch.full((400, 3, 64, 64), 255, dtype=torch.uint8)
    out = photos.train_transform(images, {**drawn, "noise": torch.zeros(400, dtype=torch.long)})
    hidden = (out == 0).all(1).float().mean((1, 2))
    torch.testing.assert_close(hidden, area, atol=1e-6, rtol=0)


def test_noise_is_of_thirty_grey_levels_variance_and_follows_from_its_seed():
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    out = photos._coloured(images, None, torch.tensor([0, 7]))
    grain = (out[1] - out[0]) * torch.tensor(photos.STD).view(3, 1, 1) * 255
    assert float(grain.std()) == pytest.approx(30 ** .5, rel=.02) and abs(grain.mean()) < .2
    assert torch.equal(out, photos._coloured(images, None, torch.tensor([0, 7])))


def test_views_are_crops_brought_to_size(batch):
    boxes = torch.from_numpy(regions.fixed_boxes(regions.FIXED, 32, 32)).float().expand(5, -1, -1)
    views = photos.eval_transform(batch, boxes=boxes)
    assert views.shape == (5, 8, 3, 32, 32)
    torch.testing.assert_close(views[:, -1], normalised(batch), atol=2e-5, rtol=1e-5)
    for k, (left, top, right, bottom) in enumerate(boxes[0].long().tolist()):
        cut = F.interpolate(normalised(batch)[:, :, top:bottom, left:right], (32, 32),
                            mode="bilinear", align_corners=False)
        # within; at the edges a crop sees the pixels beside it
        torch.testing.assert_close(views[:, k, :, 2:-2, 2:-2], cut[..., 2:-2, 2:-2], atol=1e-4,
                                   rtol=1e-4)


def test_views_see_the_augmented_image_and_parts_of_the_face_stay_with_the_face(batch):
    drawn = drawn_for(5, "none")
    drawn["geometry"][:, 0, 0] = -1  # mirrored
    boxes = torch.tensor([[[0., 0, 16, 16], [0, 0, 32, 32]]]).expand(5, -1, -1)
    outside = photos.train_transform(batch, drawn, boxes)
    inside = photos.train_transform(batch, drawn, boxes, inside=True)
    plain = photos.eval_transform(batch, boxes=boxes)
    torch.testing.assert_close(inside, plain.flip(-1), atol=1e-4, rtol=1e-4)
    mirrored = photos.eval_transform(batch.flip(-1), boxes=boxes)
    torch.testing.assert_close(outside, mirrored, atol=1e-4, rtol=1e-4)


def test_the_map_of_landmarks_goes_with_the_image(batch):
    marks = torch.zeros(5, 1, 32, 32)
    marks[:, :, 4:10, 3:9] = 1
    drawn = drawn_for(5, "flip")
    out = photos.train_transform(batch, drawn, marks=marks)
    mirrored = drawn["geometry"][:, 0, 0] < 0
    expected = torch.where(mirrored.view(-1, 1, 1, 1), marks.flip(-1), marks)
    torch.testing.assert_close(out[:, 3:], expected, atol=1e-5, rtol=0)
    strong = photos.train_transform(batch, drawn_for(5, "strong"), marks=marks)
    assert strong.shape == (5, 4, 32, 32) and not torch.equal(strong[:, 3:], marks)


def test_a_part_of_a_batch_is_as_the_whole(batch):
    drawn = drawn_for(5, "strong")
    whole = photos.train_transform(batch, drawn)
    some = photos.train_transform(batch[2:4], {k: v[2:4] for k, v in drawn.items()})
    torch.testing.assert_close(whole[2:4], some, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- decoding on demand

def on_demand(folder, n=6, lost=(), **more):
    asked = []

    def decode(i):
        asked.append(int(i))
        if i in lost:
            raise BadInput(f"{i}.jpg: cannot be decoded")
        return np.full((3, 4, 4), i, np.uint8)
    return cache.OnDemand(n, decode, (3, 4, 4), np.uint8, "ab" * 32, folder, **more), asked


@pytest.mark.parametrize("kept", [True, False], ids=["disk", "memory"])
def test_items_are_decoded_once_when_they_are_asked_for(tmp_path, kept):
    images, asked = on_demand(tmp_path / "c" if kept else "off")
    assert len(images) == 6 and not asked
    assert images[np.array([4, 1, 4])][:, 0, 0, 0].tolist() == [4, 1, 4]
    assert sorted(asked) == [1, 4]
    assert images[1].shape == (3, 4, 4) and images[np.array([1, 5])].shape == (2, 3, 4, 4)
    assert sorted(asked) == [1, 4, 5]


def test_a_later_run_reads_what_was_saved_alone(tmp_path):
    images, _ = on_demand(tmp_path)
    images[np.array([0, 2])]
    images.save()
    images[np.array([3])]  # and the run is killed
    again, asked = on_demand(tmp_path)
    assert again[np.arange(6)][:, 0, 0, 0].tolist() == list(range(6)) and sorted(asked) == [
        1, 3, 4, 5]
    again.save()
    third, asked = on_demand(tmp_path)
    assert third[np.arange(6)].shape[0] == 6 and not asked
    assert not list(tmp_path.glob(".*.part"))


def test_an_array_that_was_removed_is_not_taken_for_decoded(tmp_path):
    images, _ = on_demand(tmp_path)
    images[np.arange(6)]
    images.save()
    (array,) = [p for p in tmp_path.glob("*.npy") if "ready" not in p.name]
    array.unlink()
    again, asked = on_demand(tmp_path)
    assert again[np.array([5])][0, 0, 0, 0] == 5 and asked == [5]
    again.save()
    third, _ = on_demand(tmp_path)
    assert third[np.arange(6)][:, 0, 0, 0].tolist() == list(range(6))


def test_what_two_runs_decode_at_once_is_kept_of_both(tmp_path):
    (one, _), (two, _) = on_demand(tmp_path), on_demand(tmp_path)
    one[np.array([0])]
    two[np.array([5])]
    one.save()
    two.save()
    third, asked = on_demand(tmp_path)
    assert third[np.array([0, 5])][:, 0, 0, 0].tolist() == [0, 5] and not asked


def test_an_array_that_another_run_replaced_is_not_taken_for_decoded(tmp_path, monkeypatch):
    """Both found none; one has decoded already when the other's takes its place."""
    claim, inner = cache._claimed, []

    def slow(*given):
        monkeypatch.setattr(cache, "_claimed", claim)
        claim(*given)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            inner.append(on_demand(tmp_path)[0])
        inner[0][np.array([0, 1])]
        inner[0].save()
    monkeypatch.setattr(cache, "_claimed", slow)
    outer, _ = on_demand(tmp_path)
    inner[0][np.array([2])]
    inner[0].save()
    outer[np.array([5])]
    outer.save()
    third, asked = on_demand(tmp_path)
    assert third[np.arange(6)][:, 0, 0, 0].tolist() == list(range(6))
    assert sorted(asked) == [0, 1, 2, 3, 4]


def test_a_failure_to_read_blanks_nothing_that_another_process_has_read(tmp_path):
    lost = {1}
    ours, _ = on_demand(tmp_path, lost=lost)
    theirs, _ = on_demand(tmp_path)
    theirs[np.array([1, 2])]
    ours[np.array([1, 3])]
    assert ours.lost.tolist() == [False, True, False, False, False, False]
    assert theirs[np.array([1, 2])][:, 0, 0, 0].tolist() == [1, 2]
    lost.clear()  # the disk is back
    assert ours[np.array([1])][0, 0, 0, 0] == 1 and not ours.lost.any()


def test_a_note_that_cannot_be_written_ends_no_run_and_tells_of_no_later_images(
        tmp_path, monkeypatch, capsys):
    images, _ = on_demand(tmp_path)
    images[np.array([0])]

    class Array(np.memmap):
        def flush(self):
            monkeypatch.undo()
            images.ready[5] = True  # by the thread that fetches the next batch
    monkeypatch.setattr(images, "array", images.array.view(Array))
    images.save()
    again, _ = on_demand(tmp_path)
    assert again.ready.tolist() == [True] + [False] * 5
    images.unsaved = True
    images.note = tmp_path / "none" / "note.npy"
    images.save()
    assert "later runs will decode again" in capsys.readouterr().err


def test_ranks_of_a_node_share_its_memory(monkeypatch):
    monkeypatch.setattr(cache, "_free_memory", lambda: 400)  # one takes 288
    assert on_demand("off")[0].array is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert on_demand("off")[0].array is None


def test_items_that_cannot_be_read_are_named_once_and_marked(tmp_path, capsys):
    images, _ = on_demand(tmp_path, lost={2})
    for _ in range(3):
        assert images[np.array([1, 2])][1].max() == 0
    assert images.lost.tolist() == [False, False, True, False, False, False]
    assert capsys.readouterr().err.count("2.jpg: cannot be decoded") == 1
    images.save()
    later, asked = on_demand(tmp_path)  # it was replaced
    assert later[2].max() == 2 and asked == [2] and not later.lost.any()


def streamed(tmp_path, monkeypatch):
    """What fits nowhere; `told` lists who decoded which item."""
    monkeypatch.setattr(cache, "_free_memory", lambda: 100)
    told = tmp_path / "told"

    def decode(i):
        with open(told, "a") as file:
            file.write(f"{os.getpid()} {i}\n")
        if i == 2:
            raise BadInput("2.jpg: cannot be decoded")
        if i == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((3, 4, 4), i, np.uint8)
    return cache.OnDemand(6, decode, (3, 4, 4), np.uint8, "ab" * 32, "off", 2), told


def test_what_does_not_fit_is_decoded_each_time_by_processes(tmp_path, monkeypatch, capsys):
    images, told = streamed(tmp_path, monkeypatch)
    assert "do not fit" in capsys.readouterr().out
    for _ in range(2):
        assert images[np.array([3, 0, 3])][:, 0, 0, 0].tolist() == [3, 0, 3]
    assert images[5].shape == (3, 4, 4)
    who, which = zip(*(line.split() for line in told.read_text().splitlines()))
    assert sorted(which) == ["0", "0", "3", "3", "3", "3", "5"]
    assert str(os.getpid()) not in who and 1 <= len(set(who)) <= 2
    images.save()


def test_what_processes_cannot_read_is_named_once_and_marked(tmp_path, monkeypatch, capsys):
    images, _ = streamed(tmp_path, monkeypatch)
    for _ in range(2):
        assert images[np.array([1, 2, 3])][:, 0, 0, 0].tolist() == [1, 0, 3]
    assert images.lost.tolist() == [False, False, True, False, False, False]
    assert capsys.readouterr().err.count("2.jpg: cannot be decoded") == 1


def test_processes_outlive_a_signal_to_all_of_a_run(tmp_path, monkeypatch):
    """Which ends its step and saves."""
    images, told = streamed(tmp_path, monkeypatch)
    for process in images.decoders.processes:
        status = Path(f"/proc/{process.pid}/status")
        until = time.time() + 60
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1],
                      16) >> signal.SIGTERM - 1 & 1:  # it is starting
            assert time.time() < until
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert images[np.array([3, 5])][:, 0, 0, 0].tolist() == [3, 5]
    assert len({line.split()[0] for line in told.read_text().splitlines()}) <= 2


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_processes_that_cannot_be_started_end_the_run_in_one_line(monkeypatch, number):
    """Nor do those stay that could."""
    fork, forked = os.fork, []

    def scarce():
        if len(forked) == 2:
            raise OSError(number, os.strerror(number))
        forked.append(fork())
        return forked[-1]
    monkeypatch.setattr(os, "fork", scarce)
    with pytest.raises(RunFailed, match=r"cannot be started .*--num_workers"):
        cache.Decoders(int, 4)
    until = time.time() + 60
    while any(process.pid in forked for process in multiprocessing.active_children()):
        assert time.time() < until
        time.sleep(0.01)


def test_memory_that_another_set_will_take_is_not_free(monkeypatch):
    monkeypatch.setattr(cache, "_free_memory", lambda: 400)  # one takes 288
    monkeypatch.setattr(cache, "_in_memory", weakref.WeakSet())
    first, _ = on_demand("off")
    assert first.array is not None and on_demand("off")[0].array is None
    first[np.arange(6)]  # its pages are taken: what is free is free
    assert on_demand("off")[0].array is not None


def test_a_process_that_is_killed_ends_the_run_in_one_line(tmp_path, monkeypatch):
    images, _ = streamed(tmp_path, monkeypatch)
    with pytest.raises(RunFailed, match=r"killed, for memory perhaps.*--num_workers"):
        images[np.array([3, 4])]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_data_leave_a_photograph_out(tmp_path):
    """Or are read over; other errors would end a run."""
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x011A: 72.0, 0x0131: "camera", 0x9003: "2026"})
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    data, path, refused = bytearray(file.getvalue()), tmp_path / "a.jpg", 0
    began = data.index(b"Exif")
    for place in range(began + 6, began + 6 + len(exif.tobytes())):
        for value in (0, 1, 3, 7, 255):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1:])
            try:
                read_photo(path)
            except BadInput as error:
                assert str(path) in str(error)
                refused += 1
    assert refused


def test_photographs_are_read_upright_and_in_colour(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:10, :10] = 255, 0, 0
    image, turned = Image.fromarray(pixels), Image.Exif()
    turned[274] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    seen = np.asarray(read_photo(tmp_path / "turned.png"))
    assert seen.shape == (60, 40, 3) and seen[5, -5].tolist() == [255, 0, 0]
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.asarray(read_photo(tmp_path / "cmyk.jpg"))[4, 4, 0] > 200
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(read_photo(tmp_path / "deep.png")).max() == round(40_000 / 257)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_photo(tmp_path / "clear.png")).min() == 255
    Image.new("RGB", (640, 480), "red").save(tmp_path / "large.jpg")
    assert read_photo(tmp_path / "large.jpg", 100).size == (160, 120)
    (tmp_path / "half.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:700])
    with pytest.raises(BadInput, match=r"half\.jpg"):
        read_photo(tmp_path / "half.jpg")
