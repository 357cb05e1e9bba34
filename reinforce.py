"""Reinforcement: PPO, RLOO and FiSAO, from the images of a step to its updates. `train.py --loss ppo` comes here.

    calibrate         before the first step: the scale of scores, by responses of the untrained model
    reinforce_step    sample responses -> judge them -> advantages -> epochs of updates -> KL coefficient
    roll_out          sampled responses -> log-probs of policy and reference, values
    ppo_advantages, rloo_advantages, fisao_advantages    rollouts -> what the loss asks for (losses/)

An `advantages` function takes (rollouts, parts, memory) and what it asks for by name: a judge or a verifier.
What is measured before training is kept in `Memory`, which is part of the checkpoint:

    ppo, rloo   mean and deviation of the judge's scores, which standardise all later ones
    fisao       baselines of correct and hallucinated words (Eq. 7, losses/fisao.py), and what the verifier says
                of words and sentences before training (the paper's Figures 1 and 4)

The log-probs under which the samples count as drawn (pi_old) are computed by the training forward, not taken
from generation: the two differ by rounding, and the ratios of PPO and RLOO would start away from 1. No
dropout anywhere.

Shapes: B responses, k of each prompt next to each other; L longest response; tiles, P, C as in model/llava.py.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

import svg
from common import BadInput, kwargs_of, read_json, write_text
from data.batch import BadRecord, check_image, collate
from data.mentions import find
from data.processor import Processor
from judges.scores import Judge
from judges.words import Verifier
from losses import fisao, ppo
from model.log import Log
from model.logprobs import Packed
from model.lora import Reference
from model.training import Policy, named, pick
from pairs import online

CALIBRATION = 256  # records whose responses by the untrained model set the scale of scores
SEQUENCES = {"sampled": dict(image="image", response="sampled")}


@dataclass(frozen=True)
class Settings:
    """Options of train.py."""

    samples: int  # responses to each image
    temperature: float
    max_new_tokens: int
    batch_size: int  # records a step, over all processes
    micro_batch_size: int
    inner_epochs: int
    minibatches: int  # updates an epoch
    kl_target: float  # nats a response, 0: the coefficient is fixed
    seed: int
    bad_records: str  # "stop" or "skip"


@dataclass
class Memory:
    """What reinforcement remembers from step to step: plain numbers, part of the checkpoint."""

    kl_coef: float | None = None  # None before the first step, which takes the option's
    mean: float = 0.0  # of the judge's scores before training
    std: float = 1.0
    baselines: dict = field(default_factory=dict)  # of losses.fisao.calibrate
    scores: dict[str, list[float]] = field(default_factory=dict)  # of `verifier_scores` before training


@dataclass
class Reinforcement:
    """A loss of reinforcement around a policy."""

    policy: Policy
    processor: Processor
    root: Path | None
    loss: Callable  # of losses/, its options filled in
    advantages: Callable
    parts: SimpleNamespace  # functions of losses/ that `advantages` puts together, from `bind`
    judges: dict[str, Callable]  # the `judge` or `verifier` that `advantages` asks for
    settings: Settings
    memory: Memory = field(default_factory=Memory)


# ------------------------------------------------------------------------------------------------- one step


def reinforce_step(run: Reinforcement, drawn: list[list[tuple[dict, int]]], step: int, log: Log) -> float:
    """Sample responses, judge them, and learn from them for some epochs, up to an update whose gradient is not finite.
    Returns the last gradient norm.

    Args:
        drawn: (record, seed) of each micro-batch.
    """
    policy, settings, memory, rollouts = run.policy, run.settings, run.memory, []
    parts = [([record for record, _ in part], [seed for _, seed in part]) for part in drawn]
    with policy.whole():
        sampled = [sample(run, records, seeds, settings.samples, settings.temperature) for records, seeds in parts]
    for (records, _), responses in zip(parts, sampled):
        rollouts.append(roll_out(policy.plain, policy.reference, records, responses, run.processor, run.root))
    targets, metrics = run.advantages(rollouts, run.parts, memory, **run.judges)
    log.add(metrics, sum(len(r.packed.ids) for r in rollouts))
    for epoch in range(settings.inner_epochs):
        order = list(range(len(rollouts)))
        random.Random(f"{settings.seed}/{step}/{epoch}").shuffle(order)  # the same in all processes
        size = len(order) // settings.minibatches
        for group in (order[i : i + size] for i in range(0, len(order), size)):
            for i in group:
                with policy.no_sync(more=i != group[-1]):
                    inputs = named("policy", ["sampled"], policy.scorer(rollouts[i].packed, rollouts[i].features))
                    losses, of_loss = run.loss(**pick(run.loss, inputs | targets[i]))  # (B,)
                    # All micro-batches have equally many responses: the mean of their means is that of all.
                    policy.backward(losses.mean() / len(group))
                log.add({"loss": losses, **of_loss})
            norm = policy.update()
            if not math.isfinite(norm):
                return norm
    if settings.kl_target:
        responses = settings.batch_size * settings.samples
        kl = over_all(metrics["kl"].sum()) / over_all(torch.tensor(float(len(metrics["kl"]))))  # () of this step
        memory.kl_coef = ppo.adapt_kl(memory.kl_coef, kl.item(), responses, target=settings.kl_target)
    return norm


def sample(run: Reinforcement, records: list[dict], seeds: list[int], samples: int, temperature: float,
           ) -> list[list[list[int]]]:
    """Responses of the policy to each record, [record][sample] token ids."""
    with run.policy.whole() as whole:
        return online.sample(whole.model, run.processor, records, seeds, run.root, samples=samples,
                             temperature=temperature, max_new_tokens=run.settings.max_new_tokens)


# --------------------------------------------------------------------------------- rollouts and advantages


@dataclass
class Rollout:
    """k responses to each of some records, on the model's device."""

    records: list[dict]  # M
    ids: list[list[int]]  # B = M k responses, with the end token where they ended
    texts: list[str]
    ended: Tensor  # (B,) bool
    packed: Packed
    features: Tensor  # (tiles, P, C)
    mask: Tensor  # (B, L) bool
    old: Tensor  # (B, L) token log-probs of the policy that sampled
    reference: Tensor  # (B, L)
    values: Tensor | None  # (B, L) of the critic, if there is one


