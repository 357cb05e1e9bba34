"""Reinforcement: PPO, RLOO and FiSAO, from the images of a step to its updates. `train.py --loss ppo` hands over.

    calibrate         before the first step: the scale of scores, by answers of the untrained model
    reinforce_step    sample answers -> judge them -> advantages -> epochs of updates -> KL coefficient
    roll_out          sampled answers -> log-probs of policy and reference, values
    ppo_advantages, rloo_advantages, fisao_advantages    rollouts -> what the loss asks for (losses/)

What is measured before training, and kept in `run.state`, plain numbers that are part of the checkpoint:

    ppo, rloo   mean and deviation of the judge's scores, which standardise all later ones
    fisao       baselines of correct and hallucinated words (Eq. 7, losses/fisao.py), and what the verifier says
                of words and sentences before training (the paper's Figures 1 and 4)

The log-probs under which the samples count as drawn (pi_old) are computed by the training forward, not taken
from generation: the two differ by rounding, and the ratios of PPO and RLOO would start away from 1. No
dropout anywhere. `run` is train.py's Run.

Shapes: B answers, k of each prompt next to each other; L longest answer; tiles, P, C as in model/llava.py.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from common import BadInput
from data.batch import BadRecord, collate, look
from data.mentions import find
from losses import fisao, ppo
from metrics.files import read_json
from metrics.score_plot import Panel
from model.logprobs import Packed
from model.lora import Reference
from model.tensors import save_json
from model.training import Log, asked, by_name, hold_back, update
from pairs import online

CALIBRATION = 256  # records whose answers by the untrained model set the scale of scores
SEQUENCES = {"sampled": ("image", "sampled")}


# ------------------------------------------------------------------------------------------------- one step


def reinforce_step(run, picked: list[list[tuple[dict, int]]], step: int, log: Log) -> torch.Tensor:
    """Sample answers, judge them, and learn from them for some epochs. Returns the last gradient norm."""
    args, rollouts = run.args, []
    for part in picked:
        records, seeds = [record for record, _ in part], [seed for _, seed in part]
        answers = online.sample(run.model, run.processor, records, seeds, run.root, samples=args.samples,
                                temperature=args.temperature, max_new_tokens=args.max_new_tokens)
        rollouts.append(roll_out(run.plain, run.reference, records, answers, run.processor, run.root))
    lessons, figures = run.recipe.advantages(rollouts, run.helper, run.state,
                                             bind(run.recipe.parts, vars(args)))
    log.add(figures, sum(len(r.packed.ids) for r in rollouts))
    options = run.options(run.recipe.loss)
    for epoch in range(args.inner_epochs):
        order = list(range(len(rollouts)))
        random.Random(f"{args.seed}/{step}/{epoch}").shuffle(order)  # alike in all processes
        size = len(order) // args.minibatches
        for group in (order[i : i + size] for i in range(0, len(order), size)):
            for i in group:
                hold_back(run, i != group[-1])
                logps, mask, *values = run.scorer(rollouts[i].packed, rollouts[i].features)
                offer = by_name("policy", ["sampled"], logps) | lessons[i] | {"sampled_mask": mask}
                offer |= {"values": values[0]} if values else {}
                losses, metrics = run.recipe.loss(**asked(run.recipe.loss, offer), **options)
                (losses.mean() / len(group)).backward()
                log.add({"loss": losses, **metrics})
            norm = update(run)
    if args.kl_target:
        answers = args.batch_size * args.samples
        kl = run.state["kl"]  # of this step, the mean over all processes
        run.state["kl_coef"] = ppo.adapt_kl(run.state["kl_coef"], kl, answers, target=args.kl_target)
    return norm


# --------------------------------------------------------------------------------- rollouts and advantages


@dataclass
class Rollout:
    """k answers to each of some records, on the model's device."""

    records: list[dict]  # M
    ids: list[list[int]]  # B = M k answers, the end token included where they ended
    texts: list[str]
    ended: Tensor  # (B,) bool
    packed: Packed
    features: Tensor  # (tiles, P, C)
    mask: Tensor  # (B, L) bool
    old: Tensor  # (B, L) token log-probs of the policy that sampled
    reference: Tensor  # (B, L)
    values: Tensor | None  # (B, L) of the critic, if there is one


