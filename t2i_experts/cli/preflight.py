"""Whether a config can be trained here: its encoders, codec, shards, disk, memory and speed. Nothing is downloaded or left behind."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from t2i_experts.cli.environment import free_disk, main_memory
from t2i_experts.cli.findings import Finding, size

if TYPE_CHECKING:
    from t2i_experts.conditioning.presence import Presence
    from t2i_experts.config import RunConfig
    from t2i_experts.training.measure import MeasuredStep
    from t2i_experts.training.memory import SamplingMemory, TrainingMemory

TOLERANCE = 0.15  # of the estimated memory


def missing_encoders(config: RunConfig) -> tuple[str, ...]:
    """Encoders of a config that cannot be loaded without a download. Raises ValueError for kinds that do not exist."""
    from t2i_experts.conditioning.presence import find_encoder
    from t2i_experts.registry import registry

    for encoder in config.stage.encoders.values():
        registry.get("encoder", encoder.kind)
    return tuple(name for name, encoder in config.stage.encoders.items() if find_encoder(encoder).remedy)


def encoders(config: RunConfig) -> list[Finding]:
    """Where each encoder is, or how to get it."""
    from t2i_experts.conditioning.presence import find_encoder

    found = {name: find_encoder(encoder) for name, encoder in config.stage.encoders.items()}
    wanting: dict[str, list[str]] = {}
    for name, presence in found.items():
        wanting.setdefault(presence.remedy, []).append(name)
    rows = []
    for name, presence in found.items():
        names = wanting[presence.remedy]
        problem = f"{', '.join(names)}: {presence.remedy}" if presence.remedy and name == names[0] else ""  # once for both towers of a CLIP
        encoder = config.stage.encoders[name]
        model = f"{encoder.model} ({encoder.pretrained})" if encoder.pretrained else encoder.model
        rows.append(_where(name, encoder.kind, model, presence, problem))
    return rows


def codec(config: RunConfig) -> list[Finding]:
    """Where the codec is, or how to get it; nothing if pictures are denoised as they are. Raises ValueError for an unknown kind."""
    chosen, found = config.stage.codec, _find_codec(config)
    if not chosen.latents:
        return []
    return [_where("codec", chosen.kind, chosen.model, found, f"codec: {found.remedy}" if found.remedy else "")]


def initial(config: RunConfig) -> list[Finding]:
    """The weights that the run will begin with, and whether they fit; nothing for fresh ones, and for a run that has begun already."""
    from t2i_experts.training.checkpoints import checkpoints
    from t2i_experts.training.initial import read_initial

    name, blend = config.training.initial, config.training.blend
    name = f"{blend.high} and {blend.low}" if blend.high is not None else name
    if name is None or checkpoints(Path(config.output)):
        return []
    try:
        found = read_initial(config)
    except ValueError as error:
        return [Finding("initial", f"{name}: no weights to begin with", {"model": name, "fingerprint": None}, str(error))]
    assert found is not None
    seen = found.facts["images_seen"]
    after = f", after {seen:,} images" if seen is not None else ""
    return [Finding("initial", f"the weights {found.fingerprint} of {name}{after}", found.facts)]


def _where(name: str, kind: str, model: str | None, found: Presence, problem: str) -> Finding:
    what = f"{kind} {model}" if model else kind
    if not found.known:
        return Finding(name, f"{what}: a plugin's, which only it can find", {"model": model, "found": None})
    value = {"model": model, "found": str(found.place) if found.place else None, "bytes": found.bytes, "remedy": found.remedy}
    if found.place is None:
        return Finding(name, f"{what}: not here", value, problem)
    return Finding(name, f"{what}: {size(found.bytes)} in {found.place}", value)


def _find_codec(config: RunConfig) -> Presence:
    """Where its files are, if it can tell. Raises ValueError for an unknown kind."""
    from t2i_experts.conditioning.presence import Presence
    from t2i_experts.registry import registry

    find = getattr(registry.get("codec", config.stage.codec.kind), "find", None)
    found: Presence = find(config.stage.codec) if find else Presence(known=False)
    return found


def shards(config: RunConfig) -> list[Finding]:
    """Whether the shard folders are here and whole, as far as sizes tell. What lies behind URLs is left to `throughput`."""
    from t2i_experts.config import is_url
    from t2i_experts.shards.reader import ShardReader
    from t2i_experts.training.embeddings import stored_embeddings

    folders = [("train", f"train {i}" if i > 1 else "train", folder) for i, folder in enumerate(config.data.train, start=1)]
    folders += [("validation", "validation", config.data.validation)] if config.data.validation else []
    rows = []
    for use, name, folder in folders:
        if is_url(folder):
            rows.append(Finding(name, f"{folder}: read as a stream", {"url": folder}))
            continue
        try:
            samples = ShardReader([folder], size=config.stage.size, seed=0, embeddings=stored_embeddings(config)).samples
            rows.append(Finding(name, f"{samples:,} samples in {folder}", {"folder": folder, "samples": samples}))
        except (ValueError, OSError) as error:
            remedy = f"t2i-experts shards build SOURCE --out {folder}, or name another folder in data.{use}"
            rows.append(Finding(name, f"{folder}: not to be read", {"folder": folder, "samples": None}, f"data.{use}: {error}; {remedy}"))
    return rows


def disk(config: RunConfig, memory: TrainingMemory) -> list[Finding]:
    """What the run's folder will take against what is free there."""
    from t2i_experts.conditioning.presence import find_encoder

    training, output = config.training, Path(config.output)
    checkpoint = memory.weights + memory.averages + memory.optimizer
    kept = training.keep_checkpoints + 1 + bool(training.validation.every_images)  # one that is being written, and the best
    parts = [*map(find_encoder, config.stage.encoders.values()), _find_codec(config)]
    copied = {found.place: found.bytes for found in parts if found.local}
    models = (1 + bool(training.validation.every_images)) * (memory.weights + sum(copied.values()))
    every = training.ema.snapshot_every_images
    snapshots = training.images // every * memory.averages if every else 0
    total = kept * checkpoint + models + snapshots
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) if output.is_dir() else 0
    free = free_disk(output)
    text = f"{size(total)}: {kept} checkpoints of {size(checkpoint)}, models {size(models)}"
    text += f", snapshots {size(snapshots)}" if snapshots else ""
    lacking = total - there > free
    remedy = "lower training.keep_checkpoints, or set output to another disk"
    return [
        Finding(
            "output", text, {"bytes": total, "checkpoint": checkpoint, "kept": kept, "models": models, "snapshots": snapshots},
            f"{output} needs {size(total - there)} more, and {size(free)} are free: {remedy}" if lacking else "",
        ),
        Finding("free", f"{size(free)} for {output}", free),
    ]  # fmt: skip


