"""model/blocks.py and the rule made of its blocks against attention with a mask, differentiated by autograd."""

import pytest
import torch
from torch import Tensor

from model import blocks
from model.attention import SharedPrefix
from model.blocks import BlockAttention, Blocks

HEADS, KEY_HEADS, WIDTH = 6, 2, 8
PREFIXES, RESPONSES = [7, 3, 12], [[4, 0, 2], [0], [3, 5]]  # one response without inputs, one group with nothing else


def mask_of(prefixes: list[int], responses: list[list[int]], hidden: list[Tensor] | None = None) -> Tensor:
    """(T, T) bool of the packed order, written out token by token: (group, response or 0, position) decides."""
    bodies = [(g, 0, i) for g, p in enumerate(prefixes) for i in range(p - 1)]
    tails = []
    for g, (p, group) in enumerate(zip(prefixes, responses)):
        tails += [(g, 0, p - 1), *((g, r, p + i) for r, n in enumerate(group, 1) for i in range(n))]

    def sees(query, key) -> bool:
        (g, response, i), (g_key, response_key, i_key) = query, key
        shown = hidden is None or response_key > 0 or not hidden[g_key][i_key]
        return g == g_key and i_key <= i and response_key in (0, response) and shown

    return torch.tensor([[sees(query, key) for key in bodies + tails] for query in bodies + tails])


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention by definition: q (n, H, d), k and v (m, K, d), mask (n, m)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def drawn(tokens: int, key_heads: int = KEY_HEADS, seed: int = 0) -> list[Tensor]:
    """q, k, v, and an incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, WIDTH) for h in (HEADS, key_heads, key_heads, HEADS)]
    return [torch.randn(shape, generator=generator) * 1.5 for shape in shapes]


def both(function, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Values, and gradients of q, k and v."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("tail_only", [False, True])
@pytest.mark.parametrize("prefixes, responses", [
    (PREFIXES, RESPONSES), ([2], [[1]]), ([5, 4], [[], []]), ([140, 2], [[131, 1], [130]]),
], ids=["ragged", "least", "no responses", "more than ROWS"])
def test_shared_prefix_is_attention_with_its_mask(prefixes, responses, tail_only):
    rule, mask = SharedPrefix(prefixes, responses), mask_of(prefixes, responses)
    start = rule.skip if tail_only else 0
    q, k, v, grad = drawn(len(mask))
    got = both(lambda *x: rule(0, *x), q[start:], k, v, grad[start:])
    assert_close(got, both(lambda *x: plain(*x, mask[start:]), q[start:], k, v, grad[start:]))


@pytest.mark.parametrize("tail_only", [False, True])
def test_hidden_tokens_are_no_keys(tail_only):
    hidden = [torch.zeros(p, dtype=torch.bool) for p in PREFIXES]
    hidden[0][[0, 2, 3, 5]] = hidden[2][1:11] = True
    rule, mask = SharedPrefix(PREFIXES, RESPONSES, hidden=hidden), mask_of(PREFIXES, RESPONSES, hidden)
    mask |= torch.eye(len(mask), dtype=torch.bool)  # they see themselves
    start = rule.skip if tail_only else 0
    q, k, v, grad = drawn(len(mask))
    unseen = torch.cat([row[:-1] for row in hidden])  # of the bodies
    grad[: len(unseen)][unseen] = 0  # what they compute is not used
    got = both(lambda *x: rule(0, *x), q[start:], k, v, grad[start:])
    assert_close(got, both(lambda *x: plain(*x, mask[start:]), q[start:], k, v, grad[start:]))
    assert unseen.any() and not got[2][: len(unseen)][unseen].any()  # no gradient reaches a hidden key


def test_a_prefix_may_be_hidden_but_for_its_last_token():
    hidden = [torch.ones(p, dtype=torch.bool) for p in PREFIXES]
    for row in hidden:
        row[-1] = False
    rule, mask = SharedPrefix(PREFIXES, RESPONSES, hidden=hidden), mask_of(PREFIXES, RESPONSES, hidden)
    inputs = drawn(len(mask))
    mask |= torch.eye(len(mask), dtype=torch.bool)
    assert_close(both(lambda *x: rule(0, *x), *inputs), both(lambda *x: plain(*x, mask), *inputs))


def test_each_head_has_its_keys():
    """As many key heads as query heads: the kernel of the CPU in both directions."""
    rule, mask = SharedPrefix(PREFIXES, RESPONSES), mask_of(PREFIXES, RESPONSES)
    inputs = drawn(len(mask), HEADS)
    assert_close(both(lambda *x: rule(0, *x), *inputs), both(lambda *x: plain(*x, mask), *inputs))


def test_the_order_of_blocks_does_not_matter():
    rule = SharedPrefix(PREFIXES, RESPONSES)
    inputs = drawn(len(mask_of(PREFIXES, RESPONSES)))
    expected = both(lambda *x: BlockAttention.apply(*x, rule.whole.single), *inputs)
    assert_close(both(lambda *x: BlockAttention.apply(*x, rule.whole.single[::-1]), *inputs), expected)


def test_shares_of_blocks_by_hand():
    """One query and three keys with scores 0, ln 2, ln 5 in two blocks: weights 1/8, 2/8, 5/8."""
    q, k = torch.tensor([[[1.0]]]), torch.tensor([0.0, 2.0, 5.0]).view(3, 1, 1)
    k[1:] = k[1:].log()
    query = slice(0, 1)
    two = Blocks([([(query, slice(0, 2))], False), ([(query, slice(2, 3))], False)])
    values = torch.tensor([8.0, 80.0, 800.0]).view(3, 1, 1)
    assert two(q, k, values).item() == pytest.approx(1 + 20 + 500)


def test_a_large_score_overflows_nowhere():
    rule, mask = SharedPrefix(PREFIXES, RESPONSES), mask_of(PREFIXES, RESPONSES)
    q, k, v, grad = drawn(len(mask))
    inputs = q * 100, k * 10, v, grad
    assert_close(both(lambda *x: rule(0, *x), *inputs), both(lambda *x: plain(*x, mask), *inputs), 1e-3)


def test_bf16_is_as_near_as_its_rounding():
    """The error of values and gradients in bf16 is that of plain attention in bf16, factor 2."""
    rule, mask = SharedPrefix([140, 60], [[60, 40], [50]]), mask_of([140, 60], [[60, 40], [50]])
    inputs = [x.bfloat16() for x in drawn(len(mask))]
    exact = both(lambda *x: plain(*x, mask), *(x.double() for x in inputs))
    ours, theirs = both(lambda *x: rule(0, *x), *inputs), both(lambda *x: plain(*x, mask), *inputs)
    for a, b, e in zip(ours, theirs, exact):
        assert a.dtype == torch.bfloat16
        assert 1e-4 < (a - e).norm() / e.norm() < 2 * (b - e).norm() / e.norm() < 0.04


@pytest.mark.parametrize("forward, backward", [("_cpu_forward", "_backward"), ("_forward", "_backward")])
@pytest.mark.parametrize("key_heads", [KEY_HEADS, HEADS])
def test_written_out_products(monkeypatch, key_heads, forward, backward):
    """Whatever computes a block, the result is the same; 140 tokens are more than ROWS."""
    monkeypatch.setattr(blocks, "_forward_of", lambda q: getattr(blocks, forward))
    monkeypatch.setattr(blocks, "_backward_of", lambda q, k: getattr(blocks, backward))
    rule, mask = SharedPrefix([140, 2], [[131, 1], [130]]), mask_of([140, 2], [[131, 1], [130]])
    inputs = drawn(len(mask), key_heads)
    assert_close(both(lambda *x: rule(0, *x), *inputs), both(lambda *x: plain(*x, mask), *inputs))


# ------------------------------------------------------------------------------------ one call a block, as on CUDA


def stretches(q, k, ends_q, ends_k, causal):
    """Rows of queries and keys of each stretch, and its mask."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) and len(ends_q) == len(ends_k)
    for (a, b), (c, d) in zip(zip(ends_q, ends_q[1:]), zip(ends_k, ends_k[1:])):
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        yield slice(a, b), slice(c, d), mask.tril() if causal else mask


