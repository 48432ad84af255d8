"""Benchmark, profile and memory: sides, efficiency, the token-merging peer."""

import copy
import json
import math
import sys
import warnings

import pytest
import torch
from peers import token_merging
from variants import build, images, images_for

import evopatch
from evopatch import ConfigError, EvoConfig, NotPatchedError
from evopatch.cli.benchmark import warn_of_slow_float32
from evopatch.cli.options import Precision
from evopatch.measure.kernels import attention_kernels
from evopatch.measure.memory import peak_memory
from evopatch.measure.profiling import count_flops

SIZE = (3, 40, 40)
CPU = torch.device("cpu")


def test_peak_memory_is_the_most_that_lives_at_once():
    def call():
        a = torch.zeros(1000)
        b = a + 1  # two
        del a
        c = b * 2  # two
        d = c[::2]  # a view
        del c
        return d + 1  # two and a half: the view keeps its base

    assert peak_memory(call, CPU) == 10000
    kept = torch.zeros(1000)
    assert peak_memory(lambda: kept.add_(1), CPU) == 0
    assert peak_memory(lambda: kept + 1, CPU) == 4000


def test_activations_are_what_autograd_keeps():
    model = evopatch.apply(build("vit", embed_dim=192, num_heads=3), config=EvoConfig(keep_ratio=[0.6, 0.4]))
    frozen = copy.deepcopy(model).requires_grad_(False)
    profile = evopatch.profile(model, SIZE)
    whole, last = profile.blocks[0], profile.blocks[-1]
    # Per token: two norms' inputs, their outputs, queries, keys, values, attention's output, the MLP's hidden layer
    # before and after its activation; the softmax's sums and the norms' means and deviations are small beside.
    per_token = 4 * 192 * (2 + 2 + 3 + 1 + 4 + 4)
    assert 26 * per_token * 0.95 < whole.activations_unpatched < 26 * per_token * 1.1
    assert whole.activations == whole.activations_unpatched
    assert last.activations < 0.55 * last.activations_unpatched
    assert profile.activations < 0.85 * profile.activations_unpatched
    assert profile.activations_unpatched >= sum(block.activations_unpatched for block in profile.blocks)
    assert evopatch.profile(frozen, SIZE) == profile
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_what_is_printed_is_a_table():
    model = evopatch.apply(build("vit"))
    found = evopatch.profile(model, (3, 40, 40))
    lines = str(found).splitlines()
    assert lines[1].split() == ["0", "25", "25", *[f"{found.blocks[0].flops / 1e9:.3f}"] * 2]
    assert lines[4].split()[:3] == ["3", str(found.blocks[3].tokens), "25"]
    assert lines[7].endswith(f", {found.ratio:.3f}")
    timed = evopatch.benchmark(model, images(), rounds=2, warm_up=0)
    head, unpatched, patched, how = str(timed).splitlines()
    assert head.split() == ["images/s", "FLOPs", "speed-up", "efficiency", "peak", "MB"]
    assert unpatched.split()[:3] == ["unpatched", f"{timed.sides[0].images_per_second:.1f}", "1.000"]
    assert f"{timed.sides[1].speed_up:.3f}" in patched
    assert "batch 2, 2 rounds" in how


@pytest.mark.parametrize("size", [1024, 4096])
def test_a_selection_does_not_set_the_peak(size):
    side = 8 * math.isqrt(size)
    model = build("vit", img_size=side, embed_dim=96, num_heads=3).eval()
    with torch.no_grad():
        x = torch.zeros(1, 3, side, side)
        unpatched = peak_memory(lambda: model(x), CPU)
        patched = peak_memory(lambda: evopatch.apply(model)(x), CPU)
        assert patched <= 1.05 * unpatched
        assert size * size * 4 > 2 * unpatched or size == 1024


@pytest.mark.parametrize(
    ("name", "settings", "kernel"),
    [
        ("vit", {}, "flash"),
        ("hf_vit_eager", {}, "materialised"),
        ("levit", {}, "materialised"),
        ("hf_vit", {}, "flash"),
    ],
)
def test_attention_kernels(name, settings, kernel):
    model = build(name, **settings)
    assert attention_kernels(lambda: model(images_for(name))) == kernel
    evopatch.apply(model, keep_ratio=0.5)
    assert attention_kernels(lambda: model(images_for(name))) == kernel
    assert attention_kernels(lambda: torch.ones(3).softmax(0)) == "none"


