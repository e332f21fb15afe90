"""Batch jobs: `varlen-vision infer` and `varlen-vision encode`, resumable, in one process or many.

    items -> worker processes decode and preprocess -> batches by budget -> model step -> journal -> results

`engine` is the line above, once for both jobs; `infer` and `encode` are what differs. Who does which items is
agreed on through files in the output folder (`leases`, `work`).
"""
