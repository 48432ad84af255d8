"""Makes the tables of compatibility.md, beside this file, of the rows below.

    python docs/compatibility_table.py

`tests/tools/test_compatibility_page.py` checks that the page is up to date and that every test is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("compatibility.md")
YES, PARTLY, NO = "yes", "partly", "no"


class Row(NamedTuple):
    """What a patched model is used with."""

    what: str
    works: str
    order: str
    """When `apply` comes, and what to know."""
    tests: tuple[str, ...]
    """Names of the tests that show it; none only where it wasn't tried."""


# fmt: off
SECTIONS = {
    "With PyTorch": [
        Row("stock checkpoints", YES,
            "load before or after `apply`: keys are the same",
            ("test_state_dict_is_unchanged_and_a_stock_checkpoint_loads",)),
        Row("`copy.deepcopy`, `pickle`, `torch.save`", YES,
            "any time",
            ("test_deepcopy_pickle_and_ema_after_a_forward",)),
        Row("`torch.compile(fullgraph=True)`", YES,
            "`apply` first or last; any number of keep ratios",
            ("test_compiles_to_one_graph_without_recompiling",
             "test_any_number_of_keep_ratios", "test_a_model_compiled_before_it_was_patched_follows")),
        Row("inductor", YES,
            "as above",
            ("test_compiles_with_inductor",)),
        Row("`torch.export`", YES,
            "after `apply`; dynamic batch, height and width",
            ("test_exports_and_runs_eagerly_after", "test_exported_program_takes_other_batch_and_image_sizes")),
        Row("AOTInductor", YES,
            "after `apply`, from an exported program",
            ("test_compiled_ahead_of_time",)),
        Row("ONNX, run by ONNX Runtime", YES,
            "after `apply`; both exporters, dynamic sizes where the unpatched model takes them, but for PVT v2"
            " and SegFormer",
            ("test_onnx_runtime_equals_eager",
             "test_torchscript_onnx_equals_eager",
             "test_onnx_takes_other_batch_and_image_sizes")),
        Row("OpenVINO", YES,
            "after `apply`, from an exported program",
            ("test_openvino_equals_eager",)),
        Row("Core ML", YES,
            "after `apply`, from an exported program; converted, not run",
            ("test_core_ml_converts",)),
        Row("ExecuTorch, XNNPACK", YES,
            "after `apply`, by `evopatch.export`; one batch and image size, see [Deployment](deployment.md)",
            ("test_every_format_is_written_and_verified",)),
        Row("`torch.jit.trace`", YES,
            "after `apply`; one image size",
            ("test_traces_with_gradients_on",)),
        Row("autocast, bfloat16, float16", YES,
            "any time; scores are kept in float32",
            ("test_autocast", "test_half_precision")),
        Row("gradient checkpointing, both kinds", YES,
            "any time, also wrappers around layers after `apply`",
            ("test_gradient_checkpointing_changes_no_gradient",
             "test_reentrant_checkpointing_changes_no_gradient",
             "test_layers_wrapped_in_torchs_checkpoints_after_apply")),
        Row("several forwards before one backward, self-distillation", YES,
            "keep ratios are read when a forward begins",
            ("test_two_forwards_before_one_backward",
             "test_a_change_between_forward_and_backward_changes_no_gradient")),
        Row("threads", YES,
            "several may run one model; don't run `apply` beside a forward",
            ("test_two_threads_on_one_model",)),
        Row("`nn.DataParallel`", YES,
            "after `apply`",
            ("test_torchscript_trace_and_data_parallel", "test_copies_get_their_tensors_one_by_one")),
        Row("DistributedDataParallel, by accelerate", YES,
            "`apply` first",
            ("test_two_processes_are_one_with_twice_the_batch",)),
        Row("FSDP, both generations", YES,
            "`apply` first; tested in one sharded process. The older one, over several, and the newer one"
            " compiled leave blocks that are put away out of look-ahead",
            ("test_fully_sharded_equals_whole", "test_fully_sharded_and_compiled_looks_at_the_block_that_runs",
             "test_fully_sharded_as_torch_did_it_first")),
        Row("parametrizations, `fully_shard` on a patched module", YES,
            "undo them before `remove`, which refuses otherwise",
            ("test_a_class_changed_after_apply_is_not_undone",)),
        Row("hooks on blocks, modules inside, attention modules, containers of blocks", YES,
            "any time; they see the full grid (not under `torch.compile`), see "
            "[Questions](faq.md#why-does-a-hook-see-fewer-tokens)",
            ("test_a_hook_on_every_module_sees_what_it_sees_unpatched", "test_explanations_see_every_token")),
        Row("linear layers replaced (LoRA, quantisation)", YES,
            "before or after `apply`; look-ahead follows them",
            ("test_a_linear_layer_replaced_after_apply_is_used",
             "test_layers_that_are_no_plain_linear_ones_are_looked_at_by_what_they_do")),
        Row("`torch.func`: `functional_call`, `grad`, `jvp`, `vmap`", YES,
            "after `apply`",
            ("test_torch_func", "test_gradients_of_each_image_by_vmap",
             "test_derivatives_in_forward_mode_are_those_of_backward")),
        Row("`torch.nn.utils.prune`", YES,
            "before or after `apply`, the same result; `prune.remove` any time",
            ("test_weights_pruned_by_torch",
             "test_weights_that_are_made_before_a_call_are_those_of_this_forward")),
        Row("`weight_norm`, `spectral_norm`, old and new, `parametrize.cached`", YES,
            "before or after `apply`",
            ("test_weights_that_are_made_before_a_call_are_those_of_this_forward",
             "test_cached_parametrizations_keep_their_gradients")),
        Row("`AveragedModel` (averages of weights)", YES,
            "after `apply`",
            ("test_averaged_weights_of_torch",)),
    ],
    "With timm": [
        Row("`ModelEmaV3`, further training, DropPath", YES,
            "any time",
            ("test_deepcopy_pickle_and_ema_after_a_forward", "test_training_with_drop_path")),
        Row("`features_only`, `forward_intermediates`", YES,
            "the full grid at every block, whatever the keep ratio",
            ("test_features_only", "test_looking_between_the_blocks_changes_nothing")),
        Row("`set_input_size`, dynamic image sizes", YES,
            "before or after `apply`",
            ("test_changed_input_sizes_of_a_patched_flat_model", "test_dynamic_image_sizes_of_flat_models")),
        Row("`reset_classifier`, `prune_intermediate_layers`", YES,
            "after `apply`; with another pooling `remove` and `apply` again before `save_pretrained`, which says so",
            ("test_classifier_and_pruning_of_a_patched_model",)),
        Row("`reparameterize_model` (LeViT)", YES,
            "before or after `apply`",
            ("test_batch_norms_fused_into_the_layers",)),
        Row("`set_fused_attn`, `fused_attn` of a module", YES,
            "any time",
            ("test_unfused_attention_gives_the_same", "test_switching_fused_attention_off_counts")),
        Row("an unmodified training script", YES,
            "`evopatch run`, or `evopatch.autopatch`",
            ("test_run_a_training_script",)),
    ],
    "With transformers": [
        Row("`Trainer`", YES,
            "`apply` before",
            ("test_trainer",)),
        Row("`pipeline`", YES,
            "`apply` to the model, then give it to the pipeline",
            ("test_image_classification_pipeline",)),
        Row("`from_pretrained` with `dtype`, `device_map`", YES,
            "`apply` after",
            ("test_from_pretrained_with_dtype_and_device_map",)),
        Row("dispatched and offloaded models (accelerate)", YES,
            "before or after `apply`",
            ("test_models_dispatched_by_accelerate", "test_offloaded_by_whole_blocks",
             "test_hooks_of_accelerate_come_and_go")),
        Row("`Accelerator.prepare` with mixed precision", YES,
            "`apply` first, or after `unwrap_model(model, keep_fp32_wrapper=False)`, which comes before `remove`, too",
            ("test_a_wrapped_forward_comes_off_before_the_patch", "test_unwrapped_models_are_patched",
             "test_only_prefix_tokens_go_through_the_last_block")),
        Row("`set_attn_implementation`", YES,
            "any time; `eager` and `sdpa`, and registered ones of one's own, which get the sizes of groups as their "
            "attention mask. Others (flash, flex) run where a block takes all tokens, and give way to `sdpa` where "
            "groups weigh by their size",
            ("test_the_attention_implementation_can_change_after_apply",
             "test_other_implementations_never_get_a_bias",
             "test_an_implementation_of_ones_own_runs_in_every_block")),
        Row("`output_hidden_states`", YES,
            "the full grid in every layer",
            ("test_hidden_states_asked_for_by_a_pre_hook", "test_outputs_asked_for_by_the_models_config")),
        Row("`output_attentions`", YES,
            "between all tokens, see [Questions](faq.md#output_attentions); refused for Swin, SAM and ViTDet",
            ("test_attentions_are_between_all_tokens",)),
        Row("`interpolate_pos_encoding`", YES,
            "any time",
            ("test_other_image_sizes_of_flat_models",)),
        Row("encoder-decoders, dual encoders, DPT, Depth Anything, UperNet", YES,
            "`apply` to the whole model: it finds the hosts inside",
            ("test_an_image_tower_in_an_encoder_decoder",
             "test_an_image_tower_beside_a_text_tower",
             "test_depth_estimation_on_a_dinov2_backbone",
             "test_upernet_on_a_patched_backbone")),
    ],
    "With other libraries": [
        Row("peft: LoRA, DoRA", YES,
            "before or after `apply`, the same result; `merge_and_unload` any time",
            ("test_low_rank_adapters_of_peft",)),
        Row("torchao: weights in 8 bits", YES,
            "before or after `apply`, the same result",
            ("test_weights_quantised_by_torchao",)),
        Row("Lightning", YES,
            "`apply` in the module's `__init__`, so that `load_from_checkpoint` finds it patched",
            ("test_trained_by_lightning",)),
        Row("DeepSpeed: ZeRO 2 and 3", YES,
            "after `apply`; run on a CPU in one process. It clips gradients to a norm of 1 unless told otherwise",
            ("test_trained_by_deepspeed",)),
        Row("captum: layers' activations and attributions, saliency", YES,
            "after `apply`; they see every token",
            ("test_attributions_of_captum",)),
        Row("captum: integrated gradients", PARTLY,
            "they run, but don't add up: which tokens merge changes along the way. Use "
            "`set_keep_ratio(model, 1.0)` for them",
            ("test_integrated_gradients_of_captum_do_not_add_up",)),
        Row("pytorch-grad-cam", YES,
            "after `apply`; `reshape_transform` gets every token",
            ("test_maps_of_pytorch_grad_cam",)),
        Row("thop, torchinfo, fvcore", NO,
            "they have hooks, which see all tokens, and so don't count what is saved: use `evopatch.profile`",
            ("test_counters_of_operations_do_not_count_what_is_saved",)),
        Row("FastAPI, uvicorn", YES,
            "[an example](serving.md)",
            ("test_a_batch_holds_one_keep_ratio_and_every_request_gets_its_own_answer",)),
    ],
}
# fmt: on
"""By the page's headings."""


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| what | works | order, and what to know | test |", "|---|---|---|---|"]
    for row in rows:
        tests = ", ".join(f"`{test}`" for test in row.tests)
        lines.append(f"| {row.what} | {row.works} | {row.order} | {tests} |")
    return "\n".join(lines)


def with_tables(page: str, sections: dict[str, list[Row]]) -> str:
    """The page, with every table made anew.

    Raises:
        ValueError: If it has no place for one.
    """
    for title, rows in sections.items():
        begin = f"<!-- table: {title}, made by compatibility_table.py -->\n"
        place = re.compile(f"{re.escape(begin)}.*?<!-- end -->", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"{PAGE} has no place for a table: expected {begin.strip()} and <!-- end -->")
        made = f"{begin}\n{table(rows)}\n\n<!-- end -->"
        page = place.sub(lambda match, made=made: made, page)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), SECTIONS))
