"""Online losses: PPO, RLOO, FiSAO's rewards, and the object words they are placed on."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from data.mentions import ENTITIES, find, load_entities, mentions, token_ends
from losses.fisao import calibrate, mention_rewards, place, verifier_scores
from losses.ppo import adapt_kl, gae, kl_estimate, ppo_loss, token_rewards, whiten
from losses.rloo import leave_one_out, penalised, rloo_loss

EXACT = dict(rtol=0, atol=1e-12)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)  # 8 tokens, 3 responses


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rollout(seed: int = 0, moved: float = 0.3) -> list[torch.Tensor]:
    """Arguments of ppo_loss (3, 4) up to the mask, float64; padding holds numbers that would show."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    old = -draws[0].abs() - 0.1
    values = [old + moved * draws[1], old, draws[2], draws[3] + moved * draws[4], draws[3], draws[5]]
    return [x.masked_fill(~MASK, 1e3) for x in values]


def rows(*values: bool) -> torch.Tensor:
    return torch.tensor(values)


# ---- PPO: rewards, advantages ----------------------------------------------------------------------------


def test_kl_estimates():
    """d = 0.3: k1 = 0.3, k2 = 0.09 / 2 = 0.045, k3 = e^-0.3 - 1 + 0.3 = 0.740818 - 0.7 = 0.040818."""
    for estimator, expected in (("k1", 0.3), ("k2", 0.045), ("k3", math.exp(-0.3) - 0.7)):
        assert kl_estimate(double(-1.2), double(-1.5), estimator).item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="'k4' is none of"):
        kl_estimate(double(0), double(0), "k4")


def test_k1_and_k3_are_unbiased():
    """Summed over all outcomes with their probability, k1 and k3 are the exact KL divergence; k2 is not."""
    p, q = double(0.2, 0.3, 0.5), double(0.4, 0.4, 0.2)
    exact = (p * (p / q).log()).sum()
    mean = {name: (p * kl_estimate(p.log(), q.log(), name)).sum() for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], exact, **EXACT)
    torch.testing.assert_close(mean["k3"], exact, **EXACT)
    assert (mean["k2"] - exact).abs() > 0.01


