# SPDX-License-Identifier: Apache-2.0
"""Optimisers made for LoRA's two factors: `graftlet.optimizers`."""

from .names import placed

__getattr__, __dir__, __all__ = placed(
    __name__,
    {
        "train.optimisers.loraplus": "create_loraplus_optimizer",
        "train.optimisers.lorafa": "LoraFAOptimizer create_lorafa_optimizer",
        "train.optimisers.riemannian": "create_riemannian_optimizer",
    },
)
