# SPDX-License-Identifier: Apache-2.0
"""A model with adapters in its layers, by configs and names: what `PeftModel.base_model` is, and usable alone."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import ConfigError, PartedWarning, warn
from ..registry import lookup
from . import combine as combining
from . import fingerprint, lifecycle, replication, ties
from .around import surrounds
from .block import BlockHost
from .collecting import uncollected
from .combine import Fit
from .context import current
from .dense import dequantised
from .host import base_parameters, check_known, check_name, home_of, hosts
from .inject import Plan
from .layer import AdaptedLayer
from .method import Allocator, Method
from .planning import plan
from .target import vocabulary
from .tensors import renamed
from .traffic import Traffic, changes


class BaseTuner(nn.Module):
    """Wraps `model` (as `self.model`) and keeps the configs of the adapters injected into it.

    Attributes that are not its own are the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.shared_in: list[nn.Module] = [self]  # where stands what an adapter's layers share; in a list: no submodule
        self.peft_config: dict[str, PeftConfig] = {}
        self.pending: tuple[Plan, Before] | None = None
        self.vocabulary = vocabulary(model)
        self.fingerprint = fingerprint.taken(model)
        self.carried: tuple[str, ...] = ()  # arguments of a call that methods here read (`Method.carries`)
        self.reading: dict[str, AdaptedLayer] = {}  # a layer of each adapter that goes by tokens (`Method.reach`)
        self.rehearsing: dict[str, AdaptedLayer] = {}  # those that look at a call before it (`Method.rehearse`)
        # a block of each adapter with a say in the whole call (`Block.around`)
        self.surrounding: dict[str, BlockHost] = {}
        self.controls: dict[str, tuple[AdaptedLayer | BlockHost, str]] = {}  # functions of methods (`Method.controls`)
        self.penalised: list[str] = []  # adapters whose methods have a `penalty`
        self._allocators: dict[str, Allocator | None] = {}
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            self.inject(config, name, meta=low_cpu_mem_usage)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            if name in (controls := self.__dict__.get("controls", {})):
                layer, adapter = controls[name]
                if isinstance(layer, BlockHost):
                    held = layer.view(next((n for n in layer.active_adapters if n in layer.adapters), adapter))
                    return functools.partial(getattr(layer.method, name), held, self.model)
                return functools.partial(getattr(layer.methods[adapter], name), layer.view(adapter))
            return getattr(self.model, name)

    @property
    def traffic(self) -> Traffic:
        """Who calls the model, and who changes it."""
        return home_of(self.model).traffic

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._call(args, kwargs)
        if self.training and self.penalised and isinstance(getattr(outputs, "loss", None), Tensor):
            for penalty in self.penalties():
                outputs.loss = outputs.loss + penalty.to(outputs.loss)
        return outputs

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        for name, block in self.surrounding.items():
            if name in block.acting(current()):
                return block.method.around(block.view(name), self.model, args, kwargs)
        return self.model(*args, **kwargs)

    def penalties(self) -> list[Tensor]:
        """What the active adapters add to the loss: their distance from what their methods assume of them."""
        found = []
        for name in self.penalised:
            acting = [h for _, h in hosts(self.model) if isinstance(h, AdaptedLayer) and name in h.acting(current())]
            for kind in dict.fromkeys(type(h.methods[name]) for h in acting):
                own = [h for h in acting if type(h.methods[name]) is kind]
                penalty = own[0].methods[name].penalty([h.view(name) for h in own])
                found += [] if penalty is None else [penalty]
        return found

    def update_and_allocate(self, global_step: int) -> None:
        """Let methods that shrink an adapter as it learns do so: after each optimizer step, before gradients are cleared."""
        for name, allocator in self.allocators().items():
            if name in self.active_adapters:
                allocator.update_and_allocate(global_step)

    def allocators(self) -> dict[str, Allocator]:
        """What shrinks the adapters here, by their names."""
        for name in self.peft_config:
            if name in self._allocators:
                continue
            held = {h.keys[name]: h for _, h in hosts(self.model) if isinstance(h, AdaptedLayer) and name in h.methods}
            method = next((h.methods[name] for h in held.values()), None)
            self._allocators[name] = None if method is None else method.allocator(held, name)
        return {n: a for n, a in self._allocators.items() if a is not None and n in self.peft_config}

    @changes
    @uncollected()
    def inject(
        self,
        config: PeftConfig,
        name: str,
        meta: bool = False,
        widen: bool = True,
        init: bool = True,
        learn: bool = False,
    ) -> Plan:
        """Put an adapter into the model; the first one is active from then on. All of it happens, or none.

        meta, widen, init: see `Plan.build`. Without `init` the caller fills the tensors and then calls `settle`, or
        `abandon`. learn: the adapter's tensors learn although another one is active. What other adapters and the base
        learn stays as it is; the first adapter freezes the base.
        """
        held = lifecycle.adapters_of(self.model)
        check_name(name, [*self.peft_config, *held])
        if config.bias != "none" and (
            rival := next((n for n, c in self.peft_config.items() if c.bias != "none"), None)
        ):
            raise ConfigError(
                f"adapter {rival!r} trains the base's biases already; only one adapter may (bias={config.bias!r})."
            )
        self._meet(config)
        adapted, active = bool(held), self.active_adapters or [name]
        before = Before(self.model)
        try:
            before.replicated = replication.replicate(self.model, config.layer_replication, adapted)
            made = plan(self.model, config, name, self.shared_in[0]).build(meta, widen, init).apply()
        except BaseException:
            before.restore()
            raise
        self.peft_config[name] = config
        self._note(made)
        if made.targets is not None and "target_modules" in config.__dataclass_fields__:
            config.target_modules = made.targets  # as every reader of the file will want it: written out
        if not adapted:
            lifecycle.mark_trainable(self.model, {})
        made.activate(active, not config.inference_mode and (learn or name in active or not init))
        for bias in lifecycle.biases(self.model, config, name).values() if name in active else ():
            bias.requires_grad = not config.inference_mode
        self.pending = (made, before)
        if init:
            try:
                self.settle()
            except BaseException:
                self.abandon()
                raise
        return made

    def _note(self, made: Plan) -> None:
        """What an adapter's methods, variants included, ask of a call and add to its loss."""
        name, methods = made.name, made.methods()
        self.carried = tuple(dict.fromkeys([*self.carried, *(c for m in methods for c in m.carries)]))
        self.penalised += [name] if any(type(m).penalty is not Method.penalty for m in methods) else []
        layers = [i.host for i in made.items if isinstance(i.host, AdaptedLayer)]
        if reading := [h for h in layers if type(h.methods[name]).reach is not Method.reach]:
            self.reading[name] = reading[0]
        if rehearsing := [h for h in layers if type(h.methods[name]).rehearse is not Method.rehearse]:
            self.rehearsing[name] = rehearsing[0]
        blocks = [i.host for i in made.items if isinstance(i.host, BlockHost)]
        if blocks and surrounds(type(blocks[0].method)):
            self.surrounding[name] = blocks[0]
        self.controls.update({c: (blocks[0], name) for h in blocks[:1] for c in h.method.controls})
        self.controls.update({c: (h, name) for h in reversed(layers) for c in h.methods[name].controls})

    def _meet(self, config: PeftConfig) -> None:
        """Raise where an adapter cannot stand beside those that are here."""
        picky = config.picky
        for held in [c for c in self.peft_config.values() if picky or c.picky]:
            for one, other in ((config, held), (held, config)):
                method = lookup(one.peft_type).method
                if issubclass(method, Method):
                    method().meet(one, other)

    def settle(self) -> None:
        """Finish an injection whose tensors are filled by now."""
        if self.pending is not None:
            self.pending[0].settle()
        self.pending = None

    def abandon(self) -> None:
        """Take back an injection whose tensors could not be filled: the model is as it was before."""
        if self.pending is not None:
            made, before = self.pending
            made.undo()
            before.restore()
            self._forget(made.name)
        self.pending = None

    @property
    def prefix(self) -> str:
        """What the names of an adapter's tensors begin with: the first adapter's."""
        return next((lookup(config.peft_type).prefix for config in self.peft_config.values()), "")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter could be written as LoRA: what it does can be told by the weights."""
        held = [host for _, host in hosts(self.model) if adapter_name in host.adapters]
        layers = [host for host in held if isinstance(host, AdaptedLayer)]
        return bool(layers) and not any(host.methods[adapter_name].unmergeable for host in layers)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters, in order."""
        return next((h.active_adapters for _, h in hosts(self.model) if h.active_adapters), [])

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @changes
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these the active adapters."""
        lifecycle.set_adapter(self.shared_in[0], adapter_name, inference_mode)
        if any(config.bias != "none" for config in self.peft_config.values()):
            lifecycle.mark_trainable(self.model, {} if inference_mode else self.peft_config)

    def enable_adapter_layers(self) -> None:
        lifecycle.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        lifecycle.enable_adapters(self.model, False)

    @changes
    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name. Raises `AdapterNameError`, the model as it was."""
        check_known([old], list(self.peft_config))
        check_name(new, [n for n in self.peft_config if n != old])
        lifecycle.rename_adapter(self.shared_in[0], old, new)
        renamed(self.peft_config, old, new)
        self.penalised = [new if n == old else n for n in self.penalised]
        for held in (self.reading, self.rehearsing, self.surrounding):
            renamed(held, old, new)
        self.controls = {c: (layer, new if n == old else n) for c, (layer, n) in self.controls.items()}
        self._allocators.pop(old, None)

    @changes
    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and its config."""
        lifecycle.delete_adapter(self.shared_in[0], adapter_name)
        self._forget(adapter_name)

    def _forget(self, name: str) -> None:
        self.peft_config.pop(name)
        self.penalised = [n for n in self.penalised if n != name]
        self._allocators.pop(name, None)
        self.reading.pop(name, None)
        self.rehearsing.pop(name, None)
        self.surrounding.pop(name, None)
        self.controls = {c: held for c, held in self.controls.items() if held[1] != name}

    @changes
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        energy: float | None = None,
    ) -> dict[str, Fit]:
        """Make an adapter of others, weighted; weights may be negative. It is frozen, and not active.

        Args:
            combination_type: "exact", the weighted sum of the changes of the weights, of the rank that it has, or of
                `svd_rank`, or of as high a rank as holds the share `energy` of its squared singular values. "svd": the same,
                by default of the highest rank among the adapters. "cat": the factors side by side. "ties_svd",
                "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd": pruned to `density` first. "linear", "ties",
                "dare_linear", "dare_ties", "magnitude_prune": A and B each for themselves, which brings products of one
                adapter's A with another's B. None: "svd" where the adapters have factors, "linear" where their tensors may
                be added up (IA3), else "exact".
            svd_clamp: cut off what is beyond this quantile of the factors' entries. svd_driver: of CUDA's decomposition.
            svd_full_matrices: kept for callers of the reference; it has no effect on the result.
            majority_sign_method: elect a sign by the "total" or by the "frequency" of signs.

        Returns for each layer the rank, and the distance from the sum as a share of it. Raises `ConfigError`, `MergeError`
        and `AdapterNameError`, the model as it was.
        """
        check_known(adapters, list(self.peft_config))
        if len(weights) != len(adapters) or len(set(adapters)) != len(adapters):
            raise ConfigError(f"{len(weights)} weights for adapters {adapters}; one a different adapter is needed.")
        kind = combination_type or combining.usual(self.model, adapters)
        cut = combining.Cut(svd_rank, energy, svd_clamp, svd_driver)
        shares = dict(zip(adapters, weights, strict=True))
        how = combining.Combination(shares, kind, cut, density, majority_sign_method)
        return combining.combine(self, how, adapter_name)

    @changes
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Write adapters into the base weights; `unmerge_adapter` brings the weights back."""
        lifecycle.merge(self.model, safe_merge, adapter_names)

    @changes
    def unmerge_adapter(self) -> None:
        lifecycle.unmerge(self.model)

    @changes
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base model with the adapters in its weights and no wrapper left.

        dequantize: make quantised layers ordinary ones first, so that nothing of the adapters is lost by rounding.

        Raises `MergeError`, the model as it was, where an adapter cannot be merged.
        """
        if dequantize:
            return self._merge_dense(progressbar, safe_merge, adapter_names)
        groups = replication.tied_after(self.model)
        lifecycle.merge(self.model, safe_merge, adapter_names, _progress if progressbar else iter)
        replication.separate(self.model)
        model = self.unload()
        if not ties.retie(model, groups):
            _untie(model)
        return model

    def _merge_dense(self, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        merged = dict.fromkeys(n for _, host in hosts(self.model) for n in host.merged_adapters)
        if merged:
            lifecycle.unmerge(self.model)
        wanted = self.active_adapters if adapter_names is None else adapter_names
        with dequantised(self.model):
            return self.merge_and_unload(progressbar, safe_merge, list(merged | dict.fromkeys(wanted)))

    @changes
    def unload(self) -> nn.Module:
        """The base model without its adapters and wrappers."""
        lifecycle.unload(self.model)
        replication.restore(self.model)
        return self.model


class Before:
    """What a model was before an injection, apart from what the plan itself takes back."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flags = [(p, p.requires_grad) for p in base_parameters(model)]
        self.replicated = False

    def restore(self) -> None:
        """Bring it back."""
        if self.replicated:
            replication.restore(self.model)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def _untie(model: nn.Module) -> None:
    """Tell a model's config that its input and output embeddings differ from now on, so that saving keeps both."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        warn(
            PartedWarning,
            "the adapter changed one of two tied weights; they are separate now (tie_word_embeddings=False).",
            4,
        )


def _progress(items: list[Any]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc="merging", unit="layer")
