"""Preference data in the shapes that people have it in, to and from Plumbline's records.

    python -m data.formats rlaif-v.parquet pairs.jsonl         any of these -> Plumbline's
    python -m data.formats pairs.jsonl out.parquet --format trl

    format          a row holds                                                          becomes
    plumbline       data/records.py                                                      itself
    llava           id, image, conversations [{from: human | gpt, value}]                image record with `chosen`
    povid           the same and rejected_conversations (POVID, arXiv 2402.11411)        pair
    llama-factory   images, conversations up to the question, chosen and rejected as     pair
                    {from, value} or {role, content}; or: images, instruction, input,
                    chosen, rejected; or SENTINEL's: images, instruction, context,
                    chosen, rejected and nothing else
    ms-swift        images, messages [{role, content}], rejected_response or             pair
                    rejected_messages, perhaps rejected_images
    realign         image, retrieved_image, chosen and rejected as [{role, content}]     pair with rejected image
    rlhf-v          image or image_path, text = JSON of question, chosen, rejected       pair
    rlaif-v         image or image_path, question, chosen, rejected                      pair
    trl             images or image, prompt, chosen, rejected: texts or conversations    pair
    sentinel        image_path or image, question, context, y_win, y_lose; or {image_id: pair with context
                    [{question, context, y_win, y_lose}, ...], ...}, of Visual Genome

Without the rejected answer, or without any, a row of these is an image record. Files are JSONL, JSON (one list)
or Parquet, the last through pyarrow where it is installed; a folder means the Parquet files in it, in the
order of their names. An image is a path, which starts at the file's folder, or its bytes: raw, as {bytes, path}
or as a data URL. Bytes are written to a folder next to the file (the command: next to its output), each image
once, named by its content. The format is known from the keys of the first row, or named.

A record is one image or several, one question and one answer. Of a conversation of several turns the first one is
taken, as later ones refer to what was said before; where the answers belong to a later one, or a system message comes
before the question, the row is a bad one, as is a row without an image. Several images are where the question has
`<image>` marks or image parts, as many as images; those that are all before the text need none. All bad rows are
counted, the first are listed as `file:row: reason`, rows counted from 1 (in JSONL: lines). Ids that a foreign file
repeats get a number appended.

What is written with TRL's columns, and which columns are added to them: data/export.py.
"""

import argparse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from common import BadInput, parse_json, run_script
from data.export import WRITTEN, write
from data.images import IMAGE, references
from data.records import REFERENCES, brief, collect, without_mark
from data.rows import Images, Row, rows_of

QUESTION, ANSWER = ("human", "user"), ("gpt", "assistant")
ANSWERS = ("context", "chosen", "rejected", "rejected_image", "rejected_image_response", "source")
SENTINEL = {"instruction", "context", "chosen", "rejected", "images"}  # in its files for LLaMA-Factory
ORIGIN = ("ds_name", "origin_dataset", "origin_split")  # what RLHF-V and RLAIF-V say about a row's making


class Data(NamedTuple):
    """What a file holds."""

    records: list[dict]
    format: str  # a key of FORMATS
    root: Path  # folder that relative paths of images start from


