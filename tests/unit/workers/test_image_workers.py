"""The image workers: what of their models has factors, their batches, their training, and their errors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters.plan import make_plan
from lte_ray.cli.flags import parse
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.in_process import InProcessRun, evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import DataError, WorkerError
from tests.docs.pages import ROOT
from tests.support.image_folders import stripes, write_idx_folder
from workers.image import Image
from workers.images import FASHION_MNIST, ImageClassifier
from workers.mixer import Mixer
from workers.resnet import ResNet
from workers.vit import ViT, grid_positions

SMALL = {"image_size": 8, "classes": 4, "batch_size": 16}
KINDS: dict[str, tuple[type[ImageClassifier], dict[str, int]]] = {
    "vit": (ViT, {"patch": 4, "width": 16, "depth": 1, "attention_heads": 2}),
    "mixer": (Mixer, {"patch": 4, "width": 16, "depth": 1, "patch_hidden": 8, "channel_hidden": 32}),
    "resnet": (ResNet, {"stride": 1, "width": 8, "stages": 2, "groups": 4}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a small data set."""
    return write_idx_folder(tmp_path_factory.mktemp("stripes"), stripes(200), stripes(60, seed=1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of decoded images is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(kind: str, data: Path, **settings: object) -> ImageClassifier:
    """Returns a tiny worker."""
    worker, sizes = KINDS[kind]
    return worker(**{"data": str(data), **SMALL, **sizes, **settings})  # type: ignore[arg-type]


def settings_of(steps: int) -> Settings:
    return Settings("test", LTEConfig(num_heads=2, lora_r=8), MergeConfig(5), TrainConfig(steps, warmup=5))


def train(worker: ImageClassifier, steps: int, **options: object) -> InProcessRun:
    return run_in_process(worker, settings_of(steps), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["small", "default"])
def test_all_weights_have_factors(kind: str, size: str, data: Path) -> None:
    """--strict accepts the models: only the biases of layers with factors are replicas, and nothing is frozen."""
    worker = small(kind, data) if size == "small" else KINDS[kind][0]()
    model = worker.build_model()
    plan = make_plan(model, LTEConfig(strict=True))
    names = {name for name, _ in model.named_parameters()}
    assert {adapted.name for adapted in plan.adapted} == {name for name in names if name.endswith("weight")}
    assert {replica.name for replica in plan.replicas} == {name for name in names if name.endswith("bias")}
    assert not list(model.buffers()) or not set(model.state_dict()) - names  # no buffer is part of the weights


@pytest.mark.parametrize("kind", KINDS)
def test_two_heads_learn(kind: str, data: Path) -> None:
    """After 40 steps they tell the four kinds of stripes apart, which takes no more than a few."""
    worker = small(kind, data)
    result = train(worker, steps=40)
    initial = prepare(worker, settings_of(40))
    before, after = (evaluate_base(worker, initial, base) for base in (initial.base, result.base))
    assert after["accuracy"] > 0.9 > before["accuracy"]
    assert after["loss"] < 0.5 * before["loss"]
    first, last = ([sum(m.losses.values()) for m in merges] for merges in (result.merges[:1], result.merges[-1:]))
    assert last < first


@pytest.mark.parametrize("kind", KINDS)
def test_heads_can_be_computed_as_one_batch(kind: str, data: Path) -> None:
    """Stacked heads have the losses of heads that train in turns, up to rounding, which Adam magnifies."""
    worker = small(kind, data)
    stacked, in_turns = (train(worker, 10, heads_per_actor=2, stack_heads=mode).merges for mode in ("always", "never"))
    for one, other in zip(stacked, in_turns, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert stacked[0].losses[0] != stacked[0].losses[1]


def take(batches: object, count: int) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(batches, count))  # type: ignore[call-overload]


def equal(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def test_a_batch_depends_on_its_number_alone(data: Path) -> None:
    """With augmentation: the same whichever head trains it, and after a resume; another seed's differ."""
    worker = small("vit", data, shift=1, flip=True, min_area=0.5)
    together = take(worker.train_batches(Shard(0, 1, seed=3)), 6)
    assert equal(take(worker.train_batches(Shard(1, 2, seed=3)), 3), together[1::2])
    assert equal(take(worker.train_batches(Shard(1, 2, seed=3, cursor=2)), 1), together[5:])
    assert not equal(take(worker.train_batches(Shard(0, 1, seed=4)), 6), together)


def test_batches_are_the_images_with_their_labels(data: Path) -> None:
    """Bytes of one channel, as the files have them; all images of an epoch are distinct."""
    worker = small("vit", data)
    images, labels = (torch.cat(parts) for parts in zip(*take(worker.train_batches(Shard(0, 1, 0)), 12), strict=True))
    files = stripes(200)
    known = {image.tobytes(): label for image, label in zip(*files, strict=True)}
    assert images.dtype == torch.uint8
    assert images.shape == (192, 1, 8, 8)
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len({image.numpy().tobytes() for image in images}) == 192


class Brightness(nn.Module):
    """Logits that grow with an image's brightness, and remember how many images were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return (images.mean((1, 2, 3))[:, None] + 0.3) * self.weight


@pytest.mark.parametrize(("asked", "used"), [(7, 7), (0, 60), (1000, 60)])
def test_evaluation_averages_over_the_test_images(data: Path, asked: int, used: int) -> None:
    """Loss and accuracy equal those computed in float64 from the files; inputs are from -1 to 1."""
    model = Brightness()
    with torch.no_grad():
        values = small("vit", data, test_images=asked).evaluate(model)
    seen = torch.cat(model.seen)
    images, labels = stripes(60, seed=1)
    chosen = np.linspace(0, 59, used).astype(int)
    inputs = images[chosen].astype(np.float64) / 127.5 - 1
    assert np.abs(seen[:, 0].double().numpy() - inputs).max() < 1e-6
    logits = (inputs.mean((1, 2))[:, None] + 0.3) * np.array([0.0, 1.0, -1.0, 2.0])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(used), labels[chosen]]
    assert list(values) == ["loss", "accuracy"]  # the first is the one to minimize
    assert values["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert values["accuracy"] == (logits.argmax(1) == labels[chosen]).mean()


def test_positions_tell_all_patches_apart() -> None:
    """Also row and column: the grid's places have distinct embeddings, at equal distances from their neighbors."""
    positions = grid_positions(7, 64)
    assert positions.shape == (49, 64)
    distances = torch.cdist(positions, positions) + 99 * torch.eye(49)
    assert distances.min() > 0.5
    right, below = (positions.view(7, 7, 64).diff(dim=dim).norm(dim=-1) for dim in (1, 0))
    torch.testing.assert_close(right.flatten(), below.T.flatten()[: right.numel()])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vit", {"patch": 3}, "--worker.image-size is 8, but it must be a multiple of --worker.patch, 3"),
        ("vit", {"attention_heads": 5}, "--worker.width is 16, but it must be a multiple of --worker.attention-heads, 5"),
        ("mixer", {"patch": 0}, "--worker.image-size is 8, but it must be a multiple of --worker.patch, 0"),
        ("resnet", {"groups": 3}, "--worker.width is 8, but it must be a multiple of --worker.groups, 3"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(kind: str, settings: dict[str, int], message: str, data: Path) -> None:
    """One that names both settings, before anything starts."""
    with pytest.raises(WorkerError, match=message):
        train(small(kind, data, **settings), 1)


def test_labels_beyond_the_classes_are_an_error(data: Path) -> None:
    """It says which label there is, and what to set."""
    with pytest.raises(DataError, match=r"has the label 3, but there are 3 classes. Set --worker.classes to at least 4"):
        train(small("vit", data, classes=3), 1)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """It names the setting and the folder."""
    with pytest.raises(DataError, match=r"--worker.data: there is no folder .*nowhere. Give the folder"):
        train(small("vit", tmp_path / "nowhere"), 1)


def test_without_the_default_data_the_error_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Debian's package, or as four files from their author."""
    monkeypatch.setattr("workers.images.FASHION_MNIST", tmp_path / "fashion-mnist")
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*--worker.data FOLDER"):
        train(ViT(), 1)


CONFIGS = sorted((ROOT / "workers" / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_settings_files_fit_their_workers(path: Path) -> None:
    """Every value is accepted, and the model has the named size; `-paper` has the paper's heads, rank and interval."""
    from workers.gpt import GPT

    name, _, size = path.stem.partition("-")
    kind = {"vit": ViT, "mixer": Mixer, "resnet": ResNet, "gpt": GPT}[name]
    parsed = parse(kind, "WORKER", ["--config", str(path)])
    with torch.device("meta"):
        model = parsed.worker.build_model()
    plan = make_plan(model, parsed.lte)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert {adapted.rank for adapted in plan.adapted} >= {parsed.lte.lora_r}
    assert {"gpu": 1, "paper": 5}[size] < millions < {"gpu": 30, "paper": 130}[size]
    if size == "paper":
        assert (parsed.lte.num_heads, parsed.lte.lora_r, parsed.merge.merge_iter) == (32, 64, 10)
    elif isinstance(parsed.worker, ImageClassifier):  # it trains on the default data
        default = kind()
        for field in ("data", "image_size", "channels", "classes"):
            assert getattr(parsed.worker, field) == getattr(default, field)


def test_every_worker_has_settings_for_a_gpu_and_of_the_papers_size() -> None:
    """Under the worker's name."""
    assert {path.stem for path in CONFIGS} == {f"{n}-{size}" for n in ("gpt", *KINDS) for size in ("gpu", "paper")}


def test_all_settings_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` explains each setting of the workers, those that they share included."""
    for kind, _ in KINDS.values():
        with pytest.raises(SystemExit):
            parse(kind, "WORKER", ["--help"])
        text = capsys.readouterr().out
        assert "Folder of a data set: IDX files" in " ".join(text.split())
        for field in dataclasses.fields(kind):
            assert f"--worker.{field.name.replace('_', '-')}" in text


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.parametrize("make", [ViT, Mixer, ResNet])
def test_fashion_mnist_is_learned(make: Callable[..., ImageClassifier]) -> None:
    """100 steps of two heads reach far more than one class in ten, on the real files."""
    worker = make(test_images=1000)
    settings = Settings("test", LTEConfig(num_heads=2), MergeConfig(10), TrainConfig(100))
    data = worker.images("train")
    assert data.images.shape == (60000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [6000] * 10
    result = run_in_process(worker, settings)
    assert evaluate_base(worker, prepare(worker, settings), result.base)["accuracy"] > 0.6


@pytest.mark.parametrize("network", ["vit", "resnet", "mixer"])
def test_one_worker_for_all_networks_takes_the_classes_from_the_data(network: str, data: Path) -> None:
    """Its model is that of the network's own worker; without a patch one is chosen that divides the image."""
    worker = Image(str(data), network=network, image_size=8, channels=1, width=16, depth=1, batch_size=4)  # type: ignore[arg-type]
    images, labels = next(worker.train_batches(Shard(0, 2, seed=0)))
    model = worker.build_model()
    assert worker.logits(model, images).shape == (4, 4)
    assert worker.loss(model, (images, labels)).isfinite()


def test_the_image_worker_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Another network, no data, and a folder that isn't there."""
    with pytest.raises(WorkerError, match=r"--worker\.network is 'vgg', but it must be one of: vit, resnet, mixer"):
        Image(str(tmp_path), network="vgg")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"--worker\.data is missing"):
        Image().build_model()
    with pytest.raises(DataError, match=r"--worker\.data: there is no folder"):
        next(Image(str(tmp_path / "none")).train_batches(Shard(0, 1, seed=0)))
