"""Losses: hand arithmetic, gradients, identities between the losses, and the skeleton all files share.

Unless a test says otherwise the log-ratios log pi - log pi_ref are (chosen, rejected, other image) =
(+20, -10, +10) for the first example and (-10, +10, +20) for the second, so that beta = 0.1 gives the
rewards (2, -1, 1) and (-1, 1, 2).
"""

import importlib
import inspect
import math
import typing
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import pytest
import torch

from data.batch import Scored
from losses.adavip import adavip_loss
from losses.bdhs import bdhs_loss
from losses.dpo import dpo_loss
from losses.lpoi import lpoi_loss
from losses.rdpo import rdpo_loss
from losses.sft import sft_loss
from losses.symmpo import symmpo_loss

ONLINE = {"fisao", "ppo", "rloo"}  # score what the model generates; they have tests of their own
LOSSES = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "losses").glob("*.py")
                if path.stem not in ONLINE | {"__init__"})
PUBLIC = {"slic": ["slic_hf_loss", "slic_loss"], "dpo_weighted": ["changed_tokens", "dpo_weighted_loss"]}
IMAGES = ("image", "rejected_image")
RESPONSES = ("chosen", "rejected", "generated", "rejected_image_response")
PREFERENCE = [(dpo_loss, 2, math.log(2)), (rdpo_loss, 3, 2 * math.log(2)), (adavip_loss, 3, math.log(3)),
              (lpoi_loss, 6, math.log(480)), (symmpo_loss, 5, 4 * math.log(2))]
EXACT = dict(rtol=0, atol=1e-12)

REFERENCE = torch.tensor([[-60.0, -45.0], [-52.0, -70.0], [-58.0, -64.0]], dtype=torch.float64)  # (3, B)
POLICY = REFERENCE + torch.tensor([[20.0, -10.0], [-10.0, 10.0], [10.0, 20.0]], dtype=torch.float64)


