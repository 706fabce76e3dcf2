"""Sound for the examples: speech-like utterances in noise, and the truth about them."""

import numpy as np
from numpy.typing import NDArray

RATE = 16000
SNRS = (0, 5, 10, 20)  # dB
Sound = NDArray[np.float32]
Truth = NDArray[np.bool_]

# The first three formants in Hz of six vowels, spoken by men (Peterson and Barney, 1952).
VOWELS = np.array(
    [
        [270, 2290, 3010],
        [530, 1840, 2480],
        [660, 1720, 2410],
        [730, 1090, 2440],
        [570, 840, 2410],
        [300, 870, 2240],
    ],
    np.float32,
)
BANDWIDTHS = (60, 90, 150)  # Hz, of the formants


def vowel(numbers: np.random.Generator, samples: int, pitch: float) -> Sound:
    """Harmonics of a falling pitch under formants that glide from one vowel to another."""
    t = np.linspace(0, 1, samples, dtype=np.float32)
    start, end = VOWELS[numbers.choice(len(VOWELS), 2)]
    f0 = (pitch * (1.1 - 0.2 * t)).astype(np.float32)
    k = np.arange(1, int(4000 / pitch), dtype=np.float32)[:, None]
    gain = np.zeros((len(k), samples), np.float32)
    for first, last, width in zip(start, end, BANDWIDTHS, strict=True):
        gain += 1 / (1 + ((k * f0 - (first + (last - first) * t)) / width) ** 2)
    phase = np.cumsum(2 * np.pi * f0 / RATE, dtype=np.float32)
    wave = (gain / np.sqrt(k) * np.sin(k * phase)).sum(0)
    shaped: Sound = np.sqrt(np.sin(np.pi * t).clip(0)) * wave / wave.std()
    return shaped


def consonant(numbers: np.random.Generator, samples: int) -> Sound:
    """A hiss: noise without its low frequencies."""
    hiss = np.diff(numbers.standard_normal(samples + 1))
    shaped: Sound = (0.2 * np.hanning(samples) * hiss).astype(np.float32)
    return shaped


def utterance(numbers: np.random.Generator) -> Sound:
    """Two to seven syllables with short gaps."""
    pitch = numbers.uniform(90, 240)
    parts: list[Sound] = []
    for _ in range(numbers.integers(2, 8)):
        if numbers.random() < 0.6:
            parts.append(consonant(numbers, int(numbers.uniform(0.04, 0.1) * RATE)))
        parts.append(vowel(numbers, int(numbers.uniform(0.1, 0.25) * RATE), pitch))
        parts.append(np.zeros(int(numbers.uniform(0, 0.05) * RATE), np.float32))
    return np.concatenate(parts)


def noise(numbers: np.random.Generator, samples: int) -> Sound:
    """One of five kinds, of mean power one."""
    white = numbers.standard_normal(samples)
    t = np.arange(samples) / RATE
    kind = numbers.integers(5)
    if kind == 1:  # pink: power falls with frequency
        spectrum = np.fft.rfft(white)
        wave = np.fft.irfft(spectrum / np.sqrt(1 + np.arange(len(spectrum))), samples)
    elif kind == 2:  # mains hum
        wave = sum(np.sin(2 * np.pi * 100 * k * t) / k for k in range(1, 9)) + 0.05 * white
    elif kind == 3:  # an engine: deep noise that beats
        beat = 1 + 0.8 * np.sin(2 * np.pi * numbers.uniform(8, 15) * t)
        wave = beat * np.convolve(white, np.hanning(64), "same")
    elif kind == 4:  # an alarm: a tone, on and off
        tone = np.sin(2 * np.pi * numbers.uniform(500, 2500) * t)
        wave = tone * (t % 0.8 < 0.3) + 0.1 * white
    else:
        wave = white
    even: Sound = (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)
    return even


def scene(numbers: np.random.Generator, seconds: int) -> tuple[Sound, Truth]:
    """Sound, and for every sample whether it is of an utterance."""
    samples = seconds * RATE
    sound = np.zeros(samples, np.float32)
    speaks = np.zeros(samples, bool)
    at = int(numbers.uniform(0.3, 1.2) * RATE)
    while at < samples:
        said = utterance(numbers)[: samples - at]
        sound[at : at + len(said)] = said
        speaks[at : at + len(said)] = True
        at += len(said) + int(numbers.uniform(0.4, 1.5) * RATE)
    power = np.mean(sound[speaks] ** 2)
    ratio = 10 ** (numbers.choice(SNRS) / 10)
    sound += np.sqrt(power / ratio) * noise(numbers, samples)
    sound *= 0.05 * 10 ** numbers.uniform(-0.5, 0.5)
    return sound, speaks


def scenes(seed: int, count: int, seconds: int) -> tuple[Sound, Truth]:
    """Several in one, each with its own noise."""
    numbers = np.random.default_rng(seed)
    sounds, truths = zip(*(scene(numbers, seconds) for _ in range(count)), strict=True)
    return np.concatenate(sounds), np.concatenate(truths)


def by_chunk(truth: Truth, chunk: int) -> Truth:
    """Whether most of each chunk is speech."""
    most: Truth = truth.reshape(-1, chunk).mean(1) > 0.5
    return most
