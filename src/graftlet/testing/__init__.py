# SPDX-License-Identifier: Apache-2.0
"""The laws of adapters, for methods inside the package and outside it.

from graftlet.testing import check_method
check_method(MyMethod, settings={"r": 2})
"""
