"""Anomaly detection by patch features and nearest neighbours (as in PatchCore), with a patched timm encoder.

`python examples/anomaly_detection.py vit_small_patch14_dinov2.lvd142m` downloads weights; without it they are random.
"""

import sys

import timm
import torch
import torch.nn.functional as F

import evopatch

torch.manual_seed(0)
name = sys.argv[1] if len(sys.argv) > 1 else "vit_tiny_patch16_224"
model = timm.create_model(name, pretrained=len(sys.argv) > 1, num_classes=0, img_size=224).eval()
evopatch.apply(model, config=evopatch.EvoConfig.dense())


@torch.no_grad()
def patch_features(images):
    features = model.forward_intermediates(images, indices=[len(model.blocks) // 2], intermediates_only=True)[0]
    return F.normalize(features.flatten(2).transpose(1, 2), dim=-1)  # (B, N, C), in raster order


def random_texture(count):
    return F.interpolate(torch.rand(count, 3, 28, 28), 224, mode="bilinear") - 0.5


memory = patch_features(random_texture(16)).flatten(0, 1)  # of images without a fault
test = random_texture(2)
test[1, :, 64:128, 96:160] = 4.0
distance = 1 - (patch_features(test) @ memory.T).max(-1).values
side = int(distance.shape[1] ** 0.5)
scores = distance.unflatten(1, (side, side))
print("image scores:", [round(score.item(), 4) for score in scores.flatten(1).max(1).values])
row, column = divmod(int(scores[1].argmax()), side)
print(f"the fault is at row {row}, column {column}")
