# SPDX-License-Identifier: Apache-2.0
"""All that decides what a training step takes, resolved and checked."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...config import PeftConfig
from ...errors import ConfigError, listing, nearest
from .devices import Device
from .packed import FORMATS

Dtype = torch.dtype | str

OPTIMISERS = ("adamw", "adamw_fused", "adamw_8bit", "sgd", "adafactor", "loraplus", "lorafa", "riemannian")
HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of transformers that makes a model for a task."""


@dataclass(frozen=True)
class Setup:
    """One training step. adapter None: all of the model is trained. See `estimate` for the rest."""

    config: Any
    adapter: PeftConfig | None
    device: Device
    batch: int = 1
    sequence: int = 1024
    accumulation: int = 1
    optimiser: str = "adamw"
    optimiser_options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    checkpointing: bool = False
    quantisation: str | None = None
    double: bool = True
    skip: tuple[str, ...] = ()
    prepared: bool = True
    optimised: bool = False
    padding: bool = False
    attention: str | None = None

    def but(self, **changes: Any) -> Setup:
        """The same with some of it otherwise; of the adapter's config, `adapter={field: value}`."""
        if isinstance(changes.get("adapter"), dict):
            made = copy.deepcopy(self.adapter)
            for name, value in changes["adapter"].items():
                setattr(made, name, value)
            changes["adapter"] = made
        return replace(self, **changes)

    @property
    def task(self) -> str:
        """The task that the adapter's config names, or that the model's config is of."""
        if self.adapter is not None and self.adapter.task_type is not None:
            return str(self.adapter.task_type)
        ends = {
            "ForSequenceClassification": "SEQ_CLS",
            "ForTokenClassification": "TOKEN_CLS",
            "ForQuestionAnswering": "QUESTION_ANS",
        }
        named = next(iter(getattr(self.config, "architectures", None) or ()), "")
        found = next((task for end, task in ends.items() if named.endswith(end)), None)
        return found or ("SEQ_2_SEQ_LM" if getattr(self.config, "is_encoder_decoder", False) else "CAUSAL_LM")


def checked(setup: Setup) -> Setup:
    """The setup, or a `ConfigError` that says what of it cannot be estimated."""
    for name in ("batch", "sequence", "accumulation"):
        value = getattr(setup, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"estimate: {name}={value!r}; a whole number from 1 on is needed.")
    if setup.optimiser not in OPTIMISERS:
        raise ConfigError(
            f"estimate: optimiser={setup.optimiser!r}{nearest(setup.optimiser, OPTIMISERS) or ' is not known.'} "
            f"What it keeps is known of: {listing(OPTIMISERS, 20)}."
        )
    if setup.quantisation is not None and setup.quantisation not in FORMATS:
        raise ConfigError(
            f"estimate: quantisation={setup.quantisation!r}; what it takes is known of: {listing(FORMATS)}, or None."
        )
    if setup.quantisation and setup.adapter is None:
        raise ConfigError("estimate: a base in few bits cannot be trained itself; give an adapter_config.")
    limit = getattr(setup.config, "max_position_embeddings", None)
    learnt = getattr(setup.config, "model_type", "") and getattr(setup.config, "rope_parameters", None) is None
    if isinstance(limit, int) and learnt and setup.sequence > limit:
        raise ConfigError(f"estimate: sequence={setup.sequence}, but the model has places for {limit} tokens.")
    return setup


def as_dtype(value: Dtype | None, name: str) -> torch.dtype | None:
    """A floating-point dtype by itself or by its name."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"estimate: {name}={value!r}; a floating-point dtype such as 'bfloat16' is needed.")
    if found is None and value is not None:
        raise ConfigError(f"estimate: {name}={value!r} is no dtype of torch; such as 'bfloat16'.")
    return found


def model_config(given: Any) -> Any:
    """A config of transformers: as it is, of a folder, a GGUF file or the hub, or of a dictionary with `model_type`.

    Raises `ConfigError` where there is none.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(given, PretrainedConfig):
        return copy.deepcopy(given)
    if isinstance(given, dict):
        values = dict(given)
        kind = values.pop("model_type", None)
        try:
            return AutoConfig.for_model(kind, **values)
        except ValueError as error:
            raise ConfigError(f"estimate: model_type={kind!r} is none that transformers knows.") from error
    if not isinstance(given, (str, Path)):
        raise ConfigError(
            f"estimate: model_config is a {type(given).__name__}; a config of transformers, a dictionary, a folder or "
            "an id of the hub is needed."
        )
    path = Path(given).expanduser()
    gguf = path.suffix == ".gguf"
    where: dict[str, Any] = {"gguf_file": path.name} if gguf else {}
    try:
        return AutoConfig.from_pretrained(str(path.parent if gguf else given), **where)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(f"estimate: no config of a model is found at {str(given)!r}: {said}") from error
