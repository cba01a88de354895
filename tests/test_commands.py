"""The commands as users type them: the launchers, --help and every flag, the first five minutes, the README."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, make_image_dir, run_script
from crawl_server import CrawlServer, Result

import predict
import retrain

POSIX = pytest.mark.skipif(os.name == "nt", reason="retrain.sh is for POSIX systems")


def test_sh_and_bat_pass_the_number_of_steps_and_no_more():
    for name, rest in (("retrain.sh", '"$@"'), ("retrain.bat", "%*")):
        (passed,) = re.findall(r'retrain\.py" (--.*)', (ROOT / name).read_text())
        assert passed == f"--how_many_training_steps 200 {rest}"
    text = (ROOT / "retrain.bat").read_bytes()
    assert text.count(b"\n") == text.count(b"\r\n") > 0  # the line ends of Windows
    assert b"if not defined RETRAIN_NO_PAUSE pause\r\n" in text


def test_the_lock_holds_what_the_requirements_ask_for():
    from packaging.requirements import Requirement

    lock = (ROOT / "tests/requirements.lock").read_text().lower()
    locked = re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if text := re.sub(r"#.*|^-r .*", "", line).strip():
                asked = Requirement(text)
                versions = [version for package, version in locked if package == asked.name.lower()]
                assert versions and all(version in asked.specifier for version in versions), text


# A Python of a given version, as far as retrain.sh can see: it makes environments of itself, and notes how it is run.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
*"import pip"*) [ ! -e no_pip ] || exit 1; exit {too_old} ;;
*version_info*) exit {too_old} ;;
--version) echo "Python {version}" ;;
*disk_usage*) [ ! -e disk_full ] ;;
*"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>calls.txt ;;
*"-m pip"*) echo pip >>calls.txt; [ ! -e pip_fails ] ;;
*) printf '%s\\n' "$@" >arguments.txt; exit 7 ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Return a function that runs the retrain.sh of `project` in `here`, on a system with just the given commands."""
    commands, project, here = tmp_path / "commands", tmp_path / "a project", tmp_path / "here"
    for folder in (commands, project, here):
        folder.mkdir()
    for name in ("sh", "dirname", "cmp", "cp", "rm", "mkdir", "printf"):
        (commands / name).symlink_to(shutil.which(name))
    shutil.copy(ROOT / "retrain.sh", project)
    shutil.copy(ROOT / "requirements.txt", project)

    def run(*arguments: str, version: str = "3.12.1", too_old: int = 0, python: str = "python3"):
        if python:
            path = commands / python
            path.write_text(FAKE_PYTHON.format(version=version, too_old=too_old))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        command = [str(project / "retrain.sh"), *arguments]
        return subprocess.run(command, cwd=here, env={"PATH": str(commands)}, capture_output=True, text=True)

    run.here, run.project = here, project
    return run


@POSIX
def test_sh_installs_once_and_again_for_other_requirements_or_after_an_interruption(start):
    def calls() -> list[str]:
        return (start.here / "calls.txt").read_text().split()

    start()
    assert start("--image_dir", "my photos", "*").returncode == 7
    assert calls() == ["venv", "pip"]
    arguments = [f"{start.project}/retrain.py", "--how_many_training_steps", "200", "--image_dir", "my photos", "*"]
    assert (start.here / "arguments.txt").read_text().splitlines() == arguments
    with open(start.project / "requirements.txt", "a") as file:
        file.write("# changed\n")
    start()
    assert calls() == ["venv", "pip"] * 2
    (start.project / ".venv/half").touch()
    (start.here / "no_pip").touch()
    start()
    assert not (start.project / ".venv/half").exists()
    assert calls() == ["venv", "pip"] * 3


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_sh_leaves_the_environment_of_another_user_alone(start):
    (start.project / ".venv/bin").mkdir(parents=True)
    os.chown(start.project / ".venv", 65534, 65534)
    failed = start()
    assert failed.returncode == 1
    assert f"retrain.sh: error: {start.project}/.venv is another user's; copy the folder" in failed.stderr
    assert (start.project / ".venv/bin").is_dir()


