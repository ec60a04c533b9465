"""The caption metrics as modules of the library `evaluate`: each folder is one, for `evaluate.load(folder)`."""
