"""Object HalBench: which COCO objects does a detailed description mention that the image does not show?

Papers: Rohrbach et al., arXiv:1809.02156 (CHAIR); Yu et al., RLHF-V, arXiv:2312.00849, whose script this follows;
AdaViP, arXiv:2504.15619, reports the complements. 300 images, eight prompts. A judge lists the objects that a
response mentions; they become mentions m(i) of COCO classes, and g(i) is what the image shows:

    response_hallucination = #{i : some mention not in g(i)} / #{i : some mention}          "CHAIRs_refine"
    chair_s                = the same over all responses
    mention_hallucination  = #{mentions not in g(i)} / #{mentions}                          "CHAIRi", pooled
    non_rsp, non_men       = 1 - response_hallucination, 1 - mention_hallucination          AdaViP, Table 1
    recall                 = sum_i |set(m(i)) & g(i)| / sum_i |g(i)|
    words                  = mean number of pieces between spaces

| symbol | argument         | type                                                     |
|--------|------------------|----------------------------------------------------------|
| m(i)   | replies[run][id] | str, the judge's reply, which ends with a JSON list      |
| g(i)   | row["objects"]   | list of COCO classes                                     |

BENCHMARK has the judge; BENCHMARK_RULES has none and finds the objects by CHAIR's rules, as the released script does
without --use_gpt. There repeated mentions all count; with the judge each name counts once a response.

Rules of the released script: a response of at most three words mentions nothing and is not judged. Of a reply, a
fenced JSON block counts, else all of it as JSON, else its last line if the reply contains `["`. Two-word names are
CHAIR's and all of two words in the synonym list, which is CHAIR's but for `refined_synonyms`. Of the judge's "white
coffee tables", two-word names count if there are any ("coffee table"), else the runs of nouns, each as one name: "fire
truck" is not in the list and no mention of a truck.

In place of COCO's annotations, objects.json ({image id: [classes]}) holds what they say. The images are those of COCO,
found by number. Reviews: the script's hall_*.json, or JSONL of image_id and extract_objs.

Departures, all reconstructed
- Nouns: spaCy's en_core_web_trf is replaced by a list, OTHER, of words that are not nouns and end a run.
- Lemmas: WordNet's (spaCy's for the judge's names) are replaced by `lemma`, which is about the words of the list alone.
- The released script asks up to 100 times until a reply can be read, and fails. Here the judge is asked once; a reply
  that cannot be read counts as an empty list and as `unparsed`.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from common import BadInput, brief, parse_json, read_json
from metrics import judged
from metrics.answers import id_of, join, text_of, with_files
from metrics.benchmark import Benchmark, find
from metrics.chair import TWO_WORDS, classes_of, joined, load_synonyms, pooled, ratio, tokenize
from metrics.files import each, field, read_jsonl, read_list, read_table, texts, unique
from metrics.objects import read_captions
from metrics.objects import read_objects as objects_of

QUESTIONS = "obj_halbench_300_with_image.jsonl"
KINDS = ("instances", "captions")
FILES = {QUESTIONS: "https://github.com/RLHF-V/RLHF-V (eval/data, from its download link)"} | {
    f"{kind}_{split}2014.json": "https://cocodataset.org (2014 train/val annotations)"
    for kind in KINDS for split in ("train", "val")}
FIGURES = ("response_hallucination", "mention_hallucination", "non_rsp", "non_men", "chair_s", "recall", "words")
SHORT = 3  # words of a response that is not judged
ADDED = {"person": ("brother", "pedestrian"), "dining table": ("coffee table",), "remote": ("remote control",)}
BLOCK = re.compile(r"```json\n(.*?)\n```", re.DOTALL)
PLURALS = (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
           ("men", "man"), ("ies", "y"))  # fmt: skip  WordNet's endings of nouns
IRREGULAR = {"geese": "goose", "knives": "knife", "pocketknives": "pocketknife", "mice": "mouse", "oxen": "ox"}
OTHER = frozenset("""a an the this that these those some any several many few other another each every all both one two
    three four five six seven eight nine ten and or with without of in on at by near under behind beside from for to
    black white red green blue yellow brown gray grey pink purple beige golden dark light bright colorful striped
    wooden metallic leafy grassy sandy snowy wet dry old new young big small large little tall short long tiny huge
    round square empty full open closed beautiful various different multiple parked sitting standing""".split())

PROMPT = """\
You find the objects that the answer to a question about an image names. Take the answer as correct, and list the \
visible objects that are in the image.

- List only objects that the answer names.
- List names only: no attributes such as colour, size or material.
- Reply with one line, a JSON list of strings such as ["object 1", "object 2"]; an empty list, [], where the answer \
names no visible object.

