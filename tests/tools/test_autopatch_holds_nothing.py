"""After autopatch nothing of evopatch holds the models that were made inside."""

import subprocess
import sys

import pytest

CODE = """
import gc, sys, weakref
import evopatch

def scope():
    with evopatch.autopatch(keep_ratio=0.5):
        import timm
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
        kept.append(timm.create_model)
        assert evopatch.is_patched(model)
        return weakref.ref(model)

kept = []
model = scope()
assert "transformers" not in sys.modules
gc.collect()
assert model() is None, [type(holder) for holder in gc.get_referrers(model())]
{more}
"""

LATER = """
import timm
with evopatch.autopatch() as patched:
    import transformers
    assert {"timm", "transformers"} <= set(sys.modules)
    evopatch.is_patched(timm.create_model("vit_tiny_patch16_224", img_size=32)) or sys.exit("timm")
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=32,
                                    patch_size=8, intermediate_size=96)
    transformers.ViTModel(config).save_pretrained(sys.argv[1])
    assert evopatch.is_patched(transformers.ViTModel.from_pretrained(sys.argv[1]))
    assert len(patched) == 2
assert not evopatch.is_patched(transformers.ViTModel.from_pretrained(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", LATER], ids=["one library", "the other imported later"])
def test_models_are_freed(more, tmp_path):
    code = CODE.replace("{more}", more)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_a_model_that_is_held_is_noticed():
    code = CODE.replace("{more}", "").replace("assert evopatch.is_patched(model)", "kept.append(model)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AssertionError" in run.stderr
