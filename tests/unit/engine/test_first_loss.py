"""The driver computes the first loss, so that a mistake in it costs no cluster time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine import first_loss
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from tests.support.tiny_worker import Tiny


def try_loss(loss: Any, **worker: Any) -> None:
    """Prepares a run of a worker with this loss."""
    kind = type("Own", (Tiny,), {"loss": loss, **worker})
    prepare(kind(), Settings("run", LTEConfig(), MergeConfig(), TrainConfig(steps=1)))


def fail(text: str, kind: type[Exception] = RuntimeError) -> Any:
    def loss(self: Any, model: nn.Module, batch: Any) -> Tensor:
        raise kind(text)

    return loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda self, model, batch: model(batch[0]), r"loss\(\) must return a scalar tensor.*it returned shape"),
        (lambda self, model, batch: {"loss": 1}, r"loss\(\) must return a scalar tensor.*it returned dict"),
        (lambda self, model, batch: model(batch[0]).mean().detach(), r"returned one without a gradient"),
        (lambda self, model, batch: (model(batch[0]).mean(), 3), r"what comes after the loss must be a dict"),
        (lambda self, model, batch: model(batch[0]) @ torch.ones(3, 1), r"RuntimeError"),
        (lambda self, model, batch: model.no_such_layer(batch), r"AttributeError.*no_such_layer"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(loss: Any, message: str) -> None:
    """With the traceback of the user's code."""
    with pytest.raises(WorkerError, match=rf"(?s)Own\.loss\(\) can't be used, as its first batch shows:.*{message}"):
        try_loss(loss)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Torch not compiled with CUDA enabled", AssertionError),
        ("\"addmm\" not implemented for 'Half'", RuntimeError),
        ("FlashAttention only supports Ampere", RuntimeError),
    ],
)
def test_what_only_another_device_can_compute_is_left_to_the_heads(text: str, kind: type[Exception]) -> None:
    """This machine may have no GPU where the heads have one."""
    try_loss(fail(text, kind))


def test_the_check_changes_nothing_that_the_run_uses() -> None:
    """Neither the worker, its batch, the model, nor the random numbers."""

    class Changing(Tiny):
        calls = 0

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            self.calls += 1
            loss = super().loss(model, batch)
            batch[0].fill_(0)
            with torch.no_grad():
                next(model.parameters()).fill_(0)
            torch.rand(3)
            return loss

    worker, settings = Changing(), Settings("run", LTEConfig(), MergeConfig(), TrainConfig(steps=1))
    torch.manual_seed(4)
    model = prepare(worker, settings).model
    after = torch.rand(1)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(1))
    assert worker.calls == 0
    assert all(bool(p.any()) for p in list(model.parameters())[:1])


def test_hooks_and_side_data_of_the_worker_are_those_of_the_batch() -> None:
    """A hook may be a method of the worker; the loss may use what the worker has kept of the batch that it gave last."""

    class Keeping(Tiny):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.register_forward_hook(self.keep)
            return model

        def keep(self, module: nn.Module, given: Any, output: Tensor) -> None:
            self.output = output

        def train_batches(self, shard: Any) -> Any:
            for number, batch in enumerate(super().train_batches(shard)):
                self.batch, self.head = batch, shard.head
                yield batch[: len(batch)] if number else batch

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            assert torch.equal(self.batch[0], batch[0])
            loss = super().loss(model, batch)
            return loss + 0 * self.output.sum()

    prepare(Keeping(), Settings("run", LTEConfig(num_heads=3), MergeConfig(), TrainConfig(steps=1)))


def test_a_first_loss_that_is_not_finite_is_described() -> None:
    """The run may start: heads refuse what they can't merge."""

    def infinite(self: Any, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum() / 0

    settings = Settings("run", LTEConfig(), MergeConfig(), TrainConfig(steps=1))
    kind = type("Own", (Tiny,), {"loss": infinite})
    assert "inf, so nothing can be learned from it" in prepare(kind(), settings).loss_problem
    assert not prepare(Tiny(), settings).loss_problem


def test_a_loss_that_would_take_long_is_left_to_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of the model and of the batch."""
    monkeypatch.setattr(first_loss, "MAX_OPERATIONS", 10)
    try_loss(fail("a mistake"))
