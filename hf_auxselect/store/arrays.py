"""The gradient store in memory: what the gradient pass measured.

Shapes: N examples, K tasks, D projection_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from hf_auxselect.files import JsonDict
from hf_auxselect.store.format import (
    INDEX_NAME,
    Arrays,
    ShardEntry,
    StoreError,
    TaskEntry,
    read_index,
    read_merged,
    read_vectors,
    role_of,
)
from hf_auxselect.store.records import (
    MAX_PROBE_EXAMPLES,
    InitialLosses,
    LayerGradients,
    OptimizerRecord,
    Probes,
    RemainingTraining,
    is_integer_vector,
)


class GradientStore:
    """Projected gradients, outputs and losses of examples, grouped by task.

    All are taken at the linearization point: the parameters of the model at the switch. Rows are
    ordered by task, then by example id; the arrays are read only. Made by
    :func:`hf_auxselect.capture_gradients`, read back by :meth:`load`. Gradients that were loaded
    stay on disk, mapped into memory: take some rows at a time to use little of it.

    Attributes:
        task_names: names of the K tasks, in the order of ``task_ids``.
        task_ids: int64 [N], task of each example.
        example_ids: int64 [N], row number of the example in the dataset that was given.
        losses: float32 [N], nats per label token, mean over the example's label tokens.
        num_label_tokens: int64 [N].
        example_weights: float64 [N], weight of the example in the loss of its task; they sum to 1
            within a task. In proportion to the label tokens, unless given otherwise.
        task_sizes: int64 [K], rows that each task has for training (the store may hold fewer).
        groups: further targets by name, each a store of the same form as ``target``.
        metadata: what is known of the capture, as JSON values: projection, parameters, optimizer
            and training; read the last two by ``optimizer`` and ``remaining_training``.
        vectors: float32 [D] each, projected: the optimizer's ``momentum`` and the ``parameters``,
            in the optimizer's coordinates; empty if the store was captured without it. And the
            arrays of ``probes``, ``initial_losses`` and ``layers``, by their names on disk. The
            properties of these names, and ``optimizer``, read them.
    """

    def __init__(
        self,
        *,
        task_names: Sequence[str],
        task_ids: np.ndarray,
        example_ids: np.ndarray,
        losses: np.ndarray,
        num_label_tokens: np.ndarray,
        scalars: Mapping[str, tuple[np.ndarray, np.ndarray]],
        example_weights: np.ndarray | None = None,
        task_sizes: Sequence[int] | np.ndarray | None = None,
        target: GradientStore | None = None,
        groups: Mapping[str, GradientStore] | None = None,
        metadata: JsonDict | None = None,
        vectors: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.task_names = list(task_names)
        self.task_ids = _read_only(task_ids, np.int64)
        self.example_ids = _read_only(example_ids, np.int64)
        self.losses = _read_only(losses, np.float32)
        self.num_label_tokens = _read_only(num_label_tokens, np.int64)
        self._scalars = {
            name: (_read_only(outputs, np.float32), _read_only(gradients, np.float32))
            for name, (outputs, gradients) in scalars.items()
        }
        if task_sizes is None:
            task_sizes = np.bincount(self.task_ids, minlength=len(self.task_names))
        self.task_sizes = _read_only(task_sizes, np.int64)
        weights = self.num_label_tokens if example_weights is None else example_weights
        totals = self._sum_by_task(weights)
        for name, total in zip(self.task_names, totals, strict=True):
            if not total > 0:
                raise ValueError(
                    f"task {name!r} has no label tokens; nothing could be learnt from it."
                )
        self.example_weights = _read_only(weights / totals[self.task_ids])
        self._target = target
        self.groups = dict(groups or {})
        self.metadata: JsonDict = metadata or {}
        self.vectors = _read_only_vectors(vectors or {})

    def with_vectors(self, vectors: Mapping[str, np.ndarray]) -> GradientStore:
        """The same store with further vectors, as :func:`add_vectors` writes them."""
        store = copy.copy(self)
        store.vectors = self.vectors | _read_only_vectors(vectors)
        return store

    def __len__(self) -> int:
        return len(self.task_ids)

    def __repr__(self) -> str:
        return (
            f"GradientStore({len(self)} examples of {len(self.task_names)} tasks, "
            f"projection_dim={self.gradients.shape[1]}, scalars={list(self.scalars)})"
        )

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the differentiated scalars; the first is that of ``gradients``."""
        return tuple(self._scalars)

    def scalar(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Outputs float32 [N] and projected gradients float32 [N, D] of one differentiated scalar.

        Raises:
            KeyError: the scalar was not captured; the message lists those that were.
        """
        if name not in self._scalars:
            raise KeyError(
                f"scalar {name!r} was not captured; this store has {list(self.scalars)}."
            )
        return self._scalars[name]

    @property
    def outputs(self) -> np.ndarray:
        """float32 [N]: the first scalar."""
        return self.scalar(self.scalars[0])[0]

    @property
    def gradients(self) -> np.ndarray:
        """float32 [N, D]: the projected gradient of the first scalar."""
        return self.scalar(self.scalars[0])[1]

    @property
    def loss_gradients(self) -> np.ndarray:
        """float32 [N, D]: the projected gradient of each example's loss.

        In the optimizer's coordinates if it was captured in them, else in the model's parameters;
        that of the first scalar if the loss was not captured.
        """
        wanted = (name for name in ("loss@optimizer", "loss") if name in self.scalars)
        return self.scalar(next(wanted, self.scalars[0]))[1]

    @property
    def target(self) -> GradientStore:
        """The target's examples: a store of the same form with one task."""
        if self._target is None:
            raise AttributeError("this is the store of a target; it has no target of its own.")
        return self._target

    @property
    def examples_per_row(self) -> np.ndarray:
        """float64 [K]: mean examples in a row that training draws; 1 but where rows are packed."""
        training = self.remaining_training
        packed = {} if training is None else training.examples_per_row
        return np.array([packed.get(name, 1.0) for name in self.task_names])

    @property
    def remaining_training(self) -> RemainingTraining | None:
        """The training after the switch; None if the store was captured without a trainer."""
        content = self.metadata.get("training")
        return RemainingTraining.from_json(content) if content else None

    @property
    def optimizer(self) -> OptimizerRecord | None:
        """The optimizer of the run; None if the store was captured without it."""
        content = self.metadata.get("optimizer")
        return OptimizerRecord.read(content, self.vectors) if content else None

    @property
    def probes(self) -> Probes | None:
        """Gradients and losses at displaced parameters; None if they were not measured."""
        if self._target is None or not Probes.are_in(self.vectors):
            return None
        return Probes.read(
            self.vectors,
            task_example_ids=[
                self.example_ids[self.rows_to_probe(k)] for k in range(len(self.task_names))
            ],
            target_example_ids=self._target._evenly_spread_ids(
                self.vectors["end_changes"].shape[1]
            ),
        )

    @property
    def initial_losses(self) -> InitialLosses | None:
        """The target's losses where training restarts; None if it does not."""
        if self._target is None or not InitialLosses.are_in(self.vectors):
            return None
        count = len(self.vectors["initial_losses"])
        return InitialLosses.read(self.vectors, example_ids=self._target._evenly_spread_ids(count))

    @property
    def layers(self) -> LayerGradients | None:
        """Gradients of the target with respect to each layer; None if they were not captured."""
        content = self.metadata.get("layers")
        return LayerGradients.read(content, self.vectors) if content else None

    def rows_to_probe(self, k: int) -> np.ndarray:
        """Rows int64 of the examples of a task that probes read again, evenly spread.

        Examples without a label token have no loss and no gradient.
        """
        rows = np.flatnonzero((self.task_ids == k) & (self.num_label_tokens > 0))
        return rows[evenly_spread(len(rows), MAX_PROBE_EXAMPLES)]

    def rows_of(self, example_ids: np.ndarray) -> np.ndarray:
        """Rows int64 [.] of some examples of a store of one task, such as a target.

        Raises:
            StoreError: the store does not hold one of them.
        """
        order = np.argsort(self.example_ids, kind="stable")
        places = np.searchsorted(self.example_ids, example_ids, sorter=order)
        rows = order[np.minimum(places, len(order) - 1)]
        if not np.array_equal(self.example_ids[rows], example_ids):
            raise StoreError(f"{self!r} lacks examples that the probes were measured on.")
        return rows

    def _evenly_spread_ids(self, count: int) -> np.ndarray:
        """Ids of the examples that were read again, for stores that do not hold these ids."""
        return self.example_ids[evenly_spread(len(self), count)]

    @cached_property
    def task_losses(self) -> np.ndarray:
        """float64 [K]: loss of each task, nats per label token."""
        return self._sum_by_task(self.example_weights * self.losses)

    def mean_gradients(self) -> np.ndarray:
        """float64 [K, D]: gradient of each task's mean loss at the linearization point.

        In the optimizer's coordinates if it was captured in them, else in the model's parameters.
        """
        gradients_ND = self.loss_gradients
        means_KD = np.zeros((len(self.task_names), gradients_ND.shape[1]))
        for k in range(len(means_KD)):
            examples = self.task_ids == k
            means_KD[k] = self.example_weights[examples] @ gradients_ND[examples]
        return means_KD

    def _sum_by_task(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.task_ids, weights=values, minlength=len(self.task_names))

    @classmethod
    def load(cls, directory: str | Path) -> GradientStore:
        """Map a complete store into memory, and check every shard against its checksum.

        Raises:
            FileNotFoundError: there is no store in ``directory``.
            StoreError: a file is damaged, missing or of a foreign format; the message names it, and
                the rows and the task where it is damaged.
        """
        directory = Path(directory)
        index = read_index(directory)
        if not index["complete"]:
            raise StoreError(
                f"{directory / INDEX_NAME}: the gradient pass was interrupted. Resume the run (or "
                "capture into the same directory again): it goes on where it stopped."
            )
        vectors = read_vectors(directory, index["vectors"])

        def assemble(
            tasks: list[TaskEntry],
            target: GradientStore | None = None,
            groups: Mapping[str, GradientStore] | None = None,
        ) -> GradientStore:
            position = {(task["name"], role_of(task)): k for k, task in enumerate(tasks)}

            def task_of(shard: ShardEntry) -> int | None:
                return position.get((shard["task"], role_of(shard)))

            shards = [entry for entry in index["shards"] if task_of(entry) is not None]
            column = read_merged(directory, shards, index["scalars"])
            return cls(
                task_names=[task["name"] for task in tasks],
                task_ids=np.repeat(
                    [task_of(entry) for entry in shards],
                    [entry["num_examples"] for entry in shards],
                ),
                example_ids=column["example_ids"],
                losses=column["losses"],
                num_label_tokens=column["num_label_tokens"],
                example_weights=column["example_weights"],
                scalars={
                    name: (column[f"outputs.{name}"], column[f"gradients.{name}"])
                    for name in index["scalars"]
                },
                task_sizes=[task["num_rows"] for task in tasks],
                target=target,
                groups=groups,
                metadata=index["metadata"],
                vectors=vectors,
            )

        by_role: dict[str, list[TaskEntry]] = {"task": [], "target": [], "group": []}
        for task in index["tasks"]:
            by_role[role_of(task)].append(task)
        return assemble(
            by_role["task"],
            target=assemble(by_role["target"]),
            groups={task["name"]: assemble([task]) for task in by_role["group"]},
        )


def evenly_spread(count: int, at_most: int) -> np.ndarray:
    """Places int64 [.] of up to ``at_most`` of ``count`` examples, spread evenly over all."""
    size = min(count, at_most)
    return np.arange(size) * (count - 1) // max(size - 1, 1)


def _read_only(array: np.ndarray | Sequence[int], dtype: type | None = None) -> np.ndarray:
    view = np.asarray(array, dtype).view()
    view.flags.writeable = False
    return view


def _read_only_vectors(vectors: Mapping[str, np.ndarray]) -> Arrays:
    return {
        name: _read_only(vector, np.int64 if is_integer_vector(name) else np.float32)
        for name, vector in vectors.items()
    }
