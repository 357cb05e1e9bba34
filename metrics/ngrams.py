"""Scores of captions against reference captions, with the definitions and constants of coco-caption.

BLEU (Papineni et al., ACL 2002): pooled over the corpus; of g_k n-grams of length k, c_k are found in the references,
each at most as often as in one of them; L words, and R of the reference closest in length (of two, the shorter).

    BLEU_n = [prod_{k<=n} (c_k + 1e-15) / (g_k + 1e-9)]^(1/n)  x  exp(1 - 1/q) if q < 1,    q = (L + 1e-15) / (R + 1e-9)

ROUGE-L (Lin, 2004): lcs is the longest common subsequence; the best precision and the best recall may be of different
references. The mean over captions of

    (1 + b^2) P R / (R + b^2 P),    P = max lcs / |c|,    R = max lcs / |r|,    b = 1.2

CIDEr-D (Vedantam et al., CVPR 2015, arXiv:1411.5726): N images; df(w) images with n-gram w in a reference;
v(w) = count(w) (log N - log max(1, df(w))); l counts bigrams. The mean over captions, their references and n = 1..4 of

    10 exp(-(l_c - l_r)^2 / 2 sigma^2)  sum_w min(v_c(w), v_r(w)) v_r(w) / |v_c| |v_r|,    sigma = 6

| symbol | argument      | type                                        |
|--------|---------------|---------------------------------------------|
| c      | captions[i]   | list of words (metrics/ptb.py)              |
| r      | references[i] | lists of words, at least one                |

A score divided by nothing is 0.0 in place of an error: no captions, captions of less than n words in CIDEr.
"""

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from math import exp, fsum, log, sqrt
from operator import or_

from metrics.vqa import mean

Words = Sequence[str]
MAX_N = 4


def count(words: Words, n: int) -> Counter:
    """n-gram -> how often it occurs."""
    return Counter(zip(*(words[i:] for i in range(n))))


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus."""
    pairs = list(zip(captions, references))
    closest = sum(min((abs(len(ref) - len(caption)), len(ref)) for ref in refs)[1] for caption, refs in pairs)
    q = (sum(map(len, captions)) + 1e-15) / (closest + 1e-9)
    brevity = exp(1 - 1 / q) if q < 1 else 1.0
    scores, product = [], 1.0
    for n in range(1, MAX_N + 1):
        found = made = 0
        for caption, refs in pairs:
            most = reduce(or_, (count(ref, n) for ref in refs))  # maximum of the counts
            found += (count(caption, n) & most).total()
            made += max(0, len(caption) - n + 1)
        product *= (found + 1e-15) / (made + 1e-9)
        scores.append(product ** (1 / n) * brevity)
    return scores


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> float:
    """Mean ROUGE-L."""
    return mean(_rouge(caption, refs, beta) for caption, refs in zip(captions, references))


def _rouge(caption: Words, refs: Sequence[Words], beta: float) -> float:
    caption, refs = caption or [""], [ref or [""] for ref in refs]  # no word is one empty word, as released
    common = [longest_common(caption, ref) for ref in refs]
    precision = max(common) / len(caption)
    recall = max(lcs / len(ref) for lcs, ref in zip(common, refs))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if max(common) else 0.0


def longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> float:
    """Mean CIDEr-D."""
    counted = [[_counts(ref) for ref in refs] for refs in references]
    images = Counter(gram for refs in counted for gram in set().union(*(grams for ref in refs for grams in ref)))
    idf = {gram: log(len(captions)) - log(n) for gram, n in images.items()}
    rare = log(len(captions)) if captions else 0.0  # of an n-gram in no reference
    scores = []
    for caption, refs in zip(captions, counted):
        vectors = [_weighted(grams, idf, rare) for grams in _counts(caption)]
        similar = fsum(_similarity(vectors, [_weighted(grams, idf, rare) for grams in ref], sigma) for ref in refs)
        scores.append(10 * similar / MAX_N / len(refs))
    return mean(scores)


def _counts(words: Words) -> list[Counter]:
    return [count(words, n) for n in range(1, MAX_N + 1)]


def _weighted(grams: Counter, idf: dict, rare: float) -> tuple[dict, float, int]:
    """n-grams of one length -> (weights, norm, how many)."""
    weights = {gram: times * idf.get(gram, rare) for gram, times in grams.items()}
    return weights, sqrt(sum(weight * weight for weight in weights.values())), sum(grams.values())


def _similarity(caption: list[tuple], ref: list[tuple], sigma: float) -> float:
    """Sum over n of the clipped cosines, damped by the difference in length, which is counted in bigrams."""
    total = 0.0
    for (weights, norm, _), (others, other_norm, _) in zip(caption, ref):
        dot = sum(min(weight, others[gram]) * others[gram] for gram, weight in weights.items() if gram in others)
        total += dot / (norm * other_norm) if norm and other_norm else 0.0
    return total * exp(-((caption[1][2] - ref[1][2]) ** 2) / (2 * sigma**2))
