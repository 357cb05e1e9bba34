# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""IPO: identity preference optimisation.

A General Theoretical Paradigm to Understand Learning from Human Preferences.
M. G. Azar, M. Rowland, B. Piot, D. Guo, D. Calandriello, M. Valko, R. Munos, AISTATS 2024, arXiv 2310.12036.

    h     = [log pi(y_w | x, v) - log pi_ref(y_w | x, v)] - [log pi(y_l | x, v) - log pi_ref(y_l | x, v)]
    L_IPO = (h - 1 / (2 beta))^2                                                                     Eq. 17

with x the prompt, v the image, y_w the chosen and y_l the rejected response; the paper calls beta tau. Where
DPO widens the gap h without end, IPO stops at 1 / (2 beta).
If policy and reference agree, L_IPO = 1 / (4 beta^2).

    symbol                    argument                   shape
    log pi(y_w | x, v)        policy_chosen_logps        (B,)   sum over the response tokens, EOS included
    log pi(y_l | x, v)        policy_rejected_logps      (B,)
    log pi_ref(y_w | x, v)    reference_chosen_logps     (B,)
    log pi_ref(y_l | x, v)    reference_rejected_logps   (B,)
    t is a token of y_w       chosen_mask                (B, L)   bool, at least one True a row
    t is a token of y_l       rejected_mask              (B, L)
    beta                      beta                       float  strength of the pull towards the reference
                              reduction                  str    "sum" or "mean", see Departures

Departures
- From the paper: none with reduction "sum", the probability of the whole response as in its equations. h and
  its target 1 / (2 beta) are then in nats a response.
- From TRL: there each of the four log-probs is divided by the number of tokens of its response, which its
  authors report to have confirmed with those of the paper. That is reduction "mean"; h and its target are in
  nats a token, so one beta means very different targets in the two. TRL counts an empty response as 0; here
  it is an error.
- From GPO (arXiv 2402.05749), which writes the loss as (1 - beta_GPO h)^2: L_IPO times 4 beta^2 with
  beta_GPO = 2 beta.
"""

from typing import Literal

import torch

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
}


def ipo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    *,
    beta: float = 0.1,
    reduction: Literal["sum", "mean"] = "sum",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response by a fixed gap of log-ratios.

    Args: summed log-probs, (B,) each, the policy's with gradient, the reference's without. Masks of the
    tokens, (B, L), bool.
    Returns: loss (B,) in squared nats; metrics, each (B,) and detached: `reward/NAME` of each sequence (beta
    times its log-ratio, by token with reduction "mean"), `margin` = chosen minus rejected reward, 1/2 where
    the loss is 0, `accuracy` = 1.0 where the margin is positive.
    Raises ValueError or RuntimeError if the shapes differ, ValueError on an empty response or bad reduction.
    """
    policy = torch.stack([policy_chosen_logps, policy_rejected_logps])  # (2, B)
    reference = torch.stack([reference_chosen_logps, reference_rejected_logps])  # (2, B)
    if policy.ndim != 2 or policy.shape != reference.shape:
        raise ValueError(f"log-probs must all be (B,), not {list(policy.shape[1:])}"
                         f" of the policy and {list(reference.shape[1:])} of the reference")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    for mask in (chosen_mask, rejected_mask):
        if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != policy.shape[1]:
            raise ValueError(f"masks must be bool, not {mask.dtype}, and ({policy.shape[1]}, L), not"
                             f" {list(mask.shape)}")
        if not mask.any(dim=-1).all():
            raise ValueError("a mask has a row without a single response token")

    precision = torch.promote_types(policy.dtype, torch.float32)  # at least fp32: differences of large sums
    ratios = policy.to(precision) - reference  # (2, B)
    if reduction == "mean":
        ratios = ratios / torch.stack([chosen_mask.sum(dim=-1), rejected_mask.sum(dim=-1)])
    chosen, rejected = ratios
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2  # (B,)  Eq. 17, https://arxiv.org/abs/2310.12036

    metrics = {
        "reward/chosen": beta * chosen,
        "reward/rejected": beta * rejected,
        "margin": beta * (chosen - rejected),
        "accuracy": (chosen > rejected).float(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    zero, mask = torch.zeros(1), torch.tensor([[True, True]])
    start, _ = ipo_loss(zero, zero, zero, zero, mask, mask)
    torch.testing.assert_close(start, torch.tensor([25.0]))
    # Log-ratios +4 and -2: h = 6, target 1 / 0.2 = 5. By token, two each: h = 3.
    logps = zero - 46, zero - 62, zero - 50, zero - 60
    loss, metrics = ipo_loss(*logps, mask, mask)
    torch.testing.assert_close(loss, torch.tensor([1.0]))
    torch.testing.assert_close(metrics["margin"], torch.tensor([0.6]))
    by_token, _ = ipo_loss(*logps, mask, mask, reduction="mean")
    torch.testing.assert_close(by_token, torch.tensor([4.0]))
    print(f"ipo ok: starts at {start.item():.6f} = 5^2, h = 6 gives {loss.item():.6f} = (6 - 5)^2,"
          f" h = 3 gives {by_token.item():.6f} = (3 - 5)^2")
