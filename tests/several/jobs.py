# SPDX-License-Identifier: Apache-2.0
"""What each of several processes does in a test: train adapters by an engine, save them, load them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from rich.console import Console
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback

import graftlet
from graftlet.files import read_tensors
from graftlet.integrations import sent, shard
from graftlet.model.parts import root_of
from graftlet.train.recipe import Recipe, check
from graftlet.train.run import train
from graftlet.weights.whole import in_parts, put, whole

from ..train import tiny

STEPS, ROWS, TOKENS = 3, 8, 6

METHODS: dict[str, Callable[[], graftlet.PeftConfig]] = {
    "lora": lambda: graftlet.LoraConfig(target_modules=["q_proj", "down_proj"], r=3),
    "dora": lambda: graftlet.LoraConfig(target_modules=["q_proj", "down_proj"], r=3, use_dora=True),
    "embedding": lambda: graftlet.LoraConfig(target_modules=["embed_tokens", "v_proj"], r=3, bias="all"),
    "saved": lambda: graftlet.LoraConfig(target_modules=["q_proj"], r=3, modules_to_save=["lm_head", "norm"]),
    "tokens": lambda: graftlet.LoraConfig(target_modules=["q_proj"], r=3, trainable_token_indices=[1, 3]),
    "oft": lambda: graftlet.OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=4),
    "ia3": lambda: graftlet.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "shira": lambda: graftlet.ShiraConfig(target_modules=["q_proj"], r=3),
    "vera": lambda: graftlet.VeraConfig(target_modules=["q_proj", "v_proj"], r=4),
    "vblora": lambda: graftlet.VBLoRAConfig(
        target_modules=["q_proj"], num_vectors=6, vector_length=4, save_only_topk_weights=True
    ),
    "trainable_tokens": lambda: graftlet.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]),
    "prompt": lambda: graftlet.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": lambda: graftlet.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
}  # fmt: skip


NETWORKS = ("prefix",)
"""Those whose file does not hold all that they train."""


def base(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_bias": True,
        "attn_implementation": "eager", "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def adapted(name: str, **changes: Any) -> Any:
    """The base with an adapter that does something: its tensors are moved a little, alike in all processes."""
    made = graftlet.get_peft_model(base(**changes), METHODS[name]())
    moved(made)
    return made


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture() -> Any:
    """A base with stacks of experts."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager",
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes))


def experts() -> Any:
    """Adapters on stacks of experts, moved a little."""
    config = graftlet.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKS)
    made = graftlet.get_peft_model(mixture(), config)
    moved(made)
    return made


@torch.no_grad()
def moved(model: nn.Module) -> None:
    """Let what learns be something else than at its start, the same in all processes."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            start = whole(parameter)  # the numbers are drawn for the whole, whatever part of it is here
            put(parameter, start + 0.05 * torch.randn(start.shape))


def batch(step: int) -> torch.Tensor:
    """The rows of a step, of which every process takes its part."""
    torch.manual_seed(100 + step)
    return torch.randint(3, 12, (ROWS, TOKENS))


def part(step: int) -> torch.Tensor:
    if not dist.is_initialized():
        return batch(step)
    return batch(step).chunk(dist.get_world_size())[dist.get_rank()]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> float:
    ids = part(number)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def fit(model: Any, steps: range = range(STEPS), optimizer: torch.optim.Optimizer | None = None) -> Any:
    optimizer = optimizer or optimizer_of(model)
    for number in steps:
        step(model, optimizer, number)
    return model


def fit_whole(model: Any) -> Any:
    """Train on all rows of each batch in this process."""
    optimizer = optimizer_of(model)
    for number in range(STEPS):
        model(input_ids=batch(number), labels=batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def equal(several: Any, one: Any) -> None:
    """The adapter that all processes trained is that which this one trained on all rows."""
    ours, theirs = map(graftlet.get_peft_model_state_dict, (several, one))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) < 1e-6


def apart(one: Path, other: Path) -> float:
    """How far the tensors of two adapters are apart; they have the same keys and shapes."""
    a, b = (read_tensors(folder / "adapter_model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert all(a[k].shape == b[k].shape and a[k].numel() for k in a)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def off(one: Path, other: Path, start: Path) -> float:
    """How far the tensors of two adapters are apart, each in parts of how far it has moved from its start."""
    a, b, begun = (read_tensors(folder / "adapter_model.safetensors") for folder in (one, other, start))
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    assert all(a[k].shape == b[k].shape and a[k].numel() for k in a)
    most = {k: float((a[k].double() - begun[k].double()).abs().max()) for k in a}
    return max(float((a[k].double() - b[k].double()).abs().max()) / max(most[k], 1e-4) for k in a)


@contextmanager
def processes() -> Iterator[None]:
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- jobs -------------------------------------------------------------------------------------------------------------


def alone(folder: str, names: str) -> None:
    """Train each method's adapter in one process."""
    base().save_pretrained(Path(folder, "base"))
    for name in names.split(","):
        adapted(name).save_pretrained(Path(folder, f"{name}-start"))
        fit(adapted(name)).save_pretrained(Path(folder, name))


