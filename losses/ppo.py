# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""PPO: proximal policy optimisation of a language model, one token one action.

Proximal Policy Optimization Algorithms.
J. Schulman, F. Wolski, P. Dhariwal, A. Radford, O. Klimov, 2017, arXiv 1707.06347.
Rewards and KL controller: Fine-Tuning Language Models from Human Preferences, D. M. Ziegler et al., 2019,
arXiv 1909.08593. Advantages: generalised advantage estimation, J. Schulman et al., 2016, arXiv 1506.02438.

    r_t    = -beta [log pi_old(y_t) - log pi_ref(y_t)] + s_t + 1[t = T] R       shaped reward, `token_rewards`
    d_t    = r_t + gamma V_t+1 - V_t,  V_T+1 = 0
    A_t    = d_t + gamma lambda A_t+1,  G_t = A_t + V_t                            advantage and return, `gae`
    A_t   <- (A_t - mean A) / std A                               over the real tokens of the batch, `whiten`
    rho_t  = pi(y_t) / pi_old(y_t)
    L_pi   = mean_t max(-A_t rho_t, -A_t clip(rho_t, 1 - e, 1 + e))                                 `ppo_loss`
    L_V    = 1/2 mean_t max((V_t - G_t)^2, (V_t^old + clip(V_t - V_t^old, -e_V, e_V) - G_t)^2)
    L_PPO  = L_pi + c_V L_V

with y a response sampled from pi_old for prompt x and image v (left out above), T its last real token, R the
score of the response and s_t that of a token. pi_old is the policy at sampling time, pi_ref the frozen start.
The KL term is part of the reward and is not differentiated. On the first update pi = pi_old, all rho_t are 1
and the gradient of L_pi is that of -mean_t A_t log pi(y_t): plain policy gradient.

    symbol               argument                         shape
    log pi(y_t)          policy_sampled_token_logps       (B, T)   any value where the mask is False
    log pi_old(y_t)      old_sampled_token_logps          (B, T)   by the training forward, no gradient
    log pi_ref(y_t)      reference_sampled_token_logps    (B, T)
    t is a token of y    sampled_mask                     (B, T)   bool, one unbroken stretch, with EOS
    R                    scores                           (B,)
    s_t                  token_scores                     (B, T)   0 where a token has none
    V_t, V_t^old         values, old_values               (B, T)   of the state before y_t, now and then
    A_t, G_t             advantages, returns              (B, T)   G from A before whitening
    tokens a response    mean_tokens                      ()       see below
    beta                 kl_coef                          float    weight of the KL penalty; `adapt_kl` moves it
    p                    missing_eos_penalty              float    taken off the score of a response without EOS
    gamma                gamma                            float    discount of later rewards
    lambda               lam                              float    of GAE: 0 looks one token ahead, 1 to the end
    e                    clip                             float    how far the ratio counts; inf: without bound
    e_V                  value_clip                       float    how far a value may move; inf: without bound
    c_V                  value_coef                       float    weight of the value loss

The values come from a linear layer of width 1 on the last states, weights and bias 0 at the start: then
V = 0, and with lambda = 1 the advantage of a token is the reward still to come.

Normalisation. PPO takes means over the tokens of the batch, not over responses. `ppo_loss` returns (B,) with

    loss_i = (sum of the token losses of response i) / (tokens of the batch / B)

so that the mean over i is exactly the token mean. When a batch is cut into micro-batches or spread over
processes, pass `mean_tokens` = tokens / responses of the whole batch: the mean of the parts' means is then
still the token mean of the whole. Metrics are divided the same way.

Several updates on one sample: compute rewards, advantages and returns once from the old log-probs and values,
then call `ppo_loss` each time with fresh `policy_sampled_token_logps` and `values`. Dropout must be off in
all passes, and sampling must be plain (temperature as in the log-probs, no top-k, no top-p): otherwise rho_t
is not 1 at the start, or pi_old is not what was sampled from.

Departures
- From the papers: the KL terms are per token, the value loss is clipped as well, no entropy bonus.
- From TRL's PPO: values exist for exactly the response tokens (theirs extend one position further), padded
  log-probs are 0 (theirs 1), the reported KL is the k3 estimate (theirs k2).
- From LLaVA-RLHF: means, whitening and value targets leave padding out, the score is at the last real
  token (there on padding), and the KL estimate in the reward is not cut at 0.
