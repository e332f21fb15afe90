"""Profile a model: which lines make the host wait, dense masks, and a trace with named ranges.

report = host_waits(lambda: model(**inputs), model=model)
trace = write_trace(lambda: model(**inputs), "trace.json", model=model)
"""

from varlen_vision.profiling.report import Square, Wait, WaitReport
from varlen_vision.profiling.source import Place
from varlen_vision.profiling.trace import RangeTime, Trace, write_trace
from varlen_vision.profiling.waits import host_waits

__all__ = ["Place", "RangeTime", "Square", "Trace", "Wait", "WaitReport", "host_waits", "write_trace"]
