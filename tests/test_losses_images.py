"""LPOI and SymMPO, the losses over several images: hand arithmetic, what makes a ranking of images one, and which
losses depend on what differs between images alone. What all losses must do is tested in test_losses.py.
"""

import itertools
import math

import pytest
import torch
from test_losses import EXACT, assert_metrics, double, random_logps, sigmoid, softplus
from torch.nn.functional import logsigmoid

from data.batch import Scored
from losses import adavip, dpo, lpoi, mdpo, rdpo, symmpo
from losses.lpoi import lpoi_loss
from losses.symmpo import symmpo_loss

ZERO = torch.zeros(2, dtype=torch.float64)


def rewards(*values: tuple[float, float]) -> list[torch.Tensor]:
    """Log-probs whose rewards at beta 0.1 are these, on top of arbitrary ones of the reference."""
    reference = [double(-60 + i, -50 - i) for i in range(len(values))]
    return [*(at + 10 * double(*value) for at, value in zip(reference, values)), *reference]


def listwise(logps: list[torch.Tensor], **options) -> torch.Tensor:
    """LPOI's loss without its terms of one response under one image."""
    chosen, rejected = (0.1 * (logps[i] - logps[i + 6]) for i in range(2))
    return lpoi_loss(*logps, **options)[0] + logsigmoid(chosen - rejected) + logsigmoid(chosen)


def test_lpoi_by_hand():
    """Images' rewards ln 8, ln 4, ln 2, 0, 0 in the first example, and in the opposite order in the second.

        example 1: 1/2 at each of four places     4 ln 2
        example 2: 1/16 . 1/15 . 2/14 . 4/12      ln(16 . 15 . 7 . 3) = ln 5040

    Rejected -1: margins ln 8 + 1 and 0 + 1; anchor ln 8 and 0.
    """
    ln = math.log
    values = [(ln(8), 0), (-1, -1), (ln(4), 0), (ln(2), ln(2)), (0, ln(4)), (0, ln(8))]
    loss, metrics = lpoi_loss(*rewards(*values))
    torch.testing.assert_close(loss, double(4 * ln(2) + softplus(-ln(8) - 1) + ln(9 / 8),
                                            ln(5040) + softplus(-1) + ln(2)), **EXACT)
    assert_metrics(metrics, {
        **dict(zip([f"reward/{name}" for name in lpoi.SEQUENCES], values)),
        "margin": (ln(8) + 1, 1), "margin/hidden100": (ln(8), -ln(8)),
        "accuracy": (1, 1), "accuracy/hidden100": (1, 0), "accuracy/anchor": (1, 0), "accuracy/ranking": (0.75, 0),
    })
    anchored, metrics = lpoi_loss(*rewards(*values), delta=ln(16))
    torch.testing.assert_close(anchored - loss, double(softplus(ln(2)) - ln(9 / 8), ln(17) - ln(2)), **EXACT)
    assert metrics["accuracy/anchor"].tolist() == [0, 0]
    mixed = lpoi_loss(*rewards(*((value, value) for value in (1, 0, 3, 2, 4, 0))))[1]  # falls after 3 and after 4
    assert mixed["accuracy/ranking"].tolist() == [0.5, 0.5]


def test_lpoi_is_the_product_of_its_equation():
    """-log prod_k exp(S_k) / sum_{j >= k} exp(S_j), as it is printed."""
    logps = random_logps(6)
    scores = torch.stack([0.1 * (logps[i] - logps[i + 6]) for i in (0, 2, 3, 4, 5)]).exp()
    places = torch.stack([scores[k] / scores[k:].sum(0) for k in range(5)])
    torch.testing.assert_close(listwise(logps), -places.prod(0).log(), **EXACT)


