"""Reading and writing of pair records."""

import json
import os

import pytest
from PIL import Image

from data.formats import load
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
        {**GOOD, "id": "b", "rejected_image": "scene:6", "rejected_image_response": "A cup."},
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
    ({"image": "nowhere.jpg"}, "nowhere.jpg: no such image"),
    ({"image": "broken.jpg"}, "broken.jpg: not a readable image"),
    ({"image": "thin.png"}, "thin.png: not a readable image (499 x 1 pixels: one side is more than 200 times"),
    ({"rejected_image": "float.tif"}, "float.tif: not a readable image (values of mode F"),
    ({"image": "scene:x"}, "'image': image reference 'scene:x'"),
    ({"image": "scene:" + "9" * 50}, "at most 18 digits"),
    ({"rejected_image": "scene:3?without=unicorn"}, "unicorn"),
    ({"rejected_imgae": "scene:3"}, "unknown key 'rejected_imgae'"),
    ({"source": "me"}, "'source' must be a JSON object"),
    ({"chosen": "A dog \ud83d"}, "'chosen' holds half a character, the lone surrogate '\\ud83d'"),
    ({"id": "\udc80"}, "'id' holds half a character"),
    ({"image": "a\0b.png"}, "'image' holds a NUL character"),
    ({"rejected": "A\0dog"}, "'rejected' holds a NUL character"),
    ({"rejected": "\u200b\u00a0\ufeff"}, "'rejected' is empty"),
    ({"rejected": "One <image>."}, "'rejected' contains <image>"),
    ({"rejected_image_response": "One <image>."}, "'rejected_image_response' contains <image>"),
    ({"rejected_image_response": ""}, "'rejected_image_response' is empty"),
    ({"prompt": "USER: <image>\nWhat?"}, "'prompt' contains <image>"),
    ({"prompt": "<image>What?<image>"}, "'prompt' contains <image>"),
    ({"prompt": "<ImageHere>What?"}, "'prompt' contains <ImageHere>"),
    ({"prompt": "USER: What? ASSISTANT: "}, "'prompt' ends as a template does"),
    ({"prompt": "<image>\n"}, "'prompt' is empty"),
    ({"image": "https://x.org/a.png"}, "'https://x.org/a.png' is a URL"),
    ({"image": "S3://bucket/a.png"}, "'S3://bucket/a.png' is a URL"),
    ({"image": "iVBORw0KGgo" * 1000}, "'image': 11,000 characters are no path"),
    ({"image": "a\nb.png"}, "a\\nb.png"),
    ({"source": {"says": ["\ud83d"]}}, "'source' holds half a character"),
    ({"source": json.loads('{"a":' * 60 + "1" + "}" * 60)}, "'source' is nested too deeply"),
    ({f"key{i}": 1 for i in range(99)}, "'key6', 'key7', ..."),
])
def test_one_bad_field(tmp_path, change, reason):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    Image.new("RGB", (499, 1)).save(tmp_path / "thin.png")
    Image.new("F", (9, 9)).save(tmp_path / "float.tif")
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
    assert problems(path, {"rejected_image"}) == [f"{path}: all 2 records: 'rejected_image' is missing"]
    with pytest.raises(ValueError, match="no field \\['mask'\\]"):
        read_pairs(path, {"mask"})


def test_no_file_and_no_records(tmp_path):
    assert problems(tmp_path / "p.jsonl") == [f"{tmp_path / 'p.jsonl'}: not found"]
    assert problems(lines(tmp_path / "p.jsonl", "")) == [f"{tmp_path / 'p.jsonl'}: no records"]


def test_image_records(tmp_path):
    row = {"id": "a", "image": "scene:0", "prompt": "What?"}
    assert load(lines(tmp_path / "i.jsonl", row, {**row, "id": "b", "chosen": "It."})).records[0] == row
    with pytest.raises(ValueError, match="i.jsonl:2: unknown key 'rejected'"):
        load(lines(tmp_path / "i.jsonl", row, {**row, "id": "b", "rejected": "No."}))


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


