"""What people do to models, and to patched ones: it counts, or there is an error that names the module."""

import copy
import functools
import gc
import math
import threading
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from comparing import moved
from matrix import every
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.modeling_outputs import BaseModelOutput
from variants import FLAT, PYRAMIDS, REDUCED, SIZE, build, call, images, images_for

import evopatch
from evopatch import BypassError, EvoConfig, UnsupportedInputError, UnsupportedModelError
from evopatch.forward.tokens import TokenPass
from evopatch.measure.memory import peak_memory
from evopatch.patching.handle import Patched

# One of each way in which a block comes to its attention.
KINDS = ["vit", "eva", "relpos", "parallel_things", "levit", "levit_conv", "hf_vit", "hf_dinov3", "hf_levit"]
EVERY_KIND = every(KINDS)


def attentions(model):
    """Paths of the modules that hold the attention cores of the blocks."""
    return [name for name, module in model.named_modules() if "_evo_trace" in vars(module)]


def unpatched_attentions(name):
    return attentions(evopatch.apply(build(name)))


# What tracing reads


@EVERY_KIND
@torch.no_grad()
def test_hooks_on_attention_modules_are_called(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    plain, paths, calls = call(model, x), attentions(model), []
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda module, args, out, path=path: calls.append(path))
    torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)
    assert calls == paths
    last = model.get_submodule(paths[-1])
    handle = last.register_forward_hook(lambda m, a, out: (out[0] * 0, *out[1:]) if isinstance(out, tuple) else out * 0)
    assert moved(call(model, x), plain) > 1e-4
    handle.remove()
    torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)


@EVERY_KIND
@torch.no_grad()
def test_a_replaced_forward_of_an_attention_module_raises(name):
    path = unpatched_attentions(name)[-1]
    before = build(name)
    before.get_submodule(path).forward = lambda x, *args, **kwargs: x
    with pytest.raises(UnsupportedModelError, match=path.split(".", 1)[-1]):
        evopatch.apply(before)
    after, x = evopatch.apply(build(name)), images_for(name)
    call(after, x)
    after.get_submodule(path).forward = lambda x, *args, **kwargs: x
    with pytest.raises(BypassError, match=f"{path}.*forward of its own"):
        call(after, x)
    del after.get_submodule(path).forward
    call(after, x)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs)


@EVERY_KIND
@torch.no_grad()
def test_a_replaced_attention_module_raises_and_a_wrapper_that_passes_everything_on_works(name):
    path = unpatched_attentions(name)[-1]
    parent, _, child = path.rpartition(".")
    # A wrapper may look at all tokens, so there is no readout block behind one, and the sums are rounded otherwise.
    model, x = evopatch.apply(build(name), config=EvoConfig(readout=False)), images_for(name)
    plain, own = call(model, x), model.get_submodule(path)
    setattr(model.get_submodule(parent), child, nn.Identity())
    with pytest.raises(BypassError, match=rf"{path} is a torch.nn.modules.linear.Identity"):
        call(model, x)
    setattr(model.get_submodule(parent), child, Doubled(own))
    assert torch.equal(call(model, x), plain)


@pytest.mark.parametrize(
    ("name", "attribute"), [("vit", "scale"), ("levit", "scale"), ("hf_vit", "scaling"), ("hf_levit", "scale")]
)
@torch.no_grad()
def test_a_changed_attribute_of_an_attention_module_counts(name, attribute):
    set_fused_attn(False)  # fused attention of timm doesn't read its scale
    try:
        model, x = evopatch.apply(build(name)), images_for(name)
        other = build(name)
    finally:
        set_fused_attn(True)
    before = call(model, x)
    for path in attentions(model):
        for changed in (model.get_submodule(path), other.get_submodule(path)):
            setattr(changed, attribute, getattr(changed, attribute) * 4)
    assert moved(call(model, x), before) > 1e-3
    assert torch.equal(call(model, x), call(evopatch.apply(other), x))


