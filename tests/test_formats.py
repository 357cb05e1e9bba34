"""Preference data in other people's formats."""

import base64
import io
import json
import sys
from datetime import datetime

import pytest
from PIL import Image

from common import run_script
from data.export import write
from data.formats import FORMATS, detect, load, main
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
    "sentinel": {"image_id": "7", "image_path": "one.png", "question": Q, "context": "", "y_win": A, "y_lose": B},
    "trl": {"images": ["one.png"], "prompt": parts("user", Q, image=True), "chosen": parts("assistant", A),
            "rejected": parts("assistant", B)},
}


SENTINEL = {"instruction": f"<image>{Q}", "context": "There is a road.", "chosen": A, "rejected": B,
            "images": ["one.png"]}  # as its code writes them for LLaMA-Factory


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
    (record,) = load(save(folder / "data.json", ROWS[name], lines=lines)).records
    assert (record["image"], record["prompt"], record["chosen"]) == ("one.png", Q, A)
    assert isinstance(record["id"], str)
    if name == "llava":
        assert record.keys() == {"id", "image", "prompt", "chosen"}
        write(folder / "own.jsonl", [record])
        assert load(folder / "own.jsonl", "plumbline").records == [record]
    else:
        assert record["rejected"] == B
        write(folder / "own.jsonl", [record])
        assert read_pairs(folder / "own.jsonl") == [record] == load(folder / "own.jsonl", "plumbline").records
    assert record.get("rejected_image") == ("two.png" if name == "realign" else None)


def test_what_a_row_says_about_its_making_is_kept(folder):
    (record,) = load(save(folder / "d.jsonl", ROWS["rlaif-v"])).records
    assert record["id"] == "7" and record["source"] == {
        "format": "rlaif-v", "ds_name": "RLAIF-V",
        "origin_split": {"model": "LLaVA-1.5-7B", "type": "detailed description"}}


def test_ids_become_unique(folder):
    row = ROWS["povid"]
    rows = [row, row, {**row, "id": "a-2"}, {**row, "id": None}, row]
    assert [record["id"] for record in load(save(folder / "d.jsonl", *rows)).records] == \
        ["a", "a-2", "a-2-2", "row-4", "a-3"]
    found = problems(save(folder / "p.jsonl", ROWS["plumbline"], ROWS["plumbline"]))
    assert found == [f"{folder}/p.jsonl:2: id 'a' already used in {folder}/p.jsonl:1"]


def problems(path, **options) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(path, **options)
    return str(caught.value).split("\n")


