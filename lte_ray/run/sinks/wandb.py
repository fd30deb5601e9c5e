"""Weights & Biases. Its own environment variables choose the project, the server and the mode (``WANDB_MODE=offline``)."""

from __future__ import annotations

import os
from typing import Any

from lte_ray.errors import ConfigError
from lte_ray.run.sinks.protocol import LogRow, RunInfo, Status

PROJECT = "lte-ray"
"""The project unless WANDB_PROJECT names another."""


class WandbSink:
    """Logs figures, with the step as x axis, and events as text."""

    @staticmethod
    def check() -> None:
        """Logs in, before the run starts: on a terminal wandb asks for the key. Raises ConfigError if that isn't possible."""
        import wandb

        if wandb.run is not None or wandb.setup().settings.mode in ("offline", "disabled", "shared"):
            return
        try:
            wandb.login()
        except Exception as error:
            raise ConfigError(
                f"--log wandb: Weights & Biases needs a login: {str(error).rstrip('.')}. Run wandb login, set WANDB_API_KEY, "
                "or set WANDB_MODE=offline and upload the run later with wandb sync."
            ) from error

    def open(self, run: RunInfo) -> None:
        """Starts or continues the run, or uses the one that the program has started itself."""
        import wandb

        self._is_ours = wandb.run is None
        self._run: Any = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.name,
            dir=str(run.folder.parent),  # wandb adds a folder of its name
            resume="allow",
            settings=wandb.Settings(console="off"),  # the run's display is no log
        )
        self._run.config.update({**run.config, "environment": dict(run.environment)}, allow_val_change=True)
        # Rows may go back to an earlier step, when a run resumes or rolls back. wandb's own step can't.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def row(self, row: LogRow) -> None:
        if row.kind == "event":
            self._run.log({"events": row.text, "step": row.step})
        elif row.figures:
            self._run.log({**row.figures, "step": row.step})

    def close(self, status: Status) -> None:
        if self._is_ours:
            self._run.finish(exit_code=0 if status == "finished" else 1)
