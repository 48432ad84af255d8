import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real weights and images beside the checkout; they may not be redistributed, so a plain clone has none."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "imagenet_val_1300.parquet").exists():
        pytest.skip("real weights and images are not at hand")
    return folder
