# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""AdaViP: adaptive vision-enhanced preference optimisation.

AdaViP: Aligning Multi-modal LLMs via Adaptive Vision-enhanced Preference Optimization.
J. Lu, J. Li, Y. Gao, J. Wu, J. Wu, X. Wang, X. He, 2025, arXiv 2504.15619.

    r(v, y)  = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                          implicit reward, Eq. 4
    L_AdaViP = -log sigma(-log(exp(r_+- - r_++) + exp(r_-+ - r_++)))                                  Eq. 11
             = -log softmax(r_++, r_+-, r_-+)_++
    r_++ = r(v, y_w),  r_+- = r(v, y_l),  r_-+ = r(v_l, y_w)

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function and
v_l the image with an object removed. This is the Plackett-Luce probability (Eq. 10) that D_++ = (x, v, y_w)
comes first among D_++, D_+- and D_-+. If policy and reference agree, L_AdaViP = ln 3.

The balance of the two negatives D_+- and D_-+ adapts by itself: the gradient of the loss is

    -beta s [grad log pi(D_++) - w_+- grad log pi(D_+-) - w_-+ grad log pi(D_-+)]                     Eq. 12
    s    = sigma(log(exp(r_+- - r_++) + exp(r_-+ - r_++))) = 1 - softmax(r_++, r_+-, r_-+)_++
    w_+- = sigma(r_+- - r_-+),  w_-+ = sigma(r_-+ - r_+-),  w_+- + w_-+ = 1                           Eq. 13

so the negative with the higher reward is pushed down harder. The weights are a property of the loss: they are
reported as metrics and must not be multiplied in. They compare rewards of two images: DPO's reward is
r(v, y) + beta log Z(x, v), whose partition function Z r_++ and r_+- share and r_-+ does not. The loss takes
c = beta [log Z(x, v_l) - log Z(x, v)] for 0 (SymMPO, arXiv 2506.11712). With r_-+ + c in place of
r_-+, s and the weights change: how strong the push is and how the negatives share it, not which log-prob goes up.

    symbol                     argument                    shape
    log pi(y_w | x, v)         policy_chosen_logps         (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)         policy_rejected_logps       (B,)
    log pi(y_w | x, v_l)       policy_removed_logps        (B,)
    log pi_ref(y_w | x, v)     reference_chosen_logps      (B,)
    log pi_ref(y_l | x, v)     reference_rejected_logps    (B,)
    log pi_ref(y_w | x, v_l)   reference_removed_logps     (B,)
    beta                       beta                        float  strength of the pull towards the reference

Departures
- From the paper: none.
- From the released code: none is public.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "removed": dict(image="rejected_image", response="chosen"),
}


def adavip_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_removed_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_removed_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rank the chosen response with its image above both the rejected response and the image with a removal.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/removed` and `accuracy/removed` the same for chosen and removed,
    `scale` = s, `weight/rejected` = w_+- and `weight/removed` = w_-+.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_removed_logps])  # (3, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_removed_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (3, B)
    chosen, rejected, removed = rewards
    deficit = torch.logsumexp(rewards[1:] - chosen, dim=0)  # (B,)  log sum_j exp(r_j - r_++)
    loss = -F.logsigmoid(-deficit)  # (B,)  Eq. 11, https://arxiv.org/abs/2504.15619

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/removed": removed,
        "margin": chosen - rejected,
        "margin/removed": chosen - removed,
        "accuracy": (chosen > rejected).float(),
        "accuracy/removed": (chosen > removed).float(),
        "scale": torch.sigmoid(deficit),  # Eq. 12, first factor
        "weight/rejected": torch.sigmoid(rejected - removed),  # Eq. 13
        "weight/removed": torch.sigmoid(removed - rejected),  # Eq. 13
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = adavip_loss(zero, zero, zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([math.log(3)]))
    # Log-ratios +20, -10, +10 at beta 0.1 are rewards 2, -1, 1: differences to the chosen reward -3 and -1.
    loss, _ = adavip_loss(zero - 30, zero - 70, zero - 60, zero - 50, zero - 60, zero - 70)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-3) + math.exp(-1))]))
    print(f"adavip ok: starts at {start.item():.6f} = ln 3,"
          f" margins 3 and 1 give {loss.item():.6f} = ln(1 + e^-3 + e^-1)")
