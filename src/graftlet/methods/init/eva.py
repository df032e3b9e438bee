# SPDX-License-Identifier: Apache-2.0
"""EVA: explained-variance start (arXiv 2410.07170).   A = the first principal directions of the layer's inputs,  B = 0

Ranks go where variance is: of all layers' directions, the (layers x r) that explain the largest share of their layer's
variance are kept, at most rho r of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...core.host import hosts
from ...core.layer import AdaptedLayer
from ...core.lifecycle import disabled
from ...core.method import View
from ...core.remake import remake
from ...core.target import by_pattern
from ...errors import ConfigError, listing
from ..data.pca import Directions, Triple
from ..data.stream import Data, call, check_all_seen, linear_layers, rank_of, watching
from ..data.turns import ROOM, Record, Shown, can_be_seen_again, key_of, measured, progress, turns
from . import start
from .basic import zero_start

PASSES = 4
"""How often the same data is gone through at most."""


@dataclass(kw_only=True)
class EvaConfig:
    """EVA.

    Args:
        rho: a layer's rank may become up to rho times `r`; 1 keeps all ranks as they are.
        tau: a layer's directions are found when a batch turns none by more than the angle of this cosine.
        use_label_mask, label_mask_value: leave tokens out whose label is this value.
        whiten: divide each direction by the root of its singular value.
        adjust_scaling_factors: change alpha along with a layer's rank, so that alpha / r stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ConfigError(f"EvaConfig: rho={self.rho}; at least 1 is needed.")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"EvaConfig: tau={self.tau}; allowed: 0 to 1.")


@start(
    "eva",
    after=lambda model, name, batches, shown: initialize_lora_eva_weights(
        model, batches, adapter_name=name, show_progress_bar=shown
    ),
)
def eva(p: View, A: Tensor, B: Tensor) -> None:
    """The ordinary start, until `initialize_lora_eva_weights` has seen data."""
    zero_start(p, A, B)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor | None:
    """Which tokens of a batch count, `[rows, tokens]`: neither padding nor masked by their label."""
    if not isinstance(model_input, Mapping):
        return None
    mask, labels = model_input.get("attention_mask"), model_input.get("labels")
    options = peft_config.eva_config or EvaConfig()
    if options.use_label_mask and isinstance(labels, Tensor) and labels.dim() > 1:
        counted = labels != options.label_mask_value
        mask = counted if mask is None else mask.bool() & counted
    return None if mask is None else mask.bool()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor | None, layer_name: str) -> Tensor:
    """A layer's input as rows, those of tokens that count."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    rows = x.reshape(-1, x.shape[-1])
    if model_input is None or model_input.numel() != len(rows):
        return rows
    return rows[model_input.reshape(-1).to(rows.device)]


def forward_fn_dict(model: nn.Module, model_input: Any) -> Any:
    """The model's output for a batch."""
    return call(model, model_input)


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Data,
    peft_config: Any = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: Shown = True,
    cache_file: str | Path | None = None,
    room: float = ROOM,
) -> dict[str, Tensor]:
    """The first directions of each layer's inputs, `[rank, in]`, by the layer's path; a rank may be 0.

    Args:
        model: any module, with or without adapters. dataloader: batches, gone through until every layer has settled,
            four times at most, or a function that runs the model.
        peft_config: which layers, at what rank; read off the adapter `adapter_name` unless given.
        forward_fn: calls the model with a batch. prepare_model_inputs_fn: from a batch and the config, what
            prepare_layer_inputs_fn (one, or one a layer) gets beside a layer's input and path, to give rows `[n, in]`.
        gather_distributed_inputs: see the rows of all processes. show_progress_bar: show how many layers have settled; or a
            function that is told (see `Shown`).
        cache_file: keep what was found here, and read it from here where the file is; before all is found, what was is in
            a file with `.part` behind its name, and is not looked for again.
        room: bytes for directions. Where those of all layers take more, the data is gone through for some at a time.

    Raises:
        ConfigError: the data is empty, or never reaches a layer; or the cache is of another model, other data or options.
    """
    config = cast(Any, model).peft_config[adapter_name] if peft_config is None else peft_config
    options = config.eva_config or EvaConfig()
    sites = linear_layers(model, config)
    most = {k: min(site.features_in, math.floor(rank_of(config, k) * options.rho)) for k, site in sites.items()}
    context: list[Any] = [None]

    def rows_of(path: str, x: Tensor) -> Tensor:
        prepare = prepare_layer_inputs_fn
        prepare = prepare.get(path) if isinstance(prepare, Mapping) else prepare
        rows = x.reshape(-1, x.shape[-1]) if prepare is None else prepare(x, context[0], path)
        return _gathered(rows) if gather_distributed_inputs else rows

    def measure(paths: list[str]) -> Iterator[dict[str, Triple]]:
        found = {k: Directions(most[k], options.tau) for k in paths}

        def run(batch: Any) -> None:
            context[0] = prepare_model_inputs_fn(batch, config) if prepare_model_inputs_fn is not None else None
            left = {k: sites[k].module for k, d in found.items() if not d.settled}
            with watching(left, lambda path, x: found[path].add(rows_of(path, x))), disabled(model):
                batch() if callable(batch) else forward_fn(model, batch)

        return _settling(dataloader, run, found)

    how = {"tau": options.tau, "ranks": most, "masked": options.use_label_mask and options.label_mask_value}
    functions = [forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn]
    named = [getattr(f, "__qualname__", type(f).__name__) for f in functions]
    record = Record(cache_file, key_of(sites, start="eva", by=named, **how), dataloader)
    groups = turns({k: 16 * most[k] * s.features_in for k, s in sites.items()}, room, can_be_seen_again(dataloader))
    with progress(model, len(sites), "eva: layers settled", show_progress_bar) as tell:
        return _shared_out(config, options, measured(record, groups, measure, tell))


