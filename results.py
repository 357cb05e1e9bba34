"""What a run of train.py measures before and after its steps, and the model it writes.

    measurement     what fits the run: hallucination on held-out scenes, a reward model's accuracy, or nothing
    write_model     model/, adapters/ and what else --out receives
    write_result    result.json, plots.svg, and before and after on the console
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

import evaluate
import plots
import reinforce
from data.batch import without_bad
from data.images import is_scene
from data.processor import Processor
from lifecycle import Run, stop_at
from model.adapters import save_adapters
from model.checkpoint import save_json, save_llava
from model.llava import Llava
from model.reward import save_reward_head


def measure(model: Llava, processor: Processor, scenes: int, split: str) -> tuple[dict[str, float], Mapping[str, str]]:
    """(hallucination on held-out scenes, the captions); every value in percent, `words` the mean length of a caption.

    false: share of a caption's claims that the scene contradicts; coverage: share of what can be said about it that
    is; repetition: repeated 4-grams; asked: right answers, where guessing gives 33.
    """
    ask = partial(evaluate.measure, model, processor, scenes=scenes, split=split)
    captions, said = ask("chair")
    claims, _ = ask("claims", said=said)
    yes_no, _ = ask("pope")
    asked, _ = ask("claims_questions")
    values = {"CHAIR_s": 100 * captions["chair_s"], "CHAIR_i": 100 * captions["chair_i"],
              "recall": 100 * captions["recall"], "words": captions["words"]}
    values |= {f"false {kind}": 100 * claims[kind]["hallucinated"] for kind in ("existence", "attribute", "relation")}
    values |= {"coverage": 100 * claims["all"]["coverage"], "repetition": 100 * claims["captions"]["repetition"]}
    values |= {f"POPE {name}": 100 * split["accuracy"] for name, split in yes_no["splits"].items()}
    few = ("count", "position")  # a few scenes may give no such question
    return values | {f"asked {kind}": 100 * asked[kind]["accuracy"] for kind in few if kind in asked}, said


def measure_rewards(run: Run, held: list[dict]) -> dict[str, float]:
    """How often, in percent, the reward model scores the chosen response of a held-out pair higher."""
    right, policy = [], run.policy
    for start in range(0, len(held), run.args.micro_batch_size):
        batch, bad = without_bad(held[start : start + run.args.micro_batch_size], run.collate)
        stop_at(bad, run.args.bad_records)
        if batch is None:
            continue
        batch = batch.to(run.device)
        with torch.no_grad():
            chosen, rejected = policy.plain(batch.packed, policy.model.seen(batch.pixels)).chunk(2)
        right += (chosen > rejected).tolist()
    return {"accuracy": 100 * sum(right) / max(1, len(right))}


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, side by side."""
    lines = [f"{'':18}{'before':>9}{'after':>9}"]
    return "\n".join(lines + [f"{name:18}{before[name]:9.1f}{after[name]:9.1f}" for name in before])


def measurement(run: Run, held: list[dict]) -> Callable[[], dict[str, float]]:
    """What is measured before and after: the reward model on held-out pairs, hallucination on held-out scenes, else
    nothing."""
    if held:
        return partial(measure_rewards, run, held)
    if run.args.eval_scenes > 0 and all(is_scene(record["image"]) for record in run.records):
        return partial(measure_captions, run)
    return dict


def measure_captions(run: Run) -> dict[str, float]:
    """`measure` in the first process."""
    with run.policy.whole(here=run.rank == 0) as whole:
        return measure(whole.model, run.processor, run.args.eval_scenes, run.args.eval_split)[0] if not run.rank else {}


def write_model(run: Run) -> None:
    """model/ and what else --out receives of a finished run, from the first process."""
    args, first = run.args, run.rank == 0
    with run.policy.whole(here=first, stored=True) as whole:
        if first:
            save_llava(whole.model, args.out / "model", args.model)
        if first and args.lora_rank and not args.train_vision:  # PEFT's format has no place for a tower
            save_adapters(whole.model, args.out / "adapters", args.model)
        if first and run.recipe.rewards:
            save_reward_head(whole.plain, args.out)
    if run.learner:
        with run.policy.whole(here=first):
            if first:
                reinforce.draw_scores(run.learner, run.records, args.out / "scores.svg")


def write_result(run: Run, before: dict[str, float], after: dict[str, float], minutes: float) -> None:
    """result.json and plots.svg of a finished run; what was measured, side by side, on the console."""
    out, result = run.args.out, {"config": run.config, "before": before, "after": after, "minutes": minutes}
    if run.bad_records:
        result["bad_records"] = run.bad_records
        print(f"bad records, whose places others took: {len(run.bad_records)}; result.json lists them")
    save_json(result, out / "result.json")
    plots.draw([out], out / "plots.svg")
    print(table(before, after) if before else "")
    print(f"{out}/model written, {minutes:.1f} minutes")
