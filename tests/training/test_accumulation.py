"""How many forwards make a step, whatever accelerate is told elsewhere."""

import accelerate
import pytest
import torch
from samples import Images
from variants import build

import evopatch
from evopatch import ConfigError, FinetuneConfig

VARIABLE = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def run(model, accumulation_steps):
    config = FinetuneConfig(epochs=2, batch_size=4, accumulation_steps=accumulation_steps, learning_rate=1e-3)
    return evopatch.finetune(model, Images("tuple"), config=config, progress=False)


@pytest.mark.parametrize("steps", [1, 2])
def test_accelerates_variable_does_not_change_how_many_forwards_make_a_step(steps, monkeypatch):
    expected, model = evopatch.apply(build("vit")), evopatch.apply(build("vit"))
    plain = run(expected, steps)
    monkeypatch.setenv(VARIABLE, "4")
    result = run(model, steps)
    assert (result.steps, result.losses) == (plain.steps, plain.losses)
    assert result.steps == 16 // steps
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_another_number_of_forwards_in_accelerates_own_configuration_is_refused(monkeypatch):
    prepare = accelerate.Accelerator.prepare

    def as_deepspeed_does(accelerator, *objects):
        accelerator.gradient_accumulation_steps = 4
        return prepare(accelerator, *objects)

    monkeypatch.setattr(accelerate.Accelerator, "prepare", as_deepspeed_does)
    monkeypatch.setenv(VARIABLE, "4")
    model = evopatch.apply(build("vit"))
    with pytest.raises(ConfigError, match=rf"accumulation_steps=1, but accelerate takes 4 .*{VARIABLE}=4"):
        run(model, 1)
    assert not model.training


def test_a_run_of_fewer_steps_than_planned_is_an_error():
    model = evopatch.apply(build("vit"))

    def another(module, args, out):
        if module.training:
            accelerate.Accelerator(gradient_accumulation_steps=4)

    handle = model.register_forward_hook(another)
    with pytest.raises(
        evopatch.TrainingError, match=r"after [45] optimizer steps and 0 whole epochs: expected 16 and 2"
    ):
        run(model, 1)
    handle.remove()
