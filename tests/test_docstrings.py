"""Public docstrings say what a caller must know: they are there, tell the shapes of arrays, and which errors come."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT


def public_functions() -> list[tuple[str, ast.FunctionDef]]:
    """Return (name with its class, function) of the scripts; those of a class with a base are documented there."""
    found = []
    for script in ("retrain.py", "predict.py"):
        for node in ast.parse((ROOT / script).read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found.append((node.name, node))
            elif isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                methods = [part for part in methods if not node.bases or ast.get_docstring(part)]
                found += [(f"{node.name}.{part.name}", part) for part in methods if not part.name.startswith("__")]
    return found


FUNCTIONS = [pytest.param(function, id=name) for name, function in public_functions()]


def raised_by(function: ast.FunctionDef) -> set[str]:
    """Return the names of the errors that a function itself raises, and does not catch."""
    caught = {
        name.id
        for part in ast.walk(function)
        if isinstance(part, ast.ExceptHandler) and part.type is not None
        for name in ast.walk(part.type)
        if isinstance(name, ast.Name)
    }
    raises = [part.exc for part in ast.walk(function) if isinstance(part, ast.Raise)]
    return {
        error.func.id for error in raises if isinstance(error, ast.Call) and isinstance(error.func, ast.Name)
    } - caught


def test_the_functions_are_found():
    names = {name for name, _ in public_functions()}
    assert {"train_head", "read_image", "Head.logits"} <= names


@pytest.mark.parametrize("function", FUNCTIONS)
def test_docstring_tells_shapes_and_errors(function):
    text = ast.get_docstring(function) or ""
    assert text
    signature = ast.unparse(function.args) + (ast.unparse(function.returns) if function.returns else "")
    if "ndarray" in signature:
        assert "[" in text, "which shape have the arrays?"
    told = {"UserError", "ImageError", "DownloadError", "Refusal", "SourceError", "ValueError"}
    for error in raised_by(function) & told:
        assert error in text, f"it raises {error}"
