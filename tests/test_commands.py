"""The commands as users type them: the launchers, --help and every flag, the first five minutes, the README."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, make_image_dir, run_script
from crawl_server import CrawlServer, Result

import retrain

POSIX = pytest.mark.skipif(os.name == "nt", reason="retrain.sh is for POSIX systems")


def test_sh_and_bat_pass_the_number_of_steps_and_no_more():
    for name, rest in (("retrain.sh", '"$@"'), ("retrain.bat", "%*")):
        (passed,) = re.findall(r'retrain\.py" (--.*)', (ROOT / name).read_text())
        assert passed == f"--how_many_training_steps 200 {rest}"


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
    for name in ("retrain.sh", "requirements.txt"):
        shutil.copy(ROOT / name, project)

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
def test_sh_installs_once_and_again_when_the_requirements_change(start):
    def calls() -> list[str]:
        return (start.here / "calls.txt").read_text().split()

    assert start().returncode == 7
    assert calls() == ["venv", "pip"]
    start()
    assert calls() == ["venv", "pip"]
    with open(start.project / "requirements.txt", "a") as file:
        file.write("# changed\n")
    start()
    assert calls() == ["venv", "pip", "venv", "pip"]


@POSIX
def test_sh_passes_the_users_arguments_and_stays_where_the_user_is(start):
    start("--image_dir", "my photos", "*")
    arguments = (start.here / "arguments.txt").read_text().splitlines()
    expected = [str(start.project / "retrain.py"), "--how_many_training_steps", "200", "--image_dir", "my photos", "*"]
    assert arguments == expected


@POSIX
@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ("pip_fails", "the packages could not be installed (see above); the next run tries again."),
        ("disk_full", "has less than 4 GB left, which the packages need; free some."),
    ],
)
def test_sh_tries_again_after_a_failed_installation(start, trouble, sentence):
    (start.here / trouble).touch()
    failed = start()
    assert failed.returncode == 1
    assert failed.stderr.startswith("retrain.sh: error: ") and failed.stderr.endswith(f"{sentence}\n")
    (start.here / trouble).unlink()
    assert start().returncode == 7


@POSIX
def test_sh_makes_an_interrupted_environment_anew(start):
    start()
    (start.project / ".venv/half").touch()
    (start.here / "no_pip").touch()
    start()
    assert not (start.project / ".venv/half").exists()
    assert (start.here / "calls.txt").read_text().split() == ["venv", "pip"] * 2


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can give files away")
def test_sh_leaves_the_environment_of_another_user_alone(start):
    (start.project / ".venv/bin").mkdir(parents=True)
    os.chown(start.project / ".venv", 65534, 65534)
    failed = start()
    assert failed.returncode == 1
    assert f"retrain.sh: error: {start.project}/.venv is another user's; copy the folder" in failed.stderr
    assert (start.project / ".venv/bin").is_dir()


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
@pytest.mark.parametrize("version", ["3.9.21", "3.14.0"])
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


def test_help_shows_examples_and_at_most_ten_flags_of_every_day(tmp_path, no_tensorflow):
    done = run_script("retrain.py", "--how_many_training_steps", 200, "--help", cwd=tmp_path, env=no_tensorflow)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^  python retrain.py", done.stdout, re.MULTILINE)) == 3
    flags = set(re.findall(r"^  (--\w+)", done.stdout, re.MULTILINE))
    assert {"--image_dir", "--output_graph"} <= flags and len(flags) <= 10
    assert "how many steps to train (200)" in " ".join(done.stdout.split())  # as retrain.sh passes them
    assert "BOOL" not in done.stdout


def test_help_all_describes_every_flag_and_the_readme_names_no_other(capsys):
    with pytest.raises(SystemExit) as ended:
        retrain.parse_flags(["--help", "all"])
    said = capsys.readouterr().out
    flags = {f"--{name}" for name in vars(retrain.parse_flags([]))}
    assert ended.value.code == 0
    assert set(re.findall(r"^  (--\w+)", said, re.MULTILINE)) == flags
    assert "how many steps to train (4000)" in " ".join(said.split())
    readme = (ROOT / "README.md").read_text("utf-8")
    predicts = {f"--{name}" for name in ("top_k", "sort_into", "cpu_threads")}  # of predict.py
    assert set(re.findall(r"(?<![-\w])--[a-z]+(?:_[a-z]+)+", readme)) <= flags | predicts


CLASSIC_FLAGS = (
    "image_dir output_graph output_labels intermediate_output_graphs_dir intermediate_store_frequency summaries_dir "
    "how_many_training_steps learning_rate testing_percentage validation_percentage eval_step_interval "
    "train_batch_size test_batch_size validation_batch_size print_misclassified_test_images model_dir bottleneck_dir "
    "final_tensor_name flip_left_right random_crop random_scale random_brightness architecture tfhub_module "
    "saved_model_dir logging_verbosity checkpoint_path"
)


def test_classic_flags_are_all_there_with_their_defaults():
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
        ([str(ROOT / "data")], f"is no flag of this command; did you mean --image_dir {ROOT / 'data'}?"),
        (["--images", "x"], "did you mean --image_dir?"),
        (["--epochs=5"], "did you mean --how_many_training_steps?"),
        (["--lr", "0.1"], "did you mean --learning_rate?"),
        (["--batch-size", "8"], "did you mean --train_batch_size?"),
        (["--learning_rate", "fast"], "argument --learning_rate: 'fast' is no number"),
        (["--learning_rate", "inf"], "argument --learning_rate: inf is out of range (0 or more)"),
        (["--how_many_training_steps", "1.5"], "argument --how_many_training_steps: '1.5' is no whole number"),
        (["--train_batch_size", "-2"], "argument --train_batch_size: -2 is out of range (1 or more, or -1)"),
        (["--testing_percentage", "60", "--validation_percentage", "40"], "together leave nothing to train on"),
        (["--architecture", "alexnet"], "'alexnet' is not known"),
        (["--tfhub_module", "x", "--architecture", "vgg16"], "both name a base model; leave one of them out"),
        (["--flip_left_right", "perhaps"], "'perhaps' is neither true nor false"),
        (["--final_tensor_name", "a b"], "'a b' can't name a node"),
        (["--head", "logistic", "--hidden_units", "8"], "--head logistic has neither hidden layers"),
        (["--output_report", "x.png"], "'x.png' does not end in .html"),
        (["--output_graph", ""], "--output_graph: it needs a name"),
        (["--help", "me"], "write --help, or --help all"),
    ],
)
def test_wrong_flags_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        retrain.parse_flags(arguments)
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert sentence in said


def test_flag_errors_need_no_tensorflow(tmp_path, no_tensorflow):
    done = run_script("retrain.py", "--lr", "1", cwd=tmp_path, env=no_tensorflow)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_crawled_images_do_not_go_among_the_drawn_ones():
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
    assert retrain.parse_flags(words).flip_left_right is value


# ----------------------------------------------------------------------------------------------------------------------
# The first five minutes: the wrong folder, where things lie, what is told
# ----------------------------------------------------------------------------------------------------------------------


def error_of(train, capsys, *flags) -> str:
    """Return the one sentence that a run ends with."""
    assert train(*flags, "--logging_verbosity", "ERROR") == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_train_and_val_are_taken_as_they_are(train, image_dir, capsys):
    for name, count in (("train", 10), ("valid", 4), ("test", 3)):
        make_image_dir(image_dir.parent / "set" / name, count)
    assert train("--image_dir", "set", "--no_report") == 0
    said = capsys.readouterr().out
    assert "This run trains on set/train, validates on set/valid, tests on set/test." in said
    assert "Images: 30 to train, 12 to validate, 9 to test." in said


def test_an_archive_is_to_be_unpacked(train, tmp_path, capsys):
    zipfile.ZipFile(tmp_path / "photos.zip", "w").close()
    assert "--image_dir photos.zip: it is an archive; unpack it" in error_of(train, capsys, "--image_dir", "photos.zip")


def test_the_folder_of_one_class_names_the_one_above(train, image_dir, capsys):
    said = error_of(train, capsys, "--image_dir", "pictures/green")
    assert f"If it is the folder of one class, name the folder above it ({image_dir})" in said


def test_one_class_is_not_enough(train, image_dir, capsys):
    for name in ("green", "blue"):
        shutil.rmtree(image_dir / name)
    assert "it holds one class only, 'red things'; a classifier needs two or more." in error_of(train, capsys)


def test_labels_and_report_follow_the_graph(train, tmp_path):
    (tmp_path / "output_labels.txt").write_text("cats\ndogs\n")
    assert train("--output_graph", "ants.pb") == 0
    assert (tmp_path / "output_labels.txt").read_text() == "cats\ndogs\n"
    made = {path.name for path in tmp_path.iterdir()}
    assert {"ants.pb", "ants.tflite", "ants.json", "ants_labels.txt"} <= made
    assert retrain.parse_flags(["--output_graph", "ants.pb"]).output_report.endswith("ants_report.html")
    assert json.loads((tmp_path / "ants.json").read_text())["labels"] == ["red things", "blue", "green"]


def test_defaults_lie_beside_the_script_and_what_is_typed_where_the_user_is(tmp_path, monkeypatch):
    import predict

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
    ("flags", "sentence"),
    [
        (("--output_graph", "pictures/green/x.pb"), "lies among the images of --image_dir"),
        (("--bottleneck_dir", "pictures/cache"), "lies among the images of --image_dir"),
        (("--output_labels", "pictures"), "a folder of that name lies there"),
        (("--output_graph", "x.pb", "--no_report=false", "--output_report", "x.html"), "would both write x.json"),
        (("--exclude", "x.txt", "--output_labels", "x.txt"), "would replace x.txt, which --exclude reads"),
    ],
)
def test_outputs_that_cannot_be_written_are_told_before_the_work(train, tmp_path, capsys, flags, sentence):
    assert sentence in error_of(train, capsys, *flags)
    assert not (tmp_path / "bottleneck").exists()


def test_warn_still_prints_the_final_accuracy(train, capsys):
    assert train("--logging_verbosity", "WARN") == 0
    assert re.fullmatch(r"Final test accuracy = [\d.]+% \(N=4\)\n", capsys.readouterr().out)


@POSIX
@pytest.mark.parametrize("verbosity", ["INFO", "DEBUG"])
def test_a_run_on_a_terminal_is_quiet_and_the_log_is_whole(image_dir, model_dir, tmp_path, verbosity):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, ROOT / "retrain.py", "--image_dir", "pictures", "--model_dir", model_dir]
    command += ["--how_many_training_steps", "50", "--logging_verbosity", verbosity]
    with subprocess.Popen(command, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        process.communicate()
    os.close(ours)
    lines = said.decode().splitlines()
    steps = [line for line in lines if ": Step " in line]
    assert len(steps) == (0 if verbosity == "INFO" else 18)
    assert len(lines) - len(steps) <= 14
    assert lines[-1].startswith("Name images with: python3 ")
    log = (tmp_path / "retrain_logs/training.log").read_text()
    assert len(re.findall(r"Step \d+: Cross entropy", log)) == 6
    assert "Final test accuracy" in log


@pytest.fixture
def bare_python(tmp_path):
    """Return a function that runs one of the scripts, copied to a folder, with a Python that has no packages."""
    for name in ("retrain.py", "predict.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments: str, script: str = "predict.py") -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", str(tmp_path / script), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("script", ["predict.py", "retrain.py"])
def test_missing_packages_are_named_in_a_sentence(bare_python, script):
    done = bare_python(script=script)
    assert done.returncode == 1
    assert "run retrain.sh (retrain.bat), which installs what is needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@POSIX
def test_the_environment_that_retrain_sh_made_is_used(bare_python, tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\nexit 5\n')
    python.chmod(0o755)
    done = bare_python("--image", "my photo.jpg")
    assert (done.returncode, done.stdout) == (5, f"{tmp_path / 'predict.py'} --image my photo.jpg\n")


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
def image_search(clone) -> Iterator[str]:
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
def test_every_command_of_the_readme_runs(clone, image_search):
    commands = readme_commands()
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
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    shown = [html for html in shown if "<img src='data:image/png" in html]  # the last cell shows the report
    pictures = [path for path in (ROOT / "test_images").iterdir() if not path.name.startswith(".")]
    labels = (clone / "output_labels.txt").read_text("utf-8").split("\n")[:-1]
    assert len(shown) == len(pictures) == 10
    for html in shown:
        assert "<img src='data:image/png;base64," in html
        assert all(f"<td>{label}</td>" in html for label in labels)


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
    assert done.stderr.splitlines()[-1].startswith("WARNING: The base model is EfficientNet-Lite2")
    assert float(re.search(r"Final test accuracy = ([\d.]+)%", done.stdout).group(1)) >= 90
    command = [sys.executable, "predict.py", "--image", "test_images", "--json", "named.json"]
    named = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert named.returncode == 0, named.stderr
    entries = json.loads((clone / "named.json").read_text("utf-8"))
    right = [Path(entry["image"]).name.startswith(entry["predictions"][0]["label"]) for entry in entries]
    assert len(right) == 10
    assert sum(right) >= 8
