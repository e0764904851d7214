"""Input that means harm, or is merely broken: refused or left out in bounded time and memory, and never a hang."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from t2i_experts.shards.check import Problem, check_shards
from t2i_experts.shards.format import MAX_CAPTION_CHARACTERS, MAX_KEY_BYTES, Manifest, parse_captions
from t2i_experts.shards.index import Row, scan
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.writer import ShardWriter

Encode = Callable[..., bytes]
WriteTar = Callable[..., Path]


@pytest.fixture(autouse=True)
def _at_most_a_minute() -> Iterator[None]:
    signal.alarm(60)
    yield
    signal.alarm(0)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A ustar header whose size may be negative or beyond all bounds, as base-256."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def pax(fields: str) -> bytes:
    """An extended header and its payload."""
    payload = fields.encode()
    return header("pax", len(payload), tarfile.XHDTYPE) + payload + bytes(-len(payload) % 512)


def record(keyword: str, value: str) -> str:
    length = len(keyword) + len(value) + 3
    while length != len(str(length)) + len(keyword) + len(value) + 3:
        length = len(str(length)) + len(keyword) + len(value) + 3
    return f"{length} {keyword}={value}\n"


@pytest.mark.parametrize(
    "content",
    [
        header("a.jpg", -1024),
        header("a.jpg", 2**62),
        header("a.jpg", 512) + bytes(512) + header("b.jpg", -1536),
        pax(record("size", "-1024")) + header("a.jpg", 0),
        pax(record("size", "9" * 30)) + header("a.jpg", 0),
        header("long", 2**33, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
        header("long", 2**33, tarfile.XHDTYPE) + bytes(1024),
        header("pax", 0, tarfile.XHDTYPE) * 5000,
        header("long", 0, tarfile.GNUTYPE_LONGNAME) * 5000,
    ],
    ids=["negative", "huge", "back", "pax back", "pax huge", "long name", "long pax", "nested pax", "nested names"],
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content + bytes(1024))
    os.truncate(path, 2**34)  # sparse: what a header claims is there to be read
    with pytest.raises(ValueError, match="cannot be read as an uncompressed tar"):
        scan(path)


BOUNDED = """
import resource, sys
from pathlib import Path
from t2i_experts.shards.images import image_size, prepare, square, verify
from t2i_experts.shards.index import scan

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
for path in sorted(Path(sys.argv[1]).glob("bomb.*")):
    for read in (image_size, verify, prepare, lambda data: square(data, 64)):
        try:
            read(path.read_bytes())
        except ValueError as error:
            assert "50000x50000 pixels" in str(error) or "exceeds limit" in str(error), error
        else:
            raise AssertionError(path)
