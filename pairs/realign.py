"""Re-Align's pairs: hide what the chosen response says about the image, fill it in from a similar image.

Xing et al. 2025, "Re-Align: Aligning Vision Language Models via Retrieval-Augmented Direct Preference
Optimization", EMNLP 2025, arXiv 2502.13146, section 3.1 and Algorithm 1. For an image v with answer y_w:

    1. mask       words of y_w that name objects, attributes or relations
    2. retrieve   the k images of the set most similar to v (cosine, FAISS): v_1 .. v_k, best first
    3. complete   the VLM fills the masks while looking at v_1: y_c
    4. accept     if similarity(y_w, y_c) < tau, then y_l = y_c and v_l = v_1; otherwise complete with v_2,
                  and so on; a record whose neighbours are used up is dropped

    symbol       argument      meaning
    y_w          answered      records with a chosen response
    masking      mask          text -> spans (start, end) in order
    v_1 .. v_k   neighbours    image -> k x (image, cosine), best first, from retrieval/index.py
    completion   complete      jobs -> completed texts; a job is (image, prompt, text, spans)
    similarity   similarity    two lists of texts -> cosines
    tau          tau           similarity that a rejected response must stay below; .95 is from the project page, the
                               paper's text gives no value
                 differ        reconstructed: a rejected response must name an object that the chosen one does not

Departures from the paper, whose pair-making code is not public
- Masking: the paper asks GPT-4o mini. `mask_words` goes by word lists: the objects of CHAIR, attributes,
  numbers, positions, relations, actions. A noun phrase is one span; its article belongs to it, because "an"
  would give the object away.
- Completion: the paper asks a VLM to replace every [MASK]. Small models do not follow such a request, so
  `infill` goes through the gaps from left to right: given the retrieved image and the text so far, the
  model writes on, and the first expression in that which is of the hidden one's kind goes into the gap. For
  a model that follows instructions, pass another `complete`.
- Similarity: the paper compares embeddings of all-mpnet-base-v2. The default is `clip_similarity`, which
  compares the mean CLIP embeddings of the sentences; with a sentence-transformers folder pass
  `SentenceEncoder(folder).similarity` (judges/sentence.py).
- The paper embeds images with the vision encoder of its models (clip-vit-large-patch14), and says neither which of its
  outputs it compares nor k: here CLIP's projected embedding and an option, `top_k`.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from data.processor import Processor
from data.records import pair_of
from metrics.chair import TWO_WORDS, load_synonyms, singularize
from model.cache import Prompts
from model.generate import read, write
from model.llava import Llava
from pairs.texts import names_another

Span = tuple[int, int]

KINDS = {
    "attribute": """black white grey gray red green blue yellow brown pink purple beige golden silver dark
        bright big large huge small little tiny tall short long wide round square wooden metal plastic striped
        plain old new young open closed empty full""",
    "count": "one two three four five six seven eight nine ten several many few multiple",
    "position": "left right middle center centre top bottom front back corner side",
    "relation": "above below under behind beside between near inside outside over across around",
    "action": "standing sitting lying riding holding wearing eating walking running playing parked",
}
KIND = {word: kind for kind, words in KINDS.items() for word in words.split()}
NOUN_PHRASE = ("attribute", "count", "object")  # kinds that grow together


class Expression(NamedTuple):
    """A word or noun phrase that says something about an image."""

    start: int
    end: int
    kind: tuple[str, bool]  # that of its last word, and whether an article leads


class Job(NamedTuple):
    """One answer to be completed."""

    image: str  # reference of the RETRIEVED image
    prompt: str
    text: str
    spans: list[Span]


Hit = tuple[str, float]  # image, cosine
Neighbours = Callable[[str], list[Hit]]
Complete = Callable[[list[Job]], list[str]]
Similarity = Callable[[list[str], list[str]], list[float]]


@cache
def object_names() -> frozenset[str]:
    """What CHAIR takes for an object: words in the singular, and names of two words."""
    return frozenset(load_synonyms()) | TWO_WORDS.keys()


def mask_words(text: str) -> list[Span]:
    """Spans of what a text says about an image."""
    return [(found.start, found.end) for found in expressions(text)]


def expressions(text: str) -> list[Expression]:
    """Object, attribute, count, position, relation and action words; a noun phrase is one expression."""
    words = list(re.finditer(r"[A-Za-z][\w'-]*", text))
    plain = [word.group().lower() for word in words]
    kinds = word_kinds(plain)
    result: list[Expression] = []
    for i, (word, kind) in enumerate(zip(words, kinds)):
        article = plain[i] in ("a", "an") and i + 1 < len(words) and kinds[i + 1] in NOUN_PHRASE
        before = kinds[i - 1] if i else ""
        grows = kind in NOUN_PHRASE and before in (*NOUN_PHRASE, "article") or kind == before == "relation"
        if grows and not text[words[i - 1].end() : word.start()].strip():
            result[-1] = Expression(result[-1].start, word.end(), (kind, result[-1].kind[1]))
        elif kind or article:
            result.append(Expression(*word.span(), (kind, article)))
            kinds[i] = kind or "article"
    return result


def word_kinds(words: list[str]) -> list[str]:
    """Kind of each lower-case word; "" for words that say nothing about an image."""
    single = [singularize(word) for word in words]
    kinds = ["object" if {word, one} & object_names() else KIND.get(word, "")
             for word, one in zip(words, single)]
    for i in range(len(words) - 1):
        if {f"{first} {single[i + 1]}" for first in (words[i], single[i])} & object_names():
            kinds[i] = kinds[i + 1] = "object"
        if words[i : i + 2] == ["next", "to"]:
            kinds[i] = kinds[i + 1] = "relation"
    return kinds


def infill(jobs: list[Job], model: Llava, processor: Processor, *, gap_tokens: int = 8, batch_size: int = 64,
           root: Path | None = None) -> list[str]:
    """A `complete` that needs no instruction: gaps are written one after the other, greedily.

    Args:
        gap_tokens: reconstructed: how much the model writes before an expression is looked for in it.
        batch_size: responses at a time; the i-th gaps of all of them are written together.
        root: folder that relative file paths start from.
    """
    texts = []
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        asked = processor.questions([job.image for job in batch], [job.prompt for job in batch], root)
        prompts = read(model, **asked)
        texts += fill(batch, partial(_write_on, model, processor, prompts, gap_tokens))
    return texts


def _write_on(model: Llava, processor: Processor, prompts: Prompts, limit: int, rows: list[int],
              prefixes: list[str]) -> list[str]:
    """What the model writes after the prompts of these rows and the prefixes; nothing where the window is full, so
    that the hidden words stay."""
    starts = [processor.opening(prefix) for prefix in prefixes]
    fits = [i for i, row in enumerate(rows) if prompts.lengths[row] + len(starts[i]) + limit <= processor.window]
    out = write(model, prompts, [[starts[i]] for i in fits], rows=[rows[i] for i in fits], eos_id=processor.eos_id,
                max_new_tokens=limit) if fits else []
    written = {i: processor.decode(tokens) for i, (tokens,) in zip(fits, out)}
    return [written.get(i, "") for i in range(len(rows))]


def fill(jobs: list[Job], write: Callable[[list[int], list[str]], list[str]]) -> list[str]:
    """Rewrite the spans of all jobs from left to right.

    Args:
        write: (numbers of jobs, prefixes) -> what the model writes after each prefix.
    """
    done = [job.text[: job.spans[0][0]] if job.spans else job.text for job in jobs]
    for gap in range(max((len(job.spans) for job in jobs), default=0)):
        rows = [row for row, job in enumerate(jobs) if gap < len(job.spans)]
        proposals = write(rows, [done[row].rstrip() for row in rows])
        for row, proposal in zip(rows, proposals):
            text, spans = jobs[row].text, [*jobs[row].spans, (len(jobs[row].text), 0)]  # a last gap is the text's end
            (start, end), stop = spans[gap], spans[gap + 1][0]
            done[row] += suit(proposal, text[start:end]) + text[end:stop]
    return done


def suit(proposal: str, hidden: str) -> str:
    """The first expression of a proposal that is of the hidden one's kind, or else the hidden one."""
    wanted = expressions(hidden)
    for found in expressions(proposal):
        if wanted and found.kind == wanted[-1].kind:
            new = proposal[found.start : found.end]
            return (new[0].upper() if hidden[0].isupper() else new[0].lower()) + new[1:]
    return hidden


