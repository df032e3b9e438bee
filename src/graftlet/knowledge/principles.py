# SPDX-License-Identifier: Apache-2.0
"""Principles: the families of methods. What a family has in common is said here, its members come from the registry."""

from __future__ import annotations

from .page import Page, Principle

_FAMILIES = {
    "Delta": (
        "Methods that add to a weight",
        "`y = W x + dW x`. A method gives `dW`, and where it can a cheaper way to `dW x`; the weight itself is never read. "
        "Several adapters add up, each at the original weight.",
    ),
    "InputMap": (
        "Methods that map the input",
        "`y = W (M x)`, so `W' = W M`. The weight is not read in training. Several adapters are applied one after another.",
    ),
    "OutputMap": (
        "Methods that map the output",
        "`y = M (W x + b)`, so `W' = M W`, `b' = M b`. The weight is not read. Several adapters are applied one after another.",
    ),
    "Rewrite": (
        "Methods that make a new weight",
        "`y = op(x, W', b')` with `(W', b')` a function of the weight and the adapter. They read the weight, so "
        "a quantised one "
        "is dequantised for them.",
    ),
    "Routed": (
        "Methods that choose by the input",
        "What is added depends on the input or the task, so there is no weight that says the same: they cannot be merged.",
    ),
    "Replace": (
        "Methods that train copies of modules",
        "A whole module is copied for each adapter, and the copy trained.",
    ),
    "Prompt": (
        "Methods that put rows before the input",
        "A trained matrix stands before the embeddings of the text. Masks, labels and positions are shifted along.",
    ),
    "Cache": (
        "Methods that put keys and values into the cache",
        "Each attention finds trained keys and values before those of the text.",
    ),
    "Block": (
        "Methods around whole blocks",
        "A call around each of the model's blocks, and maybe one around the whole model's.",
    ),
}


def _page(family: str) -> Page:
    title, text = _FAMILIES[family]
    return Principle(
        name=family,
        title=title,
        text=text,
        family=family,
        evidence=(f"graftlet.core.{_HOMES.get(family, 'method')}:{family}",),
    )


_HOMES = {"Prompt": "prompt", "Cache": "prompt", "Block": "around"}

PAGES = tuple(_page(family) for family in _FAMILIES)
