# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""Dense DPO: token-weighted direct preference optimisation, the loss of RLHF-V.

RLHF-V: Towards Trustworthy MLLMs via Behavior Alignment from Fine-grained Correctional Human Feedback.
T. Yu, Y. Yao, H. Zhang, T. He, Y. Han, G. Cui, J. Hu, Z. Liu, H.-T. Zheng, M. Sun, T.-S. Chua, CVPR 2024,
arXiv 2312.00849.

    s(v, y) = 1/N [sum_{t in y_u} log pi(y_t | x, v, y_<t) + gamma sum_{t in y_c} log pi(y_t | x, v, y_<t)]
    N       = |y_u| + gamma |y_c|                                                                     Eq. 5
    r(v, y) = beta [s(v, y) - s_ref(v, y)]                                                  implicit reward
    L       = -log sigma(r(v, y_w) - r(v, y_l))                                                       Eq. 3

with x the prompt, v the image, y_w the chosen and y_l the rejected response, sigma the logistic function. y_l
is what a model said and y_w the same text with its errors corrected; y_c are the tokens of a response that
differ from the other response, y_u those that stayed. If policy and reference agree, L = ln 2.

    symbol                          argument                        shape
    log pi(y_w,t | x, v, y_w,<t)    policy_chosen_token_logps       (B, L)   any value where the mask is False
    log pi(y_l,t | x, v, y_l,<t)    policy_rejected_token_logps     (B, L)
    log pi_ref(y_w,t | ...)         reference_chosen_token_logps    (B, L)
    log pi_ref(y_l,t | ...)         reference_rejected_token_logps  (B, L)
    t is a token of y_w             chosen_mask                     (B, L)   bool, at least one True a row
    t is a token of y_l             rejected_mask                   (B, L)
    t is in y_c of y_w              chosen_changed                  (B, L)   bool, from `changed_tokens`
    t is in y_c of y_l              rejected_changed                (B, L)
    beta                            beta                            float  the paper's 0.5
    gamma                           gamma                           float  the paper's 5; 1 gives all the same weight
                                    reduction                       str    "mean" or "sum", see Departures

Departures
- From the paper: none with reduction "mean".
- From the released code: there the division by N is an option. The command published with it had it on at
  first (gamma 5, beta 0.5), later off (gamma 5, beta 0.5; then gamma 1.1, beta 0.1). Off is reduction "sum",
  N = 1, whose rewards grow with the length; with gamma 1 that is losses/dpo.py.
- `changed_tokens`, from the released code: like there, a common stretch shorter than three tokens counts as
  changed. Unlike there, tokens that were only inserted or only deleted are weighted too, a common stretch at
  either end counts as unchanged at any length, frequent tokens are aligned like all others, and padding is
  not compared. The paper's corrected segments come from its annotators.
