"""rtl.data.augment: every image moved and mirrored by itself, none otherwise changed."""

import pytest
import torch

from rtl.data.augment import crop_flip
from rtl.errors import InputError


def test_each_image_is_one_of_its_shifts_mirrored_or_not():
    torch.manual_seed(0)
    images = torch.arange(1.0, 1 + 64 * 2 * 5 * 6).view(64, 2, 5, 6)
    moved = crop_flip(images, pad=1)
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    used = set()
    for image, source in zip(moved, padded, strict=True):
        matches = {
            (top, left, mirrored)
            for top in range(3)
            for left in range(3)
            for mirrored in (False, True)
            for crop in [source[:, top : top + 5, left : left + 6]]
            if torch.equal(image, crop.flip(2) if mirrored else crop)
        }
        assert len(matches) == 1
        used |= matches
    assert len(used) > 12  # of the 18 there are


def test_the_global_generator_decides():
    images = torch.rand(8, 3, 8, 8)
    torch.manual_seed(1)
    first = crop_flip(images)
    torch.manual_seed(1)
    assert torch.equal(crop_flip(images), first)
    assert not torch.equal(crop_flip(images), first)


def test_other_inputs_than_images_are_refused():
    with pytest.raises(InputError, match="which needs images"):
        crop_flip(torch.zeros(3, 4))
