"""rtl.enhance: files of any length, rate and number of channels, through windows, whole or not at all."""

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from sounds import noise, sf, tone, write
from toys import seeded

import rtl
import rtl.enhance as enhancing
import rtl_kernels as rk
from rtl.data.speech import RATE
from rtl.errors import InputError
from rtl.fit import masked_copy
from rtl.models import speech_unet
from rtl.run import replacing
from rtl.tickets import TicketNetwork


@pytest.fixture(scope="module")
def net():
    inner = masked_copy(seeded(speech_unet), 2, "per_ticket")
    generator = torch.Generator().manual_seed(0)
    inner.banks = {
        layer: rk.MaskBank.from_dense(torch.rand(2, *bank.shape, generator=generator) < 0.7)
        for layer, bank in inner.banks.items()
    }
    inner.eval()
    return TicketNetwork(inner, ("indoor", "outdoor"), (0, 1), "enhancement", 0.3)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(enhancing, "WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(enhancing, "OVERLAP_SECONDS", 0.1)


def through(net, source, scene="outdoor", out="out.wav"):
    target = source.parent / out
    gain = enhancing.enhance(net, scene, source, target)
    return *sf.read(target, dtype="float32", always_2d=True), gain


def test_one_window_is_the_networks_output(tmp_path, net):
    x = noise(0.4)
    y, rate, gain = through(net, write(tmp_path / "a.wav", x, subtype="FLOAT"))
    assert (rate, gain) == (RATE, 1)
    with torch.no_grad():
        expected = {scene: net(torch.from_numpy(x)[None], ticket=scene)[0].numpy() for scene in net.names}
    np.testing.assert_allclose(y[:, 0], expected["outdoor"], atol=1e-6)
    assert np.abs(expected["outdoor"] - expected["indoor"]).max() > 1e-3


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("samples", [1, 100, 7_999, 8_000, 24_001])
def test_length_rate_and_channels_are_the_sources(tmp_path, net, short_windows, rate, samples):
    x = 0.1 * torch.randn(samples, 2).numpy()
    y, found, _ = through(net, write(tmp_path / "a.wav", x, rate))
    assert (y.shape, found) == (x.shape, rate)
    assert np.isfinite(y).all()


class Same(torch.nn.Module):
    """A network that gives what it is given."""

    names = ("outdoor",)

    def __init__(self):
        super().__init__()
        self.seconds = []

    def forward(self, x, ticket):
        self.seconds.append(x.shape[1] / RATE)
        return x


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_windows_fade_into_one_another_without_a_trace_and_bound_what_is_held(tmp_path, short_windows, rate):
    same = Same()
    x = np.stack([tone(3.217, rate), 0.5 * tone(3.217, rate, 300)], 1)
    y, *_ = through(same, write(tmp_path / "a.wav", x, rate, subtype="FLOAT"))
    edge = rate // 50  # where resampling has nothing before it
    assert np.abs(y - x)[edge:-edge].max() < (1e-6 if rate == RATE else 2e-3)
    assert len(same.seconds) == 8  # 0.5 s, then 0.4 s each
    assert max(same.seconds) == 0.5


def test_each_channel_is_enhanced_by_itself(tmp_path, net):
    x = np.stack([noise(0.3), tone(0.3)], 1)
    both, *_ = through(net, write(tmp_path / "both.wav", x, subtype="FLOAT"))
    for channel in (0, 1):
        alone, *_ = through(net, write(tmp_path / "one.wav", x[:, channel], subtype="FLOAT"))
        np.testing.assert_allclose(both[:, channel], alone[:, 0], atol=1e-6)


def test_silence_stays_silent_in_a_file_too(tmp_path, net):
    y, *_ = through(net, write(tmp_path / "a.wav", np.zeros(5000, np.float32)))
    assert y.shape == (5000, 1)
    assert not y.any()


def test_what_would_be_clipped_is_turned_down_as_a_whole(tmp_path):
    x = tone(0.2, level=2.5)
    y, _, gain = through(Same(), write(tmp_path / "a.wav", x, subtype="FLOAT"), out="out.flac")
    assert gain == pytest.approx(0.99 / 2.5, rel=1e-4)
    np.testing.assert_allclose(y[:, 0], gain * x, atol=1e-4)


@pytest.mark.parametrize(
    ("subtype", "out", "found"),
    [("PCM_24", "out.wav", "PCM_24"), ("PCM_16", "out.flac", "PCM_16"), ("FLOAT", "out.flac", "PCM_16")],
)
def test_depth_is_the_sources_where_the_format_has_it(tmp_path, net, subtype, out, found):
    through(net, write(tmp_path / "a.wav", noise(0.1), subtype=subtype), out=out)
    assert sf.info(tmp_path / out).subtype == found


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "IMA_ADPCM", "ULAW"])
def test_encodings_that_have_no_place_to_jump_to_are_read_to_their_end(tmp_path, short_windows, subtype):
    source = write(tmp_path / "a.wav", tone(1.3, 8000), 8000, subtype=subtype)
    (y, rate, _), (x, _) = through(Same(), source), sf.read(source)
    assert (len(y), rate) == (len(x), 8000)
    assert np.corrcoef(x, y[:, 0])[0, 1] > 0.9


