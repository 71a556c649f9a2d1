"""Pushes a report to the Hub: to the card of a model, as a dataset, or as a static Space.

A push is one commit on the commit that the card was read from, or nothing. If the repo has moved
meanwhile, the card is read again. The client leaves requests without a time limit, so that each
attempt runs in a thread that is waited for only so long.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from hf_auxselect.files import to_json
from hf_auxselect.report import card
from hf_auxselect.report.text import printable

if TYPE_CHECKING:
    from hf_auxselect.report.report import SelectionReport

T = TypeVar("T")

REPO_TYPES = ("model", "dataset", "space")
_OF_THE_CLIENT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors are those of a connection; which one depends on the client's release."""
_LONGEST_MESSAGE = 200


class PushError(OSError):
    """The Hub has not taken a report. Nothing was committed; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how long a push is tried.

    With the defaults it ends within ten minutes, after which a process group gives up on the main
    process (PyTorch's default for NCCL).

    Args:
        attempts: number of attempts at most.
        seconds: time limit of an attempt.
        first_wait: seconds before the second attempt; doubled from one to the next.
        longest_wait: seconds. Where the Hub asks for a longer wait, the push fails.
        sleep: waits for some seconds.
    """

    attempts: int = 5
    seconds: float = 90.0
    first_wait: float = 1.0
    longest_wait: float = 30.0
    sleep: Callable[[float], None] = time.sleep


RETRIES = Retries()


def push(
    report: SelectionReport,
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    retries: Retries = RETRIES,
) -> str:
    """Push a report to a repo; see :meth:`SelectionReport.push_to_hub`."""
    if repo_type not in REPO_TYPES:
        raise ValueError(f"repo_type must be one of {list(REPO_TYPES)}, got {repo_type!r}.")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            f"token: got {len(token)} characters, among them a space, a newline or one that is not "
            "ASCII; pass the token alone."
        )
    folder = "" if repo_type == "space" else f"{card.FOLDER}/"
    files = {f"{folder}{name}": content for name, content in _files(report).items()}
    if repo_type == "space":
        files.pop("README.md")  # there, it is the card
    configs = []
    if repo_type == "dataset":
        from hf_auxselect.report.tables import parquet_tables  # pyarrow is slow to import

        for name, content in parquet_tables(report).items():
            files[f"{folder}{name}.parquet"] = content
            configs.append({"config_name": name, "data_files": f"{folder}{name}.parquet"})
    api, section = HfApi(token=token), card.section(report, files)

    def commit() -> str:
        repo = api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=private,
            exist_ok=True,
            space_sdk="static" if repo_type == "space" else None,
        )
        parent = api.repo_info(repo.repo_id, repo_type=repo_type, revision=revision).sha
        assert parent is not None, "the Hub names the commit that a branch is at"
        present = _read_card(repo, parent, token)
        if repo_type == "model":
            metadata = card.model_metadata(report, repo.repo_id, revision)
        elif repo_type == "dataset":
            metadata = card.Metadata(
                defaults={"pretty_name": "Task selection"},
                lists={"tags": card.TAGS},
                configs=configs,
            )
        else:
            metadata = card.Metadata(
                fixed={"sdk": "static"}, defaults=_SPACE, lists={"tags": card.TAGS}
            )
        try:
            readme = card.edit_card(present, section, metadata, repo.repo_id.rpartition("/")[2])
        except ValueError as error:
            raise ValueError(
                f"README.md of the repo: {error}; correct it, or pass another repo_id"
            ) from error
        contents = files | {"README.md": readme.encode()}
        api.create_commit(
            repo.repo_id,
            # New ones for each attempt: the client writes into them.
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message="Add the report of a task selection",
            repo_type=repo_type,
            revision=revision,
            parent_commit=parent,
        )
        return f"{repo}/tree/{revision}" if revision else str(repo)

    try:
        return _retried(commit, retries, secrets={token, get_token()} - {None, ""})
    except _Refused as refused:
        where = f"{repo_type} repo {printable(repo_id)!r}"
        raise PushError(f"the report was not pushed to the {where}: {refused}.") from None


_SPACE = {
    "title": "Task selection",
    "emoji": "📊",
    "colorFrom": "blue",
    "colorTo": "green",
}


def _files(report: SelectionReport) -> dict[str, bytes]:
    """What a report saves, by path within its directory, and the decision as ``selection.json``."""
    decision: dict[str, Any] = {"selected": report.selected, "weights": report.weights}
    if report.rows:
        chosen = report.row("chosen")
        decision |= {"estimated_loss": chosen.loss, "low": chosen.low, "high": chosen.high}
        decision["estimated_loss_all"] = report.row("all tasks").loss
    run: dict[str, Any] = {**report.run}
    decision |= {k: run[k] for k in ("created", "switch_step", "after", "seed") if k in run}
    decision |= {"estimator": report.estimator, "selector": report.selector}
    with tempfile.TemporaryDirectory() as directory:
        report.save(directory)
        paths = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()]
        files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
    return files | {"selection.json": to_json(decision).encode()}


