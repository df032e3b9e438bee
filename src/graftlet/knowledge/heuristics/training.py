# SPDX-License-Identifier: Apache-2.0
"""Learning rates, ranks, targets, tokens: what decides whether a run learns."""

from __future__ import annotations

from ..facts import Facts
from . import cited, collected, heuristic

LOW_RANK = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "RANDLORA", "GRALORA", "MISS", "DELORA")


@heuristic(
    "LoRA wants a higher learning rate than full fine-tuning",
    when="A low-rank method, and a learning rate below 5e-5.",
    do="Begin with 2e-4 to 1e-3 for LoRA, and try three times as much before anything else.",
    effect="The best of nine rates was {full_best:.0e} for all weights and {lora_best:.0e} for LoRA of rank 8: "
    "{ratio:.1f} times",
    also=(
        cited(
            "SmolLM2-135M with LoRA of rank 8, validation loss: {low:.2f} at 3e-4, {high:.2f} at 1e-3",
            "lora-variants.json",
            low=("runs", {"row": "lora", "rate": 0.0003}, "validation_loss"),
            high=("runs", {"row": "lora", "rate": 0.001}, "validation_loss"),
        ),
    ),
    links=("fine-tune", "Delta", "rslora-for-high-ranks"),
    evidence=("graftlet.methods.lora:LoRA", "graftlet.train.recipe:TrainingTable.learning_rate"),
)
def learning_rate_of_lora(facts: Facts) -> bool:
    """B starts at zero and the product of two small factors moves little at first. A rate that is right for the weights
    themselves leaves the adapter near its start. Ten times is a common rule; here it was less."""
    return facts.trains and facts.method in LOW_RANK and facts.rate < 5e-5


@heuristic(
    "High ranks want rsLoRA",
    when="LoRA with a rank of 32 or more, without `use_rslora`, and `lora_alpha` not above the rank.",
    do="`use_rslora=True`: the scale is alpha / sqrt(r), and a higher rank moves as much as a low one.",
    effect="From rank 4 to rank 128, with alpha 8, what the first step of Adam changes in the "
    "weights shrank to {plain:.0%} of what it was; with rsLoRA it was {rs:.0%}",
    links=("fine-tune", "Delta"),
    evidence=("graftlet.methods.lora_config:LoraConfig",),
)
def rslora_for_high_ranks(facts: Facts) -> bool:
    """LoRA's scale is alpha / r. With alpha fixed, what one step changes shrinks with the rank, so that a higher rank learns
    more slowly and is taken for useless."""
    high = facts.method == "LORA" and facts.rank >= 32 and not facts.config.get("use_rslora")
    return facts.trains and high and int(facts.config.get("lora_alpha") or 8) <= facts.rank


@heuristic(
    "Adapt all linear layers",
    when="A low-rank method whose targets are attention's projections alone, at a rank above 8.",
    do='`target_modules="all-linear"`, at a lower rank for the same number of parameters.',
    effect="The loss after {steps} steps was {narrow:.2f} with {narrow_numbers:,} trained numbers on the attention's q and v, "
    "and {wide:.2f} with {wide_numbers:,} on all linear layers",
    links=("fine-tune", "Delta"),
    evidence=("graftlet.core.target:matches",),
)
def target_all_linear(facts: Facts) -> bool:
    """The feed-forward layers hold most of a block's weights. Rank spent on two projections of attention reaches less than
    the same rank spread over all."""
    targets = facts.config.get("target_modules")
    narrow = isinstance(targets, (list, tuple, set)) and set(targets) <= {
        "q_proj",
        "k_proj",
        "v_proj",
        "query",
        "value",
    }
    return facts.trains and facts.method in LOW_RANK and narrow and facts.rank > 8


@heuristic(
    "Prompts want learning rates a hundred times as large",
    when="A prompt method, and a learning rate below 5e-3.",
    do="Begin with 0.01 to 0.1, with some warm-up.",
    also=(
        cited(
            "Prompt tuning's validation loss: {low:.2f} at 0.01, {high:.2f} at 0.1",
            "methods.json",
            low=("runs", {"row": "prompt_tuning", "rate": 0.01}, "validation_loss"),
            high=("runs", {"row": "prompt_tuning", "rate": 0.1}, "validation_loss"),
        ),
    ),
    links=("fine-tune", "Prompt", "Cache"),
    evidence=("graftlet.methods.prompts.prompt_tuning:PromptTuningConfig",),
)
def learning_rate_of_prompts(facts: Facts) -> bool:
    """A prompt is a handful of vectors as large as embeddings, and the gradient reaches them through the whole model."""
    return facts.trains and facts.prompt and facts.rate < 5e-3


