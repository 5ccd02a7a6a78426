"""Files: streams that are saved, and decoders that were trained."""
