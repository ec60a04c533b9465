"""Lets every process of the tests search for dead objects rarely, and not at its end: half a million are imported, and stay."""

import atexit
import gc

gc.set_threshold(50_000, *gc.get_threshold()[1:])
atexit.register(gc.freeze)
