"""The offline losses beyond sft, dpo, rdpo and adavip, and dpo's label smoothing: hand arithmetic,
identities, gradients, errors, agreement with TRL. The skeleton all files share is tested in test_losses.py.

Unless a test says otherwise the log-ratios log pi - log pi_ref are those of test_losses.py, (chosen,
rejected, third) = (+20, -10, +10) and (-10, +10, +20): rewards (2, -1, 1) and (-1, 1, 2) at beta = 0.1.
"""

import inspect
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from losses import povid
from losses.dpo import dpo_loss
from losses.dpo_weighted import changed_tokens, dpo_weighted_loss
from losses.ipo import ipo_loss
from losses.mdpo import mdpo_loss
from losses.povid import povid_loss
from losses.rdpo import rdpo_loss
from losses.reward_model import reward_model_loss
from losses.slic import slic_hf_loss, slic_loss

EXACT = dict(rtol=0, atol=1e-12)
LN2 = math.log(2)
# (loss, options, its value where policy = reference; None: it has no reference)
CASES = [
    (dpo_loss, {"label_smoothing": 0.2}, LN2),
    (dpo_loss, {"label_smoothing": 0.2, "smoothing": "robust"}, LN2),
    (ipo_loss, {}, 25.0),
    (ipo_loss, {"reduction": "mean", "beta": 0.5}, 1.0),
    (slic_loss, {}, 1.0),
    (slic_hf_loss, {}, None),
    (mdpo_loss, {}, 3 * LN2),
    (povid_loss, {"gamma": 0.3}, LN2),
    (dpo_weighted_loss, {}, LN2),
    (dpo_weighted_loss, {"reduction": "sum"}, LN2),
    (reward_model_loss, {}, None),
    (reward_model_loss, {"centring_weight": 0.3}, None),
]
BATCH_CENTRED = (reward_model_loss, {"centring_weight": 0.3, "centring": "batch"}, None)
LENGTHS = torch.tensor([4, 1, 3, 2, 4])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(value: float) -> float:
    """-log sigma(-value) = ln(1 + e^value)."""
    return math.log(1 + math.exp(value))


def log_ratios(*names: str) -> dict[str, torch.Tensor]:
    """The log-ratios of the module's docstring as arguments, on top of arbitrary reference log-probs."""
    ratios = dict(zip(names, (double(20, -10), double(-10, 10), double(10, 20))))
    references = dict(zip(names, (double(-60, -45), double(-52, -70), double(-58, -64))))
    return ({f"policy_{name}_logps": references[name] + ratios[name] for name in names}
            | {f"reference_{name}_logps": references[name] for name in names})


def random_inputs(function, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Arguments of any of the losses by name, five examples of up to four tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        shape = (5, 4) if name.endswith(("_token_logps", "_mask", "_changed")) else (5,)
        value = -60 + 10 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        if name.endswith("_mask"):
            inputs[name] = torch.arange(4) < LENGTHS[:, None]
        elif name.endswith("_changed"):
            inputs[name] = value > -60
        else:
            inputs[name] = ((value + 60) / 10 if name.endswith("rewards") else value).to(dtype)
    if "margin" in inputs:
        inputs["margin"] = inputs["margin"].abs() / 60
    return inputs


def trained(inputs: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in inputs if name.startswith("policy_") or name.endswith("_rewards")]


def assert_metrics(metrics: dict[str, torch.Tensor], expected: dict[str, tuple[float, float]]) -> None:
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(metrics[name].double(), double(*values), **EXACT, msg=name)


def both(h: float) -> tuple[torch.Tensor, ...]:
    """Log-probs whose log-ratios are 2 h / 3 (chosen) and -h / 3 (rejected): their difference is h."""
    return double(2 * h / 3), double(-h / 3), double(0), double(0)


# ---- label smoothing -------------------------------------------------------------------------------------


def test_dpo_without_smoothing_is_plain_dpo():
    """Bit for bit, whichever smoothing is named."""
    inputs = random_inputs(dpo_loss, dtype=torch.float32)
    expected = -F.logsigmoid(0.1 * (inputs["policy_chosen_logps"] - inputs["reference_chosen_logps"])
                             - 0.1 * (inputs["policy_rejected_logps"] - inputs["reference_rejected_logps"]))
    assert torch.equal(dpo_loss(**inputs)[0], expected)
    assert torch.equal(dpo_loss(**inputs, smoothing="robust")[0], expected)


def test_smoothing_by_hand():
    """Margins 3 and -2, eps = 0.2. -log sigma of 3, -3, 2, -2: 0.048587, 3.048587, 0.126928, 2.126928.

        conservative  0.8 * 0.048587 + 0.2 * 3.048587 = 0.648587
                      0.8 * 2.126928 + 0.2 * 0.126928 = 1.726928
        robust       (0.8 * 0.048587 - 0.2 * 3.048587) / 0.6 = -0.951413
                     (0.8 * 2.126928 - 0.2 * 0.126928) / 0.6 =  2.793595
    """
    inputs = log_ratios("chosen", "rejected")
    conservative, metrics = dpo_loss(**inputs, label_smoothing=0.2)
    robust, _ = dpo_loss(**inputs, label_smoothing=0.2, smoothing="robust")
    torch.testing.assert_close(conservative, double(0.648587, 1.726928), rtol=0, atol=1e-6)
    torch.testing.assert_close(robust, double(-0.951413, 2.793595), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "margin": (3, -2), "accuracy": (1, 0),
    })


