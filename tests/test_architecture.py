"""The rules of the layout: where imports point and which files know a model family's library."""

import ast
from pathlib import Path


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_csm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "dataset_builders").glob("*.py")])
STAGES = ("prepare", "encode", "mixture")


def imports_of(path):
    """Return the modules that a file imports anywhere but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


GRAPH = {name_of(path): set(imports_of(path)) for path in SOURCES}


def test_a_stage_imports_no_other_stage():
    for name, imports in GRAPH.items():
        stage = name.split(".")[1] if name.startswith("hf_csm.") else None
        if stage in STAGES:
            others = [m for m in imports for other in STAGES if other != stage and m.startswith(f"hf_csm.{other}")]
            assert not others, f"{name} imports {others}"


def test_shared_data_imports_no_stage_and_no_model():
    for name, imports in GRAPH.items():
        if name.startswith("hf_csm.data"):
            assert all(
                m.split(".")[1] in ("data", "units", "errors", "files") for m in imports if m.startswith("hf_csm")
            )


def test_one_file_reaches_the_builders_and_none_the_recipes():
    package = {name: imports for name, imports in GRAPH.items() if name.startswith("hf_csm")}
    reaching = [name for name, imports in package.items() if any(m.startswith("dataset_builders") for m in imports)]
    assert reaching in ([], ["hf_csm.corpora"])
    assert not [name for name, imports in package.items() if any(m.split(".")[0] == "recipes" for m in imports)]


def test_there_is_no_import_cycle():
    graph = {name: {m for m in imports if m in GRAPH and m != name} for name, imports in GRAPH.items()}
    while ends := [name for name, imports in graph.items() if not imports]:
        graph = {name: imports - set(ends) for name, imports in graph.items() if name not in ends}
    assert not graph, f"in a cycle or above one: {graph}"


def test_a_family_is_reached_through_its_record():
    package = {name: imports for name, imports in GRAPH.items() if name.startswith("hf_csm")}
    reaching = [name for name, imports in package.items() if any(m.startswith("hf_csm.models.moshi") for m in imports)]
    assert reaching and all(name.startswith("hf_csm.models.moshi") for name in reaching)


def test_the_library_of_a_family_is_imported_in_its_folder_alone():
    graph = GRAPH | {name_of(path): set(imports_of(path)) for path in (ROOT / "recipes").rglob("*.py")}
    importing = [name for name, imports in graph.items() if any(m.split(".")[0] == "moshi" for m in imports)]
    assert importing and all(name.startswith("hf_csm.models.moshi") for name in importing)
