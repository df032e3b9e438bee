# SPDX-License-Identifier: Apache-2.0
"""What each of several processes does in a test of DeepSpeed's ZeRO: train by accelerate's engine, save, load, merge."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from transformers import LlamaForCausalLM, MixtralForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

import graftlet
from graftlet.weights.whole import shape_of

from ..model.test_experts import mixtral
from ..model.test_fused import OLD, write
from . import jobs

STAGES = (1, 2, 3)

GATHERED: dict[str, int] = {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
"""So small a tensor too is kept in parts; of itself, ZeRO-3 leaves all whole that these models have."""

BIASES: dict[str, Callable[[], graftlet.PeftConfig]] = {
    "dora-bias": lambda: graftlet.LoraConfig(target_modules=["q_proj", "down_proj"], r=3, use_dora=True, bias="all"),
}
"""A method that reads a bias which learns."""


def config(stage: int, **changes: Any) -> dict[str, Any]:
    """DeepSpeed's own config, as a file has it."""
    return {
        "train_micro_batch_size_per_gpu": jobs.ROWS // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **GATHERED},
        "zero_allow_untested_optimizer": True,
        **changes,
    }


def as_accelerator() -> None:
    """accelerate has DeepSpeed on accelerators alone: it is told that this is one, whose tensors are on the CPU."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_XPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"})


def prepared(model: Any, stage: int) -> tuple[Accelerator, Any, Any]:
    """accelerate, the engine and the optimiser."""
    as_accelerator()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(stage)))
    engine, optimizer = accelerator.prepare(model, jobs.optimizer_of(model))
    assert engine.zero_optimization_stage() == stage
    assert all((parameter.numel() == 0) == (stage == 3) for parameter in model.parameters())
    return accelerator, engine, optimizer


def fit(model: Any, stage: int) -> Any:
    accelerator, engine, optimizer = prepared(model, stage)
    for number in range(jobs.STEPS):
        ids = jobs.part(number)
        accelerator.backward(engine(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    return engine


def zero(stage: int, folder: str, names: str) -> None:
    """Train each method's adapter; what is in parts is filled from the file, and is then what was trained."""
    for name in names.split(","):
        engine = fit(jobs.adapted(name), stage)
        engine.module.save_pretrained(Path(folder, f"{name}-zero{stage}"), is_main_process=dist.get_rank() == 0)
        dist.barrier()
        if name in jobs.NETWORKS:
            continue
        again = prepared(jobs.adapted(name), stage)[1]
        tensors = graftlet.load_peft_weights(Path(folder, f"{name}-zero{stage}"))
        assert not graftlet.set_peft_model_state_dict(again, tensors).unexpected_keys
        ids = jobs.batch(9)
        assert torch.allclose(again(input_ids=ids).logits, engine(input_ids=ids).logits, atol=1e-6), name


def partitioned(folder: str, kind: Any = LlamaForCausalLM) -> Any:
    """A base of which each process has but its part, from the start."""
    partitioned.config = HfDeepSpeedConfig(config(3))  # type: ignore[attr-defined]  # held: transformers looks for it
    model = kind.from_pretrained(folder, attn_implementation="eager")
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


def zero3_loaded(folder: str, names: str) -> None:
    """Adapters that come to a base in parts: from a file and anew, with the outputs and the steps of a whole base."""
    for name in names.split(","):
        saved, again = Path(folder, name), Path(folder, f"{name}-loaded")
        model = graftlet.PeftModel.from_pretrained(partitioned(str(Path(folder, "base"))), saved, is_trainable=True)
        model.save_pretrained(again)
        dist.barrier()
        assert jobs.apart(saved, again) == 0, name
        with torch.no_grad():
            whole = graftlet.PeftModel.from_pretrained(jobs.base(), saved)(input_ids=jobs.batch(9)).logits
            engine = prepared(model, 3)[1]
            assert torch.allclose(engine(input_ids=jobs.batch(9)).logits, whole, atol=1e-5), name
        parts = partitioned(str(Path(folder, "base")))
        jobs.base()  # as many random numbers drawn as for one process
        started = graftlet.get_peft_model(parts, jobs.METHODS[name]())
        jobs.moved(started)
        fit(started, 3).module.save_pretrained(Path(folder, f"{name}-started"))


def zero3_alike(folder: str, names: str) -> None:
    """Adapters begin as the first process's, though each process draws other numbers."""
    model = partitioned(str(Path(folder, "base")))
    torch.manual_seed(dist.get_rank())
    made = graftlet.get_peft_model_state_dict(graftlet.get_peft_model(model, jobs.METHODS["lora"]()))
    for tensor in made.values():
        first = tensor.clone()
        dist.broadcast(first, 0)
        assert tensor.equal(first)


def zero3_merged(folder: str, names: str) -> None:
    """A merge into a base in parts has the outputs of the adapter beside it, and is undone to the bit."""
    for name in ("lora", "dora", "vera", "oft"):
        jobs.merged(prepared(jobs.adapted(name), 3)[1], lambda p: p.ds_tensor)
    for model, said in jobs.unmergeable():
        jobs.unmerged(prepared(model, 3)[1], lambda p: p.ds_tensor, said)


