"""llama.cpp on the checkpoint of bench_engine.py: writes it as GGUF by llama.cpp's own scripts, and serves that.

    python bench_engine_llama.py convert SCRIPTS CHECKPOINT FILE      FILE: q8.gguf, q4.gguf or pictures.gguf
    python bench_engine_llama.py serve TEXT PICTURES PORT

SCRIPTS has llama.cpp's `convert_hf_to_gguf.py` and what it imports; the server is that of the package xllamacpp.
"""

from __future__ import annotations

import runpy
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Final

CONTEXT: Final = 2048
PLACES: Final = 32


def convert(scripts: Path, checkpoint: Path, file: Path) -> None:
    """Write the text model in 8 or 4 bits, or the tower in float16, as the name of `file` says."""
    sys.path[:0] = [str(scripts / "gguf-py"), str(scripts)]
    base = import_module("conversion.base")
    # Its list of known vocabularies lacks the bundled one, which splits words as Qwen2's does.
    base.TextModel.get_vocab_base_pre = lambda model, tokenizer: "qwen2"
    base.TextModel._set_vocab_sentencepiece = lambda model, *args, **options: model._set_vocab_gpt2()
    pictures = file.stem == "pictures"
    if file.stem == "q4":
        four = import_module("gguf").GGMLQuantizationType.Q4_0

        def form(model: Any, name: str, new_name: str, block: int | None, dimensions: int) -> Any:
            return four if block is not None and dimensions == 2 else False

        base.ModelBase.tensor_force_quant = form
    script = str(scripts / "convert_hf_to_gguf.py")
    form_of = ["--mmproj", "--outtype", "f16"] if pictures else ["--outtype", "q8_0"]
    sys.argv = [script, str(checkpoint), *form_of, "--outfile", str(file)]
    runpy.run_path(script, run_name="__main__")


def serve(text: str, pictures: str, port: int) -> None:
    """Serve until the process is ended."""
    library = import_module("xllamacpp")
    settings = library.CommonParams()
    settings.model.path, settings.mmproj.path, settings.port = text, pictures, port
    settings.n_parallel, settings.n_ctx = PLACES, PLACES * CONTEXT
    server = library.Server(settings)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(60)


def main() -> None:
    command, *rest = sys.argv[1:]
    if command == "convert":
        convert(*map(Path, rest))
    else:
        serve(rest[0], rest[1], int(rest[2]))


if __name__ == "__main__":
    main()
