"""FER against the usual way: images per second in training, RAN's views, the start of large sets.

  python benchmarks/fer.py                                       # about 10 minutes, two CPU cores
  python benchmarks/fer.py --parts train --size 64 --images 128 --repeats 1              # a look

The usual way is own code in the textbook manner: two loader workers open each photograph, augment
it with torchvision's transforms of PIL images and make a tensor; the network is contiguous float32.
RAN's usual way calls the backbone for one view after another, as the published code does. The model
alone is forward, loss, backward and optimizer of the same network on random input that lies in
memory. The data are rendered faces in RAF-DB's layout. Rounds take the ways in turn; printed are
medians of the rates, and of the ratios within a round. Wanted: twice the usual way, three times
with --amp, .90 of the model alone; RAN 1.5 times the published loop; the first step of 280,000
images within 30 seconds.
"""
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision import transforms

import render
import train_FER
from benchmarks import measuring
from images import photos, regions
from models.ran import RAN, create_network
from training import devices, epochs, faces

PARTS = ("train", "ran", "start")
N_LABEL = 7


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--size", type=util.number(int, 32), default=112, help="side, pixels")
    parser.add_argument("--images", type=util.positive_int, default=512, help="of an epoch")
    parser.add_argument("--batch_size", type=util.number(int, 2), default=64, help="images a step")
    parser.add_argument("--views_batch", type=util.number(int, 2), default=16,
                        help="images a step of RAN, with 8 views each")
    parser.add_argument("--grow", nargs="+", type=util.positive_int,
                        default=[1_000, 10_000, 100_000, 280_000], metavar="N",
                        help="images of the sets that are started")
    parser.add_argument("--repeats", type=util.positive_int, default=3, help="rounds")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as of train_FER.py")
    parser.add_argument("--work", metavar="DIR", help="folder for the data, which a later run uses "
                        "again [a temporary one]")
    return parser.parse_args(argv)


# ---------------------------------------------------------------- the usual way

class TextbookSet(torch.utils.data.Dataset):
    """A photograph per item, opened and augmented when it is asked for."""

    def __init__(self, paths, labels, size):
        self.paths, self.labels = paths, labels
        self.transform = transforms.Compose([
            transforms.Resize((size, size)), transforms.RandomHorizontalFlip(),
            transforms.RandomAffine(photos.DEGREES, (photos.MOVED, photos.MOVED),
                                    (1 - photos.LARGER, 1 + photos.LARGER)),
            transforms.ColorJitter(photos.COLOUR, photos.COLOUR, photos.COLOUR),
            transforms.ToTensor(), transforms.Normalize(photos.MEAN, photos.STD),
            transforms.RandomErasing(0.5, (0.02, 0.2))])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB")), int(self.labels[i])


def usual_epoch(network, optimizer, loader, device):
    devices.keep_memory(False)
    network.train()
    for images, label in loader:
        loss = F.cross_entropy(network(images.to(device)), label.to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    devices.keep_memory(device.type == "cpu")


def published_views(network, views):
    """RAN's published forward pass: the backbone on one view after another."""
    features = torch.stack([network.features(views[:, k]).flatten(1)
                            for k in range(views.shape[1])], 1)
    return network.fc(network.attend(features)[0])


def usual_views(network, optimizer, views, label, steps):
    devices.keep_memory(False)
    for _ in range(steps):
        loss = F.cross_entropy(published_views(network, views), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    devices.keep_memory(views.device.type == "cpu")


# ---------------------------------------------------------------- this code

def set_job(opt, folder, work, *flags):
    """(options of train_FER.py, its faces.Job on the training split)"""
    run = train_FER.parse_option([str(flag) for flag in (
        "--dataset", "rafdb", "--data_folder", folder, "--save_path", os.devnull, "--size",
        opt.size, "--pretrained", "none", "--cache", work / "cache", "--ema_decay", 0, *flags)])
    source = train_FER.set_loader(run)["train"]
    network = train_FER.set_model(run, N_LABEL, opt.device)
    job = faces.Job(network, network, None, source, source.faces.labels.copy(),
                    np.arange(opt.images), train_FER.set_optimizer(run, network),
                    devices.mixed_precision(False, opt.device), None, [])
    return run, job


def our_epoch(run, job):
    faces.train_epoch(run, job, 1, {}, lambda inside: None)


def alone_epoch(job, images, label, steps):
    for _ in range(steps):
        with job.precision.autocast():
            said = job.run(images)
        logits = said[0] if isinstance(said, tuple) else said
        F.cross_entropy(logits.float(), label, label_smoothing=0.1).backward()
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)


# ---------------------------------------------------------------- parts

def told(title, rates, usual="usual way"):
    """Prints rates, and the ratios to the usual way and the model alone within a round."""
    print(title)
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[usual]))
        alone = rates.get(f"model alone, {name.rpartition(', ')[2]}")
        share = f"  {statistics.median(a / b for a, b in zip(values, alone)):.2f} of the model " \
                f"alone" if alone and not name.startswith("model") else ""
        print(f"  {name:24s}{statistics.median(values):9.1f} images/s  {ratio:.2f}x{share}",
              flush=True)


