"""Every function of the algorithm against a slow reference with Python loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from loop_reference import matched_reference, top
from torch._subclasses.fake_tensor import FakeTensorMode

from evopatch import UnsupportedInputError
from evopatch.algorithm import rows as algorithm_rows
from evopatch.algorithm.bias import merge_bias
from evopatch.algorithm.importance import accumulate, accumulate_compact, class_attention, coarsen
from evopatch.algorithm.partition import distribute, merge, merge_positions, spread_attention
from evopatch.algorithm.regression import NormalEquations
from evopatch.algorithm.rows import row_sums, weighted_row_sums, whole
from evopatch.algorithm.selection import num_slow, select_matched, select_top

B, P, N, C, H, D = 3, 2, 11, 8, 4, 6


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, P + N, C, generator=generator)
    g = torch.rand(B, N, generator=generator) + 0.01
    features = F.normalize(torch.randn(B, N, C, generator=generator), dim=-1)
    return x, g, features


def steps(g):
    """The square root of a token's importance, in whole steps."""
    return round(g.item() ** 0.5 * 2**18)


@pytest.mark.parametrize("importance", [0.7, 0.15, 0.0])
@pytest.mark.parametrize("keep", [1, 4, 10])
def test_select_matched(tensors, keep, importance):
    _, g, features = tensors
    partition = select_matched(g, features, keep, P, importance)
    assert partition.rows == P + keep
    assert partition.complete
    assert int(partition.group.max()) < partition.rows
    assert torch.equal(partition.weight[:, :P], torch.ones(B, P))
    for b in range(B):
        slow, leader = matched_reference(g[b], features[b], keep, importance)
        assert set(partition.slow[b].nonzero().flatten().tolist()) == slow
        group = partition.group[b].tolist()
        assert group[:P] == list(range(P))
        sizes = [leader.count(i) for i in range(N)]
        for i in range(N):
            assert group[P + i] == group[P + leader[i]]
            total = sum(steps(g[b, j]) for j in range(N) if leader[j] == leader[i])
            assert partition.weight[b, P + i].item() == pytest.approx(steps(g[b, i]) / total)
            assert partition.log_size[b, group[P + i]].item() == pytest.approx(math.log(sizes[leader[i]]))
        assert len({group[P + i] for i in slow}) == keep
        assert partition.log_size[b, :P].tolist() == [0.0] * P


@pytest.mark.parametrize("representative", [True, False])
@pytest.mark.parametrize("keep", [1, 4, 10])
def test_select_top(tensors, keep, representative):
    _, g, _ = tensors
    partition = select_top(g, keep, P, representative)
    assert partition.rows == P + keep + representative
    assert partition.log_size is None
    assert partition.complete == representative
    assert (int(partition.group.max()) < partition.rows) == representative
    assert torch.equal(partition.weight[:, :P], torch.ones(B, P))
    for b in range(B):
        slow = top(g[b].tolist(), keep)
        assert set(partition.slow[b].nonzero().flatten().tolist()) == slow
        group = partition.group[b].tolist()
        assert sorted(group[P + i] for i in slow) == list(range(P, P + keep))
        fast = [i for i in range(N) if i not in slow]
        assert all(group[P + i] == P + keep for i in fast)
        total = sum(g[b, i].item() for i in fast)
        for i in fast:
            expected = g[b, i].item() / total if representative else 0.0
            assert partition.weight[b, P + i].item() == pytest.approx(expected, abs=1e-7)


def partitions(g, features, keep=4):
    return {
        "matched": select_matched(g, features, keep, P, 0.7),
        "single": select_top(g, keep, P, True),
        "none": select_top(g, keep, P, False),
    }


@pytest.mark.parametrize("kind", ["matched", "single", "none"])
def test_merge_and_distribute(tensors, kind):
    x, g, features = tensors
    partition = partitions(g, features)[kind]
    compact = merge(x, partition)
    change = torch.randn(compact.shape, generator=torch.Generator().manual_seed(1))
    result = distribute(x, change, partition)
    for b in range(B):
        rows = torch.zeros(partition.rows + 1, C)
        for t in range(P + N):
            rows[partition.group[b, t]] += partition.weight[b, t] * x[b, t]
        torch.testing.assert_close(compact[b], rows[:-1])
        for t in range(P + N):
            row = int(partition.group[b, t])
            expected = x[b, t] + (change[b, row] if row < partition.rows else 0.0)
            torch.testing.assert_close(result[b, t], expected)


