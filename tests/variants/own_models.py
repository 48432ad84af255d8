"""Small random flat models that no library knows, as people write them, and what `evopatch.apply` is told of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import vision_transformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from evopatch.patching.adapter import Adapter, HostSpec
from evopatch.patching.own_model import OwnModel

from .timm_models import SIZE

WIDTH, HEADS, PATCH = 48, 4, 8


def attend(q, k, v):
    """What a block's attention is made of stands in a function of its own."""
    return F.scaled_dot_product_attention(q, k, v)


def rotated(x, rope):
    sin, cos = rope
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class AssertingAttention(vision_transformer.Attention):
    """Not in a test's file, whose asserts pytest writes anew."""

    def forward(self, x, attn_mask=None, is_causal=False):
        assert torch.isfinite(x).all()
        assert (x.shape[2] == self.qkv.in_features) and (x.dim() == 3), "sizes"  # noqa: PT018
        return super().forward(x)


class Attention(nn.Module):
    """Fused; rotates queries and keys where there is a table."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = rotated(q, rope), rotated(k, rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Materialised(Attention):
    """As in the DINO papers' code."""

    def forward(self, x):
        shape = x.shape[0], x.shape[1], 3, HEADS, WIDTH // HEADS
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class WrittenOut(Materialised):
    """Theirs goes before it, for where a faster kernel is installed."""

    def forward(self, x, kernel=None):
        return super().forward(x) if kernel is None else kernel(x)


def split_heads(x):
    return rearrange(x, "b n (h d) -> b h n d", h=HEADS)


class SoftmaxModule(Attention):
    """The softmax is a module, and heads are split by a function that is mapped over the chunks."""

    def __init__(self):
        super().__init__()
        self.attend = nn.Softmax(dim=-1)

    def forward(self, x):
        q, k, v = map(split_heads, self.qkv(x).chunk(3, dim=-1))
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5)
        return self.proj(rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)"))


class Weighing(SoftmaxModule):
    """Gives its weights, too."""

    def forward(self, x):
        q, k, v = map(split_heads, self.qkv(x).chunk(3, dim=-1))
        weights = self.attend(torch.matmul(q, k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5)
        return self.proj(rearrange(torch.matmul(weights, v), "b h n d -> b n (h d)")), weights


class ThreeAxes(nn.Module):
    """Images and heads share an axis, and shapes are checked, as in the first years of transformers."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def split(self, x, images):
        x = x.view(images, -1, HEADS, WIDTH // HEADS).transpose(1, 2).contiguous()
        return x.view(images * HEADS, -1, WIDTH // HEADS)

    def forward(self, x):
        images, tokens, _ = x.size()
        q = self.split(self.q(x) * (WIDTH // HEADS) ** -0.5, images)
        k, v = self.split(self.k(x), images), self.split(self.v(x), images)
        weights = torch.bmm(q, k.transpose(1, 2))
        if weights.size() != (images * HEADS, tokens, tokens):
            raise ValueError("weights of another shape")
        weights = F.dropout(F.softmax(weights, dim=-1), p=0.0, training=self.training)
        out = torch.bmm(weights, v).view(images, HEADS, tokens, WIDTH // HEADS)
        return self.proj(out.transpose(1, 2).reshape(images, tokens, WIDTH))


class ByFunction(nn.Module):
    """torch's function with parameters of its own; takes and gives `(T, B, C)`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * 0.1)
        self.bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x.transpose(0, 1)
        w, b, proj = self.weight, self.bias, self.proj
        out, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, w, b, None, None, False, 0.0, proj.weight, proj.bias, training=self.training
        )
        return out.transpose(0, 1)


def mlp(dropout):
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(dropout))


