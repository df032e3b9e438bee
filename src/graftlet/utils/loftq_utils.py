# SPDX-License-Identifier: Apache-2.0
"""LoftQ's start on a quantised model."""

from ..names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"model.loftq": "replace_lora_weights_loftq loftq_init"})
