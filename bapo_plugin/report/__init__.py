"""A page that shows one or more runs: `write_report` (the command is `bapo report`).

Reading order: `read.py` (a run from its folder), `configuration.py` (of runs without our record), `figures.py` (what is shown), `plots.py` (how it is
drawn), `tables.py`, `page.py` and `template.html` (the page). torch is not imported.
"""

from bapo_plugin.report.page import write_report

__all__ = ["write_report"]
