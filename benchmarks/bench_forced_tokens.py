"""What forced tokens and prompt lookup bring to one client: python benchmarks/bench_forced_tokens.py [FOLDER ...]

The bundled model, random weights in a Qwen3-VL's shape (bench_engine_checkpoint.py), and checkpoints in the folders. In
each round every answer is written without and with, in turn; the table has the medians of all rounds. What a random
model writes within a form is no answer, so such answers are prescribed: the logits of the token that comes next in
them are raised, and everything is computed as ever. Prefixes and features of pictures are not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench_engine import machine
from bench_engine_checkpoint import write

from qvl.analysis.parse_answer import response_format
from qvl.analysis.product import ProductFields
from qvl.analysis.prompts import PRODUCT_PROMPTS
from qvl.backends.local.backend import LocalBackend
from qvl.backends.local.model.model_runner import Runner
from qvl.chunks import Folder
from qvl.media.gate import load
from qvl.tiny.render import sample
from qvl.types import ChatRequest, ImagePart, Message, ResponseFormat, SamplingParams, TextPart, Tool

if TYPE_CHECKING:
    from collections.abc import Sequence as ListLike

    from torch import Tensor

    from qvl.backends.local.scheduling.sequence import Sequence
    from qvl.backends.local.scheduling.step import Step

BUILD: Final = Path(__file__).parents[1] / "build" / "forced-tokens"
ANALYSIS: Final = {
    "brand": "Nordwind",
    "category": "enamel mug",
    "attributes": {"color": "dark blue", "count": "1", "material": "steel"},
}
INVOICE: Final = {
    "invoice_number": "R-2024-1187",
    "invoice_date": "2024-03-18",
    "due_date": "2024-04-17",
    "seller_name": "Nordwind Handels GmbH",
    "seller_tax_id": "DE811907980",
    "buyer_name": "Cafe am Markt",
    "currency": "EUR",
    "net_amount": 412.5,
    "tax_rate": 19,
    "tax_amount": 78.38,
    "total_amount": 490.88,
}
TEXT: Final = {"type": "string"}
NUMBER: Final = {"type": "number"}


def tool(name: str, **arguments: Any) -> Tool:
    """Return a tool that needs all of its arguments, which are given by their schemas."""
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    return Tool(name, name.replace("_", " ").capitalize(), parameters)


TOOLS: Final = (
    tool("search_catalog", query=TEXT, max_price=NUMBER),
    tool("get_weather", city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    tool(
        "add_to_cart",
        product_id=TEXT,
        quantity={"type": "integer"},
        size={"enum": ["S", "M", "L", "XL"]},
        gift_wrap={"type": "boolean"},
    ),
    tool(
        "report_defect",
        part={"enum": ["lid", "handle", "body", "base"]},
        severity={"enum": ["minor", "major", "critical"]},
        description=TEXT,
    ),
    tool(
        "filter_products",
        category={"enum": ["mug", "shoe", "shirt", "bag"]},
        color={"enum": ["red", "blue", "green", "black"]},
        max_price=NUMBER,
        in_stock={"type": "boolean"},
    ),
)
# What is asked, what is called for it, and which of the tools are offered.
CALLS: Final[tuple[tuple[str, str, dict[str, Any], tuple[Tool, ...]], ...]] = (
    ("tool call", "A blue mug below 20.", {"query": "blue enamel mug", "max_price": 20}, TOOLS[:1]),
    ("tool call, an enum", "How warm is it in Berlin?", {"city": "Berlin", "unit": "celsius"}, TOOLS[1:2]),
    (
        "tool call, 4 arguments",
        "Two of MUG-0042 in M.",
        {"product_id": "MUG-0042", "quantity": 2, "size": "M", "gift_wrap": False},
        TOOLS[2:3],
    ),
    (
        "tool call, a sentence",
        "The handle of my mug has a long crack.",
        {"part": "handle", "severity": "major", "description": "a crack along the handle"},
        TOOLS[3:4],
    ),
    (
        "tool call, one of 5 tools",
        "Blue mugs below 20 that you have here.",
        {"category": "mug", "color": "blue", "max_price": 20, "in_stock": True},
        TOOLS,
    ),
)
PAGE: Final = (
    "Our enamel mugs are made of steel and fired twice at eight hundred degrees. They hold a third of a litre, weigh "
    "almost nothing and outlive every kitchen. Wash them by hand, keep them off induction plates, and expect a chip or "
    "two with the years: that is how one knows a mug that has been used. Sizes, prices and colours are in the list."
)


def schema_of(value: object) -> dict[str, Any]:
    """Return a schema that asks for an object like `value`, every name required."""
    if isinstance(value, dict):
        parts = {name: schema_of(item) for name, item in value.items()}
        return {"type": "object", "properties": parts, "required": list(parts)}
    return {"type": "string" if isinstance(value, str) else "integer" if isinstance(value, int) else "number"}


@dataclass(frozen=True)
class Row:
    """A request, and what is to be written; None where the model decides."""

    name: str
    request: ChatRequest
    answer: str | None


def rows(own_words: bool) -> list[Row]:
    """Return what is measured; `own_words`: the model can analyse by itself."""
    picture = ImagePart(load(sample(3, (448, 448))[1]))

    def user(*parts: Any) -> tuple[Message, ...]:
        return (Message("user", parts),)

    prompt = PRODUCT_PROMPTS["en"]
    greedy = SamplingParams(max_tokens=400)
    free = SamplingParams(max_tokens=96, ignore_eos=True)
    return [
        Row(
            "analyze",
            ChatRequest(
                (Message("system", (TextPart(prompt.system),)), *user(picture, TextPart(prompt.user))),
                SamplingParams(max_tokens=400, logprobs=0),
                response_format=response_format(ProductFields),
            ),
            None if own_words else json.dumps(ANALYSIS),
        ),
        Row(
            "invoice, 11 fields",
            ChatRequest(
                user(picture, TextPart("Read the invoice.")),
                greedy,
                response_format=ResponseFormat("json_schema", schema=schema_of(INVOICE)),
            ),
            json.dumps(INVOICE),
        ),
        *(
            Row(
                name,
                ChatRequest(user(TextPart(asked)), greedy, tools=offered, tool_choice="required"),
                f"<tool_call>\n{json.dumps({'name': offered[-1].name, 'arguments': arguments})}\n</tool_call>",
            )
            for name, asked, arguments, offered in CALLS
        ),
        Row("prose", ChatRequest(user(TextPart("What do you sell?")), greedy), PAGE),
        Row("free text", ChatRequest(user(picture, TextPart("Describe the picture.")), free), None),
        Row(
            "free text that repeats its prompt",
            ChatRequest(user(TextPart(f"Repeat this text word by word:\n{PAGE}")), greedy),
            PAGE,
        ),
    ]


class ScriptedRunner(Runner):
    """A runner whose next token is the next one of `answer`, unless that is None."""

    answer: str | None = None
    tokenizer: Any = None

    def forward(self, step: Step) -> tuple[list[Sequence], Tensor]:
        sequences, logits = super().forward(step)
        if self.answer is not None:
            drafts = {chunk.sequence: chunk.draft for chunk in step.prefill}
            for row, token in enumerate(self._next(sequences, drafts)):
                logits[row, token] += 1e4
        return sequences, logits

    def _next(self, sequences: ListLike[Sequence], drafts: dict[Sequence, tuple[int, ...]]) -> list[int]:
        assert self.answer is not None
        tokens = []
        rows: Counter[Sequence] = Counter()
        for sequence in sequences:
            draft = drafts.get(sequence, ())[: rows[sequence]]
            rows[sequence] += 1
            written = self.tokenizer.decode([*sequence.tokens[sequence.num_prompt :], *draft])
            rest = self.answer.removeprefix(written) if self.answer.startswith(written) else ""
            tokens.append(self.tokenizer.encode(rest)[0] if rest else self.tokenizer.eos_token_id)
        return tokens


class ScriptedBackend(LocalBackend):
    runner: ScriptedRunner

    def _runner(self, *arguments: Any) -> Runner:
        self.runner = ScriptedRunner(*arguments)
        self.runner.tokenizer = arguments[0].tokenizer
        return self.runner


@dataclass(frozen=True)
class Point:
    """One answer: seconds in all and behind its first piece, steps, tokens, and its text."""

    total: float
    writing: float
    steps: float
    tokens: int
    text: str


async def once(backend: ScriptedBackend, row: Row, clock: Callable[[], float]) -> Point:
    backend.runner.answer = row.answer
    before = backend.stats()["steps"]
    folder = Folder()
    began = first = clock()
    async for chunk in backend.stream(row.request):
        first = clock() if first == began else first
        folder.add(chunk)
    end = clock()
    choice = folder.choices()[0]
    text = choice.text or json.dumps([call.arguments for call in choice.tool_calls])
    return Point(end - began, end - first, backend.stats()["steps"] - before, folder.usage.completion_tokens, text)


async def together(backend: ScriptedBackend, row: Row, options: argparse.Namespace) -> Point:
    """Return the slowest of all clients' answers."""
    clock = time.process_time if options.processor_time else time.perf_counter
    points = await asyncio.gather(*(once(backend, row, clock) for _ in range(options.clients)))
    return max(points, key=lambda point: point.total)


