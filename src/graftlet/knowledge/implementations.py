# SPDX-License-Identifier: Apache-2.0
"""Implementations: the pages of the code, whose text is its docstrings."""

from __future__ import annotations

from .page import Implementation

PAGES = (
    Implementation(
        name="config",
        title="Configs and the registry",
        text="What an adapter is asked to be, and which methods there are.",
        modules=("graftlet.config", "graftlet.registry", "graftlet.requirements"),
    ),
    Implementation(
        name="errors",
        title="Errors and warnings",
        text="The classes, and how warnings are silenced.",
        modules=("graftlet.errors",),
    ),
    Implementation(
        name="files",
        title="Files",
        text="Reading what comes from strangers, and saving so that there is the old or the new.",
        modules=("graftlet.files", "graftlet.tensorfile", "graftlet.pair", "graftlet.verify", "graftlet.limits"),
    ),
    Implementation(
        name="weights",
        title="Layers and how weights are kept",
        text="Sites and storages.",
        modules=("graftlet.weights",),
    ),
    Implementation(
        name="core",
        title="The core",
        text="Methods as such, the adapted layer, injection, state, combination, merging.",
        modules=("graftlet.core",),
        links=("Delta", "InputMap", "OutputMap", "Rewrite", "Routed", "Replace", "Prompt", "Cache", "Block"),
    ),
    Implementation(
        name="methods",
        title="Methods",
        text="One file a method, opening with its formula.",
        modules=("graftlet.methods",),
        links=("Delta", "InputMap", "OutputMap", "Rewrite", "Routed", "Replace", "Prompt", "Cache", "Block"),
    ),
    Implementation(name="kernels", title="Kernels", text="Faster equal ways.", modules=("graftlet.kernels",)),
    Implementation(
        name="model",
        title="Models",
        text="`PeftModel`, the task classes, loading and saving, prompts.",
        modules=("graftlet.model", "graftlet.helpers"),
    ),
    Implementation(
        name="train",
        title="Training",
        text="Recipes, data, the loop, optimisers.",
        modules=("graftlet.train", "graftlet.optimizers"),
    ),
    Implementation(
        name="serving-code",
        title="Serving",
        text="Hotswap, the cache and the pool, conversion to LoRA.",
        modules=("graftlet.serve",),
    ),
    Implementation(
        name="testing",
        title="Testing a method",
        text="The laws, as functions.",
        modules=("graftlet.testing",),
    ),
    Implementation(
        name="integrations",
        title="Integrations",
        text="What other libraries' ways ask for.",
        modules=("graftlet.integrations",),
    ),
    Implementation(
        name="knowledge",
        title="Knowledge",
        text="Pages as data, what they are checked by, and what is foretold.",
        modules=("graftlet.knowledge",),
        links=("cpu", "errors"),
    ),
)