def test_lpoi_gives_all_rankings_a_probability_of_1():
    """Plackett-Luce is a distribution over the 120 orders of the images."""
    logps = random_logps(6, seed=2)
    images = [0, 2, 3, 4, 5]
    total = 0
    for order in itertools.permutations(images):
        mine = list(logps)
        for place, i in zip(images, order):
            mine[place], mine[place + 6] = logps[i], logps[i + 6]
        total = total + (-listwise(mine)).exp()
    torch.testing.assert_close(total, torch.ones_like(total), **EXACT)


def test_lpoi_gradient_is_that_of_its_header():
    """d L_Listwise / d S_k = sum_{i <= k} P(k | i) - 1; the three terms of one response are DPO's and the anchor's."""
    logps = random_logps(6, seed=3)
    policy = [value.clone().requires_grad_() for value in logps[:6]]
    gradients = torch.autograd.grad(lpoi_loss(*policy, *logps[6:])[0].sum(), policy)
    reward = [0.1 * (logps[i] - logps[i + 6]) for i in range(6)]
    scores = torch.stack([reward[i] for i in (0, 2, 3, 4, 5)]).exp()
    wanted = [sum(scores[k] / scores[i:].sum(0) for i in range(k + 1)) - 1 for k in range(5)]
    text, anchor = torch.sigmoid(reward[1] - reward[0]), torch.sigmoid(-reward[0])
    for i, value in zip((0, 1, 2, 3, 4, 5), (wanted[0] - text - anchor, text, *wanted[1:])):
        torch.testing.assert_close(gradients[i], 0.1 * value, **EXACT)


def test_lpoi_keeps_a_tiny_loss():
    """Rewards 120, 90, 60, 30, 0 and -120: four times e^-30 and e^-240, e^-120; 1 + e^-30 would round to 1 in fp32."""
    logps = [torch.tensor([10.0 * value]) for value in (120, -120, 90, 60, 30, 0)]
    loss, _ = lpoi_loss(*logps, *[torch.zeros(1)] * 6)
    assert loss.item() == pytest.approx(4 * math.exp(-30), rel=1e-5, abs=0)


def test_lpoi_hides_more_and_more():
    """The list starts at the image itself, ends at the rejected one, and says the chosen response throughout."""
    asked = [Scored(**kwargs) for name, kwargs in lpoi.SEQUENCES.items() if name != "rejected"]
    assert [(how.image, how.hidden) for how in asked] == [
        ("image", 0.0), ("image", 0.25), ("image", 0.5), ("image", 0.75), ("rejected_image", 0.0)]
    assert {how.response for how in asked} == {"chosen"} and not any(how.drawn for how in asked)


def test_symmpo_by_hand():
    """Rewards (2, -1, 1, -2, 3) and (-1, 1, 2, 0, -2) of chosen, rejected, other response, other image and other.

        example 1: margin 3; Delta 1, Delta' 5; anchors 2, 3
        example 2: margin -2; Delta -3, Delta' -2; anchors -1, -2
    """
    values = [(2, -1), (-1, 1), (1, 2), (-2, 0), (3, -2)]
    weights = dict(pair_weight=0.25, margin_weight=0.01, anchor_weight=2.0, delta=0.5)
    loss, metrics = symmpo_loss(*rewards(*values), **weights)
    torch.testing.assert_close(loss, double(
        softplus(-3) + 0.25 * (softplus(-1) + softplus(-5)) + 0.01 * 16 + 2 * (softplus(-1.5) + softplus(-2.5)),
        softplus(2) + 0.25 * (softplus(3) + softplus(2)) + 0.01 * 1 + 2 * (softplus(1.5) + softplus(2.5))), **EXACT)
    assert_metrics(metrics, {
        **dict(zip([f"reward/{name}" for name in symmpo.SEQUENCES], values)),
        "margin": (3, -2), "margin/image": (1, -3), "margin/other": (5, -2),
        "accuracy": (1, 0), "accuracy/image": (1, 0), "accuracy/other": (1, 0), "accuracy/anchor": (1, 0),
    })
    half = symmpo_loss(*rewards(*values), delta=2.5)[1]["accuracy/anchor"]
    assert half.tolist() == [0.5, 0]