"""

import math
from typing import Literal

import torch


def kl_estimate(
    logps: torch.Tensor,
    reference_logps: torch.Tensor,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> torch.Tensor:
    """KL(p || p_ref) estimated from samples of p, elementwise, in nats; with d = log p - log p_ref

        k1 = d              unbiased, may be negative: the one for rewards
        k2 = d^2 / 2        small variance, biased
        k3 = e^-d - 1 + d   unbiased and never negative: the one to report

    J. Schulman, Approximating KL Divergence, 2020. Raises ValueError for another name.
    """
    d = logps - reference_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"KL estimator {estimator!r} is none of k1, k2, k3")


def token_rewards(
    old_sampled_token_logps: torch.Tensor,
    reference_sampled_token_logps: torch.Tensor,
    sampled_mask: torch.Tensor,
    scores: torch.Tensor | None = None,
    token_scores: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
    *,
    kl_coef: float = 0.2,
    missing_eos_penalty: float = 0.0,
) -> torch.Tensor:
    """Shaped reward r_t of every token, (B, T), no gradient, 0 on padding.

    Args: token log-probs and mask (B, T); `scores` (B,) are added at the last real token, `token_scores`
    (B, T) where they are. `ended` (B,) bool: the response stopped by itself; where it did not,
    `missing_eos_penalty` (>= 0) is taken off at the last real token.
    Raises ValueError on wrong shapes, a mask that is not an unbroken stretch, or a penalty without `ended`.
    """
    _check_mask(sampled_mask)
    _check_like(sampled_mask, old_sampled_token_logps=old_sampled_token_logps,
                reference_sampled_token_logps=reference_sampled_token_logps, token_scores=token_scores)
    _check_like(sampled_mask[:, 0], scores=scores, ended=ended)
    if missing_eos_penalty < 0 or (missing_eos_penalty > 0 and ended is None):
        raise ValueError("missing_eos_penalty must be >= 0 and needs `ended`, which says what stopped")

    kl = kl_estimate(_fp32(old_sampled_token_logps), _fp32(reference_sampled_token_logps))
    rewards = -kl_coef * kl.detach()  # (B, T)
    if token_scores is not None:
        rewards = rewards + token_scores.detach()
    terminal = torch.zeros_like(rewards[:, 0]) if scores is None else scores.detach().to(rewards.dtype)
    if missing_eos_penalty:
        terminal = terminal - missing_eos_penalty * ~ended
    rewards = rewards.masked_fill(~sampled_mask, 0.0)
    return rewards + torch.where(_last(sampled_mask), terminal[:, None], 0.0)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    sampled_mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages A_t and returns A_t + V_t, (B, T) each, no gradient, 0 on padding. arXiv 1506.02438, Eq. 16.

    Args: rewards, values (B, T) of the states before each token, mask (B, T). The state after the last real
    token is worth 0. Whiten the advantages afterwards; the returns belong to the unwhitened ones.
    Raises ValueError on wrong shapes or a mask that is not an unbroken stretch.
    """
    _check_mask(sampled_mask)
    _check_like(sampled_mask, rewards=rewards, values=values)
    rewards, values = (_fp32(x.detach()).masked_fill(~sampled_mask, 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    after = carry = torch.zeros_like(rewards[:, 0])  # (B,)  V_t+1 and A_t+1, both 0 after the last token
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        carry = (delta + gamma * lam * carry).masked_fill(~sampled_mask[:, t], 0.0)
        after = values[:, t]
        advantages[:, t] = carry
    return advantages, advantages + values


def whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> torch.Tensor:
    """Mean 0 and variance 1 (unbiased) over the entries where the mask is True; 0 elsewhere. Shapes (B, T).

    `shift_mean=False` only scales, for rewards. Advantages of several processes: gather x and mask first.
    Raises ValueError with fewer than two entries.
    """
    _check_like(mask, x=x)
    chosen = _fp32(x)[mask]
    if len(chosen) < 2:
        raise ValueError(f"whitening needs at least two tokens, found {len(chosen)}")
    variance, mean = torch.var_mean(chosen)
    whitened = (_fp32(x) - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def adapt_kl(kl_coef: float, kl: float, n: int, *, target: float = 6.0, horizon: float = 10_000.0) -> float:
    """KL coefficient after n more responses with a mean KL of `kl` nats each. arXiv 1909.08593, Section 2.2.

    It grows where kl > target and shrinks where kl < target, by at most 20 % per `horizon` responses.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)


def ppo_loss(
    policy_sampled_token_logps: torch.Tensor,
    old_sampled_token_logps: torch.Tensor,
    advantages: torch.Tensor,
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    sampled_mask: torch.Tensor,
    mean_tokens: torch.Tensor | None = None,
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate plus clipped value loss, as shares whose mean over the batch is the mean over tokens.

    Args: (B, T) each; gradient flows through `policy_sampled_token_logps` and `values`. `mean_tokens`
    (scalar): tokens / responses of the whole batch where this is a part of it; left out, of this batch.
    Returns: loss (B,); metrics, each (B,) and detached, with token means as batch means: `policy_loss`,
    `value_loss` (before value_coef), `ratio`, `clip_fraction`, `value_clip_fraction` and `approx_kl`, the k3
    estimate of KL(pi_old || pi).
    Raises ValueError if shapes differ, the mask is not boolean or not an unbroken stretch.
    """
    _check_mask(sampled_mask)
    _check_like(sampled_mask, policy_sampled_token_logps=policy_sampled_token_logps,
                old_sampled_token_logps=old_sampled_token_logps, advantages=advantages, values=values,
                old_values=old_values, returns=returns)
    # padding is overwritten before the exponential, not multiplied by 0 after it: 0 * inf would be nan
    logps, values = (_fp32(x).masked_fill(~sampled_mask, 0.0) for x in (policy_sampled_token_logps, values))
    old, advantages, old_values, returns = (
        _fp32(x.detach()).masked_fill(~sampled_mask, 0.0)
        for x in (old_sampled_token_logps, advantages, old_values, returns)
    )

    ratio = (logps - old).exp()  # (B, T)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    policy_loss = torch.maximum(plain, clipped)  # (B, T)  Eq. 7, https://arxiv.org/abs/1707.06347

    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    squares, near_squares = (values - returns).square(), (near - returns).square()
    value_loss = torch.maximum(squares, near_squares) / 2  # (B, T)

    if mean_tokens is None:
        mean_tokens = sampled_mask.sum().to(logps.dtype) / len(sampled_mask)

    def share(x: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B,), the batch mean of which is the token mean
        return x.to(logps.dtype).masked_fill(~sampled_mask, 0.0).sum(-1) / mean_tokens

    loss = share(policy_loss + value_coef * value_loss)
    metrics = {
        "policy_loss": share(policy_loss),
        "value_loss": share(value_loss),
        "ratio": share(ratio),
        "clip_fraction": share(clipped > plain),
        "value_clip_fraction": share(near_squares > squares),
        "approx_kl": share(kl_estimate(old, logps, "k3")),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # at least


def _last(mask: torch.Tensor) -> torch.Tensor:
    """True at the last True of each row, (B, T)."""
    remaining = mask.flip(-1).cumsum(-1).flip(-1)  # tokens from here to the end
    return mask & (remaining == 1)


def _check_mask(mask: torch.Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"sampled_mask must be bool (B, T), not {mask.dtype} {list(mask.shape)}")
    starts = mask[:, 0].int() + (mask[:, 1:] & ~mask[:, :-1]).sum(-1)  # (B,)
    if bad := (starts != 1).nonzero().flatten().tolist():
        raise ValueError(f"sampled_mask: the tokens of row {bad[0]} are not one unbroken stretch")


def _check_like(mask: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != mask.shape:
            raise ValueError(f"{name} must be {list(mask.shape)} like the mask, not {list(tensor.shape)}")


if __name__ == "__main__":
    mask = torch.tensor([[True, True, True, True]])
    old, reference = torch.tensor([[-1.0, -2.0, -1.5, -3.0]]), torch.tensor([[-1.5, -2.0, -2.5, -3.0]])
    # -0.2 [0.5, 0, 1, 0] for the KL, 0.5 for the second token, 1 for the response at the last one.
    rewards = token_rewards(old, reference, mask, torch.tensor([1.0]), torch.tensor([[0.0, 0.5, 0.0, 0.0]]))
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.5, -0.2, 1.0]]))
    values = torch.zeros(1, 4)
    advantages, returns = gae(rewards, values, mask)  # 1.0, -.2 + .95, .5 + .95 * .75, -.1 + .95 * 1.2125
    torch.testing.assert_close(advantages, torch.tensor([[1.051875, 1.2125, 0.75, 1.0]]))
    # The policy has not moved: every ratio is 1, the loss is -mean A + 0.1 mean(G^2) / 2.
    logps = old.clone().requires_grad_()
    loss, metrics = ppo_loss(logps, old, advantages, values, values, returns, mask)
    torch.testing.assert_close(loss.mean(), -advantages.mean() + 0.05 * returns.square().mean())
    loss.mean().backward()
    torch.testing.assert_close(logps.grad, -advantages / 4)
    # Every token twice as likely: what is good counts 1.2 times, what is bad twice.
    for advantage, expected in ((1.0, -1.2), (-1.0, 2.0)):
        moved, _ = ppo_loss(old + math.log(2), old, values + advantage, values, values, values, mask)
        torch.testing.assert_close(moved, torch.tensor([expected]))
    print(f"ppo ok: starts at ratio {metrics['ratio'].item():.6f} with the gradient of plain policy gradient")
