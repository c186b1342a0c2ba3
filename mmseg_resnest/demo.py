"""The embedded demo data set: street-like scenes, drawn from nothing but a seed, in ADE20K's layout.

A scene is a small world in metres: x to the right of the road's middle, y up, z ahead of the camera. Builders
(`house`, `tree`, `vehicle`, ...) give `Thing`s, which are lists of flat faces with a label. The `Scene` casts their
shadows and, after sky and ground, paints them from far to near; `photograph` makes a picture of the painting.

    python -m mmseg_resnest.demo data/demo
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from itertools import chain, pairwise, product
from pathlib import Path

import cv2
import numpy as np
from numpy import ndarray
from numpy.random import Generator

CLASSES = ('road', 'lane marking', 'pavement', 'building', 'fence', 'pole',
           'traffic sign', 'vegetation', 'sky', 'person', 'car', 'bus')  # fmt: skip
PALETTE = [[128, 84, 138], [250, 240, 214], [240, 128, 188], [92, 92, 104], [202, 156, 120], [168, 176, 190],
           [252, 210, 48], [104, 158, 66], [112, 178, 226], [226, 48, 72], [38, 66, 178], [20, 152, 150]]  # fmt: skip
ROAD, MARKING, PAVEMENT, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, CAR, BUS = range(len(CLASSES))
IGNORED, OUTLINED = 255, (PERSON, CAR, BUS)  # the outlines of these are ignored
SIZE = (128, 192)  # rows, columns
SUPERSAMPLING = 2  # canvas pixels a side for a pixel of the image
MAP_SCALE, MAP_SHAPE, MAP_ORIGIN = 6, (360, 384), (32, 0)  # shadow maps: pixels a metre, shape, metres to x = 0, z = 0
STAMP = 'demo.json'

Colour = ndarray | tuple[float, float, float]  # RGB reflectance; what is above 1 glows
WHITE, BLACK, RED = (0.95, 0.95, 0.92), (0.07, 0.07, 0.08), (0.8, 0.08, 0.09)
BLUE, YELLOW = (0.1, 0.28, 0.7), (0.95, 0.74, 0.1)
METAL, GLASS, BARK = np.array([(0.4, 0.42, 0.44), (0.15, 0.19, 0.24), (0.32, 0.24, 0.17)])
LEAVES = [(0.42, 0.58, 0.2), (0.26, 0.46, 0.16), (0.26, 0.46, 0.16), (0.74, 0.44, 0.12), (0.85, 0.6, 0.66)]
WALLS = [(0.62, 0.3, 0.22), (0.84, 0.74, 0.56), (0.8, 0.79, 0.76), (0.56, 0.6, 0.64), (0.82, 0.56, 0.44)]
ROOFS = [(0.58, 0.25, 0.17), (0.3, 0.3, 0.34), (0.44, 0.28, 0.21)]
BOARDS = [(0.55, 0.38, 0.24), (0.85, 0.84, 0.8), (0.2, 0.22, 0.24), (0.25, 0.4, 0.36)]
PAINTS = [(0.75, 0.1, 0.1), (0.12, 0.24, 0.55), (0.86, 0.86, 0.85), (0.15, 0.15, 0.17), (0.85, 0.65, 0.12),
          (0.16, 0.4, 0.3), (0.45, 0.65, 0.8)]  # fmt: skip
MOMENTS = {  # zenith, horizon, sunlight, skylight, lowest and highest sun in degrees
    'noon': ((0.16, 0.40, 0.80), (0.70, 0.86, 0.98), (1.00, 0.94, 0.80), (0.40, 0.46, 0.54), (38, 60)),
    'morning': ((0.42, 0.62, 0.86), (1.00, 0.92, 0.78), (1.12, 0.90, 0.62), (0.38, 0.43, 0.52), (26, 38)),
    'evening': ((0.32, 0.40, 0.68), (1.00, 0.70, 0.42), (1.35, 0.78, 0.36), (0.37, 0.35, 0.45), (15, 26)),
    'overcast': ((0.60, 0.65, 0.71), (0.86, 0.89, 0.91), (0.16, 0.16, 0.15), (0.72, 0.75, 0.78), (40, 70)),
    'dusk': ((0.13, 0.16, 0.40), (0.96, 0.52, 0.48), (0.14, 0.10, 0.11), (0.42, 0.39, 0.54), (12, 20)),
}


@dataclass
class Face:
    """A flat convex polygon: points (N, 3), colour, outward normal (3,).

    Without a colour it marks the label only: a fence is one between its bars, too.
    """

    points: ndarray
    colour: Colour | None
    normal: ndarray

    def patches(self, *patches: tuple[float, float, float, float, Colour]) -> list['Face']:
        """Patches of a four-sided face: left, right, low, high (fractions of its width and height), colour."""
        edges = np.array([patch[:4] for patch in patches])[..., None]
        u, v = edges[:, [0, 1, 1, 0]], edges[:, [2, 2, 3, 3]]
        a, b, c, d = self.points
        quads = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * d + u * c)
        return [Face(quad, patch[4], self.normal) for quad, patch in zip(quads, patches, strict=True)]


@dataclass
class Thing:
    """What is painted, labelled and casts a shadow as one; things of greater depth are painted first."""

    label: int
    depth: float
    faces: list[Face]


class Camera:
    """A pinhole camera above a street that bends; its horizon is shifted instead of the camera being tilted."""

    def __init__(self, rng: Generator, rows: int, columns: int) -> None:
        self.focal, self.height, self.x = columns * rng.uniform(0.78, 1.0), rng.uniform(1.9, 2.8), rng.uniform(-2, 2)
        self.middle, self.horizon, self.bend = columns / 2, rows * rng.uniform(0.42, 0.54), rng.uniform(-1, 1) / 260
        # A metre ahead, a pixel's ray has gone so far to the right (1, columns), and so far up or down (rows, 1).
        self.right = np.float32((np.arange(columns) - self.middle) / self.focal)[None]
        down = np.float32((np.arange(rows) - self.horizon) / self.focal)[:, None]
        self.up, self.down = -down[down[:, 0] < 0], down[down[:, 0] >= 0]

    def project(self, points: ndarray) -> ndarray:
        """World points (N, 3) to canvas pixels (N, 2)."""
        x, y, z = points.T
        right, down = np.array([x + self.bend * z**2 - self.x, self.height - y]) * self.focal / z
        return np.column_stack([right + self.middle, down + self.horizon])

    def ground(self) -> tuple[ndarray, ndarray]:
        """Where the rays below the horizon meet the ground: x (rows below, columns) and z (rows below, 1)."""
        z = self.height / np.maximum(self.down, 0.01)
        return self.right * z - self.bend * z**2 + self.x, z

    def enters(self, x: float) -> float:
        """The depth from which on x is in the picture."""
        return abs(x - self.x) * self.focal / self.middle


class Light:
    """The hour: colours of sky and sun, the direction to the sun, and how far one sees through the haze (metres)."""

    def __init__(self, rng: Generator) -> None:
        moment = rng.choice(list(MOMENTS), p=[0.32, 0.22, 0.2, 0.14, 0.12])
        *colours, heights = MOMENTS[moment]
        self.zenith, self.horizon, self.sun, self.sky = np.float32(colours * rng.normal(1, 0.03, 3))
        self.night, self.visibility = moment == 'dusk', rng.uniform(80, 300)
        azimuth, height = rng.choice([0, np.pi, np.pi]) + rng.normal(0, 0.6), np.radians(rng.uniform(*heights))
        self.direction = np.array([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)])

    def shine(self, colours: ndarray, normals: ndarray, sunlit: ndarray) -> ndarray:
        """Colour * (skylight, less from below, + sunlight * cosine * sunlit) of N faces."""
        cosine = np.maximum(normals @ self.direction, 0)
        return colours * (self.sky * (0.8 + 0.2 * normals[:, 1:2]) + self.sun * (cosine * sunlit)[:, None])

    def through_haze(self, colours: ndarray, depth: ndarray) -> ndarray:
        clear = np.exp(-depth / self.visibility)[..., None]
        return colours * clear + self.horizon * (1 - clear)


class Scene:
    """The canvas: an image, RGB uint8, and for each pixel the index in `labels` of what is seen there."""

    def __init__(self, rng: Generator, rows: int, columns: int) -> None:
        self.camera, self.light, self.leaves = Camera(rng, rows, columns), Light(rng), pick(rng, LEAVES)
        self.road, pavement = rng.uniform(4.2, 4.8), rng.uniform(3, 4.2)  # half the road's width, the pavement's
        self.front = self.road + pavement  # where the houses stand
        self.zebra = rng.uniform(9, 14) if rng.random() < 0.6 else 0.0  # a zebra crossing at 0 is not in the picture
        self.noise = fractal_noise(rng)
        self.image, self.item = np.zeros((rows, columns, 3), np.uint8), np.full((rows, columns), SKY, np.uint16)
        self.labels = list(range(len(CLASSES)))
        # How much of the sun and of the sky is hidden, from the ground and (by houses alone) from things.
        self.no_sun, self.no_sky = np.zeros((2, *MAP_SHAPE), np.uint8)
        self.shade = self.no_sun

    def cast_shadows(self, things: list[Thing]) -> None:
        """Drop the convex hull of each thing onto both shadow maps: away from the sun, and straight down."""
        each = [np.concatenate([face.points for face in thing.faces]) for thing in things]
        points, ends = np.concatenate(each), np.cumsum([len(own) for own in each])
        for shadow, direction in ((self.no_sun, self.light.direction), (self.no_sky, np.array([0, 1, 0]))):
            fallen = (points - points[:, 1:2] / direction[1] * direction)[:, [0, 2]]
            for own in np.split(np.int32(np.round((fallen + MAP_ORIGIN) * MAP_SCALE)), ends[:-1]):
                hull = cv2.convexHull(own)
                cv2.fillConvexPoly(shadow, hull, 255)
                cv2.polylines(shadow, [hull], True, 255)  # what is flat against the light is still 20 cm thick

    def sunlit(self, points: ndarray) -> ndarray:
        """Whether the houses leave the sun to these points (N, 3): 1 or 0."""
        fallen = points - points[:, 1:2] / self.light.direction[1] * self.light.direction
        column, row = np.int32((fallen[:, [0, 2]] + MAP_ORIGIN) * MAP_SCALE).T
        return 1 - self.shade[np.clip(row, 0, MAP_SHAPE[0] - 1), np.clip(column, 0, MAP_SHAPE[1] - 1)] / 255

    def paint(self, things: list[Thing]) -> None:
        """Paint the things' faces that look at the camera, from far to near."""
        things = sorted(things, key=lambda thing: -thing.depth)
        items = np.repeat(np.arange(len(things)) + len(self.labels), [len(thing.faces) for thing in things])
        self.labels += [thing.label for thing in things]
        faces = [face for thing in things for face in thing.faces]
        points, normals = np.concatenate([face.points for face in faces]), np.array([face.normal for face in faces])
        ends = np.cumsum([len(face.points) for face in faces])
        first = points[[0, *ends[:-1]]]
        sunlit = np.where(np.array(self.labels)[items] == BUILDING, 1, self.sunlit(first))
        colours = np.array([BLACK if face.colour is None else face.colour for face in faces])
        colours = self.light.through_haze(self.light.shine(colours, normals, sunlit), first[:, 2])
        colours = np.clip(colours * 255, 0, 255).tolist()
        corners = np.int32(np.round(self.camera.project(points) * 16))
        eye = np.array([self.camera.x, self.camera.height, 0])
        for i in np.flatnonzero(((eye - first) * normals).sum(axis=1) > 0):
            polygon = corners[ends[i] - len(faces[i].points) : ends[i]]
            cv2.fillConvexPoly(self.item, polygon, int(items[i]), cv2.LINE_8, 4)
            if faces[i].colour is not None:
                cv2.fillConvexPoly(self.image, polygon, colours[i], cv2.LINE_AA, 4)