@pytest.mark.parametrize("name", ["vit", "parallel", "hf_vit", "levit"])
@torch.no_grad()
def test_another_forward_of_a_class_counts(name, monkeypatch):
    """As libraries do that patch an attention class, or a block's."""
    model, x = evopatch.apply(build(name)), images_for(name)
    before = call(model, x)
    holder = model.blocks[0] if name == "parallel" else model.get_submodule(attentions(model)[0])
    cls = type(holder)._evo_host_class
    own = cls.forward

    @functools.wraps(own)
    def halved(self, x, *args, **kwargs):
        return own(self, x * 0.5, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", halved)
    changed = call(model, x)
    assert moved(changed, before) > 1e-3
    monkeypatch.undo()
    assert torch.equal(call(model, x), before)


@torch.no_grad()
def test_changed_numbers_of_heads_count():
    model, x = evopatch.apply(build("vit")), images()
    before, other = call(model, x), build("vit")
    for changed in (model, other):
        for block in changed.blocks:
            block.attn.num_heads, block.attn.head_dim = 2, 24
    assert moved(call(model, x), before) > 1e-3
    assert torch.equal(call(model, x), call(evopatch.apply(other), x))


@torch.no_grad()
def test_switching_fused_attention_off_counts():
    model, x = evopatch.apply(build("vit")), images()
    before, calls = call(model, x), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    torch.testing.assert_close(call(model, x), before, atol=2e-5, rtol=2e-5)
    assert calls == [(2, 4, 26, 26)] * 6


def test_a_changed_rate_of_attention_dropout_counts():
    model, x = evopatch.apply(build("vit", attn_drop_rate=0.1)).train(), images()
    torch.manual_seed(0)
    before = call(model, x)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.9
    torch.manual_seed(0)
    assert moved(call(model, x), before) > 1e-3
    for block in model.blocks:
        block.attn.attn_drop.p = 0.0
    assert torch.equal(call(model, x), call(model, x))


# Who walks over the blocks


class DeepPrompts(VisionTransformer):
    """Adds to one patch token between all blocks, by its number."""

    def forward_features(self, x, **kwargs):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        self.seen = []
        for block in self.blocks:
            x = block(x)
            self.seen.append(x.shape[1])
            x = torch.cat([x[:, :20], x[:, 20:21] + 1.0, x[:, 21:]], dim=1)
        return self.norm(x)


class HelpedWalk(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return self.norm(self.tapped(self.norm_pre(self._pos_embed(self.patch_embed(x)))))

    def tapped(self, x):
        self.seen = []
        for block in self.blocks:
            x = block(x)
            self.seen.append(x.shape[1])
        return x


class LookingViT(ViTModel):
    def forward(self, pixel_values, **kwargs):
        x = self.embeddings(pixel_values)
        self.seen = []
        for layer in self.layers:
            x = layer(x, **kwargs)
            self.seen.append(x.shape[1])
        return self.layernorm(x)


SMALL = {"img_size": SIZE, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4}


def looking_vit():
    config = ViTConfig(
        image_size=40, patch_size=8, hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96
    )
    return LookingViT(config)


@pytest.mark.parametrize("make", [lambda: DeepPrompts(**SMALL), lambda: HelpedWalk(**SMALL), looking_vit])
@torch.no_grad()
def test_code_that_walks_by_itself_gets_the_full_grid(make):
    torch.manual_seed(0)
    model, x = make().eval(), images()
    original = call(model, x)
    evopatch.apply(model)
    assert moved(call(model, x), original) > 1e-5
    assert model.seen == [26] * 6


@torch.no_grad()
def test_an_edit_between_the_blocks_reaches_the_token_it_names():
    torch.manual_seed(0)
    model, x = DeepPrompts(**SMALL).eval(), images()
    original = model.forward_features(x)
    evopatch.apply(model, keep_ratio=0.9)
    # Were token 20 another one between the blocks, the edits would miss it.
    difference = (model.forward_features(x) - original).abs().mean(-1)
    assert difference[:, 20].max() < 0.5 * moved(model.forward_features(x) * 0, original)


@torch.no_grad()
def test_a_librarys_own_walk_passes_the_compact_set():
    """The control: without a walk of its own a subclass stays fast."""
    model, x, rows = evopatch.apply(build("subclass"), keep_ratio=[0.63, 0.37]), images(), []
    compact = type(model.blocks[3]).forward

    def recording(self, x, *args, **kwargs):
        rows.append(x.shape[1])
        return compact(self, x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.blocks[3]), "forward", recording)
        call(model, x)
    assert rows == [26, 26, 26, 17, 26, 10]


class Prompted(VisionTransformer):
    """Three learned tokens at the end of the sequence, where they would be taken for patch tokens."""

    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x, x.new_ones(len(x), 3, x.shape[2])], dim=1)


