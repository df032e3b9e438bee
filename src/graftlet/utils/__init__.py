# SPDX-License-Identifier: Apache-2.0
"""Files, names and preparations, where the reference has them."""

from ..names import placed

__getattr__, __dir__, __all__ = placed(
    __name__,
    {
        "config": "CONFIG_NAME PeftType TaskType",
        "errors": "PeftError PeftWarning NoMatchingPeftModuleError",
        "model.save": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME get_peft_model_state_dict load_peft_weights "
        "set_peft_model_state_dict",
        "model.base_state": "get_base_model_state_dict set_base_model_state_dict",
        "model.tables": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
        "bloom_model_postprocess_past_key_value",
        "model.prepare": "cast_mixed_precision_params prepare_model_for_kbit_training",
        "model.loftq": "replace_lora_weights_loftq",
    },
)