@heuristic(
    "Methods with few numbers want high learning rates",
    when="VeRA, IA3, RoAd, LN tuning, VB-LoRA, FourierFT, C3A, WaveFT, Uni-LoRA or TinyLoRA, and a rate below 3e-3.",
    do="Begin at 0.01: ten times LoRA's.",
    also=(
        cited(
            "VeRA's validation loss: {low:.2f} at 0.01, {high:.2f} at 0.03",
            "methods.json",
            low=("runs", {"row": "vera", "rate": 0.01}, "validation_loss"),
            high=("runs", {"row": "vera", "rate": 0.03}, "validation_loss"),
        ),
        cited(
            "RoAd's: {low:.2f} at 0.003, {high:.2f} at 0.01",
            "methods.json",
            low=("runs", {"row": "road", "rate": 0.003}, "validation_loss"),
            high=("runs", {"row": "road", "rate": 0.01}, "validation_loss"),
        ),
    ),
    links=("fine-tune", "OutputMap", "Delta"),
    evidence=("graftlet.methods.vera:VeRA", "graftlet.methods.road:RoadConfig"),
)
def learning_rate_of_small_methods(facts: Facts) -> bool:
    """Each number stands for a whole row or more, and has to move far."""
    small = ("VERA", "IA3", "ROAD", "LN_TUNING", "VBLORA", "FOURIERFT", "C3A", "WAVEFT", "UNILORA", "TINYLORA")
    return facts.trains and facts.method in small and facts.rate < 3e-3


@heuristic(
    "LoRA+ learns faster at a lower rate",
    when="LoRA trained with one rate for both factors, at 5e-4 or less.",
    do='`optimizer = "loraplus"` with a rate a third of that for LoRA: B learns sixteen times as fast as A.',
    also=(
        cited(
            "Validation loss after 40 steps, each at the best of its rates: {plus:.3f} at 3e-4 (LoRA+), "
            "{plain:.3f} at 1e-3 (AdamW)",
            "lora-variants.json",
            plus=("runs", {"row": "loraplus", "rate": 0.0003}, "validation_loss"),
            plain=("runs", {"row": "lora", "rate": 0.001}, "validation_loss"),
        ),
    ),
    links=("fine-tune", "Delta"),
    evidence=("graftlet.train.optimisers.loraplus:create_loraplus_optimizer",),
    told=False,
)
def two_rates_for_lora(facts: Facts) -> bool:
    """A is as large as the layer's input, B starts at zero. One rate for both is too high for one or too low for the other."""
    return facts.trains and facts.method == "LORA" and facts.optimizer.startswith("adamw") and facts.rate <= 5e-4


@heuristic(
    "A padding token that is the end token",
    when="The tokenizer's padding token is its end token.",
    do="Mask by place, as `graftlet train` does; a collator that masks by the token's number teaches no end. Or add a token.",
    effect="Of {ends} end tokens in the answers, Graftlet's collator teaches {kept}, one that masks the "
    "padding's number {lost}",
    links=("fine-tune",),
    evidence=("graftlet.train.batches:Collator", "graftlet.train.base:load_tokenizer"),
    told=False,
)
def padding_as_end(facts: Facts) -> bool:
    """Many base models have no padding token, and take the end token for it. Where labels are masked wherever that token
    stands, the model is never taught to stop."""
    return facts.trains and facts.pad_is_end


@heuristic(
    "Packed rows without an attention that keeps examples apart",
    when="Packing, with an attention that is told of examples by position ids alone and does not look at them.",
    do='`attention = "sdpa"` or `"flash_attention_2"`; `graftlet train` tries on its first batch, and refuses where '
    "examples see each other.",
    effect="The second of two packed examples: its logits moved by {mixed:.2f} where attention ran over the row, by "
    "{apart:.0e} with position ids that start anew",
    links=("fine-tune", "config-invalid"),
    evidence=("graftlet.train.batches:check_isolation", "graftlet.train.batches:pack"),
)
def packing_without_isolation(facts: Facts) -> bool:
    """In a packed row the tokens of one example stand before those of the next. An attention that masks only what comes
    later lets the next one read them."""
    return facts.trains and facts.packing and facts.attention == "eager"


@heuristic(
    "The head of a classifier learns only where it is named",
    when="A model with a classifier's head, an adapter without `task_type` and without `modules_to_save`.",
    do='`task_type="SEQ_CLS"`, `"TOKEN_CLS"` or `"QUESTION_ANS"`.',
    effect="The loss of four classes after {steps} steps: {frozen:.2f} with the head frozen at random, "
    "{trained:.2f} with it trained "
    "(chance is {chance:.2f})",
    links=("fine-tune", "head-frozen", "Replace"),
    evidence=("graftlet.model.mapping:get_peft_model", "graftlet.core.target:HEADS_OF"),
)
def head_trained(facts: Facts) -> bool:
    """A new head is random. An adapter on the layers below can turn features only so far towards it, and it is not saved."""
    architectures = " ".join(facts.model.get("architectures") or ())
    headed = any(word in architectures for word in ("ForSequenceClassification", "ForTokenClassification"))
    named = facts.config.get("task_type") or facts.config.get("modules_to_save")
    return facts.trains and headed and not named


PAGES = collected(globals())
