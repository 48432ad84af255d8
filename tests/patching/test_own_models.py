"""Models that no adapter knows: what is found, what is checked, and what is refused."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from comparing import moved
from torch import nn
from torch.utils.checkpoint import checkpoint
from variants import build, images, own_models
from variants.own_models import Attention, Block, OwnRotary, OwnViT

import evopatch
from evopatch import BypassError, ConfigError, UnsupportedInputError, UnsupportedModelError
from evopatch.rewrite.walking import Manner, walkers

WIDTH = own_models.WIDTH


class Tower(nn.Module):
    """torch's own encoder around blocks, in a model that takes images."""

    def __init__(self, batch_first=True, norm_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 26, WIDTH))
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, x, mask=None):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = self.encoder(x, mask) if self.batch_first else self.encoder(x.transpose(0, 1), mask).transpose(0, 1)
        return x[:, 0]


def tower(**options):
    torch.manual_seed(0)
    model = Tower(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def told(model, **others):
    return evopatch.apply(model, blocks="encoder.layers", prefix_tokens=1, **others)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_an_encoder_inside_a_model(batch_first, norm_first):
    model, x = tower(batch_first=batch_first, norm_first=norm_first), images()
    original = model(x)
    told(model, keep_ratio=1.0)
    assert torch.equal(model(x), original)
    evopatch.set_keep_ratio(model, 0.5)
    found = model(x)
    assert moved(found, original) > 1e-3
    selected = evopatch.token_selection(model, x)
    assert selected.shape == (2, 6, 5, 5)
    assert selected[:, -1].float().mean() < 0.5
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), found)
    with evopatch.full_grid(model):
        torch.testing.assert_close(model(x), found, atol=2e-6, rtol=2e-6)
    assert torch.equal(evopatch.remove(model)(x), original)


@torch.no_grad()
def test_foresight_of_images():
    model, x = tower(), images(16)
    plain = told(copy.deepcopy(model))(x)
    assert moved(told(model, images=x)(x), plain) > 1e-4


@torch.no_grad()
def test_flops_count_what_the_fast_path_does():
    model = tower()
    told(model, keep_ratio=1.0)
    profile = evopatch.profile(model, (3, 40, 40))
    tokens, width = 26, WIDTH
    block = 2 * tokens * (4 * width * width + 2 * width * 96) + 2 * 2 * tokens * tokens * width
    assert profile.blocks[0].flops_unpatched == block
    assert torch.backends.mha.get_fastpath_enabled()


# Who walks, and how


