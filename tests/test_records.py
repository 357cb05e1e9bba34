"""Reading and writing of pair records."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from data.formats import read
from data.records import SHOWN, read_pairs, relocate, write_jsonl

GOOD = {"id": "a", "image": "scene:1000000", "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}


def lines(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def problems(path, needs=()) -> list[str]:
    with pytest.raises(ValueError) as caught:
        read_pairs(path, needs)
    return str(caught.value).split("\n")


def test_what_is_written_is_read_back(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    rows = [
        {**GOOD, "rejected_image": "scene:5?without=dog", "source": {"method": "hand", "scores": [1, 2.5]}},
        {**GOOD, "id": "ü", "image": "photo.png", "rejected_image": None},
        {**GOOD, "id": "c", "image": str(tmp_path / "photo.png"), "chosen": "Zwei\nZeilen\u2028."},
    ]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert read_pairs(tmp_path / "pairs.jsonl") == rows
    assert sorted(os.listdir(tmp_path)) == ["pairs.jsonl", "photo.png"]


@pytest.mark.parametrize(("change", "reason"), [
    ({"chosen": None}, "'chosen' is missing"),
    ({"prompt": "  "}, "'prompt' is empty"),
    ({"id": 7}, "'id' must be a string, found int"),
    ({"rejected": "A dog. "}, "'chosen' and 'rejected' are the same text"),
    ({"image": "nowhere.jpg"}, "nowhere.jpg not found"),
    ({"image": "broken.jpg"}, "broken.jpg is not a readable image"),
    ({"image": "scene:x"}, "'image': image reference 'scene:x'"),
    ({"rejected_image": "scene:3?without=unicorn"}, "unicorn"),
    ({"rejected_imgae": "scene:3"}, "unknown key 'rejected_imgae'"),
    ({"source": "me"}, "'source' must be a JSON object"),
])
def test_one_bad_field(tmp_path, change, reason):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    path = lines(tmp_path / "p.jsonl", GOOD, {**GOOD, "id": "b", **change})
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: ") and reason in found


def test_all_bad_lines_are_listed_at_once(tmp_path):
    twice, empty = '{"id": "x", "id": "y"}', {**GOOD, "id": "z", "chosen": "", "prompt": 3}
    path = lines(tmp_path / "p.jsonl", "{]", "[1]", GOOD, GOOD, twice, "", empty)
    found = problems(path)
    assert [int(line.split(":")[1]) for line in found] == [1, 2, 4, 5, 7, 7]
    assert "not valid JSON" in found[0] and "found list" in found[1] and f"already used in {path}:3" in found[2]
    assert "not valid JSON (holds the key 'id' twice)" in found[3] and "'chosen' is empty" in found[-1]


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\xff\xfe\n")
    (found,) = problems(tmp_path / "p.jsonl")  # a byte order mark and Windows line ends are no problem
    assert found.endswith("p.jsonl:2: not UTF-8 (invalid start byte at byte 0)")


def test_needs(tmp_path):
    path = lines(tmp_path / "p.jsonl", GOOD, {**GOOD, "id": "b", "rejected_image": None})
    assert len(read_pairs(path)) == 2
    assert problems(path, {"rejected_image"}) == [f"{path}: 'rejected_image' is missing (in all 2 records)"]
    with pytest.raises(ValueError, match="no field \\['mask'\\]"):
        read_pairs(path, {"mask"})


def test_no_file_and_no_records(tmp_path):
    assert problems(tmp_path / "p.jsonl") == [f"{tmp_path / 'p.jsonl'}: not found"]
    assert problems(lines(tmp_path / "p.jsonl", "")) == [f"{tmp_path / 'p.jsonl'}: no records"]


def test_image_records(tmp_path):
    row = {"id": "a", "image": "scene:0", "prompt": "What?"}
    assert read(lines(tmp_path / "i.jsonl", row, {**row, "id": "b", "chosen": "It."}))[0] == row
    with pytest.raises(ValueError, match="i.jsonl:2: unknown key 'rejected'"):
        read(lines(tmp_path / "i.jsonl", row, {**row, "id": "b", "rejected": "No."}))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [GOOD])

    def rows():
        yield {**GOOD, "id": "b"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "p.jsonl", rows())
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "p.jsonl", [{"score": float("nan")}])
    assert os.listdir(tmp_path) == ["p.jsonl"] and read_pairs(tmp_path / "p.jsonl") == [GOOD]
