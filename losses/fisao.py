# MIT License, copyright (c) 2026 The Plumbline authors: copy this file freely, keep this line.
"""FiSAO: token rewards from the model's own vision encoder, the reward half of the method.

Fine-Grained Verifiers: Preference Modeling as Next-token Prediction in Vision-Language Alignment.
C. Cui, A. Zhang, Y. Zhou, Z. Chen, G. Deng, H. Yao, T.-S. Chua, ICLR 2025, arXiv 2410.14148.

Every mention o of an object (data/mentions.py) in a response to image v is scored by CLIP; how good a score
is depends on what correct and hallucinated mentions of the untrained model score, measured once:

    s(o, v) = scale max(cos(text(o), image(v)), 0)                                    `verifier_scores`
    S_gt    = mean of s over the correct, S_hal over the hallucinated mentions        Eq. 7, `calibrate`
    r(o, v) = (s - S_gt) / (S_max - S_gt)      in (0, 1]    if s > S_gt + m
              (s - S_hal) / (S_hal - S_min)    in [-1, 0)   if s < S_hal - m
              0                                             otherwise                 Eq. 8, `mention_rewards`
    r_t     = r(o, v) if the mention o ends with token t, else 0                      `place`

minus beta [log pi_old(y_t) - log pi_ref(y_t)] on every token, which is the shaped reward of PPO. The
optimiser (Eqs. 9 and 10) is PPO's clipped surrogate without change, so there is no loss in this file:

    baselines = calibrate(scores, correct)                            once, with the untrained model; JSON
    token_scores = place(mention_rewards(scores, baselines), rows, starts, stops, (B, T))
    rewards = ppo.token_rewards(old, reference, mask, token_scores=token_scores)          beta is its kl_coef
    advantages, returns = ppo.gae(rewards, old_values, mask)
    loss, metrics = ppo.ppo_loss(policy, old, ppo.whiten(advantages, mask), values, old_values, returns, mask)

    symbol          argument                       shape
    text(o)         words                          (N, C)   projected text embeddings, one row a mention
    image(v)        images                         (N, C)   projected image embedding of the mention's image
    s(o, v)         scores                         (N,)
    o is in v       correct                        (N,)     bool, from ground-truth labels, for Eq. 7 only
    response of o   responses, rows                (N,)     long
    tokens of o     starts, stops                  (N,)     long, tokens starts <= t < stops
    scale           scale                          float    250 (100 times CLIPScore) or 100 (CLIP's logit)
    S_gt, S_hal     baselines                      dict     also S_min, S_max, spread and unit
    m               margin                         float    in units of s, or of its standard deviation

This is written from the paper's words: no code was released, and the exact form of Eqs. 7 and 8 was not
available. Known are the terms of both equations, that the baselines are means with a set size below and serve
as the two reward boundaries, that the normaliser uses S_min and S_max, differs between correct and
hallucinated objects and keeps the reward in a fixed range, and that the margin was 10 (5 and 20 were worse)
where scores peak at 60 to 70. All else is reconstructed, and each choice is an argument:

    scale, clip_at_zero   100 cos would peak near 25; 250 cos clipped at 0 fits the scores of the paper
    average               "micro" pools all mentions, "macro" averages responses first
    bounds                S_min and S_max: extremes of the calibration scores (None), or a range as (0, 100)
    margin_mode           "outward" (above) keeps the boundaries in order at every margin; "inward" rewards
                          more mentions, S_gt - m and S_hal + m; "none" takes S_gt and S_hal themselves
    margin_unit           "score", or "std": multiples of the spread of scores within the two groups
    norm                  "baseline_minmax" (above); "baseline_minus_margin" measures from the boundary,
                          margin included, so the reward starts at 0; "none" leaves s - S_gt or s - S_hal
    limit                 rewards are kept within [-limit, limit]: later scores may pass S_min and S_max
    position              the reward is on the "last" token of the mention, or is "spread" over them

Watch the share of mentions with a reward other than 0: at 0 nothing is learnt. Nothing here rewards long or
fluent responses: watch their length as well, and use PPO's penalty for a missing end.

Departures
- From the paper: see the list; whether its margin is subtracted, and where its KL term is, is not known.
- From the released code: there is none.
"""

import math
from typing import Literal

import torch


