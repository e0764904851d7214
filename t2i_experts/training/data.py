"""A run's training shards as its config names them: folders or URLs, with stored embeddings or not, square or in aspect-ratio buckets."""

from __future__ import annotations

from t2i_experts.config import RunConfig
from t2i_experts.shards.buckets import Buckets
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.stream import StreamReader, open_reader
from t2i_experts.training.embeddings import stored_embeddings


def open_training_shards(config: RunConfig, *, processes: int, progress: bool = False) -> ShardReader | StreamReader:
    """The reader of `data.train`. progress: a bar while the sizes of pictures are read, which only buckets need.

    Raises ValueError for shards that cannot be read, or not by so many processes.
    """
    shapes = tuple((width, height) for width, height in config.stage.buckets)
    return open_reader(
        config.data.train,
        size=config.stage.size,
        seed=config.training.seed,
        processes=processes,
        embeddings=stored_embeddings(config),
        buckets=Buckets(shapes, config.training.batch_size) if shapes else None,
        progress=progress,
    )


def loader_workers(config: RunConfig, reader: ShardReader | StreamReader, *, processes: int) -> int:
    """How many workers read for one process: `data.workers`; of shards behind URLs at least one and at most one a tar, since who reads
    these can do nothing else while their bytes do not come."""
    if isinstance(reader, StreamReader):
        return reader.workers(max(1, config.data.workers), processes)
    return config.data.workers
