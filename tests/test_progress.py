"""Runs that are interrupted, continued and shared by processes."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from common import BadInput
from data.records import write_jsonl
from pairs.progress import forget, in_chunks

ROOT = Path(__file__).resolve().parents[1]
IDS = [f"r{i}" for i in range(23)]


class Stop(Exception):
    pass


def worker(calls: list[int], stop_after: int | None = None):
    """Makes a record of every row but each fifth; its number comes from the row, whatever the chunk."""

    def work(rows):
        if stop_after is not None and len(calls) >= stop_after:
            raise Stop
        calls.extend(rows)
        made = [{"id": IDS[row], "number": random.Random(row).random()} for row in rows if row % 5]
        return made, Counter({"fifth": sum(row % 5 == 0 for row in rows)})

    return work


def run(out: Path, calls: list[int], *, world: int = 1, stop_after: int | None = None, **more):
    """All ranks one after the other, last rank first, as rank 0 merges."""
    for rank in reversed(range(world)):
        found = in_chunks(IDS, worker(calls, stop_after), out, {"seed": 1}, rank=rank, world=world, **more)
        assert (found is None) == (rank > 0)
    return found


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole.jsonl", [], chunk=100)


@pytest.mark.parametrize(("world", "chunk"), [(1, 1), (2, 2)])
def test_several_of_a_record_stay_together(tmp_path, world, chunk):
    """An id may hold a slash of its own."""
    ids = ["b", "a", "a/1", "c/2", "d"]

    def work(rows):
        return [{"id": f"{ids[row]}/{k}"} for row in rows for k in (1, 2)], Counter()

    for rank in reversed(range(world)):
        found = in_chunks(ids, work, tmp_path / "o.jsonl", {}, rank=rank, world=world, chunk=chunk)
    assert sorted(record["id"] for record in found[0]) == sorted(f"{name}/{k}" for name in ids for k in (1, 2))
    assert [record["id"] for record in found[0] if record["id"][0] != "a"] == \
        ["b/1", "b/2", "c/2/1", "c/2/2", "d/1", "d/2"]


@pytest.mark.parametrize(("world", "chunk"), [(1, 1), (1, 7), (2, 4), (3, 100), (30, 5)])
def test_processes_and_chunks_change_nothing(tmp_path, whole, world, chunk):
    calls: list[int] = []
    made, dropped = run(tmp_path / "o.jsonl", calls, world=world, chunk=chunk)
    assert (made, dropped) == whole and sorted(calls) == list(range(23)) and dropped == {"fifth": 5}
    write_jsonl(tmp_path / "o.jsonl", made)
    assert len(list(tmp_path.glob("o.jsonl.part-*"))) == world
    forget(tmp_path / "o.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "whole.jsonl.part-0"]


@pytest.mark.parametrize("stop_after", [0, 3, 9, 20])
@pytest.mark.parametrize("worlds", [(1, 1), (1, 3), (3, 2)])
def test_interrupted_anywhere(tmp_path, whole, stop_after, worlds):
    """Stopped between chunks, then continued by another number of processes: nothing twice, nothing lost."""
    calls, out = [], tmp_path / "o.jsonl"
    with pytest.raises(Stop):
        run(out, calls, world=worlds[0], stop_after=stop_after, chunk=3)
    assert run(out, calls, world=worlds[1], chunk=4) == whole
    assert sorted(calls) == list(range(23))


@pytest.mark.parametrize("keep", [0, 5, -1, -30, -60])
def test_a_line_cut_off(tmp_path, whole, keep):
    """The part file ends anywhere: `keep` bytes of it are left, or all but so many."""
    calls, out = [], tmp_path / "o.jsonl"
    run(out, calls, chunk=6)
    part = tmp_path / "o.jsonl.part-0"
    part.write_bytes(part.read_bytes()[:keep])
    again: list[int] = []
    assert run(out, again, chunk=6) == whole
    assert len(again) == (23 if keep >= 0 else 5)  # the last chunk of 6, 6, 6, 5
    assert all(json.loads(line) for line in part.read_bytes().splitlines())


def test_a_finished_run_does_nothing(tmp_path, whole):
    calls: list[int] = []
    run(tmp_path / "whole.jsonl", calls)
    assert calls == []


def test_part_files_of_another_run(tmp_path, whole):
    with pytest.raises(ValueError, match="whole.jsonl.part-0: is of a run with other settings"):
        in_chunks(IDS, worker([]), tmp_path / "whole.jsonl", {"seed": 2})
    with pytest.raises(ValueError, match="ids are not unique"):
        in_chunks(["a", "a"], worker([]), tmp_path / "o.jsonl", {})


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from collections import Counter
from pathlib import Path
from pairs.progress import in_chunks

def work(rows):
    time.sleep(0.02)
    return [{{"id": str(row), "text": "x" * 5000}} for row in rows], Counter()

in_chunks([str(i) for i in range(500)], work, Path({out!r}), {{}}, chunk=2)
"""


def test_a_killed_process(tmp_path):
    """Killed by the system in the middle of its work, then continued: all records once, in order."""
    out = tmp_path / "o.jsonl"
    part = tmp_path / "o.jsonl.part-0"
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(root=str(ROOT), out=str(out))])
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 50_000) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    left: list[int] = []

    def work(rows):
        left.extend(rows)
        return [{"id": str(row), "text": "x" * 5000} for row in rows], Counter()

    made, _ = in_chunks([str(i) for i in range(500)], work, out, {})
    assert 0 < len(left) < 495 and [record["id"] for record in made] == [str(i) for i in range(500)]


def test_two_runs_at_once_are_refused(tmp_path):
    """The second one before it writes; the first goes on."""
    ids, out = [str(i) for i in range(4)], tmp_path / "p.jsonl"
    code = ("import sys, time; from collections import Counter; from pathlib import Path; from pairs.progress import in_chunks\n"
            "def work(rows): print(flush=True); time.sleep(60)\n"
            f"in_chunks({ids}, work, Path(sys.argv[1]), {{}}, chunk=2)")
    first = subprocess.Popen([sys.executable, "-c", code, out], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    first.stdout.readline()
    part = tmp_path / "p.jsonl.part-0"
    before = part.read_bytes()
    try:
        with pytest.raises(BadInput, match="p.jsonl.part-0: another run is writing it"):
            in_chunks(ids, lambda rows: ([], Counter()), out, {}, chunk=2)
        assert part.read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    assert in_chunks(ids, lambda rows: ([], Counter(rows=len(rows))), out, {}, chunk=2) == ([], Counter(rows=4))
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl.part-0"]