def scores_of(q, k, mask):
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf"))


def flash_forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug):
    """What aten's varlen flash attention returns: o (n, H, d), l (H, n) and three tensors that are not needed."""
    assert max_q == ends_q.diff().max() and max_k == ends_k.diff().max() and dropout == 0.0 and debug is False
    out, sums = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for rows, keys, mask in stretches(q, k, ends_q, ends_k, causal):
        out[rows] = plain(q[rows], k[keys], v[keys], mask)
        sums[:, rows] = scores_of(q[rows], k[keys], mask).logsumexp(-1)
    return out, sums, torch.zeros(2), torch.zeros(0), torch.zeros(0)


def flash_backward(grad, q, k, v, out, sums, ends_q, ends_k, max_q, max_k, dropout, causal, seed, unused):
    """Its gradient, which takes any o and l: P = exp(s - l)."""
    assert sums.shape == (q.shape[1], len(q)) and sums.is_contiguous() and dropout == 0.0
    assert max_q == ends_q.diff().max() and max_k == ends_k.diff().max()
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    share = q.shape[1] // k.shape[1]
    for rows, keys, mask in stretches(q, k, ends_q, ends_k, causal):
        weights = (scores_of(q[rows], k[keys], mask) - sums[:, rows, None]).exp()
        values = v[keys].repeat_interleave(share, 1)
        inner = torch.einsum("nhd,mhd->hnm", grad[rows], values) - (grad[rows] * out[rows]).sum(-1).T[..., None]
        inner = weights * inner / q.shape[-1] ** 0.5
        grads[0][rows] = torch.einsum("hnm,mhd->nhd", inner, k[keys].repeat_interleave(share, 1))
        grads[1][keys] = torch.einsum("hnm,nhd->mhd", inner, q[rows]).unflatten(1, (-1, share)).sum(2)
        grads[2][keys] = torch.einsum("hnm,nhd->mhd", weights, grad[rows]).unflatten(1, (-1, share)).sum(2)
    return grads


