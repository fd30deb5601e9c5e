"""Heads of different ranks and alphas: merged, resumed, and continued from checkpoints that had none."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray import checkpoint
from lte_ray.adapters.plan import make_plans
from lte_ray.checkpoint import Manifest
from lte_ray.config import LTEConfig, StorageConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import restore
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import describe_cut_ranks, describe_low_rank, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging import Average, ComposedPolicy, Merge, Pending, Roster, Wait
from lte_ray.merging.low_rank import Share, add_contributions, dense_change
from lte_ray.messages import ContributionResult
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from lte_ray.trainer import _warn
from tests.support.dense_reference import dense_change_by_formula
from tests.support.head_states import head_state, through_file
from tests.support.numerics import assert_near
from tests.support.plans import make_contribution, random_flat
from tests.support.tiny_worker import Net, Tiny, make_settings

LTE: dict[str, Any] = {"lora_r": (1, 2, 5), "lora_alpha": (1.0, 4.0, 2.5), "layers": ("mid: lora_r=2,1,8 lora_alpha=3",)}


def settings(worker_steps: int = 12, **changes: Any) -> Settings:
    run_settings = make_settings(heads=3, steps=worker_steps)
    return dataclasses.replace(run_settings, lte=dataclasses.replace(run_settings.lte, **(LTE | changes)))


class Immediate:
    """Merges every contribution as it arrives, with weight 1/3."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Merge | Wait:
        return Merge({p.head: 1 / 3 for p in pending}) if pending else Wait()


def factors(plan: Plan, contribution: Tensor) -> Tensor:
    return contribution[: plan.factors_size]


def test_each_head_has_its_own_rank_and_scaling() -> None:
    """By the head's number, for all layers and in a rule; all heads have one base layout."""
    plans = make_plans(Net(), settings().lte)
    assert [[a.rank for a in plan.adapted] for plan in plans] == [[1, 2, 1], [2, 1, 2], [5, 8, 5]]
    assert [[a.scaling for a in plan.adapted] for plan in plans] == [[1.0, 1.5, 1.0], [2.0, 3.0, 2.0], [0.5, 3 / 8, 0.5]]
    assert len({plan.base for plan in plans}) == 1
    assert len({plan.contribution.size for plan in plans}) == 3


@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merges_of_trained_heads_of_different_ranks_add_up(reset: str, rslora: bool) -> None:
    """W_v - W_0 = sum of w s_n (B_n A_n - B'_n A'_n) for all merges; right after one each head computes with W_v."""
    worker, run_settings = Tiny(), settings(reset=reset, rslora=rslora)
    initial = prepare(worker, run_settings, torch.float64)
    coordinator = Coordinator(run_settings, initial.plan, initial.base.clone(), ComposedPolicy(Average()), plans=initial.plans)
    heads = [Head(worker, run_settings, n, dtype=torch.float64) for n in range(3)]
    for head in heads:
        head.start(0, initial.base)
    ledger, before = torch.zeros_like(initial.base), dict.fromkeys(range(3))
    for version in range(1, 5):
        for head in heads:
            contribution = head.train_round()
            buffer = contribution.buffer
            reference = before[head.number]
            ledger += dense_change_by_formula(head.plan, buffer, reference) / 3
            before[head.number] = None if reset == "B" else factors(head.plan, buffer).clone()
            event_result = coordinator.receive(contribution, buffer)
        assert [m.version for m in event_result.merges] == [version]
        # 12 changes, each of sums of up to 16 float64 terms of size 1.
        assert_near(coordinator.base - initial.base, ledger, 1e-13)
        for result in event_result.results:
            head = heads[result.head]
            head.adopt(result, version, coordinator.base.clone())
            words = torch.arange(7)
            for name, weight in {s.name: head.converted.parameters[s.name] for s in head.plan.adapted}.items():
                spec = next(s for s in head.plan.adapted if s.name == name)
                product = head.converted.factors[spec.b_name] @ head.converted.factors[spec.a_name]
                entry = next(e for e in head.plan.base.entries if e.name == name)
                expected = coordinator.base[entry.offset : entry.offset + entry.size].view(entry.shape)
                assert_near(weight + spec.scaling * product, expected, 1e-14)
        outputs = [head.model.eval()(words) for head in heads]
        for output in outputs[1:]:
            assert_near(output, outputs[0], 1e-13)
        for head in heads:
            head.model.train()
    assert not torch.allclose(coordinator.base, initial.base, atol=1e-2)


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.1, 8)), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
def test_merges_of_any_ranks_are_sums_of_dense_changes(ranks: list[tuple[int, float]], rounds: int, seed: int) -> None:
    """One at a time, in any order, with any weights: the base moves by w D of each contribution, and by nothing else."""
    lte = LTEConfig(num_heads=len(ranks), lora_r=tuple(r for r, _ in ranks), lora_alpha=tuple(a for _, a in ranks))
    plans = make_plans(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6, bias=False)), lte)
    chance = random.Random(seed)
    base = random_flat(plans[0].base.size, seed)
    start, ledger = base.clone(), torch.zeros_like(base)
    before: dict[int, Tensor | None] = dict.fromkeys(range(len(ranks)))
    for turn in range(rounds):
        chosen = chance.sample(range(len(ranks)), chance.randint(1, len(ranks)))
        shares = []
        for head in chosen:
            sent = random_flat(plans[head].contribution.size, 1000 * turn + head)
            share = Share(chance.uniform(-1, 1), plans[head], sent, before[head])
            by_hand = dense_change_by_formula(plans[head], sent, before[head])
            assert_near(dense_change(share), share.weight * by_hand, 1e-14)
            ledger += share.weight * by_hand
            shares.append(share)
        add_contributions(base, shares)
        for head, share in zip(chosen, shares, strict=True):
            before[head] = factors(plans[head], share.contribution)
        assert_near(base - start, ledger, 1e-13)  # up to 20 changes of float64 products


