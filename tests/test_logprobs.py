"""The scoring core against its definition: one sequence at a time, full logits (`naive_logprobs`).

All models are the small random one with LoRA on every decoder layer (B not zero, so that adapters matter).
"""

import copy

import pytest
import small
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model.llama as llama
import model.logprobs as logprobs
from data.batch import scored
from losses.adavip import SEQUENCES as ADAVIP
from losses.dpo import SEQUENCES as DPO
from losses.dpo import dpo_loss
from losses.rdpo import SEQUENCES as RDPO
from losses.rdpo import SEQUENCES_RELEASED as RDPO_RELEASED
from losses.sft import SEQUENCES as SFT
from model.logprobs import Scorer, SelectedLogProbs, Sequence, naive_logprobs, pack
from model.lora import Reference, add_lora, lora_layers
from model.views import stack

EOS = 2
PROMPTS = (small.prompt(7, 8, 9), small.prompt(11), small.prompt(12, 13, 14, 15))
RECORDS = (  # ragged lengths, a single token, two records with the same picture and prompt
    dict(image=0, rejected_image=1, prompt=0, chosen=(20, 21, 22, EOS), rejected=(20, 23, EOS)),
    dict(image=2, rejected_image=3, prompt=1, chosen=(EOS,), rejected=(30, 31, 32, 33, 34, 35, EOS)),
    dict(image=0, rejected_image=3, prompt=0, chosen=(40, 41, 42, 43, 44, EOS), rejected=(45,)),
    dict(image=1, rejected_image=0, prompt=2, chosen=(20, 21, 22, EOS), rejected=(20, 21, 22, 24)),
)


def sequences_of(loss: dict[str, dict]) -> list[Sequence]:
    """The sequences a loss asks for, name after name, as data/batch.py lays them out."""
    return [
        Sequence(r[how.image], PROMPTS[r["prompt"]], r[how.response], how.tokens == "best_other")
        for how in scored(loss).values()
        for r in RECORDS
    ]


FIVE = [Sequence(1, PROMPTS[0], r) for r in ((5, 6, 7, 8, 9), (10,), (11, 12), (13, 14, 15), (5, 6, 7, 8, 3))]
SETS = {
    "sft": sequences_of(SFT),
    "dpo": sequences_of(DPO),
    "rdpo": sequences_of(RDPO),
    "rdpo released": sequences_of(RDPO_RELEASED),
    "adavip": sequences_of(ADAVIP),
    "five responses": FIVE,
    "one token": [Sequence(0, PROMPTS[1], (9,))],
    "mixed": [*sequences_of(RDPO_RELEASED), *FIVE, Sequence(3, (1, *[small.IMAGE_TOKEN] * 9, 4), (8, 9))],
}
TRAINS = {
    "lora": (),
    "lora, projector": ("multi_modal_projector",),
    "lora, projector, head, embeddings": ("multi_modal_projector", "lm_head", "embed_tokens"),
}


def trainable(model, parts: tuple[str, ...] = ("multi_modal_projector",)):
    """LoRA with visible B, and the named parts unfrozen."""
    model.requires_grad_(False)
    add_lora(model.language_model.model, rank=3, alpha=6.0)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    for name, parameter in model.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(True)
    return model


@pytest.fixture
def policy(model):
    return trainable(model)


def features_of(model, views) -> torch.Tensor:
    """Patch features of all tiles."""
    return model.vision_features(stack(views, small.PATCHES)[0])


def packed_of(sequences, views) -> logprobs.Packed:
    """The sequences laid out with their pictures."""
    return pack(sequences, stack(views, small.PATCHES)[1], small.IMAGE_TOKEN)


def score(model, sequences, views, **options) -> list[torch.Tensor]:
    """Token log-probs of each sequence from the scoring core."""
    logps, mask = Scorer(model, **options)(packed_of(sequences, views), features_of(model, views))
    return [row[keep] for row, keep in zip(logps, mask)]


