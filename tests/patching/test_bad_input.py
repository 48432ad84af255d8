"""Bad input: the error says what and where, and the model stays as it was."""

from types import MethodType

import pytest
import timm
import torch
from comparing import Snapshot
from timm.models.vision_transformer import Block
from torch import nn
from variants import build, images

import evopatch
from evopatch import EvoConfig


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_ratio": 0}, evopatch.ConfigError, r"keep_ratio=0: expected a number in \(0, 1\]"),
        ({"keep_ratio": 1.01}, evopatch.ConfigError, "keep_ratio=1.01"),
        (
            {"keep_ratio": [0.5, 0.4, 0.3], "config": EvoConfig(stages=2)},
            evopatch.ConfigError,
            r"3 keep ratios .* for 2 run\(s\)",
        ),
        ({"config": EvoConfig(start=6)}, evopatch.ConfigError, "starts at block 6, beyond the model's 6 blocks"),
        ({"config": {"keep_ratio": 0.5}}, evopatch.ConfigError, "config is a dict: expected an evopatch.EvoConfig"),
    ],
)
def test_settings(arguments, error, message):
    model = build("vit")
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        evopatch.apply(model, **arguments)
    before.assert_untouched(model)


def test_unknown_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(evopatch.UnsupportedModelError, match=r"nothing to patch in [\w.]*\.Sequential") as found:
        evopatch.apply(model)
    served = str(found.value).split("Served classes: ")[1].split(", ")
    assert "timm.models.vision_transformer.VisionTransformer" in served
    assert "Leave it unpatched, or write an adapter" in str(found.value)
    assert not evopatch.supported(model)
    with pytest.raises(evopatch.UnsupportedModelError, match="str is not a torch.nn.Module"):
        evopatch.apply("deit_tiny_patch16_224")


def test_a_library_in_a_version_without_adapter(monkeypatch):
    import transformers

    from evopatch.patching import registry

    def failing(target):
        if "transformers" in target:
            raise ImportError("cannot import name 'ViTModel'")
        return load(target)

    load = registry._load
    monkeypatch.setattr(registry, "_load", failing)
    with pytest.raises(evopatch.UnsupportedModelError, match="adapter for transformers can't be used: cannot import"):
        evopatch.apply(transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=2)))
    assert evopatch.is_patched(evopatch.apply(build("vit")))


def test_a_library_that_is_too_old(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.9")
    with pytest.raises(evopatch.UnsupportedModelError, match=r"timm 1\.0\.9 is older than 1\.0\.12: update"):
        evopatch.apply(build("vit"))
    for version in ("1.0.12", "1.1.0.dev0", "2.0"):
        monkeypatch.setattr(timm, "__version__", version)
        assert evopatch.is_patched(evopatch.apply(build("vit")))


def test_a_library_that_is_too_old_to_save(monkeypatch, tmp_path):
    model = evopatch.apply(timm.create_model("test_vit"))
    evopatch.save_pretrained(model, tmp_path)
    monkeypatch.setattr(timm, "__version__", "1.0.25")
    for call in (lambda: evopatch.save_pretrained(model, tmp_path), lambda: evopatch.load_pretrained(tmp_path)):
        with pytest.raises(evopatch.CheckpointError, match=r"timm 1\.0\.25 is older than 1\.0\.26: update"):
            call()


def test_a_class_changed_after_apply_is_not_undone():
    from torch.nn.utils import parametrize

    model, x = evopatch.apply(build("vit")), images()
    parametrize.register_parametrization(model, "pos_embed", nn.Identity())
    expected = model(x)
    with pytest.raises(evopatch.UnsupportedModelError, match="'ParametrizedVisionTransformer' got another class"):
        evopatch.remove(model)
    assert torch.equal(model(x), expected)
    parametrize.remove_parametrizations(model, "pos_embed")
    assert type(evopatch.remove(model)) is type(build("vit"))


def test_already_patched():
    model, x = evopatch.apply(build("vit")), images()
    expected = model(x)
    with pytest.raises(evopatch.AlreadyPatchedError, match="'VisionTransformer' is already patched"):
        evopatch.apply(model)
    with pytest.raises(evopatch.AlreadyPatchedError, match="'0' is already patched"):
        evopatch.apply(nn.Sequential(model))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "call",
    [
        evopatch.remove,
        evopatch.config_of,
        lambda m: evopatch.set_keep_ratio(m, 0.5),
        lambda m: evopatch.set_config(m, EvoConfig()),
        lambda m: evopatch.token_selection(m, images()),
        lambda m: evopatch.profile(m, (3, 40, 40)),
    ],
)
def test_not_patched(call):
    with pytest.raises(evopatch.NotPatchedError, match="VisionTransformer is not .*patched"):
        call(build("vit"))


