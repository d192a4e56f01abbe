"""The bundled model: the pictures it was trained on, its training, its evaluation and its weights.

`render` draws the pictures and needs Pillow and numpy only; `train`, `export` and `evaluate` import
torch and transformers inside their functions. The checkpoint lies in the folder `weights` beside this file.
"""