# What is painted pixel by pixel.


def fractal_noise(rng: Generator, size: int = 256) -> ndarray:
    """Noise of unit variance and amplitude 1/f that tiles: float32 (size, size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / frequency**1.1)
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def look_up(texture: ndarray, x: ndarray, y: ndarray, border: int = cv2.BORDER_WRAP) -> ndarray:
    """The texture at float32 positions; x and y are broadcast."""
    x, y = (np.ascontiguousarray(axis) for axis in np.broadcast_arrays(x, y))
    return cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=border)


def paint_sky(scene: Scene, rng: Generator) -> None:
    """A gradient from the horizon up, clouds on a flat ceiling, and the glow of a low sun."""
    light, right, up = scene.light, scene.camera.right, scene.camera.up
    fall, far = np.exp(-up * rng.uniform(2.5, 5))[..., None], rng.uniform(4, 9) / (up + 0.12)
    colour = light.zenith * (1 - fall) + light.horizon * fall
    clouds = look_up(scene.noise, right * far + rng.uniform(0, 256), 3 * far)
    cover = np.clip((clouds - rng.uniform(-0.4, 1.3)) * 0.9, 0, 0.85)[..., None]
    colour = colour * (1 - cover) + (0.55 * light.horizon + 0.5 * light.sky + 0.2 * light.sun) * cover
    if light.direction[2] > 0.2:
        x, y = np.float32(light.direction[:2] / light.direction[2])
        colour += 0.6 * light.sun * np.exp(-3.5 * np.hypot(right - x, up - y))[..., None]
    scene.image[: len(up)] = np.clip(colour * 255, 0, 255)


def paint_ground(scene: Scene, rng: Generator) -> None:
    """The road with its markings, paved pavements with kerbs and, behind the house fronts, grass; all under shadows."""
    light, (x, z) = scene.light, scene.camera.ground()
    aside, from_zebra, near = np.abs(x), np.abs(z - scene.zebra), 1 / (1 + z / 12)
    coarse, fine = (look_up(scene.noise, x * scale, z * scale) for scale in (6, 40))
    label = np.select([aside < scene.road, aside < scene.front], [ROAD, PAVEMENT], VEGETATION)
    asphalt, stone, grass = rng.uniform(0.28, 0.46), rng.uniform(0.52, 0.76), (0.30, 0.42, 0.16)
    palette = np.float32([[asphalt] * 3, WHITE, [stone] * 3, *[grass] * 5] * rng.normal(1, 0.04, (8, 3)))

    tiles = (label == PAVEMENT) & ((x % 0.9 < 0.07) | (z % 0.9 < 0.07))
    kerb = (label == PAVEMENT) & (aside < scene.road + 0.25)
    tracks = (label == ROAD) & (np.abs(aside % 2.4 - 1.4) < 0.35)
    grain = 1 - 0.3 * near * tiles + 0.25 * kerb - 0.12 * tracks + 0.06 * coarse + 0.09 * near * fine
    colour = palette[label] * grain[..., None]

    dashes = (aside < 0.24) & ((z + rng.uniform(0, 6)) % 6 < 3.6) & (from_zebra > 2.8)
    edges = (np.abs(aside - scene.road + 0.45) < 0.2) & (from_zebra > 1.8)
    zebra = (from_zebra < 1.8) & (x % 1.5 < 0.85) & (aside < scene.road - 0.3)
    marking = (dashes | edges | zebra) & (z < 45)
    worn = np.clip(0.84 + 0.14 * coarse, 0.5, 1)[marking, None]
    label[marking], colour[marking] = MARKING, colour[marking] * (1 - worn) + palette[MARKING] * worn

    plan = (x + MAP_ORIGIN[0]) * MAP_SCALE, (z + MAP_ORIGIN[1]) * MAP_SCALE
    blurred = cv2.GaussianBlur(scene.no_sun, None, 0.8), cv2.GaussianBlur(scene.no_sky, None, 2.2)
    sun, sky = (1 - look_up(shadow, *plan, cv2.BORDER_CONSTANT)[..., None] / np.float32(255) for shadow in blurred)
    colour *= light.sky * (0.45 + 0.55 * sky) + light.sun * np.float32(light.direction[1]) * sun
    scene.image[-len(z) :] = np.clip(light.through_haze(colour, z) * 255, 0, 255)
    scene.item[-len(z) :] = label


# What is made of faces.

DISC = np.array([(np.cos(a), np.sin(a)) for a in np.arange(0.5, 12) * np.pi / 6])
LEAF = np.array([(np.cos(a), np.sin(a), 0) for a in np.arange(6) * np.pi / 3])
TRIANGLE, DIAMOND = np.array([(-1, -0.7), (1, -0.7), (0, 1.05)]), np.array([(-1.1, 0), (0, -1.1), (1.1, 0), (0, 1.1)])


def pick(rng: Generator, colours: list[Colour]) -> ndarray:
    """One of the colours, somewhat lighter or darker."""
    return np.array(colours[rng.integers(len(colours))]) * rng.uniform(0.8, 1.15)


def rectangle(x0: float, x1: float, y0: float, y1: float) -> ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def upright(outline: ndarray, z: float, colour: Colour) -> Face:
    """An outline (N, 2) in x and y that faces the camera."""
    return Face(np.column_stack([outline, np.full(len(outline), z)]), colour, np.array([0, 0.3, -0.95]))


def alongside(x: float, z0: float, z1: float, high: float, colour: Colour | None) -> Face:
    """A wall along the street that faces it."""
    return Face(np.array([(x, 0, z0), (x, 0, z1), (x, high, z1), (x, high, z0)]), colour, np.array([-np.sign(x), 0, 0]))


def prism(outline: ndarray, x0: float, x1: float, colour: Colour) -> list[Face]:
    """A convex side view (N, 2) in z and y, as wide as x0 to x1: its two sides, then a face for each edge."""
    left, right = (np.column_stack([np.full(len(outline), x), outline[:, ::-1]]) for x in (x0, x1))
    faces = [left, right, *np.stack([left, right, np.roll(right, -1, axis=0), np.roll(left, -1, axis=0)], axis=1)]
    a, b, c = np.stack([points[:3] for points in faces], axis=1)
    normals = np.cross(b - a, c - a)
    outward = np.sign(((a - (left + right).mean(axis=0) / 2) * normals).sum(axis=1, keepdims=True))
    normals *= outward / np.linalg.norm(normals, axis=1, keepdims=True)
    return [Face(points, colour, normal) for points, normal in zip(faces, normals, strict=True)]


def house(rng: Generator, side: int, front: float, z0: float, z1: float, night: bool) -> Thing:
    """Walls with windows towards the camera and along the street, perhaps a shop, and a flat or a tiled roof."""
    paint, frame, storeys = pick(rng, WALLS), rng.choice([0.95, 0.8, 0.3]) * np.ones(3), int(rng.integers(2, 5))
    high, x, back = 2.9 * storeys, side * front, side * (front + rng.uniform(7, 10))
    end, facade = upright(rectangle(x, back, 0, high), z0, paint), alongside(x, z0, z1, high, paint)
    # Left, right, low and high edge of window and frame in a bay one wide and a storey one high.
    wide, tall, faces = rng.uniform(0.18, 0.3), rng.uniform(0.5, 0.66), []
    window = np.array([0.5 - wide, 0.5 + wide, 0.2, 0.2 + tall])
    around = window + (-0.07, 0.07, -0.07, 0.05)
    for wall, bays in ((end, 3), (facade, max(2, round((z1 - z0) / 2.4)))):
        patches = [(0, 1, 0, 0.25 / storeys, paint * 0.75), (0, 1, 1 - 0.12 / storeys, 1, paint * 0.65)]
        for storey, bay in np.ndindex(storeys, bays):
            lit = rng.random() < (0.45 if night else 0.02)
            glass = np.array([2.2, 1.6, 0.8]) if lit else GLASS * rng.uniform(0.6, 1.9)
            place, unit = np.array([bay, bay, storey, storey]), np.array([bays, bays, storeys, storeys])
            patches += [(*(place + around) / unit, frame), (*(place + window) / unit, glass)]
        faces += [wall, *wall.patches(*patches)]
    if rng.random() < 0.5:
        faces += facade.patches((0.03, 0.97, 0.06 / storeys, 0.7 / storeys, GLASS * (8 if night else 1.4)),
                                (0.40, 0.50, 0.02 / storeys, 0.7 / storeys, frame * 0.6),
                                (0.01, 0.99, 0.68 / storeys, 0.95 / storeys, pick(rng, PAINTS)))  # fmt: skip
    if rng.random() < 0.6:
        ridge, top = (x + back) / 2, high + rng.uniform(2, 3.5)
        slope = np.array([(x, high, z0), (x, high, z1), (ridge, top, z1), (ridge, top, z0)])
        faces.append(upright(np.array([(x, high), (back, high), (ridge, top)]), z0, paint))
        faces.append(Face(slope, pick(rng, ROOFS), np.array([-side * 0.6, 0.8, 0])))
    return Thing(BUILDING, z1, faces)


def foliage(rng: Generator, x: float, y: float, z: float, radius: float, colour: ndarray) -> list[Face]:
    """A ball of leaves, each lit as the ball's surface is there; farther balls have fewer."""
    normals = rng.normal(size=(int(np.clip(300 / z, 7, 26)), 3))
    normals[:, 2] = -np.abs(normals[:, 2])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    normals = normals[np.argsort(-normals[:, 2])]
    size = radius * rng.uniform(0.2, 0.38, len(normals)) * (1 + 4 / len(normals))
    points = (x, y, z) + 0.85 * radius * normals[:, None] + size[:, None, None] * LEAF
    shades = colour * rng.uniform(0.65, 1.35, (len(normals), 1))
    return [upright(DISC * radius * 0.95 + (x, y), z, colour * 0.5), *map(Face, points, shades, normals)]


