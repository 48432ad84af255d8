"""Names of classes: kept by the model that was trained on them, and telling which class a folder is."""

import json

import pytest
import timm
import torch
from samples import encoded
from terminal import unboxed
from transformers import ViTImageProcessor
from variants import build

import evopatch
from evopatch.cli.class_numbers import number_as_model
from evopatch.sources.dataset import Table
from evopatch.sources.heads import class_names, reset_head, set_class_names
from evopatch.sources.images import open_evaluation
from evopatch.sources.models import open_classifier

SMALL = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--image-size", "32")


def fill(folder, **classes):
    for name, seeds in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (folder / name / f"{seed}.jpg").write_bytes(encoded(seed))
    return folder


def small_timm(classes=7):
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=classes)


@pytest.mark.parametrize("make", [small_timm, lambda: build("hf_vit")])
def test_saved_and_loaded_again(make, tmp_path):
    names = tuple("gfedcba")
    model = make()
    assert class_names(model) is None, "LABEL_0 and the like are no names"
    set_class_names(model, names)
    evopatch.apply(model)
    for step in ("once", "twice"):
        evopatch.save_pretrained(model, tmp_path / step)
        model = evopatch.load_pretrained(tmp_path / step)
        assert class_names(model) == names
    assert "".join(json_names(tmp_path / "twice")) == "gfedcba"
    evopatch.remove(model)
    reset_head(model, 3)
    assert class_names(model) is None
    assert class_names(make()) is None


def json_names(folder):
    config = json.loads((folder / "config.json").read_text())
    if "id2label" in config:
        assert config["label2id"] == {name: int(number) for number, name in config["id2label"].items()}
        return config["id2label"].values()
    return config["pretrained_cfg"]["label_names"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ({"2": "c", "0": "a", "1": "b"}, ("a", "b", "c")),
        ({0: "a", 2: "c"}, None),
        (["a", "b"], None),
        (["a", "a", "b"], None),
        (None, None),
    ],
)
def test_names_that_timm_has(names, expected):
    model = small_timm(3)
    model.pretrained_cfg["label_names"] = names
    assert class_names(model) == expected


def named(*names):
    model = small_timm(len(names))
    set_class_names(model, names)
    return model


@pytest.mark.parametrize(
    ("folders", "model", "labels", "said"),
    [
        (("b",), named("a", "b"), [1], ""),
        (("a", "b", "c"), named("c", "a", "b"), [1, 2, 0], ""),
        (("1", "2"), named("1", "2", "10"), [0, 1], ""),
        (("10", "2"), small_timm(11), [2, 10], "names 2 classes and M has 11: the names, which are numbers, are taken"),
        (("007", "10", "2"), named(*"abcdefghijk"), [2, 7, 10], "names 3 classes and M has 11: the names, which are"),
        (("10", "2"), small_timm(7), [0, 1], "names 2 classes and M has 7: top-1 and top-5 mean something only where"),
        (("0", "1", "2"), small_timm(3), [0, 1, 2], ""),
        (("1", "2", "3"), small_timm(3), [0, 1, 2], ""),
        (("x",), small_timm(3), [0], "names 1 class and M has 3: top-1"),
        (("x", "y"), small_timm(2), [0, 1], ""),
        (
            ("a", "c"),
            named("a", "b"),
            [0, 1],
            "names 2 classes and M has 2, none of them named c: top-1 and top-5 mean",
        ),
        (("x",), small_timm(1), [0], ""),
    ],
)
def test_the_models_own_numbers(folders, model, labels, said, tmp_path):
    images = open_evaluation(fill(tmp_path / "data", **{name: [0] for name in folders}))
    found = number_as_model(images, model, "D", "M")
    assert list(images.labels) == labels
    assert said in found
    assert bool(said) == bool(found)


def test_labels_of_no_class_stay_what_they_are():
    images = Table([None] * 4, [1, 0, -1, None], ["a", "b"], "table", "")
    assert number_as_model(images, named("b", "c", "a"), "D", "M") == ""
    assert images.labels == [0, 2, -1, None]


def test_folders_named_by_numbers_are_evaluated_as_these(command, tmp_path):
    """Images in the folders of the classes that the model gives them."""
    torch.manual_seed(3)
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=12).state_dict(), tmp_path / "weights.pth")
    common = ("--model", "vit_tiny_patch16_224", "--checkpoint", tmp_path / "weights.pth", "--num-classes", "12")
    classifier = open_classifier("vit_tiny_patch16_224", tmp_path / "weights.pth", 12)
    images = open_evaluation(fill(tmp_path, flat=range(4)) / "flat", classifier.transform)
    with torch.no_grad():
        predicted = classifier.model(torch.stack([image for image, _ in images])).argmax(1).tolist()
    assert predicted != [0] * 4
    for seed, number in enumerate(predicted):
        fill(tmp_path / "val", **{str(number): [seed]})
    out = tmp_path / "out.json"
    run = command("evaluate", *common, "--data", tmp_path / "val", "--json", out)
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())[0]["top1"] == 100
    assert "and vit_tiny_patch16_224 has 12: the names, which are numbers, are taken" in unboxed(run.stderr)


