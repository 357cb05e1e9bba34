"""Which records meet in a batch, a process and a micro-batch; that the step does not depend on how they are cut; rates."""

import random

import pytest
import table
import torch
from table import CATS, DOG, HOT, TWO, A, by_token, make_run, one_step, records
from torch import nn

import train
from common import BadInput
from data.batch import BadRecord, collate, tokens_of
from data.order import MicroBatches, dealt, filled
from data.processor import Processor
from losses import adavip, lpoi
from model.checkpoint import DEFAULT_MODEL
from model.training import learning_rate, parameter_groups, set_learning_rate
from options import check, read_arguments

NAMES = [{"id": i} for i in range(42)]
LENGTHS = [random.Random(i).randrange(10, 100) for i in range(42)]


def ids_of(rows: list[dict], seeds: list[int] | None = None) -> list[int]:
    return [row["id"] for row in rows]


def batches(rank: int = 0, world: int = 1, **more) -> MicroBatches:
    return MicroBatches(NAMES, **{**dict(batch_size=4, micro_batch_size=4 // world, rank=rank, world=world, seed=3,
                                         steps=63, make=ids_of, lengths=LENGTHS), **more})


def steps_of(*processes: MicroBatches, first: int = 0) -> list[list[list[int]]]:
    """[step][micro-batch, of process after process] ids."""
    return [[part[step, i].batch for part in processes for i in range(len(part.parts(step)))]
            for step in range(first, 63)]


# ---- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"group_by_length": True}, {"max_tokens": 150, "group_by_length": True}])
def test_each_epoch_is_a_permutation_and_depends_on_the_step_alone(more):
    """42 records in batches of 4: an epoch ends in the middle of a batch. A run that starts at a later step sees the
    same."""
    whole = steps_of(batches(**more))
    flat = [sorted(i for part in step for i in part) for step in whole]
    assert [len(step) for step in flat] == [4] * 63
    plan = batches(**more)
    for epoch in range(6):
        assert sorted(plan.row(place) for place in range(42 * epoch, 42 * epoch + 42)) == list(range(42))
    assert flat == [sorted(plan.row(place) for place in range(4 * s, 4 * s + 4)) for s in range(63)]
    assert steps_of(batches(**more), first=17) == whole[17:]
    assert [*batches(**more).keys(60)] == [key for key in batches(**more).keys() if key[0] >= 60]
    assert whole != steps_of(batches(**more, seed=4))


def test_grouped_batches_are_of_similar_lengths_and_in_no_order():
    """Within a batch the lengths differ by a fraction of what they do without grouping; batches do not get longer."""
    def spreads(more: dict) -> tuple[float, list[float]]:
        lengths = [[LENGTHS[i] for part in step for i in part] for step in steps_of(batches(**more))]
        return sum(max(x) - min(x) for x in lengths) / 63, [sum(x) for x in lengths[:10]]

    plain, grouped = spreads({}), spreads({"group_by_length": True})
    assert grouped[0] < plain[0] / 3
    assert grouped[1] != sorted(grouped[1]) and grouped[1] != sorted(grouped[1], reverse=True)


def test_lengths_are_grouped_within_windows(monkeypatch):
    """With windows of two batches only eight consecutive records of the shuffled order are sorted together."""
    monkeypatch.setattr("data.order.WINDOW", 2)
    plain, plan = batches(), batches(group_by_length=True)
    for first, last in ((0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 42), (42, 44), (44, 52)):
        assert sorted(map(plan.row, range(first, last))) == sorted(map(plain.row, range(first, last)))


# ---- processes and micro-batches ---------------------------------------------------------------------------


def test_processes_get_equally_many_records_and_about_as_many_tokens():
    more = dict(batch_size=12, micro_batch_size=4, world=3, steps=21)
    shares = [batches(rank, **more) for rank in range(3)]
    plain = [batches(rank, **more, lengths=None) for rank in range(3)]

    def gap(parts: list[MicroBatches], step: int) -> int:
        tokens = [sum(LENGTHS[i] for i in part[step, 0].batch) for part in parts]
        return max(tokens) - min(tokens)

    for step in range(21):
        found = [share[step, 0].batch for share in shares]
        assert [len(ids) for ids in found] == [4, 4, 4]
        assert sorted(sum(found, [])) == sorted(sum((part[step, 0].batch for part in plain), []))
    assert sum(gap(shares, s) for s in range(21)) < sum(gap(plain, s) for s in range(21)) / 3
    assert dealt([1, 2, 3, 4, 5, 6], 2) == [[1, 4, 5], [2, 3, 6]]


