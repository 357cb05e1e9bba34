"""Pairs made during training, of what the policy says now.

Understanding Alignment in Multimodal LLMs, E. Amirloo et al., 2024, arXiv 2407.02477; online DPO: S. Guo et
al., 2024, arXiv 2402.04792.

    online_dpo     (y~+, y~-) ~ pi(. | x), best and worst of the samples by a judge
    mixed_dpo      alpha ~ Bernoulli(p) for each example: given pair if alpha = 1, else an online one    Eq. 4
    bdhs_online    y~- ~ pi(. | x~, y+): completed from y+ with hidden image tokens (pairs/bdhs.py); it
                   joins the given pair, losses/bdhs.py averages both losses                             Eq. 5

The samples are data: the loss computes their log-probs again in its own forward pass, so nothing is
differentiated through the sampling. Ties, duplicates, empty, unfinished and unusable responses teach nothing: such an
example keeps its place in the batch with weight 0, and the mean divides by all examples of the batch, not by the useful
ones. That is the paper's mean over what is sampled: there a duplicate is an example whose gradient is 0, and so, while
policy and reference agree, is in expectation a tie that a coin decides. A pair then counts the same whatever its
neighbours are and however the batch is cut, and a step with few useful pairs is a small one.

    symbol     argument      meaning
    x          records       records with `id`, `image`, `prompt` and, where p > 0, `chosen` and `rejected`
               seeds         one number for each record: all that is drawn for it depends on it alone
    p          offline       share of given pairs; 0 is online DPO, the paper's mixture 0.5
               samples       responses to each image; the paper draws 2
               temperature   of the sampling
               max_new_tokens  of a response
    rho_th     rho_th        BDHS: share of the image tokens that is hidden
    N          iterations    BDHS: attempts, the last one free
    eps_s      eps_s         BDHS: similarity that a completed response must stay below

A made record holds `chosen` and `rejected` as token ids, end token included, and `weight`, 0 or 1.
As in the paper, alpha is drawn for each example. Departure: its annotator is LLaVA-1.6-34B, here any judge
of pairs/rank.py.
"""

import random
from pathlib import Path

from common import BadInput
from data.check import problems_of
from data.processor import Processor
from judges.scores import Judge, order
from losses import dpo
from model.generate import generate
from model.llava import Llava
from pairs.bdhs import bdhs_pairs


def sample(model: Llava, processor: Processor, records: list[dict], seeds: list[int], root: Path | None, *,
           samples: int, temperature: float, max_new_tokens: int) -> list[list[list[int]]]:
    """Responses of the policy without dropout: [record][sample] token ids, the end token last if it was drawn.

    Records of the same image share one pass of the vision tower.
    """
    asked = processor.questions([record["image"] for record in records], [record["prompt"] for record in records], root)
    groups = generate(model, **asked, eos_id=processor.eos_id, n=samples, max_new_tokens=max_new_tokens,
                      temperature=temperature, seeds=seeds)
    return [[ids + ([processor.eos_id] if len(ids) < max_new_tokens else []) for ids in group] for group in groups]


def ranked_pairs(records: list[dict], seeds: list[int], model: Llava, processor: Processor, root: Path | None,
                 judge: Judge, *, samples: int = 2, temperature: float = 1.0, max_new_tokens: int = 96,
                 offline: float = 0.0) -> list[dict]:
    """Online and mixed DPO: for each record a pair to train on now. Raises BadInput on `samples` below 2."""
    if samples < 2 or not 0 <= offline <= 1:
        raise BadInput(f"{samples} samples and a share {offline} of given pairs: need at least 2, and 0 to 1")
    online = [i for i, seed in enumerate(seeds) if random.Random(f"{seed}/alpha").random() >= offline]  # alpha is 0
    result = [{**record, "weight": 1.0} for record in records]
    if not online:
        return result
    drawn = [records[i] for i in online]
    responses = sample(model, processor, drawn, [seeds[i] for i in online], root, samples=samples,
                     temperature=temperature, max_new_tokens=max_new_tokens)
    texts = [[processor.decode(ids) if ids[-1] == processor.eos_id else "" for ids in group] for group in responses]
    for i, ids, said, judged in zip(online, responses, texts, judge(drawn, texts), strict=True):
        ranking = order(said, judged) if judged else []
        useful = len(ranking) > 1 and judged[ranking[0]].key < judged[ranking[-1]].key \
            and said[ranking[0]] != said[ranking[-1]]
        best, worst = (ranking[0], ranking[-1]) if useful else (0, 1)
        result[i] |= {"chosen": ids[best], "rejected": ids[worst], "weight": float(useful)}
    return result


def mixed_pairs(records: list[dict], seeds: list[int], model: Llava, processor: Processor, root: Path | None,
                judge: Judge, *, samples: int = 2, temperature: float = 1.0, max_new_tokens: int = 96,
                offline: float = 0.5) -> list[dict]:
    """Mixed DPO, Eq. 4: `ranked_pairs` with the paper's p = 0.5."""
    return ranked_pairs(records, seeds, model, processor, root, judge, samples=samples, temperature=temperature,
                        max_new_tokens=max_new_tokens, offline=offline)


def bdhs_triples(records: list[dict], seeds: list[int], model: Llava, processor: Processor, root: Path | None,
                 similarity, *, rho_th: float = 0.99, iterations: int = 5, eps_s: float = 0.97,
                 temperature: float = 1.0, max_new_tokens: int = 96) -> list[dict]:
    """Online BDHS: each given pair with one more rejected response, `generated`."""
    asked = [{**record, "id": f"{record['id']}/{seed}"} for record, seed in zip(records, seeds)]
    made, _ = bdhs_pairs(asked, model, processor, similarity, root=root, rho_th=rho_th, iterations=iterations,
                         eps_s=eps_s, temperature=temperature, max_new_tokens=max_new_tokens)
    generated = {pair["id"]: pair["rejected"] for pair in made
                 if not problems_of(pair, processor, root, dpo.SEQUENCES)}
    return [{**record, "generated": generated.get(asking["id"], record["rejected"]),
             "weight": float(asking["id"] in generated)} for record, asking in zip(records, asked)]
