"""The contract for windowed models (Swin, Swin V2) of both libraries; each row with a control that can fail."""

import copy
import io
import pickle
import threading

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from variants_swin import DEPTH, SIZE, TIMM_VARIANTS, TRANSFORMERS_VARIANTS, VARIANTS, between, build, call, images

import evopatch
from evopatch import EvoConfig, ops, window_stream, windows

REPRESENTATIVES = ("matched", "single", "none")
EVERY = pytest.mark.parametrize("name", sorted(VARIANTS))
EVERY_TIMM = pytest.mark.parametrize("name", sorted(TIMM_VARIANTS))
EVERY_TRANSFORMERS = pytest.mark.parametrize("name", sorted(TRANSFORMERS_VARIANTS))
TYPICAL = pytest.mark.parametrize("name", ["swin", "swinv2", "swinv2_cr", "hf_swin", "hf_swinv2"])
EACH_REPRESENTATIVE = pytest.mark.parametrize("representative", REPRESENTATIVES)
EACH_SELECTION = pytest.mark.parametrize("selection", ["stage", "layer"])


def moved(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@EVERY
@torch.no_grad()
def test_keep_ratio_one_is_the_original_forward(name):
    model, x = build(name), images()
    original = call(model, x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(call(model, x), original)
    evopatch.set_keep_ratio(model, 0.5)
    assert torch.isfinite(call(model, x)).all()
    assert moved(call(model, x), original) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@EVERY
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_observing_alone_changes_nothing(name, representative):
    model, x = build(name), images()
    original = between(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=[1.0, 0.3, 1.0], representative=representative))
    observed = between(model, x)
    assert torch.equal(observed[0], original[0])
    assert moved(observed[1], original[1]) > 1e-4


@EVERY
def test_state_dict_is_unchanged_and_a_stock_checkpoint_loads(name):
    model = build(name)
    keys = list(model.state_dict())
    evopatch.apply(model)
    assert list(model.state_dict()) == keys
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    x = images()
    before = call(model, x)
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(call(model, x), call(evopatch.apply(other), x))
    assert moved(call(model, x), before) > 1e-4


@EVERY
@torch.no_grad()
def test_remove_restores_the_model(name):
    model, x = build(name), images()
    original = call(model, x)
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    evopatch.apply(model)
    assert [type(m) for m in model.modules()] != classes
    call(model, x)
    assert evopatch.remove(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())
    assert all(parameters[n] is p for n, p in model.named_parameters())
    assert torch.equal(call(model, x), original)
    evopatch.apply(model)
    assert evopatch.is_patched(model)


@EVERY
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_features_between_the_stages_are_full_grids_and_looking_changes_nothing(name, representative, selection):
    model, x = build(name), images()
    original = between(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative, selection=selection))
    plain, maps = call(model, x), between(model, x)
    assert torch.equal(call(model, x), plain)
    assert [m.shape for m in maps] == [m.shape for m in original]
    assert len(maps) == 3
    assert all(moved(a, b) > 1e-4 for a, b in zip(maps, original, strict=True))
    if name in TIMM_VARIANTS:
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        early = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[1], intermediates[1])
    else:
        assert torch.equal(call(model, x, output_hidden_states=True), plain)


@EVERY
@torch.no_grad()
def test_hooks_on_blocks_see_the_full_grid(name):
    model, x = evopatch.apply(build(name)), images()
    plain, shapes = call(model, x), []
    host = next(iter(evopatch.patch.patched_hosts(model).values()))
    for (path,) in host._evo_patch.blocks:
        host.get_submodule(path).register_forward_hook(
            lambda module, args, out: shapes.append((args[0].shape, (out[0] if isinstance(out, tuple) else out).shape))
        )
    assert torch.equal(call(model, x), plain)
    assert len(shapes) == DEPTH
    assert [a[:-1].numel() for a, _ in shapes] == [2 * n for n in (256, 256, 64, 64, 16, 16)]
    assert all(a == b for a, b in shapes)


