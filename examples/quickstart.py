"""Patch a timm model: same weights, same outputs' shapes, fewer operations.

Run it with `python examples/quickstart.py`; give `--pretrained` where timm can download weights.
"""

import argparse

import timm
import torch

import evopatch

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="deit_small_patch16_224")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--batch-size", type=int, default=16)
args = parser.parse_args()

model = timm.create_model(args.model, pretrained=args.pretrained).eval()
images = torch.randn(args.batch_size, 3, 224, 224)

with torch.no_grad():
    before = model(images)
    evopatch.apply(model, keep_ratio=0.5)
    after = model(images)
    evopatch.set_keep_ratio(model, 1.0)
    same = model(images)

print("output shapes:", tuple(before.shape), tuple(after.shape))
print("keep_ratio=1.0 is the original, to the bit:", torch.equal(before, same))

evopatch.set_keep_ratio(model, 0.5)
print(f"FLOPs of the whole model: {evopatch.profile(model, (3, 224, 224)).ratio:.3f} of unpatched")
print("slow tokens per block:", evopatch.token_selection(model, images)[0].sum(dim=(1, 2)).tolist())

unpatched, patched = evopatch.benchmark(model, images, rounds=10).sides
print(f"images/s: {patched.images_per_second:.1f} patched, {unpatched.images_per_second:.1f} unpatched")
print(f"{patched.speed_up:.2f} times as fast (median of alternating rounds)")

evopatch.remove(model)
with torch.no_grad():
    print("removed, the original again:", torch.equal(before, model(images)))
