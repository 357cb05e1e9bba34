"""Checkpoints: what is refused and with which words, what may be surplus, round trips, atomic writes."""

from __future__ import annotations

import json
import re

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import model.checkpoint as checkpoint
from model.checkpoint import load_clip, load_llava, merged_state, save_json, save_llava, save_tensors
from model.lora import add_lora, lora_layers, merge_lora

LAYOUTS = {  # published name -> name in a later layout
    "as published": (),
    "language model first": (
        (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    "short tower names": ((r"^vision_tower\.vision_model\.", "vision_tower."),),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of its own for tests that damage it."""
    return small.write_llava(tmp_path / "llava")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors and write it back."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(torch.tensor(small.prompt(7, 8, 9)), small.pictures(1))


def assert_state(model, tensors) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name


# ------------------------------------------------------------------------------------------------- strictness


NAME, TOWER = "language_model.model.layers.1.mlp.up_proj.weight", "vision_tower.vision_model"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
        (lambda t: t.update({NAME: torch.zeros(30, 17)}), f"tensor {NAME} is (30, 17), expected (30, 18)"),
        (lambda t: t.update({NAME: torch.zeros(18, 30)}), f"tensor {NAME} is (18, 30), expected (30, 18)"),
        (lambda t: t.pop("language_model.lm_head.weight"), "missing tensor language_model.lm_head.weight"),
        (lambda t: t.update({NAME.replace("layers.1", "layers.3"): t[NAME].clone()}), "unexpected tensor"),
        (lambda t: t.pop(f"{TOWER}.encoder.layers.1.mlp.fc1.bias"), f"missing tensor {TOWER}.encoder"),
        (lambda t: t.update({f"{TOWER}.encoder.layers.3.mlp.fc1.bias": torch.zeros(40)}),
         f"unexpected tensor {TOWER}.encoder.layers.3"),
        (lambda t: t.update({NAME + "_scale": torch.zeros(1)}), f"unexpected tensor {NAME}_scale"),
    ],
)
def test_every_tensor_must_fit(folder, change, reason):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        load_llava(folder)
    assert str(folder) in str(error.value)


def test_all_problems_at_once_but_not_hundreds(folder):
    rewrite(folder, lambda t: (t.pop(NAME), t.update(extra=torch.zeros(2))))
    with pytest.raises(ValueError, match="missing tensor.*unexpected tensor extra"):
        load_llava(folder)
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if "layers" in n])
    with pytest.raises(ValueError, match="and [0-9]+ more") as error:
        load_llava(folder)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        load_llava(folder)


def test_missing_and_broken_config(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_llava(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: not found"):
        load_llava(folder)
    (tmp_path / "config.json").write_text(json.dumps(small.LLAVA))
    with pytest.raises(ValueError, match="no \\*.safetensors file"):
        load_llava(tmp_path)


def test_what_may_be_surplus(folder):
    """Vision layers behind the feature layer, the tower's last norm, and index buffers of old writers."""
    names = tensors_of(folder).keys()
    unused = {n for n in names if "post_layernorm" in n or "vision_model.encoder.layers.2." in n}
    assert len(unused) == 2 + 16  # two norms, four attention projections, two MLP layers, each with a bias
    expected = logits(load_llava(folder))
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5),
           "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 10)}
    rewrite(folder, lambda t: ([t.pop(n) for n in unused], t.update(old)))
    assert torch.equal(logits(load_llava(folder)), expected)


def test_used_vision_layers_follow_the_config(tmp_path):
    """With feature layer -1 the third layer is needed."""
    folder = small.write_llava(tmp_path, vision_feature_layer=-1)
    rewrite(folder, lambda t: t.pop(f"{TOWER}.encoder.layers.2.mlp.fc1.bias"))
    with pytest.raises(ValueError, match=f"missing tensor {TOWER}.encoder.layers.2.mlp.fc1.bias"):
        load_llava(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, layout):
    expected = tensors_of(folder)

    def rename(tensors):
        for name in list(tensors):
            new = name
            for pattern, replacement in LAYOUTS[layout]:
                new = re.sub(pattern, replacement, new)
            tensors[new] = tensors.pop(name)

    rewrite(folder, rename)
    assert_state(load_llava(folder), expected)


def test_shards(folder):
    """Tensors spread over files; the same tensor in two of them is an error."""
    expected = tensors_of(folder)
    names = sorted(expected)
    (folder / "model.safetensors").unlink()
    for i in range(3):
        save_file({n: expected[n] for n in names[i::3]}, folder / f"model-0000{i + 1}-of-00003.safetensors")
    assert_state(load_llava(folder), expected)
    save_file({names[0]: expected[names[0]]}, folder / "more.safetensors")
    with pytest.raises(ValueError, match=f"more.safetensors: tensor {names[0]} is also in model-00001"):
        load_llava(folder)


def test_tied_embeddings(tmp_path, pixels):
    """One tensor in the file, one parameter in the model, and again one in the file that is written."""
    folder = small.write_llava(tmp_path / "in", dict(tie_word_embeddings=True))
    model = load_llava(folder)
    lm = model.language_model
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    with torch.no_grad():
        lm.lm_head.weight[5] += 1
    save_llava(model, tmp_path / "out", folder)
    assert "language_model.lm_head.weight" not in tensors_of(tmp_path / "out")
    assert torch.equal(logits(load_llava(tmp_path / "out")), logits(model))
    rewrite(folder, lambda t: t.pop("language_model.model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="missing tensor language_model.model.embed_tokens.weight"):
        load_llava(folder)


def test_dtype_and_state(folder):
    model = load_llava(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert not any(p.is_meta for p in model.parameters())


def test_clip_is_frozen_and_strict(tmp_path):
    folder = small.write_clip(tmp_path)
    clip = load_clip(folder)
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    rewrite(folder, lambda t: t.pop("text_projection.weight"))
    with pytest.raises(ValueError, match="missing tensor text_projection.weight"):
        load_clip(folder)


# ---------------------------------------------------------------------------------------------------- writing


def test_round_trip(folder, tmp_path):
    """Every tensor comes back bit for bit, those that this code does not build included."""
    (folder / "tokenizer.json").write_text("{}")
    save_llava(load_llava(folder), tmp_path / "out", folder)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == small.LLAVA


def test_saving_over_the_source(folder):
    model = load_llava(folder)
    with torch.no_grad():
        model.multi_modal_projector.linear_1.bias += 1
    expected = logits(model)
    save_llava(model, folder, folder)
    assert torch.equal(logits(load_llava(folder)), expected)


def test_saving_merges_adapters_and_leaves_the_model(folder, tmp_path):
    model = load_llava(folder)
    base = logits(model)
    add_lora(model.language_model.model, rank=3, alpha=6.0)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    adapted = logits(model)
    save_llava(model, tmp_path / "out", folder)
    assert lora_layers(model) and torch.equal(logits(model), adapted)
    saved = logits(load_llava(tmp_path / "out"))
    torch.testing.assert_close(saved, adapted, rtol=0, atol=1e-4)
    assert not torch.allclose(saved, base, atol=0.1)
    state = merged_state(model)
    merge_lora(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())


def test_storage_dtype(folder, tmp_path):
    save_llava(load_llava(folder), tmp_path / "out", folder, dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert {p.dtype for p in load_llava(tmp_path / "out").parameters()} == {torch.float32}


def test_writes_are_atomic(tmp_path, monkeypatch):
    """Nothing temporary stays behind; a write that fails leaves the old file as it was."""
    path = tmp_path / "model.safetensors"
    save_tensors({"a": torch.zeros(2)}, path)
    save_json({"a": 1}, tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "model.safetensors"]

    def fail(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"a": torch.ones(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.zeros(2))
