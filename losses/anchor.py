# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""Anchor: a term for losses of differences, under which the chosen response may lose probability.

mDPO: Conditional Preference Optimization for Multimodal Large Language Models.
F. Wang, W. Zhou, J. Y. Huang, N. Xu, S. Zhang, H. Poon, M. Chen, EMNLP 2024, arXiv 2406.11839.

    r(v, y)  = beta [log pi(y | x, v) - log pi_ref(y | x, v)]                                implicit reward
    L_AncPO  = -log sigma(r(v, y_w) - delta)                                                     Section 3.2
    L        = L_0 + w L_AncPO                                       L_0 another loss, such as losses/dpo.py

with x the prompt, v the image, y_w the chosen response and sigma the logistic function. A loss of the margin
r(v, y_w) - r(v, y_l) is as content when r(v, y_l) falls faster than r(v, y_w); this term raises r(v, y_w)
itself, and fades once it is above the anchor delta. If policy and reference agree, L_AncPO = ln 2 (at
delta = 0). beta is that of L_0. In the paper w = 1 and delta = 0.

    symbol                     argument                   shape
    log pi(y_w | x, v)         policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi_ref(y_w | x, v)     reference_chosen_logps     (B,)
    beta                       beta                       float  strength of the pull towards the reference
    delta                      anchor_delta               float  the anchor, a reward

Departures
- From the paper: none. mdpo.py and lpoi.py have this term built in, symmpo.py for both of its images.
- From mDPO's released code: it has no delta.
- From OPA-DPO's released code (arXiv 2501.09695), which adds the term with w = 1 and delta = 0: it also holds
  the rewards of rejected responses below delta, which is left out here.
"""

import math

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
}


def anchor_loss(
    policy_chosen_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    *,
    beta: float = 0.1,
    anchor_delta: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Keep the reward of the chosen response above an anchor.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `accuracy/anchor` = 1.0 where the reward is
    above anchor_delta.
    Raises ValueError or RuntimeError if the shapes differ.
    """
    if policy_chosen_logps.ndim != 1 or policy_chosen_logps.shape != reference_chosen_logps.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy_chosen_logps.shape)} of the policy"
                         f" and {list(reference_chosen_logps.shape)} of the reference")

    # at least fp32: differences of large sums
    precision = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    reward = beta * (policy_chosen_logps.to(precision) - reference_chosen_logps)  # (B,)
    loss = -F.logsigmoid(reward - anchor_delta)  # (B,)  Section 3.2, https://arxiv.org/abs/2406.11839

    metrics = {
        "accuracy/anchor": (reward > anchor_delta).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero = torch.zeros(1)
    start, _ = anchor_loss(zero, zero)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # A log-ratio of +20 at beta 0.1 is a reward of 2, 1.5 above an anchor of 0.5.
    loss, _ = anchor_loss(zero - 30, zero - 50, anchor_delta=0.5)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-1.5))]))
    print(f"anchor ok: starts at {start.item():.6f} = ln 2,"
          f" 1.5 above the anchor gives {loss.item():.6f} = ln(1 + e^-1.5)")
