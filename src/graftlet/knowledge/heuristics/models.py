# SPDX-License-Identifier: Apache-2.0
"""What a base model brings along: tied weights, resized vocabularies, experts, quantised layers, starts that change it."""

from __future__ import annotations

from ...requirements import at_least
from ..facts import Facts
from . import cited, collected, heuristic

CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
PROJECTIONS = {"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


@heuristic(
    "Merging into quantised weights rounds",
    when="A quantised base, and a merge.",
    do="`merge_and_unload(dequantize=True)`, which makes a dense model; or keep the adapter beside the base. "
    "`merge_errors(model)` "
    "tells what was lost, layer by layer.",
    effect="NF4, on a CPU: the merged weight is off by {of_weight:.0%} of itself, which is {of_change:.0%} of what the adapter "
    "changes; with `dequantize=True` by {dequantised:.0e}",
    also=(
        cited(
            "On a GPU, the worst layer: {of_weight:.0%} and {of_change:.0%}; logits off by {packed:.0%}, "
            "dequantised by {dense:.0%}",
            "quantised-gpu.json",
            of_weight=("correctness", "merging", "worst layer, share of its weight"),
            of_change=("correctness", "merging", "of the adapter's change"),
            packed=("correctness", "merging", "logits off, merged in 4 bits"),
            dense=("correctness", "merging", "logits off, merged dequantised"),
        ),
    ),
    links=("merge", "qlora", "quantised-training", "merge-rounded", "merge-refused"),
    evidence=("graftlet.weights.rounding:Rounding", "graftlet.core.dense:dequantised"),
)
def merge_into_quantised(facts: Facts) -> bool:
    """Sixteen levels an element cannot hold a sum that is finer than they are. An adapter's change is often smaller than half
    the gap between two of them, so that rounding takes most of it away."""
    return facts.quantised is not None and facts.merges


@heuristic(
    "The defensive copy of a quantised layer's output",
    when="A quantised base, in training.",
    do="Nothing: the update is added to a tensor that is made for it, so no copy is needed. Code of your own that changes a "
    "layer's output in place should copy first where the output is kept for backward.",
    effect="With the copy and without, gradients differ by {difference:.0e}; the copy takes {bytes:,} bytes for an output of "
    "{output:,}",
    links=("qlora", "quantised-training"),
    evidence=("graftlet.core.layer:AdaptedLayer", "graftlet.weights.bnb:FourBit"),
    told=False,
)
def clone_of_quantised_output(facts: Facts) -> bool:
    """Adding in place to what a custom step of autograd returns was refused, or gave wrong gradients, in some versions of
    bitsandbytes and torch; hence a copy that is made at every layer and every step elsewhere."""
    return facts.trains and facts.quantised in ("nf4", "fp4")


@heuristic(
    "Embeddings are saved where the vocabulary was resized",
    when="The vocabulary was resized, or an embedding is among the targets.",
    do="Leave `save_embedding_layers` at `auto`; or train only the new rows with `TrainableTokensConfig`.",
    effect="A file of {without:,} bytes becomes one of {along:,}; without them, the logits of an input with new "
    "tokens are off by "
    "{difference:.0%} after loading",
    links=("fine-tune", "embedding-saved", "vocabulary-differs", "Rewrite"),
    evidence=("graftlet.model.embeddings:to_save", "graftlet.methods.trainable_tokens:TrainableTokensConfig"),
)
def embeddings_saved(facts: Facts) -> bool:
    """New tokens have new rows, which nobody else's base has. They are part of what was made, trained or not."""
    targets = facts.config.get("target_modules")
    named = isinstance(targets, (list, tuple, set)) and bool({"embed_tokens", "lm_head", "wte"} & set(targets))
    return facts.resized or named


@heuristic(
    "Tied embeddings part when one is merged into",
    when="The input and the output embedding share a weight, and one of them is among the targets.",
    do="`ensure_weight_tying=True` adapts both alike. Or accept a model that is larger by one embedding.",
    effect="Merging an adapter on the head alone made the model {grown:.0%} larger (vocabulary 2,000, width 64); "
    "with both adapted "
    "alike {together:.0%}",
    links=("merge", "tied-weights", "tie-parted", "fine-tune"),
    evidence=("graftlet.core.ties:check", "graftlet.core.ties:retie"),
)
def tied_embeddings(facts: Facts) -> bool:
    """One tensor cannot hold two different weights."""
    targets = facts.config.get("target_modules")
    named = isinstance(targets, (list, tuple, set)) and bool({"embed_tokens", "lm_head", "wte"} & set(targets))
    tied = facts.model.get("tie_word_embeddings", False)
    return named and bool(tied) and not facts.config.get("ensure_weight_tying")


@heuristic(
    "Experts are stacks from transformers 5 on",
    when="A mixture of experts under transformers 5, with `target_modules` that name an expert's projections.",
    do='`target_parameters = ["experts.gate_up_proj", "experts.down_proj"]` for new adapters. Older ones, with a pair '
    "an expert, are put on the stacks as they are loaded.",
    effect="An adapter of {tensors} tensors with a pair an expert, loaded on stacks: outputs differ by "
    "{difference:.0e} from those "
    "that its pairs add up to",
    links=("fine-tune", "adapter-file", "target-no-match"),
    evidence=("graftlet.model.fused:converted", "graftlet.weights.experts:Experts"),
)
def fused_experts(facts: Facts) -> bool:
    """The weights of a layer's experts became one tensor. A name such as `w1` is a module no more, and matches nothing."""
    targets = facts.config.get("target_modules")
    named = isinstance(targets, (list, tuple, set)) and bool(PROJECTIONS & {t.rpartition(".")[2] for t in targets})
    return facts.experts > 0 and at_least(facts.transformers, "5") and named


@heuristic(
    "Starts that change the base",
    when="`init_lora_weights` is PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ.",
    do="Save with `path_initial_model_for_weight_conversion` (`graftlet train` does), and have no other adapter on that base.",
    effect="With a PiSSA adapter disabled, what stands there is off from the base by {disabled:.0%} of its "
    "logits; once more on the "
    "untouched base, what was trained is off by {naive:.0e} (the start is made again as it is loaded), as plain "
    "LoRA by {converted:.0e}",
    links=("fine-tune", "start-not-neutral", "conversion-idle", "several-adapters-one-start"),
    evidence=("graftlet.methods.init.pissa:pissa", "graftlet.model.plain:as_plain", "graftlet.train.starts:initial_of"),
)
def start_changes_base(facts: Facts) -> bool:
    """These take a part out of the base's weights and put it into the adapter. What is left is not the base that anybody else
    has."""
    return _changes(facts)


@heuristic(
    "Adapters that change the base stand alone",
    when="Several adapters over one base, and a start that changes the base.",
    do="Convert each to plain LoRA as it is saved, then load those.",
    effect="A second, new adapter beside a PiSSA one gives logits that are off by {second:.0%} from the base "
    "that it should start at",
    links=("serve", "start-changes-base", "Delta"),
    evidence=("graftlet.model.plain:as_plain",),
)
def several_adapters_one_start(facts: Facts) -> bool:
    """The second adapter is added to what the first has left of the base."""
    return facts.serves > 1 and _changes(facts)


def _changes(facts: Facts) -> bool:
    return str(facts.config.get("init_lora_weights")).lower().startswith(CHANGING)


PAGES = collected(globals())
