"""--shard: sharded processes compute what one does, and their checkpoints resume on any number of them.

Processes start in groups that run several commands each, as a start costs seconds. On the embedded model; a run has
three steps of four pairs, checkpoints after the second and the third.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from common import BadInput
from data import scenes
from data.records import write_jsonl
from model import shard
from model.checkpoint import DEFAULT_MODEL, load_llava

HOME = Path(__file__).resolve().parents[1]
FULL = ["--lora-rank", "0"]
PPO = ["--judge", "clip", "--max-new-tokens", "8", "--samples", "2", "--inner-epochs", "2", "--steps", "2"]
KINDS = {
    "dpo": ["--loss", "dpo", "--train-projector", "--batch-size", "8"],
    "dpo-full": ["--loss", "dpo", "--checkpointing", *FULL],
    "adavip": ["--loss", "adavip"],
    "adavip-full": ["--loss", "adavip", *FULL],
    "ppo": ["--loss", "ppo", *PPO],
    "ppo-full": ["--loss", "ppo", *PPO, *FULL],
    "reward_model-full": ["--loss", "reward_model", *FULL],
}
TIMES = {"tokens/s", "eta_s", "peak_gib"}
WORKER = """
import contextlib, json, os, sys
sys.path.insert(0, {home!r})
import torch, torch.distributed as dist
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=world)
dist.destroy_process_group = lambda: None  # the next command goes on with it
import train
for node, command in json.load(open(folder + "/commands")):
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    with contextlib.redirect_stdout(None):
        assert train.main(command) == 0, command
