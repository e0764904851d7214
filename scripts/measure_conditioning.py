"""How much a trained model listens to its encoders: held-out loss with every text encoder, with each alone, with none, and with captions
of other images. Same images, noise levels and noise throughout, so differences are paired and their standard errors are over images.

    python scripts/measure_conditioning.py --model runs/emoji-base64/model --shards data/emoji/validation --images 2048
"""

from __future__ import annotations

import argparse
import json

import torch

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import standard_error, validate


def main() -> None:
    """Reads the command line and prints the losses as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder; default: the embedded model")
    parser.add_argument("--shards", required=True, help="shard folder of held-out images")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device")
    arguments = parser.parse_args()

    pipeline = CascadePipeline.from_pretrained(arguments.model, device=arguments.device, dtype=torch.float32)
    stage = pipeline.base
    bf16 = pipeline.device.type == "cuda"
    task = DiffusionTask(stage.config, pipeline.model.conditioner, seed=0, device=pipeline.device, bf16=bf16, codec=stage.codec)
    reader = ShardReader([arguments.shards], size=stage.config.size, seed=0)
    texts = [name for name, encoder in pipeline.model.conditioner.encoders.items() if encoder.reads == "text"]
    others = set(stage.config.encoders) - set(texts)
    variants = {"all text": (others, False), "shuffled captions": (others, True), "no text": (others | set(texts), False)}
    variants |= {f"{name} only": (others | (set(texts) - {name}), False) for name in texts}
    validations = {
        name: validate(
            stage.denoiser,
            task,
            reader,
            images=arguments.images,
            bins=arguments.bins,
            batch_size=arguments.batch_size,
            without=without,
            shuffled=shuffled,
        )
        for name, (without, shuffled) in variants.items()
    }
    read = torch.stack([validation.read for validation in validations.values()]).all(dim=0)
    losses = {name: validation.losses[read].mean(dim=1) for name, validation in validations.items()}
    results = {}
    for name, values in losses.items():
        gap = values - losses["all text"]
        results[name] = {
            "loss": float(values.mean()),
            "standard_error": standard_error(values),
            "above_all_text": float(gap.mean()),
            "above_all_text_standard_error": standard_error(gap),
        }
    print(json.dumps({"images": len(losses["all text"]), "bins": arguments.bins, "losses": results}, indent=2))


if __name__ == "__main__":
    main()