def tree(rng: Generator, x: float, z: float, leaves: ndarray) -> list[Thing]:
    """A trunk under a crown that is round, or slender like a poplar's."""
    colour, size, trunk = pick(rng, [leaves]) * rng.normal(1, 0.08, 3), rng.uniform(0.85, 1.3), rng.uniform(1.9, 2.6)
    stem = upright(np.array([(-0.17, 0), (0.17, 0), (0.1, trunk + 1), (-0.1, trunk + 1)]) + (x, 0), z, BARK)
    offsets, radii = rng.normal((0, 1.3, 0), (0.75, 0.55, 0.6), (5, 3)), rng.uniform(0.85, 1.25, 5)
    if rng.random() < 0.25:
        offsets, radii = np.outer(np.arange(6), (0, 0.8, 0)) + (0, 0.3, 0), np.linspace(1, 0.4, 6)
    balls = sorted(zip(offsets * size + (x, trunk, z), radii * size, strict=True), key=lambda ball: -ball[0][2])
    crown = [face for middle, radius in balls for face in foliage(rng, *middle, radius, colour)]
    return [Thing(VEGETATION, z + 0.01, [stem]), Thing(VEGETATION, z, crown)]


def vehicle(rng: Generator, label: int, x: float, z: float, oncoming: bool, night: bool) -> Thing:
    """A car or a bus: body and cabin are two prisms, the near end is at z."""
    if label == CAR:
        long, wide, top, wheel, bays = rng.uniform(3.7, 4.6), rng.uniform(0.84, 0.94), rng.uniform(1.42, 1.75), 0.33, 2
        body = [(0, 0.28), (0.02, 0.72), (0.15, 0.95), (long - 0.3, 0.88), (long, 0.66), (long, 0.28)]
        rear = rng.uniform(0.1, 0.6)
        cabin, decks = [(rear, 0.93), (rear + 0.45, top), (long * 0.58, top), (long * 0.76, 0.9)], [(0.12, 0.9)]
    else:
        long, wide, top, wheel, bays = rng.uniform(7.5, 9.5), 1.22, rng.choice([2.9, 3.1, 4.1]), 0.48, 5
        body, cabin = ([(0, low), (0, high), (long, high), (long, low)] for low, high in ((0.35, 1.2), (1.2, top)))
        decks = [(0.2, 0.85)] if top < 4 else [(0.05, 0.38), (0.55, 0.9)]
    paint, start, way = pick(rng, PAINTS), (z + long * oncoming, 0), (-1 if oncoming else 1, 1)
    lower = prism(start + np.array(body) * way, x - wide, x + wide, paint)
    upper = prism(start + np.array(cabin) * way, x - wide * 0.9, x + wide * 0.9, paint)
    # Faces 0 and 1 are the sides; the near end is the first edge, or when oncoming the last but one.
    end, screen = (lower[-2], upper[-2]) if oncoming else (lower[2], upper[2])
    lamp = np.array([1.3, 1.2, 0.95] if oncoming else [0.85, 0.07, 0.06]) * (2.2 if night else 1)
    faces = lower + end.patches((0, 1, 0, 0.3, BLACK), (0.38, 0.62, 0.3, 0.55, WHITE),
                                (0.04, 0.24, 0.55, 0.95, lamp), (0.76, 0.96, 0.55, 0.95, lamp))  # fmt: skip
    wheels = product((-1, 1), (0.19 * long, 0.8 * long), ((wheel, BLACK), (wheel / 2, METAL)))
    for flank, ahead, (size, colour) in wheels:
        disc = upright(DISC * size + (z + ahead, wheel), x + flank * (wide + 0.01), colour)
        faces.append(Face(disc.points[:, [2, 1, 0]], colour, np.array([flank, 0, 0])))
    faces += upper
    for low, high in decks:
        windows = [(a, b - 0.04, low, high, GLASS) for a, b in pairwise(np.linspace(0.06, 0.96, bays + 1))]
        faces += screen.patches((0.07, 0.93, low, high, GLASS * 1.5))
        faces += upper[0].patches(*windows) + upper[1].patches(*windows)
    return Thing(label, z, faces)


