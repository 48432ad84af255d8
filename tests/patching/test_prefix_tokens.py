"""How many prefix tokens a model of one's own has, and where: found out by running it, not by counting."""

import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from torch import nn
from variants import images
from variants.own_models import WIDTH, Attention, Block, OwnViT

import evopatch
from evopatch import ConfigError, UnsupportedModelError


class Placed(nn.Module):
    """Its position embedding has a place for every token.

    Args:
        grid: Rows and columns of the patches.
        before: How many tokens of its own come before the patches.
        behind: How many come after them.
    """

    size = 8

    def __init__(self, grid=(5, 5), before=1, behind=0):
        super().__init__()
        self.patch_embed = self.stem()
        self.before = nn.Parameter(torch.randn(1, before, WIDTH))
        self.behind = nn.Parameter(torch.randn(1, behind, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, before + grid[0] * grid[1] + behind, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(Attention, 0.0) for _ in range(6))
        self.norm = nn.LayerNorm(WIDTH)

    def stem(self):
        return nn.Conv2d(3, WIDTH, 8, 8)

    def embed(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        own = [tokens.expand(len(x), -1, -1) for tokens in (self.before, self.behind)]
        return torch.cat([own[0], x, own[1]], dim=1) + self.pos_embed

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def told(model, prefix, **others):
    return evopatch.apply(model, blocks="blocks", prefix_tokens=prefix, **others)


def advice(model):
    (candidate,) = evopatch.inspect(model).candidates
    return candidate.call or candidate.reason


OBLONG = (16, 8)
"""With a class token 129 places, of which 8 would leave a square."""


def oblong():
    torch.manual_seed(0)
    return Placed(OBLONG).eval()


@torch.no_grad()
def test_a_grid_that_is_no_square_is_served():
    model, x = oblong(), torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    original = model(x)
    assert torch.equal(told(model, 1, keep_ratio=1.0)(x), original)
    evopatch.set_keep_ratio(model, 0.5)
    assert moved(model(x), original) > 1e-4
    assert evopatch.token_selection(model, x).shape == (2, 6, *OBLONG)


def test_advice_is_what_the_model_does_not_what_leaves_a_square():
    assert advice(oblong()) == "evopatch.apply(model, blocks='blocks', prefix_tokens=1)"


@pytest.mark.parametrize("given", [{}, {"images": torch.randn(8, 3, 128, 64)}])
@pytest.mark.parametrize("prefix", [0, 2, 8])
def test_another_number_than_the_models_is_refused(prefix, given):
    model = oblong()
    with pytest.raises(
        ConfigError, match=f"prefix_tokens={prefix}, and of the 129 .* there seem to be 1 prefix tokens"
    ):
        told(model, prefix, **given)
    assert not evopatch.is_patched(model)


@pytest.mark.parametrize(("behind", "text"), [(1, "number 25 are"), (4, "numbers 25, 26, 27, 28 are")])
@pytest.mark.parametrize("prefix", [0, 1])
def test_prefix_tokens_behind_the_patch_tokens_are_refused(behind, text, prefix):
    model = Placed(before=0, behind=behind)
    with pytest.raises(UnsupportedModelError, match=f"of the {25 + behind} tokens .* {text} the same for any image"):
        told(model, prefix)
    assert not evopatch.is_patched(model)
    assert f"{text} the same for any image" in advice(model)


class OfTheImage(Placed):
    """Its second prefix token is the mean of the patches."""

    def __init__(self):
        super().__init__(before=2)

    def embed(self, x):
        x = super().embed(x)
        return torch.cat([x[:, :1], x[:, 1:2] + x[:, 2:].mean(1, keepdim=True), x[:, 2:]], dim=1)


def test_a_prefix_token_that_is_made_of_the_image_may_be_counted():
    assert advice(OfTheImage()) == "evopatch.apply(model, blocks='blocks', prefix_tokens=PREFIX_TOKENS)"
    assert evopatch.is_patched(told(OfTheImage(), 2))
    with pytest.raises(ConfigError, match="the first 1 are the same"):
        told(OfTheImage(), 0)


class OfTwoInputs(Placed):
    """Can't be run on an image alone."""

    def forward(self, x, shift):
        return super().forward(x) + shift


def test_without_a_run_no_number_is_refused():
    model = OfTwoInputs(OBLONG)
    assert advice(model) == "evopatch.apply(model, blocks='blocks', prefix_tokens=PREFIX_TOKENS)"
    assert evopatch.is_patched(told(model, 1))


class Noisy(Placed):
    def embed(self, x):
        return super().embed(x + torch.randn_like(x))


def test_trying_a_model_changes_nobodys_random_numbers(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds every GPU, too"))
    model = Noisy(before=0)
    state = torch.get_rng_state()
    told(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


# Grids


class Encoder(OwnViT):
    """Takes the map that its owner makes of an image."""

    def embed(self, x):
        x = x.flatten(2).transpose(1, 2)
        return torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed, self.encoder = nn.Conv2d(3, WIDTH, 8, 8), Encoder()
        del self.encoder.patch_embed

    def forward(self, x):
        return self.encoder(self.patch_embed(x))


@torch.no_grad()
def test_a_host_that_takes_a_map_of_an_image_runs():
    model, x = Owner().eval(), images()
    original = model(x)
    evopatch.apply(model, blocks="encoder.blocks", prefix_tokens=1)
    assert moved(model(x), original) > 1e-6
    assert evopatch.token_selection(model, x).shape == (2, 6, 5, 5)


class Filling(Placed):
    """Fills images up to whole patches."""

    def embed(self, x):
        return super().embed(F.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8)))


@torch.no_grad()
def test_a_model_that_fills_images_up_runs_and_its_grid_is_known_of_whole_patches():
    model = told(Filling().eval(), 1)
    assert model(images(size=36)).shape == (2, WIDTH)
    assert evopatch.token_selection(model, images()).shape == (2, 6, 5, 5)
    with pytest.raises(UnsupportedModelError, match="25 patch tokens came to a block.*36x36 px.*no grid is known"):
        evopatch.token_selection(model, images(size=36))


class TwoSteps(Placed):
    def stem(self):
        return nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, WIDTH, 2, 2))


class Overlapping(Placed):
    def stem(self):
        return nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Conv2d(24, WIDTH, 3, 2, 1))


def test_a_stem_of_two_convolutions_makes_patches_of_both():
    model = told(TwoSteps().eval(), 1)
    assert evopatch.token_selection(model, images()).shape == (2, 6, 5, 5)
    assert evopatch.profile(model, (3, 40, 40)).blocks


def test_where_no_grid_is_known_tools_say_so():
    model = told(Overlapping().eval(), 1)
    assert model(images()).shape == (2, WIDTH)
    for look in (lambda: evopatch.token_selection(model, images()), lambda: evopatch.profile(model, (3, 40, 40))):
        with pytest.raises(UnsupportedModelError, match="no grid is known of its patch tokens"):
            look()
