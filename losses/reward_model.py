# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""Reward model: Bradley-Terry regression on preferences.

Training language models to follow instructions with human feedback.
L. Ouyang et al., NeurIPS 2022, arXiv 2203.02155.

    L = -log sigma(R(x, v, y_w) - R(x, v, y_l) - m)                                    Eq. 1, there with m = 0

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function, R
the scalar output of the reward model and m >= 0 a margin that says how clear the preference is (Llama 2,
arXiv 2307.09288, Eq. 2). If all outputs are equal and m = 0, L = ln 2.

L is blind to a constant added to R. Centring, weighted with c, keeps R around 0:

    "pair"    c [R(x, v, y_w) + R(x, v, y_l)]^2 of each pair                         arXiv 2312.09244; TRL
    "batch"   c |mean of R(x, v, y_w) + R(x, v, y_l) over the batch|         arXiv 2309.14525 (LLaVA-RLHF)

    symbol         argument            shape
    R(x, v, y_w)   chosen_rewards      (B,)
    R(x, v, y_l)   rejected_rewards    (B,)
    m              margin              (B,)   optional
    c              centring_weight     float  0: no centring; LLaVA-RLHF's 0.001
                   centring            str    "pair" or "batch"

Departures
- From the papers: the InstructGPT paper averages over all pairs of one prompt; here a pair is an example.
- "batch" adds the same number to every example, so that the mean over them is the published loss. An example
  then depends on its batch, which is what is scored at a time: a micro-batch of one process. In all else examples do
  not see each other.
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


def reward_model_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    margin: torch.Tensor | None = None,
    *,
    centring_weight: float = 0.0,
    centring: Literal["pair", "batch"] = "pair",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Score the chosen response above the rejected response.

    Args: outputs of the reward model, (B,) each, with gradient; `margin` (B,) or None for 0.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the chosen reward is higher.
    Raises ValueError or RuntimeError if the shapes differ, ValueError on an unknown centring.
    """
    rewards = torch.stack([chosen_rewards, rejected_rewards])  # (2, B)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (B,), not {list(rewards.shape[1:])}")
    if margin is not None and margin.shape != chosen_rewards.shape:
        raise ValueError(f"margin must be {list(chosen_rewards.shape)} like the rewards,"
                         f" not {list(margin.shape)}")
    if centring not in ("pair", "batch"):
        raise ValueError(f"centring must be 'pair' or 'batch', not {centring!r}")

    chosen, rejected = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    gap = chosen - rejected  # (B,)
    loss = -F.logsigmoid(gap if margin is None else gap - margin)  # (B,)  https://arxiv.org/abs/2203.02155
    if centring_weight:
        total = chosen + rejected  # (B,)
        loss = loss + centring_weight * (total**2 if centring == "pair" else total.mean().abs())

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "margin": gap,
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    one = torch.ones(1)
    start, _ = reward_model_loss(one, one)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # Rewards 2 and -1 with margin 1: -log sigma(2) = ln(1 + e^-2); centring adds 0.1 * (2 - 1)^2.
    loss, _ = reward_model_loss(2 * one, -one, one)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-2))]))
    centred, _ = reward_model_loss(2 * one, -one, one, centring_weight=0.1)
    torch.testing.assert_close(centred, loss + 0.1)
    print(f"reward_model ok: starts at {start.item():.6f} = ln 2,"
          f" rewards 2, -1 and margin 1 give {loss.item():.6f} = ln(1 + e^-2), centred {centred.item():.6f}")
