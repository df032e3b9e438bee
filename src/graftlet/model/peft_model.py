# SPDX-License-Identifier: Apache-2.0
"""`PeftModel`: a model with adapters, from first injection to hub.

Methods on layers live in `base_model`, a `BaseTuner` around the model. Prompt methods leave the model as it is; their
encoders stand beside it in `prompt_encoder`, and `prompting` puts what they make into each call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from typing_extensions import Self

from .. import limits
from ..config import PeftConfig
from ..core import fingerprint, lifecycle
from ..core.context import BASE, Call, current, using
from ..core.host import check_known, check_name, home_of, hosts, standing
from ..core.lifecycle import relink
from ..core.prompt import ROWS
from ..core.target import vocabulary
from ..core.traffic import calling, changes
from ..core.tuner import BaseTuner, Before
from ..errors import AdapterFileError, AdapterNameError, CallError, ConfigError, MergeWarning, listing, warn
from ..files import check_apart
from ..weights.whole import in_parts, is_writer
from . import bring, card, embeddings, generation, prompted, prompting, reach, save, status
from .many import ManyAdapters
from .origin import base_name, check_base, upload
from .parts import as_rows, carry_context, near, with_copies
from .plain import as_plain


class PeftModel(ManyAdapters, nn.Module):
    """A base model with one adapter or several.

    Args:
        model: any `nn.Module`. It is adapted in place and reachable through `get_base_model()`.
        peft_config: the first adapter's config. adapter_name: its name.
        autocast_adapter_dtype: keep adapters of half-precision layers in float32.
        low_cpu_mem_usage: make the adapter's tensors on the meta device, to be loaded.

    Raises:
        NoMatchingPeftModuleError, UnsupportedLayerError, ConfigError, AdapterNameError: the model is as it was.
    """

    _hf_peft_config_loaded = True  # transformers' Trainer asks whatever is quantised whether adapters are on it

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        _init: bool = True,
    ) -> None:
        super().__init__()
        check_name(adapter_name, [])
        self.peft_type = peft_config.peft_type
        self._prompt_configs: dict[str, PeftConfig] = {}
        self._active: list[str] = [adapter_name]
        if peft_config.is_prompt_learning:
            self.base_model = model
            prompting.attach(self, adapter_name, peft_config, loading=not _init)
        else:
            self.base_model = tuner = BaseTuner(model, {})
            with bring.brought(self, peft_config, autocast_adapter_dtype):
                tuner.inject(peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype, _init)
            bring.lead(self, adapter_name)
        home_of(self.get_base_model())  # a call adds nothing to the model
        if prompted.checkpoints(model):
            self.prepare_model_for_gradient_checkpointing(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # what is there

    @property
    def tuner(self) -> BaseTuner | None:
        """The wrapper around the model that holds adapters on layers; None for prompt methods."""
        base = self.base_model
        return base if isinstance(base, BaseTuner) else None

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configs of all adapters, by name."""
        return self._prompt_configs if self.tuner is None else self.tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters' names, in order; for prompt methods, those chosen by `using` on this thread."""
        tuner = self.tuner
        if tuner is None and (chosen := self._chosen()):
            return list(chosen)
        return list(self._active) if tuner is None else tuner.active_adapters or list(self._active)

    @property
    def active_adapter(self) -> str:
        """The active adapter's name; the first where there are several."""
        if not (names := self.active_adapters):
            raise AdapterNameError("the model has no adapter any more; add or load one.")
        return names[0]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether a call on this thread would be anything but the base's."""
        if self.tuner is None:
            return bool(self._active) and not self._prompt_off
        return any(host.acting(current()) or (host.merged and not host.disable_adapters) for _, host in hosts(self))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter could be written as LoRA (`convert_to_lora`)."""
        return self.tuner is not None and self.tuner.supports_lora_conversion(adapter_name)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def _fingerprint(self) -> fingerprint.Fingerprint:
        """The base's, from before there were adapters, which may have moved a part of it into themselves."""
        return fingerprint.taken(self.get_base_model()) if self.tuner is None else self.tuner.fingerprint

    def get_base_model(self) -> nn.Module:
        """The model itself, with whatever wrappers its layers have."""
        return self.base_model if self.tuner is None else self.tuner.model

    # adapters come and go

    @changes
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        _init: bool = True,
    ) -> None:
        """Put another adapter beside those there are. The active one stays active.

        Raises:
            AdapterNameError: the name is taken or cannot be one. ConfigError: prompt and layer methods are mixed.
        """
        check_name(adapter_name, list(self.peft_config))
        if peft_config.is_prompt_learning != (self.tuner is None):
            raise ConfigError(
                f"{peft_config.peft_type} cannot stand beside {self.active_peft_config.peft_type}: one acts on the "
                "model's inputs, the other on its layers. Use a PeftModel for each."
            )
        self._prepare(peft_config)
        self._active = self._active or [adapter_name]
        if self.tuner is None:
            prompting.attach(self, adapter_name, peft_config, loading=not _init)
        else:
            with bring.brought(self, peft_config, autocast_adapter_dtype):
                self.tuner.inject(peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype, _init)

    @changes
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter (or several together, for methods on layers) the active one, and the one that learns.

        Raises `AdapterNameError` for unknown names; nothing is changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        check_known(names, list(self.peft_config))
        if self.tuner is None:
            prompting.activate(self, names[0], inference_mode)
        else:
            self.tuner.set_adapter(names, inference_mode)
        self._active = names

    @changes
    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Where it was active, another one is from then on."""
        check_known([adapter_name], list(self.peft_config))
        if self.tuner is None:
            prompting.detach(self, adapter_name)
        else:
            self.tuner.delete_adapter(adapter_name)
        left = [n for n in self._active if n != adapter_name] or list(self.peft_config)[:1]
        self._active = self._active if left else []
        if left and left != self._active:
            self.set_adapter(left, self.peft_config[left[0]].inference_mode)

    # call

    def train(self, mode: bool = True) -> Self:
        """As any module's. Warns where active adapters are merged: they act by the base's weights, and nothing learns."""
        if mode and (
            merged := {n for host in standing(self)[0] for n in host.merged_adapters if n in host.active_adapters}
        ):
            warn(
                MergeWarning,
                f"adapters {listing(sorted(merged))} are merged into the base's weights, where they cannot learn; "
                "unmerge_adapter() before training.",
            )
        return super().train(mode)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The adapted model's output.

        adapter_names: an adapter for each row of the batch (`"__base__"` for none), whatever is active. What a method
            reads of a call, as Poly its `task_ids`, is given by name and goes to the layers alone.
        """
        with calling(self), with_copies(self.get_base_model()), self._call(adapter_names, args, kwargs):
            tuner = self.tuner
            return prompted.call(self, args, kwargs) if tuner is None else reach.call(tuner, args, kwargs)

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, adapted. adapter_names: as in a call, one for each prompt."""
        with calling(self), self._call(adapter_names, args, kwargs):
            tuner = self.tuner
            return generation.generate(self, args, kwargs) if tuner is None else reach.generate(tuner, args, kwargs)

    @contextmanager
    def _call(self, rows: list[str] | None, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        carried = () if self.tuner is None else self.tuner.carried
        given = {name: kwargs.pop(name) for name in carried if name in kwargs}
        values = {name: as_rows(value) for name, value in given.items() if value is not None}
        if rows is None and not values:
            yield
            return
        outer = current() or Call()
        if rows is not None:
            self._check_rows(rows, args, kwargs)
        if self.training:
            carry_context(self)
        names = outer.rows if rows is None else tuple(rows)
        with using(replace(outer, rows=names, values={**outer.values, **values}, trail={}, known={})):
            yield

    def _check_rows(self, rows: list[str], args: tuple, kwargs: dict[str, Any]) -> None:
        check_known([r for r in rows if r != BASE], list(self.peft_config))
        first = next((a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor) and a.dim() > 1), None)
        if first is not None and first.shape[0] != len(rows):
            raise CallError(
                f"adapter_names has {len(rows)} entries for a batch of {first.shape[0]} rows; give one a row."
            )

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """What the active prompt method puts before each row: embeddings `[batch, n, dim]`, or a key-value cache."""
        return prompted.prompt(self, batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The prompt as it goes to the file: `[n, dim]`."""
        return self.prompt_encoder[adapter_name].saved()[ROWS].detach()

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients reach the adapters through checkpointed blocks, whose input would otherwise need none."""
        if callable(enable := getattr(model, "enable_input_require_grads", None)):
            enable()
        else:
            model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))  # type: ignore[operator]
        return model

    # disk

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write each adapter's weights and config: `default` into the folder itself, others into one of their name.

        Args:
            safe_serialization: False writes `adapter_model.bin` (and removes a safetensors file it would hide behind).
            selected_adapters: these only. is_main_process: False writes nothing. Where an engine keeps the adapter in parts,
                all processes have to call this: they gather its tensors, and the first one writes.
            path_initial_model_for_weight_conversion: where the adapter was saved before its training, if it started by
                taking a part of the base (PiSSA, OLoRA, CorDA, LoRA-GA): it is written as LoRA for the untouched base.
            manifest: write `SHA256SUMS` beside the files, which every load then compares with them.
            push_to_hub: upload the folder; `repo_id`, `token`, `private`, `commit_message`, `revision` go along.

        Raises:
            AdapterFileError: the directory is a file, or cannot be written.
            AdapterNameError: a selected adapter is not there.
        """
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        check_known(names or [self.active_adapter], list(self.peft_config))
        writes = is_main_process and (is_writer() or not any(map(in_parts, self.parameters())))
        if not writes and kwargs.get("state_dict") is not None:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise AdapterFileError(f"{folder} is a file; a directory is needed to save adapters into.")
        check_apart(folder, [n for n in names if n != "default"])
        initial = path_initial_model_for_weight_conversion
        for name in names:
            target = folder if name == "default" else folder / name
            saved = self._to_save(name, save_embedding_layers, initial, kwargs.get("state_dict"))
            if writes:
                save.save_adapter(target, *saved, safe_serialization, bool(kwargs.get("manifest")))
        if writes:
            card.write(self, folder)
        if writes and push_to_hub:
            upload(folder, **kwargs)

    def _to_save(
        self,
        name: str,
        with_embeddings: bool | Literal["auto"],
        initial: str | None,
        given: Mapping[str, torch.Tensor] | None,
    ) -> tuple[PeftConfig, dict[str, torch.Tensor], dict[str, str]]:
        """An adapter's config, tensors and facts as they go to the file."""
        tensors = save.get_peft_model_state_dict(self, given, name, save_embedding_layers=with_embeddings)
        config = save.saved_config(self.peft_config[name])
        if initial is not None:
            config, tensors = as_plain(config, tensors, initial)
        model = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = base_name(model)
        if config.task_type is None:
            config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        rows = vocabulary(model)
        facts = {fingerprint.KEY: self._fingerprint.text(), **({} if rows is None else {save.VOCABULARY: str(rows)})}
        return config, tensors, facts

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = True,
        key_mapping: dict[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter (a directory, or a repository on the hub) onto a model.

        Args:
            is_trainable: let it learn on; frozen otherwise. config: use this in place of the saved one.
            low_cpu_mem_usage: kept for callers of the reference; tensors are always made once, from the file.
            key_mapping: regexes and replacements for keys that were saved under other names.
            strict: refuse files that do not fit whole, or warn and load what fits; None: `limits.STRICT_LOADS`.
            kwargs: `subfolder`, `revision`, `token`, ... of the hub; `allow_pickle`; `verify_base=True` raises where the
                base is not the one that the adapter was saved on; `manifest=True` where there are no SHA-256 sums to compare.

        Raises:
            AdapterFileError: a file is missing, damaged, or does not fit; the model is as it was.
        """
        kwargs["device"] = kwargs.pop("torch_device", None) or near(model)
        chosen, stored = save.opened(
            model_id, config, checks := save.Checks.of(kwargs), key_mapping=key_mapping, **kwargs
        )
        chosen.inference_mode = not is_trainable
        kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(chosen.task_type), PeftModel) if cls is PeftModel else cls
        vocabulary = stored.metadata.get(save.VOCABULARY)
        stored = save.unfused(stored, model, chosen, str(model_id))
        embeddings.check_vocabulary(model, vocabulary, stored.shapes(), str(model_id))
        before = Before(model)
        made = kind(model, chosen, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage=True, _init=False)
        with made._undone_on_error(before, fresh=True):
            save.load_verified(made, stored, adapter_name, strict, str(model_id))
            known, recorded = made._fingerprint, stored.metadata.get(fingerprint.KEY)
            check_base(model, known, chosen, recorded, str(model_id), checks.base)
            made._loaded([adapter_name], chosen)
        return made

    @changes
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = True,
        key_mapping: dict[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Put another saved adapter beside those there are. Arguments and errors are those of `from_pretrained`.

        A name that is there already is refused. A lenient load lets that adapter take over the tensors of a file with its
        config, as programs that go on from a checkpoint ask.

        Returns `(missing_keys, unexpected_keys)`; both empty unless it is lenient.
        """
        lenient = not (limits.STRICT_LOADS if strict is None else strict)
        check_name(adapter_name, [] if lenient else list(self.peft_config))
        kwargs |= {"device": torch_device or near(self), "key_mapping": key_mapping}
        config, stored = save.opened(model_id, None, checks := save.Checks.of(kwargs), **kwargs)
        if adapter_name in self.peft_config:
            save.check_same_config(self.peft_config[adapter_name], config, adapter_name, str(model_id))
            result = save.load_verified(self, stored, adapter_name, strict, str(model_id))
            self._loaded(self.active_adapters, self.peft_config[self.active_adapter])
            return result
        config.inference_mode = not is_trainable
        known, recorded = self._fingerprint, stored.metadata.get(fingerprint.KEY)
        stored = save.unfused(stored, self.get_base_model(), config, str(model_id))
        before = Before(self.get_base_model())
        self.add_adapter(adapter_name, config, True, autocast_adapter_dtype, _init=False)
        with self._undone_on_error(before):
            result = save.load_verified(self, stored, adapter_name, strict, str(model_id))
            check_base(self.get_base_model(), known, config, recorded, str(model_id), checks.base)
            self._loaded(self.active_adapters, self.peft_config[self.active_adapter])
        return result

    def _loaded(self, active: list[str], config: PeftConfig) -> None:
        """Tie again what the loaded tensors were tied to, and set what learns."""
        if self.tuner is None:
            self.set_adapter(active, config.inference_mode)
            return
        self.tuner.settle()
        for name in self.tuner.peft_config:
            relink(self.tuner.model, name)

    @contextmanager
    def _undone_on_error(self, before: Before, fresh: bool = False) -> Iterator[None]:
        """Take an adapter that could not be loaded out again, and all there are where the model had none."""
        try:
            yield
        except BaseException:
            if self.tuner is not None:
                self.tuner.abandon()
            elif not fresh:
                self.delete_adapter(list(self.peft_config)[-1])
            if fresh:
                lifecycle.unload(self.get_base_model())
            before.restore()
            raise

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary folder and upload it."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(Path(folder), repo_id=repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write `README.md`: what the adapter is, its base, and how to load it; what a person wrote there stays."""
        card.write(self, Path(output_dir))

    # status

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """`(trainable, all)` parameters."""
        return status.count(self)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, of how many."""
        learn, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {learn:,d} || all params: {total:,d} || trainable%: {100 * learn / max(total, 1):.4f}"
        )

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """What each adapted layer holds and does."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The layers' states in one; `"irregular"` where they differ."""
        return status.get_model_status(self)

    def _prepare(self, config: PeftConfig) -> None:
        """What a task adds to an adapter's config; the task classes override it."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}
"""The class for each `task_type`; `tasks` fills it in."""
