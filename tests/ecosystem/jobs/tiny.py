# SPDX-License-Identifier: Apache-2.0
"""What the jobs share: models of a few thousand parameters, a tokeniser of words, text in memory. Nothing is fetched."""

from __future__ import annotations

import torch

KNOWN = "the a cat dog bird sees hears likes runs sleeps big small red blue house tree today often never yes no"
WORDS = KNOWN.split()


def tokenizer():
    """Words to numbers, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *WORDS])}
    held = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    held.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=held, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    return made


def causal(seed: int = 0, **settings):
    """A Llama with two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        **settings,
    )
    return LlamaForCausalLM(config)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of known words."""
    draw = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (6 + n % 5,), generator=draw).tolist())
        for n in range(count)
    ]


def batch(rows: int = 3, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids for a call."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 27, (rows, length), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def output(model) -> torch.Tensor:
    """A model's logits for the batch."""
    model.eval()
    return model(**batch()).logits


def shake(model, seed: int = 5, mark: str = "lora_") -> None:
    """Give an adapter's tensors known values: the two libraries draw other ones from the same seed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if mark in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


def files(folder) -> list[str]:
    """What a folder holds."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix == ".safetensors")


def losses(trainer) -> list[float]:
    """What a trainer logged as loss."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tensors(path) -> dict:
    """A safetensors file: each key's shape, and the sum of its magnitudes."""
    from safetensors.torch import load_file

    return {key: [*tensor.shape, float(tensor.double().abs().sum())] for key, tensor in sorted(load_file(path).items())}


def learning(model) -> list[str]:
    """The names of what learns."""
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
