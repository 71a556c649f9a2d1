"""The selection report: what was chosen, what was expected of the alternatives, and why.

``content`` holds plain records. ``analysis`` makes them from estimates; ``text``, ``markdown`` and
``figures`` render them and see nothing else; ``exports`` write the mixture down for other tools.
:class:`SelectionReport` ties these together.
"""

from hf_auxselect.report.analysis import calibrated as calibrated
from hf_auxselect.report.analysis import strategy_record as strategy_record
from hf_auxselect.report.content import Measurement as Measurement
from hf_auxselect.report.report import SelectionReport as SelectionReport
