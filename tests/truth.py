#!/usr/bin/env python3
"""Check what the diagnostics claim, where the truth is known, and print the tables of tests/README.md.

    python tests/truth.py --architecture efficientnet_lite2 bursts noise

coverage     how often the 95 % intervals hold the true accuracy: independent images, uneven groups, 400 against 15
bursts       60 scenes of 30 shaken frames, classes by chance: what is claimed where the truth is 50 %
gain         how often the range for twice as many images holds what they bring
noise        how many of the labels flipped on purpose are found
copies       how many planted copies are found, and how many pairs that are none
unknown      what becomes of photographs of none of the classes
calibration  how far scores are from how often they are right, before and after
stages       whether coarse images of which 30 % are wrong help a few good ones, in two stages
cues         whether planted brightness, sharpness and size raise the alarm, and photographs as they are don't
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # many small products; before numpy is loaded

import numpy as np
import PIL.Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import retrain  # noqa: E402  (it lies in the folder above)
from retrain import HeldOut, Image, Proportion, Rows  # noqa: E402

KNOWN_SYNSETS = ("n02206856", "n02219486")  # the ImageNet classes that are ants or bees: no unknown ones to those


class Set(NamedTuple):
    """Photographs with their features float32 [n, size], classes int [n] and cues float32 [n, 5]."""

    images: list[Image]
    features: np.ndarray
    classes: np.ndarray
    cues: np.ndarray


class Sets:
    """The sets of photographs by name, as a base model sees them; features are kept in a folder."""

    def __init__(self, photos: Path, architecture: str, model_dir: Path, kept: Path):
        self.photos, self.kept = photos, kept
        kept.mkdir(parents=True, exist_ok=True)
        recipe = retrain.find_recipe(architecture, "", model_dir)
        self.base = retrain.load_base_model(recipe, model_dir, kept)

    def compute(self, images: list[Image], name: str) -> Set:
        """Return images with their features, from the file of that name if there is one."""
        path = self.kept / f"{name}.npz"
        if not path.exists():
            store = retrain.BottleneckStore(str(self.kept / "bottleneck" / name), self.base, retrain.Reading())
            features, measured, _ = retrain.compute_bottlenecks(store, images)
            np.savez(path, features=features[:, 0], cues=measured)
        with np.load(path) as arrays:
            features, measured = arrays["features"], arrays["cues"]
        return Set(images, features, np.unique([image.label for image in images], return_inverse=True)[1], measured)

    def load(self, name: str) -> Set:
        """Return a set of class folders, such as cats_dogs or ants_bees/train."""
        return self.compute(list(retrain.list_images(str(self.photos / name))), name.replace("/", "_"))

    def one_each(self) -> Set:
        """Return the thousand photographs of as many classes."""
        paths = sorted((self.photos / "imagenet_one_each").rglob("*.jp*g"))
        return self.compute([Image(path, path.stem) for path in paths], "one_each")


def settings(seed: int, steps: int = 200) -> retrain.TrainingSettings:
    """Return how the heads are trained, without a word."""
    return retrain.TrainingSettings(how_many_training_steps=steps, random_seed=seed, eval_step_interval=0)


def trained(features: np.ndarray, classes: np.ndarray, rows: np.ndarray, seed: int, steps: int = 200) -> retrain.Head:
    """Return a head trained on some rows."""
    nothing = Rows(features, rows[:0], classes[:0])
    return retrain.train_head(Rows(features, rows, classes[rows]), nothing, classes.max() + 1, settings(seed, steps))[0]


def validated(features, classes, rows, groups, seed: int, steps: int = 200) -> HeldOut:
    """Return the cross-validation of some rows; groups: int [rows]."""
    known = Rows(features, rows, classes[rows])
    made = retrain.cross_validate(known, groups, settings(seed, steps), retrain.train_head)
    assert made is not None
    return made


def holds(claim: Proportion, truth: float) -> bool:
    """Tell whether the interval holds the truth."""
    return claim.low <= truth <= claim.high


def thinner(features: np.ndarray, count: int = 256) -> np.ndarray:
    """Return features in their first principal directions: the same to gradient descent, and eight times as fast."""
    from sklearn.utils.extmath import randomized_svd

    left, values, _ = randomized_svd(features, count, n_iter=2, random_state=0)
    return np.ascontiguousarray(left * values, np.float32)


def mean_by_class(right: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> float:
    """Return the accuracy on images of which `weights`, float [classes], belong to each class."""
    recalls = [right[classes == c].mean() for c in range(len(weights))]
    return float(np.average(recalls, weights=weights))


def gaussian(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features [20000, 64] and classes of five Gaussian classes, so many that the truth has no noise."""
    random = np.random.default_rng(seed)
    middles = random.normal(size=(5, 64)) * random.uniform(0.15, 0.6)
    classes = np.repeat(np.arange(5), 4000)
    return ((middles[classes] + random.standard_normal((20_000, 64), np.float32)) * 2).astype(np.float32), classes


