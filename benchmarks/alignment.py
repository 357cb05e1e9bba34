"""The tables of the README: every loss, and DPO on every kind of pairs, on the scene world, several seeds.

    python benchmarks/alignment.py                                  all rows, three seeds
    python benchmarks/alignment.py --rows dpo dpo+anchor --seeds 0  some rows again
    python benchmarks/alignment.py --jobs 2                         two runs at a time

A row is a loss of train.py, or LOSS/METHOD: that loss on the pairs of a method of generate_pairs.py, or of PAIRS, a
method with options. Or it is one of ROWS, with options of its own or in two stages. "sft, then dpo" is OPA-DPO's order
(arXiv 2501.09695) on the same pairs: its reference is the fine-tuned model, its figures compare with the start like all
others. A seed changes the scenes that pairs are made from, the sampling and the initial adapters. The held-out scenes
are those of the test split, the same for every run, and were not used to choose any setting. Next to each row:

    cut      CHAIR_s of the start's captions cut after whole sentences to the mean length of the row: what
             shortening alone would give. K sentences are too short and K + 1 too long on average, so both are
             mixed in the proportion that fits.
    POPE     of the first 100 scenes
    chosen   nats a response: mean over the first 100 chosen responses it learned from of log pi(y) - log pi_start(y)
    KL       the same, mean over captions it says of the first 100 held-out scenes
    minutes  making the pairs and training, on one core

`sft` on the chosen answers with the same steps and pairs is the second control. ppo and rloo learn from the
reward model of the same seed (row reward_model: its accuracy on held-out pairs is printed below the table).

Every run is kept in --out and made once; delete its folder to make it again. The Markdown table goes to the
console and to --out/table.md: mean over seeds, +- standard deviation. --out/table.svg is the plot of it.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))

import torch  # noqa: E402

import prepare  # noqa: E402
import results  # noqa: E402
import svg  # noqa: E402
import train  # noqa: E402
from common import read_json, write_text  # noqa: E402
from data.batch import collate  # noqa: E402
from data.processor import Processor  # noqa: E402
from data.records import read_pairs, write_jsonl  # noqa: E402
from metrics import chair  # noqa: E402
from model.checkpoint import DEFAULT_MODEL, load_llava, save_json  # noqa: E402
from model.logprobs import Scorer  # noqa: E402
from options import read_arguments  # noqa: E402
from pairs import methods  # noqa: E402
from pairs.online import sample  # noqa: E402
from plots import read_log  # noqa: E402

OFFLINE = ("sft", "dpo", "ipo", "slic", "slic_hf", "dpo_weighted", "rdpo", "rdpo_released", "mdpo", "adavip",
           "lpoi", "symmpo", "povid", "povid_released")
ONLINE = ("online_dpo", "mixed_dpo", "bdhs_online", "ppo", "rloo", "fisao")
# The rows above learn from the pairs of rank, realign, adavip or symmpo.
METHODS = ("dpo/realign", "dpo/bdhs", "dpo/corrupt", "povid/povid", "dpo/sentinel", "rdpo/realign, clean",
           "sft/realign, clean", "rdpo/realign, scene", "sft/realign, scene", "dpo/bdhs, clean", "sft/bdhs, clean",
           "dpo/bdhs, scene", "sft/bdhs, scene")
PAIRS = {  # methods with options of generate_pairs.py
    "realign, clean": ("realign", {"clean_chosen": True}),
    "realign, scene": ("realign", {"author": "scene"}),
    "bdhs, clean": ("bdhs", {"clean_chosen": True, "rho_th": 0.5, "differ": True}),
    "bdhs, scene": ("bdhs", {"author": "scene", "rho_th": 0.5, "differ": True}),
}
COMPARED = 100  # responses whose log-probs are compared with the start's
COLUMNS = ("CHAIR_s", "cut", "CHAIR_i", "recall", "words", "false attribute", "false relation", "coverage",
           "repetition", "POPE adversarial", "chosen", "KL", "minutes")
AXES = ("recall: share of the present objects that a caption names, percent (right is better)",
        "CHAIR_s: share of captions that name an absent object, percent (down is better)")


class Row(NamedTuple):
    """What a row trains."""

    loss: str
    method: str = ""  # that makes its pairs, or one of PAIRS (default: the loss's own)
    options: tuple[str, ...] = ()  # of train.py
    start: str = ""  # row from whose model of the same seed it starts (default: the embedded model)


ROWS = {
    "dpo+anchor": Row("dpo", options=("--anchor", "1")),
    "dpo+sft": Row("dpo", options=("--sft-weight", "1")),
    "sft, then dpo": Row("dpo", start="sft"),
    "rdpo/realign, clean, beta 0.5": Row("rdpo", "realign, clean", ("--beta", "0.5")),
    "dpo/bdhs, clean, beta 0.5": Row("dpo", "bdhs, clean", ("--beta", "0.5")),
}
GROUPS = {"start and control": ("start", "sft"), "on other pairs": METHODS, "samples of its own": ONLINE,
          "terms, stages, beta": ROWS}  # colours of the plot


def row_of(name: str) -> Row:
    """A row of ROWS, LOSS or LOSS/METHOD."""
    row = ROWS.get(name) or Row(*name.split("/"))
    return row._replace(method=row.method or train.LOSSES[row.loss].pairs)


def known_row(name: str) -> str:
    """The name of a row that can be made, for argparse."""
    loss, _, method = name.partition("/")
    if name not in ROWS and (loss not in train.LOSSES or method not in ("", *methods.METHODS, *PAIRS)):
        raise argparse.ArgumentTypeError(f"{name!r} is no loss, no LOSS/METHOD and none of the rows with a name")
    return name


def folder_of(name: str, seed: int, out: Path) -> Path:
    """Where a run is kept."""
    return out / f"{re.sub('[^a-z0-9_.]+', '-', name)}-{seed}"


def measure(folder: Path, split: str, number: int, out: Path, pairs: Path | None = None) -> dict:
    """Figures of a checkpoint on held-out scenes and its captions, computed once and kept in `out`."""
    if out.is_file():
        kept = read_json(out)
        if (kept["split"], kept["scenes"]) == (split, number) and (pairs is None or "chosen" in kept["figures"]):
            return kept
    model, processor = load_llava(folder), Processor(folder)
    figures, said = results.measure(model, processor, number, split)
    rows = chair.questions(None, None, scenes=min(number, COMPARED), split=split)
    figures["KL"] = gain(model, processor, captioned(model, processor, rows), "answer")
    if pairs:
        figures["chosen"] = gain(model, processor, read_pairs(pairs)[:COMPARED], "chosen", pairs.parent)
    result = {"figures": figures, "captions": said, "split": split, "scenes": number}
    save_json(result, out)
    return result


def captioned(model, processor: Processor, rows: list[dict]) -> list[dict]:
    """Records with a caption each, sampled from a model as token ids."""
    records = [{**row, "id": row["image"]} for row in rows]
    said = sample(model, processor, records, list(range(len(rows))), None, samples=1, temperature=1.0,
                  max_new_tokens=96)
    return [{**record, "answer": ids[0]} for record, ids in zip(records, said)]


@torch.no_grad()
def gain(model, processor: Processor, records: list[dict], response: str, root: Path | None = None) -> float:
    """Nats a response that a model finds more likely than the start does, mean over a field of records."""
    start, total = load_llava(DEFAULT_MODEL), 0.0
    for part in (records[i : i + 50] for i in range(0, len(records), 50)):
        batch = collate(part, {response: dict(image="image", response=response)}, processor, root)
        logps = [Scorer(m)(batch.packed, m.vision_features(batch.pixels))[0].sum() for m in (model, start)]
        total += (logps[0] - logps[1]).item()
    return total / len(records)


def pairs_file(method: str, seed: int, out: Path) -> Path:
    """The pairs of a method and a seed, made once and kept."""
    return folder_of(f"pairs-{method}", seed, out) / "pairs.jsonl"


def make_pairs(method: str, seed: int, args: argparse.Namespace) -> None:
    """The pairs that all rows with this method and seed share, made as by train.py, and the minutes it took."""
    path = pairs_file(method, seed, args.out)
    if path.is_file():
        return
    started = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    name, options = PAIRS.get(method, (method, {}))
    own = read_arguments(train.LOSSES, ["--loss", "dpo", "--pairs", name, "--seed", str(seed),
                                "--out", str(path.parent), *args.options])
    model, processor = load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)
    records = prepare.make_records(own, train.LOSSES["dpo"], model, processor, **options)
    save_json({"minutes": (time.perf_counter() - started) / 60}, path.with_name("minutes.json"))
    write_jsonl(path, records)


def command_of(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The command that trains one row with one seed."""
    row, out = row_of(name), folder_of(name, seed, args.out)
    command = [sys.executable, str(HOME / "train.py"), "--loss", row.loss, "--seed", str(seed), "--out", str(out)]
    command += ["--data", str(pairs_file(row.method, seed, args.out))] if row.method else []
    command += ["--model", str(folder_of(row.start, seed, args.out) / "model")] if row.start else []
    if row.loss in ("ppo", "rloo"):
        command += ["--reward", str(folder_of("reward_model", seed, args.out))]
    # --overwrite what an interrupted run left
    return [*command, *row.options, "--eval-scenes", "0", "--overwrite", *args.options]


