"""A short slice of tests/torture.py: all kinds of trouble, some of each; nothing may be lost."""

from __future__ import annotations

import os

import pytest
import torture

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it uses signals and limits of POSIX systems")


@pytest.fixture(scope="module")
def bench(tmp_path_factory, model_dir) -> torture.Torture:
    """A bench for a fiftieth of the program."""
    bench = torture.Torture(tmp_path_factory.mktemp("torture"), share=0.02, model_dir=model_dir)
    bench.patience = 60  # other tests may have all processors
    return bench


@pytest.fixture(scope="module")
def lives(bench) -> torture.Lives:
    return torture.Lives(bench)


@pytest.fixture(autouse=True)
def nothing_is_lost(bench):
    yield
    lost, bench.lost = bench.lost, []
    assert lost == []


def test_damaged_images_are_used_or_named(bench):
    torture.images(bench)


@pytest.mark.parametrize("name, code, count", [("SIGKILL", -9, 2), ("SIGINT", 130, 1), ("SIGTERM", 130, 1)])
def test_a_stopped_run_says_so_in_one_line_and_goes_on(bench, lives, name, code, count):
    torture.struck(bench, lives, name, code, count)


def test_two_runs_at_once_give_what_each_gives_alone(bench, lives):
    torture.two_at_once(bench, lives)


def test_a_full_disk_gets_a_sentence_and_the_next_run_goes_on(bench):
    torture.full_disk(bench)


def test_graphs_that_do_more_than_compute_are_refused_by_name(bench):
    torture.hostile(bench)
