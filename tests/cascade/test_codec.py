"""Codecs: a VAE of diffusers against diffusers itself, whole runs on its latents, and pixels, which no codec touches.

In one file, since diffusers takes seconds to import.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.codec import PIXEL, Codec, blank_codec, latent_shape, load_codec
from t2i_experts.cascade.model_folder import load_model, save_model
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.stage import Stage, build_network
from t2i_experts.cli import preflight
from t2i_experts.cli.app import main
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import CodecConfig, EncoderConfig, SamplingConfig, StageConfig, check_stage, load_config
from t2i_experts.shards.reader import Sample, ShardReader
from t2i_experts.training.measure import measure_training
from t2i_experts.training.memory import estimate_sampling, estimate_training
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import validate
from t2i_experts.types import Conditioning

WEIGHTS = "diffusion_pytorch_model.safetensors"
WriteConfig = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny autoencoder of 4 channels and factor 4, whose latents are spread wider than its pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.3,
        scaling_factor=0.4,
    )
    folder = tmp_path_factory.mktemp("vae") / "autoencoder"
    model.save_pretrained(folder)
    return folder


def edited(folder: Path, copy: Path, **changes: object) -> Path:
    """A copy of an autoencoder whose config.json says something else."""
    shutil.copytree(folder, copy)
    edit(copy, **changes)
    return copy


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def latent(stage: StageConfig, model: Path | str, **more: Any) -> StageConfig:
    return replace(stage, codec=CodecConfig("autoencoder_kl", str(model), **{"channels": 4, "factor": 4, **more}))


@pytest.fixture
def stage(stage_config: StageConfig, vae: Path) -> StageConfig:
    return latent(stage_config, vae)


def pictures(count: int = 3, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# The codec


NORMALISATIONS: list[tuple[dict[str, Any], Any, Any]] = [
    ({}, 0.3, 0.4),
    ({"shift_factor": None}, 0.0, 0.4),
    ({"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 4.0, 8.0]}, [0.1, 0.2, 0.3, 0.4], [1, 1 / 2, 1 / 4, 1 / 8]),
]


@pytest.mark.parametrize(("config", "shift", "scale"), NORMALISATIONS, ids=["shift", "no shift", "mean and deviation"])
def test_it_is_diffusers_own_scaled_to_sigma_data(
    stage_config: StageConfig, vae: Path, tmp_path: Path, config: dict[str, Any], shift: Any, scale: Any
) -> None:
    from diffusers import AutoencoderKL

    folder = edited(vae, tmp_path / "vae", **config)
    stage = replace(latent(stage_config, folder), noise=replace(stage_config.noise, sigma_data=0.7))
    model: Any = AutoencoderKL.from_pretrained(folder).eval()
    codec, images = load_codec(stage), pictures(height=8)
    mean, factor = (torch.tensor(value).reshape(-1, 1, 1) for value in (shift, scale))
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        mode, sample = posterior.mode(), posterior.sample(seeded())
        assert not torch.allclose(mode, sample, atol=0.1)
        for z, latents in ((mode, codec.encode(images)), (sample, codec.encode(images, seeded()))):
            assert latents.shape == (3, *latent_shape(stage, (16, 8))) == (3, 4, 2, 4)
            torch.testing.assert_close(latents, (z - mean) * factor * 0.7)
            torch.testing.assert_close(codec.decode(latents), model.decode(z).sample, rtol=1e-4, atol=1e-5)


def test_weights_under_the_names_of_old_autoencoders_are_read(stage: StageConfig, vae: Path, tmp_path: Path) -> None:
    """Those of Stable Diffusion's first ones, whose attention was called otherwise."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        return next((name.replace(f".{new}.", f".{before}.") for new, before in old.items() if f".{new}." in name), name)

    folder = edited(vae, tmp_path / "vae")
    weights = load_file(folder / WEIGHTS)
    assert sum(renamed(name) != name for name in weights) == 16
    save_file({renamed(name): tensor for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    images = pictures()
    assert torch.equal(load_codec(latent(stage, folder)).encode(images), load_codec(stage).encode(images))


def test_one_of_the_hub_is_fetched_from_its_folder_and_goes_by_its_name(
    stage_config: StageConfig, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "own/none":
            raise OSError("404\nnot found")
        return str(vae / Path(file).name)

    monkeypatch.setattr("t2i_experts.cascade.autoencoder_kl.hf_hub_download", download)
    for model, inside in (("own/thing", ""), ("own/thing/some/vae", "some/vae/")):
        asked.clear()
        stage = latent(stage_config, model)
        codec = load_codec(stage)
        assert asked == [("own/thing", f"{inside}config.json"), ("own/thing", f"{inside}{WEIGHTS}")]
        assert torch.equal(codec.encode(pictures()), load_codec(latent(stage_config, vae)).encode(pictures()))
    folder, conditioner = tmp_path / "model", TextConditioner.from_config(stage.encoders)
    save_model(folder, stage, SamplingConfig(), build_network(stage).state_dict(), conditioner, codec=codec)
    assert json.loads((folder / "base64" / "config.json").read_text())["codec"]["model"] == "own/thing/some/vae"
    assert not (folder / "vae").exists()
    with pytest.raises(ValueError, match=r"^codec: codec model 'own/none' is not .*, and the hub did not give it: 404 not found$"):
        load_codec(latent(stage_config, "own/none"))


def test_how_many_are_computed_together_changes_nothing(stage: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, images = load_codec(stage), pictures(5)
    encoded = codec.encode(images, seeded())
    monkeypatch.setattr("t2i_experts.cascade.autoencoder_kl.PIXELS", 600)  # two pictures
    rows: list[int] = []
    assert codec.model is not None
    codec.model.encoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))  # type: ignore[union-attr,operator]
    torch.testing.assert_close(codec.encode(images, seeded()), encoded)
    assert rows == [2, 2, 1]
    torch.testing.assert_close(codec.decode(encoded), torch.cat([codec.decode(row[None]) for row in encoded]))


def test_it_computes_in_its_own_dtype_whatever_is_around_it(stage: StageConfig) -> None:
    codec, images = load_codec(stage), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        encoded = codec.encode(images)
        decoded = codec.decode(encoded)
    assert torch.equal(encoded, codec.encode(images)) and torch.equal(decoded, codec.decode(encoded))
    half = load_codec(replace(stage, codec=replace(stage.codec, dtype="bfloat16")))
    assert half.model is not None and {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.encode(images).dtype == half.decode(encoded).dtype == torch.float32
    difference = (half.encode(images) - encoded).abs().max()
    assert 0 < difference < 0.05


def test_pixels_are_left_alone(stage_config: StageConfig) -> None:
    """Not even copied, and nothing is drawn for them: eps is what it would be without any codec."""
    codec, images, generator = load_codec(stage_config), pictures(), seeded()
    assert codec.encode(images, generator) is images and codec.decode(images) is images
    assert torch.equal(generator.get_state(), seeded().get_state())
    assert latent_shape(stage_config, (20, 12)) == (3, 12, 20)
    assert (codec.model, codec.files) == (None, ())


# The run


class Recorder:
    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.x, self.sigma = x, sigma
        return x


def test_training_sees_samples_of_the_posterior_and_validation_its_mode(stage: StageConfig, shards: Path) -> None:
    codec = load_codec(stage)
    conditioner = TextConditioner.from_config(stage.encoders)

    def task(codec: Codec) -> DiffusionTask:
        return DiffusionTask(stage, conditioner, seed=3, device=torch.device("cpu"), codec=codec)

    asked: list[torch.Generator | None] = []

    class Asked:
        channels, factor, model, files = codec.channels, codec.factor, codec.model, codec.files
        decode = codec.decode

        def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            asked.append(generator)
            return codec.encode(images, generator)

    samples = [Sample(i, f"{i}", (pictures(8)[i] * 127 + 128).byte(), "a red cube", {}) for i in range(8)]
    first, again = Recorder(), Recorder()
    spying = task(Asked())  # type: ignore[arg-type]
    losses, _ = spying.losses(first, spying.collate()(samples))
    torch.manual_seed(99)
    task(codec).losses(again, task(codec).collate()(samples))
    assert torch.equal(first.x, again.x) and first.x.shape == (8, 4, 4, 4)
    assert losses.shape == (8,) and len(asked) == 1 and asked[0] is not None
    reader = ShardReader([shards / "validation"], size=16, seed=0)
    found = [validate(again, spying, reader, images=8, bins=2, batch_size=size).losses for size in (8, 3)]
    torch.testing.assert_close(*found)
    assert asked[1:] == [None] * 4


def test_a_run_on_latents_resumes_exactly_and_its_model_draws(
    vae: Path, write_config: WriteConfig, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(vae, own)
    codec = ("stage.codec.kind=autoencoder_kl", f"stage.codec.model={own}", "stage.codec.channels=4", "stage.codec.factor=4")
    whole, stopped = (("train", write_config(name), *codec, "training.images=32", "--quiet") for name in ("whole", "stopped"))
    code, _, err = cli(*whole)
    assert code == 0, err
    assert len(err.splitlines()) == 3  # what is trained, that it is finished, how to draw: diffusers says nothing
    assert cli(*stopped, "training.max_minutes=1e-9")[0] == 0
    assert cli(*stopped)[0] == 0
    newest = Path("checkpoints/000000000032")
    for name in ("network.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "whole" / newest / name).read_bytes() == (tmp_path / "stopped" / newest / name).read_bytes()
    assert "autoencoder_kl" in (tmp_path / "whole" / "report.md").read_text()
    with Image.open(tmp_path / "whole/previews/000000000032.png") as sheet:
        assert sheet.size == (34, 16)  # two pictures

    def spoil_weights() -> None:
        weights = {name: tensor * 1.01 for name, tensor in load_file(own / WEIGHTS).items()}
        save_file(weights, own / WEIGHTS, metadata={"format": "pt"})

    for spoil in (lambda: edit(own, scaling_factor=0.5), spoil_weights):
        shutil.copytree(vae, own, dirs_exist_ok=True)
        spoil()
        code, _, err = cli(*whole, "training.images=64")
        assert (code, len(err.splitlines())) == (2, 1) and "other weights or another normalisation of the codec" in err

    shutil.rmtree(own)  # the model folder has all that it needs
    model = tmp_path / "whole" / "model"
    assert json.loads((model / "base64" / "config.json").read_text())["codec"]["model"] == "./vae"
    assert (model / "vae" / WEIGHTS).read_bytes() == (vae / WEIGHTS).read_bytes()
    generate = ("generate", "a red cube", "--model", model, "--device", "cpu", "--out", tmp_path / "cube.png")
    code, out, _ = cli(*generate, "--json")
    assert code == 0
    assert json.loads(out)["model"]["codec"] == "autoencoder_kl"
    with Image.open(tmp_path / "cube.png") as picture:
        assert picture.size == (16, 16)
    code, _, err = cli(*generate, "--threshold", 0.99)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--threshold=0.99 needs pictures in [-1, 1], but this model denoises latents" in err


def test_a_model_folder_keeps_its_codec_once_and_draws_every_bucket(stage: StageConfig, vae: Path, tmp_path: Path) -> None:
    stage = replace(stage, buckets=[[16, 16], [24, 8]])
    torch.manual_seed(0)
    network = build_network(stage)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    conditioner, folder = TextConditioner.from_config(stage.encoders), tmp_path / "model"
    for _ in range(2):
        kept = (folder / "vae" / WEIGHTS).stat().st_ino if folder.exists() else None
        save_model(folder, stage, SamplingConfig(steps=2), network.state_dict(), conditioner, codec=load_codec(stage))
    assert (folder / "vae" / WEIGHTS).stat().st_ino == kept
    loaded = load_model(folder)
    again = tmp_path / "again"
    save_model(
        again,
        loaded.stages["base64"].config,
        loaded.stages["base64"].sampling,
        network.state_dict(),
        loaded.conditioner,
        codec=loaded.stages["base64"].codec,
    )
    shutil.rmtree(folder)
    pipeline = CascadePipeline.from_pretrained(again, device="cpu")
    assert pipeline.base.noise_shape == (4, 4, 4)
    wide = pipeline(["a red cube", "x"], shape=(24, 8))
    assert wide.shape == (2, 3, 8, 24)
    alone = pipeline("x", indices=[1], shape=(24, 8))
    assert (alone[0].int() - wide[1].int()).abs().max() <= 2
    for codec in (stage.codec, CodecConfig("mine")):  # the latter's latents have the shape of pixels
        with pytest.raises(AssertionError, match="needs the codec of its config"):
            Stage(replace(stage, codec=codec), network, SamplingConfig())


# Beside the run


def test_doctor_counts_it(vae: Path, write_config: WriteConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    codec = ["stage.codec.kind=autoencoder_kl", f"stage.codec.model={vae}", "stage.codec.channels=4", "stage.codec.factor=4"]
    config = load_config(write_config("run"), codec)
    estimated, measured = estimate_training(config), measure_training(config)
    assert estimated.codec == sum(tensor.nbytes for tensor in load_file(vae / WEIGHTS).values()) + 2 * 4
    assert estimated.total == pytest.approx(measured.peak, rel=0.15)
    # Network and encoders take next to nothing of these large pictures, and nearly all is the decoder's.
    sampling = [estimate_sampling(replace(config.stage, size=512), images) for images in (1, 8)]
    assert sampling[0].activations > 8 * 4 * 512**2 * 2
    assert sampling[1].activations < 5 * sampling[0].activations
    (found,) = preflight.codec(config)
    assert found.value["found"] == str(vae) and found.value["bytes"] == (vae / WEIGHTS).stat().st_size and not found.problem
    edited(vae, tmp_path / "other", _class_name="VQModel")
    (other,) = preflight.codec(load_config(write_config("run"), [*codec, f"stage.codec.model={tmp_path / 'other'}"]))
    assert "config.json is of VQModel; the codec autoencoder_kl reads AutoencoderKL; put the autoencoder there" in other.problem
    absent = [*codec, "stage.codec.model=nobody/nothing/vae"]
    assert blank_codec(load_config(write_config("run"), absent).stage) is None
    with pytest.raises(SystemExit) as exit:
        main(["doctor", str(write_config("run")), *absent, "--no-shards", "--json", "--measure"])
    told = json.loads(capsys.readouterr().out)
    assert exit.value.code == 1
    first, second = told["problems"]
    assert first.startswith(f"codec: hf download nobody/nothing vae/config.json vae/{WEIGHTS}, or set stage.codec.model")
    assert second == "--measure: get the codec first"
    assert told["memory"]["codec"] == "unknown"


def test_stats_of_pixels_are_not_held_against_latents(
    vae: Path, write_config: WriteConfig, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latent = write_config("latent")
    codec = f"  codec: {{kind: autoencoder_kl, model: {vae}, channels: 4, factor: 4}}\n  noise: {{sigma_data: 3.0}}\n"
    latent.write_text(latent.read_text().replace("  encoders:", f"{codec}  encoders:"))
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as exit:
            main(["shards", "stats", str(shards / "train"), "--config", str(latent), *more])
        captured = capsys.readouterr()
        assert not exit.value.code and "warning" not in captured.err
        assert json.loads(captured.out)["sigma_data_fits"] is None if more else "says nothing about them" in captured.err


# What is wrong


def lacking(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop("decoder.conv_in.bias")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: shutil.rmtree(folder), "codec: codec model '{folder}' is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "codec: {folder}/config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json is of no network of diffusers; the codec autoencoder_kl"),
        (lambda folder: (folder / "config.json").write_text('{"_class_name": "VQModel"}'), "config.json is of VQModel"),
        (
            lambda folder: (folder / "config.json").write_text('{"_class_name": "AutoencoderKL", "in_channels": 4}'),
            "in_channels=4, out_channels=3; pictures have 3",
        ),
        (
            lambda folder: edit(folder, latents_mean=[0.1, 0.2, 0.3], latents_std=[1, 1, 1]),
            "the autoencoder has 4 channels, but 3 latents_mean and 3 latents_std",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), f"lacks {WEIGHTS}"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"abc"), "the autoencoder in {folder} cannot be loaded"),
        (lacking, "the autoencoder in {folder} lacks the weights ['decoder.conv_in.bias'] (1 in all)"),
    ],
)
def test_an_autoencoder_that_is_none(
    stage_config: StageConfig, vae: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], spoil: Callable[[Path], Any], said: str
) -> None:
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    spoil(folder)
    with pytest.raises(ValueError) as caught:
        load_codec(latent(stage_config, folder))
    assert said.format(folder=folder) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ({"channels": 16}, "codec: channels=16, but '{vae}' has 4"),
        ({"factor": 2}, "codec: factor=2, but '{vae}' has 4"),
        ({"kind": "autoencoder_lk"}, "codec: unknown codec 'autoencoder_lk'; did you mean 'autoencoder_kl'?"),
        ({"model": "nothing"}, "codec: codec model 'nothing' is neither a folder nor a hub id of the form owner/name or owner/name/folder"),
    ],
)
def test_a_codec_that_is_not_what_the_config_says(stage: StageConfig, vae: Path, codec: dict[str, Any], said: str) -> None:
    wrong = replace(stage, codec=replace(stage.codec, **codec))
    for make in (load_codec, blank_codec)[: 1 if "model" in codec else 2]:
        with pytest.raises(ValueError) as caught:
            make(wrong)
        assert said.format(vae=vae) in str(caught.value)


def test_without_diffusers_it_says_how_to_install_it(stage: StageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"codec: the codec autoencoder_kl needs diffusers: pip install 't2i-experts\[latents\]'"):
        load_codec(stage)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": CodecConfig(model="x")}, "codec.model='x' would be ignored: codec.kind=pixel denoises pictures as they are"),
        ({"codec": CodecConfig(channels=4)}, "codec.channels=4 would be ignored"),
        ({"codec": CodecConfig(factor=8)}, "codec.factor=8 would be ignored"),
        ({"codec": CodecConfig("autoencoder_kl")}, "codec.model=None: missing mandatory value of kind autoencoder_kl"),
        ({"codec": CodecConfig("autoencoder_kl", "x", channels=0)}, "codec.channels=0 must be positive"),
        ({"codec": CodecConfig("autoencoder_kl", "x", 4, 3)}, "codec.factor=3 must divide the sides of all pictures; received 16 x 16 px"),
        (
            {"codec": CodecConfig("autoencoder_kl", "x", 4, 16)},
            "size=16 must be a multiple of 32 for 2 resolutions and patch_size 1, and",
        ),
        (
            {"codec": CodecConfig("autoencoder_kl", "x", 4, 4), "buckets": [[16, 16], [20, 12]]},
            "buckets[1]=[20, 12]: both must be multiples of 8 for 2 resolutions and patch_size 1, and codec.factor 4",
        ),
        (
            {"codec": CodecConfig("mine", channels=4, factor=4), "name": "vae"},
            "name would take the folder 'vae' of a model folder, which is the codec's; rename it",
        ),
        (
            {"codec": CodecConfig("mine", channels=4, factor=4), "encoders": {"x": EncoderConfig("vae_image", "x", width=4)}},
            "encoders.x.kind would take the folder 'vae'",
        ),
    ],
)
def test_a_config_that_cannot_be(stage_config: StageConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_stage(replace(stage_config, **changes), prefix="")
    assert said in str(caught.value)


def test_latents_are_not_thresholded(stage: StageConfig, write_config: WriteConfig) -> None:
    codec = ["stage.codec.kind=mine", "stage.codec.channels=4", "stage.codec.factor=4"]
    with pytest.raises(ValueError, match=r"^sampling\.threshold=0\.9 needs pictures in \[-1, 1\], .* \(codec mine\); set it to 0"):
        load_config(write_config("run"), [*codec, "sampling.threshold=0.9"])
    drawn = Stage(stage, Recorder(), SamplingConfig(), load_codec(stage))
    nothing = TextConditioner.from_config(stage.encoders).null()
    with pytest.raises(ValueError, match=r"threshold=0\.9 needs pictures"):
        drawn.sample(torch.zeros(1, 4, 4, 4), nothing, nothing, SamplingConfig(threshold=0.9))


# What there was before there were codecs


def test_folders_and_checkpoints_without_a_codec_are_of_pixels(model_folder: Path, write_config: WriteConfig, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "old")
    path = tmp_path / "old" / "base64" / "config.json"
    tree = json.loads(path.read_text())
    assert tree.pop("codec") == {"kind": "pixel", "model": None, "channels": 3, "factor": 1, "dtype": "float32"}
    path.write_text(json.dumps(tree))
    assert load_model(tmp_path / "old").stages["base64"].config.codec == CodecConfig()
    command = ["train", str(write_config("run")), "training.preview.every_images=0", "--quiet"]
    with pytest.raises(SystemExit):
        main([*command, "training.images=8"])
    facts = tmp_path / "run/checkpoints/000000000008/state.json"
    tree = json.loads(facts.read_text())
    assert tree.pop("codec") is None and tree["config"]["stage"].pop("codec")
    facts.write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as exit:
        main([*command, "training.images=16"])
    assert not exit.value.code


def test_the_default_codec_is_that_of_pixels(stage_config: StageConfig) -> None:
    task = DiffusionTask(stage_config, TextConditioner.from_config(stage_config.encoders), seed=0, device=torch.device("cpu"))
    assert task.codec is PIXEL
