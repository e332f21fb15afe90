"""What a bug report needs to know of a machine, and whether the library works on it.

Importing this needs nothing but Python, and so does every section that can do without more: whatever is
missing or broken, `varlen-vision doctor` (or `python -m varlen_vision.doctor`) says so and goes on.
"""
