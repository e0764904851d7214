"""What ships with the package: encoders that the tiny config finds, and the embedded model."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2i_experts.cascade.model_folder import embedded_model
from t2i_experts.cascade.picture import read_image, to_uint8
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import load_config
from t2i_experts.evaluation.judge import load_judge


@pytest.mark.parametrize("name", ["tiny", "emoji"])
def test_embedded_encoders_fit_the_configs_that_name_them(pytestconfig: pytest.Config, name: str) -> None:
    """Widths are checked on loading. Two captions that say the same are closer than two that do not, in both encoders."""
    stage = load_config(pytestconfig.rootpath / "configs" / name / "base64.yaml").stage
    conditioner = TextConditioner.from_config(stage.encoders)
    embeddings = conditioner(["a 3D emoji of an owl", "an owl, 3D render", "a pizza on a red background"]).embeddings
    t5 = embeddings["t5"]
    means = (t5.tokens * t5.mask[..., None]).sum(dim=1) / t5.mask.sum(dim=1, keepdim=True)
    pooled = embeddings["clip_text"].pooled
    assert pooled is not None
    for vectors in (means, pooled):
        unit = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
        assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.3


def test_what_ships_is_small(pytestconfig: pytest.Config) -> None:
    shipped = sum(path.stat().st_size for path in embedded_model().rglob("*") if path.is_file())
    assert shipped <= 34 * 2**20


def test_a_picture_from_the_shell_offline_in_time(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    before = _cpu_seconds_of_children()
    command = [
        sys.executable,
        "-m",
        "t2i_experts",
        "generate",
        "a red apple",
        "--json",
        "--out",
        str(tmp_path / "apple.png"),
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    seconds = _cpu_seconds_of_children() - before
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["model"]["source"] == "embedded"
    red, green, blue = read_image(tmp_path / "apple.png")[0, :, 16:48, 16:48].mean(dim=(1, 2))
    assert red > green + 0.3
    assert red > blue + 0.3
    (reading,) = load_judge("embedded:judge")(to_uint8(read_image(tmp_path / "apple.png")))
    assert [(found.name, found.colour) for found in reading.objects] == [("apple", "red")]
    assert seconds < 30  # 15 on the clock of two free cores


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
