"""Broken input for every reader: counts what is neither read nor refused in lines that name the file.

    python -m tests.fuzz                       500 broken files of each kind, some minutes on a core
    python -m tests.fuzz --each 50 records     the kinds whose names hold "records"

A file of each kind is made, broken in a way that follows from the seed, and read. It counts as a fault when anything
but BadInput is raised, when the error names no file, when reading takes more than ten seconds, and, of records, when
what was read cannot be written, read again as the same, shown and tokenised. Exit status 1 if there are faults.
"""

import argparse
import contextlib
import copy
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save_file

import evaluate
from common import BadInput
from data import export, formats
from data.detect import coco_instances
from data.images import references
from data.processor import ClipProcessor, Processor
from judges.known import KnownObjects
from model import reference
from model.adapters import save_adapters
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.lora import add_lora
from model.reward import load_reward_model
from model.torchscript import script_tensors
from pairs.gallery import write_gallery

SECONDS = 10
Q, A, B = "What is it?", "A red bus.", "A blue bus."
ODD = [None, True, 0, -1, 1.5, 10**30, 1e300, "", " ", "x", "7", "\u200b", "\ud83d", "a\0b", "<image>", "<image>\n" + Q, "</s>", "word " * 3000,
       "scene:1", "scene:" + "9" * 5000, "http://x/y.png", "/dev/zero", "/", "a" * 300, [], {}, [[]], [None], ["one.png", "two.png"], ["one.png", 3],
       ["one.png", "none.png"], ["one.png", "scene:1", ["two.png"]], ["one.png"] * 65, "<image> <image> " + Q, Q + "<image>" * 3,
       {"a": 1}, {"bytes": None, "path": None}, {"from": ["x"], "value": {}}, [{"role": "user"}], [[1, 2]], {"size": [30, 40], "counts": "0"}]  # fmt: skip
RAW = [b"NaN", b"1e999", b"9" * 5000, b"[" * 100_000, b'"\\ud83d"', b"\xff", b"{", b"]", b'"', b"\n", b"\0", b"\xef\xbb\xbf", b'{"a":1,"a":2}']


class Kind(NamedTuple):
    """A file that some reader takes."""

    file: str
    content: bytes | list | dict  # what is in it: bytes, the rows of a JSONL file, or the value of a JSON file
    read: Callable[[Path], object]
    others: Callable[[Path], object] = lambda folder: None  # makes what lies beside it


# --------------------------------------------------------------------------------------------- breaking


