"""Janus-Pro against transformers: logits, greedy text, both published layouts, prompts, pixels, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import BadInput
from data.processor import Processor
from model.adapters import save_adapters
from model.checkpoint import load_llava, save_llava
from model.families import find_family, janus
from model.generate import generate
from model.lora import add_lora, lora_layers
from model.views import single

TIGHT = dict(rtol=0, atol=1e-4)
VQ = dict(embed_dim=8, num_embeddings=16, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
          latent_channels=32, projection_dim=18, image_token_embed_dim=18)
TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>",
          "<image_placeholder>", "<|User|>", "<|Assistant|>")
QUESTIONS = ("Is there a dog?", "What is  there?\nTell me.", "Ünïcode 🙂 12")
ORIGINAL = (  # name of transformers -> name of the original repository
    (r"^lm_head\.", "language_model.lm_head."), (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."), (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
    (r"^model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"^model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (r"^model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
    (r"(blocks\.\d+\.)layer_norm", r"\1norm"), (r"(blocks\.\d+\.)self_attn\.projection_layer", r"\1attn.proj"),
    (r"^model\.generation_embeddings\.", "gen_embed."), (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.vision_head\.", "gen_head.vision_head."), (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.encoder)\.down\.", r"\1.conv_blocks."), (r"^(gen_vision_model\.decoder)\.up\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*)\.block\.", r"\1.res."), (r"mid\.block_1\.", "mid.0."), (r"mid\.attn_1\.", "mid.1."),
    (r"mid\.block_2\.", "mid.2."),
)


def tokenizer() -> Tokenizer:
    """Byte-level BPE whose decoder leaves blanks as they are, with Janus-Pro's special tokens."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer, result.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*TOKENS], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    result.train_from_iterator([janus.SYSTEM, ": Is there a dog in the image?\n\n: Yes, there is a dog."] * 9, trainer)
    return result


def write_theirs(folder: Path, text: dict | None = None, dtype: torch.dtype = torch.float32, **vision):
    """A folder of `save_pretrained` with random weights, everything that generates images in it; and the model."""
    transformers = pytest.importorskip("transformers")
    raw = {**small.JANUS, "vision_config": {**small.JANUS_VISION, **vision}, "vq_config": VQ,
           "text_config": {**small.TEXT, **(text or {})}}
    model = transformers.JanusForConditionalGeneration(transformers.JanusConfig(**raw, tie_word_embeddings=False)).eval()
    model.load_state_dict({n: small.weight(n, tuple(t.shape)) for n, t in model.state_dict().items()})
    model.to(dtype).save_pretrained(folder)
    return model


def write_original(folder: Path, source: Path, monkeypatch, shards: int = 1) -> Path:
    """The checkpoint in `source` as deepseek-ai publishes it: fused attention weights, timm's names, .bin."""
    tensors, fused = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in ORIGINAL:
            name = re.sub(pattern, replacement, name)
        if found := re.fullmatch(r"(vision_model\..*)self_attn\.([qkv])_proj\.(\w+)", name):
            fused.setdefault(f"{found[1]}attn.qkv.{found[3]}", {})[found[2]] = tensor
        else:
            tensors[name] = tensor
    tensors |= {name: torch.cat([parts[x] for x in "qkv"]) for name, parts in fused.items()}
    tensors["vision_model.vision_tower.pos_embed"] = tensors["vision_model.vision_tower.pos_embed"][None]
    tensors |= {"vision_model.vision_tower.attn_pool.latent": torch.ones(1, 1, 24),
                "gen_vision_model.quantize.codebook_used": torch.ones(7)}
    raw, folder = json.loads((source / "config.json").read_text()), folder / "original"
    folder.mkdir()
    monkeypatch.setitem(janus.TOWERS, "small", {k: v for k, v in small.JANUS_VISION.items() if k != "model_type"})
    (folder / "config.json").write_text(json.dumps({
        "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"],
        "vision_config": {"cls": "CLIPVisionTower", "params": {"model_name": "small", "image_size": small.SIDE,
                                                               "select_feature": "same", "select_layer": -1}},
        "aligner_config": {"params": {"depth": 2, "input_dim": 24, "n_embed": 18, "projector_type": "mlp_gelu"}},
        "gen_vision_config": {"params": {"image_token_size": 16, "n_embed": 8}}, "language_config": raw["text_config"]}))
    (folder / "tokenizer.json").write_text(json.dumps(
        {"model": {"vocab": {"a": 0, "<image_placeholder>": 64}}, "added_tokens": [{"content": TOKENS[1], "id": 3}]}))
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, placed = sorted(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({n: tensors[n] for n in names[i::shards]}, folder / file)
        placed |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


IDS = (1, 5, *[small.IMAGE_TOKEN] * small.PATCHES, 7, 9, 11)


def ours(folder: Path, side: int = small.SIDE, ids: tuple[int, ...] = IDS, **load) -> torch.Tensor:
    with torch.no_grad():
        return load_llava(folder, **load).logits(torch.tensor(ids), small.pictures(1, side))


def theirs(model, side: int = small.SIDE, ids: tuple[int, ...] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=small.pictures(1, side)).logits[0]


def reloaded(folder: Path):
    """`transformers`' model of a folder in which each tensor has its place."""
    load = pytest.importorskip("transformers").JanusForConditionalGeneration.from_pretrained
    model, report = load(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


# ------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("text, vision", [
    ({}, {}),
    (dict(num_key_value_heads=6), dict(image_size=20, num_image_tokens=16, mlp_ratio=4.0)),
    (dict(num_attention_heads=3, num_key_value_heads=1, head_dim=6, rms_norm_eps=1e-3),
     dict(image_size=21, patch_size=7, num_attention_heads=4, num_hidden_layers=1, layer_norm_eps=1e-3)),
])
def test_live_logits(tmp_path, text, vision):
    model, side = write_theirs(tmp_path, text, **vision), vision.get("image_size", small.SIDE)
    ids = (1, 5, *[small.IMAGE_TOKEN] * vision.get("num_image_tokens", small.PATCHES), 7, 9, 11)
    torch.testing.assert_close(ours(tmp_path, side, ids), theirs(model, side, ids), **TIGHT)


