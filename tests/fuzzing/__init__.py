"""Hostile inputs, each made from its number, and what is asked of Vitrail for each of them.

`make fuzz` tries all of them, `tests/fuzzing/test_fuzzing.py` a few.
"""
