"""`evopatch profile`."""

from __future__ import annotations

from . import options
from .patch_options import Asked, one_config, patch
from .tables import console, megabytes, print_table, table_of, write_json


@one_config
def profile(
    model: options.Model,
    *,
    config: options.ConfigFile = None,
    asked: Asked,
    image_size: options.ImageSize = None,
    json_out: options.JsonOut = None,
) -> None:
    """FLOPs, tokens and memory of every block for one image, patched against unpatched. Random weights, no network.

    evopatch profile --model vit_base_patch16_224 --keep-ratio 0.4
    """
    from ..measure.profiling import profile as run
    from ..sources.architectures import open_architecture

    options.check_folder_of(json_out, "--json")
    network, input_size = open_architecture(model, image_size)
    (setting,) = patch(network, model, asked)
    found = run(network, input_size)
    columns = ("tokens", "of", "GFLOPs", "un-\npatched", "share", "kept\nMB", "un-\npatched", "share")
    table = table_of(f"{model}, {input_size[1]}x{input_size[2]}, one image", ("block",), columns)
    for index, block in enumerate(found.blocks):
        table.add_row(
            str(index),
            str(block.tokens),
            str(block.tokens_unpatched),
            *_pair(block.flops / 1e9, block.flops_unpatched / 1e9),
            *_pair(megabytes(block.activations), megabytes(block.activations_unpatched)),
        )
    table.add_section()
    table.add_row(
        "model",
        "",
        "",
        *_pair(found.flops / 1e9, found.flops_unpatched / 1e9),
        *_pair(megabytes(found.activations), megabytes(found.activations_unpatched)),
    )
    print_table(table)
    memory = _pair(megabytes(found.memory), megabytes(found.memory_unpatched))
    console.print(
        "FLOPs: two per multiply-add; the model's include embedding, selection and head. Kept: activations that a "
        f"forward keeps for the backward pass. Peak of a forward without gradients: {memory[0]} MB, unpatched "
        f"{memory[1]} MB, share {memory[2]}.",
        highlight=False,
    )
    write_json(json_out, {"config": setting.to_dict(), **found.to_dict()})


def _pair(patched: float, unpatched: float) -> tuple[str, str, str]:
    return f"{patched:.2f}", f"{unpatched:.2f}", f"{patched / unpatched:.3f}"