os._exit(0)
"""


def run(processes: int, folder: Path, commands: list[tuple[int, list[str]]]) -> str:
    """Run commands one after another in a group of processes, each with its number of processes a node. Returns what
    they wrote to stderr."""
    folder.mkdir()
    (folder / "commands").write_text(json.dumps(commands))
    program, environment = WORKER.format(home=str(HOME)), os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", program, str(rank), str(processes), folder],
                                stderr=subprocess.PIPE, text=True, env=environment) for rank in range(processes)]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)
    return "\n".join(said)


def command(folder: Path, out: str, *more: str) -> list[str]:
    return ["--data", str(folder / "pairs.jsonl"), "--out", str(folder / out), "--steps", "3", "--batch-size", "4",
            "--micro-batch-size", "1", "--save-every", "2", "--log-every", "1", "--eval-scenes", "0",
            "--lora-rank", "4", "--lr", "1e-4", *more]


def lines(out: Path) -> list[dict]:
    """The log without its times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All that a finished run has written of its weights."""
    files = [*sorted(out.glob("*/*.safetensors")), *out.glob("*.safetensors")]
    return {f"{path.relative_to(out)} {name}": x for path in files for name, x in load_file(path).items()}


def assert_same(out: Path, other: Path) -> None:
    """Equal to rounding, at every step and in every weight."""
    assert [row["step"] for row in lines(out)] == [row["step"] for row in lines(other)]
    for found, wanted in zip(lines(out), lines(other)):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(weights(out), weights(other), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Finished runs KIND/one, KIND/two (DDP) and KIND/sharded, and one with its reference cached."""
    folder = tmp_path_factory.mktemp("runs")
    said = [("There is a dog and a cup on the table.", "There is a cat."), ("A red ball lies here.", "A chair."),
            ("I see a cup.", "I see a large blue dog beside a small tree.")]
    write_jsonl(folder / "pairs.jsonl", [
        {"id": str(i), "image": scenes.reference(scenes.PAIRS + i), "prompt": scenes.CAPTION_PROMPT,
         "rejected_image": scenes.reference(scenes.PAIRS + i + 50), "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(3 * said)])
    for name, options in KINDS.items():
        assert train.main(command(folder, f"{name}/one", *options)) == 0
    two = [(2, command(folder, f"{name}/two", *options)) for name, options in KINDS.items()]
    sharded = [(2, command(folder, f"{name}/sharded", *options, "--shard")) for name, options in KINDS.items()]
    cached = command(folder, "cached", *KINDS["dpo-full"], "--shard", "--reference-cache", str(folder / "reference"))
    run(2, folder / "two", [*two, *sharded, (2, cached)])
    return folder


@pytest.fixture(scope="module")
def resumed(folder) -> str:
    """The sharded run of `dpo-full` as it was after step 2, resumed on several numbers of processes; and `dpo` on two
    nodes. Returns what the two processes wrote to stderr."""
    for name in ("resumed-on-2", "resumed-on-4", "resumed-on-1", "damaged"):
        shutil.copytree(folder / "dpo-full" / "sharded", folder / name)
        shutil.rmtree(folder / name / "model")
        if name != "damaged":
            shutil.rmtree(folder / name / "checkpoint-3")
    flip(folder / "damaged" / "checkpoint-3" / "part-1-of-2.pt")
    options = (*KINDS["dpo-full"], "--shard", "--resume")
    said = run(2, folder / "again", [(2, command(folder, out, *options)) for out in ("resumed-on-2", "damaged")])
    run(4, folder / "four", [(4, command(folder, "resumed-on-4", *options)),
                             (2, command(folder, "nodes", *KINDS["dpo"], "--shard"))])
    assert train.main(command(folder, "resumed-on-1", *options)) == 0
    return said


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


# ---- the same as one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_equals_two_and_two_sharded(folder, kind):
    one = folder / kind / "one"
    assert lines(one)[0]["grad_norm"] != lines(one)[-1]["grad_norm"] and weights(one)
    assert_same(folder / kind / "two", one)
    assert_same(folder / kind / "sharded", one)


def test_the_cached_reference_is_the_sharded_one(folder):
    assert_same(folder / "cached", folder / "dpo-full" / "sharded")


def test_what_is_saved_loads_and_gives_the_same_logits(folder, pixels):
    models = [load_llava(path) for path in (folder / "dpo-full" / "one" / "model",
                                            folder / "dpo-full" / "sharded" / "model", DEFAULT_MODEL)]
    config = models[0].config
    image = torch.nn.functional.interpolate(pixels[:1], size=(config.vision.image_size,) * 2)
    ids = torch.tensor([1, 20, *[config.image_token_index] * config.tile_tokens, 7, 9, 30])
    one, sharded, start = (model.logits(ids, image) for model in models)
    torch.testing.assert_close(sharded, one, rtol=0, atol=1e-3)
    assert (start - one).abs().max() > 0.1


def test_each_process_holds_its_share(folder):
    sizes = [path.stat().st_size for path in sorted((folder / "dpo-full" / "sharded" / "checkpoint-3").glob("part-*"))]
    whole = (folder / "dpo-full" / "one" / "checkpoint-3.pt").stat().st_size
    assert len(sizes) == 2 and all(0.48 < size / whole < 0.53 for size in sizes)


def test_mixed_precision_starts_at_equal_policies_and_trains_in_fp32(folder, tmp_path):
    """bf16, in full, in one process: the weights that the reference has are the policy's to the last bit, and so are
    those that its cache is made with."""
    for out, more in (("one", []), ("sharded", ["--shard"]),
                      ("cached", ["--shard", "--reference-cache", str(tmp_path / "reference")])):
        options = [*KINDS["dpo-full"], "--precision", "bf16", "--batch-size", "2", *more]
        assert train.main([*command(folder, out, *options), "--out", str(tmp_path / out)]) == 0
    one, sharded, cached = (lines(tmp_path / out) for out in ("one", "sharded", "cached"))
    assert cached == sharded and sharded[0]["margin"] == 0.0 and sharded[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert sharded[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=0.1)
    assert {x.dtype for name, x in weights(tmp_path / "sharded").items() if "language_model" in name} == {torch.float32}


def test_adapters_are_fp32_on_a_bf16_base(folder, tmp_path):
    options = [*KINDS["dpo"], "--precision", "bf16", "--batch-size", "2", "--steps", "1", "--shard"]
    assert train.main([*command(folder, "", *options), "--out", str(tmp_path)]) == 0
    found = {name: x.dtype for name, x in weights(tmp_path).items()}
    assert {dtype for name, dtype in found.items() if "lora_" in name} == {torch.float32}
    base = {dtype for name, dtype in found.items() if "language_model" in name and "lora_" not in name}
    assert base == {torch.bfloat16}


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_resumed_equals_uninterrupted_bit_for_bit(folder, resumed):
    for out in ("resumed-on-2", "damaged"):
        assert lines(folder / out) == lines(folder / "dpo-full" / "sharded")
        torch.testing.assert_close(weights(folder / out), weights(folder / "dpo-full" / "sharded"), rtol=0, atol=0)


def test_a_damaged_part_is_named_and_the_checkpoint_before_it_used(resumed):
    assert resumed.count("part-1-of-2.pt: damaged or no checkpoint (the checksum of ") == 1
    assert "going on from step 2 in " in resumed


@pytest.mark.parametrize("processes", [1, 4])
def test_other_numbers_of_processes_go_on(folder, resumed, processes):
    out = folder / f"resumed-on-{processes}"
    assert_same(out, folder / "dpo-full" / "sharded")
    assert len(list((out / "checkpoint-3").glob("part-*"))) == processes


def test_nodes_hold_the_same_shards(folder, resumed):
    """Two nodes of two processes: gradients are exchanged between nodes once an update, after two micro-batches."""
    assert_same(folder / "nodes", folder / "dpo" / "one")
    assert len(list((folder / "nodes" / "checkpoint-3").glob("part-*"))) == 2


def test_checkpoints_of_another_kind_are_refused(folder):
    for kind, more, what in (("one", ["--shard"], "checkpoint-3.pt belongs to another run: shard was False, is True"),
                             ("sharded", [], "checkpoint-3 belongs to another run: shard was True, is False")):
        with pytest.raises(BadInput, match=what):
            train.main(command(folder, f"dpo/{kind}", *KINDS["dpo"], "--resume", *more))
    with pytest.raises(BadInput, match="holds checkpoint-3 of an earlier run"):
        train.main(command(folder, "dpo/sharded", *KINDS["dpo"], "--shard"))


def test_rows_are_taken_across_parts():
    whole = torch.arange(14).view(7, 2)
    rows = shard.Rows([whole[:3], whole[3:6], whole[6:], whole[:0]])
    assert rows.shape == (7, 2)
    for first, count in ((0, 7), (0, 2), (2, 2), (5, 2), (3, 3), (6, 1)):
        assert torch.equal(rows.take(first, count), whole[first : first + count])


def test_nodes_of_unequal_size_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(BadInput, match="--shard: 6 processes are not a multiple of the 4 on this node"):
        shard.make_mesh(torch.device("cpu"))
