#!/usr/bin/env python3
"""Try to break retrain.py and predict.py, and print a table of what was tried and what was lost.

    python tests/torture.py [--minutes 15] [--seed 0] [--share 1] [SECTION ...]

Sections: images, death, full_disk, two_at_once, hostile, many. Each is bounded and drawn from the seed; --share 0.05
tries a twentieth of it. "Lost" counts whatever is not as promised: a crash, a hang, a traceback, a file that is neither
used nor named, a feature or an output that differs from that of a run in peace, a leftover, an image of the user's that
was touched. The exit code is 1 if something was lost.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import io
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import PIL.Image
from conftest import COLOURS, ROOT, make_graph, make_image, make_image_dir, run_script

import predict
import retrain

HANGING = 240  # seconds after which a run is taken for one that hangs
FLAGS = ("--architecture", "inception_v3", "--random_seed", 1, "--how_many_training_steps", 1000)
FLAGS += ("--eval_step_interval", 50, "--intermediate_store_frequency", 100)


class Torture:
    """The bench: where and how much is tried, until when, with which base model, and what was lost so far."""

    patience = 3  # seconds within which a run is to end that was asked to

    def __init__(self, folder: Path, seed: int = 0, share: float = 1, minutes: float = 15, model_dir: str = ""):
        self.folder, self.seed, self.share, self.section = folder, seed, share, ""
        self.deadline, self.tried, self.lost = time.monotonic() + 60 * minutes, 0, []
        self.model_dir = model_dir or make_graph(folder / "model/classify_image_graph_def.pb").parent

    def count(self, full: int) -> int:
        """Return how often something is tried that is tried `full` times in the full program."""
        return max(1, round(full * self.share))

    def each(self, judge: Callable, items: Iterable) -> list:
        """Judge items side by side until the time is up; return what `judge` says of those that it came to."""
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda item: [judge(item)] if time.monotonic() < self.deadline else [], items)
            return [result for results in found for result in results]

    def random(self, what: str) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    def note(self, what: str, tried: int, lost: Iterable[str], figures: str = "") -> None:
        """Print a row of the table, with the first losses (empty ones are none)."""
        lost = [loss for loss in lost if loss]
        print(f"| {self.section} | {what} | {tried:,} | {len(lost)} | {figures} |", flush=True)
        for loss in lost[:5]:
            print(f"    lost: {loss}", file=sys.stderr, flush=True)
        self.tried += tried
        self.lost += lost

    def place(self, name: str) -> Path:
        """Return a new folder to work in."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def start(self, cwd: Path, *flags, before: tuple = (), **options) -> subprocess.Popen:
        """Start retrain.py on cwd/images and the stub base model; `before` is a command that starts it."""
        usual = ["--image_dir", "images", "--model_dir", self.model_dir, *FLAGS]
        command = [*before, sys.executable, ROOT / "retrain.py", *usual, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | options
        return subprocess.Popen([str(word) for word in command], cwd=cwd, errors="replace", **pipes)

    def train(self, cwd: Path, *flags, **options) -> subprocess.CompletedProcess:
        """Run retrain.py likewise to its end."""
        return ended(self.start(cwd, *flags, **options))


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process; one that hangs is killed, and its exit code is told as 'hangs'."""
    with process:
        try:
            out, err = process.communicate(timeout=HANGING)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)
        except subprocess.TimeoutExpired:
            process.kill()
            return subprocess.CompletedProcess(process.args, "hangs", *process.communicate())


def complaint(done: subprocess.CompletedProcess, codes: tuple = (0,)) -> str:
    """Return what is not as promised about how a process ended, or ''."""
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode not in codes:
        return f"exit code {done.returncode}, where {codes} is expected: {last[0]}"
    if "Traceback" in done.stderr or "Fatal Python" in done.stderr:
        return f"a traceback: {last[0]}"
    if done.returncode in (1, 2) and not re.fullmatch(r"(retrain|predict)\.py: error: .*[.)]", last[0]):
        return f"no sentence: {last[0]!r}"
    return ""


def fingerprints(folder: Path) -> dict[Path, tuple]:
    """Return what shows whether files of the user's were touched: time of change and content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files in a folder."""
    return [str(path) for path in folder.rglob(".retrain-*")]


def outputs(cwd: Path) -> dict[str, object]:
    """Return all that a run has written, but for what tells times: to be compared with another run's."""
    found: dict[str, object] = {}
    for path in sorted(path for path in cwd.rglob("*") if path.is_file() and not path.name.startswith(".retrain-")):
        name = str(path.relative_to(cwd))
        if "tfevents" in name or path.suffix == ".html":  # they hold times, and some have them in their names, too
            found[str(path.parent.relative_to(cwd) / path.suffix)] = path.stat().st_size
        elif path.suffix == ".jsonl":  # the order is that in which threads were ready; half a line is that of a kill
            found[name] = set(map(str, retrain.read_journal(path)))
        elif path.suffix != ".log" and not name.startswith("images"):
            found[name] = path.read_bytes()
    return found


def differences(one: dict, other: dict) -> str:
    """Return the names of what differs, or ''."""
    return ", ".join(name for name in sorted({*one, *other}) if one.get(name) != other.get(name))


def seed_images() -> dict[str, bytes]:
    """Return whole images of every format and kind, by their names."""
    image, other = (make_image(colour, 7, (90, 70)) for colour in list(COLOURS.values())[:2])
    deep = PIL.Image.fromarray((np.asarray(image.convert("L"), np.uint16) << 8) + 77)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [other] * 5}
    files: dict[str, io.BytesIO] = {}

    def add(name: str, image: PIL.Image.Image, **options) -> None:
        files[name] = io.BytesIO()
        image.save(files[name], PIL.Image.registered_extensions()[Path(name).suffix], **options)

    add("plain.jpg", image, quality=92)
    add("progressive.jpg", image, progressive=True)
    add("grey.jpg", image.convert("L"))
    add("cmyk.jpg", image.convert("CMYK"))
    add("turned.jpg", image, exif=turned.tobytes())
    add("plain.png", image)
    add("alpha.png", image.convert("RGBA"))
    add("palette.png", image.convert("P"))
    add("16 bits.png", deep)
    add("animated.gif", image, **frames)
    add("plain.bmp", image)
    add("lossless.webp", image, lossless=True)
    add("animated.webp", image, **frames)
    add("1x1.jpg", image.resize((1, 1)))
    add("1x20000.png", image.resize((1, 20_000)))
    return {name: file.getvalue() for name, file in files.items()}


