"""The fast tower: aligned products, compiled blocks; the same function of the same weights."""

from varlen_vision.tower.optimize import MODES, optimize_vision, part_reports, restore_vision

__all__ = ["MODES", "optimize_vision", "part_reports", "restore_vision"]