def test_live_bf16(tmp_path):
    """As far from fp32 as transformers is."""
    exact = theirs(write_theirs(tmp_path / "fp32"))
    rough = theirs(write_theirs(tmp_path / "bf16", dtype=torch.bfloat16)).float()
    found = ours(tmp_path / "bf16", dtype=torch.bfloat16).float()
    assert (found - exact).abs().mean() < 1.5 * (rough - exact).abs().mean() < 0.1


def test_live_greedy(tmp_path):
    model, n = write_theirs(tmp_path), 12
    mine, prompts = load_llava(tmp_path), [list(IDS), [*IDS[:2], *IDS[2:-3], 21]]
    views = [single(picture, small.PATCHES) for picture in small.pictures(2)]
    found = generate(mine, views, prompts, eos_id=-1, max_new_tokens=n)
    for picture, ids, (answer,) in zip(small.pictures(2), prompts, found):
        expected = model.generate(input_ids=torch.tensor([ids]), pixel_values=picture[None], max_new_tokens=n,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)
        assert answer == expected[0, -n:].tolist()
    assert found[0] != found[1]


@pytest.mark.parametrize("shards", [1, 2])
def test_live_original_layout(tmp_path, monkeypatch, shards):
    """Read as it is; saved in the layout of transformers, what generates images included, tensor for tensor."""
    model = write_theirs(tmp_path / "theirs")
    folder = write_original(tmp_path, tmp_path / "theirs", monkeypatch, shards)
    torch.testing.assert_close(ours(folder), theirs(model), **TIGHT)
    save_llava(load_llava(folder), tmp_path / "saved", folder)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (raw["vq_config"]["num_embeddings"], raw["vq_config"]["embed_dim"]) == (16, 8)
    assert (raw["text_config"]["bos_token_id"], raw["text_config"]["eos_token_id"]) == (100000, 3)
    raw["vq_config"] |= VQ  # the original has one size of it only
    (tmp_path / "saved" / "config.json").write_text(json.dumps(raw))
    again = reloaded(tmp_path / "saved")
    torch.testing.assert_close(theirs(again), theirs(model), **TIGHT)
    assert again.generation_config.eos_token_id == 3
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(BadInput, match="would be mixed with another layout"):
        save_llava(load_llava(folder), folder, folder)


@pytest.mark.parametrize("shard_bytes", [10**9, 60_000])
def test_live_saved(tmp_path, shard_bytes):
    """A trained model is read by transformers and here; what generates images goes along."""
    write_theirs(tmp_path / "theirs")
    model = load_llava(tmp_path / "theirs")
    add_lora(model.language_model, 2, 4.0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.2)
        model.aligner.hidden_layers[0].bias += 0.5
        expected = model.logits(torch.tensor(IDS), small.pictures(1))
    save_llava(model, tmp_path / "saved", tmp_path / "theirs", shard_bytes=shard_bytes)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shard_bytes < 10**6)
    torch.testing.assert_close(ours(tmp_path / "saved"), expected, **TIGHT)
    torch.testing.assert_close(theirs(reloaded(tmp_path / "saved")), expected, **TIGHT)
    assert not torch.allclose(ours(tmp_path / "theirs"), expected, atol=0.1)


