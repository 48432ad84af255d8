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
from evopatch import EvoConfig
from evopatch.forward import windowed
from evopatch.patching.handle import Patched

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
    host = Patched(model).host.module
    for (path,) in host._evo_state.blocks:
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


COMPILED = [
    ("swin", "matched"),
    ("swin", "single"),
    ("swinv2_cr", "matched"),
    ("hf_swin", "none"),
    ("hf_swinv2", "matched"),
]


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
    assert moved(call(model, images(seed=2)), expected) > 1e-4
    if (name, representative) == ("swin", "matched"):
        evopatch.set_keep_ratio(model, 0.3)
        changed = call(compiled, x)
        torch.testing.assert_close(changed, call(model, x), atol=2e-5, rtol=2e-5)
        assert moved(changed, expected) > 1e-5


@pytest.mark.parametrize(
    ("name", "representative"), [*COMPILED, ("swinv2", "matched"), ("hf_swin_backbone", "matched")]
)
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
        ("swin", "single", SIZE),
        ("swinv2", "matched", SIZE),
        ("hf_swin", "matched", (72, 88)),
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
        scale = gradient.abs().max().item() + 5e-2  # a key bias has a true gradient of zero
        torch.testing.assert_close(found[parameter], gradient, atol=2e-4 * scale, rtol=1e-3)


def checkpoint(model, reentrant=False):
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


@EVERY
@pytest.mark.parametrize(
    ("representative", "selection"),
    [("matched", "stage"), ("matched", "layer"), ("single", "stage"), ("none", "layer")],
)
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


@TYPICAL
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(name, checkpointing):
    model = evopatch.apply(build(name).train())
    if checkpointing:
        checkpoint(model)
    a, b = images(seed=1), images(seed=2)
    first, second = gradients(model, a), gradients(model, b)
    separate = {n: g + second[n] for n, g in first.items()}
    model.zero_grad()
    losses = []
    for x in (a, b):
        torch.manual_seed(0)  # Swin V2 Cr has dropout
        losses.append(call(model, x).square().sum())
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
    half = evopatch.apply(copy.deepcopy(model).to(dtype), config=EvoConfig(representative=representative))
    result = call(half, x.to(dtype))
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    expected = call(evopatch.apply(model, config=EvoConfig(representative=representative)), x)
    # Half precision may choose a few other windows or tokens.
    assert torch.cosine_similarity(result.float().flatten(), expected.flatten(), dim=0) > 0.7


@EVERY
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_autocast(name, representative):
    model, x = evopatch.apply(build(name), config=EvoConfig(representative=representative)), images()
    expected = call(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(model, x)
    assert torch.isfinite(result).all()
    assert torch.cosine_similarity(result.float().flatten(), expected.flatten(), dim=0) > 0.7


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
    block = next(m for m in model.modules() if isinstance(m, windowed.SlowFastWindowBlock))
    arguments = (torch.randn(2, 256, 24), (16, 16)) if name.startswith("hf") else (torch.randn(2, 16, 16, 24),)
    with pytest.raises(evopatch.BypassError, match=r"0\.blocks\.0 was called from outside"):
        block(*arguments)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.isfinite(call(model, x)).all()
    block(*arguments)


# Half of the pixels' rows and columns fill no window: grids of 22 by 15, 13 by 19, and their halves.
SHAPES = [(SIZE, SIZE), (88, 60), (52, 76)]
POSITION_BIASES = ("bias_table", "cpb_mlp.2", "position_bias_mlp.2", "meta_mlp.fc2")


@TYPICAL
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("representative", ["matched", "none"])
@torch.no_grad()
def test_with_every_window_or_token_slow_the_views_equal_the_blocks(name, size, representative, monkeypatch):
    """Shifts, padding, masks and biases are in their places: the order of windows and tokens is another one."""
    model, x = build(name, **({} if name.startswith("hf") else {"img_size": size})), images(size=size)
    if representative == "matched" and size != (SIZE, SIZE):
        # All padding of a window is one row there, with the mean of its biases.
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in POSITION_BIASES):
                parameter.zero_()
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=0.9, schedule="constant", representative=representative))
    assert moved(call(model, x), original) > 1e-4
    match, merge, entered = windowed.match_tokens, windowed.merge, []
    monkeypatch.setattr(windowed, "num_slow", lambda number, ratio: number - (representative == "matched"))
    monkeypatch.setattr(windowed, "match_tokens", lambda metric, keep, *a: match(metric, a[1].area, *a))
    monkeypatch.setattr(windowed, "merge", lambda *a: entered.append(merge(*a)) or entered[-1])
    torch.testing.assert_close(call(model, x), original, atol=2e-5, rtol=2e-5)
    assert len(entered) == (5 if representative == "matched" or size != (SIZE, SIZE) else 3)


