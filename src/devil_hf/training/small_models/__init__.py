"""The small networks that DeViLs of a laptop stand on: those of the embedded checkpoint, and a language model of captions."""
