"""A new family is a file and a line of the table: it trains, generates, is saved and loaded like LLaVA.

First the toy family, whose image tokens depend on the question; then every family of the table on small random weights.
"""

import json
import math
import subprocess
from pathlib import Path

import pytest
import small
import test_instructblip
import test_janus
import torch
import toy_family
from PIL import Image
from safetensors.torch import load_file
from test_processor import tokenizer

import evaluate
import generate_pairs
import train
from data import scenes
from data.batch import collate
from data.processor import Processor
from data.records import write_jsonl
from judges import ask
from losses import dpo
from model.adapters import save_adapters
from model.checkpoint import DEFAULT_CLIP, load_llava, save_llava
from model.families import FAMILIES, find_family
from model.generate import answers
from model.logprobs import Scorer, Sequence, naive_logprobs
from model.lora import Reference, add_lora, lora_layers
from pairs import bdhs, online, realign

ROOT = Path(__file__).parents[1]
PROMPTS = ["a dog", "Is there a dog in the image?", "a"]
RECORDS = [dict(id=str(i), image=image, prompt=prompt, chosen="Yes, a dog.", rejected="a dog in")
           for i, (image, prompt) in enumerate([("a.png", PROMPTS[0]), ("a.png", PROMPTS[1]), ("b.png", PROMPTS[0])])]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint of the toy family, with two images next to it."""
    monkeypatch.setitem(FAMILIES, "toy", toy_family)  # the line of the table
    raw = {**small.LLAVA, "model_type": "toy", "text_config": {**small.TEXT, "vocab_size": 400}, "image_token_index": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    small.write(tmp_path, raw, small.fill(toy_family.Model(toy_family.read(tmp_path)).state_dict()))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "reader").mkdir()
    (tmp_path / "reader" / "vocabulary.txt").write_text("".join(map(chr, range(32, 127))))
    for name, size in (("a.png", (40, 24)), ("b.png", (23, 57))):
        Image.fromarray(small.photo(*size)).save(tmp_path / name)
    return tmp_path


def test_the_prompt_is_the_familys(folder):
    """<unk> and <pad> around four image tokens, then <s>; without an image the text alone."""
    processor = Processor(folder)
    text = [1, *processor.tokenizer.encode("Q a dog A")]
    assert processor.prompt("a dog") == [0, 4, 4, 4, 4, 2, *text]
    assert processor.prompt("a dog", 0) == text
    assert processor.image_tokens("a.png", folder) == len(processor.image("a.png", folder).rows) == 4


def test_a_dpo_step(folder):
    """Scores equal one sequence at a time; the tower runs once an image, the connector once a prompt; all learn."""
    model, processor = load_llava(folder), Processor(folder)
    model.requires_grad_(False)
    torch.manual_seed(0)
    add_lora(model.language_model, 2, 4.0)
    for name in ("query_tokens", "words", "multi_modal_projector"):
        for parameter in ([model.query_tokens] if name == "query_tokens" else getattr(model, name).parameters()):
            parameter.requires_grad_(True)
    batch = collate(RECORDS, dpo.SEQUENCES, processor, folder)
    assert len(batch.pixels) == 2
    logps, mask = Scorer(model)(batch.packed, model.vision_features(batch.pixels))
    assert model.calls == [3]
    views = [processor.image(record["image"], folder) for record in RECORDS]
    plain = [Sequence(i, tuple(processor.prompt(r["prompt"])), tuple(processor.response(r[field])), False,
                      processor.question(r["prompt"]))
             for field in ("chosen", "rejected") for i, r in enumerate(RECORDS)]
    for row, keep, expected in zip(logps, mask, naive_logprobs(model, plain, views), strict=True):
        torch.testing.assert_close(row[keep], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(logps[0], logps[1])  # one image and response, two questions
    with Reference(model)():
        reference = Scorer(model)(batch.packed, model.vision_features(batch.pixels))[0]
    chosen, rejected = (logps * mask).sum(1).chunk(2)
    ref_chosen, ref_rejected = (reference * mask).sum(1).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log())
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in (model.query_tokens, model.words.weight))


def test_generation_with_and_without_an_image(folder):
    """Batched answers are those given one at a time; the image and the question change the image tokens."""
    model, processor = load_llava(folder), Processor(folder)
    images, prompts = ["a.png", "a.png", None, "b.png"], [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    together = answers(model, processor, images, prompts, max_new_tokens=6, root=folder)
    alone = [answers(model, processor, [i], [p], max_new_tokens=6, root=folder)[0] for i, p in zip(images, prompts)]
    assert together == alone and len({a for a, in together}) == 4


def test_whoever_generates_hands_the_question_on(folder):
    """A judge, samples while training, completions with hidden image tokens, gaps: each needs this family's question."""
    model, processor = load_llava(folder), Processor(folder)
    ask.local_model(model, processor, "toy", max_new_tokens=2, root=folder).ask([ask.Request("a.png", PROMPTS[0])])
    online.sample(model, processor, RECORDS, [1, 2, 3], folder, samples=2, temperature=1.0, max_new_tokens=2)
    bdhs.complete([bdhs.Attempt("a.png", "a dog", [], 0.5, 3)], model, processor, max_new_tokens=2, root=folder)
    realign.infill([realign.Job("a.png", "a dog", "Yes, a dog", [(5, 10)])], model, processor, gap_tokens=2, root=folder)
    assert model.calls == [1, 3, 1, 1]


