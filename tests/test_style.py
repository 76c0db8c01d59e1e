"""The house rules that a program can check: short, abstract or final, no drawers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("smcdiff", "models", "inference")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]

LINES_PER_FUNCTION = 40  # without signature and docstring
LINES_PER_FILE = 350
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "misc"}


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


each_file = pytest.mark.parametrize("path", FILES, ids=name)


def long_functions(source: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [each.name for each in functions if body_length(each) > LINES_PER_FUNCTION]


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def classes(source: str) -> Iterator[tuple[str, set[str], bool]]:
    """Name, names of the bases, and whether it is abstract, for every class."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
            has_abstract_method = "abstractmethod" in ast.unparse(node.body)
            yield node.name, bases, has_abstract_method or bool(bases & {"ABC", "Protocol"})


def subclasses_of_concrete_classes(sources: list[str]) -> list[str]:
    found = [each for source in sources for each in classes(source)]
    concrete = {name for name, _, is_abstract in found if not is_abstract}
    return [f"{name}({base})" for name, bases, _ in found for base in bases & concrete]


@each_file
def test_functions_fit_on_a_screen(path):
    found = long_functions(path.read_text())
    assert not found


@each_file
def test_files_are_short(path):
    assert path.read_text().count("\n") <= LINES_PER_FILE


@each_file
def test_files_have_a_concept_for_a_name(path):
    assert path.stem.strip("_") not in DRAWERS


def test_classes_are_abstract_or_final():
    assert not subclasses_of_concrete_classes([path.read_text() for path in FILES])


def test_rules_see_what_they_should():
    body = "\n    pass" * LINES_PER_FUNCTION
    assert not long_functions(f'def f():\n    """\n    Long.\n    """{body}')
    assert long_functions(f"def f():{body}\n    pass") == ["f"]
    abstract = "class A(Generic[T]):\n    @abstractmethod\n    def f(self): ..."
    assert not subclasses_of_concrete_classes([abstract, "class B(a.A[int]): ..."])
    assert subclasses_of_concrete_classes(["class A: ...", "class B(a.A[int]): ..."]) == ["B(A)"]
