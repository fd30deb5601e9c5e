"""Entry point of ``lte-ray``: selects the subcommand, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 the run failed, or a check found a mistake; 2 bad input, nothing was started; 75 the run ended early and
can be resumed; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import NamedTuple

from rich.console import Console

import lte_ray
from lte_ray.config import suggest
from lte_ray.errors import RESUMABLE, LTEError

USAGE = """\
lte-ray: train networks with many parallel LoRA heads on Ray

usage: lte-ray train WORKER [flags]
       lte-ray resume RUN [flags]
       lte-ray export RUN OUT --to FORMAT [flags]
       lte-ray ladder WORKER [flags]
       lte-ray sweep WORKER --over FLAG=VALUES [flags]
       lte-ray check WORKER [flags]
       lte-ray plan WORKER [flags]
       lte-ray simulate [WORKER] [flags]
       lte-ray runs [STORAGE]
       lte-ray status|watch|logs|stop|audit RUN
       lte-ray report RUN [RUN...] [-o FILE]
       lte-ray new NAME [--from RECIPE]
       lte-ray submit [flags] train WORKER [flags]
       lte-ray completion bash|zsh|fish

  WORKER   what to train: a ready-made worker such as gpt or causal-lm, package.module:Class or path/to/file.py:Class
  RUN      a run: its path or URI, or its name
  STORAGE  a folder or URI with runs; by default Ray's, ~/ray_results
  OUT      a folder that doesn't exist yet
  FORMAT   safetensors (merged weights), pretrained (a model of transformers) or peft (a LoRA adapter)
  flags    lte-ray train WORKER --help shows the common ones and the worker's own, --help-all shows all

examples:
  lte-ray new my/file.py
  lte-ray train gpt --num-heads 2
  lte-ray train my/file.py:Net --num-heads 4 --merge-iter 10 --steps 200 --worker.lr 0.001
  lte-ray train my/file.py:Net --config settings.toml --name second-try
  lte-ray ladder my/file.py:Net --num-heads 4 --quick
  lte-ray sweep my/file.py:Net --over lora-r=8,16,32 --over lr=log:0.001:0.1 --num-trials 20
  lte-ray check my/file.py:Net --num-heads 4
  lte-ray plan gpt --num-heads 8 --gpu 24GB --num-gpus 8 --link 1Gbit
  lte-ray simulate --num-heads 4 --speeds 1 1 1 4 --when arrival --no-wait
  lte-ray resume second-try --steps 800
  lte-ray export second-try second-try.safetensors --to safetensors
  lte-ray watch second-try
  lte-ray report first-try second-try -o report.html
  lte-ray audit ~/ray_results/second-try
  lte-ray submit --address http://HEAD-NODE:8265 train my/file.py:Net --num-heads 8 --storage s3://bucket/runs

exit codes: 0 done; 1 the run failed, or check found a mistake; 2 bad input, nothing was started; 75 the run ended early
and can be resumed; 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lte-ray {lte_ray.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        known = ", ".join(f"lte-ray {name} {command.arguments}" for name, command in COMMANDS.items())
        return _complain(
            f"There is no command {arguments[0]!r}; the commands are: {known}.{suggest(arguments[0], COMMANDS)}", 2
        )
    if _wants_json(arguments):
        from lte_ray.cli.call import json_alone, print_json

        with json_alone():
            code, message = _run(arguments)
            if message:
                print_json({"error": message, "exit_code": code})
            return code
    return _run(arguments)[0]


def _run(arguments: list[str]) -> tuple[int, str]:
    """Runs a subcommand. Returns the exit code, and the message of an error, which is shown on stderr."""
    command, message = COMMANDS[arguments[0]], ""
    _signals.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return command.run(arguments[1:]) or 0, ""
    except LTEError as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) if arguments[0] in ("train", "resume") else ""
        resumable = getattr(interrupt, "checkpoint", None) is not None and received_sigterm()
        code, message = RESUMABLE if resumable else 130, f"Interrupted. {kept or command.interrupted}"
    return _complain(message, code), message


