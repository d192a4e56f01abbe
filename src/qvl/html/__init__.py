"""HTML pages and notebook cards of plain values."""
