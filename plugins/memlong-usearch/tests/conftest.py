"""Load memlong's test plugin: markers, fixtures, and failures that name the violated clause of the contract."""

pytest_plugins = ["memlong.testing.plugin"]
