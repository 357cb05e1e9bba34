"""LoRA adapters on disk: against PEFT in both directions, LLaVA's own files, and what is refused."""

import json
import math
import re

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from model.adapters import load_adapters, save_adapters
from model.checkpoint import load_llava, save_llava
from model.layouts import tokenizer_folder
from model.lora import TARGETS, add_lora, lora_layers, merge_lora

TIGHT = dict(rtol=1e-4, atol=1e-4)
LAYER = "language_model.model.layers.1.mlp.up_proj"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(torch.tensor(small.prompt(7, 8, 9)), small.pictures(1))


@pytest.fixture
def trained(model):
    """A model whose adapters (rank 3, alpha 5) and projector are no longer as they were."""
    add_lora(model.requires_grad_(False).language_model, rank=3, alpha=5.0)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    return model


@pytest.fixture
def plain(llava_folder):
    """The model without adapters."""
    return load_llava(llava_folder)


@pytest.fixture
def saved(trained, llava_folder, tmp_path):
    """Those adapters on disk."""
    save_adapters(trained, tmp_path / "adapters", llava_folder)
    return tmp_path / "adapters"


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reconfigure(folder, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("projector", [False, True])
def test_round_trip(trained, llava_folder, tmp_path, projector):
    """Adapters, and the projector where it trains, come back; the base weights are those of the base folder."""
    if projector:
        trained.multi_modal_projector.requires_grad_(True)
        with torch.no_grad():
            trained.multi_modal_projector.linear_1.weight += 0.1
    save_adapters(trained, tmp_path / "out", llava_folder)
    loaded = load_llava(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(trained))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if "lora_" in n}
    assert not torch.allclose(logits(loaded), logits(load_llava(llava_folder)), atol=0.1)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 7 + 4 * projector
    assert tensors[f"base_model.model.model.{LAYER.replace('model.layers', 'layers')}.lora_A.weight"].shape == (3, 18)


def test_an_adapter_folder_stands_for_a_model(saved, trained, tmp_path):
    """Written merged from an adapter folder, the result needs neither of the two it came from."""
    model = load_llava(saved)
    save_llava(model, tmp_path / "merged", saved)
    torch.testing.assert_close(logits(load_llava(tmp_path / "merged")), logits(trained), **TIGHT)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_base_in_bf16(saved):
    model = load_llava(saved, torch.bfloat16)
    layer = lora_layers(model)[LAYER]
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32


def test_scale(saved):
    """alpha / r = 5 / 3; with rank-stabilised LoRA alpha / sqrt(r)."""
    assert lora_layers(load_llava(saved))[LAYER].scale == pytest.approx(5 / 3)
    reconfigure(saved, use_rslora=True, lora_dropout=0.5)
    layer = lora_layers(load_llava(saved))[LAYER]
    assert layer.scale == pytest.approx(5 / math.sqrt(3)) and layer.dropout.p == 0


# ---------------------------------------------------------------------------------------------- LLaVA's own files


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.model.base_model.model."])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files_of_llava(trained, llava_folder, tmp_path, prefix, kind):
    """Original tensor names, an outer wrapper's doubled prefix, and the projector in non_lora_trainables.bin."""
    with torch.no_grad():
        trained.multi_modal_projector.linear_2.bias += 0.5
    folder, tensors = tmp_path / "llava-lora", {}
    folder.mkdir()
    for name, layer in lora_layers(trained).items():
        name = prefix + name.removeprefix("language_model.")
        tensors |= {f"{name}.lora_A.weight": layer.lora_A.detach(), f"{name}.lora_B.weight": layer.lora_B.detach()}
    if kind == "bin":
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    projector = trained.multi_modal_projector.state_dict()
    torch.save({f"{prefix}model.mm_projector.{0 if '1' in n else 2}.{n.split('.')[1]}": t for n, t in projector.items()},
               folder / "non_lora_trainables.bin")
    config = dict(peft_type="LORA", base_model_name_or_path=str(llava_folder), r=3, lora_alpha=5, bias="none",
                  target_modules=list(TARGETS), lora_dropout=0.05, task_type="CAUSAL_LM")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_llava(folder)), logits(trained))