def test_a_bad_change_keeps_the_old_setting():
    model, x = evopatch.apply(build("vit")), images()  # with four blocks left for runs
    expected = model(x)
    for ratio in (0.0, [0.5] * 5, 2):
        with pytest.raises(evopatch.ConfigError):
            evopatch.set_keep_ratio(model, ratio)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["vit", "rope"])
def test_causal_attention_is_refused(name):
    model, x = evopatch.apply(build(name)), images()
    mask = torch.ones(26, 26, dtype=torch.bool).tril()
    for call in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(evopatch.UnsupportedInputError, match=r"attn_mask .*was passed .*block 0.*set_keep_ratio"):
            call(x, attn_mask=mask)
        with pytest.raises(evopatch.UnsupportedInputError, match="is_causal was passed"):
            call(x, is_causal=True)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.isfinite(model(x, attn_mask=mask)).all()


def test_fewer_than_two_patch_tokens():
    model = evopatch.apply(build("vit", img_size=8))
    with pytest.raises(evopatch.UnsupportedInputError, match=r"1 patch token\(s\): expected at least 2"):
        model(images(size=8))
    assert evopatch.apply(build("vit", img_size=(8, 16)))(images(size=(8, 16))).shape == (2, 7)


def test_a_block_called_from_outside_is_refused():
    model, x = evopatch.apply(build("vit")), torch.randn(2, 26, 48)
    with pytest.raises(evopatch.BypassError, match=r"blocks\.3 was called from outside"):
        model.blocks[3](x)
    with pytest.raises(evopatch.BypassError, match=r"blocks\.0 was called"):
        model.blocks(x)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(model.blocks[3](x), build("vit").blocks[3](x))


def test_hooks_on_blocks_and_leaves_see_all_tokens():
    model, x, seen = build("vit"), images(), []
    for i in (1, 4):
        model.blocks[i].register_forward_hook(lambda m, a, out, i=i: seen.append((i, tuple(out.shape))))
        model.blocks[i].attn.qkv.register_forward_hook(lambda m, a, out, i=i: seen.append((f"qkv{i}", out.shape[1])))
    evopatch.apply(model, config=EvoConfig(keep_ratio=[0.6, 0.36], stages=[2, 4]))
    model(x)
    # 25 patches and the class token, also in block 4, which works on 9 slow tokens.
    assert seen == [("qkv1", 26), (1, (2, 26, 48)), ("qkv4", 26), (4, (2, 26, 48))]


@torch.no_grad()
def test_shared_blocks_are_refused():
    model, x = build("vit"), images()
    model.blocks[4] = model.blocks[3]
    original, before = model(x), Snapshot(model)
    with pytest.raises(evopatch.UnsupportedModelError, match=r"blocks\.4 is the same module as blocks\.3"):
        evopatch.apply(model)
    before.assert_untouched(model)
    assert torch.equal(model(x), original)


def test_a_block_with_a_forward_of_its_own_is_refused():
    model = build("vit")
    model.blocks[1].forward = lambda x, **kwargs: x
    with pytest.raises(evopatch.UnsupportedModelError, match=r"blocks\.1 \(Block\) has a forward of its own"):
        evopatch.apply(model)


class Doubling(Block):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * 2


def test_a_block_with_the_forward_of_a_base_class_is_refused():
    model = build("vit", block_fn=Doubling)
    model.blocks[1].forward = MethodType(Block.forward, model.blocks[1])
    with pytest.raises(evopatch.UnsupportedModelError, match=r"blocks\.1 \(Doubling\) has a forward of its own"):
        evopatch.apply(model)


def test_configurations_of_another_type():
    model = build("vit")
    with pytest.raises(evopatch.ConfigError, match="config is a dict"):
        evopatch.apply(model, config={})
    evopatch.apply(model)
    with pytest.raises(evopatch.ConfigError, match="config is a dict"):
        evopatch.set_config(model, {"keep_ratio": 0.5})


@pytest.mark.parametrize("label", [-1, 7])
def test_labels_outside_the_classes(label):
    from evopatch.measure.accuracy import evaluate

    model = evopatch.apply(build("vit"))
    batch = (images(), torch.tensor([0, label]))
    with pytest.raises(evopatch.DataError, match=f"image 1 has the label {label}: expected 0 to 6"):
        evaluate(model, [batch], [EvoConfig()], (3, 40, 40))
    with pytest.raises(evopatch.DataError, match="no images"):
        evaluate(model, [], [EvoConfig()], (3, 40, 40))
    assert evopatch.config_of(model) == EvoConfig()
