"""The run as a user sees it: phases, files, and what is refused."""

import contextlib
import gc
import json
import logging
import socket
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import callback, trained
from transformers import Trainer

from hf_auxselect import (
    FixedSelection,
    ForwardSelection,
    GradExLogistic,
    GradientStore,
    LinearizedTraining,
    RandomEnsemble,
    SelectionReport,
    TaskSelectionCallback,
    UnsupportedLossError,
    concatenate_tasks,
)
from hf_auxselect.capture.memory import PeakMemory
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.gradient_pass import GradientPass
from hf_auxselect.plan import CostPreview, make_plan
from hf_auxselect.trainer.support import refuse_unsupported


class TestARun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("run")
        cb = callback()
        options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"}
        trainer = trained(tiny.sft_trainer, directory, cb, save_steps=2, **options)
        return trainer, cb, directory / "_task_selection"

    def test_the_files_are_there(self, run):
        _, _, files = run
        names = {str(p.relative_to(files)) for p in files.rglob("*") if p.is_file()}
        assert names >= {
            "plan.json",
            "selection.json",
            "gradients/index.json",
            "report/README.md",
            "report/report.json",
            "report/left_out.png",
        }
        assert not [name for name in names if name.endswith(".tmp") or "pkl" in name]

    def test_the_decision(self, run):
        _, cb, files = run
        decision = json.loads((files / "selection.json").read_text())
        assert decision["selected"] == cb.report.selected
        assert sum(decision["weights"].values()) == pytest.approx(1)
        assert decision["low"] <= decision["estimated_loss"] <= decision["high"]
        assert decision["estimated_loss"] <= decision["estimated_loss_all"]
        assert decision["switch_step"] == 4
        assert decision["after"] == "continue"
        assert decision["estimator"]["name"] == "LinearizedTraining"
        assert decision["selector"]["name"] == "MixtureOptimization"

    def test_each_checkpoint_from_the_switch_on_has_a_copy(self, run):
        _, _, files = run
        for step in (2, 4, 6, 8, 10):
            copy = files.parent / f"checkpoint-{step}" / "task_selection.json"
            assert copy.is_file() == (step >= 4)
            if step >= 4:
                assert copy.read_bytes() == (files / "selection.json").read_bytes()

    def test_the_loss_at_the_switch_is_what_the_trainer_logs(self, run):
        trainer, cb, _ = run
        logged = [
            e["eval_loss"] for e in trainer.state.log_history if e["step"] == 4 and "eval_loss" in e
        ]
        assert cb.report.row("no further training").loss == pytest.approx(logged[0], rel=1e-5)

    def test_it_is_logged(self, run):
        trainer, cb, _ = run
        (entry,) = [e for e in trainer.state.log_history if "auxselect/seconds" in e]
        assert entry["step"] == 4
        assert entry["auxselect/estimated_loss"] == cb.report.row("chosen").loss
        assert entry["auxselect/estimated_loss_all"] == cb.report.row("all tasks").loss
        assert entry["auxselect/num_selected"] == len(cb.report.selected)
        # SFTTrainer's own window of metrics is not cut in two.
        windows = [e for e in trainer.state.log_history if "loss" in e]
        assert all("mean_token_accuracy" in window for window in windows)

    def test_the_plan(self, run):
        _, _, files = run
        plan = json.loads((files / "plan.json").read_text())
        assert plan["switch_step"] == 4
        assert plan["tasks"] == {"a": 24, "b": 12, "c": 24, "d": 21}
        assert plan["seed"] == 42

    def test_the_report_answers_what_if(self, run):
        _, cb, files = run
        store = GradientStore.load(files / "gradients")
        fitted = LinearizedTraining().fit(store)
        expected = fitted.estimate(np.array([[True, False, True, False]])).loss[0]
        assert cb.report.estimate(["a", "c"]).loss[0] == expected
        loaded = SelectionReport.load(files)
        assert loaded.estimate({"a": 2, "c": 2}).loss[0] == pytest.approx(
            fitted.estimate([[0.5, 0, 0.5, 0]]).loss[0]
        )
        assert loaded.to_dict() == cb.report.to_dict()

    def test_the_table_is_shown(self, run_dir, capsys):
        trained(tiny.sft_trainer, run_dir, callback())
        shown = capsys.readouterr().out
        assert "Selected" in shown
        for line in ("no further training", "chosen", "all tasks", "random", "all without b"):
            assert line in shown