def _wants_json(arguments: list[str]) -> bool:
    """Whether stdout is to have JSON: `--json` as a switch, not as `simulate --json FILE`."""
    if "--json" not in arguments or {"-h", "--help", "--help-all"} & set(arguments):
        return False
    following = arguments[arguments.index("--json") + 1 :]
    return arguments[0] != "simulate" or not following or following[0].startswith("-")


class Command(NamedTuple):
    """A subcommand: its function, which may return an exit code, its arguments for messages, and what an interrupt leaves."""

    run: Callable[[list[str]], int | None]
    arguments: str
    interrupted: str


def _deferred(name: str, module: str = "") -> Callable[[list[str]], int | None]:
    """The subcommand `name`, whose module in `lte_ray.cli` is imported only when it is called, so that each starts fast."""

    def run(arguments: list[str]) -> int | None:
        function: Callable[[list[str]], int | None] = getattr(import_module(f"lte_ray.cli.{module or name}"), name)
        return function(arguments)

    return run


COMMANDS = {
    "train": Command(_deferred("train"), "WORKER [flags]", "Training hadn't begun."),
    "resume": Command(_deferred("resume", module="train"), "RUN [flags]", "Training hadn't begun."),
    "export": Command(_deferred("export"), "RUN OUT --to FORMAT [flags]", "Nothing was written."),
    "ladder": Command(_deferred("ladder"), "WORKER [flags]", "Trainings that are done are kept."),
    "sweep": Command(_deferred("sweep"), "WORKER --over FLAG=VALUES [flags]", "Trials that are done are kept."),
    "check": Command(_deferred("check"), "WORKER [flags]", "Nothing was written."),
    "plan": Command(_deferred("plan"), "WORKER [flags]", "Nothing was started."),
    "simulate": Command(_deferred("simulate"), "[WORKER] [flags]", "Nothing was written."),
    "audit": Command(_deferred("audit"), "RUN", "Nothing was written."),
    "runs": Command(_deferred("runs"), "[STORAGE]", "Nothing was written."),
    "status": Command(_deferred("status"), "RUN", "Nothing was written."),
    "watch": Command(_deferred("watch"), "RUN", "The run isn't affected."),
    "stop": Command(_deferred("stop"), "RUN", "If the run was asked to stop, it still is."),
    "logs": Command(_deferred("logs"), "RUN [--follow]", "The run isn't affected."),
    "report": Command(_deferred("report"), "RUN [RUN...] [flags]", "Nothing was written."),
    "new": Command(_deferred("new"), "NAME [--from RECIPE]", "Nothing was written."),
    "submit": Command(_deferred("submit"), "[flags] COMMAND", "If a job was submitted, it was asked to stop."),
    "completion": Command(_deferred("completion"), "SHELL", "Nothing was written."),
}


JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""An environment variable that Ray sets for the command of a job."""

_signals: set[int] = set()
"""What has interrupted this call, apart from Ctrl-C."""


def received_sigterm() -> bool:
    """Whether SIGTERM, not Ctrl-C, has interrupted this call."""
    return signal.SIGTERM in _signals


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM, which `ray job stop` sends, like Ctrl-C."""
    _signals.add(number)
    signal.signal(number, signal.SIG_IGN)  # shutting down must not be interrupted
    raise KeyboardInterrupt


def _complain(message: str, code: int) -> int:
    console = Console(stderr=True, highlight=False)
    console.print("[bold red]error:[/] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    return code


def entry() -> None:
    """Entry point of the console script. Ends silently if its reader has closed the pipe (`lte-ray train --help | head`)."""
    try:
        try:
            code = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        from lte_ray.cli.flags import is_stdout_closed

        if not is_stdout_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at exit
        code = 141  # a shell's code for a process ended by SIGPIPE
    if JOB in os.environ:  # Ray doesn't record how a stopped job ended, and `ray job submit` returns 1 for any failure
        print(f"lte-ray: exit code {code}", file=sys.stderr, flush=True)
    background = sys.modules.get("lte_ray.storage.background")
    if background is not None and background.has_pending_calls():  # everything is done, but pyarrow would wait for its calls
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
