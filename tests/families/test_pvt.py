"""PVT, PVT v2 and SegFormer: slow and fast queries against plain loops, and what is refused."""

import pytest
import timm
import torch
from comparing import Snapshot, moved
from internals import plans
from matrix import every, patched
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.xcit import Xcit
from torch import nn
from transformers import PvtConfig, PvtForImageClassification, SegformerConfig, SegformerModel
from variants import REDUCED, TRANSFORMERS, build, call, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.algorithm.window_selection import match_tokens
from evopatch.algorithm.windows import Windows
from evopatch.forward import reduced_blocks
from evopatch.forward.reduced_blocks import ConvolvingBlocks


def attend(attention, asking, everything, grid):
    """Each of the asking rows over the keys that the whole map makes."""
    answering = everything
    if attention.pool is not None:
        answering = attention.pool(everything.transpose(1, 2).unflatten(2, grid))
        answering = attention.act(attention.norm(attention.sr(answering).flatten(2).transpose(1, 2)))
    elif attention.sr is not None:
        reduced = attention.sr(everything.transpose(1, 2).unflatten(2, grid))
        answering = attention.norm(reduced.flatten(2).transpose(1, 2))
    key, value = attention.kv(answering).chunk(2, -1)
    heads = []
    for q, k, v in zip(*(x.chunk(attention.num_heads, -1) for x in (attention.q(asking), key, value)), strict=True):
        heads.append((q @ k.transpose(1, 2) * attention.scale).softmax(-1) @ v)
    return attention.proj(torch.cat(heads, -1))


def slow_fast(block, x, grid, group, rows):
    """One block on one image `(1, N, C)`, whose token `t` belongs to the row `group[t]`."""
    members = [[t for t in range(x.shape[1]) if group[t] == row] for row in range(rows)]

    def means(tokens):
        return torch.stack([tokens[0, own].mean(0) for own in members])[None]

    entry = means(x)
    compact = entry + attend(block.attn, means(block.norm1(x)), block.norm1(x), grid)
    hidden = block.mlp.fc1(block.norm2(compact))[:, group]  # every token the features of its row
    hidden = block.mlp.relu(hidden.transpose(1, 2).unflatten(2, grid))
    convolved = block.mlp.act(block.mlp.dwconv(hidden).flatten(2).transpose(1, 2))
    compact = compact + block.mlp.fc2(means(convolved))
    return x + (compact - entry)[:, group]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (72, 100)])
