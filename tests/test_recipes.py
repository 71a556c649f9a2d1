"""The recipes run; the slow ones at a small size, the model of the demo replaced by a tiny one."""

import sys

from datasets import Dataset

from recipes import arithmetic, demo


class TestArithmetic:
    def test_the_tasks(self):
        tasks = arithmetic.training_tasks(6, seed=0)
        assert len(tasks) == 11
        assert all(len(dataset) == 6 for dataset in tasks.values())
        assert "shuffled answers" in tasks
        prompts = set(arithmetic.target_examples(6, 0)["prompt"])
        assert not prompts & set(arithmetic.target_examples(6, 7)["prompt"])

    def test_shuffling_keeps_questions_and_moves_answers(self):
        rows = Dataset.from_dict({"prompt": list("abcdef"), "completion": list("123456")})
        mixed = arithmetic.shuffled_answers(rows, seed=0)
        assert mixed["prompt"][:] == rows["prompt"][:]
        assert sorted(mixed["completion"]) == sorted(rows["completion"])
        assert mixed["completion"][:] != rows["completion"][:]


def test_the_script_to_copy_runs(tiny_model, tmp_path, monkeypatch, capsys):
    arguments = ["--model", tiny_model, "--output_dir", str(tmp_path), "--max_steps", "5"]
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", *arguments])
    arithmetic.main()
    shown = capsys.readouterr().out
    assert "gradient pass after step 2" in shown
    assert "target loss:" in shown


def test_the_demo_runs(tiny_model, tmp_path, monkeypatch, capsys):
    for name, value in {"STEPS": 6, "WARM_UP_STEPS": 2, "NUM_ROWS": 5}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(
        sys, "argv", ["demo.py", "--model", tiny_model, "--output_dir", str(tmp_path)]
    )
    demo.main()
    shown = capsys.readouterr().out
    assert "Measured loss" in shown
    for line in ("all tasks", "weights in random order", "chosen by hf-auxselect"):
        assert line in shown
    assert (tmp_path / "measured-0.json").is_file()
