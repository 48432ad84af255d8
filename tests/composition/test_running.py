"""What runs a patched model: torch.func, AOTInductor, Lightning."""

import pytest
import torch
from comparing import gradients, moved
from torch import nn
from variants import build, call, images_for

import evopatch

NAMES = pytest.mark.parametrize("name", ["vit", "hf_vit"])


@NAMES
def test_torch_func(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    parameters = {path: p.detach() for path, p in model.named_parameters()}

    def loss(parameters, x):
        out = torch.func.functional_call(model, parameters, (x,))
        return (out if isinstance(out, torch.Tensor) else out.logits).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    for path, gradient in gradients(model, x).items():
        torch.testing.assert_close(found[path], gradient, atol=1e-4 * (1 + gradient.abs().max().item()), rtol=1e-3)
    changed = {path: p + 0.01 for path, p in parameters.items()}
    with torch.no_grad():
        before = call(model, x)
        assert abs(loss(changed, x) - before.square().sum()) > 1e-2
        assert torch.equal(call(model, x), before)


def test_gradients_of_each_image_by_vmap():
    model, x = evopatch.apply(build("vit")), images_for("vit", 3)
    parameters = {path: p.detach() for path, p in model.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)["head.weight"]
    assert found.shape[0] == 3
    for own, image in zip(found, x, strict=True):
        torch.testing.assert_close(own, gradients(model, image.unsqueeze(0))["head.weight"], atol=1e-4, rtol=1e-3)
    assert moved(found[0], found[1]) > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_compiled_ahead_of_time(tmp_path):
    model, x = evopatch.apply(build("vit", depth=3), config=evopatch.EvoConfig(stages=(1, 2))), images_for("vit")
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=str(tmp_path / "model.pt2")
    )
    found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found, model(x), atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(found, model(x)) > 1e-4


def test_trained_by_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = evopatch.apply(build("vit"))

        def training_step(self, batch, index):
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    losses = []
    data = torch.utils.data.TensorDataset(images_for("vit", 4), torch.arange(4))
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    assert losses[-1] < losses[0] - 0.05
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    with torch.no_grad():
        other = Module.load_from_checkpoint(tmp_path / "model.ckpt").eval()
        assert torch.equal(other.model(data.tensors[0]), module.eval().model(data.tensors[0]))
        assert evopatch.config_of(other).keep_ratio == 0.5
