# SPDX-License-Identifier: Apache-2.0
"""Memory and time: checkpointing, kernels, number types, logits."""

from __future__ import annotations

from ..facts import Facts
from . import cited, collected, heuristic

GIB = 2**30


def _tight(facts: Facts, size: int) -> bool:
    """Whether so much is a good part of the device, or, where its memory is not known, more than 2 GiB."""
    return size > (0.25 * facts.memory if facts.memory else 2 * GIB)


@heuristic(
    "Gradient checkpointing: less memory for some time",
    when="What is kept for backward takes more than a quarter of the device (or 2 GiB), and checkpointing is off.",
    do="`gradient_checkpointing = true` in `[training]`, or `model.gradient_checkpointing_enable()`.",
    effect="On a CPU: {less:.0%} less at the peak, {longer:.0%} more time a step",
    also=(
        cited(
            "On a GPU: {checkpointed:.1f} GB and {slow:.0f} ms a step in place of {plain:.1f} GB and {quick:.0f} ms",
            "training-step.json",
            plain=("rows", {"what": "r16", "who": "graftlet"}, "GB"),
            quick=("rows", {"what": "r16", "who": "graftlet"}, "ms"),
            checkpointed=("rows", {"what": "r16 checkpointing", "who": "graftlet"}, "GB"),
            slow=("rows", {"what": "r16 checkpointing", "who": "graftlet"}, "ms"),
        ),
    ),
    links=("cuda-training", "fine-tune", "checkpointing-and-frozen-inputs", "accumulate-small-batches"),
    evidence=("graftlet.model.prepare:prepare_model_for_kbit_training", "graftlet.train.trainer:training_arguments"),
)
def gradient_checkpointing(facts: Facts) -> bool:
    """Each block's input is kept and the block run again in the backward pass, in place of keeping all that is inside it."""
    return facts.trains and not facts.checkpointing and _tight(facts, facts.activations)


@heuristic(
    "Re-entrant checkpointing gives no gradient to adapters below a frozen embedding",
    when="Checkpointing with `use_reentrant=True`.",
    do="`use_reentrant=False`, which is what is taken unless told otherwise; or `model.enable_input_require_grads()`.",
    effect="torch's re-entrant checkpoint on frozen inputs: {bare} of {bare_tensors} adapter tensors got a "
    "gradient. A model prepared "
    "by Graftlet: {graftlet} of {tensors} with re-entrance, {plain} without",
    links=("qlora", "fine-tune"),
    evidence=("graftlet.model.prepare:prepare_model_for_kbit_training",),
)
def checkpointing_and_frozen_inputs(facts: Facts) -> bool:
    """The older way of checkpointing looks at its inputs alone to decide whether there is anything to learn inside. Below the
    first adapter all is frozen, so it decides that there is not."""
    return facts.trains and facts.checkpointing and facts.reentrant


@heuristic(
    "Accumulate smaller batches",
    when="What is kept for backward takes more than a quarter of the device (or 2 GiB), at a batch above 1.",
    do="Halve `batch_size` and double `accumulation`: the step is the same, but for the shape of the filling.",
    effect="A step of 8 rows as 4 batches of 2 takes {less:.0%} less at the peak, and {longer:.0%} more time",
    links=("fine-tune", "gradient-checkpointing"),
    evidence=("graftlet.train.recipe:TrainingTable.accumulation",),
    told=False,
)
def accumulate_small_batches(facts: Facts) -> bool:
    """Activations grow with the batch; weights, gradients and optimiser do not."""
    return facts.trains and facts.batch > 1 and _tight(facts, facts.activations)


@heuristic(
    "The logits of a large vocabulary",
    when="Logits and their gradient take more than a quarter of the device (or 2 GiB).",
    do="`optimize_model(model)`: head and loss a part at a time. `graftlet train` leaves out the logits before the "
    "first answer by itself.",
    effect="Of a training step's peak {share:.0%} went, where logits were made of the last tenth of each row alone "
    "(vocabulary 32,000, width 64)",
    also=(
        cited(
            "On a GPU, with all fused operations: {fused:.1f} GB in place of {plain:.1f} GB",
            "training-step.json",
            plain=("rows", {"what": "r16", "who": "graftlet"}, "GB"),
            fused=("rows", {"what": "r16 optimised", "who": "graftlet"}, "GB"),
        ),
    ),
    links=("cuda-training", "fused-operations"),
    evidence=("graftlet.kernels.head_loss:HeadLoss", "graftlet.train.batches:takes_ends"),
)
def logits_of_a_large_vocabulary(facts: Facts) -> bool:
    """A row of logits is as long as the vocabulary, in single precision, and its gradient again. That may be more than all
    blocks together."""
    return facts.trains and _tight(facts, facts.logits)


@heuristic(
    "Kernels that are switched off",
    when="`GRAFTLET_KERNELS=0` is set, and the method is LoRA or made of it.",
    do="Unset it, unless second derivatives are needed.",
    effect="Without them the peak of a LoRA step on a bfloat16 base is {more:.0%} higher; a step in float32 takes {slower:.2f} "
    "times as long",
    links=("cpu", "cuda-training", "Delta"),
    evidence=("graftlet.core.kernel:kernels", "graftlet.kernels.lowrank:forward"),
)
def kernels_off(facts: Facts) -> bool:
    """The plain way keeps each layer's input in single precision and outputs of full width for backward."""
    return facts.trains and facts.method in ("LORA", "ADALORA") and not facts.kernels


