"""Exports: other tools read the promised counts, whatever tasks and files are called."""

import ast
import dataclasses
import json
import re
import subprocess
from collections import Counter

import datasets
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_auxselect import SelectionReport
from hf_auxselect.report.exports import FORMATS

TOOLS = FORMATS[:-1]


def report_of(tasks, *, to_read=None, packed=None, created="2026-11-28T07:00:00+00:00"):
    """A report on tasks with weights and rows: name -> (weight, rows)."""
    report = SelectionReport(weights={name: weight for name, (weight, _) in tasks.items()})
    rows = {name: rows for name, (_, rows) in tasks.items()}
    report.run = {"created": created, "seed": 7, "rows_per_task": rows}
    if to_read is not None:
        report.run["rows_to_read"] = to_read
    if packed is not None:
        report.run["examples_per_row"] = packed
    return report


def promised(text):
    """The counts that the comment of a file states."""
    table = re.findall(r'^# +[\d.e+-]+% +[\d.e+-]+% +(\d+) +\d+  (".*")$', text, re.MULTILINE)
    counts = {yaml.safe_load(name): int(count) for count, name in table}
    assert f"One epoch reads {sum(counts.values())} rows:" in text
    return counts


def bash_words(text):
    """The words of the array ``mixture``, as bash reads them."""
    script = text + "printf '%s\\0' \"${mixture[@]}\"\n"
    done = subprocess.run(["bash", "-e"], input=script.encode(), capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().split("\0")[:-1]


def llamafactory_entries(text):
    """The entries of dataset_info.json by the names of ``dataset:``."""
    config = yaml.safe_load(text)
    assert config.keys() == {"dataset", "mix_strategy"} and config["mix_strategy"] == "concat"
    lines = [line[3:] for line in text.splitlines() if line.startswith("#| ")]
    entries = json.loads("\n".join(lines))
    assert [*entries] == config["dataset"].split(",")
    return list(entries.values())


@pytest.fixture
def files(tmp_path):
    """Writes rows of a task to a JSONL file: name, rows -> path."""

    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"task": "{name}", "i": {i}}}\n' for i in range(rows)))
        return str(path)

    return write


# What a task is read as: weight and rows, rows that the run reads, counts of an epoch.
MIXTURES = {
    "a subset": ({"a": (0.75, 60), "b": (0.25, 20), "c": (0, 50)}, 400, {"a": 60, "b": 20}),
    "less than an epoch of a subset": ({"a": (0.75, 60), "b": (0.25, 20)}, 8, {"a": 60, "b": 20}),
    "no repetitions are needed": ({"a": (0.5, 60), "b": (0.5, 20)}, 30, {"a": 20, "b": 20}),
    "every row is read": ({"a": (0.5, 60), "b": (0.5, 20)}, 1200, {"a": 60, "b": 60}),
    "some rows are not read": ({"a": (0.5, 60), "b": (0.5, 20)}, 90, {"a": 45, "b": 45}),
    "an unknown number of steps": ({"a": (0.7, 60), "b": (0.3, 20)}, None, {"a": 47, "b": 20}),
    "too many repetitions": ({"a": (0.9, 10), "b": (0.1, 5000)}, 2000, {"a": 200, "b": 22}),
    "a tiny share": ({"a": (0.999, 9), "b": (0.001, 900)}, 9, {"a": 9, "b": 1}),
}


