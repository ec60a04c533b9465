"""The `devil` command: one file per verb, each with its settings, a call into the library, and a print.

Files here are light to import: `devil --help` reads them all, and what a verb needs is imported when it is chosen.
"""
