"""The benchmark of the fast tower: parts that each give gated, timed records, and targets read off those.

`run.run` runs the parts that were asked for and keeps their failures apart; `records` are what is written,
`tables` what is shown. `scripts/bench_gpu.py` is the command line.
"""
