"""Preference data in other people's formats."""

from __future__ import annotations

import io
import json
import sys

import pytest
from PIL import Image

from data.formats import FORMATS, detect, read, write
from data.records import read_pairs

Q, A, B = "What is it?", "A red bus.", "A blue bus."


def talk(question: str, answer: str, *more: str, keys=("from", "value"),
         roles=("human", "gpt")) -> list[dict]:
    return [dict(zip(keys, (roles[i % 2], text))) for i, text in enumerate((question, answer, *more))]


def chat(question: str, answer: str) -> list[dict]:
    return talk(question, answer, keys=("role", "content"), roles=("user", "assistant"))


def parts(role: str, *texts: str, image: bool = False) -> list[dict]:
    content = [{"type": "image", "text": None}] * image + [{"type": "text", "text": text} for text in texts]
    return [{"role": role, "content": content}]


ROWS = {
    "plumbline": {"id": "a", "image": "one.png", "prompt": Q, "chosen": A, "rejected": B},
    "llava": {"id": "a", "image": "one.png", "conversations": talk(f"{Q}\n<image>", A, "And?", "Rain.")},
    "povid": {"id": "a", "image": "one.png", "conversations": talk(f"<image>\n{Q}", A),
              "rejected_conversations": talk(f"<image>\n{Q}", B)},
    "llama-factory": {"images": ["one.png"], "conversations": talk(f"<image>{Q}", "")[:1],
                      "chosen": {"from": "gpt", "value": A}, "rejected": {"role": "assistant", "content": B}},
    "ms-swift": {"messages": chat(f"<image>{Q}", A), "images": ["one.png"], "rejected_response": B},
    "realign": {"image": "one.png", "retrieved_image": "two.png", "chosen": chat(f"<image>\n{Q}", A),
                "rejected": chat(f"<image>\n{Q}", B)},
    "rlhf-v": {"idx": 7, "image": None, "image_path": "one.png", "origin_dataset": "vqa",
               "text": json.dumps({"question": Q, "chosen": A, "rejected": B})},
    "rlaif-v": {"idx": "7", "ds_name": "RLAIF-V", "image_path": "one.png", "question": Q, "chosen": A,
                "rejected": B, "origin_split": '{"model": "LLaVA-1.5-7B", "type": "detailed description"}'},
    "trl": {"images": ["one.png"], "prompt": parts("user", Q, image=True), "chosen": parts("assistant", A),
            "rejected": parts("assistant", B)},
}


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (6, 4), colour).save(tmp_path / name)
    return tmp_path


def save(path, *rows, lines: bool = True):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_same_record(folder, name, lines):
    assert detect(ROWS[name]) == name
    (record,) = read(save(folder / "data.json", ROWS[name], lines=lines))
    assert (record["image"], record["prompt"], record["chosen"]) == ("one.png", Q, A)
    assert isinstance(record["id"], str)
    if name == "llava":
        assert record.keys() == {"id", "image", "prompt", "chosen"}
        write(folder / "own.jsonl", [record])
        assert read(folder / "own.jsonl", "plumbline") == [record]
    else:
        assert record["rejected"] == B
        write(folder / "own.jsonl", [record])
        assert read_pairs(folder / "own.jsonl") == [record] == read(folder / "own.jsonl", "plumbline")
    assert record.get("rejected_image") == ("two.png" if name == "realign" else None)


def test_what_a_row_says_about_its_making_is_kept(folder):
    (record,) = read(save(folder / "d.jsonl", ROWS["rlaif-v"]))
    assert record["id"] == "7" and record["source"] == {
        "format": "rlaif-v", "ds_name": "RLAIF-V",
        "origin_split": {"model": "LLaVA-1.5-7B", "type": "detailed description"}}


def test_ids_become_unique(folder):
    row = ROWS["povid"]
    rows = [row, row, {**row, "id": "a-2"}, {**row, "id": None}, row]
    assert [record["id"] for record in read(save(folder / "d.jsonl", *rows))] == \
        ["a", "a-2", "a-2-2", "row-4", "a-3"]
    found = problems(save(folder / "p.jsonl", ROWS["plumbline"], ROWS["plumbline"]))
    assert found == [f"{folder}/p.jsonl:2: id 'a' already used in {folder}/p.jsonl:1"]


def problems(path, **options) -> list[str]:
    with pytest.raises(ValueError) as caught:
        read(path, **options)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("name", "change", "reason"), [
    ("llava", {"image": None}, "no picture"),
    ("llava", {"conversations": []}, "not a conversation"),
    ("llava", {"conversations": talk(A, Q, roles=("gpt", "human"))}, "a message of the user is wanted"),
    ("llava", {"conversations": talk("<image><image>" + Q, A)}, "'prompt' contains <image>"),
    ("povid", {"rejected_conversations": talk("Why?", B)}, "ask different questions"),
    ("povid", {"rejected_conversations": talk(Q, "<image> " + B)}, "'rejected' contains <image>"),
    ("povid", {"rejected_conversations": talk(Q, A + " ")}, "are the same text"),
    ("realign", {"retrieved_image": "none.png"}, "'rejected_image': "),
    ("rlhf-v", {"text": "no JSON"}, "'text' is not a JSON object"),
    ("rlaif-v", {"chosen": ""}, "'chosen' is empty"),
    ("rlaif-v", {"question": 3}, "the question must be a string, found int"),
    ("trl", {"images": ["one.png", "two.png"]}, "2 pictures"),
    ("trl", {"prompt": chat(Q, A)}, "'prompt' has 2 messages"),
    ("plumbline", {"colour": "red"}, "unknown key 'colour'"),
    ("plumbline", {"id": ["b"]}, "'id' must be a string, found list"),
])
@pytest.mark.parametrize("lines", [True, False])
def test_bad_rows_are_named(folder, name, change, reason, lines):
    bad = {**ROWS[name], **({"id": "b"} if "id" in ROWS[name] else {}), **change}
    path = save(folder / "d.json", ROWS[name], bad, lines=lines)
    (found,) = problems(path)
    assert found.startswith(f"{path}:2: ") and reason in found


