"""train.py: starts at the known values, resumes bit for bit, gives the same with two processes, refuses nonsense."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import prepare
import results
import train
from common import BadInput, meaning
from data import scenes
from data.processor import ClipProcessor, Processor
from data.records import write_jsonl
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava, save_llava
from model.resume import checkpoints
from options import check, options_of, read_arguments
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


@pytest.mark.parametrize("more", [
    [], ["--lora-rank", "0"], ["--train-projector", "--lora-dropout", "0.1"],
    ["--train-vision", "--vision-lr", "1e-4", "--train-projector", "--projector-lr", "1e-2", "--schedule", "linear",
     "--max-tokens", "700", "--group-by-length"],
])
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
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-5)  # the MLP goes in parts


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


def test_micro_batches_by_tokens_in_two_processes_equal_one_batch(pairs, tmp_path):
    """Six records a process, cut at 300 tokens into several micro-batches; the tower trains, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--loss", "dpo", "--batch-size", "12", "--group-by-length", "--train-vision", "--lr", "1e-4"]
    assert train.main(arguments(pairs, one, *more)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(HOME / "train.py"), *arguments(pairs, two, *more, "--max-tokens", "300")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


def test_a_record_beyond_max_tokens_is_refused_by_name(pairs, tmp_path, monkeypatch):
    """Before the model is loaded."""
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BadInput, match=r"pairs.jsonl: record '.*': \d+ tokens, more than --max-tokens 90"):
        train.main(arguments(pairs, tmp_path, "--loss", "dpo", "--max-tokens", "90"))


def test_the_tower_trains_and_the_reference_keeps_the_former(pairs, tmp_path):
    """Its weights, and in a first step of a large rate nothing else, move; the reference's log-probs do not."""
    args = read_arguments(train.LOSSES, arguments(pairs, tmp_path, "--loss", "dpo", "--train-vision", "--vision-lr", "0.01"))
    recipe = train.LOSSES["dpo"]
    check(args, recipe, 1)
    model, processor = prepare.load_model(args, torch.device("cpu")), Processor(DEFAULT_MODEL)
    policy = prepare.make_policy(args, recipe, model, torch.device("cpu"), 1)
    assert [(group["ratio"], len(group["params"])) for group in policy.optimizer.param_groups] == [
        (pytest.approx(10), len([*model.tower.parameters()])), (1.0, 56)]
    data = prepare.read_records(pairs, recipe)
    run = train.Run(args, recipe, policy, processor, data.records, data.root, torch.device("cpu"))
    batch = run.collate(data.records[:2])
    before = train.reference_logps(run, batch, batch.packed, model.seen(batch.pixels))
    start = policy.scorer(batch.packed, model.seen(batch.pixels))[0]
    torch.testing.assert_close(start, before)
    start.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in model.tower.named_parameters()
               if not name.endswith("k_proj.bias"))  # which softmax does not see
    policy.update()
    moved = policy.scorer(batch.packed, model.seen(batch.pixels))[0]
    assert (moved - start).abs().max() > 0.05
    assert torch.equal(train.reference_logps(run, batch, batch.packed, model.seen(batch.pixels)), before)


def test_trained_model_is_written_and_differs(pairs, tmp_path):
    train.main(arguments(pairs, tmp_path, "--loss", "sft", "--lr", "0.01"))
    before, after = load_llava(DEFAULT_MODEL).state_dict(), load_llava(tmp_path / "model").state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.startswith("language_model.model.layers") for n in moved)


@pytest.mark.parametrize("options, complaint", [
    (["--loss", "dpo", "--bet", "0.2"], "unrecognized arguments"),
    (["--loss", "sft", "--beta", "0.2"], "unrecognized arguments"),
    (["--loss", "ppo2"], "invalid choice"),
    (["--loss", "dpo", "--batch-size", "6", "--micro-batch-size", "4"], "not a multiple"),
    (["--loss", "dpo", "--resume"], "there is no"),
    (["--loss", "dpo", "--model", "nowhere"], "no such folder"),
])
def test_nonsense_is_refused(tmp_path, options, complaint, capsys):
    with pytest.raises((BadInput, SystemExit)) as error:
        train.main(["--out", str(tmp_path / "out"), *options])
    assert complaint in str(error.value) + capsys.readouterr().err


