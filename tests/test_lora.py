"""LoRA: by hand, against peft, freezing, merging, switching off, dropout (`Reference`: test_logprobs.py)."""

import copy

import pytest
import small
import torch
from torch import nn

from model.attention import Causal
from model.config import llama_config
from model.llama import CausalLM
from model.lora import TARGETS, LoRALinear, adapters_off, add_lora, lora_layers, merge_lora


@pytest.fixture
def decoder() -> CausalLM:
    """The small decoder with its language-model head."""
    lm = CausalLM(llama_config(small.TEXT))
    lm.load_state_dict(small.fill(lm.state_dict()))
    return lm.eval()


def logits(lm: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 23)
    return lm.lm_head(lm.model(lm.model.embed_tokens(ids), torch.arange(20), Causal()))


def randomise(lm: nn.Module) -> None:
    torch.manual_seed(0)
    for layer in lora_layers(lm).values():
        nn.init.normal_(layer.lora_A, std=0.3)
        nn.init.normal_(layer.lora_B, std=0.3)


def test_by_hand():
    """W = [[1, 2], [3, 4]], b = (1, -1), A = (1, 1), B = (1, 0.5), alpha/r = 4, x = (1, 2):
    W x + b = (6, 10), A x = 3, B A x = (3, 1.5), y = (6 + 12, 10 + 6) = (18, 16), merged [[5, 6], [5, 6]]."""
    module = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    with torch.no_grad():
        module.q_proj.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        module.q_proj.bias.copy_(torch.tensor([1.0, -1.0]))
    add_lora(module, rank=1, alpha=4.0, targets=("q_proj",))
    x = torch.tensor([[1.0, 2.0]])
    assert module.q_proj(x).tolist() == [[6.0, 10.0]]  # B = 0 at the start
    with torch.no_grad():
        module.q_proj.lora_A.copy_(torch.tensor([[1.0, 1.0]]))
        module.q_proj.lora_B.copy_(torch.tensor([[1.0], [0.5]]))
    assert module.q_proj(x).tolist() == [[18.0, 16.0]]
    merge_lora(module)
    assert module.q_proj.weight.tolist() == [[5.0, 6.0], [5.0, 6.0]]
    assert module.q_proj(x).tolist() == [[18.0, 16.0]]


def test_add_lora_freezes_and_adapts(decoder):
    before = logits(decoder)
    names = add_lora(decoder.model, rank=2, alpha=4.0)
    assert len(names) == 7 * small.TEXT["num_hidden_layers"] and set(names) == set(lora_layers(decoder.model))
    trains = {n for n, p in decoder.model.named_parameters() if p.requires_grad}
    assert trains == {f"{n}.lora_{x}" for n in names for x in "AB"}
    assert torch.equal(logits(decoder), before)  # B = 0
    up = decoder.model.layers[0].mlp.up_proj
    assert up.lora_A.shape == (2, 18) and up.lora_B.shape == (30, 2)
    assert up.lora_A.std() > 0 and (up.lora_B == 0).all()


def test_targets_are_whole_names(decoder):
    assert all(n.endswith("mlp.up_proj") for n in add_lora(decoder.model, 2, 4.0, targets=("up_proj",)))
    assert len(lora_layers(decoder)) == small.TEXT["num_hidden_layers"]


@pytest.mark.parametrize(
    "targets, reason",
    [(("q_proj", "query", "kay"), r"\['kay', 'query'\]"), (("q_proj", "lm_head"), "lm_head cannot carry")],
)
def test_add_lora_refuses_targets(decoder, targets, reason):
    with pytest.raises(ValueError, match=reason):
        add_lora(decoder, 2, 4.0, targets=targets)
    assert not lora_layers(decoder) and all(p.requires_grad for p in decoder.parameters())


def test_add_lora_refuses_a_second_time(decoder):
    add_lora(decoder.model, 2, 4.0)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(decoder.model, 2, 4.0)