def spots(value, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values inside a value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from spots(inner, (*path, key))


def break_value(value, rng: random.Random):
    """Some values inside taken out, exchanged, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(spots(value))
        if not places:
            return rng.choice(ODD)
        *path, key = rng.choice(places)
        parent = value
        for step in path:
            parent = parent[step]
        how = rng.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1 and isinstance(parent, dict):
            parent[rng.choice([k for k in ODD if isinstance(k, str)])] = parent.pop(key)
        elif how == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def break_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, put in or taken out, or the end cut off; the first ones, where headers are, more often."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1 if rng.random() < 0.5 else min(len(data), 2000) + 1)
        how = rng.randrange(5)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            data[at : at + rng.choice([1, 8, 100])] = b""
        elif how == 2:
            data[at:at] = rng.choice(RAW)
        elif how == 3:
            data[at : at + 8] = rng.randbytes(8)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def broken(content: bytes | list | dict, rng: random.Random) -> bytes:
    """The bytes of a broken file."""
    if isinstance(content, bytes) or rng.random() < 0.3:
        return break_bytes(content if isinstance(content, bytes) else written(content), rng)
    return written(break_value(content, rng))


def written(content) -> bytes:
    """The bytes of a JSON file, or of a list's JSONL file."""
    if isinstance(content, bytes):
        return content
    rows = content if isinstance(content, list) else [content]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ------------------------------------------------------------------------------------------------ records


def talk(answer: str, user: str = "human", model: str = "gpt", keys: tuple[str, str] = ("from", "value"),
         marks: int = 1) -> list[dict]:
    return [dict(zip(keys, pair)) for pair in ((user, "<image>\n" * marks + Q), (model, answer))]


def chat(answer: str, marks: int = 1) -> list[dict]:
    return talk(answer, "user", "assistant", ("role", "content"), marks)


ROWS = {
    "plumbline": {"id": "a", "image": "one.png", "prompt": Q, "chosen": A, "rejected": B, "rejected_image": "two.png",
                  "rejected_image_response": "A cup.",
                  "source": {"method": "hand", "scores": [1, 2.5], "candidates": [{"image": "two.png"}]}},
    "images": {"id": "a", "image": "one.png", "prompt": Q},
    "llava": {"id": "a", "image": "one.png", "conversations": talk(A)},
    "povid": {"id": "a", "image": "one.png", "conversations": talk(A), "rejected_conversations": talk(B)},
    "llama-factory": {"images": ["one.png"], "conversations": talk(A)[:1], "chosen": {"from": "gpt", "value": A},
                      "rejected": {"from": "gpt", "value": B}},
    "alpaca": {"images": ["one.png"], "instruction": "<image>" + Q, "input": "Now.", "chosen": A, "rejected": B},
    "ms-swift": {"messages": chat(A), "images": ["one.png"], "rejected_response": B},
    "realign": {"image": "one.png", "retrieved_image": "two.png", "chosen": chat(A), "rejected": chat(B)},
    "rlhf-v": {"idx": 7, "image_path": "one.png", "text": json.dumps({"question": Q, "chosen": A, "rejected": B})},
    "sentinel": {"image_id": 7, "image_path": "one.png", "question": Q, "context": "One.", "y_win": A, "y_lose": B},
    "rlaif-v": {"idx": 7, "ds_name": "x", "image": "one.png", "question": Q, "chosen": A, "rejected": B},
    "trl": {"images": ["one.png"], "prompt": chat(A)[:1], "chosen": chat(A)[1:], "rejected": chat(B)[1:]},
}  # fmt: skip


MARKED = f"<image><image> {Q}"
BOTH = {"images": ["one.png", "two.png"]}
SEVERAL = {  # the forms that have a way to say where each of several images is
    "plumbline": {"id": "a", "image": ["one.png", "two.png"], "prompt": MARKED, "chosen": A, "rejected": B,
                  "rejected_image": ["two.png", "two.png"]},
    "images": {"id": "a", "image": ["one.png", "scene:3"], "prompt": f"<image><image>{Q}"},
    "llava": {"id": "a", "image": ["one.png", "two.png"], "conversations": talk(A, marks=2)},
    "llama-factory": {**BOTH, "conversations": talk(A, marks=2)[:1], "chosen": {"from": "gpt", "value": A},
                      "rejected": {"from": "gpt", "value": B}},
    "ms-swift": {**BOTH, "messages": chat(A, marks=2), "rejected_response": B, "rejected_images": ["two.png", "one.png"]},
    "trl": {**BOTH, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or "},
                                                            {"type": "image"}, {"type": "text", "text": f"? {Q}"}]}],
            "chosen": chat(A)[1:], "rejected": chat(B)[1:], "rejected_images": ["two.png", "two.png"]},
}  # fmt: skip


def pictures(folder: Path) -> None:
    for name, colour in (("one", "red"), ("two", "blue")):
        Image.new("RGB", (16, 12), colour).save(folder / f"{name}.png")


def visual_genome(folder: Path) -> None:
    (folder / "VG_100K").mkdir(exist_ok=True)
    Image.new("RGB", (16, 12), "red").save(folder / "VG_100K/one.jpg")


def read_records(processor: Processor) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        data = formats.load(path)
        out = path.with_name("out.jsonl")
        export.write(out, data.records, root=data.root)
        if formats.load(out, "plumbline").records != data.records:
            raise AssertionError("what is written is not what is read again")
        if "rejected" in data.records[0]:
            write_gallery(path.with_name("page.html"), data.records, root=data.root)
            through_trl(path.with_name("trl.jsonl"), data)
        for record in data.records:
            prompt = partial(processor.prompt, count=[1] * len(references(record["image"])))
            for make, key in ((prompt, "prompt"), (processor.opening, "context"),
                              (processor.response, "chosen"), (processor.response, "rejected")):
                with contextlib.suppress(ValueError):  # special tokens are refused by the tokenizer
                    make(record.get(key) or "x")

    return read


def through_trl(path: Path, data: formats.Data) -> None:
    """Texts, marks and paths come back from TRL's columns; scenes have no place in them."""
    records = [record for record in data.records if not any(
        name.startswith("scene:") for key in ("image", "rejected_image") for name in references(record.get(key)) if name)]
    export.write(path, records, "trl", data.root)

    def kept(record: dict) -> list:
        images = [[name and str((data.root / name).resolve()) for name in references(record.get(key))]
                  for key in ("image", "rejected_image")]
        return [images, record["prompt"].strip(), *(record.get(key) for key in ("context", "chosen", "rejected"))]

    if records and list(map(kept, formats.load(path, "trl").records)) != list(map(kept, records)):
        raise AssertionError("what is written with TRL's columns is not what is read again")


