# SPDX-License-Identifier: Apache-2.0
"""What a caller of `peft` can see, told by the same program with either: `seen()` is run in an interpreter of its own."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def base(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
            pad_token_id=0, initializer_range=0.3,
        )
    )  # fmt: skip


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


def adapted(**settings: Any) -> Any:
    from peft import get_peft_model

    model = get_peft_model(base(), lora(**settings))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def logits(model: Any, **given: Any) -> list[float]:
    """A call's output, to four digits."""
    model.eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        return [round(x, 3) for x in model(input_ids=ids, **given).logits.flatten()[::37].tolist()]


def builtins(kind: type) -> list[str]:
    """What a class is caught as."""
    return [k.__name__ for k in kind.__mro__ if k.__module__ == "builtins" and k.__name__ not in PLAIN]


PLAIN = ("object", "BaseException", "Exception", "Warning")


def outcome(act: Callable[[], Any]) -> dict[str, Any]:
    """What an action raises, by the built-in classes that it is caught as, and whether it warns."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            act()
            raised = ["nothing"]
        except Exception as error:
            raised = builtins(type(error))
    return {"raises": raised, "warns": [*{"UserWarning" for w in told if issubclass(w.category, UserWarning)}]}


def classes() -> dict[str, Any]:
    """Names of classes, and what is an instance of what."""
    import peft
    from peft.tuners import lora as lora_package
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = adapted(modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]})
    kinds = {
        "tuner": BaseTuner, "tuner layer": BaseTunerLayer, "auxiliary": AuxiliaryTrainingWrapper,
        "saved": ModulesToSaveWrapper, "tokens": TrainableTokensWrapper, "lora": lora_package.LoraLayer,
        "linear": lora_package.Linear, "embedding": lora_package.Embedding, "model": peft.PeftModel,
        "mixed": peft.PeftMixedModel, "causal": peft.PeftModelForCausalLM, "module": torch.nn.Module,
    }  # fmt: skip
    parts = {
        "model": model,
        "tuner": model.base_model,
        "layer": model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"),
        "bare layer": model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj"),
        "head": model.get_submodule("base_model.model.lm_head"),
        "embedding": model.get_submodule("base_model.model.model.embed_tokens"),
    }
    seen: dict[str, Any] = {
        f"{part} is {kind}": isinstance(value, cls) for part, value in parts.items() for kind, cls in kinds.items()
    }
    seen["name"] = type(model).__name__
    seen["wrapper"] = type(parts["head"]).__name__
    seen["subclass"] = issubclass(type(parts["layer"]), BaseTunerLayer)
    seen["maps"] = [parts[p].adapter_state_dict_load_map("default") for p in ("head", "embedding")]
    seen["base"] = [type(parts[p].get_base_layer()).__name__ for p in ("layer",)]
    return seen


def configs() -> dict[str, Any]:
    """Configs by their dictionaries, written and read."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        lora().save_pretrained(folder)
        read = peft.PeftConfig.from_pretrained(folder)
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in read.to_dict().items()}
    values |= {name: getattr(getattr(read, name), "value", getattr(read, name)) for name in ("peft_type", "task_type")}
    return {
        "values": {k: str(v) for k, v in values.items() if k not in ("runtime_config", "peft_version", "auto_mapping")},
        "type": [
            str(read.peft_type.value),
            read.is_prompt_learning,
            peft.PromptTuningConfig(num_virtual_tokens=2).is_prompt_learning,
        ],
        "made": type(peft.get_peft_config({"peft_type": "IA3", "target_modules": ["k"]})).__name__,
        "pickled": pickle.loads(pickle.dumps(lora())) == lora(),
        "copied": copy.deepcopy(lora()) == lora(),
        "types": [t.value for t in peft.TaskType],
    }


