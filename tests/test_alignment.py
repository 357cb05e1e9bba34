"""End to end: pairs from scenes, a short alignment, less hallucination on held-out scenes. And the rows of the table of
benchmarks/alignment.py: what they run, in which order, and how they compare with the start."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from benchmarks import alignment
from data import scenes
from data.batch import collate
from data.processor import Processor
from data.records import read_pairs
from judges.scene import judge_scene
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.logprobs import Scorer
from options import read_arguments


def test_dpo_lowers_hallucination_on_held_out_scenes(tmp_path):
    """100 scenes, 12 steps: fewer absent objects are mentioned, and the model still describes and answers."""
    options = "--loss dpo --scenes 100 --steps 12 --eval-scenes 50 --eval-split dev --seed 7"
    assert train.main([*options.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    before, after = result["before"], result["after"]
    assert after["CHAIR_i"] < before["CHAIR_i"] and after["CHAIR_s"] < before["CHAIR_s"]
    assert after["recall"] > before["recall"] - 15
    assert after["POPE adversarial"] > before["POPE adversarial"] - 3


# ---- the table ---------------------------------------------------------------------------------------------

ALL = (*alignment.OFFLINE, *alignment.ONLINE, *alignment.METHODS, *alignment.ROWS)
ARGS = SimpleNamespace(out=Path("runs"), options=["--steps", "7"])


@pytest.mark.parametrize("name", ALL)
def test_every_row_is_a_command_that_train_takes(name):
    _, script, *command = alignment.command_of(name, 3, ARGS)
    args, row = read_arguments(train.LOSSES, command), alignment.row_of(name)
    assert Path(script).name == "train.py" and (args.loss, args.seed, args.steps) == (row.loss, 3, 7)
    assert args.eval_scenes == 0 and args.overwrite and args.out == alignment.folder_of(name, 3, ARGS.out)
    assert args.data == (alignment.pairs_file(row.method, 3, ARGS.out) if row.method else None)


def test_a_row_that_cannot_be_made_is_refused_before_the_start_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(alignment, "measure", None)
    assert [alignment.known_row(name) for name in (*ALL, "reward_model")] == [*ALL, "reward_model"]
    for name in ("nope", "dpo/nope", "dpo, clean"):
        monkeypatch.setattr(sys, "argv", ["alignment.py", "--rows", "dpo", name])
        with pytest.raises(SystemExit) as ended:
            alignment.main()
        assert ended.value.code == 2 and f"{name!r} is no loss" in capsys.readouterr().err


def test_rows_are_kept_apart():
    assert len({alignment.folder_of(name, 0, ARGS.out) for name in (*ALL, "reward_model")}) == len(ALL) + 1
    assert [alignment.folder_of(name, 2, ARGS.out) for name in ("sft, then dpo", "dpo/bdhs", "slic_hf")] == [
        Path("runs/sft-then-dpo-2"), Path("runs/dpo-bdhs-2"), Path("runs/slic_hf-2")]


def test_pairs_with_options(tmp_path):
    """They are made by the method with them, and kept apart from those without."""
    args = SimpleNamespace(out=tmp_path, options=["--scenes", "20"])
    for method in ("bdhs", "bdhs, clean"):
        alignment.make_pairs(method, 0, args)
    plain, clean = (read_pairs(tmp_path / name / "pairs.jsonl") for name in ("pairs-bdhs-0", "pairs-bdhs-clean-0"))
    assert any(judge_scene(pair, [pair["chosen"]])[0].wrong for pair in plain)
    assert clean and not any(judge_scene(pair, [pair["chosen"]])[0].wrong for pair in clean)
    both = {pair["id"] for pair in plain} & {pair["id"] for pair in clean}
    rejected = [{pair["id"]: pair["rejected"] for pair in pairs if pair["id"] in both} for pairs in (plain, clean)]
    assert rejected[0] != rejected[1]  # another share of the image is hidden


def test_what_rows_add():
    dpo, anchored, tuned, second, other, ppo = (read_arguments(train.LOSSES, alignment.command_of(name, 3, ARGS)[2:])
                                                for name in ("dpo", "dpo+anchor", "dpo+sft", "sft, then dpo", "dpo/bdhs",
                                                             "ppo"))
    assert [(args.anchor, args.sft_weight) for args in (dpo, anchored, tuned, second)] == [(0, 0), (1, 0), (0, 1), (0, 0)]
    assert dpo.model == anchored.model == DEFAULT_MODEL and second.model == Path("runs/sft-3/model")
    assert dpo.data == second.data == Path("runs/pairs-rank-3/pairs.jsonl") and "bdhs" in str(other.data)
    assert ppo.reward == Path("runs/reward_model-3")


def test_what_a_row_starts_from_is_trained_first(tmp_path, monkeypatch, capsys):
    """Also where it is no row of the table; and its pairs are there."""
    done = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process, for all tests that follow
    monkeypatch.setattr(alignment, "measure", lambda *_: {"figures": {"CHAIR_s": 9.0, "recall": 5.0}})
    monkeypatch.setattr(alignment, "cut_captions", lambda start: [])
    monkeypatch.setattr(alignment, "make_pairs", lambda method, seed, args: done.append(f"pairs {method} {seed}"))
    monkeypatch.setattr(alignment, "run", lambda name, seed, args: done.append(f"{name} {seed}"))
    monkeypatch.setattr(alignment, "figures_of", lambda name, seed, cuts, args: (
        done.append(f"{name} {seed} measured"), {"CHAIR_s": 3.0 + seed, "recall": 4.0, "chosen": 1.5})[1])
    monkeypatch.setattr(sys, "argv", ["alignment.py", "--rows", "sft, then dpo", "dpo/bdhs", "--seeds", "0", "1",
                                      "--out", str(tmp_path)])
    alignment.main()
    assert done == ["pairs rank 0", "pairs rank 1", "pairs bdhs 0", "pairs bdhs 1", "sft 0", "sft 1",
                    "sft, then dpo 0 measured", "dpo/bdhs 0 measured", "sft, then dpo 1 measured", "dpo/bdhs 1 measured"]
    head, _, start, row = capsys.readouterr().out.splitlines()[:4]
    cells = dict(zip(head.split("|")[2:-1], row.split("|")[2:-1], strict=True))
    assert cells[" CHAIR_s "] == " 3.5 ± 0.7 " and cells[" chosen "] == " 1.5 ± 0.0 "
    assert cells.keys() >= {" coverage ", " false relation ", " KL "} and start.startswith("| start | 9.0 |")


def test_minutes_of_two_stages(tmp_path, monkeypatch):
    """Pairs once, and both stages."""
    args = SimpleNamespace(out=tmp_path, options=[], split="dev", scenes=3)
    for folder, name, minutes in (("pairs-rank-0", "minutes", 1), ("sft-0", "result", 10), ("sft-then-dpo-0", "result", 100)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps({"minutes": minutes}))
    asked = []
    monkeypatch.setattr(alignment, "measure", lambda *more: asked.append(more) or {"figures": {"words": 9.0}})
    cuts = [{"words": 8.0, "CHAIR_s": 2.0}, {"words": 10.0, "CHAIR_s": 4.0}]
    assert alignment.figures_of("sft, then dpo", 0, cuts, args) == {"words": 9.0, "cut": 3.0, "minutes": 111}
    assert alignment.figures_of("sft", 0, cuts, args)["minutes"] == 11
    out = tmp_path / "sft-then-dpo-0"
    assert asked[0] == (out / "model", "dev", 3, out / "measured.json", tmp_path / "pairs-rank-0" / "pairs.jsonl")


def test_gain_over_the_start():
    """Nothing for the start itself; a model that finds all tokens equally likely gives each -ln V, padding none."""
    processor, start, flat = Processor(DEFAULT_MODEL), load_llava(DEFAULT_MODEL), load_llava(DEFAULT_MODEL)
    texts = ["There is a dog.", "There is a dog and a cup and a red car on the grass."]
    rows = [{"id": str(i), "image": f"scene:{scenes.PAIRS + i}", "prompt": scenes.CAPTION_PROMPT, "chosen": text}
            for i, text in enumerate(texts)]
    assert alignment.gain(start, processor, rows, "chosen") == 0
    with torch.no_grad():
        flat.language_model.lm_head.weight.zero_()
    batch = collate(rows, {"chosen": dict(image="image", response="chosen")}, processor)
    known, mask = Scorer(start)(batch.packed, start.vision_features(batch.pixels))  # (2, L)
    flat_logps = -math.log(flat.config.text.vocab_size) * mask.sum(-1)  # (2,)
    expected = (flat_logps - known.masked_fill(~mask, 0.0).sum(-1)).tolist()
    for picked, value in ((rows[:1], expected[0]), (rows[1:], expected[1]), (rows, sum(expected) / 2)):
        assert alignment.gain(flat, processor, picked, "chosen") == pytest.approx(value, abs=1e-3)
    assert abs(expected[0] - expected[1]) > 0.1
