"""The methods that make preference pairs, and `make_pairs`, the one way in for generate_pairs.py and train.py.

A method is a chain of functions, each from a chunk of records to (records, how many were dropped for which reason). The
first argument of a function says what its records are, and where a method begins follows from what is given:

    records    images and questions
    answered   with a chosen response too
    pairs      with a chosen and a rejected response

So with given pairs `povid` begins at `noise_pairs`, with given chosen responses at `corrupt_pairs`. The other arguments
are tools, made once for all chunks (pairs/tools.py); the keyword-only arguments are options.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from common import BadInput, arguments_of, options_of, refuse
from data import scenes
from data.check import refuse_several
from data.records import have_context, pair_flaws
from pairs.adavip import adavip_pairs
from pairs.bdhs import bdhs_pairs
from pairs.corrupt import corrupt_pairs
from pairs.mdpo import crop_pairs
from pairs.povid import noise_pairs
from pairs.progress import in_chunks, readable
from pairs.rank import rank_pairs
from pairs.realign import realign_pairs
from pairs.report import report_on
from pairs.sentinel import sentinel_pairs
from pairs.symmpo import symmetric_pairs
from pairs.texts import chosen_responses
from pairs.tools import Setting, Tools, check_options, with_tools


class Method(NamedTuple):
    """A line of METHODS."""

    functions: list[Callable]
    adds: tuple[str, ...] = ()  # what its pairs have besides image, prompt and two responses


METHODS = {
    "rank": Method([rank_pairs]),
    "realign": Method([chosen_responses, realign_pairs], adds=("rejected_image",)),
    "adavip": Method([rank_pairs, adavip_pairs], adds=("rejected_image",)),
    "symmpo": Method([rank_pairs, symmetric_pairs], adds=("rejected_image", "rejected_image_response")),
    "bdhs": Method([chosen_responses, bdhs_pairs]),
    "povid": Method([chosen_responses, corrupt_pairs, noise_pairs], adds=("rejected_image",)),
    "mdpo": Method([rank_pairs, crop_pairs], adds=("rejected_image",)),
    "corrupt": Method([chosen_responses, corrupt_pairs]),
    "sentinel": Method([sentinel_pairs], adds=("context",)),
}
ONE_IMAGE = {"neighbours", "candidates", "folder", "shown"}  # what is found of, or made from, one image of a record
FIELD = {"records": None, "answered": "chosen", "pairs": "rejected"}  # what tells a function's records from others


def make_pairs(method: str, model=None, processor=None, clip=None, clip_processor=None, /, *,
               records: list[dict] | None = None, scene_seeds: Iterable[int] = (), out: Path | None = None,
               **more) -> tuple[list[dict], dict] | None:
    """Make preference pairs of records, or of scenes.

    Args:
        method: a key of METHODS.
        model, processor, clip, clip_processor: taken if given, otherwise loaded when they are needed.
        records: as data/formats.py reads them, with or without responses.
        scene_seeds: scenes to make pairs of where there are no records.
        out: the file that the caller will write; part files next to it let a run go on where it was
            interrupted (pairs/progress.py; `forget` deletes them). None: nothing is kept.
        more: fields of `Setting`, and options of the method's functions and of their tools.

    Returns (pair records, report); None in processes other than the first. The report is {method, images,
    pairs, dropped: {reason: count}} and, if all images are scenes, `hallucinating`: {chosen, rejected}, the
    share of responses that mention an absent object, and `rejected_image` (pairs/report.py). Raises BadInput on
    input that the method cannot use, before the first response is sampled, and ConnectionError when a server
    cannot be reached.
    """
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}, there are {', '.join(METHODS)}")
    records = scene_records(scene_seeds) if records is None else records
    if not records:
        raise BadInput("there are no images to make pairs of")
    # Every method replaces the rejected image, so that a response to the given one would be about another.
    records = [{key: value for key, value in record.items() if key != "rejected_image_response"} for record in records]
    settings = {name: more.pop(name) for name in Setting._fields if name in more}
    functions, options = chain(method, records), complete_options(method, more)
    refuse_unfit(method, functions, options, records)
    setting = Setting(records, **settings, checks=checks(functions, options))
    given = {"model": model, "processor": processor, "clip": clip, "clip_processor": clip_processor}
    tools = Tools(setting, options, {name: tool for name, tool in given.items() if tool is not None})
    steps = tools.bind(functions)

    def run(chunk: list[dict]) -> tuple[list[dict], Counter]:
        dropped = Counter()
        for step in steps:
            chunk, more = step(chunk) if chunk else ([], Counter())
            dropped += more
        kept = [pair for pair in chunk if not pair_flaws(pair)]  # a model may write what no reader takes, such as NUL
        return kept, dropped + Counter({"a text that cannot be read back": len(chunk) - len(kept)})

    def work(rows: list[int]) -> tuple[list[dict], Counter]:
        (made, dropped), bad = readable([records[row] for row in rows], run, setting.root, setting.bad_records)
        return made, dropped + Counter({"unreadable image": bad})

    rank, world, barrier = setting.share
    found = in_chunks([record["id"] for record in records], work, out, fingerprint(method, tools),
                      chunk=setting.batch_size, rank=rank, world=world, barrier=barrier,
                      progress="images" if setting.progress else "")
    if found is None:
        return None
    made, dropped = found
    return made, {**report_on(method, records, made, dropped), **tools.notes}


def chain(method: str, records: list[dict]) -> list[Callable]:
    """The functions of a method from the last on whose records are given. Raises BadInput."""
    functions = METHODS[method].functions
    fields = [FIELD[arguments_of(function)[0]] for function in functions]
    begin = max(i for i, field in enumerate(fields) if field is None or have(field, records))
    if fields[begin] is None and have("rejected", records):
        raise BadInput(f"{method} makes the text pairs itself: give images and questions, not pairs")
    return functions[begin:]


def refuse_unfit(method: str, functions: list[Callable], options: dict, records: list[dict]) -> None:
    """Raise BadInput on records that the functions cannot use, and on options that these records leave without use."""
    writes = FIELD[arguments_of(functions[0])[0]] != "rejected" or any("author" in arguments_of(f) for f in functions)
    if writes and have_context(records):
        raise BadInput(f"{method} writes whole responses: those of these records continue a 'context'")
    if any(ONE_IMAGE.intersection(arguments_of(function)) for function in functions):
        refuse_several(records, method)
    own = options_of(*with_tools(*functions))
    refuse(f"--{name.replace('_', '-')} is for chosen responses that are not given; these records bring theirs"
           for name, default in (("author", "policy"), ("clean_chosen", False))
           if options.get(name, default) != default and name not in own)


def have(field: str, records: list[dict]) -> bool:
    """Whether all records have this field; that some do and some do not is an error."""
    lacking = [record["id"] for record in records if field not in record]
    if 0 < len(lacking) < len(records):
        raise BadInput(f"{field!r} is missing in {len(lacking)} of {len(records)} records (first: "
                       f"{lacking[0]!r}); all must have it, or none")
    return not lacking


def complete_options(method: str, given: dict) -> dict:
    """All options of a method with their values. Raises BadInput on those that it does not have."""
    defaults = {name: default for name, (_, default) in options_of(*with_tools(*METHODS[method].functions)).items()}
    if unknown := given.keys() - defaults.keys():
        raise BadInput(f"{method} has no option {', '.join(sorted(unknown))}")
    check_options(options := defaults | given)
    return options


def checks(functions: list[Callable], options: dict) -> dict:
    """What the model will read of the records, and how much it will add to it (data/check.py)."""
    reads_chosen = any({"answered", "processor"} <= set(arguments_of(function)) for function in functions)
    writes = "max_new_tokens" in options_of(*with_tools(*functions))
    return {"sequences": {"chosen": {"image": "image", "response": "chosen"}} if reads_chosen else None,
            "new_tokens": options["max_new_tokens"] if writes else 0}


def scene_records(seeds: Iterable[int]) -> list[dict]:
    """Scenes and the request to describe them."""
    return [{"id": f"scene-{seed}", "image": scenes.reference(seed), "prompt": scenes.CAPTION_PROMPT}
            for seed in seeds]


def fingerprint(method: str, tools: Tools) -> dict:
    """All that the pairs depend on, as JSON: a run with others must not go on with this one's part files."""
    given = hashlib.sha256(json.dumps(tools.made["records"], sort_keys=True).encode()).hexdigest()
    options = {name: str(value) if isinstance(value, Path) else value for name, value in tools.options.items()}
    if "model" in tools.made:
        shown = tools.made["processor"]
        options |= {"template": list(shown.template), "aspect": shown.aspect}
    return {"method": method, "given": given, "dtype": str(tools.made["dtype"]), **options, **tools.made["identity"]}
