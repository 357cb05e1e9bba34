"""POPE: yes/no questions about objects, half of them about objects the picture does not show.

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023,
arXiv:2305.10355. "yes" is the positive class:

    accuracy = (TP + TN) / n    precision = TP / (TP + FP)    recall = TP / (TP + FN)
    F1 = 2 TP / (2 TP + FP + FN)                              yes_ratio = (TP + FP) / n

| symbol | argument             | type                                                        |
|--------|----------------------|-------------------------------------------------------------|
| answer | answers[question_id] | str, the model's words                                      |
| label  | labels[question_id]  | "yes" (picture shows the object) or "no"                    |

An answer is read by the released rule (`read_answer`): whatever is not recognised as "no" counts as "yes".
That is kept, but answers that only became "yes" for want of a "no" are counted as `other`. A ratio with
nothing to divide by is 0.0 (the released code fails). Answers are joined with labels by id, never by order.
The one figure usually printed is the mean F1 of the splits random, popular and adversarial (`mean_of`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from common import BadInput
from metrics.chair import percent, ratio

RULES = "POPE as released: 'No', 'no' or 'not' in the first sentence means no, everything else yes"
SPLITS = ("random", "popular", "adversarial")
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read_answer(text: str) -> str:
    """Released rule: the words before the first full stop, without commas; "no" only if one says so."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_other(text: str) -> bool:
    """True where `read_answer` gives "yes" although the answer does not contain the word yes."""
    return read_answer(text) == "yes" and "yes" not in re.findall(r"[a-z]+", text.lower())


def pope(answers: Mapping[str, str], labels: Mapping[str, str]) -> dict:
    """Scores of answers against labels, both keyed by question id.

    Returns counts (n, TP, FP, TN, FN, other), fractions in [0, 1] (unrounded) and `percent` (2 decimals).
    Raises BadInput naming the ids on only one side and labels other than "yes" and "no".
    """
    if odd := sorted(map(str, set(answers) ^ set(labels))):
        raise BadInput(f"{len(odd)} question ids without answer or without label: {', '.join(odd)}")
    if bad := [f"{key}: {label!r}" for key, label in labels.items() if label not in ("yes", "no")]:
        raise BadInput(f"labels must be 'yes' or 'no': {', '.join(bad)}")
    said = {key: read_answer(text) for key, text in answers.items()}
    tp = sum(said[key] == "yes" for key, label in labels.items() if label == "yes")
    fp = sum(said[key] == "yes" for key, label in labels.items() if label == "no")
    fn, tn = list(labels.values()).count("yes") - tp, list(labels.values()).count("no") - fp
    figures = {
        "accuracy": ratio(tp + tn, len(labels)),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": ratio(tp + fp, len(labels)),
    }
    other = sum(map(is_other, answers.values()))
    counts = {"n": len(labels), "TP": tp, "FP": fp, "TN": tn, "FN": fn, "other": other}
    return {**counts, **figures, "percent": percent(figures, 2)}


def mean_of(splits: Iterable[Mapping[str, float]]) -> dict:
    """Unweighted mean of each figure over the splits (not pooled), as POPE is usually printed."""
    splits = list(splits)
    figures = {name: sum(split[name] for split in splits) / len(splits) for name in FIGURES}
    return {**figures, "percent": percent(figures, 2)}
