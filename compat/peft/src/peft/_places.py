# SPDX-License-Identifier: Apache-2.0
"""Which module of the reference has which names, and where each is in Graftlet.

A line is a home and its names; `name=other` is called `other` at home. What each method's package has follows from the
method's name: its config, its tuner, the classes of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

Table = Mapping[str, Mapping[str, str]]

LORA_CONFIGS = {
    "methods.lora": "LoraConfig LoraRuntimeConfig",
    "methods.init.loftq": "LoftQConfig",
    "methods.init.eva": "EvaConfig",
    "methods.init.lora_ga": "LoraGAConfig",
    "methods.init.corda": "CordaConfig",
    "methods.variants.arrow": "ArrowConfig",
    "methods.variants.bdlora": "BdLoraConfig",
    "methods.variants.kasa": "KasaConfig",
    "methods.variants.monteclora": "MontecloraConfig",
    "methods.variants.velora": "VeloraConfig",
}
LORA_TOOLS = {
    "model.arrow": "create_arrow_model",
    "serve.convert": "convert_to_lora save_as_lora",
    "methods.init.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "methods.init.lora_ga": "preprocess_loraga",
}
TASKS = (
    "PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
    "PeftModelForTokenClassification PeftModelForQuestionAnswering PeftModelForFeatureExtraction"
)
AUTO = (
    "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
    "AutoPeftModelForTokenClassification AutoPeftModelForQuestionAnswering AutoPeftModelForFeatureExtraction"
)
TABLES = {
    "model.tables": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
    "PEFT_TYPE_TO_PREFIX_MAPPING"
}
STATES = {
    "model.save": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
    "model.base_state": "get_base_model_state_dict set_base_model_state_dict",
}
FILES = {"config": "CONFIG_NAME", "model.save": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"}
WRAPPERS = {
    "core.replace": "ModulesToSaveWrapper",
    "core.host": "TrainableTokensWrapper=Shell",
    "tuners.kinds": "AuxiliaryTrainingWrapper",
}
WITH_DEFAULTS = (
    "ADALORA_TARGET ADAMSS_TARGET BEFT_TARGET BOFT_TARGET C3A_TARGET DEFT_TARGET DELORA_TARGET FOURIERFT_TARGET "
    "FROD_TARGET GLORA_TARGET GRALORA_TARGET HIRA_TARGET HRA_TARGET IA3_FEEDFORWARD IA3_TARGET LILY_TARGET "
    "LNTUNING_TARGET LOHA_TARGET LOKR_TARGET LORA_TARGET MISS_TARGET OFT_TARGET OSF_TARGET PEANUT_TARGET POLY_TARGET "
    "PSOFT_TARGET PVERA_TARGET RANDLORA_TARGET ROAD_TARGET SHIRA_TARGET SUPERTUNING_TARGET TINYLORA_TARGET UNILORA_TARGET "
    "VBLORA_TARGET VERA_TARGET WAVEFT_TARGET"
)
DEFAULTS = {
    "utils.other": "EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND TOKENIZER_CONFIG_NAME "
    "DUMMY_TARGET_MODULES DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES "
    + " ".join(f"TRANSFORMERS_MODELS_TO_{method}_MODULES_MAPPING" for method in WITH_DEFAULTS.split()),
    "model.tables": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
}
OTHERS = {
    "utils.other": "_freeze_adapter _get_batch_size _get_input_embeddings_name _get_submodules _is_valid_match "
    "_set_adapter fsdp_auto_wrap_policy get_pattern_key get_quantization_config id_tensor_storage infer_device "
    "match_target_against_key str_to_bool check_file_exists_on_hf_hub transpose",
    "model.prepare": "cast_mixed_precision_params prepare_model_for_kbit_training",
    "model.parts": "shift_tokens_right",
}
FUNCTIONS = {"tuners.functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad"}
INTEGRATIONS = {
    "utils.integrations": "check_deepspeed_zero3_enabled dequantize_module_weight gather_params_ctx get_bnb_param_type "
    "init_empty_weights map_cache_to_layer_device_map"
}
ERRORS = {"errors": "PeftError NoMatchingPeftModuleError PeftWarning"}
TYPES = {"config": "PeftType TaskType"}
HOTSWAP = (
    "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
    "prepare_model_for_compiled_hotswap"
)

METHODS = {
    # package, home of its config, the name that config, tuner and layers begin with, and what else its layers are called
    "adalora": ("methods.adalora", "AdaLora", "SVDLinear SVDConv2d SVDQuantLinear"),
    "adamss": ("methods.adamss", "Adamss", "Linear"),
    "adaption_prompt": ("methods.adaption_prompt", "AdaptionPrompt", ""),
    "beft": ("methods.beft", "Beft", "Linear"),
    "boft": ("methods.boft", "BOFT", "Linear Conv2d"),
    "c3a": ("methods.c3a", "C3A", "C3ALinear"),
    "deft": ("methods.deft", "Deft", "DeftLinear"),
    "delora": ("methods.delora", "Delora", "DeloraLinear"),
    "fourierft": ("methods.fourierft", "FourierFT", "FourierFTLinear"),
    "frod": ("methods.frod", "Frod", "Linear"),
    "glora": ("methods.glora", "Glora", "GloraLinear"),
    "gralora": ("methods.gralora", "Gralora", "Linear"),
    "hira": ("methods.hira", "Hira", "Linear Embedding Conv1d Conv2d Conv3d"),
    "hra": ("methods.hra", "HRA", "HRALinear HRAConv2d"),
    "ia3": ("methods.ia3", "IA3", "Linear Conv2d Conv3d"),
    "lily": ("methods.lily", "Lily", "Linear"),
    "ln_tuning": ("methods.ln_tuning", "LNTuning", ""),
    "loha": ("methods.loha", "LoHa", "Linear Conv1d Conv2d"),
    "lokr": ("methods.lokr", "LoKr", "Linear Conv1d Conv2d"),
    "lora": (
        "methods.lora",
        "Lora",
        "Linear Embedding Conv1d Conv2d Conv3d MultiheadAttention ParamWrapper Linear4bit Linear8bitLt GPTQLoraLinear "
        "AwqLoraLinear AqlmLoraLinear HqqLoraLinear EetqLoraLinear TorchaoLoraLinear",
    ),
    "miss": ("methods.miss", "Miss", "MissLinear"),
    "oft": ("methods.oft", "OFT", "Linear Conv2d Embedding"),
    "osf": ("methods.osf", "OSF", "Linear"),
    "peanut": ("methods.peanut", "Peanut", "Linear"),
    "poly": ("methods.poly", "Poly", "Linear"),
    "psoft": ("methods.psoft", "Psoft", "Linear"),
    "pvera": ("methods.pvera", "Pvera", "Linear"),
    "randlora": ("methods.randlora", "RandLora", "Linear"),
    "road": ("methods.road", "Road", "Linear"),
    "shadow": ("methods.shadow", "Shadow", ""),
    "shira": ("methods.shira", "Shira", "Linear"),
    "supertuning": ("methods.supertuning", "Supertuning", "Linear"),
    "tinylora": ("methods.tinylora", "TinyLora", "Linear Embedding"),
    "trainable_tokens": ("methods.trainable_tokens", "TrainableTokens", ""),
    "unilora": ("methods.unilora", "UniLora", "Linear"),
    "vblora": ("methods.vblora", "VBLoRA", "Linear"),
    "vera": ("methods.vera", "Vera", "Linear"),
    "waveft": ("methods.waveft", "WaveFT", "WaveFTLinear"),
    "xlora": ("methods.xlora", "XLora", ""),
}
LAYERS = {"shadow": "layers"}
"""Where a package's module of layers has another name."""
PROMPTS = {
    # package, home, what its config module has, what its model module has
    "cartridge": ("methods.prompts.cartridge", "CartridgeConfig", "CartridgeEncoder"),
    "cpt": ("methods.prompts.cpt", "CPTConfig", "CPTEmbedding"),
    "multitask_prompt_tuning": (
        "methods.prompts.multitask",
        "MultitaskPromptTuningConfig MultitaskPromptTuningInit",
        "MultitaskPromptEmbedding",
    ),
    "p_tuning": (
        "methods.prompts.p_tuning",
        "PromptEncoderConfig PromptEncoderReparameterizationType",
        "PromptEncoder",
    ),
    "prefix_tuning": ("methods.prompts.prefix_tuning", "PrefixTuningConfig", "PrefixEncoder"),
    "prompt_tuning": ("methods.prompts.prompt_tuning", "PromptTuningConfig PromptTuningInit", "PromptEmbedding"),
}
CARTRIDGES = {
    "model.kv_prefix": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
    "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values"
}

