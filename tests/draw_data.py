#!/usr/bin/env python3
"""Draw the small example data set: animals, flowers, guitars, houses and planes.

    python tests/draw_data.py --output DIR [--seed 0] [--force]

writes 40 pictures of every class to DIR/data/<class>/<class>_01.jpg ... and 2 more of every class, meant to be
predicted, to DIR/test_images/<class>_41.jpg ... It needs Pillow and NumPy. The same seed gives the same bytes as
long as Pillow and NumPy stay the same.

Every picture is a figure (what the class is about) pasted on a background. The backgrounds, the light, the clutter
and the camera faults come from one pool for all classes, so that only the shape and the texture of the figure tell
the classes apart.
"""

import argparse
import colorsys
import io
import math
import os
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

TRAINING_COUNT = 40
TEST_COUNT = 2
FRAME_SIZES = ((320, 240), (320, 240), (240, 320), (300, 300), (360, 240), (320, 272))
OVERSAMPLING = 2  # Pillow draws hard edges: everything is drawn larger and reduced at the end
UNIT = 7  # pixels of a figure's canvas per drawing unit
CANVAS = 150 * UNIT  # figures are about 100 units large, centred on (0, 0)

WHITE, BLACK, STEEL, IVORY = (248, 247, 243), (24, 23, 26), (176, 180, 187), (238, 228, 204)
GLASS, GOLD, WOOD, PINK = (92, 122, 150), (206, 168, 84), (104, 78, 58), (214, 146, 140)


# ---------------------------------------------------------------------------------------------------------- colours


def tint(rng, saturation=(0.35, 0.85), value=(0.45, 0.95)):
    """Any hue at all, within a range of strength and lightness."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return (red * 255, green * 255, blue * 255)


def blend(first, second, share):
    """The colour that lies the given share of the way from the first to the second."""
    return tuple(a + (b - a) * share for a, b in zip(first, second, strict=True))


def dark(colour, share=0.35):
    """The colour with a share of black."""
    return blend(colour, BLACK, share)


def light(colour, share=0.35):
    """The colour with a share of white."""
    return blend(colour, WHITE, share)


# ----------------------------------------------------------------------------------------------------------- shapes
# A shape is a row of points, x to the right and y down. Fixed shapes are written as texts such as "0,0 10,0 5,8".


def points(shape):
    """A shape, as text or as numbers, as an array of two columns."""
    return np.array([pair.split(",") for pair in shape.split()] if isinstance(shape, str) else shape, float)


def mirrored(shape):
    """The points followed by their mirror image across the vertical axis: half an outline becomes a whole one."""
    half = points(shape)
    return np.vstack([half, half[::-1] * (-1, 1)])


def oval(x, y, width, height=None, angle=0.0):
    """The outline of an ellipse given its centre, its two radii and its turn in degrees."""
    turn = np.linspace(0, 2 * math.pi, 49)[:-1]
    across, down = width * np.cos(turn), (height or width) * np.sin(turn)
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.stack([x + across * cosine - down * sine, y + across * sine + down * cosine], axis=1)


def box(left, top, width, height):
    """The four corners of an upright rectangle."""
    return points([(left, top), (left + width, top), (left + width, top + height), (left, top + height)])


def curve(shape, closed=True):
    """A smooth (Catmull-Rom) line through the points."""
    way = points(shape)
    padded = np.vstack([way[-1:], way, way[:2]] if closed else [way[:1], way, way[-1:]])
    step = np.linspace(0, 1, 9)[:-1, None]
    pieces = []
    for before, start, end, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        bend = 2 * before - 5 * start + 4 * end - after
        twist = 3 * (start - end) + after - before
        pieces.append(start + 0.5 * step * (end - before + step * (bend + step * twist)))
    return np.vstack(pieces if closed else [*pieces, way[-1:]])


def limb(path, widths):
    """A round-ended tube along a path, as wide at every point as told: legs, necks, tails, stems."""
    middle = curve(path, closed=False)
    radius = np.interp(np.linspace(0, 1, len(middle)), np.linspace(0, 1, len(widths)), widths)[:, None] / 2
    along = np.gradient(middle, axis=0)
    along /= np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    side = np.stack([-along[:, 1], along[:, 0]], axis=1)
    turn = np.linspace(0, math.pi, 9)[1:-1, None]
    end = middle[-1] + radius[-1] * (np.cos(turn) * side[-1] + np.sin(turn) * along[-1])
    start = middle[0] + radius[0] * (-np.cos(turn) * side[0] - np.sin(turn) * along[0])
    return np.vstack([middle + radius * side, end, (middle - radius * side)[::-1], start])


# --------------------------------------------------------------------------------------------------------- textures
# A texture answers, for every pixel of a part, how much of the second colour shows (0 to 1). It is given the pixel's
# place in drawing units, so that bricks and planks follow the wall they are on.


def cloud(rng, shape, cell, stretch=1.0):
    """Smooth random values between about 0 and 1, with bumps as large as the cell (in pixels)."""
    rows, columns = (
        max(2, math.ceil(side / size) + 1) for side, size in ((shape[0], cell), (shape[1], cell * stretch))
    )
    grid = np.random.default_rng(rng.getrandbits(32)).random((rows, columns), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def speckled(rng, x, y):
    """Fine irregular grain, as of plaster or skin."""
    return 0.5 * cloud(rng, x.shape, 5) + 0.5 * cloud(rng, x.shape, 20)


def furry(rng, x, y):
    """Short hairs lying along the body."""
    return np.clip(0.9 * cloud(rng, x.shape, 3, 5) - 0.3 + 0.5 * cloud(rng, x.shape, 45), 0, 1)


def woolly(rng, x, y):
    """Tight curls."""
    return 0.5 * np.abs(np.sin(8 * cloud(rng, x.shape, 16)))


def leafy(rng, x, y):
    """The many small leaves of a bush."""
    return np.clip(2.2 * cloud(rng, x.shape, 12) - 0.7, 0, 1)


def striped(rng, x, y):
    """Wavy bands, as of a tiger."""
    wave = np.sin(rng.uniform(0.8, 1.3) * (x + 0.25 * y + 7 * cloud(rng, x.shape, 60)))
    return np.clip(3 * wave - 0.8, 0, 1)


def spotted(rng, x, y):
    """Islands of the second colour, as of a cow or in camouflage paint."""
    return np.clip(9 * (cloud(rng, x.shape, 55) - 0.55), 0, 1)


def dotted(rng, x, y):
    """Round dots set like bricks: seeds, fish scales."""
    pitch = rng.uniform(2.0, 3.2)
    row = np.floor(y / pitch)
    across = (x / pitch + 0.5 * (row % 2)) % 1 - 0.5
    return np.clip(2.4 - 6 * np.hypot(across, y / pitch - row - 0.5), 0, 1)


def grained(rng, x, y):
    """Growth rings of wood."""
    return 0.5 + 0.5 * np.sin(2.2 * x + 16 * cloud(rng, x.shape, 300, 0.25) + 2 * cloud(rng, x.shape, 30, 0.2))


def bricked(rng, x, y):
    """Mortar between bricks."""
    row = np.floor(y / 1.8)
    joint = ((x / 4 + 0.5 * (row % 2)) % 1 < 0.09) | ((y / 1.8) % 1 < 0.18)
    return np.where(joint, 0.9, 0.45 * cloud(rng, x.shape, 12))


def planked(rng, x, y):
    """Horizontal boards or logs."""
    return np.clip(0.25 * cloud(rng, x.shape, 5, 10) + 0.9 * ((y / 3.2) % 1) ** 4, 0, 1)


def tiled(rng, x, y):
    """Overlapping round roof tiles."""
    row = np.floor(y / 2.4)
    bulge = np.sin(math.pi * ((x / 2.6 + 0.5 * (row % 2)) % 1))
    return np.clip(1.1 * ((y / 2.4) % 1) - 0.55 * bulge + 0.35 * cloud(rng, x.shape, 14), 0, 1)


def panelled(rng, x, y):
    """Riveted metal sheets."""
    return np.where((x % 9 < 0.25) | (y % 7 < 0.25), 0.8, 0.25 * cloud(rng, x.shape, 40))


def veined(rng, x, y):
    """Fine lines running from the root of a petal or leaf to its tip, and a deeper root."""
    lines = 0.5 + 0.5 * np.sin(40 * np.arctan2(y, np.maximum(np.abs(x), 0.5)))
    return np.clip(0.35 * lines + np.exp(-np.hypot(x, y) / 6), 0, 1)


# ----------------------------------------------------------------------------------------------------------- figure


class Figure:
    """A transparent canvas on which shaded parts are laid one over the other, back to front."""

    def __init__(self, rng):
        self.rng = rng
        self.image = Image.new("RGBA", (CANVAS, CANVAS))
        self.matrix = np.array([[UNIT, 0, CANVAS / 2], [0, UNIT, CANVAS / 2]], float)
        angle = rng.uniform(-2.6, -0.5)
        self.lamp = (math.cos(angle), math.sin(angle))
        self.depth = rng.uniform(0.6, 1.0)
        self.outline = rng.choice((0, 0, 2, 3))

    def placed(self, x=0.0, y=0.0, scale=1.0, angle=0.0, stretch=(1.0, 1.0), skew=0.0):
        """The same canvas in other coordinates: moved, scaled, turned, stretched and sheared downwards along x."""
        cosine, sine = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
        turned = np.array([[cosine, -sine, x], [sine, cosine, y], [0, 0, 1]])
        deformed = np.array([[stretch[0], 0, 0], [skew, stretch[1], 0], [0, 0, 1]])
        other = object.__new__(Figure)
        other.__dict__.update(self.__dict__)
        other.matrix = self.matrix @ turned @ deformed
        return other

    def halves(self):
        """The canvas and its mirror image, for what comes in pairs."""
        return self.placed(stretch=(-1, 1)), self

    def pixels(self, shape):
        """Drawing units to pixels."""
        return points(shape) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def part(self, shape, colour, texture=None, second=None, relief=1.0, fuzzy=0.0, outline=True):
        """Lay down a filled shape, rounded by the light, patterned, with a hairy edge or an outline as told."""
        place = self.pixels(shape)
        margin = 4 + round(2 * fuzzy)
        left, top = (int(side) for side in np.clip(np.floor(place.min(axis=0)) - margin, 0, CANVAS))
        right, bottom = (int(side) for side in np.clip(np.ceil(place.max(axis=0)) + margin, 0, CANVAS))
        if right - left < 3 or bottom - top < 3:
            return
        mask = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(mask).polygon([tuple(point) for point in place - (left, top)], fill=255)
        if fuzzy:
            mask = self.frayed(mask, fuzzy)
        tone = np.broadcast_to(np.array(colour, np.float32), (bottom - top, right - left, 3))
        if texture:
            x, y = self.local(left, top, right, bottom)
            other = np.array(second if second is not None else dark(colour), np.float32)
            tone = tone + texture(self.rng, x, y)[:, :, None] * (other - tone)
        tone = tone * (1 + 0.42 * relief * self.depth * self.shine(mask))[:, :, None]
        self.image.paste(Image.fromarray(np.clip(tone, 0, 255).astype(np.uint8)), (left, top), mask)
        if outline and self.outline and not fuzzy:
            self.line(np.vstack([place, place[:1]]), self.outline, dark(colour, 0.7))

    def local(self, left, top, right, bottom):
        """The drawing coordinates of every pixel of a rectangle of the canvas."""
        column, row = np.meshgrid(np.arange(left, right), np.arange(top, bottom))
        flat = np.stack([column.ravel(), row.ravel()]) - self.matrix[:, 2:]
        x, y = np.linalg.inv(self.matrix[:, :2]) @ flat
        return x.reshape(column.shape), y.reshape(column.shape)

    def frayed(self, mask, amount):
        """The mask with its edge broken up into tufts."""
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(amount)), np.float32) / 255
        ragged = soft + 0.75 * (cloud(self.rng, soft.shape, 1 + amount, 1.3) - 0.5) > 0.5
        return Image.fromarray((ragged * 255).astype(np.uint8))

    def shine(self, mask):
        """How much every pixel faces the lamp (-1 to 1) when the mask is taken for a pillow."""
        radius = min(max(2.0, 0.2 * min(mask.size)), 34.0)
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255
        down, across = np.gradient(soft)
        return np.clip(-2.6 * radius * (across * self.lamp[0] + down * self.lamp[1]), -1, 1)

    def line(self, place, thickness, colour):
        """Draw a line through pixels."""
        fill = tuple(round(channel) for channel in colour)
        ImageDraw.Draw(self.image).line([tuple(p) for p in place], fill=fill, width=thickness, joint="curve")

    def stroke(self, shape, width, colour):
        """Draw a plain line, its width in drawing units: whiskers, strings, wires."""
        scale = math.sqrt(abs(np.linalg.det(self.matrix[:, :2])))
        self.line(self.pixels(shape), max(1, round(width * scale)), colour)

    def spot(self, x, y, radius, colour, relief=0.6):
        """A small disc: nostrils, buttons, rivets."""
        self.part(oval(x, y, radius), colour, relief=relief, outline=False)


# ----------------------------------------------------------------------------------------------------------- animal

COATS = ((150, 104, 66), (96, 72, 56), (208, 138, 70), (196, 182, 160), (120, 118, 118), (70, 66, 66), (228, 216, 196))


def coat(rng, textures=(furry, furry, furry, striped, spotted)):
    """A fur: its colour, its pattern and the colour of the pattern, as keywords for a part."""
    colour = blend(rng.choice(COATS), tint(rng), rng.uniform(0, 0.2))
    texture = rng.choice(textures)
    second = dark(colour, 0.5) if texture is furry else rng.choice((dark(colour, 0.55), light(colour, 0.7)))
    return {"colour": colour, "texture": texture, "second": second, "fuzzy": rng.choice((2, 3, 4))}


def draw_eye(figure, x, y, radius, iris=(60, 48, 42), slit=False):
    """An eye with its pupil and the lamp's reflection in it."""
    figure.part(oval(x, y, radius), iris, relief=0.4, outline=False)
    figure.part(oval(x, y, radius * (0.3 if slit else 0.62), radius * 0.85), BLACK, relief=0, outline=False)
    figure.spot(x - radius * 0.25, y - radius * 0.35, radius * 0.26, WHITE, relief=0)