@torch.no_grad()
def test_a_run_of_blocks_is_that_of_plain_loops(linear, size):
    """The last two stages; on the larger map tokens are matched inside several squares."""
    model, x = build("pvt_v2", linear=linear), images_for("pvt_v2", 1, size)
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, args, out, p=path: seen.update({p: (*args, out)}))
        for path in (f"stages.{stage}.blocks.{index}" for stage in range(3) for index in range(2))
    ]
    settings = EvoConfig(keep_ratio=[0.4, 0.6, 0.3], start=1)
    call(evopatch.apply(model, config=settings), x)
    for handle in handles:
        handle.remove()
    evopatch.remove(model)
    keep, group, compared = {0: 0.4, 1: 0.6, 2: 0.3}, None, 0
    for path in list(seen)[1:]:
        tokens, grid, out = seen[path]
        block, stage = model.get_submodule(path), int(path.split(".")[1])
        if path.endswith("blocks.0") or group is None:
            side = [-(-s // -(-s // 16)) for s in grid]
            windows = Windows(grid, tuple(side), (0, 0), pads_first=False)
            kept = max(1, int(windows.area * keep[stage] + 0.5))
            chosen = match_tokens(block.norm1(tokens), kept, windows.places(x.device), windows, None)
            group = chosen.partition.group[0].tolist()
            ranks = {row: rank for rank, row in enumerate(sorted(set(group)))}
            group = [ranks[row] for row in group]
            assert len(ranks) < len(group)
        expected = slow_fast(block, tokens, grid, group, len(ranks))
        torch.testing.assert_close(out, expected, atol=3e-5, rtol=3e-5)
        assert moved(expected, block(tokens, grid)) > 1e-3
        compared += 1
    assert compared == 5


@every(REDUCED)
@torch.no_grad()
def test_keys_are_those_of_the_whole_map(name):
    """As many as unpatched, in every block."""
    model, x = build(name), images_for(name)

    def keys():
        found = []
        names = ("kv", "key", "k_proj")
        handles = [
            module.register_forward_hook(lambda _m, _a, out: found.append(out.shape[1]))
            for path, module in model.named_modules()
            if path.rpartition(".")[2] in names
        ]
        call(model, x)
        for handle in handles:
            handle.remove()
        return found

    expected = keys()
    evopatch.apply(model)
    assert keys() == expected
    assert len(expected) == 6 + (name == "hf_pvt")  # whose last stage isn't patched


@every(REDUCED)
@torch.no_grad()
def test_one_representative_stands_for_tokens_not_for_squares(name):
    model, x = patched(name, EvoConfig(keep_ratio=0.25, schedule="constant", representative="single")), images_for(name)
    selection = evopatch.token_selection(model, x)
    assert selection[:, -1].sum(dim=(1, 2)).tolist() == [64, 64]  # a quarter of 256 places, shown on the first grid
    assert moved(call(model, x), call(build(name), x)) > 1e-4


@every(REDUCED, fast={"pvt_v2"})
@torch.no_grad()
def test_a_hook_on_a_norm_changes_what_it_says_and_no_more(name):
    model, x = patched(name), images_for(name)
    expected = call(model, x)
    norms = [
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in ("norm1", "layer_norm_1", "layernorm_before")
    ]
    assert norms
    handles = [norm.register_forward_hook(lambda _module, _args, _out: None) for norm in norms]
    torch.testing.assert_close(call(model, x), expected, atol=1e-5, rtol=1e-5)
    for handle in handles:
        handle.remove()
    norms[-1].register_forward_hook(lambda _module, _args, out: 3 * out)
    assert moved(call(model, x), expected) > 1e-3


@every({"pvt_v2", "hf_pvt_v2", "hf_segformer"}, fast={"pvt_v2"})
@pytest.mark.parametrize("representative", ["matched", "single"])
@torch.no_grad()
def test_some_images_at_a_time_are_the_same(name, representative, monkeypatch):
    model, x = patched(name, EvoConfig(representative=representative)), images_for(name, 3)
    expected, calls = call(model, x), []
    run = ConvolvingBlocks._convolved
    monkeypatch.setattr(ConvolvingBlocks, "_convolved", lambda *args: (calls.append(len(args[2])), run(*args))[1])
    for size, number in ((2**24, {3}), (1, {1})):
        calls.clear()
        monkeypatch.setattr(reduced_blocks, "REUSED", size)
        torch.testing.assert_close(call(model, x), expected, atol=1e-5, rtol=1e-5)
        assert set(calls) == number


@torch.no_grad()
def test_the_default_leaves_fine_maps_alone():
    model = evopatch.apply(PyramidVisionTransformerV2(depths=(2, 2, 4, 2), embed_dims=(8, 16, 24, 32)).eval())
    assert [plan.keep_ratio for plan in plans(model)] == [1.0] * 5 + [0.5] * 5
    assert [i for i, plan in enumerate(plans(model)) if plan.selects] == [5, 8]


def another_attention():
    model = build("pvt_v2")
    model.stages[1].blocks[0].attn = nn.Identity()
    return model


def another_mlp():
    model = build("pvt_v2")
    model.stages[2].blocks[1].mlp = nn.Sequential()
    return model


class Mixing(nn.Linear):
    """A module of somebody's own."""

    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


def own_module():
    model = build("hf_segformer")
    model.segformer.stages[1].blocks[0].mlp.fc2 = Mixing(48, 24)
    return model


def one_block():
    return PvtForImageClassification(PvtConfig(image_size=64, num_encoder_blocks=2, depths=[1, 2]))


def xcit():
    return Xcit(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            another_attention,
            r"stages\.1\.blocks\.0\.attn is a torch.*Identity: expected a class of timm\.models\.pvt_v2",
        ),
        (another_mlp, r"stages\.2\.blocks\.1\.mlp is a torch.*Sequential: expected a class of timm\.models\.pvt_v2"),
        (own_module, r"segformer\.stages\.1\.blocks\.0\.mlp\.fc2 is a .*Mixing, a module of your own"),
        (one_block, r"pvt\.encoder \(PvtEncoder\) has 1 block\(s\) before its last stage: expected at least two"),
        (xcit, r": Xcit attends between channels"),
        (lambda: SegformerModel(SegformerConfig(strides=[4, 4, 2, 2])), "expected odd ones, and strides of 2"),
        (lambda: SegformerModel(SegformerConfig(patch_sizes=[8, 3, 3, 3])), "expected odd ones, and strides of 2"),
        (lambda: PvtForImageClassification(PvtConfig(image_size=72)), "cuts images of 72 px .* without a rest"),
    ],
)
def test_refused_with_the_reason(make, said):
    model = make()
    before = Snapshot(model)
    with pytest.raises(evopatch.UnsupportedModelError, match=said):
        evopatch.apply(model)
    before.assert_untouched(model)


