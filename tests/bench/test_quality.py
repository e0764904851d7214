"""What is compared at equal time is of equal size, is fed alike, and is counted alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t2i_experts.bench import backbone, quality, quality_run, trainings
from t2i_experts.bench.backbone import NAME, TOLERANCE, Counterpart, as_diffusers, build_diffusers, counterpart
from t2i_experts.bench.quality import Settings, bench_quality, failures, parse_rates, parse_variant
from t2i_experts.bench.quality_run import StepTime, step_time, train_for
from t2i_experts.bench.quality_table import mean_rows
from t2i_experts.bench.trainings import Candidate, Failed, Outcome, Run, Trained, train_all
from t2i_experts.config import ResolutionSpec, RunConfig, StageConfig, load_config
from t2i_experts.registry import Registry, registry
from t2i_experts.training import tracking
from t2i_experts.training.history import read_history
from t2i_experts.types import Embedding

OTHER_NETWORK = "stage.network={backbone: other, resolutions: [], embedding_channels: 0, context_channels: 0, head_channels: 64}"


def embeddings(stage: StageConfig, batch: int) -> dict[str, Embedding]:
    """Of captions that fill half of their tokens."""
    torch.manual_seed(1)
    return {
        name: Embedding(
            torch.randn(batch, e.max_tokens, e.width),
            torch.arange(e.max_tokens).expand(batch, -1) < max(e.max_tokens // 2, 1),
            torch.randn(batch, e.pooled_width) if e.pooled_width else None,
        )
        for name, e in stage.encoders.items()
    }


@pytest.fixture(scope="module")
def baseline(stage_config: StageConfig) -> tuple[StageConfig, Any]:
    """A network in patches with cross-attention alone, both kinds of attention, and none."""
    resolutions = [ResolutionSpec(8, 1), ResolutionSpec(16, 1, False, True), ResolutionSpec(16, 1, True, True)]
    network = replace(stage_config.network, resolutions=resolutions, patch_size=2)
    stage = replace(stage_config, network=as_diffusers(network))
    torch.manual_seed(0)
    return stage, build_diffusers(stage, in_channels=3, out_channels=3)


def test_the_baseline_of_the_shipped_model_takes_the_same_operations() -> None:
    stage = load_config("emoji/base64").stage
    found = counterpart(stage)
    assert found.flops == pytest.approx(found.own_flops, rel=TOLERANCE)
    assert 5.2e9 < found.own_flops < 5.6e9
    specs = [ResolutionSpec(**spec) for spec in found.network.options["resolutions"]]
    for own, other in zip(stage.network.resolutions, specs, strict=True):
        assert replace(own, blocks=other.blocks) == other and abs(own.blocks - other.blocks) <= 1
    assert {key: found.network.options[key] for key in ("patch_size", "head_channels")} == {"patch_size": 2, "head_channels": 32}


def test_blocks_are_changed_before_widths(stage_config: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a network whose blocks cost their width, squared, and nothing else does."""
    resolutions = [ResolutionSpec(16, 2), ResolutionSpec(32, 2, True, True)]
    stage = replace(stage_config, network=replace(stage_config.network, resolutions=resolutions, head_channels=8))

    def matched(own: int) -> list[tuple[int, int]]:
        monkeypatch.setattr(backbone, "own_flops", lambda stage: own)
        return [(spec["channels"], spec["blocks"]) for spec in counterpart(stage).network.options["resolutions"]]

    monkeypatch.setattr(backbone, "EDMPrecond", list)
    monkeypatch.setattr(backbone, "build_diffusers", lambda stage, **_: stage.network.options["resolutions"])
    monkeypatch.setattr(backbone, "_flops", lambda _, make: sum(spec["blocks"] * spec["channels"] ** 2 for spec in make()))
    assert matched(2 * 256 + 2 * 1024) == [(16, 2), (32, 2)]
    assert matched(3 * 256 + 2 * 1024) == [(16, 3), (32, 2)]
    assert matched(2 * 256 + 2 * 576) == [(16, 2), (24, 2)]
    assert matched(10**6) == [(24, 3), (48, 3)], "the nearest, where none is near"


def test_the_baseline_attends_where_this_projects_network_does(baseline: tuple[StageConfig, Any]) -> None:
    down, middle = baseline[1].network.down_blocks, baseline[1].network.mid_block
    kinds = [[hasattr(layer.attn1, "to_q") for layer in _layers(block)] for block in (*down, middle)]
    assert kinds == [[], [False], [True], [True]]
    assert all(layer.attn2 is not None for block in (*down, middle) for layer in _layers(block))
    assert down[1].attentions[0].transformer_blocks[0].attn2.heads == 2


def _layers(block: Any) -> list[Any]:
    return [layer for transformer in getattr(block, "attentions", ()) for layer in transformer.transformer_blocks]