def test_a_refusal_is_one_line(tmp_path):
    command = [sys.executable, str(HOME / "train.py"), "--out", str(tmp_path / "out"), "--loss", "dpo", "--resume"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: ") and "there is no" in done.stderr


def test_impossible_settings_are_refused_all_at_once(tmp_path):
    """Each in a line of its own, before the number of processes or a model matters."""
    options = ["--loss", "ppo", "--batch-size", "6", "--micro-batch-size", "4", "--pairs", "rank", "--reference-cache", "x",
               "--resume", "--overwrite", "--out", str(tmp_path)]
    with pytest.raises(BadInput) as error:
        train.main(options)
    lines = str(error.value).split("\n")
    starts = ["--batch-size 6 is not a multiple", "--pairs is for losses that learn from pairs", "--resume goes on with",
              "--resume: there is no", "--reference-cache: what ppo scores is drawn again", "--judge reward needs --reward"]
    assert len(lines) == len(starts) and all(line.startswith(start) for line, start in zip(lines, starts))


def test_minibatches_divide_the_micro_batches():
    args = read_arguments(train.LOSSES, ["--loss", "ppo", "--batch-size", "12", "--micro-batch-size", "2", "--minibatches", "2",
                                         "--judge", "clip"])
    check(args, train.LOSSES["ppo"], 1)  # 6 micro-batches
    with pytest.raises(BadInput, match="--minibatches 2 does not divide the 3 micro-batches of a process"):
        check(args, train.LOSSES["ppo"], 2)


def test_bad_pairs_are_all_listed_before_training(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[1]["chosen"], rows[3]["rejected_image"] = "", None
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        train.main(arguments(path, tmp_path / "out", "--loss", "adavip"))
    assert ":2:" in str(error.value) and ":4:" in str(error.value)


def test_fewer_records_than_a_batch_are_refused_before_the_model_is_loaded(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    with pytest.raises(BadInput, match=r"pairs.jsonl: \d+ records are fewer than one batch of 400 \(--batch-size\)"):
        train.main(arguments(pairs, tmp_path / "out", "--loss", "dpo", "--batch-size", "400"))


def test_an_out_that_another_run_is_writing_is_refused(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    code = "import sys, time; from common import held; from pathlib import Path\nwith held(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=HOME)
    other.stdout.readline()
    try:
        with pytest.raises(BadInput, match=f"^{tmp_path}: another run is writing it$"):
            train.main(arguments(pairs, tmp_path, "--loss", "dpo", "--overwrite"))
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate()


def test_a_file_is_read_once(pairs, tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(prepare, "load", lambda *args, load=prepare.load, **more: reads.append(args) or load(*args, **more))
    assert train.main(arguments(pairs, tmp_path / "out", "--loss", "dpo", "--steps", "1")) == 0 and len(reads) == 1


@pytest.mark.parametrize("scenes", [1, 2])
def test_a_few_scenes_can_be_measured(scenes):
    values, said = results.measure(load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL), scenes, "test")
    assert len(said) == scenes and "CHAIR_s" in values and "asked count" not in values


# ---- bad records ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Ten pairs; the header of r4's picture is whole, its pixels are cut off."""
    folder = tmp_path_factory.mktemp("damaged")
    Image.new("RGB", (90, 60), (200, 30, 90)).save(folder / "p.bmp")
    (folder / "p.bmp").write_bytes((folder / "p.bmp").read_bytes()[:3000])
    write_jsonl(folder / "pairs.jsonl", [
        {"id": f"r{i}", "image": "p.bmp" if i == 4 else f"scene:{scenes.PAIRS + i}", "prompt": "What is there?",
         "chosen": f"A dog and {i} cats.", "rejected": f"A cat and {i} dogs."} for i in range(10)])
    return folder / "pairs.jsonl"


def bad_run(damaged: Path, out: Path, *more: str) -> list[str]:
    return arguments(damaged, out, "--loss", "dpo", "--batch-size", "2", "--steps", "6", "--lora-dropout", "0.1",
                     *more)


def test_a_damaged_picture_stops_the_run_and_skip_goes_on_bit_for_bit(damaged, tmp_path):
    """`stop` saves the finished steps and names the record; going on with `skip` is an uninterrupted `skip`."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(bad_run(damaged, whole, "--bad-records", "skip", "--workers", "1")) == 0
    with pytest.raises(ValueError, match="record 'r4': .*p.bmp: not a readable image .*--bad-records skip") as error:
        train.main(bad_run(damaged, parts))
    done = torch.load(checkpoints(parts)[0], weights_only=True)["step"]
    assert 0 < done < 6 and f"holds the {done} finished steps" in str(error.value) and "\n" not in str(error.value)
    assert len(losses(parts)) == done
    with pytest.raises(ValueError, match="record 'r4'"):  # again, also from a loader's process, in one line
        train.main(bad_run(damaged, parts, "--resume", "--workers", "1"))
    assert train.main(bad_run(damaged, parts, "--resume", "--bad-records", "skip")) == 0
    assert weights(parts) == weights(whole) and losses(parts) == losses(whole)
    last = [json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["bad_records"] for out in (whole, parts)]
    result = json.loads((parts / "result.json").read_text())["bad_records"]
    assert last == [1, 1] and list(result) == ["r4"] and "truncated" in result["r4"]


def test_two_processes_stop_where_one_does(damaged, tmp_path):
    """Only one of them meets the picture: both stop, and what they saved goes on in one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ["--lora-dropout", "0", "--micro-batch-size", "1"]
    assert train.main(bad_run(damaged, one, "--bad-records", "skip", *more)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(HOME / "train.py"), *bad_run(damaged, two, *more)]
    stopped = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                             timeout=120)
    assert stopped.returncode != 0 and stopped.stderr.count("train.py: record 'r4'") == 2, stopped.stderr
    assert train.main(bad_run(damaged, two, "--resume", "--bad-records", "skip", *more)) == 0
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)


def test_losses_that_sample_stop_and_skip_too(damaged, tmp_path):
    rows = [json.loads(line) for line in damaged.read_text().splitlines()]
    images = damaged.with_name("images.jsonl")
    write_jsonl(images, [{key: row[key] for key in ("id", "image", "prompt")} for row in rows])
    command = [*arguments(images, tmp_path, "--loss", "rloo", "--judge", "clip"), "--batch-size", "2", "--steps", "3",
               "--samples", "2", "--max-new-tokens", "8"]
    with pytest.raises(ValueError, match="record 'r4': .*p.bmp.*--bad-records skip"):
        train.main(command)
    assert train.main([*command, "--bad-records", "skip"]) == 0


def test_the_reference_cache_holds_what_can_be_used_and_is_completed(damaged, tmp_path):
    """All other records are computed before the damaged one is named; mended, only its rows are computed."""
    mended, cache = tmp_path / "data", tmp_path / "cache.safetensors"
    shutil.copytree(damaged.parent, mended)
    command = [*bad_run(mended / "pairs.jsonl", tmp_path / "out"), "--reference-cache", str(cache), "--overwrite"]
    with pytest.raises(ValueError, match="record 'r4'"):
        train.main(command)
    kept = load_file(cache)
    assert {name.partition("/")[2] for name in kept} == {f"r{i}" for i in range(10)} - {"r4"}
    assert train.main([*command, "--bad-records", "skip"]) == 0
    Image.new("RGB", (90, 60), (200, 30, 90)).save(mended / "p.bmp")
    assert train.main(command) == 0
    found = load_file(cache)
    assert found.keys() - kept.keys() == {"chosen/r4", "rejected/r4"}
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_the_reward_model_is_measured_on_held_out_pairs_that_can_be_used(damaged, tmp_path):
    rows = [json.loads(line) for line in damaged.read_text().splitlines()]
    path = damaged.with_name("first.jsonl")
    write_jsonl(path, [rows[4], *rows[:4], *rows[5:], *({**row, "id": f"{row['id']}x"} for row in rows[5:])])
    command = [*arguments(path, tmp_path, "--loss", "reward_model"), "--batch-size", "2", "--steps", "1"]
    with pytest.raises(ValueError, match="record 'r4': .*leave it out with --bad-records skip"):
        train.main(command)
    assert train.main([*command, "--bad-records", "skip"]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["after"].keys() == {"accuracy"}


@pytest.mark.parametrize(
    "loss, change, reason",
    [
        ("dpo", {"chosen": "It costs <s>10</s> 8."}, "'chosen': text contains the special token <s>"),
        ("sft", {"prompt": "<pad>What?"}, "'prompt': text contains the special token <pad>"),
        ("dpo", {"rejected": "A cat. " * 400}, "'rejected': 12[0-9]{2} tokens with prompt and image, the"),
        ("mixed_dpo", {"prompt": "What? " * 450}, r"96 new ones \(--max-new-tokens\), the decoder takes 1024"),
    ],
)
def test_texts_are_refused_before_the_model_is_loaded(damaged, tmp_path, monkeypatch, loss, change, reason):
    """Each by the file and the record, all at once."""
    monkeypatch.setattr(train, "load_model", None)
    rows = [json.loads(line) for line in damaged.read_text().splitlines()]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{**row, **change} if row["id"] in ("r2", "r7") else row for row in rows if row["id"] != "r4"])
    with pytest.raises(ValueError) as error:
        train.main(arguments(path, tmp_path / "out", "--loss", loss))
    lines = str(error.value).split("\n")
    assert [re.match(rf"{path}: record '(r\d)': .*{reason}", line)[1] for line in lines] == ["r2", "r7"]


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
        pytest.importorskip("pyarrow.parquet")  # makes pa.parquet

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
        records = prepare.read_records(path, train.LOSSES[loss]).records
        assert records[0] == {"id": "0", "image": "0.png", "prompt": "What is it?"} and len(records) == 4
    for loss, method in (("rdpo", "realign"), ("adavip", "adavip")):
        with pytest.raises(ValueError) as error:
            prepare.read_records(path, train.LOSSES[loss])
        assert str(error.value) == (f"{path}: all 4 records: 'rejected_image' is missing (python generate_pairs.py"
                                    f" --method {method} --data {path} adds one)")
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != "rejected"} for row in rows]))
    assert prepare.read_records(path, train.LOSSES["sft"]).records[3]["chosen"] == "A dog."
    with pytest.raises(ValueError, match=f"python generate_pairs.py --method rank --data {path} makes pairs"):
        prepare.read_records(path, train.LOSSES["dpo"])


