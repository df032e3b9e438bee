# SPDX-License-Identifier: Apache-2.0
"""What an adapter directory is, read off its two files: the base is not loaded, and no dense delta is ever made."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import PeftConfig
from ..errors import ConfigError
from ..files import find_file, read_tensors
from ..pair import WEIGHTS
from ..patterns import fullmatch
from .page import page, paragraph, section, table, tiles
from .plots import bars, heat, lines

Facts = dict[str, Any]

_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


def read_anatomy(source: str | Path) -> Facts:
    """The facts of an adapter directory: method, targets, sizes, and for each layer its norms and ranks.

    A layer of low-rank factors has `norm`, the Frobenius norm of its delta; `effective_rank`, the exponential of the
    entropy of its singular values (1 to `rank`; of a stack of experts, their mean); and `singular_values`, those of all
    experts. Every tensor has its own norm.

    Raises:
        AdapterFileError: no adapter, or a file that cannot be read.
    """
    config = PeftConfig.from_pretrained(source)
    path = find_file(source, WEIGHTS)
    tensors = _tensors(path)
    values = json.loads(config.to_json())
    layers = _layers(tensors, values)
    return {
        "path": str(source),
        "method": str(config.peft_type),
        "task": None if config.task_type is None else str(config.task_type),
        "base": config.base_model_name_or_path,
        "targets": values.get("target_modules"),
        "config": {k: v for k, v in values.items() if v not in (None, False, [], {})},
        "bytes": path.stat().st_size,
        "parameters": sum(t.numel() for t in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "layers": layers,
        "tensors": [_tensor(name, tensor) for name, tensor in tensors.items()],
    }


def _tensors(path: Path) -> dict[str, Tensor]:
    return dict(sorted(read_tensors(path).items(), key=lambda pair: _natural(pair[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _tensor(name: str, tensor: Tensor) -> Facts:
    return {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "norm": float(torch.linalg.vector_norm(tensor.double())) if tensor.is_floating_point() else None,
    }


def read_changes(source: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What an adapter adds, by layer, as factors B `[cells, out, r]` and A `[cells, r, columns]` in float64, a cell an
    expert of a stack; another tensor, `[1, 1, n]`, by its name, as the pair of a one and itself."""
    tensors, config = _tensors(find_file(source, WEIGHTS)), json.loads(PeftConfig.from_pretrained(source).to_json())
    found, taken = dict[str, tuple[Tensor, Tensor]](), set[str]()
    for layer, names in _pairs(tensors):
        A, B = _cells(layer, tensors[names[0]], tensors[names[1]], config)
        found[layer] = B * _scaling(layer, A.shape[1], config), A
        taken |= set(names)
    for name in tensors.keys() - taken:
        if tensors[name].is_floating_point():
            found[name] = torch.ones(1, 1, 1, dtype=torch.float64), tensors[name].double().reshape(1, 1, -1)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _pairs(tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The layers of low-rank factors, with the names of A and B."""
    for name in tensors:
        for a, b in _FACTORS.items():
            if f".{a}" in name and (other := name.replace(f".{a}", f".{b}")) in tensors:
                yield name.split(f".{a}")[0].removeprefix("base_model.model."), (name, other)


def _layers(tensors: dict[str, Tensor], config: Facts) -> list[Facts]:
    return [_low_rank(layer, tensors[a], tensors[b], config) for layer, (a, b) in _pairs(tensors)]


def _low_rank(layer: str, a: Tensor, b: Tensor, config: Facts) -> Facts:
    A, B = _cells(layer, a, b, config)
    scaling = _scaling(layer, A.shape[1], config)
    values = abs(scaling) * spectrum(A, B)
    ranks = [effective_rank(own) for own in values]
    return {
        "name": layer,
        "rank": A.shape[1],
        "scaling": scaling,
        "norm": float(torch.linalg.vector_norm(values)),
        "effective_rank": sum(ranks) / len(ranks),
        "singular_values": [float(v) for v in values.flatten().sort(descending=True).values],
        "shape": [*([len(A)] if len(A) > 1 else []), B.shape[1], A.shape[2]],
    }


def _cells(layer: str, a: Tensor, b: Tensor, config: Facts) -> tuple[Tensor, Tensor]:
    """A `[cells, r, columns]` and B `[cells, out, r]`, float64: one cell, or one an expert of a stack.

    A stack has as many times the adapter's rank in rows of A, and in columns of B, which go through the experts first.
    """
    A, B = a.double().flatten(1), b.double().reshape(b.shape[0], -1)
    rank = _expert_rank(layer, len(A), config)
    return A.reshape(-1, rank, A.shape[1]), B.reshape(len(B), rank, -1).permute(2, 0, 1)


def _expert_rank(layer: str, rows: int, config: Facts) -> int:
    """The rank of each expert, where the layer is a module whose bare parameters are adapted; else all rows of A."""
    module = re.sub(r"(\.base_layer)+$", "", layer)
    held = [t for t in config.get("target_parameters") or () if _matches(re.escape(t.rpartition(".")[0]), module)]
    patterns = config.get("rank_pattern") or {}
    for target in held:
        path = f"{module}.{target.rpartition('.')[2]}"
        rank = next((r for pattern, r in patterns.items() if _matches(pattern, path)), config.get("r", rows))
        if rows % rank == 0:
            return rank
    return rows


def spectrum(a: Tensor, b: Tensor) -> Tensor:
    """The singular values of `b @ a`, largest first, float64. a: `[..., r, in]`; b: `[..., out, r]`.

    From the QR factors of both: nothing larger than the factors is made.
    """
    right = torch.linalg.qr(a.mT.double(), mode="r").R
    left = torch.linalg.qr(b.double(), mode="r").R
    return torch.linalg.svdvals(left @ right.mT)


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of singular values taken as shares; 0 for a delta of zero."""
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def _scaling(layer: str, rank: int, config: Facts) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if _matches(k, layer)), config.get("lora_alpha", rank))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matches(pattern: str, layer: str) -> bool:
    try:
        return fullmatch(rf"(.*\.)?({pattern})", layer)
    except ConfigError:
        return False


