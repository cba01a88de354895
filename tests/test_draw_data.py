"""The pictures that come with the project are those that tests/draw_data.py draws, and few bytes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

CLASSES = ["animal", "flower", "guitar", "house", "plane"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder into which the script has drawn everything anew."""
    folder = tmp_path_factory.mktemp("drawn")
    subprocess.run([sys.executable, ROOT / "tests/draw_data.py", "--output", folder], check=True)
    return folder


def pictures(folder) -> list[str]:
    """Return the names of all pictures in data/ and test_images/, relative to the folder that holds both."""
    found = [*(folder / "data").glob("*/*"), *(folder / "test_images").glob("*")]
    return sorted(path.relative_to(folder).as_posix() for path in found if not path.name.startswith("."))


def test_forty_of_each_class_to_learn_and_ten_to_predict():
    names = pictures(ROOT)
    assert [sum(name.startswith(f"data/{label}/") for name in names) for label in CLASSES] == [40] * 5
    assert [sum(name.startswith(f"test_images/{label}_") for name in names) for label in CLASSES] == [2] * 5
    assert len(names) == 210
    assert sum((ROOT / name).stat().st_size for name in names) < 4_000_000


def test_the_script_draws_these_pictures(drawn):
    assert pictures(drawn) == pictures(ROOT)
    for name in pictures(ROOT):
        ours, anew = (np.asarray(PIL.Image.open(folder / name), np.float32) for folder in (ROOT, drawn))
        assert ours.shape == anew.shape
        assert np.abs(ours - anew).mean() < 4, name  # other releases of Pillow may round and compress otherwise


def test_the_script_overwrites_nothing(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, ROOT / "tests/draw_data.py", "--output", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "mine.txt"]
