"""Markers and fixtures of memlong's suites; and a failure says which clause of the contract it is about."""

pytest_plugins = ["memlong.testing.plugin"]