def softplus(value: float) -> float:
    """-log sigma(-value) = ln(1 + e^value)."""
    return math.log(1 + math.exp(value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logps(sequences: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """`sequences` log-probs (5,) of the policy, then as many of the reference."""
    generator = torch.Generator().manual_seed(seed)
    reference = -60 + 10 * torch.randn(sequences, 5, generator=generator, dtype=torch.float64)
    policy = reference + 10 * torch.randn(sequences, 5, generator=generator, dtype=torch.float64)
    return [*policy.to(dtype), *reference.to(dtype)]


def assert_metrics(metrics: dict[str, torch.Tensor], expected: dict[str, tuple[float, float]]) -> None:
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(metrics[name].double(), double(*values), **EXACT, msg=name)


# ---- hand arithmetic -------------------------------------------------------------------------------------


def test_sft_by_hand():
    """Means of -log p over the tokens of each response, whatever stands in the padding.

        example 1: p = 1/2, 1/4, 1/8   (1 + 2 + 3) ln 2 / 3 = 2 ln 2
        example 2: p = 1/32                            5 ln 2 / 1 = 5 ln 2

    The mean of the examples is 3.5 ln 2; the mean of the four tokens is (1 + 2 + 3 + 5) ln 2 / 4 = 2.75 ln 2.
    """
    ln2 = math.log(2)
    token_logps = torch.stack([double(-ln2, -2 * ln2, -3 * ln2), double(-5 * ln2, -math.inf, math.nan)])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, metrics = sft_loss(token_logps, mask)
    torch.testing.assert_close(loss, double(2 * ln2, 5 * ln2), **EXACT)
    assert_metrics(metrics, {"logps/chosen": (-6 * ln2, -5 * ln2), "tokens/chosen": (3, 1)})
    token_mean = -metrics["logps/chosen"].sum() / metrics["tokens/chosen"].sum()
    assert token_mean.item() == pytest.approx(2.75 * ln2, abs=1e-12)


def test_sft_gradient_by_hand():
    """d loss / d log p is -1 / (tokens of the response) on the response and exactly 0 on padding."""
    token_logps = torch.full((2, 3), -1.5, requires_grad=True)
    sft_loss(token_logps, torch.tensor([[False, True, True], [True, False, False]]))[0].sum().backward()
    assert token_logps.grad.tolist() == [[0.0, -0.5, -0.5], [-1.0, 0.0, 0.0]]


def test_dpo_by_hand():
    """Rewards (2, -1) and (-1, 1).

        example 1: margin 2 - (-1) = 3     loss ln(1 + e^-3) = 0.048587
        example 2: margin -1 - 1 = -2      loss ln(1 + e^2)  = 2.126928
    """
    loss, metrics = dpo_loss(*POLICY[:2], *REFERENCE[:2])
    torch.testing.assert_close(loss, double(softplus(-3), softplus(2)), **EXACT)
    torch.testing.assert_close(loss, double(0.048587, 2.126928), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "margin": (3, -2), "accuracy": (1, 0),
    })


def test_bdhs_by_hand():
    """Rewards (2, -1, 1) and (-1, 1, 2), gamma 0.25.

        example 1: margins 3 and 1         0.25 ln(1 + e^-3) + 0.75 ln(1 + e^-1) = 0.247093
        example 2: margins -2 and -3       0.25 ln(1 + e^2)  + 0.75 ln(1 + e^3)  = 2.818172
    """
    loss, metrics = bdhs_loss(*POLICY, *REFERENCE, gamma=0.25)
    torch.testing.assert_close(loss, double(0.247093, 2.818172), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "reward/generated": (1, 2), "margin": (3, -2),
        "margin/generated": (1, -3), "accuracy": (1, 0), "accuracy/generated": (1, 0),
    })
    torch.testing.assert_close(bdhs_loss(*POLICY, *REFERENCE, gamma=1.0)[0],
                               dpo_loss(*POLICY[:2], *REFERENCE[:2])[0], **EXACT)
    with pytest.raises(ValueError, match="gamma"):
        bdhs_loss(*POLICY, *REFERENCE, gamma=1.5)


def test_rdpo_by_hand():
    """Rewards (2, -1, 1) and (-1, 1, 2).

        example 1: margins 3 and 1         loss ln(1 + e^-3) + ln(1 + e^-1) = 0.048587 + 0.313262 = 0.361849
        example 2: margins -2 and -3       loss ln(1 + e^2)  + ln(1 + e^3)  = 2.126928 + 3.048587 = 5.175515
    """
    loss, metrics = rdpo_loss(*POLICY, *REFERENCE)
    torch.testing.assert_close(loss, double(softplus(-3) + softplus(-1), softplus(2) + softplus(3)), **EXACT)
    torch.testing.assert_close(loss, double(0.361849, 5.175515), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "reward/retrieved": (1, 2),
        "margin": (3, -2), "margin/retrieved": (1, -3), "accuracy": (1, 0), "accuracy/retrieved": (1, 0),
    })


def test_adavip_by_hand():
    """Rewards (2, -1, 1) and (-1, 1, 2).

        example 1: loss ln(1 + e^-3 + e^-1) = ln(1.417666) = 0.349012
        example 2: loss ln(1 + e^2  + e^3)  = ln(28.474593) = 3.349012

    The losses differ by exactly 3: 1 + e^2 + e^3 = e^3 (1 + e^-1 + e^-3).
    Weights sigma(-1 - 1) = 0.119203 and sigma(1 - 2) = 0.268941 of the rejected response.
    Scale 1 - softmax_++ = 1 - e^-loss = 1 - 1 / 1.417666 = 0.294615 and 1 - 1 / 28.474593 = 0.964881.
    """
    loss, metrics = adavip_loss(*POLICY, *REFERENCE)
    first, second = 1 + math.exp(-3) + math.exp(-1), 1 + math.exp(2) + math.exp(3)
    torch.testing.assert_close(loss, double(math.log(first), math.log(second)), **EXACT)
    torch.testing.assert_close(loss, double(0.349012, 3.349012), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics["scale"], double(0.294615, 0.964881), rtol=0, atol=1e-6)
    torch.testing.assert_close(metrics["weight/rejected"], double(0.119203, 0.268941), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "reward/removed": (1, 2),
        "margin": (3, -2), "margin/removed": (1, -3), "accuracy": (1, 0), "accuracy/removed": (1, 0),
        "scale": (1 - 1 / first, 1 - 1 / second),
        "weight/rejected": (sigmoid(-2), sigmoid(-1)), "weight/removed": (sigmoid(2), sigmoid(1)),
    })


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_start(loss_function, sequences, start):
    """Policy = reference: all rewards are 0, so a choice of two costs ln 2 and a choice of three ln 3."""
    logps = random_logps(sequences)[:sequences]
    loss, metrics = loss_function(*logps, *logps)
    torch.testing.assert_close(loss, torch.full_like(loss, start), **EXACT)
    zeros = [name for name in metrics if name.startswith(("reward", "margin", "accuracy"))]
    assert all(metrics[name].eq(0).all() for name in zeros)


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_beta_scales_the_log_ratios(loss_function, sequences, start):
    """beta = 0.3 on log-ratios d is beta = 0.1 on log-ratios 3 d."""
    logps = random_logps(sequences)
    policy, reference = logps[:sequences], logps[sequences:]
    tripled = [r + 3 * (p - r) for p, r in zip(policy, reference, strict=True)]
    torch.testing.assert_close(loss_function(*policy, *reference, beta=0.3)[0],
                               loss_function(*tripled, *reference, beta=0.1)[0])


