"""evopatch.finetune: labels, self-distillation, both libraries."""

import copy
import json

import pytest
import torch
from matrix import cases
from samples import FAST, Images
from variants import build, call, images

import evopatch
from evopatch import ConfigError, EvoConfig, FinetuneConfig
from evopatch.training.student import Student


@cases(("name", "kind"), [("vit", "tuple"), ("hf_vit", "mapping"), ("gap", "mapping")], fast=["vit"])
def test_labels(name, kind):
    model = evopatch.apply(build(name))
    before = copy.deepcopy(model.state_dict())
    result = evopatch.finetune(model, Images(kind), Images(kind, seed=9), FAST, progress=False)
    assert len(result.losses) == 6
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert result.after.top1 > result.before.top1 + 15
    assert result.unpatched.kl == 0
    assert result.images_per_second > 0
    assert not model.training
    assert evopatch.config_of(model) == EvoConfig()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_without_labels_the_unpatched_model_teaches(name):
    model = evopatch.apply(build(name), keep_ratio=1.0)
    evopatch.finetune(model, Images("tuple"), config=FAST, progress=False)
    evopatch.set_config(model, EvoConfig.paper(0.2))
    teacher, x = evopatch.remove(copy.deepcopy(model)), Images("none").images

    @torch.no_grad()
    def divergence():
        own, wanted = call(model, x).log_softmax(1), call(teacher, x).log_softmax(1)
        return torch.nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True).item()

    before = divergence()
    config = FinetuneConfig(epochs=6, batch_size=8, learning_rate=1e-4, temperature=2.0)
    result = evopatch.finetune(model, Images("none"), config=config, progress=False)
    assert result.before is result.after is result.unpatched is None
    assert divergence() < 0.5 * before


def test_the_same_seed_gives_the_same_weights():
    def run(seed):
        model = evopatch.apply(build("vit"))
        evopatch.finetune(
            model, Images("tuple"), config=FinetuneConfig(epochs=1, batch_size=8, seed=seed), progress=False
        )
        return torch.cat([p.flatten() for p in model.parameters()])

    first = run(0)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)


def test_every_forward_of_a_step_has_its_own_random_numbers():
    model = evopatch.apply(build("vit"))
    drawn = []
    handle = model.register_forward_hook(lambda *_: drawn.append(torch.rand(()).item()) if model.training else None)
    config = FinetuneConfig(epochs=1, batch_size=4, accumulation_steps=4)
    evopatch.finetune(model, Images("tuple", 32), config=config, progress=False)
    handle.remove()
    training = drawn[:8]
    assert len(set(training)) == 8


def settings_of_epochs(monkeypatch, config, keep_ratio=0.5):
    """The model's settings in every epoch's first forward, and afterwards; one step is an epoch."""
    seen = []
    original = Student.forward

    def recording(self, images):
        seen.append(evopatch.config_of(self.model))
        return original(self, images)

    monkeypatch.setattr(Student, "forward", recording)
    model = evopatch.apply(build("vit"), keep_ratio=keep_ratio)
    evopatch.finetune(model, Images("tuple"), config=config, progress=False)
    return seen, evopatch.config_of(model)


def test_layer_to_stage(monkeypatch):
    seen, after = settings_of_epochs(monkeypatch, FinetuneConfig(epochs=6, batch_size=32, layer_to_stage=True))
    assert [config.selection for config in seen] == ["layer"] * 4 + ["stage"] * 2
    assert after == EvoConfig()


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [(0.5, [1.0, 0.75, 0.5, 0.5]), ((0.6, 0.2), [(1.0, 1.0), (0.8, 0.6), (0.6, 0.2), (0.6, 0.2)])],
)
def test_the_keep_ratio_warms_up(keep_ratio, expected, monkeypatch):
    config = FinetuneConfig(epochs=4, batch_size=32, keep_ratio_warmup_epochs=2)
    seen, after = settings_of_epochs(monkeypatch, config, keep_ratio)
    assert [config.keep_ratio for config in seen] == [pytest.approx(ratio) for ratio in expected]
    assert after == EvoConfig(keep_ratio=keep_ratio)