@pytest.mark.parametrize(("text", "reason"), [
    ('{"source": {"score": NaN}', "not valid JSON (holds NaN)"),
    ('{"source": {"score": 1e999}', "'source' holds inf, which JSON has not"),
    ('{"source": {"score": ' + "9" * 5000 + "}", "not valid JSON (a number has too many digits)"),
    ('{"source": ' + '{"a":' * 100_000, "not valid JSON (nested too deeply)"),
    ('{"source": {"a": 1, "a": 2}', "not valid JSON (holds the key 'a' twice)"),
])
def test_what_json_allows_and_no_writer_writes(tmp_path, text, reason):
    good = json.dumps(GOOD)
    path = lines(tmp_path / "p.jsonl", good, text + f', {json.dumps({**GOOD, "id": "b"})[1:]}')
    assert problems(path) == [f"{path}:2: {reason}"]


@pytest.mark.parametrize("prompt", ["<image>\nWhat?", "What?\n<image>", " <image> What?", "<image>What?"])
def test_one_mark_of_the_picture_is_taken_away(tmp_path, prompt):
    rows = [{**GOOD, "prompt": prompt}, {**GOOD, "id": "b", "prompt": " What? "}]
    assert [row["prompt"] for row in read_pairs(lines(tmp_path / "p.jsonl", *rows))] == ["What?", " What? "]


def test_a_line_that_is_cut_off_says_where(tmp_path):
    path = lines(tmp_path / "p.jsonl", GOOD, '{"a": 1')
    assert problems(path) == [f"{path}:2: not valid JSON (Expecting ',' delimiter at column 8)"]


def test_lines_end_where_json_says(tmp_path):
    """U+2028 and U+0085 are characters, a carriage return is a space; a list or one object may take many lines."""
    row = {**GOOD, "chosen": "One\u2028two\x85three\x0bfour"}
    (tmp_path / "p.jsonl").write_bytes(json.dumps(row, ensure_ascii=False).replace("{", "{\r").encode() + b"\r\n")
    assert read_pairs(tmp_path / "p.jsonl") == [row]
    for rows in ([row, {**row, "id": "b"}], row):
        (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
        assert read_pairs(tmp_path / "p.json") == (rows if isinstance(rows, list) else [rows])


@pytest.mark.parametrize("data", [
    b"\x1f\x8b\x08 gzip\n{}\n", json.dumps(GOOD).encode("utf-16"), b"id,image,prompt\n" * 50, b"PAR1\n" * 50, b"[{",
    b"[]", b"{\n" * 50, b"", b"\n\n",
])
def test_what_is_no_data_is_said_in_one_line(tmp_path, data):
    (tmp_path / "p.jsonl").write_bytes(data)
    (found,) = problems(tmp_path / "p.jsonl")
    assert found.startswith(f"{tmp_path / 'p.jsonl'}: ")


def test_what_is_no_file_is_said_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert problems(tmp_path / "pipe") == [f"{tmp_path / 'pipe'}: not a regular file"]
    assert problems(tmp_path) == [f"{tmp_path}: not a regular file"]


def test_many_bad_lines_are_counted(tmp_path):
    """What all records lack is said once; of the others the first are named."""
    rows = [{**GOOD, "id": str(i), "chosen": "" if i % 2 else "A dog."} for i in range(5000)]
    path = lines(tmp_path / "p.jsonl", *rows)
    found = problems(path, {"rejected_image"})
    assert found[0] == f"{path}: all 5,000 records: 'rejected_image' is missing"
    assert found[1:] == [f"{path}:{n}: 'chosen' is empty" for n in range(2, SHOWN + 1, 2)] + \
        [f"{path}: and 4,980 more bad records (5,000 of 5,000 are bad)"]
    found = problems(path)
    assert found == [f"{path}:{n}: 'chosen' is empty" for n in range(2, 2 * SHOWN + 1, 2)] + \
        [f"{path}: and 2,480 more bad records (2,500 of 5,000 are bad)"]


def test_paths_move_and_nothing_else_does(tmp_path):
    row = {**GOOD, "image": "a.png", "source": {"image": "c.png", "candidates": [{"image": "b.png"}]}}
    odd = {**GOOD, "rejected_image": None, "source": {"candidates": "three"}}
    (moved, same) = relocate([row, odd], tmp_path / "in", tmp_path / "out")
    source = {"image": "c.png", "candidates": [{"image": "../in/b.png"}]}
    assert moved == {**row, "image": "../in/a.png", "source": source}
    assert same == odd and relocate([{"image": "./a.png"}], tmp_path, tmp_path) == [{"image": "./a.png"}]
