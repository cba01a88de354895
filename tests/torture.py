#!/usr/bin/env python3
"""Try to break retrain.py and predict.py, and print a table of what was tried and what was lost.

    python tests/torture.py [--minutes 15] [--seed 0] [--share 1] [SECTION ...]

Sections: pictures, death, forbidden, hostile, many, install (which is run only if it is named). Each is bounded and
drawn from the seed; --share 0.05 tries a twentieth of it. "Lost" counts whatever is not as promised: a crash, a hang, a
traceback, a file that is neither used nor named, a feature or an output that differs, a leftover, a file of the user's
that was touched. The exit code is 1 if something was lost. What it needs and the machine lacks is skipped, and told.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from conftest import COLOURS, ROOT, make_graph, make_image_dir, picture

import predict
import retrain

# A run that takes so many seconds is taken for one that hangs.
HANGING = 240


@dataclasses.dataclass
class Row:
    """A line of the table: what was tried how often, what was lost, and a figure or two."""

    section: str
    what: str
    tried: int
    lost: list[str]
    figures: str = ""

    def __str__(self) -> str:
        return f"| {self.section} | {self.what} | {self.tried:,} | {len(self.lost)} | {self.figures} |"


class Torture:
    """The bench: a folder to work in, a seed, the share of the full program, a deadline, and the rows so far.

    patience: seconds within which a run is to end that was asked to.
    """

    def __init__(self, folder: Path, seed: int = 0, share: float = 1, minutes: float = 15, patience: float = 3):
        self.folder, self.seed, self.share, self.patience = folder, seed, share, patience
        self.deadline, self.rows, self.section = time.monotonic() + 60 * minutes, [], ""
        self.model_dir = make_graph(folder / "model" / retrain.GRAPH_FILE).parent

    def count(self, full: int) -> int:
        """Return how often something is tried that is tried `full` times in the full program."""
        return max(2, round(full * self.share))

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def each(self, judge: Callable, items: Iterable, workers: int = os.cpu_count() or 1) -> list:
        """Judge items side by side until the time is up; return what `judge` says of those that it came to."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return [found[0] for found in pool.map(lambda item: () if self.late() else (judge(item),), items) if found]

    def random(self, what: str) -> random.Random:
        return random.Random(f"{self.seed} {what}")

    def note(self, what: str, tried: int, lost: list[str], figures: str = "") -> None:
        """Add a row, and print it at once, with the first losses."""
        self.rows.append(Row(self.section, what, tried, lost, figures))
        print(self.rows[-1], flush=True)
        for loss in lost[:5]:
            print(f"    lost: {loss}", file=sys.stderr, flush=True)

    def place(self, name: str) -> Path:
        """Return a new folder to work in."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def train(self, cwd: Path, *flags, image_dir="pictures", **options) -> subprocess.CompletedProcess:
        """Run retrain.py on the stub base model; stdout and stderr as text, exit code 'hangs' if it does."""
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(self.start(cwd, *flags, image_dir=image_dir, **options))
            return ended(process)

    def start(self, cwd: Path, *flags, image_dir="pictures", **options) -> subprocess.Popen:
        """Start retrain.py on the stub base model."""
        usual = ["--image_dir", image_dir, "--model_dir", self.model_dir, "--architecture", "inception_v3"]
        usual += ["--how_many_training_steps", 200, "--random_seed", 1]
        return start("retrain.py", *usual, *flags, cwd=cwd, **options)


def start(script: str, *arguments, cwd: Path, before: tuple = (), **options) -> subprocess.Popen:
    """Start one of our scripts in a process of its own, with pipes for stdout and stderr; `before` its command."""
    command = [*before, sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=cwd, text=True, encoding="utf-8", errors="replace", **pipes)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for a process; one that hangs is killed, and its exit code is told as 'hangs'."""
    try:
        out, err = process.communicate(timeout=HANGING)
        return subprocess.CompletedProcess(process.args, process.returncode, out or "", err or "")
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, "hangs", out or "", err or "")


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


