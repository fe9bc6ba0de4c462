"""Names and sizes: one stem per pass in four places, a docstring per module, short files and functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("compiler", "passes", "runtime", "tools")
NOT_PASSES = ("__init__", "pipeline")
SAYS_NOTHING = ("utils", "common", "helpers", "misc", "base", "manager")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def sources(root: Path) -> list[Path]:
    return [path for part in PARTS for path in sorted((root / part).rglob("*.py"))]


def pass_classes(path: Path) -> Iterator[tuple[str, str | None]]:
    """(class name, pass name) of each class in a file that has a `run` method and a `name`."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        values = {
            target.id: item.value
            for item in node.body
            if isinstance(item, ast.Assign | ast.AnnAssign)
            for target in (item.targets if isinstance(item, ast.Assign) else [item.target])
            if isinstance(target, ast.Name)
        }
        if "run" in methods and "name" in values:
            match values["name"]:
                case ast.Constant(value=str(name)):
                    yield node.name, name
                case _:
                    yield node.name, None


def misnamed_passes(root: Path) -> list[str]:
    wrong = []
    for path in sorted((root / "passes").rglob("*.py")):
        if path.stem in NOT_PASSES:
            continue
        folder = path.parent.relative_to(root).as_posix()
        words = path.stem.split("_")
        expected = ("".join(word.capitalize() for word in words), "-".join(words))
        found = list(pass_classes(path))
        if found != [expected]:
            wrong.append(f"{folder}/{path.name}: expected one pass (class, name) {expected}, found {found}")
        tests = (f"tests/{folder}/test_{path.stem}.py", f"tests/{folder}/{path.stem}.txt")
        if not any((root / test).exists() for test in tests):
            wrong.append(f"{folder}/{path.name}: has no {' or '.join(tests)}")
    return wrong


def undocumented(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: its first line must say its job"
        for path in sources(root)
        if not (ast.get_docstring(ast.parse(path.read_text())) or "").strip()
    ]


def empty_names(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: name it after what it holds"
        for path in sources(root)
        if set(path.relative_to(root).with_suffix("").parts) & set(SAYS_NOTHING)
    ]


def too_long(root: Path) -> list[str]:
    wrong = []
    for path in sources(root):
        text = path.read_text()
        lines = len(text.splitlines())
        if lines > LONGEST_FILE:
            wrong.append(f"{path.relative_to(root)}: {lines} lines, at most {LONGEST_FILE}")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                place = f"{path.relative_to(root)}:{node.lineno}"
                wrong.append(f"{place}: {node.name} has {lines} lines, at most {LONGEST_FUNCTION}")
    return wrong


@pytest.mark.parametrize("check", [misnamed_passes, undocumented, empty_names, too_long])
def test_the_tree_follows(check):
    wrong = check(ROOT)
    assert not wrong, "\n".join(wrong)


GOOD_PASS = '''"""a  ==>  b."""


@dataclass(frozen=True)
class FuseAdds:
    name = "fuse-adds"
    takes = gives = Stage.LOCAL

    def run(self, gm, ctx):
        return PassResult()
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree in which nothing is wrong."""
    for folder in (*PARTS, "tests/passes"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "passes/__init__.py").write_text('"""The passes."""\n')
    (tmp_path / "passes/pipeline.py").write_text('"""The list."""\n')
    (tmp_path / "passes/fuse_adds.py").write_text(GOOD_PASS)
    (tmp_path / "tests/passes/test_fuse_adds.py").touch()
    return tmp_path


@pytest.mark.parametrize("check", [misnamed_passes, undocumented, empty_names, too_long])
def test_a_good_tree_passes(check, tree: Path):
    assert check(tree) == []


@pytest.mark.parametrize(
    "old, new",
    [
        ("class FuseAdds", "class FuseAdd"),
        ('"fuse-adds"', '"fuse_adds"'),
        ('"fuse-adds"', "NAME"),
        ("    def run", "    def apply"),
        ('    name = "fuse-adds"\n', ""),
    ],
)
def test_a_pass_whose_stem_differs_is_found(tree: Path, old: str, new: str):
    (tree / "passes/fuse_adds.py").write_text(GOOD_PASS.replace(old, new))
    assert len(misnamed_passes(tree)) == 1


def test_a_pass_may_annotate_its_name(tree: Path):
    text = GOOD_PASS.replace('name = "fuse-adds"', 'name: ClassVar[str] = "fuse-adds"')
    (tree / "passes/fuse_adds.py").write_text(text)
    assert misnamed_passes(tree) == []


def test_a_second_pass_in_a_file_is_found(tree: Path):
    (tree / "passes/fuse_adds.py").write_text(GOOD_PASS + GOOD_PASS.replace("FuseAdds", "FuseMore"))
    assert len(misnamed_passes(tree)) == 1


def test_a_pass_without_a_test_is_found(tree: Path):
    (tree / "tests/passes/test_fuse_adds.py").unlink()
    assert misnamed_passes(tree) == [
        "passes/fuse_adds.py: has no tests/passes/test_fuse_adds.py or tests/passes/fuse_adds.txt"
    ]


@pytest.mark.parametrize("text", ["", "import torch\n", '""" """\n'])
def test_a_module_without_a_docstring_is_found(tree: Path, text: str):
    (tree / "tools/cli.py").write_text(text)
    assert len(undocumented(tree)) == 1


@pytest.mark.parametrize("name", ["compiler/utils.py", "runtime/common/groups.py"])
def test_an_empty_name_is_found(tree: Path, name: str):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text('"""Things."""\n')
    assert len(empty_names(tree)) == 1


@pytest.mark.parametrize("lines, found", [(400, 0), (401, 1)])
def test_a_long_file_is_found(tree: Path, lines: int, found: int):
    (tree / "runtime/bind.py").write_text("x = 1\n" * lines)
    assert len(too_long(tree)) == found


@pytest.mark.parametrize("lines, found", [(60, 0), (61, 1)])
@pytest.mark.parametrize("head", ["def f():\n", "class A:\n  async def f(self):\n"])
def test_a_long_function_is_found(tree: Path, head: str, lines: int, found: int):
    (tree / "runtime/bind.py").write_text(head + "    x = 1\n" * (lines - 1))
    assert len(too_long(tree)) == found
