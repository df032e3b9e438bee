# SPDX-License-Identifier: Apache-2.0
"""accelerate: a training loop of one's own, its state saved and loaded, models that are dispatched."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import batch, causal, learning, output, shake, tensors


def _model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(causal(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    shake(model)
    return model


def _steps(accelerator, model, optimizer, count: int) -> list[float]:
    found = []
    model.train()
    for number in range(count):
        given = batch(seed=number)
        with accelerator.accumulate(model):
            loss = model(**given, labels=given["input_ids"]).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found


def loop(folder: Path) -> dict:
    """prepare, backward, clip_grad_norm_, save_state, load_state, unwrap_model, get_state_dict, save_pretrained."""
    from accelerate import Accelerator
    from peft import PeftModel

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = _model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    seen = {"losses": _steps(accelerator, model, optimizer, 6)}
    accelerator.save_state(folder / "state")
    seen["losses after"] = _steps(accelerator, model, optimizer, 4)
    accelerator.load_state(folder / "state")
    seen["losses again"] = _steps(accelerator, model, optimizer, 4)
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(folder / "adapter", state_dict=accelerator.get_state_dict(model))
    seen |= {"class": type(plain).__name__, "learns": learning(plain), "output": output(plain)}
    seen["tensors"] = tensors(folder / "adapter" / "adapter_model.safetensors")
    seen["loaded"] = output(PeftModel.from_pretrained(causal(), folder / "adapter"))
    return seen


def mixed_precision(folder: Path) -> dict:
    """bfloat16 by accelerate's autocast."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = _model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = _steps(accelerator, model, optimizer, 3)
    return {"losses, to two digits": [round(loss, 1) for loss in found]}


def offloaded(folder: Path) -> dict:
    """cpu_offload of an adapted model."""
    from accelerate import cpu_offload

    model = _model()
    seen = {"before": output(model)}
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    seen["offloaded"] = output(model)
    return seen


JOBS = [loop, mixed_precision, offloaded]
