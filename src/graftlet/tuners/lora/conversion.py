# SPDX-License-Identifier: Apache-2.0
"""Any adapter as LoRA."""

from ...names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"serve.convert": "convert_to_lora save_as_lora"})
