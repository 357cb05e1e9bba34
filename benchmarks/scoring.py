"""How long the slowest scores take: CIDEr-D of 10,000 captions with five references each, and AMBER's 15,220 answers.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py [--captions 10000] [--amber FOLDER]

Captions are random words, frequent as rank^-1: the work of scoring is real, the scores are not. AMBER's answers are
"Yes", and sentences with the objects shown; FOLDER holds its official files. Prints seconds.
"""

import argparse
import random
import sys
from itertools import accumulate
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from metrics.ngrams import bleu, cider_d, rouge_l  # noqa: E402
from metrics.ptb import tokenize  # noqa: E402

WORDS = [f"w{rank}" for rank in range(1, 8001)]
WEIGHTS = list(accumulate(1 / rank for rank in range(1, 8001)))


def sentence(rng: random.Random) -> str:
    """Some ten words, as captions of COCO have."""
    return " ".join(rng.choices(WORDS, cum_weights=WEIGHTS, k=rng.randint(8, 13))).capitalize() + "."


def timed(name: str, compute, *inputs):
    """compute(*inputs), with its seconds printed."""
    start = perf_counter()
    result = compute(*inputs)
    print(f"{name:24} {perf_counter() - start:6.1f} s", flush=True)
    return result


def main() -> None:
    """Time the scorers asked for, on one core, and print seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--amber", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    number, rng = args.captions, random.Random(0)
    texts = [[sentence(rng) for _ in range(6)] for _ in range(number)]
    words = timed(f"{6 * number:,} tokenized", lambda: [[tokenize(text) for text in image] for image in texts])
    captions, references = [image[0] for image in words], [image[1:] for image in words]
    for name, figure in (("BLEU", bleu), ("ROUGE-L", rouge_l), ("CIDEr-D", cider_d)):
        timed(name, figure, captions, references)
    if args.amber:
        from metrics import amber

        rows = amber.questions(args.amber, None)
        shown = {row["id"]: " and a ".join(names[0] for names in row["truth"]) for row in rows if "label" not in row}
        said = {row["id"]: f"There is a {shown[row['id']]}." if row["id"] in shown else "Yes" for row in rows}
        timed(f"AMBER, {len(rows):,} answers", amber.score, rows, said)


if __name__ == "__main__":
    main()
