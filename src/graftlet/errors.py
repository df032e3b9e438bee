# SPDX-License-Identifier: Apache-2.0
"""Every error and warning that a user can meet, each with a code.

A message says what was given, what is allowed, and what to do. The classes also derive from the built-in that callers
of the field already catch (`ValueError`, mostly), so that `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class GraftletError(Exception):
    """Base of every error raised on purpose. `code` names its page."""

    code = "error"

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.args))} [{self.code}]"


class PeftError(GraftletError, ValueError):
    """The reference's name for the base of adapter errors."""


class ConfigError(PeftError, TypeError):
    """A config field has a wrong type or a value that is not allowed."""

    code = "config-invalid"


class UnknownMethodError(PeftError, KeyError):
    """`peft_type` names no registered method."""

    code = "method-unknown"


class NoMatchingPeftModuleError(PeftError):
    """The targets match nothing in the model."""

    code = "target-no-match"


class UnsupportedLayerError(PeftError):
    """A target is a kind of layer on which the method makes no sense."""

    code = "layer-unsupported"


class UnsupportedOptionError(PeftError, NotImplementedError):
    """An option that exists in the format but that this version cannot carry out."""

    code = "option-unsupported"


class AdapterNameError(PeftError):
    """An adapter name that is taken, unknown or unusable."""

    code = "adapter-name"


class AdapterFileError(PeftError, RuntimeError):
    """An adapter's file does not fit: missing, unexpected, misshaped, mistyped or non-finite tensors."""

    code = "adapter-file"


class BaseMismatchError(PeftError):
    """An adapter is put on another base model than the one it was saved with, and that was to be verified."""

    code = "base-mismatch"


class BusyError(PeftError):
    """A model is changed while a call of it, or another change, is in progress on another thread."""

    code = "model-busy"


class MergeError(PeftError):
    """A merge that cannot be done; the weights are as they were."""

    code = "merge-refused"


class ConversionError(PeftError, TypeError):
    """An adapter that cannot be written as LoRA."""

    code = "conversion-refused"


class CallError(PeftError):
    """A model is called with arguments that do not go together."""

    code = "call-invalid"


class DependencyError(GraftletError, ImportError):
    """A feature needs a package that is missing or too old."""

    code = "dependency"


class GraftletWarning(UserWarning):
    """Base of every warning given on purpose."""

    code = "warning"


class PeftWarning(GraftletWarning):
    """The reference's name for the base of adapter warnings."""


class UnknownFieldWarning(PeftWarning):
    """A config file has fields that this version does not know; they are ignored."""

    code = "config-unknown-field"


class BaseMismatchWarning(PeftWarning):
    """An adapter is put on another base model than the one it names."""

    code = "base-mismatch"


class MixedFilesWarning(PeftWarning):
    """An adapter's config and weights are not of the same save."""

    code = "files-mixed"


class KeysWarning(PeftWarning):
    """A lenient load left tensors out."""

    code = "adapter-keys"


class MergeWarning(PeftWarning):
    """A merge or unmerge that does nothing, or has a side effect."""

    code = "merge-state"


class RoundingWarning(PeftWarning):
    """Merging into quantised layers rounds the merged weights."""

    code = "merge-rounded"


class ConversionWarning(PeftWarning):
    """A conversion to LoRA that is not needed."""

    code = "conversion-idle"


class TieWarning(PeftWarning):
    """An adapted layer shares its weight with one that is not adapted."""

    code = "tied-weights"


class EmbeddingWarning(PeftWarning):
    """Embedding layers are, or could not be, saved with the adapter."""

    code = "embedding-saved"


class StartWarning(PeftWarning):
    """A new adapter changes the model before it is trained."""

    code = "start-not-neutral"


class HeadWarning(PeftWarning):
    """A model's own head stays frozen although its task needs it trained."""

    code = "head-frozen"


class PatternWarning(PeftWarning, RuntimeWarning):
    """A name in `target_modules`, or a key of `rank_pattern` or `alpha_pattern`, matches nothing, or what another one has."""

    code = "pattern-no-match"


class CardWarning(PeftWarning):
    """A model card that a person wrote could not be brought up to date."""

    code = "card-unreadable"


class CallWarning(PeftWarning):
    """An argument that has no effect beside a prompt method."""

    code = "call-ignored"


def warn(category: type[GraftletWarning], message: str, stacklevel: int = 3) -> None:
    """Give one warning, its code at the end of the line."""
    warnings.warn(f"{message} [{category.code}]", category, stacklevel=stacklevel)


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """`, did you mean ...?` with the allowed words most like `word`; empty where none is near."""
    close = difflib.get_close_matches(word[:100], list(allowed)[:10_000], n=count, cutoff=0.5)
    return f", did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def shown(value: object, limit: int = 200) -> str:
    """A value as it would be written, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= limit else f"{text[:limit]}..."


def listing(items: Iterable[object], limit: int = 8) -> str:
    """The first items, comma-separated, and how many more there are."""
    words = [str(i) if len(str(i)) <= 300 else f"{str(i)[:300]}..." for i in items]
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more


class TrainingInterrupted(GraftletError, RuntimeError):
    """Training was stopped from the keyboard after a step whose checkpoint is saved."""

    code = "training-interrupted"
