"""Ten steps of DPO, AdaViP and PPO against committed curves, so that a change meant to alter nothing is caught.

    python -m tests.test_curves        writes tests/goldens/curves.json anew, after a change that is meant

Another processor rounds differently, so values are compared to a thousandth. PPO is compared in its first three steps
only: later ones learn from tokens that were sampled from changed weights, and one that flips changes all that follow.
"""

import json
import tempfile
from pathlib import Path

import pytest

import train
from data import scenes
from data.records import write_jsonl

GOLDENS = Path(__file__).with_name("goldens") / "curves.json"
COMMON = "--steps 10 --batch-size 4 --eval-scenes 0 --log-every 1 --lora-rank 4 --seed 0".split()
RUNS = {"dpo": [], "adavip": [], "ppo": "--judge clip --clip-model model/tiny/clip --samples 2 --max-new-tokens 8".split()}
TIMES = ("tokens/s", "eta_s", "peak_gib")
COMPARED = {"dpo": 10, "adavip": 10, "ppo": 3}  # steps


def curve(loss: str, folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a run on hand-written pairs."""
    pairs = [{"id": f"r{i}", "image": f"scene:{scenes.PAIRS + i}", "rejected_image": f"scene:{scenes.PAIRS + i + 9}",
              "prompt": scenes.CAPTION_PROMPT, "chosen": f"There is a dog and {i} cups on the grass.",
              "rejected": f"There is a cat and {i} dogs on the red grass."} for i in range(6)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    out = folder / loss
    train.main(["--loss", loss, "--data", str(folder / "pairs.jsonl"), "--out", str(out), *COMMON, *RUNS[loss]])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize("loss", RUNS)
def test_a_run_follows_its_curve(loss, tmp_path):
    golden = json.loads(GOLDENS.read_text())[loss]
    found = curve(loss, tmp_path)
    assert len(found) == len(golden) == 10 and found[0].keys() == golden[0].keys()
    for mine, theirs in zip(found[: COMPARED[loss]], golden):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), f"step {mine['step']}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        GOLDENS.write_text(json.dumps({loss: curve(loss, Path(scratch)) for loss in RUNS}, indent=1) + "\n")
