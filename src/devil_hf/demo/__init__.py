"""The page on which anyone asks a vision network what it sees: `devil demo`, and the same app as a Space.

It stands in the package, not in `space/`, so that an installed `devil demo` has it; `space/app.py` only starts it.
"""

from devil_hf.extras import needs

needs("gradio", "demo")
