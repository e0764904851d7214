"""A shipped config's name stands for it, unless there is a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_experts.config import load_config, shipped_configs
from t2i_experts.config.shipped import find_config, shown


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", shipped_configs())
def test_a_name_is_found_from_anywhere(name: str) -> None:
    path = find_config(name)
    assert path.is_absolute() and path.is_file()
    assert find_config(f"{name}.yaml") == find_config(path) == path
    assert shown(path) == f"{name} (shipped)"
    assert load_config(name) == load_config(path)


def test_a_file_comes_before_a_shipped_config() -> None:
    Path("tiny/base64").mkdir(parents=True)
    assert find_config("tiny/base64") == shipped_configs()["tiny/base64"], "a folder is no config"
    own = Path("tiny/base64.yaml")
    own.write_text("extends: tiny/base64\n")
    assert find_config("tiny/base64") == own
    Path("mine").write_text("")
    assert find_config("mine") == Path("mine")
    assert shown(own) == "tiny/base64.yaml"


def test_a_file_may_extend_a_shipped_config_and_beside_it_comes_first() -> None:
    Path("mine.yaml").write_text("extends: tiny/base64\ntraining: {images: 24}\n")
    assert load_config("mine").training.images == 24
    assert load_config("mine").stage == load_config("tiny/base64").stage
    Path("tiny").mkdir()
    Path("tiny/base64.yaml").write_text("extends: emoji/base64\noutput: runs/other\n")
    assert load_config("mine").output == "runs/other"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tny/base64", "not found: tny/base64; did you mean 'tiny/base64'? shipped are "),
        ("configs/tiny/photos.yaml", "did you mean 'tiny/photos'?"),
        ("nowhere.yaml", "not found: nowhere.yaml; shipped are "),
        ("../tiny/base64", "not found: ../tiny/base64"),
        ("", "not found"),
    ],
)
def test_what_is_neither(name: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_config(name)
    assert said in str(caught.value)
    assert str(caught.value).endswith(", ".join(shipped_configs()))


def test_extending_what_is_not_there_names_both() -> None:
    Path("mine.yaml").write_text("extends: tiny/bas64\n")
    with pytest.raises(ValueError, match=r"did you mean 'tiny/base64'.*extended by .*mine\.yaml"):
        load_config("mine.yaml")


def test_a_file_that_was_to_extend_another_says_so() -> None:
    Path("mine.yaml").write_text("extend: tiny/base64\n")
    with pytest.raises(ValueError, match=r"^mine\.yaml: extend: unknown key 'extend' in RunConfig; did you mean 'extends'"):
        load_config("mine.yaml")


def test_a_mistake_is_told_of_the_file_that_makes_it() -> None:
    Path("base.yaml").write_text("extends: tiny/base64\ntraining: {imags: 3}\n")
    Path("mine.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(ValueError, match=r"^base\.yaml: training\.imags"):
        load_config("mine.yaml")


def test_an_encoder_by_a_wrong_name() -> None:
    with pytest.raises(ValueError, match=r"value: stage\.encoders\.clip_txt\.kind, .*did you mean stage\.encoders\.clip_text\?"):
        load_config("tiny/base64", ["stage.encoders.clip_txt.drop=0.1"])
    with pytest.raises(ValueError, match=r"beside 'q', stage\.encoders has t5, clip_text, clip_image"):
        load_config("tiny/base64", ["stage.encoders.q.drop=0.1"])
