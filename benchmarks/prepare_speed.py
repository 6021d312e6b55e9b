"""Clips per second of the data preparation at 1280x720 frames, without face detection.

    python benchmarks/prepare_speed.py

Draws a raw tree of noise that moves (JPEG frames, 16-bit PNG depth), cuts it once in this process
and once with --num_workers, and prints the clips per second of both and their ratio. The time
covers everything but starting Python: planning, decoding, registration, images, lists, pictures.
About a minute on two CPU cores; two cores should reach 10 clips per second.
"""
import argparse
import importlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH, HEIGHT = 1280, 720


def write_tree(root, clips):
    """Colour and depth frames of `clips` clips, and the annotation; returns its path."""
    rng = np.random.default_rng(0)
    base = zoom(gaussian_filter(rng.standard_normal((200, 340)), 2), 4, order=1)
    base = (128 + 25 * base / base.std()).clip(0, 255)
    fine = gaussian_filter(rng.standard_normal(base.shape), 0.7)
    base = base + 6 * fine / fine.std()
    rows = ["Subject,Filename,Onset,Apex,Offset,AU,Objective class,emotion"]
    for i in range(clips):
        subject, video = f"spNO.{1 + i // 13}", "abcdefghijklm"[i % 13]
        emotion = ("anger", "happy", "surprise", "others")[i % 4]
        rows.append(f"{subject},{video},10,16,25,12,I,{emotion}")
        for n, (dx, dy) in ((10, (0, 0)), (16, rng.integers(0, 4, 2))):
            part = base[40 + dy:40 + dy + HEIGHT, 40 + dx:40 + dx + WIDTH]
            rgb = np.stack([part, 0.9 * part, 0.8 * part], -1).clip(0, 255).astype(np.uint8)
            depth = (700 + part / 8 + rng.integers(0, 3, part.shape)).astype(np.uint16)
            for name, pixels in ((f"color/{n}.jpg", rgb), (f"depth/{n}.png", depth)):
                path = root / "part_A" / subject / video / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root / "labels.csv"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=120, help="number of clips [120]")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(),
                        help="processes [one per core]")
    opt = parser.parse_args()
    prepare = importlib.import_module("prepare")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        labels, rates, busy = write_tree(root, opt.clips), [], []
        for workers in (0, opt.num_workers):
            start, used = time.perf_counter(), sum(os.times()[:4])
            prepare.main(["casme3", "--raw", root, "--annotation", labels, "--num_workers", workers,
                          "--data_folder", root / f"set_{workers}",
                          "--crop", "box", 440, 160, 400, 400])
            rates.append(opt.clips / (time.perf_counter() - start))
            busy.append(1000 * (sum(os.times()[:4]) - used) / opt.clips)
    print(f"{opt.clips} clips of {WIDTH}x{HEIGHT}: {rates[0]:.1f} clips/s in one process, "
          f"{rates[1]:.1f} with {opt.num_workers} ({rates[1] / rates[0]:.2f} times); "
          f"CPU time {busy[0]:.0f} and {busy[1]:.0f} ms a clip")


if __name__ == "__main__":
    main()
