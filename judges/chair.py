"""A detector as judge: objects that a response mentions and that the detector did not find, CHAIR's way.

Compagnoni et al. 2025, "Mitigating Hallucinations in Multimodal LLMs via Object-aware Preference Optimization", arXiv
2508.20181: responses to a photograph are ranked by CHAIR, with a detector's objects in place of annotations, and the
pairs trained with DPO. So no closed model and no annotation is needed:

    python generate_pairs.py --method rank --data images.jsonl --judge chair --detector maskrcnn

Mentions are those of CHAIR's list (metrics/chair.py). A class of the list that the detector cannot find counts as
absent wherever it is mentioned. Mask R-CNN knows all 80 of them.
"""

from collections.abc import Callable
from pathlib import Path

from data.detect import Detect
from data.images import open_image, references
from judges.scene import judge_mentions, synonyms
from judges.scores import Judge, Judgement, one_by_one
from metrics.chair import mentions


def chair_judge(detect: Detect, root: Path | None = None) -> Judge:
    """Judge of photographs. Relative paths of images start at `root`."""

    shown = shown_to(detect, root)

    def annotate(record: dict, answers: list[str]) -> list[Judgement]:
        return judge_mentions(shown(record), answers)

    return one_by_one(annotate)


def shown_to(detect: Detect, root: Path | None = None) -> Callable[[dict], set[str]]:
    """Record -> the classes of CHAIR's list that a detector finds in its images."""
    def shown(record: dict) -> set[str]:
        found = [one for image in references(record["image"]) for one in detect(image, open_image(image, root))]
        return {name for detection in found for _, name in mentions(detection.label, synonyms())}

    return shown