"""

import math
from difflib import SequenceMatcher
from typing import Literal

import torch
from torch.nn import functional as F

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
    "rejected": dict(image="image", response="rejected"),
}


def changed_tokens(
    chosen_ids: list[int], rejected_ids: list[int], min_match: int = 3
) -> tuple[list[bool], list[bool]]:
    """For each token of either response: is it missing from the stretches that both have in common?

    Args: token ids without padding; `min_match`, the shortest common stretch that counts inside the
    responses.
    Returns: flags as long as the responses, True where changed.
    """
    chosen, rejected = [True] * len(chosen_ids), [True] * len(rejected_ids)
    matcher = SequenceMatcher(None, chosen_ids, rejected_ids, autojunk=False)
    for i, j, size in matcher.get_matching_blocks():
        at_start = i == j == 0
        at_end = i + size == len(chosen_ids) and j + size == len(rejected_ids)
        if at_start or at_end or size >= min_match:
            chosen[i : i + size] = rejected[j : j + size] = [False] * size
    return chosen, rejected


def dpo_weighted_loss(
    policy_chosen_token_logps: torch.Tensor,
    policy_rejected_token_logps: torch.Tensor,
    reference_chosen_token_logps: torch.Tensor,
    reference_rejected_token_logps: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    chosen_changed: torch.Tensor,
    rejected_changed: torch.Tensor,
    *,
    beta: float = 0.5,
    gamma: float = 5.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prefer the chosen response over the rejected response, above all where they differ.

    Args: token log-probs, the policy's with gradient, the reference's without, boolean response masks and boolean
    marks of changed tokens, (B, L) each.
    Returns: loss (B,) in nats; metrics, each (B,) and detached: `reward/NAME` of each sequence,
    `margin` = chosen minus rejected reward, `accuracy` = 1.0 where the margin is positive,
    `changed/NAME` the share of changed tokens.
    Raises ValueError if shapes differ, masks are not boolean, a response is empty or an option is impossible.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, not {gamma}")
    chosen = beta * _log_ratio(policy_chosen_token_logps, reference_chosen_token_logps, chosen_mask,
                               chosen_changed, gamma, reduction)  # (B,)
    rejected = beta * _log_ratio(policy_rejected_token_logps, reference_rejected_token_logps, rejected_mask,
                                 rejected_changed, gamma, reduction)  # (B,)
    if chosen.shape != rejected.shape:
        raise ValueError(f"there are {len(chosen)} chosen and {len(rejected)} rejected responses")
    loss = -F.logsigmoid(chosen - rejected)  # (B,)  Eq. 3, https://arxiv.org/abs/2312.00849

    metrics = {
        "reward/chosen": chosen,
        "reward/rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).float(),
        "changed/chosen": (chosen_changed & chosen_mask).sum(dim=-1) / chosen_mask.sum(dim=-1),
        "changed/rejected": (rejected_changed & rejected_mask).sum(dim=-1) / rejected_mask.sum(dim=-1),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def _log_ratio(
    policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, changed: torch.Tensor,
    gamma: float, reduction: str,
) -> torch.Tensor:
    """s(v, y) - s_ref(v, y) of Eq. 5, (B,), from (B, L) each."""
    shapes = [list(tensor.shape) for tensor in (policy, reference, mask, changed)]
    if policy.ndim != 2 or shapes.count(shapes[0]) != 4:
        raise ValueError("token log-probs {} of the policy and {} of the reference, mask {} and changed {}"
                         " must all be (B, L)".format(*shapes))
    if mask.dtype != torch.bool or changed.dtype != torch.bool:
        raise ValueError(f"mask and changed must be bool, not {mask.dtype} and {changed.dtype}")
    if not mask.any(dim=-1).all():
        raise ValueError("a mask has a row without a single response token")

    # fp32 at least; padding is overwritten, not multiplied by 0, because 0 * -inf would be nan
    precision = torch.promote_types(policy.dtype, torch.float32)
    ratios = (policy.to(precision) - reference).masked_fill(~mask, 0.0)  # (B, L)
    weights = (1 + (gamma - 1) * changed.to(precision)).masked_fill(~mask, 0.0)  # (B, L)  1 or gamma
    total = (weights * ratios).sum(dim=-1)  # (B,)
    return total / weights.sum(dim=-1) if reduction == "mean" else total


if __name__ == "__main__":
    #          a  red  cat  sat  on  the mat  EOS
    chosen = [11, 12, 13, 14, 15, 16, 17, 2]
    rejected = [11, 22, 23, 14, 15, 16, 27, 2]
    changed = changed_tokens(chosen, rejected)
    assert changed[0] == changed[1] == [False, True, True, False, False, False, True, False]
    zero, mask, marks = torch.zeros(1, 8), torch.ones(1, 8, dtype=torch.bool), torch.tensor([changed[0]])
    start, _ = dpo_weighted_loss(zero, zero, zero, zero, mask, mask, marks, marks)
    torch.testing.assert_close(start, torch.tensor([math.log(2)]))
    # Log-ratio +4 on each changed token of y_w: s = 3 * 5 * 4 / (5 + 3 * 5) = 3, reward 0.5 * 3 = 1.5.
    loss, _ = dpo_weighted_loss(4.0 * marks - 5, zero - 6, zero - 5, zero - 6, mask, mask, marks, marks)
    torch.testing.assert_close(loss, torch.tensor([math.log(1 + math.exp(-1.5))]))
    print(f"dpo_weighted ok: starts at {start.item():.6f} = ln 2,"
          f" margin 1.5 gives {loss.item():.6f} = ln(1 + e^-1.5)")
