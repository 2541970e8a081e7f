"""The paper's comparisons, rerun on the tiny world."""