@pytest.fixture
def transformers_folder(tmp_path):
    build("hf_vit").save_pretrained(tmp_path / "hf")
    ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(tmp_path / "hf")
    return ("--model", tmp_path / "hf")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_finetune_names_classes_and_evaluate_goes_by_the_names(library, command, tmp_path, request):
    model = SMALL if library == "timm" else request.getfixturevalue("transformers_folder")
    fill(tmp_path / "pets", cats=range(4), dogs=range(4, 8))
    run = command(
        "finetune", *model, "--data", tmp_path / "pets", "--epochs", "1", "--batch-size", "4", "--output",
        tmp_path / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    trained = tmp_path / "run" / "model"
    assert list(json_names(trained)) == ["cats", "dogs"]
    if library == "transformers":
        ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(trained)
    top1 = {}
    for data in ("pets", "only"):
        fill(tmp_path / "only", dogs=range(4, 8))
        run = command("evaluate", "--model", trained, "--data", tmp_path / data, "--json", tmp_path / "out.json")
        assert run.returncode == 0, run.stderr
        assert "top-1 and top-5 mean" not in unboxed(run.stderr)
        top1[data] = json.loads((tmp_path / "out.json").read_text())[0]["top1"]
    classifier = open_classifier(str(trained))
    images = open_evaluation(tmp_path / "only", classifier.transform)
    with torch.no_grad():
        output = classifier.model(torch.stack([image for image, _ in images]))
    hits = (getattr(output, "logits", output).argmax(1) == 1).sum().item()
    assert top1["only"] == 100 * hits / 4


def test_finetune_takes_the_order_of_a_model_that_knows_the_names(command, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    set_class_names(model, ["dogs", "cats"])
    evopatch.save_pretrained(evopatch.apply(model), tmp_path / "saved")
    fill(tmp_path / "pets", cats=range(3), dogs=range(3, 8))
    run = command(
        "finetune", "--model", tmp_path / "saved", "--data", tmp_path / "pets", "--eval-data", tmp_path / "pets",
        "--epochs", "1", "--batch-size", "4", "--learning-rate", "1e-12", "--output", tmp_path / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(json_names(tmp_path / "run" / "model")) == ["dogs", "cats"]
    run = command(
        "evaluate", "--model", tmp_path / "saved", "--data", tmp_path / "pets", "--json", tmp_path / "out.json"
    )
    assert run.returncode == 0, run.stderr
    expected = json.loads((tmp_path / "out.json").read_text())[0]["top1"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["unpatched"]["top1"] == expected


def test_finetune_warns_of_an_evaluations_classes(command, tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "weights.pth")
    fill(tmp_path, photos=range(4))
    fill(tmp_path / "val", a=[0], b=[1])
    common = ("--model", "vit_tiny_patch16_224", "--checkpoint", tmp_path / "weights.pth", "--num-classes", "3")
    common += ("--image-size", "32", "--data", tmp_path / "photos", "--epochs", "1", "--batch-size", "4")
    run = command("finetune", *common, "--eval-data", tmp_path / "val", "--output", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    message = "names 2 classes and vit_tiny_patch16_224 has 3: top-1 and top-5 mean something only where labels are"
    assert f"{tmp_path / 'val'} {message}" in unboxed(run.stderr)
    fill(tmp_path / "val", c=[2])
    run = command("finetune", *common, "--eval-data", tmp_path / "val", "--output", tmp_path / "other")
    assert run.returncode == 0, run.stderr
    assert "top-1 and top-5 mean" not in unboxed(run.stderr)


def saved(folder, *names):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=len(names))
    set_class_names(model, names)
    evopatch.save_pretrained(evopatch.apply(model), folder)
    return folder


COMMON = ("finetune", "--epochs", "1", "--batch-size", "4", "--image-size", "32")


def test_who_learns_from_a_teacher_has_its_classes(command, tmp_path):
    fill(tmp_path / "pets", cats=range(3), dogs=range(3, 8))
    teacher = saved(tmp_path / "teacher", "dogs", "cats")
    common = (*COMMON, "--data", tmp_path / "pets", "--teacher", teacher)
    run = command(*common, "--model", "vit_tiny_patch16_224", "--no-pretrained", "--output", tmp_path / "taught")
    assert run.returncode == 0, run.stderr
    assert list(json_names(tmp_path / "taught" / "model")) == ["dogs", "cats"]
    run = command(
        *common, "--model", "vit_tiny_patch16_224", "--no-pretrained", "--label-weight", "0.5", "--output",
        tmp_path / "both",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(json_names(tmp_path / "both" / "model")) == ["dogs", "cats"]
    other = saved(tmp_path / "other", "ships", "cats")
    run = command(
        *COMMON, "--data", tmp_path / "pets", "--teacher", other, "--model", "vit_tiny_patch16_224", "--no-pretrained",
        "--label-weight", "0.5", "--output", tmp_path / "none",
    )  # fmt: skip
    assert run.returncode == 2
    assert "a teacher of the classes ships, cats" in unboxed(run.stderr)


def test_who_learns_from_itself_keeps_its_classes(command, tmp_path):
    fill(tmp_path / "pets", cats=range(3), dogs=range(3, 8))
    model = saved(tmp_path / "saved", "ships", "trains")
    run = command(
        *COMMON[:-2], "--data", tmp_path / "pets", "--model", model, "--objective", "distillation", "--output",
        tmp_path / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert list(json_names(tmp_path / "run" / "model")) == ["ships", "trains"]


def test_a_trained_head_is_not_dropped(command, tmp_path):
    fill(tmp_path / "pets", cats=range(3), dogs=range(3, 8))
    model = saved(tmp_path / "saved", "cats", "dogs")
    run = command("evaluate", "--model", model, "--data", tmp_path / "pets", "--num-classes", "7")
    assert run.returncode == 2
    assert "--num-classes 7: the weights of" in unboxed(run.stderr)
    assert command("evaluate", "--model", model, "--data", tmp_path / "pets", "--num-classes", "2").returncode == 0
