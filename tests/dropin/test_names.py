# SPDX-License-Identifier: Apache-2.0
"""The drop-in serves the reference's names, with its signatures, and stands in front of nobody without saying so."""

from __future__ import annotations

import importlib
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.nn import Module

from .tools import ROOT, SHADOWS, SOURCE, answer, run

peft: Any = pytest.importorskip("peft")

REACHED = {
    "": "PeftModel PeftMixedModel PeftConfig PeftType TaskType inject_adapter_in_model get_peft_model get_peft_config "
    "get_peft_model_state_dict set_peft_model_state_dict prepare_model_for_kbit_training AutoPeftModelForCausalLM "
    "LoraConfig LoKrConfig PrefixTuningConfig PromptLearningConfig LoftQConfig AdaptionPromptConfig OFTConfig BOFTConfig "
    "VeraConfig FourierFTConfig IA3Config LoHaConfig AdaLoraConfig PromptEncoderConfig PromptTuningConfig",
    "functional": "delete_adapter set_adapter inject_adapter_in_model cast_adapter_dtype set_requires_grad "
    "get_peft_model_state_dict set_peft_model_state_dict",
    "helpers": "disable_input_dtype_casting rescale_adapter_scale check_if_peft_model update_forward_signature",
    "import_utils": "is_bnb_available is_bnb_4bit_available is_torchao_available is_hqq_available",
    "mapping": "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING get_peft_config",
    "mapping_func": "get_peft_model MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "mixed_model": "PeftMixedModel",
    "optimizers": "create_loraplus_optimizer create_lorafa_optimizer create_riemannian_optimizer",
    "peft_model": "PeftModel PeftModelForCausalLM get_layer_status get_model_status TunerLayerStatus",
    "tuners.tuners_utils": "BaseTuner BaseTunerLayer onload_layer check_adapters_to_merge check_target_module_exists "
    "_maybe_include_all_linear_layers _ExcludedModule replicate_layers",
    "tuners.lora": "LoraLayer LoraModel LoraConfig Linear Linear4bit Linear8bitLt Conv2d Embedding",
    "tuners.lora.layer": "LoraLayer Linear Embedding Conv2d ParamWrapper",
    "tuners.lora.model": "LoraModel",
    "tuners.lora.bnb": "Linear4bit Linear8bitLt",
    "tuners.loha.layer": "LoHaLayer",
    "tuners.lokr.layer": "LoKrLayer factorization",
    "utils": "ModulesToSaveWrapper _get_submodules get_peft_model_state_dict CONFIG_NAME WEIGHTS_NAME "
    "SAFETENSORS_WEIGHTS_NAME load_peft_weights TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "utils.other": "AuxiliaryTrainingWrapper fsdp_auto_wrap_policy get_pattern_key _get_submodules",
    "utils.transformers_weight_conversion": "build_peft_weight_mapping convert_peft_config_for_transformers "
    "get_model_conversion_mapping",
    "utils.hotswap": "check_hotswap_configs_compatible hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap "
    "hotswap_adapter",
    "utils.constants": "CONFIG_NAME WEIGHTS_NAME SAFETENSORS_WEIGHTS_NAME EMBEDDING_LAYER_NAMES",
    "utils.integrations": "init_empty_weights dequantize_module_weight get_bnb_param_type gather_params_ctx",
    "utils.save_and_load": "get_peft_model_state_dict set_peft_model_state_dict load_peft_weights",
}
"""What transformers, accelerate, TRL, diffusers, sentence-transformers, axolotl, ms-swift, LLaMA-Factory and unsloth import."""

INNER = {
    "utils": {
        "_prepare_prompt_learning_config", "_set_trainable", "get_gptqmodel_quant_linear", "get_quantization_kwargs",
        "quantization_extra_repr", "register_peft_method", "resolve_quantization_backend",
        "set_additional_trainable_modules",
    },
    "utils.other": {"starcoder_model_postprocess_past_key_value"},
    "tuners.adaption_prompt": {"AdaptedAttention"},
    "tuners.shadow": {"DetachedShadowModel", "ShadowCache", "ShadowCarrier"},
}  # fmt: skip
"""Names of the reference's machinery, which there is none of: the guide lists them."""

