"""The report: one page that needs nothing from the network, with what was measured beside it.

What was collected (varlen_vision.compare.results) becomes figures, as data with drawings in SVG, and these
become the page. Nothing is measured here.
"""

from varlen_vision.compare.page.build import check_installed, write_report
from varlen_vision.compare.page.folder import check_folder

__all__ = ["check_folder", "check_installed", "write_report"]