def test_merge_keeps_the_logits(decoder):
    base = logits(decoder)
    add_lora(decoder.model, rank=3, alpha=7.0)
    randomise(decoder)
    adapted = logits(decoder)
    names = {n for n, _ in decoder.named_parameters() if "lora" not in n}
    merge_lora(decoder)
    torch.testing.assert_close(logits(decoder), adapted, rtol=0, atol=1e-4)
    assert not torch.allclose(base, adapted, atol=0.1)
    assert not lora_layers(decoder) and {n for n, _ in decoder.named_parameters()} == names
    assert not decoder.model.layers[0].self_attn.q_proj.weight.requires_grad  # frozen stays frozen


def test_adapters_off_is_the_base(decoder):
    base = logits(decoder)
    add_lora(decoder.model, rank=3, alpha=7.0)
    randomise(decoder)
    adapted = logits(decoder)
    with adapters_off(decoder):
        assert torch.equal(logits(decoder), base)
    assert torch.equal(logits(decoder), adapted)
    with pytest.raises(RuntimeError), adapters_off(decoder):
        raise RuntimeError
    assert torch.equal(logits(decoder), adapted)


def test_dropout_only_while_training(decoder):
    add_lora(decoder.model, rank=3, alpha=7.0, dropout=0.5)
    randomise(decoder)
    decoder.eval()
    still = logits(decoder)
    assert torch.equal(logits(decoder), still)
    decoder.train()
    assert not torch.allclose(logits(decoder), logits(decoder), atol=1e-3)
    with adapters_off(decoder):
        assert torch.equal(logits(decoder), logits(decoder))
    assert torch.equal(logits(decoder.eval()), still)


def test_dropout_leaves_the_frozen_weight_its_input():
    """With B = 0 nothing but W x is left, while training too."""
    layer = LoRALinear(nn.Linear(50, 4), rank=2, alpha=1.0, dropout=0.5)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_dropout_acts_on_the_input_of_a():
    """x = 1 on 10000 inputs, A = 1, B = 1: the update is the sum of kept inputs / (1 - p), mean 10000,
    standard deviation 10000 sqrt(p / (1 - p) / 10000) = 50 at p = 0.2; the base path is not dropped."""
    layer = LoRALinear(nn.Linear(10_000, 1, bias=False), rank=1, alpha=1.0, dropout=0.2)
    for p, value in ((layer.weight, 0.0), (layer.lora_A, 1.0), (layer.lora_B, 1.0)):
        nn.init.constant_(p, value)
    torch.manual_seed(0)
    y = layer(torch.ones(200, 10_000))[:, 0]
    assert abs(y.mean() - 10_000) < 20 and 40 < y.std() < 60


def test_bf16_base_keeps_fp32_adapters(decoder):
    decoder = decoder.bfloat16()
    add_lora(decoder.model, rank=3, alpha=7.0)
    randomise(decoder)
    assert {p.dtype for n, p in decoder.named_parameters() if "lora" in n} == {torch.float32}
    adapted = logits(decoder)
    adapted.sum().backward()
    merge_lora(decoder)
    assert decoder.model.layers[0].mlp.up_proj.weight.dtype == adapted.dtype == torch.bfloat16
    assert (logits(decoder) - adapted).norm() < 0.05 * adapted.norm()


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)])
def test_live_equals_peft(decoder, targets):
    """The same A and B: equal outputs, equal gradients of A and B, equal merged weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(targets), lora_dropout=0.0)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(decoder)).eval()
    add_lora(decoder, rank=3, alpha=7.0, targets=targets)
    randomise(decoder)
    modules = dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(decoder).items():
            modules[name].lora_A["default"].weight.copy_(layer.lora_A)
            modules[name].lora_B["default"].weight.copy_(layer.lora_B)
    expected = logits(theirs)
    torch.testing.assert_close(logits(decoder), expected, rtol=0, atol=1e-4)
    for lm in (decoder, theirs):
        logits(lm).pow(2).mean().backward()
    for name, layer in lora_layers(decoder).items():
        for ours, part in ((layer.lora_A, "lora_A"), (layer.lora_B, "lora_B")):
            grad = getattr(modules[name], part)["default"].weight.grad
            torch.testing.assert_close(ours.grad, grad, rtol=1e-3, atol=1e-5)
    names = list(lora_layers(decoder))
    merge_lora(decoder)
    for name in names:
        modules[name].merge()
        merged = decoder.get_submodule(name).weight
        torch.testing.assert_close(merged, modules[name].get_base_layer().weight, rtol=1e-5, atol=1e-6)
