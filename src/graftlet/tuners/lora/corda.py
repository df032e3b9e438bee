# SPDX-License-Identifier: Apache-2.0
"""CorDA's start on data."""

from ...names import placed

__getattr__, __dir__, __all__ = placed(__name__, {"methods.init.corda": "CordaConfig preprocess_corda"})