def test_robust_is_unbiased_and_conservative_stops():
    """Labels swapped with probability eps: the mean robust loss is the plain loss on the clean labels. The
    conservative loss is flat where the margin d has sigma(d) = 1 - eps."""
    chosen, rejected, ref_chosen, ref_rejected = random_inputs(dpo_loss).values()
    options = {"label_smoothing": 0.3, "smoothing": "robust"}
    right, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    swapped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    clean, _ = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    torch.testing.assert_close(0.7 * right + 0.3 * swapped, clean, **EXACT)

    chosen = double(math.log(0.7 / 0.3) / 0.1).requires_grad_()
    zero = torch.zeros_like(chosen)
    dpo_loss(chosen, zero, zero, zero, label_smoothing=0.3)[0].backward()
    torch.testing.assert_close(chosen.grad, double(0), **EXACT)


# ---- hand arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function, h, loss, gradient", [
    (dpo_loss, 6, 0.437488, -0.035434), (dpo_loss, 0, LN2, -0.05),
    (slic_loss, 6, 0.4, -0.1), (slic_loss, 0, 1, -0.1), (slic_loss, 12, 0, 0),
    (ipo_loss, 6, 1, 2), (ipo_loss, 0, 25, -10), (ipo_loss, 5, 0, 0),
])
def test_values_at_a_gap(function, h, loss, gradient):
    """beta = 0.1 and log-ratios h apart.

        dpo    ln(1 + e^-0.6) = 0.437488, slope -0.1 / (1 + e^0.6) = -0.035434
        slic   1 - 0.1 h until h = 10
        ipo    target 1 / 0.2 = 5: (h - 5)^2, slope 2 (h - 5)
    """
    chosen, *others = both(h)
    masks = [torch.ones(1, 2, dtype=torch.bool)] * 2 if function is ipo_loss else []
    value, _ = function(chosen.requires_grad_(), *others, *masks)
    value.backward()
    torch.testing.assert_close(value.detach(), double(loss), rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen.grad, double(gradient), rtol=0, atol=1e-6)


def test_ipo_by_token():
    """Sums of log-ratios (6, -4) and (-3, 6) over (3, 2) and (1, 3) tokens, beta = 0.25: target 2.

        sum    h = 10, -9       (10 - 2)^2 = 64     (-9 - 2)^2 = 121
        mean   h = 2 + 2 = 4, -3 - 2 = -5           (4 - 2)^2 = 4      (-5 - 2)^2 = 49
    """
    zero = double(0, 0)
    masks = (torch.arange(3) < torch.tensor([[3], [1]]), torch.arange(3) < torch.tensor([[2], [3]]))
    inputs = (double(6, -3), double(-4, 6), zero, zero, *masks)
    loss, metrics = ipo_loss(*inputs, beta=0.25)
    torch.testing.assert_close(loss, double(64, 121), **EXACT)
    assert_metrics(metrics, {
        "reward/chosen": (1.5, -0.75), "reward/rejected": (-1, 1.5), "margin": (2.5, -2.25),
        "accuracy": (1, 0),
    })
    loss, metrics = ipo_loss(*inputs, beta=0.25, reduction="mean")
    torch.testing.assert_close(loss, double(4, 49), **EXACT)
    assert_metrics(metrics, {
        "reward/chosen": (0.5, -0.75), "reward/rejected": (-0.5, 0.5), "margin": (1, -1.25),
        "accuracy": (1, 0),
    })


