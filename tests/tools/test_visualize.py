"""Pictures of the selection: what is drawn where."""

import numpy as np
import pytest
import torch
from variants import build, images

import evopatch
from evopatch import ConfigError, EvoConfig, NotPatchedError
from evopatch.measure.pictures import draw

CONFIG = EvoConfig(keep_ratio=[0.6, 0.3], stages=[2, 4])


def shown(figure):
    """By row and column: title and pixels of each panel."""
    panels = [(axes.get_title(), np.asarray(axes.get_images()[0].get_array())) for axes in figure.axes]
    rows = 1 + max(axes.get_subplotspec().rowspan.start for axes in figure.axes)
    columns = len(panels) // rows
    return [panels[row * columns : (row + 1) * columns] for row in range(rows)]


@pytest.mark.parametrize("name", ["vit", "hf_vit", "gap"])
def test_slow_tokens_are_bright_and_the_others_dimmed(name):
    model = evopatch.apply(build(name), config=CONFIG)
    x = images()[:2]
    pixels = torch.full((2, 40, 40, 3), 0.8)
    figure = evopatch.visualize(model, x, blocks=(0, 2, 5), pixels=pixels)
    selection = evopatch.token_selection(model, x)
    rows = shown(figure)
    assert len(rows) == 2
    assert [title.split("\n")[0] for title, _ in rows[0]] == ["image", "block 0", "block 2", "block 5"]
    for row in range(2):
        for column, block in ((1, 0), (2, 2), (3, 5)):
            found = torch.from_numpy(rows[row][column][1][..., 0]).view(5, 8, 5, 8)
            bright = selection[row, block].float()[:, None, :, None].expand(5, 8, 5, 8)
            torch.testing.assert_close(found, 0.8 * (0.15 + 0.85 * bright))


def test_blocks_that_select_are_the_default():
    model = evopatch.apply(build("vit"), config=CONFIG)
    titles = [title.split("\n")[0] for title, _ in shown(evopatch.visualize(model, images()))[0]]
    assert titles == ["image", "block 2", "block 4"]


def test_groups_have_one_colour_each_and_lone_tokens_none():
    values = torch.tensor([[[0, 0], [1, 2]], [[3, 4], [3, 4]]])
    grey = torch.full((2, 4, 4), 0.5)
    (_, (_, first)), (_, (_, second)) = shown(draw(grey, [("groups", values)]))
    assert np.allclose(first[2:], 0.5)
    assert not np.allclose(first[0, 0], 0.5)
    assert (first[:2] == first[0, 0]).all()
    assert np.allclose(second[:, :2], second[0, 0])
    assert np.allclose(second[:, 2:], second[0, 3])
    assert not np.allclose(second[0, 0], second[0, 3])


def test_token_groups():
    model = evopatch.apply(build("vit"), config=CONFIG)
    x = images()
    groups, slow = evopatch.token_groups(model, x), evopatch.token_selection(model, x)
    assert groups.shape == slow.shape == (len(x), 6, 5, 5)
    for block, rows in enumerate((25, 25, 15, 15, 8, 8)):
        for image in range(len(x)):
            numbers = groups[image, block].flatten()
            assert len(numbers.unique()) == rows
            assert len(numbers[slow[image, block].flatten()].unique()) == rows, "one slow token per group"
    evopatch.set_config(model, EvoConfig.paper())
    groups, slow = evopatch.token_groups(model, x), evopatch.token_selection(model, x)
    assert len(groups[0, -1][~slow[0, -1]].unique()) == 1
    with pytest.raises(NotPatchedError):
        evopatch.token_groups(build("vit"), x)


def test_training_checkpoints():
    model = evopatch.apply(build("vit"), config=CONFIG)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    other = {name: torch.randn_like(tensor) for name, tensor in own.items()}
    figure = evopatch.visualize_training(model, images(), {"first": own, "second": other})
    rows = shown(figure)
    assert [title for title, _ in rows[0]] == ["image", "first\nblock 4", "second\nblock 4"]
    assert any(not np.array_equal(row[1][1], row[2][1]) for row in rows)
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="0 to 5"):
        evopatch.visualize(model, images(), blocks=[6])


def test_a_coarse_grid_colours_only_real_groups():
    """A lone token of a coarse grid covers several of the finest: it is no group."""
    model, x = evopatch.apply(build("levit"), config=EvoConfig(keep_ratio=[0.6, 0.99, 0.75])), images()
    pixels = torch.full((len(x), 60, 60), 0.5)
    rows = shown(evopatch.visualize(model, x, groups=True, pixels=pixels))
    assert [title.split("\n")[0] for title, _ in rows[0]] == ["image", "block 1", "block 2", "block 5"]
    for row in rows:
        coloured = [(np.ptp(picture, axis=-1) > 1e-6).mean() for _, picture in row[1:]]
        assert coloured[1] == pytest.approx(2 / 9, abs=0.01)
        assert coloured[2] == pytest.approx(2 / 4, abs=0.01)