class PromptedViT(ViTModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings.register_forward_hook(lambda m, a, out: torch.cat([out, torch.ones_like(out[:, :3])], dim=1))


@pytest.mark.parametrize("make", [lambda: Prompted(**SMALL), lambda: PromptedViT(looking_vit().config)])
@torch.no_grad()
def test_tokens_that_nobody_counted_are_an_error_that_counts_them(make):
    torch.manual_seed(0)
    model, x = make().eval(), images()
    original = call(model, x)
    evopatch.apply(model)
    with pytest.raises(UnsupportedInputError, match=r"29 tokens .* 1 prefix tokens and 5x5 patch tokens\. The other 3"):
        call(model, x)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@torch.no_grad()
def test_prompts_that_are_counted_as_prefix_tokens_work():
    class Counted(VisionTransformer):
        def _pos_embed(self, x):
            x = super()._pos_embed(x)
            return torch.cat([x[:, :1], x.new_ones(len(x), 3, x.shape[2]), x[:, 1:]], dim=1)

    torch.manual_seed(0)
    model, x = Counted(**SMALL).eval(), images()
    original = call(model, x)
    model.num_prefix_tokens = 4
    evopatch.apply(model)
    assert moved(call(model, x), original) > 1e-5
    assert evopatch.token_selection(model, x).shape == (2, 6, 5, 5)


# Masks


class MaskedBlock(Block):
    """Leaves one token out of attention, by a mask of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones(26, 26, dtype=torch.bool)
        mask[:, 5] = False
        self.register_buffer("mask", mask)

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.attn(self.norm1(x), attn_mask=self.mask)


class MaskedOwnCore(MaskedBlock):
    """The same with the attention core in the block itself."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, 4, 12)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("block", [MaskedBlock, MaskedOwnCore])
@torch.no_grad()
def test_a_boolean_mask_inside_a_block_is_refused_and_a_position_bias_is_not(block):
    torch.manual_seed(0)
    model, x = VisionTransformer(**SMALL | {"block_fn": block}).eval(), images()
    original = call(model, x)
    evopatch.apply(model)
    with pytest.raises(UnsupportedInputError, match=r"boolean attention mask inside blocks\.\d"):
        call(model, x)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)
    evopatch.set_keep_ratio(model, 0.9)
    for inner in model.blocks:
        inner.mask = torch.zeros(26, 26)
    unbiased = call(model, x)
    for inner in model.blocks:
        inner.mask = torch.full((26, 26), 3.0)  # the same for all is none
    torch.testing.assert_close(call(model, x), unbiased, atol=2e-5, rtol=2e-5)
    for inner in model.blocks:
        inner.mask = torch.linspace(-3, 3, 26).expand(26, 26)
    assert moved(call(model, x), unbiased) > 1e-3


# Inspection


class FlipAveraged(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x) + self.model(x.flip(-1))) / 2


