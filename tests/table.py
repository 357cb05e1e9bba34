"""A policy that is a table: what it says of a token depends on the token alone, so steps can be checked on paper.

    token       a      dog    two    cats   hot    </s>
    log pi     -1     -1     -2     -1     -1     -1
    log pi_ref -1.5   -0.5   -2     -3     -1     -2
    V          -3     -0.3   -1.4   -4      0     -1.5     of the state before the token
"""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import reinforce
import train
from data.batch import Batch
from data.order import Drawn
from data.processor import Processor
from judges.scores import Score
from model.logprobs import Packed
from model.training import Policy, pick
from model.views import View
from options import read_arguments

WORDS = ["<image>", "<s>", "a", "dog", "two", "cats", "hot", "</s>"]
A, DOG, TWO, CATS, HOT, EOS = range(2, 8)
LOGPS = [0.0, 0.0, -1.0, -1.0, -2.0, -1.0, -1.0, -1.0]
REFERENCE = [0.0, 0.0, -1.5, -0.5, -2.0, -3.0, -1.0, -2.0]
VALUES = [0.0, 0.0, -3.0, -0.3, -1.4, -4.0, 0.0, -1.5]


class Words:
    """Stands for data.processor.Processor: one token a word, pictures of one grey pixel."""

    image_id, eos_id, patches, window = WORDS.index("<image>"), EOS, 1, 100

    show, questions = Processor.show, Processor.questions

    def image_tokens(self, reference: str, root=None) -> int:
        return 1

    def image(self, reference: str, root=None) -> View:
        return View(torch.zeros(1, 3, 1, 1), torch.tensor([0]))

    def prompt(self, text: str, count: tuple = (1,)) -> list[int]:
        return [1, *[self.image_id] * sum(count)]

    def question(self, text: str) -> tuple[int, ...]:
        return ()

    def response(self, text: str) -> list[int]:
        return [*map(WORDS.index, text.split()), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        return " ".join(WORDS[i] for i in ids if i != self.eos_id)


class Table(nn.Module):
    """Stands for model.logprobs.Scorer: packed sequences -> token log-probs, mask and a critic's values (N, L)."""

    def __init__(self, critic: bool = False):
        super().__init__()
        self.logps = nn.Parameter(torch.tensor(LOGPS))
        self.values = nn.Parameter(torch.tensor(VALUES)) if critic else None
        self.model = SimpleNamespace(device=torch.device("cpu"), seen=lambda pixels: pixels,
                                     train=lambda mode=True: None, eval=lambda: None)
        self.calls: list[list[int]] = []  # the lengths that were scored

    def forward(self, packed: Packed, features: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(packed.lengths)
        labels = packed.labels.split(packed.lengths)
        columns = [self.logps] + ([] if self.values is None else [self.values])
        logps, *values = (pad_sequence([column[row] for row in labels], batch_first=True) for column in columns)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in labels], batch_first=True)
        return logps, mask, *values

    @contextmanager
    def reference(self):
        """Stands for model.lora.Reference."""
        policy, self.logps.data = self.logps.data, torch.tensor(REFERENCE)
        with torch.no_grad():
            yield
        self.logps.data = policy


def size(batch: Batch | list) -> int:
    """Records of a micro-batch, or of what a loss that samples starts from."""
    return len(batch.ids) if isinstance(batch, Batch) else len(batch)


def make_run(loss: str, *options: str, judges: dict | None = None, memory: reinforce.Memory | None = None,
             rate: float = 1.0) -> train.Run:
    """train.py's Run around a table, with plain gradient descent for an optimiser."""
    args = read_arguments(train.LOSSES, ["--loss", loss, "--clip-norm", "1000", "--lr", str(rate), *options])
    recipe = train.LOSSES[loss]
    table = Table(critic=loss in ("ppo", "fisao"))
    policy = Policy(table.model, table, table.reference, torch.optim.SGD(table.parameters(), lr=rate), args.clip_norm)
    run = train.Run(args, recipe, policy, Words(), [], None, table.model.device, judges=judges or {})
    run.learner = train.make_learner(run) if recipe.advantages else None
    if memory:
        run.learner.memory = memory
    return run


def one_step(monkeypatch, folder: Path, run: train.Run, *batches: Batch, batch_size: int | None = None,
             ) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Let `train` do one step on these micro-batches, the whole batch unless told otherwise. Returns what the loss
    could ask for in the last of them, and the log line."""
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(train, "load_micro_batches", lambda run, done: iter([[Drawn(batch, []) for batch in batches]]))
    monkeypatch.setattr(train, "write_batch", lambda run, batch: batch)
    monkeypatch.setattr(train, "pick", lambda loss, inputs: seen.update(inputs) or pick(loss, inputs))
    for name, value in dict(steps=1, batch_size=batch_size or sum(map(size, batches)), micro_batch_size=1, out=folder).items():
        setattr(run.args, name, value)
    assert train.train(run)
    return seen, json.loads((folder / "metrics.jsonl").read_text())


class Notes:
    """Stands for model.log.Log: keeps what it is given."""

    def __init__(self):
        self.added: list[dict] = []

    def add(self, metrics: dict, *_) -> None:
        self.added.append(metrics)


def judge(scores: dict[tuple[str, str], float]):
    """A judge that gives each (record's id, text) its score."""
    return lambda records, answers: [[Score(scores[record["id"], text]) for text in texts]
                                     for record, texts in zip(records, answers, strict=True)]


def records(*ids: str) -> list[dict]:
    """Image records; record "r0" shows picture "v0"."""
    return [{"id": i, "image": i.replace("r", "v"), "prompt": "?"} for i in ids]


def by_token(values: Tensor, **expected: float) -> None:
    """The numbers of a table's tokens; those not named are 0."""
    named = torch.zeros(len(WORDS))
    for word, value in expected.items():
        named[WORDS.index(word if word in WORDS else "</s>")] = value
    torch.testing.assert_close(values.detach(), named, rtol=0, atol=2e-6)
