"""Fixtures that tests of several folders share."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("comparing", "terminal")

from samples import REAL_DATA  # noqa: E402
from terminal import Run  # noqa: E402

from evopatch.patching import registry  # noqa: E402

# Tests of every model needn't say what `evopatch.apply` is told of those that no library's adapter serves.
registry._BUILT_IN["variants"] = ("variants.own_models:Described",)

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that they start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and images; tests that need it are skipped where there is none."""
    if not (REAL_DATA / "imagenet_val_1300.parquet").exists():
        pytest.skip("real weights and images are not at hand")
    return REAL_DATA


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """The command line in this process, as its entry point runs it, without network: `command("profile", ...)`."""
    import huggingface_hub

    from evopatch.cli import main

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["evopatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return Run(stop.value.code or 0, *capsys.readouterr())

    return run