FIGURE = (('legs', [(-0.14, 0), (-0.05, 0), (0.06, 0.5), (-0.07, 0.5)]),
          ('legs', [(0.06, 0), (0.16, 0), (0.07, 0.5), (-0.06, 0.5)]),
          ('arms', [(-0.2, 0.46), (-0.14, 0.45), (-0.06, 0.82), (-0.13, 0.82)]),
          ('arms', [(0.2, 0.5), (0.26, 0.52), (0.13, 0.82), (0.06, 0.82)]),
          ('coat', [(-0.12, 0.44), (0.12, 0.44), (0.14, 0.79), (0.05, 0.86), (-0.05, 0.86), (-0.14, 0.79)]),
          ('hair', DISC * 0.08 + (-0.01, 0.93)), ('skin', DISC * 0.065 + (0.02, 0.915)))  # fmt: skip


def person(rng: Generator, x: float, z: float) -> Thing:
    """Somebody walking to the left or to the right."""
    coat, legs = rng.uniform(0.08, 0.9, 3), rng.uniform(0.08, 0.5) * rng.normal(1, 0.2, 3)
    skin = rng.uniform(0.4, 1.05) * np.array([0.85, 0.62, 0.48])
    colours = {'legs': legs, 'arms': coat * 0.75, 'coat': coat, 'hair': skin * rng.uniform(0.15, 0.6), 'skin': skin}
    size = rng.uniform(1.8, 2.2) * np.array([rng.choice([-1, 1]) * rng.uniform(1.15, 1.5), 1])
    return Thing(PERSON, z, [upright(np.array(outline) * size + (x, 0), z, colours[what]) for what, outline in FIGURE])


