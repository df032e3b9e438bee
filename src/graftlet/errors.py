# SPDX-License-Identifier: Apache-2.0
"""Every error and warning that a user can meet, each with a code of its own; `graftlet explain CODE` shows its page.

A message says what was given, what is allowed, and what to do. The classes also derive from the built-in that callers
of the field already catch (`ValueError`, mostly), so that `except ValueError` keeps working. A narrower class derives from
the wider one, so that a filter on that goes for both.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable
from typing import TypeVar


class GraftletError(Exception):
    """Base of every error raised on purpose. `code` names its page."""

    code = "error"

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.args))} [{self.code}]"


class PeftError(GraftletError, ValueError):
    """The reference's name for the base of adapter errors."""

    code = "adapter-error"


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


class AutoClassError(PeftError, OSError):
    """A class is made directly that only `from_pretrained` can make."""

    code = "auto-class"


class DependencyError(GraftletError, ImportError):
    """A feature needs a package that is missing or too old."""

    code = "dependency"


class GraftletWarning(UserWarning):
    """Base of every warning given on purpose."""

    code = "warning"


class PeftWarning(GraftletWarning):
    """The reference's name for the base of adapter warnings."""

    code = "adapter-warning"


class UnknownFieldWarning(PeftWarning):
    """A config file has fields that this version does not know; they are ignored."""

    code = "config-unknown-field"


class BaseMismatchWarning(PeftWarning):
    """An adapter is put on another base model than the one it names."""

    code = "base-differs"


class VocabularyWarning(BaseMismatchWarning):
    """An adapter is put on a model with another number of tokens than it was trained with."""

    code = "vocabulary-differs"


class MixedFilesWarning(PeftWarning):
    """An adapter's config and weights are not of the same save."""

    code = "files-mixed"


class KeysWarning(PeftWarning):
    """A lenient load left tensors out."""

    code = "adapter-keys"


class MergeWarning(PeftWarning):
    """A merge or unmerge that does nothing."""

    code = "merge-idle"


class UnmergedWarning(MergeWarning):
    """Adapters that were merged are unmerged, since others are made active."""

    code = "merge-undone"


class RoundingWarning(PeftWarning):
    """Merging into quantised layers rounds the merged weights."""

    code = "merge-rounded"


class ConversionWarning(PeftWarning):
    """A conversion to LoRA that is not needed."""

    code = "conversion-idle"


class TieWarning(PeftWarning):
    """An adapted layer shares its weight with one that is not adapted."""

    code = "tied-weights"


class TieIdleWarning(TieWarning):
    """`ensure_weight_tying` is asked for where no adapted layer shares a weight."""

    code = "tie-idle"


class PartedWarning(TieWarning):
    """Two layers that shared a weight have one each from now on."""

    code = "tie-parted"


class EmbeddingWarning(PeftWarning):
    """Embedding layers are saved with the adapter, as the vocabulary was resized."""

    code = "embedding-saved"


class EmbeddingMissingWarning(EmbeddingWarning):
    """Embedding layers are to be saved, and the model names none."""

    code = "embedding-missing"


class StartWarning(PeftWarning):
    """A new adapter changes the model before it is trained."""

    code = "start-not-neutral"


class HeadWarning(PeftWarning):
    """A model's own head stays frozen although its task needs it trained."""

    code = "head-frozen"


class HeadMissingWarning(HeadWarning):
    """A task whose head is trained along, and a model without a module that is called so."""

    code = "head-missing"


class PatternWarning(PeftWarning, RuntimeWarning):
    """A name in `target_modules`, or a key of `rank_pattern` or `alpha_pattern`, matches nothing."""

    code = "pattern-no-match"


class PatternOrderWarning(PatternWarning):
    """A key of `rank_pattern` or `alpha_pattern` stands after a shorter one that takes all it would."""

    code = "pattern-hidden"


class CardWarning(PeftWarning):
    """A model card that a person wrote could not be brought up to date."""

    code = "card-unreadable"


class CallWarning(PeftWarning):
    """An argument that has no effect."""

    code = "call-ignored"


class ReachWarning(CallWarning):
    """A call without what an adapter goes by runs as the base."""

    code = "call-as-base"


class RecompileWarning(CallWarning):
    """A model that is compiled already will be compiled again."""

    code = "compile-again"


STRICT, SILENCE = "GRAFTLET_STRICT", "GRAFTLET_SILENCE"
"""Variables of the environment: 1 for warnings that are errors; codes, with commas between, of those not to be given."""

_silenced: list[str] = []
_shown: set[str] = set()


def strict() -> bool:
    """Whether the environment asks for errors where there would be warnings."""
    return os.environ.get(STRICT, "") not in ("", "0")


def warn(category: type[GraftletWarning], message: str, stacklevel: int = 3) -> None:
    """Give one warning, its code at the end of the line; the same line once, unless a filter of `warnings` is for it.

    Raises the warning itself where `GRAFTLET_STRICT` is set, unless its code is silenced or a filter ignores it.
    """
    text = f"{message} [{category.code}]"
    if category.code in (*_silenced, *os.environ.get(SILENCE, "").replace(" ", "").split(",")):
        return
    action = _action(category, text)
    if strict() and action != "ignore":
        raise category(text)
    if action is None and text in _shown:
        return
    _shown.add(text)
    warnings.warn(text, category, stacklevel=stacklevel)


def _action(category: type[GraftletWarning], text: str) -> str | None:
    """What the first filter does that is for such a warning, wherever it is given; None where there is none."""
    for action, pattern, kind, module, line in warnings.filters:
        if module is None and not line and issubclass(category, kind) and (pattern is None or _match(pattern, text)):
            return action
    return None


def _match(pattern: object, text: str) -> bool:
    return text.startswith(pattern) if isinstance(pattern, str) else bool(pattern.match(text))  # type: ignore[attr-defined]


class silence:
    """Give no warnings of these codes from now on; as a `with` block, only inside it.

    Raises `CallError` for a code that no warning has.
    """

    def __init__(self, *codes: str) -> None:
        known = {kind.code for kind in (GraftletWarning, *below(GraftletWarning))}
        for code in codes:
            if code not in known:
                raise CallError(
                    f"no warning has the code {code!r}{nearest(code, known)} Codes: {listing(sorted(known), 60)}."
                )
        self.codes = codes
        _silenced.extend(codes)

    def __enter__(self) -> None:
        """The codes are silenced already."""

    def __exit__(self, *_: object) -> None:
        for code in self.codes:
            _silenced.remove(code)


T = TypeVar("T", bound=type)


def below(kind: T) -> list[T]:
    """All classes that derive from one, as they are defined."""
    return [c for child in kind.__subclasses__() for c in (child, *below(child))]


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
