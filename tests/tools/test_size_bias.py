"""benchmarks/size_bias.py: sizes as channels are sizes as a bias; gpu_shapes.py: other shapes, the same result."""

import gpu_shapes
import pytest
import size_bias
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_a_bias(dtype):
    query, key = torch.randn(2, 2, 3, 20, 64, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    log_size = 3 * torch.rand(2, 20, generator=torch.Generator().manual_seed(1))
    wide_query, wide_key = size_bias.size_channels(query, key, log_size)
    assert wide_query.shape == wide_key.shape == (2, 3, 20, 72)
    logits = (wide_query.double() @ wide_key.double().transpose(2, 3)) / 8
    expected = (query.double() @ key.double().transpose(2, 3)) / 8 + log_size[:, None, None].double()
    torch.testing.assert_close(logits, expected, atol=1e-3 if dtype is torch.bfloat16 else 1e-6, rtol=1e-6)


def test_every_way_is_timed():
    found = size_bias.measure(1, 2, 12, torch.device("cpu"), torch.float32, 2)
    assert list(found) == ["no bias", "bias", "rows of 8", "channels", "making channels"]
    assert all(float(value) > 0 for value in found.values())


@pytest.mark.slow
def test_shapes_that_suit_a_gpu_change_no_result():
    found = gpu_shapes.ways(2, 18, 13, "cpu", torch.float32)
    for name, (as_it_comes, done, *_) in found.items():
        expected, out = as_it_comes(), done()
        out = out.transpose(1, 2) if name.startswith("a look") else out[..., : expected.shape[-1]]
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert len(found) == 7
