"""Runs the command lines of recipes, and records their selections; for test_recipe_launch.py.

It is started as ``launched_recipe.py DIRECTORY MODULE ARGUMENTS... [+ MODULE ARGUMENTS...]...``, by
a launcher: a start takes longer than a tiny run.
"""

import importlib
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

import tiny
import torch
from matplotlib.figure import Figure
from transformers import Trainer

from hf_auxselect import TaskSelectionCallback
from recipes import noisy_groups


def main(directory: Path, commands: list[list[str]]) -> None:
    torch.set_num_threads(1)
    # Rendering takes longer than a tiny run.
    Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")
    # Its sizes are the paper's, and no options.
    noisy_groups.WIDTH, noisy_groups.GROUP_SIZE, noisy_groups.TARGET_SIZE = 8, 3, 10
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
    selections = {}
    for module, *arguments in commands:
        sys.argv = [module, *arguments]
        importlib.import_module(module).main()
        selections[module], runs[:] = list(runs), []
    rank = os.environ.get("RANK", "0")
    (directory / f"rank{rank}.json").write_text(json.dumps(selections))


if __name__ == "__main__":
    words = itertools.groupby(sys.argv[2:], "+".__eq__)
    main(Path(sys.argv[1]), [list(command) for is_plus, command in words if not is_plus])
    tiny.leave()
