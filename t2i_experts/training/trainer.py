"""The training loop, under accelerate: the same on one CPU process and on many GPUs and hosts.

One optimiser step consumes `batch_size` consecutive positions of the shards' global order. Everything random in it depends on (seed,
position) alone, so a run that is killed and started again with the same command continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from t2i_experts.cascade.model_folder import save_model
from t2i_experts.cascade.stage import Stage, build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig, differences, to_plain, to_yaml
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.ema import EMA
from t2i_experts.training.optim import build_optimizer, learning_rate
from t2i_experts.training.preview import draw_preview
from t2i_experts.training.state import TrainState, checkpoints, read_facts
from t2i_experts.training.task import Batch, DiffusionTask
from t2i_experts.training.tracking import RunLog
from t2i_experts.training.validation import ValidationLoss, validate

MAY_CHANGE = ("training.images", "training.device", "training.max_minutes", "data.workers")
"""Config values that may differ when a run goes on; a change of any other would make it another run."""


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite any more."""


class Trainer:
    """One run: a stage, its shards and its output folder."""

    def __init__(self, config: RunConfig, *, progress: bool = True) -> None:
        """Builds everything and goes back to the newest checkpoint in the output folder, if there is one.

        Raises ValueError for a config that does not fit the shards, the encoders, the number of processes or the existing checkpoint.
        """
        training = config.training
        self.config = config
        self.root = Path(config.output)
        self.accelerator = Accelerator(
            mixed_precision="no",  # the task casts, and the denoiser alone
            cpu=training.device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        self.device = self.accelerator.device
        self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if training.batch_size % (training.accumulation * self.world_size):
            raise ValueError(
                f"training.batch_size={training.batch_size} must be a multiple of accumulation x processes = "
                f"{training.accumulation} x {self.world_size}"
            )
        self._refuse_changed_config()

        self.reader = ShardReader(config.data.train, size=config.stage.size, seed=training.seed)
        self.validation = ShardReader([config.data.validation], size=config.stage.size, seed=0) if config.data.validation else None
        conditioner = TextConditioner.from_config(config.stage.encoders, device=self.device)
        self.task = DiffusionTask(config.stage, conditioner, seed=training.seed, device=self.device, bf16=training.precision == "bf16")

        torch.manual_seed(training.seed)
        self.network: EDMPrecond = build_network(config.stage).to(self.device)
        self.ema = EMA(self.network, training.ema.halflife_kimg, training.ema.rampup)
        if training.compile:
            self.network.compile()
        self.model, optimizer = self.accelerator.prepare(self.network, build_optimizer(self.network, training.optimizer))
        self.optimizer: torch.optim.Optimizer = optimizer
        self.state = TrainState(self.network, self.ema, optimizer.optimizer, 0, self.reader.dataset_hash, to_plain(config))
        self.resumed_from = checkpoints(self.root)[-1:]
        for folder in self.resumed_from:
            self.state.restore(folder)
        if self.accelerator.is_main_process:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        self.log = RunLog(
            self.root / "log.jsonl",
            images_seen=self.state.images_seen,
            total_images=training.images,
            writes=self.accelerator.is_main_process,
            progress=progress,
        )
        self._recent: list[tuple[tuple[str, ...], Tensor]] = []  # keys and losses since the last look at them
        self._grad_norms: list[Tensor] = []

    def _refuse_changed_config(self) -> None:
        for folder in checkpoints(self.root)[-1:]:
            changes = [line for line in differences(read_facts(folder)["config"], to_plain(self.config)) if not line.startswith(MAY_CHANGE)]
            if changes:
                raise ValueError(
                    f"{self.root} holds a run with another config; go on with its own, or choose another output. Changed:\n  "
                    + "\n  ".join(changes)
                )

    def run(self) -> Path:
        """Trains to the end (or for `max_minutes`) and returns the model folder. Raises TrainingDiverged if the loss is not finite."""
        training, started = self.config.training, time.monotonic()
        self.log.event("start", self.state.images_seen, processes=self.world_size, device=str(self.device), **self._sizes())
        with contextlib.closing(self.log), contextlib.closing(self._batches()) as batches:
            window, waited, window_images = time.monotonic(), 0.0, 0
            out_of_time = False
            while self.state.images_seen < training.images and not out_of_time:
                before = self.state.images_seen
                waited += self._step(batches)
                window_images += training.batch_size
                self.log.advance(training.batch_size)
                if self._due(before, training.log_every_images):
                    self._report(time.monotonic() - window, waited, window_images)
                    out_of_time = self._out_of_time(started)
                    window, waited, window_images = time.monotonic(), 0.0, 0
                self._tend(before, last=out_of_time)
        return self.root / "model"

    def _out_of_time(self, started: float) -> bool:
        """Whether `max_minutes` have passed on the clock of any process; all give the same answer."""
        limit = self.config.training.max_minutes
        late = torch.tensor(float(bool(limit) and time.monotonic() - started > 60 * limit), device=self.device)
        return bool(self.accelerator.reduce(late, "sum") > 0)

    def _sizes(self) -> dict[str, Any]:
        return {"parameters": sum(p.numel() for p in self.network.parameters()), "samples": self.reader.samples}

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's micro-batches from where the run stands, without end."""
        training = self.config.training
        return open_loader(
            self.reader,
            self.task.collate(),
            start=self.state.images_seen,
            stop=None,
            batch_size=training.batch_size,
            accumulation=training.accumulation,
            rank=self.rank,
            world_size=self.world_size,
            workers=self.config.data.workers,
        )

    def _step(self, batches: Iterator[Batch]) -> float:
        """One optimiser step. Returns the seconds that were spent waiting for data."""
        training, waited = self.config.training, 0.0
        rate = learning_rate(training.optimizer, self.state.images_seen, training.images)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for micro in range(training.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            last = micro == training.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses = self.task.losses(self.model, batch)
                self.accelerator.backward(losses.mean() / training.accumulation)
            self._recent.append((batch.keys, losses.detach()))
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.optimizer.clip_norm)
        self._grad_norms.append(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.images_seen += training.batch_size
        self.ema.update(self.network, training.batch_size, self.state.images_seen)
        return waited

    def _due(self, before: int, every: int) -> bool:
        """Whether the step from `before` to images_seen crossed a multiple of `every`, or was the last one."""
        seen = self.state.images_seen
        return bool(every) and (seen // every > before // every or seen >= self.config.training.images)

    def _tend(self, before: int, *, last: bool) -> None:
        """Validation, preview and checkpoint, each when it is due; never on weights that have diverged."""
        training = self.config.training
        due = [
            self._due(before, training.validation.every_images) and self.validation is not None,
            self._due(before, training.preview.every_images) and bool(training.preview.prompts),
            self._due(before, training.checkpoint_every_images) or last,
        ]
        if any(due):
            self._refuse_divergence()
        for wanted, action in zip(due, (self._validate, self._preview, self._checkpoint), strict=True):
            if wanted:
                action()

    def _refuse_divergence(self) -> tuple[float, float]:
        """Mean loss over processes and mean gradient norm since the last look. Raises TrainingDiverged naming the batch, on all processes."""
        if not self._recent:
            return float("nan"), float("nan")
        losses = torch.stack([losses.mean() for _, losses in self._recent])
        norms = torch.stack(self._grad_norms)
        bad = [keys for (keys, _), fine in zip(self._recent, losses.isfinite().tolist(), strict=True) if not fine]
        if not bad and not bool(norms.isfinite().all()):
            step = int((~norms.isfinite()).nonzero()[0])
            accumulation = self.config.training.accumulation
            bad = [keys for keys, _ in self._recent[step * accumulation : (step + 1) * accumulation]]
        total = self.accelerator.reduce(
            torch.stack([losses.mean().nan_to_num(), torch.tensor(float(bool(bad)), device=self.device)]), "sum"
        )
        if float(total[1]):
            newest = checkpoints(self.root)[-1:]
            keys = f"first batch on this process: {', '.join(bad[0])}" if bad else "in a batch of another process"
            raise TrainingDiverged(
                f"loss or gradient is not finite before {self.state.images_seen} images; {keys}. "
                f"The last good checkpoint is {newest[0] if newest else 'none'}."
            )
        return float(total[0]) / self.world_size, float(norms.mean())

    def _report(self, seconds: float, waited: float, images: int) -> None:
        """A line in the log and the loss beside the progress bar."""
        loss, norm = self._refuse_divergence()
        self._recent.clear()
        self._grad_norms.clear()
        self.log.advance(0, loss)
        self.log.event(
            "train",
            self.state.images_seen,
            loss=loss,
            grad_norm=norm,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            images_per_second=round(images / seconds, 2),
            data_wait=round(waited / seconds, 4),
        )

    def _validate(self) -> None:
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
        losses = self.accelerator.reduce(result.losses.to(self.device), "sum").cpu()
        self.log.event("validation", self.state.images_seen, **ValidationLoss(losses, result.edges).summary())

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            stage = Stage(self.config.stage, self.ema.network, self.config.sampling)
            path = self.root / "previews" / f"{self.state.images_seen:012d}.png"
            with self.task.autocast():
                draw_preview(stage, self.task.conditioner, self.config.training.preview, self.device, path)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        """Saves the state and, beside the checkpoints, the EMA weights as a model folder that generates."""
        if self.accelerator.is_main_process:
            self.state.save(self.root, self.config.training.keep_checkpoints)
            save_model(
                self.root / "model",
                self.config.stage,
                self.config.sampling,
                self.ema.network.state_dict(),
                self.task.conditioner,
                provenance={"images_seen": self.state.images_seen, "dataset_hash": self.state.dataset_hash},
            )
        self.accelerator.wait_for_everyone()


def train(config: RunConfig, *, progress: bool = True) -> Path:
    """Trains `config`, or goes on with the run in its output folder. Returns the model folder."""
    trainer = Trainer(config, progress=progress)
    return trainer.run()
