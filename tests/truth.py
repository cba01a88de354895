#!/usr/bin/env python3
"""Check what the report claims, where the truth is known.

    python tests/truth.py --photos ../shared/photos --model_dir inception_model coverage noise duplicates unknown

coverage     how often the printed intervals contain the true accuracy
noise        how many of the labels flipped on purpose are found
duplicates   how many planted copies are found, and how many pairs that are none
unknown      what becomes of photographs of none of the classes
calibration  how far scores are from how often they are right, before and after
heads        --head auto against --head softmax, at 5, 10, 20 and all images per class
cost         what the report adds, for 2,500 images

The features of the photographs are kept in --bottleneck_dir, so the second run is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retrain  # noqa: E402  (it lies in the folder above)

STEPS = 200  # as retrain.sh trains
# The ImageNet classes that are ants or bees: no unknown pictures to a classifier of these.
KNOWN_SYNSETS = ("n02206856", "n02219486")


@dataclasses.dataclass(frozen=True)
class Set:
    """Photographs with their features float32 [n, size] and classes int [n]."""

    images: list[retrain.Image]
    features: np.ndarray
    classes: np.ndarray

    @property
    def class_count(self) -> int:
        return int(self.classes.max()) + 1

    def some(self, rows: np.ndarray) -> Set:
        """Return these rows of the set."""
        return Set([self.images[row] for row in rows], self.features[rows], self.classes[rows])


class Sets:
    """The sets of photographs by name, as a base model sees them."""

    def __init__(self, photos: Path, model_dir: Path, architecture: str, bottleneck_dir: Path):
        recipe, _ = retrain.find_recipe(architecture, "", model_dir)
        self.photos, self.base = photos, retrain.load_base_model(recipe, model_dir, bottleneck_dir)
        self.bottleneck_dir = bottleneck_dir

    def compute(self, images: list[retrain.Image], kept: str) -> Set:
        """Return images with their features, which are kept in a folder of that name."""
        store = retrain.BottleneckStore(str(self.bottleneck_dir / kept), self.base, retrain.Reading())
        features, gone = retrain.compute_bottlenecks(store, images)
        images = [image for image in images if image.path not in gone]
        classes = np.unique([image.label for image in images], return_inverse=True)[1]
        return Set(images, features[:, 0], classes)

    def load(self, name: str) -> Set:
        """Return a set of class folders, such as cats_dogs, ants_bees/train or data (the drawn pictures)."""
        folder = ROOT / "data" if name == "data" else self.photos / name
        return self.compute(retrain.list_images(str(folder)), name.replace("/", "_"))

    def one_each(self) -> Set:
        """Return the thousand photographs of as many classes."""
        paths = sorted(path for path in (self.photos / "imagenet_one_each").rglob("*.jp*g"))
        return self.compute([retrain.Image(path, path.stem) for path in paths], "one_each")


def settings(seed: int, **changes) -> retrain.TrainingSettings:
    """Return how the heads are trained."""
    return retrain.TrainingSettings(**{"how_many_training_steps": STEPS, "random_seed": seed, **changes})


def trained(features, classes, rows: np.ndarray, chosen: retrain.TrainingSettings) -> np.ndarray:
    """Return the logits [n, classes] of all rows by a head trained on some."""
    return retrain.train_heads(features, classes, [rows], int(classes.max()) + 1, chosen)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Coverage
# ----------------------------------------------------------------------------------------------------------------------


def gaussian_classes(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features [5 * count, 64] and classes of five Gaussian classes, of which some overlap."""
    middles = random.normal(size=(5, 64)) * random.uniform(0.15, 0.6)
    classes = np.repeat(np.arange(5), count)
    return ((middles[classes] + random.normal(size=(len(classes), 64))) * 2).astype(np.float32), classes


def one_repeat(features, classes, per_class: int, seed: int) -> tuple[bool, bool, float]:
    """Draw a set, train and examine it; tell whether each interval (cross-validation, test) holds the truth.

    The truth is the accuracy of the trained head on all that was not drawn. Also returns the width of the first.
    """
    random, held_out = np.random.default_rng([seed, per_class]), max(1, round(per_class / 10))
    drawn = [random.permutation(np.flatnonzero(classes == c)) for c in range(5)]
    testing, fresh = (
        np.concatenate([rows[part] for rows in drawn]) for part in (slice(held_out), slice(per_class, None))
    )
    known = np.concatenate([rows[held_out:per_class] for rows in drawn])
    training = np.concatenate([rows[2 * held_out : per_class] for rows in drawn])
    right = trained(features, classes, training, settings(seed)).argmax(axis=1) == classes
    truth = np.mean([right[fresh][classes[fresh] == c].mean() for c in range(5)])
    validated = retrain.cross_validate(features[known], classes[known], np.arange(len(known)), 5, settings(seed))
    intervals = validated.accuracy.interval, retrain.Share(right[testing].mean(), len(testing)).interval
    return *(low <= truth <= high for low, high in intervals), intervals[0][1] - intervals[0][0]