# ---- identities ------------------------------------------------------------------------------------------


def test_rdpo_is_dpo_plus_dpo():
    """Once over the responses, once over the images, with the same chosen sequence."""
    chosen, rejected, retrieved, ref_chosen, ref_rejected, ref_retrieved = logps = random_logps(3)
    response_loss, response = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    image_loss, image = dpo_loss(chosen, retrieved, ref_chosen, ref_retrieved)
    loss, metrics = rdpo_loss(*logps)
    assert torch.equal(loss, response_loss + image_loss)
    assert torch.equal(metrics["margin"], response["margin"])
    assert torch.equal(metrics["margin/retrieved"], image["margin"])


def test_adavip_is_cross_entropy_over_three():
    """-log softmax(r_++, r_+-, r_-+)_++ and scale = 1 - softmax_++."""
    logps = random_logps(3)
    rewards = 0.1 * (torch.stack(logps[:3]) - torch.stack(logps[3:]))
    loss, metrics = adavip_loss(*logps)
    torch.testing.assert_close(loss, -rewards.log_softmax(dim=0)[0], **EXACT)
    torch.testing.assert_close(metrics["scale"], 1 - rewards.softmax(dim=0)[0], **EXACT)


def test_adavip_is_dpo_without_the_removed_image():
    """r_-+ -> -inf leaves -log sigma(r_++ - r_+-); its weight moves to the rejected response."""
    chosen, rejected, removed, ref_chosen, ref_rejected, ref_removed = random_logps(3)
    loss, metrics = adavip_loss(chosen, rejected, removed - 1e6, ref_chosen, ref_rejected, ref_removed)
    torch.testing.assert_close(loss, dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0], **EXACT)
    assert metrics["weight/rejected"].eq(1).all() and metrics["weight/removed"].eq(0).all()


def test_adavip_gradient_is_equation_12():
    """d loss / d log pi of (D_++, D_+-, D_-+) is -beta s (1, -w_+-, -w_-+), by autograd at float64."""
    beta = 0.3
    logps = random_logps(3)
    policy = [value.clone().requires_grad_() for value in logps[:3]]
    loss, metrics = adavip_loss(*policy, *logps[3:], beta=beta)
    gradients = torch.autograd.grad(loss.sum(), policy)
    scale, rejected, removed = (metrics[name] for name in ("scale", "weight/rejected", "weight/removed"))
    torch.testing.assert_close(rejected + removed, torch.ones_like(removed), **EXACT)
    for gradient, direction in zip(gradients, (torch.ones_like(scale), -rejected, -removed), strict=True):
        torch.testing.assert_close(gradient, -beta * scale * direction, **EXACT)


# ---- gradients and numerics ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_gradient_against_finite_differences(loss_function, sequences, start):
    logps = random_logps(sequences, seed=1)
    policy, reference = [value.clone().requires_grad_() for value in logps[:sequences]], logps[sequences:]
    assert torch.autograd.gradcheck(lambda *values: loss_function(*values, *reference)[0], policy)


def test_sft_gradient_against_finite_differences():
    token_logps = -torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda values: sft_loss(values, mask)[0], token_logps.requires_grad_())


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_bf16_inputs_are_computed_in_fp32(loss_function, sequences, start):
    """bf16 log-probs give, bit for bit, the loss of the same numbers in fp32; gradients come back bf16."""
    halves = random_logps(sequences, dtype=torch.bfloat16)
    halves[0].requires_grad_()
    loss, metrics = loss_function(*halves)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert torch.equal(loss, loss_function(*(value.float() for value in halves))[0])
    loss.sum().backward()
    assert halves[0].grad.dtype == torch.bfloat16 and halves[0].grad.isfinite().all()


