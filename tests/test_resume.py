"""Runs that are killed, resumed, lengthened or begun again: nothing is lost, mixed up, or replaced unasked.

All on the embedded model with adapters of rank 4; checkpoints every 3 steps, log lines every 2, 7 steps.
"""

import errno
import functools
import json
import math
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lifecycle
import prepare
import train
from common import BadInput, check_ranges, versions, written_whole
from data import scenes
from data.processor import Processor
from data.records import write_jsonl
from model import reference, resume, training
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.tensors import save_shards
from options import RANGES, check, read_arguments
from pairs.methods import METHODS, Method, make_pairs
from pairs.progress import parts

HOME = Path(__file__).resolve().parents[1]
STEPS = 7
TIMES = {"tokens/s", "eta_s", "peak_gib"}
ANSWERS = [("There is a dog and a cup on the table.", "There is a cat."), ("A red ball lies here.", "A chair."),
           ("I see a cup.", "I see a large blue dog beside a small tree.")]


def write_pairs(path: Path, count: int = 8) -> Path:
    write_jsonl(path, [{"id": str(i), "image": scenes.reference(scenes.PAIRS + i), "prompt": scenes.CAPTION_PROMPT,
                        "chosen": ANSWERS[i % 3][0], "rejected": ANSWERS[i % 3][1]} for i in range(count)])
    return path


def command(folder: Path, out: str, *more: str) -> list[str]:
    return ["--loss", "dpo", "--data", str(folder / "pairs.jsonl"), "--out", str(folder / out), "--steps",
            str(STEPS), "--batch-size", "2", "--save-every", "3", "--log-every", "2", "--eval-scenes", "0",
            "--lora-rank", "4", *more]


def lines(out: Path) -> list[dict]:
    """The log without its times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs, and a finished run `whole` on them; both are left as they are."""
    folder = tmp_path_factory.mktemp("runs")
    write_pairs(folder / "pairs.jsonl")
    assert train.main(command(folder, "whole")) == 0
    assert [row["step"] for row in lines(folder / "whole")] == [2, 4, 6, 7]
    return folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """The finished run once more, as `run`, to be damaged; its last checkpoints are of steps 7 and 6."""
    write_pairs(tmp_path / "pairs.jsonl")
    shutil.copytree(folder / "whole", tmp_path / "run")
    for path in resume.checkpoints(tmp_path / "run"):
        edit(path, lambda saved: saved["config"].update(data=str(tmp_path / "pairs.jsonl")))
    return tmp_path


def edit(path: Path, change) -> None:
    """Let `change` do something to a checkpoint."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def flat(saved: dict) -> torch.Tensor:
    """All numbers of a checkpoint that are trained or belong to the optimiser."""
    state = saved["optimizer"]["state"].values()
    return torch.cat([t.flatten() for tensors in (saved["trained"], *state) for t in tensors.values()])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


# ---- killed anywhere ---------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(monkeypatch, moment: str, step: int) -> None:
    """Die in `step`: before its log line, before its checkpoint, or behind it."""
    asked, save, done = train.StopRequest.asked, train.save, iter(range(1, STEPS + 1))

    def dying_asked(self):
        if next(done) == step and moment in ("line", "SIGTERM", "SIGINT"):
            if moment == "line":
                self.close()
                raise Killed
            os.kill(os.getpid(), signal.Signals[moment])
        return asked(self)

    def dying_save(run, at, *rest):
        if at == step and moment == "checkpoint":
            raise Killed
        save(run, at, *rest)
        if at == step and moment == "behind":
            raise Killed

    monkeypatch.setattr(train.StopRequest, "asked", dying_asked)
    monkeypatch.setattr(train, "save", dying_save)


@pytest.mark.parametrize("moment, step", [("line", 4), ("checkpoint", 6), ("behind", 3), ("SIGTERM", 5), ("SIGINT", 1)])
def test_weights_and_log_are_those_of_an_uninterrupted_run(folder, tmp_path, monkeypatch, capfd, moment, step):
    """Also where a log line covers steps before and after the checkpoint, and when stopped by Ctrl-C."""
    out, handlers = tmp_path / "run", [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        kill(patch, moment, step)
        if moment.startswith("SIG"):
            assert train.main(command(folder, str(out))) == 1
            said = capfd.readouterr()
            assert f"{moment}: a checkpoint is written after this step\n" in said.err
            assert f"interrupted; go on with --resume --out {out}\n" in said.out
            assert resume.load_whole(resume.checkpoints(out)[0])["step"] == step
        else:
            with pytest.raises(Killed):
                train.main(command(folder, str(out)))
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    assert train.main(command(folder, str(out), "--resume")) == 0
    assert lines(out) == lines(folder / "whole") and weights(out) == weights(folder / "whole")


KILL_ITSELF = """
import os, signal, sys
sys.path.insert(0, {home!r})
import train
done = iter(range(1, 100))
train.StopRequest.asked = lambda self: next(done) == 5 and os.kill(os.getpid(), signal.SIGKILL)
train.main(sys.argv[1:])
"""


def test_a_signal_while_processes_exchange_theirs_counts_at_the_next_step(monkeypatch):
    """Else this process alone would end, and the others wait for it."""
    stop = training.StopRequest(2)
    monkeypatch.setattr(training.dist, "all_reduce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert not stop.asked() and stop.asked()
    stop.close()


def test_killed_by_the_system(folder, tmp_path):
    out = tmp_path / "run"
    died = subprocess.run([sys.executable, "-c", KILL_ITSELF.format(home=str(HOME)), *command(folder, str(out))],
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert died.returncode == -signal.SIGKILL
    assert train.main(command(folder, str(out), "--resume")) == 0
    assert lines(out) == lines(folder / "whole") and weights(out) == weights(folder / "whole")


TWO_PROCESSES = """
import pathlib, sys
sys.path.insert(0, {home!r})
import torch.distributed as dist
import prepare
import train
from common import BadInput
from model import training
from tests.test_resume import broken

