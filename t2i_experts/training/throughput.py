"""How many samples a second the loader brings to one process of a run, with nothing else to do."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace

from t2i_experts.conditioning.conditioner import PromptTokenizer
from t2i_experts.config import EncoderConfig, RunConfig
from t2i_experts.shards.stream import open_batches
from t2i_experts.training.data import loader_workers, open_training_shards
from t2i_experts.training.task import Collate

SECONDS = 3.0  # of reading
PATIENCE = 300.0  # seconds after which shards that bring nothing are given up; a stream fills its shuffle buffers first
_BATCH = 64  # at most: a batch of thousands would take longer than the whole measurement


@dataclass(frozen=True)
class Throughput:
    """samples_per_second: read, decoded and tokenised, of one process with `workers` workers, over `samples` samples. untokenised: text
    encoders whose vocabulary is not here, without which it was measured."""

    samples_per_second: float
    samples: int
    workers: int
    untokenised: tuple[str, ...] = ()


def measure_loader(config: RunConfig, *, missing: tuple[str, ...] = (), processes: int = 1) -> Throughput:
    """Reads the training shards for about `SECONDS`, after a batch of each worker that does not count.

    missing: encoders that cannot be loaded. processes: of the run, of which one is measured.

    Raises ValueError for shards that cannot be read, TimeoutError if those of workers bring nothing within `PATIENCE`.
    """
    encoders: dict[str, EncoderConfig] = {name: e for name, e in config.stage.encoders.items() if name not in missing}
    size = min(_BATCH, config.training.batch_size)
    reader = open_training_shards(replace(config, training=replace(config.training, batch_size=size)), processes=processes)
    workers = loader_workers(config, reader, processes=processes)
    rates = {name: encoder.drop for name, encoder in config.stage.encoders.items()}
    collate = Collate(PromptTokenizer.from_config(encoders), rates, config.training.seed)
    deadline = time.monotonic() + PATIENCE
    batches = open_batches(
        reader,
        collate,
        start=0,
        stop=None,
        batch_size=size,
        accumulation=1,
        rank=0,
        world_size=1,
        workers=workers,
        give_up=lambda: time.monotonic() > deadline,
    )
    started, passed, read = time.monotonic(), 0.0, 0
    with contextlib.closing(batches):
        for number, batch in enumerate(batches):
            if number < max(workers, 1):  # while the workers start
                started = time.monotonic()
                continue
            read += len(batch.keys)
            passed = time.monotonic() - started
            if passed >= SECONDS:
                return Throughput(round(read / passed, 1), read, workers, missing)
    raise TimeoutError(f"the training shards did not bring enough batches to measure in {PATIENCE:.0f} s")
