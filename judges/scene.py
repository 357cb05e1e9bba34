"""The scene world as judge: mentions are compared with the scene's own record (CHAIR's words, metrics/chair.py)."""

from functools import cache

from common import BadInput
from data.images import is_scene, references
from data.scenes import objects_present, parse_reference
from judges.scores import Judgement
from metrics.chair import load_synonyms, mentions

synonyms = cache(load_synonyms)


def judge_mentions(shown: set[str], answers: list[str]) -> list[Judgement]:
    """Mentions of objects that are not shown (repeats count), and how many of the shown ones are named."""
    said = [[name for _, name in mentions(answer, synonyms())] for answer in answers]
    return [Judgement(sum(name not in shown for name in named), len(shown & set(named))) for named in said]


def judge_scene(record: dict, answers: list[str]) -> list[Judgement]:
    """Annotator of the scene world: mentions of absent objects (repeats count), present objects named.

    Of several scenes an object is present that any of them shows. Raises BadInput when an image is not a scene.
    """
    return judge_mentions(shown_in_scene(record), answers)


def shown_in_scene(record: dict) -> set[str]:
    """The classes that its scenes show. Raises BadInput when an image of the record is not one."""
    if not is_scene(record["image"]):
        raise BadInput(f"{record['id']}: the contents of {record['image']!r} are unknown, so --judge scene cannot"
                       " rank responses to it; choose another judge, or give pairs that were ranked elsewhere")
    return set().union(*(objects_present(*parse_reference(image)) for image in references(record["image"])))