@pytest.mark.parametrize("name", MIXTURES)
class TestCounts:
    def test_every_tool_is_promised_the_same(self, name):
        tasks, to_read, counts = MIXTURES[name]
        for tool in TOOLS:
            text = report_of(tasks, to_read=to_read).export(tool)
            assert promised(text) == counts
            assert "chosen 2026-11-28T07:00:00+00:00" in text

    def test_trl_reads_them(self, name, files):
        from trl import DatasetMixtureConfig, get_dataset
        from trl.scripts.utils import DatasetConfig

        tasks, to_read, counts = MIXTURES[name]
        sources = {
            t: {"path": "json", "data_files": files(t, rows)} for t, (_, rows) in tasks.items()
        }
        config = yaml.safe_load(report_of(tasks, to_read=to_read).export("trl", sources=sources))
        fractions = {"fraction" in entry for entry in config["datasets"]}
        assert len(fractions) == 1
        if (
            "fraction" not in {f.name for f in dataclasses.fields(DatasetConfig)}
            and True in fractions
        ):
            pytest.skip("this TRL knows no fractions")
        loaded = get_dataset(DatasetMixtureConfig(**config))["train"]
        assert Counter(loaded["task"]) == counts

    def test_the_python_code_reads_them(self, name, files):
        tasks, to_read, counts = MIXTURES[name]
        sources = {
            t: {"path": "json", "data_files": files(t, rows)} for t, (_, rows) in tasks.items()
        }
        code = report_of(tasks, to_read=to_read).export("datasets", sources=sources)
        names = {}
        exec(code, names)
        assert Counter(names["mixture"]["task"]) == counts
        reads = Counter(zip(names["mixture"]["task"], names["mixture"]["i"], strict=True))
        for task, count in counts.items():
            full, _ = divmod(count, tasks[task][1])
            assert {reads[task, i] for i in range(tasks[task][1])} <= {full, full + 1}

    def test_axolotl_reads_them(self, name, files):
        tasks, to_read, counts = MIXTURES[name]
        sources = {
            t: {"path": "json", "data_files": files(t, rows)} for t, (_, rows) in tasks.items()
        }
        config = yaml.safe_load(
            report_of(tasks, to_read=to_read).export("axolotl", sources=sources)
        )
        assert config.keys() == {"datasets", "shuffle_merged_datasets"}
        assert sum((as_axolotl_reads(entry) for entry in config["datasets"]), Counter()) == counts


def as_axolotl_reads(entry):
    """Rows per task of an entry; a file, or files in a directory that exists."""
    known = {"path", "name", "split", "type", "shards", "shards_idx", "data_files", "ds_type"}
    assert entry.keys() <= known  # `weight` would be dropped silently
    files = entry["data_files"] if entry["path"] == "." else entry["path"]
    data = datasets.load_dataset(entry["ds_type"], data_files=files, split=entry["split"])
    if "shards" in entry:
        data = data.shuffle(seed=42).shard(entry["shards"], entry.get("shards_idx", 0))
    return Counter(data["task"])


class TestForms:
    """By the documented forms of the tools that the tests do not install."""

    TASKS = {"a": (0.5, 60), "b, or c": (0.5, 20), "b; or c": (0, 3)}  # noqa: RUF012
    SOURCES = {  # noqa: RUF012
        "a": {"path": "org/data", "name": "main", "split": "train", "columns": ["text"]},
        "b, or c": {"path": "json", "data_files": ["b.jsonl"]},
    }

    def export(self, tool, **changes):
        sources = self.SOURCES | {"a": {**self.SOURCES["a"], **changes}}
        return report_of(self.TASKS, to_read=90).export(tool, sources=sources)

    def test_llamafactory(self):
        assert llamafactory_entries(self.export("llamafactory", data_dir="x")) == [
            {
                "hf_hub_url": "org/data",
                "subset": "main",
                "folder": "x",
                "split": "train",
                "num_samples": 45,
            },
            {"file_name": "b.jsonl", "split": "train", "num_samples": 45},
        ]

    def test_the_command_in_the_file_for_llamafactory_makes_the_other_file(self, tmp_path):
        (tmp_path / "mixture.yaml").write_text(text := self.export("llamafactory"))
        command = re.search(r"sed .*", text)[0].replace("THIS_FILE", "mixture.yaml")
        (tmp_path / "data").mkdir()
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=20)
        info = json.loads((tmp_path / "data" / "dataset_info.json").read_text())
        assert [*info] == ["a", "b_or_c"]

    def test_names_for_llamafactory_are_unique(self):
        report = report_of({"a b": (0.5, 6), "a,b": (0.4, 6), "a_b_2": (0.1, 6)})
        assert yaml.safe_load(report.export("llamafactory"))["dataset"] == "a_b,a_b_2,a_b_2_2"

    def test_open_instruct(self):
        amounts = ["--mixer_list", "org/data", "45", "b.jsonl", "45"]
        assert bash_words(self.export("open-instruct", name=None)) == [
            *amounts,
            *("--mixer_list_splits", "train"),
        ]
        # Its splits are counted as its paths and amounts are.
        assert bash_words(self.export("open-instruct", name=None, split="test")) == [
            *amounts,
            *("--mixer_list_splits", "test", "test", "train", "train"),
        ]

    def test_ms_swift(self):
        words = ["--dataset", "hf::org/data:main#45", "b.jsonl#45"]
        assert bash_words(self.export("ms-swift")) == words

    def test_ms_swift_reads_a_local_directory(self):
        words = bash_words(self.export("ms-swift", path="./data"))
        assert words[1] == "./data:main#45"

    def test_axolotl_takes_a_part_of_a_part_at_random(self):
        text = self.export("axolotl", split="train[:5%]")
        entry, *_ = yaml.safe_load(text)["datasets"]
        assert entry == {"path": "org/data", "name": "main", "split": "train[:5%]"}
        assert promised(text)["a"] == 60
        text = report_of({"a": (0.1, 50), "b": (0.9, 90)}).export(
            "axolotl", sources={"a": {"path": "org/data", "split": "train+test"}}
        )
        entry, *_ = yaml.safe_load(text)["datasets"]
        assert entry == {"path": "org/data", "split": "train+test", "shards": 5}
        assert promised(text) == {"a": 10, "b": 90}

    def test_several_files_for_axolotl(self, files):
        sources = {
            "a": {
                "path": "json",
                "data_files": {"train": ["x"], "test": [files("a", 9), files("b", 6)]},
                "split": "test",
            }
        }
        text = report_of({"a": (1.0, 15)}).export("axolotl", sources=sources)
        (entry,) = yaml.safe_load(text)["datasets"]
        assert as_axolotl_reads(entry) == {"a": 9, "b": 6}


