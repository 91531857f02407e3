"""The command line: light, small commands, and one clear message for every mistake."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exo_kimi import cli
from exo_kimi.bench.claims import plan as plan_bench
from exo_kimi.checkpoint.tiny import make
from exo_kimi.checkpoint.tiny.make import make_tiny
from exo_kimi.cli import cluster_commands, commands, exo_commands, fetch_commands, owner_commands, train_commands
from exo_kimi.cli.app import command_tree
from exo_kimi.cli.reference import cli_reference
from exo_kimi.errors import UsageError
from exo_kimi.plugin.legacy import launch as legacy_launch
from exo_kimi.plugin.runner import launch as runner_launch
from exo_kimi.runtime.transport.api_key import find_api_key
from exo_kimi.serve import launch
from exo_kimi.serve.launch import ServeOptions

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "demo",
    "chat",
    "pull",
    "share",
    "cluster status",
    "cluster forget",
    "plan",
    "machine",
    "serve",
    "stage",
    "inspect",
    "doctor",
    "layer",
    "tiny",
    "ui",
    "convert",
    "calibrate",
    "prune",
    "compare",
    "experts pack",
    "trace record",
    "trace replay",
    "trace make",
    "bench",
    "eval",
    "train tiny",
    "train draft",
    "train grpo",
    "train lora",
    "train compare",
    "train requantize",
    "exo status",
    "exo plan",
    "exo apply",
    "exo prepare",
    "exo run",
    "exo-legacy",
    "status",
    "logs",
    "report",
    "verify",
    "service install",
    "service status",
    "service logs",
    "service uninstall",
    "service run",
)
NOT_FOR_A_PLAN = (
    "mlx",
    "mlx_lm",
    "exo_kimi.train",
    "exo_kimi.bench",
    "exo_kimi.serve",
    "fastapi",
    "uvicorn",
    "zmq",
    "rich",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@dataclass(frozen=True)
class Result:
    """What a command printed and how it ended."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """A command in this process: starting one for each would load the frameworks every time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return Result(status, out.getvalue(), err.getvalue())


def assert_refused(result: Result, *named: str) -> None:
    """One message, non-zero, no traceback, and it names what is wrong."""
    output = result.stderr + result.stdout
    assert result.returncode not in (0, 130), output
    assert "Traceback" not in output, output
    assert result.stderr.count("exo-kimi: ") == 1 or "problem" in result.stdout, output
    for word in named:
        assert word in output, output


def commands_of(command: Any, path: str = "") -> dict[str, Any]:
    """Every command that is not a group, by the words that call it."""
    children = getattr(command, "commands", None)
    if children is None:
        return {path: command}
    return {
        name: found
        for key, child in children.items()
        for name, found in commands_of(child, f"{path} {key}".strip()).items()
    }


def imported_by(*arguments: str) -> set[str]:
    """The modules that are loaded once a command has ended."""
    code = "import sys; from exo_kimi.cli import main; main(sys.argv[1:]); print('\\n' + ' '.join(sys.modules))"
    command = [sys.executable, "-c", code, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=True).stdout
    return set(found.splitlines()[-1].split())


def test_commands_are_at_most_fifteen_lines_each() -> None:
    """Of a command's body: the signature is the list of its options."""
    for module in (commands, cluster_commands, exo_commands, fetch_commands, owner_commands, train_commands):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.body[0].lineno < 15, node.name