def test_live_adapters(tmp_path):
    """PEFT puts our adapters onto the model of transformers, and we put PEFT's onto ours."""
    peft = pytest.importorskip("peft")
    write_theirs(tmp_path / "base")
    model = load_llava(tmp_path / "base").requires_grad_(False)
    add_lora(model.language_model, 2, 4.0)
    model.aligner.requires_grad_(True)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.2)
        model.aligner.fc1.bias += 0.5
        expected = model.logits(torch.tensor(IDS), small.pictures(1))
    save_adapters(model, tmp_path / "adapters", tmp_path / "base")
    torch.testing.assert_close(ours(tmp_path / "adapters"), expected, **TIGHT)
    together = peft.PeftModel.from_pretrained(reloaded(tmp_path / "base"), tmp_path / "adapters").eval()
    torch.testing.assert_close(theirs(together), expected, **TIGHT)
    together.save_pretrained(tmp_path / "peft")
    torch.testing.assert_close(ours(tmp_path / "peft"), expected, **TIGHT)


def test_live_untied_head(tmp_path):
    """config.json without tie_word_embeddings, which means True to transformers: the file's head counts."""
    model = write_theirs(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for change in ({}, {"tie_word_embeddings": True}):
        (tmp_path / "config.json").write_text(json.dumps(
            {k: v for k, v in raw.items() if k != "tie_word_embeddings"} | change))
        torch.testing.assert_close(ours(tmp_path), theirs(model), **TIGHT)
        torch.testing.assert_close(theirs(reloaded(tmp_path)), theirs(model), **TIGHT)
    (tmp_path / "config.json").write_text(json.dumps(
        raw | {"text_config": raw["text_config"] | {"tie_word_embeddings": True}}))
    torch.testing.assert_close(ours(tmp_path), theirs(model), **TIGHT)


# ------------------------------------------------------------------------------------------------ configuration


def test_published_configurations(tmp_path):
    """Janus-Pro-7B's config.json leaves most fields of the decoder out."""
    part = {
        "model_type": "multi_modality", "gen_vision_config": {"params": {"image_token_size": 16384, "n_embed": 8}},
        "vision_config": {"params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same",
                                     "select_layer": -1}}}
    language = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
    small_one = {**language, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
                 "num_hidden_layers": 24, "num_key_value_heads": 16}
    for text, width, weights in ((language, 4096, 7_235_034_112), (small_one, 2048, 1_962_640_384)):
        aligner = {"params": {"depth": 2, "input_dim": 1024, "n_embed": width, "projector_type": "mlp_gelu"}}
        (tmp_path / "config.json").write_text(json.dumps(part | {"language_config": text, "aligner_config": aligner}))
        config = janus.read(tmp_path)
        assert (config.tile_tokens, config.image_token_index, config.text.rms_norm_eps) == (576, 100581, 1e-6)
        assert (config.vision.layer_norm_eps, config.vision.hidden_act) == (1e-6, "gelu")
        with torch.device("meta"):
            assert sum(p.numel() for p in janus.Model(config).parameters()) == weights
        again = janus.janus_config(janus.hf_config(config))
        assert replace(again, vision=replace(again.vision, projection_dim=config.vision.projection_dim)) == config


@pytest.mark.parametrize("change, reason", [
    (dict(vision_config=None), "has no vision_config"),
    (dict(vision_config={**small.JANUS_VISION, "model_type": "siglip_vision_model"}), "siglip_vision_model"),
    (dict(vision_config={**small.JANUS_VISION, "hidden_act": "gelu_pytorch_tanh"}), "gelu_pytorch_tanh"),
    (dict(vision_config={**small.JANUS_VISION, "use_qk_norm": True}), "use_qk_norm=True"),
    (dict(vision_config={**small.JANUS_VISION, "depth": 3}), "depth=3"),
    (dict(vision_config={**small.JANUS_VISION, "projection_dim": 2048}), "projection_dim=2048"),
    (dict(vision_config={**small.JANUS_VISION, "num_image_tokens": 576}), "num_image_tokens=576"),
    (dict(vision_config={**small.JANUS_VISION, "mlp_ratio": "4"}), "mlp_ratio='4' is not a number"),
    (dict(vision_config={**small.JANUS_VISION, "num_attention_heads": 5}), "24 is no multiple of 5"),
    (dict(vision_config={**small.JANUS_VISION, "patch_size": 18}), "patch_size=18 is larger than image_size=17"),
    (dict(text_config={**small.TEXT, "attention_bias": True}), "attention_bias=True"),
    (dict(image_token_id=-1), "image_token_id=-1"),
])
def test_other_architectures_are_refused(change, reason):
    with pytest.raises(BadInput, match=f"somewhere.*{re.escape(reason)}"):
        janus.janus_config({**small.JANUS, **change}, "somewhere")


