"""`t2i-experts ema`: a finished run gives models of other widths, and says what it cannot give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2i_experts.cli.app import main
from t2i_experts.training.posthoc import reconstruct

WEIGHTS = Path("base64/diffusion_pytorch_model.safetensors")


def test_a_model_of_another_width(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models" / "wide"
    with pytest.raises(SystemExit) as exit:
        main(["ema", str(trained), "--sigma-rel", "0.2", "--out", str(out), "--json"])
    assert not exit.value.code
    said = json.loads(capsys.readouterr().out)
    assert (said["out"], said["sigma_rel"], said["images_seen"], said["snapshots"]) == (str(out), 0.2, 64, 8)
    weights = load_file(out / WEIGHTS)
    assert weights.keys() == load_file(trained / "model" / WEIGHTS).keys()
    expected = reconstruct(trained, 0.2).weights
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    provenance = json.loads((out / "model_index.json").read_text())["provenance"]
    assert provenance["images_seen"] == 64
    assert provenance["ema"] == {"kind": "power", "sigma_rel": 0.2, "profile_error": said["profile_error"], "snapshots": 8}
    assert provenance["dataset_hash"] == json.loads((trained / "model" / "model_index.json").read_text())["provenance"]["dataset_hash"]
    with pytest.raises(SystemExit) as exit:
        main(["generate", "a red cube", "--model", str(out), "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert not exit.value.code

    with pytest.raises(SystemExit) as exit:
        main(["ema", str(trained), "--sigma-rel", "0.1", "--images", "32", "--out", str(tmp_path / "early")])
    assert not exit.value.code
    assert "sigma_rel 0.1 after 32 images, from 1 snapshots" in capsys.readouterr().out
    early = load_file(trained / "snapshots" / "000000000032-0.1.safetensors")
    assert all(torch.equal(tensor, early[name]) for name, tensor in load_file(tmp_path / "early" / WEIGHTS).items())


def test_mistakes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for arguments, said in (
        (["--sigma-rel", "0.4", "--out", str(out)], "sigma_rel=0.4 must be positive and below 0.2887"),
        (["--sigma-rel", "0.1", "--images", "17", "--out", str(out)], "allowed: 16, 32, 48, 64"),
        (["--sigma-rel", "0.1", "--out", str(trained)], "exists already"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["ema", str(trained), *arguments])
        assert exit.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and said in message and len(message.splitlines()) == 1
    assert not out.exists()
    with pytest.raises(SystemExit) as exit:
        main(["ema", str(tmp_path), "--sigma-rel", "0.1", "--out", str(out)])
    assert exit.value.code == 2
    assert "holds no snapshots" in capsys.readouterr().err
