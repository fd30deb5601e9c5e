"""Settings check themselves, and each has a help text."""

from __future__ import annotations

import dataclasses

import pytest

from lte_ray.config import (
    SECTIONS,
    LTEConfig,
    MergeConfig,
    PlacementConfig,
    StorageConfig,
    TrainConfig,
    check_run_name,
    flag,
    suggest,
)
from lte_ray.errors import ConfigError, UserError

NAN, INF = float("nan"), float("inf")
INVALID = [
    (LTEConfig, "num_heads", [0, -1]),
    (LTEConfig, "lora_r", [0, -3]),
    (LTEConfig, "lora_alpha", [0.0, -1.0, NAN, INF]),
    (LTEConfig, "reset", ["A", "", None]),
    (MergeConfig, "merge_iter", [0, -1]),
    (MergeConfig, "merge_threads", [-1]),
    (MergeConfig, "measure_every", [-1]),
    (MergeConfig, "max_norm_z", [-1.0, 0.5, NAN, INF]),
    (MergeConfig, "rollback_z", [-1.0, 0.5, NAN, INF]),
    (TrainConfig, "steps", [0, -1]),
    (TrainConfig, "seed", [-1]),
    (TrainConfig, "eval_every", [-1]),
    (TrainConfig, "checkpoint_every", [-1]),
    (TrainConfig, "threads_per_head", [-1]),
    (PlacementConfig, "cpus_per_head", [-0.5, NAN, INF]),
    (PlacementConfig, "gpus_per_head", [-1, 1.5, 2, NAN, INF]),
    (PlacementConfig, "resource_timeout", [-1.0, NAN, INF]),
    (PlacementConfig, "gpu_memory_share", [-1.0, 1.5, 0.0, NAN, INF]),
    (PlacementConfig, "placement_strategy", ["pack", "", None]),
    (PlacementConfig, "head_labels", ["mine=a", 3]),
    (StorageConfig, "name", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\0b"]),
    (StorageConfig, "keep_checkpoints", [0, -1]),
]


@pytest.mark.parametrize(("kind", "name", "value"), [(k, n, v) for k, n, values in INVALID for v in values])
def test_a_bad_value_names_its_flag_and_itself(kind: type, name: str, value: object) -> None:
    """The error is a ConfigError (and a ValueError) with the flag and the value."""
    with pytest.raises(ConfigError) as raised:
        kind(**{name: value})
    assert str(raised.value).startswith(f"{flag(name)} is {value!r}, but it must be ")
    assert isinstance(raised.value, ValueError)
    assert isinstance(raised.value, UserError)


SMALLEST = [
    LTEConfig(num_heads=1, lora_r=1, lora_alpha=1e-9, reset="B"),
    MergeConfig(merge_iter=1, merge_threads=0),
    TrainConfig(steps=1, seed=0, eval_every=0, checkpoint_every=0, threads_per_head=0),
    PlacementConfig(cpus_per_head=0, gpus_per_head=0, resource_timeout=0),
    StorageConfig(name="a b", keep_checkpoints=1, resume=True),
    StorageConfig(keep_checkpoints=None, overwrite=True),
]


@pytest.mark.parametrize("config", SMALLEST, ids=lambda config: type(config).__name__)
def test_the_bounds_are_valid_and_settings_are_frozen(config: object) -> None:
    """The smallest valid values are accepted, and can't be changed later."""
    name = dataclasses.fields(config)[0].name  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)


def test_resume_needs_a_name_and_excludes_overwrite() -> None:
    """The errors name the flags that contradict each other."""
    with pytest.raises(ConfigError, match="--resume needs --name"):
        StorageConfig(resume=True)
    with pytest.raises(ConfigError, match="--resume and --overwrite contradict each other"):
        StorageConfig(name="a", resume=True, overwrite=True)


def test_every_field_has_help_and_a_valid_default() -> None:
    """Each section can be made without arguments, and each field's help is a sentence."""
    for section in SECTIONS:
        made = section()
        for field in dataclasses.fields(section):
            assert field.metadata["help"].strip().endswith((".", ")")), field.name
            assert getattr(made, field.name) == field.default or field.name == "lora_alpha"  # follows the rank


def test_no_field_name_occurs_twice() -> None:
    """Flags and TOML keys are flat, so names and flags must differ in all sections."""
    names = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    assert len(names) == len(set(names)) == len({flag(name) for name in names})


def test_sections_are_all_the_settings_classes() -> None:
    """No settings class of the module is left out of SECTIONS."""
    module = vars(__import__("lte_ray.config", fromlist=["config"]))
    of_layers = {module["LayerConfig"], module["Rule"], module["Resolved"]}  # parts of a section's field
    assert {kind for kind in module.values() if dataclasses.is_dataclass(kind)} - of_layers == set(SECTIONS)


def test_scaling_is_alpha_over_r() -> None:
    """s = lora_alpha / lora_r."""
    assert LTEConfig(lora_r=32, lora_alpha=4096).resolve("linear", ()).scaling == 128.0


@pytest.mark.parametrize("name", [None, "a", "vit-2024", "second try", "ünïcode", "a.b", "a-b"])
def test_run_names_are_any_one_folder_name(name: str | None) -> None:
    """A run name is None or any plain folder name."""
    check_run_name(name)
    assert StorageConfig(name=name).name == name


def test_flags_are_names_with_dashes() -> None:
    """merge_iter -> --merge-iter."""
    assert (flag("merge_iter"), flag("steps")) == ("--merge-iter", "--steps")


def test_suggest_names_only_similar_names() -> None:
    """' Did you mean x?', or nothing."""
    assert suggest("avrage", ["average", "quorum"]) == " Did you mean average?"
    assert suggest("zzz", iter(["average", "quorum"])) == ""


def test_a_merge_schedule_gives_the_steps_of_a_round_by_progress() -> None:
    """The last start that is reached counts; without a schedule, `merge_iter` does."""
    scheduled = MergeConfig(merge_iter=7, merge_schedule="0:1 0.05:10 0.9:2")
    assert [scheduled.steps_between(p) for p in (0, 0.049, 0.05, 0.5, 0.9, 1)] == [1, 1, 10, 10, 2, 2]
    assert MergeConfig(merge_iter=7).steps_between(0.3) == 7


@pytest.mark.parametrize(
    "text", ["10", "0:0", "0.1:5", "0:1 0.5:2 0.5:3", "0:1 0.5:2 0.2:3", "0:1 1:5", "0:1,0.5:2", "0:-1", "a:1", 10, ["0:1"]]
)
def test_a_malformed_merge_schedule_is_refused(text: object) -> None:
    """The error says what it must be."""
    with pytest.raises(ConfigError, match=r"--merge-schedule is .* pairs START:STEPS with ascending starts from 0 to below 1"):
        MergeConfig(merge_schedule=text)  # type: ignore[arg-type]


def test_a_merge_schedule_and_a_time_contradict_each_other() -> None:
    """Both set the length of a round."""
    with pytest.raises(ConfigError, match="--merge-schedule and --merge-every contradict each other"):
        MergeConfig(merge_schedule="0:1 0.5:2", merge_every="5s")