class Walking(nn.Module):
    """Its methods are those that real models have."""

    def plain(self, x):
        for block in self.blocks:
            x = block(x, mask=None)
        return x

    def called(self, x):
        return self.norm(self.blocks(x))

    def counted(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x, self.tables[i])
        return x

    def checkpointed(self, x):
        for block in self.blocks:
            if not self.training:
                x = block(x)
                continue
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def either(self, x):
        for block in self.blocks:
            x = checkpoint(block, x) if self.training else block(x)
        return x

    def weighed(self, x):
        for block in self.blocks:
            if self.training:
                x, _ = block(x)
            else:
                x = block(x)[0]
        return x

    def indirect(self, x):
        return self.plain(x).mean(1)

    def collecting(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def weighing(self, x):
        for block in self.blocks:
            out = block(x)
            x = out[0]
        return x

    def last_ones(self, x):
        for block in self.blocks:
            x = block(x)[1]
        return x

    def taking_one(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 3:
                self.kept = x
        return x

    def adding_outside(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

    def twice(self, x):
        for block in self.blocks:
            x = block(x, x)
        return x

    def by_index(self, x):
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return x

    def partly(self, x):
        for block in self.blocks[:3]:
            x = block(x)
        return x

    def first_alone(self, x):
        first = self.blocks[0]
        return first(x)

    def listed(self, x):
        return [block(x) for block in self.blocks]

    def freezing(self):
        for block in self.blocks:
            block.requires_grad_(False)

    def asking(self, x):
        return len(self.blocks), self.blocks[0].norm, isinstance(self.blocks[0], nn.Module)

    def cutting(self, number):
        self.blocks = self.blocks[:number]


PLAIN, CHECKPOINTED, LOOKING = Manner.PLAIN, Manner.CHECKPOINTED, Manner.LOOKING


def test_which_methods_walk_and_how():
    assert walkers(Walking, "blocks") == {
        **dict.fromkeys(("plain", "called", "counted", "weighed", "indirect"), PLAIN),
        **dict.fromkeys(("checkpointed", "either"), CHECKPOINTED),
        **dict.fromkeys(("collecting", "taking_one", "adding_outside", "twice"), LOOKING),
        **dict.fromkeys(("by_index", "partly", "first_alone", "listed", "weighing", "last_ones"), LOOKING),
    }


def test_without_its_source_a_method_may_look():
    namespace = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return self.blocks(x)", namespace)
    assert walkers(namespace["Hidden"], "blocks") == {"forward": LOOKING}


def test_a_source_that_changed_since_is_none(monkeypatch):
    other = "def plain(self, x):\n    return self.norm(self.blocks(x))\n"
    monkeypatch.setattr("inspect.getsource", lambda function: other)
    found = walkers(Walking, "blocks")
    assert found["plain"] is LOOKING
    monkeypatch.undo()
    assert walkers(Walking, "blocks")["plain"] is PLAIN


class Collecting(OwnViT):
    def forward(self, x):
        found = []
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return torch.stack(found)


class OneByOne(OwnViT):
    def forward(self, x):
        x = self.embed(x)
        for i in range(len(self.blocks)):
            x = self.blocks[i](x)
        return self.head(self.norm(x)[:, 0])


@torch.no_grad()
def test_whoever_looks_between_the_blocks_sees_the_full_grid():
    torch.manual_seed(0)
    model, x = Collecting().eval(), images()
    original = model(x)
    evopatch.apply(model, blocks="blocks", prefix_tokens=1)
    assert model(x).shape == original.shape
    assert moved(model(x)[-1], original[-1]) > 1e-4


@torch.no_grad()
def test_a_loop_by_index_gives_what_a_plain_loop_gives():
    torch.manual_seed(0)
    plain, x = OwnViT().eval(), images()
    model = OneByOne().eval()
    model.load_state_dict(plain.state_dict())
    for each in (plain, model):
        evopatch.apply(each, blocks="blocks", prefix_tokens=1)
    torch.testing.assert_close(model(x), plain(x), atol=2e-5, rtol=2e-5)
    with pytest.raises(BypassError, match=r"blocks\.0 was called from outside"):
        model.blocks[0](torch.zeros(1, 26, WIDTH))


# What is said, checked


def own(**options):
    torch.manual_seed(0)
    return OwnViT(**options).eval()


class Smoothed(Block):
    """A convolution along the patch tokens."""

    def __init__(self):
        super().__init__(Attention, 0.0)
        self.smooth = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        x = super().forward(x)
        return torch.cat([x[:, :1], x[:, 1:] + self.smooth(x[:, 1:].transpose(1, 2)).transpose(1, 2)], dim=1)


class Placed(Block):
    """Knows its tokens' places."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[1]).view(1, -1, 1))


class Paired(Block):
    def forward(self, x):
        return "first", super().forward(x)


class Alone(Block):
    """Names a softmax, and doesn't attend."""

    def forward(self, x):
        return x + self.mlp(self.norm1(x).softmax(-1))


class AcrossImages(Block):
    def forward(self, x):
        return super().forward(x) + x.mean(0, keepdim=True)


class OfTwo(Block):
    def forward(self, x, context):
        return super().forward(x + context.mean(1, keepdim=True))


def with_blocks(cls):
    model = own()
    made = [cls() if cls is Smoothed else cls(Attention, 0.0) for _ in range(6)]
    model.blocks = nn.ModuleList(made)
    return model


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (Smoothed, r"blocks\.0 \(Smoothed\) gives other results when its patch tokens come in another order"),
        (Placed, r"blocks\.0 \(Placed\) gives other results when its patch tokens come in another order"),
        (Paired, r"blocks\.0 \(Paired\) gives a str for tokens .*: expected a tensor of the same shape, or a tuple"),
        (Alone, r"blocks\.0 \(Alone\): run on random tokens, what one token gives doesn't depend on others"),
        (AcrossImages, r"blocks\.0 \(AcrossImages\): run on random tokens, images are mixed"),
        (OfTwo, r"blocks\.0 \(OfTwo\) can't be run on random tokens.*token_inputs.*images="),
    ],
)
def test_blocks_that_are_no_slow_fast_blocks(cls, text):
    model = with_blocks(cls)
    with pytest.raises(UnsupportedModelError, match=text):
        evopatch.apply(model, blocks="blocks", prefix_tokens=1)
    assert not evopatch.is_patched(model)
    (candidate,) = evopatch.inspect(model).candidates
    assert (candidate.path, candidate.call) == ("blocks", "")


def test_every_kind_of_block_is_run():
    model = own()
    model.blocks[3] = Smoothed()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.3 \(Smoothed\) gives other results"):
        evopatch.apply(model, blocks="blocks", prefix_tokens=1)


@pytest.mark.parametrize(
    ("said", "error", "text"),
    [
        (
            {"blocks": "layers", "prefix_tokens": 1},
            ConfigError,
            "no submodule 'layers'.*: 'blocks'",
        ),
        ({"blocks": "norm", "prefix_tokens": 1}, ConfigError, "'norm' is a LayerNorm: expected an nn.ModuleList"),
        ({"blocks": "blocks.0.mlp", "prefix_tokens": 1}, UnsupportedModelError, "blocks.0.mlp.0 .* no attention"),
        ({"blocks": "blocks"}, ConfigError, "prefix_tokens=None: expected how many tokens precede"),
        ({"blocks": "blocks", "prefix_tokens": 1, "readout": 2}, ConfigError, "readout=2: expected how many of the 1"),
        ({"blocks": "blocks", "prefix_tokens": 1, "token_inputs": ["rop"]}, ConfigError, "rop.*takes"),
        ({"prefix_tokens": 1}, ConfigError, "prefix_tokens=1 is for models that no adapter knows.*blocks="),
        ({"readout": 0}, ConfigError, "readout=0 is for"),
    ],
)
def test_what_is_said_wrong(said, error, text):
    model = own()
    model.blocks = nn.ModuleList(own_models.MultiheadBlock(0.0) for _ in range(6))
    with pytest.raises(error, match=text):
        evopatch.apply(model, **said)
    assert not evopatch.is_patched(model)


def test_a_wrong_number_of_prefix_tokens():
    more = r"the first 1 are the same.*others as many as an image of 40x40 has patches \(5x5\): .*be 1 prefix tokens"
    with pytest.raises(ConfigError, match=f"prefix_tokens=2, and of the 26 tokens .* encoder.layers.0 {more}"):
        evopatch.apply(tower(), blocks="encoder.layers", prefix_tokens=2)
    text = "prefix_tokens=0, and of the 26 tokens that come to blocks.0 the first 1 are the same.*seem to be 1 prefix"
    for given in ({}, {"images": images(8)}):  # its position embedding is for the patches alone
        with pytest.raises(ConfigError, match=text):
            evopatch.apply(own(), blocks="blocks", prefix_tokens=0, **given)


class OfTwoInputs(OwnViT):
    """Can't be tried on an image alone."""

    def forward(self, x, text):
        return OwnViT.forward(self, x) + text


def test_a_wrong_number_is_found_by_the_forward_at_the_latest():
    model = evopatch.apply(OfTwoInputs().eval(), blocks="blocks", prefix_tokens=0)
    with pytest.raises(UnsupportedInputError, match="expected 0 prefix tokens and 5x5 patch tokens"):
        model(images(), 0.0)


class Strict(own_models.RotaryBlock):
    """Rotates whatever it is given."""

    def forward(self, x, rope):
        sin, cos = rope
        return super().forward(x, (sin + 0.0, cos + 0.0))


class StrictRotary(OwnRotary):
    def block(self):
        return Strict(Attention, 0.0)


@torch.no_grad()
def test_rotary_tables_are_checked_on_images():
    model, x = StrictRotary().eval(), images(8)
    said = {"blocks": "blocks", "prefix_tokens": 0}
    with pytest.raises(UnsupportedModelError, match=r"rotary table, are named in token_inputs, and need images="):
        evopatch.apply(copy.deepcopy(model), **said)
    original = model(x)
    evopatch.apply(model, token_inputs=["rope"], images=x, **said)
    assert moved(model(x), original) > 1e-4
    told_nothing = evopatch.apply(OwnRotary().eval(), **said)  # whose blocks do without
    with pytest.raises(UnsupportedInputError, match="rope was passed to the patched model.*token_inputs"):
        told_nothing(x)


def test_whole_numbers_arent_averaged():
    model = own()

    class Places(Block):
        def forward(self, x, places):
            return super().forward(x + 0 * places.sum())

    class Giving(OwnViT):
        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x, torch.arange(25)[:, None])
            return self.head(self.norm(x)[:, 0])

    model.__class__ = Giving
    model.blocks = nn.ModuleList(Places(Attention, 0.0) for _ in range(6))
    text = r"blocks\.0 \(Places\) is given places of torch\.int64: expected numbers of floating point"
    with pytest.raises(UnsupportedModelError, match=text):
        evopatch.apply(model, blocks="blocks", prefix_tokens=1, token_inputs=["places"], images=images(8))


