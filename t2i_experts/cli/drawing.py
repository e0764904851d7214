"""What the commands that draw pictures have in common: checks of their options without torch, the pipeline, and what decides a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from t2i_experts.cli.importing import without_collecting

if TYPE_CHECKING:
    from t2i_experts.cascade.pipeline import CascadePipeline
    from t2i_experts.config import ExpertSamplingConfig, SamplingConfig

DTYPES = ("float32", "bfloat16")


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError for a --dtype that is none of `DTYPES`; None is the default."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype!r}; allowed: {', '.join(DTYPES)}")


def given_sampling(
    *, steps: int | None, guidance: float | None, sampler: str | None, threshold: float | None, experts: Sequence[str] = ()
) -> dict[str, Any]:
    """The options as `CascadePipeline.settings` takes them. experts: LEAF:KEY=VALUE,... each.

    Raises ValueError for what no model could be sampled with.
    """
    from t2i_experts.config import SamplingConfig, check_sampling
    from t2i_experts.registry import registry

    given = {"steps": steps, "guidance": guidance, "sampler": sampler, "threshold": threshold}
    check_sampling(SamplingConfig(**{name: value for name, value in given.items() if value is not None}), "--")  # type: ignore[arg-type]
    if sampler is not None:
        registry.check("sampler", sampler)
    return {**given, "experts": _given_experts(experts)} if experts else given


def _given_experts(words: Sequence[str]) -> dict[str, ExpertSamplingConfig]:
    """Raises ValueError for another form than LEAF:guidance=G,steps=N, and for a leaf that comes twice."""
    from t2i_experts.config import ExpertSamplingConfig, SamplingConfig, check_sampling

    kinds: dict[str, type] = {"guidance": float, "steps": int}
    found: dict[str, ExpertSamplingConfig] = {}
    for text in words:
        name, _, settings = text.partition(":")
        pairs = [setting.partition("=") for setting in settings.split(",")]
        try:
            values = {key: kinds[key](value) for key, _, value in pairs}
        except (KeyError, ValueError):
            values = {}
        if not name or len(values) < len(pairs):
            raise ValueError(f"--expert={text!r} must be of the form LEAF:guidance=G,steps=N, or one of both")
        if name in found:
            raise ValueError(f"--expert={text!r}: {name} comes twice")
        found[name] = ExpertSamplingConfig(**values)
        try:
            check_sampling(SamplingConfig(experts={name: found[name]}), "")
        except ValueError as error:
            raise ValueError(f"--expert={text!r}: {error}") from error
    return found


def open_pipeline(model: str | None, device: str | None, dtype: str | None, *, compile: bool = False) -> CascadePipeline:
    """See `CascadePipeline.from_pretrained`."""
    with without_collecting():  # it imports the encoders' libraries
        import torch

        from t2i_experts.cascade.pipeline import CascadePipeline

        return CascadePipeline.from_pretrained(model, device=device, dtype=getattr(torch, dtype) if dtype else None, compile=compile)


def pipeline_settings(pipeline: CascadePipeline, given: Mapping[str, Any]) -> SamplingConfig:
    """What pictures are drawn with, by what `given_sampling` gives. Raises ValueError for what this model cannot be sampled with."""
    from t2i_experts.config import SamplingConfig, check_threshold
    from t2i_experts.experts.sampling import check_leaves

    check_leaves(SamplingConfig(experts=given.get("experts", {})), pipeline.base.leaves, "--expert=")
    settings = pipeline.settings(**given)
    check_threshold(settings.threshold, pipeline.base.config.codec, "--")
    return settings


def what_decides(pipeline: CascadePipeline, settings: SamplingConfig) -> dict[str, Any]:
    """What, beside prompt and seed, decides a picture."""
    from t2i_experts import __version__
    from t2i_experts.config import to_plain

    codec = pipeline.base.config.codec
    model = {"source": pipeline.model.source, "fingerprint": pipeline.model.fingerprint, "codec": codec.kind}
    sampling, steps = to_plain(settings), pipeline.base.steps(settings)
    if steps != settings.steps:
        sampling["steps_in_all"] = steps  # those of experts that have steps of their own, too
    computed = {"dtype": str(pipeline.dtype).removeprefix("torch."), "device": pipeline.device.type}
    return {"sampling": sampling, "model": model, **computed, "t2i_experts": __version__}
