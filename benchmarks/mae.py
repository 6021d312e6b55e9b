"""MAE-SFER against the usual way: steps of both autoencoders, loading, start, memory.

  python benchmarks/mae.py                                        # about 15 minutes, two CPU cores
  python benchmarks/mae.py --quick                                # a look: small images, few steps

The usual way is own code in the textbook manner, contiguous float32, AdamW parameter by parameter.
ViT: two loader workers open and crop PIL images; every patch is embedded, then those that stay are
gathered; attention is a softmax between two products; the decoder computes all tokens, put back in
place. FCMAE: of images in memory every position is computed, and multiplied by the mask. What is
here runs as its scripts do, from stored images to the optimizer's step. Before anything is
timed, both ways have to give the same loss and gradients. Rounds take the ways in turn; printed are
medians of the rates, and of the ratios within a round. Wanted: ViT 1.15 times the usual way, twice
with --amp; FCMAE 1.6 and 2.2 times; stored images as fast as a step takes them in; the first step
of 280,000 files within 30 seconds.
"""
import contextlib
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import util  # first: it settles how threads wait before torch is imported
import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from torch.nn import functional as F
from torchvision import transforms

import main_pretrain
import main_pretrain_convnextv2
import render
from benchmarks import measuring
from evaluation import pretraining
from images import cache, crops, decoding, photos
from models import masking
from training import devices, epochs, masked

PARTS = ("vit", "fcmae", "loading", "start", "memory")
SCRIPTS = {"vit": main_pretrain, "fcmae": main_pretrain_convnextv2}
WANTED = {"vit": (1.15, 2.0), "fcmae": (1.6, 2.2)}  # times the usual way, float32 and --amp
WORKERS = 2  # of the usual way's loader
SECONDS = 30  # allowed for the first step of a large set
QUICK = {"size": 64, "images": 32, "steps": 1, "repeats": 1, "grow": [1000], "batch_size": 4,
         "memory_batch": 4, "memory_model": "mae_vit_tiny_patch16"}


def parse_option(argv):
    parser = util.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="all of it small, whose figures mean "
                        "nothing")
    parser.add_argument("--size", type=util.number(int, 32), default=224,
                        help="side, pixels, a multiple of 32")
    parser.add_argument("--batch_size", type=util.number(int, 2), default=16,
                        help="images a step of ViT; half of them of FCMAE")
    parser.add_argument("--steps", type=util.positive_int, default=3, help="of a round")
    parser.add_argument("--images", type=util.number(int, 2), default=512, help="to load")
    parser.add_argument("--grow", nargs="+", type=util.positive_int, default=[10_000, 280_000],
                        metavar="N", help="images of the sets that are started")
    parser.add_argument("--repeats", type=util.positive_int, default=3, help="rounds")
    parser.add_argument("--device", default="auto", metavar="NAME", help="as of main_pretrain.py")
    parser.add_argument("--work", metavar="DIR", help="folder for the data, which a later run uses "
                        "again [a temporary one]")
    opt = parser.parse_args(argv)
    opt.memory_batch, opt.memory_model = 32, "mae_vit_base_patch16"
    if opt.quick:
        vars(opt).update(QUICK)
    if opt.size % 32:
        parser.error("argument --size: a multiple of 32")
    return opt


# ---------------------------------------------------------------- the usual way

def usual_loss(network, images, said, mask):
    targets = masking.pixel_targets(masking.patchify(images, network.cell), network.norm_pix_loss)
    return ((said - targets).square().mean(-1) * mask).sum() / mask.sum()


def usual_vit(network, images, noise, mask_ratio):
    """The loss of a masked autoencoder on ViT, all tokens in their places."""
    tokens = network.patch_embed.proj(images).flatten(2).transpose(1, 2)
    tokens = tokens + network.pos_embed[:, 1:]
    n, length, width = tokens.shape
    order = noise.argsort(1)
    back, kept = order.argsort(1), order[:, :int(length * (1 - mask_ratio))]
    mask = torch.ones(n, length, device=images.device).scatter(1, kept, 0)
    tokens = tokens.gather(1, kept[..., None].expand(-1, -1, width))
    first = (network.cls_token + network.pos_embed[:, :1]).expand(n, -1, -1)
    tokens = torch.cat([first, tokens], 1)
    for block in network.blocks:
        tokens = block(tokens)
    tokens = network.decoder_embed(network.norm(tokens))
    hidden = network.mask_token.repeat(n, length - kept.shape[1], 1)
    whole = torch.cat([tokens[:, 1:], hidden], 1)
    whole = whole.gather(1, back[..., None].expand(-1, -1, whole.shape[-1]))
    tokens = torch.cat([tokens[:, :1], whole], 1) + network.decoder_pos_embed
    for block in network.decoder_blocks:
        tokens = block(tokens)
    said = network.decoder_pred(network.decoder_norm(tokens))[:, 1:]
    return usual_loss(network, images, said, mask)


