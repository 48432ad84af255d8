"""Speed of patched models on a GPU, all in one command: every cell a model at one batch size.

    python benchmarks/gpu.py --output results

Each cell has a process of its own, and as many as --at-once compile side by side. As soon as one is ready it is timed,
and all others are stopped meanwhile. Compiling sets the pace: about a minute a core for two sides of one cell, and two
for token merging. Sides that aren't being compiled after --compile-minutes are left out. Within each round sides
alternate: unpatched, patched with the default configuration at keep_ratio=0.5 and, for flat models, patched with
foresight, and token merging at the mildest setting that needs no more FLOPs. Ways to run: eager, compiled
(fullgraph=True), and both of them replayed from a CUDA graph. Weights and images are random. Writes gpu.json and prints
tables. Without a GPU, a small run shows that the script works:

    python benchmarks/gpu.py deit_tiny_patch16_224:1 --device cpu --dtype float32 --no-train
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import timm
import torch
from peers import token_merging
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import evopatch
from evopatch.alternating import alternate
from evopatch.measure.memory import peak_memory
from evopatch.measure.profiling import count_flops
from evopatch.measure.timing import forward_and_backward
from evopatch.patching.handle import shared_copy

CELLS = (
    "deit_tiny_patch16_224:1,32,256",
    "deit_small_patch16_224:1,32,256",
    "deit_base_patch16_224:1,32,256",
    "vit_large_patch16_224:1,32,256",
    "vit_base_patch14_dinov2:1,32,256",
    "swin_tiny_patch4_window7_224:1,32,256",
    "swin_base_patch4_window7_224:1,32,256",
)
TRAINED = ("deit_base_patch16_224", 128)
ATTENTION = {"flash": "flash", "fmha": "memory-efficient", "cudnn": "cuDNN"}
"""What names of kernels say."""
LONGEST_COMPILATION = 60.0
"""Seconds, of one side."""
LONG_ENOUGH = 0.01
"""Seconds that a timed call takes at least: it repeats forwards until then."""
SIDES = ("patched", "foresight", "token merging")
"""What an unpatched model is compared with."""


def sides_of(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor]:
    """The models to compare, sharing weights, and one image."""
    torch.manual_seed(0)
    device, keep_ratio = arguments.device, arguments.keep_ratio
    model = timm.create_model(name).eval().to(device, dtype)
    image = torch.randn(1, *model.pretrained_cfg["input_size"], device=device, dtype=dtype)
    sides: dict[str, nn.Module] = {"unpatched": model, "patched": evopatch.apply(shared_copy(model), keep_ratio)}
    flat = isinstance(model, timm.models.VisionTransformer)
    if flat and "foresight" in arguments.sides:
        some = torch.randn(16, *image.shape[1:], device=device, dtype=dtype)
        sides["foresight"] = evopatch.apply(shared_copy(model), keep_ratio, images=some)
    if flat and "token merging" in arguments.sides:
        with torch.no_grad():
            flops, _ = count_flops(partial(sides["patched"], image))
        sides["token merging"] = token_merging.at_flops(model, image, flops)
    return {side: each for side, each in sides.items() if side in ("unpatched", *arguments.sides)}, image


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same call, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def repeated(call: Callable[[], object], times: int) -> None:
    """Call several times."""
    for _ in range(times):
        call()


def timed(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, one entry per round and side."""
    first = alternate({"": calls["unpatched"]}, device, 1, 2)[""][0]
    times = max(1, round(LONG_ENOUGH / first))
    seconds = alternate({side: partial(repeated, call, times) for side, call in calls.items()}, device, rounds)
    return {side: [value / times for value in values] for side, values in seconds.items()}


