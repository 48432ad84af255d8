"""LeViT of both libraries: what is its own. Stages, position biases, batch norms, layouts, small grids."""

import copy
import warnings

import pytest
import timm
import torch
from comparing import moved
from internals import plans, say_again
from matrix import every, patched
from timm.utils.model import reparameterize_model
from torch import nn
from transformers import LevitConfig, LevitForImageClassification
from variants import LEVIT, build, call, images_for

import evopatch
from evopatch import ConfigError, EvoConfig, UnsupportedInputError


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


@every(LEVIT)
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
    torch.testing.assert_close(call(model, x), expected, atol=2e-5, rtol=2e-5)
    assert len(seen) == 2
    assert seen[0][1:].numel() == 9 * 48  # the second stage's full grid, although the block works on fewer tokens
    for handle in handles:
        handle.remove()
    assert torch.equal(call(model, x), expected)


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
    assert moved(call(fused, x), expected) > 1e-3


@every(LEVIT)
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


@pytest.mark.parametrize(("name", "patch"), [("levit", 8), ("levit_conv", 8), ("hf_levit", 16), ("hf_levit_model", 16)])
@pytest.mark.parametrize("grid", [(7, 7), (1, 25)])  # the second one has as many tokens as the model's own
@torch.no_grad()
def test_another_image_size_is_refused_with_the_numbers(name, patch, grid):
    model = evopatch.apply(build(name))
    height, width = (patch * side for side in grid)
    text = rf"{height}x{width} px make {grid[0]}x{grid[1]} patch tokens in .* for 5x5"
    with pytest.raises(UnsupportedInputError, match=text):
        model(torch.zeros(1, 3, height, width))
    assert torch.isfinite(call(model, torch.zeros(1, 3, 5 * patch - 1, 5 * patch))).all()


def test_a_stage_with_a_single_token_needs_a_keep_ratio_of_one():
    model = timm.create_model("levit_128s", img_size=64)
    with pytest.raises(ConfigError, match=r"among the 1 of stage 3 \(1x1\): expected 1.0 there"):
        evopatch.apply(model)
    assert evopatch.is_patched(evopatch.apply(model, keep_ratio=[0.5, 0.5, 1.0]))


def test_a_run_that_crosses_stages_is_refused():
    with pytest.raises(ConfigError, match=r"at block\(s\) \[5\] of stages with \(2, 3, 2\) blocks"):
        evopatch.apply(build("levit"), config=EvoConfig(stages=[1, 2, 4]))
    model = evopatch.apply(build("levit"), config=EvoConfig(stages=[1, 2, 4, 5]))
    assert [p.selects for p in plans(model)] == [False, True, True, False, True, True, False]


def test_apply_says_once_where_it_is_not_faster():
    say_again()
    with pytest.warns(evopatch.SpeedWarning, match="slower than unpatched for single images"):
        evopatch.apply(build("levit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evopatch.apply(build("levit"))
        say_again()
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


@every(LEVIT)
def test_one_keep_ratio_tapers_over_the_stages(name):
    model = evopatch.apply(build(name), keep_ratio=0.5)
    assert [plan.keep_ratio for plan in plans(model)] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.25, 0.25]


@every(LEVIT)
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


@every(LEVIT)
def test_copies_after_a_forward_with_gradients(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    call(model, x)
    assert evopatch.benchmark(model, x, rounds=2, warm_up=0).sides[1].flops < 1
    call(model, x)
    assert evopatch.profile(model, tuple(x.shape[1:])).ratio < 1


def test_warnings_as_errors_leave_the_model_untouched():
    model = build("levit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say_again()
        with pytest.raises(evopatch.SpeedWarning):
            evopatch.apply(model)
    assert not evopatch.is_patched(model)


def test_backward_hooks_on_stages_and_hooks_on_containers_run():
    model, x, seen = evopatch.apply(build("levit")), images_for("levit"), []
    handle = model.stages[1].register_full_backward_hook(lambda module, gradient, out: seen.append(out[0].shape))
    model(x).sum().backward()
    assert seen == [(2, 9, 48)]
    handle.remove()
    plain = model(x)
    handle = model.stages[1].blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.equal(model(x), plain)
    assert seen[1:] == [(2, 9, 48)]
    handle.remove()
    model.stages[1].blocks.register_forward_hook(lambda module, args, out: out * 2)
    assert moved(model(x), plain) > 1e-3


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


@pytest.mark.parametrize("name", ["levit", "hf_levit"])
@torch.no_grad()
def test_an_image_size_is_a_number_where_sizes_are_symbols(name):
    """All that follows from it would be a formula otherwise, and take minutes to compile."""
    torch._dynamo.reset()
    model, x = patched(name), images_for(name)
    sizes = []

    def backend(module, _inputs):
        values = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        sizes.extend(value.shape for value in values if isinstance(value, torch.Tensor) and value.dim() == 4)
        return module.forward

    out = call(torch.compile(model, fullgraph=True, dynamic=True, backend=backend), x)
    torch.testing.assert_close(out, call(model, x))
    (images,) = (size for size in sizes if size[1] == 3 and isinstance(size[0], torch.SymInt))
    assert list(map(str, images[2:])) == list(map(str, x.shape[2:]))
    assert str(images[0]) != str(x.shape[0])
