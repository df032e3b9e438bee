# SPDX-License-Identifier: Apache-2.0
"""Several adapters: mixed, combined, merged, swapped; prompts and positions."""

from __future__ import annotations

from ..facts import Facts
from . import cited, collected, heuristic


@heuristic(
    "DoRA in mixed batches",
    when="DoRA, and several adapters served over one base.",
    do="Use `adapter_names` as with any method. Where its cost matters, convert to LoRA (`save_as_lora`) or merge.",
    effect="A batch of 8 rows with 4 adapters: {dora:.1f} ms with DoRA, {lora:.1f} ms with LoRA, "
    "{dora_to_lora:.1f} times as long. "
    "The reference raises {reference}",
    links=("serve", "serving", "Delta", "adapter-names-a-batch"),
    evidence=("graftlet.methods.variants.dora:DoRA", "graftlet.core.group:Group"),
)
def dora_in_mixed_batches(facts: Facts) -> bool:
    """DoRA scales each output by a norm of the changed weight, which is another one for each adapter. Each row gets its own, so
    a row is as if its adapter were alone."""
    return facts.serves > 1 and bool(facts.config.get("use_dora"))


@heuristic(
    "One mixed batch in place of one call an adapter",
    when="More than one adapter served over one base.",
    do="`model(..., adapter_names=[...])`, one name a row; `AdapterPool` for more adapters than fit.",
    also=(
        cited(
            "On a CPU, 32 rows with 32 adapters: {many:.0f} ms; with one adapter: {one:.0f} ms",
            "many-adapters-2026-11-26.json",
            many=("rows", {"what": "a batch of 32 rows, 32 adapters"}, "graftlet"),
            one=("rows", {"what": "a batch of 32 rows, 1 adapters"}, "graftlet"),
        ),
    ),
    links=("serve", "serving", "call-invalid"),
    evidence=("graftlet.core.group:Group", "graftlet.serve.cache:AdapterPool"),
    told=False,
)
def adapter_names_a_batch(facts: Facts) -> bool:
    """The base's products are the same for all rows. Called once for each adapter they are done as often, on few rows each."""
    return facts.serves > 1 and not facts.prompt


@heuristic(
    "Safe merging, and adapters that are not finite",
    when="A merge.",
    do="Leave `safe_merge` as it is, on. A file with NaN or infinity is refused as it is loaded.",
    effect="A merge that looks at what it has made takes {slower:.2f} times as long as one that does not; an "
    "adapter with one NaN was "
    "{outcome}, and {changed} weights were changed",
    links=("merge", "merge-refused", "adapter-file"),
    evidence=("graftlet.core.merging:write", "graftlet.core.state:check_finite"),
    told=False,
)
def safe_merge(facts: Facts) -> bool:
    """One number that is not finite in an adapter makes every output of the merged model so, and the weights that were there
    are gone."""
    return facts.merges


@heuristic(
    "Exact merging costs time",
    when="Merging into an ordinary base that goes on being used, in half precision or in single.",
    do="Merge once and serve; for a choice a call, `model.using(...)` leaves the weights alone.",
    also=(
        cited(
            "28 layers of 512 in float32: merging {merge:.0f} ms, unmerging {unmerge:.0f} ms (the reference: {theirs:.0f} and "
            "{theirs_un:.0f} ms, and after 8 cycles a tenth of the weights is not what it was)",
            "many-adapters-2026-11-26.json",
            merge=("rows", {"what": "merge_adapter, float32, 28 layers of 512"}, "graftlet"),
            unmerge=("rows", {"what": "unmerge_adapter, float32"}, "graftlet"),
            theirs=("rows", {"what": "merge_adapter, float32, 28 layers of 512"}, "reference"),
            theirs_un=("rows", {"what": "unmerge_adapter, float32"}, "reference"),
        ),
    ),
    links=("merge", "merge-undone"),
    evidence=("graftlet.core.merging:Kept", "graftlet.weights.residual:Residual"),
    told=False,
)
def exact_merging_takes_time(facts: Facts) -> bool:
    """Adding and subtracting does not bring a weight's bits back. What rounding took is found and kept, seven bits
    an element."""
    return facts.merges and facts.quantised is None


@heuristic(
    "Merged is quickest to serve, where there is one adapter",
    when="One adapter served over one base that is not quantised.",
    do="`merge_and_unload()`, or `graftlet merge` on disk.",
    effect="A call of 8 rows of 32 tokens on a CPU: {beside:.1f} ms with the adapter beside the weights, "
    "{merged:.1f} ms merged",
    also=(
        cited(
            "On a GPU, 32 rows of one token: {beside:.3f} s beside, {alone:.3f} s for the base alone, which a merged one is",
            "serving.json",
            beside=("rows", {"what": "32 rows of 1, one active", "who": "graftlet"}, "s"),
            alone=("rows", {"what": "32 rows of 1, base", "who": "graftlet"}, "s"),
        ),
    ),
    links=("merge", "serve", "serving"),
    evidence=("graftlet.model.many:ManyAdapters.merge_and_unload",),
    told=False,
)
def merged_to_serve(facts: Facts) -> bool:
    """An adapter beside the weights is two more products a layer, small ones, which few tokens cannot hide."""
    return facts.serves == 1 and facts.quantised is None


@heuristic(
    "`linear` is not the sum of the adapters",
    when="`add_weighted_adapter` with `linear`, or another kind that combines A and B each for itself.",
    do='`combination_type="exact"`, `"svd"` or `"cat"`.',
    effect="Of two adapters with weights 0.7 and 0.3, `linear` is off from the sum of their changes by "
    "{linear:.0%} of it, `exact` by "
    "{exact:.0e}",
    links=("serve", "Delta"),
    evidence=("graftlet.core.combine:Combination", "graftlet.core.arithmetic:apart"),
)
def linear_is_no_sum(facts: Facts) -> bool:
    """(a A1 + b A2) times (a B1 + b B2) has the two products that are meant, and two that are not: A1 with B2, A2 with B1."""
    return facts.combines in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


@heuristic(
    "Prepare for swaps before compiling",
    when="A compiled model whose adapter is swapped in place.",
    do="`prepare_model_for_compiled_hotswap(model, target_rank=...)`, then `torch.compile`.",
    effect="A swap to another rank and scaling: {prepared} graphs compiled anew when prepared, {unprepared} when not",
    links=("hotswap", "compile-again", "serving"),
    evidence=("graftlet.serve.hotswap:prepare_model_for_compiled_hotswap",),
)
def hotswap_before_compile(facts: Facts) -> bool:
    """A compiled graph holds shapes and Python numbers fast. Another rank or scaling is another graph."""
    return facts.compiles and facts.swaps


@heuristic(
    "Position ids with prompt methods",
    when="A prompt method.",
    do="Give position ids of the text alone, or none: they are shifted behind the prompt.",
    effect="Given from 0 on, and not given: logits differ by {given:.0e}. Where they were shifted by two more, "
    "by {shifted:.2f}: they "
    "are looked at",
    links=("fine-tune", "Prompt", "Cache", "call-ignored"),
    evidence=("graftlet.model.prompted:tell", "graftlet.model.prompted:grown_input"),
    told=False,
)
def position_ids_with_prompts(facts: Facts) -> bool:
    """A prompt of twenty tokens stands before the text, so the text's first token is at twenty. Position ids that
    count the text
    alone would put both at the same places, or have to be dropped."""
    return facts.prompt


PAGES = collected(globals())
