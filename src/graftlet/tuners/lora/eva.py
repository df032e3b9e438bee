# SPDX-License-Identifier: Apache-2.0
"""EVA's start on data."""

from ...names import placed

__getattr__, __dir__, __all__ = placed(
    __name__,
    {
        "methods.init.eva": "EvaConfig get_eva_state_dict initialize_lora_eva_weights forward_fn_dict "
        "prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling"
    },
)
