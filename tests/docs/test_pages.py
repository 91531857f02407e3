"""The README and docs/ say what is so: links lead somewhere, commands and files exist, examples run."""

from __future__ import annotations

import ast
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from exo_kimi.cli.reference import cli_reference
from exo_kimi.client.demo import shipped_model
from exo_kimi.planner.machines.cluster import parse_cluster
from exo_kimi.planner.weights.recipes import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
GENERATED = ROOT / "docs" / "reference" / "cli.md"
MOST_LINES = 170
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"(?:exo_kimi|tests|docs|examples|patches|shard_plans|\.ci|\.github)/[\w./-]*\w/?")
MODULE = re.compile(r"exo_kimi(?:\.\w+)+")
CLASS = re.compile(r"(?:[A-Z][a-z0-9]+)+(?=$|\.)")
PAGES_BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
CommandLine = Any  # see conftest


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(language: str, *pages: Path) -> list[tuple[str, str]]:
    """(page and line, text) of every fenced block of a language."""
    found = []
    for page in pages or PAGES:
        text = text_of(page)
        for match in FENCE.finditer(text):
            if match[1] == language:
                line = text[: match.start()].count("\n") + 1
                found.append((f"{page.relative_to(ROOT)}:{line}", match[2]))
    return found


def commands() -> Iterator[tuple[str, list[str], bool]]:
    """(page, words after `exo-kimi`, whether the line is whole) of every command line in shell blocks and in code spans."""
    for page in PAGES:
        if page == GENERATED:
            continue
        text = text_of(page)
        shell = "".join(match[2].replace("\\\n", "") for match in FENCE.finditer(text) if match[1] == "sh")
        lines = [(line, True) for line in shell.splitlines()]
        spans = [(span.replace("\\|", "|"), False) for span in SPAN.findall(FENCE.sub("", text))]
        for line, whole in [*lines, *spans]:
            if match := re.search(r"(?:^|[ /;])exo-kimi (\S.*)", line.strip()):
                yield str(page.relative_to(ROOT)), shlex.split(match[1], comments=True), whole


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= MOST_LINES


@PAGES_BY_NAME
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(FENCE.sub("", text_of(page)))]
    relative = [target for target in targets if target and "://" not in target]
    assert [target for target in relative if not (page.parent / target).exists()] == []


@PAGES_BY_NAME
def test_every_heading_that_a_link_names_is_there(page: Path) -> None:
    """GitHub's anchors, which MkDocs' are equal to here (`mkdocs build --strict` checks those)."""
    wrong = []
    for target in LINK.findall(FENCE.sub("", text_of(page))):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        if anchor and "://" not in target and "." not in anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(other)), re.MULTILINE)
            wrong += [target] * (
                anchor not in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}
            )
    assert wrong == []


@PAGES_BY_NAME
def test_every_file_module_and_class_that_is_named_exists(page: Path) -> None:
    names = SPAN.findall(FENCE.sub("", text_of(page)))
    paths = [path for name in names for path in PATH.findall(name)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    documented = re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE)
    modules = [module for name in [*names, *documented] for module in MODULE.findall(name)]
    assert [module for module in modules if not exists(module)] == []


def test_every_class_of_the_architecture_exists() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "exo_kimi").rglob("*.py"))
    defined = set(re.findall(r"^(?:class )?([A-Z]\w+)(?:[(:]| = | ?\[)", code, re.MULTILINE))
    spans = SPAN.findall(FENCE.sub("", text_of(ROOT / "docs" / "architecture.md")))
    named = {match[0] for span in spans if (match := CLASS.match(span))}
    assert len(named) > 40
    assert named - defined == set()


@pytest.mark.parametrize("name", ["FLOORS", "RUNTIME_FLOORS"])
def test_the_floors_of_the_architecture_are_those_that_the_import_test_holds(name: str) -> None:
    page = text_of(ROOT / "docs" / "architecture.md")
    pictures = [text for text in FENCE.findall(page) if re.match(r" *\d+  \w", text[1])]
    drawn = [
        {room: int(floor) for line in text.splitlines() for floor, *rooms in [line.split()] for room in rooms}
        for _, text in pictures
    ]
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    held = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == name
    )  # type: ignore[attr-defined]
    assert {room: floor for room, floor in held.items() if room != "__main__"} == drawn[name == "RUNTIME_FLOORS"]


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    workflow = ROOT / ".github" / "workflows" / "test.yml"
    scripts = [text_of(workflow), text_of(ROOT / ".ci" / "run"), *(text for _, text in blocks("sh"))]
    spans = [span for page in PAGES for span in SPAN.findall(FENCE.sub("", text_of(page)))]
    named = re.findall(r"(?:^|- run: )make ([a-z][\w-]+)", "\n".join([*scripts, *spans]), re.MULTILINE)
    assert len(named) > 15
    assert set(named) <= targets


def test_every_command_line_is_one_that_exo_kimi_takes(command_line: CommandLine) -> None:
    found = list(commands())
    assert len(found) > 60
    wrong = [f"{page}: {' '.join(words)}: {what}" for page, words, _ in found for what in command_line.mistakes(words)]
    assert wrong == []
    for _, words, whole in found:
        if whole:
            command_line.parse(words)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(named) == sorted(pages)


@pytest.mark.parametrize(("where", "text"), blocks("python"), ids=lambda value: value if ".md:" in value else "")
def test_every_python_example_runs(where: str, text: str, server_url: str) -> None:
    here = text.replace("http://127.0.0.1:52415", server_url).replace("/models/kimi-k2", str(shipped_model()))
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(compile(here, where, "exec"), {"__name__": "__main__"})
    if "capital of Norway" in text:
        assert "Oslo" in shown.getvalue()


@pytest.mark.parametrize(("where", "text"), blocks("toml"), ids=lambda value: value if ".md:" in value else "")
def test_every_toml_example_is_a_cluster_or_a_recipe(where: str, text: str) -> None:
    if "[rest]" in text:
        assert parse_recipe(tomllib.loads(text), where=where).rules
        return
    assert len(parse_cluster(tomllib.loads(text), where=Path(where)).machines) == 2


def test_the_command_reference_is_what_the_commands_say() -> None:
    assert text_of(GENERATED) == cli_reference(), "run `make reference`"


def exists(module: str) -> bool:
    """Whether a dotted name is a module, or a name in one; nothing is imported."""
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    inside = [file for file in (path.parent.with_suffix(".py"), path.parent / "__init__.py") if file.exists()]
    return any(re.search(rf"\b{path.name}\b", file.read_text(encoding="utf-8")) for file in inside)