def test_what_is_far_beyond_full_scale_comes_out_finite(tmp_path, net):
    x = noise(0.3, level=1e20)
    y, _, gain = through(net, write(tmp_path / "a.wav", x, subtype="FLOAT"))
    expected, *_ = through(net, write(tmp_path / "b.wav", x / np.abs(x).max(), subtype="FLOAT"))
    assert gain < 1e-19
    np.testing.assert_allclose(y * np.abs(expected).max() / 0.99, expected, atol=1e-4)


def test_a_file_may_be_replaced_by_its_enhanced_self(tmp_path, net):
    before = write(tmp_path / "a.wav", noise(0.2)).read_bytes()
    y, *_ = through(net, tmp_path / "a.wav", out="a.wav")
    assert len(y) == 3200
    assert (tmp_path / "a.wav").read_bytes() != before


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.empty(0, np.float32), "which holds no samples: there is nothing to enhance"),
        (np.concatenate([noise(1.0), np.float32([np.inf])]), r"NaN or infinity at sample 16000 \(1.000 s\)"),
    ],
)
def test_what_cannot_be_enhanced_leaves_no_file(tmp_path, net, short_windows, samples, message):
    source = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(InputError, match=message):
        through(net, source)
    assert [f.name for f in tmp_path.iterdir()] == ["a.wav"]


def test_a_full_disk_leaves_nothing_and_is_said(tmp_path, net, monkeypatch):
    def full(self, samples):
        raise sf.LibsndfileError(2)

    source = write(tmp_path / "a.wav", noise(0.4))
    monkeypatch.setattr(sf.SoundFile, "write", full)
    with pytest.raises(
        InputError, match=r"output is '.*out.wav', which cannot be written \(System error.*\): is there room"
    ):
        enhancing.enhance(net, "outdoor", source, tmp_path / "out.wav")
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize(
    ("channels", "rate", "out", "message"),
    [
        (9, RATE, "out.flac", "which cannot have 16000 samples a second and 9 channels"),
        (1, 96_000, "out.mp3", "which cannot have 96000 samples a second and 1 channels: .*MPEG"),
        (1, 96_000, "out.xi", r"whose ending names no audio format: take one of \.wav, \.flac"),  # 44,100 Hz only
        (1, RATE, "folder.wav", "which is a folder"),
        (2, RATE, "out.wav", "a format of 4 GiB at most, but this takes 32000 bytes: use FLAC"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, channels, rate, out, message):
    monkeypatch.setattr(enhancing, "LARGEST", 30_000)
    source = write(tmp_path / "a.wav", np.zeros((8000, channels), np.float32), rate)
    (tmp_path / "folder.wav").mkdir()
    same = Same()
    with pytest.raises(InputError, match=message):
        through(same, source, out=out)
    assert not same.seconds
    assert {f.name for f in tmp_path.iterdir()} == {"a.wav", "folder.wav"}


def test_what_a_killed_call_left_beside_the_target_goes_with_the_next(tmp_path, net):
    source = write(tmp_path / "a.wav", noise(0.2))
    with replacing(tmp_path / "out[1].wav") as temporary:
        temporary.write_bytes(b"half")
    temporary.write_bytes(b"half")  # as a kill leaves it
    other = tmp_path / temporary.name.replace("out[1].wav", "other.wav")
    other.write_bytes(b"of another target")
    through(net, source, out="out[1].wav")
    assert {f.name for f in tmp_path.iterdir()} == {"a.wav", "out[1].wav", other.name}


def test_a_file_that_ends_before_its_header_says_gives_what_there_is(tmp_path, net, short_windows):
    file = write(tmp_path / "a.wav", noise(1.0))
    data = file.read_bytes()
    file.write_bytes(data[: 44 + 2 * 9000])  # cut short
    y, *_ = through(net, file)
    assert len(y) == 9000
    assert struct.unpack("<I", data[40:44])[0] == 32_000


def test_tickets_of_another_recipe_are_refused(tmp_path):
    small = masked_copy(rtl.models.mlp(2, [3], 1), 1, "shared")
    TicketNetwork(small, ("a",), (0,), "regression", 0.5).save_pretrained(tmp_path / "tickets/0.5")
    with pytest.raises(InputError, match="whose tickets are not for speech"):
        enhancing.load_network(tmp_path)


LONG = """
import resource, sys
import numpy as np, soundfile as sf, torch
from rtl.enhance import enhance

class Same(torch.nn.Module):
    names = ("outdoor",)
    def forward(self, x, ticket):
        return x

def peak(seconds):
    second = (0.1 * np.random.default_rng(0).standard_normal(48_000)).astype(np.float32)
    with sf.SoundFile("a.wav", "w", 48_000, 1) as file:
        for _ in range(seconds):
            file.write(second)
    enhance(Same(), "outdoor", "a.wav", "b.wav")
    assert sf.info("b.wav").frames == seconds * 48_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux

print(peak(25), peak(600))
"""


def test_memory_does_not_grow_with_the_recording(tmp_path):
    done = subprocess.run([sys.executable, "-c", LONG], cwd=tmp_path, capture_output=True, text=True, check=True)
    short, long = map(int, done.stdout.split())
    assert long - short < 20_000  # ten minutes are 115 MB as they are read
