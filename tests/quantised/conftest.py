# SPDX-License-Identifier: Apache-2.0
"""A back end that is missing here is skipped with the reason, in every test that is given it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from .backends import Backend
from .formats import Format


def pytest_collection_modifyitems(items: Iterable[Any]) -> None:
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if missing := next((v.missing for v in given if isinstance(v, (Backend, Format)) and v.missing), None):
            item.add_marker(pytest.mark.skip(reason=missing))
