"""The three jobs behind the command line: train, evaluate, plan.  Each checks everything it can before it changes anything."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)