def test_micro_batches_are_filled_up_to_the_limit():
    """Lengths 9 7 5 3 1 up to 12: 9 | 7 5 | 3 1. The same records in three, then in four parts: the largest is halved."""
    length = [1, 3, 5, 7, 9].__getitem__
    assert filled([4, 3, 2, 1, 0], length, 12) == [[4], [3, 2], [1, 0]]
    assert filled([4, 3, 2, 1, 0], length, 12, at_least=4) == [[4], [3], [2], [1, 0]]
    assert filled([4, 3, 2, 1, 0], length, 25) == [[4, 3, 2, 1, 0]]


@pytest.mark.parametrize("world", [1, 2])
def test_with_max_tokens_no_micro_batch_has_more_and_processes_have_equally_many(world):
    """As few as the limit allows one of the processes; the global batches are those of a fixed size."""
    more = dict(batch_size=8, micro_batch_size=None, max_tokens=130, steps=21)
    shares, plain = [batches(rank, world, **more) for rank in range(world)], batches(batch_size=8, micro_batch_size=8)
    counts = []
    for step in range(21):
        parts = [[share[step, i].batch for i in range(len(share.parts(step)))] for share in shares]
        assert max(sum(LENGTHS[i] for i in part) for share in parts for part in share) <= 130
        assert sorted(i for share in parts for part in share for i in part) == sorted(plain[step, 0].batch)
        assert len({len(share) for share in parts}) == 1
        counts.append(len(parts[0]))
    assert len(set(counts)) > 1


def test_a_replacement_is_no_longer_than_what_it_replaces():
    """Every third record is bad; where all shorter ones are, the shortest that is left comes in."""
    def make(rows: list[dict], seeds: list[int]) -> list[int]:
        for row in rows:
            if row["id"] % 3 == 0 or LENGTHS[row["id"]] < 20:
                raise BadRecord(row["id"], "damaged")
        return ids_of(rows)

    plan = batches(batch_size=1, micro_batch_size=None, max_tokens=100, make=make, skip=True)
    good = [n for i, n in enumerate(LENGTHS) if i % 3 and n >= 20]
    for step in range(63):
        own, (found,) = plan.row(step), plan[step, 0].batch
        assert LENGTHS[found] <= max(LENGTHS[own], min(good))


@pytest.mark.parametrize("sequences", [adavip.SEQUENCES, lpoi.SEQUENCES], ids=["adavip", "lpoi"])
def test_tokens_of_a_record_are_those_of_its_batch(sequences):
    """Of AdaViP's three sequences with two images, LPOI's six with five; with and without the repeated end token."""
    processor = Processor(DEFAULT_MODEL)
    record = dict(id="a", image="scene:7", rejected_image="scene:8", prompt="What is there?", chosen="a dog and a cup.",
                  rejected="a dog.")
    for more in ({}, {"rejected_image": "scene:7"}, {"rejected": record["chosen"]}):
        for end in (False, True):
            row = record | more
            expected = len(collate([row], sequences, processor, end=end).packed.ids)
            assert tokens_of(row, sequences, processor, end=end) == expected
            blank = collate([row], sequences, processor, end=end, blank=True)
            assert len(blank.packed.ids) == expected and blank.pixels.device.type == "meta"
    for count in (tokens_of, lambda row, *inputs: collate([row], *inputs)):
        with pytest.raises(BadRecord, match="record 'a': .*</s>"):
            count({**record, "chosen": "a dog</s>."}, sequences, processor)


# ---- the step ----------------------------------------------------------------------------------------------

PAIRS = [([A], [DOG], 1.0), ([TWO], [CATS, HOT], 0.0), ([CATS, A], [A], 1.0), ([HOT], [TWO], 0.0), ([DOG], [A, A], 1.0),
         ([A, TWO], [DOG], 1.0), ([HOT, DOG], [CATS], 0.0), ([CATS], [HOT], 1.0)]


def step_of(monkeypatch, folder, *groups: list[int], loss: str = "dpo", world: int = 1) -> tuple[torch.Tensor, dict]:
    """(what a step with rate 1 takes off the table's log-probs, the log line), of these pairs in micro-batches."""
    run = make_run(loss, "--batch-size", "8")
    run.world = world
    made = []
    for group in groups:
        rows = [record | dict(zip(("chosen", "rejected", "weight"), PAIRS[i]))
                for i, record in zip(group, records(*(f"r{i}" for i in group)))]
        made.append(collate(rows, run.recipe.sequences, table.Words()))
    before = run.policy.plain.logps.detach().clone()
    _, line = one_step(monkeypatch, folder, run, *made, batch_size=8)
    return before - run.policy.plain.logps.detach(), line


