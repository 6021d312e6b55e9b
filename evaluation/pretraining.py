"""A masked autoencoder pre-trained on any folder of images: its run, and pictures of what it
predicts."""
import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from evaluation import photographs, pictures
from images import cache, crops, decoding, faces, photos
from models import masking
from training import checkpoint, devices, distributed, epochs, masked, masked_options, record
from util import ArgumentParser, number

SHOWN = 12  # images in reconstructions.png
BICUBIC = Image.Resampling.BICUBIC
LOW = 0.2  # least area of the random resized crop


# ---------------------------------------------------------------- options

def add_options(parser: ArgumentParser, names: tuple[str, ...], usual: str,
                default: masked_options.Defaults, mask_ratio: float, norm_pix_loss: bool,
                decoder_depth: int, cell: int) -> None:
    """Adds all flags of a script that pre-trains; names: its models; usual: the one by default;
    cell: pixels of a patch."""
    masked_options.add_data_options(
        parser, "folder of images, however deep they lie; its train/, where there is one", None,
        cell)
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=names, default=usual, metavar="NAME",
                       help="encoder: " + ", ".join(names))
    model.add_argument("--decoder_depth", type=number(int, 1), default=decoder_depth,
                       help="blocks of the decoder")
    model.add_argument("--decoder_embed_dim", type=number(int, 16), default=512,
                       help="width of the decoder, a multiple of 16")
    method = parser.add_argument_group("method")
    method.add_argument("--mask_ratio", type=number(float, 0.05, 0.95), default=mask_ratio,
                        help="share of the patches that is hidden")
    masked_options.add_switch(method, "--norm_pix_loss", default=norm_pix_loss,
                              help="predict the pixels of a patch normalised by their own mean and "
                                   "deviation")
    masked_options.add_opposite(method, "--no_norm_pix_loss", "norm_pix_loss",
                                help="predict them as they are")
    masked_options.add_optimisation_options(parser, default)
    masked_options.add_running_options(parser, "on with a GPU")
    masked_options.add_output_options(parser, default)