def die(self):
    if next(done) == 5:
        raise KeyError("killed")
    return asked(self)

device, end = training.start_processes(2), dist.destroy_process_group
training.start_processes, dist.destroy_process_group = lambda world: device, lambda: None  # one group for all
assert train.main([*sys.argv[1:], "--out", {whole!r}]) == 0
asked, done, train.StopRequest.asked = train.StopRequest.asked, iter(range(1, 100)), die
try:
    train.main([*sys.argv[1:], "--out", {parts!r}])
except KeyError:
    train.StopRequest.asked = asked
if dist.get_rank() == 1:
    train.LOSSES["dpo"] = broken(train.LOSSES["dpo"], 2, "infinite loss")  # in the second step since the checkpoint
try:
    train.main([*sys.argv[1:], "--out", {parts!r}, "--resume"])
except BadInput as error:
    assert str(error).startswith("step 5: the loss is not finite"), error
    dist.barrier()
    if dist.get_rank() == 0:
        pathlib.Path({parts!r}, "bad-batch.json").rename({whole!r} + ".json")
    dist.barrier()
else:
    raise AssertionError(f"process {{dist.get_rank()}} went on")
train.LOSSES["dpo"] = train.LOSSES["dpo"]._replace(loss=train.dpo.dpo_loss)
assert train.main([*sys.argv[1:], "--out", {parts!r}, "--resume"]) == 0
end()
"""


def run_on_two(script: Path, *arguments: str, restarts: int = 0) -> str:
    """Run a script on two processes; returns what it printed."""
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               "--max-restarts", str(restarts), str(script), *arguments]
    done = subprocess.run(started, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory) -> Path:
    """On two processes: `whole`; and `parts`, which dies after four steps, meets a loss that is not finite in one
    process when it is resumed, and is resumed once more."""
    out = tmp_path_factory.mktemp("two")
    (out / "two.py").write_text(
        TWO_PROCESSES.format(home=str(HOME), whole=str(out / "whole"), parts=str(out / "parts")))
    run_on_two(out / "two.py", *command(folder, "unused"))
    return out


def test_two_processes_log_as_if_uninterrupted(two):
    """Each process goes on with its own sums."""
    whole, parts = two / "whole", two / "parts"
    assert lines(parts) == lines(whole) and len(lines(whole)) == 4 and weights(parts) == weights(whole)


def test_two_processes_stop_together_before_the_weights_change(two):
    """Although only one of them has a loss that is not finite."""
    found = json.loads((two / "whole.json").read_text())
    assert found["step"] == 5 and len(set(found["ids"])) == 2 and len(found["metrics"]) == 2
    assert sorted(added["loss"][0] == "inf" for added in found["metrics"]) == [False, True]


RESTARTED = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {home!r})
import torch
import train
from model.resume import checkpoints

DEATHS = [("asked 4", 1), ("saved 6", 0), None]  # when, and which process
deaths, starts = pathlib.Path({deaths!r}), pathlib.Path({starts!r})
former, rank, steps = len(deaths.read_text().splitlines()), int(os.environ["RANK"]), iter(range(1, 100))
begin, asked, save = train.begin, train.StopRequest.asked, torch.save

def note(path, line):
    with path.open("a") as file:
        file.write(line + "\\n")

def perhaps_die(when):
    if DEATHS[former] == (when, rank):
        while not checkpoints(pathlib.Path({out!r})):  # the other process writes it in a thread
            time.sleep(0.01)
        note(deaths, when)
        os.kill(os.getpid(), signal.SIGKILL)

def noting_begin(*given):
    done = begin(*given)
    note(starts, str(rank) + " after " + str(former) + " deaths from step " + str(done))
    return done

def dying_save(content, file):
    save(content, file)
    file.flush()
    perhaps_die("saved " + str(content["step"]))

train.begin = noting_begin
train.StopRequest.asked = lambda self: perhaps_die("asked " + str(next(steps))) or asked(self)
torch.save = dying_save
sys.exit(train.main(sys.argv[1:]))
"""


