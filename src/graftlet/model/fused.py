# SPDX-License-Identifier: Apache-2.0
"""Adapters made before a model's experts were fused: a LoRA pair an expert, `experts.0.w1.lora_A.weight`, put on the stacks.

transformers 5 keeps the experts of a layer as stacks, `experts.gate_up_proj` and `experts.down_proj`, and says which old
weights became which. For each expert a fused matrix of blocks one below the other, each with a pair of its own, has

    A = [A_1; ...; A_n],   B = diag(B_1, ..., B_n),   zero for a block without a pair
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.host import bare
from ..core.target import by_pattern, matches
from ..errors import AdapterFileError, listing
from ..methods.lora import LoraConfig
from ..weights.site import site_of
from ..weights.whole import shape_of

ROOT = "base_model.model."
PLAIN = {"MergeModulelist", "Concatenate"}
"""How transformers may have made a stack for a pair to be carried along: matrices stacked, blocks below each other."""
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<name>[^.]+)$")


@dataclass(frozen=True)
class Pair:
    """A LoRA pair, `A [r, in]` and `B [out, r]`, and what their product is multiplied by."""

    A: Tensor
    B: Tensor
    scaling: float


def concerns(config: PeftConfig, keys: Iterable[str]) -> bool:
    """Whether a file has adapters on single experts."""
    return isinstance(config, LoraConfig) and any(_EXPERT.match(path) for path, _ in _paths(keys))


def converted(model: nn.Module, config: PeftConfig, tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """An adapter's tensors for the model as it is, its config changed along with them; as they are where nothing is fused.

    Raises `AdapterFileError` where the file has experts that cannot be put on the model's stacks; it names them.
    """
    if not isinstance(config, LoraConfig) or not concerns(config, tensors):
        return tensors
    renamed, fusions = _mapping(model)
    tensors = {renamed(key): tensor for key, tensor in tensors.items()}
    there = {name for name, _ in model.named_modules()}
    old = {
        path for path, _ in _paths(tensors) if (m := _EXPERT.match(path)) and m["stack"] in there and path not in there
    }
    if not old:
        return tensors
    if variants := [key for key in tensors if _owner(key) in old and not re.search(r"\.lora_[AB]\.weight$", key)]:
        raise AdapterFileError(f"{origin} has {listing(variants, 3)} on single experts, which are fused in this model.")
    found = {path: _pair(path, config, tensors) for path in old}
    rest = {key: tensor for key, tensor in tensors.items() if _owner(key) not in old}
    stacks = _stacks(model, found, fusions, origin)
    _describe(model, config, rest, stacks)
    return {**rest, **_as_held(model, config, stacks)}


def retarget(model: nn.Module, config: PeftConfig) -> None:
    """Let a config that names parts of single experts (`w1`) mean the stacks that the model has of them, in place.

    So too where it names routers that are bare weights now.
    """
    if not isinstance(config, LoraConfig) or not config.target_modules or isinstance(config.target_modules, str):
        return
    fusions = {target: parts for target, (parts, made) in _mapping(model)[1].items() if made <= PLAIN}
    paths = [name for name, _ in model.named_modules()]
    gone = {name for name in config.target_modules if not any(matches(path, [name]) for path in paths)}
    bared = [path for path in paths if matches(path, list(config.target_modules)) and _is_weight(model, path)]
    config.target_parameters = [*(config.target_parameters or ()), *(f"{path}.weight" for path in bared)] or None
    routers = {name for name in config.target_modules if any(matches(path, [name]) for path in bared)}
    config.target_modules = set(config.target_modules) - gone - routers
    for path, module in model.named_modules():
        for target, parts in fusions.items():
            given = [part for part in parts if part in {name.rpartition(".")[2] for name in gone}]
            if given and target in bare(module)._parameters:
                _target(config, f"{path}.{target}", config.r * len(given), config.lora_alpha / config.r)


def _is_weight(model: nn.Module, path: str) -> bool:
    """Whether a module is no layer of a known kind, and has a matrix for a weight."""
    module = bare(model.get_submodule(path))
    weight = module._parameters.get("weight")
    return site_of(module) is None and weight is not None and len(shape_of(weight)) > 1


def _target(config: LoraConfig, key: str, rank: int, share: float) -> None:
    """Let a config mean a parameter, with a rank of its own and the scaling that `share` of the rank as alpha gives."""
    alpha = share * rank
    config.target_parameters = [*(config.target_parameters or ()), key]
    config.rank_pattern = {re.escape(key): rank, **(config.rank_pattern or {})}
    own = {re.escape(key): int(alpha) if alpha == int(alpha) else alpha}
    config.alpha_pattern = {**own, **(config.alpha_pattern or {})}


def _paths(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((_owner(key), key) for key in keys if ".lora_" in key)


def _owner(key: str) -> str:
    """The module that a key's adapter is on."""
    return key.removeprefix(ROOT).partition(".lora_")[0]


