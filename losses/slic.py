# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""SLiC: sequence likelihood calibration, a hinge in place of DPO's logistic. Two losses share the name.

`slic_loss`, normalised by a reference ("hinge-norm"):
Statistical Rejection Sampling Improves Preference Optimization.
T. Liu, Y. Zhao, R. Joshi, M. Khalman, M. Saleh, P. J. Liu, J. Liu, ICLR 2024, arXiv 2309.06657.

    r(v, y) = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                 implicit reward
    L_SLiC  = max(0, 1 - [r(v, y_w) - r(v, y_l)])                                                    Eq. 10

`slic_hf_loss`, as first published, without a reference:
SLiC-HF: Sequence Likelihood Calibration with Human Feedback.
Y. Zhao, R. Joshi, T. Liu, M. Khalman, M. Saleh, P. J. Liu, 2023, arXiv 2305.10425.

    L_SLiC-HF = max(0, delta - log pi(y_w | x, v) + log pi(y_l | x, v)) - lambda log pi(y_ref | x, v)

with x the prompt, v the image, y_w the chosen, y_l the rejected response and y_ref a target of supervised
fine-tuning, here y_w. If policy and reference agree, L_SLiC = 1. Its gradient is that of a straight line
until the log-ratios are 1 / beta nats apart, then exactly 0.

    symbol                    argument                   shape
    log pi(y_w | x, v)        policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)        policy_rejected_logps      (B,)
    log pi_ref(y_w | x, v)    reference_chosen_logps     (B,)   slic_loss only
    log pi_ref(y_l | x, v)    reference_rejected_logps   (B,)   slic_loss only
    beta                      beta                       float  slic_loss: 1 / beta is the margin in nats
    delta                     delta                      float  slic_hf_loss: the margin in nats
    lambda                    sft_weight                 float  slic_hf_loss: weight of the fine-tuning term

Departures
- slic_loss, from the paper: none; it writes gamma for beta. TRL calls this loss "hinge".
- slic_hf_loss, from the paper: y_ref is the chosen response, since a pair record has no other target. All
  log-probs are sums; the defaults delta = 1 and lambda = 0.5 are reconstructed. There is no released code.
"""

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md), for both losses
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
}


def slic_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    *,
    beta: float = 0.1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response until their rewards are 1 apart.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,); metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps])  # (2, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps])  # (2, B)
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (2, B)
    chosen, rejected = rewards
    loss = F.relu(1 - (chosen - rejected))  # (B,)  Eq. 10, https://arxiv.org/abs/2309.06657

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def slic_hf_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    *,
    delta: float = 1.0,
    sft_weight: float = 0.5,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Keep the chosen response `delta` nats more likely than the rejected one, and fine-tune on it.

    Args: summed log-probs, (B,) each, with gradient.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `logps/NAME` of each sequence,
    `margin` = chosen minus rejected log-prob, `accuracy` = 1.0 where the margin is positive.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps])  # (2, B)
    if policy.ndim != 2:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}")

    chosen, rejected = policy.to(torch.promote_types(policy.dtype, torch.float32))  # at least fp32
    loss = F.relu(delta - chosen + rejected) - sft_weight * chosen  # (B,)  https://arxiv.org/abs/2305.10425

    metrics = {
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = slic_loss(zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([1.0]))
    # Log-ratios +4 and -2 at beta 0.1 are rewards 0.4 and -0.2: margin 0.6.
    loss, _ = slic_loss(zero - 46, zero - 62, zero - 50, zero - 60)
    torch.testing.assert_close(loss, torch.tensor([0.4]))
    # Log-probs -8 and -8.25: 1 - 0.25 of the margin are missing, and 0.5 * 8 for fine-tuning.
    first, _ = slic_hf_loss(zero - 8, zero - 8.25)
    torch.testing.assert_close(first, torch.tensor([4.75]))
    print(f"slic ok: starts at {start.item():.6f}, margin 0.6 gives {loss.item():.6f} = 1 - 0.6;"
          f" slic_hf gives {first.item():.6f} = (1 - 0.25) + 0.5 * 8")
