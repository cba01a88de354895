"""The starter: its recipe runs from views to graph, and the graph that is shipped scores what its README says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, make_image_dir

import retrain


def run(script: str, *arguments) -> str:
    """Run one of our scripts and return what it printed."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_runs_from_views_to_a_graph_and_goes_on_where_it_was(small_graph, tmp_path):
    """On a small teacher, for a few steps: what comes out is a base model that retrain.py can train on."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    output = model_dir / retrain.STARTER_FILE
    flags = [
        "--teacher", small_graph, "--image_dir", ROOT / "test_images", "--drawn_dir", ROOT / "data/house",
        "--views", 1536, "--drawn_views", 1536, "--samples", 128, "--second_samples", 128, "--components", 8,
        "--work_dir", tmp_path / "work", "--output", output,
    ]  # fmt: skip
    first = run("inception_model/distill.py", *flags)
    assert first.count("views: 1,536 to make") == 2
    assert output.stat().st_size <= 8_000_000
    made = output.read_bytes()
    output.unlink()
    again = run("inception_model/distill.py", *flags)
    assert again.count("views: 0 to make") == 2
    assert output.read_bytes() == made

    make_image_dir(tmp_path / "pictures", count=6)
    outputs = ["--output_graph", tmp_path / "o.pb", "--output_labels", tmp_path / "o.txt", "--summaries_dir", ""]
    said = run(
        "retrain.py", "--architecture", "starter", "--model_dir", model_dir, "--image_dir", tmp_path / "pictures",
        "--bottleneck_dir", tmp_path / "bottleneck", "--how_many_training_steps", 5, *outputs,
    )  # fmt: skip
    assert "Step 4: Train accuracy" in said


def test_the_starter_scores_on_photographs(shared, small_graph, tmp_path):
    """ants_bees alone, the examination that it never saw: 79.1 % by the table of inception_model/README.md."""
    (tmp_path / "ants_bees").symlink_to(shared / "photos/ants_bees")
    starter = shutil.copy(ROOT / "inception_model" / retrain.STARTER_FILE, tmp_path)
    printed = run("tests/probe.py", "--teacher", small_graph, "--starter", starter, "--photos", tmp_path)
    rows = dict(line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ") and "%" in line)
    scores = {name: float(score.rstrip("%")) for name, score in rows.items()}
    assert scores["**starter**"] > 76
    assert scores["**starter**"] > scores["random network of the starter's shape"] + 8
    assert Path(starter).exists()