def transformers_weights(model):
    """timm's Swin weights by transformers' names."""
    names = {"patch_embed.proj.": "embeddings.patch_embeddings.projection.", "patch_embed.norm.": "embeddings.norm."}
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    table = "relative_position_bias_table"
    found = {}
    for name, value in model.state_dict().items():
        start = next((old for old in names if name.startswith(old)), None)
        if start is not None:
            found["swin." + name.replace(start, names[start])] = value
        elif name.startswith("norm."):
            found["swin.layernorm." + name[5:]] = value
        elif name.startswith("head.fc."):
            found["classifier." + name[8:]] = value
        elif ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            found[f"swin.encoder.layers.{int(stage) - 1}.{rest}"] = value
        elif ".qkv." in name:
            before, after = name.split("attn.qkv.")
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                found[f"swin.encoder.{before}attention.{part}.{after}"] = piece
        else:
            for old, new in (*inner.items(), (f"attn.{table}", f"attention.relative_position_bias.{table}")):
                name = name.replace(old, new)
            found["swin.encoder." + name] = value
    return found


@EACH_REPRESENTATIVE
@torch.no_grad()
def test_the_same_weights_give_the_same_in_both_libraries(representative):
    first, second, x = build("swin"), build("hf_swin"), images()
    second.load_state_dict(transformers_weights(first))
    torch.testing.assert_close(call(second, x), call(first, x), atol=2e-5, rtol=2e-5)
    for model in (first, second):
        evopatch.apply(model, config=EvoConfig(representative=representative, keep_ratio=[0.6, 0.5, 0.5]))
    torch.testing.assert_close(call(second, x), call(first, x), atol=2e-5, rtol=2e-5)
    selection = evopatch.token_selection(first, x)
    assert torch.equal(evopatch.token_selection(second, x), selection)
    assert selection.shape == (2, DEPTH, 16, 16)
    assert selection[:, 0].all()
    if representative == "matched":  # of each 16 tokens in a window
        assert (~selection[:, 1]).sum() == 2 * 16 * (16 - 10)
    else:
        assert (~selection[:, 1]).sum() == 2 * 16 * (16 - 10)  # of 16 windows
        assert selection[:, 4:].all()  # a single window
    assert torch.equal(evopatch.token_groups(first, x), evopatch.token_groups(second, x))


@TYPICAL
def test_by_default_all_stages_keep_the_same_share(name):
    evopatch.apply(model := build(name), keep_ratio=0.4)
    host = Patched(model).host.module
    assert [plan.keep_ratio for plan in host._evo_state.plans] == [1.0, *[0.4] * 5]


@torch.no_grad()
def test_profile_counts_the_tokens_that_went_through():
    model = evopatch.apply(build("swin"), config=EvoConfig(keep_ratio=[0.6, 0.5, 0.5]))
    profile = evopatch.profile(model, (3, SIZE, SIZE))
    assert [block.tokens for block in profile.blocks] == [256, 160, 32, 32, 8, 8]
    assert all(block.flops < block.flops_unpatched for block in profile.blocks[1:])
    assert 0.45 < profile.ratio < 0.8
    evopatch.set_config(model, EvoConfig(representative="none", keep_ratio=[0.6, 0.5, 0.5]))
    profile = evopatch.profile(model, (3, SIZE, SIZE))
    assert [block.tokens for block in profile.blocks] == [256, 160, 32, 32, 16, 16]