def test_a_refused_one_is_no_candidate():
    model = xcit()
    assert not evopatch.supported(model)
    (candidate,) = evopatch.inspect(model).candidates
    assert not candidate.call
    assert "between channels" in candidate.reason


@torch.no_grad()
def test_what_is_served_beside_a_refused_one_is_patched():
    model = nn.ModuleList([xcit(), build("vit")])
    evopatch.apply(model)
    assert evopatch.is_patched(model[1])
    assert not evopatch.is_patched(model[0])
    with pytest.raises(evopatch.UnsupportedModelError, match="found nothing to patch") as error:
        evopatch.apply(nn.Linear(2, 2))
    assert "VisionTransformer" in str(error.value)
    assert "Xcit" not in str(error.value)


def tensors(attentions):
    """Of all blocks; PVT v2 has a tuple for each stage."""
    nested = (stage if isinstance(stage, tuple) else (stage,) for stage in attentions or ())
    return [weights for stage in nested for weights in stage]


@every(TRANSFORMERS & REDUCED)
@torch.no_grad()
def test_attentions_asked_for_are_refused(name):
    model, x = build(name, attn_implementation="eager"), images_for(name)
    expected = model(x, output_attentions=True).attentions
    evopatch.apply(model)
    with pytest.raises(evopatch.UnsupportedInputError, match="output_attentions was asked of"):
        model(x, output_attentions=True)
    evopatch.set_keep_ratio(model, 1.0)
    found = model(x, output_attentions=True).attentions
    assert (found is None) == (expected is None)  # the backbone gives none
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


@torch.no_grad()
def test_features_only():
    model, x = timm.create_model("pvt_v2_b0", features_only=True).eval(), images_for("pvt_v2")
    original = model(x)
    evopatch.apply(model)
    found = model(x)
    assert [f.shape for f in found] == [f.shape for f in original]
    assert moved(found[3], original[3]) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(model(x), original, strict=True))


@torch.no_grad()
def test_what_a_hook_makes_of_the_norm_reaches_queries_and_keys():
    model, x, seen = build("pvt_v2"), images_for("pvt_v2"), {}
    evopatch.apply(model)
    block = model.stages[2].blocks[1]
    block.norm1.register_forward_hook(lambda _m, _a, out: out * 0)
    for name in ("q", "kv"):
        block.attn.get_submodule(name).register_forward_hook(
            lambda _m, args, _o, name=name: seen.update({name: args[0].abs().max().item()})
        )
    call(model, x)
    assert seen == {"q": 0.0, "kv": 0.0}


@torch.no_grad()
def test_arguments_of_the_encoder_by_position():
    model, x = patched("hf_pvt_v2_backbone"), images_for("hf_pvt_v2_backbone")
    assert len(model.encoder(x, False, True).hidden_states) == 3
    with pytest.raises(evopatch.UnsupportedInputError, match="output_attentions was asked of"):
        model.encoder(x, True)


def test_a_program_for_any_size_is_refused():
    model, x = patched("pvt_v2"), images_for("pvt_v2")
    sides = {2: torch.export.Dim("rows") * 16, 3: torch.export.Dim("columns") * 16}
    with pytest.raises(Exception, match="Export one program for each size"):
        torch.export.export(model, (x,), dynamic_shapes=(sides,))
    torch.export.export(model, (x,))
