"""DeepSpeed's ZeRO trains a patched model as torch does: in one process on the CPU, weights in parts at stage 3."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD
from variants import build, images

import evopatch

TARGETS = torch.tensor([0, 1])


def by_torch(model, x):
    optimizer = SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), TARGETS)
        loss.backward()
        optimizer.step()
        return loss.item()

    return [step(), step()]


def by_deepspeed(model, x, stage):
    import deepspeed

    # By default it clips gradients to a norm of 1.
    config = {"train_micro_batch_size_per_gpu": len(x), "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.1), config=config)

    def step():
        loss = F.cross_entropy(engine(x), TARGETS)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return [step(), step()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_trained_by_deepspeed(stage):
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), str(tests.parent / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, __file__, str(stage)], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "the same losses" in run.stdout


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed("gloo")
    patched, x = evopatch.apply(build("vit")), images()
    expected = by_torch(copy.deepcopy(patched), x)
    unpatched = by_torch(build("vit"), x)
    found = by_deepspeed(patched, x, int(sys.argv[1]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert abs(found[1] - unpatched[1]) > 1e-3
    print("the same losses")
