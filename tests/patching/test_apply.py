"""What users do with a patched model beyond the contract matrix."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
from comparing import moved
from internals import plans
from torch import nn
from variants import build, images

import evopatch
from evopatch import EvoConfig
from evopatch.measure.timing import compare_speed


@torch.no_grad()
def test_context_manager():
    model, x = build("vit"), images()
    original = model(x)
    with evopatch.patched(model, keep_ratio=0.3) as inside:
        assert inside is model
        assert not torch.equal(model(x), original)
    assert torch.equal(model(x), original)
    with pytest.raises(RuntimeError, match="inside"), evopatch.patched(model):
        raise RuntimeError("inside")
    assert not evopatch.is_patched(model)


@torch.no_grad()
def test_a_model_inside_a_model():
    backbone, x = build("vit"), images()
    wrapped = nn.ModuleDict({"left": backbone, "right": build("gap"), "neck": nn.Linear(7, 7)})
    evopatch.apply(wrapped, keep_ratio=0.4)
    assert evopatch.is_patched(wrapped)
    assert evopatch.is_patched(wrapped["right"])
    assert torch.equal(backbone(x), evopatch.apply(build("vit"), keep_ratio=0.4)(x))
    evopatch.set_keep_ratio(wrapped, 1.0)
    assert torch.equal(wrapped["right"](x), build("gap")(x))
    evopatch.remove(wrapped)
    assert not evopatch.is_patched(wrapped)


@torch.no_grad()
def test_features_only():
    options = {"img_size": 64, "features_only": True, "out_indices": (2, 7, 11), "pretrained": False}
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **options).eval()
    x = images(size=64)
    original = model(x)
    evopatch.apply(model)
    features = model(x)
    assert [f.shape for f in features] == [f.shape for f in original] == [(2, 192, 4, 4)] * 3
    assert torch.equal(features[0], original[0])
    assert not torch.equal(features[2], original[2])


@torch.no_grad()
def test_token_selection():
    model, x = build("vit"), images(3)
    evopatch.apply(model, config=EvoConfig(keep_ratio=[0.6, 0.2], stages=[2, 4]))
    before = model(x)
    selection = evopatch.token_selection(model, x)
    assert selection.dtype == torch.bool
    assert selection.shape == (3, 6, 5, 5)
    assert selection.sum(dim=(2, 3)).tolist() == [[25, 25, 15, 15, 5, 5]] * 3
    assert not torch.equal(selection[0, 4], selection[1, 4])
    assert torch.equal(model(x), before)
    evopatch.set_config(model, EvoConfig(keep_ratio=[0.6, 0.2], stages=[2, 4], selection="layer"))
    layerwise = evopatch.token_selection(model, x)
    assert torch.equal(layerwise[:, 2], selection[:, 2])
    assert not torch.equal(layerwise[:, 2], layerwise[:, 3])


@torch.no_grad()
def test_fast_tokens_stay_in_their_place_without_a_representative():
    model, x = build("vit"), images()
    evopatch.apply(model, config=EvoConfig(keep_ratio=[1.0, 0.4], stages=[2, 4], representative="none"))
    selection = evopatch.token_selection(model, x)[:, -1]
    before, after = model.forward_intermediates(x, indices=[3, 5], intermediates_only=True)
    changed = (after != before).any(dim=1)
    assert torch.equal(changed, selection)


@torch.no_grad()
def test_classifier_and_pruning_of_a_patched_model():
    # Later blocks that are gone can't be looked ahead at.
    model, x = evopatch.apply(build("vit"), config=EvoConfig(look_ahead=0.0)), images()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    expected = model.forward_intermediates(x, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    model.prune_intermediate_layers([2], prune_norm=True)
    assert len(model.blocks) == 3
    torch.testing.assert_close(model.forward_features(x)[:, 1:], expected, atol=1e-5, rtol=1e-5)
    evopatch.set_config(model, EvoConfig())
    assert torch.isfinite(model(x)).all()


def test_training_lowers_the_loss_and_moves_every_parameter():
    torch.manual_seed(0)
    model, x, labels = build("vit").train(), images(16), torch.arange(16) % 7
    evopatch.apply(model, keep_ratio=0.5)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(start[n], p) for n, p in model.named_parameters())


def test_profile_counts_the_real_forward():
    config = EvoConfig(keep_ratio=[0.63, 0.37], stages=[2, 4])
    model = evopatch.apply(build("vit", embed_dim=192, num_heads=3), config=config)
    profile = evopatch.profile(model, (3, 40, 40))
    assert profile.ratio < 1
    assert profile.blocks_ratio < profile.ratio
    assert [b.tokens for b in profile.blocks] == [25, 25, 16, 16, 9, 9]
    linear = 2 * 26 * 12 * 192 * 192
    attention = 2 * 2 * 26 * 26 * 192
    assert profile.blocks[0].flops_unpatched == linear + attention
    assert profile.blocks[2].flops_unpatched == linear + attention
    selection = 2 * 25 * 25 * 192  # runs inside its block: how similar the tokens are to each other
    # Of each block that is looked at the class token's queries, the key weights folded into them, and 3 heads' logits.
    looks = len(plans(model)[4].looks_at) * (2 * 2 * 192 * 192 + 2 * 26 * 192 * 3)
    assert looks > 0
    assert profile.blocks[4].flops == 2 * 10 * 12 * 192 * 192 + 2 * 2 * 10 * 10 * 192 + selection + looks
    # The last block: keys and values of all rows, everything else of the class token, whose keys are made once more.
    keys_and_values, class_token = 2 * 10 * 2 * 192 * 192, 2 * 12 * 192 * 192
    assert profile.blocks[5].flops == keys_and_values + class_token + 2 * 2 * 10 * 192
    assert evopatch.config_of(model) == config
    evopatch.set_keep_ratio(model, 1.0)
    assert evopatch.profile(model, (3, 40, 40)).ratio == 1.0


def test_importing_evopatch_imports_neither_timm_nor_transformers():
    code = (
        "import sys, torch; before = set(sys.modules); import evopatch; new = set(sys.modules) - before;"
        "assert not {'timm', 'transformers', 'typer', 'rich', 'matplotlib'} & new, sorted(new); print(len(new))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_third_party_adapters_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from evopatch.patching import registry

    entry = EntryPoint(name="timm", value="third_party_adapter:ToyAdapter", group="evopatch.adapters")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "evopatch.adapters" else [])
    from third_party_adapter import ToyViT

    torch.manual_seed(0)
    model, x = ToyViT().eval(), torch.randn(2, 9, 16)
    original = model(x)
    evopatch.apply(model)
    assert model(x).shape == original.shape
    assert not torch.equal(model(x), original)
    assert evopatch.token_selection(model, x).shape == (2, 4, 3, 3)
    evopatch.remove(model)
    assert torch.equal(model(x), original)


@torch.no_grad()
def test_a_model_compiled_before_it_was_patched_follows():
    torch._dynamo.reset()
    model, x = build("vit"), images()
    compiled = torch.compile(model, backend="eager")
    original = compiled(x)
    evopatch.apply(model)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.equal(compiled(x), original)
    evopatch.remove(compiled)
    assert torch.equal(compiled(x), original)


@torch.no_grad()
def test_export_with_a_dynamic_batch():
    model = evopatch.apply(build("vit"))
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for batch in (3, 8):
        torch.testing.assert_close(exported(images(batch)), model(images(batch)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_torchscript_trace_and_data_parallel():
    model, x = evopatch.apply(build("vit")), images()
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(images(seed=5)), model(images(seed=5)), atol=1e-5, rtol=1e-5)
    assert torch.equal(nn.DataParallel(model)(x), model(x))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("first", "second"), [(0.5, 0.8), (0.5, 1.0), (1.0, 0.5)])
def test_a_change_between_forward_and_backward_changes_no_gradient(first, second, checkpointing):
    """As in self-distillation, where teacher and student share a model."""
    model, x = evopatch.apply(build("vit").train()), images()

    def gradients(ratio, other):
        model.zero_grad()
        evopatch.set_keep_ratio(model, ratio)
        loss = model(x).square().sum()
        evopatch.set_keep_ratio(model, other)
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected, different = gradients(first, first), gradients(second, second)
    model.set_grad_checkpointing(checkpointing)
    result = gradients(first, second)
    for name, gradient in expected.items():
        torch.testing.assert_close(result[name], gradient, atol=2e-4 * gradient.abs().max().item() + 1e-6, rtol=1e-3)
    assert any(moved(expected[n], different[n]) > 1e-3 for n in expected)


def test_set_keep_ratio_keeps_every_hosts_other_settings():
    pair = nn.ModuleList([build("vit"), build("gap")])
    evopatch.apply(pair[0], config=EvoConfig(representative="single"))
    evopatch.apply(pair[1], config=EvoConfig(tradeoff=0.3))
    evopatch.set_keep_ratio(pair, 0.7)
    assert evopatch.config_of(pair[0]) == EvoConfig(keep_ratio=0.7, representative="single")
    assert evopatch.config_of(pair[1]) == EvoConfig(keep_ratio=0.7, tradeoff=0.3)


def test_selection_and_profile_of_a_pruned_model():
    model, x = evopatch.apply(build("vit")), images()
    model.prune_intermediate_layers([3], prune_head=False)
    assert evopatch.token_selection(model, x).shape == (2, 4, 5, 5)
    assert len(evopatch.profile(model, (3, 40, 40)).blocks) == 4


@torch.no_grad()
def test_remove_finds_blocks_that_were_wrapped_since():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, x = build("vit"), images()
    original = model(x)
    evopatch.apply(model)
    patched = model(x)
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, type(model.blocks[0])))
    torch.testing.assert_close(model(x), patched)
    evopatch.remove(model)
    assert not evopatch.is_patched(model)
    assert torch.equal(model(x), original)


def test_modes_are_kept():
    model = evopatch.apply(build("vit").train())
    model.blocks[2].eval()
    modes = [m.training for m in model.modules()]
    evopatch.profile(model, (3, 40, 40))
    evopatch.token_selection(model, images())
    compare_speed(model, images(), rounds=1)
    assert [m.training for m in model.modules()] == modes
    assert evopatch.config_of(model) == EvoConfig()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "gap", "rope"])
@torch.no_grad()
def test_half_precision_selects_nearly_the_same_tokens(name, dtype):
    model, x = evopatch.apply(build(name)), images(8)
    expected = evopatch.token_selection(model, x)
    half = evopatch.token_selection(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert (half == expected).float().mean() > 0.95
    assert (evopatch.token_selection(model, images(8, seed=9)) == expected).float().mean() < 0.9
