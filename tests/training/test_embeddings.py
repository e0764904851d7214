"""Training from stored embeddings is the training that runs the encoders, and embeddings of other encoders are refused before it starts."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cli.app import main
from t2i_experts.conditioning.clip import CLIPTextEncoder
from t2i_experts.conditioning.t5 import T5Encoder
from t2i_experts.config import RunConfig, load_config
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.writer import ShardWriter
from t2i_experts.training.embeddings import open_conditioner, stored_embeddings
from t2i_experts.training.trainer import Trainer
from t2i_experts.training.validation import validate
from t2i_experts.types import Conditioning

WriteConfig = Callable[[str], Path]
SAYS_NOTHING = "\u200b"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def reading(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """A denoiser whose answer depends on every text."""
    text = torch.stack([conditioning.embeddings[name].tokens.square().mean(dim=(1, 2)) for name in ("t5", "clip_text")]).sum(dim=0)
    return x * text[:, None, None, None]


@pytest.fixture
def embedded(tmp_path: Path, write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Overrides for a run on shards with embeddings; a quarter of the captions says nothing."""
    config = write_config("embed")
    for name, count in (("train", 16), ("validation", 4)):
        with ShardWriter(tmp_path / f"plain-{name}", samples_per_shard=6) as writer:
            for i in range(count):
                picture = io.BytesIO()
                Image.new("RGB", (16, 16), (16 * i, 255 - 16 * i, 99)).save(picture, "PNG")
                writer.write(
                    f"{i:03d}",
                    picture.getvalue(),
                    "png",
                    ["red cube " * (i % 5) + str(i), SAYS_NOTHING if i % 2 else "a long caption " * 20],
                )
        out = tmp_path / name
        assert run("shards", "embed", tmp_path / f"plain-{name}", "--config", config, "--out", out, "--batch-size", 5, "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["complete"] and told["captions"] == 2 * count and told["samples"] == count
        assert told["encoders"]["t5"]["bytes"] > 2 * 16 * told["encoders"]["t5"]["tokens"] > 0
        assert told["hash"] == json.loads((out / "manifest.json").read_text())["hash"]
    return [f"data.train=[{tmp_path / 'train'}]", f"data.validation={tmp_path / 'validation'}", "training.images=16"]


def configs(write_config: WriteConfig, overrides: list[str], *more: str) -> tuple[RunConfig, RunConfig]:
    """The run online and from stored embeddings."""
    return (
        load_config(write_config("online"), [*overrides, *more]),
        load_config(write_config("stored"), [*overrides, *more, "data.embeddings=stored"]),
    )


def test_batches_and_runs_are_those_of_running_the_encoders(
    write_config: WriteConfig, embedded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["training.log_every_images=8", "training.validation.every_images=8", "training.preview.every_images=16"]
    online, stored = configs(write_config, embedded, *settings)
    trainers = [Trainer(config, progress=False) for config in (online, stored)]
    for config, trainer in zip((online, stored), trainers, strict=True):
        assert trainer.task.conditioner.names == list(config.stage.encoders)
    both = [trainer._batches() for trainer in trainers]
    for _ in range(2):
        a, b = (next(batches) for batches in both)
        assert a.keys == b.keys
        found = [t.task.conditioner.encode(x.tokens, t.task.images(x.images), x.drops) for t, x in zip(trainers, (a, b), strict=True)]
        dropped = {name: drops.any().item() for name, drops in b.drops.items()}
        assert any(dropped.values()) and b.tokens["t5"].blank.any()
        for name, expected in found[0].embeddings.items():
            embedding = found[1].embeddings[name]
            assert torch.equal(embedding.mask, expected.mask)
            torch.testing.assert_close(embedding.tokens, expected.tokens, rtol=2**-8, atol=1e-5)
            assert (expected.pooled is None) == (embedding.pooled is None)
            if expected.pooled is not None:
                torch.testing.assert_close(embedding.pooled, expected.pooled, rtol=2**-8, atol=1e-5)
    measured: list[Tensor] = []  # on captions of other images, and on their own
    for trainer in trainers:
        assert trainer.validation is not None
        for shuffled in (True, False):
            loss = validate(reading, trainer.task, trainer.validation, images=4, bins=2, batch_size=3, shuffled=shuffled)
            measured.append(loss.losses)
    torch.testing.assert_close(measured[2:], measured[:2], rtol=1e-2, atol=0)
    assert not torch.allclose(measured[0], measured[1], rtol=0.1)
    trainers[0].run()

    def refuse(*arguments: object) -> None:
        raise AssertionError("a text encoder was run")

    monkeypatch.setattr(T5Encoder, "encode", refuse)
    monkeypatch.setattr(CLIPTextEncoder, "encode", refuse)
    trainers[1].run()
    monkeypatch.undo()
    events = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("online", "stored")]
    for kind in ("train", "validation"):
        losses = [[event["loss"] for event in log if event["event"] == kind] for log in events]
        assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    (picture,) = CascadePipeline.from_pretrained(tmp_path / "stored" / "model", device="cpu")(["a red cube"], seed=0)  # it has encoders
    assert picture.shape == (3, 16, 16)
    further = load_config(write_config("online"), [*embedded, *settings, "training.images=24", "data.embeddings=stored"])
    going_on = Trainer(further, progress=False)
    assert going_on.resumed_from is not None  # a run may change from one to the other
    going_on.run()
    assert (tmp_path / "stored" / "previews" / "000000000016.png").is_file()


def test_other_processes_than_the_main_one_load_no_text_encoder(
    write_config: WriteConfig, embedded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = configs(write_config, embedded)
    reader = ShardReader(config.data.train, size=16, seed=0, embeddings=stored_embeddings(config))

    def refuse(*arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(T5Encoder, "load", refuse)
    monkeypatch.setattr(CLIPTextEncoder, "load", refuse)
    conditioner = open_conditioner(config, reader.embeddings, None, device=torch.device("cpu"), main_process=False)
    assert {name: conditioner.fingerprint(name) for name in ("t5", "clip_text")} == {r.name: r.fingerprint for r in reader.embeddings}
    assert conditioner.names == list(config.stage.encoders)


def test_what_is_not_theirs_is_refused_before_it_starts(
    write_config: WriteConfig, embedded: list[str], tmp_path: Path, t5_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*overrides: str) -> str:
        capsys.readouterr()
        assert run("train", write_config("refused"), *embedded, "data.embeddings=stored", *overrides) == 2
        assert not (tmp_path / "refused").exists()
        return capsys.readouterr().err

    other = tmp_path / "t5"
    shutil.copytree(t5_folder, other)
    moved = load_config(write_config("moved"), [*embedded, "data.embeddings=stored", f"stage.encoders.t5.model={other}"])
    Trainer(moved, progress=False)  # the same weights elsewhere
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    message = refused(f"stage.encoders.t5.model={other}")
    assert str(t5_folder) in message and str(other) in message and "t5.fingerprint is " in message and "data.embeddings=online" in message
    assert "clip_text.max_tokens is 24 there and 20 here" in refused("stage.encoders.clip_text.max_tokens=20")
    assert "plain-train holds no embeddings of the encoders t5, clip_text" in refused(f"data.train=[{tmp_path / 'plain-train'}]")
    assert "plain-validation holds no embeddings" in refused(f"data.validation={tmp_path / 'plain-validation'}")
    config = write_config("other-validation")
    again = ["shards", "embed", tmp_path / "plain-validation", f"stage.encoders.t5.model={other}", "--config", config]
    assert run(*again, "--out", tmp_path / "by-other") == 0
    assert "data.validation=" in (message := refused(f"data.validation={tmp_path / 'by-other'}")) and "t5.fingerprint" in message
    message = refused("data.embeddings=offline")
    assert "data.embeddings" in message and "online" in message


def test_wrong_input_of_the_command(write_config: WriteConfig, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = write_config("run"), tmp_path / "out"
    for arguments, complaint in (
        ([tmp_path / "none", "--config", config, "--out", out], "shard folder not found"),
        ([shards / "train", "--config", config, "--out", out, "--batch-size", 0], "--batch-size=0 must be at least 1"),
        ([shards / "train", "--config", config, "--out", out, "--rank", 3, "--world-size", 2], "--rank=3 must lie in"),
        ([shards / "train", "--config", config, "--out", out, "--device", "gpu9"], "--device gpu9 is not to be had here"),
        ([shards / "train", "--config", config, "--out", shards / "train"], "is the folder itself"),
        ([shards / "train", "--config", tmp_path / "none.yaml", "--out", out], "none.yaml"),
        ([shards / "train", "stage.encoders.t5.width=17", "--config", config, "--out", out], "encoders.t5.width=17, but"),
        ([shards / "train", "--out", out], "--config"),
    ):
        assert run("shards", "embed", *arguments) == 2
        told = capsys.readouterr()
        assert complaint in told.err and "Traceback" not in told.err and not told.out
        assert not out.exists()
