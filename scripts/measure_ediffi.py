"""One training step and one sampling step at eDiff-I's own size, with encoders and network of random weights: seconds and memory.

    python scripts/measure_ediffi.py configs/ediffi/base64.yaml --spiece t5/spiece.model --batch-size 64

The text goes the whole way: SentencePiece, a T5-XXL of 4.8 B parameters in bfloat16, CLIP ViT-L/14, projections, U-Net, AdamW, EMA.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import nn
from transformers import T5Config, T5EncoderModel

from t2i_experts.cascade.stage import Stage, build_network
from t2i_experts.conditioning.clip import CLIPImageEncoder, CLIPTextEncoder, CLIPTokenizer, Towers
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.conditioning.t5 import T5Encoder, T5Tokenizer
from t2i_experts.config import StageConfig, load_config
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.shards.reader import Sample
from t2i_experts.training.ema import EMA
from t2i_experts.training.optim import build_optimizer
from t2i_experts.training.step import add_gradients, apply_gradients, avoid_cudnn_attention
from t2i_experts.training.task import DiffusionTask

XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
PROMPT = "a photograph of an astronaut riding a horse on the beach at sunset, in the style of a watercolour painting"


def random_conditioner(stage: StageConfig, spiece: Path, device: torch.device) -> TextConditioner:
    """The encoders of eDiff-I with random weights on `device`."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        t5 = T5EncoderModel(T5Config(**XXL)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    clip = open_clip.create_model("ViT-L-14", device=device).eval().requires_grad_(False)
    image, preprocess = clip.visual, open_clip.get_model_preprocess_cfg(clip)
    clip.visual = nn.Identity()
    towers = Towers(clip, image, open_clip.get_model_config("ViT-L-14"), preprocess, None)
    encoders = {
        "t5": T5Encoder(t5, T5Tokenizer(spiece.read_bytes(), stage.encoders["t5"].max_tokens)),
        "clip_text": CLIPTextEncoder(towers, CLIPTokenizer(SimpleTokenizer(), stage.encoders["clip_text"].max_tokens)),
        "clip_image": CLIPImageEncoder(towers),
    }
    return TextConditioner(encoders, stage.encoders)


def main() -> None:
    """Reads the command line and prints the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--spiece", type=Path, required=True, help="a SentencePiece model of T5's size")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config, device = load_config(arguments.config), torch.device("cuda")
    avoid_cudnn_attention()
    conditioner = random_conditioner(config.stage, arguments.spiece, device)
    encoders_gib = torch.cuda.memory_allocated() / 2**30
    with torch.device(device):
        network = build_network(config.stage)
    ema, optimizer = EMA(network, 1.0), build_optimizer(network, config.training.optimizer)
    task = DiffusionTask(config.stage, conditioner, seed=0, device=device, bf16=True)
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8)) for _ in range(arguments.batch_size)]
    batch = task.collate()([Sample(i, str(i), image, PROMPT, {}) for i, image in enumerate(images)])

    def train_step() -> float:
        losses = add_gradients(task, network, batch)
        apply_gradients(network, optimizer, config.training.optimizer.clip_norm)
        ema.update(network, arguments.batch_size, arguments.batch_size)
        return float(losses.mean())

    first_loss = train_step()
    results = {"training, eager": _timed(train_step, arguments.repeats)}
    compile_denoiser(network, training=True, dynamic=None)
    results["training, compiled"] = _timed(train_step, arguments.repeats)
    for result in results.values():
        result["images_per_second"] = arguments.batch_size / result["seconds"]
    weights = ema.network.to(torch.bfloat16)
    stage = Stage(config.stage, weights, config.sampling)
    conditioning, noise = conditioner([PROMPT]), torch.randn(1, *stage.noise_shape, device=device)
    sampling = stage.sampling

    def sample() -> None:
        with torch.no_grad():
            stage.sample(noise, conditioning, conditioner.null(), sampling)

    results["sampling, one image with guidance, eager"] = _timed(sample, 2)
    results["sampling, one image with guidance, eager"]["seconds_per_step"] = (
        results["sampling, one image with guidance, eager"]["seconds"] / sampling.steps
    )
    facts = {
        "device": torch.cuda.get_device_name(),
        "network_parameters": sum(p.numel() for p in network.parameters()),
        "t5_parameters": sum(p.numel() for p in conditioner.encoders["t5"].model.parameters()),
        "encoders_gib": round(encoders_gib, 2),
        "batch_size": arguments.batch_size,
        "first_loss": first_loss,
        **results,
    }
    print(json.dumps(facts, indent=2))


def _timed(function: object, repeats: int) -> dict[str, float]:
    """Median seconds of a call after one to warm up, and the peak of memory."""
    assert callable(function)
    torch.cuda.reset_peak_memory_stats()
    function()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[len(seconds) // 2], "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


if __name__ == "__main__":
    main()
