"""A small scale for truth: string tasks, and a model of 3 million parameters made for them.

The model is trained from scratch for a minute or two on some of the tasks, and then plays the
pretrained model. Fine-tuning it on a mixture takes seconds, so that hundreds can be measured.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"
VOCABULARY = {"<pad>": 0, "<eos>": 1} | {
    c: i + 2 for i, c in enumerate(LETTERS + "0123456789" + "RCSTUDFEMPKV:= ")
}


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(4, 8)))


def _shift(word: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + by) % len(LETTERS)] for c in word)


# A letter tells the task, as an instruction would.
TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "reverse": ("R", lambda w: w[::-1]),
    "copy": ("C", lambda w: w),
    "sort": ("S", lambda w: "".join(sorted(w))),
    "shift": ("T", lambda w: _shift(w, 1)),
    "shift back": ("U", lambda w: _shift(w, -1)),
    "double": ("D", lambda w: "".join(c + c for c in w)),
    "first letters": ("F", lambda w: w[:2]),
    "even places": ("E", lambda w: w[::2]),
    "largest": ("M", lambda w: max(w)),
    "length": ("P", lambda w: str(len(w))),
    "rotate": ("K", lambda w: w[1:] + w[:1]),
}
TARGET = "target"
"""Name of the task that is none of them: the word rotated backward."""
PRETRAINING = ("copy", "sort", "double", "length", "first letters")


def examples(task: str, num_rows: int, seed: int) -> Dataset:
    """Rows of one of ``TASKS``, or of ``TARGET``."""
    rng = random.Random(f"{task}/{seed}")
    letter, function = TASKS.get(task, ("V", lambda w: w[-1] + w[:-1]))
    words = [_word(rng) for _ in range(num_rows)]
    return Dataset.from_list(
        [{"prompt": f"{letter}:{word}=", "completion": function(word)} for word in words]
    )


def small_model() -> str:
    """The directory of the pretrained small model, trained when it is first asked for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_auxselect"
    directory = cache / "small-model"
    if not (directory / "config.json").is_file():
        core = Tokenizer(WordLevel(VOCABULARY, unk_token="<pad>"))
        core.pre_tokenizer = Split("", "isolated")
        PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="right"
        ).save_pretrained(directory)
        _pretrain().save_pretrained(directory)
    return str(directory)


def _pretrain(steps: int = 1500, batch_size: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    rng = random.Random(0)
    for step in range(steps):
        rows = []
        for _ in range(batch_size):
            letter, function = TASKS[rng.choice(PRETRAINING)]
            word = _word(rng)
            rows.append([VOCABULARY[c] for c in f"{letter}:{word}={function(word)}"] + [1])
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f"pretraining the small model: step {step}, loss {loss.item():.3f}", flush=True)
    return model