def test_sft_bf16_inputs_are_summed_in_fp32():
    """4096 tokens of -1/128: a running bf16 sum would stop growing at -2 or so, the mean is exactly 1/128."""
    token_logps = torch.full((1, 4096), -1 / 128, dtype=torch.bfloat16)
    loss, _ = sft_loss(token_logps, torch.ones(1, 4096, dtype=torch.bool))
    assert loss.dtype == torch.float32 and loss.item() == 1 / 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_extreme_values_are_finite(loss_function, sequences, start, dtype):
    """Every sign pattern of log-ratios +-1e6: loss, metrics and gradients are finite, the loss is >= 0."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * sequences).T  # (sequences, 2 ** sequences)
    policy = [(1e6 * sign).to(dtype).requires_grad_() for sign in signs]
    loss, metrics = loss_function(*policy, *torch.zeros_like(signs, dtype=dtype))
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= 0).all()
    assert all(value.isfinite().all() for value in metrics.values())
    assert all(value.grad.isfinite().all() for value in policy)


def test_adavip_keeps_a_tiny_loss():
    """Rewards (30, 0, 0): ln(1 + 2 e^-30) = 2 e^-30 - ...; logsumexp(r) - r_++ would round to 0 in fp32."""
    zero = torch.zeros(1)
    loss, _ = adavip_loss(zero + 300, zero, zero, zero, zero, zero)
    assert loss.item() == pytest.approx(2 * math.exp(-30), rel=1e-5, abs=0)


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_pure(loss_function, sequences, start):
    """Inputs are untouched, equal calls agree, metrics carry no graph, examples do not see each other."""
    logps = random_logps(sequences)
    logps[0].requires_grad_()
    before = [value.detach().clone() for value in logps]
    loss, metrics = loss_function(*logps)
    again, _ = loss_function(*logps)
    assert torch.equal(loss, again) and loss.requires_grad
    assert all(torch.equal(value, copy) for value, copy in zip(logps, before, strict=True))
    assert not any(value.requires_grad for value in metrics.values())
    assert {tuple(value.shape) for value in (loss, *metrics.values())} == {(5,)}
    alone, _ = loss_function(*(value[2:3] for value in logps))
    assert torch.equal(alone, loss[2:3])


def test_sft_pure():
    token_logps, mask = torch.full((2, 3), -1.5, requires_grad=True), torch.tensor([[True, True, False]] * 2)
    before = token_logps.detach().clone(), mask.clone()
    loss, metrics = sft_loss(token_logps, mask)
    assert torch.equal(token_logps, before[0]) and torch.equal(mask, before[1])
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert {tuple(value.shape) for value in (loss, *metrics.values())} == {(2,)}


# ---- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_function, sequences, start", PREFERENCE)
def test_shape_errors(loss_function, sequences, start):
    """Each of these would otherwise broadcast to a plausible number."""
    good, one, tokens = torch.zeros(3), torch.zeros(1), torch.zeros(3, 7)
    with pytest.raises(ValueError, match=r"must all be \(B,\), not \[3\] of the policy and \[1\]"):
        loss_function(*[good] * sequences, *[one] * sequences)
    with pytest.raises(ValueError, match=r"must all be \(B,\), not \[3, 7\]"):
        loss_function(*[tokens] * sequences, *[tokens] * sequences)
    with pytest.raises(RuntimeError, match="equal size"):
        loss_function(good, one, *[good] * (2 * sequences - 2))


def test_sft_errors():
    token_logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\[2, 3\] and mask \[1, 3\] must both be \(B, T\)"):
        sft_loss(token_logps, mask[:1])
    with pytest.raises(ValueError, match="must be bool, not torch.int64"):
        sft_loss(token_logps, mask.long())
    with pytest.raises(ValueError, match="without a single response token"):
        sft_loss(token_logps, torch.tensor([[True, True, True], [False, False, False]]))


# ---- agreement with another library ----------------------------------------------------------------------


def test_dpo_equals_trl():
    """TRL has no loss function to call; its sigmoid loss sits in `DPOTrainer._compute_loss`. That is called
    with a stand-in for the trainer and a stand-in for the model that returns given token log-probs. All from
    the token log-probs to the loss, its gradient and the logged rewards is then TRL's own code.
    """
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the stand-in trainer is written for TRL 1.16, found {trl.__version__}")
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    token_logps = (-torch.rand(6, 4, generator=generator)).requires_grad_()  # chosen then rejected, 3 pairs
    reference = -2 * torch.rand(6, generator=generator)
    zeros = torch.zeros(6, 4)
    outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        beta=0.25, loss_types=["sigmoid"], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True,
        model=SimpleNamespace(training=True), _tp_size=1, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
    )
    inputs = {
        "input_ids": torch.zeros(6, 5, dtype=torch.long), "attention_mask": torch.ones(6, 5),
        "completion_mask": torch.ones(6, 5, dtype=torch.long),
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    their_gradient, = torch.autograd.grad(theirs, token_logps)

    logps = token_logps.sum(dim=1)
    ours, metrics = dpo_loss(logps[:3], logps[3:], reference[:3], reference[3:], beta=0.25)
    our_gradient, = torch.autograd.grad(ours.mean(), token_logps)
    torch.testing.assert_close(ours.mean(), theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    for our_name, their_name in [("reward/chosen", "rewards/chosen"), ("reward/rejected", "rewards/rejected"),
                                 ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")]:
        their_value, = trainer._metrics["train"][their_name]
        assert metrics[our_name].mean().item() == pytest.approx(their_value, rel=1e-5)


# ---- the skeleton ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_skeleton(name):
    """Public functions NAME_loss; tensors follow from SEQUENCES and hyper-parameters can become flags."""
    module = importlib.import_module(f"losses.{name}")
    public = [key for key, value in inspect.getmembers(module, inspect.isfunction)
              if value.__module__ == module.__name__ and not key.startswith("_")]
    assert public == PUBLIC.get(name, [f"{name}_loss"])

    kinds = ("mask", "changed", "rewards")
    inputs = {f"{model}_{sequence}_{kind}" for sequence in module.SEQUENCES
              for model in ("policy", "reference") for kind in ("logps", "token_logps")}
    inputs |= {f"{sequence}_{kind}" for sequence in module.SEQUENCES for kind in kinds} | {"margin"}
    for function in (getattr(module, key) for key in public if key.endswith("_loss")):
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        tensors = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert len(tensors) + len(options) == len(parameters)
        assert set(tensors) <= inputs
        assert all(hints[tensor] in (torch.Tensor, torch.Tensor | None) for tensor in tensors)
        for sequence in module.SEQUENCES:
            assert any(f"_{sequence}_" in f"_{tensor}" for tensor in tensors), f"{sequence} is not used"
        for option in options:
            kind = hints[option.name]
            assert option.default in get_args(kind) if get_origin(kind) is Literal else type(option.default) is kind
            assert kind in (float, int) or get_origin(kind) is Literal, option
        for argument in (*tensors, *(option.name for option in options)):
            assert argument in module.__doc__, f"the header's table has no {argument}"

    for needle in ("arXiv", "Departures", "symbol", "argument", "shape"):
        assert needle in module.__doc__, f"the header of losses/{name}.py has no {needle!r}"


@pytest.mark.parametrize("name", ["dpo", "rdpo", "adavip", "bdhs", "lpoi", "mdpo", "povid", "slic", "symmpo"])
def test_preference_signature(name):
    """Policy then reference log-probs in the order of SEQUENCES, then beta = 0.1."""
    module = importlib.import_module(f"losses.{name}")
    parameters = inspect.signature(getattr(module, f"{name}_loss")).parameters
    expected = [f"{model}_{sequence}_logps"
                for model in ("policy", "reference") for sequence in module.SEQUENCES]
    assert list(parameters)[: len(expected) + 1] == [*expected, "beta"] and parameters["beta"].default == 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_sequences_name_fields_of_a_pair(name):
    sequences = importlib.import_module(f"losses.{name}").SEQUENCES
    assert sequences["chosen"] == dict(image="image", response="chosen")
    asked = [Scored(**kwargs) for kwargs in sequences.values()]
    assert all(how.image in IMAGES and how.response in RESPONSES for how in asked)
    assert len(set(asked)) == len(asked)


def test_rdpo_released_sequences():
    """The same three sequences; only how the two negatives are scored differs."""
    from losses import rdpo

    best = dict(tokens="best_other")
    assert rdpo.SEQUENCES_RELEASED == {name: kwargs | ({} if name == "chosen" else best)
                                       for name, kwargs in rdpo.SEQUENCES.items()}
