"""examples/serve.py: a batch holds one keep ratio, every request gets its own answer; and the load test runs."""

import asyncio
import importlib.util
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from comparing import moved
from matrix import patched
from samples import encoded
from variants import images

import evopatch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for needed in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(needed)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load("serve")


class Recorded(serve.Batcher):
    """Says which batches it ran, and may fail."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches, self.fails = [], False

    def forward(self, images, ratio):
        if self.fails:
            raise RuntimeError("out of memory")
        out = super().forward(images, ratio)
        self.batches.append((len(images), evopatch.config_of(self.model).keep_ratio))
        return out


def serving(batcher, do):
    """What `do` gives while the batcher runs."""

    async def both():
        batcher.arrived = asyncio.Event()  # of this loop
        task = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(do(), 60)
        finally:
            task.cancel()

    return asyncio.run(both())


def test_a_batch_holds_one_keep_ratio_and_every_request_gets_its_own_answer():
    model, x = patched("vit"), images(40)
    batcher = Recorded(model, most=8, wait=0.05)
    draw = random.Random(0)
    ratios = [draw.choice(serve.RATIOS) for _ in x]

    async def ask(index):
        await asyncio.sleep(draw.random() * 0.02)
        return await batcher.submit(x[index], ratios[index])

    async def all_of_them():
        return await asyncio.gather(*map(ask, range(len(x))))

    answers = serving(batcher, all_of_them)
    expected = {}
    for ratio in serve.RATIOS:
        evopatch.set_keep_ratio(model, ratio)
        with torch.no_grad():
            expected[ratio] = model(x)
    for index, (logits, ratio, size) in enumerate(answers):
        assert ratio == ratios[index]
        assert 1 <= size <= 8
        torch.testing.assert_close(logits, expected[ratio][index], atol=2e-5, rtol=2e-5)
    assert moved(expected[1.0], expected[0.7]) > 1e-3 < moved(expected[0.7], expected[0.5])
    assert sum(size for size, _ in batcher.batches) == 40
    assert len(batcher.batches) < 20, "nothing was batched"
    counts = {ratio: sum(size for size, at in batcher.batches if at == ratio) for ratio in serve.RATIOS}
    assert counts == {ratio: ratios.count(ratio) for ratio in serve.RATIOS}


def test_the_keep_ratio_falls_with_the_load_and_comes_back():
    batcher, x = Recorded(patched("vit"), most=4, wait=0.01), images(14)

    async def a_burst_then_one():
        await asyncio.gather(*map(batcher.submit, x))
        return await batcher.submit(x[0])

    assert serving(batcher, a_burst_then_one)[1:] == (1.0, 1)
    assert batcher.batches == [(4, 0.5), (4, 0.5), (4, 0.7), (2, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (3, [(3, 1.0)]),
        (4, [(4, 1.0)]),
        (5, [(4, 0.7), (1, 1.0)]),
        (8, [(4, 0.7), (4, 1.0)]),
        (9, [(4, 0.5), (4, 0.7), (1, 1.0)]),
        (12, [(4, 0.5), (4, 0.7), (4, 1.0)]),
    ],
)
def test_all_tokens_are_kept_while_one_batch_takes_all_that_wait(waiting, expected):
    batcher, x = Recorded(patched("vit"), most=4, wait=0.05), images(waiting)

    async def a_burst():
        await asyncio.gather(*map(batcher.submit, x))

    serving(batcher, a_burst)
    assert batcher.batches == expected


def test_a_failed_batch_fails_alone():
    batcher, x = Recorded(patched("vit"), wait=0.0), images(1)

    async def a_failure_then_a_success():
        batcher.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            await batcher.submit(x[0])
        batcher.fails = False
        return await batcher.submit(x[0], 0.5)

    assert serving(batcher, a_failure_then_a_success)[1] == 0.5


def saved(folder, **options):
    sizes = {"patch_size": 8, "img_size": 40, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()
    evopatch.save_pretrained(evopatch.apply(model), folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 1}, "can't be served at keep ratio 1.0: .*channels"),
        ({"num_classes": 0}, "holds a VisionTransformer: expected a model of timm with classes"),
    ],
)
def test_a_model_that_does_not_classify_photos_is_refused_at_the_start(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        serve.open_model(saved(tmp_path / "model", **options))


def test_a_model_of_transformers_is_refused_at_the_start(tmp_path):
    evopatch.save_pretrained(patched("hf_vit"), tmp_path)
    with pytest.raises(ValueError, match="holds a ViTForImageClassification: expected a model of timm"):
        serve.open_model(tmp_path)


def test_what_is_no_image_or_too_large_a_one_is_the_requests_fault(tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    model, transform = serve.open_model(saved(tmp_path, img_size=224, patch_size=16))
    with TestClient(serve.make_app(serve.Batcher(model, wait=0.0), transform), raise_server_exceptions=False) as client:

        def answer():
            return client.post("/classify", content=encoded(0))

        assert answer().status_code == 200
        assert 0 <= answer().json()["class"] < 7
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 10)
        assert answer().status_code == 400
        assert "exceeds limit of 20 pixels" in answer().json()["detail"]
        assert client.post("/classify", content=b"no image").status_code == 400


@pytest.mark.slow
def test_the_service_and_its_load_test(tmp_path):
    import httpx

    evopatch.save_pretrained(evopatch.apply(timm.create_model("deit_tiny_patch16_224").eval()), tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = subprocess.Popen([sys.executable, EXAMPLES / "serve.py", tmp_path / "model", "--port", port])
    try:
        url, deadline = f"http://127.0.0.1:{port}/classify", time.monotonic() + 120
        while True:
            try:
                assert httpx.post(url, content=b"no image", timeout=30).status_code == 400
                break
            except httpx.ConnectError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert httpx.post(url, params={"keep_ratio": "0.6"}, content=encoded(0), timeout=30).status_code == 422
        answer = httpx.post(url, params={"keep_ratio": "0.7"}, content=encoded(0), timeout=30).json()
        assert (answer["keep_ratio"], answer["batch"]) == (0.7, 1)
        assert 0 <= answer["class"] < 1000
        command = [
            sys.executable,
            EXAMPLES / "serve_load.py",
            "--url",
            url,
            "--requests",
            "6",
            "--concurrency",
            "3",
            "--rounds",
            "2",
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        assert [line.split()[0] for line in run.stdout.splitlines()[1:]] == ["1.0", "0.7", "0.5", "auto"]
    finally:
        server.kill()
        server.wait()
