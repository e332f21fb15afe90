"""Measuring what the kernels cost on this machine, for `auto` to choose by (`varlen-vision tune`)."""