def test_nothing_connects_to_a_network(run_dir, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cb = callback(verify=1)
    trained(tiny.sft_trainer, run_dir, cb)
    assert cb.report.verification


class TestTheTarget:
    def test_a_key_of_several_evaluation_sets(self, run_dir):
        sets = {"sums": tiny.sums(16, 9), "letters": tiny.sums(10, 8, letters=True)}
        cb = callback(target="letters")
        trainer = trained(
            tiny.sft_trainer, run_dir, cb, eval_dataset=sets, eval_strategy="steps", eval_steps=4
        )
        logged = next(
            e["eval_letters_loss"]
            for e in trainer.state.log_history
            if e["step"] == 4 and "eval_letters_loss" in e
        )
        assert cb.report.row("no further training").loss == pytest.approx(logged, rel=1e-5)

    @pytest.mark.parametrize("kind", tiny.TRAINERS)
    @pytest.mark.parametrize("batch_size", [1, 3, 16])
    def test_examples_weigh_as_in_the_logged_loss(self, kind, batch_size, run_dir):
        """Answers of one or two digits: batches differ in label tokens."""
        cb = callback(after="observe")
        trainer = trained(
            tiny.TRAINERS[kind],
            run_dir,
            cb,
            per_device_eval_batch_size=batch_size,
            eval_strategy="steps",
            eval_steps=4,
        )
        logged = next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
        assert cb.report.row("no further training").loss == pytest.approx(logged, rel=1e-5)

    def test_a_leaked_target_is_warned_of(self, run_dir, caplog):
        with caplog.at_level(logging.WARNING):
            trained(tiny.sft_trainer, run_dir, callback(), eval_dataset=tiny.sums(24, 1, mark="a"))
        assert "the target equals the training task 'a' row for row" in caplog.text

    def test_a_target_of_other_rows_is_not(self, run_dir, caplog):
        with caplog.at_level(logging.WARNING):
            trained(tiny.sft_trainer, run_dir, callback(), eval_dataset=tiny.sums(24, 2, mark="a"))
        assert "row for row" not in caplog.text


class TestOptions:
    def test_examples_are_drawn_by_the_seed(self, run_dir):
        stores = []
        for name, seed in [("one", 1), ("again", 1), ("other", 2)]:
            cb = callback(examples_per_task=5, seed=seed, after="observe")
            trained(tiny.sft_trainer, run_dir / name, cb)
            stores.append(GradientStore.load(run_dir / name / "_task_selection" / "gradients"))
        assert np.bincount(stores[0].task_ids).tolist() == [5, 5, 5, 5]
        assert len(stores[0].target) == 5
        assert stores[0].task_sizes.tolist() == [24, 12, 24, 21]
        assert np.array_equal(stores[0].gradients, stores[1].gradients)
        assert not np.array_equal(stores[0].example_ids, stores[2].example_ids)

    def test_warm_up_as_a_share_of_the_run(self, run_dir):
        cb = callback(warmup=0.3)
        trained(tiny.sft_trainer, run_dir, cb, max_steps=12)
        assert cb.report.run["switch_step"] == 4

    def test_kept_tasks_stay(self, run_dir):
        cb = callback(keep=["b"], selector=ForwardSelection(max_tasks=2))
        trained(tiny.sft_trainer, run_dir, cb)
        assert "b" in cb.report.selected

    def test_another_directory(self, run_dir, tmp_path):
        trained(tiny.sft_trainer, run_dir, callback(output_dir=tmp_path / "elsewhere"))
        assert (tmp_path / "elsewhere" / "_task_selection" / "selection.json").is_file()
        assert not (run_dir / "_task_selection").exists()

    def test_a_fixed_selection_may_spare_the_pass(self, run_dir):
        cb = callback(selector=FixedSelection({"a": 1, "d": 3}, estimate=False))
        trained(tiny.sft_trainer, run_dir, cb)
        decision = json.loads((run_dir / "_task_selection" / "selection.json").read_text())
        assert decision["weights"] == {"a": 0.25, "b": 0, "c": 0, "d": 0.75}
        assert decision["estimated_loss"] is None
        assert not (run_dir / "_task_selection" / "gradients").exists()
        with pytest.raises(ValueError, match="gradient store is not available"):
            cb.report.estimate(["a"])

    def test_another_task_column(self, run_dir):
        data = tiny.tasks().rename_column("task", "source")
        cb = callback(task_column="source")
        trained(tiny.sft_trainer, run_dir, cb, train_dataset=data)
        assert list(cb.report.weights) == list("abcd")

    def test_rows_that_are_packed_within_tasks_are_captured_one_document_at_a_time(self, run_dir):
        from trl import pack_dataset

        unpacked = {"a": tiny.sums(20, 1), "b": tiny.sums(9, 2, letters=True)}
        tokenized = {
            n: tiny.tokenize(d).remove_columns("attention_mask") for n, d in unpacked.items()
        }
        packed = concatenate_tasks({n: pack_dataset(d, 24, "bfd") for n, d in tokenized.items()})
        assert len(packed) < 29
        trainer = trained(
            tiny.sft_trainer,
            run_dir,
            callback(after="observe"),
            train_dataset=packed,
            padding_free=True,
            max_length=None,
            learning_rate=0,
        )
        store = GradientStore.load(run_dir / "_task_selection" / "gradients")
        assert (
            store.task_sizes.tolist() == np.unique(packed["task"], return_counts=True)[1].tolist()
        )
        trainer.model.eval()
        for k, (name, dataset) in enumerate(unpacked.items()):
            with torch.no_grad():
                losses = [
                    trainer.model(**tiny.collate([row])).loss.item()
                    for row in tiny.tokenize(dataset)
                ]
            captured = store.losses[store.task_ids == k]
            assert sorted(captured) == pytest.approx(sorted(losses), rel=1e-5), name


class TestRestart:
    def test_the_adapter_optimizer_and_schedule_start_again(self, run_dir):
        states = {}

        class Look(tiny.TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                states["initial"] = tiny.weights(trainer)

            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    states["switch"] = tiny.weights(trainer)

        rates = []

        class Rates(tiny.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
                rates.append(optimizer.param_groups[0]["lr"])

        trainer = tiny.sft_trainer(
            run_dir, callback(after="restart"), Look(), Rates(), warmup_steps=2, max_steps=12
        )
        trainer.train()
        assert tiny.same(states["initial"], states["switch"])
        # Linear over 12 steps up to the switch, then linear over the remaining 8.
        first = [0, 0.5, 1, 0.9]
        second = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
        assert rates == pytest.approx([0.01 * rate for rate in first + second])
        steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
        assert steps == {8}

    def test_it_is_a_run_of_its_own_on_the_selected_rows(self, run_dir):
        """The weights at the end are those of a plain loop over the same batches."""
        cb = callback(after="restart", selector=FixedSelection(["a"]), warmup=4)
        torch.manual_seed(3)
        trainer = tiny.plain_trainer(
            run_dir,
            cb,
            model=get_peft_model(tiny.llama(), tiny.lora()),
            max_steps=10,
            max_grad_norm=0,
            weight_decay=0,
        )
        initial = tiny.weights(trainer)
        batches = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: batches.append(dict(kwargs)) if module.training else None,
            with_kwargs=True,
        )
        trainer.train()
        model = get_peft_model(tiny.llama(), tiny.lora()).train()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(initial[name])
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0)
        for step, batch in enumerate(batches[4:]):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
            batch.pop("num_items_in_batch", None)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in tiny.weights(trainer).items():
            assert torch.allclose(parameters[name], parameter, atol=1e-6)

    def test_a_schedule_that_cannot_start_again(self, run_dir):
        with pytest.raises(ValueError, match=r"after='restart'.*ReduceLROnPlateau"):
            trained(
                tiny.sft_trainer,
                run_dir,
                callback(after="restart"),
                lr_scheduler_type="reduce_lr_on_plateau",
                eval_strategy="steps",
                eval_steps=5,
            )


class TestMeetingTheTrainer:
    def test_a_callback_that_is_added_later(self, run_dir):
        trainer = tiny.sft_trainer(run_dir)
        cb = callback()
        trainer.add_callback(cb)
        trainer.train()
        assert cb.report is not None

    def test_attach(self, run_dir):
        trainer = tiny.sft_trainer(run_dir)
        cb = callback().attach(trainer)
        assert cb.attach(trainer) is cb
        trainer.train()
        assert cb.report is not None
        assert trainer.callback_handler.callbacks.count(cb) == 1

    def test_a_second_train_selects_again(self, run_dir):
        cb = callback()
        trainer = tiny.sft_trainer(run_dir, cb)
        trainer.train()
        first = cb.report
        trainer.train()
        assert cb.report is not first
        assert cb.report.row("chosen").loss != first.row("chosen").loss

    def test_nothing_of_an_earlier_report_stays(self, run_dir):
        tiny.sft_trainer(run_dir, callback()).train()
        page = run_dir / "_task_selection" / "report" / "index.html"
        assert page.with_name("left_out.png").is_file()
        fixed = callback(selector=FixedSelection(["d"], estimate=False))
        tiny.sft_trainer(run_dir, fixed).train()
        assert page.is_file()
        assert not page.with_name("left_out.png").exists()

    def test_two_trainers_in_one_process(self, run_dir):
        one, other = callback(), callback(selector=FixedSelection(["d"]))
        first = tiny.sft_trainer(run_dir / "1", one)
        second = tiny.sft_trainer(run_dir / "2", other)
        first.train()
        second.train()
        assert other.report.selected == ["d"]
        assert one.report.run["switch_step"] == 4

    def test_a_run_that_broke_off_can_be_repeated(self, run_dir):
        class Stop(tiny.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 6:
                    raise KeyboardInterrupt

        cb = callback(selector=FixedSelection(["d"]))
        trainer = tiny.sft_trainer(run_dir, cb, Stop())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.remove_callback(Stop)
        seen = tiny.spy(trainer)
        trainer.train()
        assert set("".join(seen[:4])) > {"d"}
        assert set("".join(seen[4:])) == {"d"}

    @pytest.mark.parametrize("until", ["its making", "its end", "an error"])
    def test_a_trainer_is_freed_when_it_is_out_of_use(self, until, run_dir):
        """At once, not at the next collection of cycles: it holds a model."""

        class Stop(tiny.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 6 and until == "an error":
                    raise KeyboardInterrupt

        cb = callback(selector=FixedSelection(["a"], estimate=False))
        gc.collect()
        gc.disable()
        try:
            trainer = tiny.plain_trainer(run_dir, cb, Stop())
            freed = weakref.ref(trainer)
            if until != "its making":
                with contextlib.suppress(KeyboardInterrupt):
                    trainer.train()
            del trainer
            assert freed() is None
        finally:
            gc.enable()


class TestPreview:
    def test_its_summary_tells_of_the_hosts_memory_too(self):
        sizes = {"disk_mib": 1, "memory_mib": 2, "host_memory_mib": 3}
        preview = CostPreview(num_examples=4, seconds=65, switch_step=5, **sizes)
        assert "1 min 05 s" in str(preview)
        assert "2 MiB of memory and 3 MiB of the host's memory" in str(preview)

    def test_it_counts_examples_and_changes_nothing(self, run_dir):
        cb = callback(examples_per_task=10)
        torch.manual_seed(3)
        trainer = tiny.sft_trainer(run_dir, cb)
        before = torch.get_rng_state()
        preview = cb.preview(trainer)
        assert torch.equal(before, torch.get_rng_state())
        assert preview.num_examples == 50
        assert preview.switch_step == 4
        assert preview.seconds > 0
        assert "50 examples" in str(preview)
        trainer.train()
        other = callback(examples_per_task=10)
        trained(tiny.sft_trainer, run_dir / "other", other)
        assert cb.report.to_dict()["rows"] == other.report.to_dict()["rows"]
        store = run_dir / "_task_selection" / "gradients"
        size = sum(p.stat().st_size for p in store.glob("*.safetensors")) / 2**20
        assert preview.disk_mib == pytest.approx(size, rel=0.6)  # headers weigh on tiny shards

    @pytest.mark.parametrize(
        ("checkpointing", "heads"), [(False, None), (True, None), (True, ["lm_head"])]
    )
    def test_the_memory_is_what_the_pass_takes(self, checkpointing, heads, run_dir):
        rng = np.random.default_rng(0)

        def rows(count):
            ids = [rng.integers(2, 512, rng.integers(40, 64)).tolist() for _ in range(count)]
            return Dataset.from_list(
                [{"input_ids": i, "attention_mask": [1] * len(i), "labels": i} for i in ids]
            )

        base = tiny.llama(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4
        )
        cb = callback(projection_dim=256)
        trainer = tiny.plain_trainer(
            run_dir,
            cb,
            model=get_peft_model(base, tiny.lora(r=8, modules_to_save=heads)),
            train_dataset=concatenate_tasks({"a": rows(10), "b": rows(10)}),
            eval_dataset=rows(8),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            per_device_train_batch_size=8,
        )
        predicted = cb.preview(trainer).memory_mib
        peaks = []
        run = GradientPass.run

        def measured(self, *args):
            with PeakMemory(torch.device("cpu")) as peak:
                store = run(self, *args)
            peaks.append(peak.bytes)
            return store

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GradientPass, "run", measured)
            trainer.train()
        sketch = CountSketch(256, 0)  # its tables are made by NumPy
        tables = sum(
            sketch.table_bytes(p.numel()) for p in trainer.model.parameters() if p.requires_grad
        )
        assert predicted == pytest.approx((peaks[0] + tables) / 2**20, rel=0.2)


def test_sources_of_tasks_that_the_run_does_not_have_are_warned_of(run_dir, caplog):
    cb = callback(sources={"a": {"path": "org/a"}, "misspelt": {"path": "org/b"}})
    trainer = tiny.plain_trainer(run_dir, cb)
    with caplog.at_level(logging.WARNING):
        make_plan(trainer, cb._options(), max_steps=8, must_train_on=True)
    assert "sources names ['misspelt'], but the tasks of the training set are ['a'" in caplog.text


class TestRefusals:
    """Every case raises before the first step."""

    def refuse(
        self, match, make=tiny.sft_trainer, cb=None, directory=None, error=ValueError, **options
    ):
        steps = []

        class Count(tiny.TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                steps.append(state.global_step)

        with pytest.raises(error, match=match):
            make(directory, cb or callback(), Count(), **options).train()
        assert not steps

    def test_no_task_column(self, run_dir):
        data = tiny.tasks().remove_columns("task")
        self.refuse("no column 'task'.*concatenate_tasks", directory=run_dir, train_dataset=data)

    def test_a_seed_of_the_trainer_that_cannot_seed_the_selection(self, run_dir):
        self.refuse("data_seed of TrainingArguments .*, got -1", directory=run_dir, data_seed=-1)

    def test_fewer_than_two_tasks(self, run_dir):
        data = concatenate_tasks({"a": tiny.sums(20, 1)})
        self.refuse("at least two", directory=run_dir, train_dataset=data)

    def test_a_task_that_loses_all_its_rows_to_truncation(self, run_dir):
        long = Dataset.from_list([{"prompt": "1+" * 40, "completion": "2"}] * 5)
        data = concatenate_tasks({"a": tiny.sums(20, 1), "long": long, "b": tiny.sums(20, 2)})
        self.refuse(
            # TRL 1.4 and older keep rows whose labels are all cut off.
            "the task 'long' has (lost all its rows|no label tokens)",
            directory=run_dir,
            train_dataset=data,
            max_length=16,
        )

    def test_a_task_without_label_tokens(self, run_dir):
        masked = tiny.tokenize(tiny.sums(5, 3)).map(
            lambda row: {"labels": [-100] * len(row["labels"])}
        )
        tasks = {"a": tiny.tokenize(tiny.sums(20, 1)), "masked": masked}
        self.refuse(
            "the task 'masked' has no label tokens: in all 5 examples",
            make=tiny.plain_trainer,
            directory=run_dir,
            train_dataset=concatenate_tasks(tasks),
        )

    def test_no_eval_dataset(self, run_dir):
        self.refuse("no eval_dataset", directory=run_dir, eval_dataset=None)

    def test_an_unknown_target(self, run_dir):
        sets = {"x": tiny.sums(8, 1), "y": tiny.sums(8, 2)}
        self.refuse(
            r"target='z' is not a key.*\['x', 'y'\]",
            cb=callback(target="z"),
            directory=run_dir,
            eval_dataset=sets,
        )

    def test_several_targets_and_none_named(self, run_dir):
        sets = {"x": tiny.sums(8, 1), "y": tiny.sums(8, 2)}
        self.refuse("target=None is not a key", directory=run_dir, eval_dataset=sets)

    def test_a_named_target_without_names(self, run_dir):
        self.refuse("which is not a dict", cb=callback(target="x"), directory=run_dir)

    def test_a_target_without_label_tokens(self, run_dir):
        masked = tiny.tokenize(tiny.sums(8, 1)).map(
            lambda row: {"labels": [-100] * len(row["labels"])}
        )
        self.refuse(
            "target has no label tokens",
            make=tiny.plain_trainer,
            directory=run_dir,
            eval_dataset=masked,
        )

    def test_an_iterable_dataset(self, run_dir):
        stream = tiny.tasks().to_iterable_dataset()
        self.refuse(
            r"iterable dataset.*concatenate_tasks\(.*take=n",
            directory=run_dir,
            train_dataset=stream,
        )

    def test_an_iterable_target(self, run_dir):
        stream = tiny.sums(8, 1).to_iterable_dataset()
        self.refuse(
            r"iterable dataset.*Dataset.from_list\(list\(stream.take\(n",
            directory=run_dir,
            eval_dataset=stream,
        )

    def test_a_warm_up_longer_than_the_run(self, run_dir):
        self.refuse(
            "warmup=10 ends after step 10, but the run has only 10",
            cb=callback(warmup=10),
            directory=run_dir,
        )

    def test_a_warm_up_of_the_whole_run_may_be_observed(self, run_dir):
        cb = callback(warmup=10, after="observe", estimator=GradExLogistic())
        trained(tiny.sft_trainer, run_dir, cb)
        assert cb.report is not None
        # The default estimator is about the steps that are left.
        self.refuse(
            "none would be left", cb=callback(warmup=10, after="observe"), directory=run_dir
        )

    def test_an_unknown_kept_task(self, run_dir):
        self.refuse("keep names the unknown task 'x'", cb=callback(keep=["x"]), directory=run_dir)

    def test_a_selector_that_does_not_fit_the_tasks(self, run_dir):
        for selector, match in [
            (FixedSelection(["x"]), "unknown task 'x'"),
            (RandomEnsemble(subset_size=9), "subset_size is 9, but there are 4 tasks"),
        ]:
            self.refuse(match, cb=callback(selector=selector), directory=run_dir)

    def test_examples_that_influence_each_other(self, run_dir):
        model = tiny.llama()
        model.lm_head.register_forward_hook(lambda _, args, output: output + output.mean(0))
        self.refuse(
            r"loss of an example is \d.* in a batch and \d.* alone: examples of a batch influence",
            make=tiny.plain_trainer,
            directory=run_dir,
            error=UnsupportedLossError,
            model=model,
        )

    def test_a_loss_whose_gradient_is_not_that_of_its_value(self, run_dir):
        self.refuse("loss_type='dft'", directory=run_dir, loss_type="dft")

    def test_a_trainer_of_preferences(self, run_dir):
        """One sentence, and not about an option that it lacks."""
        from trl import DPOConfig, DPOTrainer

        pairs = concatenate_tasks(
            {
                name: Dataset.from_list([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 6)
                for name in ("a", "b")
            }
        )
        arguments = tiny.ARGUMENTS | {"max_steps": 6}
        trainer = DPOTrainer(
            tiny.llama(),
            args=DPOConfig(str(run_dir), **arguments),
            train_dataset=pairs,
            eval_dataset=pairs.select(range(3)),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(),
            callbacks=[callback()],
        )
        with pytest.raises(ValueError, match=r"DPOTrainer trains on preferences.*Use SFTTrainer"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_a_model_that_was_sharded_when_it_was_loaded(self, run_dir):
        import torch.distributed as dist
        from torch.distributed.tensor import distribute_tensor, init_device_mesh

        cb = callback()
        trainer = tiny.plain_trainer(run_dir, cb)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            head = trainer.model.get_base_model().lm_head
            head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh))
            with pytest.raises(
                ValueError, match=r"lm_head.weight' is sharded by tensor parallelism.*with FSDP2"
            ):
                cb.preview(trainer)
        finally:
            dist.destroy_process_group()

    def test_an_unwritable_directory(self, run_dir, tmp_path):
        file = tmp_path / "file"
        file.write_text("")
        self.refuse(
            "output_dir: cannot write to",
            cb=callback(output_dir=file),
            directory=run_dir,
            error=OSError,
        )

    def test_a_trainer_that_makes_its_loader_by_itself(self, run_dir):
        class Own(Trainer):
            def get_train_dataloader(self):
                return self.accelerator.prepare(
                    torch.utils.data.DataLoader(
                        self._remove_unused_columns(self.train_dataset),
                        batch_size=4,
                        collate_fn=self.data_collator,
                    )
                )

        self.refuse(
            "Own.get_train_dataloader does not take its sampler",
            make=tiny.plain_trainer,
            directory=run_dir,
            trainer_class=Own,
        )

    def test_a_collator_without_labels(self, run_dir):
        def unlabelled(rows):
            return {k: v for k, v in tiny.collate(rows).items() if k != "labels"}

        self.refuse(
            "data_collator returns no labels",
            make=tiny.plain_trainer,
            directory=run_dir,
            data_collator=unlabelled,
        )

    def test_fsdp_in_its_first_version(self, run_dir, monkeypatch):
        cb = callback()
        trainer = tiny.sft_trainer(run_dir, cb)
        trainer.is_fsdp_enabled = True
        plugin = SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
        with pytest.raises(ValueError, match=r"FSDP in its first version.*fsdp_version: 2"):
            cb.preview(trainer)

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({}, r"zero_optimization.stage=0 shards nothing. Set stage 1, 2 or 3"),
            (
                {"zero_optimization.offload_optimizer.device": "nvme"},
                r"zero_optimization.offload_optimizer.device='nvme'.*Set the device to 'cpu'",
            ),
            (
                {"zero_optimization.zero_hpz_partition_size": 8},
                r"zero_hpz_partition_size=8 is not supported.*kept twice",
            ),
            ({"tensor_parallel.autotp_size": 2}, r"autotp_size=2 is not supported"),
        ],
    )
    def test_settings_of_deepspeed(self, run_dir, monkeypatch, settings, told):
        trainer = tiny.sft_trainer(run_dir, callback())
        trainer.is_deepspeed_enabled = True
        found = settings and {"zero_optimization.stage": 3} | settings
        plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(get_value=found.get))
        of_all = type(trainer.accelerator.state)
        monkeypatch.setattr(of_all, "deepspeed_plugin", property(lambda state: plugin))
        with pytest.raises(ValueError, match=told):
            refuse_unsupported(trainer)

    def test_processes_that_are_not_connected(self, run_dir, monkeypatch):
        cb = callback()
        trainer = tiny.sft_trainer(run_dir, cb)
        monkeypatch.setenv("WORLD_SIZE", "2")
        cb.preview(trainer)  # a cluster may set it; a launcher of processes sets this, too:
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(ValueError, match=r"started 2 processes.*not connected.*use_cpu=True"):
            cb.preview(trainer)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warmup": 0}, ValueError, "warmup must be"),
        ({"warmup": 1.5}, ValueError, "warmup must be"),
        ({"warmup": True}, ValueError, "warmup must be"),
        ({"target": 3}, TypeError, "target must be a key of eval_dataset or None, got 3"),
        ({"task_column": None}, TypeError, "task_column must be the name of a column, got None"),
        ({"after": "stop"}, ValueError, "after must be one of"),
        ({"keep": "abc"}, TypeError, "keep must be a sequence"),
        ({"keep": None}, TypeError, "keep must be a sequence of task names, got None"),
        ({"keep": [2.5]}, TypeError, "keep must be a sequence of task names, got 2.5 among them"),
        (
            {"groups": None},
            TypeError,
            "groups must be a sequence of keys of eval_dataset, got None",
        ),
        ({"groups": "a"}, TypeError, "groups must be a sequence of keys of eval_dataset, got 'a'"),
        ({"examples_per_task": 2.5}, ValueError, "examples_per_task must be an int .*; got 2.5"),
        ({"examples_per_task": "256"}, ValueError, "examples_per_task must be an int .* got '256'"),
        ({"projection_dim": 4096.5}, ValueError, "projection_dim must be an int .* got 4096.5"),
        ({"projection_dim": None}, ValueError, "projection_dim must be an int of at least 2, got"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be an int .*, or None; got 2.5"),
        ({"batch_size": True}, ValueError, "batch_size must be an int .*, or None; got True"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0, or None; got -1"),
        ({"seed": "x"}, ValueError, "seed must be an int of at least 0, or None; got 'x'"),
        ({"output_dir": 3}, TypeError, "output_dir must be a path or None, got 3"),
        ({"sources": ["a"]}, TypeError, r"sources must map tasks to entries .*, got \['a'\]"),
        ({"examples_per_task": 1}, ValueError, "examples_per_task must be an int of at least 2"),
        ({"projection_dim": 1}, ValueError, "projection_dim must be an int of at least 2"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int of at least 1"),
        ({"sources": {"a": "me/data"}}, TypeError, "sources\\['a'\\] must be an entry of TRL's"),
        ({"sources": {"a": {"path": {1}}}}, TypeError, "sources must hold texts, numbers"),
        ({"estimator": "logistic"}, TypeError, "estimator must be an object"),
        ({"selector": ForwardSelection}, TypeError, "selector must be an object"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        TaskSelectionCallback(**options)
