# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""POVID: preference optimisation with rejected responses from a text model and from a noisy image.

Aligning Modalities in Vision Large Language Models via Preference Fine-tuning.
Y. Zhou, C. Cui, R. Rafailov, C. Finn, H. Yao, 2024, arXiv 2402.11411.

    r(v, y)   = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                               implicit reward
    L_DPO(y)  = -log sigma(r(v, y_w) - r(v, y))
    L_POVID   = gamma L_DPO(y_l) + (1 - gamma) L_DPO(y_n)                 Eq. 5 of arXiv 2407.02477, gamma 0.5
    log pi(y_n | x, v) = sum_t log pi(k_t | x, v, y_w,<t)
    k_t       = argmax_k pi(k | x, v_n, y_w,<t)

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function and
v_n the image under diffusion noise. y_n is never generated as a text: at each position of y_w, after the true
tokens before it, the token k_t is picked that is most probable under the noisy image, and its probability
under the clean image is scored. Where k_t is the token of y_w itself it cancels between y_w and y_n.
If policy and reference agree, L_POVID = ln 2.

    symbol                    argument                   shape
    log pi(y_w | x, v)        policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)        policy_rejected_logps      (B,)
    log pi(y_n | x, v)        policy_noisy_logps         (B,)
    log pi_ref(y_w | x, v)    reference_chosen_logps     (B,)
    log pi_ref(y_l | x, v)    reference_rejected_logps   (B,)
    log pi_ref(y_n | x, v)    reference_noisy_logps      (B,)
    beta                      beta                       float  strength of the pull towards the reference
    gamma                     gamma                      float  weight of the rejected response, in [0, 1]

Departures
- From the paper: its equation combines the two rejected responses by a weighted sum of their log-probs (so
  arXiv 2407.02477 says). The released code averages two DPO losses instead, and so does this file.
- From the released code: there the reference runs its own noisy pass and picks its own k_t, so r(v, y_n)
  compares the probabilities of different tokens as soon as the models differ. Here policy and reference score
  the same k_t, those of the policy, without gradient through the choice. `SEQUENCES_RELEASED` asks for the
  released kind. Only the inputs differ, the function below is the same.
- The released code trains in two stages, first losses/dpo.py on (y_w, y_l), then this loss.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md). The tokens
# of "noisy" are the policy's k_t: picked along that response under the noisy image, scored under the clean one.
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "noisy": dict(image="image", response="chosen", tokens="picked_in_noise"),
}

# the same, but policy and reference each pick their own k_t, see Departures
SEQUENCES_RELEASED = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
    "noisy": dict(image="image", response="chosen", tokens="own_picked_in_noise"),
}


def povid_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    policy_noisy_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    reference_noisy_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response and over what the model sees in a noisy image.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `margin/noisy` and `accuracy/noisy` the same for chosen and noisy.
    Raises ValueError or RuntimeError if the shapes differ, ValueError if gamma is not in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], not {gamma}")
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps, policy_noisy_logps])  # (3, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps, reference_noisy_logps])
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    rewards = beta * (policy.to(precision) - reference)  # (3, B)
    chosen, rejected, noisy = rewards
    response_loss = -F.logsigmoid(chosen - rejected)  # (B,)  DPO
    noise_loss = -F.logsigmoid(chosen - noisy)  # (B,)  DPO against the model's own mistakes
    loss = gamma * response_loss + (1 - gamma) * noise_loss  # (B,)  Eq. 5, https://arxiv.org/abs/2407.02477

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "reward/noisy": noisy,
        "margin": chosen - rejected,
        "margin/noisy": chosen - noisy,
        "accuracy": (chosen > rejected).float(),
        "accuracy/noisy": (chosen > noisy).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = povid_loss(zero, zero, zero, zero, zero, zero)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # Log-ratios +20, -10, +10 at beta 0.1 are rewards 2, -1, 1: margins 3 and 1.
    loss, _ = povid_loss(zero - 30, zero - 70, zero - 60, zero - 50, zero - 60, zero - 70)
    torch.testing.assert_close(loss, torch.tensor([sum(math.log(1 + math.exp(-x)) for x in (3, 1)) / 2]))
    print(f"povid ok: starts at {start.item():.6f} = ln 2,"
          f" margins 3 and 1 give {loss.item():.6f} = [ln(1 + e^-3) + ln(1 + e^-1)] / 2")