@torch.no_grad()
def roll_out(scorer, reference: Reference, records: list[dict], responses: list[list[list[int]]],
             processor: Processor, root: Path | None = None) -> Rollout:
    """Score sampled responses, [M][k] token ids (`pairs.online.sample`), under policy and reference."""
    rows = [{**record, "sampled": ids} for record, group in zip(records, responses, strict=True) for ids in group]
    device = scorer.model.device
    batch = collate(rows, SEQUENCES, processor, root).to(device)
    features = scorer.model.seen(batch.pixels)  # (tiles, P, C)
    old, mask, *values = scorer(batch.packed, features)
    with reference():
        expected = scorer(batch.packed, features)[0]
    ids = [row["sampled"] for row in rows]
    ended = torch.tensor([response[-1] == processor.eos_id for response in ids], device=device)
    texts = [processor.decode(response) for response in ids]
    return Rollout(records, ids, texts, ended, batch.packed, features, mask, old, expected,
                   values[0] if values else None)


def bind(functions: Iterable[Callable], options: dict) -> SimpleNamespace:
    """Functions of losses/ by their names, their keyword arguments filled in: from the options, else their defaults."""
    return SimpleNamespace(**{f.__name__: partial(f, **kwargs_of(f, options)) for f in functions})


def ppo_advantages(rollouts: list[Rollout], parts: SimpleNamespace, memory: Memory, judge: Judge,
                   ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """PPO: one score a response, KL penalty in the reward, GAE, whitened over the whole step (losses/ppo.py).

    Args:
        parts: `token_rewards` and `gae` with their options, from `bind`.
        memory: its `mean` and `std` standardise the scores; its `kl_coef` takes precedence over the option.
    Returns: for each rollout what the loss asks for besides log-probs, mask and values; and metrics for the log.
    """
    scores = [standardised(r, judge, memory) for r in rollouts]  # (B,) each
    targets = ppo_targets(rollouts, parts, memory, [{"scores": s} for s in scores])
    return targets, rollout_metrics(rollouts, memory) | {"score": torch.cat(scores)}


def fisao_advantages(rollouts: list[Rollout], parts: SimpleNamespace, memory: Memory, verifier: Verifier,
                     ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """FiSAO: a reward for each object word, by the verifier, in PPO's token rewards (losses/fisao.py).

    Args:
        parts: as for PPO, and `mention_rewards` and `place`.
        memory: holds the `baselines` that `calibrate` measured with the untrained model.
    The log shows the share of mentions with a reward and, where it is known what the image shows, the mean
    reward of correct and of hallucinated mentions.
    """
    token_scores, rewards, right = [], [], []
    for r in rollouts:
        k = len(r.ids) // len(r.records)
        references = [record["image"] for record in r.records for _ in range(k)]
        found = verifier(references, r.ids)
        reward = word_rewards(found.scores, memory.baselines, parts)  # (N,)
        placed = parts.place(reward, found.rows, found.starts, found.stops, r.mask.shape)
        token_scores.append({"token_scores": placed.to(r.old.device)})
        rewards.append(reward)
        right.append(found.correct)
    targets = ppo_targets(rollouts, parts, memory, token_scores)
    reward, right = torch.cat(rewards), torch.cat(right)  # (N,) each
    metrics = rollout_metrics(rollouts, memory)
    everyone = torch.ones_like(right, dtype=torch.bool)
    for name, values, members in (("rewarded", (reward != 0).float(), everyone), ("reward", reward, everyone),
                                  ("reward/correct", reward, right == 1),
                                  ("reward/hallucinated", reward, right == 0)):
        metrics[name] = over_all(values[members].sum()) / over_all(members.sum()).clamp(min=1)
    return targets, metrics


def word_rewards(scores: Tensor, baselines: dict, parts: SimpleNamespace) -> Tensor:
    """`losses.fisao.mention_rewards`, (N,); BadInput where what was measured does not fit the options."""
    try:
        return parts.mention_rewards(scores, baselines)
    except ValueError as error:
        raise BadInput(f"fisao's baselines do not suit its options: {error}") from None


def rloo_advantages(rollouts: list[Rollout], parts: SimpleNamespace, memory: Memory, judge: Judge,
                    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """RLOO: each response against the mean of its prompt's others (losses/rloo.py). Else as `ppo_advantages`;
    `parts` are `penalised` and `leave_one_out`."""
    targets, scores = [], []
    if memory.kl_coef is None:
        memory.kl_coef = parts.penalised.keywords["kl_coef"]
    for r in rollouts:
        k = len(r.ids) // len(r.records)
        old, expected = r.old.sum(-1), r.reference.sum(-1)  # (B,)
        scores.append(standardised(r, judge, memory))
        rewards = parts.penalised(scores[-1], old, expected, kl_coef=memory.kl_coef)
        prompts = torch.arange(len(r.records), device=old.device).repeat_interleave(k)
        advantages = parts.leave_one_out(rewards, prompts, k=k)
        targets.append({"old_sampled_logps": old, "advantages": advantages})
    return targets, rollout_metrics(rollouts, memory) | {"score": torch.cat(scores)}


def standardised(r: Rollout, judge: Judge, memory: Memory) -> Tensor:
    """Scores of the responses (B,), minus the mean and over the deviation of the untrained model's."""
    given = scores_of(judge, r.records, r.texts, len(r.ids) // len(r.records)).to(r.old.device)
    return (given - memory.mean) / memory.std


def scores_of(judge: Judge, records: list[dict], texts: list[str], k: int) -> Tensor:
    """What the judge gives k responses to each record, (M k,). Raises BadInput where it came to no verdict."""
    judged = judge(records, [texts[i : i + k] for i in range(0, len(texts), k)])
    if None in judged:
        raise BadInput(f"record {records[judged.index(None)]['id']!r}: the judge came to no verdict")
    return torch.tensor([float(score.score) for group in judged for score in group])


def ppo_targets(rollouts: list[Rollout], parts: SimpleNamespace, memory: Memory,
                given: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Advantages and returns of PPO, from the scores that are given for responses or tokens of each rollout."""
    if memory.kl_coef is None:
        memory.kl_coef = parts.token_rewards.keywords["kl_coef"]
    advantages, returns = [], []
    for r, scores in zip(rollouts, given, strict=True):
        rewards = parts.token_rewards(r.old, r.reference, r.mask, ended=r.ended, kl_coef=memory.kl_coef, **scores)
        a, g = parts.gae(rewards, r.values, r.mask)
        advantages.append(a)
        returns.append(g)
    masks = [r.mask for r in rollouts]
    tokens = over_all(sum(m.sum() for m in masks))
    responses = over_all(torch.tensor(float(sum(map(len, masks)))))
    whitened = whiten(advantages, masks)
    return [{"old_sampled_token_logps": r.old, "old_values": r.values, "advantages": a, "returns": g,
             "mean_tokens": tokens / responses} for r, a, g in zip(rollouts, whitened, returns)]


def whiten(advantages: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """`losses.ppo.whiten` over all processes' micro-batches: mean 0, variance 1 (unbiased) over real tokens."""
    chosen = torch.cat([a[m] for a, m in zip(advantages, masks)]).double()
    n = over_all(torch.tensor(float(len(chosen))))
    mean = over_all(chosen.sum()) / n
    variance = over_all((chosen - mean).square().sum()) / (n - 1)
    return [((a - mean) * torch.rsqrt(variance + 1e-8)).to(a.dtype).masked_fill(~m, 0.0)
            for a, m in zip(advantages, masks)]


def over_all(x: Tensor) -> Tensor:
    """Sum over all processes, in double precision."""
    x = x.double().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def rollout_metrics(rollouts: list[Rollout], memory: Memory) -> dict[str, Tensor]:
    """Nats away from the reference, tokens, whether a response ended, (B,) each; the KL coefficient."""
    return {
        "kl": torch.cat([(r.old - r.reference).masked_fill(~r.mask, 0.0).sum(-1) for r in rollouts]),
        "tokens": torch.cat([r.mask.sum(-1).float() for r in rollouts]),
        "ended": torch.cat([r.ended.float() for r in rollouts]),
        "kl_coef": torch.tensor(memory.kl_coef),
    }


# -------------------------------------------------------------------------------------------- calibration


def calibrate(run: Reinforcement, records: list[dict], baselines: Path | None = None) -> None:
    """Measure what the loss needs with the untrained model, and remember it.

    Args:
        baselines: of fisao, measured by another run, to take instead.
    Raises BadInput where that cannot be measured.
    """
    if verifier := run.judges.get("verifier"):
        known = [record for record in records if verifier.known(record["image"])]
        run.memory.baselines = (read_baselines(baselines, verifier.unit) if baselines else
                                measure_baselines(run, known))
        word_rewards(torch.empty(0), run.memory.baselines, run.parts)  # do --margin and the baselines fit?
        run.memory.scores = look_at_scores(run, known) if known else {}
        return
    picked = readable(run, records)
    if len(picked) < 2:
        raise BadInput(f"the scale of the judge's scores is measured on two records or more, not {len(picked)}")
    ids = responses_to(run, picked, run.settings.temperature)
    size = run.settings.micro_batch_size
    parts = [slice(start, start + size) for start in range(0, len(picked), size)]
    scores = torch.cat([scores_of(run.judges["judge"], picked[part], [run.processor.decode(x) for x in ids[part]], 1)
                        for part in parts])
    run.memory.mean, run.memory.std = scores.mean().item(), max(scores.std().item(), 1e-6)


def responses_to(run: Reinforcement, records: list[dict], temperature: float) -> list[list[int]]:
    """One response to each record, token ids; the i-th record's seed is i."""
    ids, size = [], run.settings.micro_batch_size
    for start in range(0, len(records), size):
        part = records[start : start + size]
        groups = sample(run, part, list(range(start, start + len(part))), 1, temperature)
        ids += [group[0] for group in groups]
    return ids


def readable(run: Reinforcement, records: list[dict]) -> list[dict]:
    """The first of these records whose images can be decoded; BadInput of one that cannot, unless the run skips
    bad records."""
    picked: list[dict] = []
    for record in records:
        if len(picked) == CALIBRATION:
            break
        try:
            check_image(record, run.root)
            picked.append(record)
        except BadRecord as error:
            if run.settings.bad_records == "stop":
                raise BadInput(f"{error}; mend it, or leave it out with --bad-records skip") from None
    return picked


def measure_baselines(run: Reinforcement, records: list[dict]) -> dict:
    """S_gt and S_hal of Eq. 7 and what goes with them, of the untrained model's responses to images that are known."""
    picked, verifier = readable(run, records), run.judges["verifier"]
    if not picked:
        raise BadInput("fisao needs images with known objects to measure its baselines, and none of these has any:"
                       " give --objects FILE, or the --baselines FILE of another run")
    found = verifier([record["image"] for record in picked], responses_to(run, picked, run.settings.temperature))
    for truth, what in ((1, "correct"), (0, "hallucinated")):
        if not (found.correct == truth).any():
            raise BadInput(f"fisao finds no {what} object word in {len(picked)} responses of the model: measure its"
                           " baselines on more records, or give the --baselines FILE of another run")
    known = found.correct >= 0
    return fisao.calibrate(found.scores[known], found.correct[known] == 1, unit=verifier.unit)


def read_baselines(path: Path, unit: str) -> dict:
    """What `losses.fisao.calibrate` measured in an earlier run. BadInput if the file or its unit is not right."""
    baselines = read_json(path)
    numbers = ("correct", "hallucinated", "low", "high", "std")
    if not all(isinstance(baselines.get(k), (int, float)) for k in numbers):
        raise BadInput(f"{path}: no baselines of fisao, which have {', '.join(numbers)} and unit")
    if baselines.get("unit") != unit:
        raise BadInput(f"{path}: measured in {baselines.get('unit')!r}, this verifier scores in {unit!r}")
    return baselines


# ------------------------------------------------------------------------- what FiSAO's verifier says, drawn


def verifier_scores(
    references: list[str], ids: list[list[int]], texts: list[str], verifier
) -> dict[str, list[float]]:
    """What FiSAO's verifier says of responses about known images: scores of correct and hallucinated words and
    of sentences with and without a hallucinated word (the paper's Figures 1 and 4). Sentences without an object
    are left out."""
    found = verifier(references, ids)
    right = found.correct
    scores = {"words, correct": found.scores[right == 1], "words, hallucinated": found.scores[right == 0]}
    lines, sentences, shown = verifier.sentences(references, texts)
    truth = []
    for reference, sentence in zip(shown, sentences):
        present, classes = verifier.known(reference)
        named = {verifier.entities[word] for word, *_ in find(sentence, verifier.entities)} & classes
        truth.append(-1 if not named else int(named <= present))
    truth = torch.tensor(truth)
    scores |= {"sentences, correct": lines[truth == 1], "sentences, hallucinated": lines[truth == 0]}
    return {name: values.tolist() for name, values in scores.items()}


def panels(before: dict[str, list[float]], after: dict[str, list[float]], unit: str) -> list[svg.Panel]:
    """Histograms of words and sentences, before and after."""
    result = []
    for what in ("words", "sentences"):
        for when, scores in (("before", before), ("after", after)):
            series = {truth: values for truth in ("correct", "hallucinated") if (values := scores[f"{what}, {truth}"])}
            if series:
                result.append(svg.Panel(f"{what.capitalize()}, {when}", f"score of {what}: {unit}", series))
    return result


def look_at_scores(run: Reinforcement, known: list[dict]) -> dict[str, list[float]]:
    """What the verifier says of the policy's greedy responses to the first records whose objects are known."""
    picked = readable(run, known)
    ids = responses_to(run, picked, temperature=0.0)
    texts = [run.processor.decode(response) for response in ids]
    return verifier_scores([r["image"] for r in picked], ids, texts, run.judges["verifier"])


def draw_scores(run: Reinforcement, records: list[dict], path: Path) -> None:
    """Histograms of what the verifier says before and after training, if it says anything."""
    if run.memory.scores:
        verifier = run.judges["verifier"]
        after = look_at_scores(run, [record for record in records if verifier.known(record["image"])])
        if drawn := panels(run.memory.scores, after, verifier.unit):  # responses may have no object words
            write_text(path, svg.histograms(drawn))