@pytest.mark.parametrize(("name", "change", "reason"), [
    ("llava", {"image": None}, "no image"),
    ("llava", {"conversations": []}, "not a conversation"),
    ("llava", {"conversations": talk(A, Q, roles=("gpt", "human"))}, "a message of the user is wanted"),
    ("llava", {"conversations": talk("<image><image>" + Q, A)}, "'prompt' contains <image>"),
    ("llava", {"image": ["one.png", "two.png"], "conversations": talk(f"<image>{Q}", A)},
     "'prompt' marks 1 places with <image>, 'image' lists 2 images"),
    ("povid", {"rejected_conversations": talk("Why?", B)}, "ask different questions"),
    ("povid", {"rejected_conversations": talk(Q, "<image> " + B)}, "'rejected' contains <image>"),
    ("povid", {"rejected_conversations": talk(Q, A + " ")}, "are the same text"),
    ("realign", {"retrieved_image": "none.png"}, "'rejected_image': "),
    ("rlhf-v", {"text": "no JSON"}, "'text' is not a JSON object"),
    ("rlaif-v", {"chosen": ""}, "'chosen' is empty"),
    ("rlaif-v", {"question": 3}, "the question must be a string, found int"),
    ("trl", {"images": ["one.png", 3]}, "the image must be a path or bytes, found int"),
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
    assert "sub/one.png: no such image" in problems(path)[0]
    assert load(path, root=folder).records[0]["image"] == "one.png"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_with_pictures_inside(folder):
    """150 rows in row groups of 40, two distinct images: two files; a second reading writes nothing."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")  # makes pa.parquet

    images = [{"bytes": png(colour), "path": "x.png"} for colour in ("red", "blue")]
    rows = [{**ROWS["rlaif-v"], "idx": str(i), "image": images[i % 2]} for i in range(150)]
    path = folder / "part_0.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    records = load(path).records
    assert len(records) == 150 and records[149]["id"] == "149"
    saved = sorted((folder / "part_0-images").iterdir())
    assert len(saved) == 2
    assert {record["image"] for record in records} == {f"part_0-images/{file.name}" for file in saved}
    assert (folder / records[1]["image"]).read_bytes() == png("blue")
    times = [file.stat().st_mtime_ns for file in saved]
    assert load(folder).records == records and load(path, root=folder.parent).records[0]["image"].startswith(folder.name)
    assert [file.stat().st_mtime_ns for file in saved] == times

    rows[3]["image"] = {"bytes": b"no image", "path": None}
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    (found,) = problems(path)
    assert found.startswith(f"{path}:4: its image is not readable")
    path.write_bytes(b"PAR1 no")
    assert "not a readable Parquet file" in problems(path)[0]


def test_parquet_without_pyarrow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (folder / "d.parquet").write_bytes(b"")
    assert problems(folder / "d.parquet") == \
        [f"{folder / 'd.parquet'}: Parquet needs pyarrow, which is not installed (pip install pyarrow)"]


PAIRS = [{"id": "a", "image": "one.png", "prompt": Q, "chosen": A, "rejected": B,
          "rejected_image": "two.png", "rejected_image_response": "A cup."},
         {"id": "b", "image": "scene:3", "prompt": Q, "chosen": B, "rejected": A}]


def test_trl_columns_come_back(folder):
    pytest.importorskip("pyarrow")
    write(folder / "t.parquet", PAIRS, "trl")
    records = load(folder / "t.parquet").records
    for record, pair in zip(records, PAIRS, strict=True):
        kept = {key: record.get(key) for key in ("id", "prompt", "chosen", "rejected", "rejected_image_response")}
        assert kept == {key: pair.get(key) for key in kept}
    assert (folder / records[0]["rejected_image"]).read_bytes() == (folder / "two.png").read_bytes()
    assert Image.open(folder / records[1]["image"]).size == (96, 96) and "rejected_image" not in records[1]

    write(folder / "t.jsonl", PAIRS[:1], "trl")
    (record,) = load(folder / "t.jsonl").records
    assert record["image"] == str(folder / "one.png") and record["rejected_image"] == str(folder / "two.png")
    assert record["rejected_image_response"] == "A cup."
    with pytest.raises(ValueError, match="scene:3: a drawn image has no file"):
        write(folder / "t.jsonl", PAIRS, "trl")
    with pytest.raises(ValueError, match="cannot write format 'povid'"):
        write(folder / "t.jsonl", PAIRS, "povid")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("prompt", [Q, f"<image>\n{Q}", f"{Q} <image>"])
def test_an_only_image_comes_back_without_its_mark(folder, prompt):
    save(folder / "p.jsonl", {**ROWS["plumbline"], "prompt": prompt})
    write(folder / "t.jsonl", read_pairs(folder / "p.jsonl"), "trl")
    assert load(folder / "t.jsonl").records[0]["prompt"] == Q


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


# Forms that one format has


@pytest.mark.parametrize(("name", "row"), [
    ("llama-factory", {"images": "one.png", "instruction": f"<image>{Q}", "input": "", "chosen": A, "rejected": B}),
    ("llama-factory", {"images": ["one.png"], "instruction": "<image>What", "input": "is it?", "chosen": A,
                       "rejected": B}),
    ("llama-factory", {"images": ["one.png"], "messages": chat(Q, "")[:1], "system": "", "history": [],
                       "chosen": {"role": "assistant", "content": A}, "rejected": {"from": "gpt", "value": B}}),
    ("ms-swift", {"messages": chat(f"<image>{Q}", A), "images": [{"path": "one.png"}],
                  "rejected_messages": chat(Q, B), "rejected_images": ["one.png"]}),
    ("rlaif-v", {"question": Q, "chosen": A, "rejected": B, "image": "one.png"}),
    ("trl", {"images": ["one.png"], "prompt": Q, "chosen": A, "rejected": B}),
    ("plumbline", {**ROWS["plumbline"], "prompt": f"{Q}\n<image>"}),
])
def test_every_form_becomes_the_same_pair(folder, name, row):
    data = load(save(folder / "d.jsonl", row))
    (record,) = data.records
    assert (data.format, data.root) == (name, folder)
    assert (record["image"], record["chosen"], record["rejected"]) == ("one.png", A, B)
    assert " ".join(record["prompt"].split()) == Q and "rejected_image" not in record


@pytest.mark.parametrize(("row", "context"), [
    (SENTINEL, "There is a road."), ({**SENTINEL, "context": ""}, None), ({**SENTINEL, "input": None}, "There is a road."),
    ({**SENTINEL, "context": "", "input": ""}, None), ({**ROWS["llama-factory"], "context": None}, None)])
def test_a_context_of_llama_factorys_rows_is_sentinels(folder, row, context):
    assert load(save(folder / "d.jsonl", row)).records[0].get("context") == context


@pytest.mark.parametrize(("row", "reason"), [
    ({**ROWS["llama-factory"], "conversations": talk("Hi", "Hello", Q)}, "has 3 messages, one is wanted"),
    ({**ROWS["llama-factory"], "system": "Be brief."}, "'system' is filled"),
    ({**ROWS["llama-factory"], "context": "Found on a page."}, "'context' is filled: it is the beginning of the"),
    ({**SENTINEL, "input": "Now."}, "SENTINEL's files, whose rows have chosen, context, images, instruction, rejected"),
    ({**SENTINEL, "id": 3}, "'context' is filled"),
    ({**ROWS["llama-factory"], "chosen": {"from": "human", "value": A}}, "a message of the assistant is wanted"),
    ({**ROWS["ms-swift"], "messages": [*chat("Hi", "Hello"), *chat(Q, A)]}, "the last of several questions"),
    ({**ROWS["ms-swift"], "messages": [{"role": "system", "content": "x"}, *chat(Q, A)]}, "found one of 'system'"),
    ({**ROWS["ms-swift"], "rejected_response": None, "rejected_images": ["two.png"]}, "'rejected' is missing"),
    ({**ROWS["trl"], "chosen": [{"role": "assistant", "content": [{"text": 3}]}]}, "must be a text"),
    ({**ROWS["rlaif-v"], "idx": [1]}, "the id must be a string or a whole number, found list"),
    ({**ROWS["rlaif-v"], "image_path": 7}, "the image must be a path or bytes, found int"),
    ({**ROWS["rlaif-v"], "image_path": "data:image/png;base64,AA"}, "its image is not readable"),
    ({**ROWS["rlaif-v"], "question": f"USER: <image>\n{Q} ASSISTANT:"}, "'prompt' contains <image>"),
    ({**ROWS["rlaif-v"], "chosen": "\ud83d"}, "'chosen' holds half a character"),
    ({**ROWS["rlaif-v"], "ds_name": "\ud83d"}, "'source' holds half a character"),
    ({"img_path": "one.png", "prompt": Q, "chosen": A, "rejected": B}, "the keys 'img_path', 'prompt', 'chosen', "),
    ({"data": [ROWS["rlaif-v"]]}, "the keys 'data' are those of no known format"),
    ({"x" * 5000: 1}, "of no known format"),
])
def test_what_is_no_pair_is_said(folder, row, reason):
    (found,) = problems(save(folder / "d.jsonl", row), needs={"rejected"})
    assert found.startswith(f"{folder / 'd.jsonl'}:1: ") and reason in found and len(found) < 600


def test_hints_say_what_to_do(folder):
    path = save(folder / "d.jsonl", ROWS["llava"], {**ROWS["llava"], "image": None})
    with pytest.raises(ValueError) as caught:
        load(path, needs={"rejected"}, hints={"rejected": "say --images"})
    assert str(caught.value).split("\n") == [f"{path}:1: 'rejected' is missing (say --images)",
                                             f"{path}:2: no image: 'image' is missing or empty"]


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_serve_as_prompts(folder, name):
    """Where nothing reads the answers, pairs of any format are images and questions, and so are rows without."""
    path = save(folder / "d.json", ROWS[name], lines=False)
    (record,) = load(path, answers=False).records
    assert record == {"id": record["id"], "image": "one.png", "prompt": Q}
    for row in ({"images": ["one.png"], "messages": chat(Q, "")[:1]}, {"images": ["one.png"], "prompt": Q},
                {"image": "one.png", "question": Q}, PAIRS[0]):
        (record,) = load(save(folder / "d.json", row), answers=False).records
        assert (record["image"], record["prompt"]) == ("one.png", Q)
    with pytest.raises(ValueError, match="unknown key 'promt'"):
        load(save(folder / "d.json", {**ROWS["plumbline"], "promt": Q}), answers=False)


def test_pictures_as_bytes(folder):
    """A binary column, structs and data URLs are the same image, stored once."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")  # makes pa.parquet

    url = "data:image/png;base64," + base64.b64encode(png("red")).decode()
    for picture in [png("red"), {"bytes": png("red"), "path": "x.png"}, url]:
        row = {"id": "a", "image": picture, "prompt": Q, "chosen": A, "rejected": B}
        pa.parquet.write_table(pa.Table.from_pylist([row, {**row, "id": "b"}]), folder / "d.parquet")
        records = load(folder / "d.parquet", images=folder / "images").records
        (stored,) = (folder / "images").iterdir()
        assert [record["image"] for record in records] == [f"images/{stored.name}"] * 2


def test_parquet_holds_what_json_does_not(folder):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")  # makes pa.parquet

    def found(**column):
        pa.parquet.write_table(pa.Table.from_pylist([{**ROWS["rlaif-v"], **column}]), folder / "d.parquet")
        return problems(folder / "d.parquet")

    assert found(ds_name=float("nan")) == [f"{folder}/d.parquet:1: 'source' holds nan, which JSON has not"]
    assert "'source' holds datetime, which JSON has not" in found(ds_name=datetime(2020, 1, 1))[0]
    assert found(question=b"x") == [f"{folder}/d.parquet:1: the question must be a string, found bytes"]
    (folder / "empty").mkdir()
    assert problems(folder / "empty") == [f"{folder / 'empty'}: a folder without .parquet files"]
    table = pa.table({"question": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())})
    pa.parquet.write_table(table, folder / "d.parquet")
    (line,) = problems(folder / "d.parquet")
    assert line.startswith(f"{folder}/d.parquet: not a readable Parquet file, after row 0")


