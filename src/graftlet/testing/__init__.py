# SPDX-License-Identifier: Apache-2.0
"""The laws of adapters, for methods inside the package and outside it.

from graftlet.testing import check_method
check_method(MyMethod, settings={"r": 2})
"""

from __future__ import annotations

from .benches import BENCHES, Bench
from .case import Case
from .check import check_method
from .laws import LAWS

__all__ = ["BENCHES", "LAWS", "Bench", "Case", "check_method"]
