"""The contract that every adapter passes, for every structure it serves; each row with a control that can fail."""

import copy
import io
import pickle
import threading

import pytest
import torch
from timm.utils import ModelEmaV3
from variants import (
    FLAT,
    PYRAMIDS,
    SIZE,
    TIMM_VARIANTS,
    TRANSFORMERS_PYRAMIDS,
    TRANSFORMERS_VARIANTS,
    VARIANTS,
    between,
    build,
    call,
    images_for,
)

import evopatch
from evopatch import EvoConfig
from evopatch.plan import plan_blocks

REPRESENTATIVES = ("matched", "single", "none")
EVERY = pytest.mark.parametrize("name", sorted(VARIANTS))
EVERY_FLAT = pytest.mark.parametrize("name", sorted(FLAT))
EVERY_TIMM = pytest.mark.parametrize("name", sorted(TIMM_VARIANTS))
CHECKPOINTING = pytest.mark.parametrize("name", sorted(set(VARIANTS) - set(TRANSFORMERS_PYRAMIDS)))
TYPICAL = pytest.mark.parametrize(
    "name",
    ["vit", "gap", "relpos", "rope", "levit", "levit_conv", "hf_vit", "hf_dinov2_swiglu", "hf_siglip", "hf_levit"],
)


def moved(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@EVERY
@torch.no_grad()
def test_keep_ratio_one_is_the_original_forward(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(call(model, x), original)
    evopatch.set_keep_ratio(model, 0.5)
    assert torch.isfinite(call(model, x)).all()
    assert moved(call(model, x), original) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@EVERY_FLAT
@torch.no_grad()
def test_observing_alone_changes_nothing(name):
    """A first run that keeps everything still computes class attention beside the original attention."""
    model, x = build(name), images_for(name)
    original = between(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=[1.0, 0.3], stages=[2, 4]))
    observed = between(model, x)
    for index in range(4):
        assert torch.equal(observed[index], original[index])
    assert moved(observed[4], original[4]) > 1e-4


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
    x = images_for(name)
    before = call(copy.deepcopy(model), x)  # LeViT keeps position biases from its first forward on
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(call(model, x), call(evopatch.apply(other), x))
    assert moved(call(model, x), before) > 1e-4


@EVERY
@torch.no_grad()
def test_remove_restores_the_model(name):
    model, x = build(name), images_for(name)
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


@EVERY_FLAT
@pytest.mark.parametrize("selection", ["stage", "layer"])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
@torch.no_grad()
def test_tokens_between_the_blocks_are_the_full_grid(name, representative, selection):
    model, x = build(name), images_for(name)
    original = between(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative, selection=selection))
    plain, tokens = call(model, x), between(model, x)
    assert [t.shape for t in tokens] == [t.shape for t in original]
    assert len(tokens) == 6
    if name in TRANSFORMERS_VARIANTS:
        torch.testing.assert_close(call(model, x, output_hidden_states=True), plain, atol=2e-5, rtol=2e-5)
    # Blocks before the first selection are as unpatched; later ones aren't.
    assert torch.equal(tokens[1], original[1])
    assert moved(tokens[2], original[2]) > 1e-4


@EVERY_TIMM
@pytest.mark.parametrize("selection", ["stage", "layer"])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
@torch.no_grad()
def test_looking_between_the_blocks_changes_nothing(name, representative, selection):
    model, x = build(name), images_for(name)
    evopatch.apply(model, config=EvoConfig(representative=representative, selection=selection))
    plain = model.forward_features(x)
    final, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == 6
    assert all(i.shape == (2, 48, 5, 5) for i in intermediates)
    scale = 1.5 if name == "subclass" else 1.0
    torch.testing.assert_close(final * scale, plain, atol=2e-5, rtol=2e-5)
    early = model.forward_intermediates(x, indices=[1, 3], stop_early=True, intermediates_only=True)
    assert torch.equal(early[1], intermediates[3])
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(model.forward_intermediates(x)[1][-1], intermediates[-1]) > 1e-4