@pytest.mark.parametrize("kind", ["matched", "single", "none"])
def test_merged_tokens_move_with_their_group(tensors, kind):
    """What makes full-grid steps equal to compact ones: merging after distributing gives the changed rows."""
    x, g, features = tensors
    partition = partitions(g, features)[kind]
    compact = merge(x, partition)
    change = torch.randn(compact.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(merge(distribute(x, change, partition), partition), compact + change)


def test_accumulate(tensors):
    _, g, _ = tensors
    attention = torch.rand(B, N)
    assert accumulate(None, attention, 0.3) is attention
    result = accumulate(g, attention, 0.3)
    for b in range(B):
        for i in range(N):
            assert result[b, i].item() == pytest.approx(0.7 * g[b, i].item() + 0.3 * attention[b, i].item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["matched", "single", "none"])
def test_accumulate_compact(tensors, kind):
    _, g, features = tensors
    partition = partitions(g, features)[kind]
    attention = torch.rand(B, partition.rows)
    result = accumulate_compact(g, attention, 0.3, partition)
    for b in range(B):
        group = partition.group[b, P:].tolist()
        for i in range(N):
            if kind != "matched" and not partition.slow[b, i]:
                assert result[b, i] == g[b, i]
                continue
            size = group.count(group[i]) if kind == "matched" else 1
            expected = 0.7 * g[b, i].item() + 0.3 * attention[b, group[i]].item() / size
            assert result[b, i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_class_attention(pooled, biased):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(B, H, 2, D, generator=generator)
    key = torch.randn(B, H, N, D, generator=generator)
    bias = torch.randn(B, H, 2, N, generator=generator) if biased else None
    share = torch.tensor([[0.25, 0.75]]).expand(B, 2) if pooled else None
    result = class_attention(query, key, 0.4, bias, share)
    assert result.dtype == torch.float32
    for b in range(B):
        expected = torch.zeros(N)
        for h in range(H):
            logits = [[0.4 * float(query[b, h, r] @ key[b, h, j]) for j in range(N)] for r in range(2)]
            if bias is not None:
                logits = [[logits[r][j] + float(bias[b, h, r, j]) for j in range(N)] for r in range(2)]
            if pooled:
                logits = [[0.25 * logits[0][j] + 0.75 * logits[1][j] for j in range(N)]]
            expected += sum(torch.tensor(row).softmax(0) for row in logits) / len(logits) / H
        torch.testing.assert_close(result[b], expected, atol=1e-6, rtol=1e-5)
    assert torch.allclose(result.sum(1), torch.ones(B))


@pytest.mark.parametrize("kind", ["matched", "single", "none"])
def test_merge_positions(tensors, kind):
    _, g, features = tensors
    partition = partitions(g, features)[kind]
    table = torch.randn(H, N, D, generator=torch.Generator().manual_seed(3))
    per_head = merge_positions(table, partition, P)
    shared = merge_positions(table[0], partition, P)
    batched = merge_positions(table.expand(B, H, N, D), partition, P)
    assert per_head.shape == (B, H, partition.rows - P, D)
    assert shared.shape == (B, 1, partition.rows - P, D)
    torch.testing.assert_close(batched, per_head)
    torch.testing.assert_close(shared[:, 0], per_head[:, 0])
    for b in range(B):
        for h in range(H):
            rows = torch.zeros(partition.rows + 1, D)
            for i in range(N):
                rows[partition.group[b, P + i]] += partition.weight[b, P + i] * table[h, i]
            torch.testing.assert_close(per_head[b, h], rows[P:-1])


@pytest.mark.parametrize("kind", ["matched", "single", "none"])
def test_merge_bias(tensors, kind):
    _, g, features = tensors
    partition = partitions(g, features)[kind]
    bias = torch.randn(1, H, P + N, P + N, generator=torch.Generator().manual_seed(4))
    result = merge_bias(bias, partition)
    assert result.shape == (B, H, partition.rows, partition.rows)
    torch.testing.assert_close(merge_bias(bias.expand(B, -1, -1, -1), partition), result)
    slow = torch.nn.functional.pad(partition.slow, (P, 0), value=True)
    for b in range(B):
        # A slow token's row has its bias whatever it stands for besides; only one representative's row is a mean.
        share = torch.where(slow[b], 1.0, partition.weight[b] if kind == "single" else 0.0)
        expected = torch.zeros(H, partition.rows + 1, partition.rows + 1)
        for s in range(P + N):
            for t in range(P + N):
                weight = share[s] * share[t]
                expected[:, partition.group[b, s], partition.group[b, t]] += weight * bias[0, :, s, t]
        torch.testing.assert_close(result[b], expected[:, :-1, :-1])


@pytest.mark.parametrize(("kernel", "reach"), [(2, (0, 1)), (3, (-1, 0, 1))])
@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (5, 4), (4, 5), (2, 2), (1, 3)])
def test_coarsen(grid, kernel, reach):
    rows, columns = grid
    g = torch.rand(B, rows * columns, generator=torch.Generator().manual_seed(5))
    result = coarsen(g, grid, kernel)
    expected = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            near = [
                (i + a) * columns + j + b for a in reach for b in reach if 0 <= i + a < rows and 0 <= j + b < columns
            ]
            expected.append(sum(g[:, n] for n in near) / len(near))
    torch.testing.assert_close(result, torch.stack(expected, dim=1))


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"), [(196, 0.5, 98), (196, 0.37, 73), (4, 0.01, 1), (4, 0.99, 3), (2, 0.5, 1)]
)
def test_num_slow(patches, ratio, expected):
    assert num_slow(patches, ratio) == expected