def _read_card(repo: RepoUrl, commit: str, token: str | None) -> str:
    """The README of a commit; empty only if the Hub says that there is none."""
    url = f"{repo}/resolve/{commit}/README.md"
    response = get_session().get(url, headers=build_hf_headers(token=token))
    try:
        hf_raise_for_status(response)
    except EntryNotFoundError:
        return ""
    try:
        return response.content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"README.md of the repo is not UTF-8 ({error.reason})") from error


class _Refused(Exception):
    """What went wrong and what to do, in words; for :func:`push` alone."""


def _retried(function: Callable[[], T], retries: Retries, secrets: Collection[str | None]) -> T:
    """The result of ``function``; tried again after what may pass.

    Raises:
        _Refused: it did not work; says why, without the secrets.
    """
    for attempt in range(1, retries.attempts + 1):
        try:
            return _within(retries.seconds, function)
        except Exception as error:
            told, may_pass = _explained(error, secrets)
            asked = _asked_wait(error)
            if asked is not None and asked > retries.longest_wait:
                raise _Refused(f"{told}; it asks to wait {asked:.0f} seconds") from None
            if not may_pass or attempt == retries.attempts:
                tried = f" (tried {attempt} times)" if attempt > 1 else ""
                raise _Refused(told + tried) from None
        wait = min(retries.first_wait * 2 ** (attempt - 1), retries.longest_wait)
        retries.sleep(wait if asked is None else asked)
    raise AssertionError("attempts must be at least 1")


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of ``function``, called in another thread.

    After a time-out the thread is left behind. What it may still commit has the parent of its
    attempt, so that the Hub takes either its commit or that of a later attempt.

    Raises:
        TimeoutError: it took longer.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)  # does not keep the interpreter from ending
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors.pop()  # the list would keep it, and it all frames up to here
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return results[0]


def _explained(error: BaseException, secrets: Collection[str | None]) -> tuple[str, bool]:
    """What an error means and what to do, and whether it may pass by itself."""
    words = _shortened(str(error), secrets)
    if isinstance(error, HFValidationError):
        return f"repo_id must be like 'user/name' ({words})", False
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return words, False
    response = _response(error)
    if response is not None:
        said = _shortened(getattr(error, "server_message", None) or "", secrets)
        said += "; " if said else ""
        status = response.status_code
        if isinstance(error, RevisionNotFoundError):
            told_of = "there is no such revision (404); make the branch first"
            return f"{told_of} (HfApi().create_branch), or leave it out", False
        told = {
            401: "the Hub does not accept the token (401); log in with `hf auth login`, or pass "
            "token=... with write permission",
            403: "the token may not write there (403); use one with write permission "
            "(https://huggingface.co/settings/tokens), or a repo of yours",
            404: "the Hub has no such repo or owner, or hides it from the token (404); check the "
            "name, and what the token may access",
            409: "another change of the repo is under way (409); push again when it is done",
            412: "others kept committing to the repo (412); push again later",
            429: "too many requests (429); push again later",
        }
        if status in told:
            return said + told[status], status in (412, 429)
        if status >= 500 or status == 408:
            return f"{said}the Hub has failed ({status}); push again later", True
        return f"{said}the Hub refused it ({status}); see the message, and correct it", False
    if isinstance(error, OfflineModeIsEnabled):
        return "the client is offline; unset HF_HUB_OFFLINE, and push again", False
    name = type(error).__name__
    of_client = type(error).__module__.partition(".")[0] in _OF_THE_CLIENT
    # No JSON: what stands before the Hub has answered. RuntimeError: of an upload of large files.
    if of_client or isinstance(error, OSError | json.JSONDecodeError | RuntimeError):
        told_in = f"the Hub cannot be reached ({name}: {words})"
        return f"{told_in}; check the connection and HF_ENDPOINT, and push again later", True
    raise error


def _shortened(text: str, secrets: Collection[str | None]) -> str:
    for secret in secrets:
        text = text.replace(str(secret), "<token>")
    return " ".join(printable(text).split())[:_LONGEST_MESSAGE].rstrip(".")


def _response(error: BaseException | None) -> Any:
    """The Hub's answer behind an error, which may have caused the one at hand; None without one."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__
    return None


def _asked_wait(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait; None if it does not."""
    response = _response(error)
    if response is None:
        return None
    headers = response.headers
    if response.status_code == 429 and (
        limit := re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))
    ):
        return float(limit[1])
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
