"""Weights come over the network once, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import pickle
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.evaluation import weights
from t2i_experts.evaluation.weights import load_weights


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which it is served; torch keeps its downloads elsewhere in tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_downloaded_once_and_checked(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    torch.save({"a": torch.arange(3)}, folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    (folder / "w.pth").rename(folder / f"w-{digest[:8]}.pth")
    found = load_weights(f"{url}/w-{digest[:8]}.pth")
    assert found.sha256 == digest and found.tensors["a"].tolist() == [0, 1, 2]
    (folder / f"w-{digest[:8]}.pth").rename(folder / "w-00000000.pth")
    assert load_weights(f"{url}/w-{digest[:8]}.pth").sha256 == digest
    for name, said in (("w-00000000.pth", "hash"), ("absent.pth", "404")):
        with pytest.raises(ValueError, match=f"{name} cannot be downloaded: .*{said}"):
            load_weights(f"{url}/{name}")
    assert len(list((tmp_path / "torch" / "hub" / "checkpoints").iterdir())) == 1


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "w.pth")
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(tmp_path / "w.pth")

    monkeypatch.setattr(weights, "hf_hub_download", download)
    assert load_weights("owner/repository/folder/w.pth").source == "owner/repository/folder/w.pth"
    assert asked == [("owner/repository", "folder/w.pth")]


def test_what_is_no_state_dict_says_what_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.arange(3000)}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:2000])
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "script.pt"))
    recwarn.clear()
    with open(tmp_path / "pickle.pth", "wb") as file:
        pickle.dump({"a": torch.arange(3)}, file, protocol=4)
    for name, said in (
        ("empty.pth", "it is empty"),
        ("cut.pth", "cannot be read: ."),
        ("script.pt", "it is a TorchScript program"),
        ("pickle.pth", "no file of tensors alone"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            load_weights(str(tmp_path / name))
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not recwarn.list


def test_counts_of_batches_may_be_missing() -> None:
    """As in a file of an old PyTorch; nothing else may."""
    network = torch.nn.BatchNorm2d(3)
    tensors = {name: value.clone() for name, value in network.state_dict().items() if "num_batches" not in name}
    tensors["weight"] += 1
    weights.Weights(tensors, "old.pth", "").into(network, "a norm")
    assert network.weight.tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match=r"of its 5 tensors, 1 missing \(running_var\)"):
        weights.Weights({name: tensors[name] for name in tensors if name != "running_var"}, "old.pth", "").into(network, "a norm")