class TestSources:
    def test_those_of_the_report_are_used(self):
        report = report_of({"a": (0.5, 6), "b": (0.5, 6)})
        report.sources = {"a": {"path": "org/a"}, "b": {"path": "org/b"}}
        text = report.export("trl", sources={"b": {"path": "other/b"}})
        paths = [entry["path"] for entry in yaml.safe_load(text)["datasets"]]
        assert paths == ["org/a", "other/b"]
        assert "To do" not in text

    @pytest.mark.parametrize("tool", TOOLS)
    def test_a_task_without_one_is_named(self, tool):
        text = report_of({"sums of two": (1.0, 6)}).export(tool)
        assert '# To do: replace the path "sums of two" by that of its data.' in text

    def test_a_part_of_a_data_set_stays_that_part(self, files):
        """Of an entry with a fraction the run had the first rows."""
        entry = {"path": "json", "data_files": files("a", 100), "fraction": 0.3}
        tasks = {"a": (0.75, 30), "b": (0.25, 30)}
        text = report_of(tasks).export("trl", sources={"a": entry, "b": entry})
        entries = yaml.safe_load(text)["datasets"]
        assert [entry["split"] for entry in entries] == ["train[:30]"] * 2
        assert [entry["fraction"] for entry in entries] == [0.75, 0.25]
        text = report_of(tasks, to_read=80).export("trl", sources={"a": entry, "b": entry})
        splits = [entry["split"] for entry in yaml.safe_load(text)["datasets"]]
        assert splits == ["train[:30]"] * 2 + ["train[:20]"]

    @pytest.mark.parametrize(
        ("split", "pieces", "count"),
        [
            ("train[10:]", ["train[10:]", "train[10:15]"], 15),
            ("train[10:20]", ["train[10:20]", "train[10:15]"], 15),
            ("train[:10%]", ["train[:10%]", "train[:10%]"], 20),
            ("a+b", ["a+b", "a+b"], 20),
        ],
    )
    def test_splits_are_split_where_they_can_be(self, split, pieces, count):
        report = report_of({"a": (0.6, 10), "b": (0.4, 10)}, to_read=2500)
        text = report.export("trl", sources={"a": {"path": "org/a", "split": split}})
        entries = yaml.safe_load(text)["datasets"]
        assert [entry["split"] for entry in entries if entry["path"] == "org/a"] == pieces
        assert promised(text) == {"a": count, "b": 10}

    def test_packed_rows_are_counted_before_packing(self):
        """All tasks are read equally often, so that all their rows are in an epoch."""
        report = report_of(
            {"a": (0.75, 6), "b": (0.25, 2)}, packed={"a": 5.0, "b": 20.5}, to_read=16
        )
        text = report.export("trl")
        assert promised(text) == {"a": 30, "b": 41}
        assert "as long as 2 of these epochs" in text and "packed" in text

    @pytest.mark.parametrize(
        ("tool", "key", "entry"),
        [
            ("axolotl", "data_dir", {"path": "org/a", "data_dir": "x"}),
            ("axolotl", "data_files", {"path": "org/a", "data_files": {"train": "x"}}),
            ("axolotl", "split", {"path": "json", "data_files": {"test": "x"}}),
            ("llamafactory", "data_files", {"path": "org/a", "data_files": "x"}),
            ("llamafactory", "data_files", {"path": "json", "data_files": ["x", "y"]}),
            ("open-instruct", "name", {"path": "org/a", "name": "x"}),
            ("open-instruct", "data_files", {"path": "csv", "data_files": "x.csv"}),
            (
                "open-instruct",
                "split",
                {"path": "json", "data_files": "x.jsonl", "split": "train[:9]"},
            ),
            ("ms-swift", "split", {"path": "org/a", "split": "test"}),
            ("ms-swift", "data_files", {"path": "json", "data_files": ["x", "y"]}),
        ],
    )
    def test_what_a_tool_cannot_read_is_refused(self, tool, key, entry):
        with pytest.raises(
            ValueError, match=r"cannot express .*'data_files': 'FILE.jsonl'"
        ) as raised:
            report_of({"a": (1.0, 6)}).export(tool, sources={"a": entry})
        start = f"sources['a']: {tool} cannot express {key}={entry.get(key, 'train')!r}."
        assert str(raised.value).replace("LLaMA-Factory", "llamafactory").startswith(start)

    def test_of_other_tasks_in_the_report_are_left_out(self):
        report = report_of({"a": (1.0, 6), "b": (0.0, 6)})
        report.sources = {"a": {"path": "org/a"}}
        expected = report.export("trl")
        report.sources["filtered"] = {"path": "org/filtered"}
        assert report.export("trl") == expected

    @pytest.mark.parametrize(
        ("sources", "message"),
        [
            ({"x": {"path": "org/a"}}, r"sources names 'x', which is no task .*\['a'\]"),
            ({"a": "org/a"}, r"sources\['a'\] must be a mapping with a path.*got 'org/a'"),
            ({"a": {"name": "x"}}, r"sources\['a'\] has no 'path'"),
            ({"a": {"path": "x", "weight": 1}}, "unknown key 'weight'; known are"),
            ({"a": {"path": ["x"]}}, r"\['path'\] must be a string, got \['x'\]"),
            ({"a": {"path": "x", "columns": "text"}}, r"\['columns'\] must be a list of strings"),
            ({"a": {"path": "x", "data_files": [1]}}, r"\['data_files'\] must be a file, files"),
            ({"a": {"path": "x", "split": "a+b", "fraction": 0.5}}, "has a fraction and the split"),
        ],
    )
    def test_wrong_ones(self, sources, message):
        with pytest.raises((ValueError, TypeError), match=message):
            report_of({"a": (1.0, 6)}).export("trl", sources=sources)