def damaged(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return the bytes of an image, damaged in one of several ways; `other` is another image's."""
    found, at, size = bytearray(data), chance.randrange(len(data)), chance.randint(1, 100)
    kind = chance.randrange(7)
    if kind < 2:  # bits, of the headers with their EXIF blocks or of all
        for _ in range(chance.randint(1, 8)):
            found[chance.randrange(min(len(found), 160) if kind else len(found))] ^= 1 << chance.randrange(8)
    elif kind == 2:  # cut off
        del found[at:]
    elif kind == 3:  # spliced
        found[at:] = other[chance.randrange(len(other)) :]
    elif kind == 4:  # another's header
        found[:size] = other[:size]
    elif kind == 5:  # a piece lost, or there twice
        found[at : at + size] = found[at : at + size] * (2 * chance.randrange(2))
    else:
        found[at : at + size] = chance.randbytes(size)
    return bytes(found)


def write_images(folder: Path, count: int, chance: random.Random) -> list[Path]:
    """Write the whole images and so many damaged ones, whose names begin with a digit, into two class folders."""
    seeds = seed_images()
    for label in ("one", "two"):
        (folder / label).mkdir(parents=True)
        for name, data in seeds.items():
            (folder / label / f"good {name}").write_bytes(data)
    for i in range(count):
        name, other = chance.choice(list(seeds)), chance.choice(list(seeds))
        ending = Path(chance.choice([name, name, other, "x.txt", "x", "x.tar.gz"])).suffix
        (folder / ("one", "two")[i % 2] / f"{i:05}{ending}").write_bytes(damaged(seeds[name], seeds[other], chance))
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Reads images; prints the seconds that each takes, and the peak of memory in MB (getrusage tells our own, if higher).
READ = """
import contextlib, re, sys, time, predict
for path in sys.stdin.read().splitlines():
    began = time.monotonic()
    with contextlib.suppress(predict.ImageError):
        predict.resize_bilinear(predict.read_image(predict.Path(path), predict.Reading(), (299, 299)), (299, 299))
    print(time.monotonic() - began, re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1][:-3] or 0)
"""


def read_apart(paths: list[Path]) -> tuple[float, int, list[str]]:
    """Read images in a process; return the seconds of the slowest, the MB it took after the first, and any losses."""
    names = "\n".join(map(str, paths))
    done = subprocess.run([sys.executable, "-c", READ], input=names, cwd=ROOT, capture_output=True, text=True)
    rows = [[float(figure) for figure in line.split()] for line in done.stdout.splitlines()] or [[0, 0]]
    seconds, megabytes = max(row[0] for row in rows), int(rows[-1][1] - rows[0][1])
    lost = [complaint(done), f"{paths[-1].name}: {seconds:.1f} s" if seconds > 10 else ""]
    return seconds, megabytes, lost


def images_in_training(t: Torture, cwd: Path, paths: list[Path]) -> None:
    """Train on all in one go: each is used or named; the whole ones get the features that they get alone."""
    before, done = fingerprints(cwd / "images"), t.train(cwd)
    written = outputs(cwd)
    lines = written.get("bottleneck/skipped_inception_v3.tsv", b"").decode().splitlines()
    named = {Path(line.split("\t")[0]).name for line in lines if line.split("\t")[1]}
    used = {Path(name).name.removesuffix("_inception_v3.txt") for name in written if name.startswith("bottleneck/")}
    lost = [complaint(done), *leftovers(cwd)]
    lost += ["images were touched"] if fingerprints(cwd / "images") != before else []
    lost += [path.name for path in paths if (path.name in used) == (path.name in named)]
    t.note("damaged images in one training", len(paths), lost, f"{len(paths) - len(named)} used, {len(named)} named")
    alone = t.place("alone")
    shutil.copytree(cwd / "images", alone / "images", ignore=shutil.ignore_patterns("[0-9]*"))
    lost = [complaint(t.train(alone))]
    features = {name: data for name, data in outputs(alone).items() if name.endswith("_inception_v3.txt")}
    lost += [name for name, data in features.items() if written.get(name) != data]
    t.note("whole images among them: the features that they get alone", len(features), lost)


def images_in_predict(t: Torture, cwd: Path, paths: list[Path]) -> None:
    """Name all in one go: each gets a label or a reason."""
    done = run_script("predict.py", "--image", "images", "--csv", "names.csv", cwd=cwd)
    with open(cwd / "names.csv", encoding="utf-8-sig", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    lost = [f"exit code {done.returncode}"] if done.returncode not in (0, 1) or "Traceback" in done.stderr else []
    lost += [path.name for path in paths if str(path.relative_to(cwd)) not in rows]
    lost += [name for name, row in rows.items() if bool(row["label"]) == bool(row["error"])]
    named = sum(bool(row["label"]) for row in rows.values())
    t.note("the same through predict.py", len(paths), lost, f"{named} named, {len(rows) - named} told with a reason")


def write_bombs(folder: Path) -> list[Path]:
    """Write images that would fill the memory: 2.5 gigapixels, and a gigabyte behind a good beginning."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(50_000 * (1 + 50_000 // 8)), 1))
    (folder / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with open(folder / "long.jpg", "wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(1 << 30)
    return sorted(folder.iterdir())


def images(t: Torture) -> None:
    """Damaged images through training and predict.py; bombs."""
    cwd = t.place("images")
    paths = write_images(cwd / "images", t.count(2000), t.random("images"))
    seconds, _, lost = read_apart(paths)
    t.note("each read by itself, in 10 s at most", len(paths), lost, f"slowest {seconds:.2f} s")
    images_in_training(t, cwd, paths)
    images_in_predict(t, cwd, paths)
    most, losses = 0, []
    for bomb in (bombs := write_bombs(t.place("bombs"))):
        _, megabytes, lost = read_apart([cwd / "images/one/good plain.jpg", bomb])
        most, losses = max(most, megabytes), [*losses, *lost, f"{bomb}: {megabytes} MB" if megabytes >= 200 else ""]
    t.note("bombs, under 200 MB each", len(bombs), losses, f"most {most} MB")


# What a run has printed when a stretch of it begins, so that signals fall on all of them. (While Python starts and
# imports, they are Python's.)
STRETCHES = {"extraction": "Bottlenecks:", "training": "Step 0: Cross", "export": "Final test"}


class Lives:
    """Runs that are struck at a random moment, one folder each; and one in peace, to compare them with."""

    def __init__(self, t: Torture):
        self.t, self.images = t, make_image_dir(t.place("death") / "images", 60)
        cwd, began = self.cwd(), {}
        process = t.start(cwd)
        for line in process.stdout:
            began |= {name: time.monotonic() for name, mark in STRETCHES.items() if mark in line and name not in began}
        t.note("an undisturbed run", 1, [complaint(ended(process))])
        ends = [*began.values(), time.monotonic()][1:]
        self.spans = {name: end - start for (name, start), end in zip(began.items(), ends, strict=True)}
        self.expected = outputs(cwd)

    def cwd(self) -> Path:
        """Return a new working folder with the images in it."""
        cwd = self.t.place("life")
        (cwd / "images").symlink_to(self.images)
        return cwd

    def strike(self, what: str, number: int) -> tuple[Path, subprocess.CompletedProcess, float, str]:
        """Start a run and send it a signal; return its folder, how it ended, after how many seconds, and where."""
        chance, cwd = self.t.random(f"{what} {number}"), self.cwd()
        stretch = list(self.spans)[number % len(self.spans)]
        process = self.t.start(cwd)
        for line in process.stdout:
            if STRETCHES[stretch] in line:
                break
        time.sleep(chance.uniform(0, self.spans[stretch]))
        process.send_signal(getattr(signal, what))
        struck = time.monotonic()
        return cwd, ended(process), time.monotonic() - struck, stretch


def struck(t: Torture, lives: Lives, name: str, code: int, count: int) -> None:
    """A signal at random moments: a prompt end, in one line if there can be any; then the same command goes well."""

    def judge(number: int) -> tuple[float, str]:
        cwd, done, seconds, stretch = lives.strike(name, number)
        lost = complaint(done, (0, code)) or ("" if seconds <= t.patience else f"{seconds:.1f} s")
        if done.returncode == code > 0:
            usual = ("Bottlenecks:", "WARNING:")
            lines = [line for line in done.stderr.splitlines() if line and not line.startswith(usual)]
            told = len(lines) == 1 and "retrain.py: stopped" in lines[0]
            lost = lost or ("" if told else f"said {lines}") or ", ".join(leftovers(cwd))
        lost = lost or complaint(t.train(cwd)) or differences(outputs(cwd), lives.expected)
        shutil.rmtree(cwd)
        return seconds * (done.returncode == code), lost and f"in {stretch}: {lost}"

    results = t.each(judge, range(count))
    ends = [seconds for seconds, _ in results if seconds] or [0]
    figures = f"{len(ends)} before their end, slowest {max(ends):.2f} s"
    t.note(f"{name}, exit code {code}, then the same command", len(results), [lost for _, lost in results], figures)


def death(t: Torture, lives: Lives | None = None) -> None:
    """SIGKILL, SIGINT and SIGTERM at random moments, each followed by the same command: outputs as in peace."""
    lives = lives or Lives(t)
    for name, code, count in (("SIGKILL", -signal.SIGKILL, 100), ("SIGINT", 130, 50), ("SIGTERM", 130, 50)):
        struck(t, lives, name, code, t.count(count))


def full_disk(t: Torture) -> None:
    """No file may grow beyond a limit, as on a full disk: a sentence, then a plain rerun goes well."""
    if not shutil.which("prlimit"):
        return t.note("no file of more than so many bytes", 0, [], "skipped: it needs prlimit")
    source, well = make_image_dir(t.place("source") / "images", 10), t.place("well")
    (well / "images").symlink_to(source)
    t.train(well)
    expected = outputs(well)
    sizes = {path.stat().st_size for path in well.rglob("*") if path.is_file()}
    limits = sorted({0, 1, 50, *(size - 1 for size in sizes)})
    limits = limits if t.share == 1 else t.random("limits").sample(limits, t.count(len(limits)))

    def attempt(limit: int) -> str:
        cwd = t.place("limit")
        (cwd / "images").symlink_to(source)
        failed = t.train(cwd, before=("prlimit", f"--fsize={limit}:{limit}"))
        lost = complaint(failed, (0, 1)) or ", ".join(leftovers(cwd))
        lost = lost or complaint(t.train(cwd)) or differences(outputs(cwd), expected)
        shutil.rmtree(cwd)
        return lost and f"{limit} bytes: {lost}"

    found = t.each(attempt, limits)
    t.note("no file of more than so many bytes, then the same command", len(limits), found)


def two_at_once(t: Torture, lives: Lives | None = None) -> None:
    """Two and four runs at once on one bottleneck folder: each gives what it gives alone."""
    lives = lives or Lives(t)
    alone = {name: data for name, data in lives.expected.items() if not name.startswith("bottleneck")}
    wanted = {Path(name).name: data for name, data in lives.expected.items() if name.endswith("v3.txt")}
    for count in (2, 4) if t.share == 1 else (2,):
        shared, folders = t.place("shared"), [lives.cwd() for _ in range(count)]
        runs = [t.start(cwd, "--bottleneck_dir", shared) for cwd in folders]
        lost = [complaint(ended(run)) for run in runs]
        lost += [differences(outputs(cwd), alone) for cwd in folders]
        lost += [differences({path.name: path.read_bytes() for path in shared.rglob("*v3.txt")}, wanted)]
        t.note(f"{count} runs at once on one bottleneck folder", count, lost + leftovers(shared))


def hostile(t: Torture) -> None:
    """Every operation of TensorFlow that is not on the list, in a graph and in a function of one."""
    tf = predict.import_tensorflow()
    from tensorflow.core.framework import op_def_pb2
    from tensorflow.python.client import pywrap_tf_session

    known = op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList()))
    names = [op.name for op in known.op if op.name not in predict.PURE_OPS.split()] + ["CustomOp"]
    if t.share < 1:
        names = t.random("ops").sample(names, t.count(len(names))) + ["ReadFile", "PyFunc"]
    path, lost = t.place("graphs") / "graph.pb", []
    for name in names:
        for in_function in (False, True):
            graph = tf.compat.v1.GraphDef()
            graph.node.add(op="Const", name="one")
            (graph.library.function.add().node_def if in_function else graph.node).add(op=name, name="odd")
            path.write_bytes(graph.SerializeToString())
            try:
                predict.read_graph(path)
                lost.append(name)
            except predict.UserError as error:
                lost += [] if f"'odd' is a {name}," in str(error) else [f"{name}: {error}"]
    t.note("graphs with an operation that is not on the list", 2 * len(names), lost)


def measured(t: Torture, cwd: Path) -> tuple[float, int, str]:
    """Run a training; return its processor seconds (a clock counts what else goes on), its MB at most, and any loss."""
    with open(cwd / "stderr.txt", "w+") as said:
        process = t.start(cwd, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        loss = complaint(subprocess.CompletedProcess([], process.returncode, "", said.read()))
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024, loss


def many(t: Torture) -> None:
    """Many images, hard links to a few, and many classes: memory, and that the last cost no more than the first."""
    originals = sorted(make_image_dir(t.place("few") / "originals", 100).rglob("*.jpg"))
    count, costs = t.count(100_000), []
    for images, classes in ((count // 10, 10), (count, 10), (count // 10, t.count(1000))):
        cwd = t.place("many")
        for i in range(images):
            place = cwd / f"images/class {i % classes}/{i}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(originals[i % len(originals)], place)
        seconds, megabytes, loss = measured(t, cwd)
        costs.append(seconds)
        again, _, loss_again = measured(t, cwd)
        losses = [loss, loss_again, *leftovers(cwd), f"{megabytes} MB" if megabytes > 1800 else ""]
        figures = f"{seconds:.0f} s of processors, {megabytes} MB; a second run takes {again:.0f} s"
        t.note(f"{images:,} images of {classes:,} classes", images, losses, figures)
        shutil.rmtree(cwd)
    losses = [f"{costs[1] / costs[0]:.1f} times"] if costs[1] > 12 * costs[0] else []
    t.note("ten times as many take twelve times as long at most", 1, losses, f"{costs[1] / costs[0]:.1f} times")


SECTIONS = {function.__name__: function for function in (images, death, full_disk, two_at_once, hostile, many)}


def main(arguments: list[str] | None = None) -> int:
    """Go through the sections that were asked for, and print the table; return 1 if something was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1)
    parser.add_argument("--folder", help="where to work (a new one in the system's folder of temporary files)")
    flags = parser.parse_args(arguments)
    if wrong := [name for name in flags.sections if name not in SECTIONS]:
        parser.error(f"{wrong[0]!r} is no section")
    with tempfile.TemporaryDirectory(prefix="torture-", dir=flags.folder, ignore_cleanup_errors=True) as folder:
        bench = Torture(Path(folder), flags.seed, flags.share, flags.minutes)
        print("| section | tried | times | lost | figures |\n| --- | --- | --- | --- | --- |")
        for name in flags.sections or SECTIONS:
            bench.section = name
            if time.monotonic() > bench.deadline:
                bench.note("the section", 0, [], "skipped: the time is up")
            else:
                SECTIONS[name](bench)
    print(f"\n{bench.tried:,} tried, {len(bench.lost)} lost.")
    return int(bool(bench.lost))


if __name__ == "__main__":
    sys.exit(main())
