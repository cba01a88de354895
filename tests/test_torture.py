"""A short slice of tests/torture.py: all kinds of trouble, some of each; nothing may be lost."""

from __future__ import annotations

import os

import pytest
import torture
from conftest import make_image_dir

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it uses signals and limits of POSIX systems")


@pytest.fixture
def bench(tmp_path, small_graph, capfd):
    """A bench for a hundredth of the program, on which nothing may be lost."""
    bench = torture.Torture(tmp_path, share=0.01, patience=60)  # other tests may have all processors
    yield bench
    with capfd.disabled():
        assert [loss for row in bench.rows for loss in row.lost] == []
    assert bench.rows


def test_pictures(bench):
    torture.pictures(bench)


def test_killed_and_stopped(bench):
    lives = torture.Lives(bench, 4)
    torture.killed(bench, lives)
    lives.count = 2
    torture.stopped(bench, lives, "SIGTERM", 143)


def test_odd_files_and_streams(bench, tmp_path):
    source = make_image_dir(tmp_path / "source", 6)
    torture.odd_files(bench, source)
    torture.odd_streams(bench, source)


def test_hostile_files(bench):
    torture.hostile_lites(bench)
    torture.hostile_archives(bench)
    torture.hostile_facts(bench)