def test_a_contribution_of_another_heads_size_is_refused() -> None:
    """The coordinator knows each head's layout."""
    worker, run_settings = Tiny(), settings()
    initial = prepare(worker, run_settings, torch.float64)
    coordinator = Coordinator(run_settings, initial.plan, initial.base.clone(), ComposedPolicy(Average()), plans=initial.plans)
    head = Head(worker, run_settings, 1, dtype=torch.float64)
    head.start(0, initial.base)
    contribution = head.train_round()
    (result,) = coordinator.receive(dataclasses.replace(contribution, head=2), contribution.buffer).results
    assert not result.accepted
    assert f"expected ({initial.plans[2].contribution.size},) and" in result.reason
    assert coordinator.receive(contribution, contribution.buffer).results == ()


@pytest.mark.parametrize("large", [0, 1, 2])
def test_the_bound_of_values_depends_on_the_scaling_of_each_head(large: int) -> None:
    """A buffer that could be merged with s = 1 is refused from a head whose s makes it exceed the bound."""
    alphas = tuple(1e6 if head == large else 1.0 for head in range(3))
    base = torch.zeros(make_plans(Net(), settings().lte)[0].base.size)
    for alpha, accepted in (((1.0, 1.0, 1.0), True), (alphas, False)):
        run_settings = settings(lora_r=1, lora_alpha=alpha, layers=())
        plans = make_plans(Net(), run_settings.lte)
        coordinator = Coordinator(run_settings, plans[0], base.clone(), Immediate(), plans=plans)
        size = plans[large].contribution.size
        sent = torch.full((size,), math.sqrt(1e27 / size))
        (result,) = coordinator.receive(make_contribution(large), sent).results
        assert result.accepted == accepted
        assert ("absurdly large" in result.reason) != accepted
        assert bool(coordinator.base.any()) == accepted
        assert bool(torch.isfinite(coordinator.base).all())


def test_equal_ranks_given_one_by_one_equal_one_rank() -> None:
    """(2, 2, 2) is 2, bitwise; another order of ranks is another run."""
    one, each = (run_in_process(Tiny(), settings(lora_r=r, lora_alpha=4.0, layers=()), torch.float64) for r in (2, (2, 2, 2)))
    assert torch.equal(one.base, each.base)
    first, second = (
        run_in_process(Tiny(), settings(lora_r=r, lora_alpha=4.0, layers=()), torch.float64) for r in ((1, 2, 3), (3, 2, 1))
    )
    assert not torch.equal(first.base, second.base)
    assert [[a.rank for a in head.plan.adapted] for head in first.heads] == [[1] * 3, [2] * 3, [3] * 3]


