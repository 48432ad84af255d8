"""What of a model's outputs is compared, and how."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from variants import build, images_for

import evopatch
from evopatch import DataError, UnsupportedModelError
from evopatch.calibration.judge import Judge
from evopatch.measure.outputs import compared
from evopatch.patching.handle import Patched

BATCHES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(4)


class Says(nn.Module):
    """Returns what a function makes of the images."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.function(x)


def features(x):
    return x.flatten(2).transpose(1, 2)  # (B, 64, 3)


def test_logits_by_kl():
    whole, own = Says(lambda x: x[:, :, 0, 0]), Says(lambda x: 2 * x[:, :, 0, 0])
    judge = Judge(whole, BATCHES, 1)
    assert judge.kind == "classes"
    found = judge.all_errors(own)
    logits = torch.cat([whole(batch) for batch in BATCHES]).double()
    p, q = logits.softmax(1), (2 * logits).softmax(1)
    torch.testing.assert_close(found.error, (p * (p / q).log()).sum(1), atol=1e-5, rtol=1e-4)
    assert found.agrees.all()
    assert not judge.all_errors(Says(lambda x: -x[:, :, 0, 0])).agrees.any()
    assert judge.all_errors(whole).error.max() == 0


@pytest.mark.parametrize("prefix", [0, 2])
def test_tokens_by_cosine_class_and_patches_alike(prefix):
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    whole = Says(lambda x: SimpleNamespace(last_hidden_state=features(x)))
    own = Says(lambda x: SimpleNamespace(last_hidden_state=features(x) + noise))
    judge = Judge(whole, BATCHES, prefix)
    assert judge.kind == "features"
    x = torch.cat(BATCHES)
    distance = 1 - F.cosine_similarity(features(x), features(x) + noise, dim=-1)
    parts = [distance[:, :prefix].mean(1), distance[:, prefix:].mean(1)] if prefix else [distance.mean(1)]
    found = judge.all_errors(own)
    torch.testing.assert_close(found.error.float(), torch.stack(parts).mean(0), atol=1e-6, rtol=1e-5)
    assert found.agrees is None


@pytest.mark.parametrize(
    "output",
    [
        lambda x: [x, x[:, :, ::2]],
        lambda x: SimpleNamespace(feature_maps=(x, x[:, :, ::2])),
        lambda x: SimpleNamespace(logits=x),
        lambda x: SimpleNamespace(image_embeds=x.flatten(1)),
    ],
)
def test_maps_and_embeddings(output):
    judge = Judge(Says(output), BATCHES, 1)
    assert judge.kind == "features"
    assert judge.all_errors(Says(output)).error.max() < 1e-6
    opposite = judge.all_errors(Says(lambda x: output(-x))).error
    torch.testing.assert_close(opposite, torch.full((6,), 2.0, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("output", [lambda x: SimpleNamespace(predicted_depth=x[:, 0]), lambda x: x[:, :1] + 3])
def test_one_number_per_place_by_its_spread(output):
    """Such as depth: a map that is wrong by a factor has the same direction."""
    judge = Judge(Says(output), BATCHES, 1)
    assert judge.kind == "numbers"
    assert judge.all_errors(Says(output)).error.max() == 0
    whole = torch.cat([batch[:, 0] for batch in BATCHES]).double().flatten(1)
    found = judge.all_errors(Says(lambda x: output(2 * x))).error
    torch.testing.assert_close(found, whole.square().mean(1) / whole.var(correction=0), rtol=1e-3, atol=0)


def one_cosine(own, whole):
    """Each place's channels apart: of maps with channels last, whatever shape they are compared in."""
    return (1 - F.cosine_similarity(own, whole, dim=3)).mean((1, 2))


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return SimpleNamespace(last_hidden_state=self.model(x))


@pytest.mark.parametrize("name", ["swin", "swinv2", "swinv2_cr", "wrapped"])
@torch.no_grad()
def test_maps_of_timm_lie_as_it_says(name):
    """SwinV2-CR's maps have channels first, Swin's last; on the patched model, too."""
    model = build("swin" if name == "wrapped" else name, num_classes=0, global_pool="")
    x = images_for("swin", 4)
    whole = model(x)
    judge = Judge(Wrapper(model) if name == "wrapped" else model, [x], 0)
    patched = evopatch.apply(copy.deepcopy(model), keep_ratio=0.5)
    own = patched(x)
    if name == "swinv2_cr":
        own, whole = own.permute(0, 2, 3, 1), whole.permute(0, 2, 3, 1)
    assert own.shape == (4, 4, 4, 96)
    found = judge.all_errors(Wrapper(patched) if name == "wrapped" else patched).error
    torch.testing.assert_close(found.float(), one_cosine(own, whole), atol=1e-6, rtol=1e-4)
    rows = (1 - F.cosine_similarity(own, whole, dim=1)).mean((1, 2))
    assert ((found.float() - rows).abs() > 1e-3).any()  # what the wrong axis would give


@torch.no_grad()
def test_feature_maps_of_timm_lie_as_it_says():
    settings = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, out_indices=(0, 1), **settings).eval()
    x = images_for("swin", 4)
    whole = model(x)
    own = [maps + 0.3 * torch.randn_like(maps) for maps in whole]
    judge = Judge(model, [x], 0)
    expected = torch.stack([one_cosine(*pair) for pair in zip(own, whole, strict=True)]).mean(0)
    found = judge.all_errors(Says(lambda x: own, feature_info=None, output_fmt=model.output_fmt)).error
    torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-4)
    # What isn't timm's has channels first, and so have logits of places whatever the encoder's maps are.
    first = [maps.permute(0, 3, 1, 2) for maps in own]
    torch.testing.assert_close(judge.all_errors(Says(lambda x: first)).error.float(), expected, atol=1e-6, rtol=1e-4)
    logits = SimpleNamespace(logits=first[0])
    assert compared(logits, Says(None, feature_info=None, output_fmt="NHWC")).values[0] is first[0]


