"""Held-out preference pairs: does the model prefer the chosen response more than its reference policy does?

Paper: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, arXiv:2305.18290, Section 4. With the implicit
reward r(y) = beta [log pi(y | x, v) - log pi_ref(y | x, v)] of the chosen y_w and the rejected y_l:

    margin              = mean of d, d = r(y_w) - r(y_l)
    accuracy            = #{d > 0} / n                                           a tie is no success
    likelihood_accuracy = #{log pi(y_w | x, v) > log pi(y_l | x, v)} / n         without the reference
    loss                = mean of -log sigma(d)                                  DPO's on these pairs; ln 2 at the start

| symbol              | argument                        | type                                                      |
|---------------------|---------------------------------|-----------------------------------------------------------|
| log pi(y_w | x, v)  | said[id]["policy_chosen"]       | float, sum over the response tokens, EOS included (*)     |
| log pi(y_l | x, v)  | said[id]["policy_rejected"]     | float                                                     |
| log pi_ref(.)       | said[id]["reference_chosen"], .. | float                                                    |

(*) but after a `context`, which the response continues (data/records.py).

Options
    beta  scale of the rewards; changes neither accuracy

The file is one of pairs, in any format of data/formats.py. The reference is a second model, or the model itself with
its adapters off, which is what it was before training if nothing but adapters trained.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from common import BadInput
from data.batch import collate
from data.formats import load
from data.processor import Processor
from losses.dpo import SEQUENCES
from metrics.benchmark import Benchmark
from model.llava import Llava
from model.logprobs import Scorer
from model.lora import adapters_off, lora_layers

FIGURES = ("accuracy", "likelihood_accuracy", "margin", "reward_chosen", "reward_rejected", "loss")


def questions(data: Path, images: Path | None = None) -> list[dict]:
    """The pairs of a file: `id`, `image`, `prompt`, `chosen`, `rejected`. images: folder their paths start from; None:
    the file's. Raises BadInput listing bad rows."""
    return load(data, root=images, needs=("chosen", "rejected")).records


@torch.no_grad()
def measure(model: Llava, processor: Processor, rows: Sequence[dict], *, root: Path | str | None = None,
            reference: Llava | None = None, batch_size: int = 8, progress: str = "") -> dict[str, dict[str, float]]:
    """id -> log-probs: policy_chosen, policy_rejected, reference_chosen, reference_rejected.

    Args:
        model: in evaluation mode, as `reference`.
        root: folder that relative paths of images start from.
        reference: the reference policy; None: the model with its adapters off.
        batch_size: pairs at a time; changes no figure.
    Raises BadInput where there is no reference, and `data.batch.BadRecord` of a record that cannot be used.
    """
    if reference is None and not lora_layers(model):
        raise BadInput("preference needs --reference DIR: the model has no adapters that could be switched off")
    said = {}
    for start in tqdm(range(0, len(rows), batch_size), desc=progress, disable=None if progress else True):
        batch = collate(rows[start : start + batch_size], SEQUENCES, processor, root)
        policy = _logps(model, batch)  # (2 B,)
        with nullcontext() if reference else adapters_off(model):
            expected = _logps(reference or model, batch)  # (2 B,)
        names = [f"{who}_{name}" for who in ("policy", "reference") for name in batch.names]
        columns = torch.cat([policy, expected]).chunk(len(names))  # 4 x (B,)
        said |= {key: dict(zip(names, numbers)) for key, *numbers in zip(batch.ids, *(c.tolist() for c in columns))}
    return said


def _logps(model: Llava, batch) -> torch.Tensor:
    """Summed log-probs of the batch's sequences (N,)."""
    logps, *_ = Scorer(model)(batch.packed.to(model.device), model.vision_features(batch.pixels.to(model.device)))
    return logps.double().sum(-1)


def score(rows: Sequence[dict], said: Mapping[str, Mapping[str, float]], *, beta: float = 0.1) -> dict:
    """FIGURES over all pairs, `n`, `right` and `ties`, and `rounded`: percent with one decimal, others with four.

    said: as from `measure`.
    """
    pairs = [said[row["id"]] for row in rows]
    chosen, rejected = ([beta * (pair[f"policy_{name}"] - pair[f"reference_{name}"]) for pair in pairs]
                        for name in SEQUENCES)  # fmt: skip
    margins = [a - b for a, b in zip(chosen, rejected)]
    figures = {
        "accuracy": fmean(margin > 0 for margin in margins),
        "likelihood_accuracy": fmean(pair["policy_chosen"] > pair["policy_rejected"] for pair in pairs),
        "margin": fmean(margins), "reward_chosen": fmean(chosen), "reward_rejected": fmean(rejected),
        "loss": fmean(max(-margin, 0) + math.log1p(math.exp(-abs(margin))) for margin in margins),
    }  # fmt: skip
    rounded = {name: round(100 * value, 1) if "accuracy" in name else round(value, 4)
               for name, value in figures.items()}  # fmt: skip
    return {"n": len(rows), "right": sum(margin > 0 for margin in margins), "ties": margins.count(0), "beta": beta,
            **figures, "rounded": rounded}


def table(scores: Mapping) -> list[tuple]:
    """One line."""
    return [("pairs", *FIGURES, "ties"),
            (str(scores["n"]), *(str(scores["rounded"][name]) for name in FIGURES), str(scores["ties"]))]


BENCHMARK = Benchmark(
    rules="implicit rewards of DPO (2305.18290, Section 4)", questions=questions, score=score, table=table,
    max_new_tokens=0, measure=measure, sequences=SEQUENCES,
    figures={name: f"rounded.{name}" for name in FIGURES},
)  # fmt: skip