def test_a_loss_that_is_no_number_stops_before_the_step():
    data = Images("tuple")
    data.images[20] = 1e38  # finite, and too large to be normed
    model = evopatch.apply(build("vit"))
    config = FinetuneConfig(epochs=2, batch_size=16, layer_to_stage=True)
    with pytest.raises(evopatch.TrainingError, match=r"label loss is nan at step [01] \(epoch 0, learning rate"):
        evopatch.finetune(model, data, config=config, progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert evopatch.config_of(model) == EvoConfig()


def test_a_gradient_that_is_no_number_stops_before_the_step():
    model = evopatch.apply(build("vit"))
    calls = []

    def hook(gradient):
        calls.append(gradient)
        return gradient * float("nan") if len(calls) == 2 else gradient

    model.head.weight.register_hook(hook)
    with pytest.raises(evopatch.TrainingError, match=r"norm of the gradient of the label loss is nan at step 1"):
        evopatch.finetune(model, Images("tuple"), config=FAST, progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.fixture
def new_accelerator():
    """accelerate keeps its state for the life of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("new_accelerator")
@pytest.mark.parametrize(
    ("name", "kind", "dtype"),
    [("vit", "no", torch.float32), ("vit", "bf16", torch.bfloat16), ("deit_distilled", "no", torch.float32)],
)
@torch.no_grad()
def test_nothing_is_left_on_the_model(name, kind, dtype, monkeypatch):
    def attributes():
        return {name: value if isinstance(value, (bool, int, str)) else None for name, value in vars(model).items()}

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", kind)
    model, x = evopatch.apply(build(name)), images()
    if name == "deit_distilled":
        model.set_distilled_training(True)
    before = attributes()
    dtypes = set()
    hook = model.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, out: dtypes.add(out.dtype) if module.training else None
    )
    with torch.enable_grad():
        evopatch.finetune(model, Images("tuple"), config=FinetuneConfig(epochs=1), progress=False)
    hook.remove()
    assert dtypes == {dtype, torch.float32}, "training, and the comparison of training speeds after it"
    assert attributes() == before
    twin = evopatch.apply(build(name))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(x), twin(x))
    assert not torch.equal(model(x), evopatch.apply(build(name))(x))


@pytest.mark.usefixtures("new_accelerator")
def test_mixed_precision_that_is_not_to_be_had():
    model = evopatch.apply(build("vit"))
    run = {"train_data": Images("tuple"), "progress": False}
    if not torch.accelerator.is_available():
        with pytest.raises(ConfigError, match="'fp16' on the CPU"):
            evopatch.finetune(model, config=FinetuneConfig(epochs=1, mixed_precision="fp16"), **run)
    with pytest.raises(ConfigError, match="mixed precision 'bf16': AcceleratorState has already been initialized"):
        evopatch.finetune(model, config=FinetuneConfig(epochs=1, mixed_precision="bf16"), **run)


def test_the_last_step_of_an_epoch_is_a_whole_one():
    """Three forwards, two to a step: on images that are all alike, every step has the same kind of gradient."""

    def run(count, steps):
        model = evopatch.apply(build("vit"))
        data = torch.utils.data.TensorDataset(images(1).expand(count, -1, -1, -1), torch.zeros(count).long())
        config = FinetuneConfig(
            epochs=1, batch_size=8, accumulation_steps=steps, optimizer="sgd", learning_rate=0.1, scheduler="constant",
            warmup_epochs=0, gradient_clip=1e6,
        )  # fmt: skip
        assert evopatch.finetune(model, data, config=config, progress=False).steps == 2
        return model.state_dict()

    expected = run(16, 1)
    for name, tensor in run(24, 2).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "step", "multistep", "poly"])
def test_the_learning_rate_falls(name, tmp_path):
    config = FinetuneConfig(epochs=6, batch_size=8, scheduler=name, log_every=1)
    evopatch.finetune(
        evopatch.apply(build("vit")), Images("tuple"), config=config, output=tmp_path / "run", progress=False
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line and "event" not in line]
    assert len(rates) == 24
    assert max(rates) == pytest.approx(config.learning_rate, rel=0.1)
    assert rates[-1] < 0.2 * config.learning_rate


def test_a_single_step_trains():
    model = evopatch.apply(build("vit"))
    before = copy.deepcopy(model.state_dict())
    evopatch.finetune(model, Images("tuple"), config=FinetuneConfig(epochs=1, batch_size=32), progress=False)
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_model_in_bfloat16_and_images_in_tuples():
    model = evopatch.apply(build("vit").bfloat16(), keep_ratio=0.3)
    data = torch.utils.data.TensorDataset(Images("none").images)
    result = evopatch.finetune(model, data, config=FAST, progress=False)
    assert len(result.losses) == 6
    assert model.head.weight.dtype == torch.bfloat16
