"""What reinforcement measures with the untrained model before its first step: the scale of its scores.

    ppo, rloo   mean and deviation of the judge's scores, which standardise all later ones
    fisao       baselines of correct and hallucinated words (Eq. 7, losses/fisao.py), and what the verifier says
                of words and sentences before training (the paper's Figures 1 and 4)

All of it goes into `run.state`, plain numbers that are part of the checkpoint. Every process does the same: the
records are few. `run` is train.py's Run.
"""

from __future__ import annotations

import torch

from data.batch import BadRecord, look
from losses import fisao
from model import rollout
from model.tensors import save_json
from pairs import online

CALIBRATION = 256  # records whose answers by the untrained model set the scale of scores


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
    """The first of these records whose pictures can be decoded; ValueError of one that cannot, unless the run skips
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
                raise ValueError(f"{error}; mend it, or leave it out with --bad-records skip") from None
    return picked


def look_at_scores(run) -> dict[str, list[float]]:
    """What the verifier says of the policy's answers to the first records whose objects are known."""
    picked = readable(run, [r for r in run.records if run.helper.known(r["image"])])
    ids = answers_to(run, picked, temperature=0.0)
    texts = [run.processor.decode(answer) for answer in ids]
    return rollout.verifier_scores([r["image"] for r in picked], ids, texts, run.helper)


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
    scores = torch.cat([rollout.scores(run.helper, picked[part], [run.processor.decode(x) for x in ids[part]], 1)
                        for part in parts])
    run.state |= {"mean": scores.mean().item(), "std": max(scores.std().item(), 1e-6)}


def fisao_baselines(run) -> dict:
    """S_gt and S_hal of Eq. 7 and what goes with them, of --baselines or of the untrained model's answers."""
    if path := run.args.baselines:
        return rollout.read_baselines(path, run.helper.unit)
    picked = readable(run, [record for record in run.records if run.helper.known(record["image"])])
    if not picked:
        raise ValueError("fisao measures its baselines on pictures whose objects are known, and of none of these they"
                         " are: give --objects FILE, or the --baselines FILE of another run")
    found = run.helper([record["image"] for record in picked], answers_to(run, picked, run.args.temperature))
    known = found.correct >= 0
    if not known.any():
        raise ValueError(f"fisao finds no known object word in {len(picked)} answers of the model")
    return fisao.calibrate(found.scores[known], found.correct[known] == 1, unit=run.helper.unit)
