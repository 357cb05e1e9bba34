# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""mDPO: conditional preference optimisation for multimodal models.

mDPO: Conditional Preference Optimization for Multimodal Large Language Models.
F. Wang, W. Zhou, J. Y. Huang, N. Xu, S. Zhang, H. Poon, M. Chen, EMNLP 2024, arXiv 2406.11839.

    r(v, y)  = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                implicit reward
    L_DPOm   = -log sigma(r(v, y_w) - r(v, y_l))                                                 Section 2.1
    L_CoPO   = -log sigma(r(v, y_w) - r(v_l, y_w))                                               Section 3.1
    L_AncPO  = -log sigma(r(v, y_w) - delta)                                                     Section 3.2
    L_mDPO   = L_DPOm + L_CoPO + L_AncPO                                                         Section 3.2

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function and
v_l a random crop of less than a fifth of v. The first term is DPO; the second prefers the image; the third
keeps the reward of the chosen response above the anchor delta, since the differences can grow while it falls.
DPO's true reward is r(v, y) + beta log Z(x, v), and only L_DPOm compares responses under one Z (SymMPO, arXiv
2506.11712). beta log Z(x, v) is the soft value of the image, beta log E_ref exp(reward / beta), and r an advantage over
it: L_CoPO asks that y_w exceeds the value of v by more than that of v_l, and delta bounds an advantage, not a reward.
If policy and reference agree, L_mDPO = 3 ln 2 (at delta = 0).

    symbol                     argument                   shape
    log pi(y_w | x, v)         policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)         policy_rejected_logps      (B,)
    log pi(y_w | x, v_l)       policy_cropped_logps       (B,)
    log pi_ref(y_w | x, v)     reference_chosen_logps     (B,)
    log pi_ref(y_l | x, v)     reference_rejected_logps   (B,)
    log pi_ref(y_w | x, v_l)   reference_cropped_logps    (B,)
    beta                       beta                       float  strength of the pull towards the reference
    delta                      delta                      float  the anchor, a reward

Departures
- From the paper: none.
- From the released code: it draws the crop inside the forward pass, so policy and reference score y_w under
  two different crops and the second reward compares two images. Here view="crop" is one crop a sample,
  drawn from the sample's own seed, and both models see it.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "cropped": dict(image="image", response="chosen", view="crop"),
}


def mdpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_cropped_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_cropped_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected one and its image over a crop, and anchor its reward.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/cropped` and `accuracy/cropped` the same for chosen and cropped,
    `accuracy/anchor` = 1.0 where the chosen reward is above delta.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_cropped_logps])  # (3, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_cropped_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (3, B)
    chosen, rejected, cropped = rewards
    response_loss = -F.logsigmoid(chosen - rejected)  # (B,)  DPO
    image_loss = -F.logsigmoid(chosen - cropped)  # (B,)  conditional preference
    anchor_loss = -F.logsigmoid(chosen - delta)  # (B,)
    loss = response_loss + image_loss + anchor_loss  # (B,)  https://arxiv.org/abs/2406.11839

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/cropped": cropped,
        "margin": chosen - rejected,
        "margin/cropped": chosen - cropped,
        "accuracy": (chosen > rejected).float(),
        "accuracy/cropped": (chosen > cropped).float(),
        "accuracy/anchor": (chosen > delta).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = mdpo_loss(zero, zero, zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([3 * math.log(2)]))
    # Log-ratios +20, -10, +10 at beta 0.1 are rewards 2, -1, 1: margins 3 and 1, and 2 above the anchor.
    loss, _ = mdpo_loss(zero - 30, zero - 70, zero - 60, zero - 50, zero - 60, zero - 70)
    torch.testing.assert_close(loss, torch.tensor([sum(math.log(1 + math.exp(-x)) for x in (3, 1, 2))]))
    print(f"mdpo ok: starts at {start.item():.6f} = 3 ln 2,"
          f" margins 3, 1 and 2 give {loss.item():.6f} = ln(1 + e^-3) + ln(1 + e^-1) + ln(1 + e^-2)")
