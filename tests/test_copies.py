"""The rule of the house: a loss file that is copied under another name and registered by one line trains as the original
does, to the last digit. Nothing asks which loss it is."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

import train
from data import scenes
from data.records import write_jsonl

HOME = Path(__file__).resolve().parents[1]
SHORT = "--steps 2 --batch-size 2 --eval-scenes 0 --log-every 1 --lora-rank 2".split()
SAMPLED = "--max-new-tokens 8 --samples 2 --judge clip --clip-model model/tiny/clip".split()


def copied(function, folder: Path):
    """The function of the same name from a copy of its file, under another name; functions outside losses/ stay."""
    if function is None or not function.__module__.startswith("losses."):
        return function
    name = f"copy_of_{function.__module__.partition('.')[2]}"
    if name not in sys.modules:
        path = shutil.copy(HOME / "losses" / f"{name[8:]}.py", folder / f"{name}.py")
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return getattr(sys.modules[name], function.__name__)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, [
        {"id": f"r{i}", "image": f"scene:{scenes.PAIRS + i}", "rejected_image": f"scene:{scenes.PAIRS + i + 9}",
         "prompt": scenes.CAPTION_PROMPT, "chosen": f"There is a dog and {i} cups on the grass.",
         "rejected": f"There is a cat and {i} dogs on the red grass.",
         "rejected_image_response": f"There are {i} cats."} for i in range(3)])
    return path


@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_copy_trains_as_the_original(loss, pairs, tmp_path, monkeypatch):
    recipe = train.LOSSES[loss]
    monkeypatch.setitem(train.LOSSES, "mine", recipe._replace(
        loss=copied(recipe.loss, tmp_path), parts=tuple(copied(part, tmp_path) for part in recipe.parts)))
    assert train.LOSSES["mine"].loss is not recipe.loss
    told = SAMPLED[:4] if recipe.advantages else SAMPLED[:2] if recipe.online else []
    told += SAMPLED[4:] if recipe.asks_for("judge") else SAMPLED[6:] if recipe.online or recipe.advantages else []
    if recipe.asks_for("verifier"):  # FiSAO's baselines: too few words here to measure them
        baselines = {"correct": 60.0, "hallucinated": 50.0, "low": 0.0, "high": 100.0, "std": 9.0,
                     "unit": "250 * max(cos, 0)"}
        (tmp_path / "baselines.json").write_text(json.dumps(baselines))
        told += ["--baselines", str(tmp_path / "baselines.json")]
    lines = []
    for name in (loss, "mine"):
        out = tmp_path / name
        assert train.main(["--loss", name, "--data", str(pairs), "--out", str(out), *SHORT, *told]) == 0
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in row.items() if k not in ("tokens/s", "eta_s", "peak_gib")} for row in rows])
    assert lines[0] == lines[1] and len(lines[0]) == 2
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in (loss, "mine")]
    assert {k for k in settings[0] if settings[0][k] != settings[1][k]} == {"loss", "out"}
