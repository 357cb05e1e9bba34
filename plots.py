"""Draw the metrics.jsonl of runs as curves over the steps.

    python plots.py runs/adavip                            writes runs/adavip/plots.svg
    python plots.py runs/dpo runs/adavip --out both.svg    several runs in the same panels

A panel has all metrics of its name, NAME and NAME/SEQUENCE: `reward` shows the implicit rewards of the chosen response
and of each kind of rejected sequence, `weight` the weights of AdaViP's two negatives (both as in its Figure 5). Panels
without a metric are left out, and so are values that are not finite. Exit status 2 on bad input.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import svg
from common import BadInput, run_script, write_text
from model.log import lines_until

PANELS = {"loss": "loss", "reward": "reward", "margin": "margin to the chosen response", "accuracy": "accuracy",
          "weight": "weights of the negatives (AdaViP, Eq. 13)", "score": "score", "kl": "KL to the reference",
          "grad_norm": "gradient norm", "lr": "learning rate", "tokens/s": "tokens/s", "peak_gib": "memory, GiB"}


def read_log(run: Path) -> list[dict[str, float]]:
    """The whole lines of a run's metrics.jsonl. Raises BadInput if there is none."""
    lines = lines_until(run / "metrics.jsonl", sys.maxsize)
    if not lines:
        raise BadInput(f"{run / 'metrics.jsonl'}: not found, or without a line")
    return [json.loads(line) for line in lines]


def panels(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[svg.Panel]:
    """The panels that have a curve; logs: name of a run -> its lines."""
    drawn = []
    for metric, title in PANELS.items():
        series = {}
        for run, lines in logs.items():
            for name in dict.fromkeys(name for line in lines for name in line):
                if name == metric or name.startswith(f"{metric}/"):
                    points = [(line["step"], line[name]) for line in lines if is_finite(line.get(name))]
                    label = name.removeprefix(f"{metric}/")
                    series |= {f"{run} {label}" if len(logs) > 1 else label: points} if points else {}
        drawn += [svg.Panel(title, "step", series)] if series else []
    return drawn


def is_finite(value: object) -> bool:
    """Whether a value can be drawn."""
    return type(value) in (int, float) and math.isfinite(value)


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write the image of one run or several. Raises BadInput where there is nothing to draw."""
    times = Counter(run.resolve().name for run in runs)
    logs = {run.resolve().name if times[run.resolve().name] == 1 else str(run): read_log(run) for run in runs}
    drawn = panels(logs)
    if not drawn:
        raise BadInput(f"{', '.join(map(str, runs))}: no metric to draw")
    write_text(out, svg.curves(drawn))


def main(argv: Sequence[str] | None = None) -> None:
    """From the command line to the image. Raises BadInput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of --out of train.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: RUN/plots.svg)")
    args = parser.parse_args(argv)
    if len(args.runs) > 1 and not args.out:
        parser.error("several runs need --out")
    out = args.out or args.runs[0] / "plots.svg"
    draw(args.runs, out)
    print(f"{out} written")


if __name__ == "__main__":
    run_script(main, "plots.py")
