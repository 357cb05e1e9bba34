"""What a benchmark is: questions, answers, scores, a table. Each benchmark's file ends with a `Benchmark`; evaluate.py
lists them in one table and knows nothing else about them.

    questions(data, images, **options) -> rows     read the official files, or sample scenes. BadInput lists what is
                                                   missing, bad entries and, with `images`, images without a file
    read_answers(path, rows, subset)   -> said     an answers file, joined with the rows by id: `metrics.answers.join`
    score(rows, said, **options)       -> scores   pure: the official rules
    table(scores)                      -> cells    for the screen, the headings first

A row is a dict: `id` (unique string), `image` (image reference, None for a question without one), `prompt` (what the
model is asked, suffix included), and what the scoring needs. `said` maps ids to texts. Scores hold every count, every
figure unrounded, and `rounded` or `percent`, as the official script prints them. Keyword-only arguments of `questions`
and `score` are options of the command line; the table `option  meaning` of the file's header is their help.

A judged benchmark has `requests`, and its `score` takes the replies:

    requests(rows, said)                    -> asked     {key: (image reference or None, text for the judge)}
    score(rows, said, replies, **options)   -> scores    replies: one {key: text} for each run of the judge
    read_replies(path, rows)                -> replies   of a judge run elsewhere, in the official format

What is measured without a generated text has `measure`, whose `said` holds numbers:

    measure(model, processor, rows, **options) -> said
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from common import BadInput
from metrics.answers import read_answers
from metrics.files import below, pick

CONTROLS = ("other_picture", "removed")  # splits of questions about scenes that tell looking from guessing


class Benchmark(NamedTuple):
    """One benchmark; see above."""

    rules: str  # whose rules, in which version: part of the result
    questions: Callable
    score: Callable
    table: Callable
    max_new_tokens: int  # limit of an answer, unless the command line says otherwise
    figures: Mapping[str, str] = {}  # what papers' tables report: name -> where in the scores, "splits.random.accuracy"
    tradeoff: tuple[str, str] | None = None  # two of these: coverage, hallucination
    files: Mapping[str, str] = {}  # official file -> where it is published
    read_answers: Callable = read_answers  # joins by id
    requests: Callable | None = None  # judged benchmarks only
    read_replies: Callable | None = None  # judged benchmarks only
    measure: Callable | None = None  # None: the model answers, greedily
    sequences: Mapping[str, Mapping] | None = None  # what it scores of a row, as for `data.batch.collate`


def lines(parts: Iterable[tuple[str, Mapping]], columns: Sequence[str], digits: int = 2) -> list[tuple[str, ...]]:
    """A table's lines, one a part: its name and its columns. Fractions are given in percent, what it lacks is blank."""
    def cell(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.{digits}f}" if isinstance(value, float) else str(value)

    return [(name, *(cell(part.get(column)) for column in columns)) for name, part in parts]


def find(data: Path, name: str, benchmark: str, files: Mapping[str, str]) -> Path:
    """The official file of this name in or below a folder (`metrics.files.pick`). Raises BadInput if it may be several,
    or is missing: then it says where it is published."""
    found = pick((path for path in below(data) if path.name == name), data, benchmark)
    if not found:
        raise BadInput(f"{data}: has no {name}; published at {files[name]}")
    if len(found) > 1:
        raise BadInput(f"{data}: {found[0]} or {found[1]}? one {name} is wanted")
    return found[0]
