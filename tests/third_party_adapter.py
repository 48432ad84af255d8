"""An adapter for an architecture that evopatch has never seen, written as its documentation says."""

from torch import nn

from evopatch.forward.walk import PatchedHost, walk
from evopatch.patching.adapter import Adapter, HostSpec


class ToyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ToyViT(nn.Module):
    """Tokens `(B, 9, 16)` in, the same out: a grid of 3 by 3, no prefix tokens."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[ToyBlock() for _ in range(4)])

    def forward(self, x):
        return self.layers(x)


class SlowFastToy(PatchedHost):
    def forward(self, x):
        return walk(self, "forward", x, compact=True)


class ToyAdapter(Adapter):
    mixin = SlowFastToy

    def hosts(self):
        return (ToyViT,)

    def inspect(self, host, name):
        return HostSpec(blocks="layers", prefix=0, readout=0)

    def grid(self, host, image_size):
        return 3, 3
