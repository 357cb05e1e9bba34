"""AMBER: hallucination in descriptions (generative) and in yes/no answers about objects, attributes, relations.

Paper: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation",
arXiv:2311.07397. Over responses r with mentions m(r), an image's objects A(r) and its likely hallucinations H(r):

    CHAIR = #{mentions of nothing in A} / #{mentions}        Hal = #{r : some mention of nothing in A} / #{r}
    Cover = #{objects of A mentioned} / #{objects of A}      Cog = #{objects of H mentioned} / #{objects of H}
    precision, recall, F1 of the answers, "No" being positive        AMBER = (100 - CHAIR + F1) / 2

| symbol | argument                      | type                                                                  |
|--------|-------------------------------|-----------------------------------------------------------------------|
| r      | said[row["id"]]               | str, a description or an answer                                       |
| m(r)   | amber_nouns.mentions(r, ...)  | list of words of the vocabulary; no `safe` word is ever hallucinated  |
| A, H   | row["truth"], row["hallu"]    | list of [object, words associated with it ...]                        |
|        | row["label"]                  | "yes" or "no", rows of questions                                      |

Options
    queries      which responses: all (15,220), generative (1,004) or discriminative (14,216)
    instruction  what follows a yes/no question: yes_no, "Please answer Yes or No." (reconstructed), or none
    similar      TSV of word pairs that mean the same, in place of the released code's word vectors (spaCy's
                 en_core_web_lg, cosine above 0.8). Without it words are matched exactly; the scores say which
    reading      how yes/no answers are read: exact ("Yes" or "No" and nothing else, as released) or lenient (the
                 first word, in any case)

Rules of the released code: all pooled, never averaged. A mention counts for the first object whose associations hold
it, else for the object itself. An answer that is neither "Yes" nor "No" is wrong and counts as no answer. `rounded`
follows it to the digit: counts in denominators start at 0.001, F1 is that of the rounded precision and recall, with
0.0001 added below, 0.001 for existence. Constant "No" has F1 79.7, more than LLaVA-1.5-7B.

Departures: nouns are found by metrics/amber_nouns.py instead of NLTK; the AMBER score, which the released code does
not print, is that of the rounded figures, half up. Its answers name no image: where no model is asked, the query
files are not needed and a row's image is None.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from metrics.amber_nouns import forms, mentions
from metrics.answers import with_files
from metrics.benchmark import Benchmark, find
from metrics.chair import ratio
from metrics.files import each, field, read_lines, read_list, read_table, texts

INSTRUCTIONS = {"yes_no": " Please answer Yes or No.", "none": ""}
KINDS = {  # type in annotations.json -> kind
    "generative": "generative", "discriminative-hallucination": "existence", "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number", "discriminative-attribute-action": "action",
    "discriminative-relation": "relation", "relation": "relation"}  # fmt: skip
POOLS = {  # row of the table -> kinds in it
    "discriminative": ("existence", "state", "number", "action", "relation"), "existence": ("existence",),
    "attribute": ("state", "number", "action"), "state": ("state",), "number": ("number",), "action": ("action",),
    "relation": ("relation",)}  # fmt: skip
GENERATIVE = {  # figure -> (part, whole) of the counts
    "chair": ("hallucinated", "mentions"), "cover": ("covered", "objects"), "hal": ("hallucinating", "n"),
    "cog": ("cognitive", "likely")}  # fmt: skip
DISCRIMINATIVE = {"accuracy": ("right", "n"), "precision": ("right_no", "said_no"), "recall": ("right_no", "no")}
START = 0.001  # of every count in a denominator
FILES = {
    name: f"github.com/junyangwang0410/AMBER, data/{'query/' if name.startswith('query') else ''}{name}"
    for name in ("annotations.json", "relation.json", "safe_words.txt", "query_all.json", "query_generative.json",
                 "query_discriminative.json")}  # fmt: skip


def questions(data: Path, images: Path | None, *, queries: Literal["all", "generative", "discriminative"] = "all",
              instruction: Literal["yes_no", "none"] = "yes_no", similar: Path | None = None) -> list[dict]:
    """Rows of `id`, `image`, `prompt`, `kind`, and `label`, or `truth`, `hallu`, `words`, `safe` and `similar`."""
    generative = {"all": (True, False), "generative": (True,), "discriminative": (False,)}[queries]
    notes = [note for note in _annotations(find(data, "annotations.json", "amber", FILES))
             if (note["type"] == "generative") in generative]  # fmt: skip
    asked = _queries(find(data, f"query_{queries}.json", "amber", FILES), notes) if images else {}
    describe, rows = _describe(data, similar), []
    for note in notes:
        image, prompt = asked.get(note["id"], (None, ""))
        row = {"id": str(note["id"]), "image": image, "prompt": prompt, "kind": KINDS[note["type"]]}
        if note["type"] == "generative":
            rows.append(row | describe(note))
        else:
            rows.append(row | {"prompt": prompt + INSTRUCTIONS[instruction], "label": note["truth"]})
    return with_files(rows, images, "amber")


def _annotations(path: Path) -> list[dict]:
    """The entries of annotations.json: id = 1, 2, ..., type, truth, and hallu of the generative ones."""
    numbers = count(1)

    def checked(note: object) -> dict:
        number = next(numbers)
        if field(note, "type") not in KINDS:
            raise BadInput(f"want a type of AMBER, found {brief(note['type'])}")
        if field(note, "id", int) != number:
            raise BadInput(f"want id {number}, found {note['id']}")
        if note["type"] == "generative":
            texts(note, "truth"), texts(note, "hallu")
        elif field(note, "truth") not in ("yes", "no"):
            raise BadInput(f"truth {brief(note['truth'])}: want 'yes' or 'no'")
        return note

    return each(read_list(path), checked)


def _queries(path: Path, notes: Sequence[dict]) -> dict[int, tuple[str, str]]:
    """id -> (image, query) of each annotation. Raises BadInput naming bad queries, and ids without one."""
    asked = dict(each(read_list(path), lambda query: (
        field(query, "id", int), (field(query, "image"), field(query, "query")))))  # fmt: skip
    refuse(f"{path}: has no query {note['id']}" for note in notes if note["id"] not in asked)
    return asked


def _describe(data: Path, similar: Path | None):
    """Entry of a description -> what its row needs of relation.json, safe_words.txt and the similar words."""
    path = find(data, "relation.json", "amber", FILES)
    relation = dict(each(read_table(path), lambda item: (item[0], texts(dict([item]), item[0]))))
    safe = [line for _, line in read_lines(find(data, "safe_words.txt", "amber", FILES))]
    words = sorted(relation.keys() | {other for others in relation.values() for other in others})
    alike = _similar(similar, words) if similar else None

    def describe(note: dict) -> dict:
        if unknown := [word for word in note["truth"] + note["hallu"] if word not in relation]:
            raise BadInput(f"{path}: has no {brief(unknown[0])}, which annotation {note['id']} names")
        objects = {key: [[word, *relation[word]] for word in note[key]] for key in ("truth", "hallu")}
        return {**objects, "words": words, "safe": safe, "similar": alike}

    return describe


def _similar(path: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """Word -> words like it, from lines of two words of the vocabulary and a tab between."""
    def pair(line: str) -> list[str]:
        found = line.split("\t")[:2]
        if len(found) != 2 or not set(found) <= set(words):
            raise BadInput(f"want two words of relation.json and a tab between them, found {brief(found)}")
        return found

    alike: dict[str, list[str]] = {}
    for one, other in each(read_lines(path), pair):
        alike.setdefault(one, []).append(other)
        alike.setdefault(other, []).append(one)
    return alike


def score(rows: Sequence[dict], said: Mapping[str, str], *, reading: Literal["exact", "lenient"] = "exact") -> dict:
    """Scores of responses (id -> text), as far as there are such rows: generative, discriminative and its kinds, each
    with counts, fractions in [0, 1] and `rounded`, percent as released; `amber`, where both are there; and how words
    were matched and answers read."""
    described = [row for row in rows if row["kind"] == "generative"]
    scores: dict = {"reading": reading}
    if described:
        scores["generative"] = _generative(described, said)
        scores["words"] = "exact" if described[0]["similar"] is None else "exact, or in the table of similar words"
    for pool, kinds in POOLS.items():
        asked = [row for row in rows if row["kind"] in kinds]
        if asked:
            scores[pool] = _discriminative(asked, said, reading, 0.001 if pool == "existence" else 0.0001)
    if "generative" in scores and "discriminative" in scores:
        scores["amber"] = _amber(scores["generative"], scores["discriminative"])
    return scores


def _amber(described: Mapping, asked: Mapping) -> dict:
    """The AMBER score; its rounding is half up, in tenths of a percent."""
    tenths = round(10 * (100 - described["rounded"]["chair"] + asked["rounded"]["f1"]))
    return {"amber": (1 - described["chair"] + asked["f1"]) / 2, "rounded": {"amber": (tenths + 1) // 2 / 10}}


def _generative(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    counts, known = Counter(n=len(rows)), forms(rows[0]["words"])
    for row in rows:
        counts.update(describe(mentions(said[row["id"]], known), row))
    figures, rounded = _figures(counts, GENERATIVE)
    clean = counts["n"] - counts["hallucinating"]
    rounded["hal"] = round(100 - 100 * clean / (counts["n"] + START), 1)
    keys = (key for pair in GENERATIVE.values() for key in reversed(pair))
    return {**{key: counts[key] for key in keys}, **figures, "rounded": rounded}


def _figures(counts: Mapping[str, int], ratios: Mapping[str, tuple[str, str]]) -> tuple[dict, dict]:
    """The ratios of counts, exact and in percent as released."""
    pairs = {name: (counts[part], counts[whole]) for name, (part, whole) in ratios.items()}
    return ({name: ratio(*pair) for name, pair in pairs.items()},
            {name: round(part / (whole + START) * 100, 1) for name, (part, whole) in pairs.items()})


def describe(nouns: Sequence[str], row: Mapping) -> dict[str, int]:
    """The counts of one description that mentions these words of the vocabulary."""
    covered, cognitive, wrong = set(), set(), 0
    for noun in nouns:
        if noun in row["safe"]:
            continue
        alike = [noun, *(row["similar"] or {}).get(noun, ())]
        if (place := _place([noun], row["truth"])) is None:
            cognitive |= {_place([noun], row["hallu"]), _place(alike, row["hallu"])} - {None}
            place = _place(alike, row["truth"])
        wrong += place is None
        covered |= {place} - {None}
    return {"mentions": len(nouns), "hallucinated": wrong, "hallucinating": int(wrong > 0), "covered": len(covered),
            "objects": len(row["truth"]), "cognitive": len(cognitive), "likely": len(row["hallu"])}  # fmt: skip


def _place(words: Sequence[str], objects: Sequence[Sequence[str]]) -> int | None:
    """The first object with one of the words among its associations, else the first that is one of them."""
    first = (i for i, (_, *associated) in enumerate(objects) if not set(words).isdisjoint(associated))
    return next(chain(first, (i for i, (name, *_) in enumerate(objects) if name in words)), None)


def _discriminative(rows: Sequence[dict], said: Mapping[str, str], reading: str, below: float) -> dict:
    """Counts and figures; `below` is added to F1's denominator."""
    pairs = Counter((row["label"], read_answer(said[row["id"]], reading)) for row in rows)
    counts = {
        "n": len(rows), "no": sum(row["label"] == "no" for row in rows), "right_no": pairs["no", "no"],
        "said_no": pairs["yes", "no"] + pairs["no", "no"], "right": pairs["yes", "yes"] + pairs["no", "no"],
        "other": pairs["yes", ""] + pairs["no", ""]}  # fmt: skip
    figures, rounded = _figures(counts, DISCRIMINATIVE)
    figures["f1"] = ratio(2 * counts["right_no"], counts["said_no"] + counts["no"])
    precision, recall = rounded["precision"] / 100, rounded["recall"] / 100
    rounded["f1"] = round(2 * precision * recall / (precision + recall + below) * 100, 1)
    return {**counts, **figures, "rounded": rounded}


