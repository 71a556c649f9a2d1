"""A script as users launch it; started by test_launch.py under ``accelerate launch``."""

import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import tiny
import torch
from torch.distributed.tensor import DTensor


def main(output: Path) -> None:
    torch.set_num_threads(1)
    callback = tiny.callback()
    # The weights at the switch are then those of any number of processes.
    trainer = tiny.sft_trainer(output, callback, learning_rate=0.0)
    rank = trainer.args.process_index
    trainer.train()
    result = {
        "world_size": trainer.args.world_size,
        "is_sharded": any(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "weights": callback.report.weights,
        "losses": [row.loss for row in callback.report.rows],
    }
    (output / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with tiny.fsdp_on_cpu():
        main(Path(sys.argv[1]))
    tiny.leave()
