"""save_pretrained and load_pretrained."""

import json
import os
from functools import partial

import pytest
import timm
import torch
import transformers
from torch import nn
from variants import build, call, images

import evopatch
from evopatch import CheckpointError, EvoConfig

CONFIG = EvoConfig(keep_ratio=[0.6, 0.25], stages=[2, 4], representative="single", importance=0.2)


def timm_model():
    torch.manual_seed(0)
    options = {"img_size": 40, "patch_size": 8, "depth": 6, "num_classes": 7, "drop_path_rate": 0.1}
    return timm.create_model("deit_tiny_patch16_224", **options).eval()


MODELS = {
    "timm": timm_model,
    "vit": lambda: build("hf_vit"),
    "deit": lambda: build("hf_deit_teacher"),
    "backbone": lambda: build("hf_registers_backbone"),
    "clip": lambda: build("hf_clip"),
}
EVERY = pytest.mark.parametrize("name", sorted(MODELS))


@EVERY
@torch.no_grad()
def test_round_trip(name, tmp_path):
    model, x = evopatch.apply(MODELS[name](), config=CONFIG), images()
    expected = call(model, x)
    evopatch.save_pretrained(model, tmp_path / "new" / "folder")
    loaded = evopatch.load_pretrained(tmp_path / "new" / "folder")
    assert type(loaded) is type(model)
    assert evopatch.config_of(loaded) == CONFIG
    assert not loaded.training
    assert torch.equal(call(loaded, x), expected)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [
        "README.md",
        "config.json",
        "evopatch.json",
        "model.safetensors",
    ]


@EVERY
@torch.no_grad()
def test_the_folder_is_a_stock_checkpoint(name, tmp_path):
    model, x = MODELS[name](), images()
    unpatched = call(model, x)
    evopatch.save_pretrained(evopatch.apply(model), tmp_path)
    if name == "timm":
        stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    else:
        stock = type(model).from_pretrained(tmp_path).eval()
    assert not evopatch.is_patched(stock)
    assert torch.equal(call(stock, x), unpatched)


@torch.no_grad()
def test_a_part_of_a_model(tmp_path):
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    vit = ViTConfig(
        image_size=40,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
    )
    gpt2 = GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=50, n_positions=20, add_cross_attention=True)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)).eval()
    evopatch.apply(model.encoder, keep_ratio=0.3)
    evopatch.save_pretrained(model, tmp_path)
    assert list(json.loads((tmp_path / "evopatch.json").read_text())["hosts"]) == ["encoder"]
    loaded = evopatch.load_pretrained(tmp_path)
    options = {"pixel_values": images(), "decoder_input_ids": torch.tensor([[1, 2]] * 2)}
    assert torch.equal(loaded(**options).logits, model(**options).logits)


@torch.no_grad()
def test_arguments_for_the_library(tmp_path):
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    loaded = evopatch.load_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert len(loaded(images().bfloat16(), output_attentions=True).attentions) == 6


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(evopatch.CheckpointError, match=r"file/folder can't be made \(Not a directory\): expected a"):
        evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path / "file" / "folder")