LOFTQ = {"model.loftq": "replace_lora_weights_loftq"}
UNLISTED = {"CordaConfig", "RankAllocator", "COMPATIBLE_TUNER_TYPES"}
"""What the methods' own packages have, and the package of all of them has not."""
TOP = ("auto", "config", "peft_model", "mapping", "mapping_func", "mixed_model")
"""The modules whose names the package itself has too; and some that stand deeper."""
TOP_NAMES = {
    "model.kappa": "find_kappa_target_modules",
    "model.prepare": "cast_mixed_precision_params prepare_model_for_kbit_training",
    "model.parts": "shift_tokens_right",
    "model.tables": "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value",
}

FIXED: dict[str, dict[str, str]] = {
    "auto": {"model.auto": AUTO},
    "config": {"config": "PeftConfig PeftConfigMixin=PeftConfig PromptLearningConfig"},
    "functional": {
        **FUNCTIONS,
        "model.mapping": "inject_adapter_in_model",
        "model.save": "get_peft_model_state_dict set_peft_model_state_dict",
    },
    "helpers": {
        "core.scales": "rescale_adapter_scale disable_input_dtype_casting",
        "methods.variants.dora": "DoraCaching",
        "methods.variants.monteclora": "MontecloraTrainerMixin",
        "model.kappa": "KappaTuneSelector find_kappa_target_modules",
        "model.signatures": "check_if_peft_model update_forward_signature update_generate_signature update_signature",
    },
    "import_utils": {
        "import_utils": "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available "
        "is_eetq_available is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available "
        "is_te_available is_te_pytorch_available is_torch_tpu_available is_torchao_available is_xpu_available"
    },
    "mapping": {**TABLES, "config": "get_peft_config", "model.mapping": "inject_adapter_in_model"},
    "mapping_func": {"model.mapping": "get_peft_model", "model.tasks": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"},
    "mixed_model": {"model.mixed": "PeftMixedModel"},
    "optimizers": {
        "train.optimisers.loraplus": "create_loraplus_optimizer",
        "train.optimisers.lorafa": "create_lorafa_optimizer",
        "train.optimisers.riemannian": "create_riemannian_optimizer",
    },
    "optimizers.lorafa": {"train.optimisers.lorafa": "LoraFAOptimizer create_lorafa_optimizer"},
    "optimizers.loraplus": {"train.optimisers.loraplus": "create_loraplus_optimizer"},
    "optimizers.riemannian": {"train.optimisers.riemannian": "create_riemannian_optimizer"},
    "peft_model": {
        "model.tasks": TASKS,
        "model.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    },
    "tuners.lora.config": LORA_CONFIGS,
    "tuners.lora.arrow": {"model.arrow": "create_arrow_model"},
    "tuners.lora.conversion": {"serve.convert": "convert_to_lora save_as_lora"},
    "tuners.lora.corda": {"methods.init.corda": "preprocess_corda"},
    "tuners.lora.eva": {
        "methods.init.eva": "get_eva_state_dict initialize_lora_eva_weights forward_fn_dict "
        "prepare_layer_inputs_fn_language_modeling prepare_model_inputs_fn_language_modeling"
    },
    "tuners.lora.intruders": {"serve.intruders": "reduce_intruder_dimension"},
    "tuners.lora.loraga": {"methods.init.lora_ga": "preprocess_loraga"},
    "tuners.lora.bnb": {"tuners.kinds": "Linear4bit=lora.Linear4bit Linear8bitLt=lora.Linear8bitLt"},
    "tuners.lora.gptq": {"tuners.kinds": "GPTQLoraLinear=lora.GPTQLoraLinear"},
    "tuners.lora.awq": {"tuners.kinds": "AwqLoraLinear=lora.AwqLoraLinear"},
    "tuners.lora.aqlm": {"tuners.kinds": "AqlmLoraLinear=lora.AqlmLoraLinear"},
    "tuners.lora.hqq": {"tuners.kinds": "HqqLoraLinear=lora.HqqLoraLinear"},
    "tuners.lora.eetq": {"tuners.kinds": "EetqLoraLinear=lora.EetqLoraLinear"},
    "tuners.lora.torchao": {"tuners.kinds": "TorchaoLoraLinear=lora.TorchaoLoraLinear"},
    "tuners.lokr.layer": {"methods.lokr": "factorization"},
    "tuners.cartridge.utils": CARTRIDGES,
    "tuners.mixed": {"model.tables": "COMPATIBLE_TUNER_TYPES", "core.tuner": "MixedModel=BaseTuner"},
    "tuners.mixed.model": {"core.tuner": "MixedModel=BaseTuner"},
    "tuners.tuners_utils": {
        **FUNCTIONS,
        "core.tuner": "BaseTuner",
        "core.replication": "replicate_layers",
        "tuners.kinds": "BaseTunerLayer",
        "tuners.functional": f"{FUNCTIONS['tuners.functional']} _ExcludedModule check_adapters_to_merge "
        "check_target_module_exists clone_module inspect_matched_modules onload_layer "
        "_maybe_include_all_linear_layers=maybe_include_all_linear_layers",
    },
    "utils": {},
    "utils.constants": {**DEFAULTS, **FILES},
    "utils.error": {"errors": "PeftError NoMatchingPeftModuleError"},
    "utils.hotswap": {"serve.hotswap": HOTSWAP},
    "utils.integrations": INTEGRATIONS,
    "utils.loftq_utils": {"model.loftq": "replace_lora_weights_loftq loftq_init"},
    "utils.other": {},
    "utils.peft_types": TYPES,
    "utils.save_and_load": STATES,
    "utils.transformers_weight_conversion": {
        "model.conversion": "build_peft_weight_mapping convert_peft_config_for_transformers "
        "convert_peft_adapter_state_dict_for_transformers"
    },
    "utils.warning": {"errors": "PeftWarning"},
}


def written(*tables: Mapping[str, str]) -> dict[str, str]:
    """Each name of a module, and where it is: `graftlet.module:name`."""
    found = {}
    for home, names in (line for table in tables for line in table.items()):
        for name in names.split():
            served, _, own = name.partition("=")
            found[served] = f"graftlet.{home}:{own or served}"
    return found


def packages() -> Iterator[tuple[str, dict[str, str]]]:
    """The modules of each method's package."""
    for package, (home, stem, layers) in METHODS.items():
        place = f"tuners.{package}"
        config = written({home: f"{stem}Config"})
        model = written({"model.tables": f"{stem}Model"})
        layer = written(
            {"tuners.kinds": " ".join(f"{name}={package}.{name}" for name in [f"{stem}Layer", *layers.split()])}
        )
        called = LAYERS.get(package, "layer")
        yield from ((f"{place}.config", config), (f"{place}.model", model), (f"{place}.{called}", layer))
        yield place, {**config, **model, **layer}
    for package, (home, config, model) in PROMPTS.items():
        place = f"tuners.{package}"
        yield from ((f"{place}.config", written({home: config})), (f"{place}.model", written({home: model})))
        yield place, written({home: f"{config} {model}"})


def made() -> dict[str, dict[str, str]]:
    """The whole table: place, name, home."""
    places: dict[str, dict[str, str]] = {}
    for place, names in [*packages(), *((p, written(homes)) for p, homes in FIXED.items())]:
        places.setdefault(place, {}).update(names)
    places["tuners.lora"].update(written(LORA_CONFIGS, LORA_TOOLS))
    for place in ("tuners.adalora", "tuners.adalora.layer"):
        places[place].update(written({"methods.allocation.ranks": "RankAllocator"}))
    places["tuners"] = {
        name: home
        for place in [*(f"tuners.{package}" for package in [*METHODS, *PROMPTS]), "tuners.mixed"]
        for name, home in places[place].items()
        if name not in UNLISTED and not home.startswith("graftlet.tuners.kinds:")
    }
    places["utils.other"] = written(OTHERS, DEFAULTS, FILES, WRAPPERS)
    places["utils"] = places["utils.other"] | written(STATES, ERRORS, TYPES, INTEGRATIONS, LOFTQ)
    places[""] = {n: h for n, h in places["tuners"].items() if n not in {"MixedModel", "MultitaskPromptEmbedding"}}
    places[""] |= {n: h for place in TOP for n, h in places[place].items() if not n.startswith("Tuner")}
    places[""] |= written(TOP_NAMES, STATES, ERRORS, TYPES, CARTRIDGES, LOFTQ)
    for name in ("PeftConfigMixin", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        del places[""][name]
    conversion = places["utils.transformers_weight_conversion"]
    conversion["get_model_conversion_mapping"] = "transformers.conversion_mapping:get_model_conversion_mapping"
    return places


PLACES: dict[str, dict[str, str]] = made()
