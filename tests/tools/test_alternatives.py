"""What evopatch is compared with on the accuracy page."""

import alternatives
import pytest
import torch
import torch.nn.functional as F
from peers import first_tokens, mctf, pitome, token_merging
from timm.models.vision_transformer import VisionTransformer

from evopatch.algorithm.selection import num_slow

SMALL = {"patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4, "dynamic_img_size": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, **SMALL).eval()


@torch.no_grad()
def test_sides_are_compared_with_the_first(model):
    torch.manual_seed(1)
    batches = [({64: torch.randn(3, 3, 64, 64), 48: torch.randn(3, 3, 48, 48)}, torch.tensor([0, 1, 2])) for _ in "ab"]
    sides = [alternatives.side("whole", model, 64), alternatives.side("small", model, 48)]
    assert sides[1].flops < 0.7 * sides[0].flops
    whole, small = alternatives.compare(sides, batches)
    assert (whole.agreement, whole.kl) == (100, 0)
    first, second = (torch.cat([model(images[size]) for images, _ in batches]) for size in (64, 48))
    labels = torch.tensor([0, 1, 2] * 2)
    assert small.top1 == pytest.approx(100 * (second.argmax(1) == labels).double().mean().item())
    kl = F.kl_div(second.log_softmax(1), first.log_softmax(1), reduction="batchmean", log_target=True)
    assert small.kl == pytest.approx(kl.item(), rel=1e-4)
    assert small.kl > 0


def test_peers_stand_beside_evopatch(model):
    class Opened:
        input_size = (3, 64, 64)

    Opened.model = model
    sides = alternatives.sides_of(lambda size: Opened, [0.5], [48])
    assert [side.name.split(",")[0] for side in sides] == [
        "unpatched",
        "evopatch",
        *["token merging"] * 2,
        "PiToMe",
        "MCTF",
        "unpatched at 48 px",
    ]
    assert sides[4].name == f"PiToMe, ratio={sides[4].model.ratio:g}"
    assert sides[5].name == f"MCTF, r={sides[5].model.r}"
    whole, patched, more, less, protecting, fusing, _ = (side.flops for side in sides)
    assert less <= patched < more < whole
    assert 0.85 * patched < protecting <= patched
    assert 0.85 * patched < fusing <= patched
    milder = [pitome.PiToMe(model, sides[4].model.ratio + 0.001), mctf.MCTF(model, sides[5].model.r - 1)]
    assert all(alternatives.side("milder", peer, 64).flops > patched for peer in milder)


@pytest.mark.parametrize(
    ("peer", "tokens"),
    [
        (lambda model: token_merging.TokenMerging(model, 4), 65 - 6 * 4),
        (lambda model: pitome.PiToMe(model, 0.9), 34),  # 65, 58, 52, 47, 42, 38
        (lambda model: mctf.MCTF(model, 5), 65 - 5 * 5),
        (lambda model: token_merging.TokenMerging(model, 200), 2),
        (lambda model: pitome.PiToMe(model, 0.5), 2),
        (lambda model: mctf.MCTF(model, 200), 3),
    ],
    ids=["token merging", "PiToMe", "MCTF", "most token merging", "most PiToMe", "most MCTF"],
)
@torch.no_grad()
def test_peers_keep_as_many_tokens_as_promised(model, peer, tokens):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, size = peer(model).eval().features(images)
    assert found.shape == (2, tokens, 48)
    assert size.shape == (2, tokens, 1)
    torch.testing.assert_close(size.sum(1), torch.full((2, 1), 65.0))
    assert (size[:, 0] == 1).all(), "the class token was merged"


@torch.no_grad()
def test_first_tokens_are_as_many_as_evopatch_keeps(model):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plans = first_tokens.FirstTokens(model, 50).plans
    dropping = first_tokens.FirstTokens(model, 50).eval()
    assert dropping.features(x)[0].shape == (2, 1 + num_slow(64, plans[-1].keep_ratio), 48)
    whole = alternatives.side("whole", model, 64).flops
    cheaper = first_tokens.at_flops(model, x[:1], int(0.7 * whole))
    assert 0.6 * whole < alternatives.side("cheaper", cheaper, 64).flops <= 0.7 * whole
    torch.testing.assert_close(first_tokens.FirstTokens(model, 100).eval()(x), model(x))


@pytest.mark.parametrize("qkv_bias", [True, False])
@torch.no_grad()
def test_peers_of_nothing_are_the_model(qkv_bias):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, qkv_bias=qkv_bias, qk_norm=True, init_values=0.5, **SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    for peer in (token_merging.TokenMerging(model, 0), pitome.PiToMe(model, 1.0), mctf.MCTF(model, 0)):
        torch.testing.assert_close(peer.eval()(images), model(images))


def merged_by(name, x, size, metric, r):
    """What a peer's merging makes of tokens `(B, N, N)`; attention for MCTF from the metric."""
    if name == "token merging":
        return token_merging.merge(x, size, metric, r)
    if name == "PiToMe":
        return pitome.merge(x, size, metric, r, margin=0.3)
    return mctf.fuse(x, size, (metric @ metric.transpose(1, 2)).softmax(-1).unsqueeze(1), r)[:2]


@pytest.mark.parametrize("r", [1, 4, 5, 7])
@pytest.mark.parametrize("name", ["token merging", "PiToMe", "MCTF"])
def test_merged_tokens_are_means_by_size(name, r):
    torch.manual_seed(r)
    batch, tokens = 3, 16
    # Each token is a channel of its own (beside a little noise to match by), so a mean tells what went into it.
    x = torch.eye(tokens).repeat(batch, 1, 1)
    noise = 1e-4 * torch.rand(batch, tokens, tokens)
    size = torch.randint(1, 5, (batch, tokens, 1)).float()
    found, found_size = merged_by(name, x + noise, size, torch.randn(batch, tokens, 6), r)
    assert found.shape == (batch, tokens - r, tokens)
    members = found > 0.01
    assert torch.equal(members.sum(1), torch.ones(batch, tokens, dtype=torch.long)), "every token is in one"
    assert members[:, 0].sum(1).tolist() == [1] * batch
    assert members[:, 0, 0].all()
    assert torch.equal((members * size.transpose(1, 2)).sum(-1, keepdim=True), found_size)
    torch.testing.assert_close(found, members * size.transpose(1, 2) / found_size, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [2, 3, 4])
@pytest.mark.parametrize("name", ["token merging", "PiToMe", "MCTF"])
def test_few_tokens_are_merged_as_far_as_it_goes(name, tokens):
    x, size, metric = torch.randn(2, tokens, 6), torch.ones(2, tokens, 1), torch.randn(2, tokens, 6)
    assert merged_by(name, x, size, metric, 9)[0].shape == (2, tokens - (tokens - 1) // 2, 6)


def slow_pitome(x, size, metric, k, margin):
    """One image after the other, one pair after the other."""
    merged, sizes = [], []
    for tokens, sizes_of, features in zip(x, size, metric, strict=True):
        unit = features / features.norm(dim=-1, keepdim=True)
        patches = range(1, len(tokens))

        def crowd(i, j, unit=unit):
            cosine = unit[i] @ unit[j]
            return cosine if cosine >= margin else torch.exp(cosine - margin) - 1

        energy = {i: sum(crowd(i, j) for j in patches).item() for i in patches}
        order = sorted(patches, key=lambda i: -energy[i])
        a, b, protected = order[: 2 * k : 2], order[1 : 2 * k : 2], sorted(order[2 * k :])
        weighted, total = tokens * sizes_of, sizes_of.clone()
        for i in a:
            j = max(b, key=lambda j: (unit[i] @ unit[j]).item())
            weighted[j] += weighted[i]
            total[j] += total[i]
        left = [0, *protected, *b]
        merged.append((weighted / total)[left])
        sizes.append(total[left])
    return torch.stack(merged), torch.stack(sizes)


def test_pitome_agrees_with_a_slow_reference():
    torch.manual_seed(0)
    x, metric = torch.randn(2, 14, 6), torch.randn(2, 14, 5)
    size = torch.randint(1, 4, (2, 14, 1)).float()
    for k, margin in ((1, 0.9), (4, 0.3), (6, 0.0)):
        expected, expected_size = slow_pitome(x, size, metric, k, margin)
        found, found_size = pitome.merge(x, size, metric, k, margin)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found_size, expected_size)


def slow_mctf(x, size, attended, r):
    """One image after the other, one pair after the other; a token is a dictionary with its members."""
    results = []
    for tokens, sizes, maps in zip(x, size, attended, strict=True):
        received = maps.mean((0, 1))
        found = {
            i: {"members": [i], "x": tokens[i], "size": sizes[i].item(), "a": received[i].item()}
            for i in range(len(tokens))
        }
        first, second = list(range(1, len(tokens), 2)), list(range(2, len(tokens), 2))
        for pairs in (r - r // 2, r // 2):
            edges = []
            for i in first:
                scores = []
                for j in second:
                    p, q = found[i], found[j]
                    similarity = (F.cosine_similarity(p["x"], q["x"], dim=0).item() + 1) / 2
                    scores.append(similarity * (p["a"] * q["a"]) ** (-1 / 20) * (p["size"] * q["size"]) ** (-1 / 40))
                edges.append((max(scores), i, second[scores.index(max(scores))]))
            taken = {j: found[j] for j in second}
            for _, i, j in sorted(edges, reverse=True)[:pairs]:
                p, q = found.pop(i), taken[j]
                size_of = p["size"] + q["size"]
                mean = (p["x"] * p["size"] + q["x"] * q["size"]) / size_of
                members = p["members"] + q["members"]
                found[j] = taken[j] = {"members": members, "x": mean, "size": size_of, "a": p["a"] + q["a"]}
                first.remove(i)
            first, second = second, first
        left = [found[i] for i in sorted(found)]
        rows = torch.stack(
            [(maps[:, own["members"]] * sizes[own["members"]]).sum(1) / own["size"] for own in left], dim=1
        )
        map_of = torch.stack([rows[:, :, own["members"]].sum(-1) for own in left], dim=-1)
        results.append((torch.stack([own["x"] for own in left]), map_of))
    return tuple(torch.stack(part) for part in zip(*results, strict=True))


def test_mctf_agrees_with_a_slow_reference():
    torch.manual_seed(0)
    x, attended = torch.randn(3, 14, 6), torch.randn(3, 2, 14, 14).softmax(-1)
    size = torch.randint(1, 4, (3, 14, 1)).float()
    for r in (1, 3, 6):
        expected, expected_map = slow_mctf(x, size, attended, r)
        found, _, found_map = mctf.fuse(x, size, attended, r)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_map, expected_map)
        torch.testing.assert_close(found_map.sum(-1), torch.ones(3, 2, 14 - r))