def verifier_scores(
    words: torch.Tensor,
    images: torch.Tensor,
    *,
    scale: float = 250.0,
    clip_at_zero: bool = True,
) -> torch.Tensor:
    """Score of each mention, (N,): scaled cosine of its word and its image, (N, C) each, any length.

    Reconstructed. Raises ValueError if the shapes differ or an embedding is 0 or not finite.
    """
    if words.ndim != 2 or words.shape != images.shape:
        raise ValueError(f"words {list(words.shape)} and images {list(images.shape)} must both be (N, C)")
    words, images = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (words, images))
    lengths = words.norm(dim=-1) * images.norm(dim=-1)  # (N,)
    if bad := (~(lengths > 0) | ~lengths.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"mention {bad[0]}: word or image embedding is 0 or not finite")
    cosines = (words * images).sum(-1) / lengths
    return scale * (cosines.clamp(min=0) if clip_at_zero else cosines)


def calibrate(
    scores: torch.Tensor,
    correct: torch.Tensor,
    responses: torch.Tensor | None = None,
    *,
    average: Literal["micro", "macro"] = "micro",
    bounds: tuple[float, float] | None = None,
    unit: str = "250 * max(cos, 0)",
) -> dict[str, float | int | str]:
    """Baselines from mentions of the untrained model; plain numbers and strings, ready for JSON. Eq. 7.

    Args: scores (N,), correct (N,) bool; `responses` (N,), which response each mention is in, only for
    `average="macro"`, where a response counts in the mean of a group it has mentions of. `bounds` = (S_min,
    S_max); None: the lowest and highest score here. `unit` is kept with the numbers: they mean nothing on
    another scale.
    Returns: correct (S_gt), hallucinated (S_hal), low (S_min), high (S_max), std (spread within the groups,
    pooled), correct_mentions, hallucinated_mentions, average, unit.
    Raises ValueError on wrong shapes, scores that are not finite or outside `bounds`, or an empty group.
    """
    if scores.ndim != 1 or scores.shape != correct.shape or correct.dtype != torch.bool:
        raise ValueError(f"scores {list(scores.shape)} and correct {list(correct.shape)} {correct.dtype} must"
                         " be (N,) and (N,) bool")
    if average not in ("micro", "macro") or (average == "macro") != (responses is not None):
        raise ValueError(f'average is "micro", or "macro" with `responses`, not {average!r}')
    scores = scores.detach().double()
    low, high = bounds or (scores.min().item(), scores.max().item()) if len(scores) else (0.0, 0.0)
    if not (scores.isfinite() & (scores >= low) & (scores <= high)).all():
        raise ValueError(f"scores must be finite and within the bounds ({low}, {high})")
    means, squares = {}, 0.0
    for name, members in (("correct", correct), ("hallucinated", ~correct)):
        if not members.any():
            raise ValueError(f"no {name} mention among {len(scores)}: use more responses")
        means[name] = _mean(scores[members], responses[members] if average == "macro" else None)
        squares += (scores[members] - scores[members].mean()).square().sum().item()
    return means | {
        "low": low,
        "high": high,
        "std": math.sqrt(squares / max(1, len(scores) - 2)),
        "correct_mentions": int(correct.sum()),
        "hallucinated_mentions": int((~correct).sum()),
        "average": average,
        "unit": unit,
    }