def load(path: Path | str, format: str | None = None, root: Path | str | None = None, needs: Collection[str] = (), *,
         hints: Mapping[str, str] = {}, answers: bool = True, images: Path | None = None) -> Data:
    """Read and validate preference data of any known format.

    Args:
        path: JSONL, JSON or Parquet file, or a folder of Parquet files.
        format: a key of FORMATS; None goes by the keys of the first row.
        root: folder that relative paths of images start from, before and after; None is that of the file.
        needs: keys that must be there, e.g. {"rejected", "rejected_image"}.
        hints: key -> what to do where it is missing.
        answers: keep the answers; without them, all records are image records of `id`, `image` and `prompt`.
        images: folder for images that the file carries; None: next to it.

    Returns pair records or image records (of rows without a rejected answer) in file order. Raises one BadInput
    that counts all bad rows and lists the first as `file:row: reason`.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise BadInput(f"unknown format {format!r}, there are {', '.join(FORMATS)}")
    root = Path(root) if root is not None else path if path.is_dir() else path.parent
    rows, first = rows_of(path, root), []
    while format is None and (row := next(rows, None)):
        first.append(row)
        format = detect(row[1], row[0]) if row[1] is not None else None
    records = _convert(chain(first, rows), format, root, answers, images)
    return Data(collect(path, records, root, needs, hints), format, root)


def detect(row: dict, where: str = "row") -> str:
    """Name of the format that a row's keys show. BadInput when none fits."""
    filled = {key: value for key, value in row.items() if value is not None}
    for name, format in FORMATS.items():
        if format.fits(filled):
            return name
    keys = ", ".join(brief(key) for key in list(row)[:12]) + ", ..." * (len(row) > 12)
    raise BadInput(f"{where}: the keys {keys} are those of no known format ({', '.join(FORMATS)})")


def _convert(rows: Iterable[Row], format: str | None, root: Path, answers: bool, images: Path | None) -> Iterator[Row]:
    """Rows -> records; a row that cannot become one says why."""
    names: dict[str, int] = {}
    for where, row, reasons in rows:
        if row is not None:
            try:
                row = FORMATS[format].convert(row, Images(where, root, images))
                if format != "plumbline":
                    row = _named({key: value for key, value in row.items() if value is not None}, where, names)
                if not answers:
                    row = {key: value for key, value in row.items() if key not in ANSWERS}
            except BadInput as error:
                row, reasons = None, [str(error)]
        yield where, row, reasons


def _plumbline(row: dict, image_of: Images) -> dict:
    return row | {key: image_of(row[key]) for key in REFERENCES if row.get(key)
                  and all(isinstance(image, bytes | dict | str) for image in references(row[key]))}


def _llava(row: dict, image_of: Images) -> dict:
    question, answer = _turn(row.get("conversations"), "conversations")
    return {"id": row.get("id"), "image": image_of(row.get("images") or row.get("image")), "prompt": question,
            "chosen": answer}


def _povid(row: dict, image_of: Images) -> dict:
    rejected = _same_question(row, "conversations", "rejected_conversations")
    return {**_llava(row, image_of), "rejected": rejected, "source": {"format": "povid"}}


def _llama_factory(row: dict, image_of: Images) -> dict:
    for key in ("system", "history", "tools"):
        if row.get(key):
            raise BadInput(f"{key!r} is filled: a record is one question and its answers")
    if row.get("context") and {key for key, value in row.items() if value is not None} != SENTINEL:
        raise BadInput("'context' is filled: it is the beginning of the responses only in SENTINEL's files, whose rows"
                       f" have {', '.join(sorted(SENTINEL))} alone")
    if "instruction" in row:
        question = "\n".join(_question(row[key]) for key in ("instruction", "input") if row.get(key))
    else:
        key = "conversations" if row.get("conversations") is not None else "messages"
        question = _question(_said(row.get(key), QUESTION, key))
    return {"id": row.get("id"), "image": image_of(row.get("images") or row.get("image")), "prompt": question,
            "context": row.get("context") or None, "chosen": _answer(row, "chosen", "output"),
            "rejected": _answer(row, "rejected"), "source": {"format": "llama-factory"}}


def _ms_swift(row: dict, image_of: Images) -> dict:
    question, chosen = _turn(row.get("messages"), "messages")
    rejected = _answer(row, "rejected_response")
    if row.get("rejected_messages") is not None:
        rejected = _same_question(row, "messages", "rejected_messages")
    elif rejected is not None and len(row["messages"]) > 2:
        raise BadInput("'rejected_response' answers the last of several questions; a record has one")
    image, other = image_of(row.get("images") or row.get("image")), row.get("rejected_images")
    other = image_of(other) if other else None
    return {"id": row.get("id"), "image": image, "prompt": question, "chosen": chosen, "rejected": rejected,
            "rejected_image": other if other != image else None, "source": {"format": "ms-swift"}}