# Length and height of the trunk, length and thickness of the legs, where the head is seen from the withers, its radius
# and turn, length of the snout, kinds of ear and tail.
BEASTS = {
    "cat": (44, 15, 15, 5, (5, -9), 9, 0, 0, "pointed", "long"),
    "dog": (42, 17, 19, 6, (8, -13), 9, 0, 9, "floppy", "upright"),
    "horse": (50, 22, 30, 5, (17, -22), 6.5, 32, 15, "pointed", "hair"),
    "cow": (56, 27, 19, 6.5, (12, -3), 9, 22, 10, "level", "thin"),
    "sheep": (42, 26, 14, 4, (7, -5), 7, 25, 7, "level", "stub"),
    "elephant": (54, 34, 22, 12, (9, -4), 15, 0, 0, "huge", "thin"),
    "giraffe": (36, 20, 34, 5, (17, -50), 5.5, 20, 9, "pointed", "thin"),
    "pig": (50, 29, 9, 6.5, (3, 10), 11, 8, 7, "pointed", "curl"),
}
TAILS = {
    "long": ("3,0 -9,2 -13,-9 -9,-20", [4, 3.5, 3.2, 2.6]),
    "upright": ("3,0 -5,-5 -7,-15", [5, 3.5, 2]),
    "hair": ("3,0 -5,1 -8,14 -7,28", [4, 5, 8, 3]),
    "thin": ("2,0 -3,3 -4,10 -3,17", [2, 1.6, 1.6, 3.4]),
    "stub": ("2,0 -3,3", [6, 5]),
    "curl": ("3,0 -3,-3 -5,1 -2,2 -3,-4 -7,-5", [2, 1.8, 1.6, 1.5, 1.4, 1]),
}


def hide(rng, name):
    """What a four-legged animal is covered with: its own kind of skin, or any fur."""
    own = {
        "cow": (rng.choice((WHITE, (150, 96, 62))), spotted, rng.choice((BLACK, (104, 62, 40)))),
        "sheep": (rng.choice((dark(WOOD, 0.5), (214, 198, 176))), furry, WOOD),
        "elephant": (blend((140, 136, 138), tint(rng), 0.1), speckled, None),
        "giraffe": ((226, 194, 136), spotted, (140, 86, 46)),
        "pig": (blend((220, 160, 150), tint(rng), 0.1), speckled, None),
    }
    if name not in own:
        return coat(rng)
    colour, texture, second = own[name]
    return {"colour": colour, "texture": texture, "second": second, "fuzzy": 0 if texture is speckled else 2}


def draw_beast(figure, rng, name):
    """A four-legged animal, standing or walking, from the side."""
    length, height, leg, thick, (head_x, head_y), head, turn, snout, ear, tail = BEASTS[name]
    length, height, leg = length * rng.uniform(0.9, 1.12), height * rng.uniform(0.92, 1.1), leg * rng.uniform(0.88, 1.1)
    fur, top, stride = hide(rng, name), -height / 2, rng.uniform(-0.4, 0.4) * leg
    back, front = thick * 0.9 - length / 2, length / 2 - thick * 0.9
    shaded = fur | {"colour": dark(fur["colour"], 0.3)}
    for x, step in ((back + thick, -stride), (front - thick, stride)):
        draw_leg(figure, x, step, height, leg, thick, shaded)
    path, widths = TAILS[tail]
    figure.part(limb(points(path) * (1, rng.uniform(0.7, 1.1)) + (-length / 2, -height * 0.28), widths), **fur)
    body = points("-.5,-.2 -.42,-.46 -.15,-.45 .2,-.46 .43,-.5 .53,-.1 .42,.42 .1,.5 -.2,.42 -.44,.4") * (
        length,
        height,
    )
    centre = points([(length / 2 + head_x, top + head_y)])[0]
    neck = [(front - 2, top + height * 0.42), (front + head_x * 0.5, top + head_y * 0.4), centre]
    for x, step in ((back, stride), (front, -stride)):
        draw_leg(figure, x, step, height, leg, thick, fur)
    figure.part(curve(body), **fur)
    for x in (back, front):
        figure.part(oval(x, height * 0.05, thick * 1.1, height * 0.42), outline=False, **fur)
    figure.part(limb(neck, [height * 0.75, head * 1.6, head * 1.3]), outline=False, **fur)
    if name == "sheep":
        wool = {"colour": rng.choice((IVORY, (206, 198, 186), (120, 110, 104))), "texture": woolly}
        for x, y in [*(curve(body)[::5] * 0.92), *points("-9,-4 4,-5 13,-4 0,5 -12,6 10,6"), neck[1]]:
            tuft = oval(x + rng.uniform(-2, 2), y + rng.uniform(-2, 2), rng.uniform(5, 9))
            figure.part(tuft, relief=0.5, fuzzy=4, **wool)
    if name in ("horse", "giraffe"):
        mane = limb(points(neck) - (head * 0.6, head * 0.5), [2, 5, 5])
        figure.part(mane, dark(fur["colour"], 0.65), furry, fuzzy=8)
    draw_head(figure.placed(*centre, angle=turn + rng.uniform(-8, 8)), name, head, snout, ear, fur)


def draw_leg(figure, x, step, height, leg, thick, fur):
    """One leg from the hip or shoulder to the paw."""
    ground = height / 2 + leg
    path = [
        (x, height * 0.2),
        (x - step * 0.1 - thick * 0.25, height / 2 + leg * 0.4),
        (x + step, ground - thick * 0.3),
    ]
    figure.part(limb(path, [thick * 2, thick * 1.15, thick * 0.85]), outline=False, **fur)
    paw = fur | {"colour": dark(fur["colour"], 0.4)}
    figure.part(oval(x + step + thick * 0.25, ground, thick * 0.75, thick * 0.42), **paw)


