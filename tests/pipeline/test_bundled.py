"""The bundled model through the Pipeline: a cached answer does not load the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "norvik-mug-red.png"
SCRIPT = """
import sys
from qvl import Pipeline
with_open, cache, picture = sys.argv[1:]
pipe = Pipeline(cache=f"sqlite:///{cache}", device="cpu")
found = pipe.analyze_result(picture)
print(found.result.cache, found.value.brand, "torch" in sys.modules)
if with_open == "open":
    pipe.open()
    assert pipe.pipeline.backend.identity() == pipe.pipeline.backend.peek_identity()
pipe.close()
"""


def run(tmp_path: Path, mode: str) -> tuple[str, str]:
    arguments = [sys.executable, "-c", SCRIPT, mode, str(tmp_path / "cache.db"), str(PICTURE)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_a_hit_loads_no_model_and_the_notice_says_what_the_model_is(tmp_path: Path) -> None:
    cold, told = run(tmp_path, "open")
    assert cold.startswith("miss ")
    assert cold.endswith(" True")
    assert "bundled tiny" in told
    assert "Qwen/Qwen3-VL" in told
    warm, _ = run(tmp_path, "plain")
    assert warm == cold.replace("miss", "hit").replace("True", "False")


@pytest.mark.slow
def test_a_program_that_forgets_to_close_ends_in_silence() -> None:
    script = "import sys; from qvl import Pipeline\npipe = Pipeline(cache='off', device='cpu')\n"
    script += "print(pipe.ask(sys.argv[1], 'What brand is it?').text)"
    done = subprocess.run([sys.executable, "-c", script, str(PICTURE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.strip() == "NORVIK"
    assert "Traceback" not in done.stderr