def train(opt, folder, work):
    run, job = set_job(opt, folder, work, "--batch_size", opt.batch_size)
    images = job.source.faces
    loader = torch.utils.data.DataLoader(
        TextbookSet([images.folder / path for path in images.paths[:opt.images]], images.labels,
                    opt.size), opt.batch_size, shuffle=True, num_workers=2)
    usual = create_network("baseline", N_LABEL).to(opt.device)
    descent = torch.optim.AdamW(usual.parameters(), run.learning_rate, weight_decay=1e-4)
    known = (torch.randn(opt.batch_size, 3, opt.size, opt.size, device=opt.device)
             .to(memory_format=torch.channels_last),
             torch.arange(opt.batch_size, device=opt.device) % N_LABEL)
    steps = epochs.per_epoch(opt.images, opt.batch_size)
    amp = job._replace(precision=devices.mixed_precision(True, opt.device))
    told(f"training, ResNet-18, {opt.images} images at {opt.size} pixels, batch {opt.batch_size}",
         measuring.warm_rounds(opt.repeats, opt.images, opt.device, {
             "usual way": partial(usual_epoch, usual, descent, loader, opt.device),
             "here, float32": partial(our_epoch, run, job),
             "here, --amp": partial(our_epoch, run, amp),
             "model alone, float32": partial(alone_epoch, job, *known, steps),
             "model alone, --amp": partial(alone_epoch, amp, *known, steps)}))


def ran(opt, folder, work):
    count = opt.views_batch * max(1, opt.images // 8 // opt.views_batch)
    run, job = set_job(opt, folder, work, "--model", "ran", "--batch_size", opt.views_batch)
    job, k = job._replace(members=np.arange(count)), regions.N_VIEWS["fixed"]
    usual = RAN(N_LABEL).to(opt.device)
    descent = torch.optim.AdamW(usual.parameters(), run.learning_rate, weight_decay=1e-4)
    views = torch.randn(opt.views_batch, k, 3, opt.size, opt.size, device=opt.device)
    label = torch.arange(opt.views_batch, device=opt.device) % N_LABEL
    steps = count // opt.views_batch
    amp = job._replace(precision=devices.mixed_precision(True, opt.device))
    ways = {"published loop": partial(usual_views, usual, descent, views, label, steps),
            "here, float32": partial(our_epoch, run, job),
            "here, --amp": partial(our_epoch, run, amp),
            "model alone, float32": partial(alone_epoch, job, views, label, steps),
            "model alone, --amp": partial(alone_epoch, amp, views, label, steps)}
    told(f"RAN, {k} views, {count} images at {opt.size} pixels, batch {opt.views_batch}; the "
         f"published loop without loading",
         measuring.warm_rounds(opt.repeats, count, opt.device, ways), "published loop")


def start(opt, _, work):
    print(f"from the command to the first step, {opt.size} pixels, images that are not read before "
          f"they are asked for")
    for count in opt.grow:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            measuring.make_tree(Path(folder) / "set", count, N_LABEL)
            argv = ["--dataset", "folder", "--data_folder", f"{folder}/set", "--save_path",
                    f"{folder}/r", "--pretrained", "none", "--size", str(opt.size), "--cache",
                    f"{folder}/cache", "--device", str(opt.device)]
            seconds, peak = measuring.first_step("train_FER", argv)
        print(f"  {count:9,d} images  {seconds:6.1f} s  peak {peak / 2 ** 20:,.0f} MiB", flush=True)


def main(argv=None):
    opt = parse_option(argv)
    with measuring.workplace(opt) as work:
        folder = work / "faces"
        if set(opt.parts) & {"train", "ran"}:
            measuring.quietly(render.main, "faces", "--data_folder", folder, "--train", opt.images,
                              "--test", 14 * N_LABEL, "--subjects", 40)
        for part, report in zip(PARTS, (train, ran, start)):
            if part in opt.parts:
                report(opt, folder, work)


if __name__ == "__main__":
    main()
