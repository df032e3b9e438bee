# SPDX-License-Identifier: Apache-2.0
"""LoRA's options, starts and tools."""

from ...names import placed
from .. import LORA

__getattr__, __dir__, __all__ = placed(__name__, LORA)
