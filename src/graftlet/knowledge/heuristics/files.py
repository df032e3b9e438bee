# SPDX-License-Identifier: Apache-2.0
"""Files: of other bases, of older writers."""

from __future__ import annotations

from ..facts import Facts
from . import collected, heuristic


@heuristic(
    "An adapter on another base than its own",
    when="The adapter's file has no sample of its base's weights: it was written by another library, or by an older version.",
    do="Load the base by the name in the config. Load and save the adapter once, on that base, to have it recorded.",
    effect="On another base of the same shapes the adapter's change of the logits was off by {off:.0%}; taking "
    "the sample takes "
    "{milliseconds:.0f} ms (SmolLM2's shape: 135 million weights)",
    links=("base-mismatch", "base-differs", "serve"),
    evidence=("graftlet.core.fingerprint:taken", "graftlet.model.origin:check_base"),
    told=False,
)
def verify_the_base(facts: Facts) -> bool:
    """Shapes fit, names may fit, and the numbers are others. Nothing shows but worse answers."""
    return not facts.base_recorded


@heuristic(
    "Adapter files of older writers",
    when="The config's `peft_version` is missing or older than the format's present one.",
    do="Load it as it is. Saving writes the present format.",
    effect="A config with {fields} fields, as a writer without the other {later} would leave it: outputs differ "
    "by {difference:.0e} "
    "from those of the present file",
    links=("config-unknown-field", "adapter-file", "fused-experts"),
    evidence=("graftlet.config:PeftConfig.from_pretrained", "graftlet.model.fused:concerns"),
    told=False,
)
def older_adapter_files(facts: Facts) -> bool:
    """Fields were added over the years; each has the default under which an older file means what it meant."""
    return facts.old_file


PAGES = collected(globals())
