"""Clean speech and noise by acoustic scene, and mixtures of both at stated signal-to-noise ratios.

Everything is mono at 16 kHz in memory: other rates are resampled, channels averaged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtl.data.base import Data, read_csv
from rtl.errors import InputError

RATE = 16_000  # samples a second
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
TEST_SHARE = 5  # without a split given, one group in so many is for testing
PEAK = 0.99  # a louder mixture is turned down, with its clean speech
UNKNOWN = 2**63 - 1  # samples, to libsndfile: of FLAC written to a pipe
FAINT = 1e-3  # of a recording's mean power: a crop below it (-30 dB) is a pause


@dataclass(frozen=True)
class Recording:
    """One file.

    Attributes:
        file: where it is.
        name: its path in the corpus.
        scene: of noise; "" for speech.
        split: "train" or "test".
    """

    file: Path
    name: str
    scene: str
    split: str


def corpus(root: str | os.PathLike[str]) -> list[Recording]:
    """Clean speech and noise, sorted by name.

    Args:
        root: a folder with, in it or in a folder `speech` in it, one of:
            `manifest.csv`, with the columns file (relative to it), kind (speech or noise), scene (of noise), split
            (train or test), and perhaps group (the speaker, or the recording a clip was cut from);
            `clean/` and `noise/SCENE/`, with WAV or FLAC files, or folders of them, a speaker or a place each. Folders
            `train` and `test` in these say what is for testing; else every fifth speaker or place is (every fifth file,
            where there are no folders).

    Raises:
        InputError: neither is there, a manifest that is not as said, a group or a file in both splits, no scene, or a
            split without speech or without noise of a scene.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"data is {str(folder)!r}, which is no folder: give one with clean speech and noise")
    for place in (folder / "speech", folder):
        if (place / "manifest.csv").is_file():
            return _checked(sorted(_from_manifest(place / "manifest.csv"), key=lambda r: r.name), place)
        if (place / "clean").is_dir() and (place / "noise").is_dir():
            return _checked(sorted(_from_folders(place), key=lambda r: r.name), place)
    raise InputError(
        f"data is {str(folder)!r}, which has no manifest.csv, nor clean/ and noise/SCENE/, there or in speech/"
    )


def scenes(recordings: Sequence[Recording]) -> tuple[str, ...]:
    """The scenes there is noise of, sorted."""
    return tuple(sorted({r.scene for r in recordings if r.scene}))


