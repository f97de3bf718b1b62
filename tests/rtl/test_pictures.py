"""rtl.data.pictures: pixels, and the regions that masks of every format say they are in."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rtl.data import picture, pictures, sample_pictures
from rtl.data.pictures import coordinates
from rtl.errors import InputError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
HALVES = np.repeat([[1, 1, 1, 2, 2, 2]], 4, axis=0).astype(np.uint8)  # left and right


def saved(array, file):
    Image.fromarray(array).save(file)
    return file


@pytest.fixture
def image(tmp_path):
    return saved(COLOURS, tmp_path / "photo.png")


def regions(found, height=4, width=6):
    return np.array(found.data.metadata["region"]).reshape(height, width)


# Images


def test_a_pixel_is_where_it_is_and_its_colour(image):
    found = picture(image)
    assert (found.name, found.height, found.width) == ("photo", 4, 6)
    assert torch.equal(found.data.targets, torch.from_numpy(COLOURS.reshape(-1, 3)) / 255)
    assert "region" not in found.data.metadata
    x, y = found.data.inputs.view(4, 6, 2).unbind(2)
    assert x[0].tolist() == pytest.approx([-5 / 6, -0.5, -1 / 6, 1 / 6, 0.5, 5 / 6])  # the longer side spans [-1, 1]
    assert y[:, 0].tolist() == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5])  # at the same scale
    assert torch.equal(x[0], x[3])


def test_coordinates_of_one_pixel_are_the_centre():
    assert coordinates(1, 1).tolist() == [[0, 0]]


def test_a_grey_image_is_three_equal_colours(tmp_path):
    found = picture(saved(COLOURS[:, :, 0], tmp_path / "grey.png")).data.targets
    assert torch.equal(found, torch.from_numpy(COLOURS[:, :, :1].reshape(-1, 1)).expand(-1, 3) / 255)


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.array([[0, 1, 257], [40_000, 65_534, 65_535]], dtype=np.uint16)
    found = picture(saved(values, tmp_path / "deep.png")).data.targets
    assert found[:, 0].tolist() == pytest.approx((values.flatten() / 65535).tolist(), abs=1e-7)
    assert torch.equal(found[:, 0], found[:, 2])


def test_transparency_and_palettes_do_not_matter(tmp_path, image):
    expected = picture(image).data.targets
    opaque = np.concatenate([COLOURS, RNG.integers(0, 256, (4, 6, 1), dtype=np.uint8)], 2)
    assert torch.equal(picture(saved(opaque, tmp_path / "alpha.png")).data.targets, expected)
    Image.fromarray(COLOURS).quantize(256).save(tmp_path / "palette.png")
    assert torch.equal(picture(tmp_path / "palette.png").data.targets, expected)


def test_a_photograph_lying_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    Image.fromarray(COLOURS).save(tmp_path / "turned.png", exif=exif)
    found = picture(tmp_path / "turned.png")
    assert (found.height, found.width) == (6, 4)
    assert torch.equal(found.data.targets.view(6, 4, 3)[0, -1], torch.from_numpy(COLOURS[0, 0]) / 255)


def test_a_large_image_is_averaged_and_its_mask_is_not(tmp_path):
    image = saved(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8)), tmp_path / "large.png")
    mask = saved(np.kron(HALVES, np.ones((8, 8), np.uint8)), tmp_path / "large_mask.png")
    found = picture(image, mask, longest_side=6)
    assert (found.height, found.width) == (4, 6)
    torch.testing.assert_close(found.data.targets, torch.from_numpy(COLOURS.reshape(-1, 3)) / 255)
    assert (regions(found) == np.where(HALVES == 1, "class-1", "class-2")).all()
    assert picture(image, longest_side=1000).width == 48  # never enlarged


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b"no image"), "which cannot be read as one"),
        (lambda file: None, "which cannot be read as one"),
        (lambda file: Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(file, format="tiff"), "8 or 16 bits"),
    ],
    ids=["damaged", "missing", "floating point"],
)
def test_what_is_no_image_is_refused(tmp_path, make, message):
    make(tmp_path / "image.png")
    with pytest.raises(InputError, match=message):
        picture(tmp_path / "image.png")


def test_a_size_of_less_than_two_pixels_is_refused(image):
    with pytest.raises(InputError, match="longest_side is 1, expected 2 pixels or more"):
        picture(image, longest_side=1)


# Masks


def colour_coded():
    return np.where(HALVES[:, :, None] == 1, np.uint8([200, 30, 30]), np.uint8([30, 30, 31]))


def ade20k():
    """Classes 600 and 3: R = 10·(class div 256), G = class mod 256, B the instance."""
    mask = np.zeros((4, 6, 3), np.uint8)
    mask[:, :3] = [20, 88, 1]
    mask[2:, :3, 2] = 2  # a second instance
    mask[:, 3:] = [0, 3, 1]
    return mask


def with_palette():
    mask = Image.fromarray(HALVES)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return mask


@pytest.mark.parametrize(
    ("name", "mask", "names"),
    [
        ("m.png", lambda: Image.fromarray(HALVES), ("class-1", "class-2")),
        ("m.png", lambda: Image.fromarray(HALVES.astype(np.uint16) * 1000), ("class-1000", "class-2000")),
        ("m.png", with_palette, ("class-1", "class-2")),
        ("m.png", lambda: Image.fromarray(colour_coded()), ("class-2", "class-1")),
        ("m_seg.png", lambda: Image.fromarray(ade20k()), ("class-600", "class-3")),
    ],
    ids=["grey", "16 bits", "palette", "colours", "ADE20K"],
)
def test_every_format_of_mask_gives_the_two_halves(tmp_path, image, name, mask, names):
    mask().save(tmp_path / name)
    assert (regions(picture(image, tmp_path / name)) == np.where(HALVES == 1, *names)).all()


def test_pixels_without_label_go_to_the_nearest_region(tmp_path, image):
    mask = HALVES.copy()
    mask[0, :2] = mask[3, 4:] = mask[1:3, 2] = mask[1:3, 3] = 0
    found = picture(image, saved(mask, tmp_path / "m.png"))
    assert (regions(found) == np.where(HALVES == 1, "class-1", "class-2")).all()


def test_black_has_no_label_in_a_mask_of_colours_either(tmp_path, image):
    mask = colour_coded()
    mask[:, 2:4] = 0
    found = picture(image, saved(mask, tmp_path / "m.png"))
    assert (regions(found) == np.where(HALVES == 1, "class-2", "class-1")).all()


def test_labels_of_one_name_are_one_region(tmp_path, image):
    found = picture(image, saved(HALVES, tmp_path / "m.png"), names={1: "sky", 2: "sky"})
    assert set(found.data.metadata["region"]) == {"sky"}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (HALVES[:3], r"mask '.*m.png' is 6x3 pixels, but the image 6x4: give one of its size"),
        (np.zeros_like(HALVES), "the mask of 'photo' labels no pixel"),
        (RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1), "54x36 pixels"),
    ],
    ids=["size", "empty", "large"],
)
def test_a_mask_that_cannot_be_used_is_refused(tmp_path, image, mask, message):
    with pytest.raises(InputError, match=message):
        picture(image, saved(mask, tmp_path / "m.png"))


def test_a_photograph_is_no_mask(tmp_path):
    photo = saved(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8), tmp_path / "photo.png")
    with pytest.raises(InputError, match=r"which has \d+ colours, expected one a region \(256 at most\)"):
        picture(photo, photo)


# Folders


def folder_of(tmp_path, *names):
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        array = HALVES if "mask" in name or "annotations" in name else ade20k() if "_seg" in name else COLOURS
        Image.fromarray(array).save(file)
    return tmp_path


@pytest.mark.parametrize(
    "files",
    [
        ("a.png", "a_mask.png", "b.jpg", "b_mask.png", "alone.png"),
        ("segmentation/a.png", "segmentation/a_mask.png", "segmentation/b.png", "segmentation/b_mask.png"),
        ("urban/street/a.jpg", "urban/street/a_seg.png", "nature/b.jpg", "nature/b_seg.png", "nature/b_parts_1.png"),
        (
            "images/training/a.jpg",
            "images/validation/b.jpg",
            "annotations/training/a.png",
            "annotations/validation/b.png",
        ),
    ],
    ids=["flat", "data root", "ADE20K", "ADE20K benchmark"],
)
def test_a_folder_of_images_with_masks_is_read(tmp_path, files):
    found = pictures(folder_of(tmp_path, *files))
    assert [one.name for one in found] == ["a", "b"]
    assert all(len(set(one.data.metadata["region"])) == 2 for one in found)
    assert [one.name for one in pictures(tmp_path, ["b"])] == ["b"]


@pytest.mark.parametrize(
    ("files", "one", "other"),
    [
        (("x/a.png", "x/a_mask.png", "y/a.png", "y/a_mask.png"), "x/a.png", "y/a.png"),
        (("a.png", "a.jpg", "a_mask.png"), "a.png", "a.jpg"),
        (("a.png", "a_mask.png", "a_seg.png"), "a_mask.png", "a_seg.png"),
        (
            ("images/t/a.jpg", "images/v/a.jpg", "annotations/t/a.png", "annotations/v/a.png"),
            "images/t/a.jpg",
            "images/v/a.jpg",
        ),
    ],
    ids=["subfolders", "endings", "masks", "ADE20K benchmark"],
)
def test_two_files_for_an_image_of_one_name_are_refused(tmp_path, files, one, other):
    with pytest.raises(InputError, match=f"which has '{one}' and '{other}' for the image 'a': rename or remove one"):
        pictures(folder_of(tmp_path, *files))


def test_names_with_dots_and_images_without_masks_are_as_good_as_others(tmp_path):
    found = pictures(folder_of(tmp_path, "a.b.png", "a.b_mask.png", "x/a.png", "y/a.png"))
    assert [one.name for one in found] == ["a.b"]


def test_labels_have_the_first_of_their_names(tmp_path):
    folder = folder_of(tmp_path, "a.png", "a_mask.png")
    (folder / "classes.csv").write_text('image,mask_value,name\na,1,"sky, heavens"\na,2,sea\n')
    assert set(pictures(folder)[0].data.metadata["region"]) == {"sky", "sea"}
    (folder / "classes.csv").write_text("image,name\na,sky\n")
    with pytest.raises(InputError, match="expected image, mask_value and name"):
        pictures(folder)
    (folder / "classes.csv").write_text("image,name,mask_value\na,sky\n", encoding="utf-8-sig")
    with pytest.raises(InputError, match="mask_value '', name 'sky' in line 2, expected a number and a name"):
        pictures(folder)


def test_a_folder_without_images_and_masks_is_refused(tmp_path):
    with pytest.raises(InputError, match="which has no image with a mask"):
        pictures(folder_of(tmp_path, "alone.png"))
    with pytest.raises(InputError, match="which is no folder"):
        pictures(tmp_path / "none")
    with pytest.raises(InputError, match=r"images holds 'z', but '.*' has a"):
        pictures(folder_of(tmp_path, "a.png", "a_mask.png"), ["z"])


def test_the_sample_photographs_come_with_scikit_learn():
    found = sample_pictures(32)
    assert [(one.name, one.height, one.width) for one in found] == [("china", 21, 32), ("flower", 21, 32)]
    assert 0.1 < float(found[0].data.targets.std()) < 0.4


def test_real_images_have_their_named_classes():
    root = os.environ.get("RTL_DATA")
    if not root or not (Path(root) / "segmentation").is_dir():
        pytest.skip("needs images with masks: set RTL_DATA to a data root that holds segmentation")
    (house,) = pictures(root, ["ade_val_00000001"])
    assert (house.height, house.width) == (512, 683)
    assert set(house.data.metadata["region"]) == {"building", "grass", "plant", "road", "sky", "tree", "wall"}
    mask = np.asarray(Image.open(Path(root) / "segmentation/ade_val_00000001_mask.png")).flatten()
    names = np.array(house.data.metadata["region"])
    for value in range(1, 8):
        assert len(set(names[mask == value])) == 1
    assert (mask == 0).any()
    assert len(pictures(root, longest_side=8)) == 10