@pytest.fixture
def on_a_decoder(trained, llava_folder, tmp_path):
    """Folder of LLaVA's adapters whose base is the bare decoder, with the tower in a CLIP folder of its own."""
    base, tower, folder = tmp_path / "vicuna", tmp_path / "tower", tmp_path / "llava-lora"
    tensors = load_file(llava_folder / "model.safetensors")
    part = lambda prefix: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    small.write(base, {**small.TEXT, "architectures": ["LlamaForCausalLM"]}, part("language_model."))
    small.write(tower, {"model_type": "clip", "vision_config": small.VISION}, part("vision_tower."))
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"w{i}": i for i in range(small.VOCAB)}}}))
    adapters, prefix = {}, "base_model.model."
    for name, layer in lora_layers(trained).items():
        name = prefix + name.removeprefix("language_model.")
        adapters |= {f"{name}.lora_A.weight": layer.lora_A.detach(), f"{name}.lora_B.weight": layer.lora_B.detach()}
    small.write(folder, {**small.TEXT, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava",
                         "mm_vision_tower": "owner/tower", "mm_projector_type": "mlp2x_gelu",
                         "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                         "image_aspect_ratio": "pad"}, {})
    (folder / "model.safetensors").unlink()
    torch.save(adapters, folder / "adapter_model.bin")
    torch.save({f"{prefix}model.mm_projector.{0 if '1' in n else 2}.{n.split('.')[1]}": t
                for n, t in trained.multi_modal_projector.state_dict().items()}, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps(
        dict(peft_type="LORA", base_model_name_or_path=str(base), r=3, lora_alpha=5, bias="none")))
    return folder


def test_llavas_adapters_on_a_bare_decoder(trained, on_a_decoder, tmp_path):
    """Decoder of the base, tower of config.json, projector of non_lora_trainables.bin: the model they came from,
    also when it is written merged."""
    ids = torch.tensor(small.prompt(7, 8, 9))
    ids = ids.masked_fill(ids == small.IMAGE_TOKEN, small.VOCAB)  # the original layout's <image>
    with torch.no_grad():
        model = load_llava(on_a_decoder)
        assert model.config.image_token_index == small.VOCAB and len(lora_layers(model)) == 21
        assert torch.equal(model.logits(ids, small.pictures(1)), logits(trained))
        save_llava(model, tmp_path / "merged", on_a_decoder)
        merged = load_llava(tmp_path / "merged")
        torch.testing.assert_close(merged.logits(ids, small.pictures(1)), logits(trained), **TIGHT)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert tokenizer_folder(on_a_decoder) == tmp_path / "vicuna"


@pytest.mark.parametrize("content", [None, {}, {"base_model.model.model.norm.weight": torch.ones(18)}])
def test_adapters_on_a_bare_decoder_bring_the_projector(on_a_decoder, content):
    (on_a_decoder / "non_lora_trainables.bin").unlink()
    if content is not None:
        torch.save(content, on_a_decoder / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=f"{on_a_decoder}: no projector: .*non_lora_trainables.bin"):
        load_llava(on_a_decoder)


# ---------------------------------------------------------------------------------------------------- refusals


A = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(A), f"missing tensor {LAYER}.lora_A"),
        (lambda t: t.update({A: torch.zeros(4, 18)}), f"tensor {A} is (4, 18), expected (3, 18)"),
        (lambda t: t.update({A.replace("up_", "fused_"): t[A].clone()}),
         f"unexpected tensor {LAYER.replace('up_', 'fused_')}.lora_A"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(3, 18)}),
         "unexpected tensor language_model.lm_head.lora_A"),
        (lambda t: t.update({"base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight":
                             torch.zeros(3, 24)}), "unexpected tensor vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A"),
        (lambda t: t.update({"base_model.model.model.norm.bias": torch.zeros(18)}),
         "unexpected tensor language_model.model.norm.bias"),
        (lambda t: t.update({"base_model.model.model.language_model.norm.weight": torch.zeros(17)}),
         "norm.weight is (17,), expected (18,)"),
        (lambda t: t.clear(), "the adapter files hold no tensors"),
    ],
)
def test_tensors_that_do_not_fit(saved, plain, change, reason):
    rewrite(saved, change)
    before = plain.state_dict().keys()
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_adapters(plain, saved)
    assert plain.state_dict().keys() == before  # nothing was put on


@pytest.mark.parametrize(
    "fields",
    [dict(use_dora=True), dict(bias="all"), dict(peft_type="IA3"), dict(rank_pattern={"q_proj": 4}),
     dict(alpha_pattern={"q_proj": 4}), dict(modules_to_save=["lm_head"]), dict(fan_in_fan_out=True)],
)
def test_other_kinds_of_adapters_are_refused(saved, plain, fields):
    reconfigure(saved, **fields)
    (name, value), = fields.items()
    with pytest.raises(ValueError, match=re.escape(f"adapter_config.json: {name}={value!r} is not supported")):
        load_adapters(plain, saved)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", [1]])