def draw_head(figure, name, head, snout, ear, fur):
    """A head seen from the side, looking to the right, around the origin."""
    skin, shaded = dark(fur["colour"], 0.6), fur | {"colour": dark(fur["colour"], 0.25)}
    if name == "cow":
        figure.part(limb("-2,-6 2,-13 8,-16", [3.4, 2.6, 0.8]), IVORY)
    figure.part(oval(0, 0, head, head * 0.92), outline=False, **fur)
    if name == "elephant":
        figure.part(limb("9,0 16,10 16,23 22,34", [14, 9, 6.5, 4.5]), **fur)
        figure.part(limb("9,9 16,17 26,16", [3, 2.6, 0.8]), IVORY)
    else:
        tip = head * 0.5 + snout
        muzzle = fur | {"colour": PINK if name in ("cow", "pig") else fur["colour"], "texture": furry, "second": skin}
        figure.part(
            limb([(head * 0.1, head * 0.15), (tip, head * 0.45)], [head * 1.5, head * 0.8]), outline=False, **fur
        )
        figure.part(oval(tip + head * 0.1, head * 0.45, head * 0.36, head * (0.6 if name == "pig" else 0.42)), **muzzle)
        figure.part(oval(tip + head * 0.3, head * 0.3, 1.5, 1.3), BLACK, outline=False)
        mouth = [(tip + head * 0.3, head * 0.62), (tip - snout * 0.4, head * 0.72), (head * 0.5, head * 0.55)]
        figure.stroke(curve(mouth, closed=False), 0.6, skin)
    draw_eye(figure, head * 0.38, -head * 0.22, max(1.3, head * 0.17))
    if ear == "pointed":
        for shift in (head * 0.28, -head * 0.32):
            tip = points([(shift - 3.5, -head * 0.5), (shift - 1.5, -head * 1.6), (shift + 3.5, -head * 0.65)])
            figure.part(curve(tip), **fur)
            figure.part(curve(tip * 0.6 + (shift * 0.4, -head * 0.33)), blend(skin, PINK, 0.7), outline=False)
    elif ear == "floppy":
        figure.part(limb(points("-.2,-.6 -.7,-.2 -.6,.7") * head, [4, 6, 4]), **shaded)
    elif ear == "level":
        figure.part(limb(points("-.3,-.6 -1,-.7 -1.5,-.4") * head, [2.5, 4.5, 2]), **shaded)
    else:
        figure.part(curve("-2,-12 -14,-16 -22,-4 -18,10 -10,17 -3,8"), dark(fur["colour"], 0.1), speckled)


def draw_face(figure, rng, name, fur):
    """A face seen from the front, about 60 units wide: cat, dog, rabbit, bear or lion."""
    skin, pale = dark(fur["colour"], 0.55), light(fur["colour"], 0.6)
    if name == "lion":
        figure.part(oval(0, 0, 40, 41), blend(fur["colour"], (110, 60, 24), 0.7), furry, fuzzy=14)
    for half in figure.halves():
        if name == "cat":
            half.part(curve("5,-20 10,-24 24,-44 28,-30 28,-10"), **fur)
            half.part(curve("13,-22 23,-37 24,-18"), PINK, outline=False)
        elif name == "rabbit":
            half.part(oval(12, -44, 8, 27, angle=rng.uniform(4, 22)), **fur)
            half.part(oval(12, -43, 4.2, 20, angle=12), PINK, outline=False)
        elif name in ("bear", "lion"):
            half.part(oval(23, -22, 10), **fur)
            half.part(oval(23, -21, 6), skin, outline=False)
    wide = {"cat": 30, "dog": 26, "rabbit": 25, "bear": 30, "lion": 27}[name]
    figure.part(curve(mirrored([(0, -27), (wide * 0.6, -23), (wide, -2), (wide * 0.8, 16), (8, 27)])), **fur)
    figure.part(oval(0, 19, 5, 4), light(pale, 0.2), relief=0.6, outline=False)
    for half in figure.halves():
        if name == "dog":
            half.part(curve("14,-24 26,-22 34,2 31,16 24,10 21,-8"), **fur | {"colour": skin})
        half.part(oval(7.5, 12, 9, 7.5), pale, furry, fuzzy=3)
        draw_eye(half, 12, -5, 4.6, *(((188, 186, 70), True) if name == "cat" else ()))
        if name in ("cat", "lion", "rabbit"):
            for rise in (-3, 1, 5):
                half.stroke([(9, 12 + rise * 0.5), (36, 11 + rise * 2)], 0.45, light(pale, 0.5))
    figure.part(curve("-5,4 5,4 0,10"), PINK if name in ("cat", "rabbit") else BLACK, outline=False)
    figure.stroke(curve("-8,14 -3,17 0,11 3,17 8,14", closed=False), 0.9, skin)


def draw_portrait(figure, rng, name):
    """A face that fills the frame."""
    draw_face(figure, rng, name, coat(rng))


def draw_sitter(figure, rng, name):
    """An animal that sits and looks at us."""
    fur = coat(rng)
    if name != "bear":
        figure.part(limb("14,40 32,38 34,22 28,12" if name == "cat" else "14,40 27,32 33,22", [6, 5, 3.5]), **fur)
    figure.part(curve(mirrored("0,-12 13,-8 18,12 24,34 16,45 0,46")), **fur)
    figure.part(oval(0, 8, 9, 16), light(fur["colour"], 0.55), furry, fuzzy=5)
    for half in figure.halves():
        half.part(oval(20, 36, 9, 10), **fur)
        half.part(limb("8,10 8,28 8,44", [9, 7, 8]), **fur)
        half.part(oval(8.5, 46, 6, 3.4), **fur | {"colour": light(fur["colour"], 0.3)})
    draw_face(figure.placed(rng.uniform(-4, 4), -24, 0.68, angle=rng.uniform(-14, 14)), rng, name, fur)


def draw_rabbit(figure, rng):
    """A rabbit crouching, from the side."""
    fur = coat(rng)
    figure.part(oval(-30, 12, 8), WHITE, furry, light(STEEL), fuzzy=6)
    figure.part(curve("-30,8 -20,-14 4,-16 20,-4 24,14 10,26 -18,26"), **fur)
    for x in (2, 14):
        lean = rng.uniform(-6, 2)
        figure.part(limb([(23, -17), (18 + lean, -32), (x + lean, -46)], [5, 10, 4]), **fur)
        figure.part(limb([(22, -19), (18 + lean, -32), (x + lean, -42)], [2, 4.5, 2]), PINK, outline=False)
    for x, y, width, height in ((27, -8, 14, 11.5), (-14, 14, 15, 13), (-8, 26, 15, 4.5)):
        figure.part(oval(x, y, width, height), **fur)
    figure.part(limb("20,10 23,20 27,27", [8, 6, 5]), **fur)
    draw_eye(figure, 30, -11, 2.6)
    figure.part(oval(40, -5, 1.8, 1.4), (196, 120, 120), outline=False)
    for rise in (-3, 0, 3):
        figure.stroke([(37, -2), (50, -1 + rise)], 0.35, light(fur["colour"], 0.6))


# Path and widths of the neck, radius of the head, length of the beak, how low the feet are.
BIRDS = {
    "songbird": ("12,-6 16,-14 19,-19", [18, 13], 10, 9, 28),
    "duck": ("15,-4 24,-12 25,-23", [14, 6, 5], 8.5, 12, 20),
    "heron": ("15,-4 28,-14 15,-28 24,-42", [14, 6, 5], 5.5, 17, 46),
}


def draw_bird(figure, rng, name):
    """A bird from the side: a songbird on its twig, a duck or a heron on long legs."""
    plume, beak = tint(rng), rng.choice(((226, 150, 40), (90, 80, 74), (214, 96, 50)))
    belly, wing = light(plume, rng.uniform(0.3, 0.8)), dark(plume, rng.uniform(0.1, 0.5))
    path, widths, size, bill, foot = BIRDS[name]
    for x in (-2, 5):
        figure.stroke([(x - 2, 8), (x - 3, foot - 10), (x, foot), (x + 5, foot + 1)], 1.8, dark(beak, 0.2))
    if name == "songbird":
        figure.part(limb("-34,31 0,29 36,33", [3, 4.4, 2.4]), WOOD, grained)
    figure.part(curve("-18,-4 -42,6 -46,13 -38,13 -14,9"), wing, veined)
    figure.part(curve("-22,0 -8,-13 12,-15 22,-4 18,10 2,17 -16,11"), plume, furry, dark(plume), fuzzy=2)
    figure.part(curve("-12,9 14,-2 20,0 16,10 2,16.5"), belly, furry, fuzzy=4)
    figure.part(limb(path, widths), plume, furry, fuzzy=2)
    head = figure.placed(*points(path)[-1])
    edges = points([(size * 0.7, -size * 0.3), (size + bill, size * 0.3), (size * 0.7, size * 0.5)])
    head.part(curve(edges) if name == "duck" else edges, beak)
    head.part(oval(0, 0, size), rng.choice((plume, dark(plume, 0.4), belly)), furry, fuzzy=2)
    draw_eye(head, size * 0.35, -size * 0.15, size * 0.22)
    for row, reach in enumerate((-36, -28, -20)):
        feather = [(10, -8 + row * 3), (-4, -9 + row * 3), (reach, 4 + row), (-8, 8 - row * 2), (6, 4 - row)]
        figure.part(curve(feather), blend(wing, belly, row * 0.3), veined)


def draw_owl(figure, rng):
    """An owl from the front, on a branch."""
    plume = blend(rng.choice(COATS), tint(rng), 0.25)
    figure.part(limb("-44,42 0,40 44,43", [5, 6, 4]), WOOD, grained)
    figure.part(curve(mirrored("0,-36 14,-34 21,-44 25,-26 27,6 18,34 0,42")), plume, furry, fuzzy=3)
    figure.part(oval(0, 16, 15, 22), light(plume, 0.6), dotted, dark(plume, 0.2), fuzzy=3)
    for half in figure.halves():
        half.part(curve("20,-12 28,4 24,34 15,22 16,2"), dark(plume, 0.4), furry)
        half.part(oval(10.5, -20, 12), light(plume, 0.5), furry, fuzzy=3)
        draw_eye(half, 10, -20, 7, iris=(226, 170, 40))
        for toe in (4, 8):
            half.part(limb([(toe, 38), (toe, 43)], [3, 2.4]), GOLD)
    figure.part("-3,-16 3,-16 0,-6", (70, 62, 50))


def draw_fish(figure, rng):
    """A fish from the side, slim or deep, with bands, spots or plain scales."""
    scales, deep, spread = tint(rng, (0.3, 0.9)), rng.uniform(10, 22), rng.uniform(13, 20)
    fin = blend(scales, tint(rng), 0.5)
    figure.part(curve(points("-24,-.2 -38,-1 -48,-.9 -41,0 -48,.9 -38,1 -24,.2") * (1, spread)), fin, veined)
    figure.part(curve([(-18, -deep * 0.4), (-12, -deep - 9), (4, -deep - 11), (22, -deep * 0.5)]), fin, veined)
    figure.part(curve([(-16, deep * 0.4), (-14, deep + 8), (0, deep * 0.7)]), fin, veined)
    body = points("-30,0 -14,-.75 10,-1 32,-.6 43,.06 32,.65 10,1 -14,.7") * (1, deep)
    texture = rng.choice((dotted, dotted, striped, spotted))
    figure.part(curve(body), scales, texture, rng.choice((light(scales, 0.6), dark(scales, 0.5))))
    figure.stroke(curve(points("22,-.62 17,0 22,.62") * (1, deep), closed=False), 1.0, dark(scales, 0.5))
    figure.part(curve("13,3 -1,0 -3,11 5,9"), fin, veined)
    figure.part(oval(31, -deep * 0.22, 4), WHITE, outline=False)
    draw_eye(figure, 31.4, -deep * 0.22, 2.8)
    figure.stroke(curve("43,2 39,4 36,3.5", closed=False), 0.9, dark(scales, 0.6))


