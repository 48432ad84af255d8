"""What somebody changes in a patched model counts, as it would in one that is patched afterwards; or is refused."""

import copy
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from comparing import moved
from timm.models.vision_transformer import Attention, Block, ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
from variants import build, call, images, images_for

import evopatch
from evopatch import BypassError, CheckpointError, UnsupportedModelError

SMALL = {"img_size": 40, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4}


class Mixer(nn.Module):
    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def vit(cls=VisionTransformer, **options):
    torch.manual_seed(0)
    model = cls(**SMALL, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def in_full_grid(model, x):
    with evopatch.full_grid(model):
        return call(model, x)


def append_block(model):
    torch.manual_seed(1)
    model.blocks.append(Block(48, 4).eval())


def mix_after_norm(model):
    model.norm = nn.Sequential(model.norm, Mixer())


def attend_after_blocks(model):
    torch.manual_seed(1)
    model.norm = Block(48, 4).eval()


@pytest.mark.parametrize("change", [append_block, mix_after_norm, attend_after_blocks])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_what_reads_patch_tokens_after_the_last_block_finds_them(change, first):
    model, x = vit(), images()
    if first and change is not append_block:
        change(model)
    evopatch.apply(model)
    plain = model(x)
    if not first or change is append_block:
        change(model)
        assert moved(model(x), plain) > 1e-3
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["torchvision", "hf_vit"])
@torch.no_grad()
def test_the_same_in_other_libraries(name):
    model, x = build(name), images()
    if name == "torchvision":
        model.encoder.ln = nn.Sequential(model.encoder.ln, Mixer())
    else:
        model.vit.layernorm = nn.Sequential(model.vit.layernorm, Mixer())
    evopatch.apply(model)
    torch.testing.assert_close(call(model, x), in_full_grid(model, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "path"), [("vit", "blocks"), ("torchvision", "encoder"), ("torchvision", "encoder.layers")]
)
@torch.no_grad()
def test_hooks_on_what_holds_the_blocks_see_all_tokens(name, path):
    model, x = build(name), images()
    evopatch.apply(model)
    plain, seen = call(model, x), []
    model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)
    assert seen == [26]


def test_looking_ahead_leaves_no_trace_in_what_took_the_place_of_linear_layers():
    model, x = vit().train(), images()
    model.qconfig = get_default_qat_qconfig("x86")
    prepare_qat(model, inplace=True)
    unpatched = copy.deepcopy(model)
    evopatch.apply(model, keep_ratio=0.9999)
    seen = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    model(x)
    unpatched(x)
    assert seen == [(len(x), 26, 48)] * 6
    path = "blocks.2.attn.qkv.activation_post_process.activation_post_process"
    ours, stock = model.get_submodule(path), unpatched.get_submodule(path)
    torch.testing.assert_close(ours.max_val, stock.max_val, rtol=0.1, atol=0.0)


class Extended(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.added, self.gains = None, (1.0,)

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, channels = x.shape
        qkv = self.qkv(x)
        if self.added is not None:
            qkv = qkv + self.added(x)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v * self.gains[0])
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))


def add_module(block):
    torch.manual_seed(3)
    block.attn.added = nn.Linear(48, 144)


def change_tuple(block):
    block.attn.gains = (3.0,)


def change_own_core(block):
    block.fused_attn, block.scale = False, 1.0


@pytest.mark.parametrize("change", [add_module, change_tuple, change_own_core])
@torch.no_grad()
def test_attributes_count_in_all_blocks_alike(change):
    model, x = vit(block_fn=ParallelScalingBlock if change is change_own_core else Block), images()
    if change is not change_own_core:
        for block in model.blocks:
            weights = block.attn.state_dict()
            block.attn = Extended(48, num_heads=4, qkv_bias=True).eval()
            block.attn.load_state_dict(weights)
    evopatch.apply(model)
    plain = model(x)
    for block in model.blocks:
        change(block)
    found = model(x)
    assert moved(found, plain) > 1e-3
    evopatch.remove(model)
    torch.testing.assert_close(evopatch.apply(model)(x), found, atol=2e-5, rtol=2e-5)


def walk_over(model, x):
    seen = []
    for block in model.blocks:
        x = block(x)
        seen.append(x.shape[1])
    return x, seen


class Helped(VisionTransformer):
    def forward_features(self, x, **kwargs):
        x, self.seen = walk_over(self, self._pos_embed(self.patch_embed(x)))
        return self.norm(x)


@pytest.mark.parametrize("after", [False, True])
@torch.no_grad()
def test_a_function_that_walks_for_the_model_gets_the_full_grid(after, monkeypatch):
    model, x = vit(VisionTransformer if after else Helped), images()
    evopatch.apply(model)
    if after:
        monkeypatch.setattr(VisionTransformer, "forward_features", Helped.forward_features)
    found = model(x)
    assert model.seen == [26] * 6
    torch.testing.assert_close(found, in_full_grid(model, x), atol=2e-5, rtol=2e-5)


