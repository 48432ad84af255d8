"""What a run is asked for, against formulas written out; and what of the model it trains."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from samples import FAST, Images, NoisyImages
from variants import build, call, images

import evopatch
from evopatch import ConfigError, EvoConfig, FinetuneConfig
from evopatch.training.objective import Objective
from evopatch.training.preparation import make_optimizer
from evopatch.training.student import Outputs, Student

torch.manual_seed(0)
S, D, A, T = (torch.randn(4, 7) for _ in range(4))
Y = torch.tensor([0, 3, 6, 2])


def total(config, outputs, targets=Y, teacher=T, distils=True):
    return sum(Objective(config, distils).terms(outputs, targets, teacher).values()).item()


def kl(p, q):
    return sum((a.exp() * (a - b)).sum().item() for a, b in zip(p.log_softmax(1), q.log_softmax(1), strict=True)) / len(
        p
    )


def entropy(logits, target, smoothing=0.0):
    wanted = F.one_hot(target, 7) * (1 - smoothing) + smoothing / 7
    return -(wanted * logits.log_softmax(1)).sum(1).mean().item()


class Inside(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, x):
        return self.backbone(x)


def test_equations():
    plain = Outputs(S, S, None)
    apart = Outputs(S, D, None)
    assert total(FinetuneConfig(), plain, distils=False) == pytest.approx(entropy(S, Y, 0.1))
    assert total(FinetuneConfig(), plain) == pytest.approx(kl(T, S))
    assert total(FinetuneConfig(temperature=3.0), plain) == pytest.approx(9 * kl(T / 3, S / 3), rel=1e-5)
    assert total(FinetuneConfig(distillation="hard"), plain) == pytest.approx(entropy(S, T.argmax(1)))
    both = FinetuneConfig(distillation="hard", label_weight=0.25)
    assert total(both, apart) == pytest.approx(0.25 * entropy(S, Y, 0.1) + 0.75 * entropy(D, T.argmax(1)))
    assisted = FinetuneConfig(assisted_weight=0.5)
    assert total(assisted, Outputs(S, S, A), distils=False) == pytest.approx(
        0.5 * entropy(S, Y, 0.1) + 0.5 * entropy(A, Y, 0.1)
    )
    mixed = torch.rand(4, 7).softmax(1)
    assert total(FinetuneConfig(), plain, targets=mixed, distils=False) == pytest.approx(
        -(mixed * S.log_softmax(1)).sum(1).mean().item()
    )


@pytest.mark.parametrize("name", ["deit_distilled", "hf_deit_teacher"])
def test_two_heads_learn_apart(name, monkeypatch):
    model = evopatch.apply(build(name))
    x = images(4)
    outputs = Student(model, x[0], two_heads=True).train()(x)
    assert not torch.equal(outputs.logits, outputs.distillation)
    model.eval()
    with torch.no_grad():
        outputs = Student(model, x[0]).eval()(x)
        assert torch.equal(outputs.logits, call(model, x))
    assert outputs.distillation is outputs.logits
    config = FinetuneConfig(epochs=1, batch_size=8, objective="distillation", distillation="hard", label_weight=0.5)
    heads = []

    def recorded(student, x):
        outputs = forward(student, x)
        heads.append(not torch.equal(outputs.logits, outputs.distillation))
        return outputs

    with monkeypatch.context() as patched:
        forward = Student.forward
        patched.setattr(Student, "forward", recorded)
        evopatch.finetune(model, Images("tuple"), config=config, progress=False)
    assert heads == [True] * 4
    assert call(model.train(), x).shape == (4, 7), "still trained apart"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"objective": "distillation"}, {"objective": "distillation", "label_weight": 0.5}]
)
def test_the_switch_of_the_two_heads_is_the_callers_afterwards_and_changes_nothing(before, settings):
    def losses(on, data):
        model.set_distilled_training(on)
        return evopatch.finetune(model, data, config=config, progress=False).losses

    config = FinetuneConfig(epochs=1, batch_size=8, **settings)
    model = evopatch.apply(build("deit_distilled", depth=3))
    start = copy.deepcopy(model.state_dict())
    found = losses(before, Images("tuple"))
    assert model.distilled_training is before
    model.load_state_dict(start)
    assert found == losses(not before, Images("tuple"))
    data = Images("tuple")
    data.images[:] = 1e38  # finite, and too large to be normed
    with pytest.raises(evopatch.TrainingError, match="is nan"):
        losses(before, data)
    assert model.distilled_training is before


def test_the_switch_is_off_while_a_part_of_another_model_is_trained():
    part = build("deit_distilled", depth=3)
    part.set_distilled_training(True)
    outputs = Student(evopatch.apply(Inside(part)), images(1)[0], two_heads=True).train()(images(2))
    assert outputs.logits is outputs.distillation
    assert part.distilled_training


def test_one_head_gives_its_logits_twice():
    model = evopatch.apply(build("vit"))
    outputs = Student(model, images(1)[0], two_heads=True)(images(2))
    assert outputs.logits is outputs.distillation


def test_the_assisted_loss():
    model = evopatch.apply(build("vit", global_pool="avg"))
    before = set(model.state_dict())
    student = Student(model, images(1)[0], assisted=True)
    last = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out))
    outputs = student(images(2))
    hook.remove()
    assert torch.equal(outputs.assisted, student.assistant(last[0][:, 0]))
    plain = copy.deepcopy(model)
    evopatch.finetune(plain, Images("tuple"), config=FAST, progress=False)
    evopatch.finetune(model, Images("tuple"), config=replace(FAST, assisted_weight=0.5), progress=False)
    assert set(model.state_dict()) == before
    assert not torch.equal(model.cls_token, plain.cls_token)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gap", "has no class token"), ("reg_gap", "has no class token"), ("hf_vit", "reads its class token")],
)
def test_models_that_the_assisted_loss_is_not_for(name, message):
    model = evopatch.apply(build(name))
    with pytest.raises(ConfigError, match=message):
        evopatch.finetune(model, Images("tuple"), config=FinetuneConfig(assisted_weight=0.5), progress=False)
    assert all(p.requires_grad for p in model.parameters())


def test_another_teacher():
    teacher = build("vit")
    torch.manual_seed(5)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    teacher.train()
    model, x = evopatch.apply(build("vit")), Images("none").images

    @torch.no_grad()
    def divergence():
        return kl(teacher.eval()(x), model.eval()(x))

    before = divergence()
    teacher.train()
    config = FinetuneConfig(epochs=20, batch_size=8, learning_rate=1e-3)
    evopatch.finetune(model, Images("tuple"), config=config, teacher=teacher, progress=False)
    assert teacher.training
    assert divergence() < 0.3 * before


def test_teachers_that_do_not_fit():
    model = evopatch.apply(build("vit"))
    for teacher, message in (
        (build("vit", num_classes=5), "the teacher has 5 classes and the model 7"),
        (model, "the teacher is the model itself"),
        ("no_such_model", "timm has no model named 'no_such_model'"),
    ):
        with pytest.raises(evopatch.EvoPatchError, match=message):
            evopatch.finetune(model, Images("none"), teacher=teacher, progress=False)
    with pytest.raises(ConfigError, match="objective='labels' with a teacher"):
        evopatch.finetune(
            model, Images("tuple"), config=FinetuneConfig(objective="labels"), teacher=build("vit"), progress=False
        )


def trained(**settings):
    model = evopatch.apply(build("vit"))
    before = copy.deepcopy(model.state_dict())
    config = FinetuneConfig(**{"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "warmup_epochs": 0} | settings)
    evopatch.finetune(model, Images("tuple"), config=config, progress=False)
    assert all(p.requires_grad for p in model.parameters())
    return {key: not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()}, model


def test_what_is_trained():
    changed, _ = trained()
    assert all(changed.values())
    changed, model = trained(trainable="norms")
    assert changed == {name: p.ndim <= 1 for name, p in model.named_parameters()}
    changed, _ = trained(trainable="blocks")
    assert changed == {name: name.startswith("blocks.") for name in changed}


def test_frozen_parameters_stay_frozen():
    model = evopatch.apply(build("vit"))
    model.pos_embed.requires_grad_(False)
    before = model.pos_embed.clone()
    evopatch.finetune(model, Images("tuple"), config=FAST, progress=False)
    assert torch.equal(model.pos_embed, before)
    assert not model.pos_embed.requires_grad
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model is left to train"):
        evopatch.finetune(model, Images("tuple"), config=FAST, progress=False)


@pytest.mark.parametrize(
    ("name", "within", "kept"),
    [
        ("vit", lambda model: model, {"pos_embed", "cls_token"}),
        ("vit", Inside, {"backbone.pos_embed", "backbone.cls_token"}),
        ("vit", torch.compile, {"_orig_mod.pos_embed", "_orig_mod.cls_token"}),
        ("rope_mixed", Inside, {"backbone.pos_embed", "backbone.cls_token", "backbone.rope.freqs"}),
        ("hf_vit", lambda model: model, set()),
    ],
)
def test_position_embeddings_of_timms_models_do_not_decay_wherever_they_are(name, within, kept):
    model = within(evopatch.apply(build(name)))
    optimizer = make_optimizer(Student(model, images(1)[0]), FinetuneConfig())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {path for path, p in model.named_parameters() if p.ndim > 1 and decay[id(p)] == 0}
    assert found == kept


@pytest.mark.parametrize("name", ["adahessian", "lookahead_adahessian"])
def test_an_optimizer_of_second_order_is_refused(name, tmp_path):
    config = FinetuneConfig(optimizer=name)
    model = evopatch.apply(build("vit"))
    with pytest.raises(ConfigError, match=f"optimizer='{name}' needs second derivatives"):
        evopatch.finetune(model, Images("tuple"), config=config, output=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accumulation_is_a_larger_batch():
    _, whole = trained(batch_size=16, epochs=3, learning_rate=1e-4)
    _, parts = trained(batch_size=8, accumulation_steps=2, epochs=3, learning_rate=1e-4)
    _, other = trained(batch_size=8, epochs=3, learning_rate=1e-4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)
    assert moved(weights(other), weights(whole)) > 1e-4


def test_workers_do_not_change_the_result():
    def run(**settings):
        model = evopatch.apply(build("vit"))
        config = FinetuneConfig(epochs=2, batch_size=8, mixup=0.8, cutmix=1.0, **settings)
        evopatch.finetune(model, NoisyImages(), config=config, progress=False)
        return weights(model)

    alone = run()
    assert torch.equal(run(workers=2), alone)
    assert not torch.equal(run(seed=1), alone)


def test_the_callers_random_numbers_go_on():
    model = evopatch.apply(build("vit"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    evopatch.finetune(model, NoisyImages(), config=FAST, progress=False)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_mixup_and_average():
    _, plain = trained()
    _, mixed = trained(mixup=0.8)
    assert not torch.equal(weights(plain), weights(mixed))
    # An average over all steps so far is nearer to the beginning than the last step is.
    start = weights(evopatch.apply(build("vit")))
    _, plain = trained(epochs=3)
    _, average = trained(epochs=3, ema_decay=0.99)
    assert 0 < (weights(average) - start).norm() < (weights(plain) - start).norm()


def test_frozen_batch_norms_keep_their_statistics():
    def statistics(freeze):
        model = evopatch.apply(build("levit"))
        before = {n: t.clone() for n, t in model.state_dict().items()}
        config = FinetuneConfig(epochs=1, freeze_batch_norm=freeze)
        evopatch.finetune(model, Images("tuple"), config=config, progress=False)
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        return {n for n in changed if "running" in n}, {n for n in changed if n.endswith("weight")}

    assert statistics(freeze=True)[0] == set()
    assert len(statistics(freeze=True)[1]) > 20
    assert len(statistics(freeze=False)[0]) > 20


def test_settings_as_plain_values():
    config = FinetuneConfig(epochs=3, mixup=0.8, ema_decay=0.99)
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"unknown settings \['lr'\]"):
        FinetuneConfig.from_dict({"lr": 1})


def test_the_settings_of_an_epoch():
    paper = EvoConfig.paper()
    config = FinetuneConfig(epochs=3, layer_to_stage=True)
    assert [config.of_epoch(paper, epoch).selection for epoch in range(3)] == ["layer", "layer", "stage"]
    assert FinetuneConfig(epochs=3).of_epoch(paper, 0) == paper
