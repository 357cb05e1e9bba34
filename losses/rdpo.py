# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""rDPO: retrieval-augmented direct preference optimisation, the loss of Re-Align.

Re-Align: Aligning Vision Language Models via Retrieval-Augmented Direct Preference Optimization.
S. Xing, Y. Wang, P. Li, R. Bai, Y. Wang, C. Hu, C. Qian, H. Yao, Z. Tu, 2025, arXiv 2502.13146.

    r(v, y) = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                 implicit reward
    L_rDPO  = -log sigma(r(v, y_w) - r(v, y_l)) - log sigma(r(v, y_w) - r(v_l, y_w))                  Eq. 1

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function and
v_l an image retrieved because it resembles v. The first term is DPO; the second prefers the image. DPO's reward is
r(v, y) + beta log Z(x, v), whose partition function Z cancels between responses to one image, not between images: the
second margin lacks beta [log Z(x, v) - log Z(x, v_l)], taken for 0 (SymMPO, arXiv 2506.11712). That changes the weight
sigma(-margin) of the term's gradient, not which of its two log-probs goes up and which down.
If policy and reference agree, L_rDPO = 2 ln 2.

    symbol                     argument                    shape
    log pi(y_w | x, v)         policy_chosen_logps         (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)         policy_rejected_logps       (B,)
    log pi(y_w | x, v_l)       policy_retrieved_logps      (B,)
    log pi_ref(y_w | x, v)     reference_chosen_logps      (B,)
    log pi_ref(y_l | x, v)     reference_rejected_logps    (B,)
    log pi_ref(y_w | x, v_l)   reference_retrieved_logps   (B,)
    beta                       beta                        float  strength of the pull towards the reference

Departures
- From the paper: none. `SEQUENCES` asks for the log-probs of the equation.
- From the released code: there only y_w under v is scored as in the equation. The negatives are fed to the
  model but their tokens are never scored. In place of each token y_t its best competitor is scored, the most
  probable token other than y_t:
      sum_t max_{k != y_t} log p(k | x, v, y_l,<t)      instead of log p(y_l | x, v)       rejected
      sum_t max_{k != y_t} log p(k | x, v_l, y_w,<t)    instead of log p(y_w | x, v_l)     retrieved
  Policy and reference each pick their own competitors, so a reward may compare different tokens.
  `SEQUENCES_RELEASED` asks for these log-probs by tokens="best_other".
  Only the inputs differ, the function below is the same. Which of the two the paper's numbers come from is
  not known.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "retrieved": dict(image="rejected_image", response="chosen"),
}

# the same sequences scored as the released code does it, see Departures
SEQUENCES_RELEASED = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected", tokens="best_other"),
    "retrieved": dict(image="rejected_image", response="chosen", tokens="best_other"),
}


def rdpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_retrieved_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_retrieved_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response and, for it, the image over the retrieved image.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/retrieved` and `accuracy/retrieved` the same for chosen and retrieved.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_retrieved_logps])  # (3, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_retrieved_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (3, B)
    chosen, rejected, retrieved = rewards
    response_loss = -F.logsigmoid(chosen - rejected)  # (B,)  DPO
    image_loss = -F.logsigmoid(chosen - retrieved)  # (B,)  visual DPO
    loss = response_loss + image_loss  # (B,)  Eq. 1, https://arxiv.org/abs/2502.13146

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/retrieved": retrieved,
        "margin": chosen - rejected,
        "margin/retrieved": chosen - retrieved,
        "accuracy": (chosen > rejected).float(),
        "accuracy/retrieved": (chosen > retrieved).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = rdpo_loss(zero, zero, zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([2 * math.log(2)]))
    # Log-ratios +20, -10, +10 at beta 0.1 are rewards 2, -1, 1: margins 3 and 1.
    loss, _ = rdpo_loss(zero - 30, zero - 70, zero - 60, zero - 50, zero - 60, zero - 70)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-3)) + math.log(1 + math.exp(-1))]))
    print(f"rdpo ok: starts at {start.item():.6f} = 2 ln 2,"
          f" margins 3 and 1 give {loss.item():.6f} = ln(1 + e^-3) + ln(1 + e^-1)")