def usual_norm(layer, maps):
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def usual_block(block, x, seen):
    """A block of ConvNeXt V2 on maps `[N, D, H, W]`; seen: `[N, 1, H, W]`, 0 where hidden."""
    y = usual_norm(block.norm, block.dwconv(x * seen) * seen).permute(0, 2, 3, 1)
    y = F.gelu(block.pwconv1(y))
    response = (y * seen.permute(0, 2, 3, 1)).norm(dim=(1, 2), keepdim=True)
    response = response / (response.mean(-1, keepdim=True) + 1e-6)
    y = block.pwconv2(block.grn.gamma * (y * response) + block.grn.beta + y)
    return (x + y.permute(0, 3, 1, 2)) * seen


def usual_fcmae(network, images, noise, mask_ratio):
    """The loss of an FCMAE that computes every position."""
    mask = masking.draw_order(noise, mask_ratio)[2]
    cells = 1 - mask.view(len(images), 1, images.shape[2] // network.cell, -1)
    x, encoder = images, network.encoder
    for i, (down, stage) in enumerate(zip(encoder.downsample_layers, encoder.stages)):
        seen = cells.repeat_interleave(8 >> i, 2).repeat_interleave(8 >> i, 3)
        x = usual_norm(down[1], down[0](x)) if i == 0 else down[1](usual_norm(down[0], x))
        x = x * seen
        for block in stage:
            x = usual_block(block, x, seen)
    x = network.proj(x) * seen + network.mask_token * (1 - seen)
    for block in network.decoder:
        x = usual_block(block, x, torch.ones_like(seen))
    said = network.pred(x).flatten(2).transpose(1, 2)
    return usual_loss(network, images, said, mask)


USUAL = {"vit": usual_vit, "fcmae": usual_fcmae}


def usual_network(network):
    """The same weights, contiguous, in timm's own blocks with attention written out."""
    usual = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for blocks in (getattr(usual, name, ()) for name in ("blocks", "decoder_blocks")):
        for i, block in enumerate(blocks):
            blocks[i] = Block(block.attn.attn_dim, block.attn.num_heads, qkv_bias=True,
                              norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
            blocks[i].load_state_dict(block.state_dict())
            blocks[i].attn.fused_attn = False
    return usual.to(next(network.parameters()).device)


def usual_descent(network, run):
    return torch.optim.AdamW(network.parameters(), run.learning_rate, betas=(0.9, 0.95),
                             weight_decay=run.weight_decay, foreach=False, fused=False)


def usual_steps(loss_of, network, optimizer, batches, steps, mask_ratio):
    device = next(network.parameters()).device
    devices.keep_memory(False)
    network.train()
    for images in itertools.islice(batches, steps):
        images = images.to(device)
        noise = torch.rand(len(images), (images.shape[-1] // network.cell) ** 2, device=device)
        loss = loss_of(network, images, noise, mask_ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    devices.keep_memory(device.type == "cpu")


class TextbookSet(torch.utils.data.Dataset):
    """A photograph per item, opened and cropped when it is asked for."""

    def __init__(self, paths, size):
        self.paths = paths
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(size, (pretraining.LOW, 1), interpolation=transforms.
                                         InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(photos.MEAN, photos.STD)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def usual_loader(folder, opt):
    """Batches of the images below a folder, by two processes that load the next ones meanwhile."""
    return torch.utils.data.DataLoader(
        TextbookSet(sorted(folder.iterdir()), opt.size), opt.batch_size, shuffle=True,
        drop_last=True, num_workers=WORKERS)


def endless(loader):
    while True:
        yield from loader


# ---------------------------------------------------------------- this code

def stand_in(count, size):
    """Stored images that lie in memory."""
    side = decoding.stored_side(size)
    images = cache.OnDemand(count, None, (3, side, side), np.uint8, "")
    images.array[:] = np.random.default_rng(0).integers(0, 256, images.array.shape, np.uint8)
    images.ready[:] = True
    return images


def set_job(opt, part, count, *flags):
    """(options of a script, its masked.Job on images that lie in memory)"""
    run = SCRIPTS[part].parse_option([str(flag) for flag in (
        "--data_path", os.devnull, "--output_dir", os.devnull, "--input_size", opt.size, *flags)])
    torch.manual_seed(0)
    network = SCRIPTS[part].set_model(run).to(opt.device, memory_format=torch.channels_last)
    return run, masked.Job(network, network, stand_in(count, opt.size),
                           crops.Recipe(opt.size, pretraining.LOW),
                           masked.set_optimizer(run, network),
                           devices.mixed_precision(False, opt.device))


def our_epoch(run, job):
    masked.train_epoch(run, job, 1, {}, lambda inside: None)


def check_same(part, network, images, mask_ratio):
    """Both ways give the same loss and gradients, of weights none of which is 0."""
    network, cells = copy.deepcopy(network), (images.shape[-1] // network.cell) ** 2
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight) * (weight.std() if weight.any() else 1)
    noise = torch.rand(len(images), cells, device=images.device)
    usual = usual_network(network)
    losses = [USUAL[part](usual, images, noise, mask_ratio),
              network.train()(images, mask_ratio, noise)[0]]
    sum(losses).backward()
    off = abs(float(losses[1].detach() / losses[0].detach()) - 1)
    others = dict(usual.named_parameters())
    pairs = [(name, own.grad, others[name].grad)
             for name, own in network.named_parameters() if own.requires_grad]
    worst, name = max((float((own - other).norm() / other.norm()), name)
                      for name, own, other in pairs)
    assert off < 1e-5, f"the losses differ by a share of {off:.1e}"
    assert worst < 1e-4, f"the gradients of {name} differ by a share of {worst:.1e}"
    print(f"the same loss within {off:.0e}, gradients within {worst:.0e}", flush=True)


def ways_of(opt, part, batch, batches, *flags):
    """(way → an epoch, images of an epoch); batches: what the usual way takes, None: the same one
    again and again."""
    count = batch * opt.steps
    run, job = set_job(opt, part, count, "--batch_size", batch, *flags)
    images = torch.randn(batch, 3, opt.size, opt.size, device=opt.device)
    usual = usual_network(job.network)
    descent = usual_descent(usual, run)
    check_same(part, job.network, images, run.mask_ratio)
    amp = job._replace(precision=devices.mixed_precision(True, opt.device))
    return {"usual way": partial(usual_steps, USUAL[part], usual, descent,
                                 batches or itertools.repeat(images), opt.steps, run.mask_ratio),
            "here, float32": partial(our_epoch, run, job),
            "here, --amp": partial(our_epoch, run, amp)}, count


# ---------------------------------------------------------------- parts

def verdict(holds):
    return "reached" if holds else "NOT REACHED"


def rendered(opt, work):
    """The folder of the rendered images to load."""
    folder = work / f"faces_{opt.images}_{opt.size}"
    measuring.quietly(render.main, "faces", "--data_folder", folder, "--train", opt.images,
                      "--test", 14, "--subjects", 40, "--size", opt.size)
    return folder / "Image" / "aligned"


def step(part, opt, work):
    batch, name, batches = opt.batch_size, "mae_vit_tiny_patch16", None
    if part == "vit":
        batches = endless(usual_loader(rendered(opt, work), opt))
    else:
        batch, name = max(2, batch // 2), "convnextv2_atto"
    print(f"training, {name} at {opt.size} pixels, batch {batch}, {opt.steps} steps a round")
    ways, count = ways_of(opt, part, batch, batches, "--model", name)
    rates = measuring.warm_rounds(opt.repeats, count, opt.device, ways)
    for way, wanted in zip(rates, (None, *WANTED[part])):
        ratio = statistics.median(a / b for a, b in zip(rates[way], rates["usual way"]))
        print(f"  {way:16s}{statistics.median(rates[way]):9.2f} images/s  {ratio:.2f}x" + (
            f"  wanted {wanted}x: {verdict(ratio >= wanted)}" if wanted else ""), flush=True)


def our_loading(stored, recipe, batch, device):
    parts = np.array_split(np.arange(len(stored)), -(-len(stored) // batch))
    for number, images in enumerate(cache.fetch(stored, parts, device)):
        recipe.train(images, recipe.draw(len(images), epochs.generator(0, number)))


def usual_loading(loader, device):
    for images in loader:
        images.to(device)


def loading(opt, work):
    folder, batch = rendered(opt, work), opt.batch_size
    run = main_pretrain.parse_option([
        "--data_path", str(folder), "--output_dir", os.devnull,
        "--input_size", str(opt.size), "--cache", str(work / "cache")])
    with contextlib.redirect_stdout(None):
        (images, stored), (_, anew) = (pretraining.load_images(run) for _ in range(2))
        model, count = ways_of(opt, "vit", batch, None, "--model", "mae_vit_tiny_patch16")
    anew.array, anew.decoders = None, cache.Decoders(anew.decode, WORKERS)  # as where none fits
    recipe = crops.Recipe(opt.size, pretraining.LOW)
    ways = {"stored": partial(our_loading, stored, recipe, batch, opt.device),
            "decoded each time": partial(our_loading, anew, recipe, batch, opt.device),
            f"usual way, {WORKERS} workers": partial(usual_loading, usual_loader(folder, opt),
                                                      opt.device)}
    del model["usual way"]
    rates = measuring.warm_rounds(opt.repeats, len(images), opt.device, ways)
    for way, values in measuring.warm_rounds(opt.repeats, count, opt.device, model).items():
        rates[f"taken in {way}"] = values
    print(f"loading {len(images)} rendered faces of {opt.size} pixels, cropped in batches; what "
          f"ViT's step takes in")
    middle = {way: statistics.median(values) for way, values in rates.items()}
    for way, rate in middle.items():
        print(f"  {way:24s}{rate:9.1f} images/s")
    enough = middle["stored"] >= max(middle[f"taken in {way}"] for way in model)
    print(f"  wanted, stored as fast as taken in: {verdict(enough)}", flush=True)


def start(opt, work):
    print(f"from the command to the first step, {opt.size} pixels, batch 8")
    for count in opt.grow:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            # 19 of 20 lie in its train/, which is all that is read
            measuring.make_tree(Path(folder) / "set", -(-count * 20 // 19), 7)
            seconds, peak = measuring.first_step("main_pretrain", [
                "--data_path", f"{folder}/set", "--output_dir", f"{folder}/r", "--model",
                "mae_vit_tiny_patch16", "--batch_size", "8", "--input_size", str(opt.size),
                "--cache", "off", "--device", str(opt.device)])
        print(f"  {count:9,d} files  {seconds:6.1f} s  peak {peak / 2 ** 20:,.0f} MiB  wanted "
              f"{SECONDS} s at most: {verdict(seconds <= SECONDS)}", flush=True)


def step_memory(opt, way):
    """(peak bytes, seconds) of the second step: AdamW's means are there from the first one on."""
    device = devices.pick_device(str(opt.device))  # as the script does, in this process too
    run, job = set_job(opt, "vit", opt.memory_batch, "--model", opt.memory_model, "--batch_size",
                       opt.memory_batch)
    if way == "usual way":
        network = usual_network(job.network)
        del job
        images = torch.randn(opt.memory_batch, 3, opt.size, opt.size, device=device)
        epoch = partial(usual_steps, usual_vit, network, usual_descent(network, run),
                        itertools.repeat(images), 1, run.mask_ratio)
    else:
        precision = devices.mixed_precision(way == "here, --amp", device)
        epoch = partial(our_epoch, run, job._replace(precision=precision))
    epoch()
    began = time.perf_counter()
    epoch()
    # of this program alone, where the peak that getrusage knows is also that of its parent
    return measuring.memory(device)[1], time.perf_counter() - began


def memory(opt, _):
    print(f"peak memory of a process that trains {opt.memory_model} at {opt.size} pixels, batch "
          f"{opt.memory_batch}")
    usual = None
    for way in ("usual way", "here, float32", "here, --amp"):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak, seconds = pool.submit(step_memory, opt, way).result()
        usual = usual or peak
        print(f"  {way:16s}{peak / 2 ** 30:6.2f} GiB  {peak / usual:.2f} of the usual way  "
              f"{seconds:6.1f} s a step", flush=True)


REPORTS = dict(zip(PARTS, (partial(step, "vit"), partial(step, "fcmae"), loading, start, memory)))


def main(argv=None):
    opt = parse_option(argv)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, of both ways
    with measuring.workplace(opt) as work:
        for part in opt.parts:
            REPORTS[part](opt, work)


if __name__ == "__main__":
    main()
