# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""BDHS online: given and self-generated rejected responses, averaged.

Understanding Alignment in Multimodal LLMs: A Comprehensive Study.
E. Amirloo, J.-P. Fauconnier, C. Roesmann, C. Kerl, et al., 2024, arXiv 2407.02477.

    r(v, y) = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                 implicit reward
    L_DPO(y+, y-) = -log sigma(r(v, y+) - r(v, y-))                                                  Eq. 3
    L_Avg   = gamma L_DPO(y+, y-) + (1 - gamma) L_DPO(y+, y~-)                                       Eq. 5

with x the prompt, v the image, y+ the chosen and y- the rejected response, sigma the logistic function and
y~- a response that the policy completes from y+ while most image tokens are hidden from it (pairs/bdhs.py),
again at every step. Only the generation is hindered: the loss sees the whole image. If policy and reference
agree, L_Avg = ln 2.

    symbol                     argument                     shape
    log pi(y+ | x, v)          policy_chosen_logps          (B,)   sum over the response tokens, EOS included
    log pi(y- | x, v)          policy_rejected_logps        (B,)
    log pi(y~- | x, v)         policy_generated_logps       (B,)
    log pi_ref(y+ | x, v)      reference_chosen_logps       (B,)
    log pi_ref(y- | x, v)      reference_rejected_logps     (B,)
    log pi_ref(y~- | x, v)     reference_generated_logps    (B,)
    beta                       beta                         float  strength of the pull towards the reference
    gamma                      gamma                        float  weight of the given y-, in [0, 1]

Departures
- From the paper: none.
- From the released code: none is public.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md); `generated` is made during training
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "generated": dict(image="image", response="generated"),
}


def bdhs_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_generated_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_generated_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected one and over the one generated with a hidden image.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/generated` and `accuracy/generated` the same for chosen and generated.
    Raises ValueError or RuntimeError if the shapes differ, ValueError if gamma is not in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], not {gamma}")
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_generated_logps])  # (3, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_generated_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (3, B)
    chosen, rejected, generated = rewards
    given_loss = -F.logsigmoid(chosen - rejected)  # (B,)  Eq. 3
    generated_loss = -F.logsigmoid(chosen - generated)  # (B,)  Eq. 3
    loss = gamma * given_loss + (1 - gamma) * generated_loss  # (B,)  Eq. 5, https://arxiv.org/abs/2407.02477

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/generated": generated,
        "margin": chosen - rejected,
        "margin/generated": chosen - generated,
        "accuracy": (chosen > rejected).float(),
        "accuracy/generated": (chosen > generated).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = bdhs_loss(zero, zero, zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # Log-ratios +20, -10, +10 at beta 0.1 are rewards 2, -1, 1: margins 3 and 1, averaged.
    loss, _ = bdhs_loss(zero - 30, zero - 70, zero - 60, zero - 50, zero - 60, zero - 70)
    torch.testing.assert_close(
        loss, torch.tensor([(math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-1))) / 2]))
    print(f"bdhs ok: starts at {start.item():.6f} = ln 2,"
          f" margins 3 and 1 give {loss.item():.6f} = (ln(1 + e^-3) + ln(1 + e^-1)) / 2")
