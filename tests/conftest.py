"""For all tests: one thread a process, no network, no plugins, `gpu` tests only where there is CUDA; a tiny world of random weights.

`t5_folder` and `clip_folder` hold encoders, `model_folder` a model that generates, and `write_config` configs of runs that take seconds.
`tar_server` serves shards over HTTP.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from t2i_experts.config import StageConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["T2I_PLUGINS"] = "0"  # what else is installed here is not under test

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    """Refuses connections to other machines; processes on this one may still talk to each other."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL):
            raise AssertionError(f"a test tried to reach {address}: tests must not use the network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")


CAPTIONS = [
    f"a {colour} {shape} on the {side} of {n} dogs & cafés"
    for colour in ("red", "green")
    for shape in ("apple", "cube")
    for side in ("left", "right")
    for n in range(9)
]


def write_t5(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """A random T5 encoder with a vocabulary that falls back to bytes."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=330, model_type="unigram", byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    torch.manual_seed(seed)
    config = T5Config(vocab_size=448, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path, *, merges: list[str] | None = None, seed: int = 0) -> Path:
    """A random open_clip model; with `merges`, it brings its own small vocabulary."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    if merges is not None:
        (folder / "merges.txt.gz").write_bytes(gzip.compress("\n".join(["#", *merges]).encode(), mtime=0))
        text |= {"vocab_size": 512 + len(merges) + 2, "tokenizer_kwargs": {"bpe_path": "merges.txt.gz"}}
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    model_config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**model_config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "model")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "model", merges=["r e", "re d</w>", "a p", "ap p", "app l", "appl e</w>"])


@pytest.fixture(scope="session")
def stage_config(t5_folder: Path, clip_folder: Path) -> StageConfig:
    from t2i_experts.config import EncoderConfig, NetworkConfig, ResolutionSpec, StageConfig

    return StageConfig(
        size=16,
        network=NetworkConfig(
            [ResolutionSpec(8, 1), ResolutionSpec(16, 1, True, True)], embedding_channels=16, context_channels=16, head_channels=8
        ),
        encoders={
            "t5": EncoderConfig("t5", str(t5_folder), width=16, max_tokens=32),
            "clip_text": EncoderConfig("clip_text", str(clip_folder), width=16, pooled_width=12, max_tokens=24),
            "clip_image": EncoderConfig("clip_image", str(clip_folder), width=12, pooled_width=12, max_tokens=1),
        },
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, stage_config: StageConfig) -> Path:
    """A model folder with random weights that do something."""
    import torch

    from t2i_experts.cascade.model_folder import save_model
    from t2i_experts.cascade.stage import build_network
    from t2i_experts.conditioning.conditioner import TextConditioner
    from t2i_experts.config import SamplingConfig

    torch.manual_seed(0)
    network = build_network(stage_config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    conditioner = TextConditioner.from_config(stage_config.encoders)
    save_model(folder, stage_config, SamplingConfig(steps=4, guidance=3.0), network.state_dict(), conditioner)
    return folder


NETWORK = """
    resolutions:
      - {channels: 8, blocks: 1}
      - {channels: 16, blocks: 1, self_attention: true, cross_attention: true}
    embedding_channels: 16
    context_channels: 16
    head_channels: 8
"""


def write_shards(folder: Path, count: int, seed: int) -> None:
    """Little pictures of one colour, each with two captions."""
    import numpy as np
    from PIL import Image

    from t2i_experts.shards.writer import ShardWriter

    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for i in range(count):
            pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            writer.write(f"{i:06d}", data.getvalue(), "png", [f"a red cube {i}", f"picture {i}"], {})


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", 40, seed=0)
    write_shards(root / "validation", 8, seed=1)
    return root


def run_config(output: Path, shards: Path, t5_folder: Path, clip_folder: Path) -> str:
    """The config of a run that takes about a second."""
    return f"""
output: {output}
stage:
  size: 16
  network: {NETWORK}
  encoders:
    t5: {{kind: t5, model: {t5_folder}, width: 16, max_tokens: 32, drop: 0.2}}
    clip_text: {{kind: clip_text, model: {clip_folder}, width: 16, pooled_width: 12, max_tokens: 24, drop: 0.2}}
    clip_image: {{kind: clip_image, model: {clip_folder}, width: 12, pooled_width: 12, max_tokens: 1, drop: 0.5}}
data: {{train: [{shards / "train"}], validation: {shards / "validation"}, workers: 0}}
training:
  images: 64
  batch_size: 8
  device: cpu
  checkpoint_every_images: 16
  log_every_images: 16
  optimizer: {{learning_rate: 1.0e-2}}
  ema: {{halflife_kimg: 0.02}}
  preview: {{prompts: [a red cube, dogs], every_images: 64, steps: 2, guidance: 2.0}}
  validation: {{every_images: 32, images: 8, bins: 2}}
sampling: {{steps: 3, guidance: 2.0}}
"""


@pytest.fixture
def write_config(tmp_path: Path, shards: Path, t5_folder: Path, clip_folder: Path) -> Callable[[str], Path]:
    """Writes the config of a run with the given name, whose output is tmp_path / name."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(run_config(tmp_path / name, shards, t5_folder, clip_folder), encoding="utf-8")
        return path

    return write


@pytest.fixture
def tar_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TarServer]:
    """Serves tmp_path over HTTP; readers of streams try again at once."""
    from t2i_experts.shards import tar_stream

    monkeypatch.setattr(tar_stream, "RETRY_AFTER", (0.0,) * len(tar_stream.RETRY_AFTER))
    monkeypatch.setenv("no_proxy", "*")
    with TarServer(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class TarServer(ThreadingHTTPServer):
    """answers[PATH]: what the next requests for it get before it is served: an HTTP status, or "cut", half of the file.

    requests: how many there were of each.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), TarHandler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answers: defaultdict[str, list[int | str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()


class TarHandler(BaseHTTPRequestHandler):
    server: TarServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests[path] += 1
        answers, file = self.server.answers[path], self.server.folder / path
        answer = answers.pop(0) if answers else 200 if file.is_file() else 404
        if isinstance(answer, int) and answer != 200:
            self.send_error(answer)
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if answer == "cut" else data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path, t5_folder: Path, clip_folder: Path) -> Path:
    """A finished run with power-function averages and snapshots after 16, 32, 48 and 64 images, to look at and not to change.

    Beside it lies its config, `run.yaml`, with which it would go on.
    """
    from t2i_experts.config import load_config
    from t2i_experts.training.trainer import train

    root = tmp_path_factory.mktemp("trained")
    text = run_config(root / "run", shards, t5_folder, clip_folder)
    text = text.replace("ema: {halflife_kimg: 0.02}", "ema: {kind: power, snapshot_every_images: 16}").replace(
        "every_images: 64", "every_images: 0"
    )
    (root / "run.yaml").write_text(text, encoding="utf-8")
    train(load_config(root / "run.yaml"), progress=False)
    return root / "run"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: cli(*arguments) -> exit code, stdout, stderr.

    Neither is a terminal, so neither may hold an escape sequence.
    """
    from t2i_experts.cli.app import main

    monkeypatch.delenv("T2I_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "\x1b" not in captured.out + captured.err
        return int(exit.value.code or 0), captured.out, captured.err

    return run