def coverage(sets: Sets, repeats: int) -> None:
    """Print how often the intervals hold the true accuracy: 90 to 99 % are wanted."""
    flowers = sets.load("flowers_small")
    components = retrain.reduced(flowers.features)
    print(
        "coverage: | features | images per class | cross-validation holds the truth | its width | the test holds it |"
    )
    for kind in ("gaussian", "flowers_small"):
        for per_class in (10, 30, 100):
            found = []
            for seed in range(repeats):
                features, classes = components, flowers.classes
                if kind == "gaussian":
                    features, classes = gaussian_classes(np.random.default_rng([seed, per_class, 0]), per_class + 400)
                found.append(one_repeat(features, classes, per_class, seed))
            cross, test, width = np.mean(found, axis=0)
            print(f"coverage: | {kind} | {per_class} | {cross:.1%} | {width:.1%} | {test:.1%} |", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong labels, copies, unknown pictures, calibration
# ----------------------------------------------------------------------------------------------------------------------


def ants_and_bees(sets: Sets) -> tuple[Set, Set]:
    """Return the training and validation sets of ants and bees."""
    return sets.load("ants_bees/train"), sets.load("ants_bees/val")


def noise(sets: Sets, repeats: int) -> None:
    """Print how many of 10 % flipped labels the doubtful list finds, and how many of its lines are such."""
    print("noise: | set | images | flipped | listed | of the flipped are found | of the listed are flipped |")
    for name in ("ants_bees/train", "cats_dogs", "flowers_small"):
        photographs, figures = sets.load(name), []
        components, count = retrain.reduced(photographs.features), len(photographs.classes)
        for seed in range(min(repeats, 5)):
            random = np.random.default_rng(seed)
            flipped, classes = random.permutation(count)[: count // 10], photographs.classes.copy()
            classes[flipped] += random.integers(1, photographs.class_count, len(flipped))
            classes %= photographs.class_count
            validated = retrain.cross_validate(
                components, classes, np.arange(count), photographs.class_count, settings(seed)
            )
            temperature = retrain.fit_temperature(validated.logits, classes)
            doubts = retrain.doubtful_labels(validated.probabilities(temperature), classes)
            both = len({doubt.row for doubt in doubts} & set(flipped.tolist()))
            figures.append((len(flipped), len(doubts), both / len(flipped), both / max(1, len(doubts))))
        flips, listed, found, right = np.mean(figures, axis=0)
        print(f"noise: | {name} | {count} | {flips:.0f} | {listed:.0f} | {found:.0%} | {right:.0%} |", flush=True)


def copy_of(image: PIL.Image.Image, kind: str, random: np.random.Generator) -> tuple[PIL.Image.Image, int]:
    """Return a changed copy of a picture, and the quality to save it with."""
    width, height = image.size
    if kind == "recompressed":
        return image, 40
    if kind == "rescaled to 60 %":
        return image.resize((int(width * 0.6), int(height * 0.6)), PIL.Image.Resampling.BICUBIC), 90
    if kind == "cropped":  # up to 12 % of each side length, at any place
        kept = random.uniform(0.88, 0.96, 2)
        left, top = (1 - kept) * random.uniform(size=2)
        return image.crop(
            (int(left * width), int(top * height), int((left + kept[0]) * width), int((top + kept[1]) * height))
        ), 90
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), 90


def duplicates(sets: Sets, repeats: int) -> None:
    """Print how many of 50 planted copies among 1,000 photographs are found, and how many pairs that are none."""
    kinds = ("recompressed", "rescaled to 60 %", "cropped", "mirrored")
    originals, random = sets.one_each(), np.random.default_rng(0)
    chosen = random.permutation(len(originals.images))[:50]
    with tempfile.TemporaryDirectory() as folder:
        copies = []
        for i, row in enumerate(chosen):
            with PIL.Image.open(originals.images[row].path) as image:
                changed, quality = copy_of(image.convert("RGB"), kinds[i % 4], random)
            path = Path(folder, f"{i:02}.jpg")
            changed.save(path, quality=quality)
            copies.append(retrain.Image(path, "copy"))
        store = retrain.BottleneckStore(f"{folder}/bottleneck", sets.base, retrain.Reading())
        features = np.concatenate([originals.features, retrain.compute_bottlenecks(store, copies)[0][:, 0]])
        start = time.perf_counter()
        pairs = retrain.near_duplicates(features, [*originals.images, *copies])
        took = time.perf_counter() - start
    planted = {(int(row), len(originals.images) + i) for i, row in enumerate(chosen)}
    found = {(pair.first, pair.second) for pair in pairs}
    parts = [
        f"{sum((row, 1000 + i) in found for i, row in list(enumerate(chosen))[k::4])} {kinds[k]}" for k in range(4)
    ]
    others = f"{len(found - planted)} other pairs, {took:.1f} s"
    print(f"duplicates: {len(found & planted)} of 50 found ({', '.join(parts)}), {others}")


def unknown(sets: Sets, repeats: int) -> None:
    """Print the share of 500 photographs of neither class that are called ants or bees without `unsure`."""
    training, validation = ants_and_bees(sets)
    others = sets.one_each()
    neither = [row for row, image in enumerate(others.images) if not image.path.name.startswith(KNOWN_SYNSETS)]
    others = others.some(np.random.default_rng(0).permutation(neither)[:500])
    rows = retrain.Rows(training.features, np.arange(len(training.classes)), training.classes)
    material = retrain.gather_material(training.images, training.features, rows, settings(0))
    for share in (0.9, 0.93, 0.95):
        examination = retrain.examine(material, 2, settings(0), share)
        head = retrain.train_head(rows, rows, 2, settings(0))[0].cooled(examination.temperature)

        def named(photographs: Set, head=head, familiar=examination.familiar) -> np.ndarray:
            return ~familiar.unsure(photographs.features, head.probabilities(photographs.features))

        right = head.probabilities(validation.features).argmax(axis=1) == validation.classes
        print(
            f"unknown: coverage {share}: named without `unsure` {named(others).mean():.1%} of {len(others.classes)} "
            f"others (classic: 100.0%), and {named(validation)[right].mean():.1%} of the {right.sum()} right answers "
            f"on ants_bees/val (classic: 100.0%); accuracy of the named {right[named(validation)].mean():.1%}, of all "
            f"{right.mean():.1%}"
        )


def calibration(sets: Sets, repeats: int) -> None:
    """Print the expected calibration error on pictures that neither training nor temperature saw."""
    training, validation = ants_and_bees(sets)
    cats_dogs = sets.load("cats_dogs")
    print("calibration: | set | steps | temperature | error of the classic head | after |")
    for name, known, fresh in (
        ("ants_bees/val", [training] * 5, [validation] * 5),
        ("cats_dogs", *zip(*(halves(cats_dogs, seed) for seed in range(5)), strict=True)),
    ):
        for steps in (200, 4000):
            figures = []
            for seed, (own, other) in enumerate(zip(known, fresh, strict=True)):
                rows = retrain.Rows(own.features, np.arange(len(own.classes)), own.classes)
                chosen = settings(seed, how_many_training_steps=steps)
                material = retrain.gather_material(own.images, own.features, rows, chosen)
                examination = retrain.examine(material, 2, chosen, 0.95)
                head = retrain.train_head(rows, rows, 2, chosen)[0]
                errors = [
                    retrain.calibration_error(head.cooled(t).probabilities(other.features), other.classes)
                    for t in (1.0, examination.temperature)
                ]
                figures.append((examination.temperature, *errors))
            temperature, before, after = np.mean(figures, axis=0)
            print(f"calibration: | {name} | {steps} | {temperature:.2f} | {before:.1%} | {after:.1%} |", flush=True)


def halves(photographs: Set, seed: int) -> tuple[Set, Set]:
    """Return a set in two halves, drawn at random."""
    rows = np.random.default_rng(seed).permutation(len(photographs.classes))
    return photographs.some(rows[::2]), photographs.some(rows[1::2])


# ----------------------------------------------------------------------------------------------------------------------
# Heads, and cost
# ----------------------------------------------------------------------------------------------------------------------


def heads(sets: Sets, repeats: int) -> None:
    """Print the accuracy of --head softmax and --head auto at 5, 10, 20 and all images per class."""
    print("heads: | set | images per class | softmax | auto | difference and its standard error | auto differs in |")
    for name in ("ants_bees", "cats_dogs", "flowers_small", "data"):
        parts = ants_and_bees(sets) if name == "ants_bees" else (sets.load(name),)
        components = retrain.reduced(np.concatenate([part.features for part in parts]))
        classes = np.concatenate([part.classes for part in parts])
        for per_class in (5, 10, 20, None):
            figures, differ = [], 0
            for seed in range(min(repeats, 10)):
                random = np.random.default_rng(seed)
                rows = random.permutation(len(parts[0].classes) if len(parts) > 1 else len(classes))
                kept = len(rows) if len(parts) > 1 else int(0.7 * len(rows))
                fresh = np.setdiff1d(np.arange(len(classes)), rows[:kept])
                chosen = np.concatenate(
                    [rows[:kept][classes[rows[:kept]] == c][:per_class] for c in range(classes.max() + 1)]
                )
                known = retrain.Rows(components, chosen, classes[chosen])
                material = retrain.Material(known, components[chosen], np.arange(len(chosen)), [])
                auto = retrain.choose_settings(material, classes.max() + 1, settings(seed))
                differ += auto != settings(seed)
                logits = [trained(components, classes, chosen, how)[fresh] for how in (settings(seed), auto)]
                figures.append([(made.argmax(axis=1) == classes[fresh]).mean() for made in logits])
            softmax, better = np.mean(figures, axis=0)
            gains = np.diff(figures, axis=1)
            error = gains.std(ddof=1) / np.sqrt(len(gains))
            print(
                f"heads: | {name} | {per_class or 'all'} | {softmax:.2%} | {better:.2%} | {gains.mean():+.2%} "
                f"({error:.2%}) | {differ} of {len(gains)} |",
                flush=True,
            )


def cost(sets: Sets, repeats: int) -> None:
    """Print what head auto and the report add to a run on 2,500 images of five classes, in a process of its own."""
    flowers = sets.load("flowers_small")
    rows = np.sort(np.random.default_rng(0).permutation(len(flowers.classes))[:2500])
    some = flowers.some(rows)
    images = retrain.assign_splits(some.images, 10, 10)
    labels = sorted({image.label for image in images})
    wide = np.tile(some.features, (1, -(-2048 // some.features.shape[1])))[:, :2048]
    noisy = wide + np.random.default_rng(0).normal(size=wide.shape).astype(np.float32) * wide.std() / 10
    parts = {split: retrain.rows_of(split, images, noisy, labels) for split in ("training", "validation", "testing")}
    known = parts["training"], parts["validation"]
    both = [np.concatenate([getattr(rows, name) for rows in known]) for name in ("rows", "classes")]
    retrain.import_tensorflow()  # as the export needs it anyway
    for steps in (200, 4000):
        chosen = settings(0, how_many_training_steps=steps)
        head, history = retrain.train_head(parts["training"], parts["validation"], len(labels), chosen)
        test = retrain.evaluate(head, parts["testing"], -1, 0)
        with tempfile.TemporaryDirectory() as folder:
            flags = retrain.parse_flags(
                ["--summaries_dir", f"{folder}/logs", "--output_report", f"{folder}/report.png"]
            )
            start, processor = time.perf_counter(), time.process_time()
            material = retrain.gather_material(images, noisy, retrain.Rows(noisy, *both), chosen)
            gathered = time.perf_counter()
            chosen = retrain.choose_settings(material, len(labels), chosen)
            settled = time.perf_counter()
            examination = retrain.examine(material, len(labels), chosen, 0.95)
            examined = time.perf_counter()
            report = retrain.make_report(labels, images, history, examination, head, parts["testing"], test)
            retrain.write_report(flags, report, noisy)
            end, processor = time.perf_counter(), time.process_time() - processor
        print(
            f"cost: {steps} steps, {len(images)} images, {noisy.shape[1]} features: {end - start:.1f} s "
            f"({processor:.1f} s of processor time), duplicates and components {gathered - start:.1f}, --head auto "
            f"{settled - gathered:.1f}, cross-validation and the rest "
            f"{examined - settled:.1f}, writing {end - examined:.1f}; {len(examination.validated.logits)} repeats of "
            f"{examination.validated.folds.max() + 1} folds, {len(examination.curve.accuracies[0])} draws a point",
            flush=True,
        )


CHECKS: dict[str, Callable[[Sets, int], None]] = {
    check.__name__: check for check in (coverage, noise, duplicates, unknown, calibration, heads, cost)
}


def main() -> int:
    """Run the checks that the command line names; return the exit code."""
    parser = retrain.Parser(prog="truth.py", description="Check what the report claims, where the truth is known.")
    parser.add_argument("checks", nargs="+", choices=list(CHECKS), help="what to check")
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared/photos", help="a folder of sets")
    parser.add_argument("--model_dir", type=Path, default=ROOT / "inception_model", help="where the base model lies")
    parser.add_argument("--architecture", default="efficientnet_lite2", help="as retrain.py's")
    parser.add_argument("--bottleneck_dir", type=Path, default=Path("truth_bottlenecks"), help="keeps the features")
    parser.add_argument("--repeats", type=int, default=300, help="of the coverage")
    flags: argparse.Namespace = parser.parse_args()
    retrain.set_up_logging("WARN")
    sets = Sets(flags.photos, flags.model_dir, flags.architecture, flags.bottleneck_dir)
    for name in flags.checks:
        CHECKS[name](sets, flags.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(retrain.exit_code("truth.py", main))
