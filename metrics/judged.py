"""What the benchmarks with a judge share: prompts, and figures over several runs of the judge.

A scorer never asks: it reads a verdict from each reply by the released rule. A reply without one scores as the rule
says and is counted as `unparsed`. Several runs of the judge give the mean of each figure and its deviation, that of
the runs themselves (divided by their number, as numpy does by default).

Judge prompts are our own, following the released rules; another wording is another judge, so `rules` names their
version. `requests` takes the released template as `prompt`.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, pstdev

from common import BadInput
from metrics.files import examples


def fill(prompt: str, **values: str) -> str:
    """A judge prompt with each {name} replaced by its value; {} takes the next value, in the order given.

    Braces inside a value, and other braces of the prompt, stay. Raises BadInput naming values without a place.
    """
    order, used = iter(values), set()

    def value(found: re.Match) -> str:
        name = found[1] or next(order, "")
        used.add(name)
        return values.get(name, found[0])

    text = re.sub(r"\{(\w*)\}", value, prompt)  # one pass: an answer may contain {question}
    if missing := [f"{{{name}}}" for name in values if name not in used]:
        raise BadInput(f"the judge prompt has no {', '.join(missing)}")
    return text


def check_runs(replies: Sequence[Mapping[str, str]], wanted: Collection[str]) -> None:
    """BadInput unless there is a run, and each run replies to all that was asked."""
    if not replies:
        raise BadInput("no replies of a judge")
    for number, run in enumerate(replies, start=1):
        if missing := [key for key in wanted if key not in run]:
            raise BadInput(f"run {number} of the judge has no reply for {len(missing):,} ids: {examples(missing)}")


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict:
    """{mean, deviation}: of each figure, over the runs."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {"mean": {name: fmean(values) for name, values in columns.items()},
            "deviation": {name: pstdev(values) for name, values in columns.items()}}


def rounded(figures: Mapping[str, Mapping[str, float]], digits: int) -> dict:
    """`over_runs` for print."""
    return {part: {name: round(value, digits) for name, value in figures[part].items()} for part in figures}


def cells(scores: Mapping, names: Iterable[str], digits: int) -> tuple[str, ...]:
    """Figures for the screen: "36.3 ± 0.2", without the deviation where the judge ran once."""
    found = scores["rounded"]
    return tuple(f"{found['mean'][name]:.{digits}f}" + f" ± {found['deviation'][name]:.{digits}f}"
                 * (scores["runs"] > 1) for name in names)  # fmt: skip