def test_ipo_is_the_squared_loss_of_gpo():
    """tau = 0.3, h = 6: (0.6 * 6 - 1)^2 = 6.76 = 0.36 (6 - 1 / 0.6)^2."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = ipo_loss(*both(6), mask, mask, beta=0.3)
    torch.testing.assert_close(0.36 * loss, double(6.76), **EXACT)


def test_slic_hf_by_hand():
    """delta = 2, lambda = 0.5.

        example 1: log-probs -8 and -9    max(0, 2 + 8 - 9) + 0.5 * 8 = 1 + 4 = 5
        example 2: log-probs -6 and -9    max(0, 2 + 6 - 9) + 0.5 * 6 = 0 + 3 = 3
    """
    chosen, rejected = double(-8, -6).requires_grad_(), double(-9, -9).requires_grad_()
    loss, metrics = slic_hf_loss(chosen, rejected, delta=2.0, sft_weight=0.5)
    torch.testing.assert_close(loss.detach(), double(5, 3), **EXACT)
    assert_metrics(metrics, {
        "logps/chosen": (-8, -6), "logps/rejected": (-9, -9), "margin": (1, 3), "accuracy": (1, 1),
    })
    loss.sum().backward()
    assert chosen.grad.tolist() == [-1.5, -0.5] and rejected.grad.tolist() == [1, 0]


def test_mdpo_by_hand():
    """Rewards (2, -1, 1) and (-1, 1, 2), anchor 0.

        example 1: margins 3, 1, anchor 2       ln(1 + e^-3) + ln(1 + e^-1) + ln(1 + e^-2) = 0.488777
        example 2: margins -2, -3, anchor -1    ln(1 + e^2) + ln(1 + e^3) + ln(1 + e^1)    = 6.488777
    """
    inputs = log_ratios("chosen", "rejected", "cropped")
    loss, metrics = mdpo_loss(**inputs)
    torch.testing.assert_close(loss, double(0.488777, 6.488777), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "reward/cropped": (1, 2),
        "margin": (3, -2), "margin/cropped": (1, -3), "accuracy": (1, 0), "accuracy/cropped": (1, 0),
        "accuracy/anchor": (1, 0),
    })
    anchored, metrics = mdpo_loss(**inputs, delta=3.0)  # anchor 2 - 3 = -1 and -1 - 3 = -4
    torch.testing.assert_close(anchored - loss, double(softplus(1) - softplus(-2), softplus(4) - softplus(1)),
                               **EXACT)
    assert metrics["accuracy/anchor"].tolist() == [0, 0]


def test_mdpo_is_rdpo_and_an_anchor():
    logps = list(random_inputs(mdpo_loss).values())
    anchor = -F.logsigmoid(0.1 * (logps[0] - logps[3]))
    torch.testing.assert_close(mdpo_loss(*logps)[0], rdpo_loss(*logps)[0] + anchor, **EXACT)


def test_povid_by_hand():
    """Rewards (2, -1, 1) and (-1, 1, 2), gamma = 0.25.

        example 1: margins 3 and 1      0.25 * 0.048587 + 0.75 * 0.313262 = 0.247093
        example 2: margins -2 and -3    0.25 * 2.126928 + 0.75 * 3.048587 = 2.818173
    """
    loss, metrics = povid_loss(**log_ratios("chosen", "rejected", "noisy"), gamma=0.25)
    torch.testing.assert_close(loss, double(0.247093, 2.818173), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, -1), "reward/rejected": (-1, 1), "reward/noisy": (1, 2),
        "margin": (3, -2), "margin/noisy": (1, -3), "accuracy": (1, 0), "accuracy/noisy": (1, 0),
    })


def test_povid_is_one_of_two_dpo_losses_at_the_ends():
    logps = list(random_inputs(povid_loss).values())
    chosen, rejected, noisy, ref_chosen, ref_rejected, ref_noisy = logps
    torch.testing.assert_close(povid_loss(*logps, gamma=1.0)[0],
                               dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0], **EXACT)
    torch.testing.assert_close(povid_loss(*logps, gamma=0.0)[0],
                               dpo_loss(chosen, noisy, ref_chosen, ref_noisy)[0], **EXACT)


def test_povid_released_sequences():
    """They differ in who picks the tokens, nothing else."""
    own = povid.SEQUENCES["noisy"] | {"tokens": "own_picked_in_noise"}
    assert povid.SEQUENCES_RELEASED == povid.SEQUENCES | {"noisy": own} and own != povid.SEQUENCES["noisy"]


def weighted_example() -> tuple[torch.Tensor, ...]:
    """One pair of 3 and 2 tokens whose log-ratios are (1, 4, -2) and (3, -1); nonsense behind the second."""
    reference = double(-7, -5, -9)[None], double(-4, -6, math.nan)[None]
    policy = reference[0] + double(1, 4, -2)[None], reference[1] + double(3, -1, math.inf)[None]
    masks = torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])
    changed = torch.tensor([[False, True, False]]), torch.tensor([[True, False, True]])
    return *policy, *reference, *masks, *changed


def test_dpo_weighted_by_hand():
    """gamma = 3, beta = 0.5.

        mean   chosen (1 + 3 * 4 - 2) / (2 + 3) = 2.2, rejected (3 * 3 - 1) / (1 + 3) = 2     margin 0.1
        sum    chosen 11, rejected 8                                                          margin 1.5
    """
    inputs = weighted_example()
    loss, metrics = dpo_weighted_loss(*inputs, beta=0.5, gamma=3.0)
    torch.testing.assert_close(loss, double(softplus(-0.1)), **EXACT)
    torch.testing.assert_close(metrics["reward/chosen"], double(1.1), **EXACT)
    torch.testing.assert_close(metrics["reward/rejected"], double(1.0), **EXACT)
    assert metrics["changed/chosen"].item() == pytest.approx(1 / 3)
    assert metrics["changed/rejected"].item() == 0.5
    loss, _ = dpo_weighted_loss(*inputs, beta=0.5, gamma=3.0, reduction="sum")
    torch.testing.assert_close(loss, double(softplus(-1.5)), **EXACT)


def test_dpo_weighted_gradient_skips_padding():
    """-beta sigma(-d) w_t / N on the chosen tokens, + on the rejected ones, exactly 0 on padding."""
    chosen, rejected, *others = weighted_example()
    chosen.requires_grad_(), rejected.requires_grad_()
    dpo_weighted_loss(chosen, rejected, *others, beta=0.5, gamma=3.0)[0].backward()
    slope = 0.5 / (1 + math.exp(0.1))
    torch.testing.assert_close(chosen.grad, -slope * double(0.2, 0.6, 0.2)[None], **EXACT)
    torch.testing.assert_close(rejected.grad, slope * double(0.75, 0.25, 0)[None], **EXACT)


def test_dpo_weighted_with_equal_weights_is_dpo():
    """gamma = 1 without the division: plain sums. With no token marked, gamma does not matter."""
    inputs = random_inputs(dpo_weighted_loss)
    sums = [inputs[f"{model}_{name}_token_logps"].masked_fill(~inputs[f"{name}_mask"], 0).sum(-1)
            for model in ("policy", "reference") for name in ("chosen", "rejected")]
    expected, _ = dpo_loss(*sums, beta=0.1)
    loss, _ = dpo_weighted_loss(**inputs, beta=0.1, gamma=1.0, reduction="sum")
    torch.testing.assert_close(loss, expected, **EXACT)
    none = {name: torch.zeros(5, 4, dtype=torch.bool) for name in ("chosen_changed", "rejected_changed")}
    loss, _ = dpo_weighted_loss(**inputs | none, beta=0.1, gamma=7.0, reduction="sum")
    torch.testing.assert_close(loss, expected, **EXACT)


@pytest.mark.parametrize("chosen, rejected, chosen_marks, rejected_marks", [
    ("abcdef", "abcdef", "......", "......"),
    ("abcXdef", "abcYdef", "...X...", "...X..."),
    ("abcdef", "abcYYdef", "......", "...XX..."),  # only the rejected response has more
    ("XabcdeX", "YYabcdeY", "X.....X", "XX.....X"),
    ("aXdeYz", "aVdeWz", ".XXXX.", ".XXXX."),  # "de" is shorter than three; "a" and "z" are at the ends
    ("aXdefYz", "aVdefWz", ".X...X.", ".X...X."),
    ("aXz", "z", "XX.", "."),
    ("abc", "xyz", "XXX", "XXX"),
])
def test_changed_tokens(chosen, rejected, chosen_marks, rejected_marks):
    """Letters as tokens, X where a token counts as changed."""
    marks = changed_tokens([ord(c) for c in chosen], [ord(c) for c in rejected])
    assert ["".join(".X"[flag] for flag in flags) for flags in marks] == [chosen_marks, rejected_marks]


def test_changed_tokens_in_long_responses():
    """One frequent token between ends that differ: no shortcut for frequent tokens is taken."""
    chosen, rejected = [9] + [0] * 200 + [8], [7] + [0] * 200 + [6]
    assert changed_tokens(chosen, rejected) == ([True] + [False] * 200 + [True],) * 2


def test_reward_model_by_hand():
    """Rewards (2, -1) and (0.5, 1.5), margins 1 and 0, c = 0.1.

        plain    ln(1 + e^-3) = 0.048587            ln(1 + e^1)  = 1.313262
        margin   ln(1 + e^-2) = 0.126928            ln(1 + e^1)
        pair     + 0.1 * (2 - 1)^2 = 0.1            + 0.1 * (0.5 + 1.5)^2 = 0.4
        batch    + 0.1 * |(1 + 2) / 2| = 0.15 each
    """
    chosen, rejected, margin = double(2, 0.5), double(-1, 1.5), double(1, 0)
    plain, metrics = reward_model_loss(chosen, rejected)
    torch.testing.assert_close(plain, double(0.048587, 1.313262), rtol=0, atol=1e-6)
    assert_metrics(metrics, {
        "reward/chosen": (2, 0.5), "reward/rejected": (-1, 1.5), "margin": (3, -1), "accuracy": (1, 0),
    })
    with_margin, _ = reward_model_loss(chosen, rejected, margin)
    torch.testing.assert_close(with_margin, double(softplus(-2), softplus(1)), **EXACT)
    by_pair, _ = reward_model_loss(chosen, rejected, centring_weight=0.1)
    torch.testing.assert_close(by_pair - plain, double(0.1, 0.4), **EXACT)
    by_batch, _ = reward_model_loss(chosen, rejected, centring_weight=0.1, centring="batch")
    torch.testing.assert_close(by_batch - plain, double(0.15, 0.15), **EXACT)


def test_reward_model_is_dpo_with_its_own_rewards():
    """The implicit rewards of DPO, put into the reward model's loss, give DPO's loss."""
    loss, metrics = dpo_loss(**random_inputs(dpo_loss))
    again, _ = reward_model_loss(metrics["reward/chosen"], metrics["reward/rejected"])
    torch.testing.assert_close(again, loss, **EXACT)


# ---- what all of them must do ----------------------------------------------------------------------------


@pytest.mark.parametrize("function, options, start", [case for case in CASES if case[2] is not None])
def test_start(function, options, start):
    """Policy = reference: the value of the docstring, whatever the log-probs are; no example is preferred."""
    inputs = random_inputs(function)
    inputs |= {name: inputs[name.replace("policy_", "reference_")] for name in trained(inputs)}
    loss, metrics = function(**inputs, **options)
    torch.testing.assert_close(loss, torch.full_like(loss, start), **EXACT)
    zeros = [name for name in metrics if name.startswith(("reward", "margin", "accuracy"))]
    assert all(metrics[name].eq(0).all() for name in zeros)


@pytest.mark.parametrize("function, options, start", [*CASES, BATCH_CENTRED])
def test_gradient_against_finite_differences(function, options, start):
    inputs = random_inputs(function, seed=1)
    names = trained(inputs)
    values = [inputs[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *x: function(**inputs | dict(zip(names, x)), **options)[0], values)


@pytest.mark.parametrize("function, options, start", [*CASES, BATCH_CENTRED])
def test_bf16_inputs_are_computed_in_fp32(function, options, start):
    halves = random_inputs(function, dtype=torch.bfloat16)
    first = halves[trained(halves)[0]].requires_grad_()
    loss, metrics = function(**halves, **options)
    floats = {name: value.float() if value.is_floating_point() else value for name, value in halves.items()}
    assert loss.dtype == torch.float32 and torch.equal(loss, function(**floats, **options)[0])
    assert all(value.dtype == torch.float32 for value in metrics.values())
    loss.sum().backward()
    assert first.grad.dtype == torch.bfloat16 and first.grad.isfinite().all()


@pytest.mark.parametrize("function, options, start", [*CASES, BATCH_CENTRED])
def test_pure(function, options, start):
    """Inputs are untouched, equal calls agree, metrics carry no graph, examples do not see each other."""
    inputs = random_inputs(function)
    inputs[trained(inputs)[0]].requires_grad_()
    before = {name: value.detach().clone() for name, value in inputs.items()}
    loss, metrics = function(**inputs, **options)
    assert torch.equal(loss, function(**inputs, **options)[0]) and loss.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert not any(value.requires_grad for value in metrics.values())
    assert {tuple(value.shape) for value in (loss, *metrics.values())} == {(5,)}
    alone, _ = function(**{name: value[2:3] for name, value in inputs.items()}, **options)
    assert torch.equal(alone, loss[2:3]) == (options.get("centring") != "batch")


@pytest.mark.parametrize("function, options, start", CASES)
def test_large_values_are_finite(function, options, start):
    """Log-ratios of +-1e6: loss, metrics and gradients stay finite."""
    inputs = random_inputs(function, dtype=torch.float32)
    names = trained(inputs)
    for i, name in enumerate(names):
        inputs[name] = torch.full_like(inputs[name], 1e6 * (-1) ** i).requires_grad_()
    loss, metrics = function(**inputs, **options)
    loss.sum().backward()
    assert loss.isfinite().all() and all(value.isfinite().all() for value in metrics.values())
    assert all(inputs[name].grad.isfinite().all() for name in names)


@pytest.mark.parametrize("function, options, start", CASES)
def test_shape_errors(function, options, start):
    """One argument of another batch size or with a dimension too many would otherwise broadcast."""
    inputs = random_inputs(function)
    for name, value in inputs.items():
        with pytest.raises((ValueError, RuntimeError)):
            function(**inputs | {name: value[:1]}, **options)
        with pytest.raises((ValueError, RuntimeError)):
            function(**inputs | {name: value[..., None].expand(*value.shape, 2)}, **options)
    with pytest.raises(ValueError):
        function(**{name: value[None] for name, value in inputs.items()}, **options)


@pytest.mark.parametrize("function, options, message", [
    (dpo_loss, {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), not 0.5"),
    (dpo_loss, {"label_smoothing": -0.1}, "label_smoothing"),
    (dpo_loss, {"smoothing": "none"}, "conservative.*robust.*not 'none'"),
    (ipo_loss, {"reduction": "max"}, "'sum' or 'mean', not 'max'"),
    (povid_loss, {"gamma": 1.5}, r"gamma must be in \[0, 1\], not 1.5"),
    (dpo_weighted_loss, {"gamma": 0.0}, "gamma must be positive, not 0.0"),
    (dpo_weighted_loss, {"reduction": "max"}, "'mean' or 'sum', not 'max'"),
    (reward_model_loss, {"centring": "max"}, "'pair' or 'batch', not 'max'"),
])
def test_option_errors(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(**random_inputs(function), **options)


@pytest.mark.parametrize("function", [ipo_loss, dpo_weighted_loss])
@pytest.mark.parametrize("name", ["chosen_mask", "rejected_mask"])
def test_empty_responses_are_errors(function, name):
    inputs = random_inputs(function)
    inputs[name] = inputs[name] & (torch.arange(5) != 3)[:, None]
    with pytest.raises(ValueError, match="without a single"):
        function(**inputs)


@pytest.mark.parametrize("function, name", [(dpo_weighted_loss, "chosen_mask"), (ipo_loss, "rejected_mask"),
                                            (dpo_weighted_loss, "rejected_changed")])
def test_masks_must_be_boolean(function, name):
    inputs = random_inputs(function)
    with pytest.raises(ValueError, match="must be bool, not.*torch.int64"):
        function(**inputs | {name: inputs[name].long()})


# ---- agreement with another library ----------------------------------------------------------------------


def trl_1_16():
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the stand-in trainer is written for TRL 1.16, found {trl.__version__}")
    return trl


def stand_in(**settings) -> SimpleNamespace:
    """What TRL's loss methods read of their trainer."""
    return SimpleNamespace(
        aux_loss_enabled=False, model=SimpleNamespace(training=True), _tp_size=1, _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        **settings,
    )