class Block(nn.Module):
    def __init__(self, attention, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = attention(), mlp(dropout)

    def forward(self, x, **inputs):
        x = x + self.attn(self.norm1(x), **inputs)
        return x + self.mlp(self.norm2(x))


class RotaryBlock(Block):
    def forward(self, x, rope):
        return Block.forward(self, x, rope=rope)


class TupleBlock(Block):
    """Gives the weights beside the tokens."""

    def forward(self, x):
        y, weights = self.attn(self.norm1(x))
        x = x + y
        return x + self.mlp(self.norm2(x)), weights


class MultiheadBlock(nn.Module):
    """As OpenAI's CLIP has them: `(T, B, C)`."""

    def __init__(self, dropout):
        super().__init__()
        self.attn, self.mlp = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout), mlp(dropout)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, attn_mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OwnViT(nn.Module):
    """Any image size: position embeddings are resized.

    Args:
        depth: Number of blocks.
        prefix: Number of prefix tokens; the head reads the first, or the mean of the patch tokens.
    """

    prefix = 1

    def __init__(self, depth: int = 6, num_classes: int = 7, drop_path_rate: float = 0.0, **unused: object) -> None:
        super().__init__()
        self.dropout = drop_path_rate
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.tokens = nn.Parameter(torch.zeros(1, self.prefix, WIDTH)) if self.prefix else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList([self.block() for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes)
        self.grad_checkpointing = False

    def block(self):
        return Block(Attention, self.dropout)

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def embed(self, x):
        x = self.patch_embed(x)
        side = SIZE // PATCH
        places = self.pos_embed.transpose(1, 2).unflatten(2, (side, side))
        places = F.interpolate(places, size=x.shape[2:], mode="bilinear", align_corners=False)
        x = (x + places).flatten(2).transpose(1, 2)
        return x if self.tokens is None else torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], dim=1)

    def encode(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if not (self.grad_checkpointing and self.training):
                x = block(x)
                continue
            x = checkpoint(block, x, use_reentrant=False)
        return self.norm(x)

    def features(self, x):
        """The tokens after every block."""
        x, found = self.embed(x), []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return found

    def forward(self, x):
        x = self.encode(x)
        return self.head(x[:, 0] if self.prefix else x.mean(1))


class OwnRegisters(OwnViT):
    prefix = 3


class OwnRotary(OwnViT):
    """No prefix tokens; places are told by a rotary table alone."""

    prefix = 0

    def block(self):
        return RotaryBlock(Attention, self.dropout)

    def table(self, grid):
        rows, columns = (torch.arange(side, device=self.pos_embed.device) for side in grid)
        frequency = 0.3 ** torch.arange(WIDTH // HEADS // 4, device=self.pos_embed.device)
        angles = [torch.outer(axis, frequency) for axis in (rows, columns)]
        angle = torch.cat([angles[0].repeat_interleave(len(columns), 0), angles[1].repeat(len(rows), 1)], dim=1).to(
            self.pos_embed.dtype
        )
        return angle.sin(), angle.cos()

    def encode(self, x):
        rope = self.table([side // PATCH for side in x.shape[2:]])
        x = self.embed(x)
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, rope, use_reentrant=False) if self.checkpoints(i) else block(x, rope)
        return self.norm(x)

    def checkpoints(self, index):
        return self.grad_checkpointing and self.training

    def features(self, x):
        rope = self.table([side // PATCH for side in x.shape[2:]])
        x, found = self.embed(x), []
        for block in self.blocks:
            x = block(x, rope=rope)
            found.append(x)
        return found


class OwnWrittenOut(OwnViT):
    def block(self):
        return Block(WrittenOut, self.dropout)

    def encode(self, x):
        return super().encode(x)


class OwnThreeAxes(OwnViT):
    def block(self):
        return Block(ThreeAxes, self.dropout)


class OwnSoftmaxModule(OwnViT):
    """Blocks give tuples."""

    def block(self):
        return TupleBlock(Weighing, self.dropout)

    def encode(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x, _ = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)[0]
        return self.norm(x)

    def given(self, x):
        """By every block."""
        x, found = self.embed(x), []
        for block in self.blocks:
            found.append(block(x))
            x = found[-1][0]
        return found

    def features(self, x):
        return [tokens for tokens, _ in self.given(x)]

    def attentions(self, x):
        return [weights for _, weights in self.given(x)]


class OwnByFunction(OwnViT):
    prefix = 0

    def block(self):
        return Block(ByFunction, self.dropout)


class OwnMultihead(OwnViT):
    """Blocks of `(T, B, C)`."""

    def block(self):
        return MultiheadBlock(self.dropout)

    def embed(self, x):
        return OwnViT.embed(self, x).transpose(0, 1)

    def encode(self, x):
        return OwnViT.encode(self, x).transpose(0, 1)

    def features(self, x):
        return [tokens.transpose(0, 1) for tokens in OwnViT.features(self, x)]


class OwnEncoderLayers(OwnViT):
    """torch's own layers, whose fast path goes past their attention module."""

    def block(self):
        return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, self.dropout, batch_first=True, norm_first=True)


class NormedAttention(SoftmaxModule):
    """With the norm before it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return SoftmaxModule.forward(self, self.norm(x))


class OwnParts(OwnViT):
    """The parts of a block are called one by one, and added up outside of them."""

    def block(self):
        return nn.ModuleList([NormedAttention(), nn.Sequential(nn.LayerNorm(WIDTH), mlp(self.dropout))])

    def encode(self, x):
        x = self.embed(x)
        for attn, ff in self.blocks:
            x = attn(x) + x
            x = ff(x) + x
        return self.norm(x)

    def features(self, x):
        x, found = self.embed(x), []
        for attn, ff in self.blocks:
            x = attn(x) + x
            x += ff(x)
            found.append(x)
        return found


FLAT: dict[str, Callable[..., nn.Module]] = {
    "own": OwnRegisters,
    "own_rotary": OwnRotary,
    "own_written_out": OwnWrittenOut,
    "own_softmax": OwnSoftmaxModule,
    "own_three_axes": OwnThreeAxes,
    "own_function": OwnByFunction,
    "own_multihead": OwnMultihead,
    "own_encoder_layers": OwnEncoderLayers,
    "own_parts": OwnParts,
}


def torchvision_vit(depth: int = 6, drop_path_rate: float = 0.0, **unused: object) -> nn.Module:
    """Served by an adapter of its own."""
    return VisionTransformer(SIZE, PATCH, depth, HEADS, WIDTH, 2 * WIDTH, drop_path_rate, num_classes=7)


SAID = {cls: {"blocks": "blocks", "prefix_tokens": cls.prefix} for cls in FLAT.values()}
SAID[OwnRotary] |= {"token_inputs": ("rope",)}
"""Arguments of `evopatch.apply`, beside its settings."""


class Described(Adapter):
    """Gives `evopatch.apply` these arguments, so that tests of every model needn't."""

    def hosts(self) -> tuple[type[nn.Module], ...]:
        return tuple(SAID)

    def inspect(self, host: nn.Module, name: str) -> HostSpec:
        return self._own(host).inspect(host, name)

    def plan(self, host, state):
        return self._own(host).plan(host, state)

    def _own(self, host: nn.Module) -> OwnModel:
        said = dict(SAID[next(cls for cls in SAID if isinstance(host, cls))])
        images = torch.zeros(1, 3, SIZE, SIZE).to(next(host.parameters())) if "token_inputs" in said else None
        return OwnModel(host, readout=None, images=images, **said)