def test_the_commands_are_these() -> None:
    assert set(commands_of(command_tree())) == set(COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.returncode == 0
    assert f"Usage: exo-kimi {command}" in result.stdout if command != "bench" else "NAME" in result.stdout


def test_every_option_of_serve_is_in_a_panel() -> None:
    serve = commands_of(command_tree())["serve"]
    panels = Counter(option.rich_help_panel for option in serve.params if option.param_type_name == "option")
    assert set(panels) == {
        "Model and split",
        "Experts from disk",
        "Memory",
        "Prefix cache",
        "Pictures",
        "Network and keys",
        "Speculation",
        "Output",
    }


@pytest.mark.parametrize("group", [(), ("exo",), ("train",)])
def test_a_group_without_a_command_shows_its_help(group: tuple[str, ...]) -> None:
    """On the standard output, for a reader; the exit status says that nothing was done, for a script."""
    result = run(*group)
    assert (result.returncode, result.stderr) == (2, "")
    assert f"Usage: {' '.join(('exo-kimi', *group))} [OPTIONS] COMMAND" in result.stdout


@pytest.mark.parametrize(
    ("words", "meant"), [(("serv",), "serve"), (("exo", "stats"), "status"), (("serve", "x", "--prot", "1"), "--port")]
)
def test_a_mistyped_word_is_answered_with_what_was_meant(words: Sequence[str], meant: str) -> None:
    result = run(*words)
    assert result.returncode == 2
    assert meant in result.stderr
    assert result.stderr.count("exo-kimi: ") == 1


def test_the_help_in_markdown_names_every_command_and_option() -> None:
    page = cli_reference()
    for path, command in commands_of(command_tree()).items():
        section = page.partition(f"## `exo-kimi {path}`\n")[2].partition("\n## ")[0]
        assert command.params or path.endswith("status"), path
        for parameter in command.params:
            assert all(name in section for name in parameter.opts) or parameter.metavar in section, (
                path,
                parameter.name,
            )
    assert "\x1b" not in page
    assert all(
        option.metavar is not None for command in commands_of(command_tree()).values() for option in command.params
    )


def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = "import sys; sys.argv[0] = 'exo-kimi'; from exo_kimi.cli import main; sys.exit(main())"

    def call(*words: str, **extra: str) -> str:
        command = [sys.executable, "-c", script, *words]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT, "check": True}
        return subprocess.run(command, env=environment | extra, **options).stdout

    assert "bash completion installed" in call("--install-completion", "bash")
    installed = tmp_path / ".bash_completions" / "exo-kimi.sh"
    assert subprocess.run([bash, "-n", str(installed)], check=False).returncode == 0
    assert str(installed) in (tmp_path / ".bashrc").read_text()
    asked = {"_EXO_KIMI_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert call(**asked, COMP_WORDS="exo-kimi serve").split() == ["serve"]
    asked["COMP_CWORD"] = "3"
    assert "--prefill-chunk" in call(**asked, COMP_WORDS="exo-kimi serve DIR --pre").split()


def test_the_version_loads_nothing_that_it_does_not_need() -> None:
    loaded = imported_by("--version")
    assert loaded & {"typer", "click", "pydantic", "numpy", *NOT_FOR_A_PLAN} == set()


def test_a_plan_loads_no_framework() -> None:
    loaded = imported_by("plan", "--model", "kimi-k2-thinking", "--cluster", "m3-ultra-512, m3-ultra-512")
    assert "exo_kimi.planner.command" in loaded
    assert loaded & set(NOT_FOR_A_PLAN) == set()


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout.startswith("exo-kimi 0.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("fly",), "fly"),
        (("serve",), "DIR"),
        (("serve", "x", "--port", "99999"), "99999"),
        (("serve", "x", "--stages", "0"), "0"),
        (("serve", "x", "--context", "many"), "many"),
        (("serve", "x", "--kv-bytes", "3 parsecs"), "parsecs"),
        (("serve", "x", "--stall-deadline", "0"), "heartbeats"),
        (("serve", "x", "--api-key", ""), "printable"),
        (("serve", "x", "--allowed-host", ""), "studio.local"),
        (("serve", "x", "--allowed-host", "http://studio.home"), "http://studio.home"),
        (("serve", "x", "--allowed-host", "studio.home:52415"), "without scheme and port"),
        (("serve", "x", "--served-model-name", "a b"), "without blanks"),
        (("serve", "x", "--cors-origin", "app.example"), "https://app.example"),
        (("serve", "x", "--cors-origin", "https://app.example/page"), "without a path"),
        (("tiny", "x", "--layout", "gguf"), "gguf"),
        (("layer", "x", "first"), "first"),
    ],
)
def test_mistyped_arguments_are_usage_errors(arguments: Sequence[str], named: str) -> None:
    result = run(*arguments)
    assert_refused(result, named)
    assert result.returncode == 2