def street_lamp(rng: Generator, x: float, z: float, night: bool) -> list[Thing]:
    """A pole and its arm, which ends in a lamp over the road."""
    tall, metal, lamp = rng.uniform(4.4, 6), METAL * rng.uniform(0.5, 1.6), np.array(WHITE) * (3 if night else 1)
    pole, shade = rectangle(-0.19, 0.19, 0, tall) + (x, 0), rectangle(0.04, 0.19, 0, tall) + (x, 0)
    arm, head = rectangle(0, 1.4, tall - 0.16, tall + 0.16), rectangle(0.9, 1.6, tall - 0.36, tall - 0.04)
    flip = (-np.sign(x), 1)
    arm_faces = [upright(arm * flip + (x, 0), z, metal), upright(head * flip + (x, 0), z, lamp)]
    return [Thing(POLE, z, [upright(pole, z, metal), upright(shade, z, metal * 0.7)]), Thing(POLE, z, arm_faces)]


SIGNS = (((DISC, RED), (DISC * 0.72, WHITE), (rectangle(-0.35, 0.35, -0.15, 0.15), BLACK)),
         ((DISC, RED), (rectangle(-0.65, 0.65, -0.18, 0.18), WHITE)),
         ((TRIANGLE, RED), (TRIANGLE * 0.62, WHITE), (rectangle(-0.09, 0.09, -0.3, 0.25), BLACK)),
         ((DISC, BLUE), (TRIANGLE * 0.5 + (0, 0.3), WHITE), (rectangle(-0.15, 0.15, -0.7, 0), WHITE)),
         ((DIAMOND, WHITE), (DIAMOND * 0.75, YELLOW)),
         ((rectangle(-1.5, 1.5, -0.7, 0.8), WHITE), (rectangle(-1.4, 1.4, -0.6, 0.7), BLUE),
          (rectangle(-1.1, 0.6, 0.15, 0.35), WHITE), (rectangle(-1.1, 0.9, -0.3, -0.1), WHITE)))  # fmt: skip


