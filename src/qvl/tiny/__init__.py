"""The bundled model: its weights, the pictures it reads, and its evaluation.

`render` draws the pictures and needs Pillow and numpy only; `evaluate` imports torch and transformers inside its
functions. What the weights are made with is the folder `training` of the repository.
"""

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"
"""The folder of the checkpoint."""
FIRST_TRAINING_SEED: Final = 1_000_000
"""Pictures drawn from smaller seeds were never trained on."""
