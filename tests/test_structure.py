"""The shape of the project: its size, its density, its rooms in their order, and flags, help and README in step."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

import predict
import retrain

SCRIPTS = {name: (ROOT / name).read_text("utf-8") for name in ("retrain.py", "predict.py")}
ROOMS = "common ground, flags, images, base model, bottlenecks, cluster, head, near duplicates, diagnostics, report, "
ROOMS += "export, crawl, main"
# No more tokens and characters in a line of code than retrain.py had when it was of 7,128 lines, at commit 907270e.
MOST_LINES, MOST_FUNCTIONS, MOST_CLASSES, MOST_OF_PREDICT, MOST_OF_TESTS = 3600, 240, 32, 700, 8000
MOST_TOKENS, MOST_CHARACTERS = 10.79, 48.48


def nodes_of(text: str, *kinds: type) -> list:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def test_the_scripts_keep_to_their_budgets():
    text = SCRIPTS["retrain.py"]
    assert len(text.splitlines()) <= MOST_LINES
    assert len(nodes_of(text, ast.FunctionDef)) <= MOST_FUNCTIONS
    assert len(nodes_of(text, ast.ClassDef)) <= MOST_CLASSES
    assert len(SCRIPTS["predict.py"].splitlines()) <= MOST_OF_PREDICT


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_function_fits_a_screen(script):
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in nodes_of(SCRIPTS[script], ast.FunctionDef)}
    assert {name: size for name, size in sizes.items() if size > 60} == {}


def test_tests_keep_to_their_budget():
    files = [*ROOT.glob("tests/*.py"), *ROOT.glob("inception_model/*.py")]
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) <= MOST_OF_TESTS


def code_of(text: str) -> tuple[int, dict[int, str]]:
    """Return how many tokens a script has, and its lines of code by their numbers: no comments, no docstrings."""
    described = nodes_of(text, ast.FunctionDef, ast.ClassDef, ast.Module)
    strings = [node.body[0] for node in described if ast.get_docstring(node) is not None]
    docstrings = {line for string in strings for line in range(string.lineno, string.end_lineno + 1)}
    no_code = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in no_code]
    tokens = [token for token in tokens if token.start[0] not in docstrings]
    numbers = {number for token in tokens for number in range(token.start[0], token.end[0] + 1)}
    lines = text.split("\n")
    return len(tokens), {number: lines[number - 1].strip() for number in numbers}


def test_the_code_is_shorter_by_design_and_not_by_density():
    found = [code_of(text) for text in SCRIPTS.values()]
    tokens, lines = sum(tokens for tokens, _ in found), [line for _, lines in found for line in lines.values()]
    assert tokens / len(lines) <= MOST_TOKENS
    assert sum(map(len, lines)) / len(lines) <= MOST_CHARACTERS


def test_tokens_and_lines_of_code_are_counted_as_said():
    assert code_of('"""Doc."""\n\n# why\nx = (1,\n     2)\n') == (7, {4: "x = (1,", 5: "2)"})


def test_the_rooms_come_in_reading_order():
    banners = re.findall(r"^# =+\n# (.+)\n# =+$", SCRIPTS["retrain.py"], re.MULTILINE)
    names = [banner.split(":")[0].strip().lower() for banner in banners]
    assert names == ROOMS.split(", ")


@pytest.mark.parametrize("module", [retrain, predict])
def test_every_flag_is_told_by_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.main(["--help", "all"] if module is retrain else ["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    given = set(re.findall(r'\b(?:flag|add_argument)\(\s*"(--[a-z_]+)[ "]', SCRIPTS[Path(module.__file__).name]))
    assert len(given) > 5
    assert {flag for flag in given if not re.search(rf"{flag}\b", told)} == set()


def test_the_readme_names_no_flag_that_is_not_there():
    known = {flag for text in SCRIPTS.values() for flag in re.findall(r'"(--[a-z_]+)[ "]', text)}
    for path in ROOT.glob("README*.md"):
        told = set(re.findall(r"(?<![\w-])--[a-z]+_[a-z_]+\b", path.read_text("utf-8")))
        assert told - known == set(), path.name


def test_the_drawings_are_all_there():
    """Forty of each class to learn from and two to predict, in few bytes."""
    for label in ("animal", "flower", "guitar", "house", "plane"):
        assert len(list(ROOT.glob(f"data/{label}/*.jpg"))) == 40
        assert len(list(ROOT.glob(f"test_images/{label}_*.jpg"))) == 2
    files = [*ROOT.glob("data/*/*.jpg"), *ROOT.glob("test_images/*.jpg")]
    assert sum(path.stat().st_size for path in files) < 4_000_000
