"""Kill a training run at random moments, resume it after each, and compare it with one that was left alone.

    python -m benchmarks.kills --kills 100

A DPO run of the embedded model (LoRA rank 4, a checkpoint every step, a log line every second one) on one process and
on two, in turn. It is killed over and over until it finishes; then the weights and, its times aside, metrics.jsonl must
equal the uninterrupted run's to the last bit, and the next one begins. Of two processes one dies by SIGKILL and the
other is killed up to 0.3 s later, as a launcher would; SIGTERM goes to both. The processes are forked from one that has
imported everything, which is most of a start's time. Phases, by what a killed run leaves:

    start        before its first step
    step         between its first and its last step
    checkpoint   while a checkpoint was being written: its temporary file is still there
    end          after the last checkpoint: model/ and plots are being written
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import train
from data import scenes
from data.records import write_jsonl
from model.resume import checkpoints

FORKS = multiprocessing.get_context("forkserver")
TIMES = {"tokens/s", "eta_s", "peak_gib"}
STEPS, EARLY, TERMINATED = 16, 0.25, 0.15  # shares: of kills before training begins, and of those by SIGTERM


def work(argv: list[str], about: dict[str, str], errors: Path) -> None:
    """One process of a run."""
    os.environ |= about
    sys.stdout, sys.stderr = open(os.devnull, "w"), errors.open("a")
    sys.exit(train.main(argv))


def start(folder: Path, out: Path, world: int) -> list[multiprocessing.Process]:
    """All processes of a run: a new one, or going on where there is a checkpoint."""
    argv = ["--loss", "dpo", "--data", str(folder / "pairs.jsonl"), "--out", str(out), "--steps", str(STEPS),
            "--batch-size", "4", "--save-every", "1", "--log-every", "2", "--lora-rank", "4", "--lora-dropout", "0.1",
            "--eval-scenes", "0", "--resume" if checkpoints(out) else "--overwrite"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [FORKS.Process(target=work, args=(argv, about | {"RANK": str(rank)}, folder / "errors"))
                 for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def began(out: Path, since: float) -> bool:
    """Whether a run that was started at `since` is past its start: it has rewritten the log."""
    log = out / "metrics.jsonl"
    return log.exists() and log.stat().st_mtime > since


def kill(folder: Path, out: Path, world: int, draw: random.Random, length: dict[str, float]) -> str | None:
    """Start a run and kill it at a random moment. Returns the phase and the signal, None where it ended before."""
    since, early = time.time(), draw.random() < EARLY
    number = signal.SIGTERM if draw.random() < TERMINATED else signal.SIGKILL
    processes = start(folder, out, world)
    if early:
        time.sleep(draw.random() * length["start"])
    else:
        while not began(out, since) and processes[0].is_alive():
            time.sleep(0.005)
        time.sleep(draw.random() * length["rest"])
    ended = not all(process.is_alive() for process in processes)
    for process in draw.sample(processes, world):
        if process.is_alive():
            os.kill(process.pid, number)
        time.sleep(draw.random() * 0.3 * (number == signal.SIGKILL and world > 1))
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if ended and codes != [0] * world:
        sys.exit(f"a run ended by itself with {codes}:\n{(folder / 'errors').read_text()[-2000:]}")
    return None if 0 in codes else f"{phase(out, since)}, {number.name}"


def phase(out: Path, since: float) -> str:
    """Where a run was when it was killed."""
    if any(out.glob(".checkpoint-*.pt.*")):
        return "checkpoint"
    if not began(out, since):
        return "start"
    return "end" if checkpoints(out)[:1] == [out / f"checkpoint-{STEPS}.pt"] else "step"


def outcome(out: Path) -> tuple[bytes, list[dict]]:
    """The weights and the log without its times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return ((out / "model" / "model.safetensors").read_bytes(),
            [{name: value for name, value in row.items() if name not in TIMES} for row in rows])


def uninterrupted(folder: Path, world: int) -> tuple[tuple[bytes, list[dict]], dict[str, float]]:
    """The outcome of a run that is left alone, and the seconds before and after its first step."""
    out, since = folder / f"whole-{world}", time.time()
    processes = start(folder, out, world)
    while not began(out, since):
        time.sleep(0.005)
    first = time.time()
    for process in processes:
        process.join()
    return outcome(out), {"start": first - since, "rest": time.time() - first}


def main() -> None:
    """The command line; exit status 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    FORKS.set_forkserver_preload(["train"])
    draw, begun, hits, runs = random.Random(args.seed), time.time(), {1: Counter(), 2: Counter()}, Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "pairs.jsonl", [
            {"id": str(i), "image": scenes.reference(scenes.PAIRS + i), "prompt": scenes.CAPTION_PROMPT,
             "chosen": f"There is a dog and {i} cups.", "rejected": f"There is a cat and {i} dogs."}
             for i in range(24)])
        whole = {world: uninterrupted(folder, world) for world in hits}
        while sum(map(Counter.total, hits.values())) < args.kills:
            world = 1 + runs.total() % 2
            expected, length = whole[world]
            out = folder / f"killed-{runs.total()}"
            while not (out / "result.json").exists():
                if where := kill(folder, out, world, draw, length):
                    hits[world][where] += 1
            if outcome(out) != expected:
                sys.exit(f"a run on {world} processes differs after {hits}")
            runs[world] += 1
            print(f"{sum(map(Counter.total, hits.values()))} kills, {time.time() - begun:.0f} s: {hits}", flush=True)
    print("| killed in, by | 1 process | 2 processes |\n|---|---|---|")
    for where in sorted(hits[1].keys() | hits[2].keys()):
        print(f"| {where} | {hits[1][where]} | {hits[2][where]} |")
    print(f"| runs, all equal to the uninterrupted one | {runs[1]} | {runs[2]} |")


if __name__ == "__main__":
    main()