def uneven_copies(features, classes, rows, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return features, classes, rows and groups in which each of the rows has become a scene of 1 to 60 frames."""
    random = np.random.default_rng(seed)
    times = np.minimum(random.geometric(0.25, len(rows)) ** 2, 60)
    groups = np.repeat(np.arange(len(rows)), times)
    frames = features[rows][groups]
    frames = frames + 0.05 * np.abs(frames).mean() * random.normal(size=frames.shape).astype(np.float32)
    return (
        np.concatenate([features, frames]), np.concatenate([classes, classes[rows][groups]]),
        len(features) + np.arange(len(groups)), groups,
    )  # fmt: skip


def coverage_trial(kind: str, features, classes, counts: np.ndarray, seed: int) -> tuple[bool, bool, float]:
    """Tell whether the intervals of cross-validation and test hold the truth, and how wide the first is.

    counts: int [classes], of each drawn to know; as many more by a fifth are drawn to test. The truth is the accuracy
    of the head that all known rows train, on what was not drawn, with classes as frequent as drawn.
    """
    random = np.random.default_rng(seed)
    drawn = [random.permutation(np.flatnonzero(classes == c)) for c in range(len(counts))]
    rows = np.concatenate([some[:count] for some, count in zip(drawn, counts, strict=True)])
    test_counts = np.maximum(1, counts // 5)
    ends = list(zip(drawn, counts, test_counts, strict=True))
    testing = np.concatenate([some[count : count + more] for some, count, more in ends])
    fresh = np.concatenate([some[count + more :] for some, count, more in ends])
    groups, groups_test = np.arange(len(rows)), np.arange(len(testing))
    weights = counts.astype(float)
    if kind == "uneven":
        features, classes, rows, groups = uneven_copies(features, classes, rows, seed)
        features, classes, testing, groups_test = uneven_copies(features, classes, testing, seed + 10**6)
        weights = np.bincount(classes[rows], minlength=len(counts)).astype(float)
    right = trained(features, classes, rows, seed).logits(features).argmax(axis=1) == classes
    claim = validated(features, classes, rows, groups, seed).accuracy
    truth = mean_by_class(right[fresh], classes[fresh], weights)
    test_truth = mean_by_class(right[fresh], classes[fresh], np.bincount(classes[testing], minlength=len(counts)))
    test = Proportion.of(right[testing], groups_test)
    return holds(claim, truth), holds(test, test_truth), claim.high - claim.low


def coverage(sets: Sets, repeats: int) -> None:
    """Print how often the intervals hold the true accuracy: 90 to 99 % are wanted, more where there are groups."""
    flowers = sets.load("flowers_small")
    photographs = thinner(flowers.features), flowers.classes
    plans = [(f"{n} of each class", "plain", np.full(5, n)) for n in (10, 30, 100)]
    plans += [("30 scenes of each class, 1 to 60 frames", "uneven", np.full(5, 30))]
    plans += [("400 against 15", "plain", np.array([400, 15]))]
    print("coverage: | features | images | cross-validation holds the truth | its width | the test holds it |")
    for name, kind, counts in plans:
        # Of two classes of flowers too few would be left to know the truth by.
        for source in ("gaussian", "flowers_small")[: len(counts) - 1]:
            found = []
            for seed in range(repeats):
                features, classes = gaussian(seed) if source == "gaussian" else photographs
                some = classes < len(counts)
                found.append(coverage_trial(kind, features[some], classes[some], counts, seed))
            cross, test, width = np.mean(found, axis=0)
            print(f"coverage: | {source} | {name} | {cross:.1%} | {100 * width:.0f} points | {test:.1%} |", flush=True)


def shaken(image: PIL.Image.Image, random: np.random.Generator) -> PIL.Image.Image:
    """Return the next frame of a burst: moved, turned and lit a little otherwise."""
    width, height = image.size
    side, light = random.uniform(0.93, 0.99), random.normal(1, 0.05)
    x, y = random.uniform(0, 1 - side, 2)
    turned = image.rotate(random.normal() * 1.5, PIL.Image.Resampling.BILINEAR)
    frame = turned.crop((int(x * width), int(y * height), int((x + side) * width), int((y + side) * height)))
    return frame.point(lambda value: min(255, int(value * light)))


def bursts(sets: Sets, repeats: int) -> None:
    """Print what is claimed of 60 scenes of 30 shaken frames whose classes are given by chance: 50 % is the truth."""
    random, images = np.random.default_rng(3), []
    originals = sets.one_each().images
    with tempfile.TemporaryDirectory() as folder:
        for scene, row in enumerate(random.permutation(len(originals))[:100]):
            with PIL.Image.open(originals[row].path) as image:
                whole = image.convert("RGB")
            for frame in range(30):
                path = Path(folder, f"{scene:03}_{frame:02}.jpg")
                if not (sets.kept / "bursts.npz").exists():
                    shaken(whole, random).save(path, quality=85)
                images.append(Image(path, f"{scene:03}"))
        frames = sets.compute(images, "bursts")
        groups, _ = retrain.find_groups(frames.features, images)
    print(f"bursts: 100 scenes of 30 frames make {len(np.unique(groups))} groups")
    features, found, tests, extremes = thinner(frames.features), [], [], []
    for seed in range(repeats):
        random = np.random.default_rng(seed)
        rows = np.flatnonzero(np.isin(frames.classes, random.permutation(100)[:60]))
        classes = random.integers(2, size=100)[frames.classes]
        claim = validated(features, classes, rows, groups[rows], seed).accuracy
        testing = random.random(len(rows)) < 0.1
        clean = ~np.isin(groups[rows[testing]], groups[rows[~testing]])
        found.append(holds(claim, 0.5))
        tests.append(clean.sum())
        extremes.append((claim.value, claim.effective))
    values, effective = np.array(extremes).T
    print(
        f"bursts: of {repeats} seeds {np.mean(found):.0%} of the intervals hold 50 %; claimed {values.mean():.1%} in "
        f"the mean ({values.min():.1%} to {values.max():.1%}), worth {effective.mean():.0f} independent images; "
        f"{np.mean(tests):.1f} of 180 test images are left as tests"
    )


def gain(sets: Sets, repeats: int) -> None:
    """Print how often the range for twice as many images holds what these bring, and how wide it is."""
    flowers = sets.load("flowers_small")
    features, found = thinner(flowers.features), []
    for seed in range(repeats):
        random, per_class = np.random.default_rng(seed), (15, 30, 60, 120)[seed % 4]
        drawn = [random.permutation(np.flatnonzero(flowers.classes == c)) for c in range(5)]
        once, twice, fresh = (
            np.concatenate([rows[part] for rows in drawn])
            for part in (slice(per_class), slice(2 * per_class), slice(2 * per_class, None))
        )
        made = validated(features, flowers.classes, once, np.arange(len(once)), seed)
        known = Rows(features, once, flowers.classes[once])
        curve = retrain.learning_curve(known, made, settings(seed), retrain.train_head)
        assert curve is not None
        # The heads of a cross-validation learn from four fifths: the truth is what these gain by as many again.
        scores = []
        for rows in (once, twice):
            logits = trained(features, flowers.classes, random.permutation(rows)[: len(rows) * 4 // 5], seed).logits(
                features[fresh]
            )
            scores.append(
                mean_by_class(logits.argmax(axis=1) == flowers.classes[fresh], flowers.classes[fresh], np.ones(5))
            )
        found.append((scores[1] - scores[0], *curve.gain, curve.gain[1] < retrain.HARDLY))
    truth, low, high, hardly = np.array(found).T
    brought = 100 * truth[hardly > 0].mean() if hardly.any() else 0
    print(
        f"gain: {repeats} trials: the range holds it in {((low <= truth) & (truth <= high)).mean():.0%}, median width "
        f"{100 * np.median(high - low):.1f} points, below {(truth < low).mean():.0%}, above "
        f"{(truth > high).mean():.0%}; 'hardly' {int(hardly.sum())} times, where in truth it was {brought:+.1f} points"
    )


def noise(sets: Sets, repeats: int) -> None:
    """Print how many of 10 % flipped labels the doubtful list finds, and how many of its lines are such."""
    print("noise: | set | images | listed | of the flipped are found | of the listed are flipped |")
    for name in ("ants_bees/train", "cats_dogs", "flowers_small"):
        photographs, figures = sets.load(name), []
        count, class_count = len(photographs.classes), int(photographs.classes.max()) + 1
        for seed in range(min(repeats, 5)):
            random = np.random.default_rng(seed)
            flipped, classes = random.permutation(count)[: count // 10], photographs.classes.copy()
            classes[flipped] = (classes[flipped] + random.integers(1, class_count, len(flipped))) % class_count
            made = validated(photographs.features, classes, np.arange(count), np.arange(count), seed)
            temperature = retrain.fit_temperature(made.logits, classes)
            doubts = retrain.mislabelled(made.cooled(temperature), [str(c) for c in range(class_count)])
            both = len({doubt.row for doubt in doubts} & set(flipped.tolist()))
            figures.append((len(doubts), both / len(flipped), both / max(1, len(doubts))))
        listed, found, right = np.mean(figures, axis=0)
        print(f"noise: | {name} | {count} | {listed:.0f} | {found:.0%} | {right:.0%} |", flush=True)


def copy_of(image: PIL.Image.Image, kind: str, random: np.random.Generator) -> tuple[PIL.Image.Image, int]:
    """Return a changed copy of an image, and the quality to save it with."""
    width, height = image.size
    if kind == "recompressed":
        return image, 40
    if kind == "rescaled to 60 %":
        return image.resize((int(width * 0.6), int(height * 0.6)), PIL.Image.Resampling.BICUBIC), 90
    if kind == "cropped":  # up to 12 % of each side length, at any place
        side = random.uniform(0.88, 0.96, 2)
        left, top = (1 - side) * random.uniform(size=2)
        box = left * width, top * height, (left + side[0]) * width, (top + side[1]) * height
        return image.crop([int(edge) for edge in box]), 90
    return image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), 90


def copies(sets: Sets, repeats: int) -> None:
    """Print how many of 100 planted copies among 1,000 photographs are found, and how many pairs that are none."""
    kinds = ("recompressed", "rescaled to 60 %", "cropped", "mirrored")
    originals, random = sets.one_each(), np.random.default_rng(0)
    chosen = random.permutation(len(originals.images))[:100]
    with tempfile.TemporaryDirectory() as folder:
        planted = []
        for i, row in enumerate(chosen):
            with PIL.Image.open(originals.images[row].path) as image:
                changed, quality = copy_of(image.convert("RGB"), kinds[i % 4], random)
            planted.append(Image(Path(folder, f"{i:02}.jpg"), "copy"))
            changed.save(planted[-1].path, quality=quality)
        store = retrain.BottleneckStore(f"{folder}/bottleneck", sets.base, retrain.Reading())
        features = np.concatenate([originals.features, retrain.compute_bottlenecks(store, planted)[0][:, 0]])
        _, pairs = retrain.find_groups(features, [*originals.images, *planted])
    found = {(pair.first, pair.second) for pair in pairs}
    right = {(int(row), len(originals.images) + i) for i, row in enumerate(chosen)}
    parts = [f"{sum(second % 4 == k for _, second in found & right)} {kind}" for k, kind in enumerate(kinds)]
    print(f"copies: {len(found & right)} of 100 found ({', '.join(parts)}), {len(found - right)} other pairs")


def unknown(sets: Sets, repeats: int) -> None:
    """Print the share of photographs of neither class that are called ants or bees without `unsure`: means of seeds."""
    training, validation, others = sets.load("ants_bees/train"), sets.load("ants_bees/val"), sets.one_each()
    neither = [row for row, image in enumerate(others.images) if not image.path.name.startswith(KNOWN_SYNSETS)]
    every = np.arange(len(training.classes))
    for share in (0.9, 0.93, 0.95):
        figures = []
        for seed in range(10):
            made = validated(training.features, training.classes, every, every, seed)
            temperature = retrain.fit_temperature(made.logits, training.classes)
            head = trained(training.features, training.classes, every, seed).cooled(temperature)
            right = head.logits(validation.features).argmax(axis=1) == validation.classes
            familiar = retrain.become_familiar(training.features, made.cooled(temperature), share)

            def named(features: np.ndarray, familiar=familiar, head=head) -> np.ndarray:
                best = retrain.softmax(head.logits(features)).max(axis=1)
                scores = [[("a", score), ("b", 1 - score)] for score in best]
                judged = zip(familiar.likeness(features), scores, strict=True)
                return np.array([not familiar.reason(*each) for each in judged])

            figures.append([named(others.features[neither]).mean(), named(validation.features)[right].mean()])
        (wrongly, rightly), (_, spread) = np.mean(figures, axis=0), np.std(figures, axis=0)
        print(
            f"unknown: coverage {share}: called ants or bees are {wrongly:.1%} of {len(neither)} others, and named "
            f"{rightly:.1%} (spread of ten seeds {spread:.1%}) of the right answers"
        )


def calibration(sets: Sets, repeats: int) -> None:
    """Print the calibration error on images that neither training nor temperature saw."""
    print("calibration: | set | steps | temperature | error before | after |")
    for name in ("ants_bees/train", "cats_dogs"):
        photographs = sets.load(name)
        for steps in (200, 4000):
            figures = []
            for seed in range(5):
                rows = np.random.default_rng(seed).permutation(len(photographs.classes))
                own, other = rows[::2], rows[1::2]
                made = validated(photographs.features, photographs.classes, own, own, seed, steps)
                temperature = retrain.fit_temperature(made.logits, made.classes)
                head = trained(photographs.features, photographs.classes, own, seed, steps)
                logits, every = head.logits(photographs.features[other]), np.arange(len(other))
                fresh = HeldOut(other, photographs.classes[other], logits, every, every)
                cooled = fresh.cooled(temperature)
                figures.append((temperature, fresh.calibration_error, cooled.calibration_error))
            temperature, before, after = np.mean(figures, axis=0)
            print(f"calibration: | {name} | {steps} | {temperature:.2f} | {before:.1%} | {after:.1%} |", flush=True)


def cues(sets: Sets, repeats: int) -> None:
    """Print which cue raises the alarm in photographs as they are, and where one is planted in the first class."""
    planted = {
        "nothing": {},
        "darkened by half": {0: 0.5, 1: 0.5, 2: 0.25},
        "sharper": {2: 6},
        "other camera": {3: 3, 4: 3},
    }
    for name in ("ants_bees/train", "cats_dogs", "flowers_small"):
        photographs = sets.load(name)
        every = np.arange(len(photographs.classes))
        folds = retrain.held_out_folds(photographs.classes, every, 0)
        logits = np.zeros((len(every), photographs.classes.max() + 1), np.float32)
        made = HeldOut(every, photographs.classes, logits, every, folds)
        for what, factors in planted.items():
            measured = photographs.cues.copy()
            for column, factor in factors.items():
                measured[photographs.classes == 0, column] *= factor
            cue, accuracy = retrain.spurious_cue(measured, made)
            print(f"cues: {name}, {what}: {cue or 'no alarm'} ({accuracy:.0%}, chance 50%)")


def stages(sets: Sets, repeats: int) -> None:
    """Print the accuracy on 60 held-out images of each class of stage one, of a few good images, and of both stages."""
    print("stages: | set | good images of each class | stage one | good images alone | both stages |")
    for name in ("cats_dogs", "flowers_small"):
        photographs = sets.load(name)
        features, classes, count = photographs.features, photographs.classes, int(photographs.classes.max()) + 1
        for good in (5, 10, 20):
            found = []
            for seed in range(min(repeats, 10)):
                random = np.random.default_rng(seed)
                drawn = [random.permutation(np.flatnonzero(classes == c))[:200] for c in range(count)]
                held_out, few, many = (
                    np.concatenate([rows[part] for rows in drawn])
                    for part in (slice(60), slice(60, 60 + good), slice(80, None))
                )
                noisy, wrong = classes[many].copy(), random.random(len(many)) < 0.3
                noisy[wrong] = random.permutation(noisy[wrong])
                coarse, training = Rows(features, many, noisy), Rows(features, few, classes[few])
                asked, nothing = settings(seed, 300), Rows(features, few[:0], few[:0])
                first, second = asked.stages(True)
                base, _ = retrain.train_head(coarse, nothing, count, first)
                alone, _ = retrain.train_head(training, nothing, count, asked)
                both, _ = retrain.train_head(training, nothing, count, second, base=base, coarse=coarse)
                right = [
                    head.logits(features[held_out]).argmax(axis=1) == classes[held_out] for head in (base, alone, both)
                ]
                found.append([values.mean() for values in right])
            print(
                f"stages: | {name} | {good} | {' | '.join(f'{value:.1%}' for value in np.mean(found, axis=0))} |",
                flush=True,
            )


CHECKS: dict[str, Callable[[Sets, int], None]] = {
    check.__name__: check for check in (coverage, bursts, gain, noise, copies, unknown, calibration, stages, cues)
}


def main() -> int:
    """Run the checks that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="truth.py", description="Check what the diagnostics claim.")
    parser.add_argument("checks", nargs="+", choices=list(CHECKS), help="what to check")
    parser.add_argument("--photos", type=Path, default=ROOT.parent / "shared/photos", help="a folder of sets")
    parser.add_argument("--architecture", default="efficientnet_lite2", help="the base model, as of retrain.py")
    parser.add_argument("--model_dir", type=Path, default=ROOT / "inception_model", help="where the base model lies")
    parser.add_argument("--kept", type=Path, default=Path("truth_features"), help="a folder that keeps the features")
    parser.add_argument("--repeats", type=int, default=200, help="of coverage, bursts and gain")
    flags = parser.parse_args()
    retrain.set_up_logging("WARN")
    sets = Sets(flags.photos, flags.architecture, flags.model_dir, flags.kept)
    for name in flags.checks:
        CHECKS[name](sets, flags.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(retrain.exit_code("truth.py", main))
