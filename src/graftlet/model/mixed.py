# SPDX-License-Identifier: Apache-2.0
"""The reference's name for a model whose adapters are of several methods."""

from __future__ import annotations

from .peft_model import PeftModel


class PeftMixedModel(PeftModel):
    """A `PeftModel`. Methods stand side by side in any; this is its name where code asks for the class.

    Unlike the reference's, it saves and loads, and takes every method on layers.
    """
