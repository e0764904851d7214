"""The training loop, under accelerate: the same on one CPU process and on many GPUs and hosts.

One optimiser step consumes `batch_size` consecutive positions of the shards' global order. Everything random in it is a function of the
seed and of positions, so a run that is killed and started again with the same command goes on as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor

from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.stage import Stage
from t2i_experts.conditioning.frozen import fingerprint
from t2i_experts.config import DecoupleConfig, RunConfig, to_plain, to_yaml
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.experts.projections import add_projections
from t2i_experts.shards.reader import ShardReader, Unreadable
from t2i_experts.shards.stream import StreamReader, open_batches
from t2i_experts.training.checkpoints import (
    Validation,
    best_checkpoint,
    lock_run,
    prepare_roll_back,
    record_roll_back,
    refuse_changed_config,
)
from t2i_experts.training.data import loader_workers, open_training_shards
from t2i_experts.training.divergence import LossWatch, TrainingDiverged
from t2i_experts.training.ema import build_ema
from t2i_experts.training.embeddings import open_conditioner, stored_embeddings
from t2i_experts.training.initial import at_rank, check_initial, open_parent, read_initial
from t2i_experts.training.optim import build_optimizer, learning_rate
from t2i_experts.training.posthoc import drop_later_snapshots, write_snapshots
from t2i_experts.training.power_ema import PowerFunctionEMA
from t2i_experts.training.preview import draw_preview, preview_denoiser, refuse_partial_preview
from t2i_experts.training.processes import agreed_checkpoint, open_processes
from t2i_experts.training.state import TrainState
from t2i_experts.training.step import add_gradients, apply_gradients, avoid_cudnn_attention
from t2i_experts.training.stopping import StopRequest
from t2i_experts.training.task import Batch, DiffusionTask
from t2i_experts.training.trackers import open_trackers, refuse_missing_trackers
from t2i_experts.training.tracking import RunLog, machine, peak_memory_gib
from t2i_experts.training.trainable import Trainable, build_trainable, networks_of, save_trained
from t2i_experts.training.uncertainty import LearnedWeighting
from t2i_experts.training.unreadable import UnreadableSamples
from t2i_experts.training.validation import ValidationLoss, validate
from t2i_experts.types import Denoiser


class Trainer:
    """One run: a stage, its shards and its output folder."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        """Builds everything and goes back to the newest checkpoint in the output folder, if there is one, or else to the initial weights.

        Raises ValueError for a config that does not fit the shards, the encoders, the processes or the existing checkpoint, and for an
        output folder in which another run is at work.
        """
        training = config.training
        refuse_missing_trackers(training.trackers)
        self.config = config
        self.root = Path(config.output)
        self.accelerator = open_processes(training)
        self.device = self.accelerator.device
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        newest = agreed_checkpoint(self.root)
        told_once: list[str] = []
        if newest is not None:
            refuse_changed_config(newest, config)
            if self.accelerator.is_main_process:
                told_once = check_initial(config, newest)

        told, first = progress and self.accelerator.is_main_process, bool(config.stage.buckets)
        with self.accelerator.main_process_first() if first else contextlib.nullcontext():  # it keeps the pictures' sizes for the others
            self.reader = open_training_shards(config, processes=self.world_size, progress=told)
        size, held_out = config.stage.size, config.data.validation
        self.validation = ShardReader([held_out], size=size, seed=0, embeddings=stored_embeddings(config)) if held_out else None
        codec = load_codec(config.stage, device=self.device)
        conditioner = open_conditioner(
            config, self.reader.embeddings, self.validation, device=self.device, main_process=self.accelerator.is_main_process
        )
        encoders = {name: conditioner.fingerprint(name) for name in conditioner.names}
        weights = None if codec.model is None else fingerprint(codec.model)
        initial = None
        if newest is None:
            initial = read_initial(config)
            refuse_partial_preview(config)
        self.parent = open_parent(config, newest, encoders, weights, self.device) if training.decouple.consistency else None
        self.task = DiffusionTask(
            config.stage, conditioner, seed=training.seed, device=self.device, bf16=training.precision == "bf16", codec=codec,
            decouple=training.decouple, parent=self.parent,
        )  # fmt: skip

        if self.accelerator.is_main_process:
            self._lock = lock_run(self.root)  # not before: a mistake in the config leaves no folder behind
        self.resumed_from = agreed_checkpoint(self.root)
        torch.manual_seed(training.seed)
        avoid_cudnn_attention()
        network = build_trainable(config)
        if initial is not None:
            network.load_state_dict({**network.state_dict(), **initial.weights})
        at_rank(network, training)  # on a network that goes on from a checkpoint, too: this has the weights that it began with
        if training.decouple.projections:
            add_projections(network, "branch")
        self.network: Trainable = network.to(self.device)
        self.ema = build_ema(self.network, training.ema)
        self.optimizer = build_optimizer(self.network, training.optimizer)
        self.weighting = LearnedWeighting(training.optimizer, self.device) if training.uncertainty_weighting else None
        dataset = self.reader.dataset_hash
        self.state = TrainState(
            self.network, self.ema, self.optimizer, 0, dataset, encoders, to_plain(config), self.weighting, codec=weights
        )
        if initial is not None:
            self.state.initial = initial.facts
            told_once = initial.unlike(config.stage, encoders, weights)
            del initial  # its weights are mapped into memory
        if self.resumed_from is not None:
            self.state.restore(self.resumed_from)
        if training.compile:
            shapes, networks = config.stage.buckets, networks_of(self.network)
            if shapes:  # one compilation for each, since kernels for any shape are slower; beyond the limit it would stop compiling
                dynamo = torch._dynamo.config
                dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * (len(networks) + (self.parent is not None)) * len(shapes))
            for one in networks:
                compile_denoiser(one, training=True, dynamic=False if shapes else None)
            if self.parent is not None:
                compile_denoiser(self.parent, training=False, dynamic=False if shapes else None)
        self.model: torch.nn.Module = self.accelerator.prepare_model(self.network)
        self.log = RunLog(
            self.root / "log.jsonl",
            images_seen=self.state.images_seen,
            total_images=training.images,
            writes=self.accelerator.is_main_process,
            progress=progress,
            trackers=open_trackers(config, self.state.images_seen) if self.accelerator.is_main_process else None,
        )
        self.unreadable = UnreadableSamples(
            self.accelerator, self.log, images_seen=self.state.images_seen, max_share=config.data.max_unreadable
        )
        self._told_once = told_once
        self._recent: list[tuple[list[str], Tensor, Tensor]] = []  # keys, losses and gradient norm of each step since the last look
        self._waited = 0.0  # seconds of waiting for data and for the other processes since then
        self._watch = LossWatch(training.divergence_factor, self.state.watch)
        self.stopped_by: signal.Signals | None = None

    def run(self) -> Path:
        """Trains to the end and returns the model folder, or less far: for `max_minutes`, or until SIGTERM or SIGINT (see `stopped_by`).

        Raises TrainingDiverged if the loss diverges and no roll-back is left.
        """
        training = self.config.training
        if self.accelerator.is_main_process:
            (self.root / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            drop_later_snapshots(self.root, self.state.images_seen)
            if self.resumed_from is not None:
                # a kill may have come between the checkpoint and its model folder
                self._save_models(best=self.resumed_from == best_checkpoint(self.root))
        self.log.event(
            "start", self.state.images_seen, processes=self.world_size, **machine(self.device), **self.sizes(), **self._bucket_samples()
        )
        if self.resumed_from is None and self.state.initial is not None:
            self.log.event("initial", self.state.images_seen, **{name: self.state.initial[name] for name in ("model", "fingerprint")})
        for text in self._told_once:
            self.log.warn(text)
        if isinstance(self.reader, StreamReader):
            self.log.warn(self.reader.guarantee)
        with contextlib.closing(self.log), StopRequest(training.max_minutes) as stop:
            finished = False
            while not finished:
                try:
                    self._train(stop)
                    finished = True
                except TrainingDiverged as error:
                    self._roll_back(error)
            self.stopped_by = stop.signal
        return self.root / "model"

    def _train(self, stop: StopRequest) -> None:
        """Steps from where the run stands to its end, or until it is told to stop."""
        training = self.config.training
        with contextlib.closing(self._batches(stop.give_up)) as batches:
            window, self._waited = time.monotonic(), 0.0
            stopping = False
            while self.state.images_seen < training.images and not stopping:
                before = self.state.images_seen
                made = self._step(batches, stop)
                stopping = stop.stopping or not made
                if self._due(before, training.log_every_images) or (stopping and self._recent):
                    self._report(window)
                    window, self._waited = time.monotonic(), 0.0
                window += self._tend(before, last=stopping)

    def _roll_back(self, error: TrainingDiverged) -> None:
        """Goes back to the newest checkpoint, and on with half the learning rate; raises `error` if that is not to be done (again)."""
        rollbacks = self.state.rollbacks + 1
        if rollbacks > self.config.training.rollbacks:
            raise error
        if self.accelerator.is_main_process:
            prepare_roll_back(self.root)
        self.accelerator.wait_for_everyone()
        newest = agreed_checkpoint(self.root)
        if newest is None:
            raise error
        diverged_at = self.state.images_seen
        self.state.restore(newest)
        self.state.rollbacks = rollbacks
        if self.accelerator.is_main_process:
            record_roll_back(newest, rollbacks)
            drop_later_snapshots(self.root, self.state.images_seen)
        self._recent.clear()
        self._watch = LossWatch(self.config.training.divergence_factor, self.state.watch)
        self.unreadable.rewind(self.state.images_seen)
        self.log.rewind(self.state.images_seen)
        reason = str(error).partition(". ")[0]
        self.log.event("rollback", self.state.images_seen, diverged_at=diverged_at, reason=reason, rate_scale=self.state.rate_scale)

    def sizes(self) -> dict[str, int]:
        """Parameters of the network (at low rank also those that are trained), and samples of the shards; of shards behind URLs, tars."""
        data = {"tars": len(self.reader.tars)} if isinstance(self.reader, StreamReader) else {"samples": self.reader.samples}
        sizes = {"parameters": sum(p.numel() for p in self.network.parameters()), **data}
        if self.config.training.rank:
            sizes["trained_parameters"] = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return sizes

    def _bucket_samples(self) -> dict[str, dict[str, int]]:
        """Samples of each bucket, for the log; nothing without buckets."""
        counts = self.reader.bucket_samples() if isinstance(self.reader, ShardReader) else {}
        return {"buckets": counts} if counts else {}

    def _batches(self, give_up: Callable[[], bool] | None = None) -> Generator[Batch, None, None]:
        """This process's micro-batches from where the run stands, without end unless it is to `give_up` while it waits for a worker's."""
        training = self.config.training
        return open_batches(
            self.reader,
            self.task.collate(),
            start=self.state.images_seen,
            stop=None,
            batch_size=training.batch_size,
            accumulation=training.accumulation,
            rank=self.rank,
            world_size=self.world_size,
            workers=loader_workers(self.config, self.reader, processes=self.world_size),
            give_up=give_up,
        )

    def _step(self, batches: Iterator[Batch], stop: StopRequest) -> bool:
        """One optimiser step, on the next micro-batches as they come. Returns whether it was made; if not, all is as it was before."""
        training = self.config.training
        keys: list[str] = []
        losses: list[Tensor] = []
        unreadable: list[Unreadable] = []
        for micro in range(training.accumulation):
            last = micro == training.accumulation - 1
            # together where DDP waits for the others: in the last backward pass and, once, in a step's first forward pass (its buckets)
            batch = self._next(batches, stop, together=micro == 0 or last)
            if batch is None:
                self.network.zero_grad(set_to_none=True)
                if self.weighting:
                    self.weighting.module.zero_grad(set_to_none=True)
                return False
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses.append(add_gradients(self.task, self.model, batch, training.accumulation, self.weighting))
            keys.extend(batch.keys)
            unreadable.extend(batch.unreadable)
        rate = self.state.rate_scale * learning_rate(training.optimizer, self.state.images_seen, training.images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = apply_gradients(self.network, self.optimizer, training.optimizer.clip_norm)
        if self.weighting:
            self.weighting.step(rate, lambda gradient: self.accelerator.reduce(gradient, "mean"))
        self.state.images_seen += training.batch_size
        self.ema.update(self.network, training.batch_size, self.state.images_seen)
        self.unreadable.note(unreadable, drawn=True)
        self._recent.append((keys, torch.cat(losses), norm))
        self.log.advance(training.batch_size)
        return True

    def _next(self, batches: Iterator[Batch], stop: StopRequest, *, together: bool) -> Batch | None:
        """The next micro-batch, or None if the run stops before this process or, if they are to go on together, any other has its own."""
        asked = time.monotonic()
        batch = next(batches, None)
        if batch is not None and together and not stop.all_ready():
            batch = None
        self._waited += time.monotonic() - asked
        return batch

    def _due(self, before: int, every: int) -> bool:
        """Whether the step from `before` to images_seen crossed a multiple of `every`, or was the last one."""
        seen = self.state.images_seen
        return bool(every) and (seen // every > before // every or seen >= self.config.training.images)

    def _tend(self, before: int, *, last: bool) -> float:
        """Validation, preview, snapshot and checkpoint, each when it is due; never on diverged weights. Returns the seconds it took."""
        training, started = self.config.training, time.monotonic()
        due = [
            self._due(before, training.validation.every_images) and self.validation is not None,
            self._due(before, training.preview.every_images) and bool(training.preview.prompts),
            self._due(before, training.ema.snapshot_every_images),
            self._due(before, training.checkpoint_every_images) or (last and not self._saved()),
        ]
        if not any(due):
            return 0.0
        self._refuse_divergence()
        validate, preview, snapshot, checkpoint = due
        loss = self._validate() if validate else None
        if preview:
            self._preview()
        if snapshot:
            self._snapshot()
        if checkpoint and (last or self.state.images_seen >= training.images or not self._watch.suspicious):
            self._checkpoint(loss)
        return time.monotonic() - started

    def _refuse_divergence(self) -> None:
        """Raises TrainingDiverged, on all processes, if a step since the last report has a gradient that is not finite.

        Gradients are shared before their norm is taken, so all processes see the same first bad step; the samples whose own loss is not
        finite are named, or the whole batch if there are none.
        """
        finite = [bool(fine) for fine in torch.stack([norm for _, _, norm in self._recent]).isfinite()] if self._recent else []
        if all(finite):
            return
        keys, losses, _ = self._recent[finite.index(False)]
        bad = [key for key, fine in zip(keys, losses.isfinite().tolist(), strict=True) if not fine]
        everyone: list[tuple[list[str], list[str]]] = gather_object([(keys, bad)])
        named = [key for _, names in everyone for key in names] or [key for names, _ in everyone for key in names]
        self.log.event("diverged", self.state.images_seen, keys=named)
        hint = "With training.rollbacks=N a run goes back to it by itself, N times at most, and on with half the learning rate."
        hint = "" if self.config.training.rollbacks else hint
        some = ", ".join(named[:16]) + (f" and {len(named) - 16} more, listed in {self.root / 'log.jsonl'}" if len(named) > 16 else "")
        raise TrainingDiverged(
            f"loss or gradient is not finite before {self.state.images_seen} images, first in the batch with {some}. The same command "
            f"would come to the same: lower training.optimizer.learning_rate or take these samples out. "
            f"The last good checkpoint is {agreed_checkpoint(self.root) or 'none'}. {hint}"
        )

    def _report(self, window: float) -> None:
        """A line in the log and the loss beside the progress bar, over the steps since `window` on the monotonic clock."""
        self.unreadable.tell(self.state.images_seen)
        self._refuse_divergence()
        means = torch.stack([torch.stack((losses.mean(), norm)) for _, losses, norm in self._recent]).mean(dim=0)
        loss, norm = (self.accelerator.reduce(means, "mean")).tolist()
        seconds, images = time.monotonic() - window, self.config.training.batch_size * len(self._recent)
        self._recent.clear()
        self.log.advance(0, loss)
        self.log.event(
            "train",
            self.state.images_seen,
            loss=loss,
            grad_norm=norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            images_per_second=round(images / seconds, 2),
            data_wait=round(self._waited / seconds, 4),
            peak_memory_gib=peak_memory_gib(self.device),
            unreadable_draws=self.unreadable.drawn,
        )
        try:
            self._watch.see(loss)
        except TrainingDiverged:
            self.log.event("diverged", self.state.images_seen, keys=[])
            raise

    def _validate(self) -> float | None:
        """The loss on the validation shards, the same on all processes; None if there is none, because nothing could be read."""
        settings, training = self.config.training.validation, self.config.training
        assert self.validation is not None
        result = validate(
            self.ema.network,
            self.task,
            self.validation,
            images=settings.images,
            bins=settings.bins,
            batch_size=training.batch_size // (training.accumulation * self.world_size),
            rank=self.rank,
            world_size=self.world_size,
        )
        self.unreadable.note(result.unreadable, drawn=False)
        losses, read = (
            self.accelerator.reduce(part.float().to(self.device), "sum").cpu().double() for part in (result.losses, result.read)
        )
        everyone = ValidationLoss(losses, result.edges, read > 0)
        self.log.event("validation", self.state.images_seen, **everyone.summary())
        return everyone.mean if math.isfinite(everyone.mean) else None

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            try:
                denoiser = preview_denoiser(self.ema.network, self.config, self.device)
            except ValueError as error:  # the model around an expert was there when the run began
                self.log.warn(f"warning: no preview at {self.state.images_seen} images: {error}")
            else:
                self._draw_preview(denoiser)
        self.accelerator.wait_for_everyone()

    def _draw_preview(self, denoiser: Denoiser) -> None:
        stage = Stage(self.config.stage, denoiser, self.config.sampling, self.task.codec)
        path = self.root / "previews" / f"{self.state.images_seen:012d}.png"
        with self.task.autocast():
            draw_preview(stage, self.task.conditioner, self.config.training.preview, self.device, path)
        self.log.preview(self.state.images_seen, path)

    def _snapshot(self) -> None:
        """Before the checkpoint: a run that goes on from it finds all earlier snapshots there."""
        if self.accelerator.is_main_process:
            assert isinstance(self.ema, PowerFunctionEMA)
            write_snapshots(self.root, self.state.images_seen, self.ema)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self, validation_loss: float | None) -> None:
        """Saves the state and, beside the checkpoints, the EMA weights as a model folder that generates."""
        self.unreadable.tell(self.state.images_seen)  # what a checkpoint has passed is never drawn again, and must be in the log
        if self.accelerator.is_main_process:
            self.state.watch = self._watch.state
            validation = self._validation(validation_loss)
            _, best = self.state.save(self.root, self.config.training.keep_checkpoints, validation)
            self._save_models(best=best)
            self.log.report()
        self.accelerator.wait_for_everyone()

    def _saved(self) -> bool:
        """Whether there is a checkpoint of where the run stands, as when it stops before a step."""
        newest = agreed_checkpoint(self.root)
        return newest is not None and int(newest.name) == self.state.images_seen

    def _validation(self, loss: float | None) -> Validation | None:
        """A validation loss with what it was measured on."""
        if loss is None or self.validation is None:
            return None
        settings = self.config.training.validation
        return Validation(loss, f"{self.validation.dataset_hash}/{settings.images}/{settings.bins}")

    def _save_models(self, *, best: bool) -> None:
        """The EMA weights of the checkpoint in which the run stands as RUN/model, and as RUN/best if none was better in validation."""
        self._save_model("model")
        if best:
            self._save_model("best")

    def _save_model(self, name: str) -> None:
        """As an ordinary network, and if it was trained at low rank, with the difference from the weights that the run began with."""
        save_trained(
            self.root / name,
            self.config,
            self.ema.network.state_dict(),
            self.task.conditioner,
            codec=self.task.codec,
            initial=None if self.state.initial is None else self.state.initial["fingerprint"],
            provenance={
                "images_seen": self.state.images_seen,
                "dataset_hash": self.state.dataset_hash,
                "encoders": dict(self.state.encoders),
                "codec": self.state.codec,
                "initial": self.state.initial,
                "ema": to_plain(self.config.training.ema),
                **({"decouple": to_plain(decouple)} if (decouple := self.config.training.decouple) != DecoupleConfig() else {}),
            },
        )


def train(config: RunConfig, *, progress: bool = True) -> Path:
    """Trains `config`, or goes on with the run in its output folder. Returns the model folder."""
    trainer = Trainer(config, progress=progress)
    return trainer.run()
