"""Evidence and plans as one self-contained HTML page."""
