"""Which settings of a Trainer are supported: what is refused, and what is warned about."""

from __future__ import annotations

import logging
import os

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_auxselect.sharding import is_sharded, reshard
from hf_auxselect.zero import ZeroOptimizer, has_engine, is_partitioned

logger = logging.getLogger(__name__)


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise for settings under which the selection would be wrong or impossible.

    Raises:
        ValueError: names the setting, and what to do.
    """
    args = trainer.args
    of_trl = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if of_trl and "SFTTrainer" not in of_trl:
        raise ValueError(
            f"{type(trainer).__name__} trains on preferences, rewards or generated answers, not on "
            "a mean of losses of label tokens, which is what is estimated. Use SFTTrainer or "
            "Trainer: select there with the preferred answers as the target, and give "
            f"{type(trainer).__name__} the tasks that were selected."
        )
    sharded = _sharded_otherwise(trainer.model)
    if sharded is not None:
        raise ValueError(
            f"the model's parameter {sharded!r} is sharded by tensor parallelism (tp_plan in "
            "from_pretrained): layers compute with parts of it, of which no per-example gradient "
            "follows. Shard with FSDP2 (fsdp_config={'version': 2}) instead."
        )
    if trainer.train_dataset is None:
        raise ValueError("the trainer has no train_dataset; there are no tasks to select from.")
    if isinstance(trainer.train_dataset, IterableDataset) or not hasattr(
        trainer.train_dataset, "__len__"
    ):
        raise ValueError(
            "train_dataset is an iterable dataset; rows of a dropped task could not be left out. "
            "Join the tasks' streams with concatenate_tasks({name: stream, ...}, take=n), which "
            "reads the first n rows of each."
        )
    if trainer.hp_search_backend is not None:
        raise ValueError(
            "hyperparameter_search makes a model and an output directory for each trial, so that "
            "one selection would be written over another. Search without TaskSelectionCallback "
            "(trainer.remove_callback), then train with the best values and with it."
        )
    if trainer.is_deepspeed_enabled:
        _refuse_deepspeed(trainer)
    if trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise ValueError(
            "FSDP in its first version joins the parameters of a layer into a flat one, so that no "
            "parameter has a gradient of its own. Use the second: fsdp_version: 2 in the "
            "configuration of accelerate, or fsdp_config={'version': 2} in the training arguments."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"a launcher has started {launched} processes, but they are not connected: each would "
            "train on everything by itself, and all would write to the same files. On a CPU set "
            "use_cpu=True in the training arguments, or ACCELERATE_USE_CPU=true in the environment."
        )
    if getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(
            f"loss_type={args.loss_type!r} is a loss whose gradient is not that of its value, so "
            "the value after training cannot be estimated; set loss_type='nll'."
        )


def prepares_model_late(trainer: Trainer) -> bool:
    """Whether the model is moved, and perhaps sharded, only when training begins."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) or is_sharded(
        trainer.model
    )


def require_model_on_device(trainer: Trainer) -> None:
    """Refuse to run a model that FSDP or DeepSpeed has yet to move to its devices.

    Raises:
        ValueError: says what to do.
    """
    state, model = trainer.accelerator.state, trainer.model
    if trainer.is_fsdp_enabled:
        is_ready = isinstance(model, FSDPModule)
        is_partial = state.fsdp_plugin.cpu_ram_efficient_loading
    elif trainer.is_deepspeed_enabled:
        is_ready, is_partial = has_engine(model), any(map(is_partitioned, model.parameters()))
    else:
        return
    device = next(model.parameters()).device
    if not is_ready and (is_partial or device.type != trainer.args.device.type):
        raise ValueError(
            f"preview: {'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} moves and shards the "
            "model when training begins, so no batch can be timed before. Leave preview(trainer) "
            "out: the callback prints the preview then."
        )


def _refuse_deepspeed(trainer: Trainer) -> None:
    """Raise for settings of DeepSpeed under which state is kept where it is not read."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    config = plugin.hf_ds_config
    stage = int(config.get_value("zero_optimization.stage", 0))
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed with zero_optimization.stage={stage} shards nothing. Set stage 1, 2 or 3 "
            "(recipes/accelerate/deepspeed_zero2.yaml), or launch with DDP (torchrun, or "
            "`accelerate launch --multi_gpu`)."
        )
    for key, allowed, why in _DEEPSPEED_SETTINGS:
        value = config.get_value(key)
        if value is not None and value not in allowed:
            raise ValueError(f"DeepSpeed's {key}={value!r} {why}")
    made = type(getattr(trainer.optimizer, "optimizer", None))
    if made.__module__.startswith("deepspeed.runtime") and not ZeroOptimizer.of(trainer.optimizer):
        raise ValueError(
            f"DeepSpeed has made a {made.__name__}, whose state is not read; supported are the "
            "optimizers of ZeRO-1, -2 and -3. Leave out what chooses another one (bf16 with "
            "stage 1 and data_types.grad_accum_dtype, zenflow, super_offload)."
        )


_ON_CPU = "is not supported: state on a disk is not read. Set the device to 'cpu', or leave it out."
_GROUPS = "is not supported: parameters are then kept twice. Leave it out."
_DEEPSPEED_SETTINGS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("zero_optimization.offload_optimizer.device", ("none", "cpu"), _ON_CPU),
    ("zero_optimization.offload_param.device", ("none", "cpu"), _ON_CPU),
    ("zero_optimization.zero_hpz_partition_size", (0, 1), _GROUPS),
    ("zero_optimization.mics_shard_size", (-1, 0), _GROUPS),
    (
        "tensor_parallel.autotp_size",
        (0, 1),
        "is not supported: layers compute with parts of parameters, of which no per-example "
        "gradient follows. Leave it out.",
    ),
)
"""Keys of DeepSpeed's configuration, the values that are supported, and why others are not."""


def _sharded_otherwise(model: nn.Module) -> str | None:
    """A parameter that something else than FSDP2 has sharded, by name; None: there is none."""
    reshard(model)
    of_fsdp = {
        id(p)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for p in module.parameters()
    }
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            names = p.device_mesh.mesh_dim_names or ()
            if id(p) not in of_fsdp or "tp" in names:
                return name
    return None


def warn_of_differences(trainer: Trainer, *, is_rewritten: bool) -> None:
    """Say where a run will not be quite what the user's settings say.

    Args:
        trainer: before its first step.
        is_rewritten: whether the mixture is, after the switch.
    """
    strategy = sampling_strategy(trainer)
    if is_rewritten and strategy != "random":
        logger.warning(
            "train_sampling_strategy=%r is used in the warm-up; the mixture after it is drawn at "
            "random, in the shares of the selection.",
            strategy,
        )


def sampling_strategy(trainer: Trainer) -> str:
    """How the trainer draws its rows: ``train_sampling_strategy``.

    Before transformers 5.2 ``group_by_length=True`` stood for the value of that name.
    """
    if getattr(trainer.args, "group_by_length", False):
        return "group_by_length"
    return getattr(trainer.args, "train_sampling_strategy", "random")
