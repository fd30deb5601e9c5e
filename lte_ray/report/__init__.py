"""A page about one run or several: ``lte-ray report``, and `lte_ray.write_report`. It needs neither torch nor Ray."""

from lte_ray.report.api import Report, report_directories, write_report

__all__ = ["Report", "report_directories", "write_report"]
