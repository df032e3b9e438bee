# SPDX-License-Identifier: Apache-2.0
"""What works on any method's model."""

from ..names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"core.replication": "replicate_layers"})