class Dropping(VisionTransformer):
    left_out = ()

    def forward_features(self, x, **kwargs):
        x = self._pos_embed(self.patch_embed(x))
        for number, block in enumerate(self.blocks):
            if number not in self.left_out:
                x = block(x)
        return self.norm(x)


@pytest.mark.parametrize("left_out", [(1,), (2,), (3, 5), (0, 1, 2)])
@pytest.mark.parametrize("look_ahead", [1.0, 0.0])
@torch.no_grad()
def test_blocks_may_be_left_out(left_out, look_ahead):
    model, x = vit(Dropping), images()
    evopatch.apply(model, config=evopatch.EvoConfig(look_ahead=look_ahead))
    plain = model(x)
    model.left_out = left_out
    found = model(x)
    assert found.shape == plain.shape
    assert moved(found, plain) > 1e-4
    torch.testing.assert_close(found, in_full_grid(model, x), atol=2e-5, rtol=2e-5)


def test_another_pooling_is_not_saved_as_it_was_patched(tmp_path):
    model = evopatch.apply(timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_classes=7))
    evopatch.save_pretrained(model, tmp_path / "before")
    model.reset_classifier(7, global_pool="avg")
    with pytest.raises(UnsupportedModelError, match=r"its head read 1, when it was patched, and has 1 and 0 now"):
        evopatch.save_pretrained(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_what_another_model_learned_is_not_taken(tmp_path):
    x = images_for("hf_vit", 16)
    evopatch.save_pretrained(evopatch.apply(build("hf_vit"), images=x), tmp_path / "other")
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path / "own")
    shutil.copy(tmp_path / "other" / "evopatch.safetensors", tmp_path / "own")
    with pytest.raises(CheckpointError, match=r"holds '.*', which evopatch\.json doesn't list as learned"):
        evopatch.load_pretrained(tmp_path / "own")


def test_what_was_learned_and_lost_is_missed(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=48, num_classes=7, img_size=32)
    evopatch.apply(model, images=images(16, (32, 32)))
    evopatch.save_pretrained(model, tmp_path)
    (tmp_path / "evopatch.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds 0 tensors and evopatch\.json lists \d that the model learned"):
        evopatch.load_pretrained(tmp_path)


@torch.no_grad()
def test_a_copy_that_is_made_while_all_tokens_are_shown_shows_its_own():
    model, x = evopatch.apply(build("vit")), images()
    with evopatch.full_grid(model):
        copied = copy.deepcopy(model)
    shapes = []
    for each in (model, copied):
        each.blocks[4].__dict__["_evo_state"].passes = passes = []
        each(x)
        shapes.append(passes[0].compact)
    assert shapes == [True, True]


@pytest.mark.parametrize("name", ["swin", "levit", "sam"])
def test_settings_of_a_checkpointed_forward_are_its_own(name):
    model, x = evopatch.apply(build(name), keep_ratio=1.0).train(), images_for(name)
    model.set_grad_checkpointing(True)
    torch.manual_seed(0)
    out = call(model, x)
    evopatch.set_keep_ratio(model, 0.5)
    out.square().sum().backward()
    found = {parameter: value.grad for parameter, value in model.named_parameters()}
    model.zero_grad()
    evopatch.set_keep_ratio(model, 1.0)
    torch.manual_seed(0)
    call(model, x).square().sum().backward()
    for parameter, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[parameter], value.grad)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_what_is_learned_in_inference_mode_takes_part_in_training(name):
    model, x = build(name), images_for(name, 8)
    with torch.inference_mode():
        evopatch.apply(model, images=x)
    call(model.train(), x).square().sum().backward()


@pytest.mark.parametrize("representative", ["matched", "single", "none"])
@pytest.mark.parametrize("name", ["vit", "gap", "pit", "torchvision_swin", "torchvision_swinv2"])
@torch.no_grad()
def test_no_images(name, representative):
    model, x = build(name), images_for(name)[:0]
    expected = call(model, x).shape
    evopatch.apply(model, config=evopatch.EvoConfig(representative=representative))
    assert call(model, x).shape == expected


def test_a_stock_model_reads_prefix_tokens_alone():
    config = transformers.ViTConfig(
        image_size=40, patch_size=8, hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96
    )
    model, x = transformers.ViTForImageClassification(config).eval(), images()
    evopatch.apply(model)
    state = model.vit._evo_state
    state.passes = []
    model(x)
    assert state.passes[0].reads_prefix


@torch.no_grad()
def test_blocks_are_compiled_in_place_not_wrapped():
    model, x = evopatch.apply(build("vit")), images()
    expected, block = model(x), model.blocks[0]
    model.blocks[0] = torch.compile(block, backend="eager")
    with pytest.raises(BypassError, match=r"call blocks\.0\.compile\(\), which wraps nothing"):
        model(x)
    model.blocks[0] = block
    block.compile(backend="eager")
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-5)
