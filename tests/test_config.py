"""Broken and foreign config.json: one line that names file, section and key, before anything is built."""

import json
import re

import pytest
import small
from test_checkpoint import ANYRES, VICUNA, original

from common import BadInput
from model.config import clip_config, read_config
from model.families import family_of
from model.families.llava import llava_config, read, tower_folder
from model.hub import resolve

HUGE = 10**30


def llava(**fields) -> dict:
    return {**small.LLAVA, **fields}


def text(**fields) -> dict:
    return llava(text_config={**small.TEXT, **fields})


def vision(**fields) -> dict:
    return llava(vision_config={**small.VISION, **fields})


NEXT = llava(model_type="llava_next")


@pytest.mark.parametrize(
    "raw, reason",
    [
        (text(num_hidden_layers=HUGE), f"text_config: num_hidden_layers={HUGE} is not between 1 and 1000"),
        (text(num_hidden_layers=0), "text_config: num_hidden_layers=0 is not between"),
        (text(hidden_size="18"), "text_config: hidden_size='18' is not a whole number"),
        (text(hidden_size=18.0), "text_config: hidden_size=18.0 is not a whole number"),
        (text(vocab_size=True), "text_config: vocab_size=True is not a whole number"),
        (text(vocab_size=[67]), "text_config: vocab_size=[67] is not a whole number"),
        (text(num_attention_heads=-6), "text_config: num_attention_heads=-6 is not between"),
        (text(num_key_value_heads=4), "text_config: 6 is no multiple of 4 (num_attention_heads, num_key"),
        (text(head_dim=None, hidden_size=20), "text_config: 20 is no multiple of 6 (hidden_size, num_att"),
        (text(head_dim=9), "text_config: 9 is no multiple of 2"),
        (text(rms_norm_eps="1e-5"), "text_config: rms_norm_eps='1e-5' is not a number"),
        (text(rms_norm_eps=-1), "text_config: rms_norm_eps=-1 is not between 0 and 1"),
        (text(rope_theta=[1]), "text_config: rope_theta=[1] is not a number"),
        (text(rope_theta=0), "text_config: rope_theta=0 is not between"),
        (text(rope_parameters={"rope_theta": "x"}), "text_config: rope_parameters: rope_theta='x' is not a number"),
        (text(rope_parameters=["default"]), "text_config: rope_parameters is no object"),
        (text(rope_scaling="linear"), "text_config: rope_scaling is no object"),
        (text(rope_scaling={"type": "linear"}), "text_config: rope_scaling: type='linear' is not supported"),
        (text(model_type="mistral", sliding_window="x"), "text_config: sliding_window='x' is not a whole number"),
        (text(tie_word_embeddings="no"), "text_config: tie_word_embeddings='no' is not true or false"),
        (text(max_position_embeddings=HUGE), "text_config: max_position_embeddings="),
        (vision(hidden_size=25), "vision_config: 25 is no multiple of 3 (hidden_size, num_attention_heads)"),
        (vision(patch_size=18), "vision_config: patch_size=18 is larger than image_size=17"),
        (vision(image_size=HUGE), f"vision_config: image_size={HUGE} is not between 1 and 2048"),
        (vision(image_size=[17, 17]), "vision_config: image_size=[17, 17] is not a whole number"),
        (vision(layer_norm_eps=True), "vision_config: layer_norm_eps=True is not a number"),
        (llava(vision_config=[1]), "somewhere: vision_config is no object"),
        (llava(text_config=None), "somewhere: has no text_config"),
        (llava(text_config="llama"), "somewhere: text_config is no object"),
        (llava(image_token_index="<image>"), "somewhere: image_token_index='<image>' is not a whole number"),
        (llava(image_token_index=-200), "somewhere: image_token_index=-200 is not between"),
        (llava(vision_feature_layer=True), "somewhere: vision_feature_layer=True is not one of"),
        (llava(prompt_template=["hf"]), "somewhere: prompt_template=['hf'] is not supported (supported: ['hf'"),
        (NEXT | dict(image_grid_pinpoints=[[17, HUGE]]), f"image_grid_pinpoints=[[17, {HUGE}]] is not"),
        (NEXT | dict(image_grid_pinpoints=[17, 34]), "image_grid_pinpoints=[17, 34] is not a list of two"),
        (NEXT | dict(image_grid_pinpoints=[[[17, 34]]]), "image_grid_pinpoints=[[[17, 34]]] is not a list"),
        (NEXT | dict(image_grid_pinpoints=["ab"]), "image_grid_pinpoints=['ab'] is not a list of two"),
        (NEXT | dict(image_grid_pinpoints=3), "image_grid_pinpoints=3 is not a list of two"),
        (original(VICUNA, **ANYRES | dict(image_grid_pinpoints=[7])), "image_grid_pinpoints=[7] is not"),
        (original(VICUNA, architectures="LlavaQwenForCausalLM"), "architectures[0]='LlavaQwenForCausalLM' is"),
        (original(VICUNA, architectures={}), "architectures[0]={} is not supported"),
        (original(VICUNA, mm_vision_tower="/a/b/siglip"), "mm_vision_tower='/a/b/siglip' is no CLIP folder"),
    ],
)
def test_values_that_cannot_be(raw, reason):
    with pytest.raises(ValueError, match="somewhere: .*" + re.escape(reason.removeprefix("somewhere: "))):
        llava_config(raw, "somewhere")


