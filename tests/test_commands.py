"""The commands as users type them: the start scripts, --help, every command of the README, the notebook."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from crawl_server import CrawlServer, Result

import retrain

POSIX = pytest.mark.skipif(os.name == "nt", reason="retrain.sh is for POSIX systems")


def script_arguments(text: str) -> list[str]:
    """Return the words that a start script passes to retrain.py before those of the user."""
    command = re.search(r"retrain\.py (--.*?)(\"\$@\"|%\*)", text, re.DOTALL).group(1)
    return re.sub(r"[\\^]\s*\n", " ", command).split()


def test_sh_and_bat_pass_the_same_arguments():
    shell, batch = (script_arguments((ROOT / name).read_text()) for name in ("retrain.sh", "retrain.bat"))
    assert shell == batch
    expected = (
        "--bottleneck_dir bottleneck --how_many_training_steps 200 --model_dir inception_model "
        "--output_graph output_graph.pb --output_labels output_labels.txt"
    )
    assert " ".join(shell) == expected


def test_bat_is_in_the_line_ends_of_windows_and_can_be_told_not_to_pause():
    text = (ROOT / "retrain.bat").read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n") > 0
    assert b"if not defined RETRAIN_NO_PAUSE pause\r\n" in text


def test_the_lock_holds_what_the_requirements_ask_for():
    from packaging.requirements import Requirement

    locked = {}
    for line in (ROOT / "tests/requirements.lock").read_text().splitlines():
        if found := re.match(r"([\w.-]+)==(\S+)", line):
            locked.setdefault(found[1].lower(), []).append(found[2])
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if text := re.sub(r"#.*|^-r .*", "", line).strip():
                asked = Requirement(text)
                versions = locked[asked.name.lower()]
                assert all(version in asked.specifier for version in versions), f"{text}: locked is {versions}"


# A Python of a given version, as far as retrain.sh can see: it makes environments of itself, and notes how it is run.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*version_info*) exit {too_old} ;;
--version) echo "Python {version}" ;;
*"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >>calls.txt ;;
*"-m pip"*) echo pip >>calls.txt; [ ! -e pip_fails ] ;;
*) printf '%s\\n' "$@" >arguments.txt; exit 7 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that runs retrain.sh in `here`, on a system with just the given commands."""
    commands, here = tmp_path / "commands", tmp_path / "a project"
    for folder in (commands, here):
        folder.mkdir()
    for name in ("sh", "dirname", "cmp", "cp", "rm", "mkdir", "printf"):
        (commands / name).symlink_to(shutil.which(name))
    for name in ("retrain.sh", "requirements.txt"):
        shutil.copy(ROOT / name, here)

    def run(*arguments: str, version: str = "3.12.1", too_old: int = 0, python: str = "python3"):
        if python:
            path = commands / python
            path.write_text(FAKE_PYTHON.format(version=version, too_old=too_old))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        command = [str(here / "retrain.sh"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env={"PATH": str(commands)}, capture_output=True, text=True)

    run.here = here
    return run


@POSIX
def test_sh_installs_once_and_again_when_the_requirements_change(start):
    def calls() -> list[str]:
        return (start.here / "calls.txt").read_text().split()

    assert start().returncode == 7
    assert calls() == ["venv", "pip"]
    start()
    assert calls() == ["venv", "pip"]
    with open(start.here / "requirements.txt", "a") as file:
        file.write("# changed\n")
    start()
    assert calls() == ["venv", "pip", "venv", "pip"]


@POSIX
def test_sh_appends_the_users_arguments_as_they_are(start):
    start("--image_dir", "my photos", "*")
    arguments = (start.here / "arguments.txt").read_text().splitlines()
    expected = script_arguments((ROOT / "retrain.sh").read_text())
    assert arguments == ["retrain.py", *expected, "--image_dir", "my photos", "*"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_sh_leaves_the_environment_of_another_user_alone(start):
    (start.here / ".venv/bin").mkdir(parents=True)
    os.chown(start.here / ".venv", 65534, 65534)
    failed = start()
    assert failed.returncode == 1
    assert f"retrain.sh: error: {start.here}/.venv is another user's; copy the folder" in failed.stderr
    assert (start.here / ".venv/bin").is_dir()


@POSIX
def test_sh_tries_again_after_a_failed_installation(start):
    (start.here / "pip_fails").touch()
    failed = start()
    assert failed.returncode == 1
    assert "retrain.sh: error: the packages could not be installed" in failed.stderr
    (start.here / "pip_fails").unlink()
    assert start().returncode == 7


@POSIX
@pytest.mark.parametrize("python", ["python3", "python3.11", "python"])
def test_sh_finds_python_by_its_names(start, python):
    assert start(python=python).returncode == 7


@POSIX
def test_sh_says_that_python_is_missing(start):
    done = start(python="")
    assert done.returncode == 1
    assert "there is no python3; install Python 3.10 to 3.13" in done.stderr


@POSIX
@pytest.mark.parametrize("version", ["3.8.10", "3.15.0"])
def test_sh_says_that_python_is_too_old_or_too_new(start, version):
    done = start(version=version, too_old=1)
    assert done.returncode == 1
    assert f"Python {version} is too old or too new for TensorFlow" in done.stderr


@pytest.fixture(scope="session")
def no_tensorflow(tmp_path_factory) -> dict[str, str]:
    """An environment of the process in which TensorFlow can't be imported."""
    folder = tmp_path_factory.mktemp("no_tensorflow")
    (folder / "tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", ["predict.py"])
def test_help_names_every_flag_without_tensorflow(script, tmp_path, no_tensorflow):
    done = run_script(script, "--help", cwd=tmp_path, env=no_tensorflow)
    assert done.returncode == 0, done.stderr
    described = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    in_usage = set(re.findall(r"\[(--\w+)", done.stdout))
    assert described == in_usage
    assert len(described) > 5


CLASSIC_FLAGS = (
    "image_dir output_graph output_labels intermediate_output_graphs_dir intermediate_store_frequency summaries_dir "
    "how_many_training_steps learning_rate testing_percentage validation_percentage eval_step_interval "
    "train_batch_size test_batch_size validation_batch_size print_misclassified_test_images model_dir bottleneck_dir "
    "final_tensor_name flip_left_right random_crop random_scale random_brightness architecture tfhub_module "
    "saved_model_dir logging_verbosity checkpoint_path"
)


def test_no_name_of_a_script_is_given_twice():
    """A constant of one room would be the other's, without a word of the linter."""
    for script in ("retrain.py", "predict.py"):
        named = Counter()
        for node in ast.parse((ROOT / script).read_text("utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node] if hasattr(node, "name") else []
            named.update(
                found.id if isinstance(found, ast.Name) else node.name
                for target in targets
                for found in (ast.walk(target) if isinstance(node, ast.Assign) else [target])
                if isinstance(found, ast.Name) or found is node
            )
        assert {name for name, count in named.items() if count > 1} == set()


def test_classic_flags_are_all_there_with_their_defaults():
    import retrain

    flags = vars(retrain.parse_flags([]))
    assert set(CLASSIC_FLAGS.split()) <= set(flags)
    classic = {"how_many_training_steps": 4000, "learning_rate": 0.01, "testing_percentage": 10}
    classic |= {"validation_percentage": 10, "eval_step_interval": 10, "train_batch_size": 100}
    classic |= {"test_batch_size": -1, "validation_batch_size": 100, "final_tensor_name": "final_result"}
    classic |= {"intermediate_store_frequency": 0, "random_crop": 0, "random_scale": 0, "random_brightness": 0}
    assert {name: flags[name] for name in classic} == classic
    assert not any(str(value).startswith("/tmp") for value in flags.values())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--imgae_dir", "x"], "--imgae_dir is no flag of this command; did you mean --image_dir?"),
        (
            [str(ROOT / "data")],
            f"{ROOT / 'data'} is no flag of this command; did you mean --image_dir {ROOT / 'data'}?",
        ),
        (["--learning_rate", "fast"], "argument --learning_rate: 'fast' is no number"),
        (["--how_many_training_steps", "1.5"], "argument --how_many_training_steps: '1.5' is no whole number"),
        (["--train_batch_size", "-2"], "argument --train_batch_size: -2 is out of range (1 or more, or -1)"),
        (["--testing_percentage", "60", "--validation_percentage", "40"], "together leave nothing to train on"),
        (["--architecture", "mobilenet_1.0_224"], "'mobilenet_1.0_224' is not known"),
        (
            ["--tfhub_module", "https://example.com/1", "--architecture", "vgg16"],
            "both name a base model; leave one of them out",
        ),
        (["--flip_left_right", "perhaps"], "'perhaps' is neither true nor false"),
        (["--final_tensor_name", "a b"], "'a b' can't name a node"),
    ],
)
def test_wrong_flags_get_one_sentence_without_tensorflow(arguments, sentence, tmp_path, no_tensorflow):
    done = run_script("retrain.py", *arguments, cwd=tmp_path, env=no_tensorflow)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_crawled_pictures_do_not_go_among_the_drawn_ones():
    crawl = ["--crawl", "names.txt", "--crawl_count", "5"]
    assert retrain.parse_flags([]).image_dir == "data"
    assert retrain.parse_flags(crawl).image_dir == "crawled"
    assert retrain.parse_flags([*crawl, "--crawl_only", "--crawl_dir", "more"]).image_dir == "data"
    assert retrain.parse_flags([*crawl, "--image_dir", "photos"]).image_dir == "photos"


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--flip_left_right"], True), (["--flip_left_right=true"], True), (["--flip_left_right=0"], False)],
)
def test_switches_may_stand_alone_or_have_a_value(words, value):
    import retrain

    assert retrain.parse_flags(words).flip_left_right is value


@pytest.fixture
def bare_python(tmp_path):
    """Return a function that runs predict.py, copied to a folder, with a Python that has no packages."""
    for name in ("retrain.py", "predict.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", str(tmp_path / "predict.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_missing_packages_are_named_in_a_sentence(bare_python):
    done = bare_python()
    assert done.returncode == 1
    assert "run retrain.sh (retrain.bat), which installs what is needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def make_environment(folder: Path, script: str) -> None:
    """Put a .venv into `folder` whose Python is a shell script."""
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


@POSIX
def test_the_environment_that_retrain_sh_made_is_used(bare_python, tmp_path):
    make_environment(tmp_path, 'echo "$@"\nexit 5')
    done = bare_python("--image", "my photo.jpg")
    assert (done.returncode, done.stdout) == (5, f"{tmp_path / 'predict.py'} --image my photo.jpg\n")


@POSIX
def test_stopping_stops_the_python_of_the_environment(bare_python, tmp_path):
    make_environment(tmp_path, "echo started\nexec sleep 60")
    command = [sys.executable, "-S", str(tmp_path / "predict.py")]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        process.terminate()
        assert process.wait(timeout=30) == -15  # no process of its own that would be left behind


# ----------------------------------------------------------------------------------------------------------------------
# The README's commands and the notebook, in a copy of the project as a clone would have it
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory, small_graph) -> Path:
    """A copy of the project's files with this environment as its .venv, and the small base model in its place."""
    copy = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / "inception_model").mkdir(exist_ok=True)
    shutil.copy(small_graph, copy / "inception_model")
    (copy / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        (copy / ".venv" / part.name).symlink_to(part)
    (copy / ".venv" / "installed.txt").unlink(missing_ok=True)
    shutil.copy(ROOT / "requirements.txt", copy / ".venv" / "installed.txt")
    return copy


def readme_commands() -> list[str]:
    """Return the commands in the README's shell blocks, but for the one that runs these tests."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and "tests/run.sh" not in line]


@pytest.fixture
def picture_search(clone) -> Iterator[str]:
    """The README's file of class names in the clone; yields the flags that let --crawl find them at a local server."""
    names = re.search(r"^```text\n(ants\n.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)[
        1
    ]
    (clone / "names.txt").write_text(names)
    with CrawlServer() as server:
        for first, line in enumerate(names.splitlines()):
            server.results[line.split(": ")[-1]] = [Result("good", 1000 * first + seed) for seed in range(110)]
        yield f" --crawl_source {server.source('openverse')} --crawl_allow_private 127.0.0.1 --crawl_host_delay 0"


@POSIX
def test_every_command_of_the_readme_runs(clone, picture_search):
    commands = readme_commands()
    assert commands[0] == "./retrain.sh"
    assert any("predict.py" in command for command in commands)
    for command in commands:
        if "--crawl " in command:
            command += picture_search
        done = subprocess.run(command, shell=True, cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@POSIX
def test_notebook_runs_from_top_to_bottom(clone):
    import nbclient
    import nbformat

    if not (clone / "output_graph.json").exists():
        subprocess.run("./retrain.sh", cwd=clone, check=True, capture_output=True)
    notebook = nbformat.read(clone / "predict.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(clone)}}).execute()
    shown = [
        o["data"]["text/html"] for c in notebook.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ]
    pictures = [path for path in (ROOT / "test_images").iterdir() if not path.name.startswith(".")]
    labels = (clone / "output_labels.txt").read_text("utf-8").split("\n")[:-1]
    assert len(shown) == len(pictures) == 10
    for html in shown:
        assert "<img src='data:image/png;base64," in html
        assert all(f"<td>{label}</td>" in html for label in labels)


@POSIX
def test_the_one_command_works_offline_on_the_starter(clone):
    """No network: the starter stands in, with a warning at both ends, and learns the drawn pictures."""
    shutil.move(clone / "inception_model/classify_image_graph_def.pb", clone / "elsewhere.pb")
    try:
        offline = {
            **os.environ,
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "https_proxy": "http://127.0.0.1:9",
            "NO_PROXY": "",
        }
        command = ["./retrain.sh", "--random_seed", "0", "--bottleneck_dir", "of_starter"]
        done = subprocess.run(command, cwd=clone, env=offline, capture_output=True, text=True)
    finally:
        shutil.move(clone / "elsewhere.pb", clone / "inception_model/classify_image_graph_def.pb")
    assert done.returncode == 0, done.stderr
    warned = [
        line for line in done.stderr.splitlines() if line.startswith("WARNING: The base model is the small starter")
    ]
    assert len(warned) == 2
    assert float(re.search(r"Final test accuracy = ([\d.]+)%", done.stdout).group(1)) >= 90
    named = subprocess.run(
        [sys.executable, "predict.py", "--image", "test_images", "--json", "named.json"],
        cwd=clone, capture_output=True, text=True,
    )  # fmt: skip
    assert named.returncode == 0, named.stderr
    entries = json.loads((clone / "named.json").read_text("utf-8"))
    right = [Path(entry["image"]).name.startswith(entry["predictions"][0]["label"]) for entry in entries]
    assert len(right) == 10
    assert sum(right) >= 8
