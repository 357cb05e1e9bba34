# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""RLOO: REINFORCE with a leave-one-out baseline; a whole response is one action.

Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs.
A. Ahmadian, C. Cremer, M. Galle, M. Fadaee, J. Kreutzer, O. Pietquin, A. Ustun, S. Hooker, ACL 2024,
arXiv 2402.14740. Used for vision-language models in Understanding Alignment in Multimodal LLMs,
E. Amirloo et al., 2024, arXiv 2407.02477 (k = 4, beta = 0.4, standardised rewards).

    R_i    = (s_i - m) / d - beta [log pi_old(y_i | x, v) - log pi_ref(y_i | x, v)]     reward, `penalised`
    A_i    = R_i - 1 / (k - 1) sum_{j != i} R_j                                 advantage, `leave_one_out`
    L_RLOO = -A_i log pi(y_i | x, v)                                         clip = 0
           = max(-A_i rho_i, -A_i clip(rho_i, 1 - e, 1 + e)),  rho_i = pi(y_i) / pi_old(y_i)   clip > 0

with y_1 ... y_k sampled from pi_old for one prompt x and image v, s_i the score of y_i, m and d mean and
standard deviation of scores, measured once before training and then fixed. At the first update rho_i = 1
and both forms have the same gradient; more updates on the same samples need the second. The advantages of a
prompt sum to 0, and with equal rewards they are all 0: such a prompt teaches nothing.

    symbol                    argument                  shape
    log pi(y_i | x, v)        policy_sampled_logps      (B,)   sum over the response tokens, EOS included
    log pi_old(y_i | x, v)    old_sampled_logps         (B,)   computed by the training forward, no gradient
    log pi_ref(y_i | x, v)    reference_sampled_logps   (B,)
    s_i                       scores                    (B,)
    R_i, A_i                  rewards, advantages       (B,)
    which prompt              prompts                   (B,)   long, another number for each prompt
    k                         k                         int
    beta                      kl_coef                   float  weight of the KL penalty in the reward
    m, d                      mean, std                 float
    e                         clip                      float  how far the ratio counts; 0 for REINFORCE

Layout: the k responses of a prompt are next to each other, B = M k, response i belongs to prompt i // k.
The other common layout (all prompts, k times over) would silently compare responses to different prompts,
hence `prompts`: `leave_one_out` refuses rows that mix them.

Take the old log-probs from the training forward, not from generation: summed over a response their small
differences (bf16, another kernel) grow to ratios far from 1, which the clip then cuts off.

Departures
- From the paper: the clipped form, which is that of TRL's RLOOTrainer (epsilon 0.2 there), and the fixed
  standardisation, which is the second paper's.
- From TRL: there the batch's advantages may be normalised and responses without a score are left out; here
  neither, a score that is not finite is refused.
