# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""LPOI: listwise preference optimisation over images that show less and less of an object.

LPOI: Listwise Preference Optimization for Vision Language Models.
F. Pesaran Zadeh, Y. Oh, G. Kim, ACL 2025, arXiv 2505.21061.

    r(v, y)    = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                              implicit reward
    S_k        = r(v_k, y_w),  k = 1 .. L                                                    v_1 = v, L = 5
    L_DPO      = -log sigma(S_1 - r(v, y_l))
    L_Anchor   = -log sigma(S_1 - delta)
    L_Listwise = -log prod_k exp(S_k) / sum_{j >= k} exp(S_j)
               = sum_{k < L} -log sigma(S_k - log sum_{j > k} exp(S_j))
    L_LPOI     = L_DPO + L_Anchor + L_Listwise

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function and v_k
the image of which (k - 1) / (L - 1) of an object is hidden. L_Listwise is the Plackett-Luce probability of the whole
ranking v_1 > ... > v_L; AdaViP's loss is the first place of such a ranking, over (v, y_w), (v, y_l) and (v_L, y_w).
Its gradient with respect to S_k is sum_{i <= k} P(k | i) - 1, with P(k | i) = exp(S_k) / sum_{j >= i} exp(S_j) the
probability that v_k takes place i where v_i .. v_L are left. The images differ under one response, so that the
rewards leave out beta log Z(x, v_k), one number for each place (arXiv 2506.11712).
If policy and reference agree, L_LPOI = 2 ln 2 + ln L! = ln 480 (at delta = 0).

    symbol                     argument                     shape
    log pi(y_w | x, v)         policy_chosen_logps          (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)         policy_rejected_logps        (B,)
    log pi(y_w | x, v_2)       policy_hidden25_logps        (B,)
    log pi(y_w | x, v_3)       policy_hidden50_logps        (B,)
    log pi(y_w | x, v_4)       policy_hidden75_logps        (B,)
    log pi(y_w | x, v_5)       policy_hidden100_logps       (B,)
    log pi_ref(y_w | x, v)     reference_chosen_logps       (B,)
    log pi_ref(y_l | x, v)     reference_rejected_logps     (B,)
    log pi_ref(y_w | x, v_2)   reference_hidden25_logps     (B,)
    log pi_ref(y_w | x, v_3)   reference_hidden50_logps     (B,)
    log pi_ref(y_w | x, v_4)   reference_hidden75_logps     (B,)
    log pi_ref(y_w | x, v_5)   reference_hidden100_logps    (B,)
    beta                       beta                         float  strength of the pull towards the reference
    delta                      delta                        float  the anchor, a reward; 0 in the released code

Departures. The released trainer was read; of the paper its abstract and others' summaries of its equations.
- From the paper: it covers the box of a detected object with a flat patch, from the sides inwards, circles it in
  red, and lets a VLM confirm that y_w has become wrong. Here the object is removed and its place filled (AdaViP's
  pairs), and hidden=s takes the left share s of what changed from that image (data/corrupt.py, reconstructed).
- From the released code: it exponentiates the rewards, which overflows, before it takes logarithms; and it scores
  (v, y_w) twice, once for the text and once for the list, which differ by the dropout. Here it is scored once.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "hidden25": dict(image="image", response="chosen", hidden=0.25),
    "hidden50": dict(image="image", response="chosen", hidden=0.5),
    "hidden75": dict(image="image", response="chosen", hidden=0.75),
    "hidden100": dict(image="rejected_image", response="chosen"),
}


def lpoi_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_hidden25_logps: torch.Tensor,
    policy_hidden50_logps: torch.Tensor,
    policy_hidden75_logps: torch.Tensor,
    policy_hidden100_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_hidden25_logps: torch.Tensor,
    reference_hidden50_logps: torch.Tensor,
    reference_hidden75_logps: torch.Tensor,
    reference_hidden100_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected one, anchor it, and rank its images by what they still show.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/hidden100` and `accuracy/hidden100` the same for chosen and hidden100,
    `accuracy/anchor` = 1.0 where the chosen reward is above delta,
    `accuracy/ranking` = share of the images whose reward is above that of the next one.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_hidden25_logps, policy_hidden50_logps,
                          policy_hidden75_logps, policy_hidden100_logps])  # (6, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_hidden25_logps,
                             reference_hidden50_logps, reference_hidden75_logps, reference_hidden100_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (6, B)
    chosen, rejected, *hidden = rewards
    ranking = torch.stack([chosen, *hidden])  # (L, B)  S_1 .. S_L
    later = ranking.flip(0).logcumsumexp(0).flip(0)[1:]  # (L - 1, B)  log sum_{j > k} exp(S_j)
    response_loss = -F.logsigmoid(chosen - rejected)  # (B,)  DPO
    anchor_loss = -F.logsigmoid(chosen - delta)  # (B,)
    image_loss = -F.logsigmoid(ranking[:-1] - later).sum(0)  # (B,)  Plackett-Luce
    loss = response_loss + anchor_loss + image_loss  # (B,)  https://arxiv.org/abs/2505.21061

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        **{f"reward/hidden{share}": reward for share, reward in zip((25, 50, 75, 100), hidden)},
        "margin": chosen - rejected,
        "margin/hidden100": chosen - hidden[-1],
        "accuracy": (chosen > rejected).float(),
        "accuracy/hidden100": (chosen > hidden[-1]).float(),
        "accuracy/anchor": (chosen > delta).float(),
        "accuracy/ranking": (ranking[:-1] > ranking[1:]).float().mean(0),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = lpoi_loss(*[zero] * 12)
    torch.testing.assert_close(start, torch.tensor([math.log(480)]))
    # Rewards at beta 0.1: the rejected response -1; the images ln 8, ln 4, ln 2, 0 and 0, so that the best of those
    # left always has half of the sum: 8 of 8 + 4 + 2 + 1 + 1, 4 of 8, 2 of 4, 1 of 2.
    logs = [10 * math.log(2) * power for power in (3, 2, 1, 0, 0)]
    reference = [zero - 50 - 5 * i for i in range(6)]
    loss, _ = lpoi_loss(*(r + ratio for r, ratio in zip(reference, [logs[0], -10, *logs[1:]])), *reference)
    expected = math.log(1 + math.exp(-1) / 8) + math.log(1 + 1 / 8) + 4 * math.log(2)
    torch.testing.assert_close(loss, torch.tensor([expected]))
    print(f"lpoi ok: starts at {start.item():.6f} = ln 480,"
          f" halves at every place give {loss.item():.6f} = ln(1 + e^-1 / 8) + ln(9 / 8) + 4 ln 2")