def memory_rows(config: RunConfig, memory: TrainingMemory, sampling: SamplingMemory) -> list[Finding]:
    """The estimate, part by part, and whether it fits."""
    device, capacity = _capacity(config)
    rows = [
        Finding("network", f"{memory.parameters:,} parameters, {memory.batch_size:,} images a process at a time", memory.parameters),
        *(Finding(name, size(getattr(memory, name)), getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "averages")),
        Finding("encoders", _encoder_sizes(memory), dict(memory.encoders), note=_unknown(memory)),
    ]
    if memory.parent:
        rows.append(Finding("parent", size(memory.parent), memory.parent))
    if config.stage.codec.latents:
        unknown = "the codec is not in the estimates: what it is is not known here" if memory.codec is None else ""
        rows.append(Finding("codec", "unknown" if memory.codec is None else size(memory.codec), memory.codec, note=unknown))
    activations, note = size(memory.activations), ""
    if memory.compiled:
        activations += f" compiled ({size(memory.uncompiled)} if it were not)"
    elif config.training.compile:
        activations += " (not compiled; compiled takes less)"
        note = "the estimate is for uncompiled code: an upper bound for compiled code, which was not traced here"
    rows.append(Finding("activations", activations, {"bytes": memory.activations, "compiled": memory.compiled}, note=note))
    if config.training.compile and device == "the CPU" and config.training.device is None:
        rows.append(Finding("device", device, device, note="no GPU is here: this config would train on the CPU"))
    needed = f"{size(memory.total)} estimated; {device} has {size(capacity)}"
    problem = _too_much(memory, device, capacity) if memory.total > capacity else ""
    bound = config.training.compile and not memory.compiled  # an upper one: it may fit all the same
    rows.append(Finding("training", needed, memory.total, problem="" if bound else problem, note=problem if bound else ""))
    text = f"{size(sampling.total)} estimated for {sampling.images} pictures at a time in {sampling.dtype}"
    rows.append(Finding("sampling", text, asdict(sampling) | {"total": sampling.total}))
    return rows