def test_symmpo_defaults_are_the_papers():
    """lambda 0.5, gamma 1e-4, eta 1, delta 0, beta 0.1."""
    logps = random_logps(5)
    options = dict(beta=0.1, delta=0.0, pair_weight=0.5, margin_weight=1e-4, anchor_weight=1.0)
    assert torch.equal(symmpo_loss(*logps)[0], symmpo_loss(*logps, **options)[0])


def test_symmpo_is_what_its_released_code_computes():
    """There the margins' difference is one of log-ratios and has the weight 1e-4: 1e-4 / beta^2 of the rewards'."""
    logps, beta = random_logps(5), 0.2
    w, lost, other_response, other_image, other = (p - r for p, r in zip(logps[:5], logps[5:]))
    first, second = w - other_response, other - other_image
    theirs = -logsigmoid(beta * (w - lost)) + 0.5 * (-logsigmoid(beta * first) - logsigmoid(beta * second))
    theirs = theirs - logsigmoid(beta * w) - logsigmoid(beta * other) + 1e-4 * (first - second) ** 2
    ours, _ = symmpo_loss(*logps, beta=beta, margin_weight=1e-4 / beta**2)
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_symmpo_is_symmetric():
    """The two images and their responses may change places in all but the DPO term."""
    chosen, rejected, other_response, other_image, other = range(5)
    logps = random_logps(5)
    order = [other, rejected, other_image, other_response, chosen]
    swapped = [logps[i] for i in order] + [logps[5 + i] for i in order]

    def apart_from_dpo(values):
        return symmpo_loss(*values)[0] - dpo.dpo_loss(values[0], values[1], values[5], values[6])[0]

    torch.testing.assert_close(apart_from_dpo(swapped), apart_from_dpo(logps), **EXACT)


@pytest.mark.parametrize("module, options, cancels", [
    (dpo, {}, True), (symmpo, {"anchor_weight": 0.0}, True), (symmpo, {}, False),
    (rdpo, {}, False), (mdpo, {}, False), (adavip, {}, False), (lpoi, {}, False)])
def test_where_the_partition_function_cancels(module, options, cancels):
    """Add to each reward a number of its image, beta log Z(x, v): a loss that compares responses to one image does not
    change. Those over several images do, and so does an anchor; rDPO, mDPO and AdaViP keep each log-prob's direction.
    """
    function = getattr(module, f"{module.__name__.removeprefix('losses.')}_loss")
    shown = [(how["image"], how.get("view"), how.get("hidden")) for how in module.SEQUENCES.values()]
    logps = random_logps(len(shown), seed=4)
    offsets = dict(zip(sorted(set(shown), key=str), torch.linspace(-15, 15, len(set(shown)), dtype=torch.float64)))
    policy = [value.clone().requires_grad_() for value in logps[: len(shown)]]
    moved = [(value + offsets[image] + 4).detach().requires_grad_() for value, image in zip(logps, shown)]
    before, after = (function(*values, *logps[len(shown) :], **options)[0] for values in (policy, moved))
    assert torch.allclose(before, after, rtol=0, atol=1e-9) == cancels
    if module in (rdpo, mdpo, adavip):
        signs = [torch.autograd.grad(loss.sum(), values) for loss, values in ((before, policy), (after, moved))]
        assert all(torch.equal(a.sign(), b.sign()) for a, b in zip(*signs))


def test_adavip_weighs_its_negatives_by_the_offset():
    """Of two negatives of equal reward each has 1/2; with c = 1 added to that of the other image sigma(1)."""
    zero = [ZERO] * 6
    assert adavip.adavip_loss(*zero)[1]["weight/removed"].tolist() == [0.5, 0.5]
    shifted = adavip.adavip_loss(ZERO, ZERO, ZERO + 10, ZERO, ZERO, ZERO)[1]["weight/removed"]
    torch.testing.assert_close(shifted, double(sigmoid(1), sigmoid(1)), **EXACT)