def test_torchrun_goes_on_by_itself(folder, two, tmp_path):
    """One process is killed between two checkpoints, then the other while it writes one. Neither the first attempt nor
    --overwrite, which is still in the command, lets anything of an earlier run with the same settings in."""
    script, out, deaths, starts = (tmp_path / name for name in ("run.py", "run", "deaths", "starts"))
    script.write_text(RESTARTED.format(home=str(HOME), out=str(out), deaths=str(deaths), starts=str(starts)))
    deaths.touch()
    shutil.copytree(two / "whole", out)
    for path in resume.checkpoints(out):
        edit(path, lambda saved: saved["config"].update(out=str(out)) or saved["trained"].popitem()[1].add_(1))
    run_on_two(script, *command(folder, str(out)), "--overwrite", restarts=3)
    assert deaths.read_text().splitlines() == ["asked 4", "saved 6"]
    assert set(starts.read_text().splitlines()) == {
        f"{rank} after {former} deaths from step {done}" for rank in "01" for former, done in enumerate((0, 3, 3))}
    assert lines(out) == lines(two / "whole") and weights(out) == weights(two / "whole")
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("starting, kept, resumes", [(True, True, False), (False, True, True), (False, False, False)])
def test_what_a_restart_does(tmp_path, monkeypatch, starting, kept, resumes):
    """It goes on with a checkpoint of the attempts before, never with one that --overwrite was to take away."""
    for name in (train.STARTING,) * starting + ("checkpoint-3.pt",) * kept:
        (tmp_path / name).touch()
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        args = read_arguments(train.LOSSES, command(tmp_path, str(tmp_path), "--overwrite"))
        train.go_on_after_a_crash(args)
        assert (args.resume, args.overwrite) == ((True, False) if resumes and count == "1" else (False, True))