def test_one_call_a_block(monkeypatch):
    """The calls that CUDA gets, answered in plain torch: four a layer in each direction, with the same result."""
    calls = []
    for name, function in (("_flash_attention_forward", flash_forward), ("_flash_attention_backward", flash_backward)):
        answer = lambda *x, f=function: calls.append(f.__name__) or f(*x)  # noqa: E731
        monkeypatch.setattr(torch.ops.aten, name, answer)
    rule, mask = SharedPrefix(PREFIXES, RESPONSES), mask_of(PREFIXES, RESPONSES)
    inputs = drawn(len(mask))
    expected = both(lambda *x: rule(0, *x), *inputs)
    assert not calls
    monkeypatch.setattr(blocks, "_flash", lambda q: True)
    assert_close(both(lambda *x: rule(0, *x), *inputs), expected)
    assert calls == ["flash_forward"] * 4 + ["flash_backward"] * 4
    q, k, v, grad = inputs
    tail = (q[rule.skip :], k, v, grad[rule.skip :])
    assert_close(both(lambda *x: rule(0, *x), *tail), both(lambda *x: plain(*x, mask[rule.skip :]), *tail))


def test_a_rule_moves_to_a_device():
    """All tensors, those of hidden tokens too, and the rule that was moved stays where it is."""
    hidden = [torch.zeros(p, dtype=torch.bool) for p in PREFIXES]
    hidden[0][2] = True
    rule = SharedPrefix(PREFIXES, RESPONSES, hidden=hidden)
    for moved, device in ((rule.to("meta"), "meta"), (rule, "cpu")):
        found = [x for bs in (moved.whole, moved.tail) for b in bs.single + bs.joined for x in (b.queries, b.keys, *b.ends)]
        tensors = [x for x in [*found, *moved.masks] if isinstance(x, torch.Tensor)]
        assert len(tensors) > 20 and {x.device.type for x in tensors} == {device}