def test_all_bad_rows_at_once_and_files_that_are_nothing(folder):
    path = folder / "d.json"
    rows = [ROWS["povid"], 3, {**ROWS["povid"], "image": "none.png"}, {"conversations": 1}]
    path.write_text(json.dumps(rows))
    assert [line.split(":")[1] for line in problems(path)] == ["2", "3", "4"]
    path.write_text("[{")
    assert "not valid JSON" in problems(path)[0]
    assert "no known format (povid, llama-factory, llava," in problems(save(path, {"url": "x", "caption": "y"}))[0]
    assert problems(save(path)) == [f"{path}: no records"]
    assert problems(folder / "none.json") == [f"{folder / 'none.json'}: not found"]
    assert "unknown format 'coco'" in problems(path, format="coco")[0]
    assert "'rejected_image' is missing" in problems(save(path, ROWS["povid"]), needs={"rejected_image"})[0]


def test_pictures_elsewhere(folder):
    (folder / "sub").mkdir()
    path = save(folder / "sub" / "d.jsonl", ROWS["povid"])
    assert "sub/one.png not found" in problems(path)[0]
    assert read(path, root=folder)[0]["image"] == "one.png"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_with_pictures_inside(folder):
    """150 rows in row groups of 40, two distinct pictures: two files; a second reading writes nothing."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    images = [{"bytes": png(colour), "path": "x.png"} for colour in ("red", "blue")]
    rows = [{**ROWS["rlaif-v"], "idx": str(i), "image": images[i % 2]} for i in range(150)]
    path = folder / "part_0.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    records = read(path)
    assert len(records) == 150 and records[149]["id"] == "149"
    saved = sorted((folder / "part_0-images").iterdir())
    assert len(saved) == 2
    assert {record["image"] for record in records} == {f"part_0-images/{file.name}" for file in saved}
    assert (folder / records[1]["image"]).read_bytes() == png("blue")
    times = [file.stat().st_mtime_ns for file in saved]
    assert read(folder) == records and read(path, root=folder.parent)[0]["image"].startswith(folder.name)
    assert [file.stat().st_mtime_ns for file in saved] == times

    rows[3]["image"] = {"bytes": b"no picture", "path": None}
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    (found,) = problems(path)
    assert found.startswith(f"{path}:4: its picture is not readable")
    path.write_bytes(b"PAR1 no")
    assert "not a readable Parquet file" in problems(path)[0]


def test_parquet_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "d.parquet").write_bytes(b"")
    assert problems(folder / "d.parquet") == \
        [f"{folder / 'd.parquet'}: Parquet needs pyarrow, which is not installed (pip install pyarrow)"]


PAIRS = [{"id": "a", "image": "one.png", "prompt": Q, "chosen": A, "rejected": B,
          "rejected_image": "two.png"},
         {"id": "b", "image": "scene:3", "prompt": Q, "chosen": B, "rejected": A}]


def test_trl_columns_come_back(folder):
    pytest.importorskip("pyarrow")
    write(folder / "t.parquet", PAIRS, "trl")
    records = read(folder / "t.parquet")
    for record, pair in zip(records, PAIRS, strict=True):
        assert {key: record[key] for key in ("id", "prompt", "chosen", "rejected")} == \
            {key: pair[key] for key in ("id", "prompt", "chosen", "rejected")}
    assert (folder / records[0]["rejected_image"]).read_bytes() == (folder / "two.png").read_bytes()
    assert Image.open(folder / records[1]["image"]).size == (96, 96) and "rejected_image" not in records[1]

    write(folder / "t.jsonl", PAIRS[:1], "trl")
    (record,) = read(folder / "t.jsonl")
    assert record["image"] == str(folder / "one.png") and record["rejected_image"] == str(folder / "two.png")
    with pytest.raises(ValueError, match="scene:3: a drawn picture has no file"):
        write(folder / "t.jsonl", PAIRS, "trl")
    with pytest.raises(ValueError, match="cannot write format 'povid'"):
        write(folder / "t.jsonl", PAIRS, "povid")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_trl_reads_what_is_written(folder):
    datasets = pytest.importorskip("datasets")
    utils = pytest.importorskip("trl.data_utils")
    write(folder / "t.parquet", PAIRS, "trl")
    rows = datasets.Dataset.from_parquet(str(folder / "t.parquet"), cache_dir=str(folder / "cache"))
    assert rows[0]["images"][0].size == (6, 4) and rows[0]["images"][0].getpixel((0, 0)) == (255, 0, 0)
    assert utils.is_conversational(rows[0])
    (message,) = utils.prepare_multimodal_messages(rows[0]["prompt"], images=rows[0]["images"])
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == Q and rows[1]["rejected"][0]["content"][0]["text"] == A