@pytest.mark.parametrize("command", [("inspect",), ("serve",), ("layer",)])
class TestWrongDirectories:
    def call(self, command: tuple[str], directory: Path) -> Result:
        return run(*command, directory, *(("1",) if command == ("layer",) else ()))

    def test_missing(self, command: tuple[str], tmp_path: Path) -> None:
        assert_refused(self.call(command, tmp_path / "absent"), "absent")

    def test_empty(self, command: tuple[str], tmp_path: Path) -> None:
        assert_refused(self.call(command, tmp_path), "config.json")

    def test_not_a_kimi(self, command: tuple[str], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert_refused(self.call(command, tmp_path), "llama", "kimi_k2")

    def test_a_pickle(self, command: tuple[str], tmp_path: Path, tiny: Path) -> None:
        (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
        assert_refused(self.call(command, tmp_path), "safetensors")


def test_inspect_reports_a_good_checkpoint(tiny: Path) -> None:
    text = run("inspect", tiny)
    assert text.returncode == 0, text.stderr
    assert "7" in text.stdout
    report = json.loads(run("inspect", tiny, "--json").stdout)
    assert report["problems"] == []


def test_a_plan_is_made_written_and_refused_for_another_checkpoint(tiny: Path, tmp_path: Path) -> None:
    cluster = "m3-ultra-512, m2-ultra-192"
    planned = run("plan", tiny, "--cluster", cluster, "-o", tmp_path / "plan.json", "--svg", tmp_path / "plan.svg")
    assert planned.returncode == 0, planned.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 4
    assert (tmp_path / "plan.svg").read_text().lstrip().startswith("<svg")
    other = make_tiny(tmp_path / "other", recipe="uniform4")
    assert_refused(run("serve", other, "--plan", tmp_path / "plan.json"), "another checkpoint")
    assert_refused(run("serve", tiny, "--plan", tmp_path / "absent.json"), "absent.json")
    assert_refused(run("plan", tiny, "--cluster", cluster, "-o", tmp_path / "no" / "plan.json"), "plan.json")


def test_a_model_that_does_not_fit_says_who_is_short_and_what_would_help() -> None:
    result = run("plan", "--model", "kimi-k2-thinking", "--cluster", "m3-ultra-512, m2-ultra-192")
    assert_refused(result, "is short by", "sudo sysctl iogpu.wired_limit_mb=")


def test_doctor_tells_and_mends(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "sick")
    assert run("doctor", directory).returncode == 0
    (directory / "model.safetensors.index.json").write_text("{")
    assert run("doctor", directory).returncode == 1
    assert run("doctor", directory, "--fix").returncode == 0
    assert json.loads(run("doctor", directory, "--json").stdout)["healthy"] is True


def test_machine_says_what_it_is(tmp_path: Path) -> None:
    result = run("machine", "-o", tmp_path / "here.toml")
    assert result.returncode == 0, result.stderr
    assert "chip" in (tmp_path / "here.toml").read_text()


def test_a_link_to_nobody_says_what_to_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert_refused(run("machine", "--link", f"127.0.0.1:{free}"), "exo-kimi bench link-speed --listen")


def test_tiny_refuses_to_overwrite_somebody_elses_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(run("tiny", tmp_path), str(tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("layout", ["mlx", "int4", "fp8", "bf16"])
def test_tiny_writes_what_inspect_and_layer_read(tmp_path: Path, layout: str) -> None:
    assert run("tiny", tmp_path / "t", "--layout", layout).returncode == 0
    inspected = run("inspect", tmp_path / "t")
    assert inspected.returncode == 0, inspected.stdout
    layer = run("layer", tmp_path / "t", "1", "--dtype", "float32")
    assert layer.returncode == 0, layer.stderr
    assert "256" in layer.stdout


def test_an_empty_key_in_the_environment_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXO_KIMI_API_KEY", "")
    served: list[ServeOptions] = []
    monkeypatch.setattr(launch, "serve", served.append)
    assert run("serve", "x").returncode == 0
    assert served[0].api_key is None
    assert find_api_key(key_file=None, option=None, environment_text="") is None


def test_an_api_key_comes_from_a_file_of_its_owner_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The list of processes shows everybody what is on a command line; that is told."""
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    file.chmod(0o600)
    assert find_api_key(key_file=file, option=None, environment_text="from-outside") == "from-a-file"
    assert find_api_key(key_file=None, option=None, environment_text="from-outside") == "from-outside"
    assert not caplog.records
    assert find_api_key(key_file=None, option="typed", environment_text="from-outside") == "typed"
    assert "every user of this machine can read it" in caplog.text and "typed" not in caplog.text
    with pytest.raises(UsageError, match="both give a key"):
        find_api_key(key_file=file, option="typed", environment_text=None)
    file.chmod(0o644)
    with pytest.raises(UsageError, match="other users may read"):
        find_api_key(key_file=file, option=None, environment_text=None)
    file.chmod(0o600)
    for content in ("", "two words\nand lines", "sécret", "x" * 5000):
        file.write_text(content)
        with pytest.raises(UsageError) as error:
            find_api_key(key_file=file, option=None, environment_text=None)
        assert not content or content not in str(error.value)
    for name in ("serve", "chat"):
        said = run(name, "--help").stdout
        assert said.index("--api-key-file") < said.index("--api-key ")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(run("tiny", tmp_path / "file" / "x"), "cannot be written", str(tmp_path))


def test_a_recipe_that_the_layout_cannot_follow(tmp_path: Path) -> None:
    for layout in ("int4", "fp8", "bf16"):
        assert_refused(run("tiny", tmp_path / "x", "--layout", layout, "--recipe", "q34+q6"), layout, "q34+q6")
    assert not (tmp_path / "x").exists()


def test_more_tokens_than_the_model_has_positions(tiny: Path) -> None:
    assert_refused(run("layer", tiny, 0, "--tokens", "100000000"), "131072", "--tokens")


def test_a_layer_outside_the_model_is_refused(tiny: Path) -> None:
    assert_refused(run("layer", tiny, "7"), "7")


def test_a_checkpoint_that_would_never_stop_is_not_served(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "endless")
    path = directory / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|in_end|>"))
    assert_refused(run("serve", directory, "--port", "0"), "<|im_end|>")


def test_a_split_that_does_not_sum_to_the_layers(tiny: Path) -> None:
    assert_refused(run("serve", tiny, "--split", "4,4"), "8", "7")


def test_more_stages_than_layers(tiny: Path) -> None:
    assert_refused(run("serve", tiny, "--stages", "8"), "8", "7")


def test_a_port_in_use(tiny: Path, taken_port: int) -> None:
    assert_refused(run("serve", tiny, "--port", taken_port), str(taken_port))


def test_a_stage_on_a_port_in_use(taken_port: int) -> None:
    assert_refused(run("stage", "--listen", f"127.0.0.1:{taken_port}"), str(taken_port))


def test_an_address_that_is_none() -> None:
    assert_refused(run("stage", "--listen", "nowhere"), "nowhere")


def test_chat_without_a_server(taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert_refused(run("chat", "--url", f"http://127.0.0.1:{free}"), str(free))


def test_a_mistake_ends_the_program_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "exo_kimi", "serve", str(tmp_path / "absent")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("exo-kimi: no such checkpoint directory")
    assert "Traceback" not in result.stderr


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only our own errors become one line; a bug keeps its traceback."""
    monkeypatch.setattr(make, "make_tiny", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["tiny", "x"])


def test_what_follows_belongs_to_the_other_program(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(runner_launch, "run", lambda rest, *, options, **_: told.append((rest, options.context)))
    monkeypatch.setattr(legacy_launch, "run", lambda options, rest: told.append((rest, str(options.plan))))
    monkeypatch.setattr(plan_bench, "main", told.append)
    run("exo", "run", "--context", "512", "--", "--force-master", "--context", "9")
    run("exo-legacy", "--plan", "PLAN", "--", "--node-id", "m3", "--plan")
    run("bench", "plan", "--stages", "2", "--help")
    assert told == [
        (["--force-master", "--context", "9"], 512),
        (["--node-id", "m3", "--plan"], "PLAN"),
        ["--stages", "2", "--help"],
    ]


@pytest.mark.parametrize("name", ["link-speed", "link_speed"])
def test_a_bench_answers_to_its_old_spelling(name: str) -> None:
    assert "usage: exo-kimi bench link-speed" in run("bench", name, "--help").stdout


def test_a_server_s_names_are_several_words_behind_one_option() -> None:
    from exo_kimi.cli.app import NAMES_OPTION, _spread

    words = ["serve", "DIR", NAMES_OPTION, "a", "b", "c", "--port", "1", NAMES_OPTION, "d"]
    names = [NAMES_OPTION, "a", NAMES_OPTION, "b", NAMES_OPTION, "c"]
    assert _spread(words) == ["serve", "DIR", *names, "--port", "1", NAMES_OPTION, "d"]
    assert _spread(["serve", "DIR", NAMES_OPTION]) == ["serve", "DIR", NAMES_OPTION]
