"""A network fitted to labelled face images: what it is trained and chosen on, its epochs, its
checkpoints, and its results on the test split."""
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import measures, photographs
from images.faces import FaceSet, content, fingerprints
from training import checkpoint, devices, distributed, epochs, faces, losses, record, schedules
from training.record import Run
from util import BadInput, sha256_of

if TYPE_CHECKING:  # see training/faces.py
    from timm.data import Mixup
    from timm.utils import ModelEmaV3


class Validation:
    """Figures of validation images after every epoch, and the best epoch's weights where they
    choose (`select`): the highest UF1, the earliest where several are equal."""

    def __init__(self, source: faces.Source, members: np.ndarray, select: bool):
        self.source, self.members, self.select = source, members, select
        self.state = {"value": -1.0, "epoch": 0, "model": {}}
        self.confusion = None

    @property
    def images(self) -> FaceSet:
        """The validation images alone."""
        return self.source.faces.subset(self.members)

    def figures(self, network: nn.Module, autocast: Callable) -> dict:
        """{val_uf1, val_accuracy} of a network; nothing without validation images."""
        if not len(self.members):
            return {}
        kept, said, *_ = faces.predict(network, self.source, self.members, autocast, False)
        figures = measures.evaluate(self.source.faces.labels[kept], said.argmax(1),
                                    self.source.faces.n_label)
        self.confusion = np.array(figures["confusion"])
        return {"val_uf1": figures["uf1"], "val_accuracy": figures["accuracy"]}

    def follow(self, network: nn.Module, epoch: int, autocast: Callable) -> dict:
        """`figures` of the network after an epoch, which may be the best one."""
        figures = self.figures(network, autocast)
        if self.select and figures["val_uf1"] > self.state["value"] + 1e-12:
            self.state = {"value": figures["val_uf1"], "epoch": epoch, "model": {
                name: part.cpu().clone() for name, part in network.state_dict().items()}}
        return figures


