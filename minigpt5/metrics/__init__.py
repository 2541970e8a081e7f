"""Predictions → scores → report."""
