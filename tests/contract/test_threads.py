"""Threads on one model: the state of a forward is its own."""

import threading

import torch
from comparing import moved
from matrix import every, patched
from variants import call, images_for

NAMES = ["vit", "gap", "relpos", "rope", "levit", "levit_conv", "hf_vit", "hf_dinov2_swiglu", "hf_siglip", "hf_levit",
         "pit", "swin", "swinv2", "swinv2_cr", "hf_swin", "hf_swinv2", "pvt_v2",
         "hf_pvt_v2", "hf_segformer"]  # fmt: skip


@every(NAMES)
@torch.no_grad()
def test_two_threads_on_one_model(name):
    model = patched(name)
    batches = [images_for(name, seed=seed) for seed in range(8)]
    expected = [call(model, x) for x in batches]
    results = {}

    def work(first):
        for _ in range(5):
            for i in range(first, 8, 2):
                results.setdefault(i, []).append(call(model, batches[i]))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for i, runs in results.items():
        assert len(runs) == 5
        for run in runs:
            torch.testing.assert_close(run, expected[i], atol=1e-5, rtol=1e-5)
    assert moved(expected[0], expected[1]) > 1e-4
