"""networks/ram.py against parts of transformers: Swin, and the cross-attention layers of InstructBLIP's Q-Former."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_swin import CONFIG, peer_names, share, swin_config

from common import BadInput
from networks import ram

NAMES = (("attn.q", "self.query"), ("attn.k", "self.key"), ("attn.v", "self.value"), ("attn.o", "output.dense"),
         ("LayerNorm", "output.LayerNorm"))  # of a layer's attention -> as published

SIZES = dict(swin=CONFIG, size=64, width=24, image_width=20, heads=4, hidden=36, layers=2)


def build(labels: int = 5, descriptions: int = 3) -> ram.Ram:
    torch.manual_seed(1)
    model = ram.Ram(labels, descriptions, **SIZES).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def published(model: ram.Ram) -> dict[str, torch.Tensor]:
    """As released files hold it: with buffers and the captioning half."""
    more = {"visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long),
            "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(1), "text_decoder.x": torch.zeros(2),
            "tag_encoder.x": torch.zeros(2)}
    return {**{crossing(k): v.detach().clone() for k, v in model.state_dict().items()}, **more}


def crossing(name: str) -> str:
    """The published name of a tensor."""
    for ours, theirs in NAMES if "tagging_head" in name else ():
        name = name.replace(f".attention.{ours}.", f".crossattention.{theirs}.")
    return name


@pytest.mark.parametrize("descriptions", [1, 3])
def test_it_equals_parts_of_transformers(descriptions):
    transformers = pytest.importorskip("transformers")
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerLayer

    model = build(5, descriptions)
    swin = transformers.SwinModel(swin_config(transformers, 64)).eval()
    share(model.visual_encoder, swin, peer_names(swin))
    with torch.no_grad():
        model.image_proj.weight *= 5  # so that the image's tokens differ, and the descriptions' weights
        if descriptions > 1:
            model.reweight_scale.fill_(3.0)
    config = transformers.InstructBlipQFormerConfig(
        hidden_size=24, num_attention_heads=4, intermediate_size=36, encoder_hidden_size=20, cross_attention_frequency=1)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        seen = swin(pixels)
        image = model.image_proj(torch.cat([seen.pooler_output[:, None], seen.last_hidden_state], 1))
        if descriptions == 1:
            labels = model.label_embed.expand(2, -1, -1)
        else:  # by the definition, one label at a time
            c = image[:, 0] / image[:, 0].norm(dim=-1, keepdim=True)
            rows = []
            for label in model.label_embed.split(descriptions):
                w = (model.reweight_scale.exp() * c @ label.T).softmax(-1)
                rows.append((w[..., None] * label).sum(1))
            labels = torch.stack(rows, 1)
        labels = F.relu(model.wordvec_proj(labels))
        for ours in model.tagging_head["encoder"]["layer"]:
            theirs = InstructBlipQFormerLayer(config, 0).eval()
            state = {crossing(f"tagging_head.{k}").removeprefix("tagging_head.").replace(".self.", ".attention."): v
                     for k, v in ours.state_dict().items()}
            missing = theirs.load_state_dict(state, strict=False)
            assert not missing.unexpected_keys
            labels = theirs.crossattention(labels, None, image, None)
            labels = labels[0] if isinstance(labels, tuple) else labels
            labels = theirs.output(theirs.intermediate(labels), labels)
        wanted, summaries, own = model.fc(labels)[..., 0], [], model.label_vectors
        model.label_vectors = lambda summary: own(summaries.append(summary) or summary)
        torch.testing.assert_close(model(pixels), wanted, atol=1e-5, rtol=1e-5)
    assert (image[:, 0] - image[:, 1]).abs().max() > 1e-3  # the mean of all is not the first
    torch.testing.assert_close(summaries[0], image[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("descriptions", "suffix"), [(1, "pth"), (3, "pth"), (3, "safetensors")])
def test_published_files_are_read(tmp_path, descriptions, suffix):
    model, path = build(5, descriptions), tmp_path / f"ram.{suffix}"
    state = {name.replace("tagging_head", "vision_multi"): t for name, t in published(model).items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(
        {"model": state, "optimizer": {"step": 3}, "config": {"a": 1}, "epoch": 2}, path)
    loaded = ram.load_ram(path, 5, **SIZES)
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(pixels), model(pixels)) and not any(p.requires_grad for p in loaded.parameters())


def test_weights_are_fp32_whatever_the_file_has(tmp_path):
    torch.save({name: t.bfloat16() for name, t in build().state_dict().items()}, tmp_path / "ram.pth")
    assert {p.dtype for p in ram.load_ram(tmp_path / "ram.pth", 5, **SIZES).parameters()} == {torch.float32}


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "ram.pth"
    with pytest.raises(BadInput, match=r"ram\.pth: not found; wanted is ram_plus_swin_large_14m\.pth \(3\.0 GB"):
        ram.load_ram(path, 5)
    state = published(build())
    del state["fc.bias"]
    torch.save(state, path)
    with pytest.raises(BadInput, match=r"ram\.pth: missing tensor fc\.bias"):
        ram.load_ram(path, 5, **SIZES)
    with pytest.raises(BadInput, match="15 rows, which does not fit 4 tags"):
        ram.load_ram(path, 4, **SIZES)
    torch.save({name: t for name, t in published(build()).items() if name != "reweight_scale"}, path)
    with pytest.raises(BadInput, match="15 rows, which does not fit 5 tags"):  # RAM has one row a tag
        ram.load_ram(path, 5, **SIZES)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(BadInput, match="no tensor label_embed; wanted is"):
        ram.load_ram(path, 5, **SIZES)


def test_tags_and_thresholds(tmp_path):
    names, levels = tmp_path / "names.txt", tmp_path / "levels.txt"
    names.write_text("dog\ncat\nabbey\nabbey\ntree")
    levels.write_text("0.5\n0.65\n0.9\n0.2\n0.8")
    listed = ram.read_tags(names, levels)
    assert listed[0] == ["dog", "cat", "abbey", "abbey", "tree"]
    assert ram.read_tags(names)[1].tolist() == [pytest.approx(0.68)] * 5
    model = build()
    scores = torch.tensor([0.6, 0.6, 0.95, 0.7, 0.81])
    model.forward = lambda pixels: torch.logit(scores)[None]
    found = model.tags(Image.new("L", (30, 20)), *listed)
    assert [(tag, round(score, 4)) for tag, score in found] == [("abbey", 0.95), ("tree", 0.81), ("dog", 0.6)]
    model.forward = lambda pixels: torch.full((1, 5), -0.0)  # a half is not above the dog's threshold of a half
    assert [tag for tag, _ in model.tags(Image.new("L", (30, 20)), *listed)] == ["abbey"]
    levels.write_text("0.5\n0.65")
    with pytest.raises(BadInput, match="2 thresholds for the 5 tags"):
        ram.read_tags(names, levels)
    with pytest.raises(BadInput, match="not a readable text file of tags"):
        ram.read_tags(tmp_path / "none.txt")


def test_preprocessing():
    image = Image.fromarray(np.full((10, 30, 3), (255, 0, 128), np.uint8))
    pixels = ram.preprocess(image, 8)
    wanted = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(ram.MEAN)) / torch.tensor(ram.STD)
    torch.testing.assert_close(pixels, wanted[:, None, None].expand(3, 8, 8))


def test_bf16():
    assert build().bfloat16()(torch.randn(1, 3, 64, 64).bfloat16()).isfinite().all()


def test_published_sizes():
    """Parameters of the published models, without the labels' embeddings."""
    with torch.device("meta"):
        model = ram.Ram(4585, 51)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert parts == {"visual_encoder": 195_198_516, "image_proj": 786_944, "wordvec_proj": 393_984,
                     "tagging_head": 13_389_312, "fc": 769}
    assert model.label_embed.shape == (233_835, 512)
