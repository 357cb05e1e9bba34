"""The beginning of a response that a record gives: read like the prompt, shared, never scored."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from common import BadInput
from data.batch import collate, tokens_of
from data.check import problems_of
from data.export import write
from data.formats import load
from data.processor import Processor
from data.records import continued, read_pairs, write_jsonl
from losses import dpo, rdpo, reward_model
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.logprobs import Scorer
from pairs.gallery import write_gallery
from pairs.methods import make_pairs
from prepare import find_records, read_records
from train import LOSSES

CONTEXT = "There is a dog. It is next to a cup."
RECORD = {"id": "a", "image": "scene:7", "rejected_image": "scene:8", "prompt": "What is there?", "context": CONTEXT,
          "chosen": "A cat is on the left.", "rejected": "There are two large cats."}
WHOLE = {**{key: value for key, value in RECORD.items() if key != "context"},
         "chosen": f"{CONTEXT} {RECORD['chosen']}", "rejected": f"{CONTEXT} {RECORD['rejected']}"}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tiny():
    return load_llava(DEFAULT_MODEL)


# ---- the seam ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "text", "whole"), [
    (CONTEXT, "A cat.", f"{CONTEXT} A cat."), (f"{CONTEXT}  ", "A cat.", f"{CONTEXT} A cat."),
    ("A dog.\n", "A cat.", "A dog.\nA cat."), ("A dog.", "\nA cat.", "A dog.\nA cat."), ("", "A cat.", "A cat."),
])
def test_the_ids_of_both_are_those_of_one_string(processor, context, text, whole):
    assert continued(context, text) == whole
    start, rest = processor.opening(context), processor.continuation(context, text)
    assert [*start, *rest, processor.eos_id] == processor.response(whole) and rest
    assert "\n" in whole or processor.decode([*start, *rest]) == whole


def test_a_context_that_merges_with_what_follows_is_refused(processor, monkeypatch):
    """Otherwise chosen and rejected would not share it."""
    encode = processor.tokenizer.encode
    monkeypatch.setattr(processor.tokenizer, "encode", lambda text: encode(text.replace("dog. A", "dogs A")))
    (found,) = problems_of({**RECORD, "context": "a dog.", "chosen": "A."}, processor, None, dpo.SEQUENCES)
    assert found.startswith("'chosen': answer merges with the end of its context, 'a dog.'")


# ---- scoring -----------------------------------------------------------------------------------------------------


def by_hand(model, processor, record: dict, image: str, field: str) -> torch.Tensor:
    """Log-probs of the tokens after prompt and context, of full logits of one sequence."""
    view = processor.image(record[image])
    ids = torch.tensor([*processor.prompt(record["prompt"], len(view.rows)),
                        *processor.response(f"{CONTEXT} {record[field]}")])
    count = len(processor.response(f"{CONTEXT} {record[field]}")) - len(processor.response(CONTEXT))
    with torch.no_grad():
        logps = model.logits(ids[:-1], view.pixels, view.rows).log_softmax(-1)
    own = logps.gather(1, ids[1:, None])[:, 0]
    return own[-count - 1 : -1]  # the last is the end token


def test_neither_the_context_nor_the_end_is_scored(tiny, processor):
    """Packed, next to a record without a context: each as alone, of full logits; also under another image."""
    batch = collate([RECORD, {**WHOLE, "id": "b"}, {**WHOLE, "id": "c", "context": ""}], rdpo.SEQUENCES, processor)
    with torch.no_grad():
        logps, mask, *_ = Scorer(tiny)(batch.packed, tiny.seen(batch.pixels))
    assert list(batch.responses) == list(rdpo.SEQUENCES)
    for i, (name, how) in enumerate(rdpo.SEQUENCES.items()):
        expected = by_hand(tiny, processor, RECORD, how["image"], how["response"])
        torch.testing.assert_close(logps[3 * i][mask[3 * i]], expected, rtol=0, atol=1e-4)
        continued, whole, first = batch.responses[name]
        assert processor.eos_id not in continued and whole == (*first, processor.eos_id)


def test_the_context_is_computed_once(processor):
    """As part of the prompt, which chosen and rejected share."""
    start, shared = len(processor.opening(CONTEXT)), len(processor.prompt(RECORD["prompt"]))
    batch, whole = (collate([record], dpo.SEQUENCES, processor).packed for record in (RECORD, WHOLE))
    answers = [len(processor.continuation(CONTEXT, RECORD[key])) for key in ("chosen", "rejected")]
    assert batch.prefixes == [shared + start] and whole.prefixes == [shared]
    assert len(batch.ids) == shared + start + sum(answers) - 2
    assert len(whole.ids) == len(batch.ids) + start + 2  # once more, and the last tokens of both, before the end


@pytest.mark.parametrize("sequences", [dpo.SEQUENCES, rdpo.SEQUENCES, reward_model.SEQUENCES])
@pytest.mark.parametrize("end", [False, True])
def test_tokens_are_counted_with_the_context(processor, sequences, end):
    for record in (RECORD, {**RECORD, "context": ""}):
        batch = collate([record], sequences, processor, end=end)
        assert tokens_of(record, sequences, processor, end=end) == len(batch.packed.ids)


def test_the_window_holds_the_context(processor):
    """Room for one token less than the longest answer needs is named, with the context in the count."""
    prompt, start = len(processor.prompt(RECORD["prompt"])), len(processor.opening(CONTEXT))
    need = prompt + start + len(processor.continuation(CONTEXT, RECORD["chosen"])) - 1
    window, processor.window = processor.window, need - 1
    (found, *_) = problems_of({**RECORD, "rejected": "A."}, processor, None, dpo.SEQUENCES)
    processor.window = need
    fits = problems_of({**RECORD, "rejected": "A."}, processor, None, dpo.SEQUENCES)
    processor.window = window
    assert found.startswith(f"'chosen': {need} tokens with prompt and image") and fits == []
    assert problems_of({**RECORD, "context": "a </s> b"}, processor, None) == \
        ["'context': text contains the special token </s>: 'a </s> b'"]


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "reason"), [
    (CONTEXT, ""), ("", ""), (None, ""), (7, "'context' must be a string, found int"),
    ("see <image>", "'context' contains <image>"), ("\ud83d", "'context' holds half a character")])
def test_a_context_in_a_file(tmp_path, context, reason):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({**RECORD, "context": context}) + "\n")
    if reason:
        with pytest.raises(BadInput, match=reason):
            read_pairs(path)
    else:
        assert read_pairs(path) == [{**RECORD, "context": context}]


@pytest.fixture
def folder(tmp_path):
    for name in ("VG_100K/7.jpg", "VG_100K_2/8.jpg", "one.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(tmp_path / name)
    return tmp_path


def test_sentinels_files_are_read(folder):
    """By image, for LLaVA-1.5; as rows; with the keys of LLaMA-Factory. An empty context is none, as in its code."""
    pair = {"question": "What?", "context": CONTEXT, "y_win": "A cat.", "y_lose": "A cow.", "type": "y+"}
    by_image = {"7": [pair, {**pair, "context": ""}], "8": [pair]}
    for indent in (None, 1):
        (folder / "d.json").write_text(json.dumps(by_image, indent=indent))
        data = load(folder / "d.json", needs={"rejected"})
        assert data.format == "sentinel" and [r["id"] for r in data.records] == ["7", "7-2", "8"]
        assert [r["image"] for r in data.records] == ["VG_100K/7.jpg"] * 2 + ["VG_100K_2/8.jpg"]
        assert [r.get("context") for r in data.records] == [CONTEXT, None, CONTEXT]
        assert (data.records[2]["prompt"], data.records[2]["chosen"], data.records[2]["rejected"]) == \
            ("What?", "A cat.", "A cow.")
    (folder / "d.jsonl").write_text(json.dumps({**pair, "image_id": 7, "image_path": "one.png", "is_last_sent": True}))
    (row,) = load(folder / "d.jsonl").records
    (folder / "f.json").write_text(json.dumps([{"instruction": "<image>What?", "context": CONTEXT, "chosen": "A cat.",
                                                "rejected": "A cow.", "images": ["one.png"]}]))
    (other,) = load(folder / "f.json").records
    assert (row["id"], other["source"]) == ("7", {"format": "llama-factory"})
    for found in (row, other):
        assert [found[key] for key in ("image", "prompt", "context", "chosen", "rejected")] == \
            ["one.png", "What?", CONTEXT, "A cat.", "A cow."]


def test_an_image_with_a_bad_pair_is_named(folder):
    pair = {"question": "What?", "y_win": "A cat.", "y_lose": "A cow."}
    (folder / "d.json").write_text(json.dumps({"7": [pair, {**pair, "y_lose": ""}], "9": [pair]}))
    with pytest.raises(BadInput) as caught:
        load(folder / "d.json")
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == \
        [f"{folder / 'd.json'}:{number}" for number in (2, 3)]
    assert "'rejected' is empty" in str(caught.value) and "VG_100K/9.jpg" in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trl_gets_whole_responses_and_gives_the_context_back(folder, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    pairs = [{**RECORD, "image": "one.png", "rejected_image": None, **more} for more in
             ({}, {"id": "b", "context": ""}, {"id": "c", "context": "One.\n"}, {"id": "d", "context": None})]
    write(folder / f"t{suffix}", pairs, "trl")
    found = load(folder / f"t{suffix}").records
    for record, pair in zip(found, pairs, strict=True):
        assert [record.get(key) for key in ("id", "context", "chosen", "rejected")] == \
            [pair[key] for key in ("id", "context", "chosen", "rejected")]
    if suffix == ".jsonl":
        row = json.loads((folder / "t.jsonl").read_text().split("\n")[0])
        assert row["chosen"][0]["content"][0]["text"] == WHOLE["chosen"]
        (folder / "other.jsonl").write_text(json.dumps({**row, "context": "found on a web page"}))
        (foreign,) = load(folder / "other.jsonl").records
        assert "context" not in foreign and foreign["chosen"] == WHOLE["chosen"]


def test_the_gallery_shows_it(tmp_path):
    write_gallery(tmp_path / "p.html", [{**RECORD, "context": "A <b> dog."}])
    assert "<h3>Context</h3><p>A &lt;b&gt; dog.</p>" in (tmp_path / "p.html").read_text()


# ---- who cannot use it -------------------------------------------------------------------------------------------


def test_who_writes_whole_responses_says_so(tmp_path):
    write_jsonl(tmp_path / "p.jsonl", [RECORD])
    with pytest.raises(BadInput, match=r"p.jsonl: its responses continue a 'context', a loss that samples"):
        read_records(tmp_path / "p.jsonl", LOSSES["mixed_dpo"])
    assert read_records(tmp_path / "p.jsonl", LOSSES["dpo"]).records == [RECORD]
    assert read_records(tmp_path / "p.jsonl", LOSSES["ppo"]).records == \
        [{key: RECORD[key] for key in ("id", "image", "prompt")}]
    for method in ("bdhs", "corrupt", "symmpo"):
        with pytest.raises(BadInput, match=f"{method} writes whole responses"):
            make_pairs(method, records=[RECORD])
    pairs, _ = make_pairs("mdpo", records=[RECORD], folder=tmp_path, root=tmp_path, progress=False)
    assert [(pair["context"], pair["chosen"]) for pair in pairs] == [(CONTEXT, RECORD["chosen"])]


def test_a_run_says_that_a_file_has_contexts(tmp_path, capsys):
    """A column of that name in somebody's file may mean another thing."""
    row = {"instruction": "<image>What is it?", "images": ["scene:3"], "chosen": "A dog.", "rejected": "A cat."}
    for name, more in (("with", {"context": "There is a cup."}), ("without", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps([row | more]))
        args = SimpleNamespace(data=tmp_path / f"{name}.json", batch_size=1)
        find_records(args, LOSSES["dpo"], None, None, 0, 1)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("1 records, read as llama-factory, with a context that their responses continue")
    assert said[1].endswith("1 records, read as llama-factory")