class Fit:
    """One run over the `sources` of a set's splits: train, test, and val where it has its own.

    --noise moves labels of the training split, those of what is held out of it too: who validates
    knows no better than who trains, unless the set has a validation split of its own. What is held
    out follows from the labels as they were, so that it is the same under any noise. Raises
    BadInput for a run folder that exists.
    """

    def __init__(self, run: Run, sources: dict[str, faces.Source], system: str = "FER"):
        opt, source = run.opt, sources["train"]
        self.system = system
        self.run, self.sources, self.resume = run, sources, run.find_resume()
        self.faces: FaceSet = source.faces
        self.labels = photographs.noisy_labels(self.faces.labels, opt.noise, self.faces.n_label,
                                               opt.seed)
        noisy = source._replace(faces=dataclasses.replace(self.faces, labels=self.labels))
        self.members, out = np.arange(len(self.faces)), np.arange(0)
        if "val" not in sources:
            self.members, out = photographs.hold_out(self.faces, opt.val_fraction, opt.seed)
        elif opt.val_fraction:
            noisy, out = sources["val"], np.arange(len(sources["val"].faces))
        self.chooses = opt.select == "val" or opt.wloss_update > 0
        if self.chooses and not len(out):
            flag = "--select val" if opt.select == "val" else "--wloss_update"
            raise BadInput(f"{flag} takes validation images: give a --val_fraction above "
                           + (f"{opt.val_fraction:g}, which is none of so few images of each class"
                              if opt.val_fraction else "0"))
        self.validation = Validation(noisy, out, opt.select == "val")
        print(f"{len(self.members)} training images, {len(out)} to validate, "
              f"{len(sources['test'].faces)} to test")
        digest = hashlib.sha256()
        for part in sources.values():
            digest.update(f"{part.faces.digest()} {content(part.faces)} ".encode())
            if part.landmarks is not None:
                digest.update(part.landmarks.tobytes())
        self.digest, self.history = digest.hexdigest(), []
        # what the network that it starts from saw, what it itself saw besides, and whether that
        # was of the test split
        self.before = photographs.SeenImages(photographs.NOTHING, photographs.NOTHING)
        self.seen: photographs.SeenImages | None = None
        self.transductive: bool | None = False
        self.started: dict = {}  # file and digest of the network that it started from
        self.shared: dict[str, int] = {}  # images of other splits that are trained on as well

    def start_from(self, flag: str, path: str, state: object) -> None:
        """Notes what a checkpoint, that anybody wrote, says of the images that its network saw:
        `transductive` is None where that is not known. Raises BadInput where it was fitted to the
        labels of images which now are to choose."""
        self.before = photographs.SeenImages.of(state)
        self.transductive = None
        self.started = {"checkpoint": str(path), "sha256": sha256_of(path)}
        if self.before.any is None and not len(self.before.labelled):
            self._check_earlier(flag, path, state)
            return

        def count(prints, among):
            """How many of the images are known from there, and not from an equal one of these."""
            known = np.isin(prints, among)
            if known.any():  # else one's own, many and not yet read, tell nothing
                known &= ~np.isin(prints, self.own_fingerprints)
            return int(known.sum())
        if self.chooses and (known := count(fingerprints(self.validation.images),
                                            self.before.labelled)):
            raise BadInput(f"{flag} {path}: was trained on {known} of the "
                           f"{len(self.validation.members)} images that now are to choose; give "
                           f"the --seed and --val_fraction it was trained with")
        test = self.sources["test"].faces
        prints = fingerprints(test)
        labelled = count(prints, self.before.labelled)
        known = labelled or (self.before.any is not None and count(prints, self.before.any))
        if known:
            print(f"{flag} {path}: was trained on {known} of the {len(test)} test images"
                  + ", without labels" * (not labelled))
        # an image in a table is not known from one in a file
        alike = self.before.any is not None and (
            self.before.any % 2 == (test.pixels is not None)).all()
        self.transductive = True if known else False if alike else None

    @functools.cached_property
    def own_fingerprints(self) -> np.ndarray:
        """Of the images that are trained on (images.faces): a little of each is read, once."""
        return fingerprints(self.faces.subset(self.members))

    def _count_shared(self):
        """Says how many images of other splits lie among those that are trained on, too."""
        for name, images in (("validation", self.validation.images),
                             ("test", self.sources["test"].faces)):
            if known := int(np.isin(fingerprints(images), self.own_fingerprints).sum()):
                self.shared[name] = known
                print(f"{known} of the {len(images)} {name} images are among those that are "
                      f"trained on, too")
        if "test" in self.shared:
            self.transductive = True

    def _check_earlier(self, flag, path, state):
        """`start_from` a checkpoint of an earlier release, which said how the set was divided."""
        old = state.get("opt") if isinstance(state, dict) else None
        if not isinstance(old, dict) or state.get("data_digest") != self.digest:
            return
        other = [name for name in ("seed", "val_fraction", "noise")
                 if name in old and old[name] != getattr(self.run.opt, name)]
        if self.chooses and other:
            raise BadInput(f"{flag} {path}: was trained with --{other[0]} {old[other[0]]}, hence "
                           f"on images that now are to choose; give the same")
        self.transductive = state.get("transductive")

    def check_classes(self, state: dict, path: str) -> None:
        """Raises BadInput unless the checkpoint that a run goes on from tells the same classes."""
        if state["classes"] != list(self.faces.classes):
            raise BadInput(f"--model_path {path}: its classes are {', '.join(state['classes'])}, "
                           f"those here {', '.join(self.faces.classes)}; --pretrained {path} "
                           f"takes the network without its last layer")

    def begin(self, network: nn.Module, optimizer: torch.optim.Optimizer,
              distance: Tensor | None = None, mixup: "Mixup | None" = None,
              average: "ModelEmaV3 | None" = None) -> None:
        """Sets what is trained: a network on its device, the distances of --wloss_alpha, and how
        images are mixed. average: of the weights, evaluated beside the network; without one, that
        of --ema_decay predicts in its place."""
        opt, device = self.run.opt, next(network.parameters()).device
        precision = devices.mixed_precision(opt.amp, device)
        if not hasattr(opt, "accum_iter"):  # it is announced with its own check
            # a ResNet's last maps are of one position then, and batch norm sees an image once
            single = opt.size <= 32 and not opt.freeze_backbone \
                and (opt.model != "ran" or opt.bn_per_view)
            epochs.check_slices(len(self.members), opt.batch_size, network, device, "images",
                                single)
        self.beside, ema = average is not None, average
        if average is None and opt.ema_decay:
            from timm.utils import ModelEmaV3  # a wrong path should not wait for it
            ema = ModelEmaV3(network, opt.ema_decay, use_warmup=True)
        self.job = faces.Job(network, distributed.wrap(network, device, precision.autocast), ema,
                             self.sources["train"], self.labels.copy(), self.members, optimizer,
                             precision, distance, [], mixup)

    @property
    def network(self) -> nn.Module:
        """The network that predicts: the average of its weights, where one stands in its place."""
        job = self.job
        return job.network if job.ema is None or self.beside else job.ema.module

    # ------------------------------------------------------------ epochs

    def run_epochs(self, argv: list[str], script: str) -> dict:
        """Trains what is left to do; returns the log's header."""
        opt = self.run.opt
        done, within = self._restore()
        steps = epochs.announce(opt, len(self.members), "images")
        if self.job.ema is not None and not self.beside:
            total = opt.epochs * steps
            print(f"--ema_decay {opt.ema_decay:g}: the average's decay rises to "
                  f"{self.job.ema.get_decay(total):.4g} in {total} steps")
        distributed.agree(self.digest, done, within.get("step"))
        header = record.header(script, opt, argv, data_digest=self.digest)
        log = self.run.log(header, (lambda line: line["epoch"] <= done) if self.resume else None,
                           writes=distributed.first())
        epochs.Loop(opt, log, steps=steps, together=True).run(
            self._epoch, self._save, done, within)
        return header

    def read_only(self, argv: list[str], script: str) -> dict:
        """Restores the checkpoint of --resume and trains nothing; returns the log's header."""
        epoch, _ = self._restore(trains=False)
        if self.run.opt.select == "val" and not self.validation.state["model"]:
            raise BadInput(f"--resume {self.resume}: no epoch was finished of which --select val "
                           f"could choose the best; go on with the run first")
        if self.run.opt.select == "val":
            best = self.validation.state["epoch"]
            print(f"--select val: predicted by the weights of epoch {best}, the best of the "
                  f"{epoch} until this checkpoint")
        header = record.header(script, self.run.opt, argv, data_digest=self.digest)
        self.run.log(header, lambda line: True, writes=distributed.first())
        return header

    def _restore(self, trains=True):
        job, opt = self.job, self.run.opt
        if not self.resume:
            return 0, {}
        states = {"model": job.network, "optimizer": job.optimizer, "scaler": job.precision.scaler}
        old = self.run.restore(self.resume, states | ({"ema": job.ema} if job.ema else {}),
                               data_digest=self.digest)
        if trains and "shared" not in old and "val" not in self.sources and opt.val_fraction and (
                opt.noise or (opt.val_fraction < 0.05 and any(self.faces.subjects))):
            raise BadInput(f"{self.resume}: an earlier release held out other images with --noise, "
                           f"or with so small a --val_fraction; train again, under another --tag")
        job.labels[:] = old["labels"].numpy()
        job.relabelled[:] = map(tuple, old["relabelled"])
        if job.distance is not None:
            job.distance.copy_(old["distance"])
        self.validation.state, self.history = old["best"], old["history"]
        # what tells it may be gone by now
        self.transductive, self.started = old.get("transductive"), old.get("started") or {}
        self.shared = old.get("shared") or {}
        self.before = photographs.SeenImages.of(old)
        if isinstance(old.get("seen_images"), dict):  # these images among them
            self.seen = self.before
        lost = old["lost"]  # a checkpoint of an earlier release names those of training alone
        for name, places in (lost if isinstance(lost, dict) else {"train": lost}).items():
            self.sources[name].images.lost[places.numpy()] = True
        return old["epoch"], old["within"]

    def _epoch(self, epoch, within, on_step):
        opt, job = self.run.opt, self.job
        means = faces.train_epoch(opt, job, epoch, within, on_step)
        means["learning_rate"] = schedules.rate_now(job.optimizer)
        if self.beside and opt.model_ema_eval:
            means |= {f"ema_{name}": value for name, value in self.validation.figures(
                job.ema.module, job.precision.autocast).items()}
        means |= self.validation.follow(self.network, epoch, job.precision.autocast)
        if opt.wloss_update and epoch % opt.wloss_update == 0:
            job.distance.copy_(losses.updated(job.distance, self.validation.confusion,
                                              opt.wloss_norm))
            distributed.broadcast(job.distance)  # statistics of batch norm are each rank's own
        if opt.oracle_curve:
            kept, said, *_ = self._predicted(self.network)
            guesses = np.zeros(len(self.sources["test"].faces), int)
            guesses[kept] = said.argmax(1)
            self.history.append([epoch, guesses.tolist()])
        return means

    def _save(self, epoch, within):
        job = self.job
        job.source.images.save()
        lost = {name: torch.from_numpy(np.flatnonzero(distributed.any_of(part.images.lost)))
                for name, part in self.sources.items()}
        if self.seen is None:
            self.seen = self.before
            if distributed.first():
                self.seen = self.before.joined(self.own_fingerprints)
                self._count_shared()
            distributed.barrier()
        if distributed.first():
            state = {
                "system": self.system, "opt": vars(self.run.opt), "epoch": epoch,
                "within": within, "beside": self.beside, "ranks": distributed.size(),
                "transductive": self.transductive, "seen_images": self.seen.content(),
                "classes": list(self.faces.classes), "data_digest": self.digest,
                "crop": photographs.cut_as(self.faces),
                "model": job.network.state_dict(), "ema": job.ema and job.ema.state_dict(),
                "optimizer": job.optimizer.state_dict(),
                "scaler": job.precision.scaler.state_dict(),
                "labels": torch.from_numpy(job.labels.copy()), "relabelled": job.relabelled,
                "lost": lost, "started": self.started, "shared": self.shared,
                "points": 0 if job.source.landmarks is None else job.source.landmarks.shape[1],
                "distance": job.distance, "best": self.validation.state, "history": self.history}
            if hasattr(self.run.opt, "save_ckpt_freq"):
                checkpoint.save_counted(self.run.last(), state, self.run.opt)
            else:
                checkpoint.save(self.run.last(), state)

    # ------------------------------------------------------------ results

    def _predicted(self, network):
        test, opt = self.sources["test"], self.run.opt
        return faces.predict(network, test, np.arange(len(test.faces)),
                             self.job.precision.autocast, opt.tta_flip)

    def _lacking(self):
        """What results say of images without landmarks, and of those that could not be read."""
        named = {"left_out": lambda part: np.flatnonzero(part.images.lost)}
        if any(part.landmarks is not None for part in self.sources.values()):
            named["without_landmarks"] = lambda part: part.without_landmarks()
        return {what: {name: [part.faces.paths[i] for i in places(part)]
                       for name, part in self.sources.items()} for what, places in named.items()}

    def evaluate(self, header: dict) -> dict | None:
        """Predicts the test split and writes the results; None but on the rank that writes."""
        opt, job, run, test = self.run.opt, self.job, self.run, self.sources["test"]
        details = {"transductive": self.transductive, **self.started}
        if self.shared:
            details["in_training"] = self.shared
        for part in self.sources.values():
            part.images.lost[:] = distributed.any_of(part.images.lost)
        if not distributed.first():
            distributed.barrier()
            return None
        network = self.network
        if opt.select == "val":
            network.load_state_dict(self.validation.state["model"])
            details["choice"] = {"epochs": self.validation.state["epoch"],
                                 "val_uf1": self.validation.state["value"]}
        predicted = self._predicted(network)
        details |= self._lacking()
        files = {"checkpoint": "last.pth", "results": "results.json",
                 "predictions": "predictions.csv", "confusion": "confusion.png",
                 "mistakes": "mistakes.png", "curves": "curves.png", "log": "log.jsonl"}
        if getattr(opt, "eval", False):
            del files["checkpoint"]
        if opt.relabel_epoch:
            details["relabelling"] = photographs.relabelling(self.labels, job)
            photographs.write_relabelled(run.folder / "relabelled.csv", self.faces, job.relabelled)
            files["relabelled"] = "relabelled.csv"
        if self.beside and opt.model_ema_eval:
            kept, said, *_ = self._predicted(job.ema.module)
            figures = measures.evaluate(test.faces.labels[kept], said.argmax(1), self.faces.n_label)
            details["average"] = {name: figures[name] for name in measures.MEASURES}
        if predicted.features is not None:
            photographs.draw_features(run.folder / "features.png", test.faces, predicted)
            files["features"] = "features.png"
        importance = predicted.importance
        if importance is not None and importance.shape[1] > 1:
            details["view_importance"] = importance.mean(0).tolist()
        followed = [epoch for epoch, _ in self.history] == list(range(1, opt.epochs + 1))
        if opt.oracle_curve and not followed:
            print("--oracle_curve: not all epochs were followed; there is none")
        results = photographs.write_results(
            run, header, test, network, predicted,
            [guesses for _, guesses in self.history] if followed else [], details)
        if importance is not None and importance.shape[1] == 1:
            trained = faces.predict(network, job.source, self.members, job.precision.autocast,
                                    False)
            photographs.draw_importance(run.folder / "importance.png", job.source, trained.kept,
                                        self.labels, trained.importance[:, 0])
            files["importance"] = "importance.png"
        for part in self.sources.values():
            part.images.save()
        print(photographs.describe(results))
        run.print_places(**files)
        distributed.barrier()
        return results