@torch.no_grad()
def test_an_earlier_checkpoint_survives_a_failed_save(tmp_path, monkeypatch):
    model, x = evopatch.apply(build("hf_vit"), config=CONFIG), images()
    expected = call(model, x)
    evopatch.save_pretrained(model, tmp_path)
    with torch.no_grad():
        model.classifier.weight.zero_()

    def failing(self, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", failing)
    with pytest.raises(OSError, match="disk full"):
        evopatch.save_pretrained(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "evopatch.json", "model.safetensors"]
    assert torch.equal(call(evopatch.load_pretrained(tmp_path), x), expected)


@torch.no_grad()
def test_weights_in_other_files_are_replaced(tmp_path):
    old, model, x = build("hf_vit"), evopatch.apply(build("hf_vit"), config=CONFIG), images()
    model.classifier.weight.mul_(2)
    evopatch.save_pretrained(model, tmp_path)
    expected = call(model, x)
    for shard in ("10KB", "1GB"):
        old.save_pretrained(tmp_path, max_shard_size=shard)
        evopatch.save_pretrained(model, tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "evopatch.json", "model.safetensors"]
        assert torch.equal(call(evopatch.load_pretrained(tmp_path), x), expected)


@pytest.mark.parametrize("name", ["timm", "vit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floating_point_type_is_kept(name, dtype, tmp_path):
    evopatch.save_pretrained(evopatch.apply(MODELS[name]().to(dtype)), tmp_path)
    assert next(evopatch.load_pretrained(tmp_path).parameters()).dtype == dtype
    assert next(evopatch.load_pretrained(tmp_path, dtype=torch.float32).parameters()).dtype == torch.float32


class OwnViT(transformers.ViTForImageClassification):
    pass


def test_transformers_models_that_would_load_differently(tmp_path):
    with pytest.raises(CheckpointError, match="OwnViT .* is no class of transformers"):
        evopatch.save_pretrained(evopatch.apply(OwnViT(build("hf_vit").config)), tmp_path)
    model = evopatch.apply(build("hf_vit"))
    model.vit.layers[1].mlp.activation_fn = nn.ReLU()
    with pytest.raises(CheckpointError, match=r"'vit.layers.1.mlp.activation_fn .* here"):
        evopatch.save_pretrained(model, tmp_path)
    assert os.listdir(tmp_path) == []


def saved(tmp_path):
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    return tmp_path / "evopatch.json"


def changed(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text(file.read_text()[:40]), "is damaged or no JSON"),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "is damaged or no JSON"),
        (lambda file: file.write_text("[1, 2]"), "wasn't written by evopatch"),
        (lambda file: file.write_text('{"model": "vit"}'), "wasn't written by evopatch"),
        (lambda file: file.unlink(), "holds no evopatch.json: expected a folder written by"),
        (
            lambda file: changed(file, format=2, evopatch="9.1"),
            "format 2, written by evopatch 9.1; this is evopatch .* upgrade",
        ),
        (lambda file: changed(file, library="keras"), "library 'keras'"),
        (lambda file: changed(file, hosts={}), "at least one patched host"),
        (lambda file: changed(file, hosts={"vit": {"keep_ratio": 3}}), "keep_ratio=3: expected"),
        (lambda file: changed(file, hosts={"vit": {"keep": 0.3}}), "unknown setting"),
        (lambda file: changed(file, hosts={"vit": None}), "evopatch.json"),
        (
            lambda file: changed(file, hosts={"swin": {}}),
            r"ViTForImageClassification has nothing to patch that is named \['swin'\]",
        ),
        (
            lambda file: changed(file, hosts={"classifier": {}}),
            r"ViTForImageClassification has nothing to patch that is named \['classifier'\]",
        ),
        (lambda file: changed(file, hosts={"vit": {"stages": [2, 99]}}), r"doesn't fit the model .*starts at block 99"),
        (lambda file: (file.parent / "config.json").write_text("{"), "holds no checkpoint of transformers"),
        (lambda file: (file.parent / "model.safetensors").write_bytes(b"12345678"), "can't be loaded into ViTFor"),
    ],
)
def test_damaged_folders(tmp_path, damage, message):
    damage(saved(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        evopatch.load_pretrained(tmp_path)


def test_a_missing_weight_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved(tmp_path).parent / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="classifier.weight"):
        evopatch.load_pretrained(tmp_path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(evopatch.NotPatchedError):
        evopatch.save_pretrained(build("hf_vit"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"VisionTransformer .*expected a model of transformers"):
        evopatch.save_pretrained(evopatch.apply(build("vit")), tmp_path / "b")
    with pytest.raises(CheckpointError, match="Sequential"):
        evopatch.save_pretrained(nn.Sequential(evopatch.apply(build("hf_vit"))), tmp_path / "c")
    model = evopatch.apply(timm_model())
    model.blocks[3].norm1.eps = 1e-3
    with pytest.raises(CheckpointError, match=r"another model .*'blocks.3.norm1 .*timm.create_model"):
        evopatch.save_pretrained(model, tmp_path / "d")
    assert not (tmp_path / "d").exists() or not os.listdir(tmp_path / "d")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        evopatch.load_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="is a file"):
        evopatch.save_pretrained(evopatch.apply(timm_model()), tmp_path / "file")


@pytest.mark.parametrize("option", ["act_layer", "norm_layer"])
def test_layers_that_timm_cannot_write_down_are_refused(option, tmp_path):
    layer = {"act_layer": nn.ReLU, "norm_layer": partial(nn.LayerNorm, eps=1e-3)}[option]
    model = timm.create_model("vit_tiny_patch16_224", img_size=40, patch_size=8, depth=4, **{option: layer}).eval()
    with pytest.raises(CheckpointError, match="timm can't build VisionTransformer .*such as a layer's name"):
        evopatch.save_pretrained(evopatch.apply(model), tmp_path)
    assert not os.listdir(tmp_path)


def test_a_name_on_the_hub_without_network(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'owner/name': no such folder here, and it couldn't be had from the"):
        evopatch.load_pretrained("owner/name")


@torch.no_grad()
def test_a_name_on_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    saved(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(tmp_path))
    x = images()
    loaded, own = evopatch.load_pretrained("owner/name"), evopatch.apply(build("hf_vit"))
    assert evopatch.config_of(loaded) == evopatch.config_of(own)
    evopatch.set_config(loaded, CONFIG)
    evopatch.set_config(own, CONFIG)
    assert torch.equal(call(loaded, x), call(own, x))
    assert asked == ["owner/name"]
