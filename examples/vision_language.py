"""The vision tower of a language model: only that is patched. A tiny LLaVA with random weights, to be run anywhere.

With a real one: `LlavaForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")`.
"""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import evopatch

vision = CLIPVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, image_size=112, patch_size=14
)
language = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=200
)
model = LlavaForConditionalGeneration(
    LlavaConfig(vision_config=vision, text_config=language, image_token_index=199)
).eval()

evopatch.apply(model, keep_ratio=0.7)  # with 12 blocks or more, config=EvoConfig.dense(): patch tokens are read
prompt = torch.tensor([[1, *[199] * 64, 5, 6, 7]])  # 8 by 8 patches, and a question
pixels = torch.randn(1, 3, 112, 112)
answer = model.generate(input_ids=prompt, pixel_values=pixels, max_new_tokens=5, do_sample=False)
print(answer[0, prompt.shape[1] :].tolist())
print(evopatch.token_selection(model.model.vision_tower, pixels)[0, -2].int())  # what the last block but one kept slow
