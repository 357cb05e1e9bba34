"""CLIP, LLaMA, LLaVA and the image preprocessing against `transformers`.

Twice: against goldens (tests/goldens/make.py), which need nothing but this repository, and live, where
`transformers` is installed. Sizes are awkward on purpose (tests/small.py).
"""

import dataclasses

import numpy as np
import pytest
import small
import torch
from goldens import make
from PIL import Image
from safetensors.torch import load_file

from data.images import open_image
from model.attention import Causal
from model.checkpoint import load_clip, load_llava, save_llava
from model.clip import VisionTransformer
from model.config import llama_config
from model.families.llava import llava_config
from model.llama import CausalLM
from model.views import Preprocessing, preprocess

TIGHT = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(make.GOLDENS)


def logits(model, i: int) -> torch.Tensor:
    """Logits of golden prompt i with picture i."""
    with torch.no_grad():
        return model.logits(torch.tensor(make.PROMPTS[i]), small.pictures(3)[i : i + 1])


# ---------------------------------------------------------------------------------------------------- goldens


def test_goldens_stay_small():
    assert make.GOLDENS.stat().st_size < 200_000


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_vision_hidden_states(clip_folder, golden, layers):
    """A tower built up to k layers gives hidden state k of the whole tower."""
    state = load_clip(clip_folder).vision_model.state_dict()
    tower = VisionTransformer(load_clip(clip_folder).config.vision, layers)
    tower.load_state_dict({k: state[k] for k in tower.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(tower(small.pictures(3)), golden[f"clip.hidden.{layers}"], **TIGHT)


def test_clip_embeddings(clip_folder, golden):
    """Pooling, final norms, projections; text ids above the EOS id (40) must not be taken for the end."""
    clip = load_clip(clip_folder)
    torch.testing.assert_close(clip.image_embeddings(small.pictures(3)), golden["clip.images"], **TIGHT)
    torch.testing.assert_close(clip.text_embeddings(list(make.TEXTS)), golden["clip.texts"], **TIGHT)


def test_clip_text_legacy_pooling(tmp_path, golden):
    """eos_token_id 2 in the config means: the state at the largest id (66 here)."""
    clip = load_clip(small.write_clip(tmp_path, eos_token_id=2))
    torch.testing.assert_close(clip.text_embeddings(list(make.TEXTS_LEGACY)), golden["legacy.texts"], **TIGHT)


def test_clip_text_does_not_depend_on_its_batch(clip_folder):
    clip = load_clip(clip_folder)
    together = clip.text_embeddings(list(make.TEXTS))
    alone = torch.cat([clip.text_embeddings([t]) for t in make.TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("i", [0, 1, 2])
def test_llava_logits(model, golden, i):
    torch.testing.assert_close(logits(model, i), golden[f"llava.logits.{i}"], **TIGHT)


@pytest.mark.parametrize("size", make.PHOTOS)
def test_preprocessing(golden, size):
    """Wide, tall, square, tiny and odd pictures, pixel for pixel."""
    ours = preprocess(Image.fromarray(small.photo(*size)), Preprocessing(small.SIDE))
    torch.testing.assert_close(ours, golden[f"photo.{size[0]}x{size[1]}"], rtol=0, atol=2e-6)


# --------------------------------------------------------------------------------------------- without either


def test_the_image_token_is_never_looked_up(model):
    """Its embedding, where the table has one, does not matter; that of any other token does."""
    before = logits(model, 0)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight[small.IMAGE_TOKEN] = 1e3
        assert torch.equal(logits(model, 0), before)
        model.language_model.model.embed_tokens.weight[5] += 1
    assert not torch.allclose(logits(model, 0), before, atol=1e-3)


def test_image_token_outside_the_vocabulary(tmp_path, golden):
    """Original LLaVA: the image token's id is larger than the embedding table."""
    model = load_llava(small.write_llava(tmp_path, image_token_index=200))
    ids = torch.tensor([200 if t == small.IMAGE_TOKEN else t for t in make.PROMPTS[1]])
    with torch.no_grad():
        ours = model.logits(ids, small.pictures(2)[1:])
    torch.testing.assert_close(ours, golden["llava.logits.1"], **TIGHT)


def test_several_pictures_in_one_sequence(model):
    """Pictures are taken in order: exchanging two changes the result, exchanging equal ones does not."""
    ids = torch.tensor(small.prompt(7) + small.prompt(8, 9))
    a, b = small.pictures(2)
    with torch.no_grad():
        ab, ba, aa = (model.logits(ids, torch.stack(p)) for p in ((a, b), (b, a), (a, a)))
        first = model.logits(ids[: len(small.prompt(7))], a[None])
    torch.testing.assert_close(ab[: len(first)], first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ab[: len(first)], aa[: len(first)], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ab, ba, atol=1e-2) and not torch.allclose(ab, aa, atol=1e-2)


@pytest.mark.parametrize(
    "ids, pictures, reason",
    [
        (small.prompt(7)[:-2], 1, "8 image tokens for 9 image features"),
        (small.prompt(7), 2, "9 image tokens for 18 image features"),
    ],
)
def test_image_tokens_must_match_the_pictures(model, ids, pictures, reason):
    with pytest.raises(ValueError, match=reason):
        model.logits(torch.tensor(ids), small.pictures(pictures))


def test_a_picture_of_another_size_is_refused(model):
    with pytest.raises(ValueError, match=r"\(3, 18, 17\).*\(3, 17, 17\)"):
        model.vision_features(torch.zeros(1, 3, 18, 17))


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(text_config={**small.TEXT, "hidden_act": "gelu"}), "hidden_act='gelu'"),
        (dict(text_config={**small.TEXT, "attention_bias": True}), "attention_bias=True"),
        (dict(text_config={**small.TEXT, "rope_scaling": {"type": "linear", "factor": 2}}), "type='linear'"),
        (dict(text_config={**small.TEXT, "rope_parameters": {"rope_type": "yarn"}}), "rope_type='yarn'"),
        (dict(text_config={**small.TEXT, "model_type": "qwen2"}), "model_type='qwen2'"),
        (dict(vision_config={**small.VISION, "hidden_act": "gelu"}), "hidden_act='gelu'"),
        (dict(vision_config={**small.VISION, "model_type": "siglip_vision_model"}), "siglip_vision_model"),
        (dict(vision_config=None), "has no vision_config"),
        (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy='full'"),
        (dict(vision_feature_layer=[-2, -5]), r"vision_feature_layer=\[-2, -5\]"),
        (dict(vision_feature_layer=-5), "vision_feature_layer=-5 is not one of the tower's 4 states"),
    ],
)
def test_configurations_with_other_mathematics_are_refused(change, reason):
    with pytest.raises(ValueError, match=f"somewhere.*{reason}"):
        llava_config({**small.LLAVA, **change}, "somewhere")


def test_defaults_are_those_of_the_published_config():
    """llava-1.5-7b-hf's config.json leaves most fields out; they mean Vicuna-7B and CLIP ViT-L/14-336."""
    raw = dict(
        model_type="llava", image_token_index=32000, vision_feature_layer=-2, projector_hidden_act="gelu",
        text_config=dict(model_type="llama", rms_norm_eps=1e-5, vocab_size=32064),
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=1024, image_size=336, intermediate_size=4096,
            num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768,
        ),
    )
    config = llava_config(raw)
    assert config.vision_layers_used == 23 and config.vision.num_patches == 576
    assert config.vision.layer_norm_eps == 1e-5 and config.vision.hidden_act == "quick_gelu"
    text = config.text
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (32, 32, 128)
    assert (text.rope_theta, text.rms_norm_eps, text.tie_word_embeddings) == (10000.0, 1e-5, False)


def test_files_that_are_no_pictures_are_named(tmp_path):
    Image.fromarray(small.photo(40, 24)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    assert open_image("good.png", tmp_path).size == (40, 24)
    broken = {"cut.png": whole[: len(whole) // 2], "text.png": b"no picture", "empty.png": b"",
              "noisy.png": whole[:60] + bytes(40) + whole[100:]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a readable image"):
            open_image(name, tmp_path)
    with pytest.raises(ValueError, match="absent.png: no such image"):
        open_image("absent.png", tmp_path)


# ------------------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def theirs(transformers, folder, **inputs) -> torch.Tensor:
    """Logits of `transformers` for the checkpoint in `folder`; each of its tensors must find its place."""
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model, report = load(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def inputs(i: int) -> dict[str, torch.Tensor]:
    return dict(input_ids=torch.tensor([make.PROMPTS[i]]), pixel_values=small.pictures(3)[i : i + 1])


def test_live_goldens_are_current(transformers, golden, clip_folder, llava_folder):
    """The committed file is what make.py computes today."""
    with torch.no_grad():
        fresh = {f"clip.{k}": v for k, v in make.clip_outputs(clip_folder, make.TEXTS).items()}
        fresh |= {f"llava.{k}": v for k, v in make.llava_outputs(llava_folder).items()}
    fresh |= {f"photo.{k}": v for k, v in make.preprocessed().items()}
    assert fresh.keys() == golden.keys() - {"legacy.texts"}
    for name, value in fresh.items():
        torch.testing.assert_close(golden[name], value, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("eos_id, ends", [(40, 40), (2, 66)])
def test_live_clip_as_saved_by_transformers(transformers, tmp_path, eos_id, ends):
    """Random ids, both pooling styles, read from a folder that `save_pretrained` wrote."""
    source = small.write_clip(tmp_path / "ours", eos_token_id=eos_id)
    clip = transformers.CLIPModel.from_pretrained(source).eval()
    clip.save_pretrained(tmp_path / "theirs")
    ours = load_clip(tmp_path / "theirs")
    draw = np.random.default_rng(0)
    words = [t for t in range(3, 66) if t != ends]
    texts = [[65, *draw.choice(words, n).tolist(), ends] for n in (0, 1, 4, 7, 10)]
    ids = torch.tensor([t + [ends] * (12 - len(t)) for t in texts])
    with torch.no_grad():
        states = clip.text_model(input_ids=ids).pooler_output
        expected = make.unit(clip.text_projection(states))
    torch.testing.assert_close(ours.text_embeddings(texts), expected, **TIGHT)
    torch.testing.assert_close(ours.logit_scale, clip.logit_scale.detach())


@pytest.mark.parametrize("layer", [-1, -2, -3, -4, 1, 3])  # their own 0 fails
def test_live_every_vision_feature_layer(transformers, tmp_path, layer):
    folder = small.write_llava(tmp_path, vision_feature_layer=layer)
    expected = theirs(transformers, folder, **inputs(0))[0]
    torch.testing.assert_close(logits(load_llava(folder), 0), expected, **TIGHT)


@pytest.mark.parametrize(
    "text",
    [
        dict(num_key_value_heads=6),
        dict(num_key_value_heads=1, head_dim=4),
        dict(num_attention_heads=3, num_key_value_heads=3, head_dim=6),
        dict(model_type="mistral", sliding_window=None),
        dict(rope_theta=1e6, rms_norm_eps=1e-3),
        dict(tie_word_embeddings=True),
    ],
)
def test_live_decoder_variants(transformers, tmp_path, text):
    """Head layouts, Mistral, another rotary base, tied embeddings."""
    tied = text.get("tie_word_embeddings", False)
    folder = small.write_llava(tmp_path, text, tie_word_embeddings=tied)
    expected = theirs(transformers, folder, **inputs(2))[0]
    torch.testing.assert_close(logits(load_llava(folder), 2), expected, **TIGHT)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_live_decoder_alone(transformers, kind):
    """The decoder as a plain language model, without LLaVA around it."""
    raw = {**small.TEXT, "model_type": kind, "sliding_window": None}
    ours = CausalLM(llama_config(raw))
    ours.load_state_dict(small.fill(ours.state_dict()))
    config = transformers.AutoConfig.for_model(**raw)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(ours.state_dict())
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, small.VOCAB, 50))
    embeddings = ours.model.embed_tokens(ids)
    with torch.no_grad():
        states = ours.model(embeddings, torch.arange(50), Causal())
        torch.testing.assert_close(ours.lm_head(states), model(ids[None]).logits[0], **TIGHT)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_live_defaults_equal(transformers, kind):
    """A field that config.json leaves out means what it means to `transformers`."""
    ours, default = llama_config({"model_type": kind}), transformers.AutoConfig.for_model(kind)
    for field in dataclasses.fields(ours):
        if field.name not in ("head_dim", "rope_theta", "max_position_embeddings"):
            assert getattr(ours, field.name) == getattr(default, field.name), field.name
    assert ours.head_dim == 128 and ours.rope_theta == default.rope_parameters["rope_theta"]


def test_live_folder_written_by_transformers(transformers, tmp_path, llava_folder):
    """What the installed version's `save_pretrained` writes loads here, and gives equal logits."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder)
    model.save_pretrained(tmp_path)
    expected = theirs(transformers, tmp_path, **inputs(1))[0]
    torch.testing.assert_close(logits(load_llava(tmp_path), 1), expected, **TIGHT)


def test_live_folder_written_here(transformers, tmp_path, model, llava_folder):
    """What `save_llava` writes loads there, with equal logits; a trained weight makes a difference."""
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight += 0.3
        model.multi_modal_projector.linear_1.bias -= 0.2
    save_llava(model, tmp_path, llava_folder)
    saved = theirs(transformers, tmp_path, **inputs(1))[0]
    torch.testing.assert_close(logits(model, 1), saved, **TIGHT)
    assert not torch.allclose(logits(load_llava(llava_folder), 1), saved, atol=1e-2)


def test_live_several_pictures(transformers, model, llava_folder):
    ids, pictures = torch.tensor(small.prompt(7) + small.prompt(8, 9)), small.pictures(2)
    expected = theirs(transformers, llava_folder, input_ids=ids[None], pixel_values=pictures)[0]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids, pictures), expected, **TIGHT)


def test_live_batch_of_different_pictures(transformers, model, llava_folder):
    ids, pictures = torch.tensor(make.PROMPTS[0]), small.pictures(4)
    expected = theirs(transformers, llava_folder, input_ids=ids.expand(4, -1), pixel_values=pictures)
    with torch.no_grad():
        ours = torch.stack([model.logits(ids, p[None]) for p in pictures])
    torch.testing.assert_close(ours, expected, **TIGHT)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)


def test_live_preprocessing_of_random_sizes(transformers):
    processor = make.image_processor()
    draw = np.random.default_rng(3)
    for width, height in draw.integers(2, 80, (40, 2)):
        image = Image.fromarray(small.photo(int(width), int(height)))
        expected = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(preprocess(image, Preprocessing(small.SIDE)), expected, rtol=0, atol=2e-6)