def _capacity(config: RunConfig) -> tuple[str, int]:
    """The device that training takes, in words, and its bytes."""
    import torch

    from t2i_experts.training.measure import training_device

    device = training_device(config)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return facts.name, facts.total_memory
    return "the CPU" if device.type == "cpu" else "this machine", main_memory()


def _encoder_sizes(memory: TrainingMemory) -> str:
    return ", ".join(f"{name} {'unknown' if bytes is None else size(bytes)}" for name, bytes in memory.encoders.items())


def _unknown(memory: TrainingMemory) -> str:
    unknown = [name for name, bytes in memory.encoders.items() if bytes is None]
    return f"the encoders {', '.join(unknown)} are not in the estimates: what they are is not known here" if unknown else ""


def _too_much(memory: TrainingMemory, device: str, capacity: int) -> str:
    """What to do: as many accumulation steps as it takes, if that can help."""
    fixed = memory.total - memory.activations
    batch = memory.batch_size
    steps = next((n for n in range(2, batch + 1) if batch % n == 0 and fixed + memory.activations / n < 0.9 * capacity), None)
    remedy = f"compute fewer images at a time (training.accumulation {steps} times as high)" if steps else "take a smaller network"
    need = f"training needs about {size(memory.total)}, and {device} has {size(capacity)}"
    return f"{need}: {remedy}, or raise training.gradient_checkpointing"


def measured_rows(memory: TrainingMemory, measured: MeasuredStep) -> list[Finding]:
    """Estimated beside measured memory, and the speed of the network alone."""
    rows = [Finding("device", measured.device, measured.device)]
    if measured.peak is None:
        rows.append(Finding("peak memory", f"not measured: torch does not tell it on {measured.device}"))
    else:
        ratio = memory.total / measured.peak
        text = f"{size(measured.peak)} measured, {size(memory.total)} estimated: {ratio:.3f} of it"
        value = {"measured": measured.peak, "estimated": memory.total, "ratio": round(ratio, 4)}
        far = abs(ratio - 1) > TOLERANCE
        rows.append(Finding("peak memory", text, value, note=f"the estimate is {ratio - 1:+.0%} off the measured memory" if far else ""))
    text = f"{measured.images_per_second:,} images/s a process, with the data at hand"
    rows.append(Finding("speed", text, measured.images_per_second))
    return rows


def throughput(config: RunConfig, missing: tuple[str, ...], measured: MeasuredStep | None, *, processes: int) -> list[Finding]:
    """How fast the shards are read, and whether that keeps the network busy, as far as its speed is known."""
    from t2i_experts.training.throughput import measure_loader

    try:
        found = measure_loader(config, missing=missing, processes=processes)
    except (ValueError, TimeoutError) as error:
        return [Finding("loader", "nothing could be read", problem=f"data.train: {error}")]
    text = f"{found.samples_per_second:,} samples/s a process, {found.workers} workers"
    text += f"; without the tokens of {', '.join(missing)}" if missing else ""
    rows = [Finding("loader", text, asdict(found))]
    for source, needed in _speeds(config, measured):
        enough = found.samples_per_second >= needed
        text = f"{source} takes {needed:,.1f} images/s a process: the loader is {'fast enough' if enough else 'too slow'}"
        note = "the loader is slower than the network: raise data.workers, or store smaller pictures (shards build --resize)"
        rows.append(Finding("enough", text, {"needed": needed, "enough": enough}, note="" if enough else note))
    return rows


def _speeds(config: RunConfig, measured: MeasuredStep | None) -> list[tuple[str, float]]:
    """What takes images, and how many a second and process: what was measured now, or else what the run's log says of its last steps."""
    if measured is not None:
        return [("the network", measured.images_per_second)]
    from t2i_experts.training.history import History, read_events

    history = History(read_events(Path(config.output) / "log.jsonl"))
    starts, steps = history.of("start"), history.of("train")
    if not starts or not steps:
        return []
    busy = max(1 - float(steps[-1]["data_wait"]), 1e-3)
    return [(f"the run in {config.output}", float(steps[-1]["images_per_second"]) / busy / int(starts[-1]["processes"]))]
