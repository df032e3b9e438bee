# SPDX-License-Identifier: Apache-2.0
"""Workflows: what users do, each a page of the docs that stands as a file."""

from __future__ import annotations

from .page import Workflow

PAGES = (
    Workflow(
        name="fine-tune",
        title="Fine-tune",
        source="workflows/fine-tune.md",
        links=("cpu", "cuda-training", "Delta", "model", "train"),
    ),
    Workflow(name="tasks", title="Tasks of a recipe", source="guides/tasks.md", links=("fine-tune", "train")),
    Workflow(
        name="embeddings", title="Embeddings of sentences", source="guides/embeddings.md", links=("tasks", "train")
    ),
    Workflow(name="plan", title="What a run takes", source="guides/plan.md", links=("fine-tune", "knowledge")),
    Workflow(
        name="command-line", title="The command line", source="guides/command-line.md", links=("fine-tune", "train")
    ),
    Workflow(
        name="qlora",
        title="Fine-tune a quantised base",
        source="guides/quantised.md",
        links=("quantised-training", "weights"),
    ),
    Workflow(
        name="serve",
        title="Serve many adapters",
        source="guides/many-adapters.md",
        links=("serving", "serving-code", "core"),
    ),
    Workflow(name="merge", title="Merge", source="workflows/merge.md", links=("serving", "core")),
    Workflow(
        name="hotswap", title="Swap adapters in place", source="workflows/hotswap.md", links=("serving", "serving-code")
    ),
    Workflow(
        name="lora-options", title="LoRA's options", source="guides/lora.md", links=("Delta", "fine-tune", "methods")
    ),
    Workflow(
        name="speed",
        title="Speed and memory",
        source="guides/speed.md",
        links=("cuda-training", "kernels", "kernels-off"),
    ),
    Workflow(
        name="new-method",
        title="A method of your own",
        source="guides/new-method.md",
        links=("Delta", "OutputMap", "testing"),
    ),
    Workflow(
        name="distributed",
        title="Several devices and machines",
        source="guides/distributed.md",
        links=("several-devices", "integrations", "train"),
    ),
    Workflow(
        name="export", title="Other engines", source="guides/export.md", links=("serving", "serving-code", "merge")
    ),
    Workflow(name="drop-in", title="In place of the reference", source="guides/drop-in.md", links=("cpu", "fine-tune")),
)