def fsdp2(folder: str, names: str) -> None:
    for name in names.split(","):
        model = fit(shard(adapted(name)))
        model.save_pretrained(Path(folder, f"{name}-fsdp2"))
        dist.barrier()
        if name in NETWORKS:
            continue
        # what is in parts is filled from a file, and is then what was trained
        again = shard(adapted(name))
        tensors = graftlet.load_peft_weights(Path(folder, f"{name}-fsdp2"))
        result = graftlet.set_peft_model_state_dict(again, tensors)
        assert not result.unexpected_keys, result
        ids = batch(9)
        assert torch.allclose(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6), name


def fsdp2_merged(folder: str, names: str) -> None:
    """A merge into a base in parts has the outputs of the adapter beside it, and is undone to the bit."""
    for name in ("lora", "dora", "vera", "oft"):
        merged(shard(adapted(name)), lambda p: p.to_local())
    for model, said in unmergeable():
        unmerged(shard(model), lambda p: p.to_local(), said)


def unmergeable() -> Iterator[tuple[Any, str]]:
    """What cannot be merged where it is in parts, and what is said of it."""
    yield adapted("saved"), "modules_to_save that an engine keeps in parts"
    with pytest.warns(graftlet.errors.TieWarning):
        tied = adapted("embedding", tie_word_embeddings=True)
    yield tied, "that layers share"


def fsdp2_experts(folder: str, names: str) -> None:
    equal(fit(shard(experts())), fit_whole(experts()))
    merged(shard(experts()), lambda p: p.to_local())


def merged(model: Any, kept: Callable[[Any], torch.Tensor]) -> None:
    """Merge into a model in parts, and back. kept: a parameter's part."""
    parameters = dict(getattr(model, "module", model).named_parameters())
    before = {name: kept(p).clone() for name, p in parameters.items()}
    root: Any = root_of(model)
    with torch.no_grad():
        beside = model(input_ids=batch(9)).logits
        root.merge_adapter()
        assert any(not kept(p).equal(before[name]) for name, p in parameters.items())
        assert torch.allclose(model(input_ids=batch(9)).logits, beside, atol=1e-5)
        root.unmerge_adapter()
    assert all(kept(p).equal(before[name]) for name, p in parameters.items())


