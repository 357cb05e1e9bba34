# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""SymMPO: symmetric multimodal preference optimisation.

Mitigating Hallucination Through Theory-Consistent Symmetric Multimodal Preference Optimization.
W. Liu, X. Song, J. Li, Y. Wei, N. Zheng, J. Yin, L. Nie, NeurIPS 2025, arXiv 2506.11712.

    r(v, y)  = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                implicit reward
    Delta    = r(v, y_w) - r(v, y_w'),  Delta' = r(v', y_w') - r(v', y_w)
    L_DPOm   = -log sigma(r(v, y_w) - r(v, y_l))
    L_Pair   = -log sigma(Delta) - log sigma(Delta')
    L_Margin = (Delta - Delta')^2
    L_AncPO  = -log sigma(r(v, y_w) - delta) - log sigma(r(v', y_w') - delta)
    L_SymMPO = L_DPOm + lambda L_Pair + gamma L_Margin + eta L_AncPO

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function, v' an image
that resembles v and y_w' the response to x that is right for v'. Each image prefers its own response over the other's
(L_Pair), and by the same margin (L_Margin).

Why not compare two images under one response? The reward whose optimal policy is pi is r(v, y) + beta log Z(x, v),
with Z(x, v) what exp(reward / beta) pi_ref sums up to over all responses. Between two responses to one image Z
cancels. A margin r(v, y_w) - r(v', y_w), as in rDPO, mDPO or AdaViP, lacks beta [log Z(x, v) - log Z(x, v')], which
these losses take for 0. Here Z cancels in every margin; only the anchors, which are no margins, leave it out.
If policy and reference agree, L_SymMPO = (1 + 2 lambda + 2 eta) ln 2 = 4 ln 2 (at delta = 0).

    symbol                      argument                          shape
    log pi(y_w | x, v)          policy_chosen_logps               (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)          policy_rejected_logps             (B,)
    log pi(y_w' | x, v)         policy_other_response_logps       (B,)
    log pi(y_w | x, v')         policy_other_image_logps          (B,)
    log pi(y_w' | x, v')        policy_other_logps                (B,)
    log pi_ref(y_w | x, v)      reference_chosen_logps            (B,)
    log pi_ref(y_l | x, v)      reference_rejected_logps          (B,)
    log pi_ref(y_w' | x, v)     reference_other_response_logps    (B,)
    log pi_ref(y_w | x, v')     reference_other_image_logps       (B,)
    log pi_ref(y_w' | x, v')    reference_other_logps             (B,)
    beta                        beta                              float  strength of the pull towards the reference
    delta                       delta                             float  the anchor, a reward
    lambda                      pair_weight                       float  weight of L_Pair
    gamma                       margin_weight                     float  weight of L_Margin
    eta                         anchor_weight                     float  weight of L_AncPO

Departures. The released trainer was read; of the paper its abstract and a summary of its equations and settings.
- From the paper: none known; the defaults are its settings.
- From the released code: it squares the difference of the log-ratios, not of the rewards, which are beta times as
  large. So its weight 0.0001 is margin_weight = 0.0001 / beta^2 here, 0.01 at its beta of 0.1. The second anchor has
  a beta of its own there, set to the same 0.1.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "other_response": dict(image="image", response="rejected_image_response"),
    "other_image": dict(image="rejected_image", response="chosen"),
    "other": dict(image="rejected_image", response="rejected_image_response"),
}


def symmpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_other_response_logps: torch.Tensor,
    policy_other_image_logps: torch.Tensor,
    policy_other_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_other_response_logps: torch.Tensor,
    reference_other_image_logps: torch.Tensor,
    reference_other_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
    pair_weight: float = 0.5,
    margin_weight: float = 0.0001,
    anchor_weight: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected one, and of two similar images for each the response that fits it.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/image` = Delta and `margin/other` = Delta', with `accuracy/image` and `accuracy/other`,
    `accuracy/anchor` = share of the rewards of chosen and other that are above delta.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_other_response_logps,
                          policy_other_image_logps, policy_other_logps])  # (5, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_other_response_logps,
                             reference_other_image_logps, reference_other_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (5, B)
    chosen, rejected, other_response, other_image, other = rewards
    margins = torch.stack([chosen - other_response, other - other_image])  # (2, B)  Delta, Delta'
    anchored = torch.stack([chosen, other]) - delta  # (2, B)
    response_loss = -F.logsigmoid(chosen - rejected)  # (B,)  DPO
    pair_loss = -F.logsigmoid(margins).sum(0)  # (B,)  each image and its own response
    margin_loss = (margins[0] - margins[1]).square()  # (B,)
    anchor_loss = -F.logsigmoid(anchored).sum(0)  # (B,)
    loss = (response_loss + pair_weight * pair_loss + margin_weight * margin_loss
            + anchor_weight * anchor_loss)  # (B,)  https://arxiv.org/abs/2506.11712

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/other_response": other_response,
        "reward/other_image": other_image,
        "reward/other": other,
        "margin": chosen - rejected,
        "margin/image": margins[0],
        "margin/other": margins[1],
        "accuracy": (chosen > rejected).float(),
        "accuracy/image": (margins[0] > 0).float(),
        "accuracy/other": (margins[1] > 0).float(),
        "accuracy/anchor": (anchored > 0).float().mean(0),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = symmpo_loss(*[zero] * 10)
    torch.testing.assert_close(start, torch.tensor([4 * math.log(2)]))
    # Log-ratios 20, -10, 10, -20, 30 at beta 0.1 are rewards 2, -1, 1, -2, 3: margin 3, Delta 1, Delta' 5, and 2 and 3
    # above the anchor.
    reference = [zero - 50 - 5 * i for i in range(5)]
    loss, _ = symmpo_loss(*(r + ratio for r, ratio in zip(reference, (20, -10, 10, -20, 30))), *reference)
    costs = [math.log(1 + math.exp(-margin)) for margin in (3, 1, 5, 2, 3)]
    expected = costs[0] + 0.5 * (costs[1] + costs[2]) + 0.0001 * (1 - 5) ** 2 + costs[3] + costs[4]
    torch.testing.assert_close(loss, torch.tensor([expected]))
    print(f"symmpo ok: starts at {start.item():.6f} = 4 ln 2, margins 3, 1 and 5 and anchors 2 and 3 give"
          f" {loss.item():.6f}")
