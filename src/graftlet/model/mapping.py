# SPDX-License-Identifier: Apache-2.0
"""The two ways in: `get_peft_model` wraps a model, `inject_adapter_in_model` changes it in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from ..config import PeftConfig
from ..core import lifecycle
from ..core.around import surrounds
from ..core.host import standing
from ..core.method import Method
from ..core.target import walk
from ..errors import ConfigError, HeadWarning, NoMatchingPeftModuleError, listing, warn
from ..registry import lookup
from . import fused
from .bare import attend, tuner_in
from .mixed import PeftMixedModel
from .origin import base_name
from .peft_model import PeftModel
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """A `PeftModel` (of the class that `task_type` asks for) around `model`, with a new adapter ready to train.

    Args:
        mixed: return a `PeftMixedModel`; methods stand side by side in any other model too.
        autocast_adapter_dtype: keep adapters of half-precision layers in float32.
        revision: the base's revision, for the record. low_cpu_mem_usage: make the tensors on the meta device.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError, AdapterNameError: the model is as it was.
    """
    peft_config.base_model_name_or_path = base_name(model)
    if revision is not None:
        peft_config.revision = revision
    _warn_of_head(model, peft_config)
    kind = PeftMixedModel if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(peft_config.task_type), PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _warn_of_head(model: nn.Module, config: PeftConfig) -> None:
    name = type(model).__name__
    if (
        config.task_type is None
        and not config.modules_to_save
        and name.endswith(("Classification", "QuestionAnswering"))
    ):
        warn(
            HeadWarning,
            f"{name} has a head of its own, which stays frozen and unsaved without task_type: "
            "give task_type='SEQ_CLS' (or TOKEN_CLS, QUESTION_ANS), or name the head in modules_to_save.",
            stacklevel=4,
        )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model in place and return it: no wrapper around the model, adapters in its layers' dtypes.

    The new adapter is the active one from then on; what learns stays as it is.

    state_dict: adapt just the layers that have tensors here, whatever `target_modules` says.
    """
    if peft_config.is_prompt_learning:
        raise ConfigError(f"{peft_config.peft_type} acts on a model's inputs, not in its layers; use get_peft_model.")
    method = lookup(peft_config.peft_type).method
    if issubclass(method, Method) and method.rehearse is not Method.rehearse:
        raise ConfigError(f"{peft_config.peft_type} runs the whole model before each call; use get_peft_model.")
    if surrounds(method):
        raise ConfigError(f"{peft_config.peft_type} goes around a model's whole call as well; use get_peft_model.")
    if state_dict is not None:
        target_keys(peft_config, model, state_dict)
    else:
        fused.retarget(model, peft_config)
    tuner = tuner_in(model)
    held = lifecycle.adapters_of(model)
    known = getattr(model, "peft_config", None)
    tuner.peft_config = dict(known) if isinstance(known, dict) else dict.fromkeys(held, peft_config)
    tuner.inject(peft_config, adapter_name, meta=low_cpu_mem_usage, widen=False, learn=True)
    for host in standing(model)[0]:
        if host.merged:
            host.set_adapter(adapter_name)  # what is merged would go on acting
        host.follow([adapter_name])
    attend(tuner)
    model.peft_config = tuner.peft_config  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model


def target_keys(config: PeftConfig, model: nn.Module, keys: Iterable[str]) -> None:
    """Let a config target the modules that have an adapter's tensors among `keys`."""
    places = {p.path: p.bare for p in walk(model)}
    found: set[str] = set()
    for key in keys:
        key = key.removeprefix("base_model.model.")
        path = next((p for p in _above(key) if p in places), None)
        if path is not None and key[len(path) + 1 :] not in places[path]._parameters and ".token_adapter." not in key:
            found.add(path)
    if not found:
        raise NoMatchingPeftModuleError(
            f"state_dict has no key of an adapter on a module of {type(model).__name__}: {listing(keys, 3) or 'empty'}."
        )
    config.target_modules = found
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def _above(key: str) -> Iterator[str]:
    """The paths above a key, the longest first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key