def parse_option(parser: ArgumentParser, default: masked_options.Defaults, cell: int,
                 argv: list[str]) -> argparse.Namespace:
    """Options of a script with the flags of `add_options`; cell: pixels of a patch."""
    opt = parser.parse_args(argv)
    masked_options.settle(parser, opt, default)
    if opt.decoder_embed_dim % 16:
        parser.error("argument --decoder_embed_dim: a multiple of 16")
    cells = (opt.size // cell) ** 2
    if not masking.count_kept(cells, opt.mask_ratio):
        parser.error(f"argument --mask_ratio: {opt.mask_ratio:g} of {cells} patches leaves none to "
                     f"be seen; give a larger --input_size")
    return opt


# ---------------------------------------------------------------- the run

def load_images(opt: argparse.Namespace) -> tuple[faces.FaceSet, cache.OnDemand]:
    """The images of --data_path, decoded when they are first asked for; raises BadInput."""
    images = faces.read_unlabelled(opt.data_folder)
    photographs.check_apart(opt, images.folder, images.paths)
    return images, photographs.stored(images, decoding.stored_side(opt.size), opt, BICUBIC)


def pretrain(opt: argparse.Namespace, argv: list[str], script: str, create: Callable) -> None:
    """One run of a script; create(opt): its autoencoder. Raises BadInput, RunFailed."""
    device = devices.local_device(opt.device)
    if opt.amp is None:
        opt.amp = device.type == "cuda"
    with distributed.group(device):
        run = record.Run(opt.save_path, "", opt)
        resume = run.find_resume()
        images, stored = load_images(opt)
        torch.manual_seed(opt.seed)
        network = create(opt).to(device, memory_format=torch.channels_last)
        precision = devices.mixed_precision(opt.amp, device)
        job = masked.Job(network, distributed.wrap(network, device, precision.autocast), stored,
                         crops.Recipe(opt.size, LOW), masked.set_optimizer(opt, network), precision)
        Pretraining(run, job, images).run_epochs(argv, script, resume)


class Pretraining:
    """The epochs of one run over `images`, its checkpoints and its pictures."""

    def __init__(self, run: record.Run, job: masked.Job, images: faces.FaceSet):
        self.run, self.job, self.images = run, job, images
        self.digest = hashlib.sha256(f"{images.digest()} {faces.content(images)}".encode()
                                     ).hexdigest()
        self.log, self.seen = None, None

    def run_epochs(self, argv: list[str], script: str, resume: Path | None) -> None:
        """Trains what is left to do."""
        opt, job, run = self.run.opt, self.job, self.run
        done, within = 0, {}
        if resume:
            old = run.restore(resume, {"model": job.network, "optimizer": job.optimizer,
                                       "scaler": job.precision.scaler}, data_digest=self.digest)
            done, within = old["epoch"], old["within"]
            self.seen = (old.get("seen_images") or {}).get("any")
            job.images.lost[old["lost"].numpy()] = True
        steps = epochs.announce(opt, len(self.images), "images")
        distributed.agree(self.digest, done, within.get("step"))
        self.log = run.log(record.header(script, opt, argv, data_digest=self.digest),
                           (lambda line: line["epoch"] <= done) if resume else None,
                           writes=distributed.first())
        epochs.Loop(opt, self.log, steps=steps, together=True).run(
            lambda *epoch: masked.train_epoch(opt, job, *epoch), self._save, done, within)
        if distributed.first():
            if done >= opt.epochs:
                self._draw(opt.epochs)
            pictures.draw_curves(run.folder)
        run.print_places(checkpoint=f"checkpoint-{opt.epochs - 1}.pth", log="log.jsonl",
                         curves="curves.png", pictures="reconstructions.png")

    def _save(self, epoch, within):
        opt, job = self.run.opt, self.job
        job.images.save()
        lost = distributed.any_of(job.images.lost)
        if self.seen is None:  # once: a little of every image is read
            prints = faces.fingerprints(self.images) if distributed.first() else np.zeros(0)
            self.seen = torch.from_numpy(prints)
            distributed.barrier()
        if not distributed.first():
            return
        state = {"system": "MAE pre-training", "opt": vars(opt), "epoch": epoch, "within": within,
                 "ranks": distributed.size(),
                 "data_digest": self.digest, "seen_images": {"any": self.seen},
                 "lost": torch.from_numpy(np.flatnonzero(lost)),
                 "model": job.network.state_dict(), "optimizer": job.optimizer.state_dict(),
                 "scaler": job.precision.scaler.state_dict()}
        checkpoint.save_counted(self.run.last(), state, opt)
        if not within and checkpoint.due(opt, epoch):
            self._draw(epoch)

    def _draw(self, epoch):
        """reconstructions.png of images spread over the folder, and the same for TensorBoard."""
        readable = np.flatnonzero(~self.job.images.lost)
        chosen = np.unique(np.linspace(0, len(readable) - 1, SHOWN).round().astype(int))
        batch = torch.from_numpy(np.asarray(self.job.images[readable[chosen]]))
        device = next(self.job.network.parameters()).device
        inputs = self.job.recipe.eval(batch.to(device))
        rows = reconstructions(self.job.network, inputs, self.run.opt.mask_ratio)
        draw(self.run.folder / "reconstructions.png", rows,
             [Path(self.images.paths[i]).name for i in readable[chosen]],
             f"after {epoch} epochs" + "; rendered stand-in data" * self.images.rendered)
        grid = np.concatenate([np.concatenate(list(row), 2) for row in rows.values()], 1)
        self.log.image("reconstructions", grid.transpose(1, 2, 0), epoch)


# ---------------------------------------------------------------- pictures

@torch.no_grad()
def reconstructions(network: nn.Module, inputs: Tensor,
                    mask_ratio: float) -> dict[str, np.ndarray]:
    """Images, what of them the encoder sees, what is predicted, and both in one, each uint8
    `[N, 3, S, S]`, of normalised inputs `[N, 3, S, S]`; the mask follows from the number of
    images."""
    network.eval()
    rng = torch.Generator().manual_seed(0)
    cells = (inputs.shape[-1] // network.cell) ** 2
    noise = torch.rand(len(inputs), cells, generator=rng).to(inputs.device)
    _, said, mask = network(inputs, mask_ratio, noise)
    patches, hidden = masking.patchify(inputs, network.cell), mask[..., None].bool()
    said = said.float()
    if network.norm_pix_loss:  # only the true patch knows its own mean and deviation
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        said = said * (variance + 1e-6) ** 0.5 + mean
    return {"image": _pixels(patches, network.cell),
            "masked": _pixels(patches.masked_fill(hidden, 0), network.cell),
            "reconstruction": _pixels(said, network.cell),
            "both": _pixels(torch.where(hidden, said, patches), network.cell)}


def _pixels(patches, side):
    """Normalised patches `[N, L, P]` as images uint8 `[N, 3, S, S]`."""
    mean, std = (patches.new_tensor(value).view(3, 1, 1) for value in (photos.MEAN, photos.STD))
    images = masking.unpatchify(patches, side) * std + mean
    return (255 * images).clamp(0, 255).round().byte().cpu().numpy()


def draw(path: Path, rows: dict[str, np.ndarray], names: list[str], title: str) -> None:
    """The rows of `reconstructions` below one another, with the names of the images."""
    pictures.draw_rows(path, [
        (caption, images, names if caption == "image" else [""] * len(names))
        for caption, images in rows.items()], title)
