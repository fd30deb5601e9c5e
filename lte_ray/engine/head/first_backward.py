"""The backward passes before it is known which weights the loss differentiates with respect to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lte_ray.adapters.user_parameter import GradientOfWeight
from lte_ray.engine.head.rng import rewind_generators
from lte_ray.engine.head.worker_state import load_worker_state, worker_state
from lte_ray.worker import Batch, Worker, copy_batch


def first_backward(
    backward: Callable[[Batch], Tensor],
    batch: Batch,
    worker: Worker,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> Tensor:
    """Calls `backward` with a copy of the batch, again each time that it turns out to need the gradient of another weight.

    Before it is called again, the model's buffers, the gradients, the generators and the worker's state are as they were.
    """
    while True:
        buffers, state = [buffer.clone() for buffer in model.buffers()], worker_state(worker)
        try:
            with rewind_generators(GradientOfWeight, device):
                return backward(copy_batch(batch))
        except GradientOfWeight:
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(value)
            optimizer.zero_grad()
            load_worker_state(worker, *state)