def traffic_sign(rng: Generator, x: float, z: float) -> list[Thing]:
    """A sign on a pole of its own."""
    size, y = rng.uniform(0.5, 0.66), rng.uniform(2.3, 2.9)
    pole = upright(rectangle(x - 0.15, x + 0.15, 0, y), z, METAL * rng.uniform(0.8, 1.6))
    faces = [upright(outline * size + (x, y), z, colour) for outline, colour in SIGNS[rng.integers(len(SIGNS))]]
    return [Thing(POLE, z + 0.01, [pole]), Thing(SIGN, z, faces)]


def fence(rng: Generator, x: float, z0: float, z1: float, high: float, bar: float) -> list[Thing]:
    """Panels of 2 m along the street, their bars or boards as wide as this fraction of their distance."""
    panels, colour = [], pick(rng, BOARDS)
    for z in np.arange(z0, z1, 2.0):
        panel = alongside(x, z, z + 2, high, None)
        bars = [(i / 8, (i + bar) / 8, 0.03, rng.uniform(0.93, 1), colour * rng.uniform(0.8, 1.1)) for i in range(8)]
        rails = [(0, 1, y, y + 0.1, colour * 0.75) for y in (0.12, 0.76)]
        panels.append(Thing(FENCE, z, [panel, *panel.patches(*rails, *bars)]))
    return panels


