"""`evopatch.verify`: holds for sound models, and each check notices a model that breaks its promise alone."""

import json
from dataclasses import replace

import pytest
import torch
from matrix import cases, patched
from variants import build, images_for

import evopatch
from evopatch.forward import host_state, ranking, tokens
from evopatch.forward.ranking import select_matched
from evopatch.forward.tokens import distribute, merge
from evopatch.measure import verification
from evopatch.patching.handle import Patched

CHECKS = (
    "keep ratio 1 is the unpatched model",
    "another run gives the same",
    "other neighbours change nothing",
    "an image alone gives the same",
    "finite in float32",
    "finite in bfloat16",
    "finite in float16",
    "compiled gives the same",
)


def failed(found):
    return [check.name for check in found.checks if check.result == "failed"]


@cases("name", ["vit", "hf_vit", "levit", "swin"], fast=["vit", "swin"])
def test_a_sound_model_passes_and_stays_as_it_is(name):
    model, x = patched(name).train(), images_for(name, 4)
    model.requires_grad_(False)
    parameter = next(model.parameters()).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    modules = [(type(module), dict(vars(module))) for module in model.modules()]
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, evopatch.config_of(model)
    with torch.enable_grad():
        found = evopatch.verify(model, x)
    assert found.passed, str(found)
    assert tuple(check.name for check in found.checks) == CHECKS
    assert [check.result for check in found.checks] == ["ok"] * 7 + ["skipped"]
    assert found.checks[3].bound < 2e-5
    assert all(f"{name} " in str(found) or str(found).endswith(name) for name in CHECKS)
    assert f"{CHECKS[0]}  0 (at most 0)" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["passed"]
    assert model.training
    assert evopatch.config_of(model) == config
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(type(module), dict(vars(module))) for module in model.modules()] == modules


def test_where_nothing_is_finite_nothing_passes():
    model, x = patched("vit"), images_for("vit", 4)
    with pytest.raises(evopatch.DataError, match=r"images \(4, 3, 40, 40\) torch.float32: expected finite"):
        evopatch.verify(model, x * float("inf"))
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(evopatch.DataError, match="no output of the unpatched VisionTransformer is finite"):
        evopatch.verify(model, x)


def at_keep_ratio_one(monkeypatch):
    own = host_state.plan_blocks

    def nearly(config, *depths, **options):
        return own(replace(config, keep_ratio=0.99) if config.keep_ratio == 1 else config, *depths, **options)

    monkeypatch.setattr(host_state, "plan_blocks", nearly)


def with_what_ran_before(monkeypatch):
    runs = iter(range(10**6))
    monkeypatch.setattr(tokens, "distribute", lambda *args: distribute(*args) * (1 + 1e-7 * (next(runs) % 3)))


def with_other_images_before(monkeypatch):
    seen = set()

    def leaking(h, *args):
        seen.add(h.sum().item())
        return distribute(h, *args) * (1 + 1e-3 * (len(seen) > 3))  # more than the three runs of the first images

    monkeypatch.setattr(tokens, "distribute", leaking)


def by_its_neighbours(monkeypatch):
    def of_all(g, *args):
        return select_matched(g.mean(0, keepdim=True).expand_as(g), *args)

    monkeypatch.setattr(ranking, "select_matched", of_all)


def with_the_batch_size(monkeypatch):
    monkeypatch.setattr(tokens, "merge", lambda x, partition: merge(x, partition) * (1 + 1e-4 / len(x)))


def in_float16(monkeypatch):
    def overflowing(x, partition):
        return merge(x * 1e5, partition) / 1e5 if x.dtype == torch.float16 else merge(x, partition)

    monkeypatch.setattr(tokens, "merge", overflowing)


def when_compiled(monkeypatch):
    def other(g, *args):
        return select_matched(g.flip(1) if torch.compiler.is_compiling() else g, *args)

    monkeypatch.setattr(ranking, "select_matched", other)


BROKEN = {
    at_keep_ratio_one: [0],
    with_what_ran_before: [1],
    with_other_images_before: [1, 3],
    by_its_neighbours: [2, 3],
    with_the_batch_size: [3],
    in_float16: [6],
    when_compiled: [7],
}


@pytest.mark.parametrize(
    "broken",
    # The last one compiles twice.
    [pytest.param(b, marks=[pytest.mark.slow] * (b is when_compiled), id=b.__name__) for b in BROKEN],
)
def test_each_check_notices_what_it_is_for(broken, monkeypatch):
    torch._dynamo.reset()
    model, x = patched("vit"), images_for("vit", 4)
    compiled = "eager" if broken is when_compiled else False
    assert evopatch.verify(model, x, compile=compiled).passed
    torch._dynamo.reset()
    broken(monkeypatch)
    assert failed(evopatch.verify(model, x, compile=compiled)) == [CHECKS[index] for index in BROKEN[broken]]


def test_what_the_unpatched_model_does_too_is_no_failure():
    """Outputs that differ from run to run, and overflow."""
    model, x = patched("vit"), images_for("vit", 4)
    generator = torch.Generator().manual_seed(0)

    def noisy(module, args, out):
        noise = 1e-6 * torch.randn(out.shape, generator=generator).to(out.dtype)
        return out * 1e6 if out.dtype == torch.float16 else out + noise

    model.head.register_forward_hook(noisy)
    found = evopatch.verify(model, x)
    assert "doesn't repeat itself" in found.checks[1].note
    assert found.checks[1].bound > 0
    assert found.checks[6].result == "skipped"
    assert "of the unpatched model aren't finite" in found.checks[6].note


def test_a_near_tie_is_allowed_to_turn_and_nothing_else_is(monkeypatch):
    """Of many images one whose selection a little noise decides, and another one, moved as far as that one."""
    monkeypatch.setattr(verification, "NOISE", 200)  # or thousands of images would be needed to find one
    sides = verification._Sides(Patched(patched("vit")), images_for("vit", 64))
    with torch.no_grad():
        own, stock = sides.moves
        near, far = own.argmax(), own.argmin()
        assert own[near] > 2 * verification.SLACK * stock.max(), "no image is near a tie"
        moved = torch.zeros(2, 64, dtype=torch.float64)
        moved[0, near] = moved[1, far] = own[near]
        found = [sides.up_to_rounding("name", images, torch.zeros_like(images)) for images in moved]
    assert [check.result for check in found] == ["ok", "failed"]
    assert found[0].note == "1 of 64 images near a tie"


def test_a_model_that_cannot_be_compiled():
    model, x = patched("vit"), images_for("vit")
    found = evopatch.verify(model, x, compile="no_such_backend")
    assert found.checks[-1].result == "skipped"
    assert "the unpatched model doesn't compile" in found.checks[-1].note


def test_what_is_refused():
    with pytest.raises(evopatch.NotPatchedError, match="call evopatch.apply"):
        evopatch.verify(build("vit"), images_for("vit"))
    for images in (images_for("vit", 1), images_for("vit")[0], "images"):
        with pytest.raises(evopatch.DataError, match="at least 2 images"):
            evopatch.verify(patched("vit"), images)
    with pytest.raises(evopatch.DataError, match=r"torch.int32: expected finite floating-point numbers"):
        evopatch.verify(patched("vit"), images_for("vit").int())
