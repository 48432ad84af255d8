"""LeViT: whole patched models against a slow reference, and what is its own: stages, biases, batch norms, layouts."""

import copy
import warnings

import pytest
import timm
import torch
from test_ops import matched_reference, top
from timm.utils.model import reparameterize_model
from torch import nn
from transformers import LevitConfig, LevitForImageClassification
from variants import PYRAMIDS, build, call, images_for

import evopatch
from evopatch import ConfigError, EvoConfig, UnsupportedInputError
from evopatch.algorithm.selection import num_slow
from evopatch.plan import plan_blocks

EVERY = pytest.mark.parametrize("name", sorted(PYRAMIDS))
REPRESENTATIVES = pytest.mark.parametrize("representative", ["matched", "single", "none"])
GRIDS = [(5, 5), (3, 3), (2, 2)]


def attention(attn, x, bias):
    """One image through an attention module: x (T, C) and bias (H, T, T) to output (T, C) and weights (H, T, T)."""
    qkv = attn.qkv(x[None])[0].reshape(len(x), attn.num_heads, -1)
    out, weights = [], []
    for h in range(attn.num_heads):
        q, k, v = qkv[:, h].split([attn.key_dim, attn.key_dim, attn.val_dim], dim=1)
        row = (q @ k.T * attn.scale + bias[h]).softmax(-1)
        weights.append(row)
        out.append(row @ v)
    return attn.proj(torch.stack(out, dim=1).flatten(1)[None])[0], torch.stack(weights)


def chosen(g, x, keep, representative):
    """Members and their shares of every row of the compact set, and the slow tokens."""
    if representative == "matched":
        slow, leader = matched_reference(g, x, keep)
        groups = [[i for i in range(len(x)) if leader[i] == s] for s in sorted(slow)]
        shares = [[g[i].sqrt() / sum(g[j].sqrt() for j in members) for i in members] for members in groups]
        return groups, shares, slow
    slow = top(g.tolist(), keep)
    groups, shares = [[i] for i in sorted(slow)], [[1.0]] * keep
    if representative == "single":
        fast = [i for i in range(len(x)) if i not in slow]
        total = sum(g[i] for i in fast)
        groups, shares = [*groups, fast], [*shares, [g[i] / total for i in fast]]
    return groups, shares, slow


def merged_bias(bias, groups, shares, slow, representative):
    """(H, T, T) to (H, M, M): a matched group's is its slow token's, the single representative's the members' mean."""
    if representative == "matched":
        places = [[(i, 1.0) for i in members if i in slow] for members in groups]
    else:
        places = [list(zip(members, share, strict=True)) for members, share in zip(groups, shares, strict=True)]
    rows = torch.zeros(len(bias), len(groups), len(groups))
    for m, first in enumerate(places):
        for n, second in enumerate(places):
            rows[:, m, n] = sum(w * v * bias[:, i, j] for i, w in first for j, v in second)
    return rows


def coarser(g, grid):
    """The mean over the 3 by 3 tokens around every second one."""
    rows, columns = grid
    found = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            near = [g[a * columns + b] for a in range(i - 1, i + 2) for b in range(j - 1, j + 2)
                    if 0 <= a < rows and 0 <= b < columns]  # fmt: skip
            found.append(sum(near) / len(near))
    return torch.stack(found)


