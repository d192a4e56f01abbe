"""The bundled model: its weights, and the pictures it was trained on.

`render` draws the pictures and needs Pillow and numpy only; `evaluate` imports torch and transformers inside its
functions. The repository's folder `training` has the code that made the weights.
"""

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"
"""The folder of the checkpoint."""
FIRST_TRAINING_SEED: Final = 1_000_000
"""Pictures drawn from smaller seeds were never trained on."""