@pytest.mark.parametrize("loss", ["dpo", "sft", "dpo_weighted"])
def test_the_step_does_not_depend_on_the_micro_batches(monkeypatch, tmp_path, loss):
    """Eight pairs of unequal lengths, three of them of weight 0: whole, in two, in four, one by one, unequal parts."""
    cuts = ([[*range(8)]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[i] for i in range(8)],
            [[0, 1, 2, 3, 4], [5], [6, 7]])
    found = [step_of(monkeypatch, tmp_path / str(i), *cut, loss=loss) for i, cut in enumerate(cuts)]
    assert found[0][0].abs().max() > 0.05
    for gradient, line in found[1:]:
        torch.testing.assert_close(gradient, found[0][0], rtol=0, atol=1e-6)
        assert line["loss"] == pytest.approx(found[0][1]["loss"]) and line["used"] == pytest.approx(5 / 8)


def test_the_step_does_not_depend_on_the_processes(monkeypatch, tmp_path):
    """Four of the eight pairs each, in one and in three micro-batches, one with three useful pairs and one with two:
    the mean of their gradients, which DDP takes, is that of one process."""
    whole, _ = step_of(monkeypatch, tmp_path, [*range(8)])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda rows, mine: [row.copy_(mine) for row in rows])
    shares = [step_of(monkeypatch, tmp_path, [0, 1, 2, 4], world=2)[0],
              step_of(monkeypatch, tmp_path, [3], [5, 6], [7], world=2)[0]]
    torch.testing.assert_close(sum(shares) / 2, whole, rtol=0, atol=1e-6)


def test_a_pair_counts_the_same_whatever_its_neighbours_are(monkeypatch, tmp_path):
    """The mean is over all records: one useful pair of eight has an eighth of its own gradient. beta 1, margin 1:
    sigma(-1) = .2689 to a, the opposite to dog."""
    monkeypatch.setitem(globals(), "PAIRS", [PAIRS[0]] + [([HOT], [TWO], 0.0)] * 7)
    gradient, _ = step_of(monkeypatch, tmp_path, [*range(8)])
    share = torch.tensor(-1.0).sigmoid().item() / 8
    by_token(-gradient, a=share, dog=-share)


# ---- rates -------------------------------------------------------------------------------------------------


def test_schedules():
    """Two steps of warm-up, four after it: what is left of the way, none of it, all of it."""
    def rates(name: str) -> list[float]:
        return [learning_rate(8.0, step, 6, 2, name) for step in range(6)]

    assert rates("linear") == [4, 8, 8, 6, 4, 2]
    assert rates("constant") == [4, 8, 8, 8, 8, 8]
    assert rates("cosine") == pytest.approx([4, 8, 8, 4 + 2 * 2**0.5, 4, 4 - 2 * 2**0.5])


def test_each_part_has_its_own_rate():
    """Of what trains only; a name counts as a whole; the groups keep their ratio at every step."""
    module = nn.ModuleDict({"model": nn.ModuleDict({"tower": nn.Linear(1, 2), "towers": nn.Linear(1, 3),
                                                    "frozen": nn.Linear(1, 4)}), "head": nn.Linear(1, 5)})
    module["model"]["frozen"].requires_grad_(False)
    groups = parameter_groups(module, {"tower": 10.0, "head": 0.5})
    assert {g["ratio"]: sorted({len(p) for p in g["params"]}) for g in groups} == {10.0: [2], 1.0: [3], 0.5: [5]}
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.125, 0.25, 2.5]


@pytest.mark.parametrize("options, complaint", [
    (["--max-tokens", "900", "--micro-batch-size", "2"], "by tokens, --micro-batch-size by records: which"),
    (["--loss", "online_dpo", "--max-tokens", "900"], "--max-tokens: how long the samples of online_dpo"),
    (["--loss", "rloo", "--reward", "x", "--group-by-length"], "--group-by-length: how long the samples"),
    (["--projector-lr", "1e-5"], "--projector-lr: the projector does not train"),
    (["--vision-lr", "1e-5"], "--vision-lr: the vision tower does not train"),
    (["--max-tokens", "900", "--batch-size", "15"], "--batch-size 15 is not a multiple of 2 processes"),
    (["--estimate"], "--estimate counts the tokens of your records"),
    (["--max-tokens", "0"], "--max-tokens must be in"),
])
def test_settings_that_cannot_be(options, complaint):
    args = read_arguments(train.LOSSES, ["--loss", "dpo", *options])
    with pytest.raises(BadInput, match=complaint):
        check(args, train.LOSSES[args.loss], 2)
