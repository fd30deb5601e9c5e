"""Augmentation: exact shifts and mirror images, crops within their bounds, and reproducible draws."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.data import augment

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(1, 256, (40, 2, 6, 9)).astype(np.uint8))


def changed(seed: int = 0, **settings: object) -> torch.Tensor:
    return augment(IMAGES, np.random.default_rng(seed), **settings)  # type: ignore[arg-type]


def test_nothing_to_do_changes_nothing() -> None:
    """The default has neither shifts nor mirror images nor crops."""
    assert torch.equal(changed(), IMAGES)


@given(st.integers(1, 4), st.booleans())
def test_shifts_and_mirror_images_are_exact(shift: int, flip: bool) -> None:
    """Every result is the image, or its mirror image, moved by whole pixels within the limit, with 0 from outside."""
    results, seen = changed(shift=shift, flip=flip), set()
    padded = torch.nn.functional.pad(IMAGES, [shift] * 4)
    for image, wide, result in zip(IMAGES, padded, results, strict=True):
        candidates = {
            (down, right, mirrored): source[:, shift - down : 6 + shift - down, shift - right : 9 + shift - right]
            for mirrored, source in ((False, wide), (True, wide.flip(-1)))
            for down in range(-shift, shift + 1)
            for right in range(-shift, shift + 1)
        }
        found = [key for key, candidate in candidates.items() if torch.equal(candidate, result)]
        assert found, image
        seen.add(found[0])
    assert len({(down, right) for down, right, _ in seen}) > 3  # they differ
    assert {mirrored for *_, mirrored in seen} == ({False, True} if flip else {False})


def test_crops_are_enlarged_parts_of_the_image() -> None:
    """Of a ramp, a crop of a quarter to the whole area is a ramp with a slope of 0.43 to 1, within the ramp's values."""
    ramp = (torch.arange(64).float() * 4).expand(200, 1, 64, 64).to(torch.uint8)
    crops = augment(ramp, np.random.default_rng(0), min_area=0.25).float()
    assert torch.equal(crops.amin(2), crops.amax(2))  # rows stay equal
    slopes = (crops[:, 0, 0, 60] - crops[:, 0, 0, 4]) / (56 * 4)
    assert 0.25**0.5 * (3 / 4) ** 0.5 - 0.01 <= slopes.min() < 0.6
    assert 0.9 < slopes.max() <= 1.01
    assert (crops[:, 0, 0].diff() >= 0).all()


def test_the_generator_decides() -> None:
    """Equal seeds give equal images, and other seeds others."""
    settings = {"shift": 2, "flip": True, "min_area": 0.5}
    assert torch.equal(changed(1, **settings), changed(1, **settings))
    assert not torch.equal(changed(1, **settings), changed(2, **settings))
    assert changed(1, **settings).dtype == torch.uint8