@pytest.mark.parametrize("look", [evopatch.token_selection, evopatch.token_groups, evopatch.visualize])
def test_several_forwards_in_one_are_an_error_of_inspection(look):
    model, x = evopatch.apply(FlipAveraged(build("vit"))), images()
    with pytest.raises(UnsupportedModelError, match=r"'model' ran 2 times in one forward of FlipAveraged"):
        look(model, x)
    look(model.model, x)


@torch.no_grad()
def test_inspection_disturbs_nobody_who_runs_the_model():
    model, stop = evopatch.apply(build("vit", drop_path_rate=0.5)).train(), threading.Event()
    mine, others = images(seed=1), images(seed=2)
    expected, modes = evopatch.token_selection(model, mine), set()

    def train():
        while not stop.is_set():
            call(model, others)
            modes.update(module.training for module in model.modules())

    thread = threading.Thread(target=train)
    thread.start()
    try:
        found = [evopatch.token_selection(model, mine) for _ in range(30)]
        evopatch.profile(model, (3, SIZE, SIZE))
    finally:
        stop.set()
        thread.join()
    assert modes == {True}
    assert all(torch.equal(selection, expected) for selection in found)
    assert not torch.equal(evopatch.token_selection(model, others), expected)


# All or nothing


class Picky(Block):
    """A class that can't be derived from."""

    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses, please")


