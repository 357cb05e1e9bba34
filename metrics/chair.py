"""CHAIR: which objects does a caption mention that the image does not show?

Paper: Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv:1809.02156.
For captions c with mentions m(c) (list of COCO classes, repeats kept) and images that show g(c) (set):

    CHAIRs = #{c : some mention not in g(c)} / #captions
    CHAIRi = #{mentions not in g(c)} / #{mentions}              pooled over all captions
    Recall = sum_c |set(m(c)) & g(c)| / sum_c |g(c)|            not in the paper; usually reported as well

| symbol | argument                | type                                |
|--------|-------------------------|-------------------------------------|
| c      | captions[image_id]      | str                                 |
| g(c)   | objects[image_id]       | set of COCO class names             |
| m(c)   | mentions(captions[...]) | list of (word as found, COCO class) |

A caption becomes mentions by the rules of the released code: lower-case -> word tokens -> singular of every token ->
two-word names joined from left to right -> "seat" dropped where "toilet" occurs -> tokens in the synonym list -> class.
Ground truth for COCO: the instance classes and those that the five reference captions name.

Departures from the released code, none of which changes a figure on its data:
- NLTK's tokeniser and `pattern.en.singularize` are replaced by `tokenize` and `singularize` below, which agree with
  them on every word that can become a COCO class. Known oddities are kept because published figures contain them: "bus"
  becomes "bu" and is never counted ("buses" is), "ties" becomes "ty".
- With no mention at all CHAIRi is 0.0 (the released code divides by zero); so are the other ratios.

Images are one of
    drawn scenes   their contents are known exactly
    one file       the file of --annotations: {image id: [classes]} or an instances file of COCO, which alone is
                   stricter than the published figures
    COCO's files   of --data: instances and reference captions of val2014, as in the paper

Options
    annotations    what the images show: {image id: [classes]}, or an instances file of COCO
    scenes         number of scenes, where there is no file
    num            a random sample of this many images of the file
    split          of the scenes: test or dev
    seed           draws the sample
    prompt         what the model is asked
    max_sentences  only the first sentences of a caption are scored
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from data.scenes import CAPTION_PROMPT, held_out, objects_present, reference, sample_scene
from data.sentences import sentences
from metrics.answers import image_of, join, with_files
from metrics.benchmark import Benchmark, find
from metrics.objects import read_captions, read_objects, sample

SYNONYMS = Path(__file__).with_name("chair_synonyms.txt")
INSTANCES, CAPTIONS = "instances_val2014.json", "captions_val2014.json"
FILES = dict.fromkeys((INSTANCES, CAPTIONS), "cocodataset.org, 2014 train/val annotations")
RULES = "CHAIR as released (BSD list of 80 classes, singular form of every token, joined two-word names)"

# Two-word names as they look AFTER singularisation. "sports ball" and "tennis racket" of the released list
# lose their s there, can never match and are left out (both are found through "ball" and "racket").
_TWO_WORDS = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light,
    fire hydrant, stop sign, parking meter, suit case, baseball bat, baseball glove, wine glass, hot dog,
    cell phone, mobile phone, teddy bear, hair drier, potted plant, laptop computer, home plate,
    train track"""
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
TWO_WORDS: dict[str, str] = {name.strip(): name.strip() for name in _TWO_WORDS.split(",")}
TWO_WORDS |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
TWO_WORDS |= {f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")}
TWO_WORDS |= {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}

_SYMBOLS = re.compile(r"[\[\](){}<>;@#$%&*?!\"`“”„«»‘’\u2012-\u2015]|--|\.{2,}|[,:](?!\d)"
                      r"|(?<!\w)'(?!(?:s|m|d|t|n|ll|re|ve)\b)")
_FULL_STOP = re.compile(r"(?<![.\s])(?<!\.\w)\.(?=[\s')\]]|$)")  # not in "p.m."
_CONTRACTION = re.compile(r"(?<=\S)('(?:s|m|d|ll|re|ve)?|n't)(?=\s|$)")

# (ending of the plural, of the singular), first match wins. Endings whose singular cannot be a COCO word are
# not here: such words may come out differently from `pattern`, but are not looked up either way.
_ENDINGS = (
    ("scissors", "scissors"), ("people", "person"), ("children", "child"), ("men", "man"), ("oxen", "ox"),
    ("kine", "cow"), ("geese", "goose"), ("mice", "mouse"), ("ae", "a"), ("oes", "o"), ("xes", "x"),
    ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("lves", "lf"), ("tives", "tive"), ("ives", "ife"),
)  # fmt: skip
_WHOLE = {"buses": "bus", "collies": "collie", "doggies": "doggie"}  # whatever precedes: minibuses -> bus
_CONSONANT_IES = re.compile(r"(?:[^aeiouy]|qu)ies$")


def tokenize(text: str) -> list[str]:
    """Lower-case tokens as NLTK's Treebank tokeniser makes them: symbols alone, 's and n't detached."""
    text = _FULL_STOP.sub(" . ", _SYMBOLS.sub(r" \g<0> ", text.lower()))
    return _CONTRACTION.sub(r" \1 ", text).split()


@lru_cache(maxsize=65536)
def singularize(word: str) -> str:
    """Singular of a lower-case word; equals `pattern.en.singularize` where either gives a COCO word."""
    for plural, singular in _WHOLE.items():
        if word.endswith(plural):
            return singular
    for plural, singular in _ENDINGS:
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    if _CONSONANT_IES.search(word):
        return word[:-3] + "y"
    return word.removesuffix("s")


def load_synonyms(path: str | Path = SYNONYMS) -> dict[str, str]:
    """word -> COCO class, from a file with one class a line: "class, synonym, synonym" (first word = class).

    Entries are split at ", " only: one that starts with a space never matches, as in the released code.
    """
    lines = [line.strip().split(", ") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return {word: name for name, *others in lines for word in (name, *others)}


def mentions(text: str, synonyms: Mapping[str, str]) -> list[tuple[str, str]]:
    """Objects a text mentions, in order, repeats kept: list of (word as found, COCO class)."""
    return classes_of(joined([singularize(token) for token in tokenize(text)], TWO_WORDS), synonyms)


def joined(words: Sequence[str], names: Mapping[str, str], *, others: bool = True) -> list[str]:
    """Two-word names, from left to right, as what they are looked up; with `others` the other words, too."""
    found, i = [], 0
    while i < len(words):
        name = names.get(" ".join(words[i : i + 2]))
        found += [name] if name else [words[i]] if others else []
        i += 2 if name else 1
    return found


def classes_of(words: Sequence[str], synonyms: Mapping[str, str]) -> list[tuple[str, str]]:
    """(word, COCO class) of the words that have one."""
    if "toilet" in words:  # a toilet seat is not a chair
        words = [word for word in words if word != "seat"]
    return [(word, synonyms[word]) for word in words if word in synonyms]


def chair(captions: Mapping[str, str], objects: Mapping[str, Iterable[str]]) -> dict:
    """CHAIRs, CHAIRi and Recall of captions (id -> text), joined with the classes shown (image id -> COCO classes,
    of these captions and maybe others).

    Returns counts, the fractions chair_s, chair_i and recall in [0, 1] (unrounded), `words` (mean number per caption)
    and `percent` (one decimal, as usual).
    """
    synonyms = load_synonyms()
    _, *counts = pooled((mentions(text, synonyms), objects[key]) for key, text in captions.items())
    count = dict(zip(("hallucinated_captions", "mentions", "hallucinated", "found", "shown"), counts))
    figures = {
        "chair_s": ratio(count["hallucinated_captions"], len(captions)),
        "chair_i": ratio(count["hallucinated"], count["mentions"]),
        "recall": ratio(count["found"], count["shown"]),
    }
    words = ratio(sum(len(text.split()) for text in captions.values()), len(captions))
    return {"n": len(captions), **count, **figures, "words": words, "percent": percent(figures)}


def pooled(captions: Iterable[tuple[Sequence[tuple[str, str]], Iterable[str]]]) -> list[int]:
    """Over captions, each its mentions and the classes shown: captions with a mention, with a wrong one; mentions,
    wrong ones; classes shown that are mentioned, classes shown."""
    total = [0] * 6
    for found, classes in captions:
        said, shown = [name for _, name in found], set(classes)
        wrong = sum(name not in shown for name in said)
        numbers = (bool(said), wrong > 0, len(said), wrong, len(shown & set(said)), len(shown))
        total = [a + b for a, b in zip(total, numbers)]
    return total


def questions(data: Path | None = None, images: Path | None = None, *, annotations: tuple[Path, ...] = (),
              scenes: int = 300, num: int | None = None, split: Literal["test", "dev"] = "test", seed: int = 0,
              prompt: str = CAPTION_PROMPT) -> list[dict]:  # fmt: skip
    """Rows of `id`, `image`, `prompt` and `objects` (classes shown, all of which CHAIR knows), and `image_id` of an
    instances file."""
    if len(annotations) > 1:
        raise BadInput("chair takes one --annotations file")
    if data is None and not annotations:
        return [{"id": name, "image": name, "prompt": prompt, "objects": sorted(objects_present(sample_scene(number)))}
                for number in held_out(split, num or scenes) for name in [reference(number)]]  # fmt: skip
    path = annotations[0] if annotations else find(data, INSTANCES, "coco", FILES)
    rows = sample(read_objects(path), num, seed, path)
    synonyms = load_synonyms()
    if not annotations:
        spoken = read_captions(find(data, CAPTIONS, "coco", FILES))
        for row in rows:
            named = {name for text in spoken.get(row["image_id"], ()) for _, name in mentions(text, synonyms)}
            row["objects"] = sorted({*row["objects"], *named})
    known = set(synonyms.values())
    shown = dict.fromkeys(name for row in rows for name in row["objects"])
    refuse(f"{path}: class {brief(name)} is none of the 80 that CHAIR knows" for name in shown if name not in known)
    return with_files([{**row, "image": row["id"], "prompt": prompt} for row in rows], images, "coco")


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> caption; an id may name its image in any way of data/names.py."""
    return join(path, rows, image_of(rows, ("image_id", "id", "question_id")), subset=subset)


def score(rows: Sequence[dict], said: Mapping[str, str], *, max_sentences: int | None = None) -> dict:
    """`chair` of the captions (id -> text), each cut to its first `max_sentences` sentences."""
    texts = {row["id"]: said[row["id"]] for row in rows}
    if max_sentences is not None:
        texts = {name: " ".join(sentences(text)[:max_sentences]) for name, text in texts.items()}
    return chair(texts, {row["id"]: row["objects"] for row in rows})


def table(scores: Mapping) -> list[tuple]:
    """One line: percentages and counts."""
    figures = [f"{100 * scores[name]:.1f}" for name in ("chair_s", "chair_i", "recall")]
    counts = [str(scores[name]) for name in ("n", "mentions", "hallucinated")]
    return [("CHAIRs", "CHAIRi", "Recall", "words", "captions", "mentions", "hallucinated"),
            (*figures, f"{scores['words']:.1f}", *counts)]


def ratio(part: int, whole: int) -> float:
    """part / whole, and 0.0 where there is nothing to divide by."""
    return part / whole if whole else 0.0


def percent(figures: Mapping[str, float], digits: int = 1) -> dict[str, float]:
    """The same figures times 100, rounded for print."""
    return {name: round(100 * value, digits) for name, value in figures.items()}


BENCHMARK = Benchmark(
    rules=RULES, questions=questions, score=score, table=table, max_new_tokens=96, files=FILES,
    read_answers=read_answers,
    figures={"CHAIR_s": "percent.chair_s", "CHAIR_i": "percent.chair_i", "recall": "percent.recall", "words": "words"},
    tradeoff=("recall", "CHAIR_s"),
)  # fmt: skip
