"""The house keeps its rules: who imports whom, one home per dependency, pure files, sizes, a true map."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["configs", "sharding", "trainer", "launcher"]  # each may import itself and those before it

HOMES = {
    "deepspeed": {"trainer/engine.py"},
    "mlflow": {
        "trainer/delivery.py",
        "trainer/tracking_store.py",
        "trainer/system_metrics.py",
        "trainer/registry.py",
    },
    "optuna": {"launcher/trials.py"},
    "webdataset": {"sharding/shards.py", "sharding/tars.py"},
    "omegaconf": {
        "configs/schema.py",
        "configs/student_schema.py",
        "configs/corpus_schema.py",
        "configs/task_schema.py",
        "configs/evaluate_schema.py",
        "configs/sweep_schema.py",
        "configs/load.py",
    },
}

PURE = [
    "trainer/losses.py",
    "trainer/attention_loss.py",
    "trainer/relation_loss.py",
    "trainer/prediction_loss.py",
    "trainer/numerics.py",
    "trainer/transfer.py",
    "trainer/layout.py",
    "trainer/layer_map.py",
    "trainer/similarity.py",
    "trainer/schedule.py",
    "sharding/order.py",
    "sharding/mixture.py",
]
# Files, hosts and processes; clocks and global random numbers; configuration; process groups.
IMPURE = {
    *(
        "os",
        "io",
        "sys",
        "pathlib",
        "shutil",
        "tempfile",
        "glob",
        "fsspec",
        "socket",
        "subprocess",
        "logging",
    ),
    *("time", "datetime", "random"),
    *("configs", "omegaconf"),
    *("deepspeed", "torch.distributed", "torch.multiprocessing", "multiprocessing"),
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
EXCUSED: dict[str, str] = {
    # "path" or "path::function": the reason. Empty is how we want it.
}


def tracked(pattern: str = "*") -> list[str]:
    """Tracked files that match a git pathspec, relative to the root."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--", pattern]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(path: str) -> Iterator[str]:
    """Dotted name of everything that a file imports, wherever in it, and of ``torch.distributed`` in use."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the room"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and f"{node.value.id}.{node.attr}" == "torch.distributed":
                yield "torch.distributed"


def within(imported: str, module: str) -> bool:
    return imported == module or imported.startswith(f"{module}.")


SOURCES = [path for room in ROOMS for path in tracked(f"{room}/*.py")]
PYTHON = tracked("*.py")


@pytest.mark.parametrize("path", SOURCES)
def test_imports_flow_one_way(path: str) -> None:
    later = ROOMS[ROOMS.index(path.split("/")[0]) + 1 :] + ["tests", "benchmarks"]
    backwards = [name for name in imports(path) for room in later if within(name, room)]
    assert not backwards, f"{path} imports {backwards}: launcher -> trainer -> sharding -> configs"


def test_nothing_imports_the_launcher() -> None:
    outside = [path for path in PYTHON if not path.startswith(("launcher/", "tests/launcher/"))]
    assert [path for path in outside if any(within(name, "launcher") for name in imports(path))] == []


@pytest.mark.parametrize("dependency", HOMES)
def test_a_large_dependency_has_one_home(dependency: str) -> None:
    users = {path for path in SOURCES if any(within(name, dependency) for name in imports(path))}
    assert users <= HOMES[dependency], f"{dependency} belongs in {HOMES[dependency]}"


@pytest.mark.parametrize("path", PURE)
def test_pure_files_touch_nothing_outside(path: str) -> None:
    impure = [name for name in imports(path) for module in IMPURE if within(name, module)]
    calls = [node.func for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    impure += [
        func.id for func in calls if isinstance(func, ast.Name) and func.id in ("open", "print", "input")
    ]
    assert not impure, f"{path} is pure functions, but uses {impure}"


@pytest.mark.parametrize("path", PYTHON)
def test_files_and_functions_stay_short(path: str) -> None:
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines())}
    too_long = {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            count = node.end_lineno - node.lineno + 1
            if count > MAX_FUNCTION_LINES:
                too_long[f"{path}::{node.name}"] = count
    unexcused = {name: count for name, count in too_long.items() if name not in EXCUSED}
    assert not unexcused, (
        f"over {MAX_FILE_LINES} lines a file or {MAX_FUNCTION_LINES} a function: {unexcused}"
    )


def test_every_folder_of_modules_has_its_folder_of_tests_and_no_other_exists() -> None:
    def folders(paths: list[str]) -> set[str]:
        return {str(Path(path).parent) for path in paths}

    rooms = folders(SOURCES)
    mirrors = {folder.removeprefix("tests/") for folder in folders(tracked("tests/*/*.py"))}
    assert mirrors == rooms


@pytest.mark.parametrize("path", [path for path in SOURCES if not path.endswith("__init__.py")])
def test_every_module_is_used_by_a_test_of_its_room(path: str) -> None:
    module = path.removesuffix(".py").replace("/", ".")
    tests = tracked(f"tests/{Path(path).parent}/*.py")
    imported = any(within(name, module) for test in tests for name in imports(test))
    started = any(path in (ROOT / test).read_text(encoding="utf-8") for test in tests)  # as a process
    assert imported or started, f"no test in tests/{Path(path).parent} uses {path}"


def test_the_map_in_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    modules = [path for path in SOURCES if not path.endswith("__init__.py")]
    assert [path for path in modules if path not in readme] == []


def test_the_map_in_the_readme_names_nothing_that_is_gone() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(rf"\b(?:{'|'.join(ROOMS)})/[\w/]+\.(?:py|yaml|sbatch)\b", readme)
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    folders = ["work/main", "work/shared", "work/.library", "tmp/dev", "opt/wheels", "opt/pypi", "root"]
    pattern = re.compile(rb"(?<![\w.])/(?:" + "|".join(map(re.escape, folders)).encode() + rb")\b")
    guilty = [path for path in tracked() if pattern.search((ROOT / path).read_bytes())]
    assert guilty == []
