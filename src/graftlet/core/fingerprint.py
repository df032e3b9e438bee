# SPDX-License-Identifier: Apache-2.0
"""What tells a base model by: its layers' names and shapes, and a few of its weights.

It takes the same few reads whatever the model's size, and is comparable across dtypes and back ends: shapes are those that
layers have before they are quantised, and of the weights those are sampled that are kept as plain numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from ..errors import AdapterFileError
from ..weights.site import Parameter, site_of
from ..weights.whole import in_parts, shape_of, whole
from .host import AdapterHost
from .target import vocabulary, walk

KEY = "base_fingerprint"
"""In a file's metadata."""
TENSORS, NUMBERS = 16, 8
"""How many weights are sampled, and how many numbers of each."""
TOLERANCE = 2.0**-6
"""How far numbers may be apart, as a share of them: a few roundings to bfloat16."""
ALLOWED = 0.02
"""The share of the sampled numbers that may be further apart."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Fingerprint:
    """layers: the digest of all layers' names and shapes. sample: numbers of some weights, by name."""

    layers: str
    sample: Mapping[str, list[float]]

    def text(self) -> str:
        """It as it stands in a file."""
        return json.dumps({"layers": self.layers, "sample": self.sample}, sort_keys=True, separators=(",", ":"))

    def difference(self, other: Fingerprint, without: Sequence[str] = ()) -> str:
        """In which way another base differs, in words; empty where it does not.

        without: paths of modules whose numbers do not count, since an adapter stands in for them.
        """
        if self.layers != other.layers:
            return f"their layers differ in names or shapes ({self.layers[:8]} and {other.layers[:8]})"
        pairs = [
            (a, b) for name in self.sample.keys() & other.sample.keys()
            if not any(name.startswith(f"{path}.") for path in without)
            for a, b in zip(self.sample[name], other.sample[name], strict=False)
        ]  # fmt: skip
        apart = sum(abs(a - b) > TOLERANCE * max(abs(a), abs(b)) + 1e-7 for a, b in pairs)
        if apart > ALLOWED * len(pairs):
            return f"their weights differ in {apart} of {len(pairs)} places compared ({self.short} and {other.short})"
        return ""

    @property
    def short(self) -> str:
        """Eight characters to tell it by."""
        return sha256(self.text().encode()).hexdigest()[:8]


def parsed(text: str, origin: str) -> Fingerprint:
    """A fingerprint as it stands in a file. Raises `AdapterFileError` where it is none."""
    try:
        held = json.loads(text)
        sample = {str(name): [float(v) for v in values] for name, values in held["sample"].items()}
        return Fingerprint(str(held["layers"]), sample)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise AdapterFileError(f"{origin} records its base in a way that cannot be read; it is damaged.") from error


@torch.no_grad()
def taken(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model as it stands, below whatever adapters it has."""
    tokens, made, weights = vocabulary(model), sha256(), dict[str, Tensor]()
    for name, shape, weight in sorted(_weights(model), key=lambda found: found[0]):
        # a vocabulary may be resized; that is seen to elsewhere
        made.update(f"{name} {['*' if n == tokens else n for n in shape]}\n".encode())
        if weight is not None and weight.dtype in _FLOATS and not weight.is_meta and shape_of(weight).numel():
            weights[name] = weight
    return Fingerprint(
        made.hexdigest(), {name: _numbers(weights[name], tokens) for name in _spread(list(weights), TENSORS)}
    )


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Tensor | None]]:
    """Every weight's name, its shape before quantisation, and itself where it is kept as it is."""
    for place in walk(model):
        site = site_of(place.bare)
        for name, parameter in place.bare._parameters.items():
            if parameter is None:
                continue
            plain = parameter.dtype in _FLOATS and (type(parameter) is nn.Parameter or in_parts(parameter))
            if plain:
                yield f"{place.path}.{name}", tuple(shape_of(parameter)), parameter
            elif site is not None and not isinstance(site, (Parameter, AdapterHost)) and name == site.name:
                yield f"{place.path}.{name}", tuple(site.kept(torch.empty(site.shape, device="meta")).shape), None


def _spread(items: list[str], count: int) -> list[str]:
    """So many of them, evenly spread."""
    return items if len(items) <= count else [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _numbers(weight: Tensor, tokens: int | None) -> list[float]:
    """Numbers of a weight at places that depend on its shape alone; of an embedding, of its first rows."""
    weight = whole(weight).detach()
    if tokens is not None and weight.shape[0] == tokens:
        weight = weight[: min(tokens, 8)]
    flat = weight.reshape(-1)
    step = max(1, (flat.numel() - 1) // max(1, NUMBERS - 1))
    return [round(v, 9) for v in flat[::step][:NUMBERS].double().tolist()]
