# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA's start on gradients."""

from ...names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"methods.init.lora_ga": "LoraGAConfig preprocess_loraga"})
