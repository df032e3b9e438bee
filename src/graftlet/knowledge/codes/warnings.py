# SPDX-License-Identifier: Apache-2.0
"""The pages of warnings."""

from __future__ import annotations

from ... import errors
from . import code

PAGES = (
    code(
        errors.GraftletWarning,
        "Never given itself. A filter of `warnings` on it goes for all that Graftlet warns of. Each line is shown once.",
        "Read the code at the end of the line, and `graftlet explain` that.",
        evidence=("graftlet.errors:warn", "graftlet.errors:silence"),
    ),
    code(
        errors.PeftWarning,
        "Never given itself: what all warnings about adapters have in common.",
        "Read the code at the end of the line, and `graftlet explain` that.",
    ),
    code(
        errors.UnknownFieldWarning,
        "`adapter_config.json` has fields that this version does not know: a newer writer, another tool, or a slip.",
        "Bring Graftlet up to date if the field matters; else take it out of the file. It is ignored, and not saved again.",
        "older-adapter-files",
        "files",
    ),
    code(
        errors.BaseMismatchWarning,
        "The model has another name than the base that the adapter was trained on, or its weights differ in a sample. The "
        "adapter's change is added all the same, to numbers that it was not made for.",
        "Load the base that the config names. If the model is that base under another name, silence the code. "
        "`verify_base=True` makes it an error.",
        "base-mismatch",
        "verify-the-base",
        "files",
        evidence=("graftlet.model.origin:check_base",),
    ),
    code(
        errors.VocabularyWarning,
        "Tokens were added before the adapter was trained, and the model at hand has not got them, or has others.",
        "Call `model.resize_token_embeddings` with the number that the message has, before the adapter is loaded, and give the "
        "new rows the embeddings that they had.",
        "embeddings-saved",
        evidence=("graftlet.model.embeddings:check_vocabulary",),
    ),
    code(
        errors.MixedFilesWarning,
        "The weights record which config they were saved with, and the one beside them is another: an interrupted copy, two "
        "saves mixed, or a config that a person has edited. The config at hand is used.",
        "Copy the folder again as a whole. After a deliberate edit, load and save once to bring them together.",
        "files",
        evidence=("graftlet.pair:check_pair",),
    ),
    code(
        errors.KeysWarning,
        "`strict=False`: tensors of the file have no place in the model, or the model's adapter has some that the file lacks, "
        "which keep their start.",
        "Load without `strict=False` to be told what is wrong as an error, with the nearest names.",
        "adapter-file",
        "files",
        evidence=("graftlet.model.save:load_verified",),
    ),
    code(
        errors.MergeWarning,
        "`merge_adapter` where every adapter named is merged, or `unmerge_adapter` where none is. Nothing was done.",
        "Look at `graftlet.get_model_status(model).merged_adapters` before.",
        "merge",
    ),
    code(
        errors.UnmergedWarning,
        "Adapters were merged while others are to act. A merged adapter would go on acting unseen, so it is taken out again.",
        "Unmerge, then set the adapter; or use `model.using(...)` for some calls.",
        "merge",
        evidence=("graftlet.core.host:AdapterHost.set_adapter",),
    ),
    code(
        errors.RoundingWarning,
        "Weights of few bits cannot hold just any merged weight. The line says how far off the worst layer is, "
        "as a share of its "
        "weight and of what the adapter changes.",
        "`merge_and_unload(dequantize=True)`, or keep the adapter beside the base. `merge_errors(model)` has every layer.",
        "merge-into-quantised",
        "qlora",
        "quantised-training",
        evidence=("graftlet.core.lifecycle:roundings", "graftlet.weights.rounding:Rounding"),
    ),
    code(
        errors.ConversionWarning,
        "A LoRA adapter is converted to LoRA, or a start that leaves the base as it was is undone.",
        "Leave the conversion out, unless its rank is to be cut.",
        "start-changes-base",
    ),
    code(
        errors.TieWarning,
        "An embedding and an output head share a weight, and only one of them is adapted. As long as the adapter stands beside "
        "them that works; merged, they become two weights.",
        "`ensure_weight_tying=True` adapts both alike. Or leave it: the merged model is larger by one embedding.",
        "tied-embeddings",
        "tie-parted",
        evidence=("graftlet.core.ties:check",),
    ),
    code(
        errors.TieIdleWarning,
        "`ensure_weight_tying=True` finds nothing to do: the model shares no weight, or none of the adapted "
        "layers has a part in it.",
        "Leave it out, or target the embedding.",
        "tied-embeddings",
    ),
    code(
        errors.PartedWarning,
        "A merge has changed the embedding or the head and not the other. They are two weights now, and the "
        "model's config says so, "
        "so that both are saved.",
        "Nothing, if that is meant. Else adapt both: `ensure_weight_tying=True`.",
        "tied-embeddings",
        "merge",
    ),
    code(
        errors.EmbeddingWarning,
        "The vocabulary is another than the base's, so the new rows would be lost if the embeddings were not saved along. That "
        "makes the file larger by both embeddings.",
        "`save_embedding_layers=True` or `False` says what you want, and nothing is said. `TrainableTokensConfig` trains and "
        "saves single rows.",
        "embeddings-saved",
        evidence=("graftlet.model.embeddings:to_save",),
    ),
    code(
        errors.EmbeddingMissingWarning,
        "`save_embedding_layers=True`, but neither `get_input_embeddings` nor `get_output_embeddings` gives a layer.",
        "Name the layer in `modules_to_save`, which saves any module.",
        "embeddings-saved",
    ),
    code(
        errors.StartWarning,
        "Most adapters begin as nothing: the model gives what the base gives. This one does not, by its settings.",
        "Take the setting that the line names, or leave it where the change is meant.",
        "start-changes-base",
    ),
    code(
        errors.HeadWarning,
        "A model for classification has a head that is new, and an adapter without a task type trains and saves "
        "adapters alone. "
        "The head stays random.",
        "`task_type='SEQ_CLS'` (or `TOKEN_CLS`, `QUESTION_ANS`), or the head's name in `modules_to_save`.",
        "head-trained",
        evidence=("graftlet.model.mapping:get_peft_model",),
    ),
    code(
        errors.HeadMissingWarning,
        "The task type trains the head along, by its usual names, and the model calls its head otherwise.",
        "Name it in `modules_to_save`.",
        "head-trained",
    ),
    code(
        errors.PatternWarning,
        "A name in `target_modules` that stands for no module, while others do; or a key of a pattern that "
        "stands for none of the "
        "adapted layers. What it was meant for is not adapted, or has the ordinary rank.",
        "Take the name that the line proposes, or leave it out.",
        "target-all-linear",
    ),
    code(
        errors.PatternOrderWarning,
        "Of several keys that match a layer the first counts. A longer key after a shorter one that matches all it would is "
        "never looked at.",
        "Put the longer key first.",
        "target-all-linear",
    ),
    code(
        errors.CardWarning,
        "`README.md` in the folder has front matter that is no YAML. The adapter was saved; the card was left as it is.",
        "Mend the lines between the two `---`.",
        evidence=("graftlet.model.card:write",),
    ),
    code(
        errors.CallWarning,
        "An argument was given that nothing looks at: with these other arguments, this method, or this version "
        "of transformers.",
        "Leave it out.",
    ),
    code(
        errors.ReachWarning,
        "An adapter that acts from an invocation on (aLoRA) finds it in `input_ids`. A call with `inputs_embeds` "
        "has none, and runs "
        "as the base.",
        "Call with `input_ids`.",
        evidence=("graftlet.model.reach:call",),
    ),
    code(
        errors.RecompileWarning,
        "`prepare_model_for_compiled_hotswap` turns scalings into tensors. A model that was compiled before was "
        "compiled for numbers.",
        "Prepare first, compile after.",
        "hotswap-before-compile",
        "hotswap",
        evidence=("graftlet.serve.hotswap:prepare_model_for_compiled_hotswap",),
    ),
)