def zero3_checkpointed(folder: str, names: str) -> None:
    """What is computed again in the backward pass is put together again."""
    for name in names.split(","):
        model = jobs.adapted(name)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert model.training
        fit(model, 3).module.save_pretrained(Path(folder, f"{name}-checkpointed"))


def zero3_qlora(folder: str, names: str) -> None:
    """A base in 4 bits, its packed numbers in parts, beside one that is whole and sees all rows."""
    for name in ("lora", "dora"):
        several, one = (jobs.in_four_bits(name, folder) for _ in range(2))
        engine = fit(several, 3)
        jobs.equal(engine, jobs.fit_whole(one))
        jobs.unmerged(engine, lambda p: p.ds_tensor, "its packed numbers are in parts")


def zero3_experts(folder: str, names: str) -> None:
    """Adapters on stacks of experts are those that one process trains."""
    jobs.equal(fit(jobs.experts(), 3), jobs.fit_whole(jobs.experts()))
    jobs.merged(prepared(jobs.experts(), 3)[1], lambda p: p.ds_tensor)


def zero3_stacks(folder: str, names: str) -> None:
    """What goes by the shapes of stacks of experts knows them in parts: KappaTune, and files with a pair an expert."""
    saved, old = Path(folder, "mixture"), Path(folder, f"old-{dist.get_rank()}")
    whole = jobs.mixture()
    if dist.get_rank() == 0:
        whole.save_pretrained(saved)
    dist.barrier()
    parts = partitioned(str(saved), MixtralForCausalLM)
    found = [graftlet.find_kappa_target_modules(m, 0.5, show_progress=False) for m in (parts, whole)]
    assert found[0] == found[1]
    assert found[0]["target_parameters"]
    old.mkdir()
    OLD[jobs.mixture] = OLD[mixtral]
    write(old, jobs.mixture, ["w1", "w2", "w3"])
    with torch.no_grad():
        theirs = graftlet.PeftModel.from_pretrained(whole, old)(input_ids=jobs.batch(9)).logits
        engine = prepared(graftlet.PeftModel.from_pretrained(parts, old, is_trainable=True), 3)[1]
        assert torch.allclose(engine(input_ids=jobs.batch(9)).logits, theirs, atol=1e-5)
    shapes = []
    for model in (partitioned(str(saved), MixtralForCausalLM), jobs.mixture()):
        graftlet.inject_adapter_in_model(graftlet.LoraConfig(target_modules=["gate", "w1", "w2"], r=2), model)
        shapes.append({name: shape_of(p) for name, p in model.named_parameters() if "lora_" in name})
    assert shapes[0] == shapes[1]
    assert any("gate." in name for name in shapes[0])


def refreshed(folder: str, names: str) -> None:
    """What is loaded into an engine that trains counts from the next step on, once its optimiser is told."""
    for stage in STAGES:
        one = jobs.adapted("lora")
        tensors = {key: 2 * tensor for key, tensor in graftlet.get_peft_model_state_dict(one).items()}
        accelerator, engine, optimizer = prepared(jobs.adapted("lora"), stage)
        for model in (one, engine):
            graftlet.set_peft_model_state_dict(model, tensors)
        engine.optimizer.refresh_fp32_params()
        one(input_ids=jobs.batch(0), labels=jobs.batch(0)).loss.backward()
        jobs.optimizer_of(one).step()
        accelerator.backward(engine(input_ids=jobs.part(0), labels=jobs.part(0)).loss)
        optimizer.step()
        ours, theirs = map(graftlet.get_peft_model_state_dict, (engine, one))
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in theirs), stage


def recipe_zero(stage: int, folder: str, names: str) -> None:
    """A recipe with a config of DeepSpeed's, as `accelerate launch --use_deepspeed` tells it to the processes."""
    as_accelerator()
    file = Path(folder, f"zero{stage}-{dist.get_rank()}.json")
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    file.write_text(json.dumps(config(stage, **sizes)))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = "true"
    jobs.cut_and_resumed(folder, f"zero{stage}")


ZERO3: tuple[Callable[[str, str], None], ...] = (
    zero3_loaded, zero3_alike, zero3_merged, zero3_checkpointed, zero3_qlora, zero3_experts, zero3_stacks,
)  # fmt: skip


def main(job: str, *arguments: str) -> None:
    """As of `jobs`, with those jobs that need DeepSpeed."""
    jobs.METHODS.update(BIASES)
    for stage in STAGES:
        jobs.JOBS[f"zero{stage}"] = partial(zero, stage)
        jobs.JOBS[f"recipe_zero{stage}"] = partial(recipe_zero, stage)
    jobs.JOBS.update({job.__name__: job for job in ZERO3}, refreshed=refreshed)
    warnings.filterwarnings("ignore", category=FutureWarning)
    jobs.main(job, *arguments)
