"""Imports point one way: a file may use its own room and the rooms below it, and no two files need each other."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import layershare

ROOT = Path(layershare.__file__).parent
# Bottom to top. A file belongs to the longest name that fits.
ROOMS = (
    ("errors", "_when", "options"),
    ("config",),
    ("plan", "presets", "result"),
    ("stages", "onnx"),
    ("linear", "stacks", "sharing.merge", "sharing.lowrank", "heal.losses"),
    ("sharing",),
    ("adapt", "architectures", "heal", "prune", "store", "measure", "analyse", "tasks", "train"),
    ("exits", "decoding"),
    ("export", "report"),
    ("compress", "sharing.folder", "exits.folder", "recipe", "demo", "pretrain", "finetune", "search"),
    ("cli", "__main__", ""),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def test_no_file_imports_upwards():
    wrong = [
        f"{file} -> {used}"
        for file, uses in graph().items()
        for used in uses
        if used and level(used) > level(file)
    ]
    assert not wrong


def test_no_two_files_need_each_other():
    assert list(TopologicalSorter(graph()).static_order())


def test_the_public_names_are_there_and_cost_no_torch_until_used():
    code = "import sys, json, layershare; print(json.dumps([sorted(sys.modules), layershare.__all__]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, names = json.loads(run.stdout)
    assert not {"torch", "transformers", "pydantic"} & set(modules)
    assert all(getattr(layershare, name) is not None for name in names)
    assert names == sorted(names, key=lambda name: (name[0].islower(), name))


def graph() -> dict[str, set[str]]:
    """Each file, as a dotted name below the package, and the files that it imports at any place."""
    paths = {name_of(path): path for path in ROOT.rglob("*.py")}
    return {
        name: set(imports(ast.parse(path.read_text()), set(paths))) - {name} for name, path in paths.items()
    }


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(tree: ast.AST, files: set[str]):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            inside = (
                name.removeprefix("layershare").lstrip(".") if name.split(".")[0] == "layershare" else None
            )
            while inside and inside not in files:
                inside = inside.rpartition(".")[0]
            if inside:
                yield inside


def level(file: str) -> int:
    while file and file not in LEVEL:
        file = file.rpartition(".")[0]
    return LEVEL[file]