def test_settings_that_suit_a_model_travel_with_it(tmp_path):
    """A second stage from a run's model keeps them; a model without them has the papers'; what is no number is named."""
    first = read_arguments(train.LOSSES, ["--loss", "ppo"])
    assert (first.lr, first.kl_coef, first.steps) == (3e-4, 0.4, 30)
    save_llava(load_llava(DEFAULT_MODEL), tmp_path / "model", DEFAULT_MODEL)
    second = read_arguments(train.LOSSES, ["--loss", "dpo", "--model", str(tmp_path / "model")])
    assert (second.lr, second.beta) == (1e-3, 1.0)
    assert read_arguments(train.LOSSES, ["--loss", "ipo", "--model", str(tmp_path / "model")]).beta == 0.1
    (tmp_path / "model" / "train.json").write_text('{"lr": [1]}')
    with pytest.raises(ValueError, match="train.json: lr must be a number"):
        read_arguments(train.LOSSES, ["--loss", "dpo", "--model", str(tmp_path / "model")])
    (tmp_path / "model" / "train.json").unlink()
    other = read_arguments(train.LOSSES, ["--loss", "dpo", "--model", str(tmp_path / "model")])
    assert (other.lr, other.beta) == (1e-6, 0.1)


@pytest.mark.parametrize("loss", train.LOSSES)
def test_every_option_of_a_loss_says_what_it_does(loss):
    recipe = train.LOSSES[loss]
    silent = [name for name in options_of(*recipe.functions) if len(meaning(name, *recipe.functions)) < 10]
    assert silent == []
    assert loss != "povid" or meaning("gamma", *recipe.functions) == "weight of the rejected response, in [0, 1]"
