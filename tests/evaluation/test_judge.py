"""The judge reads what its network's cells say, and survives its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from t2i_experts.evaluation.judge import (
    CELL,
    GRID,
    SIZE,
    Cells,
    Judge,
    JudgeConfig,
    JudgeNetwork,
    decode_boxes,
    encode_boxes,
    load_judge,
    overlap,
    prepare,
    save_judge,
)

WORDS = JudgeConfig(("owl", "cat", "dog", "fox", "pig", "bee"), ("3D", "flat"), ("red", "blue"), ("white", "pink"), channels=8, blocks=2)
PICTURE = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)


class Painted(nn.Module):
    """Cells that say what a test wants, whatever the picture."""

    def __init__(self, cells: Cells) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.cells = cells

    def forward(self, x: Tensor) -> Cells:
        return self.cells


def nothing() -> Cells:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, *shape)

    empty = Cells(zeros(GRID, GRID) - 9, zeros(GRID, GRID, 4), *(zeros(GRID, GRID, n) for n in (6, 2, 3)), zeros(3), zeros(2, 2))
    return empty


def put(
    cells: Cells, name: int, box: tuple[float, ...], *, certainty: float = 3.0, colour: int = 0, style: int = 0, beside: int = 0
) -> None:
    """An object whose box is spoken of by the cell of its centre, or by one `beside` columns to the right of that."""
    row, column = int((box[1] + box[3]) / 2 // CELL), int((box[0] + box[2]) / 2 // CELL) + beside
    cells.objects[0, row, column] = certainty
    cells.boxes[0, row, column] = encode_boxes(torch.tensor(box), torch.tensor([row, column]))
    for values, index in ((cells.names, name), (cells.colours, colour), (cells.styles, style)):
        values[0, row, column, index] = 5.0


def read(cells: Cells, **words: float) -> object:
    (reading,) = Judge(replace(WORDS, **words), Painted(cells))(PICTURE)  # type: ignore[arg-type]
    return reading


def test_boxes_survive_encoding_from_any_cell() -> None:
    generator = torch.Generator().manual_seed(0)
    corner, side = 50 * torch.rand(100, 2, generator=generator), 1 + 40 * torch.rand(100, 2, generator=generator)
    boxes, cells = torch.cat([corner, corner + side], dim=1), torch.randint(0, GRID, (100, 2), generator=generator)
    assert torch.allclose(decode_boxes(encode_boxes(boxes, cells), cells), boxes, atol=1e-3)
    # x comes first: a box in the middle of column 3, row 7 is at no offset from the cell (7, 3).
    middle = torch.tensor([3.5, 7.5, 3.5, 7.5]) * CELL + torch.tensor([-8.0, -8.0, 8.0, 8.0])
    assert torch.allclose(encode_boxes(middle, torch.tensor([7, 3])), torch.zeros(4), atol=1e-6)


def test_objects_are_read_with_their_words_and_places() -> None:
    cells = nothing()
    put(cells, 1, (4, 8, 24, 40), colour=1, style=1, certainty=2.0)
    put(cells, 2, (40, 8, 60, 40), colour=2, style=1, certainty=4.0, beside=1)
    cells.kinds[0, 1], cells.ends[0, 0, 1] = 3.0, 3.0
    reading = read(cells)
    assert [found.name for found in reading.objects] == ["dog", "cat"]  # the most certain one first
    assert [found.colour for found in reading.objects] == [None, "blue"]
    assert reading.objects[0].box == pytest.approx([40 / 64, 8 / 64, 60 / 64, 40 / 64])
    assert reading.style == "flat" and reading.background == ("vertical", "pink", "white")
    assert len(reading.objects[0].names) == 5 and reading.called("cat") == reading.objects[1:]


def test_what_is_uncertain_beside_a_peak_or_the_same_object_again_is_not_read() -> None:
    cells = nothing()
    put(cells, 0, (8, 8, 56, 56))
    put(cells, 1, (8, 8, 56, 56), certainty=2.0, beside=1)  # the neighbour of a peak
    put(cells, 2, (10, 8, 58, 56), certainty=2.0, beside=5)  # far from it, but the same box
    put(cells, 3, (2, 2, 12, 12), certainty=-2.0)  # a certainty of 0.12
    assert [found.name for found in read(cells).objects] == ["owl"]
    assert [found.name for found in read(cells, threshold=0.1).objects] == ["owl", "fox"]
    assert read(nothing()).objects == () and read(nothing()).style is None
    assert read(nothing()).background == ("plain", "white")


def test_overlap_of_boxes() -> None:
    assert overlap((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 0, 3, 1)) == 0 and overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1


def trained() -> Judge:
    torch.manual_seed(0)
    network = JudgeNetwork(WORDS).eval()
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    return Judge(replace(WORDS, threshold=0.05), network, {"all": {"scenes": 3}})


def test_a_folder_holds_the_whole_judge(tmp_path: Path) -> None:
    judge = trained()
    images = torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_judge(judge, tmp_path / "judge")
    again = load_judge(str(tmp_path / "judge"))
    assert again.config == judge.config and again.accuracy == judge.accuracy and len(again.fingerprint) == 16
    assert again(images) == judge(images) and any(reading.objects for reading in again(images))
    save_judge(replace(judge, accuracy={}), tmp_path / "other")
    assert load_judge(str(tmp_path / "other")).fingerprint != again.fingerprint


def test_a_picture_is_read_apart_from_its_batch() -> None:
    judge = trained()
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    alone = [judge(image[None])[0] for image in images]
    assert [[found.name for found in reading.objects] for reading in judge(images)] == [[f.name for f in r.objects] for r in alone]
    assert torch.allclose(prepare(images.new_full((1, 3, 16, 16), 255)), torch.ones(1, 3, SIZE, SIZE))


def test_a_folder_that_is_no_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no folder with judge\.json"):
        load_judge(str(tmp_path))
    with pytest.raises(ValueError, match="does not ship"):
        load_judge("embedded:nobody")
    save_judge(trained(), tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is not whole"):
        load_judge(str(tmp_path))


def test_the_network_is_small_and_plain() -> None:
    words = replace(WORDS, objects=tuple(map(str, range(595))), backgrounds=tuple(map(str, range(25))), channels=128, blocks=6)
    network = JudgeNetwork(words)
    assert sum(parameter.numel() for parameter in network.parameters()) < 3_000_000
    assert {type(module).__name__ for module in network.modules()} <= {
        "JudgeNetwork", "_Block", "Sequential", "Conv2d", "BatchNorm2d", "ReLU", "AvgPool2d", "Flatten", "Linear",
    }  # fmt: skip
    # A cell in one corner sees the opposite one.
    x = torch.randn(1, 3, SIZE, SIZE, requires_grad=True)
    network.eval()(x).objects[0, 0, 0].backward()
    assert x.grad is not None and x.grad[0, :, -8:, -8:].abs().sum() > 0