def test_every_tensor_must_fit(tmp_path, monkeypatch):
    """Missing, unexpected, of another shape: all named, also in the fused layout."""
    folder = small.write_janus(tmp_path / "janus")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.aligner.fc1.bias"] = torch.ones(5)
    tensors["model.extra.weight"] = tensors.pop("model.vision_model.post_layernorm.bias")
    tensors["model.vqmodel.any"] = torch.ones(1)  # generates images
    small.write(folder, small.JANUS, tensors)
    with pytest.raises(BadInput) as error:
        load_llava(folder)
    assert all(line in str(error.value) for line in (
        "missing tensor vision_model.post_layernorm.bias", "unexpected tensor model.extra.weight",
        "tensor model.aligner.fc1.bias is (5,), expected (18,)")) and "vqmodel" not in str(error.value)
    fused = write_original(tmp_path, small.write_janus(tmp_path / "whole"), monkeypatch)
    state = torch.load(fused / "pytorch_model.bin", weights_only=True)
    name = "vision_model.vision_tower.blocks.1.attn.qkv.weight"
    for rows, reason in ((71, "unexpected tensor vision_model.encoder.layers.1.self_attn.qkv.weight"),
                         (69, rf"tensor {name} is \(23, 24\), expected \(24, 24\)")):
        torch.save({**state, name: state[name][:rows]}, fused / "pytorch_model.bin")
        with pytest.raises(BadInput, match=reason):
            load_llava(fused)