def fingerprints(folder: Path) -> dict[str, tuple]:
    """Return what shows whether files of the user's were touched: mode, time of change, contents, target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        data = hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() and os.access(path, os.R_OK) else ""
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_mtime_ns, data, target)
    return found


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files in a folder."""
    return [str(path) for path in folder.rglob(".retrain-*")]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def encoded(image: PIL.Image.Image, form: str, **options) -> bytes:
    """Return a picture as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def seed_pictures() -> dict[str, bytes]:
    """Return whole pictures of every format and kind, by their names."""
    image, other = (picture(colour, 7, (90, 70)) for colour in list(COLOURS.values())[:2])
    exif = {turn: PIL.Image.Exif() for turn in range(1, 9)}
    for turn, block in exif.items():
        block[0x0112] = turn
    deep = PIL.Image.fromarray((np.asarray(image.convert("L"), np.uint16) << 8) + 77)
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "plain.jpg": encoded(image, "JPEG", quality=92),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "grey.jpg": encoded(image.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "cmyk profile.jpg": encoded(image.convert("CMYK"), "JPEG", icc_profile=profile),
        **{f"turned {turn}.jpg": encoded(image, "JPEG", exif=block.tobytes()) for turn, block in exif.items()},
        "plain.png": encoded(image, "PNG"),
        "alpha.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"),
        "bits.png": encoded(image.convert("1"), "PNG"),
        "16 bits.png": encoded(deep, "PNG"),
        "turned.png": encoded(image, "PNG", exif=exif[6].tobytes()),
        "plain.gif": encoded(image, "GIF"),
        "animated.gif": encoded(image, "GIF", save_all=True, append_images=[other] * 5),
        "plain.bmp": encoded(image, "BMP"),
        "plain.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "animated.webp": encoded(image, "WEBP", save_all=True, append_images=[other] * 3),
        "1x1.png": encoded(image.resize((1, 1)), "PNG"),
        "1x1.jpg": encoded(image.resize((1, 1)), "JPEG"),
        "1x20000.png": encoded(image.resize((1, 20_000)), "PNG"),
        "20000x1.jpg": encoded(image.resize((20_000, 1)), "JPEG"),
    }


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return the bytes of a picture, damaged in one of many ways; `other` is another picture's."""
    found, kind = bytearray(data), chance.randrange(9)
    at = chance.randrange(len(data))
    if kind == 0:  # bits
        for _ in range(chance.randint(1, 8)):
            found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    elif kind == 1:  # bits of the headers, EXIF blocks among them
        for _ in range(chance.randint(1, 4)):
            found[chance.randrange(min(len(found), 160))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del found[at:]
    elif kind == 3:  # spliced
        found[at:] = other[chance.randrange(len(other)) :]
    elif kind == 4:  # another's header
        size = chance.randint(2, 64)
        found[:size] = other[:size]
    elif kind == 5:
        size = chance.randint(1, 400)
        found[at : at + size] = bytes(len(found[at : at + size]))
    elif kind == 6:
        found[at:at] = chance.randbytes(chance.randint(1, 60))
    elif kind == 7:  # a piece lost, or there twice
        size = chance.randint(1, 100)
        found[at : at + size] = b"" if chance.randrange(2) else found[at : at + size] * 2
    else:
        found = bytearray(chance.randbytes(chance.randint(0, 300)))
    return bytes(found)


ENDINGS = (".jpg", ".jpeg", ".JPG", ".png", ".gif", ".bmp", ".webp", ".txt", "", ".tar.gz", ".jpg.")


def write_mutations(folder: Path, count: int, chance: random.Random) -> list[Path]:
    """Write the whole pictures and so many damaged ones into two class folders; return the whole ones."""
    seeds = seed_pictures()
    names, good = list(seeds), []
    for label in ("one", "two"):
        (folder / label).mkdir(parents=True)
        for name, data in seeds.items():
            good.append(folder / label / f"good {name}")
            good[-1].write_bytes(data)
    for i in range(count):
        name = chance.choice(names)
        data = mutated(seeds[name], seeds[chance.choice(names)], chance)
        ending = Path(name).suffix if chance.randrange(2) else chance.choice(ENDINGS)
        (folder / ("one", "two")[i % 2] / f"{i:05}{ending}").write_bytes(data)
    return good


def slowest(paths: list[Path]) -> float:
    """Return the seconds that the slowest of some pictures takes to be read, or refused."""
    longest = 0.0
    for path in paths:
        began = time.monotonic()
        with contextlib.suppress(retrain.ImageError):
            retrain.resize_bilinear(retrain.read_image(path, retrain.Reading(), (299, 299)), (299, 299))
        longest = max(longest, time.monotonic() - began)
    return longest


def bottleneck_of(cwd: Path, path: Path) -> Path:
    return cwd / "bottleneck" / path.parent.name / f"{path.name}_inception_v3.txt"


def pictures_in_training(t: Torture, cwd: Path, good: list[Path], paths: list[Path]) -> None:
    """Train on all in one go: each is used or named; the good ones get the features that they get alone."""
    before = fingerprints(cwd / "pictures")
    done = t.train(cwd)
    lost = [complaint(done)] if complaint(done) else []
    listed = cwd / "bottleneck/skipped_inception_v3.tsv"
    lines = listed.read_text("utf-8").splitlines() if listed.exists() else []
    skipped = {Path(line.split("\t")[0]).name: line.split("\t")[1] for line in lines}
    for path in paths:
        used, named = bottleneck_of(cwd, path).exists(), bool(skipped.get(path.name))
        if used == named:
            lost.append(f"{path.name}: {'both used and' if used else 'neither used nor'} named")
    lost += leftovers(cwd) + (["pictures were touched"] if fingerprints(cwd / "pictures") != before else [])
    t.note(
        "damaged pictures in one training", len(paths), lost, f"{len(paths) - len(skipped)} used, {len(skipped)} named"
    )
    alone = t.place("alone")
    for path in good:
        target = alone / path.relative_to(cwd)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    lost = list(filter(None, [complaint(t.train(alone))]))
    lost += [
        path.name
        for path in good
        if not bottleneck_of(cwd, path).exists()
        or bottleneck_of(cwd, path).read_bytes() != bottleneck_of(alone, path).read_bytes()
    ]
    t.note("whole pictures among them: the features that they get alone", len(good), lost)


def pictures_in_predict(t: Torture, cwd: Path, paths: list[Path]) -> None:
    """Name all in one go: each gets a label or a reason."""
    done = ended(start("predict.py", "--image", "pictures", "--csv", "names.csv", cwd=cwd))
    lost = list(filter(None, [complaint(done, (0, 1)) if done.returncode != 1 else ""]))
    lost += ["a traceback"] if "Traceback" in done.stderr else []
    with open(cwd / "names.csv", encoding="utf-8", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    lost += [path.name for path in paths if str(path.relative_to(cwd)) not in rows]
    lost += [name for name, row in rows.items() if bool(row["label"]) == bool(row["error"])]
    named = sum(bool(row["label"]) for row in rows.values())
    t.note("the same through predict.py", len(paths), lost, f"{named} named, {len(rows) - named} told with a reason")


def png_of_zeros(width: int, height: int) -> bytes:
    """Return a whole black PNG of one bit per pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row * 500) for _ in range(height // 500)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def write_bombs(folder: Path) -> list[Path]:
    """Write pictures that would fill the memory."""
    nested = bytearray(encoded(PIL.Image.new("P", (9, 9)), "GIF", save_all=True))
    nested[6:10] = struct.pack("<HH", 65_535, 65_535)
    frames = encoded(picture((9, 99, 9), 0), "GIF")
    body = frames[frames.index(b"\x2c") : -1]  # the one frame
    bombs = {
        "50000x50000.png": png_of_zeros(50_000, 50_000),
        "65535x65535.gif": bytes(nested),
        "a hundred thousand frames.gif": frames[:-1] + body * (40_000_000 // len(body)) + b";",
    }
    for name, data in bombs.items():
        (folder / name).write_bytes(data)
    for name, start_bytes in (("1 GB of zeros.jpg", b""), ("1 GB behind a beginning.jpg", b"\xff\xd8\xff\xe0")):
        with open(folder / name, "wb") as file:
            file.write(start_bytes)
            file.truncate(1 << 30)
    return sorted(folder.iterdir())


# Prints the MB that reading a file takes beyond reading a small one, the seconds, and what came of it.
READ_ONE = """
import re, sys, time
import predict
import retrain
def peak():  # getrusage tells the peak of whoever started us, if that is higher
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
def read(path):
    try:
        return retrain.read_image(path, retrain.Reading(), (299, 299)).shape
    except retrain.ImageError as error:
        return str(error)
read(sys.argv[1])
before, began = peak(), time.monotonic()
what = read(sys.argv[2])
print((peak() - before) // 1024, time.monotonic() - began, what, sep="\\t")
"""


def pictures(t: Torture) -> None:
    """Damaged pictures through training and predict.py; bombs."""
    cwd, chance = t.place("pictures"), t.random("pictures")
    good = write_mutations(cwd / "pictures", t.count(2000), chance)
    paths = sorted(path for path in (cwd / "pictures").rglob("*") if path.is_file())
    try:
        seconds = retrain.in_child("The pictures can't be read", HANGING, True, slowest, paths)
        lost = [f"one took {seconds:.1f} s"] if seconds > 10 else []
    except retrain.UserError as error:
        seconds, lost = 0, [str(error)]
    t.note("each read by itself, in 10 s at most", len(paths), lost, f"slowest {seconds:.2f} s")
    pictures_in_training(t, cwd, good, paths)
    pictures_in_predict(t, cwd, paths)
    lost, most, longest = [], 0, 0.0
    bombs = write_bombs(t.place("bombs"))
    for bomb in bombs:
        command = [sys.executable, "-c", READ_ONE, good[0], bomb]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGING)
        megabytes, seconds, what = done.stdout.strip().split("\t") if done.returncode == 0 else (9999, 0, done.stderr)
        most, longest = max(most, int(megabytes)), max(longest, float(seconds))
        if int(megabytes) >= 200 or float(seconds) > 10:
            lost.append(f"{bomb.name}: {megabytes} MB, {seconds} s, {what}")
    t.note("bombs, under 200 MB each", len(bombs), lost, f"most {most} MB, slowest {longest:.2f} s")


# ----------------------------------------------------------------------------------------------------------------------
# Death
# ----------------------------------------------------------------------------------------------------------------------

# What a run has printed when a stretch of it begins, so that signals fall on all of them.
STRETCHES = {"start": None, "extraction": "Bottlenecks:", "training": "Step 0: Cross", "export": "Final test"}
DEATH_FLAGS = ("--how_many_training_steps", 1000, "--eval_step_interval", 50, "--intermediate_store_frequency", 100)


def events(data: bytes) -> list[bytes]:
    """Return the records of a file of TensorBoard's, without the times of day."""
    found = []
    while data:
        (size,) = struct.unpack_from("<Q", data)
        found.append(data[12 + 9 : 12 + size])  # the first field of an event is its time, a double
        data = data[12 + size + 4 :]
    return found[1:]  # the first tells the version, and who wrote it


def outputs(cwd: Path) -> dict[str, object]:
    """Return all that a run has written, but for what tells times: to be compared with another run's."""
    found: dict[str, object] = {}
    for path in sorted(path for path in cwd.rglob("*") if path.is_file() and not path.name.startswith(".retrain-")):
        name = str(path.relative_to(cwd))
        if name.startswith("pictures"):
            continue
        if "tfevents" in name:
            found[str(path.parent.relative_to(cwd))] = events(path.read_bytes())
        elif path.name.startswith("index_"):  # the order is that in which threads were ready
            found[name] = {line for line in path.read_bytes().splitlines() if line.startswith(b"[")}
        else:
            found[name] = path.read_bytes()
    return found


def differences(one: dict, other: dict) -> str:
    """Return the names of what differs, or ''."""
    return ", ".join(name for name in sorted({*one, *other}) if one.get(name) != other.get(name))


class Lives:
    """Runs that are struck at a random moment, one folder each, as many at a time as there are cores."""

    def __init__(self, t: Torture, count: int):
        self.t, self.count = t, count
        self.pictures = make_image_dir(t.place("death") / "pictures", 60)
        cwd = self.cwd()
        began = time.monotonic()
        process = t.start(cwd, *DEATH_FLAGS)
        self.spans, stretch = {}, "start"
        for line in process.stdout:
            for name, mark in STRETCHES.items():
                if mark and mark in line and name not in self.spans and name != stretch:
                    self.spans[stretch], stretch, began = time.monotonic() - began, name, time.monotonic()
        self.undisturbed = ended(process)
        self.spans[stretch] = time.monotonic() - began
        self.expected = outputs(cwd)

    def cwd(self) -> Path:
        """Return a new working folder with the pictures in it."""
        cwd = self.t.place("life")
        (cwd / "pictures").symlink_to(self.pictures)
        return cwd

    def strike(self, what: str, number: int) -> tuple[Path, subprocess.CompletedProcess, float, str]:
        """Start a run and send it a signal; return its folder, how it ended, after how many seconds, and where."""
        chance, cwd = self.t.random(f"{what} {number}"), self.cwd()
        stretch = list(STRETCHES)[number % len(STRETCHES)]
        process = self.t.start(cwd, *DEATH_FLAGS)
        for line in process.stdout if STRETCHES[stretch] else ():
            if STRETCHES[stretch] in line:
                break
        # Nothing of ours can guard Python's own start.
        time.sleep(0.3 * (stretch == "start") + chance.uniform(0, self.spans[stretch]))
        process.send_signal(getattr(signal, what))
        struck = time.monotonic()
        done = ended(process)
        return cwd, done, time.monotonic() - struck, stretch

    def all(self, what: str, judge: Callable) -> list:
        """Return what `judge` returns for each strike; it gets what `strike` returns."""
        return self.t.each(lambda number: judge(*self.strike(what, number)), range(self.count))


def killed(t: Torture, lives: Lives) -> None:
    """SIGKILL at random moments, each followed by the same command: its outputs are those of a run in peace."""

    def judge(cwd: Path, done, seconds: float, stretch: str) -> tuple[bool, str]:
        again = t.train(cwd, *DEATH_FLAGS)
        lost = complaint(again) or differences(outputs(cwd), lives.expected)
        shutil.rmtree(cwd)
        return done.returncode == -signal.SIGKILL, lost and f"in {stretch}: {lost}"

    results = lives.all("SIGKILL", judge)
    where = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in lives.spans.items())
    figures = f"{sum(hit for hit, _ in results)} before their end; stretches: {where}"
    t.note("SIGKILL, then the same command", len(results), [lost for _, lost in results if lost], figures)


def stopped(t: Torture, lives: Lives, name: str, code: int) -> None:
    """SIGINT or SIGTERM at random moments: a prompt end, in one line, with the exit code of that signal."""

    def judge(cwd: Path, done, seconds: float, stretch: str) -> tuple[float, str]:
        lost = complaint(done, (0, code)) or ("" if seconds <= t.patience else f"{seconds:.1f} s")
        if done.returncode == code:
            lines = [line for line in done.stderr.splitlines() if not line.startswith(("Bottlenecks:", "WARNING:"))]
            lost = lost or ("" if len(lines) == 1 and "retrain.py: stopped" in lines[0] else f"said {lines}")
        lost = lost or ", ".join(leftovers(cwd))
        shutil.rmtree(cwd)
        return seconds * (done.returncode == code), lost and f"in {stretch}: {lost}"

    results = lives.all(name, judge)
    slowest = max((seconds for seconds, _ in results), default=0)  # none, when the time was used up before
    figures = f"{sum(seconds > 0 for seconds, _ in results)} before their end, slowest {slowest:.2f} s"
    t.note(
        f"{name}: one line, exit code {code}, {t.patience:g} s",
        len(results),
        [lost for _, lost in results if lost],
        figures,
    )


def converting(t: Torture, lives: Lives) -> None:
    """SIGTERM and SIGKILL while the base model is converted, which another process does."""

    def attempt(number: int) -> tuple[float, str]:
        cwd, kill = lives.cwd(), number % 2
        (cwd / "model").mkdir()
        shutil.copy(t.model_dir / retrain.GRAPH_FILE, cwd / "model")
        process = t.start(cwd, "--model_dir", "model")
        for line in process.stdout:
            if line.startswith("Converting"):
                break
        time.sleep(t.random(f"converting {number}").uniform(0, 4))
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        struck = time.monotonic()
        process.wait()
        seconds = time.monotonic() - struck
        loss = complaint(ended(process), (0, -9 if kill else 143)) or (
            "" if seconds <= t.patience else f"{seconds:.1f} s"
        )
        return seconds, loss or complaint(t.train(cwd, "--model_dir", "model"))

    results = t.each(attempt, range(t.count(12)))
    figures = f"slowest {max((seconds for seconds, _ in results), default=0):.2f} s"
    what = "SIGTERM and SIGKILL in the conversion, then the same command"
    t.note(what, len(results), [loss for _, loss in results if loss], figures)


def death(t: Torture) -> None:
    """SIGKILL, SIGINT and SIGTERM at random moments; runs side by side."""
    lives = Lives(t, t.count(100))
    if complaint(lives.undisturbed):
        return t.note("an undisturbed run", 1, [complaint(lives.undisturbed)])
    killed(t, lives)
    lives.count = t.count(50)
    stopped(t, lives, "SIGINT", 130)
    stopped(t, lives, "SIGTERM", 143)
    converting(t, lives)
    side_by_side(t, lives)


def side_by_side(t: Torture, lives: Lives) -> None:
    """Two and four runs at once on one bottleneck folder."""
    for count in (2, 4):
        shared, folders = t.place("shared"), [lives.cwd() for _ in range(count)]
        runs = [t.start(cwd, *DEATH_FLAGS, "--bottleneck_dir", shared) for cwd in folders]
        lost = list(filter(None, map(complaint, map(ended, runs))))
        kept = {name: value for name, value in lives.expected.items() if not name.startswith("bottleneck")}
        lost += filter(None, (differences(outputs(cwd), kept) for cwd in folders))
        texts = {path.name: path.read_bytes() for path in shared.rglob("*.txt")}
        wanted = {Path(name).name: data for name, data in lives.expected.items() if name.endswith("v3.txt")}
        lost += [differences(texts, wanted)] if texts != wanted else []
        t.note(f"{count} runs at once on one bottleneck folder", count, lost + leftovers(shared))


# ----------------------------------------------------------------------------------------------------------------------
# Full and forbidden
# ----------------------------------------------------------------------------------------------------------------------


def limited(size: int) -> tuple[str, ...]:
    """Return the command that makes a process unable to write files of more bytes than `size`, as a full disk does."""
    return ("prlimit", f"--fsize={size}:{size}")


def clean_failure(t: Torture, cwd: Path, codes: tuple, *flags, image_dir="pictures", **options) -> str:
    """Return what is not as promised when a run fails, or goes well all the same: leftovers, touched pictures."""
    real = cwd / image_dir
    before = fingerprints(real) if real.is_dir() else {}
    done = t.train(cwd, *flags, image_dir=image_dir, **options)
    lost = complaint(done, codes) or ", ".join(leftovers(cwd))
    return lost or ("pictures were touched" if before and fingerprints(real) != before else "")


def full_disk(t: Torture, source: Path) -> None:
    """No file may grow beyond a limit, or the file system is small: a sentence, then a plain rerun goes well."""
    well = t.place("well")
    shutil.copytree(source, well / "pictures")
    t.train(well, *DEATH_FLAGS)
    expected = outputs(well)
    sizes = sorted({path.stat().st_size for path in well.rglob("*") if path.is_file()})
    limits = sorted({0, 1, 50, *(size - 1 for size in sizes)})
    limits = limits if t.share == 1 else t.random("limits").sample(limits, t.count(len(limits)))
    if not shutil.which("prlimit"):
        return t.note("no file of more than so many bytes", 0, [], "skipped: it needs prlimit")

    def attempt(limit: int) -> str:
        cwd = t.place("limit")
        shutil.copytree(source, cwd / "pictures", copy_function=shutil.copy2)
        failed = clean_failure(t, cwd, (0, 1), *DEATH_FLAGS, before=limited(limit))
        again = complaint(t.train(cwd, *DEATH_FLAGS)) or differences(
            {name: data for name, data in outputs(cwd).items() if "index_" not in name},
            {name: data for name, data in expected.items() if "index_" not in name},
        )
        shutil.rmtree(cwd)
        return "; ".join(f"{limit} bytes: {loss}" for loss in (failed, again) if loss)

    found = t.each(attempt, limits)
    t.note("no file of more than so many bytes, then the same command", len(found), list(filter(None, found)))
    small_file_systems(t, source)


def small_file_systems(t: Torture, source: Path) -> None:
    """The working folder on a file system of a few KB."""
    sizes = (40, 100, 200, 280, 320, 400)

    def attempt(kilobytes: int) -> str | None:
        cwd = t.place("small")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(cwd)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            return None
        try:
            (cwd / "pictures").symlink_to(source)
            loss = clean_failure(t, cwd, (0, 1), *DEATH_FLAGS)
        finally:
            subprocess.run(["umount", str(cwd)], check=True)
        return loss and f"{kilobytes} KB: {loss}"

    found = t.each(attempt, sizes if t.share == 1 else sizes[:: len(sizes) // 2])
    if None in found:
        return t.note("a small file system", 0, [], "skipped: it needs the rights to mount one")
    t.note("a file system of 40 to 400 KB", len(found), list(filter(None, found)))


def odd_names(t: Torture, source: Path) -> None:
    """Names of folders that are hard to pass on."""
    deep = "/".join(["d" * 60] * 4)[:240]
    names = [
        "a b",
        'it\'s "so"',
        "two\nlines",
        "\x1b[31mred",
        "中文 文件夹",
        "-x",
        "*?[a]",
        "%s %d",
        "é".encode("latin-1"),
        deep,
    ]

    def attempt(name: str) -> str:
        cwd = t.place("odd") / name
        cwd.mkdir(parents=True)
        for label in ("first", "second"):
            shutil.copytree(source / "green", cwd / name / f"{label} {Path(name).name}"[:200])
        done = t.train(cwd, f"--image_dir={name}")
        control = re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout + done.stderr)
        named = ended(start("predict.py", "--image", f"./{name}", cwd=cwd))
        loss = complaint(done) or complaint(named) or ("control characters" if control else "")
        loss = loss or ("" if len(named.stdout.splitlines()) > 9 else "nothing named")
        return loss and f"{name!r}: {loss}"

    found = t.each(attempt, map(os.fsdecode, names))
    t.note("odd names of folders, 240 characters", len(found), list(filter(None, found)))


def odd_files(t: Torture, source: Path) -> None:
    """Links, loops, a fifo, a socket and devices among the pictures: told, and nothing waits for them."""
    cwd = t.place("files")
    shutil.copytree(source, cwd / "pictures")
    green = cwd / "pictures/green"
    (green / "loop.jpg").symlink_to("loop.jpg")
    (green / "lost.jpg").symlink_to("nowhere")
    (green / "zero.jpg").symlink_to("/dev/zero")
    (green / "up").symlink_to("..")
    (cwd / "pictures/round").symlink_to(".")
    os.mkfifo(green / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(green)  # a socket's path may have 107 characters only
        one.bind("socket.jpg")
        os.chdir(here)
        (cwd / "pictures/round").unlink()
        loss = clean_failure(t, cwd, (0,))
        named = ended(start("predict.py", "--image", "pictures/green", cwd=cwd))
    lost = [loss] if loss else []
    lost += [name for name in ("loop", "lost", "zero", "fifo", "socket") if f"{name}.jpg" not in named.stderr]
    t.note("loops, broken links, a fifo, a socket, a device", 6, lost)


# What takes from the administrator the right to read and write everything, and leaves others as they are.
WITHOUT_RIGHTS = ("setpriv", "--inh-caps=-all", "--bounding-set=-all") if os.geteuid() == 0 else ()


def forbidden_places(t: Torture, source: Path) -> None:
    """Folders and files that may not be read or written."""
    if WITHOUT_RIGHTS and not shutil.which("setpriv"):
        return t.note("read-only and unreadable places", 0, [], "skipped: for the administrator it needs setpriv")
    t.train(source.parent)  # so that the conversion is there
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    forbid = {
        "nothing": (None, 0o755, (0,)),
        "an unreadable picture": ("pictures/green/green_00.jpg", 0, (0,)),
        "an unreadable class": ("pictures/green", 0, (1,)),
        "unreadable pictures": ("pictures", 0, (1,)),
        "read-only pictures": ("pictures/green", 0o555, (0,)),
        "a read-only working folder": (".", 0o555, (1,)),
        "a read-only bottleneck folder": ("bottleneck", 0o555, (1,)),
        "a read-only class of the bottlenecks": ("bottleneck/green", 0o555, (1,)),
        "read-only logs": ("retrain_logs", 0o555, (1,)),
        "unreadable logs": ("retrain_logs/train", 0, (1,)),
    }

    def attempt(what: str) -> str:
        place, mode, codes = forbid[what]
        cwd = t.place("forbidden")
        shutil.copytree(source, cwd / "pictures")
        for folder in ("bottleneck/green", "retrain_logs/train"):
            (cwd / folder).mkdir(parents=True)
        if place:
            (cwd / place).chmod(mode)
        loss = clean_failure(t, cwd, codes, before=WITHOUT_RIGHTS, env=environment)
        if place:
            (cwd / place).chmod(0o755)
        return loss and f"{what}: {loss}"

    found = t.each(attempt, forbid)
    t.note("read-only and unreadable places, no home", len(found), list(filter(None, found)))


def no_temporary_folder(t: Torture, source: Path) -> None:
    """A machine without /tmp, a home, and a writable folder but the working one."""
    cwd = t.place("no_tmp")
    shutil.copytree(source, cwd / "pictures")
    (cwd / "model").mkdir()
    shutil.copy(t.model_dir / retrain.GRAPH_FILE, cwd / "model")
    elsewhere = Path("/run/torture")
    steps = [f"mkdir -p {elsewhere}/env {elsewhere}/main {elsewhere}/work"]
    steps += [f"mount --bind {there} {elsewhere}/{name}" for name, there in
              (("env", sys.prefix), ("main", ROOT), ("work", cwd))]  # fmt: skip
    steps += [f"mount -t tmpfs -o ro,size=4k tmpfs {folder}" for folder in ("/tmp", "/var/tmp")]
    command = (
        "../env/bin/python ../main/retrain.py --image_dir pictures --model_dir model --saved_model_dir saved_model"
    )
    steps += [f"cd {elsewhere}/work", f"exec {command} --how_many_training_steps 20"]
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", "\n".join(steps)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        return t.note("no /tmp", 0, [], "skipped: it needs the rights to mount")
    left = sorted(path.name for path in cwd.iterdir() if path.name.startswith("tmp"))
    t.note("no /tmp, no home: a whole training", 1, list(filter(None, [complaint(done), *left])))


def changing_files(t: Torture, source: Path) -> None:
    """Pictures that vanish, change, are cut short and come back while a run works."""

    def attempt(number: int) -> str:
        chance, cwd, over = t.random(f"changing {number}"), t.place("changing"), threading.Event()
        shutil.copytree(source, cwd / "pictures")
        paths = sorted((cwd / "pictures").glob("*/*.jpg"))
        contents = {path: path.read_bytes() for path in paths}

        def change() -> None:
            while not over.wait(0.002):
                path = chance.choice(paths)
                kind = chance.randrange(4)
                if kind == 0:
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(contents[path][: (None, 100, 0, None)[kind]])

        changer = threading.Thread(target=change)
        changer.start()
        done = t.train(cwd)
        over.set()
        changer.join()
        for path, data in contents.items():
            path.write_bytes(data)
        again = t.train(cwd)
        loss = complaint(done, (0, 1)) or complaint(again) or ", ".join(leftovers(cwd))
        bottlenecks = len(list((cwd / "bottleneck").rglob("*_v3.txt")))
        loss = loss or ("" if bottlenecks == len(paths) else f"{bottlenecks} bottlenecks of {len(paths)} pictures")
        shutil.rmtree(cwd)
        return loss and f"round {number}: {loss}"

    found = t.each(attempt, range(t.count(20)))
    what = "pictures that vanish and change meanwhile, then the same command"
    t.note(what, len(found), list(filter(None, found)))


def odd_streams(t: Torture, source: Path) -> None:
    """Nobody reads what is printed, or it can't be written."""
    cwd, lost = t.place("streams"), []
    (cwd / "pictures").symlink_to(source)
    with open("/dev/full", "w") as full:
        lost.append(complaint(t.train(cwd, stdout=full), (1,)))
    for closed in ((1,), (2,), (0, 1, 2)):
        done = t.train(cwd, stdout=None, stderr=None, preexec_fn=lambda closed=closed: [os.close(fd) for fd in closed])
        lost.append("" if done.returncode == 0 else f"{closed} closed: exit code {done.returncode}")
    t.note("a full or closed stdout and stderr", 4, list(filter(None, lost)))


def forbidden(t: Torture) -> None:
    """What can't be written or read, and what is named oddly."""
    source = make_image_dir(t.place("source") / "pictures", 10)
    full_disk(t, source)
    odd_names(t, source)
    odd_files(t, source)
    odd_streams(t, source)
    forbidden_places(t, source)
    no_temporary_folder(t, source)
    changing_files(t, source)


# ----------------------------------------------------------------------------------------------------------------------
# Hostile files
# ----------------------------------------------------------------------------------------------------------------------


def hostile_graphs(t: Torture) -> None:
    """Every operation of TensorFlow that is not on the list, in a graph and in a function of one."""
    tf = retrain.import_tensorflow()
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
                retrain.read_graph(path)
                lost.append(name)
            except retrain.UserError as error:
                if f"'odd' is a {name}," not in str(error):
                    lost.append(f"{name}: {error}")
    t.note("graphs with an operation that is not on the list", 2 * len(names), lost)


def hostile_lites(t: Torture) -> None:
    """Damaged .tflite files: each runs or is refused in a sentence, whatever LiteRT does."""
    base = retrain.load_base_model(retrain.inception_recipe(t.model_dir), t.model_dir, t.model_dir)
    head = retrain.Head(np.ones((base.bottleneck_size, 3), np.float32), np.zeros(3, np.float32))
    whole, chance = retrain.lite_with_head(base.lite_path.read_bytes(), head), t.random("lites")
    path, lost, refused, crashed = t.place("lites") / "x.tflite", [], 0, 0
    for count in range(1, t.count(2000) + 1):
        path.write_bytes(mutated(whole, whole[::-1], chance))
        try:
            retrain.check_lite(path)
        except retrain.UserError as error:
            refused += 1
            crashed += "crashed" in str(error)
            lost += [f"{count}: {error}"] if "comes to no end" in str(error) else []
        except Exception as error:
            lost.append(f"{count}: {error!r}")
        if t.late():
            break
    t.note("damaged .tflite files", count, lost, f"{refused} refused, {crashed} of which crashed the child process")


def hostile_facts(t: Torture) -> None:
    """Odd values in the .json beside a graph, and odd labels."""
    cwd, lost = t.place("facts"), []
    make_image_dir(cwd / "pictures", 6)
    lost += filter(None, [complaint(t.train(cwd))])
    facts = json.loads((cwd / "output_graph.json").read_text("utf-8"))
    odd = (None, 0, -1, 1e308, "", "x" * 9999, "\x1b[2J", [], [[]], {}, True, [1, 2, 3], {"a": "b"})
    texts = ["", "[]", "null", "[" * 100_000, '{"labels": NaN}']
    texts += [json.dumps({**facts, key: value}) for key in facts for value in odd]
    texts += [json.dumps({name: value for name, value in facts.items() if name != key}) for key in facts]
    for text in texts:
        (cwd / "output_graph.json").write_text(text, "utf-8")
        try:
            predict.read_facts(predict.OutputFiles.of(str(cwd / "output_graph.pb")))
            retrain.is_ours(cwd / "output_graph.json")
            if "test_accuracy" in text or "architecture" in text:
                continue
        except retrain.UserError:
            pass
        except Exception as error:
            lost.append(f"{text[:80]}: {error!r}")
    t.note("odd .json files beside a graph", len(texts), lost)
    (cwd / "output_graph.json").write_text(json.dumps(facts), "utf-8")
    labels = ["=1+1", "@sum(a)", "\x1b]0;owned\x07\x9b31m"]
    (cwd / "output_labels.txt").write_text("".join(f"{label}\n" for label in labels), "utf-8")
    shutil.copy(next((cwd / "pictures/green").iterdir()), cwd / "=cmd|'calc'!A1.jpg")
    done = ended(start("predict.py", "=cmd|'calc'!A1.jpg", "--csv", "x.csv", cwd=cwd))
    lost = list(filter(None, [complaint(done)]))
    lost += ["control characters"] if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr) else []
    with open(cwd / "x.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    lost += [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    t.note("labels with escapes, cells that are formulas", len(cells), lost)


def archives(graph: bytes) -> Iterator[tuple[str, Callable[[tarfile.TarFile], None]]]:
    """Yield names and makers of archives with hostile members."""

    def member(name: str, data: bytes = b"", **facts) -> Callable[[tarfile.TarFile], None]:
        def add(archive: tarfile.TarFile) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))

        return add

    def oversized(size: int, name: str, kind: bytes) -> Callable[[tarfile.TarFile], None]:
        def add(archive: tarfile.TarFile) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type = size, kind
            archive.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(size >> 20):
                archive.fileobj.write(bytes(1 << 20))

        return add

    yield "absolute", member("/tmp/torture-was-here", b"x")
    yield "climbing", member("../torture-was-here", b"x")
    yield "climbing to the name", member(f"../{retrain.GRAPH_FILE}", graph)
    yield "a symbolic link", member(retrain.GRAPH_FILE, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    yield "a hard link", member(retrain.GRAPH_FILE, type=tarfile.LNKTYPE, linkname="/etc/passwd")
    yield "a device", member(retrain.GRAPH_FILE, type=tarfile.CHRTYPE)
    yield "an oversized graph", oversized(900 << 20, retrain.GRAPH_FILE, tarfile.REGTYPE)
    yield "an oversized other member", oversized(900 << 20, "other", tarfile.REGTYPE)


def hostile_archives(t: Torture) -> None:
    """Archives of base models with members that should not be there: refused, nothing unpacked but the graph."""
    graph, lost, tried = (t.model_dir / retrain.GRAPH_FILE).read_bytes(), [], 0
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 200 * 1024

    def attempt(name: str, place: Path) -> None:
        with contextlib.suppress(retrain.DownloadError):
            retrain.extract_graph(place / "x.tgz", retrain.GRAPH_FILE, place / "graph.pb")
            lost.append(f"{name}: something was taken out")

    for name, add in archives(graph):
        place = t.place("archive")
        with tarfile.open(place / "x.tgz", "w:gz", compresslevel=1) as archive:
            add(archive)
        attempt(name, place)
        tried += 1
        if any(path.name != "x.tgz" for path in place.rglob("*") if path.is_file()):
            lost.append(f"{name}: a file was left")
    if any(Path(folder, "torture-was-here").exists() for folder in ("/tmp", t.folder)):
        lost.append("a file was written elsewhere")
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit:
        lost.append("more than 200 MB of memory")
    place, chance = t.place("archive"), t.random("archives")
    with tarfile.open(place / "whole.tgz", "w:gz") as archive:
        archive.add(t.model_dir / retrain.GRAPH_FILE, retrain.GRAPH_FILE)
    whole = (place / "whole.tgz").read_bytes()
    for number in range(t.count(300)):
        (place / "x.tgz").write_bytes(mutated(whole, whole[::-1], chance))
        try:
            with contextlib.suppress(retrain.DownloadError):
                retrain.extract_graph(place / "x.tgz", retrain.GRAPH_FILE, place / "graph.pb")
        except Exception as error:
            lost.append(f"damage {number}: {error!r}")
        tried += 1
    t.note("archives with absolute, climbing, linked, oversized or damaged members", tried, lost)


def damaged_graphs(t: Torture) -> None:
    """Damaged base models and trained graphs, run by TensorFlow."""
    whole, chance = (t.model_dir / retrain.GRAPH_FILE).read_bytes(), t.random("graphs")
    source = make_image_dir(t.place("source") / "pictures", 4)

    def attempt(data: bytes) -> tuple[bool, str]:
        cwd = t.place("damaged")
        (cwd / "model").mkdir()
        (cwd / "model" / retrain.GRAPH_FILE).write_bytes(data)
        done = t.train(cwd, "--model_dir", "model", image_dir=source)
        shutil.rmtree(cwd)
        return done.returncode != 0, complaint(done, (0, 1))

    found = t.each(attempt, [mutated(whole, whole[::-1], chance) for _ in range(t.count(40))])
    lost = [loss for _, loss in found if loss]
    t.note("damaged base models in training", len(found), lost, f"{sum(failed for failed, _ in found)} refused")


def hostile(t: Torture) -> None:
    """Graphs that are programs, damaged networks, archives, labels and tables with surprises."""
    damaged_graphs(t)
    hostile_facts(t)
    hostile_lites(t)
    hostile_archives(t)
    hostile_graphs(t)


# ----------------------------------------------------------------------------------------------------------------------
# Long and many
# ----------------------------------------------------------------------------------------------------------------------


def hard_linked(folder: Path, counts: dict[str, int]) -> Path:
    """Fill class folders with so many pictures, hard links to a few hundred."""
    originals = make_image_dir(folder / "originals", 100)
    files = sorted(originals.rglob("*.jpg"))
    for label, count in counts.items():
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(count):
            os.link(files[i % len(files)], folder / "pictures" / label / f"{i:06}.jpg")
    return folder


@dataclasses.dataclass
class Watched:
    """What was seen of a long run: (seconds, CPU seconds, bytes of the index) again and again, and its peak memory."""

    seen: list[tuple[float, float, int]]
    megabytes: int
    done: subprocess.CompletedProcess


def watch(t: Torture, cwd: Path) -> Watched:
    """Run a training, and look at it ten times a second."""
    process, began, seen, peak = t.start(cwd, stdout=subprocess.DEVNULL), time.monotonic(), [], 0
    index, ticks = cwd / "bottleneck/index_inception_v3.jsonl", os.sysconf("SC_CLK_TCK")
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()))
    said: list[str] = []
    reader.start()
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, TypeError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            size = index.stat().st_size if index.exists() else 0
            seen.append((time.monotonic() - began, (int(fields[11]) + int(fields[12])) / ticks, size))
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) // 1024)
        time.sleep(0.1)
    reader.join()
    return Watched(seen, peak, subprocess.CompletedProcess(process.args, process.returncode, "", said[0]))