def _realign(row: dict, image_of: Images) -> dict:
    question, chosen = _turn(row.get("chosen"), "chosen")
    return {"id": row.get("id"), "image": image_of(row.get("image")), "prompt": question, "chosen": chosen,
            "rejected": _same_question(row, "chosen", "rejected"),
            "rejected_image": image_of(row.get("retrieved_image")), "source": {"format": "realign"}}


def _rlhf_v(row: dict, image_of: Images) -> dict:
    try:
        texts = parse_json(row.get("text").encode("utf-8", "surrogatepass"))
    except (AttributeError, ValueError):
        texts = None
    if not isinstance(texts, dict):
        raise BadInput("'text' is not a JSON object of question, chosen and rejected")
    return {**_rlaif_v({**row, **texts}, image_of), "source": {"format": "rlhf-v", **_origin(row)}}


def _rlaif_v(row: dict, image_of: Images) -> dict:
    return {"id": row.get("idx", row.get("id")), "image": image_of(row.get("image") or row.get("image_path")),
            "prompt": _question(row.get("question")), "chosen": row.get("chosen"),
            "rejected": row.get("rejected"), "source": {"format": "rlaif-v", **_origin(row)}}


def _sentinel(row: dict, image_of: Images) -> dict:
    return {"id": row.get("image_id"), "image": image_of(row.get("image_path") or row.get("image")),
            "prompt": _question(row.get("question")), "context": row.get("context") or None,
            "chosen": row.get("y_win"), "rejected": row.get("y_lose"), "source": {"format": "sentinel"}}


def _trl(row: dict, image_of: Images) -> dict:
    if row.get("prompt") is None:  # the prompt is at the start of both conversations
        question, chosen = _turn(row.get("chosen"), "chosen")
        rejected = _same_question(row, "chosen", "rejected")
    else:
        question = _question(_said(row["prompt"], QUESTION, "prompt"))
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    context, other = row.get("context"), row.get("rejected_images")
    if context is not None:
        context, chosen, rejected = _parted(context, chosen, rejected)
    return {"id": row.get("id", row.get("idx")), "image": image_of(row.get("images") or row.get("image")),
            "prompt": question, "context": context, "chosen": chosen, "rejected": rejected,
            "rejected_image": image_of(other) if other else None,
            "rejected_image_response": row.get("rejected_image_response"), "source": {"format": "trl"}}


def _parted(context: object, *answers: str | None) -> tuple[str | None, ...]:
    """The context and what each answer says after it, as `_trl_row` joined them; None and the answers where they do not
    begin with it: a column of that name may hold anything."""
    start = context.rstrip(" ") if isinstance(context, str) else None
    if start is None or not all(answer and answer.startswith(start) for answer in answers):
        return None, *answers
    return context, *(answer.removeprefix(start).removeprefix(" ") for answer in answers)


class Format(NamedTuple):
    """How a row is recognised, and how it becomes a record."""

    fits: Callable[[dict], bool]  # do the (filled) keys of a row belong to this format?
    convert: Callable[[dict, Images], dict]


FORMATS = {  # the first that fits is taken
    "povid": Format(lambda row: "rejected_conversations" in row, _povid),
    "llama-factory": Format(lambda row: "instruction" in row or (
        "chosen" in row and not {"conversations", "messages"}.isdisjoint(row)), _llama_factory),
    "llava": Format(lambda row: "conversations" in row, _llava),
    "ms-swift": Format(lambda row: "messages" in row, _ms_swift),
    "realign": Format(lambda row: "retrieved_image" in row, _realign),
    "trl": Format(lambda row: {"images", "prompt"} <= row.keys() or isinstance(row.get("prompt"), list)
                  or isinstance(row.get("chosen"), list), _trl),
    "sentinel": Format(lambda row: {"y_win", "y_lose"} <= row.keys(), _sentinel),
    "rlaif-v": Format(lambda row: "question" in row, _rlaif_v),
    "rlhf-v": Format(lambda row: "text" in row and bool({"image", "image_path"} & row.keys()), _rlhf_v),
    "plumbline": Format(lambda row: {"image", "prompt"} <= row.keys(), _plumbline),
}


