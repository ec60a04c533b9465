"""Lets processes of the tests search for dead objects rarely, and not at their end: half a million are imported, and stay.

Those that replace PYTHONPATH by their own do not get it.
"""

import atexit
import gc

gc.set_threshold(50_000, *gc.get_threshold()[1:])
atexit.register(gc.freeze)