def read_answer(text: str, reading: str) -> str:
    """ "yes", "no", or "" for neither."""
    if reading == "exact":
        return {"Yes": "yes", "No": "no"}.get(text, "")
    first = (text.split() or [""])[0].strip(".,;:!?\"'*").lower()
    return first if first in ("yes", "no") else ""


def table(scores: Mapping) -> list[tuple]:
    """One row for descriptions, one for each kind of question, as rounded; and the AMBER score."""
    columns = (*GENERATIVE, *DISCRIMINATIVE, "f1", "amber")
    parts = {name: scores[name] for name in ("generative", *POOLS, "amber") if name in scores}
    return [("", *columns, "n", "other"),
            *((name, *(str(part["rounded"].get(column, "")) for column in columns),
               *(str(part.get(key, "")) for key in ("n", "other"))) for name, part in parts.items())]  # fmt: skip


BENCHMARK = Benchmark(
    rules="AMBER as released (pooled; 'No' is positive), nouns by the rules of metrics/amber_nouns.py",
    questions=questions, score=score, table=table, max_new_tokens=512, files=FILES,
    figures={"CHAIR": "generative.rounded.chair", "Cover": "generative.rounded.cover", "Hal": "generative.rounded.hal",
             "Cog": "generative.rounded.cog", "accuracy": "discriminative.rounded.accuracy",
             "F1": "discriminative.rounded.f1",
             **{f"F1 {pool}": f"{pool}.rounded.f1" for pool in ("existence", "attribute", "relation")},
             "AMBER": "amber.rounded.amber"},
    tradeoff=("Cover", "CHAIR"),
)  # fmt: skip