def run(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Train one row with one seed, unless that was done; the folder of the run."""
    out = folder_of(name, seed, args.out)
    if not (out / "result.json").is_file():  # written last
        out.mkdir(parents=True, exist_ok=True)
        command = command_of(name, seed, args)
        with (out / "console.txt").open("w") as console:
            environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
            code = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            raise RuntimeError(f"{' '.join(command)} failed, see {out / 'console.txt'}")
    return out


def figures_of(name: str, seed: int, cuts: list[dict], args: argparse.Namespace) -> dict[str, float]:
    """Train and measure one row with one seed."""
    row, out = row_of(name), run(name, seed, args)
    pairs = pairs_file(row.method, seed, args.out) if row.method else None
    figures = dict(measure(out / "model", args.split, args.scenes, out / "measured.json", pairs)["figures"])
    figures["cut"] = cut_to(figures["words"], cuts)
    spent = [out / "result.json"]
    spent += [pairs.with_name("minutes.json")] if pairs else []
    spent += [folder_of(row.start, seed, args.out) / "result.json"] if row.start else []
    figures["minutes"] = sum(read_json(path)["minutes"] for path in spent)
    return figures


def own_rewards(row: str, seeds: list[int], out: Path) -> str:
    """How the reward that a reinforced row maximises went, from its first to its last logged interval."""
    name = "reward" if row == "fisao" else "score"
    ends = [[line[name] for line in read_log(folder_of(row, seed, out))] for seed in seeds]
    first, last = (statistics.mean(values[i] for values in ends) for i in (0, -1))
    return f"{row}: its own reward went from {first:.3f} to {last:.3f}"


def cut_captions(start: dict) -> list[dict[str, float]]:
    """CHAIR of the start's captions cut after 1, 2, .. 8 sentences, in percent; words as they are."""
    rows = chair.questions(None, None, scenes=start["scenes"], split=start["split"])
    cuts = [chair.score(rows, start["captions"], max_sentences=k) for k in range(1, 9)]
    return [{"CHAIR_s": 100 * cut["chair_s"], "recall": 100 * cut["recall"], "words": cut["words"]} for cut in cuts]


def cut_to(words: float, cuts: list[dict[str, float]]) -> float:
    """CHAIR_s of captions cut to a mean length of `words`: a mixture of K and K + 1 sentences (`cut_captions`)."""
    longer = next((i for i, cut in enumerate(cuts) if cut["words"] >= words), len(cuts) - 1)
    below, above = cuts[max(0, longer - 1)], cuts[longer]
    span = above["words"] - below["words"]
    share = min(1.0, (words - below["words"]) / span) if span > 0 else 1.0
    return below["CHAIR_s"] + share * (above["CHAIR_s"] - below["CHAIR_s"])


def line(name: str, runs: list[dict[str, float]]) -> str:
    """One row: mean over the runs and, with several, their standard deviation."""
    cells = []
    for column in COLUMNS:
        values = [r[column] for r in runs if column in r]
        cell = f"{statistics.mean(values):.1f}" if values else ""
        cells.append(cell + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""))
    return f"| {name} | " + " | ".join(cells) + " |"


