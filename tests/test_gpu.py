"""The benchmark for GPUs, rehearsed on a CPU: its sections, what it counts, and what it survives."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu

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
    """Against what torch counts of a step, which computes some query-key pairs for nothing, and the projector."""
    from torch.utils.flop_counter import FlopCounterMode

    text = replace(TINY.config.text, intermediate_size=256, num_hidden_layers=4)
    size = replace(TINY, config=replace(TINY.config, text=text), response=(20, 20), rank=16)
    step = gpu.our_step(size, CPU, loss, checkpointing=False)
    aten = torch.ops.aten
    into = {  # what it does not know: LoRA's second product, the attention of a CPU
        aten.addmm_: lambda _, a, b, *args, **kwargs: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, *_, **__: 4 * q[0] * q[1] * q[2] * k[2] * q[3],
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, *_, **__: 10 * q[0] * q[1] * q[2] * k[2] * q[3],
    }
    with FlopCounterMode(display=False, custom_mapping=into) as counter:
        step()
    assert gpu.model_flops(size, loss) == pytest.approx(counter.get_total_flops(), rel=0.05)


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