def test_a_slow_process_of_a_restart_decides_as_the_others(folder, tmp_path, monkeypatch):
    """What the first one does before they meet changes nothing for those that look later."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    (tmp_path / "checkpoint-3.pt").touch()
    for _ in range(2):
        monkeypatch.setattr(resume, "read_checkpoint", lambda *_: {"step": 3})
        monkeypatch.setattr(training, "start_processes", lambda world: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(command(folder, str(tmp_path), "--overwrite"))
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3.pt"]


def test_processes_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "gather_all", lambda items, world: [*items, 6][:world])
    train.refuse_different_steps({"step": 3}, tmp_path, 1)
    train.refuse_different_steps({"step": 6}, tmp_path, 2)
    for saved, steps in (({"step": 3}, "3, 6"), (None, "0, 6")):
        with pytest.raises(BadInput, match=f"different checkpoints, of steps {steps};"):
            train.refuse_different_steps(saved, tmp_path, 2)


# ---- what is written, and when -----------------------------------------------------------------------------


def small_policy() -> training.Policy:
    """Two weights after one step, with gradients for the next."""
    model = torch.nn.Linear(2, 1, bias=False)
    policy = training.Policy(model, model, None, torch.optim.AdamW(model.parameters(), lr=0.1), 1.0)
    for _ in range(2):
        policy.backward(model(torch.ones(1, 2)).sum())
        norm = policy.update()
    assert norm == pytest.approx(2**0.5)
    policy.backward(model(torch.ones(1, 2)).sum())
    return policy


CONTENT = dict(config={}, identity={}, bad_records={}, reinforcement={}, log={})


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    """Although training changes everything before the thread has written it."""
    policy, write, go_on = small_policy(), resume.write_checkpoint, threading.Event()
    monkeypatch.setattr(resume, "write_checkpoint", lambda *given: go_on.wait(60) and write(*given))
    before = flat({"trained": policy.trained, "optimizer": policy.optimizer.state_dict()}).clone()
    with resume.Writer() as writer:
        writer.save(tmp_path, 2, policy, step=1, **CONTENT)
        policy.update()
        go_on.set()
        writer.save(tmp_path, 2, policy, step=2, **CONTENT)
        assert resume.checkpoints(tmp_path)[-1].name == "checkpoint-1.pt"  # the one before has been waited for
    newest, older = map(resume.load_whole, resume.checkpoints(tmp_path))
    assert torch.equal(flat(older), before) and not torch.equal(flat(newest), before)


@pytest.mark.parametrize("keep, names", [(1, ["checkpoint-10.pt"]), (3, [f"checkpoint-{i}.pt" for i in (10, 9, 8)])])
def test_the_newest_checkpoints_stay(tmp_path, keep, names):
    policy = small_policy()
    (tmp_path / "checkpoint-mine.pt").touch()
    with resume.Writer() as writer:
        for step in range(7, 11):
            writer.save(tmp_path, keep, policy, step=step, **CONTENT)
    assert [path.name for path in resume.checkpoints(tmp_path)] == names and (tmp_path / "checkpoint-mine.pt").exists()


def test_what_the_thread_runs_into_ends_the_run(tmp_path, monkeypatch):
    """At the next checkpoint or at the end; where the run ends by another error, that one is seen."""
    policy = small_policy()
    monkeypatch.setattr(resume, "write_checkpoint", lambda out, content, keep: 1 / (content["step"] - 1))
    with pytest.raises(ZeroDivisionError), resume.Writer() as writer:
        writer.save(tmp_path, 2, policy, step=1, **CONTENT)
    with pytest.raises(KeyError), resume.Writer() as writer:
        writer.save(tmp_path, 2, policy, step=1, **CONTENT)
        raise KeyError
    with resume.Writer() as writer:
        writer.save(tmp_path, 2, policy, step=1, **CONTENT)
        with pytest.raises(ZeroDivisionError):
            writer.save(tmp_path, 2, policy, step=2, **CONTENT)
        writer.pending = writer.thread.submit(int)


def test_a_full_disk_ends_the_run_in_one_line(folder, tmp_path, monkeypatch):
    """The checkpoint before is whole, nothing half written is left, and the run goes on when there is room."""
    out, write, limit = tmp_path / "run", resume.write_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(out, content, keep):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if content["step"] == 6 else limit[0], limit[1]))
        try:
            write(out, content, keep)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "write_checkpoint", full)
        with pytest.raises(BadInput) as error:
            train.main(command(folder, str(out)))
    assert str(error.value) == f"{out / 'checkpoint-6.pt'}: cannot be written (File too large)"
    assert [path.name for path in resume.checkpoints(out)] == ["checkpoint-3.pt"] and not list(out.glob(".*"))
    assert train.main(command(folder, str(out), "--resume")) == 0
    assert lines(out) == lines(folder / "whole") and weights(out) == weights(folder / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_named(tmp_path, number):
    with pytest.raises(BadInput, match=f"file: cannot be written .{os.strerror(number)}"):
        with written_whole(tmp_path / "file"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "file"):
        open(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_on_the_disk_is_named(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(BadInput, match="part-0.tmp: cannot be written .File too large"):
            save_shards({"a": lambda: torch.zeros(1000)}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# ---- what is not finite ------------------------------------------------------------------------------------

BREAKS = {  # of a batch's losses: with gradients that are not finite, with finite ones, with nothing else
    "loss": lambda losses: losses * math.nan,
    "infinite loss": lambda losses: losses + math.inf,
    "gradient": lambda losses: losses + (losses * 0).sqrt(),
}


def broken(recipe, call: int, how: str):
    """A recipe whose loss breaks in one of its calls."""
    calls = iter(range(1, 1000))

    @functools.wraps(recipe.loss)
    def loss(**inputs):
        losses, metrics = recipe.loss(**inputs)
        return BREAKS[how](losses) if next(calls) == call else losses, metrics

    return recipe._replace(loss=loss)


@pytest.mark.parametrize("how", BREAKS)
def test_what_is_not_finite_changes_no_weight(how):
    policy = small_policy()
    policy.optimizer.zero_grad()
    state = {"trained": policy.trained, "optimizer": policy.optimizer.state_dict()}
    before = flat(state).clone()
    policy.backward(BREAKS[how](policy.model(torch.ones(1, 2)).square().sum()))
    assert not math.isfinite(policy.update()) and torch.equal(flat(state), before)
    policy.backward(policy.model(torch.ones(1, 2)).sum())
    assert math.isfinite(policy.update()) and not torch.equal(flat(state), before)


@pytest.mark.parametrize("how", BREAKS)
def test_a_step_that_is_not_finite_ends_the_run_and_names_its_records(folder, tmp_path, monkeypatch, how):
    """In the fifth of seven steps, in the first of its two micro-batches; a resumed run repeats it."""
    out, small = tmp_path / "run", ["--micro-batch-size", "1"]
    with monkeypatch.context() as patch:
        patch.setitem(train.LOSSES, "dpo", broken(train.LOSSES["dpo"], 9, how))
        with pytest.raises(BadInput, match=f"^step 5: the {how.split()[-1]} is not finite.* {out}/bad-batch.json"):
            train.main(command(folder, str(out), *small))
    found = json.loads((out / "bad-batch.json").read_text())
    losses = [loss for added in found["metrics"] for loss in added["loss"]]
    assert found["step"] == 5 and found["not finite"] == how.split()[-1] and len(found["ids"]) == len(losses) == 2
    assert [type(loss) for loss in losses] == [float if how == "gradient" else str, float]
    assert found["metrics"][0].keys() == {"loss", "reward/chosen", "reward/rejected", "margin", "accuracy"}
    assert [path.name for path in resume.checkpoints(out)] == ["checkpoint-3.pt"]
    assert [row["step"] for row in lines(out)] == [2, 4]
    assert train.main(command(folder, str(out), *small, "--resume")) == 0 and not (out / "bad-batch.json").exists()


def test_reinforcement_ends_at_the_first_update_that_is_not_finite(folder, tmp_path, monkeypatch):
    """Later updates of the step would hide it."""
    monkeypatch.setitem(train.LOSSES, "rloo", broken(train.LOSSES["rloo"], 3, "gradient"))
    with pytest.raises(BadInput, match="^step 2: the gradient is not finite"):
        train.main(["--loss", "rloo", *command(folder, str(tmp_path))[2:], "--judge", "clip", "--samples", "2",
                    "--max-new-tokens", "4", "--inner-epochs", "2"])
    found = json.loads((tmp_path / "bad-batch.json").read_text())
    assert len(found["ids"]) == 2 and [{"kl", "loss"} & added.keys() for added in found["metrics"]] == [{"kl"}, {"loss"}]


def test_an_image_that_is_deleted_while_it_trains(folder, tmp_path, monkeypatch):
    rows = [json.loads(line) | {"image": f"{i}.png"} for i, line in
            enumerate((folder / "pairs.jsonl").read_text().splitlines())]
    for row in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / row["image"])
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    asked = train.StopRequest.asked

    def delete(self):
        for row in rows:
            (tmp_path / row["image"]).unlink(missing_ok=True)
        return asked(self)

    monkeypatch.setattr(train.StopRequest, "asked", delete)
    with pytest.raises(BadInput, match=r"record '\d': .*\d.png.* the 1 finished steps: go on with --resume"):
        train.main(command(tmp_path, "run"))
    assert [path.name for path in resume.checkpoints(tmp_path / "run")] == ["checkpoint-1.pt"]


# ---- damaged logs ------------------------------------------------------------------------------------------


def test_a_damaged_log_is_no_hindrance(copied, capsys):
    path = copied / "run" / "metrics.jsonl"
    good = lines(copied / "run")
    damage = [b"\xff\xfe", b"[1]", b'{"step": "3"}', b'{"step": 9}', b"null", b"[" * 100_000]
    path.write_bytes(path.read_bytes() + b"\n".join(damage))
    assert train.main(command(copied, "run", "--resume")) == 0
    assert lines(copied / "run") == good
    assert "metrics.jsonl: line 5 is no whole log line" in capsys.readouterr().err


# ---- damaged checkpoints -----------------------------------------------------------------------------------


def test_no_flipped_bit_goes_unnoticed(copied):
    """A flip is detected, or it lies between the members of the archive and changes nothing."""
    path = copied / "run" / "checkpoint-7.pt"
    whole, good = resume.load_whole(path), path.read_bytes()
    draw, detected = random.Random(0), 0
    for _ in range(60):
        path.write_bytes(good)
        flip(path, draw.randrange(len(good)))
        try:
            found = resume.load_whole(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            detected += 1
        else:
            assert torch.equal(flat(found), flat(whole)) and found["config"] == whole["config"]
    assert detected > 40


def test_the_checkpoint_before_a_damaged_one_is_taken(folder, copied, capsys):
    current, previous = resume.checkpoints(copied / "run")
    assert (current.name, previous.name) == ("checkpoint-7.pt", "checkpoint-6.pt")
    flip(current, current.stat().st_size // 2)
    assert train.main(command(copied, "run", "--resume")) == 0
    said = capsys.readouterr().err
    assert f"{current}: damaged" in said and f"from step 6 in {previous}" in said
    assert lines(copied / "run") == lines(folder / "whole") and weights(copied / "run") == weights(folder / "whole")
    assert resume.load_whole(current)["step"] == 7 and resume.load_whole(previous)["step"] == 6
    current.write_bytes(current.read_bytes()[:-1000])
    flip(previous, previous.stat().st_size // 2)
    with pytest.raises(ValueError) as error:
        train.main(command(copied, "run", "--resume"))
    assert str(current) in str(error.value) and str(previous) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_checkpoint_takes_no_place_among_those_that_stay(copied, monkeypatch):
    """Else the next ones, which are older, would be the ones to go."""
    flip(copied / "run" / "checkpoint-7.pt", 300_000)
    monkeypatch.setattr(train, "train", lambda run, *_: False)
    assert train.main(command(copied, "run", "--resume")) == 1
    assert [path.name for path in resume.checkpoints(copied / "run")] == ["checkpoint-6.pt"]


def test_what_a_kill_left_half_written_is_removed(copied):
    """Only that: a file of the user's stays."""
    left, mine = copied / "run" / ".checkpoint-7.pt.4321-0123abcd", copied / "run" / ".notes"
    left.write_bytes(b"half"), mine.write_text("keep")
    assert train.main(command(copied, "run", "--resume")) == 0
    assert not left.exists() and mine.read_text() == "keep"


