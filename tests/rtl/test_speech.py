"""The speech experiment: mixtures at the ratios asked for, the network, its loss and its figure, the recipe."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sounds import noise, sf, tone, write
from test_models import prunable_weights
from toys import quiet, seeded, tree

import rtl
import rtl.cli
import rtl_kernels as rk
from rtl.data.speech import RATE, corpus, mix, mixtures, read_audio, resample, scenes
from rtl.errors import InputError
from rtl.evaluate import evaluate
from rtl.fit import masked_copy
from rtl.models import speech_unet
from rtl.partition import by_metadata
from rtl.recipes import load_data, recipe, run_recipe
from rtl.recipes.experiment import METHODS
from rtl.tasks import Enhancement, weighted_sdr_losses
from rtl.tickets import TicketNetwork

REAL = Path(os.environ.get("RTL_DATA") or "nowhere")
HAS_REAL = (REAL / "speech" / "manifest.csv").is_file()
needs_data = pytest.mark.skipif(not HAS_REAL, reason="RTL_DATA names no folder with the real speech")


def folder(tmp_path, speakers=5, places=5):
    """clean/ and noise/SCENE/ of two scenes, one file a speaker and a place."""
    for s in range(speakers):
        write(tmp_path / f"clean/s{s}.wav", tone(0.8, hertz=200 + 50 * s))
    for scene in ("outdoor", "indoor"):
        for p in range(places):
            write(tmp_path / f"noise/{scene}/p{p}.wav", noise(0.3))
    return tmp_path


# Recordings


@needs_data
def test_the_real_corpus_has_three_scenes_and_nobody_in_both_splits():
    found = corpus(REAL)
    assert len(found) == 234
    assert scenes(found) == ("indoor", "outdoor", "transportation")
    assert sum(r.split == "test" and not r.scene for r in found) == 20
    assert corpus(REAL / "speech") == found


def test_folders_are_split_by_speaker_and_place(tmp_path):
    found = corpus(folder(tmp_path))
    assert len(found) == 15
    assert [r.name for r in found if r.split == "test"] == [
        "clean/s4.wav",
        "noise/indoor/p4.wav",
        "noise/outdoor/p4.wav",
    ]
    for speaker in range(5):  # a folder each: one speaker's files stay together
        for n in range(2):
            write(tmp_path / f"grouped/clean/s{speaker}/{n}.wav", tone(0.1))
            write(tmp_path / f"grouped/noise/street/p{speaker}/{n}.wav", noise(0.1))
    grouped = [r.name for r in corpus(tmp_path / "grouped") if r.split == "test"]
    assert grouped == ["clean/s4/0.wav", "clean/s4/1.wav", "noise/street/p4/0.wav", "noise/street/p4/1.wav"]


def test_folders_that_say_what_is_for_testing_are_heeded(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"clean/{split}/a.wav", tone(0.1))
        write(tmp_path / f"noise/street/{split}/b.flac", noise(0.1))
    assert {(r.name, r.split) for r in corpus(tmp_path)} == {
        (f"{place}/{split}/{file}", split)
        for place, file in (("clean", "a.wav"), ("noise/street", "b.flac"))
        for split in ("train", "test")
    }


HEADER = "file,kind,scene,split,group\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,kind,scene\n", "lacks the column split"),
        (HEADER + "a.wav,music,,train,\n", "line 2: kind is 'music' and split 'train'"),
        (HEADER + "a.wav,noise,,train,\n", "scene is '' of noise, expected one for noise alone"),
        (HEADER + "a.wav,speech,,train,x\nb.wav,speech,,test,x\n", "'speech x' is in train and in test"),
        (HEADER + "a.wav,speech,,train,x\n./a.wav,speech,,test,y\n", "'a.wav' is in train and in test"),
        (HEADER + "a.wav,speech,,train,x\na.wav,noise,s,test,y\n", "'a.wav' is in train and in test"),
        (HEADER + "a.wav,speech\n", "line 2: kind is 'speech' and split ''"),
        (HEADER + "a.wav,speech,,train,x\nb.wav,speech,,test,\n", "which has no noise of any scene"),
        (HEADER + "a.wav,speech,,train,\nb.wav,noise,s,train,\nc.wav,noise,s,test,\n", "no clean speech for test"),
        (HEADER + "a.wav,speech,,train,\nb.wav,speech,,test,\nc.wav,noise,s,train,\n", "no noise of 's' for test"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        corpus(tmp_path)


def test_a_manifest_may_come_from_excel_and_has_to_be_utf_8(tmp_path):
    text = HEADER + "ä.wav,speech,,train,\nb.wav,speech,,test,\nc.wav,noise,s,train,\nd.wav,noise,s,test,\n"
    (tmp_path / "manifest.csv").write_text(text, encoding="utf-8-sig")
    assert [r.name for r in corpus(tmp_path)] == ["b.wav", "c.wav", "d.wav", "ä.wav"]
    (tmp_path / "manifest.csv").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"manifest\.csv cannot be read as CSV in UTF-8"):
        corpus(tmp_path)


def test_a_folder_without_recordings_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"which has no manifest\.csv, nor clean/"):
        corpus(tmp_path)
    with pytest.raises(InputError, match="which is no folder"):
        corpus(tmp_path / "none")
    with pytest.raises(InputError, match="no clean speech for test"):
        corpus(folder(tmp_path, speakers=4))


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_brought_to_16_khz(tmp_path, rate):
    found = read_audio(write(tmp_path / "a.wav", tone(0.5, rate), rate, subtype="FLOAT"))
    assert (len(found), found.dtype) == (RATE // 2, np.float32)
    middle = slice(1000, -1000)
    assert np.abs(found - tone(0.5))[middle].max() < 0.005


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone(0.1), -0.5 * tone(0.1)], 1)
    np.testing.assert_allclose(
        read_audio(write(tmp_path / "a.wav", stereo, subtype="FLOAT")), 0.25 * tone(0.1), atol=1e-7
    )


def test_recordings_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.wav', which cannot be read as audio"):
        read_audio(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(InputError, match="which cannot be read as audio"):
        read_audio(tmp_path / "text.wav")
    with pytest.raises(InputError, match="which holds no samples"):
        read_audio(write(tmp_path / "empty.wav", np.empty(0, np.float32)))
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"a\.raw', which cannot be read as audio: samplerate"):
        read_audio(tmp_path / "a.raw")
    piped = bytearray(write(tmp_path / "a.flac", tone(0.1)).read_bytes())
    piped[21] &= 0xF0  # 36 bits: the number of samples
    piped[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(piped)
    with pytest.raises(InputError, match=r"a\.flac', which does not say how long it is"):
        read_audio(tmp_path / "a.flac")
    bad = tone(0.5)
    bad[1600] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity at sample 1600 \(0.100 s\)"):
        read_audio(write(tmp_path / "nan.wav", bad, subtype="FLOAT"))


def test_resampling_keeps_the_rate_it_has():
    x = noise(0.1)
    assert resample(x, RATE, RATE) is x
    assert len(resample(x, RATE, 48_000)) == 3 * len(x)


# Mixtures


@pytest.mark.parametrize("snr", [-10.0, 0.0, 7.5])
@pytest.mark.parametrize("level", [0.001, 0.9])
def test_the_ratio_of_powers_is_the_one_asked_for_and_nothing_is_clipped(snr, level):
    noisy, clean = mix(tone(level=level), noise(), snr)
    rest = noisy.astype(np.float64) - clean
    assert 10 * math.log10(np.square(clean, dtype=np.float64).mean() / np.square(rest).mean()) == pytest.approx(
        snr, abs=1e-3
    )
    assert np.abs(noisy).max() <= 0.9901
    if level == 0.001:
        assert np.array_equal(clean, tone(level=level))  # quiet speech keeps its level


@pytest.mark.parametrize(("clean", "sound"), [(tone(0.1), np.zeros(1600, np.float32)), (np.zeros(0), np.zeros(0))])
def test_silence_has_no_ratio(clean, sound):
    with pytest.raises(InputError, match="is silent"):
        mix(clean, sound, 0)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    return corpus(folder(tmp_path_factory.mktemp("corpus"), speakers=10, places=10))


def test_mixtures_take_every_recording_of_their_split_in_turn_and_follow_from_the_seed(recordings):
    data = mixtures(recordings, "train", 16, 0.5, (-5, 0, 5))
    assert data.inputs.shape == data.targets.shape == (32, RATE // 2)
    assert data.metadata["scene"] == ["indoor"] * 16 + ["outdoor"] * 16
    assert data.metadata["snr"][:4] == [-5, 0, 5, -5]
    for first in (0, 16):
        for key, count in (("speech", 8), ("noise", 8)):
            names = data.metadata[key][first : first + 16]
            assert len(set(names[:count])) == len(set(names[count:])) == count
    test = mixtures(recordings, "test", 4, 0.5, (0,))
    for key in ("speech", "noise"):
        assert set(test.metadata[key]).isdisjoint(data.metadata[key])
    again = mixtures(list(recordings), "train", 16, 0.5, (-5, 0, 5))
    assert torch.equal(again.inputs, data.inputs)
    assert again.metadata == data.metadata
    assert not torch.equal(mixtures(recordings, "train", 16, 0.5, (-5, 0, 5), seed=1).inputs, data.inputs)


def test_short_noise_is_repeated_and_short_speech_followed_by_silence(recordings):
    data = mixtures(recordings, "train", 1, 1.0, (0,))
    assert not data.targets[0, round(0.8 * RATE) :].any()
    rest = (data.inputs - data.targets)[0]
    period = round(0.3 * RATE)
    torch.testing.assert_close(rest[:period], rest[period : 2 * period], atol=1e-6, rtol=0)


def test_mixtures_of_nothing_are_refused(recordings, tmp_path):
    wrong = ((0, 1.0, (0,)), (1, 0.0, (0,)), (1, math.nan, (0,)), (1, 1.0, ()), (1, 1.0, (math.nan,)))
    for arguments in wrong:
        with pytest.raises(InputError, match="clips is"):
            mixtures(recordings, "train", *arguments)
    with pytest.raises(InputError, match="seed is -1, expected 0 or more"):
        mixtures(recordings, "train", 1, 1.0, (0,), -1)
    for samples in (np.zeros(RATE), np.full(RATE, 0.1), np.full(1, 0.1)):
        silent = write(tmp_path / "silent.wav", samples)
        broken = [dataclasses.replace(r, file=silent) if r.scene else r for r in recordings]
        with pytest.raises(InputError, match=r"silent\.wav', which is silent: leave it out"):
            mixtures(broken, "train", 1, 0.5, (0,))


# The network


def test_the_u_net_has_the_papers_37_368_prunable_weights():
    counts = list(prunable_weights(speech_unet()).values())
    encoder = [2 * 12 * 15, 12 * 12 * 9, 12 * 12 * 9, 12 * 24 * 9, 24 * 48 * 9]
    assert counts == [*encoder, 48 * 24 * 9, 48 * 12 * 9, 24 * 12 * 9, 24 * 12 * 9, 24 * 2 * 15]
    assert sum(counts) == 37_368


def test_only_time_is_halved_and_the_mask_has_the_spectrograms_size():
    model, planes = speech_unet().eval(), []
    for conv in (*model.down, *model.up):
        conv.register_forward_hook(lambda _, __, y: planes.append(tuple(y.shape[1:])))
    clip = torch.randn(1, 2, 513, 626)  # ten seconds
    with torch.no_grad():
        assert model.mask(clip).shape == clip.shape
    times = [313, 157, 79, 40, 20]
    assert planes[:5] == [(c, 513, t) for c, t in zip((12, 12, 12, 24, 48), times, strict=True)]
    assert planes[5:] == [(c, 513, t) for c, t in zip((24, 12, 12, 12, 2), (40, 79, 157, 313, 626), strict=True)]


@pytest.mark.parametrize("length", [1, 2, 511, 1023, 1024, 1025, 4000])
def test_any_length_comes_out_as_it_went_in_and_finite(length):
    y = seeded(speech_unet).eval()(torch.randn(2, length))
    assert y.shape == (2, length)
    assert y.isfinite().all()


def test_the_mask_is_bounded_and_loudness_changes_nothing_but_the_volume():
    model, x = seeded(speech_unet).eval(), torch.from_numpy(noise(0.5))[None]
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(model(100 * x), 100 * y, rtol=1e-3, atol=1e-4)
        assert y.square().sum() < x.square().sum()
        model.mask = lambda planes: torch.stack([torch.full_like(planes[:, 0], 1e4), torch.zeros_like(planes[:, 1])], 1)
        torch.testing.assert_close(model(x), x, atol=1e-5, rtol=0)  # the largest mask lets all through


def test_silence_stays_silent():
    model = seeded(speech_unet).eval()
    x = torch.zeros(2, 3000)
    x[1] = torch.from_numpy(noise(3000 / RATE))
    y = model(x)
    assert not y[0].any()
    assert y[1].any()


def test_clips_of_all_scenes_in_one_batch_are_as_each_alone():
    net = masked_copy(seeded(speech_unet), 2, "per_ticket")
    net.banks = {layer: rk.MaskBank.from_dense(torch.rand(2, *bank.shape) < 0.6) for layer, bank in net.banks.items()}
    net.eval()
    x = torch.randn(3, 3000)
    with torch.no_grad():
        y = net(x, [1, 0, 1])
        for k, rows in ((0, [1]), (1, [0, 2])):
            torch.testing.assert_close(rk.nn.extract(net, k)(x[rows]), y[rows], rtol=1e-4, atol=1e-5)


def test_a_batch_that_holds_no_clip_is_refused():
    with pytest.raises(InputError, match=r"x has shape \(2, 0\), expected \(B, L\)"):
        speech_unet()(torch.zeros(2, 0))


# Loss and figure


def test_the_loss_weighs_the_cosines_of_speech_and_noise_by_their_energies():
    clean, rest = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    output = torch.tensor([[1.0, 1.0, 0.0]])
    estimate = clean + rest - output  # of the noise: (2, 0, 0)
    expected = -0.9 * (3 / (3 * math.sqrt(2))) - 0.1 * 0
    assert float(weighted_sdr_losses(output, clean, clean + rest)) == pytest.approx(expected)
    assert estimate.tolist() == [[2, 0, 0]]
    assert float(weighted_sdr_losses(clean, clean, clean + rest)) == pytest.approx(-1)
    assert float(weighted_sdr_losses(-clean, clean, clean)) == pytest.approx(1)


def test_the_loss_of_silence_is_finite():
    zeros = torch.zeros(1, 5, requires_grad=True)
    loss = weighted_sdr_losses(zeros, torch.zeros(1, 5), torch.zeros(1, 5))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert zeros.grad.isfinite().all()


def si_snr(estimate, clean):
    """J. Le Roux et al., arXiv 1811.02508, with means removed."""
    estimate, clean = estimate - estimate.mean(), clean - clean.mean()
    target = (estimate @ clean) / (clean @ clean) * clean
    return 10 * math.log10(float(target.square().sum() / (estimate - target).square().sum()))


def test_the_figure_is_how_far_si_snr_rises_above_the_mixtures():
    data = torch.from_numpy(np.stack([tone(0.2), noise(0.2), noise(0.2)])).double()
    clean, mixture, output = data[0], data[0] + data[1], data[0] * 0.5 + 0.1 * data[2]
    found = Enhancement().measure(output[None].float(), torch.stack([clean, mixture])[None].float())
    assert float(found) == pytest.approx(si_snr(output, clean) - si_snr(mixture, clean), abs=1e-3)
    assert float(Enhancement().measure(mixture[None], torch.stack([clean, mixture])[None])) == pytest.approx(0)


# The recipe


def test_the_papers_protocol_is_the_papers():
    config = recipe("speech", "paper")
    assert (config.clip_seconds, config.lr, config.remove, config.round_epochs, config.retrain_epochs) == (
        10,
        1e-4,
        4096,
        10,
        10,
    )
    assert {28_026, 18_684, 9_342} <= set(config.plan.rounds(37_368))
    epochs = {config.fit(m, 10).epochs for m in ("rtl", "imp_single", "imp_multiple", "dense")}
    assert epochs == {10}  # no negatives, so no doubling


@pytest.mark.parametrize("protocol", ["reduced", "paper"])
def test_a_protocol_as_it_is_has_only_its_own_name(protocol):
    config = recipe("speech", protocol)
    assert {config.variant(method) for method in METHODS} == {""}
    assert config.milestones == config.sparsities


@pytest.mark.parametrize(
    ("changed", "method", "variant"),
    [
        ({"round_epochs": 1, "lr": 0.01, "train_clips": 10}, "rtl", "train_clips=10,round_epochs=1,lr=0.01"),
        ({"round_epochs": 1, "lr": 0.01, "train_clips": 10}, "dense", "train_clips=10,lr=0.01"),
        ({"snrs": (-2.5, 5.0), "mix_seed": 1}, "imp_single", "snrs=-2.5/5,mix_seed=1"),
        ({"schedule": "mixed", "batch_norm": "shared"}, "rtl", "schedule=mixed,batch_norm=shared"),
        ({"schedule": "mixed", "batch_norm": "shared"}, "imp_multiple", "batch_norm=shared"),
        ({"schedule": "mixed", "batch_norm": "shared"}, "imp_single", ""),
        ({"sparsities": (0.5,), "seeds": (7,), "methods": ("rtl",)}, "rtl", ""),  # they choose rows
        ({"sparsities": (0.5, 0.6)}, "rtl", "sparsities=0.6"),
        ({"sparsities": (0.6,)}, "dense", ""),
    ],
)
def test_whatever_differs_from_the_protocol_is_named_for_the_methods_it_matters_to(changed, method, variant):
    assert dataclasses.replace(recipe("speech", "paper"), **changed).variant(method) == variant


def test_every_method_is_trained_by_the_schedule_of_rates_that_is_asked_for():
    config = dataclasses.replace(recipe("speech", "paper"), lr_schedule="cosine")
    for method in config.methods:
        assert config.fit(method, 2).rate(0.5) == pytest.approx(config.lr / 2)
        assert config.variant(method) == "lr_schedule=cosine"


def test_masks_do_not_depend_on_which_sparsities_are_asked_for():
    config = recipe("speech", "paper")
    some = dataclasses.replace(config, sparsities=(0.75,)).plan.rounds(37_368)
    assert some == config.plan.rounds(37_368)
    assert 18_684 in some


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_clips": 0}, "train_clips is 0, expected 1 or more"),
        ({"test_clips": -1}, "test_clips is -1, expected 1 or more"),
        ({"clip_seconds": math.nan}, "clip_seconds is nan, expected a finite number"),
        ({"test_seconds": 1e-5}, r"test_seconds is 1e-05, expected a finite number, a sample \(1/16000 s\) or more"),
        ({"test_seconds": math.inf}, "test_seconds is inf"),
        ({"snrs": ()}, r"snrs is \(\), expected one finite number or more"),
        ({"snrs": (0.0, math.nan)}, r"snrs is \(0.0, nan\)"),
        ({"mix_seed": -1}, "mix_seed is -1, expected 0 or more"),
        ({"seeds": (1, 1)}, "seeds is"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"batch_norm": "none"}, "batch_norm is 'none'"),
        ({"init": "zero"}, "init is 'zero', expected 'kaiming' or 'torch'"),
    ],
)
def test_a_bad_setting_is_refused_when_the_configuration_is_made(changed, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(recipe("speech"), **changed)


MICRO = dataclasses.replace(
    recipe("speech"),
    clip_seconds=0.3,
    train_clips=4,
    test_seconds=0.4,
    test_clips=2,
    seeds=(0,),
    sparsities=(0.5,),
    remove=0.5,
    round_epochs=1,
    retrain_epochs=1,
    batch_size=4,
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """All methods, on the real corpus where it is: folder, (train, test), rows, details."""
    data = load_data(MICRO, REAL if HAS_REAL else folder(tmp_path_factory.mktemp("corpus")))
    run = quiet(tmp_path_factory.mktemp("speech"))
    return run, data, *run_recipe(MICRO, run, data)


def test_theta0_is_drawn_as_asked(experiment, tmp_path):
    """A learning rate too small to move the weights leaves them where they start: at the scale that is asked for."""
    still = dataclasses.replace(MICRO, methods=("dense",), lr=1e-9)
    scales = {}
    for init in ("kaiming", "torch"):
        run = quiet(tmp_path / init)
        run_recipe(dataclasses.replace(still, init=init), run, experiment[1])
        (weights,) = run.path.glob("seed-0/dense/**/network.safetensors")
        scales[init] = float(load_file(weights)["down.4.weight"].std())
    assert scales["kaiming"] == pytest.approx(math.sqrt(2 / 216), rel=0.05)
    assert scales["torch"] == pytest.approx(math.sqrt(1 / 3 / 216), rel=0.05)


def test_a_row_has_every_scene_and_their_mean(experiment):
    _, (_, test), rows, details = experiment
    names = sorted(set(test.metadata["scene"]))
    assert [r["method"] for r in rows] == ["rtl", "imp_single", "imp_multiple", "dense"]
    for r, per in zip(rows, details["per_class"], strict=True):
        scenes = [r["metrics"][f"si_snri.{name}"] for name in names]
        assert r["metrics"]["si_snri"] == pytest.approx(np.mean(scenes))  # as many clips of each
        assert per["si_snri"] == dict(zip(names, scenes, strict=True))
        assert r["variant"] == MICRO.variant(r["method"])
        assert all(per[key] == r[key] for key in ("method", "protocol", "variant", "sparsity", "seed"))
        assert len(set(scenes)) == len(names)


def test_the_figure_is_that_of_the_saved_tickets(experiment):
    run, (train, test), rows, _ = experiment
    net = TicketNetwork.from_pretrained(run.path / "tickets/0.5")
    parts = by_metadata(train, "scene").apply(test)
    clips = [
        net(test.inputs[i : i + 1], ticket=test.metadata["scene"][i])[0].detach().double() for i in range(len(test))
    ]
    improved = [
        si_snr(clip, clean.double()) - si_snr(noisy.double(), clean.double())
        for clip, clean, noisy in zip(clips, test.targets, test.inputs, strict=True)
    ]
    assert rows[0]["metrics"]["si_snri"] == pytest.approx(np.mean(improved), abs=0.01)
    assert evaluate(net, parts, batch_size=4).metrics["si_snri"] == pytest.approx(np.mean(improved), abs=0.01)


def test_every_ticket_is_heard_on_every_scene(experiment):
    run, (train, test), rows, details = experiment
    net = TicketNetwork.from_pretrained(run.path / "tickets/0.5")
    names = details["class_names"]
    (found,) = details["crossed"].values()
    for k, name in enumerate(names):
        assert found[k][k] == pytest.approx(rows[0]["metrics"][f"si_snri.{name}"], abs=1e-6)
    parts = by_metadata(train, "scene").apply(test)
    other = test.inputs[parts[names[1]]]
    with torch.no_grad():
        clips = net(other, ticket=[names[0]] * len(other)).double()
    clean = test.targets[parts[names[1]]].double()
    improved = [
        si_snr(*pair) - si_snr(*given)
        for *pair, given in zip(clips, clean, zip(other.double(), clean, strict=True), strict=True)
    ]
    assert found[0][1] == pytest.approx(np.mean(improved), abs=1e-4)
    assert found[0][1] != found[1][1]


def test_params_and_samples_are_those_of_equal_terms(experiment):
    _, (train, test), rows, _ = experiment
    of = {r["method"]: r for r in rows}
    scenes = len(set(test.metadata["scene"]))
    assert 18_684 <= of["rtl"]["params"] < scenes * 18_684
    assert [of[m]["params"] for m in ("imp_single", "imp_multiple", "dense")] == [18_684, scenes * 18_684, 37_368]
    assert of["rtl"]["samples"] == of["imp_single"]["samples"] == of["imp_multiple"]["samples"] == 3 * len(train)


def test_examples_are_sound_files_of_the_clips_length(experiment):
    run, (_, test), *_ = experiment
    scene = test.metadata["scene"][0]
    files = sorted(f.name for f in (run.path / "media" / scene).iterdir())
    assert files == ["clean.wav", "imp_single-0.5.wav", "noisy.wav", "rtl-0.5.wav"]
    for name in files:
        samples, rate = sf.read(run.path / "media" / scene / name)
        assert (len(samples), rate) == (test.inputs.shape[1], RATE)
        assert 0 < np.abs(samples).max() < 1
    noisy, _ = sf.read(run.path / "media" / scene / "noisy.wav")
    gain = noisy @ test.inputs[0].numpy() / (test.inputs[0].numpy() @ test.inputs[0].numpy())
    assert np.abs(noisy - gain * test.inputs[0].numpy()).max() < 2e-4


def test_run_again_it_gives_the_same_from_what_is_kept(experiment):
    run, data, rows, details = experiment
    before = tree(run.path)
    assert run_recipe(MICRO, run, data) == (rows, details)
    assert tree(run.path) == before
    with pytest.raises(InputError, match="batch_size was 4, now 5"):
        run_recipe(dataclasses.replace(MICRO, batch_size=5), run, data)


def test_every_way_of_joint_retraining_is_rows_of_its_own_on_the_same_masks(experiment, tmp_path):
    _, data, (own, *_), _ = experiment
    for schedule, batch_norm, epochs in (("mixed", "shared", 3), ("pooled", "recalibrated", 4)):
        config = dataclasses.replace(MICRO, methods=("rtl",), schedule=schedule, batch_norm=batch_norm)
        (row,), _ = run_recipe(config, quiet(tmp_path / schedule), data)
        assert row["variant"].endswith(f"schedule={schedule},batch_norm={batch_norm}")
        assert row["metrics"]["similarity"] == own["metrics"]["similarity"]
        assert row["metrics"]["si_snri"] != own["metrics"]["si_snri"]
        assert row["samples"] == epochs * len(data[0])  # to recalibrate takes one more epoch


def test_a_mixed_batch_too_small_for_the_scenes_is_refused_before_any_work(tmp_path):
    config = dataclasses.replace(MICRO, batch_size=1, schedule="mixed")
    with pytest.raises(InputError, match="batch_size is 1, expected 2 or more"):
        load_data(config, folder(tmp_path))


def test_missing_packages_are_named_before_any_work(monkeypatch, tmp_path):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchmetrics" else real(name, *a)
    )
    with pytest.raises(InputError, match=r"pip install 'rtl-kernels\[speech\]'"):
        load_data(MICRO, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(InputError, match=r"audio needs the package soundfile .*rtl-kernels\[speech\]"):
        load_data(MICRO, tmp_path)


def test_the_command_runs_reports_and_enhances(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder(tmp_path))
    settings = (
        "--clip-seconds 0.2 --train-clips 2 --test-seconds 0.3 --test-clips 1 --seeds 0 --methods rtl imp_single "
        "--sparsities 0.5 --remove 0.5 --round-epochs 1 --retrain-epochs 1 --batch-size 2"
    )
    assert rtl.cli.main(f"run speech --data . {settings} --workers 1 --out run".split()) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("SI-SNRi", "indoor", "outdoor", "IMP single"))
    table = json.loads((tmp_path / "run/table.json").read_text())
    assert table["command"] == f"rtl run speech --data DIR {settings}"
    assert (tmp_path / "run/figures/example-indoor.png").stat().st_size > 10_000
    write(tmp_path / "in.wav", np.stack([noise(0.5, 8000), tone(0.5, 8000)], 1), 8000)
    assert rtl.cli.main(["enhance", "run", "in.wav", "--scene", "outdoor", "-o", "out.flac"]) == 0
    samples, rate = sf.read(tmp_path / "out.flac")
    assert (samples.shape, rate) == ((4000, 2), 8000)
    capsys.readouterr()
    for command, message in (
        ("enhance run in.wav --scene moon -o o.wav", "ticket is 'moon', expected one of indoor, outdoor"),
        ("enhance run in.wav --scene outdoor -o o.wav --sparsity 0.9", "sparsity is 0.9, but"),
        ("enhance run none.wav --scene outdoor -o o.wav", "which cannot be read as audio"),
        ("enhance clean in.wav --scene outdoor -o o.wav", "which holds no tickets: finish its `rtl run`"),
        ("enhance run in.wav --scene outdoor -o o.xyz", "whose ending names no audio format"),
        ("enhance run in.wav --scene outdoor -o no/o.wav", "there is no folder 'no'"),
        ("enhance run in.wav -o o.wav", "required: --scene"),
    ):
        assert rtl.cli.main(command.split()) == 2
        assert message in capsys.readouterr().err