def _settling(data: Data, run: Callable[[Any], None], found: dict[str, Directions]) -> Iterator[dict[str, Triple]]:
    """Go through the data, again where it can be gone through again, until no layer's directions turn any more, or it
    has been seen `PASSES` times. Gives what was found of the layers that have settled, and of the others at the end."""
    given: set[str] = set()

    def settled() -> dict[str, Triple]:
        new = {k: d.found for k, d in found.items() if d.settled and k not in given}
        given.update(new)
        return new

    for _ in range(PASSES):  # the same rows again: what turns still then are directions that explain about as much
        before = sum(d.count for d in found.values())
        for batch in [data] if callable(data) else data:
            run(batch)
            yield settled()
            if len(given) == len(found):
                return
        if sum(d.count for d in found.values()) == before:
            break  # data that is used up, or too few rows for a direction
    check_all_seen(found, [k for k, d in found.items() if d.count])
    yield {k: d.found for k, d in found.items() if k not in given}


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def _shared_out(config: Any, options: EvaConfig, found: Mapping[str, Triple]) -> dict[str, Tensor]:
    """Each layer's directions, as many as its share of the whole budget of ranks."""
    budget = sum(rank_of(config, path) for path in found)
    shares = [(float(s), -i, path) for path, (_, _, own) in found.items() for i, s in enumerate(own)]
    chosen = [path for _, _, path in sorted(shares, reverse=True, key=lambda s: s[:2])[:budget]]
    ranks = {path: chosen.count(path) for path in found}
    scaled = {k: V / S.sqrt()[:, None] if options.whiten else V for k, (V, S, _) in found.items()}
    return {path: V[: ranks[path]].contiguous() for path, V in scaled.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Data | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[..., Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[..., Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: Shown = True,
    cache_file: str | Path | None = None,
    room: float = ROOM,
) -> None:
    """Start an adapter's A by what `get_eva_state_dict` finds (or is given), and give its layers their new ranks.

    The config's `rank_pattern` and `alpha_pattern` then say what each layer has. A layer of rank 0 loses the adapter.
    """
    if dataloader is None and eva_state_dict is None:
        raise ConfigError("initialize_lora_eva_weights needs a dataloader, or the eva_state_dict found with one.")
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar, cache_file, room,
        )  # fmt: skip
    layers = {path: h for path, h in hosts(model) if isinstance(h, AdaptedLayer) and adapter_name in h.methods}
    given = {path: _directions(path, h.keys[adapter_name], eva_state_dict) for path, h in layers.items()}
    if missing := [path for path, A in given.items() if A is None]:
        raise ConfigError(f"eva_state_dict has nothing for {listing(missing, 4)}; find it again for this model.")
    for path, layer in layers.items():
        _apply(layer, adapter_name, given[path])  # type: ignore[arg-type]


def _directions(path: str, key: str, found: Mapping[str, Tensor]) -> Tensor | None:
    return found.get(path, found.get(key))


def _apply(layer: AdaptedLayer, name: str, A: Tensor) -> None:
    config: Any = layer.configs[name]
    key, rank = layer.keys[name], len(A)
    was, alpha = rank_of(config, key), by_pattern(config.alpha_pattern, key, config.lora_alpha)
    if rank != was:
        config.rank_pattern = _first(config.rank_pattern, key, rank)
        if rank and (config.eva_config or EvaConfig()).adjust_scaling_factors:
            config.alpha_pattern = _first(config.alpha_pattern, key, alpha * rank / was)
        remake(layer, name)
    p = layer.view(name)
    p.lora_A.copy_(A)
    p.lora_B.zero_()


def _first(patterns: Mapping[str, Any] | None, key: str, value: Any) -> dict[str, Any]:
    """The patterns with a layer's own entry before all others: the first that matches counts."""
    return {key: value, **{k: v for k, v in (patterns or {}).items() if k != key}}
