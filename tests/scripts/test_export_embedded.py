"""What becomes the embedded model: one network or low-rank experts, in bfloat16, beside the judge that is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.model_folder import load_model
from t2i_experts.cascade.weights import WEIGHTS, cast, read_weights
from t2i_experts.experts.lowrank import Decomposition
from tests.cascade.test_expert_folders import NAMES, root_state
from tests.cascade.test_low_rank_folders import experts_near, write

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import export_embedded

        yield export_embedded


def ensemble(folder: Path, model_folder: Path, dtype: torch.dtype | None) -> Path:
    root = root_state(model_folder)[1]
    differences = {name: Decomposition(cast(root, dtype), one, dtype).at_rank(2) for name, one in experts_near(root).items()}
    differences.pop(NAMES[1])
    return write(folder, model_folder, {**differences, NAMES[1]: experts_near(root)[NAMES[1]]}, root, dtype=dtype)


def export(script: ModuleType, monkeypatch: pytest.MonkeyPatch, model: Path, out: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["export_embedded.py", str(model), "--out", str(out)])
    script.main()


def test_a_network_and_an_ensemble_take_the_place_of_the_model(
    script: ModuleType, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rounded = tmp_path / "out", ensemble(tmp_path / "rounded", model_folder, torch.bfloat16)
    (out / "judge").mkdir(parents=True)
    (out / "judge/judge.json").write_text("{}")
    export(script, monkeypatch, model_folder, out)
    assert {tensor.dtype for tensor in read_weights(out / "base64" / WEIGHTS).values()} == {torch.bfloat16}
    export(script, monkeypatch, rounded, out)
    assert (out / "judge/judge.json").read_text() == "{}" and "MiB of at most 34" in capsys.readouterr().out
    assert load_model(out).fingerprint == load_model(rounded).fingerprint
    files = [path for name in NAMES for path in (out / "base64/experts" / name).glob("*.safetensors")]
    assert [path.name for path in files] == [LOW_RANK, WEIGHTS, LOW_RANK]
    assert {tensor.dtype for path in files for tensor in read_weights(path).values()} == {torch.bfloat16}
    with pytest.raises(SystemExit, match="not in bfloat16; assemble it with --dtype bfloat16"):
        export(script, monkeypatch, ensemble(tmp_path / "exact", model_folder, None), out)
    assert load_model(out).fingerprint == load_model(rounded).fingerprint, "what was there is still there"
