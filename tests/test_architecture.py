"""The rules that keep the house in order: where imports point, how long a file may be, what a test is called."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "hf_csm").rglob("*.py"), *(ROOT / "dataset_builders").glob("*.py")])
PYTHON = [
    path for folder in ("hf_csm", "dataset_builders", "recipes", "tests") for path in (ROOT / folder).rglob("*.py")
]

ORDER = ("errors", "units", "config", "config_parser", "data", "models", "evaluation", "training", "export", "serving")
"""A part may import those left of it. `testing`, `cli`, `verbs` and `doctor` stand outside: nothing imports them."""


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT / "hf_csm").parts[0].removesuffix(".py")


def parts_that(part):
    """Return what a part may import."""
    if part == "testing":  # users import it into their own tests: it must not pull in the training stack
        return {"errors", "units", "data", "models", "testing"}
    return {*ORDER[: ORDER.index(part) + 1], "__version__"}


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "hf_csm" in p.parts and part_of(p) in (*ORDER, "testing")], ids=lambda p: p.name
)
def test_imports_point_one_way(path):
    for module in imports_of(path):
        if module.startswith("hf_csm."):
            assert module.split(".")[1] in parts_that(part_of(path)), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_the_library_never_imports_recipes(path):
    assert not [module for module in imports_of(path) if module.split(".")[0] == "recipes"]


def test_only_the_corpus_base_reaches_the_builders():
    reaching = [
        path.name
        for path in SOURCES
        if "hf_csm" in path.parts and any(m.split(".")[0] == "dataset_builders" for m in imports_of(path))
    ]
    assert reaching in ([], ["corpus.py"])


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_tests_mirror_the_sources():
    known = {path.stem for path in SOURCES} | {path.stem for path in (ROOT / "recipes").glob("*.py")}
    whole_way = {"architecture", "server", "distributed", "gpu", "page", "run_expressive_finetuning", "space"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.stem.removeprefix("test_") in known | whole_way, path


def test_there_is_no_utils():
    assert not [path for path in SOURCES if path.stem in ("utils", "common", "helpers", "misc")]


def test_the_readme_has_a_line_for_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [*SOURCES, *(ROOT / "recipes").glob("*.py")]:
        if path.name != "__init__.py":
            assert f"{path.name} " in readme, path