@pytest.mark.parametrize("patches", [0, 1])
def test_num_slow_needs_two_patches(patches):
    with pytest.raises(UnsupportedInputError, match=f"{patches} patch token.*at least 2"):
        num_slow(patches, 0.5)


def test_equal_importance_is_no_error():
    """A blank image: every token alike, every score alike."""
    partition = select_matched(torch.ones(1, N), torch.full((1, N, C), C**-0.5), 4, P, 0.7)
    assert partition.slow.sum() == 4
    assert torch.isfinite(partition.weight).all()
    assert torch.isfinite(select_top(torch.zeros(1, N), 4, P, True).weight).all()


@pytest.mark.parametrize("representative", ["matched", "single", "none"])
def test_spread_attention(tensors, representative):
    _, g, features = tensors
    partition = {
        "matched": lambda: select_matched(g, features, 4, P, 0.7),
        "single": lambda: select_top(g, 4, P, True),
        "none": lambda: select_top(g, 4, P, False),
    }[representative]()
    rows = partition.rows
    weights = torch.randn(B, H, rows, rows, generator=torch.Generator().manual_seed(1)).softmax(-1)
    spread = spread_attention(weights, partition)
    assert spread.shape == (B, H, P + N, P + N)
    for b in range(B):
        group = partition.group[b].tolist()
        for h in range(H):
            for i in range(P + N):
                for j in range(P + N):
                    expected = 0.0
                    if rows not in (group[i], group[j]):
                        expected = weights[b, h, group[i], group[j]] * partition.weight[b, j]
                    assert spread[b, h, i, j].item() == pytest.approx(float(expected), abs=1e-6)
    stands = partition.group < rows
    torch.testing.assert_close(spread.sum(-1), stands.float()[:, None].expand(-1, H, -1))
    assert stands.all() == (representative != "none")


def test_sums_of_shares_are_exact_in_any_order(monkeypatch):
    """Accelerators add in one that changes from run to run. Two rows of 4096 tokens."""
    generator = torch.Generator().manual_seed(0)
    g = torch.rand(1, 4096, generator=generator).square().softmax(-1)
    share, group = whole(g.sqrt()), torch.randint(2, (1, 4096), generator=generator)
    (total,) = row_sums(group, 2, share)
    other = torch.randperm(4096, generator=generator)
    assert torch.equal(row_sums(group[:, other], 2, share[:, other])[0], total)
    for row in range(2):
        assert total[0, row].item() == share[group == row].double().sum().item()
    torch.testing.assert_close(share / 2**18, g.sqrt(), atol=2.0**-19, rtol=0)
    monkeypatch.setattr(algorithm_rows, "exporting", lambda: True)
    assert torch.equal(whole(g), g)
    torch.testing.assert_close(row_sums(group, 2, g.sqrt())[0] * 2**18, total, atol=0, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_the_same_as_products(tensors, monkeypatch, autocast):
    """On accelerators and in compiled code they are products, which autocast must not round."""
    x, _, _ = tensors
    # More rows than are taken at once.
    rows = 2 * C + 3
    group = torch.randint(rows, (B, P + N), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(B, P + N, generator=torch.Generator().manual_seed(2))
    expected = weighted_row_sums(x, weight, group, rows)
    monkeypatch.setattr(algorithm_rows, "by_product", lambda values: True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(weighted_row_sums(x, weight, group, rows), expected, atol=1e-6, rtol=1e-6)
    half = weighted_row_sums(x.bfloat16(), weight, group, rows)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05, rtol=0.05)


def test_sums_of_rows_have_every_derivative():
    """Of the second order, forward, of the weights; and shapes without values."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 1]])  # a row without a token
    values = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def sums(values, weight=weight):
        return weighted_row_sums(values, weight, group, 4)

    expected = torch.stack(
        [torch.stack([(weight[b, group[b] == r, None] * values[b, group[b] == r]).sum(0) for r in range(4)])
         for b in range(2)]
    )  # fmt: skip
    torch.testing.assert_close(sums(values), expected)
    with torch.no_grad():
        assert torch.equal(sums(values), sums(values.requires_grad_()))
    assert torch.autograd.gradcheck(sums, (values,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: sums(x).pow(3), (values,))
    assert torch.autograd.gradcheck(sums, (values, weight.requires_grad_()))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert sums(fake.from_tensor(values.detach())).shape == (2, 4, 3)


def test_equations_are_summed_in_float32_whatever_is_around():
    """In bfloat16 sums lose all but three digits, in float16 they overflow."""
    inputs, targets = torch.randn(64, 5), torch.randn(64, 2)
    plain, cast = NormalEquations(5, 2, inputs.device), NormalEquations(5, 2, inputs.device)
    plain.add(inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(inputs, targets)
    assert all(torch.equal(*pair) for pair in zip(plain.sides(0.1), cast.sides(0.1), strict=True))