def mention_rewards(
    scores: torch.Tensor,
    baselines: dict[str, float | int | str],
    *,
    margin: float = 10.0,
    margin_unit: Literal["score", "std"] = "score",
    margin_mode: Literal["outward", "inward", "none"] = "outward",
    norm: Literal["baseline_minmax", "baseline_minus_margin", "none"] = "baseline_minmax",
    limit: float = 1.0,
) -> torch.Tensor:
    """Reward of each mention, (N,), no gradient: positive above one boundary, negative below the other. Eq. 8

    Args: scores (N,) in the unit of `baselines`, which come from `calibrate`. All options are reconstructed.
    Raises ValueError if the boundaries cross, or if a boundary lies outside S_min ... S_max so that the
    normaliser has nothing to divide by, or on an unknown option.
    """
    if margin_mode not in ("outward", "inward", "none") or margin_unit not in ("score", "std") or margin < 0:
        raise ValueError(f"unusable margin {margin} {margin_unit!r} {margin_mode!r}")
    if norm not in ("baseline_minmax", "baseline_minus_margin", "none"):
        raise ValueError(f"norm {norm!r} is none of baseline_minmax, baseline_minus_margin, none")
    right, wrong, low, high = (baselines[k] for k in ("correct", "hallucinated", "low", "high"))
    margin *= {"outward": 1, "inward": -1, "none": 0}[margin_mode]
    margin *= baselines["std"] if margin_unit == "std" else 1
    upper, lower = right + margin, wrong - margin
    if upper < lower:
        raise ValueError(f"the boundaries cross: scores above {upper:.4g} are good, those"
                         f" below {lower:.4g} bad (S_gt {right:.4g}, S_hal {wrong:.4g}, {baselines['unit']})")
    if norm == "baseline_minus_margin":
        right, wrong = upper, lower

    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    rewards = torch.zeros_like(scores)
    for chosen, start, span in ((scores > upper, right, high - right), (scores < lower, wrong, wrong - low)):
        if norm == "none":
            span = 1.0
        if chosen.any() and not span > 0:
            raise ValueError(f"cannot normalise from {start:.4g}: S_min {low:.4g} and S_max {high:.4g} leave"
                             f" a range of {span:.4g}; calibrate on more responses or with wider bounds")
        rewards = torch.where(chosen, (scores - start) / span, rewards)
    return rewards.clamp(-limit, limit)


def place(
    rewards: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    stops: torch.Tensor,
    shape: tuple[int, int],
    *,
    position: Literal["last", "spread"] = "last",
) -> torch.Tensor:
    """Put mention rewards on the tokens of a batch, (B, T) = shape; 0 elsewhere. Reconstructed.

    Args: (N,) each; mention i covers the tokens starts[i] <= t < stops[i] of response rows[i]. Whole on the
    last of them, where the word is known, or spread evenly: the sum over tokens is the same, so the length of
    a word in tokens never matters.
    Raises ValueError on wrong shapes, a span that is empty or outside, or an unknown position.
    """
    if rewards.ndim != 1 or not rewards.shape == rows.shape == starts.shape == stops.shape:
        raise ValueError("rewards, rows, starts and stops must all be (N,)")
    if position not in ("last", "spread"):
        raise ValueError(f"position {position!r} is neither last nor spread")
    inside = (0 <= rows) & (rows < shape[0]) & (0 <= starts) & (starts < stops) & (stops <= shape[1])
    if bad := (~inside).nonzero().flatten().tolist():
        i = bad[0]
        raise ValueError(f"mention {i}: tokens {starts[i]} to {stops[i]} of response {rows[i]} are not in"
                         f" {list(shape)}")
    tokens = torch.arange(shape[1], device=rewards.device)
    first = stops - 1 if position == "last" else starts
    covered = (first[:, None] <= tokens) & (tokens < stops[:, None])  # (N, T)
    shares = covered * (rewards / covered.sum(-1))[:, None]  # (N, T)
    return rewards.new_zeros(shape).index_add(0, rows, shares)


def _mean(scores: torch.Tensor, responses: torch.Tensor | None) -> float:
    """Mean of scores, or of the means of the responses that they belong to."""
    if responses is None:
        return scores.mean().item()
    _, rows = responses.unique(return_inverse=True)
    counts = rows.bincount()
    return (scores.new_zeros(len(counts)).index_add(0, rows, scores) / counts).mean().item()


if __name__ == "__main__":
    # Correct mentions score 60, 70, 80, hallucinated ones 40, 50: baselines 70 and 45, range 40 to 80.
    measured = torch.tensor([60.0, 70.0, 80.0, 40.0, 50.0])
    baselines = calibrate(measured, torch.tensor([True, True, True, False, False]))
    rewards = mention_rewards(torch.tensor([78.0, 72.0, 60.0, 42.0, 30.0]), baselines, margin=2.5)
    torch.testing.assert_close(rewards, torch.tensor([0.8, 0.0, 0.0, -0.6, -1.0]))
    spots = torch.tensor([0, 0]), torch.tensor([1, 4]), torch.tensor([3, 5])  # rows, starts, stops
    torch.testing.assert_close(place(rewards[[0, 3]], *spots, (1, 5)), torch.tensor([[0, 0, 0.8, 0, -0.6]]))
    print("fisao ok: baselines 70 and 45, scores 78, 72, 60, 42, 30 give rewards 0.8, 0, 0, -0.6, -1")