@torch.no_grad()
def roll_out(scorer, reference: Reference, records: list[dict], answers: list[list[list[int]]], processor,
             root=None) -> Rollout:
    """Score sampled answers, [M][k] token ids (`pairs.online.sample`), under policy and reference."""
    rows = [{**record, "sampled": ids} for record, group in zip(records, answers, strict=True) for ids in group]
    batch = collate(rows, SEQUENCES, processor, root)
    device = scorer.model.device
    packed = batch.packed.to(device)
    features = scorer.model.vision_features(batch.pixels.to(device))
    old, mask, *values = scorer(packed, features)
    with reference():
        expected = scorer(packed, features)[0]
    ids = [row["sampled"] for row in rows]
    ended = torch.tensor([answer[-1] == processor.eos_id for answer in ids], device=device)
    texts = [processor.decode(answer) for answer in ids]
    return Rollout(records, ids, texts, ended, packed, features, mask, old, expected,
                   values[0] if values else None)


MEASURED = ("mean", "std")  # keyword arguments of losses/ that hold what was measured before training, no options


def bind(functions: Iterable[Callable], options: dict) -> SimpleNamespace:
    """Functions of losses/ by their names, their keyword arguments filled in: from the options, else their defaults."""
    bound = {}
    for function in functions:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        given = {p.name: options.get(p.name, p.default) for p in keywords if p.default is not p.empty}
        bound[function.__name__] = partial(function, **given)
    return SimpleNamespace(**bound)


