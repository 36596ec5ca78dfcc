"""Solvers: pure functions on weights and input statistics. They know no graph and read no files."""