def test_save_and_load(folder, tmp_path):
    """Whole and as adapters: the same logits."""
    model, processor = load_llava(folder).requires_grad_(False), Processor(folder)
    torch.manual_seed(0)
    add_lora(model.language_model, 2, 4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    view, ids = processor.image("a.png", folder), torch.tensor(processor.prompt("a dog"))
    expected = model.eval().logits(ids, view.pixels, view.rows, (1, 2)).detach()
    save_llava(model, tmp_path / "whole", folder)
    save_adapters(model, tmp_path / "adapters", folder)
    for name in ("whole", "adapters"):
        again = load_llava(tmp_path / name)
        assert type(again) is toy_family.Model and Processor(tmp_path / name).template is toy_family.TEMPLATES["toy"]
        torch.testing.assert_close(again.logits(ids, view.pixels, view.rows, (1, 2)), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- every family


def write_llava(folder: Path) -> None:
    small.write_llava(folder, {"vocab_size": 400, "max_position_embeddings": 1024}, image_token_index=4)
    tokenizer().save(str(folder / "tokenizer.json"))


def write_janus(folder: Path) -> None:
    small.write_janus(folder, {"vocab_size": 400, "max_position_embeddings": 1024}, image_token_id=5)
    test_janus.tokenizer().save(str(folder / "tokenizer.json"))


WRITERS = {"llava": write_llava, "instructblip": test_instructblip.write, "janus": write_janus}
SHORT = ["--samples", "2", "--max-new-tokens", "6", "--inner-epochs", "1", "--clip-model", str(DEFAULT_CLIP)]
LOSSES = {  # loss -> its options, and its value where policy = reference
    "dpo": (["--train-projector"], math.log(2)),
    "adavip": (["--precision", "bf16"], math.log(3)),
    "ppo": (["--judge", "clip", *SHORT], None),
    "fisao": (SHORT, None),
    "bdhs_online": (["--max-new-tokens", "6", "--clip-model", str(DEFAULT_CLIP)], None),
}
BASELINES = dict(correct=50.0, hallucinated=40.0, low=30.0, high=60.0, std=5.0, unit="250 * max(cos, 0)")


@pytest.fixture(scope="module", params=WRITERS)
def checkpoint(request, tmp_path_factory) -> Path:
    """A checkpoint of each family, with two images next to it."""
    path = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](path)
    for name, size in (("a.png", (40, 24)), ("b.png", (23, 57))):
        Image.fromarray(small.photo(*size)).save(path / name)
    return path


def run_losses(checkpoint: Path, out: Path, rows: list[dict], *more: str) -> list[float]:
    """Two steps of train.py -> their losses."""
    write_jsonl(out.parent / "data.jsonl", rows)
    assert train.main(["--model", str(checkpoint), "--data", str(out.parent / "data.jsonl"), "--out", str(out),
                       "--batch-size", "2", "--steps", "2", "--lora-rank", "2", "--lr", "0.01", "--log-every", "1",
                       "--eval-scenes", "0", *more]) == 0
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(checkpoint, tmp_path, loss):
    """Two steps; what trains, and nothing else, differs in the model that comes out, which is read again."""
    rows = [{"id": f"r{i}", "image": scenes.reference(scenes.PAIRS + i), "prompt": "a dog", "chosen": "Yes, a dog.",
             "rejected": "a dog in", "rejected_image": scenes.reference(scenes.PAIRS + 9 + i)} for i in range(2)]
    more, start = LOSSES[loss]
    if loss == "fisao":
        (tmp_path / "baselines.json").write_text(json.dumps(BASELINES))
        more = [*more, "--baselines", str(tmp_path / "baselines.json")]
    losses = run_losses(checkpoint, tmp_path / "out", rows, "--loss", loss, *more)
    assert start is None or losses[0] == pytest.approx(start, abs=1e-5) and losses[1] != losses[0]
    dtype = torch.bfloat16 if "bf16" in more else torch.float32
    before, after = load_llava(checkpoint, dtype), load_llava(tmp_path / "out" / "model", dtype)
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    connector = {name for name in moved if name.startswith(before.CONNECTOR)}
    assert bool(connector) == (loss == "dpo")
    assert all(name.startswith("language_model.model.layers.") for name in moved - connector)
    assert moved or loss in ("fisao", "bdhs_online")  # no object is named, or no answer finished, by random weights


@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
def test_the_tower_trains(checkpoint, tmp_path, more):
    """With --train-vision, and in the saved model; recomputed or not, to the same losses and weights."""
    rows = [{**row, "image": str(checkpoint / row["image"])} for row in RECORDS]
    told = ["--loss", "dpo", "--train-vision", "--vision-lr", "0.001"]
    losses = run_losses(checkpoint, tmp_path / "out", rows, *told, *more)
    before, after = load_llava(checkpoint), load_llava(tmp_path / "out" / "model")
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    assert len([name for name in moved if name.startswith(f"{before.TOWER}.")]) > 10
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the reference's tower is the policy's at the start
    frozen = run_losses(checkpoint, tmp_path / "frozen", rows, "--loss", "dpo")
    assert losses[1] != frozen[1]


def test_it_is_estimated_and_sharded(checkpoint, tmp_path, capsys):
    """--estimate counts the model's weights; --shard, in one process, trains as without."""
    rows = [{**row, "image": str(checkpoint / row["image"])} for row in RECORDS]
    plain = run_losses(checkpoint, tmp_path / "plain", rows, "--loss", "dpo")
    assert run_losses(checkpoint, tmp_path / "sharded", rows, "--loss", "dpo", "--shard") == pytest.approx(plain, abs=1e-5)
    capsys.readouterr()
    assert train.main(["--loss", "dpo", "--model", str(checkpoint), "--data", str(tmp_path / "data.jsonl"),
                       "--out", str(tmp_path / "no"), "--batch-size", "2", "--steps", "2", "--lora-rank", "2",
                       "--estimate"]) == 0
    count = sum(p.numel() for p in load_llava(checkpoint).parameters())
    adapters = sum(x.numel() for name, x in load_file(tmp_path / "plain" / "adapters" / "adapter_model.safetensors").items())
    assert f"parameters    {count + adapters:,}, of which {adapters:,} train" in capsys.readouterr().out


def test_reference_cache(checkpoint, tmp_path):
    """What is read from the file is what is computed: the same losses."""
    rows = [{**row, "image": str(checkpoint / row["image"])} for row in RECORDS]
    plain = run_losses(checkpoint, tmp_path / "plain", rows, "--loss", "dpo")
    cache = ["--reference-cache", str(tmp_path / "cache.safetensors")]
    assert run_losses(checkpoint, tmp_path / "cached", rows, "--loss", "dpo", *cache) == pytest.approx(plain, abs=1e-5)


def test_pairs_and_benchmarks(checkpoint, tmp_path, monkeypatch):
    """The commands end well: BDHS pairs (random enough that sentences end), captions, yes and no."""
    rows = [{**row, "image": str(checkpoint / row["image"])} for row in RECORDS]
    write_jsonl(tmp_path / "data.jsonl", rows)
    monkeypatch.setattr("sys.argv", [
        "", "--method", "bdhs", "--model", str(checkpoint), "--data", str(tmp_path / "data.jsonl"), "--clip-model",
        str(DEFAULT_CLIP), "--temperature", "10", "--max-new-tokens", "300", "--out", str(tmp_path / "pairs.jsonl")])
    generate_pairs.main()
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["rejected"] != pair["chosen"] for pair in pairs)
    evaluate.main(["--benchmark", "chair", "pope", "--model", str(checkpoint), "--scenes", "2", "--max-new-tokens", "6",
                   "--out", str(tmp_path / "results.json")])
    assert (tmp_path / "results.json").is_file()