def ppo_advantages(rollouts: list[Rollout], judge, state: dict, parts: SimpleNamespace,
                   ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """PPO: one score an answer, KL penalty in the reward, GAE, whitened over the whole step (losses/ppo.py).

    Args:
        judge: (records, answers as text) -> scores; standardised with the `mean` and `std` of `state`.
        state: plain numbers of the run; `kl_coef`, if present (adapted), takes precedence over the option.
        parts: `token_rewards` and `gae` with their options, from `bind`.
    Returns: for each rollout what the loss asks for beside log-probs and values, and figures for the log.
    """
    marks = [standardised(r, judge, state) for r in rollouts]
    lessons = _lessons(rollouts, state, [{"scores": s} for s in marks], parts)
    return lessons, _figures(rollouts, state) | {"score": torch.cat(marks)}


def fisao_advantages(rollouts: list[Rollout], verifier, state: dict, parts: SimpleNamespace,
                     ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """FiSAO: a reward for each object word, by the verifier, in PPO's token rewards (losses/fisao.py).

    Args:
        verifier: judges.words.Verifier.
        state: holds the `baselines` that `calibrate` measured with the untrained model.
        parts: as for PPO, and `mention_rewards` and `place`.
    The log shows the share of mentions with a reward and, where it is known what the picture shows, the mean
    reward of correct and of hallucinated mentions.
    """
    token_scores, rewards, right = [], [], []
    for r in rollouts:
        k = len(r.ids) // len(r.records)
        references = [record["image"] for record in r.records for _ in range(k)]
        found = verifier(references, r.ids)
        reward = parts.mention_rewards(found.scores, state["baselines"])
        placed = parts.place(reward, found.rows, found.starts, found.stops, r.mask.shape)
        token_scores.append({"token_scores": placed.to(r.old.device)})
        rewards.append(reward)
        right.append(found.correct)
    lessons = _lessons(rollouts, state, token_scores, parts)
    reward, right = torch.cat(rewards), torch.cat(right)  # (N,) each
    figures = _figures(rollouts, state)
    everyone = torch.ones_like(right, dtype=torch.bool)
    for name, values, members in (("rewarded", (reward != 0).float(), everyone), ("reward", reward, everyone),
                                  ("reward/correct", reward, right == 1),
                                  ("reward/hallucinated", reward, right == 0)):
        figures[name] = total(values[members].sum()) / total(members.sum()).clamp(min=1)  # over all processes
    return lessons, figures


def read_baselines(path: Path, unit: str) -> dict:
    """What `losses.fisao.calibrate` measured in an earlier run. BadInput if the file or its unit is not right."""
    baselines = read_json(path)
    numbers = ("correct", "hallucinated", "low", "high", "std")
    if not isinstance(baselines, dict) or not all(isinstance(baselines.get(k), (int, float)) for k in numbers):
        raise BadInput(f"{path}: no baselines of fisao, which have {', '.join(numbers)} and unit")
    if baselines.get("unit") != unit:
        raise BadInput(f"{path}: measured in {baselines.get('unit')!r}, this verifier scores in {unit!r}")
    return baselines


def rloo_advantages(rollouts: list[Rollout], judge, state: dict, parts: SimpleNamespace,
                    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """RLOO: each answer against the mean of its prompt's others (losses/rloo.py). Else as `ppo_advantages`; `parts`
    are `penalised` and `leave_one_out`."""
    lessons, marks = [], []
    state.setdefault("kl_coef", parts.penalised.keywords["kl_coef"])
    for r in rollouts:
        k = len(r.ids) // len(r.records)
        old, expected = r.old.sum(-1), r.reference.sum(-1)  # (B,)
        marks.append(standardised(r, judge, state))
        rewards = parts.penalised(marks[-1], old, expected, kl_coef=state["kl_coef"])
        prompts = torch.arange(len(r.records), device=old.device).repeat_interleave(k)
        advantages = parts.leave_one_out(rewards, prompts, k=k)
        lessons.append({"old_sampled_logps": old, "advantages": advantages})
    return lessons, _figures(rollouts, state) | {"score": torch.cat(marks)}


def standardised(r: Rollout, judge, state: dict) -> Tensor:
    """Scores of the answers (B,), minus the mean and over the deviation of the untrained model's."""
    given = scores_of(judge, r.records, r.texts, len(r.ids) // len(r.records)).to(r.old.device)
    return (given - state.get("mean", 0.0)) / state.get("std", 1.0)


def scores_of(judge, records: list[dict], texts: list[str], k: int) -> Tensor:
    """What the judge gives k answers to each record, (M k,). Raises BadInput where it came to no verdict."""
    judged = judge(records, [texts[i : i + k] for i in range(0, len(texts), k)])
    if None in judged:
        raise BadInput(f"record {records[judged.index(None)]['id']!r}: the judge came to no verdict")
    return torch.tensor([float(score.score) for group in judged for score in group])


def _lessons(rollouts: list[Rollout], state: dict, given: list[dict],
             parts: SimpleNamespace) -> list[dict[str, Tensor]]:
    """Rewards, advantages and returns of PPO, from the scores that are given for answers or tokens."""
    state.setdefault("kl_coef", parts.token_rewards.keywords["kl_coef"])
    advantages, returns = [], []
    for r, scores in zip(rollouts, given, strict=True):
        rewards = parts.token_rewards(r.old, r.reference, r.mask, ended=r.ended, kl_coef=state["kl_coef"], **scores)
        a, g = parts.gae(rewards, r.values, r.mask)
        advantages.append(a)
        returns.append(g)
    masks = [r.mask for r in rollouts]
    tokens, answers = total(sum(m.sum() for m in masks)), total(torch.tensor(float(sum(map(len, masks)))))
    whitened = whiten(advantages, masks)
    return [{"old_sampled_token_logps": r.old, "old_values": r.values, "advantages": a, "returns": g,
             "mean_tokens": tokens / answers} for r, a, g in zip(rollouts, whitened, returns)]


def whiten(advantages: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """`losses.ppo.whiten` over all processes' micro-batches: mean 0, variance 1 (unbiased) over real tokens."""
    chosen = torch.cat([a[m] for a, m in zip(advantages, masks)]).double()
    n = total(torch.tensor(float(len(chosen))))
    mean = total(chosen.sum()) / n
    variance = total((chosen - mean).square().sum()) / (n - 1)
    return [((a - mean) * torch.rsqrt(variance + 1e-8)).to(a.dtype).masked_fill(~m, 0.0)
            for a, m in zip(advantages, masks)]


def total(x: Tensor) -> Tensor:
    """Sum over all processes, in double precision."""
    x = x.double().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def _figures(rollouts: list[Rollout], state: dict) -> dict[str, Tensor]:
    """Nats away from the reference, tokens, whether an answer ended; state["kl"] is the mean of all processes."""
    kl = torch.cat([(r.old - r.reference).masked_fill(~r.mask, 0.0).sum(-1) for r in rollouts])  # (B,)
    state["kl"] = (total(kl.sum()) / total(torch.tensor(float(len(kl))))).item()
    return {
        "kl": kl,
        "tokens": torch.cat([r.mask.sum(-1).float() for r in rollouts]),
        "ended": torch.cat([r.ended.float() for r in rollouts]),
        "kl_coef": torch.tensor(state["kl_coef"]),
    }


def verifier_scores(
    references: list[str], ids: list[list[int]], texts: list[str], verifier
) -> dict[str, list[float]]:
    """What FiSAO's verifier says of answers about known pictures: scores of correct and hallucinated words and
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


def panels(before: dict[str, list[float]], after: dict[str, list[float]], unit: str) -> list[Panel]:
    """Histograms of words and sentences, before and after."""
    result = []
    for what in ("words", "sentences"):
        for when, scores in (("before", before), ("after", after)):
            series = {truth: scores[f"{what}, {truth}"] for truth in ("correct", "hallucinated")}
            series = {truth: values for truth, values in series.items() if values}
            result += ([Panel(f"{what.capitalize()}, {when}", f"score of {what}: {unit}", series)]
                       if series else [])
    return result


# -------------------------------------------------------------------------------------------- calibration


def answers_to(run, records: list[dict], temperature: float) -> list[list[int]]:
    """One answer to each record, token ids; the i-th record's seed is i."""
    ids, size = [], run.args.micro_batch_size
    for start in range(0, len(records), size):
        part = records[start : start + size]
        groups = online.sample(run.model, run.processor, part, list(range(start, start + len(part))), run.root,
                               samples=1, temperature=temperature, max_new_tokens=run.args.max_new_tokens)
        ids += [group[0] for group in groups]
    return ids


def readable(run, records: list[dict]) -> list[dict]:
    """The first of these records whose pictures can be decoded; BadInput of one that cannot, unless the run skips
    bad records."""
    picked: list[dict] = []
    for record in records:
        if len(picked) == CALIBRATION:
            break
        try:
            look(record, run.root)
            picked.append(record)
        except BadRecord as error:
            if run.args.bad_records == "stop":
                raise BadInput(f"{error}; mend it, or leave it out with --bad-records skip") from None
    return picked


def look_at_scores(run) -> dict[str, list[float]]:
    """What the verifier says of the policy's answers to the first records whose objects are known."""
    picked = readable(run, [r for r in run.records if run.helper.known(r["image"])])
    ids = answers_to(run, picked, temperature=0.0)
    texts = [run.processor.decode(answer) for answer in ids]
    return verifier_scores([r["image"] for r in picked], ids, texts, run.helper)


def calibrate(run) -> None:
    """Measure what the chosen loss needs; `run.state` holds it from then on."""
    if run.recipe.asks_for("verifier"):
        run.state["baselines"] = fisao_baselines(run)
        if any(run.helper.known(record["image"]) for record in run.records):
            run.state["scores"] = look_at_scores(run)
        if run.rank == 0:
            save_json(run.state["baselines"], run.args.out / "baselines.json")
        return
    picked = readable(run, run.records)
    ids = answers_to(run, picked, run.args.temperature)
    size = run.args.micro_batch_size
    parts = [slice(start, start + size) for start in range(0, len(picked), size)]
    scores = torch.cat([scores_of(run.helper, picked[part], [run.processor.decode(x) for x in ids[part]], 1)
                        for part in parts])
    run.state |= {"mean": scores.mean().item(), "std": max(scores.std().item(), 1e-6)}


def fisao_baselines(run) -> dict:
    """S_gt and S_hal of Eq. 7 and what goes with them, of --baselines or of the untrained model's answers."""
    if path := run.args.baselines:
        return read_baselines(path, run.helper.unit)
    picked = readable(run, [record for record in run.records if run.helper.known(record["image"])])
    if not picked:
        raise BadInput("fisao measures its baselines on pictures whose objects are known, and of none of these they"
                       " are: give --objects FILE, or the --baselines FILE of another run")
    found = run.helper([record["image"] for record in picked], answers_to(run, picked, run.args.temperature))
    known = found.correct >= 0
    if not known.any():
        raise BadInput(f"fisao finds no known object word in {len(picked)} answers of the model")
    return fisao.calibrate(found.scores[known], found.correct[known] == 1, unit=run.helper.unit)
