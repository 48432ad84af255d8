"""What a patched model gives: the original at keep ratio 1, full grids to who asks, each image its own result."""

import torch
from comparing import moved
from matrix import EACH_REPRESENTATIVE, EACH_SELECTION, config, every, patched
from variants import EVERY, FLAT, ONE_GRID, PIT, REDUCED, TIMM, TRANSFORMERS, between, build, call, images_for

import evopatch
from evopatch import EvoConfig


@every(EVERY)
@torch.no_grad()
def test_keep_ratio_one_is_the_original_forward(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(call(model, x), original)
    evopatch.set_keep_ratio(model, 0.5)
    assert torch.isfinite(call(model, x)).all()
    assert moved(call(model, x), original) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@every(EVERY)
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_observing_alone_changes_nothing(name, representative):
    """A first run that keeps everything still computes class attention beside the original attention."""
    x = images_for(name)
    original = between(name, build(name), x)
    first_run = 4 if name in ONE_GRID else 1  # blocks, or stages
    settings = (
        {"keep_ratio": [1.0, 0.3], "stages": [2, 4]}
        if name in ONE_GRID
        else {"keep_ratio": [1.0, 0.3, 1.0], "start": 1}
    )
    model = patched(name, EvoConfig(**settings, representative=representative))
    observed = between(name, model, x)
    for index in range(first_run):
        assert _same(name, observed[index], original[index])
    assert moved(observed[first_run], original[first_run]) > 1e-4


def _same(name, found, expected):
    """To the bit, but where torch has a fast path of its own, which rounds differently."""
    if name in ("own_function", "own_encoder_layers", "torchvision"):
        return moved(found, expected) < 1e-5
    return torch.equal(found, expected)


@every(EVERY)
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_features_between_the_blocks_are_the_full_grid(name, representative, selection):
    x = images_for(name)
    original, model = between(name, build(name), x), patched(name, config(representative, selection))
    plain, features = call(model, x), between(name, model, x)
    assert torch.equal(call(model, x), plain)
    assert [f.shape for f in features] == [f.shape for f in original]
    assert len(features) == (6 if name in ONE_GRID else 3)
    # Of a model of one grid the first two blocks don't select, of PiT and PVT the first stage; of the others every
    # stage does.
    unselected = 2 if name in ONE_GRID else len((PIT | REDUCED) & {name})
    for index, (found, stock) in enumerate(zip(features, original, strict=True)):
        assert _same(name, found, stock) if index < unselected else moved(found, stock) > 1e-4


@every(TRANSFORMERS)
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_asking_for_hidden_states_changes_nothing(name, representative, selection):
    model, x = patched(name, config(representative, selection)), images_for(name)
    plain, asked = call(model, x), call(model, x, output_hidden_states=True)
    if name in FLAT:  # which put tokens back after every block then, not only after every run
        torch.testing.assert_close(asked, plain, atol=2e-5, rtol=2e-5)
    else:
        assert torch.equal(asked, plain)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(call(model, x, output_hidden_states=True), asked) > 1e-4


@every(TIMM)
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_looking_between_the_blocks_changes_nothing(name, representative, selection):
    model, x = patched(name, config(representative, selection)), images_for(name)
    plain = model.forward_features(x)
    final, intermediates = model.forward_intermediates(x)
    if name in FLAT:
        assert len(intermediates) == 6
        assert all(i.shape == (2, 48, 5, 5) for i in intermediates)
        scale = 1.5 if name == "subclass" else 1.0
        torch.testing.assert_close(final * scale, plain, atol=2e-5, rtol=2e-5)
    else:
        assert len(intermediates) == (6 if name in ONE_GRID else 3)
        if name in PIT:  # whose last block does for the class tokens alone where nobody sees its map
            torch.testing.assert_close(final, plain, atol=2e-5, rtol=2e-5)
        else:
            assert torch.equal(final, plain)
    indices = [1, 3] if name in ONE_GRID else [0, 1]
    early = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
    assert torch.equal(early[1], intermediates[indices[1]])
    evopatch.set_keep_ratio(model, 1.0)
    original = build(name).forward_intermediates(x)[1]
    assert moved(original[-1], intermediates[-1]) > 1e-4
    early = model.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True)
    assert torch.equal(early[1], original[indices[1]])


@every(EVERY)
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_an_images_result_does_not_depend_on_its_batch(name, representative):
    model, x = patched(name, config(representative)), images_for(name, 4)
    together, alone = call(model, x), torch.cat([call(model, image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
    assert moved(together[0], together[1]) > 1e-4