def kernels(call: Callable[[], object], device: torch.device) -> tuple[int, list[str], list[tuple[str, int, float]]]:
    """How many kernels a call launches (on the CPU: operators it calls), which attention is among them, and those that
    take the most time: name, how often, and microseconds in all."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_gpu = device.type == "cuda"
    events = [event for event in profiler.key_averages() if not on_gpu or event.device_type.name == "CUDA"]
    times = [
        (event.key, event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in events
    ]
    times.sort(key=lambda entry: -entry[2])
    kinds = sorted({kind for name, _, _ in times for word, kind in ATTENTION.items() if word in name.lower()})
    return sum(count for _, count, _ in times), kinds, times[:40]


class Cell:
    """One model at one batch size.

    Args:
        name: timm's.
        batch_size: Images.
        train: Time forward and backward instead of a forward.
        arguments: Of the command line.
        deadline: Sides that aren't being compiled by then, in seconds since the epoch, are left out.
    """

    def __init__(self, name: str, batch_size: int, train: bool, arguments: argparse.Namespace, deadline: float) -> None:
        self.arguments, self.train, self.device = arguments, train, torch.device(arguments.device)
        self.record: dict[str, Any] = {"model": name, "batch_size": batch_size, "train": train}
        dtype = getattr(torch, arguments.dtype)
        models, image = sides_of(name, arguments, dtype)
        images = torch.randn(batch_size, *image.shape[1:], device=self.device, dtype=dtype)
        self.models = {side: shared_copy(model, train).train(train) for side, model in models.items()}
        self.images = images
        with torch.no_grad():
            flops = {side: count_flops(partial(model, image))[0] for side, model in models.items()}
        self.record["flops"] = {side: count / flops["unpatched"] for side, count in flops.items()}
        self.calls = {"eager": {side: self._step(model) for side, model in self.models.items()}}
        if arguments.compile:
            self.calls["compiled"] = {}
            try:
                for side, model in self.models.items():
                    if time.time() < deadline:
                        self.calls["compiled"][side] = self._compiled(model)
            except Exception:
                self.record["error"] = traceback.format_exc()

    def _step(self, model: nn.Module) -> Callable[[], object]:
        if self.train:
            return forward_and_backward(model, self.images)
        return partial(model, self.images)

    def _compiled(self, model: nn.Module) -> Callable[[], object]:
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False)
        step = self._step(compiled)
        begin = time.perf_counter()
        with torch.set_grad_enabled(self.train):
            step()
        self.record.setdefault("compile_seconds", []).append(time.perf_counter() - begin)
        return step

    def measure(self) -> None:
        """Everything that nothing else may run beside."""
        self.record["seconds"] = {}
        with torch.set_grad_enabled(self.train):
            for way, calls in self.calls.items():
                if "unpatched" not in calls:
                    continue
                self._measure(way, calls)
                if self.device.type == "cuda":
                    self._measure(f"{way}, CUDA graph", {side: graphed(call) for side, call in calls.items()})
                    torch.cuda.empty_cache()

    def _measure(self, way: str, calls: dict[str, Callable[[], object]]) -> None:
        self.record["seconds"][way] = timed(calls, self.device, self.arguments.rounds)
        if "graph" in way:
            return
        memory, launches, attention, slowest, repeatable = ({} for _ in range(5))
        for side, call in calls.items():
            # On the CPU tensors are counted, those of compiled code can't be.
            memory[side] = peak_memory(call, self.device) if way == "eager" or self.images.is_cuda else None
            if self.arguments.profile:
                launches[side], attention[side], slowest[side] = kernels(call, self.device)
            repeatable[side] = self._repeatable(side, call)
        found = {"memory": memory, "kernels": launches, "attention": attention, "slowest": slowest}
        for key, values in {**found, "repeatable": repeatable}.items():
            self.record.setdefault(key, {})[way] = values

    def _repeatable(self, side: str, call: Callable[[], object]) -> bool | None:
        if self.train:
            return None
        first: Any = call()
        return all(torch.equal(first, again) for again in (call() for _ in range(3)) if isinstance(again, Tensor))


def work(cell: tuple[str, int, bool], arguments: argparse.Namespace, deadline: float, pipe: Any) -> None:
    """A cell's process: says when it is ready, measures when told to, and gives its record."""
    record: dict[str, Any] = dict(zip(("model", "batch_size", "train"), cell, strict=True))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if arguments.device == "cuda":
        torch.set_num_threads(1)
    made = None
    try:
        made = Cell(*cell, arguments, deadline)
        record = made.record
        if made.device.type == "cuda":
            torch.cuda.empty_cache()
    except Exception:
        record["error"] = traceback.format_exc()
    pipe.send("ready")
    pipe.recv()
    try:
        if made is not None:
            made.measure()
    except Exception:
        record["error"] = traceback.format_exc()
    pipe.send(record)