def test_none_in_the_place_of_a_block_or_a_part_is_refused():
    model, of_parts = own(), own_models.OwnParts()
    model.blocks._modules["1"] = of_parts.blocks[1]._modules["1"] = None
    for each, path in ((model, r"blocks\.1"), (of_parts, r"blocks\.1\.1")):
        with pytest.raises(UnsupportedModelError, match=rf"^{path} is None: expected a module"):
            evopatch.apply(each, blocks="blocks", prefix_tokens=1)
    with pytest.raises(UnsupportedModelError, match="found nothing to patch"):
        evopatch.apply(model)
    assert "blocks: no: blocks.1 holds no attention" in str(evopatch.inspect(model))


def test_the_probe_leaves_no_trace():
    model, calls = own(), []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evopatch.apply(model, blocks="blocks", prefix_tokens=1)
    assert not calls
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    with torch.device("meta"):
        model = OwnViT()
    evopatch.apply(model, blocks="blocks", prefix_tokens=1)
    assert model(torch.zeros(2, 3, 40, 40, device="meta")).shape == (2, 7)


def test_masks_and_other_keys_are_refused():
    with pytest.raises(UnsupportedInputError, match=r"src_mask was passed to the patched model"):
        told(tower())(images(), mask=torch.zeros(26, 26))

    class Crossing(own_models.MultiheadBlock):
        def forward(self, x):
            y = self.ln_1(x)
            return x + self.attn(y, y + 0.0, y)[0]

    model = own_models.OwnMultihead().eval()
    model.blocks = nn.ModuleList(Crossing(0.0) for _ in range(6))
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn was called with a key that is another tensor"):
        evopatch.apply(model, blocks="blocks", prefix_tokens=1)

    class CrossingFunction(own_models.ByFunction):
        def forward(self, x):
            y, w = x.transpose(0, 1), (self.weight, self.bias)
            out = (self.proj.weight, self.proj.bias)
            given = F.multi_head_attention_forward(
                y, y + 0.0, y, WIDTH, 4, *w, None, None, False, 0.0, *out, training=False
            )
            return given[0].transpose(0, 1)

    model = own()
    model.blocks = nn.ModuleList(Block(CrossingFunction, 0.0) for _ in range(6))
    with pytest.raises(UnsupportedModelError, match="multi_head_attention_forward in blocks.*another key or value"):
        evopatch.apply(model, blocks="blocks", prefix_tokens=1)