def gradients(model, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of a fixed random weighting of all token log-probs, by parameter."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    sum((row * torch.randn(row.shape, generator=generator)).sum() for row in rows).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    """Values within `tolerance`, gradients within `tolerance` of each parameter's largest gradient."""
    (rows, grads), (rows_expected, grads_expected) = actual, expected
    for row, row_expected in zip(rows, rows_expected, strict=True):
        torch.testing.assert_close(row, row_expected, rtol=0, atol=tolerance)
    assert grads.keys() == grads_expected.keys()
    for name, grad in grads_expected.items():
        scale = grad.abs().max().item()
        assert scale > 0, f"{name} gets no gradient"
        torch.testing.assert_close(
            grads[name], grad, rtol=0, atol=tolerance * scale, msg=lambda message: f"{name}: {message}"
        )


def both(model, rows) -> tuple:
    return [r.detach() for r in rows], gradients(model, rows)


# --------------------------------------------------------------------------------------------- equal to naive


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("name", SETS)
def test_equals_naive(model, views, name, trains):
    """Values and gradients of everything that trains, for the sequences of each loss."""
    trainable(model, TRAINS[trains])
    expected = both(model, naive_logprobs(model, SETS[name], views))
    assert_same(both(model, score(model, SETS[name], views)), expected)


def test_padding_is_zero_and_masked(policy, views):
    logps, mask = Scorer(policy)(packed_of(SETS["dpo"], views), features_of(policy, views))
    assert logps.shape == mask.shape == (8, 7) and logps.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(s.response) for s in SETS["dpo"]]
    assert (logps[~mask] == 0).all() and (logps[mask] < 0).all()


def test_packed_equals_one_at_a_time(policy, views):
    expected = both(policy, [score(policy, [s], views)[0] for s in SETS["mixed"]])
    assert_same(both(policy, score(policy, SETS["mixed"], views)), expected)


def test_shared_prefix_equals_unshared(policy, views):
    """A copy of the picture for every sequence leaves nothing to share."""
    sequences = SETS["mixed"]
    assert len(packed_of(sequences, views).prefixes) == 8 < len(sequences)
    copies = [views[s.image] for s in sequences]
    apart = [s._replace(image=i) for i, s in enumerate(sequences)]
    assert len(packed_of(apart, copies).prefixes) == len(sequences)
    expected = both(policy, score(policy, apart, copies))
    assert_same(both(policy, score(policy, sequences, views)), expected)


def test_a_prompt_that_ends_in_its_picture(policy, views):
    """Its last image token is packed behind the other prefixes and must still get its own picture's features."""
    sequences = [Sequence(image, small.prompt(), (3, 4)) for image in (0, 1)]
    expected = both(policy, naive_logprobs(policy, sequences, views))
    assert_same(both(policy, score(policy, sequences, views)), expected)


def test_each_picture_is_projected_once(policy, views):
    """Four pictures shown by eight prefixes: 4 x 9 rows go through the projector; slots were found while packing."""
    seen = []
    policy.multi_modal_projector.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[:2])))
    packed = packed_of(SETS["mixed"], views)
    score(policy, SETS["mixed"], views)
    assert seen == [(4, small.PATCHES)] and len(packed.prefixes) == 8
    assert torch.equal(packed.slots.sort().values, (packed.ids == small.IMAGE_TOKEN).nonzero()[:, 0])


def test_order_of_sequences_does_not_matter(policy, views):
    sequences = SETS["mixed"]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(2)).tolist()
    expected = score(policy, sequences, views)
    shuffled = score(policy, [sequences[i] for i in order], views)
    for i, row in zip(order, shuffled):
        torch.testing.assert_close(row, expected[i], rtol=0, atol=1e-5)


def test_responses_do_not_see_each_other(policy, views):
    """Changing one response leaves its siblings bit for bit as they were; changing the prompt does not."""
    four = FIVE[:4]  # the fifth has the inputs of the first, which are computed once for both
    before = score(policy, four, views)
    changed = [FIVE[0]._replace(response=(50, 51, 52, 53, 54)), *four[1:]]
    after = score(policy, changed, views)
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:]))
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    elsewhere = score(policy, [s._replace(prompt=small.prompt(7, 3, 9)) for s in four], views)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, elsewhere))


@pytest.mark.parametrize("part", [5, 1000])
def test_activation_checkpointing_changes_nothing(policy, views, monkeypatch, part):
    monkeypatch.setattr(llama, "PART", part)
    expected = both(policy, score(policy, SETS["mixed"], views))
    policy.language_model.model.checkpointing = True
    assert_same(both(policy, score(policy, SETS["mixed"], views)), expected)