@POSIX
@pytest.mark.parametrize(
    ("system", "trouble", "said"),
    [
        ({"python": "python3.11"}, "", ""),
        ({"python": "python"}, "", ""),
        ({"python": ""}, "no_python", "there is no python3; install Python 3.10 to 3.13"),
        ({"version": "3.9.21", "too_old": 1}, "old", "Python 3.9.21 is too old or too new for TensorFlow"),
        ({"version": "3.14.0", "too_old": 1}, "new", "Python 3.14.0 is too old or too new for TensorFlow"),
        ({}, "pip_fails", "the packages could not be installed (see above); the next run tries again.\n"),
        ({}, "disk_full", "has less than 4 GB left, which the packages need; free some.\n"),
    ],
)
def test_sh_says_what_is_missing_and_goes_on_when_it_is_there(start, system, trouble, said):
    (start.here / trouble).touch()
    done = start(**system)
    assert done.returncode == (1 if trouble else 7)
    assert said in done.stderr and done.stderr.startswith("retrain.sh: error: " if trouble else "")
    for path in start.here.iterdir():
        path.unlink()
    assert start().returncode == 7


def test_help_and_wrong_flags_need_no_tensorflow(tmp_path):
    (tmp_path / "no").mkdir()
    (tmp_path / "no/tensorflow.py").write_text("raise AssertionError('TensorFlow was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "no")}
    done = run_script("retrain.py", "--how_many_training_steps", 200, "--help", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^  python retrain.py", done.stdout, re.MULTILINE)) == 3
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert {"--image_dir", "--output_graph"} <= flags and len(flags) <= 10
    assert "how many steps to train (200)" in " ".join(done.stdout.split())  # as retrain.sh passes them
    done = run_script("retrain.py", "--lr", "1", cwd=tmp_path, env=environment)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["no"]


def test_classic_flags_are_all_there_with_their_defaults():
    flags = vars(retrain.parse_flags([]))
    classic = "image_dir output_graph output_labels intermediate_output_graphs_dir summaries_dir model_dir "
    classic += "bottleneck_dir print_misclassified_test_images flip_left_right architecture tfhub_module "
    assert set(f"{classic} saved_model_dir logging_verbosity checkpoint_path".split()) <= set(flags)
    numbers = {"how_many_training_steps": 4000, "learning_rate": 0.01, "testing_percentage": 10}
    numbers |= {"validation_percentage": 10, "eval_step_interval": 10, "train_batch_size": 100}
    numbers |= {"test_batch_size": -1, "validation_batch_size": 100, "final_tensor_name": "final_result"}
    numbers |= {"intermediate_store_frequency": 0, "random_crop": 0, "random_scale": 0, "random_brightness": 0}
    assert {name: flags[name] for name in numbers} == numbers
    assert not any(str(value).startswith("/tmp") for value in flags.values())


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--imgae_dir x", "--imgae_dir is no flag of this command; did you mean --image_dir?"),
        (f"'{ROOT}/data'", f"is no flag of this command; did you mean --image_dir {ROOT}/data?"),
        ("--images x", "did you mean --image_dir?"),
        ("--epochs=5", "did you mean --how_many_training_steps?"),
        ("--lr 0.1", "did you mean --learning_rate?"),
        ("--batch-size 8", "did you mean --train_batch_size?"),
        ("--learning_rate fast", "argument --learning_rate: invalid number value: 'fast'"),
        ("--learning_rate inf", "argument --learning_rate: inf is out of range (0 or more)"),
        ("--how_many_training_steps 1.5", "argument --how_many_training_steps: invalid whole number value: '1.5'"),
        ("--train_batch_size -2", "argument --train_batch_size: -2 is out of range (1 or more, or -1)"),
        ("--testing_percentage 60 --validation_percentage 40", "together leave nothing to train on"),
        ("--split_file a.tsv --test_dir b", "--split_file says what every image does"),
        ("--final_tensor_name a:b", "'a:b' can't name a node"),
        ("--output_graph=", "--output_graph: it needs a name"),
        ("--summaries_dir=", "--summaries_dir: it needs a name"),
        ("--architecture mobilenet_1.0_224_quantized", "say --architecture mobilenet_1.0_224 --quantize in place of"),
        ("--crawl_only", "there is nothing to crawl without --crawl"),
        ("--ray_address ray://x:10001", "give host:port of the cluster's head"),
        ("--architecture alexnet", "argument --architecture: invalid choice: 'alexnet'"),
        ("--bottleneck_layer fc2", "only --architecture vgg16 has layers to choose from"),
        ("--tfhub_module x --architecture vgg16", "both name a base model; leave one of them out"),
        ("--flip_left_right perhaps", "'perhaps' is neither true nor false"),
        ("--head logistic --hidden_units 8", "--head logistic has neither hidden layers"),
        ("--image_dir s3://bucket/x", "an object store is read by a Ray cluster; add --ray_address"),
        ("--image_dir s3://bucket/x --ray_address auto --quantize", "and leave out --crawl, "),
        ("--help me", "invalid choice: 'me' (choose from"),
    ],
)
def test_wrong_flags_get_one_sentence(command, sentence, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        retrain.parse_flags(shlex.split(command))
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said


def test_crawled_images_do_not_go_among_the_drawn_ones():
    for more, folder in (("", "crawled"), ("--crawl_dir x", "x"), ("--image_dir data", "data")):
        assert retrain.parse_flags(["--crawl", "names.txt", *more.split()]).image_dir == folder


def test_switches_may_stand_alone_or_have_a_value():
    for words, value in (("", False), ("--batch_norm", True), ("--batch_norm=true", True), ("--batch_norm 0", False)):
        assert retrain.parse_flags(["--hidden_units", "8", *words.split()]).batch_norm is value


# The first five minutes: the wrong folder, where things lie, what is told


def test_train_and_val_are_taken_as_they_are(train, image_dir, capsys):
    for name, count in (("train", 10), ("valid", 4), ("test", 3)):
        make_image_dir(image_dir.parent / "set" / name, count)
    assert train("--image_dir", "set") == 0
    said = capsys.readouterr().out
    assert "This run uses --test_dir set/test, --image_dir set/train, --validation_dir set/valid." in said
    assert "Images: 30 to train, 12 to validate, 9 to test." in said


def test_labels_and_report_follow_the_graph(train, tmp_path, capsys):
    (tmp_path / "output_labels.txt").write_text("cats\ndogs\n")
    assert train("--output_graph", "ants.pb", "--logging_verbosity", "WARN") == 0
    assert (tmp_path / "output_labels.txt").read_text() == "cats\ndogs\n"
    assert all((tmp_path / name).exists() for name in ("ants.pb", "ants.tflite", "ants_labels.txt"))
    assert retrain.parse_flags(["--output_graph", "ants.pb"]).output_report.endswith("ants_report.html")
    assert json.loads((tmp_path / "ants.json").read_text())["labels"] == ["red things", "blue", "green"]
    assert re.fullmatch(r"Final test accuracy = [\d.]+% \(N=4\)\n", capsys.readouterr().out)  # no less is told


def test_defaults_lie_beside_the_script_and_what_is_typed_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "HOME", ROOT)
    monkeypatch.chdir(tmp_path)
    flags = vars(retrain.parse_flags(["--output_graph", "mine.pb"]))
    defaults = {"image_dir": "data", "model_dir": "inception_model", "bottleneck_dir": "bottleneck"}
    assert {name: flags[name] for name in defaults} == {name: str(ROOT / path) for name, path in defaults.items()}
    assert (flags["output_graph"], flags["output_labels"]) == ("mine.pb", "mine_labels.txt")
    assert retrain.parse_flags([]).output_labels == str(ROOT / "output_labels.txt")
    monkeypatch.chdir(ROOT)
    assert retrain.parse_flags([]).output_graph == "output_graph.pb"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--output_graph pictures/green/x.pb", "it lies in what --image_dir names"),
        ("--bottleneck_dir pictures/cache", "it lies in what --image_dir names"),
        ("--output_labels pictures", "what lies there is no file"),
    ],
)
def test_an_output_that_must_not_be_written_is_told_before_the_work(train, tmp_path, error_of, command, sentence):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sentence in error_of(*command.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@POSIX
@pytest.mark.parametrize("verbosity", ["INFO", "DEBUG"])
def test_a_run_on_a_terminal_is_quiet_and_the_log_is_whole(image_dir, model_dir, tmp_path, verbosity):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "retrain.py", "--image_dir", "pictures", "--model_dir", model_dir]
    command += ["--how_many_training_steps", "50", "--logging_verbosity", verbosity]
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.DEVNULL):
        os.close(theirs)
        said = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # the other end is closed
            while block := terminal.read(4096):
                said += block
    lines = said.decode().splitlines()
    steps = [line for line in lines if ": Step " in line]
    assert len(steps) == (0 if verbosity == "INFO" else 18)
    assert len(lines) - len(steps) <= 15
    assert lines[-1].startswith("Name images with: python3 ")
    log = (tmp_path / "retrain_logs/training.log").read_text()
    assert len(re.findall(r"Step \d+: Cross entropy", log)) == 6
    assert "Final test accuracy" in log


