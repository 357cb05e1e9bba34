"""Warnings of a run that goes wrong, once each; TensorBoard's events where it is installed."""

import json
from pathlib import Path

import pytest
import torch

from model import log, watch

GOOD = {"loss": 0.5, "reward/chosen": -1.9, "margin": 0.1, "kl": 29.0, "score": -0.9}


@pytest.mark.parametrize("change, sign, said", [
    ({}, None, ""),
    ({"reward/chosen": -2.5}, "chosen", "reward/chosen -2.5, margin 0.1"),
    ({"reward/chosen": -2.5, "margin": 2.4}, "chosen", "mdpo"),
    ({"reward/chosen": -2.5, "margin": 2.6}, None, ""),
    ({"reward/chosen": 9.0, "margin": -9.0}, None, ""),
    ({"kl": 31.0}, "kl", "31 nats a response from the reference: try a larger --kl-coef"),
    ({"score": -1.25}, "score", "1.25 deviations below the untrained model's"),
])  # fmt: skip
def test_signs(change, sign, said):
    found = watch.signs(GOOD | change)
    assert list(found) == ([sign] if sign else []) and said in "".join(found.values())
    assert watch.signs({"step": 3, "loss": 1.0}) == {}


def write_lines(folder: Path, rows: list[dict], first: int = 0, **more) -> None:
    """A log with one line a step."""
    saved = {"step": first, "log": {"processes": 2}} if first else None
    written = log.Log(folder / "metrics.jsonl", 9, torch.device("cpu"), saved=saved, **more)
    for step, row in enumerate(rows, start=first + 1):
        written.add({name: torch.tensor([value, value]) for name, value in row.items()})
        written.write(step, {"lr": 0.5})


def test_each_is_said_once(tmp_path, capsys):
    write_lines(tmp_path, [{"kl": 1.0}, {"kl": 40.0}, {"kl": 50.0}, {"score": -2.0}], watched=True)
    said = capsys.readouterr().err.splitlines()
    assert [line[:17] for line in said] == ["warning: step 2: ", "warning: step 4: "] and "40 nats" in said[0]
    write_lines(tmp_path, [{"kl": 40.0}])
    assert capsys.readouterr().err == ""


class Board:
    """Stands in for TensorBoard's SummaryWriter."""

    made: "list[Board]" = []

    def __init__(self, folder: Path, purge_step: int):
        folder.mkdir(exist_ok=True)
        self.folder, self.purge_step, self.seen, self.flushed = folder, purge_step, [], 0
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.seen)


def test_tensorboard_gets_what_the_log_gets(tmp_path, monkeypatch):
    """A resumed run hides what is after its checkpoint, a new one takes an earlier one's events away."""
    monkeypatch.setattr(log, "SummaryWriter", Board)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "old").touch()
    write_lines(tmp_path, [{"loss": 1.0}, {"loss": 2.0}])
    (tmp_path / "tensorboard" / "new").touch()
    write_lines(tmp_path, [{"loss": 3.0}], first=1)
    first, second = Board.made
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [1.0, 3.0]
    assert [seen for seen in first.seen if seen[0] == "loss"] == [("loss", 1.0, 1), ("loss", 2.0, 2)]
    assert {name for name, _, step in second.seen if step == 2} == rows[1].keys() - {"step"}
    assert first.flushed == len(first.seen) and (first.purge_step, second.purge_step) == (1, 2)
    assert [path.name for path in (tmp_path / "tensorboard").iterdir()] == ["new"]


def test_without_tensorboard_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "SummaryWriter", None)
    write_lines(tmp_path, [{"loss": 1.0}])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_a_checkpoint_gets_of_an_interval_stays_as_it_was(tmp_path):
    """It is written while training adds to the interval."""
    one = log.Log(tmp_path / "metrics.jsonl", 9, torch.device("cpu"))
    one.add({"loss": torch.tensor([1.0, 2.0])})
    kept = one.unfinished()
    one.add({"loss": torch.tensor([5.0])})
    assert kept["counts"] == {"loss": 1} and kept["sums"]["loss"].tolist() == [1.5]
    assert one.unfinished()["counts"] == {"loss": 2}