def cost(seen: list[tuple[float, float, int]], start_share: float, end_share: float) -> float:
    """Return the CPU seconds (a clock counts what else the machine does) between two shares of the extraction."""
    total = seen[-1][2]

    def at(share: float) -> float:
        return next(cpu for _, cpu, size in seen if size >= share * total)

    return at(end_share) - at(start_share)


def many(t: Torture) -> None:
    """Many pictures, many classes, classes of very different sizes."""
    count = t.count(100_000)
    sets = {
        f"{count:,} pictures": {f"class {i}": count // 10 for i in range(10)},
        "1,000 classes": {f"class {i}": 10 for i in range(t.count(1000))},
        "one class of 50,000 and one of 2": {"many": t.count(50_000), "few": 2},
    }
    t.train(hard_linked(t.place("few"), {"one": 3, "two": 3}))  # so that the conversion is there
    for what, counts in sets.items():
        if t.late():
            t.note(what, 0, [], "skipped: the time is up")
            continue
        cwd = hard_linked(t.place("many"), counts)
        watched = watch(t, cwd)
        lost = list(filter(None, [complaint(watched.done), ", ".join(leftovers(cwd))]))
        first = next((seconds for seconds, _, size in watched.seen if size), float("inf"))
        cpu = next((cpu for _, cpu, size in watched.seen if size), float("inf"))  # others use the machine too
        lost += [f"{cpu:.1f} s before the first picture"] if cpu > 10 else []
        lost += [f"{watched.megabytes} MB"] if watched.megabytes > 1800 else []
        figures = f"first picture after {first:.1f} s ({cpu:.1f} s of CPU), {watched.seen[-1][0]:.0f} s in all, "
        figures += f"{watched.megabytes} MB"
        if sum(counts.values()) >= 20_000 and not lost:
            start_cost, end_cost = cost(watched.seen, 0.05, 0.15), cost(watched.seen, 0.9, 1)
            figures += f", last tenth costs {end_cost / start_cost:.2f} of an early one"
            lost += [figures] if end_cost > 1.2 * start_cost else []
        again = watch(t, cwd)
        lost += filter(None, [complaint(again.done)])
        t.note(what, sum(counts.values()), lost, f"{figures}; a second run takes {again.seen[-1][0]:.0f} s")
        shutil.rmtree(cwd)


# ----------------------------------------------------------------------------------------------------------------------
# Install
# ----------------------------------------------------------------------------------------------------------------------


def as_stranger(cwd: Path) -> dict:
    """Give a folder to a user without a name or rights; return the options of subprocess to be that user."""
    for path in (cwd, *cwd.rglob("*")):
        os.chown(path, 54321, 54321, follow_symlinks=False)
    return {"user": 54321, "group": 54321, "extra_groups": []}


def pythons() -> list[tuple[str, Path]]:
    """Return the version and folder of every Python 3.10 to 3.13 of $TORTURE_PYTHONS, a folder of such folders."""
    found = []
    for folder in sorted(Path(os.environ.get("TORTURE_PYTHONS", "/nonexistent")).glob("*")):
        if re.match(r"3\.1[0-3]\b", folder.name) and (folder / "bin/python3").exists():
            found.append((folder.name, folder))
    return found


def install(t: Torture) -> None:
    """The README's commands in a clean clone, as a user who was made for it, with each Python; retrain.bat."""
    bat_under_wine(t)
    if os.geteuid() or not pythons():
        return t.note("the README's commands", 0, [], "skipped: it needs root, and Pythons in $TORTURE_PYTHONS")
    t.folder.chmod(0o711)  # others may pass
    commands = ["./retrain.sh", "python3 predict.py --image test_images", "sh tests/run.sh tests/test_head.py"]
    for version, folder in pythons():
        home = t.place("home")
        subprocess.run(["git", "clone", "-q", ROOT, home / "clone"], check=True)
        options = as_stranger(home)
        options["env"] = {"HOME": str(home), "PATH": f"{folder}/bin:/usr/bin:/bin", "LD_LIBRARY_PATH": f"{folder}/lib"}
        lost, began = [], time.monotonic()
        for command in commands:
            done = subprocess.run(
                command.split(), cwd=home / "clone", capture_output=True, text=True, timeout=900, **options
            )
            lost += [f"{command}: exit code {done.returncode}, {done.stderr[-300:]}"] if done.returncode else []
        t.note(f"the README's commands, Python {version}", len(commands), lost, f"{time.monotonic() - began:.0f} s")
        shutil.rmtree(home)


# What runs in the place of Python, which wine finds by its name: it notes its arguments, a line each.
RECORDER = """#!/bin/sh
[ "$1" = -c ] || printf '%s\\n' "$@" >arguments.txt
"""


def bat_under_wine(t: Torture) -> None:
    """retrain.bat by wine's cmd: arguments with spaces reach Python whole. (Wine doesn't tell Python's exit code.)"""
    if not shutil.which("wine"):
        return t.note("retrain.bat", 0, [], "skipped: there is no wine")
    cwd = t.place("wine") / "a project"
    (cwd / ".venv/Scripts").mkdir(parents=True)
    python = cwd / ".venv/Scripts/python.exe"
    python.write_text(RECORDER)
    python.chmod(0o755)
    for name in ("retrain.bat", "requirements.txt"):
        shutil.copy(ROOT / name, cwd)
    shutil.copy(ROOT / "requirements.txt", cwd / ".venv/installed.txt")
    given, noted = ["--image_dir", "my photos", "--output_graph", "C:\\a b\\x.pb"], cwd / "arguments.txt"
    command = ["wine", "cmd", "/c", "retrain.bat", *given]
    environment = {**os.environ, "RETRAIN_NO_PAUSE": "1", "WINEDEBUG": "-all"}
    subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=120)
    time.sleep(1)  # wine doesn't wait for programs of the system below it
    words = noted.read_text().splitlines() if noted.exists() else []
    lost = [] if words[0:1] == ["retrain.py"] and words[-len(given) :] == given else [str(words)]
    t.note("retrain.bat under wine's cmd, arguments with spaces", 1, lost)


SECTIONS = {
    "pictures": pictures,
    "death": death,
    "forbidden": forbidden,
    "hostile": hostile,
    "many": many,
    "install": install,
}


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
        for name in flags.sections or [name for name in SECTIONS if name != "install"]:
            bench.section = name
            if bench.late():
                bench.note("the section", 0, [], "skipped: the time is up")
            else:
                SECTIONS[name](bench)
    lost = sum(len(row.lost) for row in bench.rows)
    print(f"\n{sum(row.tried for row in bench.rows):,} tried, {lost} lost.")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