@POSIX
@pytest.mark.parametrize("script", ["predict.py", "retrain.py"])
def test_missing_packages_are_named_and_the_environment_of_retrain_sh_is_used(tmp_path, script):
    for name in ("retrain.py", "predict.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-S", str(tmp_path / script), "--image", "my photo.jpg"]  # a Python without packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "run retrain.sh (retrain.bat), or " in done.stderr
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\nexit 5\n')
    python.chmod(0o755)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, f"{tmp_path / script} --image my photo.jpg\n")


# The README's commands and the notebook, in a copy of the project as a clone would have it


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


@pytest.fixture
def image_search(clone) -> Iterator[str]:
    """The README's file of class names in the clone; yields the flags that let --crawl find them at a local server."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (names,) = re.findall(r"^```text\n(ants\n.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (clone / "names.txt").write_text(names)
    with CrawlServer() as server:
        for first, line in enumerate(names.splitlines()):
            server.results[line.split(": ")[-1]] = [Result("good", 1000 * first + seed) for seed in range(110)]
        yield f" --crawl_source {server.source('openverse')} --crawl_allow_private 127.0.0.1 --crawl_host_delay 0"


@POSIX
def test_every_command_of_the_readme_runs(clone, image_search):
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if line and "tests/run.sh" not in line]
    assert commands[0] == "./retrain.sh"
    assert any("predict.py" in command for command in commands)
    for command in commands:
        if "--crawl " in command:
            command += image_search
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
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    tables = [data["text/html"] for data in outputs if "<img src='data:image/png" in data.get("text/html", "")]
    labels = (clone / "output_labels.txt").read_text("utf-8").splitlines()
    assert len(tables) == 10  # of test_images
    assert all(f"<td>{label}</td>" in table for table in tables for label in labels)


@POSIX
def test_the_one_command_works_offline(clone, tmp_path):
    """No network, from another folder: EfficientNet-Lite2 stands in, a line at the end says so, and it learns."""
    shutil.move(clone / "inception_model/classify_image_graph_def.pb", clone / "elsewhere.pb")
    try:
        proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}
        offline = {name: value for name, value in os.environ.items() if name != "RETRAIN_HOME"} | proxy
        command = [clone / "retrain.sh", "--random_seed", "0", "--bottleneck_dir", clone / "offline"]
        done = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    finally:
        shutil.move(clone / "elsewhere.pb", clone / "inception_model/classify_image_graph_def.pb")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert any(line.startswith("WARNING: The base model is EfficientNet-Lite2") for line in done.stderr.splitlines())
    assert float(re.search(r"Final test accuracy = ([\d.]+)%", done.stdout).group(1)) >= 90
    command = [sys.executable, "predict.py", "--image", "test_images", "--json", "named.json"]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    named = json.loads((clone / "named.json").read_text("utf-8"))
    right = [Path(entry["image"]).name.startswith(entry["predictions"][0]["label"]) for entry in named]
    assert len(right) == 10 and sum(right) >= 8
