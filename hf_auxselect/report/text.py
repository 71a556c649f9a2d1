"""A report in words: sentences on its results, and a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_auxselect.report.content import DecisionLine, Measurement, Race, ReportContent

_LONGEST_NAME = 80
"""Characters of a finalist's name within a sentence."""

_NAMED = 6
"""Tasks of a mixture that a sentence names."""

SAME = 1e-12
"""Nats: a smaller difference from all tasks is rounding of the same mixture."""


def printable(text: str) -> str:
    """A name for the terminal: colours, newlines, right-to-left marks and the like escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters; an ellipsis stands for what is left out."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def shown(value: Any) -> str:
    """A value of a setting or diagnostic, for readers."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def comparison_sentence(content: ReportContent) -> str:
    """The chosen mixture compared with all tasks; empty without estimates."""
    difference = content.difference
    if difference is None:
        return ""
    if abs(difference.loss) < SAME:
        return "The chosen mixture is that of all tasks."
    if difference.low > 0:
        verdict = "all tasks are significantly better"
    elif difference.high < 0:
        verdict = "significantly better than all tasks"
    else:
        verdict = "not significantly different from all tasks"
    return (
        f"Chosen mixture minus all tasks: {difference.loss:+.4f} "
        f"[{difference.low:+.4f}, {difference.high:+.4f}] nats per label token: {verdict}."
    )


def agreement_sentence(content: ReportContent) -> str:
    """How the estimates agree with the ground-truth runs; empty if there are none."""
    runs = content.verification
    if not runs:
        return ""
    measured = np.array([run.measured for run in runs])
    estimated = np.array([run.estimated for run in runs])
    covered = sum(run.low <= run.measured <= run.high for run in runs)
    error = np.mean(np.abs(estimated - measured) / measured)
    text = (
        f"Mean absolute error of the estimates: {error:.1%} of the measured loss; {covered} of "
        f"{len(runs)} intervals contain the measured loss."
    )
    by_name = {run.name: run.measured for run in runs}
    if {"chosen", "all tasks"} <= by_name.keys():
        gain = by_name["all tasks"] - by_name["chosen"]
        text += f" The chosen mixture's measured loss is {abs(gain):.4f} nats per label token "
        text += "below all tasks." if gain > 0 else "above all tasks: the choice did not win."
    return text


def confirmation_sentence(content: ReportContent) -> str:
    """What the race between finalists has decided; empty if there was none."""
    race = content.confirmation
    if race is None:
        return ""
    if not race.steps:
        return (
            "There was nothing to confirm: the choice is that of all tasks, and the selector has "
            "tried no mixture that differs enough."
        )
    names = dict.fromkeys([race.winner, race.choice, "all tasks"])
    told = [f"{_short(name)} {_measured(race, name)}" for name in names]
    decision = "confirmed the choice" if race.winner == race.choice else "changed the choice"
    last = content.run.get("max_steps", race.steps[-1])
    when = "" if race.steps[-1] == last else f", measured after step {race.steps[-1]} of {last}"
    return (
        f"Training on {len(race.finalists)} finalists has {decision}: {', '.join(told)} nats per "
        f"label token{when}."
    )


def evaluations_sentence(content: ReportContent) -> str:
    """The target's measured loss and metrics, at each step; empty if nothing was measured."""
    if not content.evaluations:
        return ""
    told = [
        f"after step {one.step} loss {nats(one.loss)}"
        + "".join(f", {printable(name)} {value:.4g}" for name, value in one.metrics.items())
        for one in content.evaluations
    ]
    return f"Measured on the target: {'; '.join(told)}."


def layers_sentence(content: ReportContent) -> str:
    """Which layers were chosen, and what for; empty if none were asked for."""
    layers = content.layers
    if layers is None:
        return ""
    kept = [name for name, rate in layers["rates"].items() if rate > 0]
    meaning = {
        "all": "the estimates know the gradients of these alone; all layers are trained",
        "freeze": "the others keep their values from the switch on",
        "scale": "from the switch on their steps are multiplied by the rates, those of the others "
        "by 0",
    }[layers["selection"]["training"]]
    how = "named" if layers["selection"]["names"] else f"kept by {layers['selection']['method']}"
    return f"{len(kept)} of {len(layers['rates'])} layers are {how}: {meaning}."


def _measured(race: Race, name: str) -> str:
    """A finalist's last measured loss; of one that was dropped, with the winner's at that step."""
    losses, winner = race.finalist(name).losses, race.finalist(race.winner).losses
    last = len(losses) - 1
    if last < len(race.steps) - 1:
        return (
            f"{nats(losses[last])} (dropped at step {race.steps[last]}, where "
            f"{_short(race.winner)} had {nats(winner[last])})"
        )
    return nats(losses[last])


def _short(name: str) -> str:
    return shortened(printable(name), _LONGEST_NAME)


