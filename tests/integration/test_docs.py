"""The documents say what is true: links, commands, examples, metric names."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from appo_lightning.cli import main
from appo_lightning.errors import AppoError
from appo_lightning.lightning_cli import find_stage
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.tasks.demonstrations import LABELS
from appo_lightning.tasks.lookup import create, create_tiny_policy
from appo_lightning.tools.base import StatelessTool
from appo_lightning.types import StopReason, ToolError
from helpers.parsed import ParsedOnly

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
QUICKSTART = ROOT / "configs" / "quickstart" / "appo.yaml"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMENTED = [*sorted((ROOT / "configs").rglob("*.yaml")), *sorted(EXAMPLES.glob("*.yaml"))]
# Commands that are shown and not checked here.
NO_MATTER = ("OMP_NUM_THREADS=", "APPO_TEST_CONTAINERS=")
OTHER_COMMANDS = {"source", "sudo", "pip", "pytest", ".venv/bin/pip", "python3.11", ".venv/bin/tensorboard"}

sys.path.insert(0, str(ROOT / "tools"))

import figures  # noqa: E402
import include_examples  # noqa: E402


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- links -----------------------------------------------------------------------------------------------------------


def _slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"{target} leads nowhere"
        assert path.is_relative_to(ROOT), f"{target} leaves the repository"
        assert not anchor or anchor in _anchors(path), f"{target}: no such heading"


def test_every_document_is_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        seen.add(document)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", document.read_text())
        waiting += {(document.parent / link).resolve() for link in links if "://" not in link} - seen
    assert seen == set(DOCUMENTS)


# --- commands --------------------------------------------------------------------------------------------------------


# A command begins a comment line or follows a colon, and ends with the line or the sentence.
_IN_COMMENT = re.compile(r"(?:^\s+|: )((?:PYTHONPATH=\S+ )?appo [a-z][a-z-]+ .*?)(?:\. |$)")


@dataclass(frozen=True)
class Command:
    """A shown command."""

    source: str
    python_path: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.source}: {' '.join(self.words)}"


def _commands() -> list[Command]:
    """Every different command in a bash block of a document, or in a comment of a config."""
    shown = [
        (_name(path), line)
        for path in DOCUMENTS
        for block in _blocks(path.read_text(), "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for path in COMMENTED:
        comments = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
        lines = comments.replace("\\\n", " ").splitlines()
        shown += [(_name(path), command) for line in lines for command in _IN_COMMENT.findall(line)]
    commands: dict[tuple[str, tuple[str, ...]], Command] = {}
    for source, line in shown:
        words = [word for word in shlex.split(line, comments=True) if not word.startswith(NO_MATTER)]
        python_path = words.pop(0).partition("=")[2] if words and words[0].startswith("PYTHONPATH=") else ""
        if words:
            commands.setdefault((python_path, tuple(words)), Command(source, python_path, tuple(words)))
    return list(commands.values())


COMMANDS = _commands()


def test_commands_are_found_where_they_stand():
    sources = {command.source for command in COMMANDS}
    assert {"README.md", "docs/install.md", "configs/data/arpo.yaml", "configs/algorithm/grpo.yaml"} <= sources
    assert sum(command.words[0] == "appo" for command in COMMANDS) > 20


def test_only_known_programs_are_shown():
    known = {"appo", "make", "python", ".venv/bin/python", *OTHER_COMMANDS}
    assert {command.words[0] for command in COMMANDS} <= known


def _accepts(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command, arguments = words[0], words[1:]
    if command == "create-tiny":
        monkeypatch.setattr(create, "create_tiny_policy", lambda output, *args, **kwargs: output)
        assert main(words) == 0
    elif command == "export":
        # The first thing it looks at after its arguments.
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("APPO_TRACEBACK", "1")
        with pytest.raises(AppoError, match="expected a checkpoint file"):
            main(words)
    elif command in ("fit", "validate", "test", "predict"):
        # The config of a run does not exist before the run; it has the keys of the config that the run was given.
        arguments = [str(QUICKSTART) if re.fullmatch(r"runs/.*\.yaml", word) else word for word in arguments]
        ParsedOnly(find_stage(arguments), command, arguments, execute=False)
    else:
        assert main(words) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "appo"], ids=str)
def test_appo_command_is_accepted(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA", "data")
    for module in [path.stem for path in EXAMPLES.glob("*.py")]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    if command.python_path:
        monkeypatch.syspath_prepend(ROOT / command.python_path)
    words = [word.replace("$DATA", "data") for word in command.words[1:]]
    code: object = 0
    try:
        _accepts(words, monkeypatch, tmp_path)
    except SystemExit as stop:  # --help and --print_config end so
        code = stop.code
    assert not code, capsys.readouterr().err


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {command.words[1] for command in COMMANDS if command.words[0] == "make"}
    for document in DOCUMENTS:
        shown |= set(re.findall(r"`make ([\w-]+)", document.read_text()))
    assert {"quickstart", "test", "install", "clean", "lint"} <= shown <= targets


def test_make_variables_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.words[0] == "make":
            for name in [word.partition("=")[0] for word in command.words[2:]]:
                assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"{command}: no variable {name}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0].endswith("python")], ids=str)
def test_script_exists_with_its_options(command):
    script, *options = command.words[1:]
    if script == "-m":
        module, *options = options
        script = f"src/{module.replace('.', '/')}.py"
    text = (ROOT / script).read_text()
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in text, f"{command}: no option {option}"


# --- snippets and keys -----------------------------------------------------------------------------------------------


SNIPPETS = [(_name(path), block) for path in DOCUMENTS for block in _blocks(path.read_text(), "yaml")]


@pytest.mark.parametrize(("source", "snippet"), SNIPPETS, ids=[source for source, _ in SNIPPETS])
def test_yaml_snippet_is_accepted_over_the_quick_start(source, snippet, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    overlay = tmp_path / "snippet.yaml"
    overlay.write_text(snippet)
    stage = find_stage(["--config", str(overlay)])
    base = QUICKSTART.with_name(f"{stage}.yaml")
    ParsedOnly(stage, "fit", ["--config", str(base), "--config", str(overlay)], execute=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_json_snippets_are_json(document):
    for block in _blocks(document.read_text(), "json"):
        for line in block.splitlines():
            json.loads(line)


def test_every_group_of_keys_is_explained():
    text = (ROOT / "docs" / "configuration.md").read_text()
    parsed = ParsedOnly("appo", "fit", ["--config", str(QUICKSTART)], execute=False).config["fit"].as_dict()
    groups = {*parsed, *(f"data.{key}" for key in parsed["data"]), *(f"model.{key}" for key in parsed["model"])}
    groups -= {"data", "model", "config", "weights_only"}  # weights_only: Lightning's, no use here
    # Options of an evaluation, explained by the help of the class.
    groups -= {"data.validation_rollouts", "data.validation_temperature"}
    missing = {group for group in groups if f"`{group}" not in text and f"--{group}" not in text}
    own = {group for group in missing if not (group.startswith("model.") and f"`{group.split('.')[1]}" in text)}
    assert not own


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_shown_files_and_outputs_are_the_real_ones(document):
    """To mend: python tools/include_examples.py."""
    assert include_examples.render(document.read_text()) == document.read_text()


def test_every_example_is_shown():
    shown = {name for path in DOCUMENTS for name in re.findall(r"<!-- example (\S+) -->", path.read_text())}
    linked = {name for path in DOCUMENTS for name in re.findall(r"\(examples/([^)]+)\)", path.read_text())}
    assert shown | linked == {path.name for path in EXAMPLES.glob("*.*")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= shown


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=_name)
def test_example_runs_alone(path):
    assert include_examples.output_of(path.name)


def _quick(tiny: Path, folder: Path) -> list[str]:
    """Arguments that make a run of seconds out of any config."""
    return [
        *("--model.policy.path", str(tiny), "--output_dir", str(folder), "--export.path", str(folder / "exported")),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return create_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy", hidden_size=64, num_layers=1)


def test_examples_train_together(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    cold_start = ["--config", str(QUICKSTART.with_name("sft.yaml")), "--config", str(EXAMPLES / "dates_sft.yaml")]
    few = ("--model.optimizer.schedule", "constant", "--trainer.max_steps", "2", "--data.batch_size", "4")
    assert main(["fit", *cold_start, *_quick(tiny, tmp_path / "sft"), *few]) == 0
    config = ["--config", str(QUICKSTART), "--config", str(EXAMPLES / "dates.yaml")]
    few = ("--data.prompts_per_phase", "2", "--data.prompts_per_mini_batch", "2", "--trainer.max_steps", "1")
    more = ("--data.sampler", "TransformersSampler", "--data.tools+=notes_tool.NotesTool")
    more += ("--data.tools+=FunctionTool", "--data.tools.function=convert_tool.convert")
    policy = tmp_path / "sft" / "exported"
    assert main(["fit", *config, *_quick(policy, tmp_path / "appo"), *few, *more]) == 0
    assert "How many days" in (tmp_path / "appo" / "rollout_sample.txt").read_text()


# --- metrics ---------------------------------------------------------------------------------------------------------


class EveryOther(Reward):
    """Half of the responses are right, whatever they say."""

    def score(self, task, response_text):
        right = len(response_text) % 2 == 0
        return Score(float(right), success=right, parts={"evenness": float(right)})


class Counting(StatelessTool):
    """Counts like a tool with a cache and a network."""

    name = "counting"

    def run(self, argument, task):
        return argument

    def take_counts(self):
        return {"lookups": 2, "hits": 1, "retries": 1}


VALUES = {
    "<part>": ("evenness",),
    "<reason>": get_args(StopReason),
    "<tool>": ("search", "python", "counting"),
    "<error>": get_args(ToolError),
    "<label>": LABELS,
}


def _documented() -> dict[str, bool]:
    """Names in the tables, and whether they have a histogram."""
    rows = re.findall(r"^\| `([\w/<>]+)` \| (▤?)", (ROOT / "docs" / "tensorboard.md").read_text(), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a name stands twice"
    return {name: bool(mark) for name, mark in rows}


def _meant(name: str) -> set[str]:
    """The names that a name with a placeholder stands for."""
    for placeholder, values in VALUES.items():
        if placeholder in name:
            return {meant for value in values for meant in _meant(name.replace(placeholder, value))}
    return {name}


@pytest.fixture(scope="module")
def logged(tiny, tmp_path_factory) -> dict[str, set[str]]:
    """Scalars and histograms of a short training with validation, and of a short cold start."""
    folder = tmp_path_factory.mktemp("logged")
    short = [
        *("--config", str(QUICKSTART), *_quick(tiny, folder / "appo"), "--data.sampler", "TransformersSampler"),
        *("--data.reward", "test_docs.EveryOther", "--data.validation.init_args.size", "32"),
        *("--data.prompts_per_phase", "8", "--data.prompts_per_mini_batch", "8", "--trainer.max_steps", "2"),
        *("--data.branching.max_refills", "1", "--data.tools+=test_docs.Counting"),
        *("--data.rollout.patience_s", "60", "--model.loss.importance_cap", "2"),
        *("--model.loss.kl", "k3", "--model.loss.kl_coefficient", "0.01", "--trainer.val_check_interval", "2"),
    ]
    assert main(["fit", *short]) == 0
    sft = QUICKSTART.with_name("sft.yaml")
    few = ("--model.optimizer.schedule", "constant", "--trainer.max_steps", "1", "--data.batch_size", "8")
    assert main(["fit", "--config", str(sft), *_quick(tiny, folder / "sft"), *few]) == 0
    tags: dict[str, set[str]] = {"scalars": set(), "histograms": set()}
    for run in ("appo", "sft"):
        events = EventAccumulator(str(folder / run))
        events.Reload()
        for kind, names in tags.items():
            names |= set(events.Tags()[kind])
    return tags


def test_every_logged_metric_is_documented(logged):
    meant = {name for documented in _documented() for name in _meant(documented)}
    meant |= {f"val_{name}" for name in meant if name.startswith("tools/")}
    assert logged["scalars"] - meant == set()


def test_every_documented_metric_is_logged(logged):
    assert [name for name in _documented() if not _meant(name) & logged["scalars"]] == []


def test_histograms_are_documented(logged):
    found = {name.removesuffix("_distribution") for name in logged["histograms"]}
    assert found == {name for name, has_histogram in _documented().items() if has_histogram}


def test_first_metrics_to_look_at_exist():
    documented = {name for row in _documented() for name in _meant(row)}
    for document in DOCUMENTS:
        named = set(
            re.findall(r"`((?:rollout|branch|credit|loss|sync|time|tools|val|sft|policy)/\w+)`", document.read_text())
        )
        named -= {"rollout/sample", "tools/days_failure_rate"}  # a text; a metric of an example
        assert named <= documented, document


# --- the quick start's numbers ---------------------------------------------------------------------------------------

SUMMARY = {
    "measurements": [
        {"label": "after SFT", "success": 0.25, "tool_calls": 2.0, "tokens": 52.04, "tasks": 256},
        {"label": "after APPO", "success": 0.5, "tool_calls": 2.5, "tokens": 58.0, "tasks": 256},
    ],
    "seconds": {"SFT cold start": 100.4, "APPO": 200.4},
}


def test_documents_take_the_numbers_of_a_run(tmp_path):
    (tmp_path / "appo").mkdir()
    (tmp_path / "quickstart.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "appo" / "rollout_sample.txt").write_text("\\boxed{1}\n")
    copies = []
    for document in figures.DOCUMENTS:
        copies.append(tmp_path / document.name)
        copies[-1].write_text(document.read_text())
    figures.write_documents(tmp_path, tuple(copies))
    for copy in copies:
        assert "after APPO        50.0%                2.50            58.0\n" in copy.read_text()
        assert "all                           301\n" in copy.read_text()
    assert "\n\\boxed{1}\n" in copies[1].read_text()


def test_learning_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is a maintainer's errand; pip install matplotlib")
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "quickstart.json").write_text(json.dumps(SUMMARY))
    with SummaryWriter(str(tmp_path / "appo")) as writer:
        for step in (1, 2, 3):
            writer.add_scalar("rollout/success", step / 4, step)
    figures.draw_learning_curve(tmp_path, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_moving_average_uses_what_there_is():
    # (1), (1+3)/2, (3+5)/2
    assert figures.moving_average([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]


def test_scripts_explain_themselves():
    for name in ("figures", "include_examples"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}; print({name}.__doc__)"],
            cwd=ROOT / "tools",
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"python tools/{name}.py" in done.stdout
