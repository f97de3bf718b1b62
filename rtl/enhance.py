"""Noise taken from a recording by the ticket of its scene, in windows: memory does not grow with the recording."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rtl.data.speech import AUDIO_ENDINGS, PEAK, RATE, check_samples, open_audio, resample, soundfile_module
from rtl.errors import InputError
from rtl.models import SpeechUNet
from rtl.predict import open_run
from rtl.progress import Progress
from rtl.run import TEMPORARY, replacing
from rtl.tickets import TicketNetwork, position

WINDOW_SECONDS = 10.0  # what the network hears at once
OVERLAP_SECONDS = 1.0  # in which one window fades into the next
BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}  # a sample
LARGEST = 2**32 - 2**12  # bytes of samples in WAV and AIFF: libsndfile writes on, and the end cannot be read


def load_network(run: str | os.PathLike[str], sparsity: float | None = None) -> TicketNetwork:
    """The tickets that a run of the speech recipe left in its folder, at a sparsity (None: the lowest there is).

    Raises InputError if there are none, or not of this recipe or sparsity.
    """
    net, _ = open_run(Path(run), sparsity)
    if not isinstance(net.net.model, SpeechUNet):
        raise InputError(f"run is {str(run)!r}, whose tickets are not for speech: give a run of `rtl run speech`")
    return net


@torch.no_grad()
def enhance(
    net: TicketNetwork,
    scene: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    progress: Progress | None = None,
) -> float:
    """Write `source` without its noise to `target`: of its length, rate and channels, each channel by itself.

    Windows of ten seconds, each brought to the network's 16 kHz, fade into one another; above 8 kHz nothing is left.
    What would be clipped is turned down as a whole. The file is written whole or not at all, in the format that its
    ending names, as deep as the source where that format can be.

    Args:
        net: tickets of the speech recipe.
        scene: the ticket to use, by its name.
        source: anything soundfile reads.
        target: a file to write; may be `source`.
        progress: where progress shows; None: nowhere.

    Returns:
        The factor by which the result was turned down, 1 for not at all.

    Raises:
        InputError: an unknown scene, a file that cannot be read or written, one without samples, or with NaN.
    """
    position(net.names, scene)
    net.eval()
    target = Path(target)
    if target.suffix.lower() not in AUDIO_ENDINGS:
        endings = ", ".join(AUDIO_ENDINGS)
        raise InputError(f"output is {str(target)!r}, whose ending names no audio format: take one of {endings}")
    if not target.parent.is_dir():
        raise InputError(f"output is {str(target)!r}, but there is no folder {str(target.parent)!r}: make it first")
    if target.is_dir():
        raise InputError(f"output is {str(target)!r}, which is a folder: give a file")
    with open_audio(source) as audio:
        if audio.frames == 0:
            raise InputError(f"file is {str(source)!r}, which holds no samples: there is nothing to enhance")
        _sweep(target)
        with (
            tempfile.TemporaryFile(dir=target.parent) as samples,
            replacing(target) as temporary,
            _opened_like(audio, temporary, target) as written,  # first: what cannot be written is not worked for
        ):
            peak = _stream(net, scene, audio, samples, str(source), progress or Progress(quiet=True))
            gain = 1.0 if peak <= 1 else PEAK / peak
            samples.seek(0)
            while data := samples.read(audio.channels * 4 * RATE):
                _write(written, np.frombuffer(data, np.float32).reshape(-1, audio.channels) * np.float32(gain), target)
    return gain


def _opened_like(audio: Any, file: Path, target: Path) -> Any:
    """A new soundfile.SoundFile in the format of the target's ending, for what `audio` holds."""
    soundfile = soundfile_module()
    ending = target.suffix.lstrip(".").upper()
    container = "AIFF" if ending == "AIF" else ending
    subtype = audio.subtype if soundfile.check_format(container, audio.subtype) else None
    try:
        written = soundfile.SoundFile(str(file), "x", audio.samplerate, audio.channels, subtype, format=container)
    except (RuntimeError, ValueError) as error:
        reason = getattr(error, "error_string", error)  # without the temporary file's name
        raise InputError(
            f"output is {str(target)!r}, which cannot have {audio.samplerate} samples a second and {audio.channels} "
            f"channels: {reason}"
        ) from error
    size = audio.frames * audio.channels * BYTES.get(written.subtype, 0)
    if container in ("WAV", "AIFF") and size > LARGEST:
        written.close()
        raise InputError(f"output is {str(target)!r}, a format of 4 GiB at most, but this takes {size} bytes: use FLAC")
    return written


def _write(written: Any, samples: np.ndarray, target: Path) -> None:
    try:
        written.write(samples)
    except RuntimeError as error:
        reason = getattr(error, "error_string", error)  # libsndfile's: it does not say that a disk is full
        raise InputError(f"output is {str(target)!r}, which cannot be written ({reason}): is there room?") from error


def _sweep(target: Path) -> None:
    """Delete what killed calls left half written beside the target (`rtl.run.replacing`)."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.[0-9]*-*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def _stream(net: TicketNetwork, scene: str, audio: Any, out: IO[bytes], name: str, progress: Progress) -> float:
    """Append the enhanced recording to `out`, float32 (samples, channels); returns its peak."""
    rate, channels = audio.samplerate, audio.channels
    length, overlap = round(WINDOW_SECONDS * rate), round(OVERLAP_SECONDS * rate)
    rising = ((np.arange(overlap) + 0.5) / overlap)[:, None]
    kept = np.empty((0, channels), np.float32)  # the end of the window before, which this one begins with
    fading = np.empty((0, channels), np.float32)  # that end, enhanced
    peak, start = 0.0, 0  # counted: recordings of some encodings, such as GSM 06.10, have no position to ask for
    with progress.task(Path(name).name, audio.frames) as task:
        while True:
            try:
                fresh = audio.read(length - len(kept), dtype="float32", always_2d=True)
            except RuntimeError as error:
                raise InputError(f"file is {name!r}, which cannot be read at sample {start}: {error}") from error
            check_samples(fresh, name, start, rate)
            start += len(fresh)
            last = len(fresh) < length - len(kept) or start >= audio.frames
            window = np.concatenate([kept, fresh])
            found = _enhanced(net, scene, window, rate)
            both = len(fading)
            found[:both] = rising[:both] * found[:both] + (1 - rising[:both]) * fading
            done = found if last else found[: len(found) - overlap]
            peak = max(peak, float(np.abs(done).max(initial=0)))
            out.write(np.ascontiguousarray(done, np.float32).tobytes())
            task.advance(len(fresh))
            if last:
                return peak
            kept, fading = window[len(window) - overlap :], found[len(found) - overlap :]


def _enhanced(net: TicketNetwork, scene: str, window: np.ndarray, rate: int) -> np.ndarray:
    """(samples, channels) float32 at `rate`, and so returned."""
    scale = max(1.0, float(np.abs(window).max(initial=0)))  # squares of what is far beyond full scale are infinite
    x = torch.from_numpy(resample(window.astype(np.float64) / scale, rate, RATE).T.astype(np.float32))
    y = net(x.contiguous(), ticket=scene).numpy().T
    back: np.ndarray = (scale * resample(y.astype(np.float64), RATE, rate)[: len(window)]).astype(np.float32)
    return back
