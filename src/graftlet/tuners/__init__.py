# SPDX-License-Identifier: Apache-2.0
"""Methods and what belongs to them, where the reference has them."""

from ..names import placed

LORA = {
    "methods.lora": "LoraConfig LoraRuntimeConfig",
    "methods.init.loftq": "LoftQConfig",
    "methods.init.eva": "EvaConfig get_eva_state_dict initialize_lora_eva_weights",
    "methods.init.lora_ga": "LoraGAConfig preprocess_loraga",
    "methods.init.corda": "CordaConfig preprocess_corda",
    "methods.variants.arrow": "ArrowConfig",
    "methods.variants.bdlora": "BdLoraConfig",
    "methods.variants.kasa": "KasaConfig",
    "methods.variants.monteclora": "MontecloraConfig",
    "methods.variants.velora": "VeloraConfig",
    "serve.convert": "convert_to_lora save_as_lora",
}
__getattr__, __dir__, __all__ = placed(__name__, LORA)