class TestErrors:
    def test_an_unknown_format(self):
        with pytest.raises(ValueError, match=r"format must be one of \['trl', .*, got 'json'"):
            report_of({"a": (1.0, 6)}).export("json")

    def test_a_report_without_sizes(self):
        with pytest.raises(ValueError, match="does not tell how many rows the task 'a' has"):
            SelectionReport(weights={"a": 1.0}).export("trl")

    def test_a_report_without_rows(self):
        with pytest.raises(ValueError, match="rows of this selection are not available"):
            report_of({"a": (1.0, 6)}).export("rows")


HOSTILE = [
    "- a: &b *c !d",
    "</script>\n# datasets: []",
    "' \"; rm -rf $HOME `id`",
    "\u202eevil",
    "🦆" * 300,
]
names = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(deadline=None, max_examples=40)
@given(names)
@example(HOSTILE)
@example(["\x7f\x85\xa0\u2028\ufeff\uffff", "null", "1e3", "'", "\\", "\r\n", "#", "a,b"])
def test_names_come_back_as_they_were(names):
    report = report_of({name: (1 / len(names), 3) for name in names}, created="1\ndatasets: []")
    for tool in TOOLS:
        assert promised(report.export(tool)) == dict.fromkeys(names, 3)
        assert not re.search(r"[\u202e\x1b\x85\u2028]", report.export(tool))
    for tool in ("trl", "axolotl"):
        entries = yaml.safe_load(report.export(tool))["datasets"]
        assert [entry["path"] for entry in entries] == names
    entries = llamafactory_entries(report.export("llamafactory"))
    assert [entry["hf_hub_url"] for entry in entries] == names
    words = bash_words(report.export("open-instruct"))
    assert words[1:-2:2] == names
    words = bash_words(report.export("ms-swift"))
    assert words[1:] == [f"{name}#3" for name in names]
    code = ast.parse(report.export("datasets"))
    (parts,) = [node for node in code.body if ast.unparse(node).startswith("PARTS")]
    for (task, arguments, columns, count), name in zip(
        ast.literal_eval(parts.value), names, strict=True
    ):
        assert (task, arguments["path"], columns, count) == (name, name, None, 3)
