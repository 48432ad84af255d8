"""Whose predictions a run learns: teachers that hang on the model, and compiled ones."""

import copy
import functools

import pytest
import torch
from samples import Images
from torch import nn
from variants import build

import evopatch
from evopatch import ConfigError, FinetuneConfig
from evopatch.patching.handle import Patched, shared_copy

CONFIG = FinetuneConfig(epochs=2, batch_size=16, learning_rate=1e-3)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, x):
        return self.inside(x)


def taught(model, teacher=None, **settings):
    config = FinetuneConfig(**CONFIG.to_dict() | settings)
    return evopatch.finetune(model, Images("none"), config=config, teacher=teacher, progress=False).losses


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        (Wrapper, "inside.cls_token"),
        (functools.partial(torch.compile, backend="eager"), "_orig_mod.cls_token"),
        (lambda model: Patched(model).original(), "cls_token"),
    ],
    ids=["wrapped", "compiled", "on_the_same_weights"],
)
def test_a_teacher_that_would_change_with_the_model_is_refused(teacher, name):
    model = evopatch.apply(build("vit"))
    with pytest.raises(ConfigError, match=rf"the teacher's '{name}' is the model's own"):
        taught(model, teacher(model))


def test_a_copy_of_the_patched_model_may_teach():
    model = evopatch.apply(build("vit"))
    copied = copy.deepcopy(Wrapper(model))
    before = copy.deepcopy(copied.state_dict())
    taught(model, copied)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copied.state_dict().items())


def test_a_frozen_part_may_be_the_teachers_in_modules_of_its_own_only():
    teacher = build("vit")
    model = evopatch.apply(shared_copy(teacher))
    model.head = nn.Linear(teacher.head.in_features, 7)
    model.requires_grad_(False).head.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    losses = taught(model, teacher)
    assert losses[1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    teacher.norm = model.norm
    with pytest.raises(ConfigError, match="the teacher's 'norm.weight' is the model's own"):
        taught(model, teacher)


@pytest.mark.parametrize("trainable", ["all", "blocks"])
def test_what_the_settings_leave_out_may_be_the_teachers_too(trainable):
    model, teacher = evopatch.apply(build("vit")), build("gap")
    teacher.head.weight = nn.Parameter(model.head.weight.detach())
    if trainable == "blocks":
        taught(model, teacher, trainable=trainable)
        return
    with pytest.raises(ConfigError, match=r"the teacher's 'head.weight' is the model's own"):
        taught(model, teacher, trainable=trainable)


def test_running_statistics_that_are_the_teachers_too_are_refused():
    model, teacher = evopatch.apply(build("levit")), build("levit")
    path, norm = next((path, m) for path, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean = model.get_submodule(path).running_mean
    with pytest.raises(ConfigError, match=rf"the teacher's '{path}.running_mean' is the model's own"):
        taught(model, teacher)


def test_compiled_models_teach_and_learn_as_they_do_uncompiled():
    def model():
        return evopatch.apply(build("vit", depth=3))

    expected = taught(model())
    assert taught(torch.compile(model(), backend="eager")) == pytest.approx(expected, rel=1e-4)
    expected = taught(model(), build("gap", depth=3))
    teacher = torch.compile(build("gap", depth=3), backend="eager")
    assert taught(model(), teacher) == pytest.approx(expected, rel=1e-4)


def test_a_compiled_teacher_is_the_one_that_a_run_was_begun_with(tmp_path):
    def run(teacher, **arguments):
        model = evopatch.apply(build("vit"))
        evopatch.finetune(model, Images("none"), config=CONFIG, teacher=teacher, output=tmp_path, progress=False,
                          **arguments)  # fmt: skip

    run(build("gap"))
    run(torch.compile(build("gap"), backend="eager"), resume=True)
    with pytest.raises(ConfigError, match="teacher was"):
        run(build("vit"), resume=True)