NAME = "model.language_model.model.layers.0.self_attn.q_proj.lora_A"
CHANGES = {
    "a weight is missing": lambda saved: saved["trained"].pop(NAME),
    "a weight too many": lambda saved: saved["trained"].update(more=torch.zeros(1)),
    "a weight that would broadcast": lambda saved: saved["trained"].update({NAME: torch.zeros(1)}),
    "a moment of another shape": lambda saved: saved["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "a moment is missing": lambda saved: saved["optimizer"]["state"][0].pop("exp_avg_sq"),
    "no optimiser state": lambda saved: saved.update(optimizer={}),
    "no log": lambda saved: saved.pop("log"),
    "step is a text": lambda saved: saved.update(step="7"),
    "empty": dict.clear,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_does_not_fit_is_named(copied, change):
    path, previous = resume.checkpoints(copied / "run")
    previous.unlink()
    edit(path, CHANGES[change])
    with pytest.raises(ValueError, match="of another model|no checkpoint of this version") as error:
        train.main(command(copied, "run", "--resume"))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- what a run began with ---------------------------------------------------------------------------------


def test_other_records_are_noticed(copied):
    write_pairs(copied / "pairs.jsonl", 7)
    with pytest.raises(ValueError, match="checkpoint-7.pt belongs to another run: other records"):
        train.main(command(copied, "run", "--resume"))


def test_other_weights_are_noticed(copied):
    model = ["--model", str(copied / "model"), "--steps", "2"]
    shutil.copytree(DEFAULT_MODEL, copied / "model")
    assert train.main(command(copied, "own", *model)) == 0
    assert train.main(command(copied, "own", *model, "--resume")) == 0
    tensors = load_file(copied / "model" / "model.safetensors")
    tensors["multi_modal_projector.linear_1.weight"] += 1
    save_file(tensors, copied / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="belongs to another run: other model files$"):
        train.main(command(copied, "own", *model, "--resume"))


def test_identity_names_each_part(tmp_path, monkeypatch):
    """Large files are sampled: a change all over is seen, and in a part of it when the file is read whole."""
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    rows = [{"id": "a"}]

    def key(aspect: str | None = None, whole: bool = False) -> dict[str, str]:
        return reference.identity(tmp_path / "model", rows, Processor(DEFAULT_MODEL, aspect=aspect), whole)

    def changed(one: dict, two: dict) -> list[str]:
        return [name for name in one if one[name] != two[name]]

    start = key()
    assert changed(start, key()) == [] and changed(start, key("pad")) == ["template or image handling"]
    monkeypatch.setattr(reference, "BLOCK", 16)
    start, whole = key(), key(whole=True)
    file = tmp_path / "model" / "model.safetensors"
    flip(file, file.stat().st_size // reference.SAMPLES * 3 + 20)
    assert changed(start, key()) == [] and changed(whole, key(whole=True)) == ["model files"]
    flip(file, file.stat().st_size // reference.SAMPLES * 3 + 2)
    assert changed(start, key()) == ["model files"]


def test_records_made_from_scenes_are_kept(tmp_path):
    made = ["--loss", "dpo", "--out", str(tmp_path), "--scenes", "16", "--batch-size", "2", "--eval-scenes", "0",
            "--lora-rank", "4"]
    assert train.main([*made, "--steps", "1"]) == 0
    assert train.main([*made, "--steps", "2", "--resume"]) == 0


# ---- longer, and anew --------------------------------------------------------------------------------------


def test_a_finished_run_is_lengthened(copied, capsys):
    assert train.main(command(copied, "run", "--resume", "--steps", "9")) == 0
    assert "steps 7 -> 9: the cosine schedule now ends at 9" in capsys.readouterr().out
    found = lines(copied / "run")
    lr = read_arguments(train.LOSSES, command(copied, "run")).lr
    assert [row["step"] for row in found] == [2, 4, 6, 7, 8, 9]
    assert [row["lr"] for row in found[-2:]] == [training.learning_rate(lr, step, 9, 1) for step in (7, 8)]
    with pytest.raises(ValueError, match="--steps 7: 9 are done already"):
        train.main(command(copied, "run", "--resume"))


def test_a_run_explains_itself(folder, monkeypatch):
    found = json.loads((folder / "whole" / "config.json").read_text())
    assert found["versions"] == versions() and found["beta"] == 1.0 and found["processes"] == 1
    assert found["identity"].keys() == {"records", "model files", "template or image handling"}
    assert found["identity"] == resume.load_whole(resume.checkpoints(folder / "whole")[0])["identity"]
    assert shlex.split(found["command"]) == sys.argv
    assert "learning rate" in (folder / "whole" / "plots.svg").read_text()


def test_a_run_goes_on_with_other_versions(copied, monkeypatch):
    kept = copied / "run" / "config.json"
    monkeypatch.setattr(lifecycle, "versions", lambda: {"commit": "another"})
    assert train.main(command(copied, "run", "--resume", "--steps", "8")) == 0
    assert json.loads(kept.read_text())["versions"] == {"commit": "another"}


def test_an_earlier_run_is_not_replaced_unasked(copied, monkeypatch):
    before = weights(copied / "run")
    with pytest.raises(ValueError, match="holds checkpoint-7.pt of an earlier run: choose another --out"):
        train.main(command(copied, "run"))
    with pytest.raises(ValueError, match="which of them"):
        train.main(command(copied, "run", "--resume", "--overwrite"))
    assert weights(copied / "run") == before and (copied / "run" / "result.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(train.StopRequest, "asked", lambda self: self.close() or exec("raise KeyError"))
        with pytest.raises(KeyError):  # killed before its first checkpoint: nothing of the earlier run to resume
            train.main(command(copied, "run", "--overwrite"))
    with pytest.raises(ValueError, match="there is no"):
        train.main(command(copied, "run", "--resume"))
    assert not (copied / "run" / "result.json").exists()
    assert train.main(command(copied, "run", "--overwrite", "--steps", "1")) == 0
    assert train.main(command(copied, "run", "--resume", "--steps", "2")) == 0


def test_interrupted_before_the_first_step(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "load_model", interrupt)
    monkeypatch.setattr(sys, "argv", ["train.py", *command(folder, str(tmp_path))])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(HOME / "train.py"), run_name="__main__")
    assert ended.value.code == 1 and capsys.readouterr().err == "train.py: interrupted\n"


# ---- interrupted while it makes its pairs ------------------------------------------------------------------


@pytest.fixture
def making(monkeypatch):
    """Pairs of 12 scenes by a method without a model, 4 at a time. `chunks` notes the first scene of each chunk; at the
    chunk whose number is in `deaths` it dies so."""
    chunks, deaths = [], {}

    def quick_pairs(records, *, seed: int = 0):
        if how := deaths.pop(len(chunks), None):
            os.kill(os.getpid(), how) if isinstance(how, signal.Signals) else how()
        chunks.append(records[0]["id"])
        texts = {"chosen": f"A cup of {seed}.", "rejected": "A cat.", "rejected_image": None}
        return [record | texts for record in records[1:]], Counter({"the first": 1})

    for method in ("rank", "corrupt"):
        monkeypatch.setitem(METHODS, method, Method([quick_pairs]))
    monkeypatch.setattr(prepare, "make_pairs", functools.partial(make_pairs, batch_size=4))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    yield SimpleNamespace(chunks=chunks, deaths=deaths)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def tiny() -> tuple:
    model = load_llava(DEFAULT_MODEL)
    return training.Policy(model, model, None, None, 1.0), Processor(DEFAULT_MODEL)


def own(out: Path, *more: str) -> list[str]:
    return ["--loss", "dpo", "--out", str(out), "--scenes", "12", "--steps", "1", "--batch-size", "2", "--lora-rank", "4",
            "--eval-scenes", "0", *more]


def find(tiny, out: Path, *more: str) -> bytes:
    """Only the making of pairs; the file."""
    args = read_arguments(train.LOSSES, own(out, *more))
    prepare.find_records(args, train.LOSSES["dpo"], *tiny, 0, 1)
    return (out / "pairs.jsonl").read_bytes()


def names(chunks: int) -> list[str]:
    return [f"scene-{scenes.PAIRS + 4 * number}" for number in range(chunks)]


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]])
def test_interrupted_pairs_go_on_where_they_stopped(tiny, making, tmp_path, signals):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    whole, out = find(tiny, tmp_path / "whole"), tmp_path / "parts"
    assert whole.count(b"\n") == 9
    making.chunks.clear()
    making.deaths.update(enumerate(signals, 1))
    for _ in signals:
        with pytest.raises(SystemExit) as ended:  # a text is printed, and the status is 1
            find(tiny, out)
        assert ended.value.code == f"train.py: interrupted, the pairs made so far are kept; go on with --resume --out {out}"
    assert not (out / "pairs.jsonl").exists() and making.chunks == names(len(signals))
    check(read_arguments(train.LOSSES, own(out, "--resume")), train.LOSSES["dpo"], 1)
    with pytest.raises(BadInput, match="--resume: there is no checkpoint in"):
        check(read_arguments(train.LOSSES, own(out, "--resume", "--data", "given.jsonl")), train.LOSSES["dpo"], 1)
    assert find(tiny, out) == whole and making.chunks == names(3)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_other_settings_do_not_take_over_the_parts(tiny, making, tmp_path):
    """Nor another model in the same folder."""
    shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    making.deaths[2] = signal.SIGINT
    with pytest.raises(SystemExit):
        find(tiny, tmp_path, "--model", str(tmp_path / "model"))
    for more in (["--seed", "1"], ["--scenes", "11"], ["--pairs", "corrupt"], ["--precision", "bf16"]):
        with pytest.raises(BadInput, match="pairs.jsonl.part-0: is of a run with other settings or records"):
            find(tiny, tmp_path, "--model", str(tmp_path / "model"), *more)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(BadInput, match="other settings"):
        find(tiny, tmp_path, "--model", str(tmp_path / "model"))
    assert making.chunks == names(2)


def test_a_run_interrupted_in_its_pairs_is_resumed(making, tmp_path):
    """Not the earlier one that it was to replace, whose checkpoint is still there."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train.main(own(whole)) == 0 and train.main(own(out, "--seed", "1")) == 0
    making.chunks.clear()
    making.deaths[2] = signal.SIGTERM
    with pytest.raises(SystemExit):
        train.main(own(out, "--overwrite"))
    assert resume.checkpoints(out) and train.main(own(out, "--resume")) == 0 and making.chunks == names(3)
    assert (out / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert weights(out) == weights(whole) and lines(out) == lines(whole) and not parts(out / "pairs.jsonl")
    assert train.main(own(out, "--resume", "--steps", "2")) == 0 and making.chunks == names(3)
    with pytest.raises(BadInput, match="--resume: there is no checkpoint in"):
        train.main(own(tmp_path / "new", "--resume"))


def test_pairs_go_on_after_a_crash_by_themselves(making, tmp_path, monkeypatch):
    """Under torchrun --max-restarts, which repeats --overwrite: a crash in the pairs, and one before the first checkpoint.
    What an earlier run made is not among them."""
    def crash(*_):
        raise Killed

    def attempt(number: int, *more: str) -> int:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        return train.main(own(tmp_path, *more))

    making.deaths |= {1: crash, 2: crash}
    with pytest.raises(Killed):
        attempt(0, "--seed", "1")
    with pytest.raises(Killed):
        attempt(0, "--overwrite")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "begin", crash)
        attempt(1, "--overwrite")
    assert making.chunks[1:] == names(3) and parts(tmp_path / "pairs.jsonl")
    assert attempt(2, "--overwrite") == 0 and making.chunks[1:] == names(3)
    assert not list(tmp_path.glob(".*")) and not parts(tmp_path / "pairs.jsonl")


def test_places_that_cannot_be_written_are_named_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    (tmp_path / "file").write_text("")
    for more in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "file" / "below")],
                 ["--out", str(tmp_path / "out"), "--reference-cache", str(tmp_path / "file" / "cache")]):
        with pytest.raises(ValueError, match="file.*: cannot write into this folder"):
            train.main(command(folder, "unused", *more))
    with pytest.raises(BadInput, match="^--reference-cache .*: is a folder, a file is wanted$"):
        train.main(command(folder, "unused", "--out", str(tmp_path / "out"), "--reference-cache", str(tmp_path)))


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", train.LOSSES)
def test_every_number_has_a_range_that_holds_its_default(loss):
    args = read_arguments(train.LOSSES, ["--loss", loss])
    for model in (DEFAULT_MODEL, "elsewhere"):
        checked = read_arguments(train.LOSSES, ["--loss", loss, "--model", str(model)])
        check_ranges(vars(checked), RANGES, *train.LOSSES[loss].functions)
    named = {option.rpartition(".")[2] for options in RANGES.values() for option in options.split()}
    assert {name for name, value in vars(args).items() if type(value) in (int, float)} <= named


def test_a_new_loss_needs_no_range(monkeypatch):
    """A researcher's own option is taken as it is, but for what is no number."""
    def own_loss(policy_chosen_logps, *, tau: float = -3.0):
        return policy_chosen_logps, {}

    monkeypatch.setitem(train.LOSSES, "own", train.Recipe(own_loss, {}, "rank"))
    own = train.LOSSES["own"]
    check(read_arguments(train.LOSSES, ["--loss", "own", "--tau", "-7"]), own, 1)
    with pytest.raises(ValueError, match="--tau must be in"):
        check(read_arguments(train.LOSSES, ["--loss", "own", "--tau", "nan"]), own, 1)


IMPOSSIBLE = [
    *(f"dpo --beta {value}" for value in (-1, 0, "nan", "inf")),
    *(f"dpo --lr {value}" for value in (0, -0.001, "nan")),
    *(f"dpo --warmup {value}" for value in (1, -0.1, 20)),
    *(f"dpo --seed {value}" for value in (-1, 10**20)),
    *(f"dpo --steps {value}" for value in (0, 10**20)),
    "dpo --weight-decay -1", "dpo --clip-norm 0", "dpo --lora-dropout 1", "dpo --lora-rank -1",
    "dpo --lora-alpha 0", "dpo --workers -1", "dpo --scenes 0", "dpo --eval-scenes -1", "dpo --micro-batch-size 0",
    "dpo --label-smoothing 0.5", "povid --gamma 1.5", "dpo_weighted --gamma 0", "slic_hf --delta -1",
    "mdpo --delta nan", "reward_model --centring-weight -1", "ppo --samples 0", "ppo --temperature 0",
    "ppo --max-new-tokens 0", "ppo --inner-epochs 0", "ppo --clip 0", "ppo --kl-coef -1", "ppo --lam 1.1",
    "ppo --kl-target nan", "rloo --samples 1", "online_dpo --samples 1", "mixed_dpo --offline 2",
    "bdhs_online --rho-th 2", "bdhs_online --iterations 0", "fisao --margin -1",
]


@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_impossible_numbers_are_refused(options):
    loss, option, value = options.split()
    judge = ["--judge", "clip"] if loss in ("ppo", "rloo") else []
    with pytest.raises(ValueError, match=f"^{option} must be in "):
        check(read_arguments(train.LOSSES, ["--loss", loss, option, value, *judge]), train.LOSSES[loss], 1)


@pytest.mark.parametrize("options", [
    "dpo --clip-norm inf", "ppo --value-clip inf", "rloo --clip 0", "mdpo --delta -1",
    "bdhs_online --temperature 0", "dpo --lora-rank 0", "dpo_weighted --gamma 5",
])
def test_what_has_a_meaning_is_allowed(options):
    loss, option, value = options.split()
    judge = ["--judge", "clip"] if loss in ("ppo", "rloo") else []
    check(read_arguments(train.LOSSES, ["--loss", loss, option, value, *judge]), train.LOSSES[loss], 1)


@pytest.mark.parametrize("bf16, amx, slow", [(False, False, True), (True, False, False), (False, True, False)])
def test_slow_bf16_is_known(monkeypatch, bf16, amx, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert training.emulates_bf16(torch.device("cpu")) == slow and not training.emulates_bf16(torch.device("cuda"))


def test_slow_bf16_is_said_in_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "emulates_bf16", lambda device: True)
    short = command(folder, str(tmp_path / "run"), "--steps", "1")
    assert train.main([*short, "--precision", "fp32"]) == 0
    assert "bf16" not in capsys.readouterr().err
    assert train.main([*short, "--precision", "bf16", "--overwrite"]) == 0
    assert "warning: this CPU has no bf16 instructions" in capsys.readouterr().err
