"""train.py: starts at the known values, resumes bit for bit, gives the same with two processes, refuses nonsense."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import scenes
from data.processor import ClipProcessor, Processor
from data.records import write_jsonl
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from pairs.methods import make_pairs

HOME = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """A few pairs with both a rejected answer and a rejected picture."""
    model, processor = load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)
    records, _ = make_pairs("adavip", model, processor, load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP),
                            scene_seeds=range(scenes.PAIRS, scenes.PAIRS + 40), samples=3, progress=False)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, records)
    return path


def arguments(pairs: Path, out: Path, *more: str) -> list[str]:
    return ["--data", str(pairs), "--out", str(out), "--batch-size", "4", "--steps", "4", "--log-every", "1",
            "--eval-scenes", "0", "--lora-rank", "4", *more]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "loss, start", [("dpo", math.log(2)), ("rdpo", 2 * math.log(2)), ("adavip", math.log(3)), ("rdpo_released", 2 * math.log(2))]
)
def test_first_step_has_the_value_of_equal_policies(pairs, tmp_path, loss, start):
    """Adapters start at zero, so policy = reference: DPO ln 2, rDPO 2 ln 2, AdaViP ln 3; then the loss moves."""
    assert train.main(arguments(pairs, tmp_path, "--loss", loss)) == 0
    found = losses(tmp_path)
    assert found[0] == pytest.approx(start, abs=1e-6)
    assert found[-1] != pytest.approx(start, abs=1e-4)


@pytest.mark.parametrize("more", [[], ["--lora-rank", "0"], ["--train-projector", "--lora-dropout", "0.1"]])
def test_resumed_equals_uninterrupted_bit_for_bit(pairs, tmp_path, monkeypatch, more):
    """Stopped after two of four steps and resumed: the same weights to the last bit, and no log line twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(pairs, whole, "--loss", "adavip", *more)) == 0
    with monkeypatch.context() as patch:
        calls = iter([False, True])
        patch.setattr(train.StopRequest, "asked", lambda self: next(calls))
        assert train.main(arguments(pairs, parts, "--loss", "adavip", *more)) == 1
    assert not (parts / "model").exists()
    assert train.main(arguments(pairs, parts, "--loss", "adavip", "--resume", *more)) == 0
    assert weights(parts) == weights(whole)
    assert losses(parts) == losses(whole) and len(losses(parts)) == 4


def test_resume_refuses_another_run(pairs, tmp_path):
    train.main(arguments(pairs, tmp_path, "--loss", "dpo"))
    with pytest.raises(ValueError, match="lr was 0.001, is 0.01"):
        train.main(arguments(pairs, tmp_path, "--loss", "dpo", "--lr", "0.01", "--resume"))


def test_micro_batches_equal_one_batch(pairs, tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    train.main(arguments(pairs, one, "--loss", "adavip"))
    train.main(arguments(pairs, four, "--loss", "adavip", "--micro-batch-size", "1"))
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)


def test_checkpointing_changes_nothing(pairs, tmp_path):
    plain, saving = tmp_path / "plain", tmp_path / "saving"
    train.main(arguments(pairs, plain, "--loss", "dpo"))
    train.main(arguments(pairs, saving, "--loss", "dpo", "--checkpointing"))
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)


def test_two_processes_equal_one(pairs, tmp_path):
    """The same global batches in two processes: the same losses at every step, and the same weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(arguments(pairs, one, "--loss", "adavip")) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(HOME / "train.py"), *arguments(pairs, two, "--loss", "adavip")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    first, second = load_llava(one / "model"), load_llava(two / "model")
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=2e-4)


def test_trained_model_is_written_and_differs(pairs, tmp_path):
    train.main(arguments(pairs, tmp_path, "--loss", "sft", "--lr", "0.01"))
    before, after = load_llava(DEFAULT_MODEL).state_dict(), load_llava(tmp_path / "model").state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.startswith("language_model.model.layers") for n in moved)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--loss", "dpo", "--bet", "0.2"], "unrecognized arguments"),
        (["--loss", "sft", "--beta", "0.2"], "unrecognized arguments"),
        (["--loss", "ppo2"], "invalid choice"),
        (["--loss", "dpo", "--batch-size", "6", "--micro-batch-size", "4"], "not a multiple"),
        (["--loss", "dpo", "--resume"], "there is no"),
        (["--loss", "dpo", "--model", "nowhere"], "no such folder"),
    ],
)
def test_nonsense_is_refused_in_one_line(tmp_path, options, complaint):
    command = [sys.executable, str(HOME / "train.py"), "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr and "Traceback" not in done.stderr


def test_bad_pairs_are_all_listed_before_training(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[1]["chosen"], rows[3]["rejected_image"] = "", None
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        train.main(arguments(path, tmp_path / "out", "--loss", "adavip"))
    assert ":2:" in str(error.value) and ":4:" in str(error.value)


def published(folder: Path, count: int = 4) -> list[dict]:
    """Rows as RLAIF-V has them, with their pictures inside."""
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), (60 * i, 90, 30)).save(buffer, "PNG")
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
        rows.append({"idx": i, "ds_name": "RLAIF-V", "image": {"bytes": buffer.getvalue(), "path": f"{i}.png"},
                     "question": "What is it?", "chosen": "A dog.", "rejected": "A cat."})
    return rows


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_published_pairs_are_read_as_they_are(tmp_path, capsys, suffix):
    rows, path = published(tmp_path), tmp_path / f"rlaif-v.{suffix}"
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        rows = [{**row, "image": row["image"]["path"]} for row in rows]
        path.write_text(json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert train.main(arguments(path, tmp_path / "out", "--loss", "dpo", "--steps", "1")) == 0
    assert f"--data {path}: 4 records, read as rlaif-v\n" in capsys.readouterr().out


def test_data_serves_a_loss_as_far_as_it_goes(tmp_path):
    """Pairs are prompts for losses that sample, captions teach sft; a command adds what is missing."""
    rows = [{**row, "image": row["image"]["path"]} for row in published(tmp_path)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for loss in ("online_dpo", "ppo", "rloo", "fisao"):
        records = train.read_records(path, train.LOSSES[loss]).records
        assert records[0] == {"id": "0", "image": "0.png", "prompt": "What is it?"} and len(records) == 4
    for loss, method in (("rdpo", "realign"), ("adavip", "adavip")):
        with pytest.raises(ValueError) as error:
            train.read_records(path, train.LOSSES[loss])
        assert str(error.value) == (f"{path}: all 4 records: 'rejected_image' is missing (python generate_pairs.py"
                                    f" --method {method} --pairs {path} adds one)")
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != "rejected"} for row in rows]))
    assert train.read_records(path, train.LOSSES["sft"]).records[3]["chosen"] == "A dog."
    with pytest.raises(ValueError, match=f"python generate_pairs.py --method rank --images {path} makes pairs"):
        train.read_records(path, train.LOSSES["dpo"])