def reference(model, image, config):
    """Tokens (T, C) after every stage, for one image."""
    x = model.stem(image[None]).flatten(2).transpose(1, 2)[0]
    g, groups, outputs, index = None, None, [], 0
    plans = plan_blocks(config, *(len(stage.blocks) for stage in model.stages))
    for number, stage in enumerate(model.stages):
        if number:
            x, g = stage.downsample(x[None])[0], coarser(g, GRIDS[number - 1])
        for block in stage.blocks:
            plan, index = plans[index], index + 1
            bias = block.attn.attention_biases[:, block.attn.attention_bias_idxs]
            if plan.keep_ratio == 1.0:
                groups, shares, slow = [[i] for i in range(len(x))], [[1.0]] * len(x), set(range(len(x)))
            elif plan.selects:
                groups, shares, slow = chosen(g, x, num_slow(len(x), plan.keep_ratio), config.representative)
            sizes = torch.tensor([float(len(m)) if config.representative == "matched" else 1.0 for m in groups])
            entry = torch.stack(
                [sum(w * x[i] for i, w in zip(m, s, strict=True)) for m, s in zip(groups, shares, strict=True)]
            )
            merged = merged_bias(bias, groups, shares, slow, config.representative) + sizes.log()
            out, weights = attention(block.attn, entry, merged)
            hidden = entry + out
            out = hidden + block.mlp(hidden[None])[0]
            received = sum(sizes[m] * weights[:, m] for m in range(len(groups))).mean(0) / sizes.sum()
            before, x = g, x.clone()
            g = torch.zeros(len(x)) if g is None else g.clone()
            for row, members in enumerate(groups):
                for i in members:
                    x[i] = x[i] + out[row] - entry[row]
                    if config.representative == "matched" or i in slow:
                        own = received[row] / sizes[row]
                        g[i] = own if before is None else (1 - config.tradeoff) * g[i] + config.tradeoff * own
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("name", ["levit", "levit_conv", "levit_distilled"])
@pytest.mark.parametrize("selection", ["stage", "layer"])
@REPRESENTATIVES
@torch.no_grad()
def test_every_stage_equals_the_reference(name, selection, representative):
    model, x = build(name), images_for(name, 3)
    config = EvoConfig(keep_ratio=[0.6, 0.5, 0.5], selection=selection, representative=representative, tradeoff=0.4)
    linear = model
    if name == "levit_conv":  # the same weights, as matrices
        linear = build("levit")
        linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in model.state_dict().items()})
    expected = [reference(linear, image, config) for image in x]
    evopatch.apply(model, config=config)
    final, stages = model.forward_intermediates(x)
    for number, (grid, result) in enumerate(zip(GRIDS, stages, strict=True)):
        assert result.shape[-2:] == grid
        whole = torch.stack([tokens[number] for tokens in expected])
        torch.testing.assert_close(result.flatten(2).transpose(1, 2), whole, atol=2e-4, rtol=2e-4)
    assert torch.equal(model.forward_features(x), final)
    evopatch.set_config(model, EvoConfig(keep_ratio=[0.4, 0.5, 0.5], representative=representative, tradeoff=0.4))
    assert (model.forward_features(x) - final).abs().max() > 1e-3


@EVERY
@torch.no_grad()
def test_features_between_the_stages_are_the_full_grid(name):
    model, x = build(name), images_for(name)

    def features(images):
        if hasattr(model, "forward_intermediates"):
            return model.forward_intermediates(images, intermediates_only=True)
        return [h.transpose(1, 2) for h in model(images, output_hidden_states=True).hidden_states]

    shapes = [f.shape for f in features(x)]
    evopatch.apply(model, config=EvoConfig(keep_ratio=[1.0, 0.5, 0.5]))
    plain = call(model, x)
    patched = features(x)
    assert [f.shape for f in patched] == shapes
    assert torch.equal(call(model, x), plain)
    evopatch.set_keep_ratio(model, 1.0)
    original = features(x)
    assert torch.equal(patched[0], original[0])
    assert not torch.equal(patched[-1], original[-1])
    early = None if "hf" in name else model.forward_intermediates(x, indices=[0, 1], stop_early=True)[1]
    assert early is None or torch.equal(early[1], original[1])


@torch.no_grad()
def test_features_only_and_pruned_models():
    name = "levit_128s"
    model = timm.create_model(name, features_only=True, img_size=64, out_indices=(0, 1)).eval()
    for parameter_name, parameter in model.named_parameters():
        if ".bn.weight" in parameter_name:  # some begin at 0
            parameter.fill_(1.0)
    x = images_for("levit", size=64)
    original = model(x)
    evopatch.apply(model, keep_ratio=[0.5, 0.5])
    assert [f.shape for f in model(x)] == [f.shape for f in original]
    assert not torch.equal(model(x)[-1], original[-1])
    whole = evopatch.apply(build("levit"))
    whole.prune_intermediate_layers([1])
    assert whole(images_for("levit")).shape == (2, 9, 48)