"""

import math

import torch


def penalised(
    scores: torch.Tensor,
    old_sampled_logps: torch.Tensor,
    reference_sampled_logps: torch.Tensor,
    *,
    kl_coef: float = 0.05,
    mean: float = 0.0,
    std: float = 1.0,
) -> torch.Tensor:
    """Standardised score minus the KL penalty, (B,), no gradient.

    Args: (B,) each, log-probs summed over tokens. `mean`, `std`: of scores, measured once before training.
    The estimate of the KL is k1, log pi_old - log pi_ref of the sample: unbiased, sometimes negative.
    Raises ValueError on wrong shapes, a score that is not finite or std <= 0.
    """
    if scores.ndim != 1 or not scores.shape == old_sampled_logps.shape == reference_sampled_logps.shape:
        raise ValueError(f"scores {list(scores.shape)} and log-probs {list(old_sampled_logps.shape)},"
                         f" {list(reference_sampled_logps.shape)} must all be (B,)")
    if not scores.isfinite().all():
        raise ValueError(f"score of response {(~scores.isfinite()).nonzero()[0].item()} is not finite")
    if not std > 0:
        raise ValueError(f"std of the scores must be positive, not {std}")
    kl = _fp32(old_sampled_logps) - _fp32(reference_sampled_logps)  # (B,)
    return ((_fp32(scores) - mean) / std - kl_coef * kl).detach()


def leave_one_out(rewards: torch.Tensor, prompts: torch.Tensor, *, k: int) -> torch.Tensor:
    """Each reward minus the mean of the other k - 1 responses to the same prompt, (B,), no gradient.

    Args: rewards (B,) and prompt numbers (B,), k responses of a prompt next to each other.
    Raises ValueError if k < 2, B is no multiple of k, or k neighbours are not responses to one prompt.
    """
    if k < 2:
        raise ValueError(f"leave-one-out needs k >= 2 responses a prompt, not {k}")
    if rewards.ndim != 1 or rewards.shape != prompts.shape or len(rewards) % k:
        raise ValueError(f"rewards {list(rewards.shape)} and prompts {list(prompts.shape)} must both be (B,)"
                         f" with B a multiple of k = {k}")
    groups = prompts.view(-1, k)
    if mixed := (groups != groups[:, :1]).any(-1).nonzero().flatten().tolist():
        first = mixed[0] * k
        raise ValueError(f"responses {first} to {first + k - 1} belong to several prompts,"
                         f" {groups[mixed[0]].tolist()}: put the k responses of a prompt next to each other")
    if repeated := len(groups) - len(groups[:, 0].unique()):
        raise ValueError(f"{repeated} prompts occur in more than one group of k = {k}: is k right?")
    grouped = _fp32(rewards.detach()).view(-1, k)  # (M, k)
    others = (grouped.sum(-1, keepdim=True) - grouped) / (k - 1)
    return (grouped - others).flatten()  # (B,)


def rloo_loss(
    policy_sampled_logps: torch.Tensor,
    old_sampled_logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """REINFORCE on the log-prob of whole responses, or with clip > 0 PPO's surrogate on their ratio.

    Args: (B,) each; gradient flows through the policy's.
    Returns: loss (B,); metrics, each (B,) and detached: `logps`, `ratio`, `clip_fraction` (1.0 where the clip
    takes the gradient away), `approx_kl` = log pi_old - log pi of the sample.
    Raises ValueError if the shapes differ or clip < 0.
    """
    if policy_sampled_logps.ndim != 1 or not (
        policy_sampled_logps.shape == old_sampled_logps.shape == advantages.shape
    ):
        raise ValueError(f"log-probs and advantages must all be (B,), not {list(policy_sampled_logps.shape)},"
                         f" {list(old_sampled_logps.shape)} and {list(advantages.shape)}")
    if clip < 0:
        raise ValueError(f"clip must be >= 0, not {clip}")

    logps, old, advantages = _fp32(policy_sampled_logps), _fp32(old_sampled_logps), _fp32(advantages)
    old, advantages = old.detach(), advantages.detach()
    ratio = (logps - old).exp()  # (B,)
    if clip:
        plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
        loss = torch.maximum(plain, clipped)
        cut = clipped > plain
    else:
        loss = -advantages * logps  # (B,)
        cut = torch.zeros_like(loss)

    metrics = {
        "logps": logps,
        "ratio": ratio,
        "clip_fraction": cut.to(loss.dtype),
        "approx_kl": old - logps,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # at least: sums over responses are large


if __name__ == "__main__":
    # Scores (4 - 1) / 2, (4 - 1) / 2, (12 - 1) / 2, (16 - 1) / 2, minus 0.05 times 10, -10, 10, -10 nats.
    old, reference = torch.full((4,), -20.0), torch.tensor([-30.0, -10.0, -30.0, -10.0])
    rewards = penalised(torch.tensor([4.0, 4.0, 12.0, 16.0]), old, reference, mean=1.0, std=2.0)
    torch.testing.assert_close(rewards, torch.tensor([1.0, 2.0, 5.0, 8.0]))
    # Rewards 1, 2, 5, 8: 1 - 15/3, 2 - 14/3, 5 - 11/3, 8 - 8/3.
    advantages = leave_one_out(rewards, torch.zeros(4, dtype=torch.long), k=4)
    torch.testing.assert_close(advantages, torch.tensor([-4.0, -8 / 3, 4 / 3, 16 / 3]))
    gradients = []
    for clip in (0.0, 0.2):
        logps = old.clone().requires_grad_()
        rloo_loss(logps, old, advantages, clip=clip)[0].sum().backward()
        gradients.append(logps.grad)
    torch.testing.assert_close(gradients[0], -advantages)
    torch.testing.assert_close(gradients[1], -advantages)
    # A response twice as likely: what is good counts 1.2 times, what is bad twice.
    moved, _ = rloo_loss(old[:2] + math.log(2), old[:2], torch.tensor([1.0, -1.0]), clip=0.2)
    torch.testing.assert_close(moved, torch.tensor([-1.2, 2.0]))
    print("rloo ok: rewards 1, 2, 5, 8 give advantages -4, -8/3, 4/3, 16/3; one gradient in both forms")