def _question(text: object) -> str:
    if not isinstance(text, str):
        raise BadInput(f"the question must be a string, found {type(text).__name__}")
    return text.strip()


def _turn(messages: object, key: str) -> tuple[str, str | None]:
    """First question of a conversation, and the answer if there is one."""
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{key!r} is not a conversation of a question and an answer")
    return (_question(_said(messages[:1], QUESTION, key)),
            _said(messages[1:2], ANSWER, key) if len(messages) > 1 else None)


def _same_question(row: dict, chosen: str, rejected: str) -> str:
    """The rejected answer, to the same question as the chosen one."""
    question, answer = _turn(row.get(rejected), rejected)
    if without_mark(question) != without_mark(_turn(row.get(chosen), chosen)[0]):
        raise BadInput(f"{chosen!r} and {rejected!r} ask different questions")
    return answer


def _answer(row: dict, *keys: str) -> str | None:
    """The answer under the first key that is filled."""
    return next((_said(row[key], ANSWER, key) for key in keys if row.get(key) is not None), None)


def _said(value: object, roles: tuple[str, str], key: str) -> str:
    """A text, or that of a message or a conversation of one."""
    if isinstance(value, list):
        if len(value) != 1:
            raise BadInput(f"{key!r} has {len(value)} messages, one is wanted")
        value = value[0]
        if not isinstance(value, dict):
            raise BadInput(f"{key!r}: a message must be an object, found {type(value).__name__}")
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        if role not in roles:
            raise BadInput(f"{key!r}: a message of the {roles[1]} is wanted, found one of {brief(role)}")
        value = value.get("content", value.get("value"))
        value = _joined(value) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise BadInput(f"{key!r} must be a text, found {type(value).__name__}")
    return value


def _joined(parts: list) -> object:
    """The text of a message's parts, or the parts where they are none. Images between texts, of several, are marked."""
    texts = [part.get("text") or "" if isinstance(part, dict) else part for part in parts]
    images = [isinstance(part, dict) and part.get("type") == "image" for part in parts]
    if images[: sum(images)].count(False):  # not all at the beginning
        texts = [IMAGE if image and sum(images) > 1 else text for image, text in zip(images, texts)]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else parts


def _origin(row: dict) -> dict:
    """What the row says about its making; `origin_split` is JSON inside a string in some files."""
    found = {key: row[key] for key in ORIGIN if row.get(key) is not None}
    if isinstance(found.get("origin_split"), str):
        with suppress(BadInput):  # a plain string is fine, too
            found["origin_split"] = parse_json(found["origin_split"].encode())
    return found


def _named(record: dict, where: str, names: dict[str, int]) -> dict:
    """Give a record an id, unique in its file: its own or the row's number; repeated ones get -2, -3, ..."""
    name = record.get("id", f"row-{where.rpartition(':')[2]}")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise BadInput(f"the id must be a string or a whole number, found {type(name).__name__}")
    name = base = str(name)
    while name in names:
        names[base] += 1
        name = f"{base}-{names[base]}"
    names[name] = 1
    return {"id": name, **{key: value for key, value in record.items() if key != "id"}}


def main() -> None:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(prog="python -m data.formats", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="IN", help="JSONL, JSON, Parquet or a folder of Parquet files")
    parser.add_argument("out", type=Path, metavar="OUT", help="for trl .parquet or .jsonl")
    parser.add_argument("--format", choices=WRITTEN, default=WRITTEN[0], help="of OUT (default: %(default)s)")
    parser.add_argument("--read-as", choices=FORMATS, help="format of IN (default: by the keys of its first row)")
    arguments = parser.parse_args()
    out = arguments.out
    data = load(arguments.data, arguments.read_as, images=out.with_name(f"{out.stem}-images"))
    write(out, data.records, arguments.format, data.root)
    print(f"{out}: {len(data.records):,} records, read as {data.format}")


if __name__ == "__main__":
    run_script(main, "data.formats")