@EVERY
@torch.no_grad()
def test_hooks_on_stages_and_blocks_run(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected, seen = call(model, x), []
    encoder = (
        model
        if hasattr(model, "stages")
        else model.get_submodule("encoder" if hasattr(model, "encoder") else "levit.encoder")
    )
    blocks = encoder.stages[1].blocks if hasattr(encoder.stages[1], "blocks") else encoder.stages[1].layers
    handles = [
        encoder.stages[1].register_forward_hook(lambda module, args, out: seen.append(out.shape)),
        blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape)),
    ]
    assert torch.equal(call(model, x), expected)
    assert len(seen) == 2
    assert seen[0] != seen[1]  # a block inside a run shows the compact set, the stage its full grid
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["levit", "levit_conv", "levit_distilled"])
@pytest.mark.parametrize("fused_first", [True, False])
@torch.no_grad()
def test_batch_norms_fused_into_the_layers(name, fused_first):
    model, x = build(name), images_for(name)
    expected = call(evopatch.apply(copy.deepcopy(model)), x)
    fuse, patch = reparameterize_model, evopatch.apply
    fused = patch(fuse(model)) if fused_first else fuse(patch(model))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    torch.testing.assert_close(call(fused, x), expected, atol=2e-4, rtol=2e-4)
    evopatch.set_keep_ratio(fused, 0.4)
    assert (call(fused, x) - expected).abs().max() > 1e-3


@EVERY
def test_batch_norms_learn_from_what_goes_through_the_block_once(name):
    model, x = evopatch.apply(build(name)), images_for(name, 8)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    counts = {n: int(m.num_batches_tracked) for n, m in norms.items()}
    model.train()
    call(model, x)
    assert all(int(m.num_batches_tracked) == counts[n] + 1 for n, m in norms.items())
    assert all(not torch.equal(m.running_mean, before[n]) for n, m in norms.items())
    model.eval()
    after = {n: m.running_mean.clone() for n, m in norms.items()}
    assert torch.equal(call(model, x), call(model, x))
    assert all(torch.equal(m.running_mean, after[n]) for n, m in norms.items())


@torch.no_grad()
def test_both_libraries_agree():
    theirs = build("hf_levit")
    ours = timm.models.levit.Levit(
        img_size=80, num_classes=7, embed_dim=(32, 48, 64), key_dim=8, depth=(2, 3, 2), num_heads=(2, 3, 4)
    ).eval()
    translated = dict(zip(_in_order(ours), _in_order(theirs).values(), strict=True))
    # The libraries number the offsets between tokens differently.
    for here, there in zip(_attentions(ours), _attentions(theirs), strict=True):
        table = torch.zeros_like(here.attention_biases)
        table[:, here.attention_bias_idxs] = there.attention_biases[:, there.attention_bias_idxs]
        here.attention_biases.copy_(table)
    state = ours.state_dict()
    ours.load_state_dict({k: state[k] if "attention_biases" in k else translated[k] for k in state})
    x = images_for("hf_levit")
    torch.testing.assert_close(ours(x), call(theirs, x), atol=1e-4, rtol=1e-4)
    evopatch.apply(ours)
    evopatch.apply(theirs)
    assert torch.equal(evopatch.token_selection(ours, x), evopatch.token_selection(theirs, x))
    torch.testing.assert_close(ours(x), call(theirs, x), atol=1e-4, rtol=1e-4)


def _in_order(model):
    """timm's stages begin with the attention that transformers' end with: in the order of the forward it's the same."""
    return {n: t for n, t in model.state_dict().items() if "attention_biases" not in n}


def _attentions(model):
    return [m for m in model.modules() if hasattr(m, "attention_bias_idxs")]


@EVERY
@torch.no_grad()
def test_selection_on_the_finest_grid(name):
    model, x = evopatch.apply(build(name), config=EvoConfig(keep_ratio=[0.6, 0.34, 0.5])), images_for(name)
    selection, groups = evopatch.token_selection(model, x), evopatch.token_groups(model, x)
    assert selection.shape == groups.shape == (2, 7, 5, 5)
    assert selection[:, 0].all()
    assert selection[:, 1].sum(dim=(1, 2)).tolist() == [15, 15]
    place = torch.arange(5) * 2 // 5
    coarse = groups[:, 6][:, [0, 3]][:, :, [0, 3]]
    assert torch.equal(groups[:, 6], coarse[:, place][:, :, place])
    assert [len(g.unique()) for g in coarse] == [2, 2]