def record_kinds(processor: Processor) -> Iterator[tuple[str, Kind]]:
    read = read_records(processor)
    for name, row in {**ROWS, **{f"several {name}": row for name, row in SEVERAL.items()}}.items():
        rows = [{**row, **({"id": f"r{i}"} if "id" in row else {})} for i in range(2)]
        yield f"records {name}", Kind("data.jsonl", rows, read, pictures)
    listed = json.dumps([ROWS["rlaif-v"]] * 2).encode()
    yield "records list", Kind("data.json", listed, read, pictures)
    row = {key: ROWS["sentinel"][key] for key in ("question", "context", "y_win", "y_lose")}
    by_image = json.dumps({"one": [row, row]}, indent=1).encode()
    yield "records by image", Kind("data.json", by_image, read, visual_genome)


# ------------------------------------------------------------------------------------- answers and annotations


IDS = {139: "person", 285: "dog", 632: "chair"}
FILES = {i: f"COCO_val2014_{i:012d}.jpg" for i in IDS}
BOX = [[5, 5, 15, 5, 15, 15, 5, 15]]
INSTANCES = {
    "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in FILES.items()],
    "categories": [{"id": n, "name": name} for n, name in enumerate(IDS.values())],
    "annotations": [{"id": n, "image_id": i, "category_id": n, "bbox": [1, 2, 5.5, 6.25], "iscrowd": n % 2,
                     "segmentation": {"size": [30, 40], "counts": [400, 100, 700]} if n % 2 else BOX}
                    for n, i in enumerate(IDS)]}  # fmt: skip
OBJECTS = {name: [IDS[i]] for i, name in FILES.items()}
CAPTIONS = [{"image_id": i, "caption": "A person and two dogs."} for i in IDS]
LABELS = [{"question_id": n, "image": FILES[i], "text": f"Is there a {c} in the image?", "label": "no"}
          for n, (i, c) in enumerate((i, c) for i in IDS for c in ("dog", "car"))]  # fmt: skip
YES = [{"question_id": row["question_id"], "text": "Yes"} for row in LABELS]


