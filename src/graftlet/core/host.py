# SPDX-License-Identifier: Apache-2.0
"""What every wrapper of a module shares: which adapters it holds, which are active, which are merged; their names."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..errors import AdapterNameError, MergeError, UnmergedWarning, listing, nearest, warn
from ..weights.product import Weighted
from .context import BASE, Call, Home, current
from .tensors import Box, Common


class AdapterHost(Weighted):
    """A module that stands in for another and carries adapters: which are there, which are active, which are merged.

    transparent: what is inside the module stood in for has the keys that it has without the wrapper.
    """

    transparent: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._active: list[str] = []
        self._learning: set[str] = set()
        self._disabled = False
        self.merged_adapters: list[str] = []
        self.home = Home()

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters held here."""
        raise NotImplementedError

    @property
    def base(self) -> nn.Module:
        """The module that is stood in for."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self.off(current())

    def holds(self, name: str) -> bool:
        """Whether an adapter is held here."""
        return name in self.adapters

    def off(self, call: Call | None) -> bool:
        """Whether the base acts alone."""
        return self._disabled or (call is not None and call.choice(self.home) == ())

    def acting(self, call: Call | None = None) -> list[str]:
        """The adapters that a forward applies, in order: held here and active, or chosen for the call.

        Active ones that are in the weight already are left out; chosen ones act on the weight as it was before.
        """
        if self.off(call):
            return []
        if call is not None and (chosen := call.choice(self.home)) is not None:
            return [n for n in chosen if self.holds(n)]
        return [n for n in self._active if self.holds(n) and n not in self.merged_adapters]

    def pure(self, call: Call | None) -> bool:
        """Whether a forward is on the base as it was before any merge."""
        return self._disabled or (call is not None and call.choice(self.home) is not None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; they alone can be trained, and not in inference mode."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own: dict[str, Any] = self.__dict__  # past torch's own way to attributes, which is slow
        if own["merged_adapters"] and names != self._active:
            warn(
                UnmergedWarning,
                f"adapters {listing(self.merged_adapters)} were merged; unmerged to activate {listing(names)}.",
            )
            self.unmerge()
        own["_active"] = names
        for name in [n for n in own["_learning"] if inference_mode or n not in names]:
            self.set_requires_grad(name, False)
        for name in names:
            self.set_requires_grad(name, not inference_mode)

    def follow(self, active: list[str]) -> None:
        """Take over which adapters are active; what learns stays as it is."""
        self._active = list(active)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active adapters act and learn, or let the base layer act alone, also where they are merged."""
        self.set_disabled(not enabled)
        for name in self._active if enabled else self.adapters:
            self.set_requires_grad(name, enabled)

    def set_disabled(self, disabled: bool) -> None:
        """Let the base layer act alone, or not; what learns stays as it is."""
        self._disabled = disabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was active, another one held here becomes so."""
        if adapter_name not in self.adapters:
            return
        if adapter_name in self.merged_adapters:
            raise MergeError(f"adapter {adapter_name!r} is merged; unmerge before deleting it.")
        self.forget(adapter_name)
        if adapter_name in self._active:
            left = [n for n in self._active if n != adapter_name] or self.adapters[:1]
            self.set_adapter(left)

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Of the adapters asked for (the active ones unless named), those held here and not merged yet."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.adapters and n not in self.merged_adapters]

    # what a kind of host gives

    def check_together(self, names: list[str]) -> None:
        """Raise where these adapters cannot be active at the same time."""

    def forget(self, name: str) -> None:
        raise NotImplementedError

    def set_requires_grad(self, name: str, requires_grad: bool) -> None:
        """Let an adapter's parameters here learn, or freeze them."""
        if not self.holds(name):
            return
        for parameter in self.parameters_of(name):
            parameter.requires_grad = requires_grad
        (self._learning.add if requires_grad else self._learning.discard)(name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name; which adapters act and learn, and their order, stay as they are."""
        self._active = [new if n == old else n for n in self._active]
        self.merged_adapters = [new if n == old else n for n in self.merged_adapters]
        self._learning = {new if n == old else n for n in self._learning}

    def parameters_of(self, name: str) -> Iterable[nn.Parameter]:
        """What an adapter trains here."""
        return self.trainable(name).values()

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters that an adapter trains here, by their key in the file."""
        raise NotImplementedError

    def state(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors that go to the file, by their key below this module."""
        raise NotImplementedError

    def pack(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors as they go to the file."""
        return self.state(name)

    def unpack(self, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors for an adapter here, by key, as they are held."""
        return given

    def assign(self, name: str, key: str, value: Tensor) -> None:
        """Put a tensor of the file into its place, in the place's dtype and on the layer's device."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Where a file's tensors for an adapter stand: each key below this module in the file, and in `state_dict()`."""
        named = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        places = {id(tensor): path for path, tensor in reversed(named)}
        return {key: places[id(tensor)] for key, tensor in self.state(adapter_name).items()}

    def check_loaded(self, name: str) -> None:
        """Raise `AdapterFileError` where an adapter's tensors, just loaded, hold what they must not."""

    def part(self, shared: set[int]) -> None:
        """Stop sharing a weight (one of these tensors, by id) with other layers, before it is written."""

    @property
    def parted(self) -> bool:
        """Whether it has stopped sharing a weight that nothing was written to since."""
        return False

    def merge(self, safe_merge: bool = True, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError

    def unmerge(self) -> None:
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        """The innermost module stood in for."""
        return bare(self)


class Shell(nn.Module):
    """A wrapper that only gives its adapted layer a name of its own in the keys: `embed_tokens.token_adapter`."""

    def __init__(self, name: str, layer: AdapterHost) -> None:
        super().__init__()
        self.inner_name = name
        self.add_module(name, layer)

    @property
    def inner(self) -> AdapterHost:
        return cast(AdapterHost, self._modules[self.inner_name])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules") or {}
            if not modules:
                raise
            return getattr(next(iter(modules.values())), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    @property
    def original_module(self) -> nn.Module:
        """The module stood in for."""
        return self.inner.base

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """As the adapted layer's, below this module."""
        held = self.inner.adapter_state_dict_load_map(adapter_name)
        return {f"{self.inner_name}.{key}": f"{self.inner_name}.{place}" for key, place in held.items()}


def home_of(model: nn.Module) -> Home:
    """What tells the layers of a model from those of others."""
    if "_home" not in model.__dict__:
        model.__dict__["_home"] = Home()
    return model.__dict__["_home"]


def home_within(model: nn.Module) -> Home:
    """What the adapted layers of a model have in common, by whichever of its wrappers it is named."""
    return next((host.home for _, host in hosts(model)), None) or home_of(model)


def bare(module: nn.Module) -> nn.Module:
    """The model's own module, below every wrapper that stands in for it."""
    while isinstance(module, (AdapterHost, Shell)):
        module = module.inner if isinstance(module, Shell) else module.base
    return module


def hosts(model: nn.Module, alone: str | None = None) -> Iterator[tuple[str, AdapterHost]]:
    """Every wrapper of a model with its path, outermost first; the paths as if one adapter were `alone` in the model."""
    return ((n, m) for n, m in _walk(model, alone) if isinstance(m, AdapterHost))


class Standing:
    """The wrappers and shared boxes of a model, as a walk found them; known again for as long as its tree is the same.

    It keeps nothing alive, and a copy of a model starts without.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        found = [] if model is None else _standing(model)
        self.modules = [weakref.ref(m) for m in found]
        self.children = _children(found)
        self.hosts = [i for i, m in enumerate(found) if isinstance(m, AdapterHost)]
        self.commons = [i for i, m in enumerate(found) if isinstance(m, Common)]

    def of(self, model: nn.Module) -> list[Any] | None:
        """The modules that were found, if the model's tree is still the one that was walked."""
        found: list[Any] = [known() for known in self.modules]
        if not found or found[0] is not model or None in found or _children(found) != self.children:
            return None
        return found

    def __deepcopy__(self, memo: Any) -> Standing:
        return Standing()

    def __reduce__(self) -> tuple[type[Standing], tuple[()]]:
        return Standing, ()


def standing(model: nn.Module) -> tuple[list[AdapterHost], list[Common]]:
    """Every wrapper, and every tensor box that layers share, without their paths: quicker than `hosts` and `commons`."""
    known, found = _walked(model)
    return [found[i] for i in known.hosts], [found[i] for i in known.commons]


def _walked(model: nn.Module) -> tuple[Standing, list[Any]]:
    """What is known of a model, found anew where its tree is another by now; and its modules."""
    known = model.__dict__.get("_standing")
    if known is None or (found := known.of(model)) is None:
        model.__dict__["_standing"] = known = Standing(model)
        found = known.of(model)
    assert found is not None
    return known, found


def _standing(model: nn.Module) -> list[nn.Module]:
    """All modules, in the order of `_walk`, but neither the boxes of adapters nor what is in those that layers share."""
    found: dict[int, nn.Module] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and id(module) not in found and type(module) is not Box:
            found[id(module)] = module
            if not isinstance(module, Common):
                left += reversed(module._modules.values())
    return list(found.values())


def _children(found: Sequence[nn.Module]) -> list[list[int]]:
    return [list(map(id, held.values())) if (held := module._modules) else [] for module in found]


def commons(model: nn.Module) -> Iterator[tuple[str, Common]]:
    """Every tensor box that layers share, with its path."""
    return ((n, m) for n, m in _walk(model) if isinstance(m, Common))


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, but not the boxes of adapters."""
    for module in _walked(model)[1]:
        yield from module.modules() if isinstance(module, Common) else (module,)


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are no adapter's in a box, each once: as many, whatever the number of adapters."""
    found = (p for module in modules(model) for p in module._parameters.values() if p is not None)
    return list({id(p): p for p in found}.values())


def _walk(model: nn.Module, alone: str | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, as `named_modules` gives them, but not into the boxes of adapters."""
    stack, seen = [("", model)], set[int]()
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        children = [(n, m) for n, m in module._modules.items() if m is not None and type(m) is not Box]
        within = module.base if isinstance(module, AdapterHost) and _passed(module, alone) else None
        stack += [(path if m is within else below(path, n), m) for n, m in reversed(children)]


def _passed(host: AdapterHost, alone: str | None) -> bool:
    """Whether a wrapper is no level of its own in the path of what it wraps."""
    return host.transparent or (alone is not None and alone not in host.adapters)


def below(path: str, child: str) -> str:
    """The path of a child; the wrapper that `torch.compile` puts around a module is no level of its own."""
    if child == COMPILED:
        return path
    return f"{path}.{child}" if path else child


COMPILED = "_orig_mod"
"""Where `torch.compile` keeps the module that it wraps."""


DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""Names that some systems keep for devices."""


def check_name(name: object, taken: list[str]) -> str:
    """An adapter name that can be a key and a folder, and is free; `AdapterNameError` with the nearest usable one."""
    if not isinstance(name, str) or not name:
        raise AdapterNameError(f"adapter name {name!r}: a non-empty string is needed.")
    if why := _unusable(name):
        usable = "".join("_" if _bad(c) else c for c in name)[:40].strip("_ ") or "adapter"
        usable = f"{usable}_" if usable.casefold() in DEVICES else usable
        raise AdapterNameError(
            f"adapter name {name[:120]!r} {why} and could not be a folder and a key; use {usable!r}."
        )
    if name == BASE:
        raise AdapterNameError(f"adapter name {BASE!r} stands for the base model in adapter_names; choose another.")
    if name in taken:
        raise AdapterNameError(f"adapter {name!r} exists already; delete it first, or choose another name.")
    return name


def _bad(letter: str) -> bool:
    return letter in './\\:*?"<>|' or ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000


def _unusable(name: str) -> str:
    """Why a name could be no folder somewhere; empty where it could."""
    if bad := sorted({c for c in name if _bad(c)}):
        return f"has {listing(map(repr, bad))}"
    if len(name) > 100 or len(name.encode()) > 200:
        return "is longer than 100 characters, or 200 bytes,"
    if name != name.strip():
        return "begins or ends in a space"
    return "is a device of some systems" if name.casefold() in DEVICES else ""


def check_known(names: list[str], known: list[str]) -> None:
    """Raise `AdapterNameError` where a name is none of `known`."""
    for name in names:
        if name not in known:
            raise AdapterNameError(
                f"no adapter {name!r}{nearest(str(name), known)} Present: {listing(known) or 'none'}."
            )