print(peak() - before)
before = peak()
assert len(scan(Path(sys.argv[1]) / "many.tar").rows) == 50_000
print(peak() - before)
"""


def test_bombs_and_a_tar_of_100_000_members_cost_little_memory(tmp_path: Path, encode: Encode) -> None:
    """Pictures of 50,000 x 50,000 pixels are refused by their headers; of a member, a few hundred bytes stay."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = encode(0)
    (tmp_path / "bomb.png").write_bytes(png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:])
    jpeg = encode(0, kind="JPEG")
    (tmp_path / "bomb.jpg").write_bytes(jpeg.replace(struct.pack(">BHH", 8, 16, 16), struct.pack(">BHH", 8, 50_000, 50_000)))
    with open(tmp_path / "many.tar", "wb") as file:
        template = bytearray(tarfile.TarInfo("000000.jpg").tobuf(tarfile.USTAR_FORMAT))
        for i in range(100_000):
            template[:10] = f"{i // 2:06d}.{('jpg', 'txt')[i % 2]}".encode()
            template[148:156] = b" " * 8
            template[148:156] = f"{sum(template):06o}\0 ".encode()
            file.write(template)
        file.write(bytes(1024))
    done = subprocess.run([sys.executable, "-c", BOUNDED, tmp_path], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    bombs, many = (int(line) for line in done.stdout.split())
    assert bombs < 50e6
    assert many < 500 * 100_000


def test_keys_that_would_blow_up_the_index_are_left_out(tmp_path: Path, encode: Encode, write_tar: WriteTar) -> None:
    """An index row holds the longest key: one of a megabyte among a million samples would make a terabyte."""
    long = "k" * (MAX_KEY_BYTES + 1)
    path = write_tar(tmp_path / "x.tar", [(f"{long}.png", encode(0)), (f"{long}.txt", b"x"), ("a.png", encode(1)), ("a.txt", b"a")])
    found = scan(path)
    assert [row.key for row in found.rows] == ["a"]
    assert [(len(key) < 100, reason) for key, reason in found.incomplete] == [
        (True, "its key holds a zero byte or is longer than 1,024 bytes")
    ]
    with pytest.raises(ValueError, match="at most 1,024"), ShardWriter(tmp_path / "out") as writer:
        writer.write(long, encode(0), "png", ["x"])


def test_members_too_large_to_be_read_are_not_read(tmp_path: Path, encode: Encode) -> None:
    """A sparse tar whose image has 4 GiB: the sample is left out by name, and the other one is good."""
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        for name, data in (("a.png", encode(0)), ("a.txt", b"a"), ("b.txt", b"b")):
            file.write(header(name, len(data)) + data + bytes(-len(data) % 512))
        file.write(header("b.png", 2**32))
    offset = path.stat().st_size
    os.truncate(path, offset + 2**32 + 1024)
    row = scan(path).rows[1]
    assert row.image == (offset, 2**32)
    with pytest.raises(ValueError, match="its image has 4,294,967,296 bytes"):
        row.check_sizes()
    Row("a", (512, 2**28), (512, 2**24), (0, 0)).check_sizes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b'{"caption": "x", "a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "cannot be read"),
        (b'{"caption": "x", "a": ' + b'{"a":' * 200_000 + b"1" + b"}" * 200_000 + b"}", "cannot be read"),
        (b'{"caption": "x", "a": ' + b"9" * 10_000_000 + b"}", "cannot be read"),
        (b'{"caption": "\\ud83d"}', "not valid Unicode"),
        (json.dumps({"captions": ["x", "y" * (MAX_CAPTION_CHARACTERS + 1)]}).encode(), r"16,385 characters; at most 16,384"),
        ('{"caption": "x"}'.encode("utf-16"), "UTF-16"),
        (b'{"caption": "caf\xe9"}', "Latin-1.*iconv -f latin1"),
        (b'{"caption": "\x93cafe\x94"}', "Windows-1252.*iconv -f cp1252"),
    ],
    ids=["deep list", "deep object", "huge integer", "surrogate", "long", "utf-16", "latin-1", "windows"],
)
def test_json_that_cannot_be_used(fields: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_captions(None, fields)


def test_numbers_that_are_not_finite_become_null() -> None:
    fields = b'{"caption": "x", "a": NaN, "b": 1e999, "c": -Infinity, "d": 0.5, "e": 7}'
    assert parse_captions(None, fields)[1] == {"a": None, "b": None, "c": None, "d": 0.5, "e": 7}


def test_a_check_names_all_that_is_wrong_and_what_it_leaves_can_be_read(tmp_path: Path, encode: Encode, write_tar: WriteTar) -> None:
    png = encode(0, (64, 64))
    bad = {
        "truncated": (png[: len(png) // 2], b"x"),
        "empty": (png, b" \n\t"),
        "nothing": (b"", b"x"),
        "latin": (png, b"caf\xe9"),
        "utf16": (png, "猫".encode("utf-16")),
        "long": (png, b"y" * (MAX_CAPTION_CHARACTERS + 1)),
    }
    good = {"a": (encode(1), b"a"), "b": (encode(2), b"\xef\xbb\xbfb"), "c": (encode(1), b"c")}
    members = [(f"{key}.{kind}", data) for key, pair in (bad | good).items() for kind, data in zip(("png", "txt"), pair, strict=True)]
    write_tar(tmp_path / "0.tar", members)
    write_tar(tmp_path / "1.tar", [("a.png", encode(3)), ("a.txt", b"a"), ("lone.png", encode(4))])
    (tmp_path / "2.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:3000])
    os.mkfifo(tmp_path / "3.tar")

    def names(problems: list[Problem]) -> set[str]:
        return {problem.key or problem.shard for problem in problems}

    report = check_shards(tmp_path)
    assert names(report.problems) == {*bad, "lone", "2.tar", "3.tar", "manifest.json"}
    report = check_shards(tmp_path, write_manifest=True, workers=2)
    assert names(report.problems) == {"2.tar", "3.tar"} and names(report.left_out) == {*bad, "lone"}
    notes = "\n".join(report.notes)
    for words in (
        "1 keys occur in more than one tar, such as 'a' in 0.tar and 1.tar",
        "1 pictures are copies, byte for byte, of earlier ones, such as 'c' in 0.tar of 'a' in 0.tar",
        "2 samples have captions that are not UTF-8",
        "1 captions begin with a byte-order mark",
    ):
        assert words in notes
    reader = ShardReader([tmp_path], size=8, seed=0)
    assert [reader.item(i).caption for i in range(reader.samples)] == ["a", "b", "c", "a"] and Manifest.load(tmp_path).samples == 4
