# SPDX-License-Identifier: Apache-2.0
"""An adapter's tensors made anew on a layer it stands on, after its config has changed."""

from __future__ import annotations

import torch

from .inject import build
from .layer import AdaptedLayer, Branch
from .method import View


def remake(layer: AdaptedLayer, name: str) -> None:
    """Resolve an adapter's settings again and start its tensors as they now are; what learns stays so."""
    method, config, key = layer.methods[name], layer.configs[name], layer.keys[name]
    settings = method.settings(layer.site, config, key)
    view = View(config, layer.site, torch.float32, {**settings, "key": key})
    branch = Branch(method, config, key, settings, method.params(layer.site, view))
    widened = layer.view(name).dtype != layer.site.dtype
    build(branch, layer.site, meta=False, widen=widened, init=True)
    learning = name in layer._learning
    layer.forget(name)
    layer.attach(name, branch)
    layer.set_requires_grad(name, learning)
