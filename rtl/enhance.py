"""Noise taken from a recording by the ticket of its scene, in windows: memory does not grow with the recording."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rtl.data.speech import PEAK, RATE, check_samples, resample, soundfile_module
from rtl.errors import InputError
from rtl.models import SpeechUNet
from rtl.predict import open_run
from rtl.progress import Progress
from rtl.run import TEMPORARY, replacing
from rtl.tickets import TicketNetwork, position

WINDOW_SECONDS = 10.0  # what the network hears at once
OVERLAP_SECONDS = 1.0  # in which one window fades into the next


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
    soundfile = soundfile_module()
    target = Path(target)
    container = target.suffix.lstrip(".").upper()
    if container not in soundfile.available_formats():
        raise InputError(f"output is {str(target)!r}, whose ending names no audio format: take .wav or .flac")
    if not target.parent.is_dir():
        raise InputError(f"output is {str(target)!r}, but there is no folder {str(target.parent)!r}: make it first")
    try:
        opened = soundfile.SoundFile(str(source))
    except (RuntimeError, OSError) as error:
        raise InputError(f"file is {str(source)!r}, which cannot be read as audio: {error}") from error
    _sweep(target)
    with opened as audio, tempfile.TemporaryFile(dir=target.parent) as samples:
        if audio.frames == 0:
            raise InputError(f"file is {str(source)!r}, which holds no samples: there is nothing to enhance")
        peak = _stream(net, scene, audio, samples, str(source), progress or Progress(quiet=True))
        gain = 1.0 if peak <= 1 else PEAK / peak
        subtype = audio.subtype if soundfile.check_format(container, audio.subtype) else None
        with (
            replacing(target) as temporary,
            soundfile.SoundFile(
                str(temporary), "x", audio.samplerate, audio.channels, subtype, format=container
            ) as written,
        ):
            samples.seek(0)
            while data := samples.read(audio.channels * 4 * RATE):
                written.write(np.frombuffer(data, np.float32).reshape(-1, audio.channels) * np.float32(gain))
    return gain


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
    peak = 0.0
    with progress.task(Path(name).name, audio.frames) as task:
        while True:
            start = audio.tell()
            try:
                fresh = audio.read(length - len(kept), dtype="float32", always_2d=True)
            except RuntimeError as error:
                raise InputError(f"file is {name!r}, which cannot be read at sample {start}: {error}") from error
            check_samples(fresh, name, start, rate)
            last = len(fresh) < length - len(kept) or audio.tell() >= audio.frames
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
    x = torch.from_numpy(resample(window.astype(np.float64), rate, RATE).T.astype(np.float32))
    y = net(x.contiguous(), ticket=scene).numpy().T
    back: np.ndarray = resample(y.astype(np.float64), RATE, rate)[: len(window)].astype(np.float32)
    return back