def test_the_architecture_may_be_a_string():
    raw = original(VICUNA)
    assert llava_config({**raw, "architectures": raw["architectures"][0]}) == llava_config(raw)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(projection_dim="x"), "projection_dim='x' is not a whole number"),
        (dict(text_config={**small.CLIP_TEXT, "eos_token_id": [2]}), "text_config: eos_token_id=[2] is not"),
        (dict(text_config={**small.CLIP_TEXT, "num_attention_heads": 4}), "text_config: 18 is no multiple of 4"),
        (dict(text_config={**small.CLIP_TEXT, "hidden_act": "gelu"}), "text_config: hidden_act='gelu' is"),
        (dict(vision_config={**small.VISION, "patch_size": 0}), "vision_config: patch_size=0 is not between"),
        (dict(vision_config=None), "has no vision_config"),
        (dict(model_type="siglip"), "model_type='siglip' is not supported (supported: ['clip'])"),
        (dict(model_type="llava"), "model_type='llava' is not supported (supported: ['clip'])"),
    ],
)
def test_clip_values_that_cannot_be(change, reason):
    with pytest.raises(ValueError, match=re.escape(f"somewhere: {reason}")):
        clip_config({**small.CLIP_BOTH, **change}, "somewhere")


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_5_vl", "mllama", "llava_onevision", "paligemma", "blip-2", "llama", "clip", 3, []],
)
def test_another_family_is_named(tmp_path, family):
    """Whatever sections such a file has or lacks."""
    for raw in ({"model_type": family, "hidden_size": 8}, {**small.LLAVA, "model_type": family}):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        reason = f"config.json: model_type={family!r} is not supported (supported: llava, llava_next"
        with pytest.raises(ValueError, match=re.escape(reason)):
            family_of(tmp_path)


@pytest.mark.parametrize("name", [None, 3, [], "", "/", "..", ["openai/clip-vit-large-patch14-336"]])
def test_a_tower_without_a_name(tmp_path, name):
    raw = original(VICUNA, mm_vision_tower=name)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=re.escape(f"config.json: mm_vision_tower={name!r} names no vision tower")):
        read(tmp_path)


def test_a_tower_elsewhere(tmp_path):
    """A path of another machine: the folder of that name inside or beside the checkpoint, else OpenAI's."""
    raw = original(VICUNA, mm_vision_tower="/home/me/clip-vit-large-patch14-336/")
    assert tower_folder(tmp_path, {"mm_vision_tower": "x" * 5000}) is None
    assert llava_config(raw).vision.image_size == 336
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    tower = tmp_path / "clip-vit-large-patch14-336"
    tower.mkdir()
    for content, reason in (
        ({"model_type": "siglip_vision_model"}, "config.json: model_type='siglip_vision_model' is not"),
        ({"vision_config": None}, "config.json: has no vision_config"),
        ({"vision_config": {"hidden_size": "x"}}, "config.json: vision_config: hidden_size='x' is not a whole"),
    ):
        (tower / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=re.escape(f"{tower}/{reason}")):
            read(tmp_path / "model")
    (tower / "config.json").write_text(json.dumps({"vision_config": small.VISION}))
    assert read(tmp_path / "model").vision.image_size == small.SIDE


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\xff", "not UTF-8"), (b"[]", "a JSON object is wanted"), (b"null", "a JSON object is wanted"),
        (b'{"a": ' * 10**5, "nested too deeply"), (b'{"a": NaN}', "holds NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
    ],
    ids=range(6),
)
def test_files_that_are_no_json(tmp_path, content, reason):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: .*{reason}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "raw, reason",
    [
        ([], "a JSON object is wanted"),
        ({"model": None}, "it has no vocabulary"),
        ({"model": {"vocab": "abc"}}, "it has no vocabulary"),
        ({"model": {"vocab": {}}, "added_tokens": {"a": 1}}, "it has no vocabulary"),
        ({"model": {"vocab": {"a": "1"}}}, "token 'a' has the id '1'"),
        ({"model": {"vocab": {"a": -1}}}, "token 'a' has the id -1"),
        ({"model": {"vocab": {"a": None}}}, "token 'a' has the id None"),
        ({"model": {"vocab": {"a": 1}}, "added_tokens": [3]}, "token 3 has the id None"),
        ({"model": {"vocab": {"a": 1}}, "added_tokens": [{"content": []}]}, "token [] has the id None"),
    ],
)
def test_vocabularies_that_cannot_be(tmp_path, raw, reason):
    (tmp_path / "config.json").write_text(json.dumps(small.LLAVA))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="tokenizer.json: .*" + re.escape(reason)):
        read(tmp_path)


def test_a_vocabulary_of_pairs(tmp_path):
    """Unigram models list (token, score) in the order of the ids."""
    (tmp_path / "config.json").write_text(json.dumps(small.LLAVA))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0], ["b", 0], ["<pad>", 0]]}}))
    assert read(tmp_path).text.vocab_size == 2


def test_names_that_are_no_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: is a file; the folder that holds it is wanted"):
        resolve(tmp_path / "config.json")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(BadInput, match="is the folder of a run; its model is .*/model$"):
        resolve(tmp_path)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="no such folder, and not a hub id"):
            resolve(name)
