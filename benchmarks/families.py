"""Families of tasks on which estimates are compared with fine-tuning.

Each has auxiliary tasks of different use to a target that is none of them, one of them with
shuffled answers. All but ``small``, a small model and string tasks, are real: SmolLM2-135M, and
generators of reasoning-gym with options that keep the rows short; boilerplate around the question
is left out. ``demo`` is the recipe of ``make demo``; ``sparse`` has its tasks, after fewer steps
and with few of many rows captured. ``sorting`` was held out: no estimate of it was looked at before
its truth was there. ``sentiment`` is real text, from the folder ``HF_AUXSELECT_DATA``; no constant
was decided on it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from benchmarks import small_family as small
from recipes import arithmetic, demo
from recipes.arithmetic import TWO_DIGITS, examples, shuffled_answers
from recipes.models import smollm2

DATA = Path(os.environ.get("HF_AUXSELECT_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Folder of the real text, which has licences of its own and is not part of the repository."""

INSTRUCTION = re.compile(r"\A.*?\n\nInput: ", re.DOTALL)
"""Comes before the input, and says the same in every row of a task."""

Generator = tuple[str, dict[str, Any]]

# bfloat16 is twice as fast on processors that multiply it, with attention spelled out, and 40 times
# slower on others. Truth was measured in bfloat16.
FAST = (
    {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    else {}
)

KEPT = {
    "base_conversion": r"(?<=Now, ).*",
    "caesar_cipher": r"(?<=text: ).*(?=\. Provide)",
    "family_relationships": r".*\?",
    "gcd": r".*(?=\. Give)",
    "isomorphic_strings": r"[^\n]*\Z",
    "leg_counting": r"[^\n]*\Z",
    "number_filtering": r"[^\n]*",
    "number_sorting": r"[^\n]*",
    "prime_factorization": r"[^.]*\.",
    "ransom_note": r"[^\n]*\n[^\n]*\Z",
    "syllogism": r"(?<=1\. ).*\?",
    "word_sequence_reversal": r"[^\n]*\Z",
    "word_sorting": r"(?<=list: ).*",
}
"""The part of the question that is kept, by generator; all of it unless it is named here."""


def with_fixed_hashes() -> None:
    """Start this script again with a fixed hash seed, unless it has one.

    ``ransom_note`` draws from a set of letters, whose order depends on it: its rows would be others
    in every process.
    """
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks, target, model and training arguments."""

    tasks: tuple[str, ...]
    """Names; the last one is ``shuffled``."""
    make_task: Callable[[str, int], Dataset]
    """Rows of the n-th task, by name and position."""
    make_target: Callable[[int], Dataset]
    """Rows of the target; another seed gives other rows."""
    model: Callable[[], str] = smollm2
    warm_up_steps: int = 96
    steps: int = 128
    lora_rank: int = 8
    examples_per_task: int | None = None
    """Captured; None: all of them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of SFTConfig, where they are not those of ``ground_truth.py``."""

    def training_tasks(self) -> dict[str, Dataset]:
        """Rows of every auxiliary task."""
        return {name: self.make_task(name, i) for i, name in enumerate(self.tasks)}


def _sums(num_terms: int) -> Generator:
    return "chain_sum", {"min_terms": num_terms, "max_terms": num_terms, **TWO_DIGITS}


def _reversal(min_words: int, max_words: int) -> Generator:
    return "word_sequence_reversal", {"min_words": min_words, "max_words": max_words}


def _spelling(shortest: int, longest: int) -> Generator:
    return "spell_backward", {"min_word_len": shortest, "max_word_len": longest}


def _relatives(smallest: int, largest: int) -> Generator:
    return "family_relationships", {"min_family_size": smallest, "max_family_size": largest}


def _short_examples(task: Generator, num_rows: int, seed: int) -> Dataset:
    dataset = examples(task, num_rows, seed)
    kept = re.compile(KEPT.get(task[0], ".*"), re.DOTALL)

    def shorten(prompt: str) -> str:
        question = prompt.removeprefix("Q: ").removesuffix("\nA:").strip()
        found = kept.search(question)
        if found is None:
            raise ValueError(f"KEPT[{task[0]!r}] matches no part of {question!r}.")
        return f"Q: {found[0]}\nA:"

    return dataset.map(lambda row: {"prompt": shorten(row["prompt"])})


def _sorting(count: int) -> Generator:
    return "number_sorting", {
        "min_numbers": count,
        "max_numbers": count,
        "max_decimals": 0,
        "min_value": 0,
        "max_value": 99,
    }


def _real(*, target: Generator, tasks: dict[str, Generator], shuffled: Generator) -> Family:
    def make_task(name: str, position: int) -> Dataset:
        if name == "shuffled":
            return shuffled_answers(_short_examples(shuffled, 96, position), 0)
        return _short_examples(tasks[name], 96, position)

    return Family(
        tasks=(*tasks, "shuffled"),
        make_task=make_task,
        make_target=lambda seed: _short_examples(target, 64, 1000 + seed),
        arguments={"per_device_train_batch_size": 8, "learning_rate": 1.5e-3, **FAST},
    )


@cache
def _rows_of_recipe(num_rows: int) -> list[Dataset]:
    return list(arithmetic.training_tasks(num_rows, demo.SEED).values())


def _recipe(*, num_rows: int, **options: Any) -> Family:
    return Family(
        tasks=(*arithmetic.TASKS, "shuffled"),
        make_task=lambda name, position: _rows_of_recipe(num_rows)[position],
        make_target=lambda seed: arithmetic.target_examples(num_rows, demo.SEED + seed),
        arguments={"per_device_train_batch_size": demo.BATCH_SIZE, **FAST},
        **options,
    )


def _small(*, target: str = small.TARGET, **changes: Any) -> Family:
    """String tasks; the auxiliary ones are all of them but the target."""

    def make_task(name: str, position: int) -> Dataset:
        if name == "shuffled":
            return shuffled_answers(small.examples(target, 128, 77), 0)
        return small.examples(name, 128, position)

    return Family(
        tasks=(*(name for name in small.TASKS if name != target), "shuffled"),
        make_task=make_task,
        make_target=lambda seed: small.examples(target, 128, 1000 + seed),
        model=small.small_model,
        **{"warm_up_steps": 60, "steps": 120} | changes,
    )


def _read_text(name: str, num_rows: int, skipped: int = 0) -> Dataset:
    """Rows of a file of prompts and completions, after some that are skipped.

    Of an instruction that goes on with an input, the input alone is kept.
    """
    path = DATA / f"{name}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: set HF_AUXSELECT_DATA to the folder of data.")
    lines = path.read_text().splitlines()[skipped : skipped + num_rows]
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [
            {"prompt": INSTRUCTION.sub("", row["prompt"]), "completion": row["completion"]}
            for row in rows
        ]
    )


def _text(*, target: str, tasks: dict[str, str]) -> Family:
    """Tasks of real text, 96 rows of each, and 64 rows of a target that is none of them."""

    def make_task(name: str, position: int) -> Dataset:
        if name == "shuffled":
            return shuffled_answers(_read_text(target, 96), 0)
        return _read_text(tasks[name], 96)

    return Family(
        tasks=(*tasks, "shuffled"),
        make_task=make_task,
        make_target=lambda seed: _read_text(target, 64, 96 + 64 * seed),
        arguments={"per_device_train_batch_size": 8, "learning_rate": 1.5e-3, **FAST},
    )


FAMILIES: dict[str, Family] = {
    "arithmetic": _real(
        target=_sums(3),
        tasks={
            "sums of two": _sums(2),
            "sums of four": _sums(4),
            "decimals": ("decimal_chain_sum", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
            "products": ("products", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
            "equations": ("simple_equations", {}),
            "common divisors": ("gcd", {}),
            "common multiples": ("lcm", {}),
            "bits": ("count_bits", {"max_n": 1000}),
            "letters": ("letter_counting", {"min_words": 3, "max_words": 5}),
            "spelling backward": ("spell_backward", {"max_word_len": 8}),
        },
        shuffled=_sums(3),
    ),
    "text": _real(
        target=_reversal(3, 5),
        tasks={
            "reversing two words": _reversal(2, 2),
            "sentence order": (
                "sentence_reordering",
                {"min_words_in_sentence": 4, "max_words_in_sentence": 7},
            ),
            "spelling backward": ("spell_backward", {"max_word_len": 8}),
            "word sorting": ("word_sorting", {"min_words": 3, "max_words": 4}),
            "caesar": ("caesar_cipher", {"min_words": 1, "max_words": 2}),
            "letters": ("letter_counting", {"min_words": 3, "max_words": 6}),
            "ransom note": ("ransom_note", {}),
            "isomorphic": ("isomorphic_strings", {}),
            "sums": _sums(3),
            "bits": ("count_bits", {"max_n": 1000}),
        },
        shuffled=_reversal(3, 5),
    ),
    "logic": _real(
        target=_relatives(4, 4),
        tasks={
            "small families": _relatives(3, 3),
            "siblings": ("aiw", {"task_type_weights": [1.0, 0.0, 0.0]}),
            "syllogisms": ("syllogism", {}),
            "coins": ("coin_flip", {}),
            "legs": ("leg_counting", {"max_animals": 3}),
            "equations": ("simple_equations", {}),
            "letters": ("letter_counting", {"min_words": 3, "max_words": 6}),
            "ransom note": ("ransom_note", {}),
            "sequences": ("number_sequence", {}),
            "sums": _sums(3),
        },
        shuffled=_relatives(4, 4),
    ),
    "spelling": _real(
        target=_spelling(6, 8),
        tasks={
            "short words backward": _spelling(3, 4),
            "reversing words": _reversal(3, 4),
            "word sorting": ("word_sorting", {"min_words": 3, "max_words": 4}),
            "caesar": ("caesar_cipher", {"min_words": 1, "max_words": 2}),
            "letters": ("letter_counting", {"min_words": 3, "max_words": 6}),
            "isomorphic": ("isomorphic_strings", {}),
            "products": ("products", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
            "sequences": ("number_sequence", {}),
            "coins": ("coin_flip", {}),
            "families": _relatives(3, 3),
        },
        shuffled=_spelling(6, 8),
    ),
    "sorting": _real(
        target=_sorting(4),
        tasks={
            "sorting three": _sorting(3),
            "filtering": (
                "number_filtering",
                {"min_numbers": 3, "max_numbers": 5, "max_decimals": 0, "max_value": 99},
            ),
            "word sorting": ("word_sorting", {"min_words": 3, "max_words": 4}),
            "reversing words": _reversal(3, 4),
            "bases": ("base_conversion", {"max_value": 200}),
            "prime factors": ("prime_factorization", {"max_value": 100}),
            "time intervals": ("time_intervals", {}),
            "decimals": ("decimal_chain_sum", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
            "calendar": ("calendar_arithmetic", {}),
            "bits": ("count_bits", {"max_n": 1000}),
        },
        shuffled=_sorting(4),
    ),
    "demo": _recipe(num_rows=demo.NUM_ROWS, warm_up_steps=demo.WARM_UP_STEPS, steps=demo.STEPS),
    "sparse": _recipe(num_rows=256, warm_up_steps=16, steps=40, examples_per_task=32),
    "small": _small(),
    "shifting": _small(target="shift back"),
    "sentiment": _text(
        target="domains/phones",
        tasks={
            "cameras": "domains/cameras",
            "music players": "domains/mp3_players",
            "DVD players": "domains/dvd_player",
            "routers": "domains/network_router",
            "tools": "domains/household_tools",
            "antivirus": "domains/antivirus_software",
            "movies": "domains/movies",
            "pros and cons": "domains/pros_and_cons",
            "subjectivity": "domains/subjectivity",
        },
    ),
    "analogies": _text(
        target="instruct/task1157_bard_analogical_reasoning_rooms_for_containers",
        tasks={
            "affordance": "instruct/task1153_bard_analogical_reasoning_affordance",
            "travel": "instruct/task1154_bard_analogical_reasoning_travel",
            "tools": "instruct/task1156_bard_analogical_reasoning_tools",
            "containers": "instruct/task1159_bard_analogical_reasoning_containers",
            "facts": "instruct/task036_qasc_topic_word_to_generate_related_fact",
            "sentences": "instruct/task102_commongen_sentence_generation",
            "questions": "instruct/task879_schema_guided_dstc8_classification",
            "causes": "instruct/task392_inverse_causal_relationship",
            "relations": "instruct/task970_sherliic_causal_relationship",
            "causes and effects": "instruct/task828_copa_commonsense_cause_effect",
        },
    ),
}

VARIANTS: dict[str, Family] = {
    "small-rank2": _small(lora_rank=2),
    "small-rank32": _small(lora_rank=32),
    "small-warmup20": _small(warm_up_steps=20, steps=80),
    # Made to fail: hardly any warm-up, and learning rates at which training goes astray.
    "small-warmup3": _small(warm_up_steps=3, steps=63),
    "small-rates": _small(arguments={"learning_rate": 3e-2}),
}
"""``small`` with one thing changed; the same number of steps follows the warm-up."""

FAMILIES |= VARIANTS
