"""Digits, drawn: photos' size and their mess, without a download."""

from __future__ import annotations

import numpy as np

GROUND, INK, NOISE = (0, 90), (150, 256), 25  # grey values; their standard deviation
SHARES, TURN = (0.42, 0.79), 25.0  # of the image's side that a digit is high; degrees


def drawn_digits(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(images (10 count, size, size, 3) uint8, labels (10 count,) int64): `count` of each digit, at some place, size,
    turn and grey, on a noisy ground. The same arguments draw the same."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    least, most = (round(share * size) for share in SHARES)
    images, labels = [], np.arange(10 * count) % 10
    for label in labels:
        ground, ink = rng.integers(*GROUND), rng.integers(*INK)
        picture = Image.new("L", (size, size), int(ground))
        font = ImageFont.load_default(int(rng.integers(least, most)))
        place = rng.integers(round(0.1 * size), round(0.42 * size), 2)
        ImageDraw.Draw(picture).text(tuple(place), str(label), int(ink), font)
        turned = picture.rotate(float(rng.uniform(-TURN, TURN)), Image.Resampling.BICUBIC, fillcolor=int(ground))
        noisy = np.asarray(turned, np.float32) + rng.normal(0, NOISE, (size, size))
        images.append(np.repeat(np.clip(noisy, 0, 255).astype(np.uint8)[..., None], 3, -1))
    return np.stack(images), labels
