# SPDX-License-Identifier: Apache-2.0
"""Graftlet: train a small adapter on a frozen large model, then save, load, merge, switch and serve it.

Every public name is resolved on first use, so that `import graftlet` costs no more than `import torch`.
"""

from __future__ import annotations

from .names import placed

__version__ = "0.1.0"

_HOMES = {
    "config": "PeftConfig PromptLearningConfig PeftType TaskType get_peft_config",
    "errors": "GraftletError GraftletWarning PeftError PeftWarning NoMatchingPeftModuleError silence",
    "registry": "method",
    "core.context": "Call using",
    "methods.lora": "LoraConfig LoraRuntimeConfig",
    "methods.variants.arrow": "ArrowConfig",
    "methods.init.eva": "EvaConfig get_eva_state_dict initialize_lora_eva_weights",
    "methods.init.loftq": "LoftQConfig",
    "methods.init.lora_ga": "LoraGAConfig preprocess_loraga",
    "methods.variants.bdlora": "BdLoraConfig",
    "methods.variants.kasa": "KasaConfig",
    "methods.variants.monteclora": "MontecloraConfig",
    "methods.variants.velora": "VeloraConfig",
    "methods.oft": "OFTConfig",
    "methods.hra": "HRAConfig",
    "methods.ia3": "IA3Config",
    "methods.road": "RoadConfig",
    "methods.shira": "ShiraConfig",
    "methods.hira": "HiraConfig",
    "methods.lily": "LilyConfig",
    "methods.ln_tuning": "LNTuningConfig",
    "methods.trainable_tokens": "TrainableTokensConfig",
    "methods.vera": "VeraConfig",
    "methods.c3a": "C3AConfig",
    "methods.delora": "DeloraConfig",
    "methods.fourierft": "FourierFTConfig",
    "methods.gralora": "GraloraConfig",
    "methods.loha": "LoHaConfig",
    "methods.lokr": "LoKrConfig",
    "methods.miss": "MissConfig",
    "methods.psoft": "PsoftConfig",
    "methods.pvera": "PveraConfig",
    "methods.randlora": "RandLoraConfig",
    "methods.tinylora": "TinyLoraConfig",
    "methods.unilora": "UniLoraConfig",
    "methods.vblora": "VBLoRAConfig",
    "methods.xlora": "XLoraConfig",
    "methods.waveft": "WaveFTConfig",
    "methods.adalora": "AdaLoraConfig",
    "methods.adamss": "AdamssConfig",
    "methods.beft": "BeftConfig",
    "methods.frod": "FrodConfig",
    "methods.boft": "BOFTConfig",
    "methods.deft": "DeftConfig",
    "methods.glora": "GloraConfig",
    "methods.osf": "OSFConfig",
    "methods.peanut": "PeanutConfig",
    "methods.poly": "PolyConfig",
    "methods.supertuning": "SupertuningConfig",
    "methods.prompts.prompt_tuning": "PromptTuningConfig PromptTuningInit PromptEmbedding",
    "methods.prompts.prefix_tuning": "PrefixTuningConfig PrefixEncoder",
    "methods.prompts.p_tuning": "PromptEncoderConfig PromptEncoder PromptEncoderReparameterizationType",
    "methods.prompts.multitask": "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
    "methods.prompts.cpt": "CPTConfig CPTEmbedding",
    "methods.prompts.cartridge": "CartridgeConfig CartridgeEncoder",
    "methods.adaption_prompt": "AdaptionPromptConfig",
    "methods.shadow": "ShadowConfig",
    "model.tasks": "PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
    "PeftModelForTokenClassification PeftModelForQuestionAnswering PeftModelForFeatureExtraction "
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "model.auto": "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM "
    "AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
    "AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction",
    "model.mixed": "PeftMixedModel",
    "model.mapping": "get_peft_model inject_adapter_in_model",
    "model.save": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "model.kv_prefix": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values",
    "model.tables": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
    "AdaLoraModel AdamssModel AdaptionPromptModel BOFTModel BeftModel C3AModel DeftModel DeloraModel "
    "FourierFTModel FrodModel GloraModel GraloraModel HRAModel HiraModel IA3Model LNTuningModel LilyModel "
    "LoHaModel LoKrModel LoraModel MissModel OFTModel OSFModel PeanutModel PolyModel PsoftModel "
    "PveraModel RandLoraModel RoadModel ShadowModel ShiraModel SupertuningModel TinyLoraModel "
    "TrainableTokensModel UniLoraModel VBLoRAModel VeraModel WaveFTModel XLoraModel",
    "model.base_state": "get_base_model_state_dict set_base_model_state_dict",
    "model.parts": "shift_tokens_right",
    "model.arrow": "create_arrow_model",
    "serve.cache": "AdapterCache AdapterPool",
    "model.prepare": "prepare_model_for_kbit_training cast_mixed_precision_params",
    "model.optimised": "optimize_model optimised restore_model",
    "model.status": "get_layer_status get_model_status merge_errors",
    "model.kappa": "find_kappa_target_modules",
    "model.loftq": "replace_lora_weights_loftq",
    "serve.convert": "convert_to_lora save_as_lora",
    "knowledge.cost.estimating": "estimate",
    "serve.foreign": "load_foreign",
}
__getattr__, _, _names = placed(__name__, _HOMES)
__all__ = ["__version__", *_names]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return list(__all__)