# Of every class: the ways to draw it, each with the largest tilt in degrees that looks natural.
ANIMALS = (
    *((partial(draw_beast, name=name), 5) for name in BEASTS),
    *((partial(draw_portrait, name=name), 10) for name in ("cat", "dog", "rabbit", "bear", "lion")),
    *((partial(draw_sitter, name=name), 4) for name in ("cat", "dog", "bear")),
    *((partial(draw_bird, name=name), 8) for name in BIRDS),
    *((draw_owl, 4), (draw_rabbit, 5), (draw_fish, 20), (draw_fish, 20)),
)


# ----------------------------------------------------------------------------------------------------------- flower

PETALS = {
    "round": "0,.15 .4,.8 .75,1 .97,.5",
    "pointed": "0,.15 .35,.9 .65,.8 .92,.15 1.03,0",
    "notched": "0,.12 .45,.75 .8,1.1 1,.55 .9,0",
    "narrow": "0,.4 .4,.75 .8,.8 .98,.3",
}


def green(rng):
    """A leaf's colour."""
    return blend((84, 128, 62), tint(rng), rng.uniform(0, 0.25))


def bright(rng):
    """A petal's colour: any but a leaf's green."""
    hue = rng.choice(
        (rng.uniform(-0.28, 0.02), rng.uniform(-0.1, 0.02), rng.uniform(0.08, 0.16), rng.uniform(0.55, 0.72))
    )
    colour = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.15, 0.85), rng.uniform(0.75, 1))
    return tuple(channel * 255 for channel in colour)


def petal(kind, length, width):
    """The outline of one petal that grows from the origin to the right."""
    half = points(PETALS[kind]) * (length, width)
    return curve(np.vstack([half, half[::-1] * (1, -1)]))


def draw_bloom(figure, rng, radius, colour):
    """An open flower seen from above, of one to three rings of petals around a disc."""
    kind = rng.choice(tuple(PETALS))
    count = rng.randint(11, 20) if kind == "narrow" else rng.randint(4, 9)
    width = min(radius * (2.4 if kind == "narrow" else 2.9) / count * rng.uniform(0.8, 1.15), radius * 0.45)
    root = rng.choice((dark(colour, 0.4), light(colour, 0.6), bright(rng)))
    for ring in range(rng.choice((1, 1, 2, 2, 3))):
        for index in range(count):
            blade = petal(kind, radius * (1 - 0.24 * ring) * rng.uniform(0.92, 1.05), width * (1 - 0.12 * ring))
            turned = figure.placed(angle=(index + 0.5 * ring) * 360 / count + rng.uniform(-5, 5))
            turned.part(blade, light(colour, 0.1 * ring), veined, root)
    disc = rng.choice(((222, 176, 50), (96, 62, 38), (150, 160, 60), (60, 44, 52)))
    seeds = rng.choice((dark(disc, 0.5), light(disc, 0.5)))
    figure.part(oval(0, 0, radius * rng.uniform(0.18, 0.4)), disc, dotted, seeds, fuzzy=3)


def draw_rose(figure, rng, radius, colour):
    """A rose or peony from above: petals wound tightly inwards."""
    size, angle = radius, rng.uniform(0, 360)
    while size > radius * 0.14:
        for _ in range(3 if size > radius * 0.5 else 2):
            angle += 131
            x, y = size * 0.3 * math.cos(math.radians(angle)), size * 0.3 * math.sin(math.radians(angle))
            shade = blend(dark(colour, 0.5), light(colour, 0.25), size / radius)
            figure.part(
                oval(x, y, size * 0.72, size * 0.6, angle=angle + 90), shade, furry, dark(shade, 0.2), relief=1.5
            )
        size *= 0.82
    figure.part(oval(0, 0, size), dark(colour, 0.6), outline=False)


def draw_tulip(figure, rng, radius, colour):
    """A tulip from the side: a cup of upright petals."""
    cup, flare = figure.placed(scale=radius), rng.uniform(0.85, 1.1)
    for half in cup.halves():
        half.part(curve("0,.7 .1,0 .35,-1.1 .6,0"), dark(colour, 0.3))
    for half in cup.halves():
        half.part(curve(points("0,.8 .6,.55 .85,-.2 .7,-1 .25,-.4 0,.3") * (flare, 1)), colour, furry, light(colour))
    cup.part(curve(mirrored("0,.85 .4,.45 .42,-.3 0,-.95")), light(colour, 0.15), furry, colour)


def draw_bell(figure, rng, radius, colour):
    """A lily or daffodil from the side: a trumpet with a turned-out rim."""
    cup = figure.placed(scale=radius)
    for angle in (150, 200, 250, 290, 340, 390):
        ray = cup.placed(0, -0.1, angle=angle, stretch=(1, 0.8))
        ray.part(petal("pointed", 1.05, 0.3), light(colour, 0.4), furry, colour)
    cup.part(curve(mirrored("0,.5 .2,.3 .3,-.3 .6,-.8")), colour, furry, dark(colour, 0.2))
    cup.part(oval(0, -0.75, 0.52, 0.2), dark(colour, 0.4))
    for x in (-0.2, 0, 0.2):
        cup.stroke([(0, -0.6), (x, -1)], 0.04, IVORY)
        cup.spot(x, -1, 0.07, GOLD)


BLOOMS = (draw_bloom, draw_bloom, draw_rose, draw_tulip, draw_bell)


def draw_leaf(figure, rng, x, y, length, angle, colour):
    """A leaf with its midrib."""
    leaf = figure.placed(x, y, angle=angle)
    leaf.part(petal("pointed", length, length * rng.uniform(0.2, 0.32)), colour, veined)
    leaf.stroke([(0, 0), (length * 0.95, 0)], 0.5, light(colour, 0.4))


def draw_stem(figure, rng, top, bottom, colour):
    """A bent stem with leaves on both sides."""
    way = [top, ((top[0] + bottom[0]) / 2 + rng.uniform(-6, 6), (top[1] + bottom[1]) / 2), bottom]
    figure.part(limb(way, [2.0, 2.4, 2.8]), colour)
    for side in rng.sample((-1, 1, -1, 1), rng.randint(1, 3)):
        x, y = curve(way, closed=False)[rng.randint(6, 12)]
        draw_leaf(figure, rng, x, y, rng.uniform(14, 24), (-90 + side * rng.uniform(25, 65)), light(colour, 0.1))


def draw_overhead(figure, rng, bloom):
    """One large flower from above, with leaves showing behind it."""
    colour = green(rng)
    for _ in range(rng.randint(2, 7)):
        draw_leaf(figure, rng, 0, 0, rng.uniform(44, 52), rng.uniform(0, 360), colour)
    slant = figure.placed(angle=rng.uniform(0, 360), stretch=(1, rng.uniform(0.75, 1)))
    bloom(slant, rng, rng.uniform(36, 42), bright(rng))


def draw_stemmed(figure, rng, bloom):
    """One flower on its stem."""
    draw_stem(figure, rng, (0, -20), (rng.uniform(-8, 8), 44), green(rng))
    slant = rng.uniform(0.7, 1) if bloom in (draw_bloom, draw_rose) else 1
    bloom(figure.placed(0, -24, angle=rng.uniform(-20, 20), stretch=(1, slant)), rng, rng.uniform(22, 28), bright(rng))


def draw_bunch(figure, rng, pot):
    """Several flowers of one or two kinds, from the ground or in a vase or pot."""
    colour, kinds, colours = green(rng), rng.sample(BLOOMS, 2), (bright(rng), bright(rng))
    count = rng.randint(3, 5)
    heads = [(-30 + 60 * (index + 0.5) / count, rng.uniform(-34, -10)) for index in range(count)]
    for x, y in heads:
        draw_stem(figure, rng, (x, y), (x * 0.15, 22 if pot else 48), colour)
    for x, y in rng.sample(heads, count):
        head = figure.placed(x, y, angle=x * 0.6 + rng.uniform(-8, 8), stretch=(1, rng.uniform(0.8, 1)))
        rng.choice(kinds)(head, rng, rng.uniform(12, 16), rng.choice(colours))
    if pot:
        clay = rng.choice(((178, 98, 66), tint(rng)))
        straight = rng.random() < 0.5
        shape = mirrored("14,20 10,46 0,46") if straight else curve(mirrored("0,20 6,20 14,34 8,47 0,47"))
        figure.part(shape, clay, speckled)
        figure.part(oval(0, 20, 15.5 if straight else 7.5, 2.4), light(clay, 0.2))


def draw_spike(figure, rng):
    """A lupin or hyacinth: many small florets along one or more stalks."""
    colour, leaf = bright(rng), green(rng)
    for foot in rng.choice(((0,), (-10, 10), (-18, 2, 18))):
        lean = rng.uniform(-6, 6)
        draw_stem(figure, rng, (foot + lean, -40), (foot, 46), leaf)
        for step in range(34):
            reach = (-1) ** step * (2 + step * 0.2) * rng.uniform(0.3, 1)
            floret = figure.placed(foot + lean * (1 - step / 60) + reach, -42 + 1.6 * step, angle=rng.uniform(0, 360))
            shade = light(colour, rng.uniform(0, 0.4))
            for turn in range(0, 360, 72):
                floret.placed(angle=turn).part(petal("round", 2.6 + step * 0.06, 1.6), shade)
            floret.spot(0, 0, 0.9, IVORY)


FLOWERS = (
    *((partial(draw_overhead, bloom=bloom), 180) for bloom in (draw_bloom, draw_bloom, draw_rose)),
    *((partial(draw_stemmed, bloom=bloom), 18) for bloom in BLOOMS),
    *((partial(draw_bunch, pot=False), 12), (partial(draw_bunch, pot=True), 6), (draw_spike, 12)),
)