def counted(sizes: list[int], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with gradients, their sizes noted."""
    sizes.append(bucket.buffer().nbytes)
    return allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]


def ddp(folder: str, names: str) -> None:
    for name in names.split(","):
        model, buckets = adapted(name), list[int]()
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(buckets, lambda sizes, bucket: counted(sizes, bucket))  # DDP reads annotations
        fit(wrapped)
        # a ring sends each bucket 2 (n - 1) / n times: the gradients of the adapter, and nothing else
        ring = 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        assert sum(buckets) / STEPS * ring == sent(wrapped, dist.get_world_size()), name
        model.save_pretrained(Path(folder, f"{name}-ddp"), is_main_process=dist.get_rank() == 0)


def parallel(name: str, folder: str) -> Any:
    """An adapter on a base whose layers are shared out by its own plan."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh, attn_implementation="eager")
    made = graftlet.get_peft_model(model, METHODS[name]())
    moved(made)
    return made


def tp(folder: str, names: str) -> None:
    """Every process sees all rows; each layer's work is shared out."""
    for name in names.split(","):
        if name in UNSHARED:
            with pytest.raises(UNSHARED[name]):
                parallel(name, str(Path(folder, "base")))
            continue
        base()  # as many random numbers drawn as for one process
        if dist.get_rank():
            torch.manual_seed(7)  # an adapter starts as the first process's
        model = fit_whole(parallel(name, str(Path(folder, "base"))))
        model.save_pretrained(Path(folder, f"{name}-tp"), is_main_process=dist.get_rank() == 0)


def tp_merged(folder: str, names: str) -> None:
    """A merge into layers that are shared out is one process's; it is undone to the bit, and can be kept, and saved."""
    for name in names.split(","):
        base()  # as many random numbers drawn as for one process
        model, one = parallel(name, str(Path(folder, "base"))), adapted(name)
        merged(model, lambda p: p.to_local() if in_parts(p) else p.detach())
        ids = batch(9)
        with torch.no_grad():
            theirs = one.merge_and_unload()(input_ids=ids).logits
            kept = model.merge_and_unload()
            assert torch.allclose(kept(input_ids=ids).logits, theirs, atol=1e-5), name
        kept.save_pretrained(Path(folder, f"{name}-merged"), is_main_process=dist.get_rank() == 0)
        dist.barrier()
        with torch.no_grad():
            again = LlamaForCausalLM.from_pretrained(Path(folder, f"{name}-merged"), attn_implementation="eager")
            assert torch.allclose(again(input_ids=ids).logits, theirs, atol=1e-5), name


UNSHARED = {"saved": graftlet.errors.UnsupportedLayerError, "prefix": graftlet.errors.ConfigError}
"""A head that is shared out cannot be copied; each process has keys and values of its own heads alone."""


def in_four_bits(name: str, folder: str) -> Any:
    """An adapter on a base in 4 bits, whole."""
    import bitsandbytes.nn.modules as bnb
    from transformers import BitsAndBytesConfig

    bnb.has_avx512bf16 = lambda: False  # the layout for such CPUs has no place for layers as small as these
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(Path(folder, "base"), quantization_config=packed)
    torch.manual_seed(0)
    made = graftlet.get_peft_model(model, METHODS[name]())
    moved(made)
    return made


def qlora(folder: str, names: str) -> None:
    """A base in 4 bits, its packed numbers in parts, beside one that is whole and sees all rows."""
    for name in ("lora", "dora"):
        one, several = in_four_bits(name, folder), shard(in_four_bits(name, folder))
        weight = several.get_base_model().model.layers[0].self_attn.k_proj.weight
        assert weight.to_local().numel() * dist.get_world_size() == weight.numel()
        equal(fit(several), fit_whole(one))
        unmerged(several, lambda p: p.to_local(), "its packed numbers are in parts")


def unmerged(model: Any, kept: Callable[[Any], torch.Tensor], said: str) -> None:
    """A merge into a model in parts is refused, and nothing changes. kept: a parameter's part."""
    parameters = dict(getattr(model, "module", model).named_parameters())
    before = {name: kept(p).clone() for name, p in parameters.items()}
    root: Any = root_of(model)
    with pytest.raises(graftlet.errors.MergeError, match=said):
        root.merge_adapter()
    assert all(kept(p).equal(before[name]) for name, p in parameters.items())


def policies(folder: str, names: str) -> None:
    """Half precision, and parts that stay in main memory."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for options in ({"mp_policy": halves}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):
        model = shard(adapted("lora"), **options)
        before = graftlet.get_peft_model_state_dict(model)
        after = graftlet.get_peft_model_state_dict(fit(model))
        assert all(t.dtype == torch.float32 and not t.equal(before[k]) for k, t in after.items())
        whole = graftlet.get_peft_model_state_dict(fit(adapted("lora")))
        assert after.keys() == whole.keys()


def private_bytes() -> int:
    """Memory of this process that is no file's."""
    told = Path("/proc/self/status").read_text()
    return int(told.split("RssAnon:")[1].split()[0]) * 1024


def loaded(folder: str, names: str) -> None:
    """A base that is shared out as it is read, and a saved adapter put on top: no process ever holds all of it."""
    from transformers.distributed import DistributedConfig

    before, size = private_bytes(), Path(folder, "large", "model.safetensors").stat().st_size
    shares = DistributedConfig(fsdp_size=dist.get_world_size())
    model: Any = LlamaForCausalLM.from_pretrained(Path(folder, "large"), distributed_config=shares)
    held = sum(p.to_local().nbytes for p in model.parameters())
    assert held < size / dist.get_world_size() * 1.05
    assert private_bytes() - before < 0.8 * size
    ids = batch(0)[:, :4]
    model = graftlet.PeftModel.from_pretrained(model, Path(folder, "large-adapter"), is_trainable=True)
    theirs = torch.load(Path(folder, "large-logits.pt"))
    assert torch.allclose(model(input_ids=ids).logits, theirs, atol=1e-4)
    model.save_pretrained(Path(folder, "large-again"))
    dist.barrier()
    assert apart(Path(folder, "large-adapter"), Path(folder, "large-again")) == 0


def large(folder: str) -> None:
    """What `loaded` loads."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "max_position_embeddings": 32}
    model = base(**sizes)
    model.save_pretrained(Path(folder, "large"))
    adapted = graftlet.get_peft_model(model, METHODS["dora"]())
    moved(adapted)
    adapted.save_pretrained(Path(folder, "large-adapter"))
    torch.save(adapted(input_ids=batch(0)[:, :4]).logits.detach(), Path(folder, "large-logits.pt"))


class PowerCut(TrainerCallback):
    """The end of all processes after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise InterruptedError


def recipe(folder: str, batch_size: int, output: str, **changes: Any) -> Recipe:
    """Four steps on tiny data, a checkpoint after every second one."""
    training = {
        "batch_size": batch_size, "learning_rate": 1.0, "max_steps": 4, "save_every": 2, "optimizer": "sgd",
    }  # fmt: skip
    places = Path(folder, "chat"), Path(folder, "sums.jsonl"), Path(folder, output)
    return check(tiny.recipe(*places, **{"training": training, "evaluation": {"samples": 1}, **changes}))


def cut_and_resumed(folder: str, output: str) -> None:
    """Train a recipe on all processes; then again, with a power cut after the third step."""
    size = 4 // dist.get_world_size()
    train(recipe(folder, size, output), console=Console(quiet=True))
    with suppress(InterruptedError):
        train(recipe(folder, size, f"{output}-cut"), (PowerCut(),), Console(quiet=True))
    train(recipe(folder, size, f"{output}-cut", resume=True), console=Console(quiet=True))


def recipe_ddp(folder: str, names: str) -> None:
    cut_and_resumed(folder, "ddp")


def recipe_fsdp2(folder: str, names: str) -> None:
    """accelerate has FSDP on accelerators alone: it is told that this is one, whose tensors are on the CPU."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_XPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(FSDP)
    cut_and_resumed(folder, "fsdp2")


FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells the processes that it starts."""

JOBS: dict[str, Callable[..., None]] = {
    "qlora": qlora,
    "fsdp2_merged": fsdp2_merged,
    "fsdp2_experts": fsdp2_experts,
    "tp_merged": tp_merged,
    "policies": policies,
    "loaded": loaded,
    "tp": tp, "fsdp2": fsdp2, "ddp": ddp, "recipe_ddp": recipe_ddp, "recipe_fsdp2": recipe_fsdp2,
}  # fmt: skip


def main(job: str, *arguments: str) -> None:
    """Run jobs, `a+b` one after the other, among the processes that the environment names."""
    warnings.simplefilter("error", graftlet.errors.GraftletWarning)
    torch.set_num_threads(1)
    with processes():
        for name in job.split("+"):
            JOBS[name](*arguments)
