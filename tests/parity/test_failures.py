"""Cases without an answer: they count, are told with their reasons, and every output says the same of the run."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from xml.etree import ElementTree

import pytest

from qvl import Pipeline
from qvl.backends.wrapper import WrappingBackend
from qvl.errors import BackendError, ConfigError
from qvl.evaluation.agreement import Counted
from qvl.parity import Budgets, Case, ParityReport, compare
from qvl.parity.differences import differ
from qvl.parity.observation import Observation, TokenStep
from qvl.parity.report import kl_of
from qvl.parity.tally import ParityTally
from qvl.types import ChatRequest, Chunk
from tests.parity.own_minds import ShorteningBackend
from tests.server.echo_backend import EchoBackend


class FailingBackend(WrappingBackend):
    """Fails where the question says so."""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        if "fail" in request.messages[-1].text:
            raise BackendError(f"out of memory: {len(request.messages[-1].text)} bytes", hint="less")
        async with aclosing(self.inner.stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk


def reported(questions: list[str], *, budget: str | None = None, both: bool = False) -> ParityReport:
    cases = [Case(f"{place}", question=text) for place, text in enumerate(questions)]
    budgets = None if budget is None else Budgets.read([budget])
    kinds = FailingBackend if both else WrappingBackend
    with (
        Pipeline(backend=kinds(EchoBackend()), cache="off") as a,
        Pipeline(backend=FailingBackend(EchoBackend()), cache="off") as b,
    ):
        return compare(a, b, cases, budgets=budgets, probe=False)


def junit(report: ParityReport) -> dict[str, str | None]:
    """What JUnit says of each test: "failure", "skipped", or None for what passed."""
    suite = ElementTree.fromstring(report.to_junit())
    told = {test.get("name", ""): next((inner.tag for inner in test), None) for test in suite}
    assert int(suite.get("failures", "")) == [*told.values()].count("failure")
    assert int(suite.get("skipped", "")) == [*told.values()].count("skipped")
    assert int(suite.get("tests", "")) == len(told)
    return told


FEW = ["What?"] * 6 + ["fail", "fail twice"]


def test_what_one_side_alone_answers_agrees_nowhere() -> None:
    report = reported(FEW)
    assert report.failed == (0, 2)
    assert (report.agreement["text"].agree, report.agreement["text"].count) == (6, 8)
    assert report.layer == "answered"
    assert report.exit_code == 1
    assert junit(report)["answered"] == "failure"


@pytest.mark.parametrize("budget", ["text=0.5", "kl=0.5", "text=0.5,token=0.1"])
def test_a_run_that_one_side_did_not_answer_is_not_within(budget: str) -> None:
    report = reported(FEW, budget=budget)
    assert report.standing == "beyond"
    assert report.exit_code == 1
    assert junit(report)["answered"] == "failure"
    (line,) = (line for line in report.lines() if line.startswith("budget answered"))
    assert "beyond" in line
    assert "2 of 8 cases" in line


def test_a_budget_may_allow_failures() -> None:
    report = reported(["What?"] * 20 + ["fail"], budget="answered=0.5,text=0.5")
    assert {verdict.name: verdict.standing for verdict in report.verdicts} == {"answered": "within", "text": "within"}
    assert report.exit_code == 0
    assert "failure" not in junit(report).values()


def test_reasons_are_counted_and_told() -> None:
    report = reported(FEW)
    (reason,) = report.reasons
    assert (reason.side, reason.count) == ("B", 2)
    told = "\n".join(report.lines())
    assert "failed: 2 of 8 cases, 0 on both sides, 2 on one side alone" in told
    assert "B, 2 cases: out of memory: 4 bytes" in told
    assert report.to_json()["reasons"] == [{"side": "B", "count": 2, "error": reason.error}]
    assert "out of memory" in report.to_html()
    # The answer of the other side parts from none.
    assert "<mark>" not in report.to_html()
    assert "out of memory" in report.to_junit()


def test_where_both_fail_no_layer_parts() -> None:
    report = reported(FEW, both=True)
    assert (report.failed, report.layer, report.exit_code) == ((2, 0), None, 0)
    assert report.agreement["text"].count == 6
    assert [(reason.side, reason.count) for reason in report.reasons] == [("A and B", 2)]
    assert "failure" not in junit(report).values()


@pytest.mark.parametrize(("budget", "code"), [(None, 1), ("text=0.5", 2), ("kl=0.5,field.brand=0.9", 2)])
def test_a_run_without_any_answer_does_not_pass(budget: str | None, code: int) -> None:
    report = reported(["fail"] * 3, both=True, budget=budget)
    assert report.exit_code == code
    assert "failure" in junit(report).values()
    assert any("failed: 3 of 3 cases, 3 on both sides" in line for line in report.lines())
    json.dumps(report.to_json(), allow_nan=False)


def test_what_one_side_has_of_a_failed_case_counts_against_it() -> None:
    """Fields, decisions and the first token of the side that answered, too."""
    tally = ParityTally()
    steps = (TokenStep("a", -0.1, {"a": -0.1, "b": -2.3}),)
    failed = Observation("x", error="no")
    tally.add(differ(Observation("x", steps=steps, text="a", fields={"brand": "Z", "tags.0": "q"}), failed))
    tally.add(differ(failed, Observation("x", choices={"mug?": True}, decisions={"mug?": {"True": 1.0}})))
    found = {name: (counted.agree, counted.count) for name, counted in tally.agreement().items()}
    assert found == {
        "answered": (0, 2),
        "token": (0, 1),
        "text": (0, 1),
        "field.brand": (0, 1),
        "field.tags.*": (0, 1),
        "fields": (0, 1),
        "decision.mug?": (0, 1),
        "decisions": (0, 1),
    }


def test_more_kinds_of_reasons_than_can_be_kept_are_counted_together() -> None:
    tally = ParityTally()
    for number in range(300):
        name = "".join(chr(97 + int(digit)) for digit in str(number))
        tally.add(differ(Observation("x", error=f"wrong {name}"), Observation("x", error="out")))
    assert len(tally.reasons()) <= 101
    assert sum(reason.count for reason in tally.reasons()) == 600


def test_layers_that_part_without_a_budget_are_told_but_not_judged() -> None:
    short = ShorteningBackend(EchoBackend())
    with Pipeline(backend=EchoBackend(), cache="off") as a, Pipeline(backend=short, cache="off") as b:
        report = compare(a, b, [Case("one", question="What is it and why?")], probe=False)
    assert report.layer is not None
    assert report.exit_code == 0
    assert junit(report)[report.layer] == "skipped"


def test_a_budget_of_a_name_that_cannot_be_is_refused_whatever_failed() -> None:
    measured = {"answered": Counted.of(8, 9), "field.brand": Counted.of(8, 8)}
    with pytest.raises(ConfigError, match="no case measures it"):
        Budgets.read(["field.bramd=0.5"]).judge(measured, None, failed=(1, 0))
    (verdict,) = Budgets.read(["decision.mug=0.5"]).judge(measured, None, failed=(1, 0))
    assert verdict.standing == "undecided"


def test_what_is_never_answered_is_no_noise() -> None:
    cases = [Case("a", question="What?"), Case("b", question="fail")]
    with Pipeline(backend=FailingBackend(EchoBackend()), cache="off") as a:
        checked = compare(a, a, cases, self_check=True, probe=False).self_check
    assert checked is not None
    assert (checked.cases, checked.same) == (1, 1)


def test_one_case_has_no_interval() -> None:
    tally = ParityTally()
    step = TokenStep("a", -0.1, {"a": -0.1, "b": -2.3})
    tally.add(differ(Observation("x", steps=(step,), text="a"), Observation("x", steps=(step,), text="a")))
    kl = kl_of(tally)
    assert kl is not None
    (verdict,) = Budgets.read(["kl=0.1"]).judge(tally.agreement(), kl)
    assert (verdict.standing, verdict.told()) == ("undecided", "0, too few cases for an interval")