@pytest.mark.parametrize("head", [0, 1, 2])
@pytest.mark.parametrize("reset", ["none", "B"])
def test_a_restored_head_of_any_rank_continues_bitwise_the_same(head: int, reset: str) -> None:
    """Through safetensors and JSON, with a reference of its own size."""
    worker, run_settings = Tiny(dropout=0.3, optimizer="adamw"), settings(reset=reset)
    base = prepare(worker, run_settings, torch.float64).base
    one = Head(worker, run_settings, head, dtype=torch.float64)
    one.start(0, base)
    one.train_round()
    one.adopt(ContributionResult(head, 1, True, 1), 1, base + 0.1)
    tensors, meta = head_state(one)
    assert ("reference" in tensors) == (reset == "none")
    if reset == "none":
        assert tensors["reference"].shape == (one.plan.factors_size,)
    other = Head(worker, run_settings, head, dtype=torch.float64, incarnation=1)
    restore(other, through_file((tensors, meta)), base + 0.1)
    for sequence in (2, 3):
        expected, continued = one.train_round(), other.train_round()
        assert torch.equal(continued.buffer, expected.buffer)
        for each in (one, other):
            each.adopt(ContributionResult(head, sequence, True, sequence), sequence, base - 0.1 * sequence)


# -- checkpoints of older releases -------------------------------------------------------------------------------------


OLD = ("num_heads", "lora_r", "lora_alpha", "reset", "exclude")
"""The settings of heads in releases in which only nn.Linear layers had factors."""


@dataclasses.dataclass
class Convolutional(Tiny):
    """With a convolution, which older releases didn't adapt."""

    def build_model(self) -> nn.Module:
        model = Net().double()
        model.conv = nn.Conv1d(4, 4, 3).double()
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, batch) + model.conv(torch.ones(4, 3, dtype=torch.float64)).square().sum()


def written(directory: RunDirectory, worker: Tiny, run_settings: Settings, *, old: bool) -> tuple[Manifest, list[Head], Tensor]:
    """A checkpoint after one merge, as written now, or by an older release: without newer settings, cursor and scaler."""
    initial = prepare(worker, run_settings, torch.float64)
    coordinator = Coordinator(run_settings, initial.plan, initial.base.clone(), ComposedPolicy(Average()), plans=initial.plans)
    heads = [Head(worker, run_settings, n, dtype=torch.float64) for n in range(run_settings.lte.num_heads)]
    for head in heads:
        head.start(0, initial.base)
        contribution = head.train_round()
        event_result = coordinator.receive(contribution, contribution.buffer)
    files = [checkpoint.write_base(directory, 1, initial.plan, coordinator.base)]
    for result in event_result.results:
        head = heads[result.head]
        head.adopt(result, 1, coordinator.base.clone())
        tensors, meta = head_state(head)
        if old:
            for new in ("batches", "lanes", "grant", "released", "offered", "position"):
                del meta[new]
            del meta["optimizer"]["scaler"]
        files.append(checkpoint.write_head(directory, 1, head.number, tensors, meta))
    lte = dataclasses.asdict(run_settings.lte)
    facts = {"run": run_settings.run, "step": 3, "lte": {name: lte[name] for name in OLD} if old else lte}
    directory.write("run.toml", b"")
    return checkpoint.commit(directory, 1, range(run_settings.lte.num_heads), files, facts), heads, coordinator.base


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "test")


RESUME = StorageConfig(name="test", resume=True)


