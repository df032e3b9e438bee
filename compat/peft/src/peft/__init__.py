# SPDX-License-Identifier: Apache-2.0
"""Graftlet under the reference's names: `import peft` in programs that were written for PEFT 0.21.

Every module and name is made when it is first asked for; `_places` lists them all.
"""

from __future__ import annotations

from . import _alone, _places, _serve

__version__ = "0.21.2+graftlet.1"

_alone.check(__file__, __version__)
_serve.begin(__name__, _places.PLACES)
_serve.lenient()
