"""Steps are computed in full float32, whatever the model's products are computed in."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import nn

from lte_ray.optim import LoRAMuon
from lte_ray.optim.precision import exact_products

SETTINGS = """
import torch
from lte_ray.optim.precision import exact_products
{setting}
matmul = torch.backends.cuda.matmul
read = lambda: matmul.fp32_precision if hasattr(matmul, "fp32_precision") else torch.get_float32_matmul_precision()
before = read()
with exact_products("cpu"):
    inside = read()
print(before, inside, read())
"""


@pytest.mark.parametrize(
    "setting",
    [
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_settings_of_tf32_are_off_in_a_step_and_on_after_it(setting: str) -> None:
    """However they were set. In a process of its own, since torch can't forget which way was used."""
    if "fp32_precision" in setting and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all backends")
    done = subprocess.run([sys.executable, "-c", SETTINGS.format(setting=setting)], capture_output=True, text=True, check=True)
    before, inside, after = done.stdout.split()
    assert before == after
    assert before in ("tf32", "high")
    assert inside in ("ieee", "highest")


def test_steps_in_several_threads_restore_the_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread changes them, and the last restores them."""
    written: list[tuple[str, ...]] = []
    values = [("tf32",)]
    monkeypatch.setattr("lte_ray.optim.precision._read", lambda: values[-1])
    monkeypatch.setattr("lte_ray.optim.precision._write", lambda new: (written.append(new), values.append(new)))
    barrier = Barrier(3)

    def step(_: int) -> None:
        with exact_products("cpu"):
            barrier.wait(timeout=60)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(step, range(3)))
    assert len(written) == 2
    assert written[-1] == ("tf32",)


def test_a_step_under_autocast_is_the_step_without() -> None:
    """Its products would be bfloat16 otherwise."""
    pairs = []
    for enabled in (False, True):
        generator = torch.Generator().manual_seed(0)
        a, b = (nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 9), (12, 4)))
        a.grad, b.grad = torch.randn(4, 9, generator=generator), torch.randn(12, 4, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            LoRAMuon([{"params": [a, b], "name": "lora", "scalings": [2.0]}]).step()
        pairs.append((a, b))
    assert all(torch.equal(p, q) for p, q in zip(*pairs, strict=True))
