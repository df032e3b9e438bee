# SPDX-License-Identifier: Apache-2.0
"""How much an adapter's files may ask for. They come from strangers, so reading them takes bounded time and memory.

Each can be raised where a file that is trusted needs more: `graftlet.limits.MAX_CONFIG_BYTES = 2**26`.
"""

from __future__ import annotations

MAX_CONFIG_BYTES = 10 * 2**20
"""The size of `adapter_config.json`."""

MAX_CONFIG_LEVELS = 32
"""How deep lists and objects of a config may stand in each other."""

MAX_HEADER_BYTES = 32 * 2**20
"""The header of a safetensors file: it holds a hundred thousand tensors' names."""

MAX_KEY_CHARS = 2_000
"""The name of one tensor in a file."""

MAX_DIMENSIONS = 16
"""The dimensions of one tensor in a file."""

MAX_PATTERN_CHARS = 100_000
"""The length of one regex in a config."""

QUICK_PATTERN_STEPS = 100_000
"""A regex that cannot take more steps than this on a path is matched by `re`; others by sets of positions."""

MAX_PATTERN_STEPS = 200_000
"""The steps that matching one regex with one path may take by sets of positions."""

MAX_ALL_STEPS = 10_000_000
"""And all such regexes with all paths of a model together."""

MAX_PATTERN_ENTRIES = 100_000
"""The keys of `rank_pattern` and its like."""

MAX_MATCHES = 5_000_000
"""How many times the keys of such a table may be tried, for all layers together."""

MAX_BLOCKS = 10_000
"""The blocks that `layer_replication` may stack."""

FREE_ELEMENTS = 2**26
"""The numbers that a saved adapter's config may ask for on any base."""

ELEMENTS_SHARE = 16
"""And beyond those, how many times the base's own."""

FOLLOW_LINKS = False
"""Whether an adapter's file may be a link that leads out of its directory."""

STRICT_LOADS = True
"""Whether `from_pretrained` and `load_adapter` refuse files that do not fit whole; their `strict` says it for one load."""