@torch.no_grad()
def test_a_class_that_cannot_be_derived_from_leaves_the_model_untouched():
    torch.manual_seed(0)
    model, x = VisionTransformer(**SMALL).eval(), images()
    model.blocks[4].__class__ = Picky
    original, attributes = call(model, x), [dict(vars(m)) for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedModelError, match=r"blocks\.4 .*Picky.*no subclasses, please"):
        evopatch.apply(model)
    assert not evopatch.supported(model)
    assert [type(m) for m in model.modules()] == classes
    assert [dict(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(call(model, x), original)


# Memory


@pytest.mark.parametrize("selection", ["stage", "layer"])
@pytest.mark.parametrize("representative", ["matched", "single", "none"])
@torch.no_grad()
def test_no_more_memory_than_unpatched(selection, representative):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=112, patch_size=8, embed_dim=96, depth=24, num_heads=3).eval()
    x = images(batch=2, size=112)
    call(model, x)
    unpatched = peak_memory(lambda: call(model, x), x.device)
    evopatch.apply(model, config=EvoConfig(selection=selection, representative=representative))
    patched = peak_memory(lambda: call(model, x), x.device)
    assert patched <= 1.05 * unpatched
    assert unpatched > 1e6


@torch.no_grad()
def test_levit_needs_no_more_memory_than_unpatched():
    torch.manual_seed(0)
    model, x = timm.create_model("levit_128s").eval(), images(batch=2, size=224)
    call(model, x)
    unpatched = peak_memory(lambda: call(model, x), x.device)
    patched = peak_memory(lambda: call(evopatch.apply(model), x), x.device)
    assert patched <= 1.05 * unpatched


# Sharding and offloading


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


SHARDED = ["vit", "registers", "gap", "rope", "relpos_class", "parallel", "hf_vit", "hf_dinov2", "hf_dinov3"]
SHARDED += ["levit", "pit"]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", SHARDED)
def test_fully_sharded_equals_whole(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    Patched(model).forget_caches()  # LeViT's position biases, whose graph is gone
    mesh = init_device_mesh("cpu", (1,))
    for path, *_ in Patched(model).host.blocks():
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    result = call(model, x)
    assert torch.equal(result, expected)
    result.square().sum().backward()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(parameter).grad.full_tensor(), gradient, atol=1e-5, rtol=1e-4)
    evopatch.set_keep_ratio(model, 0.3)
    assert moved(call(model, x), expected) > 1e-5


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_and_compiled_looks_at_the_block_that_runs(monkeypatch):
    """Those that don't run are put away, and compiled code can't bring them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = evopatch.apply(build("vit")), images()
    all_ahead = model(x)
    with monkeypatch.context() as patches:
        patches.setattr(TokenPass, "_looked_at", lambda self, index: [self.modules[index]])
        expected = model(x)
        expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    result = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert moved(expected, all_ahead) > 1e-4
    result.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad.full_tensor(), gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["vit", "hf_vit", "eva", "beit"])
@torch.no_grad()
def test_fully_sharded_as_torch_did_it_first(name):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    blocks = {type(model.get_submodule(path)) for path, *_ in Patched(model).host.blocks()}
    sharded = FullyShardedDataParallel(model, auto_wrap_policy=ModuleWrapPolicy(blocks), device_id=torch.device("cpu"))
    torch.testing.assert_close(call(sharded, x), expected, atol=1e-5, rtol=1e-5)
    original = call(evopatch.apply(build(name), keep_ratio=1.0), x)
    assert moved(call(sharded, x), original) > 1e-4


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@torch.no_grad()
def test_offloaded_by_whole_blocks(name):
    from accelerate import cpu_offload

    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    block = type(model.get_submodule(Patched(model).host.blocks()[0][0])).__name__
    cpu_offload(model, torch.device("cpu"), preload_module_classes=[block])
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(call(model, x), expected)


# Hooks on everything


def record(model, x):
    """The shapes of every module's inputs and outputs, call by call, as hooks see them."""
    seen = {}

    def hook(module, args, out, name):
        out = out if isinstance(out, tuple) else (out,)
        seen.setdefault(name, []).append([tuple(a.shape) for a in (*args, *out) if isinstance(a, torch.Tensor)])

    handles = [
        module.register_forward_hook(lambda m, a, o, name=name: hook(m, a, o, name))
        for name, module in model.named_modules()
    ]
    result = call(model, x)
    for handle in handles:
        handle.remove()
    return seen, result


@every(FLAT | PYRAMIDS | REDUCED)
@torch.no_grad()
def test_a_hook_on_every_module_sees_what_it_sees_unpatched(name):
    model, x = build(name), images_for(name)
    expected, _ = record(model, x)
    evopatch.apply(model)
    plain = call(model, x)
    seen, result = record(model, x)
    assert seen == expected
    torch.testing.assert_close(result, plain, atol=3e-5, rtol=3e-5)
    if (
        name in FLAT and "backbone" not in name
    ):  # the control: a hook that is known not to look at tokens sees the compact set
        rows = []

        def hook(module, args, kwargs, out):
            rows.append((out[0] if isinstance(out, tuple) else out).numel())

        hook.__module__ = "torch.distributed.somewhere"
        path = Patched(model).host.blocks()[4][0]  # the first of two in its run
        model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)
        call(model, x)
        assert rows[0] < math.prod(expected[path][0][0])


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_explanations_see_every_token(name):
    """What pytorch-grad-cam does: activations and gradients of a norm inside a block."""
    model, x = evopatch.apply(build(name)), images_for(name)
    plain = call(model, x)
    path = {"vit": "blocks.5.norm1", "hf_vit": "vit.layers.5.layernorm_before"}[name]
    kept = []

    def hook(module, args, out):
        kept.append(out)
        out.register_hook(kept.append)

    handle = model.get_submodule(path).register_forward_hook(hook)
    result = call(model, x)
    torch.testing.assert_close(result, plain, atol=3e-5, rtol=3e-5)
    result[:, 0].sum().backward()
    activation, gradient = kept
    assert activation.shape == gradient.shape == (2, 26, 48)
    assert (gradient.abs().sum(-1) > 0).all()
    assert moved(activation[:, 1:-1], activation[:, 2:]) > 1e-4
    handle.remove()


