"""The table of the README: every loss on the scene world, several seeds, with two controls.

    python benchmarks/alignment.py                              all rows, three seeds
    python benchmarks/alignment.py --losses dpo --seeds 0       one row again
    python benchmarks/alignment.py --jobs 2                     two runs at a time

A seed changes the scenes that pairs are made from, the sampling and the initial adapters. The held-out scenes are
those of the test split, the same for every run, and were not used to choose any setting. Rows:

    start          the embedded model
    start, cut     the start's captions cut after whole sentences to the mean length of the row above. K sentences
                   are too short and K + 1 too long on average, so both are mixed in the proportion that fits.
    sft            supervised training on the chosen answers, same steps and pairs (the second control)
    dpo, ...       the losses

Every run is kept in --out and made once; delete its folder to make it again. The Markdown table goes to the console
and to --out/table.md: mean over seeds, +- standard deviation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))

import torch  # noqa: E402

import evaluate  # noqa: E402
from data.processor import Processor  # noqa: E402
from model.checkpoint import DEFAULT_MODEL, load_llava, save_json  # noqa: E402

LOSSES = ("sft", "dpo", "rdpo", "adavip")
COLUMNS = ("CHAIR_s", "CHAIR_i", "recall", "words", "POPE random", "POPE popular", "POPE adversarial", "minutes")


def measure(folder: Path, split: str, number: int, out: Path) -> dict:
    """Figures of a checkpoint on held-out scenes and its captions, computed once and kept in `out`."""
    if out.is_file():
        kept = json.loads(out.read_text())
        if (kept["split"], kept["scenes"]) == (split, number):
            return kept
    first = evaluate.FIRST_SEED[split]
    seeds = range(first, first + number)
    model, processor = load_llava(folder), Processor(folder)
    rows = evaluate.chair_scenes(seeds)
    said = evaluate.ask(model, processor, rows, max_new_tokens=96, progress=f"captions {out.parent.name}")
    questions = [row for row in evaluate.pope_scenes(seeds) if row["split"] not in evaluate.CONTROLS]
    answers = evaluate.ask(model, processor, questions, max_new_tokens=4, progress=f"POPE {out.parent.name}")
    figures = chair_figures(evaluate.score_chair(rows, said))
    pope = evaluate.score_pope(questions, answers)["splits"]
    figures |= {f"POPE {name}": 100 * split["accuracy"] for name, split in pope.items()}
    result = {"figures": figures, "captions": said, "split": split, "scenes": number}
    save_json(result, out)
    return result


def chair_figures(scores: dict) -> dict[str, float]:
    """The CHAIR columns, in percent; words as they are."""
    return {
        "CHAIR_s": 100 * scores["chair_s"],
        "CHAIR_i": 100 * scores["chair_i"],
        "recall": 100 * scores["recall"],
        "words": scores["words"],
    }


def run(loss: str, seed: int, args: argparse.Namespace) -> dict:
    """Train one loss with one seed, measure it; the figures, with the minutes of pairs and training."""
    out = args.out / f"{loss}-{seed}"
    if not (out / "result.json").is_file():  # written last
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HOME / "train.py"), "--loss", loss, "--seed", str(seed), "--out", str(out)]
        command += ["--eval-scenes", "0", *args.options]
        with (out / "console.txt").open("w") as console:
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
            code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} failed, see {out / 'console.txt'}")
    figures = dict(measure(out / "model", args.split, args.scenes, out / "measured.json")["figures"])
    figures["minutes"] = json.loads((out / "result.json").read_text())["minutes"]
    return figures


def cut_to(words: float, start: dict, seeds: range) -> dict[str, float]:
    """CHAIR of the start's captions cut to a mean length of `words`: a mixture of K and K + 1 sentences."""
    rows = evaluate.chair_scenes(seeds)
    cuts = [chair_figures(evaluate.score_chair(rows, start["captions"], k)) for k in range(1, 9)]
    longer = next((i for i, cut in enumerate(cuts) if cut["words"] >= words), len(cuts) - 1)
    below, above = cuts[max(0, longer - 1)], cuts[longer]
    span = above["words"] - below["words"]
    share = min(1.0, (words - below["words"]) / span) if span > 0 else 1.0
    return {name: below[name] + share * (above[name] - below[name]) for name in below}


def line(name: str, results: list[dict[str, float]]) -> str:
    """One row: mean over the results and, with several, their standard deviation."""
    cells = []
    for column in COLUMNS:
        values = [r[column] for r in results if column in r]
        cell = f"{statistics.mean(values):.1f}" if values else ""
        cells.append(cell + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""))
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes (default: 300)")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="(default: test)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=HOME / "runs" / "alignment")
    parser.add_argument("options", nargs="*", help="after --: further options of train.py, for every run")
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    args.out.mkdir(parents=True, exist_ok=True)
    first = evaluate.FIRST_SEED[args.split]
    start = measure(DEFAULT_MODEL, args.split, args.scenes, args.out / "start.json")
    jobs = [(loss, seed) for seed in args.seeds for loss in args.losses]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(*job, args), jobs)))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|", line("start", [start["figures"]])]
    for loss in args.losses:
        rows = [results[loss, seed] for seed in args.seeds]
        lines.append(line(loss, rows))
        cuts = [cut_to(r["words"], start, range(first, first + args.scenes)) for r in rows]
        lines.append(line(f"start, cut to {loss}'s length", cuts))
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