# -------------------------------------------------------------------------------------------- prompts and pixels


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Janus-Pro folder with a tokenizer of its own, the image settings of transformers, and one photograph."""
    small.write_janus(tmp_path, dict(vocab_size=400, max_position_embeddings=512), image_token_id=TOKENS.index("<image_placeholder>"))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings(tmp_path)
    return tmp_path


def settings(folder: Path, kind: str = "JanusImageProcessor", **more) -> None:
    raw = dict(image_processor_type=kind, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True, min_size=14)
    size = {"image_size": small.SIDE} if kind == "VLMImageProcessor" else {"size": dict(height=small.SIDE, width=small.SIDE)}
    (folder / "preprocessor_config.json").write_text(json.dumps(raw | size | more))


def test_live_prompts(folder):
    """Token for token what the processor of transformers makes of its chat template, and the response after it."""
    transformers = pytest.importorskip("transformers")
    marks = dict(image_token=TOKENS[5], boi_token=TOKENS[3], eoi_token=TOKENS[4])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=TOKENS[0],
                                                eos_token=TOKENS[1], pad_token=TOKENS[2], extra_special_tokens=marks)
    image_processor = transformers.models.janus.image_processing_pil_janus.JanusImageProcessorPil()
    their = transformers.JanusProcessor(image_processor, fast, use_default_system_prompt=True,
                                        num_image_tokens=small.PATCHES)
    mine, photo = Processor(folder), Image.fromarray(small.photo(40, 24))
    for question in QUESTIONS:
        for shown in ("<image_placeholder>\n", ""):
            text = f"<|User|>: {shown}{question}\n\n<|Assistant|>:"
            images = {"images": [photo]} if shown else {}
            for answer in ("", " A dog, 12."):
                expected = their(text=text + answer, **images, return_tensors=None)["input_ids"]
                expected = expected[0] if isinstance(expected[0], list) else expected
                expected = [0, *(i for i in expected if i != 0)]  # whether the tokenizer begins with BOS or not
                found = mine.prompt(question, None if shown else 0)
                assert found + (mine.response(answer[1:])[:-1] if answer else []) == expected


def test_the_prompt_to_the_letter(folder):
    processor = Processor(folder)
    ids = processor.prompt("Is there a dog?")
    assert ids[0] == processor.tokenizer.id("<｜begin▁of▁sentence｜>") and ids.count(processor.image_id) == small.PATCHES
    assert processor.tokenizer.core.decode(ids[1:], skip_special_tokens=False) == (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.\n\n<|User|>: <begin_of_image>"
        + "<image_placeholder>" * small.PATCHES + "<end_of_image>\nIs there a dog?\n\n<|Assistant|>:")
    response = processor.response("Yes, a dog.")
    assert processor.tokenizer.core.decode(response, skip_special_tokens=False) == " Yes, a dog.<｜end▁of▁sentence｜>"
    assert processor.decode(response) == "Yes, a dog." and processor.decode([]) == ""
    assert processor.decode(processor.response("  two blanks ")) == "  two blanks "
    with pytest.raises(BadInput, match="special token <image_placeholder>"):
        processor.prompt("a <image_placeholder>")


def test_the_documented_letters_are_the_template():
    line = janus.__doc__.split("to the letter:\n\n    janus   ")[1].split("\n\n")[0].replace("\n" + " " * 12, "")
    template = janus.TEMPLATES["janus"]
    text = template.before + template.image + template.after + template.answer + template.stop
    assert line.replace("{system}", janus.SYSTEM) == text.replace("\n", "⏎")


SIZES = ((40, 24), (23, 57), (31, 31), (5, 90), (16, 17), (300, 211))


@pytest.mark.parametrize("size", SIZES)
def test_live_pixels(folder, size):
    """Equal to transformers' processor on Pillow, the sides rounded."""
    transformers = pytest.importorskip("transformers")
    photo = Image.fromarray(small.photo(*size))
    for side, normalised in ((17, True), (30, False)):
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"] |= {"image_size": side, "num_image_tokens": (side // 5) ** 2}
        (folder / "config.json").write_text(json.dumps(config))
        settings(folder, size={"height": side, "width": side}, do_normalize=normalised)
        kind = transformers.models.janus.image_processing_pil_janus.JanusImageProcessorPil
        expected = kind.from_pretrained(folder)([photo], return_tensors="pt")["pixel_values"]
        view = Processor(folder).view(photo)
        torch.testing.assert_close(view.pixels, expected.float(), rtol=0, atol=2e-6)
        assert len(view.rows) == (side // 5) ** 2


def test_the_short_side(folder, monkeypatch):
    """Truncated by the original, rounded by transformers, at least 14 pixels; the rest is the mean colour."""
    assert janus.resized((384, 289), 512, "pad") == (512, 385) and janus.resized((384, 289), 512, "pad_round") == (512, 385)
    assert janus.resized((300, 211), 384, "pad") == (384, 270) and janus.resized((211, 300), 384, "pad") == (270, 384)
    assert janus.resized((400, 299), 384, "pad") == (384, 287) and janus.resized((400, 299), 384, "pad_round") == (384, 287)
    assert janus.resized((1000, 700), 384, "pad") == (384, 268) and janus.resized((1000, 700), 384, "pad_round") == (384, 269)
    assert janus.resized((1000, 10), 384, "pad") == (384, 14)
    assert Processor(folder).aspect == "pad_round" and Processor(folder, aspect="pad").aspect == "pad"
    settings(folder, "VLMImageProcessor")
    processor = Processor(folder)
    assert processor.aspect == "pad"
    pixels = processor.view(Image.new("RGB", (57, 50), (255, 255, 255))).pixels[0]  # 17 x 14.9: 14 rows, from row 1 on
    rows = np.array([row.unique().tolist() for row in pixels[0]]).ravel()
    assert rows == pytest.approx([127 / 127.5 - 1] + [1.0] * 14 + [127 / 127.5 - 1] * 2)
    with pytest.raises(BadInput, match="aspect 'crop' is none of pad, pad_round"):
        Processor(folder, aspect="crop")


@pytest.mark.parametrize("change, reason", [
    (dict(image_processor_type="CLIPImageProcessor"), "image_processor_type='CLIPImageProcessor'"),
    (dict(size={"height": 384, "width": 384}), "size={'height': 384, 'width': 384} is not what"),
    (dict(image_size=384), "image_size=384"), (dict(min_size=7), "min_size=7"), (dict(do_pad=False), "do_pad=False"),
    (dict(image_std=[0.5, 0, 0.5]), "divides by 0"), (dict(image_mean=[0.5, 2, 0.5]), "image_mean"),
    (dict(rescale_factor=1), "rescale_factor=1"), (dict(resample=2), "resample=2"),
])
def test_image_settings_are_checked(folder, change, reason):
    settings(folder, **change)
    with pytest.raises(BadInput, match=f"preprocessor_config.json: .*{re.escape(reason)}"):
        Processor(folder)


def test_the_family_is_found():
    assert find_family({"model_type": "janus"}) is find_family({"model_type": "multi_modality"}) is janus
