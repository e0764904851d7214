"""The page of a run's report, in Markdown."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from t2i_experts.config import CodecConfig, DecoupleConfig, NoiseConfig
from t2i_experts.config.expert_rules import whole
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.training.history import History, Run, comparable_validations, facts, range_of

SHOWN_EVENTS = 20


def page(run: Run, drawn: Mapping[str, str], prompts: Sequence[str]) -> str:
    """The report in Markdown. drawn: titles of the pictures in report/, by name. prompts: of the grid of previews."""
    return "\n\n".join(_paragraphs(run, drawn, prompts)) + "\n"


def _paragraphs(run: Run, drawn: Mapping[str, str], prompts: Sequence[str]) -> Iterator[str]:

    def picture(name: str) -> Iterator[str]:
        if name in drawn:
            yield f"![{drawn[name]}](report/{name}.png)"

    yield f"# {run.root.resolve().name}"
    yield from _progress(run)
    yield "## Loss"
    yield from picture("loss")
    yield from _validation_table(run.history)
    yield from picture("noise")
    yield "## Previews"
    yield from picture("previews")
    if prompts:
        preview = run.config.training.preview
        yield "\n".join(f"{i + 1}. {_code(prompt)}" for i, prompt in enumerate(prompts))
        yield f"Each prompt starts from the same noise every time; {preview.steps} steps, guidance {preview.guidance:g}, averaged weights."
    else:
        yield "None yet." if run.config.training.preview.every_images else "None are drawn: `training.preview.every_images` is 0."
    yield "## How it runs"
    yield from _speed(run)
    for name in ("throughput", "data_wait", "memory", "gradient", "learning_rate"):
        yield from picture(name)
    yield "## What happened"
    yield from _events(run.history)
    yield "## What is trained"
    yield from _trained(run)
    yield "## How to go on"
    yield from _commands(run)


def _progress(run: Run) -> Iterator[str]:
    now = facts(run)
    seen, total = now["images_seen"], now["total_images"]
    told = datetime.fromtimestamp(run.history.events[-1]["time"], UTC)
    text = f"**{seen:,} of {total:,} images ({100 * seen / total:.3g} %)** as of {told:%Y-%m-%d %H:%M} UTC"
    if run.history.events[-1]["event"] == "diverged":
        text += ", where it **diverged** (see below)"
    elif seen < total and now["seconds_left"] is not None:
        text += f"; at the latest rate the rest takes {_duration(now['seconds_left'])}"
    yield text + "."
    rows = [
        ("training loss, smoothed", _number(now["loss"])),
        ("validation loss", _number(now["validation_loss"])),
        ("images per second", f"{now['images_per_second']:,.4g}" if now["images_per_second"] else "unknown"),
        ("time spent", _duration(now["seconds_spent"])),
        ("peak GPU memory", f"{now['peak_memory_gib']:.1f} GiB" if now["peak_memory_gib"] is not None else "not measured"),
        ("resumptions", now["resumptions"]),
        ("divergences", now["divergences"]),
    ]
    yield _table(("", ""), rows)


def _validation_table(history: History) -> Iterator[str]:
    """The newest loss in each range of noise, beside the first and the one before."""
    validations = comparable_validations(history)
    if not validations:
        yield "No validation yet."
        return
    newest, before = validations[-1], validations[:-1]
    columns = [validations[0], validations[-2]] if len(before) > 1 else before
    head = ["sigma", *(f"at {event['images_seen']:,}" for event in columns), f"now, at {newest['images_seen']:,}", "standard error"]
    rows = []
    for label, pick in [*((range_of(part), b) for b, part in enumerate(newest["bins"])), ("**all**", None)]:
        values = [event if pick is None else event["bins"][pick] for event in (*columns, newest)]
        cells = [label, *(_number(value["loss"]) for value in values), _number(values[-1]["standard_error"])]
        rows.append([*cells, *([_change(values[-2]["loss"], values[-1]["loss"])] if before else [])])
    yield _table([*head, *(["moved since the last"] if before else [])], rows)
    yield (
        f"On the same {newest['images']:,} held-out images, noise levels and noise every time, with the averaged weights. All ranges are "
        "equally probable in training."
    )


def _speed(run: Run) -> Iterator[str]:
    spent = run.history.time_spent()
    if spent.total:
        shares = [100 * part / spent.total for part in (spent.steps - spent.data_wait, spent.data_wait, spent.rest)]
        yield (
            f"Of {_duration(spent.total)}, {shares[0]:.0f} % went into training steps, {shares[1]:.1f} % into waiting for data, "
            f"{shares[2]:.0f} % into starting, validation, previews and checkpoints."
        )


def _events(history: History) -> Iterator[str]:
    """Starts, divergences and whatever else is neither training nor validation."""
    told = [event for event in history.events if event["event"] not in ("train", "validation")]
    lines = [f"- {len(told) - SHOWN_EVENTS} earlier ones are in log.jsonl"] if len(told) > SHOWN_EVENTS else []
    for i, event in list(enumerate(told))[-SHOWN_EVENTS:]:
        when = datetime.fromtimestamp(event["time"], UTC)
        lines.append(f"- {when:%Y-%m-%d %H:%M} UTC, at {event['images_seen']:,} images: {_in_words(event, first=i == 0)}")
    yield "\n".join(lines)


def _in_words(event: Mapping[str, Any], *, first: bool) -> str:
    match event["event"]:
        case "start":
            processes = event.get("processes", 1)
            where = event.get("device_name") or event.get("device", "an unknown device")
            return f"{'began' if first else 'resumed'} with {processes} process{'es' * (processes > 1)} on {where}"
        case "initial":
            return f"began with the weights of {_code(str(event.get('model')))} ({event.get('fingerprint')})"
        case "diverged":
            keys = event.get("keys") or []
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            if not keys:
                return "**diverged**: the loss rose and stayed high"
            return f"**diverged**, first in the batch with {', '.join(_code(str(key)) for key in keys[:8])}{more}"
        case kind:
            return f"{kind} {_code(', '.join(f'{key}={event[key]}' for key in event if key not in ('event', 'images_seen', 'time')))}"


def _trained(run: Run) -> Iterator[str]:
    config, stage, training = run.config, run.config.stage, run.config.training
    start = run.history.of("start")[-1:] or [{}]
    side = stage.size // (stage.codec.factor * stage.network.patch_size)
    resolutions = []
    for i, spec in enumerate(stage.network.resolutions):
        attention = [word for word, used in (("self", spec.self_attention), ("cross", spec.cross_attention)) if used]
        note = f" with {' and '.join(attention)}-attention" if attention else ""
        resolutions.append(f"{spec.channels} channels x {spec.blocks} at {side >> i} px{note}")
    batch = f"{training.batch_size:,} images" + (f" in {training.accumulation} parts" if training.accumulation > 1 else "")
    rate, ema = training.optimizer, training.ema
    averaging = f"half-life {ema.halflife_kimg:g} thousand images, at most {ema.rampup:g} of the images seen"
    if ema.kind == "power":
        averaging = f"power function, sigma_rel {', '.join(f'{width:g}' for width in ema.sigma_rel)}"
    rows = [
        ("stage", f"{stage.name}, {stage.size} px"),
        ("parameters", f"{start[0]['parameters']:,}" if "parameters" in start[0] else "unknown"),
        *[(name, f"{start[0][name]:,}") for name in ("samples", "tars") if name in start[0]],
        ("training shards", ", ".join(_code(name) for name in config.data.train)),
        ("validation shards", _code(config.data.validation) if config.data.validation else "none"),
        ("network", "; ".join(resolutions) or f"{stage.network.backbone}, {_code(str(stage.network.options))}"),
        *([("codec", _codec(stage.codec))] if stage.codec.latents else []),
        ("noise", _noise(stage.noise)),
        ("batch", f"{batch}, {training.precision}{', compiled' if training.compile else ''}, seed {training.seed}"),
        (
            "learning rate",
            f"{rate.learning_rate:g}, warm-up over {rate.warmup_images:,} images, then {rate.schedule}; clipped at norm {rate.clip_norm:g}",
        ),
        ("averaging", averaging),
        *([("for merging", _decoupled(training.decouple))] if training.decouple != DecoupleConfig() else []),
    ]
    yield _table(("", ""), rows)
    encoders = [
        (name, encoder.kind, _code(encoder.model), encoder.max_tokens, encoder.width, f"{100 * encoder.drop:g} %")
        for name, encoder in stage.encoders.items()
    ]
    yield _table(("encoder", "kind", "model", "tokens", "width", "dropped"), encoders)
    yield "All values: `config.yaml` beside `log.jsonl`."


def _decoupled(decouple: DecoupleConfig) -> str:
    """How training differs from that of an expert that answers alone."""
    parts = []
    if decouple.consistency:
        parts.append(f"{decouple.consistency:g} times the squared distance from the initial weights' answer is part of the training loss")
    if decouple.everywhere:
        parts.append(f"{100 * decouple.everywhere:g} % of the training noise is drawn from all noise")
    if decouple.projections:
        parts.append("projections of channels, folded into the model's weights")
    return "; ".join(parts)


def _noise(noise: NoiseConfig) -> str:
    """The distribution, and the part of it that an expert is trained on."""
    text = f"ln sigma of mean {noise.mean:g} and deviation {noise.std:g}, sigma_data {noise.sigma_data:g}"
    return text if whole(noise.quantiles) else f"{text}; an expert for {NoiseInterval.from_config(noise)}"


def _codec(codec: CodecConfig) -> str:
    model = f"{codec.kind} {_code(codec.model)}" if codec.model else codec.kind
    return f"{model}, latents of {codec.channels} channels and 1/{codec.factor} of the side, {codec.dtype}"


def _commands(run: Run) -> Iterator[str]:
    """How to go on and how to generate, as commands that can be pasted where the run was started."""
    processes = (run.history.of("start")[-1:] or [{}])[0].get("processes", 1)
    program = f"accelerate launch --num_processes {processes} -m t2i_experts" if processes > 1 else "t2i-experts"
    moved = run.root.resolve() != Path(run.config.output).resolve()
    train = f"{program} train {_quoted(run.root / 'config.yaml')}" + (f" output={_quoted(run.root)}" if moved else "")
    if run.checkpoints:
        newest = run.checkpoints[-1]
        if run.history.images_seen < run.config.training.images:
            yield f"From the newest checkpoint, `{newest.name}` ({int(newest.name):,} images), in the folder where the run was started:"
        else:
            train += f" training.images={2 * run.config.training.images}"
            yield "It has seen all its images. To train on, in the folder where the run was started:"
    else:
        yield "There is no checkpoint yet; in the folder where the run was started, this begins again:"
    yield f"```bash\n{train}\n```"
    if (run.root / "model").is_dir() and whole(run.config.stage.noise.quantiles):
        prompt = next(iter(run.config.training.preview.prompts), "a red apple")
        yield "Pictures from the averaged weights of the newest checkpoint:"
        yield f"```bash\nt2i-experts generate {shlex.quote(prompt)} --model {_quoted(run.root / 'model')}\n```"
    yield f"This page again, at any time: `t2i-experts report {_quoted(run.root)}`."


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def _code(text: str) -> str:
    """As Markdown shows it letter by letter, in one line."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "not finite" if value is not None else "none"


def _change(old: float | None, new: float | None) -> str:
    """In percent of the old value."""
    return f"{100 * (new / old - 1):+.1f} %" if old and new is not None else "unknown"


def _duration(seconds: float) -> str:
    """In words: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
