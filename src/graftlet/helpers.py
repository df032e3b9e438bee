# SPDX-License-Identifier: Apache-2.0
"""Helpers around adapters, where the reference has them: `graftlet.helpers`."""

from .names import placed

__getattr__, __dir__, __all__ = placed(
    __name__,
    {
        "core.scales": "rescale_adapter_scale disable_input_dtype_casting",
        "methods.variants.dora": "DoraCaching",
        "methods.variants.monteclora": "MontecloraTrainerMixin",
        "model.kappa": "KappaTuneSelector find_kappa_target_modules",
        "model.signatures": "check_if_peft_model update_forward_signature update_generate_signature update_signature",
    },
)
