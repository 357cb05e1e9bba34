"""The scripts of benchmarks/ that no other test runs, at their smallest: they check that both sides do the same work."""

import os
import subprocess
import sys

import pytest

from common import HOME

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def figures(*command: str) -> list[list[str]]:
    """The rows of the table that a script prints."""
    done = subprocess.run([sys.executable, *command], cwd=HOME, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_completions_of_bdhs():
    rows = figures("-m", "benchmarks.bdhs", "--examples", "2", "--rounds", "1", "--new-tokens", "8")
    assert [row[0] for row in rows] == ["shared", "batched", "one at a time"]
    assert all(float(row[1]) > 0 for row in rows)


def test_step():
    for peer in ("transformers", "peft", "trl"):
        pytest.importorskip(peer)
    rows = figures("benchmarks/step.py", "--size", "tiny", "--pairs", "2", "--rounds", "1", "--precision", "fp32")
    assert {row[3] for row in rows} == {"Plumbline", "naive", "TRL compact", "TRL stock"}


def test_scoring():
    done = subprocess.run([sys.executable, "benchmarks/scoring.py", "--captions", "20"], cwd=HOME, env=ENVIRONMENT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["120", "BLEU", "ROUGE-L", "CIDEr-D"]