def test_scores_equal_one_sequence_at_a_time(checkpoint):
    model, processor = load_llava(checkpoint), Processor(checkpoint)
    batch = collate(RECORDS, dpo.SEQUENCES, processor, checkpoint)
    logps, mask = Scorer(model)(batch.packed, model.vision_features(batch.pixels))
    views = [processor.image(record["image"], checkpoint) for record in RECORDS]
    plain = [Sequence(i, tuple(processor.prompt(r["prompt"])), tuple(processor.response(r[field])), False,
                      processor.question(r["prompt"]))
             for field in ("chosen", "rejected") for i, r in enumerate(RECORDS)]
    for row, keep, expected in zip(logps, mask, naive_logprobs(model, plain, views), strict=True):
        torch.testing.assert_close(row[keep], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(logps[0], logps[2])  # one text, two images


def test_answers_in_a_batch(checkpoint):
    """Those given one at a time; the image changes them."""
    model, processor = load_llava(checkpoint), Processor(checkpoint)
    images, prompts = ["a.png", "a.png", None, "b.png"], [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    together = answers(model, processor, images, prompts, max_new_tokens=6, root=checkpoint)
    alone = [answers(model, processor, [i], [p], max_new_tokens=6, root=checkpoint)[0] for i, p in zip(images, prompts)]
    assert together == alone and together[0] != together[2]


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_saved_and_read(checkpoint, tmp_path, shard_bytes):
    """Whole, in shards and as adapters: the same logits."""
    model, processor = load_llava(checkpoint).requires_grad_(False), Processor(checkpoint)
    torch.manual_seed(0)
    add_lora(model.language_model, 2, 4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    connector = model.get_submodule(model.CONNECTOR).requires_grad_(True)
    with torch.no_grad():
        next(connector.parameters()).add_(0.1)
    shown, ids = processor.image("a.png", checkpoint), torch.tensor(processor.prompt("a dog"))
    question = processor.question("a dog")
    expected = model.eval().logits(ids, shown.pixels, shown.rows, question).detach()
    save_llava(model, tmp_path / "whole", checkpoint, shard_bytes=shard_bytes)
    save_adapters(model, tmp_path / "adapters", checkpoint)
    assert (tmp_path / "whole" / "model.safetensors.index.json").exists() == (shard_bytes < 10**6)
    for name in ("whole", "adapters"):
        again, read = load_llava(tmp_path / name), Processor(tmp_path / name)
        assert read.template is processor.template and read.question("a dog") == question
        torch.testing.assert_close(again.logits(ids, shown.pixels, shown.rows, question), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- the table


def test_an_unknown_family_is_named(tmp_path):
    with pytest.raises(ValueError, match="x: model_type='toy' is not supported .supported: llava, "):
        find_family({"model_type": "toy"}, "x")


def test_every_family_has_every_name():
    """What the table's file lists."""
    from model import families

    names = {line.split("(")[0].split()[0] for line in families.__doc__.splitlines()
             if line.startswith("      ") and "->" in line or line.startswith("      ") and "TEMPLATES" in line}
    assert {"read", "tensors", "view", "image_tokens", "question_reader"} <= {n.strip(",") for n in names}
    for family in {*FAMILIES.values(), toy_family}:
        assert all(hasattr(family, n.strip(",")) for n in {*names, "Model", "SPECIAL"}), family


def test_model_imports_nothing_above_it():
    found = subprocess.run(["grep", "-rnE", r"^\s*(from|import) (data|judges|pairs|metrics|retrieval|losses)\b", "model",
                            "--include=*.py"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""
