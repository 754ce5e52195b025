"""Keyword spotting: MLPerf Tiny's DS-CNN learns ten words from their spectrograms, 80% of the pointwise weights zero.

python examples/keyword_spotting.py            # words that espeak-ng speaks (apt-get install espeak-ng)
python examples/keyword_spotting.py --quick    # drawn tones in their place, two epochs, for the tests
python examples/keyword_spotting.py --picture words.png
"""

import argparse
import subprocess
import wave
from io import BytesIO
from itertools import pairwise

import numpy as np

import mest_compile as mest
from mest_compile.models.catalog import build_model

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
RATE, FRAMES, BANDS = 16_000, 49, 10  # samples a second; what DS-CNN takes of a second of them
WINDOW, STEP = 640, 320  # samples: 40 ms, every 20 ms
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-us+m7")  # the last one for the test
SPEEDS, PITCHES = (120, 150, 180, 210), (30, 50, 70)  # words a minute; espeak-ng's 0 to 99


def spoken(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """Samples of a word as espeak-ng says it, float64 in -1 to 1, RATE a second."""
    said = ["espeak-ng", "--stdout", "-v", voice, "-s", str(speed), "-p", str(pitch), word]
    content = subprocess.run(said, check=True, capture_output=True).stdout
    with wave.open(BytesIO(content)) as file:
        samples, rate = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768, file.getframerate()
    return np.interp(np.arange(0, len(samples), rate / RATE), np.arange(len(samples)), samples)


def tone(label: int, rng: np.random.Generator) -> np.ndarray:
    """What the tests train on: a tone whose pitch rises or falls, another one for each label."""
    time = np.arange(RATE // 2) / RATE
    pitch = 300 + 250 * (label % 5) + rng.normal(0, 20) + (400 if label < 5 else -400) * time
    return 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def spectrogram(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(1, FRAMES, BANDS) float32: logarithms of the energies of bands that widen with pitch, of a noisy second in which
    the word stands somewhere."""
    second = rng.normal(0, 0.003, RATE + WINDOW)
    samples = samples[:RATE]
    start = rng.integers(0, RATE - len(samples) + 1)
    second[start : start + len(samples)] += samples * rng.uniform(0.5, 1.5)
    frames = np.lib.stride_tricks.sliding_window_view(second, WINDOW)[::STEP][:FRAMES]
    energy = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    edges = np.geomspace(100, RATE / 2, BANDS + 1) * WINDOW / RATE
    bands = [energy[:, round(low) : round(high)].sum(1) for low, high in pairwise(edges)]
    return np.log(np.stack(bands, 1) + 1e-3).astype(np.float32)[None]


def words(quick: bool) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(training, test) part: spectrograms and labels. Tests are said by a voice that nothing was trained on."""
    rng = np.random.default_rng(0)
    parts: tuple[list, list] = ([], [])
    for label, word in enumerate(WORDS):
        if quick:
            for number in range(20):
                parts[number % 4 == 0].append((spectrogram(tone(label, rng), rng), label))
            continue
        for voice in VOICES:
            for speed in SPEEDS:
                for pitch in PITCHES:
                    samples = spoken(word, voice, speed, pitch)
                    copies = 1 if voice == VOICES[-1] else 3  # in other places, with other noise
                    parts[voice == VOICES[-1]].extend((spectrogram(samples, rng), label) for _ in range(copies))
    train, test = ((np.stack([x for x, _ in part]), np.array([y for _, y in part])) for part in parts)
    mean, std = train[0].mean(), train[0].std()
    return ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1])


def draw(train: tuple[np.ndarray, np.ndarray], path: str) -> None:
    """A spectrogram of each word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for label, axes in enumerate(figure.subplots(2, 5).ravel()):
        axes.imshow(train[0][train[1] == label][0, 0].T, origin="lower", aspect="auto", cmap="magma")
        axes.set(title=WORDS[label], xticks=[], yticks=[])
    figure.savefig(path, dpi=56)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="drawn tones, two epochs")
    parser.add_argument("--picture", help="PNG file for spectrograms of the words")
    given = parser.parse_args()

    train, test = words(given.quick)
    if given.picture:
        draw(train, given.picture)
    shape = (16, 1, FRAMES, BANDS)
    step = mest.compile(build_model("ds-cnn", shape, len(WORDS)), shape, scheme="block", sparsity=0.8)
    recipe = mest.Recipe(epochs=2 if given.quick else 30, method="em", lr=0.05, augment=False)
    run = mest.Trainer(step, recipe).fit(train, test)
    sparse = step.sparsity()
    print(f"test accuracy {run.test_accuracy:.1%} of {len(test[1])} words, {len(sparse)} layers sparse")
    print(f"a step holds {step.memory()['total'] / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
