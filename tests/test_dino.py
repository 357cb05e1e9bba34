"""networks/dino.py against transformers, on small random weights."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from common import BadInput
from networks import dino

WORDS = {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029, "dog": 5, "traffic": 6, "light": 7, "cat": 8}
IDS = torch.tensor([[101, 5, 1012, 6, 7, 9, 1012, 102]])
SHORT = torch.tensor([[101, 8, 30, 1012, 102, 0, 0, 0]])


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.15)
        if "norm" in name.lower() and name.endswith("weight") or re.search(r"input_proj_vision\.\d\.1\.weight", name):
            p.data += 1


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(transformers' model, the folder it is saved in)."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("dino")
    swin = transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4],
                                   window_size=4, out_features=["stage2", "stage3", "stage4"], drop_path_rate=0.0)
    config = transformers.GroundingDinoConfig(
        backbone_config=swin, num_queries=12, encoder_layers=2, encoder_ffn_dim=40, encoder_attention_heads=4,
        decoder_layers=3, decoder_ffn_dim=40, decoder_attention_heads=4, d_model=32, num_feature_levels=4, max_text_len=64,
        text_config=dict(model_type="bert", vocab_size=1100, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=20))
    model = transformers.GroundingDinoForObjectDetection(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(WORDS, "[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words.save(str(folder / "tokenizer.json"))
    return model, folder


def load(folder, name: str = "model.safetensors") -> dino.Dino:
    return dino.load_dino(folder / name, folder / "tokenizer.json", heads=4, bert_heads=2)


@pytest.fixture(autouse=True)
def edge(monkeypatch):
    monkeypatch.setattr(dino, "EDGE", 1e-5)  # that of transformers


def compare(ours, theirs, pixels, inside, ids, words, rows=slice(None), tolerance=3e-5):
    with torch.no_grad():
        logits, boxes = ours(ours.maps(pixels), inside, ids, words)
        wanted = theirs(pixel_values=pixels, pixel_mask=inside.long(), input_ids=ids, attention_mask=words.long())
    T = ids.shape[1]
    torch.testing.assert_close(logits[rows], wanted.logits[rows, :, :T], atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(boxes[rows], wanted.pred_boxes[rows], atol=1e-5, rtol=1e-4)
    return logits, boxes


@pytest.mark.parametrize("size", [(64, 96), (75, 51), (33, 120)])
def test_it_equals_transformers(peer, size):
    torch.manual_seed(5)
    pixels, inside = torch.randn(1, 3, *size), torch.ones(1, *size, dtype=torch.bool)
    compare(load(peer[1]), peer[0], pixels, inside, IDS, torch.ones_like(IDS, dtype=torch.bool))


def test_a_batch_equals_one_at_a_time(peer):
    """Captions of other lengths and images of other sizes; each sees its own caption's mask alone."""
    torch.manual_seed(6)
    ours = load(peer[1])
    ids, words = torch.cat([IDS, SHORT]), torch.cat([IDS, SHORT]) > 0
    pixels, inside = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.bool)
    inside[1, 48:], inside[1, :, 64:] = False, False
    pixels[1].masked_fill_(~inside[1], 0)
    logits, boxes = compare(ours, peer[0], pixels, inside, ids, words)
    alone, own = ours(ours.maps(pixels[:1]), inside[:1], IDS, IDS > 0)
    torch.testing.assert_close(logits[:1], alone, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(boxes[:1], own, atol=1e-5, rtol=1e-4)
    cut = SHORT[:, :5]
    alone, own = ours(ours.maps(pixels[1:]), inside[1:], cut, cut > 0)
    torch.testing.assert_close(logits[1:, :, :5], alone, atol=3e-5, rtol=1e-4)
    assert (logits[1, :, 5:] == float("-inf")).all()


def test_phrases_see_themselves():
    visible, positions = dino.phrases(torch.cat([IDS[0], torch.zeros(1, dtype=torch.long)]), 8)
    assert positions.tolist() == [0, 0, 1, 0, 1, 2, 3, 0, 0]
    blocks = [{0}, {1, 2}, {1, 2}, {3, 4, 5, 6}, {3, 4, 5, 6}, {3, 4, 5, 6}, {3, 4, 5, 6}, {7}, {8}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in visible] == blocks
    visible, positions = dino.phrases(torch.tensor([101, 8, 30, 102]), 4)  # no full stop: no phrase has ended
    assert torch.equal(visible, torch.eye(4, dtype=torch.bool)) and not positions.any()


def published(tensors: dict) -> dict:
    """transformers' names and layout -> those of the original repository, by a table of its own."""
    table = [("backbone.", "backbone.0."), ("encoder.", "transformer.encoder."), ("decoder.", "transformer.decoder."),
             ("tgt_embed.", "transformer.tgt_embed."), ("level_embed", "transformer.level_embed"),
             ("enc_out", "transformer.enc_out")]
    result = {}
    for name, tensor in dino.convert(tensors).items():
        name = next((b + name.removeprefix(a) for a, b in table if name.startswith(a)), name)
        name = re.sub(r"\.in_proj\.", ".in_proj_", name)
        name = re.sub(r"^(transformer\..*)\.mlp\.fc", r"\1.linear", name)
        name = re.sub(r"\.attention\.attn\.([qkv])\.", lambda m: f".attention.self.{dict(q='query', k='key', v='value')[m[1]]}.",
                      name)
        name = name.replace(".attention.attn.o.", ".attention.output.dense.")
        name = name.replace(".attention.LayerNorm.", ".attention.output.LayerNorm.")
        copies = [name]
        if name.startswith("bbox_embed."):
            inner = name.removeprefix("bbox_embed.")
            copies = [f"{where}bbox_embed.{i}.{inner}" for where in ("", "transformer.decoder.") for i in range(3)]
        result |= {f"module.{copy}": tensor.clone() for copy in copies}
    more = {"module.label_enc.weight": torch.zeros(2, 3), "module.bert.embeddings.position_ids": torch.arange(4),
            "module.bert.pooler.dense.weight": torch.zeros(2, 2),
            "module.backbone.0.layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, dtype=torch.long)}
    return result | more


def test_the_original_file_is_read(peer):
    """{"model": ...} with "module." before each name, fused projections, twelve copies of the boxes' MLP."""
    _, folder = peer
    state = published(load_file(folder / "model.safetensors"))
    assert "module.transformer.encoder.text_layers.0.self_attn.in_proj_weight" in state
    assert "module.backbone.0.layers.1.blocks.0.attn.qkv.weight" in state
    assert "module.bert.encoder.layer.0.attention.self.query.weight" in state
    torch.save({"model": state}, folder / "original.pth")
    one, two = load(folder), load(folder, "original.pth")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_wrong_files_are_named(peer, tmp_path):
    _, folder = peer
    with pytest.raises(BadInput, match=r"none\.pth: not found; wanted is groundingdino_swint_ogc\.pth \(0\.7 GB\)"):
        load(folder, "none.pth")
    with pytest.raises(BadInput, match=r"none\.json: not a readable tokenizer"):
        dino.load_dino(folder / "model.safetensors", tmp_path / "none.json")
    state = load_file(folder / "model.safetensors")
    del state["model.decoder.layers.1.fc2.bias"]
    state["model.unknown"] = torch.zeros(2)
    save_file(state, folder / "damaged.safetensors")
    with pytest.raises(BadInput, match=r"missing tensor decoder\.layers\.1\.mlp\.fc2\.bias; unexpected tensor unknown"):
        load(folder, "damaged.safetensors")


def test_captions_hold_all_tags(peer, monkeypatch):
    """Each tag once, lower case, ended by a full stop; several captions where one is too short for all."""
    words = load(peer[1]).tokenizer
    (ids, spans), = dino.captions(["Dog", "traffic light", "Dog"], words)
    assert ids == [101, 5, 1012, 6, 7, 1012, 102] and spans == [("Dog", (1, 2)), ("traffic light", (3, 5))]
    monkeypatch.setattr(dino, "MOST_TOKENS", 7)
    assert [ids for ids, _ in dino.captions(["dog", "cat", "traffic light"], words)] == [
        [101, 5, 1012, 8, 1012, 102], [101, 6, 7, 1012, 102]]
    with pytest.raises(BadInput, match="has 5 tokens, wanted are 1 to 4"):
        dino.captions(["dog dog dog dog dog"], words)


def test_boxes_are_in_pixels_best_first(peer, monkeypatch):
    """Two queries on one cat overlap and become one; a dog on the same place stays; the uncertain one goes."""
    ours = load(peer[1])
    logits = torch.full((1, 4, 6), -9.0)
    logits[0, 0, 3], logits[0, 1, 3], logits[0, 2, 1], logits[0, 3, 1] = 2.0, 3.0, 1.0, -2.0  # dog at 1, cat at 3
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.52, 0.5], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]])
    monkeypatch.setattr(type(ours), "forward", lambda *_: (logits, boxes))
    found = ours.boxes(Image.new("RGB", (200, 100)), ["dog", "cat"])
    assert [tag for tag, *_ in found] == ["cat", "dog"]
    assert found[0][1] == pytest.approx(torch.tensor(3.0).sigmoid().item())
    assert found[1][2] == pytest.approx((50, 25, 150, 75)) and found[0][2] == pytest.approx((48, 25, 152, 75))
    assert ours.boxes(Image.new("RGB", (200, 100)), ["dog"], threshold=0.9) == []


@pytest.mark.parametrize(("size", "wanted"), [((640, 480), (800, 1066)), ((480, 640), (1066, 800)), ((1000, 100), (133, 1330))])
def test_images_are_resized_as_released_code_does(size, wanted):
    assert dino.preprocess(Image.new("L", size)).shape == (3, *wanted)


def test_published_sizes():
    """172,839,682 parameters of Swin-T's model, less BERT's pooler (590,592)."""
    from networks.bert import BertConfig
    from networks.swin import BASE, TINY

    with torch.device("meta"):
        counts = [sum(p.numel() for p in dino.Dino(swin, BertConfig()).parameters()) for swin in (TINY, BASE)]
    assert counts == [172_839_682 - 590_592, 232_903_808 - 590_592]


def test_bf16(peer):
    model = load(peer[1]).bfloat16()
    pixels, inside = torch.randn(1, 3, 64, 96).bfloat16(), torch.ones(1, 64, 96, dtype=torch.bool)
    logits, boxes = model(model.maps(pixels), inside, IDS, IDS > 0)
    assert logits.isfinite().all() and boxes.isfinite().all()
