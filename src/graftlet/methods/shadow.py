# SPDX-License-Identifier: Apache-2.0
"""ShadowPEFT: a second state beside the hidden one.   h += alpha W_up W_down (h - s),   s <- (1 - g) s + g T(h')

A small network of the base's kind gives the first s. Block by block, what sets h apart from s is put into the block's input;
from its output h', two small networks make the next s: T a candidate, and g = sigmoid(G(h')) how much of it. The network's
own loss, by the base's head on the first s, is learnt along.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Excludes, Layers, PeftConfig, Saves, Targets, TaskType
from ..core.around import Block, Held
from ..core.context import Call, current, using
from ..core.method import Spec
from ..errors import CallError, UnsupportedLayerError, UnsupportedOptionError
from ..registry import method
from .parts.backbone import Stack, base_width, blocks_of, mirror, standalone, takes_embeddings, width_of
from .parts.following import follower, followed, follows