def test_token_rewards_by_hand():
    """beta 0.5, log-ratios .2, -.4, .6: -.1, .2, -.3; token score 2 on the second, score 3 on the last.

    The second response is one token, log-ratio 1, score -1 and not ended, penalty 4: -.5 - 1 - 4 = -5.5.
    """
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    old = torch.tensor([[-1.0, -1.0, -1.0, math.nan], [-1.0, math.inf, 0.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[-1.2, -0.6, -1.6, 5.0], [-2.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    token_scores = torch.zeros(2, 4, dtype=torch.float64)
    token_scores[0, 1] = 2
    rewards = token_rewards(old, reference, mask, double(3, -1), token_scores, rows(True, False),
                            kl_coef=0.5, missing_eos_penalty=4.0)
    expected = torch.tensor([[-0.1, 2.2, 2.7, 0.0], [-5.5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected, **EXACT)
    plain = token_rewards(old, reference, mask, kl_coef=0.5)
    torch.testing.assert_close(plain[0, :3], double(-0.1, 0.2, -0.3), **EXACT)


def test_terminal_score_stands_on_the_last_real_token_of_left_padded_rows_too():
    mask = torch.tensor([[False, True, True]])
    zero = torch.zeros(1, 3)
    assert token_rewards(zero, zero, mask, torch.tensor([7.0])).tolist() == [[0, 0, 7]]


@pytest.mark.parametrize("rewards, values, lam, expected", [
    ((-0.1, 0.5, -0.2, 1.0), (0, 0, 0, 0), 1.0, (1.2, 1.3, 0.8, 1.0)),
    ((-0.1, 0.5, -0.2, 1.0), (0, 0, 0, 0), 0.95, (1.051875, 1.2125, 0.75, 1.0)),
    ((0, 0, 0, 1.0), (0.2, 0.3, 0.4, 0.5), 0.95, (0.7139375, 0.64625, 0.575, 0.5)),
])  # fmt: skip
def test_gae_by_hand(rewards, values, lam, expected):
    """Last row: deltas .1, .1, .1, .5; A = .5, .1 + .95 * .5 = .575, .1 + .95 * .575 = .64625, .7139375."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    advantages, returns = gae(double(rewards), double(values), mask, lam=lam)
    torch.testing.assert_close(advantages, double(expected), **EXACT)
    torch.testing.assert_close(returns, double(expected) + double(values), **EXACT)


def test_gae_is_the_sum_of_its_definition():
    """A_t = sum_l (gamma lambda)^l delta_t+l at gamma 0.9, lambda 0.8, each response without its padding."""
    _, _, rewards, values, *_ = rollout()
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    for i, length in enumerate(MASK.sum(-1).tolist()):
        after = torch.cat([values[i, 1:length], double(0)])
        delta = rewards[i, :length] + 0.9 * after - values[i, :length]
        for t in range(length):
            expected = sum((0.9 * 0.8) ** n * delta[t + n] for n in range(length - t))
            torch.testing.assert_close(advantages[i, t], expected, **EXACT)
    assert advantages[~MASK].eq(0).all() and returns[~MASK].eq(0).all()


def test_gae_with_left_padding():
    """The same response, padded left: the same advantages, one place further."""
    rewards, values = double((0, 0, 0, 1.0)), double((0.2, 0.3, 0.4, 0.5))
    full = gae(rewards, values, torch.ones(1, 4, dtype=torch.bool))[0]
    padded = [torch.cat([double((9.0,)), x], -1) for x in (rewards, values)]
    left = gae(*padded, torch.tensor([[False, True, True, True, True]]))[0]
    torch.testing.assert_close(left, torch.cat([torch.zeros(1, 1, dtype=torch.float64), full], -1), **EXACT)


def test_whiten():
    """1, 2, 3, 6 have mean 3 and unbiased variance 14 / 3."""
    x, mask = double((1, 2, 3), (6, 99, math.nan)), torch.tensor([[True] * 3, [True, False, False]])
    white = whiten(x, mask, eps=0)
    torch.testing.assert_close(white[mask], (double(1, 2, 3, 6) - 3) / math.sqrt(14 / 3), **EXACT)
    assert white[~mask].eq(0).all()
    scaled = whiten(x, mask, shift_mean=False, eps=0)
    torch.testing.assert_close(scaled[mask], white[mask] + 3, **EXACT)
    with pytest.raises(ValueError, match="at least two tokens, found 1"):
        whiten(torch.zeros(1, 2), torch.tensor([[True, False]]))


def test_adapt_kl():
    """Target 6: 9 is cut to +20 %, 5.4 is -10 %; n of horizon responses of that."""
    assert adapt_kl(0.2, 9.0, 10_000) == pytest.approx(0.24)
    assert adapt_kl(0.2, 5.4, 10_000) == pytest.approx(0.18)
    assert adapt_kl(0.2, 0.0, 100) == pytest.approx(0.2 * (1 - 0.2 * 0.01))
    assert adapt_kl(0.2, 6.0, 100) == 0.2


# ---- PPO: the loss ---------------------------------------------------------------------------------------


def test_ppo_by_hand():
    """Ratios 1.5, 1.1, 0.5, 0.5 with advantages 2, 2, 2, -1 at clip 0.2; one response of 3, one of 1 tokens.

        -min(3, 2.4) = -2.4    -2.2    -min(1, 1.6) = -1    -min(-.5, -.8) = .8      mean -4.8 / 4 = -1.2

    Values 1, 0, 0, 0 after old values 0, return 0 of the first and 1 of the others; value clip 0.2:
        first  max(1, .04) / 2 = .5, others max(1, 1) / 2 = .5                         mean .5
    Loss -1.2 + 0.1 * .5 = -1.15. Clipped: tokens 1 and 4 of 4.
    """
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ratio = double((1.5, 1.1, 0.5), (0.5, 1.0, 1.0))
    old = torch.full_like(ratio, -2.0)
    advantages = double((2, 2, 2), (-1, 99, 99))
    values, zero = double((1, 0, 0), (0, 99, 99)), torch.zeros_like(ratio)
    returns = double((0, 1, 1), (1, 99, 99))
    loss, metrics = ppo_loss(old + ratio.log(), old, advantages, values, zero, returns, mask)
    torch.testing.assert_close(loss.mean(), double(-1.15)[0], **EXACT)
    torch.testing.assert_close(loss, double((-5.6 + 0.15) / 2, (0.8 + 0.05) / 2), **EXACT)  # 4 tokens / 2
    expected = {"policy_loss": -1.2, "value_loss": 0.5, "ratio": 3.6 / 4, "clip_fraction": 0.5,
                "value_clip_fraction": 0.0}
    for name, value in expected.items():
        assert metrics[name].mean().item() == pytest.approx(value, abs=1e-12), name
    kl = sum(r - 1 - math.log(r) for r in (1.5, 1.1, 0.5, 0.5)) / 4
    assert metrics["approx_kl"].mean().item() == pytest.approx(kl, abs=1e-12)


def test_value_clip():
    """V moved from 0 to 1, return 1: plain error 0, clipped to .2 error .8: the larger, .64 / 2, counts."""
    one, zero, mask = double((1.0,)), double((0.0,)), torch.tensor([[True]])
    loss, metrics = ppo_loss(zero, zero, zero, one, zero, one, mask, value_coef=1.0)
    assert loss.item() == pytest.approx(0.32) and metrics["value_clip_fraction"].item() == 1
    loss, _ = ppo_loss(zero, zero, zero, one, zero, one, mask, value_coef=1.0, value_clip=math.inf)
    assert loss.item() == 0


def test_first_update_is_plain_policy_gradient():
    """pi = pi_old: ratio exactly 1, nothing clipped, gradient that of -mean_t A_t log pi(y_t)."""
    logps, old, advantages, *rest = rollout(moved=0.0)
    logps = old.clone().requires_grad_()
    loss, metrics = ppo_loss(logps, old, advantages, *rest, MASK, value_coef=0.0)
    gradient, = torch.autograd.grad(loss.mean(), logps)
    other = old.clone().requires_grad_()
    expected, = torch.autograd.grad(-(advantages * other)[MASK].mean(), other)
    torch.testing.assert_close(gradient, expected, **EXACT)
    assert metrics["ratio"].mean().item() == pytest.approx(1) and metrics["clip_fraction"].eq(0).all()
    assert metrics["approx_kl"].eq(0).all()


def test_a_clipped_token_has_no_gradient():
    """Above 1 + e with A > 0 and below 1 - e with A < 0; the other two signs still pull the ratio back."""
    old, mask = torch.zeros(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    logps = double((1.3, 1.3, 0.7, 0.7)).log().requires_grad_()
    loss, _ = ppo_loss(logps, old, double((1, -1, 1, -1)), old, old, old, mask)
    gradient, = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, double((0, 1.3, -0.7, 0)) / 4, **EXACT)


def test_ppo_padding_never_matters():
    """Other padding, even nan and inf, and further columns of it: the same loss, metrics and gradients."""
    def run(fill: float, more: int):
        extra = torch.full((3, more), fill, dtype=torch.float64)
        arguments = [torch.cat([x.masked_fill(~MASK, fill), extra], -1) for x in rollout()]
        arguments[0].requires_grad_()
        mask = torch.cat([MASK, torch.zeros(3, more, dtype=torch.bool)], -1)
        loss, metrics = ppo_loss(*arguments, mask)
        loss.mean().backward()
        return loss.detach(), metrics, arguments[0].grad

    loss, metrics, gradient = run(0.0, 0)
    for fill, more in ((1e4, 0), (math.nan, 3), (math.inf, 1)):
        other, other_metrics, other_gradient = run(fill, more)
        assert torch.equal(other, loss) and torch.equal(other_gradient[:, :4], gradient)
        assert all(torch.equal(other_metrics[name], metrics[name]) for name in metrics)
        assert other_gradient[:, 4:].eq(0).all() and other_gradient[:, :4][~MASK].eq(0).all()


def test_ppo_mean_is_the_token_mean_in_parts_too():
    """Whole batch, or micro-batches of 2 and 1 with the whole's tokens a response: one mean over 8 tokens."""
    arguments = rollout()
    whole, metrics = ppo_loss(*arguments, MASK)
    mean_tokens = torch.tensor(8 / 3, dtype=torch.float64)
    parts = [ppo_loss(*(x[s] for x in arguments), MASK[s], mean_tokens)[0] for s in (slice(2), slice(2, 3))]
    torch.testing.assert_close(torch.cat(parts), whole, **EXACT)
    ratio = (arguments[0] - arguments[1]).exp()
    torch.testing.assert_close(metrics["ratio"].mean(), ratio[MASK].mean(), **EXACT)


def test_ppo_gradient_against_finite_differences():
    logps, old, advantages, values, *rest = rollout(seed=1)
    def run(logps, values):
        return ppo_loss(logps, old, advantages, values, *rest, MASK)[0]
    assert torch.autograd.gradcheck(run, (logps.requires_grad_(), values.requires_grad_()))


def test_ppo_gradient_goes_nowhere_else():
    """Not into old log-probs, advantages, old values or returns; metrics carry no graph; bf16 is lifted."""
    arguments = [x.bfloat16().requires_grad_() for x in rollout()]
    loss, metrics = ppo_loss(*arguments, MASK)
    loss.sum().backward()
    assert [x.grad is not None for x in arguments] == [True, False, False, True, False, False]
    assert loss.dtype == torch.float32 and not any(x.requires_grad for x in metrics.values())


def test_ppo_errors():
    good = torch.zeros(2, 3)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"returns must be \[2, 3\] like the mask, not \[2\]"):
        ppo_loss(good, good, good, good, good, good[:, 0], mask)
    with pytest.raises(ValueError, match="bool"):
        gae(good, good, mask.float())
    for broken in ([True, False, True], [False, False, False]):
        with pytest.raises(ValueError, match="row 1 are not one unbroken stretch"):
            gae(good, good, torch.tensor([[True, True, True], broken]))
    with pytest.raises(ValueError, match="needs `ended`"):
        token_rewards(good, good, mask, missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match=r"scores must be \[2\]"):
        token_rewards(good, good, mask, torch.zeros(2, 1))


# ---- RLOO ------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    """1, 2, 5, 8 -> 1 - 15/3, 2 - 14/3, 5 - 11/3, 8 - 8/3; equal rewards give 0; prompts are separate."""
    rewards = double(1, 2, 5, 8, 3, 3, 3, 3)
    prompts = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
    advantages = leave_one_out(rewards, prompts, k=4)
    torch.testing.assert_close(advantages, double(-4, -8 / 3, 4 / 3, 16 / 3, 0, 0, 0, 0), **EXACT)
    shifted = leave_one_out(rewards + double(*[100] * 4, *[0] * 4), prompts, k=4)
    torch.testing.assert_close(shifted, advantages, **EXACT)


def test_layouts_are_not_mixed():
    """Responses of prompt 0: 1, 2, of prompt 1: 5, 8. In blocks, 1 and 5 would be compared."""
    neighbours = leave_one_out(double(1, 2, 5, 8), torch.tensor([0, 0, 1, 1]), k=2)
    assert neighbours.tolist() == [-1, 1, -3, 3]
    with pytest.raises(ValueError, match=r"responses 0 to 1 belong to several prompts, \[0, 1\]"):
        leave_one_out(double(1, 5, 2, 8), torch.tensor([0, 1, 0, 1]), k=2)
    with pytest.raises(ValueError, match="1 prompts occur in more than one group of k = 2"):
        leave_one_out(double(1, 2, 5, 8), torch.tensor([0, 0, 0, 0]), k=2)
    with pytest.raises(ValueError, match="multiple of k = 3"):
        leave_one_out(double(1, 2, 5, 8), torch.tensor([0, 0, 0, 0]), k=3)
    with pytest.raises(ValueError, match="k >= 2"):
        leave_one_out(double(1), torch.tensor([0]), k=1)


def test_penalised_by_hand():
    """(7 - 4) / 1.5 - 0.4 * (-20 + 25) = 2 - 2 = 0;  (1 - 4) / 1.5 - 0.4 * (-30 + 29) = -2 + 0.4 = -1.6."""
    rewards = penalised(double(7, 1), double(-20, -30), double(-25, -29), kl_coef=0.4, mean=4.0, std=1.5)
    torch.testing.assert_close(rewards, double(0, -1.6), **EXACT)
    with pytest.raises(ValueError, match="response 1 is not finite"):
        penalised(double(0, math.nan), double(0, 0), double(0, 0))
    with pytest.raises(ValueError, match="std"):
        penalised(double(0), double(0), double(0), std=0.0)
    with pytest.raises(ValueError, match=r"must all be \(B,\)"):
        penalised(double(0), double(0, 0), double(0))


def test_rloo_by_hand():
    """REINFORCE -A log pi; clipped at 0.2, ratios 1.5 and 0.5 with A = 2 and -1: -2.4 and 0.8."""
    old, advantages = double(-20, -30), double(2, -1)
    logps = old + double(1.5, 0.5).log()
    loss, metrics = rloo_loss(logps, old, advantages)
    torch.testing.assert_close(loss, -advantages * logps, **EXACT)
    assert metrics["clip_fraction"].eq(0).all()
    loss, metrics = rloo_loss(logps, old, advantages, clip=0.2)
    torch.testing.assert_close(loss, double(-2.4, 0.8), **EXACT)
    torch.testing.assert_close(metrics["ratio"], double(1.5, 0.5), **EXACT)
    assert metrics["clip_fraction"].eq(1).all() and not any(x.requires_grad for x in metrics.values())


def test_rloo_forms_have_one_gradient_at_the_first_update():
    advantages, gradients = double(-4, 1, 3), []
    for clip in (0.0, 0.2):
        logps = double(-20, -30, -40).requires_grad_()
        loss, _ = rloo_loss(logps, logps.detach(), advantages, clip=clip)
        gradients += torch.autograd.grad(loss.sum(), logps)
    assert torch.equal(gradients[0], -advantages) and torch.equal(gradients[1], -advantages)


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_rloo_gradient_against_finite_differences(clip):
    old, advantages = double(-2, -3, -4, -5), double(-4, 1, 3, -2)
    logps = (old + double(0.1, -0.5, 0.5, 0.05)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rloo_loss(x, old, advantages, clip=clip)[0], logps)


def test_rloo_errors():
    with pytest.raises(ValueError, match=r"must all be \(B,\)"):
        rloo_loss(torch.zeros(2), torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="clip must be >= 0"):
        rloo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip=-0.1)


def test_rloo_equals_trl():
    """TRL's clipped loss sits in `RLOOTrainer._compute_loss`: called with a stand-in for the trainer whose
    model pass returns given token log-probs. Its KL and advantages stand inside generation, not callable.
    """
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the stand-in trainer is written for TRL 1.16, found {trl.__version__}")
    from trl.trainer.rloo_trainer import RLOOTrainer

    generator = torch.Generator().manual_seed(0)
    token_logps = (-torch.rand(4, 3, generator=generator)).requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    old = (token_logps.detach() * mask).sum(1) + torch.tensor([0.1, -0.5, 0.5, 0.0])
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 5.0, 8.0]), torch.zeros(4), k=4)
    same = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    trainer = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False, accelerator=same,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (token_logps, torch.zeros(4, 3), None),
    )
    ids = torch.zeros(4, 3, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": ids,
              "completion_mask": mask, "old_logps": old, "advantages": advantages}
    theirs = RLOOTrainer._compute_loss(trainer, None, inputs)
    their_gradient, = torch.autograd.grad(theirs, token_logps)
    ours, metrics = rloo_loss((token_logps * mask).sum(1), old, advantages, clip=0.2)
    our_gradient, = torch.autograd.grad(ours.mean(), token_logps)
    torch.testing.assert_close(ours.mean(), theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    their_clips, = trainer._metrics["train"]["clip_ratio/region_mean"]
    assert metrics["clip_fraction"].mean().item() == pytest.approx(their_clips)


# ---- the whole loop on a policy without context ----------------------------------------------------------


def sample(logits: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` responses of 3 tokens out of 5 (B, 3), and their mask: token 0 is the end."""
    tokens = torch.multinomial(logits.softmax(-1).expand(count, -1, -1).flatten(0, 1), 1, generator=generator)
    tokens = tokens.view(count, 3)
    ended_before = (tokens == 0).cumsum(-1) - (tokens == 0).long()
    return tokens, ended_before == 0


def logps_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Token log-probs (B, 3)."""
    return logits.log_softmax(-1).expand(len(tokens), -1, -1).gather(-1, tokens[..., None]).squeeze(-1)


def test_ppo_learns_token_scores():
    """+1 for each token 2, -1 for each token 3: their share goes from 1/5 each to most and next to none."""
    generator = torch.Generator().manual_seed(0)
    logits, critic = (torch.zeros(shape, requires_grad=True) for shape in ((3, 5), (3,)))
    reference = logits.detach().clone()
    optimizer = torch.optim.Adam([logits, critic], lr=0.05)
    for _ in range(15):
        tokens, mask = sample(logits.detach(), 64, generator)
        old, old_values = logps_of(logits, tokens).detach(), critic.detach().expand(64, 3)
        token_scores = (tokens == 2).float() - (tokens == 3).float()
        expected = logps_of(reference, tokens)
        rewards = token_rewards(old, expected, mask, token_scores=token_scores, kl_coef=0.01)
        advantages, returns = gae(rewards, old_values, mask)
        advantages = whiten(advantages, mask)
        for _ in range(4):
            loss, _ = ppo_loss(logps_of(logits, tokens), old, advantages, critic.expand(64, 3), old_values,
                               returns, mask)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    shares_now = logits.softmax(-1).mean(0)
    assert shares_now[2] > 0.6 and shares_now[3] < 0.05 and critic[0] > 0


@pytest.mark.parametrize("clip, updates", [(0.0, 1), (0.2, 2)])
def test_rloo_learns_scores(clip, updates):
    """Score = number of tokens 2, 16 prompts of k = 4 responses."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, 5, requires_grad=True)
    reference, prompts = logits.detach().clone(), torch.arange(16).repeat_interleave(4)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(40):
        tokens, mask = sample(logits.detach(), 64, generator)
        old, expected = ((logps_of(x, tokens) * mask).sum(-1).detach() for x in (logits, reference))
        scores = ((tokens == 2) & mask).sum(-1).float()
        advantages = leave_one_out(penalised(scores, old, expected, kl_coef=0.01), prompts, k=4)
        for _ in range(updates):
            loss, _ = rloo_loss((logps_of(logits, tokens) * mask).sum(-1), old, advantages, clip=clip)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    assert logits.softmax(-1)[:, 2].mean() > 0.6


# ---- FiSAO: baselines and rewards ------------------------------------------------------------------------

SCORES, CORRECT = double(60, 70, 80, 40, 50), rows(True, True, True, False, False)


def test_calibration_by_hand():
    """Micro: 210 / 3 = 70 and 90 / 2 = 45. Macro, correct 60 | 70, 80 in two responses: (60 + 75) / 2 = 67.5;
    hallucinated both in one: 45. Spread: (100 + 0 + 100 + 25 + 25) / (5 - 2) = 250 / 3.
    """
    micro = calibrate(SCORES, CORRECT)
    assert micro == pytest.approx({
        "correct": 70.0, "hallucinated": 45.0, "low": 40.0, "high": 80.0, "std": math.sqrt(250 / 3),
        "correct_mentions": 3, "hallucinated_mentions": 2, "average": "micro", "unit": "250 * max(cos, 0)",
    })
    macro = calibrate(SCORES, CORRECT, torch.tensor([9, 4, 4, 9, 9]), average="macro", bounds=(0.0, 100.0))
    assert (macro["correct"], macro["hallucinated"], macro["low"], macro["high"]) == (67.5, 45, 0, 100)
    assert json.loads(json.dumps(micro)) == micro


@pytest.mark.parametrize("correct, message", [
    (rows(True, True, True, True, True), "no hallucinated mention among 5"),
    (rows(False, False, False, False, False), "no correct mention among 5"),
])  # fmt: skip
def test_calibration_needs_both_groups(correct, message):
    with pytest.raises(ValueError, match=message):
        calibrate(SCORES, correct)


def test_calibration_errors():
    with pytest.raises(ValueError, match="no correct mention among 0"):
        calibrate(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="within the bounds"):
        calibrate(SCORES, CORRECT, bounds=(0.0, 70.0))
    with pytest.raises(ValueError, match="with `responses`"):
        calibrate(SCORES, CORRECT, average="macro")
    with pytest.raises(ValueError, match="must be"):
        calibrate(SCORES, CORRECT.long())


@pytest.mark.parametrize("options, expected", [
    # boundaries 80 and 35: the first is not above it
    (dict(), (0, 0, 0, 0, 0, -1)),
    # boundaries 72.5 and 42.5: 7.5 / 10, 3 / 10; (42 - 45) / 5, then past the low end
    (dict(margin=2.5), (1, 0.3, 0, 0, -0.6, -1)),
    # measured from the boundary: 7.5 / 7.5, .5 / 7.5; -.5 / 2.5
    (dict(margin=2.5, norm="baseline_minus_margin"), (1, 0.5 / 7.5, 0, 0, -0.2, -1)),
    # plain differences from the baselines
    (dict(margin=2.5, norm="none", limit=math.inf), (10, 3, 0, 0, -3, -15)),
    # boundaries 60 and 55: 61 is rewarded though below the baseline, (61 - 70) / 10
    (dict(margin=10, margin_mode="inward"), (1, 0.3, -0.9, 0.6, -0.6, -1)),
    (dict(margin=10, margin_mode="none"), (1, 0.3, 0, 0, -0.6, -1)),
    # 0.2 standard deviations are 1.825742: boundaries 71.83 and 43.17
    (dict(margin=0.2, margin_unit="std", limit=0.5), (0.5, 0.3, 0, 0, -0.5, -0.5)),
])  # fmt: skip
def test_rewards_by_hand(options, expected):
    """Scores 80, 73, 61, 48, 42, 30 against baselines 70 and 45 and the range 40 ... 80."""
    baselines = calibrate(SCORES, CORRECT)
    rewards = mention_rewards(double(80, 73, 61, 48, 42, 30), baselines, **options)
    torch.testing.assert_close(rewards, double(*expected), **EXACT)


def test_rewards_follow_the_scale():
    """Scores, baselines and margin times 0.4 (100 cos in place of 250 cos): the same rewards."""
    scores = double(80, 73, 61, 48, 42, 30)
    rewards = mention_rewards(scores, calibrate(SCORES, CORRECT), margin=2.5)
    smaller = mention_rewards(0.4 * scores, calibrate(0.4 * SCORES, CORRECT, unit="100 * cos"), margin=1.0)
    torch.testing.assert_close(smaller, rewards, **EXACT)


def test_reward_errors():
    baselines = calibrate(SCORES, CORRECT)
    with pytest.raises(ValueError, match="boundaries cross"):
        mention_rewards(SCORES, baselines, margin=20, margin_mode="inward")
    with pytest.raises(ValueError, match="boundaries cross"):
        mention_rewards(SCORES, calibrate(SCORES, ~CORRECT), margin=0)
    for one in (double(70), double(45)):  # every correct mention scores S_max, every hallucinated one S_min
        flat = calibrate(double(70, 70, 45, 45), rows(True, True, False, False))
        with pytest.raises(ValueError, match="leave a range of 0"):
            mention_rewards(one + (1 if one > 60 else -1), flat, margin=0)
        assert mention_rewards(one, flat, margin=0).eq(0).all()
    for options in (dict(margin_mode="up"), dict(norm="max"), dict(margin_unit="cm"), dict(margin=-1.0)):
        with pytest.raises(ValueError):
            mention_rewards(SCORES, baselines, **options)


def test_verifier_scores():
    """cos of (1, 0) with (3, 4) is 0.6, with (-1, 0) is -1: 150 and 0 at scale 250, 60 and -100 at 100."""
    words, images = double((1, 0), (1, 0)), double((3, 4), (-1, 0))
    assert verifier_scores(words, images).tolist() == pytest.approx([150, 0])
    assert verifier_scores(words, images, scale=100, clip_at_zero=False).tolist() == pytest.approx([60, -100])
    with pytest.raises(ValueError, match="mention 1"):
        verifier_scores(words, double((3, 4), (0, 0)))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        verifier_scores(words, images[:1])


def test_place_by_hand():
    """Mentions: row 0 tokens 1-2 worth 1, row 1 token 0 worth -0.5, row 1 tokens 0-3 worth 0.4."""
    rewards, where = double(1, -0.5, 0.4), [torch.tensor(x) for x in ([0, 1, 1], [1, 0, 0], [3, 1, 4])]
    last = place(rewards, *where, (2, 4))
    torch.testing.assert_close(last, double((0, 0, 1, 0), (-0.5, 0, 0, 0.4)), **EXACT)
    spread = place(rewards, *where, (2, 4), position="spread")
    torch.testing.assert_close(spread, double((0, 0.5, 0.5, 0), (-0.4, 0.1, 0.1, 0.1)), **EXACT)
    none = [torch.zeros(0, dtype=torch.long)] * 3
    assert torch.equal(place(torch.zeros(0), *none, (2, 4)), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="mention 2: tokens 0 to 4 of response 1"):
        place(rewards, *where, (2, 3))
    with pytest.raises(ValueError, match="neither last nor spread"):
        place(rewards, *where, (2, 4), position="all")


def test_fisao_is_ppo_with_token_scores():
    """Policy = reference, V = 0, lambda = 1: the advantage of a token is the sum of rewards to come."""
    where = [torch.tensor(x) for x in ([0, 0], [1, 3], [3, 4])]
    token_scores = place(double(0.8, -0.6), *where, (1, 5))
    zero, mask = torch.zeros(1, 5, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    rewards = token_rewards(zero, zero, mask, token_scores=token_scores)
    advantages, _ = gae(rewards, zero, mask, lam=1.0)
    torch.testing.assert_close(advantages, double((0.2, 0.2, 0.2, -0.6, 0)), **EXACT)


# ---- object words and their tokens -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(Path(__file__).resolve().parents[1] / "model" / "tiny" / "tokenizer.json"))


@pytest.fixture(scope="module")
def entities():
    return load_entities()


def spans(tokenizer, entities, text: str) -> list[tuple[str, str, str]]:
    """(word, entity, text of the tokens) of each mention."""
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("</s>")]
    assert decode(ids) == text
    found = mentions(ids, decode, entities)
    return [(m.word, m.entity, decode(ids[m.start : m.stop]).strip()) for m in found]


@pytest.mark.parametrize("text, expected", [
    ("There is a dog and a cat.", [("dog", "dog", "dog"), ("cat", "cat", "cat")]),
    ("Two traffic lights, hot dogs", [("traffic lights", "traffic light", "traffic lights"),
                                      ("hot dogs", "hot dog", "hot dogs")]),
    ("A Teddy-Bear! The dog's umbrella.", [("teddy bear", "teddy bear", "Teddy-Bear"), ("dog", "dog", "dog"),
                                           ("umbrella", "umbrella", "umbrella")]),
    ("Men with knives on skis", [("men", "person", "Men"), ("knives", "knife", "knives"),
                                 ("skis", "skis", "skis")]),
    ("dogma, catalogue, hot. dog", [("dog", "dog", "dog")]),
    ("a hot  dog", [("dog", "dog", "dog")]),
    ("\u00e9 dog \u00fc \u4e2d cats", [("dog", "dog", "dog"), ("cats", "cat", "cats")]),
    ("nothing here", []),
])  # fmt: skip
def test_mentions_and_their_tokens(tokenizer, entities, text, expected):
    assert spans(tokenizer, entities, text) == expected


def test_repeated_mentions(tokenizer, entities):
    text = "a dog, a cat, two dogs and a cat"
    assert [m[0] for m in spans(tokenizer, entities, text)] == ["dog", "cat", "dogs", "cat"]


def test_unfinished_letters_belong_to_the_token_that_finishes_them():
    """One byte a token: an umlaut is complete with its second byte, and the words around it stay in place."""
    text = "\u00fc dog"
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")
    assert token_ends(list(text.encode()), decode, text) == [0, 1, 2, 3, 4, 5]
    mention, = mentions(text.encode(), decode, {"dog": "dog"})
    assert (mention.start, mention.stop) == (3, 6)


def test_longest_match_first():
    table = {"hot dog": "hot dog", "dog": "dog", "dog house": "kennel", "hot dog stand": "stand"}
    assert [name for name, *_ in find("hot dog house, hot dog stand, dog house", table)] == [
        "hot dog", "hot dog stand", "dog house"]


def test_the_committed_list(entities):
    """All COCO classes are entities, plurals are there, the slips of the paper's Table 6 are not."""
    lines = (Path(__file__).resolve().parents[1] / "metrics" / "chair_synonyms.txt").read_text().splitlines()
    classes = [line.partition(",")[0] for line in lines]
    assert [name for name in classes if entities.get(name) != name] == []
    expected = {"sofa": "couch", "couches": "couch", "buses": "bus", "mice": "mouse", "people": "person",
                "tvs": "tv", "bikes": "bicycle", "wineglasses": "wine glass", "bagels": "bagel"}
    assert {word: entities[word] for word in expected} == expected
    slips = "greaser wetback purge chuck moderate lead chairman clash shock lolly lucre soul individual grip"
    assert not {"can", *slips.split()} & set(entities)
    assert all(word == " ".join(re.findall(r"[a-z0-9]+", word)) and entity for word, entity in entities.items())
    assert len(entities) == len(ENTITIES.read_text().splitlines()) - 2  # none is there twice