def test_padding_is_masked_and_all_else_counts(baseline: tuple[StageConfig, Any]) -> None:
    stage, network = baseline
    x, c_noise, text = torch.randn(2, 3, 16, 16), torch.tensor([-1.0, 0.5]), embeddings(stage, 2)

    def out(changed: dict[str, Embedding], noise: torch.Tensor = c_noise) -> torch.Tensor:
        with torch.no_grad():
            return network(x, noise, network.project(changed))

    expected = out(text)
    assert expected.shape == x.shape
    for name, embedding in text.items():
        padded = embedding.tokens.masked_fill(~embedding.mask[:, :, None], 7.0)
        assert torch.allclose(out(text | {name: replace(embedding, tokens=padded)}), expected, atol=1e-5), "padding"
        assert not torch.allclose(out(text | {name: replace(embedding, tokens=embedding.tokens.flip(0))}), expected, atol=1e-5)
        if embedding.pooled is not None:
            assert not torch.allclose(out(text | {name: replace(embedding, pooled=embedding.pooled.flip(0))}), expected, atol=1e-5)
    assert not torch.allclose(out(text, c_noise + 0.1), expected, atol=1e-5)


def test_every_weight_of_the_baseline_learns(baseline: tuple[StageConfig, Any]) -> None:
    stage, network = baseline
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 3, 16, 16), torch.zeros(2), network.project(embeddings(stage, 2))).float().square().sum().backward()
    idle = [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    network.zero_grad(set_to_none=True)
    assert idle == []


def test_the_time_of_steps_leaves_out_compilation_and_what_is_not_training() -> None:
    def train(images: int, rate: float) -> dict[str, Any]:
        return {"event": "train", "images_seen": images, "images_per_second": rate, "data_wait": 0.25}

    events = [{"event": "start", "images_seen": 0}, train(100, 1.0), {"event": "validation", "images_seen": 100}, train(200, 50.0)]
    found = step_time([*events, train(400, 25.0)])
    assert found.seconds == pytest.approx((2 + 8) * 400 / 300), "the first 100 at the rate of the others"
    assert (found.images, found.data_wait, found.images_per_second) == (400, pytest.approx(0.25), pytest.approx(30))
    with pytest.raises(ValueError, match="two are needed"):
        step_time(events[:2])


def test_variants_and_rates_are_read() -> None:
    text = "wide:stage.network.resolutions=[{channels: 8, blocks: 1}, {channels: 16, blocks: 2}],training.batch_size=8"
    assert parse_variant(text) == ("wide", tuple(text.removeprefix("wide:").rsplit(",", 1)))
    assert parse_rates("1e-3,5e-4", "--rates") == (1e-3, 5e-4) and parse_rates(None, "--rates") == ()
    for wrong in ("wide", "wide:", ":a=b", "a b:c=1", "../x:c=1"):
        with pytest.raises(ValueError, match="--variant="):
            parse_variant(wrong)
    for wrong in ("", "fast", "1e-3,", "1e-3,0.001", "-1"):
        with pytest.raises(ValueError, match="--rates="):
            parse_rates(wrong, "--rates")


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered is forgotten afterwards; runs draw no charts of themselves, which take longer than they do."""
    monkeypatch.setattr(registry, "_parts", Registry()._parts)
    monkeypatch.setattr(tracking, "write_report", lambda root: None)
    monkeypatch.setattr(quality_run, "free", lambda device: None)
    monkeypatch.setattr(quality_run, "FIRST_STEPS", 3)


def test_a_schedule_is_drawn_together_to_the_time(write_config: Any, tmp_path: Path, own_registry: None) -> None:
    overrides = ["training.optimizer={schedule: linear, warmup_images: 16}", "training.preview.every_images=0"]
    train_for(load_config(write_config("run"), overrides), 0.005)
    history = read_history(tmp_path / "run")
    found = step_time(history.events)
    assert 0.05 < found.seconds < 3, "0.3 s were asked for"
    resolved = load_config(tmp_path / "run" / "config.yaml").training
    assert resolved.images == found.images == history.of("validation")[0]["images_seen"]
    assert resolved.optimizer.warmup_images == round(found.images / 4), "16 of 64 images"
    assert len(history.of("validation")) == 1
    assert not (tmp_path / "run" / "first").exists()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, own_registry: None) -> list[RunConfig]:
    """Runs are trained here and now, without the short ones that tell their rate; nobody looks for equal FLOPs. Returns configs."""
    configs: list[RunConfig] = []

    def start(run: Run, folder: Path, device: str, minutes: float) -> Any:
        folder.mkdir(parents=True)
        config = run.config(folder, device)
        configs.append(config)
        code = 0
        try:
            train_for(config, minutes)
        except Exception as error:
            (folder / "output.txt").write_text(f"Traceback\n{error}\n")
            code = 1
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(trainings, "_start", start)
    monkeypatch.setattr(trainings, "end_child", lambda process: None)
    monkeypatch.setattr(quality_run, "_rehearse", lambda *_: 500.0)
    monkeypatch.setattr(quality, "own_flops", lambda stage: 10**6)
    monkeypatch.setattr(quality, "counterpart", lambda stage: Counterpart(as_diffusers(stage.network), 10**6, 10**6))
    return configs


def test_candidates_differ_in_their_network_alone(write_config: Any, in_this_process: list[RunConfig]) -> None:
    told: list[str] = []
    variants = {"weighted": ["training={uncertainty_weighting: true, optimizer: {learning_rate: 0.02}}"]}
    settings = Settings(write_config("run"), minutes=0.001, seeds=1, rates=[0.01], baseline_rates=[1e30, 1e-3], variants=variants)
    result = bench_quality(settings, told.append)
    rows = {row.name: row for row in result.rows}
    runs = [f"{name}, seed 1" for name in ("diffusers, rate 0.001", "t2i-experts, rate 0.01", "weighted, rate 0.02")]
    trials = [f"diffusers, rate {rate}, trial" for rate in ("0.001", "1e+30")]
    assert {*runs, *trials} == {name for name in rows if "mean" not in name}, "a rate is chosen by a run that does not count"
    assert [line.split(":")[0] for line in told] == ["1 of 2", "2 of 2", "1 of 3", "2 of 3", "3 of 3"]
    (failed,) = failures(result)
    assert failed.startswith("diffusers, rate 1e+30, trial: ") and "not finite" in failed
    own, baseline = (rows[f"{name}, mean of 1"] for name in ("t2i-experts, rate 0.01", "diffusers, rate 0.001"))
    assert baseline.ratio is None and own.ratio == pytest.approx(own.more["images/s"] / baseline.more["images/s"])
    assert own.more["difference"] == pytest.approx(own.more["held-out loss"] - baseline.more["held-out loss"])
    assert baseline.more["rate"] == "lowest tried" and "rate" not in own.more
    for name in runs:
        assert 0 < rows[name].more["held-out loss"] < 10 and rows[name].more["images seen"] == 32
    _, _, theirs, ours, weighted = in_this_process
    assert theirs.stage.network.backbone == NAME and weighted.training.uncertainty_weighting
    training = replace(theirs.training, optimizer=replace(theirs.training.optimizer, learning_rate=0.01))
    assert replace(theirs, output="", stage=ours.stage, training=training) == replace(ours, output="")
    assert theirs.stage == replace(ours.stage, network=theirs.stage.network)
    training = replace(weighted.training, uncertainty_weighting=False, optimizer=ours.training.optimizer)
    assert replace(weighted, output="", training=training) == replace(ours, output="")


def test_a_candidate_without_a_rate_at_which_it_learns_is_not_trained_again(write_config: Any, in_this_process: list[RunConfig]) -> None:
    settings = Settings(write_config("run"), minutes=0.001, rates=[1e30, 1e35], baseline=False)
    assert [row.name for row in bench_quality(settings).rows] == [f"t2i-experts, rate {rate}, trial" for rate in ("1e+30", "1e+35")]


def test_losses_are_compared_by_the_spread_of_seeds() -> None:
    a, b = candidates = [Candidate(name, None, (0.1, 0.2, 0.3), 1) for name in ("a", "b")]  # type: ignore[arg-type]
    losses = {(a, 0.1, 0): 0.1, (a, 0.1, 1): 1.0, (a, 0.1, 2): 2.0, (b, 0.2, 0): 9.0, (b, 0.2, 1): 0.5, (b, 0.2, 2): 0.3}
    found: dict[Run, Outcome] = {Run(*run): Trained(1.0, StepTime(100, 10.0, 0.0), loss, 0.1) for run, loss in losses.items()}
    first, second = mean_rows(candidates, found)
    assert first.name == "a, rate 0.1, mean of 2" and first.more["held-out loss"] == 1.5, "without the trial"
    assert first.more["seeds +-"] == pytest.approx(0.5**0.5)
    assert second.more["difference"] == pytest.approx(-1.1)
    assert second.more["over spread"] == pytest.approx(-1.1 / ((0.5 + 0.02) / 2) ** 0.5)
    assert first.more["rate"] == "lowest tried" and "rate" not in second.more


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a shell script what processes are started with instead of Python."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return write


def test_each_run_has_its_device_and_a_failing_one_says_why(
    write_config: Any, python: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python('echo "$CUDA_VISIBLE_DEVICES" "$@"; echo "no memory" >&2; exit 3')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    candidate = Candidate("broken", load_config(write_config("run")), (0.1,), 1)
    run = Run(candidate, 0.1, 3)
    (outcome,) = train_all([run], ["1"], tmp_path, 2, keep=True, tell=lambda line: None).values()
    assert isinstance(outcome, Failed) and outcome.why == "no memory"
    folder = tmp_path / "broken-rate-0.1-seed-3"
    said = (folder / "output.txt").read_text().splitlines()[0]
    assert said == f"7 -m t2i_experts.bench.quality_run {folder / 'config.yaml'} 2"
    training = load_config(folder / "config.yaml").training
    assert (training.seed, training.optimizer.learning_rate, training.device) == (3, 0.1, None)
    python("echo a warning; kill -9 $$")
    (outcome,) = train_all([Run(candidate, 0.1, 4)], ["cpu"], tmp_path, 2, keep=False, tell=lambda line: None).values()
    assert isinstance(outcome, Failed) and outcome.why == "ended by SIGKILL"
    assert not list(tmp_path.glob("*seed-4"))


def test_what_runs_ends_with_the_benchmark(write_config: Any, python: Any, tmp_path: Path) -> None:
    """With all that it has started, when the benchmark is told to stop."""
    python("sleep 100 & echo $! $$; wait")
    run = Run(Candidate("long", load_config(write_config("run")), (0.1,), 1), 0.1, 1)
    said = tmp_path / run.folder / "output.txt"

    def stop() -> None:
        while not (said.exists() and said.read_text().endswith("\n")):
            time.sleep(0.01)
        time.sleep(0.5)  # what it says can come before it is known to have started: then it ends when this process ends, as below
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
        train_all([run], ["cpu"], tmp_path, 2, keep=True, tell=lambda line: None)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    for number in map(int, said.read_text().split()):
        assert _ends(number)


def test_a_run_ends_when_the_benchmark_is_killed(tmp_path: Path) -> None:
    child = """
import os, time
from t2i_experts.bench.children import end_with_parent
end_with_parent()
print(os.getpid(), flush=True)
time.sleep(100)
"""
    parent = f"""
import os, sys, time
from pathlib import Path
from t2i_experts.bench.children import start_child
output = Path({str(tmp_path / "output.txt")!r})
start_child([sys.executable, "-c", {child!r}], os.environ, output)
while not output.read_text().endswith("\\n"):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", parent]).returncode == -signal.SIGKILL
    assert _ends(int((tmp_path / "output.txt").read_text()))


def _ends(process: int) -> bool:
    """Whether a process is gone within half a minute, or waits for nothing but to be asked how it ended."""
    for _ in range(3000):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_candidates_change_devices() -> None:
    candidates = [Candidate(name, None, (0.1,), 1) for name in ("a", "b")]  # type: ignore[arg-type]
    runs = [Run(candidate, 0.1, seed) for seed in (0, 1) for candidate in candidates]

    def shared(*devices: str) -> dict[str, list[str]]:
        return {device: [f"{run.candidate.name}{run.seed}" for run in queue] for device, queue in trainings._queues(runs, devices).items()}

    assert shared("0") == {"0": ["a0", "b0", "a1", "b1"]}
    assert shared("0", "1") == {"0": ["a0", "b1"], "1": ["b0", "a1"]}
    assert shared("0", "1", "2", "3") == {"0": ["a0"], "1": ["b0"], "2": ["a1"], "3": ["b1"]}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"minutes": 0.0}, "--minutes=0.0"),
        ({"seeds": 0}, "--seeds=0"),
        ({"devices": ["tpu"]}, "--devices='tpu'.*cpu"),
        ({"devices": ["cpu", "0"]}, "--devices='cpu,0'"),
        ({"out": Path(__file__)}, "--out=.*exists"),
        ({"out": Path(__file__).parent}, "--out=.*exists"),
        ({"overrides": ["output=x"]}, "output=x' would be ignored"),
        ({"overrides": ["training.validation={every_images: 3}"]}, "would be ignored"),
        ({"overrides": ["training={seed: 3}"]}, "the benchmark decides training.seed"),
        ({"overrides": ["data.validation=null", "training.validation.images=3"]}, "data.validation"),
        ({"overrides": ["data.train=[nowhere]"]}, "nowhere"),
        ({"overrides": [OTHER_NETWORK]}, "backbone='other'.*--alone"),
        ({"baseline": False, "baseline_rates": [1.0]}, "--baseline-rates"),
        ({"baseline": False, "variants": {"loud": ["stage.noise.std=2"]}}, "--variant loud: .*held-out loss"),
        ({"baseline": False, "variants": {"other": ["training.validation={images: 3}"]}}, "--variant other: training.validation changes"),
        ({"baseline": False, "variants": {"odd": ["training.colour=2"]}}, "--variant odd: .*colour"),
        ({"baseline": False, "variants": {"diffusers": ["training.batch_size=2"]}}, "taken"),
    ],
)
def test_wrong_settings(write_config: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        bench_quality(Settings(write_config("run"), **settings))