def test_initialisations_that_change_the_base_are_refused(saved, plain, value):
    reconfigure(saved, init_lora_weights=value)
    with pytest.raises(ValueError, match=re.escape(f"_config.json: init_lora_weights={value!r} is not supported")):
        load_adapters(plain, saved)
    assert not lora_layers(plain)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda t: t[A].__setitem__((1, 2), float("nan")), f"adapter_model.safetensors: tensor {A} holds NaN or inf"),
        (lambda t: t.update({A: t[A].to(torch.int8)}), f"tensor {A} is I8, not floating-point"),
        (lambda t: t.update({A: torch.zeros(0)}), f"tensor {A} is empty, as ZeRO-3 leaves it"),
        (lambda t: t.update({A.replace("lora_A", "lora_A.default"): t[A].clone()}), "is also in adapter_model.saf"),
    ],
)
def test_damaged_tensors(saved, plain, spoil, reason):
    rewrite(saved, spoil)
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_adapters(plain, saved)
    assert not lora_layers(plain)


def test_broken_folders(saved, plain):
    reconfigure(saved, r=0)
    with pytest.raises(ValueError, match="adapter_config.json: r=0 and lora_alpha"):
        load_adapters(plain, saved)
    (saved / "adapter_config.json").write_text("{")
    for load in (load_llava, lambda folder: load_adapters(plain, folder)):
        with pytest.raises(ValueError, match="adapter_config.json: not"):
            load(saved)
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "r": 3, "lora_alpha": 5}')
    with pytest.raises(ValueError, match="/nowhere: no such folder"):
        load_llava(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no adapter_model.safetensors and no adapter_model.bin"):
        load_adapters(plain, saved)


def test_adapters_are_not_stacked(saved, trained):
    with pytest.raises(ValueError, match="adapters already; merge them first"):
        load_adapters(trained, saved)


def test_what_cannot_be_saved(model, llava_folder, tmp_path):
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapters(model, tmp_path, llava_folder)
    add_lora(model.requires_grad_(False).language_model, rank=2, alpha=4.0)
    model.language_model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="language_model.lm_head.weight trains without an adapter"):
        save_adapters(model, tmp_path, llava_folder)
    model.language_model.lm_head.requires_grad_(False)
    lora_layers(model)["language_model.model.layers.0.mlp.up_proj"].scale = 1.0
    with pytest.raises(ValueError, match="differ in rank or scale"):
        save_adapters(model, tmp_path, llava_folder)


# -------------------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def theirs(peft, llava_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()


def their_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([small.prompt(7, 8, 9)]), pixel_values=small.pictures(1)).logits[0]


@pytest.mark.parametrize("projector", [False, True])
def test_peft_reads_ours(peft, theirs, trained, llava_folder, tmp_path, projector):
    trained.multi_modal_projector.requires_grad_(projector)
    with torch.no_grad():
        trained.multi_modal_projector.linear_1.weight += 0.1 * projector
    save_adapters(trained, tmp_path, llava_folder)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    expected = logits(trained)
    torch.testing.assert_close(their_logits(wrapped), expected, **TIGHT)
    merged = wrapped.merge_and_unload()
    merge_lora(trained)
    torch.testing.assert_close(their_logits(merged), logits(trained), **TIGHT)


@pytest.mark.parametrize(
    "options",
    [dict(r=2, lora_alpha=6), dict(r=4, lora_alpha=4, use_rslora=True, lora_dropout=0.1),
     dict(r=2, lora_alpha=2, modules_to_save=["multi_modal_projector"]),
     dict(r=2, lora_alpha=2, layers_to_transform=[1]),
     *(dict(r=2, lora_alpha=2, init_lora_weights=kind) for kind in (False, "gaussian", "orthogonal", "mica"))],
)
def test_peft_writes_ours(peft, theirs, model, tmp_path, options):
    targets = "q_proj v_proj down_proj".split() if "layers_to_transform" not in options else ["q_proj"]
    pattern = targets if "layers_to_transform" in options else rf".*language_model.*\.({'|'.join(targets)})"
    if "layers_to_transform" in options:
        options = options | {"layers_pattern": "language_model.layers"}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=pattern, **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path)
    plain = logits(model)
    load_adapters(model, tmp_path)
    expected = their_logits(wrapped)
    torch.testing.assert_close(logits(model), expected, **TIGHT)
    assert not torch.allclose(plain, expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_peft_converts_what_changed_the_base(peft, theirs, model, tmp_path, kind):
    """PEFT's own loading changes the base again, ours refuses; converted as the message says, both agree."""
    targets = r".*language_model.*\.(q_proj|down_proj)"
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=targets, r=2, lora_alpha=6,
                                                          init_lora_weights=kind)).eval()
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = kind
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match=f"init_lora_weights='{kind}' is not supported"):
        load_adapters(model, tmp_path / "raw")
    expected, before = their_logits(wrapped), logits(model)
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    load_adapters(model, tmp_path / "converted")
    torch.testing.assert_close(logits(model), expected, **TIGHT)
    assert not torch.allclose(before, expected, atol=1e-2)