def anatomy_page(facts: Facts) -> str:
    """The facts as one HTML page with plots."""
    layers = facts["layers"]
    figures = [
        (f"{facts['parameters']:,}", "parameters"),
        (f"{facts['bytes'] / 2**20:.2f} MiB", "size"),
        (str(len(layers) or len(facts["tensors"])), "adapted layers" if layers else "tensors"),
    ]
    parts = [paragraph(f"{facts['method']} on {facts['base'] or 'an unnamed base'}", soft=True), tiles(figures)]
    if layers:
        parts.append(section("Size of the change, ‖ΔW‖", _plot(layers, "norm", "‖ΔW‖")))
        parts.append(section("Effective rank", _plot(layers, "effective_rank", "effective rank")))
        rows = [[x["name"], str(x["rank"]), f"{x['norm']:.4g}", f"{x['effective_rank']:.2f}"] for x in layers]
        parts.append(section("Layers", table(["layer", "rank", "‖ΔW‖", "effective rank"], rows, numbers=3)))
    else:
        rows = [[t["name"], "×".join(map(str, t["shape"])), t["dtype"], _short(t["norm"])] for t in facts["tensors"]]
        parts.append(section("Tensors", table(["tensor", "shape", "type", "norm"], rows, numbers=1)))
    settings = [[k, json.dumps(v)] for k, v in facts["config"].items()]
    return page(
        f"Adapter {Path(facts['path']).name}", *parts, section("Configuration", table(["field", "value"], settings))
    )


def _short(norm: float | None) -> str:
    return "" if norm is None else f"{norm:.4g}"


def maps(layers: Sequence[Facts]) -> list[tuple[str, str]]:
    """Heat maps of the sizes of the changes and of their effective ranks, a row a kind of layer, a column a depth.

    Empty where the names have no depth, or two layers stand at one place.
    """
    places = [(x, _depth(x["name"]), x["name"].rsplit(".", 1)[-1]) for x in layers]
    known = {(kind, depth): x for x, depth, kind in places if depth is not None}
    if not known or len(known) < len(layers):
        return []
    kinds = list(dict.fromkeys(kind for _, _, kind in places))
    depths = sorted({depth for _, depth in known})
    return [
        (
            title,
            heat(
                kinds, list(map(str, depths)), [[known.get((k, d), {}).get(key) for d in depths] for k in kinds], label
            ),
        )
        for title, key, label in (
            ("Size of the change, ‖ΔW‖", "norm", "‖ΔW‖"),
            ("Effective rank of the change", "effective_rank", "effective rank"),
        )
    ]


def _depth(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _plot(layers: Iterable[Facts], key: str, label: str) -> str:
    """A line a kind of layer over the depth, where the names have one; else a bar a layer."""
    series: dict[str, dict[int, float]] = defaultdict(dict)
    listed = list(layers)
    for layer in listed:
        depth = _depth(layer["name"])
        if depth is not None:
            series[layer["name"].rsplit(".", 1)[-1]].setdefault(depth, layer[key])
    if sum(map(len, series.values())) == len(listed):
        return lines(series, "layer", label)
    return bars([x["name"] for x in listed], [x[key] for x in listed], label)