def nats(loss: float | None) -> str:
    """A loss for readers; None is one that was not measured or not finite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def mixture(weights: Mapping[str, float]) -> str:
    """A mixture in words: its tasks with their shares, the largest first."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    named = [f"{_short(name)} {weight:.0%}" for name, weight in ordered[:_NAMED]]
    more = len(ordered) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def decision_sentence(line: DecisionLine) -> str:
    """One of the decisions of a run that selects several times."""
    told = f"step {line.step}, for {_short(line.target)}: {mixture(line.weights)} ({line.result}"
    if line.p_value is not None:
        told += f", p = {line.p_value:.3f}"
    told += ")."
    if line.loss is not None:
        told += f" Loss {line.loss:.4f}"
        told += "" if line.estimated is None else f", estimated for the end {line.estimated:.4f}"
        told += "."
    return told


def calibration_sentence(content: ReportContent) -> str:
    """What the calibration runs are; empty if there are none."""
    if not content.calibration:
        return ""
    seconds = sum(run.seconds for run in content.calibration)
    return (
        "Ground-truth runs before the choice, to which the estimates were calibrated. They took "
        f"{seconds:.0f} seconds. The estimates of this table are those before calibration."
    )


def summary(content: ReportContent) -> list[str]:
    """The report in a few sentences, without its tables."""
    sentences = [
        _title(content),
        comparison_sentence(content),
        confirmation_sentence(content),
        layers_sentence(content),
        agreement_sentence(content),
        evaluations_sentence(content),
    ]
    return [text for text in [*sentences, *_warnings(content)] if text]


def to_text(content: ReportContent) -> str:
    """The report for the terminal."""
    lines = [_title(content)]
    if content.decisions:
        lines.append("Selections of this run, of which this is the last:")
        lines += [f"  {decision_sentence(line)}" for line in content.decisions]
    if content.rows:
        lines.append("Estimated target loss, nats per label token, with 90% intervals:")
        rows = [row for row in content.rows if row.added is None]
        width = max(len(printable(row.name)) for row in rows)
        for row in rows:
            name = printable(row.name)
            lines.append(f"  {name:<{width}}  {row.loss:7.4f}  [{row.low:.4f}, {row.high:.4f}]")
        lines += [comparison_sentence(content)] if content.difference else []
    if content.group_lines:
        lines.append("Estimated losses of the groups, nats per label token: before, all, chosen:")
        width = max(len(printable(line.name)) for line in content.group_lines)
        lines += [
            f"  {printable(line.name):<{width}}  {line.before:7.4f}  {line.all_tasks:7.4f}  "
            f"{line.chosen:7.4f}"
            + ("" if line.price is None else f"  shadow price {line.price:.3g}")
            for line in content.group_lines
        ]
    if content.confirmation is not None:
        lines += _race(content.confirmation)
        lines.append(confirmation_sentence(content))
    if content.layers is not None:
        lines.append(layers_sentence(content))
    lines += _runs("Ground-truth runs", content.verification, agreement_sentence(content))
    lines += _runs("Calibration runs", content.calibration, calibration_sentence(content))
    if content.evaluations:
        lines.append(evaluations_sentence(content))
    return "\n".join([*lines, *_warnings(content)])


def _runs(title: str, runs: Sequence[Measurement], sentence: str) -> list[str]:
    if not runs:
        return []
    width = max(len(printable(run.name)) for run in runs)
    return [
        f"{title}: measured loss, estimated loss, 90% interval:",
        *(
            f"  {printable(run.name):<{width}}  {run.measured:7.4f}  {run.estimated:7.4f}  "
            f"[{run.low:.4f}, {run.high:.4f}]"
            for run in runs
        ),
        f"  {sentence}",
    ]


def _race(race: Race) -> list[str]:
    if not race.steps:
        return []
    width = max(len(printable(one.name)) for one in race.finalists)
    at = ", ".join(map(str, race.steps))
    return [
        f"Finalists: measured loss after step {at}:",
        *(
            f"  {printable(one.name):<{width}}  {'  '.join(map(nats, one.losses))}  "
            f"{race.verdict(one)}".rstrip()
            for one in race.finalists
        ),
    ]


def _title(content: ReportContent) -> str:
    number, total = len(content.selected), len(content.weights)
    named = [f"{printable(name)}{share}" for name, share in selected_shares(content)]
    if named[0].endswith("%") and number > _NAMED:
        named[_NAMED:] = []
        named[-1] += f" and {number - _NAMED} more"
    return f"Selected {number} of {total} tasks: {', '.join(named)}"


def selected_shares(content: ReportContent) -> list[tuple[str, str]]:
    """The selected tasks and, where shares differ, the shares in words, the largest first."""
    shares = {name: content.weights[name] for name in content.selected}
    if len({round(share, 6) for share in shares.values()}) == 1:
        return [(name, "") for name in shares]
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [(name, f" {share:.0%}") for name, share in ordered]


def _warnings(content: ReportContent) -> list[str]:
    return [f"Warning: {text}" for text in content.warnings]
