"""The benchmark for GPUs, rehearsed on a CPU: its sections, what it counts, and what it survives."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from model.estimate import cost_of

TINY = gpu.SIZES["tiny"]
CPU = torch.device("cpu")


def test_rehearsal(tmp_path, monkeypatch, capsys):
    """Parity holds, steps and generation are timed, and both files say the same."""
    monkeypatch.setattr(gpu, "MODES", {"on": True})
    command = ["gpu.py", "--device", "cpu", "--size", "tiny", "--rounds", "1", "--peak", "2", "--out",
               str(tmp_path / "runs" / "gpu"), "--only", "parity", "steps", "generate", "profile"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 0
    found = json.loads((tmp_path / "runs" / "gpu.json").read_text())
    text = (tmp_path / "runs" / "gpu.md").read_text()
    assert found["card"].startswith("no GPU") and torch.__version__.startswith(found["torch"]) and text.startswith("card no GPU")
    kinds = [next(iter(row)) for row in found["rows"]]
    assert kinds == ["check"] * 3 + ["step"] * 2 + ["generate"] * 3 + ["profile"] * 4
    assert all(row["ok"] for row in found["rows"][:3])
    for row in found["rows"][3:5]:
        assert row["utilisation %"] == pytest.approx(row["TFLOP/s"] * 50) and row["tokens/s"] > 0
    assert sum(row["share %"] for row in found["rows"][-4:]) == pytest.approx(100)
    assert all(row["share %"] > 0 for row in found["rows"][-4:])
    assert text.partition("\n")[2] in capsys.readouterr().out


def test_parity_sees_a_wrong_score(monkeypatch):
    """A scoring core that is off by a tenth, or tokens that are not the best, are not in order."""
    score = gpu.Scorer.forward

    def off(self, packed, features):
        logps, mask = score(self, packed, features)
        return logps + 0.1 * (len(packed.lengths) > 1), mask

    monkeypatch.setattr(gpu.Scorer, "forward", off)
    monkeypatch.setattr(gpu, "generate", lambda model, views, prompts, eos_id, max_new_tokens: [
        [[5] * max_new_tokens] for _ in prompts])
    assert [row["ok"] for row in gpu.parity(TINY, gpu.Machine(CPU, 1, None))] == [False, False, False]


@pytest.mark.parametrize("loss", ["dpo", "adavip"])
def test_counted_flops(loss):
    """As many as a step computes that keeps all activations."""
    kept, recomputed = (cost_of(gpu.our_step(TINY, CPU, loss, checkpointing=mode)).flops for mode in (False, True))
    assert gpu.step_flops(TINY, loss) == kept < recomputed


def test_what_fails_is_reported():
    """Too little memory and peers that are not installed; anything else is an error."""
    def work(error):
        raise error

    row = {"step": "naive"}
    assert gpu.survived(row, lambda: work(torch.cuda.OutOfMemoryError()))["note"] == "out of memory"
    assert gpu.survived(row, lambda: work(ImportError(name="trl")))["note"] == "not installed: trl"
    with pytest.raises(RuntimeError):
        gpu.survived(row, lambda: work(RuntimeError()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("--device cuda: ") and done.stderr.count("\n") == 1