@pytest.mark.parametrize("loss_type, smoothing, pairs, function, options", [
    ("sigmoid", 0.0, 3, dpo_loss, {}),
    ("robust", 0.2, 3, dpo_loss, {"label_smoothing": 0.2, "smoothing": "robust"}),
    ("aot", 0.2, 1, dpo_loss, {"label_smoothing": 0.2}),  # on a single pair, TRL's only smoothed sigmoid loss
    ("ipo", 0.0, 3, ipo_loss, {"reduction": "mean"}),
    ("hinge", 0.0, 3, slic_loss, {}),
])
def test_preference_losses_equal_trl(loss_type, smoothing, pairs, function, options):
    """TRL's losses are inside `DPOTrainer._compute_loss`, called here with stand-ins for trainer and
    model, which returns given token log-probs of responses of different length: loss and gradient."""
    trl_1_16()
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 1, 4, 2])[: 2 * pairs]
    mask = torch.arange(4) < lengths[:, None]
    token_logps = -torch.rand(2 * pairs, 4, generator=generator)
    token_logps = (token_logps * mask).requires_grad_()  # chosen then rejected
    reference = -2 * torch.rand(2 * pairs, generator=generator)
    zeros = torch.zeros(2 * pairs, 4)
    outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = stand_in(beta=0.25, loss_types=[loss_type], loss_weights=[1.0], f_divergence_type="reverse_kl",
                       ld_alpha=None, use_weighting=False, precompute_ref_logps=True,
                       label_smoothing=smoothing)
    inputs = {
        "input_ids": torch.zeros(2 * pairs, 5, dtype=torch.long), "attention_mask": torch.ones(2 * pairs, 5),
        "completion_mask": F.pad(mask.long(), (1, 0)),  # the first position is never scored
        "ref_chosen_logps": reference[:pairs], "ref_rejected_logps": reference[pairs:],
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    their_gradient, = torch.autograd.grad(theirs, token_logps)

    logps = (token_logps * mask).sum(dim=1)
    masks = (mask[:pairs], mask[pairs:]) if function is ipo_loss else ()
    losses, _ = function(logps[:pairs], logps[pairs:], reference[:pairs], reference[pairs:], *masks,
                         beta=0.25, **options)
    our_gradient, = torch.autograd.grad(losses.mean(), token_logps)
    torch.testing.assert_close(losses.mean(), theirs)
    torch.testing.assert_close(our_gradient * mask, their_gradient * mask)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("weight", [None, 0.01])
def test_reward_model_equals_trl(with_margin, weight):
    """`RewardTrainer.compute_loss` with stand-ins for trainer and model."""
    trl_1_16()
    from trl.trainer.reward_trainer import RewardTrainer

    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 1, generator=generator, requires_grad=True)  # chosen then rejected, 3 pairs
    margin = torch.rand(3, generator=generator) if with_margin else None
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=weight))
    inputs = {"attention_mask": torch.ones(6, 5)} | ({"margin": margin} if with_margin else {})
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=rewards), inputs)
    their_gradient, = torch.autograd.grad(theirs, rewards)

    chosen, rejected = rewards.squeeze(-1).chunk(2)
    losses, metrics = reward_model_loss(chosen, rejected, margin, centring_weight=weight or 0.0)
    our_gradient, = torch.autograd.grad(losses.mean(), rewards)
    torch.testing.assert_close(losses.mean(), theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    for name in ("accuracy", "margin"):
        their_value, = trainer._metrics["train"][name]
        assert metrics[name].mean().item() == pytest.approx(their_value, rel=1e-5)