@EVERY_TIMM
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_dynamic_image_sizes(name, representative):
    model = evopatch.apply(build(name, dynamic_img_size=True), config=EvoConfig(representative=representative))
    for size in ((SIZE, SIZE), (88, 60), (32, 100)):
        x = images(size=size)
        result, maps = model.forward_intermediates(x)
        assert maps[0].shape[-2:] == (size[0] // 4, size[1] // 4)
        assert maps[2].shape[-2:] == (-(-size[0] // 16), -(-size[1] // 16))
        assert torch.equal(model.forward_features(x), result)
        selection = evopatch.token_selection(model, x)
        assert selection.shape[-2:] == (size[0] // 4, size[1] // 4)
        assert 0.2 < selection[:, 2].float().mean() < 0.8
        assert moved(result, evopatch.remove(copy.deepcopy(model)).forward_features(x)) > 1e-4


# The others have absolute positions, or a decoder of square images.
@pytest.mark.parametrize("name", [n for n in sorted(TRANSFORMERS_VARIANTS) if not n.endswith(("_model", "_masked"))])
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_other_image_sizes(name, representative):
    model = evopatch.apply(build(name), config=EvoConfig(representative=representative))
    for size in ((88, 60), (70, 100)):  # the second is padded to whole patches
        x = images(size=size)
        maps = between(model, x)
        finest = (-(-size[0] // 4), -(-size[1] // 4))
        merged = 1 if "backbone" in name else 2
        assert maps[0].shape[-2:] == tuple(-(-side // merged) for side in finest)
        assert torch.equal(call(model, x, output_hidden_states=True), call(model, x))
        assert evopatch.token_selection(model, x).shape[-2:] == finest
        assert moved(call(model, x), call(evopatch.remove(copy.deepcopy(model)), x)) > 1e-4


@EVERY_TIMM
@pytest.mark.parametrize(
    "change",
    [
        {"img_size": (96, 56)},
        {"img_size": (96, 56), "window_size": 4},
        {"window_size": (3, 5)},
        {"window_size": 8},
        {"img_size": 48, "window_size": 4, "always_partition": True},
        {"img_size": 40, "window_size": 16},
    ],
)
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_changed_input_and_window_sizes_of_a_patched_model(name, change, representative):
    config = EvoConfig(keep_ratio=0.4, schedule="constant", representative=representative)
    model, twin = evopatch.apply(build(name), config=config), build(name)
    x = images(size=change.get("img_size", SIZE))
    for m in (model, twin):
        m.set_input_size(**change)
    original = call(twin, x)
    result = call(model, x)
    assert torch.isfinite(result).all()
    assert torch.equal(result, call(evopatch.apply(twin, config=config), x))
    single = change.get("window_size") == 16 and representative != "matched"
    assert (moved(result, original) > 1e-4) == (not single)


@torch.no_grad()
def test_a_stage_with_a_single_window_is_left_alone_where_windows_are_chosen():
    model, x = build("swin"), images()
    config = EvoConfig(keep_ratio=[1.0, 1.0, 0.5], representative="single")
    original = call(model, x)
    assert torch.equal(call(evopatch.apply(model, config=config), x), original)
    evopatch.set_config(model, EvoConfig(keep_ratio=[1.0, 1.0, 0.5]))
    assert moved(call(model, x), original) > 1e-4


@torch.no_grad()
def test_windows_larger_than_the_grid_in_transformers():
    """The layer itself makes its window smaller then, and keeps it so."""
    model, x = build("hf_swin", image_size=32), images(size=32)  # grids of 8, 4 and 2
    for stage in model.swin.encoder.layers[2:]:
        for layer in stage.blocks:
            layer.attention.relative_position_bias = type(layer.attention.relative_position_bias)(4, (2, 2))
    twin = copy.deepcopy(model)
    original = call(twin, x)
    evopatch.apply(model, keep_ratio=0.5)
    assert torch.isfinite(call(model, x)).all()
    assert moved(call(model, x), original) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@EVERY_TRANSFORMERS
@torch.no_grad()
def test_attentions_between_windows_are_refused(name):
    model, x = build(name, attn_implementation="eager"), images()
    expected = model(x, output_attentions=True).attentions
    evopatch.apply(model)
    with pytest.raises(evopatch.UnsupportedInputError, match="output_attentions was asked of"):
        model(x, output_attentions=True)
    evopatch.set_keep_ratio(model, 1.0)
    found = model(x, output_attentions=True).attentions
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EVERY_TRANSFORMERS
@torch.no_grad()
def test_hidden_states_of_transformers_are_complete(name):
    model, x = build(name), images()
    expected = model(x, output_hidden_states=True)
    evopatch.apply(model)
    found = model(x, output_hidden_states=True)
    assert [h.shape for h in found.hidden_states] == [h.shape for h in expected.hidden_states]
    assert len(found.hidden_states) == 4
    assert moved(found.hidden_states[2], expected.hidden_states[2]) > 1e-4


@EVERY_TIMM
@torch.no_grad()
def test_features_only(name):
    architecture = {
        "swin": "swin_tiny_patch4_window7_224",
        "swinv2": "swinv2_tiny_window8_256",
        "swinv2_cr": "swinv2_cr_tiny_224",
    }[name]
    small = {"img_size": SIZE, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
    model, x = timm.create_model(architecture, features_only=True, out_indices=(0, 1, 2), **small).eval(), images()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.08)
    original = model(x)
    keys = list(model.state_dict())
    evopatch.apply(model)
    features = model(x)
    assert list(model.state_dict()) == keys
    assert [f.shape for f in features] == [f.shape for f in original]
    assert all(moved(a, b) > 1e-4 for a, b in zip(features, original, strict=True))
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled[2], features[2], atol=2e-5, rtol=2e-5)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x)[2], features[2])
    whole = timm.create_model(architecture, **small).eval()
    weights = {k.replace("layers_", "layers.").replace("stages_", "stages."): v for k, v in model.state_dict().items()}
    whole.load_state_dict(weights, strict=False)
    maps = evopatch.apply(whole).forward_intermediates(x, intermediates_only=True)
    for found, expected in zip(features, maps, strict=True):
        assert torch.equal(found if found.shape == expected.shape else found.permute(0, 3, 1, 2), expected)
    evopatch.remove(model)
    assert torch.equal(model(x)[2], original[2])


def test_a_feature_extractor_without_swin_stages_is_refused():
    model = timm.create_model("resnet18", features_only=True)
    with pytest.raises(evopatch.UnsupportedModelError, match="found nothing to patch"):
        evopatch.apply(model)


@EACH_REPRESENTATIVE
def test_upernet_on_a_patched_backbone(representative):
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 4, 4, 4], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=24, num_labels=5, auxiliary_channels=24, auxiliary_in_channels=96
    )
    model = UperNetForSemanticSegmentation(config).eval()
    x = images(1, (512, 384))
    with torch.no_grad():
        original = model(x).logits
    evopatch.apply(model, config=EvoConfig(representative=representative))
    with torch.no_grad():
        result = model(x).logits
    assert result.shape == original.shape == (1, 5, 512, 384)
    assert moved(result, original) > 1e-4
    assert torch.cosine_similarity(result.flatten(), original.flatten(), dim=0) > 0.9
    model.train()
    labels = torch.zeros(1, 512, 384, dtype=torch.long)
    model(torch.cat([x, x]), labels=torch.cat([labels, labels])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters() if p.grad is not None)
    if representative == "matched":
        assert evopatch.profile(model.eval(), (3, 128, 96)).ratio < 0.97


NAMES = sorted({*timm.list_models("swin_*"), *timm.list_models("swinv2*")})
SHRUNK = {"embed_dim": 16, "num_heads": (2, 2, 4, 4)}


def test_the_families_are_as_large_as_expected():
    assert len(timm.list_models("swin_*")) >= 9
    assert len(timm.list_models("swinv2*")) >= 28


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_name(name):
    model = timm.create_model(name, device="meta").eval()
    x = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    shape = model(x).shape
    evopatch.apply(model, keep_ratio=0.5)
    assert model(x).shape == shape  # on the meta device nothing can wait for a value
    torch.manual_seed(0)
    model = timm.create_model(name, **SHRUNK, depths=(2, 2, 2, 2)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(x.shape)
    original = model.forward_features(x)
    for representative in REPRESENTATIVES:
        evopatch.apply(model, config=EvoConfig(representative=representative))
        changed = model.forward_features(x)
        assert torch.isfinite(changed).all()
        assert moved(changed, original) > 1e-5 * original.abs().max()
        evopatch.remove(model)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model.forward_features(x), original)
