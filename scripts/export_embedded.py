"""Makes a trained model folder the one that ships with the package: its network in bfloat16, beside the judge that is there.

python scripts/export_embedded.py runs/emoji-base64/model
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from t2i_experts.cascade.model_folder import embedded_model, load_model, save_model
from t2i_experts.diffusion.precond import EDMPrecond

MAX_BYTES = 34 * 2**20


def main() -> None:
    """Reads the command line and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder of one stage")
    parser.add_argument("--out", type=Path, default=embedded_model())
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    ((name, stage),) = model.stages.items()
    assert isinstance(stage.denoiser, EDMPrecond)
    weights = stage.denoiser.state_dict()
    judge = arguments.out / "judge"
    with TemporaryDirectory() as kept:
        if judge.is_dir():  # save_model replaces the whole folder
            shutil.copytree(judge, Path(kept) / "judge")
        save_model(
            arguments.out,
            stage.config,
            stage.sampling,
            weights,
            model.conditioner,
            codec=stage.codec,
            dtype=torch.bfloat16,
            provenance=model.provenance,
        )
        if (Path(kept) / "judge").is_dir():
            shutil.copytree(Path(kept) / "judge", judge)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: stage {name}, {size / 2**20:.2f} MiB of at most {MAX_BYTES / 2**20:.0f}")
    if size > MAX_BYTES:
        raise SystemExit("error: too large to ship")


if __name__ == "__main__":
    main()
