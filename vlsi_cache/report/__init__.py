"""What a cache holds and how a run went: numbers, figures, and one self-contained page. Imports no torch."""