REPORT = """
import importlib, inspect, json, peft
from peft._places import PLACES

def parameters(value):
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[p.name, p.kind.name, repr(p.default)] for p in found if p.name not in ("self", "cls")]

seen = {}
for place, names in PLACES.items():
    module = importlib.import_module(f"peft.{place}" if place else "peft")
    for name in names:
        value = getattr(module, name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isfunction(value) else type(value).__name__
        seen[f"{place}:{name}"] = [kind, parameters(value) if kind in ("class", "function") else None]
for name in %r:
    for attribute in dir(getattr(peft, name)):
        if not attribute.startswith("_") and callable(getattr(getattr(peft, name), attribute)):
            seen[f"{name}.{attribute}"] = ["method", parameters(getattr(getattr(peft, name), attribute))]
print(json.dumps(seen))
"""
CLASSES = ("PeftModel", "PeftModelForCausalLM", "PeftConfig", "LoraConfig", "LoraModel")


@pytest.fixture(scope="module")
def served() -> dict[str, Any]:
    """What the drop-in serves, asked of itself."""
    return answer(REPORT % (CLASSES,), dropin=True)


def places() -> list[str]:
    return sorted({name.partition(":")[0] for name in served_names()})


def served_names() -> list[str]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("_places", SOURCE / "peft" / "_places.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [f"{place}:{name}" for place, names in module.PLACES.items() for name in names]


def of_reference(place: str) -> Any:
    return importlib.import_module(f"peft.{place}" if place else "peft")


def test_every_public_name_is_served(served: dict[str, Any]) -> None:
    lacking = {f":{name}" for name in peft.__all__} - set(served)
    for place, names in REACHED.items():
        lacking |= {f"{place}:{name}" for name in names.split()} - set(served)
    assert not lacking


@pytest.mark.parametrize("place", [p for p in places() if p])
def test_every_listed_name_of_a_module_is_served(place: str) -> None:
    wanted = set(getattr(of_reference(place), "__all__", ()))
    have = {name.partition(":")[2] for name in served_names() if name.startswith(f"{place}:")}
    assert wanted - have == INNER.get(place, set())


def test_names_are_what_they_are_in_the_reference(served: dict[str, Any]) -> None:
    """Classes where there are classes, functions where there are functions, constants equal."""
    apart = []
    for name, (kind, _) in served.items():
        place, _, own = name.partition(":")
        if own and hasattr(module := of_reference(place), own):
            theirs = getattr(module, own)
            wanted = "class" if inspect.isclass(theirs) else "function" if inspect.isfunction(theirs) else None
            if wanted is not None and kind != wanted and own not in FUNCTION_LIKE:
                apart.append((name, kind, wanted))
    assert not apart


FUNCTION_LIKE = {"rescale_adapter_scale", "disable_input_dtype_casting"}

UNLIKE = {
    # by name: the parameters that differ, and why
    "ArrowConfig": "task_adapter_names gks_adapter_names",  # fields of the same name in the reference, set after it is made
    "CPTEmbedding": "word_embeddings words loading",  # made by PeftModel, not by hand
    "CartridgeEncoder": "words loading",
    "PrefixEncoder": "words loading",
    "PromptEmbedding": "word_embeddings words loading",
    "PromptEncoder": "words loading",
    "PeftConfig": "args kwargs task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode",
    "PeftModelForTokenClassification": "peft_config",  # None is no config
    "PeftMixedModel": "autocast_adapter_dtype low_cpu_mem_usage _init",  # a PeftModel
    "get_eva_state_dict": "cache_file room forward_fn prepare_model_inputs_fn prepare_layer_inputs_fn",
    "initialize_lora_eva_weights": "cache_file room forward_fn prepare_model_inputs_fn prepare_layer_inputs_fn",
    "load_peft_weights": "hf_hub_download_kwargs subfolder allow_pickle hub",  # named, and more of them
    "preprocess_loraga": "room show_progress_bar",
    "PeftModel.push_to_hub": "*",  # goes on to huggingface_hub, whose arguments it takes
    "LoraModel.add_weighted_adapter": "combination_type energy",  # None takes "svd" for LoRA
    "merge_adapter": "safe_merge",  # docs/differences.md
    "merge_and_unload": "safe_merge dequantize",
    "from_pretrained": "low_cpu_mem_usage strict",  # tensors are always made once, from the file
    "load_adapter": "low_cpu_mem_usage strict",
    "add_adapter": "_init",
    "generate": "adapter_names",
    "save_pretrained": "push_to_hub",
    "push_to_hub": "*",
    "prepare_inputs_for_generation": "task_ids",
    "from_peft_type": "kwargs values",
}
"""Where signatures differ: by name, or for a method of any class by its own name alone."""
TUNERS = "model config configs peft_config adapter_name kwargs low_cpu_mem_usage state_dict torch_device "
TUNERS += "ephemeral_gpu_offload autocast_adapter_dtype"
"""The tuners of all methods take the same arguments here, and the adapter's name has a default."""


def allowed(name: str) -> set[str]:
    base = name.rpartition(".")[2]
    found = UNLIKE.get(name) or UNLIKE.get(base, "")
    if base.endswith("Model") and not base.startswith("Peft"):
        found = TUNERS
    if base.startswith("PeftModel") and not base.endswith("MixedModel"):
        found += " _init args"
    return set(found.split())


def shown(value: object) -> str:
    """A default, by what it says: enums by their value, functions and objects by their kind."""
    text = repr(value)
    return text.partition(" at 0x")[0].partition(": ")[2] or text.partition(" at 0x")[0]


def test_signatures_are_the_references(served: dict[str, Any]) -> None:
    pairs = {n.removeprefix(":"): getattr(peft, n.removeprefix(":")) for n in served if n.startswith(":")}
    for own in CLASSES:
        methods = [m for m in dir(getattr(peft, own)) if not m.startswith("_") and not hasattr(Module, m)]
        pairs |= {f"{own}.{m}": getattr(getattr(peft, own), m) for m in methods}
    apart = {}
    for name, theirs in pairs.items():
        if not (inspect.isclass(theirs) or inspect.isfunction(theirs) or inspect.ismethod(theirs)):
            continue
        ours = served.get(f":{name}") or served.get(name)
        if ours is None or ours[1] is None:
            apart |= {name: "not there"} if ours is None and name not in ABSENT else {}
            continue
        try:
            wanted = inspect.signature(theirs).parameters.values()
        except (TypeError, ValueError):
            continue
        given = {p[0]: p[2] for p in ours[1]}
        known = {p.name: shown(p.default) for p in wanted if p.name not in ("self", "cls")}
        free = allowed(name)
        wrong = {p for p in known | given if (p in known) != (p in given)}
        wrong |= {p for p in known.keys() & given.keys() if known[p] != shown_text(given[p])}
        if wrong - free and "*" not in free:
            apart[name] = sorted(wrong - free)
    assert not apart


ABSENT = {
    "PeftModel.set_additional_trainable_modules", "PeftConfig.check_kwargs", "LoraConfig.check_kwargs",
    "PeftConfig.push_to_hub", "LoraConfig.push_to_hub", "LoraModel.get_model_config", "LoraModel.inject_adapter",
    "LoraModel.set_requires_grad", "LoraModel.subtract_mutated_init", "LoraModel.tuner_layer_cls",
}  # fmt: skip
"""Methods of the reference's machinery that the guide lists as not served."""


def shown_text(text: str) -> str:
    return text.partition(" at 0x")[0].partition(": ")[2] or text.partition(" at 0x")[0]


def test_what_differs_is_in_the_docs() -> None:
    guide = (ROOT / "docs" / "guides" / "drop-in.md").read_text()
    differences = (ROOT / "docs" / "differences.md").read_text()
    lacking = [name for names in INNER.values() for name in names if name not in guide]
    lacking += [name for name in ABSENT if name.partition(".")[2] not in guide]
    lacking += [name for name in ("merge_adapter", "safe_merge") if name not in differences]
    assert not lacking


def test_another_peft_is_not_hidden_in_silence(tmp_path: Path) -> None:
    done = run("import peft", dropin=True)
    assert done.returncode == 1
    assert "would hide another one: peft 0.21.2 in" in done.stderr
    assert "pip uninstall peft" in done.stderr
    assert run("import peft; print(peft.__version__)", dropin=True, **{SHADOWS: "1"}).stdout.endswith("+graftlet.1\n")
    shutil.copytree(SOURCE / "peft", tmp_path / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "peft" / "peft_model.py").write_text("")
    done = run("import peft", dropin=True, source=tmp_path, **{SHADOWS: "1"})
    assert "holds two packages named peft" in done.stderr
    assert "peft_model.py" in done.stderr


def test_modules_are_made_when_they_are_asked_for() -> None:
    code = """
import json, sys, peft
before = sorted(m for m in sys.modules if m.startswith(("peft.", "torch")) and m.count(".") <= 1)
import peft.tuners.lora.layer as layer
from peft.tuners import lora
try:
    import peft.tuners.nothing
except ModuleNotFoundError as error:
    missing = str(error)
print(json.dumps([[m for m in before if not m.startswith("peft._")], layer.LoraLayer is lora.LoraLayer, missing,
                  hasattr(peft, "nothing"), "LoraConfig" in dir(peft), peft.utils.other.__name__]))
"""
    assert answer(code, dropin=True) == [
        [], True, "No module named 'peft.tuners.nothing'", False, True, "peft.utils.other",
    ]  # fmt: skip
