"""Results of evaluate.py next to each other, followed by what papers report for the same benchmark and variant.

The first run of a benchmark sets the variant. A run whose protocol differs in anything that changes the figures (rules,
questions, options, limit of an answer, judge) is marked with *, and the lines below say in what; what one of them does
not record counts as a difference. Of published rows only those that fit the first run are shown.

published.json is a list of rows:

    paper, table  where the figures are
    method, model
    benchmark     name in evaluate.py
    variant       path in the result -> value that it must have; true and false stand for all true and false values
    figures       column of the table -> figure, in the units of the table: percent, and MMHal's rates as fractions
    note          what the paper does not say; "inferred": its digits or text imply it. Optional
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import svg
from common import BadInput, brief, read_json, refuse
from metrics.benchmark import Benchmark
from metrics.files import read_jsonl

PUBLISHED = Path(__file__).with_name("published.json")
SETTINGS = ("rules", "subset", "judge", "judge_runs", "judge_prompts", "max_new_tokens")


class Run(NamedTuple):
    """One benchmark's result, {benchmark, protocol, scores, versions}, named after its file."""

    name: str
    result: dict


def read_runs(paths: Sequence[Path], benchmarks: Mapping[str, Benchmark]) -> list[Run]:
    """All results of the files. Raises BadInput that lists lines which are none, and benchmarks given twice."""
    paths = list(dict.fromkeys(paths))
    stems, runs, problems = Counter(path.stem for path in paths), {}, []
    for path in paths:
        for where, result in read_jsonl(path):
            if reason := _wrong(result, benchmarks):
                problems.append(f"{where}: no result of evaluate.py: {reason}")
            elif (path, result["benchmark"]) in runs:
                problems.append(f"{where}: {result['benchmark']} is there twice")
            else:
                name = path.stem if stems[path.stem] == 1 else str(path)
                runs[path, result["benchmark"]] = Run(name, result)
    refuse(problems)
    return list(runs.values())


def _wrong(result: dict, benchmarks: Mapping[str, Benchmark]) -> str:
    """Why this is no result, or ""."""
    name = result.get("benchmark")
    if not isinstance(name, str) or name not in benchmarks:
        return f"benchmark {brief(name)} is unknown"
    for path in ("protocol", "protocol.options", "scores"):
        if not isinstance(at(result, path), dict):
            return f"{path} must be an object"
    for path in benchmarks[name].figures.values():
        value = at(result, f"scores.{path}")
        if value is not None and type(value) not in (int, float):
            return f"scores.{path} must be a number, not {brief(value)}"
    return ""


def by_benchmark(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Benchmark -> its runs."""
    names = dict.fromkeys(run.result["benchmark"] for run in runs)
    return {name: [run for run in runs if run.result["benchmark"] == name] for name in names}


def at(tree: object, path: str) -> object:
    """What lies in nested objects at "KEY.KEY", None where there is nothing."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def compare(runs: Sequence[Run], benchmark: Benchmark, published: Sequence[dict]) -> tuple[list[tuple], list[str]]:
    """The table of one benchmark, headings first, and the lines below it."""
    first, marked, notes = runs[0], [], []
    for run in runs:
        if differs := differences(run.result, first.result):
            notes.append(f"* {run.name}: {'; '.join(differs)}")
        model = run.result["protocol"].get("model") or run.result["protocol"].get("answers") or ""
        marked.append((label(run, first), str(model), figures_of(run, benchmark)))
    for row in published:
        source, method = f"{row['paper']}, {row['table']}", row["method"]
        if needs := [f"{path} {brief(value)}" for path, value in row["variant"].items()
                     if not _fits(first, path, value)]:  # fmt: skip
            notes.append(f"{source}: another variant, with {', '.join(needs)}")
        else:
            marked.append((source, row["model"] + f" + {method}" * bool(method), row["figures"]))
            notes += [f"{source}: {row['note']}"] if "note" in row else []
    columns = [name for name in benchmark.figures if any(figures.get(name) is not None for *_, figures in marked)]
    lines = [("run", "model", *columns)]
    lines += [(*texts, *(_cell(figures.get(name)) for name in columns)) for *texts, figures in marked]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    lines = [(f"{run:{widths[0]}}", f"{model:{widths[1]}}", *rest) for run, model, *rest in lines]
    return lines, list(dict.fromkeys(notes))


def differences(result: Mapping, first: Mapping) -> list[str]:
    """What of the protocol is other than in the first run's, as texts."""
    mine, theirs = _settings(result["protocol"]), _settings(first["protocol"])
    return [f"{name} {mine.get(name, 'not recorded')} (first run: {theirs.get(name, 'not recorded')})"
            for name in dict.fromkeys([*theirs, *mine]) if mine.get(name) != theirs.get(name)]


def label(run: Run, first: Run) -> str:
    """The run's name, with * if its protocol differs."""
    return run.name + " *" * bool(differences(run.result, first.result))


def _settings(protocol: Mapping) -> dict[str, str]:
    """What decides whether figures may be compared, as texts."""
    found = {name: brief(protocol[name]) for name in SETTINGS if name in protocol}
    found["questions"] = f"{protocol.get('questions')} ({str(protocol.get('questions_sha256'))[:8]})"
    return found | {f"--{name.replace('_', '-')}": brief(value) for name, value in protocol["options"].items()}


def figures_of(run: Run, benchmark: Benchmark) -> dict[str, float | None]:
    """Column -> figure."""
    return {name: at(run.result["scores"], path) for name, path in benchmark.figures.items()}


def _fits(run: Run, path: str, value: object) -> bool:
    found = at(run.result, path)
    return bool(found) == value if isinstance(value, bool) else found == value


def _cell(value: float | None) -> str:
    """Figures come rounded as the benchmark's script does; others get one decimal."""
    return "-" if value is None else str(value) if value == round(value, 2) else f"{value:.1f}"


def read_published(name: str) -> list[dict]:
    """The published rows of a benchmark."""
    return [row for row in read_json(PUBLISHED, list) if row["benchmark"] == name]


def picture(runs: Sequence[Run], benchmarks: Mapping[str, Benchmark]) -> str:
    """Hallucination against coverage as SVG, a panel for each benchmark that has both. Raises BadInput if none has."""
    panels = []
    for name, mine in by_benchmark(runs).items():
        if not (axes := benchmarks[name].tradeoff):
            continue
        places = {label(run, mine[0]): [figures_of(run, benchmarks[name])[axis] for axis in axes] for run in mine}
        if points := {run: svg.Point(*place) for run, place in places.items() if None not in place}:
            panels.append(svg.Scatter(name, f"{axes[0]}, percent (right is better)",
                                      f"{axes[1]}, percent (down is better)", points))  # fmt: skip
    if not panels:
        able = ", ".join(name for name, benchmark in benchmarks.items() if benchmark.tradeoff)
        raise BadInput(f"--plot: no result has hallucination and coverage; these benchmarks measure both: {able}")
    return svg.scatters(panels)