def test_every_round_is_reported():
    result = evopatch.benchmark(evopatch.apply(build("vit")), images(), rounds=5, warm_up=1)
    assert {len(side.seconds) for side in result.sides} == {5}
    assert {side.attention for side in result.sides} == {"flash"}
    assert result.threads == torch.get_num_threads()
    for side, entry in zip(result.sides, result.to_dict()["sides"], strict=True):
        assert list(entry["seconds"]) == list(side.seconds)
        assert side.images_per_second == pytest.approx(2 / sorted(side.seconds)[2])


def test_float32_on_a_gpu_is_warned_of():
    with pytest.warns(evopatch.SpeedWarning, match="without its tensor cores: use --dtype bfloat16"):
        warn_of_slow_float32("cuda:0", Precision.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slow_float32("cuda:0", Precision.bfloat16)
        warn_of_slow_float32("cpu", Precision.float32)


def test_benchmark_of_several_settings():
    model = evopatch.apply(build("vit")).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = [EvoConfig(keep_ratio=0.7), EvoConfig(keep_ratio=0.3)]
    rounds = []
    result = evopatch.benchmark(model, images(), configs, rounds=4, warm_up=2, on_round=lambda: rounds.append(1))
    assert len(rounds) == 6
    assert [side.name for side in result.sides] == ["unpatched", "keep 0.7", "keep 0.3"]
    unpatched, mild, strong = result.sides
    assert unpatched.speed_up == unpatched.flops == unpatched.efficiency == 1
    assert 1 > mild.flops > strong.flops
    assert mild.flops == pytest.approx(evopatch.profile(evopatch.apply(build("vit"), 0.7), SIZE).ratio)
    assert strong.speed_up_spread[0] <= strong.speed_up <= strong.speed_up_spread[1]
    assert strong.efficiency == strong.speed_up * strong.flops
    assert strong.memory > 0
    assert (result.batch_size, result.device, result.dtype, result.train) == (len(images()), "cpu", "float32", False)
    assert json.loads(json.dumps(result.to_dict()))["sides"][2]["config"]["keep_ratio"] == 0.3
    assert evopatch.config_of(model) == EvoConfig()
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_unpatched_side_is_the_stock_model(monkeypatch):
    stepped = {}

    def record(calls, device, rounds, warm_up, on_round):
        stepped.update({name: call() for name, call in calls.items()})
        return {name: [1.0] * rounds for name in calls}

    monkeypatch.setattr(sys.modules["evopatch.measure.comparison"], "alternate", record)
    model = build("vit").eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
    evopatch.apply(model)
    with torch.no_grad():
        patched = model(x)
    evopatch.benchmark(model, x, rounds=2)
    assert torch.equal(stepped["unpatched"], expected)
    assert torch.equal(stepped["keep 0.5"], patched)
    assert not torch.equal(patched, expected)


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_benchmark_of_training(name):
    model = evopatch.apply(build(name)).eval()
    model.requires_grad_(False)
    result = evopatch.benchmark(model, images(), rounds=2, warm_up=1, train=True)
    assert result.train
    forward = evopatch.benchmark(model, images(), rounds=2, warm_up=1).sides[1]
    patched = result.sides[1]
    assert patched.flops == pytest.approx(forward.flops, abs=0.05)
    assert patched.memory > 2 * forward.memory
    assert patched.memory < result.sides[0].memory
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_inference_mode_around_it_changes_nothing():
    model = evopatch.apply(build("vit"))
    expected = evopatch.profile(model, SIZE)
    assert expected.activations > 0
    with torch.inference_mode():
        assert evopatch.profile(model, SIZE) == expected
        result = evopatch.benchmark(model, images().clone(), rounds=1, warm_up=0, train=True)
        assert torch.is_inference_mode_enabled()
    assert result.sides[1].memory > expected.memory


@pytest.mark.slow
def test_benchmark_compiled():
    model = evopatch.apply(build("vit", depth=3), config=EvoConfig(start=1, stages=1))
    torch._dynamo.reset()
    result = evopatch.benchmark(model, images(), rounds=2, warm_up=1, compile=True)
    assert result.compiled
    assert result.sides[1].memory > 0


@pytest.mark.parametrize("size", [64, (64, 64), (3, 64, 64.0), (3, 0, 64), "3x64x64"])
def test_profile_of_no_image_size(size):
    with pytest.raises(evopatch.ConfigError, match=r"input_size=.*: expected \(channels, height, width\) in pixels"):
        evopatch.profile(evopatch.apply(build("vit")), size)


@pytest.mark.parametrize("batch", [(3, 64, 64), torch.zeros(3, 64, 64)])
def test_benchmark_of_no_batch(batch):
    with pytest.raises(evopatch.DataError, match=r"batch is .*(tuple|\(3, 64, 64\)).*: expected a tensor \(B, 3,"):
        evopatch.benchmark(evopatch.apply(build("vit")), batch)


def test_benchmark_of_no_rounds():
    with pytest.raises(evopatch.ConfigError, match="rounds=0: expected at least 1"):
        evopatch.benchmark(evopatch.apply(build("vit")), images_for("vit"), rounds=0)


def test_benchmark_of_an_unpatched_model_is_refused():
    with pytest.raises(NotPatchedError):
        evopatch.benchmark(build("vit"), images())
    with pytest.raises(ConfigError):
        evopatch.benchmark(evopatch.apply(build("vit")), images(), [EvoConfig(stages=[9])])


@pytest.mark.parametrize("name", ["unpatched", "keep 0.5"])
def test_a_peer_never_takes_the_place_of_a_side(name):
    def runs(*args):
        raise AssertionError("nothing is run before")

    peer = build("vit")
    peer.forward = runs
    with pytest.raises(ConfigError, match=f"a peer is named '{name}', as one of the sides .*: expected another name"):
        evopatch.benchmark(evopatch.apply(build("vit")), images(), peers={name: peer}, rounds=1, warm_up=0)


def slow_merge(x, size, metric, r):
    """One image after the other, one pair after the other."""
    merged, sizes = [], []
    for tokens, sizes_of, features in zip(x, size, metric, strict=True):
        unit = features / features.norm(dim=-1, keepdim=True)
        a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
        edges = []
        for i in a[1:]:  # the first is the class token
            similarity = [(unit[i] @ unit[j]).item() for j in b]
            edges.append((max(similarity), i, b[similarity.index(max(similarity))]))
        gone = sorted(edges, reverse=True)[:r]
        weighted, total = tokens * sizes_of, sizes_of.clone()
        for _, i, j in gone:
            weighted[j] += weighted[i]
            total[j] += total[i]
        left = [i for i in a if i not in {i for _, i, _ in gone}] + b
        merged.append((weighted / total)[left])
        sizes.append(total[left])
    return torch.stack(merged), torch.stack(sizes)


def test_token_merging_agrees_with_a_slow_reference():
    torch.manual_seed(0)
    x, metric = torch.randn(2, 14, 6), torch.randn(2, 14, 5)
    size = torch.randint(1, 4, (2, 14, 1)).float()
    for r in (1, 3, 6):
        expected, expected_size = slow_merge(x, size, metric, r)
        found, found_size = token_merging.merge(x, size, metric, r)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found_size, expected_size)
        assert torch.equal(found[:, 0], x[:, 0])
    assert token_merging.merge(x, None, metric, 20)[0].shape == (2, 8, 6)


def test_token_merging_of_nothing_is_the_model_and_meets_the_flops():
    model = build("dinov2", class_token=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(token_merging.TokenMerging(model, 0)(images()), model(images()))
        image = images()[:1]
        whole, _ = count_flops(lambda: model(image))
        merging = token_merging.at_flops(model, image, int(0.6 * whole))
        found, _ = count_flops(lambda: merging(image))
    assert 0.5 * whole < found <= 0.6 * whole