# ----------------------------------------------------------------------------------------------------------- guitar

STRAT = "-3,8 -9,-3 -13,-5 -14,4 -11,15 -15,27 -15,38 -5,45 8,44 16,36 15,26 11,17 13,8 12,2 8,4 3,10"
SINGLE_CUT = "-3,2 -10,0 -13,7 -10,17 -14,25 -17,35 -10,44 4,45 15,40 17,30 10,18 12,10 14,3 9,5 3,9"
HEADSTOCKS = (
    mirrored(".9,0 1.5,-4 1.35,-15 0,-14"),
    curve(".8,0 1,-5 1.2,-16 0,-19 -1.8,-14 -1.3,-4 -.8,0"),
    points(".9,0 1.6,-6 0,-19 -1.6,-6 -.9,0"),
)


def acoustic_body(rng):
    """The figure of eight of an acoustic guitar, sometimes with a cutaway for the playing hand."""
    upper, waist, lower = rng.uniform(11, 14), rng.uniform(8.5, 11), rng.uniform(15.5, 19)
    half = [(2, 0), (upper * 0.75, 1.5), (upper, 7), (waist, 18), (lower * 0.85, 24), (lower, 32), (lower * 0.8, 42)]
    whole = mirrored([*half, (0, 46)])
    if rng.random() < 0.35:
        whole[0:3] = [(2.6, 3), (3.6, 9), (upper * 0.95, 6)]
    return curve(whole)


def electric_body(rng):
    """A solid body with two horns, or with one."""
    return curve(rng.choice((STRAT, STRAT, SINGLE_CUT)))


def winged_body(rng):
    """The V of a hard-rock guitar."""
    spread = rng.uniform(17, 24)
    return mirrored([(3, 4), (7, 8), (spread, 44), (spread - 8, 47), (0, rng.uniform(22, 30))])


