"""Throughput and latency of examples/serve.py at every keep ratio: `python examples/serve_load.py [--requests 500]`."""

import argparse
import asyncio
import io
import statistics
import time

import httpx
import numpy as np
import PIL.Image

RATIOS = ("1.0", "0.7", "0.5", "auto")

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000/classify")
parser.add_argument("--requests", type=int, default=500, help="at each keep ratio, in every round")
parser.add_argument("--rounds", type=int, default=4, help="in which the keep ratios alternate")
parser.add_argument("--concurrency", type=int, default=64, help="requests that wait at a time")
options = parser.parse_args()

buffer = io.BytesIO()
PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype="uint8")).save(buffer, "JPEG")
photo = buffer.getvalue()


async def load(client, ratio, number):
    """Seconds of every request, and of all of them; `concurrency` clients, each with one request at a time."""
    left, seconds, sizes = iter(range(number)), [], []

    async def ask():
        for _ in left:
            begin = time.perf_counter()
            answer = await client.post(options.url, params={"keep_ratio": ratio}, content=photo)
            answer.raise_for_status()
            seconds.append(time.perf_counter() - begin)
            sizes.append(answer.json()["batch"])

    begin = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(options.concurrency)))
    return seconds, time.perf_counter() - begin, sizes


async def main():
    # Sooner than the server gives an idle connection up, or a request meets one that is just closing.
    limits = httpx.Limits(max_connections=options.concurrency, keepalive_expiry=2.0)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        await load(client, "auto", options.concurrency)  # warm
        seconds, sizes, total = ({ratio: [] for ratio in RATIOS} for _ in range(3))
        for _ in range(options.rounds):
            for ratio in RATIOS:
                one, whole, batches = await load(client, ratio, options.requests)
                seconds[ratio] += one
                sizes[ratio] += batches
                total[ratio].append(whole)
        print("keep ratio  images/s   p50 ms   p99 ms  mean batch")
        for ratio in RATIOS:
            percentiles = statistics.quantiles(seconds[ratio], n=100, method="inclusive")
            rate = options.requests / statistics.median(total[ratio])
            print(
                f"{ratio:>10}{rate:10.1f}{1000 * percentiles[49]:9.1f}{1000 * percentiles[98]:9.1f}"
                f"{statistics.mean(sizes[ratio]):12.1f}"
            )


asyncio.run(main())
