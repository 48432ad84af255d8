"""A patched classifier of timm behind HTTP: batches of one keep ratio each, chosen by the request or by the load.

pip install fastapi uvicorn;  evopatch.save_pretrained(model, "folder")
python examples/serve.py folder --device cuda --dtype bfloat16
curl --data-binary @cat.jpg 'http://localhost:8000/classify?keep_ratio=0.7'
"""

import argparse
import asyncio
import io
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import PIL.Image
import timm.data
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request

import evopatch

RATIOS = (1.0, 0.7, 0.5)  # every one that is served: compiled models and CUDA graphs need one version of each


@dataclass(eq=False)
class Waiting:
    image: torch.Tensor
    ratio: float | None
    answer: asyncio.Future
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects images into batches, up to `most` or until the oldest has waited; runs one batch at a time."""

    def __init__(self, model, most=32, wait=0.005):
        self.model, self.most, self.wait = model, most, wait
        self.waiting, self.arrived = [], asyncio.Event()

    async def submit(self, image, ratio=None):
        """Logits of an image `(3, height, width)`, the keep ratio that it had, and the size of its batch."""
        one = Waiting(image, ratio, asyncio.get_running_loop().create_future())
        self.waiting.append(one)
        self.arrived.set()
        return await one.answer

    async def run(self):
        while True:
            await self.arrived.wait()
            oldest = self.waiting[0]
            while len(batch := [one for one in self.waiting if one.ratio == oldest.ratio]) < self.most:
                left = oldest.since + self.wait - time.monotonic()
                if left <= 0:
                    break
                self.arrived.clear()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.arrived.wait(), left)
            batch = batch[: self.most]
            # By load: all tokens while one batch takes all that wait, fewer the more are waiting.
            by_load = RATIOS[min((len(self.waiting) - 1) // self.most, len(RATIOS) - 1)]
            ratio = by_load if oldest.ratio is None else oldest.ratio
            self.waiting = [one for one in self.waiting if one not in batch]
            if not self.waiting:
                self.arrived.clear()
            else:
                self.arrived.set()
            try:
                answers = await asyncio.to_thread(self.forward, torch.stack([one.image for one in batch]), ratio)
            except Exception as error:  # theirs alone: the service goes on
                answers = [error] * len(batch)
            for one, answer in zip(batch, answers, strict=True):
                if one.answer.done():  # nobody waits any more
                    continue
                if isinstance(answer, Exception):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result((answer, ratio, len(batch)))

    @torch.inference_mode()
    def forward(self, images, ratio):
        evopatch.set_keep_ratio(self.model, ratio)  # between two batches: nothing else runs the model
        like = next(self.model.parameters())
        return list(self.model(images.to(like.device, like.dtype)).float().cpu())


def open_model(folder, device="cpu", dtype="float32"):
    """A model of timm that `evopatch.save_pretrained` wrote, and what makes its input of a PIL image.

    Raises:
        ValueError: If it doesn't classify such images at every keep ratio that is served.
    """
    model = evopatch.load_pretrained(folder).to(device, getattr(torch, dtype))
    if not getattr(model, "num_classes", 0) or not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"{folder} holds a {type(model).__name__}: expected a model of timm with classes")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    image = transform(PIL.Image.new("RGB", (640, 480)))
    for ratio in RATIOS:
        try:
            logits = Batcher(model).forward(image.unsqueeze(0), ratio)[0]
        except Exception as error:  # such as of a model for images of one channel
            raise ValueError(f"{folder} can't be served at keep ratio {ratio}: {error}") from error
        if logits.shape != (model.num_classes,):
            raise ValueError(
                f"{folder} gives {tuple(logits.shape)} of an image: expected ({model.num_classes},) logits"
            )
    return model, transform


def make_app(batcher, transform):
    @asynccontextmanager
    async def lifespan(app):
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/classify")
    async def classify(request: Request, keep_ratio: Literal["auto", "1.0", "0.7", "0.5"] = "auto"):
        body = await request.body()
        try:
            image = await asyncio.to_thread(lambda: transform(PIL.Image.open(io.BytesIO(body)).convert("RGB")))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise HTTPException(400, f"expected an image as the request's body: {error}") from error
        logits, ratio, batch = await batcher.submit(image, None if keep_ratio == "auto" else float(keep_ratio))
        score, index = logits.softmax(0).max(0)
        return {"class": int(index), "score": float(score), "keep_ratio": ratio, "batch": batch}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--most", type=int, default=32, help="images of a batch")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="for others to share a batch with")
    options = parser.parse_args()
    try:
        model, transform = open_model(options.folder, options.device, options.dtype)
    except ValueError as error:  # evopatch's own of a folder are such, too
        parser.error(str(error))
    batcher = Batcher(model, options.most, options.wait_ms / 1000)
    uvicorn.run(make_app(batcher, transform), host="127.0.0.1", port=options.port, log_level="warning")