[Question]
{question}

[Answer]
{answer}
"""


# ----------------------------------------------------------------------------------------------------- questions


def questions(data: Path, images: Path | None = None) -> list[dict]:
    """The 300 questions: `id` (COCO's number), `image`, `prompt` and `objects` (classes shown)."""
    path = find(data, QUESTIONS, "halbench", FILES)
    rows = unique(path, each(read_jsonl(path), lambda row: {"id": _number(row), "prompt": field(row, "question")}))
    shown = _shown(data, rows)
    rows = [{**row, "image": f"COCO_val2014_{row['id']:0>12}.jpg", "objects": sorted(shown[row["id"]])} for row in rows]
    return with_files(rows, images, "coco", other="id")


def _shown(data: Path, rows: Sequence[dict]) -> dict[str, set[str]]:
    """id -> classes, of objects.json, or of COCO's instances and the mentions of its reference captions."""
    shown: dict[str, set[str]] = {row["id"]: set() for row in rows}
    if (path := data / "objects.json").is_file():
        known = set(refined_synonyms().values())

        def classes(item: tuple[str, object]) -> set[str]:
            names = texts(dict([item]), item[0])
            if odd := [name for name in names if name not in known]:
                raise BadInput(f"class {brief(odd[0])} is none of the 80")
            return set(names)

        return join(path, rows, lambda item: item[0] if item[0] in shown else None, classes, entries=read_table(path))
    for split in ("train", "val"):
        instances, captions = (find(data, f"{kind}_{split}2014.json", "coco", FILES) for kind in KINDS)
        objects, spoken = {row["image_id"]: row["objects"] for row in objects_of(instances)}, read_captions(captions)
        for key, classes in shown.items():
            classes.update(objects.get(key, ()))
            classes.update(name for text in spoken.get(key, ()) for _, name in caption_mentions(text))
    return shown


# ---------------------------------------------------------------------------------------------- from words to classes


@lru_cache
def refined_synonyms() -> dict[str, str]:
    """word -> COCO class: CHAIR's list without stray spaces, and a few more words."""
    table = {word.strip(): name for word, name in load_synonyms().items()}
    return table | {word: name for name, words in ADDED.items() for word in words}


@lru_cache
def two_words() -> dict[str, str]:
    """Two-word name -> what it is looked up as."""
    return {word: word for word in refined_synonyms() if " " in word} | TWO_WORDS


@lru_cache
def _vocabulary() -> frozenset[str]:
    return frozenset(word for name in (*refined_synonyms(), *two_words()) for word in name.split())


@lru_cache(maxsize=65536)
def lemma(word: str) -> str:
    """Singular of a lower-case word: the shortest form that some name of the lists has, else the word."""
    forms = [word.removesuffix(plural) + singular for plural, singular in PLURALS if word.endswith(plural)]
    known = [form for form in (word, *forms) if form in _vocabulary()]
    return IRREGULAR.get(word) or min(known, key=len, default=word)


def caption_mentions(text: str) -> list[tuple[str, str]]:
    """(word, class) of each mention in a text, repeats kept. "men" is a lemma of WordNet, and never counted."""
    words = [word if word == "men" else lemma(word) for word in tokenize(text)]
    return classes_of(joined(words, two_words()), refined_synonyms())


def name_mentions(names: Iterable[str], *, other: Collection[str] = OTHER) -> list[tuple[str, str]]:
    """(word, class) of each different name that a judge lists. other: words that are not nouns (reconstructed)."""
    found: list[str] = []
    for name in names:
        words = [lemma(word) for word in tokenize(name)]
        found += joined(words, two_words(), others=False) or _noun_runs(words, other)
    return classes_of(list(dict.fromkeys(found)), refined_synonyms())


def _noun_runs(words: Sequence[str], other: Collection[str]) -> list[str]:
    """The words between those that are not nouns."""
    runs = " ".join("|" if word in other else word for word in words).split("|")
    return [run.strip() for run in runs if run.strip()]


# --------------------------------------------------------------------------------------------------- judge and scores


def requests(rows: Sequence[dict], said: Mapping[str, str], prompt: str = PROMPT) -> dict[str, tuple[None, str]]:
    """id -> (None, text), of the responses that are long enough. The judge sees no image."""
    return {row["id"]: (None, judged.fill(prompt, question=row["prompt"], answer=said[row["id"]]))
            for row in rows if not is_short(said[row["id"]])}  # fmt: skip


def is_short(response: str) -> bool:
    """Whether a response is too short to be judged."""
    return len(response.split()) <= SHORT


def read_objects(reply: str) -> list[str] | None:
    """The names in a judge's reply; None: it cannot be read."""
    block = BLOCK.search(reply)
    tries = [block[1]] if block else [reply, reply.strip().split("\n")[-1]] if '["' in reply else [reply]
    for text in tries:
        with suppress(BadInput):
            names = parse_json(text.encode("utf-8", "replace"))
            return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return None


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> response, of JSONL with an image_id or id, or of the script's hall_*.json; "Assistant:" is dropped."""
    return join(path, rows, _number, lambda row: text_of(row).replace("Assistant:", "").strip(),
                entries=_entries(path), subset=subset)  # fmt: skip


def read_replies(path: Path, rows: Sequence[dict]) -> list[dict[str, str]]:
    """A file with the objects of each response -> one run."""
    return [join(path, rows, _number, lambda row: json.dumps(
        texts(row, "extract_objs" if "extract_objs" in row else "words")), entries=_entries(path))]  # fmt: skip


def _number(row: dict) -> str:
    """An id, which may be COCO's file name."""
    name = id_of(row, ("image_id", "id", "question_id"))
    digits = re.fullmatch(r"(?:.*_)?0*(\d+)(?:\.jpg)?", name)
    return digits[1] if digits else name


def _entries(path: Path) -> list[tuple[str, object]]:
    sentences = path.suffix == ".json" and isinstance(read_json(path, object), dict)
    return read_list(path, "sentences") if sentences else read_jsonl(path)


def score(rows: Sequence[dict], said: Mapping[str, str], replies: Sequence[Mapping[str, str]]) -> dict:
    """`mean` and `deviation` over the runs of FIGURES, as fractions (`words`: a number), and `rounded`, in percent with
    two decimals. Also `counts` and `unparsed` of each run."""
    if len(said) < len(rows):
        raise BadInput("Object HalBench needs the responses next to the judge's replies: --answers FILE")
    judged.check_runs(replies, [row["id"] for row in rows if not is_short(said[row["id"]])])
    lists = [{row["id"]: [] if is_short(said[row["id"]]) else read_objects(run[row["id"]]) for row in rows}
             for run in replies]  # fmt: skip
    return _scores(rows, said, [{key: name_mentions(names or ()) for key, names in run.items()} for run in lists],
                   unparsed=[list(run.values()).count(None) for run in lists])  # fmt: skip


def score_rules(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    """The same without a judge."""
    return _scores(rows, said, [{row["id"]: caption_mentions(said[row["id"]]) for row in rows}], [0])


def _scores(rows: Sequence[dict], said: Mapping[str, str], runs: Sequence[Mapping], unparsed: list[int]) -> dict:
    counts = [count(rows, run) for run in runs]
    words = ratio(sum(len(said[row["id"]].strip().split(" ")) for row in rows), len(rows))
    figures = judged.over_runs([_figures(run, words) for run in counts])
    percent = {part: {name: value * (1 if name == "words" else 100) for name, value in found.items()}
               for part, found in figures.items()}  # fmt: skip
    return {"n": len(rows), "runs": len(runs), "counts": counts, "unparsed": unparsed, **figures,
            "rounded": judged.rounded(percent, 2)}


def count(rows: Sequence[dict], mentions: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, int]:
    """Responses, mentions and objects of one run."""
    names = ("responses", "with_objects", "hallucinated_responses", "mentions", "hallucinated", "found", "shown")
    return dict(zip(names, (len(rows), *pooled((mentions[row["id"]], row["objects"]) for row in rows))))


def _figures(counts: Mapping[str, int], words: float) -> dict[str, float]:
    responses, named, hallucinated, mentions, wrong, found, shown = counts.values()
    response, mention = ratio(hallucinated, named), ratio(wrong, mentions)
    return dict(zip(FIGURES, (response, mention, 1 - response, 1 - mention, ratio(hallucinated, responses),
                              ratio(found, shown), words)))  # fmt: skip


def table(scores: Mapping) -> list[tuple]:
    """The figures, in percent."""
    return [(*FIGURES, "unparsed"), (*judged.cells(scores, FIGURES, 2), str(sum(scores["unparsed"])))]


_RULES = "Object HalBench as released, nouns and lemmas reconstructed"
BENCHMARK = Benchmark(
    rules=f"{_RULES}, judge prompt 1", questions=questions, score=score, table=table, max_new_tokens=1024, files=FILES,
    read_answers=read_answers, requests=requests, read_replies=read_replies,
    figures={name: f"rounded.mean.{name}" for name in FIGURES}, tradeoff=("recall", "response_hallucination"),
)  # fmt: skip
BENCHMARK_RULES = BENCHMARK._replace(
    rules=f"{_RULES}, without a judge", score=score_rules, requests=None, read_replies=None
)  # fmt: skip
