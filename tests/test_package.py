"""The package as users get it: what the wheel holds, and what `import shardc` costs."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import shardc

ROOT = Path(__file__).parents[1]
PARTS = ("compiler", "passes", "runtime", "tools")


def run(*command: str, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The file names in a wheel made from a source distribution of a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("shardc", *PARTS):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", cwd=tree)
    (path,) = (tree / "dist").glob("*.whl")
    return set(zipfile.ZipFile(path).namelist())


def modules_of_the_tree() -> set[str]:
    inside = {path.relative_to(ROOT).as_posix() for path in (ROOT / "shardc").rglob("*.py")}
    parts = {f"shardc/{path.relative_to(ROOT).as_posix()}" for p in PARTS for path in (ROOT / p).rglob("*.py")}
    return inside | parts


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_other(wheel: set[str]):
    assert {name for name in wheel if name.endswith(".py")} == modules_of_the_tree()


@pytest.mark.slow
def test_the_wheel_installs_nothing_beside_shardc(wheel: set[str]):
    assert {name.split("/")[0] for name in wheel} == {"shardc", f"shardc-{shardc.__version__}.dist-info"}


@pytest.mark.slow
def test_the_wheel_is_typed_and_licensed(wheel: set[str]):
    assert {f"shardc/{part}py.typed" for part in ("", *(f"{p}/" for p in PARTS))} <= wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


@pytest.mark.slow
def test_the_wheel_holds_what_the_tools_read(wheel: set[str]):
    static = {path.name for path in (ROOT / "tools/static").glob("*")}
    assert {Path(name).name for name in wheel if name.startswith("shardc/tools/static/")} == static


def test_import_does_not_load_torch(tmp_path: Path):
    assert run(sys.executable, "-c", "import sys, shardc; print('torch' in sys.modules)", cwd=tmp_path) == "False\n"


@pytest.mark.slow
def test_public_names_start_nothing(tmp_path: Path):
    code = (
        "import shardc, torch\n"
        "for name in shardc.__all__: getattr(shardc, name)\n"
        "print(torch.cuda.is_initialized(), torch.distributed.is_initialized())"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path) == "False False\n"


@pytest.mark.parametrize("name", shardc.__all__)
def test_public_name(name: str):
    assert getattr(shardc, name) is not None
    assert name in dir(shardc)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'shardc' has no attribute 'shard_all'"):
        shardc.shard_all  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_same_names_from_the_same_places():
    tree = ast.parse((ROOT / "shardc/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == shardc._HOME
    assert sorted(shardc._HOME) == sorted(shardc.__all__)


@pytest.mark.parametrize("link, place", [("__init__.py", "shardc/__init__.py"), *((p, p) for p in PARTS)])
def test_links_for_type_checkers_lead_to_the_tree(link: str, place: str):
    path = ROOT / "typings/shardc" / link
    assert path.is_symlink() and path.resolve() == (ROOT / place).resolve()


@pytest.mark.parametrize("part", ["", *PARTS])
def test_init_files_import_nothing_of_torch(part: str):
    init = ROOT / part / "__init__.py" if part else ROOT / "shardc/__init__.py"
    body = ast.parse(init.read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert part == "" or not imports
    assert not any("torch" in ast.unparse(node) for node in imports)
