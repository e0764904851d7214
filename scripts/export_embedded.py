"""Makes a trained model folder the one that ships with the package: its networks in bfloat16, beside the judge that is there.

python scripts/export_embedded.py runs/emoji-base64/model
python scripts/export_embedded.py runs/emoji-experts/ensemble    # that `experts assemble --bytes N --dtype bfloat16` made
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from t2i_experts.cascade.expert_folders import read_experts
from t2i_experts.cascade.model_folder import LoadedModel, embedded_model, find_model, load_model, read_configs, save_ensemble, save_model
from t2i_experts.diffusion.precond import EDMPrecond

MAX_BYTES = 34 * 2**20


def main() -> None:
    """Reads the command line and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder of one stage, of one network or of low-rank experts")
    parser.add_argument("--out", type=Path, default=embedded_model())
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    judge = arguments.out / "judge"
    with TemporaryDirectory() as kept:
        if judge.is_dir():  # the whole folder is replaced
            shutil.copytree(judge, Path(kept) / "judge")
        if next(iter(model.stages.values())).leaves:
            export_ensemble(model, find_model(arguments.model), arguments.out)
        else:
            export_network(model, arguments.out)
        if (Path(kept) / "judge").is_dir():
            shutil.copytree(Path(kept) / "judge", judge)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: stage {next(iter(model.stages))}, {size / 2**20:.2f} MiB of at most {MAX_BYTES / 2**20:.0f}")
    if size > MAX_BYTES:
        raise SystemExit("error: too large to ship")


def export_network(model: LoadedModel, out: Path) -> None:
    """Writes a model of one network in bfloat16."""
    (stage,) = model.stages.values()
    assert isinstance(stage.denoiser, EDMPrecond)
    save_model(
        out,
        stage.config,
        stage.sampling,
        stage.denoiser.state_dict(),
        model.conditioner,
        codec=stage.codec,
        dtype=torch.bfloat16,
        provenance=model.provenance,
    )


def export_ensemble(model: LoadedModel, folder: Path, out: Path) -> None:
    """Writes an ensemble as its folder stores it, with low-rank experts as differences, which are from the root in its type."""
    (stage,) = model.stages.values()
    config, sampling, leaves = read_configs(folder)
    experts, root = read_experts(folder / config.name, config, leaves)
    if root is not None and {tensor.dtype for tensor in root.values() if tensor.is_floating_point()} != {torch.bfloat16}:
        raise SystemExit(f"error: the differences in {folder} are from a root that is not in bfloat16; assemble it with --dtype bfloat16")
    save_ensemble(
        out,
        config,
        sampling,
        leaves,
        experts,
        model.conditioner,
        codec=stage.codec,
        dtype=torch.bfloat16,
        provenance=model.provenance,
        root=root,
    )


if __name__ == "__main__":
    main()
