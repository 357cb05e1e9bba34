"""COCO captions: one sentence about an image, compared with the sentences of five people.

Paper: Chen et al., "Microsoft COCO Captions", arXiv:1504.00325. BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D
(metrics/ngrams.py), and METEOR, on the tokens of metrics/ptb.py, by the rules of coco-caption. The prompt is that of
lmms-eval (coco2017_cap_val). FiSAO's "Cap_val" is the mean of BLEU, ROUGE-L and CIDEr times 100; the paper does not say
which orders of BLEU it takes.

Options
    split    val2017 (5,000 images), val2014 (40,504) or karpathy, the 5,000 of Karpathy's test split
    meteor   meteor-1.5.jar, to compute METEOR as well (needs Java)
    cap_val  BLEU in the mean: bleu4 alone, or bleu1-4, all four as a figure each (reconstructed)

CIDEr weighs words by the references of the images scored: figures of a subset are not comparable with those of all.
Answers are joined by the image's number in COCO; an answers file may be the official list of {image_id, caption}.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput
from metrics.answers import with_files
from metrics.benchmark import Benchmark, find
from metrics.files import each, field, read_list, unique
from metrics.meteor import meteor as meteor_of
from metrics.ngrams import bleu, cider_d, rouge_l
from metrics.objects import read_captions
from metrics.ptb import tokenize
from metrics.vqa import mean

PROMPT = "Provide a one-sentence caption for the provided image."
COCO, KARPATHY = "https://cocodataset.org/#download (annotations_trainval{year}.zip)", "dataset_coco.json"
FILES = {
    "captions_val2017.json": COCO.format(year=2017),
    "captions_val2014.json": COCO.format(year=2014),
    KARPATHY: "https://cs.stanford.edu/people/karpathy/deepimagesent/ (caption_datasets.zip)",
}
Split = Literal["val2017", "val2014", "karpathy"]


def questions(data: Path, images: Path | None, *, split: Split = "val2017") -> list[dict]:
    """Rows with id (number in COCO), image, prompt and references (captions of people). Raises BadInput also for images
    without a caption."""
    path = find(data, KARPATHY if split == "karpathy" else f"captions_{split}.json", "coco", FILES)
    rows = unique(path, _karpathy(path) if split == "karpathy" else _coco(path))
    if empty := [row["image"] for row in rows if not row["references"]]:
        raise BadInput(f"{path}: {len(empty):,} images have no caption, as {empty[0]}")
    return with_files(rows, images, "coco")


def _row(number: int, image: str, references: list[str]) -> dict:
    return {"id": str(number), "image": image, "prompt": PROMPT, "references": references}


def _coco(path: Path) -> list[dict]:
    captions = read_captions(path)
    return each(read_list(path, "images"), lambda image: _row(
        field(image, "id", int), field(image, "file_name"), captions.get(str(image["id"]), [])))  # fmt: skip


def _karpathy(path: Path) -> list[dict]:
    tested = [(where, image) for where, image in read_list(path, "images") if field(image, "split") == "test"]
    return each(tested, lambda image: _row(field(image, "cocoid", int), field(image, "filename"), [
        field(sentence, "raw") for sentence in field(image, "sentences", list)]))  # fmt: skip


def score(rows: Sequence[dict], said: Mapping[str, str], *, meteor: Path | None = None,
          cap_val: Literal["bleu4", "bleu1-4"] = "bleu4") -> dict:  # fmt: skip
    """{n, words (mean length), bleu_1 .. bleu_4, rouge_l, cider, meteor if asked for, cap_val, rounded}."""
    captions = [tokenize(said[row["id"]]) for row in rows]
    references = [[tokenize(text) for text in row["references"]] for row in rows]
    orders = bleu(captions, references)
    others = {"rouge_l": rouge_l(captions, references), "cider": cider_d(captions, references)}
    combined = 100 * mean([*(orders if cap_val == "bleu1-4" else orders[-1:]), *others.values()])
    figures = {f"bleu_{n}": value for n, value in enumerate(orders, start=1)} | others
    if meteor is not None:
        figures["meteor"] = meteor_of(meteor, captions, references)
    rounded = {name: round(value, 3) for name, value in figures.items()}
    return {"n": len(rows), "words": mean([len(words) for words in captions]), **figures,
            "cap_val": combined, "rounded": {**rounded, "cap_val": round(combined, 1)}}  # fmt: skip


def table(scores: Mapping) -> list[tuple]:
    """The figures as coco-caption prints them, and Cap_val in percent."""
    rounded = scores["rounded"]
    names = [name for name in rounded if name != "cap_val"]
    return [(*names, "cap_val", "images"),
            (*(f"{rounded[name]:.3f}" for name in names), f"{rounded['cap_val']:.1f}", str(scores["n"]))]  # fmt: skip


BENCHMARK = Benchmark(
    rules="COCO captions, coco-caption's BLEU, ROUGE-L and CIDEr-D, tokens by rules like PTBTokenizer's",
    questions=questions, score=score, table=table, max_new_tokens=64, files=FILES,
    figures={name: f"rounded.{name}" for name in ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider", "cap_val")},
)  # fmt: skip
