# SPDX-License-Identifier: Apache-2.0
"""The pages of errors."""

from __future__ import annotations

from ... import errors
from . import code

PAGES = (
    code(
        errors.GraftletError,
        "Never raised itself. `except GraftletError` catches whatever Graftlet raises on purpose.",
        "Read the code at the end of the message, and `graftlet explain` that.",
    ),
    code(
        errors.PeftError,
        "Never raised itself: what all errors about adapters have in common. They are `ValueError`s too.",
        "Read the code at the end of the message, and `graftlet explain` that.",
    ),
    code(
        errors.ConfigError,
        "A config, a recipe or an argument has a field that does not exist, a value of another type, one out of range, or "
        "two that do not go together. It is raised as the config is made, before a model is touched.",
        "The message names the field, what was given and what is allowed; in a recipe also the line. "
        "`graftlet methods --json` lists the fields of every method.",
        "fine-tune",
        "config",
        evidence=("graftlet.config:PeftConfig.check", "graftlet.train.recipe:load_recipe"),
    ),
    code(
        errors.UnknownMethodError,
        "`peft_type`, or a recipe's `adapter.method`, is no name in the registry: a slip, or a method that the file's writer "
        "has registered and this process has not.",
        "`graftlet methods` lists the names. For a method of your own, import its module before the adapter is loaded.",
        "config",
        evidence=("graftlet.registry:lookup",),
    ),
    code(
        errors.NoMatchingPeftModuleError,
        "`target_modules`, `modules_to_save` or `target_parameters` names nothing that the model has, so that no layer would "
        "be adapted. Names of a list match whole path parts at the end; a string is a pattern for the whole path.",
        "Take a name that the message proposes, print `[n for n, _ in model.named_modules()]`, or use "
        '`target_modules="all-linear"`.',
        "target-all-linear",
        "fine-tune",
        "core",
        evidence=("graftlet.core.target:matches",),
    ),
    code(
        errors.UnsupportedLayerError,
        "A target is a layer that the method's formula has no meaning for (a convolution for a method on matrices, a norm for "
        "LoRA), or whose weight cannot be read.",
        "Leave the layer out (`exclude_modules`), or take a method that works on it: the table of methods has a column.",
        "core",
        evidence=("graftlet.registry:Entry",),
    ),
    code(
        errors.UnsupportedOptionError,
        "An option that the format has and that cannot be carried out here, such as a variant on a kind of layer, or two "
        "variants at once.",
        "The message says which. Leave the option out, or the layers that it does not go with.",
        "config",
    ),
    code(
        errors.AdapterNameError,
        "An adapter's name is taken, is not among the model's adapters, or cannot be part of a key or a folder.",
        "`list(model.peft_config)` are the names there are. `load_adapter(..., adapter_name=...)` takes another.",
        "serve",
        "core",
    ),
    code(
        errors.AdapterFileError,
        "A file's header is damaged, or its tensors are not those that the model's adapter has: missing, "
        "unexpected, misshaped, "
        "of another kind, not finite; or its sums say that it was changed. The model is as it was.",
        "`graftlet verify DIR` says what a folder contains and whether it would load. `strict=False` leaves out what does not "
        "fit and says so. An adapter for a larger vocabulary needs `model.resize_token_embeddings` first.",
        "files",
        "adapter-keys",
        "serve",
        evidence=("graftlet.model.save:load_verified", "graftlet.tensorfile:read_header"),
    ),
    code(
        errors.BaseMismatchError,
        "The file records a sample of its base's weights, and those of the model differ; or it records none and "
        "`verify_base=True` asks for it.",
        "Load the base that the adapter's config names, in the revision that it names. Without `verify_base` "
        "this is a warning.",
        "base-differs",
        "verify-the-base",
        "files",
        evidence=("graftlet.model.origin:check_base", "graftlet.core.fingerprint:taken"),
    ),
    code(
        errors.BusyError,
        "One thread merges, loads, swaps or deletes while another is inside a call, or in another change.",
        "Let calls come to their end first. `AdapterPool` waits by itself; `model.using(...)` chooses adapters for a thread "
        "without changing the model.",
        "serve",
        "serving",
        evidence=("graftlet.core.traffic:Traffic",),
    ),
    code(
        errors.MergeError,
        "A merged weight would not be finite, does not fit into how a quantised layer is kept, has no place in its layer, or a "
        "base weight was changed since it was merged into. Every weight of the model is as it was before.",
        "For a quantised base: `merge_and_unload(dequantize=True)`. For a method that depends on the input: keep the adapter "
        "beside the base. For numbers that are not finite: look at the adapter with `graftlet inspect`.",
        "merge",
        "merge-into-quantised",
        "safe-merge",
        evidence=("graftlet.core.merging:write", "graftlet.core.lifecycle:merge"),
    ),
    code(
        errors.ConversionError,
        "An adapter whose change of the weights depends on the input, or is no change of weights at all, has no LoRA form.",
        "Keep the adapter as it is, and serve it with Graftlet.",
        "serve",
        evidence=("graftlet.serve.convert:convert_to_lora",),
    ),
    code(
        errors.CallError,
        "A call's arguments do not go together: as many `adapter_names` as rows, task ids for a method that has tasks, a cache "
        "that fits a prompt; or a command's options.",
        "The message says what was given and what is needed.",
        "adapter-names-a-batch",
        evidence=("graftlet.core.context:Call",),
    ),
    code(
        errors.AutoClassError,
        "`AutoPeftModel` and its like know by the adapter which base to load, and make a model of another class.",
        "`AutoPeftModelForCausalLM.from_pretrained(adapter)`, or `get_peft_model(model, config)` for a new adapter.",
        "fine-tune",
        evidence=("graftlet.model.auto:AutoPeftModel",),
    ),
    code(
        errors.DependencyError,
        "A feature was used whose package is missing, too old, too new or half installed. Nobody else is troubled by it.",
        "Run the command at the end of the message; `graftlet doctor` lists all features, and what each lacks.",
        "quantised-training",
        "cpu",
        evidence=("graftlet.requirements:Requirement.check",),
    ),
    code(
        errors.TrainingInterrupted,
        "Ctrl-C, or a signal to end, reached a run of `graftlet train`. It ended after a whole step, whose "
        "checkpoint is saved.",
        "Run the same command with `resume=true`. The command's exit status is 130.",
        "fine-tune",
        evidence=("graftlet.train.callbacks:StopOnSignal",),
    ),
)
