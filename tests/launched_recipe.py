"""Runs a recipe's own command line, and records its selections; for test_recipe_launch.py.

It is started as ``launched_recipe.py DIRECTORY MODULE ARGUMENTS...``, by a launcher.
"""

import json
import os
import runpy
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

import tiny
import torch
from matplotlib.figure import Figure
from transformers import Trainer

from hf_auxselect import TaskSelectionCallback


def main(directory: Path, module: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    # Rendering takes longer than a tiny run.
    Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")
    runs = []
    train = Trainer.train

    def recorded(trainer, *args, **kwargs):
        result = train(trainer, *args, **kwargs)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TaskSelectionCallback):
                runs.append(
                    {"world_size": trainer.args.world_size, "weights": callback.report.weights}
                )
        return result

    Trainer.train = recorded
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    (directory / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    tiny.leave()