@EVERY
def test_profile(name):
    size = 80 if "hf" in name else 40
    profile = evopatch.profile(evopatch.apply(build(name), keep_ratio=[0.6, 0.5, 0.5]), (3, size, size))
    assert [b.tokens_unpatched for b in profile.blocks] == [25, 25, 9, 9, 9, 4, 4]
    assert [b.tokens for b in profile.blocks] == [25, 15, 5, 5, 5, 2, 2]
    assert profile.blocks_ratio < profile.ratio < 1
    assert profile.blocks[3].flops < 0.6 * profile.blocks[3].flops_unpatched
    assert profile.blocks[3].activations < profile.blocks[3].activations_unpatched


@pytest.mark.parametrize("name", ["levit", "levit_conv"])
@torch.no_grad()
def test_another_image_size_is_refused_with_the_numbers(name):
    model = evopatch.apply(build(name))
    with pytest.raises(UnsupportedInputError, match=r"56x56 px make 7x7 patch tokens in .* for 5x5"):
        model(torch.zeros(1, 3, 56, 56))


@EVERY
@torch.no_grad()
def test_a_keep_ratio_that_leaves_no_slow_token_is_refused(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    with pytest.raises(ConfigError, match=r"0.1 leaves no slow token .* 4 of stage 3 \(2x2\): expected at least 0.125"):
        evopatch.apply(model, keep_ratio=[0.5, 0.5, 0.1])
    assert not evopatch.is_patched(model)
    evopatch.apply(model)
    patched = call(model, x)
    with pytest.raises(ConfigError, match="leaves no slow token"):
        evopatch.set_keep_ratio(model, [0.5, 0.01, 0.5])
    assert torch.equal(call(model, x), patched)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


def test_a_stage_with_a_single_token_needs_a_keep_ratio_of_one():
    model = timm.create_model("levit_128s", img_size=64)
    with pytest.raises(ConfigError, match=r"among the 1 of stage 3 \(1x1\): expected 1.0 there"):
        evopatch.apply(model)
    assert evopatch.is_patched(evopatch.apply(model, keep_ratio=[0.5, 0.5, 1.0]))


def test_a_run_that_crosses_stages_is_refused():
    with pytest.raises(ConfigError, match=r"at block\(s\) \[5\] of stages with \(2, 3, 2\) blocks"):
        evopatch.apply(build("levit"), config=EvoConfig(stages=[1, 2, 4]))
    model = evopatch.apply(build("levit"), config=EvoConfig(stages=[1, 2, 4, 5]))
    assert [p.selects for p in model._evo_state.plans] == [False, True, True, False, True, True, False]


def test_unpatched_start_and_settings_by_stage():
    plans = plan_blocks(EvoConfig(keep_ratio=[0.6, 0.5, 0.4]), 4, 4, 4)
    assert [p.keep_ratio for p in plans] == [1.0] * 2 + [0.6] * 2 + [0.5] * 4 + [0.4] * 4
    assert [i for i, p in enumerate(plans) if p.selects] == [2, 4, 8]
    assert [i for i, p in enumerate(plans) if p.ends] == [3, 7, 11]
    assert [p.selects for p in plan_blocks(EvoConfig(start=2, stages=2, schedule="constant"), 2, 4)] == [
        False, False, True, False, True, False]  # fmt: skip
    with pytest.raises(ConfigError, match="a run starts at block 9, beyond the model's 6 blocks"):
        plan_blocks(EvoConfig(start=9), 2, 4)


def test_apply_says_once_where_it_is_not_faster():
    from evopatch.patching.apply import _say_once

    _say_once.cache_clear()
    with pytest.warns(evopatch.SpeedWarning, match="slower than unpatched for single images"):
        evopatch.apply(build("levit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evopatch.apply(build("levit"))
        _say_once.cache_clear()
        evopatch.apply(build("vit"))


def test_saved_and_loaded(tmp_path):
    config = LevitConfig(image_size=80, num_labels=7, hidden_sizes=[32, 48, 64], key_dim=[8] * 3, depths=[2, 3, 2],
                         num_attention_heads=[2, 3, 4])  # fmt: skip
    settings = EvoConfig(keep_ratio=[0.6, 0.5, 0.5])
    for number, model in enumerate(
        (timm.create_model("levit_128s", num_classes=7), LevitForImageClassification(config))
    ):
        evopatch.apply(model.eval(), config=settings)
        evopatch.save_pretrained(model, tmp_path / str(number))
        twin = evopatch.load_pretrained(tmp_path / str(number)).eval()
        assert evopatch.config_of(twin) == settings
        x = torch.randn(1, 3, 224, 224) if number == 0 else images_for("hf_levit")
        with torch.no_grad():
            assert torch.equal(call(twin, x), call(model, x))


@EVERY
def test_one_keep_ratio_tapers_over_the_stages(name):
    model = evopatch.apply(build(name), keep_ratio=0.5)
    patch = next(module._evo_state for module in model.modules() if "_evo_state" in vars(module))
    assert [plan.keep_ratio for plan in patch.plans] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25]


@EVERY
@torch.no_grad()
def test_no_position_biases_of_other_weights(name):
    """Attention modules keep them from their first forward in eval mode on; evopatch's own functions must not."""
    model, x = evopatch.apply(build(name)), images_for(name)
    own = {n: t.clone() for n, t in model.state_dict().items()}
    other = {n: torch.randn_like(t) * 3 if "attention_biases" in n else t for n, t in own.items()}
    expected = call(model, x)
    fresh = evopatch.apply(build(name))
    fresh.load_state_dict(other)
    different = evopatch.token_selection(fresh, x)
    assert not torch.equal(different, evopatch.token_selection(model, x))
    evopatch.visualize_training(model, x, {"first": own, "second": other}, block=1)
    assert torch.equal(call(model, x), expected)
    model.train()
    evopatch.token_selection(model, x)
    model.load_state_dict(other)
    model.eval()
    assert torch.equal(evopatch.token_selection(model, x), different)
    assert torch.equal(call(model, x), call(fresh, x))


@EVERY
def test_copies_after_a_forward_with_gradients(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    call(model, x)
    assert evopatch.benchmark(model, x, rounds=2, warm_up=0).sides[1].flops < 1
    call(model, x)
    assert evopatch.profile(model, tuple(x.shape[1:])).ratio < 1


def test_warnings_as_errors_leave_the_model_untouched():
    from evopatch.patching.apply import _say_once

    model = build("levit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _say_once.cache_clear()
        with pytest.raises(evopatch.SpeedWarning):
            evopatch.apply(model)
    assert not evopatch.is_patched(model)


def test_backward_hooks_on_stages_run_and_hooks_on_containers_are_refused():
    model, x, seen = evopatch.apply(build("levit")), images_for("levit"), []
    handle = model.stages[1].register_full_backward_hook(lambda module, gradient, out: seen.append(out[0].shape))
    model(x).sum().backward()
    assert seen == [(2, 9, 48)]
    handle.remove()
    model.stages[1].blocks.register_forward_hook(lambda module, args, out: seen.append(out))
    with pytest.raises(evopatch.BypassError, match="a Sequential of blocks has hooks"):
        model(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"down_op": "", "embed_dim": (32, 32), "depth": (2, 2), "num_heads": (2, 2)},
            r"expected \(3, 3\) after \(5, 5\)",
        ),
        ({"depth": (2, 0, 2)}, "a stage without blocks"),
    ],
)
def test_pyramids_of_another_shape_are_refused(settings, message):
    model = build("levit", **settings)
    with pytest.raises(evopatch.UnsupportedModelError, match=message):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)


@pytest.mark.parametrize("name", ["levit", "levit_conv"])
@torch.no_grad()
def test_grids_that_are_not_square(name):
    model, x = evopatch.apply(build(name, img_size=(40, 56))), torch.randn(2, 3, 40, 56)
    assert [f.shape[-2:] for f in model.forward_intermediates(x)[1]] == [(5, 7), (3, 4), (2, 2)]
    assert evopatch.token_selection(model, x).shape == (2, 7, 5, 7)
    with pytest.raises(UnsupportedInputError, match=r"56x40 px make 7x5 patch tokens in 'model', .* for 5x7"):
        model(x.transpose(2, 3))


def test_profile_of_a_pruned_model_at_keep_ratio_one():
    model = evopatch.apply(build("levit"), keep_ratio=1.0)
    model.prune_intermediate_layers([1])
    assert [b.tokens for b in evopatch.profile(model, (3, 40, 40)).blocks] == [25, 25, 9, 9, 9]