@heuristic(
    "Dropout and what it keeps",
    when="A low-rank method with dropout, where Triton's kernel cannot hold it as bits: not on CUDA.",
    do="Leave dropout out unless the data is small; on CUDA it costs little, and on a CPU little time with `optimize_model`.",
    effect="On a CPU dropout of 0.05 puts the peak up by {more:.0%}",
    also=(
        cited(
            "On a GPU, as a bit an entry: {with_ms:.0f} ms and {with_GB:.1f} GB in place of {ms:.0f} ms and {GB:.1f} GB",
            "training-step.json",
            ms=("rows", {"what": "r16", "who": "graftlet"}, "ms"),
            GB=("rows", {"what": "r16", "who": "graftlet"}, "GB"),
            with_ms=("rows", {"what": "r16 dropout 0.05", "who": "graftlet"}, "ms"),
            with_GB=("rows", {"what": "r16 dropout 0.05", "who": "graftlet"}, "GB"),
        ),
    ),
    links=("cuda-training", "cpu", "Delta"),
    evidence=("graftlet.kernels.lowrank:dropping",),
)
def dropout_and_kernels(facts: Facts) -> bool:
    """Each layer drops other entries of its input, so each keeps an input of its own."""
    return facts.trains and bool(facts.config.get("lora_dropout")) and facts.device != "cuda"


@heuristic(
    "Fused operations of the base model",
    when="Training on CUDA without liger-kernel.",
    do="`pip install liger-kernel`, and `optimize_model(model)`.",
    also=(
        cited(
            "A LoRA step: {fused:.0f} ms and {fused_GB:.1f} GB in place of {plain:.0f} ms and {plain_GB:.1f} GB",
            "training-step.json",
            plain=("rows", {"what": "r16", "who": "graftlet"}, "ms"),
            plain_GB=("rows", {"what": "r16", "who": "graftlet"}, "GB"),
            fused=("rows", {"what": "r16 optimised", "who": "graftlet"}, "ms"),
            fused_GB=("rows", {"what": "r16 optimised", "who": "graftlet"}, "GB"),
        ),
    ),
    links=("cuda-training",),
    evidence=("graftlet.model.optimised:optimize_model", "graftlet.model.optimised:unavailable"),
)
def fused_operations(facts: Facts) -> bool:
    """Norms, rotations, gates and the loss read and write the memory several times where once is enough."""
    return facts.trains and facts.device == "cuda" and not facts.liger


@heuristic(
    "Adapters in half precision lose small steps",
    when="`autocast_adapter_dtype=False`, or an adapter whose own dtype is bfloat16 or float16, in training.",
    do="Leave adapters in float32: they are small, and computing is in half precision all the same.",
    effect="In bfloat16 {lost:.0%} of the changes of A in a step at 1e-4 were rounded away; after {steps} steps the loss was "
    "{half:.3f}, in float32 {single:.3f}",
    also=(
        cited(
            "What it would gain on a GPU: {half_GB:.1f} GB in place of {GB:.1f} GB",
            "training-step.json",
            GB=("rows", {"what": "r16", "who": "graftlet"}, "GB"),
            half_GB=("rows", {"what": "r16 bf16 adapters", "who": "graftlet"}, "GB"),
        ),
    ),
    links=("fine-tune",),
    evidence=("graftlet.model.mapping:get_peft_model",),
)
def adapters_in_half_precision(facts: Facts) -> bool:
    """A bfloat16 has eight bits of precision. A step that is less than a 256th of a number leaves it as it was."""
    return (
        facts.trains and facts.config.get("autocast_adapter_dtype") is False and facts.dtype in ("bfloat16", "float16")
    )


@heuristic(
    "bfloat16 on a CPU without the instructions for it",
    when="A model in bfloat16 on a CPU that does not compute in it.",
    do='`dtype = "auto"` or `"float32"` in `[model]`.',
    effect="A product of 512 x 512 matrices took {slower:.1f} times as long in bfloat16 (with the instructions: "
    "{instructions})",
    links=("cpu", "fine-tune"),
    evidence=("graftlet.train.base:pick_dtype", "graftlet.train.base:computes_in_bfloat16"),
)
def bfloat16_on_cpu(facts: Facts) -> bool:
    """Each number is widened before it is used, and rounded after."""
    return facts.device == "cpu" and facts.dtype == "bfloat16" and not facts.half


@heuristic(
    "Freezing A saves next to no memory",
    when="LoRA on a CPU or with the plain way, where what is kept takes more than a quarter of the device (or 2 GiB).",
    do="Checkpoint, or accumulate smaller batches. Take `lorafa` for what it learns, not for memory.",
    effect="{less:.2%} less at the peak of a step on a CPU, all linear layers adapted",
    also=(
        cited(
            "On a GPU with SmolLM2-135M: {fa:,} bytes at the peak, LoRA {lora:,}; validation loss {fa_loss:.3f}, "
            "LoRA {lora_loss:.3f}",
            "lora-variants.json",
            fa=("runs", {"row": "lorafa", "rate": 0.003}, "peak_memory"),
            lora=("runs", {"row": "lora", "rate": 0.001}, "peak_memory"),
            fa_loss=("runs", {"row": "lorafa", "rate": 0.003}, "validation_loss"),
            lora_loss=("runs", {"row": "lora", "rate": 0.001}, "validation_loss"),
        ),
    ),
    links=("gradient-checkpointing", "Delta"),
    evidence=("graftlet.train.optimisers.lorafa:create_lorafa_optimizer",),
    told=False,
)
def frozen_a_keeps_less(facts: Facts) -> bool:
    """LoRA-FA was made to keep less for backward: without A's gradient no layer's input is needed for it. But the input of a
    layer is mostly kept all the same, by the operation that made it; and the quick way of LoRA keeps it once for all layers."""
    return facts.trains and facts.method == "LORA" and facts.optimizer != "lorafa" and _tight(facts, facts.activations)


PAGES = collected(globals())
