"""What is secret in a backend's name or options stays in the config, and goes into no file and no report."""

from memlong import MemoryConfig


def test_settings_are_given_without_credentials():
    config = MemoryConfig(backend="db://me:secret@host/x", backend_options={"token": "secret", "ef": 9})
    shown = config.as_dict()
    assert shown["backend"] == "db://***@host/x"
    assert shown["backend_options"] == {"token": "***", "ef": 9}
    assert "secret" not in str(shown)
    assert config.backend_options == {"token": "secret", "ef": 9}
