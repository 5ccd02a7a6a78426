"""Tasks for the lm-evaluation-harness whose prompts are made here, of any length, without a hub."""