def skyline(rng: Generator, leaves: ndarray) -> list[Thing]:
    """Towers and woods in the haze beyond the end of the street."""
    things = []
    for x in np.arange(-150, 150, 14.0):
        tower = rectangle(x, x + rng.uniform(8, 18), -2, rng.uniform(6, 26))
        wood = DISC * rng.uniform(4, 7) + (x + rng.normal(0, 5), 1)
        things.append(Thing(BUILDING, 150 + x % 5, [upright(tower, 150, pick(rng, [METAL]))]))
        things.append(Thing(VEGETATION, 140, [upright(wood, 140, leaves * 0.8)]))
    return things


# What stands where.


def houses_and_gardens(scene: Scene, rng: Generator) -> tuple[list[Thing], list[Thing]]:
    """Two rows of houses, and in the gaps between them fenced gardens."""
    houses, gardens = [], []
    gaps = scene.camera.enters(scene.front) * 0.55, rng.uniform(12, 30)  # the first is sure to be seen
    for side, gap in zip(rng.permutation([-1, 1]), gaps, strict=True):
        z = rng.uniform(3, 5)
        while z < 64:
            if z > gap:
                start, z, gap = z, z + rng.uniform(10, 14), z + rng.uniform(25, 60)
                gardens += fence(rng, side * scene.front, start, z, rng.uniform(1.7, 2.4), 0.85)
                for ahead in np.arange(start + 1, z, 1.8):
                    bush = foliage(rng, side * (scene.front + 1.2), 0.6, ahead, rng.uniform(0.8, 1.3), scene.leaves)
                    gardens.append(Thing(VEGETATION, ahead, bush))
                for ahead in np.arange(start + 1, min(z, 40), 3.6):
                    gardens += tree(rng, side * (scene.front + rng.uniform(3, 6)), ahead, scene.leaves)
            houses.append(house(rng, side, scene.front, z, z + rng.uniform(6, 12), scene.light.night))
            z = houses[-1].depth
    return houses, gardens


def kerbside(scene: Scene, rng: Generator) -> list[Thing]:
    """Lamps, trees, signs, perhaps railings, and passers-by along both kerbs; somebody on the zebra crossing."""
    things = []
    for side in (-1, 1):
        kerb = side * (scene.road + 0.6)
        enters = scene.camera.enters(kerb)
        for z in np.arange(enters + rng.uniform(0.3, 4), 42, 16.0):
            things += street_lamp(rng, kerb, z, scene.light.night)
            if rng.random() < 0.6:
                things += tree(rng, kerb + side * 0.3, z + rng.uniform(4, 9), scene.leaves)
        for z in enters * rng.uniform((1.1, 1.6), (1.4, 2.1)):
            things += traffic_sign(rng, kerb + side * rng.uniform(0, 0.4), z)
        if rng.random() < 0.35:
            things += fence(rng, side * (scene.road + 0.3), enters, enters + rng.uniform(5, 10), 1.05, 0.6)
        for z in enters + rng.uniform(0.8, 8, 4):
            things.append(person(rng, side * rng.uniform(scene.road + 1.2, scene.front - 0.3), z))
    if scene.zebra and rng.random() < 0.8:
        things.append(person(rng, rng.uniform(-0.8, 0.8) * scene.road, scene.zebra + rng.uniform(-1, 1)))
    return things


def traffic(scene: Scene, rng: Generator) -> list[Thing]:
    """A bus in one lane, cars in the other and behind the bus, and parked cars; none on the zebra crossing."""
    night, side, beyond = scene.light.night, rng.choice([-1, 1]), (scene.zebra or 6.5) + 2.5
    bus, *cars = beyond + rng.uniform((0, 19, -1, 13), (6, 30, 5, 22))
    things = [vehicle(rng, BUS, side * 1.5, bus, side < 0, night)]
    for lane, z in zip((side, -side, -side), cars, strict=True):
        things.append(vehicle(rng, CAR, lane * 1.5, z, lane < 0, night))
    for side, z in product((-1, 1), np.arange(rng.uniform(5, 8), 45, 5.6)):
        if rng.random() < 0.45 and abs(z + 2 - scene.zebra) > 4 and abs(z - bus - 2) > 6:
            things.append(vehicle(rng, CAR, side * (scene.road - 1.05), z, rng.random() < 0.5, False))
    return things


# The picture.


def outlined(item: ndarray, labels: ndarray) -> ndarray:
    """The label map of an item map; where a person, a car or a bus touches anything else it is ignored."""
    label, kernel = labels[item], np.ones((3, 3), np.uint8)
    edge = cv2.morphologyEx(item, cv2.MORPH_GRADIENT, kernel) > 0
    label[edge & (cv2.dilate(np.isin(label, OUTLINED).astype(np.uint8), kernel) > 0)] = IGNORED
    return label


