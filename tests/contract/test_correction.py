"""Corrections of the restored change: they go where the model goes, and say the same however the blocks are run."""

import pytest
import torch
from comparing import moved, twins
from correcting import correct
from matrix import cases, every
from variants import FLAT, build, call, images_for

import evopatch
from evopatch import EvoConfig, UnsupportedModelError
from evopatch.algorithm.correction import Regression, missed
from evopatch.algorithm.partition import distances, merge
from evopatch.algorithm.selection import select_matched
from evopatch.forward.learned import correction_of
from evopatch.patching.correcting import runs_of
from evopatch.patching.handle import Patched
from evopatch.patching.learning import learned, set_learned

CONFIG = EvoConfig(stages=(2, 4), keep_ratio=(0.6, 0.4), readout=False)


def corrected(name, config=CONFIG):
    model = evopatch.apply(build(name), config=config)
    correct(model, images_for(name, 16))
    return model


@torch.no_grad()
def test_what_tokens_missed_is_recovered_where_it_is_linear():
    torch.manual_seed(0)
    x, features = torch.randn(3, 2 + 20, 8), torch.nn.functional.normalize(torch.randn(3, 20, 8), dim=-1)
    partition = select_matched(torch.rand(3, 20), features, 6, 2, 0.7)
    rows = merge(x, partition)
    own = rows.gather(1, partition.group.unsqueeze(2).expand(-1, -1, 8))
    thin = torch.randn(8, 2) @ torch.randn(2, 8)
    regression = Regression(8, x.device)
    regression.add(x - own, (x - own) @ thin)
    found = regression.solve(rank=2)
    assert found.down.shape == (8, 2)
    expected = (x - own) @ thin
    assert (expected - missed(distances(x, rows, partition), partition, found)).norm() < 0.1 * expected.norm()
    assert (
        expected - missed(distances(x, rows, partition), partition, regression.solve(rank=1))
    ).norm() > 0.3 * expected.norm()
    alone = (partition.log_size == 0).gather(1, partition.group)  # rows of their own: prefix tokens, and groups of one
    assert alone[:, :2].all()
    assert missed(distances(x, rows, partition), partition, found)[alone].abs().max() < 1e-5


@every(FLAT)
@torch.no_grad()
def test_they_count_and_go_where_the_model_goes(name):
    x, original = images_for(name), call(build(name), images_for(name))
    keys = list(build(name).state_dict())
    model = corrected(name)
    found = call(model, x)
    plain = evopatch.apply(build(name), config=CONFIG)
    assert moved(found, call(plain, x)) > 1e-5
    assert list(model.state_dict()) == keys
    # The last run's patch tokens are put back, too, as nothing is read out.
    assert len(learned(model)) == 4
    assert all(torch.equal(call(twin, x), found) for twin in twins(model, name))
    set_learned(plain, learned(model))
    assert torch.equal(call(plain, x), found)
    with evopatch.full_grid(model):  # every block takes and returns the full grid
        torch.testing.assert_close(call(model, x), found, atol=2e-5, rtol=2e-5)
    # They are for runs of these blocks alone.
    other = EvoConfig(stages=(3, 4), keep_ratio=(0.6, 1.0), readout=False)
    evopatch.set_config(model, other)
    assert torch.equal(call(model, x), call(evopatch.apply(build(name), config=other), x))
    evopatch.remove(model)
    assert torch.equal(call(model, x), original)
    assert not learned(model)
    assert not [name for name, _ in model.named_buffers() if "evo" in name]


@torch.no_grad()
def test_tokens_come_closer_to_what_they_would_have_been():
    model, x = evopatch.apply(build("vit"), config=CONFIG), images_for("vit", 64, seed=5)
    whole = Patched(model).original().forward_features(x)
    before = (model.forward_features(x) - whole).norm()
    correct(model, images_for("vit", 256))
    assert (model.forward_features(x) - whole).norm() < 0.97 * before


@pytest.mark.parametrize("name", ["vit", "hf_dinov2"])
def test_gradients_pass(name):
    model, x = corrected(name), images_for(name).requires_grad_()
    out = call(model, x)
    out.square().sum().backward()
    assert x.grad.abs().max() > 0
    # The derivative along the gradient itself, by differences small enough that no choice turns.
    with torch.no_grad():
        step = 1e-3 * x.grad / x.grad.norm()
        change = (call(model, x + step).square().sum() - call(model, x - step).square().sum()) / 2
    assert change.item() == pytest.approx(1e-3 * x.grad.norm().item(), rel=0.1)


@cases("name", ["vit", "hf_dinov2"], fast=["vit"])
@torch.no_grad()
def test_compiled_exported_and_in_half_precision(name):
    torch._dynamo.reset()
    model, x = corrected(name), images_for(name)
    expected = call(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(program, x), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(call(model.bfloat16(), x.bfloat16()).float(), expected, atol=0.2, rtol=0.2)


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, x = corrected("hf_vit"), images_for("hf_vit")
    evopatch.save_pretrained(model, tmp_path)
    loaded = evopatch.load_pretrained(tmp_path)
    assert torch.equal(call(loaded, x), call(model, x))
    assert learned(loaded).keys() == learned(model).keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("blocks.3|from 2|up"), "lacks a part"),
        (lambda own: own.update({"blocks.3|from 2|up": torch.ones(3, 48)}), "lacks a part"),
        (lambda own: own.update({"blocks.3|from 2|down": torch.ones(47, 48)}), "don't fit each other"),
        (lambda own: own.update({"blocks.3|from 2|down": own["blocks.3|from 2|down"] / 0}), "finite numbers"),
        (lambda own: own.update({f"head|from 2|{part}": torch.ones(48, 48) for part in ("down", "up")}), "no patched"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model = corrected("vit")
    own = learned(model)
    values = dict(own)
    change(values)
    with pytest.raises(UnsupportedModelError, match=message):
        set_learned(model, values)
    assert learned(model).keys() == own.keys()


def test_runs():
    state = Patched(evopatch.apply(build("vit"), config=CONFIG)).host.state
    assert runs_of(state.plans) == [(2, 3), (4, 5)]
    assert correction_of(build("vit").blocks[3], 2) is None