@pytest.mark.parametrize("old", [False, True])
def test_an_old_and_a_new_checkpoint_are_resumed_bitwise(directory: RunDirectory, old: bool) -> None:
    """Its settings are those of the older release or the defaults; each head continues as the one that wasn't stopped."""
    worker = Tiny(dropout=0.3, optimizer="adamw")
    run_settings = make_settings() if old else settings()
    _, heads, base = written(directory, worker, run_settings, old=old)
    manifest, _ = run_start.check_start(directory, RESUME, run_settings)
    assert manifest is not None
    initial = prepare(worker, run_settings, torch.float64)
    checkpoint.check_factors(directory, manifest, initial.plans)
    assert torch.equal(checkpoint.read_base(directory, manifest, initial.plan), base)
    for head in heads:
        other = Head(worker, run_settings, head.number, dtype=torch.float64, incarnation=1)
        restore(other, checkpoint.read_head(directory, manifest, head.number), base)
        assert torch.equal(other.train_round().buffer, head.train_round().buffer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": (1, 2, 4)}, r"--lora-r was \[1, 2, 5\] and is \[1, 2, 4\]"),
        ({"lora_alpha": 1.0}, r"--lora-alpha was \[1.0, 4.0, 2.5\] and is 1.0"),
        ({"layers": ()}, "--layers was"),
        ({"rslora": True}, "--rslora was False and is True"),
        ({"lora_bias": "frozen"}, "--lora-bias was replica and is frozen"),
        ({"base_dtype": "int8"}, "--base-dtype was fp32 and is int8"),
        ({"adapt": ("linear",)}, "--adapt was"),
    ],
)
def test_a_run_is_not_continued_with_other_heads(directory: RunDirectory, changes: dict[str, Any], message: str) -> None:
    """The error names what differs: the value before, and the value now."""
    written(directory, Tiny(), settings(), old=False)
    with pytest.raises(StorageError, match=message):
        run_start.check_start(directory, RESUME, settings(**changes))


def test_epochs_do_not_say_how_long_other_heads_continue(directory: RunDirectory) -> None:
    """A step of three heads and one of two take other numbers of samples, and a run's steps count those of each head."""
    written(directory, Tiny(), settings(), old=False)
    given = settings()
    assert run_start.check_start(directory, RESUME, given, "epochs")[0] is not None
    fewer = dataclasses.replace(given, lte=dataclasses.replace(given.lte, num_heads=2, lora_r=2, lora_alpha=4.0, layers=()))
    with pytest.raises(StorageError, match=r"with 3 heads and would continue with 2, so --epochs doesn't say .*Give --steps: "):
        run_start.check_start(directory, RESUME, fewer, "epochs")


def test_a_run_of_independent_adapters_continues_as_such_with_as_many_heads(directory: RunDirectory) -> None:
    """References that a base doesn't hold can't be subtracted from it, and no head has another's data."""
    given = settings()
    independent = dataclasses.replace(given, merge=dataclasses.replace(given.merge, never_merge=True))
    manifest, _, _ = written(directory, Tiny(), given, old=False)
    with pytest.raises(StorageError, match="is a run whose heads merge: to continue it, leave --never-merge out"):
        run_start.check_start(directory, RESUME, independent)
    checkpoint.commit(directory, 1, manifest.heads, manifest.files, manifest.facts | {"never_merge": True})
    with pytest.raises(StorageError, match="is a run whose heads never merge: to continue it, give --never-merge"):
        run_start.check_start(directory, RESUME, given)
    assert run_start.check_start(directory, RESUME, independent)[0] is not None
    fewer = dataclasses.replace(
        independent, lte=dataclasses.replace(given.lte, num_heads=2, lora_r=2, lora_alpha=4.0, layers=())
    )
    with pytest.raises(StorageError, match=r"has 3 independent adapters, .*: continue it with --num-heads 3"):
        run_start.check_start(directory, RESUME, fewer)


def test_settings_that_came_later_are_compared_with_their_defaults(directory: RunDirectory) -> None:
    """An older run used the defaults; --adapt may differ, since only nn.Linear layers had factors then."""
    written(directory, Tiny(), make_settings(), old=True)
    run_settings = make_settings()
    for changes in ({"rslora": True}, {"lora_bias": "frozen"}, {"base_dtype": "int8"}, {"layers": ("up: lr=2",)}):
        with pytest.raises(StorageError, match=r"was .* and is"):
            run_start.check_start(
                directory, RESUME, dataclasses.replace(run_settings, lte=dataclasses.replace(run_settings.lte, **changes))
            )