@pytest.mark.parametrize("part", [5, 1000])
def test_activation_checkpointing_replays_dropout(model, views, monkeypatch, part):
    """The recomputed forward must draw the dropout masks of the first one."""
    model.requires_grad_(False)
    add_lora(model.language_model.model, rank=3, alpha=6.0, dropout=0.4)
    for layer in lora_layers(model).values():
        torch.nn.init.constant_(layer.lora_B, 0.1)
    model.train()
    monkeypatch.setattr(llama, "PART", part)
    model.language_model.model.checkpointing = True
    torch.manual_seed(7)
    recomputed = both(model, score(model, SETS["dpo"], views))
    monkeypatch.setattr(llama, "checkpoint", lambda function, *args, **_: function(*args))  # the same, kept
    torch.manual_seed(7)
    assert_same(recomputed, both(model, score(model, SETS["dpo"], views)), 1e-7)


class BaseProducts(TorchDispatchMode):
    """Counts the rows that frozen weights of some shapes are multiplied with in LoRA layers, forward."""

    def __init__(self, **shapes: tuple[int, int]):
        super().__init__()
        self.shapes, self.rows = shapes, dict.fromkeys(shapes, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for name, shape in self.shapes.items():
            if function is torch.ops.aten.addmm_.default and args[2].shape == shape:
                self.rows[name] += len(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("part", [1, 5, 1000])
def test_activation_checkpointing_recomputes_once(policy, views, monkeypatch, part, autocast):
    """However many parts the MLP has: up and gate twice, down once, as the backward needs none of its results."""
    monkeypatch.setattr(llama, "PART", part)
    policy.language_model.model.checkpointing = True
    D, F = policy.config.text.hidden_size, policy.config.text.intermediate_size
    with BaseProducts(up=(D, F), down=(F, D)) as counter:
        both(policy, score(policy, SETS["mixed"], views, autocast=autocast))
    packed = packed_of(SETS["mixed"], views)
    tokens = 2 * len(packed.ids) + len(packed.ids) - packed.attend.skip  # in three layers, the last without bodies
    assert counter.rows == {"up": 2 * 2 * tokens, "down": tokens}


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_chunking_changes_nothing(model, views, monkeypatch, rows):
    """Chunks of 1, 2 and 5 tokens, the head's own gradient included."""
    trainable(model, TRAINS["lora, projector, head, embeddings"])
    expected = both(model, score(model, SETS["mixed"], views))
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", rows * small.VOCAB + 1)
    assert_same(both(model, score(model, SETS["mixed"], views)), expected)


def test_competitor_is_the_best_other_token(policy, views):
    """Never the label itself; larger than the label's log-prob wherever the label is not the best token."""
    plain = SETS["dpo"]
    rivals = [s._replace(competitor=True) for s in plain]
    for s, own, rival in zip(plain, score(policy, plain, views), score(policy, rivals, views)):
        ids = torch.tensor(s.prompt + s.response)
        with torch.no_grad():
            logits = policy.logits(ids[:-1], views[s.image].pixels)[len(s.prompt) - 1 :]
        best = logits.log_softmax(-1)
        others = best.scatter(1, torch.tensor(s.response)[:, None], -torch.inf).amax(1)
        torch.testing.assert_close(rival, others, rtol=0, atol=1e-5)
        assert (own != rival).all()


def test_scoring_leaves_the_batch_as_it_was(policy, views):
    """Policy and reference score the same packed batch, and each picks its own competitors."""
    packed, reference = packed_of(SETS["rdpo released"], views), Reference(policy)
    features, labels = features_of(policy, views), packed.labels.clone()
    first = Scorer(policy)(packed, features)[0]
    with reference():
        inside = Scorer(policy)(packed, features)[0]
    assert torch.equal(packed.labels, labels) and torch.equal(Scorer(policy)(packed, features)[0], first)
    with reference():
        expected = naive_logprobs(policy, SETS["rdpo released"], views)
    for row, row_expected in zip(inside, expected):
        torch.testing.assert_close(row[: len(row_expected)], row_expected, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------- precision


def test_autocast_stays_within_the_error_of_bf16(policy, views):
    """The core under bf16 is as near to fp32 as the naive path under bf16 is (factor 2)."""
    exact = both(policy, naive_logprobs(policy, SETS["rdpo"], views))
    fast = both(policy, score(policy, SETS["rdpo"], views, autocast=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        rows = naive_logprobs(policy, SETS["rdpo"], views)
    plain = both(policy, rows)
    assert all(row.dtype == torch.float32 for row in fast[0])

    def distance(a, b):
        values = (torch.cat(a[0]) - torch.cat(b[0])).norm() / torch.cat(b[0]).norm()
        grads = [torch.cat([g.flatten() for g in x[1].values()]) for x in (a, b)]
        return values.item(), ((grads[0] - grads[1]).norm() / grads[1].norm()).item()

    for ours, theirs in zip(distance(fast, exact), distance(plain, exact)):
        assert 1e-5 < theirs < 0.1 and ours < 2 * theirs


@pytest.mark.parametrize("head_trains", [False, True])
def test_gradient_where_the_model_is_sure(head_trains):
    """p(label) = 0.9995: onehot - softmax is 5e-4 there, less than a bf16 rounding of the softmax (4e-3)."""
    torch.manual_seed(0)
    n, V, D = 6, 40, 16
    weight = torch.randn(V, D)
    labels = torch.arange(n)
    hidden = weight[:n] * (13.0 / weight[:n].pow(2).sum(1, keepdim=True))
    hidden, weight = (x.bfloat16().double().requires_grad_() for x in (hidden, weight))  # exact in bf16
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert (logps.exp() > 0.99).any()
    logps.sum().backward()

    h, w = (x.detach().float().requires_grad_() for x in (hidden, weight))
    w.requires_grad_(head_trains)
    with torch.autocast("cpu", torch.bfloat16):
        ours = SelectedLogProbs.apply(h, w, labels, torch.zeros(n, dtype=torch.bool))
    ours.sum().backward()
    sure = logps.detach().exp() > 0.99
    error = (h.grad.double() - hidden.grad)[sure].norm(dim=1) / hidden.grad[sure].norm(dim=1)
    assert error.max() < 0.1
    if head_trains:
        assert (w.grad.double() - weight.grad).norm() / weight.grad.norm() < 0.02


def test_bf16_weights(llava_folder, views):
    """A bf16 base with fp32 adapters, no autocast: scores and gives fp32 adapter gradients."""
    from model.checkpoint import load_llava

    exact = trainable(load_llava(llava_folder), ())
    model = trainable(load_llava(llava_folder, dtype=torch.bfloat16), ())
    model.load_state_dict({k: v for k, v in exact.state_dict().items() if "lora" in k}, strict=False)
    rows = score(model, SETS["dpo"], views)
    grads = gradients(model, rows)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    error = torch.cat(rows) - torch.cat(score(exact, SETS["dpo"], views))
    assert 0 < error.norm() < 0.05 * torch.cat(rows).norm()


# ----------------------------------------------------------------------------------------------------- memory


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation produces."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("trains", ["lora", "lora, projector, head, embeddings"])
def test_no_tokens_by_vocabulary_tensor(model, views, monkeypatch, trains):
    """With chunks of 3 tokens nothing larger than (3, V) is made in forward or backward, and none is kept.

    The naive path, run the same way, makes and keeps larger ones: the test sees what it looks for.
    """
    trainable(model, TRAINS[trains])
    monkeypatch.setitem(logprobs.CHUNK_ELEMENTS, "cpu", 3 * small.VOCAB)
    rows = {}
    for name, run in (("core", score), ("naive", lambda m, s, p: naive_logprobs(m, s, p))):
        saved: list[torch.Size] = []
        shapes = Shapes()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t)
        with shapes, hooks:
            gradients(model, run(model, SETS["rdpo"], views))
        width = model.config.text.hidden_size
        rows[name] = [
            max((shape.numel() // small.VOCAB for shape in map(torch.Size, made)
                 if small.VOCAB in shape and width not in shape), default=0)
            for made in (shapes.seen, saved)
        ]
    assert rows["core"] == [3, 0]
    assert rows["naive"][0] >= 7 and rows["naive"][1] >= 7


def test_the_last_layer_runs_on_the_tail_only(policy, views):
    """Tail tokens: per group 1 + the inputs of its responses (their last tokens are no inputs)."""
    seen = {}
    layers = policy.language_model.model.layers
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: seen.update({i: len(out)}))
    packed = packed_of(FIVE, views)
    score(policy, FIVE, views)
    # prompt of 14 tokens: body 13; tail 1 + 4 + 0 + 1 + 2 = 8, the fifth response having the inputs of the first
    assert seen == {0: 21, 1: 21, 2: 8} and len(packed.ids) == 21


# ----------------------------------------------------------------------------------------------------- errors


IMAGE = small.IMAGE_TOKEN


@pytest.mark.parametrize(
    "sequence, reason",
    [
        (Sequence(0, PROMPTS[0], ()), "sequence 1: the response is empty"),
        (Sequence(0, (1,), (2,)), "prompt 1: needs at least two tokens"),
        (Sequence(2, (1, *[IMAGE] * 8, 4), (2,)), "prompt 1: 8 image tokens, its image needs 9"),
        (Sequence(2, (1, *[IMAGE] * 10, 4), (2,)), "prompt 1: 10 image tokens, its image needs 9"),
        (Sequence(2, PROMPTS[0], (2, IMAGE)), "sequence 1: the response is empty or holds image tokens"),
    ],
)
def test_pack_refuses_what_it_cannot_score(views, sequence, reason):
    with pytest.raises(ValueError, match=reason):
        packed_of([FIVE[0], sequence], views)


# -------------------------------------------------------------------------------------------------- reference


def train(model, reference, views, steps: int, autocast=None) -> None:
    """A few DPO steps on everything that trains."""
    scorer, packed = Scorer(model, autocast), packed_of(SETS["dpo"], views)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    features = features_of(model, views)
    for _ in range(steps):
        policy_logps = scorer(packed, features)[0].sum(1).view(2, -1)
        with reference():
            reference_logps = scorer(packed, features)[0].sum(1).view(2, -1)
        loss, _ = dpo_loss(*policy_logps, *reference_logps, beta=0.5)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("adapters", [True, False])
def test_reference_is_the_start_model(model, views, adapters, autocast):
    """After training, scores inside `reference()` equal bit for bit those of a copy made at the start."""
    if adapters:
        model.requires_grad_(False)
        add_lora(model.language_model.model, rank=3, alpha=6.0)
        model.multi_modal_projector.requires_grad_(True)
    else:
        model.vision_tower.requires_grad_(False)
    start, reference = copy.deepcopy(model), Reference(model)
    train(model, reference, views, steps=3, autocast=autocast)
    before = score(model, SETS["dpo"], views, autocast=autocast)
    with reference():
        inside = score(model, SETS["dpo"], views, autocast=autocast)
        assert not torch.is_grad_enabled()
    after = score(model, SETS["dpo"], views, autocast=autocast)
    expected = score(start, SETS["dpo"], views, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected))
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(before, expected))
    assert after[0].requires_grad and not inside[0].requires_grad


@pytest.mark.parametrize("adapters", [True, False])
def test_reference_does_not_disturb_a_pending_backward(model, views, adapters):
    """policy forward, reference, policy backward gives the gradients of policy forward, policy backward."""
    model = trainable(model) if adapters else model
    model.vision_tower.requires_grad_(False)
    reference = Reference(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    expected = both(model, score(model, SETS["dpo"], views))
    for model.language_model.model.checkpointing in (False, True):
        rows = score(model, SETS["dpo"], views)
        with reference():
            score(model, SETS["dpo"], views)
        assert_same(both(model, rows), expected, 1e-7)


def test_reference_is_safe_inside_an_outer_autocast(policy, views):
    """Autocast may remember cast weights; a stale copy would make policy and reference equal."""
    policy.language_model.lm_head.requires_grad_(True)
    reference, scorer, packed = Reference(policy), Scorer(policy, torch.bfloat16), packed_of(SETS["dpo"], views)
    features = features_of(policy, views)
    expected = scorer(packed, features)[0]
    with reference():
        expected_inside = scorer(packed, features)[0]
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05)
    with torch.autocast("cpu", torch.bfloat16):
        first = scorer(packed, features)[0]
        with reference():
            inside = scorer(packed, features)[0]
        second = scorer(packed, features)[0]
    assert torch.equal(first, second) and torch.equal(inside, expected_inside)
    assert not torch.allclose(first, expected, atol=1e-3) and not torch.allclose(first, inside, atol=1e-3)
    assert any(g.abs().max() > 0 for g in gradients(policy, [second]).values())


def test_reference_gives_the_weights_back_after_an_exception(policy, views):
    reference = Reference(policy)
    with torch.no_grad():
        policy.multi_modal_projector.linear_1.weight.add_(1.0)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"):
        with reference():
            changed = [k for k, v in policy.state_dict().items() if not torch.equal(v, before[k])]
            assert changed == ["multi_modal_projector.linear_1.weight"]
            raise RuntimeError("stop")
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    assert torch.is_grad_enabled() and all(layer.enabled for layer in lora_layers(policy).values())


def test_reference_is_not_trained_by_its_policy(policy, views):
    """The optimiser writes in place; the frozen copy must not share memory with what it writes to."""
    reference = Reference(policy)
    frozen = [t.clone() for t in reference.frozen]
    assert len(frozen) == 4  # weight and bias of both projector layers
    train(policy, reference, views, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(frozen, reference.frozen))
    assert not any(torch.equal(a, p) for a, p in zip(frozen, reference.trained))