def photograph(painting: ndarray, rng: Generator) -> ndarray:
    """What lens and sensor make of a uint8 painting: exposure, glare, vignette, white balance, blur and noise."""
    image = 255 * np.float32(painting / 255) ** 0.8
    image += 0.14 * (image - image.mean(axis=2, keepdims=True))
    image += 0.6 * cv2.GaussianBlur(np.maximum(image - 215, 0), None, 3)
    y, x = np.ogrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    image *= (1.05 - 0.14 * (x**2 + y**2))[..., None] * rng.normal(1, 0.02, 3) * rng.uniform(0.94, 1.14)
    image = cv2.GaussianBlur(image, None, rng.uniform(0.25, 0.5)) + rng.normal(0, rng.uniform(1.5, 5), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def render_scene(rng: Generator, size: tuple[int, int] = SIZE) -> tuple[ndarray, ndarray]:
    """One street: its image, RGB uint8 (rows, columns, 3), and its label map, uint8 (rows, columns)."""
    step = SUPERSAMPLING
    scene = Scene(rng, size[0] * step, size[1] * step)
    houses, things = houses_and_gardens(scene, rng)
    things += kerbside(scene, rng) + traffic(scene, rng)
    scene.cast_shadows(houses)
    scene.shade = scene.no_sun.copy()
    scene.cast_shadows(things)

    paint_sky(scene, rng)
    paint_ground(scene, rng)
    scene.paint(skyline(rng, scene.leaves) + houses + things)
    label = outlined(scene.item, np.array(scene.labels, np.uint8))[step // 2 :: step, step // 2 :: step]
    image = photograph(cv2.resize(scene.image, size[::-1], interpolation=cv2.INTER_AREA), rng)
    way = rng.choice([-1, 1])  # in some towns they drive on the left
    return image[:, ::way].copy(), label[:, ::way].copy()


# The files.


def layout(root: Path, train: int, val: int) -> dict[tuple[int, int], tuple[Path, Path]]:
    """(split, index) of each scene -> the paths of its image and of its label map."""
    scenes = [(0, 'training', index) for index in range(train)] + [(1, 'validation', index) for index in range(val)]
    return {(split, index): (root / 'images' / folder / f'street_{index:04d}.jpg',
                             root / 'annotations' / folder / f'street_{index:04d}.png')
            for split, folder, index in scenes}  # fmt: skip


def pictures(root: Path) -> set[Path]:
    """All files where ADE20K's layout has pictures."""
    return {*root.glob('images/*/*'), *root.glob('annotations/*/*')}


def stamp(train: int, val: int, size: tuple[int, int], seed: int) -> str:
    """JSON of all that the bytes of the data set depend on."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    versions = {'source': source, 'numpy': np.__version__, 'opencv': cv2.__version__}
    return json.dumps({'train': train, 'val': val, 'size': size, 'seed': seed, **versions}, indent=2) + '\n'


def generate(root: Path, train: int = 160, val: int = 32, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    """Write images/{training,validation}/*.jpg, annotations/{training,validation}/*.png, and a stamp, last.

    A scene depends on seed, split and index, not on how many there are. What an earlier run left is replaced.

    Raises:
        FileExistsError: The folder holds pictures that are not the demo's.
        OSError: A file cannot be written.
    """
    root = Path(root)
    for path in sorted(pictures(root)):
        if not path.name.startswith('street_'):
            raise FileExistsError(f'{path} is not from the demo, which wants a folder of its own: name another one')
    for path in (root / STAMP, *pictures(root)):
        path.unlink(missing_ok=True)
    for key, paths in layout(root, train, val).items():
        rng = np.random.default_rng([seed, *key])
        image, label = render_scene(rng, size)
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(80, 96))]
        for path, picture, options in zip(paths, (image[..., ::-1], label), (quality, []), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(path), picture, options):
                raise OSError(f'cannot write {path}')
    (root / STAMP).write_text(stamp(train, val, size, seed))


def main(arguments: list[str] | None = None) -> None:
    """The command line: draw the data set, unless the folder holds exactly it already."""
    parser = argparse.ArgumentParser(prog='python -m mmseg_resnest.demo', description='Draw the demo data set.')
    parser.add_argument('root', type=Path, help="the folder to write, in ADE20K's layout")
    parser.add_argument('--train', type=int, default=160, help='number of training scenes (default: %(default)s)')
    parser.add_argument('--val', type=int, default=32, help='number of validation scenes (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed, another town (default: %(default)s)')
    args = parser.parse_args(arguments)
    if min(args.train, args.val, args.seed) < 0:
        parser.error('--train, --val and --seed must not be negative')
    scenes = f'{args.train} + {args.val} scenes of {SIZE[1]} x {SIZE[0]} pixels, {len(CLASSES)} classes'
    stamped = (args.root / STAMP).is_file() and (args.root / STAMP).read_text()
    wanted = {*chain(*layout(args.root, args.train, args.val).values())}
    if stamped == stamp(args.train, args.val, SIZE, args.seed) and pictures(args.root) == wanted:
        print(f'{args.root} is complete: {scenes}')
        return
    print(f'writing {args.root}: {scenes} ...', flush=True)
    try:
        generate(args.root, args.train, args.val, seed=args.seed)
    except OSError as error:
        parser.exit(1, f'error: {error}\n')


if __name__ == '__main__':
    main()
