"""Would torch.compile pay for prompts and pictures? One block of the 2B's tower and one of its text model's MLPs.

Each as the engine computes it (kernels by measurement, activations and residuals fused into matrix products) and as
inductor compiles the same formulas with frozen weights; attention is the same in both and left out. Processor time of
one thread, the best of some runs, and that of compiling. `--autotune` lets inductor choose among its own templates of
matrix products (AMX's where there is AMX) and oneDNN's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
from bench_engine import machine
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from qvl.backends.local.model.kernels import Kernels
from qvl.backends.local.model.linear import LinearPlan

WIDTH, WIDENED = 1024, 4096
TEXT_WIDTH, TEXT_WIDENED = 2048, 6144


def linear(inner: int, outer: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inner, outer, bias=bias)
    nn.init.normal_(layer.weight, std=inner**-0.5)
    return layer.to(dtype).requires_grad_(requires_grad=False)


class Tower(nn.Module):
    """A block of the tower without its attention."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6, dtype=dtype) for _ in range(2))
        self.qkv, self.proj = linear(WIDTH, 3 * WIDTH, dtype), linear(WIDTH, WIDTH, dtype)
        self.up, self.down = linear(WIDTH, WIDENED, dtype), linear(WIDENED, WIDTH, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.proj(self.qkv(self.norm1(hidden))[:, :WIDTH])
        return hidden + self.down(F.gelu(self.up(self.norm2(hidden)), approximate="tanh"))

    def engine(self, plan: LinearPlan) -> Callable[[Tensor], Tensor]:
        qkv, proj, up, down = (plan.join((part,)) for part in (self.qkv, self.proj, self.up, self.down))

        def run(hidden: Tensor) -> Tensor:
            hidden = proj.added_to(hidden, qkv(self.norm1(hidden), ())[:, :WIDTH], ())
            return down.added_to(hidden, up.gelu(self.norm2(hidden), "tanh", ()), ())

        return run


class TextMlp(nn.Module):
    """The MLP of a text layer, with the norm before it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(TEXT_WIDTH, eps=1e-6, dtype=dtype)
        self.gate, self.up = (linear(TEXT_WIDTH, TEXT_WIDENED, dtype, bias=False) for _ in range(2))
        self.down = linear(TEXT_WIDENED, TEXT_WIDTH, dtype, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def engine(self, plan: LinearPlan) -> Callable[[Tensor], Tensor]:
        both, down = plan.join((self.gate, self.up)), plan.join((self.down,))
        kernels, weight = Kernels(), self.norm.weight

        def run(hidden: Tensor) -> Tensor:
            return down.added_to(hidden, kernels.swiglu(both(kernels.rms_norm(hidden, weight, 1e-6), ())), ())

        return run


def best(run: Callable[[Tensor], Tensor], x: Tensor, rounds: int) -> float:
    """Milliseconds of processor time of the fastest run."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        run(x.clone())
        times.append(time.process_time() - began)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=784, help="patches of a 448 x 448 picture; of text a quarter")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--autotune", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    options = {"freezing": True, "max_autotune": given.autotune, "max_autotune_gemm_backends": "CPP,ATEN"}
    print(machine(), f"{given.dtype}, torch {torch.__version__}, autotune {given.autotune}")
    print("| part | rows | engine | plain torch | compiled | compiling |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for name, kind, rows, width in (
            ("tower's block", Tower, given.rows, WIDTH),
            ("text MLP", TextMlp, given.rows // 4, TEXT_WIDTH),
        ):
            part, x = kind(dtype), torch.randn((rows, width)).to(dtype)
            plain = best(part, x, given.rounds)
            expected = part(x.clone())
            compiled = torch.compile(part, options=options)
            began = sum(os.times()[:4])  # of compilers too
            assert torch.allclose(compiled(x.clone()).float(), expected.float(), atol=0.1)
            compiling = sum(os.times()[:4]) - began
            with_inductor = best(compiled, x, given.rounds)
            engine = part.engine(LinearPlan())
            assert torch.allclose(engine(x.clone()).float(), expected.float(), atol=0.1)
            ours = best(engine, x, given.rounds)
            cells = f"{ours:.1f} ms | {plain:.1f} ms | {with_inductor:.1f} ms | {compiling:.0f} s"
            print(f"| {name} | {rows} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
