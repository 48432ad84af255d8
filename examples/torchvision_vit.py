"""torchvision's ViT: patch it, and see what it saves: `python examples/torchvision_vit.py [DEFAULT]`, with weights."""

import sys

import torch
from torchvision.models import vit_b_16

import evopatch

model = vit_b_16(weights=sys.argv[1] if len(sys.argv) > 1 else None).eval()
model.heads = torch.nn.Identity()  # features; leave it for classes
images = torch.randn(8, 3, 224, 224)  # yours, preprocessed
with torch.no_grad():
    before = model(images)

evopatch.apply(model, keep_ratio=0.7, images=images)
with torch.no_grad():
    after = model(images)
print(f"FLOPs: {evopatch.profile(model, (3, 224, 224)).ratio:.3f} of unpatched")
print(f"cosine of features: {torch.cosine_similarity(before, after).mean():.4f}")
