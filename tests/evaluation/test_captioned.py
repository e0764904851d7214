"""Every picture comes with its own caption, wherever captions are written, and none goes missing without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from t2i_experts.evaluation.captioned import open_captioned
from t2i_experts.evaluation.pictures import Picture

NAMES = ["a.png", "b.png", "deeper/a.png", "deeper/c.x.png", "e.png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, two of them deeper, without captions."""
    for i, name in enumerate(NAMES):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def pairs(folder: Path, captions: Path | None = None) -> dict[str, Sequence[str]]:
    """Captions by name; each picture is the one that its red value says."""
    found = {}
    for picture in open_captioned(folder, captions).pictures.read(2):
        assert isinstance(picture, Picture)
        assert picture.name == NAMES[int(picture.pixels[0, 0, 0])]
        found[picture.name] = picture.captions
    return found


def test_captions_beside_the_pictures(folder: Path) -> None:
    for name in NAMES:
        (folder / name).with_suffix(".txt").write_text(f"\ufeff\n caption of {name} \nand another\n", encoding="utf-8")
    assert pairs(folder) == {name: (f"caption of {name}", "and another") for name in NAMES}
    (folder / "deeper/c.x.txt").write_text(" \n")
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"2 of the 5 pictures of .* have no caption .*: b.png, deeper/c.x.png; write"):
        open_captioned(folder)
    for name in ("b.txt", "deeper/c.x.txt", "deeper/d.txt"):
        (folder / name).write_text("a caption")
    with pytest.raises(ValueError, match=r"1 captions in .* have no picture of the same name: deeper/d.txt$"):
        open_captioned(folder)
    (folder / "deeper/d.txt").unlink()
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 .* may be Latin-1"):
        open_captioned(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", "".join(f'{{"file": "./{name}", "caption": " caption of {name}", "more": 1}}\n\n' for name in reversed(NAMES))),
        ("c.jsonl", "".join(f'{{"name": "{name}", "caption": "caption of {name}"}}\n' for name in NAMES)),
        ("c.tsv", "file\tcaption\r\n" + "".join(f'"{name}"\tcaption of {name}\r\n' for name in reversed(NAMES))),
        ("c.tsv", "".join(f"{name}\tcaption of {name}\n" for name in NAMES)),
        ("c.txt", "".join(f"caption of {name}\r\n" for name in sorted(NAMES))),
    ],
)
def test_captions_in_one_file(folder: Path, file: Callable[[str, str], Path], name: str, text: str) -> None:
    assert pairs(folder, file(name, text)) == {name: (f"caption of {name}",) for name in NAMES}


def rows(*names: str) -> str:
    return "".join(f"{name}\tx\n" for name in names)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.csv", "", r"c.csv has the suffix '.csv'; allowed: .jsonl, .tsv, .txt"),
        ("c.tsv", rows(*NAMES[1:4]), r"c.tsv has no caption for 2 of the 5 pictures of .*: a.png, e.png$"),
        ("c.tsv", "picture\tcaption\n" + rows(*NAMES[1:]), r"1 of the 5 .*: a.png; it has some of files .* not there: picture$"),
        ("c.tsv", rows(*NAMES, "f.png", "g.png"), r"c.tsv has captions for 2 pictures that .* does not have: f.png, g.png$"),
        ("c.tsv", rows("a.png", "b.png", "./a.png"), "c.tsv, line 3: a second caption of a.png"),
        ("c.tsv", "a.png\tx\nb.png\t \n", "c.tsv, line 2: the caption of b.png is empty"),
        ("c.tsv", "a.png\tx\ty\n", "c.tsv, line 1: a name, a tab and a caption are needed; received 3 cells"),
        ("c.tsv", 'a.png\t"x" y\n', "c.tsv, line 1: .* quoted as in CSV"),
        ("c.jsonl", '{"file": "a.png"}\n', "c.jsonl, line 1: .* `file` and `caption` is needed; received the fields file"),
        ("c.jsonl", '\n["a.png", "x"]\n', r'c.jsonl, line 2: .* received \["a.png", "x"\]'),
        ("c.jsonl", "{\n", "c.jsonl, line 1: "),
        ("c.txt", "x\n" * 4, "c.txt has 4 lines for the 5 pictures of"),
        ("c.txt", "x\nx\n\nx\nx\n", "c.txt, line 3: the caption of deeper/a.png is empty"),
    ],
)
def test_mistakes_in_a_file_are_named(folder: Path, file: Callable[[str, str], Path], name: str, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_captioned(folder, file(name, text))


def test_an_order_that_is_in_doubt_is_refused(tmp_path: Path, file: Callable[[str, str], Path]) -> None:
    """Sorted by letters 10 comes before 9, and the captions would belong to other pictures."""
    (tmp_path / "numbered").mkdir()
    for i in (9, 10):
        Image.new("RGB", (4, 4)).save(tmp_path / "numbered" / f"{i}.png")
    captions = file("c.txt", "nine\nten\n")
    with pytest.raises(ValueError, match=r"in doubt: 10.png comes first by its letters, 9.png by its number"):
        open_captioned(tmp_path / "numbered", captions)
    (tmp_path / "numbered/9.png").rename(tmp_path / "numbered/09.png")
    found = [picture.captions for picture in open_captioned(tmp_path / "numbered", captions).pictures.read(1)]  # type: ignore[union-attr]
    assert found == [("nine",), ("ten",)]


def test_shards_bring_their_captions(shards: Path, tmp_path: Path) -> None:
    captioned = open_captioned(shards / "train")
    first = next(iter(captioned.pictures.read(1)))
    assert isinstance(first, Picture) and first.captions == ("a red cube 0", "picture 0") and captioned.source == "shards"
    with pytest.raises(ValueError, match=r"--captions c.txt has no meaning for the shards of"):
        open_captioned(shards / "train", Path("c.txt"))
    for path, said in (
        (tmp_path / "nowhere", "is not there"),
        (tmp_path, "holds no pictures; looked for tars"),
        (Path(__file__), "no folder"),
    ):
        with pytest.raises(ValueError, match=said):
            open_captioned(path)