def realign_pairs(answered: list[dict], model: Llava, processor: Processor, neighbours: Neighbours,
                  similarity: Similarity, batch_size: int = 64, root: Path | None = None,
                  source: dict | None = None, *, tau: float = 0.95, differ: bool = False) -> tuple[list[dict], Counter]:
    """Re-Align pairs of records with a chosen response.

    Args:
        answered: `id`, `image`, `prompt`, `chosen`.
        neighbours: never finds the image itself, nor a copy of it.
        source: what the pair records say about their origin.

    Returns (pair records with `rejected` and `rejected_image`, how many were dropped for which reason).
    """
    complete = partial(infill, model=model, processor=processor, batch_size=batch_size, root=root)
    near = [neighbours(record["image"]) for record in answered]
    return algorithm_1(answered, near, complete, similarity, tau=tau, differ=differ, source=source)


def algorithm_1(answered: list[dict], near: list[list[Hit]], complete: Complete, similarity: Similarity, *,
                mask: Callable[[str], list[Span]] = mask_words, tau: float = 0.95, differ: bool = False,
                source: dict | None = None) -> tuple[list[dict], Counter]:
    """Steps 1, 3 and 4: (pair records, how many were dropped for which reason).

    Args:
        near: retrieved (image, cosine) of each record, best first.
    """
    spans = [mask(record["chosen"]) for record in answered]
    waiting = [row for row in range(len(answered)) if spans[row]]
    made: dict[int, dict] = {}
    for rank in range(max((len(found) for found in near), default=0)):
        # Only records that no nearer neighbour has served go on to the next one.
        waiting = [row for row in waiting if row not in made and rank < len(near[row])]
        if not waiting:
            break
        jobs = [Job(near[row][rank][0], answered[row]["prompt"], answered[row]["chosen"], spans[row])
                for row in waiting]
        texts = complete(jobs)
        similarities = similarity([job.text for job in jobs], texts)
        for row, text, score in zip(waiting, texts, similarities):
            chosen = answered[row]["chosen"]
            if score < tau and text.strip() != chosen.strip() and (not differ or names_another(text, chosen)):
                image, cosine = near[row][rank]
                origin = {"method": "realign", **(source or {}), "rank": rank + 1, "cosine": round(cosine, 4),
                          "similarity": round(score, 4), "text": answered[row].get("source")}
                made[row] = pair_of(answered[row], origin, chosen=chosen, rejected=text, rejected_image=image)
    unmasked = sum(not found for found in spans)
    alone = sum(bool(found) and not others for found, others in zip(spans, near))
    dropped = Counter({"nothing to mask": unmasked, "no other image is found": alone,
                       f"no completion below similarity {tau}": len(answered) - unmasked - alone - len(made)})
    return [made[row] for row in sorted(made)], +dropped
