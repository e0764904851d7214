"""`t2i-experts experts merge`: the trained leaves of a tree as one ordinary network."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Config, Device, Json, Overrides, check_counts, tabulated

if TYPE_CHECKING:
    from t2i_experts.experts.merge_search import Evaluation, MergeSearch


def merge(
    config: Config,
    overrides: Overrides = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="LEAF=W", help="How much of a leaf's difference from the root is taken; 0 of those not named."),
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Search for the weights by the loss on the validation shards.")] = False,
    images: Annotated[
        int | None, typer.Option(help="Pictures to search on, and as many more to report on; default: half of all there are.")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(help="The most merges that a search measures; default: 200.")] = None,
    early: Annotated[bool, typer.Option("--early", help="Also take nodes that are still to see some of their images.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The model folder to write; default: merged in the config's output.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16: of the weights on the disk; default: as they are.", show_default=False)
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Merge the trained leaves of a tree into one network, root + sum of W (leaf - root), that costs what one network costs.

    Give the weights, or let them be searched for: on one part of the validation shards, over all training noise, and reported on another.
    """
    from t2i_experts.cli.drawing import check_dtype
    from t2i_experts.config import load_config
    from t2i_experts.config.expert_rules import require_experts

    check_dtype(dtype)
    check_counts(images=images, evaluations=evaluations)
    resolved = load_config(config, overrides or [])
    require_experts(resolved)
    leaves = resolved.experts.leaves
    given = _weights(weights or [], leaves)
    if search == bool(given):
        plain = " ".join(f"--weights {leaf}={1 / len(leaves):.3g}" for leaf in leaves)
        raise ValueError(f"experts merge needs either --search or --weights LEAF=W; the plain average is {plain}")
    if not search:
        for name, value in (("images", images), ("evaluations", evaluations)):
            if value is not None:
                raise ValueError(f"--{name}={value} would be ignored: without --search nothing is measured")

    with without_collecting():
        import torch

        from t2i_experts.cascade.device import default_device, open_device
        from t2i_experts.training.merging import MERGED, open_mergeable, refuse_other_folder, search_weights, write_merged

    folder = Path(resolved.output) / MERGED if out is None else out
    refuse_other_folder(folder)
    mergeable = open_mergeable(resolved, early=early)
    names, found, taken = list(mergeable.leaves), None, [given.get(name, 0.0) for name in mergeable.leaves]
    if search:
        place, most = default_device() if device is None else open_device(device, f"--device={device!r}"), evaluations or 200
        with _bar(most) as tell:
            result, count = search_weights(mergeable, resolved, place, images=images, evaluations=most, tell=tell)
        taken, found = list(result.best.weights), {"images": count, **_plain(names, result)}
    fingerprint = write_merged(mergeable, taken, resolved, folder, getattr(torch, dtype) if dtype else None, found)
    document = {"folder": str(folder), "fingerprint": fingerprint, "weights": dict(zip(names, taken, strict=True)), "search": found}
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else "\n".join(_lines(document)))


def _weights(given: Sequence[str], leaves: Sequence[str]) -> dict[str, float]:
    """LEAF=W each. Raises ValueError for a leaf that there is not or that comes twice, and for what is no finite number."""
    weights: dict[str, float] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if not equals or name not in leaves or name in weights:
            raise ValueError(f"--weights {text}: give LEAF=W, each leaf once; the leaves are {', '.join(leaves)}")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"--weights {text}: {value!r} must be a finite number")
    return weights


@contextlib.contextmanager
def _bar(most: int) -> Iterator[Callable[[Evaluation], None]]:
    """A bar over the merges that are measured, with the lowest loss so far. It may end early: nothing can be improved then."""
    from tqdm import tqdm

    lowest = math.inf
    with tqdm(desc="searching", total=most, unit=" merges", file=sys.stderr, mininterval=0.5, dynamic_ncols=True) as bar:

        def tell(evaluation: Evaluation) -> None:
            nonlocal lowest
            lowest = min(lowest, evaluation.loss)
            bar.set_postfix_str(f"lowest loss {lowest:.5f}", refresh=False)
            bar.update()

        yield tell


def _plain(names: Sequence[str], search: MergeSearch) -> dict[str, Any]:
    def plain(evaluation: Evaluation) -> dict[str, Any]:
        return {"weights": dict(zip(names, evaluation.weights, strict=True)), "loss": evaluation.loss}

    reported = dict(zip(("root", "average", "found"), map(plain, search.reported), strict=True))
    return {"best": plain(search.best), "reported": reported, "evaluations": [plain(one) for one in search.evaluations]}


def _lines(document: dict[str, Any]) -> list[str]:
    search, names = document["search"], list(document["weights"])
    rows = [["", *names, *(["loss"] if search else [])]]
    if search is None:
        rows.append(["merged", *(f"{weight:g}" for weight in document["weights"].values())])
    else:
        for name, one in search["reported"].items():
            rows.append([name, *(f"{weight:.4g}" for weight in one["weights"].values()), f"{one['loss']:.5f}"])
    lines = [*tabulated(rows), ""]
    if search is not None:
        count = search["images"]
        lines.append(f"losses on {count} other pictures than the {count} on which {len(search['evaluations'])} merges were measured")
    return [*lines, f"{document['folder']}, fingerprint {document['fingerprint']}"]