def _pair(path: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Pair:
    A, B = (tensors.get(f"{ROOT}{path}.lora_{f}.weight") for f in "AB")
    if A is None or B is None:
        raise AdapterFileError(f"an expert's pair is not whole: {path} has but one of lora_A and lora_B.")
    alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
    return Pair(A, B, alpha / (math.sqrt(len(A)) if config.use_rslora else len(A)))


def _mapping(model: nn.Module) -> tuple[Any, dict[str, tuple[list[str], set[str]]]]:
    """How old keys are called now, and for each fused parameter its parts' old names and how it is made."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers before 5 fuses nothing
        return lambda key: key, {}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    entries: list[Any] = get_checkpoint_conversion_mapping(kind) or []
    names = [e for e in entries if not isinstance(e, WeightConverter)]
    pairs = [(s, t) for e in names for s, t in zip(e.source_patterns, e.target_patterns, strict=False)]
    fusions = {}
    for entry in (e for e in entries if isinstance(e, WeightConverter)):
        parts = [part_of(source) for source in entry.source_patterns]
        target = entry.target_patterns[0].rpartition(".")[2]
        fusions[target] = (parts, {type(op).__name__ for op in entry.operations})

    def renamed(key: str) -> str:
        for source, target in pairs:
            key = key.replace(source, target) if re.escape(source).replace(r"\.", ".") == source else key
        return key

    return renamed, fusions


def part_of(source: str) -> str:
    """What the source of a rule calls the part of an expert: `w1` of `.experts.*.w1.weight`."""
    return source.removesuffix(".weight").rpartition(".")[2]


def plainly_made(rule: Any) -> bool:
    """Whether a rule makes a stack of experts in a way that their pairs can go along."""
    return {type(op).__name__ for op in rule.operations} <= PLAIN


def _stacks(
    model: nn.Module, found: Mapping[str, Pair], fusions: Mapping[str, tuple[list[str], set[str]]], origin: str
) -> dict[str, dict[str, list[Pair]]]:
    """For each module of experts and each of its parameters, a pair an expert."""
    whose = {part: target for target, (parts, made) in fusions.items() if made <= PLAIN for part in parts}
    groups: dict[str, dict[str, dict[str, dict[int, Pair]]]] = {}
    for path, pair in found.items():
        where = _EXPERT.match(path)
        assert where is not None
        target = whose.get(where["name"])
        if target is None or target not in bare(model.get_submodule(where["stack"]))._parameters:
            raise AdapterFileError(
                f"{origin} has a pair for each expert, such as {path!r}; what became of {where['name']!r} in "
                f"{type(model).__name__}'s fused experts is not known, so it cannot be loaded."
            )
        groups.setdefault(where["stack"], {}).setdefault(target, {}).setdefault(where["name"], {})[
            int(where["number"])
        ] = pair
    return {
        stack: {
            target: _fused(
                f"{stack}.{target}", bare(model.get_submodule(stack))._parameters[target], fusions[target][0], p
            )
            for target, p in targets.items()
        }
        for stack, targets in groups.items()
    }


def _fused(path: str, weight: Any, names: list[str], given: Mapping[str, dict[int, Pair]]) -> list[Pair]:
    """A pair for each expert of a stack, from those of its blocks; all of one rank."""
    shape = shape_of(weight)
    experts, rows = shape[0], shape[1] // len(names)
    missing = {n: sorted(set(range(experts)) - set(pairs)) for n, pairs in given.items()}
    if any(missing.values()):
        raise AdapterFileError(f"{path} is a stack of {experts} experts; the file lacks some: {missing}.")
    made = []
    for number in range(experts):
        pairs = {name: given[name][number] for name in names if name in given}
        scaling = next(iter(pairs.values())).scaling
        blocks = [pairs[n].B * (pairs[n].scaling / scaling) if n in pairs else torch.zeros(rows, 0) for n in names]
        made.append(Pair(torch.cat([p.A for p in pairs.values()]), torch.block_diag(*blocks), scaling))
    if len({(p.A.shape, p.B.shape) for p in made}) > 1 or made[0].B.shape[0] != shape[1]:
        raise AdapterFileError(f"the experts' pairs for {path} {tuple(shape)} differ in shape, or do not fit it.")
    return made


def _describe(
    model: nn.Module, config: LoraConfig, rest: Mapping[str, Tensor], stacks: Mapping[str, Mapping[str, list[Pair]]]
) -> None:
    """Let the config mean what the tensors now are."""
    left = {path for path, _ in _paths(rest)}
    plain = {path for path in left if site_of(bare(model.get_submodule(path))) is not None}
    names = [] if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    kept = [n for n in names if any(matches(path, [n]) for path in plain)]
    config.target_modules = kept if all(matches(path, kept) for path in plain) else sorted(plain)
    config.target_parameters = [*(config.target_parameters or ()), *sorted(f"{path}.weight" for path in left - plain)]
    for stack, targets in stacks.items():
        for target, pairs in targets.items():
            rank = len(pairs[0].A)
            over = math.sqrt(rank) if config.use_rslora else rank
            _target(config, f"{stack}.{target}", rank, pairs[0].scaling * over / rank)
    config.lora_dropout = 0.0  # nothing goes into a stack that could be dropped


def _as_held(model: nn.Module, config: LoraConfig, stacks: Mapping[str, Mapping[str, list[Pair]]]) -> dict[str, Tensor]:
    """The stacks' tensors by their keys: those of one module stand inside each other, in the model's order."""
    made = {}
    for stack, targets in stacks.items():
        order = [n for n in bare(model.get_submodule(stack))._parameters if n in targets]
        for depth, target in enumerate(reversed(order)):
            pairs = targets[target]
            place = f"{ROOT}{stack}.{'base_layer.' * depth}"
            made[f"{place}lora_A.weight"] = torch.cat([p.A for p in pairs])
            made[f"{place}lora_B.weight"] = stacked([p.B for p in pairs])
    return made


def stacked(factors: Sequence[Tensor]) -> Tensor:
    """The experts' B, `[out, r]` each, as a stack's: `[out, r x experts]`, the experts varying fastest."""
    return torch.stack([*factors]).permute(1, 2, 0).flatten(1).contiguous()
