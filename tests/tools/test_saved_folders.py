"""What save_pretrained takes away from a folder, what it leaves, and the card that it writes."""

import json
import os
import re
import stat

import pytest
import timm
import torch
import transformers
import yaml
from variants import build, call, images

import evopatch
from evopatch import CheckpointError, EvoConfig


def names(folder):
    return sorted(file.name for file in folder.iterdir())


OWN = ["README.md", "config.json", "evopatch.json", "model.safetensors"]


@pytest.fixture
def in_shards(monkeypatch):
    """transformers saves in several files, until it is called off."""
    save = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "save_pretrained",
        lambda self, folder, **kwargs: save(self, folder, max_shard_size="10KB", **kwargs),
    )
    return monkeypatch.undo


def test_other_files_stay(tmp_path):
    others = ["model_best.safetensors", "model_ema.safetensors", "model-backup.safetensors", "modelling.txt", "x.bin"]
    for name in others:
        (tmp_path / name).write_bytes(name.encode())
    for _ in range(2):
        evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
        assert names(tmp_path) == sorted(OWN + others)
        assert all((tmp_path / name).read_bytes() == name.encode() for name in others)


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_others_may_read_it_as_the_umask_says(library, mask, tmp_path):
    model = build("hf_vit") if library == "transformers" else timm.create_model("test_vit")
    seen = images(16) if library == "transformers" else torch.randn(16, 3, 160, 160)
    before = os.umask(mask)
    try:
        evopatch.save_pretrained(evopatch.apply(model, images=seen), tmp_path)
    finally:
        os.umask(before)
    found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert found.keys() >= {"model.safetensors", "evopatch.safetensors", "config.json", "evopatch.json"}
    assert set(found.values()) == {0o666 & ~mask}


@torch.no_grad()
def test_shards_of_an_earlier_save_go(in_shards, tmp_path):
    (tmp_path / "model-00001-of-00002-backup.safetensors").write_bytes(b"mine")
    model, x = evopatch.apply(build("hf_vit")), images()
    evopatch.save_pretrained(model, tmp_path)
    listed = json.loads((tmp_path / "evopatch.json").read_text())["files"]
    assert len([name for name in listed if name.startswith("model-")]) > 2, "in one file"
    assert set(listed) | {"README.md", "evopatch.json", "model-00001-of-00002-backup.safetensors"} == set(
        names(tmp_path)
    )
    in_shards()
    (tmp_path / "model.safetensors.index.json").unlink()  # the list in evopatch.json is enough
    evopatch.save_pretrained(model, tmp_path)
    assert names(tmp_path) == sorted([*OWN, "model-00001-of-00002-backup.safetensors"])
    assert torch.equal(call(evopatch.load_pretrained(tmp_path), x), call(model, x))


def test_shards_that_an_index_lists_go(in_shards, tmp_path):
    build("hf_vit").save_pretrained(tmp_path)
    assert "model.safetensors.index.json" in names(tmp_path)
    in_shards()
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    assert names(tmp_path) == OWN


@pytest.mark.parametrize("file", ["evopatch.json", "model.safetensors.index.json"])
def test_a_list_reaches_nothing_outside_and_no_card(file, tmp_path):
    outside, folder = tmp_path / "outside.safetensors", tmp_path / "folder"
    outside.write_text("mine")
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "listed.safetensors").write_text("of an earlier model")
    listed = ["../outside.safetensors", str(outside), "README.md", "sub", ".", "", 7, "listed.safetensors", "missing"]
    key = "files" if file == "evopatch.json" else "weight_map"
    (folder / file).write_text(json.dumps({key: listed if key == "files" else dict(enumerate(listed))}))
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), folder)
    assert outside.read_text() == (folder / "README.md").read_text() == "mine"
    assert names(folder) == sorted([*OWN, "sub"])


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"files": 3}', '{"files": {"a": ["b"]}}'])
def test_a_damaged_list_is_none(text, tmp_path):
    (tmp_path / "evopatch.json").write_text(text)
    (tmp_path / "b").write_text("mine")
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    assert names(tmp_path) == sorted([*OWN, "b"])


def test_weights_that_would_be_read_instead_are_refused(in_shards, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is of another checkpoint.*move it away"):
        evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    assert names(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def front_matter(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def stock_code(body):
    return re.search(r"unpatched model: `(.*)`", body)[1]


def timm_model(**options):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", img_size=40, patch_size=8, depth=6, **options).eval()


CARDS = {
    "timm": (timm_model, "timm/deit_tiny_patch16_224.fb_in1k", (3, 40, 40)),
    "transformers": (lambda: build("hf_vit"), None, (3, 40, 40)),
}


@pytest.mark.parametrize("library", sorted(CARDS))
def test_the_card(library, tmp_path):
    make, base_model, size = CARDS[library]
    config = EvoConfig(keep_ratio=0.3)
    model = evopatch.apply(make(), config=config)
    evopatch.save_pretrained(model, tmp_path)
    front, body = front_matter((tmp_path / "README.md").read_text())
    assert front["library_name"] == library
    assert front.get("base_model") == base_model
    assert "evopatch" in front["tags"]
    expected = evopatch.profile(model, size).ratio
    assert 0.3 < expected < 0.9
    assert f"40x40 pixels takes {expected:.3f} of the unpatched" in body
    assert EvoConfig.from_json(re.search(r"^\{.*\}$", body, re.MULTILINE)[0]) == config
    assert str(tmp_path) not in body
    known = {"evopatch": evopatch, "timm": timm, "transformers": transformers}
    for code, patched in (('evopatch.load_pretrained("folder")', True), (stock_code(body), False)):
        assert code in body
        made = eval(code.replace('folder"', f'{tmp_path}"'), known)
        assert isinstance(model, type(made))
        assert evopatch.is_patched(made) is patched


def test_a_name_on_the_hub_is_the_base_model_and_a_path_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = evopatch.apply(build("hf_vit"))
    model.config._name_or_path = "google/vit-base-patch16-224"
    model.name_or_path = "google/vit-base-patch16-224"
    evopatch.save_pretrained(model, tmp_path / "named")
    front, body = front_matter((tmp_path / "named" / "README.md").read_text())
    assert front["base_model"] == "google/vit-base-patch16-224"
    assert "# vit-base-patch16-224, patched" in body
    (tmp_path / "runs" / "vit").mkdir(parents=True)
    for path in ("runs/vit", str(tmp_path / "runs" / "vit"), ""):
        model.name_or_path = path
        evopatch.save_pretrained(model, tmp_path / "other")
        assert "base_model" not in front_matter((tmp_path / "other" / "README.md").read_text())[0]
        (tmp_path / "other" / "README.md").unlink()


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    evopatch.save_pretrained(evopatch.apply(build("hf_vit")), tmp_path)
    assert "evopatch" in (tmp_path / "README.md").read_text(), "nor does an earlier save forbid it"


@torch.no_grad()
def test_a_model_that_takes_more_than_images_has_a_card_without_flops(tmp_path):
    vision = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 40, "patch_size": 8}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    model = evopatch.apply(transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text)))
    evopatch.save_pretrained(model, tmp_path)
    front, body = front_matter((tmp_path / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert "FLOPs" not in body
    assert '"keep_ratio": 0.5' in body