class Workers:
    """The processes of all cells.

    Args:
        cells: Model, batch size, whether it is trained.
        arguments: Of the command line.
    """

    def __init__(self, cells: list[tuple[str, int, bool]], arguments: argparse.Namespace) -> None:
        self._waiting, self._arguments = list(cells), arguments
        self._running: dict[Connection, tuple[tuple[str, int, bool], Any]] = {}

    def records(self) -> Iterator[dict[str, Any]]:
        """A record of each cell, in the order in which they are ready."""
        deadline = time.time() + 60 * self._arguments.compile_minutes
        while self._waiting or self._running:
            while self._waiting and len(self._running) < max(1, self._arguments.at_once):
                self._start(self._waiting.pop(0), deadline)
            # What is being compiled then is waited for.
            ready = wait(list(self._running), max(0.0, deadline + LONGEST_COMPILATION - time.time()))
            if not ready:
                yield from self._given_up()
                return
            for pipe in ready:
                yield self._measured(cast(Connection, pipe))

    def _start(self, cell: tuple[str, int, bool], deadline: float) -> None:
        context = torch.multiprocessing.get_context("spawn")
        pipe, end = context.Pipe()
        process = context.Process(target=work, args=(cell, self._arguments, deadline, end), daemon=True)
        process.start()
        end.close()
        self._running[pipe] = cell, process

    def _measured(self, pipe: Connection) -> dict[str, Any]:
        record = None
        if _received(pipe) == "ready":
            with self._alone(pipe):
                pipe.send("go")
                record = _received(pipe)
        cell, process = self._running.pop(pipe)
        process.join(timeout=30)  # it holds memory of the device until it ends
        return record or _failed(cell, "its process died")

    @contextmanager
    def _alone(self, pipe: Connection) -> Iterator[None]:
        """All others are stopped meanwhile."""
        others = [process.pid for other, (_, process) in self._running.items() if other is not pipe]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    def _given_up(self) -> Iterator[dict[str, Any]]:
        for _, process in self._running.values():
            process.kill()
        for cell in [*(cell for cell, _ in self._running.values()), *self._waiting]:
            yield _failed(cell, "not ready in time, see --compile-minutes")


def _failed(cell: tuple[str, int, bool], why: str) -> dict[str, Any]:
    return {**dict(zip(("model", "batch_size", "train"), cell, strict=True)), "error": why}


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def table_of(records: list[dict[str, Any]], way: str) -> Table:
    """Speed-ups of one way to run: the median of the rounds' ratios."""
    table = Table(title=way)
    for column in ("model", "batch", "side", "images/s", "FLOPs", "speed-up", "efficiency", "peak MB", "kernels"):
        table.add_column(column, justify="left" if column in ("model", "side") else "right")
    for record in records:
        seconds = record.get("seconds", {}).get(way)
        if seconds is None:
            continue
        what = f"{record['batch_size']}{', training' if record['train'] else ''}"
        for side, values in seconds.items():
            ratio = statistics.median(slow / fast for slow, fast in zip(seconds["unpatched"], values, strict=True))
            flops = record["flops"][side]
            memory, launches = (record[key].get(way, {}).get(side) for key in ("memory", "kernels"))
            table.add_row(
                record["model"],
                what,
                side,
                f"{record['batch_size'] / statistics.median(values):.1f}",
                f"{flops:.3f}",
                f"{ratio:.3f}",
                f"{ratio * flops:.3f}",
                "" if memory is None else f"{memory / 1e6:.1f}",
                "" if launches is None else str(launches),
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=list(CELLS), help="a timm model and its batch sizes: NAME:1,32")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--compile-minutes", type=float, default=5.0, help="sides that aren't being compiled then are left out"
    )
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True, help="count and name kernels")
    cells_at_once = max(1, 3 * (os.cpu_count() or 1) // 4)
    parser.add_argument("--at-once", type=int, default=cells_at_once, help="so many cells are compiled at once")
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--output", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    named = [cell.partition(":")[::2] for cell in arguments.cells]
    cells = [(name, int(size), False) for name, sizes in named for size in sizes.split(",")]
    if arguments.train:
        cells.append((*TRAINED, True))
    arguments.output.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    versions = {"torch": torch.__version__, "timm": timm.__version__, "evopatch": evopatch.__version__}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("cells", total=len(cells))
        for record in Workers(cells, arguments).records():
            records.append(record)
            progress.advance(task)
            content = {"device": device, "dtype": arguments.dtype, "versions": versions, "cells": records}
            (arguments.output / "gpu.json").write_text(json.dumps(content, indent=1))
    records.sort(key=lambda record: cells.index((record["model"], record["batch_size"], record["train"])))
    console = Console(width=140)
    for way in dict.fromkeys(way for record in records for way in record.get("seconds", {})):
        console.print(table_of(records, way))
    console.print(f"{device}, {arguments.dtype}, {arguments.rounds} rounds, torch {torch.__version__}")
    for record in records:
        for way, same in record.get("repeatable", {}).items():
            console.print(record["model"], record["batch_size"], way, record["attention"][way], "repeatable:", same)
        if "error" in record:
            console.print(f"{record['model']}, batch {record['batch_size']}: {record['error']}", markup=False)


if __name__ == "__main__":
    main()