def test_an_old_run_whose_convolutions_had_no_factors_says_how_to_resume(directory: RunDirectory) -> None:
    """Its heads have no factors for what is adapted by default now: an error before any head starts; --adapt linear resumes."""
    worker, run_settings = Convolutional(), make_settings()
    linear = dataclasses.replace(run_settings, lte=dataclasses.replace(run_settings.lte, adapt=("linear",)))
    _, heads, base = written(directory, worker, linear, old=True)
    manifest, _ = run_start.check_start(directory, RESUME, run_settings)
    assert manifest is not None
    with pytest.raises(StorageError, match=r"other factors; they differ in conv.weight. .* --adapt linear"):
        checkpoint.check_factors(directory, manifest, prepare(worker, run_settings, torch.float64).plans)
    manifest, _ = run_start.check_start(directory, RESUME, linear)
    assert manifest is not None
    checkpoint.check_factors(directory, manifest, prepare(worker, linear, torch.float64).plans)
    other = Head(worker, linear, 1, dtype=torch.float64)
    restore(other, checkpoint.read_head(directory, manifest, 1), base)
    assert torch.equal(other.train_round().buffer, heads[1].train_round().buffer)


def test_policies_see_dense_changes_of_heads_of_any_rank() -> None:
    """`Pending.change` is the change in the base layout, the same for all; a policy may merge one at a time."""
    sizes: list[int] = []

    class Arrival:
        def decide(self, pending: Any, roster: Any) -> Any:
            from lte_ray.merging import Wait

            if not pending:
                return Wait()
            sizes.append(pending[0].change().numel())
            return Merge({pending[0].head: 1 / roster.num_heads})

    result = run_in_process(Tiny(), dataclasses.replace(settings(), merge=make_settings(policy=Arrival()).merge), torch.float64)
    assert sizes == [result.plan.base.size] * 12
    assert sum(m.steps for m in result.merges) == 3 * 12


def test_ranks_that_add_up_to_too_little_are_described() -> None:
    """With the weight for which that is worst, and the rank that would do; nothing if all ranks together suffice."""
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 4))
    note = describe_low_rank(make_plans(model, LTEConfig(num_heads=3, lora_r=2)))
    assert "3 head(s) add up to 6, but 0.weight is 20 x 8" in note
    assert "--lora-r towards 3" in note
    assert describe_low_rank(make_plans(model, LTEConfig(num_heads=3, lora_r=3))) == ""


def test_a_run_warns_once_of_ranks_that_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    """Before it starts."""
    run_settings = settings(lora_r=8, lora_alpha=16.0, layers=())
    _warn(prepare(Tiny(), run_settings), 3)
    assert [r.getMessage().partition(",")[0] for r in caplog.records] == ["--lora-r is 8 for up.weight"]


def test_cut_ranks_are_described_unless_heads_train_with_lora_muon() -> None:
    """One note with the first such weight, the rank that was asked for and its size; none if no rank is cut."""
    run_settings = settings(lora_r=8, lora_alpha=16.0, layers=("mid: lora_r=1,1,9",))
    note = describe_cut_ranks(prepare(Tiny(), run_settings), 3)
    assert note.startswith("--lora-r is 8 for up.weight, which is 8 x 6, so its factors get rank 6 (the ranks of 2 more are")
    assert "--exclude up.weight" in note
    assert "the ranks of 1 more are" in describe_cut_ranks(prepare(Tiny(), run_settings), 2)  # only head 2 cuts mid.weight
    assert describe_cut_ranks(prepare(Tiny(optimizer="lora-muon"), run_settings), 3) == ""
    assert describe_cut_ranks(prepare(Tiny(), settings(lora_r=6, lora_alpha=16.0, layers=())), 3) == ""


def test_alpha_is_twice_the_rank_by_default() -> None:
    """For each head: s = 2."""
    assert LTEConfig(lora_r=8).lora_alpha == 16.0
    assert LTEConfig(num_heads=2, lora_r=(4, 8)).lora_alpha == (8.0, 16.0)
    assert {plan.adapted[0].scaling for plan in make_plans(nn.Linear(4, 4), LTEConfig(num_heads=2, lora_r=(1, 2)))} == {2.0}
