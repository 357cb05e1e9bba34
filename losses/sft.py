# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""SFT: supervised fine-tuning on the chosen response.

Visual instruction tuning. H. Liu, C. Li, Q. Wu, Y. J. Lee, NeurIPS 2023, arXiv 2304.08485.

    p(y_w | x, v) = prod_t p(y_w,t | x, v, y_w,<t)                                                   Eq. 3
    L_SFT = -(1 / |y_w|) log p(y_w | x, v)                                                   one per example

with x the prompt, v the image and y_w the chosen response, whose |y_w| tokens include the final EOS.

    symbol                        argument                     shape
    log pi(y_w,t | x, v, y_w,<t)  policy_chosen_token_logps    (B, T)   any value where the mask is False
    t is a token of y_w           chosen_mask                  (B, T)   bool, at least one True a row

There is no reference model and there are no hyper-parameters.

Also a term of other losses, L_0 + w L_SFT, which keeps the chosen response likely. Iterative RPO (R. Y. Pang et
al., NeurIPS 2024, arXiv 2404.19733) adds it to DPO with w = 1, normalised by the length as here. TRL's
`rpo_alpha`, in version 1.16 the loss type "sft" with a weight, takes the mean over all chosen tokens of the
batch, see below; so does MPO's code (W. Wang et al., 2024, arXiv 2411.10442), which uses it. TRL 1.16 was
compared, the rest is as others report it.

Departures
- From the released LLaVA code and TRL: they take the mean over all response tokens of the batch, where a long response
  weighs more than a short one and an example's weight depends on its neighbours. Here each example is the
  mean over its own tokens and the caller averages examples: all weigh the same, however they are batched.
  For the token mean: -sum(metrics["logps/chosen"]) / sum(metrics["tokens/chosen"]).
"""

import math

import torch

# sequence name -> what is scored under that name (losses/README.md)
SEQUENCES = {
    "chosen": dict(image="image", response="chosen"),
}


def sft_loss(
    policy_chosen_token_logps: torch.Tensor,
    chosen_mask: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean negative log-likelihood of each chosen response, in nats per token.

    Args: token log-probs and boolean response mask, (B, T) both.
    Returns: loss (B,) with gradient; metrics, each (B,) and detached: `logps/chosen` (sum), `tokens/chosen`.
    Raises ValueError if the shapes differ, the mask is not boolean, or a response has no token.
    """
    if policy_chosen_token_logps.shape != chosen_mask.shape or policy_chosen_token_logps.ndim != 2:
        raise ValueError(f"token log-probs {list(policy_chosen_token_logps.shape)} and mask"
                         f" {list(chosen_mask.shape)} must both be (B, T)")
    if chosen_mask.dtype != torch.bool:
        raise ValueError(f"chosen_mask must be bool, not {chosen_mask.dtype}")
    if not chosen_mask.any(dim=-1).all():
        raise ValueError("chosen_mask has a row without a single response token")

    # fp32 at least; padding is overwritten, not multiplied by 0, because 0 * -inf would be nan
    precision = torch.promote_types(policy_chosen_token_logps.dtype, torch.float32)
    token_logps = policy_chosen_token_logps.to(precision).masked_fill(~chosen_mask, 0.0)  # (B, T)

    logps = token_logps.sum(dim=-1)  # (B,)  log of Eq. 3, https://arxiv.org/abs/2304.08485
    tokens = chosen_mask.sum(dim=-1).to(precision)  # (B,)
    loss = -logps / tokens  # (B,)

    metrics = {
        "logps/chosen": logps,
        "tokens/chosen": tokens,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


if __name__ == "__main__":
    # Two tokens of probability 1/2 and 1/8, one position of padding: (ln 2 + ln 8) / 2 = 2 ln 2.
    token_logps = torch.tensor([[math.log(1 / 2), math.log(1 / 8), -99.0]])
    loss, _ = sft_loss(token_logps, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(loss, torch.tensor([2 * math.log(2)]))
    print(f"sft ok: tokens of probability 1/2 and 1/8 give {loss.item():.6f} = 2 ln 2")
