"""What an expert loses when it is cut down to a low rank: its held-out loss by rank, beside the root's and its own, on the same draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from t2i_experts.cascade.assembly import Assembly, read_states
from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.expert_weights import for_sampling, put_on
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import cast
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.lowrank import Decomposition, LowRankDifference, relative_error
from t2i_experts.experts.states import State
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import ValidationLoss, standard_error, validate


@dataclass(frozen=True)
class RankLoss:
    """An expert at one rank.

    rank: 0 is the root, None the whole expert. bytes: of the difference from the root. error: of the weights, see `relative_error`.
    loss, standard_error: over held-out images. above, above_error: how far the loss lies above the whole expert's, image by image, and the
    standard error of that, which is smaller than those of the two losses.
    """

    rank: int | None
    bytes: int
    error: float
    loss: float
    standard_error: float
    above: float
    above_error: float


def rank_losses(
    assembly: Assembly,
    config: RunConfig,
    *,
    ranks: Sequence[int] = (),
    images: int | None = None,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[str, list[RankLoss]]]:
    """For each expert of an ensemble, from low noise to high: the root, each rank, and the whole expert, on its own part of the noise.

    ranks: by default 1, 2, 4 and so on. images: of `data.validation`, by default `training.validation.images`; the noise levels are in
    `training.validation.bins` ranges, and the precision is that of the training. dtype: that differences are stored in.

    The root, where it stands in, and experts of another network than the root's are left out. Raises ValueError without `data.validation`.
    """
    if config.data.validation is None:
        raise ValueError("data.validation=None: name a shard folder of held-out pictures to measure on")
    root, states = assembly.root, read_states(assembly)
    reader = ShardReader([config.data.validation], size=root.stage.size, seed=0)
    conditioner = TextConditioner.from_config(root.stage.encoders, root=root.folder, device=device)
    codec = load_codec(root.stage, root=root.folder, device=device)
    whole_root = states[root.node.name].weights
    assert not isinstance(whole_root, LowRankDifference)
    stored = cast(whole_root, dtype)
    for name, node in assembly.experts.items():
        weights = states[name].weights
        assert not isinstance(weights, LowRankDifference)
        if name == root.node.name or node.stage.network != root.stage.network:
            continue
        stage = replace(root.stage, noise=node.stage.noise)
        bf16 = config.training.precision == "bf16"
        task = DiffusionTask(stage, conditioner, seed=0, device=torch.device(device), bf16=bf16, codec=codec)
        settings = config.training.validation
        count = settings.images if images is None else images
        network = for_sampling(build_network(stage).to(device), torch.float32)

        measure = partial(validate, network, task, reader, images=count, bins=settings.bins, batch_size=batch_size)
        yield name, list(_rows(stored, weights, Decomposition(stored, weights, dtype), ranks, network, measure))


def _rows(
    root: State,
    expert: State,
    decomposition: Decomposition,
    ranks: Sequence[int],
    network: EDMPrecond,
    measure: Callable[[], ValidationLoss],
) -> Iterator[RankLoss]:
    """measure: the loss of `network`, into which each rank's weights are put."""

    def losses(difference: LowRankDifference) -> Tensor:
        """Of each image, (N,)."""
        put_on(network, root, difference.to(next(network.parameters()).device), root)
        found = measure()
        return found.losses[found.read].mean(dim=1)

    largest = decomposition.largest_rank
    whole = decomposition.at_rank(largest)
    own = losses(whole)
    for rank in (0, *(ranks or (2**i for i in range(largest.bit_length()) if 2**i < largest)), None):
        difference = decomposition.at_rank(rank) if rank else LowRankDifference(decomposition.root, {}, {}) if rank == 0 else whole
        loss = own if rank is None else losses(difference)
        above, error = loss - own, relative_error(root, difference, expert)
        yield RankLoss(rank, difference.bytes, error, float(loss.mean()), standard_error(loss), float(above.mean()), standard_error(above))
