# SPDX-License-Identifier: Apache-2.0
"""`AutoPeftModel*`: an adapter with its base model, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from ..config import PeftConfig, TaskType
from ..core.target import vocabulary
from ..errors import AdapterFileError, AutoClassError, ConfigError, DependencyError, listing
from .peft_model import PeftModel
from .tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

ALLOWED_LIBRARIES = ("transformers", "diffusers", "lerobot")
"""The packages that an adapter's `auto_mapping` may name a model class of."""

_OF_ADAPTERS = ("strict", "allow_pickle", "key_mapping", "verify_base", "manifest")


class AutoPeftModel:
    """Loads the base model that an adapter names, then the adapter onto it."""

    task_type: ClassVar[TaskType | None] = None
    base_class: ClassVar[str | None] = None
    """The transformers class that loads the base; None takes the one that the adapter's config records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AutoClassError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(adapter).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """An adapter on its base.

        A tokenizer saved beside the adapter with more tokens than the base resizes the base's vocabulary to its own.

        Args:
            revision: of the adapter's repository. import_allowlist: more packages that `auto_mapping` may name.
            kwargs: go to the base's `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

        Raises:
            AdapterFileError: no adapter there, or it names no base. ConfigError: the adapter is for another task.
        """
        hub = {k: kwargs[k] for k in ("subfolder", "token", "cache_dir", "local_files_only") if k in kwargs}
        chosen = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        name = chosen.base_model_name_or_path
        if not name:
            raise AdapterFileError(
                f"{pretrained_model_name_or_path} does not say which base it is for; load the base yourself and use "
                "PeftModel.from_pretrained(base, adapter)."
            )
        if cls.task_type is not None and chosen.task_type not in (None, cls.task_type):
            raise ConfigError(
                f"{cls.__name__} loads {cls.task_type} adapters; {pretrained_model_name_or_path} is for "
                f"{chosen.task_type}. "
                f"Use {_auto_for(chosen.task_type)}."
            )
        base_kwargs = {k: v for k, v in kwargs.items() if k not in ("subfolder", *_OF_ADAPTERS)}
        base = cls._base(chosen, import_allowlist or []).from_pretrained(name, revision=chosen.revision, **base_kwargs)
        _fit_vocabulary(base, pretrained_model_name_or_path)
        ours = {k: kwargs[k] for k in ("subfolder", "token", "cache_dir", *_OF_ADAPTERS) if k in kwargs}
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(cls.task_type or chosen.task_type), PeftModel)
        return kind.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, chosen, revision=revision, **ours
        )

    @classmethod
    def _base(cls, config: PeftConfig, allowed: list[str]) -> Any:
        if cls.base_class is not None:
            return getattr(_import("transformers"), cls.base_class)
        if config.task_type in _BASES:
            return getattr(_import("transformers"), base_class_of(str(config.task_type)))
        return _recorded(config.auto_mapping, [*ALLOWED_LIBRARIES, *allowed])


def _recorded(mapping: Any, allowed: list[str]) -> Any:
    """The class that `auto_mapping` names, if it is a model class of a package that may be named."""
    if not isinstance(mapping, dict) or not all(
        isinstance(mapping.get(k), str) for k in ("base_model_class", "parent_library")
    ):
        raise AdapterFileError(
            "the adapter's config has neither a task_type nor a usable auto_mapping, so its base's class is unknown; "
            "load the base yourself and use PeftModel.from_pretrained(base, adapter)."
        )
    library, name = mapping["parent_library"], mapping["base_model_class"]
    if library.partition(".")[0] not in allowed:
        raise AdapterFileError(
            f"the adapter's auto_mapping names the module {library!r}, which is not imported because a file names it. "
            f"Allowed: {listing(allowed)}; if you trust it, add it by import_allowlist=[{library.partition('.')[0]!r}]."
        )
    found = getattr(_import(library), name, None)
    if not isinstance(found, type) or not callable(getattr(found, "from_pretrained", None)):
        raise AdapterFileError(f"the adapter's auto_mapping names {library}.{name}, which is no model class.")
    return found


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DependencyError(
            f"loading the base model needs {name}: {error}. pip install {name.partition('.')[0]}"
        ) from error


def _fit_vocabulary(base: Any, adapter: str | os.PathLike[str]) -> None:
    if not Path(adapter, "tokenizer_config.json").is_file() or not hasattr(base, "resize_token_embeddings"):
        return
    tokenizer = _import("transformers").AutoTokenizer.from_pretrained(adapter)
    if (own := vocabulary(base)) is not None and len(tokenizer) > own:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Language models that continue text."""

    task_type, base_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Language models that answer one text with another."""

    task_type, base_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Classifiers of sequences."""

    task_type, base_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Classifiers of tokens."""

    task_type, base_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Models that mark an answer's start and end."""

    task_type, base_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Models whose hidden states are wanted."""

    task_type, base_class = TaskType.FEATURE_EXTRACTION, "AutoModel"


_AUTO: tuple[type[AutoPeftModel], ...] = (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)


_BASES = {c.task_type: str(c.base_class) for c in _AUTO}


def base_class_of(task: str) -> str:
    """The transformers class that loads a base for adapters of a task type."""
    return _BASES[TaskType(task)]


def _auto_for(task: object) -> str:
    return next((c.__name__ for c in _AUTO if c.task_type == task), "AutoPeftModel")