# What a model is told about


def found(model):
    return {candidate.path: candidate.call or candidate.reason for candidate in evopatch.inspect(model).candidates}


def test_inspect():
    assert found(tower()) == {"encoder.layers": "evopatch.apply(model, blocks='encoder.layers', prefix_tokens=1)"}
    assert found(own()) == {"blocks": "evopatch.apply(model, blocks='blocks', prefix_tokens=1)"}  # tried on an image
    assert found(OfTwoInputs()) == {"blocks": "evopatch.apply(model, blocks='blocks', prefix_tokens=PREFIX_TOKENS)"}
    assert found(build("vit")) == {"": "evopatch.apply(model)"}
    assert found(nn.Sequential(build("vit"), nn.Identity())) == {"0": "evopatch.apply(model)"}
    assert found(torchvision.models.resnet18()) == {}
    convit = timm.create_model("convit_tiny")
    assert found(convit).keys() == {""}
    assert "adds attention by place after the softmax" in found(convit)[""]
    cait = timm.create_model("cait_xxs24_224")  # its adapter knows what mixes its heads
    with pytest.raises(UnsupportedModelError, match="stands between the product of queries and keys and the softmax"):
        evopatch.apply(cait, blocks="blocks", prefix_tokens=0)
    text = str(evopatch.inspect(tower()))
    assert text == "Tower:\n  encoder.layers: evopatch.apply(model, blocks='encoder.layers', prefix_tokens=1)"
    with pytest.raises(evopatch.AlreadyPatchedError):
        evopatch.inspect(evopatch.apply(build("vit")))


def test_a_refusal_says_what_would_do():
    with pytest.raises(UnsupportedModelError, match=r"evopatch\.inspect\(model\).*Likely: blocks='encoder\.layers'"):
        evopatch.apply(tower())


class DropsImages(Block):
    """DINOv2's drop path: in training some images of a batch don't go through a block's parts."""

    def forward(self, x):
        if not self.training:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        there = torch.arange(len(x) - 1)
        x = x.index_add(0, there, self.attn(self.norm1(x[there])))
        return x.index_add(0, there, self.mlp(self.norm2(x[there])))


@pytest.mark.parametrize("representative", ["matched", "single"])
def test_a_part_of_the_batch_in_attention_is_refused(representative):
    torch.manual_seed(0)
    model, x = OwnViT(), images()
    for block in model.blocks:
        block.__class__ = DropsImages
    config = evopatch.EvoConfig(representative=representative)
    evopatch.apply(model.eval(), blocks="blocks", prefix_tokens=1, config=config)
    assert moved(model(x), evopatch.remove(copy.deepcopy(model))(x)) > 1e-5
    with pytest.raises(UnsupportedInputError, match=r"attention over 1 images in blocks\.\d.*where 2 go through it"):
        model.train()(x)
