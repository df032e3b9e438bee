# SPDX-License-Identifier: Apache-2.0
"""An encoder-decoder in the shape of Whisper learns a new voice: LoRA on the attention of both of its halves.

    python examples/speech.py

The language is made up: eight tones, one a word. The base is small, and has learnt to write down what a low voice sings;
the adapter teaches it a higher one. Measured are the words that are right in songs that were not heard before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.audio_utils import mel_filter_bank

from graftlet import LoraConfig, get_peft_model

RATE, FRAMES, MELS, WORDS, LENGTH = 4000, 48, 24, 8, 4
START, END = WORDS, WORDS + 1
FILTERS = torch.from_numpy(mel_filter_bank(129, MELS, 0.0, RATE / 2, RATE)).float()


def songs(count: int, voice: float, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Log-mel features `[count, mels, frames]` of songs, and their words `[count, LENGTH]`."""
    words = torch.randint(0, WORDS, (count, LENGTH), generator=dice)
    pitch = 220 * voice * 2 ** (words.repeat_interleave(FRAMES * 64 // LENGTH, 1) / 4)
    sound = torch.sin(2 * math.pi * pitch.cumsum(1) / RATE) + 0.05 * torch.randn(pitch.shape, generator=dice)
    power = torch.stft(sound, 256, 64, window=torch.hann_window(256), return_complex=True).abs()[..., :FRAMES] ** 2
    return (FILTERS.T @ power).clamp_min(1e-6).log10() / 3, words


def model() -> Any:
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=WORDS + 2, num_mel_bins=MELS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, max_source_positions=FRAMES // 2,
            max_target_positions=8, decoder_start_token_id=START, bos_token_id=START, eos_token_id=END, pad_token_id=END,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


def fit(whisper: Any, voice: float, rate: float, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in whisper.parameters() if p.requires_grad], rate)
    dice = torch.Generator().manual_seed(int(voice * 10))
    for _ in range(steps):
        features, words = songs(32, voice, dice)
        whisper.train()(input_features=features, labels=words).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def right(whisper: Any, voice: float) -> float:
    """The share of words that are written down right, one after another as in use."""
    features, words = songs(64, voice, torch.Generator().manual_seed(99))
    said = torch.full((len(words), 1), START)
    for _ in range(LENGTH):
        logits = whisper.eval()(input_features=features, decoder_input_ids=said).logits
        said = torch.cat([said, logits[:, -1:].argmax(-1)], 1)
    return float((said[:, 1:] == words).float().mean())


def main(steps: int = 250) -> dict[str, float]:
    base, low, high = model(), 1.0, 1.4
    fit(base, low, 5e-3, steps)
    known, before = right(base, low), right(base, high)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    whisper = get_peft_model(base, config)
    fit(whisper, high, 1e-2, steps // 2)
    after = right(whisper, high)
    print(f"the low voice, which the base knows: {known:.1%} of the words")
    print(f"the high voice: {before:.1%} before, {after:.1%} after")
    return {"known": known, "before": before, "after": after}


if __name__ == "__main__":
    main()