def draw_neck(figure, rng, count, nut, joint, wood):
    """The neck with its fretboard, frets and inlays, and the headstock with its tuning pegs; answer its half width."""
    width = 2.0 + 0.14 * count
    for index in range(count):
        side, y = -1 if index % 2 else 1, nut - 4 - 9 * (index // 2) / max(1, (count + 1) // 2 - 1)
        figure.part(oval(side * (width * 1.5 + 2.2), y, 2, 1.3), STEEL)
        figure.stroke([(side * width, y), (side * (width * 1.5 + 2), y)], 0.8, STEEL)
    figure.part(rng.choice(HEADSTOCKS) * (width, 1) + (0, nut), wood, grained, dark(wood, 0.25))
    board = rng.choice(((70, 46, 36), (44, 34, 32), (196, 152, 96)))
    shape = [(-width, nut), (width, nut), (width * 1.15, joint), (-width * 1.15, joint)]
    figure.part(shape, board, speckled, relief=0.6)
    for fret in range(1, 19):
        # The frets of a real guitar: every twelfth halves the string.
        y = nut + (joint - nut) * 1.5 * (1 - 2 ** (-fret / 12))
        figure.stroke([(-width, y), (width, y)], 0.45, STEEL)
        if fret in (3, 5, 7, 9, 12, 15):
            figure.spot(0, y - 1.2, 0.8, IVORY, relief=0)
    figure.part(box(-width, nut - 0.8, 2 * width, 1.2), IVORY, outline=False)
    return width


def draw_strings(figure, count, width, nut, bridge):
    """The strings from the tuning pegs to the bridge."""
    for index in range(count):
        x = (index / (count - 1) - 0.5) * 1.7 * width
        colour = blend((226, 222, 206), (170, 140, 90), index / count)
        figure.stroke([(x * 0.8, nut - 5), (x, nut), (x * 1.3, bridge)], 0.28, colour)


def draw_acoustic(figure, rng):
    """An acoustic guitar or a ukulele with its round sound hole."""
    count = rng.choice((6, 6, 6, 4))
    nut = rng.uniform(-40, -32) if count == 6 else -24
    top = blend(rng.choice(((214, 164, 98), (176, 108, 58), (226, 190, 130), tint(rng))), tint(rng), 0.12)
    rim, body = dark(top, 0.5), acoustic_body(rng)
    figure.part(body + (2.2, 1.2), rim, grained)
    figure.part(body, top, grained, dark(top, 0.12), relief=0.55)
    figure.stroke(np.vstack([body, body[:1]]) * (0.97, 0.97) + (0, 0.7), 0.7, rng.choice((IVORY, rim)))
    for radius, ring in ((6.9, rim), (6.2, IVORY), (5.6, rim), (5.0, (34, 24, 22))):
        figure.spot(0, 14, radius, ring, relief=0)
    if rng.random() < 0.6:
        figure.part(curve("4,10 11,14 12,26 8,24 6.5,17"), rng.choice(((60, 34, 26), BLACK, IVORY)))
    figure.part(box(-9, 33, 18, 3.2), (64, 42, 34))
    figure.part(box(-6, 33.6, 12, 0.8), IVORY, outline=False)
    draw_strings(figure, count, draw_neck(figure, rng, count, nut, 9.5, dark(top, 0.3)), nut, 34)


def draw_electric(figure, rng, outline):
    """An electric guitar or bass with pickups, knobs and a bridge."""
    count = rng.choice((6, 6, 4))
    nut, paint, body = rng.uniform(-42, -30), tint(rng, (0.2, 0.95), (0.3, 0.98)), outline(rng)
    figure.part(body + (1.6, 1.2), dark(paint, 0.6))
    figure.part(body, paint, rng.choice((None, None, grained)), dark(paint, 0.5), relief=1.3)
    if outline is electric_body and rng.random() < 0.7:
        guard = curve("-7,8 -3,10 5,11 9,16 8,26 12,36 7,39 2,30 -7,26 -8,16")
        figure.part(guard, rng.choice((IVORY, BLACK, light(paint, 0.8))), relief=0.3)
    metal, coil = rng.choice((STEEL, GOLD)), rng.choice((BLACK, IVORY, STEEL))
    for y in rng.choice(((14, 25), (13, 19.5, 26))):
        figure.part(box(-5, y - 1.7, 10, 3.4), coil)
        for pole in range(count):
            figure.spot(-3.6 + 7.2 * pole / (count - 1), y, 0.5, metal, relief=0)
    figure.part(box(-5, 30, 10, 4.4), metal, relief=1.4)
    for x, y in ((9, 30), (10.5, 34.5), (8, 38.5))[: rng.randint(2, 3)]:
        figure.part(oval(x, y, 1.7), rng.choice((metal, coil)), relief=1.4)
    wood = rng.choice((dark(paint, 0.3), (206, 158, 98), (120, 70, 44)))
    draw_strings(figure, count, draw_neck(figure, rng, count, nut, 10.5, wood), nut, 32)


GUITARS = (
    *((draw_acoustic, 180), (draw_acoustic, 60), (partial(draw_electric, outline=winged_body), 100)),
    *((partial(draw_electric, outline=electric_body), tilt) for tilt in (180, 60)),
)


# ------------------------------------------------------------------------------------------------------------ house


def materials(rng):
    """What a house is built of, as keywords for its walls and for its roof."""
    colour = rng.choice((tint(rng, (0.1, 0.5), (0.6, 0.95)), (226, 216, 198), (168, 92, 70), (150, 112, 78)))
    texture = rng.choice((speckled, bricked, planked))
    wall = {"texture": texture, "second": light(colour, 0.4) if texture is bricked else dark(colour, 0.3)}
    roof = rng.choice(((150, 72, 54), (84, 86, 94), (112, 78, 58), tint(rng, (0.3, 0.7), (0.3, 0.6))))
    return wall | {"colour": colour}, {"colour": roof, "texture": tiled, "second": dark(roof, 0.6)}


def window_style(rng):
    """What all windows of one house have in common."""
    return {
        "frame": rng.choice((WHITE, dark(tint(rng)), (92, 66, 48))),
        "glass": rng.choice((GLASS, GLASS, (60, 66, 82), (250, 212, 120))),
        "bars": rng.choice(((0.5,), (0.33, 0.67), ())),
        "arch": rng.random() < 0.2,
        "shutter": tint(rng, value=(0.3, 0.7)) if rng.random() < 0.35 else None,
    }


def draw_window(figure, x, y, width, height, frame, glass, bars, arch, shutter):
    """A window with its frame, glazing bars and sill, with shutters or an arch as the house has them."""
    if shutter:
        for left in (x - width * 0.55, x + width * 1.05):
            figure.part(box(left, y, width * 0.5, height), shutter, planked)
    if arch:
        figure.part(oval(x + width / 2, y, width / 2 + 0.6), frame)
        figure.spot(x + width / 2, y, width / 2 - 0.4, glass)
    figure.part(box(x - 0.6, y - (0 if arch else 0.6), width + 1.2, height + 1.2), frame, relief=0.4)
    pane = box(x + 0.2, y + 0.2, width - 0.4, height - 0.4)
    figure.part(pane, glass, speckled, light(glass, 0.5), relief=0.4, outline=False)
    for share in bars:
        figure.stroke([(x + width * share, y), (x + width * share, y + height)], 0.6, frame)
    figure.stroke([(x, y + height * 0.5), (x + width, y + height * 0.5)], 0.6, frame)
    figure.part(box(x - 1.2, y + height, width + 2.4, 1.1), light(frame, 0.3))


def draw_door(figure, rng, x, height):
    """A door standing on the ground, with panels, a knob and a step."""
    colour, width = tint(rng, value=(0.25, 0.7)), height * 0.5
    figure.part(box(x - 0.8, -height - 0.8, width + 1.6, height + 0.8), WHITE, relief=0.3)
    figure.part(box(x, -height, width, height), colour, relief=0.5)
    for share in (0.88, 0.45):
        panel = box(x + width * 0.2, -height * share, width * 0.6, height * 0.33)
        figure.part(panel, light(colour, 0.15), relief=1.4)
    figure.spot(x + width * 0.85, -height * 0.45, 0.7, GOLD)
    figure.part(box(x - 2, -1, width + 4, 2.4), (150, 146, 140), speckled)


def draw_wall(figure, rng, width, height, wall, style, storeys, door=False):
    """A wall standing on the x axis, with rows of windows and perhaps a door."""
    figure.part(box(0, -height, width, height), relief=0.25, **wall)
    columns = max(1, round(width / rng.uniform(11, 15)))
    pitch, level = width / columns, height / storeys
    size = min(pitch * (0.4 if style["shutter"] else 0.55), level * 0.6)
    entrance = rng.randrange(columns) if door else -1
    for row in range(storeys):
        for column in range(columns):
            if (row, column) == (0, entrance):
                draw_door(figure, rng, column * pitch + pitch / 2 - level * 0.19, min(level * 0.76, 15))
                continue
            x, y = column * pitch + (pitch - size) / 2, -level * (row + 0.74)
            draw_window(figure, x, y, size, level * 0.48, **style)


def draw_chimney(figure, rng, x, y):
    """A chimney whose foot hides behind the roof drawn later."""
    brick = rng.choice(((158, 84, 62), (140, 132, 124)))
    figure.part(box(x, y - 11, 6, 20), brick, bricked, light(brick, 0.4))
    figure.part(box(x - 0.8, y - 12, 7.6, 2), dark(brick))


def draw_cottage(figure, rng, roof_kind, storeys):
    """A house or a city block seen from a corner, under a front gable, a side gable, a hip or a flat roof."""
    wall, roof = materials(rng)
    style, skew = window_style(rng), rng.uniform(0.1, 0.25)
    width, depth = rng.uniform(30, 46), rng.uniform(0, 30)
    height, rise = storeys * max(rng.uniform(17, 22) - 2 * storeys, 12), rng.uniform(15, 24)
    base = figure.placed(-(width + depth) / 2, 10 + height / 2.4)
    if roof_kind != "flat":
        draw_chimney(base, rng, width * rng.uniform(0.25, 0.7), -height - rise * 0.85)
    if depth > 10:
        shady = wall | {"colour": dark(wall["colour"], 0.22), "second": dark(wall["second"], 0.22)}
        draw_wall(base.placed(width, 0, skew=-skew), rng, depth, height, shady, style, storeys)
    if roof_kind == "gable":
        draw_gable(base, width, depth, height, rise, skew, wall, roof)
    draw_wall(base, rng, width, height, wall, style, storeys, door=True)
    if roof_kind == "gable":
        for x in (-3, width + 3):
            base.part(limb([(width / 2, -height - rise - 0.5), (x, 2 - height)], [2.4, 2.4]), dark(roof["colour"], 0.2))
        draw_window(base, width / 2 - 3, -height - rise * 0.5, 6, 6, **style)
        return
    back = -height - depth * skew
    if roof_kind == "flat":
        top = [(-2, -height - 1), (depth, back - 1), (width + depth + 1, back - 1), (width + 2, -height - 1)]
        base.part(top, light(wall["colour"], 0.2), speckled)
        base.part(box(-2, -height - 2, width + 4, 4), light(wall["colour"], 0.4))
        return
    inset, ridge = (width * 0.22 if roof_kind == "hip" else 0), (back - height) / 2 - rise
    end = roof if roof_kind == "hip" else wall
    right = (width + depth / 2 - inset, ridge)
    base.part([(width, -height), right, (width + depth + 1.5, back)], **end | {"colour": dark(end["colour"])})
    base.part([(-3, 2 - height), (depth / 2 + inset, ridge), right, (width + 3, 2 - height)], **roof)


def draw_gable(figure, width, depth, height, rise, skew, wall, roof):
    """The roof and the pointed wall of a house whose gable faces us."""
    back, middle = -height - depth * skew, width / 2
    slope = [
        (middle, -height - rise),
        (middle + depth, back - rise),
        (width + depth + 3, back + 2),
        (width + 3, 2 - height),
    ]
    figure.part(slope, **roof)
    figure.part([(0, -height), (middle, -height - rise), (width, -height)], relief=0.25, **wall)


def draw_tower(figure, rng):
    """A house with one or two round towers under pointed roofs."""
    wall, roof = materials(rng)
    style, storeys, width = window_style(rng), rng.randint(1, 2), rng.uniform(34, 46)
    height, base = 17 * storeys, figure.placed(-width / 2, 38)
    base.part(
        [(-3, 1 - height), (width * 0.2, -height - 18), (width * 0.8, -height - 18), (width + 3, 1 - height)], **roof
    )
    draw_wall(base, rng, width, height, wall, style, storeys, door=True)
    for x in rng.choice(((-3,), (width + 3,), (-4, width + 4))):
        top = -height - rng.uniform(10, 26)
        tower = base.placed(x, top)
        tower.part(box(-9, 0, 18, 1 - top), relief=1.6, **wall)
        tower.part(curve("-11.5,2 0,-26 11.5,2 0,4"), relief=1.5, **roof)
        for y in np.arange(9, -8 - top, 15):
            draw_window(tower, -2.5, y, 5, 7, **style | {"shutter": None})
        tower.stroke("0,-24 0,-32", 0.8, BLACK)


def draw_chalet(figure, rng):
    """A hut whose roof reaches almost to the ground."""
    wall, roof = materials(rng)
    style = window_style(rng) | {"shutter": None}
    half, rise, depth = rng.uniform(26, 32), rng.uniform(54, 68), rng.uniform(8, 24)
    base = figure.placed(-depth / 2, 34)
    base.part([(0, -rise), (depth, -rise - depth * 0.15), (half + depth, -2 - depth * 0.15), (half, 0)], **roof)
    base.part([(3 - half, 0), (0, 4 - rise), (half - 3, 0)], relief=0.3, **wall | {"texture": planked})
    for x in (-half - 2, half + 2):
        base.part(limb([(0, -rise), (x, 2)], [4, 4]), dark(roof["colour"], 0.3), grained)
    draw_door(base, rng, -4, 16)
    for x, y, width, height in ((-15, -14, 6, 8), (9, -14, 6, 8), (-6, -37, 12, 11)):
        draw_window(base, x, y, width, height, **style)
    base.part(box(-14, -24, 28, 3), (120, 86, 60), grained)


def draw_garden(figure, rng, house):
    """A house of some kind, sometimes with bushes beside it or a fence before it."""
    house(figure, rng)
    left, _, right, bottom = ((side - CANVAS / 2) / UNIT for side in figure.image.getbbox())
    for _ in range(rng.choice((0, 2, 4))):
        x, size, leaf = rng.choice((left, right)) + rng.uniform(-6, 6), rng.uniform(4, 9), dark(green(rng), 0.1)
        figure.part(oval(x, bottom - size * 0.7, size, size * 0.9), leaf, leafy, dark(leaf, 0.5), fuzzy=7)
    if rng.random() < 0.25:
        paint = rng.choice((WHITE, (128, 92, 64)))
        for height in (5, 2):
            figure.part(box(left - 3, bottom - height, right - left + 6, 1.4), paint)
        for x in np.arange(left - 2, right + 1, 5):
            figure.part(points("0,1 0,-7 1.2,-9 2.4,-7 2.4,1") + (x, bottom), paint)


COTTAGES = (("gable", 1), ("gable", 2), ("side", 1), ("side", 2), ("hip", 2), ("flat", 2), ("flat", 5), ("flat", 7))
HOUSES = (
    *((partial(draw_garden, house=partial(draw_cottage, roof_kind=roof, storeys=n)), 3) for roof, n in COTTAGES),
    *((partial(draw_garden, house=house), 3) for house in (draw_tower, draw_chalet)),
)


# ------------------------------------------------------------------------------------------------------------ plane


def livery(rng):
    """The paint of a plane: the colour of its hull, of its markings and of its bare metal."""
    hull = rng.choice((WHITE, (206, 210, 214), tint(rng, (0.2, 0.8), (0.5, 0.95))))
    return hull, tint(rng, (0.5, 0.95), (0.35, 0.85)), blend(hull, STEEL, 0.6)


def draw_propeller(figure, rng, radius):
    """A propeller seen from the front, standing still."""
    start, blades = rng.uniform(0, 360), rng.choice((2, 3, 4))
    for index in range(blades):
        figure.placed(angle=start + index * 360 / blades).part(petal("narrow", radius, radius * 0.11), (58, 54, 52))
    figure.part(oval(0, 0, radius * 0.17), (196, 60, 50), relief=1.5)


def draw_wheel(figure, x, y, radius):
    """A wheel with its hub."""
    figure.part(oval(x, y, radius), BLACK)
    figure.spot(x, y, radius * 0.45, STEEL)


def draw_airliner(figure, rng):
    """An airliner from the side, in flight or with its wheels down."""
    hull, mark, metal = livery(rng)
    figure.part("4,-4 -9,-15 -14,-15 -8,-4", dark(metal, 0.25))
    if rng.random() < 0.5:
        for x in (33, -3):
            figure.stroke([(x, 5), (x, 13)], 1.2, dark(STEEL))
            draw_wheel(figure, x - 2, 14, 2.2)
            draw_wheel(figure, x + 2, 14, 2.2)
    sweep = rng.uniform(0, 4)
    figure.part([(-31, -5), (-43 - sweep, -25), (-35 - sweep, -25), (-19, -6.5)], mark)
    fuselage = curve("-49,-6 -36,-7.5 0,-7.6 30,-7.4 41,-5 47,.5 43,4.5 30,6.6 0,7 -24,5.5 -38,0")
    figure.part(fuselage, hull, panelled, dark(hull, 0.12), relief=1.3)
    stripe = rng.choice(("-40,-2.5 44,.5 43,1.7 -36,-.3", "-40,-.8 44,2.2 43,5.8 -36,3.8", None))
    if stripe:
        figure.part(stripe, mark, outline=False)
    for x in np.arange(-30, 35, 2.7):
        figure.part(oval(x, -2.4, 0.75, 1.05), (48, 62, 84), relief=0, outline=False)
    for x in (-33.5, 36):
        figure.stroke(box(x - 1.5, -4.5, 3, 6)[[0, 1, 2, 3, 0]], 0.4, dark(hull))
    figure.part("40,-4.6 44.4,-1.8 41,-1.4 38.6,-3.2", (40, 50, 66))
    figure.part("-36,-2 -50,1.5 -46,3 -30,1", metal)
    for x in rng.choice(((4,), (4, -9))):
        figure.part(curve(points("8,4.5 8.6,8 8,11.5 -5,10 -6,6.5") + (x, 0)), mark, relief=1.4)
        figure.part(oval(x + 8, 8, 1.1, 3.2), (50, 50, 56), outline=False)
    figure.part([(10, 3), (-20, 20 + sweep), (-26, 20 + sweep), (-12, 4)], metal, panelled, relief=0.7)


def tilted(figure, rng):
    """Coordinates for something flat seen from straight above or from a lower place."""
    return figure.placed(stretch=(1, rng.choice((1, 1, 0.68))), skew=rng.choice((0, 0, 0.22)))


# Girth of the hull, span, depth of the wing at its root and tip, and how far the tip lies back.
SPANS = {"airliner": (5, 46, 13, 4, 19), "light": (4.5, 42, 11, 8, 1), "glider": (2.6, 54, 6, 2.5, 2)}


def draw_from_above(figure, rng, kind):
    """A plane seen from above or tilted away: airliner, light aeroplane, glider."""
    (hull, mark, metal), banked = livery(rng), tilted(figure, rng)
    girth, span, root, tip, back = SPANS[kind]
    engines = rng.choice(((18,), (15, 29))) if kind == "airliner" else ()
    for half in banked.halves():
        for x in engines:
            half.part(curve(points("-2.4,-8 2.4,-8 2,4 -2,4") + (x, x * 0.4)), mark, relief=1.5)
        half.part(
            [(0, -12), (span, back - 12), (span, back + tip - 12), (girth * 2, root - 11), (0, root - 8)],
            metal,
            panelled,
        )
        end = points(
            [(0.87, back * 0.87 - 12), (1, back - 12), (1, back - 12 + tip), (0.87, back * 0.87 - 12 + tip * 1.25)]
        )
        half.part(end * (span, 1), mark)
        half.stroke([(girth * 2, root - 13), (span * 0.8, back + tip - 14)], 0.4, dark(metal))
        half.part([(0, 33), (17, 33 + back * 0.5), (17, 37 + back * 0.5), (0, 41)], metal)
    banked.part(curve(mirrored(points("0,-45 .6,-41 1,-30 1,8 .4,36 0,45") * (girth, 1))), hull, relief=1.4)
    if kind == "airliner":
        banked.part(curve(mirrored("0,-41 3,-38.5 3.4,-35.5 0,-37")), (44, 54, 70), outline=False)
    else:
        banked.part(curve(mirrored(points("0,-27 .7,-22 .6,-9 0,-5") * (girth, 1))), GLASS, relief=1.5)
    if kind == "light":
        banked.part(oval(0, -46, 15, 1.1), (70, 64, 60))
        banked.part(oval(0, -46, 2, 3), mark, relief=1.4)
    banked.part("-.8,26 .8,26 1,45 -1,45", mark)


def draw_fighter(figure, rng):
    """A jet fighter from above: pointed nose, delta wings, two fins."""
    hull = rng.choice(((128, 138, 146), (120, 124, 92), (176, 160, 124), tint(rng, (0.1, 0.5))))
    paint = {"colour": hull, "texture": rng.choice((spotted, panelled)), "second": dark(hull, 0.35)}
    banked, sweep, notch = tilted(figure, rng), rng.uniform(4, 14), rng.uniform(20, 30)
    for half in banked.halves():
        half.part(limb("22,4 22,24", [1.6, 2.4]), WHITE)
        half.part([(4, -12), (34, sweep), (34, 22), (22, notch), (4, 26)], **paint)
        half.part("4,28 19,38 19,43 4,40", **paint)
        half.part(limb("3.6,-10 4,20 3.4,43", [5, 7.5, 5.5]), **paint)
        half.part(oval(3.4, 44, 2.7, 2), (52, 46, 46))
        half.part("6.5,14 11,32 11,37 6.5,33", dark(hull, 0.25))
    banked.part(curve(mirrored("0,-51 1.6,-42 4,-28 5,-5 4,30 0,34")), relief=1.4, **paint)
    banked.part(curve(mirrored("0,-33 2.6,-27 2.6,-19 0,-13")), (64, 84, 104), relief=1.8)
    for radius, colour in ((3.4, (52, 72, 130)), (1.8, WHITE)):
        banked.spot(24, 17, radius, colour, relief=0)


def draw_biplane(figure, rng):
    """A biplane from the side and a little from the front: two wings, struts, wires and a propeller."""
    (hull, mark, _), strut = livery(rng), (110, 78, 52)
    figure.part("-36,-3 -49,-17 -42,-20 -30,-5", mark)
    figure.part("6,2 -20,17 -4,20 24,6", dark(mark, 0.2), planked)
    figure.part(curve("-45,-4 -20,-9 8,-11 27,-9 31,0 27,8 6,9 -20,4"), hull, relief=1.4)
    figure.part(curve("24,-9.5 31,-8 32,0 30,8 24,8.5"), STEEL, relief=1.3)
    figure.spot(-6, -14, 4, (120, 84, 56))
    figure.part(oval(-12, -9, 7, 3), dark(hull, 0.6), outline=False)
    figure.part("-36,-3 -52,3 -44,5 -30,-1", mark)
    for wire in ("4,8 12,-21", "17,8 -2,-21", "-14,15 -2,-18", "0,16 -18,-16"):
        figure.stroke(wire, 0.35, dark(STEEL))
    for post in ("4,6 -4,-21", "17,6 9,-21", "6,-8 7,-25", "19,-8 20,-25", "-14,15 -20,-18", "0,16 -6,-17"):
        figure.stroke(post, 1.2, strut)
    lift = rng.uniform(19, 24)
    figure.part([(8, -lift - 9), (-26, 5 - lift), (-8, 8 - lift), (28, -lift - 6)], mark, planked, dark(mark, 0.25))
    figure.stroke("16,7 21,19 25,7", 1.3, dark(STEEL))
    draw_wheel(figure, 21, 20, 5.5)
    draw_propeller(figure.placed(33, -1, stretch=(0.35, 1)), rng, 19)


def draw_light_side(figure, rng):
    """A light aeroplane from the side, its wing above the cabin or below."""
    hull, mark, _ = livery(rng)
    high = rng.random() < 0.6
    figure.part("-36,-3 -51,-22 -43,-23 -26,-5", mark)
    wing, y = points("13,-3 -24,22 -36,21 -6,-2"), -12 if high else 4
    figure.part(wing * (0.8, -0.5) + (2, y - 3), dark(hull), panelled)
    figure.part(curve("-49,-4 -24,-5 -9,-12 8,-13 17,-6 33,-4 37,1 31,6 4,7 -22,3"), hull, relief=1.3)
    figure.part("-46,-2 35,0 34,2.5 -32,1", mark, outline=False)
    for pane in ("-7,-11 1,-11 1,-5 -9,-5", "2,-11 8,-11 8,-5 2,-5", "9,-11 12,-11 16,-5 9,-5"):
        figure.part(pane, GLASS, relief=1.3)
    figure.part("-36,-2 -51,2 -44,4 -28,0", light(mark, 0.2))
    for x in (-6, 25):
        figure.stroke([(x + 2, 7), (x - 1, 16)], 1.4, dark(hull, 0.4))
        draw_wheel(figure, x - 1, 18, 3.6)
    if high:
        figure.stroke("4,5 -9,-4", 1.2, dark(hull))
    figure.part(wing + (0, y), blend(hull, mark, 0.25), panelled)
    draw_propeller(figure.placed(37, 0, stretch=(0.3, 1)), rng, 17)


def draw_head_on(figure, rng):
    """A propeller plane that comes towards us."""
    hull, mark, _ = livery(rng)
    figure.part("-1.5,-8 0,-25 1.5,-8", mark)
    droop = rng.uniform(-7, 3) / 50
    for half in figure.halves():
        half.part("2,-11 18,-12 18,-10 2,-9", dark(mark, 0.2))
        wing = half.placed(skew=droop)
        wing.part("4,0 50,-2 50,0 5,6", hull, panelled)
        wing.part("40,-1.6 50,-2 50,0 40,1.5", mark)
        half.stroke("6,6 12,17", 1.5, dark(STEEL))
        half.part(oval(12, 19, 2, 4.4), BLACK)
    figure.part(oval(0, -9, 6.5, 7), GLASS, relief=1.5)
    figure.stroke("0,-16 0,-5", 0.8, hull)
    figure.part(oval(0, 1, 11, 10.5), hull, relief=1.4)
    figure.part(oval(0, 1, 8), dark(mark, 0.2), relief=-1)
    draw_propeller(figure.placed(0, 1), rng, rng.uniform(17, 21))


PLANES = (
    *((draw_airliner, 25), (draw_airliner, 25), (draw_biplane, 15), (draw_light_side, 15), (draw_head_on, 15)),
    *((partial(draw_from_above, kind=kind), 180) for kind in ("airliner", *SPANS)),
    (draw_fighter, 180),
)


# ------------------------------------------------------------------------------------------------------ backgrounds
# A background is drawn at the frame's full (oversampled) size as red, green and blue values from 0 to 255.


def ramp(height, width, top, bottom):
    """A vertical gradient."""
    share = np.linspace(0, 1, height)[:, None, None]
    return np.broadcast_to(np.array(top) * (1 - share) + np.array(bottom) * share, (height, width, 3)).copy()


def layered(rng, shape, cells, stretch=1.0):
    """Random values around 0, as a sum of clouds of several bump sizes."""
    return sum(cloud(rng, shape, cell, stretch) - 0.5 for cell in cells)


def clear_sky(rng, height, width):
    """A plain sky of any hour."""
    top, bottom = rng.choice(
        (((70, 130, 205), (190, 216, 238)), ((96, 104, 150), (246, 190, 140)), ((130, 156, 176), (220, 224, 222)))
    )
    return ramp(height, width, top, bottom) + 10 * layered(rng, (height, width), (160, 60), 3)[:, :, None]


def clouded_sky(rng, height, width):
    """A sky with heaped clouds."""
    heaps = 1.6 * layered(rng, (height, width), (240, 110, 50, 24), 1.6) + rng.uniform(0.2, 0.6)
    share = np.clip(heaps, 0, 1)[:, :, None]
    shade = 225 + 45 * layered(rng, (height, width), (120, 50))[:, :, None]
    return ramp(height, width, (84, 136, 200), (160, 196, 226)) * (1 - share) + shade * share


def lawn(rng, height, width):
    """Short grass from near by."""
    blades = layered(rng, (height, width), (14, 26), 0.25) * 58 + 30 * layered(rng, (height, width), (200, 90))
    return np.array((96, 134, 64)) + blades[:, :, None] * (0.9, 1.0, 0.6)


def meadow(rng, height, width):
    """A field below a hilly horizon and a hazy sky."""
    scene = clear_sky(rng, height, width)
    line = height * rng.uniform(0.4, 0.65) + 60 * (cloud(rng, (1, width), 200)[0] - 0.5)
    depth = np.arange(height)[:, None] - line[None, :]
    soil = np.array(rng.choice(((120, 146, 78), (188, 170, 104), (150, 140, 110))))
    field = soil + 40 * layered(rng, (height, width), (60, 16), 3)[:, :, None]
    return np.where(depth[:, :, None] > 0, field - np.clip(depth, 0, 200)[:, :, None] * 0.1, scene)


def boards(rng, height, width):
    """Wooden boards, lying or standing."""
    tall, long = (width, height) if rng.random() < 0.5 else (height, width)
    rows = np.arange(tall) // (tall / rng.randint(3, 6))
    shades = np.array([rng.uniform(-16, 16) for _ in range(8)])[rows.astype(int)][:, None]
    rings = 9 * np.sin(34 * cloud(rng, (tall, long), 70, 8)) + 20 * layered(rng, (tall, long), (5, 12), 14)
    seams = np.where(np.diff(rows, prepend=0)[:, None] > 0, -60, 0)
    wood = np.array(rng.choice(((172, 126, 84), (206, 176, 138), (120, 92, 74)))) + (shades + rings + seams)[:, :, None]
    return wood if (tall, long) == (height, width) else wood.transpose(1, 0, 2)


def sand(rng, height, width):
    """Rippled sand or gravel."""
    ripples = 12 * np.sin(16 * cloud(rng, (height, width), 150, 2)) + 36 * layered(rng, (height, width), (5, 9))
    return np.array(rng.choice(((212, 188, 146), (178, 170, 160)))) + ripples[:, :, None]


def room(rng, height, width):
    """A wall, plain or papered, above a skirting board and a floor."""
    paper = np.array(tint(rng, (0.08, 0.4), (0.6, 0.92)))
    scene = np.broadcast_to(paper, (height, width, 3)) + 8 * layered(rng, (height, width), (200, 8))[:, :, None]
    if rng.random() < 0.4:
        scene = scene + np.where(np.arange(width) // rng.randint(12, 40) % 2, 9, -9)[None, :, None]
    edge = round(height * rng.uniform(0.65, 0.9))
    scene[edge:] = boards(rng, height, width)[edge:] * 0.85
    scene[edge - 16 : edge] = np.array((232, 228, 220))
    return scene


def bokeh(rng, height, width):
    """Colours far out of focus, with discs of light."""
    first, second, third = (np.array(tint(rng, (0.15, 0.55), (0.4, 0.9))) for _ in range(3))
    share, other = (np.clip(2 * cloud(rng, (height, width), 190) - 0.5, 0, 1)[:, :, None] for _ in range(2))
    scene = (first * (1 - share) + second * share) * (1 - other) + third * other
    row, column = np.mgrid[0:height, 0:width]
    for _ in range(rng.randint(0, 14)):
        distance = np.hypot(row - rng.uniform(0, height), column - rng.uniform(0, width))
        disc = np.clip((rng.uniform(14, 46) - distance) / 5, 0, 1)[:, :, None]
        scene = scene + disc * np.array(tint(rng, (0, 0.4), (0.8, 1))) * 0.13
    return scene


def night(rng, height, width):
    """A dark sky with stars and a glow near the ground."""
    scene = ramp(height, width, (14, 18, 44), rng.choice(((70, 56, 90), (36, 60, 84), (110, 74, 70))))
    scene += 24 * layered(rng, (height, width), (200, 80))[:, :, None]
    for _ in range(rng.randint(20, 60)):
        y, x, size = rng.randrange(height - 3), rng.randrange(width - 3), rng.randint(1, 3)
        scene[y : y + size, x : x + size] += rng.uniform(60, 190)
    return scene


def water(rng, height, width):
    """Ripples on a lake."""
    waves = 44 * layered(rng, (height, width), (10, 22, 50), 5)
    return ramp(height, width, (120, 160, 176), (52, 96, 120)) + waves[:, :, None]


BACKGROUNDS = (clear_sky, clouded_sky, lawn, meadow, boards, sand, room, bokeh, night, water)


# ---------------------------------------------------------------------------------------------------------- picture


def draw_clutter(rng):
    """One small thing that has nothing to do with the class: a pebble, ball, stick, crate or mug."""
    figure, colour = Figure(rng), tint(rng)
    kind = rng.choice(("pebble", "ball", "stick", "crate", "mug"))
    if kind == "pebble":
        figure.part(curve("-30,4 -12,-20 18,-18 32,4 14,20 -18,18"), blend(colour, STEEL, 0.7), speckled)
    elif kind == "ball":
        figure.part(oval(0, 0, 28), colour, relief=1.4)
        figure.part(oval(0, 0, 10, 27, angle=20), light(colour, 0.7), relief=1, outline=False)
    elif kind == "stick":
        figure.part(limb("-44,10 0,-4 44,6", [6, 8, 4]), WOOD, grained)
    elif kind == "crate":
        figure.part("26,-20 40,-30 40,16 26,26", dark(colour))
        figure.part("-26,-20 -12,-30 40,-30 26,-20", light(colour))
        figure.part(box(-26, -20, 52, 46), colour, planked)
    else:
        figure.part(oval(22, 4, 14, 15), colour)
        figure.part(oval(22, 4, 8, 9), dark(colour), outline=False)
        figure.part(curve(mirrored("0,-28 22,-26 20,22 0,28")), colour, relief=1.3)
        figure.part(oval(0, -25, 20, 5), dark(colour, 0.5))
    return figure.image


def fitted(image, rng, size, share, tilt):
    """The figure without its empty border, turned, and scaled to the share of the frame."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.crop(image.getbbox()).rotate(rng.uniform(-tilt, tilt), Image.Resampling.BICUBIC, expand=True)
    image = image.crop(image.getbbox())
    factor = share * min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def paste_with_shadow(scene, rng, image, place):
    """Lay the figure on the scene with a soft shadow a little way off."""
    reach = rng.randint(3, 12)
    shadow = Image.new("L", scene.size)
    shadow.paste(image.getchannel("A"), (place[0] + rng.choice((-1, 1)) * reach, place[1] + reach))
    shadow = shadow.filter(ImageFilter.GaussianBlur(rng.uniform(4, 12))).point(lambda value: round(value * 0.45))
    scene.paste((18, 20, 28), (0, 0), shadow)
    scene.paste(image, place, image)


def photographed(scene, rng, size):
    """What the camera makes of the scene: uneven light, a colour cast, blur, the final size and noise."""
    if rng.random() < 0.3:
        scene = scene.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.8)))
    values = np.asarray(scene.resize(size, Image.Resampling.LANCZOS), np.float32)
    across, down = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    angle = rng.uniform(0, 2 * math.pi)
    lit = 1 + rng.uniform(0, 0.22) * (across * math.cos(angle) + down * math.sin(angle))
    lit -= rng.uniform(0, 0.12) * (across**2 + down**2)
    cast = np.array([rng.uniform(0.9, 1.1) for _ in range(3)])
    values = (values - 128) * rng.uniform(0.85, 1.12) + 128 + rng.uniform(-8, 20)
    grain = np.random.default_rng(rng.getrandbits(32)).standard_normal(values.shape, np.float32)
    values = values * lit[:, :, None] * cast + rng.choice((1, 2, 3, 6)) * grain
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def draw_picture(rng, draw, tilt):
    """One finished picture of a figure in its scene."""
    size = rng.choice(FRAME_SIZES)
    width, height = (side * OVERSAMPLING for side in size)
    backdrop = rng.choice(BACKGROUNDS)(rng, height, width)
    scene = Image.fromarray(np.clip(backdrop, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        scene = scene.filter(ImageFilter.GaussianBlur(rng.uniform(1, 6)))
    for _ in range(rng.choice((0, 0, 1, 2))):
        thing = fitted(draw_clutter(rng), rng, scene.size, rng.uniform(0.1, 0.25), 40)
        place = (rng.randint(0, width - thing.width), rng.randint(height // 2, height - thing.height))
        paste_with_shadow(scene, rng, thing, place)
    figure = Figure(rng)
    draw(figure, rng)
    # Mostly large: a figure that fills the frame is what a person would photograph.
    share = 0.35 + 0.6 * rng.random() ** 0.3
    image = fitted(figure.image, rng, scene.size, share, tilt)
    # Only a large figure may run out of the frame: of a small one too little would be left to see.
    cut = rng.uniform(0.08, 0.2) if rng.random() < 0.18 and share > 0.6 else 0
    span_x, span_y = width - image.width, height - image.height
    place = (round(span_x * rng.random() + rng.choice((-1, 1)) * cut * image.width), round(span_y * rng.random()))
    paste_with_shadow(scene, rng, image, place)
    return photographed(scene, rng, size)


CLASSES = {"animal": ANIMALS, "flower": FLOWERS, "guitar": GUITARS, "house": HOUSES, "plane": PLANES}


# ------------------------------------------------------------------------------------------------------------ files


def planned(output, seed):
    """Every file to be written, with what it takes to draw it."""
    for name, variants in CLASSES.items():
        # Every way to draw the class is among the training pictures; neighbours in the folder should differ.
        shuffler = random.Random(f"{seed} {name}")
        order = [variants[index % len(variants)] for index in range(TRAINING_COUNT)]
        shuffler.shuffle(order)
        order += shuffler.sample(variants, TEST_COUNT)
        for number, (draw, tilt) in enumerate(order, start=1):
            folder = output / "data" / name if number <= TRAINING_COUNT else output / "test_images"
            rng = random.Random(f"{seed} {name} {number}")
            yield folder / f"{name}_{number:02d}.jpg", partial(draw_picture, rng, draw, tilt)


def save(picture, path):
    """Write the picture under a temporary name first, so that no half-written file bears the final one."""
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=82, optimize=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(encoded.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def occupied(output):
    """The first target folder that already holds something, or None."""
    for folder in (output / "data", output / "test_images"):
        if folder.exists() and any(folder.iterdir()):
            return folder
    return None


def main(arguments=None):
    """Draw all pictures; answer the exit code."""
    parser = argparse.ArgumentParser(description="Draw the small example data set.")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives data/ and test_images/")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default: 0)")
    parser.add_argument("--force", action="store_true", help="overwrite files of the same names, leave others alone")
    options = parser.parse_args(arguments)
    try:
        folder = occupied(options.output)
        if folder and not options.force:
            print(f"{folder} is not empty; choose another --output or add --force.", file=sys.stderr)
            return 1
        for path, draw in planned(options.output, options.seed):
            path.parent.mkdir(parents=True, exist_ok=True)
            save(draw(), path)
    except OSError as error:
        print(f"The pictures could not be written: {error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