def score(benchmark: str, answers: str, annotations: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        said = io.StringIO()
        command = ["--benchmark", benchmark, "--answers", path.with_name(answers), "--annotations",
                   path.with_name(annotations), "--out", path.with_name("out.json"), "--save-answers",
                   path.with_name("said.jsonl"), "--subset"]  # fmt: skip
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                evaluate.main([str(word) for word in command])
            except SystemExit as end:
                if end.code:
                    raise BadInput(said.getvalue()) from None

    return read


def good(**files) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(written(content))

    return write


def find_objects(path: Path) -> None:
    detect = coco_instances(path)
    for name in FILES.values():
        with contextlib.suppress(ValueError):  # the picture may have another size, or none any more
            detect(name, Image.new("RGB", (40, 30)))


def score_kinds() -> Iterator[tuple[str, Kind]]:
    chair, pope = score("chair", "answers", "truth"), score("pope", "answers", "truth")
    yield "chair answers", Kind("answers", CAPTIONS, chair, good(truth=OBJECTS))
    yield "chair objects", Kind("truth", OBJECTS, chair, good(answers=CAPTIONS))
    yield "chair instances", Kind("truth", INSTANCES, chair, good(answers=CAPTIONS))
    yield "detector instances", Kind("instances.json", INSTANCES, find_objects)
    yield "fisao objects", Kind("objects.json", OBJECTS, lambda path: KnownObjects(path)(FILES[139]))
    yield "pope answers", Kind("answers", YES, pope, good(truth=LABELS))
    yield "pope labels", Kind("truth", LABELS, pope, good(answers=YES))


# --------------------------------------------------------------------------------------------------- models


def linked(source: Path, **changed: bytes) -> Callable[[Path], None]:
    """A folder of links to a model's files, and what replaces some of them."""

    def write(folder: Path) -> None:
        for file in source.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        good(**changed)(folder)

    return write


def use_policy(path: Path) -> None:
    load_llava(path.parent)
    processor = Processor(path.parent)
    processor.prompt(Q), processor.response(A), processor.view(Image.new("RGB", (40, 24)))


def use_clip(path: Path) -> None:
    load_clip(path.parent)
    ClipProcessor(path.parent).text(A)


def model_kinds(scratch: Path) -> Iterator[tuple[str, Kind]]:
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"):
        for what, folder, use in (("policy", DEFAULT_MODEL, use_policy), ("clip", DEFAULT_CLIP, use_clip)):
            data = (folder / name).read_bytes()
            content = json.loads(data) if name.endswith("config.json") else data
            yield f"{what} {name}", Kind(name, content, use, linked(folder))
    nested = {"image_processor": json.loads((DEFAULT_MODEL / "preprocessor_config.json").read_bytes()), "patch_size": 12}
    yield "policy processor_config.json", Kind("processor_config.json", nested, use_policy, linked(DEFAULT_MODEL))

    model = load_llava(DEFAULT_MODEL).requires_grad_(False)
    add_lora(model.language_model, 2, 4.0)
    save_adapters(model, scratch / "adapters", DEFAULT_MODEL)
    config = json.loads((scratch / "adapters" / "adapter_config.json").read_bytes())
    tensors = (scratch / "adapters" / "adapter_model.safetensors").read_bytes()
    beside = linked(scratch / "adapters")
    yield "adapters config", Kind("adapter_config.json", config, lambda path: load_llava(path.parent), beside)
    yield "adapters tensors", Kind("adapter_model.safetensors", tensors, lambda path: load_llava(path.parent), beside)

    save_file({"weight": torch.randn(1, 160), "bias": torch.zeros(1)}, scratch / "head")
    yield "reward head", Kind("reward_head.safetensors", (scratch / "head").read_bytes(),
                              lambda path: load_reward_model(path.parent),
                              lambda folder: (folder / "model").symlink_to(DEFAULT_MODEL))  # fmt: skip
    torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))).save(scratch / "script.pt")
    yield "torchscript", Kind("script.pt", (scratch / "script.pt").read_bytes(), script_tensors)
    reference.write(scratch / "cache", {"chosen/1": torch.zeros(3)}, "key")
    yield "reference cache", Kind("cache.safetensors", (scratch / "cache").read_bytes(),
                                  lambda path: reference.read(path, "key"))  # fmt: skip


# ------------------------------------------------------------------------------------------------- counting


class TooLong(BaseException):
    """Reading took more than SECONDS."""


def _too_long(*_) -> None:
    raise TooLong


def outcome(kind: Kind, data: bytes, folder: Path) -> str:
    """ "read", "refused", or what went wrong."""
    kind.others(folder)
    path = folder / kind.file
    path.unlink(missing_ok=True)  # it may be a link to the good one
    path.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        kind.read(path)
    except BadInput as error:
        return "refused" if str(folder) in str(error) else f"names no file: {error}"
    except TooLong:
        return f"takes more than {SECONDS} s"
    except BaseException as error:  # PanicException of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error}"
    finally:
        signal.alarm(0)
    return "read"


def count(each: int, seed: int = 0, only: list[str] | None = None) -> tuple[Counter, dict[str, str]]:
    """(how many files were read and refused, fault -> the kind and seed that it was first seen with)"""
    totals, faults = Counter(), {}
    scratch = Path(tempfile.mkdtemp())
    signal.signal(signal.SIGALRM, _too_long)
    kinds = {**dict(record_kinds(Processor(DEFAULT_MODEL))), **dict(score_kinds()), **dict(model_kinds(scratch))}
    for name, kind in kinds.items():
        if only and not any(word in name for word in only):
            continue
        found = Counter()
        for i in range(-1, each):  # the first one is whole
            rng = random.Random(f"{name}/{seed + i}")
            data = written(kind.content) if i < 0 else broken(kind.content, rng)
            folder = scratch / "case"
            folder.mkdir()
            result = outcome(kind, data, folder)
            shutil.rmtree(folder)
            if result not in ("read", "refused") or (i < 0 and result != "read"):
                faults.setdefault(f"{name}: {result[:300]}", f"seed {seed + i}")
                result = "fault"
            found[result] += 1
        print(f"{name:30} {dict(found)}", flush=True)
        totals += found
    shutil.rmtree(scratch)
    return totals, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--each", type=int, default=500, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    totals, faults = count(args.each, args.seed, args.kinds)
    for fault, where in faults.items():
        print(f"{fault} ({where})")
    print(f"{totals.total()} files: {dict(totals)}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
