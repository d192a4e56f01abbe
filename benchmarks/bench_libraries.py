"""Cost of libraries that replaced code of qvl's own: the same calls, in this checkout or in an older one.

    python benchmarks/bench_libraries.py
    git worktree add ../before 9684d62^ && cd ../before && PYTHONPATH=src python ../qvl/benchmarks/bench_libraries.py

A client's schema made ready and an answer checked by it (jsonschema), the text of a compose file (PyYAML), one streamed
piece of a chat (orjson), and Student's t for the difference of two means (scipy).
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable

PIECE = {
    "id": "chatcmpl-0123456789abcdef",
    "object": "chat.completion.chunk",
    "created": 1795945273,
    "model": "bundled",
    "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}],
}
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {"type": "integer", "minimum": 0}, "price": {"type": "number"}},
    "required": ["name", "count", "price"],
}
INVOICE = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("number", "date", "seller", "buyer", "currency", "iban")},
        "total": {"type": "number"},
        "paid": {"type": "boolean"},
        "items": {"type": "array", "items": ITEM},
    },
    "required": ["number", "total", "items"],
}
ANSWER = {
    "number": "A-17",
    "total": 12.5,
    "items": [{"name": "mug", "count": 2, "price": 3.5}, {"name": "plate", "count": 1, "price": 5.5}],
}
SERVICE = {
    "image": "qvl:0.1.0",
    "command": ["qvl-serve", "Qwen/Qwen3-VL-8B-Instruct", "--port", "8000"],
    "environment": {f"QVL_SETTING_{number}": str(number) for number in range(12)},
    "devices": [f"/dev/davinci{number}" for number in range(8)],
}


def best(call: Callable[[], object], number: int) -> str:
    """Microseconds a call, the best of 20 runs."""
    return f"{min(timeit.repeat(call, number=number, repeat=20)) / number * 1e6:8.1f} us"


def main() -> None:
    from qvl.analysis.schema_model import model_of
    from qvl.ascend.compose import to_yaml

    model = model_of(INVOICE)
    text = json.dumps(ANSWER)
    print(f"a schema of 9 properties made ready  {best(lambda: model_of(INVOICE), 20)}")
    print(f"an answer checked by it              {best(lambda: model.model_validate_json(text), 200)}")
    services = {"services": {f"engine{number}": SERVICE for number in range(8)}}
    print(f"a compose file of 8 services         {best(lambda: to_yaml(services), 5)}")
    print(f"a streamed piece, standard library   {best(lambda: json.dumps(PIECE), 5000)}")
    try:
        import orjson
        from scipy import stats
    except ImportError:
        return
    print(f"a streamed piece, orjson             {best(lambda: orjson.dumps(PIECE), 5000)}")
    print(f"Student's t for an interval          {best(lambda: stats.t.ppf(0.975, 17.3), 50)}")


if __name__ == "__main__":
    main()
