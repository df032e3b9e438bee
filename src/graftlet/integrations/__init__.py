# SPDX-License-Identifier: Apache-2.0
"""Models with adapters in the hands of others: Trainers that do not know them, and engines on several devices."""

from __future__ import annotations

from ..names import placed

__getattr__, __dir__, __all__ = placed(
    __name__, {"train.checkpoints": "AdapterCheckpoints", "integrations.sharding": "sent shard"}
)
