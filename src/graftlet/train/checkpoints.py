# SPDX-License-Identifier: Apache-2.0
"""A mixin that teaches transformers' Trainer, and what derives from it, to train a model with adapters.

    class Trained(AdapterCheckpoints, Trainer): ...

A Trainer knows the reference's models alone. Others it takes for bare modules: it finds no labels, drops all columns of the
data, and writes the whole base into every checkpoint. With the mixin a checkpoint holds the adapter, and training goes on from
it exactly, on one process or on many: under DDP, FSDP2 and DeepSpeed the adapter's tensors are gathered, and nothing else.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers.utils.generic import can_return_loss, find_labels

from ..config import CONFIG_NAME
from ..core.method import Allocator
from ..files import find_file
from ..model.parts import root_of
from ..model.peft_model import PeftModel
from ..model.save import save_tensors, set_peft_model_state_dict
from ..pair import WEIGHTS
from ..weights.whole import in_parts, made_whole

UNFINISHED = "unfinished.safetensors"
SCHEDULER = "scheduler.pt"
ALLOCATOR = "allocator"


class AdapterCheckpoints:
    """To be named before the Trainer's class: `class Trained(AdapterCheckpoints, Trainer)`."""

    if TYPE_CHECKING:
        accelerator: Any
        args: Any
        lr_scheduler: Any
        model: Any
        model_wrapped: Any
        optimizer: Any
        processing_class: Any
        state: Any
        is_deepspeed_enabled: bool
        is_fsdp_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (base := self._base()) is None:
            return
        kind = type(base)
        self.label_names = find_labels(kind) if self.args.label_names is None else self.args.label_names
        self.can_return_loss = can_return_loss(kind)
        takes = inspect.signature(base.forward).parameters.values()
        any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes)
        self.model_accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", any_name)

    def _adapted(self) -> PeftModel | None:
        """The model below what engines and compilers put around it, if it is one with adapters."""
        model = root_of(self.model)
        return model if isinstance(model, PeftModel) else None

    @property
    def adapted(self) -> PeftModel:
        """The model with adapters that is trained."""
        model = self._adapted()
        assert model is not None
        return model

    def _base(self) -> Any:
        model = self._adapted()
        return None if model is None else model.get_base_model()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer. DeepSpeed goes on from a checkpoint of what learns, which has not the base."""
        model = self._adapted() if self.is_deepspeed_enabled else None
        hook = None if model is None else model.register_load_state_dict_post_hook(_frozen_may_be_missing)
        try:
            return super().train(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if hook is not None:
                hook.remove()

    def _set_signature_columns_if_needed(self) -> None:
        if getattr(self, "_signature_columns", None) is None and (base := self._base()) is not None:
            self._signature_columns = [*inspect.signature(base.forward).parameters, "label", "label_ids"]
            self._signature_columns += [n for n in self.label_names if n not in self._signature_columns]
        super()._set_signature_columns_if_needed()  # pyright: ignore[reportAttributeAccessIssue]

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        if training and model is self.model and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # an evaluation marks the model as prepared, and DDP would be left out: each process would train its own adapter
            model.__dict__.pop("_is_accelerate_prepared", None)
        return super()._wrap_model(model, training, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    # checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter into a folder; all processes call this."""
        if self._adapted() is None:
            super().save_model(output_dir, _internal_call)  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")  # pyright: ignore[reportAttributeAccessIssue]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model, folder = self._adapted(), output_dir or self.args.output_dir
        if model is None:
            super()._save(output_dir, state_dict)  # pyright: ignore[reportAttributeAccessIssue]
            return
        writes = self.args.should_save
        if not writes and not any(map(in_parts, model.parameters())):
            return
        model.save_pretrained(folder, is_main_process=writes)
        held = unfinished(model)
        if writes:
            save_tensors(held, Path(folder, UNFINISHED))
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # a Trainer copies these by itself where the reference is installed
        if self._adapted() is not None and self.args.should_save:
            for name in (CONFIG_NAME, WEIGHTS):
                if (file := Path(checkpoint_folder, name)).is_file():
                    shutil.copy(file, Path(self.args.output_dir, name))
        super()._push_from_checkpoint(checkpoint_folder)  # pyright: ignore[reportAttributeAccessIssue]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._adapted() is None or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._save_optimizer_and_scheduler(output_dir)  # pyright: ignore[reportAttributeAccessIssue]
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._adapted() is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            restore(model or self.adapted, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # pyright: ignore[reportAttributeAccessIssue]
        if checkpoint is not None and self._adapted() is not None:
            # only now: what an allocator has frozen is among the optimizer's parameters still
            restore_allocators(self.adapted, checkpoint)

    def _load_best_model(self) -> None:
        if self._adapted() is None:
            super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]
        elif self.state.best_model_checkpoint:
            restore(self.adapted, self.state.best_model_checkpoint)
            restore_allocators(self.adapted, self.state.best_model_checkpoint)


def _frozen_may_be_missing(model: Any, keys: Any) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    keys.missing_keys[:] = [key for key in keys.missing_keys if key not in frozen]


@torch.no_grad()
def restore(model: Any, folder: str | Path) -> None:
    """Put a checkpoint's tensors into a model that has the adapter, those too that only its training needs."""
    model = root_of(model)
    if model.tuner is not None:  # a prompt's file may hold but what its encoder makes
        set_peft_model_state_dict(model, load_file(find_file(folder, WEIGHTS)), ignore_mismatched_sizes=True)
    held = load_file(find_file(folder, UNFINISHED))
    parameters = dict(model.named_parameters())
    wanted = {id(parameters[key]) for key in held if key in parameters}
    with made_whole(model, wanted, changed=True) as known:
        for key, tensor in held.items():
            if key in parameters:
                known[id(parameters[key])].copy_(tensor)


def restore_allocators(model: Any, folder: str | Path) -> None:
    """Let what shrinks the adapters go on from a checkpoint."""
    model = root_of(model)
    held = load_file(find_file(folder, UNFINISHED))
    for name, allocator in _allocators(model).items():
        start = f"{ALLOCATOR}/{name}/"
        allocator.load({k.removeprefix(start): t for k, t in held.items() if k.startswith(start)})


def unfinished(model: Any) -> dict[str, torch.Tensor]:
    """What an adapter's file leaves out, since a finished adapter does not need it: parts that were cut, a prompt's
    encoder, how much each part matters so far."""
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with made_whole(model, {id(p) for p in learning.values()}) as known:
        held = {name: known[id(p)].detach() for name, p in learning.items()}
        for name, allocator in _allocators(model).items():
            held |= {f"{ALLOCATOR}/{name}/{key}": tensor for key, tensor in allocator.state().items()}
    return held


def _allocators(model: Any) -> dict[str, Allocator]:
    return {} if model.tuner is None else model.tuner.allocators()