@EVERY
@pytest.mark.parametrize("representative", REPRESENTATIVES)
@torch.no_grad()
def test_an_images_result_does_not_depend_on_its_batch(name, representative):
    model, x = build(name), images_for(name, 4)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    together, alone = call(model, x), torch.cat([call(model, image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
    assert moved(together[0], together[1]) > 1e-4


@EVERY
@torch.no_grad()
def test_deepcopy_pickle_and_ema_after_a_forward(name):
    model, x = evopatch.apply(build(name)), images_for(name)
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


@EVERY
@torch.no_grad()
def test_compiles_to_one_graph_without_recompiling(name):
    torch._dynamo.reset()
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    # torch.compile breaks the graph at the zero-argument super() of a subclassed forward_features.
    compiled = torch.compile(model, fullgraph=name != "subclass", backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = images_for(name, seed=2)
        torch.testing.assert_close(call(compiled, other), call(model, other), atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 0.3)
    changed = call(compiled, x)
    torch.testing.assert_close(changed, call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(changed, expected) > 1e-5


@torch.no_grad()
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x = evopatch.apply(build("vit")), images_for("vit")
    torch.testing.assert_close(call(torch.compile(model, fullgraph=True), x), call(model, x), atol=2e-5, rtol=2e-5)


@EVERY
@torch.no_grad()
def test_exports_and_runs_eagerly_after(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected, original = call(model, x), call(evopatch.remove(copy.deepcopy(model)), x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(call(model, x), expected)
    assert moved(call(exported, x), original) > 1e-4


@pytest.mark.parametrize("representative", REPRESENTATIVES)
@TYPICAL
@torch.no_grad()
def test_onnx_runtime_equals_eager(name, representative, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(name), images_for(name)
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(result, call(model, x), atol=1e-4, rtol=1e-4)
    assert moved(result, original) > 1e-3


def smallest(parameter):
    """A gradient below it is rounding. Some biases shift all logits of a query alike: their true gradient is zero."""
    return 1e-2 if parameter.endswith(("k_proj.bias", "rel_pos.mlp.fc2.bias")) else 1e-3


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(0)  # RelPosMlp has dropout
    call(model, x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def checkpoint(model, reentrant=False):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@CHECKPOINTING
@pytest.mark.parametrize("selection", ["stage", "layer"])
@pytest.mark.parametrize("representative", REPRESENTATIVES)
def test_gradient_checkpointing_changes_no_gradient(name, representative, selection):
    model, x = build(name).train(), images_for(name).requires_grad_()
    original = gradients(model, x)
    evopatch.apply(model, config=EvoConfig(representative=representative, selection=selection))
    plain = gradients(model, x)
    checkpoint(model)
    checkpointed = gradients(model, x)
    assert plain.keys() == checkpointed.keys() == original.keys()
    for parameter, gradient in plain.items():
        scale = gradient.abs().max().item() + smallest(parameter)
        torch.testing.assert_close(checkpointed[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)
    assert max(moved(plain[p], original[p]) for p in plain) > 1e-3


REENTRANT = ["vit", "gap", "dinov2", "parallel"]  # timm's others pass keyword arguments


@pytest.mark.parametrize("name", [*REENTRANT, *sorted(TRANSFORMERS_VARIANTS)])
def test_reentrant_checkpointing_changes_no_gradient(name):
    from timm.layers import set_reentrant_ckpt

    model, x = evopatch.apply(build(name).train()), images_for(name).requires_grad_()
    plain = gradients(model, x)
    checkpoint(model, reentrant=True)
    set_reentrant_ckpt(True)
    try:
        checkpointed = gradients(model, x)
    finally:
        set_reentrant_ckpt(False)
    for parameter, gradient in plain.items():
        scale = gradient.abs().max().item() + smallest(parameter)
        torch.testing.assert_close(checkpointed[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)


@CHECKPOINTING
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(name, checkpointing):
    model = evopatch.apply(build(name).train())
    if checkpointing:
        checkpoint(model)
    a, b = images_for(name, seed=1), images_for(name, seed=2)
    alone = gradients(model, a), gradients(model, b)
    separate = {n: gradient + alone[1][n] for n, gradient in alone[0].items()}
    model.zero_grad()
    losses = []
    for x in (a, b):
        torch.manual_seed(0)
        losses.append(call(model, x).square().sum())
    sum(losses).backward()
    for parameter, gradient in separate.items():
        scale = gradient.abs().max().item() + smallest(parameter)
        together = model.get_parameter(parameter).grad
        torch.testing.assert_close(together, gradient, atol=2e-4 * scale, rtol=1e-3)
    assert any(g.abs().max() > 1e-3 for g in separate.values())


@TYPICAL
@torch.no_grad()
def test_two_threads_on_one_model(name):
    model = evopatch.apply(build(name))
    batches = [images_for(name, seed=seed) for seed in range(8)]
    expected = [call(model, x) for x in batches]
    results = {}

    def work(first):
        for _ in range(5):
            for i in range(first, 8, 2):
                results.setdefault(i, []).append(call(model, batches[i]))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for i, runs in results.items():
        for run in runs:
            torch.testing.assert_close(run, expected[i], atol=1e-5, rtol=1e-5)
    assert moved(expected[0], expected[1]) > 1e-4


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(name, dtype):
    model, x = build(name), images_for(name)
    reference = call(model, x)
    # LeViT keeps position biases, in the former type, until it trains.
    half = evopatch.apply(copy.deepcopy(model).to(dtype).train().eval())
    result = call(half, x.to(dtype))
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    evopatch.set_keep_ratio(half, 1.0)
    stock = moved(call(half, x.to(dtype)).float(), reference)
    patched = call(evopatch.apply(model), x)
    # Half precision may choose a few other tokens; it must stay nearer to its own float32 result than to nothing.
    assert moved(result.float(), patched) < max(4 * stock, 0.5 * patched.abs().max().item())


@EVERY
@torch.no_grad()
def test_autocast(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(model, x)
    assert torch.isfinite(result).all()
    assert moved(result.float(), expected) < 0.5 * expected.abs().max().item()


DYNAMIC = ["vit", "registers", "gap", "rope", "rope_mixed", "eva"]


@pytest.mark.parametrize("name", DYNAMIC)
@torch.no_grad()
def test_dynamic_image_sizes(name):
    model = build(name, dynamic_img_size=True)
    evopatch.apply(model)
    for size in ((SIZE, SIZE), (56, 24), (64, 80)):
        x = images_for(name, size=size)
        result, intermediates = model.forward_intermediates(x)
        assert intermediates[-1].shape[-2:] == (size[0] // 8, size[1] // 8)
        torch.testing.assert_close(model.forward_features(x), result, atol=2e-5, rtol=2e-5)
        selection = evopatch.token_selection(model, x)
        patches = selection.shape[-2] * selection.shape[-1]
        keep = plan_blocks(evopatch.config_of(model), 6)[-1].keep_ratio
        assert selection[:, -1].sum() == 2 * int(patches * keep + 0.5)
        assert moved(result, evopatch.remove(copy.deepcopy(model)).forward_features(x)) > 1e-4


@pytest.mark.parametrize("name", ["vit", "relpos", "relpos_class", "relpos_shared", "rope", "deit_distilled"])
@torch.no_grad()
def test_changed_input_size_of_a_patched_model(name):
    model, twin = evopatch.apply(build(name)), build(name)
    x = images_for(name, size=(64, 48))
    for m in (model, twin):
        m.set_input_size(img_size=(64, 48))
    assert torch.equal(call(model, x), call(evopatch.apply(twin), x))
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 48, 8, 6)


def regularisation(name):
    """The setting by which a model's blocks draw random numbers in training."""
    if name in PYRAMIDS:
        return {"drop_path_rate": 0.3}
    if name not in TRANSFORMERS_VARIANTS or "dino" in name or "registers" in name:
        return {"drop_path_rate": 0.3}
    return {"attention_dropout": 0.3} if name in ("hf_clip", "hf_siglip") else {"hidden_dropout_prob": 0.3}


@EVERY
def test_training_with_drop_path(name):
    model, x = build(name, **regularisation(name)).train(), images_for(name, 8)
    evopatch.apply(model)
    torch.manual_seed(3)
    first = call(model, x)
    torch.manual_seed(3)
    assert torch.equal(call(model, x), first)
    torch.manual_seed(4)
    assert moved(call(model, x), first) > 1e-5
    grads = gradients(model, x)
    assert all(torch.isfinite(g).all() for g in grads.values())
    model.eval()
    assert torch.equal(call(model, x), call(model, x))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "attn_drop_rate") for name in ("vit", "parallel", "eva", "diff")),
        *((name, "attention_probs_dropout_prob") for name in ("hf_vit", "hf_vit_eager", "hf_deit", "hf_dinov2")),
        *((name, "attention_dropout") for name in ("hf_clip", "hf_dinov3")),
    ],
)
def test_attention_dropout_follows_the_mode(name, setting):
    model, x = build(name, **{setting: 0.5}), images_for(name)
    assert torch.equal(call(evopatch.apply(model), x), call(model, x))
    model.train()
    assert moved(call(model, x), call(model, x)) > 1e-4
    model.eval()
    assert torch.equal(call(model, x), call(model, x))


@EVERY
@torch.no_grad()
def test_a_failed_apply_leaves_the_model_untouched(name, monkeypatch):
    model, x = build(name), images_for(name)
    original, classes = call(model, x), [type(m) for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    from evopatch.rewrite import graph

    calls = []

    def failing(block, block_name, spec):
        calls.append(block_name)
        if len(set(calls)) == 5:
            raise evopatch.AttentionNotFoundError("planted")
        return generate(block, block_name, spec)

    generate = graph.generate
    monkeypatch.setattr(graph, "generate", failing)
    with pytest.raises(evopatch.AttentionNotFoundError, match="planted"):
        evopatch.apply(model)
    assert len(set(calls)) == 5
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(call(model, x), original)
