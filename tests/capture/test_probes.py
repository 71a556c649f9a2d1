import numpy as np
import pytest
import tiny
import torch
from reference import loss_of_example

from hf_auxselect import GradientStore, LinearizedTraining, RidgeSurrogate, capture_gradients
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.cost import predict_probes
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.capture.probes import losses_at, measure_probes
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.estimators.base import NUM_ENDPOINTS
from hf_auxselect.store.records import MAX_PROBE_EXAMPLES

COEFFICIENTS = np.array([[-0.5, -0.3, 0.2], [-0.2, -0.4, -0.1]])
ENDPOINTS = np.array([[-0.8, -0.5, 0.3], [-0.2, 0.0, -0.7]])
TARGET = [(6, 3), (4, 8), (9, 1)]


def stepped(optimizer_class=torch.optim.AdamW, dtype=torch.float32, **options):
    """A model and its optimizer after a few steps."""
    model = tiny.adapted(tiny.llama()).to(dtype)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], **options)
    for rows in (tiny.rows_of([(9, 5), (4, 0)]), tiny.rows_of([(7, 2), (5, 3)])):
        model(**tiny.collate(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def tasks(*counts):
    """Tasks of rows of unlike length, with the names of the letters."""
    rng = np.random.default_rng(1)
    return {
        name: tiny.rows_of([tuple(rng.integers(4, 9, 2)) for _ in range(count)])
        for name, count in zip("abc", counts, strict=False)
    }


def captured(model, optimizer, rows, directory, dim=64):
    """The store of a pass at the switch."""
    return capture_gradients(
        model,
        rows,
        tiny.rows_of(TARGET),
        tiny.collate,
        directory=directory,
        projection_dim=dim,
        optimizer=optimizer,
        progress=False,
    )


def combined(store, coefficients=COEFFICIENTS):
    """A combination of the momentum and the tasks' mean gradients, projected."""
    gradients = store.scalar("loss@optimizer")[1].astype(np.float64)
    tokens = store.num_label_tokens
    means = [
        np.average(gradients[store.task_ids == k], axis=0, weights=tokens[store.task_ids == k])
        for k in range(len(store.task_names))
    ]
    return coefficients @ np.vstack([store.vectors["momentum"], means])


def examples_of(name, rows):
    return TaskExamples(name=name, rows=rows, example_ids=range(len(rows)), num_rows=len(rows))


def probed(model, optimizer, rows, directory, displacement=combined, collate=tiny.collate):
    """The store of that pass, with probes."""
    store = captured(model, optimizer, rows, directory)
    return measure_probes(
        model,
        [examples_of(name, own) for name, own in rows.items()],
        examples_of("target", tiny.rows_of(TARGET)),
        collate,
        store,
        displacement(store),
        combined(store, ENDPOINTS),
        directory=directory,
        optimizer=optimizer,
        batch_size=4,
        progress=False,
    )


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def mean_gradient(model, rows):
    """Of the loss over the label tokens of some rows, by parameter."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row, count in zip(rows, tokens, strict=True):
        loss = loss_of_example(model, tiny.collate([row]))
        for name, value in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total[name] += count / sum(tokens) * value
    return total


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.AdamW, {"lr": 1e-2}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})],
)
def test_probes_are_the_changes_of_gradients_and_losses(tmp_path, optimizer_class, options):
    # In float32 the preconditioner makes 1e-4 of rounding, more on some processors than on others.
    model, optimizer = stepped(optimizer_class, torch.float64, **options)
    rows = tasks(7, 12)
    before = weights_of(model)
    store = probed(model, optimizer, rows, tmp_path)
    assert tiny.same(before, weights_of(model))

    state = read_optimizer(model, optimizer)
    sketch = CountSketch(64, 0)

    def project(vectors):
        parts = [sketch.project(name, v.flatten()[None])[0] for name, v in vectors.items()]
        return torch.stack(parts).sum(0).numpy()

    def in_coordinates(gradient):
        return {name: g.flatten() * state.scales[name] for name, g in gradient.items()}

    def losses():
        with torch.no_grad():
            rows = tiny.rows_of(TARGET)
            return np.array([float(loss_of_example(model, tiny.collate([row]))) for row in rows])

    first = [in_coordinates(mean_gradient(model, own)) for own in rows.values()]
    losses_before = losses()

    def move(coefficients):
        """Displace the parameters; by how much."""
        displacement = {
            name: coefficients[0] * state.momentum[name] * state.scales[name]
            + sum(c * g[name] for c, g in zip(coefficients[1:], first, strict=True))
            for name in state.scales
        }
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    step = displacement[name] * state.scales[name]
                    p.copy_(before[name] + step.view_as(p))
        return displacement

    for k, own in enumerate(rows.values()):
        displacement = project(move(COEFFICIENTS[k]))
        assert store.probes.secant_points_KD[k] == pytest.approx(displacement, abs=1e-4)
        second = in_coordinates(mean_gradient(model, own))
        change = project({name: second[name] - first[k][name] for name in second})
        assert np.abs(change).max() > 1e-3
        assert store.probes.gradient_changes_KD[k] == pytest.approx(change, abs=1e-4)
    for end, coefficients in enumerate(ENDPOINTS):
        assert store.probes.endpoints_ED[end] == pytest.approx(
            project(move(coefficients)), abs=1e-4
        )
        change = losses() - losses_before
        assert np.abs(change).min() > 1e-4
        assert store.probes.loss_changes_ET[end] == pytest.approx(change, abs=2e-5)


def test_the_nearest_combination_of_momentum_and_gradients_is_applied(tmp_path):
    def elsewhere(store):
        return 0.01 * np.random.default_rng(0).normal(size=(2, 64)) + combined(store)

    model, optimizer = stepped(lr=1e-2)
    store = probed(model, optimizer, tasks(9, 8), tmp_path, elsewhere)
    for left in elsewhere(store) - store.probes.secant_points_KD:
        for source in combined(store, np.eye(3)):
            assert abs(left @ source) < 1e-3 * np.linalg.norm(left) * np.linalg.norm(source)


def test_in_half_precision_the_displacement_is_that_after_rounding(tmp_path):
    model, optimizer = stepped(lr=1e-2)
    store = captured(model, optimizer, tasks(9, 8), tmp_path / "float32")
    wanted = combined(store)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = probed(model, optimizer, tasks(9, 8), tmp_path / "bfloat16", lambda _: wanted)
    error = np.linalg.norm(rounded.probes.secant_points_KD - wanted) / np.linalg.norm(wanted)
    assert 1e-3 < error < 0.2


def test_probes_are_added_to_the_store_on_disk(tmp_path):
    model, optimizer = stepped(lr=1e-2)
    rows = tasks(5, 6)
    store = probed(model, optimizer, rows, tmp_path)
    loaded = GradientStore.load(tmp_path)
    probes = {"second_points", "gradient_changes", "ends", "end_changes"}
    assert set(loaded.vectors) > {"momentum", "parameters"} | probes
    assert loaded.probes.target_example_ids.tolist() == [0, 1, 2]
    assert [ids.tolist() for ids in loaded.probes.task_example_ids] == [[*range(5)], [*range(6)]]
    for name, vector in store.vectors.items():
        assert np.array_equal(loaded.vectors[name], vector)
    assert len(list(tmp_path.glob("vectors.*"))) == 1


def test_a_limited_number_of_examples_is_read_spread_over_the_task(tmp_path):
    model, optimizer = stepped(lr=1e-2)
    count = 3 * MAX_PROBE_EXAMPLES
    rows = tasks(count, 5)
    for i, row in enumerate(rows["a"]):
        row["number"] = i
    read = []

    def collate(examples):
        read.extend(row["number"] for row in examples if "number" in row)
        return tiny.collate(examples)

    probed(model, optimizer, rows, tmp_path, collate=collate)
    assert len(read) == 2 * MAX_PROBE_EXAMPLES
    assert len(set(read)) == MAX_PROBE_EXAMPLES
    assert (min(read), max(read)) == (0, count - 1)
    assert np.diff(sorted(set(read))).max() <= 4


def test_what_is_not_finite_is_left_out_with_a_warning(tmp_path, caplog):
    def too_far(store):
        return 1e36 * combined(store)

    model, optimizer = stepped(lr=1e-2)
    before = weights_of(model)
    store = probed(model, optimizer, tasks(5, 6), tmp_path, too_far)
    assert store.probes is None
    assert "not finite" in caplog.text
    assert tiny.same(before, weights_of(model))


@pytest.mark.parametrize("batches_elsewhere", [0, 5])  # at the secant point, and at an endpoint
def test_an_error_leaves_the_model_as_it_was(tmp_path, batches_elsewhere):
    model, optimizer = stepped(lr=1e-2)
    before = weights_of(model)
    elsewhere = []

    def collate(examples):
        if not tiny.same(before, weights_of(model)):
            elsewhere.append(len(examples))
        if len(elsewhere) > batches_elsewhere:
            raise RuntimeError("a row that cannot be read")
        return tiny.collate(examples)

    with pytest.raises(RuntimeError, match="a row that cannot be read"):
        probed(model, optimizer, tasks(5, 6), tmp_path, collate=collate)
    assert elsewhere == [4, 1, 4, 2, 3, 3][: batches_elsewhere + 1]
    assert tiny.same(before, weights_of(model))


def test_no_more_examples_of_the_target_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_auxselect.capture.probes.MAX_PROBE_EXAMPLES", 2)
    model, optimizer = stepped(lr=1e-2)
    store = probed(model, optimizer, tasks(5, 6), tmp_path)
    monkeypatch.undo()
    every = probed(model, optimizer, tasks(2, 2), tmp_path / "all")
    assert every.probes.loss_changes_ET.shape == (2, 3)
    assert store.probes.loss_changes_ET.shape == (2, 2)


def test_losses_with_other_parameters(tmp_path):
    model, _ = stepped(lr=1e-2)
    elsewhere, _ = stepped(lr=1e-1)
    before, values = weights_of(model), weights_of(elsewhere)
    rows = tiny.rows_of(TARGET)
    there = losses_at(model, examples_of("target", rows), tiny.collate, values, batch_size=2)
    losses = there.losses_T
    assert there.example_ids.tolist() == [0, 1, 2]
    expected = [loss_of_example(elsewhere, tiny.collate([row])).item() for row in rows]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert tiny.same(before, weights_of(model))
    assert not tiny.same(before, values)


def test_a_restart_measures_where_it_begins(tmp_path):
    stores = []
    for after in ("continue", "restart"):
        callback = tiny.callback(after=after)
        trainer = tiny.trained(tiny.sft_trainer, tmp_path / after, callback)
        stores.append(GradientStore.load(tmp_path / after / "_task_selection/gradients"))
    assert stores[0].initial_losses is None
    target = stores[1].target
    with trainer.model.disable_adapter(), torch.no_grad():  # which begins as nothing
        rows = [trainer.eval_dataset[int(i)] for i in target.example_ids]
        batches = [trainer.data_collator([row]) for row in rows]
        expected = [loss_of_example(trainer.model.eval(), batch).item() for batch in batches]
    assert stores[1].initial_losses.losses_T == pytest.approx(expected, abs=1e-5)
    assert np.abs(expected - target.losses).min() > 1e-3


def test_a_run_measures_probes_unless_told_not_to(tmp_path):
    callbacks = [
        tiny.callback(),
        tiny.callback(estimator=LinearizedTraining(probes=False)),
        tiny.callback(after="restart"),
    ]
    for i, callback in enumerate(callbacks):
        tiny.trained(tiny.sft_trainer, tmp_path / str(i), callback)
    stores = [GradientStore.load(tmp_path / str(i) / "_task_selection/gradients") for i in range(3)]
    assert [store.probes is not None for store in stores] == [True, False, True]
    # A restart is estimated as a run that continues from the switch.
    training = [store.remaining_training for store in stores]
    assert [t.after for t in training] == ["continue", "continue", "restart"]
    assert training[0].learning_rates == training[2].learning_rates
    assert len(set(training[0].learning_rates)) == 6
    diagnostics = callbacks[0].report.diagnostics
    assert diagnostics["linearization_residual"] > 0
    assert "linearization_residual" not in callbacks[1].report.diagnostics


def test_the_preview_counts_the_probes(tmp_path):
    trainer = tiny.sft_trainer(tmp_path)
    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    num_tasks = len(trainer.train_dataset.unique("task"))
    memory = [
        tiny.callback(**options).preview(trainer).memory_mib * 2**20
        for options in (
            {},
            {"estimator": LinearizedTraining(probes=False)},
            {"estimator": RidgeSurrogate(base=LinearizedTraining())},
            {"after": "restart"},
        )
    ]
    assert memory[0] == pytest.approx(memory[2], rel=0.05)
    assert memory[0] == pytest.approx(memory[3], rel=0.05)
    # Tables and the optimizer's state; sources, displacement, start, and gradients of a task and of
    # a batch.
    assert memory[0] > (12 + 8) * size + 4 * (num_tasks + 5) * size
    assert memory[1] <= memory[0]
    before = weights_of(trainer.model)
    task = examples_of("a", tiny.rows_of([(6, 3)] * 9))
    options = {"num_endpoints": NUM_ENDPOINTS, "batch_size": 4}
    assert predict_probes(trainer.model, [task], task, tiny.collate, **options).seconds > 0
    assert tiny.same(before, weights_of(trainer.model))