async def measure(model: Path | None, options: argparse.Namespace) -> None:
    """Print the table's lines of one model."""
    name = "bundled" if model is None else model.name
    async with ScriptedBackend(
        None if model is None else str(model), dtype=options.dtype, kv_cache_bytes=512 << 20, prefix_cache=False,
        vision_cache_bytes=0,
    ) as backend:  # fmt: skip
        assert backend._loaded is not None
        engine = backend._loaded.engine
        draft_rows = engine.scheduler.draft_rows
        chosen = [row for row in rows(model is None) if row.name.startswith(tuple(options.only) or "")]
        points: dict[tuple[str, bool], list[Point]] = {(row.name, on): [] for row in chosen for on in (False, True)}
        for number in range(options.rounds + 1):
            for row in chosen:
                for on in (False, True) if number % 2 else (True, False):
                    engine.forces, engine.scheduler.draft_rows = on, draft_rows if on else 0
                    point = await together(backend, row, options)
                    if number:
                        points[row.name, on].append(point)
        for row in chosen:
            print(line(name, row.name, points[row.name, False], points[row.name, True]), flush=True)


def line(model: str, row: str, off: list[Point], on: list[Point]) -> str:
    def median(points: list[Point], part: Callable[[Point], float]) -> float:
        return statistics.median(part(point) for point in points)

    total, total_on = median(off, lambda p: p.total), median(on, lambda p: p.total)
    writing, writing_on = median(off, lambda p: p.writing), median(on, lambda p: p.writing)
    same = "same" if off[0].text == on[0].text else "other"
    cells = [
        model, row, f"{off[0].tokens} / {on[0].tokens}, {same}", f"{off[0].steps:.0f} / {on[0].steps:.0f}",
        f"{total * 1e3:.0f} / {total_on * 1e3:.0f}", f"**{total / total_on:.2f}**",
        f"{writing * 1e3:.0f} / {writing_on * 1e3:.0f}", f"{writing / writing_on:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="more checkpoints")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clients", type=int, default=1, help="that ask the same at once")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--processor-time", action="store_true", help="of one thread: for a machine that others use")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the rows to measure")
    parser.add_argument("--skip-own", action="store_true", help="only the folders")
    options = parser.parse_args()
    if options.processor_time:
        import torch

        torch.set_num_threads(1)
    own = [] if options.skip_own else [None, write(BUILD / "130m")]
    print(machine(), f"dtype {options.dtype}, {options.rounds} rounds, processor time: {options.processor_time}")
    print("| model | answer | tokens, text | steps | ms in all | ratio | ms behind the first piece | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for folder in [*own, *options.folders]:
        asyncio.run(measure(folder, options))


if __name__ == "__main__":
    main()