@pytest.mark.parametrize("name", ["vit", "levit", "pit", "hf_vit"])
@torch.no_grad()
def test_full_grid_shows_all_tokens_to_hooks_that_it_does_not_know_of(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    plain = call(model, x)
    sizes = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: sizes.append(args[0].numel()) if args and isinstance(module, nn.Linear) else None
    )
    try:
        call(model, x)
        compact = sum(sizes)
        sizes.clear()
        with evopatch.full_grid(model) as same:
            assert same is model
            torch.testing.assert_close(call(model, x), plain, atol=3e-5, rtol=3e-5)
        shown = sum(sizes)
        sizes.clear()
        evopatch.set_keep_ratio(model, 1.0)
        call(model, x)
    finally:
        handle.remove()
    assert shown == sum(sizes)
    assert compact < 0.9 * shown


# Changes after apply


@pytest.mark.parametrize("name", ["vit", "hf_vit", "levit", "hf_levit"])
@torch.no_grad()
def test_a_replaced_block_raises(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    plain, path = call(model, x), Patched(model).host.blocks()[1][0]
    parent, _, child = path.rpartition(".")
    own = model.get_submodule(path)

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = own

        def forward(self, x):
            return self.inner(x)

    changes = {
        "Identity": nn.Identity,
        "Wrapper": Wrapper,
        "Doubled": lambda: Doubled(own),
    }
    for changed, make in changes.items():
        setattr(model.get_submodule(parent), child, make())
        if changed == "Doubled":  # passes keyword arguments on
            torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)
        else:
            with pytest.raises(BypassError, match=f"{path} is a .*{changed}"):
                call(model, x)
    setattr(model.get_submodule(parent), child, own)
    own.__class__ = type(own)._evo_host_class
    with pytest.raises(BypassError):
        call(model, x)


@pytest.mark.parametrize("name", ["vit", "hf_vit", "levit", "hf_levit"])
@torch.no_grad()
def test_a_shallow_copy_works(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    assert torch.equal(call(copy.copy(model), x), expected)
    assert torch.equal(call(model, x), expected)


@pytest.mark.parametrize("held", [False, True])
@torch.no_grad()
def test_a_forward_that_passes_no_keywords_on_and_looks_between_its_layers(held):
    class Narrow(ViTModel):
        def forward(self, pixel_values, **kwargs):
            x = self.embeddings(pixel_values)
            self.looked = []
            for layer in self.layers:
                x = layer(x)
                self.looked.append(x)
            return BaseModelOutput(last_hidden_state=self.layernorm(x))

    torch.manual_seed(0)
    model, x = (ViTForImageClassification if held else ViTModel)(looking_vit().config).eval(), images()
    (model.vit if held else model).__class__ = Narrow
    plain = call(model, x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(call(model, x), plain)
    evopatch.set_keep_ratio(model, 0.5)
    found, host = call(model, x), model.vit if held else model
    assert moved(found, plain) > 1e-4
    assert {tokens.shape for tokens in host.looked} == {host.embeddings(x).shape}
    with evopatch.full_grid(model):
        torch.testing.assert_close(call(model, x), found, atol=2e-5, rtol=2e-5)
    assert torch.equal(call(evopatch.remove(model), x), plain)


# Tools that compile or trace in their own ways


@pytest.mark.parametrize("name", ["vit", "hf_vit", "levit"])
def test_script_and_symbolic_trace_say_what_to_do(name):
    model = evopatch.apply(build(name))
    with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.script .*torch\.export"):
        torch.jit.script(model)
    if name != "hf_vit":  # transformers' models can't be traced so, patched or not
        with pytest.raises(UnsupportedInputError, match=r"symbolic_trace .*torch\.export"):
            torch.fx.symbolic_trace(model)


def test_a_model_that_nobody_holds_is_freed():
    model = evopatch.apply(build("vit"))
    call(model, images())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@every(KINDS)
def test_a_patched_model_says_what_it_is(name):
    model = build(name)
    before = repr(model)
    evopatch.apply(model)
    paths = [paths[0] for paths in Patched(model).host.blocks()]
    assert all("evopatch: keeps" in repr(model.get_submodule(path)) for path in paths)
    assert "of the tokens slow, selects them" in repr(model)
    evopatch.remove(model)
    assert repr(model) == before