def read_audio(file: str | os.PathLike[str], rate: int = RATE) -> np.ndarray:
    """A recording as mono float32 (samples,), full scale 1.

    Raises:
        InputError: a file that cannot be read, without samples, or with samples that are not finite; or soundfile is
            not installed.
    """
    with open_audio(file) as audio:
        found = audio.samplerate
        try:
            channels = audio.read(audio.frames, dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise InputError(f"file is {str(file)!r}, which cannot be read as audio: {error}") from error
    check_samples(channels, file, 0, found)
    if len(channels) == 0:
        raise InputError(f"file is {str(file)!r}, which holds no samples: leave it out")
    return resample(channels.mean(1, dtype=np.float64), found, rate).astype(np.float32)


def open_audio(file: str | os.PathLike[str]) -> Any:
    """The `soundfile.SoundFile` of a recording. Raises InputError if it cannot be read, or soundfile is missing."""
    soundfile = soundfile_module()
    try:
        audio = soundfile.SoundFile(str(file))
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: of .raw, which does not say its rate
        raise InputError(f"file is {str(file)!r}, which cannot be read as audio: {error}") from error
    if audio.frames >= UNKNOWN:
        audio.close()
        raise InputError(f"file is {str(file)!r}, which does not say how long it is: write it anew, as WAV for one")
    return audio


def check_samples(samples: np.ndarray, file: str | os.PathLike[str], start: int, rate: int) -> None:
    """Raise InputError, saying where, if one of (samples, channels) is not finite; they begin at `start` in `file`."""
    bad = ~np.isfinite(samples).all(1)
    if bad.any():
        place = start + int(bad.argmax())
        raise InputError(
            f"file is {str(file)!r}, which holds NaN or infinity at sample {place} ({place / rate:.3f} s): repair it"
        )


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Samples (n, ...) at another rate, (ceil(n · to / rate), ...)."""
    from scipy.signal import resample_poly

    if rate == to:
        return samples
    divisor = math.gcd(rate, to)
    resampled: np.ndarray = resample_poly(samples, to // divisor, rate // divisor, axis=0)
    return resampled


def mix(clean: np.ndarray, noise: np.ndarray, snr: float) -> tuple[np.ndarray, np.ndarray]:
    """(noisy, clean), both float32 of the length given, with the noise scaled so that the powers' ratio is `snr` dB.

    Where the mixture would pass 0.99 of full scale, both are turned down alike.

    Raises InputError if either is silent.
    """
    powers = [float(np.square(s, dtype=np.float64).mean()) if len(s) else 0.0 for s in (clean, noise)]
    for name, power in zip(("clean", "noise"), powers, strict=True):
        if not power > 0:
            raise InputError(f"{name} is silent: there is no signal-to-noise ratio to mix it at")
    noisy = clean + noise * math.sqrt(powers[0] / powers[1] / 10 ** (snr / 10))
    gain = min(1.0, PEAK / float(max(np.abs(noisy).max(), np.abs(clean).max())))
    return (noisy * gain).astype(np.float32), (clean * gain).astype(np.float32)


def mixtures(
    recordings: Sequence[Recording], split: str, clips: int, seconds: float, snrs: Sequence[float], seed: int = 0
) -> Data:
    """Noisy clips of every scene, with their clean speech.

    Every utterance and every noise of the split comes again only after all others have; where in it a clip begins, and
    who meets whom, follows from the seed. SNRs take turns. Noise that is shorter than a clip is repeated, speech
    followed by silence.

    Args:
        recordings: what `corpus` gives.
        split: "train" or "test".
        clips: of each scene.
        seconds: of a clip.
        snrs: in dB.
        seed: of everything drawn, 0 or more.

    Returns:
        inputs, the mixtures, and targets, the clean speech, float32 (scenes · clips, samples); metadata "scene", "snr",
        "speech" and "noise" (names of the recordings).

    Raises:
        InputError: a number that makes no clip, or a recording that is silent; see also `read_audio`.
    """
    length = round(seconds * RATE) if math.isfinite(seconds) else 0
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    if clips < 1 or length < 1 or not snrs or not all(math.isfinite(snr) for snr in snrs):
        raise InputError(
            f"clips is {clips}, seconds {seconds}, snrs {tuple(snrs)}: expected 1 or more, above 0, finite"
        )
    own = [r for r in recordings if r.split == split]
    names = scenes(recordings)
    loaded: dict[str, np.ndarray] = {}
    noisy = torch.empty(len(names) * clips, length)
    clean = torch.empty_like(noisy)
    metadata: dict[str, list[Any]] = {"scene": [], "snr": [], "speech": [], "noise": []}
    for number, scene in enumerate(names):
        generator = np.random.default_rng([seed, ("train", "test").index(split), number])
        speech = _in_turn([r for r in own if not r.scene], generator)
        noise = _in_turn([r for r in own if r.scene == scene], generator)
        for clip in range(clips):
            voice, sound = next(speech), next(noise)
            for recording in (voice, sound):
                if recording.name not in loaded:
                    loaded[recording.name] = read_audio(recording.file)
            snr = float(snrs[clip % len(snrs)])
            place = number * clips + clip
            said, heard = (_crop(loaded[r.name], length, r, generator) for r in (voice, sound))
            noisy[place], clean[place] = (torch.from_numpy(samples) for samples in mix(said, heard, snr))
            for key, value in (("scene", scene), ("snr", snr), ("speech", voice.name), ("noise", sound.name)):
                metadata[key].append(value)
    return Data(noisy, clean, metadata=metadata, name=f"mixtures-{split}")


def soundfile_module() -> Any:
    """The module soundfile. Raises InputError, saying how to get it, where it is not installed."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: it does not find its library
        raise InputError(f"audio needs the package soundfile ({error}): pip install 'rtl-kernels[speech]'") from error
    return soundfile


def _crop(samples: np.ndarray, length: int, recording: Recording, generator: np.random.Generator) -> np.ndarray:
    varies = float(np.ptp(samples)) > 0  # a constant is heard by nobody, and SI-SNR takes it out: no noise is left
    if len(samples) < length:
        if recording.scene:
            samples = np.tile(samples, -(-length // len(samples)))
        else:
            samples = np.pad(samples, (0, length - len(samples)))
    whole = float(np.square(samples, dtype=np.float64).mean())
    for _ in range(50):
        start = int(generator.integers(len(samples) - length + 1))
        crop = samples[start : start + length]
        if varies and float(np.square(crop, dtype=np.float64).mean()) >= FAINT * whole:
            return crop
    raise InputError(f"file is {str(recording.file)!r}, which is silent: leave it out of the corpus")


def _in_turn(recordings: Sequence[Recording], generator: np.random.Generator) -> Iterator[Recording]:
    """All in random order, again and again."""
    while True:
        for position in generator.permutation(len(recordings)):
            yield recordings[position]


def _from_manifest(manifest: Path) -> Iterator[Recording]:
    splits: dict[str, str] = {}  # of groups and files
    for number, line in read_csv(manifest, ("file", "kind", "scene", "split")):
        here = f"{manifest}, line {number}"
        if line["kind"] not in ("speech", "noise") or line["split"] not in ("train", "test"):
            raise InputError(
                f"{here}: kind is {line['kind']!r} and split {line['split']!r}, expected speech or noise, train or test"
            )
        if (line["kind"] == "noise") != bool(line["scene"]):
            raise InputError(f"{here}: scene is {line['scene']!r} of {line['kind']}, expected one for noise alone")
        for one in (f"{line['kind']} {line.get('group') or line['file']}", os.path.normpath(line["file"])):
            if splits.setdefault(one, line["split"]) != line["split"]:
                raise InputError(f"{here}: {one!r} is in train and in test, expected in one of them")
        yield Recording(manifest.parent / line["file"], line["file"], line["scene"], line["split"])


def _from_folders(folder: Path) -> Iterator[Recording]:
    yield from _split(folder / "clean", "", folder)
    for scene in sorted(path for path in (folder / "noise").iterdir() if path.is_dir()):
        yield from _split(scene, scene.name, folder)


def _split(folder: Path, scene: str, root: Path) -> Iterator[Recording]:
    given = (folder / "train").is_dir() and (folder / "test").is_dir()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in AUDIO_ENDINGS)
    group_of = {file: file.relative_to(folder).parts[0] for file in files}
    for_test = {"test"} if given else set(sorted(set(group_of.values()))[TEST_SHARE - 1 :: TEST_SHARE])
    for file, group in group_of.items():
        if not given or group in ("train", "test"):
            split = "test" if group in for_test else "train"
            yield Recording(file, str(file.relative_to(root)), scene, split)


def _checked(recordings: list[Recording], folder: Path) -> list[Recording]:
    names = scenes(recordings)
    if not names:
        raise InputError(f"data is {str(folder)!r}, which has no noise of any scene: give some")
    for split in ("train", "test"):
        found = {r.scene for r in recordings if r.split == split}
        for scene in ("", *names):
            if scene not in found:
                what = f"noise of {scene!r}" if scene else "clean speech"
                raise InputError(
                    f"data is {str(folder)!r}, which has no {what} for {split}: give some (five speakers or "
                    "places, or folders train and test)"
                )
    return recordings
