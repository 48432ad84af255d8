"""open_clip's image encoder, which no adapter knows: `python examples/open_clip_encoder.py [openai]`, with weights."""

import sys

import open_clip
import torch

import evopatch

model = open_clip.create_model("ViT-B-32", pretrained=sys.argv[1] if len(sys.argv) > 1 else None).eval()
print(evopatch.inspect(model))  # the image encoder's blocks, and the text encoder's, whose attention is masked

images = torch.randn(8, 3, 224, 224)  # yours, preprocessed
text = open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat", "a photo of a dog"])
with torch.no_grad():
    before = model(images, text)

evopatch.apply(model, keep_ratio=0.7, blocks="visual.transformer.resblocks", prefix_tokens=1)
with torch.no_grad():
    after = model(images, text)
print(f"cosine of image features: {torch.cosine_similarity(before[0], after[0]).mean():.4f}")
print(f"text features unchanged: {torch.equal(before[1], after[1])}")
