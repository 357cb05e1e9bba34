"""What only a model's tokenizer and window can say about records, said of all of them before any work.

Each record's texts go through the very methods that would refuse them later (data/processor.py): special tokens in
a text, a response that merges with the tag before it. Then the tokens are counted that the decoder would get:

    scored      image tokens + prompt + response, less the last token, which predicts nothing   (model/logprobs.py)
    generated   image tokens + prompt + new tokens                                              (model/generate.py)

Image tokens follow from an image's header alone. Readers of files look at everything else (data/records.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from common import BadInput, refuse
from data.batch import context_ids, response_ids, scored
from data.images import references
from data.processor import Processor


def check_records(
    records: Iterable[dict], processor: Processor, root: Path | str | None, source: Path | str, *,
    sequences: Mapping[str, Mapping] | None = None, end: bool = False, new_tokens: int = 0, progress: str = "",
) -> None:
    """Raise one BadInput that lists records as `source: record ID: reason`, if there are any to list.

    Args:
        root: folder that relative paths of images start from.
        source: the file that the records come from.
        sequences, end, new_tokens: as for `problems_of`.
        progress: label of a progress bar, shown after a few seconds; empty for none.
    """
    refuse(f"{source}: record {record['id']!r}: {reason}"
           for record in tqdm(records, desc=progress, disable=None if progress else True, delay=3)
           for reason in problems_of(record, processor, root, sequences, end=end, new_tokens=new_tokens))


def refuse_several(records: Sequence[dict], who: str) -> None:
    """Raise BadInput where records have several images and `who` takes one."""
    if names := [record["id"] for record in records if isinstance(record["image"], list)]:
        raise BadInput(f"{who} takes one image a record, {len(names)} of {len(records)} have several (first:"
                       f" {names[0]!r})")


def problems_of(
    record: dict, processor: Processor, root: Path | str | None, sequences: Mapping[str, Mapping] | None = None, *,
    end: bool = False, new_tokens: int = 0,
) -> list[str]:
    """What is wrong with the texts of a record, [] for nothing.

    Args:
        sequences: what is scored, as for `data.batch.collate`, if anything is; of fields that the record lacks
            nothing is said.
        end: as for `collate`.
        new_tokens: what the option --max-new-tokens lets a model add to the prompt; 0: nothing.
    """
    asked = [(how.image, how.response) for how in scored(sequences or {}).values() if how.response in record]
    lengths, found, images = {}, {}, len(references(record["image"]))  # `found`: what holds for two fields is said once
    for field in dict.fromkeys(["prompt", "context", *(field for _, field in asked)]):
        try:
            lengths[field] = len(_ids(record, field, processor))
        except BadInput as error:
            found[f"{field!r}: {error}"] = True
    if found:
        return list(found)
    lengths["prompt"] += lengths["context"] - images  # image tokens are counted for each field
    counts = {name: sum(processor.image_tokens(image, root) for image in references(record[name]))
              for name in {"image", *(name for name, _ in asked)}}
    for name, field in asked:
        total = counts[name] + lengths["prompt"] + lengths[field] + end - 1
        if total > processor.window:
            found[f"{field!r}: {total} tokens with prompt and image, the decoder takes {processor.window}"] = True
    start = counts["image"] + lengths["prompt"]
    if new_tokens and start + new_tokens > processor.window:
        found[f"{start} tokens of prompt and image and {new_tokens} new ones (--max-new-tokens), the decoder"
              f" takes {processor.window}"] = True
    return list(found)


def _ids(record: dict, field: str, processor: Processor) -> list[int]:
    """Ids of the prompt, the context, or a response. BadInput as from `data.processor`."""
    if field == "prompt":
        return processor.prompt(record["prompt"], [1] * len(references(record["image"])))
    return context_ids(record, processor) if field == "context" else response_ids(record, field, processor)