def point(name: str, runs: list[dict[str, float]]) -> svg.Point:
    """A row's place in the plot."""
    recall, chair = ([r[column] for r in runs] for column in ("recall", "CHAIR_s"))
    deviation = statistics.stdev if len(runs) > 1 else lambda _: 0.0
    group = next((group for group, names in GROUPS.items() if name in names), "given pairs")
    return svg.Point(statistics.mean(recall), statistics.mean(chair), deviation(recall), deviation(chair), group)


def main() -> None:
    """Make what is missing, run by run, then the table and its plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=known_row, metavar="ROW",
                        default=OFFLINE + ONLINE + METHODS + tuple(ROWS),
                        help=f"LOSS, LOSS/METHOD or one of {', '.join(map(repr, ROWS))} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes (default: 300)")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="(default: test)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--out", type=Path, default=HOME / "runs" / "alignment")
    parser.add_argument("options", nargs="*", help="after --: further options of train.py, for every run")
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    args.out.mkdir(parents=True, exist_ok=True)
    start = measure(DEFAULT_MODEL, args.split, args.scenes, args.out / "start.json")
    cuts = cut_captions(start)
    jobs = [(row, seed) for seed in args.seeds for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        rewarded = ["reward_model"] if {"ppo", "rloo"} & set(args.rows) else []
        first = list(dict.fromkeys([*rewarded, *filter(None, (row_of(name).start for name in args.rows))]))
        made = dict.fromkeys(row_of(name).method for name in [*args.rows, *first])
        list(pool.map(lambda job: make_pairs(*job, args), [(m, s) for m in made if m for s in args.seeds]))
        list(pool.map(lambda job: run(*job, args), [(name, seed) for name in first for seed in args.seeds]))
        runs = dict(zip(jobs, pool.map(lambda job: figures_of(*job, cuts, args), jobs)))
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|",
             line("start", [start["figures"]])]
    lines += [line(row, [runs[row, seed] for seed in args.seeds]) for row in args.rows]
    if rewarded:
        folders = [folder_of("reward_model", seed, args.out) for seed in args.seeds]
        accuracy = statistics.mean(read_json(out / "result.json")["after"]["accuracy"] for out in folders)
        lines.append(f"\nreward_model: accuracy on held-out pairs {accuracy:.1f} %")
    lines += [own_rewards(row, args.seeds, args.out) for row in ("ppo", "rloo", "fisao") if row in args.rows]
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    points = {"start": point("start", [start["figures"]])}
    points |= {row: point(row, [runs[row, seed] for seed in args.seeds]) for row in args.rows}
    write_text(args.out / "table.svg", svg.scatters([svg.Scatter("", *AXES, points, [
        (cut["recall"], cut["CHAIR_s"]) for cut in cuts], "start, captions cut short")]))  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
