"""BDHS: the model completes the beginnings of a good response's sentences while hardly seeing the image.

Amirloo et al. 2024, "Understanding Alignment in Multimodal LLMs: A Comprehensive Study", arXiv 2407.02477,
section 3.4, Eq. 6 and 7, Algorithm 1. No annotator, no second model: what the image no longer says, the
language model's bias fills in. Given a good response y+ = y+_1 .. y+_K (sentences), for i = 1 .. N:

    1. mask        rho_1 .. rho_k ~ U(0, 1), one for each image token; visible if rho_i >= rho_th      (Eq. 6)
    2. cut         each sentence, a leading yes or no swapped with probability 1/2, at a random word:
                   y+_k = (y+_{k,1}, y+_{k,2})
    3. complete    y-_{k,2} ~ pi(. | masked image, x, y+_{<k}, y+_{k,1}), up to the sentence's end   (Eq. 7)
    4. accept      y- = the (y+_{k,1}, y-_{k,2}) one after another, if similarity(y-, y+) < eps_s; else again

The last of several iterations cuts nothing: the model responds freely under the mask, and similarity no longer
counts. All sentences of an attempt share its mask and their prompt; each continues the GROUND TRUTH before
it, unswapped. A hidden image token is a key that no query sees, in any layer; positions stay what they were
(model/attention.py).

    symbol      argument         meaning
    y+          answered         records with a chosen response
    rho_th      rho_th           share of the image tokens that is hidden: 0 hides none, 1 all; .99 leaves 1 % visible
                visible          reconstructed: this many image tokens, those of the largest rho, stay visible anyway
    N           iterations       attempts: guided ones, then a free one; a single one is guided and taken as it is
    eps_s       eps_s            similarity that a rejected response must stay below; .97 is meant for the cosine of
                                 all-mpnet-base-v2 (judges/sentence.py)
                differ           reconstructed: a rejected response must name an object that the chosen one does not
    1/2         swap             probability that a leading yes or no is swapped
    x-tilde     noise            BDHS-noise: a noisy image, and no hidden tokens (rho_th = 0)
                noise_step       diffusion step of that noise, 0 to 999
                overflow         of noise beyond black and white: clamp it, or wrap around
                max_new_tokens   of a sentence, and of a free response
                temperature      reconstructed: of the sampling
                seed             with a record's id it decides all that is drawn for it, whatever the order

BDHS trains on the ordinary DPO loss of (y+, y-) with the clean, unmasked image for both.

Departures from the paper, which has no public code
- Its printed expression for yes and no has no word boundary ("Not", "None", "Now" would match). Here it has.
- A cut before the swapped word would undo the swap; such a cut moves to the end of the word.
- Its completions end at the first full stop, whatever that belongs to ("3.5", "St.") and lose a quotation's
  closing mark. Here a sentence ends as `sentence_end` has it, and a mark or bracket that the original closes
  is closed.
- An attempt with a sentence that reaches the token limit is no response: it is tried again, or dropped in the
  end.

rho_th = .99 was chosen where an image is up to 2880 image tokens; with fewer it is harsher: of LLaVA-1.5's
576 it leaves 6, of the embedded model's 64 mostly none. `visible` = 6 leaves 6 of those too.

Reconstructed, because the paper does not say: what is a sentence (`sentence_end`); cuts uniform over the
beginnings of words, so that at least the last word is written again; `temperature` and `top_p`; image tokens
that end a row of patches (LLaVA-1.6) are masked like the others.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import BadInput
from data.corrupt import add_noise, sample_seed
from data.images import open_image, references
from data.processor import Processor
from data.records import pair_of
from data.sentences import sentence_end, split_sentences
from judges.clip import Similarity
from model.generate import generate
from model.llava import Llava
from pairs.texts import names_another

YES_NO = re.compile(r"\s*(yes|no)\b", re.I)
OPENING = {"”": "“", ")": "(", "]": "["}


class Cut(NamedTuple):
    """One sentence to be completed."""

    before: str  # the ground truth up to it
    first: str  # what is kept of it, y+_{k,1}; a swapped yes or no is in here
    original: str  # the sentence itself, y+_k
    gap: str  # what separates it from the next


class Attempt(NamedTuple):
    """One example in one iteration."""

    image: str | list[str]
    prompt: str
    cuts: list[Cut]  # none: a free response
    rho_th: float
    seed: int  # of mask, noise and sampling


Complete = Callable[[list[Attempt]], list[str | None]]  # None: not finished
Noise = Callable[[Image.Image, int], Image.Image]


def swap_answer(sentence: str) -> str:
    """The sentence with its leading yes or no turned round, its case kept; else the sentence as it is."""
    found = YES_NO.match(sentence)
    if not found:
        return sentence
    word, (start, end) = found[1], found.span(1)
    other = {"yes": "no", "no": "yes"}[word.lower()]
    other = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return sentence[:start] + other + sentence[end:]


def cut_sentences(text: str, rng: np.random.Generator, swap: float = 0.5) -> list[Cut]:
    """Step 2: two random numbers a sentence, one for the swap and one for the place."""
    cuts, before = [], ""
    for original, gap in split_sentences(text):
        swapped = swap_answer(original) if rng.random() >= 1 - swap else original
        starts = [word.start() for word in re.finditer(r"\S+", swapped)]
        place = starts[int(rng.random() * len(starts))]
        if swapped != original:
            place = max(place, YES_NO.match(swapped).end())
        cuts.append(Cut(before, swapped[:place].rstrip(), original, gap))
        before += original + gap
    return cuts


def close(sentence: str, original: str) -> str:
    """Add the quotation marks and brackets that `original` ends with, where `sentence` leaves them open."""
    for mark in re.search(r'["”)\]]*$', original).group():
        opened = sentence.count(OPENING[mark]) if mark in OPENING else (sentence.count(mark) + 1) // 2
        closed = sentence.count(mark) if mark in OPENING else sentence.count(mark) // 2
        sentence += mark if opened > closed else ""
    return sentence


class Writing:
    """A cut in tokens (none: a free response), and how to read what the model adds to it."""

    def __init__(self, processor: Processor, cut: Cut | None):
        """The beginning is encoded as one string, without EOS or a space at its end."""
        self.processor, self.cut = processor, cut
        self.start = processor.opening(cut.before + cut.first if cut else "")

    def read(self, new: list[int], whole: bool) -> str | None:
        """The finished sentence (or free response), None if it is not finished; `whole`: EOS has come."""
        text = self.processor.decode([*self.start, *new])[len(self.processor.decode(self.start)) :]
        if self.cut is None:
            return text.strip() if whole else None
        text = self.cut.first + text if self.cut.first else text.lstrip()
        end = sentence_end(text, len(self.cut.first), whole)
        return None if end is None else close(text[:end], self.cut.original)


def complete(attempts: list[Attempt], model: Llava, processor: Processor, *, noise: Noise | None = None,
             visible: int = 0, max_new_tokens: int = 96, temperature: float = 1.0, top_p: float = 1.0,
             batch_size: int = 32, root: Path | None = None) -> list[str | None]:
    """Steps 1 and 3. All sentences of an attempt continue one computed prompt.

    Args:
        noise: (image, seed) -> image, applied at the image's own resolution, drawn again in every attempt.
        batch_size: attempts at a time; the texts do not depend on it.

    An attempt for which the decoder's window has no room is not finished: None.
    """
    texts = []
    for start in range(0, len(attempts), batch_size):
        texts += _write(attempts[start : start + batch_size], model, processor, noise, root, visible, max_new_tokens,
                        temperature=temperature, top_p=top_p)
    return texts


def _write(attempts: list[Attempt], model: Llava, processor: Processor, noise: Noise | None, root: Path | None,
           visible: int, max_new_tokens: int, **sampling: float) -> list[str | None]:
    """One batch of attempts."""
    asked = []
    for row, attempt in enumerate(attempts):
        rng = np.random.default_rng(attempt.seed)
        seed = int(rng.integers(2**62))
        shown = [processor.image(name, root) if noise is None else processor.view(noise(open_image(name, root), seed))
                 for name in references(attempt.image)]
        prompt = processor.prompt(attempt.prompt, [len(view.rows) for view in shown])
        group = [Writing(processor, cut) for cut in attempt.cuts or [None]]
        if len(prompt) + max(len(writing.start) for writing in group) + max_new_tokens <= processor.window:
            hidden = draw_mask(prompt, processor.image_id, attempt.rho_th, rng, visible)
            asked.append((row, shown, prompt, processor.question(attempt.prompt), hidden, seed, group))
    texts: list[str | None] = [None] * len(attempts)
    if not asked:
        return texts
    rows, shown, prompts, questions, hidden, seeds, groups = map(list, zip(*asked))
    views, ends = [view for views in shown for view in views], np.cumsum([len(views) for views in shown])
    shows = [tuple(range(end - len(views), end)) for views, end in zip(shown, ends)]
    out = generate(model, views, prompts, shows=shows, eos_id=processor.eos_id, questions=questions, hidden=hidden,
                   starts=[[writing.start for writing in group] for group in groups],
                   stop=lambda i, j, new: groups[i][j].read(new, whole=False) is not None,
                   max_new_tokens=max_new_tokens, seeds=seeds, **sampling)
    for row, group, written in zip(rows, groups, out):
        # `stop` ends a sentence before the limit; what it let go on and is still shorter than the limit, EOS has ended.
        read = [writing.read(new, whole=len(new) < max_new_tokens) for writing, new in zip(group, written)]
        texts[row] = assemble(attempts[row].cuts, read)
    return texts


def draw_mask(prompt: list[int], image_id: int, rho_th: float, rng: np.random.Generator, visible: int = 0) -> Tensor:
    """Eq. 6: ids (T,) -> (T,) bool, True at the image tokens that are hidden; the `visible` largest rho never are."""
    is_image = torch.tensor(prompt) == image_id
    rho = rng.random(int(is_image.sum()))  # (k,)
    hidden = rho < rho_th
    hidden[np.argsort(-rho)[:visible]] = False
    return torch.zeros_like(is_image).masked_scatter(is_image, torch.from_numpy(hidden))


def assemble(cuts: list[Cut], texts: list[str | None]) -> str | None:
    """Sentences with the original white space between them; None if one is not finished."""
    if None in texts:
        return None
    gaps = [cut.gap for cut in cuts] or [""]
    return "".join(text + gap for text, gap in zip(texts, gaps) if text.strip()).strip()


def bdhs_pairs(answered: list[dict], model: Llava, processor: Processor, similarity: Similarity, batch_size: int = 32,
               root: Path | None = None, source: dict | None = None, *, rho_th: float = 0.99, visible: int = 0,
               iterations: int = 5, eps_s: float = 0.97, differ: bool = False, noise: bool = False,
               noise_step: int = 500, overflow: Literal["clamp", "wrap"] = "clamp", temperature: float = 1.0,
               max_new_tokens: int = 96, seed: int = 0) -> tuple[list[dict], Counter]:
    """BDHS pairs of records with a chosen response."""
    noisy = (lambda image, seed: add_noise(image, noise_step, seed, overflow)) if noise else None
    write = partial(complete, model=model, processor=processor, noise=noisy, visible=visible,
                    max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, root=root)
    origin = {"noise_step": noise_step, "overflow": overflow} if noise else {"visible": visible} if visible else {}
    return algorithm_1(answered, write, similarity, rho_th=0.0 if noise else rho_th, iterations=iterations,
                       eps_s=eps_s, differ=differ, seed=seed, source={**(source or {}), **origin})


def algorithm_1(answered: list[dict], complete: Complete, similarity: Similarity, *, rho_th: float = 0.99,
                iterations: int = 5, eps_s: float = 0.97, swap: float = 0.5, differ: bool = False, seed: int = 0,
                source: dict | None = None) -> tuple[list[dict], Counter]:
    """Steps 2 and 4, and the loop around them. Raises BadInput on settings out of range."""
    if not 0 <= rho_th <= 1 or iterations < 1:
        raise BadInput(f"rho_th {rho_th} and {iterations} iterations: need 0 <= rho_th <= 1 and at least one")
    made: dict[int, dict] = {}
    waiting = [row for row, record in enumerate(answered) if record["chosen"].strip()]
    dropped = Counter({"nothing chosen": len(answered) - len(waiting)})
    for i in range(1, iterations + 1):
        last, free = i == iterations, 1 < i == iterations
        texts = complete([_attempt(answered[row], i, free, rho_th, swap, seed) for row in waiting])
        failures = [_failure(answered[row], text, differ) for row, text in zip(waiting, texts)]
        usable = [(row, text) for row, text, failure in zip(waiting, texts, failures) if not failure]
        similarities = similarity([answered[row]["chosen"].strip() for row, _ in usable], [text for _, text in usable])
        for (row, text), score in zip(usable, similarities):
            if last or score < eps_s:
                origin = {"method": "bdhs", **(source or {}), "seed": seed, "rho": rho_th, "iteration": i,
                          "guided": not free, "similarity": round(float(score), 4),
                          "text": answered[row].get("source")}
                made[row] = pair_of(answered[row], origin, chosen=answered[row]["chosen"], rejected=text)
        if last:
            dropped.update(failure for failure in failures if failure)
        waiting = [row for row in waiting if row not in made]
    return [made[row] for row in sorted(made)], +dropped


def _attempt(record: dict, iteration: int, free: bool, rho_th: float, swap: float, seed: int) -> Attempt:
    rng = np.random.default_rng([sample_seed(record["id"], seed), iteration])
    number = int(rng.integers(2**62))
    cuts = [] if free else cut_sentences(record["chosen"].strip(), rng, swap)
    return Attempt(record["image"], record["prompt"], cuts, rho_th, number)


def _failure(record: dict, text: str | None, differ: bool) -> str:
    """Why a text cannot be a rejected response; "" if it can."""
    if text is None:
        return "not finished within the token limit"
    if differ and text and not names_another(text, record["chosen"]):
        return "names no other object than the chosen response"
    if not text:
        return "an empty response"
    return "same as the chosen response" if text == record["chosen"].strip() else ""
