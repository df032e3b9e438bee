# SPDX-License-Identifier: Apache-2.0
"""Taking intruder dimensions out of LoRA adapters."""

from ...names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"serve.intruders": "reduce_intruder_dimension"})
