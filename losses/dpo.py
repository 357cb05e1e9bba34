# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""DPO: direct preference optimisation.

Direct Preference Optimization: Your Language Model is Secretly a Reward Model.
R. Rafailov, A. Sharma, E. Mitchell, S. Ermon, C. D. Manning, C. Finn, NeurIPS 2023, arXiv 2305.18290.

    r(v, y) = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                      implicit reward, Section 4
    L_DPO   = -log sigma(r(v, y_w) - r(v, y_l))                                                       Eq. 7

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function.
If policy and reference agree, L_DPO = ln 2.

Labels may be noisy: y_w and y_l swapped with probability eps. With the margin d = r(v, y_w) - r(v, y_l), and
because log sigma(-d) = log sigma(d) - d, both known corrections are L_DPO and a term linear in d:

    conservative  -(1 - eps) log sigma(d) - eps log sigma(-d)                 = L_DPO + eps d
    robust        [-(1 - eps) log sigma(d) + eps log sigma(-d)] / (1 - 2 eps) = L_DPO - eps d / (1 - 2 eps)

Conservative: E. Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023. Its minimum is
at sigma(d) = 1 - eps. Robust: S. Ray Chowdhury, A. Kini, N. Natarajan, ICML 2024, arXiv 2403.00409; averaged
over the swaps it equals L_DPO on clean labels, and it has no lower bound.

    symbol                    argument                   shape
    log pi(y_w | x, v)        policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)        policy_rejected_logps      (B,)
    log pi_ref(y_w | x, v)    reference_chosen_logps     (B,)
    log pi_ref(y_l | x, v)    reference_rejected_logps   (B,)
    beta                      beta                       float  strength of the pull towards the reference
    eps                       label_smoothing            float  in [0, 0.5); 0: labels are taken as they are
                              smoothing                  str    "conservative" or "robust"

Departures
- From the paper: none but the image v, which is part of the condition, like the prompt.
- From the released code: its label smoothing is the conservative one; its IPO variant is losses/ipo.py; its
  reference-free variant is left out.
"""

import math
from typing import Literal

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
}


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    smoothing: Literal["conservative", "robust"] = "conservative",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive.
    Raises ValueError or RuntimeError if the shapes differ, ValueError on an impossible option.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    slopes = {"conservative": label_smoothing, "robust": -label_smoothing / (1 - 2 * label_smoothing)}
    if smoothing not in slopes:
        raise ValueError(f"smoothing must be one of {list(slopes)}, not {smoothing!r}")
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps])  # (2, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps])  # (2, B)
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (2, B)
    chosen, rejected = rewards
    margin = chosen - rejected  # (B,)
    loss = -F.logsigmoid(margin)  # (B,)  Eq. 7, https://arxiv.org/abs/2305.18290
    if label_smoothing:
        loss = loss + slopes[smoothing] * margin

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "margin": margin,
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = dpo_loss(zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # Log-ratios +20 and -10 at beta 0.1 are rewards 2 and -1: margin 3, -log sigma(3) = ln(1 + e^-3).
    loss, _ = dpo_loss(zero - 30, zero - 70, zero - 50, zero - 60)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-3))]))
    print(f"dpo ok: starts at {start.item():.6f} = ln 2, margin 3 gives {loss.item():.6f} = ln(1 + e^-3)")