def adapters() -> dict[str, Any]:
    """Several adapters: what is active, what learns, what comes out."""
    model = adapted()
    model.add_adapter("other", lora(r=3, target_modules=["k_proj"]))
    seen: dict[str, Any] = {"active": [model.active_adapter, model.active_adapters, sorted(model.peft_config)]}
    seen["output"] = logits(model)
    model.set_adapter("other")
    seen["learns"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        seen["disabled"] = logits(model)
    seen["enabled"] = logits(model)
    model.set_adapter("default")
    seen["counts"] = model.get_nb_trainable_parameters()
    seen["mixed batch"] = logits(model, adapter_names=["default", "__base__"])
    model.merge_adapter()
    seen["merged"] = logits(model)
    seen["merged adapters"] = model.get_model_status().merged_adapters
    model.unmerge_adapter()
    model.delete_adapter("other")
    seen["left"] = sorted(model.peft_config)
    seen["unloaded"] = [logits(copy.deepcopy(model).merge_and_unload()), logits(copy.deepcopy(model).unload())]
    seen["pickled"] = logits(pickle.loads(pickle.dumps(model)))
    return seen


def status() -> dict[str, Any]:
    """The status objects."""
    model = adapted()
    whole, first = model.get_model_status(), model.get_layer_status()[0]
    return {
        "model": {k: str(v) for k, v in vars(whole).items() if k != "adapter_model_type"},
        "layer": {k: str(v) for k, v in vars(first).items() if k != "module_type"},
        "layers": [entry.name for entry in model.get_layer_status()],
    }


def files() -> dict[str, Any]:
    """Directories, keys, and what loads return."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", lora())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        listing = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.suffix != ".lock")
        weights = load_peft_weights(folder)
        loaded = PeftModel.from_pretrained(base(), folder)
        trainable = PeftModel.from_pretrained(base(), folder, is_trainable=True)
        result = loaded.load_adapter(f"{folder}/other", "other")
        state = get_peft_model_state_dict(loaded)
        rest = dict(list(state.items())[1:])
        missing = set_peft_model_state_dict(loaded, {**rest, "base_model.model.nothing.lora_A.weight": torch.zeros(2)})
        again = loaded.load_adapter(folder, "default")
        return {
            "listing": [entry for entry in listing if "README" not in entry],
            "keys": sorted(weights),
            "state": sorted(state),
            "in memory": sorted(loaded.state_dict()),
            "output": logits(loaded),
            "learns": [sum(p.requires_grad for p in m.parameters()) for m in (loaded, trainable)],
            "result": [list(result.missing_keys), list(result.unexpected_keys)],
            "missing": [
                len([k for k in missing.missing_keys if "lora" in k and "other" not in k]),
                list(missing.unexpected_keys),
            ],
            "again": [list(again.unexpected_keys)],
            "is eval": [loaded.training, trainable.training],
        }


def errors() -> dict[str, Any]:
    """What goes wrong, by built-in classes, and what is warned of."""
    import peft

    model = adapted()
    with tempfile.TemporaryDirectory() as folder:
        adapted().save_pretrained(folder)
        half = Path(folder) / "half"
        adapted().save_pretrained(half)
        from safetensors.torch import load_file, save_file

        held = load_file(half / "adapter_model.safetensors")
        save_file(dict(sorted(held.items())[1:]), half / "adapter_model.safetensors")
        return {
            "no module": outcome(lambda: peft.get_peft_model(base(), lora(target_modules=["nothing"]))),
            "no default": outcome(
                lambda: peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig())
            ),
            "rank": outcome(lambda: peft.get_peft_model(base(), lora(r=0))),
            "field": outcome(lambda: lora(nothing=1)),
            "task": outcome(lambda: lora(task_type="NOTHING")),
            "bias": outcome(lambda: peft.get_peft_model(base(), lora(bias="sometimes"))),
            "pattern": outcome(lambda: lora(target_modules="q_proj", layers_to_transform=[0])),
            "name": outcome(lambda: model.set_adapter("nothing")),
            "taken": outcome(lambda: model.add_adapter("default", lora())),
            "delete": outcome(lambda: model.delete_adapter("nothing")),
            "folder": outcome(lambda: peft.PeftModel.from_pretrained(base(), f"{folder}/nothing")),
            "other base": outcome(lambda: peft.PeftModel.from_pretrained(_wider(), folder)),
            "a tensor is missing": outcome(lambda: peft.PeftModel.from_pretrained(base(), half)),
            "prompt": outcome(
                lambda: peft.inject_adapter_in_model(peft.PromptTuningConfig(num_virtual_tokens=2), base())
            ),
            "merged twice": outcome(lambda: (model.merge_adapter(), model.merge_adapter())),
            "unmerged twice": outcome(lambda: (model.unmerge_adapter(), model.unmerge_adapter())),
            "classes": [builtins(k) for k in (peft.PeftWarning, peft.NoMatchingPeftModuleError)],
        }


def _wider() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20)
    )


def functions() -> dict[str, Any]:
    """Functions for models that are no PeftModel."""
    import peft
    from peft import functional
    from peft.helpers import check_if_peft_model, rescale_adapter_scale
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
    from peft.utils.other import _get_submodules, get_pattern_key

    model = peft.inject_adapter_in_model(lora(), base(), "one")
    peft.inject_adapter_in_model(lora(target_modules=["k_proj"]), model, "two")
    layer = model.model.layers[0].self_attn.q_proj
    seen: dict[str, Any] = {"active": layer.active_adapters}
    functional.set_adapter(model, "one")
    functional.set_requires_grad(model, ["two"], True)
    seen["learns"] = sorted(n for n, p in model.named_parameters() if p.requires_grad)
    seen["deleted"] = functional.delete_adapter(model, "two", "lora_")
    parent, target, name = _get_submodules(model, "model.layers.0.self_attn.q_proj")
    seen["places"] = [type(parent).__name__, target is layer, name]
    seen["keys"] = [get_pattern_key(["q_proj", r"layers\.0.*"], key) for key in ("a.q_proj", "layers.0.k", "b")]
    seen["targets"] = [
        bool(check_target_module_exists(lora(exclude_modules=["layers.1.self_attn.q_proj"]), key))
        for key in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp")
    ]
    seen["defaults"] = {kind: sorted(names) for kind, names in DEFAULTS.items() if isinstance(names, list)}
    seen["scaling"] = [layer.scaling["one"], layer.r, layer.lora_alpha]
    with rescale_adapter_scale(adapted(), 0.5):
        seen["is a folder of an adapter"] = check_if_peft_model("/nowhere")
    layer.set_scale("one", 3)
    layer.scale_layer(2)
    seen["scaled"] = layer.scaling["one"]
    return seen


def seen() -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for part in (classes, configs, adapters, status, files, errors, functions):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[part.__name__] = part()
    return found
