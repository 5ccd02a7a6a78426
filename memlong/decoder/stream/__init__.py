"""Token streams: rows, what they retrieve, where it stands, and how they go through the model."""
