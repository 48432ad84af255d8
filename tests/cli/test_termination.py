"""SIGTERM, and what processes leave that are killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import timm

import evopatch
from evopatch import durable
from evopatch.cli.termination import terminable


def test_an_export_that_is_stopped_by_sigterm_leaves_nothing(tmp_path):
    out = tmp_path / "files" / "model.pt"
    out.parent.mkdir()
    arguments = ("--model", "test_vit", "--no-pretrained", "--format", "torchscript", "--images", "64", "--out", out)
    process = subprocess.Popen([sys.executable, "-m", "evopatch", "export", *map(str, arguments)])
    try:
        while process.poll() is None and not list(out.parent.glob(".evopatch-*")):
            time.sleep(0.01)
        process.terminate()
        assert process.wait(120) == 143
    finally:
        process.kill()
    assert list(out.parent.iterdir()) == []


def test_the_first_sigterm_is_an_exception_and_the_next_one_acts_as_usual():
    @terminable()
    def stopped():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            inside.append(signal.getsignal(signal.SIGTERM))

    inside = []
    with pytest.raises(SystemExit) as stop:
        stopped()
    assert (stop.value.code, inside) == (143, [signal.SIG_DFL])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_that_are_there_stay():
    seen = []

    def own(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGTERM, own)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_run_commands_too():
    def run():
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_save_removes_what_killed_ones_left_a_day_before(tmp_path):
    old, new, mine = (tmp_path / name for name in (".evopatch-abcd1234", ".evopatch-abcd5678", ".evopatch-mine"))
    for folder in (old, new, mine):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half a file")
    for folder in (old, mine):
        at = folder.stat().st_mtime - durable._STALE - 60
        os.utime(folder, (at, at))
    model = timm.create_model("vit_tiny_patch16_224", img_size=40, patch_size=8, depth=2, embed_dim=48, num_heads=4)
    evopatch.save_pretrained(evopatch.apply(model.eval()), tmp_path)
    left = sorted(file.name for file in tmp_path.glob(".*"))
    assert left == [new.name, mine.name], "another process may still write to a new one"