# The command


def run(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["formats", *map(str, words)])
    main()
    return capsys.readouterr().out


def test_the_command_changes_nothing(folder, monkeypatch, capsys):
    """Its own format comes out equal, in another folder too but for the paths."""
    source = {"method": "hand", "scores": [1, 2.5, None], "text": "\u2028"}
    rows = [{**PAIRS[0], "source": source}, {**PAIRS[1], "rejected_image": None}]
    write(folder / "in.jsonl", rows)
    said = run(monkeypatch, capsys, folder / "in.jsonl", folder / "out.jsonl")
    assert said == f"{folder / 'out.jsonl'}: 2 records, read as plumbline\n"
    assert (folder / "out.jsonl").read_bytes() == (folder / "in.jsonl").read_bytes()
    run(monkeypatch, capsys, folder / "in.jsonl", folder / "sub" / "out.jsonl")
    assert read_pairs(folder / "sub" / "out.jsonl") == \
        [{**rows[0], "image": "../one.png", "rejected_image": "../two.png"}, rows[1]]


def test_the_command_stores_pictures_beside_its_output(folder, monkeypatch, capsys):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")  # makes pa.parquet

    (folder / "in").mkdir()
    rows = [{**ROWS["rlaif-v"], "idx": i, "image": {"bytes": png(colour), "path": "x.png"}}
            for i, colour in enumerate(("red", "blue", "red"))]
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "in" / "d.parquet")
    out = folder / "out" / "pairs.jsonl"
    assert run(monkeypatch, capsys, folder / "in" / "d.parquet", out).endswith("3 records, read as rlaif-v\n")
    assert sorted(path.name for path in (folder / "in").iterdir()) == ["d.parquet"]
    stored = [(out.parent / pair["image"]).read_bytes() for pair in read_pairs(out)]
    assert stored == [png("red"), png("blue"), png("red")]
    run(monkeypatch, capsys, out, folder / "t.parquet", "--format", "trl")
    assert [pair["id"] for pair in load(folder / "t.parquet", "trl").records] == ["0", "1", "2"]


@pytest.mark.parametrize(("words", "reason"), [
    (["in.jsonl", "out.parquet"], "a Parquet file is written with --format trl"),
    (["in.jsonl", "out.jsonl", "--format", "trl"], "TRL's columns are for pairs"),
    (["none.jsonl", "out.jsonl"], "none.jsonl: not found"),
    (["in.jsonl", "out.jsonl", "--read-as", "rlaif-v"], "the question must be a string"),
])
def test_the_command_refuses_in_one_line(folder, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(folder)
    save(folder / "in.jsonl", ROWS["llava"])
    monkeypatch.setattr("sys.argv", ["formats", *words])
    with pytest.raises(SystemExit) as ended:
        run_script(main, "data.formats")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and reason in said and said.count("\n") == 1
