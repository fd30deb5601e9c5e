"""Heads that end their round before it is full, since others ask for it or since they must leave."""

from __future__ import annotations

import pytest

from lte_ray.engine.head.early_end import EarlyEnd
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.messages import ContributionResult
from tests.support.tiny_worker import Tiny, make_settings


@pytest.fixture
def head() -> Head:
    """A head that hasn't taken a step."""
    settings = make_settings(steps=90)
    head = Head(Tiny(), settings, 0)
    head.start(0, prepare(Tiny(), settings).base)
    return head


def follow(head: Head, early_end: EarlyEnd) -> None:
    """Has the head ask before every step."""
    head.interrupted = lambda: early_end.interrupts(head)


def test_a_head_that_ends_its_round_takes_one_step_at_least(head: Head) -> None:
    """Then it contributes, once, and its next round is full again."""
    early_end = EarlyEnd()
    follow(head, early_end)
    early_end.request_round_end([0])
    assert not early_end.is_due(head)
    head.train(10)
    assert head.step == 1
    assert early_end.is_due(head)
    head.contribute()
    early_end.record_contribution(head)
    head.adopt(ContributionResult(0, 1, True, 1), 1, prepare(Tiny(), head.settings).base)
    head.train(10)
    assert head.step == 11
    assert not early_end.is_due(head)


def test_a_head_whose_contribution_waits_has_ended_its_round(head: Head) -> None:
    """The steps that it takes meanwhile (--no-wait) are of its next round."""
    early_end = EarlyEnd()
    follow(head, early_end)
    head.train(3)
    head.contribute()
    early_end.request_round_end([0])
    head.train(4)
    assert head.step == 7
    head.adopt(ContributionResult(0, 1, True, 1), 1, prepare(Tiny(), head.settings).base)
    head.train(2)
    assert head.step == 9


def test_a_head_that_leaves_contributes_what_it_has_trained_and_nothing_else(head: Head) -> None:
    """It takes no step more, and has left once the result is there."""
    early_end = EarlyEnd()
    follow(head, early_end)
    head.train(3)
    early_end.request_leave()
    head.train(5)
    assert head.step == 3
    assert early_end.is_due(head)
    assert not early_end.has_contributed(head)
    contribution = head.contribute()
    assert contribution.steps == 3
    assert (early_end.has_contributed(head), early_end.has_left(head)) == (True, False)
    head.adopt(ContributionResult(0, 1, True, 1), 1, prepare(Tiny(), head.settings).base)
    assert early_end.has_left(head)
    assert not early_end.is_due(head)


def test_a_head_that_has_trained_nothing_leaves_at_once(head: Head) -> None:
    """It has nothing to contribute."""
    early_end = EarlyEnd()
    assert not early_end.has_left(head)
    early_end.request_leave()
    assert early_end.has_left(head)
    assert not early_end.is_due(head)
