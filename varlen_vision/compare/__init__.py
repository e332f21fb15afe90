"""Set the ways to run vision attention side by side, each checked before it is timed.

`run.compare` does the work and returns data; `tables` shows them; `command` is the command line of both
`varlen-vision compare` and `scripts/compare_sdpa_mask.py`.
"""
