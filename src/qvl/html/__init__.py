"""Pages and cards: plain values in, HTML out."""