@torch.no_grad()
def test_a_class_token_that_comes_in_late_counts_as_one():
    x = images_for("hf_pvt", 16)
    model = build("hf_pvt").pvt
    evopatch.apply(model, keep_ratio=0.5)
    given = {"target_flops": 0.9, "budget": 1e-9, "batch_size": 4, "progress": False}
    result = evopatch.calibrate(model, x, **given)
    whole, own = Patched(model).original()(x)[0], model(x)[0]
    far = 1 - F.cosine_similarity(own, whole, dim=-1)
    expected = (far[:, 0] + far[:, 1:].mean(1))[1::2].mean() / 2
    assert result.after.error == pytest.approx(float(expected), rel=1e-3)
    assert float(far[1::2].mean()) != pytest.approx(float(expected), rel=0.02)  # what all tokens alike would give


def test_pooled_features_of_a_model_without_a_head_are_no_classes():
    assert compared(torch.ones(2, 5), Says(None)).kind == "classes"
    assert compared(torch.ones(2, 5), Says(None, num_classes=0)).kind == "features"


def of_problem(function, problem):
    return Says(function, config=SimpleNamespace(problem_type=problem))


class Normalised(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.scale, self.network = nn.Identity(), model

    def forward(self, x):
        return self.network(self.scale(x))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, Normalised, lambda model: Normalised(nn.DataParallel(model))]
)
@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("hf_vit", {"problem_type": "regression"}, "numbers"),
        ("hf_vit", {"problem_type": "multi_label_classification"}, "labels"),
        ("vit", {"num_classes": 0}, "features"),
        ("vit", {}, "classes"),
    ],
)
def test_a_wrapper_has_the_outputs_of_what_is_in_it(wrap, name, settings, kind):
    assert compared(torch.ones(2, 5), wrap(build(name, **settings))).kind == kind


def test_a_head_behind_a_backbone_says_nothing_of_it():
    model = nn.Sequential(build("vit", num_classes=0), nn.Linear(48, 5))
    assert compared(torch.ones(2, 5), model).kind == "classes"


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("columns", [1, 3])
def test_numbers_by_their_spread_between_images(columns, scale):
    """In whatever unit each of them is."""

    def numbers(x):
        return x[:, :columns, 0, 0] * torch.tensor([1.0, scale, 1.0][:columns]) + 7.0

    judge = Judge(of_problem(numbers, "regression" if columns > 1 else None), BATCHES, 1)
    assert judge.kind == "numbers"
    whole = torch.cat([numbers(batch) for batch in BATCHES]).double()
    found = judge.all_errors(of_problem(lambda x: numbers(x) + scale, "regression"))
    torch.testing.assert_close(found.error, (scale**2 / whole.var(0, correction=0)).mean().expand(6), rtol=1e-3, atol=0)
    assert found.agrees is None
    same = judge.all_errors(of_problem(lambda x: whole.mean(0).float().expand(len(x), -1), "regression")).error
    assert same.mean().item() == pytest.approx(1.0, rel=1e-3)


def test_labels_by_the_kl_of_each():
    judge = Judge(of_problem(lambda x: x[:, :, 0, 0], "multi_label_classification"), BATCHES, 1)
    assert judge.kind == "labels"
    found = judge.all_errors(of_problem(lambda x: x[:, :, 0, 0] + 1, "multi_label_classification"))
    logits = torch.cat([batch[:, :, 0, 0] for batch in BATCHES]).double()
    whole, own = (torch.distributions.Bernoulli(logits=values) for values in (logits, logits + 1))
    expected = torch.distributions.kl_divergence(whole, own).sum(1)
    torch.testing.assert_close(found.error, expected, atol=1e-5, rtol=1e-4)
    assert found.agrees is None


def test_numbers_that_are_the_same_for_all_images():
    with pytest.raises(DataError, match="output 0 of the unpatched model is the same for all 6 images"):
        Judge(Says(lambda x: torch.ones(len(x), 1)), BATCHES, 1)


@pytest.mark.parametrize("output", [None, "text", torch.ones(3), {"boxes": 1}, []])
def test_unknown_outputs_are_refused(output):
    with pytest.raises(UnsupportedModelError, match="expected logits, or features"):
        compared(output, Says(None))


def test_outputs_that_are_not_finite():
    judge = Judge(Says(lambda x: x[:, :, 0, 0]), BATCHES, 1)
    with pytest.raises(DataError, match="isn't finite"):
        list(judge.errors(Says(lambda x: x[:, :, 0, 0] / 0)))