@EVERY
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_an_images_result_does_not_depend_on_its_batch(name, representative):
    model, x = build(name), images(4)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    together, alone = call(model, x), torch.cat([call(model, image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
    assert moved(together[0], together[1]) > 1e-4


@EVERY
@torch.no_grad()
def test_deepcopy_pickle_and_ema_after_a_forward(name):
    model, x = evopatch.apply(build(name)), images()
    expected = call(model, x)
    twins = [copy.deepcopy(model), ModelEmaV3(model).module]
    if "backbone" not in name:  # transformers' hooks that record hidden states don't pickle, unpatched either
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(call(twin, x), expected)
        evopatch.set_keep_ratio(twin, 0.25)
        assert moved(call(twin, x), expected) > 1e-5
        assert torch.equal(call(model, x), expected)
        evopatch.remove(twin)
        assert evopatch.is_patched(model)


COMPILED = [*((name, "matched") for name in sorted(VARIANTS)), ("swin", "single"), ("hf_swinv2", "none")]


@pytest.mark.parametrize(("name", "representative"), COMPILED)
@torch.no_grad()
def test_compiles_to_one_graph_without_recompiling(name, representative):
    torch._dynamo.reset()
    model, x = evopatch.apply(build(name), config=EvoConfig(representative=representative)), images()
    expected = call(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(call(compiled, images(seed=2)), call(model, images(seed=2)), atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 0.3)
    changed = call(compiled, x)
    torch.testing.assert_close(changed, call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(changed, expected) > 1e-5


@pytest.mark.parametrize(("name", "representative"), COMPILED)
def test_exports_and_runs_eagerly_after(name, representative):
    model, x = build(name), images()
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    expected = call(model, x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(call(model, x), expected)
    assert moved(call(exported, x), original) > 1e-4


@pytest.mark.parametrize(
    ("name", "representative", "size"),
    [
        ("swin", "matched", SIZE),
        ("swin", "single", SIZE),
        ("swin", "none", SIZE),
        ("swinv2", "matched", SIZE),
        ("hf_swin", "matched", (72, 88)),
        ("hf_swinv2", "matched", SIZE),
    ],
)
@torch.no_grad()
def test_onnx_runtime_equals_eager(name, representative, size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(name), images(size=size)
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(result, call(model, x), atol=1e-4, rtol=1e-4)
    assert moved(result, original) > 1e-3


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(0)
    call(model, x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().item() + 1e-2
        torch.testing.assert_close(found[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)


def checkpoint(model, reentrant=False):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@EVERY
@EACH_SELECTION
@EACH_REPRESENTATIVE
def test_gradient_checkpointing_changes_no_gradient(name, representative, selection):
    # DropPath: a recomputed block has to draw the same.
    model, x = build(name, drop_path_rate=0.2).train(), images().requires_grad_()
    original = gradients(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative, selection=selection))
    plain = gradients(model, x)
    checkpoint(model)
    assert plain.keys() <= original.keys()
    assert_same_gradients(gradients(model, x), plain)
    assert max(moved(plain[p], original[p]) for p in plain) > 1e-3


@pytest.mark.parametrize("name", ["hf_swin", "hf_swinv2", "hf_swin_backbone", "hf_swinv2_backbone"])
def test_checkpointed_stages_keep_less(name):
    """The stages really are checkpointed while patched."""
    model, x = evopatch.apply(build(name).train()), images()

    def kept():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            call(model, x)
        return sum(saved)

    plain = kept()
    checkpoint(model)
    assert kept() < plain / 3


@EVERY
def test_reentrant_checkpointing_changes_no_gradient(name):
    from timm.layers import set_reentrant_ckpt

    model, x = evopatch.apply(build(name, drop_path_rate=0.2).train()), images().requires_grad_()
    plain = gradients(model, x)
    checkpoint(model, reentrant=True)
    set_reentrant_ckpt(True)
    try:
        checkpointed = gradients(model, x)
    finally:
        set_reentrant_ckpt(False)
    assert_same_gradients(checkpointed, plain)


@EVERY
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(name, checkpointing):
    model = evopatch.apply(build(name).train())
    if checkpointing:
        checkpoint(model)
    a, b = images(seed=1), images(seed=2)
    separate = {n: g + gradients(model, b)[n] for n, g in gradients(model, a).items()}
    model.zero_grad()
    losses = [call(model, x).square().sum() for x in (a, b)]
    evopatch.set_keep_ratio(model, 0.2)  # what was begun ends as it began
    sum(losses).backward()
    assert_same_gradients({n: model.get_parameter(n).grad for n in separate}, separate)
    assert any(g.abs().max() > 1e-3 for g in separate.values())


@TYPICAL
@torch.no_grad()
def test_two_threads_on_one_model(name):
    model = evopatch.apply(build(name))
    batches = [images(seed=seed) for seed in range(4)]
    expected = [call(model, x) for x in batches]
    results = {}

    def work(first):
        for _ in range(3):
            for i in range(first, 4, 2):
                results.setdefault(i, []).append(call(model, batches[i]))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for i, runs in results.items():
        for run in runs:
            torch.testing.assert_close(run, expected[i], atol=1e-5, rtol=1e-5)
    assert moved(expected[0], expected[1]) > 1e-4


@EVERY
@EACH_REPRESENTATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(name, dtype, representative):
    model, x = build(name), images()
    reference = call(model, x)
    half = evopatch.apply(copy.deepcopy(model).to(dtype), config=EvoConfig(representative=representative))
    result = call(half, x.to(dtype))
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    evopatch.set_keep_ratio(half, 1.0)
    stock = moved(call(half, x.to(dtype)).float(), reference)
    patched = call(evopatch.apply(model, config=EvoConfig(representative=representative)), x)
    # Half precision may choose a few other tokens; it must stay nearer to its own float32 result than to nothing.
    assert moved(result.float(), patched) < max(4 * stock, 0.5 * patched.abs().max().item())


@EVERY
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_autocast(name, representative):
    model, x = evopatch.apply(build(name), config=EvoConfig(representative=representative)), images()
    expected = call(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(model, x)
    assert torch.isfinite(result).all()
    assert moved(result.float(), expected) < 0.5 * expected.abs().max().item()


@EVERY
def test_training_with_drop_path(name):
    model, x = evopatch.apply(build(name, drop_path_rate=0.3).train()), images(8)
    torch.manual_seed(3)
    first = call(model, x)
    torch.manual_seed(3)
    assert torch.equal(call(model, x), first)
    torch.manual_seed(4)
    assert moved(call(model, x), first) > 1e-5
    assert all(torch.isfinite(g).all() for g in gradients(model, x).values())
    model.eval()
    assert torch.equal(call(model, x), call(model, x))


@TYPICAL
@torch.no_grad()
def test_attention_dropout_follows_the_mode(name):
    setting = "attention_probs_dropout_prob" if name.startswith("hf") else "attn_drop_rate"
    model, x = build(name, **{setting: 0.5}), images()
    assert torch.equal(call(evopatch.apply(model), x), call(model, x))
    model.train()
    assert moved(call(model, x), call(model, x)) > 1e-4
    model.eval()
    assert torch.equal(call(model, x), call(model, x))


@TYPICAL
@torch.no_grad()
def test_a_failed_apply_leaves_the_model_untouched(name):
    model, x = build(name), images()
    original = call(model, x)
    host = next(m for m in model.modules() if hasattr(m, "layers") or hasattr(m, "stages"))
    container = getattr(host, "layers", None) or host.stages
    container[2].blocks[1].forward = container[2].blocks[1].forward
    classes, attributes = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    with pytest.raises(evopatch.UnsupportedModelError, match=r"2\.blocks\.1 \(\w+\) has a forward of its own"):
        evopatch.apply(model)
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(call(model, x), original)


@TYPICAL
@torch.no_grad()
def test_a_block_called_from_outside_is_refused(name):
    model, x = evopatch.apply(build(name)), images()
    block = next(m for m in model.modules() if isinstance(m, window_stream.SlowFastWindowBlock))
    arguments = (torch.randn(2, 256, 24), (16, 16)) if name.startswith("hf") else (torch.randn(2, 16, 16, 24),)
    with pytest.raises(evopatch.BypassError, match=r"0\.blocks\.0 was called from outside"):
        block(*arguments)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.isfinite(call(model, x)).all()
    block(*arguments)
