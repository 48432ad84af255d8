"""A vision transformer as people keep it in their own repository, in the style of DINOv2, for dense features."""

import torch
from torch import nn

import evopatch


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DinoVisionTransformer(nn.Module):
    def __init__(self, width=384, depth=12, registers=4):
        super().__init__()
        self.patch_embed, self.norm = nn.Conv2d(3, width, 14, 14), nn.LayerNorm(width)
        self.prefix = nn.Parameter(torch.randn(1, 1 + registers, width) * 0.02)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


model = DinoVisionTransformer().eval()  # and your weights
evopatch.apply(model, config=evopatch.EvoConfig.dense(), blocks="blocks", prefix_tokens=5)
with torch.no_grad():
    print(model(torch.randn(1, 3, 224, 224))[:, 5:].unflatten(1, (16, 16)).shape)  # the full grid
